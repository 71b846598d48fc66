// hopper_ibq_split.cuh: the sweeps of the IBQ quantizer's backward for f32 on Hopper, with scores by products of halves
// (hopper_split.cuh).
//
//   expect    delta, r, and which tiles of 128 tokens and 128 codes have any weight
//   weights   ds of these tiles, as two parts of bf16
//   products  dz += ds e and de += ds^T z, each the sum of three of the four products of parts of bf16
//
// dp = full e^T is computed like the scores. The best codes are left out of ds, as in hopper_ibq_bwd.cuh. Nothing is added
// across blocks; sums have a fixed order.
#pragma once

#include "hopper_ibq_bwd.cuh"
#include "hopper_split.cuh"

#ifndef ETT_SHIM
namespace ett {
namespace codebook {
namespace {

struct SplitSweep {
    gemm::Matrix<bf16> z, full;       // high halves of the chunk of tokens
    const Unscale* z_unscale;
    const Unscale* full_unscale;
    const CodeNumbers* codes_numbers; // of the chunk of codes
    const Row* rows;                  // of the chunk of tokens, padded to tiles of 128
    const Weights* weights;
    const int32_t* best;
    uint8_t* live;                    // tiles of 128 tokens, ld_live: of the chunk of codes
    int64_t ld_live;
    float* delta;                     // parts, padded tokens
    float* r;
    bf16* ds;                         // 2 parts, padded tokens, ld_ds
    int64_t ld_ds;
    const float* g_sample;
    const float* g_avg;
    const float* inv_count;
    float inv_t, to_q;
    int32_t code0;                    // first code of the chunk
    int codes;                        // of the chunk
    int row_tiles, parts;
};

// What undoes the scaling of a thread's two rows of the warpgroup's rows from row0 on; read again for each tile, since
// registers are scarce.
struct TokenScales {
    float z[2], g[2];

