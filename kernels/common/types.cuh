// types.cuh: element types: loads, stores and rounding.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "ptx.cuh"

namespace ett {

// bfloat16: the upper half of a float. Arithmetic is done in float; only loads and stores know this type.
struct bf16 {
    uint16_t bits;
};

__host__ __device__ __forceinline__ float to_float(float v) { return v; }
__host__ __device__ __forceinline__ float to_float(uint8_t v) { return float(v); }
__host__ __device__ __forceinline__ float to_float(bf16 v) { return bits_to_float(uint32_t(v.bits) << 16); }

// Rounds half to even; propagates NaN.
template <class T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float v) { return bf16{uint16_t(pack_bf16x2(v, 0.f) & 0xffffu)}; }

// The value rounded to T.
template <class T> __device__ __forceinline__ float rounded(float v) { return to_float(from_float<T>(v)); }

// N elements that are loaded or stored as one access, of at most 16 bytes: Vec<bf16, 8>, Vec<float, 4>.
template <class T, int N> struct alignas(sizeof(T) * N) Vec {
    static_assert(sizeof(T) * N <= 16, "an access moves at most 16 bytes");
    T v[N];
};

// Elements of T in a 16-byte access.
template <class T> inline constexpr int kWide = 16 / int(sizeof(T));

// Converts the elements of a piece to float. Here and in `pack`, bf16 is converted in pairs, in 32-bit registers.
template <int N, class T> __device__ __forceinline__ void unpack(float (&out)[N], const Vec<T, N>& v) {
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
        uint32_t two[N / 2];
        memcpy(two, &v, sizeof v);
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            out[2 * i] = bits_to_float(two[i] << 16);
            out[2 * i + 1] = bits_to_float(two[i] & 0xffff0000u);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = to_float(v.v[i]);
    }
}

// Rounds N floats to T.
template <class T, int N> __device__ __forceinline__ Vec<T, N> pack(const float (&in)[N]) {
    Vec<T, N> v;
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
        uint32_t two[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; ++i) two[i] = pack_bf16x2(in[2 * i], in[2 * i + 1]);
        memcpy(&v, two, sizeof v);
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) v.v[i] = from_float<T>(in[i]);
    }
    return v;
}

// Loads N elements as one access, through CUDA's vector types, which the compiler does not split.
template <int N, class T> __device__ __forceinline__ Vec<T, N> load_vec(const T* p) {
    using Word = std::conditional_t<sizeof(T) * N == 16, uint4, std::conditional_t<sizeof(T) * N == 8, uint2, Vec<T, N>>>;
    const Word w = *reinterpret_cast<const Word*>(p);
    Vec<T, N> v;
    memcpy(&v, &w, sizeof v);
    return v;
}

// Stores N elements to global memory as one access.
template <int N, class T> __device__ __forceinline__ void store_vec(T* p, const Vec<T, N>& v) {
    if constexpr (sizeof v >= 8) {
        uint32_t words[sizeof v / 4];
        memcpy(words, &v, sizeof v);
        store_global_bytes(p, words);
    } else {
        *reinterpret_cast<Vec<T, N>*>(p) = v;
    }
}

// Loads N elements as floats.
template <int N, class T> __device__ __forceinline__ void load(float (&out)[N], const T* p) { unpack(out, load_vec<N>(p)); }

// Rounds and stores N elements. `store_global` is for global memory only and always makes one access.
template <int N, class T> __device__ __forceinline__ void store(T* p, const float (&in)[N]) {
    *reinterpret_cast<Vec<T, N>*>(p) = pack<T>(in);
}
template <int N, class T> __device__ __forceinline__ void store_global(T* p, const float (&in)[N]) { store_vec(p, pack<T>(in)); }

}  // namespace ett
