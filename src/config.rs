//! The configuration of a model and its training: one TOML file. Every key has the paper's value as its
//! default; unknown keys are errors.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::data::Crop;
use crate::error::{Error, Result};
use crate::tensor::Precision;

/// A whole configuration file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Encoder and decoder.
    pub tokenizer: TokenizerConfig,
    /// Codebook and its losses.
    pub quantizer: QuantizerConfig,
    /// Perceptual loss.
    pub lpips: LpipsConfig,
    /// PatchGAN.
    pub discriminator: DiscriminatorConfig,
    /// Language model.
    pub llm: LlmConfig,
    /// From codebook to language model.
    pub projector: ProjectorConfig,
    /// Head that predicts codes.
    pub visual_head: VisualHeadConfig,
    /// Weights of the losses.
    pub loss: LossConfig,
    /// What all stages share.
    pub train: TrainConfig,
    /// Where the pictures are.
    pub data: DataConfig,
    /// The stages of a run, in order.
    pub stage: Vec<StageConfig>,
}

/// `[tokenizer]`: the VQGAN around the quantizer (IBQ's code).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TokenizerConfig {
    /// Channels at full resolution.
    pub ch: usize,
    /// Channel factors, one a level; each level after the first halves the resolution.
    pub ch_mult: Vec<usize>,
    /// Residual blocks a level in the encoder; the decoder has one more.
    pub num_res_blocks: usize,
    /// Channels between the encoder and `quant_conv`.
    pub z_channels: usize,
    /// Groups of every GroupNorm.
    pub norm_groups: usize,
    /// Added to the variance of every GroupNorm.
    pub norm_eps: f64,
}

impl Default for TokenizerConfig {
    fn default() -> Self {
        TokenizerConfig {
            ch: 128,
            ch_mult: vec![1, 1, 2, 2, 4],
            num_res_blocks: 4,
            z_channels: 256,
            norm_groups: 32,
            norm_eps: 1e-6,
        }
    }
}

impl TokenizerConfig {
    /// Pixels a side that one token stands for.
    pub fn downsampling(&self) -> usize {
        1 << self.ch_mult.len().saturating_sub(1)
    }
}

/// Which quantizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QuantizerKind {
    /// Index backpropagation (arXiv 2412.02692).
    Ibq,
    /// Nearest code with a straight-through gradient.
    Vq,
}

/// How tokens and codes are compared by IBQ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scores {
    /// Plain dot products.
    Dot,
    /// Dot products of unit vectors.
    L2norm,
}

/// Which quantization term beta weighs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BetaOn {
    /// The codebook term, as IBQ's code.
    Codebook,
    /// The commitment term, as IBQ's paper.
    Commitment,
}

/// `[quantizer]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuantizerConfig {
    /// `ibq` or `vq`.
    pub kind: QuantizerKind,
    /// K.
    pub codes: usize,
    /// D.
    pub dim: usize,
    /// `dot` or `l2norm`; `vq` always compares by distance.
    pub metric: Scores,
    /// Weight of one quantization term.
    pub beta: f64,
    /// The term: `codebook` or `commitment`. `vq` puts it on the commitment term.
    pub beta_on: BetaOn,
    /// T of the entropy loss.
    pub temperature: f64,
    /// Added inside the logarithm of the average entropy.
    pub entropy_eps: f64,
    /// Standard deviation of the initial codes of `ibq`; `vq` starts uniform in +-1/K.
    pub init_scale: f64,
}

impl Default for QuantizerConfig {
    fn default() -> Self {
        QuantizerConfig {
            kind: QuantizerKind::Ibq,
            codes: 131_072,
            dim: 256,
            metric: Scores::Dot,
            beta: 0.25,
            beta_on: BetaOn::Codebook,
            temperature: 0.01,
            entropy_eps: 1e-5,
            init_scale: 1.0,
        }
    }
}

