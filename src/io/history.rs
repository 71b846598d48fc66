//! What weights say of their making, so that nobody takes an untrained head's words for a model's, or reads a model's
//! words with another text tokenizer.

use std::collections::BTreeSet;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::weights::TensorFile;
use crate::config::{Arm, Config, StageConfig, StageKind};
use crate::error::{Error, Result};

/// What a stage teaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Skill {
    /// To bring pictures back from their codes.
    Reconstruct,
    /// To describe pictures.
    Caption,
    /// To answer questions about pictures.
    Answer,
    /// To draw pictures from prompts.
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

    /// Those that a stage teaches.
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

/// What weights say of their making; kept in the header of their file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// What they have learnt.
    pub learnt: BTreeSet<Skill>,
    /// They began as weights that say nothing.
    pub unknown: bool,
    /// The text tokenizer: `bytes`, or the checksum of its file.
    pub text: String,
}

impl History {
    /// Of weights that are about to be trained with a text tokenizer, as `Template::of` names it.
    pub(crate) fn new(text: String) -> Self {
        History { text, ..History::default() }
    }

    /// Of a weights file, if it says anything.
    pub fn of(file: &TensorFile) -> Option<Self> {
        file.note().and_then(|note| serde_json::from_str(note).ok())
    }

    /// As a file holds it.
    pub(crate) fn note(&self) -> Result<String> {
        serde_json::to_string(self).map_err(|e| Error::data("weights", format!("have no history ({e})")))
    }

    /// The weights were replaced by those of a file.
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

    /// A stage trains them.
    pub(crate) fn learn(&mut self, cfg: &Config, stage: &StageConfig) {
        self.learnt.extend(Skill::taught(cfg, stage));
    }

    /// What they have learnt, in words.
    pub fn words(&self) -> String {
        let mut all: Vec<&str> = self.learnt.iter().map(|skill| skill.words().0).collect();
        if self.unknown {
            all.push("what the weights that they began as could do");
        }
        if all.is_empty() { "nothing that can be used alone".into() } else { all.join(", ") }
    }

    /// What to say if they are asked for what they have not learnt.
    pub fn lacks(&self, skill: Skill) -> Option<String> {
        let (what, stages) = skill.words();
        let lacks = !self.unknown && !self.learnt.contains(&skill);
        lacks.then(|| {
            format!(
                "this model has not been trained to {what}: none of its stages teaches it ({stages} does), so what \
                 comes out means nothing"
            )
        })
    }

    /// Fails if they were trained with another text tokenizer than `text`, that of a configuration.
    pub(crate) fn check_text(&self, text: &str, cfg: &Config, folder: &Path) -> Result<()> {
        if self.text.is_empty() || self.text == text {
            return Ok(());
        }
        let path = cfg.data.tokenizer.as_deref().unwrap_or(folder);
        let what = format!(
            "the text tokenizer is another one ({text}) than the weights were trained with ({}); put that one back",
            self.text
        );
        Err(Error::data(path, what))
    }
}
