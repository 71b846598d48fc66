//! Upsampling and pooling by a factor of two.

use num_traits::Zero;

use super::workspace::no_workspace;
use super::*;

no_workspace!(
    upsample2x_fwd(Upsample2xFwd),
    upsample2x_bwd(Upsample2xBwd),
    max_pool2x2_fwd(MaxPool2x2Fwd),
    max_pool2x2_bwd(MaxPool2x2Bwd)
);

pub(super) fn upsample2x_fwd(_ws: &Workspace, s: &Upsample2xFwd) -> Result<()> {
    by_dtype!("upsample2x_fwd", s.y.0.dtype, T => up_fwd::<T>(s))
}

pub(super) fn upsample2x_bwd(_ws: &Workspace, s: &Upsample2xBwd) -> Result<()> {
    by_dtype!("upsample2x_bwd", s.dx.0.dtype, T => up_bwd::<T>(s))
}

pub(super) fn max_pool2x2_fwd(_ws: &Workspace, s: &MaxPool2x2Fwd) -> Result<()> {
    by_dtype!("max_pool2x2_fwd", s.y.0.dtype, T => pool_fwd::<T>(s))
}

pub(super) fn max_pool2x2_bwd(_ws: &Workspace, s: &MaxPool2x2Bwd) -> Result<()> {
    by_dtype!("max_pool2x2_bwd", s.dx.0.dtype, T => pool_bwd::<T>(s))
}

/// A fine image `[B, H, W, C]` and the coarse one with half its height and width.
struct Halves {
    fine: [usize; 4],
    coarse: [usize; 4],
}

impl Halves {
    fn new(op: &'static str, fine: (&'static str, &In)) -> Result<Self> {
        let [b, h, w, c] = image(op, fine.0, fine.1)?;
        Ok(Halves { fine: [b, h, w, c], coarse: [b, h / 2, w / 2, c] })
    }

    fn is_odd(&self) -> bool {
        self.fine[1] % 2 == 1 || self.fine[2] % 2 == 1
    }

    /// The first of the two fine rows that correspond to coarse row `i`.
    fn fine_row(&self, i: usize) -> usize {
        i / self.coarse[1] * self.fine[1] + i % self.coarse[1] * 2
    }

    /// Calls `f(i, fine_row(i))` for all coarse rows in parallel; chunks do not share rows.
    fn par_rows(&self, f: impl Fn(usize, usize) + Sync) {
        if self.coarse[2] * self.coarse[3] > 0 {
            let size = chunk_rows(self.fine[2] * self.fine[3]);
            par_for(self.coarse[0] * self.coarse[1], size, |r| r.for_each(|i| f(i, self.fine_row(i))));
        }
    }
}

/// A contiguous image as rows of `W * C` elements.
fn lines<'a>(op: &'static str, arg: &'static str, v: &In<'a>) -> Result<In<'a>> {
    let [b, h, w, c] = image(op, arg, v)?;
    v.reshape(op, arg, [b * h, w * c])
}

fn lines_in<'a, T: Elem>(op: &'static str, arg: &'static str, v: &In<'a>) -> Result<Rows<'a, T>> {
    rows(op, arg, &lines(op, arg, v)?)
}

fn lines_out<'a, T: Elem>(op: &'static str, arg: &'static str, v: &In<'a>) -> Result<RowsMut<'a, T>> {
    rows_mut(op, arg, &lines(op, arg, v)?)
}

fn up_fwd<T: Elem>(s: &Upsample2xFwd) -> Result<()> {
    const OP: &str = "upsample2x_fwd";
    let at = Halves::new(OP, ("y", &s.y.0))?;
    let (x, y, c) = (lines_in::<T>(OP, "x", &s.x)?, lines_out::<T>(OP, "y", &s.y.0)?, at.fine[3]);
    at.par_rows(|i, first| {
        for row in [first, first + 1] {
            // SAFETY: every fine row belongs to one coarse row, and chunks do not share coarse rows.
            let y = unsafe { y.row(row) };
            for (y, x) in y.chunks_exact_mut(2 * c).zip(x.row(i).chunks_exact(c)) {
                y[..c].copy_from_slice(x);
                y[c..].copy_from_slice(x);
            }
        }
    });
    Ok(())
}

