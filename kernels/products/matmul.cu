// matmul.cu: y = op(a) op(b) + bias, and y += op(a) op(b); op transposes if ta or tb is set. linear_gelu: pre = x w^T +
// bias and y = gelu(pre) in the tanh form (arXiv 1606.08415); x is a, w is b transposed.
//
// a     N,C or C,N if ta  act  rows of any stride   in
// b     C,O or O,C if tb  act  rows of any stride   in
// bias  O                 act  contiguous           in, may be absent; not in matmul_acc
// pre   N,O               act  rows of any stride   out; linear_gelu only
// y     N,O               act  rows of any stride   out;  matmul_acc: f32, added to
//
// numerics: products are summed in f32 in ascending order of C (f32: fused multiply-adds, no TF32), then the bias or
// the old y is added and the result is rounded once; gelu is applied before rounding. Bitwise repeatable.
// work: 2*N*C*O FLOP; (N*C + C*O + N*O)*size bytes (linear_gelu: N*O*size more).
// implementations: "hopper" (hopper_matmul.cuh): wgmma and TMA, for bf16 on Hopper, if the rows of a and b, and of an f32
// y, begin at multiples of 16 bytes. "large", "small": tiles of gemm.cuh; "large" if the rows of a and b are whole 16-byte
// pieces.
// limits: none beyond memory. "small" copies operands whose rows are not whole 16-byte pieces element by element, which is
// several times slower.
#include "activation.cuh"
#include "gemm.cuh"
#include "hopper_matmul.cuh"

