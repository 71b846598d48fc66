//! Convolution and resampling of NHWC images.

use super::norm::GroupStats;
use super::{S, expect_rank};
use crate::autograd::{Grads, Kept, Key, Tape, Var};
use crate::backend::{
    ColSum, Conv2dBwdData, Conv2dBwdWeight, Conv2dFwd, In, MaxPool2x2Bwd, MaxPool2x2Fwd, Role, Upsample2xBwd,
    Upsample2xFwd, Upsample2xWeightsBwd, Upsample2xWeightsFwd,
};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Stride and zero padding of a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv {
    /// Step between outputs.
    pub stride: usize,
    /// Zeros above and to the left.
    pub before: usize,
    /// Zeros below and to the right.
    pub after: usize,
}

impl Conv {
    /// Stride 1, with the padding `k / 2` that keeps the size of the input for an odd kernel size `k`.
    pub fn same(kernel: usize) -> Self {
        Conv { stride: 1, before: kernel / 2, after: kernel / 2 }
    }

    fn output(&self, size: usize, kernel: usize) -> Option<usize> {
        let padded = size.checked_add(self.before)?.checked_add(self.after)?;
        Some(padded.checked_sub(kernel)? / self.stride + 1)
    }
}

/// What a convolution does on its way in and out.
#[derive(Clone, Copy, Default)]
pub struct ConvWith<'a> {
    /// Normalises the input and applies SiLU. The activation is not stored.
    pub norm: Option<InputNorm<'a>>,
    /// Added to the output, in its shape.
    pub residual: Option<&'a Var>,
    /// Groups of the next GroupNorm, and what is added to its variance: its statistics are computed with the output.
    pub stats: Option<(usize, f64)>,
}

/// A GroupNorm followed by SiLU, on the way into a convolution.
#[derive(Clone, Copy)]
pub struct InputNorm<'a> {
    /// Of the input.
    pub stats: &'a GroupStats,
    /// Scale `[C]`.
    pub w: &'a Var,
    /// Shift `[C]`.
    pub b: &'a Var,
}

/// `x` `[B, H, W, C]`, `w` `[O, kh, kw, C]`, `b` `[O]`; `y` `[B, H', W', O]`. Saves `x`.
pub fn conv2d(tape: &Tape, x: &Var, w: &Var, b: Option<&Var>, conv: Conv) -> Result<Var> {
    Ok(conv2d_with(tape, x, w, b, conv, ConvWith::default())?.0)
}

/// [`conv2d`] of `SiLU(GroupNorm(x))` plus a residual, and the statistics of the next GroupNorm, each if asked for.
/// Saves `x` and statistics `[B, G]`. The gradient of `x` includes the part that passes through its statistics.
pub fn conv2d_with(
    tape: &Tape,
    x: &Var,
    w: &Var,
    b: Option<&Var>,
    conv: Conv,
    with: ConvWith<'_>,
) -> Result<(Var, Option<GroupStats>)> {
    expect_rank("conv2d", "x", x, 4)?;
    expect_rank("conv2d", "w", w, 4)?;
    if let Some(b) = b {
        expect_rank("conv2d", "b", b, 1)?;
    }
    let (xd, wd) = (x.dims(), w.dims());
    if conv.stride == 0 {
        return Err(Error::arg("conv2d", "stride", conv.stride, "1 or more"));
    }
    let (Some(h), Some(wide)) = (conv.output(xd[1], wd[1]), conv.output(xd[2], wd[2])) else {
        let want = format!("at least the kernel, {}x{}, less its padding", wd[1], wd[2]);
        return Err(Error::arg("conv2d", "x", format!("{}x{} pixels", xd[1], xd[2]), want));
    };
    let y = tape.like(x, [xd[0], h, wide, wd[0]])?;
    let stats = match with.stats {
        Some((groups, _)) => Some(GroupStats::empty(tape, "conv2d", y.dims(), groups)?),
        None => None,
    };
    let norm = with.norm.map(|n| SavedNorm {
        mean: n.stats.mean.value().clone(),
        rstd: n.stats.rstd.value().clone(),
        w: n.w.keep(),
        b: n.b.keep(),
    });
    let of_norm = norm.as_ref().map(SavedNorm::tensors).transpose()?;
    let [mean, rstd, gamma, beta] = views(of_norm.as_ref());
    tape.dev().conv2d_fwd(
        S,
        &Conv2dFwd {
            x: x.value().view(),
            mean,
            rstd,
            gamma,
            beta,
            w: w.value().view(),
            bias: b.map(|b| b.value().view()),
            residual: with.residual.map(|r| r.value().view()),
            y: y.out(),
            y_mean: stats.as_ref().map(|s| s.mean.value().out()),
            y_rstd: stats.as_ref().map(|s| s.rstd.value().out()),
            eps: with.stats.map_or(0.0, |(_, eps)| eps),
            stride: conv.stride,
            pad_top: conv.before,
            pad_left: conv.before,
        },
    )?;
    let of_norm = with.norm.map(|n| [n.w, n.b]).into_iter().flatten();
    let inputs: Vec<&Var> =
        [Some(x), Some(w), b, with.residual].into_iter().flatten().chain(of_norm).collect();
    let saved = Saved { x: x.keep(), w: w.keep(), b: b.map(Var::key), norm, conv };
    let residual = with.residual.map(Var::key);
    let y = tape.op1(&inputs, y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        saved.weights(g, &dy)?;
        if let Some(r) = residual {
            g.give(r, dy.clone())?;
        }
        saved.input(g, &dy)
    });
    Ok((y, stats))
}

