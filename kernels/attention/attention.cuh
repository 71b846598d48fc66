// attention.cuh: what the forward and the backward of attention share: sequences of a flat batch, tiles for tensor
// cores (bf16, "mma") and tiles for plain multiply-adds (any type and head dimension, "simple").
#pragma once

#include <type_traits>

#include "launch.cuh"
#include "reduce.cuh"

namespace ett {
namespace attention {

// ---- sequences of a flat batch ---------------------------------------------------------------------------

struct Batch {
    const int32_t* cu_q;
    const int32_t* cu_k;
    int64_t n_q, n_k, max_q, max_k;
    int32_t seqs, heads, kv_heads, group, d, causal;  // group: query heads per key/value head
    Fault fault;
};

// The rows of a sequence.
struct Span {
    int start, count;
};

// The rows of sequence `s`. If its end is not in [start, min(n, start + longest)], or the first offset is not 0, this
// is a fault and the sequence has no rows. A start outside the batch is reported as the end of the previous sequence.
__device__ __forceinline__ Span span(const int32_t* cu, int s, int64_t n, int64_t longest, const Fault& fault, bool report) {
    const int64_t start = cu[s], end = cu[s + 1];
    const bool first = s > 0 || start == 0, begins = start >= 0 && start <= n, ends = end >= start && end <= n && end - start <= longest;
    if (first && begins && ends) return Span{int(start), int(end - start)};
    if (report && !first) report_index(fault, 0, start, 1);
    if (report && first && begins) report_index(fault, s + 1, end, min(n, start + longest) + 1);
    return Span{0, 0};
}

// The rows of slot `s` of a cache: `len[s]` rows from `starts[s]` on. If they are not all among the n rows, or more
// than `longest`, this is a fault and the slot has no rows.
__device__ __forceinline__ Span slot(const int32_t* starts, const int32_t* len, int s, int64_t n, int64_t longest, const Fault& fault, bool report) {
    const int64_t start = starts[s], count = len[s];
    const bool begins = start >= 0 && start <= n;
    if (begins && count >= 0 && count <= min(longest, n - start)) return Span{int(start), int(count)};
    if (report && !begins) report_index(fault, s, start, n + 1);
    if (report && begins) report_index(fault, s, count, min(longest, n - start) + 1);
    return Span{0, 0};
}

// A sequence: its query and key rows, and which keys a query attends to ("sees").
struct Seq {
    Span q, k;
    bool causal;

    // `len_k` may be null.
    __device__ Seq(const Batch& b, int s, bool report, const int32_t* len_k = nullptr)
        : q(span(b.cu_q, s, b.n_q, b.max_q, b.fault, report)),
          k(len_k ? slot(b.cu_k, len_k, s, b.n_k, b.max_k, b.fault, report) : span(b.cu_k, s, b.n_k, b.max_k, b.fault, report)),
          causal(b.causal) {}

