//! L1 loss.

use num_traits::Float;
use rayon::prelude::*;

use super::sums::{CHUNK, add_loss};
use super::*;
use crate::backend::cpu::workspace::no_workspace;

no_workspace!(l1_fwd(L1Fwd), l1_bwd(L1Bwd));

by_act! {
    l1_fwd(L1Fwd) by a => l1;
    l1_bwd(L1Bwd) by a => l1_grad;
}

fn l1<E: Elem>(op: &'static str, a: &L1Fwd) -> Result<()> {
    let x = flat::<E>(op, "a", &a.a)?;
    let y = flat::<E>(op, "b", &a.b)?;
    let sum =
        par_sum(x.len(), CHUNK, |r| lanes::sum2(&x[r.clone()], &y[r], |x: E, y: E| (x.up() - y.up()).abs()));
    add_loss(op, &a.loss, scalar::<E::Acc>(op, "scale", &a.scale)? * sum)
}

fn l1_grad<E: Elem>(op: &'static str, a: &L1Bwd) -> Result<()> {
    let x = flat::<E>(op, "a", &a.a)?;
    let y = flat::<E>(op, "b", &a.b)?;
    let da = flat_mut::<E>(op, "da", &a.da.0)?;
    let g = scalar::<E::Acc>(op, "g", &a.g)? * scalar::<E::Acc>(op, "scale", &a.scale)?;
    da.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK).zip(y.par_chunks(CHUNK))).for_each(|(da, (x, y))| {
        for ((da, &x), &y) in da.iter_mut().zip(x).zip(y) {
            *da = E::down(g * sign(x.up() - y.up()));
        }
    });
    Ok(())
}

/// The sign, 0 for 0; NaN stays NaN.
fn sign<R: Real>(d: R) -> R {
    if d > R::zero() {
        R::one()
    } else if d < R::zero() {
        -R::one()
    } else {
        d
    }
}

#[cfg(test)]
mod tests {
    use super::super::cases::*;
    use super::*;
    use crate::backend::cpu::testing::args::*;

    #[test]
    fn l1_and_its_gradient() {
        check_loss(
            |p, c| {
                let b = normal(2, p * c);
                let d = clear_of(0.0, normal(1, p * c));
                vec![act([p, c], b.iter().zip(d).map(|(b, d)| b + d).collect()), act([p, c], b)]
            },
            &[0],
            |v, _| SCALE * v[0].iter().zip(&v[1]).map(|(a, b)| (a - b).abs()).sum::<f64>(),
            |dev, t, loss| {
                let (a, b, scale) = (t[0].view(), t[1].view(), t[4].view());
                dev.l1_fwd(S, &L1Fwd { a, b, scale, loss })
            },
            |dev, t, d| {
                let (a, b, g, scale) = (t[0].view(), t[1].view(), t[3].view(), t[4].view());
                dev.l1_bwd(S, &L1Bwd { a, b, scale, g, da: d[0].out() })
            },
        );
    }

    #[test]
    fn l1_has_no_gradient_where_equal() {
        let dev = Cpu::poisoned(1).unwrap();
        let t = tensors(&dev, Precision::F32, &[act([3], vec![1.0, -0.0, 2.0]), acc([1], vec![1.0])]);
        let da = out(&dev, DType::F32, [3]);
        let (x, g) = (t[0].view(), t[1].view());
        dev.l1_bwd(S, &L1Bwd { a: x, b: x, scale: g, g, da: da.out() }).unwrap();
        assert_eq!(da.to_f64(&dev).unwrap(), [0.0; 3]);
    }

    #[test]
    fn shapes_that_differ_are_errors() {
        let dev = Cpu::poisoned(1).unwrap();
        let t = tensors(
            &dev,
            Precision::F32,
            &[act([3], vec![0.0; 3]), act([2], vec![0.0; 2]), acc([1], vec![0.0])],
        );
        let (a, b, scale, loss) = (t[0].view(), t[1].view(), t[2].view(), t[2].acc());
        assert!(dev.l1_fwd(S, &L1Fwd { a, b, scale, loss }).is_err());
        assert!(dev.l1_fwd(S, &L1Fwd { a, b: a, scale, loss: t[1].acc() }).is_err());
        assert!(dev.l1_fwd(S, &L1Fwd { a, b: a, scale: b, loss }).is_err());
        let x = LecamFwd { real: a, fake: b, ema: a, scale, loss };
        assert!(dev.lecam_fwd(S, &x).is_err());
        let none = out(&dev, DType::F32, [0]);
        let out = out(&dev, DType::F32, [2]);
        let x = LecamUpdate { real: none.view(), fake: b, ema: b, out: out.out(), decay: 0.5 };
        assert!(dev.lecam_update(S, &x).is_err());
    }
}
