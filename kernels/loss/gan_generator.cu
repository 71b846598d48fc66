// gan_generator.cu: the generator's non-saturating loss, loss += scale * sum_b softplus(-m_b), where m_b is the mean of
// the patch logits of image b, and its gradient dx = -g * scale / P * sigmoid(-m_b).
//
// x                B,P  act  rows of any stride   in
// scale, g, loss   1    f32                       in, in, added to
// dx               B,P  act  rows of any stride   out
//
// numerics: float32. Several blocks share a row; each thread sums its pieces in order, a block its threads, a warp the
// blocks of a row, a last block the rows. Bitwise repeatable.
// work: 1 FLOP an element; n*size bytes forward, 2 backward.   workspace: 4 bytes per block.
// limits: rows have at least one logit.   papers: Generative Adversarial Networks (1406.2661).
#include "matrix.cuh"
#include "reduce.cuh"
#include "activation.cuh"

namespace ett {
namespace {

constexpr int kThreads = 256;
constexpr int kTogether = 4;  // pieces that a thread loads at once
constexpr int kBlocks = 16;   // per multiprocessor: several times the resident ones

// Blocks per row of p elements in pieces of n.
int64_t choose_gan_generator_shares(int64_t b, int64_t p, int n, int multiprocessors) {
    const int64_t wanted = std::max<int64_t>(1, int64_t(multiprocessors) * kBlocks / std::max<int64_t>(1, b));
    return std::max<int64_t>(1, std::min(wanted, ceil_div(p / n, kThreads * kTogether)));
}

template <class T> struct Rows {
    Matrix<const T> x;
    Matrix<T> dx;
    const float *scale, *g;
    float* partials;  // [B, shares]
    float* loss;
    int64_t b, p, shares;
};

template <class T, int N> __global__ void __launch_bounds__(kThreads) sums_kernel(const __grid_constant__ Rows<T> a) {
    __shared__ float smem[kThreads / kWarp];
    const int64_t row = blockIdx.x / a.shares, share = blockIdx.x - row * a.shares, pieces = a.p / N, step = a.shares * kThreads;
    const T* x = a.x.row(row);
    float sum[1] = {0.f};
    for (int64_t i = share * kThreads + threadIdx.x; i < pieces; i += kTogether * step) {
        Vec<T, N> v[kTogether];
#pragma unroll
        for (int k = 0; k < kTogether; ++k)
            if (i + k * step < pieces) v[k] = load_vec<N>(x + (i + k * step) * N);
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
            if (i + k * step >= pieces) continue;
            float f[N];
            unpack(f, v[k]);
#pragma unroll
            for (int j = 0; j < N; ++j) sum[0] += f[j];
        }
    }
    block_sum<1, kThreads>(sum, smem);
    if (threadIdx.x == 0) a.partials[blockIdx.x] = sum[0];
}

// Minus the mean of a row, in every lane; all lanes of the warp call this.
template <class T> __device__ __forceinline__ float minus_mean(const Rows<T>& a, int64_t row) {
    float sum = 0.f;
    for (int64_t s = threadIdx.x % kWarp; s < a.shares; s += kWarp) sum += a.partials[row * a.shares + s];
    return -(warp_sum(sum) / float(a.p));
}

// Each warp sums every 8th row in order, then the warps' sums are added in order.
template <class T> __global__ void __launch_bounds__(kThreads) loss_kernel(const __grid_constant__ Rows<T> a) {
    constexpr int kWarps = kThreads / kWarp;
    __shared__ float smem[kWarps];
    float sum = 0.f;
    for (int64_t row = threadIdx.x / kWarp; row < a.b; row += kWarps) {
        const float m = minus_mean(a, row);
        sum += relu(m) + log1pf(expf(-fabsf(m)));
    }
    if (threadIdx.x % kWarp == 0) smem[threadIdx.x / kWarp] = sum;
    __syncthreads();  // the warps' sums are visible
    if (threadIdx.x != 0) return;
    float total = 0.f;
    for (int w = 0; w < kWarps; ++w) total += smem[w];
    a.loss[0] += a.scale[0] * total;
}

template <class T, int N> __global__ void __launch_bounds__(kThreads) dx_kernel(const __grid_constant__ Rows<T> a) {
    const int64_t row = blockIdx.x / a.shares, share = blockIdx.x - row * a.shares, pieces = a.p / N, step = a.shares * kThreads;
    const float m = minus_mean(a, row), e = expf(-fabsf(m)), sigmoid = (m < 0.f ? e : 1.f) / (1.f + e);
    float v[N];
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = -(a.g[0] * (a.scale[0] / float(a.p))) * sigmoid;
    T* dx = a.dx.row(row);
    for (int64_t i = share * kThreads + threadIdx.x; i < pieces; i += step) store_global(dx + i * N, v);
}

template <class A> bool logits(Check& check, const A* a) {
    return check.ok() && check.act("x", a->x) && check.range("x", rows(a->x), 0, (int64_t(1) << 31) - 1) &&
           check.require(cols(a->x) > 0 || rows(a->x) == 0, "x", "empty rows", "at least one element to average") &&
           check.vector("scale", a->scale, ETT_F32, 1);
}
bool sound(Check& check, const ett_gan_generator_fwd_args* a) { return logits(check, a) && check.vector("loss", a->loss, ETT_F32, 1); }
bool sound(Check& check, const ett_gan_generator_bwd_args* a) {
    return logits(check, a) && check.vector("g", a->g, ETT_F32, 1) && check.matrix("dx", a->dx, a->x.dtype, rows(a->x), cols(a->x));
}

int64_t workspace(const ett_view& x) {
    return rows(x) * choose_gan_generator_shares(rows(x), cols(x), 1, multiprocessors()) * int64_t(sizeof(float));
}

// Launches the sums of the rows, then the loss or, without `loss`, the gradient.
template <class T> int32_t run(const char* op, bool is_wide, Rows<T> k, const ett_launch* l) {
    auto go = [&](auto n) {
        k.shares = choose_gan_generator_shares(k.b, k.p, n, multiprocessors());
        const dim3 grid{unsigned(k.b * k.shares)};
        const int32_t status = launch(op, sums_kernel<T, n>, grid, dim3(kThreads), 0, l, k);
        if (status != ETT_OK) return status;
        return k.loss ? launch(op, loss_kernel<T>, dim3(1), dim3(kThreads), 0, l, k) : launch(op, dx_kernel<T, n>, grid, dim3(kThreads), 0, l, k);
    };
    return is_wide ? go(std::integral_constant<int, kWide<T>>{}) : go(std::integral_constant<int, 1>{});
}

}  // namespace
}  // namespace ett

