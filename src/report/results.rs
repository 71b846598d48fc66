//! Held-out results, and what a run asks of an evaluation.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use crate::config::StageKind;
use crate::data::{DataSet, Skipped};
use crate::error::Result;
use crate::feed::Template;
use crate::model::Ett;

/// An evaluation on held-out pictures, as a run uses it. `eval::HeldOut` is the one of this crate.
pub trait Evaluation {
    /// Fails if `samples` of these pictures cannot be evaluated on.
    fn check(&self, test: &DataSet, samples: usize) -> Result<()>;

    /// A short evaluation during a stage, of what the stage trains: results by name.
    fn during(
        &self,
        model: &mut Ett,
        test: &DataSet,
        template: &Template,
        stage: StageKind,
    ) -> Result<BTreeMap<&'static str, f64>>;

    /// The evaluation of a trained model, which leaves its files in `out`.
    fn closing(&self, model: &mut Ett, test: &DataSet, template: &Template, out: &Path) -> Result<Report>;
}

/// A number with the model's own picture (or prompt) and with that of another sample.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Pair {
    /// Shown what belongs to it.
    pub seen: f64,
    /// Shown another.
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

/// Nats a code of drawn pictures, teacher-forced.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Codes {
    /// With the picture's own prompt and with another's.
    pub loss: Pair,
    /// Entropy of the held-out codes themselves: the least that knowing only how often each occurs can give.
    pub unigram: f64,
}

/// Results on held-out samples, with the settings they were taken under. What could not be measured is left out.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Where the pictures come from.
    pub data: String,
    /// Pictures looked at.
    pub pictures: usize,
    /// Pictures on the way to these that could not be used.
    pub skipped: Skipped,
    /// Side of the pictures.
    pub size: usize,
    /// How they were brought to it, and what was done with reconstructions.
    pub resize: &'static str,
    /// What made the reconstructions and their codes: the weights, or their averages where a run keeps them, as IBQ's
    /// recipe has it. All else is said by the weights that were trained together.
    pub reconstructed_by: &'static str,
    /// Mean squared error of reconstructions, clamped, pixels in [-1, 1].
    pub mse: f64,
    /// The same of the mean of these pictures.
    pub mse_mean_image: f64,
    /// Peak signal-to-noise ratio in dB, the mean over pictures.
    pub psnr: f64,
    /// Structural similarity, the mean over pictures.
    pub ssim: f64,
    /// Perceptual distance, the mean over pictures.
    pub perceptual: f64,
    /// What it was measured with.
    pub perceptual_by: String,
    /// Distinct codes used.
    pub codes_used: usize,
    /// Exponential of the entropy of the codes.
    pub code_perplexity: f64,
    /// Captions looked at.
    pub captions: usize,
    /// Nats a caption token, the end token included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caption_loss: Option<Pair>,
    /// Questions asked.
    pub questions: usize,
    /// Share answered exactly, greedily.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<Pair>,
    /// Of the questions whose answer is yes or no.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy_yes_no: Option<Pair>,
    /// Of all others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy_open: Option<Pair>,
    /// The questions asked most often.
    pub types: Vec<QuestionType>,
    /// Of a model that draws, where there are prompts.
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
            // The pictures are equal.
            false => row("reconstruction MSE", format!("{:.5}", self.mse)),
        }
        row("PSNR, SSIM", format!("{:.2} dB, {:.4}", self.psnr, self.ssim));
        row(&self.perceptual_by, format!("{:.4}", self.perceptual));
        row("codes used (perplexity)", format!("{} ({:.1})", self.codes_used, self.code_perplexity));
        for (name, measured) in [
            ("caption loss, nats a token", &self.caption_loss),
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
            row("code loss, nats a code", value);
        }
        rows
    }
}
