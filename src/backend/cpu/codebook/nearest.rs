//! The best code of every token.

use std::sync::atomic::{AtomicUsize, Ordering};

use num_traits::Float;
use rayon::prelude::*;

use super::scores::{ROWS, Sweep, Tile, best, tiles_bytes};
use super::*;
use crate::backend::cpu::workspace::{acc_size, block, together};

pub(crate) fn nearest_workspace(a: &Nearest, threads: usize) -> usize {
    let half = if a.metric == Metric::L2 { block(acc_size(a.z.dtype), a.e.dims.rows()) } else { 0 };
    together([half, tiles_bytes(&a.z, &a.e, threads, a.z.dims.rows().div_ceil(ROWS))])
}

pub(crate) fn nearest(ws: &Workspace, a: &Nearest) -> Result<()> {
    by_dtype!("nearest", a.z.dtype, E => nearest_of::<E>(ws, a))
}

fn nearest_of<E: Elem>(ws: &Workspace, a: &Nearest) -> Result<()> {
    let sweep = Sweep::<E>::new("nearest", &a.z, &a.e)?;
    let bad = a.bad.as_ref().map(|bad| one_mut::<E::Acc>("nearest", "bad", &bad.0)).transpose()?;
    let idx = flat_mut::<i32>("nearest", "idx", &a.idx.0)?;
    let score = a.score.as_ref().map(|s| flat_mut::<E::Acc>("nearest", "score", &s.0)).transpose()?;
    // -|z - e|^2 / 2 = z . e - |e|^2 / 2 - |z|^2 / 2; the last term is the same for all codes.
    let bad_rows = AtomicUsize::new(0);
    let mut half = ws.scratch::<E::Acc>(if a.metric == Metric::L2 { sweep.e.rows } else { 0 })?;
    for (j, h) in half.iter_mut().enumerate() {
        *h = sweep.e.row(j).iter().map(|&v| v.up() * v.up()).sum::<E::Acc>() * E::Acc::of(0.5);
    }
    let half = &half[..];
    let tiles = sweep.tiles(ws, sweep.z.rows.div_ceil(ROWS))?;
    let blocks = sweep.row_blocks();
    let scores: Vec<Option<&mut [E::Acc]>> = match score {
        Some(s) => s.chunks_mut(ROWS).map(Some).collect(),
        None => blocks.iter().map(|_| None).collect(),
    };
    idx.par_chunks_mut(ROWS).zip(scores).zip(blocks).for_each(|((idx, score), r)| {
        let mut local = tiles.take();
        let [z, e, s] = local.parts();
        let mut t = Tile { z, e, s };
        sweep.load_z(&r, &mut t);
        let mut top = [E::Acc::neg_infinity(); ROWS];
        idx.fill(0);
        for c in sweep.col_tiles() {
            sweep.load_e(&c, &mut t);
            sweep.scores(&r, &c, &mut t);
            for (i, row) in t.s.chunks_mut(sweep.cols).take(r.len()).enumerate() {
                for (s, &h) in row.iter_mut().zip(half.get(c.clone()).unwrap_or(&[])) {
                    *s = *s - h;
                }
                let (j, v) = best(row);
                if v > top[i] {
                    top[i] = v;
                    idx[i] = (c.start + j) as i32;
                }
            }
        }
        if let Some(score) = score {
            score.copy_from_slice(&top[..r.len()]);
        }
        bad_rows.fetch_add(top[..r.len()].iter().filter(|v| !v.is_finite()).count(), Ordering::Relaxed);
    });
    if let Some(bad) = bad {
        *bad += E::Acc::of(bad_rows.into_inner() as f64);
    }
    Ok(())
}
