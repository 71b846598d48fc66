//! Normalisation.

use super::{S, expect, expect_rank};
use crate::autograd::{Tape, Var};
use crate::backend::{
    Accumulate, BatchNormBwd, BatchNormEvalBwd, BatchNormEvalFwd, BatchNormFwd, BatchNormMerge,
    BatchNormMergedBwd, Dims, GroupNormBwd, GroupNormFwd, GroupNormStats, L2NormBwd, L2NormFwd, LayerNormBwd,
    LayerNormFwd, Reduction, RmsNormBwd, RmsNormFwd, Role,
};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Statistics of a GroupNorm of an image, both `[B, G]`, for convolutions that normalise their input. They are constants
/// on the tape: the op that uses them passes the gradient through them to the image.
#[derive(Clone)]
pub struct GroupStats {
    /// Means.
    pub mean: Var,
    /// `1 / sqrt(variance + eps)`.
    pub rstd: Var,
}

impl GroupStats {
    /// For images of these dimensions; contents unspecified.
    pub(super) fn empty(tape: &Tape, op: &'static str, dims: Dims, groups: usize) -> Result<Self> {
        check_groups(op, dims, groups)?;
        let new = || Ok::<_, Error>(tape.constant(tape.stat([dims[0], groups])?));
        Ok(GroupStats { mean: new()?, rstd: new()? })
    }
}

/// The statistics of a GroupNorm of `x` `[B, H, W, C]`. Saves nothing.
pub fn group_stats(tape: &Tape, x: &Var, groups: usize, eps: f64) -> Result<GroupStats> {
    expect_rank("group_stats", "x", x, 4)?;
    let stats = GroupStats::empty(tape, "group_stats", x.dims(), groups)?;
    let (mean, rstd) = (stats.mean.value().out(), stats.rstd.value().out());
    tape.dev().group_norm_stats(S, &GroupNormStats { x: x.value().view(), mean, rstd, eps })?;
    Ok(stats)
}

fn check_groups(op: &'static str, dims: Dims, groups: usize) -> Result<()> {
    match groups > 0 && dims[3].is_multiple_of(groups) {
        true => Ok(()),
        false => Err(Error::arg(op, "groups", groups, format!("a divisor of {} channels", dims[3]))),
    }
}

/// GroupNorm, then SiLU if `silu`: `x` `[B, H, W, C]`, `w`, `b` `[C]`. Saves `x` and statistics `[B, G]`.
pub fn group_norm(
    tape: &Tape,
    x: &Var,
    w: &Var,
    b: &Var,
    groups: usize,
    eps: f64,
    silu: bool,
) -> Result<Var> {
    expect_rank("group_norm", "x", x, 4)?;
    expect_rank("group_norm", "w", w, 1)?;
    expect_rank("group_norm", "b", b, 1)?;
    let d = x.dims();
    check_groups("group_norm", d, groups)?;
    let (mean, rstd) = (tape.stat([d[0], groups])?, tape.stat([d[0], groups])?);
    let (dev, act, stats) = (tape.device(), tape.precision().act, [mean.clone(), rstd.clone()]);
    let forward = move |x: &Tensor, w: &Tensor, b: &Tensor| {
        let y = Tensor::empty(&*dev, Role::Activation, act, d)?;
        let (x, w, b, [mean, rstd]) = (x.view(), w.view(), b.view(), &stats);
        let a = GroupNormFwd { x, w, b, y: y.out(), mean: mean.out(), rstd: rstd.out(), eps, silu };
        dev.group_norm_fwd(S, &a)?;
        Ok(y)
    };
    let y = forward(x.value(), w.value(), b.value())?;
    let (xs, ws, bs) = (x.keep(), w.keep(), b.keep());
    let y = tape.op1(&[x, w, b], y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        let x = xs.value()?;
        let w = ws.value()?;
        let b = bs.value()?;
        let dx = g.act(xs.dims())?;
        let (dw, db) = (g.target(&ws)?, g.target(&bs)?);
        let a = GroupNormBwd {
            dy: dy.view(),
            x: x.view(),
            w: w.view(),
            b: b.view(),
            mean: mean.view(),
            rstd: rstd.view(),
            dx: dx.out(),
            dw: dw.as_ref().map(Tensor::acc),
            db: db.as_ref().map(Tensor::acc),
            silu,
        };
        g.dev().group_norm_bwd(S, &a)?;
        g.give(&xs, dx)
    });
    let (xs, ws, bs) = (x.keep(), w.keep(), b.keep());
    Ok(tape.cheap(y, move || forward(&xs.value()?, &ws.value()?, &bs.value()?)))
}

