//! Held-out results, and the interface through which a run evaluates.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use crate::config::StageKind;
use crate::data::Skipped;
use crate::error::Result;
use crate::feed::{DataSet, Template};
use crate::model::Ett;

/// An evaluation on held-out pictures, called by a run. `eval::HeldOut` implements it.
pub trait Evaluation {
    /// Fails if `samples` of these pictures cannot be evaluated.
    fn check(&self, test: &DataSet, samples: usize) -> Result<()>;

    /// A short evaluation during a stage, restricted to what the stage trains; returns results by name.
    fn during(
        &self,
        model: &mut Ett,
        test: &DataSet,
        template: &Template,
        stage: StageKind,
    ) -> Result<BTreeMap<&'static str, f64>>;

    /// Evaluates a trained model and writes files into `out`.
    fn closing(&self, model: &mut Ett, test: &DataSet, template: &Template, out: &Path) -> Result<Report>;
}

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

/// What the pixels of drawings show of their prompts, for built-in pictures (`data::look`).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Drawn {
    /// What was looked for.
    pub aspect: &'static str,
    /// Drawings whose prompt determines it.
    pub drawings: usize,
    /// Share of them that show it, and that show it as another prompt of the list asks for it.
    pub right: Pair,
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
    /// The same with the mean of these pictures as the reconstruction.
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
    /// Results of the codes, for models that draw, if there are prompts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub codes: Option<Codes>,
    /// What drawings of held-out prompts show, for models that draw built-in pictures.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub drawings: Vec<Drawn>,
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
        if let Some(most) = self.drawings.iter().map(|d| d.drawings).max() {
            row("drawings looked at", most.to_string());
        }
        for d in &self.drawings {
            row(&format!("  right in {}", d.aspect), pair(&d.right, "another prompt"));
        }
        rows
    }
}
