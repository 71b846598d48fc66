// attention_bwd.cu: gradients of attention_fwd; the probabilities are recomputed from lse.
//
//   p_ij = exp(scale q_i . k_j - lse_i),  dp_ij = dy_i . v_j,  delta_i = dy_i . y_i,  ds_ij = p_ij (dp_ij - delta_i)
//   dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i,   dv_j = sum_i p_ij dy_i
// with i, j and heads as in attention_fwd.cu; dk and dv sum over the query heads of their group, too.
//
// dy, q, y   N,heads*D      act  rows of any stride   in
// k, v       Nk,kv_heads*D  act  rows of any stride   in
// lse        N,heads        f32  rows of any stride   in
// cu_q, cu_k S+1            i32  contiguous           in
// dq         N,heads*D      act  rows of any stride   out   0 in padding rows
// dk, dv     Nk,kv_heads*D  act  rows of any stride   out   0 in padding rows
//
// Three steps: delta (and lse) of each row and head, in a kernel that also clears the padding; dq by tiles of queries;
// dk and dv by tiles of keys. The two passes compute the scores twice, but need no sums across blocks, so that the
// order of every sum is fixed.
// A sequence with wrong offsets is a fault and counts as empty: if its query offsets are wrong, its rows of dq are not
// written and its rows of dk and dv are 0; if its key offsets are wrong, the reverse.
// numerics: products and sums in f32; "mma" rounds p and ds to bf16 before they are multiplied, "simple" does not; one
// rounding of each result. Bitwise repeatable.
// limits: 1 <= D <= 512, heads < 65536.
// work: 10 * heads * D * (visible pairs) FLOP ("mma" executes 14, "simple" 16 instead of 10);
//       (4*N*heads + 4*Nk*kv_heads) * D * size bytes.
// papers: FlashAttention-2 (2307.08691).
#include "activation.cuh"
#include "attention.cuh"

