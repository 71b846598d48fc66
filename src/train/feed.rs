//! Training data as batches: pictures and the sequences over them, a function of seed and step alone.

use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::{Batch, Stage, Template, TokenizerMode};
use crate::backend::Role;
use crate::config::{DataConfig, Source, StageConfig, StageKind, TrainConfig};
use crate::data::{Drawing, Folder, Image, ImageSet, LoadOptions, Order, Sample, Scenes, Split, Words};
use crate::error::{Error, Result};
use crate::model::tokenizer::Grid;
use crate::model::{Ett, Part};
use crate::rng::{Philox, Purpose};
use crate::tensor::Tensor;

/// Rows of a packed batch are rounded up to this, so that memory is reused from step to step.
pub(super) const PAD: usize = 64;

/// Seed of the built-in pictures: they are the same whatever a run's seed.
const DRAWN: u64 = 1;

/// Pictures with captions and questions, from a folder or built in.
pub struct DataSet {
    /// The folder, or the name of the built-in data.
    pub root: PathBuf,
    /// What is said about the pictures.
    pub samples: Vec<Sample>,
    /// The pictures at training size.
    pub images: ImageSet,
}

impl DataSet {
    /// The pictures to train on.
    pub fn train(cfg: &DataConfig) -> Result<Self> {
        let options = LoadOptions { crop: cfg.crop, flip: cfg.flip, ..Self::options(cfg) };
        Self::part(cfg, Split::Train, options)?.ok_or_else(|| {
            Error::config("data.train", "empty", "a folder, or data.source = \"scenes\" or \"words\"")
        })
    }

    /// The first `data.eval_samples` held-out pictures that can be used, cut in the middle; `None` if the
    /// configuration names none.
    pub fn test(cfg: &DataConfig) -> Result<Option<Self>> {
        Self::part(cfg, Split::Test, LoadOptions { most: cfg.eval_samples, ..Self::options(cfg) })
    }

    fn options(cfg: &DataConfig) -> LoadOptions {
        LoadOptions { memory: (cfg.cache_mib as u64).saturating_mul(1 << 20), ..LoadOptions::new(cfg.size) }
    }

    fn part(cfg: &DataConfig, split: Split, options: LoadOptions) -> Result<Option<Self>> {
        let (folder, n) = match split {
            Split::Train => (Some(&cfg.train), cfg.train_samples),
            Split::Test => (cfg.test.as_ref(), cfg.test_samples),
        };
        match cfg.source {
            Source::Folder => {
                let folder = folder.filter(|f| !f.as_os_str().is_empty());
                folder.map(|f| Self::open(f, options)).transpose()
            }
            _ if n == 0 => Ok(None),
            Source::Scenes => {
                let scenes = Scenes::new(cfg.size, DRAWN)?;
                Self::draw(cfg.source, n, options, |i| scenes.get(split, i)).map(Some)
            }
            Source::Words => {
                let words = Words::new(cfg.size, DRAWN)?;
                Self::draw(cfg.source, n, options, |i| words.get(split, i)).map(Some)
            }
        }
    }

    fn open(path: &Path, options: LoadOptions) -> Result<Self> {
        let Folder { root, samples, ignored } = Folder::open(path)?;
        if ignored.count > 0 {
            tracing::warn!("{}: {} are ignored: {}", path.display(), ignored.count, ignored.names());
        }
        let images = ImageSet::load(&root, &samples, options)?;
        let skipped = images.skipped();
        if skipped.count > 0 {
            let of = samples.len();
            let names = skipped.names();
            tracing::warn!("{}: {} of {of} pictures are skipped: {names}", path.display(), skipped.count);
        }
        if images.on_disk() > 0 {
            tracing::info!(
                "{}: {} pictures are kept in memory ({} MiB), {} are decoded at each use; data.cache_mib changes this",
                path.display(),
                images.len() - images.on_disk(),
                images.bytes() >> 20,
                images.on_disk()
            );
        }
        Ok(DataSet { root, samples, images })
    }

