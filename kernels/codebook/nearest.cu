// nearest.cu: the best code of each token.
//
//   idx_m = the first k with the largest s_mk,   s_mk = z_m . e_k (dot)   or   z_m . e_k - |e_k|^2 / 2 (l2)
//   score_m = that s_mk
//   bad += the number of tokens whose largest score is not finite
//
// z      M,D  act  rows of any stride   in
// e      K,D  act  rows of any stride   in
// idx    M    i32  contiguous           out
// score  M    f32  contiguous           out; may be absent
// bad    1    f32                       added to; may be absent
//
// A NaN score ranks below every number; a token whose scores are all NaN gets code 0 and the score -infinity. The l2
// score is -|z - e|^2 / 2 up to a constant of the token. The scores of all codes are not stored: a block has a tile of
// tokens, sweeps a part of the codes and keeps the best score and code of each row in registers; the results of several
// parts are merged in order.
// "hopper" (bf16), "hopper_split" (f32): products of warpgroups, codes copied by TMA (hopper_nearest.cuh). "wide", "narrow"
// (bf16): the tokens stay in shared memory while the codes stream through it, without a pause between tiles. "simple":
// one product of gemm.cuh per tile.
// numerics: products and sums in f32, z . e summed in the order of D. bf16: a score does not depend on the implementation.
// f32: "simple" uses fused multiply-adds. "hopper_split", the default on Hopper, cuts each number into two bf16 numbers,
// high + low, and sums three of their four products; a score then has an error below 2^-15 |z| |e| (measured: 2^-19), so
// that codes whose scores are closer than that may be exchanged, and an infinite element of a code may make its score NaN.
// Ties go to the smallest index. Bitwise repeatable, on any device.
// workspace: 4 bytes a code for l2; 8 bytes per token and part if there are several parts; else 4 bytes per token if
// `bad` is present, or "hopper_split" packs codes more than once, and `score` is absent. "hopper_split": up to 16 MB of
// packed codes.
// limits: "hopper" requires D up to 512, "wide" a D from 129 to 256, "narrow" a D that fits into shared memory besides its
// stages; all three require rows at multiples of 16 bytes. "hopper_split" requires D up to 256.
// work: 2*M*K*D FLOP; (M + K)*D*size + 4*M bytes.
#include <array>

#include "bad.cuh"
#include "hopper_nearest.cuh"
#include "scores.cuh"

namespace ett {
namespace codebook {
namespace {

using gemm::Matrix;

constexpr int kThreads = 256;  // of the small kernels

// The best code so far of each of a thread's rows, among the columns of its warp; the same in the four lanes that share
// the rows.
template <class Tile> struct Best {
    float v[Tile::kAccRows];
    int32_t k[Tile::kAccRows];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < Tile::kAccRows; ++i) {
            v[i] = -INFINITY;
            k[i] = 0;
        }
    }

