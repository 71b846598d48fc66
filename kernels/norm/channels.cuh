// channels.cuh: norms with statistics over the pixels of each group of channels: GroupNorm, and BatchNorm as a
// GroupNorm of one image with one channel per group.
//
// The P pixels of an image are divided into chunks and its channels into tiles; a block processes one tile of one
// chunk. A thread has one 16-byte piece of the channels and strides over the pixels of the chunk, loading kTogether of
// them at once, so that per-channel values stay in registers. Further kernels combine the results of the blocks in the
// order of the chunks: the bits depend only on shapes and the number of multiprocessors.
#pragma once

#include <math.h>

#include "activation.cuh"
#include "matrix.cuh"
#include "reduce.cuh"

namespace ett {
namespace channels {

constexpr int kThreads = 256;
constexpr int kTogether = 4;   // pixels that a thread loads at once
constexpr int kTile = 32;      // pieces per tile, at most
constexpr int kResident = 3;   // blocks per multiprocessor in the forward, limited by registers; 2 in the backward
constexpr int kBlocks = 12;    // per multiprocessor: several times the resident ones
constexpr int kJoin = 128;     // threads that combine the statistics of a group

// Activations after the norm, and their derivatives.
struct Silu {
    template <class T> __device__ __forceinline__ float value(float v) const { return silu<T>(v); }
    template <class T> __device__ __forceinline__ float slope(float v) const { return silu_slope<T>(v); }
};
// Slope 1: no activation.
struct Leaky {
    float below;
    template <class T> __device__ __forceinline__ float value(float v) const { return leaky_relu(v, below); }
    template <class T> __device__ __forceinline__ float slope(float v) const { return leaky_relu_slope(v, below); }
};

// B images of P pixels of C channels in G groups.
struct Planes {
    int64_t b, p, c, g;

    __host__ __device__ int64_t width() const { return c / g; }
};

// How images are distributed over blocks: `tiles` tiles of `side` pieces cover the channels, `chunks` chunks of `chunk`
// pixels the image; `lanes` threads of a block have the same channels.
struct Tiling {
    int side, lanes, tiles;
    int64_t chunks, chunk;
};

// The tiling for pieces of n channels; any if there are none.
inline Tiling choose_tiling(const Planes& s, int n, int multiprocessors) {
    const int64_t pieces = ceil_div(s.c, n), tiles = std::max<int64_t>(1, ceil_div(pieces, kTile)), side = std::max<int64_t>(1, ceil_div(pieces, tiles)),
                  lanes = kThreads / side;
    const int64_t wanted = std::max<int64_t>(1, int64_t(multiprocessors) * kBlocks / std::max<int64_t>(1, s.b * tiles));
    const int64_t most = std::max<int64_t>(1, ceil_div(s.p, lanes * kTogether));
    const int64_t chunk = round_up(std::max<int64_t>(1, ceil_div(s.p, std::min(wanted, most))), lanes);
    return {int(side), int(lanes), int(tiles), ceil_div(s.p, chunk), chunk};
}

inline int64_t blocks(const Planes& s, const Tiling& t) { return s.b * t.chunks * t.tiles; }

// What a block and a thread work on.
template <int N> struct Part {
    int64_t image, index;         // the image; the index of the chunk among those of all images
    int64_t first, end;           // pixels of the chunk, counted over all images
    int64_t channel;              // the thread's first channel
    int lane;                     // the thread's first pixel in the chunk
    bool works;                   // whether the thread has any channels

    __device__ Part(const Planes& s, const Tiling& t) {
        const int64_t item = blockIdx.x, tile = item % t.tiles;
        index = item / t.tiles;
        image = index / t.chunks;
        const int64_t pixel = (index - image * t.chunks) * t.chunk;
        first = image * s.p + pixel;
        end = first + (pixel + t.chunk < s.p ? t.chunk : s.p - pixel);
        lane = int(threadIdx.x) / t.side;
        channel = (tile * t.side + int(threadIdx.x) % t.side) * N;
        works = lane < t.lanes && channel < s.c;
    }
};

// Count and mean of some values, and their sum of squared differences from the mean.
struct Moments {
    float n, mean, squares;

