// hopper_ibq_bwd.cuh: the sweeps of the IBQ quantizer's backward for Hopper.
//
// Three sweeps of scores s = z e^T and products dp = full e^T, with 128 rows in a block and 64 in a warpgroup:
//   expect  tokens stay in registers, codes stream: delta, r, and which tiles of 64 x 64 have any weight; dp only for these
//   dz      tokens stay in shared memory, codes stream: dz = ds e
//   de      codes stay in shared memory, tokens stream: de += ds^T z
// ds stays in registers, as the fragments of its product. Its rounding to bf16 is the only one; the best codes are left out
// of ds, and their part is added in f32 (finish_kernel, scatter_kernel). Nothing is added across blocks, except the parts
// of dz, and those of de where there are few codes, in order.
#pragma once

#include "hopper_scores.cuh"

#ifndef ETT_SHIM
namespace ett {
namespace codebook {
namespace {

// What the weights of 64 tokens need; exponents have base 2:
//   ds = 2^((s - max) log2(e) + log_p) (dp - mean) + 2^((s - max) to_q + log_q) (slope (s - max) + avg c - shift)
struct alignas(16) Weights {
    float max[kSide], log_p[kSide], log_q[kSide], mean[kSide], shift[kSide];
};
// The factors that all tokens share.
struct Factors {
    float to_q, slope, avg;
};
// avg and slope from the gradients of the losses; null without entropies.
__device__ __forceinline__ Factors factors_of(const float* g_sample, const float* g_avg, const float* inv_count, float inv_t, float to_q) {
    if (!g_sample) return {0.f, 0.f, 0.f};
    const float scale = *inv_count * inv_t;
    return {to_q, -*g_sample * scale * kLn2 * to_q, *g_avg * scale};
}

struct HopperSweep {
    gemm::Matrix<bf16> z, full, e;  // of the chunk
    const Row* rows;                // of the chunk, padded to tiles of 128
    const Weights* weights;         // the same
    const int32_t* best;            // the same; -1: none
    const float* c;                 // padded to tiles of 64; null without entropies
    uint8_t* live;                  // tiles of 64 tokens, ld_live
    int64_t ld_live;
    float* delta;                   // parts, padded tokens
    float* r;
    float* sums;                    // parts, padded tokens, D: of dz; or parts, codes, D: of de
    float* de;
    int64_t ld_de;
    bool pairs;                     // two neighbours of de can be accessed as one
    const float* g_sample;
    const float* g_avg;
    const float* inv_count;
    float inv_t, to_q;
    int row_tiles, parts;
};

// ---- expect ----------------------------------------------------------------------------------------------

// delta and r of a thread's two rows over its own columns.
template <bool ENTROPY> struct Expectation {
    float delta[2] = {}, r[2] = {};

    // Whether a warp has any weight p or q in a tile, for each row of a thread.
    struct Found {
        bool p[2], q[2];
        __device__ __forceinline__ bool any() const { return p[0] || p[1] || q[0] || q[1]; }
    };
    // Looks at a tile of 64 codes from code0 on, of which `left` exist, and takes the best codes and those past the last out of
    // s. `rows`: of the warpgroup, read again for each tile, since registers are scarce.
    __device__ __forceinline__ Found look(WarpgroupAcc<kSide>& s, const Row* rows, int code0, int left) const {
        if (left < kSide) {
            const int mine = left - acc_col(0);
#pragma unroll
            for (int j = 0; j < kSide / 4; ++j)
                if (j / 2 * 8 + j % 2 >= mine) s.at(0, j) = s.at(1, j) = kNoWeight;
        }
        Found found;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Row& row = rows[acc_row(i)];
            const int at = row.best - code0;
            if (__any_sync(kAllLanes, unsigned(at) < unsigned(kSide))) {
                const int mine = at - acc_col(0);
#pragma unroll
                for (int j = 0; j < kSide / 4; ++j)
                    if (mine == j / 2 * 8 + j % 2) s.at(i, j) = kNoWeight;
            }
            const float top = row_max(s, i) - row.max;
            found.p[i] = __any_sync(kAllLanes, top > row.least_p) != 0;
            found.q[i] = ENTROPY && __any_sync(kAllLanes, top > row.least_q) != 0;
        }
        return found;
    }
    // Adds the tile to the rows where weight was found. dp_of(i, j): dp of row i; c: of the tile.
    template <class Dp> __device__ __forceinline__ void add(WarpgroupAcc<kSide>& s, Dp dp_of, const Found& found, const Row* rows, const float* c, float to_q) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Row& row = rows[acc_row(i)];
            const float max = row.max;
            if (found.p[i]) {
                const float dp_best = row.dp_best;
                float sum = 0.f;
#pragma unroll
                for (int j = 0; j < kSide / 4; ++j)
                    sum = fmaf(exp2_approx(above_floor((s.at(i, j) - max) * kLog2e)), dp_of(i, j) - dp_best, sum);
                delta[i] += sum;
            }
            if constexpr (ENTROPY) {
                if (!found.q[i]) continue;
                const float c_best = row.c_best;
                float sum = 0.f;
#pragma unroll
                for (int j = 0; j < kSide / 4; j += 2) {
                    float two[2];
                    load<2>(two, c + j * 4 + acc_col(0));
#pragma unroll
                    for (int h = 0; h < 2; ++h) sum = fmaf(exp2_approx(above_floor((s.at(i, j + h) - max) * to_q)), two[h] - c_best, sum);
                }
                r[i] += sum;
            }
        }
    }
};

