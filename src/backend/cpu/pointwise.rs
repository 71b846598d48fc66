//! Element-wise kernels.

use num_traits::{Float, One, Zero};
use rayon::prelude::*;

use super::workspace::no_workspace;
use super::*;

no_workspace!(
    unary_fwd(UnaryFwd),
    unary_bwd(UnaryBwd),
    add(Add),
    accumulate(Accumulate),
    cast(Cast),
    fill(Fill),
    channel_affine_fwd(ChannelAffineFwd),
    channel_affine_bwd(ChannelAffineBwd),
    swiglu_fwd(SwigluFwd),
    swiglu_bwd(SwigluBwd),
    rope(Rope)
);

pub(super) fn unary_fwd(_ws: &Workspace, s: &UnaryFwd) -> Result<()> {
    by_dtype!("unary_fwd", s.y.0.dtype, T => unary_fwd_of::<T>(s))
}

pub(super) fn unary_bwd(_ws: &Workspace, s: &UnaryBwd) -> Result<()> {
    by_dtype!("unary_bwd", s.dx.0.dtype, T => unary_bwd_of::<T>(s))
}

pub(super) fn add(_ws: &Workspace, s: &Add) -> Result<()> {
    by_dtype!("add", s.y.0.dtype, T => {
        map2::<T>("add", ("a", &s.a), ("b", &s.b), ("y", &s.y.0), #[inline(always)] |a, b| a + b)
    })
}

pub(super) fn accumulate(_ws: &Workspace, s: &Accumulate) -> Result<()> {
    by_dtype!("accumulate", s.x.dtype, X => by_dtype!("accumulate", s.y.0.dtype, Y => {
        map::<X, Y>("accumulate", &s.x, ("y", &s.y.0), #[inline(always)] |x, y| {
            *y = Y::down(y.up() + convert::<X, Y>(x));
        })
    }))
}

pub(super) fn cast(_ws: &Workspace, s: &Cast) -> Result<()> {
    by_dtype!("cast", s.x.dtype, X => by_dtype!("cast", s.y.0.dtype, Y => {
        map::<X, Y>("cast", &s.x, ("y", &s.y.0), #[inline(always)] |x, y| {
            *y = Y::down(convert::<X, Y>(x));
        })
    }))
}

pub(super) fn fill(_ws: &Workspace, s: &Fill) -> Result<()> {
    if s.y.0.dtype == DType::I32 {
        return fill_with(&s.y.0, s.value as i32);
    }
    by_dtype!("fill", s.y.0.dtype, T => {
        fill_with(&s.y.0, T::down(<T as Elem>::Acc::of(s.value)))
    })
}

pub(super) fn channel_affine_fwd(_ws: &Workspace, s: &ChannelAffineFwd) -> Result<()> {
    by_dtype!("channel_affine_fwd", s.y.0.dtype, T => affine_fwd::<T>(s))
}

pub(super) fn channel_affine_bwd(_ws: &Workspace, s: &ChannelAffineBwd) -> Result<()> {
    by_dtype!("channel_affine_bwd", s.dx.0.dtype, T => affine_bwd::<T>(s))
}

pub(super) fn swiglu_fwd(_ws: &Workspace, s: &SwigluFwd) -> Result<()> {
    by_dtype!("swiglu_fwd", s.y.0.dtype, T => swiglu_fwd_of::<T>(s))
}

pub(super) fn swiglu_bwd(_ws: &Workspace, s: &SwigluBwd) -> Result<()> {
    by_dtype!("swiglu_bwd", s.dgate_up.0.dtype, T => swiglu_bwd_of::<T>(s))
}

pub(super) fn rope(_ws: &Workspace, s: &Rope) -> Result<()> {
    by_dtype!("rope", s.y.0.dtype, T => rope_of::<T>(s))
}

// ---- loops ---------------------------------------------------------------------------------------------