    __device__ __forceinline__ TokenScales(const SplitSweep& a, int row0) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            z[i] = a.z_unscale[row0 / kSide].by[acc_row(i)];
            g[i] = a.full_unscale[row0 / kSide].by[acc_row(i)];
        }
    }
};

// The resident operands of a warpgroup: z and full.
template <int PANELS> struct SplitTokens {
    uint32_t z[PANELS * 4][4], g[PANELS * 4][4];

    __device__ __forceinline__ void begin(const SplitSweep& a, int row0) {
        load_fragments<PANELS>(z, a.z, row0);
        load_fragments<PANELS>(g, a.full, row0);
    }
    // s and dp of the next tile, of which both halves are copied to the ring's slots; these are given back. The scores are
    // still scaled.
    template <class S> __device__ __forceinline__ void multiply(float (&s)[kSide / 2], float (&dp)[kSide / 2], const S& smem, Ring<S::kSlots>& ring, int group) {
        // opaque: keeps the many addresses, of which the compiler would compute common ones once, out of registers.
        auto hidden = [](uint32_t address) { return uint32_t(opaque(int(address))); };
        const uint32_t own = group * 64 * kPanelRowBytes;
        const uint32_t slots[2] = {ring.slot, ring.slot + 1 == S::kSlots ? 0 : ring.slot + 1};
        bar_wait(smem.full(slots[0]), ring.parity);
        products_begin();
        first<PANELS, false>(s, z, 0, hidden(smem.slot(slots[0])));
        first<PANELS, false>(dp, g, 0, hidden(smem.slot(slots[0])));
        products_end();
        ring.next();
        bar_wait(smem.full(slots[1]), ring.parity);
        products_begin();
        second<PANELS, false>(s, z, hidden(smem.low(0) + own), 0, hidden(smem.slot(slots[1])));
        second<PANELS, false>(dp, g, hidden(smem.low(1) + own), 0, hidden(smem.slot(slots[1])));
        products_end();
        ring.next();
        products_wait<1>();
        if (threadIdx.x % kWarp == 0) bar_arrive(smem.empty(slots[0]));
        products_wait<0>();
        pin(s);
        pin(dp);
        if (threadIdx.x % kWarp == 0) bar_arrive(smem.empty(slots[1]));
    }
};

// Registers of a thread that copies and of one that multiplies.
template <int PANELS> inline constexpr int kCopyRegisters = PANELS == 4 ? 24 : 40;
template <int PANELS> inline constexpr int kProductRegisters = PANELS == 4 ? 240 : 232;

template <int PANELS> using SplitTokenSmem = SplitSmem<PANELS, 2, CodeNumbers>;

// Starts the copies of the low halves of a block's tokens, and of tiles of codes.
template <int PANELS> struct SplitTokenCopies {
    using S = SplitTokenSmem<PANELS>;
    SplitCopies<PANELS, S> copies;

    __device__ __forceinline__ void tokens(const CUtensorMap* z, const CUtensorMap* full, int row) {
        const S& smem = copies.smem;
        bar_expect(smem.ready(), 2 * S::kResident);
        load_half<PANELS, kSweepRows>(smem.low(0), z, smem.ready(), row, true);
        load_half<PANELS, kSweepRows>(smem.low(1), full, smem.ready(), row, true);
    }
    __device__ __forceinline__ void tile(const CUtensorMap* codes, const CodeNumbers* from, int t) {
        const S& smem = copies.smem;
        copies.tile(codes, t * kSide, true, sizeof(CodeNumbers),
                    [&](int at, uint32_t bar) { bulk_load(smem_address(&smem.numbers(at)), from + t, sizeof(CodeNumbers), bar); });
    }
};

// ---- expect ----------------------------------------------------------------------------------------------

template <int PANELS, bool ENTROPY>
__global__ void __launch_bounds__(kSweepThreads, 1)
split_expect_kernel(const __grid_constant__ CUtensorMap tokens, const __grid_constant__ CUtensorMap fulls, const __grid_constant__ CUtensorMap codes,
                    const __grid_constant__ SplitSweep a) {
#ifdef ETT_SM90A
    using S = SplitTokenSmem<PANELS>;
    ETT_DYNAMIC_SMEM(dynamic);
    const S smem = {panel_smem(dynamic)};
    const int part = int(blockIdx.x) / a.row_tiles, row_tile = int(blockIdx.x) - part * a.row_tiles;
    const Consecutive range = part_of((a.codes + kSide - 1) / kSide, part, a.parts);
    const int64_t block0 = int64_t(row_tile) * kSweepRows, to0 = int64_t(blockIdx.x) * kSweepRows;
    smem.init();
    // Tokens without any weight besides the best code need no sweep.
    if (!__syncthreads_or(has_weight(a.rows + block0))) {  // the barriers are initialised too
        if (threadIdx.x < kSweepRows) {
            a.delta[to0 + threadIdx.x] = 0.f;
            if constexpr (ENTROPY) a.r[to0 + threadIdx.x] = 0.f;
        }
        return;
    }

    const int group = __shfl_sync(kAllLanes, int(threadIdx.x) / kWarpgroup, 0);
    if (group == 2) {
        give_registers<kCopyRegisters<PANELS>>();
        if (threadIdx.x == kConsumers) {
            SplitTokenCopies<PANELS> copies = {{smem}};
            copies.tokens(&tokens, &fulls, int(block0));
            for (int t = range.first; t < range.end; ++t) copies.tile(&codes, a.codes_numbers, t);
        }
        return;
    }
    take_registers<kProductRegisters<PANELS>>();
    SplitTokens<PANELS> mine;
    const int tokens0 = int(block0) + group * 64;
    mine.begin(a, tokens0);
    Expectation<ENTROPY> sums;
    WarpgroupAcc<kSide> s, dp;
    Ring<S::kSlots> ring;
    bar_wait(smem.ready(), 0);
#pragma unroll 1
    for (int t = range.first; t < range.end; ++t) {
        mine.multiply(s.d, dp.d, smem, ring, group);
        const CodeNumbers& n = smem.numbers((t - range.first) % S::kNumbers);
        const int row0 = opaque(tokens0);
        const TokenScales by(a, row0);
        unscale_columns(s.d, s.d, by.z, n.unscale);
        const int code = t * kSide;
        auto dp_of = [&](int i, int j) { return dp.at(i, j) * n.unscale.again(j / 2 * 8 + acc_col(j % 2)) * by.g[i]; };
        const auto found = sums.look(s, a.rows + row0, a.code0 + code, a.codes - code);
        sums.add(s, dp_of, found, a.rows + row0, n.c, a.to_q);
        if (found.any() && threadIdx.x % kWarp == 0) a.live[row0 / kSweepRows * a.ld_live + t / 2] = 1;
        __syncwarp();
    }
    const int64_t to = int64_t(opaque(int(blockIdx.x))) * kSweepRows + group * 64;
    put_rows(a.delta + to, sums.delta, 64);
    if constexpr (ENTROPY) put_rows(a.r + to, sums.r, 64);
#endif
}

// ---- weights ---------------------------------------------------------------------------------------------

// Stores a tile of ds as two parts; `to`: of the warpgroup's first row. Two lanes exchange pairs, so that each stores four
// neighbouring elements.
__device__ __forceinline__ void store_weights(bf16* to, int64_t ld, int64_t part, const float (&ds)[kSide / 2]) {
    const int thread = opaque(int(threadIdx.x));  // nothing that depends on it is kept in registers between tiles
    const bool odd = thread % 2 != 0;
    bf16* const first_row = to + (thread / kWarp % 4 * 16 + thread % kWarp / 4) * ld + thread % 4 / 2 * 4 + (odd ? 8 : 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        bf16* const row = first_row + 8 * i * ld;
#pragma unroll
        for (int j = 0; j < kSide / 8; j += 2) {
            float cuts[4][2];
#pragma unroll
            for (int e = 0; e < 4; ++e) cut<2>(ds[4 * (j + e / 2) + 2 * i + e % 2], cuts[e]);
#pragma unroll
            for (int p = 0; p < 2; ++p) {
                const uint32_t here = pack_bf16x2(cuts[0][p], cuts[1][p]), next = pack_bf16x2(cuts[2][p], cuts[3][p]);
                const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? here : next, 1);
                const uint32_t four[2] = {odd ? other : here, odd ? next : other};
                store_global_bytes(row + p * part + j * 8, four);
            }
        }
    }
}