    // Updates the best codes with the scores of codes [code0, code0 + kCols). `half`: |e|^2 / 2, null for the dot
    // product.
    template <bool L2> __device__ __forceinline__ void take(gemm::Acc<Tile>& acc, int32_t code0, int64_t codes, const float* half) {
        const int32_t mine = code0 + Tile::col(0);
        if constexpr (L2) {
#pragma unroll
            for (int j = 0; j < Tile::kAccCols; j += 2) {
                float h[2];
                load<2>(h, half + (mine + j * 4));
#pragma unroll
                for (int i = 0; i < Tile::kAccRows; ++i) {
                    acc.at(i, j) -= h[0];
                    acc.at(i, j + 1) -= h[1];
                }
            }
        }
        // Most tiles have no better code for any row of the warp, so compare only the maxima first.
        float top[Tile::kAccRows];
        bool better = false;
#pragma unroll
        for (int i = 0; i < Tile::kAccRows; ++i) {
            top[i] = row_max(acc, i);
            better |= top[i] > v[i];
        }
        if (!__any_sync(kAllLanes, better)) return;
        const bool tail = codes - code0 < Tile::kCols;
#pragma unroll
        for (int i = 0; i < Tile::kAccRows; ++i) {
            if (!__any_sync(kAllLanes, top[i] > v[i])) continue;
            if (tail) {
#pragma unroll
                for (int j = 0; j < Tile::kAccCols; ++j)
                    if (mine + (j / 2 * 8 + j % 2) >= codes) acc.at(i, j) = -INFINITY;
            }
            int at = -1;
#pragma unroll
            for (int j = 0; j < Tile::kAccCols; ++j) {
                const bool more = acc.at(i, j) > v[i];
                v[i] = more ? acc.at(i, j) : v[i];
                at = more ? j / 2 * 8 + j % 2 : at;
            }
            k[i] = at < 0 ? k[i] : mine + at;
#pragma unroll
            for (int d = 1; d <= 2; d *= 2) merge(v[i], k[i], __shfl_xor_sync(kAllLanes, v[i], d), __shfl_xor_sync(kAllLanes, k[i], d));
        }
    }

    // Merges the warps and writes the best of the block's columns. `smem` holds kRows * kCols / kWarpCols * 8 bytes.
    __device__ __forceinline__ void finish(const Result& out, int64_t row0, int64_t rows, int64_t part, unsigned char* smem) {
        constexpr int kParts = Tile::kCols / Tile::kWarpCols;
        float* smem_v = reinterpret_cast<float*>(smem);
        int32_t* smem_k = reinterpret_cast<int32_t*>(smem_v + kParts * Tile::kRows);
        const int at = Tile::warp_col() / Tile::kWarpCols * Tile::kRows;
        __syncthreads();  // the tiles in this memory have been read
#pragma unroll
        for (int i = 0; i < Tile::kAccRows; ++i) {
            if (Tile::lane() % 4 == 0) {
                smem_v[at + Tile::row(i)] = v[i];
                smem_k[at + Tile::row(i)] = k[i];
            }
        }
        __syncthreads();  // the warps' results are visible
        for (int r = int(threadIdx.x); r < Tile::kRows; r += Tile::kThreads) {
            float bv = smem_v[r];
            int32_t bk = smem_k[r];
#pragma unroll
            for (int p = 1; p < kParts; ++p) merge(bv, bk, smem_v[p * Tile::kRows + r], smem_k[p * Tile::kRows + r]);
            const int64_t row = row0 + r;
            if (row >= rows) continue;
            out.k[part * rows + row] = bk;
            if (out.v) out.v[part * rows + row] = bv;
        }
    }