// Whether a thread of the block's first 128 has a token with any weight besides its best code.
__device__ __forceinline__ bool has_weight(const Row* rows) {
    if (threadIdx.x >= kSweepRows) return false;
    const Row& row = rows[threadIdx.x];
    return row.least_p < INFINITY || row.least_q < INFINITY;
}

template <int PANELS> struct HopperExpect {
    static constexpr int kTile = PANELS * kSide * kPanelRowBytes, kStages = 4;
    static constexpr size_t kSmem = 1024 + kStages * (kTile + kSide * sizeof(float) + 16);
};

template <int PANELS, bool ENTROPY>
__global__ void __launch_bounds__(kSweepThreads, 1) hopper_expect_kernel(const __grid_constant__ Tiles codes, const __grid_constant__ HopperSweep a) {
#ifdef ETT_SM90A
    using S = HopperExpect<PANELS>;
    ETT_DYNAMIC_SMEM(dynamic);
    unsigned char* const smem = panel_smem(dynamic);
    float* const c_at = reinterpret_cast<float*>(smem + S::kStages * S::kTile);
    const uint32_t tiles_at = smem_address(smem), full = smem_address(c_at + S::kStages * kSide), empty = full + 8 * S::kStages;
    const int part = int(blockIdx.x) / a.row_tiles, row_tile = int(blockIdx.x) - part * a.row_tiles;
    const Consecutive range = part_of((a.e.rows + kSide - 1) / kSide, part, a.parts);
    const int64_t padded = int64_t(a.row_tiles) * kSweepRows;
    if (threadIdx.x == 0) {
        for (int s = 0; s < S::kStages; ++s) {
            bar_init(full + 8 * s, 1);
            bar_init(empty + 8 * s, kConsumers / kWarp);
        }
        bar_init_done();
    }
    // Tokens without any weight besides the best code need no sweep.
    if (!__syncthreads_or(has_weight(a.rows + row_tile * kSweepRows))) {  // the barriers are initialised too
        if (threadIdx.x < kSweepRows) {
            const int64_t to = part * padded + row_tile * kSweepRows + int(threadIdx.x);
            a.delta[to] = 0.f;
            if constexpr (ENTROPY) a.r[to] = 0.f;
        }
        return;
    }

    const int group = __shfl_sync(kAllLanes, int(threadIdx.x) / kWarpgroup, 0);
    if (group == 2) {
        give_registers<24>();
        if (threadIdx.x == kConsumers) {
            Ring<S::kStages> ring;
            for (int t = range.first; t < range.end; ++t, ring.next()) {
                const uint32_t bar = full + 8 * ring.slot;
                bar_wait(empty + 8 * ring.slot, ring.parity ^ 1);
                bar_expect(bar, S::kTile + (ENTROPY ? kSide * sizeof(float) : 0));
                load_tile<PANELS, kSide>(tiles_at + ring.slot * S::kTile, codes, bar, t * kSide);
                if (ENTROPY) bulk_load(smem_address(c_at + ring.slot * kSide), a.c + int64_t(t) * kSide, kSide * sizeof(float), bar);
            }
        }
        return;
    }
    take_registers<240>();
    const int64_t row0 = int64_t(row_tile) * kSweepRows + group * 64;
    uint32_t z[PANELS * 4][4], g[PANELS * 4][4];
    load_fragments<PANELS>(z, a.z, row0);
    load_fragments<PANELS>(g, a.full, row0);
    Expectation<ENTROPY> sums;
    WarpgroupAcc<kSide> s, dp;
    Ring<S::kStages> ring;
#pragma unroll 1
    for (int t = range.first; t < range.end; ++t, ring.next()) {
        bar_wait(full + 8 * ring.slot, ring.parity);
        auto product = [&](float(&to)[kSide / 2], const uint32_t(&a)[PANELS * 4][4]) {
            products_begin();
            multiply<PANELS, kSide>(to, a, tiles_at + ring.slot * S::kTile);
            products_end();
            products_wait<0>();
            pin(to);
        };
        product(s.d, z);
        const int code0 = t * kSide;
        const auto found = sums.look(s, a.rows + row0, code0, int(a.e.rows) - code0);
        const bool live = found.any();
        // dp only for tiles with weight; all warps of the warpgroup multiply together.
        if (named_barrier_or(1 + group, kWarpgroup, live)) {
            product(dp.d, g);
            sums.add(s, [&](int i, int j) { return dp.at(i, j); }, found, a.rows + row0, c_at + ring.slot * kSide, a.to_q);
        }
        __syncwarp();  // all lanes have read c
        if (threadIdx.x % kWarp == 0) {
            if (live) a.live[(row0 / kSide) * a.ld_live + t] = 1;
            bar_arrive(empty + 8 * ring.slot);
        }
    }
    put_rows(a.delta + part * padded + row0, sums.delta, 64);
    if constexpr (ENTROPY) put_rows(a.r + part * padded + row0, sums.r, 64);
#endif
}

