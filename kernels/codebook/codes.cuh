// codes.cuh: what both quantizers do with the codes of their tokens: copy them, sum the squared distances, and add
// gradients to them.
#pragma once

#include "matrix.cuh"
#include "reduce.cuh"

namespace ett {
namespace codebook {

inline constexpr int kCodeThreads = 256, kCodeWarps = kCodeThreads / kWarp;

// Tokens, codes, and the index of each token's code. An index out of bounds is a fault; its token has no code.
template <class T> struct Codes {
    Matrix<const T> z, e;
    const int32_t* idx;
    int64_t tokens, codes, dim;
    Fault fault;

    __device__ __forceinline__ bool has_code(int64_t m) const { return idx[m] >= 0 && idx[m] < codes; }
    // Reports the fault of token m, if it has one. Called by one lane per token.
    __device__ __forceinline__ void report(int64_t m) const {
        if (!has_code(m)) report_index(fault, m, idx[m], codes);
    }
};

template <class T, class A> Codes<T> codes_of(const A& a, const ett_launch* l) {
    return {matrix<const T>(a.z), matrix<const T>(a.e), data<const int32_t>(a.idx), rows(a.z), rows(a.e), cols(a.z), fault_of(l)};
}

// ---- values ----------------------------------------------------------------------------------------------

inline constexpr int kLookUpRows = 32;  // tokens per block

// zq = e[idx], or 0 for a token without a code; squares[block] = sum of |e - z|^2 over the block's tokens. N elements
// at a time.
template <class T, int N>
__global__ void __launch_bounds__(kCodeThreads) static look_up_kernel(const __grid_constant__ Codes<T> a, const Matrix<T> zq, float* squares) {
    __shared__ float smem[kCodeWarps];
    const int lane = int(threadIdx.x) % kWarp;
    float sum[1] = {0.f};
    for (int r = int(threadIdx.x) / kWarp; r < kLookUpRows; r += kCodeWarps) {
        const int64_t m = int64_t(blockIdx.x) * kLookUpRows + r;
        if (m >= a.tokens) break;
        const bool there = a.has_code(m);
        if (lane == 0) a.report(m);
        const T* const code = a.e.row(there ? a.idx[m] : 0);
        for (int64_t at = lane * N; at < a.dim; at += kWarp * N) {
            const Vec<T, N> from = there ? load_vec<N>(code + at) : Vec<T, N>{};
            store_vec(zq.row(m) + at, from);
            float e[N], z[N];
            unpack(e, from);
            load<N>(z, a.z.row(m) + at);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float d = there ? e[i] - z[i] : 0.f;
                sum[0] = fmaf(d, d, sum[0]);
            }
        }
    }
    block_sum<1, kCodeThreads>(sum, smem);
    if (threadIdx.x == 0) squares[blockIdx.x] = sum[0];
}

inline int64_t look_up_blocks(int64_t tokens) { return ceil_div(tokens, kLookUpRows); }

template <class T> int32_t launch_look_up(const char* op, const Codes<T>& c, const ett_view& z, const ett_view& e, const ett_view& zq, float* squares, const ett_launch* l) {
    if (c.tokens == 0) return ETT_OK;
    auto go = [&](auto* kernel) {
        return launch(op, kernel, dim3(unsigned(look_up_blocks(c.tokens))), dim3(kCodeThreads), 0, l, c, matrix<T>(zq), squares);
    };
    return wide(z) && wide(e) && wide(zq) ? go(look_up_kernel<T, kWide<T>>) : go(look_up_kernel<T, 1>);
}

// A loss from its partial sums: out[0] = factor * times[0] * sum of parts; a null `times` counts as 1.
struct Total {
    const float* parts;
    int64_t count;
    const float* times;
    float factor;
    float* out;
};
template <int N> struct Totals {
    Total of[N];
};

inline constexpr int kTotalThreads = 1024;

// One block per loss, so that the order of every sum is fixed.
template <int N> __global__ void __launch_bounds__(kTotalThreads) static total_kernel(const __grid_constant__ Totals<N> a) {
    __shared__ float smem[kTotalThreads / kWarp];
    Total t = a.of[0];
#pragma unroll
    for (int i = 1; i < N; ++i)
        if (blockIdx.x == unsigned(i)) t = a.of[i];
    float sum[1] = {0.f};
    for (int64_t i = threadIdx.x; i < t.count; i += kTotalThreads) sum[0] += t.parts[i];
    block_sum<1, kTotalThreads>(sum, smem);
    if (threadIdx.x == 0) t.out[0] = sum[0] * t.factor * (t.times ? *t.times : 1.f);
}

// ---- gradients -------------------------------------------------------------------------------------------

// The gradient that a token adds to its code: g + factor * g_quant * inv_count * (e - z) + own * z; g and own may be
// absent.
template <class T> struct Scatter {
    Codes<T> c;
    Matrix<const T> g;
    Matrix<float> de;
    const float* own;
    const float* g_quant;
    const float* inv_count;
    float factor;
};

inline constexpr int64_t kScatterTokens = 4096;  // tokens per launch, which are scanned for equal codes
inline constexpr int kScatterCols = 8, kScatterWindow = 4;

// de[idx[m]] += the gradient of token m, for tokens [first, first + count), in ascending order of m, whatever the order
// of the threads: there is one warp per token and 256 columns. If no earlier token has the same code, the warp scans
// the tokens and adds the gradients of all that have this code.
template <class T> __global__ void __launch_bounds__(kCodeThreads, 4) static scatter_kernel(const __grid_constant__ Scatter<T> a, int64_t first, int count) {
    const int lane = int(threadIdx.x) % kWarp, n = int(blockIdx.x) * kCodeWarps + int(threadIdx.x) / kWarp;
    if (n >= count || !a.c.has_code(first + n)) return;
    const int32_t* const idx = a.c.idx + first;
    const int32_t code = idx[n];
#pragma unroll 1
    for (int base = 0; base < n; base += kScatterWindow * kWarp) {
        bool before = false;
#pragma unroll
        for (int w = 0; w < kScatterWindow; ++w) {
            const int at = base + w * kWarp + lane;
            before |= at < n && idx[at] == code;
        }
        if (__any_sync(kAllLanes, before)) return;
    }
    const float weight = a.factor * *a.g_quant * *a.inv_count;
    const bool has_own = a.own != nullptr;
    const int col0 = int(blockIdx.y) * kScatterCols * kWarp + lane, dim = int(a.c.dim);
    float e[kScatterCols] = {}, sum[kScatterCols] = {};
#pragma unroll
    for (int c = 0; c < kScatterCols; ++c) {
        const int col = col0 + c * kWarp;
        if (col >= dim) continue;
        e[c] = to_float(a.c.e.row(code)[col]);
        sum[c] = a.de.row(code)[col];
    }
#pragma unroll 1
    for (int first_of_window = n; first_of_window < count; first_of_window += kScatterWindow * kWarp) {
        // Few windows have a token with this code, so look at all of a window at once first.
        bool any = false;
#pragma unroll
        for (int w = 0; w < kScatterWindow; ++w) {
            const int at = first_of_window + w * kWarp + lane;
            any |= at < count && idx[min(at, count - 1)] == code;
        }
        if (!__any_sync(kAllLanes, any)) continue;
#pragma unroll 1
        for (int base = first_of_window; base < first_of_window + kScatterWindow * kWarp; base += kWarp) {
            unsigned same = __ballot_sync(kAllLanes, base + lane < count && idx[min(base + lane, count - 1)] == code);
            for (; same; same &= same - 1) {
                const int64_t m = first + base + __ffs(int(same)) - 1;
                const float own = has_own ? a.own[m] : 0.f;
#pragma unroll
                for (int c = 0; c < kScatterCols; ++c) {
                    const int col = col0 + c * kWarp;
                    if (col >= dim) continue;
                    const float g = a.g.ptr ? to_float(a.g.row(m)[col]) : 0.f;
                    const float z = to_float(a.c.z.row(m)[col]);
                    sum[c] += g + weight * (e[c] - z) + own * z;
                }
            }
        }
    }
#pragma unroll
    for (int c = 0; c < kScatterCols; ++c) {
        const int col = col0 + c * kWarp;
        if (col < dim) a.de.row(code)[col] = sum[c];
    }
}

// Launches the scatter of tokens [first, first + count).
template <class T> int32_t launch_scatter(const char* op, const Scatter<T>& s, int64_t first, int64_t count, const ett_launch* l) {
    int32_t status = ETT_OK;
    for (int64_t at = 0; at < count && status == ETT_OK; at += kScatterTokens) {
        const int64_t n = std::min(kScatterTokens, count - at);
        const dim3 grid(unsigned(ceil_div(n, kCodeWarps)), unsigned(ceil_div(s.c.dim, kScatterCols * kWarp)));
        status = launch(op, scatter_kernel<T>, grid, dim3(kCodeThreads), 0, l, s, first + at, int(n));
    }
    return status;
}

// ---- arguments -------------------------------------------------------------------------------------------

// Checks z, e, idx and inv_count.
template <class A> bool check_codes(Check& check, const A& a) {
    return check.ok() && check.act("z", a.z) && check.type("e", a.e, a.z.dtype) && check.range("e", rows(a.e), 1, INT32_MAX) &&
           check.matrix("e", a.e, a.z.dtype, rows(a.e), cols(a.z)) && check.range("z", rows(a.z), 0, INT32_MAX) &&
           check.range("z", cols(a.z), 1, 1 << 20) && check.vector("idx", a.idx, ETT_I32, rows(a.z)) &&
           check.vector("inv_count", a.inv_count, ETT_F32, 1);
}

}  // namespace codebook
}  // namespace ett
