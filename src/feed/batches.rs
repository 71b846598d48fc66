//! The batches of a stage: pictures and their sequences, determined by the seed and the step.

use std::ops::Range;

use rayon::prelude::*;

use super::data_set::{texts, wanted};
use super::{DataSet, HostBatch, HostPart, PAD, Template};
use crate::config::{Config, StageConfig, StageKind};
use crate::data::{Bitmap, Order};
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
    /// This rank and the number of ranks that share a batch.
    rank: (usize, usize),
}

/// Samples from which the sizes of batches are estimated.
const MEASURED: usize = 4096;

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
        let name = cfg.kind.name();
        let pictured = if cfg.kind == StageKind::Text { data.samples.len() } else { data.images.usable() };
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
            let s = &data.samples[i];
            let texts = texts(s, cfg).into_iter().map(|text| template.is_cut(text));
            let chats = s.chats.iter().map(|chat| template.loses_turns(chat));
            texts.chain(chats).try_fold(0, |n, cut| Ok(n + usize::from(cut?)))
        };
        let long: usize = usable.par_iter().map(long).sum::<Result<_>>()?;
        if long > 0 {
            tracing::warn!(
                "stage {name}: {long} texts and conversations are longer than data.max_text_tokens = {} and are cut",
                template.max_text_tokens()
            );
        }
        // Each stage has its own stream of random numbers.
        let seed = all.train.seed.wrapping_add((number as u64 + 1) << 32);
        let mut sources = Vec::new();
        for share in &data.shares {
            let n = usable.iter().filter(|i| share.samples.contains(i)).count();
            match n {
                0 => {
                    let what = format!("nothing here has {}, which stage `{name}` needs", wanted(cfg.kind));
                    tracing::warn!("{}: {what}; its weight goes to the others", share.root.display());
                }
                n => sources.push((n, share.weight)),
            }
        }
        let order = Order::mixture(&sources, seed)?;
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
            rank: (0, 1),
        };
        if same_sizes && cfg.kind != StageKind::Tokenizer {
            feed.sizes = Some(feed.common_sizes()?);
        }
        Ok(feed)
    }

    /// The batches of rank `rank` of `ranks`, each of which has an equal share of every part: batches are functions of
    /// the seed, the step and these two.
    pub fn of_rank(mut self, rank: usize, ranks: usize) -> Result<Self> {
        let size = self.stage.batch / self.stage.accumulate;
        if ranks == 0 || rank >= ranks || !size.is_multiple_of(ranks) {
            let want = format!("a multiple of the number of ranks, {ranks}, in each of its parts");
            return Err(Error::config("stage.batch", self.stage.batch, want));
        }
        self.rank = (rank, ranks);
        if ranks > 1 && self.sizes.is_some() {
            self.sizes = Some(self.common_sizes()?);
        }
        Ok(self)
    }

    /// Sizes into which all parts of batches fit, except for rare ones if lengths vary much: 4 standard deviations above
    /// the mean, but at most what the longest sequences need. Lengths are those of 4096 samples, if there are more.
    fn common_sizes(&self) -> Result<Sizes> {
        let longest = |&place: &usize| -> Result<[usize; 2]> {
            let all = self.sequences(place, 0)?;
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
        let every = self.usable.len().div_ceil(MEASURED).max(1);
        let lengths = self.usable.par_iter().step_by(every).map(longest).collect::<Result<Vec<_>>>()?;
        let parts = self.stage.batch / self.stage.accumulate / self.rank.1;
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
        for c in s.captions.iter().filter(|_| caption) {
            all.push(if text { t.text_caption(c)? } else { t.caption(image, c)? });
        }
        for chat in s.chats.iter().filter(|_| asks) {
            all.push(if text { t.text_chat(chat)? } else { t.chat(image, chat)? });
        }
        if draws {
            all.push(t.drawn(image, s.drawing_prompt())?);
        }
        Ok(all)
    }

    /// The sequence of sample `sample`; its picture is image `image` of its part of the batch.
    fn sequence(&self, sample: usize, image: usize, rng: &mut Philox) -> Result<Vec<Part>> {
        let (s, t) = (&self.data.samples[sample], self.template);
        let StageConfig { kind, captions, answers, .. } = *self.stage;
        let said = |rng: &mut Philox| one_of(&s.captions, rng).as_str();
        let about = |rng: &mut Philox| t.chat(image, one_of(&s.chats, rng));
        match kind {
            StageKind::Align | StageKind::Semantic => t.caption(image, said(rng)),
            StageKind::Text => {
                let caption = s.chats.is_empty() || !s.captions.is_empty() && rng.below(2) == 0;
                match caption {
                    true => t.text_caption(said(rng)),
                    false => t.text_chat(one_of(&s.chats, rng)),
                }
            }
            StageKind::Gen => match rng.uniform() {
                u if u < captions && !s.captions.is_empty() => t.caption(image, said(rng)),
                u if u < captions + answers && !s.chats.is_empty() => about(rng),
                _ => {
                    let kept = s.drawing_prompt().filter(|_| rng.uniform() >= self.prompt_dropout);
                    t.drawn(image, kept)
                }
            },
            StageKind::Chat if !s.captions.is_empty() && rng.uniform() < captions => {
                t.caption(image, said(rng))
            }
            StageKind::Tokenizer | StageKind::Chat => about(rng),
        }
    }

    /// The batch of step `step`.
    pub fn batch(&self, step: usize) -> Result<HostBatch> {
        let size = self.stage.batch / self.stage.accumulate;
        let (mut parts, mut all) = (Vec::new(), Vec::new());
        for part in 0..self.stage.accumulate {
            let (rank, ranks) = self.rank;
            let start = step * self.stage.batch + part * size + rank * (size / ranks);
            let (part, sequences) = self.part(start..start + size / ranks)?;
            parts.push(part);
            all.extend(sequences);
        }
        Ok(HostBatch::new(parts, all))
    }

    /// The part of a batch with the samples at these positions of the stage, and its sequences.
    fn part(&self, positions: Range<usize>) -> Result<(HostPart, Vec<Vec<Part>>)> {
        let (mut images, mut samples) = (Vec::new(), Vec::new());
        for position in positions {
            let place = self.order.index(position as u64);
            let sample = match self.pictures {
                true => {
                    let mut rng = Philox::of(self.seed, Purpose::Augment, position as u32);
                    // A picture that cannot be read is replaced by the next one of its source that the stage can use.
                    let (before, from) = self.usable.split_at(place);
                    let share = self.data.shares.iter().find(|s| s.samples.contains(&self.usable[place]));
                    let same = |i: &usize| share.is_none_or(|s| s.samples.contains(i));
                    let (sample, bitmap) =
                        self.data.images.first(from.iter().chain(before).copied().filter(same), &mut rng)?;
                    images.push(bitmap);
                    sample
                }
                false => self.usable[place],
            };
            samples.push((position, sample));
        }
        let (images, places) = by_size(images);
        let mut sequences = Vec::new();
        if self.stage.kind != StageKind::Tokenizer {
            for (i, (position, sample)) in samples.into_iter().enumerate() {
                let mut rng = Philox::of(self.seed, Purpose::Text, position as u32);
                sequences.push(self.sequence(sample, places.get(i).copied().unwrap_or(i), &mut rng)?);
            }
        }
        Ok((HostPart::new(images, &sequences, self.side, self.sizes)?, sequences))
    }
}

