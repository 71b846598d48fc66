//! The optimizers of a stage and the step state that they read.

use super::StepState;
use super::{Counts, Hyper, Optimizer, Own, Stage, schedule};
use crate::config::StageConfig;
use crate::error::{Error, Result};
use crate::model::Ett;

/// The optimizers of a stage, and the step state that they share.
pub(super) struct Update {
    /// The values that change from step to step, on the device.
    pub state: StepState,
    /// Trains all modules except the discriminator.
    pub main: Optimizer,
    /// Trains the discriminator.
    pub disc: Option<Optimizer>,
    peak: f64,
    disc_peak: f64,
}

impl Update {
    /// Optimizers before their first step. The groups trained by the stage must have their moments already.
    pub fn new(model: &Ett, cfg: &StageConfig, stage: &Stage) -> Result<Self> {
        let t = &model.cfg.train;
        let ema_decay = if cfg.ema { t.ema_decay } else { 0.0 };
        let (eps, clip) = (cfg.adam_eps.unwrap_or(t.adam_eps), cfg.clip.unwrap_or(t.clip));
        let weight_decay = cfg.weight_decay.unwrap_or(t.weight_decay);
        let mut state = StepState::new(&**model.params.device(), model.params.precision().acc)?;
        stage.recipe.weights(model, &mut state, cfg.accumulate);
        let (peak, betas) = (cfg.lr.unwrap_or(t.lr), cfg.betas.unwrap_or(t.betas));
        let hyper = Hyper { betas, eps, weight_decay, ema_decay, clip };
        let mut main = Optimizer::new(&model.params, &stage.groups, hyper)?;
        let of = cfg.groups.get("discriminator").cloned().unwrap_or_default();
        for (name, g) in cfg.groups.iter().filter(|(name, _)| *name != "discriminator") {
            let own = Own {
                scale: g.lr.map_or(1.0, |lr| if peak > 0.0 { lr / peak } else { 0.0 }),
                betas: g.betas.unwrap_or(betas),
                eps: g.adam_eps.unwrap_or(eps),
                weight_decay: g.weight_decay.unwrap_or(weight_decay),
                clip: g.clip,
            };
            main.set_group(&model.params, name, own).map_err(|_| {
                let key = format!("stage.groups.{name}");
                let want = format!("a group that this stage trains: {}", stage.trained().join(", "));
                Error::config(key, "not trained", want)
            })?;
        }
        let disc = match stage.discriminator {
            true => {
                let hyper = Hyper {
                    betas: of.betas.unwrap_or(t.disc_betas),
                    eps: of.adam_eps.unwrap_or(eps),
                    weight_decay: of.weight_decay.unwrap_or(weight_decay),
                    ema_decay,
                    clip: of.clip.unwrap_or(clip),
                };
                Some(Optimizer::new(&model.params, &["discriminator"], hyper)?)
            }
            false => None,
        };
        Ok(Update { state, main, disc, peak, disc_peak: of.lr.unwrap_or(peak) })
    }

    /// The optimizers, in the order of checkpoints.
    pub fn saved(&self) -> Vec<&Optimizer> {
        [Some(&self.main), self.disc.as_ref()].into_iter().flatten().collect()
    }

    /// Sends the step state of step `s` to the device and returns the main learning rate.
    pub fn prepare(&mut self, model: &Ett, cfg: &StageConfig, counts: &Counts, s: usize) -> Result<f64> {
        counts.set(&mut self.state);
        let warmup = cfg.warmup(&model.cfg.train);
        let rate = |peak| schedule(cfg.schedule, peak, warmup, s, cfg.steps);
        self.main.prepare(&mut self.state, rate(self.peak));
        if let Some(d) = &self.disc {
            d.prepare(&mut self.state, rate(self.disc_peak));
        }
        self.state.send(&**model.params.device())?;
        Ok(rate(self.peak))
    }
}