// Without entropies the weights q are 0.
template <int PANELS>
__global__ void __launch_bounds__(kSweepThreads, 1)
split_weights_kernel(const __grid_constant__ CUtensorMap tokens, const __grid_constant__ CUtensorMap fulls, const __grid_constant__ CUtensorMap codes,
                     const __grid_constant__ SplitSweep a) {
#ifdef ETT_SM90A
    using S = SplitTokenSmem<PANELS>;
    ETT_DYNAMIC_SMEM(dynamic);
    const S smem = {panel_smem(dynamic)};
    const int part = int(blockIdx.x) / a.row_tiles, row_tile = int(blockIdx.x) - part * a.row_tiles;
    const Consecutive range = part_of((a.codes + kSweepRows - 1) / kSweepRows, part, a.parts);
    const int64_t block0 = int64_t(row_tile) * kSweepRows;
    const uint8_t* const live = a.live + row_tile * a.ld_live;
    smem.init();
    const int tiles = 2 * count_live(live, 1, 0, range);
    if (tiles == 0) return;
    __syncthreads();  // the barriers are initialised

    const int group = __shfl_sync(kAllLanes, int(threadIdx.x) / kWarpgroup, 0);
    if (group == 2) {
        give_registers<kCopyRegisters<PANELS>>();
        if (threadIdx.x / kWarp == kConsumers / kWarp) {
            const bool lead = threadIdx.x % kWarp == 0;
            SplitTokenCopies<PANELS> copies = {{smem}};
            if (lead) copies.tokens(&tokens, &fulls, int(block0));
            for_live(live, 1, 0, range, [&](int t) {
                if (lead)
                    for (int h = 0; h < 2; ++h) copies.tile(&codes, a.codes_numbers, 2 * t + h);
                __syncwarp();
            });
        }
        return;
    }
    take_registers<kProductRegisters<PANELS>>();
    SplitTokens<PANELS> mine;
    const int tokens0 = int(block0) + group * 64;
    mine.begin(a, tokens0);
    float s[kSide / 2], dp[kSide / 2];
    Ring<S::kSlots> ring;
    bar_wait(smem.ready(), 0);
#pragma unroll 1
    for (int n = 0; n < tiles; ++n) {
        // Whatever can be computed or read again for each tile is: all registers are taken.
        mine.multiply(s, dp, smem, ring, __shfl_sync(kAllLanes, opaque(int(threadIdx.x)) / kWarpgroup, 0));
        const CodeNumbers& c = smem.numbers(n % S::kNumbers);
        const int code = smem.tile(n % S::kNumbers) * kSide, row0 = opaque(tokens0);
        const TokenScales by(a, row0);
        unscale_columns(s, s, by.z, c.unscale);
        const Weights& w = a.weights[row0 / kSide];
        auto row = [&](int i) {
            const int at = acc_row(i);
            return TokenWeight{w.max[at], a.best[row0 + at], w.log_p[at], w.log_q[at], w.mean[at], w.shift[at]};
        };
        const Factors f = factors_of(a.g_sample, a.g_avg, a.inv_count, a.inv_t, a.to_q);
        auto dp_of = [&](int n) { return dp[n] * c.unscale.again(n / 4 * 8 + acc_col(n % 2)) * by.g[n / 2 % 2]; };
        weigh_codes<true>(s, dp_of, a.code0 + code, a.codes - code, c.c, f, row);
        store_weights(a.ds + row0 * a.ld_ds + code, a.ld_ds, int64_t(a.row_tiles) * kSweepRows * a.ld_ds, s);
        __syncwarp();  // all lanes have read the numbers
    }
#endif
}

