//! Gradients of attention, from recomputed probabilities.

use rayon::prelude::*;

use super::*;
use crate::backend::cpu::workspace::{acc_size, per_thread, together, wide};

pub(crate) fn attention_bwd_workspace(a: &AttentionBwd, threads: usize) -> usize {
    let most = Most::new(&forward_of(a));
    let locals = per_thread(threads, acc_size(a.q.dtype), most.pairs, most.backward_parts());
    together([wide(&a.dy), wide(&a.q), wide(&a.k), wide(&a.v), locals])
}

pub(crate) fn attention_bwd(ws: &Workspace, a: &AttentionBwd) -> Result<()> {
    by_dtype!("attention_bwd", a.q.dtype, E => bwd::<E>(ws, a))
}

/// Inputs of the backward pass in the accumulator type.
struct Saved<'a, R> {
    dy: Rows<'a, R>,
    q: Rows<'a, R>,
    k: Rows<'a, R>,
    v: Rows<'a, R>,
    lse: Rows<'a, R>,
    scale: R,
}

fn bwd<E: Elem>(ws: &Workspace, a: &AttentionBwd) -> Result<()> {
    let op = "attention_bwd";
    let shape = Shape::new(op, &forward_of(a))?;
    let dy = Wide::new(ws, rows::<E>(op, "dy", &a.dy)?)?;
    let q = Wide::new(ws, rows::<E>(op, "q", &a.q)?)?;
    let k = Wide::new(ws, rows::<E>(op, "k", &a.k)?)?;
    let v = Wide::new(ws, rows::<E>(op, "v", &a.v)?)?;
    let y = rows::<E>(op, "y", &a.y)?;
    let saved = Saved {
        dy: dy.rows(),
        q: q.rows(),
        k: k.rows(),
        v: v.rows(),
        lse: rows::<E::Acc>(op, "lse", &a.lse)?,
        scale: E::Acc::of(a.scale),
    };
    let dq = rows_mut::<E>(op, "dq", &a.dq.0)?;
    let dk = rows_mut::<E>(op, "dk", &a.dk.0)?;
    let dv = rows_mut::<E>(op, "dv", &a.dv.0)?;
    clear_padding(&dq, end(shape.seqs.last().map(|(q, _)| q)));
    clear_padding(&dk, end(shape.seqs.last().map(|(_, k)| k)));
    clear_padding(&dv, end(shape.seqs.last().map(|(_, k)| k)));

    let d = shape.d;
    let most = Most::new(&forward_of(a));
    let scratch = ws.per_thread::<E::Acc, 5>(most.pairs, most.backward_parts())?;
    let tasks: Vec<_> = (0..shape.seqs.len() * shape.kv_heads).collect();
    tasks.into_par_iter().for_each(|task| {
        let (s, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
        let keys = shape.seqs[s].1.clone();
        let mut local = scratch.take();
        let mut work = Work::new(local.parts(), keys.len() * d);
        for h in shape.heads_of(kv_head) {
            for block in shape.blocks(s) {
                block_bwd(&saved, &y, &shape, &block, h, &mut work);
                for i in 0..block.rows() {
                    // SAFETY: only this task writes these columns of this row, since sequences and blocks share no rows
                    // and heads share no columns.
                    let dq = unsafe { dq.part(block.q + i, shape.head(h)) };
                    round(dq, &work.dq[i * d..(i + 1) * d]);
                }
            }
        }
        for (i, key) in keys.enumerate() {
            let cols = shape.head(kv_head);
            // SAFETY: as above, with the keys of a sequence and the columns of a key/value head.
            let (dk, dv) = unsafe { (dk.part(key, cols.clone()), dv.part(key, cols)) };
            round(dk, &work.dk[i * d..(i + 1) * d]);
            round(dv, &work.dv[i * d..(i + 1) * d]);
        }
    });
    Ok(())
}

/// The forward call with the arguments of a backward call, for checks and sizes.
fn forward_of<'a>(a: &AttentionBwd<'a>) -> AttentionFwd<'a> {
    AttentionFwd {
        q: a.q,
        k: a.k,
        v: a.v,
        cu_q: a.cu_q,
        cu_k: a.cu_k,
        len_k: None,
        y: Out(a.y),
        lse: Out(a.lse),
        heads: a.heads,
        kv_heads: a.kv_heads,
        head_dim: a.head_dim,
        max_q: a.max_q,
        max_k: a.max_k,
        scale: a.scale,
        causal: a.causal,
    }
}