/// What the backward pass of a convolution needs.
struct Saved {
    x: Kept,
    w: Kept,
    b: Option<Key>,
    norm: Option<SavedNorm>,
    conv: Conv,
}

struct SavedNorm {
    mean: Tensor,
    rstd: Tensor,
    w: Kept,
    b: Kept,
}

impl SavedNorm {
    /// Statistics, scale and shift.
    fn tensors(&self) -> Result<[Tensor; 4]> {
        Ok([self.mean.clone(), self.rstd.clone(), self.w.value()?, self.b.value()?])
    }
}

/// The tensors of a norm as arguments of a kernel.
fn views(norm: Option<&[Tensor; 4]>) -> [Option<In<'_>>; 4] {
    norm.map_or([None; 4], |norm| norm.each_ref().map(|t| Some(t.view())))
}

impl Saved {
    /// The gradients of weights and bias.
    fn weights(&self, g: &mut Grads, dy: &Tensor) -> Result<()> {
        let db = match &self.b {
            Some(b) => g.target(b)?,
            None => None,
        };
        if let Some(dw) = g.target(&self.w)? {
            let (x, norm) = (self.x.value()?, self.norm.as_ref().map(SavedNorm::tensors).transpose()?);
            let [mean, rstd, gamma, beta] = views(norm.as_ref());
            let a = Conv2dBwdWeight {
                x: x.view(),
                mean,
                rstd,
                gamma,
                beta,
                dy: dy.view(),
                dw: dw.acc(),
                db: db.as_ref().map(|t| t.acc()),
                stride: self.conv.stride,
                pad_top: self.conv.before,
                pad_left: self.conv.before,
            };
            g.dev().conv2d_bwd_weight(S, &a)?;
        } else if let Some(db) = db {
            let rows = dy.reshape([dy.dims().rows(), dy.dims().cols()])?;
            g.dev().col_sum(S, &ColSum { x: rows.view(), y: db.acc() })?;
        }
        Ok(())
    }

    /// The gradients of the input, and of scale and shift of its norm.
    fn input(&self, g: &mut Grads, dy: &Tensor) -> Result<()> {
        let (x, conv) = (&self.x, self.conv);
        let of_norm = self.norm.as_ref().is_some_and(|n| n.w.needs_grad() || n.b.needs_grad());
        if !x.needs_grad() && !of_norm {
            return Ok(());
        }
        let (dx, w) = (g.like(x)?, self.w.value()?);
        let plain =
            Conv2dBwdData::plain([dy.view(), w.view()], dx.out(), conv.stride, [conv.before, conv.before]);
        let Some(norm) = &self.norm else {
            g.dev().conv2d_bwd_data(S, &plain)?;
            return g.give(x, dx);
        };
        // What x has already got, from the residual of its block, is added on the way.
        let skip = if x.needs_grad() { g.take(x)? } else { None };
        let (dgamma, dbeta) = (g.target(&norm.w)?, g.target(&norm.b)?);
        let (value, norm) = (x.value()?, norm.tensors()?);
        let [mean, rstd, gamma, beta] = views(Some(&norm));
        let a = Conv2dBwdData {
            x: Some(value.view()),
            mean,
            rstd,
            gamma,
            beta,
            skip: skip.as_ref().map(Tensor::view),
            dgamma: dgamma.as_ref().map(Tensor::acc),
            dbeta: dbeta.as_ref().map(Tensor::acc),
            ..plain
        };
        g.dev().conv2d_bwd_data(S, &a)?;
        g.give(x, dx)
    }
}

