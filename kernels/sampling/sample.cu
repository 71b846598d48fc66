// sample.cu: samples an index from each row of logits, with the same bits as the CPU (docs/sampling.md):
//   l = without + guidance * (logits - without), or logits;   w_i = floor(2^42 * e^((l_i - max l) / temperature) + 1/2);
//   top_k keeps the weights of the k largest l, the first of equal ones; of these, top_p keeps the largest that
//   together
//   reach ceil(top_p * sum w). The result is the first index at which the running sum of the weights exceeds
//   floor(r * sum w / 2^64), where r is the first 64 bits of Philox4x32-10 (key: seed; counter: position, purpose,
// number). With temperature 0: the largest l, the first of equal ones. -1 if a logit is NaN or the largest is not
// finite.
//
// logits, without  B,V  act  rows of any stride   in    without may be absent
// number           B    i32  contiguous           in
// position         B    i32  contiguous           incremented
// idx              B    i32  contiguous           out
//
// Steps, with one block per row: find the largest logit; write the weights to the workspace; for top-k and top-p, find
// the last logit to keep by a radix search over the distance to the largest logit, ten bits at a time, with the total
// weight (or count) of each of 1024 ranges; find the index.
// numerics: float64 without fused operations, like the CPU; weights are integers, so that their sums, atomic ones
// included, do not depend on the order.
// work: about 30 FLOP in float64 a logit, and for each search up to seven passes over logits and weights.
// workspace: 8 bytes a logit.   limits: V at most 2^21.
// papers: Philox (SC 2011), top-p (1904.09751), guidance (2207.12598).
#include "launch.cuh"
#include "matrix.cuh"
#include "reduce.cuh"

namespace ett {
namespace {

using u64 = unsigned long long;

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
constexpr int kDigit = 10;  // bits per pass of the search: one range per thread
constexpr int64_t kMost = int64_t(1) << 21;
constexpr uint32_t kPurpose = 5;          // the random numbers' purpose: sampling
static_assert(kThreads == 1 << kDigit && kWarps == kWarp, "one thread a range, one lane a warp");

template <class T> struct Draw {
    Matrix<const T> logits, without;
    const int32_t* number;
    int32_t *position, *idx;
    u64* weights;  // [B, V]
    int64_t b, v, top_k;
    double temperature, top_p, guidance;
    u64 seed;
};

// The first 64 bits of a block of Philox4x32-10.
__device__ __forceinline__ u64 philox(u64 seed, uint32_t high, uint32_t number, uint32_t position) {
    uint32_t c[4] = {position, 0, number, high}, key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        if (round > 0) {
            key[0] += 0x9E3779B9u;
            key[1] += 0xBB67AE85u;
        }
        const u64 p0 = u64(c[0]) * 0xD2511F53u, p1 = u64(c[2]) * 0xCD9E8D57u;
        const uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ key[0], uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ key[1], uint32_t(p0)};
#pragma unroll
        for (int i = 0; i < 4; ++i) c[i] = next[i];
    }
    return u64(c[0]) | u64(c[1]) << 32;
}

// floor(2^42 * e^x + 1/2) for x <= 0, with the operations of the CPU's `weight`, each rounded once.
__device__ __forceinline__ u64 weight(double x) {
    if (x < -30.0) return 0;
    constexpr double kRound = 6755399441055744.0;  // adding and subtracting this rounds to an integer
    const double n = __dsub_rn(__dadd_rn(__dmul_rn(x, 1.4426950408889634), kRound), kRound);
    const double r = __dsub_rn(__dsub_rn(x, __dmul_rn(n, 0.6931471803691238)), __dmul_rn(n, 1.9082149292705877e-10));
    // 1/13! to 1/0!.
    constexpr double kInverse[14] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0,
                                     1.0 / 40320.0,      1.0 / 5040.0,      1.0 / 720.0,      1.0 / 120.0,     1.0 / 24.0,
                                     1.0 / 6.0,          0.5,               1.0,              1.0};
    double p = kInverse[0];