/// RMSNorm: `x` `[N, C]`, `w` `[C]`. Saves `x` and one number per row.
pub fn rms_norm(tape: &Tape, x: &Var, w: &Var, eps: f64) -> Result<Var> {
    expect_rank("rms_norm", "x", x, 2)?;
    expect_rank("rms_norm", "w", w, 1)?;
    let rstd = tape.stat([x.dims()[0]])?;
    let forward = normalise(tape, rstd.clone(), eps);
    let y = forward(x.value(), w.value())?;
    let (xs, ws) = (x.keep(), w.keep());
    let y = tape.op1(&[x, w], y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        let x = xs.value()?;
        let w = ws.value()?;
        let dx = g.act(xs.dims())?;
        let dw = g.target(&ws)?;
        let a = RmsNormBwd {
            dy: dy.view(),
            dsum: None,
            x: x.view(),
            w: w.view(),
            rstd: rstd.view(),
            dx: dx.out(),
            dw: dw.as_ref().map(Tensor::acc),
        };
        g.dev().rms_norm_bwd(S, &a)?;
        g.give(&xs, dx)
    });
    let (xs, ws) = (x.keep(), w.keep());
    Ok(tape.cheap(y, move || forward(&xs.value()?, &ws.value()?)))
}

/// RMSNorm of a value, with a weight, that writes `rstd`.
fn normalise(tape: &Tape, rstd: Tensor, eps: f64) -> impl Fn(&Tensor, &Tensor) -> Result<Tensor> + 'static {
    let (dev, act) = (tape.device(), tape.precision().act);
    move |x, w| {
        let y = Tensor::empty(&*dev, Role::Activation, act, x.dims())?;
        let (x, w) = (x.view(), w.view());
        let a = RmsNormFwd { x, residual: None, w, sum: None, y: y.out(), rstd: rstd.out(), eps };
        dev.rms_norm_fwd(S, &a)?;
        Ok(y)
    }
}

/// The residual stream of a transformer: returns `s = x + residual` and `rms_norm(s)`, both `[N, C]`.
pub fn add_rms_norm(tape: &Tape, x: &Var, residual: &Var, w: &Var, eps: f64) -> Result<(Var, Var)> {
    expect_rank("add_rms_norm", "x", x, 2)?;
    expect_rank("add_rms_norm", "w", w, 1)?;
    expect("add_rms_norm", "residual", residual, x.dims().as_slice())?;
    let (sum, y, rstd) = (tape.act(x.dims())?, tape.act(x.dims())?, tape.stat([x.dims()[0]])?);
    let a = RmsNormFwd {
        x: x.value().view(),
        residual: Some(residual.value().view()),
        w: w.value().view(),
        sum: Some(sum.out()),
        y: y.out(),
        rstd: rstd.out(),
        eps,
    };
    tape.dev().rms_norm_fwd(S, &a)?;
    let (xs, rs, ws) = (x.key(), residual.key(), w.keep());
    let (kept, again) = (sum.clone(), normalise(tape, rstd.clone(), eps));
    let mut out = tape.op(&[x, residual, w], vec![sum, y], move |g, outs| {
        let w = ws.value()?;
        let dsum = g.take(outs[0])?;
        let Some(dy) = g.take(outs[1])? else {
            if let Some(d) = dsum {
                g.give(xs, d.clone())?;
                g.give(rs, d)?;
            }
            return Ok(());
        };
        let dx = g.act(xs.dims())?;
        let dw = g.target(&ws)?;
        let a = RmsNormBwd {
            dy: dy.view(),
            dsum: dsum.as_ref().map(Tensor::view),
            x: kept.view(),
            w: w.view(),
            rstd: rstd.view(),
            dx: dx.out(),
            dw: dw.as_ref().map(Tensor::acc),
        };
        g.dev().rms_norm_bwd(S, &a)?;
        g.give(xs, dx.clone())?;
        g.give(rs, dx)
    });
    let (y, sum) = (out.pop(), out.pop());
    match (sum, y) {
        (Some(sum), Some(y)) => {
            let (kept, ws) = (sum.keep(), w.keep());
            let y = tape.cheap(y, move || again(&kept.value()?, &ws.value()?));
            Ok((sum, y))
        }
        _ => unreachable!("an op of two outputs has two"),
    }
}

