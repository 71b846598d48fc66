//! History of weights, kept with them: the skills they were trained for, so that users are warned of the output of
//! untrained heads, and their text tokenizer, so that they are not used with another one.

use std::collections::BTreeSet;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::weights::TensorFile;
use crate::config::{Arm, Config, StageConfig, StageKind};
use crate::error::{Error, Result};

/// A skill that stages train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Skill {
    /// Reconstructing pictures from their codes.
    Reconstruct,
    /// Describing pictures.
    Caption,
    /// Answering questions about pictures.
    Answer,
    /// Drawing pictures from prompts.
    Draw,
}

impl Skill {
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Skill::Reconstruct => ("reconstruct pictures", "tokenizer or semantic"),
            Skill::Caption => ("describe pictures", "align or semantic"),
            Skill::Answer => ("answer questions", "chat"),
            Skill::Draw => ("draw", "gen"),
        }
    }

    /// The skills that a stage trains.
    fn taught(cfg: &Config, stage: &StageConfig) -> Vec<Skill> {
        let tuned = cfg.train.arm == Arm::Ett && cfg.loss.alpha > 0.0;
        let all = match stage.kind {
            StageKind::Tokenizer => vec![(Skill::Reconstruct, true)],
            StageKind::Text => vec![],
            StageKind::Align => vec![(Skill::Caption, true)],
            StageKind::Semantic => vec![(Skill::Caption, true), (Skill::Reconstruct, tuned)],
            StageKind::Chat => vec![(Skill::Answer, true), (Skill::Caption, stage.captions > 0.0)],
            StageKind::Gen => vec![
                (Skill::Draw, true),
                (Skill::Caption, stage.captions > 0.0),
                (Skill::Answer, stage.answers > 0.0),
            ],
        };
        all.into_iter().filter(|(_, taught)| *taught && stage.steps > 0).map(|(skill, _)| skill).collect()
    }
}

/// History of weights; kept in the header of their file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// The skills they were trained for.
    pub learnt: BTreeSet<Skill>,
    /// Whether training started from weights without a history.
    pub unknown: bool,
    /// The text tokenizer: `bytes`, or the checksum of its file.
    pub text: String,
}

impl History {
    /// The history of weights that are about to be trained with a text tokenizer, named as by `Template::of`.
    pub(crate) fn new(text: String) -> Self {
        History { text, ..History::default() }
    }

    /// The history in a weights file, if it has one.
    pub fn of(file: &TensorFile) -> Option<Self> {
        file.note().map(|note| note.history.clone())
    }

    /// Continues the history in a file whose weights replaced these.
    pub(crate) fn start_from(&mut self, path: &Path) -> Result<()> {
        match Self::of(&TensorFile::open(path)?) {
            None => self.unknown = true,
            Some(before) => {
                if before.text != self.text {
                    tracing::warn!(
                        "{}: these weights were trained with another text tokenizer",
                        path.display()
                    );
                }
                (self.learnt, self.unknown) = (before.learnt, before.unknown);
            }
        }
        Ok(())
    }

    /// Adds the skills of a stage that trains the weights.
    pub(crate) fn learn(&mut self, cfg: &Config, stage: &StageConfig) {
        self.learnt.extend(Skill::taught(cfg, stage));
    }

    /// The skills in words.
    pub fn words(&self) -> String {
        let mut all: Vec<&str> = self.learnt.iter().map(|skill| skill.words().0).collect();
        if self.unknown {
            all.push("do whatever its initial weights could do");
        }
        if all.is_empty() { "nothing that can be used alone".into() } else { all.join(", ") }
    }

    /// A warning if the weights were not trained for a skill.
    pub fn lacks(&self, skill: Skill) -> Option<String> {
        let (what, stages) = skill.words();
        let lacks = !self.unknown && !self.learnt.contains(&skill);
        lacks.then(|| {
            format!(
                "this model has not been trained to {what}: none of its stages trains for it ({stages} does), so the \
                 output is meaningless"
            )
        })
    }

    /// Fails if the weights were trained with another text tokenizer than `text`, that of the configuration.
    pub(crate) fn check_text(&self, text: &str, cfg: &Config, folder: &Path) -> Result<()> {
        if self.text.is_empty() || self.text == text {
            return Ok(());
        }
        let path = cfg.data.tokenizer.as_deref().unwrap_or(folder);
        let what = format!(
            "the text tokenizer ({text}) is not the one of the weights ({}); put the latter back",
            self.text
        );
        Err(Error::data(path, what))
    }
}
