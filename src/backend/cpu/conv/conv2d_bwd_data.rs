//! Gradients of convolutions for their inputs: one matrix product per phase of the stride.

use rayon::prelude::*;

use super::norm::{
    channels::{Backward, Planes},
    sums_out,
};
use super::*;
use crate::backend::cpu::pointwise::silu_slope;
use crate::backend::cpu::products::{bias, start_from_bias};
use crate::backend::cpu::workspace::{acc_size, block, per_thread, together};

pub(crate) fn conv2d_bwd_data_workspace(a: &Conv2dBwdData, threads: usize) -> usize {
    let dx = &a.dx.0;
    let (Ok(dy), Ok(w), Ok([_, height, width, c])) =
        (image("", "", &a.dy), image("", "", &a.w), image("", "", dx))
    else {
        return 0;
    };
    if a.stride == 0 {
        return 0;
    }
    let size = acc_size(dx.dtype);
    let of_phase = |v: &Phase, h: &Phase| {
        let cols = columns_of_phase(dy, v, h);
        let weights = block(size, cols.width().saturating_mul(c));
        let parts = [cols.chunk().saturating_mul(c), cols.gathered(a.dy.dtype)];
        let transposed = if c <= FEW { weights } else { 0 };
        together([weights, transposed, per_thread(threads, size, cols.chunks(), parts)])
    };
    let mut most = 0;
    for v in phases(height, w[1], a.stride, a.pad_top) {
        for h in phases(width, w[2], a.stride, a.pad_left) {
            most = most.max(of_phase(&v, &h));
        }
    }
    let of_norm = input_norm(a).and_then(|(x, norm)| Planes::of_groups("", &x, &norm.mean).ok());
    let of_norm = of_norm
        .map_or(0, |at| together([block(dx.dtype.size(), dx.dims.numel()), at.backward_bytes(dx.dtype)]));
    if dx.dims.numel() == 0 { most } else { most.max(of_norm) }
}

/// The convolution's input and its norm, if the forward normalised it.
fn input_norm<'a>(a: &Conv2dBwdData<'a>) -> Option<(In<'a>, InputNorm<'a>)> {
    Some((a.x?, InputNorm::of([a.mean, a.rstd, a.gamma, a.beta])?))
}

pub(crate) fn conv2d_bwd_data(ws: &Workspace, s: &Conv2dBwdData) -> Result<()> {
    by_dtype!("conv2d_bwd_data", s.dx.0.dtype, T => {
        bwd_data::<T>(ws, s)?;
        match input_norm(s) {
            Some((x, norm)) if s.dx.0.dims.numel() > 0 => through_norm::<T>(ws, s, &x, &norm),
            _ => Ok(()),
        }
    })
}

/// Replaces `dx`, the gradient of the activation, by that of `x`.
fn through_norm<T: Elem>(ws: &Workspace, s: &Conv2dBwdData, x: &In, norm: &InputNorm) -> Result<()> {
    let at = Planes::of_groups(OP, x, &norm.mean)?;
    let dx = flat_mut::<T>(OP, "dx", &s.dx.0)?;
    let mut dy = ws.scratch::<T>(dx.len())?;
    dy.copy_from_slice(dx);
    let back = Backward {
        dy: &dy,
        x: flat(OP, "x", x)?,
        w: flat(OP, "gamma", &norm.gamma)?,
        b: flat(OP, "beta", &norm.beta)?,
        at,
        mean: at.spread(ws, flat(OP, "mean", &norm.mean)?)?,
        rstd: at.spread(ws, flat(OP, "rstd", &norm.rstd)?)?,
        through: true,
        skip: s.skip.as_ref().map(|v| flat(OP, "skip", v)).transpose()?,
    };
    let (dgamma, dbeta) = (sums_out(OP, "dgamma", &s.dgamma)?, sums_out(OP, "dbeta", &s.dbeta)?);
    back.run(ws, dx, dgamma, dbeta, silu_slope)
}

const OP: &str = "conv2d_bwd_data";

/// The input rows (or columns) `phase, phase + stride, ..`, which use the same taps of the kernel.
struct Phase {
    /// Number of these taps.
    taps: usize,
    /// The last of them; the others precede it at distances of `stride`.
    last: usize,
    /// Output row that uses the first input row with the last tap.
    at: isize,
    /// Number of input rows.
    len: usize,
}

