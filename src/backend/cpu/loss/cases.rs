//! Sizes and checks shared by the tests of the losses.

use super::*;
use crate::backend::cpu::testing::args::*;

pub(super) const SIZES: [(usize, usize); 4] = [(1, 1), (3, 7), (131, 64), (2, CHUNK + 3)];
pub(super) const SCALE: f64 = 0.3;

pub(super) fn read_loss(dev: &Cpu, loss: &Tensor) -> Result<f64> {
    Ok(loss.to_f64(dev)?[0])
}

/// Moves values away from a kink, where finite differences are wrong.
pub(super) fn clear_of(kink: f64, mut v: Vec<f64>) -> Vec<f64> {
    v.iter_mut().filter(|x| (**x - kink).abs() < 0.01).for_each(|x| *x = kink + 0.02);
    v
}

/// Checks a loss and its gradients for the arguments `wrt` at all sizes. Gradients are compared with f64, and with
/// finite differences if the size is small. The last three arguments are appended here: the loss, with an initial
/// value, its gradient, and the scale.
pub(super) fn check_loss(
    args: impl Fn(usize, usize) -> Vec<Arg>,
    wrt: &[usize],
    naive: impl Fn(&[Vec<f64>], usize) -> f64,
    fwd: impl Fn(&Cpu, &[Tensor], Acc) -> Result<()>,
    bwd: impl Fn(&Cpu, &[Tensor], &[Tensor]) -> Result<()>,
) {
    for (p, c) in SIZES {
        let mut args = args(p, c);
        let at = args.len();
        args.extend([acc([1], vec![0.25]), acc([1], vec![1.7]), acc([1], vec![SCALE])]);
        let run = |dev: &Cpu, _: Precision, t: &[Tensor]| {
            fwd(dev, t, t[at].acc())?;
            Ok(vec![t[at].clone()])
        };
        check(&args, |v| vec![vec![0.25 + naive(v, c)]], run);
        let grads = |dev: &Cpu, t: &[Tensor]| {
            let d: Vec<Tensor> = wrt.iter().map(|&i| out(dev, t[i].dtype(), t[i].dims())).collect();
            bwd(dev, t, &d)?;
            Ok(d)
        };
        check_self(&args, |dev, _, t| grads(dev, t));
        if p * c < 100 {
            let loss = |dev: &Cpu, t: &[Tensor]| {
                fwd(dev, t, t[at].acc())?;
                Ok(1.7 * read_loss(dev, &t[at])?)
            };
            check_grad(&args, wrt, loss, grads);
        }
    }
}
