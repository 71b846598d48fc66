// ibq_rows.cu: the best code of each token and the statistics of its row of scores, in one sweep over the codes.
//
//   s_j = z_m . e_j,  t = the first j with the largest s_j,  x_j = (s_j - s_t) / temperature
//   rest_p = sum_{j != t} exp(s_j - s_t),  rest_q = sum_{j != t} exp(x_j),  xbar = sum_{j != t} exp(x_j) x_j / (1 + rest_q)
//
// z       M,D  act  rows of any stride   in
// e       K,D  act  rows of any stride   in
// idx     M    i32  contiguous           out   t
// smax    M    f32  contiguous           out   s_t
// rest_p  M    f32  contiguous           out
// rest_q  M    f32  contiguous           out   may be absent
// xbar    M    f32  contiguous           out   present if rest_q is
// bad     1    f32                       added to: the number of tokens whose s_t is not finite
//
// A NaN score ranks below every number and has weight 0; a token whose scores are all NaN gets code 0. A block has a
// tile of tokens and sweeps a part of the codes. The best code so far is kept out of the sums; when a better one is
// found, the old one is added to them and they are rescaled to the new maximum (docs/quantizer.md). A thread holds the
// sums over its own columns; four lanes share a row and its best code. Parts are combined in order.
// "hopper" (bf16): tokens stay in registers, codes stream through shared memory, products by wgmma. "hopper_split": the
// same for f32, by products of halves. "sweep": any device.
// numerics: scores as in scores.cuh, or ("hopper_split") hopper_split.cuh; sums and exponentials (2^-22) in f32; scores are
// subtracted before the division by the temperature; ties go to the smallest index. Exponentials that underflow to 0 are
// skipped, eight rows at a time. Bitwise repeatable.
// workspace: 20 bytes, and 20 for each part of the codes, for each of at most 65,536 tokens; packed copies of z and e
// if they need packing, at most 16 MiB each ("hopper_split": 16 MiB and 64 KiB).
// limits: D up to 512; "hopper" requires bf16, D up to 256 and rows at multiples of 16 bytes, "hopper_split" f32 and D up
// to 256.
// work: 2*M*K*D FLOP (f32 executes 12*M*K*D), one exponential per score (two with rest_q); (M + K)*D*size bytes.
// papers: IBQ (2412.02692).
#include "bad.cuh"
#include "hopper_split.cuh"
#include "operands.cuh"

namespace ett {
namespace codebook {
namespace {

constexpr char kOp[] = "ibq_rows";

// 64 x 64 scores per warp; two blocks of four warps per multiprocessor, so that one computes products while the other
// processes its scores.
template <int PARTS> using RowSweep = Sweep<128, 128, 64, 64, 3, PARTS, false, false>;
constexpr int kBlocks = 2;

// Statistics of a row over some codes: best score v and its code k, and w = sum of x * 2^x over the other codes, where
// x is the exponent of base 2.
struct Stats {
    float v, rest_p, rest_q, w;
    int32_t k;
};

// The statistics of many rows, as one array per member.
struct StatsOf {
    float* v;
    float* rest_p;
    float* rest_q;
    float* w;
    int32_t* k;

