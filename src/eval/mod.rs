//! Held-out results: reconstruction, captions, answers and drawn codes, compared with those of the same weights for
//! the picture or prompt of another sample.

mod ssim;

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use crate::autograd::Tape;
use crate::backend::Role;
use crate::config::StageKind;
use crate::data::{Drawn, Image, Philox, Skipped};
use crate::error::{Error, Result};
use crate::infer::{Seen, reconstruct};
use crate::model::{Ett, Part};
use crate::tensor::Tensor;
use crate::train::feed::{DataSet, images_to_device};
use crate::train::{Template, code_usage, interrupt};
pub use ssim::ssim;

/// Samples per forward pass.
const BATCH: usize = 64;
/// Maximum number of questions per picture.
const QUESTIONS: usize = 8;
/// Maximum number of reported question types, and how often a type has to be asked to be reported.
const TYPES: usize = 12;
const TYPE_ASKED: usize = 8;
/// Pictures in an evaluation during training.
const DURING: usize = 64;

/// A number measured with the sample's own picture (or prompt) and with that of another sample.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Pair {
    /// With its own.
    pub seen: f64,
    /// With that of another sample.
    pub other: f64,
}

/// Answers to one question, asked about many pictures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct QuestionType {
    /// The question.
    pub question: String,
    /// How often it was asked.
    pub asked: usize,
    /// Share answered exactly.
    pub accuracy: Pair,
    /// Share of the most frequent right answer.
    pub most_frequent: f64,
}

/// Cross-entropy of the codes of drawn pictures in nats per code, teacher-forced.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Codes {
    /// With the picture's own prompt and with that of another.
    pub loss: Pair,
    /// Entropy of the held-out codes, in nats: the lowest loss of a model that knows only the frequencies of the
    /// codes.
    pub unigram: f64,
}

/// Results on held-out samples, and the settings of the evaluation. Results that could not be measured are left out.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Source of the pictures.
    pub data: String,
    /// Number of pictures evaluated.
    pub pictures: usize,
    /// Pictures that were skipped because they cannot be used.
    pub skipped: Skipped,
    /// Side of the pictures, in pixels.
    pub size: usize,
    /// How pictures were resized, and how reconstructions were treated.
    pub resize: &'static str,
    /// The weights that made reconstructions and their codes: the weights themselves, or their averages if the run
    /// keeps them, as in IBQ's recipe. All other results come from the weights that were trained together.
    pub reconstructed_by: &'static str,
    /// Mean squared error of reconstructions, clamped, pixels in [-1, 1].
    pub mse: f64,
    /// The same for the mean of these pictures as the reconstruction.
    pub mse_mean_image: f64,
    /// Peak signal-to-noise ratio in dB, averaged over pictures.
    pub psnr: f64,
    /// Structural similarity, averaged over pictures.
    pub ssim: f64,
    /// Perceptual distance, averaged over pictures.
    pub perceptual: f64,
    /// The network that measured it.
    pub perceptual_by: String,
    /// Distinct codes used.
    pub codes_used: usize,
    /// Exponential of the entropy of the codes.
    pub code_perplexity: f64,
    /// Number of captions.
    pub captions: usize,
    /// Nats per caption token, including the end token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caption_loss: Option<Pair>,
    /// Number of questions.
    pub questions: usize,
    /// Share answered exactly, by greedy decoding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<Pair>,
    /// The same for questions whose answer is yes or no.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy_yes_no: Option<Pair>,
    /// The same for all other questions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy_open: Option<Pair>,
    /// The questions asked most often.
    pub types: Vec<QuestionType>,
    /// For models that draw, if there are prompts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub codes: Option<Codes>,
}