/// One of several; random numbers are drawn only if there is a choice.
fn one_of<'a, T>(all: &'a [T], rng: &mut Philox) -> &'a T {
    match all {
        [one] => one,
        all => &all[rng.below(all.len())],
    }
}

/// Pictures of equal size together, in the order in which the sizes first occur; and the place of each picture then.
fn by_size(images: Vec<Bitmap>) -> (Vec<Vec<Bitmap>>, Vec<usize>) {
    let mut sizes: Vec<(usize, usize)> = Vec::new();
    let of = |b: &Bitmap| (b.height, b.width);
    let groups: Vec<usize> = images
        .iter()
        .map(|b| {
            sizes.iter().position(|&s| s == of(b)).unwrap_or_else(|| {
                sizes.push(of(b));
                sizes.len() - 1
            })
        })
        .collect();
    let mut all: Vec<Vec<Bitmap>> = sizes.iter().map(|_| Vec::new()).collect();
    let inside: Vec<usize> = images
        .into_iter()
        .zip(&groups)
        .map(|(b, &group)| {
            all[group].push(b);
            all[group].len() - 1
        })
        .collect();
    let start = |group: usize| all[..group].iter().map(Vec::len).sum::<usize>();
    let places = groups.iter().zip(inside).map(|(&group, i)| start(group) + i).collect();
    (all, places)
}