// ---- weights ---------------------------------------------------------------------------------------------

struct PackWeights {
    const Row* rows;
    const float* rest_q;  // of the chunk of tokens; null without entropies
    Weights* weights;
    int32_t* best;
    float* own;           // ds of the best code
    int count, padded;
};

// The weights of tokens, after delta and r are known; the padding gets weight 0.
__global__ void __launch_bounds__(kThreads) pack_weights_kernel(const __grid_constant__ PackWeights a, const float* g_sample, const float* g_avg,
                                                               const float* inv_count, float inv_t, float to_q) {
    const int n = int(blockIdx.x) * kThreads + int(threadIdx.x);
    if (n >= a.padded) return;
    Weights& w = a.weights[n / kSide];
    const int at = n % kSide;
    const Row row = a.rows[n];
    const bool there = n < a.count && row.best >= 0;
    const Factors f = factors_of(g_sample, g_avg, inv_count, inv_t, to_q);
    w.max[at] = there ? row.max : 0.f;
    w.log_p[at] = there ? log2f(row.inv_p) : -INFINITY;
    w.log_q[at] = there && a.rest_q ? -log2f(1.f + a.rest_q[n]) : -INFINITY;
    w.mean[at] = there ? row.dp_best + row.delta : 0.f;
    w.shift[at] = there && a.rest_q ? f.slope / f.to_q * row.xbar + f.avg * (row.c_best + row.r) : 0.f;
    a.best[n] = row.best;
    a.own[n] = there ? -row.inv_p * row.delta - (row.sample * row.xbar + row.avg * row.r) : 0.f;
}

// ds of one score; `d`: s - max.
template <bool ENTROPY>
__device__ __forceinline__ float weight(float d, float dp, float log_p, float log_q, float mean, float shift, float c, const Factors& f) {
    d = fmaxf(d, kNoWeight);
    float ds = exp2_approx(fmaf(d, kLog2e, log_p)) * (dp - mean);
    if constexpr (ENTROPY) ds = fmaf(exp2_approx(fmaf(d, f.to_q, log_q)), fmaf(d, f.slope, fmaf(f.avg, c, -shift)), ds);
    return ds;
}