impl Report {
    /// Names and values for a table.
    pub fn rows(&self) -> Vec<(String, String)> {
        let mut rows = Vec::new();
        let mut row = |name: &str, value: String| rows.push((name.to_string(), value));
        let pair = |p: &Pair, other: &str| format!("{:.4}   {other}: {:.4}", p.seen, p.other);
        row(
            "held-out pictures",
            match self.skipped.count {
                0 => self.pictures.to_string(),
                n => format!("{} ({n} skipped: {})", self.pictures, self.skipped.names()),
            },
        );
        row("reconstructions by", self.reconstructed_by.into());
        match self.mse_mean_image > 0.0 {
            true => row("reconstruction MSE (share of the mean image's)", {
                format!("{:.5} ({:.3})", self.mse, self.mse / self.mse_mean_image)
            }),
            // All pictures are equal.
            false => row("reconstruction MSE", format!("{:.5}", self.mse)),
        }
        row("PSNR, SSIM", format!("{:.2} dB, {:.4}", self.psnr, self.ssim));
        row(&self.perceptual_by, format!("{:.4}", self.perceptual));
        row("codes used (perplexity)", format!("{} ({:.1})", self.codes_used, self.code_perplexity));
        for (name, measured) in [
            ("caption loss, nats per token", &self.caption_loss),
            ("answers exactly right", &self.accuracy),
            ("  yes or no", &self.accuracy_yes_no),
            ("  all others", &self.accuracy_open),
        ] {
            if let Some(p) = measured {
                row(name, pair(p, "another picture"));
            }
        }
        for t in &self.types {
            let most =
                format!("{}   most frequent: {:.4}", pair(&t.accuracy, "another picture"), t.most_frequent);
            row(&format!("  \"{}\"", t.question), most);
        }
        if let Some(c) = &self.codes {
            let value = format!("{}   unigram: {:.4}", pair(&c.loss, "another prompt"), c.unigram);
            row("code loss, nats per code", value);
        }
        rows
    }
}

/// Fails unless `n` pictures can be evaluated: each is compared with another one, so there must be at least two.
pub fn check(test: &DataSet, n: usize) -> Result<()> {
    if n < 2 {
        let want = "2 or more, since pictures are compared with one another, or no held-out pictures";
        return Err(Error::config("data.eval_samples", n, want));
    }
    match test.images.len() {
        n @ 0..2 => {
            let what = format!(
                "holds {n} of the 2 pictures that an evaluation needs at least; add some, or name no held-out pictures"
            );
            Err(Error::data(&test.root, what))
        }
        _ => Ok(()),
    }
}

/// The first `n` usable held-out pictures, or all of them.
pub fn held_out(test: &DataSet, n: usize) -> Result<Vec<Drawn>> {
    check(test, n)?;
    let drawn = test.images.take(n, &mut Philox::new(0, 0))?;
    match drawn.len() {
        0 | 1 => Err(Error::data(
            &test.root,
            "has fewer than two usable pictures, wanted 2 or more to evaluate on",
        )),
        _ => Ok(drawn),
    }
}

/// Evaluates on held-out pictures, see [`held_out`].
pub fn evaluate(model: &mut Ett, test: &DataSet, template: &Template, drawn: &[Drawn]) -> Result<Report> {
    let reconstructed_by = if has_averages(model) { "averages of the weights" } else { "the weights" };
    let pixels = with_averages(model, |model| Pixels::new(model, drawn))?;
    let model = &*model;
    interrupt::check()?;
    let seen = Language::new(model, test, template, drawn, 0)?;
    interrupt::check()?;
    let other = Language::new(model, test, template, drawn, drawn.len() / 2)?;
    interrupt::check()?;
    let pair = |f: &dyn Fn(&Language) -> Option<f64>| Some(Pair { seen: f(&seen)?, other: f(&other)? });
    let score = |f: fn(&Asked) -> bool| pair(&|l| share(l.asked.iter().filter(|a| f(a))));
    Ok(Report {
        data: test.root.display().to_string(),
        pictures: drawn.len(),
        skipped: test.images.skipped(),
        size: model.cfg.data.size,
        reconstructed_by,
        resize: "shorter side by antialiased bicubic, centre crop; reconstructions clamped to [-1, 1]",
        mse: pixels.mse,
        mse_mean_image: mean_image_error(drawn),
        psnr: pixels.psnr,
        ssim: pixels.ssim,
        perceptual: pixels.perceptual,
        perceptual_by: match &model.cfg.lpips.weights {
            Some(path) => format!("LPIPS ({})", path.display()),
            None => "distance of random VGG16 features".into(),
        },
        codes_used: pixels.codes_used,
        code_perplexity: pixels.perplexity,
        captions: seen.captions,
        caption_loss: pair(&Language::loss),
        questions: seen.asked.len(),
        accuracy: score(|_| true),
        accuracy_yes_no: score(Asked::yes_no),
        accuracy_open: score(|a| !a.yes_no()),
        types: question_types(&seen.asked, &other.asked),
        codes: match model.visual_head {
            Some(_) => codes(model, test, template, drawn, &pixels.counts)?,
            None => None,
        },
    })
}

