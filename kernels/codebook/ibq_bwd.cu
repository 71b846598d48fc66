// ibq_bwd.cu: gradients of the IBQ quantizer; the scores are recomputed, one chunk of tokens and codes at a time.
//
//   full_m = g_m + 2 w (e_t - z_m),  w = g_quant inv_count / D,  t = idx_m
//   ds_mk = p_mk (full_m . (e_k - e_t) - delta_m) + q_mk (u_s (x_mk - xbar_m) + u_a (c_k - c_t - r_m)),  over all k, where
//     p_mk = exp(s_mk - smax_m) / (1 + rest_p_m), 0 if rest_p / (1 + rest_p) < 1e-12;  x_mk = (s_mk - smax_m) / temperature
//     q_mk = exp(x_mk) / (1 + rest_q_m);  u_s = -g_sample inv_count / temperature,  u_a = g_avg inv_count / temperature
//     delta_m = sum_{k != t} p_mk full_m . (e_k - e_t),  r_m = sum_{k != t} q_mk (c_k - c_t)
//     and for k = t the terms full . (e_k - e_t), x and c_k - c_t are exactly 0
//   dz = ds e + 2 w (1 + beta_commit) (z - e_t),  de += ds^T z,  de_t += full_m + 2 w beta_code (e_t - z_m)
//
// z          M,D  act  rows of any stride   in
// e          K,D  act  rows of any stride   in
// idx        M    i32  contiguous           in    outside [0, K): a fault; then dz is 0 and the token adds nothing to
// de smax       M    f32  contiguous           in    of ibq_rows
// rest_p     M    f32  contiguous           in    of ibq_rows
// rest_q     M    f32  contiguous           in    of ibq_rows;   rest_q, xbar, c, g_sample and g_avg: all or none
// xbar       M    f32  contiguous           in    of ibq_rows
// c          K    f32  contiguous           in    of ibq_losses
// inv_count  1    f32                       in    one over the tokens of all ranks
// g          M,D  act  rows of any stride   in    gradient of zq
// g_quant    1    f32                       in    gradients of the losses
// g_sample   1    f32                       in
// g_avg      1    f32                       in
// dz         M,D  act  rows of any stride   out
// de         K,D  f32  rows of any stride   added to; may be absent
//
// Steps, for each chunk of tokens: compute the constants of each token; sweep over the codes for delta and r, and mark
// the tiles with any non-zero weight; "chunks": for each chunk of codes, store ds and multiply it by e and z; "hopper"
// (bf16): one sweep each for dz and de, with ds in registers (hopper_ibq_bwd.cuh); "hopper_split" (f32): as "chunks", with
// products of halves (hopper_ibq_split.cuh); finally round dz, and add full to the rows of the codes. Every sum has a
// single owner and a fixed order.
// numerics: scores as in scores.cuh, or ("hopper_split") hopper_split.cuh, with the same bits as smax; p, q, ds and all sums
// in f32; the best code stays out of every cancelling sum (docs/quantizer.md). For its two products ds is split into
// bf16 parts: "chunks" two for bf16 (error 2^-18), three for f32 (exact); "hopper" rounds it to one, "hopper_split" has
// two, both except for the best code. With bf16, full is rounded before it is multiplied by e, like any activation; one
// rounding of dz. Exponentials have an error of 2^-22. A weight below 2^-24 * rest_p / K (or 2^-24 * rest_q / K) counts as
// 0 if its whole tile, or its eight rows of the tile, have no larger one. Bitwise repeatable.
// workspace: at most 54 MiB for D up to 512 and K up to 2^22; beyond that a byte for every 128 tokens and 64 codes.
// "hopper": at most 44 MiB, 4 bytes a code, and a byte for every 64 of at most 16,384 tokens and 64 codes. "hopper_split":
// at most 61 MiB, and a byte for every 128 of at most 2048 tokens and 128 codes.
// limits: D up to 512; "hopper" requires bf16, D up to 256 and rows at multiples of 16 bytes, "hopper_split" f32 and D up
// to 256.
// work: 8*M*K*D FLOP (bf16 executes 16*M*K*D, "hopper" the same; f32 72*M*K*D, "hopper_split" 36*M*K*D); two exponentials
//       per score and sweep;
//       (4*M*D + K*D)*size + 8*K*D bytes.
// papers: IBQ (2412.02692).
#include "codes.cuh"
#include "hopper_scores.cuh"
#include "operands.cuh"

