// walk.cuh: element-wise kernels. The grid strides over a matrix in pieces of N elements of a row and applies an
// operation `Op` to each piece. `Op` is an aggregate with
//   using In;                              the inputs of a piece, in registers
//   In load(Place) const;                  only loads
//   void finish(Place, const In&) const;   computes and stores
// A thread loads two pieces before it finishes the first, so that more loads are in flight.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "matrix.cuh"

namespace ett {

inline constexpr int kWalkThreads = 256;
inline constexpr int kWalkTogether = 2;
// Blocks per multiprocessor: several times the resident ones, so that their exact number hardly matters.
inline constexpr int kWalkBlocks = 32;

// A row and the column where a piece begins.
struct Place {
    int64_t row, at;
};

// The pieces of a matrix, and the stride of the grid as rows and pieces, so that a thread divides only once.
struct Walk {
    int64_t rows, pieces, step_rows, step_pieces;
};

template <int N, class Op>
__global__ void __launch_bounds__(kWalkThreads) walk_kernel(const __grid_constant__ Op op, const __grid_constant__ Walk w) {
    const int64_t first = int64_t(blockIdx.x) * kWalkThreads + threadIdx.x;
    int64_t row = first / w.pieces, piece = first - row * w.pieces;
    while (row < w.rows) {
        Place place[kWalkTogether];
        typename Op::In in[kWalkTogether];
#pragma unroll
        for (int i = 0; i < kWalkTogether; ++i) {
            place[i] = {row, piece * N};
            if (row < w.rows) in[i] = op.load(place[i]);
            row += w.step_rows;
            piece += w.step_pieces;
            if (piece >= w.pieces) {
                piece -= w.pieces;
                row += 1;
            }
        }
#pragma unroll
        for (int i = 0; i < kWalkTogether; ++i)
            if (place[i].row < w.rows) op.finish(place[i], in[i]);
    }
}

// Loads N elements without conversion.
template <int N, class T> __device__ __forceinline__ Vec<std::remove_const_t<T>, N> piece(const Matrix<T>& m, Place p) {
    return load_vec<N>(static_cast<const std::remove_const_t<T>*>(m.row(p.row) + p.at));
}
// Rounds and stores N elements.
template <int N, class T> __device__ __forceinline__ void put(const Matrix<T>& m, Place p, const float (&v)[N]) {
    store_global(m.row(p.row) + p.at, v);
}

// The rows and columns that a grid strides over.
struct Extent {
    int64_t rows, cols;
};
using Views = std::initializer_list<const ett_view*>;

// The extent of views of the same shape: a single row if all are contiguous.
inline Extent extent(Views views) {
    const ett_view& first = **views.begin();
    const bool flat = std::all_of(views.begin(), views.end(), [](const ett_view* v) { return contiguous(*v); });
    return flat ? Extent{1, numel(first)} : Extent{rows(first), cols(first)};
}

// True if every row consists of whole pieces of n elements and all pieces are aligned to their size in every view, also in
// those that have other rows than the extent, such as a table that is indexed.
inline bool covers(const Extent& e, int n, Views views) {
    return e.cols % n == 0 && std::all_of(views.begin(), views.end(), [&](const ett_view* v) {
               const bool one_row = rows(*v) == 1 || (e.rows == 1 && contiguous(*v));  // whose stride is not used
               return reinterpret_cast<uintptr_t>(v->ptr) % (n * dtype_size(v->dtype)) == 0 && (one_row || v->ld % n == 0);
           });
}

template <int N, class Op> int32_t launch_walk(const char* op, const ett_launch* l, const char* kernel, const Extent& e, const Op& what) {
    const int64_t pieces = e.cols / N, most = int64_t(multiprocessors()) * kWalkBlocks;
    const int64_t blocks = std::min(ceil_div(e.rows * pieces, kWalkThreads * kWalkTogether), most), step = blocks * kWalkThreads;
    const Walk w{e.rows, pieces, step / pieces, step % pieces};
    const int32_t status = launch(op, walk_kernel<N, Op>, dim3(unsigned(blocks)), dim3(kWalkThreads), 0, l, what, w);
    return status == ETT_OK ? ett_done(kernel) : status;
}

// Launches the operation over a non-empty extent: "wide", in pieces of N elements, if they cover the views, else
// "plain", element by element. `make(n)` returns the operation for pieces of n, a std::integral_constant.
template <int N, class Make>
int32_t walk(Check& check, const char* op, const ett_launch* l, const Extent& e, Views views, Make make) {
    const char* kernel = check.choose(l, {{"wide", covers(e, N, views)}, {"plain", true}});
    if (!check.ok()) return check.status();
    if (strcmp(kernel, "wide") == 0) return launch_walk<N>(op, l, kernel, e, make(std::integral_constant<int, N>{}));
    return launch_walk<1>(op, l, kernel, e, make(std::integral_constant<int, 1>{}));
}

}  // namespace ett