fn has_averages(model: &Ett) -> bool {
    (0..model.params.groups().len()).any(|g| model.params.ema(g).is_some())
}

/// Calls `f` with the averages in place of the weights, if they are kept. Afterwards the weights are restored bit for
/// bit.
pub fn with_averages<T>(model: &mut Ett, f: impl FnOnce(&Ett) -> Result<T>) -> Result<T> {
    if !has_averages(model) {
        return f(model);
    }
    model.params.swap_averages()?;
    let result = f(model);
    model.params.swap_averages()?;
    result
}

/// A short evaluation during a stage, restricted to what the stage trains.
pub fn during(
    model: &mut Ett,
    test: &DataSet,
    template: &Template,
    kind: StageKind,
) -> Result<BTreeMap<&'static str, f64>> {
    let drawn = held_out(test, DURING)?;
    let mut all = BTreeMap::new();
    if matches!(kind, StageKind::Tokenizer | StageKind::Semantic) {
        let p = with_averages(model, |model| Pixels::new(model, &drawn))?;
        all.extend([("mse", p.mse), ("ssim", p.ssim)]);
    }
    let mut add = |name, value: Option<f64>| all.extend(value.map(|v| (name, v)));
    match kind {
        StageKind::Tokenizer => {}
        StageKind::Gen => add("code", mean(code_nats(model, test, template, &drawn, 0)?)),
        StageKind::Text => {
            let mut said = Vec::new();
            for d in &drawn {
                said.extend(test.samples[d.sample].caption.iter().map(|c| template.text_caption(c)));
            }
            add("cap", mean(Seen::nothing(model)?.nats(&said.into_iter().collect::<Result<Vec<_>>>()?)?));
        }
        StageKind::Align | StageKind::Semantic | StageKind::Chat => {
            let l = Language::new(model, test, template, &drawn, 0)?;
            add("cap", l.loss());
            if kind == StageKind::Chat {
                add("answers", share(l.asked.iter()));
            }
        }
    }
    Ok(all)
}

/// The mean for a sum and its number of terms; `None` without terms.
fn mean((sum, n): (f64, usize)) -> Option<f64> {
    (n > 0).then(|| sum / n as f64)
}

/// Fails if the run was interrupted, except before the first batch. An evaluation during training is a single batch,
/// so it always completes.
fn go_on(done: usize) -> Result<()> {
    if done > 0 { interrupt::check() } else { Ok(()) }
}

/// Mean squared error of the mean image as the reconstruction of each of these pictures.
fn mean_image_error(drawn: &[Drawn]) -> f64 {
    let n = drawn.len() as f64;
    let mut mean = vec![0.0; drawn.first().map_or(0, |d| d.image.pixels.len())];
    for d in drawn {
        mean.iter_mut().zip(&d.image.pixels).for_each(|(m, &v)| *m += v as f64);
    }
    // Because the division comes last, the mean of equal pictures equals them exactly.
    mean.iter_mut().for_each(|m| *m /= n);
    drawn.iter().map(|d| squared_error(&d.image, mean.iter().copied()) / n).sum()
}

