//! Convolutions as matrix products with a column matrix, which is gathered chunk by chunk so that it stays in cache.

mod conv2d_bwd_data;
mod conv2d_bwd_weight;
mod conv2d_fwd;
#[cfg(test)]
mod tests;
mod upsample2x_weights;

use std::ops::Range;

use num_traits::Zero;
use rayon::prelude::*;

use super::norm::channels::{Planes, normalize};
use super::*;
use crate::backend::cpu::pointwise::silu;
use crate::backend::cpu::workspace::{block, is_narrow};
pub(super) use conv2d_bwd_data::*;
pub(super) use conv2d_bwd_weight::*;
pub(super) use conv2d_fwd::*;
pub(super) use upsample2x_weights::*;

/// A GroupNorm with given statistics, followed by SiLU, of the input of a convolution.
#[derive(Clone, Copy)]
struct InputNorm<'a> {
    mean: In<'a>,
    rstd: In<'a>,
    gamma: In<'a>,
    beta: In<'a>,
}

impl<'a> InputNorm<'a> {
    /// The norm of a call, if its arguments are present.
    fn of([mean, rstd, gamma, beta]: [Option<In<'a>>; 4]) -> Option<Self> {
        Some(InputNorm { mean: mean?, rstd: rstd?, gamma: gamma?, beta: beta? })
    }

    /// Bytes of workspace of `apply`, while it runs and of its result.
    fn bytes(&self, x: &In) -> [usize; 2] {
        let size = block(x.dtype.size(), x.dims.numel());
        [Planes::of_groups("", x, &self.mean).map_or(0, |at| at.normalize_bytes(x.dtype)), size]
    }

    /// The activation of `x`, rounded to its type.
    fn apply<'w, T: Elem>(&self, op: &'static str, ws: &'w Workspace, x: &In) -> Result<Scratch<'w, T>> {
        let at = Planes::of_groups(op, x, &self.mean)?;
        let mut y = ws.scratch::<T>(x.dims.numel())?;
        let (mean, rstd) = (flat(op, "mean", &self.mean)?, flat(op, "rstd", &self.rstd)?);
        let [x, w, b] =
            [flat::<T>(op, "x", x)?, flat(op, "gamma", &self.gamma)?, flat(op, "beta", &self.beta)?];
        normalize(ws, [x, w, b], at, [mean, rstd], &mut y, silu)?;
        Ok(y)
    }
}

/// Bytes of workspace of a call that normalises `x`, if it does, and then needs `rest`.
fn with_norm(norm: Option<InputNorm>, x: &In, rest: usize) -> usize {
    norm.map_or(rest, |norm| {
        let [running, result] = norm.bytes(x);
        result.saturating_add(running.max(rest))
    })
}

/// The shape of a column matrix: row `p` contains the pixels under all taps of a kernel at position `p` of a grid.
#[derive(Clone, Copy)]
struct Geometry {
    /// `[B, H, W, C]` of the image.
    dims: [usize; 4],
    /// Height and width of the grid.
    grid: [usize; 2],
    /// Height and width of the kernel.
    taps: [usize; 2],
    /// Distance between adjacent positions, in pixels.
    step: usize,
    /// Pixel under the first tap at position (0, 0).
    at: [isize; 2],
}

impl Geometry {
    /// The column matrix of a convolution's input, with a row for each output position.
    fn forward(x: [usize; 4], w: [usize; 4], y: [usize; 4], stride: usize, [top, left]: [usize; 2]) -> Self {
        let [[_, kh, kw, _], [_, ho, wo, _]] = [w, y];
        Geometry {
            dims: x,
            grid: [ho, wo],
            taps: [kh, kw],
            step: stride,
            at: [-(top as isize), -(left as isize)],
        }
    }

    fn rows(&self) -> usize {
        self.dims[0].saturating_mul(self.grid[0]).saturating_mul(self.grid[1])
    }

    fn width(&self) -> usize {
        self.taps[0].saturating_mul(self.taps[1]).saturating_mul(self.dims[3])
    }

