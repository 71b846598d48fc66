//! Element-wise ops, rotary embedding, and concatenating or splitting rows.

use super::{S, expect, expect_rank};
use crate::autograd::{Key, Tape, Var};
use crate::backend::{
    Add, Cast, ChannelAffineBwd, ChannelAffineFwd, DType, Dims, Fill, Role, Rope, SwigluBwd, SwigluFwd,
    Unary, UnaryBwd, UnaryFwd,
};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// `y = f(x)`, any shape. Saves `x`.
pub fn unary(tape: &Tape, x: &Var, f: Unary) -> Result<Var> {
    let (dev, act) = (tape.device(), tape.precision().act);
    let forward = move |x: &Tensor| {
        let y = Tensor::empty(&*dev, Role::Activation, act, x.dims())?;
        dev.unary_fwd(S, &UnaryFwd { x: x.view(), y: y.out(), f })?;
        Ok(y)
    };
    let y = forward(x.value())?;
    let xs = x.keep();
    let y = tape.op1(&[x], y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        let x = xs.value()?;
        let dx = g.act(xs.dims())?;
        g.dev().unary_bwd(S, &UnaryBwd { dy: dy.view(), x: x.view(), dx: dx.out(), f })?;
        g.give(&xs, dx)
    });
    let xs = x.keep();
    Ok(tape.cheap(y, move || forward(&xs.value()?)))
}

/// `y = a + b`, equal shapes. Saves nothing.
pub fn add(tape: &Tape, a: &Var, b: &Var) -> Result<Var> {
    expect("add", "b", b, a.dims().as_slice())?;
    let y = tape.act(a.dims())?;
    tape.dev().add(S, &Add { a: a.value().view(), b: b.value().view(), y: y.out() })?;
    let (av, bv) = (a.key(), b.key());
    Ok(tape.op1(&[a, b], y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        g.give(av, dy.clone())?;
        g.give(bv, dy)
    }))
}

/// `y = (x - shift) / scale` over the last dimension; `shift`, `scale` `[C]` are constants. Saves nothing.
pub fn channel_affine(tape: &Tape, x: &Var, shift: &Var, scale: &Var) -> Result<Var> {
    expect_rank("channel_affine", "shift", shift, 1)?;
    expect_rank("channel_affine", "scale", scale, 1)?;
    let y = tape.act(x.dims())?;
    let a = ChannelAffineFwd {
        x: x.value().view(),
        shift: shift.value().view(),
        scale: scale.value().view(),
        y: y.out(),
    };
    tape.dev().channel_affine_fwd(S, &a)?;
    let (xs, scale) = (x.key(), scale.clone());
    Ok(tape.op1(&[x], y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        let dx = g.act(xs.dims())?;
        let a = ChannelAffineBwd { dy: dy.view(), scale: scale.value().view(), dx: dx.out() };
        g.dev().channel_affine_bwd(S, &a)?;
        g.give(xs, dx)
    }))
}

/// `y = silu(gate) * up`: `gate_up` `[N, 2F]`, `y` `[N, F]`. Saves `gate_up`.
pub fn swiglu(tape: &Tape, gate_up: &Var) -> Result<Var> {
    expect_rank("swiglu", "gate_up", gate_up, 2)?;
    let (n, f) = (gate_up.dims()[0], gate_up.dims()[1] / 2);
    let (dev, act) = (tape.device(), tape.precision().act);
    let forward = move |gate_up: &Tensor| {
        let y = Tensor::empty(&*dev, Role::Activation, act, [n, f])?;
        dev.swiglu_fwd(S, &SwigluFwd { gate_up: gate_up.view(), y: y.out() })?;
        Ok(y)
    };
    let y = forward(gate_up.value())?;
    let (xs, to) = (gate_up.keep(), gate_up.key());
    let y = tape.op1(&[gate_up], y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        let x = xs.into_value()?;
        // The gradient takes the place of a value that nobody else holds: it is the largest of a language model.
        let dx = if x.is_shared() { g.act(x.dims())? } else { x.clone() };
        let a = SwigluBwd { dy: dy.view(), gate_up: x.view(), dgate_up: dx.out() };
        g.dev().swiglu_bwd(S, &a)?;
        g.give(to, dx)
    });
    let xs = gate_up.keep();
    Ok(tape.cheap(y, move || forward(&xs.value()?)))
}

/// Rotary embedding: the number of rotated heads, their dimension, and the base of the angles.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rotary {
    /// Leading heads of `D` columns that are rotated; further columns are copied.
    pub heads: usize,
    /// Head dimension D, even.
    pub head_dim: usize,
    /// Base of the angles.
    pub theta: f64,
}

