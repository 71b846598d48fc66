//! Layer norm of rows.

use super::rows::{RowsBackward, par_rows_with, per_row, rows_backward_bytes, rows_with_bytes};
use super::*;

pub(crate) fn layer_norm_fwd_workspace(a: &LayerNormFwd, threads: usize) -> usize {
    rows_with_bytes(&a.x, threads, a.x.dims.cols())
}

pub(crate) fn layer_norm_bwd_workspace(a: &LayerNormBwd, threads: usize) -> usize {
    rows_backward_bytes(&a.x, threads)
}

pub(crate) fn layer_norm_fwd(ws: &Workspace, s: &LayerNormFwd) -> Result<()> {
    by_dtype!("layer_norm_fwd", s.y.0.dtype, T => layer_fwd::<T>(ws, s))
}

pub(crate) fn layer_norm_bwd(ws: &Workspace, s: &LayerNormBwd) -> Result<()> {
    by_dtype!("layer_norm_bwd", s.dx.0.dtype, T => layer_bwd::<T>(ws, s))
}

fn layer_fwd<T: Elem>(ws: &Workspace, s: &LayerNormFwd) -> Result<()> {
    const OP: &str = "layer_norm_fwd";
    let (x, y) = (rows::<T>(OP, "x", &s.x)?, rows_mut::<T>(OP, "y", &s.y.0)?);
    let (w, b) = (flat::<T>(OP, "w", &s.w)?, flat::<T>(OP, "b", &s.b)?);
    let means = per_row::<T::Acc>(OP, "mean", &s.mean.0)?;
    let rstds = per_row::<T::Acc>(OP, "rstd", &s.rstd.0)?;
    let n = T::Acc::of(x.cols as f64);
    par_rows_with(
        ws,
        x.rows,
        x.cols,
        #[inline(always)]
        |i, buf: &mut [T::Acc]| {
            // SAFETY: chunks do not share rows.
            let (y, mean, scale) = unsafe { (y.row(i), &mut means.row(i)[0], &mut rstds.row(i)[0]) };
            widen(x.row(i), buf);
            *mean = sum(buf) / n;
            buf.iter_mut().for_each(|v| *v = *v - *mean);
            *scale = rstd(dot(buf, buf) / n, s.eps);
            for (((y, x), w), b) in y.iter_mut().zip(&*buf).zip(w).zip(b) {
                *y = T::down(*x * *scale * w.up() + b.up());
            }
        },
    )
}

fn layer_bwd<T: Elem>(ws: &Workspace, s: &LayerNormBwd) -> Result<()> {
    const OP: &str = "layer_norm_bwd";
    let x = rows::<T>(OP, "x", &s.x)?;
    let back = RowsBackward {
        dy: rows(OP, "dy", &s.dy)?,
        dsum: None,
        x,
        w: flat(OP, "w", &s.w)?,
        mean: Some(flat(OP, "mean", &s.mean)?),
        rstd: flat(OP, "rstd", &s.rstd)?,
        dx: rows_mut(OP, "dx", &s.dx.0)?,
    };
    let (dw, db) = (sums_out(OP, "dw", &s.dw)?, sums_out(OP, "db", &s.db)?);
    let sums = back.run(ws)?;
    for (to, sums) in [(dw, &sums[..x.cols]), (db, &sums[x.cols..])] {
        if let Some(to) = to {
            add_to(to, sums);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::cases::*;
    use super::*;
    use crate::backend::cpu::testing::run::*;

    fn layer_forward(r: &Run, [n, c]: [usize; 2], v: &[Vec<f64>]) -> [Tensor; 3] {
        let (x, w, b) = (r.columns(n, c, &v[0]), r.act([c], &v[1]), r.act([c], &v[2]));
        let (y, mean, rstd) = (r.out([n, c]), r.out_acc([n]), r.out_acc([n]));
        let (x, w, b) = (x.view(), w.view(), b.view());
        let (yo, mo, ro, eps) = (y.out(), mean.out(), rstd.out(), 1e-5);
        r.cpu.layer_norm_fwd(S, &LayerNormFwd { x, w, b, y: yo, mean: mo, rstd: ro, eps }).unwrap();
        [y, mean, rstd]
    }

    #[test]
    fn layer_norm_matches_loops_and_differences() {
        for shape @ [n, c] in ROWS {
            let v = [shifted(n * c, 1), values(c, 2), values(c, 3), values(n * c, 4)];
            let stats: Vec<(f64, f64)> = v[0].chunks(c).map(|x| mean_var(x.iter().copied())).collect();
            let mean: Vec<f64> = stats.iter().map(|s| s.0).collect();
            let rstd: Vec<f64> = stats.iter().map(|s| 1.0 / (s.1 + 1e-5).sqrt()).collect();
            let y = (0..n * c).map(|i| (v[0][i] - mean[i / c]) * rstd[i / c] * v[1][i % c] + v[2][i % c]);
            check(&[y.collect(), mean.clone(), rstd.clone()], |r| layer_forward(r, shape, &v).into());
            let backward = |r: &Run| {
                let (dy, x, w) = (r.columns(n, c, &v[3]), r.columns(n, c, &v[0]), r.act([c], &v[1]));
                let (mean, rstd, dx) = (r.acc([n], &mean), r.acc([n], &rstd), r.out([n, c]));
                let (dw, db) = (r.acc([c], &vec![0.0; c]), r.acc([c], &vec![0.0; c]));
                let (dwa, dba) = (Some(dw.acc()), Some(db.acc()));
                let (dy, x, w, mean, rstd) = (dy.view(), x.view(), w.view(), mean.view(), rstd.view());
                let s = LayerNormBwd { dy, x, w, mean, rstd, dx: dx.out(), dw: dwa, db: dba };
                r.cpu.layer_norm_bwd(S, &s).unwrap();
                vec![dx, dw, db]
            };
            let r = Run::f64();
            let grads = r.values(&backward(&r));
            check_gradients(&[&v[0], &v[1], &v[2]], &[&grads[0], &grads[1], &grads[2]], |at| {
                inner(&r.get(&layer_forward(&r, shape, at)[0]), &v[3])
            });
            check(&grads, backward);
        }
    }
}
