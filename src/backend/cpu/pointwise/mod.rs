//! Elementwise kernels.

mod activation;
mod add;
mod channel_affine;
mod convert;
mod fill;
#[cfg(test)]
mod naive;
mod rope;
mod swiglu;
mod unary;

use rayon::prelude::*;

use super::*;
pub(super) use activation::*;
pub(super) use add::*;
pub(super) use channel_affine::*;
pub(super) use convert::*;
pub(super) use fill::*;
pub(super) use rope::*;
pub(super) use swiglu::*;
pub(super) use unary::*;

/// Calls `f` with the elements of `x` and `y`: in flat chunks if both are contiguous, otherwise row by row.
fn map<X: Element, Y: Element>(
    op: &'static str,
    x: &In,
    (arg, y): (&'static str, &In),
    f: impl Fn(X, &mut Y) + Sync,
) -> Result<()> {
    let each = |x: &[X], y: &mut [Y]| {
        simd(
            #[inline(always)]
            || x.iter().zip(y).for_each(|(x, y)| f(*x, y)),
        )
    };
    if x.is_contiguous() && y.is_contiguous() {
        let (x, y) = (flat::<X>(op, "x", x)?, flat_mut::<Y>(op, arg, y)?);
        x.par_chunks(CHUNK).zip(y.par_chunks_mut(CHUNK)).for_each(|(x, y)| each(x, y));
    } else {
        let (x, y) = (rows::<X>(op, "x", x)?, rows_mut::<Y>(op, arg, y)?);
        par_for(y.rows, chunk_rows(y.cols), |r| {
            for i in r {
                // SAFETY: chunks do not share rows.
                let y = unsafe { y.row(i) };
                each(x.row(i), y);
            }
        });
    }
    Ok(())
}

/// `y = f(a, b)`, element by element, in the chunks of `map`.
fn map2<T: Elem>(
    op: &'static str,
    (arg_a, a): (&'static str, &In),
    (arg_b, b): (&'static str, &In),
    (arg_y, y): (&'static str, &In),
    f: impl Fn(T::Acc, T::Acc) -> T::Acc + Sync,
) -> Result<()> {
    let each = |a: &[T], b: &[T], y: &mut [T]| {
        simd(
            #[inline(always)]
            || a.iter().zip(b).zip(y).for_each(|((a, b), y)| *y = T::down(f(a.up(), b.up()))),
        )
    };
    if a.is_contiguous() && b.is_contiguous() && y.is_contiguous() {
        let (a, b) = (flat::<T>(op, arg_a, a)?, flat::<T>(op, arg_b, b)?);
        let chunks = a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK));
        let y = flat_mut::<T>(op, arg_y, y)?.par_chunks_mut(CHUNK);
        chunks.zip(y).for_each(|((a, b), y)| each(a, b, y));
    } else {
        let (a, b) = (rows::<T>(op, arg_a, a)?, rows::<T>(op, arg_b, b)?);
        let y = rows_mut::<T>(op, arg_y, y)?;
        par_for(y.rows, chunk_rows(y.cols), |r| {
            for i in r {
                // SAFETY: chunks do not share rows.
                let y = unsafe { y.row(i) };
                each(a.row(i), b.row(i), y);
            }
        });
    }
    Ok(())
}
