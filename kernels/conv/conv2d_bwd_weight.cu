// conv2d_bwd_weight.cu: gradient of conv2d_fwd for weights and bias.
//
//   dw[o,u,v,c] += sum_{b,i,j} dy[b,i,j,o] x[b, i*stride + u - pad_top, j*stride + v - pad_left, c],   db[o] += sum_{b,i,j} dy[b,i,j,o]
//
// where x stands for SiLU((x - mean) * rstd * gamma + beta), rounded, if there is a norm.
//
// x            B,H,W,C    act  pixels of any stride  in
// mean, rstd   B,G        f32  contiguous            in, may be absent
// gamma, beta  C          act  contiguous            in, with mean
// dy           B,H',W',O  act  pixels of any stride  in
// dw           O,kh,kw,C  f32  rows of any stride    added to
// db           O          f32  contiguous            added to, may be absent
//
// A product over the positions of dy^T and the column matrix of x (gather.cuh). The positions are divided into parts,
// whose sums go to the workspace and are added in order. db is a col_sum of dy.
//
// "hopper" (hopper_weight.cuh): 3x3 and 4x4, stride 1 or 2, bf16 on Hopper, pixels of whole 16-byte pieces: wgmma on tiles of
// positions of dy and boxes of the pixels that they see, copied by TMA, and db from the same tiles. Chosen from 32 outputs and 32
// channels on. "large": pixels of x and dy are whole 16-byte pieces. "narrow": x is gathered element by element, in tiles of few
// columns; for C = 3, where dy is read once, and for any other layout. "exchanged": for few outputs (O = 3) and stride 1,
// x^T times the column matrix of dy, taps reversed, so that x is read once. "halo": 3x3, stride 1, bf16, 32 channels with all
// taps at a time: tiles of positions of dy and the pixels that they see, and db from the same tiles. A normalised x is formed
// in shared memory by "hopper", "halo" and "exchanged", element by element by "narrow".
//
// numerics: products are summed in f32 (f32: fused multiply-adds, no TF32) in ascending order of the positions of a part;
// then the parts: every eighth in order, and the eight sums in order; then the old value is added. The parts depend only
// on the shape and the number of multiprocessors: bitwise repeatable. "hopper" takes the positions tile by tile, 16 at a time, which
// the tensor cores add in an order of their own, and forms db in f32 from fixed shares of each tile. "exchanged", "halo" and "hopper"
// multiply pixels of x by 0 for positions outside of y, and "hopper" padding by dy, so that a non-finite value at a border makes
// other taps of dw NaN.
// workspace: the sums of all parts, at most those of two rounds of blocks, or one part; "hopper" and "halo": and those for db.
// work: 2*B*H'*W'*O*kh*kw*C FLOP; (B*H*W*C + B*H'*W'*O) * size + 8*O*kh*kw*C bytes; db reads dy once more.
// limits: those of conv2d_fwd; "hopper" requires C and O to be multiples of 8, at least as many lines and columns of x as the
// stride, and for a normalised x a 3x3 kernel of stride 1.
#include "halo.cuh"
#include "hopper_weight.cuh"
#include "pieces.cuh"