// ---- products --------------------------------------------------------------------------------------------

struct SplitProducts {
    const uint8_t* live;  // tiles of 128 tokens, ld_live: of the chunk of codes
    int64_t ld_live;
    float* sums;          // splits, padded tokens, width: dz
    int64_t width;
    float* de;            // of the chunk of codes
    int64_t ld_de;
    bool pairs;           // two neighbours of de can be accessed as one
    int64_t dim;
    int codes;            // of the chunk
    int row_tiles, code_tiles, splits;
    int for_e;            // blocks that compute de
    bool add;             // add to sums
};

// PANELS: of the columns that a block computes, 1 or 2. A stage has 64 of the inner dimension of both parts of both
// operands.
template <int PANELS> struct SplitProductSmem {
    static constexpr int kA = kSweepRows * kPanelRowBytes, kB = PANELS * kSide * kPanelRowBytes, kStage = 2 * (kA + kB), kStages = 3;
    static constexpr size_t kBytes = 1024 + kStages * (kStage + 16);
};

// acc = the sum over all stages of op(a) b; FOR_E: a is ds^T, whose rows are summed over.
template <int PANELS, bool FOR_E> __device__ __forceinline__ void split_product(float (&acc)[PANELS * 32], uint32_t stages, uint32_t full, int steps, int group) {
    using S = SplitProductSmem<PANELS>;
    constexpr int kCols = PANELS * kPanelCols;
    const uint32_t empty = full + 8 * S::kStages;
    Ring<S::kStages> here;
#pragma unroll 1
    for (int n = 0; n < steps; ++n, here.next()) {
        bar_wait(full + 8 * here.slot, here.parity);
        const uint32_t at = stages + here.slot * S::kStage + group * 64 * kPanelRowBytes, b = stages + here.slot * S::kStage + 2 * S::kA;
        const uint32_t a_low = FOR_E ? mn_major(at, kSide * kPanelRowBytes) : k_major(at), b_low = mn_major(b, kSide * kPanelRowBytes);
        products_begin();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const uint32_t ak = a_low + step(FOR_E ? k * 16 * kPanelRowBytes : k * 32), bk = b_low + step(k * 16 * kPanelRowBytes);
            mma<kCols, FOR_E, true>(acc, ak + step(S::kA), bk, n > 0 || k > 0);
            mma<kCols, FOR_E, true>(acc, ak, bk + step(S::kB), true);
            mma<kCols, FOR_E, true>(acc, ak, bk, true);
        }
        products_end();
        products_wait<0>();
        pin(acc);
        if (threadIdx.x % kWarp == 0) bar_arrive(empty + 8 * here.slot);
    }
}