    fn draw(
        source: Source,
        n: usize,
        options: LoadOptions,
        draw: impl Fn(usize) -> Drawing + Sync,
    ) -> Result<Self> {
        let root = PathBuf::from(source.name());
        let (samples, images) = ImageSet::draw(&root, n.min(options.most), options, draw)?;
        Ok(DataSet { root, samples, images })
    }

    /// What is said about picture `index` of the images.
    fn said(&self, index: usize) -> Option<&Sample> {
        self.images.sample(index).and_then(|s| self.samples.get(s))
    }

    /// Pictures that a stage can learn from.
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
}

/// What a picture has to have for a stage of this kind.
fn wanted(kind: StageKind) -> &'static str {
    match kind {
        StageKind::Tokenizer => "nothing but its pixels",
        StageKind::Text => "a caption or a question",
        StageKind::Align | StageKind::Semantic => "a caption",
        StageKind::Chat => "a question",
        StageKind::Gen => "a prompt or a caption",
    }
}

/// The texts of a sample that a stage may read.
fn texts<'a>(s: &'a Sample, cfg: &StageConfig) -> Vec<&'a str> {
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

/// Images `[B, H, W, 3]` of one size on the device.
pub fn images_to_device(model: &Ett, images: &[Image]) -> Result<(Tensor, Grid)> {
    let Some(first) = images.first() else {
        return Err(Error::arg("images_to_device", "images", "none", "at least one"));
    };
    let (h, w) = (first.height, first.width);
    if let Some(i) = images.iter().find(|i| (i.height, i.width) != (h, w)) {
        return Err(Error::arg(
            "images_to_device",
            "images",
            format!("{}x{}", i.height, i.width),
            format!("{h}x{w} like the first"),
        ));
    }
    let values: Vec<f64> = images.iter().flat_map(|i| i.pixels.iter().map(|&v| v as f64)).collect();
    let prec = model.params.precision();
    let t =
        Tensor::from_f64(&**model.params.device(), Role::Input, prec.act, &values, [images.len(), h, w, 3])?;
    let s = model.cfg.tokenizer.downsampling();
    Ok((t, Grid { images: images.len(), h: h / s, w: w / s }))
}

/// The batches of one stage.
pub struct Feed<'a> {
    data: &'a DataSet,
    template: &'a Template,
    stage: &'a StageConfig,
    usable: Vec<usize>,
    order: Order,
    seed: u64,
    pictures: bool,
    prompt_dropout: f64,
}

/// One batch and what it shows.
pub struct Fed {
    /// Its parts, on the device.
    pub parts: Vec<Batch>,
    /// The sequences it holds; none in the tokenizer stage.
    pub sequences: Vec<Vec<Part>>,
    /// Supervised text tokens.
    pub tokens: usize,
    /// Supervised codes.
    pub codes: usize,
    /// Rows that the language model reads.
    pub rows: usize,
}

impl<'a> Feed<'a> {
    /// Batches for a stage of the configuration; `number` is its place in the run.
    pub fn new(
        data: &'a DataSet,
        template: &'a Template,
        cfg: &'a StageConfig,
        stage: &Stage,
        train: &TrainConfig,
        number: usize,
    ) -> Result<Self> {
        let usable = data.usable(cfg.kind);
        let (name, all) = (cfg.kind.name(), data.images.len());
        if usable.is_empty() {
            let what = format!(
                "none of its {all} pictures has {}, which stage `{name}` learns from",
                wanted(cfg.kind)
            );
            return Err(Error::data(&data.root, what));
        }
        match cfg.kind {
            StageKind::Tokenizer => tracing::info!("stage {name}: {all} pictures"),
            kind => tracing::info!(
                "stage {name}: {} of {all} pictures can be used, those with {}",
                usable.len(),
                wanted(kind)
            ),
        }
        let long = |&i: &usize| -> Result<usize> {
            let texts = data.said(i).map(|s| texts(s, cfg)).unwrap_or_default();
            texts.into_iter().try_fold(0, |n, text| Ok(n + usize::from(template.is_cut(text)?)))
        };
        let long: usize = usable.par_iter().map(long).sum::<Result<_>>()?;
        if long > 0 {
            tracing::warn!(
                "stage {name}: {long} texts are longer than data.max_text_tokens = {} and are cut there",
                template.max_text_tokens()
            );
        }
        // Each stage has its own stream of random numbers.
        let seed = train.seed.wrapping_add((number as u64 + 1) << 32);
        let order = Order::new(usable.len(), seed)?;
        let pictures = stage.recipe.tokenizer != TokenizerMode::Off;
        let prompt_dropout = train.prompt_dropout;
        Ok(Feed { data, template, stage: cfg, usable, order, seed, pictures, prompt_dropout })
    }