    // Query i sees keys [0, seen(i)).
    __device__ __forceinline__ int seen(int i) const { return causal ? min(k.count, max(0, i + 1 + k.count - q.count)) : k.count; }
    // The first query that sees key j; it may be past the last one.
    __device__ __forceinline__ int first_query(int j) const { return causal ? max(0, j + q.count - k.count) : 0; }
};

// The first padding row.
__device__ __forceinline__ int64_t padding(const int32_t* cu, int seqs, int64_t n) { return min(n, max(int64_t(0), int64_t(cu[seqs]))); }

// Zeroes rows [from, n) of `cols` columns; this block is number `part` of `parts`.
template <class T> __device__ __forceinline__ void clear_rows(T* p, int64_t ld, int cols, int64_t from, int64_t n, int part, int parts) {
    const int64_t total = (n - from) * cols;
    for (int64_t i = int64_t(part) * blockDim.x + threadIdx.x; i < total; i += int64_t(parts) * blockDim.x) {
        const int64_t row = i / cols;
        p[(from + row) * ld + (i - row * cols)] = T{};
    }
}

// ---- tiles for the tensor cores --------------------------------------------------------------------------
// A tile of bf16 in shared memory has rows of DT elements (the head dimension padded with zeros) and 16 bytes between
// rows, so that the 8 rows that ldmatrix reads at once are in different banks. A warp owns MT * 16 rows of scores and
// results. Every fragment of the other side that it loads serves all of them: with MT = 1 the loads from shared memory
// (4 cycles for a fragment of 16 x 16, which two products of 16 x 8 use) take longer than the products (3 cycles).

inline constexpr int kMaxSmem = 99 * 1024;  // of a block, on sm_86, sm_89 and sm_120
inline constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

template <int DT> inline constexpr int kTileStride = DT + 8;
template <int DT> constexpr int tile_bytes(int rows) { return rows * kTileStride<DT> * 2; }

// Starts the copy of ROWS rows by THREADS threads, of which this is number `thread`; only the first `rows` exist, the
// others become 0.
template <int ROWS, int DT, int THREADS>
__device__ __forceinline__ void load_tile(bf16* smem, const bf16* src, int64_t ld, int rows, int d, int thread = threadIdx.x) {
    constexpr int kPieces = DT / 8, kStep = THREADS / kPieces;
    static_assert(THREADS % kPieces == 0 && ROWS % kStep == 0, "every thread copies the same number of pieces");
    const int c = thread % kPieces * 8;
    int r = thread / kPieces;
    const bf16* from = src + r * ld + c;
    smem_addr to = smem_address(smem + r * kTileStride<DT> + c);
#pragma unroll
    for (int n = 0; n < ROWS / kStep; ++n) {
        cp_async16(to, from, r < rows && c < d);
        r += kStep;
        from += kStep * ld;
        to += kStep * kTileStride<DT> * 2;
    }
}

// This lane's address in the 16 x 16 elements at `tile`, for the fragment of 16 own rows (by ldmatrix) or of 16 rows of
// a weighted sum (by ldmatrix_trans); and for two fragments of 8 rows of the other side of a dot product.
template <int DT> __device__ __forceinline__ const bf16* own_lane(const bf16* tile) {
    const int lane = threadIdx.x % kWarp;
    return tile + lane % 16 * kTileStride<DT> + lane / 16 * 8;
}
template <int DT> __device__ __forceinline__ const bf16* other_lane(const bf16* tile) {
    const int lane = threadIdx.x % kWarp;
    return tile + (lane / 16 * 8 + lane % 8) * kTileStride<DT> + lane / 8 % 2 * 8;
}

template <int MT, int NT> __device__ __forceinline__ void clear(float (&acc)[MT][NT][4]) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[m][j][e] = 0.f;
}

// acc = a b^T for the warp's MT * 16 rows at `a` and the NT * 8 rows at `b`, over the first DEPTH columns: element e of
// acc[m][j] is in row m * 16 + lane / 4 + 8 * (e / 2) and column 8 * j + 2 * (lane % 4) + e % 2.
template <int MT, int NT, int DT, int DEPTH = DT> __device__ __forceinline__ void dot_rows(float (&acc)[MT][NT][4], const bf16* a, const bf16* b) {
    const bf16* const from_a = own_lane<DT>(a);
    const bf16* const from_b = other_lane<DT>(b);
    clear(acc);
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
        uint32_t fa[MT][4];
#pragma unroll
        for (int m = 0; m < MT; ++m) ldmatrix_x4(fa[m], smem_address(from_a + m * 16 * kTileStride<DT> + k));
#pragma unroll
        for (int j = 0; j < NT; j += 2) {
            uint32_t fb[4];
            ldmatrix_x4(fb, smem_address(from_b + j * 8 * kTileStride<DT> + k));
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                mma_bf16_16816(acc[m][j], fa[m], fb[0], fb[1]);
                mma_bf16_16816(acc[m][j + 1], fa[m], fb[2], fb[3]);
            }
        }
    }
}

