//! Cross-entropy of a linear layer. Logits exist for one tile of rows and vocabulary at a time; rows without
//! a target take no part.

use std::ops::Range;

use num_traits::{Float, One, Zero};
use rayon::prelude::*;

use super::workspace::{acc_size, block, is_narrow, no_workspace, per_thread, together};
use super::*;

/// Rows of a tile.
const ROWS: usize = 256;
/// Vocabulary of a tile.
const VOCAB: usize = 2048;
/// Partial gradients of a block of rows: each takes the tiles of its part of the vocabulary in order.
const PARTS: usize = 16;
/// Elements that are noted of a row and a tile.
const NOTES: usize = 3;

/// What a call takes at most: every row may be supervised.
struct Most {
    rows: usize,
    cols: usize,
    vocab: usize,
    act: DType,
}

impl Most {
    fn new(x: &In, w: &In) -> Self {
        Most { rows: x.dims.rows(), cols: x.dims.cols(), vocab: w.dims.rows(), act: x.dtype }
    }

    /// Elements of the packed rows.
    fn packed(&self) -> usize {
        self.rows.saturating_mul(self.cols)
    }

    /// Pairs of a tile of the vocabulary and a block of rows.
    fn tiles(&self) -> usize {
        self.vocab.div_ceil(VOCAB).saturating_mul(self.rows.div_ceil(ROWS))
    }

    /// Elements of what the forward notes of each row and tile.
    fn notes(&self) -> usize {
        self.vocab.div_ceil(VOCAB).saturating_mul(self.rows).saturating_mul(NOTES)
    }

    /// Elements of the widened weights and of the logits of a tile.
    fn parts(&self) -> [usize; 2] {
        let vocab = VOCAB.min(self.vocab);
        let weights = if is_narrow(self.act) { vocab.saturating_mul(self.cols) } else { 0 };
        [weights, ROWS.min(self.rows) * vocab]
    }

    /// Vocabulary of a share of the backward.
    fn share(&self) -> usize {
        self.vocab.div_ceil(PARTS).max(ROWS)
    }

    fn shares(&self) -> usize {
        self.vocab.div_ceil(self.share())
    }

    /// Elements of the gradients of a block of rows, share by share.
    fn partial(&self) -> usize {
        self.shares().saturating_mul(ROWS.min(self.rows)).saturating_mul(self.cols)
    }
}

no_workspace!(xent_fwd(XentFwd), xent_bwd(XentBwd));

pub(super) fn linear_xent_fwd_workspace(a: &LinearXentFwd, threads: usize) -> usize {
    let (most, size) = (Most::new(&a.x, &a.w), acc_size(a.x.dtype));
    let tiles = per_thread(threads, size, most.tiles(), most.parts());
    together([block(size, most.packed()), block(size, most.notes()), tiles])
}

pub(super) fn linear_xent_bwd_workspace(a: &LinearXentBwd, threads: usize) -> usize {
    let (most, size) = (Most::new(&a.x, &a.w), acc_size(a.x.dtype));
    if most.cols == 0 {
        return 0;
    }
    let tiles = per_thread(threads, size, most.shares(), most.parts());
    together([block(size, most.packed()), block(size, most.partial()), tiles])
}

pub(super) fn linear_xent_fwd(ws: &Workspace, a: &LinearXentFwd) -> Result<()> {
    by_dtype!("linear_xent_fwd", a.x.dtype, E => fwd::<E>(ws, a))
}

pub(super) fn linear_xent_bwd(ws: &Workspace, a: &LinearXentBwd) -> Result<()> {
    by_dtype!("linear_xent_bwd", a.x.dtype, E => bwd::<E>(ws, a))
}

pub(super) fn xent_fwd(_ws: &Workspace, a: &XentFwd) -> Result<()> {
    by_dtype!("xent_fwd", a.logits.dtype, E => stored_fwd::<E>(a))
}

