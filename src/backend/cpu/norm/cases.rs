//! Values and shapes shared by the tests of the norms.

use super::*;
use crate::backend::cpu::testing::run::*;

pub(super) fn mean_var(v: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = v.clone().count() as f64;
    let mean = v.clone().sum::<f64>() / n;
    (mean, v.map(|x| (x - mean).powi(2)).sum::<f64>() / n)
}

/// Inputs with a mean far from zero, which reveals errors of a one-pass variance.
pub(super) fn shifted(n: usize, seed: u64) -> Vec<f64> {
    values(n, seed).iter().map(|x| DType::Bf16.rounded(x + 3.0)).collect()
}

/// Shapes for norms over rows: more rows than one partial sum covers, and odd widths.
pub(super) const ROWS: [[usize; 2]; 4] = [[1, 1], [7, 5], [150, 67], [3, 1031]];
