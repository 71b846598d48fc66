// hopper_weight.cuh: the weight gradient of conv2d_bwd_weight.cu on Hopper: bf16, by wgmma, from tiles of positions and the
// pixels that they see.
//
// A block has 64 outputs, 64 channels and a part of the tiles of 16 lines of 8 positions. One thread fills a ring of stages:
// a tile of dy, and boxes of pixels (hopper_images.cuh). The sums are dy^T times the pixels, both MN-major: 64 outputs by 64
// channels of each tap. The operands of neighbouring taps of a row begin at neighbouring pixels of the same box, so that a
// product with panels one pixel apart has all of them. A warpgroup has one row of taps.
//
// With a step of 2, the pixels of each parity of line and column are a box of their own, in which neighbouring positions see
// neighbouring pixels; the taps of a parity share its box. A kernel of 4 x 4 is divided among two blocks, which have two rows
// of taps each: those that share boxes.
//
// With a norm, all warps but that of the thread that copies normalise the box of the stage after the next in shared memory, while
// the products of this one are under way. The other warps beside that thread add dy for the gradient of the bias, for which the blocks of the
// same outputs take turns with the tiles.
#pragma once

#include "hopper_images.cuh"

#ifndef ETT_SHIM

namespace ett {
namespace conv {
namespace hopper_weight {

using namespace hopper;
using namespace hopper_images;

inline constexpr int kOutputs = 64;                               // of a block; and kChannels channels
inline constexpr int kLines = 16, kPositions = kLines * kAcross;  // of a tile
inline constexpr int kDyBytes = kPositions * kPanelRowBytes;
inline constexpr int kMostStages = 5;
inline constexpr int kTapSums = kChannels / 2;  // of a tap, per thread

// Taps in a row and column of the kernel, and the step from one position to the next.
template <int TAPS, int STEP, bool NORM> struct Shape {
    static_assert((TAPS == 3 || TAPS == 4) && (STEP == 1 || STEP == 2) && (!NORM || (TAPS == 3 && STEP == 1)));
    static constexpr int kTaps = TAPS, kStep = STEP;
    static constexpr bool kNorm = NORM;
    static constexpr int kDivided = TAPS == 3 ? 1 : 2;          // blocks that the rows of taps are divided among
    static constexpr int kRows = TAPS / kDivided;               // of taps in a block, one for each warpgroup that multiplies
    static constexpr int kSums = TAPS * kTapSums;
    // Boxes: (a, b) is seen by every kStep-th row of taps from a on, and column from b on, counted from the block's first.
    static constexpr int kBoxRows = kDivided == 1 ? STEP : 1;
    __host__ __device__ static constexpr int rows_of(int a) { return kDivided == 1 ? (TAPS - a + STEP - 1) / STEP : kRows; }
    __host__ __device__ static constexpr int columns_of(int b) { return (TAPS - b + STEP - 1) / STEP; }
    __host__ __device__ static constexpr int lines(int a) { return kLines + rows_of(a) - 1; }
    __host__ __device__ static constexpr int across(int b) { return kAcross + columns_of(b) - 1; }
    // The accumulators have the taps in the order of their boxes.
    __host__ __device__ static constexpr int first_of(int b) { return b == 0 ? 0 : columns_of(0); }
    __host__ __device__ static constexpr int column(int n) { return n < columns_of(0) ? n * STEP : (n - columns_of(0)) * STEP + 1; }
    // Where box (a, b) lies in a stage. One after the last: the size of a stage.
    __host__ __device__ static constexpr int box_at(int a, int b) {
        int at = kDyBytes;
        for (int n = 0; n < a * STEP + b; ++n) at += box_space(lines(n / STEP), across(n % STEP));
        return at;
    }
    // Bytes that are copied to a stage.
    __host__ __device__ static constexpr int copied() {
        int bytes = kDyBytes;
        for (int n = 0; n < kBoxRows * STEP; ++n) bytes += box_bytes(lines(n / STEP), across(n % STEP));
        return bytes;
    }
    static constexpr int kStage = box_at(kBoxRows, 0);

    // Warpgroups: the first copies and helps, the others multiply. Registers of a thread of each; a block shares out those
    // that it is launched with.
    static constexpr int kThreads = (1 + kRows) * kWarpgroup, kLaunchRegisters = 65536 / kThreads / 8 * 8;
    static constexpr int kHelpRegisters = 56, kSumRegisters = kRows == 2 ? 224 : 152;
    static_assert(kHelpRegisters + kRows * kSumRegisters <= (1 + kRows) * kLaunchRegisters);
    // Those that add dy, the warps from the second on; and those that normalise, these and all that follow.
    static constexpr int kHelpers = 96, kNormThreads = kThreads - 32;

    // Shared memory: the ring; sums of dy of each warp that helps; barriers.
    static constexpr int kBiasBytes = kHelpers / 32 * kOutputs * 4, kFixed = kBiasBytes + 3 * kMostStages * 8 + 1024;
    static constexpr int kStages = std::min(kMostStages, int(kMostSmem - kFixed) / kStage);
    static constexpr int kBias = kStages * kStage, kBars = kBias + kBiasBytes, kSmem = kBias + kFixed;
    static_assert(kStages >= (NORM ? 4 : 2), "with a norm, a stage is prepared two tiles ahead");
};

// The tiles of positions, and the blocks of a part of them.
struct Tiles {
    int64_t down, across, all;     // of an image; of all images
    int64_t row_tiles, col_tiles;  // outputs; channels and, fastest, the blocks that the rows of taps are divided among
};

struct Product {
    CUtensorMap dy, x[2][2];  // x: of the parity of a row and column of taps
    InputNorm<bf16> norm;     // of x
    float *sums, *bias_sums;  // [parts, outputs, ld]; [parts, col_tiles, outputs], or null
    int64_t ld;
    int outputs, channels, h, w, pad_top, pad_left;
    int row_tiles, col_tiles, parts, down, across, tiles;
};

#ifdef ETT_SM90A

// The first position of a tile.
struct Place {
    int image, line, column;

