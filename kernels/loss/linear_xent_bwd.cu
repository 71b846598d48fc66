// linear_xent_bwd.cu: gradient of linear_xent_fwd; the logits are recomputed, one chunk of the vocabulary at a time.
//
//   dl_nv = g * scale * (exp(x_n . w_v - lse_n) - [v = target_n]),   dx = dl w,   dw += dl^T x,   over n with target_n >= 0
//
// x       N,C  act  rows of any stride   in
// w       V,C  act  rows of any stride   in
// target  N    i32  contiguous           in    negative: not supervised
// scale   1    f32                       in
// lse     N    f32  contiguous           in
// g       1    f32                       in
// dx      N,C  act  rows of any stride   out   0 in unsupervised rows
// dw      V,C  f32  rows of any stride   added to; may be absent
//
// Steps: the supervised rows are found and packed; for each chunk of the vocabulary, dl is stored and multiplied by w
// and x; dx is summed over the chunks and rounded at the end. The fewer rows are supervised, the larger a chunk is.
// Only the device knows its size, so the host launches as many chunks as the smallest size needs; surplus launches do
// nothing.
// numerics: products and sums in f32, dl rounded to act, one rounding of dx; bitwise repeatable, on any device. A target
// of V or more is a fault and counts as -1.
// workspace: a copy of x, a chunk of dl (64 MiB; more only if N > 262144 in bf16 or 131072 in f32), and the sums of dx
// in f32 for max(N, 4096) rows.
// work: 6*n*C*V FLOP for n supervised rows; (2*n*C + V*C) * size + 8*V*C bytes.
// papers: Cut Your Losses (2411.09009).
#include "linear_xent.cuh"

