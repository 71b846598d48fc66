// attention_fwd.cu: softmax attention over a flat batch of sequences, with an online softmax.
//
//   y_i = sum_j p_ij v_j,  p_ij = exp(scale q_i . k_j - lse_i),  lse_i = log sum_j exp(scale q_i . k_j),  j < seen(i)
//   seen(i) = Tk, or min(Tk, max(0, i + 1 + Tk - T)) if causal; query head h reads key/value head h / (heads/kv_heads)
//
// q          N,heads*D      act  rows of any stride   in
// k, v       Nk,kv_heads*D  act  rows of any stride   in
// cu_q, cu_k S+1            i32  contiguous           in    sequence s has rows [cu[s], cu[s+1])
// len_k      S              i32  contiguous           in?   if present, the keys are rows [cu_k[s], cu_k[s] + len_k[s])
// y          N,heads*D      act  rows of any stride   out   0 in padding rows (from cu_q[S] on) and where seen(i) is 0
// lse        N,heads        f32  rows of any stride   out   0 in the same rows
//
// A sequence with wrong offsets is a fault and counts as empty: if its key offsets are wrong, its queries have no keys;
// if its query offsets are wrong, its rows of y and lse are not written.
// Three implementations. "mma": bf16 on tensor cores, by tiles of queries that stream over the keys, with tiles 64, 128,
// 256 or 512 wide (smaller head dimensions are padded with zeros in shared memory). "split": up to 16 queries a sequence,
// as when decoding: the keys are divided among blocks, whose parts a second kernel adds in a fixed order; how
// they are divided depends on shapes only. The default with len_k, and a launch can be replayed after len_k, cu_k, q, k
// and v have changed. "simple": any type and head dimension, by fused multiply-adds.
// numerics: scores, softmax and sums in f32. On tensor cores exp(score - m) is rounded to bf16 before the product with v,
// where m follows the running maximum and is at most 8 * log 2 below it, so that weights are at most 256; "simple" does
// not round and m is the maximum. One rounding of y. Bitwise repeatable.
// limits: 1 <= D <= 512, heads < 65536. "mma": D a multiple of 8, rows of whole 16-byte pieces, scale > 0; "split" is on
// tensor cores under the same conditions if D <= 128.
// work: 4 * heads * D * (visible pairs) FLOP; (2*N*heads + 2*Nk*kv_heads) * D * size bytes. A few queries are bound by
// the bytes of keys and values, which all heads of a group read together.
// workspace: for up to 16 queries a sequence, 4 * (D + 2) bytes for each query, head and part of the keys.
// papers: FlashAttention (2205.14135), FlashAttention-2 (2307.08691), grouped queries (2305.13245), Flash-Decoding
// (pytorch.org/blog/flash-decoding).
#include "activation.cuh"
#include "attention.cuh"
#include "pieces.cuh"