namespace ett {
namespace codebook {
namespace {

constexpr char kOp[] = "ibq_bwd";

// 64 x 32 scores and 64 x 32 elements of g e^T per warp: 128 accumulators a thread; two blocks of four warps per
// multiprocessor.
template <int PARTS> using ScoreSweep = Sweep<128, 64, 64, 32, 3, PARTS, true, false>;
constexpr int kScoreBlocks = 2;
constexpr int64_t kTileTokens = 128, kTileCodes = 64;
// The products of ds. Both use tiles of ds of the same size, so that tiles without weight can be skipped. 64
// accumulators a thread, three blocks per multiprocessor.
using ForZ = gemm::Tile<bf16, kTileTokens, 64, 32, 64, 32, 4, false, false, true>;
using ForE = gemm::Tile<bf16, kTileCodes, 128, 32, 32, 64, 4, true, false, true>;
constexpr int kProductBlocks = 3;
constexpr int64_t kMostTokens = 4096, kMostCodes = 16384;  // per chunk
constexpr int kMostTiles = int(kMostCodes / kTileCodes);
static_assert(kMostTokens / kTileTokens <= kMostTiles, "lists of tiles");

constexpr int kThreads = 256;  // of the small kernels
constexpr float kNoRest = 1e-12f;  // below this rest_p / (1 + rest_p) the soft term is defined as 0

// The constants of a token. Exponents of q have base 2.
struct alignas(16) Row {
    float max, inv_p;     // inv_p = 1 / (1 + rest_p), or 0
    float least_p;        // p may count as 0 unless score - max is above this; least_q: the same for q
    float dp_best;        // full . e_t
    float delta, least_q, c_best, r;
    float sample, avg;    // u_s and u_a / (1 + rest_q)
    float xbar;
    int32_t best;         // -1: no code
};

// ---- tokens ----------------------------------------------------------------------------------------------

template <class T> struct Tokens {
    Codes<T> c;           // all tokens
    Matrix<const T> g;
    const float* smax;
    const float* rest_p;
    const float* rest_q;  // rest_q to g_avg: null without entropies
    const float* xbar;
    const float* weight;  // c
    const float* g_sample;
    const float* g_avg;
    const float* g_quant;
    const float* inv_count;
    float inv_t, to_q;    // 1 / temperature, log2(e) / temperature
    int64_t first;        // first token of the chunk
    int count, padded;    // tokens of the chunk, without and with those that fill up its last tile
    bf16* full;           // count, parts, part
    int64_t part;
    Row* rows;            // padded
};

// The constants of a token that do not depend on its full gradient.
template <class T> __device__ __forceinline__ Row known(const Tokens<T>& a, int64_t m) {
    const float log_k = log2f(float(a.c.codes)), rest = a.rest_p[m];
    Row r = {};
    r.max = a.smax[m];
    r.best = a.c.idx[m];
    const bool soft = rest / (1.f + rest) >= kNoRest;
    r.inv_p = soft ? 1.f / (1.f + rest) : 0.f;
    r.least_p = soft ? fmaxf(kZero, log2f(rest) - 24.f - log_k) * kLn2 : INFINITY;
    r.least_q = INFINITY;
    if (a.rest_q) {
        const float rest_q = a.rest_q[m], scale = *a.inv_count * a.inv_t / (1.f + rest_q);
        r.c_best = a.weight[r.best];
        r.sample = -*a.g_sample * scale * kLn2;
        r.avg = *a.g_avg * scale;
        r.xbar = a.xbar[m] * kLog2e;
        if (rest_q > 0.f && (r.sample != 0.f || r.avg != 0.f)) r.least_q = fmaxf(kZero, log2f(rest_q) - 24.f - log_k) / a.to_q;
    }
    return r;
}

// Writes eight elements of full, as PARTS parts of bf16, or as f32 if PARTS is 0.
template <int PARTS> __device__ __forceinline__ void put_full(bf16* full, int64_t n, int64_t part, int64_t at, const float (&v)[8]) {
    if constexpr (PARTS == 0) {
        float* const to = reinterpret_cast<float*>(full) + n * part + at;
#pragma unroll
        for (int i = 0; i < 8; ++i) to[i] = v[i];
    } else {
        pack_piece<PARTS>(full + n * PARTS * part, part, at, v);
    }
}

// One warp per token: computes its row, and full as an operand of the sweeps.
template <class T, int PARTS> __global__ void __launch_bounds__(kCodeThreads) tokens_kernel(const __grid_constant__ Tokens<T> a) {
    const int lane = int(threadIdx.x) % kWarp, n = int(blockIdx.x) * kCodeWarps + int(threadIdx.x) / kWarp;
    if (n >= a.padded) return;
    const int64_t m = a.first + n;
    if (n >= a.count || !a.c.has_code(m)) {
        if (lane == 0) {
            if (n < a.count) a.c.report(m);
            Row none = {};
            none.least_p = none.least_q = INFINITY;
            none.best = -1;
            a.rows[n] = none;
        }
        if (n < a.count) {
            const float nothing[8] = {};
            for (int64_t at = lane * 8; at < a.part; at += kWarp * 8) put_full<PARTS>(a.full, n, a.part, at, nothing);
        }
        return;
    }
    const T* const code = a.c.e.row(a.c.idx[m]);
    const float two = 2.f * *a.g_quant * *a.inv_count / float(a.c.dim);
    float dot = 0.f;
    for (int64_t at = lane * 8; at < a.part; at += kWarp * 8) {
        float full[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            full[i] = 0.f;
            if (at + i >= a.c.dim) continue;
            const float e = to_float(code[at + i]);
            full[i] = to_float(a.g.row(m)[at + i]) + two * (e - to_float(a.c.z.row(m)[at + i]));
            if constexpr (PARTS == 1) full[i] = rounded<bf16>(full[i]);
            dot = fmaf(full[i], e, dot);
        }
        put_full<PARTS>(a.full, n, a.part, at, full);
    }
    dot = warp_sum(dot);
    if (lane == 0) {
        Row r = known(a, m);
        r.dp_best = dot;
        a.rows[n] = r;
    }
}

// ---- sweeps ----------------------------------------------------------------------------------------------

struct Scores {
    Operand z, g, e;     // the rows of the chunks
    Row* rows;
    const float* c;      // of the chunk of codes
    uint8_t* live;       // token tiles, ld_live: whether a tile of the chunk of codes has any weight
    int64_t ld_live;
    float* delta;        // parts, row_tiles * kTileTokens: without the factor inv_p
    float* r;            // the same, without the factor 1 / (1 + rest_q)
    bf16* ds;            // parts of ds, row_tiles * kTileTokens, ld_ds
    int64_t ld_ds, part_ds;
    int32_t code0;       // first code of the chunk
    float to_q;
    int row_tiles, parts;
};

// Loads the rows of the block's tokens. They are visible after the next barrier.
__device__ __forceinline__ void load_rows(Row* smem, const Row* from) {
    const float4* const p = reinterpret_cast<const float4*>(from);
    for (int i = int(threadIdx.x); i < kTileTokens * int(sizeof(Row) / 16); i += int(blockDim.x)) reinterpret_cast<float4*>(smem)[i] = p[i];
}

// Sets the scores of the columns past the last code to -infinity.
template <class Tile> __device__ __forceinline__ void mask(gemm::Acc<Tile>& s, int64_t left) {
    if (left >= Tile::kCols) return;
#pragma unroll
    for (int j = 0; j < Tile::kAccCols; ++j) {
        if (Tile::col(j) < left) continue;
#pragma unroll
        for (int i = 0; i < Tile::kAccRows; ++i) s.at(i, j) = -INFINITY;
    }
}

// Computes delta and r.
template <class S, bool ENTROPY> __global__ void __launch_bounds__(S::kThreads, kScoreBlocks) expect_kernel(const __grid_constant__ Scores a) {
    using Tile = typename S::Tile;
    constexpr int kParts = Tile::kCols / Tile::kWarpCols;
    __shared__ Row smem_rows[Tile::kRows];
    ETT_DYNAMIC_SMEM(smem);
    const int part = int(blockIdx.x) / a.row_tiles, row_tile = int(blockIdx.x) - part * a.row_tiles;
    const Consecutive tiles = part_of((a.e.m.rows + Tile::kCols - 1) / Tile::kCols, part, a.parts);
    load_rows(smem_rows, a.rows + row_tile * Tile::kRows);
    float delta[Tile::kAccRows] = {}, r[ENTROPY ? Tile::kAccRows : 1] = {};
    Stream<S, Consecutive> stream(a.z, a.g, a.e, int64_t(row_tile) * Tile::kRows, tiles, smem);
#pragma unroll 1
    for (int n = 0; n < tiles.count(); ++n) {
        gemm::Acc<Tile> s, dp;
        stream.scores(s, dp);
        const int64_t code = int64_t(tiles[n]) * Tile::kCols, left = a.e.m.rows - code;
        mask<Tile>(s, left);
        bool live = false;
#pragma unroll
        for (int i = 0; i < Tile::kAccRows; ++i) {
            const Row& row = smem_rows[Tile::row(i)];
            // Keep the best code out of the sums.
            const int at = row.best - a.code0 - int(code) - Tile::warp_col();
            if (__any_sync(kAllLanes, at >= 0 && at < Tile::kWarpCols)) {
                live = true;
#pragma unroll
                for (int j = 0; j < Tile::kAccCols; ++j)
                    if (at == Tile::col(j) - Tile::warp_col()) s.at(i, j) = -INFINITY;
            }
            const float max = row.max, top = row_max(s, i) - max;
            if (__any_sync(kAllLanes, top > row.least_p)) {
                live = true;
                const float dp_best = row.dp_best;
                float sum = 0.f;
#pragma unroll
                for (int j = 0; j < Tile::kAccCols; ++j)
                    sum = fmaf(exp2_approx(above_floor((s.at(i, j) - max) * kLog2e)), dp.at(i, j) - dp_best, sum);
                delta[i] += sum;
            }
            if constexpr (ENTROPY) {
                if (!__any_sync(kAllLanes, top > row.least_q)) continue;
                live = true;
                const float c_best = row.c_best;
                float sum = 0.f;
#pragma unroll
                for (int j = 0; j < Tile::kAccCols; ++j) {
                    const float c = Tile::col(j) < left ? a.c[code + Tile::col(j)] : c_best;
                    sum = fmaf(exp2_approx(above_floor((s.at(i, j) - max) * a.to_q)), c - c_best, sum);
                }
                r[i] += sum;
            }
        }
        if (live && Tile::lane() == 0) a.live[row_tile * a.ld_live + tiles[n]] = 1;
    }
    stream.end();

    float* const sums = reinterpret_cast<float*>(smem);  // delta, r: kParts, kRows
    __syncthreads();  // the tiles in this memory have been read
#pragma unroll
    for (int i = 0; i < Tile::kAccRows; ++i) {
        const int to = Tile::warp_col() / Tile::kWarpCols * Tile::kRows + Tile::row(i);
#pragma unroll
        for (int d = 1; d <= 2; d *= 2) {
            delta[i] += __shfl_xor_sync(kAllLanes, delta[i], d);
            if constexpr (ENTROPY) r[i] += __shfl_xor_sync(kAllLanes, r[i], d);
        }
        if (Tile::lane() % 4 != 0) continue;
        sums[to] = delta[i];
        if constexpr (ENTROPY) sums[kParts * Tile::kRows + to] = r[i];
    }
    __syncthreads();  // the warps' sums are visible
    for (int row = int(threadIdx.x); row < Tile::kRows; row += Tile::kThreads) {
        const int64_t to = (int64_t(part) * a.row_tiles + row_tile) * Tile::kRows + row;
        float total[2] = {};
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
            total[0] += sums[p * Tile::kRows + row];
            if constexpr (ENTROPY) total[1] += sums[(kParts + p) * Tile::kRows + row];
        }
        a.delta[to] = total[0];
        if constexpr (ENTROPY) a.r[to] = total[1];
    }
}

// Adds the parts of a chunk of codes to the rows; `last`: this is the last chunk of codes. r and rest_q (of the chunk
// of tokens) may be null.
__global__ void __launch_bounds__(kThreads)
join_kernel(Row* rows, const float* delta, const float* r, const float* rest_q, int padded, int count, int parts, bool last) {
    const int n = int(blockIdx.x) * kThreads + int(threadIdx.x);
    if (n >= padded) return;
    float sum[2] = {rows[n].delta, rows[n].r};
    for (int p = 0; p < parts; ++p) {
        sum[0] += delta[int64_t(p) * padded + n];
        if (r) sum[1] += r[int64_t(p) * padded + n];
    }
    const bool entropy = rest_q && n < count;
    rows[n].delta = last ? sum[0] * rows[n].inv_p : sum[0];
    rows[n].r = last && entropy ? sum[1] / (1.f + rest_q[n]) : sum[1];
}

// Lists the tiles of a range that have weight, in order, and returns their number. The first warp does the work; the
// whole block calls this, and the list is visible afterwards. `step`: distance from the mark of one tile to the next.
__device__ __forceinline__ int live_tiles(int (&list)[kMostTiles + 1], const uint8_t* live, int64_t step, const Consecutive& range) {
    if (threadIdx.x < kWarp) {
        const int lane = int(threadIdx.x);
        int n = 0;
        for (int base = range.first; base < range.end; base += kWarp) {
            const int t = base + lane;
            const bool is = t < range.end && live[t * step] != 0;
            const unsigned all = __ballot_sync(kAllLanes, is);
            if (is) list[n + __popc(all & ((1u << lane) - 1))] = t;
            n += __popc(all);
        }
        if (lane == 0) list[kMostTiles] = n;
    }
    __syncthreads();  // the list is visible
    return list[kMostTiles];
}

// Computes ds of the tiles that have weight, in PARTS parts.
template <class S, bool ENTROPY, int PARTS> __global__ void __launch_bounds__(S::kThreads, kScoreBlocks) weights_kernel(const __grid_constant__ Scores a) {
    using Tile = typename S::Tile;
    __shared__ Row smem_rows[Tile::kRows];
    __shared__ int smem_tiles[kMostTiles + 1];
    ETT_DYNAMIC_SMEM(smem);
    const int part = int(blockIdx.x) / a.row_tiles, row_tile = int(blockIdx.x) - part * a.row_tiles;
    load_rows(smem_rows, a.rows + row_tile * Tile::kRows);
    const Consecutive range = part_of((a.e.m.rows + Tile::kCols - 1) / Tile::kCols, part, a.parts);
    const Listed tiles = {smem_tiles, live_tiles(smem_tiles, a.live + row_tile * a.ld_live, 1, range)};
    const int64_t row0 = int64_t(row_tile) * Tile::kRows;
    Stream<S, Listed> stream(a.z, a.g, a.e, row0, tiles, smem);
#pragma unroll 1
    for (int n = 0; n < tiles.count(); ++n) {
        gemm::Acc<Tile> s, dp;
        stream.scores(s, dp);
        const int64_t code = int64_t(tiles[n]) * Tile::kCols, left = a.e.m.rows - code;
        mask<Tile>(s, left);
        bf16* const to = a.ds + row0 * a.ld_ds + code + Tile::warp_col();
#pragma unroll
        for (int i = 0; i < Tile::kAccRows; ++i) {
            const Row& row = smem_rows[Tile::row(i)];
            const float max = row.max, top = row_max(s, i) - max;
            const bool some_p = __any_sync(kAllLanes, top > row.least_p), some_q = ENTROPY && __any_sync(kAllLanes, top > row.least_q);
            float ds[Tile::kAccCols] = {};
            if (some_p) {
                const float inv_p = row.inv_p, dp_best = row.dp_best, delta = row.delta;
#pragma unroll
                for (int j = 0; j < Tile::kAccCols; ++j)
                    ds[j] = exp2_approx(above_floor((s.at(i, j) - max) * kLog2e)) * inv_p * (dp.at(i, j) - dp_best - delta);
            }
            if (some_q) {
                const float sample = row.sample, avg = row.avg, xbar = row.xbar, c_best = row.c_best, r = row.r;
#pragma unroll
                for (int j = 0; j < Tile::kAccCols; ++j) {
                    const float c = Tile::col(j) < left ? a.c[code + Tile::col(j)] : c_best, x = above_floor((s.at(i, j) - max) * a.to_q);
                    ds[j] = fmaf(exp2_approx(x), sample * (x - xbar) + avg * (c - c_best - r), ds[j]);
                }
            }
            const int at = row.best - a.code0 - int(code) - Tile::warp_col();
            if (__any_sync(kAllLanes, at >= 0 && at < Tile::kWarpCols)) {
                const float own = -row.inv_p * row.delta - (row.sample * row.xbar + row.avg * row.r);
#pragma unroll
                for (int j = 0; j < Tile::kAccCols; ++j)
                    if (at == Tile::col(j) - Tile::warp_col()) ds[j] = own;
            }
            // Two lanes exchange pairs, so that each stores four neighbouring elements.
            const bool odd = Tile::lane() % 2 != 0;
            bf16* const place = to + Tile::row(i) * a.ld_ds + Tile::lane() % 4 / 2 * 4 + (odd ? 8 : 0);
#pragma unroll
            for (int j = 0; j < Tile::kAccCols; j += 4) {
                float cuts[4][PARTS];
#pragma unroll
                for (int e = 0; e < 4; ++e) cut<PARTS>(ds[j + e], cuts[e]);
#pragma unroll
                for (int p = 0; p < PARTS; ++p) {
                    const uint32_t low = pack_bf16x2(cuts[0][p], cuts[1][p]), high = pack_bf16x2(cuts[2][p], cuts[3][p]);
                    const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? low : high, 1);
                    const uint32_t four[2] = {odd ? other : low, odd ? high : other};
                    store_global_bytes(place + p * a.part_ds + j / 4 * 16, four);
                }
            }
        }
    }
    stream.end();
}

// ---- products --------------------------------------------------------------------------------------------

struct Products {
    Operand ds, z, e;     // the rows of the chunks
    const uint8_t* live;  // token tiles, ld_live; of the chunk of codes
    int64_t ld_live;
    float* sums;          // splits, padded tokens, ld_sums: dz
    int64_t ld_sums;
    float* de;            // of the chunk of codes; null: not computed
    int64_t ld_de;
    int64_t dim;          // D
    bool pairs;           // two neighbours of de can be stored as one access
    bool add;             // add to sums
    int row_tiles, code_tiles, splits, for_e;  // for_e: number of blocks that compute de
};

// acc += op(a) b over the listed tiles, which have DEPTH of the inner dimension each.
template <class Tile, int DEPTH, int PA, int PB>
__device__ __forceinline__ void listed_product(gemm::Acc<Tile>& acc, const Operand& a, const Operand& b, const Listed& tiles, int64_t row0, int64_t col0,
                                               unsigned char* smem) {
    using List = Terms<PA, PB>;
    using CopyA = gemm::TileCopy<bf16, Tile::kRowsA, Tile::kColsA, Tile::kThreads, true>;
    using CopyB = gemm::TileCopy<bf16, Tile::kRowsB, Tile::kColsB, Tile::kThreads, true>;
    constexpr int kSteps = DEPTH / Tile::kDepth;
    int tile = 0, step = 0, term = 0;
    auto fill = [&](int slot) {
        if (tile < tiles.count()) {
            unsigned char* const stage = smem + slot * (Tile::kBytesA + Tile::kBytesB);
            const int64_t depth = int64_t(tiles[tile]) * DEPTH + step * Tile::kDepth;
            CopyA(a[List::first(term)], Tile::kTa ? depth : row0, Tile::kTa ? row0 : depth).start(stage);
            CopyB(b[List::second(term)], depth, col0).start(stage + Tile::kBytesA);
        }
        cp_async_commit();
        if (++step == kSteps) {
            step = 0;
            if (++tile == tiles.count()) tile = ++term < List::kCount ? 0 : tile;
        }
    };
    gemm::pipeline(acc, int64_t(tiles.count()) * kSteps * List::kCount, fill, smem);
}

// to = acc, or to += acc with `add`, within `rows` and `cols`.
template <class Tile>
__device__ __forceinline__ void put(gemm::Acc<Tile>& acc, float* to, int64_t ld, int64_t row0, int64_t col0, int64_t rows, int64_t cols, bool pairs, bool add) {
#pragma unroll
    for (int i = 0; i < Tile::kAccRows; ++i) {
        const int64_t row = row0 + Tile::row(i);
        if (row >= rows) continue;
        float* const p = to + row * ld;
#pragma unroll
        for (int j = 0; j < Tile::kAccCols; j += 2) {
            const int64_t col = col0 + Tile::col(j);
            float two[2] = {acc.at(i, j), acc.at(i, j + 1)};
            if (pairs && col + 1 < cols) {
                float old[2] = {};
                if (add) load<2>(old, p + col);
                two[0] += old[0];
                two[1] += old[1];
                store_global(p + col, two);
            } else {
                if (col < cols) p[col] = add ? p[col] + two[0] : two[0];
                if (col + 1 < cols) p[col + 1] = add ? p[col + 1] + two[1] : two[1];
            }
        }
    }
}

// The first blocks compute de += ds^T z, the others sums (+)= ds e. PARTS: parts of ds; OTHERS: parts of z and e.
template <int PARTS, int OTHERS> __global__ void __launch_bounds__(ForZ::kThreads, kProductBlocks) products_kernel(const __grid_constant__ Products a) {
    static_assert(ForZ::kThreads == ForE::kThreads && ForZ::kSmem == ForE::kSmem, "both products in one launch");
    __shared__ int smem_tiles[kMostTiles + 1];
    ETT_DYNAMIC_SMEM(smem);
    const int block = int(blockIdx.x);
    if (block < a.for_e) {
        const int code_tile = block % a.code_tiles, col_tile = block / a.code_tiles;
        const Listed tiles = {smem_tiles, live_tiles(smem_tiles, a.live + code_tile, a.ld_live, {0, a.row_tiles})};
        if (tiles.count() == 0) return;
        gemm::Acc<ForE> acc;
        acc.clear();
        const int64_t row0 = int64_t(code_tile) * ForE::kRows, col0 = int64_t(col_tile) * ForE::kCols;
        listed_product<ForE, kTileTokens, PARTS, OTHERS>(acc, a.ds, a.z, tiles, row0, col0, smem);
        put(acc, a.de, a.ld_de, row0, col0, a.e.m.rows, a.dim, a.pairs, true);
    } else {
        const int item = block - a.for_e, row_tile = item % a.row_tiles, rest = item / a.row_tiles, split = rest % a.splits, col_tile = rest / a.splits;
        const Listed tiles = {smem_tiles, live_tiles(smem_tiles, a.live + row_tile * a.ld_live, 1, part_of(a.code_tiles, split, a.splits))};
        if (tiles.count() == 0 && a.add) return;
        gemm::Acc<ForZ> acc;
        acc.clear();
        const int64_t row0 = int64_t(row_tile) * ForZ::kRows, col0 = int64_t(col_tile) * ForZ::kCols;
        listed_product<ForZ, kTileCodes, PARTS, OTHERS>(acc, a.ds, a.e, tiles, row0, col0, smem);
        const int64_t padded = int64_t(a.row_tiles) * ForZ::kRows;
        put(acc, a.sums + split * padded * a.ld_sums, a.ld_sums, row0, col0, padded, a.ld_sums, true, a.add);
    }
}

// dz from the sums of the splits and the direct terms, one warp per token.
template <class T> struct Finish {
    Codes<T> c;
    Matrix<T> dz;
    const float* sums;
    int64_t ld_sums, padded;
    const float* g_quant;
    const float* inv_count;
    const float* own;     // of the chunk: ds of the best code, if sums are without it; else null
    float factor;
    int64_t first;
    int count, splits;
};

template <class T> __global__ void __launch_bounds__(kCodeThreads) finish_kernel(const __grid_constant__ Finish<T> a) {
    const int lane = int(threadIdx.x) % kWarp, n = int(blockIdx.x) * kCodeWarps + int(threadIdx.x) / kWarp;
    if (n >= a.count) return;
    const int64_t m = a.first + n;
    const bool there = a.c.has_code(m);
    const float weight = a.factor * *a.g_quant * *a.inv_count;
    const T* const code = a.c.e.row(there ? a.c.idx[m] : 0);
    for (int64_t col = lane; col < a.c.dim; col += kWarp) {
        float sum = 0.f;
        for (int s = 0; s < a.splits; ++s) sum += a.sums[(s * a.padded + n) * a.ld_sums + col];
        if (a.own) sum = fmaf(a.own[n], to_float(code[col]), sum);
        sum += weight * (to_float(a.c.z.row(m)[col]) - to_float(code[col]));
        a.dz.row(m)[col] = from_float<T>(there ? sum : 0.f);
    }
}

}  // namespace
}  // namespace codebook
}  // namespace ett

