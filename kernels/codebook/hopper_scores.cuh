// hopper_scores.cuh: what the Hopper forms of the IBQ sweeps share: 128 rows of one operand stay in a block, tiles of the
// other stream through it, and two warpgroups of 64 rows each multiply them.
//
// Scores are those of wgmma, whose bits do not depend on the tile, on which operand is a, and on where it lies; every
// sweep of a Hopper device gets the same.
#pragma once

#include "hopper.cuh"
#include "operands.cuh"

namespace ett {
namespace codebook {

#ifdef ETT_SHIM
inline bool hopper_fits(const ett_view&, const ett_view&) { return false; }
inline bool hopper_planned(const ett_view&, const ett_view&) { return false; }
#else
using namespace hopper;

inline constexpr int kSweepRows = 128;                                  // of the operand that stays
inline constexpr int kConsumers = 2 * kWarpgroup, kSweepThreads = 3 * kWarpgroup;  // the third warpgroup copies
inline constexpr int kSide = 64;  // rows of a streamed tile where tiles have 64; of a tile with or without weight

// Whether the scores of z and e are computed by wgmma, in all sweeps alike; and whether a workspace query counts that.
inline bool hopper_shape(const ett_view& z, const ett_view& e) {
    return z.dtype == ETT_BF16 && wide(z) && wide(e) && cols(z) > 0 && cols(z) <= 256;
}
inline bool hopper_fits(const ett_view& z, const ett_view& e) { return hopper_shape(z, e) && is_hopper(); }
inline bool hopper_planned(const ett_view& z, const ett_view& e) { return hopper_shape(z, e) && plan_hopper(); }
// Panels that hold d columns: 1, 2 or 4, the numbers that kernels are compiled for.
inline int panels_of(int64_t d) { return d <= 64 ? 1 : d <= 128 ? 2 : 4; }
template <class F> int32_t with_panels(int64_t d, F f) {
    switch (panels_of(d)) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    default: return f(std::integral_constant<int, 4>{});
    }
}

// A matrix of which tiles are copied as panels, by one copy per tile if its columns are whole panels.
struct Tiles {
    CUtensorMap map;
    int whole;
};
inline int32_t make_tiles(const char* op, Tiles* t, const void* p, int64_t rows, int64_t d, int64_t ld, int tile_rows) {
    const int panels = panels_of(d);
    t->whole = d == panels * kPanelCols && panels * tile_rows <= 256;
    return t->whole ? make_panels_map(op, &t->map, p, rows, d, ld, uint32_t(tile_rows), uint32_t(panels))
                    : make_panel_map(op, &t->map, p, rows, d, ld, uint32_t(tile_rows));
}

// Starts the copy of ROWS rows from row `row` on; PANELS * ROWS * 128 bytes arrive at `bar`.
template <int PANELS, int ROWS> __device__ __forceinline__ void load_tile(uint32_t to, const Tiles& t, uint32_t bar, int row) {
    if (t.whole) {
        tma_load(to, &t.map, bar, 0, row, 0);
    } else {
#pragma unroll
        for (int p = 0; p < PANELS; ++p) tma_load(to + p * ROWS * kPanelRowBytes, &t.map, bar, p * kPanelCols, row);
    }
}

// The fragments of the thread's warpgroup: rows row0 to row0 + 63 of a matrix, zeros past its last row and column.
template <int PANELS> __device__ __forceinline__ void load_fragments(uint32_t (&a)[PANELS * 4][4], const gemm::Matrix<bf16>& m, int64_t row0) {
#pragma unroll
    for (int k = 0; k < PANELS * 4; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64_t row = row0 + acc_row(i % 2);
            const int col = k * 16 + acc_col(0) + i / 2 * 8;
            a[k][i] = row < m.rows && col < m.cols ? *reinterpret_cast<const uint32_t*>(m.p + row * m.ld + col) : 0u;
        }
}

// d = a b^T for a tile b of N rows.
template <int PANELS, int N> __device__ __forceinline__ void multiply(float (&d)[N / 2], const uint32_t (&a)[PANELS * 4][4], uint32_t b) {
#pragma unroll
    for (int k = 0; k < PANELS * 4; ++k) mma<N, false>(d, a[k], k_major(b) + step(k % 4 * 32 + k / 4 * N * kPanelRowBytes), k > 0);
}
// The same with 64 rows of a in shared memory; a panel of a has A_ROWS rows.
template <int PANELS, int N, int A_ROWS> __device__ __forceinline__ void multiply(float (&d)[N / 2], uint32_t a, uint32_t b) {
#pragma unroll
    for (int k = 0; k < PANELS * 4; ++k)
        mma<N, false, false>(d, k_major(a) + step(k % 4 * 32 + k / 4 * A_ROWS * kPanelRowBytes),
                             k_major(b) + step(k % 4 * 32 + k / 4 * N * kPanelRowBytes), k > 0);
}

// The number of tiles [first, end) whose mark or whose neighbour's is set; `step`: from the mark of one tile to the next,
// `other`: to the neighbour's. The whole block calls this.
__device__ __forceinline__ int count_live(const uint8_t* live, int64_t step, int64_t other, const Consecutive& range) {
    int n = 0;
    for (int base = range.first; base < range.end; base += kSweepThreads) {
        const int t = base + int(threadIdx.x);
        n += __syncthreads_count(t < range.end && (live[t * step] | live[t * step + other]) != 0);
    }
    return n;
}
// Calls f(t) for each of these tiles in order; one warp calls this.
template <class F> __device__ __forceinline__ void for_live(const uint8_t* live, int64_t step, int64_t other, const Consecutive& range, F f) {
    for (int base = range.first; base < range.end; base += kWarp) {
        const int t = base + int(threadIdx.x) % kWarp;
        unsigned set = __ballot_sync(kAllLanes, t < range.end && (live[t * step] | live[t * step + other]) != 0);
        for (; set; set &= set - 1) f(base + __ffs(int(set)) - 1);
    }
}

// The accumulators of both warpgroups as a tile of 128 x N, for the code that they share with the portable sweeps.
template <int N> struct WarpgroupTile {
    static constexpr int kRows = kSweepRows, kCols = N, kWarpCols = N, kAccRows = 2, kAccCols = N / 4, kThreads = kConsumers;
    static __device__ __forceinline__ int lane() { return int(threadIdx.x) % kWarp; }
    static __device__ __forceinline__ int row(int i) { return int(threadIdx.x) / kWarpgroup * 64 + acc_row(i); }
    static __device__ __forceinline__ int col(int j) { return j / 2 * 8 + acc_col(j % 2); }
    static __device__ __forceinline__ int warp_col() { return 0; }
};
template <int N> __device__ __forceinline__ void synchronize(WarpgroupTile<N>) { named_barrier(1, kConsumers); }
template <int N> struct WarpgroupAcc {
    float d[N / 2];
    __device__ __forceinline__ float& at(int i, int j) { return d[j / 2 * 4 + 2 * i + j % 2]; }
};
// As for the accumulators of a portable tile: the largest of a thread's scores of row i, NaN if all are.
template <int N> __device__ __forceinline__ float row_max(WarpgroupAcc<N>& acc, int i) {
    float x[N / 4];
#pragma unroll
    for (int j = 0; j < N / 4; ++j) x[j] = acc.at(i, j);
#pragma unroll
    for (int n = 1; n < N / 4; n *= 2)
#pragma unroll
        for (int j = 0; j < N / 4; j += 2 * n) x[j] = fmaxf(x[j], x[j + n]);
    return x[0];
}

// Adds the sums of the lanes that share a row; writes those of the warpgroup's 64 rows, of which `rows` exist.
__device__ __forceinline__ void put_rows(float* out, const float (&sum)[2], int64_t rows) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float total = sum[i];
#pragma unroll
        for (int d = 1; d <= 2; d *= 2) total += __shfl_xor_sync(kAllLanes, total, d);
        if (threadIdx.x % 4 == 0 && acc_row(i) < rows) out[acc_row(i)] = total;
    }
}
#endif  // ETT_SHIM

}  // namespace codebook
}  // namespace ett