namespace ett {
namespace attention {
namespace {

constexpr int kClearBlocks = 8;  // blocks per head that clear the padding

template <class T> struct Forward {
    Batch b;
    const int32_t* len_k;  // null: the keys of a sequence end where the next sequence begins
    const T* q;
    const T* k;
    const T* v;
    T* y;
    float* lse;
    int64_t ldq, ldk, ldv, ldy, ldlse;
    float scale;
    int tiles;      // of queries, in the longest sequence
    bool vectors;   // four elements at a time
};

// A block's job: a tile of queries of one sequence and head. With a causal mask the tiles with the most keys come
// first.
struct Job {
    int seq, tile;
};
template <class T> __device__ __forceinline__ Job job_of(const Forward<T>& a) {
    const int tile = int(blockIdx.x) / a.b.seqs;
    return Job{int(blockIdx.x) % a.b.seqs, a.b.causal ? a.tiles - 1 - tile : tile};
}

// The last blocks of the grid set y and lse to 0 in the padding; returns true in these blocks.
template <class T> __device__ __forceinline__ bool clear_padding(const Forward<T>& a) {
    const int64_t jobs = int64_t(a.tiles) * a.b.seqs, at = int64_t(blockIdx.x) - jobs;
    if (at < 0) return false;
    const int head = blockIdx.y;
    const int64_t from = padding(a.b.cu_q, a.b.seqs, a.b.n_q);
    clear_rows(a.y + int64_t(head) * a.b.d, a.ldy, a.b.d, from, a.b.n_q, int(at), kClearBlocks);
    clear_rows(a.lse + head, a.ldlse, 1, from, a.b.n_q, int(at), kClearBlocks);
    return true;
}

// The running maximum and sum of one row.
template <class T> struct Running {
    float max = -INFINITY, sum = 0.f;

    // Updates the maximum with that of new scores. Returns the shift to subtract from the new scores; `factor` rescales
    // the previous sums. The shift is 0 while all scores are -infinity (masked), since -infinity would give NaN.
    __device__ __forceinline__ float raise(float to, float& factor) {
        to = fmaxf(max, to);
        const float shift = to == -INFINITY ? 0.f : to;
        factor = exponential<T>(max - shift);
        max = to;
        return shift;
    }
    // Returns the log-sum-exp and replaces `sum` by its reciprocal. lse and y are 0 for a row that sees no key, and NaN
    // if all its scores are -infinity or NaN.
    __device__ __forceinline__ float finish(int seen) {
        if (seen > 0 && max == -INFINITY) sum = NAN;
        const float lse = seen == 0 ? 0.f : max + logf(sum);
        sum = sum == 0.f ? 0.f : 1.f / sum;
        return lse;
    }
};

// ---- tensor cores ----------------------------------------------------------------------------------------

// A block's tile of MT * 64 queries and its tiles of KEYS keys for head dimensions up to DT. Four groups of warps own
// MT * 16 queries each; the SPLIT warps of a group share the columns of the result. STAGES tiles of keys and as many of
// values are in shared memory: with one, the values are copied while the keys are multiplied, and the next keys while
// the values are. BLOCKS share a multiprocessor.
template <int DT, int MT, int SPLIT, int KEYS, int STAGES, int BLOCKS> struct Tiles {
    static constexpr int kWidth = DT, kM = MT, kSplit = SPLIT, kKeys = KEYS, kStages = STAGES, kBlocks = BLOCKS;
    static constexpr int kGroups = 4, kRows = kGroups * MT * 16, kThreads = kGroups * SPLIT * kWarp, kCols = DT / SPLIT;
    // SPLIT = 1: the queries stay in shared memory. SPLIT = 2: each warp keeps its rows of queries over its half of the
    // columns in registers, computes a part of each score from them, and adds the other warp's part.
    static constexpr int kParts = SPLIT == 1 ? 0 : kThreads * KEYS / 8 * 16;  // bytes
    static constexpr int kSmem = tile_bytes<DT>((SPLIT == 1 ? kRows : 0) + 2 * STAGES * KEYS) + kParts;
    static_assert(kSmem <= kMaxSmem, "shared memory of a block");
    static_assert(SPLIT == 1 || (MT == 1 && 2 * STAGES * KEYS >= kRows), "queries pass through the space of keys and values");
};

// Two blocks of 4 warps, or one of 8, share a multiprocessor with up to 255 registers a thread, of which the results
// take 128 (64 at a width of 64). At 512 a block waits for the L2 rather than for the tensor cores: two stages of 16 keys
// keep more copies under way than one of 32.
template <int DT> struct TilesOf;
template <> struct TilesOf<64> : Tiles<64, 2, 1, 64, 1, 2> {};
template <> struct TilesOf<128> : Tiles<128, 2, 1, 64, 1, 2> {};
template <> struct TilesOf<256> : Tiles<256, 1, 1, 64, 1, 2> {};
template <> struct TilesOf<512> : Tiles<512, 1, 2, 16, 2, 1> {};

template <class C> __global__ void __launch_bounds__(C::kThreads, C::kBlocks) mma_kernel(const __grid_constant__ Forward<bf16> a) {
    constexpr int DT = C::kWidth, MT = C::kM, NT = C::kKeys / 8, kTile = C::kKeys * kTileStride<DT>;
    constexpr bool kSplit = C::kSplit == 2, kDouble = C::kStages == 2;
    ETT_DYNAMIC_SMEM(smem);
    if (clear_padding(a)) return;
    const Job job = job_of(a);
    const int head = blockIdx.y, first = job.tile * C::kRows, d = a.b.d;
    const Seq seq(a.b, job.seq, job.tile == 0 && head == 0 && threadIdx.x == 0, a.len_k);
    if (first >= seq.q.count) return;

    bf16* const smem_q = reinterpret_cast<bf16*>(smem);
    bf16* const smem_k = smem_q + (kSplit ? 0 : C::kRows * kTileStride<DT>);
    bf16* const smem_v = smem_k + C::kStages * kTile;
    const int kv_col = head / a.b.group * d;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int own = warp % C::kGroups * MT * 16, col = warp / C::kGroups * C::kCols;  // the warp's first row and column
    const int queries = min(C::kRows, seq.q.count - first), keys = seq.seen(first + queries - 1);
    const int warp_keys = own < queries ? seq.seen(first + min(own + MT * 16, queries) - 1) : 0;
    const int least = seq.seen(first + own);  // keys that the warp's first query sees; the others see more
    // Adjacent lanes store adjacent pieces of a part; the other warp's lane reads them.
    float4* const part = reinterpret_cast<float4*>(smem_v + C::kStages * kTile) + warp * NT * kWarp + lane;
    const int to_other = warp < C::kGroups ? C::kGroups * NT * kWarp : -C::kGroups * NT * kWarp;

    // Addresses are formed anew for every tile: registers are scarcer than instructions.
    auto load_k = [&](int key, int stage) {
        const bf16* const from = a.k + int64_t(seq.k.start + key) * a.ldk + kv_col;
        load_tile<C::kKeys, DT, C::kThreads>(smem_k + stage * kTile, from, a.ldk, seq.k.count - key, d);
    };
    auto load_v = [&](int key, int stage) {
        const bf16* const from = a.v + int64_t(seq.k.start + key) * a.ldv + kv_col;
        load_tile<C::kKeys, DT, C::kThreads>(smem_v + stage * kTile, from, a.ldv, seq.k.count - key, d);
    };
    load_tile<C::kRows, DT, C::kThreads>(smem_q, a.q + (seq.q.start + first) * a.ldq + int64_t(head) * d, a.ldq, queries, d);
    OwnRows<kSplit ? C::kCols : 16> q;
    if constexpr (kSplit) {
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();  // the queries have arrived
        q.template load<DT>(smem_q + own * kTileStride<DT> + col);
        __syncthreads();  // all threads have loaded them
    }
    if (keys > 0) load_k(0, 0);
    cp_async_commit();
    if (kDouble) {
        if (keys > 0) load_v(0, 0);
        cp_async_commit();
    }

    const float scale = a.scale * kLog2E;
    Softmax<MT> softmax;
    float out[MT][C::kCols / 8][4] = {};
    for (int key = 0, stage = 0; key < keys; key += C::kKeys, stage ^= kDouble) {
        cp_async_wait<C::kStages - 1>();
        __syncthreads();  // the keys (and queries) have arrived, and all threads are done with the previous values
        if (!kDouble)
            load_v(key, 0);
        else if (key + C::kKeys < keys)
            load_k(key + C::kKeys, stage ^ 1);
        cp_async_commit();

        float s[MT][NT][4];
        auto weigh = [&] {
            if (key + C::kKeys > least) {
                // Keys that the lane's first query would see in a sequence without an end.
                const int seen_0 = seq.causal ? first + own + lane / 4 + 1 + seq.k.count - seq.q.count : seq.k.count;
#pragma unroll
                for (int m = 0; m < MT; ++m)
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const int seen = min(seen_0 + m * 16 + 8 * r, seq.k.count) - key - 2 * (lane % 4);
#pragma unroll
                        for (int j = 0; j < NT; ++j)
#pragma unroll
                            for (int e = 0; e < 2; ++e)
                                if (j * 8 + e >= seen) s[m][j][2 * r + e] = -INFINITY;
                    }
            }
            softmax.step(s, out, scale);
        };
        if (key < warp_keys) {
            const bf16* const tile = smem_k + stage * kTile;
            if constexpr (kSplit) {
                q.template dot<DT>(s, tile + col);
#pragma unroll
                for (int j = 0; j < NT; ++j) part[j * kWarp] = make_float4(s[0][j][0], s[0][j][1], s[0][j][2], s[0][j][3]);
            } else {
                dot_rows<MT, NT, DT>(s, smem_q + own * kTileStride<DT>, tile);
                weigh();
            }
        }

        cp_async_wait<C::kStages - 1>();
        __syncthreads();  // the values have arrived, all threads are done with the keys, and the parts are visible
        if (key + C::kKeys < keys) kDouble ? load_v(key + C::kKeys, stage ^ 1) : load_k(key + C::kKeys, 0);
        cp_async_commit();
        if (key < warp_keys) {
            if constexpr (kSplit) {
#pragma unroll
                for (int j = 0; j < NT; ++j) {
                    const float4 other = part[to_other + j * kWarp];
                    s[0][j][0] += other.x, s[0][j][1] += other.y, s[0][j][2] += other.z, s[0][j][3] += other.w;
                }
                weigh();
            }
            add_rows<MT, NT, C::kCols / 8, DT>(out, s, smem_v + stage * kTile + col);
        }
    }
    cp_async_wait<0>();  // copies are still pending if there was no key

