// rows.cuh: kernels over the rows of a matrix that hold a row in the registers of a team of threads.
//
// A row is divided into pieces of 16 bytes; thread x of a team of `threads` holds the VECS pieces x, x + threads, ...
// A team is a warp (then a block has several, which do not wait for each other) or a block. The grid has as many blocks
// as are resident at once and strides over the rows. While a thread computes, its pieces of the next rows are copied to
// shared memory (cp.async). Each thread reads only what it copied itself, so that this needs no barrier.
#pragma once

#include "matrix.cuh"
#include "reduce.cuh"

namespace ett {

inline constexpr int kAhead = 4;          // pieces of each input that a thread has in flight
inline constexpr int kTeamThreads = 512;  // maximum per team
inline constexpr int kTeamWarps = kTeamThreads / kWarp;
inline constexpr int kWarpTeams = 4;      // teams per block if a team is a warp

// How rows are distributed over threads; all 0 if a row is too wide or shorter than a piece.
struct RowsConfig {
    int vecs;     // pieces per thread
    int threads;  // per team
    int teams;    // per block
};

// Few threads with many pieces each (at most `most`: 4, or 2 where registers are short) make the sum over a row
// cheapest; but at most one thread in eight should be idle.
inline RowsConfig choose_rows_config(int64_t pieces, int most = kAhead) {
    RowsConfig best{};
    for (int vecs = most; vecs > 0 && pieces > 0; vecs /= 2) {
        const int64_t threads = round_up(ceil_div(pieces, vecs), kWarp), held = int64_t(best.threads) * best.vecs;
        if (threads > kTeamThreads || (held > 0 && (pieces * 8 >= held * 7 || threads * vecs >= held))) continue;
        best = {vecs, int(threads), threads == kWarp ? kWarpTeams : 1};
    }
    return best;
}

// Blocks for n rows if `resident` threads fit a multiprocessor.
inline int64_t rows_blocks(const RowsConfig& c, int64_t n, int resident, int multiprocessors) {
    return std::min(ceil_div(n, c.teams), int64_t(multiprocessors) * std::max(1, resident / (c.threads * c.teams)));
}

// Shared memory of a block that reads `inputs` matrices.
inline size_t rows_smem(const RowsConfig& c, int inputs) { return size_t(c.threads) * size_t(c.teams * inputs * kAhead) * 16; }

// Calls f with the number of pieces per thread, at most MOST, as a std::integral_constant.
template <int MOST = kAhead, class F> int32_t with_vecs(const RowsConfig& c, F f) {
    static_assert(MOST == 4 || MOST == 2, "the cases below");
    switch (c.vecs) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    default: return f(std::integral_constant<int, MOST>{});
    }
}

// Iterates over the rows of a team. Inputs at the end of `in` may be absent.
template <class T, int VECS, int INPUTS> class Rows {
  public:
    static constexpr int N = kWide<T>;
    static constexpr int kStages = kAhead / VECS;  // rows in flight
    using Piece = Vec<T, N>;

    // `c` columns are whole pieces.
    __device__ __forceinline__ Rows(unsigned char* smem, const Matrix<const T> (&in)[INPUTS], int64_t n, int64_t c)
        : in_(in), n_(n), cols_(unsigned(c)) {
        int inputs = 0;
#pragma unroll
        for (int i = 0; i < INPUTS; ++i) inputs += in[i].ptr != nullptr;
        smem_ = smem + 16 * (threadIdx.y * unsigned(inputs * kAhead) * blockDim.x + threadIdx.x);
        row_ = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
        step_ = gridDim.x * blockDim.y;
#pragma unroll
        for (int s = 0; s < kStages; ++s) start(row_ + int64_t(s) * step_, s);
    }

    // The current row, the next one, and whether there is a current row.
    __device__ __forceinline__ int64_t row() const { return row_; }
    __device__ __forceinline__ int64_t next() const { return row_ + step_; }
    __device__ __forceinline__ bool more() const { return row_ < n_; }

    // Whether piece v of this thread is inside the row, and its first column.
    __device__ __forceinline__ bool holds(int v) const { return column(v) < cols_; }
    __device__ __forceinline__ unsigned column(int v) const { return (unsigned(v) * blockDim.x + threadIdx.x) * N; }

    // Waits for the copy of the current row.
    __device__ __forceinline__ void wait() const { cp_async_wait<kStages - 1>(); }

    // This thread's pieces of the current row of input i; zeros past the end of the row.
    __device__ __forceinline__ void take(int i, Piece (&out)[VECS]) const {
#pragma unroll
        for (int v = 0; v < VECS; ++v) out[v] = load_vec<N>(reinterpret_cast<const T*>(smem_ + offset(i, stage_, v)));
    }

    // Starts the copy of a later row into the stage of the current row, whose pieces have all been taken.
    __device__ __forceinline__ void refill() { start(row_ + int64_t(kStages) * step_, stage_); }

    // Goes on to the next row.
    __device__ __forceinline__ void advance() {
        row_ += step_;
        stage_ = stage_ + 1 == kStages ? 0 : stage_ + 1;
    }

  private:
    __device__ __forceinline__ unsigned offset(int i, int stage, int v) const {
        return 16 * unsigned(i * kAhead + stage * VECS + v) * blockDim.x;
    }
    __device__ __forceinline__ void start(int64_t row, int stage) const {
        if (row < n_) {
#pragma unroll
            for (int i = 0; i < INPUTS; ++i) {
                if (!in_[i].ptr) continue;
                const T* from = in_[i].row(row);
#pragma unroll
                for (int v = 0; v < VECS; ++v)
                    cp_async16(smem_address(smem_ + offset(i, stage, v)), holds(v) ? from + column(v) : from, holds(v));
            }
        }
        cp_async_commit();
    }

    const Matrix<const T> (&in_)[INPUTS];
    int64_t n_, row_;
    unsigned cols_, step_;
    unsigned char* smem_;
    int stage_ = 0;
};