#include "hopper_ibq_bwd.cuh"
#include "hopper_ibq_split.cuh"

namespace ett {
namespace codebook {
namespace {

// ---- host ------------------------------------------------------------------------------------------------

constexpr int64_t kBytes = 54 * kMiB;      // of the workspace
constexpr int64_t kTokenBytes = 8 * kMiB;  // of these, for tokens
constexpr int64_t kMostSplits = 8;

int64_t score_slots() { return int64_t(multiprocessors()) * kScoreBlocks; }

// The sizes of chunks and the layout of the workspace.
struct Space {
    Pieces pieces;
    Packing z, e;
    int64_t width;                   // elements of a row of sums, and of a part of full
    int64_t ds_parts, other_parts;
    int64_t tokens, splits, codes;   // per chunk
    Row* token_rows;
    bf16* full;
    bf16* packed_z;
    float* sums;
    float* delta;
    float* r;
    uint8_t* live;
    bf16* packed_e;
    bf16* ds;

    Space(const ett_ibq_bwd_args& a, void* start) : pieces(start), z(a.z), e(a.e) {
        const int64_t m = rows(a.z), k = rows(a.e), d = cols(a.z);
        other_parts = z.parts;
        ds_parts = other_parts == 1 ? 2 : 3;
        width = round_up(d, 8);
        const int64_t token = 2 * other_parts * width + z.bytes, sum = 4 * width;
        tokens = equal_chunks(m, std::clamp(kTokenBytes / (token + sum) / kTileTokens * kTileTokens, kTileTokens, kMostTokens), kTileTokens);
        // With few tokens and many codes, the sums over the codes are split to balance the work of the blocks.
        splits = std::clamp<int64_t>(std::min(kBytes * 4 / 5 / (2 * ds_parts) / tokens, k) / tokens, 1, kMostSplits);
        token_rows = pieces.take<Row>(tokens);
        full = pieces.take<bf16>(tokens * other_parts * width);
        packed_z = pieces.take<bf16>(tokens * z.bytes / 2);
        sums = pieces.take<float>(splits * tokens * width);
        const int64_t all = most_rows(tokens, kTileTokens, score_slots());
        delta = pieces.take<float>(all);
        r = pieces.take<float>(present(a.rest_q) ? all : 0);
        live = pieces.take<uint8_t>(tokens / kTileTokens * ceil_div(k, kTileCodes));
        const int64_t fit = (kBytes - pieces.bytes()) / (2 * ds_parts * tokens + e.bytes) / kTileCodes * kTileCodes;
        codes = equal_chunks(k, std::clamp<int64_t>(fit, kTileCodes, kMostCodes), kTileCodes);
        splits = std::min(splits, codes / kTileCodes);
        packed_e = pieces.take<bf16>(codes * e.bytes / 2);
        ds = pieces.take<bf16>(ds_parts * tokens * codes);
    }
};

bool sound(Check& check, const ett_ibq_bwd_args* a) {
    if (!check.ok() || !check_operands(check, a->z, a->e) || !check_codes(check, *a)) return false;
    const int64_t m = rows(a->z), k = rows(a->e), d = cols(a->z);
    check.vector("smax", a->smax, ETT_F32, m);
    check.vector("rest_p", a->rest_p, ETT_F32, m);
    check.matrix("g", a->g, a->z.dtype, m, d);
    check.vector("g_quant", a->g_quant, ETT_F32, 1);
    check.all_or_none({{"rest_q", &a->rest_q}, {"xbar", &a->xbar}, {"c", &a->c}, {"g_sample", &a->g_sample}, {"g_avg", &a->g_avg}});
    if (present(a->rest_q)) {
        check.vector("rest_q", a->rest_q, ETT_F32, m);
        check.vector("xbar", a->xbar, ETT_F32, m);
        check.vector("c", a->c, ETT_F32, k);
        check.vector("g_sample", a->g_sample, ETT_F32, 1);
        check.vector("g_avg", a->g_avg, ETT_F32, 1);
        check.require(a->temperature > 0, "temperature", "not above 0", "a number above 0");
    }
    check.matrix("dz", a->dz, a->z.dtype, m, d);
    if (present(a->de)) check.matrix("de", a->de, ETT_F32, k, d);
    return check.ok();
}

// What the ways to compute the backward share.
template <class T> class Pass {
  protected:
    Pass(const ett_ibq_bwd_args& a, const ett_launch* l)
        : a_(a),
          l_(l),
          codes_(codes_of<T>(a, l)),
          entropy_(present(a.rest_q)),
          m_(rows(a.z)),
          k_(rows(a.e)),
          inv_t_(entropy_ ? float(1.0 / a.temperature) : 0.f),
          to_q_(entropy_ ? float(double(kLog2e) / a.temperature) : 1.f) {}

    template <class K, class... A> void go(K* kernel, int64_t blocks, int threads, size_t smem, const A&... args) {
        if (status_ == ETT_OK) status_ = launch(kOp, kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), smem, l_, args...);
    }
    // Does the next step, unless one failed before.
    template <class F> void then(F step) {
        if (status_ == ETT_OK) status_ = step();
    }
    const float* number(const ett_view& v) const { return present(v) ? data<const float>(v) : nullptr; }
    // rest_q from a token on, or null.
    const float* rest_q(int64_t token) const { return entropy_ ? number(a_.rest_q) + token : nullptr; }

