//! Norms over groups of channels (`channels`) and over rows (`rows`).

mod batch_norm;
#[cfg(test)]
mod cases;
pub(super) mod channels;
mod group_norm;
mod l2_norm;
mod layer_norm;
mod rms_norm;
mod rows;

use super::*;
pub(super) use batch_norm::*;
pub(super) use group_norm::*;
pub(super) use l2_norm::*;
pub(super) use layer_norm::*;
pub(super) use rms_norm::*;

fn rstd<R: Real>(var: R, eps: f64) -> R {
    R::one() / (var + R::of(eps)).sqrt()
}

/// A gradient, if it is wanted.
pub(super) fn sums_out<'a, R: Real>(
    op: &'static str,
    arg: &'static str,
    v: &Option<Acc<'a>>,
) -> Result<Option<&'a mut [R]>> {
    v.as_ref().map(|v| flat_mut(op, arg, &v.0)).transpose()
}

fn add_to<R: Real>(to: &mut [R], v: &[R]) {
    to.iter_mut().zip(v).for_each(|(to, v)| *to += *v);
}