// Sums N values over a team; every thread gets the sums. Consecutive calls need different `smem`; two buffers in turn
// are enough, since the barrier of the next call separates the reads of this call from the writes of the one after it.
template <int N> __device__ __forceinline__ void team_sum(float (&v)[N], float (&smem)[N][kTeamWarps]) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = warp_sum(v[i]);
    const int warps = int(blockDim.x) / kWarp;
    if (warps > 1) {
        if (threadIdx.x % kWarp == 0) {
#pragma unroll
            for (int i = 0; i < N; ++i) smem[i][threadIdx.x / kWarp] = v[i];
        }
        __syncthreads();  // the warps' sums are visible
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = 0.f;
        for (int w = 0; w < warps; ++w) {
#pragma unroll
            for (int i = 0; i < N; ++i) v[i] += smem[i][w];
        }
    }
}

// Adds the column sums of a block's teams, team after team; the last team gets the total. `smem` holds VECS * N * 32
// floats. All threads of the block call this, with no copies in flight.
template <int VECS, int N> __device__ __forceinline__ void join_teams(float (&sums)[VECS][N], float* smem) {
    if (blockDim.y == 1) return;
    for (unsigned t = 0; t < blockDim.y; ++t) {
        __syncthreads();  // first: the previous contents of smem are no longer read; later: the sums so far are visible
        if (threadIdx.y != t) continue;
#pragma unroll
        for (int v = 0; v < VECS; ++v)
#pragma unroll
            for (int j = 0; j < N; ++j) {
                float& total = smem[(v * N + j) * kWarp + int(threadIdx.x)];
                if (t > 0) sums[v][j] += total;
                total = sums[v][j];
            }
    }
}

// Writes the block's column sums to `partials`, the block's part of the partial sums [blocks, OUTS, c].
template <class T, int VECS, int INPUTS, int N>
__device__ __forceinline__ void write_partials(const Rows<T, VECS, INPUTS>& rows, const float (&sums)[VECS][N], float* partials) {
    if (threadIdx.y + 1 != blockDim.y) return;
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
        if (!rows.holds(v)) continue;
#pragma unroll
        for (int j = 0; j < N; j += 4) {
            const float four[4] = {sums[v][j], sums[v][j + 1], sums[v][j + 2], sums[v][j + 3]};
            store_global(partials + rows.column(v) + j, four);
        }
    }
}

// Partial sums of columns: out[o][c] += sum over blocks of partials[block][o][c], if out[o] is present.
struct Partials {
    const float* partials;
    int64_t blocks, outs, cols;
    float* out[2];
};

// A block has 32 columns; each of its 32 warps sums every 32nd row in order, then the warps' sums are added in order.
__global__ void __launch_bounds__(1024) static sum_partials_kernel(const __grid_constant__ Partials a) {
    __shared__ float smem[kWarp][kWarp];
    const int64_t col = int64_t(blockIdx.x) * kWarp + threadIdx.x;
    float sum = 0.f;
    if (col < a.cols) {
        const float* p = a.partials + int64_t(blockIdx.y) * a.cols + col;
#pragma unroll 8
        for (int64_t b = threadIdx.y; b < a.blocks; b += kWarp) sum += p[b * a.outs * a.cols];
    }
    smem[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();  // the warps' sums are visible
    float* out = a.out[blockIdx.y];
    if (threadIdx.y == 0 && col < a.cols && out) {
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < kWarp; ++w) total += smem[w][threadIdx.x];
        out[col] += total;
    }
}

inline int32_t launch_sum_partials(const char* op, const Partials& p, const ett_launch* l) {
    const dim3 grid(unsigned(ceil_div(p.cols, kWarp)), unsigned(p.outs));
    return launch(op, sum_partials_kernel, grid, dim3(kWarp, kWarp), 0, l, p);
}

// Threads and blocks of the "plain" kernels, which accept any row and process it element by element, one block per row.
inline int plain_threads(int64_t c) { return int(std::min<int64_t>(round_up(c, kWarp), 256)); }
inline int64_t plain_blocks(int64_t n, int multiprocessors) { return std::min(n, int64_t(multiprocessors) * 8); }

}  // namespace ett
