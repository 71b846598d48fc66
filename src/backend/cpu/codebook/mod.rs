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
    expect(op, arg, v, 1)?;
    Ok(&mut flat_mut::<R>(op, arg, v)?[0])
}

/// Whether the arguments of the entropies are present; fails if only some of them are.
fn all_or_none(op: &'static str, args: &[(&'static str, bool)]) -> Result<bool> {
    let (first, there) = args[0];
    match args.iter().find(|(_, present)| *present != there) {
        None => Ok(there),
        Some(&(name, _)) if there => Err(Error::arg(op, name, "absent", format!("present, as {first} is"))),
        Some(&(name, _)) => Err(Error::arg(op, name, "present", format!("absent, as {first} is"))),
    }
}
