// lpips.cu: one layer of LPIPS, loss += factor * scale * sum_p sum_c w[c] * (n0 - n1)^2 over pixels p, with
// n = f / (|f| + eps), |f| the norm of a pixel's features; and its gradient for f1, with t = 2 * g * factor * scale * w *
// (n1 - n0):   df1 = (t - n1 * (t . f1) / |f1|) / (|f1| + eps),   0 where |f1| is 0.
//
// f0, f1           P,C  act  rows of any stride   in
// w                C    act  contiguous           in
// scale, g, loss   1    f32                       in, in, added to
// df1              P,C  act  rows of any stride   out
//
// numerics: float32, one rounding of df1. Norms: each lane sums its elements, then the team of lanes of the pixel is
// summed. Loss: each lane sums its own terms, a block its threads, a last block the blocks. Bitwise repeatable.
// work: 8 FLOP an element forward, 12 backward; 2*P*C*size bytes forward, 3 backward.
// workspace: forward 4 bytes per block.
// limits: "wide" requires rows of whole 16-byte pieces, at most 128 pieces; "plain" accepts any.
// papers: LPIPS (1801.03924).
#include "activation.cuh"
#include "matrix.cuh"
#include "reduce.cuh"

namespace ett {
namespace {

constexpr int kThreads = 256;
template <int VECS> inline constexpr int kResident = VECS > 2 ? 2 : 4;  // blocks per multiprocessor that the registers must allow
constexpr int kBlocks = 16;   // per multiprocessor: several times the resident ones
constexpr int kMostVecs = 4;   // pieces per lane, at most

template <class T> struct Pixels {
    Matrix<const T> f0, f1;
    const T* w;
    Matrix<T> df1;
    const float *scale, *g;
    float* partials;
    int64_t p, c;
    float eps, factor;
    int lanes;  // per pixel: a power of two
};

// How a pixel is distributed over lanes: `vecs` pieces each; `vecs` is 0 if the pixel is too wide.
struct Team {
    int lanes, vecs;
};
Team choose_lpips_team(int64_t pieces) {
    int lanes = 4;
    while (lanes < kWarp && lanes < pieces) lanes *= 2;
    int vecs = 1;
    while (vecs < kMostVecs && int64_t(lanes) * vecs < pieces) vecs *= 2;
    return {lanes, int64_t(lanes) * vecs < pieces ? 0 : vecs};
}

// Sums N values over the lanes of a pixel; every lane gets the sums.
template <int N> __device__ __forceinline__ void lanes_sum(float (&v)[N], int lanes) {
    for (int d = lanes / 2; d > 0; d /= 2) {
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] += __shfl_xor_sync(kAllLanes, v[i], d);
    }
}

// The pixels of a warp: kWarp / lanes of them side by side. All lanes iterate together, as the warp's sums require.
struct Course {
    int64_t first, step;
    int lane;  // within the pixel

