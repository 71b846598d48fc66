//! SwiGLU of gate and up projections in adjacent columns.

use super::activation::{silu, silu_slope};
use super::*;
use crate::backend::cpu::workspace::no_workspace;

no_workspace!(swiglu_fwd(SwigluFwd), swiglu_bwd(SwigluBwd));

pub(crate) fn swiglu_fwd(_ws: &Workspace, s: &SwigluFwd) -> Result<()> {
    by_dtype!("swiglu_fwd", s.y.0.dtype, T => swiglu_fwd_of::<T>(s))
}

pub(crate) fn swiglu_bwd(_ws: &Workspace, s: &SwigluBwd) -> Result<()> {
    by_dtype!("swiglu_bwd", s.dgate_up.0.dtype, T => swiglu_bwd_of::<T>(s))
}

fn swiglu_fwd_of<T: Elem>(s: &SwigluFwd) -> Result<()> {
    const OP: &str = "swiglu_fwd";
    let (x, y) = (rows::<T>(OP, "gate_up", &s.gate_up)?, rows_mut::<T>(OP, "y", &s.y.0)?);
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
    let in_place = s.gate_up.addr() == s.dgate_up.0.addr();
    let gradients = |gate: T, up: T, dy: T| {
        let (gate, up, dy) = (gate.up(), up.up(), dy.up());
        (T::down(dy * up * silu_slope(gate)), T::down(dy * silu(gate)))
    };
    par_rows(
        dy.rows,
        x.cols,
        #[inline(always)]
        |i| {
            // SAFETY: chunks do not share rows.
            let (dgate, dup) = unsafe { dx.row(i) }.split_at_mut(dy.cols);
            let out = dgate.iter_mut().zip(dup).zip(dy.row(i));
            if in_place {
                // In place: the values may only be read through the outputs.
                out.for_each(|((gate, up), dy)| (*gate, *up) = gradients(*gate, *up, *dy));
            } else {
                let (gate, up) = x.row(i).split_at(dy.cols);
                for (((dgate, dup), dy), (gate, up)) in out.zip(gate.iter().zip(up)) {
                    (*dgate, *dup) = gradients(*gate, *up, *dy);
                }
            }
        },
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::naive::*;
    use super::*;
    use crate::backend::cpu::testing::run::*;

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
}
