//! Arguments in three precisions, and comparisons with loops in f64, between numbers of threads, and with finite
//! differences.

use super::super::*;
use super::{DIFFERENCES, bounds};
pub(in super::super) use super::{S, Tensor};
use crate::compare::compare;

#[derive(Clone, Copy)]
enum Kind {
    Act,
    Acc,
    Int,
}

/// The values of a tensor argument, independent of the precision.
#[derive(Clone)]
pub(crate) struct Arg(Kind, Dims, pub(crate) Vec<f64>);

pub(crate) fn act(dims: impl Into<Dims>, v: Vec<f64>) -> Arg {
    Arg(Kind::Act, dims.into(), v)
}
pub(crate) fn acc(dims: impl Into<Dims>, v: Vec<f64>) -> Arg {
    Arg(Kind::Acc, dims.into(), v)
}
pub(crate) fn int(dims: impl Into<Dims>, v: Vec<f64>) -> Arg {
    Arg(Kind::Int, dims.into(), v)
}

/// Normally distributed numbers (splitmix64 and Box-Muller).
pub(crate) fn normal(seed: u64, n: usize) -> Vec<f64> {
    let mut s = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut unit = move || {
        s = s.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (s ^ (s >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (((z ^ (z >> 31)) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    (0..n).map(|_| (-2.0 * unit().ln()).sqrt() * (std::f64::consts::TAU * unit()).cos()).collect()
}

/// The arguments on the device, rounded to `p`.
pub(crate) fn tensors(dev: &Cpu, p: Precision, args: &[Arg]) -> Vec<Tensor> {
    let of = |Arg(kind, dims, v): &Arg| {
        let dtype = match kind {
            Kind::Act => p.act,
            Kind::Acc => p.acc,
            Kind::Int => DType::I32,
        };
        Tensor::from_f64(dev, Role::Input, dtype, v, *dims).unwrap()
    };
    args.iter().map(of).collect()
}

/// A poisoned output.
pub(crate) fn out(dev: &Cpu, dtype: DType, dims: impl Into<Dims>) -> Tensor {
    Tensor::empty(dev, Role::Activation, dtype, dims).unwrap()
}

pub(crate) fn read(dev: &Cpu, t: &[Tensor]) -> Vec<Vec<f64>> {
    t.iter().map(|t| t.to_f64(dev).unwrap()).collect()
}

/// Runs `run` in every precision and compares its outputs with `naive` on the same rounded arguments, and bit by bit
/// between one thread and two.
pub(crate) fn check(
    args: &[Arg],
    naive: impl Fn(&[Vec<f64>]) -> Vec<Vec<f64>>,
    run: impl Fn(&Cpu, Precision, &[Tensor]) -> Result<Vec<Tensor>>,
) {
    for p in [Precision::F64, Precision::F32, Precision::BF16] {
        let result = |threads| {
            let dev = Cpu::poisoned(threads).unwrap();
            let got = run(&dev, p, &tensors(&dev, p, args)).unwrap();
            (read(&dev, &got), got)
        };
        let ((one, _), (two, got)) = (result(1), result(2));
        let dev = Cpu::poisoned(1).unwrap();
        let want = naive(&read(&dev, &tensors(&dev, p, args)));
        assert_eq!(two.len(), want.len());
        for (i, want) in want.iter().enumerate() {
            let (what, t) = (format!("output {i} in {}", p.act), &got[i]);
            compare(&what, &two[i], want, t.dims().cols(), bounds(t.dtype())).unwrap();
            let same = one[i].iter().zip(&two[i]).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "output {i} in {} depends on the number of threads", p.act);
        }
    }
}

/// Like [`check`], but compares with the same kernels in f64, for backward kernels that [`check_grad`] checks in f64.
pub(crate) fn check_self(args: &[Arg], run: impl Fn(&Cpu, Precision, &[Tensor]) -> Result<Vec<Tensor>>) {
    let naive = |v: &[Vec<f64>]| {
        let dev = Cpu::poisoned(2).unwrap();
        let args: Vec<Arg> = args.iter().zip(v).map(|(a, v)| Arg(a.0, a.1, v.clone())).collect();
        let t = tensors(&dev, Precision::F64, &args);
        read(&dev, &run(&dev, Precision::F64, &t).unwrap())
    };
    check(args, naive, &run);
}

/// Compares `grads`, the gradients of `loss` for the arguments `wrt`, with central differences in f64.
pub(crate) fn check_grad(
    args: &[Arg],
    wrt: &[usize],
    loss: impl Fn(&Cpu, &[Tensor]) -> Result<f64>,
    grads: impl Fn(&Cpu, &[Tensor]) -> Result<Vec<Tensor>>,
) {
    const STEP: f64 = 1e-5;
    let dev = Cpu::poisoned(2).unwrap();
    let got = read(&dev, &grads(&dev, &tensors(&dev, Precision::F64, args)).unwrap());
    assert_eq!(got.len(), wrt.len());
    for (got, &i) in got.iter().zip(wrt) {
        let mut args = args.to_vec();
        let want: Vec<f64> = (0..args[i].2.len())
            .map(|j| {
                let x = args[i].2[j];
                let mut at = |x: f64| {
                    args[i].2[j] = x;
                    loss(&dev, &tensors(&dev, Precision::F64, &args)).unwrap()
                };
                let d = (at(x + STEP) - at(x - STEP)) / (2.0 * STEP);
                at(x);
                d
            })
            .collect();
        compare(&format!("gradient of argument {i}"), got, &want, 1, DIFFERENCES).unwrap();
    }
}