impl QuantizerConfig {
    /// Weights of the commitment and the codebook term.
    pub fn betas(&self) -> (f64, f64) {
        match (self.kind, self.beta_on) {
            (QuantizerKind::Ibq, BetaOn::Codebook) => (1.0, self.beta),
            (QuantizerKind::Ibq, BetaOn::Commitment) | (QuantizerKind::Vq, _) => (self.beta, 1.0),
        }
    }
}

/// `[lpips]`: VGG16 and its heads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LpipsConfig {
    /// Channels of the five blocks; VGG16's unless the features are random.
    pub widths: [usize; 5],
    /// Safetensors file with `net.slice*` and `lin*` tensors; without one the features are random, from a
    /// fixed seed.
    pub weights: Option<PathBuf>,
    /// Added to the norm of the features.
    pub eps: f64,
}

impl Default for LpipsConfig {
    fn default() -> Self {
        LpipsConfig { widths: [64, 128, 256, 512, 512], weights: None, eps: 1e-10 }
    }
}

/// `[discriminator]`: PatchGAN and LeCAM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiscriminatorConfig {
    /// Channels of the first layer.
    pub ndf: usize,
    /// Decay of LeCAM's averages.
    pub lecam_decay: f64,
    /// Slope of LeakyReLU below zero.
    pub slope: f64,
    /// Added to BatchNorm's variance.
    pub norm_eps: f64,
    /// Weight of a batch in BatchNorm's running statistics.
    pub momentum: f64,
}

impl Default for DiscriminatorConfig {
    fn default() -> Self {
        DiscriminatorConfig { ndf: 64, lecam_decay: 0.999, slope: 0.2, norm_eps: 1e-5, momentum: 0.1 }
    }
}

/// `[llm]`: a Qwen2-style decoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LlmConfig {
    /// V.
    pub vocab: usize,
    /// C.
    pub width: usize,
    /// Blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// D of a head.
    pub head_dim: usize,
    /// F.
    pub mlp: usize,
    /// Added to the mean square of RMSNorm.
    pub rms_eps: f64,
    /// Base of the rotary angles.
    pub rope_theta: f64,
    /// Standard deviation of the initial weights.
    pub init_std: f64,
}

impl Default for LlmConfig {
    fn default() -> Self {
        LlmConfig {
            vocab: 151_936,
            width: 1536,
            layers: 28,
            heads: 12,
            kv_heads: 2,
            head_dim: 128,
            mlp: 8960,
            rms_eps: 1e-6,
            rope_theta: 1e6,
            init_std: 0.02,
        }
    }
}

/// `[projector]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProjectorConfig {
    /// LayerNorm before the first layer.
    pub norm: bool,
    /// Added to its variance.
    pub norm_eps: f64,
    /// Which form of GELU stands between the layers.
    pub gelu: Gelu,
}

/// Forms of GELU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Gelu {
    /// x times the normal distribution function.
    Exact,
    /// The tanh form, which the product's own kernel can end with.
    Tanh,
}

impl Default for ProjectorConfig {
    fn default() -> Self {
        ProjectorConfig { norm: false, norm_eps: 1e-5, gelu: Gelu::Exact }
    }
}

/// Which head predicts codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VisualHeadKind {
    /// None: the model does not draw.
    None,
    /// A small MLP to D, then dot products with the codebook.
    Tied,
    /// A matrix `[K, C]`.
    Linear,
}

/// `[visual_head]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VisualHeadConfig {
    /// `none`, `tied` or `linear`.
    pub kind: VisualHeadKind,
}

impl Default for VisualHeadConfig {
    fn default() -> Self {
        VisualHeadConfig { kind: VisualHeadKind::None }
    }
}

/// `[loss]`: weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossConfig {
    /// Weight of the tokenizer's losses beside the caption loss; 0 turns the decoder off.
    pub alpha: f64,
    /// Mean absolute error.
    pub rec: f64,
    /// Quantization loss.
    pub quant: f64,
    /// Perceptual loss; 0 turns it off.
    pub lpips: f64,
    /// Adversarial loss; 0 turns the discriminator off.
    pub gan: f64,
    /// Sample entropy less average entropy; 0 turns both off.
    pub entropy: f64,
    /// LeCAM, beside the hinge loss.
    pub lecam: f64,
}

