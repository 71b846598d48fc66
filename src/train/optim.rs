//! AdamW over flat groups, and the learning rate schedule.

use super::StepState;
use crate::backend::{
    Accumulate, Adamw, Cast, CountUp, DType, Fill, Kernels, Reduction, Role, Slot, Stream, SumSquares,
};
use crate::config::ScheduleKind;
use crate::error::{Error, Result};
use crate::nn::{Params, Slice};
use crate::tensor::Tensor;

/// Constants of an optimizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hyper {
    /// Decay rates of the moments, for groups without their own.
    pub betas: [f64; 2],
    /// Added to the square root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay rate of the averages of the weights.
    pub ema_decay: f64,
    /// Maximum gradient norm; 0: no clipping.
    pub clip: f64,
}

/// Settings of a single parameter group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Own {
    /// Learning rate as a multiple of the optimizer's.
    pub scale: f64,
    /// Decay rates of the moments.
    pub betas: [f64; 2],
    /// Added to the square root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Maximum norm of the group's own gradient; `None`: clipped with the other groups, by their common norm.
    pub clip: Option<f64>,
}

/// A parameter group of an optimizer.
struct Member {
    group: usize,
    own: Own,
    /// Row of the norms to which its squared gradient is added.
    norm: usize,
}

/// An optimizer over some groups. They share the step count, and the gradient norm except for groups with a clip of
/// their own.
pub struct Optimizer {
    members: Vec<Member>,
    hyper: Hyper,
    /// `[1]` i32 number of updates so far. On the device, because the host learns only later whether a step was skipped.
    steps: Tensor,
    /// `[n + 1, 2]`: the norms, and the counts of non-finite values elsewhere. One tensor, since ranks add both up.
    sums: Tensor,
    norm: Tensor,
}

impl Optimizer {
    /// An optimizer without steps. The moments are those of [`Params::train`].
    pub fn new(params: &Params, groups: &[&str], hyper: Hyper) -> Result<Self> {
        let Hyper { betas, eps, weight_decay, .. } = hyper;
        let own = Own { scale: 1.0, betas, eps, weight_decay, clip: None };
        let members = groups
            .iter()
            .map(|g| match params.group(g) {
                Some(group) => Ok(Member { group, own, norm: 0 }),
                None => Err(Error::arg("Optimizer", "groups", g, "a group of the model")),
            })
            .collect::<Result<_>>()?;
        let (sums, norm) = Self::sums(params, 1)?;
        let steps = Tensor::zeros(&**params.device(), Role::Input, DType::I32, [1])?;
        Ok(Optimizer { members, hyper, steps, sums, norm })
    }

    /// All sums of an optimizer with this many norms, and those that are norms.
    fn sums(params: &Params, norms: usize) -> Result<(Tensor, Tensor)> {
        let sums = Tensor::zeros(&**params.device(), Role::Input, params.precision().acc, [norms + 1, 2])?;
        let norm = sums.rows(0, norms)?;
        Ok((sums, norm))
    }

    /// Gives a group its own learning rate, decay rates and clip.
    pub fn set_group(&mut self, params: &Params, name: &str, own: Own) -> Result<()> {
        let group = params.group(name);
        let rows = self.norm.dims()[0];
        let Some(m) = self.members.iter_mut().find(|m| Some(m.group) == group) else {
            return Err(Error::arg("Optimizer", "name", name, "a group of this optimizer"));
        };
        m.own = own;
        if own.clip.is_some() && m.norm == 0 {
            m.norm = rows;
            (self.sums, self.norm) = Self::sums(params, rows + 1)?;
        }
        Ok(())
    }

    /// Number of updates so far, without skipped ones. Waits for the device.
    pub fn steps(&self, dev: &dyn Kernels) -> Result<u64> {
        Ok(self.steps.to_f64(dev)?[0] as u64)
    }

    /// Continues after `steps` updates.
    pub fn resume(&self, dev: &dyn Kernels, steps: u64) -> Result<()> {
        let steps = i32::try_from(steps)
            .map_err(|_| Error::arg("Optimizer", "steps", steps, "fewer than 2^31 updates"))?;
        dev.copy_in(Stream::COMPUTE, bytemuck::bytes_of(&steps), self.steps.out())
    }

    /// Writes the learning rate and clip of a step into the step state.
    pub fn prepare(&self, state: &mut StepState, rate: f64) {
        for Member { group, own, .. } in &self.members {
            state.set(Slot::Rate(*group), own.scale * rate);
            state.set(Slot::Clip(*group), own.clip.unwrap_or(self.hyper.clip));
        }
    }

