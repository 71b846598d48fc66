//! Flat batches for the language model: sequences are concatenated, visual tokens and text in the same rows.

use std::ops::Range;

use crate::backend::{Kernels, Role, Stream};
use crate::error::{Error, Result};
use crate::ops::Seqs;
use crate::tensor::Tensor;

/// A contiguous part of a sequence.
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    /// Text tokens; supervised ones are predicted from the position before them.
    Tokens {
        /// Vocabulary ids.
        ids: Vec<i32>,
        /// Whether they count in the loss.
        supervised: bool,
    },
    /// The visual tokens of an image of the batch, row by row.
    Image(usize),
    /// The same, with each token predicted from the position before it.
    Codes(usize),
}

impl Part {
    /// Text that is not predicted.
    pub fn context(ids: Vec<i32>) -> Self {
        Part::Tokens { ids, supervised: false }
    }

    /// Text that is predicted.
    pub fn target(ids: Vec<i32>) -> Self {
        Part::Tokens { ids, supervised: true }
    }
}

/// A flat batch of N rows, on the host.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FlatBatch {
    text: Vec<i32>,
    visual: Vec<i32>,
    position: Vec<i32>,
    lengths: Vec<usize>,
    select: Vec<i32>,
    target: Vec<i32>,
    code_rows: Vec<i32>,
    code_of: Vec<usize>,
    tokens: usize,
    rows: usize,
}

impl FlatBatch {
    /// Lays out `sequences`; image `i` occupies the visual rows `images[i]`. Row counts are rounded up to a multiple
    /// of `pad`, which keeps the number of distinct shapes small.
    pub fn new(sequences: &[Vec<Part>], images: &[Range<usize>], pad: usize) -> Result<Self> {
        let mut b = FlatBatch::default();
        for parts in sequences {
            let start = b.text.len();
            for part in parts {
                match part {
                    Part::Tokens { ids, supervised } => {
                        for &id in ids {
                            if *supervised && b.text.len() > start {
                                b.select.push(b.text.len() as i32 - 1);
                                b.target.push(id);
                            }
                            b.text.push(id);
                            b.visual.push(-1);
                        }
                    }
                    Part::Image(i) | Part::Codes(i) => {
                        let rows = images.get(*i).ok_or_else(|| {
                            Error::arg("pack", "image", i, format!("below {}", images.len()))
                        })?;
                        for row in rows.clone() {
                            if matches!(part, Part::Codes(_)) && b.text.len() > start {
                                b.code_rows.push(b.text.len() as i32 - 1);
                                b.code_of.push(row);
                            }
                            b.text.push(-1);
                            b.visual.push(row as i32);
                        }
                    }
                }
            }
            b.position.extend(0..(b.text.len() - start) as i32);
            b.lengths.push(b.text.len() - start);
        }
        (b.rows, b.tokens) = (b.text.len(), b.target.len());
        if b.rows == 0 {
            return Err(Error::arg("pack", "sequences", "empty", "at least one token"));
        }
        let n = b.rows.next_multiple_of(pad.max(1));
        b.text.resize(n, -1);
        b.visual.resize(n, -1);
        b.position.resize(n, 0);
        let m = b.tokens.next_multiple_of(pad.max(1));
        b.select.resize(m, -1);
        b.target.resize(m, -1);
        Ok(b)
    }
}

/// A flat batch of N rows, on the device.
pub struct Packed {
    /// `[N]` i32 vocabulary id of each row, or -1.
    pub text: Tensor,
    /// `[N]` i32 visual row of each row, or -1.
    pub visual: Tensor,
    /// `[N]` i32 positions, starting from 0 in each sequence.
    pub position: Tensor,
    /// Sequence offsets.
    pub seqs: Seqs,
    /// `[n]` i32 rows that predict a supervised token, padded with -1.
    pub select: Tensor,
    /// `[n]` i32 the tokens they predict, padded with -1.
    pub target: Tensor,
    /// Number of supervised text tokens.
    pub tokens: usize,
    /// Rows that predict a code.
    pub code_rows: Vec<i32>,
    /// For each of them, the visual row whose code it predicts.
    pub code_of: Vec<usize>,
    /// Number of rows without the padding.
    pub rows: usize,
}

impl Packed {
    /// Lays out a batch as [`FlatBatch::new`] does and uploads it.
    pub fn new(
        dev: &dyn Kernels,
        sequences: &[Vec<Part>],
        images: &[Range<usize>],
        pad: usize,
    ) -> Result<Self> {
        Self::upload(dev, &FlatBatch::new(sequences, images, pad)?)
    }

    /// Uploads a batch.
    pub fn upload(dev: &dyn Kernels, b: &FlatBatch) -> Result<Self> {
        let put = |v: &[i32]| Tensor::from_host(dev, Role::Input, v, [v.len()]);
        Ok(Packed {
            text: put(&b.text)?,
            visual: put(&b.visual)?,
            position: put(&b.position)?,
            seqs: Seqs::new(dev, &b.lengths)?,
            select: put(&b.select)?,
            target: put(&b.target)?,
            tokens: b.tokens,
            code_rows: b.code_rows.clone(),
            code_of: b.code_of.clone(),
            rows: b.rows,
        })
    }