#pragma unroll
    for (int i = 1; i < 14; ++i) p = __dadd_rn(__dmul_rn(p, r), kInverse[i]);
    // Multiplying by 2^(n + 42) is exact.
    const double two = __longlong_as_double(((long long)(1023 + 42) + (long long)n) << 52);
    return u64(__dadd_rn(__dmul_rn(p, two), 0.5));
}

// Maps a logit, which is not NaN, to an integer with the same order; 0 and -0 are equal.
__device__ __forceinline__ u64 order(double l) {
    const u64 bits = u64(__double_as_longlong(__dadd_rn(l, 0.0)));
    return bits >> 63 ? ~bits : bits | (u64(1) << 63);
}

template <class T> __device__ __forceinline__ double logit(const Draw<T>& a, int64_t row, int64_t i) {
    const double c = double(to_float(a.logits.row(row)[i]));
    if (!a.without.ptr) return c;
    const double u = double(to_float(a.without.row(row)[i]));
    return __dadd_rn(u, __dmul_rn(a.guidance, __dsub_rn(c, u)));
}

// The sum over the block, in every thread. All threads call this; `smem` may be reused after the next barrier.
__device__ __forceinline__ u64 block_sum(u64 v, u64 (&smem)[kWarps]) {
#pragma unroll
    for (int d = kWarp / 2; d > 0; d /= 2) v += __shfl_xor_sync(kAllLanes, v, d);
    __syncthreads();  // the previous contents of smem have been read
    if (threadIdx.x % kWarp == 0) smem[threadIdx.x / kWarp] = v;
    __syncthreads();  // the warps' sums are visible
    v = smem[threadIdx.x % kWarp];
#pragma unroll
    for (int d = kWarp / 2; d > 0; d /= 2) v += __shfl_xor_sync(kAllLanes, v, d);
    return v;
}

// The sum over the lanes up to and including this one.
__device__ __forceinline__ u64 warp_scan(u64 v) {
    const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
    for (int d = 1; d < kWarp; d *= 2) {
        const u64 other = __shfl_up_sync(kAllLanes, v, d);
        if (lane >= d) v += other;
    }
    return v;
}

// The sum over the threads up to and including this one; called like block_sum.
__device__ __forceinline__ u64 block_scan(u64 v, u64 (&smem)[kWarps]) {
    const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
    v = warp_scan(v);
    __syncthreads();  // the previous contents of smem have been read
    if (lane == kWarp - 1) smem[warp] = v;
    __syncthreads();  // the warps' sums are visible
    const u64 warps = warp_scan(smem[lane]);
    const u64 before = __shfl_sync(kAllLanes, warps, warp > 0 ? warp - 1 : 0);
    return warp > 0 ? before + v : v;
}

struct Shared {
    u64 bins[kThreads];
    u64 sums[kWarps];
    double largest[kWarps];
    int at[kWarps];
    u64 found[2];  // of a pass of the search: the range, and the total before it
};

// Sets the weights of all logits to 0 except for the largest ones, as many as reach a total of `wanted`: of their
// weights with `by_weight`, else of their number. `wanted` is at most the total of all. `first` is the order of the
// largest logit, `bits` the number of bits of the largest distance from it. A thread reads and writes only its own
// weights. All threads of the block call this.
template <class T>
__device__ __forceinline__ void keep(const Draw<T>& a, int64_t row, u64* w, bool by_weight, u64 wanted, u64 first, int bits, Shared& s) {
    // The distance of the last logit to keep, found from the upper bits to the lower ones.
    u64 prefix = 0;
    for (int shift = bits; shift > 0;) {
        const int digit = shift < kDigit ? shift : kDigit, lower = shift - digit;
        s.bins[threadIdx.x] = 0;
        __syncthreads();  // the ranges are empty
        for (int64_t i = threadIdx.x; i < a.v; i += kThreads) {
            if (w[i] == 0) continue;
            const u64 distance = first - order(logit(a, row, i));
            // The bits above this digit must equal the prefix; the first digit has none above it.
            if (shift < bits && distance >> shift != prefix) continue;
            atomicAdd(&s.bins[(distance >> lower) & ((u64(1) << digit) - 1)], by_weight ? w[i] : u64(1));
        }
        __syncthreads();  // the ranges are complete
        const u64 own = s.bins[threadIdx.x], upto = block_scan(own, s.sums);
        if (upto >= wanted && upto - own < wanted) {
            s.found[0] = threadIdx.x;
            s.found[1] = upto - own;
        }
        __syncthreads();  // what was found is visible
        prefix = prefix << digit | s.found[0];
        wanted -= s.found[1];
        shift = lower;
        __syncthreads();  // s.found has been read
    }
    // Of the logits at exactly this distance, which have equal weights, keep as many of the first as needed.
    u64 before = 0;
    for (int64_t base = 0; base < a.v; base += kThreads) {
        const int64_t i = base + threadIdx.x;
        const u64 weight = i < a.v ? w[i] : 0, distance = weight ? first - order(logit(a, row, i)) : 0;
        const bool last = weight && distance == prefix;
        const u64 own = last ? (by_weight ? weight : u64(1)) : 0, upto = before + block_scan(own, s.sums);
        if (weight && (distance > prefix || (last && upto - own >= wanted))) w[i] = 0;
        before += block_sum(own, s.sums);
    }
}