    const int64_t to = seq.q.start + first + own;
    softmax.gather();
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int i = m * 16 + lane / 4 + 8 * r;
            const float lse = finish_row(softmax.max[m][r], softmax.sum[m][r], seq.seen(first + own + i));
            if (lane % 4 == 0 && col == 0 && own + i < queries) a.lse[(to + i) * a.ldlse + head] = lse;
        }
    store_rows<MT, C::kCols / 8>(a.y + to * a.ldy + int64_t(head) * d + col, a.ldy, queries - own, d - col, out, softmax.sum);
}

// Calls f with the tiles of the smallest width for head dimension d.
template <class F> int32_t with_mma_tiles(int d, F f) {
    if (d <= 64) return f(TilesOf<64>{});
    if (d <= 128) return f(TilesOf<128>{});
    if (d <= 256) return f(TilesOf<256>{});
    return f(TilesOf<512>{});
}

// ---- plain multiply-adds ---------------------------------------------------------------------------------

// Turns a tile of scores into weights, which it stores, and updates the running softmax and the results; row i sees the
// first seen(i) keys of the tile.
template <int I, class T, int CT, class Seen>
__device__ __forceinline__ void weigh_tile(float (&s)[I][4], Running<T> (&row)[I], float (&out)[I][CT][4], float* weights, float scale, Seen&& seen) {
    const int x = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < I; ++i) {
        const int keys = seen(i);
        float most = -INFINITY, sum = 0.f, factor;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (x + 16 * j < keys) most = fmaxf(most, s[i][j] * scale);
        // 16 lanes share a row.
#pragma unroll
        for (int by = 8; by > 0; by /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, by));
        const float shift = row[i].raise(most, factor);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float p = x + 16 * j < keys ? exponential<T>(fmaf(s[i][j], scale, -shift)) : 0.f;
            plain_weight(weights, i, j) = p;
            sum += p;
        }
