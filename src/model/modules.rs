//! The modules of the model, each of which a stage trains or freezes as a whole, and the state that they carry from
//! step to step.

use super::Ett;
use crate::backend::{Cast, Role, Stream};
use crate::config::{Arm, Config, StageKind};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Which optimizer trains a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrainedBy {
    /// None: its weights never change.
    Nothing,
    /// The main optimizer, which all modules except the discriminator share.
    Main,
    /// The discriminator's optimizer, which steps before the main one.
    Discriminator,
}

/// The properties of a module that matter for training.
#[derive(Debug)]
pub struct Module {
    /// Its parameter group.
    pub group: &'static str,
    /// Which optimizer trains it.
    pub by: TrainedBy,
    /// Whether a stage that keeps averages of weights keeps those of this module.
    pub averaged: bool,
    /// Whether the use of a trained model needs it; the others serve the losses.
    pub in_use: bool,
    /// Whether a stage trains it; `tuned` is the weight of the tokenizer's own losses, or `None` if the stage does
    /// not train the tokenizer.
    trained: fn(stage: StageKind, tuned: Option<f64>, cfg: &Config) -> bool,
}

impl Module {
    /// Whether a stage of this kind trains the module in this configuration.
    pub fn is_trained(&self, stage: StageKind, cfg: &Config) -> bool {
        (self.trained)(stage, tuned(stage, cfg), cfg)
    }
}

/// The weight of the tokenizer's own losses in a stage; `None` if the stage does not train the tokenizer
/// (arXiv 2505.10562, section 3).
pub fn tuned(stage: StageKind, cfg: &Config) -> Option<f64> {
    match (stage, cfg.train.arm) {
        (StageKind::Tokenizer, _) => Some(1.0),
        (StageKind::Semantic, Arm::Ett) => Some(cfg.loss.alpha),
        _ => None,
    }
}

fn decodes(tuned: Option<f64>) -> bool {
    tuned.is_some_and(|alpha| alpha > 0.0)
}

fn reads_pictures(stage: StageKind) -> bool {
    matches!(stage, StageKind::Align | StageKind::Semantic | StageKind::Chat | StageKind::Gen)
}

/// All modules, in the order in which an optimizer updates them.
pub const MODULES: [Module; 8] = [
    Module {
        group: "llm",
        by: TrainedBy::Main,
        averaged: false,
        in_use: true,
        trained: |stage, _, _| !matches!(stage, StageKind::Tokenizer | StageKind::Align),
    },
    Module {
        group: "projector",
        by: TrainedBy::Main,
        averaged: false,
        in_use: true,
        trained: |stage, _, cfg| reads_pictures(stage) && cfg.train.arm != Arm::Index,
    },
    Module {
        group: "visual_embed",
        by: TrainedBy::Main,
        averaged: false,
        in_use: true,
        trained: |stage, _, cfg| reads_pictures(stage) && cfg.train.arm == Arm::Index,
    },
    Module {
        group: "visual_head",
        by: TrainedBy::Main,
        averaged: false,
        in_use: true,
        trained: |stage, _, _| stage == StageKind::Gen,
    },
    Module {
        group: "encoder",
        by: TrainedBy::Main,
        averaged: true,
        in_use: true,
        trained: |_, tuned, _| tuned.is_some(),
    },
    Module {
        group: "decoder",
        by: TrainedBy::Main,
        averaged: true,
        in_use: true,
        trained: |_, tuned, _| decodes(tuned),
    },
    Module {
        group: "discriminator",
        by: TrainedBy::Discriminator,
        averaged: true,
        in_use: false,
        trained: |_, tuned, cfg| decodes(tuned) && cfg.loss.gan > 0.0,
    },
    Module {
        group: "lpips",
        by: TrainedBy::Nothing,
        averaged: false,
        in_use: false,
        trained: |_, _, _| false,
    },
];

