//! Convolutions as products with a column matrix that is gathered chunk by chunk, so that it stays in cache.

use std::ops::Range;

use num_traits::Zero;
use rayon::prelude::*;

use super::products::{add_col_sums, bias, start_from_bias};
use super::workspace::{acc_size, block, is_narrow, per_thread, together, wide};
use super::*;

pub(super) fn conv2d_fwd(ws: &Workspace, s: &Conv2dFwd) -> Result<()> {
    by_dtype!("conv2d_fwd", s.y.0.dtype, T => fwd::<T>(ws, s))
}

pub(super) fn conv2d_bwd_data(ws: &Workspace, s: &Conv2dBwdData) -> Result<()> {
    by_dtype!("conv2d_bwd_data", s.dx.0.dtype, T => bwd_data::<T>(ws, s))
}

pub(super) fn conv2d_bwd_weight(ws: &Workspace, s: &Conv2dBwdWeight) -> Result<()> {
    by_dtype!("conv2d_bwd_weight", s.x.dtype, T => bwd_weight::<T>(ws, s))
}

/// Checks `x [B, H, W, C]`, `w [O, kh, kw, C]`, `y [B, H', W', O]` against each other.
fn check_shapes(
    op: &'static str,
    x: (&'static str, &In),
    w: &In,
    y: (&'static str, &In),
    stride: usize,
) -> Result<()> {
    let ([b, _, _, c], [o, kh, kw, _], [_, ho, wo, _]) =
        (image(op, x.0, x.1)?, image(op, "w", w)?, image(op, y.0, y.1)?);
    expect_dims(op, "w", w, [o, kh, kw, c])?;
    expect_dims(op, y.0, y.1, [b, ho, wo, o])?;
    if stride == 0 {
        return Err(Error::arg(op, "stride", stride, "at least 1"));
    }
    Ok(())
}

/// The shape of a column matrix: row `p` holds, for position `p` of a grid, the pixels under all taps of a kernel.
#[derive(Clone, Copy)]
struct Geometry {
    /// `[B, H, W, C]` of the image.
    dims: [usize; 4],
    /// Rows and columns of positions.
    grid: [usize; 2],
    /// Rows and columns of the kernel.
    taps: [usize; 2],
    /// Pixels from one position to the next.
    step: usize,
    /// Pixel under the first tap at position (0, 0).
    at: [isize; 2],
}

impl Geometry {
    /// Of the images that a convolution reads, under the positions that it writes.
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

    /// Rows of a chunk: enough to pay for reading the weights again, few enough for the cache.
    fn chunk(&self) -> usize {
        let fit = ((128 << 10) / self.width().max(1)).clamp(128, 1024);
        fit.min(self.rows().div_ceil(16).max(64)).next_multiple_of(8)
    }

    fn chunks(&self) -> usize {
        self.rows().div_ceil(self.chunk())
    }

    /// True if the matrix is the image itself.
    fn is_image(&self) -> bool {
        self.taps == [1, 1] && self.step == 1 && self.at == [0, 0] && self.grid == self.dims[1..3]
    }

    /// Elements of a chunk that are gathered into scratch, from an image of this type.
    fn gathered(&self, dtype: DType) -> usize {
        if self.is_image() && !is_narrow(dtype) { 0 } else { self.chunk().saturating_mul(self.width()) }
    }
}

/// The column matrix of an image, zeros where a tap falls outside.
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

    /// One row of taps: a run of pixels between zeros.
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

    /// Calls `f` with rows `r`: `x` itself if the columns are its pixels, else gathered into `scratch`, of
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

pub(super) fn conv2d_fwd_workspace(a: &Conv2dFwd, threads: usize) -> usize {
    let y = &a.y.0;
    let (Ok(x_dims), Ok(w), Ok(y_dims)) = (image("", "", &a.x), image("", "", &a.w), image("", "", y)) else {
        return 0;
    };
    let (o, size) = (w[0], acc_size(y.dtype));
    if y.dims.numel() == 0 {
        return 0;
    }
    let cols = Geometry::forward(x_dims, w, y_dims, a.stride, [a.pad_top, a.pad_left]);
    let transposed = if o <= FEW { 0 } else { block(size, a.w.dims.numel()) };
    together([
        wide(&a.w),
        transposed,
        rounded_bytes(y.dtype, threads, cols.chunks(), cols.chunk().saturating_mul(o)),
        per_thread(threads, size, cols.chunks(), [cols.gathered(a.x.dtype)]),
    ])
}

fn fwd<T: Elem>(ws: &Workspace, s: &Conv2dFwd) -> Result<()> {
    const OP: &str = "conv2d_fwd";
    check_shapes(OP, ("x", &s.x), &s.w, ("y", &s.y.0), s.stride)?;
    let (x, w) = (flat::<T>(OP, "x", &s.x)?, flat::<T>(OP, "w", &s.w)?);
    let y = flat_mut::<T>(OP, "y", &s.y.0)?;
    let o = s.w.dims[0];
    let bias = bias::<T>(OP, s.bias.as_ref(), o)?;
    if y.is_empty() {
        return Ok(());
    }
    let dims = [image(OP, "x", &s.x)?, image(OP, "w", &s.w)?, image(OP, "y", &s.y.0)?];
    let of = Geometry::forward(dims[0], dims[1], dims[2], s.stride, [s.pad_top, s.pad_left]);
    let cols = Columns { x, of };
    let k = of.width();
    let w = Wide::new(ws, Rows::of(w, k))?;
    let w = w.rows().data();
    // The order in which products read weights without packing them.
    let wt = if o <= FEW { None } else { Some(transposed(ws, w, k)?) };
    let wt = wt.as_ref().map_or(Mat::new(w, o, k, k).t(), |wt| Mat::new(wt, k, o, o));
    let chunk = of.chunk();
    let rounded = Rounded::<T>::new(ws, of.chunks(), chunk * o)?;
    let gathered = ws.per_thread::<T::Acc, 1>(of.chunks(), [of.gathered(T::DTYPE)])?;
    y.par_chunks_mut(chunk * o).enumerate().for_each(|(i, y)| {
        let r = i * chunk..i * chunk + y.len() / o;
        let mut gathered = gathered.take();
        let [scratch] = gathered.parts();
        rounded.write(y, |y| {
            start_from_bias(bias, y);
            cols.with(r, scratch, |cols| gemm(cols, wt, y, o, bias.is_some()));
        });
    });
    Ok(())
}

/// `x [n, cols]` as `[cols, n]`.
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

/// Input rows (or columns) `phase, phase + stride, ..`: those that meet the same taps of the kernel.
struct Phase {
    /// Taps that meet them.
    taps: usize,
    /// The last of these; the others come `stride` before it.
    last: usize,
    /// Output row under the last tap at the first input row.
    at: isize,
    /// How many input rows there are.
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

/// The phases of the rows or columns of an image that have any.
fn phases(size: usize, kernel: usize, stride: usize, pad: usize) -> impl Iterator<Item = Phase> {
    (0..stride.min(size)).map(move |phase| Phase::new(phase, size, kernel, stride, pad))
}

/// The columns of `dy [B, H', W', O]` that the pixels of a phase are sums over.
fn columns_of_phase(dy: [usize; 4], v: &Phase, h: &Phase) -> Geometry {
    Geometry { dims: dy, grid: [v.len, h.len], taps: [v.taps, h.taps], step: 1, at: [v.at, h.at] }
}

pub(super) fn conv2d_bwd_data_workspace(a: &Conv2dBwdData, threads: usize) -> usize {
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
    most
}

fn bwd_data<T: Elem>(ws: &Workspace, s: &Conv2dBwdData) -> Result<()> {
    const OP: &str = "conv2d_bwd_data";
    check_shapes(OP, ("dx", &s.dx.0), &s.w, ("dy", &s.dy), s.stride)?;
    let (dy, w) = (flat::<T>(OP, "dy", &s.dy)?, flat::<T>(OP, "w", &s.w)?);
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
                cols.with(r.clone(), gathered, |cols| gemm(cols, wp, out, c, false));
                for (i, p) in r.enumerate() {
                    let [b, y, x] = of.position(p);
                    let pixel = (b * height + py + y * s.stride) * width + px + x * s.stride;
                    // SAFETY: every pixel belongs to one position of one phase, which is one task's.
                    let dx = unsafe { dx.row(pixel) };
                    round(&out[i * c..(i + 1) * c], dx);
                }
            });
        }
    }
    Ok(())
}

