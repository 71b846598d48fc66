//! Squared norms of gradients, and the number of non-finite elements.

use super::*;
use crate::backend::cpu::workspace::no_workspace;

no_workspace!(sum_squares(SumSquares));

pub(crate) fn sum_squares(_ws: &Workspace, a: &SumSquares) -> Result<()> {
    by_dtype!("sum_squares", a.x.dtype, E => squares::<<E as Elem>::Acc>(a))
}

fn squares<R: Real>(a: &SumSquares) -> Result<()> {
    let op = "sum_squares";
    let x = flat::<R>(op, "x", &a.x)?;
    let out = flat_mut::<R>(op, "out", &a.out.0)?;
    out[0] +=
        par_sum(x.len(), CHUNK, |r| lanes::sum(&x[r], |v: R| if v.is_finite() { v * v } else { R::zero() }));
    out[1] += par_sum(x.len(), CHUNK, |r| {
        lanes::sum(&x[r], |v: R| if v.is_finite() { R::zero() } else { R::one() })
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::testing::args::*;

    #[test]
    fn squares_leave_out_what_is_not_finite() {
        for n in [1, 17, 2 * CHUNK + 5] {
            let args = [acc([n], normal(1, n)), acc([2], vec![0.5, 1.0])];
            let naive = |v: &[Vec<f64>]| vec![vec![0.5 + v[0].iter().map(|x| x * x).sum::<f64>(), 1.0]];
            let run = |dev: &Cpu, _: Precision, t: &[Tensor]| {
                dev.sum_squares(S, &SumSquares { x: t[0].view(), out: t[1].acc() })?;
                Ok(vec![t[1].clone()])
            };
            check(&args, naive, run);
        }
        let bad = vec![3.0, f64::NAN, f64::INFINITY, 4.0, f64::NEG_INFINITY];
        let args = [acc([5], bad), acc([2], vec![0.0, 0.0])];
        check(
            &args,
            |_| vec![vec![25.0, 3.0]],
            |dev, _, t| {
                dev.sum_squares(S, &SumSquares { x: t[0].view(), out: t[1].acc() })?;
                Ok(vec![t[1].clone()])
            },
        );
    }
}
