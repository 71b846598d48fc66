//! The backward pass of the IBQ quantizer.

use std::ops::Range;

use num_traits::{Float, One, Zero};
use rayon::prelude::*;

use super::codes::indices;
use super::scores::{LANES, ROWS, Sweep, Tile, above_floor, sum_lanes, tile_cols, tile_parts};
use super::*;
use crate::backend::cpu::workspace::{acc_size, block, per_thread, together};

/// Elements of a [`Tile`]'s parts, of the gradients with respect to probabilities, and of the sums of a block of rows.
fn bwd_parts(k: usize, d: usize) -> [usize; 5] {
    let [z, e, s] = tile_parts(k, d);
    [z, e, s, s, z]
}

pub(crate) fn ibq_bwd_workspace(a: &IbqBwd, threads: usize) -> usize {
    let (m, k, d, size) = (a.z.dims.rows(), a.e.dims.rows(), a.z.dims.cols(), acc_size(a.z.dtype));
    let tasks = m.div_ceil(ROWS).max(k.div_ceil(tile_cols(k)));
    together([block(size, m.saturating_mul(d)), per_thread(threads, size, tasks, bwd_parts(k, d))])
}

/// The data of one token in the backward sweeps. The best code is `t`.
#[derive(Clone, Copy)]
struct BwdRow<R> {
    best: usize,
    max: R,
    /// 1 / (1 + rest_p), or 0 if the soft term is defined as 0.
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

/// If the probability of all codes but the best is below this, the soft term is 0.
const NO_REST: f64 = 1e-12;

/// Constants of one backward pass.
struct BwdScalars<R> {
    inv_t: R,
    /// -w_s / (M T).
    sample: R,
    /// w_a / (M T).
    avg: R,
}

impl<R: Real> BwdRow<R> {
    /// Overwrites a row of scores by their gradients dS; `dp` holds g . E[j], and `c` is empty without entropies.
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

    /// Adds the contribution of a tile to delta and r.
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

pub(crate) fn ibq_bwd(ws: &Workspace, a: &IbqBwd) -> Result<()> {
    match a.rest_q.is_some() {
        true => by_dtype!("ibq_bwd", a.z.dtype, E => ibq_bwd_of::<E, true>(ws, a)),
        false => by_dtype!("ibq_bwd", a.z.dtype, E => ibq_bwd_of::<E, false>(ws, a)),
    }
}

fn ibq_bwd_of<'a, E: Elem, const ENTROPY: bool>(ws: &Workspace, a: &IbqBwd<'a>) -> Result<()> {
    const OP: &str = "ibq_bwd";
    let sweep = Sweep::<E>::new(OP, &a.z, &a.e)?;
    let (m, k, d) = (sweep.z.rows, sweep.e.rows, sweep.d);
    let idx = indices(OP, &a.idx, k)?;
    let smax = flat::<E::Acc>(OP, "smax", &a.smax)?;
    let rest_p = flat::<E::Acc>(OP, "rest_p", &a.rest_p)?;
    let optional = |name, v: &Option<In<'a>>| match v {
        Some(v) => flat::<E::Acc>(OP, name, v),
        None => Ok(&[][..]),
    };
    let (rest_q, xbar) = (optional("rest_q", &a.rest_q)?, optional("xbar", &a.xbar)?);
    let c = optional("c", &a.c)?;
    let gradient = |name, v: &Option<In>| match v {
        Some(v) => scalar::<E::Acc>(OP, name, v),
        None => Ok(E::Acc::zero()),
    };
    let g = rows::<E>(OP, "g", &a.g)?;
    let dz = flat_mut::<E>(OP, "dz", &a.dz.0)?;
    // Checked before anything is written.
    let de = a.de.as_ref().map(|de| flat_mut::<E::Acc>(OP, "de", &de.0)).transpose()?;
    let inv = scalar::<E::Acc>(OP, "inv_count", &a.inv_count)?;
    let inv_t = E::Acc::of(1.0 / a.temperature);
    let w_quant = scalar::<E::Acc>(OP, "g_quant", &a.g_quant)? * inv / E::Acc::of(d as f64);
    let consts = BwdScalars {
        inv_t,
        sample: -gradient("g_sample", &a.g_sample)? * inv * inv_t,
        avg: gradient("g_avg", &a.g_avg)? * inv * inv_t,
    };

    // The full gradient of zq: g and the first quantization term.
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

    // Sweep 2: dz = dS E, and the direct terms.
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

    // Sweep 3: dE = dS^T z, the scatter of g to the best codes, and the codebook term. Only one task writes the rows of
    // dE of a tile.
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
