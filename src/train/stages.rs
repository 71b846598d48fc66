//! The stages: the recipe of each, and the modules that it trains.

use super::{Recipe, TokenizerMode};
use crate::config::{StageConfig, StageKind};
use crate::error::{Error, Result};
use crate::model::{Ett, MODULES, TrainedBy, tuned};

/// A stage of a model: recipe and trained groups.
#[derive(Debug, Clone, PartialEq)]
pub struct Stage {
    /// The losses that it computes.
    pub recipe: Recipe,
    /// Groups that the main optimizer trains.
    pub groups: Vec<&'static str>,
    /// Whether the discriminator is trained.
    pub discriminator: bool,
}

impl Stage {
    /// The stage for this configuration: a `gen` stage trains on text too if it has a share of captions or answers.
    pub fn of(cfg: &StageConfig, model: &Ett) -> Result<Self> {
        let mut stage = Self::new(cfg.kind, model)?;
        stage.recipe.text |= cfg.kind == StageKind::Gen && cfg.captions + cfg.answers > 0.0;
        Ok(stage)
    }

    /// The stage of this kind for the model's arm and alpha (arXiv 2505.10562, section 3).
    pub fn new(kind: StageKind, model: &Ett) -> Result<Self> {
        let cfg = &model.cfg;
        let tokenizer = match (tuned(kind, cfg), kind) {
            (Some(alpha), _) => TokenizerMode::Trained(alpha),
            (None, StageKind::Text) => TokenizerMode::Off,
            (None, _) => TokenizerMode::Frozen,
        };
        let text = !matches!(kind, StageKind::Tokenizer | StageKind::Gen);
        let trained = |by: TrainedBy| MODULES.iter().filter(move |m| m.by == by && m.is_trained(kind, cfg));
        let groups: Vec<_> = trained(TrainedBy::Main).map(|m| m.group).collect();
        if groups.is_empty() {
            return Err(Error::config("stage.kind", kind.name(), "a stage that trains something"));
        }
        let discriminator = trained(TrainedBy::Discriminator).next().is_some();
        Ok(Stage { recipe: Recipe { tokenizer, text, codes: kind == StageKind::Gen }, groups, discriminator })
    }

    /// Whether its batches have pictures.
    pub fn reads_pictures(&self) -> bool {
        self.recipe.tokenizer != TokenizerMode::Off
    }

    /// All trained groups, the discriminator included.
    pub fn trained(&self) -> Vec<&'static str> {
        let mut all = self.groups.clone();
        if self.discriminator {
            all.push("discriminator");
        }
        all
    }
}

/// The groups among `trained` whose weights are averaged by a stage that keeps averages.
pub fn averaged<'a>(trained: &[&'a str]) -> Vec<&'a str> {
    let is_averaged = |group: &&str| MODULES.iter().any(|m| m.group == *group && m.averaged);
    trained.iter().copied().filter(is_averaged).collect()
}

/// Starts the averages of a stage that trains these groups, if `ema` is true. The averages of a group are kept by
/// stages that do not train it, and are dropped by the next stage that does.
pub(super) fn start_averages(model: &mut Ett, trained: &[&str], ema: bool) -> Result<()> {
    model.params.drop_averages(trained);
    if ema {
        model.params.average(&averaged(trained))?;
    }
    Ok(())
}
