// rms_norm.cu: s = x + residual (or x), y = s * rstd * w with rstd = 1 / sqrt(mean(s^2) + eps), and its gradient
//   dx = rstd * (d - s * rstd * mean(d * s * rstd)) + dsum with d = dy * w,   dw += sum_n dy * (s * rstd).
//
// x, residual, dy, dsum  N,C  act  rows of any stride   in; residual and dsum may be absent
// w                      C    act  contiguous           in
// sum, y, dx             N,C  act  rows of any stride   out; sum is present if residual is
// rstd                   N    f32  contiguous           out; in for the backward
// dw                     C    f32  contiguous           added to; may be absent
//
// numerics: float32. s is rounded to act before the statistics are computed, s * rstd before it is multiplied by w (or,
// in dw, by dy). Sums over a row: each thread its own elements, then the warp, then the team. Sums of dw: each team its
// rows in order, a block its teams, a last kernel the blocks. The bits depend only on N, C and the number of
// multiprocessors.
// work: 4 FLOP an element forward, 8 backward; 2*N*C*size bytes forward (4 with residual), 3 backward (4 with dsum).
// limits: "wide" requires rows of whole 16-byte pieces, at most 2048 pieces; "plain" accepts any.
// workspace: backward with dw: C floats per block.
#include <math.h>

#include "rows.cuh"