    __host__ __device__ StatsOf operator+(int64_t n) const { return {v + n, rest_p + n, rest_q + n, w + n, k + n}; }
    __device__ __forceinline__ Stats get(int64_t i) const { return {v[i], rest_p[i], rest_q[i], w[i], k[i]}; }
    __device__ __forceinline__ void put(int64_t i, const Stats& s) const {
        v[i] = s.v, rest_p[i] = s.rest_p, rest_q[i] = s.rest_q, w[i] = s.w, k[i] = s.k;
    }
};

// Combines the statistics over two sets of codes. `to_q`: log2(e) / temperature.
__device__ __forceinline__ Stats join(const Stats& a, const Stats& b, float to_q) {
    const bool second = b.v > a.v || (b.v == a.v && b.k < a.k);
    const float v = second ? b.v : a.v, other = second ? a.v : b.v, gap = other - v, x = above_floor(gap * to_q);
    // The other best code, if there is one, becomes one of the rest.
    const float one = other > -INFINITY ? 1.f : 0.f, p = exp2_approx(above_floor(gap * kLog2e)), q = exp2_approx(x);
    const float more_q = (second ? a.rest_q : b.rest_q) + one;
    Stats s;
    s.v = v;
    s.k = second ? b.k : a.k;
    s.rest_p = (second ? b.rest_p : a.rest_p) + p * ((second ? a.rest_p : b.rest_p) + one);
    s.rest_q = (second ? b.rest_q : a.rest_q) + q * more_q;
    s.w = (second ? b.w : a.w) + q * ((second ? a.w : b.w) + x * more_q);
    return s;
}

// Synchronises the threads that hold a tile: the whole block, or (hopper_scores.cuh) the two warpgroups that multiply.
template <class Tile> __device__ __forceinline__ void synchronize(Tile) { __syncthreads(); }

// The running statistics of a thread's rows: v and k are the same in the four lanes that share a row, the sums are over the
// thread's own columns.
template <class Tile, bool ENTROPY> struct Running {
    float v[Tile::kAccRows], rest_p[Tile::kAccRows], rest_q[ENTROPY ? Tile::kAccRows : 1], w[ENTROPY ? Tile::kAccRows : 1];
    int32_t k[Tile::kAccRows];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < Tile::kAccRows; ++i) {
            v[i] = -INFINITY;
            rest_p[i] = 0.f;
            if constexpr (ENTROPY) rest_q[i] = w[i] = 0.f;
            k[i] = 0;
        }
    }

    // Adds the scores of codes [code0, code0 + kCols); only the first `codes` of these exist.
    template <class Acc> __device__ __forceinline__ void take(Acc& acc, int32_t code0, int64_t codes, float to_q) {
        const int32_t mine = code0 + Tile::col(0);
        if (codes < Tile::kCols) {
#pragma unroll
            for (int j = 0; j < Tile::kAccCols; ++j) {
                if (Tile::col(j) < codes) continue;
#pragma unroll
                for (int i = 0; i < Tile::kAccRows; ++i) acc.at(i, j) = -INFINITY;
            }
        }
#pragma unroll
        for (int i = 0; i < Tile::kAccRows; ++i) {
            float top = row_max(acc, i);
            if (__any_sync(kAllLanes, top > v[i])) rise(acc, i, mine, to_q);
            top -= v[i];
            // Skips the row too if `top` is NaN, which means that all its scores are.
            if (!__any_sync(kAllLanes, top * kLog2e > kZero)) continue;
            const bool both = ENTROPY && __any_sync(kAllLanes, top * to_q > kZero);
            float sum_p = 0.f, sum_q = 0.f, sum_w = 0.f;
            if (both) {
#pragma unroll
                for (int j = 0; j < Tile::kAccCols; ++j) {
                    const float d = fmaxf(acc.at(i, j) - v[i], kNoWeight), x = d * to_q, e = exp2_approx(x);
                    sum_p += exp2_approx(d * kLog2e);
                    sum_q += e;
                    sum_w = fmaf(e, x, sum_w);
                }
            } else {
#pragma unroll
                for (int j = 0; j < Tile::kAccCols; ++j) sum_p += exp2_approx(fmaxf(acc.at(i, j) - v[i], kNoWeight) * kLog2e);
            }
            rest_p[i] += sum_p;
            if constexpr (ENTROPY) {
                rest_q[i] += sum_q;
                w[i] += sum_w;
            }
        }
    }

