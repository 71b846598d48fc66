// hopper_matmul.cuh: the products of matmul.cu on Hopper: bf16, by wgmma, with operands and results copied by TMA.
//
// A block computes tiles of 128 rows, one after the other. One thread fills a ring of stages, each 64 of the inner
// dimension of both operands; two warpgroups multiply them, 64 rows each. Neither waits for the other: they share only
// the ring, and while one rounds and stores its part of a tile, the other has products to do, of the same tile or of the
// next one. Two blocks of a cluster compute tiles below each other and load half of b's tile each, for both.
//
// Tiles are 256 columns wide, or narrower where that fills more multiprocessors; those that are left for the last round,
// and are too few for it, are divided into still narrower ones.
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
// Shared memory: the ring, whose stages are larger or smaller with the tile; two panels per warpgroup to store from; the
// bias, per warpgroup; barriers, for both widths of tiles.
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

// What becomes of the sums. y_acc: y is f32 and added to, else it is stored through its map; bias may be null; gelu: pre
// receives the sums, and y their GELU.
struct ProductOutput {
    const bf16* bias;
    float* y_acc;
    int64_t ld;  // of y_acc
    int rows, cols, depth;
    bool gelu;
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

// acc = the products of the warpgroup's rows and the tile's COLS columns.
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

// Adds the sums to y.
__device__ __forceinline__ void add_part(const float (&acc)[kMostCols / 2], const ProductOutput& out, int row0, int col0, int width) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = row0 + acc_row(i), rest = out.cols - col0 - acc_col(0);
        if (row >= out.rows) continue;
        float* const to = out.y_acc + row * out.ld + col0 + acc_col(0);
#pragma unroll
        for (int j0 = 0; j0 < kMostCols / 8; j0 += 4) {
            if (j0 * 8 >= width) continue;
            float old[4][2];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int c = (j0 + j) * 8;
                if (c + 1 < rest)
                    load<2>(old[j], to + c);
                else
                    old[j][0] = c < rest ? to[c] : 0.f;
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int c = (j0 + j) * 8;
                const float sum[2] = {old[j][0] + acc[(j0 + j) * 4 + i * 2], old[j][1] + acc[(j0 + j) * 4 + i * 2 + 1]};
                if (c + 1 < rest)
                    store<2>(to + c, sum);
                else if (c < rest)
                    to[c] = sum[0];
            }
        }
    }
}

// Stores from two buffers of 64 rows and columns, in turn, as boxes of 32 columns.
struct Store {
    uint32_t buffers, buffer;
    int part;

    // Columns p * 64 .. of value(sums + bias), rounded.
    template <class F>
    __device__ __forceinline__ void panel(const float (&acc)[kMostCols / 2], const bf16* bias, const CUtensorMap* to, int p, int row0, int col0, int width,
                                          F&& value) {
        const int thread = int(threadIdx.x) % kWarpgroup, lane = thread % 32, row = thread / 32 * 16 + lane % 16;
        if (thread == 0) stores_read<1>();  // this buffer has been read
        named_barrier(1 + part, kWarpgroup);
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            uint32_t two[4];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float add[2];
                load<2>(add, bias + p * kPanelCols + (2 * s + j) * 8 + acc_col(0));
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float* const sum = acc + p * 32 + s * 8 + j * 4 + i * 2;
                    two[j * 2 + i] = pack_bf16x2(value(sum[0] + add[0]), value(sum[1] + add[1]));
                }
            }
            const uint32_t piece = (s % 2 * 2 + lane / 16) ^ (row / 2 % 4);
            stmatrix_x4(buffers + buffer + s / 2 * (kPanel / 2) + row * 64 + piece * 16, two[0], two[1], two[2], two[3]);
        }
        proxy_fence();
        named_barrier(1 + part, kWarpgroup);
        if (thread == 0) {
            tma_store(to, buffers + buffer, col0 + p * kPanelCols, row0);
            if (p * kPanelCols + 32 < width) tma_store(to, buffers + buffer + kPanel / 2, col0 + p * kPanelCols + 32, row0);
            stores_commit();
        }
        buffer ^= kPanel;
    }
};

#endif  // ETT_SM90A

template <int CLUSTER, bool TA, bool TB>
__global__ void ETT_CLUSTER(CLUSTER) __launch_bounds__(kThreads, 1)
    hopper_matmul_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, const __grid_constant__ CUtensorMap y,
                         const __grid_constant__ CUtensorMap pre, const __grid_constant__ ProductOutput out) {
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
        Store store{ring + kStores + part * 2 * kPanel, 0, part};
        float acc[kMostCols / 2];
#pragma unroll
        for (int i = 0; i < kMostCols / 2; ++i) acc[i] = 0.f;
#pragma unroll 1
        for (int number = 0; number < 2; ++number) {
            Phase<CLUSTER> phase(number, out, ring);
            for (int item = first; item < phase.items; item += stride) {
                const int2 place = phase.place(out.plan, item, rank);
                const int row0 = place.x + part * kPartRows, col0 = place.y, width = phase.width;
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
                case 224: multiply_part<224, CLUSTER, TA, TB>(acc, phase, ring, part, steps); break;
                default: multiply_part<256, CLUSTER, TA, TB>(acc, phase, ring, part, steps);
                }
                if (out.y_acc) {
                    add_part(acc, out, row0, col0, width);
                    continue;
                }
                bias[thread] = mine[0];
                bias[kWarpgroup + thread] = mine[1];
#pragma unroll
                for (int p = 0; p < kMostCols / kPanelCols; ++p) {
                    if (p * kPanelCols >= width || col0 + p * kPanelCols >= out.cols) continue;
                    if (out.gelu) {
                        store.panel(acc, bias, &pre, p, row0, col0, width, [](float v) { return v; });
                        store.panel(acc, bias, &y, p, row0, col0, width, [](float v) { return gelu_tanh<bf16>(v); });
                    } else {
                        store.panel(acc, bias, &y, p, row0, col0, width, [](float v) { return v; });
                    }
                }
            }
        }
        if (thread == 0) stores_done<0>();
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
    return is_hopper() && p.a->dtype == ETT_BF16 && copyable(*p.a) && copyable(*p.b) && (p.add ? copyable(*p.y) : wide(*p.y)) &&
           (!p.pre || wide(*p.pre)) && depth > 0 && depth < most && rows(*p.y) < most && cols(*p.y) < most;
}