#pragma unroll
        for (int by = 8; by > 0; by /= 2) sum += __shfl_xor_sync(kAllLanes, sum, by);
        row[i].sum = row[i].sum * factor + sum;
#pragma unroll
        for (int c = 0; c < CT; ++c)
#pragma unroll
            for (int e = 0; e < 4; ++e) out[i][c][e] *= factor;
    }
}

template <class T, int DT, int I> __global__ void __launch_bounds__(kPlainThreads, 2) simple_kernel(const __grid_constant__ Forward<T> a) {
    ETT_DYNAMIC_SMEM(smem);
    if (clear_padding(a)) return;
    const Job job = job_of(a);
    const int head = blockIdx.y, first = job.tile * I * 16, d = a.b.d, x = threadIdx.x % 16, y = threadIdx.x / 16;
    const Seq seq(a.b, job.seq, job.tile == 0 && head == 0 && threadIdx.x == 0, a.len_k);
    if (first >= seq.q.count) return;

    float* const weights = reinterpret_cast<float*>(smem);
    float* const slices = weights + I * 16 * kWeightStride;
    const int queries = min(I * 16, seq.q.count - first), keys = seq.seen(first + queries - 1);
    const Rows<T> q{a.q + (seq.q.start + first) * a.ldq + int64_t(head) * d, a.ldq, queries};
    const int64_t kv_col = int64_t(head / a.b.group) * d;
    Running<T> row[I];
    float out[I][DT / 64][4] = {};
    for (int key = 0; key < keys; key += kPlainCols) {
        const Rows<T> k{a.k + (seq.k.start + key) * a.ldk + kv_col, a.ldk, seq.k.count - key};
        const Rows<T> v{a.v + (seq.k.start + key) * a.ldv + kv_col, a.ldv, seq.k.count - key};
        float s[I][4];
        plain_dot<I>(s, q, k, d, slices, a.vectors);
        weigh_tile<I>(s, row, out, weights, a.scale, [&](int i) { return seq.seen(first + y + 16 * i) - key; });
        plain_sum<I, DT>(out, v, d, weights, a.vectors);
    }
#pragma unroll
    for (int i = 0; i < I; ++i) {
        const int at = y + 16 * i;
        const float lse = row[i].finish(seq.seen(first + at));
        if (at >= queries) continue;
        const int64_t to = seq.q.start + first + at;
        if (x == 0) a.lse[to * a.ldlse + head] = lse;
        plain_store<DT>(a.y + to * a.ldy + int64_t(head) * d, d, out[i], row[i].sum);
    }
}

// ---- few queries, many keys ("split") --------------------------------------------------------------------
// The keys of each sequence are divided among blocks. A block writes, for each of its rows (a query and a head), the
// maximum m of its scores, the sum of exp(score - m) and the sum of exp(score - m) v to the workspace; a second kernel
// adds these parts in a fixed order. How the keys are divided depends on max_k, not on their actual number, so
// that a launch can be replayed with other lengths; blocks without keys end at once.

constexpr int kSplitQueries = 16;  // most queries of a sequence
constexpr int kSplitRows = 16;     // of a block: the height of an mma tile
constexpr int kCombineThreads = 128;

struct Division {
    int64_t queries;  // per sequence
    int64_t keys;     // per block
    int64_t splits;   // per sequence
};

template <class T> struct Split {
    Forward<T> f;
    float* out;    // splits, S * queries, heads, D
    float2* stat;  // splits, S * queries, heads: maximum and sum
    int queries, keys, splits;

    // The part of a row.
    __device__ __forceinline__ int64_t part(int split, int seq, int query, int head) const {
        return ((int64_t(split) * f.b.seqs + seq) * queries + query) * f.b.heads + head;
    }
};

// A part's weight in the sum of parts whose largest maximum is `max`.
template <class T> __device__ __forceinline__ float part_weight(float of, float max) { return of == max ? 1.f : exponential<T>(of - max); }