    // Combines the moments of two sets (Chan et al.). Rounding depends on the order of the calls.
    __device__ __forceinline__ void join(const Moments& o) {
        if (o.n == 0.f) return;
        const float all = n + o.n, share = o.n / all, d = o.mean - mean;
        squares += o.squares + d * d * n * share;
        mean += d * share;
        n = all;
    }
};

template <class T> struct Statistics {
    Matrix<const T> x;
    Planes shape;
    Tiling tiling;
    float* partials;  // [B * chunks, 2, C]: means and sums of squared differences from them
};

// Adds U pixels to the moments. Their own mean is computed first, so that only differences from a mean are squared.
template <int U, int N, class T>
__device__ __forceinline__ void take(const Vec<T, N> (&v)[U], float& n, float (&mean)[N], float (&squares)[N]) {
    const float all = n + float(U), share = float(U) / all, weight = n * share;
    float own[N] = {}, apart[N] = {};
#pragma unroll
    for (int u = 0; u < U; ++u) {
        float f[N];
        unpack(f, v[u]);
#pragma unroll
        for (int j = 0; j < N; ++j) own[j] += f[j];
    }
#pragma unroll
    for (int j = 0; j < N; ++j) own[j] *= 1.f / float(U);
#pragma unroll
    for (int u = 0; u < U; ++u) {
        float f[N];
        unpack(f, v[u]);
#pragma unroll
        for (int j = 0; j < N; ++j) apart[j] += (f[j] - own[j]) * (f[j] - own[j]);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
        const float d = own[j] - mean[j];
        squares[j] += apart[j] + d * d * weight;
        mean[j] += d * share;
    }
    n = all;
}

template <class T, int N> __global__ void __launch_bounds__(kThreads, kResident) statistics_kernel(const __grid_constant__ Statistics<T> a) {
    __shared__ float smem[2][kThreads * N];
    const Part<N> part(a.shape, a.tiling);
    const int lanes = a.tiling.lanes;
    float n = 0.f, mean[N] = {}, squares[N] = {};
    if (part.works) {
        int64_t pixel = part.first + part.lane;
        for (; pixel + int64_t(kTogether - 1) * lanes < part.end; pixel += int64_t(kTogether) * lanes) {
            Vec<T, N> v[kTogether];
#pragma unroll
            for (int u = 0; u < kTogether; ++u) v[u] = load_vec<N>(a.x.row(pixel + int64_t(u) * lanes) + part.channel);
            take(v, n, mean, squares);
        }
        for (; pixel < part.end; pixel += lanes) {
            const Vec<T, N> v[1] = {load_vec<N>(a.x.row(pixel) + part.channel)};
            take(v, n, mean, squares);
        }
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
        smem[0][threadIdx.x * N + j] = mean[j];
        smem[1][threadIdx.x * N + j] = squares[j];
    }
    __syncthreads();  // what the threads found is visible
    const int channels = a.tiling.side * N;
    const int64_t channel = part.channel - int64_t(threadIdx.x % a.tiling.side) * N + threadIdx.x;
    if (int(threadIdx.x) >= channels || channel >= a.shape.c) return;
    Moments all{};
    const int64_t pixels = part.end - part.first;
    for (int lane = 0; lane < lanes && lane < pixels; ++lane) {
        const int at = lane * channels + int(threadIdx.x);
        all.join({float((pixels - lane + lanes - 1) / lanes), smem[0][at], smem[1][at]});
    }
    float* out = a.partials + part.index * 2 * a.shape.c + channel;
    out[0] = all.mean;
    out[a.shape.c] = all.squares;
}

// The pixels of an image in tiles of `down` lines and `across` columns, which are shorter at the ends.
struct Tiles {
    int64_t h, w, down, across;
    int per_line, count;

