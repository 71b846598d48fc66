//! Group norm of images, optionally followed by SiLU.

use num_traits::One;

use super::channels::{Backward, Planes, normalize, statistics};
use super::*;
use crate::backend::cpu::pointwise::{silu, silu_slope};

pub(crate) fn group_norm_fwd_workspace(a: &GroupNormFwd, _threads: usize) -> usize {
    let at = Planes::of_groups("", &a.x, &a.mean.0);
    at.map_or(0, |at| at.statistics_bytes(a.x.dtype).max(at.normalize_bytes(a.x.dtype)))
}

pub(crate) fn group_norm_stats_workspace(a: &GroupNormStats, _threads: usize) -> usize {
    Planes::of_groups("", &a.x, &a.mean.0).map_or(0, |at| at.statistics_bytes(a.x.dtype))
}

pub(crate) fn group_norm_bwd_workspace(a: &GroupNormBwd, _threads: usize) -> usize {
    Planes::of_groups("", &a.x, &a.mean).map_or(0, |at| at.backward_bytes(a.x.dtype))
}

pub(crate) fn group_norm_fwd(ws: &Workspace, s: &GroupNormFwd) -> Result<()> {
    by_dtype!("group_norm_fwd", s.y.0.dtype, T => group_fwd::<T>(ws, s))
}

pub(crate) fn group_norm_stats(ws: &Workspace, s: &GroupNormStats) -> Result<()> {
    by_dtype!("group_norm_stats", s.x.dtype, T => stats::<T>(ws, s))
}

pub(crate) fn group_norm_bwd(ws: &Workspace, s: &GroupNormBwd) -> Result<()> {
    by_dtype!("group_norm_bwd", s.dx.0.dtype, T => group_bwd::<T>(ws, s))
}

fn stats<T: Elem>(ws: &Workspace, s: &GroupNormStats) -> Result<()> {
    let args = [("x", &s.x), ("mean", &s.mean.0), ("rstd", &s.rstd.0)];
    group_stats::<T>("group_norm_stats", ws, args, s.eps).map(drop)
}

/// Writes the statistics of `x` to `mean` and `rstd`, and returns them.
pub(in crate::backend::cpu) fn group_stats<'a, T: Elem>(
    op: &'static str,
    ws: &Workspace,
    [x, mean, rstd]: [(&'static str, &In<'a>); 3],
    eps: f64,
) -> Result<[&'a [T::Acc]; 2]> {
    let at = Planes::of_groups(op, x.1, mean.1)?;
    let x = flat::<T>(op, x.0, x.1)?;
    let (mean, var) = (flat_mut::<T::Acc>(op, mean.0, mean.1)?, flat_mut::<T::Acc>(op, rstd.0, rstd.1)?);
    statistics(ws, x, at, mean, var)?;
    var.iter_mut().for_each(|v| *v = super::rstd(*v, eps));
    Ok([mean, var])
}

fn group_fwd<T: Elem>(ws: &Workspace, s: &GroupNormFwd) -> Result<()> {
    const OP: &str = "group_norm_fwd";
    let at = Planes::of_groups(OP, &s.x, &s.mean.0)?;
    let (x, y) = (flat::<T>(OP, "x", &s.x)?, flat_mut::<T>(OP, "y", &s.y.0)?);
    let (w, b) = (flat::<T>(OP, "w", &s.w)?, flat::<T>(OP, "b", &s.b)?);
    let [mean, scale] =
        group_stats::<T>(OP, ws, [("x", &s.x), ("mean", &s.mean.0), ("rstd", &s.rstd.0)], s.eps)?;
    if s.silu {
        normalize(ws, [x, w, b], at, [mean, scale], y, silu)
    } else {
        normalize(
            ws,
            [x, w, b],
            at,
            [mean, scale],
            y,
            #[inline(always)]
            |v| v,
        )
    }
}

