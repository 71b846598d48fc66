//! The quantizer: scores `S = z E^T` exist one tile at a time, in every sweep the same tiles formed by the
//! same product, so that a score has the same bits wherever it is formed. The best code is kept out of every
//! cancelling sum; docs/quantizer.md derives the formulas.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use num_traits::{Float, One, Zero};
use rayon::prelude::*;

use super::workspace::{acc_size, block, no_workspace, per_thread, together};
use super::*;

no_workspace!(ibq_losses(IbqLosses), vq_losses(VqLosses), vq_bwd(VqBwd));

/// Tokens of a tile.
const ROWS: usize = 64;
/// Elements summed side by side.
const LANES: usize = 16;
/// Exponents below this give 0 in every type; NaN and -inf are replaced by it.
const FLOOR: f64 = -1000.0;

/// Codes of a tile: a function of K alone.
fn tile_cols(k: usize) -> usize {
    k.div_ceil(8).next_multiple_of(LANES).clamp(64, 1024)
}

/// Tokens, codes and how they are cut into tiles.
struct Sweep<'a, E: Elem> {
    z: Rows<'a, E>,
    e: Rows<'a, E>,
    d: usize,
    cols: usize,
}

/// Elements of the parts of a [`Tile`].
fn tile_parts(k: usize, d: usize) -> [usize; 3] {
    [ROWS.saturating_mul(d), tile_cols(k).saturating_mul(d), ROWS.saturating_mul(tile_cols(k))]
}

/// The same, gradients of scores, and the sums of a block of rows.
fn bwd_parts(k: usize, d: usize) -> [usize; 5] {
    let [z, e, s] = tile_parts(k, d);
    [z, e, s, s, z]
}

/// Bytes of the tiles of `tasks` tasks.
fn tiles_bytes(z: &In, e: &In, threads: usize, tasks: usize) -> usize {
    per_thread(threads, acc_size(z.dtype), tasks, tile_parts(e.dims.rows(), z.dims.cols()))
}

pub(super) fn nearest_workspace(a: &Nearest, threads: usize) -> usize {
    let half = if a.metric == Metric::L2 { block(acc_size(a.z.dtype), a.e.dims.rows()) } else { 0 };
    together([half, tiles_bytes(&a.z, &a.e, threads, a.z.dims.rows().div_ceil(ROWS))])
}

pub(super) fn ibq_rows_workspace(a: &IbqRows, threads: usize) -> usize {
    tiles_bytes(&a.z, &a.e, threads, a.z.dims.rows().div_ceil(ROWS))
}

pub(super) fn ibq_cols_workspace(a: &IbqCols, threads: usize) -> usize {
    let k = a.e.dims.rows();
    tiles_bytes(&a.z, &a.e, threads, k.div_ceil(tile_cols(k)))
}

pub(super) fn ibq_bwd_workspace(a: &IbqBwd, threads: usize) -> usize {
    let (m, k, d, size) = (a.z.dims.rows(), a.e.dims.rows(), a.z.dims.cols(), acc_size(a.z.dtype));
    let tasks = m.div_ceil(ROWS).max(k.div_ceil(tile_cols(k)));
    together([block(size, m.saturating_mul(d)), per_thread(threads, size, tasks, bwd_parts(k, d))])
}

/// Scratch of one task.
struct Tile<'a, R> {
    z: &'a mut [R],
    e: &'a mut [R],
    s: &'a mut [R],
}

impl<'a, E: Elem> Sweep<'a, E> {
    fn new(op: &'static str, z: &In<'a>, e: &In<'a>) -> Result<Self> {
        let (z, e) = (rows::<E>(op, "z", z)?, rows::<E>(op, "e", e)?);
        if z.cols != e.cols {
            return Err(Error::arg(op, "e", format!("codes of {} dimensions", e.cols), z.cols));
        }
        if e.rows == 0 || e.rows > i32::MAX as usize {
            return Err(Error::arg(op, "e", format!("{} codes", e.rows), "1 to 2^31 - 1"));
        }
        Ok(Sweep { z, e, d: z.cols, cols: tile_cols(e.rows) })
    }

    /// Scratch for the tiles of `tasks` tasks.
    fn tiles<'w>(&self, ws: &'w Workspace, tasks: usize) -> Result<PerThread<'w, E::Acc, 3>> {
        ws.per_thread(tasks, tile_parts(self.e.rows, self.d))
    }

    fn row_blocks(&self) -> Vec<Range<usize>> {
        chunks(self.z.rows, ROWS)
    }

    fn col_tiles(&self) -> Vec<Range<usize>> {
        chunks(self.e.rows, self.cols)
    }

    fn load_z(&self, r: &Range<usize>, t: &mut Tile<'_, E::Acc>) {
        widen(&self.z, r, t.z);
    }

    fn load_e(&self, c: &Range<usize>, t: &mut Tile<'_, E::Acc>) {
        widen(&self.e, c, t.e);
    }

    /// Scores of the loaded rows and codes, `[r, cols]`; columns past the last code are -inf.
    fn scores(&self, r: &Range<usize>, c: &Range<usize>, t: &mut Tile<'_, E::Acc>) {
        let z = Mat::new(t.z, r.len(), self.d, self.d);
        let e = Mat::new(t.e, c.len(), self.d, self.d);
        gemm(z, e.t(), t.s, self.cols, false);
        if c.len() < self.cols {
            for row in t.s.chunks_mut(self.cols).take(r.len()) {
                row[c.len()..].fill(E::Acc::neg_infinity());
            }
        }
    }
}