    __device__ __forceinline__ Place(const Product& p, int tile) {
        image = tile / (p.down * p.across);
        const int in_image = tile - image * (p.down * p.across);
        line = in_image / p.across * kLines;
        column = in_image % p.across * kAcross;
    }
    // Moves on to the next tile.
    __device__ __forceinline__ void next(const Product& p) {
        column += kAcross;
        if (column < p.across * kAcross) return;
        column = 0;
        line += kLines;
        if (line < p.down * kLines) return;
        line = 0;
        ++image;
    }
};

// The product of 16 positions with the pixels of box column B. `x`: what the first tap sees.
template <class S, int B> __device__ __forceinline__ void multiply_taps(float (&acc)[S::kSums], uint32_t dy, uint32_t x) {
    constexpr int kColumns = S::columns_of(B), kFirst = S::first_of(B) * kTapSums;
    constexpr uint32_t kHigh = desc_high(S::across(B) * kPixelBytes);
    mma<kColumns * kChannels, true, true, bf16, kFirst>(acc, dy, x, true, kHigh);
}

// Adds a thread's share of a tile of dy: piece thread % 8 of every (THREADS / 8)th position.
template <int THREADS> __device__ __forceinline__ void add_dy(float (&sums)[8], uint32_t tile, int thread) {
    constexpr int kAtOnce = THREADS / 8, kTogether = 4;
#pragma unroll 1
    for (int first = thread / 8; first < kPositions; first += kAtOnce * kTogether) {
        uint32_t v[kTogether][4];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) load_shared(v[i], piece_at(tile, min(first + i * kAtOnce, kPositions - 1), thread % 8));
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            if (first + i * kAtOnce >= kPositions) continue;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                sums[2 * e] += bits_to_float(v[i][e] << 16);
                sums[2 * e + 1] += bits_to_float(v[i][e] & 0xffff0000u);
            }
        }
    }
}

// Stores the sums over all threads. `smem`: kOutputs floats for every warp.
template <int THREADS> __device__ __forceinline__ void store_bias(float (&sums)[8], float* smem, float* to, int outputs, int thread) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        sums[e] += __shfl_xor_sync(0xffffffffu, sums[e], 8);
        sums[e] += __shfl_xor_sync(0xffffffffu, sums[e], 16);
    }
    if (thread % 32 < 8)
#pragma unroll
        for (int e = 0; e < 8; ++e) smem[thread / 32 * kOutputs + thread % 8 * 8 + e] = sums[e];
    if constexpr (THREADS > 32)
        named_barrier(1, THREADS);
    else
        __syncwarp();
    for (int o = thread; o < min(outputs, kOutputs); o += THREADS) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < THREADS / 32; ++w) sum += smem[w * kOutputs + o];
        to[o] = sum;
    }
}

