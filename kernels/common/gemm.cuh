// gemm.cuh: one output tile of a matrix product, accumulated in registers, for all kernels that contain a product.
//
// A kernel chooses a Tile, which fixes type, sizes and transposes, and calls tile_product. Every thread of the block
// then holds its part of  op(a)[row0.., :] op(b)[:, col0..]  in an Acc and processes it further.
//
//     using Tile = gemm::Tile<bf16, 128, 128, 32, 64, 64, 3, false, true>;   // y = x w^T
//     template <class Tile> __global__ void __launch_bounds__(Tile::kThreads)
//     product(gemm::Matrix<typename Tile::Type> a, gemm::Matrix<typename Tile::Type> b, ...) {
//         ETT_DYNAMIC_SMEM(smem);                                            // Tile::kSmem bytes
//         gemm::Acc<Tile> acc;
//         acc.clear();
//         gemm::tile_product(acc, a, b, row0, col0, smem);
//         for i < Tile::kAccRows, j < Tile::kAccCols (both unrolled):
//             acc.at(i, j) belongs to row0 + Tile::row(i), col0 + Tile::col(j)
//     }
//     launch(op, product<Tile>, grid, dim3(Tile::kThreads), Tile::kSmem, l, gemm::matrix<bf16>(view_a), ...);
//
// Which elements a thread holds, for both types, with lane = threadIdx.x % 32:
//     row(i): consecutive i are 8 rows apart; lanes 4g .. 4g+3 of a warp hold the same rows (reduce over the columns
//             of the warp's tile first over j, then by __shfl_xor of 1 and 2).
//     col(j): columns j and j + 1 (j even) are neighbours, the first of them even: they may be stored as a pair.
//     The warp's tile begins at (warp_row(), warp_col()) of the block's; warps with the same warp_row() hold the
//     other columns of the same rows. Elements outside the product are unspecified.
//
// bf16: mma.sync m16n8k16, whose products are exact and summed in f32. f32: fused multiply-adds; no TF32.
// Sums run over the inner dimension in ascending order (for bf16 in pieces of 16, inside which the tensor core
// determines the order), so that a value does not depend on which tile of the same type computes it.
// Operands: row-major, any stride, any size. Those with aligned rows (`wide`) are copied by 16-byte cp.async, the
// others element by element. The pipeline is STAGES deep; rows of shared memory are swizzled in pieces of 16 bytes.
#pragma once

#include "launch.cuh"

