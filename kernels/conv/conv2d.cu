// conv2d.cu: two-dimensional convolution and its gradient for the input, as products with a column matrix that is
// gathered tile by tile (gather.cuh).
//
//   conv2d_fwd       y[b,i,j,o] = bias[o] + residual[b,i,j,o]
//                                 + sum_{u,v,c} a[b, i*stride + u - pad_top, j*stride + v - pad_left, c] w[o,u,v,c]
//   conv2d_bwd_data  dx = gradient of y for a, plus bias[c]: a transposed convolution
// where a is x, or with a norm SiLU((x - mean) * rstd * gamma + beta). With a norm dx is the gradient for x, also through
// mean and rstd, plus skip; dgamma and dbeta are added to. y_mean and y_rstd are the statistics of a GroupNorm of y.
//
// x, dx           B,H,W,C    act  pixels of any stride  in, out
// mean, rstd      B,G        f32  contiguous            in, may be absent
// gamma, beta     C          act  contiguous            in, with mean
// w               O,kh,kw,C  act  rows of any stride    in
// bias            O; C       act  contiguous            in, may be absent
// y, dy           B,H',W',O  act  pixels of any stride  out, in
// residual, skip  as y, x    act  pixels of any stride  in, may be absent
// y_mean, y_rstd  B,J        f32  contiguous            out, may be absent
// dgamma, dbeta   C          f32  contiguous            added to, may be absent
//
// Pixels outside of the image count as 0; how far y reaches over it at the bottom and on the right is up to H' and W'.
// The data gradient is a convolution of dy for each of stride^2 phases: the pixels whose row and column leave the same
// remainders meet the same taps of w, and no zero is multiplied. Its weights, taps reversed and O innermost, are
// transposed into the workspace.
//
// "hopper" (bf16): products of warpgroups from boxes of pixels that are copied once and serve all taps (hopper_conv.cuh), for
// multiples of 64 channels. "large", "medium", "small": products of positions, O and kh*kw*C; pixels are copied by 16-byte
// cp.async. "plain" copies them element by element, for C = 3 and for any other layout. "few" is for few outputs (O = 3): every
// tap's product with the pixels of a region is computed before the taps are shifted and added, so that a pixel is read once
// rather than once a tap. "halo" is for a normalised input and "first" for C = 3, both for 3x3, stride 1 and bf16 (halo.cuh).
//
// A normalised input is formed in shared memory by "hopper", "halo" and "few", and element by element by "plain". The statistics
// of y are computed on the way by "halo", "first" and, of a normalised input, "hopper", from y in another pass by the others. The
// gradient of the norm is, for "first", a product with the slope of SiLU and sums on the way, then a pass over dx and x; the others
// write the gradient for a to dx, and then apply group_norm's backward in place. (Sums on the way were slower with more inputs: in
// "halo" and "large" registers are few, in "hopper" no products run meanwhile.)
//
// numerics: products are summed in f32 (f32: fused multiply-adds, no TF32) in ascending order of taps and channels ("few":
// channels, then taps; "hopper": 64 channels of all taps at a time, with stride 2 parity by parity), then bias and residual are
// added and the result is rounded once. a is rounded to act, and so is the gradient for a or, where sums are formed on the way,
// its product with the slope of SiLU, whose sums are of unrounded values; "hopper", "halo" and "few" form a of bf16 with an
// approximate tanh (norm.cuh). Statistics are those of the rounded y, from sums of differences from one of the values, then
// combined as in group_norm.cu. Padding is multiplied by weights, as 0. Bitwise repeatable.
// workspace: a copy of w, with O rows padded to 16 bytes; none for conv2d_fwd if w has this form. Then, for statistics or the
// gradient of a norm, 8*O or 8*C bytes per tile of at least 128 positions or chunk (group_norm.cu).
// work: 2*B*H'*W'*O*kh*kw*C FLOP; (B*H*W*C + O*kh*kw*C + B*H'*W'*O) * size bytes.
// limits: coordinates below 2^28, fewer than 2^31 pixels; fewer than 2^31 elements in kh lines; fewer than 2^29 tiles. "hopper":
// multiples of 64 channels in what is read, of 8 and at least 32 in what is written; pixels at multiples of 16 bytes; strides 1 and
// 2, 1 of a normalised input; up to 25 taps whose boxes fit into shared memory, in every phase at least one; no image smaller than
// the stride.
#include "../norm/channels.cuh"
#include "halo.cuh"
#include "hopper_conv.cuh"
#include "pieces.cuh"

