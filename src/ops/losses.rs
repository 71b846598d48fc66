//! Losses. Each returns one number in the accumulator type; its weight is the gradient that seeds the backward pass.

use super::{S, expect, expect_rank};
use crate::autograd::{Tape, Var};
use crate::backend::{
    GanGeneratorBwd, GanGeneratorFwd, HingeBwd, HingeFwd, L1Bwd, L1Fwd, LecamBwd, LecamFwd, LinearXentBwd,
    LinearXentFwd, LpipsBwd, LpipsFwd, XentBwd, XentFwd,
};
use crate::error::Result;
use crate::tensor::Tensor;

/// Cross-entropy of a linear layer without storing its logits, summed over rows with `target >= 0` and multiplied by
/// the device scalar `scale`: `x` `[N, C]`, `w` `[V, C]`, `target` `[N]` i32. Saves `x` and one number per row.
pub fn linear_cross_entropy(tape: &Tape, x: &Var, w: &Var, target: &Tensor, scale: &Tensor) -> Result<Var> {
    expect_rank("linear_cross_entropy", "w", w, 2)?;
    let n = x.dims().rows();
    let (lse, loss) = (tape.stat([n])?, tape.stat([1])?);
    let a = LinearXentFwd {
        x: x.value().view(),
        w: w.value().view(),
        target: target.view(),
        scale: scale.view(),
        lse: lse.out(),
        loss: loss.out(),
    };
    tape.dev().linear_xent_fwd(S, &a)?;
    let (xs, ws, target, scale) = (x.keep(), w.keep(), target.clone(), scale.clone());
    Ok(tape.op1(&[x, w], loss, move |g, out| {
        let Some(go) = g.take(out)? else { return Ok(()) };
        let x = xs.value()?;
        let w = ws.value()?;
        let dx = g.act(xs.dims())?;
        let dw = g.target(&ws)?;
        let a = LinearXentBwd {
            x: x.view(),
            w: w.view(),
            target: target.view(),
            scale: scale.view(),
            lse: lse.view(),
            g: go.view(),
            dx: dx.out(),
            dw: dw.as_ref().map(Tensor::acc),
        };
        g.dev().linear_xent_bwd(S, &a)?;
        g.give(&xs, dx)
    }))
}

/// Cross-entropy of logits `[N, V]`, summed over rows with `target >= 0`, each multiplied by its `weight` `[N]` (1 if
/// `None`), and multiplied by the device scalar `scale`; `target` is `[N]` i32. Saves `logits` and one number per
/// row. For training, [`linear_cross_entropy`] avoids storing the logits.
pub fn cross_entropy(
    tape: &Tape,
    logits: &Var,
    target: &Tensor,
    weight: Option<&Tensor>,
    scale: &Tensor,
) -> Result<Var> {
    let (lse, loss) = (tape.stat([logits.dims().rows()])?, tape.zero_stat([1])?);
    let a = XentFwd {
        logits: logits.value().view(),
        target: target.view(),
        weight: weight.map(Tensor::view),
        scale: scale.view(),
        lse: lse.out(),
        loss: loss.acc(),
    };
    tape.dev().xent_fwd(S, &a)?;
    let (ls, target, weight, scale) = (logits.keep(), target.clone(), weight.cloned(), scale.clone());
    Ok(tape.op1(&[logits], loss, move |g, out| {
        let Some(go) = g.take(out)? else { return Ok(()) };
        let logits = ls.value()?;
        let dlogits = g.act(ls.dims())?;
        let a = XentBwd {
            logits: logits.view(),
            target: target.view(),
            weight: weight.as_ref().map(Tensor::view),
            scale: scale.view(),
            lse: lse.view(),
            g: go.view(),
            dlogits: dlogits.out(),
        };
        g.dev().xent_bwd(S, &a)?;
        g.give(&ls, dlogits)
    }))
}

/// `scale * sum |a - b|`; only `a` receives a gradient. `scale` is a device scalar, the reciprocal of the number of
/// elements of the whole batch. Saves both.
pub fn l1(tape: &Tape, a: &Var, b: &Var, scale: &Tensor) -> Result<Var> {
    expect("l1", "b", b, a.dims().as_slice())?;
    let loss = tape.zero_stat([1])?;
    let args = L1Fwd { a: a.value().view(), b: b.value().view(), scale: scale.view(), loss: loss.acc() };
    tape.dev().l1_fwd(S, &args)?;
    let (av, bv, scale) = (a.keep(), b.keep(), scale.clone());
    Ok(tape.op1(&[a], loss, move |g, out| {
        let Some(go) = g.take(out)? else { return Ok(()) };
        let a = av.value()?;
        let b = bv.value()?;
        let da = g.act(av.dims())?;
        let args = L1Bwd { a: a.view(), b: b.view(), scale: scale.view(), g: go.view(), da: da.out() };
        g.dev().l1_bwd(S, &args)?;
        g.give(&av, da)
    }))
}

