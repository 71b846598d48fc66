//! Norms. Batch and group norms share their loops: a batch norm is a group norm of one image whose groups
//! are its channels.

use num_traits::{Float, One, Zero};
use rayon::prelude::*;

use super::pointwise::{leaky, leaky_slope, silu, silu_slope};
use super::workspace::{acc_size, block, no_workspace, per_thread, together};
use super::*;

no_workspace!(batch_norm_running(BatchNormRunning));

pub(super) fn group_norm_fwd_workspace(a: &GroupNormFwd, _threads: usize) -> usize {
    let at = Planes::of_groups("", &a.x, &a.mean.0, &a.rstd.0);
    at.map_or(0, |at| at.statistics_bytes(a.x.dtype).max(at.normalize_bytes(a.x.dtype)))
}

pub(super) fn group_norm_bwd_workspace(a: &GroupNormBwd, _threads: usize) -> usize {
    Planes::of_groups("", &a.x, &a.mean, &a.rstd).map_or(0, |at| at.backward_bytes(a.x.dtype))
}

pub(super) fn batch_norm_fwd_workspace(a: &BatchNormFwd, _threads: usize) -> usize {
    let Ok(at) = Planes::of_rows("", &a.x, &a.mean.0, &a.var.0) else { return 0 };
    let normalize = together([block(acc_size(a.x.dtype), at.c), at.normalize_bytes(a.x.dtype)]);
    at.statistics_bytes(a.x.dtype).max(normalize)
}

pub(super) fn batch_norm_bwd_workspace(a: &BatchNormBwd, _threads: usize) -> usize {
    Planes::of_rows("", &a.x, &a.mean, &a.var).map_or(0, |at| at.backward_bytes(a.x.dtype))
}

pub(super) fn batch_norm_eval_fwd_workspace(a: &BatchNormEvalFwd, _threads: usize) -> usize {
    let Ok(at) = Planes::of_rows("", &a.x, &a.mean, &a.var) else { return 0 };
    together([at.spread_bytes(a.x.dtype), at.normalize_bytes(a.x.dtype)])
}

pub(super) fn batch_norm_eval_bwd_workspace(a: &BatchNormEvalBwd, _threads: usize) -> usize {
    Planes::of_rows("", &a.x, &a.mean, &a.var).map_or(0, |at| at.backward_bytes(a.x.dtype))
}

pub(super) fn rms_norm_fwd_workspace(a: &RmsNormFwd, threads: usize) -> usize {
    rows_with_bytes(&a.x, threads, a.x.dims.cols())
}

pub(super) fn layer_norm_fwd_workspace(a: &LayerNormFwd, threads: usize) -> usize {
    rows_with_bytes(&a.x, threads, a.x.dims.cols())
}

pub(super) fn l2_norm_fwd_workspace(a: &L2NormFwd, threads: usize) -> usize {
    rows_with_bytes(&a.x, threads, a.x.dims.cols())
}

pub(super) fn l2_norm_bwd_workspace(a: &L2NormBwd, threads: usize) -> usize {
    rows_with_bytes(&a.x, threads, a.x.dims.cols().saturating_mul(2))
}

pub(super) fn rms_norm_bwd_workspace(a: &RmsNormBwd, threads: usize) -> usize {
    rows_backward_bytes(&a.x, threads)
}

pub(super) fn layer_norm_bwd_workspace(a: &LayerNormBwd, threads: usize) -> usize {
    rows_backward_bytes(&a.x, threads)
}

pub(super) fn group_norm_fwd(ws: &Workspace, s: &GroupNormFwd) -> Result<()> {
    by_dtype!("group_norm_fwd", s.y.0.dtype, T => group_fwd::<T>(ws, s))
}

pub(super) fn group_norm_bwd(ws: &Workspace, s: &GroupNormBwd) -> Result<()> {
    by_dtype!("group_norm_bwd", s.dx.0.dtype, T => group_bwd::<T>(ws, s))
}

pub(super) fn rms_norm_fwd(ws: &Workspace, s: &RmsNormFwd) -> Result<()> {
    by_dtype!("rms_norm_fwd", s.y.0.dtype, T => rms_fwd::<T>(ws, s))
}

pub(super) fn rms_norm_bwd(ws: &Workspace, s: &RmsNormBwd) -> Result<()> {
    by_dtype!("rms_norm_bwd", s.dx.0.dtype, T => rms_bwd::<T>(ws, s))
}

pub(super) fn layer_norm_fwd(ws: &Workspace, s: &LayerNormFwd) -> Result<()> {
    by_dtype!("layer_norm_fwd", s.y.0.dtype, T => layer_fwd::<T>(ws, s))
}

pub(super) fn layer_norm_bwd(ws: &Workspace, s: &LayerNormBwd) -> Result<()> {
    by_dtype!("layer_norm_bwd", s.dx.0.dtype, T => layer_bwd::<T>(ws, s))
}

pub(super) fn batch_norm_fwd(ws: &Workspace, s: &BatchNormFwd) -> Result<()> {
    by_dtype!("batch_norm_fwd", s.y.0.dtype, T => batch_fwd::<T>(ws, s))
}

pub(super) fn batch_norm_bwd(ws: &Workspace, s: &BatchNormBwd) -> Result<()> {
    by_dtype!("batch_norm_bwd", s.dx.0.dtype, T => batch_bwd::<T>(ws, s))
}

pub(super) fn batch_norm_eval_fwd(ws: &Workspace, s: &BatchNormEvalFwd) -> Result<()> {
    by_dtype!("batch_norm_eval_fwd", s.y.0.dtype, T => batch_eval_fwd::<T>(ws, s))
}

pub(super) fn batch_norm_eval_bwd(ws: &Workspace, s: &BatchNormEvalBwd) -> Result<()> {
    by_dtype!("batch_norm_eval_bwd", s.dx.0.dtype, T => batch_eval_bwd::<T>(ws, s))
}

pub(super) fn batch_norm_running(_ws: &Workspace, s: &BatchNormRunning) -> Result<()> {
    by_dtype!("batch_norm_running", s.mean.dtype, T => batch_running::<<T as Elem>::Acc>(s))
}

pub(super) fn l2_norm_fwd(ws: &Workspace, s: &L2NormFwd) -> Result<()> {
    by_dtype!("l2_norm_fwd", s.y.0.dtype, T => l2_fwd::<T>(ws, s))
}

pub(super) fn l2_norm_bwd(ws: &Workspace, s: &L2NormBwd) -> Result<()> {
    by_dtype!("l2_norm_bwd", s.x.dtype, T => {
        if s.dy.dtype == s.x.dtype {
            l2_bwd::<T, T>(ws, s)
        } else {
            l2_bwd::<T, <T as Elem>::Acc>(ws, s)
        }
    })
}

fn rstd<R: Real>(var: R, eps: f64) -> R {
    R::one() / (var + R::of(eps)).sqrt()
}

/// A vector of `n` elements.
fn vector<'a, T: Element>(op: &'static str, arg: &'static str, v: &In<'a>, n: usize) -> Result<&'a [T]> {
    expect(op, arg, v, n)?;
    flat(op, arg, v)
}

/// A vector of `n` elements to write.
#[allow(clippy::mut_from_ref)]
fn vector_mut<'a, T: Element>(
    op: &'static str,
    arg: &'static str,
    v: &In<'a>,
    n: usize,
) -> Result<&'a mut [T]> {
    expect(op, arg, v, n)?;
    flat_mut(op, arg, v)
}

