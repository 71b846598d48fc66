//! The discriminator's hinge loss.

use num_traits::{One, Zero};

use super::sums::{add_loss, total};
use super::*;
use crate::backend::cpu::workspace::no_workspace;

no_workspace!(hinge_fwd(HingeFwd), hinge_bwd(HingeBwd));

by_act! {
    hinge_fwd(HingeFwd) by x => hinge;
    hinge_bwd(HingeBwd) by x => hinge_grad;
}

/// The sign in `relu(1 + side * x)`, which is 0 for real logits above 1 and for fake logits below -1.
fn side<R: Real>(real: bool) -> R {
    if real { -R::one() } else { R::one() }
}

fn hinge<E: Elem>(op: &'static str, a: &HingeFwd) -> Result<()> {
    let x = flat::<E>(op, "x", &a.x)?;
    let side = side::<E::Acc>(a.real);
    let sum = total(x, |x| relu(E::Acc::one() + side * x));
    let scale = scalar::<E::Acc>(op, "scale", &a.scale)? * E::Acc::of(a.factor);
    add_loss(op, &a.loss, scale * sum)
}

fn hinge_grad<E: Elem>(op: &'static str, a: &HingeBwd) -> Result<()> {
    let x = flat::<E>(op, "x", &a.x)?;
    let dx = flat_mut::<E>(op, "dx", &a.dx.0)?;
    let side = side::<E::Acc>(a.real);
    let scale = scalar::<E::Acc>(op, "scale", &a.scale)? * E::Acc::of(a.factor);
    let g = scalar::<E::Acc>(op, "g", &a.g)? * scale * side;
    let (zero, one) = (E::Acc::zero(), E::Acc::one());
    map(dx, x, |x| if one + side * x > zero { g } else { zero });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::cases::*;
    use super::*;
    use crate::backend::cpu::testing::args::*;

    #[test]
    fn hinge_and_its_gradient() {
        for real in [true, false] {
            let sign = if real { -1.0 } else { 1.0 };
            check_loss(
                |p, c| vec![act([p, c], clear_of(-sign, normal(1, p * c)))],
                &[0],
                |v, _| 0.5 * SCALE * v[0].iter().map(|x| (1.0 + sign * x).max(0.0)).sum::<f64>(),
                |dev, t, loss| {
                    let (x, scale) = (t[0].view(), t[3].view());
                    dev.hinge_fwd(S, &HingeFwd { x, scale, loss, real, factor: 0.5 })
                },
                |dev, t, d| {
                    let (x, g, scale) = (t[0].view(), t[2].view(), t[3].view());
                    dev.hinge_bwd(S, &HingeBwd { x, scale, g, dx: d[0].out(), real, factor: 0.5 })
                },
            );
        }
    }
}
