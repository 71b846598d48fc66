//! Softmax attention over flat batches. Each task stores the scores of only one block of query rows of one head at a
//! time.

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

/// Upper bounds for any lengths of sequences, for queries: the lengths are on the device, which queries do not read.
struct Most {
    /// Query rows of a block.
    rows: usize,
    /// Keys of a sequence.
    keys: usize,
    d: usize,
    /// Number of pairs of a sequence and a key/value head.
    pairs: usize,
    /// Number of pairs of a block and a key/value head.
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
            // Keys have columns even if there are no query heads.
            d: a.head_dim.min(a.q.dims.cols().max(a.k.dims.cols())),
            pairs: sequences.saturating_mul(a.kv_heads),
            blocks: blocks.saturating_mul(a.kv_heads),
        }
    }

    /// Elements of the scores and outputs of a block.
    fn forward_parts(&self) -> [usize; 2] {
        [self.rows.saturating_mul(self.keys), self.rows.saturating_mul(self.d)]
    }

    /// Elements of the fields of `attention_bwd::Work`, in the same order.
    fn backward_parts(&self) -> [usize; 5] {
        let [scores, queries] = self.forward_parts();
        let keys = self.keys.saturating_mul(self.d);
        [scores, scores, queries, keys, keys]
    }
}

/// The checked shape of a call.
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
        let (n, nk) = (a.q.dims.rows(), a.k.dims.rows());
        let q = sequences(op, "cu_q", &a.cu_q, n, a.max_q)?;
        let k = match &a.len_k {
            Some(len) => slots(op, &a.cu_k, len, nk, a.max_k)?,
            None => sequences(op, "cu_k", &a.cu_k, nk, a.max_k)?,
        };
        Ok(Shape {
            seqs: q.into_iter().zip(k).collect(),
            kv_heads: a.kv_heads,
            group: a.heads / a.kv_heads,
            d: a.head_dim,
            causal: a.causal,
        })
    }

    /// Number of keys visible to query `i` of sequence `s`.
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

    /// The blocks of query rows of sequence `s`.
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

/// Some query rows of a sequence and the keys visible to the last of them.
struct Block {
    /// Index of the first query row in the batch.
    q: usize,
    /// Index of the first key row in the batch.
    k: usize,
    /// Number of keys visible to the last row.
    keys: usize,
    /// Number of keys visible to each row.
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

/// Columns `cols` of rows `start..start + n`.
fn head<'a, R>(x: &Rows<'a, R>, start: usize, n: usize, cols: Range<usize>) -> Mat<'a, R> {
    let data = if n == 0 || cols.is_empty() { &[] } else { &x.data()[start * x.ld + cols.start..] };
    Mat::new(data, n, cols.len(), x.ld)
}

/// The rows of each sequence, from offsets that start at 0 and do not decrease.
fn sequences(
    op: &'static str,
    arg: &'static str,
    cu: &In,
    n: usize,
    max: usize,
) -> Result<Vec<Range<usize>>> {
    let cu = flat::<i32>(op, arg, cu)?;
    let bad = |got: String| Err(Error::arg(op, arg, got, format!("offsets that grow from 0 to at most {n}")));
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

/// The rows of each slot of a cache: `cu[s]..cu[s] + len[s]`. The last offset is not used.
fn slots(op: &'static str, cu: &In, len: &In, n: usize, max: usize) -> Result<Vec<Range<usize>>> {
    let (starts, counts) = (flat::<i32>(op, "cu_k", cu)?, flat::<i32>(op, "len_k", len)?);
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

/// Zeroes the rows from `from` on, which belong to no sequence.
fn clear_padding<T: Elem>(y: &RowsMut<T>, from: usize) {
    for i in from..y.rows {
        // SAFETY: a single thread, and each slice ends before the next is created.
        unsafe { y.row(i) }.fill(T::zeroed());
    }
}

fn end(seq: Option<&Range<usize>>) -> usize {
    seq.map_or(0, |r| r.end)
}
