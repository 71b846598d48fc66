//! Softmax attention over flat batches. Scores exist for one block of query rows of one head at a time.

use std::ops::Range;

use num_traits::{Float, Zero};
use rayon::prelude::*;

use super::workspace::{acc_size, per_thread, together, wide};
use super::*;

/// Query rows of a block.
const BLOCK: usize = 64;

pub(super) fn attention_fwd_workspace(a: &AttentionFwd, threads: usize) -> usize {
    let most = Most::new(a);
    let locals = per_thread(threads, acc_size(a.q.dtype), most.blocks, most.forward_parts());
    together([wide(&a.q), wide(&a.k), wide(&a.v), locals])
}

pub(super) fn attention_bwd_workspace(a: &AttentionBwd, threads: usize) -> usize {
    let most = Most::new(&forward_of(a));
    let locals = per_thread(threads, acc_size(a.q.dtype), most.pairs, most.backward_parts());
    together([wide(&a.dy), wide(&a.q), wide(&a.k), wide(&a.v), locals])
}

/// The most of everything that the arguments allow: lengths of sequences are data, which a query does not see.
struct Most {
    /// Query rows of a block.
    rows: usize,
    /// Keys of a sequence.
    keys: usize,
    d: usize,
    /// Pairs of a sequence and a key/value head.
    pairs: usize,
    /// Pairs of a block and a key/value head.
    blocks: usize,
}

impl Most {
    fn new(a: &AttentionFwd) -> Self {
        let (n, nk) = (a.q.dims.rows(), a.k.dims.rows());
        let sequences = a.cu_q.dims.numel().saturating_sub(1);
        let rows = a.max_q.min(n);
        // Every sequence has at most one block that is not full.
        let blocks =
            sequences.saturating_mul(rows.div_ceil(BLOCK)).min((n / BLOCK).saturating_add(sequences));
        Most {
            rows: rows.min(BLOCK),
            keys: a.max_k.min(nk),
            // Without query heads, keys have columns all the same.
            d: a.head_dim.min(a.q.dims.cols().max(a.k.dims.cols())),
            pairs: sequences.saturating_mul(a.kv_heads),
            blocks: blocks.saturating_mul(a.kv_heads),
        }
    }

    /// Scores and outputs of a block.
    fn forward_parts(&self) -> [usize; 2] {
        [self.rows.saturating_mul(self.keys), self.rows.saturating_mul(self.d)]
    }

    /// What [`Work`] has, in its order.
    fn backward_parts(&self) -> [usize; 5] {
        let [scores, queries] = self.forward_parts();
        let keys = self.keys.saturating_mul(self.d);
        [scores, scores, queries, keys, keys]
    }
}

pub(super) fn attention_fwd(ws: &Workspace, a: &AttentionFwd) -> Result<()> {
    by_dtype!("attention_fwd", a.q.dtype, E => fwd::<E>(ws, a))
}

pub(super) fn attention_bwd(ws: &Workspace, a: &AttentionBwd) -> Result<()> {
    by_dtype!("attention_bwd", a.q.dtype, E => bwd::<E>(ws, a))
}

/// The shape of a call, checked.
struct Shape {
    /// Query and key rows of each sequence.
    seqs: Vec<(Range<usize>, Range<usize>)>,
    kv_heads: usize,
    /// Query heads of one key/value head.
    group: usize,
    d: usize,
    causal: bool,
}

