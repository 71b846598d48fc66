// ptx.cuh: all inline PTX of the portable kernels (sm_80 and newer). Each function has a model for the shim, which runs
// every thread of a block as a fiber (kernels/shim).
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

namespace ett {

__host__ __device__ __forceinline__ float bits_to_float(uint32_t u) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(u);
#else
    float f;
    memcpy(&f, &u, 4);
    return f;
#endif
}

__host__ __device__ __forceinline__ uint32_t float_to_bits(float f) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(f);
#else
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
#endif
}

// Rounds two floats to bf16 (round half to even) and packs them into one register, `lo` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16x2(float lo, float hi) {
#ifdef ETT_SHIM
    auto round = [](float f) -> uint32_t {
        const uint32_t u = float_to_bits(f);
        if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
        return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    };
    return round(lo) | round(hi) << 16;
#else
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    return d;
#endif
}

// 2^x, approximate (relative error 2^-22); flushes to 0 on underflow.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef ETT_SHIM
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// The square root of x >= 0, approximate (relative error 2^-22).
__device__ __forceinline__ float sqrt_approx(float x) {
#ifdef ETT_SHIM
    return sqrtf(x);
#else
    float y;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// 1 / x, approximate (relative error 2^-23); flushes to 0 on underflow.
__device__ __forceinline__ float reciprocal_approx(float x) {
#ifdef ETT_SHIM
    return 1.0f / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// tanh(x), approximate (error 2^-11).
__device__ __forceinline__ float tanh_approx(float x) {
#ifdef ETT_SHIM
    return tanhf(x);
#else
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// v, as a value of which the compiler knows nothing: what is computed from it is not moved out of a loop, into registers
// that are few.
__device__ __forceinline__ int opaque(int v) {
#ifndef ETT_SHIM
    asm volatile("" : "+r"(v));
#endif
    return v;
}

// Stores 16 or 8 bytes to global memory as one access, aligned to its size. (The compiler splits some vector stores
// that it moves.)
__device__ __forceinline__ void store_global_bytes(void* p, const uint32_t (&v)[4]) {
#ifdef ETT_SHIM
    memcpy(p, v, sizeof v);
#else
    asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
#endif
}
__device__ __forceinline__ void store_global_bytes(void* p, const uint32_t (&v)[2]) {
#ifdef ETT_SHIM
    memcpy(p, v, sizeof v);
#else
    asm volatile("st.global.v2.b32 [%0], {%1,%2};" ::"l"(p), "r"(v[0]), "r"(v[1]) : "memory");
#endif
}

// An address in shared memory as the 32-bit number that ldmatrix and cp.async take.
#ifdef ETT_SHIM
using smem_addr = char*;
__device__ __forceinline__ smem_addr smem_address(const void* p) { return const_cast<char*>(static_cast<const char*>(p)); }
#else
using smem_addr = uint32_t;
__device__ __forceinline__ smem_addr smem_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
#endif

// Starts an asynchronous copy of 16 bytes from global to shared memory, both 16-byte aligned, bypassing the L1. If not
// `valid`, nothing is read and the 16 bytes become zero.
__device__ __forceinline__ void cp_async16(smem_addr dst, const void* src, bool valid) {
#ifdef ETT_SHIM
    shim::async_copy(dst, src, 16, valid ? 16 : 0);
#else
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
#endif
}

// Commits this thread's copies so far as a group.
__device__ __forceinline__ void cp_async_commit() {
#ifdef ETT_SHIM
    shim::async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the N newest groups of this thread are pending. Other threads see the data after a barrier.
template <int N> __device__ __forceinline__ void cp_async_wait() {
#ifdef ETT_SHIM
    shim::async_wait(N);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Loads four 8x8 matrices of 16-bit elements: lane l passes the address of row l % 8 of matrix l / 8 (16 bytes,
// aligned) and receives elements (l / 4, 2 * (l % 4) + {0, 1}) of matrix i in d[i].
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], smem_addr row) {
#ifdef ETT_SHIM
    shim::ldmatrix(d, row, false);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(row) : "memory");
#endif
}

// The same with every matrix transposed: lane l receives elements (2 * (l % 4) + {0, 1}, l / 4).
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], smem_addr row) {
#ifdef ETT_SHIM
    shim::ldmatrix(d, row, true);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(row) : "memory");
#endif
}

// c += a b for a 16x16 (row-major), b 16x8 (column-major) of bf16, c 16x8 of float. With g = lane / 4 and
// t = 2 * (lane % 4): a[0] holds (g, t..t+1), a[1] (g+8, t..), a[2] (g, t+8..), a[3] (g+8, t+8..); b[0] holds
// (t..t+1, g), b[1] (t+8.., g); c[0..1] hold (g, t..t+1), c[2..3] (g+8, t..t+1).
__device__ __forceinline__ void mma_bf16_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef ETT_SHIM
    shim::mma_bf16_16816(c, a, b0, b1);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace ett