// The fragments of 16 own rows over DEPTH columns, for dot products with many tiles of the other side.
template <int DEPTH> struct OwnRows {
    uint32_t f[DEPTH / 16][4];

    template <int DT> __device__ __forceinline__ void load(const bf16* a) {
        const bf16* const from = own_lane<DT>(a);
#pragma unroll
        for (int k = 0; k < DEPTH / 16; ++k) ldmatrix_x4(f[k], smem_address(from + k * 16));
    }
    // acc = a b^T as dot_rows, with the rows loaded before.
    template <int DT, int NT> __device__ __forceinline__ void dot(float (&acc)[1][NT][4], const bf16* b) const {
        const bf16* const from_b = other_lane<DT>(b);
        clear(acc);
#pragma unroll
        for (int k = 0; k < DEPTH / 16; ++k)
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                uint32_t fb[4];
                ldmatrix_x4(fb, smem_address(from_b + j * 8 * kTileStride<DT> + k * 16));
                mma_bf16_16816(acc[0][j], f[k], fb[0], fb[1]);
                mma_bf16_16816(acc[0][j + 1], f[k], fb[2], fb[3]);
            }
    }
};

// out += w x for the warp's rows of weights (in the layout of dot_rows' result; rounded to bf16 here) and CT * 8
// columns of the NT * 8 rows at `x`.
template <int MT, int NT, int CT, int DT>
__device__ __forceinline__ void add_rows(float (&out)[MT][CT][4], const float (&w)[MT][NT][4], const bf16* x) {
    const bf16* const from_x = own_lane<DT>(x);
#pragma unroll
    for (int j = 0; j < NT; j += 2) {
        uint32_t fw[MT][4];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            fw[m][0] = pack_bf16x2(w[m][j][0], w[m][j][1]);
            fw[m][1] = pack_bf16x2(w[m][j][2], w[m][j][3]);
            fw[m][2] = pack_bf16x2(w[m][j + 1][0], w[m][j + 1][1]);
            fw[m][3] = pack_bf16x2(w[m][j + 1][2], w[m][j + 1][3]);
        }
#pragma unroll
        for (int c = 0; c < CT; c += 2) {
            uint32_t fx[4];
            ldmatrix_x4_trans(fx, smem_address(from_x + j * 8 * kTileStride<DT> + c * 8));
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                mma_bf16_16816(out[m][c], fw[m], fx[0], fx[1]);
                mma_bf16_16816(out[m][c + 1], fw[m], fx[2], fx[3]);
            }
        }
    }
}

// Stores the warp's rows times `factor` (for rows m * 16 + lane / 4 and 8 more); only the first `rows` rows and `cols`
// columns of them exist.
template <int MT, int CT>
__device__ __forceinline__ void store_rows(bf16* dst, int64_t ld, int rows, int cols, const float (&out)[MT][CT][4], const float (&factor)[MT][2]) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = m * 16 + lane / 4 + 8 * r;
            if (row >= rows) continue;
            bf16* to = dst + row * ld + 2 * (lane % 4);
#pragma unroll
            for (int c = 0; c < CT; ++c)
                if (c * 8 < cols) {
                    const float two[2] = {out[m][c][2 * r] * factor[m][r], out[m][c][2 * r + 1] * factor[m][r]};
                    store<2>(to + c * 8, two);
                }
        }
}

// The online softmax of a warp's rows, in powers of 2. The running maximum follows the scores only when they exceed it
// by more than kSlack: weights are then at most 2^kSlack, and most tiles need no rescaling of the results. Which rows
// are rescaled does not depend on other rows.
template <int MT> struct Softmax {
    static constexpr float kSlack = 8.f;
    float max[MT][2], sum[MT][2];  // of the rows m * 16 + lane / 4 + 8 * r; sums are of this lane's columns

    __device__ __forceinline__ Softmax() {
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) max[m][r] = -INFINITY, sum[m][r] = 0.f;
    }

    // Replaces a tile of scores (-infinity where masked) by the weights 2^(scale * score - maximum) and rescales `out`
    // if the maximum has changed. scale > 0.
    template <int NT, int CT> __device__ __forceinline__ void step(float (&s)[MT][NT][4], float (&out)[MT][CT][4], float scale) {
        float factor[MT][2];
        bool changed = false;
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float most = -INFINITY;
#pragma unroll
                for (int j = 0; j < NT; ++j) most = fmaxf(most, fmaxf(s[m][j][2 * r], s[m][j][2 * r + 1]));
                most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
                most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2)) * scale;
                const bool raise = most > max[m][r] + kSlack;
                factor[m][r] = raise ? exp2_approx(max[m][r] - most) : 1.f;
                if (raise) max[m][r] = most;
                changed |= raise;
            }
        if (__any_sync(kAllLanes, changed)) {
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    sum[m][r] *= factor[m][r];
#pragma unroll
                    for (int c = 0; c < CT; ++c) out[m][c][2 * r] *= factor[m][r], out[m][c][2 * r + 1] *= factor[m][r];
                }
        }
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                // While all scores of the row are -infinity, subtracting their maximum would give NaN.
                const float shift = max[m][r] == -INFINITY ? 0.f : max[m][r];