/// LayerNorm over the last dimension: `x` `[N, C]`, `w`, `b` `[C]`. Saves `x` and two numbers per row.
pub fn layer_norm(tape: &Tape, x: &Var, w: &Var, b: &Var, eps: f64) -> Result<Var> {
    expect_rank("layer_norm", "x", x, 2)?;
    expect_rank("layer_norm", "w", w, 1)?;
    expect_rank("layer_norm", "b", b, 1)?;
    let n = x.dims()[0];
    let (mean, rstd) = (tape.stat([n])?, tape.stat([n])?);
    let (dev, act, stats) = (tape.device(), tape.precision().act, [mean.clone(), rstd.clone()]);
    let forward = move |x: &Tensor, w: &Tensor, b: &Tensor| {
        let y = Tensor::empty(&*dev, Role::Activation, act, x.dims())?;
        let (x, w, b, [mean, rstd]) = (x.view(), w.view(), b.view(), &stats);
        let a = LayerNormFwd { x, w, b, y: y.out(), mean: mean.out(), rstd: rstd.out(), eps };
        dev.layer_norm_fwd(S, &a)?;
        Ok(y)
    };
    let y = forward(x.value(), w.value(), b.value())?;
    let (xs, ws, bs) = (x.keep(), w.keep(), b.key());
    let y = tape.op1(&[x, w, b], y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        let x = xs.value()?;
        let w = ws.value()?;
        let dx = g.act(xs.dims())?;
        let (dw, db) = (g.target(&ws)?, g.target(bs)?);
        let a = LayerNormBwd {
            dy: dy.view(),
            x: x.view(),
            w: w.view(),
            mean: mean.view(),
            rstd: rstd.view(),
            dx: dx.out(),
            dw: dw.as_ref().map(Tensor::acc),
            db: db.as_ref().map(Tensor::acc),
        };
        g.dev().layer_norm_bwd(S, &a)?;
        g.give(&xs, dx)
    });
    let (xs, ws, bs) = (x.keep(), w.keep(), b.keep());
    Ok(tape.cheap(y, move || forward(&xs.value()?, &ws.value()?, &bs.value()?)))
}

/// Statistics of one BatchNorm pass, for the running averages.
#[derive(Clone)]
pub struct BatchStats {
    /// `[C]`.
    pub mean: Tensor,
    /// `[C]`, biased.
    pub var: Tensor,
    /// Number of pixels behind the statistics.
    pub rows: usize,
}

/// BatchNorm with this batch's statistics, then LeakyReLU: `x` `[B, H, W, C]`, `w`, `b` `[C]`. Saves `x`.
pub fn batch_norm(tape: &Tape, x: &Var, w: &Var, b: &Var, eps: f64, slope: f64) -> Result<(Var, BatchStats)> {
    expect_rank("batch_norm", "w", w, 1)?;
    expect_rank("batch_norm", "b", b, 1)?;
    let (rows, c) = (x.dims().rows(), x.dims().cols());
    if rows < 2 {
        return Err(Error::arg("batch_norm", "x", x.dims(), "at least 2 pixels to take statistics over"));
    }
    let (mean, var) = (tape.stat([c])?, tape.stat([c])?);
    let (dev, act, of) = (tape.device(), tape.precision().act, [mean.clone(), var.clone()]);
    let forward = move |x: &Tensor, w: &Tensor, b: &Tensor| {
        let y = Tensor::empty(&*dev, Role::Activation, act, x.dims())?;
        let (x, w, b, [mean, var]) = (x.view(), w.view(), b.view(), &of);
        let a = BatchNormFwd { x, w, b, y: y.out(), mean: mean.out(), var: var.out(), eps, slope };
        dev.batch_norm_fwd(S, &a)?;
        Ok(y)
    };
    let y = forward(x.value(), w.value(), b.value())?;
    let (xs, ws, bs) = (x.keep(), w.keep(), b.keep());
    let stats = BatchStats { mean: mean.clone(), var: var.clone(), rows };
    let y = tape.op1(&[x, w, b], y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        let x = xs.value()?;
        let w = ws.value()?;
        let b = bs.value()?;
        let dx = g.act(xs.dims())?;
        let (dw, db) = (g.target(&ws)?, g.target(&bs)?);
        let a = BatchNormBwd {
            dy: dy.view(),
            x: x.view(),
            w: w.view(),
            b: b.view(),
            mean: mean.view(),
            var: var.view(),
            dx: dx.out(),
            dw: dw.as_ref().map(Tensor::acc),
            db: db.as_ref().map(Tensor::acc),
            eps,
            slope,
        };
        g.dev().batch_norm_bwd(S, &a)?;
        g.give(&xs, dx)
    });
    let (xs, ws, bs) = (x.keep(), w.keep(), b.keep());
    Ok((tape.cheap(y, move || forward(&xs.value()?, &ws.value()?, &bs.value()?)), stats))
}

