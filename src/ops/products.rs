//! Linear layers.

use super::{S, expect};
use crate::autograd::{Tape, Var};
use crate::backend::{ColSum, Matmul, MatmulAcc};
use crate::error::Result;
use crate::tensor::Dims;

/// `y = x w^T + b`: `x` `[.., C]` seen as rows, `w` `[O, C]`, `b` `[O]`; `y` `[N, O]`. Saves `x`.
pub fn linear(tape: &Tape, x: &Var, w: &Var, b: Option<&Var>) -> Result<Var> {
    let (n, c, o) = (x.dims().rows(), x.dims().cols(), w.dims().rows());
    expect("linear", "w", w, &[o, c])?;
    if let Some(b) = b {
        expect("linear", "b", b, &[o])?;
    }
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
    let (xs, ws, bs) = (x.clone(), w.clone(), b.cloned());
    let inputs: Vec<&Var> = [Some(x), Some(w), b].into_iter().flatten().collect();
    Ok(tape.op1(&inputs, y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        if let Some(dw) = g.target(&ws)? {
            let a = MatmulAcc { a: dy.view(), b: xs.value().view(), ta: true, tb: false, y: dw.acc() };
            g.dev().matmul_acc(S, &a)?;
        }
        if let Some(b) = &bs
            && let Some(db) = g.target(b)?
        {
            g.dev().col_sum(S, &ColSum { x: dy.view(), y: db.acc() })?;
        }
        if xs.needs_grad() {
            let dx = g.act([n, c])?;
            let a =
                Matmul { a: dy.view(), b: ws.value().view(), ta: false, tb: false, bias: None, y: dx.out() };
            g.dev().matmul(S, &a)?;
            let dims: Dims = xs.dims();
            g.give(&xs, dx.reshape(dims)?)?;
        }
        Ok(())
    }))
}
