// activation.cuh: activation functions and their derivatives, computed in float. T is the type that the result is
// rounded to: for bf16 the hardware's approximate exponential and division are accurate enough (relative error below
// 2^-19) and save half of the instructions; float uses the library functions.
#pragma once

#include "types.cuh"

namespace ett {

template <class T> __device__ __forceinline__ float exponential(float x) {
    if constexpr (sizeof(T) == 2)
        return exp2_approx(1.44269504f * x);
    else
        return expf(x);
}

template <class T> __device__ __forceinline__ float quotient(float a, float b) {
    if constexpr (sizeof(T) == 2)
        return __fdividef(a, b);
    else
        return a / b;
}

// The square root of x >= 0.
template <class T> __device__ __forceinline__ float root(float x) {
    if constexpr (sizeof(T) == 2)
        return sqrt_approx(x);
    else
        return sqrtf(x);
}

// 1 / (1 + e^-x).
template <class T> __device__ __forceinline__ float sigmoid(float x) {
    if constexpr (sizeof(T) == 2)
        return reciprocal_approx(1.f + exponential<T>(-x));
    else
        return 1.f / (1.f + exponential<T>(-x));
}

template <class T> __device__ __forceinline__ float silu(float x) { return x * sigmoid<T>(x); }
template <class T> __device__ __forceinline__ float silu_slope(float x) {
    const float s = sigmoid<T>(x);
    return s * (1.f + x * (1.f - s));
}

// The cumulative distribution function of the standard normal distribution.
__device__ __forceinline__ float normal(float x) { return 0.5f + 0.5f * erff(0.70710678f * x); }

template <class T> __device__ __forceinline__ float gelu(float x) { return x * normal(x); }
template <class T> __device__ __forceinline__ float gelu_slope(float x) {
    return normal(x) + x * 0.39894228f * exponential<T>(-0.5f * x * x);
}

// The tanh form of GELU is x * sigmoid(2u). `gate` is sigmoid(2u), `slope` the derivative of 2u.
template <class T> __device__ __forceinline__ void tanh_gate(float x, float& gate, float& slope) {
    constexpr float a = 1.59576912f, b = 0.044715f;  // a = 2 sqrt(2 / pi)
    const float square = x * x;
    gate = sigmoid<T>(a * x * (1.f + b * square));
    slope = a * (1.f + 3.f * b * square);
}
template <class T> __device__ __forceinline__ float gelu_tanh(float x) {
    float gate, slope;
    tanh_gate<T>(x, gate, slope);
    return x * gate;
}
template <class T> __device__ __forceinline__ float gelu_tanh_slope(float x) {
    float gate, slope;
    tanh_gate<T>(x, gate, slope);
    return gate + x * slope * gate * (1.f - gate);
}

// max(x, 0); propagates NaN.
__device__ __forceinline__ float relu(float x) { return x <= 0.f ? 0.f : x; }
__device__ __forceinline__ float leaky_relu(float x, float slope) { return x > 0.f ? x : slope * x; }
// The derivative of leaky_relu, `slope` at 0; with slope 0 the derivative of relu.
__device__ __forceinline__ float leaky_relu_slope(float x, float slope) { return x > 0.f ? 1.f : slope; }

}  // namespace ett
