//! Softmax attention over a flat batch of sequences.

use super::{S, expect_rank};
use crate::autograd::{Tape, Var};
use crate::backend::{Arange, AttentionBwd, AttentionFwd, CountUp, DType, Kernels, Role};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Offsets of the sequences of a flat batch.
#[derive(Clone, Debug)]
pub struct Seqs {
    /// `[S+1]` i32 offsets.
    pub cu: Tensor,
    /// Length of the longest sequence, now or in later batches of a recorded step.
    pub max: usize,
    /// Rows up to the last offset, now or later.
    pub total: usize,
}

/// A row number in the type that kernels read.
fn row(n: usize) -> Result<i32> {
    i32::try_from(n).map_err(|_| Error::arg("Seqs", "lengths", n, "fewer than 2^31 rows"))
}

/// The first row of each sequence, and the row after the last one.
pub fn offsets(lengths: &[usize]) -> Result<Vec<i32>> {
    let mut cu = vec![0i32];
    let mut total = 0usize;
    for &n in lengths {
        total = total.saturating_add(n);
        cu.push(row(total)?);
    }
    Ok(cu)
}

impl Seqs {
    /// Sequences of these lengths, one after another.
    pub fn new(dev: &dyn Kernels, lengths: &[usize]) -> Result<Self> {
        let max = lengths.iter().copied().max().unwrap_or(0);
        let cu = Tensor::from_host(dev, Role::Input, &offsets(lengths)?, [lengths.len() + 1])?;
        Ok(Seqs { cu, max, total: lengths.iter().sum() })
    }

    /// `n` sequences of the same length, whose offsets the device computes: without a copy from the host, so that it
    /// can be recorded.
    pub fn uniform(dev: &dyn Kernels, n: usize, length: usize) -> Result<Self> {
        let total = n.saturating_mul(length);
        row(total)?;
        let cu = Tensor::empty(dev, Role::Activation, DType::I32, [n + 1])?;
        dev.arange(S, &Arange { y: cu.out(), step: length })?;
        Ok(Seqs { cu, max: length, total })
    }
}

/// Heads of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key/value heads; divides `query`.
    pub kv: usize,
    /// Head dimension D.
    pub dim: usize,
    /// Factor of the scores.
    pub scale: f64,
    /// Mask the future.
    pub causal: bool,
}

/// `qkv` `[N, (query + 2 kv) D]` holds queries, keys and values side by side; returns `[N, query * D]`. Saves `qkv`,
/// the output and one number per row and head.
pub fn attention(tape: &Tape, qkv: &Var, seqs: &Seqs, h: Heads) -> Result<Var> {
    expect_rank("attention", "qkv", qkv, 2)?;
    let n = qkv.dims()[0];
    let (wq, wk) = (h.query.saturating_mul(h.dim), h.kv.saturating_mul(h.dim));
    let columns = wk.saturating_mul(2).saturating_add(wq);
    if qkv.dims()[1] != columns {
        return Err(Error::arg("attention", "qkv", qkv.dims(), format!("{columns} columns")));
    }
    if n < seqs.total {
        let want = format!("the {} rows of the sequences", seqs.total);
        return Err(Error::arg("attention", "qkv", format!("{n} rows"), want));
    }
    let y = tape.act([n, wq])?;
    let lse = tape.stat([n, h.query])?;
    let parts = move |t: &Tensor| -> Result<[Tensor; 3]> {
        Ok([t.columns(0, wq)?, t.columns(wq, wk)?, t.columns(wq + wk, wk)?])
    };
    let [q, k, v] = parts(qkv.value())?;
    let a = AttentionFwd {
        q: q.view(),
        k: k.view(),
        v: v.view(),
        cu_q: seqs.cu.view(),
        cu_k: seqs.cu.view(),
        len_k: None,
        y: y.out(),
        lse: lse.out(),
        heads: h.query,
        kv_heads: h.kv,
        head_dim: h.dim,
        max_q: seqs.max,
        max_k: seqs.max,
        scale: h.scale,
        causal: h.causal,
    };
    tape.dev().attention_fwd(S, &a)?;
    let (xs, seqs) = (qkv.keep(), seqs.clone());
    Ok(tape.op1(&[qkv], y.clone(), move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        let x = xs.value()?;
        let dx = g.act(xs.dims())?;
        let [q, k, v] = parts(&x)?;
        let [dq, dk, dv] = parts(&dx)?;
        let a = AttentionBwd {
            dy: dy.view(),
            q: q.view(),
            k: k.view(),
            v: v.view(),
            y: y.view(),
            lse: lse.view(),
            cu_q: seqs.cu.view(),
            cu_k: seqs.cu.view(),
            dq: dq.out(),
            dk: dk.out(),
            dv: dv.out(),
            heads: h.query,
            kv_heads: h.kv,
            head_dim: h.dim,
            max_q: seqs.max,
            max_k: seqs.max,
            scale: h.scale,
            causal: h.causal,
        };
        g.dev().attention_bwd(S, &a)?;
        g.give(&xs, dx)
    }))
}

