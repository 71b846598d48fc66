//! Scores `S = z E^T`, computed tile by tile. Every sweep computes the same tiles with the same product, so that a
//! score has the same bits in all of them. Sums in which the terms of the best code would cancel exclude it.

use std::ops::Range;

use num_traits::Float;

use super::*;
use crate::backend::cpu::workspace::{acc_size, per_thread};

/// Tokens of a tile.
pub(super) const ROWS: usize = 64;
/// Number of partial sums that are computed side by side.
pub(super) const LANES: usize = 16;
/// Lower bound of exponents, which also replaces NaN; its exponential is 0 in every type.
const FLOOR: f64 = -1000.0;

/// Codes of a tile, as a function of K only.
pub(super) fn tile_cols(k: usize) -> usize {
    k.div_ceil(8).next_multiple_of(LANES).clamp(64, 1024)
}

/// Tokens and codes, and their division into tiles.
pub(super) struct Sweep<'a, E: Elem> {
    pub(super) z: Rows<'a, E>,
    pub(super) e: Rows<'a, E>,
    pub(super) d: usize,
    pub(super) cols: usize,
}

/// Elements of the parts of a [`Tile`].
pub(super) fn tile_parts(k: usize, d: usize) -> [usize; 3] {
    [ROWS.saturating_mul(d), tile_cols(k).saturating_mul(d), ROWS.saturating_mul(tile_cols(k))]
}

/// Bytes of workspace of the tiles of `tasks` tasks.
pub(super) fn tiles_bytes(z: &In, e: &In, threads: usize, tasks: usize) -> usize {
    per_thread(threads, acc_size(z.dtype), tasks, tile_parts(e.dims.rows(), z.dims.cols()))
}

/// Scratch of one task: tokens, codes and scores of a tile.
pub(super) struct Tile<'a, R> {
    pub(super) z: &'a mut [R],
    pub(super) e: &'a mut [R],
    pub(super) s: &'a mut [R],
}

impl<'a, E: Elem> Sweep<'a, E> {
    pub(super) fn new(op: &'static str, z: &In<'a>, e: &In<'a>) -> Result<Self> {
        let (z, e) = (rows::<E>(op, "z", z)?, rows::<E>(op, "e", e)?);
        if e.rows > i32::MAX as usize {
            return Err(Error::arg(op, "e", format!("{} codes", e.rows), "at most 2^31 - 1"));
        }
        Ok(Sweep { z, e, d: z.cols, cols: tile_cols(e.rows) })
    }

    /// Scratch for the tiles of `tasks` tasks.
    pub(super) fn tiles<'w>(&self, ws: &'w Workspace, tasks: usize) -> Result<PerThread<'w, E::Acc, 3>> {
        ws.per_thread(tasks, tile_parts(self.e.rows, self.d))
    }

    pub(super) fn row_blocks(&self) -> Vec<Range<usize>> {
        chunks(self.z.rows, ROWS)
    }

    pub(super) fn col_tiles(&self) -> Vec<Range<usize>> {
        chunks(self.e.rows, self.cols)
    }

    pub(super) fn load_z(&self, r: &Range<usize>, t: &mut Tile<'_, E::Acc>) {
        widen(&self.z, r, t.z);
    }

    pub(super) fn load_e(&self, c: &Range<usize>, t: &mut Tile<'_, E::Acc>) {
        widen(&self.e, c, t.e);
    }

    /// Scores of the loaded rows and codes, `[r, cols]`; columns past the last code are -inf.
    pub(super) fn scores(&self, r: &Range<usize>, c: &Range<usize>, t: &mut Tile<'_, E::Acc>) {
        let z = Mat::new(t.z, r.len(), self.d, self.d);
        let e = Mat::new(t.e, c.len(), self.d, self.d);
        gemm(z, e.t(), t.s, self.cols, false);
        if c.len() < self.cols {
            for row in t.s.chunks_mut(self.cols).take(r.len()) {
                row[c.len()..].fill(E::Acc::neg_infinity());
            }
        }
    }
}

/// Copies rows into a contiguous buffer of the accumulator type.
fn widen<E: Elem>(x: &Rows<E>, r: &Range<usize>, to: &mut [E::Acc]) {
    for (i, out) in r.clone().zip(to.chunks_mut(x.cols.max(1))) {
        for (o, &v) in out.iter_mut().zip(x.row(i)) {
            *o = v.up();
        }
    }
}

/// The maximum of `x` and the floor; the floor for NaN.
#[inline(always)]
pub(super) fn above_floor<R: Real>(x: R) -> R {
    let floor = R::of(FLOOR);
    if x > floor { x } else { floor }
}

#[inline(always)]
pub(super) fn sum_lanes<R: Real>(lanes: [R; LANES]) -> R {
    lanes.iter().fold(R::zero(), |a, &b| a + b)
}

/// The maximum of a row and its first position, ignoring NaN; (0, -inf) if there is none.
pub(super) fn best<R: Real>(row: &[R]) -> (usize, R) {
    let max = pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            let mut lanes = [R::neg_infinity(); LANES];
            for c in row.chunks_exact(LANES) {
                for l in 0..LANES {
                    lanes[l] = if c[l] > lanes[l] { c[l] } else { lanes[l] };
                }
            }
            let mut max = R::neg_infinity();
            for &v in lanes.iter().chain(row.chunks_exact(LANES).remainder()) {
                max = if v > max { v } else { max };
            }
            max
        },
    );
    (row.iter().position(|&v| v == max).unwrap_or(0), max)
}
