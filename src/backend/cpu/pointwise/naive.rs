//! Reference implementations for the tests of elementwise kernels.

use super::*;

pub(super) fn naive(f: Unary, x: f64) -> f64 {
    match f {
        Unary::Silu => x / (1.0 + (-x).exp()),
        Unary::Gelu => x * 0.5 * (1.0 + Real::erf(x / 2f64.sqrt())),
        Unary::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + u.tanh())
        }
        Unary::Relu => x.max(0.0),
        Unary::LeakyRelu(slope) => x.max(0.0) + slope * x.min(0.0),
    }
}

pub(super) fn zip(a: &[f64], b: &[f64], f: impl Fn(f64, f64) -> f64) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| f(*a, *b)).collect()
}
