//! What a source of data holds, and what a model will see of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

use super::plots::labelled_grid;
use crate::config::DataConfig;
use crate::data::{Image, Sample, Skipped, Split};
use crate::error::Result;
use crate::feed::{DataSet, Template};
use crate::rng::Philox;
use crate::terminal::one_line;

/// Samples whose texts are counted in tokens, spread over the data.
const COUNTED: usize = 10_000;
/// Pixels of a row of the picture, and how many pictures it has at most.
const ROW: usize = 2400;
const COLUMNS: usize = 8;
/// Sequences of a sample that are shown.
const SHOWN: usize = 4;

/// A look at a source of data.
pub struct Survey {
    /// Names and values, for a table.
    pub rows: Vec<(String, String)>,
    /// The first samples.
    pub first: Vec<First>,
    /// Entries that are not part of the data, and pictures that cannot be used, with the reasons.
    pub skipped: Skipped,
}

/// One of the first samples, as a model sees it.
pub struct First {
    /// Its name.
    pub name: PathBuf,
    /// Its picture at training size.
    pub image: Option<Image>,
    /// The sequences that stages make of it, with the stage's purpose; supervised parts are in `[[ ]]`.
    pub sequences: Vec<(&'static str, String)>,
}

impl Survey {
    /// Looks at a part of the data of a configuration; the first `n` samples are decoded, for a tokenizer that makes one
    /// token of `side` x `side` pixels.
    pub fn new(cfg: &DataConfig, split: Split, template: &Template, side: usize, n: usize) -> Result<Self> {
        let listed = DataSet::required(cfg, split)?;
        let (mut ignored, mut about) = (Skipped::default(), Vec::new());
        for (one, _) in &listed {
            ignored.join(one.ignored.clone());
            about.extend(one.about.iter().cloned());
        }
        let data = DataSet::of(listed, cfg.options(split, side))?;
        let mut rows = counts(&data.samples);
        if data.shares.len() > 1 {
            let sum: f64 = data.shares.iter().map(|s| s.weight).sum();
            rows.extend(data.shares.iter().map(|s| {
                let text = format!("{} samples, {:.1} % of a batch", s.samples.len(), 100.0 * s.weight / sum);
                (s.root.display().to_string(), text)
            }));
        }
        rows.push(("ignored entries".into(), ignored.count.to_string()));
        rows.extend(tokens(&data.samples, template)?);
        rows.extend(about);
        let first = first(&data, template, n)?;
        rows.extend(sizes(&first));
        let unusable = data.images.skipped();
        rows.push(("pictures found unusable so far".into(), unusable.count.to_string()));
        ignored.join(unusable);
        Ok(Survey { rows, first, skipped: ignored })
    }

    /// The survey as text: the table, and what a model will see of the first samples.
    pub fn text(&self) -> String {
        let width = self.rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        let mut out = String::new();
        // Writing to a String cannot fail.
        for (name, value) in &self.rows {
            let _ = writeln!(out, "  {name:<width$}  {value}");
        }
        if self.skipped.count > 0 {
            let _ = writeln!(out, "  not used: {}", self.skipped.names());
        }
        for (i, first) in self.first.iter().enumerate() {
            let size = match &first.image {
                Some(image) => format!("{} x {}", image.height, image.width),
                None => "no picture".into(),
            };
            let _ = writeln!(out, "\n{} {} ({size})", i + 1, first.name.display());
            for (what, sequence) in &first.sequences {
                let _ = writeln!(out, "  {what}: {}", one_line(sequence));
            }
        }
        out
    }