    Tiles(int64_t h, int64_t w, int64_t down, int64_t across)
        : h(h), w(w), down(down), across(across), per_line(across > 0 ? int(ceil_div(w, across)) : 0), count(down > 0 ? int(ceil_div(h, down)) * per_line : 0) {}
    // Pixels of tile k.
    __device__ __forceinline__ int64_t pixels(int k) const {
        const int64_t y = int64_t(k / per_line) * down, x = int64_t(k % per_line) * across;
        return (h - y < down ? h - y : down) * (w - x < across ? w - x : across);
    }
};

struct Join {
    const float* partials;  // [B * tiles, 2, C]
    Planes shape;
    Tiles tiles;
    float *mean, *spread;  // [B, G]
    float eps;
    bool is_var;           // `spread` is the variance; else 1 / sqrt(variance + eps)
};

__device__ __forceinline__ float rstd_of(float var, float eps) { return 1.f / sqrtf(var + eps); }

// One block per group of an image: each thread combines every kJoin-th partial in order; the lanes of a warp and then
// the warps are combined in a fixed order.
__global__ void __launch_bounds__(kJoin) static join_kernel(const __grid_constant__ Join a) {
    __shared__ Moments smem[kJoin / kWarp];
    const int groups = int(a.shape.g), width = int(a.shape.c) / groups, image = int(blockIdx.x) / groups, group = int(blockIdx.x) - image * groups;
    const int64_t c = a.shape.c;
    Moments all{};
    const int tiles = a.tiles.count;
    for (int64_t i = threadIdx.x; i < int64_t(tiles) * width; i += kJoin) {
        const int k = int(uint64_t(i) < (uint64_t(1) << 32) ? unsigned(i) / unsigned(width) : i / width);
        const float* p = a.partials + (int64_t(image) * tiles + k) * 2 * c + group * width + (i - int64_t(k) * width);
        all.join({float(a.tiles.pixels(k)), p[0], p[c]});
    }
#pragma unroll
    for (int d = kWarp / 2; d > 0; d /= 2)
        all.join({__shfl_down_sync(kAllLanes, all.n, d), __shfl_down_sync(kAllLanes, all.mean, d), __shfl_down_sync(kAllLanes, all.squares, d)});
    if (threadIdx.x % kWarp == 0) smem[threadIdx.x / kWarp] = all;
    __syncthreads();  // the warps' values are visible
    if (threadIdx.x != 0) return;
    for (int w = 1; w < kJoin / kWarp; ++w) all.join(smem[w]);
    // NaN (0 / 0) if there are no pixels.
    const float var = all.squares / all.n;
    a.mean[blockIdx.x] = all.n > 0.f ? all.mean : var;
    a.spread[blockIdx.x] = a.is_var ? var : rstd_of(var, a.eps);
}

// The parameters and statistics that normalise a channel.
template <class T> struct Scale {
    const T *w, *b;              // [C]
    const float *mean, *spread;  // [B, G]
    float eps;                   // if `spread` is the variance
    bool is_var;

    template <int N>
    __device__ __forceinline__ void take(const Planes& s, int64_t image, int64_t channel, float (&mean_)[N], float (&rstd)[N], float (&w_)[N],
                                         float (&b_)[N]) const {
        const int64_t width = s.width();
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const int64_t at = image * s.g + (channel + j) / width;
            mean_[j] = mean[at];
            rstd[j] = is_var ? rstd_of(spread[at], eps) : spread[at];
            w_[j] = to_float(w[channel + j]);
            b_[j] = to_float(b[channel + j]);
        }
    }
};

template <class T> struct Normalize {
    Matrix<const T> x;
    Matrix<T> y;
    Scale<T> scale;
    Planes shape;
    Tiling tiling;
};

// y = f((x - mean) * (rstd * w) + b).
template <class T, int N, class F>
__global__ void __launch_bounds__(kThreads, kResident) normalize_kernel(const __grid_constant__ Normalize<T> a, const F f) {
    const Part<N> part(a.shape, a.tiling);
    if (!part.works) return;
    const int lanes = a.tiling.lanes;
    float mean[N], scale[N], w[N], b[N];
    a.scale.take(a.shape, part.image, part.channel, mean, scale, w, b);
#pragma unroll
    for (int j = 0; j < N; ++j) scale[j] *= w[j];
    for (int64_t pixel = part.first + part.lane; pixel < part.end; pixel += int64_t(kTogether) * lanes) {
        Vec<T, N> x[kTogether];
#pragma unroll
        for (int u = 0; u < kTogether; ++u)
            if (pixel + int64_t(u) * lanes < part.end) x[u] = load_vec<N>(a.x.row(pixel + int64_t(u) * lanes) + part.channel);
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
            if (pixel + int64_t(u) * lanes >= part.end) continue;
            float v[N];
            unpack(v, x[u]);
#pragma unroll
            for (int j = 0; j < N; ++j) v[j] = f.template value<T>((v[j] - mean[j]) * scale[j] + b[j]);
            store_global(a.y.row(pixel + int64_t(u) * lanes) + part.channel, v);
        }
    }
}