namespace ett {
namespace conv {
namespace {

// Large as in matmul.cu. Narrow: bound by the bytes of the first operand; few accumulators, so that 12 or 16 warps are
// resident and more copies are in flight.
template <class T> struct Tiles;
template <> struct Tiles<bf16> {
    using Large = gemm::Tile<bf16, 128, 128, 32, 64, 64, 4, true, false, true>;
    template <int COLS> using Narrow = gemm::Tile<bf16, 4096 / COLS, COLS, 32, 32, 32, 4, true, false>;
};
template <> struct Tiles<float> {
    using Large = gemm::Tile<float, 128, 64, 16, 64, 32, 3, true, false, true>;
    template <int COLS> using Narrow = gemm::Tile<float, 4096 / COLS, COLS, 16, 32, 32, 4, true, false>;
};

// Blocks of a multiprocessor.
template <class Tile> constexpr int kResident = Tile::kAccRows * Tile::kAccCols > 32 ? 2 : Tile::kCols == 32 ? 4 : 3;

// sums[part] = a^T columns over the positions of the part, for one tile.
template <class T> struct Product {
    Grid grid;     // of the columns
    const T* x;    // what the columns are gathered from
    InputNorm<T> norm;  // of x, or of a
    gemm::Matrix<T> a;
    float* sums;   // parts, a.cols, ld
    int64_t ld;    // a multiple of 4
    int row_tiles, col_tiles, parts, steps;  // steps: of all parts together
};

// What is normalised: what the columns are gathered from, or a, whose images have as many pixels as the grid and a multiple
// of Tile::kDepth of them.
enum class Normed { kNothing, kColumns, kDense };

template <class Tile, bool VECTORS, Normed NORMED>
__global__ void __launch_bounds__(Tile::kThreads, NORMED == Normed::kColumns ? 2 : kResident<Tile>) grad_kernel(const __grid_constant__ Product<typename Tile::Type> p) {
    using T = typename Tile::Type;
    ETT_DYNAMIC_SMEM(smem);
    // Blocks of the same part read the same pixels.
    const int tiles = p.row_tiles * p.col_tiles, part = int(blockIdx.x) / tiles, tile = int(blockIdx.x) - part * tiles;
    const int64_t row0 = int64_t(tile / p.col_tiles) * Tile::kRows, col0 = int64_t(tile % p.col_tiles) * Tile::kCols;
    const int first = int(int64_t(p.steps) * part / p.parts), end = int(int64_t(p.steps) * (part + 1) / p.parts);
    const int64_t start = int64_t(first) * Tile::kDepth;

    gemm::Acc<Tile> acc;
    acc.clear();
    gemm::TileCopy<T, Tile::kDepth, Tile::kRows, Tile::kThreads, Tile::kVectors> copy_a(p.a, start, row0);
    const InputNorm<T> none{}, &norm = NORMED == Normed::kColumns ? p.norm : none;
    FixedColumns<T, Tile::kDepth, Tile::kCols, Tile::kThreads, VECTORS> copy_x(p.grid, p.x, norm, start, col0);
    auto fill = [&](int slot) {
        unsigned char* const stage = smem + slot * (Tile::kBytesA + Tile::kBytesB);
        copy_a.start(stage);
        copy_x.start(stage + Tile::kBytesA);
        cp_async_commit();
        copy_a.advance_rows(Tile::kDepth);
    };
    if constexpr (NORMED == Normed::kDense) {
        __shared__ float smem_norm[2 * Tile::kRows];
        int image = -1;
        const int pieces = int(min(p.a.cols - row0, int64_t(Tile::kRows))) / kWide<T>;
        auto prepare = [&](int64_t s, unsigned char* stage) {
            const int now = p.grid.image(int(start + s * Tile::kDepth));
            if (now != image) {
                image = now;
                norm_table<T, Tile::kThreads>(smem_norm, p.norm, image, int(row0), int(row0) + pieces * kWide<T>);
                __syncthreads();  // scale and shift of the image are visible
            }
            constexpr int kPieces = Tile::kRows / kWide<T>;
            for (int n = int(threadIdx.x); n < Tile::kDepth * kPieces; n += Tile::kThreads)
                if (n % kPieces < pieces)
                    activate(reinterpret_cast<T*>(stage + gemm::swizzled<kPieces>(n / kPieces, n % kPieces)), smem_norm + n % kPieces * kWide<T> * 2);
        };
        prepared_pipeline(acc, end - first, fill, prepare, smem);
    } else {
        gemm::pipeline(acc, end - first, fill, smem);
    }

    float* const sums = p.sums + part * p.a.cols * p.ld;
#pragma unroll
    for (int i = 0; i < Tile::kAccRows; ++i) {
        const int64_t row = row0 + Tile::row(i);
        if (row >= p.a.cols) continue;
#pragma unroll
        for (int j = 0; j < Tile::kAccCols; j += 2) {
            const int64_t col = col0 + Tile::col(j);
            const float two[2] = {acc.at(i, j), acc.at(i, j + 1)};
            if (col < p.ld) store<2>(sums + row * p.ld + col, two);
        }
    }
}

// ---- halo ------------------------------------------------------------------------------------------------

constexpr int kHaloThreads = 256, kHaloRows = 128;  // outputs; and 9 taps of 32 channels
constexpr int kHaloDy = halo::kPositions * kHaloRows * 2, kHaloStage = kHaloDy + halo::kBytes;
constexpr int kHaloSmem = 2 * kHaloStage + 2 * halo::kDepth * 2 * int(sizeof(float));  // two tiles, and their norms
constexpr int kHaloAtOnce = kHaloThreads / halo::kPieces, kHaloRounds = (halo::kPixels + kHaloAtOnce - 1) / kHaloAtOnce;

// sums[part] = dy^T columns over the tiles of positions of the part, for kHaloRows outputs and halo::kDepth channels.
struct HaloProduct {
    Grid grid;  // of x; 3 x 3 taps, step 1
    const bf16* x;
    InputNorm<bf16> norm;  // of x
    const bf16* dy;
    int64_t ld_dy;
    float *sums, *bias_sums;  // [parts, outputs, ld]; [parts, col_tiles, outputs], or null
    int64_t ld;
    int outputs, row_tiles, col_tiles, parts, down, across, tiles;  // tiles of an image; of all
};

// Two tiles of positions take turns. Warps have 32 outputs and 16 channels with all taps. For every line of 16 positions a warp loads the fragments of the new
// line of x, at three shifts, and keeps those of the two lines above. The blocks of the same outputs take turns with the
// tiles for the gradient of the bias, a product with ones.
template <bool NORM> __global__ void __launch_bounds__(kHaloThreads, 1) halo_grad_kernel(const __grid_constant__ HaloProduct p) {
    ETT_DYNAMIC_SMEM(smem);
    float* const smem_norm = reinterpret_cast<float*>(smem + 2 * kHaloStage);
    const Grid& g = p.grid;
    const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32;
    const int per_part = p.row_tiles * p.col_tiles, part = int(blockIdx.x) / per_part, tile = int(blockIdx.x) - part * per_part;
    const int row0 = tile / p.col_tiles * kHaloRows, col_tile = tile % p.col_tiles, c0 = col_tile * halo::kDepth;
    const int first = int(int64_t(p.tiles) * part / p.parts), end = int(int64_t(p.tiles) * (part + 1) / p.parts);
    const int piece = tid % halo::kPieces, pixel = tid / halo::kPieces;

    struct At {
        int image, line, column;  // of the first position
    };
    auto place = [&](int t) {
        const int image = t / (p.down * p.across), in_image = t - image * (p.down * p.across);
        return At{image, in_image / p.across * halo::kLines, in_image % p.across * halo::kAcross};
    };
    auto stage = [&](int t) { return smem + (t - first) % 2 * kHaloStage; };
    // Starts the copies of a tile: of x as one group, then of dy as another.
    auto fill = [&](int t) {
        const At at = place(t);
        const smem_addr to = smem_address(stage(t));
        const bf16* const from = p.x + c0 + piece * 8;
#pragma unroll
        for (int r = 0; r < kHaloRounds; ++r) {
            const int q = pixel + r * kHaloAtOnce, y = at.line + g.at_y + q / halo::kWidth, x = at.column + g.at_x + q % halo::kWidth;
            if (q < halo::kPixels)
                cp_async16(to + kHaloDy + gemm::swizzled<halo::kPieces>(q, piece), g.pixels(from, (at.image * g.h + y) * g.w + x), g.inside(y, x));
        }
        cp_async_commit();
        const int row = row0 + tid % 16 * 8, x = at.column + tid / 16;
#pragma unroll
        for (int i = 0; i < halo::kLines; ++i) {
            const int y = at.line + i;
            cp_async16(to + gemm::swizzled<16>(i * 16 + tid / 16, tid % 16), p.dy + ((int64_t(at.image) * g.rows + y) * g.cols + x) * p.ld_dy + row,
                       y < g.rows && x < g.cols && row < p.outputs);
        }
        cp_async_commit();
        if constexpr (NORM) norm_table<bf16, kHaloThreads>(smem_norm + (t - first) % 2 * halo::kDepth * 2, p.norm, at.image, c0, c0 + halo::kDepth);
    };
    // Replaces every kHaloRounds-th piece of x by its activation; the padding stays 0.
    auto normalize = [&](int t, int round) {
        const At at = place(t);
        const int q = pixel + round * kHaloAtOnce;
        if (q >= halo::kPixels || !g.inside(at.line + g.at_y + q / halo::kWidth, at.column + g.at_x + q % halo::kWidth)) return;
        activate(reinterpret_cast<bf16*>(stage(t) + kHaloDy + gemm::swizzled<halo::kPieces>(q, piece)),
                 smem_norm + ((t - first) % 2 * halo::kDepth + piece * 8) * 2);
    };

    const int warp_row = warp / 2 * 32, warp_col = warp % 2 * 16;
    float acc[2][halo::kTaps][2][4] = {}, ones[2][4] = {};
    if (first < end) {
        fill(first);
        cp_async_wait<0>();
        __syncthreads();  // the first tile and its norm have arrived
        if constexpr (NORM) {
#pragma unroll 1
            for (int r = 0; r < kHaloRounds; ++r) normalize(first, r);
        }
    }
#pragma unroll 1
    for (int t = first; t < end; ++t) {
        __syncthreads();  // this tile has arrived and is normalised; all warps are done with the tile before
        const bool more = t + 1 < end;
        if (more) fill(t + 1);
        const smem_addr tile_dy = smem_address(stage(t)), tile_x = tile_dy + kHaloDy;
        const bool with_bias = p.bias_sums && warp_col == 0 && t % p.col_tiles == col_tile;
        uint32_t a[2][2][4], b[3][3][4];
        const int seen = opaque(lane % 16);
        auto load_dy = [&](int line) {
#pragma unroll
            for (int m = 0; m < 2; ++m) gemm::load_a<true, 16>(a[line % 2][m], tile_dy, warp_row + m * 16, line * 16);
        };
        auto load_x = [&](int line) {
#pragma unroll
            for (int v = 0; v < 3; ++v)
                ldmatrix_x4_trans(b[line % 3][v], tile_x + gemm::swizzled<halo::kPieces>(line * halo::kWidth + v + seen, warp_col / 8 ^ lane / 16));
        };
        load_dy(0);
        load_x(0);
        load_x(1);
#pragma unroll
        for (int line = 0; line < halo::kLines; ++line) {
            if constexpr (NORM) {
                if (line == halo::kLines - kHaloRounds) {
                    cp_async_wait<1>();
                    __syncthreads();  // the next tile's x and its norm have arrived
                }
            }
            load_x(line + 2);
            if (line + 1 < halo::kLines) load_dy(line + 1);
            const auto& dy = a[line % 2];
#pragma unroll
            for (int u = 0; u < 3; ++u)
#pragma unroll
                for (int v = 0; v < 3; ++v)
#pragma unroll
                    for (int n = 0; n < 2; ++n)
#pragma unroll
                        for (int m = 0; m < 2; ++m) mma_bf16_16816(acc[m][u * 3 + v][n], dy[m], b[(line + u) % 3][v][n * 2], b[(line + u) % 3][v][n * 2 + 1]);
            if (with_bias) {
                constexpr uint32_t kOnes = 0x3f803f80;
#pragma unroll
                for (int m = 0; m < 2; ++m) mma_bf16_16816(ones[m], dy[m], kOnes, kOnes);
            }
            if constexpr (NORM) {
                if (more && line >= halo::kLines - kHaloRounds) normalize(t + 1, line - (halo::kLines - kHaloRounds));
            }
        }
        cp_async_wait<0>();
    }

    float* const sums = p.sums + int64_t(part) * p.outputs * p.ld;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = row0 + warp_row + m * 16 + half * 8 + lane / 4;
            if (row >= p.outputs) continue;
#pragma unroll
            for (int tap = 0; tap < halo::kTaps; ++tap)
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const float two[2] = {acc[m][tap][n][half * 2], acc[m][tap][n][half * 2 + 1]};
                    store<2>(sums + row * p.ld + tap * g.c + c0 + warp_col + n * 8 + lane % 4 * 2, two);
                }
            // All columns of the product with ones are the same.
            if (p.bias_sums && warp_col == 0 && lane % 4 == 0) p.bias_sums[(int64_t(part) * p.col_tiles + col_tile) * p.outputs + row] = ones[m][half * 2];
        }
}

constexpr int kAddThreads = 256, kAddWarps = kAddThreads / 32;

// dw += the sums of all parts. Element (o, tap, c) of dw is that of row o and column (tap, c), or if `exchanged`, of row c
// and column (tap, o), taps counted backwards.
struct Added {
    const float* sums;
    int64_t rows, ld, parts;
    float* dw;
    int64_t ld_dw, elements;
    int outputs, taps, channels;
    bool exchanged;
};

// A block adds 32 elements; each of its warps adds every eighth part.
__global__ void __launch_bounds__(kAddThreads) add_kernel(const __grid_constant__ Added p) {
    __shared__ float smem_sum[kAddWarps][32];
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    const int64_t n = int64_t(blockIdx.x) * 32 + lane;  // in the order of the sums
    const int width = p.taps * (p.exchanged ? p.outputs : p.channels);
    const int64_t row = n / width;
    const int col = int(n - row * width);
    float sum = 0.f;
    if (n < p.elements) {
        const float* const from = p.sums + row * p.ld + col;
#pragma unroll 4
        for (int64_t part = warp; part < p.parts; part += kAddWarps) sum += from[part * p.rows * p.ld];
    }
    smem_sum[warp][lane] = sum;
    __syncthreads();  // the warps' sums are visible
    if (warp != 0 || n >= p.elements) return;
    sum = 0.f;
#pragma unroll
    for (int w = 0; w < kAddWarps; ++w) sum += smem_sum[w][lane];
    const int inner = p.exchanged ? p.outputs : p.channels, tap = col / inner, in_tap = col - tap * inner;
    if (p.exchanged)
        p.dw[(int64_t(in_tap) * p.taps + p.taps - 1 - tap) * p.ld_dw + row] += sum;
    else
        p.dw[(row * p.taps + tap) * p.ld_dw + in_tap] += sum;
}

// The same for up to kAddWarps parts of channels in whole pieces, not exchanged: a thread adds 4 elements, part by part, and so in
// the same order. p.elements counts these pieces.
__global__ void __launch_bounds__(kAddThreads) add_few_kernel(const __grid_constant__ Added p) {
    const int64_t n = int64_t(blockIdx.x) * kAddThreads + threadIdx.x;
    if (n >= p.elements) return;
    const int pieces = p.channels / 4, width = p.taps * pieces;
    const int64_t row = n / width;
    const int col = int(n - row * width), tap = col / pieces, c = (col - tap * pieces) * 4;
    const float* const from = p.sums + row * p.ld + col * 4;
    float* const to = p.dw + (row * p.taps + tap) * p.ld_dw + c;
    float v[kAddWarps][4], all[4], sum[4] = {};
    load(all, to);
#pragma unroll
    for (int part = 0; part < kAddWarps; ++part)
        if (part < p.parts) load(v[part], from + part * p.rows * p.ld);
#pragma unroll
    for (int part = 0; part < kAddWarps; ++part)
        if (part < p.parts)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[e] += v[part][e];
#pragma unroll
    for (int e = 0; e < 4; ++e) all[e] += sum[e];
    store_global<4>(to, all);
}

// ---- host ------------------------------------------------------------------------------------------------

// Fewest outputs and channels that "hopper" is chosen for: half of its tiles.
constexpr int kHopperLeast = 32;

// Adds the sums of the parts.
int32_t add_parts(const char* op, const Added& p, const ett_launch* l) {
    const bool few = p.parts <= kAddWarps && !p.exchanged && p.channels % 4 == 0 && p.ld_dw % 4 == 0 && reinterpret_cast<uintptr_t>(p.dw) % 16 == 0;
    if (!few) return launch(op, add_kernel, dim3(unsigned(ceil_div(p.elements, 32))), dim3(kAddThreads), 0, l, p);
    Added pieces = p;
    pieces.elements = p.elements / 4;
    return launch(op, add_few_kernel, dim3(unsigned(ceil_div(pieces.elements, kAddThreads))), dim3(kAddThreads), 0, l, pieces);
}

// `vectors`: pixels of x and dy are whole 16-byte pieces, and x is not normalised. `hopper`, `halo`: "hopper" and
// halo_grad_kernel support the call. `exchangeable`: as few outputs as "exchanged" is for, and stride 1.
const char* choose_conv2d_bwd_weight_config(int64_t outputs, int64_t channels, bool vectors, bool hopper, bool halo, bool exchangeable) {
    if (hopper && outputs >= kHopperLeast && channels >= kHopperLeast) return "hopper";
    if (exchangeable && channels > 8) return "exchanged";
    if (halo && (outputs > kHaloRows / 2 || !vectors)) return "halo";  // whose tiles are of kHaloRows outputs
    return vectors ? "large" : "narrow";
}

// The number of parts into which to divide `steps` for each of the `tiles`: the one with which the last block ends
// soonest, at most two rounds of `slots` blocks. A block has a fixed cost of about four steps.
int64_t choose_parts(int64_t tiles, int64_t steps, int64_t slots) {
    int64_t parts = 1, least = INT64_MAX;
    for (int64_t p = 1; p <= std::min(steps, std::max<int64_t>(1, 2 * slots / tiles)); ++p) {
        const int64_t cost = ceil_div(tiles * p, slots) * (ceil_div(steps, p) + 4);
        if (cost < least) least = cost, parts = p;
    }
    return parts;
}

// The product of an implementation: sizes in elements, tiles and parts. `resident`: blocks of a multiprocessor.
struct Sizes {
    int64_t rows, cols, ld, row_tiles, col_tiles, steps, parts;