// ---- groups of channels --------------------------------------------------------------------------------

/// Images of `b` times `p` pixels of `c` channels in `g` groups; pixels are taken in fixed chunks.
#[derive(Clone, Copy)]
struct Planes {
    b: usize,
    p: usize,
    c: usize,
    g: usize,
}

impl Planes {
    /// From an image and its `[B, G]` statistics.
    fn of_groups(op: &'static str, x: &In, mean: &In, rstd: &In) -> Result<Self> {
        let [b, h, w, c] = image(op, "x", x)?;
        let g = mean.dims.cols();
        expect_dims(op, "mean", mean, [b, g])?;
        expect_dims(op, "rstd", rstd, [b, g])?;
        if g == 0 || c % g != 0 {
            return Err(Error::arg(op, "mean", mean.dims, format!("a number of groups that divides {c}")));
        }
        Ok(Planes { b, p: h * w, c, g })
    }

    /// From rows and their `[C]` statistics.
    fn of_rows(op: &'static str, x: &In, mean: &In, var: &In) -> Result<Self> {
        let (p, c) = (x.dims.rows(), x.dims.cols());
        expect(op, "mean", mean, c)?;
        expect(op, "var", var, c)?;
        Ok(Planes { b: 1, p, c, g: c })
    }

    /// Channels of a group.
    fn width(&self) -> usize {
        self.c / self.g.max(1)
    }

    /// Pixels of a chunk: enough that its statistics are small beside it, few enough for the cache.
    fn chunk(&self) -> usize {
        (4 * CHUNK / self.c.max(1)).clamp(16, 1024)
    }

    /// Chunks of one image.
    fn chunks(&self) -> usize {
        self.p.div_ceil(self.chunk())
    }

    /// Image and elements of chunk `i` of all images.
    fn at(&self, i: usize) -> (usize, std::ops::Range<usize>) {
        let (b, k) = (i / self.chunks(), i % self.chunks());
        let pixel = |k: usize| (b * self.p + (k * self.chunk()).min(self.p)) * self.c;
        (b, pixel(k)..pixel(k + 1))
    }

    /// Runs `f` on every chunk: its number, its image, its elements of `y`.
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

    /// `[B, G]` values as `[B, C]`.
    fn spread<'w, R: Real>(&self, ws: &'w Workspace, v: &[R]) -> Result<Scratch<'w, R>> {
        let mut s = ws.scratch::<R>(self.b * self.c)?;
        for (i, s) in s.iter_mut().enumerate() {
            *s = v[i / self.c * self.g + i % self.c / self.width()];
        }
        Ok(s)
    }

    /// Bytes of a value for every channel of every image.
    fn spread_bytes(&self, dtype: DType) -> usize {
        block(acc_size(dtype), self.b.saturating_mul(self.c))
    }

    /// Elements of two values for every channel of every chunk.
    fn chunk_values(&self) -> usize {
        self.b.saturating_mul(self.chunks()).saturating_mul(2).saturating_mul(self.c)
    }

    /// Bytes of [`statistics`].
    fn statistics_bytes(&self, dtype: DType) -> usize {
        block(acc_size(dtype), self.chunk_values())
    }

    /// Bytes of [`normalize`].
    fn normalize_bytes(&self, dtype: DType) -> usize {
        together([self.spread_bytes(dtype), self.spread_bytes(dtype)])
    }

    /// Bytes of [`Backward`] and what it runs with.
    fn backward_bytes(&self, dtype: DType) -> usize {
        let sums = block(acc_size(dtype), self.b.saturating_mul(2).saturating_mul(self.c));
        let sums = if self.p == 0 { 0 } else { together([self.statistics_bytes(dtype), sums]) };
        together([self.spread_bytes(dtype), self.spread_bytes(dtype), sums])
    }
}

/// Mean and biased variance `[B, G]`: of every chunk in two passes, chunks joined in order (Chan et al.).
fn statistics<T: Elem>(
    ws: &Workspace,
    x: &[T],
    at: Planes,
    mean: &mut [T::Acc],
    var: &mut [T::Acc],
) -> Result<()> {
    let mut parts = ws.scratch::<T::Acc>(at.chunk_values())?;
    if parts.is_empty() {
        // No pixels: 0 / 0.
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

/// The mean of every group, at its channels; the sum of squares about it, channel by channel.
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

/// Mean and sum of squares of group `g` over the chunks of an image.
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
fn normalize<T: Elem>(
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

/// What the backward of a norm over groups reads.
struct Backward<'a, T: Elem> {
    dy: &'a [T],
    x: &'a [T],
    w: &'a [T],
    b: &'a [T],
    at: Planes,
    /// `[B, C]`.
    mean: Scratch<'a, T::Acc>,
    /// `[B, C]`.
    rstd: Scratch<'a, T::Acc>,
    /// Whether the gradient passes through the statistics; else they are constants.
    through: bool,
}

impl<T: Elem> Backward<'_, T> {
    /// Writes `dx` and adds to `dw` and `db`; `slope` is the derivative of the activation.
    fn run(
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
            true => sums.chunks_mut(c).for_each(|s| self.group_means(s)),
            false => sums.fill(T::Acc::zero()),
        }
        self.at.par_chunks(dx, |i, image, dx| {
            let means = &sums[image * 2 * c..][..2 * c];
            simd(
                #[inline(always)]
                || self.chunk_dx(i, means, dx, &slope),
            );
        });
        Ok(())
    }

    /// `[B, 2, C]` sums of `g` and of `g * xhat`, where `xhat` are the normalised values and `g` is the
    /// gradient behind the activation.
    fn sums<'w>(
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

    /// Turns sums over pixels into means over pixels and channels of `w` times what was summed.
    fn group_means(&self, sums: &mut [T::Acc]) {
        let n = T::Acc::of((self.at.p * self.at.width()) as f64);
        for (sums, w) in sums.chunks_mut(self.at.width()).zip(self.w.chunks(self.at.width())) {
            let sum = sums.iter().zip(w).fold(T::Acc::zero(), |a, (s, w)| a + *s * w.up());
            sums.fill(sum / n);
        }
    }

    #[inline(always)]
    fn chunk_dx(&self, i: usize, means: &[T::Acc], dx: &mut [T], slope: &impl Fn(T::Acc) -> T::Acc) {
        let c = self.at.c;
        let (image, r) = self.at.at(i);
        let (mean, rstd) = (&self.mean[image * c..][..c], &self.rstd[image * c..][..c]);
        let (w, b) = (&self.w[..c], &self.b[..c]);
        let (of_g, of_gx) = (&means[..c], &means[c..][..c]);
        let rows = self.x[r.clone()].chunks_exact(c).zip(self.dy[r].chunks_exact(c));
        for (dx, (x, dy)) in dx.chunks_exact_mut(c).zip(rows) {
            for k in 0..c {
                let xhat = (x[k].up() - mean[k]) * rstd[k];
                let g = dy[k].up() * slope(xhat * w[k].up() + b[k].up());
                dx[k] = T::down(rstd[k] * (g * w[k].up() - of_g[k] - xhat * of_gx[k]));
            }
        }
    }
}

fn add_to<R: Real>(to: &mut [R], v: &[R]) {
    to.iter_mut().zip(v).for_each(|(to, v)| *to += *v);
}