// The first blocks compute de += ds^T z, the others sums (+)= ds e; e and z are parts of bf16.
template <int PANELS>
__global__ void __launch_bounds__(kSweepThreads, 1)
split_products_kernel(const __grid_constant__ CUtensorMap ds_rows, const __grid_constant__ CUtensorMap ds_cols, const __grid_constant__ CUtensorMap e,
                      const __grid_constant__ CUtensorMap z, const __grid_constant__ SplitProducts a) {
#ifdef ETT_SM90A
    using S = SplitProductSmem<PANELS>;
    ETT_DYNAMIC_SMEM(dynamic);
    const uint32_t stages = smem_address(panel_smem(dynamic)), full = stages + S::kStages * S::kStage, empty = full + 8 * S::kStages;
    const bool for_e = int(blockIdx.x) < a.for_e;
    const int item = for_e ? int(blockIdx.x) : int(blockIdx.x) - a.for_e, tiles = for_e ? a.code_tiles : a.row_tiles;
    const int tile = item % tiles, rest = item / tiles, split = for_e ? 0 : rest % a.splits, col_tile = for_e ? rest : rest / a.splits;
    const uint8_t* const live = for_e ? a.live + tile : a.live + tile * a.ld_live;
    const int64_t live_step = for_e ? a.ld_live : 1;
    const Consecutive range = for_e ? Consecutive{0, a.row_tiles} : part_of(a.code_tiles, split, a.splits);
    if (threadIdx.x == 0) {
        for (int s = 0; s < S::kStages; ++s) {
            bar_init(full + 8 * s, 1);
            bar_init(empty + 8 * s, kConsumers / kWarp);
        }
        bar_init_done();
    }
    const int steps = 2 * count_live(live, live_step, 0, range);
    if (steps == 0 && (for_e || a.add)) return;
    __syncthreads();  // the barriers are initialised

    const int group = __shfl_sync(kAllLanes, int(threadIdx.x) / kWarpgroup, 0);
    if (group == 2) {
        give_registers<40>();
        if (threadIdx.x / kWarp == kConsumers / kWarp) {
            const bool lead = threadIdx.x % kWarp == 0;
            Ring<S::kStages> ring;
            for_live(live, live_step, 0, range, [&](int t) {
                for (int h = 0; lead && h < 2; ++h, ring.next()) {
                    const uint32_t bar = full + 8 * ring.slot, to = stages + ring.slot * S::kStage;
                    const int inner = (2 * t + h) * kSide;
                    bar_wait(empty + 8 * ring.slot, ring.parity ^ 1);
                    bar_expect(bar, S::kStage);
                    for (int p = 0; p < 2; ++p) {
                        if (for_e)
                            tma_load(to + p * S::kA, &ds_cols, bar, 0, inner + p * a.row_tiles * kSweepRows, 2 * tile);
                        else
                            tma_load(to + p * S::kA, &ds_rows, bar, inner, tile * kSweepRows + p * a.row_tiles * kSweepRows);
                        tma_load(to + 2 * S::kA + p * S::kB, for_e ? &z : &e, bar, 0, inner, (p * int(a.width) / kPanelCols) + col_tile * PANELS);
                    }
                }
                __syncwarp();
            });
        }
        return;
    }
    take_registers<232>();
    float acc[PANELS * 32];
#pragma unroll
    for (int i = 0; i < PANELS * 32; ++i) acc[i] = 0.f;
    if (for_e)
        split_product<PANELS, true>(acc, stages, full, steps, group);
    else
        split_product<PANELS, false>(acc, stages, full, steps, group);
    const int col0 = col_tile * PANELS * kPanelCols;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t row = int64_t(tile) * kSweepRows + group * 64 + acc_row(i);
        if (for_e && row >= a.codes) continue;
        float* const to = for_e ? a.de + row * a.ld_de : a.sums + (int64_t(split) * a.row_tiles * kSweepRows + row) * a.width;
        const int64_t cols = for_e ? a.dim : a.width;
        const bool pairs = !for_e || a.pairs;
#pragma unroll
        for (int j = 0; j < PANELS * 8; ++j) {
            const int col = col0 + 8 * j + acc_col(0);
            if (col + 1 < cols)
                put_pair(to + col, acc[4 * j + 2 * i], acc[4 * j + 2 * i + 1], for_e || a.add, pairs);
            else if (col < cols)
                to[col] = (for_e || a.add ? to[col] : 0.f) + acc[4 * j + 2 * i];
        }
    }
#endif
}

}  // namespace
}  // namespace codebook
}  // namespace ett
#endif  // ETT_SHIM
