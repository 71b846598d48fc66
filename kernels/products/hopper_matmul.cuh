// hopper_matmul.cuh: the products of matmul.cu on Hopper: bf16, by wgmma, with operands and results copied by TMA.
//
// A block computes tiles of 128 x 256, one after the other. One thread fills a ring of stages, each 64 of the inner
// dimension of both operands; two warpgroups multiply them, 64 rows each. Neither waits for the other: they share only
// the ring, and while one rounds and stores its part of a tile, the other has products to do, of the same tile or of the
// next one. Two blocks of a cluster compute tiles below each other and load half of b's tile each, for both.
//
// Tiles that would fill only a part of the multiprocessors, at the end, are divided into narrower ones.
#pragma once

#include "activation.cuh"
#include "hopper.cuh"

#ifndef ETT_SHIM

namespace ett {
namespace hopper {

// Rows of a tile, and of a warpgroup's part of it; columns of a tile; depth and number of the stages.
inline constexpr int kTileRows = 128, kPartRows = 64, kTileCols = 256, kDepth = 64, kStages = 4;
inline constexpr int kThreads = 3 * kWarpgroup;
inline constexpr int kPanel = 64 * kPanelRowBytes;  // bytes of a panel of 64 rows
inline constexpr int kStageA = kTileRows * kDepth * 2, kStage = kStageA + kTileCols * kDepth * 2;
// Shared memory: the stages; two panels per warpgroup to store from; the bias, per warpgroup; barriers.
inline constexpr int kStores = kStages * kStage, kBias = kStores + 4 * kPanel, kBars = kBias + 2 * kTileCols * 2;
inline constexpr int kSmem = kBars + kStages * 16 + 1024;
static_assert(kSmem <= kMostSmem);

// Tiles of CLUSTER x 128 rows are computed in bands of this many rows of the matrix, column by column, so that blocks
// that run at the same time share their operands in the L2.
inline constexpr int kBandRows = 2048;

// What becomes of the sums. y_acc: y is f32 and added to, else it is stored through its map; bias may be null; gelu: pre
// receives the sums, and y their GELU.
struct ProductOutput {
    const bf16* bias;
    float* y_acc;
    int64_t ld;  // of y_acc
    int rows, cols, depth;
    bool gelu;
    int whole;   // the first tiles, which are not divided
    int pieces;  // into which each of the others is divided: 1, 2 or 4
};

// A tile or a piece of one.
struct Place {
    int row, col, cols;
};

// Which items of work there are for a cluster: item i < whole is tile i, the others are pieces.
template <int CLUSTER> struct Schedule {
    int tile_rows, tile_cols, whole, pieces, items;
    __device__ __forceinline__ explicit Schedule(const ProductOutput& out)
        : tile_rows((out.rows + CLUSTER * kTileRows - 1) / (CLUSTER * kTileRows)), tile_cols((out.cols + kTileCols - 1) / kTileCols),
          whole(out.whole), pieces(out.pieces), items(whole + (tile_rows * tile_cols - whole) * pieces) {}
    __device__ __forceinline__ Place at(int item, int rank) const {
        constexpr int kBand = kBandRows / (CLUSTER * kTileRows);
        const bool is_whole = item < whole;
        const int tile = is_whole ? item : whole + (item - whole) / pieces, piece = is_whole ? 0 : (item - whole) % pieces;
        const int cols = is_whole ? kTileCols : kTileCols / pieces;
        const int first = tile / (kBand * tile_cols) * kBand, height = min(tile_rows - first, kBand);
        const int in_band = tile - first * tile_cols;
        return {((first + in_band % height) * CLUSTER + rank) * kTileRows, in_band / height * kTileCols + piece * cols, cols};
    }
};

#ifdef ETT_SM90A

// The warpgroup's rows of a tile of COLS columns: products, then the output.
template <int COLS, int CLUSTER, bool TA, bool TB>
__device__ __forceinline__ void multiply_part(Ring<kStages>& ring, uint32_t& buffer, unsigned char* smem, int part, int row0, int col0,
                                              const CUtensorMap* y, const CUtensorMap* pre, const ProductOutput& out) {
    const int thread = int(threadIdx.x) % kWarpgroup, lane = thread % 32;
    const uint32_t stages = smem_address(smem), full = stages + kBars, empty = full + kStages * 8;
    auto release = [&](uint32_t slot) {
        if constexpr (CLUSTER > 1) {
            if (lane < CLUSTER) bar_arrive_at(lane, empty + slot * 8);
        } else {
            if (lane == 0) bar_arrive(empty + slot * 8);
        }
    };
    constexpr int kBiases = (COLS + kWarpgroup - 1) / kWarpgroup;
    bf16 bias[kBiases];
#pragma unroll
    for (int i = 0; i < kBiases; ++i) {
        const int c = i * kWarpgroup + thread;
        bias[i] = out.bias && c < COLS && col0 + c < out.cols ? out.bias[col0 + c] : bf16{0};
    }

    float acc[COLS / 2];
#pragma unroll
    for (int i = 0; i < COLS / 2; ++i) acc[i] = 0.f;
    const int steps = (out.depth + kDepth - 1) / kDepth;
    uint32_t before = 0;
    for (int k = 0; k < steps; ++k) {
        const uint32_t at = stages + ring.slot * kStage, at_a = at + part * kPanel, at_b = at + kStageA;
        const uint32_t low_a = TA ? mn_major(at_a, kPanel) : k_major(at_a), low_b = TB ? k_major(at_b) : mn_major(at_b, kPanel);
        bar_wait(full + ring.slot * 8, ring.parity);
        products_begin();
#pragma unroll
        for (int s = 0; s < kDepth / 16; ++s)
            mma<COLS, TA, !TB>(acc, low_a + s * step(TA ? 2048 : 32), low_b + s * step(TB ? 32 : 2048), k > 0 || s > 0);
        products_end();
        products_wait<1>();
        if (k > 0) release(before);
        before = ring.slot;
        ring.next();
    }
    products_wait<0>();
    pin(acc);
    release(before);

    if (out.y_acc) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = row0 + acc_row(i), rest = out.cols - col0 - acc_col(0);
            if (row >= out.rows) continue;
            float* const to = out.y_acc + row * out.ld + col0 + acc_col(0);
#pragma unroll
            for (int j0 = 0; j0 < COLS / 8; j0 += 8) {
                float old[8][2];
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const int c = (j0 + j) * 8;
                    if (c + 1 < rest)
                        load<2>(old[j], to + c);
                    else
                        old[j][0] = c < rest ? to[c] : 0.f;
                }
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const int c = (j0 + j) * 8;
                    const float sum[2] = {old[j][0] + acc[(j0 + j) * 4 + i * 2], old[j][1] + acc[(j0 + j) * 4 + i * 2 + 1]};
                    if (c + 1 < rest)
                        store<2>(to + c, sum);
                    else if (c < rest)
                        to[c] = sum[0];
                }
            }
        }
        return;
    }

    bf16* const biases = reinterpret_cast<bf16*>(smem + kBias) + part * kTileCols;