    /// Updates the weights from the accumulated gradients, which are summed over the ranks already. Nothing changes on any
    /// rank if a gradient or one of `losses` `[n]` is not finite, or if one of `bad`, counts of such values elsewhere, is
    /// above 0.
    pub fn apply<'a>(
        &self,
        params: &Params,
        state: &StepState,
        losses: &Tensor,
        bad: impl Iterator<Item = &'a Tensor>,
    ) -> Result<()> {
        self.add_up(params, losses, bad)?;
        let dev = &**params.device();
        let mut gathers = false;
        for m in &self.members {
            let norm = self.norm.range(2 * m.norm, 2)?;
            for slice in params.slices(m.group)? {
                self.update(dev, state, m, &slice, &norm)?;
                // While the next slice is updated.
                for (part, whole) in &slice.gathers {
                    dev.order(Stream::COMPUTE, Stream::PEERS)?;
                    dev.collectives().all_gather(Stream::PEERS, part.view(), whole.out())?;
                    gathers = true;
                }
            }
        }
        if gathers { dev.order(Stream::PEERS, Stream::COMPUTE) } else { Ok(()) }
    }

    /// Computes the norms, with the count of all non-finite values in every row, so that all groups are updated or skipped
    /// together.
    fn add_up<'a>(
        &self,
        params: &Params,
        losses: &Tensor,
        bad: impl Iterator<Item = &'a Tensor>,
    ) -> Result<()> {
        let (dev, s) = (&**params.device(), Stream::COMPUTE);
        let rows = self.norm.dims()[0];
        dev.fill(s, &Fill { y: self.sums.out(), value: 0.0 })?;
        for m in &self.members {
            let norm = self.norm.range(2 * m.norm, 2)?;
            for grad in params.own_gradients(m.group)? {
                dev.sum_squares(s, &SumSquares { x: grad.view(), out: norm.acc() })?;
            }
        }
        // Of the losses, only the count of non-finite ones is used.
        let others = self.sums.range(2 * rows, 2)?;
        dev.sum_squares(s, &SumSquares { x: losses.view(), out: others.acc() })?;
        let all = others.range(1, 1)?;
        let add = |count: &Tensor| dev.accumulate(s, &Accumulate { x: count.view(), y: all.acc() });
        for count in bad {
            add(count)?;
        }
        if params.sharing().ranks > 1 {
            dev.collectives().all_reduce(s, self.sums.acc(), Reduction::Sum)?;
        }
        let counts = (0..rows).map(|i| self.norm.range(2 * i + 1, 1)).collect::<Result<Vec<_>>>()?;
        counts.iter().try_for_each(add)?;
        let set = |count: &Tensor| dev.cast(s, &Cast { x: all.view(), y: count.out() });
        counts.iter().try_for_each(set)
    }

    fn update(
        &self,
        dev: &dyn Kernels,
        state: &StepState,
        m: &Member,
        slice: &Slice,
        norm: &Tensor,
    ) -> Result<()> {
        let a = Adamw {
            master: slice.master.acc(),
            grad: slice.grad.view(),
            m: slice.m.acc(),
            v: slice.v.acc(),
            ema: slice.ema.as_ref().map(Tensor::acc),
            shadow: slice.shadow.as_ref().map(Tensor::out),
            state: state.tensor().view(),
            steps: self.steps.view(),
            norm: norm.view(),
            group: m.group,
            beta1: m.own.betas[0],
            beta2: m.own.betas[1],
            eps: m.own.eps,
            weight_decay: m.own.weight_decay,
            ema_decay: self.hyper.ema_decay,
        };
        dev.adamw(Stream::COMPUTE, &a)
    }

    /// Counts the update of a step, unless `norm` counts non-finite values.
    pub fn count(&self, dev: &dyn Kernels, norm: &Tensor) -> Result<()> {
        dev.count_up(Stream::COMPUTE, &CountUp { x: self.steps.acc(), norm: Some(norm.view()) })
    }

    /// Norms of the last step, `[n, 2]`. The first column holds squared gradient norms: in row 0 of the groups that
    /// are clipped together, then of each group with a clip of its own. The second column holds the count of
    /// non-finite values in every row.
    pub fn norm(&self) -> &Tensor {
        &self.norm
    }
}

/// The learning rate of step `step` (from 0) of `steps`: a linear warm-up over the fraction `warmup` of them, then
/// `kind`.
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
        assert_eq!(schedule(ScheduleKind::Constant, 2.0, 0.0, 0, 10), 2.0);
    }
}
