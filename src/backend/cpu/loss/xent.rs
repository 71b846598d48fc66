//! Cross-entropy of stored logits.

use num_traits::{Float, One, Zero};
use rayon::prelude::*;

use super::*;
use crate::backend::cpu::workspace::no_workspace;

/// Rows of one partial sum of the loss.
const ROWS: usize = 256;

no_workspace!(xent_fwd(XentFwd), xent_bwd(XentBwd));

pub(crate) fn xent_fwd(_ws: &Workspace, a: &XentFwd) -> Result<()> {
    by_dtype!("xent_fwd", a.logits.dtype, E => stored_fwd::<E>(a))
}

pub(crate) fn xent_bwd(_ws: &Workspace, a: &XentBwd) -> Result<()> {
    by_dtype!("xent_bwd", a.logits.dtype, E => stored_bwd::<E>(a))
}

/// Targets and weights of the rows.
struct Wanted<'a, R> {
    target: &'a [i32],
    weight: Option<&'a [R]>,
}

impl<'a, R: Real> Wanted<'a, R> {
    fn new(op: &'static str, logits: &In, target: &In<'a>, weight: &Option<In<'a>>) -> Result<Self> {
        let v = logits.dims.cols();
        let target = flat::<i32>(op, "target", target)?;
        if let Some(t) = target.iter().find(|&&t| t >= 0 && t as usize >= v) {
            return Err(Error::arg(op, "target", t, format!("less than the {v} columns of logits")));
        }
        let weight = weight.as_ref().map(|w| flat::<R>(op, "weight", w));
        Ok(Wanted { target, weight: weight.transpose()? })
    }

    /// Target and weight of row `n`; `None` if it has no target.
    fn of(&self, n: usize) -> Option<(usize, R)> {
        let t = usize::try_from(self.target[n]).ok()?;
        Some((t, self.weight.map_or(R::one(), |w| w[n])))
    }
}

/// Log-sum-exp of a row; -inf if all logits are -inf.
fn log_sum_exp<E: Elem>(row: &[E]) -> E::Acc {
    let largest = |a: E::Acc, x: &E| if x.up() > a { x.up() } else { a };
    let max = row.iter().fold(E::Acc::neg_infinity(), largest);
    let shift = if max == E::Acc::neg_infinity() { E::Acc::zero() } else { max };
    shift + lanes::sum(row, |x: E| (x.up() - shift).exp()).ln()
}

fn stored_fwd<E: Elem>(a: &XentFwd) -> Result<()> {
    let op = "xent_fwd";
    let logits = rows::<E>(op, "logits", &a.logits)?;
    let wanted = Wanted::<E::Acc>::new(op, &a.logits, &a.target, &a.weight)?;
    let scale = scalar::<E::Acc>(op, "scale", &a.scale)?;
    let lse = flat_mut::<E::Acc>(op, "lse", &a.lse.0)?;
    let loss = flat_mut::<E::Acc>(op, "loss", &a.loss.0)?;
    lse.par_iter_mut().enumerate().for_each(|(n, lse)| {
        *lse = wanted.of(n).map_or(E::Acc::zero(), |_| log_sum_exp(logits.row(n)));
    });
    let of_row = |n: usize| wanted.of(n).map(|(t, weight)| weight * (lse[n] - logits.row(n)[t].up()));
    let sum = par_sum(logits.rows, ROWS, |r| r.filter_map(of_row).sum());
    // Without supervised rows the scale, one over their number, may be infinite.
    if wanted.target.iter().any(|&t| t >= 0) {
        loss[0] += scale * sum;
    }
    Ok(())
}

