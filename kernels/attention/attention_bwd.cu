// attention_bwd.cu: gradients of attention_fwd; the probabilities are recomputed from lse.
//
//   p_ij = exp(scale q_i . k_j - lse_i),  dp_ij = dy_i . v_j,  delta_i = dy_i . y_i,  ds_ij = p_ij (dp_ij - delta_i)
//   dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i,   dv_j = sum_i p_ij dy_i
// with i, j and heads as in attention_fwd.cu; dk and dv sum over the query heads of their group, too.
//
// dy, q, y   N,heads*D      act  rows of any stride   in
// k, v       Nk,kv_heads*D  act  rows of any stride   in
// lse        N,heads        f32  rows of any stride   in
// cu_q, cu_k S+1            i32  contiguous           in
// dq         N,heads*D      act  rows of any stride   out   0 in padding rows
// dk, dv     Nk,kv_heads*D  act  rows of any stride   out   0 in padding rows
//
// Two implementations, "mma" (bf16 on tensor cores) and "simple" (any type and head dimension, by fused multiply-adds).
// Three steps: delta (and lse) of each row and head, in a kernel that also clears the padding; dq by tiles of queries;
// dk and dv by tiles of keys. The two passes compute the scores twice, but need no sums across blocks, so that the
// order of every sum is fixed. "mma" with D > 128 stores p and ds of a bounded number of sequences and key/value heads
// at a time instead, because a tile's operands and results no longer fit a multiprocessor; dq, dk and dv are then plain
// products.
// A sequence with wrong offsets is a fault and counts as empty: if its query offsets are wrong, its rows of dq are not
// written and its rows of dk and dv are 0; if its key offsets are wrong, the reverse.
// numerics: products and sums in f32; "mma" rounds p and ds to bf16 before they are multiplied, "simple" does not; one
// rounding of each result. Bitwise repeatable.
// limits: 1 <= D <= 512, heads < 65536. "mma": D a multiple of 8 and rows of whole 16-byte pieces; with D > 128 also at
// most 2^28 queries (of all heads of a group) times keys in a sequence, 16384 of each for one head.
// work: 10 * heads * D * (visible pairs) FLOP ("mma" executes 14 instead of 10 up to D = 128, "simple" 16);
//       (4*N*heads + 4*Nk*kv_heads) * D * size bytes, and with D > 128 about 4 + 4 * D / 128 for each visible pair.
// workspace: 8*N*heads bytes; "mma" with D > 128: 4 bytes for each pair of the sequences and heads that are processed
// at a time, which is 128 MiB, or one key/value head of one sequence if that is more.
// papers: FlashAttention-2 (2307.08691).
#include "activation.cuh"
#include "attention.cuh"
#include "gemm.cuh"
#include "pieces.cuh"