#pragma unroll
                for (int j = 0; j < NT; ++j)
#pragma unroll
                    for (int e = 2 * r; e < 2 * r + 2; ++e) {
                        s[m][j][e] = exp2_approx(fmaf(s[m][j][e], scale, -shift));
                        sum[m][r] += s[m][j][e];
                    }
            }
    }

    // Sums over the four lanes of each row.
    __device__ __forceinline__ void gather() {
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                sum[m][r] += __shfl_xor_sync(kAllLanes, sum[m][r], 1);
                sum[m][r] += __shfl_xor_sync(kAllLanes, sum[m][r], 2);
            }
    }
};

// Returns the log-sum-exp of a row whose weights 2^(score - max) have the sum `sum`, and replaces `sum` by its
// reciprocal. lse and y are 0 for a row that sees no key, and NaN if all its scores are -infinity or NaN.
__device__ __forceinline__ float finish_row(float max, float& sum, int seen) {
    if (seen > 0 && max == -INFINITY) sum = NAN;
    const float lse = seen <= 0 ? 0.f : (max + log2f(sum)) * kLn2;
    sum = sum == 0.f ? 0.f : 1.f / sum;
    return lse;
}

// ---- tiles for plain multiply-adds -----------------------------------------------------------------------
// A block of 16 x 16 threads computes tiles of I * 16 own rows and 64 other rows: thread (y, x) owns rows y + 16 i of
// scores and results, columns x + 16 j of scores, and columns 4 * (x + 16 c) + {0..3} of results. Shared memory holds
// the weights and, one after the other, slices of the operands, converted to float.

inline constexpr int kPlainThreads = 256, kPlainCols = 64;
inline constexpr int kSliceCols = 32;  // head dimensions of a slice for dot products
inline constexpr int kSliceRows = 16;  // rows of a slice for weighted sums
inline constexpr int kSliceStride = kSliceCols + 4, kWeightStride = kPlainCols + 4;  // +16 bytes: rows start in other banks

// Floats of shared memory: weights, then slices.
template <int I, int DT> constexpr int plain_floats() {
    const int dot = (I * 16 + kPlainCols) * kSliceStride, sum = kSliceRows * DT;
    return I * 16 * kWeightStride + (dot > sum ? dot : sum);
}

// Rows of one head: only the first `count` exist, the others count as 0.
template <class T> struct Rows {
    const T* p;
    int64_t ld;
    int count;
};

// Loads four elements at p; only the first `valid` exist, the others become 0. `vectors`: four can be loaded at once.
template <class T> __device__ __forceinline__ void fetch4(float (&v)[4], const T* p, int valid, bool vectors) {
    if (valid >= 4 && vectors) {
        load<4>(v, p);
    } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = e < valid ? to_float(p[e]) : 0.f;
    }
}

// Fills ROWS rows of COLS columns, beginning at (row, col) of x.
template <int ROWS, int COLS, class T>
__device__ __forceinline__ void fill_slice(float* smem, int stride, const Rows<T>& x, int row, int col, int d, bool vectors) {
    constexpr int kStep = kPlainThreads / (COLS / 4);
    static_assert(ROWS % kStep == 0 || kStep % ROWS == 0, "the threads that fetch pieces fetch the same number");
    const int c = threadIdx.x % (COLS / 4) * 4, first = threadIdx.x / (COLS / 4);
    const T* from = x.p + (row + first) * x.ld + col + c;
#pragma unroll 1
    for (int r = first; r < ROWS; r += kStep) {
        float v[4];
        fetch4(v, from, row + r < x.count ? d - col - c : 0, vectors);
        store<4>(smem + r * stride + c, v);
        from += kStep * x.ld;
    }
}