namespace ett {
namespace gemm {

// A matrix in memory, before op is applied. `vectors`: all rows are 16-byte aligned and consist of whole 16-byte
// pieces.
template <class T> struct Matrix {
    const T* p;
    int64_t rows, cols, ld;
    bool vectors;
};

template <class T> Matrix<T> matrix(const ett_view& v) { return {data<const T>(v), rows(v), cols(v), stride(v), wide(v)}; }

// Byte offset of 16-byte piece `piece` of row `row` in a tile of shared memory with PIECES pieces per row. Accesses to
// one piece of eight rows, and to whole rows, are free of bank conflicts.
template <int PIECES> __device__ __forceinline__ int swizzled(int row, int piece) {
    static_assert(PIECES == 4 || PIECES % 8 == 0, "rows of 64 bytes or of whole lines of 128 bytes");
    constexpr int kRows = PIECES == 4 ? 2 : 1;  // per line of 128 bytes
    return (row * PIECES + (piece ^ (row / kRows & (PIECES == 4 ? 3 : 7)))) * 16;
}

// Copies successive tiles of ROWS x COLS elements of a matrix by a block of THREADS threads; every thread copies a
// column of pieces of the tile. VECTORS: `vectors` of the matrix is known to be true at compile time.
template <class T, int ROWS, int COLS, int THREADS, bool VECTORS> class TileCopy {
  public:
    // The tile that begins at (row, col).
    __device__ __forceinline__ TileCopy(const Matrix<T>& m, int64_t row, int64_t col)
        : p_(m.p + (row + my_row()) * m.ld + (col + my_piece() * kWide<T>)), ld_(m.ld), rows_(m.rows - row - my_row()),
          cols_(m.cols - col - my_piece() * kWide<T>), vectors_(m.vectors) {}

    // Starts the copy into `smem`, with zeros outside the matrix. The block sees the data after cp_async_commit,
    // cp_async_wait and a barrier.
    __device__ __forceinline__ void start(unsigned char* smem) const {
        const T* from = p_;
        if (VECTORS || vectors_) {
            const smem_addr to = smem_address(smem);
            const int rest = cols_ > 0 ? int(min(rows_, int64_t(ROWS))) : 0;
#pragma unroll
            for (int r = 0; r < ROWS; r += kAtOnce) {
                cp_async16(to + swizzled<kPieces>(my_row() + r, my_piece()), from, r < rest);
                from += kAtOnce * ld_;
            }
        } else {
#pragma unroll 1
            for (int r = 0; r < ROWS; r += kAtOnce) {
                Vec<T, kWide<T>> v;
#pragma unroll
                for (int e = 0; e < kWide<T>; ++e) v.v[e] = r < rows_ && e < cols_ ? from[e] : T{};
                *reinterpret_cast<Vec<T, kWide<T>>*>(smem + swizzled<kPieces>(my_row() + r, my_piece())) = v;
                from += kAtOnce * ld_;
            }
        }
    }

    // Moves on to the tile that begins n rows or columns further.
    __device__ __forceinline__ void advance_rows(int n) { p_ += n * ld_, rows_ -= n; }
    __device__ __forceinline__ void advance_cols(int n) { p_ += n, cols_ -= n; }

  private:
    static constexpr int kPieces = COLS / kWide<T>, kAtOnce = THREADS / kPieces;
    static_assert(THREADS % kPieces == 0 && ROWS % kAtOnce == 0, "every thread copies equally much");
    static __device__ __forceinline__ int my_row() { return int(threadIdx.x) / kPieces; }
    static __device__ __forceinline__ int my_piece() { return int(threadIdx.x) % kPieces; }

    const T* p_;  // this thread's first piece
    int64_t ld_, rows_, cols_;  // of the matrix, counted from there
    bool vectors_;
};

// Loads fragments of mma_bf16_16816 from a tile with PIECES pieces per row. TRANS: the tile is stored as [depth][rows
// or columns of the product], else as [rows or columns][depth]. The first row `r`, column `c` and depth `k` are
// multiples of 16, so that ^ adds.
template <bool TRANS, int PIECES> __device__ __forceinline__ void load_a(uint32_t (&a)[4], smem_addr tile, int r, int k) {
    const int lane = int(threadIdx.x) % 32;
    if constexpr (TRANS)
        ldmatrix_x4_trans(a, tile + swizzled<PIECES>(k + lane % 8 + lane / 16 * 8, r / 8 ^ lane / 8 % 2));
    else
        ldmatrix_x4(a, tile + swizzled<PIECES>(r + lane % 16, k / 8 ^ lane / 16));
}
// Two fragments of 8 columns each: b[0], b[1] and b[2], b[3].
template <bool TRANS, int PIECES> __device__ __forceinline__ void load_b(uint32_t (&b)[4], smem_addr tile, int c, int k) {
    const int lane = int(threadIdx.x) % 32;
    if constexpr (TRANS)
        ldmatrix_x4_trans(b, tile + swizzled<PIECES>(k + lane % 16, c / 8 ^ lane / 16));
    else
        ldmatrix_x4(b, tile + swizzled<PIECES>(c + lane % 8 + lane / 16 * 8, k / 8 ^ lane / 8 % 2));
}

// A block's tile of ROWS x COLS, divided among the warps into WARP_ROWS x WARP_COLS, with DEPTH of the inner dimension
// in each of STAGES stages. TA, TB: a is stored [depth, rows], b is stored [columns, depth]. VECTORS: only for operands
// whose `vectors` are both true; saves the run-time check.
template <class T, int ROWS, int COLS, int DEPTH, int WARP_ROWS, int WARP_COLS, int STAGES, bool TA, bool TB, bool VECTORS = false>
struct Tile {
    using Type = T;
    static constexpr bool kTa = TA, kTb = TB, kVectors = VECTORS;
    static constexpr int kRows = ROWS, kCols = COLS, kDepth = DEPTH, kWarpRows = WARP_ROWS, kWarpCols = WARP_COLS, kStages = STAGES;
    static constexpr int kThreads = ROWS / WARP_ROWS * (COLS / WARP_COLS) * 32;
    static constexpr int kAccRows = WARP_ROWS / 8, kAccCols = WARP_COLS / 4;
    // Shapes of the tiles of a and b as stored.
    static constexpr int kRowsA = TA ? DEPTH : ROWS, kColsA = TA ? ROWS : DEPTH;
    static constexpr int kRowsB = TB ? COLS : DEPTH, kColsB = TB ? DEPTH : COLS;
    static constexpr int kBytesA = ROWS * DEPTH * int(sizeof(T)), kBytesB = COLS * DEPTH * int(sizeof(T));
    static constexpr int kSmem = STAGES * (kBytesA + kBytesB);

    static_assert(ROWS % WARP_ROWS == 0 && COLS % WARP_COLS == 0, "the warps' tiles fill the block's");
    static_assert(WARP_ROWS % 16 == 0 && WARP_COLS % 16 == 0 && DEPTH % 16 == 0, "fragments are 16 wide");
    static_assert(sizeof(T) == 4 || DEPTH % 32 == 0, "fragments of a stage take turns between two sets");
    static_assert(STAGES >= 2, "one stage is filled while another is read");