namespace ett {
namespace attention {
namespace {

template <class T> struct Backward {
    Batch b;
    const T* dy;
    const T* q;
    const T* k;
    const T* v;
    T* dq;
    T* dk;
    T* dv;
    float* lse;    // heads,N  in the workspace; "mma": in powers of 2
    float* delta;  // heads,N  in the workspace
    int64_t lddy, ldq, ldk, ldv, lddq, lddk, lddv;
    float scale;
    int tiles;     // of own rows in the longest sequence
    bool vectors;  // four elements at a time
};

// ---- rows ------------------------------------------------------------------------------------------------

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / kWarp;

// Writes lse times `factor` and delta, ordered by heads, with one warp per row and head; clears the padding.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
rows_kernel(const __grid_constant__ Backward<T> a, const T* y, int64_t ldy, const float* lse, int64_t ldlse, float factor, bool vectors) {
    const int lane = threadIdx.x % kWarp, d = a.b.d;
    const int64_t from_q = padding(a.b.cu_q, a.b.seqs, a.b.n_q), from_k = padding(a.b.cu_k, a.b.seqs, a.b.n_k);
    for (int64_t i = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / kWarp; i < from_q * a.b.heads; i += int64_t(gridDim.x) * kRowWarps) {
        const int64_t row = i / a.b.heads, head = i - row * a.b.heads;
        float sum = 0.f;
        for (int c = 4 * lane; c < d; c += 4 * kWarp) {
            float u[4], v[4];
            fetch4(u, y + row * ldy + head * d + c, d - c, vectors);
            fetch4(v, a.dy + row * a.lddy + head * d + c, d - c, vectors);
#pragma unroll
            for (int e = 0; e < 4; ++e) sum += u[e] * v[e];
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            a.delta[head * a.b.n_q + row] = sum;
            a.lse[head * a.b.n_q + row] = lse[row * ldlse + head] * factor;
        }
    }
    const int kv_cols = a.b.kv_heads * d;
    clear_rows(a.dq, a.lddq, a.b.heads * d, from_q, a.b.n_q, blockIdx.x, gridDim.x);
    clear_rows(a.dk, a.lddk, kv_cols, from_k, a.b.n_k, blockIdx.x, gridDim.x);
    clear_rows(a.dv, a.lddv, kv_cols, from_k, a.b.n_k, blockIdx.x, gridDim.x);
}

// ---- tensor cores, head dimensions up to 128 -------------------------------------------------------------
// Two passes without sums across blocks: dq by tiles of 128 queries, dk and dv by tiles of 64 keys. Both process the
// other side in tiles of 32 rows. The first owns 32 rows a warp, which halves its loads from shared memory; the second
// has twice the results and owns 16, with the fragments of the keys in registers.

constexpr int kMmaThreads = 128, kOther = 32, kQueries = 128, kKeys = 64;
template <int DT> constexpr int dq_bytes() { return tile_bytes<DT>(2 * kQueries + 3 * kOther); }
template <int DT> constexpr int dkv_bytes() { return tile_bytes<DT>(kKeys + 4 * kOther) + 4 * kOther * int(sizeof(float)); }
static_assert(dq_bytes<128>() <= kMaxSmem && dkv_bytes<128>() <= kMaxSmem, "shared memory of a block");
static_assert(kKeys <= 4 * kOther, "keys pass through the space of the queries");

template <int DT> __global__ void __launch_bounds__(kMmaThreads, 2) mma_dq_kernel(const __grid_constant__ Backward<bf16> a) {
    ETT_DYNAMIC_SMEM(smem);
    const int tile = int(blockIdx.x) / a.b.seqs, s = int(blockIdx.x) % a.b.seqs, head = blockIdx.y, d = a.b.d;
    // With a causal mask the tiles with the most keys come first.
    const int first = (a.b.causal ? a.tiles - 1 - tile : tile) * kQueries;
    const Seq seq(a.b, s, first == 0 && head == 0 && threadIdx.x == 0);
    if (first >= seq.q.count) return;

    constexpr int MT = 2, NT = kOther / 8, kTile = kOther * kTileStride<DT>;
    bf16* const smem_q = reinterpret_cast<bf16*>(smem);
    bf16* const smem_dy = smem_q + kQueries * kTileStride<DT>;
    bf16* const smem_v = smem_dy + kQueries * kTileStride<DT>;
    bf16* const smem_k = smem_v + kTile;  // two tiles
    const bf16* k = a.k + seq.k.start * a.ldk + int64_t(head / a.b.group) * d;
    const bf16* v = a.v + seq.k.start * a.ldv + int64_t(head / a.b.group) * d;
    const int queries = min(kQueries, seq.q.count - first), keys = seq.seen(first + queries - 1);
    const int lane = threadIdx.x % kWarp, own = threadIdx.x / kWarp * MT * 16;
    const int warp_keys = own < queries ? seq.seen(first + min(own + MT * 16, queries) - 1) : 0;
    const int64_t start = seq.q.start + first;

    auto load = [&](bf16* to, const bf16* from, int64_t ld, int key) {
        load_tile<kOther, DT, kMmaThreads>(to, from + key * ld, ld, seq.k.count - key, d);
    };
    load_tile<kQueries, DT, kMmaThreads>(smem_q, a.q + start * a.ldq + int64_t(head) * d, a.ldq, queries, d);
    load_tile<kQueries, DT, kMmaThreads>(smem_dy, a.dy + start * a.lddy + int64_t(head) * d, a.lddy, queries, d);
    if (keys > 0) {
        load(smem_k, k, a.ldk, 0);
        load(smem_v, v, a.ldv, 0);
    }
    cp_async_commit();

    const float scale = a.scale * kLog2E;
    float lse[MT][2], delta[MT][2], dq[MT][DT / 8][4] = {};
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int i = own + m * 16 + lane / 4 + 8 * r;
            const int64_t at = head * a.b.n_q + start + i;
            lse[m][r] = i < queries ? a.lse[at] : INFINITY;  // gives rows past the last one probability 0
            delta[m][r] = i < queries ? a.delta[at] : 0.f;
        }
    for (int key = 0, stage = 0; key < keys; key += kOther, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // these tiles have arrived, and all threads are done with the previous keys
        if (key + kOther < keys) load(smem_k + (stage ^ 1) * kTile, k, a.ldk, key + kOther);
        cp_async_commit();
        const bf16* const tile_k = smem_k + stage * kTile;
        float p[MT][NT][4], dp[MT][NT][4];
        if (key < warp_keys) {
            dot_rows<MT, NT, DT>(p, smem_q + own * kTileStride<DT>, tile_k);
            dot_rows<MT, NT, DT>(dp, smem_dy + own * kTileStride<DT>, smem_v);
        }
        __syncthreads();  // all threads are done with the values
        if (key + kOther < keys) load(smem_v, v, a.ldv, key + kOther);
        cp_async_commit();
        if (key >= warp_keys) continue;
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int j = 0; j < NT; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    p[m][j][e] = exp2_approx(fmaf(p[m][j][e], scale, -lse[m][e / 2])) * (dp[m][j][e] - delta[m][e / 2]);
        if (key + kOther > seq.seen(first + own)) {  // the warp's first query sees the fewest keys
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int seen = seq.seen(first + own + m * 16 + lane / 4 + 8 * r) - key - 2 * (lane % 4);
#pragma unroll
                    for (int j = 0; j < NT; ++j)
#pragma unroll
                        for (int e = 0; e < 2; ++e)
                            if (j * 8 + e >= seen) p[m][j][2 * r + e] = 0.f;
                }
        }
        add_rows<MT, NT, DT / 8, DT>(dq, p, tile_k);
    }
    cp_async_wait<0>();  // the copy of the queries is still pending if there was no key
    const float factor[MT][2] = {{a.scale, a.scale}, {a.scale, a.scale}};
    const int64_t to = start + own;
    store_rows<MT, DT / 8>(a.dq + to * a.lddq + int64_t(head) * d, a.lddq, queries - own, d, dq, factor);
}

template <int DT> __global__ void __launch_bounds__(kMmaThreads, 2) mma_dkv_kernel(const __grid_constant__ Backward<bf16> a) {
    ETT_DYNAMIC_SMEM(smem);
    // The first tiles come first: with a causal mask they have the most queries.
    const int s = int(blockIdx.x) % a.b.seqs, first = int(blockIdx.x) / a.b.seqs * kKeys, kv_head = blockIdx.y, d = a.b.d;
    const Seq seq(a.b, s, first == 0 && kv_head == 0 && threadIdx.x == 0);
    if (first >= seq.k.count) return;

    constexpr int NT = kOther / 8, kTile = kOther * kTileStride<DT>;
    bf16* const smem_v = reinterpret_cast<bf16*>(smem);
    bf16* const smem_q = smem_v + kKeys * kTileStride<DT>;                       // queries, dy; queries, dy
    float* const smem_rows = reinterpret_cast<float*>(smem_q + 4 * kTile);      // lse, delta; lse, delta
    const int keys = min(kKeys, seq.k.count - first);
    const int lane = threadIdx.x % kWarp, own = threadIdx.x / kWarp * 16;
    const int64_t start = seq.k.start + first;

    // One loop over the heads of the group and, for each, the tiles of queries that see a key.
    const int begin = min(seq.first_query(first), seq.q.count) / kOther * kOther;
    const int tiles = (seq.q.count - begin + kOther - 1) / kOther, steps = tiles * a.b.group;
    auto load_q = [&](int step, int stage) {
        const int64_t head = int64_t(kv_head) * a.b.group + step / tiles;
        const int query = begin + step % tiles * kOther, rows = seq.q.count - query;
        const int64_t from = seq.q.start + query;
        load_tile<kOther, DT, kMmaThreads>(smem_q + 2 * stage * kTile, a.q + from * a.ldq + head * d, a.ldq, rows, d);
        load_tile<kOther, DT, kMmaThreads>(smem_q + (2 * stage + 1) * kTile, a.dy + from * a.lddy + head * d, a.lddy, rows, d);
        if (threadIdx.x < kOther) {
            // An infinite lse gives rows past the last one probability 0.
            const int i = threadIdx.x;
            smem_rows[2 * stage * kOther + i] = i < rows ? a.lse[head * a.b.n_q + from + i] : INFINITY;
            smem_rows[(2 * stage + 1) * kOther + i] = i < rows ? a.delta[head * a.b.n_q + from + i] : 0.f;
        }
    };
    load_tile<kKeys, DT, kMmaThreads>(smem_v, a.v + start * a.ldv + int64_t(kv_head) * d, a.ldv, keys, d);
    load_tile<kKeys, DT, kMmaThreads>(smem_q, a.k + start * a.ldk + int64_t(kv_head) * d, a.ldk, keys, d);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();  // keys and values have arrived
    OwnRows<DT> k;
    k.template load<DT>(smem_q + own * kTileStride<DT>);
    __syncthreads();  // all threads have loaded the keys
    if (steps > 0) load_q(0, 0);
    cp_async_commit();

    const float scale = a.scale * kLog2E;
    const int last = seq.first_query(first + own + 15);  // from here on the queries see all keys of the warp
    const int least = seq.first_query(first + own);      // before, they see none
    float dk[1][DT / 8][4] = {}, dv[1][DT / 8][4] = {};
    for (int step = 0, stage = 0; step < steps; ++step, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this tile has arrived, and all threads are done with the previous one
        if (step + 1 < steps) load_q(step + 1, stage ^ 1);
        cp_async_commit();
        const bf16* const tile_q = smem_q + 2 * stage * kTile;
        const bf16* const tile_dy = tile_q + kTile;
        const float* const row = smem_rows + 2 * stage * kOther + 2 * (lane % 4);
        const int query = begin + step % tiles * kOther;
        if (query + kOther <= least) continue;
        float p[1][NT][4], dp[1][NT][4];
        k.template dot<DT>(p, tile_q);
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) p[0][j][e] = exp2_approx(fmaf(p[0][j][e], scale, -row[j * 8 + e % 2]));
        if (query < last) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int from = seq.first_query(first + own + lane / 4 + 8 * r) - query - 2 * (lane % 4);
#pragma unroll
                for (int j = 0; j < NT; ++j)
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        if (j * 8 + e < from) p[0][j][2 * r + e] = 0.f;
            }
        }
        add_rows<1, NT, DT / 8, DT>(dv, p, tile_dy);
        dot_rows<1, NT, DT>(dp, smem_v + own * kTileStride<DT>, tile_dy);
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) p[0][j][e] *= dp[0][j][e] - row[kOther + j * 8 + e % 2];
        add_rows<1, NT, DT / 8, DT>(dk, p, tile_q);
    }
    cp_async_wait<0>();  // the last group is empty, but the block must not end before its copies
    const float scaled[1][2] = {{a.scale, a.scale}}, plain[1][2] = {{1.f, 1.f}};
    const int64_t to = start + own;
    store_rows<1, DT / 8>(a.dk + to * a.lddk + int64_t(kv_head) * d, a.lddk, keys - own, d, dk, scaled);
    store_rows<1, DT / 8>(a.dv + to * a.lddv + int64_t(kv_head) * d, a.lddv, keys - own, d, dv, plain);
}

