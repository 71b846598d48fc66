// attention_fwd.cu: softmax attention over a flat batch of sequences, with an online softmax.
//
//   y_i = sum_j p_ij v_j,  p_ij = exp(scale q_i . k_j - lse_i),  lse_i = log sum_j exp(scale q_i . k_j),  j < seen(i)
//   seen(i) = Tk, or min(Tk, max(0, i + 1 + Tk - T)) if causal; query head h reads key/value head h / (heads/kv_heads)
//
// q          N,heads*D      act  rows of any stride   in
// k, v       Nk,kv_heads*D  act  rows of any stride   in
// cu_q, cu_k S+1            i32  contiguous           in    sequence s has rows [cu[s], cu[s+1])
// len_k      S              i32  contiguous           in?   if present, the keys are rows [cu_k[s], cu_k[s] + len_k[s])
// y          N,heads*D      act  rows of any stride   out   0 in padding rows (from cu_q[S] on) and where seen(i) is 0
// lse        N,heads        f32  rows of any stride   out   0 in the same rows
//
// A sequence with wrong offsets is a fault and counts as empty: if its key offsets are wrong, its queries have no keys;
// if its query offsets are wrong, its rows of y and lse are not written.
// numerics: scores, softmax and sums in f32; "mma" rounds exp(score - running maximum) to bf16 before the product with
// v, "simple" does not; one rounding of y. Bitwise repeatable.
// limits: 1 <= D <= 512, heads < 65536.
// work: 4 * heads * D * (visible pairs) FLOP; (2*N*heads + 2*Nk*kv_heads) * D * size bytes.
// papers: FlashAttention (2205.14135), FlashAttention-2 (2307.08691), grouped queries (2305.13245).
#include "activation.cuh"
#include "attention.cuh"

