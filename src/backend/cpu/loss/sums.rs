//! Sums and means over all elements, in fixed chunks, and the addition to a loss.

use super::*;

/// Number of elements per task.
pub(super) const CHUNK: usize = 16384;

/// Adds `value` to a loss.
pub(super) fn add_loss<R: Real>(op: &'static str, loss: &Acc, value: R) -> Result<()> {
    flat_mut::<R>(op, "loss", &loss.0)?[0] += value;
    Ok(())
}

/// Sum of `f` over all elements.
pub(super) fn total<E: Elem>(x: &[E], f: impl Fn(E::Acc) -> E::Acc + Sync) -> E::Acc {
    par_sum(x.len(), CHUNK, |r| lanes::sum(&x[r], |x: E| f(x.up())))
}

/// Mean of `f` over all elements, of which there must be some.
pub(super) fn mean<E: Elem>(x: &[E], f: impl Fn(E::Acc) -> E::Acc + Sync) -> E::Acc {
    total(x, f) / E::Acc::of(x.len() as f64)
}
