//! Data sets as named by a configuration, and the samples and texts that each stage can use.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::config::{DataConfig, StageConfig, StageKind};
use crate::data::{Bitmap, Chat, ImageSet, Listed, LoadOptions, Pictures, Sample, Skipped, Split};
use crate::error::{Error, Result};
use crate::io::{Fingerprint, Texts};

/// Pictures with captions and questions.
pub struct DataSet {
    /// The folder or file, or the name of the built-in data; those of a mixture in one name.
    pub root: PathBuf,
    /// The texts of the pictures.
    pub samples: Arc<Vec<Sample>>,
    /// The pictures at training size, in the same order.
    pub images: ImageSet,
    /// The sources that it consists of: one, or those of a mixture.
    pub shares: Vec<Share>,
}

/// A source in a data set.
#[derive(Debug, Clone, PartialEq)]
pub struct Share {
    /// The folder or file, or the name of the built-in data.
    pub root: PathBuf,
    /// Its samples.
    pub samples: Range<usize>,
    /// Its weight in a mixture.
    pub weight: f64,
}

/// The pictures of several sources, one after another.
#[derive(Debug)]
struct Joined(Vec<(usize, Box<dyn Pictures>)>);

impl Joined {
    /// The pictures of the source of a sample, and its number among them.
    fn of(&self, sample: usize) -> (&dyn Pictures, usize) {
        let at = self.0.partition_point(|(start, _)| *start <= sample) - 1;
        let (start, pictures) = &self.0[at];
        (&**pictures, sample - start)
    }
}

impl Pictures for Joined {
    fn decode(&self, sample: usize, shorter: usize) -> Result<Bitmap> {
        let (pictures, sample) = self.of(sample);
        pictures.decode(sample, shorter)
    }

    fn in_memory(&self) -> bool {
        self.0.iter().all(|(_, pictures)| pictures.in_memory())
    }

    fn folder(&self, sample: usize) -> Option<&Path> {
        let (pictures, sample) = self.of(sample);
        pictures.folder(sample)
    }
}

impl DataSet {
    /// The training pictures, for a tokenizer that makes one token of `side` x `side` pixels.
    pub fn train(cfg: &DataConfig, side: usize) -> Result<Self> {
        Self::of(Self::required(cfg, Split::Train)?, cfg.options(Split::Train, side))
    }

    /// The held-out pictures, cropped at the centre; `None` if the configuration names none.
    pub fn test(cfg: &DataConfig) -> Result<Option<Self>> {
        let listed = Self::listed(cfg, Split::Test)?;
        match listed.is_empty() {
            true => Ok(None),
            // Held-out pictures are squares, which need no factor.
            false => Self::of(listed, cfg.options(Split::Test, 1)).map(Some),
        }
    }

    /// The sources that have this part of the data, with their weights; fails if none has.
    pub fn required(cfg: &DataConfig, split: Split) -> Result<Vec<(Listed, f64)>> {
        let listed = Self::listed(cfg, split)?;
        match listed.is_empty() {
            true => {
                let key = if split == Split::Train { "data.train" } else { "data.test" };
                let want = "a folder, or a built-in data.source such as \"scenes\"";
                Err(Error::config(key, "empty", want))
            }
            false => Ok(listed),
        }
    }

    /// The sources that have this part of the data, with their weights. Every source of a mixture has to have training
    /// pictures.
    fn listed(cfg: &DataConfig, split: Split) -> Result<Vec<(Listed, f64)>> {
        let mut listed = Vec::new();
        for (i, part) in cfg.parts().iter().enumerate() {
            let wanted = part.wanted(split, cfg);
            match part.source.has(&wanted) {
                true => listed.push((part.source.open(&wanted)?, part.weight)),
                false if split == Split::Train && !cfg.mix.is_empty() => {
                    let want = "a path, or a number of samples of a built-in source";
                    return Err(Error::config(format!("data.mix.{i}.train"), "empty", want));
                }
                false => {}
            }
        }
        Ok(listed)
    }