    static __device__ __forceinline__ int lane() { return int(threadIdx.x) % 32; }
    static __device__ __forceinline__ int warp_row() { return int(threadIdx.x) / 32 / (COLS / WARP_COLS) * WARP_ROWS; }
    static __device__ __forceinline__ int warp_col() { return int(threadIdx.x) / 32 % (COLS / WARP_COLS) * WARP_COLS; }
    static __device__ __forceinline__ int row(int i) { return warp_row() + i * 8 + lane() / 4; }
    static __device__ __forceinline__ int col(int j) { return warp_col() + j / 2 * 8 + lane() % 4 * 2 + j % 2; }
};

// A thread's part of a tile.
template <class Tile> struct Acc {
    float c[Tile::kAccRows / 2][Tile::kAccCols / 2][4];  // in the layout of mma_bf16_16816

    __device__ __forceinline__ float& at(int i, int j) { return c[i / 2][j / 2][i % 2 * 2 + j % 2]; }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < Tile::kAccRows; ++i)
#pragma unroll
            for (int j = 0; j < Tile::kAccCols; ++j) at(i, j) = 0.f;
    }
};

// A warp's fragments of one step of 16 in depth.
template <class Tile> struct Fragments {
    uint32_t a[Tile::kWarpRows / 16][4], b[Tile::kWarpCols / 16][4];

    // Loads them from depth `k` on from the stage at `tile_a`, `tile_b`.
    __device__ __forceinline__ void load(smem_addr tile_a, smem_addr tile_b, int k) {
#pragma unroll
        for (int m = 0; m < Tile::kWarpRows / 16; ++m) load_a<Tile::kTa, Tile::kColsA / 8>(a[m], tile_a, Tile::warp_row() + m * 16, k);
#pragma unroll
        for (int n = 0; n < Tile::kWarpCols / 16; ++n) load_b<!Tile::kTb, Tile::kColsB / 8>(b[n], tile_b, Tile::warp_col() + n * 16, k);
    }
};

// acc += a b of one step, on tensor cores.
template <class Tile> __device__ __forceinline__ void multiply(Acc<Tile>& acc, const Fragments<Tile>& f) {
#pragma unroll
    for (int n = 0; n < Tile::kWarpCols / 8; ++n)
#pragma unroll
        for (int m = 0; m < Tile::kWarpRows / 16; ++m) mma_bf16_16816(acc.c[m][n], f.a[m], f.b[n / 2][n % 2 * 2], f.b[n / 2][n % 2 * 2 + 1]);
}

// Loads N neighbouring elements of a tile of floats with PIECES pieces per row. N divides 4 and `at` is a multiple of
// N.
template <int N, int PIECES> __device__ __forceinline__ void load_floats(float (&out)[N], const float* tile, int row, int at) {
    load<N>(out, reinterpret_cast<const float*>(reinterpret_cast<const unsigned char*>(tile) + swizzled<PIECES>(row, at / 4)) + at % 4);
}

// acc += a b of one stage of floats, by fused multiply-adds, four elements of depth at a time.
template <class Tile> __device__ __forceinline__ void multiply(Acc<Tile>& acc, const float* a, const float* b) {
    constexpr int kPiecesA = Tile::kColsA / 4, kPiecesB = Tile::kColsB / 4;
#pragma unroll 1
    for (int k = 0; k < Tile::kDepth; k += 4) {
        float fa[Tile::kAccRows][4];
#pragma unroll
        for (int i = 0; i < Tile::kAccRows; ++i) {
            if constexpr (Tile::kTa) {
#pragma unroll
                for (int s = 0; s < 4; ++s) {
                    float one[1];
                    load_floats<1, kPiecesA>(one, a, k + s, Tile::row(i));
                    fa[i][s] = one[0];
                }
            } else {
                load_floats<4, kPiecesA>(fa[i], a, Tile::row(i), k);
            }
        }
#pragma unroll
        for (int j = 0; j < Tile::kAccCols; j += 2) {
            float fb[2][4];
            if constexpr (Tile::kTb) {
                load_floats<4, kPiecesB>(fb[0], b, Tile::col(j), k);
                load_floats<4, kPiecesB>(fb[1], b, Tile::col(j + 1), k);
            } else {
#pragma unroll
                for (int s = 0; s < 4; ++s) {
                    float two[2];
                    load_floats<2, kPiecesB>(two, b, k + s, Tile::col(j));
                    fb[0][s] = two[0];
                    fb[1][s] = two[1];
                }
            }
#pragma unroll
            for (int s = 0; s < 4; ++s)
#pragma unroll
                for (int i = 0; i < Tile::kAccRows; ++i) {
                    acc.at(i, j) = fmaf(fa[i][s], fb[0][s], acc.at(i, j));
                    acc.at(i, j + 1) = fmaf(fa[i][s], fb[1][s], acc.at(i, j + 1));
                }
        }
    }
}