pub(super) fn xent_bwd(_ws: &Workspace, a: &XentBwd) -> Result<()> {
    by_dtype!("xent_bwd", a.logits.dtype, E => stored_bwd::<E>(a))
}

/// The supervised rows of a call, packed.
struct Packed<'a, E: Elem> {
    /// Where they are in the batch.
    at: Vec<usize>,
    target: Vec<usize>,
    /// `[at.len(), C]`.
    x: Scratch<'a, E::Acc>,
    w: Rows<'a, E>,
}

impl<'a, E: Elem> Packed<'a, E> {
    fn new(ws: &'a Workspace, op: &'static str, x: &In, w: &In<'a>, target: &In) -> Result<Self> {
        let (x, w) = (rows::<E>(op, "x", x)?, rows::<E>(op, "w", w)?);
        if w.cols != x.cols {
            return Err(Error::arg(op, "w", format!("{} columns", w.cols), format!("{} columns", x.cols)));
        }
        expect(op, "target", target, x.rows)?;
        let target = flat::<i32>(op, "target", target)?;
        if let Some(t) = target.iter().find(|&&t| t >= 0 && t as usize >= w.rows) {
            return Err(Error::arg(op, "target", t, format!("less than the {} rows of w", w.rows)));
        }
        let at: Vec<usize> = (0..x.rows).filter(|&n| target[n] >= 0).collect();
        let mut packed = ws.scratch::<E::Acc>(x.rows * x.cols)?;
        packed.par_chunks_mut(x.cols.max(1)).zip(&at).with_min_len(64).for_each(|(out, &n)| {
            for (o, &v) in out.iter_mut().zip(x.row(n)) {
                *o = v.up();
            }
        });
        let target = at.iter().map(|&n| target[n] as usize).collect();
        Ok(Packed { at, target, x: packed, w })
    }

    fn cols(&self) -> usize {
        self.w.cols
    }

    /// Packed rows `r`.
    fn rows(&self, r: &Range<usize>) -> Mat<'_, E::Acc> {
        let c = self.cols();
        Mat::new(&self.x[r.start * c..r.end * c], r.len(), c, c)
    }

    /// Rows `v` of the weights, widened into `buf` unless they are stored wide.
    fn weights<'b>(&'b self, v: &Range<usize>, buf: &'b mut [E::Acc]) -> Mat<'b, E::Acc> {
        let (c, ld) = (self.cols(), self.w.ld);
        if E::DTYPE == E::Acc::DTYPE {
            let end = (v.end - 1) * ld + c;
            return Mat::new(bytemuck::cast_slice(&self.w.data()[v.start * ld..end]), v.len(), c, ld);
        }
        for (i, out) in v.clone().zip(buf.chunks_mut(c.max(1))) {
            for (o, &w) in out.iter_mut().zip(self.w.row(i)) {
                *o = w.up();
            }
        }
        Mat::new(buf, v.len(), c, c)
    }
}

/// What one tile says of a row: the largest logit, the sum of exponentials below it, and the logit of the
/// row's target if it is in the tile, else 0; kept as [`NOTES`] elements.
#[derive(Clone, Copy)]
struct Part<R> {
    max: R,
    sum: R,
    hit: R,
}

impl<R: Real> Part<R> {
    fn from_notes(n: &[R]) -> Self {
        Part { max: n[0], sum: n[1], hit: n[2] }
    }

    fn none() -> Self {
        Part { max: R::neg_infinity(), sum: R::zero(), hit: R::zero() }
    }

    fn join(self, o: Self) -> Self {
        let max = if o.max > self.max { o.max } else { self.max };
        let scaled = |p: &Self| if p.max == max { p.sum } else { p.sum * (p.max - max).exp() };
        Part { max, sum: scaled(&self) + scaled(&o), hit: self.hit + o.hit }
    }
}

