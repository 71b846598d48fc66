//! Gradients of convolutions for their weights and biases.

use std::ops::Range;

use num_traits::Zero;
use rayon::prelude::*;

use super::*;
use crate::backend::cpu::products::add_col_sums;
use crate::backend::cpu::workspace::{acc_size, block, is_narrow, per_thread, together};

pub(crate) fn conv2d_bwd_weight_workspace(a: &Conv2dBwdWeight, threads: usize) -> usize {
    let dw = &a.dw.0;
    let (Ok(x), Ok(w), Ok(dy)) = (image("", "", &a.x), image("", "", dw), image("", "", &a.dy)) else {
        return 0;
    };
    let (o, size) = (w[0], acc_size(a.x.dtype));
    let of_bias = if a.db.is_some() { reduce_bytes(size, a.dy.dims.rows(), o) } else { 0 };
    if dw.dims.numel() == 0 {
        return of_bias;
    }
    let cols = Geometry::forward(x, w, dy, a.stride, [a.pad_top, a.pad_left]);
    let parts = cols.rows().div_ceil(part(cols.rows()));
    let of_parts = if parts == 1 { 0 } else { block(size, parts.saturating_mul(dw.dims.numel())) };
    let locals = per_thread(threads, size, parts, gradient_parts(&cols, a.x.dtype, o));
    of_bias.max(with_norm(input_norm(a), &a.x, together([of_parts, locals])))
}

fn input_norm<'a>(a: &Conv2dBwdWeight<'a>) -> Option<InputNorm<'a>> {
    InputNorm::of([a.mean, a.rstd, a.gamma, a.beta])
}

pub(crate) fn conv2d_bwd_weight(ws: &Workspace, s: &Conv2dBwdWeight) -> Result<()> {
    by_dtype!("conv2d_bwd_weight", s.x.dtype, T => bwd_weight::<T>(ws, s))
}

/// Rows of each partial sum of a weight gradient: at least 512, so that there are at most eight partial sums, and fewer
/// for few rows.
fn part(rows: usize) -> usize {
    rows.div_ceil(8).max(512)
}

/// Elements of a chunk of the column matrix, and of the output gradient if it has to be converted to the accumulator
/// type.
fn gradient_parts(cols: &Geometry, dtype: DType, o: usize) -> [usize; 2] {
    let dy = if is_narrow(dtype) { cols.chunk().saturating_mul(o) } else { 0 };
    [cols.gathered(dtype), dy]
}

fn bwd_weight<T: Elem>(ws: &Workspace, s: &Conv2dBwdWeight) -> Result<()> {
    const OP: &str = "conv2d_bwd_weight";
    let dy = flat::<T>(OP, "dy", &s.dy)?;
    let dw = flat_mut::<T::Acc>(OP, "dw", &s.dw.0)?;
    let o = s.dw.0.dims[0];
    if let Some(db) = &s.db {
        add_col_sums(ws, rows::<T>(OP, "dy", &s.dy)?, flat_mut(OP, "db", &db.0)?)?;
    }
    if dw.is_empty() {
        return Ok(());
    }
    let dims = [image(OP, "x", &s.x)?, image(OP, "dw", &s.dw.0)?, image(OP, "dy", &s.dy)?];
    let of = Geometry::forward(dims[0], dims[1], dims[2], s.stride, [s.pad_top, s.pad_left]);
    let activation = input_norm(s).map(|norm| norm.apply::<T>(OP, ws, &s.x)).transpose()?;
    let x = match &activation {
        Some(a) => a,
        None => flat::<T>(OP, "x", &s.x)?,
    };
    let cols = Columns { x, of };
    let parts = chunks(of.rows(), part(of.rows()));
    let scratch = ws.per_thread::<T::Acc, 2>(parts.len(), gradient_parts(&of, T::DTYPE, o))?;
    let add = |r: Range<usize>, dw: &mut [T::Acc]| {
        let mut local = scratch.take();
        let [gathered, wide] = local.parts();
        for r in chunks(r.len(), of.chunk()).into_iter().map(|c| r.start + c.start..r.start + c.end) {
            let dy = &dy[r.start * o..r.end * o];
            let dy = if is_acc::<T>() {
                bytemuck::cast_slice(dy)
            } else {
                widen(dy, wide);
                &*wide
            };
            let dy = Mat::new(dy, r.len(), o, o).t();
            cols.with(r, gathered, |cols| gemm(dy, cols, dw, cols.cols(), true));
        }
    };
    if let [all] = &parts[..] {
        add(all.clone(), dw);
        return Ok(());
    }
    let n = dw.len();
    let mut partial = ws.scratch::<T::Acc>(parts.len() * n)?;
    partial.par_chunks_mut(n).zip(parts).for_each(|(dw, r)| {
        dw.fill(T::Acc::zero());
        add(r, dw);
    });
    dw.par_chunks_mut(CHUNK).enumerate().for_each(|(i, dw)| {
        for partial in partial.chunks(n) {
            for (dw, p) in dw.iter_mut().zip(&partial[i * CHUNK..]) {
                *dw += *p;
            }
        }
    });
    Ok(())
}
