// norm.cuh: the GroupNorm and SiLU on the way into a convolution, formed from given statistics while pixels are loaded.
#pragma once

#include "activation.cuh"
#include "launch.cuh"
#include "types.cuh"

namespace ett {
namespace conv {

// mean, rstd [B, G]; gamma, beta [C]; `width` channels a group. Null: the input is read as it is.
template <class T> struct InputNorm {
    const float *mean, *rstd;
    const T *gamma, *beta;
    int groups, width;

    __host__ __device__ __forceinline__ bool present() const { return mean != nullptr; }
    // SiLU(GroupNorm(x)), rounded, of channel c of an image.
    __device__ __forceinline__ T apply(T x, int image, int c) const {
        const int64_t at = int64_t(image) * groups + c / width;
        return from_float<T>(silu<T>((to_float(x) - mean[at]) * (rstd[at] * to_float(gamma[c])) + to_float(beta[c])));
    }
};

// Writes half the scale and half the shift of channels [first, end) of an image to `table`, two floats each.
template <class T, int THREADS>
__device__ __forceinline__ void norm_table(float* table, const InputNorm<T>& norm, int image, int first, int end) {
    for (int c = first + int(threadIdx.x); c < end; c += THREADS) {
        const int64_t at = int64_t(image) * norm.groups + c / norm.width;
        const float scale = 0.5f * norm.rstd[at] * to_float(norm.gamma[c]);
        table[2 * (c - first)] = scale;
        table[2 * (c - first) + 1] = 0.5f * to_float(norm.beta[c]) - norm.mean[at] * scale;
    }
}

// SiLU(2h). For bf16 as h + h tanh(h): half as many instructions as the quotient, and its error, of 2^-11 |h|, is less than
// that of the rounding that follows.
template <class T> __device__ __forceinline__ float silu_of_twice(float h) {
    if constexpr (sizeof(T) == 2)
        return fmaf(h, tanh_approx(h), h);
    else
        return silu<T>(2.f * h);
}

// Replaces a 16-byte piece of pixels in shared memory by its activation. `table`: of its first channel.
template <class T> __device__ __forceinline__ void activate(T* piece, const float* table) {
    float v[kWide<T>];
    load(v, piece);
#pragma unroll
    for (int e = 0; e < kWide<T>; e += 2) {
        float two[4];
        load(two, table + 2 * e);
        v[e] = silu_of_twice<T>(fmaf(v[e], two[0], two[1]));
        v[e + 1] = silu_of_twice<T>(fmaf(v[e + 1], two[2], two[3]));
    }
    store<kWide<T>>(piece, v);
}

// ---- host ------------------------------------------------------------------------------------------------

struct NormViews {
    const ett_view &mean, &rstd, &gamma, &beta;
};

template <class T> InputNorm<T> input_norm(const NormViews& n, int64_t channels) {
    if (!present(n.mean)) return {};
    return {data<const float>(n.mean), data<const float>(n.rstd), data<const T>(n.gamma), data<const T>(n.beta), int(cols(n.mean)), int(channels / cols(n.mean))};
}

// The statistics `mean` and `rstd` of images x, named so in errors.
inline bool check_statistics(Check& check, const char* mean_name, const ett_view& mean, const char* rstd_name, const ett_view& rstd, const ett_view& x) {
    if (!check.all_or_none({{mean_name, &mean}, {rstd_name, &rstd}}) || !present(mean)) return check.ok();
    if (!check.view(mean_name, mean)) return false;
    const int64_t groups = cols(mean);
    if (!check.matrix(mean_name, mean, ETT_F32, x.dims[0], groups) || !check.vector(mean_name, mean, ETT_F32, product(x.dims[0], groups))) return false;
    return check.require(groups > 0 && cols(x) % groups == 0, mean_name, "of a number of groups that does not divide the channels", "a number of groups that does") &&
           check.matrix(rstd_name, rstd, ETT_F32, x.dims[0], groups) && check.vector(rstd_name, rstd, ETT_F32, product(x.dims[0], groups));
}

// The norm of images x.
inline bool check_norm(Check& check, const NormViews& n, const ett_view& x) {
    if (!check.all_or_none({{"mean", &n.mean}, {"rstd", &n.rstd}, {"gamma", &n.gamma}, {"beta", &n.beta}}) || !present(n.mean)) return check.ok();
    return check_statistics(check, "mean", n.mean, "rstd", n.rstd, x) && check.vector("gamma", n.gamma, x.dtype, cols(x)) &&
           check.vector("beta", n.beta, x.dtype, cols(x));
}

}  // namespace conv
}  // namespace ett
