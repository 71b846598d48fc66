// halo.cuh: 3x3 convolutions of stride 1 in bf16, of a normalised input or of few channels. A block computes 8 x 16
// positions. halo_kernel loads for every 32 channels the 10 x 18 pixels that its positions see once, normalises them in
// shared memory, and multiplies them by all nine taps: a tap is a shift of the pixel that each lane of ldmatrix addresses.
// (An input without a norm is faster with a copy per tap: conv2d.cu.)
#pragma once

#include "gather.cuh"
#include "reduce.cuh"

namespace ett {
namespace conv {
namespace halo {

constexpr int kLines = 8, kAcross = 16, kPositions = kLines * kAcross;  // positions of a block
constexpr int kWidth = kAcross + 2, kPixels = (kLines + 2) * kWidth;    // that it sees
constexpr int kTaps = 9, kDepth = 32, kStages = 4, kThreads = 128;
constexpr int kPieces = kDepth / 8, kAtOnce = kThreads / kPieces, kRounds = (kPixels + kAtOnce - 1) / kAtOnce;
constexpr int kBytes = kPixels * kDepth * 2;  // of the pixels of a chunk of channels
constexpr int kMostChannels = 1024;           // whose scale and shift fit into shared memory
constexpr int kMostOutputs = 1 << 16;         // whose weights are counted in 31 bits
static_assert(kRounds == kTaps - kStages + 1, "chunks are normalised while the last taps of the chunk before are multiplied");

// Four warps of 64 positions, with the weights of COLS outputs.
template <int COLS> using Tile = gemm::Tile<bf16, kPositions, COLS, kDepth, 64, COLS / 2, kStages, false, true, true>;

// Two chunks of pixels, the weights' stages, the results, and two floats of the norm per channel.
template <int COLS> int smem_bytes(int64_t channels) {
    return 2 * kBytes + kStages * Tile<COLS>::kBytesB + kPositions * COLS * 2 + int(channels) * 8;
}

struct Product {
    Grid grid;  // 3 x 3 taps, step 1
    const bf16* x;
    InputNorm<bf16> norm;  // of x; of halo_kernel
    const bf16* w;         // [outputs, taps, channels], rows ld_w apart
    int ld_w;
    const bf16* bias;      // may be null
    // What is added to the results; or, with THROUGH, the input of the norm through whose gradient they pass. In the shape
    // of y; may be null.
    const bf16* extra;
    int64_t ld_extra;
    InputNorm<bf16> through;  // of first_kernel
    bf16* y;
    int64_t ld;
    // Null, or [images, tiles, 2, outputs]: means and sums of squared differences of the rounded results of a tile; with
    // THROUGH, sums of g and of g * xhat (channels.cuh).
    float* partials;
    int outputs, down, across;  // tiles of an image
    bool wide_y, wide_extra;
};

// A block's place: its image, its tile in it, and the first position.
struct Place {
    int tile, col0, image, row0, first;