    Sizes(int64_t rows_of_sums, int64_t cols_of_sums, int64_t positions, int tile_rows, int tile_cols, int depth, int resident)
        : Sizes(rows_of_sums, cols_of_sums, ceil_div(rows_of_sums, tile_rows), ceil_div(cols_of_sums, tile_cols), ceil_div(positions, depth), resident) {}
    Sizes(int64_t rows_of_sums, int64_t cols_of_sums, int64_t tiles_down, int64_t tiles_across, int64_t all_steps, int resident)
        : rows(rows_of_sums), cols(cols_of_sums), ld(round_up(cols, 4)), row_tiles(tiles_down), col_tiles(tiles_across), steps(all_steps),
          parts(choose_parts(row_tiles * col_tiles, steps, int64_t(multiprocessors()) * resident)) {}
    int64_t bytes() const { return parts * rows * ld * 4; }
};

bool exchangeable(const ett_conv2d_bwd_weight_args* a) {
    // A normalised x is changed in shared memory, by steps of positions of one image.
    const bool normed = present(a->mean), steps = a->x.dims[1] * a->x.dims[2] % 32 == 0 && wide(a->x);
    return a->stride == 1 && a->dw.dims[0] <= 8 && (!normed || steps);
}

// Tiles of halo_grad_kernel in all images.
int64_t halo_tiles(const ett_conv2d_bwd_weight_args* a) {
    return a->dy.dims[0] * ceil_div(a->dy.dims[1], halo::kLines) * ceil_div(a->dy.dims[2], halo::kAcross);
}

// Whether halo_grad_kernel supports the call, as far as shapes say so.
bool halo_shape(const ett_conv2d_bwd_weight_args* a) {
    const int64_t* d = a->dw.dims;
    return a->x.dtype == ETT_BF16 && d[1] == 3 && d[2] == 3 && a->stride == 1 && d[3] > 0 && d[3] % halo::kDepth == 0 && halo_tiles(a) < int64_t(1) << 31;
}

// The sizes of implementation `kernel`.
Sizes sizes_of(const ett_conv2d_bwd_weight_args* a, const char* kernel) {
    const int64_t *d = a->dw.dims, taps = d[1] * d[2];
    const int depth = a->x.dtype == ETT_BF16 ? 32 : 16;
#ifndef ETT_SHIM
    if (strcmp(kernel, "hopper") == 0) {
        const hopper_weight::Tiles t = hopper_weight::tiles_of(a);
        return {d[0], taps * d[3], t.row_tiles, t.col_tiles, t.all, 1};
    }
#endif
    if (strcmp(kernel, "halo") == 0)
        return {d[0], taps * d[3], halo_tiles(a) * halo::kPositions, kHaloRows, halo::kTaps * halo::kDepth, halo::kPositions, 1};
    if (strcmp(kernel, "large") == 0) return {d[0], taps * d[3], rows(a->dy), 128, a->x.dtype == ETT_BF16 ? 128 : 64, depth, 2};
    const bool exchanged = strcmp(kernel, "exchanged") == 0;
    const int64_t cols = taps * (exchanged ? d[0] : d[3]);
    const int64_t out = exchanged ? d[3] : d[0], positions = exchanged ? rows(a->x) : rows(a->dy);
    return cols <= 32 ? Sizes{out, cols, positions, 128, 32, depth, 4} : Sizes{out, cols, positions, 64, 64, depth, 3};
}

NormViews norm_of(const ett_conv2d_bwd_weight_args* a) { return {a->mean, a->rstd, a->gamma, a->beta}; }

bool sound(Check& check, const ett_conv2d_bwd_weight_args* a) {
    return check.ok() && check_shapes(check, {"x", a->x}, {"dw", a->dw}, ETT_F32, {"dy", a->dy}, a->stride, a->pad_top, a->pad_left) &&
           check_norm(check, norm_of(a), a->x) && (!present(a->db) || check.vector("db", a->db, ETT_F32, a->dw.dims[0]));
}

bool no_weights(const ett_conv2d_bwd_weight_args* a) { return numel(a->dw) == 0 || numel(a->x) == 0 || numel(a->dy) == 0; }

ett_col_sum_args bias_args(const ett_conv2d_bwd_weight_args* a) { return {a->dy, a->db}; }

// Whether an implementation has the gradient of the bias from its tiles of dy.
bool bias_in_tiles(const char* kernel) { return strcmp(kernel, "hopper") == 0 || strcmp(kernel, "halo") == 0; }

// Bytes of the sums of such an implementation for the gradient of the bias, which follow those for the weights.
int64_t tile_bias_bytes(const ett_conv2d_bwd_weight_args* a, const Sizes& s) {
    return present(a->db) ? s.parts * s.col_tiles * s.rows * int64_t(sizeof(float)) : 0;
}

// Bytes of workspace of an implementation.
int64_t bytes_of(const ett_conv2d_bwd_weight_args* a, const char* kernel) {
    const Sizes s = sizes_of(a, kernel);
    return s.bytes() + (bias_in_tiles(kernel) ? tile_bias_bytes(a, s) : 0);
}

// The workspace of the gradient of the bias, if it comes before that of the weights and not from tiles of dy.
int64_t bias_bytes(const ett_conv2d_bwd_weight_args* a) {
    const ett_col_sum_args sum = bias_args(a);
    return present(a->db) ? ett_col_sum_workspace(&sum) : 0;
}

}  // namespace
}  // namespace conv
}  // namespace ett