impl Shape {
    fn new(op: &'static str, a: &AttentionFwd) -> Result<Self> {
        if a.kv_heads == 0 || !a.heads.is_multiple_of(a.kv_heads) {
            return Err(Error::arg(op, "kv_heads", a.kv_heads, format!("a divisor of {} heads", a.heads)));
        }
        let (n, nk) = (a.q.dims.rows(), a.k.dims.rows());
        let q_cols = a.heads.saturating_mul(a.head_dim);
        let kv_cols = a.kv_heads.saturating_mul(a.head_dim);
        expect_rows(op, "q", &a.q, n, q_cols)?;
        expect_rows(op, "k", &a.k, nk, kv_cols)?;
        expect_rows(op, "v", &a.v, nk, kv_cols)?;
        expect_rows(op, "y", &a.y.0, n, q_cols)?;
        expect_rows(op, "lse", &a.lse.0, n, a.heads)?;
        let q = sequences(op, "cu_q", &a.cu_q, n, a.max_q)?;
        let k = match &a.len_k {
            Some(len) => slots(op, &a.cu_k, len, nk, a.max_k)?,
            None => sequences(op, "cu_k", &a.cu_k, nk, a.max_k)?,
        };
        if q.len() != k.len() {
            return Err(Error::arg(op, "cu_k", a.cu_k.dims, a.cu_q.dims));
        }
        Ok(Shape {
            seqs: q.into_iter().zip(k).collect(),
            kv_heads: a.kv_heads,
            group: a.heads / a.kv_heads,
            d: a.head_dim,
            causal: a.causal,
        })
    }

    /// Keys that query `i` of sequence `s` sees.
    fn seen(&self, s: usize, i: usize) -> usize {
        let (t, tk) = (self.seqs[s].0.len(), self.seqs[s].1.len());
        if self.causal { (i + 1 + tk).saturating_sub(t) } else { tk }
    }

    /// Columns of a head.
    fn head(&self, h: usize) -> Range<usize> {
        h * self.d..(h + 1) * self.d
    }

    /// Query heads of a key/value head.
    fn heads_of(&self, kv_head: usize) -> Range<usize> {
        kv_head * self.group..(kv_head + 1) * self.group
    }

    /// Blocks of the query rows of sequence `s`.
    fn blocks(&self, s: usize) -> impl Iterator<Item = Block> {
        chunks(self.seqs[s].0.len(), BLOCK).into_iter().map(move |r| self.block(s, r))
    }

    fn block(&self, s: usize, r: Range<usize>) -> Block {
        let (q, k) = &self.seqs[s];
        Block {
            q: q.start + r.start,
            k: k.start,
            keys: self.seen(s, r.end - 1),
            seen: r.map(|i| self.seen(s, i)).collect(),
        }
    }
}

/// Some query rows of a sequence and the keys that the last of them sees.
struct Block {
    /// First query row of the batch.
    q: usize,
    /// First key row of the batch.
    k: usize,
    /// Keys that any row sees.
    keys: usize,
    /// Keys that each row sees.
    seen: Vec<usize>,
}

impl Block {
    fn rows(&self) -> usize {
        self.seen.len()
    }

    /// The block's query rows of one head.
    fn queries<'a, R>(&self, x: &Rows<'a, R>, cols: Range<usize>) -> Mat<'a, R> {
        head(x, self.q, self.rows(), cols)
    }

    /// The block's key rows of one head.
    fn keys<'a, R>(&self, x: &Rows<'a, R>, cols: Range<usize>) -> Mat<'a, R> {
        head(x, self.k, self.keys, cols)
    }
}

/// Some columns of rows `start..start + n`.
fn head<'a, R>(x: &Rows<'a, R>, start: usize, n: usize, cols: Range<usize>) -> Mat<'a, R> {
    let data = if n == 0 || cols.is_empty() { &[] } else { &x.data()[start * x.ld + cols.start..] };
    Mat::new(data, n, cols.len(), x.ld)
}