fn group_fwd<T: Elem>(ws: &Workspace, s: &GroupNormFwd) -> Result<()> {
    const OP: &str = "group_norm_fwd";
    let at = Planes::of_groups(OP, &s.x, &s.mean.0, &s.rstd.0)?;
    expect_dims(OP, "y", &s.y.0, s.x.dims)?;
    let (x, y) = (flat::<T>(OP, "x", &s.x)?, flat_mut::<T>(OP, "y", &s.y.0)?);
    let (w, b) = (vector::<T>(OP, "w", &s.w, at.c)?, vector::<T>(OP, "b", &s.b, at.c)?);
    let mean = flat_mut::<T::Acc>(OP, "mean", &s.mean.0)?;
    let scale = flat_mut::<T::Acc>(OP, "rstd", &s.rstd.0)?;
    statistics(ws, x, at, mean, scale)?;
    scale.iter_mut().for_each(|v| *v = rstd(*v, s.eps));
    if s.silu {
        normalize(ws, [x, w, b], at, [mean, scale], y, silu)
    } else {
        normalize(
            ws,
            [x, w, b],
            at,
            [mean, scale],
            y,
            #[inline(always)]
            |v| v,
        )
    }
}

fn group_bwd<T: Elem>(ws: &Workspace, s: &GroupNormBwd) -> Result<()> {
    const OP: &str = "group_norm_bwd";
    let at = Planes::of_groups(OP, &s.x, &s.mean, &s.rstd)?;
    expect_dims(OP, "dy", &s.dy, s.x.dims)?;
    expect_dims(OP, "dx", &s.dx.0, s.x.dims)?;
    let back = Backward {
        dy: flat::<T>(OP, "dy", &s.dy)?,
        x: flat(OP, "x", &s.x)?,
        w: vector(OP, "w", &s.w, at.c)?,
        b: vector(OP, "b", &s.b, at.c)?,
        at,
        mean: at.spread(ws, flat(OP, "mean", &s.mean)?)?,
        rstd: at.spread(ws, flat(OP, "rstd", &s.rstd)?)?,
        through: true,
    };
    let (dw, db) = (sums_out(OP, "dw", &s.dw, at.c)?, sums_out(OP, "db", &s.db, at.c)?);
    let dx = flat_mut(OP, "dx", &s.dx.0)?;
    if s.silu {
        back.run(ws, dx, dw, db, silu_slope)
    } else {
        back.run(
            ws,
            dx,
            dw,
            db,
            #[inline(always)]
            |_| T::Acc::one(),
        )
    }
}

/// A gradient of `n` elements, if it is wanted.
fn sums_out<'a, R: Real>(
    op: &'static str,
    arg: &'static str,
    v: &Option<Acc<'a>>,
    n: usize,
) -> Result<Option<&'a mut [R]>> {
    v.as_ref().map(|v| vector_mut(op, arg, &v.0, n)).transpose()
}

fn batch_fwd<T: Elem>(ws: &Workspace, s: &BatchNormFwd) -> Result<()> {
    const OP: &str = "batch_norm_fwd";
    let at = Planes::of_rows(OP, &s.x, &s.mean.0, &s.var.0)?;
    expect_rows(OP, "y", &s.y.0, at.p, at.c)?;
    let (x, y) = (flat::<T>(OP, "x", &s.x)?, flat_mut::<T>(OP, "y", &s.y.0)?);
    let (w, b) = (vector::<T>(OP, "w", &s.w, at.c)?, vector::<T>(OP, "b", &s.b, at.c)?);
    let mean = flat_mut::<T::Acc>(OP, "mean", &s.mean.0)?;
    let var = flat_mut::<T::Acc>(OP, "var", &s.var.0)?;
    statistics(ws, x, at, mean, var)?;
    let mut scale = ws.scratch::<T::Acc>(at.c)?;
    scale.iter_mut().zip(&*var).for_each(|(r, v)| *r = rstd(*v, s.eps));
    let slope = T::Acc::of(s.slope);
    normalize(
        ws,
        [x, w, b],
        at,
        [mean, &scale],
        y,
        #[inline(always)]
        |v| leaky(v, slope),
    )
}

fn batch_bwd<T: Elem>(ws: &Workspace, s: &BatchNormBwd) -> Result<()> {
    const OP: &str = "batch_norm_bwd";
    let at = Planes::of_rows(OP, &s.x, &s.mean, &s.var)?;
    expect_rows(OP, "dy", &s.dy, at.p, at.c)?;
    expect_rows(OP, "dx", &s.dx.0, at.p, at.c)?;
    let mut scale = at.spread(ws, flat::<T::Acc>(OP, "var", &s.var)?)?;
    scale.iter_mut().for_each(|v| *v = rstd(*v, s.eps));
    let back = Backward {
        dy: flat::<T>(OP, "dy", &s.dy)?,
        x: flat(OP, "x", &s.x)?,
        w: vector(OP, "w", &s.w, at.c)?,
        b: vector(OP, "b", &s.b, at.c)?,
        at,
        mean: at.spread(ws, flat(OP, "mean", &s.mean)?)?,
        rstd: scale,
        through: true,
    };
    let (dw, db) = (sums_out(OP, "dw", &s.dw, at.c)?, sums_out(OP, "db", &s.db, at.c)?);
    let (dx, slope) = (flat_mut(OP, "dx", &s.dx.0)?, T::Acc::of(s.slope));
    back.run(
        ws,
        dx,
        dw,
        db,
        #[inline(always)]
        |v| leaky_slope(v, slope),
    )
}

fn batch_eval_fwd<T: Elem>(ws: &Workspace, s: &BatchNormEvalFwd) -> Result<()> {
    const OP: &str = "batch_norm_eval_fwd";
    let at = Planes::of_rows(OP, &s.x, &s.mean, &s.var)?;
    expect_rows(OP, "y", &s.y.0, at.p, at.c)?;
    let (x, y) = (flat::<T>(OP, "x", &s.x)?, flat_mut::<T>(OP, "y", &s.y.0)?);
    let (w, b) = (vector::<T>(OP, "w", &s.w, at.c)?, vector::<T>(OP, "b", &s.b, at.c)?);
    let mean = flat::<T::Acc>(OP, "mean", &s.mean)?;
    let mut scale = at.spread(ws, flat::<T::Acc>(OP, "var", &s.var)?)?;
    scale.iter_mut().for_each(|v| *v = rstd(*v, s.eps));
    let slope = T::Acc::of(s.slope);
    normalize(
        ws,
        [x, w, b],
        at,
        [mean, &scale],
        y,
        #[inline(always)]
        |v| leaky(v, slope),
    )
}

fn batch_eval_bwd<T: Elem>(ws: &Workspace, s: &BatchNormEvalBwd) -> Result<()> {
    const OP: &str = "batch_norm_eval_bwd";
    let at = Planes::of_rows(OP, &s.x, &s.mean, &s.var)?;
    expect_rows(OP, "dy", &s.dy, at.p, at.c)?;
    expect_rows(OP, "dx", &s.dx.0, at.p, at.c)?;
    let mut scale = at.spread(ws, flat::<T::Acc>(OP, "var", &s.var)?)?;
    scale.iter_mut().for_each(|v| *v = rstd(*v, s.eps));
    let back = Backward {
        dy: flat::<T>(OP, "dy", &s.dy)?,
        x: flat(OP, "x", &s.x)?,
        w: vector(OP, "w", &s.w, at.c)?,
        b: vector(OP, "b", &s.b, at.c)?,
        at,
        mean: at.spread(ws, flat(OP, "mean", &s.mean)?)?,
        rstd: scale,
        through: false,
    };
    let (dw, db) = (sums_out(OP, "dw", &s.dw, at.c)?, sums_out(OP, "db", &s.db, at.c)?);
    let (dx, slope) = (flat_mut(OP, "dx", &s.dx.0)?, T::Acc::of(s.slope));
    back.run(
        ws,
        dx,
        dw,
        db,
        #[inline(always)]
        |v| leaky_slope(v, slope),
    )
}