    __device__ __forceinline__ Place(const Product& p, int cols) {
        const int col_tiles = (p.outputs + cols - 1) / cols, tiles = p.down * p.across;
        tile = int(blockIdx.x) / col_tiles;
        col0 = (int(blockIdx.x) - tile * col_tiles) * cols;
        image = tile / tiles;
        const int in_image = tile - image * tiles;
        row0 = in_image / p.across * kLines;
        first = in_image % p.across * kAcross;
    }
};

// Sums N values over the eight lanes that hold the same columns. At each step a lane keeps one half of the values, by a bit
// of its number, so that v[0 .. N/8) are in the end those of columns `kept<N>()` and following.
template <int N> __device__ __forceinline__ void rows_sum(float (&v)[N]) {
    const int lane = int(threadIdx.x) % 32;
    int half = N / 2;
#pragma unroll
    for (int d = 16; d >= 4; d /= 2, half /= 2) {
        const bool upper = lane & d;
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            if (i >= half) continue;
            const float send = upper ? v[i] : v[i + half], keep = upper ? v[i + half] : v[i];
            v[i] = keep + __shfl_xor_sync(kAllLanes, send, d);
        }
    }
}
// What rows_sum keeps of values that are the same in these lanes.
template <int N> __device__ __forceinline__ void rows_keep(float (&v)[N]) {
    const int lane = int(threadIdx.x) % 32;
    int half = N / 2;
#pragma unroll
    for (int d = 16; d >= 4; d /= 2, half /= 2)
#pragma unroll
        for (int i = 0; i < N / 2; ++i)
            if (i < half && (lane & d)) v[i] = v[i + half];
}
template <int N> __device__ __forceinline__ int kept() {
    const int lane = int(threadIdx.x) % 32;
    return (lane / 16 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2) * (N / 8);
}

// Starts the copies of what is added to the results to where they will be staged.
template <int COLS> __device__ __forceinline__ void start_extra(const Product& p, const Place& at, unsigned char* smem_y) {
    constexpr int kOutPieces = COLS / 8, kOutAtOnce = kThreads / kOutPieces;
    if (!p.extra) return;
    const int piece = int(threadIdx.x) % kOutPieces, col = at.col0 + piece * 8;
#pragma unroll 4
    for (int r = int(threadIdx.x) / kOutPieces; r < kPositions; r += kOutAtOnce) {
        const int y = at.row0 + r / kAcross, x = at.first + r % kAcross;
        const bool inside = y < p.grid.rows && x < p.grid.cols;
        const bf16* const from = p.extra + ((int64_t(at.image) * p.grid.rows + y) * p.grid.cols + x) * p.ld_extra + col;
        unsigned char* const to = smem_y + gemm::swizzled<kOutPieces>(r, piece);
        if (p.wide_extra) {
            cp_async16(smem_address(to), from, inside && col < p.outputs);
        } else {
            for (int e = 0; e < 8; ++e) reinterpret_cast<bf16*>(to)[e] = inside && col + e < p.outputs ? from[e] : bf16{};
        }
    }
}

// Mean, rstd, gamma and beta of the block's outputs.
template <int COLS> __device__ __forceinline__ void through_table(const Product& p, const Place& at, float* smem_norm) {
    for (int c = int(threadIdx.x); c < COLS && at.col0 + c < p.outputs; c += kThreads) {
        const int channel = at.col0 + c;
        const int64_t of = int64_t(at.image) * p.through.groups + channel / p.through.width;
        const float four[4] = {p.through.mean[of], p.through.rstd[of], to_float(p.through.gamma[channel]), to_float(p.through.beta[channel])};
        store<4>(smem_norm + c * 4, four);
    }
}

// Adds bias and residual, or passes the gradient through SiLU; writes the results and the sums. All warps are done with
// `smem`, of at least 16 * COLS bytes; what start_extra and through_table brought is visible.
template <int COLS, bool THROUGH>
__device__ __forceinline__ void finish(const Product& p, const Place& at, gemm::Acc<Tile<COLS>>& acc, unsigned char* smem, unsigned char* smem_y,
                                       const float* smem_norm) {
    using Tile = Tile<COLS>;
    constexpr int kOutPieces = COLS / 8, kOutAtOnce = kThreads / kOutPieces;
    const Grid& g = p.grid;
    const int tid = int(threadIdx.x), lane = tid % 32;
    unsigned inside = 0;  // of the rows, which of the thread's
#pragma unroll
    for (int i = 0; i < Tile::kAccRows; ++i)
        inside |= unsigned(at.row0 + Tile::row(i) / kAcross < g.rows && at.first + Tile::row(i) % kAcross < g.cols) << i;
    const int lines = min(max(g.rows - at.row0 - Tile::warp_row() / kAcross, 0), 4), warp_n = lines * min(g.cols - at.first, kAcross);
    float(*const smem_sums)[COLS][2] = reinterpret_cast<float(*)[COLS][2]>(smem);  // [warps of the same columns]
    const bool with_sums = THROUGH || p.partials, with_extra = THROUGH || p.extra;
    // Per column: with THROUGH the sums of g and of g * xhat; else the first of the warp's results, the sum of the differences
    // from it and that of their squares.
    float pivot[Tile::kAccCols], sums[Tile::kAccCols], products[Tile::kAccCols];
#pragma unroll
    for (int j = 0; j < Tile::kAccCols; j += 2) {
        const int of = Tile::col(j), col = at.col0 + of;
        const float bias[2] = {p.bias && col < p.outputs ? to_float(p.bias[col]) : 0.f, p.bias && col + 1 < p.outputs ? to_float(p.bias[col + 1]) : 0.f};
        auto place = [&](int i) { return reinterpret_cast<bf16*>(smem_y + gemm::swizzled<kOutPieces>(Tile::row(i), of / 8)) + of % 8; };
        float x[Tile::kAccRows][2] = {};
        if (with_extra) {
#pragma unroll
            for (int i = 0; i < Tile::kAccRows; ++i) ett::load(x[i], place(i));
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) sums[j + e] = products[j + e] = 0.f;
        float norm[2][4];  // mean, rstd, gamma, beta
        if constexpr (THROUGH) {
            ett::load(norm[0], smem_norm + of * 4);
            ett::load(norm[1], smem_norm + of * 4 + 4);
        }
#pragma unroll
        for (int i = 0; i < Tile::kAccRows; ++i) {
            const bool counts = inside >> i & 1;
            float v[2] = {acc.at(i, j) + bias[0], acc.at(i, j + 1) + bias[1]};
            if constexpr (THROUGH) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float xhat = (x[i][e] - norm[e][0]) * norm[e][1];
                    v[e] = counts ? v[e] * silu_slope<bf16>(fmaf(xhat, norm[e][2], norm[e][3])) : 0.f;
                    sums[j + e] += v[e];
                    products[j + e] = fmaf(v[e], xhat, products[j + e]);
                }
                store<2>(place(i), v);
            } else {
                const float r[2] = {rounded<bf16>(v[0] + x[i][0]), rounded<bf16>(v[1] + x[i][1])};
                store<2>(place(i), r);
                if (with_sums) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        if (i == 0) pivot[j + e] = __shfl_sync(kAllLanes, r[e], lane % 4);
                        const float d = counts ? r[e] - pivot[j + e] : 0.f;
                        sums[j + e] += d;
                        products[j + e] = fmaf(d, d, products[j + e]);
                    }
                }
            }
        }
    }
    if (with_sums) {
        rows_sum(sums);
        rows_sum(products);
        if constexpr (!THROUGH) rows_keep(pivot);
#pragma unroll
        for (int k = 0; k < Tile::kAccCols / 8; ++k) {
            float two[2] = {sums[k], products[k]};
            if constexpr (!THROUGH) {
                // The mean and the sum of squared differences from it.
                const float d = warp_n > 0 ? sums[k] / float(warp_n) : 0.f;
                two[0] = warp_n > 0 ? pivot[k] + d : 0.f;
                two[1] = products[k] - sums[k] * d;
                if (two[1] < 0.f) two[1] = 0.f;  // NaN stays
            }
            store<2>(smem_sums[Tile::warp_row() / 64][Tile::col(kept<Tile::kAccCols>() + k)], two);
        }
    }
    __syncthreads();  // the results and the sums are visible
    if (THROUGH || p.partials) {
        for (int c = tid; c < COLS && at.col0 + c < p.outputs; c += kThreads) {
            const float *const one = smem_sums[0][c], *const two = smem_sums[1][c];
            float first = one[0] + two[0], second = one[1] + two[1];
            if constexpr (!THROUGH) {
                // Chan et al.; the first four lines of a tile are never empty.
                const int all = min(g.rows - at.row0, kLines) * min(g.cols - at.first, kAcross), upper = min(g.rows - at.row0, 4) * min(g.cols - at.first, kAcross);
                const float share = float(all - upper) / float(all), d = two[0] - one[0];
                first = one[0] + d * share;
                second += d * d * float(upper) * share;
            }
            float* const to = p.partials + int64_t(at.tile) * 2 * p.outputs + at.col0 + c;
            to[0] = first;
            to[p.outputs] = second;
        }
    }
    const int out_piece = tid % kOutPieces, col = at.col0 + out_piece * 8;
    if (col >= p.outputs) return;