namespace ett {
namespace attention {
namespace {

// Keys per tile. Three blocks of 64 queries share a multiprocessor: 168 registers a thread, 51 KB of shared memory a
// block. While a tile's keys are multiplied its values are copied, and while its values are multiplied the next keys
// are.
constexpr int kKeys = 64;
constexpr int kClearBlocks = 8;  // blocks per head that clear the padding

template <class T> struct Forward {
    Batch b;
    const int32_t* len_k;  // null: the keys of a sequence end where the next sequence begins
    const T* q;
    const T* k;
    const T* v;
    T* y;
    float* lse;
    int64_t ldq, ldk, ldv, ldy, ldlse;
    float scale;
    int tiles;      // of queries, in the longest sequence
    bool vectors;   // four elements at a time
};

// A block's job: a tile of queries of one sequence and head. With a causal mask the tiles with the most keys come
// first.
struct Job {
    int seq, tile;
};
template <class T> __device__ __forceinline__ Job job_of(const Forward<T>& a) {
    const int tile = int(blockIdx.x) / a.b.seqs;
    return Job{int(blockIdx.x) % a.b.seqs, a.b.causal ? a.tiles - 1 - tile : tile};
}

// The last blocks of the grid set y and lse to 0 in the padding; returns true in these blocks.
template <class T> __device__ __forceinline__ bool clear_padding(const Forward<T>& a) {
    const int64_t jobs = int64_t(a.tiles) * a.b.seqs, at = int64_t(blockIdx.x) - jobs;
    if (at < 0) return false;
    const int head = blockIdx.y;
    const int64_t from = padding(a.b.cu_q, a.b.seqs, a.b.n_q);
    clear_rows(a.y + int64_t(head) * a.b.d, a.ldy, a.b.d, from, a.b.n_q, int(at), kClearBlocks);
    clear_rows(a.lse + head, a.ldlse, 1, from, a.b.n_q, int(at), kClearBlocks);
    return true;
}

// The running maximum and sum of one row.
template <class T> struct Running {
    float max = -INFINITY, sum = 0.f;

    // Updates the maximum with that of new scores. Returns the shift to subtract from the new scores; `factor` rescales
    // the previous sums. The shift is 0 while all scores are -infinity (masked), since -infinity would give NaN.
    __device__ __forceinline__ float raise(float to, float& factor) {
        to = fmaxf(max, to);
        const float shift = to == -INFINITY ? 0.f : to;
        factor = exponential<T>(max - shift);
        max = to;
        return shift;
    }
    // Returns the log-sum-exp and replaces `sum` by its reciprocal. lse and y are 0 for a row that sees no key, and NaN
    // if all its scores are -infinity or NaN.
    __device__ __forceinline__ float finish(int seen) {
        if (seen > 0 && max == -INFINITY) sum = NAN;
        const float lse = seen == 0 ? 0.f : max + logf(sum);
        sum = sum == 0.f ? 0.f : 1.f / sum;
        return lse;
    }
};

template <int DT> constexpr int mma_bytes() { return tile_bytes<DT>(kMmaRows + 2 * kKeys); }

template <int DT> __global__ void __launch_bounds__(kMmaThreads, 3) mma_kernel(const __grid_constant__ Forward<bf16> a) {
    ETT_DYNAMIC_SMEM(smem);
    if (clear_padding(a)) return;
    const Job job = job_of(a);
    const int head = blockIdx.y, first = job.tile * kMmaRows, d = a.b.d;
    const Seq seq(a.b, job.seq, job.tile == 0 && head == 0 && threadIdx.x == 0, a.len_k);
    if (first >= seq.q.count) return;

    bf16* const smem_q = reinterpret_cast<bf16*>(smem);
    bf16* const smem_k = smem_q + kMmaRows * kTileStride<DT>;
    bf16* const smem_v = smem_k + kKeys * kTileStride<DT>;
    const bf16* k = a.k + seq.k.start * a.ldk + int64_t(head / a.b.group) * d;
    const bf16* v = a.v + seq.k.start * a.ldv + int64_t(head / a.b.group) * d;
    const int queries = min(kMmaRows, seq.q.count - first), keys = seq.seen(first + queries - 1);
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const bf16* const warp_q = smem_q + warp * 16 * kTileStride<DT>;

    load_tile<kMmaRows, DT>(smem_q, a.q + (seq.q.start + first) * a.ldq + int64_t(head) * d, a.ldq, queries, d);
    if (keys > 0) load_tile<kKeys, DT>(smem_k, k, a.ldk, seq.k.count, d);
    cp_async_commit();

    Running<bf16> row[2];
    int seen[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) seen[r] = seq.seen(first + warp * 16 + lane / 4 + 8 * r);
    float out[DT / 8][4] = {};
    for (int key = 0; key < keys; key += kKeys) {
        cp_async_wait<0>();
        __syncthreads();  // the keys (and queries) have arrived, and all threads are done with the previous values
        load_tile<kKeys, DT>(smem_v, v + key * a.ldv, a.ldv, seq.k.count - key, d);
        cp_async_commit();

        float s[kKeys / 8][4];
        dot_rows<kKeys / 8, DT>(s, warp_q, smem_k);
        const bool whole = key + kKeys <= seq.seen(first + warp * 16);  // the warp's first query sees the fewest keys
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            auto masked = [&](int j, int e) { return !whole && key + j * 8 + 2 * (lane % 4) + e % 2 >= seen[r]; };
            float most = -INFINITY;
#pragma unroll
            for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
                for (int e = 2 * r; e < 2 * r + 2; ++e)
                    if (!masked(j, e)) most = fmaxf(most, s[j][e] * a.scale);
            most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
            most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
            float factor;
            const float shift = row[r].raise(most, factor);
            row[r].sum *= factor;
#pragma unroll
            for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
                for (int e = 2 * r; e < 2 * r + 2; ++e) {
                    s[j][e] = masked(j, e) ? 0.f : exponential<bf16>(fmaf(s[j][e], a.scale, -shift));
                    row[r].sum += s[j][e];
                }
#pragma unroll
            for (int c = 0; c < DT / 8; ++c)
#pragma unroll
                for (int e = 2 * r; e < 2 * r + 2; ++e) out[c][e] *= factor;
        }

        cp_async_wait<0>();
        __syncthreads();  // the values have arrived, and all threads are done with the keys
        if (key + kKeys < keys) load_tile<kKeys, DT>(smem_k, k + (key + kKeys) * a.ldk, a.ldk, seq.k.count - key - kKeys, d);
        cp_async_commit();
        add_rows<kKeys / 8, DT>(out, s, smem_v);
    }
    cp_async_wait<0>();  // the copy of the queries is still pending if there was no key