fn batch_running<R: Real>(s: &BatchNormRunning) -> Result<()> {
    const OP: &str = "batch_norm_running";
    let c = s.mean.dims.numel();
    let momentum = R::of(s.momentum);
    // A single row has no unbiased estimate; its variance is 0 anyway.
    let unbiased = R::of(s.rows as f64 / s.rows.saturating_sub(1).max(1) as f64);
    let mean =
        (vector_mut::<R>(OP, "running_mean", &s.running_mean.0, c)?, vector::<R>(OP, "mean", &s.mean, c)?);
    let var = (vector_mut::<R>(OP, "running_var", &s.running_var.0, c)?, vector::<R>(OP, "var", &s.var, c)?);
    for ((to, batch), factor) in [(mean, R::one()), (var, unbiased)] {
        for (to, v) in to.iter_mut().zip(batch) {
            if v.is_finite() {
                *to = (R::one() - momentum) * *to + momentum * factor * *v;
            }
        }
    }
    Ok(())
}

// ---- rows ----------------------------------------------------------------------------------------------

/// One value for each of `n` rows, to be written by the row's thread.
fn per_row<'a, R: Real>(op: &'static str, arg: &'static str, v: &In<'a>, n: usize) -> Result<RowsMut<'a, R>> {
    vector_mut::<R>(op, arg, v, n)?;
    rows_mut(op, arg, &v.reshape(op, arg, [n, 1])?)
}

/// Runs `f` on every row, with `cols` elements of scratch for each chunk of rows.
fn par_rows_with<R: Real>(
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

/// Bytes of [`par_rows_with`] on the rows of `x`.
fn rows_with_bytes(x: &In, threads: usize, cols: usize) -> usize {
    per_thread(threads, acc_size(x.dtype), x.dims.rows().div_ceil(chunk_rows(cols)), [cols])
}

/// Bytes of [`RowsBackward::run`].
fn rows_backward_bytes(x: &In, threads: usize) -> usize {
    let (size, rows, n) = (acc_size(x.dtype), x.dims.rows(), x.dims.cols().saturating_mul(2));
    let locals = per_thread(threads, size, reduce_chunks(rows), [n]);
    together([block(size, n), locals, reduce_bytes(size, rows, n)])
}

fn rms_fwd<T: Elem>(ws: &Workspace, s: &RmsNormFwd) -> Result<()> {
    const OP: &str = "rms_norm_fwd";
    let (x, y) = (rows::<T>(OP, "x", &s.x)?, rows_mut::<T>(OP, "y", &s.y.0)?);
    expect_rows(OP, "y", &s.y.0, x.rows, x.cols)?;
    let w = vector::<T>(OP, "w", &s.w, x.cols)?;
    let out = per_row::<T::Acc>(OP, "rstd", &s.rstd.0, x.rows)?;
    let residual = match (&s.residual, &s.sum) {
        (None, None) => None,
        (Some(residual), Some(sum)) => {
            expect_rows(OP, "residual", residual, x.rows, x.cols)?;
            expect_rows(OP, "sum", &sum.0, x.rows, x.cols)?;
            Some((rows::<T>(OP, "residual", residual)?, rows_mut::<T>(OP, "sum", &sum.0)?))
        }
        (None, _) => return Err(Error::arg(OP, "sum", "present", "absent as `residual` is")),
        (_, None) => return Err(Error::arg(OP, "sum", "absent", "present as `residual` is")),
    };
    let n = T::Acc::of(x.cols as f64);
    par_rows_with(
        ws,
        x.rows,
        x.cols,
        #[inline(always)]
        |i, buf: &mut [T::Acc]| {
            // SAFETY: chunks do not share rows.
            let (y, out) = unsafe { (y.row(i), &mut out.row(i)[0]) };
            match residual {
                None => widen(x.row(i), buf),
                Some((residual, sum)) => {
                    // SAFETY: as above.
                    let sum = unsafe { sum.row(i) };
                    add_rounded(x.row(i), residual.row(i), sum, buf);
                }
            }
            *out = rstd(dot(buf, buf) / n, s.eps);
            for ((y, x), w) in y.iter_mut().zip(&*buf).zip(w) {
                *y = T::down(T::down(*x * *out).up() * w.up());
            }
        },
    )
}

/// `sum = a + b`, rounded; `wide` is `sum` widened.
#[inline(always)]
fn add_rounded<T: Elem>(a: &[T], b: &[T], sum: &mut [T], wide: &mut [T::Acc]) {
    for (((sum, wide), a), b) in sum.iter_mut().zip(wide).zip(a).zip(b) {
        *sum = T::down(a.up() + b.up());
        *wide = sum.up();
    }
}

fn layer_fwd<T: Elem>(ws: &Workspace, s: &LayerNormFwd) -> Result<()> {
    const OP: &str = "layer_norm_fwd";
    let (x, y) = (rows::<T>(OP, "x", &s.x)?, rows_mut::<T>(OP, "y", &s.y.0)?);
    expect_rows(OP, "y", &s.y.0, x.rows, x.cols)?;
    let (w, b) = (vector::<T>(OP, "w", &s.w, x.cols)?, vector::<T>(OP, "b", &s.b, x.cols)?);
    let means = per_row::<T::Acc>(OP, "mean", &s.mean.0, x.rows)?;
    let rstds = per_row::<T::Acc>(OP, "rstd", &s.rstd.0, x.rows)?;
    let n = T::Acc::of(x.cols as f64);
    par_rows_with(
        ws,
        x.rows,
        x.cols,
        #[inline(always)]
        |i, buf: &mut [T::Acc]| {
            // SAFETY: chunks do not share rows.
            let (y, mean, scale) = unsafe { (y.row(i), &mut means.row(i)[0], &mut rstds.row(i)[0]) };
            widen(x.row(i), buf);
            *mean = sum(buf) / n;
            buf.iter_mut().for_each(|v| *v = *v - *mean);
            *scale = rstd(dot(buf, buf) / n, s.eps);
            for (((y, x), w), b) in y.iter_mut().zip(&*buf).zip(w).zip(b) {
                *y = T::down(*x * *scale * w.up() + b.up());
            }
        },
    )
}

/// What the backward of a norm over rows reads; without means it is an RMS norm.
struct RowsBackward<'a, T: Elem> {
    dy: Rows<'a, T>,
    dsum: Option<Rows<'a, T>>,
    x: Rows<'a, T>,
    w: &'a [T],
    mean: Option<&'a [T::Acc]>,
    rstd: &'a [T::Acc],
    dx: RowsMut<'a, T>,
}

