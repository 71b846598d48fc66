// conv2d_bwd_weight.cu: gradient of conv2d_fwd for weights and bias.
//
//   dw[o,u,v,c] += sum_{b,i,j} dy[b,i,j,o] x[b, i*stride + u - pad_top, j*stride + v - pad_left, c],   db[o] += sum_{b,i,j} dy[b,i,j,o]
//
// x   B,H,W,C    act  pixels of any stride  in
// dy  B,H',W',O  act  pixels of any stride  in
// dw  O,kh,kw,C  f32  rows of any stride    added to
// db  O          f32  contiguous            added to, may be absent
//
// A product over the positions of dy^T and the column matrix of x (gather.cuh). The positions are divided into parts,
// whose sums go to the workspace and are added in order. db is a col_sum of dy.
//
// "large": pixels of x and dy are whole 16-byte pieces. "narrow": x is gathered element by element, in tiles of few
// columns; for C = 3, where dy is read once, and for any other layout. "exchanged": for few outputs (O = 3) and stride 1,
// x^T times the column matrix of dy, taps reversed, so that x is read once.
//
// numerics: products are summed in f32 (f32: fused multiply-adds, no TF32) in ascending order of the positions of a part;
// then the parts: every eighth in order, and the eight sums in order; then the old value is added. The parts depend only
// on the shape and the number of multiprocessors: bitwise repeatable. "exchanged" reads all pixels of x and multiplies those
// that no output uses by 0, so that a non-finite value there makes dw NaN.
// workspace: the sums of all parts, at most those of two rounds of blocks, or one part.
// work: 2*B*H'*W'*O*kh*kw*C FLOP; (B*H*W*C + B*H'*W'*O) * size + 8*O*kh*kw*C bytes; db reads dy once more.
// limits: those of conv2d_fwd.
#include "gather.cuh"
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

template <class Tile> constexpr int kResident = Tile::kAccRows * Tile::kAccCols > 32 ? 2 : Tile::kCols == 32 ? 4 : 3;  // blocks

// sums[part] = a^T columns over the positions of the part, for one tile.
template <class T> struct Product {
    Grid grid;     // of the columns
    const T* x;    // what the columns are gathered from
    InputNorm<T> norm;  // of x; only without VECTORS
    gemm::Matrix<T> a;
    float* sums;   // parts, a.cols, ld
    int64_t ld;    // a multiple of 4
    int row_tiles, col_tiles, parts, steps;  // steps: of all parts together
};

template <class Tile, bool VECTORS>
__global__ void __launch_bounds__(Tile::kThreads, kResident<Tile>) grad_kernel(const __grid_constant__ Product<typename Tile::Type> p) {
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
    FixedColumns<T, Tile::kDepth, Tile::kCols, Tile::kThreads, VECTORS> copy_x(p.grid, p.x, p.norm, start, col0);
    auto fill = [&](int slot) {
        unsigned char* const stage = smem + slot * (Tile::kBytesA + Tile::kBytesB);
        copy_a.start(stage);
        copy_x.start(stage + Tile::kBytesA);
        cp_async_commit();
        copy_a.advance_rows(Tile::kDepth);
    };
    gemm::pipeline(acc, end - first, fill, smem);

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

// ---- host ------------------------------------------------------------------------------------------------

// `vectors`: pixels of x and dy are whole 16-byte pieces. `exchangeable`: as few outputs as "exchanged" is for, and
// stride 1.
const char* choose_conv2d_bwd_weight_config(int64_t channels, bool vectors, bool exchangeable) {
    if (exchangeable && channels > 8) return "exchanged";
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
        : rows(rows_of_sums), cols(cols_of_sums), ld(round_up(cols, 4)), row_tiles(ceil_div(rows, tile_rows)), col_tiles(ceil_div(cols, tile_cols)),
          steps(ceil_div(positions, depth)), parts(choose_parts(row_tiles * col_tiles, steps, int64_t(multiprocessors()) * resident)) {}
    int64_t bytes() const { return parts * rows * ld * 4; }
};

bool exchangeable(const ett_conv2d_bwd_weight_args* a) { return a->stride == 1 && a->dw.dims[0] <= 8 && !present(a->mean); }

// The sizes of implementation `kernel`.
Sizes sizes_of(const ett_conv2d_bwd_weight_args* a, const char* kernel) {
    const int64_t *d = a->dw.dims, taps = d[1] * d[2];
    const int depth = a->x.dtype == ETT_BF16 ? 32 : 16;
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

// The workspace of the gradient of the bias, which comes before that of the weights.
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
    most = std::max({most, sizes_of(a, "large").bytes(), sizes_of(a, "narrow").bytes()});
    return exchangeable(a) ? std::max(most, sizes_of(a, "exchanged").bytes()) : most;
}

extern "C" int32_t ett_conv2d_bwd_weight(const ett_conv2d_bwd_weight_args* a, const ett_launch* l) {
    using namespace ett;
    using namespace ett::conv;
    const char* const op = "conv2d_bwd_weight";
    Check check(op, a, l);
    if (!sound(check, a)) return check.status();
    const bool vectors = wide(a->x) && wide(a->dy) && !present(a->mean);
    const char* best = choose_conv2d_bwd_weight_config(a->dw.dims[3], vectors, exchangeable(a));
    const char* kernel = check.choose(l, best, {{"exchanged", exchangeable(a)}, {"large", vectors}, {"narrow", true}});
    if (!check.ok()) return check.status();
    const bool none = no_weights(a);
    if (!check.workspace(l, std::max(bias_bytes(a), none ? 0 : sizes_of(a, kernel).bytes()))) return check.status();
    if (present(a->db)) {
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
    int32_t status = with_act(a->x.dtype, [&](auto t) {
        using T = decltype(t);
        const Product<T> p{grid_of(gathered, dense.dims[1], dense.dims[2], taps), data<const T>(gathered), input_norm<T>(norm_of(a), cols(a->x)),
                           gemm::Matrix<T>{data<const T>(dense), rows(dense), cols(dense), stride(dense), wide(dense)}, sums, s.ld, int(s.row_tiles),
                           int(s.col_tiles), int(s.parts), int(s.steps)};
        auto go = [&](auto k, int threads, int smem) { return launch(op, k, dim3(unsigned(blocks)), dim3(threads), smem, l, p); };
        using Large = typename Tiles<T>::Large;
        using Narrow = typename Tiles<T>::template Narrow<32>;
        using Wider = typename Tiles<T>::template Narrow<64>;
        return large          ? go(grad_kernel<Large, true>, Large::kThreads, Large::kSmem)
               : s.cols <= 32 ? go(grad_kernel<Narrow, false>, Narrow::kThreads, Narrow::kSmem)
                              : go(grad_kernel<Wider, false>, Wider::kThreads, Wider::kSmem);
    });
    if (status != ETT_OK) return status;
    const Added added{sums, s.rows, s.ld, s.parts, data<float>(a->dw), stride(a->dw), numel(a->dw), int(d[0]), int(d[1] * d[2]), int(d[3]), exchanged};
    status = launch(op, add_kernel, dim3(unsigned(ceil_div(numel(a->dw), 32))), dim3(kAddThreads), 0, l, added);
    return status == ETT_OK ? ett_done(kernel) : status;
}
