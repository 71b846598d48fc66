// hopper_matmul.cuh: the products of matmul.cu on Hopper: bf16, by wgmma, with operands and results copied by TMA.
//
// A block computes tiles of 128 rows, one after the other. One thread fills a ring of stages, each 64 of the inner
// dimension of both operands; two warpgroups multiply them, 64 rows each, and share nothing but the ring: while one stores
// its part of a tile, the other may multiply, and the stages of the next tile arrive. Two blocks of a cluster compute tiles
// below each other and load half of b's tile each, for both, which saves a third of the traffic from the L2.
//
// Tiles are 256 columns wide, or narrower where that fills more multiprocessors. If too few tiles are left for a last
// round of all multiprocessors, these are divided into narrower pieces. A value does not depend on the tile's width.
#pragma once

#include "activation.cuh"
#include "hopper.cuh"

#ifndef ETT_SHIM

namespace ett {
namespace hopper {

// Rows of a tile, and of a warpgroup's part of it; most columns of a tile; depth of a stage.
inline constexpr int kTileRows = 128, kPartRows = 64, kMostCols = 256, kDepth = 64;
inline constexpr int kThreads = 3 * kWarpgroup;
inline constexpr int kPanel = 64 * kPanelRowBytes;  // bytes of a panel of 64 rows
// Shared memory: the ring, whose stages are larger or smaller with the tile; 4 KB per warp to store from; the bias, per
// warpgroup; barriers, for both widths of tiles.
inline constexpr int kRing = 4 * 6 * kPanel, kMostStages = 8;
inline constexpr int kStores = kRing, kBias = kStores + 4 * kPanel, kBars = kBias + 2 * kMostCols * 2;
inline constexpr int kSmem = kBars + 2 * 2 * kMostStages * 8 + 1024;
static_assert(kSmem <= kMostSmem);

// Tiles are computed in bands of this many rows of the matrix, column by column, so that blocks that run at the same time
// share their operands in the L2.
inline constexpr int kBandRows = 2048;

// Which tiles there are: the matrix is divided into tiles of width[0] columns; the first `whole` are computed as they are,
// the others as `pieces` pieces of width[1] each.
struct Plan {
    int cluster, width[2], whole, pieces;
};

// What becomes of the sums. bias may be null.
struct ProductOutput {
    const bf16* bias;
    bf16 *y, *pre;
    float* y_acc;
    int64_t ld, ld_pre;
    int rows, cols, depth;
    bool vectors;  // y and pre may be stored in pieces of 16 bytes
    Plan plan;
};

__host__ __device__ constexpr int panels_of(int width) { return (width + kPanelCols - 1) / kPanelCols; }
__host__ __device__ constexpr int stage_bytes(int width) { return (2 + panels_of(width)) * kPanel; }
__host__ __device__ constexpr int stages_of(int width) { return kRing / stage_bytes(width) < kMostStages ? kRing / stage_bytes(width) : kMostStages; }

#ifdef ETT_SM90A

// The work of a cluster in one phase: phase 0 are the whole tiles, phase 1 the pieces; and its ring.
template <int CLUSTER> struct Phase {
    int phase, width, items, tile_rows, tile_cols, stages, stage;
    uint32_t full, empty;
    uint32_t slot = 0, parity = 0;

    __device__ __forceinline__ Phase(int number, const ProductOutput& out, uint32_t smem)
        : phase(number), width(out.plan.width[number]), tile_rows((out.rows + CLUSTER * kTileRows - 1) / (CLUSTER * kTileRows)),
          tile_cols((out.cols + out.plan.width[0] - 1) / out.plan.width[0]), stages(stages_of(width)), stage(stage_bytes(width)),
          full(smem + kBars + number * 2 * kMostStages * 8), empty(full + kMostStages * 8) {
        items = number == 0 ? out.plan.whole : (tile_rows * tile_cols - out.plan.whole) * out.plan.pieces;
    }
    __device__ __forceinline__ void next() {
        if (++slot == stages) slot = 0, parity ^= 1;
    }
    // The first row and column of an item.
    __device__ __forceinline__ int2 place(const Plan& plan, int item, int rank) const {
        constexpr int kBand = kBandRows / (CLUSTER * kTileRows);
        const int tile = phase == 0 ? item : plan.whole + item / plan.pieces, piece = phase == 0 ? 0 : item % plan.pieces;
        const int first = tile / (kBand * tile_cols) * kBand, height = min(tile_rows - first, kBand);
        const int in_band = tile - first * tile_cols;
        return {((first + in_band % height) * CLUSTER + rank) * kTileRows, in_band / height * plan.width[0] + piece * width};
    }
};

// acc = the sums of the warpgroup's rows and the tile's COLS columns.
template <int COLS, int CLUSTER, bool TA, bool TB>
__device__ __forceinline__ void multiply_part(float (&acc)[kMostCols / 2], Phase<CLUSTER>& phase, uint32_t ring, int part, int steps) {
    const int lane = int(threadIdx.x) % 32;
    uint32_t before = 0;
    auto release = [&] {
        if constexpr (CLUSTER > 1) {
            if (lane < CLUSTER) bar_arrive_at(lane, phase.empty + before * 8);
        } else {
            if (lane == 0) bar_arrive(phase.empty + before * 8);
        }
    };
#pragma unroll 1
    for (int k = 0; k < steps; ++k) {
        const uint32_t a = ring + phase.slot * stage_bytes(COLS) + part * kPanel, b = ring + phase.slot * stage_bytes(COLS) + 2 * kPanel;
        const uint32_t low_a = TA ? mn_major(a, kPanel) : k_major(a), low_b = TB ? k_major(b) : mn_major(b, kPanel);
        bar_wait(phase.full + phase.slot * 8, phase.parity);
        products_begin();
#pragma unroll
        for (int s = 0; s < kDepth / 16; ++s)
            mma<COLS, TA, !TB>(acc, low_a + s * step(TA ? 2048 : 32), low_b + s * step(TB ? 32 : 2048), k > 0 || s > 0);
        products_end();
        products_wait<1>();
        if (k > 0) release();
        before = phase.slot;
        phase.next();
    }
    products_wait<0>();
    pin(acc);
    release();
}

// A warp passes its 16 rows of results from the layout of the accumulators to that of memory through 16 rows of 256 bytes,
// whose pieces of 16 bytes are exchanged so that neither side has bank conflicts. A lane then has piece lane % 16 of every
// second row.
inline constexpr int kWarpRows = 16, kWarpBytes = kWarpRows * 256;

// GELU of two values, with one reciprocal. (The limit keeps their product finite, and is far below rounding.)
__device__ __forceinline__ void gelu_tanh_two(float& x0, float& x1) {
    constexpr float a = -2.30220820f, b = 0.044715f * a;  // a = -2 sqrt(2 / pi) / ln 2
    const float d0 = 1.f + exp2_approx(fminf(x0 * fmaf(b, x0 * x0, a), 60.f)), d1 = 1.f + exp2_approx(fminf(x1 * fmaf(b, x1 * x1, a), 60.f));
    const float inverse = reciprocal_approx(d0 * d1);
    x0 *= d1 * inverse;
    x1 *= d0 * inverse;
}

// Stores columns 128 * HALF .. of sums + bias, or of their GELU, rounded. `y`: the warp's first row at the tile's first
// column; `rows`, `cols`: how many there are from there on; `vectors`: in pieces of 16 bytes.
template <int HALF, bool GELU>
__device__ __forceinline__ void store_rows(const float (&acc)[kMostCols / 2], unsigned char* stage, const bf16* bias, bf16* y, int64_t ld, int rows,
                                           int cols, bool vectors) {
    const int lane = opaque(int(threadIdx.x) % 32);
    __syncwarp();
#pragma unroll
    for (int s = 0; s < 8; ++s) {  // 16 columns
        uint32_t two[4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float add[2];
            load<2>(add, bias + HALF * 128 + (2 * s + j) * 8 + lane % 4 * 2);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float* const sum = acc + HALF * 64 + s * 8 + j * 4 + i * 2;
                float v0 = sum[0] + add[0], v1 = sum[1] + add[1];
                if constexpr (GELU) gelu_tanh_two(v0, v1);
                two[j * 2 + i] = pack_bf16x2(v0, v1);
            }
        }
        stmatrix_x4(smem_address(stage) + lane % 16 * 256 + ((2 * s + lane / 16) ^ (lane % 8)) * 16, two[0], two[1], two[2], two[3]);
    }
    __syncwarp();
    const int col = HALF * 128 + lane % 16 * 8;
#pragma unroll
    for (int i = 0; i < kWarpRows; i += 2) {
        const int row = i + lane / 16;
        const Vec<bf16, 8> v = load_vec<8>(reinterpret_cast<const bf16*>(stage + row * 256 + (lane % 16 ^ row % 8) * 16));
        if (row >= rows || col >= cols) continue;
        bf16* const to = y + row * ld + col;
        if (vectors)
            store_vec(to, v);
        else
#pragma unroll
            for (int e = 0; e < 8; ++e)
                if (col + e < cols) to[e] = v.v[e];
    }
}

// Adds the sums to y.
__device__ __forceinline__ void add_rows(const float (&acc)[kMostCols / 2], unsigned char* stage, float* y, int64_t ld, int rows, int cols) {
    const int lane = opaque(int(threadIdx.x) % 32), piece = lane % 16;
    float old[kWarpRows / 2][4];
    auto load_old = [&](int i, int c) {
        const int row = i * 2 + lane / 16, col = c * 64 + piece * 4;
        if (row < rows && col + 3 < cols) load<4>(old[i], y + row * ld + col);
    };
#pragma unroll
    for (int i = 0; i < kWarpRows / 2; ++i) load_old(i, 0);
#pragma unroll
    for (int c = 0; c < kMostCols / 64; ++c) {
        if (c * 64 >= cols) continue;
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = lane / 4 + 8 * i;
                const float two[2] = {acc[c * 32 + j * 4 + i * 2], acc[c * 32 + j * 4 + i * 2 + 1]};
                store<2>(reinterpret_cast<float*>(stage + row * 256 + ((2 * j + lane % 4 / 2) ^ (row % 4 * 2)) * 16 + lane % 2 * 8), two);
            }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kWarpRows / 2; ++i) {
            const int row = i * 2 + lane / 16, col = c * 64 + piece * 4;
            float v[4];
            load<4>(v, reinterpret_cast<const float*>(stage + row * 256 + (piece ^ (row % 4 * 2)) * 16));
            float* const to = y + row * ld + col;
            if (row < rows && col + 3 < cols) {
#pragma unroll
                for (int e = 0; e < 4; ++e) v[e] += old[i][e];
                store_global<4>(to, v);
                load_old(i, c + 1);
            } else if (row < rows) {
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    if (col + e < cols) to[e] += v[e];
            }
        }
    }
}

