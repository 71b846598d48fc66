//! RMS norm of rows, optionally after adding a residual.

use super::rows::{RowsBackward, par_rows_with, per_row, rows_backward_bytes, rows_with_bytes};
use super::*;

pub(crate) fn rms_norm_fwd_workspace(a: &RmsNormFwd, threads: usize) -> usize {
    rows_with_bytes(&a.x, threads, a.x.dims.cols())
}

pub(crate) fn rms_norm_bwd_workspace(a: &RmsNormBwd, threads: usize) -> usize {
    rows_backward_bytes(&a.x, threads)
}

pub(crate) fn rms_norm_fwd(ws: &Workspace, s: &RmsNormFwd) -> Result<()> {
    by_dtype!("rms_norm_fwd", s.y.0.dtype, T => rms_fwd::<T>(ws, s))
}

pub(crate) fn rms_norm_bwd(ws: &Workspace, s: &RmsNormBwd) -> Result<()> {
    by_dtype!("rms_norm_bwd", s.dx.0.dtype, T => rms_bwd::<T>(ws, s))
}

fn rms_fwd<T: Elem>(ws: &Workspace, s: &RmsNormFwd) -> Result<()> {
    const OP: &str = "rms_norm_fwd";
    let (x, y) = (rows::<T>(OP, "x", &s.x)?, rows_mut::<T>(OP, "y", &s.y.0)?);
    let w = flat::<T>(OP, "w", &s.w)?;
    let out = per_row::<T::Acc>(OP, "rstd", &s.rstd.0)?;
    let residual = match (&s.residual, &s.sum) {
        (Some(residual), Some(sum)) => {
            Some((rows::<T>(OP, "residual", residual)?, rows_mut::<T>(OP, "sum", &sum.0)?))
        }
        _ => None,
    };
    let n = T::Acc::of(x.cols as f64);
    par_rows_with(
        ws,
        x.rows,
        x.cols,
        #[inline(always)]
        |i, buf: &mut [T::Acc]| {
            // SAFETY: chunks do not share rows.
            let (y, out) = unsafe { (y.row(i), &mut out.row(i)[0]) };
            match residual {
                None => widen(x.row(i), buf),
                Some((residual, sum)) => {
                    // SAFETY: as above.
                    let sum = unsafe { sum.row(i) };
                    add_rounded(x.row(i), residual.row(i), sum, buf);
                }
            }
            *out = rstd(dot(buf, buf) / n, s.eps);
            for ((y, x), w) in y.iter_mut().zip(&*buf).zip(w) {
                *y = T::down(T::down(*x * *out).up() * w.up());
            }
        },
    )
}

/// `sum = a + b`, rounded; `wide` is the rounded sum in the accumulator type.
#[inline(always)]
fn add_rounded<T: Elem>(a: &[T], b: &[T], sum: &mut [T], wide: &mut [T::Acc]) {
    for (((sum, wide), a), b) in sum.iter_mut().zip(wide).zip(a).zip(b) {
        *sum = T::down(a.up() + b.up());
        *wide = sum.up();
    }
}