    static __device__ __forceinline__ void merge(float& v, int32_t& k, float v2, int32_t k2) {
        if (v2 > v || (v2 == v && k2 < k)) {
            v = v2;
            k = k2;
        }
    }
};

// "simple".
template <class Tile, bool L2>
__global__ void __launch_bounds__(Tile::kThreads, 2)
simple_kernel(const Matrix<typename Tile::Type> z, const Matrix<typename Tile::Type> e, const float* half, const Result out, int row_tiles, int parts) {
    ETT_DYNAMIC_SMEM(smem);
    const int part = int(blockIdx.x) / row_tiles;
    const int64_t row0 = int64_t(int(blockIdx.x) - part * row_tiles) * Tile::kRows;
    const Consecutive range = part_of((e.rows + Tile::kCols - 1) / Tile::kCols, part, parts);
    Best<Tile> best;
    best.clear();
#pragma unroll 1
    for (int32_t t = range.first; t < range.end; ++t) {
        gemm::Acc<Tile> acc;
        acc.clear();
        gemm::tile_product(acc, z, e, row0, int64_t(t) * Tile::kCols, smem);
        best.template take<L2>(acc, t * Tile::kCols, e.rows, half);
    }
    best.finish(out, row0, z.rows, part, smem);
}

// Tokens stay in shared memory and codes stream through it. STEPS: stages per tile, 0: determined at run time; BLOCKS:
// blocks per multiprocessor.
template <int ROWS, int CODES, int DEPTH, int STAGES, int STEPS, int BLOCKS> struct Resident {
    using Tile = gemm::Tile<bf16, ROWS, CODES, DEPTH, 64, 64, 2, false, true>;
    static constexpr int kDepth = DEPTH, kStages = STAGES, kSteps = STEPS, kBlocks = BLOCKS, kThreads = Tile::kThreads;
    static constexpr int64_t smem(int64_t d) { return steps(d) * Tile::kBytesA + STAGES * Tile::kBytesB; }
    static constexpr int64_t steps(int64_t d) { return (d + kDepth - 1) / kDepth; }
};

// "wide", "narrow".
template <class S, bool L2>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
resident_kernel(const Matrix<bf16> z, const Matrix<bf16> e, const float* half, const Result out, int row_tiles, int parts) {
    using Tile = typename S::Tile;
    constexpr int kPieces = S::kDepth / 8, kRowsAtOnce = S::kThreads / kPieces, kK = S::kDepth / 16;
    static_assert(kRowsAtOnce % 8 == 0, "all copies of a thread have the same place in the swizzle");
    ETT_DYNAMIC_SMEM(smem);
    const int part = int(blockIdx.x) / row_tiles;
    const int64_t row0 = int64_t(int(blockIdx.x) - part * row_tiles) * Tile::kRows;
    const Consecutive range = part_of((e.rows + Tile::kCols - 1) / Tile::kCols, part, parts);
    const int steps = S::kSteps > 0 ? S::kSteps : int((z.cols + S::kDepth - 1) / S::kDepth);
    unsigned char* const stages = smem + steps * Tile::kBytesA;

    // Copies of codes run ahead: every thread has a fixed place in the tile and advances through the codes by stages.
    const int my_row = int(threadIdx.x) / kPieces, my_col = int(threadIdx.x) % kPieces * 8;
    const smem_addr my_place = smem_address(stages + gemm::swizzled<kPieces>(my_row, my_col / 8));
    const bf16* from = e.p + (int64_t(range.first) * Tile::kCols + my_row) * e.ld + my_col;
    const int64_t row_step = kRowsAtOnce * e.ld, tile_step = Tile::kCols * e.ld - (steps - 1) * S::kDepth;
    int64_t left = e.rows - int64_t(range.first) * Tile::kCols - my_row;
    int fill_step = 0, fill_slot = 0;
    auto fill = [&] {
        const smem_addr to = my_place + fill_slot * Tile::kBytesB;
        const int rest = fill_step * S::kDepth + my_col < int(e.cols) ? int(min(left, int64_t(Tile::kCols))) : 0;
        const bf16* p = from;
#pragma unroll
        for (int i = 0; i < Tile::kCols / kRowsAtOnce; ++i) {
            cp_async16(to + i * (kRowsAtOnce * kPieces * 16), p, i * kRowsAtOnce < rest);
            p += row_step;
        }
        cp_async_commit();
        fill_slot = fill_slot + 1 == S::kStages ? 0 : fill_slot + 1;
        const bool last = fill_step + 1 == steps;
        fill_step = last ? 0 : fill_step + 1;
        from += last ? tile_step : int64_t(S::kDepth);
        left -= last ? Tile::kCols : 0;
    };

    gemm::TileCopy<bf16, Tile::kRows, S::kDepth, S::kThreads, true> tokens(z, row0, 0);
#pragma unroll 1
    for (int s = 0; s < steps; ++s, tokens.advance_cols(S::kDepth)) tokens.start(smem + s * Tile::kBytesA);
#pragma unroll 1
    for (int s = 0; s < S::kStages; ++s) fill();

    gemm::Acc<Tile> acc;
    Best<Tile> best;
    best.clear();
    uint32_t fa[2][Tile::kWarpRows / 16][4], fb[2][Tile::kWarpCols / 16][4];
    int slot = 0;
    auto fetch = [&](int s, int k) {
        const smem_addr a = smem_address(smem + s * Tile::kBytesA), b = smem_address(stages + slot * Tile::kBytesB);
#pragma unroll
        for (int m = 0; m < Tile::kWarpRows / 16; ++m) gemm::load_a<false, kPieces>(fa[k % 2][m], a, Tile::warp_row() + m * 16, k * 16);
#pragma unroll
        for (int n = 0; n < Tile::kWarpCols / 16; ++n) gemm::load_b<false, kPieces>(fb[k % 2][n], b, Tile::warp_col() + n * 16, k * 16);
    };
    auto stage = [&](int s, bool last) {
#pragma unroll
        for (int k = 0; k < kK; ++k) {
            if (k + 1 < kK) {
                fetch(s, k + 1);
            } else {
                slot = slot + 1 == S::kStages ? 0 : slot + 1;
                cp_async_wait<S::kStages - 2>();
                __syncthreads();  // the next stage is visible; no thread reads this one any more
                fill();
                fetch(last ? 0 : s + 1, 0);
            }
#pragma unroll
            for (int n = 0; n < Tile::kWarpCols / 8; ++n)
#pragma unroll
                for (int m = 0; m < Tile::kWarpRows / 16; ++m)
                    mma_bf16_16816(acc.c[m][n], fa[k % 2][m], fb[k % 2][n / 2][n % 2 * 2], fb[k % 2][n / 2][n % 2 * 2 + 1]);
        }
    };

    cp_async_wait<S::kStages - 1>();
    __syncthreads();  // the tokens and the first stage are visible
    fetch(0, 0);
#pragma unroll 1
    for (int32_t t = range.first; t < range.end; ++t) {
        acc.clear();
        if constexpr (S::kSteps > 0) {
#pragma unroll
            for (int s = 0; s < S::kSteps; ++s) stage(s, s + 1 == S::kSteps);
        } else {
#pragma unroll 1
            for (int s = 0; s < steps; ++s) stage(s, s + 1 == steps);
        }
        best.template take<L2>(acc, t * Tile::kCols, e.rows, half);
    }
    cp_async_wait<0>();
    best.finish(out, row0, z.rows, part, smem);
}

// half[k] = |e[k]|^2 / 2; a warp takes four codes at a time. `padded` is a multiple of 4. HOPPER: in the order of half_place.
template <class T, bool HOPPER>
__global__ void __launch_bounds__(kThreads)
half_norm_kernel(const Matrix<T> e, float* half, int64_t padded) {
    constexpr int kCodes = 4;
    const int lane = int(threadIdx.x) % kWarp;
    for (int64_t k = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kWarp * kCodes; k < padded; k += int64_t(gridDim.x) * kThreads / kWarp * kCodes) {
        float sum[kCodes] = {};
        auto add = [&](auto vectors) {
            constexpr int kN = decltype(vectors)::value ? kWide<T> : 1;
#pragma unroll 1
            for (int64_t d = lane * kN; d < e.cols; d += kWarp * kN) {
#pragma unroll
                for (int c = 0; c < kCodes; ++c) {
                    float v[kN] = {};
                    if (k + c < e.rows) load<kN>(v, e.p + (k + c) * e.ld + d);
#pragma unroll
                    for (int i = 0; i < kN; ++i) sum[c] = fmaf(v[i], v[i], sum[c]);
                }
            }
        };
        if (e.vectors)
            add(std::true_type{});
        else
            add(std::false_type{});
#pragma unroll
        for (int c = 0; c < kCodes; ++c) {
            const float all = warp_sum(sum[c]);
            if (lane == 0) half[HOPPER ? hopper_nearest::half_place(k + c) : k + c] = 0.5f * all;
        }
    }
}

// The best codes of all rows from the results of the parts, and unless null their scores. The best score is left in the
// place of the first part too. A warp takes every eighth part of a block's 32 rows.
__global__ void __launch_bounds__(kThreads) combine_kernel(const Result from, int32_t* idx, float* score, int64_t rows, int parts) {
    constexpr int kWarps = kThreads / kWarp;
    __shared__ float smem_v[kWarps][kWarp];
    __shared__ int32_t smem_k[kWarps][kWarp];
    const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
    const int64_t row = int64_t(blockIdx.x) * kWarp + lane;
    float best = -INFINITY;
    int32_t at = 0;
    auto merge = [&](float v, int32_t k) {
        if (v > best || (v == best && k < at)) {
            best = v;
            at = k;
        }
    };
    if (row < rows) {
#pragma unroll 4
        for (int p = warp; p < parts; p += kWarps) merge(from.v[p * rows + row], from.k[p * rows + row]);
    }
    smem_v[warp][lane] = best;
    smem_k[warp][lane] = at;
    __syncthreads();  // the warps' results are visible, and no thread reads `from` any more
    if (warp != 0 || row >= rows) return;
#pragma unroll
    for (int w = 1; w < kWarps; ++w) merge(smem_v[w][lane], smem_k[w][lane]);
    idx[row] = at;
    from.v[row] = best;
    if (score) score[row] = best;
}

// The host's description of an implementation.
struct Kernel {
    Implementation is;
    int64_t rows, codes;  // of a block's tile
    int64_t blocks;       // per multiprocessor
    int64_t smem;
    int64_t pack;         // bytes of packed codes
    bool chunks;          // codes are packed in several chunks
};

// The largest shared memory of a block.
int64_t most_smem() {
    int device = 0, n = 0;
    if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&n, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
        (void)cudaGetLastError();
        return kPlannedSmem;
    }
    return n;
}

