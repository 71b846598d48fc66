//! Data sets as named by a configuration, and the samples and texts that each stage can use.

use std::path::Path;

use crate::config::{DataConfig, StageConfig, StageKind};
use crate::data::{DataSet, Sample, Split};
use crate::error::{Error, Result};
use crate::io::{Fingerprint, Texts};

impl DataSet {
    /// The training pictures.
    pub fn train(cfg: &DataConfig) -> Result<Self> {
        Self::part(cfg, Split::Train)?.ok_or_else(|| {
            Error::config("data.train", "empty", "a folder, or a built-in data.source such as \"scenes\"")
        })
    }

    /// The first `data.eval_samples` usable held-out pictures, cropped at the centre; `None` if the configuration
    /// names none.
    pub fn test(cfg: &DataConfig) -> Result<Option<Self>> {
        Self::part(cfg, Split::Test)
    }

    fn part(cfg: &DataConfig, split: Split) -> Result<Option<Self>> {
        let part = cfg.part(split);
        cfg.source.has(&part).then(|| cfg.source.open(&part)).transpose()
    }

    /// The texts of picture `index`.
    pub(super) fn said(&self, index: usize) -> Option<&Sample> {
        self.images.sample(index).and_then(|s| self.samples.get(s))
    }

    /// Indices of the pictures that a stage of this kind can use.
    pub fn usable(&self, kind: StageKind) -> Vec<usize> {
        let fits = |s: &Sample| match kind {
            StageKind::Tokenizer => true,
            StageKind::Text => s.caption.is_some() || !s.qa.is_empty(),
            StageKind::Align | StageKind::Semantic => s.caption.is_some(),
            StageKind::Gen => s.drawing_prompt().is_some(),
            StageKind::Chat => !s.qa.is_empty(),
        };
        (0..self.images.len()).filter(|&i| self.said(i).is_some_and(fits)).collect()
    }

    /// The fingerprint of the data set.
    pub fn fingerprint(&self) -> Fingerprint {
        let samples = || self.samples.iter();
        Fingerprint {
            names: Texts::of(samples().map(|s| [name(&s.image, &self.root)])),
            pictures: self.images.len(),
            captions: Texts::of(samples().map(|s| s.caption.as_deref().map(str::as_bytes))),
            prompts: Texts::of(samples().map(|s| s.prompt.as_deref().map(str::as_bytes))),
            questions: Texts::of(
                samples().map(|s| s.qa.iter().flat_map(|(q, a)| [q.as_bytes(), a.as_bytes()])),
            ),
        }
    }
}

fn name<'a>(image: &'a Path, root: &Path) -> &'a [u8] {
    image.strip_prefix(root).unwrap_or(image).as_os_str().as_encoded_bytes()
}

/// The texts that a picture needs for a stage of this kind, in words.
pub(super) fn wanted(kind: StageKind) -> &'static str {
    match kind {
        StageKind::Tokenizer => "nothing but its pixels",
        StageKind::Text => "a caption or a question",
        StageKind::Align | StageKind::Semantic => "a caption",
        StageKind::Chat => "a question",
        StageKind::Gen => "a prompt or a caption",
    }
}

/// The texts of a sample that may occur in the sequences of a stage.
pub(super) fn texts<'a>(s: &'a Sample, cfg: &StageConfig) -> Vec<&'a str> {
    let (captions, asked) = match cfg.kind {
        StageKind::Tokenizer => (false, false),
        StageKind::Text => (true, true),
        StageKind::Align | StageKind::Semantic => (true, false),
        StageKind::Chat => (cfg.captions > 0.0, true),
        StageKind::Gen => (cfg.captions > 0.0, cfg.answers > 0.0),
    };
    let mut all: Vec<&str> = s.caption.as_deref().filter(|_| captions).into_iter().collect();
    if asked {
        all.extend(s.qa.iter().flat_map(|(q, a)| [q.as_str(), a.as_str()]));
    }
    if cfg.kind == StageKind::Gen {
        all.extend(s.drawing_prompt().filter(|&p| !captions || s.caption.as_deref() != Some(p)));
    }
    all
}