template <class T> __global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ Draw<T> a) {
    __shared__ Shared s;
    const int64_t row = blockIdx.x;
    const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
    u64* w = a.weights + row * a.v;

    // The largest logit and its first index; -1 if there is a NaN, -2 if this thread has no logit yet.
    double most = -INFINITY;
    int at = -2;
    for (int64_t i = threadIdx.x; i < a.v; i += kThreads) {
        const double l = logit(a, row, i);
        if (l != l) at = -1;
        if (at != -1 && (at == -2 || l > most)) {
            most = l;
            at = int(i);
        }
    }
    auto better = [&](double other, int there) {
        if (at == -1 || there == -2) return;
        if (there == -1 || at == -2 || other > most || (other == most && there < at)) {
            most = other;
            at = there;
        }
    };
#pragma unroll
    for (int d = kWarp / 2; d > 0; d /= 2) {
        const double other = __shfl_xor_sync(kAllLanes, most, d);
        const int there = __shfl_xor_sync(kAllLanes, at, d);
        better(other, there);
    }
    if (lane == 0) {
        s.largest[warp] = most;
        s.at[warp] = at;
    }
    __syncthreads();  // the warps' largest are visible
    for (int k = 0; k < kWarps; ++k) better(s.largest[k], s.at[k]);

    const int32_t position = a.position[row];
    __syncthreads();  // all threads have read the position
    if (threadIdx.x == 0) a.position[row] = int32_t(uint32_t(position) + 1u);
    const bool none = at < 0 || !(fabs(most) < INFINITY);
    if (none || a.temperature == 0.0) {
        if (threadIdx.x == 0) a.idx[row] = none ? -1 : at;
        return;
    }

    // The weights, the sum and number of those above 0, and their largest distance from the largest logit.
    const u64 first = order(most);
    u64 sum = 0, count = 0, far = 0;
    for (int64_t i = threadIdx.x; i < a.v; i += kThreads) {
        const double l = logit(a, row, i);
        const u64 own = weight(__ddiv_rn(__dsub_rn(l, most), a.temperature));
        w[i] = own;
        sum += own;
        if (own == 0) continue;
        count += 1;
        const u64 distance = first - order(l);
        far = distance > far ? distance : far;
    }
    sum = block_sum(sum, s.sums);
    count = block_sum(count, s.sums);
    int bits = 0;
    for (; far > 0; far >>= 1) bits += 1;
#pragma unroll
    for (int d = kWarp / 2; d > 0; d /= 2) {
        const int other = __shfl_xor_sync(kAllLanes, bits, d);
        bits = other > bits ? other : bits;
    }
    if (lane == 0) s.at[warp] = bits;
    __syncthreads();  // the warps' numbers of bits are visible, the sums have been read
    for (int k = 0; k < kWarps; ++k) bits = s.at[k] > bits ? s.at[k] : bits;

    // Top-k, then top-p, as one loop, so that the search is compiled only once and fits the registers.
#pragma unroll 1
    for (int by_weight = 0; by_weight < 2; ++by_weight) {
        u64 wanted = u64(a.top_k);
        if (by_weight) {
            if (!(a.top_p < 1.0)) break;
            wanted = u64(ceil(__dmul_rn(a.top_p, __ull2double_rn(sum))));
            wanted = wanted < 1 ? 1 : wanted < sum ? wanted : sum;
        } else if (wanted == 0 || wanted >= count) {
            continue;
        }
        keep(a, row, w, by_weight != 0, wanted, first, bits, s);
        sum = 0;
        for (int64_t i = threadIdx.x; i < a.v; i += kThreads) sum += w[i];
        sum = block_sum(sum, s.sums);
    }
    __syncthreads();  // other threads' weights are visible

    // Each warp sums its part of the row; the warp whose part contains the index then searches it.
    const u64 target = __umul64hi(philox(a.seed, kPurpose, uint32_t(a.number[row]), uint32_t(position)), sum);
    const int64_t part = (a.v + kWarps - 1) / kWarps, begin = warp * part, end = begin + part < a.v ? begin + part : a.v;
    u64 own = 0;
    for (int64_t i = begin + lane; i < end; i += kWarp) own += w[i];
#pragma unroll
    for (int d = kWarp / 2; d > 0; d /= 2) own += __shfl_xor_sync(kAllLanes, own, d);
    if (lane == 0) s.sums[warp] = own;
    __syncthreads();  // the parts' sums are visible
    u64 before = 0;
    for (int k = 0; k < warp; ++k) before += s.sums[k];
    if (before > target || before + own <= target) return;
    for (int64_t base = begin; base < end; base += kWarp) {
        const u64 weight = base + lane < end ? w[base + lane] : 0, upto = before + warp_scan(weight);
        if (upto > target && upto - weight <= target) a.idx[row] = int32_t(base + lane);
        before = __shfl_sync(kAllLanes, upto, kWarp - 1);
        if (before > target) return;
    }
}