#pragma unroll 4
    for (int r = tid / kOutPieces; r < kPositions; r += kOutAtOnce) {
        const int y = at.row0 + r / kAcross, x = at.first + r % kAcross;
        if (y >= g.rows || x >= g.cols) continue;
        const bf16* const from = reinterpret_cast<const bf16*>(smem_y + gemm::swizzled<kOutPieces>(r, out_piece));
        bf16* const to = p.y + ((int64_t(at.image) * g.rows + y) * g.cols + x) * p.ld + col;
        if (p.wide_y) {
            store_vec(to, load_vec<8>(from));
        } else {
            for (int e = 0; e < 8 && col + e < p.outputs; ++e) to[e] = from[e];
        }
    }
}

template <int COLS> __global__ void __launch_bounds__(kThreads, 2) halo_kernel(const __grid_constant__ Product p) {
    using Tile = Tile<COLS>;
    static_assert(Tile::kThreads == kThreads, "four warps");
    ETT_DYNAMIC_SMEM(smem);
    unsigned char* const smem_w = smem + 2 * kBytes;
    unsigned char* const smem_y = smem_w + kStages * Tile::kBytesB;
    float* const smem_norm = reinterpret_cast<float*>(smem_y + kPositions * COLS * 2);
    const Grid& g = p.grid;
    const Place at(p, COLS);
    const int lane = Tile::lane(), tid = int(threadIdx.x);
    const int piece = tid % kPieces, pixel = tid / kPieces, chunks = g.c / kDepth;

    // Pixel q of those that the block sees.
    auto line_of = [&](int q) { return at.row0 + g.at_y + q / kWidth; };
    auto column_of = [&](int q) { return at.first + g.at_x + q % kWidth; };
    auto fill_pixels = [&](int chunk) {
        const smem_addr to = smem_address(smem + chunk % 2 * kBytes);
        const bf16* const from = p.x + chunk * kDepth + piece * 8;
        const int first = opaque(pixel);
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
            const int q = first + r * kAtOnce, y = line_of(q), x = column_of(q);
            if (q < kPixels) cp_async16(to + gemm::swizzled<kPieces>(q, piece), g.pixels(from, (at.image * g.h + y) * g.w + x), g.inside(y, x));
        }
    };
    // Replaces every kRounds-th piece of a chunk by its activation; the padding stays 0.
    auto normalize = [&](int chunk, int round) {
        const int q = pixel + round * kAtOnce;
        if (q >= kPixels || !g.inside(line_of(q), column_of(q))) return;
        activate(reinterpret_cast<bf16*>(smem + chunk % 2 * kBytes + gemm::swizzled<kPieces>(q, piece)), smem_norm + (chunk * kDepth + piece * 8) * 2);
    };
    int from_w = (at.col0 + pixel) * p.ld_w + piece * 8;  // elements
    const int rest_w = p.outputs - at.col0 - pixel;
    // Starts the copies of the weights of stage s, of tap `tap`, and of a chunk of pixels that is needed kTaps - kStages + 1
    // stages later. Of the stages after the last one the weights are any.
    auto fill = [&](int s, int tap, int chunk) {
        if (tap == kStages - 1 && chunk < chunks) fill_pixels(chunk);
        const smem_addr to = smem_address(smem_w + s % kStages * Tile::kBytesB) + gemm::swizzled<kPieces>(pixel, piece);
#pragma unroll
        for (int r = 0; r < COLS; r += kAtOnce) cp_async16(to + r * kDepth * 2, p.w + from_w + r * p.ld_w, r < rest_w);
        from_w += tap == kTaps - 1 ? kDepth - (kTaps - 1) * g.c : g.c;
        cp_async_commit();
    };

    fill_pixels(0);
