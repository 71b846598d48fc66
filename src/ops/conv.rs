//! Convolution and resampling of NHWC images.

use super::{S, expect_rank};
use crate::autograd::{Tape, Var};
use crate::backend::{
    ColSum, Conv2dBwdData, Conv2dBwdWeight, Conv2dFwd, MaxPool2x2Bwd, MaxPool2x2Fwd, Upsample2xBwd,
    Upsample2xFwd,
};
use crate::error::{Error, Result};

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

/// `x` `[B, H, W, C]`, `w` `[O, kh, kw, C]`, `b` `[O]`; `y` `[B, H', W', O]`. Saves `x`.
pub fn conv2d(tape: &Tape, x: &Var, w: &Var, b: Option<&Var>, conv: Conv) -> Result<Var> {
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
    tape.dev().conv2d_fwd(
        S,
        &Conv2dFwd {
            x: x.value().view(),
            w: w.value().view(),
            bias: b.map(|b| b.value().view()),
            y: y.out(),
            stride: conv.stride,
            pad_top: conv.before,
            pad_left: conv.before,
        },
    )?;
    let (xs, ws, bs) = (x.keep(), w.keep(), b.map(Var::key));
    let inputs: Vec<&Var> = [Some(x), Some(w), b].into_iter().flatten().collect();
    Ok(tape.op1(&inputs, y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        let x = xs.value()?;
        let w = ws.value()?;
        let db = match &bs {
            Some(b) => g.target(b)?,
            None => None,
        };
        if let Some(dw) = g.target(&ws)? {
            let a = Conv2dBwdWeight {
                x: x.view(),
                dy: dy.view(),
                dw: dw.acc(),
                db: db.as_ref().map(|t| t.acc()),
                stride: conv.stride,
                pad_top: conv.before,
                pad_left: conv.before,
            };
            g.dev().conv2d_bwd_weight(S, &a)?;
        } else if let Some(db) = db {
            let rows = dy.reshape([dy.dims().rows(), dy.dims().cols()])?;
            g.dev().col_sum(S, &ColSum { x: rows.view(), y: db.acc() })?;
        }
        if xs.needs_grad() {
            let dx = g.like(&xs)?;
            let a = Conv2dBwdData {
                dy: dy.view(),
                w: w.view(),
                dx: dx.out(),
                stride: conv.stride,
                pad_top: conv.before,
                pad_left: conv.before,
            };
            g.dev().conv2d_bwd_data(S, &a)?;
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
        g.give(&xs, dx)
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