impl Phase {
    fn new(phase: usize, size: usize, kernel: usize, stride: usize, pad: usize) -> Self {
        let first = (phase + pad) % stride;
        let taps = kernel.saturating_sub(first).div_ceil(stride);
        let last = first + taps.saturating_sub(1) * stride;
        let at = (phase + pad) as isize - last as isize;
        Phase { taps, last, at: at / stride as isize, len: size.saturating_sub(phase).div_ceil(stride) }
    }
}

/// The non-empty phases of the rows or columns of an image.
fn phases(size: usize, kernel: usize, stride: usize, pad: usize) -> impl Iterator<Item = Phase> {
    (0..stride.min(size)).map(move |phase| Phase::new(phase, size, kernel, stride, pad))
}

/// The column matrix of `dy [B, H', W', O]` whose product with weights gives the pixels of a phase.
fn columns_of_phase(dy: [usize; 4], v: &Phase, h: &Phase) -> Geometry {
    Geometry { dims: dy, grid: [v.len, h.len], taps: [v.taps, h.taps], step: 1, at: [v.at, h.at] }
}

fn bwd_data<T: Elem>(ws: &Workspace, s: &Conv2dBwdData) -> Result<()> {
    let (dy, w) = (flat::<T>(OP, "dy", &s.dy)?, flat::<T>(OP, "w", &s.w)?);
    let bias = bias::<T>(OP, s.bias.as_ref())?;
    flat_mut::<T>(OP, "dx", &s.dx.0)?;
    let dx = rows_mut::<T>(OP, "dx", &s.dx.0)?;
    let (dims, [_, height, width, c]) = (image(OP, "dy", &s.dy)?, image(OP, "dx", &s.dx.0)?);
    let [o, kh, kw, _] = image(OP, "w", &s.w)?;
    for (py, v) in phases(height, kh, s.stride, s.pad_top).enumerate() {
        for (px, h) in phases(width, kw, s.stride, s.pad_left).enumerate() {
            let of = columns_of_phase(dims, &v, &h);
            let cols = Columns { x: dy, of };
            let k = of.width();
            let mut wp = ws.scratch::<T::Acc>(k * c)?;
            weights_of_phase(w, [o, kh, kw, c], s.stride, &v, &h, &mut wp);
            let wt = if c <= FEW { Some(transposed(ws, &wp, c)?) } else { None };
            let wp = wt.as_ref().map_or(Mat::new(&wp, k, c, c), |wt| Mat::new(wt, c, k, k).t());
            let scratch = ws.per_thread::<T::Acc, 2>(of.chunks(), [of.chunk() * c, of.gathered(T::DTYPE)])?;
            par_for(of.rows(), of.chunk(), |r| {
                let mut local = scratch.take();
                let [out, gathered] = local.parts();
                start_from_bias(bias, &mut out[..r.len() * c]);
                cols.with(r.clone(), gathered, |cols| gemm(cols, wp, out, c, bias.is_some()));
                for (i, p) in r.enumerate() {
                    let [b, y, x] = of.position(p);
                    let pixel = (b * height + py + y * s.stride) * width + px + x * s.stride;
                    // SAFETY: every pixel belongs to one position of one phase, which belongs to one task.
                    let dx = unsafe { dx.row(pixel) };
                    round(&out[i * c..(i + 1) * c], dx);
                }
            });
        }
    }
    Ok(())
}

/// The weights of the taps of a phase, from the last tap to the first: `wp[u, v, o, c] = w[o, last - u*stride, ..]`.
fn weights_of_phase<T: Elem>(
    w: &[T],
    [o, kh, kw, c]: [usize; 4],
    stride: usize,
    v: &Phase,
    h: &Phase,
    wp: &mut [T::Acc],
) {
    if c == 0 {
        return;
    }
    wp.par_chunks_mut(c).with_min_len(256).enumerate().for_each(|(i, wp)| {
        let (tap, o) = (i / o, i % o);
        let (y, x) = (v.last - tap / h.taps * stride, h.last - tap % h.taps * stride);
        let from = ((o * kh + y) * kw + x) * c;
        widen(&w[from..from + c], wp);
    });
}