/// The `C` channels of the four pixels of every 2x2 window of two rows.
#[inline(always)]
fn windows<'a, T>(a: &'a [T], b: &'a [T], c: usize) -> impl Iterator<Item = [&'a [T]; 4]> {
    a.chunks_exact(2 * c).zip(b.chunks_exact(2 * c)).map(move |(a, b)| [&a[..c], &a[c..], &b[..c], &b[c..]])
}

/// Writes `f` of every 2x2 window of two rows.
#[inline(always)]
fn reduce<T: Elem>(a: &[T], b: &[T], y: &mut [T], c: usize, f: impl Fn([T::Acc; 4]) -> T::Acc) {
    for (y, [a0, a1, b0, b1]) in y.chunks_exact_mut(c).zip(windows(a, b, c)) {
        for k in 0..c {
            y[k] = T::down(f([a0[k].up(), a1[k].up(), b0[k].up(), b1[k].up()]));
        }
    }
}

fn up_bwd<T: Elem>(s: &Upsample2xBwd) -> Result<()> {
    const OP: &str = "upsample2x_bwd";
    let at = Halves::new(OP, ("dy", &s.dy))?;
    let (dy, dx) = (lines_in::<T>(OP, "dy", &s.dy)?, lines_out::<T>(OP, "dx", &s.dx.0)?);
    at.par_rows(|i, first| {
        // SAFETY: chunks do not share coarse rows.
        let dx = unsafe { dx.row(i) };
        simd(
            #[inline(always)]
            || reduce(dy.row(first), dy.row(first + 1), dx, at.fine[3], |[a, b, c, d]| (a + b) + (c + d)),
        );
    });
    Ok(())
}

/// Whether `b` replaces `a` as the maximum. The first of equal values is kept; NaN counts as the maximum.
#[inline(always)]
fn beats<R: Real>(b: R, a: R) -> bool {
    b > a || b.is_nan()
}

#[inline(always)]
fn larger<R: Real>(a: R, b: R) -> R {
    if beats(b, a) { b } else { a }
}

fn pool_fwd<T: Elem>(s: &MaxPool2x2Fwd) -> Result<()> {
    const OP: &str = "max_pool2x2_fwd";
    let at = Halves::new(OP, ("x", &s.x))?;
    let (x, y) = (lines_in::<T>(OP, "x", &s.x)?, lines_out::<T>(OP, "y", &s.y.0)?);
    at.par_rows(|i, first| {
        // SAFETY: chunks do not share coarse rows.
        let y = unsafe { y.row(i) };
        simd(
            #[inline(always)]
            || {
                reduce(
                    x.row(first),
                    x.row(first + 1),
                    y,
                    at.fine[3],
                    #[inline(always)]
                    |[a, b, c, d]| larger(larger(a, b), larger(c, d)),
                )
            },
        );
    });
    Ok(())
}

