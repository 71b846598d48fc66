//! PatchGAN (arXiv 1611.07004) and the state of its training: BatchNorm's running statistics and LeCAM's averages
//! (arXiv 2104.03310).

use crate::autograd::{Tape, Var};
use crate::backend::{BatchNormRunning, Cast, DType, Kernels, LecamUpdate, Reduction, Role, Stream, Unary};
use crate::config::DiscriminatorConfig;
use crate::error::Result;
use crate::model::Carried;
use crate::nn::{Conv2d, Init, Param, ParamBuilder, Params};
use crate::ops::{self, BatchStats, Conv};
use crate::tensor::Tensor;

const CONV: Conv = Conv { stride: 2, before: 1, after: 1 };
const LAST: Conv = Conv { stride: 1, before: 1, after: 1 };

struct Normed {
    conv: Conv2d,
    w: Param,
    b: Param,
}

/// Five 4x4 convolutions that classify overlapping patches.
pub struct Discriminator {
    first: Conv2d,
    normed: Vec<Normed>,
    last: Conv2d,
    widths: [usize; 3],
    cfg: DiscriminatorConfig,
}

/// State that the discriminator's training carries from step to step, besides the weights.
pub struct DiscriminatorState {
    /// Running mean and variance of each BatchNorm, `[C]`; accumulator type.
    pub running: Vec<(Tensor, Tensor)>,
    /// Number of passes in the running statistics.
    pub batches: u64,
    /// Averages of the mean real and fake logits, `[2]`; accumulator type.
    pub lecam: Tensor,
}

impl DiscriminatorState {
    /// All of it, under the names that PyTorch gives it.
    pub(crate) fn carried(&self) -> Vec<(String, Carried<'_>)> {
        let mut all = vec![("loss.lecam_ema".to_string(), Carried::Tensor(&self.lecam))];
        for (i, (mean, var)) in self.running.iter().enumerate() {
            // The BatchNorms are layers 3, 6 and 9.
            let name = |what: &str| format!("{}.{what}", layer(3 + 3 * i));
            all.push((name("running_mean"), Carried::Tensor(mean)));
            all.push((name("running_var"), Carried::Tensor(var)));
            all.push((name("num_batches_tracked"), Carried::Count(self.batches)));
        }
        all
    }
}

/// The public name of a layer.
fn layer(i: usize) -> String {
    format!("loss.discriminator.main.{i}")
}

impl Discriminator {
    /// Registers all parameters in group `discriminator`.
    pub fn new(b: &mut ParamBuilder, cfg: &DiscriminatorConfig) -> Self {
        b.group("discriminator");
        let init = Init::Normal(0.0, 0.02);
        let n = cfg.ndf;
        let biased = |b: &mut ParamBuilder, i: usize, from: usize, to: usize, conv: Conv| {
            Conv2d::with_init(b, &layer(i), from, to, 4, conv, init, Some(Init::kaiming(from * 16)))
        };
        let widths = [2 * n, 4 * n, 8 * n];
        let first = biased(b, 0, 3, n, CONV);
        let mut normed = Vec::new();
        let mut from = n;
        for (l, &to) in widths.iter().enumerate() {
            let conv = if l == 2 { LAST } else { CONV };
            normed.push(Normed {
                conv: Conv2d::with_init(b, &layer(2 + 3 * l), from, to, 4, conv, init, None),
                w: b.add(&format!("{}.weight", layer(3 + 3 * l)), [to], Init::Normal(1.0, 0.02)),
                b: b.add(&format!("{}.bias", layer(3 + 3 * l)), [to], Init::Constant(0.0)),
            });
            from = to;
        }
        let last = biased(b, 11, from, 1, LAST);
        Discriminator { first, normed, last, widths, cfg: cfg.clone() }
    }

