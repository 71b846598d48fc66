// ibq_cols.cu: the probability of each code summed over all tokens, at the temperature of the entropies, in one sweep.
//
//   col_k = sum_m q_mk,   q_mk = exp((z_m . e_k - smax_m) / temperature) / (1 + rest_q_m)
//
// z       M,D  act  rows of any stride   in
// e       K,D  act  rows of any stride   in
// idx     M    i32  contiguous           in    of ibq_rows
// smax    M    f32  contiguous           in    of ibq_rows
// rest_q  M    f32  contiguous           in    of ibq_rows
// col     K    f32  contiguous           out   not divided by M, so that those of several ranks can be added
//
// A block has a tile of codes and sweeps a part of the tokens; a thread sums its own columns, and the threads' sums are
// added at the end. Parts are added in order. "hopper" (bf16): codes stay in registers, tokens stream through shared
// memory, products by wgmma; tiles of 128 tokens without weight besides their best codes are not multiplied.
// "hopper_split": the same for f32, by products of halves. "sweep": any device.
// numerics: scores as in scores.cuh, or ("hopper_split") hopper_split.cuh, with the same bits as smax; exponentials (2^-22)
// and sums in f32. A NaN score has weight 0. Exponentials that underflow to 0 are skipped, eight rows at a time. Bitwise
// repeatable.
// workspace: 4 bytes for each part of the tokens, for each of at most 2^20 codes; 9 bytes per token; packed copies of z and
// e if they need packing, at most 16 MiB each ("hopper_split": 16 MiB and 64 KiB).
// limits: D up to 512; "hopper" requires bf16, D up to 256 and rows at multiples of 16 bytes, "hopper_split" f32 and D up
// to 256.
// work: 2*M*K*D FLOP (f32 executes 12*M*K*D), one exponential per score; (M + K)*D*size bytes.
// papers: IBQ (2412.02692).
#include "hopper_split.cuh"
#include "operands.cuh"