    /// Image, row and column of position `p`.
    fn position(&self, p: usize) -> [usize; 3] {
        let [gh, gw] = self.grid;
        [p / (gh * gw), p / gw % gh, p % gw]
    }

    /// Rows of a chunk: large enough to amortise reading the weights again, small enough for the cache.
    fn chunk(&self) -> usize {
        let fit = ((128 << 10) / self.width().max(1)).clamp(128, 1024);
        fit.min(self.rows().div_ceil(16).max(64)).next_multiple_of(8)
    }

    fn chunks(&self) -> usize {
        self.rows().div_ceil(self.chunk())
    }

    /// Whether the matrix is the image itself.
    fn is_image(&self) -> bool {
        self.taps == [1, 1] && self.step == 1 && self.at == [0, 0] && self.grid == self.dims[1..3]
    }

    /// Elements of scratch for a chunk of an image of this type; 0 if the image can be used directly.
    fn gathered(&self, dtype: DType) -> usize {
        if self.is_image() && !is_narrow(dtype) { 0 } else { self.chunk().saturating_mul(self.width()) }
    }
}

/// The column matrix of an image, with zeros for taps outside of the image.
struct Columns<'a, T> {
    x: &'a [T],
    of: Geometry,
}

impl<T: Elem> Columns<'_, T> {
    /// Writes rows `r` to `out`.
    fn gather(&self, r: Range<usize>, out: &mut [T::Acc]) {
        let of = &self.of;
        if of.width() == 0 {
            return;
        }
        for (p, out) in r.zip(out.chunks_mut(of.width())) {
            let [b, i, j] = of.position(p);
            let y = (i * of.step) as isize + of.at[0];
            let x = (j * of.step) as isize + of.at[1];
            for (u, out) in out.chunks_mut(of.taps[1] * of.dims[3]).enumerate() {
                self.gather_taps(b, y + u as isize, x, out);
            }
        }
    }

    /// Gathers one row of taps: a run of pixels, with zeros before and after it.
    fn gather_taps(&self, b: usize, y: isize, x: isize, out: &mut [T::Acc]) {
        let [_, h, w, c] = self.of.dims;
        let n = self.of.taps[1] as isize;
        let first = (-x).clamp(0, n);
        let last = (w as isize - x).clamp(first, n);
        if y < 0 || y >= h as isize || first == last {
            return out.fill(T::Acc::zero());
        }
        let (lo, hi) = (first as usize * c, last as usize * c);
        let from = ((b * h + y as usize) * w + (x + first) as usize) * c;
        out[..lo].fill(T::Acc::zero());
        widen(&self.x[from..from + hi - lo], &mut out[lo..hi]);
        out[hi..].fill(T::Acc::zero());
    }

    /// Calls `f` with rows `r`: a part of `x` if the matrix is the image itself, otherwise gathered into `scratch` of
    /// [`Geometry::gathered`] elements.
    fn with(&self, r: Range<usize>, scratch: &mut [T::Acc], f: impl FnOnce(Mat<T::Acc>)) {
        let (n, k) = (r.len(), self.of.width());
        if self.of.is_image() && is_acc::<T>() {
            let x = &self.x[r.start * k..r.end * k];
            return f(Mat::new(bytemuck::cast_slice(x), n, k, k));
        }
        let s = &mut scratch[..n * k];
        self.gather(r, s);
        f(Mat::new(s, n, k, k));
    }
}

/// The transpose `[cols, n]` of `x [n, cols]`.
fn transposed<'w, R: Real>(ws: &'w Workspace, x: &[R], cols: usize) -> Result<Scratch<'w, R>> {
    let mut t = ws.scratch::<R>(x.len())?;
    let n = x.len().checked_div(cols).unwrap_or(0);
    if n > 0 {
        t.par_chunks_mut(n * 64).enumerate().for_each(|(i, t)| {
            for (row, x) in x.chunks(cols).enumerate() {
                for (t, x) in t.chunks_mut(n).zip(&x[i * 64..]) {
                    t[row] = *x;
                }
            }
        });
    }
    Ok(t)
}