namespace ett {
namespace conv {
namespace {

// Large as in matmul.cu. Medium: for up to 64 outputs. Small: more blocks, for convolutions with fewer large tiles than
// multiprocessors. Plain: few accumulators a thread, so that 16 warps hide the latency of the loads, and few stages, since
// with few channels there is one step. Few: regions of 256 pixels.
template <class T> struct Tiles;
template <> struct Tiles<bf16> {
    using Large = gemm::Tile<bf16, 128, 128, 32, 64, 64, 4, false, true, true>;
    using Medium = gemm::Tile<bf16, 128, 64, 32, 64, 32, 4, false, true, true>;
    using Small = gemm::Tile<bf16, 64, 64, 32, 32, 32, 4, false, true, true>;
    using Plain = gemm::Tile<bf16, 64, 128, 32, 32, 32, 2, false, true, true>;
    template <int COLS> using Few = gemm::Tile<bf16, 256, COLS, 32, 2048 / COLS, COLS, 4, false, true, true>;
};
template <> struct Tiles<float> {
    using Large = gemm::Tile<float, 128, 64, 16, 64, 32, 3, false, true, true>;
    using Medium = Large;
    using Small = gemm::Tile<float, 64, 64, 16, 32, 32, 3, false, true, true>;
    using Plain = gemm::Tile<float, 64, 64, 16, 32, 32, 2, false, true, true>;
    template <int COLS> using Few = gemm::Tile<float, 256, COLS, 16, 2048 / COLS, COLS, 4, false, true, true>;
};

// Resident blocks that share the registers: 8 warps with 128 accumulators a thread or 64 of f32 sums, 12 with 64, 16 with
// 32.
template <class Tile> constexpr int resident() {
    constexpr int kAccs = Tile::kAccRows * Tile::kAccCols;
    constexpr bool kMany = kAccs == 128 || (kAccs == 64 && sizeof(typename Tile::Type) == 4);
    return (kMany ? 256 : kAccs == 64 ? 384 : 512) / Tile::kThreads;
}

// One phase: the convolution of a grid of positions. Position (i, j) writes the pixel (first_y + i*out_step, first_x +
// j*out_step).
template <class T> struct Phase {
    Grid grid;
    const T* w;  // O rows of taps, C, each padded to whole 16-byte pieces
    int first_y, first_x;
};

// Elements of a padded row.
template <class T> __host__ __device__ int64_t padded(int64_t depth) { return (depth + kWide<T> - 1) / kWide<T> * kWide<T>; }

constexpr int kPhases = 4;  // of one launch

template <class T> struct Product {
    const T* x;
    InputNorm<T> norm;  // of x; only without VECTORS
    const T* bias;      // may be null
    ett::Matrix<const T> residual;  // in the shape of y; may be absent
    T* y;
    int64_t ld;  // of y
    int outputs, out_h, out_w, out_step, phases;
    bool wide_y;  // pixels of y are whole 16-byte pieces
    Phase<T> phase[kPhases];

    // The pixel of y that position `at` writes.
    __device__ __forceinline__ int pixel(const Phase<T>& p, int at) const {
        const int line = at / p.grid.cols, image = line / p.grid.rows;
        return (image * out_h + (line - image * p.grid.rows) * out_step + p.first_y) * out_w + (at - line * p.grid.cols) * out_step + p.first_x;
    }
};

// Blocks take the phases in turn, and of each phase the tiles of the same positions one after the other, so that blocks
// that run at the same time share pixels in the L2.
template <class Tile, bool VECTORS>
__global__ void __launch_bounds__(Tile::kThreads, resident<Tile>()) conv_kernel(const __grid_constant__ Product<typename Tile::Type> p) {
    using T = typename Tile::Type;
    constexpr int kPieces = Tile::kCols / kWide<T>, kAtOnce = Tile::kThreads / kPieces;
    static_assert(Tile::kRows * Tile::kCols * int(sizeof(T)) <= Tile::kSmem, "the results fit into the stages");
    ETT_DYNAMIC_SMEM(smem);
    __shared__ int smem_pixel[Tile::kRows];
    const int tile = int(blockIdx.x) / p.phases, col_tiles = (p.outputs + Tile::kCols - 1) / Tile::kCols;
    const Phase<T>& phase = p.phase[int(blockIdx.x) - tile * p.phases];
    const Grid& g = phase.grid;
    const int64_t row0 = int64_t(tile / col_tiles) * Tile::kRows;
    const int col0 = tile % col_tiles * Tile::kCols;
    if (row0 >= g.positions) return;

    gemm::Acc<Tile> acc;
    acc.clear();
    const int64_t depth = g.depth();
    if (depth > 0) {
        const gemm::Matrix<T> w{phase.w, p.outputs, depth, padded<T>(depth), true};
        FixedRows<T, Tile::kRows, Tile::kDepth, Tile::kThreads, VECTORS> copy_x(g, p.x, p.norm, row0);
        gemm::TileCopy<T, Tile::kCols, Tile::kDepth, Tile::kThreads, true> copy_w(w, col0, 0);
        auto fill = [&](int slot) {
            unsigned char* const stage = smem + slot * (Tile::kBytesA + Tile::kBytesB);
            copy_w.start(stage + Tile::kBytesA);
            copy_x.start(stage);
            cp_async_commit();
            copy_w.advance_cols(Tile::kDepth);
        };
        gemm::pipeline(acc, (depth + Tile::kDepth - 1) / Tile::kDepth, fill, smem);
    }

    for (int r = int(threadIdx.x); r < Tile::kRows; r += Tile::kThreads)
        smem_pixel[r] = row0 + r < g.positions ? p.pixel(phase, int(row0) + r) : -1;
    __syncthreads();  // the pixels are visible; all warps are done with the stages
    const bool wide = p.wide_y;
#pragma unroll
    for (int j = 0; j < Tile::kAccCols; j += 2) {
        const int col = col0 + Tile::col(j);
        const bool one = col < p.outputs, two = col + 1 < p.outputs;
        const float bias0 = p.bias && one ? to_float(p.bias[col]) : 0.f, bias1 = p.bias && two ? to_float(p.bias[col + 1]) : 0.f;
#pragma unroll
        for (int i = 0; i < Tile::kAccRows; ++i) {
            float v[2] = {acc.at(i, j) + bias0, acc.at(i, j + 1) + bias1};
            if (p.residual.ptr && smem_pixel[Tile::row(i)] >= 0) {
                const T* const more = p.residual.row(smem_pixel[Tile::row(i)]) + col;
                if (one) v[0] += to_float(more[0]);
                if (two) v[1] += to_float(more[1]);
            }
            if (wide) {
                const int at = gemm::swizzled<kPieces>(Tile::row(i), Tile::col(j) / kWide<T>) + Tile::col(j) % kWide<T> * int(sizeof(T));
                store<2>(reinterpret_cast<T*>(smem + at), v);
            } else {
                const int pixel = smem_pixel[Tile::row(i)];
                T* const to = p.y + int64_t(pixel) * p.ld + col;
                if (pixel >= 0 && one) to[0] = from_float<T>(v[0]);
                if (pixel >= 0 && two) to[1] = from_float<T>(v[1]);
            }
        }
    }
    if (!wide) return;
    __syncthreads();  // the results are visible
    const int piece = int(threadIdx.x) % kPieces, col = col0 + piece * kWide<T>;
    if (col >= p.outputs) return;
#pragma unroll 4
    for (int r = int(threadIdx.x) / kPieces; r < Tile::kRows; r += kAtOnce) {
        const int pixel = smem_pixel[r];
        if (pixel >= 0)
            store_vec(p.y + int64_t(pixel) * p.ld + col, load_vec<kWide<T>>(reinterpret_cast<const T*>(smem + gemm::swizzled<kPieces>(r, piece))));
    }
}

// ---- few outputs -----------------------------------------------------------------------------------------

constexpr int kSide = 16;       // of a region of pixels
constexpr int kMostTaps = 8;    // rows and columns of taps, so that at least 9 x 9 positions of a region are complete
constexpr int kMostOutputs = 8;

// Multiplies a region of kSide x kSide pixels by the weights of all taps and outputs, then adds for each position in it
// the products of its taps. NORM: the pixels are normalised in shared memory, with scale and shift after the stages.
template <class Tile, bool NORM>
__global__ void __launch_bounds__(Tile::kThreads, 256 / Tile::kThreads) few_kernel(const __grid_constant__ Product<typename Tile::Type> p) {
    using T = typename Tile::Type;
    constexpr int kPieces = Tile::kDepth / kWide<T>, kAtOnce = Tile::kThreads / kPieces;
    constexpr int kLine = Tile::kRows + 4;  // the warp's stores to eight pixels of four pairs of products meet all banks
    static_assert(Tile::kRows == kSide * kSide && kAtOnce % kSide == 0 && Tile::kRows % kAtOnce == 0, "threads copy whole lines");
    static_assert(Tile::kCols * kLine * 4 <= Tile::kSmem, "the products fit into the stages");
    ETT_DYNAMIC_SMEM(smem);
    const int tile = int(blockIdx.x) / p.phases;
    const Phase<T>& phase = p.phase[int(blockIdx.x) - tile * p.phases];
    const Grid& g = phase.grid;
    if (g.positions == 0) return;
    const int rows = kSide + 1 - max(g.taps_y, 1), cols = kSide + 1 - max(g.taps_x, 1);  // positions of a region
    const int across = (g.cols + cols - 1) / cols, down = (g.rows + rows - 1) / rows;
    const int image = tile / (across * down), in_image = tile - image * (across * down);
    if (image >= g.positions / (g.rows * g.cols)) return;
    const int row0 = in_image / across * rows, col0 = in_image % across * cols, taps = g.taps_y * g.taps_x;

    gemm::Acc<Tile> acc;
    acc.clear();
    if (g.depth() > 0) {
        const int at = int(threadIdx.x) / kPieces, piece = int(threadIdx.x) % kPieces;
        const int y = row0 + g.at_y + at / kSide, x = col0 + g.at_x + at % kSide;
        int c = piece * kWide<T>;
        const T* from = p.x + c;
        const int pixel = (image * g.h + y) * g.w + x;
        const gemm::Matrix<T> w{phase.w, int64_t(p.outputs) * taps, g.c, g.c, true};
        gemm::TileCopy<T, Tile::kCols, Tile::kDepth, Tile::kThreads, true> copy_w(w, 0, 0);
        auto fill = [&](int slot) {
            unsigned char* const stage = smem + slot * (Tile::kBytesA + Tile::kBytesB);
#pragma unroll
            for (int r = 0; r < Tile::kRows / kAtOnce; ++r)
                cp_async16(smem_address(stage) + gemm::swizzled<kPieces>(at + r * kAtOnce, piece), g.pixels(from, pixel + r * (kAtOnce / kSide) * g.w),
                           (c < g.c) & g.inside(y + r * (kAtOnce / kSide), x));
            copy_w.start(stage + Tile::kBytesA);
            cp_async_commit();
            copy_w.advance_cols(Tile::kDepth);
            from += Tile::kDepth;
            c += Tile::kDepth;
        };
        const int64_t steps = (g.c + Tile::kDepth - 1) / Tile::kDepth;
        if constexpr (NORM) {
            float* const smem_norm = reinterpret_cast<float*>(smem + Tile::kSmem);
            norm_table<T, Tile::kThreads>(smem_norm, p.norm, image, 0, g.c);
            auto prepare = [&](int64_t s, unsigned char* stage) {
                const int channel = int(s) * Tile::kDepth + piece * kWide<T>;
                if (channel >= g.c) return;
#pragma unroll 2
                for (int r = 0; r < Tile::kRows / kAtOnce; ++r)
                    if (g.inside(y + r * (kAtOnce / kSide), x))
                        activate(reinterpret_cast<T*>(stage + gemm::swizzled<kPieces>(at + r * kAtOnce, piece)), smem_norm + channel * 2);
            };
            prepared_pipeline(acc, steps, fill, prepare, smem);
        } else {
            gemm::pipeline(acc, steps, fill, smem);
        }
    }

    float* const smem_products = reinterpret_cast<float*>(smem);  // [O, taps][pixel]
    __syncthreads();  // all warps are done with the stages
#pragma unroll
    for (int j = 0; j < Tile::kAccCols; ++j)
#pragma unroll
        for (int i = 0; i < Tile::kAccRows; ++i) smem_products[Tile::col(j) * kLine + Tile::row(i)] = acc.at(i, j);
    __syncthreads();  // the products are visible
    const bool square = g.taps_y == 3 && g.taps_x == 3;  // whose loads are in flight together
    for (int at = int(threadIdx.x); at < rows * cols; at += Tile::kThreads) {
        const int i = at / cols, j = at - i * cols;
        if (row0 + i >= g.rows || col0 + j >= g.cols) continue;
        const int64_t pixel = (int64_t(image) * p.out_h + (row0 + i) * p.out_step + phase.first_y) * p.out_w + (col0 + j) * p.out_step + phase.first_x;
        for (int o = 0; o < p.outputs; ++o) {
            const float* from = smem_products + o * taps * kLine + i * kSide + j;
            float sum = 0.f;
            if (square) {
                float tap[9];
#pragma unroll
                for (int n = 0; n < 9; ++n) tap[n] = from[n * kLine + n / 3 * kSide + n % 3];
#pragma unroll
                for (int n = 0; n < 9; ++n) sum += tap[n];
            } else {
                for (int u = 0; u < g.taps_y; ++u, from += kSide)
                    for (int v = 0; v < g.taps_x; ++v) sum += from[(u * g.taps_x + v) * kLine + v];
            }
            if (p.bias) sum += to_float(p.bias[o]);
            if (p.residual.ptr) sum += to_float(p.residual.row(pixel)[o]);
            p.y[pixel * p.ld + o] = from_float<T>(sum);
        }
    }
}

// ---- weights ---------------------------------------------------------------------------------------------

constexpr int kPackThreads = 256;

// packed[o, (taps, c)] = w[o, (taps, c)], with zeros in the padding. n: elements of `packed`.
template <class T> __global__ void __launch_bounds__(kPackThreads) pack_kernel(const T* w, int64_t ld, int64_t n, int64_t depth, int64_t c, T* packed) {
    const int64_t at = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
    if (at >= n) return;
    const int64_t row = at / padded<T>(depth), k = at - row * padded<T>(depth), from = row * depth + k;
    packed[at] = k < depth ? w[from / c * ld + from % c] : T{};
}

// Taps `first`, first + step, ... of n.
__host__ __device__ inline int taps_of(int n, int first, int step) { return first < n ? (n - first + step - 1) / step : 0; }
// How many taps come before those in order: of smaller `first`.
__host__ __device__ inline int taps_before(int n, int first, int step) {
    const int whole = n / step, rest = n % step;
    return first * whole + (first < rest ? first : rest);
}

// Where the transposed weights of the taps of a phase begin, in elements. `rows` of them have `depth` elements a tap; what
// the padding of the rows takes is less than two pieces a row.
template <class T> __host__ __device__ int64_t phase_begin(int taps_y, int taps_x, int first_y, int first_x, int step, int rows, int depth) {
    const int64_t above = int64_t(taps_before(taps_y, first_y, step)) * taps_x;
    const int64_t taps = above + int64_t(taps_of(taps_y, first_y, step)) * taps_before(taps_x, first_x, step);
    const int64_t phases = int64_t(first_y) * (step < taps_x ? step : taps_x) + first_x;
    return padded<T>(taps * rows * depth) + phases * rows * 2 * kWide<T>;
}
// The end of all of them.
template <class T> int64_t phases_end(int taps_y, int taps_x, int step, int rows, int depth) {
    return padded<T>(int64_t(taps_y) * taps_x * rows * depth) + int64_t(std::min(step, taps_y)) * std::min(step, taps_x) * rows * 2 * kWide<T>;
}

constexpr int kTransposed = 32, kTransposeRows = 8;  // sides of a tile, rows at once

// Phase by phase: transposed[c, (u', v'), o] = w[o, (u, v), c], where u', v' count the taps of the phase backwards; zeros in
// the padding of rows.
template <class T>
__global__ void __launch_bounds__(kTransposed * kTransposeRows)
transpose_kernel(const T* w, int64_t ld, int outputs, int taps_y, int taps_x, int channels, int step, T* transposed) {
    __shared__ T smem_tile[kTransposed][kTransposed + 2];
    const int lane = int(threadIdx.x) % kTransposed, row = int(threadIdx.x) / kTransposed;
    const int taps = taps_y * taps_x, across = (channels + kTransposed - 1) / kTransposed;
    const int tap = int(blockIdx.x % unsigned(taps)), tile = int(blockIdx.x / unsigned(taps));
    const int o0 = tile / across * kTransposed, c0 = tile % across * kTransposed;
    for (int r = row; r < kTransposed; r += kTransposeRows)
        if (o0 + r < outputs && c0 + lane < channels) smem_tile[r][lane] = w[(int64_t(o0 + r) * taps + tap) * ld + c0 + lane];
    __syncthreads();  // the tile has arrived
    const int u = tap / taps_x, v = tap - u * taps_x, first_y = u % step, first_x = v % step;
    const int phase_y = taps_of(taps_y, first_y, step), phase_x = taps_of(taps_x, first_x, step);
    const int64_t at = (phase_y - 1 - u / step) * phase_x + (phase_x - 1 - v / step), depth = int64_t(phase_y) * phase_x * outputs;
    const bool pad = u < step && v < step && o0 == 0 && lane < padded<T>(depth) - depth;  // once a phase
    T* const to = transposed + phase_begin<T>(taps_y, taps_x, first_y, first_x, step, channels, outputs);
    for (int r = row; r < kTransposed && c0 + r < channels; r += kTransposeRows) {
        T* const line = to + (c0 + r) * padded<T>(depth);
        if (o0 + lane < outputs) line[at * outputs + o0 + lane] = smem_tile[lane][r];
        if (pad) line[depth + lane] = T{};
    }
}

// ---- host ------------------------------------------------------------------------------------------------

// `positions`: of all phases. `hopper`, `halo`, `few`, `first`: these kernels support the call; `vectors`: those of whole pieces do.
const char* choose_conv2d_config(int64_t positions, int64_t outputs, bool vectors, bool hopper, bool halo, bool few, bool first, int32_t dtype,
                                 int multiprocessors) {
    if (hopper) return "hopper";
    if (few) return "few";
    if (first && outputs > kMostOutputs) return "first";
    if (!vectors) return halo ? "halo" : "plain";
    const bool narrow = outputs <= 64;
    const int64_t cols = narrow || dtype != ETT_BF16 ? 64 : 128;
    return ceil_div(positions, 128) * ceil_div(outputs, cols) < multiprocessors ? "small" : narrow ? "medium" : "large";
}

// The phases of a launch, and where their weights lie.
struct Layout {
    Grid grid;
    int64_t w;  // elements
    int first_y, first_x;
};

// What a convolution does on its way in and out, beside bias.
struct Fused {
    NormViews norm;            // of x, or of what `through` was read with
    const ett_view& residual;  // may be absent
    const ett_view* through;   // the input of the norm through whose gradient the results pass; null: none
    float* partials;           // where the sums of tiles go; null: none
};

// The implementation that ran, and the lines and columns of the tiles whose sums it wrote to `partials`; 0: none.
struct Ran {
    const char* kernel = "";
    int lines = 0, across = 0;
};

// Whether first_kernel supports a product of x.
bool first_shape(const ett_view& x, int64_t taps_y, int64_t taps_x, int64_t step) {
    return x.dtype == ETT_BF16 && taps_y == 3 && taps_x == 3 && step == 1 && cols(x) == halo::kFewInputs;
}

#ifndef ETT_SHIM
// Lines of the tiles of hopper_conv.cuh; 0 if it does not support a product of x.
int hopper_lines(const ett_view& x, int64_t outputs, const Layout* layouts, int64_t count, bool normed) {
    const Grid* grids[hopper_conv::kMostPhases];
    if (count < 1 || count > hopper_conv::kMostPhases) return 0;
    for (int64_t i = 0; i < count; ++i) grids[i] = &layouts[i].grid;
    const int step = grids[0]->step;
    if (x.dtype != ETT_BF16 || (normed && (step != 1 || count != 1)) || x.dims[1] < step || x.dims[2] < step) return 0;
    return hopper_conv::lines_of(grids, int(count), x.dims[0], outputs);
}
#endif

// The tiles of an image of halo_kernel and first_kernel.
channels::Tiles halo_tiles(int64_t rows, int64_t cols) { return {rows, cols, halo::kLines, halo::kAcross}; }

// Whether halo_kernel supports a product of x, as far as shapes say so.
bool halo_shape(const ett_view& x, int64_t outputs, int64_t taps_y, int64_t taps_x, int64_t step) {
    return x.dtype == ETT_BF16 && taps_y == 3 && taps_x == 3 && step == 1 && cols(x) > 0 && cols(x) % halo::kDepth == 0 &&
           cols(x) <= halo::kMostChannels && outputs <= halo::kMostOutputs;
}

int32_t run_tiles(const char* op, bool first, const ett_view& x, const bf16* w, const ett_view* bias, const ett_view& y, const Grid& g, const Fused& fused,
                 const ett_launch* l) {
    const bool through = fused.through, normed = !through && present(fused.norm.mean);
    const ett_view& extra = through ? *fused.through : fused.residual;
    const channels::Tiles tiles = halo_tiles(g.rows, g.cols);
    const int64_t o = cols(y), blocks = y.dims[0] * tiles.count;
    const InputNorm<bf16> norm = input_norm<bf16>(fused.norm, through ? o : g.c);
    const halo::Product p{g,
                          data<const bf16>(x),
                          normed ? norm : InputNorm<bf16>{},
                          w,
                          int(padded<bf16>(g.depth())),
                          bias ? data<const bf16>(*bias) : nullptr,
                          data<const bf16>(extra),
                          present(extra) ? stride(extra) : 0,
                          through ? norm : InputNorm<bf16>{},
                          data<bf16>(y),
                          stride(y),
                          fused.partials,
                          int(o),
                          int(ceil_div(g.rows, halo::kLines)),
                          int(ceil_div(g.cols, halo::kAcross)),
                          wide(y),
                          wide(extra)};
    const auto go = [&](auto k, int smem, int64_t cols) {
        return launch(op, k, dim3(unsigned(blocks * ceil_div(o, cols))), dim3(halo::kThreads), smem, l, p);
    };
    if (first) {
        const int smem = halo::Tile<64>::kBytesA + halo::Tile<64>::kBytesB + halo::kPositions * 64 * 2 + 64 * 16;
        return through ? go(halo::first_kernel<true>, smem, 64) : go(halo::first_kernel<false>, smem, 64);
    }
    return o <= 64 || blocks * ceil_div(o, 128) < multiprocessors() ? go(halo::halo_kernel<64>, halo::smem_bytes<64>(g.c), 64)
                                                                    : go(halo::halo_kernel<128>, halo::smem_bytes<128>(g.c), 128);
}

// y = convolution of x by w, padded weights, phase by phase. Only some implementations use `through` and `partials`: see
// Ran.
int32_t run(const char* op, Check& check, const ett_view& x, const void* w, const ett_view* bias, const ett_view& y, int64_t out_step,
            const Layout* layouts, int64_t count, const Fused& fused, Ran& ran, const ett_launch* l) {
    const int64_t o = cols(y);
    const bool normed = !fused.through && present(fused.norm.mean), vectors = wide(x) && !normed;
    const Grid& only = layouts[0].grid;
    const bool halo = normed && wide(x) && count == 1 && out_step == 1 && halo_shape(x, o, only.taps_y, only.taps_x, only.step);
    const bool first = !normed && count == 1 && out_step == 1 && first_shape(x, only.taps_y, only.taps_x, only.step);
    // With a larger step there are several launches, and `few` might not support all of them.
    bool few = wide(x) && o <= kMostOutputs && out_step <= 2 && (!normed || cols(x) <= halo::kMostChannels);
    int64_t positions = 0, most_taps = 0;
    for (int64_t i = 0; i < count; ++i) {
        const Grid& g = layouts[i].grid;
        few = few && g.step == 1 && g.taps_y <= kMostTaps && g.taps_x <= kMostTaps && g.taps_y * g.taps_x * o <= 64;
        positions += g.positions;
        most_taps = std::max<int64_t>(most_taps, int64_t(g.taps_y) * g.taps_x);
    }
    bool hopper = false;
#ifndef ETT_SHIM
    const int lines = out_step <= 2 && hopper::is_hopper() ? hopper_lines(x, o, layouts, count, normed) : 0;
    hopper = lines > 0 && hopper_images::mappable(x) && hopper_images::mappable(y) &&
             (!present(fused.residual) || (hopper_images::mappable(fused.residual) && count == 1));
#endif
    const char* best = choose_conv2d_config(positions, o, vectors, hopper, halo, few, first, x.dtype, multiprocessors());
    const char* const kernel = check.choose(l, best, {{"hopper", hopper}, {"few", few}, {"first", first}, {"halo", halo}, {"large", vectors},
                                                      {"medium", vectors}, {"small", vectors}, {"plain", true}});
    if (!check.ok()) return check.status();
    ran.kernel = kernel;
#ifndef ETT_SHIM
    if (strcmp(kernel, "hopper") == 0) {
        hopper_conv::Request r{};
        r.x = x, r.y = y, r.parts = int(count), r.out_step = out_step;
        for (int64_t i = 0; i < count; ++i) {
            const Layout& at = layouts[i];
            r.part[i] = {&at.grid, static_cast<const bf16*>(w) + at.w, padded<bf16>(at.grid.depth()), at.first_y, at.first_x};
        }
        if (normed) r.norm = input_norm<bf16>(fused.norm, cols(x));
        r.bias = bias ? data<const bf16>(*bias) : nullptr;
        r.residual = fused.residual;
        if (normed) r.partials = fused.partials;
        if (r.partials) ran.lines = lines, ran.across = hopper_images::kAcross;
        return hopper_conv::run(op, r, l);
    }
#endif
    if (strcmp(kernel, "halo") == 0 || strcmp(kernel, "first") == 0) {
        if (fused.partials) ran.lines = halo::kLines, ran.across = halo::kAcross;
        return run_tiles(op, strcmp(kernel, "first") == 0, x, static_cast<const bf16*>(w) + layouts[0].w, bias, y, only, fused, l);
    }
    return with_act(x.dtype, [&](auto t) {
        using T = decltype(t);
        for (int64_t first = 0; first < count; first += kPhases) {
            Product<T> p{};
            p.x = data<const T>(x), p.bias = bias ? data<const T>(*bias) : nullptr, p.y = data<T>(y);
            if (normed) p.norm = input_norm<T>(fused.norm, cols(x));
            p.residual = matrix<const T>(fused.residual);
            p.ld = stride(y);
            p.outputs = int(o), p.out_h = int(y.dims[1]), p.out_w = int(y.dims[2]), p.out_step = int(out_step);
            p.phases = int(std::min<int64_t>(count - first, kPhases));
            p.wide_y = wide(y);
            for (int i = 0; i < p.phases; ++i) {
                const Layout& at = layouts[first + i];
                p.phase[i] = {at.grid, static_cast<const T*>(w) + at.w, at.first_y, at.first_x};
            }
            auto go = [&](auto k, int threads, int smem, auto tiles_of) {
                int64_t tiles = 0;
                for (int i = 0; i < p.phases; ++i) tiles = std::max<int64_t>(tiles, tiles_of(p.phase[i].grid));
                return tiles == 0 ? ETT_OK : launch(op, k, dim3(unsigned(tiles * p.phases)), dim3(threads), smem, l, p);
            };
            auto product = [&](auto tile, auto pieces) {
                using Tile = decltype(tile);
                return go(conv_kernel<Tile, decltype(pieces)::value>, Tile::kThreads, Tile::kSmem,
                          [&](const Grid& g) { return ceil_div(g.positions, Tile::kRows) * ceil_div(o, Tile::kCols); });
            };
            auto regions = [&](auto tile) {
                using Tile = decltype(tile);
                const auto tiles = [&](const Grid& g) {
                    const int64_t down = kSide + 1 - std::max(g.taps_y, 1), across = kSide + 1 - std::max(g.taps_x, 1);
                    return y.dims[0] * ceil_div(g.rows, down) * ceil_div(g.cols, across);
                };
                return normed ? go(few_kernel<Tile, true>, Tile::kThreads, Tile::kSmem + int(cols(x)) * 8, tiles)
                              : go(few_kernel<Tile, false>, Tile::kThreads, Tile::kSmem, tiles);
            };
            using Sizes = Tiles<T>;
            const auto is = [&](const char* name) { return strcmp(kernel, name) == 0; };
            const int32_t status = is("large")    ? product(typename Sizes::Large{}, std::true_type{})
                                   : is("medium") ? product(typename Sizes::Medium{}, std::true_type{})
                                   : is("small")  ? product(typename Sizes::Small{}, std::true_type{})
                                   : is("plain")  ? product(typename Sizes::Plain{}, std::false_type{})
                                   : most_taps * o <= 32 ? regions(typename Sizes::template Few<32>{})
                                                         : regions(typename Sizes::template Few<64>{});
            if (status != ETT_OK) return status;
        }
        return int32_t(ETT_OK);
    });
}

NormViews norm_of(const ett_conv2d_fwd_args* a) { return {a->mean, a->rstd, a->gamma, a->beta}; }
NormViews norm_of(const ett_conv2d_bwd_data_args* a) { return {a->mean, a->rstd, a->gamma, a->beta}; }

// The images of the norms: of y, if its statistics are wanted, and of x.
channels::Planes planes(const ett_conv2d_fwd_args* a) { return {a->y.dims[0], a->y.dims[1] * a->y.dims[2], cols(a->y), cols(a->y_mean)}; }
channels::Planes planes(const ett_conv2d_bwd_data_args* a) { return {a->dx.dims[0], a->dx.dims[1] * a->dx.dims[2], cols(a->dx), cols(a->mean)}; }

// `v`, if present, has the shape of `y`.
bool check_like(Check& check, const char* name, const ett_view& v, const ett_view& y) {
    return !present(v) || (check.matrix(name, v, y.dtype, rows(y), cols(y)) && check.image(name, v));
}

bool sound(Check& check, const ett_conv2d_fwd_args* a) {
    if (!check.ok() || !check_shapes(check, {"x", a->x}, {"w", a->w}, a->x.dtype, {"y", a->y}, a->stride, a->pad_top, a->pad_left) ||
        (present(a->bias) && !check.vector("bias", a->bias, a->x.dtype, a->w.dims[0])) || !check_like(check, "residual", a->residual, a->y) ||
        !check_norm(check, norm_of(a), a->x) || !check_statistics(check, "y_mean", a->y_mean, "y_rstd", a->y_rstd, a->y))
        return false;
    return !present(a->y_mean) || check.require(channels::fits(planes(a)), "y", "too many images", "less than 2^30 tiles of 32 channels");
}
bool sound(Check& check, const ett_conv2d_bwd_data_args* a) {
    if (!check.ok() || !check_shapes(check, {"dx", a->dx}, {"w", a->w}, a->dy.dtype, {"dy", a->dy}, a->stride, a->pad_top, a->pad_left) ||
        !check.all_or_none({{"x", &a->x}, {"mean", &a->mean}}) || !check_like(check, "x", a->x, a->dx) || !check_norm(check, norm_of(a), a->dx) ||
        !check_like(check, "skip", a->skip, a->dx) || (present(a->bias) && !check.vector("bias", a->bias, a->dy.dtype, cols(a->dx))))
        return false;
    if (!present(a->x))
        return check.require(!present(a->skip), "skip", "present", "absent, as x is") &&
               check.require(!present(a->dgamma), "dgamma", "present", "absent, as x is") &&
               check.require(!present(a->dbeta), "dbeta", "present", "absent, as x is");
    return (!present(a->dgamma) || check.vector("dgamma", a->dgamma, ETT_F32, cols(a->dx))) &&
           (!present(a->dbeta) || check.vector("dbeta", a->dbeta, ETT_F32, cols(a->dx))) &&
           check.require(channels::fits(planes(a)), "x", "too many images", "less than 2^30 tiles of 32 channels");
}

// Elements of the padded copy of w.
int64_t packed_size(const ett_view& w) {
    const int64_t depth = w.dims[1] * w.dims[2] * w.dims[3];
    return with_act(w.dtype, [&](auto t) { return w.dims[0] * padded<decltype(t)>(depth); });
}
// True if w itself has the form of the copy.
bool is_packed(const ett_view& w) {
    return contiguous(w) && reinterpret_cast<uintptr_t>(w.ptr) % 16 == 0 && w.dims[1] * w.dims[2] * w.dims[3] * dtype_size(w.dtype) % 16 == 0;
}

int64_t weights_bytes(const ett_conv2d_fwd_args* a) {
    return numel(a->y) == 0 || numel(a->w) == 0 || is_packed(a->w) ? 0 : packed_size(a->w) * dtype_size(a->w.dtype);
}
int64_t weights_bytes(const ett_conv2d_bwd_data_args* a) {
    if (numel(a->dx) == 0 || numel(a->w) == 0) return 0;
    const int64_t* d = a->w.dims;
    return with_act(a->w.dtype, [&](auto t) {
        using T = decltype(t);
        return phases_end<T>(int(d[1]), int(d[2]), int(a->stride), int(d[3]), int(d[0])) * int64_t(sizeof(T));
    });
}

// The phases of a call. Pixels of rows y, y + stride, ... of dx meet the taps of rows first, first + stride, ...; the last of
// these lies on row at_y of dy.
struct Phases {
    Layout layout[kPhases];
    int64_t count = 0;
};
Phases phases_of(const ett_conv2d_fwd_args* a) {
    const Taps taps{a->w.dims[1], a->w.dims[2], a->stride, -a->pad_top, -a->pad_left};
    return {{{grid_of(a->x, a->y.dims[1], a->y.dims[2], taps), 0, 0, 0}}, 1};
}
// Phase (y, x) of dx.
Layout phase_of(const ett_conv2d_bwd_data_args* a, int64_t y, int64_t x) {
    const int64_t step = a->stride, taps_y = a->w.dims[1], taps_x = a->w.dims[2];
    const int first_y = int((y + a->pad_top) % step), first_x = int((x + a->pad_left) % step);
    const int64_t ny = taps_of(int(taps_y), first_y, int(step)), nx = taps_of(int(taps_x), first_x, int(step));
    const int64_t at_y = (y + a->pad_top - first_y) / step - std::max<int64_t>(ny - 1, 0);
    const int64_t at_x = (x + a->pad_left - first_x) / step - std::max<int64_t>(nx - 1, 0);
    const int64_t begin = ny * nx == 0 ? 0 : with_act(a->w.dtype, [&](auto t) {
        return phase_begin<decltype(t)>(int(taps_y), int(taps_x), first_y, first_x, int(step), int(a->w.dims[3]), int(a->w.dims[0]));
    });
    return {grid_of(a->dy, ceil_div(a->dx.dims[1] - y, step), ceil_div(a->dx.dims[2] - x, step), {ny, nx, 1, at_y, at_x}), begin, int(y), int(x)};
}

// The tiles of an image of hopper_conv.cuh for a normalised x; none if it does not support the call.
channels::Tiles hopper_tiles(const ett_view& x, const ett_view& y, const Layout& layout) {
#ifdef ETT_SHIM
    const int lines = 0;
    (void)x, (void)layout;
#else
    const int lines = hopper::plan_hopper() ? hopper_lines(x, cols(y), &layout, 1, true) : 0;
#endif
    return {y.dims[1], y.dims[2], lines, lines > 0 ? 8 : 0};
}

// Bytes of what follows the weights: partial sums of statistics, for any implementation.
int64_t sums_bytes(const ett_conv2d_fwd_args* a) {
    if (!present(a->y_mean)) return 0;
    const channels::Planes s = planes(a);
    int64_t tiles = present(a->mean) ? hopper_tiles(a->x, a->y, phases_of(a).layout[0]).count : 0;
    if (halo_shape(a->x, a->w.dims[0], a->w.dims[1], a->w.dims[2], a->stride) || first_shape(a->x, a->w.dims[1], a->w.dims[2], a->stride))
        tiles = std::max<int64_t>(tiles, halo_tiles(a->y.dims[1], a->y.dims[2]).count);
    return std::max(channels::partials_bytes(s, a->y.dtype), s.b * tiles * 2 * s.c * int64_t(sizeof(float)));
}
int64_t sums_bytes(const ett_conv2d_bwd_data_args* a) {
    if (!present(a->x) || numel(a->dx) == 0) return 0;
    const channels::Planes s = planes(a);
    const int64_t tiles = first_shape(a->dy, a->w.dims[1], a->w.dims[2], a->stride) ? halo_tiles(a->dx.dims[1], a->dx.dims[2]).count : 0;
    return std::max(channels::backward_bytes(s, a->dx.dtype), tiles > 0 ? channels::BackwardSpace::bytes(s, tiles) : 0);
}

template <class A> int64_t bytes_of(const A* a) { return round_up(weights_bytes(a), 256) + sums_bytes(a); }

template <class A> int64_t workspace_of(const char* op, const A* a) {
    Check check(op, a);
    return sound(check, a) ? bytes_of(a) : -1;
}

}  // namespace
}  // namespace conv
}  // namespace ett