/// Quality of reconstructions.
struct Pixels {
    mse: f64,
    psnr: f64,
    ssim: f64,
    perceptual: f64,
    counts: HashMap<i32, usize>,
    codes_used: usize,
    perplexity: f64,
}

impl Pixels {
    fn new(model: &Ett, drawn: &[Drawn]) -> Result<Self> {
        let n = drawn.len() as f64;
        let (mut mse, mut ratio, mut similar, mut perceptual) = (0.0, 0.0, 0.0, 0.0);
        let mut counts = HashMap::<i32, usize>::new();
        for (i, chunk) in drawn.chunks(BATCH).enumerate() {
            go_on(i)?;
            let images: Vec<Image> = chunk.iter().map(|d| d.image.clone()).collect();
            let (rec, idx) = reconstruct(model, &images)?;
            perceptual += distance(model, &images, &rec)? / n;
            for (a, b) in images.iter().zip(&rec) {
                let error = squared_error(a, b.pixels.iter().map(|&v| v as f64));
                mse += error / n;
                ratio += decibels(error) / n;
                similar += ssim(a, b)? / n;
            }
            idx.iter().for_each(|&i| *counts.entry(i).or_default() += 1);
        }
        let (codes_used, perplexity) = code_usage(counts.values().copied());
        Ok(Pixels { mse, psnr: ratio, ssim: similar, perceptual, counts, codes_used, perplexity })
    }
}

/// The model's perceptual distance, summed over pictures.
fn distance(model: &Ett, a: &[Image], b: &[Image]) -> Result<f64> {
    let t = Tape::inference(model.params.device().clone(), model.params.precision());
    let (x, y) = (images_to_device(model, a)?.0, images_to_device(model, b)?.0);
    let one = Tensor::from_f64(t.dev(), Role::Input, model.params.precision().acc, &[1.0], [1])?;
    let terms = model.lpips.distance(&t, &model.params, &t.constant(x), &t.constant(y), &one)?;
    let mut sum = 0.0;
    for v in terms {
        sum += v.value().to_f64(t.dev())?[0];
    }
    Ok(sum)
}

/// Peak signal-to-noise ratio in dB of a mean squared error, for values in [-1, 1].
fn decibels(error: f64) -> f64 {
    10.0 * (4.0 / error.max(1e-12)).log10()
}

/// Peak signal-to-noise ratio of two pictures of equal size, in dB.
pub fn psnr(a: &Image, b: &Image) -> f64 {
    decibels(squared_error(a, b.pixels.iter().map(|&v| v as f64)))
}

fn squared_error(a: &Image, b: impl Iterator<Item = f64>) -> f64 {
    a.pixels.iter().zip(b).map(|(&x, y)| (x as f64 - y).powi(2)).sum::<f64>() / a.pixels.len() as f64
}

/// A question, its answer, and whether the model answered it right.
struct Asked {
    question: String,
    answer: String,
    right: bool,
}

impl Asked {
    fn yes_no(&self) -> bool {
        self.answer == "yes" || self.answer == "no"
    }
}

/// The share of right answers; `None` without questions.
fn share<'a>(asked: impl Iterator<Item = &'a Asked>) -> Option<f64> {
    let (mut n, mut right) = (0usize, 0usize);
    for a in asked {
        (n, right) = (n + 1, right + usize::from(a.right));
    }
    mean((right as f64, n))
}

/// Both lists must hold the same questions in the same order.
fn question_types(seen: &[Asked], other: &[Asked]) -> Vec<QuestionType> {
    let mut by_text = BTreeMap::<&str, Vec<usize>>::new();
    for (i, a) in seen.iter().enumerate().filter(|(_, a)| !a.yes_no()) {
        by_text.entry(&a.question).or_default().push(i);
    }
    let mut all: Vec<(&str, Vec<usize>)> =
        by_text.into_iter().filter(|(_, places)| places.len() >= TYPE_ASKED).collect();
    all.sort_by_key(|(_, places)| std::cmp::Reverse(places.len()));
    all.truncate(TYPES);
    all.into_iter()
        .filter_map(|(question, places)| {
            let mut answers = HashMap::<&str, usize>::new();
            places.iter().for_each(|&i| *answers.entry(&seen[i].answer).or_default() += 1);
            let most = answers.values().copied().max().unwrap_or(0);
            let of = |list: &[Asked]| share(places.iter().filter_map(|&i| list.get(i)));
            Some(QuestionType {
                question: question.into(),
                asked: places.len(),
                accuracy: Pair { seen: of(seen)?, other: of(other)? },
                most_frequent: most as f64 / places.len() as f64,
            })
        })
        .collect()
}

