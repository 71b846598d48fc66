//! Norms over groups of channels, for batch and group norms: a batch norm is a group norm of one image whose groups
//! are its channels.

use num_traits::{Float, Zero};
use rayon::prelude::*;

use super::*;
use crate::backend::cpu::workspace::{acc_size, block, together};

/// `b` images of `p` pixels with `c` channels in `g` groups; pixels are processed in fixed chunks.
#[derive(Clone, Copy)]
pub(in crate::backend::cpu) struct Planes {
    pub(super) b: usize,
    pub(super) p: usize,
    pub(super) c: usize,
    pub(super) g: usize,
}

impl Planes {
    /// The sizes of images with `[B, G]` statistics.
    pub(in crate::backend::cpu) fn of_groups(op: &'static str, x: &In, mean: &In) -> Result<Self> {
        let [b, h, w, c] = image(op, "x", x)?;
        let g = mean.dims.cols();
        Ok(Planes { b, p: h * w, c, g })
    }

    /// The sizes of rows with `[C]` statistics.
    pub(super) fn of_rows(x: &In) -> Self {
        let (p, c) = (x.dims.rows(), x.dims.cols());
        Planes { b: 1, p, c, g: c }
    }

    /// Channels of a group.
    pub(super) fn width(&self) -> usize {
        self.c / self.g.max(1)
    }

    /// Pixels of a chunk: large enough that its statistics are comparatively small, small enough for the cache.
    pub(super) fn chunk(&self) -> usize {
        (4 * CHUNK / self.c.max(1)).clamp(16, 1024)
    }

    /// Chunks of one image.
    pub(super) fn chunks(&self) -> usize {
        self.p.div_ceil(self.chunk())
    }

    /// The image and the range of elements of chunk `i` among the chunks of all images.
    pub(super) fn at(&self, i: usize) -> (usize, std::ops::Range<usize>) {
        let (b, k) = (i / self.chunks(), i % self.chunks());
        let pixel = |k: usize| (b * self.p + (k * self.chunk()).min(self.p)) * self.c;
        (b, pixel(k)..pixel(k + 1))
    }

    /// Calls `f` with the index, the image and the elements of `y` of every chunk.
    fn par_chunks<T: Elem>(&self, y: &mut [T], f: impl Fn(usize, usize, &mut [T]) + Sync) {
        if y.is_empty() {
            return;
        }
        let images = y.par_chunks_mut(self.p * self.c).enumerate();
        images.for_each(|(b, y)| {
            y.par_chunks_mut(self.chunk() * self.c)
                .enumerate()
                .for_each(|(k, y)| f(b * self.chunks() + k, b, y));
        });
    }

    /// Repeats `[B, G]` values for every channel of their group, as `[B, C]`.
    pub(in crate::backend::cpu) fn spread<'w, R: Real>(
        &self,
        ws: &'w Workspace,
        v: &[R],
    ) -> Result<Scratch<'w, R>> {
        let mut s = ws.scratch::<R>(self.b * self.c)?;
        for (i, s) in s.iter_mut().enumerate() {
            *s = v[i / self.c * self.g + i % self.c / self.width()];
        }
        Ok(s)
    }

    /// Bytes of one value for every channel of every image.
    pub(super) fn spread_bytes(&self, dtype: DType) -> usize {
        block(acc_size(dtype), self.b.saturating_mul(self.c))
    }

    /// Elements of two values for every channel of every chunk.
    fn chunk_values(&self) -> usize {
        self.b.saturating_mul(self.chunks()).saturating_mul(2).saturating_mul(self.c)
    }

    /// Bytes of workspace of [`statistics`].
    pub(in crate::backend::cpu) fn statistics_bytes(&self, dtype: DType) -> usize {
        block(acc_size(dtype), self.chunk_values())
    }

    /// Bytes of workspace of [`normalize`].
    pub(in crate::backend::cpu) fn normalize_bytes(&self, dtype: DType) -> usize {
        together([self.spread_bytes(dtype), self.spread_bytes(dtype)])
    }

    /// Bytes of workspace of [`Backward`] and [`Backward::run`].
    pub(in crate::backend::cpu) fn backward_bytes(&self, dtype: DType) -> usize {
        let sums = block(acc_size(dtype), self.b.saturating_mul(2).saturating_mul(self.c));
        let sums = if self.p == 0 { 0 } else { together([self.statistics_bytes(dtype), sums]) };
        together([self.spread_bytes(dtype), self.spread_bytes(dtype), sums])
    }
}