extern "C" int64_t ett_gan_generator_fwd_workspace(const ett_gan_generator_fwd_args* a) {
    using namespace ett;
    Check check("gan_generator_fwd", a);
    return sound(check, a) ? workspace(a->x) : -1;
}

extern "C" int32_t ett_gan_generator_fwd(const ett_gan_generator_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("gan_generator_fwd", a, l);
    if (!sound(check, a) || !check.workspace(l, workspace(a->x))) return check.status();
    const char* kernel = check.choose(l, {{"wide", wide(a->x)}, {"plain", true}});
    if (!check.ok()) return check.status();
    if (rows(a->x) == 0) return ett_done("");
    const int32_t status = with_act(a->x.dtype, [&](auto t) {
        using T = decltype(t);
        const Rows<T> k{matrix<const T>(a->x), {}, data<const float>(a->scale), nullptr, static_cast<float*>(l->workspace),
                        data<float>(a->loss), rows(a->x), cols(a->x), 1};
        return run<T>("gan_generator_fwd", strcmp(kernel, "wide") == 0, k, l);
    });
    return status == ETT_OK ? ett_done(kernel) : status;
}

extern "C" int64_t ett_gan_generator_bwd_workspace(const ett_gan_generator_bwd_args* a) {
    using namespace ett;
    Check check("gan_generator_bwd", a);
    return sound(check, a) ? workspace(a->x) : -1;
}

extern "C" int32_t ett_gan_generator_bwd(const ett_gan_generator_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("gan_generator_bwd", a, l);
    if (!sound(check, a) || !check.workspace(l, workspace(a->x))) return check.status();
    const char* kernel = check.choose(l, {{"wide", wide(a->x) && wide(a->dx)}, {"plain", true}});
    if (!check.ok()) return check.status();
    if (rows(a->x) == 0) return ett_done("");
    const int32_t status = with_act(a->x.dtype, [&](auto t) {
        using T = decltype(t);
        const Rows<T> k{matrix<const T>(a->x), matrix<T>(a->dx), data<const float>(a->scale), data<const float>(a->g),
                        static_cast<float*>(l->workspace), nullptr, rows(a->x), cols(a->x), 1};
        return run<T>("gan_generator_bwd", strcmp(kernel, "wide") == 0, k, l);
    });
    return status == ETT_OK ? ett_done(kernel) : status;
}