fn group_bwd<T: Elem>(ws: &Workspace, s: &GroupNormBwd) -> Result<()> {
    const OP: &str = "group_norm_bwd";
    let at = Planes::of_groups(OP, &s.x, &s.mean)?;
    let back = Backward {
        dy: flat::<T>(OP, "dy", &s.dy)?,
        x: flat(OP, "x", &s.x)?,
        w: flat(OP, "w", &s.w)?,
        b: flat(OP, "b", &s.b)?,
        at,
        mean: at.spread(ws, flat(OP, "mean", &s.mean)?)?,
        rstd: at.spread(ws, flat(OP, "rstd", &s.rstd)?)?,
        through: true,
        skip: None,
    };
    let (dw, db) = (sums_out(OP, "dw", &s.dw)?, sums_out(OP, "db", &s.db)?);
    let dx = flat_mut(OP, "dx", &s.dx.0)?;
    if s.silu {
        back.run(ws, dx, dw, db, silu_slope)
    } else {
        back.run(
            ws,
            dx,
            dw,
            db,
            #[inline(always)]
            |_| T::Acc::one(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::cases::*;
    use super::*;
    use crate::backend::cpu::testing::run::*;

    fn group_forward(r: &Run, dims: [usize; 4], g: usize, silu: bool, v: &[Vec<f64>]) -> [Tensor; 3] {
        let c = dims[3];
        let (x, w, b) = (r.act(dims, &v[0]), r.act([c], &v[1]), r.act([c], &v[2]));
        let (y, mean, rstd) = (r.out(dims), r.out_acc([dims[0], g]), r.out_acc([dims[0], g]));
        let (x, w, b) = (x.view(), w.view(), b.view());
        let (y_out, mean_out, rstd_out, eps) = (y.out(), mean.out(), rstd.out(), 1e-6);
        let s = GroupNormFwd { x, w, b, y: y_out, mean: mean_out, rstd: rstd_out, eps, silu };
        r.cpu.group_norm_fwd(S, &s).unwrap();
        [y, mean, rstd]
    }

    fn group_backward(
        r: &Run,
        dims: [usize; 4],
        g: usize,
        silu: bool,
        v: &[Vec<f64>],
        stats: [&[f64]; 2],
    ) -> Vec<Tensor> {
        let c = dims[3];
        let (x, w, b, dy) = (r.act(dims, &v[0]), r.act([c], &v[1]), r.act([c], &v[2]), r.act(dims, &v[3]));
        let [mean, rstd] = stats.map(|s| r.acc([dims[0], g], s));
        let (dx, dw, db) = (r.out(dims), r.acc([c], &vec![0.0; c]), r.acc([c], &vec![0.0; c]));
        let s = GroupNormBwd {
            dy: dy.view(),
            x: x.view(),
            w: w.view(),
            b: b.view(),
            mean: mean.view(),
            rstd: rstd.view(),
            dx: dx.out(),
            dw: Some(dw.acc()),
            db: Some(db.acc()),
            silu,
        };
        r.cpu.group_norm_bwd(S, &s).unwrap();
        let alone = r.out(dims);
        let s = GroupNormBwd { dx: alone.out(), dw: None, db: None, ..s };
        r.cpu.group_norm_bwd(S, &s).unwrap();
        assert_eq!(r.get(&alone), r.get(&dx));
        vec![dx, dw, db]
    }

    #[test]
    fn group_norm_matches_loops_and_differences() {
        for (dims, g, silu) in [
            ([1, 1, 1, 8], 2, true),
            ([2, 3, 5, 6], 3, true),
            ([3, 7, 1, 5], 5, false),
            ([2, 40, 31, 6], 3, true),
            ([2, 1, 40, 64], 1, false),
        ] {
            let [b, h, w, c] = dims;
            let (p, n, width) = (h * w, b * h * w * c, c / g);
            let v = [shifted(n, 1), values(c, 2), values(c, 3), values(n, 4)];
            let stat = |b: usize, g: usize| {
                mean_var((0..p * width).map(|i| v[0][(b * p + i / width) * c + g * width + i % width]))
            };
            let stats: Vec<(f64, f64)> = (0..b * g).map(|i| stat(i / g, i % g)).collect();
            let mean: Vec<f64> = stats.iter().map(|s| s.0).collect();
            let rstd: Vec<f64> = stats.iter().map(|s| 1.0 / (s.1 + 1e-6).sqrt()).collect();
            let y = (0..n).map(|i| {
                let (k, s) = (i % c, i / p / c * g + i % c / width);
                let y = (v[0][i] - mean[s]) * rstd[s] * v[1][k] + v[2][k];
                if silu { y / (1.0 + (-y).exp()) } else { y }
            });
            check(&[y.collect(), mean.clone(), rstd.clone()], |r| group_forward(r, dims, g, silu, &v).into());
            let stats = [&mean[..], &rstd];
            let r = Run::f64();
            let grads = r.values(&group_backward(&r, dims, g, silu, &v, stats));
            check_gradients(&[&v[0], &v[1], &v[2]], &[&grads[0], &grads[1], &grads[2]], |at| {
                inner(&r.get(&group_forward(&r, dims, g, silu, at)[0]), &v[3])
            });
            check(&grads, |r| group_backward(r, dims, g, silu, &v, stats));
        }
    }

    #[test]
    fn wrong_shapes_are_named() {
        let r = Run::new(Precision::F32, 1);
        let (x, w, s) = (r.out([1, 2, 2, 6]), r.out([6]), r.out([1, 4]));
        let (xv, wv) = (x.view(), w.view());
        let (mean, rstd, eps, silu) = (s.out(), s.out(), 1e-6, true);
        let a = GroupNormFwd { x: xv, w: wv, b: wv, y: x.out(), mean, rstd, eps, silu };
        let want = "group_norm_fwd: argument `mean` is [1, 4], wanted with G a divisor of 6";
        assert_eq!(r.cpu.group_norm_fwd(S, &a).unwrap_err().to_string(), want);
    }
}
