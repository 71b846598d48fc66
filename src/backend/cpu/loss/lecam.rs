//! LeCAM regularization of the discriminator, and the averages that it reads.

use num_traits::Float;

use super::sums::{add_loss, mean, total};
use super::*;
use crate::backend::cpu::workspace::no_workspace;

no_workspace!(lecam_update(LecamUpdate), lecam_fwd(LecamFwd), lecam_bwd(LecamBwd));

by_act! {
    lecam_update(LecamUpdate) by real => lecam_averages;
    lecam_fwd(LecamFwd) by real => lecam;
    lecam_bwd(LecamBwd) by real => lecam_grad;
}

fn lecam_averages<E: Elem>(op: &'static str, a: &LecamUpdate) -> Result<()> {
    let real = mean(flat::<E>(op, "real", &a.real)?, |x| x);
    let fake = mean(flat::<E>(op, "fake", &a.fake)?, |x| x);
    let ema = flat::<E::Acc>(op, "ema", &a.ema)?;
    let out = flat_mut::<E::Acc>(op, "out", &a.out.0)?;
    let (decay, rest) = (E::Acc::of(a.decay), E::Acc::of(1.0 - a.decay));
    for (out, (&old, new)) in out.iter_mut().zip(ema.iter().zip([real, fake])) {
        *out = if new.is_finite() { decay * old + rest * new } else { old };
    }
    Ok(())
}

fn lecam<E: Elem>(op: &'static str, a: &LecamFwd) -> Result<()> {
    let ema = flat::<E::Acc>(op, "ema", &a.ema)?;
    let sq = |x: E::Acc| relu(x) * relu(x);
    let real = total(flat::<E>(op, "real", &a.real)?, |x| sq(x - ema[1]));
    let fake = total(flat::<E>(op, "fake", &a.fake)?, |x| sq(ema[0] - x));
    add_loss(op, &a.loss, scalar::<E::Acc>(op, "scale", &a.scale)? * (real + fake))
}

fn lecam_grad<E: Elem>(op: &'static str, a: &LecamBwd) -> Result<()> {
    let (real, fake) = (flat::<E>(op, "real", &a.real)?, flat::<E>(op, "fake", &a.fake)?);
    let ema = flat::<E::Acc>(op, "ema", &a.ema)?;
    let g = scalar::<E::Acc>(op, "g", &a.g)? * scalar::<E::Acc>(op, "scale", &a.scale)? * E::Acc::of(2.0);
    let (dreal, dfake) = (flat_mut::<E>(op, "dreal", &a.dreal.0)?, flat_mut::<E>(op, "dfake", &a.dfake.0)?);
    map(dreal, real, |x| g * relu(x - ema[1]));
    map(dfake, fake, |x| -g * relu(ema[0] - x));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::cases::*;
    use super::*;
    use crate::backend::cpu::testing::args::*;

    #[test]
    fn lecam_and_its_gradient() {
        check_loss(
            |p, c| {
                let (real, fake) = (clear_of(-0.3, normal(1, p * c)), clear_of(0.4, normal(2, p * (c + 1))));
                vec![act([p, c], real), act([p, c + 1], fake), acc([2], vec![0.4, -0.3])]
            },
            &[0, 1],
            |v, _| {
                let sum =
                    |v: &[f64], f: &dyn Fn(f64) -> f64| v.iter().map(|&x| f(x).max(0.0).powi(2)).sum::<f64>();
                SCALE * (sum(&v[0], &|x| x - v[2][1]) + sum(&v[1], &|x| v[2][0] - x))
            },
            |dev, t, loss| {
                let (real, fake, ema, scale) = (t[0].view(), t[1].view(), t[2].view(), t[5].view());
                dev.lecam_fwd(S, &LecamFwd { real, fake, ema, scale, loss })
            },
            |dev, t, d| {
                let (real, fake, ema) = (t[0].view(), t[1].view(), t[2].view());
                let (g, scale, dreal, dfake) = (t[4].view(), t[5].view(), d[0].out(), d[1].out());
                dev.lecam_bwd(S, &LecamBwd { real, fake, ema, scale, g, dreal, dfake })
            },
        );
    }

    #[test]
    fn lecam_averages_take_in_the_batch() {
        for (p, c) in SIZES {
            let args = [
                act([p, c], normal(1, p * c).into_iter().map(|x| x + 1.0).collect()),
                act([p], normal(2, p).into_iter().map(|x| x - 1.0).collect()),
                acc([2], vec![0.5, -0.25]),
            ];
            let naive = |v: &[Vec<f64>]| {
                let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
                vec![vec![0.9 * v[2][0] + 0.1 * mean(&v[0]), 0.9 * v[2][1] + 0.1 * mean(&v[1])]]
            };
            check(&args, naive, |dev, p, t| {
                let out = out(dev, p.acc, [2]);
                let (real, fake, ema) = (t[0].view(), t[1].view(), t[2].view());
                dev.lecam_update(S, &LecamUpdate { real, fake, ema, out: out.out(), decay: 0.9 })?;
                Ok(vec![out])
            });
        }
    }

    #[test]
    fn lecam_averages_leave_out_what_is_not_finite() {
        let dev = Cpu::poisoned(1).unwrap();
        let args = [act([2], vec![1.0, f64::NAN]), act([2], vec![1.0, 3.0]), acc([2], vec![0.5, -0.5])];
        let t = tensors(&dev, Precision::F64, &args);
        let out = out(&dev, DType::F64, [2]);
        let (real, fake, ema) = (t[0].view(), t[1].view(), t[2].view());
        dev.lecam_update(S, &LecamUpdate { real, fake, ema, out: out.out(), decay: 0.5 }).unwrap();
        assert_eq!(out.to_f64(&dev).unwrap(), [0.5, 0.75]);
    }
}