template <class T> struct Backward {
    Matrix<const T> dy, x;
    Matrix<T> dx;
    Scale<T> scale;
    float* partials;     // [B * chunks, 2, C]: sums of g and of g * xhat
    const float* means;  // [B, 2, G], see Means; null: the statistics are constants
    Planes shape;
    Tiling tiling;
    Matrix<const T> skip;  // added to dx; may be absent
};

// Loads kTogether pixels of dy and x; leaves those past the end of the chunk unchanged.
template <class T, int N>
__device__ __forceinline__ void load_both(const Backward<T>& a, const Part<N>& part, int64_t pixel, Vec<T, N> (&dy)[kTogether],
                                          Vec<T, N> (&x)[kTogether]) {
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
        const int64_t at = pixel + int64_t(u) * a.tiling.lanes;
        if (at >= part.end) continue;
        dy[u] = load_vec<N>(a.dy.row(at) + part.channel);
        x[u] = load_vec<N>(a.x.row(at) + part.channel);
    }
}

// Sums g and g * xhat per channel, with xhat = (x - mean) * rstd and g = dy * f'(xhat * w + b).
template <class T, int N, class F>
__global__ void __launch_bounds__(kThreads, 2) sums_kernel(const __grid_constant__ Backward<T> a, const F f) {
    __shared__ float smem[2][kThreads * N];
    const Part<N> part(a.shape, a.tiling);
    const int lanes = a.tiling.lanes;
    float of_g[N] = {}, of_gx[N] = {};
    if (part.works) {
        float mean[N], rstd[N], w[N], b[N];
        a.scale.take(a.shape, part.image, part.channel, mean, rstd, w, b);
        for (int64_t pixel = part.first + part.lane; pixel < part.end; pixel += int64_t(kTogether) * lanes) {
            Vec<T, N> dy[kTogether], x[kTogether];
            load_both(a, part, pixel, dy, x);
#pragma unroll
            for (int u = 0; u < kTogether; ++u) {
                if (pixel + int64_t(u) * lanes >= part.end) continue;
                float g[N], v[N];
                unpack(g, dy[u]);
                unpack(v, x[u]);
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    const float xhat = (v[j] - mean[j]) * rstd[j];
                    g[j] *= f.template slope<T>(xhat * w[j] + b[j]);
                    of_g[j] += g[j];
                    of_gx[j] += g[j] * xhat;
                }
            }
        }
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
        smem[0][threadIdx.x * N + j] = of_g[j];
        smem[1][threadIdx.x * N + j] = of_gx[j];
    }
    __syncthreads();  // what the threads found is visible
    const int channels = a.tiling.side * N;
    const int64_t channel = part.channel - int64_t(threadIdx.x % a.tiling.side) * N + threadIdx.x;
    if (int(threadIdx.x) >= channels || channel >= a.shape.c) return;
    float sums[2] = {};
    for (int lane = 0; lane < lanes; ++lane) {
        sums[0] += smem[0][lane * channels + int(threadIdx.x)];
        sums[1] += smem[1][lane * channels + int(threadIdx.x)];
    }
    float* out = a.partials + part.index * 2 * a.shape.c + channel;
    out[0] = sums[0];
    out[a.shape.c] = sums[1];
}

// sums[row][i] = sum over k of partials[row * chunks + k][i], for rows of n values.
struct SumChunks {
    const float* partials;
    float* sums;
    int64_t chunks, n;
};

