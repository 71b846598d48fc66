//! Softmax attention over flat batches. Scores exist for one block of query rows of one head at a time.

mod attention_bwd;
mod attention_fwd;
#[cfg(test)]
mod tests;

use std::ops::Range;

use super::*;
pub(super) use attention_bwd::*;
pub(super) use attention_fwd::*;

/// Query rows of a block.
const BLOCK: usize = 64;

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

    /// What [`attention_bwd::Work`] has, in its order.
    fn backward_parts(&self) -> [usize; 5] {
        let [scores, queries] = self.forward_parts();
        let keys = self.keys.saturating_mul(self.d);
        [scores, scores, queries, keys, keys]
    }
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