/// Places of the keys of S sequences in a cache: consecutive slots of `max` rows, filled from the first row on. All
/// that changes from step to step is on the device, so that a step can be recorded.
#[derive(Clone, Debug)]
pub struct Slots {
    /// `[S+1]` i32 first row of each sequence; kernels ignore the last element.
    pub start: Tensor,
    /// `[S]` i32 number of keys of each sequence.
    pub len: Tensor,
    /// Maximum number of keys of a sequence, now or later.
    pub max: usize,
    /// `[S]` i32 positions of the last keys, `len - 1`.
    pub position: Tensor,
    /// `[S]` i32 rows of the last keys, `start + len - 1`.
    pub row: Tensor,
    /// `len`, `position` and `row` in one tensor.
    state: Tensor,
}

impl Slots {
    /// Slots whose first `lengths[s]` rows hold keys.
    pub fn new(dev: &dyn Kernels, lengths: &[usize], max: usize) -> Result<Self> {
        let n = lengths.len();
        if let Some(most) = lengths.iter().copied().find(|&len| len > max) {
            return Err(Error::arg("Slots", "lengths", most, format!("at most the {max} rows of a slot")));
        }
        let starts = (0..=n).map(|s| row(s.saturating_mul(max))).collect::<Result<Vec<_>>>()?;
        let len = lengths.iter().map(|&n| row(n)).collect::<Result<Vec<_>>>()?;
        let position = len.iter().map(|n| n - 1);
        let rows = position.clone().zip(&starts).map(|(p, start)| start + p);
        let state: Vec<i32> = len.iter().copied().chain(position).chain(rows).collect();
        let start = Tensor::from_host(dev, Role::Input, &starts, [n + 1])?;
        let state = Tensor::from_host(dev, Role::Input, &state, [3 * n])?;
        let [len, position, row] = [0, n, 2 * n].map(|at| state.range(at, n));
        Ok(Slots { start, len: len?, max, position: position?, row: row?, state })
    }

    /// Adds a key to each sequence, on the device.
    pub fn advance(&self, dev: &dyn Kernels) -> Result<()> {
        dev.count_up(S, &CountUp { x: self.state.acc(), norm: None })
    }
}

/// Attention to keys and values side by side in a cache, `[rows, 2 kv D]`; of `qkv` `[N, (query + 2 kv) D]` only the
/// queries are read. Returns `[N, query * D]`. For inference tapes only: it has no backward pass.
pub fn cached_attention(
    tape: &Tape,
    qkv: &Var,
    cache: &Tensor,
    seqs: &Seqs,
    slots: &Slots,
    h: Heads,
) -> Result<Var> {
    if qkv.needs_grad() {
        return Err(Error::arg("cached_attention", "qkv", "a value with a gradient", "an inference tape's"));
    }
    let (n, wq, wk) = (qkv.dims().rows(), h.query.saturating_mul(h.dim), h.kv.saturating_mul(h.dim));
    let (q, k, v) = (qkv.value().columns(0, wq)?, cache.columns(0, wk)?, cache.columns(wk, wk)?);
    let (y, lse) = (tape.act([n, wq])?, tape.stat([n, h.query])?);
    let a = AttentionFwd {
        q: q.view(),
        k: k.view(),
        v: v.view(),
        cu_q: seqs.cu.view(),
        cu_k: slots.start.view(),
        len_k: Some(slots.len.view()),
        y: y.out(),
        lse: lse.out(),
        heads: h.query,
        kv_heads: h.kv,
        head_dim: h.dim,
        max_q: seqs.max,
        max_k: slots.max,
        scale: h.scale,
        causal: h.causal,
    };
    tape.dev().attention_fwd(S, &a)?;
    Ok(tape.constant(y))
}
