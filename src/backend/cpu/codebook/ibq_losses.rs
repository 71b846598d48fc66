//! The quantized tokens, the quantization loss and the entropies of IBQ.

use num_traits::{Float, Zero};
use rayon::prelude::*;

use super::codes::{indices, look_up};
use super::scores::Sweep;
use super::*;
use crate::backend::cpu::workspace::no_workspace;

no_workspace!(ibq_losses(IbqLosses));

pub(crate) fn ibq_losses(ws: &Workspace, a: &IbqLosses) -> Result<()> {
    by_dtype!("ibq_losses", a.z.dtype, E => ibq_losses_of::<E>(ws, a))
}

fn ibq_losses_of<E: Elem>(_ws: &Workspace, a: &IbqLosses) -> Result<()> {
    const OP: &str = "ibq_losses";
    let sweep = Sweep::<E>::new(OP, &a.z, &a.e)?;
    let (m, k) = (sweep.z.rows, sweep.e.rows);
    let idx = indices(OP, &a.idx, k)?;
    let inv = scalar::<E::Acc>(OP, "inv_count", &a.inv_count)?;
    let quant = one_mut::<E::Acc>(OP, "quant", &a.quant.0)?;
    ibq_entropies::<E>(a, m, inv)?;
    let squares = look_up(OP, &sweep, idx, &a.zq)?;
    let weight = (1.0 + a.beta_commit + a.beta_code) / sweep.d as f64;
    *quant = squares * inv * E::Acc::of(weight);
    Ok(())
}

/// Both entropies and the derivative of the second, if their arguments are present.
fn ibq_entropies<E: Elem>(a: &IbqLosses, m: usize, inv: E::Acc) -> Result<()> {
    const OP: &str = "ibq_losses";
    let (Some(rest_q), Some(xbar), Some(col)) = (&a.rest_q, &a.xbar, &a.col) else { return Ok(()) };
    let (Some(c), Some(sample), Some(avg)) = (&a.c, &a.sample, &a.avg) else { return Ok(()) };
    let rest_q = flat::<E::Acc>(OP, "rest_q", rest_q)?;
    let xbar = flat::<E::Acc>(OP, "xbar", xbar)?;
    let col = flat::<E::Acc>(OP, "col", col)?;
    let c = flat_mut::<E::Acc>(OP, "c", &c.0)?;
    let sample = one_mut::<E::Acc>(OP, "sample", &sample.0)?;
    let avg = one_mut::<E::Acc>(OP, "avg", &avg.0)?;
    let eps = E::Acc::of(a.eps);
    let entropies: E::Acc = par_sum(m, 1024, |r| r.map(|i| rest_q[i].ln_1p() - xbar[i]).sum());
    *sample = entropies * inv;
    let parts: Vec<E::Acc> = c
        .par_chunks_mut(4096)
        .zip(col.par_chunks(4096))
        .map(|(c, col)| {
            let mut sum = E::Acc::zero();
            for (c, &n) in c.iter_mut().zip(col) {
                let share = n * inv;
                let log = (share + eps).ln();
                *c = -(log + share / (share + eps));
                sum += share * log;
            }
            sum
        })
        .collect();
    *avg = -parts.into_iter().fold(E::Acc::zero(), |a, b| a + b);
    Ok(())
}