fn fwd<E: Elem>(ws: &Workspace, a: &LinearXentFwd) -> Result<()> {
    let op = "linear_xent_fwd";
    let p = Packed::<E>::new(ws, op, &a.x, &a.w, &a.target)?;
    let scale = scalar::<E::Acc>(op, "scale", &a.scale)?;
    expect(op, "lse", &a.lse.0, a.x.dims.rows())?;
    expect(op, "loss", &a.loss.0, 1)?;
    let lse = flat_mut::<E::Acc>(op, "lse", &a.lse.0)?;
    let loss = flat_mut::<E::Acc>(op, "loss", &a.loss.0)?;
    lse.fill(E::Acc::zero());

    let blocks = chunks(p.at.len(), ROWS);
    let tiles = chunks(p.w.rows, VOCAB);
    let most = Most::new(&a.x, &a.w);
    let n = p.at.len();
    let mut notes = ws.scratch::<E::Acc>(most.notes())?;
    let scratch = ws.per_thread::<E::Acc, 2>(most.tiles(), most.parts())?;
    let tasks: Vec<_> = notes
        .chunks_mut((n * NOTES).max(1))
        .zip(&tiles)
        .flat_map(|(notes, v)| {
            notes.chunks_mut(ROWS * NOTES).zip(&blocks).map(move |(notes, r)| (v, r, notes))
        })
        .collect();
    tasks.into_par_iter().for_each(|(v, r, notes)| tile_fwd(&scratch, &p, r, v, notes));

    let mut losses = Vec::with_capacity(n);
    for (i, &at) in p.at.iter().enumerate() {
        let note = |t: usize| Part::from_notes(&notes[(t * n + i) * NOTES..][..NOTES]);
        let all = (0..tiles.len()).map(note).fold(Part::none(), Part::join);
        lse[at] = all.max + all.sum.ln();
        losses.push(lse[at] - all.hit);
    }
    // Without a supervised row the scale may be anything.
    loss[0] = if losses.is_empty() { E::Acc::zero() } else { scale * lanes::sum(&losses, |l| l) };
    Ok(())
}

/// Notes what a tile says of its rows.
fn tile_fwd<E: Elem>(
    scratch: &PerThread<E::Acc, 2>,
    p: &Packed<E>,
    r: &Range<usize>,
    v: &Range<usize>,
    notes: &mut [E::Acc],
) {
    let mut local = scratch.take();
    let [buf, logits] = local.parts();
    gemm(p.rows(r), p.weights(v, buf).t(), logits, v.len(), false);
    pulp::Arch::new().dispatch(|| {
        let rows = notes.chunks_mut(NOTES).zip(logits.chunks_mut(v.len()));
        for ((note, l), t) in rows.zip(&p.target[r.clone()]) {
            note[2] = if v.contains(t) { l[t - v.start] } else { E::Acc::zero() };
            note[0] = lanes::max(l);
            note[1] = lanes::exp_sum(l, note[0]);
        }
    });
}

/// Rows `v` of the gradient of the weights, if wanted, and the part they contribute to `dx`.
struct Share<'a, R> {
    v: Range<usize>,
    dw: Option<&'a mut [R]>,
    dx: &'a mut [R],
}