// What the weights of a token need (Weights).
struct TokenWeight {
    float max;
    int best;
    float log_p, log_q, mean, shift;
};
// s becomes ds, for a tile of 64 codes from code0 on, of which `left` exist; the best codes get 0. dp_of(n): dp of
// accumulator n; get(i): the TokenWeight of the thread's row i.
template <bool ENTROPY, class Dp, class Get>
__device__ __forceinline__ void weigh_codes(float (&s)[kSide / 2], Dp dp_of, int code0, int left, const float* c, const Factors& f, Get get) {
    if (left < kSide) {
        const int mine = left - acc_col(0);
#pragma unroll
        for (int n = 0; n < kSide / 2; ++n)
            if (n / 4 * 8 + n % 2 >= mine) s[n] = kNoWeight;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const TokenWeight row = get(i);
        const int at = row.best - code0;
        if (__any_sync(kAllLanes, unsigned(at) < unsigned(kSide))) {
            const int mine = at - acc_col(0);
#pragma unroll
            for (int n = 0; n < kSide / 2; ++n)
                if (n / 2 % 2 == i && mine == n / 4 * 8 + n % 2) s[n] = kNoWeight;
        }
#pragma unroll
        for (int j = 0; j < kSide / 8; ++j) {
            float two[2] = {};
            if constexpr (ENTROPY) load<2>(two, c + 8 * j + acc_col(0));
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int n = 4 * j + 2 * i + h;
                s[n] = weight<ENTROPY>(s[n] - row.max, dp_of(n), row.log_p, row.log_q, row.mean, row.shift, two[h], f);
            }
        }
    }
}

// The fragments of a 64 x 64 tile of ds, rounded.
__device__ __forceinline__ void round_tile(uint32_t (&a)[4][4], const float (&d)[kSide / 2]) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[k][i] = pack_bf16x2(d[8 * k + 2 * i], d[8 * k + 2 * i + 1]);
}

// acc += ds b for a tile b of 64 rows, or acc = ds b if not `add`.
template <int PANELS> __device__ __forceinline__ void add_product(float (&acc)[PANELS * 32], const uint32_t (&ds)[4][4], uint32_t b, bool add) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
        mma<PANELS * kPanelCols, true>(acc, ds[k], mn_major(b, kSide * kPanelRowBytes) + step(k * 16 * kPanelRowBytes), add || k > 0);
}

// A tile, and which warpgroups have weight there, as one number.
__device__ __forceinline__ int marked(int t, uint8_t first, uint8_t second) { return t * 4 + (first ? 1 : 0) + (second ? 2 : 0); }
__device__ __forceinline__ int tile_in(int marked) { return marked / 4; }
__device__ __forceinline__ bool has(int marked, int group) { return (marked >> group & 1) != 0; }

// What a warpgroup does with the `count` tiles of its block, of which `mine` have weight in its rows. wait(): for the tile
// in slot `slot`; has(): whether it has weight here; scores(): starts s and dp; weigh(): ds from them; product(slot, add):
// starts acc += ds b, or acc = ds b if not `add`; skip() in place of weigh(); free(slot): after the tile's product; next().
template <int N, class Wait, class Has, class Scores, class Weigh, class Product, class Skip, class Free, class Next>
__device__ __forceinline__ void for_tiles(int count, int mine, float (&acc)[N], float (&s)[kSide / 2], float (&dp)[kSide / 2], const uint32_t& slot, Wait wait, Has has,
                                          Scores scores, Weigh weigh, Product product, Skip skip, Free free, Next next) {
    if (5 * mine > 4 * count) {
        // The product of a tile and the scores of the next are under way together.
        uint32_t before = 0;
#pragma unroll 1
        for (int n = 0; n < count; ++n) {
            wait();
            products_begin();
            product(before, n > 0);  // the first time with ds = 0
            scores();
            products_end();
            products_wait<0>();
            pin(s);
            pin(dp);
            pin(acc);
            if (n > 0) free(before);
            weigh();
            before = slot;
            next();
        }
        products_begin();
        product(before, true);
        products_end();
        products_wait<0>();
        pin(acc);
    } else {
        // Many tiles have weight only for the other warpgroup.
#pragma unroll 1
        for (int n = 0; n < count; ++n) {
            wait();
            if (has()) {
                products_begin();
                scores();
                products_end();
                products_wait<0>();
                pin(s);
                pin(dp);
                weigh();
                products_begin();
                product(slot, true);
                products_end();
                products_wait<0>();
                pin(acc);
            } else {
                skip();
            }
            free(slot);
            next();
        }
    }
}