/// Copies rows into a dense buffer of the accumulator type.
fn widen<E: Elem>(x: &Rows<E>, r: &Range<usize>, to: &mut [E::Acc]) {
    for (i, out) in r.clone().zip(to.chunks_mut(x.cols.max(1))) {
        for (o, &v) in out.iter_mut().zip(x.row(i)) {
            *o = v.up();
        }
    }
}

/// `x` if it is above the floor, else the floor: also for NaN.
#[inline(always)]
fn above_floor<R: Real>(x: R) -> R {
    let floor = R::of(FLOOR);
    if x > floor { x } else { floor }
}

#[inline(always)]
fn sum_lanes<R: Real>(lanes: [R; LANES]) -> R {
    lanes.iter().fold(R::zero(), |a, &b| a + b)
}

/// First position of the largest number of a row and that number; (0, -inf) if there is none.
fn best<R: Real>(row: &[R]) -> (usize, R) {
    let max = pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            let mut lanes = [R::neg_infinity(); LANES];
            for c in row.chunks_exact(LANES) {
                for l in 0..LANES {
                    lanes[l] = if c[l] > lanes[l] { c[l] } else { lanes[l] };
                }
            }
            let mut max = R::neg_infinity();
            for &v in lanes.iter().chain(row.chunks_exact(LANES).remainder()) {
                max = if v > max { v } else { max };
            }
            max
        },
    );
    (row.iter().position(|&v| v == max).unwrap_or(0), max)
}

pub(super) fn nearest(ws: &Workspace, a: &Nearest) -> Result<()> {
    by_dtype!("nearest", a.z.dtype, E => nearest_of::<E>(ws, a))
}

fn nearest_of<E: Elem>(ws: &Workspace, a: &Nearest) -> Result<()> {
    let sweep = Sweep::<E>::new("nearest", &a.z, &a.e)?;
    expect("nearest", "idx", &a.idx.0, sweep.z.rows)?;
    let bad = a.bad.as_ref().map(|bad| one_mut::<E::Acc>("nearest", "bad", &bad.0)).transpose()?;
    let idx = flat_mut::<i32>("nearest", "idx", &a.idx.0)?;
    // -|z - e|^2 / 2 = z . e - |e|^2 / 2 - |z|^2 / 2, and |z| is the same for all codes.
    let bad_rows = AtomicUsize::new(0);
    let mut half = ws.scratch::<E::Acc>(if a.metric == Metric::L2 { sweep.e.rows } else { 0 })?;
    for (j, h) in half.iter_mut().enumerate() {
        *h = sweep.e.row(j).iter().map(|&v| v.up() * v.up()).sum::<E::Acc>() * E::Acc::of(0.5);
    }
    let half = &half[..];
    let tiles = sweep.tiles(ws, sweep.z.rows.div_ceil(ROWS))?;
    idx.par_chunks_mut(ROWS).zip(sweep.row_blocks()).for_each(|(idx, r)| {
        let mut local = tiles.take();
        let [z, e, s] = local.parts();
        let mut t = Tile { z, e, s };
        sweep.load_z(&r, &mut t);
        let mut top = [E::Acc::neg_infinity(); ROWS];
        idx.fill(0);
        for c in sweep.col_tiles() {
            sweep.load_e(&c, &mut t);
            sweep.scores(&r, &c, &mut t);
            for (i, row) in t.s.chunks_mut(sweep.cols).take(r.len()).enumerate() {
                for (s, &h) in row.iter_mut().zip(half.get(c.clone()).unwrap_or(&[])) {
                    *s = *s - h;
                }
                let (j, v) = best(row);
                if v > top[i] {
                    top[i] = v;
                    idx[i] = (c.start + j) as i32;
                }
            }
        }
        bad_rows.fetch_add(top[..r.len()].iter().filter(|v| !v.is_finite()).count(), Ordering::Relaxed);
    });
    if let Some(bad) = bad {
        *bad += E::Acc::of(bad_rows.into_inner() as f64);
    }
    Ok(())
}

/// A one-element output.
fn one_mut<'a, R: Element>(op: &'static str, arg: &'static str, v: &In<'a>) -> Result<&'a mut R> {
    expect(op, arg, v, 1)?;
    Ok(&mut flat_mut::<R>(op, arg, v)?[0])
}