// A block owns 16 rows of one sequence and key/value head: queries times the heads of the group. Its 4 warps take turns
// with slices of 16 keys; each has its own two stages in shared memory, which no other warp waits for, and its own
// softmax. Three blocks, with two slices of keys and values in flight per warp, saturate the memory.
constexpr int kSliceKeys = 16, kSplitWarps = 4, kSplitThreads = kSplitWarps * kWarp;
template <int DT> constexpr int kSplitBytes = tile_bytes<DT>(kSplitRows + kSplitWarps * 2 * 2 * kSliceKeys);
static_assert(kSplitBytes<128> <= kMaxSmem, "shared memory of a block");

template <int DT> __global__ void __launch_bounds__(kSplitThreads, 3) mma_split_kernel(const __grid_constant__ Split<bf16> a) {
    ETT_DYNAMIC_SMEM(smem);
    const Batch& b = a.f.b;
    const int split = int(blockIdx.x) % a.splits, job = int(blockIdx.x) / a.splits, s = job % b.seqs, first = job / b.seqs * kSplitRows;
    const int kv_head = blockIdx.y, d = b.d, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const Seq seq(b, s, split == 0 && first == 0 && kv_head == 0 && threadIdx.x == 0, a.f.len_k);
    const int rows = min(kSplitRows, seq.q.count * b.group - first), begin = split * a.keys;
    if (rows <= 0) return;
    const int end = min(begin + a.keys, seq.seen((first + rows - 1) / b.group));  // the last row's query sees the most keys
    if (begin >= end) return;

    constexpr int kTile = kSliceKeys * kTileStride<DT>, kPieces = DT / 8;
    bf16* const smem_q = reinterpret_cast<bf16*>(smem);
    bf16* const slices = smem_q + kSplitRows * kTileStride<DT> + warp * 4 * kTile;  // keys, values; keys, values
    for (int i = threadIdx.x; i < kSplitRows * kPieces; i += kSplitThreads) {
        const int r = i / kPieces, c = i % kPieces * 8, row = first + r;
        const bf16* from = a.f.q + int64_t(seq.q.start + row / b.group) * a.f.ldq + int64_t(kv_head * b.group + row % b.group) * d + c;
        cp_async16(smem_address(smem_q + r * kTileStride<DT> + c), from, r < rows && c < d);
    }
    cp_async_commit();
    const bf16* k = a.f.k + seq.k.start * a.f.ldk + int64_t(kv_head) * d;
    const bf16* v = a.f.v + seq.k.start * a.f.ldv + int64_t(kv_head) * d;
    // The copy of a slice by the warp; beyond the end an empty group, so that the number of groups stays the same.
    auto load = [&](int key, int stage) {
        if (key < end) {
            load_tile<kSliceKeys, DT, kWarp>(slices + 2 * stage * kTile, k + key * a.f.ldk, a.f.ldk, end - key, d, lane);
            load_tile<kSliceKeys, DT, kWarp>(slices + (2 * stage + 1) * kTile, v + key * a.f.ldv, a.f.ldv, end - key, d, lane);
        }
        cp_async_commit();
    };
    constexpr int kStep = kSplitWarps * kSliceKeys;
    int key = begin + warp * kSliceKeys;
    load(key, 0);
    load(key + kStep, 1);
    cp_async_wait<2>();
    __syncthreads();  // the queries have arrived
    OwnRows<DT> q;
    q.template load<DT>(smem_q);

    int seen[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) seen[r] = min(end, seq.seen((first + lane / 4 + 8 * r) / b.group));
    const float scale = a.f.scale * kLog2E;
    Softmax<1> softmax;
    float out[1][DT / 8][4] = {};
    for (int stage = 0; key < end; key += kStep, stage ^= 1) {
        cp_async_wait<1>();
        __syncwarp();  // the slice has arrived
        const bf16* const tile = slices + 2 * stage * kTile;
        float w[1][kSliceKeys / 8][4];
        q.template dot<DT>(w, tile);
#pragma unroll
        for (int j = 0; j < kSliceKeys / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (key + j * 8 + 2 * (lane % 4) + e % 2 >= seen[e / 2]) w[0][j][e] = -INFINITY;
        softmax.step(w, out, scale);
        add_rows<1, kSliceKeys / 8, DT / 8, DT>(out, w, tile + kTile);
        __syncwarp();  // the warp is done with the slice
        load(key + 2 * kStep, stage);
    }
    cp_async_wait<0>();
    softmax.gather();

    // The warps' parts become the block's.
    float* const parts = reinterpret_cast<float*>(smem);  // warp, row, column
    float2* const stats = reinterpret_cast<float2*>(parts + kSplitWarps * kSplitRows * DT);  // warp, row
    static_assert(kSplitWarps * kSplitRows * (DT + 2) * sizeof(float) <= kSplitBytes<DT>, "parts fit the space of the slices");
    __syncthreads();  // all warps are done with their slices and the queries
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = warp * kSplitRows + lane / 4 + 8 * r;
        if (lane % 4 == 0) stats[row] = make_float2(softmax.max[0][r] * kLn2, softmax.sum[0][r]);
#pragma unroll
        for (int c = 0; c < DT / 8; ++c) {
            const float two[2] = {out[0][c][2 * r], out[0][c][2 * r + 1]};
            store<2>(parts + row * DT + c * 8 + 2 * (lane % 4), two);
        }
    }
    __syncthreads();  // the parts are visible
    for (int i = threadIdx.x; i < rows * DT; i += kSplitThreads) {
        const int r = i / DT, c = i % DT, row = first + r;
        if (c >= d) continue;
        float2 of[kSplitWarps];
        float most = -INFINITY, sum = 0.f, total = 0.f;
#pragma unroll
        for (int w = 0; w < kSplitWarps; ++w) {
            of[w] = stats[w * kSplitRows + r];
            most = fmaxf(most, of[w].x);
        }
#pragma unroll
        for (int w = 0; w < kSplitWarps; ++w) {
            const float weight = part_weight<bf16>(of[w].x, most);
            total += weight * of[w].y;
            sum += weight * parts[(w * kSplitRows + r) * DT + c];
        }
        const int64_t at = a.part(split, s, row / b.group, kv_head * b.group + row % b.group);
        a.out[at * d + c] = sum;
        if (c == 0) a.stat[at] = make_float2(most, total);
    }
}