/// Calls `f` with the elements of `x` and `y`: in flat chunks if both are contiguous, else row by row.
fn map<X: Elem, Y: Elem>(
    op: &'static str,
    x: &In,
    (arg, y): (&'static str, &In),
    f: impl Fn(X, &mut Y) + Sync,
) -> Result<()> {
    expect_rows(op, arg, y, x.dims.rows(), x.dims.cols())?;
    let each = |x: &[X], y: &mut [Y]| {
        simd(
            #[inline(always)]
            || x.iter().zip(y).for_each(|(x, y)| f(*x, y)),
        )
    };
    if x.is_contiguous() && y.is_contiguous() {
        let (x, y) = (flat::<X>(op, "x", x)?, flat_mut::<Y>(op, arg, y)?);
        x.par_chunks(CHUNK).zip(y.par_chunks_mut(CHUNK)).for_each(|(x, y)| each(x, y));
    } else {
        let (x, y) = (rows::<X>(op, "x", x)?, rows_mut::<Y>(op, arg, y)?);
        par_for(y.rows, chunk_rows(y.cols), |r| {
            for i in r {
                // SAFETY: chunks do not share rows.
                let y = unsafe { y.row(i) };
                each(x.row(i), y);
            }
        });
    }
    Ok(())
}

/// `y = f(a, b)`, element by element, as `map` does.
fn map2<T: Elem>(
    op: &'static str,
    (arg_a, a): (&'static str, &In),
    (arg_b, b): (&'static str, &In),
    (arg_y, y): (&'static str, &In),
    f: impl Fn(T::Acc, T::Acc) -> T::Acc + Sync,
) -> Result<()> {
    expect_rows(op, arg_b, b, a.dims.rows(), a.dims.cols())?;
    expect_rows(op, arg_y, y, a.dims.rows(), a.dims.cols())?;
    let each = |a: &[T], b: &[T], y: &mut [T]| {
        simd(
            #[inline(always)]
            || a.iter().zip(b).zip(y).for_each(|((a, b), y)| *y = T::down(f(a.up(), b.up()))),
        )
    };
    if a.is_contiguous() && b.is_contiguous() && y.is_contiguous() {
        let (a, b) = (flat::<T>(op, arg_a, a)?, flat::<T>(op, arg_b, b)?);
        let chunks = a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK));
        let y = flat_mut::<T>(op, arg_y, y)?.par_chunks_mut(CHUNK);
        chunks.zip(y).for_each(|((a, b), y)| each(a, b, y));
    } else {
        let (a, b) = (rows::<T>(op, arg_a, a)?, rows::<T>(op, arg_b, b)?);
        let y = rows_mut::<T>(op, arg_y, y)?;
        par_for(y.rows, chunk_rows(y.cols), |r| {
            for i in r {
                // SAFETY: chunks do not share rows.
                let y = unsafe { y.row(i) };
                each(a.row(i), b.row(i), y);
            }
        });
    }
    Ok(())
}

#[inline(always)]
fn convert<X: Elem, Y: Elem>(x: X) -> Y::Acc {
    Y::Acc::of(x.up().wide())
}

fn fill_with<T: Element>(y: &In, value: T) -> Result<()> {
    if y.is_contiguous() {
        flat_mut::<T>("fill", "y", y)?.par_chunks_mut(CHUNK).for_each(|y| y.fill(value));
    } else {
        let y = rows_mut::<T>("fill", "y", y)?;
        par_for(y.rows, chunk_rows(y.cols), |r| {
            for i in r {
                // SAFETY: chunks do not share rows.
                unsafe { y.row(i) }.fill(value);
            }
        });
    }
    Ok(())
}

// ---- functions -----------------------------------------------------------------------------------------

/// 1 / (1 + e^-x).
#[inline(always)]
pub(super) fn sigmoid<R: Real>(x: R) -> R {
    R::one() / (R::one() + (-x).fast_exp())
}

/// x sigmoid(x).
#[inline(always)]
pub(super) fn silu<R: Real>(x: R) -> R {
    x * sigmoid(x)
}

/// Derivative of `silu`.
#[inline(always)]
pub(super) fn silu_slope<R: Real>(x: R) -> R {
    let s = sigmoid(x);
    s * (R::one() + x * (R::one() - s))
}

/// `sigmoid(2u)` of the tanh form of GELU, and the derivative of `2u`.
#[inline(always)]
fn tanh_gate<R: Real>(x: R) -> (R, R) {
    let (a, b) = (R::of(2.0 * (2.0 / std::f64::consts::PI).sqrt()), R::of(0.044715));
    let square = x * x;
    (sigmoid(a * x * (R::one() + b * square)), a * (R::one() + R::of(3.0) * b * square))
}

/// The tanh form of GELU.
#[inline(always)]
pub(super) fn gelu_tanh<R: Real>(x: R) -> R {
    x * tanh_gate(x).0
}

/// The normal distribution function.
#[inline(always)]
fn normal<R: Real>(x: R) -> R {
    R::of(0.5) * (R::one() + (x * R::of(std::f64::consts::FRAC_1_SQRT_2)).erf())
}

/// The normal density.
#[inline(always)]
fn density<R: Real>(x: R) -> R {
    (x * x * R::of(-0.5)).fast_exp()
        * R::of(0.5 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2)
}

/// `x` if positive, else `slope * x`; NaN stays NaN.
#[inline(always)]
pub(super) fn leaky<R: Real>(x: R, slope: R) -> R {
    if x > R::zero() { x } else { slope * x }
}

/// Derivative of `leaky`: `slope` at 0.
#[inline(always)]
pub(super) fn leaky_slope<R: Real>(x: R, slope: R) -> R {
    if x > R::zero() { R::one() } else { slope }
}

fn unary_fwd_of<T: Elem>(s: &UnaryFwd) -> Result<()> {
    match s.f {
        Unary::Silu => unary_map::<T>(s, silu),
        Unary::Gelu => unary_map::<T>(
            s,
            #[inline(always)]
            |x| x * normal(x),
        ),
        Unary::GeluTanh => unary_map::<T>(s, gelu_tanh),
        // Not `leaky(x, 0)`, which would give -inf * 0.
        Unary::Relu => unary_map::<T>(
            s,
            #[inline(always)]
            |x| if x <= T::Acc::zero() { T::Acc::zero() } else { x },
        ),
        Unary::LeakyRelu(slope) => {
            let slope = T::Acc::of(slope);
            unary_map::<T>(
                s,
                #[inline(always)]
                move |x| leaky(x, slope),
            )
        }
    }
}

fn unary_map<T: Elem>(s: &UnaryFwd, f: impl Fn(T::Acc) -> T::Acc + Sync) -> Result<()> {
    map::<T, T>(
        "unary_fwd",
        &s.x,
        ("y", &s.y.0),
        #[inline(always)]
        |x, y| *y = T::down(f(x.up())),
    )
}

fn unary_bwd_of<T: Elem>(s: &UnaryBwd) -> Result<()> {
    match s.f {
        Unary::Silu => unary_map2::<T>(s, silu_slope),
        Unary::Gelu => unary_map2::<T>(
            s,
            #[inline(always)]
            |x| normal(x) + x * density(x),
        ),
        Unary::GeluTanh => unary_map2::<T>(
            s,
            #[inline(always)]
            |x| {
                let (gate, slope) = tanh_gate(x);
                gate + x * slope * gate * (T::Acc::one() - gate)
            },
        ),
        Unary::Relu => unary_map2::<T>(
            s,
            #[inline(always)]
            |x| leaky_slope(x, T::Acc::zero()),
        ),
        Unary::LeakyRelu(slope) => {
            let slope = T::Acc::of(slope);
            unary_map2::<T>(
                s,
                #[inline(always)]
                move |x| leaky_slope(x, slope),
            )
        }
    }
}

fn unary_map2<T: Elem>(s: &UnaryBwd, slope: impl Fn(T::Acc) -> T::Acc + Sync) -> Result<()> {
    let (dy, x, dx) = (("dy", &s.dy), ("x", &s.x), ("dx", &s.dx.0));
    map2::<T>(
        "unary_bwd",
        dy,
        x,
        dx,
        #[inline(always)]
        |dy, x| dy * slope(x),
    )
}

// ---- kernels over rows ---------------------------------------------------------------------------------

fn affine_fwd<T: Elem>(s: &ChannelAffineFwd) -> Result<()> {
    const OP: &str = "channel_affine_fwd";
    let (x, y) = (rows::<T>(OP, "x", &s.x)?, rows_mut::<T>(OP, "y", &s.y.0)?);
    expect_rows(OP, "y", &s.y.0, x.rows, x.cols)?;
    expect(OP, "shift", &s.shift, x.cols)?;
    expect(OP, "scale", &s.scale, x.cols)?;
    let (shift, scale) = (flat::<T>(OP, "shift", &s.shift)?, flat::<T>(OP, "scale", &s.scale)?);
    par_rows(
        x.rows,
        x.cols,
        #[inline(always)]
        |i| {
            // SAFETY: chunks do not share rows.
            let y = unsafe { y.row(i) };
            for (((y, x), shift), scale) in y.iter_mut().zip(x.row(i)).zip(shift).zip(scale) {
                *y = T::down((x.up() - shift.up()) / scale.up());
            }
        },
    );
    Ok(())
}

fn affine_bwd<T: Elem>(s: &ChannelAffineBwd) -> Result<()> {
    const OP: &str = "channel_affine_bwd";
    let (dy, dx) = (rows::<T>(OP, "dy", &s.dy)?, rows_mut::<T>(OP, "dx", &s.dx.0)?);
    expect_rows(OP, "dx", &s.dx.0, dy.rows, dy.cols)?;
    expect(OP, "scale", &s.scale, dy.cols)?;
    let scale = flat::<T>(OP, "scale", &s.scale)?;
    par_rows(
        dy.rows,
        dy.cols,
        #[inline(always)]
        |i| {
            // SAFETY: chunks do not share rows.
            let dx = unsafe { dx.row(i) };
            for ((dx, dy), scale) in dx.iter_mut().zip(dy.row(i)).zip(scale) {
                *dx = T::down(dy.up() / scale.up());
            }
        },
    );
    Ok(())
}

fn swiglu_fwd_of<T: Elem>(s: &SwigluFwd) -> Result<()> {
    const OP: &str = "swiglu_fwd";
    let (x, y) = (rows::<T>(OP, "gate_up", &s.gate_up)?, rows_mut::<T>(OP, "y", &s.y.0)?);
    expect_rows(OP, "gate_up", &s.gate_up, y.rows, 2 * y.cols)?;
    par_rows(
        y.rows,
        x.cols,
        #[inline(always)]
        |i| {
            let (gate, up) = x.row(i).split_at(y.cols);
            // SAFETY: chunks do not share rows.
            let y = unsafe { y.row(i) };
            for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                *y = T::down(silu(gate.up()) * up.up());
            }
        },
    );
    Ok(())
}

fn swiglu_bwd_of<T: Elem>(s: &SwigluBwd) -> Result<()> {
    const OP: &str = "swiglu_bwd";
    let (dy, x) = (rows::<T>(OP, "dy", &s.dy)?, rows::<T>(OP, "gate_up", &s.gate_up)?);
    let dx = rows_mut::<T>(OP, "dgate_up", &s.dgate_up.0)?;
    expect_rows(OP, "gate_up", &s.gate_up, dy.rows, 2 * dy.cols)?;
    expect_rows(OP, "dgate_up", &s.dgate_up.0, dy.rows, 2 * dy.cols)?;
    par_rows(
        dy.rows,
        x.cols,
        #[inline(always)]
        |i| {
            let (gate, up) = x.row(i).split_at(dy.cols);
            // SAFETY: chunks do not share rows.
            let (dgate, dup) = unsafe { dx.row(i) }.split_at_mut(dy.cols);
            for ((((dgate, dup), gate), up), dy) in dgate.iter_mut().zip(dup).zip(gate).zip(up).zip(dy.row(i))
            {
                let (gate, up, dy) = (gate.up(), up.up(), dy.up());
                *dgate = T::down(dy * up * silu_slope(gate));
                *dup = T::down(dy * silu(gate));
            }
        },
    );
    Ok(())
}

fn rope_of<T: Elem>(s: &Rope) -> Result<()> {
    const OP: &str = "rope";
    let (x, y) = (rows::<T>(OP, "x", &s.x)?, rows_mut::<T>(OP, "y", &s.y.0)?);
    expect_rows(OP, "y", &s.y.0, x.rows, x.cols)?;
    expect(OP, "position", &s.position, x.rows)?;
    let position = flat::<i32>(OP, "position", &s.position)?;
    let d = s.head_dim;
    if d % 2 == 1 || d == 0 {
        return Err(Error::arg(OP, "head_dim", d, "even and not 0"));
    }
    let turned = s.heads.saturating_mul(d);
    if turned > x.cols {
        return Err(Error::arg(OP, "x", s.x.dims, format!("at least {} x {d} columns", s.heads)));
    }
    let frequency: Vec<T::Acc> =
        (0..d / 2).map(|i| T::Acc::of(s.theta.powf(-2.0 * i as f64 / d as f64))).collect();
    par_for(x.rows, chunk_rows(x.cols), |r| {
        let mut turn = vec![(T::Acc::one(), T::Acc::zero()); d / 2];
        for i in r {
            let position = T::Acc::of(position[i] as f64);
            for (turn, f) in turn.iter_mut().zip(&frequency) {
                let (sin, cos) = (position * *f).sin_cos();
                *turn = (cos, if s.inverse { -sin } else { sin });
            }
            // SAFETY: chunks do not share rows.
            let (x, y) = (x.row(i), unsafe { y.row(i) });
            for (x, y) in x[..turned].chunks_exact(d).zip(y[..turned].chunks_exact_mut(d)) {
                rotate(x, y, &turn);
            }
            y[turned..].copy_from_slice(&x[turned..]);
        }
    });
    Ok(())
}

/// Turns the pairs (k, k + D/2) of one head by the angles of `turn`, given as (cos, sin).
fn rotate<T: Elem>(x: &[T], y: &mut [T], turn: &[(T::Acc, T::Acc)]) {
    let half = turn.len();
    let ((x0, x1), (y0, y1)) = (x.split_at(half), y.split_at_mut(half));
    for ((((y0, y1), x0), x1), &(cos, sin)) in y0.iter_mut().zip(y1).zip(x0).zip(x1).zip(turn) {
        let (a, b) = (x0.up(), x1.up());
        *y0 = T::down(a * cos - b * sin);
        *y1 = T::down(b * cos + a * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use crate::backend::Role;
    use crate::compare::{Bounds, compare};

    const FUNCTIONS: [Unary; 5] =
        [Unary::Silu, Unary::Gelu, Unary::GeluTanh, Unary::Relu, Unary::LeakyRelu(0.2)];

    fn naive(f: Unary, x: f64) -> f64 {
        match f {
            Unary::Silu => x / (1.0 + (-x).exp()),
            Unary::Gelu => x * 0.5 * (1.0 + Real::erf(x / 2f64.sqrt())),
            Unary::GeluTanh => {
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                0.5 * x * (1.0 + u.tanh())
            }
            Unary::Relu => x.max(0.0),
            Unary::LeakyRelu(slope) => x.max(0.0) + slope * x.min(0.0),
        }
    }

    fn zip(a: &[f64], b: &[f64], f: impl Fn(f64, f64) -> f64) -> Vec<f64> {
        a.iter().zip(b).map(|(a, b)| f(*a, *b)).collect()
    }

    #[test]
    fn unary_matches_functions_and_differences() {
        for f in FUNCTIONS {
            for (n, c) in [(1, 1), (67, 31), (1, 40_001)] {
                let (x, dy) = (values(n * c, 1), values(n * c, 2));
                let slope = |x: f64| match f {
                    // The functions with a kink: exactly.
                    Unary::Relu => (x > 0.0) as i32 as f64,
                    Unary::LeakyRelu(slope) => {
                        if x > 0.0 {
                            1.0
                        } else {
                            slope
                        }
                    }
                    // The smooth ones: by five points.
                    _ => {
                        let (d, h) = (|h: f64| naive(f, x + h) - naive(f, x - h), 1e-2);
                        (45.0 * d(h) - 9.0 * d(2.0 * h) + d(3.0 * h)) / (60.0 * h)
                    }
                };
                let y = x.iter().map(|x| naive(f, *x)).collect();
                let dx = zip(&dy, &x, |dy, x| dy * slope(x));
                check(&[y], |r| {
                    let (xt, y) = (r.act([n, c], &x), r.out([n, c]));
                    r.cpu.unary_fwd(S, &UnaryFwd { x: xt.view(), y: y.out(), f }).unwrap();
                    let (dyt, out) = (r.columns(n, c, &dy), r.out([n, c]));
                    let s = UnaryBwd { dy: dyt.view(), x: xt.view(), dx: out.out(), f };
                    r.cpu.unary_bwd(S, &s).unwrap();
                    // The stencil's own error is far below f32's.
                    let bounds = Bounds { norm: 1e-9, row: 1e-9, element: 1e-8, least: 0.0 };
                    let bounds = if r.p == Precision::F64 { bounds } else { Bounds::of(r.p.act) };
                    compare(&format!("slope of {f:?} in {}", r.p.act), &r.get(&out), &dx, c, bounds).unwrap();
                    vec![y]
                });
            }
        }
    }

    #[test]
    fn relu_at_the_edges() {
        let r = Run::new(Precision::F32, 1);
        let x = r.act([5], &[f64::NEG_INFINITY, f64::INFINITY, f64::NAN, 0.0, -1.0]);
        let (y, dx, dy) = (r.out([5]), r.out([5]), r.act([5], &[1.0; 5]));
        r.cpu.unary_fwd(S, &UnaryFwd { x: x.view(), y: y.out(), f: Unary::Relu }).unwrap();
        let s = UnaryBwd { dy: dy.view(), x: x.view(), dx: dx.out(), f: Unary::Relu };
        r.cpu.unary_bwd(S, &s).unwrap();
        let y = r.get(&y);
        assert!(y[0] == 0.0 && y[1] == f64::INFINITY && y[2].is_nan() && y[3] == 0.0 && y[4] == 0.0);
        assert_eq!([0, 1, 3].map(|i| r.get(&dx)[i]), [0.0, 1.0, 0.0]);
    }

    #[test]
    fn sums_and_channel_affine_match_loops() {
        for (n, c) in [(1, 1), (67, 31), (1, 40_001), (9001, 3)] {
            let (a, b) = (values(n * c, 1), values(n * c, 2));
            let (shift, scale) =
                (values(c, 3), values(c, 4).iter().map(|x| x.abs() + 0.5).collect::<Vec<_>>());
            let scale: Vec<f64> = scale.iter().map(|x| DType::Bf16.rounded(*x)).collect();
            let affine = (0..n * c).map(|i| (a[i] - shift[i % c]) / scale[i % c]).collect();
            let affine_bwd = (0..n * c).map(|i| b[i] / scale[i % c]).collect();
            check(&[zip(&a, &b, |a, b| a + b), affine, affine_bwd], |r| {
                let (a, b, y) = (r.act([n, c], &a), r.columns(n, c, &b), r.out([n, c]));
                r.cpu.add(S, &Add { a: a.view(), b: b.view(), y: y.out() }).unwrap();
                let (shift, scale) = (r.act([c], &shift), r.act([c], &scale));
                let (affine, dx) = (r.out([n, c]), r.columns(n, c, &vec![f64::NAN; n * c]));
                let (shift, scale) = (shift.view(), scale.view());
                let s = ChannelAffineFwd { x: a.view(), shift, scale, y: affine.out() };
                r.cpu.channel_affine_fwd(S, &s).unwrap();
                let s = ChannelAffineBwd { dy: b.view(), scale, dx: dx.out() };
                r.cpu.channel_affine_bwd(S, &s).unwrap();
                vec![y, affine, dx]
            });
        }
    }

    #[test]
    fn casts_and_accumulates_between_all_types() {
        let r = Run::f64();
        let types = [DType::F64, DType::F32, DType::Bf16];
        for (from, to) in types.into_iter().flat_map(|a| types.map(|b| (a, b))) {
            for (n, c) in [(1, 1), (13, 7), (1, 20_001)] {
                let (v, before) = (values(n * c, 1), values(n * c, 2));
                let tensor =
                    |dtype, v: &[f64]| Tensor::from_f64(&r.cpu, Role::Activation, dtype, v, [n, c]).unwrap();
                let wide = |dtype| {
                    let t = Tensor::empty(&r.cpu, Role::Activation, dtype, [n, c + 3]).unwrap();
                    t.columns(1, c).unwrap()
                };
                let (x, y, sum, slice) = (tensor(from, &v), tensor(to, &v), tensor(to, &before), wide(to));
                r.cpu.cast(S, &Cast { x: x.view(), y: slice.out() }).unwrap();
                r.cpu.cast(S, &Cast { x: slice.view(), y: y.out() }).unwrap();
                assert_eq!(r.get(&y), v);
                r.cpu.accumulate(S, &Accumulate { x: x.view(), y: sum.acc() }).unwrap();
                let want = tensor(to, &zip(&before, &v, |a, b| a + b));
                assert_eq!(r.get(&sum), r.get(&want));
            }
        }
        let (x, y) = (r.idx(&[1]), r.out([1]));
        let e = r.cpu.cast(S, &Cast { x: x.view(), y: y.out() }).unwrap_err();
        assert_eq!(e.to_string(), "cast: argument `dtype` is i32, wanted a float type");
    }

    #[test]
    fn fills_every_type_and_slices() {
        let r = Run::f64();
        for dtype in [DType::F64, DType::F32, DType::Bf16, DType::I32] {
            let t = Tensor::empty(&r.cpu, Role::Activation, dtype, [50, 1001]).unwrap();
            r.cpu.fill(S, &Fill { y: t.out(), value: 3.0 }).unwrap();
            r.cpu.fill(S, &Fill { y: t.columns(7, 2).unwrap().out(), value: -2.0 }).unwrap();
            let want = |i: usize| if (7..9).contains(&(i % 1001)) { -2.0 } else { 3.0 };
            assert!(r.get(&t).iter().enumerate().all(|(i, x)| *x == want(i)));
        }
    }

    #[test]
    fn swiglu_matches_loops_and_differences() {
        let forward = |v: &[f64], f: usize| -> Vec<f64> {
            v.chunks(2 * f).flat_map(|v| (0..f).map(|i| naive(Unary::Silu, v[i]) * v[f + i])).collect()
        };
        for (n, f) in [(1, 1), (5, 7), (301, 33)] {
            let (x, dy) = (values(n * 2 * f, 1), values(n * f, 2));
            let run = |r: &Run| {
                let (x, dy) = (r.columns(n, 2 * f, &x), r.act([n, f], &dy));
                let (y, dx) = (r.out([n, f]), r.out([n, 2 * f]));
                r.cpu.swiglu_fwd(S, &SwigluFwd { gate_up: x.view(), y: y.out() }).unwrap();
                let s = SwigluBwd { dy: dy.view(), gate_up: x.view(), dgate_up: dx.out() };
                r.cpu.swiglu_bwd(S, &s).unwrap();
                vec![y, dx]
            };
            let r = Run::f64();
            let dx = r.get(&run(&r)[1]);
            if n < 10 {
                check_gradients(&[&x], &[&dx], |v| inner(&forward(&v[0], f), &dy));
            }
            check(&[forward(&x, f), dx], run);
        }
    }

    #[test]
    fn rope_turns_pairs_and_back() {
        let (n, heads, d, cols, theta) = (37, 3, 10, 35, 1e4);
        let x = values(n * cols, 1);
        let position: Vec<i32> = (0..n as i32).map(|i| i * 7 % 23).collect();
        let mut y = x.clone();
        for i in 0..n * heads * d / 2 {
            let (row, head, k) = (i / (heads * d / 2), i / (d / 2) % heads, i % (d / 2));
            let angle = position[row] as f64 * f64::powf(theta, -2.0 * k as f64 / d as f64);
            let (a, b) = (row * cols + head * d + k, row * cols + head * d + k + d / 2);
            y[a] = x[a] * angle.cos() - x[b] * angle.sin();
            y[b] = x[b] * angle.cos() + x[a] * angle.sin();
        }
        check(&[y, x.clone()], |r| {
            let (x, position) = (r.columns(n, cols, &x), r.idx(&position));
            let (y, back) = (r.columns(n, cols, &vec![f64::NAN; n * cols]), r.out([n, cols]));
            let turn = |x: &Tensor, y: &Tensor, inverse| {
                let (x, position, y) = (x.view(), position.view(), y.out());
                r.cpu.rope(S, &Rope { x, position, y, heads, head_dim: d, theta, inverse }).unwrap();
            };
            turn(&x, &y, false);
            turn(&y, &back, true);
            vec![y, back]
        });
    }
}