// acc = a b^T. All threads have passed a barrier since `slices` was last read; this function ends with a barrier.
template <int I, class T>
__device__ __forceinline__ void plain_dot(float (&acc)[I][4], const Rows<T>& a, const Rows<T>& b, int d, float* slices, bool vectors) {
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    float* slice_b = slices + I * 16 * kSliceStride;
#pragma unroll
    for (int i = 0; i < I; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] = 0.f;
#pragma unroll 1
    for (int c = 0; c < d; c += kSliceCols) {
        fill_slice<I * 16, kSliceCols>(slices, kSliceStride, a, 0, c, d, vectors);
        fill_slice<kPlainCols, kSliceCols>(slice_b, kSliceStride, b, 0, c, d, vectors);
        __syncthreads();  // the slices are written
#pragma unroll 1
        for (int k = 0; k < kSliceCols; k += 4) {
            float va[I][4], vb[4];
#pragma unroll
            for (int i = 0; i < I; ++i) load<4>(va[i], slices + (y + 16 * i) * kSliceStride + k);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                load<4>(vb, slice_b + (x + 16 * j) * kSliceStride + k);
#pragma unroll
                for (int i = 0; i < I; ++i)
#pragma unroll
                    for (int e = 0; e < 4; ++e) acc[i][j] += va[i][e] * vb[e];
            }
        }
        __syncthreads();  // the slices have been read and may be overwritten
    }
}

// The thread's weight in shared memory for own row y + 16 i and other row x + 16 j.
__device__ __forceinline__ float& plain_weight(float* smem, int i, int j) {
    return smem[(threadIdx.x / 16 + 16 * i) * kWeightStride + threadIdx.x % 16 + 16 * j];
}

// out += weights * rows. The threads may have written the weights since the last barrier. All threads have passed a
// barrier since the slices, which follow the weights in `smem`, were last read; this function ends with a barrier.
template <int I, int DT, class T>
__device__ __forceinline__ void plain_sum(float (&out)[I][DT / 64][4], const Rows<T>& rows, int d, float* smem, bool vectors) {
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    float* slice = smem + I * 16 * kWeightStride;
    constexpr int kDepth = DT > 256 ? 1 : 4;  // rows at a time; large DT leaves few registers
    const int count = min(rows.count, kPlainCols);
#pragma unroll 1
    for (int r = 0; r < count; r += kSliceRows) {
        fill_slice<kSliceRows, DT>(slice, DT, rows, r, 0, d, vectors);
        __syncthreads();  // the slice and, in the first iteration, the weights are visible
#pragma unroll 1
        for (int k = 0; k < kSliceRows; k += kDepth) {
            float w[I][kDepth];
#pragma unroll
            for (int i = 0; i < I; ++i) load<kDepth>(w[i], smem + (y + 16 * i) * kWeightStride + r + k);
#pragma unroll
            for (int e = 0; e < kDepth; ++e)
#pragma unroll
                for (int c = 0; c < DT / 64; ++c) {
                    float v[4];
                    load<4>(v, slice + (k + e) * DT + 4 * (x + 16 * c));
#pragma unroll
                    for (int i = 0; i < I; ++i)
#pragma unroll
                        for (int f = 0; f < 4; ++f) out[i][c][f] += w[i][e] * v[f];
                }
        }
        __syncthreads();  // the slice has been read and may be overwritten
    }
}