    __device__ __forceinline__ Course(int lanes) {
        const int side = kWarp / lanes, in_warp = int(threadIdx.x) % kWarp;
        const int64_t warp = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
        lane = in_warp % lanes;
        first = warp * side;
        step = int64_t(gridDim.x) * (kThreads / kWarp) * side;
        own = in_warp / lanes;
    }
    // This lane's pixel of those that begin at `base`.
    __device__ __forceinline__ int64_t pixel(int64_t base) const { return base + own; }
    int own;
};

// A lane's pieces of a pixel; 0 past the last pixel and channel.
template <class T, int VECS> struct Held {
    Vec<T, kWide<T>> f0[VECS], f1[VECS];

    __device__ __forceinline__ void load(const Pixels<T>& a, const Course& at, int64_t base) {
        constexpr int N = kWide<T>;
        const int64_t p = at.pixel(base);
#pragma unroll
        for (int v = 0; v < VECS; ++v) {
            const int c = (v * a.lanes + at.lane) * N;
            f0[v] = f1[v] = {};
            if (p >= a.p || c >= a.c) continue;
            f0[v] = load_vec<N>(a.f0.row(p) + c);
            f1[v] = load_vec<N>(a.f1.row(p) + c);
        }
    }
};

// The weights of the lane's channels, in registers if they are few.
template <class T, int VECS> class Weights {
  public:
    __device__ __forceinline__ Weights(const Pixels<T>& a, int lane) : a_(a), lane_(lane) {
        if constexpr (kKept) {
#pragma unroll
            for (int v = 0; v < VECS; ++v) fetch(kept_[v], v);
        }
    }
    // Those of piece v; 0 past the last channel.
    __device__ __forceinline__ void get(float (&w)[kWide<T>], int v) const {
        if constexpr (kKept) {
#pragma unroll
            for (int j = 0; j < kWide<T>; ++j) w[j] = kept_[v][j];
        } else {
            fetch(w, v);
        }
    }

  private:
    static constexpr bool kKept = VECS == 1;
    __device__ __forceinline__ void fetch(float (&w)[kWide<T>], int v) const {
        const int c = (v * a_.lanes + lane_) * kWide<T>;
#pragma unroll
        for (int j = 0; j < kWide<T>; ++j) w[j] = 0.f;
        if (c < a_.c) ett::load(w, a_.w + c);
    }

    const Pixels<T>& a_;
    int lane_;
    float kept_[kKept ? VECS : 1][kWide<T>];
};

// Norms of both features.
template <class T, int VECS> __device__ __forceinline__ void norms(const Held<T, VECS>& held, int lanes, float (&norm)[2]) {
    constexpr int N = kWide<T>;
    norm[0] = norm[1] = 0.f;
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
        float x[N], y[N];
        unpack(x, held.f0[v]);
        unpack(y, held.f1[v]);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            norm[0] += x[j] * x[j];
            norm[1] += y[j] * y[j];
        }
    }
    lanes_sum(norm, lanes);
    norm[0] = root<T>(norm[0]);
    norm[1] = root<T>(norm[1]);
}

template <class T, int VECS> __global__ void __launch_bounds__(kThreads, kResident<VECS>) forward_kernel(const __grid_constant__ Pixels<T> a) {
    constexpr int N = kWide<T>;
    __shared__ float smem[kThreads / kWarp];
    const Course at(a.lanes);
    const Weights<T, VECS> weights(a, at.lane);
    float sum[1] = {0.f};
    for (int64_t base = at.first; base < a.p; base += at.step) {
        Held<T, VECS> held;
        held.load(a, at, base);
        float norm[2];
        norms(held, a.lanes, norm);
        if (at.pixel(base) >= a.p) continue;
        const float s0 = quotient<T>(1.f, norm[0] + a.eps), s1 = quotient<T>(1.f, norm[1] + a.eps);
#pragma unroll
        for (int v = 0; v < VECS; ++v) {
            float x[N], y[N], w[N];
            unpack(x, held.f0[v]);
            unpack(y, held.f1[v]);
            weights.get(w, v);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float d = x[j] * s0 - y[j] * s1;
                sum[0] += w[j] * d * d;
            }
        }
    }
    block_sum<1, kThreads>(sum, smem);
    if (threadIdx.x == 0) a.partials[blockIdx.x] = sum[0];
}

__device__ __forceinline__ float slope_of(const float* scale, const float* g, float factor) { return *g * (*scale * (2.f * factor)); }

template <class T, int VECS> __global__ void __launch_bounds__(kThreads, kResident<VECS>) backward_kernel(const __grid_constant__ Pixels<T> a) {
    constexpr int N = kWide<T>;
    const Course at(a.lanes);
    const Weights<T, VECS> weights(a, at.lane);
    const float slope = slope_of(a.scale, a.g, a.factor);
    for (int64_t base = at.first; base < a.p; base += at.step) {
        Held<T, VECS> held;
        held.load(a, at, base);
        float norm[2], along[1] = {0.f};
        norms(held, a.lanes, norm);
        const float s0 = quotient<T>(1.f, norm[0] + a.eps), s1 = quotient<T>(1.f, norm[1] + a.eps);
        float t[VECS][N];
#pragma unroll
        for (int v = 0; v < VECS; ++v) {
            float x[N], y[N], w[N];
            unpack(x, held.f0[v]);
            unpack(y, held.f1[v]);
            weights.get(w, v);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                t[v][j] = slope * w[j] * (y[j] * s1 - x[j] * s0);
                along[0] += t[v][j] * y[j];
            }
        }
        lanes_sum(along, a.lanes);
        const float back = s1 * quotient<T>(along[0], norm[1]);
        const int64_t p = at.pixel(base);
#pragma unroll
        for (int v = 0; v < VECS; ++v) {
            const int c = (v * a.lanes + at.lane) * N;
            if (c >= a.c || p >= a.p) continue;
            float y[N];
            unpack(y, held.f1[v]);
#pragma unroll
            for (int j = 0; j < N; ++j) t[v][j] = norm[1] == 0.f ? 0.f : (t[v][j] - y[j] * back) * s1;
            store_global(a.df1.row(p) + c, t[v]);
        }
    }
}

