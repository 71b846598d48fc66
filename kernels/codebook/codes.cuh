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
inline constexpr int kScatterThreads = 512, kScatterWarps = kScatterThreads / kWarp;
inline constexpr int kScatterCols = 8, kScatterWindow = 4;  // columns of a lane; warps' widths of indices looked at together
inline constexpr int kScatterRows = 4;    // gradients loaded together
inline constexpr int kScatterAlone = 16;  // a warp adds up to so many gradients by itself

// A lane's part of the sum over the tokens of one code: columns col0 + p * 32 * N + [0, N).
template <class T, int N> struct CodeSum {
    static constexpr int kPieces = kScatterCols / N;
    const Scatter<T>& a;
    int64_t first;  // first token of the launch
    int col0, dim;
    float weight;
    float e[kPieces][N] = {}, sum[kPieces][N] = {};

    __device__ __forceinline__ CodeSum(const Scatter<T>& scatter, int64_t first_token, int32_t code)
        : a(scatter), first(first_token), col0(int(blockIdx.y) * kScatterCols * kWarp + int(threadIdx.x) % kWarp * N), dim(int(scatter.c.dim)),
          weight(scatter.factor * *scatter.g_quant * *scatter.inv_count) {
        each([&](int p, int col) { load<N>(e[p], a.c.e.row(code) + col); });
    }
    // Calls f(piece, its first column) for the pieces inside of the row.
    template <class F> __device__ __forceinline__ void each(F f) const {
#pragma unroll
        for (int p = 0; p < kPieces; ++p)
            if (const int col = col0 + p * kWarp * N; col < dim) f(p, col);
    }
    // Adds the gradients of the tokens whose bits are set in `same`, from token `base` of the launch on, in order.
    __device__ __forceinline__ void add(unsigned same, int base) {
        while (same) {
            bool there[kScatterRows];
            Vec<T, N> g[kScatterRows][kPieces] = {}, z[kScatterRows][kPieces] = {};
            float own[kScatterRows] = {};
#pragma unroll
            for (int r = 0; r < kScatterRows; ++r) {
                there[r] = same != 0;
                if (!there[r]) continue;
                const int64_t m = first + base + __ffs(int(same)) - 1;
                same &= same - 1;
                if (a.own) own[r] = a.own[m];
                each([&](int p, int col) {
                    if (a.g.ptr) g[r][p] = load_vec<N>(a.g.row(m) + col);
                    z[r][p] = load_vec<N>(a.c.z.row(m) + col);
                });
            }
#pragma unroll
            for (int r = 0; r < kScatterRows; ++r) {
                if (!there[r]) continue;
#pragma unroll
                for (int p = 0; p < kPieces; ++p) {
                    float gs[N], zs[N];
                    unpack(gs, g[r][p]);
                    unpack(zs, z[r][p]);
#pragma unroll
                    for (int i = 0; i < N; ++i) sum[p][i] += gs[i] + weight * (e[p][i] - zs[i]) + own[r] * zs[i];
                }
            }
        }
    }
};

// Calls f(lanes, base) for each 32 of the tokens [from, end) of which any has this code; lanes: those that have it.
template <class F> __device__ __forceinline__ void for_code(const int32_t* idx, int32_t code, int from, int end, F f) {
    const int lane = int(threadIdx.x) % kWarp;
#pragma unroll 1
    for (int window = from; window < end; window += kScatterWindow * kWarp) {
        // Few windows have a token with this code, so look at all of a window at once first.
        bool any = false;
#pragma unroll
        for (int w = 0; w < kScatterWindow; ++w) {
            const int at = window + w * kWarp + lane;
            any |= at < end && idx[min(at, end - 1)] == code;
        }
        if (!__any_sync(kAllLanes, any)) continue;
#pragma unroll 1
        for (int base = window; base < window + kScatterWindow * kWarp; base += kWarp)
            if (const unsigned same = __ballot_sync(kAllLanes, base + lane < end && idx[min(base + lane, end - 1)] == code)) f(same, base);
    }
}

