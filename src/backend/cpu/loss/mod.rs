//! Losses: reconstruction, perceptual, adversarial, cross-entropy.

#[cfg(test)]
mod cases;
mod gan_generator;
mod hinge;
mod l1;
mod lecam;
mod linear_xent;
mod linear_xent_bwd;
mod linear_xent_fwd;
mod lpips;
mod sums;
mod xent;

use rayon::prelude::*;

use self::sums::CHUNK;
use super::*;
pub(super) use gan_generator::*;
pub(super) use hinge::*;
pub(super) use l1::*;
pub(super) use lecam::*;
pub(super) use linear_xent_bwd::*;
pub(super) use linear_xent_fwd::*;
pub(super) use lpips::*;
pub(super) use xent::*;

macro_rules! by_act {
    ($($name:ident($args:ident) by $arg:ident => $f:ident;)*) => {
        $(pub(crate) fn $name(_ws: &Workspace, a: &$args) -> Result<()> {
            by_dtype!(stringify!($name), a.$arg.dtype, E => $f::<E>(stringify!($name), a))
        })*
    };
}
use by_act;

/// `y = f(x)` in parallel.
fn map<E: Elem>(y: &mut [E], x: &[E], f: impl Fn(E::Acc) -> E::Acc + Sync) {
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = E::down(f(x.up()));
        }
    });
}

/// max(x, 0); NaN stays NaN.
fn relu<R: Real>(x: R) -> R {
    if x < R::zero() { R::zero() } else { x }
}
