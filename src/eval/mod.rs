//! Held-out results: reconstruction, captions and answers, each against what the same weights say when shown
//! another picture.

mod ssim;

use std::collections::HashMap;
use std::path::Path;

use serde::Serialize;

use crate::data::{Drawn, Image, Philox, grid, save_png};
use crate::error::{Error, Result};
use crate::infer::{Seen, reconstruct};
use crate::model::Ett;
use crate::train::Template;
use crate::train::feed::DataSet;

pub use ssim::ssim;

/// Samples of one forward.
const BATCH: usize = 64;
/// Pictures drawn beside their reconstructions.
const SHOWN: usize = 16;
/// Questions asked about one picture.
const QUESTIONS: usize = 4;

/// A number with the model's own picture and with another test picture.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Pair {
    /// Shown the picture the text belongs to.
    pub seen: f64,
    /// Shown another.
    pub other: f64,
}

/// Results on held-out samples, with the settings they were taken under.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Pictures looked at.
    pub pictures: usize,
    /// Side of the pictures.
    pub size: usize,
    /// How they were brought to it.
    pub resize: &'static str,
    /// Mean squared error of reconstructions, clamped, pixels in [-1, 1].
    pub mse: f64,
    /// The same of the mean training picture.
    pub mse_mean_image: f64,
    /// Peak signal-to-noise ratio in dB, the mean over pictures.
    pub psnr: f64,
    /// Distinct codes used.
    pub codes_used: usize,
    /// Exponential of the entropy of the codes.
    pub code_perplexity: f64,
    /// Captions looked at.
    pub captions: usize,
    /// Nats a caption token, the end token included.
    pub caption_loss: Pair,
    /// Questions asked.
    pub questions: usize,
    /// Share answered exactly, greedily.
    pub accuracy: Pair,
    /// Of the questions whose answer is yes or no.
    pub accuracy_yes_no: Pair,
    /// Of all others.
    pub accuracy_open: Pair,
}

/// Evaluates on the first `data.eval_samples` pictures of `test`; draws originals above reconstructions to
/// `picture`.
pub fn evaluate(
    model: &Ett,
    train: &DataSet,
    test: &DataSet,
    template: &Template,
    picture: &Path,
) -> Result<Report> {
    let n = test.images.len().min(model.cfg.data.eval_samples);
    if n < 2 {
        return Err(Error::data(&test.root, "has fewer than two pictures to evaluate on"));
    }
    let mut rng = Philox::new(0, 0);
    let drawn = (0..n).map(|i| test.images.get(i, &mut rng)).collect::<Result<Vec<_>>>()?;
    let pixels = Reconstructed::new(model, &drawn, &mean_image(train)?, picture)?;
    let seen = Language::new(model, test, template, &drawn, 0)?;
    let other = Language::new(model, test, template, &drawn, n / 2)?;
    let pair = |f: &dyn Fn(&Language) -> f64| Pair { seen: f(&seen), other: f(&other) };
    Ok(Report {
        pictures: n,
        size: model.cfg.data.size,
        resize: "shorter side by antialiased bicubic, centre crop",
        mse: pixels.mse,
        mse_mean_image: pixels.mse_mean_image,
        psnr: pixels.psnr,
        codes_used: pixels.codes_used,
        code_perplexity: pixels.perplexity,
        captions: seen.captions,
        caption_loss: pair(&|l| l.nats / l.tokens.max(1) as f64),
        questions: seen.yes_no.asked + seen.open.asked,
        accuracy: pair(&|l| {
            Score { asked: l.yes_no.asked + l.open.asked, right: l.yes_no.right + l.open.right }.share()
        }),
        accuracy_yes_no: pair(&|l| l.yes_no.share()),
        accuracy_open: pair(&|l| l.open.share()),
    })
}

/// Mean picture of a data set, centre crops.
fn mean_image(data: &DataSet) -> Result<Vec<f64>> {
    let mut rng = Philox::new(0, 0);
    let mut sum: Vec<f64> = Vec::new();
    for i in 0..data.images.len() {
        let image = data.images.get(i, &mut rng)?.image;
        sum.resize(image.pixels.len(), 0.0);
        sum.iter_mut().zip(&image.pixels).for_each(|(s, &v)| *s += v as f64);
    }
    sum.iter_mut().for_each(|s| *s /= data.images.len() as f64);
    Ok(sum)
}

