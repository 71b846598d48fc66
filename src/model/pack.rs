//! Flat batches for the language model: sequences one after another, visual tokens and text side by side.

use std::ops::Range;

use crate::backend::{Kernels, Role};
use crate::error::{Error, Result};
use crate::ops::Seqs;
use crate::tensor::Tensor;

/// A run of a sequence.
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
    /// The same, each predicted from the position before it.
    Codes(usize),
}

impl Part {
    /// Text that is only read.
    pub fn context(ids: Vec<i32>) -> Self {
        Part::Tokens { ids, supervised: false }
    }

    /// Text to learn.
    pub fn target(ids: Vec<i32>) -> Self {
        Part::Tokens { ids, supervised: true }
    }
}

/// A flat batch of N rows, on the device.
pub struct Packed {
    /// `[N]` i32 vocabulary id of each row; -1: none.
    pub text: Tensor,
    /// `[N]` i32 visual row of each row; -1: none.
    pub visual: Tensor,
    /// `[N]` i32 positions, counting from 0 in each sequence.
    pub position: Tensor,
    /// Sequence offsets.
    pub seqs: Seqs,
    /// `[n]` i32 rows that predict a supervised token; -1: padding.
    pub select: Tensor,
    /// `[n]` i32 the token each predicts; -1: padding.
    pub target: Tensor,
    /// Supervised text tokens.
    pub tokens: usize,
    /// Rows that predict a code.
    pub code_rows: Vec<i32>,
    /// The visual row whose code each predicts.
    pub code_of: Vec<usize>,
    /// Rows with content.
    pub rows: usize,
}

impl Packed {
    /// Packs `sequences`; image `i` occupies the visual rows `images[i]`. Row counts are rounded up to a
    /// multiple of `pad`, so that few distinct shapes occur.
    pub fn new(
        dev: &dyn Kernels,
        sequences: &[Vec<Part>],
        images: &[Range<usize>],
        pad: usize,
    ) -> Result<Self> {
        let (mut text, mut visual, mut position) = (Vec::new(), Vec::new(), Vec::new());
        let (mut select, mut target) = (Vec::new(), Vec::new());
        let (mut code_rows, mut code_of) = (Vec::new(), Vec::new());
        let mut lengths = Vec::new();
        for parts in sequences {
            let start = text.len();
            for part in parts {
                match part {
                    Part::Tokens { ids, supervised } => {
                        for &id in ids {
                            if *supervised && text.len() > start {
                                select.push(text.len() as i32 - 1);
                                target.push(id);
                            }
                            text.push(id);
                            visual.push(-1);
                        }
                    }
                    Part::Image(i) | Part::Codes(i) => {
                        let rows = images.get(*i).ok_or_else(|| {
                            Error::arg("pack", "image", i, format!("below {}", images.len()))
                        })?;
                        for row in rows.clone() {
                            if matches!(part, Part::Codes(_)) && text.len() > start {
                                code_rows.push(text.len() as i32 - 1);
                                code_of.push(row);
                            }
                            text.push(-1);
                            visual.push(row as i32);
                        }
                    }
                }
            }
            position.extend((0..(text.len() - start) as i32).collect::<Vec<_>>());
            lengths.push(text.len() - start);
        }
        let (rows, tokens) = (text.len(), target.len());
        if rows == 0 {
            return Err(Error::arg("pack", "sequences", "empty", "at least one token"));
        }
        let n = rows.next_multiple_of(pad.max(1));
        text.resize(n, -1);
        visual.resize(n, -1);
        position.resize(n, 0);
        let m = tokens.next_multiple_of(pad.max(1));
        select.resize(m, -1);
        target.resize(m, -1);
        let put = |v: &[i32]| Tensor::from_host(dev, Role::Input, v, [v.len()]);
        Ok(Packed {
            text: put(&text)?,
            visual: put(&visual)?,
            position: put(&position)?,
            seqs: Seqs::new(dev, &lengths)?,
            select: put(&select)?,
            target: put(&target)?,
            tokens,
            code_rows,
            code_of,
            rows,
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
        assert_eq!((p.tokens, p.rows), (3, 11));
        assert_eq!((p.code_rows, p.code_of), (vec![8, 9], vec![0, 1]));
        assert!(Packed::new(&dev, &[vec![Part::Image(2)]], &[0..2, 2..5], 1).is_err());
        Ok(())
    }
}
