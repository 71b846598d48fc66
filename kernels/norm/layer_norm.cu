// layer_norm.cu: y = (x - mean) * rstd * w + b with rstd = 1 / sqrt(var + eps), biased variance, and its gradient
//   dx = rstd * (d - mean(d) - xhat * mean(d * xhat)) with xhat = (x - mean) * rstd and d = dy * w,
//   dw += sum_n dy * xhat,   db += sum_n dy.
//
// x, dy       N,C  act  rows of any stride   in
// w, b        C    act  contiguous           in
// y, dx       N,C  act  rows of any stride   out
// mean, rstd  N    f32  contiguous           out; in for the backward
// dw, db      C    f32  contiguous           added to; may be absent
//
// numerics: float32, one rounding per output; the variance is the mean square of x - mean, computed in a second pass
// over the registers. Sums over a row: each thread its own elements, then the warp, then the team. Sums of dw and db:
// each team its rows in order, a block its teams, a last kernel the blocks. The bits depend only on N, C and the number
// of multiprocessors.
// work: 6 FLOP an element forward, 10 backward; 2*N*C*size bytes forward, 3 backward.
// limits: "wide" requires rows of whole 16-byte pieces, at most 2048 pieces (1024 in the backward of bf16); "plain"
// accepts any.
// workspace: backward with dw or db: 2*C floats per block.
#include <math.h>

#include "rows.cuh"