bool sound(Check& check, const ett_sample_args* a) {
    if (!check.ok() || !check.act("logits", a->logits)) return false;
    const int64_t b = rows(a->logits), v = cols(a->logits);
    check.range("logits", v, 0, kMost);
    check.range("logits", b, 0, (int64_t(1) << 31) - 1);
    if (present(a->without)) check.matrix("without", a->without, a->logits.dtype, b, v);
    check.vector("number", a->number, ETT_I32, b);
    check.vector("position", a->position, ETT_I32, b);
    check.vector("idx", a->idx, ETT_I32, b);
    check.require(a->temperature >= 0.0 && a->temperature < INFINITY, "temperature", "negative or no finite number", "a finite number, 0 or more");
    check.range("top_k", a->top_k, 0, INT64_MAX);
    check.require(a->top_p > 0.0 && a->top_p <= 1.0, "top_p", "outside (0, 1]", "a number above 0, at most 1");
    return check.require(!present(a->without) || fabs(a->guidance) < INFINITY, "guidance", "no finite number", "a finite number");
}

int64_t workspace(const ett_sample_args* a) { return a->temperature == 0.0 ? 0 : numel(a->logits) * int64_t(sizeof(u64)); }

}  // namespace
}  // namespace ett

extern "C" int64_t ett_sample_workspace(const ett_sample_args* a) {
    using namespace ett;
    Check check("sample", a);
    return sound(check, a) ? workspace(a) : -1;
}

extern "C" int32_t ett_sample(const ett_sample_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("sample", a, l);
    if (!sound(check, a) || !check.workspace(l, workspace(a))) return check.status();
    const char* kernel = check.choose(l, {{"plain", true}});
    if (!check.ok()) return check.status();
    const int64_t b = rows(a->logits);
    if (b == 0) return ett_done("");
    const int32_t status = with_act(a->logits.dtype, [&](auto t) {
        using T = decltype(t);
        const Draw<T> k{matrix<const T>(a->logits), matrix<const T>(a->without), data<const int32_t>(a->number), data<int32_t>(a->position),
                        data<int32_t>(a->idx), static_cast<u64*>(l->workspace), b, cols(a->logits), a->top_k,
                        a->temperature, a->top_p, a->guidance, u64(a->seed)};
        return launch("sample", sample_kernel<T>, dim3(unsigned(b)), dim3(kThreads), 0, l, k);
    });
    return status == ETT_OK ? ett_done(kernel) : status;
}
