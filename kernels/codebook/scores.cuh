// scores.cuh: the scores S = z E^T in the sweeps of the IBQ quantizer, computed one tile at a time on tensor cores.
//
// Operands are matrices of bf16. f32 is split into three of them, hi + mid + lo, which hold all of its 24 bits
// (operands.cuh). Of the nine products of two such numbers the six largest are summed, the smallest first; the omitted
// ones are below 2^-21 of |z| |e|.
//
// A score has the same bits in every sweep: whatever the tile sizes, its products are summed in f32 in the order of the
// parts and of D.
#pragma once

#include "gemm.cuh"
#include "reduce.cuh"

namespace ett {
namespace codebook {

inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// ---- exponentials ----------------------------------------------------------------------------------------

// 2^x is 0 for x below kZero (exp2_approx flushes). above_floor replaces exponents below kFloor, and NaN, by kFloor, so
// that x * 2^x is 0 even for x = -infinity.
inline constexpr float kZero = -127.f, kFloor = -1000.f;

__device__ __forceinline__ float above_floor(float x) { return fmaxf(x, kFloor); }

// A score, relative to the best one, that has weight 0 at every temperature; it replaces NaN and -infinity where it is
// still to be multiplied.
inline constexpr float kNoWeight = -1e30f;

// ---- operands --------------------------------------------------------------------------------------------

// Rows of `m.cols` elements in one or three parts, which begin `part` elements apart.
struct Operand {
    gemm::Matrix<bf16> m;
    int64_t part;