#endif  // ETT_SM90A

// GELU: pre receives the sums, and y their GELU. Otherwise one of y and y_acc is null; y_acc is added to.
template <int CLUSTER, bool TA, bool TB, bool GELU>
__global__ void ETT_CLUSTER(CLUSTER) __launch_bounds__(kThreads, 1)
    hopper_matmul_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, const __grid_constant__ ProductOutput out) {
#ifdef ETT_SM90A
    ETT_DYNAMIC_SMEM(dynamic);
    unsigned char* const smem = panel_smem(dynamic);
    const uint32_t ring = smem_address(smem);
    const int rank = CLUSTER > 1 ? cluster_rank() : 0;
    if (threadIdx.x == 0) {
        for (int phase = 0; phase < 2; ++phase) {
            for (int s = 0; s < kMostStages; ++s) {
                const uint32_t full = ring + kBars + (phase * 2 * kMostStages + s) * 8;
                bar_init(full, 1);
                bar_init(full + kMostStages * 8, 8 * CLUSTER);  // the warps that multiply
            }
        }
        bar_init_done();
        prefetch_map(&a);
        prefetch_map(&b);
    }
    for (int i = int(threadIdx.x); i < 2 * kMostCols; i += kThreads) reinterpret_cast<bf16*>(smem + kBias)[i] = bf16{0};
    if constexpr (CLUSTER > 1)
        cluster_sync();
    else
        __syncthreads();

    const int first = int(blockIdx.x) / CLUSTER, stride = int(gridDim.x) / CLUSTER, steps = (out.depth + kDepth - 1) / kDepth;
    if (threadIdx.x < kWarpgroup) {
        give_registers<40>();
        if (threadIdx.x == 0) {
#pragma unroll 1
            for (int number = 0; number < 2; ++number) {
                Phase<CLUSTER> phase(number, out, ring);
                for (int item = first; item < phase.items; item += stride) {
                    const int2 place = phase.place(out.plan, item, rank);
                    if (place.y >= out.cols) continue;
                    for (int k = 0; k < steps; ++k, phase.next()) {
                        const uint32_t bar = phase.full + phase.slot * 8, to = ring + phase.slot * phase.stage;
                        bar_wait(phase.empty + phase.slot * 8, phase.parity ^ 1);
                        bar_expect(bar, phase.stage);
                        if constexpr (TA) {
                            tma_load(to, &a, bar, place.x, k * kDepth);
                            tma_load(to + kPanel, &a, bar, place.x + 64, k * kDepth);
                        } else {
                            tma_load(to, &a, bar, k * kDepth, place.x);
                        }
                        // The blocks of a cluster take turns with panels of 64 columns.
#pragma unroll 1
                        for (int p = rank; p < panels_of(phase.width); p += CLUSTER) {
                            const int col = place.y + p * 64, from_x = TB ? k * kDepth : col, from_y = TB ? col : k * kDepth;
                            if constexpr (CLUSTER > 1)
                                tma_load_to((1 << CLUSTER) - 1, to + (2 + p) * kPanel, &b, bar, from_x, from_y);
                            else
                                tma_load(to + (2 + p) * kPanel, &b, bar, from_x, from_y);
                        }
                    }
                }
                // The next phase divides the ring anew: all of it has been read.
                for (int s = 0; s < phase.stages; ++s, phase.next()) bar_wait(phase.empty + phase.slot * 8, phase.parity ^ 1);
            }
        }
        __syncwarp();
    } else {
        take_registers<232>();
        const int part = int(threadIdx.x) / kWarpgroup - 1, thread = int(threadIdx.x) % kWarpgroup;
        bf16* const bias = reinterpret_cast<bf16*>(smem + kBias) + part * kMostCols;
        unsigned char* const stage = smem + kStores + (part * 4 + thread / 32) * kWarpBytes;
        float acc[kMostCols / 2];
#pragma unroll
        for (int i = 0; i < kMostCols / 2; ++i) acc[i] = 0.f;
#pragma unroll 1
        for (int number = 0; number < 2; ++number) {
            Phase<CLUSTER> phase(number, out, ring);
            for (int item = first; item < phase.items; item += stride) {
                const int2 place = phase.place(out.plan, item, rank);
                const int col0 = place.y, width = phase.width;
                if (col0 >= out.cols) continue;
                bf16 mine[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int col = col0 + i * kWarpgroup + thread;
                    mine[i] = out.bias && col < out.cols ? out.bias[col] : bf16{0};
                }
                switch (width) {
                case 64: multiply_part<64, CLUSTER, TA, TB>(acc, phase, ring, part, steps); break;
                case 96: multiply_part<96, CLUSTER, TA, TB>(acc, phase, ring, part, steps); break;
                case 128: multiply_part<128, CLUSTER, TA, TB>(acc, phase, ring, part, steps); break;
                case 160: multiply_part<160, CLUSTER, TA, TB>(acc, phase, ring, part, steps); break;
                case 192: multiply_part<192, CLUSTER, TA, TB>(acc, phase, ring, part, steps); break;
                default: multiply_part<256, CLUSTER, TA, TB>(acc, phase, ring, part, steps);
                }
                if (out.bias) {
                    named_barrier(1 + part, kWarpgroup);  // the last tile's bias is no longer needed
                    bias[thread] = mine[0];
                    bias[kWarpgroup + thread] = mine[1];
                    named_barrier(1 + part, kWarpgroup);
                }
                const int row0 = place.x + part * kPartRows + thread / 32 * kWarpRows, rows = out.rows - row0, cols = min(out.cols - col0, width);
                const int64_t at = row0 * out.ld + col0;
                if constexpr (GELU) {
                    bf16* const pre = out.pre + row0 * out.ld_pre + col0;
                    store_rows<0, false>(acc, stage, bias, pre, out.ld_pre, rows, cols, out.vectors);
                    if (cols > 128) store_rows<1, false>(acc, stage, bias, pre, out.ld_pre, rows, cols, out.vectors);
                    store_rows<0, true>(acc, stage, bias, out.y + at, out.ld, rows, cols, out.vectors);
                    if (cols > 128) store_rows<1, true>(acc, stage, bias, out.y + at, out.ld, rows, cols, out.vectors);
                } else if (out.y_acc) {
                    add_rows(acc, stage, out.y_acc + at, out.ld, rows, cols);
                } else {
                    store_rows<0, false>(acc, stage, bias, out.y + at, out.ld, rows, cols, out.vectors);
                    if (cols > 128) store_rows<1, false>(acc, stage, bias, out.y + at, out.ld, rows, cols, out.vectors);
                }
            }
        }
    }
    if constexpr (CLUSTER > 1) cluster_sync();
#endif
}