// ---- tensor cores, head dimensions above 128 -------------------------------------------------------------
// The results of 64 rows at a width of 512 fill half of the registers, and what they are computed from fills all of the
// shared memory: passes like those above would compute the scores three times and wait for every tile. Here p and ds
// are formed once and stored: 4 bytes written and 2 to 16 read for each pair, against 10 * D FLOP. A unit is a
// sequence and a key/value head; as many units as fit kPairBytes are processed at a time, by three kernels that are
// plain products: p and ds; dq; dk and dv.

constexpr int64_t kPairBytes = 128 << 20, kMaxPairBytes = 1 << 30;
constexpr int kPairRows = 128;  // of a tile of queries or keys
// Two results (scores, and their gradients) of 64 x 32 a warp; and one of 64 x 64.
using PairTile = gemm::Tile<bf16, kPairRows, kPairRows, 32, 64, 32, 3, false, true, true>;
template <bool TA> using GradTile = gemm::Tile<bf16, kPairRows, 128, 32, 64, 64, 4, TA, false, true>;
static_assert(PairTile::kSmem <= kMaxSmem && GradTile<true>::kSmem <= kMaxSmem, "shared memory of a block");

// How the units are processed.
struct Pairs {
    int64_t rows, ld;   // of a matrix of pairs: queries and keys of the longest sequence, whole tiles
    int64_t units;      // at a time
    int64_t all;        // units of the batch