#pragma unroll 1
    for (int s = 0; s < kStages; ++s) {
        if (s == kStages - 1) start_extra<COLS>(p, at, smem_y);
        fill(s, s, 1);
    }
    norm_table<bf16, kThreads>(smem_norm, p.norm, at.image, 0, g.c);
    cp_async_wait<kStages - 1>();
    __syncthreads();  // the first chunk, the first stage and the norm have arrived
#pragma unroll 1
    for (int r = 0; r < kRounds; ++r) normalize(0, r);
    __syncthreads();  // the first chunk is normalised

    gemm::Acc<Tile> acc;
    acc.clear();
    uint32_t a[2][4][4], b[2][COLS / 32][4];
    const int seen = Tile::warp_row() / kAcross * kWidth + lane % 16;  // the lane's first pixel at tap 0
    int s = 0, chunk = 0, tap = 0;
    auto load = [&](int k) {
        const smem_addr pixels = smem_address(smem + chunk % 2 * kBytes), stage = smem_address(smem_w + s % kStages * Tile::kBytesB);
        const int shifted = seen + tap + tap / 3 * (kWidth - 3);
#pragma unroll
        for (int m = 0; m < 4; ++m) ldmatrix_x4(a[k][m], pixels + gemm::swizzled<kPieces>(shifted + m * kWidth, k * 2 ^ lane / 16));
#pragma unroll
        for (int n = 0; n < COLS / 32; ++n) gemm::load_b<false, kPieces>(b[k][n], stage, Tile::warp_col() + n * 16, k * 16);
    };
    auto multiply = [&](int k) {
#pragma unroll
        for (int n = 0; n < COLS / 16; ++n)
#pragma unroll
            for (int m = 0; m < 4; ++m) mma_bf16_16816(acc.c[m][n], a[k][m], b[k][n / 2][n % 2 * 2], b[k][n / 2][n % 2 * 2 + 1]);
    };
    load(0);
