//! The quantizers as ops; docs/quantizer.md has the mathematics.

use super::{S, expect_rank};
use crate::autograd::{Tape, Var};
use crate::backend::{IbqBwd, IbqCols, IbqLosses, IbqRows, Metric, Nearest, Role, VqBwd, VqLosses};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Which entropies the run needs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Entropy {
    /// T.
    pub temperature: f64,
    /// Added inside the logarithm of the average entropy.
    pub eps: f64,
}

/// Options of the IBQ quantizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct IbqOptions {
    /// Entropy loss.
    pub entropy: Entropy,
    /// Weight of the commitment term.
    pub beta_commit: f64,
    /// Weight of the codebook term.
    pub beta_code: f64,
    /// One over the tokens of all ranks.
    pub inv_count: f64,
}

/// What the sweep over the codes leaves of each token, all `[M]`, accumulator type.
#[derive(Clone)]
pub struct RowStatistics {
    /// Score of the best code.
    pub smax: Tensor,
    /// `sum_{j != t} exp(S_j - S_t)`.
    pub rest_p: Tensor,
    /// The same at temperature T.
    pub rest_q: Tensor,
    /// `sum_j q_j (S_j - S_t) / T`.
    pub xbar: Tensor,
}

/// What a quantizer returns.
pub struct Quantized {
    /// `[M, D]`.
    pub zq: Var,
    /// `[M]` i32.
    pub idx: Tensor,
    /// Quantization loss.
    pub quant: Var,
    /// Mean entropy of a token's code distribution; `None` for `vq`.
    pub sample: Option<Var>,
    /// Entropy of the average code distribution; `None` for `vq`.
    pub avg: Option<Var>,
    /// Row statistics; `None` for `vq`.
    pub rows: Option<RowStatistics>,
    /// Tokens without a finite score, `[1]`.
    pub bad: Option<Tensor>,
}

fn check(op: &'static str, z: &Var, e: &Var) -> Result<(usize, usize, usize)> {
    expect_rank(op, "z", z, 2)?;
    expect_rank(op, "e", e, 2)?;
    if z.dims()[1] != e.dims()[1] {
        return Err(Error::arg(op, "e", e.dims(), format!("codes of {} dimensions", z.dims()[1])));
    }
    if e.dims()[0] == 0 {
        return Err(Error::arg(op, "e", e.dims(), "at least one code"));
    }
    Ok((z.dims()[0], e.dims()[0], z.dims()[1]))
}

fn or_zero(tape_zero: &Tensor, g: Option<Tensor>) -> Tensor {
    g.unwrap_or_else(|| tape_zero.clone())
}