fn bwd<E: Elem>(ws: &Workspace, a: &LinearXentBwd) -> Result<()> {
    let op = "linear_xent_bwd";
    let p = Packed::<E>::new(ws, op, &a.x, &a.w, &a.target)?;
    let g = scalar::<E::Acc>(op, "scale", &a.scale)? * scalar::<E::Acc>(op, "g", &a.g)?;
    let (n, c) = (a.x.dims.rows(), p.cols());
    expect(op, "lse", &a.lse, n)?;
    let lse = flat::<E::Acc>(op, "lse", &a.lse)?;
    let lse: Vec<_> = p.at.iter().map(|&n| lse[n]).collect();
    expect_rows(op, "dx", &a.dx.0, n, c)?;
    let dx = rows_mut::<E>(op, "dx", &a.dx.0)?;
    let mut dw = match a.dw {
        Some(dw) => {
            expect_rows(op, "dw", &dw.0, p.w.rows, c)?;
            Some(flat_mut::<E::Acc>(op, "dw", &dw.0)?)
        }
        None => None,
    };
    par_for(n, ROWS, |r| {
        for n in r {
            // SAFETY: chunks do not share rows.
            unsafe { dx.row(n) }.fill(E::zeroed());
        }
    });
    if c == 0 {
        return Ok(());
    }

    let most = Most::new(&a.x, &a.w);
    let size = most.share();
    let shares = chunks(p.w.rows, size);
    let mut partial = ws.scratch::<E::Acc>(most.partial())?;
    let scratch = ws.per_thread::<E::Acc, 2>(most.shares(), most.parts())?;
    for r in chunks(p.at.len(), ROWS) {
        let partial = &mut partial[..shares.len() * r.len() * c];
        let mut dws = dw.as_mut().map(|dw| dw.chunks_mut(size * c));
        let tasks: Vec<_> = shares
            .iter()
            .zip(partial.chunks_mut(r.len() * c))
            .map(|(v, dx)| Share { v: v.clone(), dw: dws.as_mut().and_then(Iterator::next), dx })
            .collect();
        tasks.into_par_iter().for_each(|share| share_bwd(&scratch, &p, &r, &lse, g, share));
        par_for(r.len(), 16, |rows| {
            for i in rows {
                // SAFETY: packed rows are distinct rows of dx: one thread a row.
                let out = unsafe { dx.row(p.at[r.start + i]) };
                add_parts(out, partial.chunks(r.len() * c).map(|part| &part[i * c..(i + 1) * c]));
            }
        });
    }
    Ok(())
}

/// `out = sum of parts`, rounded once.
fn add_parts<'a, E: Elem>(out: &mut [E], mut parts: impl Iterator<Item = &'a [E::Acc]>) {
    let mut sum = parts.next().map_or_else(|| vec![E::Acc::zero(); out.len()], <[_]>::to_vec);
    for part in parts {
        for (s, &v) in sum.iter_mut().zip(part) {
            *s += v;
        }
    }
    for (o, s) in out.iter_mut().zip(sum) {
        *o = E::down(s);
    }
}

/// Gradients of a block of rows from one part of the vocabulary: `dx` overwritten, `dw` added to.
fn share_bwd<E: Elem>(
    scratch: &PerThread<E::Acc, 2>,
    p: &Packed<E>,
    r: &Range<usize>,
    lse: &[E::Acc],
    g: E::Acc,
    mut share: Share<E::Acc>,
) {
    let c = p.cols();
    let mut local = scratch.take();
    let [buf, logits] = local.parts();
    for (i, tile) in chunks(share.v.len(), VOCAB).into_iter().enumerate() {
        let v = share.v.start + tile.start..share.v.start + tile.end;
        let (x, w) = (p.rows(r), p.weights(&v, buf));
        gemm(x, w.t(), logits, v.len(), false);
        logit_gradients(logits, &v, &p.target[r.clone()], &lse[r.clone()], g);
        let d = Mat::new(logits, r.len(), v.len(), v.len());
        gemm(d, w, share.dx, c, i > 0);
        if let Some(dw) = &mut share.dw {
            gemm(d.t(), x, &mut dw[tile.start * c..tile.end * c], c, true);
        }
    }
}

/// From logits to `g (softmax - onehot)`.
fn logit_gradients<R: Real>(logits: &mut [R], v: &Range<usize>, target: &[usize], lse: &[R], g: R) {
    pulp::Arch::new().dispatch(|| {
        for ((l, t), &lse) in logits.chunks_mut(v.len()).zip(target).zip(lse) {
            l.iter_mut().for_each(|x| *x = g * (*x - lse).fast_exp());
            if v.contains(t) {
                l[t - v.start] = l[t - v.start] - g;
            }
        }
    });
}

/// Targets and weights of rows of stored logits.
struct Wanted<'a, R> {
    target: &'a [i32],
    weight: Option<&'a [R]>,
}