// Stores a thread's row times `factor`.
template <int DT, class T> __device__ __forceinline__ void plain_store(T* row, int d, const float (&out)[DT / 64][4], float factor) {
    const int x = threadIdx.x % 16;
#pragma unroll
    for (int c = 0; c < DT / 64; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (4 * (x + 16 * c) + e < d) row[4 * (x + 16 * c) + e] = from_float<T>(out[c][e] * factor);
}

static_assert(plain_floats<4, 128>() * int(sizeof(float)) <= kMaxSmem && plain_floats<2, 512>() * int(sizeof(float)) <= kMaxSmem,
              "shared memory of a block");

// Calls f with the width DT of the smallest tile for head dimension d, and with I. Results take I * DT / 16 registers.
template <class F> int32_t with_plain_tile(int d, F f) {
    if (d <= 64) return f(std::integral_constant<int, 64>{}, std::integral_constant<int, 4>{});
    if (d <= 128) return f(std::integral_constant<int, 128>{}, std::integral_constant<int, 4>{});
    if (d <= 256) return f(std::integral_constant<int, 256>{}, std::integral_constant<int, 2>{});
    return f(std::integral_constant<int, 512>{}, std::integral_constant<int, 2>{});
}

// ---- arguments -------------------------------------------------------------------------------------------

inline constexpr int64_t kMaxHeadDim = 512;

// Checks the arguments that forward and backward share.
template <class A> bool check_shapes(Check& check, const A& a) {
    if (!check.act("q", a.q) || !check.view("k", a.k) || !check.range("heads", a.heads, 0, 65535) ||
        !check.range("kv_heads", a.kv_heads, 1, 65535))
        return false;
    char got[96], want[96];
    snprintf(got, sizeof got, "%lld", (long long)a.kv_heads);
    snprintf(want, sizeof want, "a divisor of %lld heads", (long long)a.heads);
    if (!check.require(a.heads % a.kv_heads == 0, "kv_heads", got, want) || !check.range("head_dim", a.head_dim, 1, INT32_MAX)) return false;
    if (a.head_dim > kMaxHeadDim) {
        snprintf(got, sizeof got, "%lld", (long long)a.head_dim);
        check.fail(ETT_UNSUPPORTED, "head_dim", got, "at most 512");
    }
    const int64_t n = rows(a.q), nk = rows(a.k), q_cols = a.heads * a.head_dim, k_cols = a.kv_heads * a.head_dim;
    if (!check.matrix("q", a.q, a.q.dtype, n, q_cols) || !check.matrix("k", a.k, a.q.dtype, nk, k_cols) ||
        !check.matrix("v", a.v, a.q.dtype, nk, k_cols) || !check.matrix("y", a.y, a.q.dtype, n, q_cols) ||
        !check.matrix("lse", a.lse, ETT_F32, n, a.heads) || !check.type("cu_q", a.cu_q, ETT_I32))
        return false;
    const int64_t offsets = numel(a.cu_q);
    return check.require(offsets >= 1, "cu_q", "empty", "at least one offset") && check.vector("cu_q", a.cu_q, ETT_I32, offsets) &&
           check.vector("cu_k", a.cu_k, ETT_I32, offsets) && check.range("max_q", a.max_q, 0, INT32_MAX) &&
           check.range("max_k", a.max_k, 0, INT32_MAX);
}

template <class A> Batch batch_of(const A& a, const ett_launch* l) {
    return Batch{data<const int32_t>(a.cu_q), data<const int32_t>(a.cu_k), rows(a.q), rows(a.k), a.max_q, a.max_k, int32_t(numel(a.cu_q) - 1),
                 int32_t(a.heads), int32_t(a.kv_heads), int32_t(a.heads / a.kv_heads), int32_t(a.head_dim), a.causal != 0, fault_of(l)};
}

// Tiles of `size` rows in the longest sequence; at least one, since the first tile checks the offsets.
inline int64_t tiles_of(int64_t max, int64_t n, int64_t size) { return std::max<int64_t>(1, ceil_div(std::min(max, n), size)); }

// True if the rows of a head in `v` consist of whole pieces of `bytes`.
inline bool head_wide(const ett_view& v, int64_t head_dim, int64_t bytes) { return wide(v, bytes) && head_dim * dtype_size(v.dtype) % bytes == 0; }

}  // namespace attention
}  // namespace ett