fn stored_bwd<E: Elem>(a: &XentBwd) -> Result<()> {
    let op = "xent_bwd";
    let (n, v) = (a.logits.dims.rows(), a.logits.dims.cols());
    let wanted = Wanted::<E::Acc>::new(op, &a.logits, &a.target, &a.weight)?;
    let g = scalar::<E::Acc>(op, "g", &a.g)? * scalar::<E::Acc>(op, "scale", &a.scale)?;
    let lse = flat::<E::Acc>(op, "lse", &a.lse)?;
    let (logits, dlogits) =
        (rows::<E>(op, "logits", &a.logits)?, rows_mut::<E>(op, "dlogits", &a.dlogits.0)?);
    let at = |v: &In| v.buf.addr() + v.off;
    let in_place = at(&a.logits) == at(&a.dlogits.0);
    par_for(n, chunk_rows(v), |r| {
        for n in r {
            // SAFETY: chunks do not share rows.
            let out = unsafe { dlogits.row(n) };
            let Some((t, weight)) = wanted.of(n) else {
                out.fill(E::zeroed());
                continue;
            };
            let gradient = |i: usize, x: E| {
                let hit = if i == t { E::Acc::one() } else { E::Acc::zero() };
                E::down(g * weight * ((x.up() - lse[n]).exp() - hit))
            };
            if in_place {
                // In place: the logits may only be read through `out`.
                out.iter_mut().enumerate().for_each(|(i, d)| *d = gradient(i, *d));
            } else {
                out.iter_mut().zip(logits.row(n)).enumerate().for_each(|(i, (d, x))| *d = gradient(i, *x));
            }
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::testing::args::*;

    /// Logits, target, weight, scale, g and the initial loss; every third row has no target.
    fn stored(n: usize, v: usize) -> Vec<Arg> {
        let target = (0..n).map(|i| if i % 3 == 1 { -1.0 } else { (i * 7919 % v) as f64 }).collect();
        vec![
            act([n, v], normal(1, n * v)),
            int([n], target),
            acc([n], normal(2, n)),
            acc([1], vec![0.125]),
            acc([1], vec![1.5]),
            acc([1], vec![0.25]),
        ]
    }

    const STORED: [(usize, usize); 4] = [(1, 1), (7, 13), (40, 3), (5, 3001)];

    fn stored_forward(dev: &Cpu, p: Precision, t: &[Tensor], weight: bool) -> Result<Vec<Tensor>> {
        let lse = out(dev, p.acc, [t[0].dims().rows()]);
        let a = XentFwd {
            logits: t[0].view(),
            target: t[1].view(),
            weight: weight.then(|| t[2].view()),
            scale: t[3].view(),
            lse: lse.out(),
            loss: t[5].acc(),
        };
        dev.xent_fwd(S, &a)?;
        Ok(vec![lse, t[5].clone()])
    }

    /// The gradient, in a separate tensor and in place.
    fn stored_backward(dev: &Cpu, p: Precision, t: &[Tensor], weight: bool) -> Result<Vec<Tensor>> {
        let lse = &stored_forward(dev, p, t, weight)?[0];
        let (n, v) = (t[0].dims().rows(), t[0].dims().cols());
        let d = out(dev, p.act, [n, v + 2]).columns(1, v)?;
        let a = XentBwd {
            logits: t[0].view(),
            target: t[1].view(),
            weight: weight.then(|| t[2].view()),
            scale: t[3].view(),
            lse: lse.view(),
            g: t[4].view(),
            dlogits: d.out(),
        };
        dev.xent_bwd(S, &a)?;
        dev.xent_bwd(S, &XentBwd { dlogits: t[0].out(), ..a })?;
        assert_eq!(t[0].to_f64(dev)?, d.to_f64(dev)?);
        Ok(vec![d])
    }

    #[test]
    fn stored_logits_match_a_naive_loop_and_differences() {
        for ((n, v), weight) in STORED.into_iter().flat_map(|s| [(s, true), (s, false)]) {
            let naive = |t: &[Vec<f64>]| {
                let (mut lse, mut loss, mut d) = (vec![0.0; n], vec![t[5][0]], vec![0.0; n * v]);
                for i in (0..n).filter(|&i| t[1][i] >= 0.0) {
                    let row = &t[0][i * v..(i + 1) * v];
                    let (w, hit) = (if weight { t[2][i] } else { 1.0 }, t[1][i] as usize);
                    lse[i] = row.iter().map(|l| l.exp()).sum::<f64>().ln();
                    loss[0] += t[3][0] * w * (lse[i] - row[hit]);
                    for (j, l) in row.iter().enumerate() {
                        let p = (l - lse[i]).exp() - if j == hit { 1.0 } else { 0.0 };
                        d[i * v + j] = t[4][0] * t[3][0] * w * p;
                    }
                }
                [lse, loss, d]
            };
            check(&stored(n, v), |t| naive(t)[..2].to_vec(), |dev, p, t| stored_forward(dev, p, t, weight));
            check(&stored(n, v), |t| naive(t)[2..].to_vec(), |dev, p, t| stored_backward(dev, p, t, weight));
        }
        let loss = |dev: &Cpu, t: &[Tensor]| {
            let before = t[5].to_f64(dev)?[0];
            Ok(1.5 * (stored_forward(dev, Precision::F64, t, true)?[1].to_f64(dev)?[0] - before))
        };
        check_grad(&stored(7, 13), &[0], loss, |dev, t| stored_backward(dev, Precision::F64, t, true));
    }

    #[test]
    fn stored_logits_may_be_anything_but_out_of_range_targets() {
        let dev = Cpu::poisoned(2).unwrap();
        let run = |change: fn(&mut Vec<Arg>)| {
            let mut args = stored(3, 4);
            change(&mut args);
            stored_forward(&dev, Precision::F32, &tensors(&dev, Precision::F32, &args), false)
        };
        // Without supervised rows the loss is unchanged for any scale.
        let none = run(|a| {
            a[1].2.fill(-7.0);
            a[3].2[0] = f64::INFINITY;
        });
        assert_eq!(read(&dev, &none.unwrap()), [vec![0.0; 3], vec![0.25]]);
        let lse = |r: Result<Vec<Tensor>>| read(&dev, &r.unwrap())[0][0];
        assert_eq!(lse(run(|a| a[0].2.fill(f64::NEG_INFINITY))), f64::NEG_INFINITY);
        assert!(lse(run(|a| a[0].2[1] = f64::NEG_INFINITY)).is_finite());
        assert!(lse(run(|a| a[0].2[1] = f64::NAN)).is_nan());
        assert!((lse(run(|a| a[0].2.fill(1e4))) - 1e4 - 4f64.ln()).abs() < 1e-2);
        let e = run(|a| a[1].2[2] = 4.0).unwrap_err().to_string();
        assert_eq!(e, "xent_fwd: argument `target` is 4, wanted less than the 4 columns of logits");
    }
}