extern "C" int64_t ett_conv2d_bwd_weight_workspace(const ett_conv2d_bwd_weight_args* a) {
    using namespace ett;
    using namespace ett::conv;
    Check check("conv2d_bwd_weight", a);
    if (!sound(check, a)) return -1;
    int64_t most = bias_bytes(a);
    if (no_weights(a)) return most;
    // Which implementations there are depends on addresses.
    most = std::max({most, bytes_of(a, "large"), bytes_of(a, "narrow")});
    if (halo_shape(a)) most = std::max(most, bytes_of(a, "halo"));
#ifndef ETT_SHIM
    if (hopper::plan_hopper() && hopper_weight::shape_fits(a)) most = std::max(most, bytes_of(a, "hopper"));
#endif
    return exchangeable(a) ? std::max(most, bytes_of(a, "exchanged")) : most;
}

extern "C" int32_t ett_conv2d_bwd_weight(const ett_conv2d_bwd_weight_args* a, const ett_launch* l) {
    using namespace ett;
    using namespace ett::conv;
    const char* const op = "conv2d_bwd_weight";
    Check check(op, a, l);
    if (!sound(check, a)) return check.status();
    const bool vectors = wide(a->x) && wide(a->dy) && !present(a->mean);
    const bool able = halo_shape(a) && wide(a->x) && wide(a->dy);
#ifdef ETT_SHIM
    const bool hopper_able = false;
#else
    const bool hopper_able = hopper_weight::can(a) && hopper::is_hopper();
#endif
    const char* best = choose_conv2d_bwd_weight_config(a->dw.dims[0], a->dw.dims[3], vectors, hopper_able, able, exchangeable(a));
    const char* kernel =
        check.choose(l, best, {{"hopper", hopper_able}, {"exchanged", exchangeable(a)}, {"halo", able}, {"large", vectors}, {"narrow", true}});
    if (!check.ok()) return check.status();
    const bool none = no_weights(a), in_tiles = !none && bias_in_tiles(kernel);
    if (!check.workspace(l, std::max(in_tiles ? 0 : bias_bytes(a), none ? 0 : bytes_of(a, kernel)))) return check.status();
    if (present(a->db) && !in_tiles) {
        const ett_col_sum_args sum = bias_args(a);
        ett_launch free = *l;
        free.force = nullptr;
        const int32_t status = ett_col_sum(&sum, &free);
        if (status != ETT_OK) return status;
    }
    if (none) return ett_done("");
    const bool exchanged = strcmp(kernel, "exchanged") == 0, large = strcmp(kernel, "large") == 0;
    const int64_t *d = a->dw.dims;
    const Sizes s = sizes_of(a, kernel);
    const int64_t blocks = s.row_tiles * s.col_tiles * s.parts;
    const ett_view &dense = exchanged ? a->x : a->dy, &gathered = exchanged ? a->dy : a->x;
    const Taps taps = exchanged ? Taps{d[1], d[2], 1, a->pad_top - (d[1] - 1), a->pad_left - (d[2] - 1)}
                                : Taps{d[1], d[2], a->stride, -a->pad_top, -a->pad_left};
    float* const sums = static_cast<float*>(l->workspace);
    if (in_tiles) {
        float* const bias_sums = present(a->db) ? sums + s.parts * s.rows * s.ld : nullptr;
        auto halo = [&] {
            const int64_t down = ceil_div(a->dy.dims[1], halo::kLines), across = ceil_div(a->dy.dims[2], halo::kAcross);
            const HaloProduct p{grid_of(a->x, a->dy.dims[1], a->dy.dims[2], taps), data<const bf16>(a->x), input_norm<bf16>(norm_of(a), cols(a->x)),
                                data<const bf16>(a->dy), stride(a->dy), sums, bias_sums, s.ld, int(d[0]), int(s.row_tiles), int(s.col_tiles),
                                int(s.parts), int(down), int(across), int(halo_tiles(a))};
            auto go = [&](auto k) { return launch(op, k, dim3(unsigned(blocks)), dim3(kHaloThreads), kHaloSmem, l, p); };
            return p.norm.present() ? go(halo_grad_kernel<true>) : go(halo_grad_kernel<false>);
        };
#ifdef ETT_SHIM
        int32_t status = halo();
#else
        int32_t status = strcmp(kernel, "hopper") == 0 ? hopper_weight::run(op, a, s.parts, s.ld, sums, bias_sums, l) : halo();
#endif
        const Added weights{sums, s.rows, s.ld, s.parts, data<float>(a->dw), stride(a->dw), numel(a->dw), int(d[0]), int(d[1] * d[2]), int(d[3]), false};
        if (status == ETT_OK) status = add_parts(op, weights, l);
        // As one row of one tap.
        const Added bias{bias_sums, 1, d[0], s.parts * s.col_tiles, data<float>(a->db), d[0], d[0], 1, 1, int(d[0]), false};
        if (status == ETT_OK && bias_sums) status = add_parts(op, bias, l);
        return status == ETT_OK ? ett_done(kernel) : status;
    }
    int32_t status = with_act(a->x.dtype, [&](auto t) {
        using T = decltype(t);
        const Product<T> p{grid_of(gathered, dense.dims[1], dense.dims[2], taps), data<const T>(gathered), input_norm<T>(norm_of(a), cols(a->x)),
                           gemm::Matrix<T>{data<const T>(dense), rows(dense), cols(dense), stride(dense), wide(dense)}, sums, s.ld, int(s.row_tiles),
                           int(s.col_tiles), int(s.parts), int(s.steps)};
        auto go = [&](auto k, int threads, int smem) { return launch(op, k, dim3(unsigned(blocks)), dim3(threads), smem, l, p); };
        using Large = typename Tiles<T>::Large;
        using Narrow = typename Tiles<T>::template Narrow<32>;
        using Wider = typename Tiles<T>::template Narrow<64>;
        auto narrow = [&](auto normed) {
            constexpr Normed kNormed = decltype(normed)::value;
            return s.cols <= 32 ? go(grad_kernel<Narrow, false, kNormed>, Narrow::kThreads, Narrow::kSmem)
                                : go(grad_kernel<Wider, false, kNormed>, Wider::kThreads, Wider::kSmem);
        };
        return large                ? go(grad_kernel<Large, true, Normed::kNothing>, Large::kThreads, Large::kSmem)
               : !p.norm.present()  ? narrow(std::integral_constant<Normed, Normed::kNothing>{})
               : exchanged          ? narrow(std::integral_constant<Normed, Normed::kDense>{})
                                    : narrow(std::integral_constant<Normed, Normed::kColumns>{});
    });
    if (status != ETT_OK) return status;
    const Added added{sums, s.rows, s.ld, s.parts, data<float>(a->dw), stride(a->dw), numel(a->dw), int(d[0]), int(d[1] * d[2]), int(d[3]), exchanged};
    status = add_parts(op, added, l);
    return status == ETT_OK ? ett_done(kernel) : status;
}