    // Computes the constants of tokens [token, token + count), and full in PARTS parts.
    template <int PARTS> void tokens(int64_t token, int64_t count, int64_t padded, bf16* full, int64_t width, Row* to) {
        const Tokens<T> tokens = {codes_,           matrix<const T>(a_.g), number(a_.smax),  number(a_.rest_p),  number(a_.rest_q),    number(a_.xbar),
                                  number(a_.c),     number(a_.g_sample),   number(a_.g_avg), number(a_.g_quant), number(a_.inv_count), inv_t_,
                                  to_q_,            token,                 int(count),       int(padded),        full,                 width,
                                  to};
        go(tokens_kernel<T, PARTS>, ceil_div(padded, kCodeWarps), kCodeThreads, 0, tokens);
    }
    // Adds the parts of delta and r to the rows.
    void join(Row* to, const float* delta, const float* r, int64_t token, int64_t count, int64_t padded, int64_t parts, bool last) {
        go(join_kernel, ceil_div(padded, kThreads), kThreads, 0, to, delta, entropy_ ? r : nullptr, rest_q(token), int(padded), int(count), int(parts), last);
    }
    // dz from its sums, and the direct terms of de. `own`: of these tokens, or null.
    void finish(int64_t token, int64_t count, int64_t padded, const float* sums, int64_t width, int64_t splits, const float* own) {
        const double w = 2.0 / double(codes_.dim);
        const Finish<T> finish = {codes_, matrix<T>(a_.dz), sums, width, padded, number(a_.g_quant), number(a_.inv_count), own, float(w * (1.0 + a_.beta_commit)),
                                  token,  int(count),       int(splits)};
        go(finish_kernel<T>, ceil_div(count, kCodeWarps), kCodeThreads, 0, finish);
    }
    void scatter(int64_t token, int64_t count, const float* own) {
        if (!present(a_.de)) return;
        const double w = 2.0 / double(codes_.dim);
        const Scatter<T> hard = {codes_,           matrix<const T>(a_.g), matrix<float>(a_.de), own ? own - token : nullptr,
                                 number(a_.g_quant), number(a_.inv_count),  float(w * (1.0 + a_.beta_code))};
        const bool pieces = has_scatter_pieces(a_.z) && has_scatter_pieces(a_.e) && has_scatter_pieces(a_.g) && has_scatter_pieces(a_.de);
        then([&] { return launch_scatter(kOp, hard, pieces, token, count, l_); });
    }