/// Captions and answers of samples, each given the picture `shift` samples ahead.
#[derive(Default)]
struct Language {
    captions: usize,
    tokens: usize,
    nats: f64,
    asked: Vec<Asked>,
}

impl Language {
    /// Nats per caption token.
    fn loss(&self) -> Option<f64> {
        mean((self.nats, self.tokens))
    }

    fn new(model: &Ett, test: &DataSet, template: &Template, drawn: &[Drawn], shift: usize) -> Result<Self> {
        let n = drawn.len();
        let mut all = Language::default();
        for start in (0..n).step_by(BATCH) {
            go_on(start)?;
            let here = start..(start + BATCH).min(n);
            let images: Vec<Image> = here.clone().map(|i| drawn[(i + shift) % n].image.clone()).collect();
            let seen = Seen::new(model, &images)?;
            let (mut said, mut chats, mut asked) = (Vec::new(), Vec::new(), Vec::new());
            for (k, i) in here.enumerate() {
                let s = &test.samples[drawn[i].sample];
                if let Some(c) = &s.caption {
                    said.push(template.caption(k, c)?);
                }
                for (q, a) in s.qa.iter().take(QUESTIONS) {
                    chats.push(template.chat(k, q, a)?);
                    asked.push(Asked { question: q.clone(), answer: a.clone(), right: false });
                }
            }
            let (nats, tokens) = seen.nats(&said)?;
            (all.nats, all.tokens, all.captions) =
                (all.nats + nats, all.tokens + tokens, all.captions + said.len());
            for (asked, right) in asked.iter_mut().zip(seen.exact(&chats)?) {
                asked.right = right;
            }
            all.asked.extend(asked);
        }
        Ok(all)
    }
}

fn codes(
    model: &Ett,
    test: &DataSet,
    template: &Template,
    drawn: &[Drawn],
    counts: &HashMap<i32, usize>,
) -> Result<Option<Codes>> {
    let loss = |shift| -> Result<(f64, usize)> { code_nats(model, test, template, drawn, shift) };
    let (seen, other) = (mean(loss(0)?), mean(loss(drawn.len() / 2)?));
    let (_, perplexity) = code_usage(counts.values().copied());
    let loss = seen.zip(other).map(|(seen, other)| Pair { seen, other });
    Ok(loss.map(|loss| Codes { loss, unigram: perplexity.ln() }))
}

/// Nats of the codes of pictures, each given the prompt of the sample `shift` samples ahead, and their number.
fn code_nats(
    model: &Ett,
    test: &DataSet,
    template: &Template,
    drawn: &[Drawn],
    shift: usize,
) -> Result<(f64, usize)> {
    let n = drawn.len();
    let (mut nats, mut count) = (0.0, 0);
    for start in (0..n).step_by(BATCH) {
        go_on(start)?;
        let here = start..(start + BATCH).min(n);
        let images: Vec<Image> = here.clone().map(|i| drawn[i].image.clone()).collect();
        let mut sequences: Vec<Vec<Part>> = Vec::new();
        for (k, i) in here.enumerate() {
            if let Some(p) = test.samples[drawn[(i + shift) % n].sample].drawing_prompt() {
                sequences.push(template.drawn(k, Some(p))?);
            }
        }
        let (more, codes) = Seen::new(model, &images)?.code_nats(&sequences)?;
        (nats, count) = (nats + more, count + codes);
    }
    Ok((nats, count))
}
