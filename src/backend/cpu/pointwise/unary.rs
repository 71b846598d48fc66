//! Activation functions as kernels.

use num_traits::{One, Zero};

use super::activation::{density, gelu_tanh, leaky, leaky_slope, normal, silu, silu_slope, tanh_gate};
use super::*;
use crate::backend::cpu::workspace::no_workspace;

no_workspace!(unary_fwd(UnaryFwd), unary_bwd(UnaryBwd));

pub(crate) fn unary_fwd(_ws: &Workspace, s: &UnaryFwd) -> Result<()> {
    by_dtype!("unary_fwd", s.y.0.dtype, T => unary_fwd_of::<T>(s))
}

pub(crate) fn unary_bwd(_ws: &Workspace, s: &UnaryBwd) -> Result<()> {
    by_dtype!("unary_bwd", s.dx.0.dtype, T => unary_bwd_of::<T>(s))
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
        // Not `leaky(x, 0)`, which gives NaN for -inf.
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

#[cfg(test)]
mod tests {
    use super::super::naive::*;
    use super::*;
    use crate::backend::cpu::testing::run::*;
    use crate::compare::{Bounds, compare};

    const FUNCTIONS: [Unary; 5] =
        [Unary::Silu, Unary::Gelu, Unary::GeluTanh, Unary::Relu, Unary::LeakyRelu(0.2)];

    #[test]
    fn unary_matches_functions_and_differences() {
        for f in FUNCTIONS {
            for (n, c) in [(1, 1), (67, 31), (1, 40_001)] {
                let (x, dy) = (values(n * c, 1), values(n * c, 2));
                let slope = |x: f64| match f {
                    // Functions with a kink: the exact derivative.
                    Unary::Relu => (x > 0.0) as i32 as f64,
                    Unary::LeakyRelu(slope) => {
                        if x > 0.0 {
                            1.0
                        } else {
                            slope
                        }
                    }
                    // Smooth functions: central differences of sixth order.
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
                    // The error of the differences is far below the rounding of f32.
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
}