/// [`batch_norm`] with the statistics of the pictures of all ranks, which have equally many pixels. As from all other ops,
/// the gradients of `w` and `b` are those of this rank's loss. Saves `x`. All ranks call it at the same point.
pub fn batch_norm_merged(
    tape: &Tape,
    x: &Var,
    w: &Var,
    b: &Var,
    eps: f64,
    slope: f64,
) -> Result<(Var, BatchStats)> {
    expect_rank("batch_norm_merged", "w", w, 1)?;
    expect_rank("batch_norm_merged", "b", b, 1)?;
    let rows = x.dims().rows().saturating_mul(tape.dev().collectives().ranks());
    if rows < 2 {
        let want = "at least 2 pixels on all ranks to take statistics over";
        return Err(Error::arg("batch_norm_merged", "x", x.dims(), want));
    }
    let y = tape.act(x.dims())?;
    let [mean, var] = merged_statistics(tape, [x, w, b].map(Var::value), &y, eps, slope)?;
    let (dev, of) = (tape.device(), [mean.clone(), var.clone()]);
    let forward = move |x: &Tensor, w: &Tensor, b: &Tensor, y: Tensor| {
        let (x, w, b, [mean, var]) = (x.view(), w.view(), b.view(), &of);
        let (mean, var) = (mean.view(), var.view());
        dev.batch_norm_eval_fwd(S, &BatchNormEvalFwd { x, w, b, mean, var, y: y.out(), eps, slope })?;
        Ok(y)
    };
    let y = forward(x.value(), w.value(), b.value(), y)?;
    let (xs, ws, bs, acc) = (x.keep(), w.keep(), b.keep(), tape.precision().acc);
    let stats = BatchStats { mean: mean.clone(), var: var.clone(), rows };
    let y = tape.op1(&[x, w, b], y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        let (x, w, b, c) = (xs.value()?, ws.value()?, bs.value()?, mean.dims().numel());
        let dx = g.act(xs.dims())?;
        let sums = Tensor::zeros(g.dev(), Role::Activation, acc, [2, c])?;
        let (db, dw) = (sums.range(0, c)?, sums.range(c, c)?);
        let (dy, x, w, b) = (dy.view(), x.view(), w.view(), b.view());
        let (mean, var) = (mean.view(), var.view());
        let (to_w, to_b, to_x) = (Some(dw.acc()), Some(db.acc()), dx.out());
        let a = BatchNormEvalBwd { dy, x, w, b, mean, var, dx: to_x, dw: to_w, db: to_b, eps, slope };
        g.dev().batch_norm_eval_bwd(S, &a)?;
        for (to, own) in [(&ws, &dw), (&bs, &db)] {
            if let Some(to) = g.target(to)? {
                g.dev().accumulate(S, &Accumulate { x: own.view(), y: to.acc() })?;
            }
        }
        g.dev().collectives().all_reduce(S, sums.acc(), Reduction::Sum)?;
        let (sums, dx_out) = (sums.view(), dx.out());
        let a = BatchNormMergedBwd { dy, x, w, b, mean, var, sums, dx: dx_out, rows, eps, slope };
        g.dev().batch_norm_merged_bwd(S, &a)?;
        g.give(&xs, dx)
    });
    // Computed again from the statistics that are kept: without the other ranks.
    let (xs, ws, bs, dev, act) = (x.keep(), w.keep(), b.keep(), tape.device(), tape.precision().act);
    let again = move || {
        let y = Tensor::empty(&*dev, Role::Activation, act, xs.dims())?;
        forward(&xs.value()?, &ws.value()?, &bs.value()?, y)
    };
    Ok((tape.cheap(y, again), stats))
}