// The norms of both features of a pixel, with one warp per pixel.
template <class T> __device__ __forceinline__ void plain_norms(const Pixels<T>& a, int64_t p, float (&norm)[2]) {
    norm[0] = norm[1] = 0.f;
    for (int64_t c = threadIdx.x % kWarp; c < a.c; c += kWarp) {
        const float x = to_float(a.f0.row(p)[c]), y = to_float(a.f1.row(p)[c]);
        norm[0] += x * x;
        norm[1] += y * y;
    }
    lanes_sum(norm, kWarp);
    norm[0] = sqrtf(norm[0]);
    norm[1] = sqrtf(norm[1]);
}

template <class T> __global__ void __launch_bounds__(kThreads) forward_plain_kernel(const __grid_constant__ Pixels<T> a) {
    constexpr int kWarps = kThreads / kWarp;
    __shared__ float smem[kWarps];
    float sum[1] = {0.f};
    for (int64_t p = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; p < a.p; p += int64_t(gridDim.x) * kWarps) {
        float norm[2];
        plain_norms(a, p, norm);
        const float s0 = 1.f / (norm[0] + a.eps), s1 = 1.f / (norm[1] + a.eps);
        for (int64_t c = threadIdx.x % kWarp; c < a.c; c += kWarp) {
            const float d = to_float(a.f0.row(p)[c]) * s0 - to_float(a.f1.row(p)[c]) * s1;
            sum[0] += to_float(a.w[c]) * d * d;
        }
    }
    block_sum<1, kThreads>(sum, smem);
    if (threadIdx.x == 0) a.partials[blockIdx.x] = sum[0];
}

template <class T> __global__ void __launch_bounds__(kThreads) backward_plain_kernel(const __grid_constant__ Pixels<T> a) {
    constexpr int kWarps = kThreads / kWarp;
    const float slope = slope_of(a.scale, a.g, a.factor);
    for (int64_t p = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; p < a.p; p += int64_t(gridDim.x) * kWarps) {
        float norm[2], along[1] = {0.f};
        plain_norms(a, p, norm);
        const float s0 = 1.f / (norm[0] + a.eps), s1 = 1.f / (norm[1] + a.eps);
        auto t = [&](int64_t c) { return slope * to_float(a.w[c]) * (to_float(a.f1.row(p)[c]) * s1 - to_float(a.f0.row(p)[c]) * s0); };
        for (int64_t c = threadIdx.x % kWarp; c < a.c; c += kWarp) along[0] += t(c) * to_float(a.f1.row(p)[c]);
        lanes_sum(along, kWarp);
        const float back = s1 * quotient<T>(along[0], norm[1]);
        for (int64_t c = threadIdx.x % kWarp; c < a.c; c += kWarp)
            a.df1.row(p)[c] = from_float<T>(norm[1] == 0.f ? 0.f : (t(c) - to_float(a.f1.row(p)[c]) * back) * s1);
    }
}

// Adds the sums of all blocks to the loss.
__global__ void __launch_bounds__(kThreads) loss_kernel(const float* partials, int blocks, const float* scale, float factor, float* loss) {
    __shared__ float smem[kThreads / kWarp];
    float sum[1] = {0.f};
    for (int b = int(threadIdx.x); b < blocks; b += kThreads) sum[0] += partials[b];
    block_sum<1, kThreads>(sum, smem);
    if (threadIdx.x == 0) loss[0] += *scale * factor * sum[0];
}

template <class A> bool features(Check& check, const A* a) {
    if (!check.ok() || !check.act("f1", a->f1)) return false;
    const int64_t p = rows(a->f1), c = cols(a->f1);
    return check.matrix("f0", a->f0, a->f1.dtype, p, c) && check.vector("w", a->w, a->f1.dtype, c) && check.vector("scale", a->scale, ETT_F32, 1);
}
bool sound(Check& check, const ett_lpips_fwd_args* a) { return features(check, a) && check.vector("loss", a->loss, ETT_F32, 1); }
bool sound(Check& check, const ett_lpips_bwd_args* a) {
    return features(check, a) && check.vector("g", a->g, ETT_F32, 1) && check.matrix("df1", a->df1, a->f1.dtype, rows(a->f1), cols(a->f1));
}

