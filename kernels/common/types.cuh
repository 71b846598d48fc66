// types.cuh: element types and how they are read, written and rounded.
#pragma once

#include <cuda_runtime.h>

#include "ptx.cuh"

namespace ett {

// bfloat16: the upper half of a float. Arithmetic is done in float; only loads and stores know this type.
struct bf16 {
    uint16_t bits;
};

__host__ __device__ __forceinline__ float to_float(float v) { return v; }
__host__ __device__ __forceinline__ float to_float(bf16 v) { return bits_to_float(uint32_t(v.bits) << 16); }

// Rounds to nearest, ties to even; NaN stays NaN.
template <class T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float v) { return bf16{uint16_t(pack_bf16x2(v, 0.f) & 0xffffu)}; }

// The value after a trip through T.
template <class T> __device__ __forceinline__ float rounded(float v) { return to_float(from_float<T>(v)); }

// N elements that move as one access. 16 bytes is the widest: Vec<bf16, 8>, Vec<float, 4>.
template <class T, int N> struct alignas(sizeof(T) * N) Vec {
    static_assert(sizeof(T) * N <= 16, "an access moves at most 16 bytes");
    T v[N];
};

// Elements of T in a 16-byte access.
template <class T> inline constexpr int kWide = 16 / int(sizeof(T));

// Loads N elements as floats.
template <int N, class T> __device__ __forceinline__ void load(float (&out)[N], const T* p) {
    const Vec<T, N> v = *reinterpret_cast<const Vec<T, N>*>(p);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = to_float(v.v[i]);
}

// Rounds and stores N elements.
template <int N> __device__ __forceinline__ void store(float* p, const float (&in)[N]) {
    Vec<float, N> v;
#pragma unroll
    for (int i = 0; i < N; ++i) v.v[i] = in[i];
    *reinterpret_cast<Vec<float, N>*>(p) = v;
}
template <int N> __device__ __forceinline__ void store(bf16* p, const float (&in)[N]) {
    Vec<bf16, N> v;
    if constexpr (N % 2 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            const uint32_t two = pack_bf16x2(in[i], in[i + 1]);
            v.v[i].bits = uint16_t(two & 0xffffu);
            v.v[i + 1].bits = uint16_t(two >> 16);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) v.v[i] = from_float<bf16>(in[i]);
    }
    *reinterpret_cast<Vec<bf16, N>*>(p) = v;
}

}  // namespace ett
