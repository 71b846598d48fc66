//! Rows of the codebook by index.

use num_traits::Zero;

use super::scores::{ROWS, Sweep};
use super::*;

/// The code index of each token, checked against the number of codes.
pub(super) fn indices<'a>(op: &'static str, v: &In<'a>, k: usize) -> Result<&'a [i32]> {
    let idx = flat::<i32>(op, "idx", v)?;
    match idx.iter().find(|&&i| i < 0 || i as usize >= k) {
        Some(i) => Err(Error::arg(op, "idx", format!("{i} for a token"), format!("0 to {}", k - 1))),
        None => Ok(idx),
    }
}

/// Writes `zq = E[idx]` and returns the sum of squared distances.
pub(super) fn look_up<E: Elem>(op: &'static str, sweep: &Sweep<E>, idx: &[i32], zq: &Out) -> Result<E::Acc> {
    let out = rows_mut::<E>(op, "zq", &zq.0)?;
    Ok(par_sum(idx.len(), ROWS, |r| {
        let mut sum = E::Acc::zero();
        for i in r {
            let code = sweep.e.row(idx[i] as usize);
            // SAFETY: only the thread that owns the chunk writes its rows.
            unsafe { out.row(i) }.copy_from_slice(code);
            for (&e, &z) in code.iter().zip(sweep.z.row(i)) {
                let d = e.up() - z.up();
                sum += d * d;
            }
        }
        sum
    }))
}