/// Scratch of one task of the backward pass.
struct Work<'a, R> {
    /// Probabilities of a block, then gradients of its scores.
    p: &'a mut [R],
    /// Gradients of a block's probabilities.
    dp: &'a mut [R],
    /// Gradients of a block's queries.
    dq: &'a mut [R],
    /// Gradients of the keys and values of the sequence, summed over query blocks and heads.
    dk: &'a mut [R],
    dv: &'a mut [R],
}

impl<'a, R: Real> Work<'a, R> {
    /// Scratch with zeros in the first `n` elements of the key and value gradients.
    fn new([p, dp, dq, dk, dv]: [&'a mut [R]; 5], n: usize) -> Self {
        dk[..n].fill(R::zero());
        dv[..n].fill(R::zero());
        Work { p, dp, dq, dk, dv }
    }
}

/// Gradients of one block. Overwrites `dq` and adds to `dk` and `dv`.
fn block_bwd<E: Elem>(
    x: &Saved<E::Acc>,
    y: &Rows<E>,
    shape: &Shape,
    block: &Block,
    h: usize,
    w: &mut Work<'_, E::Acc>,
) {
    let (n, keys, d, cols) = (block.rows(), block.keys, shape.d, shape.head(h));
    let kv_cols = shape.head(h / shape.group);
    let (q, dy) = (block.queries(&x.q, cols.clone()), block.queries(&x.dy, cols.clone()));
    let (k, v) = (block.keys(&x.k, kv_cols.clone()), block.keys(&x.v, kv_cols));

    gemm(q, k.t(), w.p, keys, false);
    probabilities(w.p, block, &x.lse, h, x.scale);
    gemm(Mat::new(w.p, n, keys, keys).t(), dy, w.dv, d, true);
    gemm(dy, v.t(), w.dp, keys, false);
    for i in 0..if keys == 0 { 0 } else { n } {
        let (y, dy) = (&y.row(block.q + i)[cols.clone()], &x.dy.row(block.q + i)[cols.clone()]);
        let delta = lanes::sum2(y, dy, |y, dy| y.up() * dy);
        let (p, dp) = (&mut w.p[i * keys..][..keys], &w.dp[i * keys..][..keys]);
        for (p, &dp) in p.iter_mut().zip(dp) {
            *p *= (dp - delta) * x.scale;
        }
    }
    gemm(Mat::new(w.p, n, keys, keys), k, w.dq, d, false);
    gemm(Mat::new(w.p, n, keys, keys).t(), q, w.dk, d, true);
}

/// Replaces scores by probabilities, 0 where masked.
fn probabilities<R: Real>(p: &mut [R], block: &Block, lse: &Rows<R>, h: usize, scale: R) {
    if block.keys == 0 {
        return;
    }
    pulp::Arch::new().dispatch(|| {
        for (i, (p, &seen)) in p.chunks_mut(block.keys).zip(&block.seen).enumerate() {
            let lse = lse.row(block.q + i)[h];
            let (p, masked) = p.split_at_mut(seen);
            masked.fill(R::zero());
            p.iter_mut().for_each(|x| *x = (*x * scale - lse).fast_exp());
        }
    });
}

fn round<E: Elem>(y: &mut [E], x: &[E::Acc]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = E::down(x);
    }
}