    // Finds the best code of row i among the previous ones and those of the tile. If it is a new one, the old best code
    // is added to the sums, the sums are rescaled to the new maximum, and its score is removed from the tile.
    template <class Acc> __device__ __forceinline__ void rise(Acc& acc, int i, int32_t mine, float to_q) {
        float best = v[i];
        int at = -1;
#pragma unroll
        for (int j = 0; j < Tile::kAccCols; ++j) {
            const bool more = acc.at(i, j) > best;
            best = more ? acc.at(i, j) : best;
            at = more ? j / 2 * 8 + j % 2 : at;
        }
        int32_t code = at < 0 ? k[i] : mine + at;
#pragma unroll
        for (int d = 1; d <= 2; d *= 2) {
            const float other = __shfl_xor_sync(kAllLanes, best, d);
            const int32_t its = __shfl_xor_sync(kAllLanes, code, d);
            if (other > best || (other == best && its < code)) best = other, code = its;
        }
        if (!(best > v[i])) return;
        const float gap = v[i] - best, x = above_floor(gap * to_q), p = exp2_approx(above_floor(gap * kLog2e));
        // Only one of the four lanes adds the old best code, if there is one.
        const float old = Tile::lane() % 4 == 0 && v[i] > -INFINITY ? 1.f : 0.f;
        rest_p[i] = (rest_p[i] + old) * p;
        if constexpr (ENTROPY) {
            const float q = exp2_approx(x);
            w[i] = q * (w[i] + x * (rest_q[i] + old));
            rest_q[i] = (rest_q[i] + old) * q;
        }
        v[i] = best;
        k[i] = code;
        if (at >= 0 && code == mine + at) {
#pragma unroll
            for (int j = 0; j < Tile::kAccCols; ++j)
                if (at == j / 2 * 8 + j % 2) acc.at(i, j) = -INFINITY;
        }
    }

