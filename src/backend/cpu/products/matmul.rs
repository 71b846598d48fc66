//! Matrix products: with an optional bias, accumulated, and followed by GELU.

use super::bias::{bias, start_from_bias};
use super::*;
use crate::backend::cpu::gemm::block_rows;
use crate::backend::cpu::workspace::{together, wide};

pub(crate) fn matmul_workspace(a: &Matmul, threads: usize) -> usize {
    let y = &a.y.0;
    let (rows, block) = (y.dims.rows(), block_rows(y.dims.rows()));
    let n = block.min(rows).saturating_mul(y.dims.cols());
    let rounded = rounded_bytes(y.dtype, threads, rows.div_ceil(block), n);
    together([wide(&a.a), wide(&a.b), row_blocks_bytes(y, threads, block), rounded])
}

pub(crate) fn matmul_acc_workspace(a: &MatmulAcc, threads: usize) -> usize {
    let y = &a.y.0;
    together([wide(&a.a), wide(&a.b), row_blocks_bytes(y, threads, block_rows(y.dims.rows()))])
}

pub(crate) fn linear_gelu_workspace(a: &LinearGelu, threads: usize) -> usize {
    matmul_workspace(&sums_of(a), threads)
}

pub(crate) fn matmul(ws: &Workspace, s: &Matmul) -> Result<()> {
    by_dtype!("matmul", s.y.0.dtype, T => matmul_of::<T>(ws, s))
}

pub(crate) fn matmul_acc(ws: &Workspace, s: &MatmulAcc) -> Result<()> {
    by_dtype!("matmul_acc", s.a.dtype, T => matmul_acc_of::<T>(ws, s))
}

fn mat<R: Real>(r: Rows<'_, R>, transposed: bool) -> Mat<'_, R> {
    let m = Mat::new(r.data(), r.rows, r.cols, r.ld);
    if transposed { m.t() } else { m }
}

fn matmul_of<T: Elem>(ws: &Workspace, s: &Matmul) -> Result<()> {
    const OP: &str = "matmul";
    let (a, b) = (rows::<T>(OP, "a", &s.a)?, rows::<T>(OP, "b", &s.b)?);
    let y = rows_mut::<T>(OP, "y", &s.y.0)?;
    let bias = bias::<T>(OP, s.bias.as_ref())?;
    let (a, b) = (Wide::new(ws, a)?, Wide::new(ws, b)?);
    let (a, b) = (mat(a.rows(), s.ta), mat(b.rows(), s.tb));
    let block = block_rows(y.rows);
    let rounded = Rounded::<T>::new(ws, y.rows.div_ceil(block), block.min(y.rows) * y.cols)?;
    par_row_blocks(ws, y, block, false, |r, y| {
        rounded.write(y, |y| {
            start_from_bias(bias, y);
            gemm(a.rows(r.start, r.len()), b, y, s.y.0.dims.cols(), bias.is_some());
        });
    })
}

pub(crate) fn linear_gelu(ws: &Workspace, s: &LinearGelu) -> Result<()> {
    by_dtype!("linear_gelu", s.y.0.dtype, T => {
        matmul_of::<T>(ws, &sums_of(s))?;
        super::pointwise::unary_fwd(ws, &UnaryFwd { x: s.pre.0, y: s.y, f: Unary::GeluTanh })
    })
}

/// The matrix product before the GELU.
fn sums_of<'a>(s: &LinearGelu<'a>) -> Matmul<'a> {
    Matmul { a: s.x, b: s.w, ta: false, tb: true, bias: s.bias, y: s.pre }
}