// The thread's share in normalising the box of a stage: 4 channels of the pixels of a column, on every kLinesApart-th line.
template <class S> struct Share {
    static constexpr int kLines = S::lines(0), kAcross = S::across(0), kPieces = kChannels / 4;
    static constexpr int kLinesApart = S::kNormThreads / kPieces / kAcross, kEach = (kLines + kLinesApart - 1) / kLinesApart, kTogether = 3;
    // From one of the thread's pixels to the next; after kCycle of them the swizzle repeats.
    static constexpr int kApart = kLinesApart * kAcross, kCycle = kApart % 8 == 0 ? 1 : kApart % 4 == 0 ? 2 : kApart % 2 == 0 ? 4 : 8;

    const Product& p;
    const uint32_t ready;
    const int c, line, column;
    const bool works;  // there may be a few more threads than pieces of lines
    int image = -1;
    PieceNorm<4> norm{};  // 0 beyond the channels
    uint32_t at[kCycle];  // of its pixels in the box, without what is between them

    __device__ __forceinline__ Share(const Product& p, uint32_t ready, int c0)
        : p(p), ready(ready), c(c0 + thread() % kPieces * 4), line(thread() / kPieces / kAcross), column(thread() / kPieces % kAcross),
          works(thread() >= 0 && line < kLinesApart) {
        const int piece = thread() % kPieces, q = line * kAcross + column;
#pragma unroll
        for (int i = 0; i < kCycle; ++i) at[i] = S::box_at(0, 0) + q * kPixelBytes + (piece / 2 ^ ((q + i * kApart) & 7)) * 16 + piece % 2 * 8;
    }
    static __device__ __forceinline__ int thread() { return int(threadIdx.x) - 32; }

    // Normalises the thread's pixels of a stage that has arrived.
    __device__ __forceinline__ void activate(uint32_t stage, int slot, const Place& place) {
        if (place.image != image) {
            image = place.image;
            if (c < p.channels) norm.take(p.norm, image, c);
        }
        const int y = place.line - p.pad_top + line, x = place.column - p.pad_left + column;
        if (works && unsigned(x) < unsigned(p.w)) {
#pragma unroll
            for (int first = 0; first < kEach; first += kTogether) {
                uint32_t v[kTogether][2];
#pragma unroll
                for (int i = first; i < first + kTogether; ++i)
                    if (i < kEach) load_shared(v[i - first], stage + at[i % kCycle] + i * kApart * kPixelBytes);
#pragma unroll
                for (int i = first; i < first + kTogether; ++i)
                    if (i < kEach) norm.apply(v[i - first]);
#pragma unroll
                for (int i = first; i < first + kTogether; ++i)
                    if (i < kEach && line + i * kLinesApart < kLines && unsigned(y + i * kLinesApart) < unsigned(p.h))
                        store_shared(stage + at[i % kCycle] + i * kApart * kPixelBytes, v[i - first]);
            }
        }
        proxy_fence();
        __syncwarp();
        if (threadIdx.x % 32 == 0) bar_arrive(ready + slot * 8);
    }
};

#endif  // ETT_SM90A