    // Elements of one unit's p, or ds.
    int64_t of_unit(int64_t group) const { return group * rows * ld; }
};

struct PairStep {
    Backward<bf16> f;
    bf16* p;
    bf16* ds;
    int64_t rows, ld;
    int first, tiles_q, tiles_k, tiles_d;  // first unit; tiles of queries, keys and columns
};

// The unit, its sequence and its rows of pairs, for head `at` of the group.
struct PairUnit {
    int seq, kv_head, head;
    int64_t pairs;  // offset in p and ds
    __device__ __forceinline__ PairUnit(const PairStep& a, int unit, int at)
        : seq((a.first + unit) / a.f.b.kv_heads), kv_head((a.first + unit) % a.f.b.kv_heads), head(kv_head * a.f.b.group + at),
          pairs((int64_t(unit) * a.f.b.group + at) * a.rows * a.ld) {}
};

__global__ void __launch_bounds__(PairTile::kThreads, 1) mma_pairs_kernel(const __grid_constant__ PairStep a) {
    using Tile = PairTile;
    ETT_DYNAMIC_SMEM(smem);
    const Backward<bf16>& f = a.f;
    const PairUnit unit(a, int(blockIdx.y) / f.b.group, int(blockIdx.y) % f.b.group);
    const int q0 = int(blockIdx.x) / a.tiles_k * kPairRows, k0 = int(blockIdx.x) % a.tiles_k * kPairRows, d = f.b.d;
    const Seq seq(f.b, unit.seq, blockIdx.x == 0 && unit.head == 0 && threadIdx.x == 0);
    const int queries = min(kPairRows, seq.q.count - q0);
    if (queries <= 0 || k0 >= seq.seen(q0 + queries - 1)) return;

    const int64_t row = seq.q.start + q0, key = seq.k.start + k0, keys = min(kPairRows, seq.k.count - k0);
    auto matrix = [&](const bf16* p, int64_t ld, int64_t row, int head, int64_t rows) {
        return gemm::Matrix<bf16>{p + row * ld + int64_t(head) * d, rows, d, ld, true};
    };
    gemm::Acc<Tile> s, dp;
    s.clear();
    dp.clear();
    gemm::tile_product(s, matrix(f.q, f.ldq, row, unit.head, queries), matrix(f.k, f.ldk, key, unit.kv_head, keys), 0, 0, smem);
    gemm::tile_product(dp, matrix(f.dy, f.lddy, row, unit.head, queries), matrix(f.v, f.ldv, key, unit.kv_head, keys), 0, 0, smem);

    const float scale = f.scale * kLog2E;
#pragma unroll
    for (int i = 0; i < Tile::kAccRows; ++i) {
        const int q = Tile::row(i);
        const int64_t at = unit.head * f.b.n_q + row + q;
        // Rows and columns past the last ones become 0: the products read whole pieces.
        const float lse = q < queries ? f.lse[at] : INFINITY, delta = q < queries ? f.delta[at] : 0.f;
        const int seen = q < queries ? seq.seen(q0 + q) - k0 : 0;
        const int64_t to = unit.pairs + (q0 + q) * a.ld + k0;
#pragma unroll
        for (int j = 0; j < Tile::kAccCols; j += 2) {
            const int col = Tile::col(j);
            float p[2], ds[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const bool sees = col + e < seen;
                p[e] = sees ? exp2_approx(fmaf(s.at(i, j + e), scale, -lse)) : 0.f;
                ds[e] = sees ? p[e] * (dp.at(i, j + e) - delta) : 0.f;
            }
            store<2>(a.p + to + col, p);
            store<2>(a.ds + to + col, ds);
        }
    }
}