/// Mean and biased variance `[C]` of the pictures of all ranks. `y` is scratch.
fn merged_statistics(
    tape: &Tape,
    [x, w, b]: [&Tensor; 3],
    y: &Tensor,
    eps: f64,
    slope: f64,
) -> Result<[Tensor; 2]> {
    let (dev, ranks, c) = (tape.dev(), tape.dev().collectives(), x.dims().cols());
    // A row for each rank: its means, then its variances.
    let all = tape.stat([ranks.ranks(), c.saturating_mul(2)])?;
    let own = all.rows(ranks.rank(), 1)?;
    let (x, w, b, y) = (x.view(), w.view(), b.view(), y.out());
    let (mean, var) = (own.columns(0, c)?, own.columns(c, c)?);
    dev.batch_norm_fwd(S, &BatchNormFwd { x, w, b, y, mean: mean.out(), var: var.out(), eps, slope })?;
    ranks.all_gather(S, own.view(), all.out())?;
    let (means, vars) = (all.columns(0, c)?, all.columns(c, c)?);
    let (mean, var) = (tape.stat([c])?, tape.stat([c])?);
    let a = BatchNormMerge { means: means.view(), vars: vars.view(), mean: mean.out(), var: var.out() };
    dev.batch_norm_merge(S, &a)?;
    Ok([mean, var])
}

/// BatchNorm with given statistics `mean`, `var` `[C]`, such as the running ones, then LeakyReLU: `x` `[B, H, W, C]`,
/// `w`, `b` `[C]`. Saves `x`.
pub fn batch_norm_eval(
    tape: &Tape,
    x: &Var,
    [w, b]: [&Var; 2],
    [mean, var]: [&Tensor; 2],
    eps: f64,
    slope: f64,
) -> Result<Var> {
    expect_rank("batch_norm_eval", "w", w, 1)?;
    expect_rank("batch_norm_eval", "b", b, 1)?;
    let (dev, act, of) = (tape.device(), tape.precision().act, [mean.clone(), var.clone()]);
    let forward = move |x: &Tensor, w: &Tensor, b: &Tensor| {
        let y = Tensor::empty(&*dev, Role::Activation, act, x.dims())?;
        let (x, w, b, [mean, var]) = (x.view(), w.view(), b.view(), &of);
        let (mean, var) = (mean.view(), var.view());
        dev.batch_norm_eval_fwd(S, &BatchNormEvalFwd { x, w, b, mean, var, y: y.out(), eps, slope })?;
        Ok(y)
    };
    let y = forward(x.value(), w.value(), b.value())?;
    let (xs, ws, bs, mean, var) = (x.keep(), w.keep(), b.keep(), mean.clone(), var.clone());
    let y = tape.op1(&[x, w, b], y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        let x = xs.value()?;
        let w = ws.value()?;
        let b = bs.value()?;
        let dx = g.act(xs.dims())?;
        let (dw, db) = (g.target(&ws)?, g.target(&bs)?);
        let a = BatchNormEvalBwd {
            dy: dy.view(),
            x: x.view(),
            w: w.view(),
            b: b.view(),
            mean: mean.view(),
            var: var.view(),
            dx: dx.out(),
            dw: dw.as_ref().map(Tensor::acc),
            db: db.as_ref().map(Tensor::acc),
            eps,
            slope,
        };
        g.dev().batch_norm_eval_bwd(S, &a)?;
        g.give(&xs, dx)
    });
    let (xs, ws, bs) = (x.keep(), w.keep(), b.keep());
    Ok(tape.cheap(y, move || forward(&xs.value()?, &ws.value()?, &bs.value()?)))
}

/// Rows divided by `max(norm, eps)`: `x` `[N, D]`. If `x` is a weight, its gradient stays in the accumulator type.
/// Saves `x` and one number per row.
pub fn l2_norm(tape: &Tape, x: &Var, eps: f64) -> Result<Var> {
    expect_rank("l2_norm", "x", x, 2)?;
    let (y, norm) = (tape.like(x, x.dims())?, tape.stat([x.dims()[0]])?);
    tape.dev().l2_norm_fwd(S, &L2NormFwd { x: x.value().view(), y: y.out(), norm: norm.out(), eps })?;
    let xs = x.keep();
    let weight = tape.is_weight(x);
    Ok(tape.op1(&[x], y, move |g, out| {
        let Some(dy) = g.take_acc(out)? else { return Ok(()) };
        let x = xs.value()?;
        let acc = if weight { g.target(&xs)? } else { None };
        let dx = if acc.is_none() { Some(g.like(&xs)?) } else { None };
        let a = L2NormBwd {
            dy: dy.view(),
            x: x.view(),
            norm: norm.view(),
            dx: dx.as_ref().map(Tensor::out),
            dx_acc: acc.as_ref().map(Tensor::acc),
            eps,
        };
        g.dev().l2_norm_bwd(S, &a)?;
        match dx {
            Some(dx) => g.give(&xs, dx),
            None => Ok(()),
        }
    }))
}