namespace ett {
namespace {

using gemm::Matrix;

// Large: 64 x 64 (f32: 64 x 32) per warp is the most that its registers hold, and needs the least traffic from shared
// memory; two (f32: three) blocks of 4 warps fill the registers of a multiprocessor, and while one block waits at a
// barrier another computes. Small: more blocks, for products with fewer large tiles than multiprocessors.
template <class T, bool TA, bool TB> struct Tiles;
template <bool TA, bool TB> struct Tiles<bf16, TA, TB> {
    using Large = gemm::Tile<bf16, 128, 128, 32, 64, 64, 4, TA, TB, true>;
    using Small = gemm::Tile<bf16, 64, 64, 32, 32, 32, 4, TA, TB>;
};
template <bool TA, bool TB> struct Tiles<float, TA, TB> {
    using Large = gemm::Tile<float, 128, 64, 16, 64, 32, 3, TA, TB, true>;
    using Small = gemm::Tile<float, 64, 64, 16, 32, 32, 3, TA, TB>;
};

// Blocks take tiles in groups of this many rows of tiles, column by column, so that blocks that run at the same time
// share their operands in the L2.
constexpr int64_t kGroup = 8;

// Where the results go. One of y and y_acc is null.
template <class T> struct Output {
    T* y;          // overwritten
    float* y_acc;  // added to
    T* pre;        // if not null, receives the sums, and y their GELU
    int64_t ld, ld_pre;
    bool pairs;    // two neighbours can be stored as one access
};

// Stores two neighbours; `one` and `two` tell which of them are inside the matrix.
template <class T> __device__ __forceinline__ void write_two(T* p, const float (&v)[2], bool pairs, bool one, bool two) {
    if (pairs && two) {
        store<2>(p, v);
    } else {
        if (one) p[0] = from_float<T>(v[0]);
        if (two) p[1] = from_float<T>(v[1]);
    }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 256 / Tile::kThreads)
matmul_kernel(const Matrix<typename Tile::Type> a, const Matrix<typename Tile::Type> b, const typename Tile::Type* bias,
              const __grid_constant__ Output<typename Tile::Type> out, int64_t rows, int64_t cols) {
    using T = typename Tile::Type;
    ETT_DYNAMIC_SMEM(smem);
    const int64_t tile_rows = (rows + Tile::kRows - 1) / Tile::kRows, tile_cols = (cols + Tile::kCols - 1) / Tile::kCols;
    const int64_t first = blockIdx.x / (kGroup * tile_cols) * kGroup, height = min(tile_rows - first, kGroup);
    const int64_t in_group = blockIdx.x - first * tile_cols;
    const int64_t row0 = (first + in_group % height) * Tile::kRows, col0 = in_group / height * Tile::kCols;

    gemm::Acc<Tile> acc;
    acc.clear();
    gemm::tile_product(acc, a, b, row0, col0, smem);

#pragma unroll
    for (int j = 0; j < Tile::kAccCols; j += 2) {
        const int64_t col = col0 + Tile::col(j);
        const bool one = col < cols, two = col + 1 < cols;
        const float bias0 = bias && one ? to_float(bias[col]) : 0.f, bias1 = bias && two ? to_float(bias[col + 1]) : 0.f;
#pragma unroll
        for (int i = 0; i < Tile::kAccRows; ++i) {
            const int64_t row = row0 + Tile::row(i);
            if (row >= rows) continue;
            const int64_t at = row * out.ld + col;
            float v[2] = {acc.at(i, j) + bias0, acc.at(i, j + 1) + bias1};
            if (out.y_acc) {
                if (out.pairs && two) {
                    float old[2];
                    load<2>(old, out.y_acc + at);
                    const float sum[2] = {old[0] + v[0], old[1] + v[1]};
                    store<2>(out.y_acc + at, sum);
                } else {
                    if (one) out.y_acc[at] += v[0];
                    if (two) out.y_acc[at + 1] += v[1];
                }
                continue;
            }
            if (out.pre) {
                write_two(out.pre + row * out.ld_pre + col, v, out.pairs, one, two);
                v[0] = gelu_tanh<T>(v[0]);
                v[1] = gelu_tanh<T>(v[1]);
            }
            write_two(out.y + at, v, out.pairs, one, two);
        }
    }
}

// Large tiles if there are at least as many as multiprocessors.
bool prefers_large(int64_t rows, int64_t cols, int32_t dtype, int multiprocessors) {
    const int64_t tile_cols = dtype == ETT_BF16 ? Tiles<bf16, false, false>::Large::kCols : Tiles<float, false, false>::Large::kCols;
    return ceil_div(rows, 128) * ceil_div(cols, tile_cols) >= multiprocessors;
}

struct Product {
    const ett_view *a, *b, *bias, *y, *pre;  // bias and pre: null if absent
    bool ta, tb;
    bool add;  // add to y, which is f32
};

int32_t run(const char* op, Check& check, const Product& p, const ett_launch* l) {
    const int64_t n = rows(*p.y), o = cols(*p.y);
    if (numel(*p.y) == 0) return ett_done("");
    const bool vectors = wide(*p.a) && wide(*p.b);
#ifdef ETT_SHIM
    const Implementation hopper_tiles{"hopper", false};
#else
    const hopper::Operands operands{p.a, p.b, p.bias, p.y, p.pre, p.ta, p.tb, p.add};
    const Implementation hopper_tiles{"hopper", hopper::can_multiply(operands)};
#endif
    const Implementation small_tiles{"small", true}, large_tiles{"large", vectors};
    const char* kernel = prefers_large(n, o, p.a->dtype, multiprocessors()) ? check.choose(l, {hopper_tiles, large_tiles, small_tiles})
                                                                            : check.choose(l, {hopper_tiles, small_tiles, large_tiles});
    if (!check.ok()) return check.status();
#ifndef ETT_SHIM
    if (strcmp(kernel, "hopper") == 0) {
        const int32_t status = hopper::multiply(op, operands, multiprocessors(), l);
        return status == ETT_OK ? ett_done(kernel) : status;
    }
#endif
    const bool large = strcmp(kernel, "large") == 0;
    const int64_t pair = 2 * dtype_size(p.y->dtype);
    const bool pairs = wide(*p.y, pair) && (!p.pre || wide(*p.pre, pair));
    return with_act(p.a->dtype, [&](auto t) {
        using T = decltype(t);
        const Output<T> out{p.add ? nullptr : data<T>(*p.y), p.add ? data<float>(*p.y) : nullptr, p.pre ? data<T>(*p.pre) : nullptr,
                            stride(*p.y), p.pre ? stride(*p.pre) : 0, pairs};
        auto go = [&](auto tile) {
            using Tile = decltype(tile);
            const dim3 grid(unsigned(ceil_div(n, Tile::kRows) * ceil_div(o, Tile::kCols)));
            const int32_t status =
                launch(op, matmul_kernel<Tile>, grid, dim3(Tile::kThreads), Tile::kSmem, l, gemm::matrix<T>(*p.a), gemm::matrix<T>(*p.b),
                       p.bias ? data<const T>(*p.bias) : nullptr, out, n, o);
            return status == ETT_OK ? ett_done(kernel) : status;
        };
        auto sized = [&](auto tiles) {
            using Sizes = decltype(tiles);
            return large ? go(typename Sizes::Large{}) : go(typename Sizes::Small{});
        };
        if (p.ta) return p.tb ? sized(Tiles<T, true, true>{}) : sized(Tiles<T, true, false>{});
        return p.tb ? sized(Tiles<T, false, true>{}) : sized(Tiles<T, false, false>{});
    });
}

// Checks that the shapes and types of a, b and y match; y has type `out`, or the type of a if `out` is -1.
template <class Args> bool fits(Check& check, const Args* s, int32_t out) {
    if (!check.ok() || !check.act("a", s->a) || !check.type("b", s->b, s->a.dtype)) return false;
    const int64_t n = s->ta ? cols(s->a) : rows(s->a), c = s->ta ? rows(s->a) : cols(s->a);
    const int64_t inner = s->tb ? cols(s->b) : rows(s->b), o = s->tb ? rows(s->b) : cols(s->b);
    if (inner != c) {
        char got[96], want[96];
        snprintf(got, sizeof got, "an inner dimension of %lld", (long long)inner);
        snprintf(want, sizeof want, "%lld", (long long)c);
        check.fail(ETT_BAD_ARGUMENT, "b", got, want);
        return false;
    }
    return check.matrix("y", s->y, out < 0 ? s->a.dtype : out, n, o) &&
           check.range("y", ceil_div(n, 64) * ceil_div(o, 64), 0, INT32_MAX);
}

bool sound(Check& check, const ett_matmul_args* a) {
    return fits(check, a, -1) && (!present(a->bias) || check.vector("bias", a->bias, a->a.dtype, cols(a->y)));
}

bool sound(Check& check, const ett_matmul_acc_args* a) { return fits(check, a, ETT_F32); }

bool sound(Check& check, const ett_linear_gelu_args* a) {
    if (!check.ok() || !check.act("x", a->x) || !check.type("w", a->w, a->x.dtype)) return false;
    const int64_t n = rows(a->x), o = rows(a->w);
    return check.matrix("w", a->w, a->x.dtype, o, cols(a->x)) && (!present(a->bias) || check.vector("bias", a->bias, a->x.dtype, o)) &&
           check.matrix("pre", a->pre, a->x.dtype, n, o) && check.matrix("y", a->y, a->x.dtype, n, o) &&
           check.range("y", ceil_div(n, 64) * ceil_div(o, 64), 0, INT32_MAX);
}

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(matmul)
ETT_NO_WORKSPACE(linear_gelu)
ETT_NO_WORKSPACE(matmul_acc)

extern "C" int32_t ett_matmul(const ett_matmul_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("matmul", a, l);
    if (!sound(check, a)) return check.status();
    return run("matmul", check, {&a->a, &a->b, present(a->bias) ? &a->bias : nullptr, &a->y, nullptr, a->ta != 0, a->tb != 0, false}, l);
}

extern "C" int32_t ett_matmul_acc(const ett_matmul_acc_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("matmul_acc", a, l);
    if (!sound(check, a)) return check.status();
    return run("matmul_acc", check, {&a->a, &a->b, nullptr, &a->y, nullptr, a->ta != 0, a->tb != 0, true}, l);
}

extern "C" int32_t ett_linear_gelu(const ett_linear_gelu_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("linear_gelu", a, l);
    if (!sound(check, a)) return check.status();
    return run("linear_gelu", check, {&a->x, &a->w, present(a->bias) ? &a->bias : nullptr, &a->y, &a->pre, false, true, false}, l);
}
