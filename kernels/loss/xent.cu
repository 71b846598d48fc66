// xent.cu: cross-entropy of stored logits, over rows n with target_n >= 0 (linear_xent does without stored logits):
//   lse_n = log sum_v exp(x_nv),   loss += scale * sum_n weight_n * (lse_n - x_n[target_n])
// and its gradient dx_nv = g * scale * weight_n * (exp(x_nv - lse_n) - [v = target_n]).
//
// logits          N,V  act  rows of any stride   in
// target          N    i32  contiguous           in    negative: the row is ignored
// weight          N    f32  contiguous           in    1 if absent
// scale, g, loss  1    f32                       in, in, added to
// lse             N    f32  contiguous           out   0 in ignored rows; in for the backward
// dlogits         N,V  act  rows of any stride   out   0 in ignored rows
//
// `dlogits` may be `logits` itself, with the same strides: a thread reads each element before it overwrites it. The two
// must not overlap in any other way.
// numerics: float32, one rounding of the gradient. Each thread keeps the maximum and the sum of exponentials of its
// pieces, a block combines its threads, and a last block sums the losses of the rows. Bitwise repeatable, on any
// device. A target of V or more is a fault and counts as -1. The lse of a row of -infinity is -infinity; NaN gives NaN.
// work: 4 FLOP a logit; N*V*size bytes forward, 2 backward.   workspace: forward 8 bytes per row.
#include <math.h>

#include "sums.cuh"

namespace ett {
namespace {

constexpr int kThreads = 512;  // per row
constexpr int kBlocks = 8;     // per multiprocessor: twice the resident ones
constexpr int kTogether = 4;   // pieces that a thread loads at once

// Targets and weights of rows.
struct Rows {
    const int32_t* target;
    const float* weight;  // null: 1
    int64_t n, v;
    Fault fault;

    // The target of a row, or -1 if the row is ignored. `tell`: report a target of V or more as a fault.
    __device__ __forceinline__ int of(int64_t row, bool tell) const {
        const int t = target[row];
        if (t < v) return t < 0 ? -1 : t;
        if (tell) report_index(fault, row, t, v);
        return -1;
    }
    __device__ __forceinline__ float weigh(int64_t row) const { return weight ? weight[row] : 1.f; }
};

// The maximum of some logits, and the sum of exp(logit - maximum). (-infinity, 0) if there are none, or none above
// -infinity. A NaN logit is carried by the sum, since fmaxf ignores it.
struct Part {
    float max = -INFINITY, sum = 0.f;
};

// What to subtract from logits whose maximum is `max`: -infinity less itself would be NaN.
__device__ __forceinline__ float shift(float max) { return max == -INFINITY ? 0.f : max; }

template <class T> __device__ __forceinline__ void join(Part& a, const Part& b) {
    const float max = fmaxf(a.max, b.max), by = shift(max);
    a = {max, a.sum * exponential<T>(a.max - by) + b.sum * exponential<T>(b.max - by)};
}

// Adds a piece. The maximum seldom rises after the first pieces.
template <class T, int N> __device__ __forceinline__ void take(Part& part, const Vec<T, N>& piece) {
    float f[N];
    unpack(f, piece);
    float max = f[0];
#pragma unroll
    for (int j = 1; j < N; ++j) max = fmaxf(max, f[j]);
    if (max > part.max) {
        part.sum *= exponential<T>(part.max - max);
        part.max = max;
    }
    const float by = shift(part.max);
#pragma unroll
    for (int j = 0; j < N; ++j) part.sum += exponential<T>(f[j] - by);
}

// Joins the parts of the first LANES lanes of a warp; lane 0 gets the result.
template <class T, int LANES> __device__ __forceinline__ void join_lanes(Part& part) {
#pragma unroll
    for (int d = LANES / 2; d > 0; d /= 2)
        join<T>(part, Part{__shfl_down_sync(kAllLanes, part.max, d), __shfl_down_sync(kAllLanes, part.sum, d)});
}

template <class T> struct Forward {
    Matrix<const T> logits;
    Rows rows;
    float* lse;
    float* losses;  // [2, N]: weighted losses, and 1 for each row that counts
};

template <class T, int N> __global__ void __launch_bounds__(kThreads, 2) forward_kernel(const __grid_constant__ Forward<T> a) {
    constexpr int kWarps = kThreads / kWarp;
    __shared__ float smem_max[kWarps], smem_sum[kWarps];
    const int64_t pieces = a.rows.v / N;
    const int lane = int(threadIdx.x) % kWarp;
    for (int64_t row = blockIdx.x; row < a.rows.n; row += gridDim.x) {
        const int target = a.rows.of(row, threadIdx.x == 0);
        if (target < 0) {
            if (threadIdx.x == 0) a.lse[row] = a.losses[row] = a.losses[a.rows.n + row] = 0.f;
            continue;
        }
        const T* x = a.logits.row(row);
        Part part;
        for (int64_t i = threadIdx.x; i < pieces; i += kTogether * kThreads) {
            Vec<T, N> v[kTogether];
#pragma unroll
            for (int k = 0; k < kTogether; ++k)
                if (i + k * kThreads < pieces) v[k] = load_vec<N>(x + (i + k * kThreads) * N);
#pragma unroll
            for (int k = 0; k < kTogether; ++k)
                if (i + k * kThreads < pieces) take(part, v[k]);
        }
        join_lanes<T, kWarp>(part);
        __syncthreads();  // the parts of the previous row have been read
        if (lane == 0) {
            smem_max[threadIdx.x / kWarp] = part.max;
            smem_sum[threadIdx.x / kWarp] = part.sum;
        }
        __syncthreads();  // the warps' parts are visible
        if (threadIdx.x >= kWarp) continue;
        part = lane < kWarps ? Part{smem_max[lane], smem_sum[lane]} : Part{};
        join_lanes<T, kWarps>(part);
        if (lane != 0) continue;
        const float lse = shift(part.max) + logf(part.sum);
        a.lse[row] = lse;
        a.losses[row] = a.rows.weigh(row) * (lse - to_float(x[target]));
        a.losses[a.rows.n + row] = 1.f;
    }
}

// loss += scale * sum; with no supervised row the loss does not change, whatever the scale.
struct AddSupervised {
    float* loss;
    const float* scale;

