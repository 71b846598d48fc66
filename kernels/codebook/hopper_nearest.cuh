// hopper_nearest.cuh: the best code of each token on Hopper ("hopper" and "hopper_split" of nearest.cu).
//
// A block keeps 128 tokens, 64 for each of two warpgroups, and a warp of a third warpgroup copies one tile of 128 codes
// after the other to shared memory. All blocks copy the same tiles at the same time, so that most reads hit the L2.
// A warpgroup has two sets of accumulators: while the products of a tile run, it looks for the best scores of the
// previous tile. Up to 256 dimensions of the tokens stay in registers, as fragments of the products; the others, or
// the low parts of f32 tokens, in shared memory.
#pragma once

#include "gemm.cuh"
#include "hopper.cuh"
#include "operands.cuh"

namespace ett {
namespace codebook {

// Where a block writes the best codes of its rows: element part * M + row of `k` and, unless null, their scores to `v`.
struct Result {
    int32_t* k;
    float* v;
};

namespace hopper_nearest {

inline constexpr int kTokens = 128, kCodes = 128;  // of a block and of a tile
inline constexpr int kMostCols = 512, kMostSplitCols = 256;

// Where half[k] = |e_k|^2 / 2 is stored: the four values that a thread needs of 16 codes are neighbours.
__device__ __forceinline__ int64_t half_place(int64_t k) { return (k & ~int64_t(15)) + (k % 8 / 2 * 4 + k / 8 % 2 * 2 + k % 2); }

// Columns of a packed part, of which a row has two.
inline int64_t split_cols(int64_t d) { return round_up(d, 128); }
// Codes per chunk of the packed ones.
inline int64_t split_chunk(int64_t codes, int64_t d) { return chunk_rows(codes, split_cols(d) * 4, kPackBytes, 2 * kCodes); }

// Whether these kernels run on the current device. `plan`: also without a device, for workspace queries.
inline bool on_hopper(bool plan) {
#ifdef ETT_SHIM
    return plan && false;
#else
    return plan ? hopper::plan_hopper() : hopper::is_hopper();
#endif
}

#ifndef ETT_SHIM
using namespace hopper;

inline constexpr int kRegPanels = kMostSplitCols / kPanelCols;  // of the tokens in registers, at most
inline constexpr int kPanelBytes = kCodes * kPanelRowBytes;
inline constexpr int kThreads = 3 * kWarpgroup;

// PANELS: 64 dimensions each. SPLIT: operands of two parts, high and low; all panels of the high parts of the codes
// precede those of the low parts.
template <int PANELS, bool SPLIT> struct Config {
    static constexpr bool kSplit = SPLIT;
    static constexpr int kPanels = PANELS, kInRegisters = std::min(PANELS, kRegPanels), kInSmem = SPLIT ? PANELS : PANELS - kInRegisters;
    static_assert(!SPLIT || PANELS <= kRegPanels);
    static constexpr int kTilePanels = SPLIT ? 2 * PANELS : PANELS;
    static constexpr int kStagePanels = kTilePanels % 2 == 0 ? 2 : kTilePanels, kSteps = kTilePanels / kStagePanels;
    static constexpr int kStageBytes = kStagePanels * kPanelBytes;
    static constexpr int kTokenBytes = kInSmem * kPanelBytes;
    // Tokens on their way to registers lie in the last stages, which are filled later.
    static constexpr int kTokenStages = kInRegisters / kStagePanels;
    static_assert(kTokenStages * kStagePanels == kInRegisters);
    // Half norms are copied with the first stage of a tile; they are read after its products, when the next tiles are
    // being copied.
    static constexpr int halves(int stages) { return stages / kSteps + 2; }
    static constexpr int smem(int stages) { return 1024 + kTokenBytes + stages * (kStageBytes + 2 * 8) + 2 * 8 + halves(stages) * kCodes * 4; }
    static constexpr int stages() {
        int n = 8;
        while (smem(n) > kMostSmem) --n;
        return n;
    }
    static constexpr int kStages = stages(), kHalves = halves(kStages), kSmem = smem(kStages);
    static_assert(kStages > kSteps && kStages > kTokenStages);
};

// The arguments of a sweep besides the maps.
template <class T> struct Sweep {
    gemm::Matrix<T> z;
    int32_t codes, first;  // the number of codes, and the index of the first
    const float* half;     // half norms of these codes, padded to an even number of tiles; null for the dot product
    Result out;
    bool resume;      // `out` holds the results of codes before `first`
    bool wide_boxes;  // a copy moves all panels of a stage
    int row_tiles, parts;
};

// The best code so far of each of a thread's two rows; the same in the four lanes that share the rows.
struct Best {
    float v[2];
    int32_t k[2];
};

// Updates `best` with the scores of a tile, of which `valid` codes exist.
template <bool L2> __device__ __forceinline__ void take(float (&d)[64], Best& best, int32_t code0, int valid, const float* half) {
    const int mine = acc_col(0);
    if (valid < kCodes) {
#pragma unroll
        for (int j = 0; j < 16; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c)
                if (8 * j + mine + c >= valid) d[4 * j + c] = d[4 * j + 2 + c] = -INFINITY;
    }
    auto halves = [&](int j) { return L2 ? *reinterpret_cast<const float4*>(half + j * 8 + 2 * mine) : float4{}; };  // j even
    auto score = [&](int j, int i, int c, const float4& h) {
        const float s = d[4 * j + 2 * i + c];
        return L2 ? s - (j % 2 == 0 ? (c == 0 ? h.x : h.y) : (c == 0 ? h.z : h.w)) : s;
    };
    // Most tiles have no better code for any row of the warp, so compare only the maxima first. They ignore NaN.
    float top[2][2] = {{best.v[0], best.v[0]}, {best.v[1], best.v[1]}};
    float4 h = {};
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        if (j % 2 == 0) h = halves(j);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int c = 0; c < 2; ++c) top[i][c] = fmaxf(top[i][c], score(j, i, c, h));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) top[i][0] = fmaxf(top[i][0], top[i][1]);
    if (!__any_sync(kAllLanes, top[0][0] > best.v[0] || top[1][0] > best.v[1])) return;
    int at[2] = {0, 0};
#pragma unroll
    for (int j = 15; j >= 0; --j) {
        if (j % 2 == 1) h = halves(j - 1);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int c = 1; c >= 0; --c) at[i] = score(j, i, c, h) == top[i][0] ? 8 * j + c : at[i];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (top[i][0] > best.v[i]) {
            best.v[i] = top[i][0];
            best.k[i] = code0 + mine + at[i];
        }
#pragma unroll
        for (int lane = 1; lane <= 2; lane *= 2) {
            const float v = __shfl_xor_sync(kAllLanes, best.v[i], lane);
            const int32_t k = __shfl_xor_sync(kAllLanes, best.k[i], lane);
            if (v > best.v[i] || (v == best.v[i] && k < best.k[i])) {
                best.v[i] = v;
                best.k[i] = k;
            }
        }
    }
}