/// Running statistics of one row, the best code so far left out of the sums.
#[derive(Clone, Copy)]
struct RowStats<R> {
    best: usize,
    max: R,
    rest_p: R,
    rest_q: R,
    /// sum over the rest of e^x x.
    weighted: R,
}

impl<R: Real> RowStats<R> {
    fn new() -> Self {
        let (max, zero) = (R::neg_infinity(), R::zero());
        RowStats { best: 0, max, rest_p: zero, rest_q: zero, weighted: zero }
    }

    /// Takes in one row of scores; overwrites the score of a new best code. Only with `ENTROPY` are there sums at the
    /// temperature of the entropies.
    fn update<const ENTROPY: bool>(&mut self, row: &mut [R], first: usize, inv_t: R) {
        let (j, top) = best(row);
        if top > self.max {
            if self.max > R::neg_infinity() {
                // The old best joins the rest, and everything is rescaled to the new maximum.
                let gap = top - self.max;
                let (fp, x) = (above_floor(-gap).fast_exp(), above_floor(-gap * inv_t));
                let fq = x.fast_exp();
                self.rest_p = (self.rest_p + R::one()) * fp;
                self.weighted = fq * (self.weighted + x * (self.rest_q + R::one()));
                self.rest_q = (self.rest_q + R::one()) * fq;
            }
            (self.best, self.max) = (first + j, top);
            row[j] = R::neg_infinity();
        }
        let max = self.max;
        let (p, q, w) = pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                let (mut p, mut q, mut w) = ([R::zero(); LANES], [R::zero(); LANES], [R::zero(); LANES]);
                for c in row.chunks_exact(LANES) {
                    for l in 0..LANES {
                        let d = above_floor(c[l] - max);
                        p[l] += d.fast_exp();
                        if ENTROPY {
                            let x = above_floor(d * inv_t);
                            let e = x.fast_exp();
                            q[l] += e;
                            w[l] += e * x;
                        }
                    }
                }
                (sum_lanes(p), sum_lanes(q), sum_lanes(w))
            },
        );
        self.rest_p += p;
        self.rest_q += q;
        self.weighted += w;
    }
}

/// The rows of each block of a statistic, all empty if it is absent.
fn pieces<'a, R>(v: &'a mut [R], blocks: &[Range<usize>]) -> Vec<&'a mut [R]> {
    match v.is_empty() {
        true => blocks.iter().map(|_| &mut [][..]).collect(),
        false => v.chunks_mut(ROWS).collect(),
    }
}

/// Fails unless arguments of the entropies are all there or all absent; true if they are there.
fn all_or_none(op: &'static str, args: &[(&'static str, bool)]) -> Result<bool> {
    let (first, there) = args[0];
    match args.iter().find(|(_, present)| *present != there) {
        None => Ok(there),
        Some(&(name, _)) if there => Err(Error::arg(op, name, "absent", format!("present, as {first} is"))),
        Some(&(name, _)) => Err(Error::arg(op, name, "present", format!("absent, as {first} is"))),
    }
}

pub(super) fn ibq_rows(ws: &Workspace, a: &IbqRows) -> Result<()> {
    match all_or_none("ibq_rows", &[("rest_q", a.rest_q.is_some()), ("xbar", a.xbar.is_some())])? {
        true => by_dtype!("ibq_rows", a.z.dtype, E => ibq_rows_of::<E, true>(ws, a)),
        false => by_dtype!("ibq_rows", a.z.dtype, E => ibq_rows_of::<E, false>(ws, a)),
    }
}