// ---- dz --------------------------------------------------------------------------------------------------

template <int PANELS> struct HopperDz {
    static constexpr int kResident = PANELS * kSweepRows * kPanelRowBytes, kTile = PANELS * kSide * kPanelRowBytes, kStages = 3;
    static constexpr int kC = kStages * kSide * int(sizeof(float));
    // z, full, tiles; then c, the tiles' numbers, barriers, and four numbers for each row.
    static constexpr int kExtra = kC + 128 + kSweepRows * 16;
    static constexpr size_t kSmem = 2 * kResident + kStages * kTile + kExtra;
};
static_assert(HopperDz<4>::kSmem <= kMostSmem, "shared memory of a block");

template <int PANELS, bool ENTROPY>
__global__ void __launch_bounds__(kSweepThreads, 1)
hopper_dz_kernel(const __grid_constant__ Tiles tokens, const __grid_constant__ Tiles fulls, const __grid_constant__ Tiles codes, const __grid_constant__ HopperSweep a) {
#ifdef ETT_SM90A
    using S = HopperDz<PANELS>;
    extern __shared__ __align__(1024) unsigned char panels[];
    const uint32_t z_at = smem_address(panels), g_at = z_at + S::kResident, tiles_at = g_at + S::kResident;
    unsigned char* const extra = panels + 2 * S::kResident + S::kStages * S::kTile;
    float* const c_at = reinterpret_cast<float*>(extra);
    volatile int* const tile_of = reinterpret_cast<int*>(extra + S::kC);
    const uint32_t full = smem_address(extra + S::kC + 32), empty = full + 8 * S::kStages, ready = empty + 8 * S::kStages;
    float4* const rows = reinterpret_cast<float4*>(extra + S::kC + 128);
    const int part = int(blockIdx.x) / a.row_tiles, row_tile = int(blockIdx.x) - part * a.row_tiles;
    const Consecutive range = part_of((a.e.rows + kSide - 1) / kSide, part, a.parts);
    const uint8_t* const live = a.live + int64_t(row_tile) * 2 * a.ld_live;
    if (threadIdx.x == 0) {
        for (int s = 0; s < S::kStages; ++s) {
            bar_init(full + 8 * s, 1);
            bar_init(empty + 8 * s, kConsumers / kWarp);
        }
        bar_init(ready, 1);
        bar_init_done();
    }
    if (threadIdx.x < kSweepRows) {
        const Weights& w = a.weights[row_tile * 2 + int(threadIdx.x) / kSide];
        const int at = int(threadIdx.x) % kSide;
        rows[threadIdx.x] = {w.log_p[at], w.log_q[at], w.mean[at], w.shift[at]};
    }
    const int count = count_live(live, 1, a.ld_live, range), first = count_live(live, 1, 0, range), second = count_live(live + a.ld_live, 1, 0, range);
    __syncthreads();  // the barriers are initialised, the rows are visible

    const int group = __shfl_sync(kAllLanes, int(threadIdx.x) / kWarpgroup, 0);
    if (group == 2) {
        give_registers<24>();
        // Without a tile nobody waits for copies, which must not outlive the block.
        if (threadIdx.x / kWarp == kConsumers / kWarp && count > 0) {
            const bool lead = threadIdx.x % kWarp == 0;
            if (lead) {
                bar_expect(ready, 2 * S::kResident);
                load_tile<PANELS, kSweepRows>(z_at, tokens, ready, row_tile * kSweepRows);
                load_tile<PANELS, kSweepRows>(g_at, fulls, ready, row_tile * kSweepRows);
            }
            Ring<S::kStages> ring;
            for_live(live, 1, a.ld_live, range, [&](int t) {
                if (lead) {
                    const uint32_t bar = full + 8 * ring.slot;
                    bar_wait(empty + 8 * ring.slot, ring.parity ^ 1);
                    tile_of[ring.slot] = marked(t, live[t], live[t + a.ld_live]);
                    bar_expect(bar, S::kTile + (ENTROPY ? kSide * sizeof(float) : 0));
                    load_tile<PANELS, kSide>(tiles_at + ring.slot * S::kTile, codes, bar, t * kSide);
                    if (ENTROPY) bulk_load(smem_address(c_at + ring.slot * kSide), a.c + int64_t(t) * kSide, kSide * sizeof(float), bar);
                }
                __syncwarp();
                ring.next();
            });
        }
        return;
    }
    take_registers<240>();
    const Factors f = factors_of(a.g_sample, a.g_avg, a.inv_count, a.inv_t, a.to_q);
    const int64_t row0 = int64_t(row_tile) * kSweepRows + group * 64;
    float max[2];
    int best[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        max[i] = a.weights[row0 / kSide].max[acc_row(i)];
        best[i] = a.best[row0 + acc_row(i)];
    }
    float acc[PANELS * 32];
#pragma unroll
    for (int i = 0; i < PANELS * 32; ++i) acc[i] = 0.f;
    float s[kSide / 2], dp[kSide / 2];
    uint32_t ds[4][4] = {};  // of the tile before; the first time, of no tile
    Ring<S::kStages> here;
    auto scores = [&] {
        // opaque: keeps the many addresses out of registers.
        const uint32_t own = uint32_t(opaque(int(z_at + group * 64 * kPanelRowBytes))), tile = uint32_t(opaque(int(tiles_at + here.slot * S::kTile)));
        multiply<PANELS, kSide, kSweepRows>(s, own, tile);
        multiply<PANELS, kSide, kSweepRows>(dp, own + S::kResident, tile);
    };
    auto weigh = [&] {
        const int code0 = tile_in(tile_of[here.slot]) * kSide;
        auto row = [&](int i) {
            const float4 r = rows[group * 64 + acc_row(i)];
            return TokenWeight{max[i], best[i], r.x, r.y, r.z, r.w};
        };
        weigh_codes<ENTROPY>(s, [&](int n) { return dp[n]; }, code0, int(a.e.rows) - code0, c_at + here.slot * kSide, f, row);
        round_tile(ds, s);
    };
    auto product = [&](uint32_t slot, bool add) { add_product<PANELS>(acc, ds, tiles_at + slot * S::kTile, add); };
    auto free = [&](uint32_t slot) {
        __syncwarp();  // all lanes have read tile_of
        if (threadIdx.x % kWarp == 0) bar_arrive(empty + 8 * slot);
    };
    if (count > 0) {
        bar_wait(ready, 0);
        for_tiles(count, group ? second : first, acc, s, dp, here.slot, [&] { bar_wait(full + 8 * here.slot, here.parity); },
                  [&] { return has(tile_of[here.slot], group); }, scores, weigh, product, [] {}, free, [&] { here.next(); });
    }
    float* const to = a.sums + (int64_t(part) * a.row_tiles * kSweepRows + row0) * a.z.cols;
#pragma unroll
    for (int n = 0; n < PANELS * 32; n += 2) {
        const int col = n / 4 * 8 + acc_col(0);
        const float two[2] = {acc[n], acc[n + 1]};
        if (col < a.z.cols) store<2>(to + acc_row(n / 2 % 2) * a.z.cols + col, two);
    }
#endif
}