    float inverse[2];
    const int64_t to = seq.q.start + first + warp * 16;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        // Four lanes hold the partial sums of a row.
        row[r].sum += __shfl_xor_sync(kAllLanes, row[r].sum, 1);
        row[r].sum += __shfl_xor_sync(kAllLanes, row[r].sum, 2);
        const float lse = row[r].finish(seen[r]);
        inverse[r] = row[r].sum;
        const int i = lane / 4 + 8 * r;
        if (lane % 4 == 0 && warp * 16 + i < queries) a.lse[(to + i) * a.ldlse + head] = lse;
    }
    store_rows<DT>(a.y + to * a.ldy + int64_t(head) * d, a.ldy, queries - warp * 16, d, out, inverse);
}

template <class T, int DT, int I> __global__ void __launch_bounds__(kPlainThreads, 2) simple_kernel(const __grid_constant__ Forward<T> a) {
    ETT_DYNAMIC_SMEM(smem);
    if (clear_padding(a)) return;
    const Job job = job_of(a);
    const int head = blockIdx.y, first = job.tile * I * 16, d = a.b.d, x = threadIdx.x % 16, y = threadIdx.x / 16;
    const Seq seq(a.b, job.seq, job.tile == 0 && head == 0 && threadIdx.x == 0, a.len_k);
    if (first >= seq.q.count) return;

    float* const weights = reinterpret_cast<float*>(smem);
    float* const slices = weights + I * 16 * kWeightStride;
    const int queries = min(I * 16, seq.q.count - first), keys = seq.seen(first + queries - 1);
    const Rows<T> q{a.q + (seq.q.start + first) * a.ldq + int64_t(head) * d, a.ldq, queries};
    const int64_t kv_col = int64_t(head / a.b.group) * d;
    Running<T> row[I];
    float out[I][DT / 64][4] = {};
    for (int key = 0; key < keys; key += kPlainCols) {
        const Rows<T> k{a.k + (seq.k.start + key) * a.ldk + kv_col, a.ldk, seq.k.count - key};
        const Rows<T> v{a.v + (seq.k.start + key) * a.ldv + kv_col, a.ldv, seq.k.count - key};
        float s[I][4];
        plain_dot<I>(s, q, k, d, slices, a.vectors);
#pragma unroll
        for (int i = 0; i < I; ++i) {
            const int seen = seq.seen(first + y + 16 * i);
            float most = -INFINITY, sum = 0.f, factor;
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (key + x + 16 * j < seen) most = fmaxf(most, s[i][j] * a.scale);
            // 16 lanes share a row.
#pragma unroll
            for (int by = 8; by > 0; by /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, by));
            const float shift = row[i].raise(most, factor);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float p = key + x + 16 * j < seen ? exponential<T>(fmaf(s[i][j], a.scale, -shift)) : 0.f;
                plain_weight(weights, i, j) = p;
                sum += p;
            }
#pragma unroll
            for (int by = 8; by > 0; by /= 2) sum += __shfl_xor_sync(kAllLanes, sum, by);
            row[i].sum = row[i].sum * factor + sum;
#pragma unroll
            for (int c = 0; c < DT / 64; ++c)
#pragma unroll
                for (int e = 0; e < 4; ++e) out[i][c][e] *= factor;
        }
        plain_sum<I, DT>(out, v, d, weights, a.vectors);
    }