    __device__ __forceinline__ gemm::Matrix<bf16> operator[](int i) const { return {m.p + i * part, m.rows, m.cols, m.ld, true}; }
};

// The products of parts that are summed: part i of the first operand times part j of the second, for i + j < max(PA,
// PB), in descending order of i + j.
template <int PA, int PB> struct Terms {
    static constexpr int kMost = PA > PB ? PA : PB;
    static constexpr int count() {
        int n = 0;
        for (int i = 0; i < PA; ++i)
            for (int j = 0; j < PB; ++j) n += i + j < kMost;
        return n;
    }
    // The part numbers of all terms, four bits each.
    static constexpr uint32_t list(bool first) {
        uint32_t all = 0;
        int n = 0;
        for (int sum = kMost - 1; sum >= 0; --sum)
            for (int i = 0; i < PA; ++i)
                if (sum - i >= 0 && sum - i < PB) all |= uint32_t(first ? i : sum - i) << 4 * n++;
        return all;
    }
    static constexpr int kCount = count();
    static constexpr uint32_t kFirst = list(true), kSecond = list(false);
    static __device__ __forceinline__ int first(int t) { return PA == 1 ? 0 : int(kFirst >> 4 * t & 15); }
    static __device__ __forceinline__ int second(int t) { return PB == 1 ? 0 : int(kSecond >> 4 * t & 15); }
};

// ---- sweeps ----------------------------------------------------------------------------------------------

// Tiles of ROWS tokens and COLS codes, divided among the warps. DUAL: two products with the same codes. ROWS_MOVE: the
// codes are fixed and the tokens change from tile to tile; else the reverse.
template <int ROWS, int COLS, int WARP_ROWS, int WARP_COLS, int STAGES, int PARTS, bool DUAL, bool ROWS_MOVE> struct Sweep {
    using Tile = gemm::Tile<bf16, ROWS, COLS, 32, WARP_ROWS, WARP_COLS, STAGES, false, true, true>;
    using Products = Terms<PARTS, PARTS>;
    static constexpr bool kDual = DUAL, kRowsMove = ROWS_MOVE;
    static constexpr int kTokens = DUAL ? 2 : 1;  // operands with a row per token
    static constexpr int kStage = kTokens * Tile::kBytesA + Tile::kBytesB, kSmem = STAGES * kStage, kThreads = Tile::kThreads;
};

// Tiles [first, end) in order.
struct Consecutive {
    int first, end;
    __device__ __forceinline__ int count() const { return end - first; }
    __device__ __forceinline__ int operator[](int n) const { return first + n; }
};
// Tiles from a list.
struct Listed {
    const int* list;
    int n;
    __device__ __forceinline__ int count() const { return n; }
    __device__ __forceinline__ int operator[](int i) const { return list[i]; }
};

// Computes the scores of one tile after the other. Copies run ahead of the products across the boundaries of tiles.
// `Order` lists the tiles.
template <class S, class Order> class Stream {
    using Tile = typename S::Tile;
    using Acc = gemm::Acc<Tile>;

  public:
    // Multiplies z, and with DUAL also g, by e^T. `fixed`: the first row or column of the fixed operand. The whole
    // block calls this, then `scores` once for each tile of the order, then `end`.
    __device__ __forceinline__ Stream(const Operand& z, const Operand& g, const Operand& e, int64_t fixed, const Order& order, unsigned char* smem)
        : z_(z), g_(g), e_(e), fixed_(fixed), order_(order), smem_(smem), steps_(int((z.m.cols + Tile::kDepth - 1) / Tile::kDepth)) {
#pragma unroll 1
        for (int s = 0; s < Tile::kStages - 1; ++s) fill();
    }

    __device__ __forceinline__ void scores(Acc& s) {
        static_assert(!S::kDual);
        products(s, s);
    }
    // s = z e^T, dp = g e^T.
    __device__ __forceinline__ void scores(Acc& s, Acc& dp) {
        static_assert(S::kDual);
        products(s, dp);
    }

    // Called after the last tile; `smem` may be reused after the next barrier.
    __device__ __forceinline__ void end() { cp_async_wait<0>(); }

  private:
    __device__ __forceinline__ void products(Acc& s, Acc& dp) {
        s.clear();
        if constexpr (S::kDual) dp.clear();
#pragma unroll 1
        for (int step = 0; step < steps_ * S::Products::kCount; ++step) {
            cp_async_wait<Tile::kStages - 2>();
            __syncthreads();  // this stage has arrived; all threads are done with the previous one
            fill();
            const smem_addr a = smem_address(smem_ + here_ * S::kStage), b = a + S::kTokens * Tile::kBytesA;
            here_ = here_ + 1 == Tile::kStages ? 0 : here_ + 1;
#pragma unroll
            for (int k = 0; k < Tile::kDepth; k += 16) {
                gemm::Fragments<Tile> f;
                f.load(a, b, k);
                multiply(s, f);
                if constexpr (S::kDual) {
#pragma unroll
                    for (int m = 0; m < Tile::kWarpRows / 16; ++m)
                        gemm::load_a<false, Tile::kColsA / 8>(f.a[m], a + Tile::kBytesA, Tile::warp_row() + m * 16, k);
                    multiply(dp, f);
                }
            }
        }
    }

    // Starts the copies of the next step, none after the last tile.
    __device__ __forceinline__ void fill() {
        if (tile_ < order_.count()) {
            const int64_t moved = int64_t(order_[tile_]) * (S::kRowsMove ? Tile::kRows : Tile::kCols);
            const int64_t row = S::kRowsMove ? moved : fixed_, col = S::kRowsMove ? fixed_ : moved, k = int64_t(step_) * Tile::kDepth;
            using CopyA = gemm::TileCopy<bf16, Tile::kRows, Tile::kDepth, Tile::kThreads, true>;
            using CopyB = gemm::TileCopy<bf16, Tile::kCols, Tile::kDepth, Tile::kThreads, true>;
            unsigned char* const stage = smem_ + next_ * S::kStage;
            CopyA(z_[S::Products::first(term_)], row, k).start(stage);
            if constexpr (S::kDual) CopyA(g_[S::Products::first(term_)], row, k).start(stage + Tile::kBytesA);
            CopyB(e_[S::Products::second(term_)], col, k).start(stage + S::kTokens * Tile::kBytesA);
        }
        cp_async_commit();
        next_ = next_ + 1 == Tile::kStages ? 0 : next_ + 1;
        if (++step_ == steps_) {
            step_ = 0;
            if (++term_ == S::Products::kCount) {
                term_ = 0;
                ++tile_;
            }
        }
    }

    const Operand& z_;
    const Operand& g_;
    const Operand& e_;
    const int64_t fixed_;
    const Order& order_;
    unsigned char* const smem_;
    const int steps_;                          // per product of parts
    int here_ = 0, next_ = 0;                  // the slot to read and the slot to fill
    int step_ = 0, term_ = 0, tile_ = 0;       // of the next copy
};

// The largest of a thread's scores of row i, ignoring NaN; NaN if all of them are.
template <class Tile> __device__ __forceinline__ float row_max(gemm::Acc<Tile>& acc, int i) {
    float x[Tile::kAccCols];
#pragma unroll
    for (int j = 0; j < Tile::kAccCols; ++j) x[j] = acc.at(i, j);
#pragma unroll
    for (int n = 1; n < Tile::kAccCols; n *= 2)
#pragma unroll
        for (int j = 0; j < Tile::kAccCols; j += 2 * n) x[j] = fmaxf(x[j], x[j + n]);
    return x[0];
}

// The tiles of part `part` of `parts`.
__device__ __forceinline__ Consecutive part_of(int64_t tiles, int part, int parts) {
    return {int(tiles * part / parts), int(tiles * (part + 1) / parts)};
}

// ---- host ------------------------------------------------------------------------------------------------

// The number of parts into which to divide the `moving` tiles for each of the `fixed` tiles: the one with which the
// last block ends soonest. A block has a fixed cost of about two tiles.
inline int64_t choose_parts(int64_t fixed, int64_t moving, int64_t slots) {
    int64_t parts = 1, least = INT64_MAX;
    for (int64_t p = 1; p <= std::min(moving, std::max<int64_t>(1, 2 * slots / std::max<int64_t>(fixed, 1))); ++p) {
        const int64_t cost = ceil_div(fixed * p, slots) * (ceil_div(moving, p) + 2);
        if (cost < least) least = cost, parts = p;
    }
    return parts;
}
// An upper bound for the rows of all parts together, for `rows` fixed rows in tiles of `tile`.
inline int64_t most_rows(int64_t rows, int64_t tile, int64_t slots) { return std::max(round_up(rows, tile), 2 * slots * tile); }

}  // namespace codebook
}  // namespace ett