impl Default for LossConfig {
    fn default() -> Self {
        LossConfig { alpha: 0.25, rec: 1.0, quant: 1.0, lpips: 1.0, gan: 0.1, entropy: 0.05, lecam: 0.05 }
    }
}

/// The arms of the paper's ablation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arm {
    /// The language model learns its own embeddings of the indices; frozen tokenizer.
    Index,
    /// Codebook embeddings through the projector; frozen tokenizer.
    Embed,
    /// Codebook embeddings, tuned tokenizer.
    Ett,
}

/// `[train]`: what all stages share.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Arm of the ablation.
    pub arm: Arm,
    /// Peak learning rate where a stage names none.
    pub lr: f64,
    /// Adam's decays.
    pub betas: [f64; 2],
    /// Adam's decays of the discriminator.
    pub disc_betas: [f64; 2],
    /// Added to the root of Adam's second moment.
    pub adam_eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest gradient norm; 0: no clipping.
    pub clip: f64,
    /// Share of a stage's steps in which the rate rises.
    pub warmup: f64,
    /// Decay of the averages of the tokenizer's weights.
    pub ema_decay: f64,
    /// Probability that a gen stage leaves a prompt out, for classifier-free guidance.
    pub prompt_dropout: f64,
    /// Seed of everything.
    pub seed: u64,
    /// `f64`, `f32` or `bf16`.
    pub precision: String,
    /// CPU threads; 0: one per core.
    pub threads: usize,
    /// Keep only the inputs of each block for the backward and compute the rest again: less memory, the same
    /// bits.
    pub recompute: bool,
    /// Steps between checkpoints; 0: only at the end of each stage.
    pub save_every: usize,
    /// Checkpoints that are kept.
    pub keep: usize,
    /// Steps between evaluations on held-out pictures during a stage; 0: none.
    pub eval_every: usize,
    /// Tokens over which the use of the codebook is counted.
    pub usage_window: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            arm: Arm::Ett,
            lr: 4e-5,
            betas: [0.9, 0.95],
            disc_betas: [0.5, 0.9],
            adam_eps: 1e-8,
            weight_decay: 0.0,
            clip: 1.0,
            warmup: 0.03,
            ema_decay: 0.999,
            prompt_dropout: 0.1,
            seed: 1,
            precision: "f32".into(),
            threads: 0,
            recompute: false,
            save_every: 500,
            keep: 3,
            eval_every: 0,
            usage_window: 65536,
        }
    }
}

/// Where pictures come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The folders `data.train` and `data.test`.
    Folder,
    /// Built in: coloured shapes, drawn by the program; `data.size` is 16 or more.
    Scenes,
    /// Built in: short words, some beside a shape; `data.size` is 48 or more.
    Words,
}

impl Source {
    /// Lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            Source::Folder => "folder",
            Source::Scenes => "scenes",
            Source::Words => "words",
        }
    }
}

/// `[data]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// `folder`, `scenes` or `words`.
    pub source: Source,
    /// Folder to train on.
    pub train: PathBuf,
    /// Folder of held-out pictures.
    pub test: Option<PathBuf>,
    /// Built-in pictures to train on.
    pub train_samples: usize,
    /// Built-in pictures held out; 0: none.
    pub test_samples: usize,
    /// Pixels a side: the shorter side is resized to it (antialiased bicubic), then cropped.
    pub size: usize,
    /// `centre` or `random`.
    pub crop: Crop,
    /// Mirror half of the pictures; not those built in, which say where things are.
    pub flip: bool,
    /// A `tokenizer.json` of Hugging Face with the special tokens of Qwen2.5; without one every byte is a token.
    pub tokenizer: Option<PathBuf>,
    /// Text tokens a sample that `--plan` assumes.
    pub text_tokens: usize,
    /// Held-out samples that the closing evaluation looks at.
    pub eval_samples: usize,
}

impl Default for DataConfig {
    fn default() -> Self {
        DataConfig {
            source: Source::Folder,
            train: PathBuf::new(),
            test: None,
            train_samples: 4096,
            test_samples: 512,
            size: 512,
            crop: Crop::Centre,
            flip: false,
            tokenizer: None,
            text_tokens: 128,
            eval_samples: 512,
        }
    }
}

