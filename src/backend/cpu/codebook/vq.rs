//! The plain VQ baseline.

use rayon::prelude::*;

use super::codes::{indices, look_up};
use super::scores::{ROWS, Sweep};
use super::*;
use crate::backend::cpu::workspace::no_workspace;

no_workspace!(vq_losses(VqLosses), vq_bwd(VqBwd));

pub(crate) fn vq_losses(ws: &Workspace, a: &VqLosses) -> Result<()> {
    by_dtype!("vq_losses", a.z.dtype, E => vq_losses_of::<E>(ws, a))
}

fn vq_losses_of<E: Elem>(_ws: &Workspace, a: &VqLosses) -> Result<()> {
    const OP: &str = "vq_losses";
    let sweep = Sweep::<E>::new(OP, &a.z, &a.e)?;
    let idx = indices(OP, &a.idx, sweep.e.rows)?;
    let inv = scalar::<E::Acc>(OP, "inv_count", &a.inv_count)?;
    let quant = one_mut::<E::Acc>(OP, "quant", &a.quant.0)?;
    let squares = look_up(OP, &sweep, idx, &a.zq)?;
    let weight = (a.beta_commit + a.beta_code) / sweep.d as f64;
    *quant = squares * inv * E::Acc::of(weight);
    Ok(())
}

pub(crate) fn vq_bwd(ws: &Workspace, a: &VqBwd) -> Result<()> {
    by_dtype!("vq_bwd", a.z.dtype, E => vq_bwd_of::<E>(ws, a))
}

fn vq_bwd_of<E: Elem>(_ws: &Workspace, a: &VqBwd) -> Result<()> {
    const OP: &str = "vq_bwd";
    let sweep = Sweep::<E>::new(OP, &a.z, &a.e)?;
    let (m, k, d) = (sweep.z.rows, sweep.e.rows, sweep.d);
    let idx = indices(OP, &a.idx, k)?;
    let g = rows::<E>(OP, "g", &a.g)?;
    let dz = flat_mut::<E>(OP, "dz", &a.dz.0)?;
    // Checked before anything is written.
    let de = a.de.as_ref().map(|de| flat_mut::<E::Acc>(OP, "de", &de.0)).transpose()?;
    let inv = scalar::<E::Acc>(OP, "inv_count", &a.inv_count)?;
    let w = scalar::<E::Acc>(OP, "g_quant", &a.g_quant)? * inv * E::Acc::of(2.0 / d.max(1) as f64);
    let (commit, code) = (w * E::Acc::of(a.beta_commit), w * E::Acc::of(a.beta_code));
    dz.par_chunks_mut(d.max(1)).enumerate().with_min_len(ROWS).for_each(|(i, dz)| {
        let (e, z) = (sweep.e.row(idx[i] as usize), sweep.z.row(i));
        for (j, o) in dz.iter_mut().enumerate() {
            *o = E::down(g.row(i)[j].up() + commit * (z[j].up() - e[j].up()));
        }
    });
    let Some(de) = de else { return Ok(()) };
    for i in 0..m {
        let (e, z) = (sweep.e.row(idx[i] as usize), sweep.z.row(i));
        let row = &mut de[idx[i] as usize * d..][..d];
        for (j, o) in row.iter_mut().enumerate() {
            *o += code * (e[j].up() - z[j].up());
        }
    }
    Ok(())
}