// 64 x 64 (f32: 64 x 32) products per warp, as in matmul.cu.
using SimpleBf16 = gemm::Tile<bf16, 128, 128, 32, 64, 64, 4, false, true>;
using SimpleF32 = gemm::Tile<float, 128, 64, 16, 64, 32, 3, false, true>;
// Wide: eight warps and all shared memory of a multiprocessor, so that codes are read half as often and 16 KB in flight
// hide the latency of the L2. Narrow: two blocks of four warps, for few tokens and for less shared memory.
using Wide = Resident<256, 128, 128, 3, 2, 1>;
using Narrow = Resident<128, 128, 64, 3, 0, 2>;

constexpr int kImplementations = 5;

// All implementations, with the best one for this call first. `on_hopper`: those for Hopper may run.
std::array<Kernel, kImplementations> choose_nearest_config(const ett_nearest_args& a, int64_t smem, bool on_hopper) {
    const int64_t d = cols(a.z);
    const bool is_bf16 = a.z.dtype == ETT_BF16, pieces = is_bf16 && wide(a.z) && wide(a.e) && d > 0;
    const bool wide_fits = pieces && Wide::smem(d) <= smem && Wide::steps(d) == Wide::kSteps;
    const Kernel w = {{"wide", wide_fits}, Wide::Tile::kRows, Wide::Tile::kCols, Wide::kBlocks, Wide::smem(d), 0, false};
    const Kernel n = {{"narrow", pieces && Narrow::smem(d) <= smem}, Narrow::Tile::kRows, Narrow::Tile::kCols, Narrow::kBlocks, Narrow::smem(d), 0, false};
    const Kernel s = is_bf16 ? Kernel{{"simple", true}, SimpleBf16::kRows, SimpleBf16::kCols, 2, SimpleBf16::kSmem, 0, false}
                             : Kernel{{"simple", true}, SimpleF32::kRows, SimpleF32::kCols, 2, SimpleF32::kSmem, 0, false};
    namespace hn = hopper_nearest;
    const bool split_fits = !is_bf16 && d > 0 && d <= hn::kMostSplitCols;
    const int64_t chunk = split_fits ? hn::split_chunk(rows(a.e), d) : 0;
    const Kernel h = {{"hopper", on_hopper && pieces && d <= hn::kMostCols}, hn::kTokens, 2 * hn::kCodes, 1, 0, 0, false};
    const Kernel hs = {{"hopper_split", on_hopper && split_fits}, hn::kTokens, 2 * hn::kCodes, 1, 0, chunk * hn::split_cols(d) * 4, chunk < rows(a.e)};
    return rows(a.z) > n.rows ? std::array{h, hs, w, n, s} : std::array{h, hs, n, w, s};
}