// The plan that is expected to take the least time, in clocks of a multiprocessor.
inline Plan choose_plan(int64_t n, int64_t o, int64_t depth, int multiprocessors) {
    static constexpr struct {
        int cols, clocks;  // of a stage
    } kWidths[] = {{256, 1024}, {224, 910}, {192, 800}, {160, 690}, {128, 570}, {96, 460}, {64, 350}};
    constexpr int kRound = 1500, kSwitch = 2000;  // clocks between tiles, and more before pieces
    Plan best{};
    double least = 0;
    const double steps = double(ceil_div(depth, kDepth));
    for (const int cluster : {2, 1}) {
        const int64_t units = std::max(multiprocessors / cluster, 1);
        for (const auto& w : kWidths) {
            const int64_t tiles = ceil_div(n, cluster * kTileRows) * ceil_div(o, w.cols), whole = tiles / units * units, rest = tiles - whole;
            for (const auto& piece : kWidths) {
                if (w.cols % piece.cols != 0 || (piece.cols != w.cols && rest == 0)) continue;
                const int64_t pieces = w.cols / piece.cols;
                double time = double(whole / units) * (steps * w.clocks + kRound);
                if (rest > 0) time += double(ceil_div(rest * pieces, units)) * (steps * piece.clocks + kRound);
                if (whole > 0 && pieces > 1) time += kSwitch;
                if (cluster == 1) time *= 1.02;
                if (best.cluster == 0 || time < least) least = time, best = {cluster, {w.cols, piece.cols}, int(whole), int(pieces)};
            }
        }
    }
    // Tiles that are not divided are of the same phase as the others.
    if (best.pieces == 1) best.whole = int(ceil_div(n, best.cluster * kTileRows) * ceil_div(o, best.width[0]));
    return best;
}

inline int32_t multiply(const char* op, const Operands& p, int multiprocessors, const ett_launch* l) {
    CUtensorMap a, b, y, pre;
    auto panels = [&](CUtensorMap* m, const ett_view& v, int box_rows) {
        return make_panel_map(op, m, v.ptr, rows(v), cols(v), round_up(stride(v), 8), uint32_t(box_rows));
    };
    auto halves = [&](CUtensorMap* m, const ett_view& v) {
        return make_map(op, m, ETT_BF16, v.ptr, {2, {uint64_t(cols(v)), uint64_t(rows(v))}, {uint64_t(round_up(stride(v), 8)) * 2}, {32, uint32_t(kPartRows)}}, true);
    };
    int32_t status = panels(&a, *p.a, p.ta ? kDepth : kTileRows);
    if (status == ETT_OK) status = panels(&b, *p.b, 64);
    if (p.add)
        memset(&y, 0, sizeof y);
    else if (status == ETT_OK)
        status = halves(&y, *p.y);
    pre = y;
    if (status == ETT_OK && p.pre) status = halves(&pre, *p.pre);
    if (status != ETT_OK) return status;

    const int64_t n = rows(*p.y), o = cols(*p.y), depth = p.ta ? rows(*p.a) : cols(*p.a);
    Plan plan = choose_plan(n, o, depth, multiprocessors);
    if (const char* e = getenv("PLAN")) {
        int c, w, v;
        sscanf(e, "%d/%d/%d", &c, &w, &v);
        const int64_t tiles = ceil_div(n, c * kTileRows) * ceil_div(o, w), units = multiprocessors / c;
        plan = {c, {w, v}, int(w == v ? tiles : tiles / units * units), w / v};
    }
    if (getenv("SHOW")) printf("[%d: %d x %d, %d x %d] ", plan.cluster, plan.whole, plan.width[0], plan.pieces, plan.width[1]), fflush(stdout);
    const int64_t tiles = ceil_div(n, plan.cluster * kTileRows) * ceil_div(o, plan.width[0]), units = std::max(multiprocessors / plan.cluster, 1);
    const int64_t items = std::max<int64_t>(plan.whole, (tiles - plan.whole) * plan.pieces);
    const ProductOutput out{p.bias ? data<const bf16>(*p.bias) : nullptr,
                            p.add ? data<float>(*p.y) : nullptr,
                            stride(*p.y), int(n), int(o), int(depth), p.pre != nullptr, plan};
    const dim3 grid(unsigned(std::min(items, units) * plan.cluster));
    auto go = [&](auto kernel) { return launch(op, kernel, grid, dim3(kThreads), kSmem, l, a, b, y, pre, out); };
    auto clustered = [&](auto cluster) {
        constexpr int C = decltype(cluster)::value;
        if (p.ta) return p.tb ? go(hopper_matmul_kernel<C, true, true>) : go(hopper_matmul_kernel<C, true, false>);
        return p.tb ? go(hopper_matmul_kernel<C, false, true>) : go(hopper_matmul_kernel<C, false, false>);
    };
    return plan.cluster == 2 ? clustered(std::integral_constant<int, 2>{}) : clustered(std::integral_constant<int, 1>{});
}

}  // namespace hopper
}  // namespace ett
#endif  // ETT_SHIM