    // Combines the lanes and warps that share rows, and writes the statistics over the block's codes. `smem` holds
    // kRows * kCols / kWarpCols Stats.
    __device__ __forceinline__ void finish(const StatsOf& out, int64_t row0, int64_t rows, float to_q, unsigned char* smem) {
        constexpr int kParts = Tile::kCols / Tile::kWarpCols;
        Stats* const all = reinterpret_cast<Stats*>(smem);
        synchronize(Tile{});  // the tiles in this memory have been read
#pragma unroll
        for (int i = 0; i < Tile::kAccRows; ++i) {
            Stats s = {v[i], rest_p[i], 0.f, 0.f, k[i]};
            if constexpr (ENTROPY) s.rest_q = rest_q[i], s.w = w[i];
#pragma unroll
            for (int d = 1; d <= 2; d *= 2) {
                s.rest_p += __shfl_xor_sync(kAllLanes, s.rest_p, d);
                s.rest_q += __shfl_xor_sync(kAllLanes, s.rest_q, d);
                s.w += __shfl_xor_sync(kAllLanes, s.w, d);
            }
            if (Tile::lane() % 4 == 0) all[Tile::warp_col() / Tile::kWarpCols * Tile::kRows + Tile::row(i)] = s;
        }
        synchronize(Tile{});  // the warps' results are visible
        for (int r = int(threadIdx.x); r < Tile::kRows && row0 + r < rows; r += Tile::kThreads) {
            Stats s = all[r];
#pragma unroll
            for (int p = 1; p < kParts; ++p) s = join(s, all[p * Tile::kRows + r], to_q);
            out.put(row0 + r, s);
        }
    }
};

struct Rows {
    Operand z, e;
    StatsOf out;     // parts, tokens
    int32_t code0;   // index of the first code of e
    float to_q;
    int row_tiles, parts;
};

template <class S, bool ENTROPY> __global__ void __launch_bounds__(S::kThreads, kBlocks) rows_kernel(const __grid_constant__ Rows a) {
    using Tile = typename S::Tile;
    ETT_DYNAMIC_SMEM(smem);
    const int part = int(blockIdx.x) / a.row_tiles;
    const int64_t row0 = int64_t(int(blockIdx.x) - part * a.row_tiles) * Tile::kRows;
    const Consecutive tiles = part_of((a.e.m.rows + Tile::kCols - 1) / Tile::kCols, part, a.parts);
    Running<Tile, ENTROPY> stats;
    stats.clear();
    Stream<S, Consecutive> stream(a.z, a.z, a.e, row0, tiles, smem);
#pragma unroll 1
    for (int n = 0; n < tiles.count(); ++n) {
        gemm::Acc<Tile> acc;
        stream.scores(acc);
        const int64_t code = int64_t(tiles[n]) * Tile::kCols;
        stats.take(acc, a.code0 + int32_t(code), a.e.m.rows - code, a.to_q);
    }
    stream.end();
    stats.finish(a.out + part * a.z.m.rows, row0, a.z.m.rows, a.to_q, smem);
}

#ifndef ETT_SHIM
// "hopper": tokens stay in registers, tiles of 128 codes stream through shared memory; while a warpgroup processes the
// scores of one tile, the products of the next are under way.
template <int PANELS> struct HopperRows {
    static constexpr int kCols = 128, kTile = PANELS * kCols * kPanelRowBytes, kStages = PANELS == 4 ? 3 : 4;
    static constexpr size_t kSmem = 1024 + kStages * kTile + 16 * kStages;
};

template <int PANELS, bool ENTROPY>
__global__ void __launch_bounds__(kSweepThreads, 1) hopper_rows_kernel(const __grid_constant__ Tiles codes, const __grid_constant__ Rows a) {
#ifdef ETT_SM90A
    using S = HopperRows<PANELS>;
    using Tile = WarpgroupTile<S::kCols>;
    ETT_DYNAMIC_SMEM(dynamic);
    unsigned char* const smem = panel_smem(dynamic);
    const uint32_t tiles_at = smem_address(smem), full = tiles_at + S::kStages * S::kTile, empty = full + 8 * S::kStages;
    const int part = int(blockIdx.x) / a.row_tiles;
    const int64_t row0 = int64_t(int(blockIdx.x) - part * a.row_tiles) * kSweepRows;
    const Consecutive range = part_of((a.e.m.rows + S::kCols - 1) / S::kCols, part, a.parts);
    const int pairs = (range.count() + 1) / 2, copies = 2 * pairs + 1;  // copies past the last code bring zeros
    if (threadIdx.x == 0) {
        for (int s = 0; s < S::kStages; ++s) {
            bar_init(full + 8 * s, 1);
            bar_init(empty + 8 * s, 2);
        }
        bar_init_done();
    }
    __syncthreads();  // the barriers are initialised

    const int group = __shfl_sync(kAllLanes, int(threadIdx.x) / kWarpgroup, 0);
    if (group == 2) {
        give_registers<24>();
        if (threadIdx.x == kConsumers) {
            Ring<S::kStages> ring;
            for (int n = 0; n < copies; ++n, ring.next()) {
                bar_wait(empty + 8 * ring.slot, ring.parity ^ 1);
                bar_expect(full + 8 * ring.slot, S::kTile);
                load_tile<PANELS, S::kCols>(tiles_at + ring.slot * S::kTile, codes, full + 8 * ring.slot, (range.first + n) * S::kCols);
            }
        }
        return;
    }
    take_registers<240>();
    uint32_t z[PANELS * 4][4];
    load_fragments<PANELS>(z, a.z.m, row0 + group * 64);
    Running<Tile, ENTROPY> stats;
    stats.clear();
    WarpgroupAcc<S::kCols> acc[2];
    Ring<S::kStages> next, done;
    auto issue = [&](int i) {
        bar_wait(full + 8 * next.slot, next.parity);
        products_begin();
        multiply<PANELS, S::kCols>(acc[i].d, z, tiles_at + next.slot * S::kTile);
        products_end();
        next.next();
    };
    auto finish = [&](int i) {
        products_wait<0>();
        pin(acc[i].d);
        if (threadIdx.x % kWarpgroup == 0) bar_arrive(empty + 8 * done.slot);
        done.next();
    };
    issue(0);
#pragma unroll 1
    for (int n = 0; n < 2 * pairs; n += 2) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            finish(i);
            issue(1 - i);
            const int64_t code = int64_t(range.first + n + i) * S::kCols;
            // A pair may reach past the end of this part.
            stats.take(acc[i], a.code0 + int32_t(code), n + i < range.count() ? a.e.m.rows - code : 0, a.to_q);
        }
    }
    finish(0);
    stats.finish(a.out + part * a.z.m.rows, row0, a.z.m.rows, a.to_q, smem);