// The parts into which the codes (of a chunk) are divided.
int64_t parts_of(const Kernel& kernel, const ett_nearest_args& a) {
    const int64_t codes = kernel.pack > 0 ? hopper_nearest::split_chunk(rows(a.e), cols(a.z)) : rows(a.e);
    return choose_parts(ceil_div(rows(a.z), kernel.rows), ceil_div(codes, kernel.codes), kernel.blocks * multiprocessors());
}

// The layout of the workspace: half[codes, padded to whole tiles] for l2, then v[parts, M] and k[parts, M] if there are
// several parts, or v[M] if the best scores are needed but not asked for, then packed codes.
struct Layout {
    int64_t half, v, k, pack, bytes;
};
Layout layout_of(const ett_nearest_args& a, const Kernel& kernel, int64_t parts) {
    Layout at = {};
    const bool scores = parts > 1 || ((present(a.bad) || kernel.chunks) && !present(a.score));
    const int64_t partial = round_up(parts * rows(a.z) * 4, 256);
    at.v = a.metric == ETT_METRIC_L2 ? round_up(round_up(rows(a.e), kernel.codes) * 4, 256) : 0;
    at.k = at.v + (scores ? partial : 0);
    at.pack = at.k + (parts > 1 ? partial : 0);
    at.bytes = at.pack + round_up(kernel.pack, 256);
    return at;
}