// acc += the products of `steps` stages. `fill(slot)` starts the copies of the next stage to slot `slot` of `smem`,
// which has kStage bytes for each slot, and commits them as one group. It is called more than `steps` times; the
// surplus stages are not used. The whole block calls this function with the same arguments. `smem` has Tile::kSmem
// bytes, is aligned to 128 bytes and may be reused after the first barrier that follows the call.
template <class Tile, class Fill>
__device__ __forceinline__ void pipeline(Acc<Tile>& acc, int64_t steps, Fill&& fill, unsigned char* smem) {
    using T = typename Tile::Type;
    static_assert(Tile::kSmem <= 163 * 1024, "shared memory of an sm_80 multiprocessor");
    constexpr int kStage = Tile::kBytesA + Tile::kBytesB;
    __syncthreads();  // the block no longer reads the previous contents of smem
#pragma unroll 1
    for (int s = 0; s < Tile::kStages - 1; ++s) fill(s);
    int here = 0, before = Tile::kStages - 1;
    if constexpr (sizeof(T) == 2) {
        // Fragments are loaded one step before their use, also across the boundary of two stages.
        constexpr int kSteps = Tile::kDepth / 16;
        Fragments<Tile> f[2];
        auto load = [&](int step) {
            const smem_addr stage = smem_address(smem + here * kStage);
            f[step % 2].load(stage, stage + Tile::kBytesA, step * 16);
        };
        fill(before);
        before = 0;
        cp_async_wait<Tile::kStages - 1>();
        __syncthreads();  // the first stage has arrived
        load(0);
#pragma unroll 1
        for (int64_t s = 0; s < steps; ++s) {
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                if (step + 1 < kSteps) {
                    load(step + 1);
                } else {
                    here = here + 1 == Tile::kStages ? 0 : here + 1;
                    cp_async_wait<Tile::kStages - 2>();
                    __syncthreads();  // the next stage has arrived; all threads have loaded this one's last fragments
                    fill(before);
                    before = here;
                    load(0);
                }
                multiply(acc, f[step % 2]);
            }
        }
    } else {
#pragma unroll 1
        for (int64_t s = 0; s < steps; ++s) {
            cp_async_wait<Tile::kStages - 2>();
            __syncthreads();  // this stage has arrived for all threads; all threads are done with the previous one
            fill(before);
            const T* const stage = reinterpret_cast<const T*>(smem + here * kStage);
            multiply(acc, stage, stage + Tile::kBytesA / int(sizeof(T)));
            before = here;
            here = here + 1 == Tile::kStages ? 0 : here + 1;
        }
    }
    cp_async_wait<0>();  // for the stages that are not used
}

// acc += op(a)[row0 .. row0 + kRows, :] op(b)[:, col0 .. col0 + kCols]; elements outside a matrix count as 0. The
// requirements on the call and on `smem` are those of `pipeline`.
template <class Tile>
__device__ __forceinline__ void tile_product(Acc<Tile>& acc, const Matrix<typename Tile::Type>& a, const Matrix<typename Tile::Type>& b,
                                             int64_t row0, int64_t col0, unsigned char* smem) {
    using T = typename Tile::Type;
    const int64_t depth = Tile::kTa ? a.rows : a.cols;
    TileCopy<T, Tile::kRowsA, Tile::kColsA, Tile::kThreads, Tile::kVectors> copy_a(a, Tile::kTa ? 0 : row0, Tile::kTa ? row0 : 0);
    TileCopy<T, Tile::kRowsB, Tile::kColsB, Tile::kThreads, Tile::kVectors> copy_b(b, Tile::kTb ? col0 : 0, Tile::kTb ? 0 : col0);
    // Beyond the depth of the operands this fills with zeros.
    auto fill = [&](int slot) {
        unsigned char* const stage = smem + slot * (Tile::kBytesA + Tile::kBytesB);
        copy_a.start(stage);
        copy_b.start(stage + Tile::kBytesA);
        cp_async_commit();
        Tile::kTa ? copy_a.advance_rows(Tile::kDepth) : copy_a.advance_cols(Tile::kDepth);
        Tile::kTb ? copy_b.advance_cols(Tile::kDepth) : copy_b.advance_rows(Tile::kDepth);
    };
    pipeline(acc, (depth + Tile::kDepth - 1) / Tile::kDepth, fill, smem);
}

}  // namespace gemm
}  // namespace ett