/// The rows of each sequence, from offsets that start at 0 and never fall.
fn sequences(
    op: &'static str,
    arg: &'static str,
    cu: &In,
    n: usize,
    max: usize,
) -> Result<Vec<Range<usize>>> {
    let cu = flat::<i32>(op, arg, cu)?;
    let bad = |got: String| Err(Error::arg(op, arg, got, format!("offsets that rise from 0 to at most {n}")));
    if cu.first() != Some(&0) {
        return bad(format!("an array that starts with {:?}", cu.first()));
    }
    let mut seqs = Vec::with_capacity(cu.len() - 1);
    for w in cu.windows(2) {
        let (start, end) = (w[0] as usize, w[1] as usize);
        if w[1] < w[0] || end > n {
            return bad(format!("{} after {}", w[1], w[0]));
        }
        if end - start > max {
            return Err(Error::arg(
                op,
                arg,
                format!("a sequence of {}", end - start),
                format!("at most {max}"),
            ));
        }
        seqs.push(start..end);
    }
    Ok(seqs)
}

/// The rows of each slot of a cache: `len[s]` from `cu[s]` on; the last offset means nothing.
fn slots(op: &'static str, cu: &In, len: &In, n: usize, max: usize) -> Result<Vec<Range<usize>>> {
    let (starts, counts) = (flat::<i32>(op, "cu_k", cu)?, flat::<i32>(op, "len_k", len)?);
    if counts.len() + 1 != starts.len() {
        return Err(Error::arg(op, "len_k", len.dims, format!("one less than the {} offsets", starts.len())));
    }
    let slot = |(&start, &count): (&i32, &i32)| {
        let Some(room) = usize::try_from(start).ok().and_then(|s| n.checked_sub(s)) else {
            return Err(Error::arg(op, "cu_k", start, format!("a row from 0 to {n}")));
        };
        let start = n - room;
        match usize::try_from(count) {
            Ok(count) if count <= room.min(max) => Ok(start..start + count),
            _ => {
                Err(Error::arg(op, "len_k", count, format!("from 0 to {} after row {start}", room.min(max))))
            }
        }
    };
    starts.iter().zip(counts).map(slot).collect()
}

/// Zeroes the rows that belong to no sequence.
fn clear_padding<T: Elem>(y: &RowsMut<T>, from: usize) {
    for i in from..y.rows {
        // SAFETY: one thread, and each row is done with before the next.
        unsafe { y.row(i) }.fill(T::zeroed());
    }
}

fn end(seq: Option<&Range<usize>>) -> usize {
    seq.map_or(0, |r| r.end)
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
                // SAFETY: one task writes these columns of this row: sequences and blocks share no rows, heads no columns.
                let (y, lse) =
                    unsafe { (y.part(block.q + i, shape.head(h)), lse.part(block.q + i, h..h + 1)) };
                store(y, &o[i * d..(i + 1) * d], sum);
                lse[0] = if block.seen[i] == 0 { E::Acc::zero() } else { max + sum.ln() };
            }
        }
    });
    Ok(())
}

/// Exponentiates the scores of a block, 0 where masked; the maximum and the sum of each row.
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

/// `y = o / sum`, 0 for a row that attends to nothing.
fn store<E: Elem>(y: &mut [E], o: &[E::Acc], sum: E::Acc) {
    let inv = if sum == E::Acc::zero() { E::Acc::zero() } else { sum.recip() };
    for (y, &o) in y.iter_mut().zip(o) {
        *y = E::down(o * inv);
    }
}

/// What the backward of one sequence and key/value head reads, widened.
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
    for (arg, v, like) in
        [("dy", &a.dy, &a.q), ("dq", &a.dq.0, &a.q), ("dk", &a.dk.0, &a.k), ("dv", &a.dv.0, &a.v)]
    {
        expect_rows(op, arg, v, like.dims.rows(), like.dims.cols())?;
    }
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
                    // SAFETY: one task writes these columns of this row: sequences and blocks share no rows, heads no
                    // columns.
                    let dq = unsafe { dq.part(block.q + i, shape.head(h)) };
                    round(dq, &work.dq[i * d..(i + 1) * d]);
                }
            }
        }
        for (i, key) in keys.enumerate() {
            let cols = shape.head(kv_head);
            // SAFETY: likewise for the keys of a sequence and the columns of a key/value head.
            let (dk, dv) = unsafe { (dk.part(key, cols.clone()), dv.part(key, cols)) };
            round(dk, &work.dk[i * d..(i + 1) * d]);
            round(dv, &work.dv[i * d..(i + 1) * d]);
        }
    });
    Ok(())
}