bool sound(Check& check, const ett_nearest_args* a) {
    return check.ok() && check.act("z", a->z) && check.type("e", a->e, a->z.dtype) && check.range("e", rows(a->e), 1, INT32_MAX) &&
           check.range("z", rows(a->z), 0, INT32_MAX) && check.matrix("e", a->e, a->z.dtype, rows(a->e), cols(a->z)) &&
           check.vector("idx", a->idx, ETT_I32, rows(a->z)) &&
           (!present(a->score) || check.vector("score", a->score, ETT_F32, rows(a->z))) &&
           (!present(a->bad) || check.vector("bad", a->bad, ETT_F32, 1)) && check.range("metric", a->metric, ETT_METRIC_DOT, ETT_METRIC_L2);
}

}  // namespace
}  // namespace codebook
}  // namespace ett

extern "C" int64_t ett_nearest_workspace(const ett_nearest_args* a) {
    using namespace ett;
    using namespace ett::codebook;
    Check check("nearest", a);
    if (!sound(check, a)) return -1;
    int64_t most = 0;
    for (const Kernel& kernel : choose_nearest_config(*a, most_smem(), hopper_nearest::on_hopper(true)))
        if (kernel.is.able) most = std::max(most, layout_of(*a, kernel, parts_of(kernel, *a)).bytes);
    return most;
}