namespace ett {
namespace attention {
namespace {

template <class T> struct Backward {
    Batch b;
    const T* dy;
    const T* q;
    const T* k;
    const T* v;
    T* dq;
    T* dk;
    T* dv;
    float* lse;    // heads,N  in the workspace
    float* delta;  // heads,N  in the workspace
    int64_t lddy, ldq, ldk, ldv, lddq, lddk, lddv;
    float scale;
    int tiles;     // of own rows in the longest sequence
    bool vectors;  // four elements at a time
};

// ---- rows ------------------------------------------------------------------------------------------------

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / kWarp;

// Writes lse and delta, ordered by heads, with one warp per row and head; clears the padding.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
rows_kernel(const __grid_constant__ Backward<T> a, const T* y, int64_t ldy, const float* lse, int64_t ldlse, bool vectors) {
    const int lane = threadIdx.x % kWarp, d = a.b.d;
    const int64_t from_q = padding(a.b.cu_q, a.b.seqs, a.b.n_q), from_k = padding(a.b.cu_k, a.b.seqs, a.b.n_k);
    for (int64_t i = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / kWarp; i < from_q * a.b.heads; i += int64_t(gridDim.x) * kRowWarps) {
        const int64_t row = i / a.b.heads, head = i - row * a.b.heads;
        float sum = 0.f;
        for (int c = 4 * lane; c < d; c += 4 * kWarp) {
            float u[4], v[4];
            fetch4(u, y + row * ldy + head * d + c, d - c, vectors);
            fetch4(v, a.dy + row * a.lddy + head * d + c, d - c, vectors);
#pragma unroll
            for (int e = 0; e < 4; ++e) sum += u[e] * v[e];
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            a.delta[head * a.b.n_q + row] = sum;
            a.lse[head * a.b.n_q + row] = lse[row * ldlse + head];
        }
    }
    const int kv_cols = a.b.kv_heads * d;
    clear_rows(a.dq, a.lddq, a.b.heads * d, from_q, a.b.n_q, blockIdx.x, gridDim.x);
    clear_rows(a.dk, a.lddk, kv_cols, from_k, a.b.n_k, blockIdx.x, gridDim.x);
    clear_rows(a.dv, a.lddv, kv_cols, from_k, a.b.n_k, blockIdx.x, gridDim.x);
}

// ---- tensor cores ----------------------------------------------------------------------------------------
// A block owns 64 rows (queries for dq, keys for dk and dv) and processes the rows of the other side 32 at a time, in
// two alternating tiles: while one is multiplied, the next is copied. With 64, the 128 accumulators of dk and dv and 2
// * 32 scores would need too many registers.

constexpr int kOther = 32;
template <int DT> constexpr int mma_bytes() { return tile_bytes<DT>(2 * kMmaRows + 4 * kOther) + 4 * kOther * int(sizeof(float)); }

template <int DT> __global__ void __launch_bounds__(kMmaThreads, 3) mma_dq_kernel(const __grid_constant__ Backward<bf16> a) {
    ETT_DYNAMIC_SMEM(smem);
    const int tile = int(blockIdx.x) / a.b.seqs, s = int(blockIdx.x) % a.b.seqs, head = blockIdx.y, d = a.b.d;
    // With a causal mask the tiles with the most keys come first.
    const int first = (a.b.causal ? a.tiles - 1 - tile : tile) * kMmaRows;
    const Seq seq(a.b, s, first == 0 && head == 0 && threadIdx.x == 0);
    if (first >= seq.q.count) return;

    constexpr int kTile = kOther * kTileStride<DT>;
    bf16* const smem_q = reinterpret_cast<bf16*>(smem);
    bf16* const smem_dy = smem_q + kMmaRows * kTileStride<DT>;
    bf16* const smem_kv = smem_dy + kMmaRows * kTileStride<DT>;  // keys, values; keys, values
    const bf16* k = a.k + seq.k.start * a.ldk + int64_t(head / a.b.group) * d;
    const bf16* v = a.v + seq.k.start * a.ldv + int64_t(head / a.b.group) * d;
    const int queries = min(kMmaRows, seq.q.count - first), keys = seq.seen(first + queries - 1);
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64_t start = seq.q.start + first;

    load_tile<kMmaRows, DT>(smem_q, a.q + start * a.ldq + int64_t(head) * d, a.ldq, queries, d);
    load_tile<kMmaRows, DT>(smem_dy, a.dy + start * a.lddy + int64_t(head) * d, a.lddy, queries, d);
    auto load_kv = [&](int key, int stage) {
        load_tile<kOther, DT>(smem_kv + 2 * stage * kTile, k + key * a.ldk, a.ldk, seq.k.count - key, d);
        load_tile<kOther, DT>(smem_kv + (2 * stage + 1) * kTile, v + key * a.ldv, a.ldv, seq.k.count - key, d);
    };
    if (keys > 0) load_kv(0, 0);
    cp_async_commit();

    int seen[2];
    float lse[2], delta[2], scale[2] = {a.scale, a.scale};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int i = warp * 16 + lane / 4 + 8 * r;
        const int64_t at = head * a.b.n_q + start + i;
        seen[r] = i < queries ? seq.seen(first + i) : 0;
        lse[r] = i < queries ? a.lse[at] : 0.f;
        delta[r] = i < queries ? a.delta[at] : 0.f;
    }
    float dq[DT / 8][4] = {};
    for (int key = 0, stage = 0; key < keys; key += kOther, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this tile has arrived, and all threads are done with the previous one
        if (key + kOther < keys) load_kv(key + kOther, stage ^ 1);
        cp_async_commit();
        const bf16* const tile_k = smem_kv + 2 * stage * kTile;
        float s[kOther / 8][4], dp[kOther / 8][4];
        dot_rows<kOther / 8, DT>(s, smem_q + warp * 16 * kTileStride<DT>, tile_k);
        dot_rows<kOther / 8, DT>(dp, smem_dy + warp * 16 * kTileStride<DT>, tile_k + kTile);
#pragma unroll
        for (int j = 0; j < kOther / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int at = key + j * 8 + 2 * (lane % 4) + e % 2;
                const float p = exponential<bf16>(fmaf(s[j][e], a.scale, -lse[e / 2]));
                s[j][e] = at < seen[e / 2] ? p * (dp[j][e] - delta[e / 2]) : 0.f;
            }
        add_rows<kOther / 8, DT>(dq, s, tile_k);
    }
    cp_async_wait<0>();  // the copy of the queries is still pending if there was no key
    const int64_t to = start + warp * 16;
    store_rows<DT>(a.dq + to * a.lddq + int64_t(head) * d, a.lddq, queries - warp * 16, d, dq, scale);
}

template <int DT> __global__ void __launch_bounds__(kMmaThreads, 2) mma_dkv_kernel(const __grid_constant__ Backward<bf16> a) {
    ETT_DYNAMIC_SMEM(smem);
    // The first tiles come first: with a causal mask they have the most queries.
    const int s = int(blockIdx.x) % a.b.seqs, first = int(blockIdx.x) / a.b.seqs * kMmaRows, kv_head = blockIdx.y, d = a.b.d;
    const Seq seq(a.b, s, first == 0 && kv_head == 0 && threadIdx.x == 0);
    if (first >= seq.k.count) return;

    constexpr int kTile = kOther * kTileStride<DT>;
    bf16* const smem_k = reinterpret_cast<bf16*>(smem);
    bf16* const smem_v = smem_k + kMmaRows * kTileStride<DT>;
    bf16* const smem_q = smem_v + kMmaRows * kTileStride<DT>;                    // queries, dy; queries, dy
    float* const smem_rows = reinterpret_cast<float*>(smem_q + 4 * kTile);      // lse, delta; lse, delta
    const int keys = min(kMmaRows, seq.k.count - first);
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64_t start = seq.k.start + first;

    // One loop over the heads of the group and, for each, the tiles of queries that see a key.
    const int begin = min(seq.first_query(first), seq.q.count) / kOther * kOther;
    const int tiles = (seq.q.count - begin + kOther - 1) / kOther, steps = tiles * a.b.group;
    auto load_q = [&](int step, int stage) {
        const int64_t head = int64_t(kv_head) * a.b.group + step / tiles;
        const int query = begin + step % tiles * kOther, rows = seq.q.count - query;
        const int64_t from = seq.q.start + query;
        load_tile<kOther, DT>(smem_q + 2 * stage * kTile, a.q + from * a.ldq + head * d, a.ldq, rows, d);
        load_tile<kOther, DT>(smem_q + (2 * stage + 1) * kTile, a.dy + from * a.lddy + head * d, a.lddy, rows, d);
        if (threadIdx.x < kOther) {
            // An infinite lse gives rows past the last one probability 0.
            const int i = threadIdx.x;
            smem_rows[2 * stage * kOther + i] = i < rows ? a.lse[head * a.b.n_q + from + i] : INFINITY;
            smem_rows[(2 * stage + 1) * kOther + i] = i < rows ? a.delta[head * a.b.n_q + from + i] : 0.f;
        }
    };
    load_tile<kMmaRows, DT>(smem_k, a.k + start * a.ldk + int64_t(kv_head) * d, a.ldk, keys, d);
    load_tile<kMmaRows, DT>(smem_v, a.v + start * a.ldv + int64_t(kv_head) * d, a.ldv, keys, d);
    if (steps > 0) load_q(0, 0);
    cp_async_commit();

    int from[2];  // the first query that sees the row's key
#pragma unroll
    for (int r = 0; r < 2; ++r) from[r] = seq.first_query(first + warp * 16 + lane / 4 + 8 * r);
    float dk[DT / 8][4] = {}, dv[DT / 8][4] = {};
    for (int step = 0, stage = 0; step < steps; ++step, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this tile has arrived, and all threads are done with the previous one
        if (step + 1 < steps) load_q(step + 1, stage ^ 1);
        cp_async_commit();
        const bf16* const tile_q = smem_q + 2 * stage * kTile;
        const bf16* const tile_dy = tile_q + kTile;
        const float* const row = smem_rows + 2 * stage * kOther + 2 * (lane % 4);
        const int query = begin + step % tiles * kOther + 2 * (lane % 4);
        float p[kOther / 8][4], dp[kOther / 8][4];
        dot_rows<kOther / 8, DT>(p, smem_k + warp * 16 * kTileStride<DT>, tile_q);
#pragma unroll
        for (int j = 0; j < kOther / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float of = exponential<bf16>(fmaf(p[j][e], a.scale, -row[j * 8 + e % 2]));
                p[j][e] = query + j * 8 + e % 2 >= from[e / 2] ? of : 0.f;
            }
        add_rows<kOther / 8, DT>(dv, p, tile_dy);
        dot_rows<kOther / 8, DT>(dp, smem_v + warp * 16 * kTileStride<DT>, tile_dy);
#pragma unroll
        for (int j = 0; j < kOther / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) p[j][e] *= dp[j][e] - row[kOther + j * 8 + e % 2];
        add_rows<kOther / 8, DT>(dk, p, tile_q);
    }
    cp_async_wait<0>();  // the copy of the keys is still pending if there was no query
    const int64_t to = start + warp * 16;
    store_rows<DT>(a.dk + to * a.lddk + int64_t(kv_head) * d, a.lddk, keys - warp * 16, d, dk, {a.scale, a.scale});
    store_rows<DT>(a.dv + to * a.lddv + int64_t(kv_head) * d, a.lddv, keys - warp * 16, d, dv, {1.f, 1.f});
}

// ---- plain multiply-adds ---------------------------------------------------------------------------------

// One side of the products: queries (x = q, g = dy) or keys (x = k, g = v).
template <class T> struct Side {
    const T* x;
    const T* g;
    int64_t ldx, ldg;
};

// A step computes gradients of its own side by sums over the other side. Blocks with z = 0 compute the gradient of
// own.x, those with z = 1 that of own.g (dv). Both at once would not fit the registers at D = 512, so dk and dv each
// compute the scores.
template <class T> struct Plain {
    Batch b;
    Side<T> own, other;
    T* out[2];
    int64_t ldout[2];
    const float* lse;
    const float* delta;
    float scale;
    int tiles;     // of own rows in the longest sequence
    bool of_q;     // the own side is the queries
    bool vectors;  // four elements at a time
};

template <class T, int DT, int I> __global__ void __launch_bounds__(kPlainThreads, 2) simple_kernel(const __grid_constant__ Plain<T> a) {
    ETT_DYNAMIC_SMEM(smem);
    const bool of_g = blockIdx.z == 1;
    const int tile = int(blockIdx.x) / a.b.seqs, d = a.b.d, x = threadIdx.x % 16, y = threadIdx.x / 16;
    const int first = (a.of_q && a.b.causal ? a.tiles - 1 - tile : tile) * I * 16;
    const Seq seq(a.b, int(blockIdx.x) % a.b.seqs, first == 0 && blockIdx.y == 0 && blockIdx.z == 0 && threadIdx.x == 0);
    const Span own = a.of_q ? seq.q : seq.k, other = a.of_q ? seq.k : seq.q;
    if (first >= own.count) return;

    float* const smem_lse = reinterpret_cast<float*>(smem);  // of the tile's queries
    float* const smem_delta = smem_lse + kPlainCols;
    float* const weights = smem_delta + kPlainCols;
    float* const slices = weights + I * 16 * kWeightStride;
    const int count = min(I * 16, own.count - first);
    // The rows of the other side: the keys that the tile's last query sees, or the queries from the first one that sees
    // the tile's first key.
    const int begin = a.of_q ? 0 : seq.first_query(first), end = a.of_q ? seq.seen(first + count - 1) : other.count;
    const int heads = a.of_q ? 1 : a.b.group;
    const int64_t own_col = int64_t(blockIdx.y) * d;
    float out[I][DT / 64][4] = {};
    for (int h = 0; h < heads; ++h) {
        const int head = a.of_q ? int(blockIdx.y) : int(blockIdx.y) * heads + h;
        const int64_t other_col = int64_t(a.of_q ? head / a.b.group : head) * d;
        for (int at = begin; at < end; at += kPlainCols) {
            auto own_rows = [&](const T* p, int64_t ld) { return Rows<T>{p + (own.start + first) * ld + own_col, ld, count}; };
            auto other_rows = [&](const T* p, int64_t ld) { return Rows<T>{p + (other.start + at) * ld + other_col, ld, other.count - at}; };
            const int query_0 = a.of_q ? first : at, key_0 = a.of_q ? at : first;
            if (threadIdx.x < kPlainCols) {
                // An infinite lse gives queries past the last one probability 0. The barriers of plain_dot make this
                // visible.
                const int query = query_0 + threadIdx.x;
                const int64_t row = int64_t(head) * a.b.n_q + seq.q.start + query;
                smem_lse[threadIdx.x] = query < seq.q.count ? a.lse[row] : INFINITY;
                smem_delta[threadIdx.x] = query < seq.q.count ? a.delta[row] : 0.f;
            }
            float s[I][4];
            plain_dot<I>(s, own_rows(a.own.x, a.own.ldx), other_rows(a.other.x, a.other.ldx), d, slices, a.vectors);
#pragma unroll
            for (int i = 0; i < I; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int query = a.of_q ? y + 16 * i : x + 16 * j, key = a.of_q ? x + 16 * j : y + 16 * i;
                    const float p = exponential<T>(fmaf(s[i][j], a.scale, -smem_lse[query]));
                    plain_weight(weights, i, j) = key_0 + key < seq.seen(query_0 + query) ? p : 0.f;
                }
            if (!of_g) {
                plain_dot<I>(s, own_rows(a.own.g, a.own.ldg), other_rows(a.other.g, a.other.ldg), d, slices, a.vectors);
#pragma unroll
                for (int i = 0; i < I; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j) plain_weight(weights, i, j) *= s[i][j] - smem_delta[a.of_q ? y + 16 * i : x + 16 * j];
            }
            const Rows<T> sum = of_g ? other_rows(a.other.g, a.other.ldg) : other_rows(a.other.x, a.other.ldx);
            plain_sum<I, DT>(out, sum, d, weights, a.vectors);
        }
    }
    T* const to = a.out[blockIdx.z] + (own.start + first) * a.ldout[blockIdx.z] + own_col;
#pragma unroll
    for (int i = 0; i < I; ++i)
        if (y + 16 * i < count) plain_store<DT>(to + (y + 16 * i) * a.ldout[blockIdx.z], d, out[i], of_g ? 1.f : a.scale);
}

// ---- launcher --------------------------------------------------------------------------------------------

bool sound(Check& check, const ett_attention_bwd_args* s) {
    if (!check.ok() || !check_shapes(check, *s)) return false;
    const ett_attention_bwd_args& a = *s;
    check.matrix("dy", a.dy, a.q.dtype, rows(a.q), cols(a.q));
    check.matrix("dq", a.dq, a.q.dtype, rows(a.q), cols(a.q));
    check.matrix("dk", a.dk, a.q.dtype, rows(a.k), cols(a.k));
    check.matrix("dv", a.dv, a.q.dtype, rows(a.k), cols(a.k));
    const int64_t longest = std::max(tiles_of(a.max_q, rows(a.q), 32), tiles_of(a.max_k, rows(a.k), 32));
    if (numel(a.cu_q) > INT32_MAX / longest) check.fail(ETT_UNSUPPORTED, "cu_q", "too long for max_q and max_k", "fewer than 2^31 tiles");
    return check.ok();
}

// Bytes of lse, and of delta.
int64_t row_bytes(const ett_attention_bwd_args& a) { return round_up(numel(a.lse) * int64_t(sizeof(float)), 256); }

// "mma" requires rows of whole 16-byte pieces and D a multiple of 16, at most 128.
bool can_use_mma(const ett_attention_bwd_args& a) {
    const bool pieces = wide(a.dy) && wide(a.q) && wide(a.k) && wide(a.v) && wide(a.dq) && wide(a.dk) && wide(a.dv);
    return a.q.dtype == ETT_BF16 && a.head_dim % 16 == 0 && a.head_dim <= 128 && pieces;
}

constexpr char kOp[] = "attention_bwd";

template <class T> Backward<T> arguments(const ett_attention_bwd_args& a, const ett_launch* l) {
    const int64_t piece = 4 * sizeof(T), d = a.head_dim;
    char* const workspace = static_cast<char*>(l->workspace);
    return Backward<T>{batch_of(a, l),
                       data<const T>(a.dy),
                       data<const T>(a.q),
                       data<const T>(a.k),
                       data<const T>(a.v),
                       data<T>(a.dq),
                       data<T>(a.dk),
                       data<T>(a.dv),
                       reinterpret_cast<float*>(workspace),
                       reinterpret_cast<float*>(workspace + row_bytes(a)),
                       stride(a.dy),
                       stride(a.q),
                       stride(a.k),
                       stride(a.v),
                       stride(a.dq),
                       stride(a.dk),
                       stride(a.dv),
                       float(a.scale),
                       0,
                       head_wide(a.dy, d, piece) && head_wide(a.q, d, piece) && head_wide(a.k, d, piece) && head_wide(a.v, d, piece)};
}

template <class T> int32_t enqueue_rows(const ett_attention_bwd_args& a, const ett_launch* l) {
    const int64_t piece = 4 * sizeof(T);
    const bool vectors = head_wide(a.y, a.head_dim, piece) && head_wide(a.dy, a.head_dim, piece);
    const int64_t blocks = std::min<int64_t>(ceil_div(std::max(numel(a.lse), rows(a.k)), kRowWarps), int64_t(multiprocessors()) * 8);
    return launch(kOp, rows_kernel<T>, dim3(unsigned(blocks)), dim3(kRowThreads), 0, l, arguments<T>(a, l), data<const T>(a.y), stride(a.y),
                  data<const float>(a.lse), stride(a.lse), vectors);
}

// Enqueues the step that owns the queries, or the one that owns the keys.
template <class K, class F>
int32_t enqueue(const ett_launch* l, K* kernel, F f, bool queries, int rows_of_tile, unsigned depth, int threads, size_t smem) {
    const int64_t n = queries ? f.b.n_q : f.b.n_k, heads = queries ? f.b.heads : f.b.kv_heads;
    if (n == 0 || heads == 0 || f.b.seqs == 0) return ETT_OK;
    f.tiles = int(tiles_of(queries ? f.b.max_q : f.b.max_k, n, rows_of_tile));
    return launch(kOp, kernel, dim3(unsigned(f.tiles) * unsigned(f.b.seqs), unsigned(heads), depth), dim3(unsigned(threads)), smem, l, f);
}

template <class T> Plain<T> plain_arguments(const Backward<T>& f, bool queries) {
    const Side<T> of_q{f.q, f.dy, f.ldq, f.lddy}, of_k{f.k, f.v, f.ldk, f.ldv};
    return Plain<T>{f.b,     queries ? of_q : of_k,      queries ? of_k : of_q,          {queries ? f.dq : f.dk, f.dv},
                    {queries ? f.lddq : f.lddk, f.lddv}, f.lse, f.delta, f.scale, 0, queries, f.vectors};
}

}  // namespace
}  // namespace attention
}  // namespace ett

