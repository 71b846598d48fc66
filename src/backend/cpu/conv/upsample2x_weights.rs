//! Weights of 3x3 convolutions after upsampling by two, for the image before the upsampling.

use std::ops::Range;

use num_traits::Zero;
use rayon::prelude::*;

use super::*;
use crate::backend::cpu::workspace::no_workspace;

no_workspace!(upsample2x_weights_fwd(Upsample2xWeightsFwd), upsample2x_weights_bwd(Upsample2xWeightsBwd));

/// For each of the four taps, the taps of the 3x3 kernel that meet the same pixel.
const MEETING: [Range<usize>; 4] = [2..3, 1..3, 0..2, 0..1];

/// The taps `t` with `i` in `MEETING[t]`: tap `i` of the 3x3 kernel in an output row of either parity.
fn met(i: usize) -> Range<usize> {
    2 - i..4 - i
}

pub(crate) fn upsample2x_weights_fwd(_ws: &Workspace, s: &Upsample2xWeightsFwd) -> Result<()> {
    by_dtype!("upsample2x_weights_fwd", s.w.dtype, T => fwd::<T>(s))
}

pub(crate) fn upsample2x_weights_bwd(_ws: &Workspace, s: &Upsample2xWeightsBwd) -> Result<()> {
    by_dtype!("upsample2x_weights_bwd", s.dv.dtype, T => bwd::<<T as Elem>::Acc>(s))
}

fn fwd<T: Elem>(s: &Upsample2xWeightsFwd) -> Result<()> {
    const OP: &str = "upsample2x_weights_fwd";
    let (w, v) = (flat::<T>(OP, "w", &s.w)?, flat_mut::<T>(OP, "v", &s.v.0)?);
    let [o, _, _, c] = image(OP, "w", &s.w)?;
    if v.is_empty() {
        return Ok(());
    }
    v.par_chunks_mut(o).enumerate().for_each(|(row, v)| {
        let (channel, rows, cols) = (row / 16, &MEETING[row / 4 % 4], &MEETING[row % 4]);
        for (o, v) in v.iter_mut().enumerate() {
            let mut sum = T::Acc::zero();
            for i in rows.clone() {
                for j in cols.clone() {
                    sum += w[((o * 3 + i) * 3 + j) * c + channel].up();
                }
            }
            *v = T::down(sum);
        }
    });
    Ok(())
}

fn bwd<R: Real>(s: &Upsample2xWeightsBwd) -> Result<()> {
    const OP: &str = "upsample2x_weights_bwd";
    let (dv, dw) = (flat::<R>(OP, "dv", &s.dv)?, flat_mut::<R>(OP, "dw", &s.dw.0)?);
    let [o, _, _, c] = image(OP, "dw", &s.dw.0)?;
    if dw.is_empty() {
        return Ok(());
    }
    dw.par_chunks_mut(c).enumerate().for_each(|(row, dw)| {
        let (output, i, j) = (row / 9, row / 3 % 3, row % 3);
        for (channel, dw) in dw.iter_mut().enumerate() {
            let mut sum = R::zero();
            for t in met(i) {
                for s in met(j) {
                    sum += dv[((channel * 4 + t) * 4 + s) * o + output];
                }
            }
            *dw += sum;
        }
    });
    Ok(())
}