    /// Writes the pictures of the first samples with their numbers; returns how many there are.
    pub fn draw(&self, out: &Path) -> Result<usize> {
        let pictured: Vec<(Image, String)> = self
            .first
            .iter()
            .enumerate()
            .filter_map(|(i, f)| Some((f.image.clone()?, (i + 1).to_string())))
            .collect();
        let widest = pictured.iter().map(|(image, _)| image.width).max().unwrap_or(1);
        let columns = (ROW / widest).clamp(1, COLUMNS);
        let rows: Vec<Vec<(Image, String)>> = pictured.chunks(columns).map(<[_]>::to_vec).collect();
        if !rows.is_empty() {
            labelled_grid(&rows, out)?;
        }
        Ok(pictured.len())
    }
}

fn counts(samples: &[Sample]) -> Vec<(String, String)> {
    let with = |f: &dyn Fn(&Sample) -> bool| samples.iter().filter(|s| f(s)).count();
    let pictured = with(&|s| s.has_picture());
    let captions: usize = samples.iter().map(|s| s.captions.len()).sum();
    let chats: usize = samples.iter().map(|s| s.chats.len()).sum();
    let turns: usize = samples.iter().map(|s| s.turns().count()).sum();
    let in_samples = |n: usize, of: usize| format!("{n} in {of} samples");
    let mut rows = vec![
        ("samples", samples.len().to_string()),
        ("with a picture", pictured.to_string()),
        ("captions", in_samples(captions, with(&|s| !s.captions.is_empty()))),
        ("drawing prompts", in_samples(with(&|s| s.prompt.is_some()), with(&|s| s.prompt.is_some()))),
        ("conversations", in_samples(chats, with(&|s| !s.chats.is_empty()))),
        ("questions with answers", turns.to_string()),
    ];
    if captions > 0 {
        let different: BTreeSet<&str> =
            samples.iter().flat_map(|s| &s.captions).map(String::as_str).collect();
        rows.push(("different captions", different.len().to_string()));
    }
    rows.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
}

/// Mean and maximum of the numbers of tokens, and how many texts are cut.
fn tokens(samples: &[Sample], template: &Template) -> Result<Vec<(String, String)>> {
    let counted = samples.len().min(COUNTED);
    let (mut captions, mut chats, mut cut) = (Vec::new(), Vec::new(), 0);
    for i in 0..counted {
        let s = &samples[i * samples.len() / counted];
        for text in &s.captions {
            captions.push(template.tokenizer().encode(text)?.len());
            cut += usize::from(template.is_cut(text)?);
        }
        for chat in &s.chats {
            let mut n = 0;
            for (q, a) in &chat.turns {
                n += template.tokenizer().encode(q)?.len() + template.tokenizer().encode(a)?.len();
                cut += usize::from(template.is_cut(q)?) + usize::from(template.is_cut(a)?);
            }
            cut += usize::from(template.loses_turns(chat)?);
            chats.push(n);
        }
    }
    let row = |name: &str, all: &[usize]| {
        let mean = all.iter().sum::<usize>() as f64 / all.len() as f64;
        let most = all.iter().max().copied().unwrap_or(0);
        (name.to_string(), format!("{mean:.1} on average, {most} at most"))
    };
    let mut rows = Vec::new();
    if !captions.is_empty() {
        rows.push(row("tokens of a caption", &captions));
    }
    if !chats.is_empty() {
        rows.push(row("tokens of a conversation", &chats));
    }
    let limit = template.max_text_tokens();
    rows.push((format!("texts cut at {limit} tokens"), format!("{cut} in {counted} samples")));
    Ok(rows)
}

/// How often each size occurs among the first samples.
fn sizes(first: &[First]) -> Option<(String, String)> {
    let mut all = BTreeMap::<(usize, usize), usize>::new();
    for image in first.iter().filter_map(|f| f.image.as_ref()) {
        *all.entry((image.height, image.width)).or_default() += 1;
    }
    let text: Vec<String> = all.iter().map(|((h, w), n)| format!("{n} of {h} x {w}")).collect();
    (!text.is_empty()).then(|| ("pictures below, height x width".into(), text.join(", ")))
}

fn first(data: &DataSet, template: &Template, n: usize) -> Result<Vec<First>> {
    let mut all = Vec::new();
    for (i, s) in data.samples.iter().enumerate() {
        if all.len() >= n {
            break;
        }
        let mut rng = Philox::new(0, i as u64);
        let image = match s.has_picture() {
            // One that cannot be used is among those that are skipped.
            true => match data.images.one(i, &mut rng)? {
                Some(bitmap) => Some(Image::from(&bitmap)),
                None => continue,
            },
            false => None,
        };
        all.push(First { name: s.image.clone(), sequences: sequences(s, image.is_some(), template)?, image });
    }
    Ok(all)
}

/// The sequences that stages make of a sample.
fn sequences(s: &Sample, pictured: bool, template: &Template) -> Result<Vec<(&'static str, String)>> {
    let mut all = Vec::new();
    for caption in s.captions.iter().take(SHOWN) {
        let parts = if pictured { template.caption(0, caption)? } else { template.text_caption(caption)? };
        all.push(("caption", template.show(&parts)));
    }
    for chat in s.chats.iter().take(SHOWN) {
        let parts = if pictured { template.chat(0, chat)? } else { template.text_chat(chat)? };
        all.push(("conversation", template.show(&parts)));
    }
    if let Some(prompt) = s.drawing_prompt().filter(|_| pictured) {
        all.push(("drawing", template.show(&template.drawn(0, Some(prompt))?)));
    }
    Ok(all)
}