extern "C" int64_t ett_conv2d_fwd_workspace(const ett_conv2d_fwd_args* a) { return ett::conv::workspace_of("conv2d_fwd", a); }
extern "C" int64_t ett_conv2d_bwd_data_workspace(const ett_conv2d_bwd_data_args* a) { return ett::conv::workspace_of("conv2d_bwd_data", a); }

extern "C" int32_t ett_conv2d_fwd(const ett_conv2d_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    using namespace ett::conv;
    const char* const op = "conv2d_fwd";
    Check check(op, a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->y) == 0 && (!present(a->y_mean) || numel(a->y_mean) == 0)) return ett_done("");
    if (!check.workspace(l, bytes_of(a))) return check.status();
    unsigned char* const sums = static_cast<unsigned char*>(l->workspace) + round_up(weights_bytes(a), 256);
    // Without pixels, the statistics are NaN.
    const auto statistics = [&] {
        return with_act(a->y.dtype, [&](auto t) {
            return channels::launch_statistics<decltype(t)>(op, wide(a->y), planes(a), a->y, a->y_mean, a->y_rstd, false, a->eps, sums, l);
        });
    };
    if (numel(a->y) == 0) {
        const int32_t status = statistics();
        return status == ETT_OK ? ett_done("") : status;
    }
    const void* w = a->w.ptr;
    if (weights_bytes(a) > 0) {
        w = l->workspace;
        const int32_t status = with_act(a->w.dtype, [&](auto t) {
            using T = decltype(t);
            const int64_t n = packed_size(a->w), depth = numel(a->w) / a->w.dims[0];
            return launch(op, pack_kernel<T>, dim3(unsigned(ceil_div(n, kPackThreads))), dim3(kPackThreads), 0, l, data<const T>(a->w), stride(a->w),
                          n, depth, cols(a->w), static_cast<T*>(l->workspace));
        });
        if (status != ETT_OK) return status;
    }
    float* const partials = present(a->y_mean) ? reinterpret_cast<float*>(sums) : nullptr;
    Ran ran;
    int32_t status =
        run(op, check, a->x, w, present(a->bias) ? &a->bias : nullptr, a->y, 1, phases_of(a).layout, 1, {norm_of(a), a->residual, nullptr, partials}, ran, l);
    if (status == ETT_OK && present(a->y_mean))
        status = ran.lines == 0 ? statistics()
                                : channels::launch_join(op, planes(a), {a->y.dims[1], a->y.dims[2], ran.lines, ran.across}, partials, a->y_mean, a->y_rstd,
                                                        false, a->eps, l);
    return status == ETT_OK ? ett_done(ran.kernel) : status;
}