fn pool_bwd<T: Elem>(s: &MaxPool2x2Bwd) -> Result<()> {
    const OP: &str = "max_pool2x2_bwd";
    let at = Halves::new(OP, ("x", &s.x))?;
    let (dy, x) = (lines_in::<T>(OP, "dy", &s.dy)?, lines_in::<T>(OP, "x", &s.x)?);
    let (dx, c) = (lines_out::<T>(OP, "dx", &s.dx.0)?, at.fine[3]);
    let zero = T::down(T::Acc::zero());
    if at.is_odd() {
        par_for(dx.rows, chunk_rows(dx.cols), |r| {
            for i in r {
                // SAFETY: chunks do not share rows.
                unsafe { dx.row(i) }.fill(zero);
            }
        });
    }
    at.par_rows(|i, first| {
        // SAFETY: every fine row belongs to one coarse row, and chunks do not share coarse rows.
        let (da, db) = unsafe { (dx.row(first), dx.row(first + 1)) };
        let out = da.chunks_exact_mut(2 * c).zip(db.chunks_exact_mut(2 * c));
        let dy = dy.row(i).chunks_exact(c);
        for (((da, db), dy), [a0, a1, b0, b1]) in out.zip(dy).zip(windows(x.row(first), x.row(first + 1), c))
        {
            let ((da0, da1), (db0, db1)) = (da.split_at_mut(c), db.split_at_mut(c));
            for k in 0..c {
                let [a0, a1, b0, b1] = [a0[k], a1[k], b0[k], b1[k]].map(T::up);
                let lower = beats(larger(b0, b1), larger(a0, a1));
                let (right_a, right_b) = (beats(a1, a0), beats(b1, b0));
                let give = |yes: bool| if yes { dy[k] } else { zero };
                (da0[k], da1[k]) = (give(!lower && !right_a), give(!lower && right_a));
                (db0[k], db1[k]) = (give(lower && !right_b), give(lower && right_b));
            }
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::run::*;
    use super::*;

    /// Calls `f` with the index of every fine element that has a corresponding coarse one, and the index of the latter.
    fn each([b, h, w, c]: [usize; 4], mut f: impl FnMut(usize, usize)) {
        for i in 0..b * h * w * c {
            let (n, y, x, k) = (i / c / w / h, i / c / w % h, i / c % w, i % c);
            if y / 2 < h / 2 && x / 2 < w / 2 {
                f(i, ((n * (h / 2) + y / 2) * (w / 2) + x / 2) * c + k);
            }
        }
    }

    #[test]
    fn upsampling_matches_loops() {
        for fine @ [b, h, w, c] in [[1, 2, 2, 1], [2, 6, 10, 3], [3, 34, 22, 17]] {
            let coarse = [b, h / 2, w / 2, c];
            let n = b * h * w * c;
            let (x, dy) = (values(n / 4, 1), values(n, 2));
            let (mut y, mut dx) = (vec![0.0; n], vec![0.0; n / 4]);
            each(fine, |i, j| {
                y[i] = x[j];
                dx[j] += dy[i];
            });
            check(&[y, dx], |r| {
                let (x, dy, y, dx) = (r.act(coarse, &x), r.act(fine, &dy), r.out(fine), r.out(coarse));
                r.cpu.upsample2x_fwd(S, &Upsample2xFwd { x: x.view(), y: y.out() }).unwrap();
                r.cpu.upsample2x_bwd(S, &Upsample2xBwd { dy: dy.view(), dx: dx.out() }).unwrap();
                vec![y, dx]
            });
        }
    }

    #[test]
    fn pooling_matches_loops_with_ties() {
        for fine @ [b, h, w, c] in [[1, 1, 1, 2], [1, 2, 2, 1], [2, 7, 5, 3], [2, 1, 4, 3], [3, 34, 23, 17]] {
            let coarse = [b, h / 2, w / 2, c];
            let (n, m) = (b * h * w * c, b * (h / 2) * (w / 2) * c);
            // Few distinct values, so that there are many ties.
            let x: Vec<f64> = values(n, 1).iter().map(|v| v.round()).collect();
            let dy = values(m, 2);
            let (mut y, mut from, mut dx) = (vec![f64::NEG_INFINITY; m], vec![0; m], vec![0.0; n]);
            each(fine, |i, j| {
                if x[i] > y[j] {
                    (y[j], from[j]) = (x[i], i);
                }
            });
            from.iter().zip(&dy).for_each(|(&i, dy)| dx[i] = *dy);
            check(&[y, dx], |r| {
                let (x, dy, y, dx) = (r.act(fine, &x), r.act(coarse, &dy), r.out(coarse), r.out(fine));
                r.cpu.max_pool2x2_fwd(S, &MaxPool2x2Fwd { x: x.view(), y: y.out() }).unwrap();
                let s = MaxPool2x2Bwd { dy: dy.view(), x: x.view(), dx: dx.out() };
                r.cpu.max_pool2x2_bwd(S, &s).unwrap();
                vec![y, dx]
            });
        }
    }

    #[test]
    fn wrong_shapes_are_named() {
        let r = Run::new(Precision::F32, 1);
        let (x, y) = (r.out([1, 2, 2, 3]), r.out([1, 5, 4, 3]));
        let e = r.cpu.upsample2x_fwd(S, &Upsample2xFwd { x: x.view(), y: y.out() });
        let want = "upsample2x_fwd: argument `y` is [1, 5, 4, 3], wanted [1, 4, 4, 3]";
        assert_eq!(e.unwrap_err().to_string(), want);
    }
}