// The same by plain multiply-adds; a block owns up to 16 heads of one query.
template <class T, int DT> __global__ void __launch_bounds__(kPlainThreads, 2) simple_split_kernel(const __grid_constant__ Split<T> a) {
    ETT_DYNAMIC_SMEM(smem);
    const Batch& b = a.f.b;
    const int split = int(blockIdx.x) % a.splits, job = int(blockIdx.x) / a.splits, s = job % b.seqs, query = job / b.seqs % a.queries;
    const int first = job / b.seqs / a.queries * kSplitRows, kv_head = blockIdx.y, d = b.d, x = threadIdx.x % 16, y = threadIdx.x / 16;
    const Seq seq(b, s, split == 0 && query == 0 && first == 0 && kv_head == 0 && threadIdx.x == 0, a.f.len_k);
    if (query >= seq.q.count) return;
    const int begin = split * a.keys, end = min(begin + a.keys, seq.seen(query));
    if (begin >= end) return;

    float* const weights = reinterpret_cast<float*>(smem);
    float* const slices = weights + kSplitRows * kWeightStride;
    const int rows = min(kSplitRows, b.group - first), head = kv_head * b.group + first;
    const Rows<T> q{a.f.q + int64_t(seq.q.start + query) * a.f.ldq + int64_t(head) * d, d, rows};
    const T* const k = a.f.k + seq.k.start * a.f.ldk + int64_t(kv_head) * d;
    const T* const v = a.f.v + seq.k.start * a.f.ldv + int64_t(kv_head) * d;
    Running<T> row[1];
    float out[1][DT / 64][4] = {};
    for (int key = begin; key < end; key += kPlainCols) {
        float w[1][4];
        plain_dot<1>(w, q, Rows<T>{k + key * a.f.ldk, a.f.ldk, end - key}, d, slices, a.f.vectors);
        weigh_tile<1>(w, row, out, weights, a.f.scale, [&](int) { return end - key; });
        plain_sum<1, DT>(out, Rows<T>{v + key * a.f.ldv, a.f.ldv, end - key}, d, weights, a.f.vectors);
    }
    if (y >= rows) return;
    const int64_t at = a.part(split, s, query, head + y);
    if (x == 0) a.stat[at] = make_float2(row[0].max, row[0].sum);
    plain_store<DT>(a.out + at * d, d, out[0], 1.f);
}

