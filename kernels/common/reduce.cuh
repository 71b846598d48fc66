// reduce.cuh: sums and maxima over warps and blocks. The order of every sum is fixed by the shape of the block.
#pragma once

#include "types.cuh"

namespace ett {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// The sum over the warp, in every lane.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int d = kWarp / 2; d > 0; d /= 2) v += __shfl_xor_sync(kAllLanes, v, d);
    return v;
}

// The maximum over the warp, in every lane.
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int d = kWarp / 2; d > 0; d /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, d));
    return v;
}

// Sums N values over a block of THREADS threads; every thread gets the sums. `smem` holds N * THREADS / 32 floats and
// may be reused after the first barrier that follows this call.
template <int N, int THREADS> __device__ __forceinline__ void block_sum(float (&v)[N], float* smem) {
    static_assert(THREADS % kWarp == 0 && THREADS <= 1024, "a block of whole warps");
    constexpr int kWarps = THREADS / kWarp;
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = warp_sum(v[i]);
    if constexpr (kWarps > 1) {
        const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
        if (lane == 0) {
#pragma unroll
            for (int i = 0; i < N; ++i) smem[i * kWarps + warp] = v[i];
        }
        __syncthreads();  // the warps' sums are visible
#pragma unroll
        for (int i = 0; i < N; ++i) {
            float s = 0.f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) s += smem[i * kWarps + w];
            v[i] = s;
        }
    }
}

}  // namespace ett