fn ibq_rows_of<E: Elem, const ENTROPY: bool>(ws: &Workspace, a: &IbqRows) -> Result<()> {
    const OP: &str = "ibq_rows";
    let sweep = Sweep::<E>::new(OP, &a.z, &a.e)?;
    let m = sweep.z.rows;
    for (name, v) in [("idx", &a.idx), ("smax", &a.smax), ("rest_p", &a.rest_p)] {
        expect(OP, name, &v.0, m)?;
    }
    let idx = flat_mut::<i32>(OP, "idx", &a.idx.0)?;
    let smax = flat_mut::<E::Acc>(OP, "smax", &a.smax.0)?;
    let rest_p = flat_mut::<E::Acc>(OP, "rest_p", &a.rest_p.0)?;
    let bad = one_mut::<E::Acc>(OP, "bad", &a.bad.0)?;
    let (rest_q, xbar) = match (&a.rest_q, &a.xbar) {
        (Some(rest_q), Some(xbar)) => {
            expect(OP, "rest_q", &rest_q.0, m)?;
            expect(OP, "xbar", &xbar.0, m)?;
            (flat_mut(OP, "rest_q", &rest_q.0)?, flat_mut(OP, "xbar", &xbar.0)?)
        }
        _ => (&mut [][..], &mut [][..]),
    };
    let inv_t = E::Acc::of(1.0 / a.temperature);
    let bad_rows = AtomicUsize::new(0);
    let blocks = sweep.row_blocks();
    let tiles = sweep.tiles(ws, m.div_ceil(ROWS))?;
    let out = idx
        .par_chunks_mut(ROWS)
        .zip(smax.par_chunks_mut(ROWS))
        .zip(rest_p.par_chunks_mut(ROWS))
        .zip(pieces(rest_q, &blocks))
        .zip(pieces(xbar, &blocks));
    out.zip(blocks.par_iter()).for_each(|(((((idx, smax), rest_p), rest_q), xbar), r)| {
        let r = r.clone();
        let mut local = tiles.take();
        let [z, e, s] = local.parts();
        let mut t = Tile { z, e, s };
        sweep.load_z(&r, &mut t);
        let mut stats = [RowStats::<E::Acc>::new(); ROWS];
        for c in sweep.col_tiles() {
            sweep.load_e(&c, &mut t);
            sweep.scores(&r, &c, &mut t);
            for (st, row) in stats.iter_mut().zip(t.s.chunks_mut(sweep.cols)).take(r.len()) {
                st.update::<ENTROPY>(row, c.start, inv_t);
            }
        }
        for (i, st) in stats.iter().enumerate().take(r.len()) {
            idx[i] = st.best as i32;
            smax[i] = st.max;
            rest_p[i] = st.rest_p;
            if ENTROPY {
                rest_q[i] = st.rest_q;
                xbar[i] = st.weighted / (E::Acc::one() + st.rest_q);
            }
            if !st.max.is_finite() {
                bad_rows.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    *bad += E::Acc::of(bad_rows.into_inner() as f64);
    Ok(())
}

pub(super) fn ibq_cols(ws: &Workspace, a: &IbqCols) -> Result<()> {
    by_dtype!("ibq_cols", a.z.dtype, E => ibq_cols_of::<E>(ws, a))
}

fn ibq_cols_of<E: Elem>(ws: &Workspace, a: &IbqCols) -> Result<()> {
    const OP: &str = "ibq_cols";
    let sweep = Sweep::<E>::new(OP, &a.z, &a.e)?;
    expect(OP, "smax", &a.smax, sweep.z.rows)?;
    expect(OP, "rest_q", &a.rest_q, sweep.z.rows)?;
    expect(OP, "col", &a.col.0, sweep.e.rows)?;
    let smax = flat::<E::Acc>(OP, "smax", &a.smax)?;
    let rest_q = flat::<E::Acc>(OP, "rest_q", &a.rest_q)?;
    let col = flat_mut::<E::Acc>(OP, "col", &a.col.0)?;
    let inv_t = E::Acc::of(1.0 / a.temperature);
    let tiles = sweep.tiles(ws, sweep.e.rows.div_ceil(sweep.cols))?;
    col.par_chunks_mut(sweep.cols).zip(sweep.col_tiles()).for_each(|(col, c)| {
        let mut local = tiles.take();
        let [z, e, s] = local.parts();
        let mut t = Tile { z, e, s };
        sweep.load_e(&c, &mut t);
        col.fill(E::Acc::zero());
        for r in sweep.row_blocks() {
            sweep.load_z(&r, &mut t);
            sweep.scores(&r, &c, &mut t);
            for (i, row) in r.clone().zip(t.s.chunks(sweep.cols)) {
                let (max, inv) = (smax[i], (E::Acc::one() + rest_q[i]).recip());
                pulp::Arch::new().dispatch(
                    #[inline(always)]
                    || {
                        for (o, &s) in col.iter_mut().zip(row) {
                            *o += above_floor(above_floor(s - max) * inv_t).fast_exp() * inv;
                        }
                    },
                );
            }
        }
    });
    Ok(())
}

/// The index of each token, checked against the number of codes.
fn indices<'a>(op: &'static str, v: &In<'a>, m: usize, k: usize) -> Result<&'a [i32]> {
    expect(op, "idx", v, m)?;
    let idx = flat::<i32>(op, "idx", v)?;
    match idx.iter().find(|&&i| i < 0 || i as usize >= k) {
        Some(i) => Err(Error::arg(op, "idx", format!("{i} in a row"), format!("0 to {}", k - 1))),
        None => Ok(idx),
    }
}

/// Writes `zq = E[idx]` and returns the sum of squared distances.
fn look_up<E: Elem>(op: &'static str, sweep: &Sweep<E>, idx: &[i32], zq: &Out) -> Result<E::Acc> {
    let out = rows_mut::<E>(op, "zq", &zq.0)?;
    if out.rows != idx.len() || out.cols != sweep.d {
        return Err(Error::arg(op, "zq", zq.0.dims, format!("[{}, {}]", idx.len(), sweep.d)));
    }
    Ok(par_sum(idx.len(), ROWS, |r| {
        let mut sum = E::Acc::zero();
        for i in r {
            let code = sweep.e.row(idx[i] as usize);
            // SAFETY: each row is written by the one thread that owns its chunk.
            unsafe { out.row(i) }.copy_from_slice(code);
            for (&e, &z) in code.iter().zip(sweep.z.row(i)) {
                let d = e.up() - z.up();
                sum += d * d;
            }
        }
        sum
    }))
}

pub(super) fn ibq_losses(ws: &Workspace, a: &IbqLosses) -> Result<()> {
    by_dtype!("ibq_losses", a.z.dtype, E => ibq_losses_of::<E>(ws, a))
}

fn ibq_losses_of<E: Elem>(_ws: &Workspace, a: &IbqLosses) -> Result<()> {
    const OP: &str = "ibq_losses";
    let sweep = Sweep::<E>::new(OP, &a.z, &a.e)?;
    let (m, k) = (sweep.z.rows, sweep.e.rows);
    let idx = indices(OP, &a.idx, m, k)?;
    let inv = scalar::<E::Acc>(OP, "inv_count", &a.inv_count)?;
    let quant = one_mut::<E::Acc>(OP, "quant", &a.quant.0)?;
    expect_rows(OP, "zq", &a.zq.0, m, sweep.d)?;
    rows_mut::<E>(OP, "zq", &a.zq.0)?;
    let entropies = all_or_none(
        OP,
        &[
            ("rest_q", a.rest_q.is_some()),
            ("xbar", a.xbar.is_some()),
            ("col", a.col.is_some()),
            ("c", a.c.is_some()),
            ("sample", a.sample.is_some()),
            ("avg", a.avg.is_some()),
        ],
    )?;
    if entropies {
        ibq_entropies::<E>(a, m, k, inv)?;
    }
    let squares = look_up(OP, &sweep, idx, &a.zq)?;
    let weight = (1.0 + a.beta_commit + a.beta_code) / sweep.d as f64;
    *quant = squares * inv * E::Acc::of(weight);
    Ok(())
}

/// Both entropies and the derivative of the second, if they are asked for.
fn ibq_entropies<E: Elem>(a: &IbqLosses, m: usize, k: usize, inv: E::Acc) -> Result<()> {
    const OP: &str = "ibq_losses";
    let (Some(rest_q), Some(xbar), Some(col)) = (&a.rest_q, &a.xbar, &a.col) else { return Ok(()) };
    let (Some(c), Some(sample), Some(avg)) = (&a.c, &a.sample, &a.avg) else { return Ok(()) };
    for (name, v, n) in [("rest_q", rest_q, m), ("xbar", xbar, m), ("col", col, k), ("c", &c.0, k)] {
        expect(OP, name, v, n)?;
    }
    let rest_q = flat::<E::Acc>(OP, "rest_q", rest_q)?;
    let xbar = flat::<E::Acc>(OP, "xbar", xbar)?;
    let col = flat::<E::Acc>(OP, "col", col)?;
    let c = flat_mut::<E::Acc>(OP, "c", &c.0)?;
    let sample = one_mut::<E::Acc>(OP, "sample", &sample.0)?;
    let avg = one_mut::<E::Acc>(OP, "avg", &avg.0)?;
    let eps = E::Acc::of(a.eps);
    let entropies: E::Acc = par_sum(m, 1024, |r| r.map(|i| rest_q[i].ln_1p() - xbar[i]).sum());
    *sample = entropies * inv;
    let parts: Vec<E::Acc> = c
        .par_chunks_mut(4096)
        .zip(col.par_chunks(4096))
        .map(|(c, col)| {
            let mut sum = E::Acc::zero();
            for (c, &n) in c.iter_mut().zip(col) {
                let share = n * inv;
                let log = (share + eps).ln();
                *c = -(log + share / (share + eps));
                sum += share * log;
            }
            sum
        })
        .collect();
    *avg = -parts.into_iter().fold(E::Acc::zero(), |a, b| a + b);
    Ok(())
}

/// What the backward sweeps know of one token. The best code is `t`.
#[derive(Clone, Copy)]
struct BwdRow<R> {
    best: usize,
    max: R,
    /// 1 / (1 + rest_p), or 0 where the soft term is defined as 0.
    inv_p: R,
    inv_q: R,
    xbar: R,
    /// g . E[t].
    dp_best: R,
    /// c[t].
    c_best: R,
    /// sum_j p_j (dP_j - dP_t).
    delta: R,
    /// sum_j q_j (c_j - c_t).
    r: R,
}

/// Below this remaining mass the soft term is 0.
const NO_REST: f64 = 1e-12;

/// Constants of one backward.
struct BwdScalars<R> {
    inv_t: R,
    /// -w_s / (M T).
    sample: R,
    /// w_a / (M T).
    avg: R,
}

impl<R: Real> BwdRow<R> {
    /// Overwrites a row of scores with dS; `dp` holds g . E[j], `c` is empty without entropies.
    fn d_scores<const ENTROPY: bool>(&self, k: &BwdScalars<R>, s: &mut [R], dp: &[R], c: &[R], first: usize) {
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                if !ENTROPY {
                    for (s, &dp) in s.iter_mut().zip(dp) {
                        let p = above_floor(*s - self.max).fast_exp() * self.inv_p;
                        *s = p * ((dp - self.dp_best) - self.delta);
                    }
                    return;
                }
                for ((s, &dp), &c) in s.iter_mut().zip(dp).zip(c) {
                    let d = above_floor(*s - self.max);
                    let x = above_floor(d * k.inv_t);
                    let p = d.fast_exp() * self.inv_p;
                    let q = x.fast_exp() * self.inv_q;
                    *s = p * ((dp - self.dp_best) - self.delta)
                        + q * (k.sample * (x - self.xbar) + k.avg * ((c - self.c_best) - self.r));
                }
            },
        );
        if (first..first + dp.len()).contains(&self.best) {
            s[self.best - first] =
                -self.inv_p * self.delta - self.inv_q * (k.sample * self.xbar + k.avg * self.r);
        }
    }

    /// Adds a tile's share of delta and r.
    fn expect<const ENTROPY: bool>(
        &mut self,
        k: &BwdScalars<R>,
        s: &mut [R],
        dp: &[R],
        c: &[R],
        first: usize,
    ) {
        let n = dp.len();
        if (first..first + n).contains(&self.best) {
            s[self.best - first] = R::neg_infinity();
        }
        let (delta, r) = pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                let (mut delta, mut r) = ([R::zero(); LANES], [R::zero(); LANES]);
                let whole = n / LANES * LANES;
                for j in (0..whole).step_by(LANES) {
                    for l in 0..LANES {
                        let d = above_floor(s[j + l] - self.max);
                        delta[l] += d.fast_exp() * (dp[j + l] - self.dp_best);
                        if ENTROPY {
                            r[l] += above_floor(d * k.inv_t).fast_exp() * (c[j + l] - self.c_best);
                        }
                    }
                }
                for j in whole..n {
                    let d = above_floor(s[j] - self.max);
                    delta[0] += d.fast_exp() * (dp[j] - self.dp_best);
                    if ENTROPY {
                        r[0] += above_floor(d * k.inv_t).fast_exp() * (c[j] - self.c_best);
                    }
                }
                (sum_lanes(delta), sum_lanes(r))
            },
        );
        self.delta += delta * self.inv_p;
        self.r += r * self.inv_q;
    }
}