    /// Overwrites this batch in place, for a recorded step that reads it. The shapes of the recording have to fit:
    /// row counts, the number of sequences and the number of codes stay the same, and no sequence is longer than the
    /// longest before.
    pub fn refill(&mut self, dev: &dyn Kernels, b: &FlatBatch) -> Result<()> {
        let shape = |n: usize, m: usize, s: usize, c: usize| {
            format!("{n} rows, {m} targets, {s} sequences, {c} codes")
        };
        let got = shape(b.text.len(), b.target.len(), b.lengths.len(), b.code_rows.len());
        let s = self.seqs.cu.dims().numel() - 1;
        let want = shape(self.text.dims().numel(), self.target.dims().numel(), s, self.code_rows.len());
        if got != want {
            return Err(Error::arg("refill", "rows", got, want));
        }
        let put = |v: &[i32], t: &Tensor| dev.copy_in(Stream::COMPUTE, bytemuck::cast_slice(v), t.out());
        self.seqs.refill(dev, &b.lengths)?;
        put(&b.text, &self.text)?;
        put(&b.visual, &self.visual)?;
        put(&b.position, &self.position)?;
        put(&b.select, &self.select)?;
        put(&b.target, &self.target)?;
        (self.tokens, self.rows) = (b.tokens, b.rows);
        (self.code_rows, self.code_of) = (b.code_rows.clone(), b.code_of.clone());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Cpu;

    #[test]
    fn rows_targets_and_positions() -> Result<()> {
        let dev = Cpu::poisoned(1)?;
        let seqs = [
            vec![Part::context(vec![7]), Part::Image(1), Part::target(vec![3, 4])],
            vec![Part::target(vec![5, 6])],
            vec![Part::context(vec![9]), Part::Codes(0)],
        ];
        let p = Packed::new(&dev, &seqs, &[0..2, 2..5], 8)?;
        assert_eq!(p.text.to_host::<i32>(&dev)?, [7, -1, -1, -1, 3, 4, 5, 6, 9, -1, -1, -1, -1, -1, -1, -1]);
        assert_eq!(p.visual.to_host::<i32>(&dev)?[..12], [-1, 2, 3, 4, -1, -1, -1, -1, -1, 0, 1, -1]);
        assert_eq!(p.position.to_host::<i32>(&dev)?[..11], [0, 1, 2, 3, 4, 5, 0, 1, 0, 1, 2]);
        assert_eq!(p.seqs.cu.to_host::<i32>(&dev)?, [0, 6, 8, 11]);
        // The first token of a sequence cannot be predicted.
        assert_eq!(p.select.to_host::<i32>(&dev)?, [3, 4, 6, -1, -1, -1, -1, -1]);
        assert_eq!(p.target.to_host::<i32>(&dev)?, [3, 4, 6, -1, -1, -1, -1, -1]);
        assert_eq!((p.tokens, p.rows), (3, 11));
        assert_eq!((&p.code_rows[..], &p.code_of[..]), (&[8, 9][..], &[0, 1][..]));
        assert!(Packed::new(&dev, &[vec![Part::Image(2)]], &[0..2, 2..5], 1).is_err());
        // A refilled batch equals a new one and keeps its addresses.
        let (mut p, at) = (p, Packed::new(&dev, &seqs, &[0..2, 2..5], 8)?.text.dims());
        let other = [
            vec![Part::context(vec![1]), Part::Image(0), Part::target(vec![3])],
            vec![Part::target(vec![5, 6, 2])],
            vec![Part::context(vec![8]), Part::Codes(0)],
        ];
        let rows = FlatBatch::new(&other, &[0..2, 2..5], 8)?;
        let address = p.text.view().addr();
        p.refill(&dev, &rows)?;
        let fresh = Packed::upload(&dev, &rows)?;
        assert_eq!((p.text.view().addr(), p.text.dims()), (address, at));
        for (a, b) in [(&p.text, &fresh.text), (&p.target, &fresh.target), (&p.seqs.cu, &fresh.seqs.cu)] {
            assert_eq!(a.to_host::<i32>(&dev)?, b.to_host::<i32>(&dev)?);
        }
        assert_eq!((p.tokens, p.rows), (fresh.tokens, fresh.rows));
        let longer = [other.concat(), vec![Part::target(vec![1])], vec![Part::Image(0)]];
        let e =
            p.refill(&dev, &FlatBatch::new(&longer, &[0..2, 2..5], 8)?).expect_err("one sequence is longer");
        assert!(e.to_string().contains("lengths"), "{e}");
        let fewer = FlatBatch::new(&other[..2], &[0..2, 2..5], 8)?;
        assert!(p.refill(&dev, &fewer).is_err(), "two sequences are not three");
        Ok(())
    }
}
