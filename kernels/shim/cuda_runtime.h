// cuda_runtime.h of the shim: enough of CUDA C++ to compile the portable kernels with the host compiler and run them on
// the CPU under sanitizers. Blocks run one after the other; each thread of a block is a fiber that yields at barriers
// and warp operations. The shim does not detect races that the order of the fibers hides (ETT_SHIM_ORDER=reverse
// reverses that order), and does not support sm_90 instructions.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __grid_constant__
#define __shared__ static
#define __constant__ static
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace shim {

// Of the running thread.
extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;

// The largest shared memory of a block, in bytes: ETT_SHIM_SMEM in KiB, or that of an H100.
int most_smem();

// Runs `thread` for every thread of every block. A process runs one launch at a time.
void launch(const char* op, dim3 grid, dim3 block, size_t smem, const std::function<void()>& thread);

// The block's dynamic shared memory: exactly the requested bytes, so that the address sanitizer finds accesses beyond
// its end. Every byte is 0xff when a block starts.
unsigned char* dynamic_smem();

// Waits for all threads of the block. It is an error if one of them has already returned.
void block_barrier();

// A warp operation: all lanes of the warp must arrive at the same `what`. Each deposits up to 64 bytes and gets those
// of all 32 lanes.
struct Slot { alignas(16) unsigned char bytes[64]; };
const Slot* exchange(const char* what, unsigned mask, const void* in, size_t bytes);
int lane();

// cp.async: the copy is done when it is waited for; until then its target holds 0xff.
void async_copy(char* dst, const void* src, int bytes, int valid);
void async_commit();
void async_wait(int pending);

void ldmatrix(uint32_t (&d)[4], const char* row, bool transposed);
void mma_bf16_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <class T> T shuffle(const char* what, unsigned mask, T v, int from) {
    static_assert(sizeof(T) <= 64, "a value fits a slot");
    T out;
    memcpy(&out, exchange(what, mask, &v, sizeof v)[from].bytes, sizeof out);
    return out;
}

}  // namespace shim

#define threadIdx (::shim::thread_index)
#define blockIdx (::shim::block_index)
#define blockDim (::shim::block_size)
#define gridDim (::shim::grid_size)
inline constexpr int warpSize = 32;

inline void __syncthreads() { shim::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { shim::exchange("__syncwarp", mask, nullptr, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// Shuffles within segments of `width` lanes, as the hardware defines them.
template <class T> T __shfl_sync(unsigned mask, T v, int from, int width = 32) {
    return shim::shuffle("__shfl_sync", mask, v, (shim::lane() & ~(width - 1)) | (from & (width - 1)));
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int with, int width = 32) {
    const int from = shim::lane() ^ with;
    return shim::shuffle("__shfl_xor_sync", mask, v, from / width <= shim::lane() / width ? from : shim::lane());
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32) {
    const int in = shim::lane() & (width - 1), from = shim::lane() + int(by);
    return shim::shuffle("__shfl_down_sync", mask, v, in + int(by) < width ? from : shim::lane());
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32) {
    const int in = shim::lane() & (width - 1), from = shim::lane() - int(by);
    return shim::shuffle("__shfl_up_sync", mask, v, in >= int(by) ? from : shim::lane());
}
inline unsigned __ballot_sync(unsigned mask, int p) {
    const int v = p != 0;
    const shim::Slot* all = shim::exchange("__ballot_sync", mask, &v, sizeof v);
    unsigned out = 0;
    for (int l = 0; l < 32; ++l) {
        int theirs;
        memcpy(&theirs, all[l].bytes, sizeof theirs);
        out |= unsigned(theirs) << l;
    }
    return out;
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, p) == 0xffffffffu; }

template <class T> T atomicAdd(T* p, T v) { T old = *p; *p = old + v; return old; }
template <class T> T atomicMax(T* p, T v) { T old = *p; *p = std::max(old, v); return old; }
template <class T> T atomicMin(T* p, T v) { T old = *p; *p = std::min(old, v); return old; }
template <class T> T atomicExch(T* p, T v) { T old = *p; *p = v; return old; }
template <class T> T atomicCAS(T* p, T compare, T v) { T old = *p; if (old == compare) *p = v; return old; }
template <class T> T atomicOr(T* p, T v) { T old = *p; *p = old | v; return old; }

using std::max;
using std::min;
inline int max(int a, unsigned b) { return a > int(b) ? a : int(b); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __ull2double_rn(unsigned long long a) { return double(a); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    __extension__ typedef unsigned __int128 wide;
    return (unsigned long long)(wide(a) * b >> 64);
}
inline long long __double_as_longlong(double f) { long long u; memcpy(&u, &f, 8); return u; }
inline double __longlong_as_double(long long u) { double f; memcpy(&f, &u, 8); return f; }
inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline int __float_as_int(float f) { int u; memcpy(&u, &f, 4); return u; }
inline float __int_as_float(int u) { float f; memcpy(&f, &u, 4); return f; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline float sinpif(float x) { return float(sin(3.14159265358979323846 * double(x))); }
inline float cospif(float x) { return float(cos(3.14159265358979323846 * double(x))); }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }
template <class T> void __stcg(T* p, T v) { *p = v; }

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor, cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidValue"; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* d) { *d = 0; return cudaSuccess; }
// Reports a small GPU of compute capability 8 with 3 multiprocessors, so that grid-stride loops iterate more than once.
inline cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
    *v = a == cudaDevAttrMultiProcessorCount ? 3 : a == cudaDevAttrMaxSharedMemoryPerBlockOptin ? shim::most_smem() : 8;
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) { memset(p, v, n); return cudaSuccess; }