// Adds the parts of a query and head. Its threads share the maxima and weights of the parts, so that the loads of the
// parts themselves, kParts at a time, need not wait for each other.
constexpr int kColumns = int(kMaxHeadDim) / kCombineThreads, kParts = 8;
template <class T> __global__ void __launch_bounds__(kCombineThreads) combine_kernel(const __grid_constant__ Split<T> a) {
    __shared__ float weights[kCombineThreads], reduced[kCombineThreads / kWarp];
    if (clear_padding(a.f)) return;
    const Job job = job_of(a.f);  // a tile is one query
    const int head = blockIdx.y, d = a.f.b.d, thread = threadIdx.x;
    const Seq seq(a.f.b, job.seq, false, a.f.len_k);
    if (job.tile >= seq.q.count) return;
    const int seen = seq.seen(job.tile), splits = (seen + a.keys - 1) / a.keys;
    const int64_t at = a.part(0, job.seq, job.tile, head), step = a.part(1, job.seq, job.tile, head) - at;

    Running<T> all;
    for (int i = thread; i < splits; i += kCombineThreads) all.max = fmaxf(all.max, a.stat[at + i * step].x);
    all.max = warp_max(all.max);
    if (thread % kWarp == 0) reduced[thread / kWarp] = all.max;
    __syncthreads();  // the warps' maxima are visible
#pragma unroll
    for (int w = 0; w < kCombineThreads / kWarp; ++w) all.max = fmaxf(all.max, reduced[w]);
    const float most = all.max;

    float out[kColumns] = {}, total[1] = {};
    for (int first = 0; first < splits; first += kCombineThreads) {
        __syncthreads();  // all threads have read the previous weights and the maxima
        const int count = min(kCombineThreads, splits - first);
        float weight = 0.f;
        if (thread < count) {
            const float2 of = a.stat[at + (first + thread) * step];
            weight = part_weight<T>(of.x, most);
            total[0] += weight * of.y;
        }
        weights[thread] = weight;
        __syncthreads();  // the weights are visible
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            const int c = thread + j * kCombineThreads;
            if (c >= d) break;
            const float* const from = a.out + (at + first * step) * d + c;
            for (int i = 0; i < count; i += kParts) {
                float v[kParts];
#pragma unroll
                for (int k = 0; k < kParts; ++k) v[k] = i + k < count ? from[(i + k) * step * d] : 0.f;
#pragma unroll
                for (int k = 0; k < kParts; ++k)
                    if (i + k < count) out[j] += weights[i + k] * v[k];
            }
        }
    }
    __syncthreads();  // all threads have read the maxima
    block_sum<1, kCombineThreads>(total, reduced);
    all.sum = total[0];
    const float lse = all.finish(seen);
    const int64_t to = seq.q.start + job.tile;
    if (thread == 0) a.f.lse[to * a.f.ldlse + head] = lse;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
        const int c = thread + j * kCombineThreads;
        if (c < d) a.f.y[to * a.f.ldy + int64_t(head) * d + c] = from_float<T>(out[j] * all.sum);
    }
}

// ---- launcher --------------------------------------------------------------------------------------------

// "mma" requires rows of whole 16-byte pieces, D a multiple of 8, and a positive scale (a maximum of scores is one of
// scaled scores).
bool can_use_mma(const ett_attention_fwd_args& a) {
    const bool pieces = wide(a.q) && wide(a.k) && wide(a.v) && wide(a.y);
    return a.q.dtype == ETT_BF16 && a.head_dim % 8 == 0 && pieces && a.scale > 0;
}

bool sound(Check& check, const ett_attention_fwd_args* a) {
    return check.ok() && check_shapes(check, *a) && (!present(a->len_k) || check.vector("len_k", a->len_k, ETT_I32, numel(a->cu_q) - 1));
}

// "split" is for few queries; it is the default for those of a cache.
bool can_split(const ett_attention_fwd_args& a) { return a.max_q <= kSplitQueries; }

// How the keys are divided, by shape alone: into the largest parts that give kSplitBlocks blocks, a few times those
// that run at the same time on the largest devices.
constexpr int64_t kSplitBlocks = 512, kMostKeys = 512, kLeastKeys = kPlainCols;
Division division_of(const ett_attention_fwd_args& a) {
    const int64_t queries = std::max<int64_t>(1, std::min(a.max_q, rows(a.q))), most = std::min(a.max_k, rows(a.k));
    const int64_t jobs = (numel(a.cu_q) - 1) * a.kv_heads * ceil_div(queries * (a.heads / a.kv_heads), kSplitRows);
    int64_t keys = kMostKeys;
    while (keys > kLeastKeys && jobs * ceil_div(most, keys) < kSplitBlocks) keys /= 2;
    return {queries, keys, std::max<int64_t>(1, ceil_div(most, keys))};
}

struct SplitParts {
    float* out;
    float2* stat;
    int64_t bytes;
};
SplitParts split_parts(const ett_attention_fwd_args& a, void* workspace) {
    const Division v = division_of(a);
    const int64_t n = v.splits * (numel(a.cu_q) - 1) * v.queries * a.heads;
    Pieces pieces(workspace);
    SplitParts parts{pieces.take<float>(n * a.head_dim), pieces.take<float2>(n), 0};
    parts.bytes = pieces.bytes();
    return parts;
}

template <class T> Forward<T> arguments(const ett_attention_fwd_args& a, const ett_launch* l, int64_t tiles) {
    const Batch b = batch_of(a, l);
    const bool vectors = head_wide(a.q, b.d, 4 * sizeof(T)) && head_wide(a.k, b.d, 4 * sizeof(T)) && head_wide(a.v, b.d, 4 * sizeof(T));
    return Forward<T>{b,           data<const int32_t>(a.len_k), data<const T>(a.q), data<const T>(a.k), data<const T>(a.v), data<T>(a.y),
                      data<float>(a.lse), stride(a.q), stride(a.k), stride(a.v), stride(a.y), stride(a.lse), float(a.scale), int(tiles), vectors};
}