/// Index-backpropagation quantizer: `z` `[M, D]`, `e` `[K, D]`. Saves `z`, five numbers a token and one a code.
pub fn ibq(tape: &Tape, z: &Var, e: &Var, o: IbqOptions) -> Result<Quantized> {
    let (m, k, d) = check("ibq", z, e)?;
    let idx = Tensor::empty(tape.dev(), Role::Activation, DType::I32, [m])?;
    let stat = || tape.stat([m]);
    let rows = RowStatistics { smax: stat()?, rest_p: stat()?, rest_q: stat()?, xbar: stat()? };
    let bad = tape.zero_stat([1])?;
    let temperature = o.entropy.temperature;
    tape.dev().ibq_rows(
        S,
        &IbqRows {
            z: z.value().view(),
            e: e.value().view(),
            idx: idx.out(),
            smax: rows.smax.out(),
            rest_p: rows.rest_p.out(),
            rest_q: rows.rest_q.out(),
            xbar: rows.xbar.out(),
            bad: bad.acc(),
            temperature,
        },
    )?;
    let col = tape.stat([k])?;
    tape.dev().ibq_cols(
        S,
        &IbqCols {
            z: z.value().view(),
            e: e.value().view(),
            smax: rows.smax.view(),
            rest_q: rows.rest_q.view(),
            col: col.out(),
            temperature,
        },
    )?;
    tape.dev().collectives().all_reduce(S, col.acc())?;
    let zq = tape.act([m, d])?;
    let (c, quant, sample, avg) = (tape.stat([k])?, tape.stat([1])?, tape.stat([1])?, tape.stat([1])?);
    tape.dev().ibq_losses(
        S,
        &IbqLosses {
            z: z.value().view(),
            e: e.value().view(),
            idx: idx.view(),
            rest_q: rows.rest_q.view(),
            xbar: rows.xbar.view(),
            col: col.view(),
            zq: zq.out(),
            c: c.out(),
            quant: quant.out(),
            sample: sample.out(),
            avg: avg.out(),
            inv_count: o.inv_count,
            eps: o.entropy.eps,
            beta_commit: o.beta_commit,
            beta_code: o.beta_code,
        },
    )?;
    let zero = tape.zero_stat([1])?;
    let (zs, es, r, ix) = (z.clone(), e.clone(), rows.clone(), idx.clone());
    let outs = tape.op(&[z, e], vec![zq, quant, sample, avg], move |g, outs| {
        let gz = match g.take(&outs[0])? {
            Some(t) => t,
            None => Tensor::zeros(g.dev(), Role::Activation, zs.value().dtype(), [m, d])?,
        };
        let g_quant = or_zero(&zero, g.take(&outs[1])?);
        let g_sample = or_zero(&zero, g.take(&outs[2])?);
        let g_avg = or_zero(&zero, g.take(&outs[3])?);
        let dz = g.act([m, d])?;
        let de = g.target(&es)?;
        let a = IbqBwd {
            z: zs.value().view(),
            e: es.value().view(),
            idx: ix.view(),
            smax: r.smax.view(),
            rest_p: r.rest_p.view(),
            rest_q: r.rest_q.view(),
            xbar: r.xbar.view(),
            c: c.view(),
            g: gz.view(),
            g_quant: g_quant.view(),
            g_sample: g_sample.view(),
            g_avg: g_avg.view(),
            dz: dz.out(),
            de: de.as_ref().map(Tensor::acc),
            temperature,
            inv_count: o.inv_count,
            beta_commit: o.beta_commit,
            beta_code: o.beta_code,
        };
        g.dev().ibq_bwd(S, &a)?;
        g.give(&zs, dz)
    });
    let [zq, quant, sample, avg]: [Var; 4] =
        outs.try_into().unwrap_or_else(|_| unreachable!("an op of four outputs has four"));
    Ok(Quantized { zq, idx, quant, sample: Some(sample), avg: Some(avg), rows: Some(rows), bad: Some(bad) })
}

/// The plain VQ baseline: nearest code by distance, straight-through gradient. Saves `z` and indices.
pub fn vq(tape: &Tape, z: &Var, e: &Var, o: IbqOptions) -> Result<Quantized> {
    let (m, _, d) = check("vq", z, e)?;
    let idx = Tensor::empty(tape.dev(), Role::Activation, DType::I32, [m])?;
    let a = Nearest { z: z.value().view(), e: e.value().view(), idx: idx.out(), metric: Metric::L2 };
    tape.dev().nearest(S, &a)?;
    let (zq, quant) = (tape.act([m, d])?, tape.stat([1])?);
    tape.dev().vq_losses(
        S,
        &VqLosses {
            z: z.value().view(),
            e: e.value().view(),
            idx: idx.view(),
            zq: zq.out(),
            quant: quant.out(),
            inv_count: o.inv_count,
            beta_commit: o.beta_commit,
            beta_code: o.beta_code,
        },
    )?;
    let zero = tape.zero_stat([1])?;
    let (zs, es, ix) = (z.clone(), e.clone(), idx.clone());
    let outs = tape.op(&[z, e], vec![zq, quant], move |g, outs| {
        let gz = match g.take(&outs[0])? {
            Some(t) => t,
            None => Tensor::zeros(g.dev(), Role::Activation, zs.value().dtype(), [m, d])?,
        };
        let g_quant = or_zero(&zero, g.take(&outs[1])?);
        let dz = g.act([m, d])?;
        let de = g.target(&es)?;
        let a = VqBwd {
            z: zs.value().view(),
            e: es.value().view(),
            idx: ix.view(),
            g: gz.view(),
            g_quant: g_quant.view(),
            dz: dz.out(),
            de: de.as_ref().map(Tensor::acc),
            inv_count: o.inv_count,
            beta_commit: o.beta_commit,
            beta_code: o.beta_code,
        };
        g.dev().vq_bwd(S, &a)?;
        g.give(&zs, dz)
    });
    let [zq, quant]: [Var; 2] =
        outs.try_into().unwrap_or_else(|_| unreachable!("an op of two outputs has two"));
    Ok(Quantized { zq, idx, quant, sample: None, avg: None, rows: None, bad: None })
}
