//! Sums of columns.

use super::*;
use crate::backend::cpu::workspace::acc_size;

pub(crate) fn col_sum_workspace(a: &ColSum, _threads: usize) -> usize {
    reduce_bytes(acc_size(a.x.dtype), a.x.dims.rows(), a.x.dims.cols())
}

pub(crate) fn col_sum(ws: &Workspace, s: &ColSum) -> Result<()> {
    by_dtype!("col_sum", s.x.dtype, T => {
        let x = rows::<T>("col_sum", "x", &s.x)?;
        add_col_sums(ws, x, flat_mut("col_sum", "y", &s.y.0)?)
    })
}

/// Adds the sum of every column of `x` to `y`.
pub(crate) fn add_col_sums<T: Elem>(ws: &Workspace, x: Rows<T>, y: &mut [T::Acc]) -> Result<()> {
    par_reduce_rows(ws, x.rows, y, |r, y| {
        simd(
            #[inline(always)]
            || {
                for i in r {
                    for (y, x) in y.iter_mut().zip(x.row(i)) {
                        *y += x.up();
                    }
                }
            },
        );
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::testing::run::*;

    #[test]
    fn column_sums_match_loops() {
        for (n, c) in [(1, 1), (1, 7), (67, 5), (2500, 33)] {
            let (x, before) = (values(n * c, 1), values(c, 2));
            let want = (0..c).map(|j| before[j] + (0..n).map(|i| x[i * c + j]).sum::<f64>()).collect();
            check(&[want], |r| {
                let (x, y) = (r.columns(n, c, &x), r.acc([c], &before));
                r.cpu.col_sum(S, &ColSum { x: x.view(), y: y.acc() }).unwrap();
                vec![y]
            });
        }
    }
    #[test]
    fn wrong_shapes_are_named() {
        let r = Run::new(Precision::F32, 1);
        let (a, y) = (r.out([4, 3]), r.out([4, 5]));
        let e = r.cpu.col_sum(S, &ColSum { x: a.view(), y: y.acc() });
        assert_eq!(e.unwrap_err().to_string(), "col_sum: argument `y` is [4, 5], wanted 3 elements");
    }
}
