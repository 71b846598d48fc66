// ibq_cols.cu: the probability of each code summed over all tokens, at the temperature of the entropies, in one sweep.
//
//   col_k = sum_m q_mk,   q_mk = exp((z_m . e_k - smax_m) / temperature) / (1 + rest_q_m)
//
// z       M,D  act  rows of any stride   in
// e       K,D  act  rows of any stride   in
// smax    M    f32  contiguous           in    of ibq_rows
// rest_q  M    f32  contiguous           in    of ibq_rows
// col     K    f32  contiguous           out   not divided by M, so that those of several ranks can be added
//
// A block has a tile of codes and sweeps a part of the tokens; a thread sums its own columns, and the threads' sums are
// added at the end. Parts are added in order.
// numerics: scores as in scores.cuh, with the same bits as smax; exponentials (2^-22) and sums in f32. A NaN score has
// weight 0. Exponentials that underflow to 0 are skipped, eight rows at a time. Bitwise repeatable.
// workspace: 4 bytes for each part of the tokens, for each of at most 2^20 codes; packed copies of z and e if they need
// packing, at most 16 MiB each.
// limits: D up to 512.
// work: 2*M*K*D FLOP (f32 executes 12*M*K*D), one exponential per score; (M + K)*D*size bytes.
// papers: IBQ (2412.02692).
#include "operands.cuh"

namespace ett {
namespace codebook {
namespace {

constexpr char kOp[] = "ibq_cols";

// As in ibq_rows.cu.
template <int PARTS> using ColSweep = Sweep<128, 128, 64, 64, 3, PARTS, false, true>;
constexpr int kBlocks = 2;

struct Cols {
    Operand z, e;
    const float* smax;
    const float* rest_q;
    float* out;  // parts, codes
    float to_q;  // log2(e) / temperature
    int col_tiles, parts;
};

template <class S> __global__ void __launch_bounds__(S::kThreads, kBlocks) cols_kernel(const __grid_constant__ Cols a) {
    using Tile = typename S::Tile;
    constexpr int kParts = Tile::kRows / Tile::kWarpRows;
    ETT_DYNAMIC_SMEM(smem);
    const int part = int(blockIdx.x) / a.col_tiles;
    const int64_t col0 = int64_t(int(blockIdx.x) - part * a.col_tiles) * Tile::kCols, rows = a.z.m.rows;
    const Consecutive tiles = part_of((rows + Tile::kRows - 1) / Tile::kRows, part, a.parts);
    float sum[Tile::kAccCols] = {};
    Stream<S, Consecutive> stream(a.z, a.z, a.e, col0, tiles, smem);
#pragma unroll 1
    for (int n = 0; n < tiles.count(); ++n) {
        gemm::Acc<Tile> acc;
        stream.scores(acc);
        const int64_t row0 = int64_t(tiles[n]) * Tile::kRows;
#pragma unroll
        for (int i = 0; i < Tile::kAccRows; ++i) {
            const int64_t row = row0 + Tile::row(i);
            // An infinite maximum gives the scores of rows past the last token weight 0.
            const float max = row < rows ? a.smax[row] : INFINITY;
            if (!__any_sync(kAllLanes, (row_max(acc, i) - max) * a.to_q > kZero)) continue;
            const float inv = row < rows ? 1.f / (1.f + a.rest_q[row]) : 0.f;
#pragma unroll
            for (int j = 0; j < Tile::kAccCols; ++j) sum[j] += exp2_approx(above_floor((acc.at(i, j) - max) * a.to_q)) * inv;
        }
    }
    stream.end();

    float* const sums = reinterpret_cast<float*>(smem);
    __syncthreads();  // the tiles in this memory have been read
#pragma unroll
    for (int j = 0; j < Tile::kAccCols; ++j) {
#pragma unroll
        for (int d = 4; d < kWarp; d *= 2) sum[j] += __shfl_xor_sync(kAllLanes, sum[j], d);
        if (Tile::lane() < 4) sums[Tile::warp_row() / Tile::kWarpRows * Tile::kCols + Tile::col(j)] = sum[j];
    }
    __syncthreads();  // the warps' sums are visible
    for (int c = int(threadIdx.x); c < Tile::kCols && col0 + c < a.e.m.rows; c += Tile::kThreads) {
        float total = sums[c];
#pragma unroll
        for (int p = 1; p < kParts; ++p) total += sums[p * Tile::kCols + c];
        a.out[part * a.e.m.rows + col0 + c] = total;
    }
}

constexpr int kThreads = 256;

// col = the sum of the parts of a chunk of tokens, or col += that sum with `add`.
__global__ void __launch_bounds__(kThreads) add_parts_kernel(const float* parts, int count, float* col, int64_t codes, bool add) {
    const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (k >= codes) return;
    float total = add ? col[k] : 0.f;
    for (int p = 0; p < count; ++p) total += parts[p * codes + k];
    col[k] = total;
}

// ---- host ------------------------------------------------------------------------------------------------

constexpr int64_t kMostCodes = 1 << 20;
constexpr int64_t kTileTokens = ColSweep<1>::Tile::kRows, kTileCodes = ColSweep<1>::Tile::kCols;

int64_t slots() { return int64_t(multiprocessors()) * kBlocks; }

// The sizes of chunks and the layout of the workspace.
struct Space {
    Pieces pieces;
    Packing z, e;
    int64_t tokens, codes;  // per chunk
    bf16* packed_z;
    bf16* packed_e;
    float* parts;