template <class C, class T, bool L2>
__global__ void __launch_bounds__(kThreads, 1)
nearest_kernel(const __grid_constant__ CUtensorMap codes_map, const __grid_constant__ CUtensorMap tokens_map, const Sweep<T> s) {
#ifdef ETT_SM90A
    ETT_DYNAMIC_SMEM(raw);
    unsigned char* const smem = panel_smem(raw);
    const uint32_t tokens = smem_address(smem), stages = tokens + C::kTokenBytes;
    const uint32_t staged = stages + (C::kStages - C::kTokenStages) * C::kStageBytes;
    float* const halves = reinterpret_cast<float*>(smem + C::kTokenBytes + C::kStages * C::kStageBytes);
    const uint32_t full = smem_address(halves + C::kHalves * kCodes), empty = full + 8 * C::kStages;
    const uint32_t tokens_full = empty + 8 * C::kStages, tokens_read = tokens_full + 8;
    const int part = int(blockIdx.x) / s.row_tiles;
    const int64_t row0 = int64_t(int(blockIdx.x) - part * s.row_tiles) * kTokens;
    const Consecutive pairs = part_of((int64_t(s.codes) + 2 * kCodes - 1) / (2 * kCodes), part, s.parts);  // of tiles
    const int group = __shfl_sync(kAllLanes, int(threadIdx.x) / kWarpgroup, 0);

    if (threadIdx.x == 0) {
        for (int i = 0; i < C::kStages; ++i) {
            bar_init(full + 8 * i, 1);
            bar_init(empty + 8 * i, 2 * kWarpgroup / kWarp);
        }
        bar_init(tokens_full, 1);
        bar_init(tokens_read, 2 * kWarpgroup / kWarp);
        bar_init_done();
    }
    __syncthreads();  // the barriers are visible

    if (group == 2) {
        give_registers<40>();
        if (threadIdx.x != 2 * kWarpgroup) return;
        if constexpr (!C::kSplit) {
            bar_expect(tokens_full, C::kPanels * kPanelBytes);
#pragma unroll
            for (int p = 0; p < C::kPanels; ++p)
                tma_load(p < C::kInRegisters ? staged + p * kPanelBytes : tokens + (p - C::kInRegisters) * kPanelBytes, &tokens_map, tokens_full,
                         p * kPanelCols, int(row0));
        }
        Ring<C::kStages> to;
        to.parity = 1;
        int half = 0;
#pragma unroll 1
        for (int t = 2 * pairs.first; t < 2 * pairs.end; ++t) {
#pragma unroll 1
            for (int step = 0; step < C::kSteps; ++step, to.next()) {
                const uint32_t bar = full + 8 * to.slot, at = stages + to.slot * C::kStageBytes;
                bar_wait(empty + 8 * to.slot, to.parity);
                if (!C::kSplit && to.slot == C::kStages - C::kTokenStages) bar_wait(tokens_read, 0);
                const bool norms = L2 && step == 0;
                bar_expect(bar, C::kStageBytes + (norms ? kCodes * 4 : 0));
                if (norms) {
                    bulk_load(smem_address(halves + half * kCodes), s.half + int64_t(t) * kCodes, kCodes * 4, bar);
                    half = half + 1 == C::kHalves ? 0 : half + 1;
                }
                if (C::kStagePanels == 2 && s.wide_boxes) {
                    tma_load(at, &codes_map, bar, 0, t * kCodes, step * 2);
                } else {
#pragma unroll
                    for (int p = 0; p < C::kStagePanels; ++p)
                        tma_load(at + p * kPanelBytes, &codes_map, bar, (step * C::kStagePanels + p) * kPanelCols, t * kCodes);
                }
            }
        }
        return;
    }

    take_registers<232>();
    // The tokens: fragment k holds dimensions [16 k, 16 k + 16).
    uint32_t z[C::kInRegisters * 4][4];
    const uint32_t mine = group * (kPanelBytes / 2);  // of the warpgroup in a panel
    if constexpr (C::kSplit) {
#pragma unroll
        for (int k = 0; k < C::kPanels * 4; ++k) {
#pragma unroll
            for (int f = 0; f < 4; ++f) {
                const int r = acc_row(f % 2), col = 16 * k + 8 * (f / 2) + acc_col(0);
                const int64_t row = row0 + group * 64 + r;
                float v[2][2];  // of two columns: high and low part
#pragma unroll
                for (int c = 0; c < 2; ++c) cut<2>(row < s.z.rows && col + c < s.z.cols ? to_float(s.z.p[row * s.z.ld + col + c]) : 0.f, v[c]);
                z[k][f] = pack_bf16x2(v[0][0], v[1][0]);
                store_shared(tokens + k / 4 * kPanelBytes + mine + r * kPanelRowBytes + ((k % 4 * 2 + f / 2) ^ r % 8) * 16 + acc_col(0) * 2,
                             pack_bf16x2(v[0][1], v[1][1]));
            }
        }
        proxy_fence();
        named_barrier(1 + group, kWarpgroup);  // the warpgroup's tokens are visible to its products
    } else {
        bar_wait(tokens_full, 0);
        const int lane = int(threadIdx.x) % kWarp, r = int(threadIdx.x) % kWarpgroup / kWarp * 16 + lane % 16;
#pragma unroll
        for (int k = 0; k < C::kInRegisters * 4; ++k)
            ldmatrix_x4(z[k], staged + k / 4 * kPanelBytes + mine + r * kPanelRowBytes + ((k % 4 * 2 + lane / 16) ^ r % 8) * 16);
        __syncwarp();
        if (lane == 0) bar_arrive(tokens_read);
    }

    Best best;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t row = row0 + group * 64 + acc_row(i);
        const bool old = s.resume && row < s.z.rows;
        best.v[i] = old ? s.out.v[part * s.z.rows + row] : -INFINITY;
        best.k[i] = old ? s.out.k[part * s.z.rows + row] : 0;
    }

    Ring<C::kStages> next, done;  // of the products to start, and of those to end
    // Starts the products of stage `step` of a tile.
    auto start = [&](float (&d)[64], int step) {
        bar_wait(full + 8 * next.slot, next.parity);
        const uint32_t codes = k_major(stages + next.slot * C::kStageBytes);
        next.next();
        products_begin();
#pragma unroll
        for (int p = 0; p < C::kStagePanels; ++p) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int panel = step * C::kStagePanels + p, of_z = panel % C::kPanels;
                const uint32_t b = codes + hopper::step(p * kPanelBytes + k * 32);
                const uint32_t a = k_major(tokens + mine) + hopper::step(k * 32);
                if (of_z < C::kInRegisters)
                    mma<kCodes, false>(d, z[of_z % C::kInRegisters * 4 + k], b, panel + k > 0);
                else
                    mma<kCodes, false, false>(d, a + hopper::step((of_z - C::kInRegisters) * kPanelBytes), b, true);
                if (C::kSplit && panel < C::kPanels) mma<kCodes, false, false>(d, a + hopper::step(of_z * kPanelBytes), b, true);
            }
        }
        products_end();
    };
    // Gives the oldest stage back to the copies.
    auto release = [&] {
        __syncwarp();
        if (threadIdx.x % kWarp == 0) bar_arrive(empty + 8 * done.slot);
        done.next();
    };
    int half = 0;
    auto look = [&](float (&d)[64], int t) {
        take<L2>(d, best, s.first + t * kCodes, s.codes - t * kCodes, halves + half * kCodes);
        half = half + 1 == C::kHalves ? 0 : half + 1;
    };
    constexpr int kHeld = C::kSteps < 2 ? 1 : 2;  // stages of a tile that are not released before its end
    // Ends the products of tile t, starts those of the next one, and looks at the scores of tile t meanwhile. Only a wait
    // for all products tells ptxas, across iterations, that accumulators may be read; the other warpgroup fills the gap.
    auto turn = [&](float (&d)[64], float (&d_next)[64], int t) {
        products_wait<0>();
        pin(d);
#pragma unroll
        for (int i = 0; i < kHeld; ++i) release();
        start(d_next, 0);
        if constexpr (C::kSteps > 1) start(d_next, 1);
        look(d, t);
#pragma unroll
        for (int step = 2; step < C::kSteps; ++step) {
            products_wait<1>();
            release();
            start(d_next, step);
        }
    };

    if (pairs.first < pairs.end) {
        float d0[64], d1[64];
#pragma unroll
        for (int step = 0; step < C::kSteps; ++step) {
            if (step >= 2) {
                products_wait<1>();
                release();
            }
            start(d0, step);
        }
        int t = 2 * pairs.first;
#pragma unroll 1
        for (; t + 2 < 2 * pairs.end; t += 2) {
            turn(d0, d1, t);
            turn(d1, d0, t + 1);
        }
        turn(d0, d1, t);
        products_wait<0>();
        pin(d1);
        look(d1, t + 1);
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t row = row0 + group * 64 + acc_row(i);
        if (threadIdx.x % 4 != 0 || row >= s.z.rows) continue;
        s.out.k[part * s.z.rows + row] = best.k[i];
        if (s.out.v) s.out.v[part * s.z.rows + row] = best.v[i];
    }