namespace ett {
namespace codebook {
namespace {

constexpr char kOp[] = "ibq_cols";

// As in ibq_rows.cu.
template <int PARTS> using ColSweep = Sweep<128, 128, 64, 64, 3, PARTS, false, true>;
constexpr int kBlocks = 2;
constexpr int kColumns = 128;  // tokens of a tile

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

// What "hopper" needs of the tokens of a tile: q = 2^((s - max) to_q + log_q).
struct alignas(16) Columns {
    float max[kColumns], log_q[kColumns];
};

#ifndef ETT_SHIM
struct PackColumns {
    const int32_t* idx;
    const float* smax;
    const float* rest_q;
    Columns* columns;  // of all tiles; tokens past the last one get weight 0
    uint8_t* live;     // of each tile: whether any token has weight besides its best code
    float* col;
    int64_t tokens, codes;
};

// One block per tile. Tokens of the other tiles are added to col here, in any order, since sums of ones are exact.
__global__ void __launch_bounds__(kColumns) columns_kernel(const __grid_constant__ PackColumns a) {
    const int64_t m = int64_t(blockIdx.x) * kColumns + threadIdx.x;
    const bool there = m < a.tokens;
    const float max = there ? a.smax[m] : 0.f, rest = there ? a.rest_q[m] : 0.f;
    Columns& c = a.columns[blockIdx.x];
    c.max[threadIdx.x] = max;
    c.log_q[threadIdx.x] = there ? -log2f(1.f + rest) : -INFINITY;
    const bool live = __syncthreads_or(rest != 0.f) != 0;
    if (threadIdx.x == 0) a.live[blockIdx.x] = live;
    if (!live && there && fabsf(max) <= 3.402823466e38f && a.idx[m] >= 0 && a.idx[m] < a.codes) atomicAdd(a.col + a.idx[m], 1.f);
}

// "hopper": codes stay in registers, the live tiles of 128 tokens stream through shared memory; while a warpgroup
// processes the scores of one tile, the products of the next are under way.
template <int PANELS> struct HopperCols {
    static constexpr int kTile = PANELS * kColumns * kPanelRowBytes, kStages = PANELS == 4 ? 3 : 4;
    static constexpr size_t kSmem = 1024 + kStages * (kTile + sizeof(Columns) + 16);
};

template <int PANELS>
__global__ void __launch_bounds__(kSweepThreads, 1)
hopper_cols_kernel(const __grid_constant__ Tiles tokens, const Columns* columns, const uint8_t* live, const __grid_constant__ Cols a) {
#ifdef ETT_SM90A
    using S = HopperCols<PANELS>;
    ETT_DYNAMIC_SMEM(dynamic);
    unsigned char* const smem = panel_smem(dynamic);
    Columns* const columns_at = reinterpret_cast<Columns*>(smem + S::kStages * S::kTile);
    const uint32_t tiles_at = smem_address(smem), full = smem_address(columns_at + S::kStages), empty = full + 8 * S::kStages;
    const int part = int(blockIdx.x) / a.col_tiles;
    const int64_t col0 = int64_t(int(blockIdx.x) - part * a.col_tiles) * kSweepRows;
    const int tiles = int((a.z.m.rows + kColumns - 1) / kColumns);
    const Consecutive range = part_of(tiles, part, a.parts);
    if (threadIdx.x == 0) {
        for (int s = 0; s < S::kStages; ++s) {
            bar_init(full + 8 * s, 1);
            bar_init(empty + 8 * s, kConsumers / kWarp);
        }
        bar_init_done();
    }
    __syncthreads();  // the barriers are initialised
    const int count = count_live(live, 1, 0, range), pairs = (count + 1) / 2;

    const int group = __shfl_sync(kAllLanes, int(threadIdx.x) / kWarpgroup, 0);
    if (group == 2) {
        give_registers<24>();
        if (threadIdx.x / kWarp == kConsumers / kWarp && count > 0) {
            const bool lead = threadIdx.x % kWarp == 0;
            Ring<S::kStages> ring;
            auto copy = [&](int tile) {
                if (lead) {
                    const uint32_t bar = full + 8 * ring.slot;
                    bar_wait(empty + 8 * ring.slot, ring.parity ^ 1);
                    bar_expect(bar, S::kTile + sizeof(Columns));
                    load_tile<PANELS, kColumns>(tiles_at + ring.slot * S::kTile, tokens, bar, tile * kColumns);
                    bulk_load(smem_address(columns_at + ring.slot), columns + min(tile, tiles - 1), sizeof(Columns), bar);
                }
                __syncwarp();
                ring.next();
            };
            for_live(live, 1, 0, range, copy);
            // Zeros for a pair's missing half and for the product that is started after the last tile.
            for (int n = count; n < 2 * pairs + 1; ++n) copy(tiles);
        }
        return;
    }
    take_registers<240>();
    uint32_t e[PANELS * 4][4];
    load_fragments<PANELS>(e, a.e.m, col0 + group * 64);
    float sum[2] = {}, acc[2][kColumns / 2];
    Ring<S::kStages> next, done;
    auto issue = [&](int i) {
        bar_wait(full + 8 * next.slot, next.parity);
        products_begin();
        multiply<PANELS, kColumns>(acc[i], e, tiles_at + next.slot * S::kTile);
        products_end();
        next.next();
    };
    if (count > 0) issue(0);
#pragma unroll 1
    for (int n = 0; n < 2 * pairs; n += 2) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            products_wait<0>();
            pin(acc[i]);
            issue(1 - i);
            if (n + i < count) {
                const Columns& c = columns_at[done.slot];
#pragma unroll
                for (int j = 0; j < kColumns / 8; ++j) {
                    float max[2], log_q[2];
                    load<2>(max, c.max + 8 * j + acc_col(0));
                    load<2>(log_q, c.log_q + 8 * j + acc_col(0));
#pragma unroll
                    for (int r = 0; r < 2; ++r)
#pragma unroll
                        for (int h = 0; h < 2; ++h) sum[r] += exp2_approx(above_floor(fmaf(acc[i][4 * j + 2 * r + h] - max[h], a.to_q, log_q[h])));
                }
            }
            // The columns are read after the products of their tile, so the slot is free only now.
            __syncwarp();
            if (threadIdx.x % kWarp == 0) bar_arrive(empty + 8 * done.slot);
            done.next();
        }
    }
    products_wait<0>();
    put_rows(a.out + part * a.e.m.rows + col0 + group * 64, sum, a.e.m.rows - col0 - group * 64);
#endif
}

// "hopper_split": the same for f32, with scores by halves. What it needs of 64 tokens:
struct alignas(16) TokenNumbers {
    float max[kSide], log_q[kSide];
    Unscale unscale;
};
static_assert(kColumns == 2 * kSide);

struct SplitCols {
    gemm::Matrix<bf16> high;  // halves of the codes
    const Unscale* e_unscale;
    const Unscale* z_unscale;
    const Columns* columns;   // of the chunk of tokens
    const uint8_t* live;
    float* out;
    int64_t tokens, codes;    // of the chunks
    float to_q;
    int col_tiles, parts;
};

template <int PANELS>
__global__ void __launch_bounds__(kSweepThreads, 1)
split_cols_kernel(const __grid_constant__ CUtensorMap codes, const __grid_constant__ CUtensorMap tokens, const __grid_constant__ SplitCols a) {
#ifdef ETT_SM90A
    using S = SplitSmem<PANELS, 1, TokenNumbers>;
    ETT_DYNAMIC_SMEM(dynamic);
    const S smem = {panel_smem(dynamic)};
    const int part = int(blockIdx.x) / a.col_tiles;
    const int64_t col0 = int64_t(int(blockIdx.x) - part * a.col_tiles) * kSweepRows;
    const Consecutive range = part_of((a.tokens + kColumns - 1) / kColumns, part, a.parts);
    smem.init();
    __syncthreads();  // the barriers are initialised
    const int tiles = 2 * count_live(a.live, 1, 0, range);

    const int group = __shfl_sync(kAllLanes, int(threadIdx.x) / kWarpgroup, 0);
    if (group == 2) {
        give_registers<40>();
        if (threadIdx.x / kWarp == kConsumers / kWarp && tiles > 0) {
            const bool lead = threadIdx.x % kWarp == 0;
            if (lead) {
                bar_expect(smem.ready(), S::kResident);
                load_half<PANELS, kSweepRows>(smem.low(0), &codes, smem.ready(), int(col0), true);
            }
            SplitCopies<PANELS, S> copies = {smem};
            auto copy = [&](int t) {  // a tile of 64
                if (!lead) return;
                copies.tile(&tokens, t * kSide, false, sizeof(TokenNumbers), [&](int at, uint32_t bar) {
                    TokenNumbers& to = smem.numbers(at);
                    const Columns* const from = a.columns + t / 2;
                    bulk_load(smem_address(to.max), from->max + t % 2 * kSide, sizeof to.max, bar);
                    bulk_load(smem_address(to.log_q), from->log_q + t % 2 * kSide, sizeof to.log_q, bar);
                    bulk_load(smem_address(&to.unscale), a.z_unscale + t, sizeof to.unscale, bar);
                });
            };
            int last = 0;
            for_live(a.live, 1, 0, range, [&](int t) {
                copy(2 * t);
                copy(2 * t + 1);
                __syncwarp();
                last = 2 * t;
            });
            copy(last);  // for the product that is started after the last tile
        }
        return;
    }
    take_registers<232>();
    uint32_t high[PANELS * 4][4];
    load_fragments<PANELS>(high, a.high, col0 + group * 64);
    float by[2], sum[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) by[i] = a.e_unscale[(col0 + group * 64) / kSide].by[acc_row(i)];
    auto take = [&](float(&d)[kSide / 2], int, const TokenNumbers& t) {
        float s[kSide / 2];
        unscale_columns(s, d, by, t.unscale);
#pragma unroll
        for (int j = 0; j < kSide / 8; ++j) {
            float max[2], log_q[2];
            load<2>(max, t.max + 8 * j + acc_col(0));
            load<2>(log_q, t.log_q + 8 * j + acc_col(0));
#pragma unroll
            for (int n = 0; n < 4; ++n) sum[n / 2] += exp2_approx(above_floor(fmaf(s[4 * j + n] - max[n % 2], a.to_q, log_q[n % 2])));
        }
    };
    if (tiles > 0) split_sweep<PANELS, true>(smem, high, group, tiles, take);
    put_rows(a.out + part * a.codes + col0 + group * 64, sum, a.codes - col0 - group * 64);
#endif
}
#endif  // ETT_SHIM

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
    Columns* columns;
    uint8_t* live;
    float* parts;