Team team(const ett_view& f) { return choose_lpips_team(cols(f) * dtype_size(f.dtype) / 16); }

// The number of blocks if each pixel has `lanes` lanes.
int64_t blocks(const ett_view& f, int lanes) {
    return std::min(ceil_div(rows(f) * lanes, kThreads), int64_t(multiprocessors()) * kBlocks);
}
int64_t workspace(const ett_view& f) { return blocks(f, kWarp) * int64_t(sizeof(float)); }

template <class F> int32_t with_vecs(int vecs, F f) {
    switch (vecs) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    default: return f(std::integral_constant<int, kMostVecs>{});
    }
}

}  // namespace
}  // namespace ett

extern "C" int64_t ett_lpips_fwd_workspace(const ett_lpips_fwd_args* a) {
    using namespace ett;
    Check check("lpips_fwd", a);
    return sound(check, a) ? workspace(a->f1) : -1;
}

extern "C" int32_t ett_lpips_fwd(const ett_lpips_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("lpips_fwd", a, l);
    if (!sound(check, a) || !check.workspace(l, workspace(a->f1))) return check.status();
    const Team t = team(a->f1);
    const char* kernel = check.choose(l, {{"wide", t.vecs && wide(a->f0) && wide(a->f1) && wide(a->w)}, {"plain", true}});
    if (!check.ok()) return check.status();
    if (numel(a->f1) == 0) return ett_done("");
    const bool is_wide = strcmp(kernel, "wide") == 0;
    const int64_t grid = blocks(a->f1, is_wide ? t.lanes : kWarp);
    float* partials = static_cast<float*>(l->workspace);
    int32_t status = with_act(a->f1.dtype, [&](auto type) {
        using T = decltype(type);
        const Pixels<T> k{matrix<const T>(a->f0), matrix<const T>(a->f1), data<const T>(a->w), {}, nullptr, nullptr, partials, rows(a->f1), cols(a->f1),
                          float(a->eps), float(a->factor), t.lanes};
        if (!is_wide) return launch("lpips_fwd", forward_plain_kernel<T>, dim3(unsigned(grid)), dim3(kThreads), 0, l, k);
        return with_vecs(t.vecs, [&](auto v) { return launch("lpips_fwd", forward_kernel<T, v>, dim3(unsigned(grid)), dim3(kThreads), 0, l, k); });
    });
    if (status == ETT_OK)
        status = launch("lpips_fwd", loss_kernel, dim3(1), dim3(kThreads), 0, l, partials, int(grid), data<const float>(a->scale), float(a->factor),
                        data<float>(a->loss));
    return status == ETT_OK ? ett_done(kernel) : status;
}

ETT_NO_WORKSPACE(lpips_bwd)

extern "C" int32_t ett_lpips_bwd(const ett_lpips_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("lpips_bwd", a, l);
    if (!sound(check, a)) return check.status();
    const Team t = team(a->f1);
    const char* kernel = check.choose(l, {{"wide", t.vecs && wide(a->f0) && wide(a->f1) && wide(a->w) && wide(a->df1)}, {"plain", true}});
    if (!check.ok()) return check.status();
    if (numel(a->f1) == 0) return ett_done("");
    const bool is_wide = strcmp(kernel, "wide") == 0;
    const int64_t grid = blocks(a->f1, is_wide ? t.lanes : kWarp);
    const int32_t status = with_act(a->f1.dtype, [&](auto type) {
        using T = decltype(type);
        const Pixels<T> k{matrix<const T>(a->f0), matrix<const T>(a->f1), data<const T>(a->w), matrix<T>(a->df1), data<const float>(a->scale),
                          data<const float>(a->g), nullptr, rows(a->f1), cols(a->f1), float(a->eps), float(a->factor), t.lanes};
        if (!is_wide) return launch("lpips_bwd", backward_plain_kernel<T>, dim3(unsigned(grid)), dim3(kThreads), 0, l, k);
        return with_vecs(t.vecs, [&](auto v) { return launch("lpips_bwd", backward_kernel<T, v>, dim3(unsigned(grid)), dim3(kThreads), 0, l, k); });
    });
    return status == ETT_OK ? ett_done(kernel) : status;
}