namespace ett {
namespace {

// Threads that fit a multiprocessor: __launch_bounds__ limits the forward to 64 registers a thread, the backward to
// 128.
constexpr int kForwardThreads = 1024, kBackwardThreads = 512;

template <class T> struct Forward {
    Matrix<const T> in[2];  // x, residual
    const T* w;
    Matrix<T> sum, y;
    float* rstd;
    int64_t n, c;
    float eps;
};

template <class T> struct Backward {
    Matrix<const T> in[3];  // dy, x, dsum
    const T* w;
    const float* rstd;
    Matrix<T> dx;
    float* partials;  // of dw, [blocks, C]; null: not computed
    int64_t n, c;
};

__device__ __forceinline__ float rstd_of(float squares, int64_t c, float eps) { return 1.f / sqrtf(squares / float(c) + eps); }

template <class T, int VECS>
__global__ void __launch_bounds__(kTeamThreads, kForwardThreads / kTeamThreads) forward_kernel(const __grid_constant__ Forward<T> a) {
    constexpr int N = kWide<T>;
    ETT_DYNAMIC_SMEM(smem);
    __shared__ float smem_sums[2][1][kTeamWarps];
    Rows<T, VECS, 2> rows(smem, a.in, a.n, a.c);
    for (int turn = 0; rows.more(); rows.advance(), turn ^= 1) {
        Vec<T, N> s[VECS];
        float squares[1] = {0.f};
        rows.wait();
        rows.take(0, s);
        if (a.in[1].ptr) {
            Vec<T, N> residual[VECS];
            rows.take(1, residual);
#pragma unroll
            for (int v = 0; v < VECS; ++v) {
                float f[N], r[N];
                unpack(f, s[v]);
                unpack(r, residual[v]);
#pragma unroll
                for (int j = 0; j < N; ++j) f[j] += r[j];
                s[v] = pack<T>(f);
                if (rows.holds(v)) store_vec(a.sum.row(rows.row()) + rows.column(v), s[v]);
            }
        }
#pragma unroll
        for (int v = 0; v < VECS; ++v) {
            float f[N];
            unpack(f, s[v]);
#pragma unroll
            for (int j = 0; j < N; ++j) squares[0] += f[j] * f[j];
        }
        rows.refill();
        team_sum(squares, smem_sums[turn]);
        const float rstd = rstd_of(squares[0], a.c, a.eps);
        if (threadIdx.x == 0) a.rstd[rows.row()] = rstd;
#pragma unroll
        for (int v = 0; v < VECS; ++v) {
            if (!rows.holds(v)) continue;
            float f[N], w[N];
            unpack(f, s[v]);
            load(w, a.w + rows.column(v));
#pragma unroll
            for (int j = 0; j < N; ++j) f[j] *= rstd;
            unpack(f, pack<T>(f));
#pragma unroll
            for (int j = 0; j < N; ++j) f[j] *= w[j];
            store_global(a.y.row(rows.row()) + rows.column(v), f);
        }
    }
}

template <class T, int VECS>
__global__ void __launch_bounds__(kTeamThreads, kBackwardThreads / kTeamThreads) backward_kernel(const __grid_constant__ Backward<T> a) {
    constexpr int N = kWide<T>;
    ETT_DYNAMIC_SMEM(smem);
    __shared__ float smem_sums[2][1][kTeamWarps];
    Rows<T, VECS, 3> rows(smem, a.in, a.n, a.c);
    float dw[VECS][N] = {};
    float next_rstd = rows.more() ? a.rstd[rows.row()] : 0.f;
    for (int turn = 0; rows.more(); rows.advance(), turn ^= 1) {
        const float rstd = next_rstd;
        if (rows.next() < a.n) next_rstd = a.rstd[rows.next()];
        Vec<T, N> dy[VECS], x[VECS], dsum[VECS];
        float along[1] = {0.f};
        rows.wait();
        rows.take(0, dy);
        rows.take(1, x);
        if (a.in[2].ptr) rows.take(2, dsum);
#pragma unroll
        for (int v = 0; v < VECS; ++v) {
            if (!rows.holds(v)) continue;
            float g[N], f[N], rounded[N], w[N];
            unpack(g, dy[v]);
            unpack(f, x[v]);
            load(w, a.w + rows.column(v));
#pragma unroll
            for (int j = 0; j < N; ++j) f[j] *= rstd;
            unpack(rounded, pack<T>(f));
#pragma unroll
            for (int j = 0; j < N; ++j) {
                along[0] += g[j] * w[j] * f[j];
                dw[v][j] += g[j] * rounded[j];
            }
        }
        rows.refill();
        team_sum(along, smem_sums[turn]);
        const float back = rstd * rstd * (along[0] / float(a.c));
#pragma unroll
        for (int v = 0; v < VECS; ++v) {
            if (!rows.holds(v)) continue;
            float g[N], f[N], w[N];
            unpack(g, dy[v]);
            unpack(f, x[v]);
            load(w, a.w + rows.column(v));
#pragma unroll
            for (int j = 0; j < N; ++j) f[j] = rstd * (g[j] * w[j]) - back * f[j];
            if (a.in[2].ptr) {
                unpack(g, dsum[v]);
#pragma unroll
                for (int j = 0; j < N; ++j) f[j] += g[j];
            }
            store_global(a.dx.row(rows.row()) + rows.column(v), f);
        }
    }
    if (a.partials) {
        join_teams(dw, reinterpret_cast<float*>(smem));
        write_partials(rows, dw, a.partials + int64_t(blockIdx.x) * a.c);
    }
}

template <class T> __global__ void __launch_bounds__(256) forward_plain_kernel(const __grid_constant__ Forward<T> a) {
    __shared__ float smem_sums[2][1][kTeamWarps];
    int turn = 0;
    for (int64_t row = blockIdx.x; row < a.n; row += gridDim.x, turn ^= 1) {
        const T* s = a.in[0].row(row);
        float squares[1] = {0.f};
        for (int64_t c = threadIdx.x; c < a.c; c += blockDim.x) {
            T v = s[c];
            if (a.in[1].ptr) a.sum.row(row)[c] = v = from_float<T>(to_float(v) + to_float(a.in[1].row(row)[c]));
            squares[0] += to_float(v) * to_float(v);
        }
        if (a.in[1].ptr) s = a.sum.row(row);  // every thread reads what it wrote
        team_sum(squares, smem_sums[turn]);
        const float rstd = rstd_of(squares[0], a.c, a.eps);
        if (threadIdx.x == 0) a.rstd[row] = rstd;
        for (int64_t c = threadIdx.x; c < a.c; c += blockDim.x)
            a.y.row(row)[c] = from_float<T>(rounded<T>(to_float(s[c]) * rstd) * to_float(a.w[c]));
    }
}

template <class T> __global__ void __launch_bounds__(256) backward_plain_kernel(const __grid_constant__ Backward<T> a) {
    __shared__ float smem_sums[2][1][kTeamWarps];
    float* partials = a.partials ? a.partials + int64_t(blockIdx.x) * a.c : nullptr;
    if (partials)
        for (int64_t c = threadIdx.x; c < a.c; c += blockDim.x) partials[c] = 0.f;
    int turn = 0;
    for (int64_t row = blockIdx.x; row < a.n; row += gridDim.x, turn ^= 1) {
        const T *dy = a.in[0].row(row), *x = a.in[1].row(row), *dsum = a.in[2].ptr ? a.in[2].row(row) : nullptr;
        const float rstd = a.rstd[row];
        float along[1] = {0.f};
        for (int64_t c = threadIdx.x; c < a.c; c += blockDim.x) {
            const float g = to_float(dy[c]), f = to_float(x[c]) * rstd;
            along[0] += g * to_float(a.w[c]) * f;
            if (partials) partials[c] += g * rounded<T>(f);
        }
        team_sum(along, smem_sums[turn]);
        const float back = rstd * rstd * (along[0] / float(a.c));
        for (int64_t c = threadIdx.x; c < a.c; c += blockDim.x) {
            float d = rstd * (to_float(dy[c]) * to_float(a.w[c])) - back * to_float(x[c]);
            if (dsum) d += to_float(dsum[c]);
            a.dx.row(row)[c] = from_float<T>(d);
        }
    }
}

bool sound(Check& check, const ett_rms_norm_fwd_args* a) {
    if (!check.ok() || !check.act("x", a->x)) return false;
    const int64_t n = rows(a->x), c = cols(a->x);
    check.matrix("y", a->y, a->x.dtype, n, c);
    check.vector("w", a->w, a->x.dtype, c);
    check.vector("rstd", a->rstd, ETT_F32, n);
    check.require(present(a->sum) || !present(a->residual), "sum", "absent", "present as `residual` is");
    check.require(present(a->residual) || !present(a->sum), "sum", "present", "absent as `residual` is");
    if (present(a->residual)) {
        check.matrix("residual", a->residual, a->x.dtype, n, c);
        check.matrix("sum", a->sum, a->x.dtype, n, c);
    }
    return check.ok();
}

bool sound(Check& check, const ett_rms_norm_bwd_args* a) {
    if (!check.ok() || !check.act("x", a->x)) return false;
    const int64_t n = rows(a->x), c = cols(a->x);
    check.matrix("dy", a->dy, a->x.dtype, n, c);
    if (present(a->dsum)) check.matrix("dsum", a->dsum, a->x.dtype, n, c);
    check.matrix("dx", a->dx, a->x.dtype, n, c);
    check.vector("w", a->w, a->x.dtype, c);
    check.vector("rstd", a->rstd, ETT_F32, n);
    if (present(a->dw)) check.vector("dw", a->dw, ETT_F32, c);
    return check.ok();
}

RowsConfig config(const ett_view& x) { return choose_rows_config(cols(x) * dtype_size(x.dtype) / 16); }

// Blocks of the backward.
int64_t backward_blocks(const ett_view& x, bool is_wide) {
    return is_wide ? rows_blocks(config(x), rows(x), kBackwardThreads, multiprocessors()) : plain_blocks(rows(x), multiprocessors());
}

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(rms_norm_fwd)

extern "C" int32_t ett_rms_norm_fwd(const ett_rms_norm_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("rms_norm_fwd", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->x) == 0) return ett_done("");
    const RowsConfig c = config(a->x);
    const bool vectors = c.vecs && wide(a->x) && wide(a->residual) && wide(a->w) && wide(a->sum) && wide(a->y);
    const char* kernel = check.choose(l, {{"wide", vectors}, {"plain", true}});
    if (!check.ok()) return check.status();
    const bool is_wide = strcmp(kernel, "wide") == 0;
    const int64_t n = rows(a->x);
    const int32_t status = with_act(a->x.dtype, [&](auto t) {
        using T = decltype(t);
        const Forward<T> k{{matrix<const T>(a->x), matrix<const T>(a->residual)}, data<const T>(a->w), matrix<T>(a->sum), matrix<T>(a->y),
                           data<float>(a->rstd), n, cols(a->x), float(a->eps)};
        if (!is_wide) {
            const dim3 grid(unsigned(plain_blocks(n, multiprocessors()))), block(unsigned(plain_threads(k.c)));
            return launch("rms_norm_fwd", forward_plain_kernel<T>, grid, block, 0, l, k);
        }
        const dim3 grid(unsigned(rows_blocks(c, n, kForwardThreads, multiprocessors()))), block(unsigned(c.threads), unsigned(c.teams));
        return with_vecs(c, [&](auto vecs) {
            return launch("rms_norm_fwd", forward_kernel<T, vecs>, grid, block, rows_smem(c, present(a->residual) ? 2 : 1), l, k);
        });
    });
    return status == ETT_OK ? ett_done(kernel) : status;
}

extern "C" int64_t ett_rms_norm_bwd_workspace(const ett_rms_norm_bwd_args* a) {
    using namespace ett;
    Check check("rms_norm_bwd", a);
    if (!sound(check, a)) return -1;
    if (numel(a->x) == 0 || !present(a->dw)) return 0;
    const int64_t most = std::max(backward_blocks(a->x, false), config(a->x).vecs ? backward_blocks(a->x, true) : 0);
    return most * cols(a->x) * int64_t(sizeof(float));
}

extern "C" int32_t ett_rms_norm_bwd(const ett_rms_norm_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("rms_norm_bwd", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->x) == 0) return ett_done("");
    check.workspace(l, ett_rms_norm_bwd_workspace(a));
    const RowsConfig c = config(a->x);
    const bool vectors = c.vecs && wide(a->dy) && wide(a->dsum) && wide(a->x) && wide(a->w) && wide(a->dx);
    const char* kernel = check.choose(l, {{"wide", vectors}, {"plain", true}});
    if (!check.ok()) return check.status();
    const bool is_wide = strcmp(kernel, "wide") == 0;
    const int64_t blocks = backward_blocks(a->x, is_wide);
    float* partials = present(a->dw) ? static_cast<float*>(l->workspace) : nullptr;
    int32_t status = with_act(a->x.dtype, [&](auto t) {
        using T = decltype(t);
        const Backward<T> k{{matrix<const T>(a->dy), matrix<const T>(a->x), matrix<const T>(a->dsum)}, data<const T>(a->w),
                            data<const float>(a->rstd), matrix<T>(a->dx), partials, rows(a->x), cols(a->x)};
        const dim3 grid{unsigned(blocks)};
        if (!is_wide) return launch("rms_norm_bwd", backward_plain_kernel<T>, grid, dim3(unsigned(plain_threads(k.c))), 0, l, k);
        const dim3 block(unsigned(c.threads), unsigned(c.teams));
        return with_vecs(c, [&](auto vecs) {
            return launch("rms_norm_bwd", backward_kernel<T, vecs>, grid, block, rows_smem(c, present(a->dsum) ? 3 : 2), l, k);
        });
    });
    if (status == ETT_OK && partials)
        status = launch_sum_partials("rms_norm_bwd", Partials{partials, blocks, 1, cols(a->x), {data<float>(a->dw), nullptr}}, l);
    return status == ETT_OK ? ett_done(kernel) : status;
}