    Space(const ett_ibq_cols_args& a, void* start)
        : pieces(start),
          z(a.z),
          e(a.e),
          tokens(chunk_rows(rows(a.z), z.bytes, kPackBytes, kTileTokens)),
          codes(std::min(kMostCodes, chunk_rows(rows(a.e), e.bytes, kPackBytes, kTileCodes))),
          packed_z(pieces.take<bf16>(tokens * z.bytes / 2)),
          packed_e(pieces.take<bf16>(codes * e.bytes / 2)),
          columns(pieces.take<Columns>(ceil_div(tokens, kColumns))),
          live(pieces.take<uint8_t>(ceil_div(tokens, kColumns))),
          parts(pieces.take<float>(most_rows(codes, kTileCodes, slots()))) {}
};

bool sound(Check& check, const ett_ibq_cols_args* a) {
    return check.ok() && check_operands(check, a->z, a->e) && check.vector("idx", a->idx, ETT_I32, rows(a->z)) && check.vector("smax", a->smax, ETT_F32, rows(a->z)) &&
           check.vector("rest_q", a->rest_q, ETT_F32, rows(a->z)) && check.vector("col", a->col, ETT_F32, rows(a->e)) &&
           check.require(a->temperature > 0, "temperature", "not above 0", "a number above 0");
}