extern "C" int64_t ett_attention_bwd_workspace(const ett_attention_bwd_args* a) {
    using namespace ett;
    using namespace ett::attention;
    Check check(kOp, a);
    return sound(check, a) ? 2 * row_bytes(*a) : -1;
}

extern "C" int32_t ett_attention_bwd(const ett_attention_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    using namespace ett::attention;
    Check check(kOp, a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->q) == 0 && numel(a->k) == 0) return ett_done("");
    const char* kernel = check.choose(l, {{"mma", can_use_mma(*a)}, {"simple", true}});
    check.workspace(l, 2 * row_bytes(*a));
    if (!check.ok()) return check.status();
    int32_t status = with_act(a->q.dtype, [&](auto t) { return enqueue_rows<decltype(t)>(*a, l); });
    if (status != ETT_OK) return status;
    if (strcmp(kernel, "mma") == 0) {
        const Backward<bf16> f = arguments<bf16>(*a, l);
        status = with_mma_width(int(a->head_dim), [&](auto dt) {
            constexpr int DT = decltype(dt)::value;
            const int32_t first = enqueue(l, mma_dq_kernel<DT>, f, true, kMmaRows, 1, kMmaThreads, mma_bytes<DT>());
            return first != ETT_OK ? first : enqueue(l, mma_dkv_kernel<DT>, f, false, kMmaRows, 1, kMmaThreads, mma_bytes<DT>());
        });
    } else {
        status = with_act(a->q.dtype, [&](auto t) {
            using T = decltype(t);
            const Backward<T> f = arguments<T>(*a, l);
            return with_plain_tile(int(a->head_dim), [&](auto dt, auto i) {
                constexpr int DT = decltype(dt)::value, I = decltype(i)::value;
                constexpr size_t kBytes = (2 * kPlainCols + plain_floats<I, DT>()) * sizeof(float);
                const int32_t first = enqueue(l, simple_kernel<T, DT, I>, plain_arguments(f, true), true, I * 16, 1, kPlainThreads, kBytes);
                if (first != ETT_OK) return first;
                return enqueue(l, simple_kernel<T, DT, I>, plain_arguments(f, false), false, I * 16, 2, kPlainThreads, kBytes);
            });
        });
    }
    return status == ETT_OK ? ett_done(kernel) : status;
}
