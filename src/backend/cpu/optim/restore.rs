//! Undoes the changes of a step that is skipped.

use rayon::prelude::*;

use super::*;
use crate::backend::cpu::workspace::no_workspace;

no_workspace!(restore(Restore));

pub(crate) fn restore(_ws: &Workspace, a: &Restore) -> Result<()> {
    match a.norm.dtype {
        DType::F64 => taken_back::<f64>(a),
        _ => taken_back::<f32>(a),
    }
}

fn taken_back<R: Real + Element>(a: &Restore) -> Result<()> {
    let op = "restore";
    let norm = flat::<R>(op, "norm", &a.norm)?;
    let (from, to) = (bytes(op, "x", &a.x)?, bytes_mut(op, "y", &a.y.0)?);
    if norm[1] > R::of(0.0) {
        to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(to, from)| to.copy_from_slice(from));
    }
    Ok(())
}
