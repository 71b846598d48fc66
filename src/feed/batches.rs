//! The batches of a stage: pictures and their sequences, determined by the seed and the step.

use std::ops::Range;

use rayon::prelude::*;

use super::data_set::{texts, wanted};
use super::{Batch, PAD, Template, images_to_device};
use crate::config::{StageConfig, StageKind, TrainConfig};
use crate::data::{DataSet, Order};
use crate::error::{Error, Result};
use crate::model::{Ett, Part};
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
}

/// One batch with its counts.
pub struct Fed {
    /// Its parts, on the device.
    pub parts: Vec<Batch>,
    /// Its sequences; none in the tokenizer stage.
    pub sequences: Vec<Vec<Part>>,
    /// Supervised text tokens.
    pub tokens: usize,
    /// Supervised codes.
    pub codes: usize,
    /// Rows of the language model's input.
    pub rows: usize,
}

impl<'a> Feed<'a> {
    /// Batches for a stage of the configuration, with or without pictures; `number` is its index in the run. Fails if
    /// the stage cannot use any picture of the data.
    pub fn new(
        data: &'a DataSet,
        template: &'a Template,
        cfg: &'a StageConfig,
        pictures: bool,
        train: &TrainConfig,
        number: usize,
    ) -> Result<Self> {
        let usable = data.usable(cfg.kind);
        let (name, all) = (cfg.kind.name(), data.images.len());
        if usable.is_empty() {
            let what = format!(
                "none of its {all} pictures has {}, which stage `{name}` trains on",
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
        let prompt_dropout = train.prompt_dropout;
        Ok(Feed { data, template, stage: cfg, usable, order, seed, pictures, prompt_dropout })
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

    /// The part of a batch with the samples at these positions of the stage.
    fn part(&self, model: &Ett, positions: Range<usize>) -> Result<(Batch, Vec<Vec<Part>>)> {
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