// Stores `rows` rows and `cols` columns of a tile, times `factor`.
template <class Tile> __device__ __forceinline__ void store_product(bf16* to, int64_t ld, int rows, int cols, gemm::Acc<Tile>& acc, float factor) {
#pragma unroll
    for (int i = 0; i < Tile::kAccRows; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kAccCols; j += 2)
            if (Tile::row(i) < rows && Tile::col(j) < cols) {
                const float two[2] = {acc.at(i, j) * factor, acc.at(i, j + 1) * factor};
                store<2>(to + Tile::row(i) * ld + Tile::col(j), two);
            }
}

// Columns of whole 16-byte pieces.
__device__ __forceinline__ int whole_pieces(int n) { return (n + 7) / 8 * 8; }

__global__ void __launch_bounds__(GradTile<false>::kThreads, 2) mma_pairs_dq_kernel(const __grid_constant__ PairStep a) {
    using Tile = GradTile<false>;
    ETT_DYNAMIC_SMEM(smem);
    const Backward<bf16>& f = a.f;
    const PairUnit unit(a, int(blockIdx.y) / f.b.group, int(blockIdx.y) % f.b.group);
    const int tile = int(blockIdx.x) / a.tiles_d, col0 = int(blockIdx.x) % a.tiles_d * Tile::kCols, d = f.b.d;
    const int q0 = (f.b.causal ? a.tiles_q - 1 - tile : tile) * kPairRows;  // the tiles with the most keys come first
    const Seq seq(f.b, unit.seq, false);
    const int queries = min(kPairRows, seq.q.count - q0);
    if (queries <= 0) return;
    const int keys = seq.seen(q0 + queries - 1);
    gemm::Acc<Tile> dq;
    dq.clear();
    const gemm::Matrix<bf16> ds{a.ds + unit.pairs + q0 * a.ld, queries, whole_pieces(keys), a.ld, true};
    const gemm::Matrix<bf16> k{f.k + seq.k.start * f.ldk + int64_t(unit.kv_head) * d, keys, d, f.ldk, true};
    gemm::tile_product(dq, ds, k, 0, col0, smem);
    store_product<Tile>(f.dq + (seq.q.start + q0) * f.lddq + int64_t(unit.head) * d + col0, f.lddq, queries, d - col0, dq, f.scale);
}

// dk in blocks with z = 0, dv in those with z = 1.
__global__ void __launch_bounds__(GradTile<true>::kThreads, 2) mma_pairs_dkv_kernel(const __grid_constant__ PairStep a) {
    using Tile = GradTile<true>;
    ETT_DYNAMIC_SMEM(smem);
    const Backward<bf16>& f = a.f;
    const bool of_v = blockIdx.z == 1;
    const int k0 = int(blockIdx.x) / a.tiles_d * kPairRows, col0 = int(blockIdx.x) % a.tiles_d * Tile::kCols, d = f.b.d;
    const PairUnit unit(a, blockIdx.y, 0);
    const Seq seq(f.b, unit.seq, false);
    const int keys = min(kPairRows, seq.k.count - k0);
    if (keys <= 0) return;
    // From the first tile of queries of which one sees a key of this tile: the others are not stored.
    const int begin = min(seq.first_query(k0), seq.q.count) / kPairRows * kPairRows, queries = seq.q.count - begin;
    const bf16* const pairs = (of_v ? a.p : a.ds) + unit.pairs + begin * a.ld + k0;
    const int64_t ld = of_v ? f.lddy : f.ldq;
    const bf16* const x = (of_v ? f.dy : f.q) + (seq.q.start + begin) * ld + int64_t(unit.head) * d;
    gemm::Acc<Tile> out;
    out.clear();
    if (queries > 0)
        for (int h = 0; h < f.b.group; ++h) {
            const gemm::Matrix<bf16> w{pairs + h * a.rows * a.ld, queries, whole_pieces(keys), a.ld, true};
            gemm::tile_product(out, w, gemm::Matrix<bf16>{x + int64_t(h) * d, queries, d, ld, true}, 0, col0, smem);
        }
    const int64_t to = seq.k.start + k0, ldout = of_v ? f.lddv : f.lddk;
    store_product<Tile>((of_v ? f.dv : f.dk) + to * ldout + int64_t(unit.kv_head) * d + col0, ldout, keys, d - col0, out, of_v ? 1.f : f.scale);
}

// ---- plain multiply-adds ---------------------------------------------------------------------------------

