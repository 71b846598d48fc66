//! The loss of [`linear_xent`](super::linear_xent).

use std::ops::Range;

use num_traits::{Float, Zero};
use rayon::prelude::*;

use super::linear_xent::{Most, NOTES, Packed, ROWS, VOCAB};
use super::*;
use crate::backend::cpu::workspace::{acc_size, block, per_thread, together};

pub(crate) fn linear_xent_fwd_workspace(a: &LinearXentFwd, threads: usize) -> usize {
    let (most, size) = (Most::new(&a.x, &a.w), acc_size(a.x.dtype));
    let tiles = per_thread(threads, size, most.tiles(), most.parts());
    together([block(size, most.packed()), block(size, most.notes()), tiles])
}

pub(crate) fn linear_xent_fwd(ws: &Workspace, a: &LinearXentFwd) -> Result<()> {
    by_dtype!("linear_xent_fwd", a.x.dtype, E => fwd::<E>(ws, a))
}

/// The statistics of a row in one tile: the largest logit, the sum of exponentials relative to it, and the logit of the
/// row's target if it is in the tile, otherwise 0. Stored as [`NOTES`] elements.
#[derive(Clone, Copy)]
struct Part<R> {
    max: R,
    sum: R,
    hit: R,
}

impl<R: Real> Part<R> {
    fn from_notes(n: &[R]) -> Self {
        Part { max: n[0], sum: n[1], hit: n[2] }
    }

    fn none() -> Self {
        Part { max: R::neg_infinity(), sum: R::zero(), hit: R::zero() }
    }

    fn join(self, o: Self) -> Self {
        let max = if o.max > self.max { o.max } else { self.max };
        let scaled = |p: &Self| if p.max == max { p.sum } else { p.sum * (p.max - max).exp() };
        Part { max, sum: scaled(&self) + scaled(&o), hit: self.hit + o.hit }
    }
}

fn fwd<E: Elem>(ws: &Workspace, a: &LinearXentFwd) -> Result<()> {
    let op = "linear_xent_fwd";
    let p = Packed::<E>::new(ws, op, &a.x, &a.w, &a.target)?;
    let scale = scalar::<E::Acc>(op, "scale", &a.scale)?;
    let lse = flat_mut::<E::Acc>(op, "lse", &a.lse.0)?;
    let loss = flat_mut::<E::Acc>(op, "loss", &a.loss.0)?;
    lse.fill(E::Acc::zero());

    let blocks = chunks(p.at.len(), ROWS);
    let tiles = chunks(p.w.rows, VOCAB);
    let most = Most::new(&a.x, &a.w);
    let n = p.at.len();
    let mut notes = ws.scratch::<E::Acc>(most.notes())?;
    let scratch = ws.per_thread::<E::Acc, 2>(most.tiles(), most.parts())?;
    let tasks: Vec<_> = notes
        .chunks_mut((n * NOTES).max(1))
        .zip(&tiles)
        .flat_map(|(notes, v)| {
            notes.chunks_mut(ROWS * NOTES).zip(&blocks).map(move |(notes, r)| (v, r, notes))
        })
        .collect();
    tasks.into_par_iter().for_each(|(v, r, notes)| tile_fwd(&scratch, &p, r, v, notes));

    let mut losses = Vec::with_capacity(n);
    for (i, &at) in p.at.iter().enumerate() {
        let note = |t: usize| Part::from_notes(&notes[(t * n + i) * NOTES..][..NOTES]);
        let all = (0..tiles.len()).map(note).fold(Part::none(), Part::join);
        lse[at] = all.max + all.sum.ln();
        losses.push(lse[at] - all.hit);
    }
    // Without supervised rows the scale, one over their number, may be infinite.
    loss[0] = if losses.is_empty() { E::Acc::zero() } else { scale * lanes::sum(&losses, |l| l) };
    Ok(())
}

/// Computes the statistics of the rows in a tile.
fn tile_fwd<E: Elem>(
    scratch: &PerThread<E::Acc, 2>,
    p: &Packed<E>,
    r: &Range<usize>,
    v: &Range<usize>,
    notes: &mut [E::Acc],
) {
    let mut local = scratch.take();
    let [buf, logits] = local.parts();
    gemm(p.rows(r), p.weights(v, buf).t(), logits, v.len(), false);
    pulp::Arch::new().dispatch(|| {
        let rows = notes.chunks_mut(NOTES).zip(logits.chunks_mut(v.len()));
        for ((note, l), t) in rows.zip(&p.target[r.clone()]) {
            note[2] = if v.contains(t) { l[t - v.start] } else { E::Acc::zero() };
            note[0] = lanes::max(l);
            note[1] = lanes::exp_sum(l, note[0]);
        }
    });
}