/// Mean and biased variance `[B, G]`: computed in two passes for every chunk, and combined in order (Chan et al.).
pub(in crate::backend::cpu) fn statistics<T: Elem>(
    ws: &Workspace,
    x: &[T],
    at: Planes,
    mean: &mut [T::Acc],
    var: &mut [T::Acc],
) -> Result<()> {
    let mut parts = ws.scratch::<T::Acc>(at.chunk_values())?;
    if parts.is_empty() {
        // Without pixels the mean is 0 / 0.
        mean.fill(T::Acc::nan());
        var.fill(T::Acc::nan());
        return Ok(());
    }
    parts.par_chunks_mut(2 * at.c).enumerate().for_each(|(i, part)| {
        let (mean, squares) = part.split_at_mut(at.c);
        simd(
            #[inline(always)]
            || chunk_statistics(&x[at.at(i).1], at, mean, squares),
        );
    });
    for (b, parts) in parts.chunks(at.chunks() * 2 * at.c).enumerate() {
        for g in 0..at.g {
            let (m, s) = join(parts, at, g);
            mean[b * at.g + g] = m;
            var[b * at.g + g] = s / T::Acc::of((at.p * at.width()) as f64);
        }
    }
    Ok(())
}

/// The mean of every group, repeated for its channels, and the sum of squared deviations from it for every channel.
#[inline(always)]
fn chunk_statistics<T: Elem>(x: &[T], at: Planes, mean: &mut [T::Acc], squares: &mut [T::Acc]) {
    mean.fill(T::Acc::zero());
    squares.fill(T::Acc::zero());
    for x in x.chunks_exact(at.c) {
        for (m, x) in mean.iter_mut().zip(x) {
            *m += x.up();
        }
    }
    let n = T::Acc::of((x.len() / at.g) as f64);
    for group in mean.chunks_exact_mut(at.width()) {
        let sum = group.iter().fold(T::Acc::zero(), |a, b| a + *b);
        group.fill(sum / n);
    }
    for x in x.chunks_exact(at.c) {
        for ((s, m), x) in squares.iter_mut().zip(&*mean).zip(x) {
            let d = x.up() - *m;
            *s += d * d;
        }
    }
}

/// Mean and sum of squared deviations of group `g`, combined over the chunks of an image.
fn join<R: Real>(parts: &[R], at: Planes, g: usize) -> (R, R) {
    let (mut n, mut mean, mut squares) = (R::zero(), R::zero(), R::zero());
    for (k, part) in parts.chunks(2 * at.c).enumerate() {
        let group = g * at.width()..(g + 1) * at.width();
        let (m, s) = (part[group.start], part[at.c..][group].iter().fold(R::zero(), |a, b| a + *b));
        let more = R::of((at.at(k).1.len() / at.g) as f64);
        let (d, share) = (m - mean, more / (n + more));
        squares += s + d * d * n * share;
        mean += d * share;
        n += more;
    }
    (mean, squares)
}