    /// The sequence that sample `sample` shows as image `image` of its part.
    fn sequence(&self, sample: usize, image: usize, rng: &mut Philox) -> Result<Vec<Part>> {
        let s = &self.data.samples[sample];
        let qa = |rng: &mut Philox| &s.qa[rng.below(s.qa.len())];
        let StageConfig { kind, captions, answers, .. } = *self.stage;
        match (kind, &s.caption) {
            (StageKind::Align | StageKind::Semantic, Some(c)) => self.template.caption(image, c),
            (StageKind::Text, Some(c)) if s.qa.is_empty() || rng.below(2) == 0 => {
                self.template.text_caption(c)
            }
            (StageKind::Text, _) => {
                let (q, a) = qa(rng);
                self.template.text_chat(q, a)
            }
            (StageKind::Gen, caption) => match (rng.uniform(), caption) {
                (u, Some(c)) if u < captions => self.template.caption(image, c),
                (u, _) if u < captions + answers && !s.qa.is_empty() => {
                    let (q, a) = qa(rng);
                    self.template.chat(image, q, a)
                }
                _ => {
                    let kept = s.drawing_prompt().filter(|_| rng.uniform() >= self.prompt_dropout);
                    self.template.drawn(image, kept)
                }
            },
            (StageKind::Chat, Some(c)) if rng.uniform() < captions => self.template.caption(image, c),
            _ => {
                let (q, a) = qa(rng);
                self.template.chat(image, q, a)
            }
        }
    }

    /// The batch of step `step`.
    pub fn batch(&self, model: &Ett, step: usize) -> Result<Fed> {
        let mut fed = Fed { parts: Vec::new(), sequences: Vec::new(), tokens: 0, codes: 0, rows: 0 };
        let size = self.stage.batch / self.stage.accumulate;
        for part in 0..self.stage.accumulate {
            let first = step * self.stage.batch + part * size;
            let (batch, sequences) = self.part(model, first..first + size)?;
            if let Some(p) = &batch.packed {
                fed.tokens += p.tokens;
                fed.codes += p.code_rows.len();
                fed.rows += p.rows;
            }
            fed.sequences.extend(sequences);
            fed.parts.push(batch);
        }
        Ok(fed)
    }

    /// The samples at these positions of the stage.
    fn part(&self, model: &Ett, positions: Range<usize>) -> Result<(Batch, Vec<Vec<Part>>)> {
        let (mut images, mut sequences) = (Vec::new(), Vec::new());
        for (i, position) in positions.enumerate() {
            let place = self.order.index(position as u64);
            let mut rng = Philox::of(self.seed, Purpose::Augment, position as u32);
            let sample = match self.pictures {
                true => {
                    // A picture that is gone is replaced by another that the stage can learn from.
                    let (before, from) = self.usable.split_at(place);
                    let drawn = self.data.images.first(from.iter().chain(before).copied(), &mut rng)?;
                    images.push(drawn.image);
                    drawn.sample
                }
                false => self.data.images.sample(self.usable[place]).unwrap_or(0),
            };
            if self.stage.kind != StageKind::Tokenizer {
                let mut rng = Philox::of(self.seed, Purpose::Text, position as u32);
                sequences.push(self.sequence(sample, i, &mut rng)?);
            }
        }
        let (images, grids) = match self.pictures {
            true => {
                let (t, g) = images_to_device(model, &images)?;
                (vec![t], vec![g])
            }
            false => (vec![], vec![]),
        };
        let packed = match sequences.is_empty() {
            true => None,
            false => Some(Batch::pack(model, &sequences, &grids, PAD)?),
        };
        Ok((Batch { images, packed }, sequences))
    }
}
