//! Flat batches for the language model: sequences are concatenated, visual tokens and text in the same rows.

use std::ops::Range;

use crate::backend::{DType, Kernels, Stream};
use crate::error::{Error, Result};
use crate::ops::{Seqs, offsets};
use crate::tensor::{Block, Parts, Tensor};

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
    offsets: Vec<i32>,
    select: Vec<i32>,
    target: Vec<i32>,
    code_rows: Vec<i32>,
    code_of: Vec<i32>,
    longest: usize,
    tokens: usize,
    codes: usize,
    rows: usize,
}

/// The sizes of a flat batch. Steps with equal sizes make the same launches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Rows N.
    pub rows: usize,
    /// Sequences S.
    pub sequences: usize,
    /// Upper bound of the length of a sequence.
    pub longest: usize,
    /// Supervised text tokens, with the padding.
    pub targets: usize,
    /// Supervised codes, with the padding.
    pub codes: usize,
}

impl FlatBatch {
    /// Lays out `sequences`; image `i` occupies the visual rows `images[i]`. Row counts are rounded up to a multiple
    /// of `pad`, which keeps the number of distinct shapes small.
    pub fn new(sequences: &[Vec<Part>], images: &[Range<usize>], pad: usize) -> Result<Self> {
        let mut b = FlatBatch::default();
        let mut lengths = Vec::new();
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
                                b.code_of.push(row as i32);
                            }
                            b.text.push(-1);
                            b.visual.push(row as i32);
                        }
                    }
                }
            }
            b.position.extend(0..(b.text.len() - start) as i32);
            lengths.push(b.text.len() - start);
        }
        (b.rows, b.tokens, b.codes) = (b.text.len(), b.target.len(), b.code_rows.len());
        if b.rows == 0 {
            return Err(Error::arg("pack", "sequences", "empty", "at least one token"));
        }
        b.offsets = offsets(&lengths)?;
        let longest = lengths.into_iter().max().unwrap_or(0);
        let round = |n: usize| n.next_multiple_of(pad.max(1));
        b.pad(Sizes { rows: round(b.rows), longest, targets: round(b.tokens), codes: b.codes, ..b.sizes() });
        Ok(b)
    }

    /// Pads the batch to `sizes` if it fits into them, so that steps with different batches make the same launches.
    pub fn widen(&mut self, sizes: Sizes) {
        let Sizes { rows, sequences, longest, targets, codes } = sizes;
        let fits =
            self.rows <= rows && self.longest <= longest && self.tokens <= targets && self.codes <= codes;
        if fits && self.sizes().sequences == sequences {
            self.pad(sizes);
        }
    }

    fn pad(&mut self, sizes: Sizes) {
        let Sizes { rows, longest, targets, codes, .. } = sizes;
        self.longest = longest;
        for v in [&mut self.text, &mut self.visual] {
            v.resize(rows, -1);
        }
        self.position.resize(rows, 0);
        for v in [&mut self.select, &mut self.target] {
            v.resize(targets, -1);
        }
        for v in [&mut self.code_rows, &mut self.code_of] {
            v.resize(codes, -1);
        }
    }

    /// The sizes with the padding.
    pub fn sizes(&self) -> Sizes {
        Sizes {
            rows: self.text.len(),
            sequences: self.offsets.len().saturating_sub(1),
            longest: self.longest,
            targets: self.target.len(),
            codes: self.code_rows.len(),
        }
    }

    /// Number of supervised text tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Number of supervised codes.
    pub fn codes(&self) -> usize {
        self.codes
    }

    /// Number of rows without the padding.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The arrays that a device reads, under the names of [`Packed`].
    pub fn arrays(&self) -> [(&'static str, &[i32]); 8] {
        [
            ("text", &self.text),
            ("visual", &self.visual),
            ("position", &self.position),
            ("offsets", &self.offsets),
            ("select", &self.select),
            ("target", &self.target),
            ("code_rows", &self.code_rows),
            ("code_of", &self.code_of),
        ]
    }

    /// Appends the arrays to a block; [`Packed::of`] finds them there.
    pub fn write(&self, block: &mut Block) {
        for (_, array) in self.arrays() {
            block.push(array);
        }
    }
}