impl DataConfig {
    /// Fails on values that do not go with the source, named after their section; [`Config::check`] looks at the rest.
    fn check(&self, section: &str) -> Result<()> {
        let smallest = match self.source {
            Source::Folder => return Ok(()),
            Source::Scenes => 16,
            Source::Words => 48,
        };
        let source = self.source.name();
        if self.size < smallest {
            let want = format!("{smallest} or more with data.source = {source:?}");
            return Err(Error::config(format!("{section}.size"), self.size, want));
        }
        if self.train_samples == 0 || self.train_samples.max(self.test_samples) > u32::MAX as usize {
            let got = format!("{} and {}", self.train_samples, self.test_samples);
            let want = "numbers below 2^32, the first of them 1 or more";
            return Err(Error::config(format!("{section}.train_samples and test_samples"), got, want));
        }
        if self.flip {
            let want = format!("false with data.source = {source:?}, whose captions say where things are");
            return Err(Error::config(format!("{section}.flip"), self.flip, want));
        }
        Ok(())
    }
}

/// The recipes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StageKind {
    /// Tokenizer and discriminator on L_vq.
    Tokenizer,
    /// The language model on text alone.
    Text,
    /// The projector on captions, all else frozen.
    Align,
    /// ETT proper: everything on L_cap + alpha L_vq.
    Semantic,
    /// Projector and language model on answers; frozen tokenizer.
    Chat,
    /// Projector, language model and visual head on the codes of pictures; frozen tokenizer.
    Gen,
}

impl StageKind {
    /// Lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            StageKind::Tokenizer => "tokenizer",
            StageKind::Text => "text",
            StageKind::Align => "align",
            StageKind::Semantic => "semantic",
            StageKind::Chat => "chat",
            StageKind::Gen => "gen",
        }
    }
}

/// How the rate falls after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Half a cosine to 0.
    Cosine,
    /// Not at all.
    Constant,
}

/// `[[stage]]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageConfig {
    /// Recipe.
    pub kind: StageKind,
    /// Optimizer steps.
    pub steps: usize,
    /// Samples a step.
    pub batch: usize,
    /// Peak learning rate; `train.lr` if left out.
    pub lr: Option<f64>,
    /// Adam's decays; `train.betas` if left out, for the discriminator `train.disc_betas`.
    pub betas: Option<[f64; 2]>,
    /// Parameter groups with a rate or decays of their own: `groups.projector.lr = 1e-3`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub groups: BTreeMap<String, GroupConfig>,
    /// `cosine` or `constant`.
    #[serde(default = "cosine")]
    pub schedule: ScheduleKind,
    /// Share of the steps in which the rate rises; if left out `train.warmup`, or 0 where the schedule is `constant`.
    pub warmup: Option<f64>,
    /// Largest gradient norm, 0: no clipping; `train.clip` if left out.
    pub clip: Option<f64>,
    /// Decoupled weight decay; `train.weight_decay` if left out.
    pub weight_decay: Option<f64>,
    /// Added to the root of Adam's second moment; `train.adam_eps` if left out.
    pub adam_eps: Option<f64>,
    /// Keep averages of the tokenizer's weights; reconstructions are then evaluated with them.
    #[serde(default)]
    pub ema: bool,
    /// Parts that a batch is split into, one after another, to save memory; divides `batch`. Batch statistics
    /// (BatchNorm, LeCAM, the average entropy of the codes) are those of a part.
    #[serde(default = "one")]
    pub accumulate: usize,
    /// Share of captions among the samples of a chat or gen stage, so that describing is not forgotten.
    #[serde(default)]
    pub captions: f64,
    /// Share of questions among the samples of a gen stage, so that answering is not forgotten.
    #[serde(default)]
    pub answers: f64,
    /// Keys of `[data]` that differ in this stage: `data = { size = 256, train = "other" }`.
    #[serde(default, skip_serializing_if = "StageData::is_empty")]
    pub data: StageData,
}