#endif
}

// "hopper_split": the same for f32, with scores by halves.
struct SplitRows {
    gemm::Matrix<bf16> high;   // halves of the tokens
    const Unscale* z_unscale;
    const Unscale* e_unscale;
    StatsOf out;
    int64_t tokens, codes;     // of the chunk
    int32_t code0;
    float to_q;
    int row_tiles, parts;
};

template <int PANELS, bool ENTROPY>
__global__ void __launch_bounds__(kSweepThreads, 1)
split_rows_kernel(const __grid_constant__ CUtensorMap tokens, const __grid_constant__ CUtensorMap codes, const __grid_constant__ SplitRows a) {
#ifdef ETT_SM90A
    using S = SplitSmem<PANELS, 1, Unscale>;
    using Tile = WarpgroupTile<kSide>;
    ETT_DYNAMIC_SMEM(dynamic);
    const S smem = {panel_smem(dynamic)};
    const int part = int(blockIdx.x) / a.row_tiles;
    const int64_t row0 = int64_t(int(blockIdx.x) - part * a.row_tiles) * kSweepRows;
    const Consecutive range = part_of((a.codes + kSide - 1) / kSide, part, a.parts);
    const int tiles = (range.count() + 1) / 2 * 2;
    smem.init();
    __syncthreads();  // the barriers are initialised

    const int group = __shfl_sync(kAllLanes, int(threadIdx.x) / kWarpgroup, 0);
    if (group == 2) {
        give_registers<40>();
        if (threadIdx.x == kConsumers) {
            bar_expect(smem.ready(), S::kResident);
            load_half<PANELS, kSweepRows>(smem.low(0), &tokens, smem.ready(), int(row0), true);
            SplitCopies<PANELS, S> copies = {smem};
            for (int n = 0; n <= tiles; ++n) {
                const int t = range.first + n;
                copies.tile(&codes, t * kSide, true, sizeof(Unscale), [&](int at, uint32_t bar) {
                    bulk_load(smem_address(&smem.numbers(at)), a.e_unscale + min(t, range.end - 1), sizeof(Unscale), bar);
                });
            }
        }
        return;
    }
    take_registers<232>();
    uint32_t high[PANELS * 4][4];
    load_fragments<PANELS>(high, a.high, row0 + group * 64);
    float by[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) by[i] = a.z_unscale[(row0 + group * 64) / kSide].by[acc_row(i)];
    Running<Tile, ENTROPY> stats;
    stats.clear();
    split_sweep<PANELS, false>(smem, high, group, tiles, [&](float(&d)[kSide / 2], int n, const Unscale& e) {
        WarpgroupAcc<kSide> acc;
        unscale_columns(acc.d, d, by, e);
        const int64_t code = int64_t(range.first + n) * kSide;
        // The last pair may reach past the end of this part.
        stats.take(acc, a.code0 + int32_t(code), n < range.count() ? a.codes - code : 0, a.to_q);
    });
    stats.finish(a.out + part * a.tokens, row0, a.tokens, a.to_q, smem.smem);
#endif
}
#endif  // ETT_SHIM

constexpr int kThreads = 256;

// The outputs, beginning at the first token of a chunk; rest_q and xbar may be null.
struct Outputs {
    int32_t* idx;
    float* smax;
    float* rest_p;
    float* rest_q;
    float* xbar;
};