// One side of the products: queries (x = q, g = dy) or keys (x = k, g = v).
template <class T> struct Side {
    const T* x;
    const T* g;
    int64_t ldx, ldg;
};

// A step computes gradients of its own side by sums over the other side. Blocks with z = 0 compute the gradient of
// own.x, those with z = 1 that of own.g (dv). Both at once would not fit the registers at D = 512, so dk and dv each
// compute the scores.
template <class T> struct Plain {
    Batch b;
    Side<T> own, other;
    T* out[2];
    int64_t ldout[2];
    const float* lse;
    const float* delta;
    float scale;
    int tiles;     // of own rows in the longest sequence
    bool of_q;     // the own side is the queries
    bool vectors;  // four elements at a time
};

template <class T, int DT, int I> __global__ void __launch_bounds__(kPlainThreads, 2) simple_kernel(const __grid_constant__ Plain<T> a) {
    ETT_DYNAMIC_SMEM(smem);
    const bool of_g = blockIdx.z == 1;
    const int tile = int(blockIdx.x) / a.b.seqs, d = a.b.d, x = threadIdx.x % 16, y = threadIdx.x / 16;
    const int first = (a.of_q && a.b.causal ? a.tiles - 1 - tile : tile) * I * 16;
    const Seq seq(a.b, int(blockIdx.x) % a.b.seqs, first == 0 && blockIdx.y == 0 && blockIdx.z == 0 && threadIdx.x == 0);
    const Span own = a.of_q ? seq.q : seq.k, other = a.of_q ? seq.k : seq.q;
    if (first >= own.count) return;

    float* const smem_lse = reinterpret_cast<float*>(smem);  // of the tile's queries
    float* const smem_delta = smem_lse + kPlainCols;
    float* const weights = smem_delta + kPlainCols;
    float* const slices = weights + I * 16 * kWeightStride;
    const int count = min(I * 16, own.count - first);
    // The rows of the other side: the keys that the tile's last query sees, or the queries from the first one that sees
    // the tile's first key.
    const int begin = a.of_q ? 0 : seq.first_query(first), end = a.of_q ? seq.seen(first + count - 1) : other.count;
    const int heads = a.of_q ? 1 : a.b.group;
    const int64_t own_col = int64_t(blockIdx.y) * d;
    float out[I][DT / 64][4] = {};
    for (int h = 0; h < heads; ++h) {
        const int head = a.of_q ? int(blockIdx.y) : int(blockIdx.y) * heads + h;
        const int64_t other_col = int64_t(a.of_q ? head / a.b.group : head) * d;
        for (int at = begin; at < end; at += kPlainCols) {
            auto own_rows = [&](const T* p, int64_t ld) { return Rows<T>{p + (own.start + first) * ld + own_col, ld, count}; };
            auto other_rows = [&](const T* p, int64_t ld) { return Rows<T>{p + (other.start + at) * ld + other_col, ld, other.count - at}; };
            const int query_0 = a.of_q ? first : at, key_0 = a.of_q ? at : first;
            if (threadIdx.x < kPlainCols) {
                // An infinite lse gives queries past the last one probability 0. The barriers of plain_dot make this
                // visible.
                const int query = query_0 + threadIdx.x;
                const int64_t row = int64_t(head) * a.b.n_q + seq.q.start + query;
                smem_lse[threadIdx.x] = query < seq.q.count ? a.lse[row] : INFINITY;
                smem_delta[threadIdx.x] = query < seq.q.count ? a.delta[row] : 0.f;
            }
            float s[I][4];
            plain_dot<I>(s, own_rows(a.own.x, a.own.ldx), other_rows(a.other.x, a.other.ldx), d, slices, a.vectors);
#pragma unroll
            for (int i = 0; i < I; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int query = a.of_q ? y + 16 * i : x + 16 * j, key = a.of_q ? x + 16 * j : y + 16 * i;
                    const float p = exponential<T>(fmaf(s[i][j], a.scale, -smem_lse[query]));
                    plain_weight(weights, i, j) = key_0 + key < seq.seen(query_0 + query) ? p : 0.f;
                }
            if (!of_g) {
                plain_dot<I>(s, own_rows(a.own.g, a.own.ldg), other_rows(a.other.g, a.other.ldg), d, slices, a.vectors);
#pragma unroll
                for (int i = 0; i < I; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j) plain_weight(weights, i, j) *= s[i][j] - smem_delta[a.of_q ? y + 16 * i : x + 16 * j];
            }
            const Rows<T> sum = of_g ? other_rows(a.other.g, a.other.ldg) : other_rows(a.other.x, a.other.ldx);
            plain_sum<I, DT>(out, sum, d, weights, a.vectors);
        }
    }
    T* const to = a.out[blockIdx.z] + (own.start + first) * a.ldout[blockIdx.z] + own_col;
#pragma unroll
    for (int i = 0; i < I; ++i)
        if (y + 16 * i < count) plain_store<DT>(to + (y + 16 * i) * a.ldout[blockIdx.z], d, out[i], of_g ? 1.f : a.scale);
}

// ---- launcher --------------------------------------------------------------------------------------------