// Prepares "hopper" and "hopper_split": packs the columns, and begins col with the tokens that need no sweep.
int32_t begin_hopper(const ett_ibq_cols_args& a, Columns* columns, uint8_t* live, const ett_launch* l) {
#ifdef ETT_SHIM
    (void)a, (void)columns, (void)live, (void)l;
    return ETT_UNSUPPORTED;
#else
    const PackColumns pack = {data<const int32_t>(a.idx), data<const float>(a.smax), data<const float>(a.rest_q), columns, live, data<float>(a.col),
                              rows(a.z),                  rows(a.e)};
    const int32_t status = zero(kOp, a.col.ptr, size_t(pack.codes) * sizeof(float), l);
    return status == ETT_OK ? launch(kOp, columns_kernel, dim3(unsigned(ceil_div(pack.tokens, kColumns))), dim3(kColumns), 0, l, pack) : status;
#endif
}

// Launches "hopper" for a chunk of codes.
int32_t launch_hopper(const Cols& c, const Space& s, const ett_launch* l) {
#ifdef ETT_SHIM
    (void)c, (void)s, (void)l;
    return ETT_UNSUPPORTED;
#else
    static_assert(kTileCodes == kSweepRows && kTileTokens == kColumns, "the same tiles as the portable sweep");
    return with_panels(c.z.m.cols, [&](auto panels) {
        using S = HopperCols<panels>;
        Tiles tiles;
        const int32_t status = make_tiles(kOp, &tiles, c.z.m.p, c.z.m.rows, c.z.m.cols, c.z.m.ld, kColumns);
        if (status != ETT_OK) return status;
        return launch(kOp, hopper_cols_kernel<panels>, dim3(unsigned(c.col_tiles * c.parts)), dim3(kSweepThreads), S::kSmem, l, tiles, s.columns, s.live, c);
    });
#endif
}

#ifdef ETT_SHIM
int32_t run_split(const ett_ibq_cols_args&, const ett_launch*) { return ETT_UNSUPPORTED; }
#else
// "hopper_split".
struct SplitSpace {
    static constexpr int64_t kMost = 16384;  // tokens or codes of a chunk

    Pieces pieces;
    int64_t width, tokens, codes;
    uint16_t* z;
    uint16_t* e;
    Unscale* z_unscale;
    Unscale* e_unscale;
    Columns* columns;
    uint8_t* live;
    float* parts;

    SplitSpace(const ett_ibq_cols_args& a, void* start)
        : pieces(start),
          width(split_width(cols(a.z))),
          tokens(equal_chunks(rows(a.z), kMost, kSweepRows)),
          codes(equal_chunks(rows(a.e), kMost, kSweepRows)),
          z(pieces.take<uint16_t>(tokens * 2 * width)),
          e(pieces.take<uint16_t>(codes * 2 * width)),
          z_unscale(pieces.take<Unscale>(tokens / kSide)),
          e_unscale(pieces.take<Unscale>(codes / kSide)),
          columns(pieces.take<Columns>(ceil_div(rows(a.z), kColumns))),
          live(pieces.take<uint8_t>(ceil_div(rows(a.z), kColumns))),
          parts(pieces.take<float>(most_rows(codes, kSweepRows, multiprocessors()))) {}
};