/// A flat batch of N rows, on the device. Rows, targets and codes may end with padding.
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
    /// `[c]` i32 rows that predict a code, padded with -1.
    pub code_rows: Tensor,
    /// `[c]` i32 the visual rows whose codes they predict, padded with -1.
    pub code_of: Tensor,
}

impl Packed {
    /// Lays out a batch as [`FlatBatch::new`] does and copies it to the device.
    pub fn new(
        dev: &dyn Kernels,
        sequences: &[Vec<Part>],
        images: &[Range<usize>],
        pad: usize,
    ) -> Result<Self> {
        Self::upload(dev, &FlatBatch::new(sequences, images, pad)?)
    }

    /// Copies a batch to the device.
    pub fn upload(dev: &dyn Kernels, b: &FlatBatch) -> Result<Self> {
        let mut block = Block::default();
        b.write(&mut block);
        Self::of(&mut Parts::of(&block.upload(dev, Stream::COMPUTE)?), b.sizes())
    }

    /// A batch of these sizes that was written into a block.
    pub fn of(block: &mut Parts, sizes: Sizes) -> Result<Self> {
        let Sizes { rows, sequences, longest, targets, codes } = sizes;
        let mut take = |n: usize| block.take(DType::I32, [n]);
        let (text, visual, position) = (take(rows)?, take(rows)?, take(rows)?);
        Ok(Packed {
            text,
            visual,
            position,
            seqs: Seqs { cu: take(sequences + 1)?, max: longest, total: rows },
            select: take(targets)?,
            target: take(targets)?,
            code_rows: take(codes)?,
            code_of: take(codes)?,
        })
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
        assert_eq!(p.code_rows.to_host::<i32>(&dev)?, [8, 9]);
        assert_eq!(p.code_of.to_host::<i32>(&dev)?, [0, 1]);
        assert!(Packed::new(&dev, &[vec![Part::Image(2)]], &[0..2, 2..5], 1).is_err());
        Ok(())
    }

    #[test]
    fn batches_are_widened_to_common_sizes() -> Result<()> {
        let sequences = [
            vec![Part::context(vec![7]), Part::Codes(0), Part::target(vec![3])],
            vec![Part::context(vec![5]), Part::target(vec![6])],
        ];
        let b = FlatBatch::new(&sequences, std::slice::from_ref(&(0..2)), 1)?;
        assert_eq!((b.tokens(), b.codes(), b.rows()), (2, 2, 6));
        let sizes = Sizes { rows: 8, sequences: 2, longest: 5, targets: 3, codes: 4 };
        let mut wide = b.clone();
        wide.widen(sizes);
        assert_eq!((wide.sizes(), wide.tokens(), wide.codes(), wide.rows()), (sizes, 2, 2, 6));
        let arrays = |b: &FlatBatch| b.arrays().map(|(_, v)| v.to_vec());
        assert_eq!(
            arrays(&wide),
            [
                vec![7, -1, -1, 3, 5, 6, -1, -1],
                vec![-1, 0, 1, -1, -1, -1, -1, -1],
                vec![0, 1, 2, 3, 0, 1, 0, 0],
                vec![0, 4, 6],
                vec![2, 4, -1],
                vec![3, 6, -1],
                vec![0, 1, -1, -1],
                vec![0, 1, -1, -1],
            ]
        );
        // What does not fit stays as it is.
        for small in [
            Sizes { rows: 5, ..sizes },
            Sizes { longest: 3, ..sizes },
            Sizes { targets: 1, ..sizes },
            Sizes { codes: 1, ..sizes },
            Sizes { sequences: 3, ..sizes },
        ] {
            let mut same = b.clone();
            same.widen(small);
            assert_eq!(same, b);
        }
        Ok(())
    }
}
