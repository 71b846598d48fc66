//! AdamW over flat groups, and the schedule of its rate.

use crate::backend::{Accumulate, Adamw, Fill, Role, Slot, StepState, Stream, SumSquares};
use crate::config::ScheduleKind;
use crate::error::{Error, Result};
use crate::nn::Params;
use crate::tensor::Tensor;

/// Constants of an optimizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hyper {
    /// Decays of the moments, of groups without their own.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay of the averages of the weights.
    pub ema_decay: f64,
    /// Largest gradient norm; 0: no clipping.
    pub clip: f64,
}

/// A parameter group of an optimizer.
struct Member {
    group: usize,
    /// Its rate as a multiple of the optimizer's.
    scale: f64,
    betas: [f64; 2],
}

/// One optimizer over some groups: they share its gradient norm and step count.
pub struct Optimizer {
    members: Vec<Member>,
    hyper: Hyper,
    steps: u64,
    norm: Tensor,
    losses: Tensor,
}

impl Optimizer {
    /// An optimizer that has made no step. The groups' moments are those of [`Params::train`].
    pub fn new(params: &Params, groups: &[&str], hyper: Hyper) -> Result<Self> {
        let members = groups
            .iter()
            .map(|g| match params.group(g) {
                Some(group) => Ok(Member { group, scale: 1.0, betas: hyper.betas }),
                None => Err(Error::arg("Optimizer", "groups", g, "a group of the model")),
            })
            .collect::<Result<_>>()?;
        let zeros = || Tensor::zeros(&**params.device(), Role::Input, params.precision().acc, [2]);
        Ok(Optimizer { members, hyper, steps: 0, norm: zeros()?, losses: zeros()? })
    }

    /// Gives one group a rate of `scale` times the others', and its own decays.
    pub fn set_group(&mut self, params: &Params, name: &str, scale: f64, betas: [f64; 2]) -> Result<()> {
        let group = params.group(name);
        match self.members.iter_mut().find(|m| Some(m.group) == group) {
            Some(m) => {
                (m.scale, m.betas) = (scale, betas);
                Ok(())
            }
            None => Err(Error::arg("Optimizer", "name", name, "a group of this optimizer")),
        }
    }

    /// Steps made so far, skipped ones left out.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Goes on as after `steps` steps.
    pub fn resume(&mut self, steps: u64) {
        self.steps = steps;
    }

    /// Takes back the count of a step whose update was skipped.
    pub fn skip(&mut self) {
        self.steps = self.steps.saturating_sub(1);
    }

    /// Writes what the next step needs into the step state: rate, bias corrections, clip.
    pub fn prepare(&mut self, state: &mut StepState, rate: f64) {
        self.steps += 1;
        let t = i32::try_from(self.steps).unwrap_or(i32::MAX);
        for m in &self.members {
            state.set(Slot::Rate(m.group), m.scale * rate);
            state.set(Slot::Bias1(m.group), 1.0 / (1.0 - m.betas[0].powi(t)));
            state.set(Slot::Bias2(m.group), 1.0 / (1.0 - m.betas[1].powi(t)));
            state.set(Slot::Clip(m.group), self.hyper.clip);
        }
    }

    /// Updates the weights from the accumulated gradients. A gradient or one of `losses` that is not finite leaves
    /// everything as it is.
    pub fn apply<'a>(
        &self,
        params: &Params,
        state: &StepState,
        losses: impl Iterator<Item = &'a Tensor>,
    ) -> Result<()> {
        let dev = &**params.device();
        let s = Stream::COMPUTE;
        for t in [&self.norm, &self.losses] {
            dev.fill(s, &Fill { y: t.out(), value: 0.0 })?;
        }
        for m in &self.members {
            if let Some(t) = params.training(m.group) {
                dev.sum_squares(s, &SumSquares { x: t.grad.view(), out: self.norm.acc() })?;
            }
        }
        // Of the losses only the count of those that are not finite joins the gradient's.
        for loss in losses {
            dev.sum_squares(s, &SumSquares { x: loss.view(), out: self.losses.acc() })?;
        }
        let (bad, all) = (self.losses.range(1, 1)?, self.norm.range(1, 1)?);
        dev.accumulate(s, &Accumulate { x: bad.view(), y: all.acc() })?;
        for m in &self.members {
            let Some(t) = params.training(m.group) else { continue };
            let h = &self.hyper;
            let a = Adamw {
                master: params.master(m.group).acc(),
                grad: t.grad.view(),
                m: t.m.acc(),
                v: t.v.acc(),
                ema: params.ema(m.group).map(Tensor::acc),
                shadow: params.shadow(m.group).map(Tensor::out),
                state: state.tensor().view(),
                norm: self.norm.view(),
                group: m.group,
                beta1: m.betas[0],
                beta2: m.betas[1],
                eps: h.eps,
                weight_decay: h.weight_decay,
                ema_decay: h.ema_decay,
            };
            dev.adamw(s, &a)?;
        }
        Ok(())
    }

    /// Squared gradient norm and count of what was not finite in the last step, `[2]`.
    pub fn norm(&self) -> &Tensor {
        &self.norm
    }
}

/// The rate of step `step` (from 0) of `steps`: a linear rise over the first `warmup` of them, then `kind`.
pub fn schedule(kind: ScheduleKind, peak: f64, warmup: f64, step: usize, steps: usize) -> f64 {
    let rise = (warmup * steps as f64).ceil();
    let s = step as f64;
    if s < rise {
        return peak * (s + 1.0) / rise;
    }
    match kind {
        ScheduleKind::Constant => peak,
        ScheduleKind::Cosine => {
            let done = (s - rise) / (steps as f64 - rise).max(1.0);
            0.5 * peak * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedule_rises_then_falls_to_zero() {
        let at = |s| schedule(ScheduleKind::Cosine, 1.0, 0.1, s, 100);
        assert_eq!((at(0), at(4), at(9), at(10)), (0.1, 0.5, 1.0, 1.0));
        assert!((at(55) - 0.5).abs() < 1e-12 && at(99) < 1e-3 && at(99) > 0.0);
        assert_eq!(schedule(ScheduleKind::Constant, 2.0, 0.0, 7, 10), 2.0);
    }
}