/// `[stage.groups.NAME]`: a parameter group of a stage that differs from the others.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    /// Peak learning rate; the stage's if left out.
    pub lr: Option<f64>,
    /// Adam's decays; the stage's if left out.
    pub betas: Option<[f64; 2]>,
    /// Largest norm of this group's own gradient, 0: no clipping; if left out the group is clipped with the others, by
    /// the norm over all of them.
    pub clip: Option<f64>,
    /// Decoupled weight decay; the stage's if left out.
    pub weight_decay: Option<f64>,
    /// Added to the root of Adam's second moment; the stage's if left out.
    pub adam_eps: Option<f64>,
}

/// `[stage.data]`: what a stage's pictures have of their own; what is left out is as in `[data]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageData {
    /// As `data.source`.
    pub source: Option<Source>,
    /// As `data.train`.
    pub train: Option<PathBuf>,
    /// As `data.test`.
    pub test: Option<PathBuf>,
    /// As `data.train_samples`.
    pub train_samples: Option<usize>,
    /// As `data.test_samples`.
    pub test_samples: Option<usize>,
    /// As `data.size`.
    pub size: Option<usize>,
    /// As `data.crop`.
    pub crop: Option<Crop>,
    /// As `data.flip`.
    pub flip: Option<bool>,
    /// As `data.text_tokens`.
    pub text_tokens: Option<usize>,
}

impl StageData {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// `all` with what differs here.
    fn over(&self, all: &DataConfig) -> DataConfig {
        DataConfig {
            source: self.source.unwrap_or(all.source),
            train: self.train.clone().unwrap_or_else(|| all.train.clone()),
            test: self.test.clone().or_else(|| all.test.clone()),
            train_samples: self.train_samples.unwrap_or(all.train_samples),
            test_samples: self.test_samples.unwrap_or(all.test_samples),
            size: self.size.unwrap_or(all.size),
            crop: self.crop.unwrap_or(all.crop),
            flip: self.flip.unwrap_or(all.flip),
            text_tokens: self.text_tokens.unwrap_or(all.text_tokens),
            tokenizer: all.tokenizer.clone(),
            eval_samples: all.eval_samples,
        }
    }
}

impl StageConfig {
    /// A stage with the defaults of all optional keys.
    pub fn new(kind: StageKind, steps: usize, batch: usize) -> Self {
        StageConfig {
            kind,
            steps,
            batch,
            lr: None,
            betas: None,
            groups: BTreeMap::new(),
            schedule: cosine(),
            warmup: None,
            clip: None,
            weight_decay: None,
            adam_eps: None,
            ema: false,
            accumulate: one(),
            captions: 0.0,
            answers: 0.0,
            data: StageData::default(),
        }
    }

    /// Share of the steps in which the rate rises.
    pub fn warmup(&self, train: &TrainConfig) -> f64 {
        self.warmup.unwrap_or(match self.schedule {
            ScheduleKind::Cosine => train.warmup,
            ScheduleKind::Constant => 0.0,
        })
    }
}

fn cosine() -> ScheduleKind {
    ScheduleKind::Cosine
}

fn one() -> usize {
    1
}

impl Config {
    /// The demo: small sizes, built-in pictures, every stage.
    pub fn demo() -> Result<Self> {
        let path = Path::new("configs/demo.toml");
        Self::parse(path, include_str!("../configs/demo.toml"), &[])
    }