extern "C" int32_t ett_nearest(const ett_nearest_args* a, const ett_launch* l) {
    using namespace ett;
    using namespace ett::codebook;
    Check check("nearest", a, l);
    if (!sound(check, a)) return check.status();
    const int64_t m = rows(a->z), k = rows(a->e);
    if (m == 0) return ett_done("");
    const std::array<Kernel, kImplementations> all = choose_nearest_config(*a, most_smem(), hopper_nearest::on_hopper(false));
    const char* name = check.choose(l, {all[0].is, all[1].is, all[2].is, all[3].is, all[4].is});
    if (!check.ok()) return check.status();
    const Kernel* kernel = all.data();
    while (strcmp(kernel->is.name, name) != 0) ++kernel;
    const int64_t parts = parts_of(*kernel, *a), row_tiles = ceil_div(m, kernel->rows);
    const Layout at = layout_of(*a, *kernel, parts);
    if (!check.workspace(l, at.bytes)) return check.status();
    unsigned char* const work = static_cast<unsigned char*>(l->workspace);
    const bool l2 = a->metric == ETT_METRIC_L2;
    float* const half = l2 ? reinterpret_cast<float*>(work + at.half) : nullptr;
    float* const scores = at.k > at.v ? reinterpret_cast<float*>(work + at.v) : data<float>(a->score);  // may be null
    const Result result = {parts > 1 ? reinterpret_cast<int32_t*>(work + at.k) : data<int32_t>(a->idx), scores};

    int32_t status = ETT_OK;
    if (l2) {
        const int64_t padded = round_up(k, kernel->codes);
        const dim3 grid(unsigned(std::min<int64_t>(ceil_div(padded, kThreads / kWarp * 4), int64_t(multiprocessors()) * 16)));
        status = with_act(a->z.dtype, [&](auto t) {
            using T = decltype(t);
            return launch("nearest", strncmp(name, "hopper", 6) == 0 ? half_norm_kernel<T, true> : half_norm_kernel<T, false>, grid, dim3(kThreads), 0,
                          l, gemm::matrix<T>(a->e), half, padded);
        });
    }
    if (status != ETT_OK) return status;
    auto go = [&](auto* dot, auto* distance, int threads, auto t) {
        return launch("nearest", l2 ? distance : dot, dim3(unsigned(row_tiles * parts)), dim3(unsigned(threads)), size_t(kernel->smem), l,
                      gemm::matrix<decltype(t)>(a->z), gemm::matrix<decltype(t)>(a->e), half, result, int(row_tiles), int(parts));
    };
#ifndef ETT_SHIM
    auto sweep = [&](auto t) {
        return hopper_nearest::Sweep<decltype(t)>{gemm::matrix<decltype(t)>(a->z), int32_t(k), 0, half, result, false, false, int(row_tiles), int(parts)};
    };
    if (strcmp(name, "hopper") == 0)
        status = hopper_nearest::launch_bf16(gemm::matrix<bf16>(a->e), sweep(bf16{}), l);
    else if (strcmp(name, "hopper_split") == 0)
        status = hopper_nearest::launch_split(gemm::matrix<float>(a->e), sweep(float{}), reinterpret_cast<bf16*>(work + at.pack), l);
    else
#endif
    if (strcmp(name, "wide") == 0)
        status = go(resident_kernel<Wide, false>, resident_kernel<Wide, true>, Wide::kThreads, bf16{});
    else if (strcmp(name, "narrow") == 0)
        status = go(resident_kernel<Narrow, false>, resident_kernel<Narrow, true>, Narrow::kThreads, bf16{});
    else if (a->z.dtype == ETT_BF16)
        status = go(simple_kernel<SimpleBf16, false>, simple_kernel<SimpleBf16, true>, SimpleBf16::kThreads, bf16{});
    else
        status = go(simple_kernel<SimpleF32, false>, simple_kernel<SimpleF32, true>, SimpleF32::kThreads, float{});
    if (status == ETT_OK && parts > 1)
        status = launch("nearest", combine_kernel, dim3(unsigned(ceil_div(m, kWarp))), dim3(kThreads), 0, l, result,
                        data<int32_t>(a->idx), data<float>(a->score), m, int(parts));
    if (status == ETT_OK && present(a->bad)) status = launch_count_bad("nearest", scores, m, data<float>(a->bad), l);
    return status == ETT_OK ? ett_done(name) : status;
}