#pragma unroll 1
    while (chunk < chunks) {
        load(1);
        multiply(0);
        // The next chunk has arrived, with the stage of tap kStages - 1.
        if (tap >= kStages - 1 && chunk + 1 < chunks) normalize(chunk + 1, tap - (kStages - 1));
        ++s;
        if (++tap == kTaps) tap = 0, ++chunk;
        cp_async_wait<kStages - 2>();
        __syncthreads();  // the next stage has arrived; all threads have loaded this one's last fragments
        fill(s + kStages - 1, tap + kStages - 1 < kTaps ? tap + kStages - 1 : tap + kStages - 1 - kTaps, chunk + 1);
        load(0);
        multiply(1);
    }
    cp_async_wait<0>();
    __syncthreads();  // all warps are done with the stages; what is added to the results has arrived

    finish<COLS, false>(p, at, acc, smem, smem_y, nullptr);
}

// ---- few inputs ------------------------------------------------------------------------------------------

constexpr int kFewInputs = 3;  // channels, so that all taps are one chunk of the depth

// Four blocks of 64 outputs are resident: the work is to write the results.
template <bool THROUGH> __global__ void __launch_bounds__(kThreads, 4) first_kernel(const __grid_constant__ Product p) {
    constexpr int kCols = 64;
    using Tile = Tile<kCols>;
    ETT_DYNAMIC_SMEM(smem);
    unsigned char* const smem_w = smem + Tile::kBytesA;
    unsigned char* const smem_y = smem_w + Tile::kBytesB;
    float* const smem_norm = reinterpret_cast<float*>(smem_y + kPositions * kCols * 2);
    const Grid& g = p.grid;
    const Place at(p, kCols);
    const int tid = int(threadIdx.x), piece = tid % kPieces;
    start_extra<kCols>(p, at, smem_y);
#pragma unroll
    for (int r = tid / kPieces; r < kCols; r += kAtOnce)
        cp_async16(smem_address(smem_w) + gemm::swizzled<kPieces>(r, piece), p.w + int64_t(at.col0 + r) * p.ld_w + piece * 8, at.col0 + r < p.outputs);
    cp_async_commit();
    // The columns of the thread's position.
    bf16 columns[kDepth] = {};
    const int y = at.row0 + g.at_y + tid / kAcross, x = at.first + g.at_x + tid % kAcross, pixel = (at.image * g.h + y) * g.w + x;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
        const bool inside = g.inside(y + tap / 3, x + tap % 3);
        const bf16* const from = g.pixels(p.x, pixel + tap / 3 * g.w + tap % 3);
#pragma unroll
        for (int c = 0; c < kFewInputs; ++c)
            if (inside) columns[tap * kFewInputs + c] = from[c];
    }
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
        Vec<bf16, 8> v;
#pragma unroll
        for (int e = 0; e < 8; ++e) v.v[e] = columns[n * 8 + e];
        *reinterpret_cast<Vec<bf16, 8>*>(smem + gemm::swizzled<kPieces>(tid, n)) = v;
    }
    if constexpr (THROUGH) through_table<kCols>(p, at, smem_norm);
    cp_async_wait<0>();
    __syncthreads();  // columns, weights and what is added to the results have arrived
    gemm::Acc<Tile> acc;
    acc.clear();
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
        gemm::Fragments<Tile> f;
        f.load(smem_address(smem), smem_address(smem_w), k);
        gemm::multiply(acc, f);
    }
    __syncthreads();  // all warps are done with the columns
    finish<kCols, THROUGH>(p, at, acc, smem, smem_y, smem_norm);
}

}  // namespace halo
}  // namespace conv
}  // namespace ett
