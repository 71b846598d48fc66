//! Batch norm of rows, followed by LeakyReLU: with the statistics of the batch, with given statistics, with those of a batch
//! in several parts, and the update of running statistics.

use super::channels::{Backward, Planes, normalize, statistics};
use super::*;
use crate::backend::cpu::pointwise::{leaky, leaky_slope};
use crate::backend::cpu::workspace::{acc_size, block, no_workspace, together};

no_workspace!(batch_norm_merge(BatchNormMerge), batch_norm_running(BatchNormRunning));

pub(crate) fn batch_norm_fwd_workspace(a: &BatchNormFwd, _threads: usize) -> usize {
    let at = Planes::of_rows(&a.x);
    at.statistics_bytes(a.x.dtype).max(apply_bytes(at, a.x.dtype))
}

pub(crate) fn batch_norm_bwd_workspace(a: &BatchNormBwd, _threads: usize) -> usize {
    Planes::of_rows(&a.x).backward_bytes(a.x.dtype)
}

pub(crate) fn batch_norm_eval_fwd_workspace(a: &BatchNormEvalFwd, _threads: usize) -> usize {
    apply_bytes(Planes::of_rows(&a.x), a.x.dtype)
}

pub(crate) fn batch_norm_eval_bwd_workspace(a: &BatchNormEvalBwd, _threads: usize) -> usize {
    Planes::of_rows(&a.x).backward_bytes(a.x.dtype)
}

pub(crate) fn batch_norm_merged_bwd_workspace(a: &BatchNormMergedBwd, _threads: usize) -> usize {
    let at = Planes::of_rows(&a.x);
    let means = block(acc_size(a.x.dtype), at.c.saturating_mul(2));
    together([at.spread_bytes(a.x.dtype), at.spread_bytes(a.x.dtype), means])
}

pub(crate) fn batch_norm_fwd(ws: &Workspace, s: &BatchNormFwd) -> Result<()> {
    by_dtype!("batch_norm_fwd", s.y.0.dtype, T => batch_fwd::<T>(ws, s))
}

pub(crate) fn batch_norm_bwd(ws: &Workspace, s: &BatchNormBwd) -> Result<()> {
    by_dtype!("batch_norm_bwd", s.dx.0.dtype, T => backward::<T>("batch_norm_bwd", ws, s, true))
}

pub(crate) fn batch_norm_eval_fwd(ws: &Workspace, s: &BatchNormEvalFwd) -> Result<()> {
    by_dtype!("batch_norm_eval_fwd", s.y.0.dtype, T => batch_eval_fwd::<T>(ws, s))
}

pub(crate) fn batch_norm_eval_bwd(ws: &Workspace, s: &BatchNormEvalBwd) -> Result<()> {
    by_dtype!("batch_norm_eval_bwd", s.dx.0.dtype, T => batch_eval_bwd::<T>(ws, s))
}

pub(crate) fn batch_norm_merge(_ws: &Workspace, s: &BatchNormMerge) -> Result<()> {
    by_dtype!("batch_norm_merge", s.means.dtype, T => merge::<<T as Elem>::Acc>(s))
}

pub(crate) fn batch_norm_merged_bwd(ws: &Workspace, s: &BatchNormMergedBwd) -> Result<()> {
    by_dtype!("batch_norm_merged_bwd", s.dx.0.dtype, T => merged_bwd::<T>(ws, s))
}

pub(crate) fn batch_norm_running(_ws: &Workspace, s: &BatchNormRunning) -> Result<()> {
    by_dtype!("batch_norm_running", s.mean.dtype, T => batch_running::<<T as Elem>::Acc>(s))
}

fn batch_fwd<T: Elem>(ws: &Workspace, s: &BatchNormFwd) -> Result<()> {
    const OP: &str = "batch_norm_fwd";
    let at = Planes::of_rows(&s.x);
    let (x, y) = (flat::<T>(OP, "x", &s.x)?, flat_mut::<T>(OP, "y", &s.y.0)?);
    let (w, b) = (flat::<T>(OP, "w", &s.w)?, flat::<T>(OP, "b", &s.b)?);
    let mean = flat_mut::<T::Acc>(OP, "mean", &s.mean.0)?;
    let var = flat_mut::<T::Acc>(OP, "var", &s.var.0)?;
    statistics(ws, x, at, mean, var)?;
    apply(ws, at, [x, w, b], [mean, var], y, s.eps, s.slope)
}