// A block has 32 values; each of its 32 warps sums every 32nd chunk in order, then the warps' sums are added in order.
__global__ void __launch_bounds__(1024) static sum_chunks_kernel(const __grid_constant__ SumChunks a) {
    __shared__ float smem[kWarp][kWarp];
    const int64_t tiles = (a.n + kWarp - 1) / kWarp, row = blockIdx.x / tiles, at = (blockIdx.x - row * tiles) * kWarp + threadIdx.x;
    float sum = 0.f;
    if (at < a.n) {
        const float* p = a.partials + row * a.chunks * a.n + at;
#pragma unroll 4
        for (int64_t k = threadIdx.y; k < a.chunks; k += kWarp) sum += p[k * a.n];
    }
    smem[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();  // the warps' sums are visible
    if (threadIdx.y != 0 || at >= a.n) return;
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < kWarp; ++w) total += smem[w][threadIdx.x];
    a.sums[row * a.n + at] = total;
}

// From the sums of g and of g * xhat, [B, 2, C]: the means of w * g and of w * g * xhat over the pixels and channels of
// each group, [B, 2, G], and the gradients dw += sum of g * xhat, db += sum of g over the images.
template <class T> struct Means {
    const float* sums;
    const T* w;
    float *means, *dw, *db;  // null: not computed
    Planes shape;
};

// One warp per group of an image, then one warp per 32 channels of dw and db.
template <class T> __global__ void __launch_bounds__(kThreads) means_kernel(const __grid_constant__ Means<T> a) {
    const Planes& s = a.shape;
    const int64_t warp = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    if (warp < s.b * s.g) {
        if (!a.means) return;
        const int64_t image = warp / s.g, group = warp - image * s.g, width = s.width(), first = group * width;
        const float* sums = a.sums + image * 2 * s.c;
        float of_g = 0.f, of_gx = 0.f;
        for (int64_t i = lane; i < width; i += kWarp) {
            const float w = to_float(a.w[first + i]);
            of_g += w * sums[first + i];
            of_gx += w * sums[s.c + first + i];
        }
        of_g = warp_sum(of_g);
        of_gx = warp_sum(of_gx);
        if (lane != 0) return;
        const float n = float(s.p * width);
        a.means[image * 2 * s.g + group] = of_g / n;
        a.means[(image * 2 + 1) * s.g + group] = of_gx / n;
        return;
    }
    const int64_t channel = (warp - s.b * s.g) * kWarp + lane;
    if (channel >= s.c) return;
    float dw = 0.f, db = 0.f;
    for (int64_t image = 0; image < s.b; ++image) {
        db += a.sums[image * 2 * s.c + channel];
        dw += a.sums[(image * 2 + 1) * s.c + channel];
    }
    if (a.dw) a.dw[channel] += dw;
    if (a.db) a.db[channel] += db;
}

// dx = rstd * (g * w - mean(g * w) - xhat * mean(g * w * xhat)) + skip. dy may be dx.
template <class T, int N, class F> __global__ void __launch_bounds__(kThreads, 2) dx_kernel(const __grid_constant__ Backward<T> a, const F f) {
    const Part<N> part(a.shape, a.tiling);
    if (!part.works) return;
    const int lanes = a.tiling.lanes;
    float mean[N], rstd[N], w[N], b[N], of_g[N] = {}, of_gx[N] = {};
    a.scale.take(a.shape, part.image, part.channel, mean, rstd, w, b);
    if (a.means) {
        const float* means = a.means + part.image * 2 * a.shape.g;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const int64_t group = (part.channel + j) / a.shape.width();
            of_g[j] = means[group];
            of_gx[j] = means[a.shape.g + group];
        }
    }
    for (int64_t pixel = part.first + part.lane; pixel < part.end; pixel += int64_t(kTogether) * lanes) {
        Vec<T, N> dy[kTogether], x[kTogether], skip[kTogether];
        load_both(a, part, pixel, dy, x);
        if (a.skip.ptr) {
#pragma unroll
            for (int u = 0; u < kTogether; ++u)
                if (pixel + int64_t(u) * lanes < part.end) skip[u] = load_vec<N>(a.skip.row(pixel + int64_t(u) * lanes) + part.channel);
        }
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
            if (pixel + int64_t(u) * lanes >= part.end) continue;
            float g[N], v[N], more[N] = {};
            unpack(g, dy[u]);
            unpack(v, x[u]);
            if (a.skip.ptr) unpack(more, skip[u]);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float xhat = (v[j] - mean[j]) * rstd[j];
                g[j] *= f.template slope<T>(xhat * w[j] + b[j]);
                v[j] = rstd[j] * (g[j] * w[j] - of_g[j] - xhat * of_gx[j]) + more[j];
            }
            store_global(a.dx.row(pixel + int64_t(u) * lanes) + part.channel, v);
        }
    }
}