    /// Patch logits `[B, h, w, 1]` of `x` `[B, H, W, 3]`, with the BatchNorm statistics of this pass. If `frozen`,
    /// gradients reach `x` but not the weights.
    pub fn forward(&self, t: &Tape, p: &Params, x: &Var, frozen: bool) -> Result<(Var, Vec<BatchStats>)> {
        let slope = self.cfg.slope;
        let norm = if self.cfg.sync { ops::batch_norm_merged } else { ops::batch_norm };
        let mut h = ops::unary(t, &self.first.apply(t, p, x, frozen)?, Unary::LeakyRelu(slope))?;
        let mut stats = Vec::new();
        for layer in &self.normed {
            let x = layer.conv.apply(t, p, &h, frozen)?;
            let (w, b) = match frozen {
                true => (p.frozen(t, layer.w)?, p.frozen(t, layer.b)?),
                false => (p.var(t, layer.w)?, p.var(t, layer.b)?),
            };
            let (y, s) = norm(t, &x, &w, &b, self.cfg.norm_eps, slope)?;
            stats.push(s);
            h = y;
        }
        Ok((self.last.apply(t, p, &h, frozen)?, stats))
    }

    /// Number of patch logits of a picture of `h` by `w` pixels; 0 if it is too small.
    pub fn patches(&self, h: usize, w: usize) -> usize {
        let convs = [CONV, CONV, CONV, LAST, LAST];
        let side = |n: usize| {
            convs.iter().fold(n, |n, c| match (n + c.before + c.after).checked_sub(4) {
                Some(rest) => rest / c.stride + 1,
                None => 0,
            })
        };
        side(h) * side(w)
    }

    /// The state of an untrained discriminator: mean 0, variance 1, averages 0.
    pub fn state(&self, dev: &dyn Kernels, acc: DType) -> Result<DiscriminatorState> {
        let filled = |n: usize, v: f64| Tensor::from_f64(dev, Role::Weight, acc, &vec![v; n], [n]);
        let running =
            self.widths.iter().map(|&c| Ok((filled(c, 0.0)?, filled(c, 1.0)?))).collect::<Result<_>>()?;
        Ok(DiscriminatorState { running, batches: 0, lecam: filled(2, 0.0)? })
    }

    /// LeCAM's averages updated with these logits, of all ranks if they are synchronised; the state itself does not change.
    pub fn lecam_after(&self, t: &Tape, s: &DiscriminatorState, real: &Var, fake: &Var) -> Result<Tensor> {
        let out = t.stat([2])?;
        let a = LecamUpdate {
            real: real.value().view(),
            fake: fake.value().view(),
            ema: s.lecam.view(),
            out: out.out(),
            decay: self.cfg.lecam_decay,
        };
        t.dev().lecam_update(Stream::COMPUTE, &a)?;
        if self.cfg.sync {
            // All ranks had the same averages and have equally many logits.
            t.dev().collectives().all_reduce(Stream::COMPUTE, out.acc(), Reduction::Mean)?;
        }
        Ok(out)
    }

    /// Updates the running statistics with the statistics of `passes`, in order.
    pub fn commit(
        &self,
        dev: &dyn Kernels,
        s: &mut DiscriminatorState,
        passes: &[Vec<BatchStats>],
    ) -> Result<()> {
        for pass in passes {
            for ((mean, var), b) in s.running.iter().zip(pass) {
                let a = BatchNormRunning {
                    mean: b.mean.view(),
                    var: b.var.view(),
                    running_mean: mean.acc(),
                    running_var: var.acc(),
                    rows: b.rows,
                    momentum: self.cfg.momentum,
                };
                dev.batch_norm_running(Stream::COMPUTE, &a)?;
            }
            s.batches += 1;
        }
        Ok(())
    }

    /// Replaces LeCAM's averages.
    pub fn commit_lecam(&self, dev: &dyn Kernels, s: &DiscriminatorState, new: &Tensor) -> Result<()> {
        dev.cast(Stream::COMPUTE, &Cast { x: new.view(), y: s.lecam.out() })
    }
}