constexpr char kOp[] = "attention_fwd";
int32_t too_many_tiles() { return ett_fail(ETT_UNSUPPORTED, 0, kOp, "cu_q", "too long for its max_q", "fewer than 2^31 tiles"); }

template <class T, class K> int32_t enqueue_split(const ett_attention_fwd_args& a, const ett_launch* l, K* kernel, int64_t tiles, int threads, size_t smem) {
    const Division v = division_of(a);
    const SplitParts parts = split_parts(a, l->workspace);
    const Split<T> s{arguments<T>(a, l, v.queries), parts.out, parts.stat, int(v.queries), int(v.keys), int(v.splits)};
    const Batch& b = s.f.b;
    const int64_t blocks = tiles * b.seqs * v.splits, rows = v.queries * b.seqs + kClearBlocks;
    if (blocks > INT32_MAX || rows > INT32_MAX) return too_many_tiles();
    int32_t status = ETT_OK;
    if (blocks > 0) status = launch(kOp, kernel, dim3(unsigned(blocks), unsigned(b.kv_heads)), dim3(unsigned(threads)), smem, l, s);
    if (status == ETT_OK) status = launch(kOp, combine_kernel<T>, dim3(unsigned(rows), unsigned(b.heads)), dim3(kCombineThreads), 0, l, s);
    return status == ETT_OK ? ett_done("split") : status;
}

int32_t run_split(const ett_attention_fwd_args& a, const ett_launch* l) {
    const int64_t group = a.heads / a.kv_heads, queries = division_of(a).queries;
    if (can_use_mma(a) && a.head_dim <= 128) {
        const int64_t tiles = ceil_div(queries * group, kSplitRows);
        if (a.head_dim <= 64) return enqueue_split<bf16>(a, l, mma_split_kernel<64>, tiles, kSplitThreads, kSplitBytes<64>);
        return enqueue_split<bf16>(a, l, mma_split_kernel<128>, tiles, kSplitThreads, kSplitBytes<128>);
    }
    return with_act(a.q.dtype, [&](auto t) {
        using T = decltype(t);
        return with_plain_tile(int(a.head_dim), [&](auto dt, auto) {
            constexpr int DT = decltype(dt)::value;
            const int64_t tiles = queries * ceil_div(group, kSplitRows);
            return enqueue_split<T>(a, l, simple_split_kernel<T, DT>, tiles, kPlainThreads, plain_floats<1, DT>() * sizeof(float));
        });
    });
}

template <class T, class K>
int32_t enqueue(const ett_attention_fwd_args& a, const ett_launch* l, const char* name, K* kernel, int rows_of_tile, int threads, size_t smem) {
    const int64_t tiles = tiles_of(a.max_q, rows(a.q), rows_of_tile), blocks = tiles * (numel(a.cu_q) - 1) + kClearBlocks;
    if (blocks > INT32_MAX) return too_many_tiles();
    const Forward<T> f = arguments<T>(a, l, tiles);
    const int32_t status = launch(kOp, kernel, dim3(unsigned(blocks), unsigned(f.b.heads)), dim3(unsigned(threads)), smem, l, f);
    return status == ETT_OK ? ett_done(name) : status;
}

}  // namespace
}  // namespace attention
}  // namespace ett

extern "C" int64_t ett_attention_fwd_workspace(const ett_attention_fwd_args* a) {
    using namespace ett;
    using namespace ett::attention;
    Check check(kOp, a);
    if (!sound(check, a)) return -1;
    return can_split(*a) ? split_parts(*a, nullptr).bytes : 0;
}

extern "C" int32_t ett_attention_fwd(const ett_attention_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    using namespace ett::attention;
    Check check(kOp, a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->q) == 0) return ett_done("");
    const bool mma = can_use_mma(*a), split = can_split(*a), cached = present(a->len_k);
    const char* kernel = check.choose(l, split && cached ? "split" : mma ? "mma" : "simple", {{"split", split}, {"mma", mma}, {"simple", true}});
    if (strcmp(kernel, "split") == 0) check.workspace(l, split_parts(*a, l->workspace).bytes);
    if (!check.ok()) return check.status();
    if (strcmp(kernel, "split") == 0) return run_split(*a, l);
    if (strcmp(kernel, "mma") == 0)
        return with_mma_tiles(int(a->head_dim), [&](auto tiles) {
            using C = decltype(tiles);
            return enqueue<bf16>(*a, l, kernel, mma_kernel<C>, C::kRows, C::kThreads, C::kSmem);
        });
    return with_act(a->q.dtype, [&](auto t) {
        using T = decltype(t);
        return with_plain_tile(int(a->head_dim), [&](auto dt, auto i) {
            constexpr int DT = decltype(dt)::value, I = decltype(i)::value;
            return enqueue<T>(*a, l, kernel, simple_kernel<T, DT, I>, I * 16, kPlainThreads, plain_floats<I, DT>() * sizeof(float));
        });
    });
}