extern "C" int32_t ett_conv2d_bwd_data(const ett_conv2d_bwd_data_args* a, const ett_launch* l) {
    using namespace ett;
    using namespace ett::conv;
    const char* const op = "conv2d_bwd_data";
    Check check(op, a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->dx) == 0) return ett_done("");
    if (!check.workspace(l, bytes_of(a))) return check.status();
    const int o = int(a->w.dims[0]), taps_y = int(a->w.dims[1]), taps_x = int(a->w.dims[2]), c = int(a->w.dims[3]), step = int(a->stride);
    if (numel(a->w) > 0) {
        const int64_t tiles = ceil_div(o, kTransposed) * ceil_div(c, kTransposed);
        const int32_t status = with_act(a->w.dtype, [&](auto t) {
            using T = decltype(t);
            return launch(op, transpose_kernel<T>, dim3(unsigned(tiles * taps_y * taps_x)), dim3(kTransposed * kTransposeRows), 0, l,
                          data<const T>(a->w), stride(a->w), o, taps_y, taps_x, c, step, static_cast<T*>(l->workspace));
        });
        if (status != ETT_OK) return status;
    }
    const int64_t h = a->dx.dims[1], wd = a->dx.dims[2];
    const bool through = present(a->x);
    void* const sums = static_cast<unsigned char*>(l->workspace) + round_up(weights_bytes(a), 256);
    const ett_view none{};
    const Fused fused{norm_of(a), none, through ? &a->x : nullptr, static_cast<float*>(sums)};
    const Fused plain{{none, none, none, none}, none, nullptr, nullptr};
    Ran ran;
    Phases phases;
    for (int64_t y = 0; y < std::min<int64_t>(step, h); ++y) {
        for (int64_t x = 0; x < std::min<int64_t>(step, wd); ++x) {
            phases.layout[phases.count++] = phase_of(a, y, x);
            const bool last = y + 1 == std::min<int64_t>(step, h) && x + 1 == std::min<int64_t>(step, wd);
            if (phases.count < kPhases && !last) continue;
            const int32_t status = run(op, check, a->dy, l->workspace, present(a->bias) ? &a->bias : nullptr, a->dx, step, phases.layout, phases.count,
                                       through ? fused : plain, ran, l);
            if (status != ETT_OK) return status;
            phases.count = 0;
        }
    }
    if (!through) return ett_done(ran.kernel);
    const channels::Planes s = planes(a);
    const bool is_wide = wide(a->x) && wide(a->dx) && wide(a->skip);
    const int32_t status = with_act(a->dx.dtype, [&](auto t) {
        using T = decltype(t);
        const channels::Scale<T> scale{data<const T>(a->gamma), data<const T>(a->beta), data<const float>(a->mean), data<const float>(a->rstd), 0.f, false};
        if (ran.lines == 0)
            return channels::launch_backward<T>(op, is_wide, s, a->dx, a->x, a->skip, a->dx, a->dgamma, a->dbeta, scale, true, channels::Silu{}, sums, l);
        // dx holds the gradient of SiLU's input, and the sums of the tiles are known.
        const int tiles = channels::Tiles(h, wd, ran.lines, ran.across).count;
        const channels::BackwardSpace space(sums, s, tiles);
        const int32_t status = channels::launch_means<T>(op, s, space, tiles, scale.w, true, a->dgamma, a->dbeta, l);
        if (status != ETT_OK) return status;
        return channels::launch_dx<T>(op, is_wide, s, a->dx, a->x, a->skip, a->dx, scale, space.means, channels::Leaky{1.f}, l);
    });
    return status == ETT_OK ? ett_done(ran.kernel) : status;
}