int32_t run_split(const ett_ibq_cols_args& a, const ett_launch* l) {
    const SplitSpace s(a, l->workspace);
    const float to_q = float(double(kLog2e) / a.temperature);
    const int64_t m = rows(a.z), k = rows(a.e);
    int32_t status = begin_hopper(a, s.columns, s.live, l);
    for (int64_t token = 0; token < m && status == ETT_OK; token += s.tokens) {
        const int64_t tokens = std::min(s.tokens, m - token), padded = round_up(tokens, kColumns);
        status = launch_split_pack(kOp, {rows_of(a.z, token, tokens), s.z, nullptr, nullptr, s.z_unscale, nullptr, s.width, padded}, l);
        CUtensorMap z_map, e_map;
        if (status == ETT_OK) status = make_split_map(kOp, &z_map, s.z, tokens, s.width, kSide);
        for (int64_t code = 0; code < k && status == ETT_OK; code += s.codes) {
            const int64_t codes = std::min(s.codes, k - code), col_tiles = ceil_div(codes, kSweepRows);
            const int64_t parts = choose_parts(col_tiles, padded / kColumns, multiprocessors());
            status = launch_split_pack(kOp, {rows_of(a.e, code, codes), s.e, nullptr, nullptr, s.e_unscale, nullptr, s.width, col_tiles * kSweepRows}, l);
            if (status == ETT_OK) status = make_split_map(kOp, &e_map, s.e, codes, s.width, kSweepRows);
            if (status != ETT_OK) break;
            const SplitCols c = {high_of(s.e, codes, s.width), s.e_unscale, s.z_unscale, s.columns + token / kColumns, s.live + token / kColumns, s.parts, tokens,
                                 codes, to_q, int(col_tiles), int(parts)};
            status = with_panels(s.width, [&](auto panels) {
                return launch(kOp, split_cols_kernel<panels>, dim3(unsigned(col_tiles * parts)), dim3(kSweepThreads), SplitSmem<panels, 1, TokenNumbers>::kBytes, l,
                              e_map, z_map, c);
            });
            if (status == ETT_OK)
                status = launch(kOp, add_parts_kernel, dim3(unsigned(ceil_div(codes, kThreads))), dim3(kThreads), 0, l, s.parts, int(parts),
                                data<float>(a.col) + code, codes, true);
        }
    }
    return status;
}
#endif  // ETT_SHIM

// Bytes of workspace of an implementation.
int64_t workspace_bytes(const ett_ibq_cols_args& a, bool split) {
#ifndef ETT_SHIM
    if (split) return SplitSpace(a, nullptr).pieces.bytes();
#endif
    (void)split;
    return Space(a, nullptr).pieces.bytes();
}

template <int PARTS> int32_t run(const ett_ibq_cols_args& a, const ett_launch* l, const char* name) {
    using S = ColSweep<PARTS>;
    const Space s(a, l->workspace);
    const bool hopper = strcmp(name, "hopper") == 0;
    const float to_q = float(double(kLog2e) / a.temperature);
    const int64_t m = rows(a.z), k = rows(a.e);
    int32_t status = hopper ? begin_hopper(a, s.columns, s.live, l) : ETT_OK;
    for (int64_t code = 0; code < k && status == ETT_OK; code += s.codes) {
        const int64_t codes = std::min(s.codes, k - code), col_tiles = ceil_div(codes, kTileCodes);
        Operand z, e;
        status = operand(kOp, a.e, s.e, code, codes, s.packed_e, e, l);
        for (int64_t token = 0; token < m && status == ETT_OK; token += s.tokens) {
            const int64_t tokens = std::min(s.tokens, m - token), parts = choose_parts(col_tiles, ceil_div(tokens, kTileTokens), hopper ? multiprocessors() : slots());
            status = operand(kOp, a.z, s.z, token, tokens, s.packed_z, z, l);
            if (status != ETT_OK) break;
            const Cols c = {z, e, data<const float>(a.smax) + token, data<const float>(a.rest_q) + token, s.parts, to_q, int(col_tiles), int(parts)};
            status = hopper ? launch_hopper(c, s, l) : launch(kOp, cols_kernel<S>, dim3(unsigned(col_tiles * parts)), dim3(S::kThreads), S::kSmem, l, c);
            if (status == ETT_OK)
                status = launch(kOp, add_parts_kernel, dim3(unsigned(ceil_div(codes, kThreads))), dim3(kThreads), 0, l, s.parts, int(parts),
                                data<float>(a.col) + code, codes, hopper || token > 0);
        }
    }
    return status;
}

}  // namespace
}  // namespace codebook
}  // namespace ett

extern "C" int64_t ett_ibq_cols_workspace(const ett_ibq_cols_args* a) {
    using namespace ett;
    using namespace ett::codebook;
    Check check(kOp, a);
    if (!sound(check, a)) return -1;
    if (rows(a->z) == 0) return 0;
    return std::max(workspace_bytes(*a, false), split_planned(a->z, a->e) ? workspace_bytes(*a, true) : 0);
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
    const char* kernel = check.choose(l, {{"hopper", hopper_fits(a->z, a->e)}, {"hopper_split", split_fits(a->z, a->e)}, {"sweep", true}});
    const bool split = strcmp(kernel, "hopper_split") == 0;
    check.workspace(l, workspace_bytes(*a, split));
    if (!check.ok()) return check.status();
    const int32_t status = split ? run_split(*a, l) : with_parts(a->z.dtype, [&](auto parts) { return run<parts>(*a, l, kernel); });
    return status == ETT_OK ? ett_done(kernel) : status;
}