    /// Reads and checks a file; `overrides` are `key=value` with dotted keys, values in TOML.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        Self::parse(path, &text, overrides)
    }

    fn parse(path: &Path, text: &str, overrides: &[String]) -> Result<Self> {
        let bad = |e: toml::de::Error| {
            Error::data(path, format!("not a configuration: {}", e.to_string().trim_end()))
        };
        let mut table: toml::Table = toml::from_str(text).map_err(bad)?;
        for o in overrides {
            set(&mut table, o)?;
        }
        let config: Config = match overrides.is_empty() {
            true => toml::from_str(text).map_err(bad)?,
            false => table.try_into().map_err(bad)?,
        };
        config.check()?;
        Ok(config)
    }

    /// What a stage reads: `[data]` with what the stage has of its own.
    pub fn data_of(&self, stage: &StageConfig) -> DataConfig {
        stage.data.over(&self.data)
    }

    /// The element types of the run.
    pub fn precision(&self) -> Result<Precision> {
        Precision::parse(&self.train.precision)
            .ok_or_else(|| Error::config("train.precision", &self.train.precision, "f64, f32 or bf16"))
    }

    /// Fails on values that no model can have.
    pub fn check(&self) -> Result<()> {
        let t = &self.tokenizer;
        let positive = |key: &str, v: usize| match v {
            0 => Err(Error::config(key, v, "1 or more")),
            _ => Ok(()),
        };
        let at_least_0 = |key: &str, v: f64| match v.is_finite() && v >= 0.0 {
            true => Ok(()),
            false => Err(Error::config(key, v, "a finite number, 0 or more")),
        };
        let above_0 = |key: &str, v: f64| match v.is_finite() && v > 0.0 {
            true => Ok(()),
            false => Err(Error::config(key, v, "a finite number above 0")),
        };
        for (key, v) in [
            ("tokenizer.ch", t.ch),
            ("tokenizer.num_res_blocks", t.num_res_blocks),
            ("tokenizer.z_channels", t.z_channels),
            ("tokenizer.norm_groups", t.norm_groups),
            ("quantizer.codes", self.quantizer.codes),
            ("quantizer.dim", self.quantizer.dim),
            ("discriminator.ndf", self.discriminator.ndf),
            ("llm.vocab", self.llm.vocab),
            ("llm.width", self.llm.width),
            ("llm.layers", self.llm.layers),
            ("llm.heads", self.llm.heads),
            ("llm.kv_heads", self.llm.kv_heads),
            ("llm.head_dim", self.llm.head_dim),
            ("llm.mlp", self.llm.mlp),
            ("data.size", self.data.size),
            ("train.keep", self.train.keep),
            ("train.usage_window", self.train.usage_window),
        ] {
            positive(key, v)?;
        }
        if t.ch_mult.is_empty() || t.ch_mult.len() > 8 || t.ch_mult.contains(&0) {
            return Err(Error::config(
                "tokenizer.ch_mult",
                format!("{:?}", t.ch_mult),
                "1 to 8 factors above 0",
            ));
        }
        if let Some(m) = t.ch_mult.iter().find(|&m| !(t.ch * m).is_multiple_of(t.norm_groups)) {
            let want = format!("a divisor of every width, {} among them", t.ch * m);
            return Err(Error::config("tokenizer.norm_groups", t.norm_groups, want));
        }
        if self.quantizer.codes > i32::MAX as usize {
            return Err(Error::config("quantizer.codes", self.quantizer.codes, "below 2^31"));
        }
        if self.lpips.widths.contains(&0) {
            return Err(Error::config("lpips.widths", format!("{:?}", self.lpips.widths), "widths above 0"));
        }
        if !self.llm.heads.is_multiple_of(self.llm.kv_heads) {
            return Err(Error::config(
                "llm.kv_heads",
                self.llm.kv_heads,
                format!("a divisor of {}", self.llm.heads),
            ));
        }
        if !self.llm.head_dim.is_multiple_of(2) {
            return Err(Error::config("llm.head_dim", self.llm.head_dim, "an even number"));
        }
        for (key, v) in [
            ("quantizer.temperature", self.quantizer.temperature),
            ("quantizer.entropy_eps", self.quantizer.entropy_eps),
            ("train.adam_eps", self.train.adam_eps),
            ("llm.rope_theta", self.llm.rope_theta),
        ] {
            above_0(key, v)?;
        }
        for (key, v) in [
            ("quantizer.beta", self.quantizer.beta),
            ("quantizer.init_scale", self.quantizer.init_scale),
            ("loss.alpha", self.loss.alpha),
            ("loss.rec", self.loss.rec),
            ("loss.quant", self.loss.quant),
            ("loss.lpips", self.loss.lpips),
            ("loss.gan", self.loss.gan),
            ("loss.entropy", self.loss.entropy),
            ("loss.lecam", self.loss.lecam),
            ("train.lr", self.train.lr),
            ("train.clip", self.train.clip),
            ("train.weight_decay", self.train.weight_decay),
        ] {
            at_least_0(key, v)?;
        }
        for (key, v) in [
            ("train.betas", self.train.betas),
            ("train.disc_betas", self.train.disc_betas),
            ("train.warmup and ema_decay", [self.train.warmup, self.train.ema_decay]),
        ] {
            if v.iter().any(|b| !(0.0..1.0).contains(b)) {
                return Err(Error::config(key, format!("{v:?}"), "numbers from 0 to below 1"));
            }
        }
        let sized = |key: &str, size: usize| match size.is_multiple_of(t.downsampling()) && size > 0 {
            true => Ok(()),
            false => {
                let want = format!("a multiple of {}, the tokenizer's down-sampling", t.downsampling());
                Err(Error::config(key, size, want))
            }
        };
        sized("data.size", self.data.size)?;
        if !(0.0..=1.0).contains(&self.train.prompt_dropout) {
            let got = self.train.prompt_dropout;
            return Err(Error::config("train.prompt_dropout", got, "a share from 0 to 1"));
        }
        self.data.check("data")?;
        for (i, s) in self.stage.iter().enumerate() {
            let key = |name: &str| format!("stage.{i}.{name}");
            positive(&key("batch"), s.batch)?;
            positive(&key("accumulate"), s.accumulate)?;
            if !s.batch.is_multiple_of(s.accumulate) {
                let want = format!("a divisor of the batch of {}", s.batch);
                return Err(Error::config(key("accumulate"), s.accumulate, want));
            }
            for (name, share) in [("captions", s.captions), ("answers", s.answers)] {
                if !(0.0..=1.0).contains(&share) {
                    return Err(Error::config(key(name), share, "a share from 0 to 1"));
                }
            }
            if s.kind == StageKind::Gen && s.captions + s.answers >= 1.0 {
                let got = s.captions + s.answers;
                return Err(Error::config(key("captions and answers"), got, "together less than 1"));
            }
            if s.kind == StageKind::Gen && self.visual_head.kind == VisualHeadKind::None {
                return Err(Error::config(
                    "visual_head.kind",
                    "none",
                    "tied or linear, for a stage of the kind gen",
                ));
            }
            let data = self.data_of(s);
            sized(&key("data.size"), data.size)?;
            data.check(&key("data"))?;
            if let Some(share) = s.warmup.filter(|share| !(0.0..1.0).contains(share)) {
                return Err(Error::config(key("warmup"), share, "a share from 0 to below 1"));
            }
            let whole = GroupConfig {
                lr: s.lr,
                betas: s.betas,
                clip: s.clip,
                weight_decay: s.weight_decay,
                adam_eps: s.adam_eps,
            };
            let named = s.groups.iter().map(|(name, g)| (format!("groups.{name}."), g));
            for (prefix, g) in [(String::new(), &whole)].into_iter().chain(named) {
                for (name, v) in [("lr", g.lr), ("clip", g.clip), ("weight_decay", g.weight_decay)] {
                    at_least_0(&key(&format!("{prefix}{name}")), v.unwrap_or(0.0))?;
                }
                above_0(&key(&format!("{prefix}adam_eps")), g.adam_eps.unwrap_or(1.0))?;
                if let Some(b) = g.betas.filter(|b| b.iter().any(|b| !(0.0..1.0).contains(b))) {
                    let key = key(&format!("{prefix}betas"));
                    return Err(Error::config(key, format!("{b:?}"), "numbers from 0 to below 1"));
                }
            }
        }
        self.precision()?;
        Ok(())
    }
}