struct Operands {
    const ett_view *a, *b, *bias, *y, *pre;  // bias and pre: null if absent
    bool ta, tb;
    bool add;  // add to y, which is f32
};

// Rows begin at multiples of 16 bytes, as TMA requires.
inline bool copyable(const ett_view& v) {
    return reinterpret_cast<uintptr_t>(v.ptr) % 16 == 0 && (rows(v) == 1 || stride(v) * dtype_size(v.dtype) % 16 == 0);
}

inline bool can_multiply(const Operands& p) {
    const int64_t depth = p.ta ? rows(*p.a) : cols(*p.a), most = 1 << 30;
    return is_hopper() && p.a->dtype == ETT_BF16 && copyable(*p.a) && copyable(*p.b) && (!p.add || copyable(*p.y)) &&
           depth > 0 && depth < most && rows(*p.y) < most && cols(*p.y) < most;
}

// The plan that is expected to take the least time, in clocks of a multiprocessor, as measured.
inline Plan choose_plan(int64_t n, int64_t o, int64_t depth, int multiprocessors) {
    static constexpr struct {
        int cols, clocks[2];  // of a stage, in a cluster of 1 and of 2
    } kWidths[] = {{256, {1060, 1024}}, {192, {840, 810}}, {160, {730, 700}}, {128, {580, 550}}, {96, {600, 500}}, {64, {395, 400}}};
    constexpr int kRound = 1500, kSwitch = 2000, kStart = 600;  // more for every tile, before pieces, and to start a cluster of 2
    const double steps = double(ceil_div(depth, kDepth));
    Plan best{};
    double least = 0;
    for (int cluster = n > kTileRows ? 2 : 1; cluster >= 1; --cluster) {
        const int64_t units = std::max(multiprocessors / cluster, 1), tile_rows = ceil_div(n, cluster * kTileRows);
        for (const auto& tile : kWidths) {
            const int64_t tiles = tile_rows * ceil_div(o, tile.cols), rest = tiles % units;
            for (const auto& piece : kWidths) {
                const int64_t pieces = tile.cols / piece.cols, whole = pieces == 1 ? tiles : tiles - rest;
                if (pieces * piece.cols != tile.cols || (pieces > 1 && rest == 0)) continue;
                double time = double(ceil_div(whole, units)) * (steps * tile.clocks[cluster - 1] + kRound);
                time += double(ceil_div((tiles - whole) * pieces, units)) * (steps * piece.clocks[cluster - 1] + kRound);
                if (whole > 0 && whole < tiles) time += kSwitch;
                if (cluster == 2) time += kStart;
                if (best.cluster == 0 || time < least) least = time, best = {cluster, {tile.cols, piece.cols}, int(whole), int(pieces)};
            }
        }
    }
    return best;
}