#endif
}

// ---- host ------------------------------------------------------------------------------------------------

template <class C, class T> int32_t launch_config(const CUtensorMap& codes, const CUtensorMap& tokens, const Sweep<T>& s, const ett_launch* l) {
    return launch("nearest", s.half ? nearest_kernel<C, T, true> : nearest_kernel<C, T, false>, dim3(unsigned(s.row_tiles * s.parts)),
                  dim3(kThreads), C::kSmem, l, codes, tokens, s);
}

// "hopper": bf16 codes in place.
inline int32_t launch_bf16(const gemm::Matrix<bf16>& e, Sweep<bf16> s, const ett_launch* l) {
    CUtensorMap codes, tokens;
    s.wide_boxes = e.cols % (2 * kPanelCols) == 0;
    int32_t status = s.wide_boxes ? make_panels_map("nearest", &codes, e.p, e.rows, e.cols, e.ld, kCodes, 2)
                                  : make_panel_map("nearest", &codes, e.p, e.rows, e.cols, e.ld, kCodes);
    if (status == ETT_OK) status = make_panel_map("nearest", &tokens, s.z.p, s.z.rows, s.z.cols, s.z.ld, kTokens);
    if (status != ETT_OK) return status;
    switch (ceil_div(e.cols, kPanelCols)) {
    case 1: return launch_config<Config<1, false>>(codes, tokens, s, l);
    case 2: return launch_config<Config<2, false>>(codes, tokens, s, l);
    case 3: return launch_config<Config<3, false>>(codes, tokens, s, l);
    case 4: return launch_config<Config<4, false>>(codes, tokens, s, l);
    case 5:
    case 6: return launch_config<Config<6, false>>(codes, tokens, s, l);
    default: return launch_config<Config<8, false>>(codes, tokens, s, l);
    }
}

