//! Sums of the probability of each code over all tokens.

use num_traits::{Float, One, Zero};
use rayon::prelude::*;

use super::scores::{Sweep, Tile, above_floor, tile_cols, tiles_bytes};
use super::*;

pub(crate) fn ibq_cols_workspace(a: &IbqCols, threads: usize) -> usize {
    let k = a.e.dims.rows();
    tiles_bytes(&a.z, &a.e, threads, k.div_ceil(tile_cols(k)))
}

pub(crate) fn ibq_cols(ws: &Workspace, a: &IbqCols) -> Result<()> {
    by_dtype!("ibq_cols", a.z.dtype, E => ibq_cols_of::<E>(ws, a))
}

fn ibq_cols_of<E: Elem>(ws: &Workspace, a: &IbqCols) -> Result<()> {
    const OP: &str = "ibq_cols";
    let sweep = Sweep::<E>::new(OP, &a.z, &a.e)?;
    let smax = flat::<E::Acc>(OP, "smax", &a.smax)?;
    let rest_q = flat::<E::Acc>(OP, "rest_q", &a.rest_q)?;
    let col = flat_mut::<E::Acc>(OP, "col", &a.col.0)?;
    let inv_t = E::Acc::of(1.0 / a.temperature);
    let tiles = sweep.tiles(ws, sweep.e.rows.div_ceil(sweep.cols))?;
    col.par_chunks_mut(sweep.cols).zip(sweep.col_tiles()).for_each(|(col, c)| {
        let mut local = tiles.take();
        let [z, e, s] = local.parts();
        let mut t = Tile { z, e, s };
        sweep.load_e(&c, &mut t);
        col.fill(E::Acc::zero());
        for r in sweep.row_blocks() {
            sweep.load_z(&r, &mut t);
            sweep.scores(&r, &c, &mut t);
            for (i, row) in r.clone().zip(t.s.chunks(sweep.cols)) {
                let (max, inv) = (smax[i], (E::Acc::one() + rest_q[i]).recip());
                pulp::Arch::new().dispatch(
                    #[inline(always)]
                    || {
                        for (o, &s) in col.iter_mut().zip(row) {
                            *o += above_floor(above_floor(s - max) * inv_t).fast_exp() * inv;
                        }
                    },
                );
            }
        }
    });
    Ok(())
}
