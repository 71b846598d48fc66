//! The gradient of [`linear_xent`](super::linear_xent).

use std::ops::Range;

use num_traits::Zero;
use rayon::prelude::*;

use super::linear_xent::{Most, Packed, ROWS, VOCAB};
use super::*;
use crate::backend::cpu::workspace::{acc_size, block, per_thread, together};

pub(crate) fn linear_xent_bwd_workspace(a: &LinearXentBwd, threads: usize) -> usize {
    let (most, size) = (Most::new(&a.x, &a.w), acc_size(a.x.dtype));
    if most.cols == 0 {
        return 0;
    }
    let tiles = per_thread(threads, size, most.shares(), most.parts());
    together([block(size, most.packed()), block(size, most.partial()), tiles])
}

pub(crate) fn linear_xent_bwd(ws: &Workspace, a: &LinearXentBwd) -> Result<()> {
    by_dtype!("linear_xent_bwd", a.x.dtype, E => bwd::<E>(ws, a))
}

/// Rows `v` of the gradient of the weights, if it is computed, and the contribution of these rows to `dx`.
struct Share<'a, R> {
    v: Range<usize>,
    dw: Option<&'a mut [R]>,
    dx: &'a mut [R],
}

fn bwd<E: Elem>(ws: &Workspace, a: &LinearXentBwd) -> Result<()> {
    let op = "linear_xent_bwd";
    let p = Packed::<E>::new(ws, op, &a.x, &a.w, &a.target)?;
    let g = scalar::<E::Acc>(op, "scale", &a.scale)? * scalar::<E::Acc>(op, "g", &a.g)?;
    let (n, c) = (a.x.dims.rows(), p.cols());
    let lse = flat::<E::Acc>(op, "lse", &a.lse)?;
    let lse: Vec<_> = p.at.iter().map(|&n| lse[n]).collect();
    let dx = rows_mut::<E>(op, "dx", &a.dx.0)?;
    let mut dw = match a.dw {
        Some(dw) => Some(flat_mut::<E::Acc>(op, "dw", &dw.0)?),
        None => None,
    };
    par_for(n, ROWS, |r| {
        for n in r {
            // SAFETY: chunks do not share rows.
            unsafe { dx.row(n) }.fill(E::zeroed());
        }
    });
    if c == 0 {
        return Ok(());
    }

    let most = Most::new(&a.x, &a.w);
    let size = most.share();
    let shares = chunks(p.w.rows, size);
    let mut partial = ws.scratch::<E::Acc>(most.partial())?;
    let scratch = ws.per_thread::<E::Acc, 2>(most.shares(), most.parts())?;
    for r in chunks(p.at.len(), ROWS) {
        let partial = &mut partial[..shares.len() * r.len() * c];
        let mut dws = dw.as_mut().map(|dw| dw.chunks_mut(size * c));
        let tasks: Vec<_> = shares
            .iter()
            .zip(partial.chunks_mut(r.len() * c))
            .map(|(v, dx)| Share { v: v.clone(), dw: dws.as_mut().and_then(Iterator::next), dx })
            .collect();
        tasks.into_par_iter().for_each(|share| share_bwd(&scratch, &p, &r, &lse, g, share));
        par_for(r.len(), 16, |rows| {
            for i in rows {
                // SAFETY: packed rows are distinct rows of dx, so that each row belongs to one thread.
                let out = unsafe { dx.row(p.at[r.start + i]) };
                add_parts(out, partial.chunks(r.len() * c).map(|part| &part[i * c..(i + 1) * c]));
            }
        });
    }
    Ok(())
}

/// `out` = sum of `parts`, rounded once.
fn add_parts<'a, E: Elem>(out: &mut [E], mut parts: impl Iterator<Item = &'a [E::Acc]>) {
    let mut sum = parts.next().map_or_else(|| vec![E::Acc::zero(); out.len()], <[_]>::to_vec);
    for part in parts {
        for (s, &v) in sum.iter_mut().zip(part) {
            *s += v;
        }
    }
    for (o, s) in out.iter_mut().zip(sum) {
        *o = E::down(s);
    }
}

/// Gradients of a block of rows from one share of the vocabulary. Overwrites `dx` and adds to `dw`.
fn share_bwd<E: Elem>(
    scratch: &PerThread<E::Acc, 2>,
    p: &Packed<E>,
    r: &Range<usize>,
    lse: &[E::Acc],
    g: E::Acc,
    mut share: Share<E::Acc>,
) {
    let c = p.cols();
    let mut local = scratch.take();
    let [buf, logits] = local.parts();
    for (i, tile) in chunks(share.v.len(), VOCAB).into_iter().enumerate() {
        let v = share.v.start + tile.start..share.v.start + tile.end;
        let (x, w) = (p.rows(r), p.weights(&v, buf));
        gemm(x, w.t(), logits, v.len(), false);
        logit_gradients(logits, &v, &p.target[r.clone()], &lse[r.clone()], g);
        let d = Mat::new(logits, r.len(), v.len(), v.len());
        gemm(d, w, share.dx, c, i > 0);
        if let Some(dw) = &mut share.dw {
            gemm(d.t(), x, &mut dw[tile.start * c..tile.end * c], c, true);
        }
    }
}

/// Replaces logits by their gradients `g (softmax - onehot)`.
fn logit_gradients<R: Real>(logits: &mut [R], v: &Range<usize>, target: &[usize], lse: &[R], g: R) {
    pulp::Arch::new().dispatch(|| {
        for ((l, t), &lse) in logits.chunks_mut(v.len()).zip(target).zip(lse) {
            l.iter_mut().for_each(|x| *x = g * (*x - lse).fast_exp());
            if v.contains(t) {
                l[t - v.start] = l[t - v.start] - g;
            }
        }
    });
}
