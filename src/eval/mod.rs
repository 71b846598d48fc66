//! Held-out results: reconstruction, captions, answers and drawn codes, compared with those of the same weights for
//! the picture or prompt of another sample.

mod closing;
mod ssim;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use crate::autograd::Tape;
use crate::backend::Role;
use crate::config::StageKind;
use crate::data::{Drawn, Image, Source};
use crate::error::{Error, Result};
use crate::feed::{DataSet, Template, images_to_device};
use crate::infer::{Seen, Trained, reconstruct};
use crate::interrupt;
use crate::model::{Ett, Part};
use crate::report::{Codes, Evaluation, Pair, QuestionType, Report, code_usage};
use crate::rng::Philox;
use crate::tensor::Tensor;
pub use closing::closing;
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

/// The evaluation of this module, for use by a run.
pub struct HeldOut;

impl Evaluation for HeldOut {
    fn check(&self, test: &DataSet, samples: usize) -> Result<()> {
        check(test, samples)
    }

    fn during(
        &self,
        model: &mut Ett,
        test: &DataSet,
        template: &Template,
        stage: StageKind,
    ) -> Result<BTreeMap<&'static str, f64>> {
        during(model, test, template, stage)
    }

    fn closing(&self, model: &mut Ett, test: &DataSet, template: &Template, out: &Path) -> Result<Report> {
        closing(model, test, template, out)
    }
}

/// Evaluates a finished run on the first `samples` pictures of `data`, which any source can read, or of the run's own held-out set,
/// and writes results and pictures into `out`; see [`closing`].
pub fn evaluate_run(
    trained: &mut Trained,
    data: Option<&Path>,
    samples: Option<usize>,
    out: &Path,
) -> Result<Report> {
    let cfg = &mut trained.model.cfg.data;
    if let Some(folder) = data {
        (cfg.source, cfg.test, cfg.test_images) = (Source::guess(folder)?, Some(folder.into()), None);
        (cfg.images, cfg.mix) = (None, Vec::new());
    }
    cfg.eval_samples = samples.unwrap_or(cfg.eval_samples);
    let test = DataSet::test(cfg)?.ok_or_else(|| {
        Error::config("data.test", "empty", "held-out pictures in the run's configuration, or --data FOLDER")
    })?;
    trained.keep_averages()?;
    std::fs::create_dir_all(out).map_err(Error::io(out))?;
    closing(&mut trained.model, &test, &trained.template, out)
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

/// Evaluates a model on these pictures of the held-out set, as returned by [`held_out`].
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
        // The closing evaluation draws; this one only measures.
        drawings: vec![],
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

/// A short evaluation during a stage, restricted to the abilities that the stage trains.
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
                said.extend(test.samples[d.sample].caption().map(|c| template.text_caption(c)));
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
    counts: BTreeMap<i32, usize>,
    codes_used: usize,
    perplexity: f64,
}

impl Pixels {
    fn new(model: &Ett, drawn: &[Drawn]) -> Result<Self> {
        let n = drawn.len() as f64;
        let (mut mse, mut ratio, mut similar, mut perceptual) = (0.0, 0.0, 0.0, 0.0);
        let mut counts = BTreeMap::<i32, usize>::new();
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
                if let Some(c) = s.caption() {
                    said.push(template.caption(k, c)?);
                }
                for mut chat in s.openings().take(QUESTIONS) {
                    chats.push(template.chat(k, &chat)?);
                    let (question, answer) = chat.turns.remove(0);
                    asked.push(Asked { question, answer, right: false });
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
    counts: &BTreeMap<i32, usize>,
) -> Result<Option<Codes>> {
    let loss = |shift| -> Result<(f64, usize)> { code_nats(model, test, template, drawn, shift) };
    let (seen, other) = (mean(loss(0)?), mean(loss(drawn.len() / 2)?));
    let (_, perplexity) = code_usage(counts.values().copied());
    let loss = seen.zip(other).map(|(seen, other)| Pair { seen, other });
    Ok(loss.map(|loss| Codes { loss, unigram: perplexity.ln() }))
}

/// Total nats of the codes of pictures and the number of codes; each picture is given the prompt of the sample `shift`
/// samples ahead.
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