bool sound(Check& check, const ett_attention_bwd_args* s) {
    if (!check.ok() || !check_shapes(check, *s)) return false;
    const ett_attention_bwd_args& a = *s;
    check.matrix("dy", a.dy, a.q.dtype, rows(a.q), cols(a.q));
    check.matrix("dq", a.dq, a.q.dtype, rows(a.q), cols(a.q));
    check.matrix("dk", a.dk, a.q.dtype, rows(a.k), cols(a.k));
    check.matrix("dv", a.dv, a.q.dtype, rows(a.k), cols(a.k));
    const int64_t longest = std::max(tiles_of(a.max_q, rows(a.q), 32), tiles_of(a.max_k, rows(a.k), 32));
    if (numel(a.cu_q) > INT32_MAX / longest) check.fail(ETT_UNSUPPORTED, "cu_q", "too long for max_q and max_k", "fewer than 2^31 tiles");
    return check.ok();
}

// How head dimensions above 128 are processed, by shape alone.
Pairs pairs_of(const ett_attention_bwd_args& a) {
    const int64_t group = a.heads / a.kv_heads;
    Pairs p{tiles_of(a.max_q, rows(a.q), kPairRows) * kPairRows, tiles_of(a.max_k, rows(a.k), kPairRows) * kPairRows, 0,
            (numel(a.cu_q) - 1) * a.kv_heads};
    const int64_t fit = kPairBytes / std::max<int64_t>(4 * p.of_unit(group), 1);
    p.units = std::min({std::max<int64_t>(fit, 1), p.all, 65535 / std::max<int64_t>(group, 1)});
    return p;
}

// "mma" requires rows of whole 16-byte pieces, D a multiple of 8, and, for D > 128, that the pairs of one unit fit
// kMaxPairBytes (16384 queries and keys of one head).
bool can_use_mma(const ett_attention_bwd_args& a) {
    const bool pieces = wide(a.dy) && wide(a.q) && wide(a.k) && wide(a.v) && wide(a.dq) && wide(a.dk) && wide(a.dv);
    if (a.q.dtype != ETT_BF16 || a.head_dim % 8 != 0 || !pieces) return false;
    return a.head_dim <= 128 || (a.heads > 0 && 4 * pairs_of(a).of_unit(a.heads / a.kv_heads) <= kMaxPairBytes);
}

// The parts of the workspace.
struct Parts {
    float* lse;
    float* delta;
    bf16* p;   // for head dimensions above 128
    bf16* ds;
    int64_t bytes;
};
Parts parts_of(const ett_attention_bwd_args& a, void* workspace) {
    Pieces pieces(workspace);
    Parts parts{pieces.take<float>(numel(a.lse)), pieces.take<float>(numel(a.lse)), nullptr, nullptr, 0};
    if (a.head_dim > 128 && can_use_mma(a)) {
        const Pairs pairs = pairs_of(a);
        const int64_t n = pairs.units * pairs.of_unit(a.heads / a.kv_heads);
        parts.p = pieces.take<bf16>(n);
        parts.ds = pieces.take<bf16>(n);
    }
    parts.bytes = pieces.bytes();
    return parts;
}

constexpr char kOp[] = "attention_bwd";

template <class T> Backward<T> arguments(const ett_attention_bwd_args& a, const ett_launch* l) {
    const int64_t piece = 4 * sizeof(T), d = a.head_dim;
    const Parts parts = parts_of(a, l->workspace);
    return Backward<T>{batch_of(a, l),
                       data<const T>(a.dy),
                       data<const T>(a.q),
                       data<const T>(a.k),
                       data<const T>(a.v),
                       data<T>(a.dq),
                       data<T>(a.dk),
                       data<T>(a.dv),
                       parts.lse,
                       parts.delta,
                       stride(a.dy),
                       stride(a.q),
                       stride(a.k),
                       stride(a.v),
                       stride(a.dq),
                       stride(a.dk),
                       stride(a.dv),
                       float(a.scale),
                       0,
                       head_wide(a.dy, d, piece) && head_wide(a.q, d, piece) && head_wide(a.k, d, piece) && head_wide(a.v, d, piece)};
}

template <class T> int32_t enqueue_rows(const ett_attention_bwd_args& a, const ett_launch* l, const Backward<T>& f, float factor) {
    const int64_t piece = 4 * sizeof(T);
    const bool vectors = head_wide(a.y, a.head_dim, piece) && head_wide(a.dy, a.head_dim, piece);
    const int64_t blocks = std::min<int64_t>(ceil_div(std::max(numel(a.lse), rows(a.k)), kRowWarps), int64_t(multiprocessors()) * 8);
    return launch(kOp, rows_kernel<T>, dim3(unsigned(blocks)), dim3(kRowThreads), 0, l, f, data<const T>(a.y), stride(a.y),
                  data<const float>(a.lse), stride(a.lse), factor, vectors);
}

