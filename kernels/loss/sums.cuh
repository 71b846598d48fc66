// sums.cuh: losses that are sums over all elements. The grid strides over a matrix in pieces of N elements and sums the
// terms of an operation `Op`, an aggregate with
//   using In;                        the inputs of a piece, in registers
//   In load(Place) const;            only loads
//   float term(const In&) const;     the piece's term of the sum
// Each thread sums its pieces in order, a block its threads, a last block the blocks: the order depends only on shapes
// and the number of multiprocessors. One thread then passes the sums to a second aggregate, `Finish`, with
//   void finish(const float (&sums)[S]) const;
#pragma once

#include "activation.cuh"
#include "reduce.cuh"
#include "walk.cuh"

namespace ett {

inline constexpr int kSumThreads = 256;
inline constexpr int kSumTogether = 4;  // pieces that a thread loads at once
inline constexpr int kSumBlocks = 16;   // per multiprocessor: several times the resident ones

template <int N, class Op>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(const __grid_constant__ Op op, const __grid_constant__ Walk w, float* partials) {
    __shared__ float smem[kSumThreads / kWarp];
    const int64_t first = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
    int64_t row = first / w.pieces, piece = first - row * w.pieces;
    float sum[1] = {0.f};
    while (row < w.rows) {
        typename Op::In in[kSumTogether];
        bool is[kSumTogether];
#pragma unroll
        for (int i = 0; i < kSumTogether; ++i) {
            is[i] = row < w.rows;
            if (is[i]) in[i] = op.load(Place{row, piece * N});
            row += w.step_rows;
            piece += w.step_pieces;
            if (piece >= w.pieces) {
                piece -= w.pieces;
                row += 1;
            }
        }
#pragma unroll
        for (int i = 0; i < kSumTogether; ++i)
            if (is[i]) sum[0] += op.term(in[i]);
    }
    block_sum<1, kSumThreads>(sum, smem);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum[0];
}

// The partial sums of S sums, one after the other; sum s has blocks[s] of them.
template <int S> struct Partial {
    const float* partials;
    int blocks[S];
};

template <int S, class Finish>
__global__ void __launch_bounds__(kSumThreads) finish_kernel(const __grid_constant__ Partial<S> a, const __grid_constant__ Finish f) {
    __shared__ float smem[S * kSumThreads / kWarp];
    float sums[S] = {};
    const float* p = a.partials;
#pragma unroll
    for (int s = 0; s < S; ++s) {
        for (int b = int(threadIdx.x); b < a.blocks[s]; b += kSumThreads) sums[s] += p[b];
        p += a.blocks[s];
    }
    block_sum<S, kSumThreads>(sums, smem);
    if (threadIdx.x == 0) f.finish(sums);
}

// loss += scale * factor * (the total of the S sums).
template <int S> struct AddLoss {
    float* loss;
    const float* scale;
    float factor;

    __device__ void finish(const float (&sums)[S]) const {
        float all = sums[0];
#pragma unroll
        for (int s = 1; s < S; ++s) all += sums[s];
        loss[0] += scale[0] * factor * all;
    }
};

// Blocks of a sum over an extent in pieces of n.
inline int64_t sum_blocks(const Extent& e, int n) {
    return std::min(ceil_div(e.rows * (e.cols / n), kSumThreads * kSumTogether), int64_t(multiprocessors()) * kSumBlocks);
}
// Bytes of the partial sums of a view, enough for either implementation.
inline int64_t sum_bytes(const ett_view& v) {
    return std::min(ceil_div(numel(v), kSumThreads), int64_t(multiprocessors()) * kSumBlocks) * int64_t(sizeof(float));
}

template <int N, class Op> int32_t launch_sum(const char* op, const ett_launch* l, const Extent& e, const Op& what, float* partials) {
    const int64_t pieces = e.cols / N, blocks = sum_blocks(e, N), step = blocks * kSumThreads;
    if (blocks == 0) return ETT_OK;
    const Walk w{e.rows, pieces, step / pieces, step % pieces};
    return launch(op, sum_kernel<N, Op>, dim3(unsigned(blocks)), dim3(kSumThreads), 0, l, what, w, partials);
}

template <int S, class Finish>
int32_t launch_finish(const char* op, const ett_launch* l, const float* partials, const int64_t (&blocks)[S], const Finish& f) {
    Partial<S> p{partials, {}};
    for (int s = 0; s < S; ++s) p.blocks[s] = int(blocks[s]);
    return launch(op, finish_kernel<S, Finish>, dim3(1), dim3(kSumThreads), 0, l, p, f);
}

// Launches one sum over a non-empty extent: "wide", in pieces of N elements, if they cover the views, else "plain".
// `make(n)` returns the operation for pieces of n, a std::integral_constant.
template <int N, class Make>
int32_t sum_loss(Check& check, const char* op, const ett_launch* l, const Extent& e, Views views, const AddLoss<1>& add, Make make) {
    const char* kernel = check.choose(l, {{"wide", covers(e, N, views)}, {"plain", true}});
    if (!check.ok()) return check.status();
    float* partials = static_cast<float*>(l->workspace);
    auto go = [&](auto n) {
        const int32_t status = launch_sum<n>(op, l, e, make(n), partials);
        return status == ETT_OK ? launch_finish<1>(op, l, partials, {sum_blocks(e, n)}, add) : status;
    };
    const int32_t status =
        strcmp(kernel, "wide") == 0 ? go(std::integral_constant<int, N>{}) : go(std::integral_constant<int, 1>{});
    return status == ETT_OK ? ett_done(kernel) : status;
}

}  // namespace ett
