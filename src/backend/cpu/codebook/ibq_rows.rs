//! The best code of every token, and sums over the other codes.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use num_traits::{Float, One};
use rayon::prelude::*;

use super::scores::{LANES, ROWS, Sweep, Tile, above_floor, best, sum_lanes, tiles_bytes};
use super::*;

pub(crate) fn ibq_rows_workspace(a: &IbqRows, threads: usize) -> usize {
    tiles_bytes(&a.z, &a.e, threads, a.z.dims.rows().div_ceil(ROWS))
}

/// Running statistics of one row. The sums exclude the best code so far.
#[derive(Clone, Copy)]
struct RowStats<R> {
    best: usize,
    max: R,
    rest_p: R,
    rest_q: R,
    /// Sum of e^x x over all codes but the best.
    weighted: R,
}

impl<R: Real> RowStats<R> {
    fn new() -> Self {
        let (max, zero) = (R::neg_infinity(), R::zero());
        RowStats { best: 0, max, rest_p: zero, rest_q: zero, weighted: zero }
    }

    /// Adds a tile's row of scores, and overwrites the score of a new best code by -inf. Sums at the temperature of the
    /// entropies are computed only with `ENTROPY`.
    fn update<const ENTROPY: bool>(&mut self, row: &mut [R], first: usize, inv_t: R) {
        let (j, top) = best(row);
        if top > self.max {
            if self.max > R::neg_infinity() {
                // The previous best code joins the sums, which are rescaled to the new maximum.
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

/// The slice of a statistic for each block of rows; empty slices if the statistic is absent.
fn pieces<'a, R>(v: &'a mut [R], blocks: &[Range<usize>]) -> Vec<&'a mut [R]> {
    match v.is_empty() {
        true => blocks.iter().map(|_| &mut [][..]).collect(),
        false => v.chunks_mut(ROWS).collect(),
    }
}

pub(crate) fn ibq_rows(ws: &Workspace, a: &IbqRows) -> Result<()> {
    match a.rest_q.is_some() {
        true => by_dtype!("ibq_rows", a.z.dtype, E => ibq_rows_of::<E, true>(ws, a)),
        false => by_dtype!("ibq_rows", a.z.dtype, E => ibq_rows_of::<E, false>(ws, a)),
    }
}

fn ibq_rows_of<E: Elem, const ENTROPY: bool>(ws: &Workspace, a: &IbqRows) -> Result<()> {
    const OP: &str = "ibq_rows";
    let sweep = Sweep::<E>::new(OP, &a.z, &a.e)?;
    let m = sweep.z.rows;
    let idx = flat_mut::<i32>(OP, "idx", &a.idx.0)?;
    let smax = flat_mut::<E::Acc>(OP, "smax", &a.smax.0)?;
    let rest_p = flat_mut::<E::Acc>(OP, "rest_p", &a.rest_p.0)?;
    let bad = one_mut::<E::Acc>(OP, "bad", &a.bad.0)?;
    let (rest_q, xbar) = match (&a.rest_q, &a.xbar) {
        (Some(rest_q), Some(xbar)) => (flat_mut(OP, "rest_q", &rest_q.0)?, flat_mut(OP, "xbar", &xbar.0)?),
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
