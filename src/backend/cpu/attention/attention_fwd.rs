//! Outputs and log-sum-exps of attention.

use num_traits::{Float, Zero};
use rayon::prelude::*;

use super::*;
use crate::backend::cpu::workspace::{acc_size, per_thread, together, wide};

pub(crate) fn attention_fwd_workspace(a: &AttentionFwd, threads: usize) -> usize {
    let most = Most::new(a);
    let locals = per_thread(threads, acc_size(a.q.dtype), most.blocks, most.forward_parts());
    together([wide(&a.q), wide(&a.k), wide(&a.v), locals])
}

pub(crate) fn attention_fwd(ws: &Workspace, a: &AttentionFwd) -> Result<()> {
    by_dtype!("attention_fwd", a.q.dtype, E => fwd::<E>(ws, a))
}

fn fwd<E: Elem>(ws: &Workspace, a: &AttentionFwd) -> Result<()> {
    let op = "attention_fwd";
    let shape = Shape::new(op, a)?;
    let q = Wide::new(ws, rows::<E>(op, "q", &a.q)?)?;
    let k = Wide::new(ws, rows::<E>(op, "k", &a.k)?)?;
    let v = Wide::new(ws, rows::<E>(op, "v", &a.v)?)?;
    let (q, k, v) = (q.rows(), k.rows(), v.rows());
    let y = rows_mut::<E>(op, "y", &a.y.0)?;
    let lse = rows_mut::<E::Acc>(op, "lse", &a.lse.0)?;
    let used = end(shape.seqs.last().map(|(q, _)| q));
    clear_padding(&y, used);
    clear_padding(&lse, used);

    let mut tasks = Vec::new();
    for s in 0..shape.seqs.len() {
        for kv_head in 0..shape.kv_heads {
            tasks.extend(chunks(shape.seqs[s].0.len(), BLOCK).into_iter().map(|r| (s, kv_head, r)));
        }
    }
    let scale = E::Acc::of(a.scale);
    let most = Most::new(a);
    let scratch = ws.per_thread::<E::Acc, 2>(most.blocks, most.forward_parts())?;
    tasks.into_par_iter().for_each(|(s, kv_head, r)| {
        let block = shape.block(s, r);
        let (n, keys, d) = (block.rows(), block.keys, shape.d);
        let mut local = scratch.take();
        let [p, o] = local.parts();
        let (k, v) = (block.keys(&k, shape.head(kv_head)), block.keys(&v, shape.head(kv_head)));
        for h in shape.heads_of(kv_head) {
            gemm(block.queries(&q, shape.head(h)), k.t(), p, keys, false);
            let stats = softmax(p, &block, scale);
            gemm(Mat::new(p, n, keys, keys), v, o, d, false);
            for (i, (max, sum)) in stats.into_iter().enumerate() {
                // SAFETY: only this task writes these columns of this row, since sequences and blocks share no rows and
                // heads share no columns.
                let (y, lse) =
                    unsafe { (y.part(block.q + i, shape.head(h)), lse.part(block.q + i, h..h + 1)) };
                store(y, &o[i * d..(i + 1) * d], sum);
                lse[0] = if block.seen[i] == 0 { E::Acc::zero() } else { max + sum.ln() };
            }
        }
    });
    Ok(())
}

/// Replaces the scores of a block by their exponentials relative to the row's maximum, 0 where masked. Returns the
/// maximum and the sum of exponentials of each row.
fn softmax<R: Real>(p: &mut [R], block: &Block, scale: R) -> Vec<(R, R)> {
    let mut stats = vec![(R::neg_infinity(), R::zero()); block.rows()];
    if block.keys == 0 {
        return stats;
    }
    pulp::Arch::new().dispatch(|| {
        for ((p, &seen), stats) in p.chunks_mut(block.keys).zip(&block.seen).zip(&mut stats) {
            let (p, masked) = p.split_at_mut(seen);
            masked.fill(R::zero());
            p.iter_mut().for_each(|x| *x *= scale);
            let max = lanes::max(p);
            *stats = (max, lanes::exp_sum(p, max));
        }
    });
    stats
}

/// `y = o / sum`, 0 for a row without keys.
fn store<E: Elem>(y: &mut [E], o: &[E::Acc], sum: E::Acc) {
    let inv = if sum == E::Acc::zero() { E::Acc::zero() } else { sum.recip() };
    for (y, &o) in y.iter_mut().zip(o) {
        *y = E::down(o * inv);
    }
}