struct Reconstructed {
    mse: f64,
    mse_mean_image: f64,
    psnr: f64,
    codes_used: usize,
    perplexity: f64,
}

impl Reconstructed {
    fn new(model: &Ett, drawn: &[Drawn], mean: &[f64], picture: &Path) -> Result<Self> {
        let n = drawn.len() as f64;
        let (mut mse, mut mse_mean_image, mut psnr) = (0.0, 0.0, 0.0);
        let mut counts = HashMap::<i32, usize>::new();
        let mut shown: Vec<(Image, Image)> = Vec::new();
        for chunk in drawn.chunks(BATCH) {
            let images: Vec<Image> = chunk.iter().map(|d| d.image.clone()).collect();
            let (rec, idx) = reconstruct(model, &images)?;
            for (a, b) in images.into_iter().zip(rec) {
                let error = squared_error(&a, b.pixels.iter().map(|&v| v as f64));
                mse += error / n;
                mse_mean_image += squared_error(&a, mean.iter().copied()) / n;
                psnr += 10.0 * (4.0 / error.max(1e-12)).log10() / n;
                if shown.len() < SHOWN {
                    shown.push((a, b));
                }
            }
            idx.iter().for_each(|&i| *counts.entry(i).or_default() += 1);
        }
        let rows: Vec<Vec<&Image>> = shown
            .chunks(8)
            .flat_map(|c| [c.iter().map(|p| &p.0).collect(), c.iter().map(|p| &p.1).collect()])
            .collect();
        save_png(picture, &grid(&rows, 2)?)?;
        let total = counts.values().sum::<usize>().max(1) as f64;
        let entropy: f64 = counts.values().map(|&c| c as f64 / total).map(|p| -p * p.ln()).sum();
        let (codes_used, perplexity) = (counts.len(), entropy.exp());
        Ok(Reconstructed { mse, mse_mean_image, psnr, codes_used, perplexity })
    }
}

fn squared_error(a: &Image, b: impl Iterator<Item = f64>) -> f64 {
    a.pixels.iter().zip(b).map(|(&x, y)| (x as f64 - y).powi(2)).sum::<f64>() / a.pixels.len() as f64
}

#[derive(Default)]
struct Score {
    asked: usize,
    right: usize,
}

impl Score {
    fn share(&self) -> f64 {
        self.right as f64 / self.asked.max(1) as f64
    }
}

/// Captions and answers of samples, each beside the picture `shift` samples on.
#[derive(Default)]
struct Language {
    captions: usize,
    tokens: usize,
    nats: f64,
    yes_no: Score,
    open: Score,
}

impl Language {
    fn new(model: &Ett, test: &DataSet, template: &Template, drawn: &[Drawn], shift: usize) -> Result<Self> {
        let n = drawn.len();
        let mut all = Language::default();
        for start in (0..n).step_by(BATCH) {
            let here = start..(start + BATCH).min(n);
            let images: Vec<Image> = here.clone().map(|i| drawn[(i + shift) % n].image.clone()).collect();
            let seen = Seen::new(model, &images)?;
            let (mut said, mut yes_no, mut open) = (Vec::new(), Vec::new(), Vec::new());
            for (k, i) in here.enumerate() {
                let s = &test.samples[drawn[i].sample];
                if let Some(c) = &s.caption {
                    said.push(template.caption(k, c)?);
                }
                for (q, a) in s.qa.iter().take(QUESTIONS) {
                    let list = if a == "yes" || a == "no" { &mut yes_no } else { &mut open };
                    list.push(template.chat(k, q, a)?);
                }
            }
            let (nats, tokens) = seen.nats(&said)?;
            (all.nats, all.tokens, all.captions) =
                (all.nats + nats, all.tokens + tokens, all.captions + said.len());
            for (score, list) in [(&mut all.yes_no, yes_no), (&mut all.open, open)] {
                score.asked += list.len();
                score.right += seen.exact(&list)?;
            }
        }
        Ok(all)
    }
}
