// linear_xent.cuh: what the forward and the backward of linear_xent share: the supervised rows, packed.
//
// Only the device knows how many rows are supervised. The host launches enough blocks for all rows; the kernels read
// the count and distribute the supervised rows over their blocks.
#pragma once

#include "activation.cuh"
#include "gemm.cuh"
#include "pieces.cuh"
#include "reduce.cuh"

namespace ett {
namespace xent {

// 64 x 64 (f32: 64 x 32) products per warp, as in matmul.cu.
template <class T, bool TA, bool TB> struct Tiles;
template <bool TA, bool TB> struct Tiles<bf16, TA, TB> {
    using Type = gemm::Tile<bf16, 128, 128, 32, 64, 64, 4, TA, TB>;
};
template <bool TA, bool TB> struct Tiles<float, TA, TB> {
    using Type = gemm::Tile<float, 128, 64, 16, 64, 32, 3, TA, TB>;
};
// x w^T.
template <class T> using Logits = typename Tiles<T, false, true>::Type;

// The supervised rows: their indices in the batch, in ascending order, and their targets.
struct Rows {
    int* count;
    int* at;
    int* target;
};

constexpr int kSelectThreads = 1024;

// Finds the supervised rows, with one block. `index` receives the position of each row of the batch among them, or -1;
// `lse` receives 0 in the unsupervised rows; either may be null. A target outside the vocabulary is a fault, and its
// row counts as unsupervised.
static __global__ void __launch_bounds__(kSelectThreads)
select_kernel(const int32_t* target, int64_t n, int64_t v, const Rows to, int* index, float* lse, const Fault fault) {
    __shared__ int smem_found[kSelectThreads / kWarp];
    const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
    int count = 0;
    for (int64_t base = 0; base < n; base += kSelectThreads) {
        const int64_t i = base + threadIdx.x;
        int t = i < n ? target[i] : -1;
        if (t >= v) {
            report_index(fault, i, t, v);
            t = -1;
        }
        const unsigned found = __ballot_sync(kAllLanes, t >= 0);
        if (lane == 0) smem_found[warp] = __popc(found);
        __syncthreads();  // all warps have counted
        int before = count + __popc(found & ((1u << lane) - 1));
        for (int w = 0; w < kSelectThreads / kWarp; ++w) {
            before += w < warp ? smem_found[w] : 0;
            count += smem_found[w];
        }
        if (t >= 0) {
            to.at[before] = int(i);
            to.target[before] = t;
        }
        if (i < n && index) index[i] = t >= 0 ? before : -1;
        if (i < n && lse && t < 0) lse[i] = 0.f;
        __syncthreads();  // the counts have been read and may be overwritten
    }
    if (threadIdx.x == 0) *to.count = count;
}

constexpr int kPackThreads = 256;

// packed[i] = x[rows.at[i]], N elements at a time.
template <class T, int N>
__global__ void __launch_bounds__(kPackThreads)
pack_kernel(const T* x, int64_t ldx, const Rows rows, T* packed, int64_t ld, int64_t pieces) {
    const int64_t total = int64_t(*rows.count) * pieces;
    for (int64_t i = int64_t(blockIdx.x) * kPackThreads + threadIdx.x; i < total; i += int64_t(gridDim.x) * kPackThreads) {
        const int64_t row = i / pieces, at = (i - row * pieces) * N;
        store_vec<N>(packed + row * ld + at, load_vec<N>(x + int64_t(rows.at[row]) * ldx + at));
    }
}

// ---- host ------------------------------------------------------------------------------------------------

// The supervised rows and their x, packed so that rows begin at multiples of 16 bytes.
template <class T> struct Packed {
    Rows rows;
    T* x;
    int64_t n, ld, cols;

    Packed(Pieces& p, int64_t rows_of_x, int64_t cols_of_x)
        : rows{p.take<int>(1), p.take<int>(rows_of_x), p.take<int>(rows_of_x)},
          x(nullptr),
          n(rows_of_x),
          ld(round_up(cols_of_x, kWide<T>)),
          cols(cols_of_x) {
        x = p.take<T>(n * ld);
    }
    // Has the largest possible number of rows; kernels replace it by the actual count.
    gemm::Matrix<T> matrix() const { return {x, n, cols, ld, ld == cols}; }
};

// Checks the types of x, w, target, scale and lse, and that their shapes match.
template <class A> bool check_shapes(Check& check, const A& a) {
    if (!check.act("x", a.x) || !check.matrix("w", a.w, a.x.dtype, rows(a.w), cols(a.x)) ||
        !check.vector("target", a.target, ETT_I32, rows(a.x)) || !check.vector("scale", a.scale, ETT_F32, 1) ||
        !check.vector("lse", a.lse, ETT_F32, rows(a.x)))
        return false;
    // The kernels count tiles of 128 x 64 in 32 bits, 16 times those of dx.
    return check.range("x", rows(a.x), 0, 1 << 30) && check.range("w", rows(a.w), 0, 1 << 30) &&
           check.range("x", ceil_div(std::max(rows(a.x), rows(a.w)), 128) * ceil_div(cols(a.x), 64), 0, (1 << 30) / 16);
}

// Blocks of a kernel that distributes `items` over its blocks: at most `per_multiprocessor` per multiprocessor.
inline dim3 blocks_for(int64_t items, int per_multiprocessor) {
    return dim3(unsigned(std::max<int64_t>(1, std::min(items, int64_t(multiprocessors()) * per_multiprocessor))));
}

// Enqueues the selection and packing of the supervised rows.
template <class T, class A>
int32_t pack(const char* op, const A& a, const Packed<T>& to, int* index, float* lse, const ett_launch* l) {
    const int32_t status = launch(op, select_kernel, dim3(1), dim3(kSelectThreads), 0, l, data<const int32_t>(a.target), to.n, rows(a.w),
                                  to.rows, index, lse, fault_of(l));
    if (status != ETT_OK || to.n * to.cols == 0) return status;
    auto go = [&](auto* kernel, int n) {
        const int64_t pieces = to.cols / n;
        return launch(op, kernel, blocks_for(ceil_div(to.n * pieces, kPackThreads), 8), dim3(kPackThreads), 0, l, data<const T>(a.x), stride(a.x),
                      to.rows, to.x, to.ld, pieces);
    };
    return wide(a.x) ? go(pack_kernel<T, kWide<T>>, kWide<T>) : go(pack_kernel<T, 1>, 1);
}

}  // namespace xent
}  // namespace ett
