// gather.cuh: the column matrix of a convolution, gathered from images while tiles are copied to shared memory.
//
// Row p of the column matrix belongs to a position (b, i, j) of a grid; its columns are the taps (u, v) of a kernel, and
// the channels of each tap:
//
//   columns[p, (u, v, c)] = x[b, i*step + at_y + u, j*step + at_x + v, c],   0 outside of the image
//
// Pixels, positions and coordinates are counted in 32 bits (`fits`), elements in 64.
#pragma once

#include <cstdlib>

#include "gemm.cuh"
#include "norm.cuh"

namespace ett {
namespace conv {

// Coordinates are below kReach, sides of kernels below kMostSide. A tap at kNever is outside of every image, also for
// positions that are at kOutside.
inline constexpr int kMostSide = 1 << 15, kReach = 1 << 28, kNever = 1 << 29, kOutside = -(1 << 30);

// Images of h lines of w pixels of c channels, which begin `ld` bytes apart, and the grid of positions over them.
struct Grid {
    int h, w, c, ld;
    int rows, cols, positions;  // rows and columns per image; positions in all images
    int taps_y, taps_x, step, at_y, at_x;
    // What a walk over the positions adds at the ends of lines and images.
    int end_x, end_y, line_x, line_pixels, image_y, image_pixels;

    __host__ __device__ int64_t depth() const { return int64_t(taps_y) * taps_x * c; }
    __device__ __forceinline__ int image(int position) const { return position / (rows * cols); }
    // `pixel` pixels after p.
    template <class T> __device__ __forceinline__ const T* pixels(const T* p, int pixel) const {
        return reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + int64_t(pixel) * ld);
    }
    __device__ __forceinline__ bool inside(int y, int x) const { return (unsigned(y) < unsigned(h)) & (unsigned(x) < unsigned(w)); }
};

// The pixel under the first tap at a position.
struct Cursor {
    int y, x;
    unsigned pixel;  // modulo 2^32, for positions after the last

    __device__ __forceinline__ Cursor(const Grid& g, int position) {
        const unsigned line = unsigned(position) / unsigned(g.cols), image = line / unsigned(g.rows);
        y = int(line - image * unsigned(g.rows)) * g.step + g.at_y;
        x = int(unsigned(position) - line * unsigned(g.cols)) * g.step + g.at_x;
        pixel = (image * unsigned(g.h) + unsigned(y)) * unsigned(g.w) + unsigned(x);
    }
    // Moves on by n positions.
    __device__ __forceinline__ void advance(const Grid& g, int n) {
        x += n * g.step;
        pixel += unsigned(n * g.step);
        while (x >= g.end_x) {
            x -= g.line_x;
            y += g.step;
            pixel += unsigned(g.line_pixels);
            if (y >= g.end_y) {
                y -= g.image_y;
                pixel += unsigned(g.image_pixels);
            }
        }
    }
};

// A column: a tap and a channel. Beyond the last column u is kNever.
struct Column {
    int u = 0, v = 0, c = 0;
    int shift = 0;  // pixels from the first tap to this one

