//! The generator's adversarial loss.

use super::sums::{add_loss, mean};
use super::*;
use crate::backend::cpu::workspace::no_workspace;

no_workspace!(gan_generator_fwd(GanGeneratorFwd), gan_generator_bwd(GanGeneratorBwd));

by_act! {
    gan_generator_fwd(GanGeneratorFwd) by x => generator;
    gan_generator_bwd(GanGeneratorBwd) by x => generator_grad;
}

/// The negative mean logit of each image.
fn minus_means<E: Elem>(op: &'static str, x: &In) -> Result<Vec<E::Acc>> {
    let x = rows::<E>(op, "x", x)?;
    Ok((0..x.rows).map(|b| -mean(x.row(b), |v| v)).collect())
}

fn softplus<R: Real>(x: R) -> R {
    relu(x) + (-x.abs()).exp().ln_1p()
}

fn sigmoid<R: Real>(x: R) -> R {
    let e = (-x.abs()).exp();
    (if x < R::zero() { e } else { R::one() }) / (R::one() + e)
}

fn generator<E: Elem>(op: &'static str, a: &GanGeneratorFwd) -> Result<()> {
    let sum: E::Acc = minus_means::<E>(op, &a.x)?.into_iter().map(softplus).sum();
    add_loss(op, &a.loss, scalar::<E::Acc>(op, "scale", &a.scale)? * sum)
}

fn generator_grad<E: Elem>(op: &'static str, a: &GanGeneratorBwd) -> Result<()> {
    let means = minus_means::<E>(op, &a.x)?;
    let dx = rows_mut::<E>(op, "dx", &a.dx.0)?;
    let scale = scalar::<E::Acc>(op, "scale", &a.scale)? / E::Acc::of(dx.cols as f64);
    let g = scalar::<E::Acc>(op, "g", &a.g)? * scale;
    par_for(dx.rows, 1, |r| {
        for b in r {
            // SAFETY: chunks do not overlap, so that each row belongs to one thread.
            unsafe { dx.row(b) }.fill(E::down(-g * sigmoid(means[b])));
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::cases::*;
    use super::*;
    use crate::backend::cpu::testing::args::*;

    #[test]
    fn generator_and_its_gradient() {
        check_loss(
            |p, c| vec![act([p, c], normal(1, p * c).into_iter().map(|x| x - 0.5).collect())],
            &[0],
            |v, c| {
                let image = |x: &[f64]| (1.0 + (-x.iter().sum::<f64>() / c as f64).exp()).ln();
                SCALE * v[0].chunks(c).map(image).sum::<f64>()
            },
            |dev, t, loss| {
                dev.gan_generator_fwd(S, &GanGeneratorFwd { x: t[0].view(), scale: t[3].view(), loss })
            },
            |dev, t, d| {
                let (x, g, scale) = (t[0].view(), t[2].view(), t[3].view());
                dev.gan_generator_bwd(S, &GanGeneratorBwd { x, scale, g, dx: d[0].out() })
            },
        );
    }

    #[test]
    fn generator_is_stable_far_out() {
        for (far, want, slope) in [(1e4, 0.0, 0.0), (-1e4, 1e4, -1.0)] {
            let dev = Cpu::poisoned(1).unwrap();
            let t = tensors(
                &dev,
                Precision::F32,
                &[act([1, 1], vec![far]), acc([1], vec![0.0]), acc([1], vec![1.0])],
            );
            let dx = out(&dev, DType::F32, [1, 1]);
            let (x, one) = (t[0].view(), t[2].view());
            dev.gan_generator_fwd(S, &GanGeneratorFwd { x, scale: one, loss: t[1].acc() }).unwrap();
            let a = GanGeneratorBwd { x, scale: one, g: one, dx: dx.out() };
            dev.gan_generator_bwd(S, &a).unwrap();
            assert_eq!(read_loss(&dev, &t[1]).unwrap(), want);
            assert_eq!(read_loss(&dev, &dx).unwrap(), slope);
        }
    }
}
