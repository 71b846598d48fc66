// hopper_matmul.cuh: the products of matmul.cu on Hopper: bf16, by wgmma, with operands and results copied by TMA.
//
// A block computes tiles of 128 x COLS, one after the other. One thread fills a ring of stages, each 64 of the inner
// dimension of both operands; two warpgroups multiply them, 64 rows each. Neither waits for the other: they share only
// the ring, and while one rounds and stores its part of a tile, the other has products to do, of the same tile or of the
// next one. Two blocks of a cluster compute tiles below each other and load half of b's tile each, for both.
#pragma once

#include "activation.cuh"
#include "hopper.cuh"

#ifndef ETT_SHIM

namespace ett {
namespace hopper {

// Rows of a block's tile, of a warpgroup's part of it; depth of a stage.
inline constexpr int kTileRows = 128, kPartRows = 64, kDepth = 64;
inline constexpr int kThreads = 3 * kWarpgroup;

// BAND: rows of tiles (with CLUSTER 2: of pairs of tiles) that are computed column by column, so that blocks that run at
// the same time share their operands in the L2. TA: a is stored [depth, rows]; TB: b is stored [columns, depth].
template <int COLS, int STAGES, int CLUSTER, int BAND, bool TA, bool TB> struct ProductTile {
    static constexpr int kCols = COLS, kStages = STAGES, kCluster = CLUSTER, kBand = BAND;
    static constexpr bool kTa = TA, kTb = TB;
    static constexpr int kPanel = 64 * kPanelRowBytes;  // bytes of a panel of 64 rows
    static constexpr int kPanels = COLS / kPanelCols;
    static constexpr int kBytesA = kTileRows * kDepth * 2, kBytesB = COLS * kDepth * 2, kStage = kBytesA + kBytesB;
    static constexpr int kLoadCols = COLS / CLUSTER;  // columns of b that a block loads
    // Each warpgroup has two panels to store from, and the bias of its tile.
    static constexpr int kStores = STAGES * kStage, kBias = kStores + 4 * kPanel, kBars = kBias + 2 * COLS * 2;
    static constexpr int kSmem = kBars + STAGES * 16 + 1024;
    static_assert(kSmem <= kMostSmem && COLS % 64 == 0 && kLoadCols % 64 == 0);
};

// What becomes of the sums. y_acc: y is f32 and added to, else it is stored through its map; bias may be null; gelu: pre
// receives the sums, and y their GELU.
struct ProductOutput {
    const bf16* bias;
    float* y_acc;
    int64_t ld;  // of y_acc
    int rows, cols, depth;
    bool gelu;
};

template <class Tile>
__global__ void ETT_CLUSTER(Tile::kCluster) __launch_bounds__(kThreads, 1)
    hopper_matmul_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, const __grid_constant__ CUtensorMap y,
                         const __grid_constant__ CUtensorMap pre, const __grid_constant__ ProductOutput out) {
#ifdef ETT_SM90A
    constexpr int kCluster = Tile::kCluster;
    ETT_DYNAMIC_SMEM(dynamic);
    unsigned char* const smem = panel_smem(dynamic);
    const uint32_t stages = smem_address(smem), full = stages + Tile::kBars, empty = full + Tile::kStages * 8;
    const int lane = int(threadIdx.x) % 32, rank = kCluster > 1 ? cluster_rank() : 0;
    if (threadIdx.x == 0) {
        for (int s = 0; s < Tile::kStages; ++s) {
            bar_init(full + s * 8, 1);
            bar_init(empty + s * 8, 8 * kCluster);  // the warps that multiply
        }
        bar_init_done();
        prefetch_map(&a);
        prefetch_map(&b);
    }
    if constexpr (kCluster > 1)
        cluster_sync();
    else
        __syncthreads();

    const int steps = (out.depth + kDepth - 1) / kDepth;
    const int tile_rows = (out.rows + kCluster * kTileRows - 1) / (kCluster * kTileRows), tile_cols = (out.cols + Tile::kCols - 1) / Tile::kCols;
    const int tiles = tile_rows * tile_cols;
    auto row_of = [&](int tile, int& col0) {
        const int first = tile / (Tile::kBand * tile_cols) * Tile::kBand, height = min(tile_rows - first, Tile::kBand);
        const int in_band = tile - first * tile_cols;
        col0 = in_band / height * Tile::kCols;
        return ((first + in_band % height) * kCluster + rank) * kTileRows;
    };
    Ring<Tile::kStages> ring;

    if (threadIdx.x < kWarpgroup) {
        give_registers<40>();
        if (threadIdx.x == 0) {
            for (int tile = int(blockIdx.x) / kCluster; tile < tiles; tile += int(gridDim.x) / kCluster) {
                int col0;
                const int row0 = row_of(tile, col0);
                for (int k = 0; k < steps; ++k, ring.next()) {
                    const uint32_t bar = full + ring.slot * 8, to_a = stages + ring.slot * Tile::kStage;
                    const uint32_t to_b = to_a + Tile::kBytesA + rank * Tile::kLoadCols * kDepth * 2;
                    const int from_b = col0 + rank * Tile::kLoadCols;
                    auto load_b = [&](uint32_t to, int x, int y) {
                        if constexpr (kCluster > 1)
                            tma_load_to((1 << kCluster) - 1, to, &b, bar, x, y);
                        else
                            tma_load(to, &b, bar, x, y);
                    };
                    bar_wait(empty + ring.slot * 8, ring.parity ^ 1);
                    bar_expect(bar, Tile::kStage);
                    if constexpr (Tile::kTa) {
                        tma_load(to_a, &a, bar, row0, k * kDepth);
                        tma_load(to_a + Tile::kPanel, &a, bar, row0 + 64, k * kDepth);
                    } else {
                        tma_load(to_a, &a, bar, k * kDepth, row0);
                    }
                    if constexpr (Tile::kTb) {
                        load_b(to_b, k * kDepth, from_b);
                    } else {
#pragma unroll
                        for (int p = 0; p < Tile::kLoadCols / 64; ++p) load_b(to_b + p * Tile::kPanel, from_b + p * 64, k * kDepth);
                    }
                }
            }
        }
        __syncwarp();
    } else {
        take_registers<232>();
        const int part = int(threadIdx.x) / kWarpgroup - 1, thread = int(threadIdx.x) % kWarpgroup;
        const uint32_t stores = stages + Tile::kStores + part * 2 * Tile::kPanel;
        bf16* const biases = reinterpret_cast<bf16*>(smem + Tile::kBias) + part * Tile::kCols;
        // Where this lane's row of stmatrix begins in a panel, and the piece of its first matrix.
        const uint32_t store_row = (thread / 32 * 16 + lane % 16) * kPanelRowBytes;
        const int piece = lane / 16;
        uint32_t buffer = 0;
        float acc[Tile::kCols / 2];
#pragma unroll
        for (int i = 0; i < Tile::kCols / 2; ++i) acc[i] = 0.f;
        auto release = [&](uint32_t slot) {
            if constexpr (kCluster > 1) {
                if (lane < kCluster) bar_arrive_at(lane, empty + slot * 8);
            } else {
                if (lane == 0) bar_arrive(empty + slot * 8);
            }
        };

        for (int tile = int(blockIdx.x) / kCluster; tile < tiles; tile += int(gridDim.x) / kCluster) {
            int col0;
            const int row0 = row_of(tile, col0) + part * kPartRows;
            constexpr int kBiases = (Tile::kCols + kWarpgroup - 1) / kWarpgroup;
            bf16 bias[kBiases];
#pragma unroll
            for (int i = 0; i < kBiases; ++i) {
                const int c = i * kWarpgroup + thread;
                bias[i] = out.bias && c < Tile::kCols && col0 + c < out.cols ? out.bias[col0 + c] : bf16{0};
            }

            uint32_t before = 0;
            for (int k = 0; k < steps; ++k) {
                const uint32_t at = stages + ring.slot * Tile::kStage, at_a = at + part * Tile::kPanel, at_b = at + Tile::kBytesA;
                const uint32_t low_a = Tile::kTa ? mn_major(at_a, Tile::kPanel) : k_major(at_a);
                const uint32_t low_b = Tile::kTb ? k_major(at_b) : mn_major(at_b, Tile::kPanel);
                bar_wait(full + ring.slot * 8, ring.parity);
                products_begin();
#pragma unroll
                for (int s = 0; s < kDepth / 16; ++s)
                    mma<Tile::kCols, Tile::kTa, !Tile::kTb>(acc, low_a + s * step(Tile::kTa ? 2048 : 32), low_b + s * step(Tile::kTb ? 32 : 2048),
                                                            k > 0 || s > 0);
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
                    const int row = row0 + acc_row(i);
                    if (row >= out.rows) continue;
                    float* const to = out.y_acc + row * out.ld + col0 + acc_col(0);
                    const int rest = out.cols - col0 - acc_col(0);
#pragma unroll
                    for (int j0 = 0; j0 < Tile::kCols / 8; j0 += 8) {
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
                continue;
            }
#pragma unroll
            for (int i = 0; i < kBiases; ++i)
                if (i * kWarpgroup + thread < Tile::kCols) biases[i * kWarpgroup + thread] = bias[i];
#pragma unroll
            for (int p = 0; p < Tile::kPanels; ++p) {
                const int col = col0 + p * kPanelCols;
                if (col >= out.cols) continue;
                // The panels that are about to be overwritten have been read.
                if (thread == 0) {
                    if (out.gelu)
                        stores_read<0>();
                    else
                        stores_read<1>();
                }
                named_barrier(1 + part, kWarpgroup);
#pragma unroll
                for (int s = 0; s < 4; ++s) {
                    float v[8];
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        float two[2];
                        load<2>(two, biases + p * kPanelCols + (2 * s + j) * 8 + acc_col(0));
#pragma unroll
                        for (int i = 0; i < 4; ++i) v[j * 4 + i] = acc[p * 32 + s * 8 + j * 4 + i] + two[i % 2];
                    }
                    const uint32_t to = stores + store_row + ((2 * s + piece) ^ (lane % 8)) * 16;
                    if (out.gelu) {
                        stmatrix_x4(to + Tile::kPanel, pack_bf16x2(v[0], v[1]), pack_bf16x2(v[2], v[3]), pack_bf16x2(v[4], v[5]), pack_bf16x2(v[6], v[7]));
#pragma unroll
                        for (int i = 0; i < 8; ++i) v[i] = gelu_tanh<bf16>(v[i]);
                        stmatrix_x4(to, pack_bf16x2(v[0], v[1]), pack_bf16x2(v[2], v[3]), pack_bf16x2(v[4], v[5]), pack_bf16x2(v[6], v[7]));
                    } else {
                        stmatrix_x4(to + buffer, pack_bf16x2(v[0], v[1]), pack_bf16x2(v[2], v[3]), pack_bf16x2(v[4], v[5]), pack_bf16x2(v[6], v[7]));
                    }
                }
                proxy_fence();
                named_barrier(1 + part, kWarpgroup);
                if (thread == 0) {
                    if (out.gelu) tma_store(&pre, stores + Tile::kPanel, col, row0);
                    tma_store(&y, stores + buffer, col, row0);
                    stores_commit();
                }
                if (!out.gelu) buffer ^= Tile::kPanel;
            }
        }
        if (thread == 0) stores_done<0>();
    }
    if constexpr (kCluster > 1) cluster_sync();
#endif
}

// Rows begin at multiples of 16 bytes, as TMA requires.
inline bool copyable(const ett_view& v) {
    return !present(v) || (reinterpret_cast<uintptr_t>(v.ptr) % 16 == 0 && (rows(v) == 1 || stride(v) * dtype_size(v.dtype) % 16 == 0));
}

struct Operands {
    const ett_view *a, *b, *bias, *y, *pre;  // bias and pre: null if absent
    bool ta, tb;
    bool add;  // add to y, which is f32
};

inline bool can_multiply(const Operands& p) {
    const int64_t depth = p.ta ? rows(*p.a) : cols(*p.a), most = 1 << 30;
    return is_hopper() && p.a->dtype == ETT_BF16 && copyable(*p.a) && copyable(*p.b) && copyable(*p.y) && (!p.pre || copyable(*p.pre)) &&
           depth > 0 && depth < most && rows(*p.y) < most && cols(*p.y) < most;
}

template <int COLS, int STAGES, int CLUSTER, int BAND>
int32_t multiply(const char* op, const Operands& p, int multiprocessors, const ett_launch* l) {
    auto go = [&](auto tile) {
        using Tile = decltype(tile);
        CUtensorMap a, b, y, pre;
        auto map = [&](CUtensorMap* m, const ett_view& v, int box_rows) {
            return make_panel_map(op, m, v.ptr, rows(v), cols(v), round_up(stride(v), 8), uint32_t(box_rows));
        };
        memset(&y, 0, sizeof y);
        int32_t status = map(&a, *p.a, p.ta ? kDepth : kTileRows);
        if (status == ETT_OK) status = map(&b, *p.b, p.tb ? Tile::kLoadCols : kDepth);
        if (status == ETT_OK && !p.add) status = map(&y, *p.y, kPartRows);
        pre = y;
        if (status == ETT_OK && p.pre) status = map(&pre, *p.pre, kPartRows);
        if (status != ETT_OK) return status;
        const int64_t n = rows(*p.y), o = cols(*p.y), depth = p.ta ? rows(*p.a) : cols(*p.a);
        const ProductOutput out{p.bias ? data<const bf16>(*p.bias) : nullptr, p.add ? data<float>(*p.y) : nullptr, stride(*p.y), int(n), int(o), int(depth), p.pre != nullptr};
        const int64_t tiles = ceil_div(n, CLUSTER * kTileRows) * ceil_div(o, COLS);
        const dim3 grid(unsigned(std::min<int64_t>(tiles, std::max(multiprocessors / CLUSTER, 1)) * CLUSTER));
        return launch(op, hopper_matmul_kernel<Tile>, grid, dim3(kThreads), Tile::kSmem, l, a, b, y, pre, out);
    };
    if (p.ta) return p.tb ? go(ProductTile<COLS, STAGES, CLUSTER, BAND, true, true>{}) : go(ProductTile<COLS, STAGES, CLUSTER, BAND, true, false>{});
    return p.tb ? go(ProductTile<COLS, STAGES, CLUSTER, BAND, false, true>{}) : go(ProductTile<COLS, STAGES, CLUSTER, BAND, false, false>{});
}

}  // namespace hopper
}  // namespace ett
#endif  // ETT_SHIM