// de[idx[m]] += the gradient of token m, for tokens [first, first + count), in an order that does not depend on that of the
// threads. There is one warp per token and 256 columns. If no earlier token has the same code, it counts those that have: a
// few it adds in ascending order; for more, all warps of the block add equal parts of the following tokens, and then the
// parts in order. N elements at a time.
template <class T, int N> __global__ void __launch_bounds__(kScatterThreads, 1) static scatter_kernel(const __grid_constant__ Scatter<T> a, int64_t first, int count) {
    using Sum = CodeSum<T, N>;
    __shared__ float parts[kScatterWarps][kScatterCols * kWarp];
    __shared__ int shared[kScatterWarps];      // of each warp: its token, if the block is to add those of its code, or -1
    __shared__ bool has_part[kScatterWarps];
    const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp, n = int(blockIdx.x) * kScatterWarps + warp;
    const int32_t* const idx = a.c.idx + first;
    int total = 0;
    if (n < count && a.c.has_code(first + n)) {
        bool before = false;
        for_code(idx, idx[n], 0, n, [&](unsigned, int) { before = true; });
        if (!before) for_code(idx, idx[n], n, count, [&](unsigned same, int) { total += __popc(same); });
    }
    if (lane == 0) shared[warp] = total > kScatterAlone ? n : -1;
    if (total > 0 && total <= kScatterAlone) {
        Sum s(a, first, idx[n]);
        float* const to = a.de.row(idx[n]);
        s.each([&](int p, int col) { load<N>(s.sum[p], to + col); });
        for_code(idx, idx[n], n, count, [&](unsigned same, int base) { s.add(same, base); });
        s.each([&](int p, int col) { store<N>(to + col, s.sum[p]); });
    }
    __syncthreads();  // shared is visible
#pragma unroll 1
    for (int w = 0; w < kScatterWarps; ++w) {
        const int start = shared[w];
        if (start < 0) continue;
        const int32_t code = idx[start];
        const int length = (count - start + kScatterWarps - 1) / kScatterWarps, from = start + warp * length;
        Sum s(a, first, code);
        bool any = false;
        for_code(idx, code, from, min(from + length, count), [&](unsigned same, int base) {
            s.add(same, base);
            any = true;
        });
        if (any) s.each([&](int p, int) { store<N>(parts[warp] + p * kWarp * N + lane * N, s.sum[p]); });
        if (lane == 0) has_part[warp] = any;
        __syncthreads();  // the parts are visible
        for (int c = int(threadIdx.x); c < kScatterCols * kWarp; c += kScatterThreads) {
            const int col = int(blockIdx.y) * kScatterCols * kWarp + c;
            if (col >= s.dim) continue;
            float sum = a.de.row(code)[col];
            for (int part = 0; part < kScatterWarps; ++part)
                if (has_part[part]) sum += parts[part][c];
            a.de.row(code)[col] = sum;
        }
        __syncthreads();  // the parts are read
    }
}

// Whether the rows of an operand of the scatter consist of whole pieces of four elements.
inline constexpr int kScatterPiece = 4;
inline bool has_scatter_pieces(const ett_view& v) { return wide(v, kScatterPiece * dtype_size(v.dtype)); }

// Launches the scatter of tokens [first, first + count); `pieces`: all operands have pieces.
template <class T> int32_t launch_scatter(const char* op, const Scatter<T>& s, bool pieces, int64_t first, int64_t count, const ett_launch* l) {
    int32_t status = ETT_OK;
    for (int64_t at = 0; at < count && status == ETT_OK; at += kScatterTokens) {
        const int64_t n = std::min(kScatterTokens, count - at);
        const dim3 grid(unsigned(ceil_div(n, kScatterWarps)), unsigned(ceil_div(s.c.dim, kScatterCols * kWarp)));
        auto go = [&](auto* kernel) { return launch(op, kernel, grid, dim3(kScatterThreads), 0, l, s, first + at, int(n)); };
        status = pieces ? go(scatter_kernel<T, kScatterPiece>) : go(scatter_kernel<T, 1>);
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