pub(super) fn ibq_bwd(ws: &Workspace, a: &IbqBwd) -> Result<()> {
    let entropies = all_or_none(
        "ibq_bwd",
        &[
            ("rest_q", a.rest_q.is_some()),
            ("xbar", a.xbar.is_some()),
            ("c", a.c.is_some()),
            ("g_sample", a.g_sample.is_some()),
            ("g_avg", a.g_avg.is_some()),
        ],
    )?;
    match entropies {
        true => by_dtype!("ibq_bwd", a.z.dtype, E => ibq_bwd_of::<E, true>(ws, a)),
        false => by_dtype!("ibq_bwd", a.z.dtype, E => ibq_bwd_of::<E, false>(ws, a)),
    }
}

fn ibq_bwd_of<'a, E: Elem, const ENTROPY: bool>(ws: &Workspace, a: &IbqBwd<'a>) -> Result<()> {
    const OP: &str = "ibq_bwd";
    let sweep = Sweep::<E>::new(OP, &a.z, &a.e)?;
    let (m, k, d) = (sweep.z.rows, sweep.e.rows, sweep.d);
    for (name, v, n) in
        [("smax", &a.smax, m), ("rest_p", &a.rest_p, m), ("g", &a.g, m * d), ("dz", &a.dz.0, m * d)]
    {
        expect(OP, name, v, n)?;
    }
    let idx = indices(OP, &a.idx, m, k)?;
    let smax = flat::<E::Acc>(OP, "smax", &a.smax)?;
    let rest_p = flat::<E::Acc>(OP, "rest_p", &a.rest_p)?;
    let optional = |name, v: &Option<In<'a>>, n| match v {
        Some(v) => {
            expect(OP, name, v, n)?;
            flat::<E::Acc>(OP, name, v)
        }
        None => Ok(&[][..]),
    };
    let (rest_q, xbar) = (optional("rest_q", &a.rest_q, m)?, optional("xbar", &a.xbar, m)?);
    let c = optional("c", &a.c, k)?;
    let gradient = |name, v: &Option<In>| match v {
        Some(v) => scalar::<E::Acc>(OP, name, v),
        None => Ok(E::Acc::zero()),
    };
    let g = rows::<E>(OP, "g", &a.g)?;
    let dz = flat_mut::<E>(OP, "dz", &a.dz.0)?;
    // Before anything is written.
    let de = match &a.de {
        Some(de) => {
            expect(OP, "de", &de.0, k * d)?;
            Some(flat_mut::<E::Acc>(OP, "de", &de.0)?)
        }
        None => None,
    };
    let inv = scalar::<E::Acc>(OP, "inv_count", &a.inv_count)?;
    let inv_t = E::Acc::of(1.0 / a.temperature);
    let w_quant = scalar::<E::Acc>(OP, "g_quant", &a.g_quant)? * inv / E::Acc::of(d as f64);
    let consts = BwdScalars {
        inv_t,
        sample: -gradient("g_sample", &a.g_sample)? * inv * inv_t,
        avg: gradient("g_avg", &a.g_avg)? * inv * inv_t,
    };

    // What zq received in all: g and the first quantization term.
    let mut full = ws.scratch::<E::Acc>(m * d)?;
    let two = E::Acc::of(2.0);
    full.par_chunks_mut(d.max(1)).enumerate().with_min_len(ROWS).for_each(|(i, out)| {
        let (e, z) = (sweep.e.row(idx[i] as usize), sweep.z.row(i));
        for (j, o) in out.iter_mut().enumerate() {
            *o = g.row(i)[j].up() + two * w_quant * (e[j].up() - z[j].up());
        }
    });
    let full = &full[..];

    let mut state: Vec<BwdRow<E::Acc>> = (0..m)
        .map(|i| {
            let t = idx[i] as usize;
            let (one, rest) = (E::Acc::one(), rest_p[i]);
            let soft = rest / (one + rest) >= E::Acc::of(NO_REST);
            BwdRow {
                best: t,
                max: smax[i],
                inv_p: if soft { (one + rest).recip() } else { E::Acc::zero() },
                inv_q: if ENTROPY { (one + rest_q[i]).recip() } else { E::Acc::zero() },
                xbar: if ENTROPY { xbar[i] } else { E::Acc::zero() },
                dp_best: full[i * d..][..d].iter().zip(sweep.e.row(t)).map(|(&g, &e)| g * e.up()).sum(),
                c_best: if ENTROPY { c[t] } else { E::Acc::zero() },
                delta: E::Acc::zero(),
                r: E::Acc::zero(),
            }
        })
        .collect();

    let dp_tile = |r: &Range<usize>, n: usize, t: &Tile<'_, E::Acc>, dp: &mut [E::Acc]| {
        let g = Mat::new(&full[r.start * d..], r.len(), d, d);
        gemm(g, Mat::new(t.e, n, d, d).t(), dp, sweep.cols, false);
    };

    let tasks = m.div_ceil(ROWS).max(k.div_ceil(sweep.cols));
    let tiles = ws.per_thread::<E::Acc, 5>(tasks, bwd_parts(k, d))?;

    // Sweep 1: delta and r.
    state.par_chunks_mut(ROWS).zip(sweep.row_blocks()).for_each(|(state, r)| {
        let mut local = tiles.take();
        let [z, e, s, dp, _] = local.parts();
        let mut t = Tile { z, e, s };
        sweep.load_z(&r, &mut t);
        for cols in sweep.col_tiles() {
            sweep.load_e(&cols, &mut t);
            sweep.scores(&r, &cols, &mut t);
            dp_tile(&r, cols.len(), &t, dp);
            for (i, st) in state.iter_mut().enumerate() {
                let at = i * sweep.cols;
                let s = &mut t.s[at..at + cols.len()];
                let c = if ENTROPY { &c[cols.clone()] } else { &[] };
                st.expect::<ENTROPY>(&consts, s, &dp[at..at + cols.len()], c, cols.start);
            }
        }
    });
    let state = &state[..];

    let d_scores = |r: &Range<usize>, cols: &Range<usize>, t: &mut Tile<'_, E::Acc>, dp: &mut [E::Acc]| {
        sweep.scores(r, cols, t);
        dp_tile(r, cols.len(), t, dp);
        for (i, st) in state[r.clone()].iter().enumerate() {
            let at = i * sweep.cols..i * sweep.cols + cols.len();
            let c = if ENTROPY { &c[cols.clone()] } else { &[] };
            st.d_scores::<ENTROPY>(&consts, &mut t.s[at.clone()], &dp[at], c, cols.start);
        }
    };

    // Sweep 2: dz = dS E and the direct terms.
    let direct_z = E::Acc::of(2.0 + 2.0 * a.beta_commit) * w_quant;
    dz.par_chunks_mut((ROWS * d).max(1)).zip(sweep.row_blocks()).for_each(|(dz, r)| {
        let mut local = tiles.take();
        let [z, e, s, dp, sum] = local.parts();
        let mut t = Tile { z, e, s };
        sum.fill(E::Acc::zero());
        sweep.load_z(&r, &mut t);
        for cols in sweep.col_tiles() {
            sweep.load_e(&cols, &mut t);
            d_scores(&r, &cols, &mut t, dp);
            let ds = Mat::new(t.s, r.len(), cols.len(), sweep.cols);
            gemm(ds, Mat::new(t.e, cols.len(), d, d), sum, d, true);
        }
        for i in r.clone() {
            let (e, z) = (sweep.e.row(idx[i] as usize), sweep.z.row(i));
            let at = (i - r.start) * d;
            for j in 0..d {
                dz[at + j] = E::down(sum[at + j] + direct_z * (z[j].up() - e[j].up()));
            }
        }
    });

    // Sweep 3: dE = dS^T z, the hard scatter of g and the codebook term. A tile's rows of dE have one owner.
    let Some(de) = de else { return Ok(()) };
    let direct_e = E::Acc::of(2.0 * a.beta_code) * w_quant;
    de.par_chunks_mut((sweep.cols * d).max(1)).zip(sweep.col_tiles()).for_each(|(de, cols)| {
        let mut local = tiles.take();
        let [z, e, s, dp, _] = local.parts();
        let mut t = Tile { z, e, s };
        sweep.load_e(&cols, &mut t);
        for r in sweep.row_blocks() {
            sweep.load_z(&r, &mut t);
            d_scores(&r, &cols, &mut t, dp);
            let ds = Mat::new(t.s, r.len(), cols.len(), sweep.cols);
            gemm(ds.t(), Mat::new(t.z, r.len(), d, d), de, d, true);
        }
        for i in (0..m).filter(|&i| cols.contains(&(idx[i] as usize))) {
            let at = (idx[i] as usize - cols.start) * d;
            let (e, z) = (sweep.e.row(idx[i] as usize), sweep.z.row(i));
            for j in 0..d {
                de[at + j] += full[i * d + j] + direct_e * (e[j].up() - z[j].up());
            }
        }
    });
    Ok(())
}