#pragma unroll
    for (int i = 0; i < I; ++i) {
        const int at = y + 16 * i;
        const float lse = row[i].finish(seq.seen(first + at));
        if (at >= queries) continue;
        const int64_t to = seq.q.start + first + at;
        if (x == 0) a.lse[to * a.ldlse + head] = lse;
        plain_store<DT>(a.y + to * a.ldy + int64_t(head) * d, d, out[i], row[i].sum);
    }
}

// "mma" requires rows of whole 16-byte pieces and D a multiple of 16, at most 128.
bool can_use_mma(const ett_attention_fwd_args& a) {
    const bool pieces = wide(a.q) && wide(a.k) && wide(a.v) && wide(a.y);
    return a.q.dtype == ETT_BF16 && a.head_dim % 16 == 0 && a.head_dim <= 128 && pieces;
}

bool sound(Check& check, const ett_attention_fwd_args* a) {
    return check.ok() && check_shapes(check, *a) && (!present(a->len_k) || check.vector("len_k", a->len_k, ETT_I32, numel(a->cu_q) - 1));
}

template <class T, class K>
int32_t enqueue(const ett_attention_fwd_args& a, const ett_launch* l, const char* name, K* kernel, int rows_of_tile, int threads, size_t smem) {
    const Batch b = batch_of(a, l);
    const int64_t tiles = tiles_of(a.max_q, b.n_q, rows_of_tile), blocks = tiles * b.seqs + kClearBlocks;
    if (blocks > INT32_MAX) return ett_fail(ETT_UNSUPPORTED, 0, "attention_fwd", "cu_q", "too long for its max_q", "fewer than 2^31 tiles");
    const bool vectors = head_wide(a.q, b.d, 4 * sizeof(T)) && head_wide(a.k, b.d, 4 * sizeof(T)) && head_wide(a.v, b.d, 4 * sizeof(T));
    const Forward<T> f{b,           data<const int32_t>(a.len_k), data<const T>(a.q), data<const T>(a.k), data<const T>(a.v), data<T>(a.y),
                       data<float>(a.lse), stride(a.q), stride(a.k), stride(a.v), stride(a.y), stride(a.lse), float(a.scale), int(tiles), vectors};
    const int32_t status = launch("attention_fwd", kernel, dim3(unsigned(blocks), unsigned(b.heads)), dim3(unsigned(threads)), smem, l, f);
    return status == ETT_OK ? ett_done(name) : status;
}

}  // namespace
}  // namespace attention
}  // namespace ett

extern "C" int64_t ett_attention_fwd_workspace(const ett_attention_fwd_args* a) {
    using namespace ett;
    using namespace ett::attention;
    Check check("attention_fwd", a);
    return sound(check, a) ? 0 : -1;
}

extern "C" int32_t ett_attention_fwd(const ett_attention_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    using namespace ett::attention;
    Check check("attention_fwd", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->q) == 0) return ett_done("");
    const char* kernel = check.choose(l, {{"mma", can_use_mma(*a)}, {"simple", true}});
    if (!check.ok()) return check.status();
    if (strcmp(kernel, "mma") == 0)
        return with_mma_width(int(a->head_dim), [&](auto dt) {
            constexpr int DT = decltype(dt)::value;
            return enqueue<bf16>(*a, l, kernel, mma_kernel<DT>, kMmaRows, kMmaThreads, mma_bytes<DT>());
        });
    return with_act(a->q.dtype, [&](auto t) {
        using T = decltype(t);
        return with_plain_tile(int(a->head_dim), [&](auto dt, auto i) {
            constexpr int DT = decltype(dt)::value, I = decltype(i)::value;
            return enqueue<T>(*a, l, kernel, simple_kernel<T, DT, I>, I * 16, kPlainThreads, plain_floats<I, DT>() * sizeof(float));
        });
    });
}