// ---- launches --------------------------------------------------------------------------------------------

inline constexpr const char* kWideName = "wide";
inline constexpr const char* kPlainName = "plain";

// Bytes of the partials of a call, enough for either implementation.
inline int64_t partials_bytes(const Planes& s, int32_t dtype) {
    const int m = multiprocessors();
    const int64_t chunks = std::max(choose_tiling(s, 1, m).chunks, choose_tiling(s, int(16 / dtype_size(dtype)), m).chunks);
    return s.b * chunks * 2 * s.c * int64_t(sizeof(float));
}
// Bytes of the workspace of the backward: partials, sums and means.
inline int64_t backward_bytes(const Planes& s, int32_t dtype) {
    return partials_bytes(s, dtype) + s.b * 2 * (s.c + s.g) * int64_t(sizeof(float));
}

// True if the number of blocks fits in 31 bits.
inline bool fits(const Planes& s) { return s.b * ceil_div(s.c, kTile) < (int64_t(1) << 30); }

// Calls f with the number of elements per piece as a std::integral_constant.
template <class T, class F> int32_t with_pieces(bool is_wide, F f) {
    return is_wide ? f(std::integral_constant<int, kWide<T>>{}) : f(std::integral_constant<int, 1>{});
}

// Combines the means and sums of squares of tiles, `partials`.
inline int32_t launch_join(const char* op, const Planes& s, const Tiles& tiles, const float* partials, const ett_view& mean, const ett_view& spread,
                           bool is_var, double eps, const ett_launch* l) {
    const Join join{partials, s, tiles, data<float>(mean), data<float>(spread), float(eps), is_var};
    return launch(op, join_kernel, dim3(unsigned(s.b * s.g)), dim3(kJoin), 0, l, join);
}

// Computes mean and spread of the groups of x.
template <class T>
int32_t launch_statistics(const char* op, bool is_wide, const Planes& s, const ett_view& x, const ett_view& mean, const ett_view& spread, bool is_var,
                          double eps, void* workspace, const ett_launch* l) {
    if (s.c == 0) return ETT_OK;
    float* const partials = static_cast<float*>(workspace);
    return with_pieces<T>(is_wide, [&](auto n) {
        const Tiling t = choose_tiling(s, n, multiprocessors());
        int32_t status = ETT_OK;
        if (t.chunks > 0) {
            const dim3 grid{unsigned(blocks(s, t))};
            status = launch(op, statistics_kernel<T, n>, grid, dim3(kThreads), 0, l, Statistics<T>{matrix<const T>(x), s, t, partials});
        }
        if (status != ETT_OK) return status;
        return launch_join(op, s, {1, s.p, 1, t.chunk}, partials, mean, spread, is_var, eps, l);
    });
}

template <class T, class F>
int32_t launch_normalize(const char* op, bool is_wide, const Planes& s, const ett_view& x, const ett_view& y, const Scale<T>& scale, const F& f,
                         const ett_launch* l) {
    return with_pieces<T>(is_wide, [&](auto n) {
        const Tiling t = choose_tiling(s, n, multiprocessors());
        const Normalize<T> k{matrix<const T>(x), matrix<T>(y), scale, s, t};
        return launch(op, normalize_kernel<T, n, F>, dim3(unsigned(blocks(s, t))), dim3(kThreads), 0, l, k, f);
    });
}

// The workspace of a backward from the sums of `chunks` chunks an image on.
struct BackwardSpace {
    float *partials, *sums, *means;