    const ett_ibq_bwd_args& a_;
    const ett_launch* l_;
    const Codes<T> codes_;
    const bool entropy_;
    const int64_t m_, k_;
    const float inv_t_, to_q_;
    int32_t status_ = ETT_OK;
};

// OTHERS: parts of z, e and full; PARTS: parts of ds.
template <class T, int OTHERS, int PARTS> class Backward : Pass<T> {
    using S = ScoreSweep<OTHERS>;
    using P = Pass<T>;
    using P::a_, P::l_, P::codes_, P::entropy_, P::m_, P::k_, P::to_q_, P::status_, P::go, P::then, P::number;

  public:
    Backward(const ett_ibq_bwd_args& a, const ett_launch* l) : P(a, l), s_(a, l->workspace) {}

    int32_t run() {
        for (int64_t token = 0; token < m_ && status_ == ETT_OK; token += s_.tokens) chunk(token, std::min(s_.tokens, m_ - token));
        return status_;
    }

  private:
    void chunk(int64_t token, int64_t count) {
        const int64_t row_tiles = ceil_div(count, kTileTokens), padded = row_tiles * kTileTokens, code_tiles = ceil_div(k_, kTileCodes);
        Operand z, e;
        then([&] { return operand(kOp, a_.z, s_.z, token, count, s_.packed_z, z, l_); });
        this->template tokens<OTHERS>(token, count, padded, s_.full, s_.width, s_.token_rows);
        then([&] { return zero(kOp, s_.live, size_t(row_tiles * code_tiles), l_); });
        const Operand full = {{s_.full, count, s_.width, OTHERS * s_.width, true}, s_.width};

        // delta and r. Codes that need no packing are swept in one chunk.
        const int64_t all = s_.e.packed ? s_.codes : k_;
        for (int64_t code = 0; code < k_ && status_ == ETT_OK; code += all) {
            const int64_t n = std::min(all, k_ - code), parts = choose_parts(row_tiles, ceil_div(n, kTileCodes), score_slots());
            then([&] { return operand(kOp, a_.e, s_.e, code, n, s_.packed_e, e, l_); });
            go(entropy_ ? expect_kernel<S, true> : expect_kernel<S, false>, row_tiles * parts, S::kThreads, S::kSmem,
               scores(z, full, e, code, row_tiles, parts, code_tiles));
            P::join(s_.token_rows, s_.delta, s_.r, token, count, padded, parts, code + n == k_);
        }

        for (int64_t code = 0; code < k_ && status_ == ETT_OK; code += s_.codes) {
            const int64_t n = std::min(s_.codes, k_ - code), tiles = ceil_div(n, kTileCodes), parts = choose_parts(row_tiles, tiles, score_slots());
            then([&] { return operand(kOp, a_.e, s_.e, code, n, s_.packed_e, e, l_); });
            const Scores w = scores(z, full, e, code, row_tiles, parts, code_tiles);
            go(entropy_ ? weights_kernel<S, true, PARTS> : weights_kernel<S, false, PARTS>, row_tiles * parts, S::kThreads, S::kSmem, w);
            const Operand ds = {{s_.ds, padded, tiles * kTileCodes, w.ld_ds, true}, w.part_ds};
            const int64_t for_e = present(a_.de) ? tiles * ceil_div(codes_.dim, ForE::kCols) : 0;
            const Products p = {ds,
                                z,
                                e,
                                w.live,
                                w.ld_live,
                                s_.sums,
                                s_.width,
                                for_e ? data<float>(a_.de) + code * stride(a_.de) : nullptr,
                                for_e ? stride(a_.de) : 0,
                                codes_.dim,
                                wide(a_.de, 2 * sizeof(float)),
                                code > 0,
                                int(row_tiles),
                                int(tiles),
                                int(s_.splits),
                                int(for_e)};
            go(products_kernel<PARTS, OTHERS>, for_e + row_tiles * s_.splits * ceil_div(codes_.dim, ForZ::kCols), ForZ::kThreads, ForZ::kSmem, p);
        }

        P::finish(token, count, padded, s_.sums, s_.width, s_.splits, nullptr);
        P::scatter(token, count, nullptr);
    }

    Scores scores(const Operand& z, const Operand& full, const Operand& e, int64_t code, int64_t row_tiles, int64_t parts, int64_t code_tiles) const {
        const int64_t ld = s_.codes;
        return {z,
                full,
                e,
                s_.token_rows,
                entropy_ ? number(a_.c) + code : nullptr,
                s_.live + code / kTileCodes,
                code_tiles,
                s_.delta,
                s_.r,
                s_.ds,
                ld,
                row_tiles * kTileTokens * ld,
                int32_t(code),
                to_q_,
                int(row_tiles),
                int(parts)};
    }

    const Space s_;
};

#ifndef ETT_SHIM
// "hopper": the sweeps of hopper_ibq_bwd.cuh, one chunk of tokens at a time.
struct HopperSpace {
    static constexpr int64_t kMostTokens = 16384;