    Space(const ett_ibq_cols_args& a, void* start)
        : pieces(start),
          z(a.z),
          e(a.e),
          tokens(chunk_rows(rows(a.z), z.bytes, kPackBytes, kTileTokens)),
          codes(std::min(kMostCodes, chunk_rows(rows(a.e), e.bytes, kPackBytes, kTileCodes))),
          packed_z(pieces.take<bf16>(tokens * z.bytes / 2)),
          packed_e(pieces.take<bf16>(codes * e.bytes / 2)),
          parts(pieces.take<float>(most_rows(codes, kTileCodes, slots()))) {}
};

bool sound(Check& check, const ett_ibq_cols_args* a) {
    return check.ok() && check_operands(check, a->z, a->e) && check.vector("smax", a->smax, ETT_F32, rows(a->z)) &&
           check.vector("rest_q", a->rest_q, ETT_F32, rows(a->z)) && check.vector("col", a->col, ETT_F32, rows(a->e)) &&
           check.require(a->temperature > 0, "temperature", "not above 0", "a number above 0");
}

template <int PARTS> int32_t run(const ett_ibq_cols_args& a, const ett_launch* l, const char* name) {
    using S = ColSweep<PARTS>;
    const Space s(a, l->workspace);
    const float to_q = float(double(kLog2e) / a.temperature);
    const int64_t m = rows(a.z), k = rows(a.e);
    int32_t status = ETT_OK;
    for (int64_t code = 0; code < k && status == ETT_OK; code += s.codes) {
        const int64_t codes = std::min(s.codes, k - code), col_tiles = ceil_div(codes, kTileCodes);
        Operand z, e;
        status = operand(kOp, a.e, s.e, code, codes, s.packed_e, e, l);
        for (int64_t token = 0; token < m && status == ETT_OK; token += s.tokens) {
            const int64_t tokens = std::min(s.tokens, m - token), parts = choose_parts(col_tiles, ceil_div(tokens, kTileTokens), slots());
            status = operand(kOp, a.z, s.z, token, tokens, s.packed_z, z, l);
            if (status != ETT_OK) break;
            const Cols c = {z, e, data<const float>(a.smax) + token, data<const float>(a.rest_q) + token, s.parts, to_q, int(col_tiles), int(parts)};
            status = launch(kOp, cols_kernel<S>, dim3(unsigned(col_tiles * parts)), dim3(S::kThreads), S::kSmem, l, c);
            if (status == ETT_OK)
                status = launch(kOp, add_parts_kernel, dim3(unsigned(ceil_div(codes, kThreads))), dim3(kThreads), 0, l, s.parts, int(parts),
                                data<float>(a.col) + code, codes, token > 0);
        }
    }
    return status == ETT_OK ? ett_done(name) : status;
}

}  // namespace
}  // namespace codebook
}  // namespace ett

extern "C" int64_t ett_ibq_cols_workspace(const ett_ibq_cols_args* a) {
    using namespace ett;
    using namespace ett::codebook;
    Check check(kOp, a);
    if (!sound(check, a)) return -1;
    return rows(a->z) == 0 ? 0 : Space(*a, nullptr).pieces.bytes();
}

extern "C" int32_t ett_ibq_cols(const ett_ibq_cols_args* a, const ett_launch* l) {
    using namespace ett;
    using namespace ett::codebook;
    Check check(kOp, a, l);
    if (!sound(check, a)) return check.status();
    if (rows(a->z) == 0) {
        const int32_t status = zero(kOp, a->col.ptr, size_t(rows(a->e)) * sizeof(float), l);
        return status == ETT_OK ? ett_done("") : status;
    }
    check.workspace(l, Space(*a, nullptr).pieces.bytes());
    const char* kernel = check.choose(l, {{"sweep", true}});
    if (!check.ok()) return check.status();
    return with_parts(a->z.dtype, [&](auto parts) { return run<parts>(*a, l, kernel); });
}