impl Rotary {
    fn args<'a>(&self, x: &'a Tensor, position: &'a Tensor, y: &'a Tensor, inverse: bool) -> Rope<'a> {
        let (x, position, y) = (x.view(), position.view(), y.out());
        let Rotary { heads, head_dim, theta } = *self;
        Rope { x, position, y, heads, head_dim, theta, inverse }
    }
}

/// Rotates the leading heads of `x` `[N, >= heads*D]` by `position` `[N]` i32. Saves `position`.
pub fn rope(tape: &Tape, x: &Var, position: &Tensor, r: Rotary) -> Result<Var> {
    expect_rank("rope", "x", x, 2)?;
    let y = tape.act(x.dims())?;
    tape.dev().rope(S, &r.args(x.value(), position, &y, false))?;
    let (xs, position) = (x.key(), position.clone());
    Ok(tape.op1(&[x], y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        let dx = g.act(xs.dims())?;
        g.dev().rope(S, &r.args(&dy, &position, &dx, true))?;
        g.give(xs, dx)
    }))
}

/// Concatenates the rows of all `parts` (`[n_i, C]` or more dimensions, equal C): `[sum n_i, C]`.
pub fn concat_rows(tape: &Tape, parts: &[&Var]) -> Result<Var> {
    let Some(first) = parts.first() else {
        return Err(Error::arg("concat_rows", "parts", "empty", "at least one"));
    };
    let c = first.dims().cols();
    if let Some(p) = parts.iter().find(|p| p.dims().cols() != c) {
        return Err(Error::arg("concat_rows", "parts", p.dims(), format!("{c} columns")));
    }
    let total = parts.iter().map(|p| p.dims().rows()).sum();
    let y = tape.like(first, [total, c])?;
    let mut at = 0;
    for p in parts {
        let n = p.dims().rows();
        tape.dev().cast(S, &Cast { x: p.value().reshape([n, c])?.view(), y: y.rows(at, n)?.out() })?;
        at += n;
    }
    let saved: Vec<Key> = parts.iter().map(|p| p.key()).collect();
    Ok(tape.op1(parts, y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        let mut at = 0;
        for p in &saved {
            let n = p.dims().rows();
            g.give(p, dy.rows(at, n)?.reshape(p.dims())?)?;
            at += n;
        }
        Ok(())
    }))
}

/// Splits the rows of `x` `[N, C]` into runs of `counts` rows, which must add up to N. The parts are views.
pub fn split_rows(tape: &Tape, x: &Var, counts: &[usize]) -> Result<Vec<Var>> {
    expect_rank("split_rows", "x", x, 2)?;
    let (n, c) = (x.dims()[0], x.dims()[1]);
    if counts.iter().sum::<usize>() != n {
        return Err(Error::arg("split_rows", "counts", format!("{counts:?}"), format!("a sum of {n}")));
    }
    let mut at = 0;
    let mut parts = Vec::new();
    for &k in counts {
        parts.push(x.value().rows(at, k)?);
        at += k;
    }
    let xs = x.key();
    Ok(tape.op(&[x], parts, move |g, outs| {
        let dx = g.act([n, c])?;
        let mut at = 0;
        for out in outs {
            let k = out.dims().rows();
            let to = dx.rows(at, k)?;
            match g.take(out)? {
                Some(dy) => g.dev().cast(S, &Cast { x: dy.view(), y: to.out() })?,
                None => g.dev().fill(S, &Fill { y: to.out(), value: 0.0 })?,
            }
            at += k;
        }
        g.give(xs, dx)
    }))
}

/// The values of `x` rounded to `dtype`; their gradient is rounded to the type of `x`. Returns `x` itself if it has type
/// `dtype`. Saves nothing.
pub fn cast(tape: &Tape, x: &Var, dtype: DType) -> Result<Var> {
    if x.value().dtype() == dtype {
        return Ok(x.clone());
    }
    let y = Tensor::empty(tape.dev(), Role::Activation, dtype, x.dims())?;
    tape.dev().cast(S, &Cast { x: x.value().view(), y: y.out() })?;
    let xs = x.key();
    Ok(tape.op1(&[x], y, move |g, out| {
        let Some(dy) = g.take_acc(out)? else { return Ok(()) };
        let dx = g.like(xs)?;
        g.dev().cast(S, &Cast { x: dy.view(), y: dx.out() })?;
        g.give(xs, dx)
    }))
}

/// The same values with another shape. Saves nothing and copies nothing.
pub fn reshape(tape: &Tape, x: &Var, dims: impl Into<Dims>) -> Result<Var> {
    let y = x.value().reshape(dims)?;
    let xs = x.key();
    Ok(tape.op1(&[x], y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        g.give(xs, dy.reshape(xs.dims())?)
    }))
}
