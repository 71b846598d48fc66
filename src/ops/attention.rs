//! Softmax attention over a flat batch of sequences.

use super::{S, expect_rank};
use crate::autograd::{Tape, Var};
use crate::backend::{AttentionBwd, AttentionFwd, Kernels, Role, Stream};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Where the sequences of a flat batch begin and end.
#[derive(Clone, Debug)]
pub struct Seqs {
    /// `[S+1]` i32 offsets.
    pub cu: Tensor,
    /// Longest sequence.
    pub max: usize,
    /// Rows up to the last offset.
    pub total: usize,
}

fn offsets(lengths: &[usize]) -> Result<Vec<i32>> {
    let mut cu = vec![0i32];
    let mut total = 0;
    for &n in lengths {
        total += n;
        cu.push(i32::try_from(total).map_err(|_| Error::arg("Seqs", "lengths", total, "below 2^31"))?);
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

    /// Other sequences at the same place: as many, none longer than the longest was.
    pub fn refill(&mut self, dev: &dyn Kernels, lengths: &[usize]) -> Result<()> {
        let (n, max) = (self.cu.dims().numel() - 1, lengths.iter().copied().max().unwrap_or(0));
        if lengths.len() != n || max > self.max {
            let got = format!("{} sequences of at most {max}", lengths.len());
            return Err(Error::arg("Seqs", "lengths", got, format!("{n} of at most {}", self.max)));
        }
        self.total = lengths.iter().sum();
        dev.copy_in(Stream::COMPUTE, bytemuck::cast_slice(&offsets(lengths)?), self.cu.out())
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
    /// Factor on the scores.
    pub scale: f64,
    /// Mask the future.
    pub causal: bool,
}

/// `qkv` `[N, (query + 2 kv) D]`: queries, keys, values side by side; returns `[N, query * D]`. Saves `qkv`,
/// the output and one number a row and head.
pub fn attention(tape: &Tape, qkv: &Var, seqs: &Seqs, h: Heads) -> Result<Var> {
    expect_rank("attention", "qkv", qkv, 2)?;
    let n = qkv.dims()[0];
    let (wq, wk) = (h.query * h.dim, h.kv * h.dim);
    if qkv.dims()[1] != wq + 2 * wk {
        return Err(Error::arg("attention", "qkv", qkv.dims(), format!("{} columns", wq + 2 * wk)));
    }
    if h.kv == 0 || !h.query.is_multiple_of(h.kv) {
        return Err(Error::arg("attention", "kv", h.kv, format!("a divisor of {} query heads", h.query)));
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
    let (xs, seqs) = (qkv.clone(), seqs.clone());
    Ok(tape.op1(&[qkv], y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        let dx = g.act(xs.dims())?;
        let [q, k, v] = parts(xs.value())?;
        let [dq, dk, dv] = parts(&dx)?;
        let a = AttentionBwd {
            dy: dy.view(),
            q: q.view(),
            k: k.view(),
            v: v.view(),
            y: out.value().view(),
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