// "hopper_split": f32 codes, packed into `space` one chunk at a time; `s` describes the whole.
inline int32_t launch_split(const gemm::Matrix<float>& e, Sweep<float> s, bf16* space, const ett_launch* l) {
    const int64_t part = split_cols(e.cols), chunk = split_chunk(e.rows, e.cols);
    const float* const half = s.half;
    int32_t status = ETT_OK;
    for (int64_t first = 0; first < e.rows && status == ETT_OK; first += chunk) {
        gemm::Matrix<float> from = e;
        from.p += first * e.ld;
        from.rows = std::min(chunk, e.rows - first);
        const dim3 grid(unsigned(std::min(ceil_div(from.rows * part / 8, kPackThreads), int64_t(multiprocessors()) * 16)));
        status = launch("nearest", pack_kernel<float, 2>, grid, dim3(kPackThreads), 0, l, from, space, part);
        CUtensorMap map;
        if (status == ETT_OK) status = make_panels_map("nearest", &map, space, from.rows, 2 * part, 2 * part, kCodes, 2);
        if (status != ETT_OK) return status;
        s.codes = int32_t(from.rows);
        s.first = int32_t(first);
        s.half = half ? half + first : nullptr;
        s.resume = first > 0;
        s.wide_boxes = true;
        status = part == 2 * kPanelCols ? launch_config<Config<2, true>>(map, map, s, l) : launch_config<Config<4, true>>(map, map, s, l);
    }
    return status;
}

#endif  // ETT_SHIM
}  // namespace hopper_nearest
}  // namespace codebook
}  // namespace ett