namespace ett {
namespace xent {
namespace {

constexpr int64_t kChunkBytes = int64_t(64) << 20;
constexpr int64_t kChunkTile = 128;  // chunks are whole tiles
constexpr int64_t kSumRows = 4096;   // least number of rows of sums
constexpr int64_t kMostSplits = 16;

// Columns of dl in a chunk, such that `count` rows fit into `capacity` elements (capacity has room for kChunkTile
// columns of every row).
__host__ __device__ inline int64_t chunk_cols(int64_t capacity, int64_t count, int64_t v) {
    const int64_t most = (v + kChunkTile - 1) / kChunkTile * kChunkTile, fit = capacity / (count > 0 ? count : 1) / kChunkTile * kChunkTile;
    return fit < most ? fit : most;
}

// With few rows, dx has few tiles. Its sum over a chunk is then divided into this many splits, which are added at the
// end.
__host__ __device__ inline int64_t split_count(int64_t sum_rows, int64_t count) {
    const int64_t fit = sum_rows / (count > 0 ? count : 1);
    return fit < 1 ? 1 : fit < kMostSplits ? fit : kMostSplits;
}

template <class T> struct Backward {
    gemm::Matrix<T> x, w;
    Rows rows;
    const float* scale;
    const float* g;
    const float* lse;
    T* dl;             // rows, chunk_cols
    float* sums;       // splits, rows, ld_sums: dx
    float* dw;         // null: not computed
    int64_t lddw, ld_sums, capacity, sum_rows;
    bool pairs;  // two neighbours of dw can be stored as one access
};

// Logit gradients of one chunk.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2) logits_kernel(const __grid_constant__ Backward<typename Tile::Type> a, int64_t chunk) {
    using T = typename Tile::Type;
    ETT_DYNAMIC_SMEM(smem);
    const int count = *a.rows.count, row_tiles = (count + Tile::kRows - 1) / Tile::kRows;
    const int64_t ld = chunk_cols(a.capacity, count, a.w.rows), begin = chunk * ld, end = min(a.w.rows, begin + ld);
    if (count == 0 || begin >= end) return;
    gemm::Matrix<T> x = a.x;
    x.rows = count;
    const float factor = *a.scale * *a.g;
    const int64_t items = (end - begin + Tile::kCols - 1) / Tile::kCols * row_tiles;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const int64_t col_tile = item / row_tiles, row0 = (item - col_tile * row_tiles) * Tile::kRows, col0 = begin + col_tile * Tile::kCols;
        gemm::Acc<Tile> acc;
        acc.clear();
        gemm::tile_product(acc, x, a.w, row0, col0, smem);
        const int cols = int(min(int64_t(Tile::kCols), end - col0));
#pragma unroll
        for (int i = 0; i < Tile::kAccRows; ++i) {
            const int64_t row = row0 + Tile::row(i);
            if (row >= count) continue;
            const int target = a.rows.target[row] - int(col0);
            const float lse = a.lse[a.rows.at[row]];
            T* const dl = a.dl + row * ld + (col0 - begin);
#pragma unroll
            for (int j = 0; j < Tile::kAccCols; j += 2) {
                const int col = Tile::col(j);
                float two[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float p = exponential<T>(acc.at(i, j + e) - lse);
                    two[e] = col + e < cols ? (p - (col + e == target ? 1.f : 0.f)) * factor : 0.f;
                }
                // Writes up to the end of the tile, since the products read whole pieces.
                store<2>(dl + col, two);
            }
        }
    }
}

// to = a b, or to += a b if `add`, for one tile; `rows` and `cols` are the size of `to`.
template <class Tile>
__device__ __forceinline__ void product_to(float* to, int64_t ld, int rows, int cols, bool pairs, bool add, const gemm::Matrix<typename Tile::Type>& a,
                                           const gemm::Matrix<typename Tile::Type>& b, int row0, int col0, unsigned char* smem) {
    gemm::Acc<Tile> acc;
    acc.clear();
    gemm::tile_product(acc, a, b, row0, col0, smem);
#pragma unroll
    for (int i = 0; i < Tile::kAccRows; ++i) {
        const int row = row0 + Tile::row(i);
        if (row >= rows) continue;
        float* const p = to + row * ld;
#pragma unroll
        for (int j = 0; j < Tile::kAccCols; j += 2) {
            const int col = col0 + Tile::col(j);
            float two[2] = {acc.at(i, j), acc.at(i, j + 1)};
            if (pairs && col + 1 < cols) {
                float old[2] = {};
                if (add) load<2>(old, p + col);
                two[0] += old[0];
                two[1] += old[1];
                store<2>(p + col, two);
            } else {
                if (col < cols) p[col] = add ? p[col] + two[0] : two[0];
                if (col + 1 < cols) p[col + 1] = add ? p[col + 1] + two[1] : two[1];
            }
        }
    }
}

// For one chunk: blocks with y = 0 compute sums (+)= dl w, blocks with y = 1 compute dw += dl^T x.
template <class ForX, class ForW>
__global__ void __launch_bounds__(ForX::kThreads, 2) grads_kernel(const __grid_constant__ Backward<typename ForX::Type> a, int64_t chunk) {
    using T = typename ForX::Type;
    static_assert(ForX::kThreads == ForW::kThreads && ForX::kSmem == ForW::kSmem, "both products in one launch");
    ETT_DYNAMIC_SMEM(smem);
    const int count = *a.rows.count, c = int(a.x.cols), col_tiles = (c + ForX::kCols - 1) / ForX::kCols;
    const int64_t ld = chunk_cols(a.capacity, count, a.w.rows), begin = chunk * ld;
    if (count == 0 || begin >= a.w.rows) return;
    const int width = int(min(ld, a.w.rows - begin));
    if (blockIdx.y == 0) {
        // An item is a split of the chunk, a tile of rows and a tile of columns.
        const int splits = int(split_count(a.sum_rows, count)), row_tiles = (count + ForX::kRows - 1) / ForX::kRows;
        const int split = int((ld + splits * kChunkTile - 1) / (splits * kChunkTile) * kChunkTile);
        for (int item = blockIdx.x; item < splits * row_tiles * col_tiles; item += gridDim.x) {
            const int at = item / col_tiles, number = at / row_tiles, from = min(number * split, width), depth = min(split, width - from);
            const int whole = (depth + kWide<T> - 1) / kWide<T> * kWide<T>;
            const gemm::Matrix<T> dl{a.dl + from, count, whole, ld, true}, w{a.w.p + (begin + from) * a.w.ld, depth, c, a.w.ld, a.w.vectors};
            product_to<ForX>(a.sums + number * (count * a.ld_sums), a.ld_sums, count, int(a.ld_sums), true, chunk > 0, dl, w,
                             (at - number * row_tiles) * ForX::kRows, (item - at * col_tiles) * ForX::kCols, smem);
        }
    } else {
        const int row_tiles = (width + ForW::kRows - 1) / ForW::kRows;
        for (int item = blockIdx.x; item < row_tiles * col_tiles; item += gridDim.x) {
            const int at = item / col_tiles;
            const gemm::Matrix<T> dl{a.dl, count, (width + kWide<T> - 1) / kWide<T> * kWide<T>, ld, true}, x{a.x.p, count, c, a.x.ld, a.x.vectors};
            product_to<ForW>(a.dw + begin * a.lddw, a.lddw, width, c, a.pairs, true, dl, x, at * ForW::kRows, (item - at * col_tiles) * ForW::kCols,
                             smem);
        }
    }
}

constexpr int kRoundThreads = 256;

// dx = the sums of the splits, rounded; 0 in unsupervised rows. N elements at a time.
template <class T, int N>
__global__ void __launch_bounds__(kRoundThreads)
round_kernel(const int* count, const int* index, const float* sums, int64_t ld_sums, int64_t sum_rows, T* dx, int64_t lddx, int64_t n,
             int64_t pieces) {
    const int64_t supervised = *count, splits = split_count(sum_rows, supervised);
    for (int64_t i = int64_t(blockIdx.x) * kRoundThreads + threadIdx.x; i < n * pieces; i += int64_t(gridDim.x) * kRoundThreads) {
        const int64_t row = i / pieces, at = (i - row * pieces) * N, packed = index[row];
        float v[N] = {};
        if (packed >= 0)
            for (int64_t s = 0; s < splits; ++s) {
                float part[N];
                load<N>(part, sums + (s * supervised + packed) * ld_sums + at);
#pragma unroll
                for (int e = 0; e < N; ++e) v[e] += part[e];
            }
        store<N>(dx + row * lddx + at, v);
    }
}

// The layout of the workspace.
template <class T> struct Space {
    Pieces pieces;
    Packed<T> packed;
    int64_t v, capacity, sum_rows, ld_sums;
    int* index;
    T* dl;
    float* sums;

    Space(const ett_linear_xent_bwd_args& a, void* start)
        : pieces(start),
          packed(pieces, rows(a.x), cols(a.x)),
          v(rows(a.w)),
          capacity(std::min(std::max(kChunkBytes / int64_t(sizeof(T)), packed.n * kChunkTile), packed.n * round_up(v, kChunkTile))),
          sum_rows(std::max(packed.n, kSumRows)),
          ld_sums(round_up(cols(a.x), 4)),
          index(pieces.take<int>(packed.n)),
          dl(pieces.take<T>(capacity)),
          sums(pieces.take<float>(sum_rows * ld_sums)) {}
    // The number of chunks if all rows are supervised.
    int64_t most_chunks() const { return v == 0 ? 0 : ceil_div(v, chunk_cols(capacity, packed.n, v)); }
};

constexpr char kOp[] = "linear_xent_bwd";

template <class T> int32_t run(const ett_linear_xent_bwd_args& a, const ett_launch* l, const char* name) {
    using Tile = Logits<T>;
    using ForX = typename Tiles<T, false, false>::Type;
    using ForW = typename Tiles<T, true, false>::Type;
    const Space<T> s(a, l->workspace);
    int32_t status = pack(kOp, a, s.packed, s.index, nullptr, l);
    if (status != ETT_OK) return status;
    const int64_t n = s.packed.n, c = s.packed.cols;
    const Backward<T> b{s.packed.matrix(),
                        gemm::matrix<T>(a.w),
                        s.packed.rows,
                        data<const float>(a.scale),
                        data<const float>(a.g),
                        data<const float>(a.lse),
                        s.dl,
                        s.sums,
                        present(a.dw) ? data<float>(a.dw) : nullptr,
                        present(a.dw) ? stride(a.dw) : 0,
                        s.ld_sums,
                        s.capacity,
                        s.sum_rows,
                        wide(a.dw, 2 * sizeof(float))};
    const int64_t row_tiles = ceil_div(n, Tile::kRows), col_tiles = ceil_div(c, ForX::kCols);
    // An upper bound for any number of supervised rows: a chunk has at most `capacity` elements.
    const int64_t tiles = std::max(row_tiles * ceil_div(s.v, Tile::kCols), col_tiles * (ceil_div(s.v, ForW::kRows) + row_tiles * kMostSplits));
    for (int64_t chunk = 0; chunk < s.most_chunks(); ++chunk) {
        status = launch(kOp, logits_kernel<Tile>, blocks_for(tiles, 2), dim3(Tile::kThreads), Tile::kSmem, l, b, chunk);
        if (status != ETT_OK) return status;
        status = launch(kOp, grads_kernel<ForX, ForW>, dim3(blocks_for(tiles, 2).x, present(a.dw) ? 2 : 1), dim3(ForX::kThreads), ForX::kSmem, l, b, chunk);
        if (status != ETT_OK) return status;
    }
    auto go = [&](auto* kernel, int pieces_of) {
        const int64_t pieces = c / pieces_of;
        return launch(kOp, kernel, blocks_for(ceil_div(n * pieces, kRoundThreads), 8), dim3(kRoundThreads), 0, l,
                      static_cast<const int*>(s.packed.rows.count), static_cast<const int*>(s.index), static_cast<const float*>(s.sums), s.ld_sums,
                      s.sum_rows, data<T>(a.dx), stride(a.dx), n, pieces);
    };
    status = wide(a.dx, 4 * sizeof(T)) ? go(round_kernel<T, 4>, 4) : go(round_kernel<T, 1>, 1);
    return status == ETT_OK ? ett_done(name) : status;
}

bool sound(Check& check, const ett_linear_xent_bwd_args* a) {
    return check.ok() && check_shapes(check, *a) && check.vector("g", a->g, ETT_F32, 1) && check.matrix("dx", a->dx, a->x.dtype, rows(a->x), cols(a->x)) &&
           (!present(a->dw) || check.matrix("dw", a->dw, ETT_F32, rows(a->w), cols(a->x)));
}

int64_t workspace_bytes(const ett_linear_xent_bwd_args& a) {
    return with_act(a.x.dtype, [&](auto t) { return Space<decltype(t)>(a, nullptr).pieces.bytes(); });
}

}  // namespace
}  // namespace xent
}  // namespace ett

extern "C" int64_t ett_linear_xent_bwd_workspace(const ett_linear_xent_bwd_args* a) {
    using namespace ett;
    using namespace ett::xent;
    Check check(kOp, a);
    return sound(check, a) ? workspace_bytes(*a) : -1;
}

extern "C" int32_t ett_linear_xent_bwd(const ett_linear_xent_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    using namespace ett::xent;
    Check check(kOp, a, l);
    if (!sound(check, a) || !check.workspace(l, workspace_bytes(*a))) return check.status();
    if (numel(a->dx) == 0) return ett_done("");
    const char* kernel = check.choose(l, {{"chunks", true}});
    if (!check.ok()) return check.status();
    return with_act(a->x.dtype, [&](auto t) { return run<decltype(t)>(*a, l, kernel); });
}
