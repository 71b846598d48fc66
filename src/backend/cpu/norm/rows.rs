//! Common code of RMS, layer and l2 norms, which are over rows.

use num_traits::Zero;

use super::*;
use crate::backend::cpu::workspace::{acc_size, block, per_thread, together};

/// One value for each row, to be written by the row's thread.
pub(super) fn per_row<'a, R: Real>(
    op: &'static str,
    arg: &'static str,
    v: &In<'a>,
) -> Result<RowsMut<'a, R>> {
    rows_mut(op, arg, &v.reshape(op, arg, [v.dims.numel(), 1])?)
}

/// Runs `f` on every row, with `cols` elements of scratch for each chunk of rows.
pub(super) fn par_rows_with<R: Real>(
    ws: &Workspace,
    rows: usize,
    cols: usize,
    f: impl Fn(usize, &mut [R]) + Sync,
) -> Result<()> {
    let scratch = ws.per_thread::<R, 1>(rows.div_ceil(chunk_rows(cols)), [cols])?;
    par_for(rows, chunk_rows(cols), |r| {
        let mut local = scratch.take();
        let [buf] = local.parts();
        simd(
            #[inline(always)]
            || r.for_each(|i| f(i, buf)),
        );
    });
    Ok(())
}

/// Bytes of workspace of [`par_rows_with`] on the rows of `x`.
pub(super) fn rows_with_bytes(x: &In, threads: usize, cols: usize) -> usize {
    per_thread(threads, acc_size(x.dtype), x.dims.rows().div_ceil(chunk_rows(cols)), [cols])
}

/// Bytes of workspace of [`RowsBackward::run`].
pub(super) fn rows_backward_bytes(x: &In, threads: usize) -> usize {
    let (size, rows, n) = (acc_size(x.dtype), x.dims.rows(), x.dims.cols().saturating_mul(2));
    let locals = per_thread(threads, size, reduce_chunks(rows), [n]);
    together([block(size, n), locals, reduce_bytes(size, rows, n)])
}

/// Arguments of the backward pass of a norm over rows; without means it is an RMS norm.
pub(super) struct RowsBackward<'a, T: Elem> {
    pub(super) dy: Rows<'a, T>,
    pub(super) dsum: Option<Rows<'a, T>>,
    pub(super) x: Rows<'a, T>,
    pub(super) w: &'a [T],
    pub(super) mean: Option<&'a [T::Acc]>,
    pub(super) rstd: &'a [T::Acc],
    pub(super) dx: RowsMut<'a, T>,
}

impl<T: Elem> RowsBackward<'_, T> {
    /// Writes `dx` and returns the gradients of weight and bias.
    pub(super) fn run<'w>(&self, ws: &'w Workspace) -> Result<Scratch<'w, T::Acc>> {
        let c = self.x.cols;
        let mut sums = ws.scratch::<T::Acc>(2 * c)?;
        sums.fill(T::Acc::zero());
        let scratch = ws.per_thread::<T::Acc, 1>(reduce_chunks(self.x.rows), [2 * c])?;
        par_reduce_rows(ws, self.x.rows, &mut sums, |r, sums| {
            let mut local = scratch.take();
            let [buf] = local.parts();
            let ((xhat, d), (dw, db)) = (buf.split_at_mut(c), sums.split_at_mut(c));
            simd(
                #[inline(always)]
                || {
                    for i in r {
                        self.normalized(i, xhat);
                        self.row_sums(i, xhat, d, dw, db);
                        self.row_dx(i, xhat, d);
                    }
                },
            );
        })?;
        Ok(sums)
    }

    #[inline(always)]
    fn normalized(&self, i: usize, xhat: &mut [T::Acc]) {
        let (mean, rstd) = (self.mean.map_or(T::Acc::zero(), |m| m[i]), self.rstd[i]);
        for (xhat, x) in xhat.iter_mut().zip(self.x.row(i)) {
            *xhat = (x.up() - mean) * rstd;
        }
    }

    #[inline(always)]
    fn row_sums(&self, i: usize, xhat: &[T::Acc], d: &mut [T::Acc], dw: &mut [T::Acc], db: &mut [T::Acc]) {
        let c = self.x.cols;
        let (xhat, d, dw, db) = (&xhat[..c], &mut d[..c], &mut dw[..c], &mut db[..c]);
        let (dy, w) = (&self.dy.row(i)[..c], &self.w[..c]);
        // The RMS norm rounds the normalised values before it multiplies them by the weight.
        let rounds = self.mean.is_none();
        for k in 0..c {
            let dy = dy[k].up();
            d[k] = dy * w[k].up();
            dw[k] += dy * if rounds { T::down(xhat[k]).up() } else { xhat[k] };
            db[k] += dy;
        }
    }

    /// `dx = rstd * (d - mean(d) - xhat * mean(d * xhat)) + dsum`, without `mean(d)` for an RMS norm.
    #[inline(always)]
    fn row_dx(&self, i: usize, xhat: &[T::Acc], d: &[T::Acc]) {
        let n = T::Acc::of(self.x.cols as f64);
        let of_d = if self.mean.is_some() { sum(d) / n } else { T::Acc::zero() };
        let (of_dx, rstd) = (dot(d, xhat) / n, self.rstd[i]);
        let value = |d: T::Acc, xhat: T::Acc| rstd * (d - of_d - xhat * of_dx);
        // SAFETY: chunks do not share rows, and the caller runs on the thread of this chunk.
        let dx = unsafe { self.dx.row(i) }.iter_mut().zip(d.iter().zip(xhat));
        match self.dsum {
            None => dx.for_each(|(dx, (d, xhat))| *dx = T::down(value(*d, *xhat))),
            Some(dsum) => {
                for ((dx, (d, xhat)), dsum) in dx.zip(dsum.row(i)) {
                    *dx = T::down(value(*d, *xhat) + dsum.up());
                }
            }
        }
    }
}