    Pieces pieces;
    int64_t d, tokens, parts;  // tokens per chunk; parts: most parts of dz
    Row* rows;
    bf16* full;
    Weights* weights;
    int32_t* best;
    float* own;
    float* c;
    uint8_t* live;
    float* delta;
    float* r;
    float* sums;

    HopperSpace(const ett_ibq_bwd_args& a, void* start) : pieces(start), d(cols(a.z)) {
        const int64_t m = ett::rows(a.z), k = ett::rows(a.e), slots = multiprocessors();
        tokens = equal_chunks(m, kMostTokens, kSweepRows);
        parts = choose_parts(tokens / kSweepRows, ceil_div(k, kSide), slots);
        rows = pieces.take<Row>(tokens);
        full = pieces.take<bf16>(tokens * d);
        weights = pieces.take<Weights>(tokens / kSide);
        best = pieces.take<int32_t>(tokens);
        own = pieces.take<float>(tokens);
        c = pieces.take<float>(round_up(k, kSide));
        live = pieces.take<uint8_t>(tokens / kSide * ceil_div(k, kSide));
        // A shorter last chunk may have more parts.
        const int64_t all = most_rows(tokens, kSweepRows, slots);
        delta = pieces.take<float>(all);
        r = pieces.take<float>(all);
        sums = pieces.take<float>(std::max(tokens, slots * kSweepRows) * d);
    }
    // Parts of dz for a chunk of `tiles` tiles of tokens, whose sums fit.
    int64_t dz_parts(int64_t tiles, int64_t code_tiles) const {
        const int64_t slots = multiprocessors();
        return std::min(choose_parts(tiles, code_tiles, slots), std::max<int64_t>(1, slots / tiles));
    }
    // Parts of de for `codes` codes and `tiles` tiles of tokens.
    int64_t de_parts(int64_t codes, int64_t tiles) const {
        const int64_t slots = multiprocessors();
        return std::min(choose_parts(ceil_div(codes, kSweepRows), tiles, slots), std::max<int64_t>(1, slots * kSweepRows / codes));
    }
};

class HopperBackward : Pass<bf16> {
  public:
    HopperBackward(const ett_ibq_bwd_args& a, const ett_launch* l) : Pass(a, l), s_(a, l->workspace) {}

    int32_t run() {
        if (entropy_) {
            const cudaError_t e = cudaMemcpyAsync(s_.c, a_.c.ptr, size_t(k_) * sizeof(float), cudaMemcpyDeviceToDevice, reinterpret_cast<cudaStream_t>(l_->stream));
            if (e != cudaSuccess) return ett_fail(ETT_CUDA_ERROR, int32_t(e), kOp, "launch", cudaGetErrorName(e), cudaGetErrorString(e));
            then([&] { return zero(kOp, s_.c + k_, size_t(round_up(k_, kSide) - k_) * sizeof(float), l_); });
        }
        for (int64_t token = 0; token < m_ && status_ == ETT_OK; token += s_.tokens)
            status_ = with_panels(s_.d, [&](auto panels) { return entropy_ ? chunk<panels, true>(token) : chunk<panels, false>(token); });
        return status_;
    }