/// The groups in the order in which a backward pass is done with their gradients, as far as it trains them.
pub const BACKWARD: [&str; 8] =
    ["visual_head", "llm", "visual_embed", "projector", "decoder", "encoder", "discriminator", "lpips"];

/// The matrices with a row per token of the vocabulary: the embedding, and the output head if it is one of its own.
pub const PER_TOKEN: [&str; 2] = ["model.embed_tokens.weight", "lm_head.weight"];

/// Whether a parameter with this public name belongs to the language model.
pub fn is_of_llm(name: &str) -> bool {
    name.starts_with("model.") || name == "lm_head.weight"
}

/// Whether a parameter with this public name belongs to the vision tokenizer or to its losses.
pub fn is_of_tokenizer(name: &str) -> bool {
    const PARTS: [&str; 6] =
        ["encoder.", "quant_conv.", "quantize.", "post_quant_conv.", "decoder.", "loss."];
    PARTS.iter().any(|part| name.starts_with(part))
}

/// State that training carries from step to step, besides the weights.
pub enum Carried<'a> {
    /// A tensor on the device, in the accumulator type.
    Tensor(&'a Tensor),
    /// A count on the host.
    Count(u64),
}

impl Carried<'_> {
    /// The values; waits for the device.
    pub fn values(&self, model: &Ett) -> Result<Vec<f64>> {
        match self {
            Carried::Tensor(t) => t.to_f64(&**model.params.device()),
            Carried::Count(n) => Ok(vec![*n as f64]),
        }
    }
}

impl Ett {
    /// The state that training carries from step to step besides the weights, under its public names.
    pub fn carried(&self) -> Vec<(String, Carried<'_>)> {
        self.discriminator_state.carried()
    }

    /// Those of [`Ett::carried`] of which every rank has its own, unless `discriminator.sync` is set, and on which training
    /// depends. BatchNorm's running statistics are those of rank 0, as with PyTorch.
    pub fn own_of_rank(&self) -> Vec<(String, &Tensor)> {
        let own = |(name, carried)| match carried {
            Carried::Tensor(t) if std::ptr::eq(t, &self.discriminator_state.lecam) => Some((name, t)),
            _ => None,
        };
        self.carried().into_iter().filter_map(own).collect()
    }

    /// Overwrites a piece of state named by [`Ett::carried`].
    pub fn set_carried(&mut self, name: &str, values: &[f64]) -> Result<()> {
        let count = match self.carried().into_iter().find(|(n, _)| n == name) {
            None => return Err(Error::arg("set_carried", "name", name, "a name that the model carries")),
            Some((_, Carried::Count(_))) => values.first().copied(),
            Some((_, Carried::Tensor(to))) => {
                let dev = &**self.params.device();
                let from = Tensor::from_f64(dev, Role::Input, to.dtype(), values, to.dims())?;
                return dev.cast(Stream::COMPUTE, &Cast { x: from.view(), y: to.out() });
            }
        };
        let count = count.ok_or_else(|| Error::arg("set_carried", "values", "empty", "a count"))?;
        // Every BatchNorm counts the same batches.
        self.discriminator_state.batches = count as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Plan, Target};
    use std::sync::Arc;

    #[test]
    fn every_group_of_the_model_is_a_module() -> Result<()> {
        for arm in [Arm::Ett, Arm::Index] {
            let mut cfg = Config::default();
            cfg.train.arm = arm;
            let model = Ett::new(&cfg, Arc::new(Plan::of(Target::Cpu { threads: 1 })))?;
            let mut groups = model.params.groups();
            let mut modules: Vec<&str> = MODULES.iter().map(|m| m.group).collect();
            groups.sort_unstable();
            modules.sort_unstable();
            assert_eq!(groups, modules);
            let mut backward = BACKWARD.to_vec();
            backward.sort_unstable();
            assert_eq!(groups, backward);
        }
        Ok(())
    }
}