// Two neighbouring elements: to = v, or to += v with `add`; `pair`: as one access.
__device__ __forceinline__ void put_pair(float* to, float v0, float v1, bool add, bool pair) {
    float two[2] = {};
    if (add && pair) load<2>(two, to);
    if (add && !pair) two[0] = to[0], two[1] = to[1];
    two[0] += v0, two[1] += v1;
    if (pair)
        store<2>(to, two);
    else
        to[0] = two[0], to[1] = two[1];
}

// ---- de --------------------------------------------------------------------------------------------------

template <int PANELS> struct HopperDe {
    static constexpr int kResident = PANELS * kSweepRows * kPanelRowBytes, kTile = PANELS * kSide * kPanelRowBytes;
    static constexpr int kZStages = 3, kGStages = 2;  // z is needed until its product has ended, full only for dp
    static constexpr int kWeights = kGStages * int(sizeof(Weights));
    // e, z, full; then the weights, the tiles' numbers and the barriers.
    static constexpr size_t kSmem = kResident + (kZStages + kGStages) * kTile + kWeights + 128;
};
static_assert(HopperDe<4>::kSmem <= kMostSmem, "shared memory of a block");

template <int PANELS, bool ENTROPY>
__global__ void __launch_bounds__(kSweepThreads, 1)
hopper_de_kernel(const __grid_constant__ Tiles tokens, const __grid_constant__ Tiles fulls, const __grid_constant__ Tiles codes, const __grid_constant__ HopperSweep a) {
#ifdef ETT_SM90A
    using S = HopperDe<PANELS>;
    extern __shared__ __align__(1024) unsigned char panels[];
    const uint32_t e_at = smem_address(panels), z_at = e_at + S::kResident, g_at = z_at + S::kZStages * S::kTile;
    unsigned char* const extra = panels + S::kResident + (S::kZStages + S::kGStages) * S::kTile;
    const Weights* const weights = reinterpret_cast<const Weights*>(extra);
    volatile int* const tile_of = reinterpret_cast<int*>(extra + S::kWeights);
    const uint32_t z_full = smem_address(extra + S::kWeights + 16), z_empty = z_full + 8 * S::kZStages, g_full = z_empty + 8 * S::kZStages,
                   g_empty = g_full + 8 * S::kGStages, ready = g_empty + 8 * S::kGStages;
    const int code_tiles = int((a.e.rows + kSweepRows - 1) / kSweepRows), part = int(blockIdx.x) / code_tiles, code_tile = int(blockIdx.x) - part * code_tiles;
    const Consecutive range = part_of((a.z.rows + kSide - 1) / kSide, part, a.parts);
    const uint8_t* const live = a.live + int64_t(code_tile) * 2;
    const int64_t other = (int64_t(code_tile) * 2 + 1) * kSide < a.e.rows ? 1 : 0;  // the last tile may have no neighbour
    if (threadIdx.x == 0) {
        for (int s = 0; s < S::kZStages; ++s) {
            bar_init(z_full + 8 * s, 1);
            bar_init(z_empty + 8 * s, kConsumers / kWarp);
        }
        for (int s = 0; s < S::kGStages; ++s) {
            bar_init(g_full + 8 * s, 1);
            bar_init(g_empty + 8 * s, kConsumers / kWarp);
        }
        bar_init(ready, 1);
        bar_init_done();
    }
    const int count = count_live(live, a.ld_live, other, range);
    const int first = count_live(live, a.ld_live, 0, range), second = count_live(live + other, a.ld_live, 0, range);
    __syncthreads();  // the barriers are initialised
    if (count == 0 && a.parts == 1) return;

    const int group = __shfl_sync(kAllLanes, int(threadIdx.x) / kWarpgroup, 0);
    if (group == 2) {
        give_registers<24>();
        if (threadIdx.x / kWarp == kConsumers / kWarp && count > 0) {
            const bool lead = threadIdx.x % kWarp == 0;
            if (lead) {
                bar_expect(ready, S::kResident);
                load_tile<PANELS, kSweepRows>(e_at, codes, ready, code_tile * kSweepRows);
            }
            Ring<S::kZStages> z;
            Ring<S::kGStages> g;
            for_live(live, a.ld_live, other, range, [&](int t) {
                if (lead) {
                    const uint32_t z_bar = z_full + 8 * z.slot, g_bar = g_full + 8 * g.slot;
                    bar_wait(z_empty + 8 * z.slot, z.parity ^ 1);
                    bar_expect(z_bar, S::kTile);
                    load_tile<PANELS, kSide>(z_at + z.slot * S::kTile, tokens, z_bar, t * kSide);
                    bar_wait(g_empty + 8 * g.slot, g.parity ^ 1);
                    tile_of[g.slot] = marked(t, live[t * a.ld_live], live[t * a.ld_live + other]);
                    bar_expect(g_bar, S::kTile + sizeof(Weights));
                    load_tile<PANELS, kSide>(g_at + g.slot * S::kTile, fulls, g_bar, t * kSide);
                    bulk_load(smem_address(weights + g.slot), a.weights + t, sizeof(Weights), g_bar);
                }
                __syncwarp();
                z.next();
                g.next();
            });
        }
        return;
    }
    take_registers<240>();
    const Factors f = factors_of(a.g_sample, a.g_avg, a.inv_count, a.inv_t, a.to_q);
    const int row0 = code_tile * kSweepRows + group * 64;
    float c[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i)
        if (ENTROPY && row0 + acc_row(i) < a.e.rows) c[i] = a.c[row0 + acc_row(i)];
    float acc[PANELS * 32];
#pragma unroll
    for (int i = 0; i < PANELS * 32; ++i) acc[i] = 0.f;
    float s[kSide / 2], dp[kSide / 2];
    uint32_t ds[4][4] = {};  // of the tile before; the first time, of no tile
    Ring<S::kZStages> z_here;
    Ring<S::kGStages> g_here;
    auto scores = [&] {
        multiply<PANELS, kSide, kSweepRows>(s, e_at + group * 64 * kPanelRowBytes, z_at + z_here.slot * S::kTile);
        multiply<PANELS, kSide, kSweepRows>(dp, e_at + group * 64 * kPanelRowBytes, g_at + g_here.slot * S::kTile);
    };
    // full and the weights of the tile are no longer needed.
    auto free_g = [&] {
        __syncwarp();
        if (threadIdx.x % kWarp == 0) bar_arrive(g_empty + 8 * g_here.slot);
        g_here.next();
    };
    auto weigh = [&] {
        const Weights& w = weights[g_here.slot];
        // Leave out the best codes. Few tiles have one, so look at all tokens at once first.
        const int32_t* const best = a.best + tile_in(tile_of[g_here.slot]) * kSide;
        const int lane = int(threadIdx.x) % kWarp;
        if (__any_sync(kAllLanes, unsigned(best[lane] - row0) < 64u || unsigned(best[lane + kWarp] - row0) < 64u)) {
#pragma unroll
            for (int n = 0; n < kSide / 2; ++n)
                if (best[n / 4 * 8 + acc_col(n % 2)] - row0 == acc_row(n / 2 % 2)) s[n] = kNoWeight;
        }
#pragma unroll
        for (int j = 0; j < kSide / 8; ++j) {
            const int at = 8 * j + acc_col(0);
            float max[2], log_p[2], log_q[2] = {}, mean[2], shift[2] = {};
            load<2>(max, w.max + at);
            load<2>(log_p, w.log_p + at);
            load<2>(mean, w.mean + at);
            if constexpr (ENTROPY) {
                load<2>(log_q, w.log_q + at);
                load<2>(shift, w.shift + at);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int n = 4 * j + 2 * i + h;
                    s[n] = weight<ENTROPY>(s[n] - max[h], dp[n], log_p[h], log_q[h], mean[h], shift[h], c[i], f);
                }
        }
        round_tile(ds, s);
        free_g();
    };
    auto wait = [&] {
        bar_wait(z_full + 8 * z_here.slot, z_here.parity);
        bar_wait(g_full + 8 * g_here.slot, g_here.parity);
    };
    auto product = [&](uint32_t slot, bool add) { add_product<PANELS>(acc, ds, z_at + slot * S::kTile, add); };
    auto free = [&](uint32_t slot) {
        if (threadIdx.x % kWarp == 0) bar_arrive(z_empty + 8 * slot);
    };
    if (count > 0) {
        bar_wait(ready, 0);
        for_tiles(count, group ? second : first, acc, s, dp, z_here.slot, wait, [&] { return has(tile_of[g_here.slot], group); }, scores, weigh, product, free_g,
                  free, [&] { z_here.next(); });
    }
    const bool whole = a.parts == 1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t row = row0 + acc_row(i);
        if (row >= a.e.rows) continue;
        float* const to = whole ? a.de + row * a.ld_de : a.sums + (part * a.e.rows + row) * a.z.cols;
#pragma unroll
        for (int j = 0; j < PANELS * 8; ++j)
            if (const int col = 8 * j + acc_col(0); col < a.z.cols)  // D is a multiple of 8
                put_pair(to + col, acc[4 * j + 2 * i], acc[4 * j + 2 * i + 1], whole, a.pairs || !whole);
    }
#endif
}

// Adds the parts of de, in order.
__global__ void __launch_bounds__(kThreads) add_de_kernel(float* de, int64_t ld, const float* parts, int count, int64_t codes, int64_t dim) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= codes * dim) return;
    const int64_t row = i / dim;
    float sum = de[row * ld + i - row * dim];
    for (int p = 0; p < count; ++p) sum += parts[p * codes * dim + i];
    de[row * ld + i - row * dim] = sum;
}

}  // namespace
}  // namespace codebook
}  // namespace ett
#endif  // ETT_SHIM