    /// The data of these sources with their weights.
    pub fn of(listed: Vec<(Listed, f64)>, options: LoadOptions) -> Result<Self> {
        let (mut samples, mut joined, mut shares) = (Vec::new(), Vec::new(), Vec::<Share>::new());
        for (part, weight) in listed {
            let Listed { root, samples: more, pictures, ignored, .. } = part;
            if ignored.count > 0 {
                tracing::warn!("{}: {} are ignored: {}", root.display(), ignored.count, ignored.names());
            }
            let start = samples.len();
            shares.push(Share { root, samples: start..start + more.len(), weight });
            joined.push((start, pictures));
            samples.extend(more);
        }
        let samples = Arc::new(samples);
        let roots: Vec<String> = shares.iter().map(|s| s.root.display().to_string()).collect();
        let root = PathBuf::from(roots.join(" + "));
        let pictures: Box<dyn Pictures> = match joined.len() {
            1 => joined.remove(0).1,
            _ => Box::new(Joined(joined)),
        };
        let parts = shares.iter().map(|s| s.samples.clone()).collect();
        let images = ImageSet::new(&root, samples.clone(), pictures, parts, options)?;
        let Skipped { count, .. } = images.skipped();
        if count > 0 {
            let names = images.skipped().names();
            tracing::warn!("{}: {count} pictures cannot be used: {names}", root.display());
        }
        Ok(DataSet { root, samples, images, shares })
    }

    /// Indices of the pictures that a stage of this kind can use.
    pub fn usable(&self, kind: StageKind) -> Vec<usize> {
        let fits = |s: &Sample| match kind {
            StageKind::Tokenizer => s.has_picture(),
            StageKind::Text => !s.captions.is_empty() || !s.chats.is_empty(),
            StageKind::Align | StageKind::Semantic => s.has_picture() && !s.captions.is_empty(),
            StageKind::Gen => s.has_picture() && s.drawing_prompt().is_some(),
            StageKind::Chat => s.has_picture() && !s.chats.is_empty(),
        };
        (0..self.samples.len()).filter(|&i| fits(&self.samples[i])).collect()
    }

    /// The fingerprint of the data set.
    pub fn fingerprint(&self) -> Fingerprint {
        let samples = || self.samples.iter();
        let named = self.shares.iter().flat_map(|share| {
            self.samples[share.samples.clone()].iter().map(|s| [name(&s.image, &share.root)])
        });
        Fingerprint {
            names: Texts::of(named),
            pictures: self.images.usable(),
            captions: Texts::of(samples().map(|s| s.captions.iter().map(String::as_bytes))),
            prompts: Texts::of(samples().map(|s| s.prompt.as_deref().map(str::as_bytes))),
            questions: Texts::of(samples().map(|s| s.chats.iter().flat_map(conversation))),
        }
    }
}

/// The texts of a conversation. What is more than a question and its answer begins with the line of the system and ends
/// with an empty text, so that the turns of one conversation are not those of several.
fn conversation(chat: &Chat) -> Vec<&[u8]> {
    let mut all: Vec<&[u8]> = chat.turns.iter().flat_map(|(q, a)| [q.as_bytes(), a.as_bytes()]).collect();
    if chat.turns.len() > 1 || chat.system.is_some() {
        all.insert(0, chat.system.as_deref().unwrap_or_default().as_bytes());
        all.push(b"");
    }
    all
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
    let mut all: Vec<&str> = s.captions.iter().filter(|_| captions).map(String::as_str).collect();
    if asked {
        all.extend(s.turns().flat_map(|(q, a)| [q, a]));
    }
    if cfg.kind == StageKind::Gen {
        all.extend(s.drawing_prompt().filter(|&p| !captions || s.caption() != Some(p)));
    }
    all
}