// Combines the parts of a chunk of codes with the previous chunks. `first`: there is no previous chunk; `last`: this is
// the last one, so the outputs are written.
__global__ void __launch_bounds__(kThreads)
join_kernel(const StatsOf parts, int count, const StatsOf state, int64_t rows, float to_q, bool first, bool last, const Outputs out) {
    const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (row >= rows) return;
    Stats s = first ? Stats{-INFINITY, 0.f, 0.f, 0.f, 0} : state.get(row);
    for (int p = 0; p < count; ++p) s = join(s, parts.get(p * rows + row), to_q);
    state.put(row, s);
    if (!last) return;
    out.idx[row] = s.k;
    out.smax[row] = s.v;
    out.rest_p[row] = s.rest_p;
    if (!out.rest_q) return;
    out.rest_q[row] = s.rest_q;
    out.xbar[row] = kLn2 * s.w / (1.f + s.rest_q);
}

// ---- host ------------------------------------------------------------------------------------------------

constexpr int64_t kMostTokens = 65536;
constexpr int64_t kTileTokens = RowSweep<1>::Tile::kRows, kTileCodes = RowSweep<1>::Tile::kCols;

int64_t slots() { return int64_t(multiprocessors()) * kBlocks; }

StatsOf take_stats(Pieces& pieces, int64_t n) {
    StatsOf s;
    s.v = pieces.take<float>(n), s.rest_p = pieces.take<float>(n), s.rest_q = pieces.take<float>(n), s.w = pieces.take<float>(n);
    s.k = pieces.take<int32_t>(n);
    return s;
}

// The outputs of the tokens from `token` on.
Outputs outputs(const ett_ibq_rows_args& a, int64_t token) {
    const bool entropy = present(a.rest_q);
    return {data<int32_t>(a.idx) + token, data<float>(a.smax) + token, data<float>(a.rest_p) + token, entropy ? data<float>(a.rest_q) + token : nullptr,
            entropy ? data<float>(a.xbar) + token : nullptr};
}

// The sizes of chunks and the layout of the workspace.
struct Space {
    Pieces pieces;
    Packing z, e;
    int64_t tokens, codes;  // per chunk
    bf16* packed_z;
    bf16* packed_e;
    StatsOf parts, state;

    Space(const ett_ibq_rows_args& a, void* start)
        : pieces(start),
          z(a.z),
          e(a.e),
          tokens(std::min(kMostTokens, chunk_rows(rows(a.z), z.bytes, kPackBytes, kTileTokens))),
          codes(chunk_rows(rows(a.e), e.bytes, kPackBytes, kTileCodes)),
          packed_z(pieces.take<bf16>(tokens * z.bytes / 2)),
          packed_e(pieces.take<bf16>(codes * e.bytes / 2)),
          parts(take_stats(pieces, most_rows(tokens, kTileTokens, slots()))),
          state(take_stats(pieces, tokens)) {}
};

bool sound(Check& check, const ett_ibq_rows_args* a) {
    if (!check.ok() || !check_operands(check, a->z, a->e)) return false;
    const int64_t m = rows(a->z);
    check.vector("idx", a->idx, ETT_I32, m);
    check.vector("smax", a->smax, ETT_F32, m);
    check.vector("rest_p", a->rest_p, ETT_F32, m);
    check.all_or_none({{"rest_q", &a->rest_q}, {"xbar", &a->xbar}});
    if (present(a->rest_q)) {
        check.vector("rest_q", a->rest_q, ETT_F32, m);
        check.vector("xbar", a->xbar, ETT_F32, m);
        check.require(a->temperature > 0, "temperature", "not above 0", "a number above 0");
    }
    check.vector("bad", a->bad, ETT_F32, 1);
    return check.ok();
}