fn batch_eval_fwd<T: Elem>(ws: &Workspace, s: &BatchNormEvalFwd) -> Result<()> {
    const OP: &str = "batch_norm_eval_fwd";
    let at = Planes::of_rows(&s.x);
    let (x, y) = (flat::<T>(OP, "x", &s.x)?, flat_mut::<T>(OP, "y", &s.y.0)?);
    let (w, b) = (flat::<T>(OP, "w", &s.w)?, flat::<T>(OP, "b", &s.b)?);
    let (mean, var) = (flat(OP, "mean", &s.mean)?, flat(OP, "var", &s.var)?);
    apply(ws, at, [x, w, b], [mean, var], y, s.eps, s.slope)
}

/// Bytes of workspace of [`apply`].
fn apply_bytes(at: Planes, dtype: DType) -> usize {
    together([at.spread_bytes(dtype), at.normalize_bytes(dtype)])
}

/// Normalises by these means and variances, then LeakyReLU.
fn apply<T: Elem>(
    ws: &Workspace,
    at: Planes,
    inputs: [&[T]; 3],
    [mean, var]: [&[T::Acc]; 2],
    y: &mut [T],
    eps: f64,
    slope: f64,
) -> Result<()> {
    let mut scale = at.spread(ws, var)?;
    scale.iter_mut().for_each(|v| *v = rstd(*v, eps));
    let slope = T::Acc::of(slope);
    normalize(
        ws,
        inputs,
        at,
        [mean, &scale],
        y,
        #[inline(always)]
        |v| leaky(v, slope),
    )
}

fn batch_eval_bwd<T: Elem>(ws: &Workspace, s: &BatchNormEvalBwd) -> Result<()> {
    let &BatchNormEvalBwd { dy, x, w, b, mean, var, dx, dw, db, eps, slope } = s;
    let s = BatchNormBwd { dy, x, w, b, mean, var, dx, dw, db, eps, slope };
    backward::<T>("batch_norm_eval_bwd", ws, &s, false)
}

/// `through`: the statistics are those of `x`, and gradients pass through them.
fn backward<T: Elem>(op: &'static str, ws: &Workspace, s: &BatchNormBwd, through: bool) -> Result<()> {
    let back = inputs::<T>(op, ws, [&s.dy, &s.x, &s.w, &s.b], [&s.mean, &s.var], s.eps, through)?;
    let (dw, db) = (sums_out(op, "dw", &s.dw)?, sums_out(op, "db", &s.db)?);
    let (dx, slope) = (flat_mut(op, "dx", &s.dx.0)?, T::Acc::of(s.slope));
    back.run(
        ws,
        dx,
        dw,
        db,
        #[inline(always)]
        |v| leaky_slope(v, slope),
    )
}

/// The inputs of a backward: `dy`, `x`, `w`, `b`, and mean and variance.
fn inputs<'a, T: Elem>(
    op: &'static str,
    ws: &'a Workspace,
    [dy, x, w, b]: [&In<'a>; 4],
    [mean, var]: [&In<'a>; 2],
    eps: f64,
    through: bool,
) -> Result<Backward<'a, T>> {
    let at = Planes::of_rows(x);
    let mut scale = at.spread(ws, flat::<T::Acc>(op, "var", var)?)?;
    scale.iter_mut().for_each(|v| *v = rstd(*v, eps));
    Ok(Backward {
        dy: flat(op, "dy", dy)?,
        x: flat(op, "x", x)?,
        w: flat(op, "w", w)?,
        b: flat(op, "b", b)?,
        at,
        mean: at.spread(ws, flat(op, "mean", mean)?)?,
        rstd: scale,
        through,
        skip: None,
    })
}

fn merged_bwd<T: Elem>(ws: &Workspace, s: &BatchNormMergedBwd) -> Result<()> {
    const OP: &str = "batch_norm_merged_bwd";
    let back = inputs::<T>(OP, ws, [&s.dy, &s.x, &s.w, &s.b], [&s.mean, &s.var], s.eps, true)?;
    let sums = flat::<T::Acc>(OP, "sums", &s.sums)?;
    let (dx, slope) = (flat_mut(OP, "dx", &s.dx.0)?, T::Acc::of(s.slope));
    if dx.is_empty() {
        return Ok(());
    }
    let mut means = ws.scratch::<T::Acc>(sums.len())?;
    means.copy_from_slice(sums);
    back.means(&mut means, s.rows);
    back.dx(
        &means,
        dx,
        #[inline(always)]
        |v| leaky_slope(v, slope),
    );
    Ok(())
}