namespace ett {
namespace {

// Threads that fit a multiprocessor: __launch_bounds__ limits the forward to 64 registers a thread, the backward to
// 128.
constexpr int kForwardThreads = 1024, kBackwardThreads = 512;
// Pieces per thread in the backward, which keeps two sums for each of their elements: 16 elements at most.
template <class T> constexpr int kBackwardVecs = sizeof(T) == 2 ? 2 : 4;

template <class T> struct Forward {
    Matrix<const T> in[1];  // x
    const T* w;
    const T* b;
    Matrix<T> y;
    float* mean;
    float* rstd;
    int64_t n, c;
    float eps;
};

template <class T> struct Backward {
    Matrix<const T> in[2];  // dy, x
    const T* w;
    const float* mean;
    const float* rstd;
    Matrix<T> dx;
    float* partials;  // of dw and db, [blocks, 2, C]; null: not computed
    int64_t n, c;
};

__device__ __forceinline__ float rstd_of(float squares, int64_t c, float eps) { return 1.f / sqrtf(squares / float(c) + eps); }

template <class T, int VECS>
__global__ void __launch_bounds__(kTeamThreads, kForwardThreads / kTeamThreads) forward_kernel(const __grid_constant__ Forward<T> a) {
    constexpr int N = kWide<T>;
    ETT_DYNAMIC_SMEM(smem);
    __shared__ float smem_sum[1][kTeamWarps], smem_squares[1][kTeamWarps];
    Rows<T, VECS, 1> rows(smem, a.in, a.n, a.c);
    for (; rows.more(); rows.advance()) {
        Vec<T, N> x[VECS];
        float sum[1] = {0.f}, squares[1] = {0.f};
        rows.wait();
        rows.take(0, x);
#pragma unroll
        for (int v = 0; v < VECS; ++v) {
            float f[N];
            unpack(f, x[v]);
#pragma unroll
            for (int j = 0; j < N; ++j) sum[0] += f[j];
        }
        rows.refill();
        team_sum(sum, smem_sum);
        const float mean = sum[0] / float(a.c);
#pragma unroll
        for (int v = 0; v < VECS; ++v) {
            if (!rows.holds(v)) continue;
            float f[N];
            unpack(f, x[v]);
#pragma unroll
            for (int j = 0; j < N; ++j) squares[0] += (f[j] - mean) * (f[j] - mean);
        }
        team_sum(squares, smem_squares);
        const float rstd = rstd_of(squares[0], a.c, a.eps);
        if (threadIdx.x == 0) {
            a.mean[rows.row()] = mean;
            a.rstd[rows.row()] = rstd;
        }
#pragma unroll
        for (int v = 0; v < VECS; ++v) {
            if (!rows.holds(v)) continue;
            float f[N], w[N], b[N];
            unpack(f, x[v]);
            load(w, a.w + rows.column(v));
            load(b, a.b + rows.column(v));
#pragma unroll
            for (int j = 0; j < N; ++j) f[j] = (f[j] - mean) * rstd * w[j] + b[j];
            store_global(a.y.row(rows.row()) + rows.column(v), f);
        }
    }
}

template <class T, int VECS>
__global__ void __launch_bounds__(kTeamThreads, kBackwardThreads / kTeamThreads) backward_kernel(const __grid_constant__ Backward<T> a) {
    constexpr int N = kWide<T>;
    ETT_DYNAMIC_SMEM(smem);
    __shared__ float smem_sums[2][2][kTeamWarps];
    Rows<T, VECS, 2> rows(smem, a.in, a.n, a.c);
    float dw[VECS][N] = {}, db[VECS][N] = {};
    float next_mean = rows.more() ? a.mean[rows.row()] : 0.f, next_rstd = rows.more() ? a.rstd[rows.row()] : 0.f;
    for (int turn = 0; rows.more(); rows.advance(), turn ^= 1) {
        const float mean = next_mean, rstd = next_rstd;
        if (rows.next() < a.n) {
            next_mean = a.mean[rows.next()];
            next_rstd = a.rstd[rows.next()];
        }
        Vec<T, N> dy[VECS], x[VECS];
        float sums[2] = {0.f, 0.f};  // of d and of d * xhat
        rows.wait();
        rows.take(0, dy);
        rows.take(1, x);
#pragma unroll
        for (int v = 0; v < VECS; ++v) {
            if (!rows.holds(v)) continue;
            float g[N], f[N], w[N];
            unpack(g, dy[v]);
            unpack(f, x[v]);
            load(w, a.w + rows.column(v));
#pragma unroll
            for (int j = 0; j < N; ++j) {
                // d is rounded, not fused into a multiply-add, so that d - mean(d) vanishes where d is constant.
                const float xhat = (f[j] - mean) * rstd, d = __fmul_rn(g[j], w[j]);
                dw[v][j] += g[j] * xhat;
                db[v][j] += g[j];
                sums[0] += d;
                sums[1] += d * xhat;
            }
        }
        rows.refill();
        team_sum(sums, smem_sums[turn]);
        const float of_d = sums[0] / float(a.c), along = sums[1] / float(a.c);
#pragma unroll
        for (int v = 0; v < VECS; ++v) {
            if (!rows.holds(v)) continue;
            float g[N], f[N], w[N];
            unpack(g, dy[v]);
            unpack(f, x[v]);
            load(w, a.w + rows.column(v));
#pragma unroll
            for (int j = 0; j < N; ++j) f[j] = rstd * (__fmul_rn(g[j], w[j]) - of_d - (f[j] - mean) * rstd * along);
            store_global(a.dx.row(rows.row()) + rows.column(v), f);
        }
    }
    if (a.partials) {
        join_teams(dw, reinterpret_cast<float*>(smem));
        join_teams(db, reinterpret_cast<float*>(smem));
        write_partials(rows, dw, a.partials + int64_t(blockIdx.x) * 2 * a.c);
        write_partials(rows, db, a.partials + (int64_t(blockIdx.x) * 2 + 1) * a.c);
    }
}

template <class T> __global__ void __launch_bounds__(256) forward_plain_kernel(const __grid_constant__ Forward<T> a) {
    __shared__ float smem_sum[1][kTeamWarps], smem_squares[1][kTeamWarps];
    for (int64_t row = blockIdx.x; row < a.n; row += gridDim.x) {
        const T* x = a.in[0].row(row);
        float sum[1] = {0.f}, squares[1] = {0.f};
        for (int64_t c = threadIdx.x; c < a.c; c += blockDim.x) sum[0] += to_float(x[c]);
        team_sum(sum, smem_sum);
        const float mean = sum[0] / float(a.c);
        for (int64_t c = threadIdx.x; c < a.c; c += blockDim.x) squares[0] += (to_float(x[c]) - mean) * (to_float(x[c]) - mean);
        team_sum(squares, smem_squares);
        const float rstd = rstd_of(squares[0], a.c, a.eps);
        if (threadIdx.x == 0) {
            a.mean[row] = mean;
            a.rstd[row] = rstd;
        }
        for (int64_t c = threadIdx.x; c < a.c; c += blockDim.x)
            a.y.row(row)[c] = from_float<T>((to_float(x[c]) - mean) * rstd * to_float(a.w[c]) + to_float(a.b[c]));
    }
}

template <class T> __global__ void __launch_bounds__(256) backward_plain_kernel(const __grid_constant__ Backward<T> a) {
    __shared__ float smem_sums[2][2][kTeamWarps];
    float *dw = nullptr, *db = nullptr;
    if (a.partials) {
        dw = a.partials + int64_t(blockIdx.x) * 2 * a.c;
        db = dw + a.c;
        for (int64_t c = threadIdx.x; c < a.c; c += blockDim.x) dw[c] = db[c] = 0.f;
    }
    int turn = 0;
    for (int64_t row = blockIdx.x; row < a.n; row += gridDim.x, turn ^= 1) {
        const T *dy = a.in[0].row(row), *x = a.in[1].row(row);
        const float mean = a.mean[row], rstd = a.rstd[row];
        float sums[2] = {0.f, 0.f};  // of d and of d * xhat
        for (int64_t c = threadIdx.x; c < a.c; c += blockDim.x) {
            const float g = to_float(dy[c]), d = __fmul_rn(g, to_float(a.w[c])), xhat = (to_float(x[c]) - mean) * rstd;
            sums[0] += d;
            sums[1] += d * xhat;
            if (dw) {
                dw[c] += g * xhat;
                db[c] += g;
            }
        }
        team_sum(sums, smem_sums[turn]);
        const float of_d = sums[0] / float(a.c), along = sums[1] / float(a.c);
        for (int64_t c = threadIdx.x; c < a.c; c += blockDim.x) {
            const float d = __fmul_rn(to_float(dy[c]), to_float(a.w[c])), xhat = (to_float(x[c]) - mean) * rstd;
            a.dx.row(row)[c] = from_float<T>(rstd * (d - of_d - xhat * along));
        }
    }
}

bool sound(Check& check, const ett_layer_norm_fwd_args* a) {
    if (!check.ok() || !check.act("x", a->x)) return false;
    const int64_t n = rows(a->x), c = cols(a->x);
    check.matrix("y", a->y, a->x.dtype, n, c);
    check.vector("w", a->w, a->x.dtype, c);
    check.vector("b", a->b, a->x.dtype, c);
    check.vector("mean", a->mean, ETT_F32, n);
    check.vector("rstd", a->rstd, ETT_F32, n);
    return check.ok();
}

bool sound(Check& check, const ett_layer_norm_bwd_args* a) {
    if (!check.ok() || !check.act("x", a->x)) return false;
    const int64_t n = rows(a->x), c = cols(a->x);
    check.matrix("dy", a->dy, a->x.dtype, n, c);
    check.matrix("dx", a->dx, a->x.dtype, n, c);
    check.vector("w", a->w, a->x.dtype, c);
    check.vector("mean", a->mean, ETT_F32, n);
    check.vector("rstd", a->rstd, ETT_F32, n);
    if (present(a->dw)) check.vector("dw", a->dw, ETT_F32, c);
    if (present(a->db)) check.vector("db", a->db, ETT_F32, c);
    return check.ok();
}

int64_t pieces(const ett_view& x) { return cols(x) * dtype_size(x.dtype) / 16; }
RowsConfig forward_config(const ett_view& x) { return choose_rows_config(pieces(x)); }
RowsConfig backward_config(const ett_view& x) {
    return choose_rows_config(pieces(x), with_act(x.dtype, [](auto t) { return kBackwardVecs<decltype(t)>; }));
}

// Blocks of the backward.
int64_t backward_blocks(const ett_view& x, bool is_wide) {
    return is_wide ? rows_blocks(backward_config(x), rows(x), kBackwardThreads, multiprocessors()) : plain_blocks(rows(x), multiprocessors());
}

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(layer_norm_fwd)

extern "C" int32_t ett_layer_norm_fwd(const ett_layer_norm_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("layer_norm_fwd", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->x) == 0) return ett_done("");
    const RowsConfig c = forward_config(a->x);
    const bool vectors = c.vecs && wide(a->x) && wide(a->w) && wide(a->b) && wide(a->y);
    const char* kernel = check.choose(l, {{"wide", vectors}, {"plain", true}});
    if (!check.ok()) return check.status();
    const bool is_wide = strcmp(kernel, "wide") == 0;
    const int64_t n = rows(a->x);
    const int32_t status = with_act(a->x.dtype, [&](auto t) {
        using T = decltype(t);
        const Forward<T> k{{matrix<const T>(a->x)}, data<const T>(a->w), data<const T>(a->b), matrix<T>(a->y), data<float>(a->mean),
                           data<float>(a->rstd), n, cols(a->x), float(a->eps)};
        if (!is_wide) {
            const dim3 grid(unsigned(plain_blocks(n, multiprocessors()))), block(unsigned(plain_threads(k.c)));
            return launch("layer_norm_fwd", forward_plain_kernel<T>, grid, block, 0, l, k);
        }
        const dim3 grid(unsigned(rows_blocks(c, n, kForwardThreads, multiprocessors()))), block(unsigned(c.threads), unsigned(c.teams));
        return with_vecs(
            c, [&](auto vecs) { return launch("layer_norm_fwd", forward_kernel<T, vecs>, grid, block, rows_smem(c, 1), l, k); });
    });
    return status == ETT_OK ? ett_done(kernel) : status;
}

extern "C" int64_t ett_layer_norm_bwd_workspace(const ett_layer_norm_bwd_args* a) {
    using namespace ett;
    Check check("layer_norm_bwd", a);
    if (!sound(check, a)) return -1;
    if (numel(a->x) == 0 || (!present(a->dw) && !present(a->db))) return 0;
    const int64_t most = std::max(backward_blocks(a->x, false), backward_config(a->x).vecs ? backward_blocks(a->x, true) : 0);
    return most * 2 * cols(a->x) * int64_t(sizeof(float));
}

extern "C" int32_t ett_layer_norm_bwd(const ett_layer_norm_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("layer_norm_bwd", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->x) == 0) return ett_done("");
    check.workspace(l, ett_layer_norm_bwd_workspace(a));
    const RowsConfig c = backward_config(a->x);
    const bool vectors = c.vecs && wide(a->dy) && wide(a->x) && wide(a->w) && wide(a->dx);
    const char* kernel = check.choose(l, {{"wide", vectors}, {"plain", true}});
    if (!check.ok()) return check.status();
    const bool is_wide = strcmp(kernel, "wide") == 0;
    const int64_t blocks = backward_blocks(a->x, is_wide);
    float* partials = present(a->dw) || present(a->db) ? static_cast<float*>(l->workspace) : nullptr;
    int32_t status = with_act(a->x.dtype, [&](auto t) {
        using T = decltype(t);
        const Backward<T> k{{matrix<const T>(a->dy), matrix<const T>(a->x)}, data<const T>(a->w), data<const float>(a->mean),
                            data<const float>(a->rstd), matrix<T>(a->dx), partials, rows(a->x), cols(a->x)};
        const dim3 grid{unsigned(blocks)};
        if (!is_wide) return launch("layer_norm_bwd", backward_plain_kernel<T>, grid, dim3(unsigned(plain_threads(k.c))), 0, l, k);
        const dim3 block(unsigned(c.threads), unsigned(c.teams));
        return with_vecs<kBackwardVecs<T>>(
            c, [&](auto vecs) { return launch("layer_norm_bwd", backward_kernel<T, vecs>, grid, block, rows_smem(c, 2), l, k); });
    });
    if (status == ETT_OK && partials)
        status = launch_sum_partials("layer_norm_bwd", Partials{partials, blocks, 2, cols(a->x), {data<float>(a->dw), data<float>(a->db)}}, l);
    return status == ETT_OK ? ett_done(kernel) : status;
}