impl<'a, R: Real> Wanted<'a, R> {
    fn new(op: &'static str, logits: &In, target: &In<'a>, weight: &Option<In<'a>>) -> Result<Self> {
        let (n, v) = (logits.dims.rows(), logits.dims.cols());
        expect(op, "target", target, n)?;
        let target = flat::<i32>(op, "target", target)?;
        if let Some(t) = target.iter().find(|&&t| t >= 0 && t as usize >= v) {
            return Err(Error::arg(op, "target", t, format!("less than the {v} columns of logits")));
        }
        let weight = weight.as_ref().map(|w| {
            expect(op, "weight", w, n)?;
            flat::<R>(op, "weight", w)
        });
        Ok(Wanted { target, weight: weight.transpose()? })
    }

    /// Target and weight of row `n`, unless it is ignored.
    fn of(&self, n: usize) -> Option<(usize, R)> {
        let t = usize::try_from(self.target[n]).ok()?;
        Some((t, self.weight.map_or(R::one(), |w| w[n])))
    }
}

/// Log-sum-exp of a row; -infinity if all logits are.
fn log_sum_exp<E: Elem>(row: &[E]) -> E::Acc {
    let largest = |a: E::Acc, x: &E| if x.up() > a { x.up() } else { a };
    let max = row.iter().fold(E::Acc::neg_infinity(), largest);
    let shift = if max == E::Acc::neg_infinity() { E::Acc::zero() } else { max };
    shift + lanes::sum(row, |x: E| (x.up() - shift).exp()).ln()
}

fn stored_fwd<E: Elem>(a: &XentFwd) -> Result<()> {
    let op = "xent_fwd";
    let logits = rows::<E>(op, "logits", &a.logits)?;
    let wanted = Wanted::<E::Acc>::new(op, &a.logits, &a.target, &a.weight)?;
    let scale = scalar::<E::Acc>(op, "scale", &a.scale)?;
    expect(op, "lse", &a.lse.0, logits.rows)?;
    expect(op, "loss", &a.loss.0, 1)?;
    let lse = flat_mut::<E::Acc>(op, "lse", &a.lse.0)?;
    let loss = flat_mut::<E::Acc>(op, "loss", &a.loss.0)?;
    lse.par_iter_mut().enumerate().for_each(|(n, lse)| {
        *lse = wanted.of(n).map_or(E::Acc::zero(), |_| log_sum_exp(logits.row(n)));
    });
    let of_row = |n: usize| wanted.of(n).map(|(t, weight)| weight * (lse[n] - logits.row(n)[t].up()));
    let sum = par_sum(logits.rows, ROWS, |r| r.filter_map(of_row).sum());
    // Without a supervised row the scale may be anything.
    if wanted.target.iter().any(|&t| t >= 0) {
        loss[0] += scale * sum;
    }
    Ok(())
}