fn matmul_acc_of<T: Elem>(ws: &Workspace, s: &MatmulAcc) -> Result<()> {
    const OP: &str = "matmul_acc";
    let (a, b) = (rows::<T>(OP, "a", &s.a)?, rows::<T>(OP, "b", &s.b)?);
    let y = rows_mut::<T::Acc>(OP, "y", &s.y.0)?;
    let (a, b) = (Wide::new(ws, a)?, Wide::new(ws, b)?);
    let (a, b) = (mat(a.rows(), s.ta), mat(b.rows(), s.tb));
    par_row_blocks(ws, y, block_rows(y.rows), true, |r, y| {
        gemm(a.rows(r.start, r.len()), b, y, s.y.0.dims.cols(), true);
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::testing::run::*;

    fn transposed(v: &[f64], cols: usize) -> Vec<f64> {
        (0..v.len()).map(|i| v[i % (v.len() / cols) * cols + i / (v.len() / cols)]).collect()
    }

    fn naive(a: &[f64], b: &[f64], [n, c, o]: [usize; 3], start: impl Fn(usize) -> f64) -> Vec<f64> {
        let sum = |i: usize| (0..c).map(|k| a[i / o * c + k] * b[k * o + i % o]).sum::<f64>();
        (0..n * o).map(|i| start(i) + sum(i)).collect()
    }

    #[test]
    fn products_match_loops() {
        for shape @ [n, c, o] in [[1, 1, 1], [1, 7, 3], [37, 5, 1], [67, 129, 31], [300, 33, 17]] {
            let (a, b, bias) = (values(n * c, 1), values(c * o, 2), values(o, 3));
            let before = values(n * o, 4);
            let want = naive(&a, &b, shape, |i| bias[i % o]);
            let want_acc = naive(&a, &b, shape, |i| before[i]);
            for (ta, tb, with_bias) in [(false, true, true), (true, false, true), (true, true, false)] {
                let want = if with_bias { want.clone() } else { naive(&a, &b, shape, |_| 0.0) };
                check(&[want.clone(), want_acc.clone(), want], |r| {
                    let (at, bt) = (transposed(&a, c), transposed(&b, o));
                    let a = if ta { r.act([c, n], &at) } else { r.act([n, c], &a) };
                    let b = if tb { r.columns(o, c, &bt) } else { r.columns(c, o, &b) };
                    let bias = with_bias.then(|| r.act([o], &bias));
                    let bias = bias.as_ref().map(|b| b.view());
                    let (y, acc) = (r.out([n, o]), r.acc([n, o], &before));
                    let cols = r.columns(n, o, &vec![f64::NAN; n * o]);
                    let (a, b) = (a.view(), b.view());
                    r.cpu.matmul(S, &Matmul { a, b, ta, tb, bias, y: y.out() }).unwrap();
                    r.cpu.matmul(S, &Matmul { a, b, ta, tb, bias, y: cols.out() }).unwrap();
                    r.cpu.matmul_acc(S, &MatmulAcc { a, b, ta, tb, y: acc.acc() }).unwrap();
                    vec![y, acc, cols]
                });
            }
        }
    }

    #[test]
    fn linear_gelu_is_a_product_and_a_function() {
        let [n, c, o] = [37, 13, 21];
        let (x, w, bias) = (values(n * c, 1), values(o * c, 2), values(o, 3));
        let pre = naive(&x, &transposed(&w, c), [n, c, o], |i| bias[i % o]);
        let u = |x: f64| (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
        let y = pre.iter().map(|&x| 0.5 * x * (1.0 + u(x).tanh())).collect();
        check(&[pre, y], |r| {
            let (x, w, bias) = (r.columns(n, c, &x), r.act([o, c], &w), r.act([o], &bias));
            let (pre, y) = (r.out([n, o]), r.out([n, o]));
            let (x, w, bias) = (x.view(), w.view(), Some(bias.view()));
            r.cpu.linear_gelu(S, &LinearGelu { x, w, bias, pre: pre.out(), y: y.out() }).unwrap();
            vec![pre, y]
        });
    }

    #[test]
    fn empty_inner_dimension_leaves_the_bias() {
        let r = Run::f64();
        let (a, b, bias, y) = (r.out([40, 0]), r.out([2, 0]), r.act([2], &[1.0, 2.0]), r.out([40, 2]));
        let (a, b, bias) = (a.view(), b.view(), Some(bias.view()));
        r.cpu.matmul(S, &Matmul { a, b, ta: false, tb: true, bias, y: y.out() }).unwrap();
        assert_eq!(r.get(&y), [1.0, 2.0].repeat(40));
    }

    #[test]
    fn accumulates_into_column_slices() {
        let (a, b) = (values(50 * 7, 1), values(7 * 3, 2));
        let r = Run::f64();
        let y = r.columns(50, 3, &values(150, 3));
        let (ta, tb) = (false, false);
        let (at, bt) = (r.act([50, 7], &a), r.act([7, 3], &b));
        r.cpu.matmul_acc(S, &MatmulAcc { a: at.view(), b: bt.view(), ta, tb, y: y.acc() }).unwrap();
        let before = values(150, 3);
        compare_all(&r, &[y], &[naive(&a, &b, [50, 7, 3], |i| before[i])]);
    }

    #[test]
    fn wrong_shapes_are_named() {
        let r = Run::new(Precision::F32, 1);
        let (a, b, y) = (r.out([4, 3]), r.out([5, 2]), r.out([4, 5]));
        let (ta, tb, bias) = (false, true, None);
        let e = r.cpu.matmul(S, &Matmul { a: a.view(), b: b.view(), ta, tb, bias, y: y.out() });
        let want = "matmul: argument `b` is [5, 2], wanted 5 rows of 3";
        assert_eq!(e.unwrap_err().to_string(), want);
    }
}