fn merge<R: Real>(s: &BatchNormMerge) -> Result<()> {
    const OP: &str = "batch_norm_merge";
    let (means, vars) = (rows::<R>(OP, "means", &s.means)?, rows::<R>(OP, "vars", &s.vars)?);
    let (mean, var) = (flat_mut::<R>(OP, "mean", &s.mean.0)?, flat_mut::<R>(OP, "var", &s.var.0)?);
    let sets = R::of(means.rows as f64);
    for (c, (mean, var)) in mean.iter_mut().zip(var).enumerate() {
        *mean = (0..means.rows).fold(R::zero(), |a, r| a + means.row(r)[c]) / sets;
        let square = |r: usize| (means.row(r)[c] - *mean) * (means.row(r)[c] - *mean);
        *var = (0..means.rows).fold(R::zero(), |a, r| a + (vars.row(r)[c] + square(r))) / sets;
    }
    Ok(())
}

fn batch_running<R: Real>(s: &BatchNormRunning) -> Result<()> {
    const OP: &str = "batch_norm_running";
    let momentum = R::of(s.momentum);
    // A single row has no unbiased estimate of its variance, which is 0 then.
    let unbiased = R::of(s.rows as f64 / s.rows.saturating_sub(1).max(1) as f64);
    let mean = (flat_mut::<R>(OP, "running_mean", &s.running_mean.0)?, flat::<R>(OP, "mean", &s.mean)?);
    let var = (flat_mut::<R>(OP, "running_var", &s.running_var.0)?, flat::<R>(OP, "var", &s.var)?);
    for ((to, batch), factor) in [(mean, R::one()), (var, unbiased)] {
        for (to, v) in to.iter_mut().zip(batch) {
            if v.is_finite() {
                *to = (R::one() - momentum) * *to + momentum * factor * *v;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::cases::*;
    use super::*;
    use crate::backend::cpu::testing::run::*;

    fn batch_forward(r: &Run, [n, c]: [usize; 2], slope: f64, v: &[Vec<f64>]) -> [Tensor; 3] {
        let (x, w, b) = (r.act([n, c], &v[0]), r.act([c], &v[1]), r.act([c], &v[2]));
        let (y, mean, var) = (r.out([n, c]), r.out_acc([c]), r.out_acc([c]));
        let (x, w, b) = (x.view(), w.view(), b.view());
        let (yo, mo, vo, eps) = (y.out(), mean.out(), var.out(), 1e-5);
        r.cpu.batch_norm_fwd(S, &BatchNormFwd { x, w, b, y: yo, mean: mo, var: vo, eps, slope }).unwrap();
        [y, mean, var]
    }

    fn batch_backward(
        r: &Run,
        [n, c]: [usize; 2],
        slope: f64,
        v: &[Vec<f64>],
        [mean, var]: &[Vec<f64>; 2],
    ) -> Vec<Tensor> {
        let (x, dy) = (r.act([n, c], &v[0]), r.act([n, c], &v[3]));
        let (w, b, mean, var) = (r.act([c], &v[1]), r.act([c], &v[2]), r.acc([c], mean), r.acc([c], var));
        let (dx, dw, db) = (r.out([n, c]), r.acc([c], &vec![0.0; c]), r.acc([c], &vec![0.0; c]));
        let s = BatchNormBwd {
            dy: dy.view(),
            x: x.view(),
            w: w.view(),
            b: b.view(),
            mean: mean.view(),
            var: var.view(),
            dx: dx.out(),
            dw: Some(dw.acc()),
            db: Some(db.acc()),
            eps: 1e-5,
            slope,
        };
        r.cpu.batch_norm_bwd(S, &s).unwrap();
        vec![dx, dw, db]
    }

    #[test]
    fn batch_norm_matches_loops_and_differences() {
        for ([n, c], slope) in [([5, 1], 0.2), ([31, 7], 0.2), ([2500, 3], 1.0), ([67, 1030], 0.2)] {
            let v = [shifted(n * c, 1), values(c, 2), values(c, 3), values(n * c, 4)];
            let stats: Vec<(f64, f64)> = (0..c)
                .map(|k| mean_var((0..n).map(|i| v[0][i * c + k]).collect::<Vec<_>>().into_iter()))
                .collect();
            let [mean, var] = [|s: &(f64, f64)| s.0, |s: &(f64, f64)| s.1]
                .map(|f| stats.iter().map(f).collect::<Vec<f64>>());
            let y = (0..n * c).map(|i| {
                let y = (v[0][i] - mean[i % c]) / (var[i % c] + 1e-5).sqrt() * v[1][i % c] + v[2][i % c];
                if y > 0.0 { y } else { slope * y }
            });
            check(&[y.collect(), mean.clone(), var.clone()], |r| batch_forward(r, [n, c], slope, &v).into());
            let backward = |r: &Run| batch_backward(r, [n, c], slope, &v, &[mean.clone(), var.clone()]);
            let r = Run::f64();
            let grads = r.values(&backward(&r));
            check_gradients(&[&v[0], &v[1], &v[2]], &[&grads[0], &grads[1], &grads[2]], |at| {
                inner(&r.get(&batch_forward(&r, [n, c], slope, at)[0]), &v[3])
            });
            check(&grads, backward);
        }
    }

    #[test]
    fn batch_norm_with_given_statistics_matches_loops_and_differences() {
        for ([n, c], slope) in [([1, 3], 0.2), ([31, 7], 0.2), ([2500, 3], 1.0)] {
            let v = [shifted(n * c, 1), values(c, 2), values(c, 3), values(n * c, 4)];
            let (mean, var) = (values(c, 5), values(c, 6).iter().map(|v| 0.5 + v.abs()).collect::<Vec<_>>());
            let y = (0..n * c).map(|i| {
                let y = (v[0][i] - mean[i % c]) / (var[i % c] + 1e-5).sqrt() * v[1][i % c] + v[2][i % c];
                if y > 0.0 { y } else { slope * y }
            });
            let forward = |r: &Run, v: &[Vec<f64>]| {
                let (x, w, b) = (r.act([n, c], &v[0]), r.act([c], &v[1]), r.act([c], &v[2]));
                let (mean, var, y) = (r.acc([c], &mean), r.acc([c], &var), r.out([n, c]));
                let (x, w, b, mean, var) = (x.view(), w.view(), b.view(), mean.view(), var.view());
                let s = BatchNormEvalFwd { x, w, b, mean, var, y: y.out(), eps: 1e-5, slope };
                r.cpu.batch_norm_eval_fwd(S, &s).unwrap();
                y
            };
            check(&[y.collect()], |r| vec![forward(r, &v)]);
            let backward = |r: &Run| {
                let (x, dy) = (r.act([n, c], &v[0]), r.act([n, c], &v[3]));
                let (w, b, mean, var) =
                    (r.act([c], &v[1]), r.act([c], &v[2]), r.acc([c], &mean), r.acc([c], &var));
                let (dx, dw, db) = (r.out([n, c]), r.acc([c], &vec![0.0; c]), r.acc([c], &vec![0.0; c]));
                let s = BatchNormEvalBwd {
                    dy: dy.view(),
                    x: x.view(),
                    w: w.view(),
                    b: b.view(),
                    mean: mean.view(),
                    var: var.view(),
                    dx: dx.out(),
                    dw: Some(dw.acc()),
                    db: Some(db.acc()),
                    eps: 1e-5,
                    slope,
                };
                r.cpu.batch_norm_eval_bwd(S, &s).unwrap();
                vec![dx, dw, db]
            };
            let r = Run::f64();
            let grads = r.values(&backward(&r));
            check_gradients(&[&v[0], &v[1], &v[2]], &[&grads[0], &grads[1], &grads[2]], |at| {
                inner(&r.get(&forward(&r, at)), &v[3])
            });
            check(&grads, backward);
        }
    }

    #[test]
    fn merged_statistics_are_those_of_all_rows() {
        for [sets, n, c] in [[1, 5, 3], [2, 31, 7], [3, 400, 2]] {
            let x = shifted(sets * n * c, 1);
            let of = |rows: std::ops::Range<usize>| {
                (0..c)
                    .map(|k| mean_var(rows.clone().map(|i| x[i * c + k]).collect::<Vec<_>>().into_iter()))
                    .unzip()
            };
            let parts: Vec<(Vec<f64>, Vec<f64>)> = (0..sets).map(|r| of(r * n..(r + 1) * n)).collect();
            let (means, vars): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
            let (mean, var) = of(0..sets * n);
            check(&[mean, var], |r| {
                let (means, vars) = (r.acc([sets, c], &means.concat()), r.acc([sets, c], &vars.concat()));
                let (mean, var) = (r.out_acc([c]), r.out_acc([c]));
                let (means, vars) = (means.view(), vars.view());
                let s = BatchNormMerge { means, vars, mean: mean.out(), var: var.out() };
                r.cpu.batch_norm_merge(S, &s).unwrap();
                vec![mean, var]
            });
        }
    }

    #[test]
    fn merged_gradients_are_those_of_all_rows() {
        for ([n, c], slope) in [([6, 1], 0.2), ([32, 7], 0.2), ([2500, 3], 1.0)] {
            let v = [shifted(n * c, 1), values(c, 2), values(c, 3), values(n * c, 4)];
            let r = Run::f64();
            let [_, mean, var] = batch_forward(&r, [n, c], slope, &v);
            let stats = [&mean, &var].map(|t| r.get(t));
            let want = r.values(&batch_backward(&r, [n, c], slope, &v, &stats));
            let sums = [&want[2][..], &want[1]].concat();
            check(&want[..1], |r| {
                let (x, dy, dx) = (r.act([n, c], &v[0]), r.act([n, c], &v[3]), r.out([n, c]));
                let (w, b, sums) = (r.act([c], &v[1]), r.act([c], &v[2]), r.acc([2, c], &sums));
                let [mean, var] = [0, 1].map(|i| r.acc([c], &stats[i]));
                // Two parts of different lengths.
                for (start, len) in [(0, n / 2 - 1), (n / 2 - 1, n - n / 2 + 1)] {
                    let [dy, x, dx] = [&dy, &x, &dx].map(|t| t.rows(start, len).unwrap());
                    let s = BatchNormMergedBwd {
                        dy: dy.view(),
                        x: x.view(),
                        w: w.view(),
                        b: b.view(),
                        mean: mean.view(),
                        var: var.view(),
                        sums: sums.view(),
                        dx: dx.out(),
                        rows: n,
                        eps: 1e-5,
                        slope,
                    };
                    r.cpu.batch_norm_merged_bwd(S, &s).unwrap();
                }
                vec![dx]
            });
        }
    }

    #[test]
    fn running_statistics_are_unbiased() {
        check(&[vec![0.9 + 0.2], vec![0.9 * 3.0 + 0.1 * 4.0 * 5.0 / 4.0]], |r| {
            let (mean, var) = (r.acc([1], &[2.0]), r.acc([1], &[4.0]));
            let (rm, rv) = (r.acc([1], &[1.0]), r.acc([1], &[3.0]));
            let (mean, var, running_mean, running_var) = (mean.view(), var.view(), rm.acc(), rv.acc());
            let s = BatchNormRunning { mean, var, running_mean, running_var, rows: 5, momentum: 0.1 };
            r.cpu.batch_norm_running(S, &s).unwrap();
            vec![rm, rv]
        });
    }

    #[test]
    fn running_statistics_leave_out_what_is_not_finite() {
        let r = Run::f64();
        let (mean, var) = (r.acc([2], &[f64::NAN, 2.0]), r.acc([2], &[4.0, f64::INFINITY]));
        let (rm, rv) = (r.acc([2], &[1.0, 1.0]), r.acc([2], &[3.0, 3.0]));
        let (mean, var, running_mean, running_var) = (mean.view(), var.view(), rm.acc(), rv.acc());
        let s = BatchNormRunning { mean, var, running_mean, running_var, rows: 4, momentum: 0.5 };
        r.cpu.batch_norm_running(S, &s).unwrap();
        assert_eq!((r.get(&rm)[0], r.get(&rv)[1]), (1.0, 3.0));
        assert!(r.get(&rm)[1] == 1.5 && r.get(&rv)[0] > 3.0);
    }
}