    BackwardSpace(void* start, const Planes& s, int64_t chunks)
        : partials(static_cast<float*>(start)), sums(partials + s.b * chunks * 2 * s.c), means(sums + s.b * 2 * s.c) {}
    static int64_t bytes(const Planes& s, int64_t chunks) { return (s.b * chunks * 2 * s.c + s.b * 2 * (s.c + s.g)) * int64_t(sizeof(float)); }
};

// The means of the groups, dw and db, from sums over all chunks.
template <class T> int32_t launch_means(const char* op, const Means<T>& k, const ett_launch* l) {
    const Planes& s = k.shape;
    const dim3 warps{unsigned(ceil_div(s.b * s.g + ceil_div(s.c, kWarp), kThreads / kWarp))};
    return launch(op, means_kernel<T>, warps, dim3(kThreads), 0, l, k);
}

// From the sums of chunks to the means of the groups, and dw and db.
template <class T>
int32_t launch_means(const char* op, const Planes& s, const BackwardSpace& space, int64_t chunks, const T* w, bool through, const ett_view& dw,
                     const ett_view& db, const ett_launch* l) {
    const dim3 tiles{unsigned(s.b * ceil_div(2 * s.c, kWarp))};
    const int32_t status = launch(op, sum_chunks_kernel, tiles, dim3(kWarp, kWarp), 0, l, SumChunks{space.partials, space.sums, chunks, 2 * s.c});
    const Means<T> means{space.sums, w, through ? space.means : nullptr, data<float>(dw), data<float>(db), s};
    return status == ETT_OK ? launch_means<T>(op, means, l) : status;
}

// dx from the means of the groups. dy may be dx.
template <class T, class F>
int32_t launch_dx(const char* op, bool is_wide, const Planes& s, const ett_view& dy, const ett_view& x, const ett_view& skip, const ett_view& dx,
                  const Scale<T>& scale, const float* means, const F& f, const ett_launch* l) {
    return with_pieces<T>(is_wide, [&](auto n) {
        const Tiling t = choose_tiling(s, n, multiprocessors());
        const Backward<T> k{matrix<const T>(dy), matrix<const T>(x), matrix<T>(dx), scale, nullptr, means, s, t, matrix<const T>(skip)};
        return launch(op, dx_kernel<T, n, F>, dim3(unsigned(blocks(s, t))), dim3(kThreads), 0, l, k, f);
    });
}

// `through`: whether the gradient passes through the statistics. dy may be dx.
template <class T, class F>
int32_t launch_backward(const char* op, bool is_wide, const Planes& s, const ett_view& dy, const ett_view& x, const ett_view& skip,
                        const ett_view& dx, const ett_view& dw, const ett_view& db, const Scale<T>& scale, bool through, const F& f, void* workspace,
                        const ett_launch* l) {
    const int64_t chunks = choose_tiling(s, is_wide ? kWide<T> : 1, multiprocessors()).chunks;
    const BackwardSpace space(workspace, s, chunks);
    int32_t status = ETT_OK;
    if (through || present(dw) || present(db)) {
        status = with_pieces<T>(is_wide, [&](auto n) {
            const Tiling t = choose_tiling(s, n, multiprocessors());
            const Backward<T> k{matrix<const T>(dy), matrix<const T>(x), {}, scale, space.partials, nullptr, s, t, {}};
            return launch(op, sums_kernel<T, n, F>, dim3(unsigned(blocks(s, t))), dim3(kThreads), 0, l, k, f);
        });
        if (status == ETT_OK) status = launch_means<T>(op, s, space, chunks, scale.w, through, dw, db, l);
    }
    return status == ETT_OK ? launch_dx<T>(op, is_wide, s, dy, x, skip, dx, scale, through ? space.means : nullptr, f, l) : status;
}

// The implementation of a call: "wide" if all views have rows of whole 16-byte pieces.
inline bool choose_wide(Check& check, const ett_launch* l, std::initializer_list<const ett_view*> views, const char** kernel) {
    const bool all = std::all_of(views.begin(), views.end(), [](const ett_view* v) { return wide(*v); });
    *kernel = check.choose(l, {{kWideName, all}, {kPlainName, true}});
    return strcmp(*kernel, kWideName) == 0;
}

}  // namespace channels
}  // namespace ett
