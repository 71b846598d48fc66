//! AdamW over flat groups, and the schedule of its rate.

use crate::backend::{Adamw, Fill, Role, Slot, StepState, Stream, SumSquares};
use crate::config::ScheduleKind;
use crate::error::{Error, Result};
use crate::nn::Params;
use crate::tensor::Tensor;

/// Constants of an optimizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hyper {
    /// Decays of the moments.
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

/// One optimizer over some groups: they share its gradient norm and step count.
pub struct Optimizer {
    groups: Vec<usize>,
    hyper: Hyper,
    steps: u64,
    norm: Tensor,
}

impl Optimizer {
    /// An optimizer that has made no step. The groups' moments are those of [`Params::train`].
    pub fn new(params: &Params, groups: &[&str], hyper: Hyper) -> Result<Self> {
        let groups = groups
            .iter()
            .map(|g| {
                params.group(g).ok_or_else(|| Error::arg("Optimizer", "groups", g, "a group of the model"))
            })
            .collect::<Result<_>>()?;
        let norm = Tensor::zeros(&**params.device(), Role::Input, params.precision().acc, [2])?;
        Ok(Optimizer { groups, hyper, steps: 0, norm })
    }

    /// Steps made so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Goes on as after `steps` steps.
    pub fn resume(&mut self, steps: u64) {
        self.steps = steps;
    }

    /// Writes what the next step needs into the step state: rate, bias corrections, clip.
    pub fn prepare(&mut self, state: &mut StepState, rate: f64) {
        self.steps += 1;
        let t = i32::try_from(self.steps).unwrap_or(i32::MAX);
        for &g in &self.groups {
            state.set(Slot::Rate(g), rate);
            state.set(Slot::Bias1(g), 1.0 / (1.0 - self.hyper.betas[0].powi(t)));
            state.set(Slot::Bias2(g), 1.0 / (1.0 - self.hyper.betas[1].powi(t)));
            state.set(Slot::Clip(g), self.hyper.clip);
        }
    }

    /// Updates the weights from the accumulated gradients. A non-finite gradient leaves everything as it is.
    pub fn apply(&self, params: &Params, state: &StepState) -> Result<()> {
        let dev = &**params.device();
        dev.fill(Stream::COMPUTE, &Fill { y: self.norm.out(), value: 0.0 })?;
        for &g in &self.groups {
            if let Some(t) = params.training(g) {
                dev.sum_squares(Stream::COMPUTE, &SumSquares { x: t.grad.view(), out: self.norm.acc() })?;
            }
        }
        for &g in &self.groups {
            let Some(t) = params.training(g) else { continue };
            let h = &self.hyper;
            let a = Adamw {
                master: params.master(g).acc(),
                grad: t.grad.view(),
                m: t.m.acc(),
                v: t.v.acc(),
                ema: params.ema(g).map(Tensor::acc),
                shadow: params.shadow(g).map(Tensor::out),
                state: state.tensor().view(),
                norm: self.norm.view(),
                group: g,
                beta1: h.betas[0],
                beta2: h.betas[1],
                eps: h.eps,
                weight_decay: h.weight_decay,
                ema_decay: h.ema_decay,
            };
            dev.adamw(Stream::COMPUTE, &a)?;
        }
        Ok(())
    }

    /// Squared gradient norm and non-finite count of the last step, `[2]`.
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