template <int TAPS, int STEP, bool NORM>
__global__ void __launch_bounds__(Shape<TAPS, STEP, NORM>::kThreads, 1) hopper_weight_kernel(const __grid_constant__ Product p) {
#ifdef ETT_SM90A
    using S = Shape<TAPS, STEP, NORM>;
    ETT_DYNAMIC_SMEM(dynamic);
    unsigned char* const smem = panel_smem(dynamic);
    const uint32_t ring = smem_address(smem), full = ring + S::kBars, ready = full + S::kStages * 8, empty = ready + S::kStages * 8;
    if (threadIdx.x == 0) {
        for (int s = 0; s < S::kStages; ++s) {
            bar_init(full + s * 8, 1);
            bar_init(ready + s * 8, S::kNormThreads / 32);
            bar_init(empty + s * 8, (S::kRows * kWarpgroup + S::kHelpers) / 32);
        }
        bar_init_done();
    }
    __syncthreads();

    // Blocks of the same part read the same pixels.
    const int per_part = p.row_tiles * p.col_tiles, part = int(blockIdx.x) / per_part, tile = int(blockIdx.x) - part * per_part;
    const int row0 = tile / p.col_tiles * kOutputs, col_tile = tile % p.col_tiles;
    const int c0 = col_tile / S::kDivided * kChannels, divided = col_tile % S::kDivided;
    const int first = int(int64_t(p.tiles) * part / p.parts), end = int(int64_t(p.tiles) * (part + 1) / p.parts);
    // The block's first row of taps. With a step of 2, blocks that the rows are divided among have those of one parity each.
    const int tap_row = STEP == 1 ? divided * S::kRows : divided;
    const int thread = int(threadIdx.x) % kWarpgroup;

    Share<S> share(p, ready, c0);

    if (threadIdx.x < kWarpgroup) {
        give_registers<S::kHelpRegisters>();
        if (thread == 0) {
            Ring<S::kStages> at;
            Place place(p, first);
#pragma unroll 1
            for (int t = first; t < end; ++t, place.next(p), at.next()) {
                const uint32_t bar = full + at.slot * 8, stage = ring + at.slot * S::kStage;
                bar_wait(empty + at.slot * 8, at.parity ^ 1);
                bar_expect(bar, S::copied());
                tma_load(stage, &p.dy, bar, row0, place.column, place.line, place.image);
#pragma unroll
                for (int a = 0; a < S::kBoxRows; ++a)
#pragma unroll
                    for (int b = 0; b < STEP; ++b) {
                        // Rounded down: for an odd padding, the pixels of a parity begin before the image.
                        const int y = place.line + ((tap_row + a - p.pad_top) >> (STEP - 1)), x = place.column + ((b - p.pad_left) >> (STEP - 1));
                        tma_load(stage + S::box_at(a, b), &p.x[S::kDivided == 1 ? a : tap_row % STEP][b], bar, c0, x, y, place.image);
                    }
            }
        } else if (thread >= 32 && thread < 32 + S::kHelpers) {
            const int helper = thread - 32;
            int turn = first % p.col_tiles;
            float bias[8] = {};
            Ring<S::kStages> at;
            Place place(p, first);
#pragma unroll 1
            for (int t = first; t < end; ++t, place.next(p), at.next()) {
                const uint32_t stage = ring + at.slot * S::kStage;
                bar_wait(full + at.slot * 8, at.parity);
                if constexpr (NORM) share.activate(stage, at.slot, place);
                if (p.bias_sums && turn == col_tile) add_dy<S::kHelpers>(bias, stage, helper);
                if (++turn == p.col_tiles) turn = 0;
                __syncwarp();
                if (helper % 32 == 0) bar_arrive(empty + at.slot * 8);
            }
            if (p.bias_sums)
                store_bias<S::kHelpers>(bias, reinterpret_cast<float*>(smem + S::kBias),
                                        p.bias_sums + (int64_t(part) * p.col_tiles + col_tile) * p.outputs + row0, p.outputs - row0, helper);
        }
    } else {
        take_registers<S::kSumRegisters>();
        const int row = int(threadIdx.x) / kWarpgroup - 1;
        const int a = S::kBoxRows == 1 ? 0 : row % STEP, down = S::kBoxRows == 1 ? row : row / STEP;
        // Of what the row's first taps see, in a stage.
        uint32_t x_at[STEP];
#pragma unroll
        for (int b = 0; b < STEP; ++b) x_at[b] = (a == 0 ? S::box_at(0, b) : S::box_at(1, b)) + down * S::across(b) * kPixelBytes;
        float acc[S::kSums];
#pragma unroll
        for (int i = 0; i < S::kSums; ++i) acc[i] = 0.f;
        pin(acc);

        Ring<S::kStages> at, next;
        Place place(p, first);
        uint32_t before = 0;
        auto prepare = [&](int t) {
            if (t >= end) return;
            bar_wait(full + next.slot * 8, next.parity);
            share.activate(ring + next.slot * S::kStage, int(next.slot), place);
            next.next();
            place.next(p);
        };
        if constexpr (NORM) {
            prepare(first);
            prepare(first + 1);
        }
#pragma unroll 1
        for (int t = first; t < end; ++t, at.next()) {
            const uint32_t stage = ring + at.slot * S::kStage, dy = mn_major(stage, kDyBytes);
            uint32_t x[STEP];
#pragma unroll
            for (int b = 0; b < STEP; ++b) x[b] = mn_major(stage + x_at[b], kPixelBytes);
            bar_wait((NORM ? ready : full) + at.slot * 8, at.parity);
            products_begin();
#pragma unroll
            for (int s = 0; s < kPositions / 16; ++s) {
                multiply_taps<S, 0>(acc, dy + s * step(2048), x[0] + s * step(2 * S::across(0) * kPixelBytes));
                if constexpr (STEP == 2) multiply_taps<S, 1>(acc, dy + s * step(2048), x[1] + s * step(2 * S::across(1) * kPixelBytes));
            }
            products_end();
            if constexpr (NORM) prepare(t + 2);
            products_wait<1>();
            if (t > first && thread % 32 == 0) bar_arrive(empty + before * 8);
            before = at.slot;
        }
        products_wait<0>();
        pin(acc);
        if (thread % 32 == 0) bar_arrive(empty + before * 8);

        float* const sums = p.sums + int64_t(part) * p.outputs * p.ld;
        const int tap0 = (tap_row + (S::kDivided == 1 ? row : row * STEP)) * TAPS;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int output = row0 + acc_row(i);
            if (output >= p.outputs) continue;
            float* const to = sums + output * p.ld + c0 + acc_col(0);
#pragma unroll
            for (int n = 0; n < TAPS; ++n)
#pragma unroll
                for (int j = 0; j < kChannels / 8; ++j) {
                    const float* const sum = acc + n * kTapSums + 4 * j + 2 * i;
                    const float two[2] = {sum[0], sum[1]};
                    if (c0 + 8 * j < p.channels) store<2>(to + int64_t(tap0 + S::column(n)) * p.channels + 8 * j, two);
                }
        }
    }