// Launches "hopper" for a chunk of tokens and codes.
int32_t launch_hopper(const Rows& r, bool entropy, const ett_launch* l) {
#ifdef ETT_SHIM
    (void)r, (void)entropy, (void)l;
    return ETT_UNSUPPORTED;
#else
    static_assert(kTileTokens == kSweepRows && kTileCodes == HopperRows<1>::kCols, "the same tiles as the portable sweep");
    return with_panels(r.e.m.cols, [&](auto panels) {
        using S = HopperRows<panels>;
        Tiles tiles;
        const int32_t status = make_tiles(kOp, &tiles, r.e.m.p, r.e.m.rows, r.e.m.cols, r.e.m.ld, S::kCols);
        if (status != ETT_OK) return status;
        return launch(kOp, entropy ? hopper_rows_kernel<panels, true> : hopper_rows_kernel<panels, false>, dim3(unsigned(r.row_tiles * r.parts)),
                      dim3(kSweepThreads), S::kSmem, l, tiles, r);
    });
#endif
}

#ifdef ETT_SHIM
int32_t run_split(const ett_ibq_rows_args&, const ett_launch*) { return ETT_UNSUPPORTED; }
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
    StatsOf parts, state;

    SplitSpace(const ett_ibq_rows_args& a, void* start)
        : pieces(start),
          width(split_width(cols(a.z))),
          tokens(equal_chunks(rows(a.z), kMost, kSweepRows)),
          codes(equal_chunks(rows(a.e), kMost, kSweepRows)),
          z(pieces.take<uint16_t>(tokens * 2 * width)),
          e(pieces.take<uint16_t>(codes * 2 * width)),
          z_unscale(pieces.take<Unscale>(tokens / kSide)),
          e_unscale(pieces.take<Unscale>(codes / kSide)),
          parts(take_stats(pieces, most_rows(tokens, kSweepRows, multiprocessors()))),
          state(take_stats(pieces, tokens)) {}
};

int32_t run_split(const ett_ibq_rows_args& a, const ett_launch* l) {
    const SplitSpace s(a, l->workspace);
    const bool entropy = present(a.rest_q);
    const float to_q = entropy ? float(double(kLog2e) / a.temperature) : 0.f;
    const int64_t m = rows(a.z), k = rows(a.e);
    int32_t status = ETT_OK;
    for (int64_t token = 0; token < m && status == ETT_OK; token += s.tokens) {
        const int64_t tokens = std::min(s.tokens, m - token), row_tiles = ceil_div(tokens, kSweepRows);
        status = launch_split_pack(kOp, {rows_of(a.z, token, tokens), s.z, nullptr, nullptr, s.z_unscale, nullptr, s.width, row_tiles * kSweepRows}, l);
        CUtensorMap z_map, e_map;
        if (status == ETT_OK) status = make_split_map(kOp, &z_map, s.z, tokens, s.width, kSweepRows);
        for (int64_t code = 0; code < k && status == ETT_OK; code += s.codes) {
            const int64_t codes = std::min(s.codes, k - code), tiles = ceil_div(codes, kSide), parts = choose_parts(row_tiles, tiles, multiprocessors());
            status = launch_split_pack(kOp, {rows_of(a.e, code, codes), s.e, nullptr, nullptr, s.e_unscale, nullptr, s.width, tiles * kSide}, l);
            if (status == ETT_OK) status = make_split_map(kOp, &e_map, s.e, codes, s.width, kSide);
            if (status != ETT_OK) break;
            const SplitRows r = {high_of(s.z, tokens, s.width), s.z_unscale, s.e_unscale, s.parts, tokens, codes, int32_t(code), to_q, int(row_tiles), int(parts)};
            status = with_panels(s.width, [&](auto panels) {
                return launch(kOp, entropy ? split_rows_kernel<panels, true> : split_rows_kernel<panels, false>, dim3(unsigned(row_tiles * parts)),
                              dim3(kSweepThreads), SplitSmem<panels, 1, Unscale>::kBytes, l, z_map, e_map, r);
            });
            if (status == ETT_OK)
                status = launch(kOp, join_kernel, dim3(unsigned(ceil_div(tokens, kThreads))), dim3(kThreads), 0, l, s.parts, int(parts), s.state, tokens, to_q,
                                code == 0, code + codes == k, outputs(a, token));
        }
    }
    return status;
}
#endif  // ETT_SHIM

