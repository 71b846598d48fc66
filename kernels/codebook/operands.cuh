// operands.cuh: tokens and codes as operands of the sweeps (scores.cuh): used in place, or packed as bf16 parts, one
// chunk at a time.
//
// A packed row of f32 holds its parts side by side. bf16 with rows that do not allow 16-byte copies is packed too, as
// one part.
#pragma once

#include "pieces.cuh"
#include "scores.cuh"

namespace ett {
namespace codebook {

inline constexpr int64_t kMostDim = 512;

// Splits x into a sum of PARTS bf16 numbers. One part rounds to nearest, two parts have an error of 2^-18 of x, three
// parts are exact. If x is not finite, neither is the first part.
template <int PARTS> __device__ __forceinline__ void cut(float x, float (&part)[PARTS]) {
    if constexpr (PARTS == 3) {
        // Truncation removes eight bits from the rest each time, and cannot overflow.
        const bool finite = fabsf(x) <= 3.402823466e38f;
        part[0] = finite ? bits_to_float(float_to_bits(x) & 0xffff0000u) : x;
        const float rest = finite ? x - part[0] : 0.f;
        part[1] = bits_to_float(float_to_bits(rest) & 0xffff0000u);
        part[2] = rest - part[1];
    } else {
        part[0] = x;
        if constexpr (PARTS == 2) {
            part[0] = rounded<bf16>(x);
            part[1] = fabsf(part[0]) <= 3.402823466e38f ? x - part[0] : 0.f;
        }
    }
}

// Writes elements [at, at + 8) of a packed row of PARTS parts.
template <int PARTS> __device__ __forceinline__ void pack_piece(bf16* row, int64_t part, int64_t at, const float (&v)[8]) {
    float parts[PARTS][8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float one[PARTS];
        cut<PARTS>(v[i], one);
#pragma unroll
        for (int p = 0; p < PARTS; ++p) parts[p][i] = one[p];
    }
#pragma unroll
    for (int p = 0; p < PARTS; ++p) store_global(row + p * part + at, parts[p]);
}

inline constexpr int kPackThreads = 256;

// Packs the rows of `from`, padded with zeros to whole pieces of 8 columns.
template <class T, int PARTS>
__global__ void __launch_bounds__(kPackThreads) static pack_kernel(const gemm::Matrix<T> from, bf16* to, int64_t part) {
    const int64_t pieces = part / 8;
    for (int64_t i = int64_t(blockIdx.x) * kPackThreads + threadIdx.x; i < from.rows * pieces; i += int64_t(gridDim.x) * kPackThreads) {
        const int64_t row = i / pieces, at = (i - row * pieces) * 8;
        float v[8];
        const T* const p = from.p + row * from.ld + at;
        if (from.vectors && at + 8 <= from.cols) {
#pragma unroll
            for (int e = 0; e < 8; e += kWide<T>) {
                float some[kWide<T>];
                load<kWide<T>>(some, p + e);
#pragma unroll
                for (int i = 0; i < kWide<T>; ++i) v[e + i] = some[i];
            }
        } else {
#pragma unroll
            for (int e = 0; e < 8; ++e) v[e] = at + e < from.cols ? to_float(p[e]) : 0.f;
        }
        pack_piece<PARTS>(to + row * PARTS * part, part, at, v);
    }
}

// ---- host ------------------------------------------------------------------------------------------------

// Whether and how an argument is packed.
struct Packing {
    bool packed;
    int parts;      // 1 or 3
    int64_t cols;   // columns per part in the products
    int64_t ld;     // elements of a packed row
    int64_t bytes;  // bytes of a packed row; 0 if not packed

    explicit Packing(const ett_view& v)
        : packed(v.dtype != ETT_BF16 || !wide(v)),
          parts(v.dtype == ETT_BF16 ? 1 : 3),
          cols(packed ? round_up(ett::cols(v), 8) : ett::cols(v)),
          ld(parts * cols),
          bytes(packed ? 2 * ld : 0) {}

    // The operand whose packed rows begin at `at`.
    Operand at(bf16* at, int64_t rows) const { return {{at, rows, cols, ld, true}, cols}; }
};

// Makes rows [first, first + count) of `v` an operand: packs them into `space`, or uses them in place.
inline int32_t operand(const char* op, const ett_view& v, const Packing& p, int64_t first, int64_t count, bf16* space, Operand& out, const ett_launch* l) {
    if (!p.packed) {
        const gemm::Matrix<bf16> m = gemm::matrix<bf16>(v);
        out = {{m.p + first * m.ld, count, m.cols, m.ld, true}, 0};
        return ETT_OK;
    }
    out = p.at(space, count);
    const dim3 grid(unsigned(std::min(ceil_div(count * p.cols / 8, kPackThreads), int64_t(multiprocessors()) * 16)));
    auto go = [&](auto* kernel, auto t) {
        using T = decltype(t);
        gemm::Matrix<T> m = gemm::matrix<T>(v);
        m.p += first * m.ld;
        m.rows = count;
        return launch(op, kernel, grid, dim3(kPackThreads), 0, l, m, space, p.cols);
    };
    return v.dtype == ETT_BF16 ? go(pack_kernel<bf16, 1>, bf16{}) : go(pack_kernel<float, 3>, float{});
}

// The unit of chunk sizes. On the shim it is smaller, so that small shapes have several chunks too.
#ifdef ETT_SHIM
inline constexpr int64_t kMiB = 1 << 10;
#else
inline constexpr int64_t kMiB = 1 << 20;
#endif
inline constexpr int64_t kPackBytes = 16 * kMiB;  // of a packed operand, at most

// Rows per chunk: all, or as many whole tiles as fit into `space` bytes.
inline int64_t chunk_rows(int64_t rows, int64_t bytes_a_row, int64_t space, int64_t tile) {
    return bytes_a_row == 0 ? rows : std::min(rows, std::max(space / bytes_a_row / tile, int64_t(1)) * tile);
}

// Rows per chunk, in whole tiles: the fewest chunks of at most `most` rows, of equal size.
inline int64_t equal_chunks(int64_t rows, int64_t most, int64_t tile) { return round_up(ceil_div(rows, ceil_div(rows, most)), tile); }

// Calls f with the number of parts for an element type, as a std::integral_constant.
template <class F> auto with_parts(int32_t dtype, F f) {
    return dtype == ETT_BF16 ? f(std::integral_constant<int, 1>{}) : f(std::integral_constant<int, 3>{});
}

// Checks z and e of a sweep.
inline bool check_operands(Check& check, const ett_view& z, const ett_view& e) {
    if (!check.act("z", z) || !check.type("e", e, z.dtype) || !check.range("e", rows(e), 1, INT32_MAX) ||
        !check.range("z", rows(z), 0, INT32_MAX) || !check.matrix("e", e, z.dtype, rows(e), cols(z)))
        return false;
    if (cols(z) > kMostDim) {
        char got[96];
        snprintf(got, sizeof got, "%lld columns", (long long)cols(z));
        check.fail(ETT_UNSUPPORTED, "z", got, "at most 512");
    }
    return check.require(cols(z) > 0, "z", "no columns", "at least one");
}

}  // namespace codebook
}  // namespace ett
