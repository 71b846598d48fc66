//! One step of AdamW.

use num_traits::Float;
use rayon::prelude::*;

use super::*;
use crate::backend::cpu::workspace::no_workspace;

no_workspace!(adamw(Adamw));

pub(crate) fn adamw(_ws: &Workspace, a: &Adamw) -> Result<()> {
    let dtype = a.shadow.map_or(a.master.0.dtype, |s| s.0.dtype);
    by_dtype!("adamw", dtype, E => step::<E>(a))
}

/// The scalars of a step, computed from the step state.
struct Step<R> {
    rate: R,
    /// Factor of the weights for weight decay.
    keep: R,
    /// Factor of the gradient for clipping.
    clip: R,
    bias1: R,
    bias2: R,
    beta1: R,
    beta2: R,
    rest1: R,
    rest2: R,
    eps: R,
}

impl<R: Real> Step<R> {
    fn new(a: &Adamw, state: &[R], steps: i32, norm: R) -> Self {
        let at = |slot: Slot| state[slot.index()];
        let rate = at(Slot::Rate(a.group));
        // 1 / (1 - beta^t), without the cancellation at small t.
        let bias = |beta: f64| -R::one() / (R::of(f64::from(steps) + 1.0) * R::of(beta.ln())).exp_m1();
        Step {
            rate,
            keep: R::one() - rate * R::of(a.weight_decay),
            clip: clip(at(Slot::Clip(a.group)), norm),
            bias1: bias(a.beta1),
            bias2: bias(a.beta2),
            beta1: R::of(a.beta1),
            beta2: R::of(a.beta2),
            rest1: R::of(1.0 - a.beta1),
            rest2: R::of(1.0 - a.beta2),
            eps: R::of(a.eps),
        }
    }
}

/// `min(1, limit / (sqrt(norm) + 1e-6))`; 1 if `limit` is 0.
fn clip<R: Real>(limit: R, norm: R) -> R {
    if limit > R::zero() { (limit / (norm.sqrt() + R::of(1e-6))).min(R::one()) } else { R::one() }
}

/// One range of elements in all tensors of a step.
struct Chunk<'a, E: Elem> {
    master: &'a mut [E::Acc],
    grad: &'a [E::Acc],
    m: &'a mut [E::Acc],
    v: &'a mut [E::Acc],
    ema: Option<&'a mut [E::Acc]>,
    shadow: Option<&'a mut [E]>,
}

fn step<E: Elem>(a: &Adamw) -> Result<()> {
    let op = "adamw";
    let state = flat::<E::Acc>(op, "state", &a.state)?;
    let norm = flat::<E::Acc>(op, "norm", &a.norm)?;
    let chunks = chunks_of::<E>(op, a)?;
    if norm[1] > E::Acc::of(0.0) {
        return Ok(());
    }
    let step = Step::new(a, state, flat::<i32>(op, "steps", &a.steps)?[0], norm[0]);
    let (decay, rest) = (E::Acc::of(a.ema_decay), E::Acc::of(1.0 - a.ema_decay));
    chunks.into_par_iter().for_each(|mut c| {
        pulp::Arch::new().dispatch(|| {
            update(&step, &mut c);
            average(decay, rest, &mut c);
        })
    });
    Ok(())
}

fn chunks_of<'a, E: Elem>(op: &'static str, a: &Adamw<'a>) -> Result<Vec<Chunk<'a, E>>> {
    let acc = |arg, v: &In<'a>| -> Result<_> { Ok(flat_mut::<E::Acc>(op, arg, v)?.chunks_mut(CHUNK)) };
    let grad = flat::<E::Acc>(op, "grad", &a.grad)?.chunks(CHUNK);
    let (master, m, v) = (acc("master", &a.master.0)?, acc("m", &a.m.0)?, acc("v", &a.v.0)?);
    let mut ema = a.ema.map(|e| acc("ema", &e.0)).transpose()?;
    let mut shadow = match a.shadow {
        Some(s) => Some(flat_mut::<E>(op, "shadow", &s.0)?.chunks_mut(CHUNK)),
        None => None,
    };
    let all = master.zip(grad).zip(m).zip(v);
    Ok(all
        .map(|(((master, grad), m), v)| Chunk {
            master,
            grad,
            m,
            v,
            ema: ema.as_mut().and_then(Iterator::next),
            shadow: shadow.as_mut().and_then(Iterator::next),
        })
        .collect())
}

#[inline(always)]
fn update<E: Elem>(s: &Step<E::Acc>, c: &mut Chunk<E>) {
    for (((p, &g), m), v) in c.master.iter_mut().zip(c.grad).zip(c.m.iter_mut()).zip(c.v.iter_mut()) {
        let g = g * s.clip;
        *m = s.beta1 * *m + s.rest1 * g;
        *v = s.beta2 * *v + s.rest2 * g * g;
        *p = s.keep * *p - s.rate * (*m * s.bias1) / ((*v * s.bias2).sqrt() + s.eps);
    }
}