#pragma unroll
    for (int i = 0; i < kBiases; ++i)
        if (i * kWarpgroup + thread < COLS) biases[i * kWarpgroup + thread] = bias[i];
    const uint32_t stores = stages + kStores + part * 2 * kPanel, row = (thread / 32 * 16 + lane % 16) * kPanelRowBytes;
    // Columns p * 64 .. of the sums plus bias through `to`, rounded. The buffers are used in turn.
    auto store_panel = [&](const CUtensorMap* to, int p, auto value) {
        if (thread == 0) stores_read<1>();  // what this buffer was stored to last has been read
        named_barrier(1 + part, kWarpgroup);
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            uint32_t two[4];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float add[2];
                load<2>(add, biases + p * kPanelCols + (2 * s + j) * 8 + acc_col(0));
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float* const sum = acc + p * 32 + s * 8 + j * 4 + i * 2;
                    two[j * 2 + i] = pack_bf16x2(value(sum[0] + add[0]), value(sum[1] + add[1]));
                }
            }
            stmatrix_x4(stores + buffer + row + ((2 * s + lane / 16) ^ (lane % 8)) * 16, two[0], two[1], two[2], two[3]);
        }
        proxy_fence();
        named_barrier(1 + part, kWarpgroup);
        if (thread == 0) {
            tma_store(to, stores + buffer, col0 + p * kPanelCols, row0);
            stores_commit();
        }
        buffer ^= kPanel;
    };
#pragma unroll
    for (int p = 0; p < COLS / kPanelCols; ++p) {
        if (col0 + p * kPanelCols >= out.cols) continue;
        if (out.gelu) {
            store_panel(pre, p, [](float v) { return v; });
            store_panel(y, p, [](float v) { return gelu_tanh<bf16>(v); });
        } else {
            store_panel(y, p, [](float v) { return v; });
        }
    }
}

#endif  // ETT_SM90A

