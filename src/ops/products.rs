//! Linear layers.

use super::{S, expect_rank};
use crate::autograd::{Grads, Kept, Key, Tape, Var};
use crate::backend::{ColSum, LinearGelu, Matmul, MatmulAcc, Unary, UnaryBwd};
use crate::error::Result;
use crate::tensor::Tensor;

/// `y = x w^T + b`: `x` `[.., C]` seen as rows, `w` `[O, C]`, `b` `[O]`; `y` `[N, O]`. Saves `x`.
pub fn linear(tape: &Tape, x: &Var, w: &Var, b: Option<&Var>) -> Result<Var> {
    check("linear", w, b)?;
    let (n, o) = (x.dims().rows(), w.dims().rows());
    let y = tape.act([n, o])?;
    tape.dev().matmul(
        S,
        &Matmul {
            a: x.value().view(),
            b: w.value().view(),
            ta: false,
            tb: true,
            bias: b.map(|b| b.value().view()),
            y: y.out(),
        },
    )?;
    let (xs, ws, bs) = (x.keep(), w.keep(), b.map(Var::key));
    let inputs: Vec<&Var> = [Some(x), Some(w), b].into_iter().flatten().collect();
    Ok(tape.op1(&inputs, y, move |g, out| match g.take(out)? {
        Some(dy) => linear_backward(g, &dy, &xs, &ws, bs.as_ref()),
        None => Ok(()),
    }))
}

/// `y = gelu(x w^T + b)` in the tanh form of GELU, shapes as in [`linear`]: a single kernel if the device has it.
/// Saves `x` and the sum.
pub fn linear_gelu(tape: &Tape, x: &Var, w: &Var, b: Option<&Var>) -> Result<Var> {
    check("linear_gelu", w, b)?;
    let (n, o) = (x.dims().rows(), w.dims().rows());
    let (pre, y) = (tape.act([n, o])?, tape.act([n, o])?);
    tape.dev().linear_gelu(
        S,
        &LinearGelu {
            x: x.value().view(),
            w: w.value().view(),
            bias: b.map(|b| b.value().view()),
            pre: pre.out(),
            y: y.out(),
        },
    )?;
    let (xs, ws, bs) = (x.keep(), w.keep(), b.map(Var::key));
    let inputs: Vec<&Var> = [Some(x), Some(w), b].into_iter().flatten().collect();
    Ok(tape.op1(&inputs, y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        let dpre = g.act([n, o])?;
        let f = Unary::GeluTanh;
        g.dev().unary_bwd(S, &UnaryBwd { dy: dy.view(), x: pre.view(), dx: dpre.out(), f })?;
        linear_backward(g, &dpre, &xs, &ws, bs.as_ref())
    }))
}

fn check(op: &'static str, w: &Var, b: Option<&Var>) -> Result<()> {
    expect_rank(op, "w", w, 2)?;
    b.map_or(Ok(()), |b| expect_rank(op, "b", b, 1))
}

/// Gradients of `x w^T + b` for the inputs that need them, from the gradient `dy` `[N, O]` of the sum.
fn linear_backward(g: &mut Grads, dy: &Tensor, x: &Kept, w: &Kept, b: Option<&Key>) -> Result<()> {
    if let Some(dw) = g.target(w)? {
        let x = x.value()?;
        let a = MatmulAcc { a: dy.view(), b: x.view(), ta: true, tb: false, y: dw.acc() };
        g.dev().matmul_acc(S, &a)?;
    }
    if let Some(b) = b
        && let Some(db) = g.target(b)?
    {
        g.dev().col_sum(S, &ColSum { x: dy.view(), y: db.acc() })?;
    }
    if x.needs_grad() {
        let dx = g.act([x.dims().rows(), x.dims().cols()])?;
        let w = w.value()?;
        let a = Matmul { a: dy.view(), b: w.view(), ta: false, tb: false, bias: None, y: dx.out() };
        g.dev().matmul(S, &a)?;
        g.give(x, dx.reshape(x.dims())?)?;
    }
    Ok(())
}