/// One layer of LPIPS: `factor * scale * sum_p sum_c w[c] (n0 - n1)^2` of features `f0`, `f1` `[B, H, W, C]`, where
/// `n0`, `n1` are the features of each pixel divided by their norm plus `eps`; only `f1` receives a gradient. `scale`
/// is a device scalar, the reciprocal of the number of pictures of the whole batch; `factor` is the reciprocal of the
/// number of pixels of a picture. Saves both.
pub fn lpips_layer(
    tape: &Tape,
    f0: &Var,
    f1: &Var,
    w: &Var,
    eps: f64,
    scale: &Tensor,
    factor: f64,
) -> Result<Var> {
    expect("lpips_layer", "f1", f1, f0.dims().as_slice())?;
    expect_rank("lpips_layer", "w", w, 1)?;
    let loss = tape.zero_stat([1])?;
    let a = LpipsFwd {
        f0: f0.value().view(),
        f1: f1.value().view(),
        w: w.value().view(),
        scale: scale.view(),
        loss: loss.acc(),
        eps,
        factor,
    };
    tape.dev().lpips_fwd(S, &a)?;
    let (f0, fs, ws, scale) = (f0.keep(), f1.keep(), w.keep(), scale.clone());
    Ok(tape.op1(&[f1], loss, move |g, out| {
        let Some(go) = g.take(out)? else { return Ok(()) };
        let f0 = f0.value()?;
        let f1 = fs.value()?;
        let w = ws.value()?;
        let df1 = g.act(fs.dims())?;
        let a = LpipsBwd {
            f0: f0.view(),
            f1: f1.view(),
            w: w.view(),
            scale: scale.view(),
            g: go.view(),
            df1: df1.out(),
            eps,
            factor,
        };
        g.dev().lpips_bwd(S, &a)?;
        g.give(&fs, df1)
    }))
}

/// Non-saturating generator loss of patch logits `x` `[B, P]`: `scale * sum_b softplus(-mean_p x)`. `scale` is a
/// device scalar, the reciprocal of the number of pictures of the whole batch. Saves `x`.
pub fn gan_generator(tape: &Tape, x: &Var, scale: &Tensor) -> Result<Var> {
    let loss = tape.zero_stat([1])?;
    let a = GanGeneratorFwd { x: x.value().view(), scale: scale.view(), loss: loss.acc() };
    tape.dev().gan_generator_fwd(S, &a)?;
    let (xs, scale) = (x.keep(), scale.clone());
    Ok(tape.op1(&[x], loss, move |g, out| {
        let Some(go) = g.take(out)? else { return Ok(()) };
        let x = xs.value()?;
        let dx = g.act(xs.dims())?;
        let a = GanGeneratorBwd { x: x.view(), scale: scale.view(), g: go.view(), dx: dx.out() };
        g.dev().gan_generator_bwd(S, &a)?;
        g.give(&xs, dx)
    }))
}

/// Hinge loss of patch logits of any shape: `factor * scale * sum relu(1 - x)` if `real`, otherwise with
/// `relu(1 + x)`. `scale` is a device scalar, the reciprocal of the number of logits of the whole batch. Saves `x`.
pub fn hinge(tape: &Tape, x: &Var, real: bool, scale: &Tensor, factor: f64) -> Result<Var> {
    let loss = tape.zero_stat([1])?;
    let a = HingeFwd { x: x.value().view(), scale: scale.view(), loss: loss.acc(), real, factor };
    tape.dev().hinge_fwd(S, &a)?;
    let (xs, scale) = (x.keep(), scale.clone());
    Ok(tape.op1(&[x], loss, move |g, out| {
        let Some(go) = g.take(out)? else { return Ok(()) };
        let x = xs.value()?;
        let dx = g.act(xs.dims())?;
        let (x, scale) = (x.view(), scale.view());
        g.dev().hinge_bwd(S, &HingeBwd { x, scale, g: go.view(), dx: dx.out(), real, factor })?;
        g.give(&xs, dx)
    }))
}

/// LeCAM regulariser of real and fake patch logits against the averages `ema` `[2]`. `scale` is a device scalar, the
/// reciprocal of the number of real logits of the whole batch. Saves the logits.
pub fn lecam(tape: &Tape, real: &Var, fake: &Var, ema: &Tensor, scale: &Tensor) -> Result<Var> {
    let loss = tape.zero_stat([1])?;
    let a = LecamFwd {
        real: real.value().view(),
        fake: fake.value().view(),
        ema: ema.view(),
        scale: scale.view(),
        loss: loss.acc(),
    };
    tape.dev().lecam_fwd(S, &a)?;
    let (rs, fs, ema, scale) = (real.keep(), fake.keep(), ema.clone(), scale.clone());
    Ok(tape.op1(&[real, fake], loss, move |g, out| {
        let Some(go) = g.take(out)? else { return Ok(()) };
        let real = rs.value()?;
        let fake = fs.value()?;
        let (dreal, dfake) = (g.act(rs.dims())?, g.act(fs.dims())?);
        let a = LecamBwd {
            real: real.view(),
            fake: fake.view(),
            ema: ema.view(),
            scale: scale.view(),
            g: go.view(),
            dreal: dreal.out(),
            dfake: dfake.out(),
        };
        g.dev().lecam_bwd(S, &a)?;
        g.give(&rs, dreal)?;
        g.give(&fs, dfake)
    }))
}