template <int CLUSTER, bool TA, bool TB>
__global__ void ETT_CLUSTER(CLUSTER) __launch_bounds__(kThreads, 1)
    hopper_matmul_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, const __grid_constant__ CUtensorMap y,
                         const __grid_constant__ CUtensorMap pre, const __grid_constant__ ProductOutput out) {
#ifdef ETT_SM90A
    ETT_DYNAMIC_SMEM(dynamic);
    unsigned char* const smem = panel_smem(dynamic);
    const uint32_t stages = smem_address(smem), full = stages + kBars, empty = full + kStages * 8;
    const int rank = CLUSTER > 1 ? cluster_rank() : 0;
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            bar_init(full + s * 8, 1);
            bar_init(empty + s * 8, 8 * CLUSTER);  // the warps that multiply
        }
        bar_init_done();
        prefetch_map(&a);
        prefetch_map(&b);
    }
    if constexpr (CLUSTER > 1)
        cluster_sync();
    else
        __syncthreads();

    const Schedule<CLUSTER> schedule(out);
    const int first = int(blockIdx.x) / CLUSTER, stride = int(gridDim.x) / CLUSTER;
    Ring<kStages> ring;
    if (threadIdx.x < kWarpgroup) {
        give_registers<40>();
        if (threadIdx.x == 0) {
            const int steps = (out.depth + kDepth - 1) / kDepth;
            for (int item = first; item < schedule.items; item += stride) {
                const Place place = schedule.at(item, rank);
                for (int k = 0; k < steps; ++k, ring.next()) {
                    const uint32_t bar = full + ring.slot * 8, to = stages + ring.slot * kStage;
                    bar_wait(empty + ring.slot * 8, ring.parity ^ 1);
                    bar_expect(bar, kStageA + place.cols * kDepth * 2);
                    if constexpr (TA) {
                        tma_load(to, &a, bar, place.row, k * kDepth);
                        tma_load(to + kPanel, &a, bar, place.row + 64, k * kDepth);
                    } else {
                        tma_load(to, &a, bar, k * kDepth, place.row);
                    }
                    // The blocks of a cluster take turns with panels of 64 columns.
#pragma unroll 1
                    for (int p = rank; p < place.cols / 64; p += CLUSTER) {
                        const int col = place.col + p * 64, x = TB ? k * kDepth : col, y = TB ? col : k * kDepth;
                        if constexpr (CLUSTER > 1)
                            tma_load_to((1 << CLUSTER) - 1, to + kStageA + p * kPanel, &b, bar, x, y);
                        else
                            tma_load(to + kStageA + p * kPanel, &b, bar, x, y);
                    }
                }
            }
        }
        __syncwarp();
    } else {
        take_registers<232>();
        const int part = int(threadIdx.x) / kWarpgroup - 1;
        uint32_t buffer = 0;
        for (int item = first; item < schedule.items; item += stride) {
            const Place place = schedule.at(item, rank);
            const int row = place.row + part * kPartRows;
            if (place.cols == kTileCols)
                multiply_part<kTileCols, CLUSTER, TA, TB>(ring, buffer, smem, part, row, place.col, &y, &pre, out);
            else if (place.cols == kTileCols / 2)
                multiply_part<kTileCols / 2, CLUSTER, TA, TB>(ring, buffer, smem, part, row, place.col, &y, &pre, out);
            else
                multiply_part<kTileCols / 4, CLUSTER, TA, TB>(ring, buffer, smem, part, row, place.col, &y, &pre, out);
        }
        if (threadIdx.x % kWarpgroup == 0) stores_done<0>();
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

// Into how many pieces each of `rest` tiles is best divided for `units` clusters. Narrow tiles take longer per column.
inline int best_pieces(int64_t rest, int64_t units) {
    const double time1 = rest > 0, time2 = ceil_div(rest * 2, units) * 0.56, time4 = ceil_div(rest * 4, units) * 0.35;
    return time4 < time2 && time4 < time1 ? 4 : time2 < time1 ? 2 : 1;
}

template <int CLUSTER> int32_t multiply(const char* op, const Operands& p, int multiprocessors, const ett_launch* l) {
    CUtensorMap a, b, y, pre;
    auto map = [&](CUtensorMap* m, const ett_view& v, int box_rows) {
        return make_panel_map(op, m, v.ptr, rows(v), cols(v), round_up(stride(v), 8), uint32_t(box_rows));
    };
    int32_t status = map(&a, *p.a, p.ta ? kDepth : kTileRows);
    if (status == ETT_OK) status = map(&b, *p.b, 64);
    if (p.add)
        memset(&y, 0, sizeof y);
    else if (status == ETT_OK)
        status = map(&y, *p.y, kPartRows);
    pre = y;
    if (status == ETT_OK && p.pre) status = map(&pre, *p.pre, kPartRows);
    if (status != ETT_OK) return status;

    const int64_t n = rows(*p.y), o = cols(*p.y), depth = p.ta ? rows(*p.a) : cols(*p.a);
    const int64_t tiles = ceil_div(n, CLUSTER * kTileRows) * ceil_div(o, kTileCols), units = std::max(multiprocessors / CLUSTER, 1);
    const int64_t whole = tiles / units * units;
    int pieces = best_pieces(tiles - whole, units);
    if (getenv("PIECES")) pieces = atoi(getenv("PIECES"));
    const int64_t items = whole + (tiles - whole) * pieces;
    const ProductOutput out{p.bias ? data<const bf16>(*p.bias) : nullptr,
                            p.add ? data<float>(*p.y) : nullptr,
                            stride(*p.y), int(n), int(o), int(depth), p.pre != nullptr, int(whole), pieces};
    auto go = [&](auto kernel) { return launch(op, kernel, dim3(unsigned(std::min(items, units) * CLUSTER)), dim3(kThreads), kSmem, l, a, b, y, pre, out); };
    if (p.ta) return p.tb ? go(hopper_matmul_kernel<CLUSTER, true, true>) : go(hopper_matmul_kernel<CLUSTER, true, false>);
    return p.tb ? go(hopper_matmul_kernel<CLUSTER, false, true>) : go(hopper_matmul_kernel<CLUSTER, false, false>);
}

}  // namespace hopper
}  // namespace ett
#endif  // ETT_SHIM