/// [`upsample2x`], then a 3x3 convolution of padding 1: `x` `[B, H, W, C]`, `w` `[O, 3, 3, C]`, `b` `[O]`; `y`
/// `[B, 2H, 2W, O]`. The image between is never formed: four of the nine taps meet different pixels of `x`
/// (docs/convolution.md). Saves `x`.
pub fn upsample2x_conv2d(tape: &Tape, x: &Var, w: &Var, b: Option<&Var>) -> Result<Var> {
    expect_rank("upsample2x_conv2d", "x", x, 4)?;
    expect_rank("upsample2x_conv2d", "w", w, 4)?;
    if let Some(b) = b {
        expect_rank("upsample2x_conv2d", "b", b, 1)?;
    }
    let (d, [o, c]) = (x.dims(), [w.dims()[0], w.dims()[3]]);
    let v = tape.like(w, [c, 4, 4, o])?;
    tape.dev().upsample2x_weights_fwd(S, &Upsample2xWeightsFwd { w: w.value().view(), v: v.out() })?;
    let y = tape.like(x, [d[0], 2 * d[1], 2 * d[2], o])?;
    let plain = Conv2dBwdData::plain([x.value().view(), v.view()], y.out(), 2, [1, 1]);
    let bias = b.map(|b| b.value().view());
    tape.dev().conv2d_bwd_data(S, &Conv2dBwdData { bias, ..plain })?;
    let (xs, ws, bs) = (x.keep(), w.key(), b.map(Var::key));
    let inputs: Vec<&Var> = [Some(x), Some(w), b].into_iter().flatten().collect();
    Ok(tape.op1(&inputs, y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        if let Some(b) = &bs
            && let Some(db) = g.target(b)?
        {
            let rows = dy.reshape([dy.dims().rows(), dy.dims().cols()])?;
            g.dev().col_sum(S, &ColSum { x: rows.view(), y: db.acc() })?;
        }
        if let Some(dw) = g.target(ws)? {
            let (x, dv) = (xs.value()?, Tensor::zeros(g.dev(), Role::Workspace, dw.dtype(), v.dims())?);
            let a = Conv2dBwdWeight::plain([dy.view(), x.view()], dv.acc(), None, 2, [1, 1]);
            g.dev().conv2d_bwd_weight(S, &a)?;
            g.dev().upsample2x_weights_bwd(S, &Upsample2xWeightsBwd { dv: dv.view(), dw: dw.acc() })?;
        }
        if xs.needs_grad() {
            let dx = g.like(&xs)?;
            g.dev().conv2d_fwd(S, &Conv2dFwd::plain([dy.view(), v.view()], None, dx.out(), 2, [1, 1]))?;
            g.give(&xs, dx)?;
        }
        Ok(())
    }))
}

/// Nearest-neighbour upsampling by two: `[B, H, W, C]` to `[B, 2H, 2W, C]`. Saves nothing.
pub fn upsample2x(tape: &Tape, x: &Var) -> Result<Var> {
    expect_rank("upsample2x", "x", x, 4)?;
    let d = x.dims();
    let y = tape.act([d[0], 2 * d[1], 2 * d[2], d[3]])?;
    tape.dev().upsample2x_fwd(S, &Upsample2xFwd { x: x.value().view(), y: y.out() })?;
    let xs = x.key();
    Ok(tape.op1(&[x], y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        let dx = g.act(xs.dims())?;
        g.dev().upsample2x_bwd(S, &Upsample2xBwd { dy: dy.view(), dx: dx.out() })?;
        g.give(xs, dx)
    }))
}

/// 2x2 max pooling: `[B, H, W, C]` to `[B, H/2, W/2, C]`. Saves `x`.
pub fn max_pool2x2(tape: &Tape, x: &Var) -> Result<Var> {
    expect_rank("max_pool2x2", "x", x, 4)?;
    let d = x.dims();
    let y = tape.act([d[0], d[1] / 2, d[2] / 2, d[3]])?;
    tape.dev().max_pool2x2_fwd(S, &MaxPool2x2Fwd { x: x.value().view(), y: y.out() })?;
    let xs = x.keep();
    Ok(tape.op1(&[x], y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        let x = xs.value()?;
        let dx = g.act(xs.dims())?;
        let a = MaxPool2x2Bwd { dy: dy.view(), x: x.view(), dx: dx.out() };
        g.dev().max_pool2x2_bwd(S, &a)?;
        g.give(&xs, dx)
    }))
}