/// `y = f((x - mean) * rstd * w + b)`.
pub(in crate::backend::cpu) fn normalize<T: Elem>(
    ws: &Workspace,
    [x, w, b]: [&[T]; 3],
    at: Planes,
    [mean, rstd]: [&[T::Acc]; 2],
    y: &mut [T],
    f: impl Fn(T::Acc) -> T::Acc + Sync,
) -> Result<()> {
    let (mean, mut scale) = (at.spread(ws, mean)?, at.spread(ws, rstd)?);
    for (s, w) in scale.chunks_mut(at.c.max(1)).flat_map(|s| s.iter_mut().zip(w)) {
        *s *= w.up();
    }
    at.par_chunks(y, |i, image, y| {
        let x = &x[at.at(i).1];
        let (mean, scale) = (&mean[image * at.c..][..at.c], &scale[image * at.c..][..at.c]);
        simd(
            #[inline(always)]
            || {
                for (y, x) in y.chunks_exact_mut(at.c).zip(x.chunks_exact(at.c)) {
                    for ((((y, x), m), s), b) in y.iter_mut().zip(x).zip(mean).zip(scale).zip(b) {
                        *y = T::down(f((x.up() - *m) * *s + b.up()));
                    }
                }
            },
        );
    });
    Ok(())
}

/// Inputs of the backward pass of a norm over groups.
pub(in crate::backend::cpu) struct Backward<'a, T: Elem> {
    pub(in crate::backend::cpu) dy: &'a [T],
    pub(in crate::backend::cpu) x: &'a [T],
    pub(in crate::backend::cpu) w: &'a [T],
    pub(in crate::backend::cpu) b: &'a [T],
    pub(in crate::backend::cpu) at: Planes,
    /// `[B, C]`.
    pub(in crate::backend::cpu) mean: Scratch<'a, T::Acc>,
    /// `[B, C]`.
    pub(in crate::backend::cpu) rstd: Scratch<'a, T::Acc>,
    /// Whether the gradient passes through the statistics; otherwise they are constants.
    pub(in crate::backend::cpu) through: bool,
    /// Added to `dx`.
    pub(in crate::backend::cpu) skip: Option<&'a [T]>,
}

