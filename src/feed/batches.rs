//! The batches of a stage: pictures and their sequences, determined by the seed and the step.

use std::ops::Range;

use rayon::prelude::*;

use super::data_set::{texts, wanted};
use super::{HostBatch, HostPart, PAD, Template};
use crate::config::{Config, StageConfig, StageKind};
use crate::data::{DataSet, Order};
use crate::error::{Error, Result};
use crate::model::{Part, Sizes};
use crate::rng::{Philox, Purpose};

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
    /// The factor by which the tokenizer reduces a side of a picture.
    side: usize,
    /// Visual tokens of a picture.
    tokens: usize,
    /// The sizes of all parts of batches.
    sizes: Option<Sizes>,
}

impl<'a> Feed<'a> {
    /// Batches for stage `number` of the configuration, with or without pictures. With `same_sizes`, nearly all of
    /// them have the same sizes. Fails if the stage cannot use any picture of the data.
    pub fn new(
        all: &'a Config,
        number: usize,
        data: &'a DataSet,
        template: &'a Template,
        pictures: bool,
        same_sizes: bool,
    ) -> Result<Self> {
        let Some(cfg) = all.stage.get(number) else {
            return Err(Error::config("stage", format!("number {number}"), "a stage of the configuration"));
        };
        let usable = data.usable(cfg.kind);
        let (name, pictured) = (cfg.kind.name(), data.images.len());
        if usable.is_empty() {
            let what = format!(
                "none of its {pictured} pictures has {}, which stage `{name}` trains on",
                wanted(cfg.kind)
            );
            return Err(Error::data(&data.root, what));
        }
        match cfg.kind {
            StageKind::Tokenizer => tracing::info!("stage {name}: {pictured} pictures"),
            kind => tracing::info!(
                "stage {name}: {} of {pictured} pictures can be used, those with {}",
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
        let seed = all.train.seed.wrapping_add((number as u64 + 1) << 32);
        let order = Order::new(usable.len(), seed)?;
        let prompt_dropout = all.train.prompt_dropout;
        let side = all.tokenizer.downsampling();
        let tokens = if pictures { (all.data_of(cfg).size / side).pow(2) } else { 0 };
        let mut feed = Feed {
            data,
            template,
            stage: cfg,
            usable,
            order,
            seed,
            pictures,
            prompt_dropout,
            side,
            tokens,
            sizes: None,
        };
        if same_sizes && cfg.kind != StageKind::Tokenizer {
            feed.sizes = Some(feed.common_sizes()?);
        }
        Ok(feed)
    }

    /// Sizes into which all parts of batches fit, except for rare ones if lengths vary much: 4 standard deviations above
    /// the mean, but at most what the longest sequences need.
    fn common_sizes(&self) -> Result<Sizes> {
        let longest = |&place: &usize| -> Result<[usize; 2]> {
            let sample = self.data.images.sample(place).unwrap_or(0);
            let all = self.sequences(sample, 0)?;
            let most = |of: &dyn Fn(&Part) -> usize| {
                all.iter().map(|parts| parts.iter().map(of).sum()).max().unwrap_or(0)
            };
            let rows = most(&|part| match part {
                Part::Tokens { ids, .. } => ids.len(),
                Part::Image(_) | Part::Codes(_) => self.tokens,
            });
            let targets = most(&|part| match part {
                Part::Tokens { ids, supervised: true } => ids.len(),
                _ => 0,
            });
            Ok([rows, targets])
        };
        let lengths = self.usable.par_iter().map(longest).collect::<Result<Vec<_>>>()?;
        let parts = self.stage.batch / self.stage.accumulate;
        let bound = |i: usize| {
            let (n, m) = (lengths.len() as f64, parts as f64);
            let mean = lengths.iter().map(|l| l[i] as f64).sum::<f64>() / n;
            let variance = lengths.iter().map(|l| (l[i] as f64 - mean).powi(2)).sum::<f64>() / n;
            let most = lengths.iter().map(|l| l[i]).max().unwrap_or(0);
            let likely = (m * mean + 4.0 * (m * variance).sqrt()).ceil() as usize;
            likely.min(parts * most).next_multiple_of(PAD)
        };
        Ok(Sizes {
            rows: bound(0),
            sequences: parts,
            longest: lengths.iter().map(|l| l[0]).max().unwrap_or(0),
            targets: bound(1),
            codes: if self.stage.kind == StageKind::Gen { parts * self.tokens } else { 0 },
        })
    }

    /// All sequences that the stage may make of a sample.
    fn sequences(&self, sample: usize, image: usize) -> Result<Vec<Vec<Part>>> {
        let (s, t) = (&self.data.samples[sample], self.template);
        let StageConfig { kind, captions, answers, .. } = *self.stage;
        let mut all = Vec::new();
        let (caption, asks, draws) = match kind {
            StageKind::Tokenizer => (false, false, false),
            StageKind::Align | StageKind::Semantic => (true, false, false),
            StageKind::Text => (true, true, false),
            StageKind::Chat => (captions > 0.0, true, false),
            StageKind::Gen => (captions > 0.0, answers > 0.0, true),
        };
        let text = kind == StageKind::Text;
        if let Some(c) = s.caption.as_ref().filter(|_| caption) {
            all.push(if text { t.text_caption(c)? } else { t.caption(image, c)? });
        }
        for (q, a) in s.qa.iter().filter(|_| asks) {
            all.push(if text { t.text_chat(q, a)? } else { t.chat(image, q, a)? });
        }
        if draws {
            all.push(t.drawn(image, s.drawing_prompt())?);
        }
        Ok(all)
    }

    /// The sequence of sample `sample`; its picture is image `image` of its part of the batch.
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
    pub fn batch(&self, step: usize) -> Result<HostBatch> {
        let size = self.stage.batch / self.stage.accumulate;
        let (mut parts, mut all) = (Vec::new(), Vec::new());
        for part in 0..self.stage.accumulate {
            let start = step * self.stage.batch + part * size;
            let (part, sequences) = self.part(start..start + size)?;
            parts.push(part);
            all.extend(sequences);
        }
        Ok(HostBatch::new(parts, all))
    }

    /// The part of a batch with the samples at these positions of the stage, and its sequences.
    fn part(&self, positions: Range<usize>) -> Result<(HostPart, Vec<Vec<Part>>)> {
        let (mut images, mut sequences) = (Vec::new(), Vec::new());
        for (i, position) in positions.enumerate() {
            let place = self.order.index(position as u64);
            let mut rng = Philox::of(self.seed, Purpose::Augment, position as u32);
            let sample = match self.pictures {
                true => {
                    // A picture that can no longer be read is replaced by the next one that the stage can use.
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
        Ok((HostPart::new(&images, &sequences, self.side, self.sizes)?, sequences))
    }
}
