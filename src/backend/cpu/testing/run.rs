//! A device with a precision, for tests: values, tensors, runs in every precision, comparisons.

use super::super::Cpu;
use super::{DIFFERENCES, bounds};
pub(in super::super) use super::{S, Tensor};
use crate::backend::{DType, Dims, Precision, Role};
use crate::compare::compare;

/// `n` roughly normally distributed numbers that every float type represents exactly.
pub(crate) fn values(n: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) + 1;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    (0..n).map(|_| DType::Bf16.rounded(uniform() + uniform() + uniform())).collect()
}

/// A device and a precision to run a kernel with.
pub(crate) struct Run {
    pub(crate) cpu: Cpu,
    pub(crate) p: Precision,
}

impl Run {
    pub(crate) fn new(p: Precision, threads: usize) -> Self {
        Run { cpu: Cpu::poisoned(threads).unwrap(), p }
    }

    pub(crate) fn f64() -> Self {
        Self::new(Precision::F64, 2)
    }

    fn from(&self, dtype: DType, dims: impl Into<Dims>, v: &[f64]) -> Tensor {
        Tensor::from_f64(&self.cpu, Role::Activation, dtype, v, dims).unwrap()
    }

    /// Activations.
    pub(crate) fn act(&self, dims: impl Into<Dims>, v: &[f64]) -> Tensor {
        self.from(self.p.act, dims, v)
    }

    /// Values in the accumulator type.
    pub(crate) fn acc(&self, dims: impl Into<Dims>, v: &[f64]) -> Tensor {
        self.from(self.p.acc, dims, v)
    }

    /// Indices.
    pub(crate) fn idx(&self, v: &[i32]) -> Tensor {
        Tensor::from_host(&self.cpu, Role::Input, v, [v.len()]).unwrap()
    }

    /// Poisoned activations.
    pub(crate) fn out(&self, dims: impl Into<Dims>) -> Tensor {
        Tensor::empty(&self.cpu, Role::Activation, self.p.act, dims).unwrap()
    }

    /// Poisoned values in the accumulator type.
    pub(crate) fn out_acc(&self, dims: impl Into<Dims>) -> Tensor {
        Tensor::empty(&self.cpu, Role::Activation, self.p.acc, dims).unwrap()
    }

    /// Activations `[rows, cols]` as columns of a wider tensor, which is NaN elsewhere.
    pub(crate) fn columns(&self, rows: usize, cols: usize, v: &[f64]) -> Tensor {
        let mut wide = vec![f64::NAN; rows * (cols + 5)];
        for (w, v) in wide.chunks_mut(cols + 5).zip(v.chunks(cols)) {
            w[2..2 + cols].copy_from_slice(v);
        }
        self.act([rows, cols + 5], &wide).columns(2, cols).unwrap()
    }

    /// The values of several tensors.
    pub(crate) fn values(&self, t: &[Tensor]) -> Vec<Vec<f64>> {
        t.iter().map(|t| self.get(t)).collect()
    }

    /// The values on the host.
    pub(crate) fn get(&self, t: &Tensor) -> Vec<f64> {
        t.to_f64(&self.cpu).unwrap()
    }
}

/// Compares tensors with `want`, with the bounds for their types.
pub(crate) fn compare_all(r: &Run, got: &[Tensor], want: &[Vec<f64>]) {
    assert_eq!(got.len(), want.len(), "number of outputs");
    for (i, (t, want)) in got.iter().zip(want).enumerate() {
        let what = format!("output {i} in {}", r.p.act);
        compare(&what, &r.get(t), want, t.dims().cols(), bounds(t.dtype())).unwrap();
    }
}

/// Runs `f` in every precision, with one thread and with two, and compares its outputs with `want`.
pub(crate) fn check(want: &[Vec<f64>], f: impl Fn(&Run) -> Vec<Tensor>) {
    for p in [Precision::F64, Precision::F32, Precision::BF16] {
        let (one, two) = (Run::new(p, 1), Run::new(p, 2));
        let got = f(&two);
        compare_all(&two, &got, want);
        let bits = |v: &[Vec<f64>]| v.concat().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let same = bits(&two.values(&got)) == bits(&one.values(&f(&one)));
        assert!(same, "outputs in {} depend on the number of threads", p.act);
    }
}

/// Compares gradients with central differences of `forward`, a scalar function of all inputs, at up to a
/// hundred elements of each.
pub(crate) fn check_gradients(inputs: &[&[f64]], grads: &[&[f64]], forward: impl Fn(&[Vec<f64>]) -> f64) {
    let mut at: Vec<Vec<f64>> = inputs.iter().map(|v| v.to_vec()).collect();
    for (k, grad) in grads.iter().enumerate() {
        let some = (0..grad.len()).step_by(grad.len().div_ceil(100).max(1));
        let grad: Vec<f64> = some.clone().map(|i| grad[i]).collect();
        let numeric: Vec<f64> = some
            .map(|i| {
                let (x, h) = (at[k][i], 1e-5);
                at[k][i] = x + h;
                let above = forward(&at);
                at[k][i] = x - h;
                let below = forward(&at);
                at[k][i] = x;
                (above - below) / (2.0 * h)
            })
            .collect();
        compare(&format!("gradient {k}"), &grad, &numeric, 1, DIFFERENCES).unwrap();
    }
}

/// The dot product.
pub(crate) fn inner(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
