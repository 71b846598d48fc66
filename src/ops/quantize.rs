//! The quantizers as ops; docs/quantizer.md has the mathematics.

use super::{S, expect_rank};
use crate::autograd::{Tape, Var};
use crate::backend::{
    DType, IbqBwd, IbqCols, IbqLosses, IbqRows, Metric, Nearest, Reduction, Role, VqBwd, VqLosses,
};
use crate::error::Result;
use crate::tensor::Tensor;

/// Options of the entropies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Entropy {
    /// Temperature T.
    pub temperature: f64,
    /// Added inside the logarithm of the average entropy.
    pub eps: f64,
}

/// Options of the IBQ quantizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct IbqOptions {
    /// Entropy options; with `None`, neither entropy is computed.
    pub entropy: Option<Entropy>,
    /// Weight of the commitment term.
    pub beta_commit: f64,
    /// Weight of the codebook term.
    pub beta_code: f64,
}

/// Statistics of each token from the sweep over the codes, all `[M]`, accumulator type.
#[derive(Clone)]
pub struct RowStatistics {
    /// Score of the best code.
    pub smax: Tensor,
    /// `sum_{j != t} exp(S_j - S_t)`.
    pub rest_p: Tensor,
    /// Statistics of the entropies.
    pub entropy: Option<EntropyStatistics>,
}

/// Statistics of each token for the entropies, both `[M]`, accumulator type.
#[derive(Clone)]
pub struct EntropyStatistics {
    /// `sum_{j != t} exp((S_j - S_t) / T)`.
    pub rest_q: Tensor,
    /// `sum_j q_j (S_j - S_t) / T`.
    pub xbar: Tensor,
}

/// Result of a quantizer.
pub struct Quantized {
    /// `[M, D]`, in the type of the tokens.
    pub zq: Var,
    /// `[M]` i32.
    pub idx: Tensor,
    /// Quantization loss.
    pub quant: Var,
    /// Mean entropy of a token's code distribution; `None` for `vq` and without entropies.
    pub sample: Option<Var>,
    /// Entropy of the average code distribution; `None` for `vq` and without entropies.
    pub avg: Option<Var>,
    /// Row statistics; `None` for `vq`.
    pub rows: Option<RowStatistics>,
    /// Number of tokens without a finite score, `[1]`.
    pub bad: Tensor,
}

fn check(op: &'static str, z: &Var, e: &Var) -> Result<(usize, usize, usize)> {
    expect_rank(op, "z", z, 2)?;
    expect_rank(op, "e", e, 2)?;
    Ok((z.dims()[0], e.dims()[0], z.dims()[1]))
}

fn or_zero(tape_zero: &Tensor, g: Option<Tensor>) -> Tensor {
    g.unwrap_or_else(|| tape_zero.clone())
}