inline int32_t multiply(const char* op, const Operands& p, int multiprocessors, const ett_launch* l) {
    CUtensorMap a, b;
    auto map = [&](CUtensorMap* m, const ett_view& v, int box_rows) {
        return make_panel_map(op, m, v.ptr, rows(v), cols(v), round_up(stride(v), 8), uint32_t(box_rows));
    };
    int32_t status = map(&a, *p.a, p.ta ? kDepth : kTileRows);
    if (status == ETT_OK) status = map(&b, *p.b, 64);
    if (status != ETT_OK) return status;

    const int64_t n = rows(*p.y), o = cols(*p.y), depth = p.ta ? rows(*p.a) : cols(*p.a);
    const Plan plan = choose_plan(n, o, depth, multiprocessors);
    const int64_t tiles = ceil_div(n, plan.cluster * kTileRows) * ceil_div(o, plan.width[0]), units = std::max(multiprocessors / plan.cluster, 1);
    const int64_t items = std::max<int64_t>(plan.whole, (tiles - plan.whole) * plan.pieces);
    const ProductOutput out{p.bias ? data<const bf16>(*p.bias) : nullptr,
                            p.add ? nullptr : data<bf16>(*p.y),
                            p.pre ? data<bf16>(*p.pre) : nullptr,
                            p.add ? data<float>(*p.y) : nullptr,
                            stride(*p.y),
                            p.pre ? stride(*p.pre) : 0,
                            int(n),
                            int(o),
                            int(depth),
                            wide(*p.y) && (!p.pre || wide(*p.pre)),
                            plan};
    const dim3 grid(unsigned(std::min(items, units) * plan.cluster));
    auto go = [&](auto kernel) { return launch(op, kernel, grid, dim3(kThreads), kSmem, l, a, b, out); };
    auto clustered = [&](auto cluster) {
        constexpr int C = decltype(cluster)::value;
        if (p.pre) return go(hopper_matmul_kernel<C, false, true, true>);
        if (p.ta) return p.tb ? go(hopper_matmul_kernel<C, true, true, false>) : go(hopper_matmul_kernel<C, true, false, false>);
        return p.tb ? go(hopper_matmul_kernel<C, false, true, false>) : go(hopper_matmul_kernel<C, false, false, false>);
    };
    return plan.cluster == 2 ? clustered(std::integral_constant<int, 2>{}) : clustered(std::integral_constant<int, 1>{});
}

}  // namespace hopper
}  // namespace ett
#endif  // ETT_SHIM