    __device__ void finish(const float (&sums)[2]) const {
        if (sums[1] > 0.f) loss[0] += scale[0] * sums[0];
    }
};

template <class T, int N> struct Gradient {
    Matrix<const T> logits;
    Rows rows;
    const float *scale, *lse, *g;
    Matrix<T> dlogits;

    using In = Vec<T, N>;
    __device__ In load(Place p) const { return piece<N>(logits, p); }
    __device__ void finish(Place p, const In& in) const {
        const int target = rows.of(p.row, p.at == 0);
        float d[N] = {};
        if (target >= 0) {
            const float factor = *g * *scale * rows.weigh(p.row), below = lse[p.row];
            float x[N];
            unpack(x, in);
#pragma unroll
            for (int j = 0; j < N; ++j) d[j] = factor * (exponential<T>(x[j] - below) - (p.at + j == target ? 1.f : 0.f));
        }
        put(dlogits, p, d);
    }
};

template <class A> bool rows_sound(Check& check, const A* a) {
    if (!check.ok() || !check.act("logits", a->logits)) return false;
    const int64_t n = rows(a->logits);
    check.vector("target", a->target, ETT_I32, n);
    if (present(a->weight)) check.vector("weight", a->weight, ETT_F32, n);
    check.vector("scale", a->scale, ETT_F32, 1);
    check.vector("lse", a->lse, ETT_F32, n);
    return check.range("logits", n, 0, (int64_t(1) << 30) - 1);
}
bool sound(Check& check, const ett_xent_fwd_args* a) { return rows_sound(check, a) && check.vector("loss", a->loss, ETT_F32, 1); }
bool sound(Check& check, const ett_xent_bwd_args* a) {
    return rows_sound(check, a) && check.vector("g", a->g, ETT_F32, 1) &&
           check.matrix("dlogits", a->dlogits, a->logits.dtype, rows(a->logits), cols(a->logits));
}

template <class A> Rows rows_of(const A* a, const ett_launch* l) {
    return {data<const int32_t>(a->target), data<const float>(a->weight), rows(a->logits), cols(a->logits), fault_of(l)};
}

int64_t workspace(const ett_xent_fwd_args* a) { return rows(a->logits) * 2 * int64_t(sizeof(float)); }

}  // namespace
}  // namespace ett

extern "C" int64_t ett_xent_fwd_workspace(const ett_xent_fwd_args* a) {
    using namespace ett;
    Check check("xent_fwd", a);
    return sound(check, a) ? workspace(a) : -1;
}

extern "C" int32_t ett_xent_fwd(const ett_xent_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("xent_fwd", a, l);
    if (!sound(check, a) || !check.workspace(l, workspace(a))) return check.status();
    const char* kernel = check.choose(l, {{"wide", wide(a->logits)}, {"plain", true}});
    if (!check.ok()) return check.status();
    const int64_t n = rows(a->logits);
    if (n == 0) return ett_done("");
    float* losses = static_cast<float*>(l->workspace);
    int32_t status = with_act(a->logits.dtype, [&](auto t) {
        using T = decltype(t);
        const Forward<T> k{matrix<const T>(a->logits), rows_of(a, l), data<float>(a->lse), losses};
        const dim3 grid{unsigned(std::min(n, int64_t(multiprocessors()) * kBlocks))};
        auto* run = strcmp(kernel, "wide") == 0 ? forward_kernel<T, kWide<T>> : forward_kernel<T, 1>;
        return launch("xent_fwd", run, grid, dim3(kThreads), 0, l, k);
    });
    if (status == ETT_OK)
        status = launch_finish<2>("xent_fwd", l, losses, {n, n}, AddSupervised{data<float>(a->loss), data<const float>(a->scale)});
    return status == ETT_OK ? ett_done(kernel) : status;
}

ETT_NO_WORKSPACE(xent_bwd)

extern "C" int32_t ett_xent_bwd(const ett_xent_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("xent_bwd", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->logits) == 0) return ett_done("");
    const Views views{&a->logits, &a->dlogits};
    return with_act(a->logits.dtype, [&](auto t) {
        using T = decltype(t);
        const Extent rows_and_cols{rows(a->logits), cols(a->logits)};
        return walk<kWide<T>>(check, "xent_bwd", l, rows_and_cols, views, [&](auto n) {
            return Gradient<T, n>{matrix<const T>(a->logits), rows_of(a, l), data<const float>(a->scale), data<const float>(a->lse),
                                  data<const float>(a->g), matrix<T>(a->dlogits)};
        });
    });
}