#endif
}

// ---- host ------------------------------------------------------------------------------------------------

inline Tiles tiles_of(const ett_conv2d_bwd_weight_args* a) {
    const int64_t down = ceil_div(a->dy.dims[1], kLines), across = ceil_div(a->dy.dims[2], kAcross);
    const int64_t divided = a->dw.dims[1] == 4 ? 2 : 1;
    return {down, across, a->dy.dims[0] * down * across, ceil_div(a->dw.dims[0], kOutputs), ceil_div(a->dw.dims[3], kChannels) * divided};
}

// Whether the kernel supports the call, as far as shapes say so.
inline bool shape_fits(const ett_conv2d_bwd_weight_args* a) {
    const int64_t* d = a->dw.dims;
    const bool kernel = d[1] == d[2] && (d[1] == 3 || d[1] == 4) && (a->stride == 1 || a->stride == 2);
    const bool norm = !present(a->mean) || (d[1] == 3 && a->stride == 1);
    return a->x.dtype == ETT_BF16 && kernel && norm && d[0] % 8 == 0 && d[3] % 8 == 0 && a->x.dims[1] >= a->stride && a->x.dims[2] >= a->stride &&
           tiles_of(a).all < int64_t(1) << 31;
}

// Whether the kernel supports the call, on Hopper.
inline bool can(const ett_conv2d_bwd_weight_args* a) { return shape_fits(a) && mappable(a->x) && mappable(a->dy); }

// The sums of `parts` parts. bias_sums may be null.
inline int32_t run(const char* op, const ett_conv2d_bwd_weight_args* a, int64_t parts, int64_t ld, float* sums, float* bias_sums,
                   const ett_launch* l) {
    const Tiles t = tiles_of(a);
    const int64_t* d = a->dw.dims;
    const NormViews norm{a->mean, a->rstd, a->gamma, a->beta};
    Product p{};
    p.norm = input_norm<bf16>(norm, d[3]);
    p.sums = sums, p.bias_sums = bias_sums, p.ld = ld;
    p.outputs = int(d[0]), p.channels = int(d[3]), p.h = int(a->x.dims[1]), p.w = int(a->x.dims[2]);
    p.pad_top = int(a->pad_top), p.pad_left = int(a->pad_left);
    p.row_tiles = int(t.row_tiles), p.col_tiles = int(t.col_tiles), p.parts = int(parts);
    p.down = int(t.down), p.across = int(t.across), p.tiles = int(t.all);
    auto go = [&](auto shape) {
        using S = decltype(shape);
        int32_t status = make_image_map(op, &p.dy, a->dy, 1, 0, 0, kLines, kAcross);
        for (int u = 0; u < S::kStep; ++u)
            for (int v = 0; v < S::kStep; ++v)
                if (status == ETT_OK)
                    status = make_image_map(op, &p.x[u][v], a->x, S::kStep, (u + p.pad_top) % S::kStep, (v + p.pad_left) % S::kStep,
                                            S::lines(S::kDivided == 1 ? u : 0), S::across(v));
        if (status != ETT_OK) return status;
        const dim3 grid(unsigned(t.row_tiles * t.col_tiles * parts));
        return launch(op, hopper_weight_kernel<S::kTaps, S::kStep, S::kNorm>, grid, dim3(S::kThreads), S::kSmem, l, p);
    };
    if (d[1] == 4) return a->stride == 2 ? go(Shape<4, 2, false>{}) : go(Shape<4, 1, false>{});
    if (a->stride == 2) return go(Shape<3, 2, false>{});
    return p.norm.present() ? go(Shape<3, 1, true>{}) : go(Shape<3, 1, false>{});
}

}  // namespace hopper_weight
}  // namespace conv
}  // namespace ett
#endif  // ETT_SHIM