pub(super) fn vq_losses(ws: &Workspace, a: &VqLosses) -> Result<()> {
    by_dtype!("vq_losses", a.z.dtype, E => vq_losses_of::<E>(ws, a))
}

fn vq_losses_of<E: Elem>(_ws: &Workspace, a: &VqLosses) -> Result<()> {
    const OP: &str = "vq_losses";
    let sweep = Sweep::<E>::new(OP, &a.z, &a.e)?;
    let idx = indices(OP, &a.idx, sweep.z.rows, sweep.e.rows)?;
    let inv = scalar::<E::Acc>(OP, "inv_count", &a.inv_count)?;
    let quant = one_mut::<E::Acc>(OP, "quant", &a.quant.0)?;
    let squares = look_up(OP, &sweep, idx, &a.zq)?;
    let weight = (a.beta_commit + a.beta_code) / sweep.d as f64;
    *quant = squares * inv * E::Acc::of(weight);
    Ok(())
}

pub(super) fn vq_bwd(ws: &Workspace, a: &VqBwd) -> Result<()> {
    by_dtype!("vq_bwd", a.z.dtype, E => vq_bwd_of::<E>(ws, a))
}

fn vq_bwd_of<E: Elem>(_ws: &Workspace, a: &VqBwd) -> Result<()> {
    const OP: &str = "vq_bwd";
    let sweep = Sweep::<E>::new(OP, &a.z, &a.e)?;
    let (m, k, d) = (sweep.z.rows, sweep.e.rows, sweep.d);
    let idx = indices(OP, &a.idx, m, k)?;
    expect(OP, "g", &a.g, m * d)?;
    expect(OP, "dz", &a.dz.0, m * d)?;
    let g = rows::<E>(OP, "g", &a.g)?;
    let dz = flat_mut::<E>(OP, "dz", &a.dz.0)?;
    // Before anything is written.
    let de = match &a.de {
        Some(de) => {
            expect(OP, "de", &de.0, k * d)?;
            Some(flat_mut::<E::Acc>(OP, "de", &de.0)?)
        }
        None => None,
    };
    let inv = scalar::<E::Acc>(OP, "inv_count", &a.inv_count)?;
    let w = scalar::<E::Acc>(OP, "g_quant", &a.g_quant)? * inv * E::Acc::of(2.0 / d.max(1) as f64);
    let (commit, code) = (w * E::Acc::of(a.beta_commit), w * E::Acc::of(a.beta_code));
    dz.par_chunks_mut(d.max(1)).enumerate().with_min_len(ROWS).for_each(|(i, dz)| {
        let (e, z) = (sweep.e.row(idx[i] as usize), sweep.z.row(i));
        for (j, o) in dz.iter_mut().enumerate() {
            *o = E::down(g.row(i)[j].up() + commit * (z[j].up() - e[j].up()));
        }
    });
    let Some(de) = de else { return Ok(()) };
    for i in 0..m {
        let (e, z) = (sweep.e.row(idx[i] as usize), sweep.z.row(i));
        let row = &mut de[idx[i] as usize * d..][..d];
        for (j, o) in row.iter_mut().enumerate() {
            *o += code * (e[j].up() - z[j].up());
        }
    }
    Ok(())
}