  private:
    template <int PANELS, bool ENTROPY> int32_t chunk(int64_t token) {
        const int64_t count = std::min(s_.tokens, m_ - token), row_tiles = ceil_div(count, kSweepRows), padded = row_tiles * kSweepRows;
        const int64_t code_tiles = ceil_div(k_, kSide);
        tokens<1>(token, count, padded, s_.full, s_.d, s_.rows);
        then([&] { return zero(kOp, s_.live, size_t(padded / kSide * code_tiles), l_); });

        gemm::Matrix<bf16> z = gemm::matrix<bf16>(a_.z), e = gemm::matrix<bf16>(a_.e);
        z.p += token * z.ld;
        z.rows = count;
        const gemm::Matrix<bf16> full = {s_.full, count, s_.d, s_.d, true};
        Tiles z_side, z_rows, full_side, full_rows, e_side, e_rows;
        auto tile = [&](Tiles& t, const gemm::Matrix<bf16>& m, int rows) {
            then([&] { return make_tiles(kOp, &t, m.p, m.rows, m.cols, m.ld, rows); });
        };
        tile(z_side, z, kSide), tile(full_side, full, kSide), tile(e_side, e, kSide);
        tile(z_rows, z, kSweepRows), tile(full_rows, full, kSweepRows), tile(e_rows, e, kSweepRows);

        HopperSweep sweep = {z, full, e, s_.rows, s_.weights, s_.best, entropy_ ? s_.c : nullptr, s_.live, code_tiles, s_.delta, s_.r, s_.sums,
                             present(a_.de) ? data<float>(a_.de) : nullptr, present(a_.de) ? stride(a_.de) : 0, wide(a_.de, 2 * sizeof(float)),
                             number(a_.g_sample), number(a_.g_avg), number(a_.inv_count), inv_t_, to_q_, int(row_tiles), int(choose_parts(row_tiles, code_tiles, multiprocessors()))};
        go(hopper_expect_kernel<PANELS, ENTROPY>, row_tiles * sweep.parts, kSweepThreads, HopperExpect<PANELS>::kSmem, e_side, sweep);
        join(s_.rows, s_.delta, s_.r, token, count, padded, sweep.parts, true);
        const PackWeights pack = {s_.rows, rest_q(token), s_.weights, s_.best, s_.own, int(count), int(padded)};
        go(pack_weights_kernel, ceil_div(padded, kThreads), kThreads, 0, pack, number(a_.g_sample), number(a_.g_avg), number(a_.inv_count), inv_t_, to_q_);

        sweep.parts = int(s_.dz_parts(row_tiles, code_tiles));
        go(hopper_dz_kernel<PANELS, ENTROPY>, row_tiles * sweep.parts, kSweepThreads, HopperDz<PANELS>::kSmem, z_rows, full_rows, e_side, sweep);
        finish(token, count, padded, s_.sums, s_.d, sweep.parts, s_.own);
        if (present(a_.de)) {
            const int64_t tiles = ceil_div(k_, kSweepRows);
            sweep.parts = int(s_.de_parts(k_, ceil_div(count, kSide)));
            go(hopper_de_kernel<PANELS, ENTROPY>, tiles * sweep.parts, kSweepThreads, HopperDe<PANELS>::kSmem, z_side, full_side, e_rows, sweep);
            if (sweep.parts > 1)
                go(add_de_kernel, ceil_div(k_ * s_.d, kThreads), kThreads, 0, sweep.de, sweep.ld_de, s_.sums, sweep.parts, k_, s_.d);
        }
        scatter(token, count, s_.own);
        return status_;
    }

    const HopperSpace s_;
};

// "hopper_split": the sweeps of hopper_ibq_split.cuh, one chunk of tokens and codes at a time.
struct SplitSpace {
    static constexpr int64_t kBytes = 60 * kMiB, kMostTokens = 2048, kMostCodes = 16384;

    Pieces pieces;
    int64_t d, width, tokens, splits, codes;  // per chunk
    int64_t expect_codes;                     // per chunk of the sweep for delta and r
    Row* rows;
    Weights* weights;
    int32_t* best;
    float* own;
    uint16_t* z;
    bf16* z_parts;
    Unscale* z_unscale;
    uint16_t* full;
    Unscale* full_unscale;
    float* sums;           // before the products: full as f32
    float* delta;
    float* r;
    uint8_t* live;
    CodeNumbers* numbers;
    uint16_t* e;
    bf16* e_parts;
    bf16* ds;              // before the weights: the codes of the sweep for delta and r

    SplitSpace(const ett_ibq_bwd_args& a, void* start) : pieces(start), d(cols(a.z)), width(split_width(d)) {
        const int64_t m = ett::rows(a.z), k = ett::rows(a.e), halves = 2 * width;
        tokens = equal_chunks(m, kMostTokens, kSweepRows);
        rows = pieces.take<Row>(tokens);
        weights = pieces.take<Weights>(tokens / kSide);
        best = pieces.take<int32_t>(tokens);
        own = pieces.take<float>(tokens);
        z = pieces.take<uint16_t>(tokens * halves);
        z_parts = pieces.take<bf16>(tokens * halves);
        z_unscale = pieces.take<Unscale>(tokens / kSide);
        full = pieces.take<uint16_t>(tokens * halves);
        full_unscale = pieces.take<Unscale>(tokens / kSide);
        const int64_t all = most_rows(tokens, kSweepRows, multiprocessors());
        delta = pieces.take<float>(all);
        r = pieces.take<float>(all);
        live = pieces.take<uint8_t>(tokens / kSweepRows * ceil_div(k, kSweepRows));
        // A code's halves, parts and row of ds. With few tokens and many codes, the sums over the codes are split to balance the
        // work of the blocks.
        const int64_t code = 4 * halves + int64_t(sizeof(CodeNumbers)) / kSide + 4 * tokens;
        auto fit = [&](int64_t sums_bytes) { return std::clamp((kBytes - pieces.bytes() - sums_bytes) / code / kSweepRows * kSweepRows, int64_t(kSweepRows), kMostCodes); };
        const int64_t sum = tokens * width * int64_t(sizeof(float));
        splits = std::clamp<int64_t>(std::min(fit(sum), k) / tokens, 1, 8);
        codes = balanced(std::min(fit(splits * sum), round_up(k, kSweepRows))) * kSweepRows;
        splits = std::min(splits, codes / kSweepRows);
        sums = pieces.take<float>(splits * tokens * width);
        e = pieces.take<uint16_t>(codes * halves);
        e_parts = pieces.take<bf16>(codes * halves);
        const int64_t ds_elements = 2 * tokens * codes;
        expect_codes = equal_chunks(k, std::max(codes, ds_elements / halves / kSweepRows * kSweepRows), kSweepRows);
        ds = pieces.take<bf16>(std::max(ds_elements, expect_codes * halves));
        numbers = pieces.take<CodeNumbers>(std::max(codes, expect_codes) / kSide);
    }

    // Tiles of codes per chunk, of at most `most` codes, with which the products take the shortest time per tile: blocks take
    // turns on the multiprocessors, and beginning a chunk costs as much as about 16 steps of 64.
    int64_t balanced(int64_t most) const {
        const int64_t cols = ceil_div(width, 2 * kPanelCols), for_z = tokens / kSweepRows * splits * cols;
        int64_t best = 1;
        double least = INFINITY;
        for (int64_t tiles = most / kSweepRows; tiles >= 1; --tiles) {
            const int64_t steps = std::max(tokens / kSide, ceil_div(2 * tiles, splits)), turns = ceil_div(tiles * cols + for_z, multiprocessors());
            const double time = double(turns * steps + 16) / double(tiles);
            if (time < least) least = time, best = tiles;
        }
        return best;
    }
};

class SplitBackward : Pass<float> {
  public:
    SplitBackward(const ett_ibq_bwd_args& a, const ett_launch* l) : Pass(a, l), s_(a, l->workspace) {}

    int32_t run() {
        for (int64_t token = 0; token < m_ && status_ == ETT_OK; token += s_.tokens)
            status_ = with_panels(s_.d, [&](auto panels) { return entropy_ ? chunk<panels, true>(token) : chunk<panels, false>(token); });
        return status_;
    }

  private:
    void pack(const SplitPack& p) {
        then([&] { return launch_split_pack(kOp, p, l_); });
    }
    void map(CUtensorMap& m, const void* p, int64_t rows, int tile_rows) {
        then([&] { return make_split_map(kOp, &m, p, rows, s_.width, tile_rows); });
    }