/// Index-backpropagation quantizer: `z` `[M, D]`, `e` `[K, D]`, both of the type that `zq` gets. `inv_count` is a device
/// scalar, the reciprocal of the number of tokens of all ranks. Saves `z`, five numbers per token and one per code;
/// without entropies, three per token.
pub fn ibq(tape: &Tape, z: &Var, e: &Var, inv_count: &Tensor, o: IbqOptions) -> Result<Quantized> {
    let (m, k, d) = check("ibq", z, e)?;
    let idx = Tensor::empty(tape.dev(), Role::Activation, DType::I32, [m])?;
    let stat = |n: usize| tape.stat([n]);
    let entropy = match o.entropy {
        Some(_) => Some(EntropyStatistics { rest_q: stat(m)?, xbar: stat(m)? }),
        None => None,
    };
    let rows = RowStatistics { smax: stat(m)?, rest_p: stat(m)?, entropy };
    let bad = tape.zero_stat([1])?;
    let temperature = o.entropy.map_or(1.0, |e| e.temperature);
    let of = rows.entropy.as_ref();
    tape.dev().ibq_rows(
        S,
        &IbqRows {
            z: z.value().view(),
            e: e.value().view(),
            idx: idx.out(),
            smax: rows.smax.out(),
            rest_p: rows.rest_p.out(),
            rest_q: of.map(|s| s.rest_q.out()),
            xbar: of.map(|s| s.xbar.out()),
            bad: bad.acc(),
            temperature,
        },
    )?;
    let col = match of {
        Some(s) => {
            let col = stat(k)?;
            let a = IbqCols {
                z: z.value().view(),
                e: e.value().view(),
                idx: idx.view(),
                smax: rows.smax.view(),
                rest_q: s.rest_q.view(),
                col: col.out(),
                temperature,
            };
            tape.dev().ibq_cols(S, &a)?;
            tape.dev().collectives().all_reduce(S, col.acc(), Reduction::Sum)?;
            Some(col)
        }
        None => None,
    };
    // c, sample, avg.
    let entropies = match of {
        Some(_) => Some((stat(k)?, stat(1)?, stat(1)?)),
        None => None,
    };
    let (zq, quant) = (tape.like(z, [m, d])?, stat(1)?);
    tape.dev().ibq_losses(
        S,
        &IbqLosses {
            z: z.value().view(),
            e: e.value().view(),
            idx: idx.view(),
            rest_q: of.map(|s| s.rest_q.view()),
            xbar: of.map(|s| s.xbar.view()),
            col: col.as_ref().map(Tensor::view),
            inv_count: inv_count.view(),
            zq: zq.out(),
            c: entropies.as_ref().map(|e| e.0.out()),
            quant: quant.out(),
            sample: entropies.as_ref().map(|e| e.1.out()),
            avg: entropies.as_ref().map(|e| e.2.out()),
            eps: o.entropy.map_or(0.0, |e| e.eps),
            beta_commit: o.beta_commit,
            beta_code: o.beta_code,
        },
    )?;
    let zero = tape.zero_stat([1])?;
    let (zs, es, r, ix, inv_count) = (z.keep(), e.keep(), rows.clone(), idx.clone(), inv_count.clone());
    let mut values = vec![zq, quant];
    let mut c = None;
    if let Some((derivative, sample, avg)) = entropies {
        c = Some(derivative);
        values.extend([sample, avg]);
    }
    let outs = tape.op(&[z, e], values, move |g, outs| {
        let z = zs.value()?;
        let e = es.value()?;
        let gz = match g.take(outs[0])? {
            Some(t) => t,
            None => Tensor::zeros(g.dev(), Role::Activation, z.dtype(), [m, d])?,
        };
        let g_quant = or_zero(&zero, g.take(outs[1])?);
        let (g_sample, g_avg) = match &outs[2..] {
            [sample, avg] => (Some(or_zero(&zero, g.take(sample)?)), Some(or_zero(&zero, g.take(avg)?))),
            _ => (None, None),
        };
        let dz = g.like(&zs)?;
        let de = g.target(&es)?;
        let a = IbqBwd {
            z: z.view(),
            e: e.view(),
            idx: ix.view(),
            smax: r.smax.view(),
            rest_p: r.rest_p.view(),
            rest_q: r.entropy.as_ref().map(|s| s.rest_q.view()),
            xbar: r.entropy.as_ref().map(|s| s.xbar.view()),
            c: c.as_ref().map(Tensor::view),
            inv_count: inv_count.view(),
            g: gz.view(),
            g_quant: g_quant.view(),
            g_sample: g_sample.as_ref().map(Tensor::view),
            g_avg: g_avg.as_ref().map(Tensor::view),
            dz: dz.out(),
            de: de.as_ref().map(Tensor::acc),
            temperature,
            beta_commit: o.beta_commit,
            beta_code: o.beta_code,
        };
        g.dev().ibq_bwd(S, &a)?;
        g.give(&zs, dz)
    });
    let mut outs = outs.into_iter();
    let mut next = || outs.next();
    let (Some(zq), Some(quant)) = (next(), next()) else { unreachable!("an op gives what it was made with") };
    let (sample, avg) = (next(), next());
    Ok(Quantized { zq, idx, quant, sample, avg, rows: Some(rows), bad })
}

/// The plain VQ baseline: nearest code by distance, straight-through gradient. `inv_count` is a device scalar, the
/// reciprocal of the number of tokens of all ranks. Saves `z` and the indices.
pub fn vq(tape: &Tape, z: &Var, e: &Var, inv_count: &Tensor, o: IbqOptions) -> Result<Quantized> {
    let (m, _, d) = check("vq", z, e)?;
    let idx = Tensor::empty(tape.dev(), Role::Activation, DType::I32, [m])?;
    let bad = tape.zero_stat([1])?;
    let a = Nearest {
        z: z.value().view(),
        e: e.value().view(),
        idx: idx.out(),
        score: None,
        bad: Some(bad.acc()),
        metric: Metric::L2,
    };
    tape.dev().nearest(S, &a)?;
    let (zq, quant) = (tape.like(z, [m, d])?, tape.stat([1])?);
    tape.dev().vq_losses(
        S,
        &VqLosses {
            z: z.value().view(),
            e: e.value().view(),
            idx: idx.view(),
            inv_count: inv_count.view(),
            zq: zq.out(),
            quant: quant.out(),
            beta_commit: o.beta_commit,
            beta_code: o.beta_code,
        },
    )?;
    let zero = tape.zero_stat([1])?;
    let (zs, es, ix, inv_count) = (z.keep(), e.keep(), idx.clone(), inv_count.clone());
    let outs = tape.op(&[z, e], vec![zq, quant], move |g, outs| {
        let z = zs.value()?;
        let e = es.value()?;
        let gz = match g.take(outs[0])? {
            Some(t) => t,
            None => Tensor::zeros(g.dev(), Role::Activation, z.dtype(), [m, d])?,
        };
        let g_quant = or_zero(&zero, g.take(outs[1])?);
        let dz = g.like(&zs)?;
        let de = g.target(&es)?;
        let a = VqBwd {
            z: z.view(),
            e: e.view(),
            idx: ix.view(),
            inv_count: inv_count.view(),
            g: gz.view(),
            g_quant: g_quant.view(),
            dz: dz.out(),
            de: de.as_ref().map(Tensor::acc),
            beta_commit: o.beta_commit,
            beta_code: o.beta_code,
        };
        g.dev().vq_bwd(S, &a)?;
        g.give(&zs, dz)
    });
    let [zq, quant]: [Var; 2] =
        outs.try_into().unwrap_or_else(|_| unreachable!("an op of two outputs has two"));
    Ok(Quantized { zq, idx, quant, sample: None, avg: None, rows: None, bad })
}