fn stored_bwd<E: Elem>(a: &XentBwd) -> Result<()> {
    let op = "xent_bwd";
    let (n, v) = (a.logits.dims.rows(), a.logits.dims.cols());
    let wanted = Wanted::<E::Acc>::new(op, &a.logits, &a.target, &a.weight)?;
    let g = scalar::<E::Acc>(op, "g", &a.g)? * scalar::<E::Acc>(op, "scale", &a.scale)?;
    expect(op, "lse", &a.lse, n)?;
    let lse = flat::<E::Acc>(op, "lse", &a.lse)?;
    expect_rows(op, "dlogits", &a.dlogits.0, n, v)?;
    let (logits, dlogits) =
        (rows::<E>(op, "logits", &a.logits)?, rows_mut::<E>(op, "dlogits", &a.dlogits.0)?);
    let at = |v: &In| v.buf.addr() + v.off;
    let in_place = at(&a.logits) == at(&a.dlogits.0);
    par_for(n, chunk_rows(v), |r| {
        for n in r {
            // SAFETY: chunks do not share rows.
            let out = unsafe { dlogits.row(n) };
            let Some((t, weight)) = wanted.of(n) else {
                out.fill(E::zeroed());
                continue;
            };
            let gradient = |i: usize, x: E| {
                let hit = if i == t { E::Acc::one() } else { E::Acc::zero() };
                E::down(g * weight * ((x.up() - lse[n]).exp() - hit))
            };
            if in_place {
                // The logits are looked at through `out` only.
                out.iter_mut().enumerate().for_each(|(i, d)| *d = gradient(i, *d));
            } else {
                out.iter_mut().zip(logits.row(n)).enumerate().for_each(|(i, (d, x))| *d = gradient(i, *x));
            }
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing_b::*;
    use super::*;

    /// N, C, V and how many rows are supervised: one in so many.
    type Case = (usize, usize, usize, usize);
    const SMALL: [Case; 3] = [(1, 1, 1, 1), (7, 3, 13, 1), (11, 5, 31, 3)];
    const LARGE: [Case; 2] = [(2 * ROWS + 3, 7, VOCAB + 5, 2), (37, 3, PARTS * VOCAB + 1234, 5)];

    /// x, w, target, scale, g and the dw that is added to.
    fn args((n, c, v, every): Case) -> Vec<Arg> {
        let target = (0..n).map(|i| if i % every == 0 { (i * 7919 % v) as f64 } else { -1.0 }).collect();
        vec![
            act([n, c], normal(1, n * c)),
            act([v, c], normal(2, v * c)),
            int([n], target),
            acc([1], vec![0.125]),
            acc([1], vec![1.5]),
            acc([v, c], vec![0.0; v * c]),
        ]
    }

    /// lse and loss.
    fn run_fwd(dev: &Cpu, p: Precision, t: &[Tensor]) -> Result<Vec<Tensor>> {
        let (lse, loss) = (out(dev, p.acc, [t[0].dims().rows()]), out(dev, p.acc, [1]));
        let a = LinearXentFwd {
            x: t[0].view(),
            w: t[1].view(),
            target: t[2].view(),
            scale: t[3].view(),
            lse: lse.out(),
            loss: loss.out(),
        };
        dev.linear_xent_fwd(S, &a)?;
        Ok(vec![lse, loss])
    }

    /// dx and dw; dx is written into columns of a wider tensor.
    fn run_bwd(dev: &Cpu, p: Precision, t: &[Tensor]) -> Result<Vec<Tensor>> {
        let lse = &run_fwd(dev, p, t)?[0];
        let (n, c) = (t[0].dims().rows(), t[0].dims().cols());
        let dx = out(dev, p.act, [n, c + 2]).columns(1, c)?;
        let a = LinearXentBwd {
            x: t[0].view(),
            w: t[1].view(),
            target: t[2].view(),
            scale: t[3].view(),
            lse: lse.view(),
            g: t[4].view(),
            dx: dx.out(),
            dw: Some(t[5].acc()),
        };
        dev.linear_xent_bwd(S, &a)?;
        let alone = out(dev, p.act, [n, c]);
        dev.linear_xent_bwd(S, &LinearXentBwd { dx: alone.out(), dw: None, ..a })?;
        assert_eq!(alone.to_f64(dev)?, dx.to_f64(dev)?);
        Ok(vec![dx, t[5].clone()])
    }

    fn naive((n, c, v, _): Case, t: &[Vec<f64>]) -> [Vec<f64>; 4] {
        let (mut lse, mut loss) = (vec![0.0; n], vec![0.0]);
        let (mut dx, mut dw) = (vec![0.0; n * c], t[5].clone());
        for i in (0..n).filter(|&i| t[2][i] >= 0.0) {
            let dot = |j: usize| (0..c).map(|k| t[0][i * c + k] * t[1][j * c + k]).sum::<f64>();
            let logits: Vec<f64> = (0..v).map(dot).collect();
            lse[i] = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
            loss[0] += t[3][0] * (lse[i] - logits[t[2][i] as usize]);
            for j in 0..v {
                let hit = if j == t[2][i] as usize { 1.0 } else { 0.0 };
                let d = t[3][0] * t[4][0] * ((logits[j] - lse[i]).exp() - hit);
                for k in 0..c {
                    dx[i * c + k] += d * t[1][j * c + k];
                    dw[j * c + k] += d * t[0][i * c + k];
                }
            }
        }
        [lse, loss, dx, dw]
    }

    #[test]
    fn forward_and_backward_match_a_naive_loop() {
        for case in SMALL[1..].iter().chain(&LARGE) {
            check(&args(*case), |t| naive(*case, t)[..2].to_vec(), run_fwd);
            check(&args(*case), |t| naive(*case, t)[2..].to_vec(), run_bwd);
        }
    }

    #[test]
    fn backward_matches_finite_differences() {
        for case in SMALL {
            let loss =
                |dev: &Cpu, t: &[Tensor]| Ok(1.5 * run_fwd(dev, Precision::F64, t)?[1].to_f64(dev)?[0]);
            check_grad(&args(case), &[0, 1], loss, |dev, t| run_bwd(dev, Precision::F64, t));
        }
    }

    #[test]
    fn nothing_supervised_costs_nothing() {
        let mut args = args(SMALL[1]);
        args[2].2.fill(-1.0);
        args[3].2[0] = f64::INFINITY;
        check(&args, |_| vec![vec![0.0; 7], vec![0.0]], run_fwd);
        check(&args, |_| vec![vec![0.0; 21], vec![0.0; 39]], run_bwd);
    }

    #[test]
    fn large_logits_stay_finite() {
        let mut args = args(SMALL[2]);
        args[0].2.iter_mut().for_each(|x| *x *= 1e4);
        let dev = Cpu::poisoned(2).unwrap();
        let t = tensors(&dev, Precision::F32, &args);
        let results =
            [run_fwd(&dev, Precision::F32, &t).unwrap(), run_bwd(&dev, Precision::F32, &t).unwrap()];
        for v in read(&dev, &results.concat()) {
            assert!(v.iter().all(|x| x.is_finite()));
        }
    }

    #[test]
    fn a_target_beyond_the_vocabulary_is_an_error() {
        let mut args = args(SMALL[1]);
        args[2].2[3] = 13.0;
        let dev = Cpu::poisoned(2).unwrap();
        let e = run_fwd(&dev, Precision::F32, &tensors(&dev, Precision::F32, &args)).unwrap_err();
        assert_eq!(
            e.to_string(),
            "linear_xent_fwd: argument `target` is 13, wanted less than the 13 rows of w"
        );
    }

    /// Logits, target, weight, scale, g and the loss that is added to; every third row is ignored.
    fn stored(n: usize, v: usize) -> Vec<Arg> {
        let target = (0..n).map(|i| if i % 3 == 1 { -1.0 } else { (i * 7919 % v) as f64 }).collect();
        vec![
            act([n, v], normal(1, n * v)),
            int([n], target),
            acc([n], normal(2, n)),
            acc([1], vec![0.125]),
            acc([1], vec![1.5]),
            acc([1], vec![0.25]),
        ]
    }

    const STORED: [(usize, usize); 4] = [(1, 1), (7, 13), (40, 3), (5, 3001)];

    fn stored_forward(dev: &Cpu, p: Precision, t: &[Tensor], weight: bool) -> Result<Vec<Tensor>> {
        let lse = out(dev, p.acc, [t[0].dims().rows()]);
        let a = XentFwd {
            logits: t[0].view(),
            target: t[1].view(),
            weight: weight.then(|| t[2].view()),
            scale: t[3].view(),
            lse: lse.out(),
            loss: t[5].acc(),
        };
        dev.xent_fwd(S, &a)?;
        Ok(vec![lse, t[5].clone()])
    }

    /// The gradient, elsewhere and in place.
    fn stored_backward(dev: &Cpu, p: Precision, t: &[Tensor], weight: bool) -> Result<Vec<Tensor>> {
        let lse = &stored_forward(dev, p, t, weight)?[0];
        let (n, v) = (t[0].dims().rows(), t[0].dims().cols());
        let d = out(dev, p.act, [n, v + 2]).columns(1, v)?;
        let a = XentBwd {
            logits: t[0].view(),
            target: t[1].view(),
            weight: weight.then(|| t[2].view()),
            scale: t[3].view(),
            lse: lse.view(),
            g: t[4].view(),
            dlogits: d.out(),
        };
        dev.xent_bwd(S, &a)?;
        dev.xent_bwd(S, &XentBwd { dlogits: t[0].out(), ..a })?;
        assert_eq!(t[0].to_f64(dev)?, d.to_f64(dev)?);
        Ok(vec![d])
    }

    #[test]
    fn stored_logits_match_a_naive_loop_and_differences() {
        for ((n, v), weight) in STORED.into_iter().flat_map(|s| [(s, true), (s, false)]) {
            let naive = |t: &[Vec<f64>]| {
                let (mut lse, mut loss, mut d) = (vec![0.0; n], vec![t[5][0]], vec![0.0; n * v]);
                for i in (0..n).filter(|&i| t[1][i] >= 0.0) {
                    let row = &t[0][i * v..(i + 1) * v];
                    let (w, hit) = (if weight { t[2][i] } else { 1.0 }, t[1][i] as usize);
                    lse[i] = row.iter().map(|l| l.exp()).sum::<f64>().ln();
                    loss[0] += t[3][0] * w * (lse[i] - row[hit]);
                    for (j, l) in row.iter().enumerate() {
                        let p = (l - lse[i]).exp() - if j == hit { 1.0 } else { 0.0 };
                        d[i * v + j] = t[4][0] * t[3][0] * w * p;
                    }
                }
                [lse, loss, d]
            };
            check(&stored(n, v), |t| naive(t)[..2].to_vec(), |dev, p, t| stored_forward(dev, p, t, weight));
            check(&stored(n, v), |t| naive(t)[2..].to_vec(), |dev, p, t| stored_backward(dev, p, t, weight));
        }
        let loss = |dev: &Cpu, t: &[Tensor]| {
            let before = t[5].to_f64(dev)?[0];
            Ok(1.5 * (stored_forward(dev, Precision::F64, t, true)?[1].to_f64(dev)?[0] - before))
        };
        check_grad(&stored(7, 13), &[0], loss, |dev, t| stored_backward(dev, Precision::F64, t, true));
    }

    #[test]
    fn stored_logits_may_be_anything_but_out_of_range_targets() {
        let dev = Cpu::poisoned(2).unwrap();
        let run = |change: fn(&mut Vec<Arg>)| {
            let mut args = stored(3, 4);
            change(&mut args);
            stored_forward(&dev, Precision::F32, &tensors(&dev, Precision::F32, &args), false)
        };
        // Nothing supervised leaves the loss, whatever the scale.
        let none = run(|a| {
            a[1].2.fill(-7.0);
            a[3].2[0] = f64::INFINITY;
        });
        assert_eq!(read(&dev, &none.unwrap()), [vec![0.0; 3], vec![0.25]]);
        let lse = |r: Result<Vec<Tensor>>| read(&dev, &r.unwrap())[0][0];
        assert_eq!(lse(run(|a| a[0].2.fill(f64::NEG_INFINITY))), f64::NEG_INFINITY);
        assert!(lse(run(|a| a[0].2[1] = f64::NEG_INFINITY)).is_finite());
        assert!(lse(run(|a| a[0].2[1] = f64::NAN)).is_nan());
        assert!((lse(run(|a| a[0].2.fill(1e4))) - 1e4 - 4f64.ln()).abs() < 1e-2);
        let e = run(|a| a[1].2[2] = 4.0).unwrap_err().to_string();
        assert_eq!(e, "xent_fwd: argument `target` is 4, wanted less than the 4 columns of logits");
    }
}