    template <int PANELS, bool ENTROPY> int32_t chunk(int64_t token) {
        const int64_t count = std::min(s_.tokens, m_ - token), row_tiles = ceil_div(count, kSweepRows), padded = row_tiles * kSweepRows;
        const int64_t code_tiles = ceil_div(k_, kSweepRows), slots = multiprocessors();
        tokens<0>(token, count, padded, reinterpret_cast<bf16*>(s_.sums), s_.width, s_.rows);
        pack({rows_of(a_.z, token, count), s_.z, s_.z_parts, nullptr, s_.z_unscale, nullptr, s_.width, padded});
        pack({{s_.sums, count, s_.d, s_.width, true}, s_.full, nullptr, nullptr, s_.full_unscale, nullptr, s_.width, padded});
        then([&] { return zero(kOp, s_.live, size_t(row_tiles * code_tiles), l_); });
        CUtensorMap z_map, full_map, z_parts_map, e_map, e_parts_map, ds_rows_map, ds_cols_map;
        map(z_map, s_.z, count, kSweepRows), map(full_map, s_.full, count, kSweepRows);
        constexpr int kProductPanels = PANELS < 2 ? PANELS : 2;
        auto parts_map = [&](CUtensorMap& m, const void* p, int64_t rows) {
            then([&] { return make_panels_map(kOp, &m, p, rows, 2 * s_.width, 2 * s_.width, kSide, kProductPanels); });
        };
        parts_map(z_parts_map, s_.z_parts, count);

        SplitSweep sweep = {high_of(s_.z, count, s_.width), high_of(s_.full, count, s_.width), s_.z_unscale, s_.full_unscale, s_.numbers, s_.rows, s_.weights, s_.best,
                            s_.live, code_tiles, s_.delta, s_.r, s_.ds, s_.codes, number(a_.g_sample), number(a_.g_avg), number(a_.inv_count), inv_t_, to_q_, 0, 0,
                            int(row_tiles), 1};
        auto begin_codes = [&](int64_t code, int64_t most, uint16_t* halves, bf16* parts) {
            const int64_t n = std::min(most, k_ - code);
            pack({rows_of(a_.e, code, n), halves, parts, entropy_ ? number(a_.c) + code : nullptr, nullptr, s_.numbers, s_.width, round_up(n, kSweepRows)});
            map(e_map, halves, n, kSide);
            sweep.live = s_.live + code / kSweepRows;
            sweep.code0 = int32_t(code);
            sweep.codes = int(n);
            return n;
        };
        for (int64_t code = 0; code < k_ && status_ == ETT_OK; code += s_.expect_codes) {
            const int64_t n = begin_codes(code, s_.expect_codes, reinterpret_cast<uint16_t*>(s_.ds), nullptr);
            sweep.parts = int(choose_parts(row_tiles, ceil_div(n, kSide), slots));
            go(split_expect_kernel<PANELS, ENTROPY>, row_tiles * sweep.parts, kSweepThreads, SplitTokenSmem<PANELS>::kBytes, z_map, full_map, e_map, sweep);
            join(s_.rows, s_.delta, s_.r, token, count, padded, sweep.parts, code + n == k_);
        }
        const PackWeights weights = {s_.rows, rest_q(token), s_.weights, s_.best, s_.own, int(count), int(padded)};
        go(pack_weights_kernel, ceil_div(padded, kThreads), kThreads, 0, weights, number(a_.g_sample), number(a_.g_avg), number(a_.inv_count), inv_t_, to_q_);

        then([&] { return make_panel_map(kOp, &ds_rows_map, s_.ds, 2 * padded, s_.codes, s_.codes, kSweepRows); });
        then([&] { return make_panels_map(kOp, &ds_cols_map, s_.ds, 2 * padded, s_.codes, s_.codes, kSide, 2); });
        for (int64_t code = 0; code < k_ && status_ == ETT_OK; code += s_.codes) {
            const int64_t n = begin_codes(code, s_.codes, s_.e, s_.e_parts), tiles = ceil_div(n, kSweepRows), col_tiles = s_.width / (kProductPanels * kPanelCols);
            parts_map(e_parts_map, s_.e_parts, n);
            sweep.parts = int(choose_parts(row_tiles, tiles, slots));
            go(split_weights_kernel<PANELS>, row_tiles * sweep.parts, kSweepThreads, SplitTokenSmem<PANELS>::kBytes, z_map, full_map, e_map, sweep);
            const int64_t for_e = present(a_.de) ? tiles * col_tiles : 0;
            const SplitProducts p = {sweep.live, code_tiles, s_.sums, s_.width, for_e ? data<float>(a_.de) + code * stride(a_.de) : nullptr, for_e ? stride(a_.de) : 0,
                                     wide(a_.de, 2 * sizeof(float)), s_.d, int(n), int(row_tiles), int(tiles), int(s_.splits), int(for_e), code > 0};
            go(split_products_kernel<kProductPanels>, for_e + row_tiles * s_.splits * col_tiles, kSweepThreads, SplitProductSmem<kProductPanels>::kBytes, ds_rows_map,
               ds_cols_map, e_parts_map, z_parts_map, p);
        }

        finish(token, count, padded, s_.sums, s_.width, s_.splits, s_.own);
        scatter(token, count, s_.own);
        return status_;
    }

    const SplitSpace s_;
};
#endif  // ETT_SHIM

// Bytes of workspace of an implementation.
int64_t workspace_bytes(const ett_ibq_bwd_args& a, const char* kernel) {
#ifndef ETT_SHIM
    if (strcmp(kernel, "hopper") == 0) return HopperSpace(a, nullptr).pieces.bytes();
    if (strcmp(kernel, "hopper_split") == 0) return SplitSpace(a, nullptr).pieces.bytes();
#endif
    (void)kernel;
    return Space(a, nullptr).pieces.bytes();
}
int32_t run(const ett_ibq_bwd_args& a, const char* kernel, const ett_launch* l) {
#ifndef ETT_SHIM
    if (strcmp(kernel, "hopper") == 0) return HopperBackward(a, l).run();
    if (strcmp(kernel, "hopper_split") == 0) return SplitBackward(a, l).run();
#endif
    (void)kernel;
    return a.z.dtype == ETT_BF16 ? Backward<bf16, 1, 2>(a, l).run() : Backward<float, 3, 3>(a, l).run();
}

}  // namespace
}  // namespace codebook
}  // namespace ett

extern "C" int64_t ett_ibq_bwd_workspace(const ett_ibq_bwd_args* a) {
    using namespace ett;
    using namespace ett::codebook;
    Check check(kOp, a);
    if (!sound(check, a)) return -1;
    if (rows(a->z) == 0) return 0;
    int64_t most = workspace_bytes(*a, "chunks");
    if (hopper_planned(a->z, a->e)) most = std::max(most, workspace_bytes(*a, "hopper"));
    if (split_planned(a->z, a->e)) most = std::max(most, workspace_bytes(*a, "hopper_split"));
    return most;
}

extern "C" int32_t ett_ibq_bwd(const ett_ibq_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    using namespace ett::codebook;
    Check check(kOp, a, l);
    if (!sound(check, a)) return check.status();
    if (rows(a->z) == 0) return ett_done("");
    const char* kernel = check.choose(l, {{"hopper", hopper_fits(a->z, a->e)}, {"hopper_split", split_fits(a->z, a->e)}, {"chunks", true}});
    check.workspace(l, workspace_bytes(*a, kernel));
    if (!check.ok()) return check.status();
    const int32_t status = run(*a, kernel, l);
    return status == ETT_OK ? ett_done(kernel) : status;
}