/// The forward call that a backward call belongs to.
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

/// Scratch of one task of the backward.
struct Work<'a, R> {
    /// Probabilities, then score gradients of a block.
    p: &'a mut [R],
    /// Gradients of a block's probabilities.
    dp: &'a mut [R],
    /// Query gradients of a block.
    dq: &'a mut [R],
    /// Key and value gradients of the sequence, summed over query blocks and heads.
    dk: &'a mut [R],
    dv: &'a mut [R],
}

impl<'a, R: Real> Work<'a, R> {
    /// For key gradients of `n` elements.
    fn new([p, dp, dq, dk, dv]: [&'a mut [R]; 5], n: usize) -> Self {
        dk[..n].fill(R::zero());
        dv[..n].fill(R::zero());
        Work { p, dp, dq, dk, dv }
    }
}

/// Gradients of one block: `dq` overwritten, `dk` and `dv` added to.
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

/// From scores to probabilities, 0 where masked.
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

#[cfg(test)]
mod tests {
    use super::super::testing_b::*;
    use super::*;

    /// Sequence lengths of queries and keys, heads, key/value heads, head dimension, mask, padding rows.
    #[derive(Clone, Copy)]
    struct Case(&'static [(usize, usize)], usize, usize, usize, bool, usize);

    const CASES: [Case; 5] = [
        Case(&[(1, 1)], 1, 1, 1, true, 0),
        Case(&[(7, 7), (0, 0), (5, 11), (1, 13)], 6, 2, 3, true, 2),
        Case(&[(7, 3), (0, 2), (2, 0)], 2, 2, 5, true, 1),
        Case(&[(3, 17), (131, 131)], 2, 1, 16, true, 0),
        Case(&[(67, 31), (5, 129)], 3, 3, 8, false, 3),
    ];

    impl Case {
        fn cu(&self, of: impl Fn(&(usize, usize)) -> usize) -> Vec<f64> {
            let ends = self.0.iter().scan(0, |at, s| {
                *at += of(s);
                Some(*at as f64)
            });
            std::iter::once(0.0).chain(ends).collect()
        }
        fn rows(&self) -> (usize, usize) {
            let sum = |f: fn(&(usize, usize)) -> usize| self.0.iter().map(f).sum::<usize>() + self.5;
            (sum(|s| s.0), sum(|s| s.1))
        }
        /// q; k and v as columns of one tensor; offsets; dy; y and lse.
        fn args(&self) -> Vec<Arg> {
            let Case(_, h, kv, d, ..) = *self;
            let (n, nk) = self.rows();
            let (cu_q, cu_k) = (self.cu(|s| s.0), self.cu(|s| s.1));
            let mut args = vec![
                act([n, h * d], normal(1, n * h * d)),
                act([nk, 2 * kv * d], normal(2, nk * 2 * kv * d)),
                int([cu_q.len()], cu_q),
                int([cu_k.len()], cu_k),
                act([n, h * d], normal(3, n * h * d)),
            ];
            let values: Vec<_> = args.iter().map(|a| a.2.clone()).collect();
            let mut saved = self.naive(&values);
            let (lse, y) = (saved.remove(1), saved.remove(0));
            args.extend([act([n, h * d], y), acc([n, h], lse)]);
            args
        }
        fn scale(&self) -> f64 {
            (self.3 as f64).powf(-0.5)
        }

        /// y and lse.
        fn fwd(&self, dev: &Cpu, p: Precision, t: &[Tensor]) -> Result<Vec<Tensor>> {
            let Case(seqs, heads, kv_heads, head_dim, causal, _) = *self;
            let n = self.rows().0;
            let (y, lse) = (out(dev, p.act, [n, heads * head_dim]), out(dev, p.acc, [n, heads]));
            let width = kv_heads * head_dim;
            let (k, v) = (t[1].columns(0, width)?, t[1].columns(width, width)?);
            let a = AttentionFwd {
                q: t[0].view(),
                k: k.view(),
                v: v.view(),
                cu_q: t[2].view(),
                cu_k: t[3].view(),
                len_k: None,
                y: y.out(),
                lse: lse.out(),
                heads,
                kv_heads,
                head_dim,
                max_q: seqs.iter().map(|s| s.0).max().unwrap(),
                max_k: seqs.iter().map(|s| s.1).max().unwrap(),
                scale: self.scale(),
                causal,
            };
            dev.attention_fwd(S, &a)?;
            Ok(vec![y, lse])
        }

        /// dq and the fused gradient of k and v.
        fn bwd(&self, dev: &Cpu, p: Precision, t: &[Tensor]) -> Result<Vec<Tensor>> {
            let Case(seqs, heads, kv_heads, head_dim, causal, _) = *self;
            let (n, nk) = self.rows();
            let width = kv_heads * head_dim;
            let (dq, dkv) = (out(dev, p.act, [n, heads * head_dim]), out(dev, p.act, [nk, 2 * width]));
            let (k, v) = (t[1].columns(0, width)?, t[1].columns(width, width)?);
            let (dk, dv) = (dkv.columns(0, width)?, dkv.columns(width, width)?);
            let a = AttentionBwd {
                dy: t[4].view(),
                q: t[0].view(),
                k: k.view(),
                v: v.view(),
                y: t[5].view(),
                lse: t[6].view(),
                cu_q: t[2].view(),
                cu_k: t[3].view(),
                dq: dq.out(),
                dk: dk.out(),
                dv: dv.out(),
                heads,
                kv_heads,
                head_dim,
                max_q: seqs.iter().map(|s| s.0).max().unwrap(),
                max_k: seqs.iter().map(|s| s.1).max().unwrap(),
                scale: self.scale(),
                causal,
            };
            dev.attention_bwd(S, &a)?;
            Ok(vec![dq, dkv])
        }

        fn naive(&self, v: &[Vec<f64>]) -> Vec<Vec<f64>> {
            let Case(seqs, heads, kv, d, causal, _) = *self;
            let n = self.rows().0;
            let (mut y, mut lse) = (vec![0.0; n * heads * d], vec![0.0; n * heads]);
            for (s, &(t, tk)) in seqs.iter().enumerate() {
                let (q0, k0) = (v[2][s] as usize, v[3][s] as usize);
                for (i, h) in (0..t).flat_map(|i| (0..heads).map(move |h| (i, h))) {
                    let g = h / (heads / kv);
                    let row = (q0 + i) * heads + h;
                    let key = |j: usize, c: usize| v[1][(k0 + j) * 2 * kv * d + g * d + c];
                    let keys: Vec<usize> = (0..tk).filter(|j| !causal || j + t <= i + tk).collect();
                    let score =
                        |j: usize| self.scale() * (0..d).map(|c| v[0][row * d + c] * key(j, c)).sum::<f64>();
                    let sum: f64 = keys.iter().map(|&j| score(j).exp()).sum();
                    for &j in &keys {
                        for c in 0..d {
                            y[row * d + c] += score(j).exp() / sum * key(j, kv * d + c);
                        }
                    }
                    lse[row] = if keys.is_empty() { 0.0 } else { sum.ln() };
                }
            }
            vec![y, lse]
        }
    }

    #[test]
    fn forward_matches_a_naive_loop() {
        for case in CASES {
            check(&case.args(), |v| case.naive(v), |dev, p, t| case.fwd(dev, p, t));
        }
    }

    #[test]
    fn backward_matches_in_every_precision() {
        for case in CASES {
            check_self(&case.args(), |dev, p, t| case.bwd(dev, p, t));
        }
    }

    #[test]
    fn backward_matches_finite_differences() {
        for case in &CASES[..3] {
            let loss = |dev: &Cpu, t: &[Tensor]| {
                let v = read(dev, &[case.fwd(dev, Precision::F64, t)?[0].clone(), t[4].clone()]);
                Ok(v[0].iter().zip(&v[1]).map(|(y, dy)| y * dy).sum())
            };
            check_grad(&case.args(), &[0, 1], loss, |dev, t| case.bwd(dev, Precision::F64, t));
        }
    }

    #[test]
    fn slots_of_a_cache_give_the_bits_of_keys_without_gaps() {
        // Keys of 3, 1 and 2 rows at 4, 9 and 1 of 11.
        let case = Case(&[(1, 3), (1, 1), (2, 2)], 2, 1, 4, true, 0);
        let (args, p, dev) = (case.args(), Precision::F32, Cpu::poisoned(2).unwrap());
        let packed = case.fwd(&dev, p, &tensors(&dev, p, &args)).unwrap();
        let mut cache = vec![f64::NAN; 11 * 8];
        for (from, to) in [(0, 4), (1, 5), (2, 6), (3, 9), (4, 1), (5, 2)] {
            cache[to * 8..][..8].copy_from_slice(&args[1].2[from * 8..][..8]);
        }
        let [kv, starts, len] =
            [act([11, 8], cache), int([4], vec![4.0, 9.0, 1.0, -7.0]), int([3], vec![3.0, 1.0, 2.0])]
                .map(|a| tensors(&dev, p, &[a]).remove(0));
        let q = tensors(&dev, p, &args);
        let (y, lse) = (out(&dev, p.act, [4, 8]), out(&dev, p.acc, [4, 2]));
        let (k, v) = (kv.columns(0, 4).unwrap(), kv.columns(4, 4).unwrap());
        let a = AttentionFwd {
            q: q[0].view(),
            k: k.view(),
            v: v.view(),
            cu_q: q[2].view(),
            cu_k: starts.view(),
            len_k: Some(len.view()),
            y: y.out(),
            lse: lse.out(),
            heads: 2,
            kv_heads: 1,
            head_dim: 4,
            max_q: 2,
            max_k: 3,
            scale: case.scale(),
            causal: true,
        };
        dev.attention_fwd(S, &a).unwrap();
        assert_eq!(read(&dev, &[y, lse]), read(&dev, &packed));
    }

    #[test]
    fn large_scores_stay_finite() {
        let case = CASES[1];
        let mut args = case.args();
        args[0].2.iter_mut().for_each(|x| *x *= 1e4);
        let dev = Cpu::poisoned(2).unwrap();
        let mut t = tensors(&dev, Precision::F32, &args);
        let saved = case.fwd(&dev, Precision::F32, &t).unwrap();
        t.splice(5.., saved);
        for t in case.bwd(&dev, Precision::F32, &t).unwrap() {
            assert!(t.to_f64(&dev).unwrap().iter().all(|x| x.is_finite()));
        }
    }

    #[test]
    fn bad_offsets_are_errors() {
        let case = Case(&[(2, 2), (1, 1)], 1, 1, 2, false, 0);
        let dev = Cpu::poisoned(2).unwrap();
        for (arg, cu) in
            [(2, [0.0, 2.0, 4.0]), (2, [0.0, 3.0, 2.0]), (3, [1.0, 2.0, 3.0]), (3, [0.0, 0.0, 3.0])]
        {
            let mut args = case.args();
            args[arg].2 = cu.to_vec();
            let t = tensors(&dev, Precision::F32, &args);
            let e = case.fwd(&dev, Precision::F32, &t).unwrap_err().to_string();
            assert!(e.starts_with("attention_fwd: argument `cu_"), "{e}");
        }
    }
}