/// Updates the average of the weights and their rounded copy.
#[inline(always)]
fn average<E: Elem>(decay: E::Acc, rest: E::Acc, c: &mut Chunk<E>) {
    if let Some(ema) = &mut c.ema {
        for (e, &p) in ema.iter_mut().zip(c.master.iter()) {
            *e = decay * *e + rest * p;
        }
    }
    if let Some(shadow) = &mut c.shadow {
        for (s, &p) in shadow.iter_mut().zip(c.master.iter()) {
            *s = E::down(p);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::testing::args::*;

    const GROUP: usize = 3;

    const RATE: f64 = 1e-3;

    const BETAS: (f64, f64) = (0.9, 0.95);

    const EPS: f64 = 1e-8;

    const DECAY: f64 = 0.01;

    const EMA: f64 = 0.99;

    /// master, the gradients of two steps, m, v, ema, the step counts of two steps, norm, the step state.
    fn args(n: usize, clip: f64, bad: f64) -> Vec<Arg> {
        let vector = |v: Vec<f64>| acc([n], v);
        let mut state = vec![f64::NAN; Slot::LEN];
        state[Slot::Rate(GROUP).index()] = RATE;
        state[Slot::Clip(GROUP).index()] = clip;
        vec![
            vector(normal(1, n)),
            vector(normal(2, n)),
            vector(normal(3, n)),
            vector(vec![0.0; n]),
            vector(vec![0.0; n]),
            vector(normal(4, n)),
            int([1], vec![0.0]),
            int([1], vec![1.0]),
            acc([2], vec![5.0, bad]),
            acc([Slot::LEN], state),
        ]
    }

    /// Runs two steps; returns master, m, v, ema and shadow.
    fn two_steps(dev: &Cpu, p: Precision, t: &[Tensor], shadow: Tensor) -> Result<Vec<Tensor>> {
        for i in 0..2 {
            let a = Adamw {
                master: t[0].acc(),
                grad: t[1 + i].view(),
                m: t[3].acc(),
                v: t[4].acc(),
                ema: Some(t[5].acc()),
                shadow: Some(shadow.out()),
                state: t[9].view(),
                steps: t[6 + i].view(),
                norm: t[8].view(),
                group: GROUP,
                beta1: BETAS.0,
                beta2: BETAS.1,
                eps: EPS,
                weight_decay: DECAY,
                ema_decay: EMA,
            };
            dev.adamw(S, &a)?;
        }
        assert_eq!(shadow.dtype(), p.act);
        Ok(vec![t[0].clone(), t[3].clone(), t[4].clone(), t[5].clone(), shadow])
    }

    /// torch.optim.AdamW, one element at a time.
    fn scalar(v: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let n = v[0].len();
        let mut r = vec![v[0].clone(), vec![0.0; n], vec![0.0; n], v[5].clone(), vec![]];
        let limit = v[9][Slot::Clip(GROUP).index()];
        let clip = if limit > 0.0 { (limit / (5f64.sqrt() + 1e-6)).min(1.0) } else { 1.0 };
        for t in 0..2 {
            for i in 0..n {
                let g = clip * v[1 + t][i];
                r[0][i] *= 1.0 - RATE * DECAY;
                r[1][i] += (1.0 - BETAS.0) * (g - r[1][i]);
                r[2][i] = BETAS.1 * r[2][i] + (1.0 - BETAS.1) * g * g;
                let (c1, c2) = (1.0 - BETAS.0.powi(t as i32 + 1), 1.0 - BETAS.1.powi(t as i32 + 1));
                r[0][i] -= RATE / c1 * r[1][i] / (r[2][i].sqrt() / c2.sqrt() + EPS);
                r[3][i] = EMA * r[3][i] + (1.0 - EMA) * r[0][i];
            }
        }
        r[4] = r[0].clone();
        r
    }

    #[test]
    fn adamw_matches_a_scalar_implementation() {
        for (n, clip) in [(1, 0.0), (7, 1.0), (CHUNK + 13, 100.0)] {
            check(&args(n, clip, 0.0), scalar, |dev, p, t| {
                let shadow = out(dev, p.act, [n]);
                two_steps(dev, p, t, shadow)
            });
        }
    }

    #[test]
    fn nothing_changes_when_a_gradient_is_not_finite() {
        let args = args(7, 1.0, 1.0);
        let same =
            |v: &[Vec<f64>]| vec![v[0].clone(), v[3].clone(), v[4].clone(), v[5].clone(), vec![2.0; 7]];
        check(&args, same, |dev, p, t| {
            let shadow = Tensor::from_f64(dev, Role::Weight, p.act, &[2.0; 7], [7])?;
            two_steps(dev, p, t, shadow)
        });
    }

    #[test]
    fn adamw_refuses_what_it_has_no_place_for() {
        let dev = Cpu::poisoned(2).unwrap();
        let t = tensors(&dev, Precision::BF16, &args(7, 1.0, 0.0));
        let wrong = out(&dev, DType::Bf16, [6]);
        assert!(two_steps(&dev, Precision::BF16, &t, wrong).is_err());
        let f64s = out(&dev, DType::F64, [7]);
        assert!(two_steps(&dev, Precision::F64, &t, f64s).is_err());
    }
}
