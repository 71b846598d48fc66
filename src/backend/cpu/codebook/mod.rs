//! The quantizer; docs/quantizer.md derives the formulas.

mod codes;
mod ibq_bwd;
mod ibq_cols;
mod ibq_losses;
mod ibq_rows;
mod nearest;
mod scores;
mod vq;

use super::*;
pub(super) use ibq_bwd::*;
pub(super) use ibq_cols::*;
pub(super) use ibq_losses::*;
pub(super) use ibq_rows::*;
pub(super) use nearest::*;
pub(super) use vq::*;

/// A one-element output.
fn one_mut<'a, R: Element>(op: &'static str, arg: &'static str, v: &In<'a>) -> Result<&'a mut R> {
    Ok(&mut flat_mut::<R>(op, arg, v)?[0])
}