fn rms_bwd<T: Elem>(ws: &Workspace, s: &RmsNormBwd) -> Result<()> {
    const OP: &str = "rms_norm_bwd";
    let x = rows::<T>(OP, "x", &s.x)?;
    let back = RowsBackward {
        dy: rows(OP, "dy", &s.dy)?,
        dsum: s.dsum.as_ref().map(|v| rows(OP, "dsum", v)).transpose()?,
        x,
        w: flat(OP, "w", &s.w)?,
        mean: None,
        rstd: flat(OP, "rstd", &s.rstd)?,
        dx: rows_mut(OP, "dx", &s.dx.0)?,
    };
    let dw = sums_out(OP, "dw", &s.dw)?;
    let sums = back.run(ws)?;
    if let Some(dw) = dw {
        add_to(dw, &sums[..x.cols]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::cases::*;
    use super::*;
    use crate::backend::cpu::testing::run::*;

    fn rms_forward(r: &Run, [n, c]: [usize; 2], v: &[Vec<f64>]) -> [Tensor; 3] {
        let (x, res, w) = (r.columns(n, c, &v[0]), r.act([n, c], &v[1]), r.act([c], &v[2]));
        let (sum, y, rstd) = (r.out([n, c]), r.columns(n, c, &vec![f64::NAN; n * c]), r.out_acc([n]));
        let (residual, so) = (Some(res.view()), Some(sum.out()));
        let (x, w, yo, ro, eps) = (x.view(), w.view(), y.out(), rstd.out(), 1e-5);
        r.cpu.rms_norm_fwd(S, &RmsNormFwd { x, residual, w, sum: so, y: yo, rstd: ro, eps }).unwrap();
        [y, sum, rstd]
    }

    #[test]
    fn rms_norm_matches_loops_and_differences() {
        for shape @ [n, c] in ROWS {
            // Summands with sums that bf16 represents exactly, since statistics are computed from the stored sum.
            let coarse = |seed| -> Vec<f64> {
                let v = values(n * c, seed);
                v.iter().map(|x| (8.0 * x).round().clamp(-32.0, 32.0) / 8.0).collect()
            };
            let v = [coarse(1), coarse(2), values(c, 3), values(n * c, 4), values(n * c, 5)];
            let sum: Vec<f64> = v[0].iter().zip(&v[1]).map(|(a, b)| a + b).collect();
            let rstd: Vec<f64> = sum
                .chunks(c)
                .map(|s| 1.0 / (s.iter().map(|x| x * x).sum::<f64>() / c as f64 + 1e-5).sqrt())
                .collect();
            let y = (0..n * c).map(|i| sum[i] * rstd[i / c] * v[2][i % c]).collect();
            check(&[y, sum.clone(), rstd.clone()], |r| rms_forward(r, shape, &v).into());
            // For the backward pass the sum is an input, and is rounded.
            let sum: Vec<f64> = sum.iter().map(|x| DType::Bf16.rounded(*x)).collect();
            let at = [sum.clone(), vec![0.0; n * c], v[2].clone()];
            let r = Run::f64();
            let rstd = r.get(&rms_forward(&r, shape, &at)[2]);
            let backward = |r: &Run| {
                let (dy, dsum, x) = (r.columns(n, c, &v[3]), r.act([n, c], &v[4]), r.columns(n, c, &sum));
                let (w, rstd, dx, dw) =
                    (r.act([c], &v[2]), r.acc([n], &rstd), r.out([n, c]), r.acc([c], &vec![0.0; c]));
                let (dsum, dw_acc) = (Some(dsum.view()), Some(dw.acc()));
                let (dy, x, w, rstd, out) = (dy.view(), x.view(), w.view(), rstd.view(), dx.out());
                r.cpu.rms_norm_bwd(S, &RmsNormBwd { dy, dsum, x, w, rstd, dx: out, dw: dw_acc }).unwrap();
                vec![dx, dw]
            };
            let r = Run::f64();
            let grads = r.values(&backward(&r));
            check_gradients(&[&at[0], &at[1], &at[2]], &[&grads[0], &grads[0], &grads[1]], |at| {
                let [y, sum, _] = rms_forward(&r, shape, at);
                inner(&r.get(&y), &v[3]) + inner(&r.get(&sum), &v[4])
            });
            check(&grads[..1], |r| backward(r)[..1].to_vec());
            // The normalised values are rounded to `act` before they are multiplied by the weights.
            for p in [Precision::F64, Precision::F32, Precision::BF16] {
                let mut dw = vec![0.0; c];
                for (i, (dy, x)) in v[3].iter().zip(&sum).enumerate() {
                    dw[i % c] += dy * p.act.rounded(x * rstd[i / c]);
                }
                let r = Run::new(p, 1);
                compare_all(&r, &backward(&r)[1..], &[dw]);
            }
        }
    }

    #[test]
    fn rms_norm_without_residual() {
        let (r, x) = (Run::f64(), values(12, 1));
        let (xt, w, y, rstd) = (r.act([3, 4], &x), r.act([4], &[1.0; 4]), r.out([3, 4]), r.out_acc([3]));
        let (residual, sum, eps) = (None, None, 1e-5);
        let s = RmsNormFwd { x: xt.view(), residual, w: w.view(), sum, y: y.out(), rstd: rstd.out(), eps };
        r.cpu.rms_norm_fwd(S, &s).unwrap();
        let want = rms_forward(&r, [3, 4], &[x, vec![0.0; 12], vec![1.0; 4]]);
        assert_eq!(r.get(&y), r.get(&want[0]));
        let e = r.cpu.rms_norm_fwd(S, &RmsNormFwd { sum: Some(y.out()), ..s }).unwrap_err();
        assert_eq!(
            e.to_string(),
            "rms_norm_fwd: argument `sum` is present, wanted absent, as `residual` is absent"
        );
    }
}