// Bytes of workspace of an implementation.
int64_t workspace_bytes(const ett_ibq_rows_args& a, bool split) {
#ifndef ETT_SHIM
    if (split) return SplitSpace(a, nullptr).pieces.bytes();
#endif
    (void)split;
    return Space(a, nullptr).pieces.bytes();
}

template <int PARTS> int32_t run(const ett_ibq_rows_args& a, const ett_launch* l, const char* name) {
    using S = RowSweep<PARTS>;
    const Space s(a, l->workspace);
    const bool entropy = present(a.rest_q), hopper = strcmp(name, "hopper") == 0;
    const float to_q = entropy ? float(double(kLog2e) / a.temperature) : 0.f;
    const int64_t m = rows(a.z), k = rows(a.e);
    int32_t status = ETT_OK;
    for (int64_t token = 0; token < m && status == ETT_OK; token += s.tokens) {
        const int64_t tokens = std::min(s.tokens, m - token);
        Operand z, e;
        status = operand(kOp, a.z, s.z, token, tokens, s.packed_z, z, l);
        for (int64_t code = 0; code < k && status == ETT_OK; code += s.codes) {
            const int64_t codes = std::min(s.codes, k - code), row_tiles = ceil_div(tokens, kTileTokens);
            const int64_t parts = choose_parts(row_tiles, ceil_div(codes, kTileCodes), hopper ? multiprocessors() : slots());
            status = operand(kOp, a.e, s.e, code, codes, s.packed_e, e, l);
            if (status != ETT_OK) break;
            const Rows r = {z, e, s.parts, int32_t(code), to_q, int(row_tiles), int(parts)};
            status = hopper ? launch_hopper(r, entropy, l)
                            : launch(kOp, entropy ? rows_kernel<S, true> : rows_kernel<S, false>, dim3(unsigned(row_tiles * parts)), dim3(S::kThreads),
                                     S::kSmem, l, r);
            if (status == ETT_OK)
                status = launch(kOp, join_kernel, dim3(unsigned(ceil_div(tokens, kThreads))), dim3(kThreads), 0, l, s.parts, int(parts), s.state,
                                tokens, to_q, code == 0, code + codes == k, outputs(a, token));
        }
    }
    return status;
}

}  // namespace
}  // namespace codebook
}  // namespace ett

extern "C" int64_t ett_ibq_rows_workspace(const ett_ibq_rows_args* a) {
    using namespace ett;
    using namespace ett::codebook;
    Check check(kOp, a);
    if (!sound(check, a)) return -1;
    if (rows(a->z) == 0) return 0;
    return std::max(workspace_bytes(*a, false), split_planned(a->z, a->e) ? workspace_bytes(*a, true) : 0);
}

extern "C" int32_t ett_ibq_rows(const ett_ibq_rows_args* a, const ett_launch* l) {
    using namespace ett;
    using namespace ett::codebook;
    Check check(kOp, a, l);
    if (!sound(check, a)) return check.status();
    if (rows(a->z) == 0) return ett_done("");
    const char* kernel = check.choose(l, {{"hopper", hopper_fits(a->z, a->e)}, {"hopper_split", split_fits(a->z, a->e)}, {"sweep", true}});
    const bool split = strcmp(kernel, "hopper_split") == 0;
    check.workspace(l, workspace_bytes(*a, split));
    if (!check.ok()) return check.status();
    int32_t status = split ? run_split(*a, l) : with_parts(a->z.dtype, [&](auto parts) { return run<parts>(*a, l, kernel); });
    if (status == ETT_OK) status = launch_count_bad(kOp, data<const float>(a->smax), rows(a->z), data<float>(a->bad), l);
    return status == ETT_OK ? ett_done(kernel) : status;
}
