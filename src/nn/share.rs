//! How ranks share a flat group: docs/ranks.md.
//!
//! A group is cut into *spans* of whole parameters, whose gradients are summed over the ranks at a time. A span consists of
//! *pieces*, with which collectives work; of each piece every rank has one of equal *parts* of its own.

use std::ops::Range;

use crate::backend::Kernels;

/// Items start at multiples of this many elements, as do the parts of ranks: 256 bytes in the smallest type.
pub(super) const ALIGN: usize = 128;

/// What ranks share of what they keep per parameter, besides the sums of gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sharing {
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub ranks: usize,
    /// Elements of a span, at least, except at the end of a group; and of a piece, at most.
    pub span: usize,
    /// A rank keeps only its own part of moments and averages, and of master weights where products read a copy of them.
    pub state: bool,
    /// The same for gradients, which are whole only while the backward pass adds to them.
    pub gradients: bool,
}

impl Sharing {
    /// One rank, which has everything.
    pub const ALONE: Sharing =
        Sharing { rank: 0, ranks: 1, span: usize::MAX, state: false, gradients: false };

    /// Between the ranks of `dev`, with spans of `bytes` of gradients in a type of `size` bytes.
    pub fn between(dev: &dyn Kernels, bytes: usize, size: usize, state: bool, gradients: bool) -> Self {
        let peers = dev.collectives();
        match peers.ranks() {
            1 => Self::ALONE,
            ranks => Sharing { rank: peers.rank(), ranks, span: (bytes / size).max(1), state, gradients },
        }
    }

    /// Pieces start at multiples of this many elements.
    fn unit(&self) -> usize {
        ALIGN * self.ranks
    }

    /// Elements of the largest piece.
    fn largest(&self) -> usize {
        self.span.checked_next_multiple_of(self.unit()).unwrap_or(usize::MAX / self.unit() * self.unit())
    }

    /// This rank's own part of a piece.
    pub(super) fn part(&self, piece: &Range<usize>) -> Range<usize> {
        let n = piece.len() / self.ranks;
        piece.start + self.rank * n..piece.start + (self.rank + 1) * n
    }

    /// Where a tensor of nothing but own parts has the part of a piece.
    pub(super) fn stored(&self, piece: &Range<usize>) -> Range<usize> {
        piece.start / self.ranks..piece.end / self.ranks
    }
}

/// Parameters of a group whose gradients are summed over the ranks together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Span {
    /// Elements of the group.
    pub elements: Range<usize>,
    /// Its parameters.
    pub items: Range<usize>,
}

impl Span {
    /// Its pieces, in elements of the group.
    pub fn pieces(&self, sharing: &Sharing) -> impl Iterator<Item = Range<usize>> + use<> {
        let (largest, all) = (sharing.largest(), self.elements.clone());
        all.clone().step_by(largest).map(move |at| at..at.saturating_add(largest).min(all.end))
    }
}

/// Places items of these lengths in a group: their offsets, the spans, and the length of the group. Lengths saturate.
pub(super) fn place(lengths: &[usize], sharing: &Sharing) -> (Vec<usize>, Vec<Span>, usize) {
    let up = |n: usize, unit: usize| n.checked_next_multiple_of(unit).unwrap_or(usize::MAX);
    let (mut offsets, mut spans, mut end, mut from) = (Vec::new(), Vec::new(), 0usize, (0, 0));
    for (i, &n) in lengths.iter().enumerate() {
        offsets.push(end);
        end = end.saturating_add(up(n, ALIGN));
        if i + 1 == lengths.len() || end - from.0 >= sharing.span {
            end = up(end, sharing.unit());
            spans.push(Span { elements: from.0..end, items: from.1..i + 1 });
            from = (end, i + 1);
        }
    }
    (offsets, spans, end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_and_pieces_cover_a_group() {
        for ranks in [1, 2, 3, 8] {
            for span in [1, 1000, 5000, usize::MAX] {
                let of = |rank| Sharing { rank, ranks, span, state: true, gradients: false };
                let lengths = [10, 3000, 128, 0, 40_000, 1];
                let (offsets, spans, len) = place(&lengths, &of(0));
                assert!(spans.iter().map(|s| s.items.len()).sum::<usize>() == lengths.len());
                let mut at = 0;
                for s in &spans {
                    assert_eq!(s.elements.start, at);
                    at = s.elements.end;
                    for i in s.items.clone() {
                        assert!(s.elements.start <= offsets[i] && offsets[i] + lengths[i] <= s.elements.end);
                    }
                    let mut end = s.elements.start;
                    for piece in s.pieces(&of(0)) {
                        assert!(piece.start == end && piece.len() <= of(0).largest());
                        end = piece.end;
                        let mut own = piece.start;
                        for rank in 0..ranks {
                            let part = of(rank).part(&piece);
                            assert!(part.start == own && part.len() == of(rank).stored(&piece).len());
                            assert!(part.start.is_multiple_of(ALIGN));
                            own = part.end;
                        }
                        assert_eq!(own, piece.end);
                    }
                    assert_eq!(end, s.elements.end);
                }
                assert_eq!(at, len);
            }
        }
        assert_eq!(place(&[usize::MAX, 5], &Sharing::ALONE).2, usize::MAX);
    }

    #[test]
    fn one_rank_has_one_span_and_no_gaps_but_those_of_alignment() {
        let (offsets, spans, len) = place(&[5, 200, 1], &Sharing::ALONE);
        assert_eq!((offsets, len), (vec![0, 128, 384], 512));
        assert_eq!(spans, [Span { elements: 0..512, items: 0..3 }]);
    }
}
