//! Activation functions and their derivatives.

use super::*;

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid<R: Real>(x: R) -> R {
    R::one() / (R::one() + (-x).fast_exp())
}

/// `x sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu<R: Real>(x: R) -> R {
    x * sigmoid(x)
}

/// Derivative of `silu`.
#[inline(always)]
pub(crate) fn silu_slope<R: Real>(x: R) -> R {
    let s = sigmoid(x);
    s * (R::one() + x * (R::one() - s))
}

/// `sigmoid(2u)` in the tanh form of GELU, `x sigmoid(2u)`, and the derivative of `2u`.
#[inline(always)]
pub(super) fn tanh_gate<R: Real>(x: R) -> (R, R) {
    let (a, b) = (R::of(2.0 * (2.0 / std::f64::consts::PI).sqrt()), R::of(0.044715));
    let square = x * x;
    (sigmoid(a * x * (R::one() + b * square)), a * (R::one() + R::of(3.0) * b * square))
}

/// The tanh form of GELU.
#[inline(always)]
pub(crate) fn gelu_tanh<R: Real>(x: R) -> R {
    x * tanh_gate(x).0
}

/// The cumulative distribution function of the standard normal distribution.
#[inline(always)]
pub(super) fn normal<R: Real>(x: R) -> R {
    R::of(0.5) * (R::one() + (x * R::of(std::f64::consts::FRAC_1_SQRT_2)).erf())
}

/// The density of the standard normal distribution.
#[inline(always)]
pub(super) fn density<R: Real>(x: R) -> R {
    (x * x * R::of(-0.5)).fast_exp()
        * R::of(0.5 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2)
}

/// `x` if positive, otherwise `slope * x`; NaN stays NaN.
#[inline(always)]
pub(crate) fn leaky<R: Real>(x: R, slope: R) -> R {
    if x > R::zero() { x } else { slope * x }
}

/// Derivative of `leaky`: `slope` at 0.
#[inline(always)]
pub(crate) fn leaky_slope<R: Real>(x: R, slope: R) -> R {
    if x > R::zero() { R::one() } else { slope }
}
