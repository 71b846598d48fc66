// adamw.cu: one AdamW step on a flat range of parameters. rate and clip come from the group's row of the step state, and
// bias = 1 / (1 - beta^t) from the number of updates so far, t = steps + 1. Both are in device memory, so that a recorded
// launch replays with the values of the new step:
//   g = grad * (clip > 0 ? min(1, clip / (sqrt(norm[0]) + 1e-6)) : 1)
//   m = beta1 * m + (1 - beta1) * g,   v = beta2 * v + (1 - beta2) * g^2
//   master = master * (1 - rate * weight_decay) - rate * (m * bias1) / (sqrt(v * bias2) + eps)
//   ema = ema_decay * ema + (1 - ema_decay) * master,   shadow = master rounded
// If norm[1] > 0, the gradient is not finite and the kernel changes nothing.
//
// grad          n              f32          contiguous   in
// master, m, v  n              f32          contiguous   updated
// ema           n              f32          contiguous   updated; may be absent
// shadow        n              f32 or bf16  contiguous   out; may be absent
// state         ETT_STATE_LEN  f32          contiguous   in
// steps         1              i32          contiguous   in
// norm          2              f32          contiguous   in
//
// numerics: float32, division and square root correctly rounded; bias = -1 / expm1(t log(beta)), which does not cancel at
// small t, with log(beta) computed in double on the host; bitwise repeatable.
// work: about 20 FLOP and 28 bytes an element, 8 more with ema, 2 or 4 more with shadow.
#include <math.h>

#include "launch.cuh"

namespace ett {
namespace {

constexpr int kThreads = 256;
constexpr int kResident = 6;            // blocks per multiprocessor at a time, which limits a thread to 40 registers
constexpr int kBlocks = 2 * kResident;  // per multiprocessor: twice as many, so that fast multiprocessors can run more
constexpr int kPiece = 4;               // elements per thread at a time

template <class T> struct Adamw {
    float* master;
    const float* grad;
    float* m;
    float* v;
    float* ema;
    T* shadow;
    const float* state;  // the group's row
    const int32_t* steps;
    const float* norm;
    int64_t n;
    float beta1, beta2, log1, log2, rest1, rest2, eps, weight_decay, decay, rest;
};

// The values of this step.
struct Step {
    float rate, keep, clip, bias1, bias2;
};

// Updates the elements from i to i + N.
template <int N, class T> __device__ __forceinline__ void update(const Adamw<T>& a, const Step& s, int64_t i) {
    float p[N], g[N], m[N], v[N], e[N] = {};
    load(p, a.master + i);
    load(g, a.grad + i);
    load(m, a.m + i);
    load(v, a.v + i);
    if (a.ema) load(e, a.ema + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
        g[j] *= s.clip;
        m[j] = a.beta1 * m[j] + a.rest1 * g[j];
        v[j] = a.beta2 * v[j] + a.rest2 * g[j] * g[j];
        p[j] = s.keep * p[j] - s.rate * (m[j] * s.bias1) / (sqrtf(v[j] * s.bias2) + a.eps);
        e[j] = a.decay * e[j] + a.rest * p[j];
    }
    store_global(a.master + i, p);
    store_global(a.m + i, m);
    store_global(a.v + i, v);
    if (a.ema) store_global(a.ema + i, e);
    if (a.shadow) store_global(a.shadow + i, p);
}

template <class T, int N> __global__ void __launch_bounds__(kThreads, kResident) adamw_kernel(const __grid_constant__ Adamw<T> a) {
    const float norm = a.norm[0], bad = a.norm[1], limit = a.state[ETT_STATE_CLIP], rate = a.state[ETT_STATE_RATE];
    const float t = float(*a.steps) + 1.f, bias1 = -1.f / expm1f(t * a.log1), bias2 = -1.f / expm1f(t * a.log2);
    const float clip = fminf(limit / (sqrtf(norm) + 1e-6f), 1.f);
    const Step s{rate, 1.f - rate * a.weight_decay, limit > 0.f ? clip : 1.f, bias1, bias2};
    const int64_t n = bad > 0.f ? 0 : a.n;
    const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = int64_t(gridDim.x) * kThreads;
    for (int64_t i = first; i < n / N; i += step) update<N>(a, s, i * N);
    // The elements after the last whole piece.
    if (first < n % N) update<1>(a, s, n / N * N + first);
}

bool sound(Check& check, const ett_adamw_args* a) {
    if (!check.ok() || !check.act("master", a->master)) return false;
    const int64_t n = numel(a->master);
    check.vector("master", a->master, ETT_F32, n);
    check.vector("grad", a->grad, ETT_F32, n);
    check.vector("m", a->m, ETT_F32, n);
    check.vector("v", a->v, ETT_F32, n);
    if (present(a->ema)) check.vector("ema", a->ema, ETT_F32, n);
    if (present(a->shadow) && check.act("shadow", a->shadow)) check.vector("shadow", a->shadow, a->shadow.dtype, n);
    check.vector("state", a->state, ETT_F32, ETT_STATE_LEN);
    check.vector("steps", a->steps, ETT_I32, 1);
    check.vector("norm", a->norm, ETT_F32, 2);
    return check.range("group", a->group, 0, ETT_STATE_GROUPS - 1);
}

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(adamw)

extern "C" int32_t ett_adamw(const ett_adamw_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("adamw", a, l);
    if (!sound(check, a)) return check.status();
    const int64_t n = numel(a->master);
    if (n == 0) return ett_done("");
    auto starts_wide = [](const ett_view& v) { return reinterpret_cast<uintptr_t>(v.ptr) % (kPiece * dtype_size(v.dtype)) == 0; };
    const bool vectors = starts_wide(a->master) && starts_wide(a->grad) && starts_wide(a->m) && starts_wide(a->v) &&
                         starts_wide(a->ema) && starts_wide(a->shadow);
    const char* kernel = check.choose(l, {{"wide", vectors}, {"plain", true}});
    if (!check.ok()) return check.status();
    return with_act(present(a->shadow) ? a->shadow.dtype : ETT_F32, [&](auto t) {
        using T = decltype(t);
        const Adamw<T> k{data<float>(a->master), data<const float>(a->grad), data<float>(a->m), data<float>(a->v), data<float>(a->ema),
                         data<T>(a->shadow), data<const float>(a->state) + a->group * ETT_STATE_STRIDE, data<const int32_t>(a->steps),
                         data<const float>(a->norm), n, float(a->beta1), float(a->beta2), float(log(a->beta1)), float(log(a->beta2)),
                         float(1. - a->beta1), float(1. - a->beta2), float(a->eps), float(a->weight_decay), float(a->ema_decay),
                         float(1. - a->ema_decay)};
        const bool is_wide = strcmp(kernel, "wide") == 0;
        const int64_t pieces = ceil_div(n, is_wide ? kPiece : 1), most = int64_t(multiprocessors()) * kBlocks;
        const dim3 grid(unsigned(std::min(ceil_div(pieces, kThreads), most)));
        const int32_t status = launch("adamw", is_wide ? adamw_kernel<T, kPiece> : adamw_kernel<T, 1>, grid, dim3(kThreads), 0, l, k);
        return status == ETT_OK ? ett_done(kernel) : status;
    });
}