impl<T: Elem> Backward<'_, T> {
    /// Writes `dx` and adds to `dw` and `db`; `slope` is the derivative of the activation.
    pub(in crate::backend::cpu) fn run(
        &self,
        ws: &Workspace,
        dx: &mut [T],
        dw: Option<&mut [T::Acc]>,
        db: Option<&mut [T::Acc]>,
        slope: impl Fn(T::Acc) -> T::Acc + Sync,
    ) -> Result<()> {
        if dx.is_empty() {
            return Ok(());
        }
        let c = self.at.c;
        let mut sums = self.sums(ws, &slope)?;
        let sums = &mut sums[..];
        for (i, to) in [db, dw].into_iter().enumerate() {
            if let Some(to) = to {
                sums.chunks(2 * c).for_each(|s| add_to(to, &s[i * c..(i + 1) * c]));
            }
        }
        match self.through {
            true => self.means(sums, self.at.p * self.at.width()),
            false => sums.fill(T::Acc::zero()),
        }
        self.dx(sums, dx, slope);
        Ok(())
    }

    /// Writes `dx`, given the `[B, 2, C]` result of [`Backward::means`].
    pub(super) fn dx(&self, means: &[T::Acc], dx: &mut [T], slope: impl Fn(T::Acc) -> T::Acc + Sync) {
        let c = self.at.c;
        self.at.par_chunks(dx, |i, image, dx| {
            let means = &means[image * 2 * c..][..2 * c];
            simd(
                #[inline(always)]
                || self.chunk_dx(i, means, dx, &slope),
            );
        });
    }

    /// `[B, 2, C]` sums of `g` and of `g * xhat`, where `xhat` are the normalised values and `g` is the gradient with
    /// respect to the input of the activation.
    pub(super) fn sums<'w>(
        &self,
        ws: &'w Workspace,
        slope: &(impl Fn(T::Acc) -> T::Acc + Sync),
    ) -> Result<Scratch<'w, T::Acc>> {
        let (at, n) = (self.at, 2 * self.at.c);
        let mut parts = ws.scratch::<T::Acc>(at.chunk_values())?;
        parts.fill(T::Acc::zero());
        parts.par_chunks_mut(n).enumerate().for_each(|(i, part)| {
            let (of_g, of_gx) = part.split_at_mut(at.c);
            simd(
                #[inline(always)]
                || self.chunk_sums(i, of_g, of_gx, slope),
            );
        });
        let mut sums = ws.scratch::<T::Acc>(at.b * n)?;
        sums.fill(T::Acc::zero());
        for (sums, parts) in sums.chunks_mut(n).zip(parts.chunks(at.chunks() * n)) {
            parts.chunks(n).for_each(|part| add_to(sums, part));
        }
        Ok(sums)
    }

    #[inline(always)]
    fn chunk_sums(
        &self,
        i: usize,
        of_g: &mut [T::Acc],
        of_gx: &mut [T::Acc],
        slope: &impl Fn(T::Acc) -> T::Acc,
    ) {
        let c = self.at.c;
        let (image, r) = self.at.at(i);
        let (mean, rstd) = (&self.mean[image * c..][..c], &self.rstd[image * c..][..c]);
        let (w, b) = (&self.w[..c], &self.b[..c]);
        let (of_g, of_gx) = (&mut of_g[..c], &mut of_gx[..c]);
        for (x, dy) in self.x[r.clone()].chunks_exact(c).zip(self.dy[r].chunks_exact(c)) {
            for k in 0..c {
                let xhat = (x[k].up() - mean[k]) * rstd[k];
                let g = dy[k].up() * slope(xhat * w[k].up() + b[k].up());
                of_g[k] += g;
                of_gx[k] += g * xhat;
            }
        }
    }

    /// Replaces the `[B, 2, C]` sums over pixels by means over the `n` values of each group, weighted with `w`.
    pub(super) fn means(&self, sums: &mut [T::Acc], n: usize) {
        let (n, width) = (T::Acc::of(n as f64), self.at.width());
        for sums in sums.chunks_mut(self.at.c) {
            for (sums, w) in sums.chunks_mut(width).zip(self.w.chunks(width)) {
                let sum = sums.iter().zip(w).fold(T::Acc::zero(), |a, (s, w)| a + *s * w.up());
                sums.fill(sum / n);
            }
        }
    }

    #[inline(always)]
    fn chunk_dx(&self, i: usize, means: &[T::Acc], dx: &mut [T], slope: &impl Fn(T::Acc) -> T::Acc) {
        let c = self.at.c;
        let (image, r) = self.at.at(i);
        let (mean, rstd) = (&self.mean[image * c..][..c], &self.rstd[image * c..][..c]);
        let (w, b) = (&self.w[..c], &self.b[..c]);
        let (of_g, of_gx) = (&means[..c], &means[c..][..c]);
        let at = |k: usize, x: &[T], dy: &[T]| {
            let xhat = (x[k].up() - mean[k]) * rstd[k];
            let g = dy[k].up() * slope(xhat * w[k].up() + b[k].up());
            rstd[k] * (g * w[k].up() - of_g[k] - xhat * of_gx[k])
        };
        let rows = self.x[r.clone()].chunks_exact(c).zip(self.dy[r.clone()].chunks_exact(c));
        let rows = dx.chunks_exact_mut(c).zip(rows);
        match self.skip {
            None => {
                for (dx, (x, dy)) in rows {
                    for (k, dx) in dx.iter_mut().enumerate() {
                        *dx = T::down(at(k, x, dy));
                    }
                }
            }
            Some(skip) => {
                for ((dx, (x, dy)), skip) in rows.zip(skip[r].chunks_exact(c)) {
                    for (k, (dx, skip)) in dx.iter_mut().zip(skip).enumerate() {
                        *dx = T::down(at(k, x, dy) + skip.up());
                    }
                }
            }
        }
    }
}