/// Weights of the taps of a phase, from the last tap to the first: `wp[u, v, o, c] = w[o, last - u*stride, ..]`.
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

/// Rows of one of the partial sums of a weight gradient: at most eight, fewer where weights are large and rows few.
fn part(rows: usize) -> usize {
    rows.div_ceil(8).max(512)
}

pub(super) fn conv2d_bwd_weight_workspace(a: &Conv2dBwdWeight, threads: usize) -> usize {
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
    of_bias.max(together([of_parts, locals]))
}

/// Elements of a chunk of the columns, and of the output gradient in another type than it is stored in.
fn gradient_parts(cols: &Geometry, dtype: DType, o: usize) -> [usize; 2] {
    let dy = if is_narrow(dtype) { cols.chunk().saturating_mul(o) } else { 0 };
    [cols.gathered(dtype), dy]
}

fn bwd_weight<T: Elem>(ws: &Workspace, s: &Conv2dBwdWeight) -> Result<()> {
    const OP: &str = "conv2d_bwd_weight";
    check_shapes(OP, ("x", &s.x), &s.dw.0, ("dy", &s.dy), s.stride)?;
    let (x, dy) = (flat::<T>(OP, "x", &s.x)?, flat::<T>(OP, "dy", &s.dy)?);
    let dw = flat_mut::<T::Acc>(OP, "dw", &s.dw.0)?;
    let o = s.dw.0.dims[0];
    if let Some(db) = &s.db {
        expect(OP, "db", &db.0, o)?;
        add_col_sums(ws, rows::<T>(OP, "dy", &s.dy)?, flat_mut(OP, "db", &db.0)?)?;
    }
    if dw.is_empty() {
        return Ok(());
    }
    let dims = [image(OP, "x", &s.x)?, image(OP, "dw", &s.dw.0)?, image(OP, "dy", &s.dy)?];
    let of = Geometry::forward(dims[0], dims[1], dims[2], s.stride, [s.pad_top, s.pad_left]);
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

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[derive(Clone, Copy)]
    struct Case {
        x: [usize; 4],
        w: [usize; 4],
        y: [usize; 4],
        stride: usize,
        pad: [usize; 2],
    }

    /// Several sizes, kernels and strides, one-sided padding, a kernel smaller than its stride.
    fn cases() -> Vec<Case> {
        let case = |x: [usize; 4], o, k: [usize; 2], grid: [usize; 2], stride, pad| Case {
            x,
            w: [o, k[0], k[1], x[3]],
            y: [x[0], grid[0], grid[1], o],
            stride,
            pad,
        };
        vec![
            case([1, 1, 1, 1], 1, [1, 1], [1, 1], 1, [0, 0]),
            case([2, 5, 7, 3], 5, [3, 3], [5, 7], 1, [1, 1]),
            case([2, 7, 6, 3], 4, [3, 3], [4, 3], 2, [0, 0]),
            case([1, 8, 8, 2], 3, [4, 4], [4, 4], 2, [1, 1]),
            case([3, 11, 13, 5], 7, [1, 1], [11, 13], 1, [0, 0]),
            case([1, 7, 7, 2], 2, [1, 1], [4, 4], 2, [0, 0]),
            case([1, 5, 4, 2], 3, [2, 3], [3, 2], 3, [2, 0]),
            case([2, 3, 2, 1], 2, [5, 5], [3, 2], 1, [2, 2]),
            // As many positions as pixels, but others.
            case([2, 4, 5, 3], 2, [1, 1], [4, 5], 1, [1, 1]),
            case([2, 37, 33, 2], 3, [3, 3], [37, 33], 1, [1, 1]),
        ]
    }

    /// Calls `f` with the positions in x, w and y of every multiplication.
    fn each(c: Case, mut f: impl FnMut(usize, usize, usize)) {
        let [_, h, w, ci] = c.x;
        let [_, kh, kw, _] = c.w;
        for iy in 0..c.y.iter().product() {
            let [_, ho, wo, o] = c.y;
            let (b, i, j, oc) = (iy / o / wo / ho, iy / o / wo % ho, iy / o % wo, iy % o);
            for iw in 0..kh * kw * ci {
                let (u, v, k) = (iw / ci / kw, iw / ci % kw, iw % ci);
                let (y, x) = (i * c.stride + u, j * c.stride + v);
                if (c.pad[0]..h + c.pad[0]).contains(&y) && (c.pad[1]..w + c.pad[1]).contains(&x) {
                    f(((b * h + y - c.pad[0]) * w + x - c.pad[1]) * ci + k, oc * kh * kw * ci + iw, iy);
                }
            }
        }
    }

    fn size(d: [usize; 4]) -> usize {
        d.iter().product()
    }

    #[test]
    fn convolutions_match_loops() {
        for c in cases() {
            let (x, w, b) = (values(size(c.x), 1), values(size(c.w), 2), values(c.w[0], 3));
            let (dy, dw, db) = (values(size(c.y), 4), values(size(c.w), 5), values(c.w[0], 6));
            let mut want = vec![vec![0.0; size(c.y)], vec![0.0; size(c.x)], dw.clone(), db.clone()];
            each(c, |ix, iw, iy| {
                want[0][iy] += x[ix] * w[iw];
                want[1][ix] += dy[iy] * w[iw];
                want[2][iw] += dy[iy] * x[ix];
            });
            for (i, dy) in dy.iter().enumerate() {
                want[3][i % c.w[0]] += dy;
            }
            let plain = want[0].clone();
            want[0].iter_mut().enumerate().for_each(|(i, y)| *y += b[i % c.w[0]]);
            want.push(plain);
            let (stride, [pad_top, pad_left]) = (c.stride, c.pad);
            check(&want, |r| {
                let (x, w, bias) = (r.act(c.x, &x), r.act(c.w, &w), r.act([c.w[0]], &b));
                let (y, plain, dx) = (r.out(c.y), r.out(c.y), r.out(c.x));
                let (dy, dw, db) = (r.act(c.y, &dy), r.acc(c.w, &dw), r.acc([c.w[0]], &db));
                let (x, w, dy) = (x.view(), w.view(), dy.view());
                for (bias, y) in [(Some(bias.view()), &y), (None, &plain)] {
                    let s = Conv2dFwd { x, w, bias, y: y.out(), stride, pad_top, pad_left };
                    r.cpu.conv2d_fwd(S, &s).unwrap();
                }
                let s = Conv2dBwdData { dy, w, dx: dx.out(), stride, pad_top, pad_left };
                r.cpu.conv2d_bwd_data(S, &s).unwrap();
                let (dw_acc, db_acc) = (dw.acc(), Some(db.acc()));
                let s = Conv2dBwdWeight { x, dy, dw: dw_acc, db: db_acc, stride, pad_top, pad_left };
                r.cpu.conv2d_bwd_weight(S, &s).unwrap();
                vec![y, dx, dw, db, plain]
            });
        }
    }

    fn run_fwd(c: Case, x: &[f64], w: &[f64]) -> Vec<f64> {
        let r = Run::f64();
        let (x, w, y) = (r.act(c.x, x), r.act(c.w, w), r.out(c.y));
        let (stride, [pad_top, pad_left]) = (c.stride, c.pad);
        let s = Conv2dFwd { x: x.view(), w: w.view(), bias: None, y: y.out(), stride, pad_top, pad_left };
        r.cpu.conv2d_fwd(S, &s).unwrap();
        r.get(&y)
    }

    #[test]
    fn gradients_match_differences() {
        for c in &cases()[1..4] {
            let (x, w, dy) = (values(size(c.x), 1), values(size(c.w), 2), values(size(c.y), 3));
            let (stride, [pad_top, pad_left]) = (c.stride, c.pad);
            let r = Run::f64();
            let (xt, wt, dyt) = (r.act(c.x, &x), r.act(c.w, &w), r.act(c.y, &dy));
            let (dx, dw) = (r.out(c.x), r.acc(c.w, &vec![0.0; w.len()]));
            let (xv, wv, dyv) = (xt.view(), wt.view(), dyt.view());
            let s = Conv2dBwdData { dy: dyv, w: wv, dx: dx.out(), stride, pad_top, pad_left };
            r.cpu.conv2d_bwd_data(S, &s).unwrap();
            let s = Conv2dBwdWeight { x: xv, dy: dyv, dw: dw.acc(), db: None, stride, pad_top, pad_left };
            r.cpu.conv2d_bwd_weight(S, &s).unwrap();
            check_gradients(&[&x, &w], &[&r.get(&dx), &r.get(&dw)], |v| {
                inner(&run_fwd(*c, &v[0], &v[1]), &dy)
            });
        }
    }

    #[test]
    fn wrong_shapes_are_named() {
        let r = Run::new(Precision::F32, 1);
        let (x, w, y) = (r.out([1, 4, 4, 3]), r.out([2, 3, 3, 4]), r.out([1, 4, 4, 2]));
        let (stride, pad_top, pad_left, bias) = (1, 1, 1, None);
        let s = Conv2dFwd { x: x.view(), w: w.view(), bias, y: y.out(), stride, pad_top, pad_left };
        let want = "conv2d_fwd: argument `w` is [2, 3, 3, 4], wanted [2, 3, 3, 3]";
        assert_eq!(r.cpu.conv2d_fwd(S, &s).unwrap_err().to_string(), want);
        let w = r.out([2, 3, 3, 3]);
        let s = Conv2dFwd { w: w.view(), stride: 0, ..s };
        let want = "conv2d_fwd: argument `stride` is 0, wanted at least 1";
        assert_eq!(r.cpu.conv2d_fwd(S, &s).unwrap_err().to_string(), want);
    }
}