// Enqueues the step that owns the queries, or the one that owns the keys.
template <class K, class F>
int32_t enqueue(const ett_launch* l, K* kernel, F f, bool queries, int rows_of_tile, unsigned depth, int threads, size_t smem) {
    const int64_t n = queries ? f.b.n_q : f.b.n_k, heads = queries ? f.b.heads : f.b.kv_heads;
    if (n == 0 || heads == 0 || f.b.seqs == 0) return ETT_OK;
    f.tiles = int(tiles_of(queries ? f.b.max_q : f.b.max_k, n, rows_of_tile));
    return launch(kOp, kernel, dim3(unsigned(f.tiles) * unsigned(f.b.seqs), unsigned(heads), depth), dim3(unsigned(threads)), smem, l, f);
}

template <int DT> int32_t enqueue_mma(const ett_launch* l, const Backward<bf16>& f) {
    const int32_t first = enqueue(l, mma_dq_kernel<DT>, f, true, kQueries, 1, kMmaThreads, dq_bytes<DT>());
    return first != ETT_OK ? first : enqueue(l, mma_dkv_kernel<DT>, f, false, kKeys, 1, kMmaThreads, dkv_bytes<DT>());
}

int32_t enqueue_pairs(const ett_attention_bwd_args& a, const ett_launch* l, const Backward<bf16>& f) {
    const Pairs pairs = pairs_of(a);
    const Parts parts = parts_of(a, l->workspace);
    const unsigned group = unsigned(f.b.group), d = unsigned(ceil_div(a.head_dim, GradTile<false>::kCols));
    PairStep s{f, parts.p, parts.ds, pairs.rows, pairs.ld, 0, int(pairs.rows / kPairRows), int(pairs.ld / kPairRows), int(d)};
    const unsigned q = unsigned(s.tiles_q), k = unsigned(s.tiles_k);
    for (int64_t first = 0; first < pairs.all; first += pairs.units) {
        s.first = int(first);
        const unsigned units = unsigned(std::min(pairs.units, pairs.all - first));
        int32_t status = launch(kOp, mma_pairs_kernel, dim3(q * k, units * group), dim3(PairTile::kThreads), PairTile::kSmem, l, s);
        if (status == ETT_OK)
            status = launch(kOp, mma_pairs_dq_kernel, dim3(q * d, units * group), dim3(GradTile<false>::kThreads), GradTile<false>::kSmem, l, s);
        if (status == ETT_OK)
            status = launch(kOp, mma_pairs_dkv_kernel, dim3(k * d, units, 2), dim3(GradTile<true>::kThreads), GradTile<true>::kSmem, l, s);
        if (status != ETT_OK) return status;
    }
    return ETT_OK;
}

template <class T> Plain<T> plain_arguments(const Backward<T>& f, bool queries) {
    const Side<T> of_q{f.q, f.dy, f.ldq, f.lddy}, of_k{f.k, f.v, f.ldk, f.ldv};
    return Plain<T>{f.b,     queries ? of_q : of_k,      queries ? of_k : of_q,          {queries ? f.dq : f.dk, f.dv},
                    {queries ? f.lddq : f.lddk, f.lddv}, f.lse, f.delta, f.scale, 0, queries, f.vectors};
}

}  // namespace
}  // namespace attention
}  // namespace ett

extern "C" int64_t ett_attention_bwd_workspace(const ett_attention_bwd_args* a) {
    using namespace ett;
    using namespace ett::attention;
    Check check(kOp, a);
    return sound(check, a) ? parts_of(*a, nullptr).bytes : -1;
}

extern "C" int32_t ett_attention_bwd(const ett_attention_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    using namespace ett::attention;
    Check check(kOp, a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->q) == 0 && numel(a->k) == 0) return ett_done("");
    const char* kernel = check.choose(l, {{"mma", can_use_mma(*a)}, {"simple", true}});
    check.workspace(l, parts_of(*a, l->workspace).bytes);
    if (!check.ok()) return check.status();
    int32_t status;
    if (strcmp(kernel, "mma") == 0) {
        const Backward<bf16> f = arguments<bf16>(*a, l);
        status = enqueue_rows(*a, l, f, kLog2E);
        if (status == ETT_OK)
            status = a->head_dim <= 64 ? enqueue_mma<64>(l, f) : a->head_dim <= 128 ? enqueue_mma<128>(l, f) : enqueue_pairs(*a, l, f);
    } else {
        status = with_act(a->q.dtype, [&](auto t) {
            using T = decltype(t);
            const Backward<T> f = arguments<T>(*a, l);
            const int32_t rows = enqueue_rows(*a, l, f, 1.f);
            if (rows != ETT_OK) return rows;
            return with_plain_tile(int(a->head_dim), [&](auto dt, auto i) {
                constexpr int DT = decltype(dt)::value, I = decltype(i)::value;
                constexpr size_t kBytes = (2 * kPlainCols + plain_floats<I, DT>()) * sizeof(float);
                const int32_t first = enqueue(l, simple_kernel<T, DT, I>, plain_arguments(f, true), true, I * 16, 1, kPlainThreads, kBytes);
                if (first != ETT_OK) return first;
                return enqueue(l, simple_kernel<T, DT, I>, plain_arguments(f, false), false, I * 16, 2, kPlainThreads, kBytes);
            });
        });
    }
    return status == ETT_OK ? ett_done(kernel) : status;
}
