//! Rows divided by their l2 norm.

use num_traits::{Float, Zero};

use super::rows::{par_rows_with, per_row, rows_with_bytes};
use super::*;

pub(crate) fn l2_norm_fwd_workspace(a: &L2NormFwd, threads: usize) -> usize {
    rows_with_bytes(&a.x, threads, a.x.dims.cols())
}

pub(crate) fn l2_norm_bwd_workspace(a: &L2NormBwd, threads: usize) -> usize {
    rows_with_bytes(&a.x, threads, a.x.dims.cols().saturating_mul(2))
}

pub(crate) fn l2_norm_fwd(ws: &Workspace, s: &L2NormFwd) -> Result<()> {
    by_dtype!("l2_norm_fwd", s.y.0.dtype, T => l2_fwd::<T>(ws, s))
}

pub(crate) fn l2_norm_bwd(ws: &Workspace, s: &L2NormBwd) -> Result<()> {
    by_dtype!("l2_norm_bwd", s.x.dtype, T => {
        if s.dy.dtype == s.x.dtype {
            l2_bwd::<T, T>(ws, s)
        } else {
            l2_bwd::<T, <T as Elem>::Acc>(ws, s)
        }
    })
}

fn l2_fwd<T: Elem>(ws: &Workspace, s: &L2NormFwd) -> Result<()> {
    const OP: &str = "l2_norm_fwd";
    let (x, y) = (rows::<T>(OP, "x", &s.x)?, rows_mut::<T>(OP, "y", &s.y.0)?);
    let norms = per_row::<T::Acc>(OP, "norm", &s.norm.0)?;
    par_rows_with(
        ws,
        x.rows,
        x.cols,
        #[inline(always)]
        |i, buf: &mut [T::Acc]| {
            // SAFETY: chunks do not share rows.
            let (y, norm) = unsafe { (y.row(i), &mut norms.row(i)[0]) };
            widen(x.row(i), buf);
            *norm = dot(buf, buf).sqrt().max(T::Acc::of(s.eps));
            y.iter_mut().zip(buf).for_each(|(y, x)| *y = T::down(*x / *norm));
        },
    )
}

fn l2_bwd<T: Elem, D: Elem<Acc = T::Acc>>(ws: &Workspace, s: &L2NormBwd) -> Result<()> {
    const OP: &str = "l2_norm_bwd";
    let (x, dy) = (rows::<T>(OP, "x", &s.x)?, rows::<D>(OP, "dy", &s.dy)?);
    let norm = flat::<T::Acc>(OP, "norm", &s.norm)?;
    match (&s.dx, &s.dx_acc) {
        (Some(dx), _) => {
            let dx = rows_mut::<T>(OP, "dx", &dx.0)?;
            l2_rows(
                ws,
                (x, dy, norm, s.eps),
                #[inline(always)]
                |i, v| {
                    // SAFETY: chunks do not share rows.
                    let dx = unsafe { dx.row(i) };
                    round(v, dx);
                },
            )
        }
        (_, Some(dx)) => {
            let dx = rows_mut::<T::Acc>(OP, "dx_acc", &dx.0)?;
            l2_rows(
                ws,
                (x, dy, norm, s.eps),
                #[inline(always)]
                |i, v| {
                    // SAFETY: chunks do not share rows.
                    let dx = unsafe { dx.row(i) };
                    add_to(dx, v);
                },
            )
        }
        (None, None) => Ok(()),
    }
}

/// Calls `store` with the gradient of every row.
fn l2_rows<T: Elem, D: Elem<Acc = T::Acc>>(
    ws: &Workspace,
    (x, dy, norm, eps): (Rows<T>, Rows<D>, &[T::Acc], f64),
    store: impl Fn(usize, &[T::Acc]) + Sync,
) -> Result<()> {
    let c = x.cols;
    par_rows_with(
        ws,
        x.rows,
        2 * c,
        #[inline(always)]
        |i, buf: &mut [T::Acc]| {
            let (y, d) = buf.split_at_mut(c);
            y.iter_mut().zip(x.row(i)).for_each(|(y, x)| *y = x.up() / norm[i]);
            widen(dy.row(i), d);
            let raised = norm[i] <= T::Acc::of(eps);
            let along = if raised { T::Acc::zero() } else { dot(y, d) };
            d.iter_mut().zip(&*y).for_each(|(d, y)| *d = (*d - *y * along) / norm[i]);
            store(i, d);
        },
    )
}

#[cfg(test)]
mod tests {
    use super::super::cases::*;
    use super::*;
    use crate::backend::cpu::testing::run::*;

    fn l2_forward(r: &Run, [n, c]: [usize; 2], x: &[f64]) -> [Tensor; 2] {
        let (x, y, norm) = (r.columns(n, c, x), r.out([n, c]), r.out_acc([n]));
        let s = L2NormFwd { x: x.view(), y: y.out(), norm: norm.out(), eps: 0.5 };
        r.cpu.l2_norm_fwd(S, &s).unwrap();
        [y, norm]
    }

    #[test]
    fn l2_norm_matches_loops_and_differences() {
        for shape @ [n, c] in ROWS {
            // Every third row has a norm below eps.
            let mut x = values(n * c, 1);
            x.iter_mut().enumerate().for_each(|(i, x)| *x *= if i / c % 3 == 2 { 1.0 / 256.0 } else { 1.0 });
            let (dy, before) = (values(n * c, 2), values(n * c, 3));
            let norm: Vec<f64> =
                x.chunks(c).map(|x| x.iter().map(|x| x * x).sum::<f64>().sqrt().max(0.5)).collect();
            let y = (0..n * c).map(|i| x[i] / norm[i / c]).collect();
            check(&[y, norm.clone()], |r| l2_forward(r, shape, &x).into());
            let backward = |r: &Run| {
                let (xt, dyt, dya) = (r.act([n, c], &x), r.act([n, c], &dy), r.acc([n, c], &dy));
                let (norm, dx, acc) = (r.acc([n], &norm), r.out([n, c]), r.acc([n, c], &before));
                let (x, norm, eps) = (xt.view(), norm.view(), 0.5);
                let s = L2NormBwd { dy: dyt.view(), x, norm, dx: Some(dx.out()), dx_acc: None, eps };
                r.cpu.l2_norm_bwd(S, &s).unwrap();
                let s = L2NormBwd { dy: dya.view(), dx: None, dx_acc: Some(acc.acc()), ..s };
                r.cpu.l2_norm_bwd(S, &s).unwrap();
                assert!(r.cpu.l2_norm_bwd(S, &L2NormBwd { dx_acc: None, ..s }).is_err());
                vec![dx, acc]
            };
            let r = Run::f64();
            let grads = r.values(&backward(&r));
            let forward = |at: &[Vec<f64>]| inner(&r.get(&l2_forward(&r, shape, &at[0])[0]), &dy);
            check_gradients(&[&x], &[&grads[0]], forward);
            let added: Vec<f64> = grads[1].iter().zip(&before).map(|(a, b)| a - b).collect();
            check_gradients(&[&x], &[&added], forward);
            check(&grads, backward);
        }
    }
}