/// Sets a dotted key from `key=value`; list items by number, `stage.0.steps=10`.
fn set(table: &mut toml::Table, assignment: &str) -> Result<()> {
    let want = "key=value with a dotted key, as in train.seed=2";
    let (key, value) = assignment.split_once('=').ok_or_else(|| Error::config("--set", assignment, want))?;
    let parsed = toml::from_str::<toml::Table>(&format!("v = {value}"))
        .or_else(|_| toml::from_str(&format!("v = {}", toml::Value::String(value.into()))))
        .map_err(|_| Error::config("--set", assignment, want))?;
    let Some(value) = parsed.get("v").cloned() else { return Err(Error::config("--set", assignment, want)) };
    let parts: Vec<&str> = key.trim().split('.').collect();
    let (last, path) = parts.split_last().ok_or_else(|| Error::config("--set", assignment, want))?;
    let mut at = table;
    let mut parts = path.iter().peekable();
    while let Some(p) = parts.next() {
        let next = at.entry(*p).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        let next = match (next, parts.peek().and_then(|n| n.parse::<usize>().ok())) {
            (toml::Value::Array(items), Some(i)) => {
                parts.next();
                let n = items.len();
                items.get_mut(i).ok_or_else(|| Error::config(key, i, format!("an index below {n}")))?
            }
            (next, _) => next,
        };
        at = next.as_table_mut().ok_or_else(|| Error::config(key, assignment, "a key inside a section"))?;
    }
    at.insert((*last).to_string(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str, overrides: &[&str]) -> Result<Config> {
        let dir = std::env::temp_dir().join(format!("ett-config-{}-{:p}", std::process::id(), text));
        std::fs::write(&dir, text).map_err(Error::io(&dir))?;
        let o: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
        let c = Config::load(&dir, &o);
        std::fs::remove_file(&dir).map_err(Error::io(&dir))?;
        c
    }

    #[test]
    fn empty_file_is_the_paper() {
        let c = load("", &[]).expect("defaults are valid");
        assert_eq!((c.quantizer.codes, c.quantizer.dim, c.llm.layers), (131_072, 256, 28));
        assert_eq!(c.tokenizer.downsampling(), 16);
    }

    #[test]
    fn errors_name_key_and_value() {
        let e = load("[tokenizer]\nchannels = 3\n", &[]).expect_err("unknown key").to_string();
        assert!(e.contains("channels"), "{e}");
        let e = load("[llm]\nheads = 4\nkv_heads = 3\n", &[]).expect_err("impossible").to_string();
        assert!(e.contains("llm.kv_heads") && e.contains('3') && e.contains("divisor of 4"), "{e}");
        let e = load("[train]\nprecision = \"f16\"\n", &[]).expect_err("unknown type").to_string();
        assert!(e.contains("f16") && e.contains("bf16"), "{e}");
    }

    #[test]
    fn built_in_data_has_its_limits() {
        let text = "[data]\nsource = \"words\"\nsize = 64\n";
        let c = load(text, &[]).expect("valid");
        assert_eq!((c.data.source, c.data.train_samples, c.data.test_samples), (Source::Words, 4096, 512));
        for (o, want) in [
            ("data.size=32", "`data.size` is 32, wanted 48 or more"),
            ("data.train_samples=0", "`data.train_samples and test_samples` is 0 and 512"),
            ("data.flip=true", "`data.flip` is true, wanted false"),
            ("data.source=letters", "letters"),
        ] {
            let e = load(text, &[o]).expect_err(o).to_string();
            assert!(e.contains(want), "{e}");
        }
        load(text, &["data.size=32", "data.source=scenes"]).expect("scenes are smaller");
    }

    #[test]
    fn overrides_reach_sections_lists_and_strings() {
        let text = "[[stage]]\nkind = \"text\"\nsteps = 5\nbatch = 2\n";
        let c = load(text, &["train.seed=7", "stage.0.steps=9", "train.precision=bf16", "loss.alpha=0.5"])
            .expect("valid");
        assert_eq!((c.train.seed, c.stage[0].steps, c.loss.alpha), (7, 9, 0.5));
        assert_eq!(c.train.precision, "bf16");
        assert!(load(text, &["stage.3.steps=9"]).is_err());
        assert!(load(text, &["nonsense"]).is_err());
    }
}