impl<T: Elem> RowsBackward<'_, T> {
    /// Writes `dx`; returns the gradients of weight and bias.
    fn run<'w>(&self, ws: &'w Workspace) -> Result<Scratch<'w, T::Acc>> {
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
        // The RMS norm rounds what it multiplies with the weight.
        let rounds = self.mean.is_none();
        for k in 0..c {
            let dy = dy[k].up();
            d[k] = dy * w[k].up();
            dw[k] += dy * if rounds { T::down(xhat[k]).up() } else { xhat[k] };
            db[k] += dy;
        }
    }

    /// `rstd * (d - mean(d) - xhat * mean(d * xhat)) + dsum`, the first mean only if there are means.
    #[inline(always)]
    fn row_dx(&self, i: usize, xhat: &[T::Acc], d: &[T::Acc]) {
        let n = T::Acc::of(self.x.cols as f64);
        let of_d = if self.mean.is_some() { sum(d) / n } else { T::Acc::zero() };
        let (of_dx, rstd) = (dot(d, xhat) / n, self.rstd[i]);
        let value = |d: T::Acc, xhat: T::Acc| rstd * (d - of_d - xhat * of_dx);
        // SAFETY: chunks do not share rows, and this one's thread is the caller.
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

fn rms_bwd<T: Elem>(ws: &Workspace, s: &RmsNormBwd) -> Result<()> {
    const OP: &str = "rms_norm_bwd";
    let x = rows::<T>(OP, "x", &s.x)?;
    for (arg, v) in [("dy", Some(&s.dy)), ("dsum", s.dsum.as_ref()), ("dx", Some(&s.dx.0))] {
        v.map_or(Ok(()), |v| expect_rows(OP, arg, v, x.rows, x.cols))?;
    }
    let back = RowsBackward {
        dy: rows(OP, "dy", &s.dy)?,
        dsum: s.dsum.as_ref().map(|v| rows(OP, "dsum", v)).transpose()?,
        x,
        w: vector(OP, "w", &s.w, x.cols)?,
        mean: None,
        rstd: vector(OP, "rstd", &s.rstd, x.rows)?,
        dx: rows_mut(OP, "dx", &s.dx.0)?,
    };
    let dw = sums_out(OP, "dw", &s.dw, x.cols)?;
    let sums = back.run(ws)?;
    if let Some(dw) = dw {
        add_to(dw, &sums[..x.cols]);
    }
    Ok(())
}

fn layer_bwd<T: Elem>(ws: &Workspace, s: &LayerNormBwd) -> Result<()> {
    const OP: &str = "layer_norm_bwd";
    let x = rows::<T>(OP, "x", &s.x)?;
    for (arg, v) in [("dy", &s.dy), ("dx", &s.dx.0)] {
        expect_rows(OP, arg, v, x.rows, x.cols)?;
    }
    let back = RowsBackward {
        dy: rows(OP, "dy", &s.dy)?,
        dsum: None,
        x,
        w: vector(OP, "w", &s.w, x.cols)?,
        mean: Some(vector(OP, "mean", &s.mean, x.rows)?),
        rstd: vector(OP, "rstd", &s.rstd, x.rows)?,
        dx: rows_mut(OP, "dx", &s.dx.0)?,
    };
    let (dw, db) = (sums_out(OP, "dw", &s.dw, x.cols)?, sums_out(OP, "db", &s.db, x.cols)?);
    let sums = back.run(ws)?;
    for (to, sums) in [(dw, &sums[..x.cols]), (db, &sums[x.cols..])] {
        if let Some(to) = to {
            add_to(to, sums);
        }
    }
    Ok(())
}

fn l2_fwd<T: Elem>(ws: &Workspace, s: &L2NormFwd) -> Result<()> {
    const OP: &str = "l2_norm_fwd";
    let (x, y) = (rows::<T>(OP, "x", &s.x)?, rows_mut::<T>(OP, "y", &s.y.0)?);
    expect_rows(OP, "y", &s.y.0, x.rows, x.cols)?;
    let norms = per_row::<T::Acc>(OP, "norm", &s.norm.0, x.rows)?;
    par_rows_with(
        ws,
        x.rows,
        x.cols,
        #[inline(always)]
        |i, buf: &mut [T::Acc]| {
            // SAFETY: chunks do not share rows.
            let (y, norm) = unsafe { (y.row(i), &mut norms.row(i)[0]) };
            widen(x.row(i), buf);
            *norm = dot(buf, buf).sqrt().max(T::Acc::of(s.eps));
            y.iter_mut().zip(buf).for_each(|(y, x)| *y = T::down(*x / *norm));
        },
    )
}

fn l2_bwd<T: Elem, D: Elem<Acc = T::Acc>>(ws: &Workspace, s: &L2NormBwd) -> Result<()> {
    const OP: &str = "l2_norm_bwd";
    let (x, dy) = (rows::<T>(OP, "x", &s.x)?, rows::<D>(OP, "dy", &s.dy)?);
    expect_rows(OP, "dy", &s.dy, x.rows, x.cols)?;
    let norm = vector::<T::Acc>(OP, "norm", &s.norm, x.rows)?;
    match (&s.dx, &s.dx_acc) {
        (Some(dx), None) => {
            expect_rows(OP, "dx", &dx.0, x.rows, x.cols)?;
            let dx = rows_mut::<T>(OP, "dx", &dx.0)?;
            l2_rows(
                ws,
                (x, dy, norm, s.eps),
                #[inline(always)]
                |i, v| {
                    // SAFETY: chunks do not share rows.
                    let dx = unsafe { dx.row(i) };
                    round(v, dx);
                },
            )
        }
        (None, Some(dx)) => {
            expect_rows(OP, "dx_acc", &dx.0, x.rows, x.cols)?;
            let dx = rows_mut::<T::Acc>(OP, "dx_acc", &dx.0)?;
            l2_rows(
                ws,
                (x, dy, norm, s.eps),
                #[inline(always)]
                |i, v| {
                    // SAFETY: chunks do not share rows.
                    let dx = unsafe { dx.row(i) };
                    add_to(dx, v);
                },
            )
        }
        (Some(_), _) => Err(Error::arg(OP, "dx_acc", "present", "absent as `dx` is present")),
        _ => Err(Error::arg(OP, "dx", "absent", "present, or `dx_acc`")),
    }
}

/// Calls `store` with the gradient of every row.
fn l2_rows<T: Elem, D: Elem<Acc = T::Acc>>(
    ws: &Workspace,
    (x, dy, norm, eps): (Rows<T>, Rows<D>, &[T::Acc], f64),
    store: impl Fn(usize, &[T::Acc]) + Sync,
) -> Result<()> {
    let c = x.cols;
    par_rows_with(
        ws,
        x.rows,
        2 * c,
        #[inline(always)]
        |i, buf: &mut [T::Acc]| {
            let (y, d) = buf.split_at_mut(c);
            y.iter_mut().zip(x.row(i)).for_each(|(y, x)| *y = x.up() / norm[i]);
            widen(dy.row(i), d);
            let raised = norm[i] <= T::Acc::of(eps);
            let along = if raised { T::Acc::zero() } else { dot(y, d) };
            d.iter_mut().zip(&*y).for_each(|(d, y)| *d = (*d - *y * along) / norm[i]);
            store(i, d);
        },
    )
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn mean_var(v: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
        let n = v.clone().count() as f64;
        let mean = v.clone().sum::<f64>() / n;
        (mean, v.map(|x| (x - mean).powi(2)).sum::<f64>() / n)
    }

    /// Inputs away from zero mean, so that a one-pass variance would show.
    fn shifted(n: usize, seed: u64) -> Vec<f64> {
        values(n, seed).iter().map(|x| DType::Bf16.rounded(x + 3.0)).collect()
    }

    fn group_forward(r: &Run, dims: [usize; 4], g: usize, silu: bool, v: &[Vec<f64>]) -> [Tensor; 3] {
        let c = dims[3];
        let (x, w, b) = (r.act(dims, &v[0]), r.act([c], &v[1]), r.act([c], &v[2]));
        let (y, mean, rstd) = (r.out(dims), r.out_acc([dims[0], g]), r.out_acc([dims[0], g]));
        let (x, w, b) = (x.view(), w.view(), b.view());
        let (y_out, mean_out, rstd_out, eps) = (y.out(), mean.out(), rstd.out(), 1e-6);
        let s = GroupNormFwd { x, w, b, y: y_out, mean: mean_out, rstd: rstd_out, eps, silu };
        r.cpu.group_norm_fwd(S, &s).unwrap();
        [y, mean, rstd]
    }

    fn group_backward(
        r: &Run,
        dims: [usize; 4],
        g: usize,
        silu: bool,
        v: &[Vec<f64>],
        stats: [&[f64]; 2],
    ) -> Vec<Tensor> {
        let c = dims[3];
        let (x, w, b, dy) = (r.act(dims, &v[0]), r.act([c], &v[1]), r.act([c], &v[2]), r.act(dims, &v[3]));
        let [mean, rstd] = stats.map(|s| r.acc([dims[0], g], s));
        let (dx, dw, db) = (r.out(dims), r.acc([c], &vec![0.0; c]), r.acc([c], &vec![0.0; c]));
        let s = GroupNormBwd {
            dy: dy.view(),
            x: x.view(),
            w: w.view(),
            b: b.view(),
            mean: mean.view(),
            rstd: rstd.view(),
            dx: dx.out(),
            dw: Some(dw.acc()),
            db: Some(db.acc()),
            silu,
        };
        r.cpu.group_norm_bwd(S, &s).unwrap();
        let alone = r.out(dims);
        let s = GroupNormBwd { dx: alone.out(), dw: None, db: None, ..s };
        r.cpu.group_norm_bwd(S, &s).unwrap();
        assert_eq!(r.get(&alone), r.get(&dx));
        vec![dx, dw, db]
    }

    #[test]
    fn group_norm_matches_loops_and_differences() {
        for (dims, g, silu) in [
            ([1, 1, 1, 8], 2, true),
            ([2, 3, 5, 6], 3, true),
            ([3, 7, 1, 5], 5, false),
            ([2, 40, 31, 6], 3, true),
            ([2, 1, 40, 64], 1, false),
        ] {
            let [b, h, w, c] = dims;
            let (p, n, width) = (h * w, b * h * w * c, c / g);
            let v = [shifted(n, 1), values(c, 2), values(c, 3), values(n, 4)];
            let stat = |b: usize, g: usize| {
                mean_var((0..p * width).map(|i| v[0][(b * p + i / width) * c + g * width + i % width]))
            };
            let stats: Vec<(f64, f64)> = (0..b * g).map(|i| stat(i / g, i % g)).collect();
            let mean: Vec<f64> = stats.iter().map(|s| s.0).collect();
            let rstd: Vec<f64> = stats.iter().map(|s| 1.0 / (s.1 + 1e-6).sqrt()).collect();
            let y = (0..n).map(|i| {
                let (k, s) = (i % c, i / p / c * g + i % c / width);
                let y = (v[0][i] - mean[s]) * rstd[s] * v[1][k] + v[2][k];
                if silu { y / (1.0 + (-y).exp()) } else { y }
            });
            check(&[y.collect(), mean.clone(), rstd.clone()], |r| group_forward(r, dims, g, silu, &v).into());
            let stats = [&mean[..], &rstd];
            let r = Run::f64();
            let grads = r.values(&group_backward(&r, dims, g, silu, &v, stats));
            check_gradients(&[&v[0], &v[1], &v[2]], &[&grads[0], &grads[1], &grads[2]], |at| {
                inner(&r.get(&group_forward(&r, dims, g, silu, at)[0]), &v[3])
            });
            check(&grads, |r| group_backward(r, dims, g, silu, &v, stats));
        }
    }

    fn batch_forward(r: &Run, [n, c]: [usize; 2], slope: f64, v: &[Vec<f64>]) -> [Tensor; 3] {
        let (x, w, b) = (r.act([n, c], &v[0]), r.act([c], &v[1]), r.act([c], &v[2]));
        let (y, mean, var) = (r.out([n, c]), r.out_acc([c]), r.out_acc([c]));
        let (x, w, b) = (x.view(), w.view(), b.view());
        let (yo, mo, vo, eps) = (y.out(), mean.out(), var.out(), 1e-5);
        r.cpu.batch_norm_fwd(S, &BatchNormFwd { x, w, b, y: yo, mean: mo, var: vo, eps, slope }).unwrap();
        [y, mean, var]
    }

    #[test]
    fn batch_norm_matches_loops_and_differences() {
        for ([n, c], slope) in [([5, 1], 0.2), ([31, 7], 0.2), ([2500, 3], 1.0), ([67, 1030], 0.2)] {
            let v = [shifted(n * c, 1), values(c, 2), values(c, 3), values(n * c, 4)];
            let stats: Vec<(f64, f64)> = (0..c)
                .map(|k| mean_var((0..n).map(|i| v[0][i * c + k]).collect::<Vec<_>>().into_iter()))
                .collect();
            let [mean, var] = [|s: &(f64, f64)| s.0, |s: &(f64, f64)| s.1]
                .map(|f| stats.iter().map(f).collect::<Vec<f64>>());
            let y = (0..n * c).map(|i| {
                let y = (v[0][i] - mean[i % c]) / (var[i % c] + 1e-5).sqrt() * v[1][i % c] + v[2][i % c];
                if y > 0.0 { y } else { slope * y }
            });
            check(&[y.collect(), mean.clone(), var.clone()], |r| batch_forward(r, [n, c], slope, &v).into());
            let backward = |r: &Run| {
                let (x, dy) = (r.act([n, c], &v[0]), r.act([n, c], &v[3]));
                let (w, b, mean, var) =
                    (r.act([c], &v[1]), r.act([c], &v[2]), r.acc([c], &mean), r.acc([c], &var));
                let (dx, dw, db) = (r.out([n, c]), r.acc([c], &vec![0.0; c]), r.acc([c], &vec![0.0; c]));
                let s = BatchNormBwd {
                    dy: dy.view(),
                    x: x.view(),
                    w: w.view(),
                    b: b.view(),
                    mean: mean.view(),
                    var: var.view(),
                    dx: dx.out(),
                    dw: Some(dw.acc()),
                    db: Some(db.acc()),
                    eps: 1e-5,
                    slope,
                };
                r.cpu.batch_norm_bwd(S, &s).unwrap();
                vec![dx, dw, db]
            };
            let r = Run::f64();
            let grads = r.values(&backward(&r));
            check_gradients(&[&v[0], &v[1], &v[2]], &[&grads[0], &grads[1], &grads[2]], |at| {
                inner(&r.get(&batch_forward(&r, [n, c], slope, at)[0]), &v[3])
            });
            check(&grads, backward);
        }
    }

    #[test]
    fn batch_norm_with_given_statistics_matches_loops_and_differences() {
        for ([n, c], slope) in [([1, 3], 0.2), ([31, 7], 0.2), ([2500, 3], 1.0)] {
            let v = [shifted(n * c, 1), values(c, 2), values(c, 3), values(n * c, 4)];
            let (mean, var) = (values(c, 5), values(c, 6).iter().map(|v| 0.5 + v.abs()).collect::<Vec<_>>());
            let y = (0..n * c).map(|i| {
                let y = (v[0][i] - mean[i % c]) / (var[i % c] + 1e-5).sqrt() * v[1][i % c] + v[2][i % c];
                if y > 0.0 { y } else { slope * y }
            });
            let forward = |r: &Run, v: &[Vec<f64>]| {
                let (x, w, b) = (r.act([n, c], &v[0]), r.act([c], &v[1]), r.act([c], &v[2]));
                let (mean, var, y) = (r.acc([c], &mean), r.acc([c], &var), r.out([n, c]));
                let (x, w, b, mean, var) = (x.view(), w.view(), b.view(), mean.view(), var.view());
                let s = BatchNormEvalFwd { x, w, b, mean, var, y: y.out(), eps: 1e-5, slope };
                r.cpu.batch_norm_eval_fwd(S, &s).unwrap();
                y
            };
            check(&[y.collect()], |r| vec![forward(r, &v)]);
            let backward = |r: &Run| {
                let (x, dy) = (r.act([n, c], &v[0]), r.act([n, c], &v[3]));
                let (w, b, mean, var) =
                    (r.act([c], &v[1]), r.act([c], &v[2]), r.acc([c], &mean), r.acc([c], &var));
                let (dx, dw, db) = (r.out([n, c]), r.acc([c], &vec![0.0; c]), r.acc([c], &vec![0.0; c]));
                let s = BatchNormEvalBwd {
                    dy: dy.view(),
                    x: x.view(),
                    w: w.view(),
                    b: b.view(),
                    mean: mean.view(),
                    var: var.view(),
                    dx: dx.out(),
                    dw: Some(dw.acc()),
                    db: Some(db.acc()),
                    eps: 1e-5,
                    slope,
                };
                r.cpu.batch_norm_eval_bwd(S, &s).unwrap();
                vec![dx, dw, db]
            };
            let r = Run::f64();
            let grads = r.values(&backward(&r));
            check_gradients(&[&v[0], &v[1], &v[2]], &[&grads[0], &grads[1], &grads[2]], |at| {
                inner(&r.get(&forward(&r, at)), &v[3])
            });
            check(&grads, backward);
        }
    }

    #[test]
    fn running_statistics_are_unbiased() {
        check(&[vec![0.9 + 0.2], vec![0.9 * 3.0 + 0.1 * 4.0 * 5.0 / 4.0]], |r| {
            let (mean, var) = (r.acc([1], &[2.0]), r.acc([1], &[4.0]));
            let (rm, rv) = (r.acc([1], &[1.0]), r.acc([1], &[3.0]));
            let (mean, var, running_mean, running_var) = (mean.view(), var.view(), rm.acc(), rv.acc());
            let s = BatchNormRunning { mean, var, running_mean, running_var, rows: 5, momentum: 0.1 };
            r.cpu.batch_norm_running(S, &s).unwrap();
            vec![rm, rv]
        });
    }

    #[test]
    fn running_statistics_leave_out_what_is_not_finite() {
        let r = Run::f64();
        let (mean, var) = (r.acc([2], &[f64::NAN, 2.0]), r.acc([2], &[4.0, f64::INFINITY]));
        let (rm, rv) = (r.acc([2], &[1.0, 1.0]), r.acc([2], &[3.0, 3.0]));
        let (mean, var, running_mean, running_var) = (mean.view(), var.view(), rm.acc(), rv.acc());
        let s = BatchNormRunning { mean, var, running_mean, running_var, rows: 4, momentum: 0.5 };
        r.cpu.batch_norm_running(S, &s).unwrap();
        assert_eq!((r.get(&rm)[0], r.get(&rv)[1]), (1.0, 3.0));
        assert!(r.get(&rm)[1] == 1.5 && r.get(&rv)[0] > 3.0);
    }

    /// Shapes of the norms over rows: more rows than one partial sum holds, odd widths.
    const ROWS: [[usize; 2]; 4] = [[1, 1], [7, 5], [150, 67], [3, 1031]];

    fn rms_forward(r: &Run, [n, c]: [usize; 2], v: &[Vec<f64>]) -> [Tensor; 3] {
        let (x, res, w) = (r.columns(n, c, &v[0]), r.act([n, c], &v[1]), r.act([c], &v[2]));
        let (sum, y, rstd) = (r.out([n, c]), r.columns(n, c, &vec![f64::NAN; n * c]), r.out_acc([n]));
        let (residual, so) = (Some(res.view()), Some(sum.out()));
        let (x, w, yo, ro, eps) = (x.view(), w.view(), y.out(), rstd.out(), 1e-5);
        r.cpu.rms_norm_fwd(S, &RmsNormFwd { x, residual, w, sum: so, y: yo, rstd: ro, eps }).unwrap();
        [y, sum, rstd]
    }

    #[test]
    fn rms_norm_matches_loops_and_differences() {
        for shape @ [n, c] in ROWS {
            // Summands whose sums are numbers of bf16: statistics are taken of the sum as it is stored.
            let coarse = |seed| -> Vec<f64> {
                let v = values(n * c, seed);
                v.iter().map(|x| (8.0 * x).round().clamp(-32.0, 32.0) / 8.0).collect()
            };
            let v = [coarse(1), coarse(2), values(c, 3), values(n * c, 4), values(n * c, 5)];
            let sum: Vec<f64> = v[0].iter().zip(&v[1]).map(|(a, b)| a + b).collect();
            let rstd: Vec<f64> = sum
                .chunks(c)
                .map(|s| 1.0 / (s.iter().map(|x| x * x).sum::<f64>() / c as f64 + 1e-5).sqrt())
                .collect();
            let y = (0..n * c).map(|i| sum[i] * rstd[i / c] * v[2][i % c]).collect();
            check(&[y, sum.clone(), rstd.clone()], |r| rms_forward(r, shape, &v).into());
            // From here on the sum is an input: rounded.
            let sum: Vec<f64> = sum.iter().map(|x| DType::Bf16.rounded(*x)).collect();
            let at = [sum.clone(), vec![0.0; n * c], v[2].clone()];
            let r = Run::f64();
            let rstd = r.get(&rms_forward(&r, shape, &at)[2]);
            let backward = |r: &Run| {
                let (dy, dsum, x) = (r.columns(n, c, &v[3]), r.act([n, c], &v[4]), r.columns(n, c, &sum));
                let (w, rstd, dx, dw) =
                    (r.act([c], &v[2]), r.acc([n], &rstd), r.out([n, c]), r.acc([c], &vec![0.0; c]));
                let (dsum, dw_acc) = (Some(dsum.view()), Some(dw.acc()));
                let (dy, x, w, rstd, out) = (dy.view(), x.view(), w.view(), rstd.view(), dx.out());
                r.cpu.rms_norm_bwd(S, &RmsNormBwd { dy, dsum, x, w, rstd, dx: out, dw: dw_acc }).unwrap();
                vec![dx, dw]
            };
            let r = Run::f64();
            let grads = r.values(&backward(&r));
            check_gradients(&[&at[0], &at[1], &at[2]], &[&grads[0], &grads[0], &grads[1]], |at| {
                let [y, sum, _] = rms_forward(&r, shape, at);
                inner(&r.get(&y), &v[3]) + inner(&r.get(&sum), &v[4])
            });
            check(&grads[..1], |r| backward(r)[..1].to_vec());
            // What the weights multiply is rounded to act first.
            for p in [Precision::F64, Precision::F32, Precision::BF16] {
                let mut dw = vec![0.0; c];
                for (i, (dy, x)) in v[3].iter().zip(&sum).enumerate() {
                    dw[i % c] += dy * p.act.rounded(x * rstd[i / c]);
                }
                let r = Run::new(p, 1);
                compare_all(&r, &backward(&r)[1..], &[dw]);
            }
        }
    }

    #[test]
    fn rms_norm_without_residual() {
        let (r, x) = (Run::f64(), values(12, 1));
        let (xt, w, y, rstd) = (r.act([3, 4], &x), r.act([4], &[1.0; 4]), r.out([3, 4]), r.out_acc([3]));
        let (residual, sum, eps) = (None, None, 1e-5);
        let s = RmsNormFwd { x: xt.view(), residual, w: w.view(), sum, y: y.out(), rstd: rstd.out(), eps };
        r.cpu.rms_norm_fwd(S, &s).unwrap();
        let want = rms_forward(&r, [3, 4], &[x, vec![0.0; 12], vec![1.0; 4]]);
        assert_eq!(r.get(&y), r.get(&want[0]));
        let e = r.cpu.rms_norm_fwd(S, &RmsNormFwd { sum: Some(y.out()), ..s }).unwrap_err();
        assert_eq!(e.to_string(), "rms_norm_fwd: argument `sum` is present, wanted absent as `residual` is");
    }

    fn layer_forward(r: &Run, [n, c]: [usize; 2], v: &[Vec<f64>]) -> [Tensor; 3] {
        let (x, w, b) = (r.columns(n, c, &v[0]), r.act([c], &v[1]), r.act([c], &v[2]));
        let (y, mean, rstd) = (r.out([n, c]), r.out_acc([n]), r.out_acc([n]));
        let (x, w, b) = (x.view(), w.view(), b.view());
        let (yo, mo, ro, eps) = (y.out(), mean.out(), rstd.out(), 1e-5);
        r.cpu.layer_norm_fwd(S, &LayerNormFwd { x, w, b, y: yo, mean: mo, rstd: ro, eps }).unwrap();
        [y, mean, rstd]
    }

    #[test]
    fn layer_norm_matches_loops_and_differences() {
        for shape @ [n, c] in ROWS {
            let v = [shifted(n * c, 1), values(c, 2), values(c, 3), values(n * c, 4)];
            let stats: Vec<(f64, f64)> = v[0].chunks(c).map(|x| mean_var(x.iter().copied())).collect();
            let mean: Vec<f64> = stats.iter().map(|s| s.0).collect();
            let rstd: Vec<f64> = stats.iter().map(|s| 1.0 / (s.1 + 1e-5).sqrt()).collect();
            let y = (0..n * c).map(|i| (v[0][i] - mean[i / c]) * rstd[i / c] * v[1][i % c] + v[2][i % c]);
            check(&[y.collect(), mean.clone(), rstd.clone()], |r| layer_forward(r, shape, &v).into());
            let backward = |r: &Run| {
                let (dy, x, w) = (r.columns(n, c, &v[3]), r.columns(n, c, &v[0]), r.act([c], &v[1]));
                let (mean, rstd, dx) = (r.acc([n], &mean), r.acc([n], &rstd), r.out([n, c]));
                let (dw, db) = (r.acc([c], &vec![0.0; c]), r.acc([c], &vec![0.0; c]));
                let (dwa, dba) = (Some(dw.acc()), Some(db.acc()));
                let (dy, x, w, mean, rstd) = (dy.view(), x.view(), w.view(), mean.view(), rstd.view());
                let s = LayerNormBwd { dy, x, w, mean, rstd, dx: dx.out(), dw: dwa, db: dba };
                r.cpu.layer_norm_bwd(S, &s).unwrap();
                vec![dx, dw, db]
            };
            let r = Run::f64();
            let grads = r.values(&backward(&r));
            check_gradients(&[&v[0], &v[1], &v[2]], &[&grads[0], &grads[1], &grads[2]], |at| {
                inner(&r.get(&layer_forward(&r, shape, at)[0]), &v[3])
            });
            check(&grads, backward);
        }
    }

    fn l2_forward(r: &Run, [n, c]: [usize; 2], x: &[f64]) -> [Tensor; 2] {
        let (x, y, norm) = (r.columns(n, c, x), r.out([n, c]), r.out_acc([n]));
        let s = L2NormFwd { x: x.view(), y: y.out(), norm: norm.out(), eps: 0.5 };
        r.cpu.l2_norm_fwd(S, &s).unwrap();
        [y, norm]
    }

    #[test]
    fn l2_norm_matches_loops_and_differences() {
        for shape @ [n, c] in ROWS {
            // Every third row is shorter than eps.
            let mut x = values(n * c, 1);
            x.iter_mut().enumerate().for_each(|(i, x)| *x *= if i / c % 3 == 2 { 1.0 / 256.0 } else { 1.0 });
            let (dy, before) = (values(n * c, 2), values(n * c, 3));
            let norm: Vec<f64> =
                x.chunks(c).map(|x| x.iter().map(|x| x * x).sum::<f64>().sqrt().max(0.5)).collect();
            let y = (0..n * c).map(|i| x[i] / norm[i / c]).collect();
            check(&[y, norm.clone()], |r| l2_forward(r, shape, &x).into());
            let backward = |r: &Run| {
                let (xt, dyt, dya) = (r.act([n, c], &x), r.act([n, c], &dy), r.acc([n, c], &dy));
                let (norm, dx, acc) = (r.acc([n], &norm), r.out([n, c]), r.acc([n, c], &before));
                let (x, norm, eps) = (xt.view(), norm.view(), 0.5);
                let s = L2NormBwd { dy: dyt.view(), x, norm, dx: Some(dx.out()), dx_acc: None, eps };
                r.cpu.l2_norm_bwd(S, &s).unwrap();
                let s = L2NormBwd { dy: dya.view(), dx: None, dx_acc: Some(acc.acc()), ..s };
                r.cpu.l2_norm_bwd(S, &s).unwrap();
                assert!(r.cpu.l2_norm_bwd(S, &L2NormBwd { dx_acc: None, ..s }).is_err());
                vec![dx, acc]
            };
            let r = Run::f64();
            let grads = r.values(&backward(&r));
            let forward = |at: &[Vec<f64>]| inner(&r.get(&l2_forward(&r, shape, &at[0])[0]), &dy);
            check_gradients(&[&x], &[&grads[0]], forward);
            let added: Vec<f64> = grads[1].iter().zip(&before).map(|(a, b)| a - b).collect();
            check_gradients(&[&x], &[&added], forward);
            check(&grads, backward);
        }
    }

    #[test]
    fn wrong_shapes_are_named() {
        let r = Run::new(Precision::F32, 1);
        let (x, w, s) = (r.out([1, 2, 2, 6]), r.out([6]), r.out([1, 4]));
        let (xv, wv) = (x.view(), w.view());
        let (mean, rstd, eps, silu) = (s.out(), s.out(), 1e-6, true);
        let a = GroupNormFwd { x: xv, w: wv, b: wv, y: x.out(), mean, rstd, eps, silu };
        let want = "group_norm_fwd: argument `mean` is [1, 4], wanted a number of groups that divides 6";
        assert_eq!(r.cpu.group_norm_fwd(S, &a).unwrap_err().to_string(), want);
    }
}
