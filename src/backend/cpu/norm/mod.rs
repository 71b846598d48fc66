//! Norms over groups of channels (`channels`) and over rows (`rows`).

mod batch_norm;
#[cfg(test)]
mod cases;
mod channels;
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

/// A vector of `n` elements.
fn vector<'a, T: Element>(op: &'static str, arg: &'static str, v: &In<'a>, n: usize) -> Result<&'a [T]> {
    expect(op, arg, v, n)?;
    flat(op, arg, v)
}

/// A vector of `n` elements, mutably.
#[allow(clippy::mut_from_ref)]
fn vector_mut<'a, T: Element>(
    op: &'static str,
    arg: &'static str,
    v: &In<'a>,
    n: usize,
) -> Result<&'a mut [T]> {
    expect(op, arg, v, n)?;
    flat_mut(op, arg, v)
}

/// A gradient of `n` elements, if the argument is present.
fn sums_out<'a, R: Real>(
    op: &'static str,
    arg: &'static str,
    v: &Option<Acc<'a>>,
    n: usize,
) -> Result<Option<&'a mut [R]>> {
    v.as_ref().map(|v| vector_mut(op, arg, &v.0, n)).transpose()
}

fn add_to<R: Real>(to: &mut [R], v: &[R]) {
    to.iter_mut().zip(v).for_each(|(to, v)| *to += *v);
}