    // Moves on by n columns. There is at least one column.
    __device__ __forceinline__ void advance(const Grid& g, int n) {
        c += n;
        while (c >= g.c && u < kNever) {
            c -= g.c;
            shift += 1;
            if (++v == g.taps_x) {
                v = 0;
                shift += g.w - g.taps_x;
                if (++u == g.taps_y) u = kNever;
            }
        }
    }
};

// N neighbouring columns that need not belong to one tap.
template <class T, int N> struct Columns {
    int tap[N];     // u * 2^16 + v
    int offset[N];  // elements from the first tap and channel; negative beyond the last column
    int c;          // of the first

    __device__ __forceinline__ Columns(const Grid& g, Column at) : c(at.c) {
#pragma unroll
        for (int e = 0; e < N; ++e) {
            tap[e] = at.u < kNever ? at.u << 16 | at.v : 0;
            offset[e] = at.u < kNever ? at.shift * (g.ld / int(sizeof(T))) + at.c : -1;
            at.advance(g, 1);
        }
    }
    // The elements of the position whose first tap lies on (y, x), at `p`, in an image.
    __device__ __forceinline__ Vec<T, N> load(const Grid& g, const InputNorm<T>& norm, const T* p, int image, int y, int x) const {
        Vec<T, N> out;
#pragma unroll
        for (int e = 0; e < N; ++e) {
            const bool inside = (offset[e] >= 0) & g.inside(y + (tap[e] >> 16), x + (tap[e] & 0xffff));
            out.v[e] = inside ? p[offset[e]] : T{};
            if (inside && norm.present()) out.v[e] = norm.apply(out.v[e], image, (c + e) % g.c);
        }
        return out;
    }
};

// Copies successive tiles of ROWS fixed positions and COLS columns that move on. VECTORS: pixels are whole 16-byte
// pieces, so that a piece belongs to one tap; else elements are copied one by one, and normalised.
template <class T, int ROWS, int COLS, int THREADS, bool VECTORS> class FixedRows {
  public:
    __device__ __forceinline__ FixedRows(const Grid& g, const T* x, const InputNorm<T>& norm, int64_t row) : g_(g), image_(x), norm_(norm), row_(int(row)) {
        const int64_t first = row + my_row();
        Cursor at(g, int(first));
#pragma unroll
        for (int r = 0; r < kEach; ++r) {
            y_[r] = first + r * kAtOnce < g.positions ? at.y : kOutside;
            x_[r] = at.x;
            pixel_[r] = first + r * kAtOnce < g.positions ? int(at.pixel) : 0;
            if (r + 1 < kEach) at.advance(g, kAtOnce);
        }
        column_.advance(g, my_piece() * kWide<T>);
    }

    // Starts the copy of the next tile into `smem`; as TileCopy::start.
    __device__ __forceinline__ void start(unsigned char* smem) {
        if constexpr (VECTORS) {
            const smem_addr to = smem_address(smem);
            const T* const from = image_ + column_.c;
#pragma unroll
            for (int r = 0; r < kEach; ++r)
                cp_async16(to + gemm::swizzled<kPieces>(my_row() + r * kAtOnce, my_piece()), g_.pixels(from, pixel_[r] + column_.shift),
                           g_.inside(y_[r] + column_.u, x_[r] + column_.v));
        } else if (column_.u < kNever) {
            const Columns<T, kWide<T>> columns(g_, column_);
#pragma unroll
            for (int r = 0; r < kEach; ++r)
                put(smem, r, columns.load(g_, norm_, g_.pixels(image_, pixel_[r]), g_.image(row_ + my_row() + r * kAtOnce), y_[r], x_[r]));
        } else {
#pragma unroll
            for (int r = 0; r < kEach; ++r) put(smem, r, Vec<T, kWide<T>>{});
        }
        column_.advance(g_, COLS);
    }

  private:
    static constexpr int kPieces = COLS / kWide<T>, kAtOnce = THREADS / kPieces, kEach = ROWS / kAtOnce;
    static_assert(THREADS % kPieces == 0 && ROWS % kAtOnce == 0, "every thread copies equally much");
    static __device__ __forceinline__ int my_row() { return int(threadIdx.x) / kPieces; }
    static __device__ __forceinline__ int my_piece() { return int(threadIdx.x) % kPieces; }
    static __device__ __forceinline__ void put(unsigned char* smem, int r, const Vec<T, kWide<T>>& v) {
        *reinterpret_cast<Vec<T, kWide<T>>*>(smem + gemm::swizzled<kPieces>(my_row() + r * kAtOnce, my_piece())) = v;
    }

    const Grid& g_;
    const T* image_;
    const InputNorm<T>& norm_;
    int row_;
    int y_[kEach], x_[kEach], pixel_[kEach];
    Column column_;
};

// Copies successive tiles of ROWS positions that move on and COLS fixed columns. VECTORS as above.
template <class T, int ROWS, int COLS, int THREADS, bool VECTORS> class FixedColumns {
  public:
    __device__ __forceinline__ FixedColumns(const Grid& g, const T* x, const InputNorm<T>& norm, int64_t row, int64_t col)
        : g_(g), image_(x), norm_(norm), cursor_(g, int(row + my_row())), left_(int(g.positions - row) - my_row()), column_(column(g, col)), columns_(g, column_) {}

    __device__ __forceinline__ void start(unsigned char* smem) {
        if constexpr (VECTORS) {
#pragma unroll
            for (int r = 0; r < kEach; ++r) {
                cp_async16(smem_address(smem) + place(r), g_.pixels(image_ + column_.c, int(cursor_.pixel + unsigned(column_.shift))),
                           g_.inside(y() + column_.u, cursor_.x + column_.v));
                advance();
            }
        } else {
#pragma unroll
            for (int r = 0; r < kEach; ++r) {
                *reinterpret_cast<Vec<T, kWide<T>>*>(smem + place(r)) =
                    columns_.load(g_, norm_, g_.pixels(image_, int(cursor_.pixel)), g_.image(g_.positions - left_), y(), cursor_.x);
                advance();
            }
        }
    }

  private:
    static constexpr int kPieces = COLS / kWide<T>, kAtOnce = THREADS / kPieces, kEach = ROWS / kAtOnce;
    static_assert(THREADS % kPieces == 0 && ROWS % kAtOnce == 0, "every thread copies equally much");
    static __device__ __forceinline__ int my_row() { return int(threadIdx.x) / kPieces; }
    static __device__ __forceinline__ int my_piece() { return int(threadIdx.x) % kPieces; }
    static __device__ __forceinline__ int place(int r) { return gemm::swizzled<kPieces>(my_row() + r * kAtOnce, my_piece()); }
    __device__ __forceinline__ int y() const { return left_ > 0 ? cursor_.y : kOutside; }
    __device__ __forceinline__ void advance() {
        cursor_.advance(g_, kAtOnce);
        left_ -= kAtOnce;
    }
    static __device__ __forceinline__ Column column(const Grid& g, int64_t col) {
        Column c;
        c.advance(g, int(col) + my_piece() * kWide<T>);
        return c;
    }

    const Grid& g_;
    const T* image_;
    const InputNorm<T>& norm_;
    Cursor cursor_;
    int left_;
    Column column_;
    Columns<T, VECTORS ? 1 : kWide<T>> columns_;
};

// gemm::pipeline for stages that are changed in shared memory before they are multiplied: the block calls `prepare(step,
// stage)` for each.
template <class Tile, class Fill, class Prepare>
__device__ __forceinline__ void prepared_pipeline(gemm::Acc<Tile>& acc, int64_t steps, Fill&& fill, Prepare&& prepare, unsigned char* smem) {
    constexpr int kStage = Tile::kBytesA + Tile::kBytesB;
    __syncthreads();  // the block no longer reads the previous contents of smem
#pragma unroll 1
    for (int s = 0; s < Tile::kStages - 1; ++s) fill(s);
    int here = 0;
#pragma unroll 1
    for (int64_t s = 0; s < steps; ++s) {
        cp_async_wait<Tile::kStages - 2>();
        __syncthreads();  // this stage has arrived for all threads; all threads are done with the one before
        fill(here == 0 ? Tile::kStages - 1 : here - 1);
        unsigned char* const stage = smem + here * kStage;
        prepare(s, stage);
        __syncthreads();  // the stage is prepared
        if constexpr (sizeof(typename Tile::Type) == 2) {
#pragma unroll
            for (int k = 0; k < Tile::kDepth; k += 16) {
                gemm::Fragments<Tile> f;
                f.load(smem_address(stage), smem_address(stage + Tile::kBytesA), k);
                gemm::multiply(acc, f);
            }
        } else {
            const auto* const a = reinterpret_cast<const typename Tile::Type*>(stage);
            gemm::multiply(acc, a, a + Tile::kBytesA / int(sizeof(*a)));
        }
        here = here + 1 == Tile::kStages ? 0 : here + 1;
    }
    cp_async_wait<0>();  // for the stages that are not used
}

// ---- host ------------------------------------------------------------------------------------------------

// The size of a kernel and where it lies at the first position.
struct Taps {
    int64_t y, x, step, at_y, at_x;
};

// The grid of `rows` x `cols` positions over the images `x`, which `fits` accepted.
inline Grid grid_of(const ett_view& x, int64_t rows, int64_t cols, const Taps& t) {
    Grid g{};
    g.h = int(x.dims[1]), g.w = int(x.dims[2]), g.c = int(x.dims[3]), g.ld = int(stride(x) * dtype_size(x.dtype));
    g.rows = int(rows), g.cols = int(cols), g.positions = int(x.dims[0] * rows * cols);
    g.taps_y = int(t.y), g.taps_x = int(t.x), g.step = int(t.step), g.at_y = int(t.at_y), g.at_x = int(t.at_x);
    g.line_x = g.cols * g.step, g.image_y = g.rows * g.step;
    g.end_x = g.at_x + g.line_x, g.end_y = g.at_y + g.image_y;
    g.line_pixels = int(t.step * g.w - g.line_x), g.image_pixels = int(int64_t(g.h) * g.w - int64_t(g.image_y) * g.w);
    return g;
}

// True if all numbers of such a grid, with one more tile of positions, can be counted in 32 bits.
inline bool fits(const ett_view& x, int64_t rows, int64_t cols, const Taps& t) {
    const int64_t small[] = {x.dims[0], x.dims[1], x.dims[2], x.dims[3], rows, cols, t.y, t.x, t.step, std::abs(t.at_y), std::abs(t.at_x)};
    for (const int64_t n : small)
        if (n >= kReach) return false;
    const int64_t reach_y = (rows + 32) * t.step + t.y + std::abs(t.at_y), reach_x = (cols + 512) * t.step + t.x + std::abs(t.at_x);
    if (reach_y >= kReach || reach_x >= kReach || t.y >= kMostSide || t.x >= kMostSide) return false;
    const int64_t lines = x.dims[0] * x.dims[1] + 2 * reach_y, most = int64_t(1) << 31;
    return lines < most && lines * std::max<int64_t>(x.dims[2], 1) + reach_x < most && x.dims[0] * rows < most &&
           x.dims[0] * rows * cols < most - 512 && stride(x) * dtype_size(x.dtype) < most && (t.y * x.dims[2] + t.x) * stride(x) < most;
}

// x [B, H, W, C], w [O, kh, kw, C] of type `w_type` and y [B, H', W', O] are images of a convolution that these kernels
// can count.
struct Named {
    const char* name;
    const ett_view& v;
};
inline bool check_shapes(Check& check, const Named& x, const Named& w, int32_t w_type, const Named& y, int64_t step, int64_t top, int64_t left) {
    if (!check.ok() || !check.act(x.name, x.v) || !check.image(x.name, x.v) || !check.type(w.name, w.v, w_type) || !check.image(w.name, w.v) ||
        !check.type(y.name, y.v, x.v.dtype) || !check.image(y.name, y.v))
        return false;
    const int64_t *xd = x.v.dims, *wd = w.v.dims, *yd = y.v.dims;
    if (!check.matrix(w.name, w.v, w_type, wd[0] * wd[1] * wd[2], xd[3])) return false;
    if (yd[0] != xd[0] || yd[3] != wd[0]) {
        char got[96], want[96];
        snprintf(got, sizeof got, "%lld images of %lld channels", (long long)yd[0], (long long)yd[3]);
        snprintf(want, sizeof want, "%lld images of %lld channels", (long long)xd[0], (long long)wd[0]);
        return check.require(false, y.name, got, want);
    }
    if (!check.range("stride", step, 1, kReach) || !check.range("pad_top", top, 0, kReach) || !check.range("pad_left", left, 0, kReach)) return false;
    // Both ways: positions of y over x, and pixels of x over y.
    const bool counted = fits(x.v, yd[1], yd[2], {wd[1], wd[2], step, top, left}) && fits(y.v, xd[1], xd[2], {wd[1], wd[2], 1, top + wd[1], left + wd[2]});
    if (!check.require(counted, x.name, "too large for coordinates of 28 bits and pixels of 31 bits", "a smaller batch, kernel or padding")) return false;
    // Blocks are counted in 31 bits: tiles of 64 positions and of 32 channels or columns, regions of 9 x 9 positions, four
    // phases at a time.
    const int64_t h_most = std::max(xd[1], yd[1]), w_most = std::max(xd[2], yd[2]), channels = std::max(xd[3], wd[0]), taps = wd[1] * wd[2];
    const int64_t tiles = channels / 32 + 1, most = int64_t(1) << 29;
    return check.require((xd[0] * h_most * w_most / 64 + 1) * tiles < most && xd[0] * (h_most / 9 + 1) * (w_most / 9 + 1) < most, x.name, "more than 2^29 tiles", "fewer") &&
           check.require(rows(w.v) < int64_t(1) << 31 && taps * channels < int64_t(1) << 31 && tiles * (taps * channels / 32 + taps) < most, w.name,
                         "more than 2^29 tiles", "fewer");
}

}  // namespace conv
}  // namespace ett
