//! The configuration of a model and its training, a TOML file. Every key has the paper's value as its default; unknown
//! keys are errors. Relative paths in the file are relative to its folder.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::backend::{Cpu, Precision};
use crate::data::{Columns, Crop, Frames, Framing, LoadOptions, Source, Split, Wanted, read_text};
use crate::error::{Error, Result};
use crate::files;

/// Version of the keys and their meaning. [`migrate`] brings files of earlier versions up to date.
const FORMAT: u32 = 1;

/// The version of a file's keys; by default that of this program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Format(u32);

impl Default for Format {
    fn default() -> Self {
        Format(FORMAT)
    }
}

/// A whole configuration file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Version of the keys. A file without it is read as one of this version, or as an older one where that differs; one
    /// with a later version is an error.
    pub format: Format,
    /// Weights that a run starts from.
    pub init: InitConfig,
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
    /// Maps codebook embeddings to the language model.
    pub projector: ProjectorConfig,
    /// Head that predicts codes.
    pub visual_head: VisualHeadConfig,
    /// Weights of the losses.
    pub loss: LossConfig,
    /// Settings of all stages.
    pub train: TrainConfig,
    /// Training and held-out pictures.
    pub data: DataConfig,
    /// How the trained model draws, in the closing evaluation and by `ett generate`, whose options override these
    /// keys.
    pub sampling: SamplingConfig,
    /// The stages of a run, in order.
    pub stage: Vec<StageConfig>,
}

/// `[init]`: weights that a run starts from; docs/weights.md describes the formats. What they determine need not be
/// repeated in other sections: their sizes become the defaults of `[llm]`, or of `[tokenizer]` and `[quantizer]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InitConfig {
    /// Language model: a Hugging Face folder, or one that `ett import` has written. Its `tokenizer.json` becomes the default
    /// of `data.tokenizer`.
    pub llm: Option<PathBuf>,
    /// Vision tokenizer: a file that `ett import` or `ett export` has written, a published checkpoint, or the folder of a run.
    pub tokenizer: Option<PathBuf>,
    /// Start from the averages of the tokenizer's weights, which the file must have.
    pub averages: bool,
}

/// `[tokenizer]`: the VQGAN around the quantizer (IBQ's code).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TokenizerConfig {
    /// Channels at full resolution.
    pub ch: usize,
    /// Channel factors, one per level; each level after the first halves the resolution.
    pub ch_mult: Vec<usize>,
    /// Residual blocks per level in the encoder; the decoder has one more.
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
    /// Side in pixels of the square that one token represents.
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

/// How IBQ scores codes against tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QuantizerMetric {
    /// Plain dot products.
    Dot,
    /// Dot products of unit vectors.
    L2norm,
}

/// The type of the quantizer's tokens and codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Operands {
    /// The type of all activations.
    Act,
    /// float32 in a bf16 run: tokens and codes are not rounded.
    F32,
}

/// What the backward pass computes again instead of keeping it. The bits are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// The least of the others with which the stage fits into the device's memory, according to its plan.
    Auto,
    /// Nothing.
    None,
    /// The outputs of norms and activation functions, the products of SwiGLU among them.
    Cheap,
    /// These, and everything inside of a residual, attention or transformer block but its input.
    Blocks,
}

impl Recompute {
    /// From the fastest to the one that takes the least memory.
    pub const CHOICES: [Recompute; 3] = [Recompute::None, Recompute::Cheap, Recompute::Blocks];

    /// As in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Recompute::Auto => "auto",
            Recompute::None => "none",
            Recompute::Cheap => "cheap",
            Recompute::Blocks => "blocks",
        }
    }
}

/// What each rank keeps only its part of. The weights that products read are whole on every rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shard {
    /// Nothing.
    None,
    /// Moments, averages, and master weights if products read a copy in another type.
    Optimizer,
    /// These, and gradients beyond those that the backward pass is adding to.
    Gradients,
}

/// The quantization term that beta is the weight of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BetaOn {
    /// The codebook term, as in IBQ's code.
    Codebook,
    /// The commitment term, as in IBQ's paper.
    Commitment,
}

/// `[quantizer]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuantizerConfig {
    /// `ibq` or `vq`.
    pub kind: QuantizerKind,
    /// Number of codes, K.
    pub codes: usize,
    /// Dimensions of a code, D.
    pub dim: usize,
    /// `dot` or `l2norm`; `vq` always compares by distance.
    pub metric: QuantizerMetric,
    /// Type of tokens and codes: `act` (as all activations) or `f32` (float32 in a bf16 run).
    pub precision: Operands,
    /// Weight of one quantization term.
    pub beta: f64,
    /// That term: `codebook` or `commitment`; with `vq` always the commitment term.
    pub beta_on: BetaOn,
    /// Temperature T of the entropy loss.
    pub temperature: f64,
    /// Added inside the logarithm of the average entropy.
    pub entropy_eps: f64,
    /// Standard deviation of the initial codes of `ibq`; those of `vq` are uniform in +-1/K.
    pub init_scale: f64,
}

impl Default for QuantizerConfig {
    fn default() -> Self {
        QuantizerConfig {
            kind: QuantizerKind::Ibq,
            codes: 131_072,
            dim: 256,
            metric: QuantizerMetric::Dot,
            precision: Operands::Act,
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
    /// Channels of the five blocks; only random features can differ from VGG16's.
    pub widths: [usize; 5],
    /// File with VGG16 and, if it has them, the heads of LPIPS, as safetensors or `.pth`; by default those in the file of
    /// `init.tokenizer`. Without one the features are random, from a fixed seed. A run reads the file once and then stores the
    /// tensors with its own weights.
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
    /// Takes BatchNorm's statistics and LeCAM's averages over all ranks; otherwise each rank has its own.
    pub sync: bool,
}

impl Default for DiscriminatorConfig {
    fn default() -> Self {
        DiscriminatorConfig {
            ndf: 64,
            lecam_decay: 0.999,
            slope: 0.2,
            norm_eps: 1e-5,
            momentum: 0.1,
            sync: false,
        }
    }
}

/// `[llm]`: a Qwen2-style decoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LlmConfig {
    /// Vocabulary size, V.
    pub vocab: usize,
    /// Width, C.
    pub width: usize,
    /// Blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Dimensions of a head, D.
    pub head_dim: usize,
    /// Width of the MLP, F.
    pub mlp: usize,
    /// Added to the mean square of RMSNorm.
    pub rms_eps: f64,
    /// Base of the rotary angles.
    pub rope_theta: f64,
    /// The embedding is the output head, too; else `lm_head.weight` is a matrix of its own.
    pub tied: bool,
    /// Queries, keys and values have biases, as in Qwen2; models of Llama's type have none.
    pub qkv_bias: bool,
    /// The longest sequence, in tokens, that the model was made for; only passed on to exported models.
    pub positions: usize,
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
            tied: true,
            qkv_bias: true,
            positions: 32_768,
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
    /// Added to the variance of that LayerNorm.
    pub norm_eps: f64,
    /// Form of GELU between the layers.
    pub gelu: Gelu,
}

/// Forms of GELU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Gelu {
    /// x times the cumulative normal distribution function.
    Exact,
    /// The tanh form, which can be fused with the matrix product.
    Tanh,
}

impl Default for ProjectorConfig {
    fn default() -> Self {
        ProjectorConfig { norm: false, norm_eps: 1e-5, gelu: Gelu::Exact }
    }
}

/// The head that predicts codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VisualHeadKind {
    /// No head: the model cannot draw.
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
    /// Weight of the tokenizer's losses, relative to the caption loss; 0 turns the decoder off.
    pub alpha: f64,
    /// Mean absolute error.
    pub rec: f64,
    /// Quantization loss.
    pub quant: f64,
    /// Perceptual loss; 0 turns it off.
    pub lpips: f64,
    /// Adversarial loss; 0 turns the discriminator off.
    pub gan: f64,
    /// Sample entropy minus average entropy; 0 turns both off.
    pub entropy: f64,
    /// LeCAM, relative to the discriminator's hinge loss.
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
    /// The language model learns its own embeddings of the indices; the tokenizer is frozen.
    Index,
    /// Codebook embeddings through the projector; the tokenizer is frozen.
    Embed,
    /// Codebook embeddings through the projector; the tokenizer is trained.
    Ett,
}

/// `[train]`: settings of all stages.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Arm of the ablation.
    pub arm: Arm,
    /// Peak learning rate of stages without their own.
    pub lr: f64,
    /// Adam's decays.
    pub betas: [f64; 2],
    /// Adam's decays for the discriminator.
    pub disc_betas: [f64; 2],
    /// Added to the root of Adam's second moment.
    pub adam_eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Gradient clipping norm; 0: no clipping.
    pub clip: f64,
    /// Warm-up: share of a stage's steps in which the learning rate rises.
    pub warmup: f64,
    /// Decay of the moving averages of the tokenizer's weights.
    pub ema_decay: f64,
    /// Probability that a gen stage omits a prompt, for classifier-free guidance.
    pub prompt_dropout: f64,
    /// Seed of all random numbers.
    pub seed: u64,
    /// `f64`, `f32` or `bf16`.
    pub precision: String,
    /// CPU threads, at most 1024; 0: one per core.
    pub threads: usize,
    /// Records a step whose sizes repeat and replays it, on devices that can: the same bits with less waiting between
    /// kernels.
    pub graph: bool,
    /// Threads that prepare batches ahead of the training, at most 1024; 0: half the cores, at most 8.
    pub workers: usize,
    /// What the backward pass computes again instead of keeping it, with the same bits.
    pub recompute: Recompute,
    /// Steps between checkpoints; 0: only at the end of each stage.
    pub save_every: usize,
    /// Number of checkpoints to keep.
    pub keep: usize,
    /// Steps between evaluations on held-out pictures during a stage; 0: none.
    pub eval_every: usize,
    /// Number of latest tokens over which codebook use is measured.
    pub usage_window: usize,
    /// What several ranks share among them instead of keeping it whole; docs/ranks.md.
    pub shard: Shard,
    /// MiB of gradients that are reduced over the ranks at a time, while the backward pass goes on.
    pub range_mib: f64,
    /// Seconds without progress of a rank after which the run ends. Saving, evaluation and the first step of a stage may
    /// take longer.
    pub stall_s: usize,
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
            graph: true,
            workers: 0,
            recompute: Recompute::Auto,
            save_every: 500,
            keep: 3,
            eval_every: 0,
            usage_window: 65536,
            shard: Shard::Optimizer,
            range_mib: 95.0,
            stall_s: 60,
        }
    }
}

/// `[data]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// Where the pictures come from; docs/data.md describes each source.
    pub source: Source,
    /// Training pictures: the folder, file or files that the source reads.
    pub train: PathBuf,
    /// Held-out pictures, likewise.
    pub test: Option<PathBuf>,
    /// Folder of the pictures that `train` names, if it is not the one of `train` itself.
    pub images: Option<PathBuf>,
    /// Folder of the pictures that `test` names; as `images` if omitted.
    pub test_images: Option<PathBuf>,
    /// Columns of tables.
    pub columns: Columns,
    /// A mixture of several sources, which replaces `source` and what it reads.
    pub mix: Vec<MixConfig>,
    /// Number of built-in training pictures.
    pub train_samples: usize,
    /// Number of built-in held-out pictures; 0: none.
    pub test_samples: usize,
    /// Side of the pictures in pixels: the shorter side is resized to it (antialiased bicubic), then the picture is
    /// cropped to a square.
    pub size: usize,
    /// Which sizes pictures are brought to in training. Held-out pictures are squares.
    pub framing: Framing,
    /// `centre` or `random`.
    pub crop: Crop,
    /// Mirror half of the pictures; not allowed for built-in pictures, whose captions say where things are.
    pub flip: bool,
    /// A Hugging Face `tokenizer.json` with the special tokens of Qwen2.5; without one every byte is a token. A run
    /// keeps a copy.
    pub tokenizer: Option<PathBuf>,
    /// The line of the system at the start of every conversation, in training and in use; empty: none.
    pub system: String,
    /// Text tokens per sample that `--plan` assumes.
    pub text_tokens: usize,
    /// Maximum tokens of a caption, a prompt, a question or an answer. Longer texts are cut; a stage reports their
    /// number when it begins.
    pub max_text_tokens: usize,
    /// Maximum MiB of pictures that are cached in memory, at training size and one byte per channel; the others are
    /// decoded at each use.
    pub cache_mib: usize,
    /// Number of held-out samples to evaluate, the first usable ones.
    pub eval_samples: usize,
    /// Number of held-out prompts that the closing evaluation draws to look at what the drawings show, for models that
    /// draw built-in pictures.
    pub eval_drawings: usize,
}

impl Default for DataConfig {
    fn default() -> Self {
        DataConfig {
            source: Source::Folder,
            train: PathBuf::new(),
            test: None,
            images: None,
            test_images: None,
            columns: Columns::default(),
            mix: Vec::new(),
            train_samples: 4096,
            test_samples: 512,
            size: 512,
            framing: Framing::Square,
            crop: Crop::Centre,
            flip: false,
            tokenizer: None,
            system: String::new(),
            text_tokens: 128,
            max_text_tokens: 1024,
            cache_mib: 4096,
            eval_samples: 512,
            eval_drawings: 64,
        }
    }
}

impl DataConfig {
    /// The sources of the data with their weights: one, or those of the mixture.
    pub fn parts(&self) -> Vec<MixConfig> {
        match self.mix.is_empty() {
            false => self.mix.clone(),
            true => vec![MixConfig {
                weight: 1.0,
                source: self.source,
                train: self.train.clone(),
                test: self.test.clone(),
                images: self.images.clone(),
                test_images: self.test_images.clone(),
                columns: self.columns.clone(),
                train_samples: self.train_samples,
                test_samples: self.test_samples,
            }],
        }
    }

    /// How training pictures or held-out pictures are loaded, for a tokenizer that makes one token of `side` x `side`
    /// pixels.
    pub fn options(&self, split: Split, side: usize) -> LoadOptions {
        let memory = (self.cache_mib as u64).saturating_mul(1 << 20);
        let options = LoadOptions { memory, ..LoadOptions::new(self.size) };
        match split {
            Split::Train => LoadOptions {
                frames: Frames::new(self.framing, self.size, side),
                crop: self.crop,
                flip: self.flip,
                ..options
            },
            Split::Test => LoadOptions { most: Some(self.eval_samples), ..options },
        }
    }

    /// Whether there are held-out pictures.
    pub fn has_test(&self) -> bool {
        self.parts().iter().any(|m| m.source.has(&m.wanted(Split::Test, self)))
    }

    /// Fails on values that the sources do not support, with keys named by `section`; [`Config::check`] checks the
    /// rest.
    fn check(&self, section: &str) -> Result<()> {
        for (i, part) in self.parts().iter().enumerate() {
            let section = match self.mix.is_empty() {
                true => section.to_string(),
                false => format!("{section}.mix.{i}"),
            };
            part.check(self, &section)?;
        }
        Ok(())
    }
}

/// `[[data.mix]]`: one of the sources of a mixture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MixConfig {
    /// The share of the steps' samples that come from it is this number over the sum of all weights. An epoch of a
    /// source ends when all of its samples have been used, independently of the others.
    pub weight: f64,
    /// As `data.source`.
    pub source: Source,
    /// As `data.train`.
    pub train: PathBuf,
    /// As `data.test`.
    pub test: Option<PathBuf>,
    /// As `data.images`.
    pub images: Option<PathBuf>,
    /// As `data.test_images`.
    pub test_images: Option<PathBuf>,
    /// As `data.columns`.
    pub columns: Columns,
    /// As `data.train_samples`.
    pub train_samples: usize,
    /// As `data.test_samples`.
    pub test_samples: usize,
}

impl Default for MixConfig {
    fn default() -> Self {
        DataConfig::default().parts().remove(0)
    }
}

impl MixConfig {
    /// What to list for the training set or the held-out set.
    pub(crate) fn wanted<'a>(&'a self, split: Split, data: &DataConfig) -> Wanted<'a> {
        let images = self.images.as_deref();
        let (path, images, samples) = match split {
            Split::Train => (Some(&*self.train), images, self.train_samples),
            Split::Test => {
                let samples = self.test_samples.min(data.eval_samples);
                (self.test.as_deref(), self.test_images.as_deref().or(images), samples)
            }
        };
        Wanted { split, path, images, columns: &self.columns, samples, size: data.size }
    }

    fn forget(&mut self) {
        (self.train, self.test, self.images, self.test_images) = Default::default();
    }

    fn paths(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let given = [&mut self.test, &mut self.images, &mut self.test_images];
        given.into_iter().flatten().chain([&mut self.train])
    }

    fn check(&self, data: &DataConfig, section: &str) -> Result<()> {
        if !(self.weight > 0.0 && self.weight <= MAX_WEIGHT) {
            let want = format!("a number above 0 and up to {MAX_WEIGHT}");
            return Err(Error::config(format!("{section}.weight"), self.weight, want));
        }
        count(&format!("{section}.train_samples"), self.train_samples, 0..=MAX_COUNT)?;
        count(&format!("{section}.test_samples"), self.test_samples, 0..=MAX_COUNT)?;
        let source = self.source.name();
        if data.flip && self.source.says_where() {
            let want = format!("false with data.source = {source:?}, whose captions say where things are");
            return Err(Error::config(format!("{section}.flip"), data.flip, want));
        }
        let Some(smallest) = self.source.smallest_drawn() else { return Ok(()) };
        if data.size < smallest {
            let want = format!("{smallest} or more with data.source = {source:?}");
            return Err(Error::config(format!("{section}.size"), data.size, want));
        }
        if self.train_samples == 0 {
            let want = format!("1 or more with data.source = {source:?}");
            return Err(Error::config(format!("{section}.train_samples"), self.train_samples, want));
        }
        Ok(())
    }
}

/// `[sampling]`: how a code of a drawing is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingConfig {
    /// Divisor of the logits: below 1 makes likely codes more likely; 0 always takes the most likely one.
    pub temperature: f64,
    /// Sample from this many of the most likely codes; 0: all.
    pub top_k: usize,
    /// Of those, sample from the most likely that together have this probability.
    pub top_p: f64,
    /// Classifier-free guidance: 1 as in training; higher values exaggerate the prompt.
    pub guidance: f64,
}

impl Default for SamplingConfig {
    fn default() -> Self {
        SamplingConfig { temperature: 1.0, top_k: 0, top_p: 1.0, guidance: 3.0 }
    }
}

/// The kinds of stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StageKind {
    /// Trains tokenizer and discriminator on L_vq.
    Tokenizer,
    /// Trains the language model on text alone.
    Text,
    /// Trains the projector on captions; everything else is frozen.
    Align,
    /// ETT proper: trains everything on L_cap + alpha L_vq.
    Semantic,
    /// Trains projector and language model on answers; the tokenizer is frozen.
    Chat,
    /// Trains projector, language model and visual head on the codes of pictures; the tokenizer is frozen.
    Gen,
}

impl StageKind {
    /// All of them, in the order in which a model goes through them.
    pub const ALL: [StageKind; 6] = [
        StageKind::Tokenizer,
        StageKind::Text,
        StageKind::Align,
        StageKind::Semantic,
        StageKind::Chat,
        StageKind::Gen,
    ];

    /// The kind with this name.
    pub fn named(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(StageKind::name).join(", ");
            Error::config("stage", name, format!("one of {names}"))
        })
    }

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

/// The learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Falls along half a cosine to 0.
    Cosine,
    /// Stays constant.
    Constant,
}

/// `[[stage]]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageConfig {
    /// What the stage trains and on which loss.
    pub kind: StageKind,
    /// Optimizer steps.
    pub steps: usize,
    /// Samples per step.
    pub batch: usize,
    /// Peak learning rate; `train.lr` if omitted.
    pub lr: Option<f64>,
    /// Adam's decays; if omitted `train.betas`, for the discriminator `train.disc_betas`.
    pub betas: Option<[f64; 2]>,
    /// Parameter groups with their own learning rate, decays, clipping or weight decay: `groups.projector.lr = 1e-3`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub groups: BTreeMap<String, GroupConfig>,
    /// Learning rate after the warm-up: `cosine` or `constant`.
    #[serde(default = "cosine")]
    pub schedule: ScheduleKind,
    /// Share of the steps in which the learning rate rises; if omitted `train.warmup`, or 0 if the schedule is
    /// `constant`.
    pub warmup: Option<f64>,
    /// Gradient clipping norm, 0: no clipping; `train.clip` if omitted.
    pub clip: Option<f64>,
    /// Decoupled weight decay; `train.weight_decay` if omitted.
    pub weight_decay: Option<f64>,
    /// Added to the root of Adam's second moment; `train.adam_eps` if omitted.
    pub adam_eps: Option<f64>,
    /// Keep moving averages of the tokenizer's weights; reconstructions are then evaluated with them.
    #[serde(default)]
    pub ema: bool,
    /// Gradient accumulation: number of parts that a batch is split into to save memory; divides `batch`. Batch
    /// statistics (BatchNorm, LeCAM, the average entropy of the codes) are computed per part.
    #[serde(default = "one")]
    pub accumulate: usize,
    /// Share of captions among the samples of a chat or gen stage, so that the model does not forget to describe.
    #[serde(default)]
    pub captions: f64,
    /// Share of questions among the samples of a gen stage, so that the model does not forget to answer.
    #[serde(default)]
    pub answers: f64,
    /// Keys of `[data]` that differ in this stage: `data = { size = 256, train = "other" }`.
    #[serde(default, skip_serializing_if = "StageData::is_empty")]
    pub data: StageData,
}

/// `[stage.groups.NAME]`: the settings of a parameter group that differ from those of the stage.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    /// Peak learning rate; the stage's if omitted.
    pub lr: Option<f64>,
    /// Adam's decays; the stage's if omitted.
    pub betas: Option<[f64; 2]>,
    /// Clipping norm of this group's own gradient, 0: no clipping; if omitted, the group is clipped together with the
    /// others, by the norm over all of them.
    pub clip: Option<f64>,
    /// Decoupled weight decay; the stage's if omitted.
    pub weight_decay: Option<f64>,
    /// Added to the root of Adam's second moment; the stage's if omitted.
    pub adam_eps: Option<f64>,
}

/// `[stage.data]`: the keys of `[data]` that differ in a stage; omitted keys are as in `[data]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageData {
    /// As `data.source`.
    pub source: Option<Source>,
    /// As `data.train`.
    pub train: Option<PathBuf>,
    /// As `data.test`.
    pub test: Option<PathBuf>,
    /// As `data.images`.
    pub images: Option<PathBuf>,
    /// As `data.test_images`.
    pub test_images: Option<PathBuf>,
    /// As `data.columns`.
    pub columns: Option<Columns>,
    /// As `data.mix`; a stage that names a source of its own has no mixture.
    pub mix: Option<Vec<MixConfig>>,
    /// As `data.train_samples`.
    pub train_samples: Option<usize>,
    /// As `data.test_samples`.
    pub test_samples: Option<usize>,
    /// As `data.size`.
    pub size: Option<usize>,
    /// As `data.framing`.
    pub framing: Option<Framing>,
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

    /// `all` with the keys that are set here replaced.
    fn over(&self, all: &DataConfig) -> DataConfig {
        DataConfig {
            source: self.source.unwrap_or(all.source),
            train: self.train.clone().unwrap_or_else(|| all.train.clone()),
            test: self.test.clone().or_else(|| all.test.clone()),
            images: self.images.clone().or_else(|| all.images.clone()),
            test_images: self.test_images.clone().or_else(|| all.test_images.clone()),
            columns: self.columns.clone().unwrap_or_else(|| all.columns.clone()),
            mix: match (&self.mix, self.source) {
                (Some(mix), _) => mix.clone(),
                (None, Some(_)) => Vec::new(),
                (None, None) => all.mix.clone(),
            },
            train_samples: self.train_samples.unwrap_or(all.train_samples),
            test_samples: self.test_samples.unwrap_or(all.test_samples),
            size: self.size.unwrap_or(all.size),
            framing: self.framing.unwrap_or(all.framing),
            crop: self.crop.unwrap_or(all.crop),
            flip: self.flip.unwrap_or(all.flip),
            text_tokens: self.text_tokens.unwrap_or(all.text_tokens),
            tokenizer: all.tokenizer.clone(),
            system: all.system.clone(),
            max_text_tokens: all.max_text_tokens,
            cache_mib: all.cache_mib,
            eval_samples: all.eval_samples,
            eval_drawings: all.eval_drawings,
        }
    }
}

impl StageConfig {
    /// A stage with default values for all optional keys.
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

    /// Share of the steps in which the learning rate rises.
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
        Self::parse(path, include_str!("../configs/demo.toml"), &[], &|_| Ok(()))
    }

    /// Reads and checks a file; `overrides` are `key=value` with dotted keys, values in TOML. Relative paths become
    /// absolute: those in the file are relative to its folder, those in `overrides` to the working directory.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        Self::load_completed(path, overrides, &|_| Ok(()))
    }

    /// The same, but before its values are checked, `complete` may add keys, for example those that weights determine.
    /// Paths that it finds or adds are relative to the folder of the file.
    pub fn load_completed(
        path: &Path,
        overrides: &[String],
        complete: &dyn Fn(&mut toml::Table) -> Result<()>,
    ) -> Result<Self> {
        let mut config = Self::parse(path, &read_text(path)?, overrides, complete)?;
        config.resolve(files::parent(path))?;
        Ok(config)
    }

    /// Makes relative paths absolute: they are relative to the folder `base`.
    pub fn resolve(&mut self, base: &Path) -> Result<()> {
        let data = &mut self.data;
        let mut paths = vec![&mut data.train];
        let given = [&mut data.test, &mut data.images, &mut data.test_images, &mut data.tokenizer];
        let weights = [&mut self.lpips.weights, &mut self.init.llm, &mut self.init.tokenizer];
        paths.extend(given.into_iter().chain(weights).flatten());
        paths.extend(data.mix.iter_mut().flat_map(MixConfig::paths));
        for StageConfig { data, .. } in &mut self.stage {
            let given = [&mut data.train, &mut data.test, &mut data.images, &mut data.test_images];
            paths.extend(given.into_iter().flatten());
            paths.extend(data.mix.iter_mut().flatten().flat_map(MixConfig::paths));
        }
        for path in paths.into_iter().filter(|p| !p.as_os_str().is_empty()) {
            *path = absolute(base, path)?;
        }
        Ok(())
    }

    /// The same without the folders of data and weights, which mean nothing on another machine: of weights, the names of
    /// the files remain, since they say where a model comes from. The text tokenizer stays.
    pub(crate) fn without_paths(&self) -> Self {
        let mut cfg = self.clone();
        for path in [&mut cfg.init.llm, &mut cfg.init.tokenizer, &mut cfg.lpips.weights].into_iter().flatten()
        {
            *path = path.file_name().unwrap_or_default().into();
        }
        let data = &mut cfg.data;
        (data.train, data.test, data.images, data.test_images) = Default::default();
        data.mix.iter_mut().for_each(MixConfig::forget);
        for StageConfig { data, .. } in &mut cfg.stage {
            (data.train, data.test, data.images, data.test_images) = Default::default();
            data.mix.iter_mut().flatten().for_each(MixConfig::forget);
        }
        cfg
    }

    fn parse(
        path: &Path,
        text: &str,
        overrides: &[String],
        complete: &dyn Fn(&mut toml::Table) -> Result<()>,
    ) -> Result<Self> {
        let bad = |text, e| Error::data(path, format!("not a configuration: {}", explain(text, &e)));
        let mut table: toml::Table = toml::from_str(text).map_err(|e| bad(Some(text), e))?;
        // Checked first: other keys may mean something else, or not exist here.
        let format = table.get("format").and_then(toml::Value::as_integer);
        if let Some(Ok(format)) = format.map(u32::try_from) {
            files::check_format(path, format, FORMAT..=FORMAT)?;
        }
        let current = !migrate(&mut table) && overrides.is_empty();
        for o in overrides {
            set(&mut table, o)?;
        }
        let read: Config = match current {
            true => toml::from_str(text).map_err(|e| bad(Some(text), e))?,
            false => {
                let all = table.clone().try_into();
                all.map_err(|e| blame(text, overrides).unwrap_or_else(|| bad(None, e)))?
            }
        };
        let before = table.clone();
        complete(&mut table)?;
        let config = match table == before {
            true => read,
            false => table.try_into().map_err(|e| bad(None, e))?,
        };
        config.check()?;
        Ok(config)
    }

    /// The data of a stage: `[data]` with the stage's own keys.
    pub fn data_of(&self, stage: &StageConfig) -> DataConfig {
        stage.data.over(&self.data)
    }

    /// The element types of the run.
    pub fn precision(&self) -> Result<Precision> {
        Precision::parse(&self.train.precision)
            .ok_or_else(|| Error::config("train.precision", &self.train.precision, "f64, f32 or bf16"))
    }

    /// Fails on values that no model can have, and on sizes that no machine can hold. Every number has a range, chosen
    /// so that sizes, which are products of several, do not overflow.
    pub fn check(&self) -> Result<()> {
        if self.format != Format::default() {
            return Err(Error::config(
                "format",
                self.format.0,
                format!("{FORMAT}, which this program reads"),
            ));
        }
        let (t, q, d, llm) = (&self.tokenizer, &self.quantizer, &self.discriminator, &self.llm);
        let (loss, train, data, sampling) = (&self.loss, &self.train, &self.data, &self.sampling);
        for (key, v, allowed) in [
            ("tokenizer.ch", t.ch, 1..=MAX_WIDTH),
            ("tokenizer.num_res_blocks", t.num_res_blocks, 1..=1024),
            ("tokenizer.z_channels", t.z_channels, 1..=MAX_WIDTH),
            ("tokenizer.norm_groups", t.norm_groups, 1..=MAX_WIDTH),
            ("quantizer.codes", q.codes, 1..=MAX_INDEX),
            ("quantizer.dim", q.dim, 1..=MAX_WIDTH),
            ("discriminator.ndf", d.ndf, 1..=MAX_WIDTH / 8),
            ("llm.vocab", llm.vocab, 1..=MAX_INDEX),
            ("llm.width", llm.width, 1..=MAX_WIDTH),
            ("llm.layers", llm.layers, 1..=4096),
            ("llm.heads", llm.heads, 1..=4096),
            ("llm.kv_heads", llm.kv_heads, 1..=4096),
            ("llm.head_dim", llm.head_dim, 1..=4096),
            ("llm.mlp", llm.mlp, 1..=16 * MAX_WIDTH),
            ("llm.positions", llm.positions, 1..=MAX_INDEX),
            ("train.threads", train.threads, 0..=Cpu::MAX_THREADS),
            ("train.workers", train.workers, 0..=Cpu::MAX_THREADS),
            ("train.save_every", train.save_every, 0..=MAX_COUNT),
            ("train.keep", train.keep, 1..=MAX_COUNT),
            ("train.eval_every", train.eval_every, 0..=MAX_COUNT),
            ("train.usage_window", train.usage_window, 1..=MAX_COUNT),
            ("train.stall_s", train.stall_s, 1..=MAX_COUNT),
            ("sampling.top_k", sampling.top_k, 0..=MAX_INDEX),
        ] {
            count(key, v, allowed)?;
        }
        for &width in &self.lpips.widths {
            count("lpips.widths", width, 1..=MAX_WIDTH)?;
        }
        if !(1..=8).contains(&t.ch_mult.len()) {
            return Err(Error::config("tokenizer.ch_mult", format!("{:?}", t.ch_mult), "1 to 8 factors"));
        }
        for &m in &t.ch_mult {
            count("tokenizer.ch_mult", m, 1..=MAX_WIDTH)?;
            count("tokenizer.ch times tokenizer.ch_mult", t.ch * m, 1..=MAX_WIDTH)?;
            if !(t.ch * m).is_multiple_of(t.norm_groups) {
                let want =
                    format!("a divisor of every width, tokenizer.ch times ch_mult, {} among them", t.ch * m);
                return Err(Error::config("tokenizer.norm_groups", t.norm_groups, want));
            }
        }
        if !llm.heads.is_multiple_of(llm.kv_heads) {
            let want = format!("a divisor of {} llm.heads", llm.heads);
            return Err(Error::config("llm.kv_heads", llm.kv_heads, want));
        }
        if !llm.head_dim.is_multiple_of(2) {
            return Err(Error::config("llm.head_dim", llm.head_dim, "an even number"));
        }
        for (key, v, allowed) in [
            ("tokenizer.norm_eps", t.norm_eps, EPS),
            ("quantizer.beta", q.beta, AMOUNT),
            ("quantizer.temperature", q.temperature, SCALE),
            ("quantizer.entropy_eps", q.entropy_eps, EPS),
            ("quantizer.init_scale", q.init_scale, AMOUNT),
            ("lpips.eps", self.lpips.eps, EPS),
            ("discriminator.lecam_decay", d.lecam_decay, DECAY),
            ("discriminator.slope", d.slope, SHARE),
            ("discriminator.norm_eps", d.norm_eps, EPS),
            ("discriminator.momentum", d.momentum, SHARE),
            ("llm.rms_eps", llm.rms_eps, EPS),
            ("llm.rope_theta", llm.rope_theta, SCALE),
            ("llm.init_std", llm.init_std, AMOUNT),
            ("projector.norm_eps", self.projector.norm_eps, EPS),
            ("loss.alpha", loss.alpha, AMOUNT),
            ("loss.rec", loss.rec, AMOUNT),
            ("loss.quant", loss.quant, AMOUNT),
            ("loss.lpips", loss.lpips, AMOUNT),
            ("loss.gan", loss.gan, AMOUNT),
            ("loss.entropy", loss.entropy, AMOUNT),
            ("loss.lecam", loss.lecam, AMOUNT),
            ("train.lr", train.lr, AMOUNT),
            ("train.adam_eps", train.adam_eps, EPS),
            ("train.weight_decay", train.weight_decay, AMOUNT),
            ("train.clip", train.clip, AMOUNT),
            ("train.warmup", train.warmup, DECAY),
            ("train.ema_decay", train.ema_decay, DECAY),
            ("train.prompt_dropout", train.prompt_dropout, SHARE),
            ("train.range_mib", train.range_mib, MIB),
            ("sampling.temperature", sampling.temperature, AMOUNT),
            ("sampling.top_p", sampling.top_p, PROBABILITY),
            ("sampling.guidance", sampling.guidance, FACTOR),
        ] {
            number(key, v, allowed)?;
        }
        for (key, betas) in [("train.betas", train.betas), ("train.disc_betas", train.disc_betas)] {
            betas.iter().try_for_each(|&b| number(key, b, DECAY))?;
        }
        if self.init.averages && self.init.tokenizer.is_none() {
            return Err(Error::config("init.averages", true, "false without init.tokenizer"));
        }
        self.check_data("data", data)?;
        self.countable("a step with a batch of 1", data, 1)?;
        for (i, s) in self.stage.iter().enumerate() {
            self.check_stage(&format!("stage.{i}"), s)?;
        }
        self.precision()?;
        Ok(())
    }

    /// The same for the pictures of the section that errors call `section`.
    fn check_data(&self, section: &str, data: &DataConfig) -> Result<()> {
        let key = |name: &str| format!("{section}.{name}");
        for (name, v, allowed) in [
            ("train_samples", data.train_samples, 0..=MAX_COUNT),
            ("test_samples", data.test_samples, 0..=MAX_COUNT),
            ("size", data.size, 1..=MAX_SIDE),
            ("text_tokens", data.text_tokens, 1..=MAX_TOKENS),
            ("max_text_tokens", data.max_text_tokens, 1..=MAX_TOKENS),
            ("cache_mib", data.cache_mib, 0..=MAX_COUNT),
            ("eval_samples", data.eval_samples, 0..=MAX_COUNT),
            ("eval_drawings", data.eval_drawings, 0..=MAX_COUNT),
        ] {
            count(&key(name), v, allowed)?;
        }
        let side = self.tokenizer.downsampling();
        if !data.size.is_multiple_of(side) {
            let want = format!("a multiple of {side}, the tokenizer's down-sampling");
            return Err(Error::config(key("size"), data.size, want));
        }
        data.check(section)
    }

    /// Checks a stage; errors name its keys by the prefix `at`.
    fn check_stage(&self, at: &str, s: &StageConfig) -> Result<()> {
        let StageData {
            source,
            train,
            test,
            images,
            test_images,
            columns,
            mix,
            train_samples,
            test_samples,
            ..
        } = &s.data;
        let paths = [train, test, images, test_images].iter().any(|p| p.is_some());
        if !self.data.mix.is_empty()
            && mix.is_none()
            && source.is_none()
            && (paths || columns.is_some() || train_samples.is_some() || test_samples.is_some())
        {
            let want = "the name of the source, since data.mix would be used otherwise";
            return Err(Error::config(format!("{at}.data.source"), "none", want));
        }
        if self.data_of(s).framing == Framing::Buckets {
            if s.accumulate > 1 {
                let want =
                    "1 with data.framing = \"buckets\", since all parts of a batch need equally many tokens";
                return Err(Error::config(format!("{at}.accumulate"), s.accumulate, want));
            }
            if self.discriminator.sync && matches!(s.kind, StageKind::Tokenizer | StageKind::Semantic) {
                let want = "false with data.framing = \"buckets\", since all ranks need equally many pixels";
                return Err(Error::config("discriminator.sync", true, want));
            }
            if s.kind == StageKind::Gen {
                let want = "\"square\" in this stage, since a model is not told the shape of what it draws";
                return Err(Error::config(format!("{at}.data.framing"), "buckets", want));
            }
        }
        let key = |name: &str| format!("{at}.{name}");
        count(&key("steps"), s.steps, 0..=MAX_COUNT)?;
        count(&key("batch"), s.batch, 1..=MAX_BATCH)?;
        count(&key("accumulate"), s.accumulate, 1..=MAX_BATCH)?;
        if !s.batch.is_multiple_of(s.accumulate) {
            let want = format!("a divisor of the batch of {}", s.batch);
            return Err(Error::config(key("accumulate"), s.accumulate, want));
        }
        for (name, share) in [("captions", s.captions), ("answers", s.answers)] {
            number(&key(name), share, SHARE)?;
        }
        if s.kind == StageKind::Gen && s.captions + s.answers >= 1.0 {
            let got = s.captions + s.answers;
            return Err(Error::config(key("captions and answers"), got, "together less than 1"));
        }
        if s.kind == StageKind::Gen && self.visual_head.kind == VisualHeadKind::None {
            let want = format!("tied or linear, as {} is gen", key("kind"));
            return Err(Error::config("visual_head.kind", "none", want));
        }
        let data = self.data_of(s);
        if s.data != StageData::default() {
            self.check_data(&key("data"), &data)?;
        }
        s.warmup.map_or(Ok(()), |share| number(&key("warmup"), share, DECAY))?;
        let whole = GroupConfig {
            lr: s.lr,
            betas: s.betas,
            clip: s.clip,
            weight_decay: s.weight_decay,
            adam_eps: s.adam_eps,
        };
        let named = s.groups.iter().map(|(name, g)| (format!("groups.{name}."), g));
        for (prefix, g) in [(String::new(), &whole)].into_iter().chain(named) {
            for (name, v, allowed) in [
                ("lr", g.lr, AMOUNT),
                ("clip", g.clip, AMOUNT),
                ("weight_decay", g.weight_decay, AMOUNT),
                ("adam_eps", g.adam_eps, EPS),
            ] {
                v.map_or(Ok(()), |v| number(&key(&format!("{prefix}{name}")), v, allowed))?;
            }
            let betas = key(&format!("{prefix}betas"));
            g.betas.iter().flatten().try_for_each(|&b| number(&betas, b, DECAY))?;
        }
        self.countable(&format!("{} of {}", key("batch"), s.batch), &data, s.batch)
    }

    /// Fails if a step of `batch` samples takes more operations than a device can count.
    fn countable(&self, what: &str, data: &DataConfig, batch: usize) -> Result<()> {
        const MOST: f64 = (1u64 << 62) as f64;
        for (keys, each) in self.operations(data) {
            let all = each * batch as f64;
            if all > MOST {
                let want = format!("at most {MOST:.1e}");
                return Err(Error::config(keys, format!("{all:.1e} operations for {what}"), want));
            }
        }
        Ok(())
    }

    /// Floating-point operations of a step for one sample, rounded up generously, with the keys that determine them.
    fn operations(&self, data: &DataConfig) -> [(&'static str, f64); 3] {
        let (t, q, llm) = (&self.tokenizer, &self.quantizer, &self.llm);
        let f = |n: usize| n as f64;
        let side = f(data.size);
        let tokens = (side / f(t.downsampling())).powi(2);
        let mult = t.ch_mult.iter().copied().max().unwrap_or(1);
        let width = f((t.ch * mult).max(t.z_channels));
        // Nine taps, three passes, two operations per multiply-add; three passes of the discriminator, two of VGG16.
        let vgg = self.lpips.widths.iter().map(|&w| 6.0 * 9.0 * f(w).powi(2)).sum::<f64>();
        let blocks = f(t.ch_mult.len() * (4 * t.num_res_blocks + 8));
        let convolutions =
            9.0 * width.powi(2) * blocks + vgg + 3.0 * 5.0 * 16.0 * (8.0 * f(self.discriminator.ndf)).powi(2);
        let pictures = 6.0 * side.powi(2) * convolutions + 20.0 * tokens.powi(2) * width;
        let quantizer = 32.0 * tokens * f(q.dim) * f(q.codes);
        let read = tokens + f(data.text_tokens);
        let attention = 2.0 * f(llm.heads + llm.kv_heads) * f(llm.head_dim);
        let layer = f(llm.width) * (attention + 3.0 * f(llm.mlp)) + 2.0 * read * attention;
        let heads = f(llm.width) * f(llm.vocab) + f(llm.width.max(q.dim)) * f(q.codes);
        [
            (
                "tokenizer.ch, ch_mult, num_res_blocks, z_channels, lpips.widths, discriminator.ndf, data.size",
                pictures,
            ),
            ("quantizer.codes, dim, data.size, tokenizer.ch_mult", quantizer),
            (
                "llm.width, layers, heads, kv_heads, head_dim, mlp, vocab, quantizer.codes, dim, data.text_tokens, size, \
                 tokenizer.ch_mult",
                6.0 * read * f(llm.layers) * layer + 16.0 * read * heads,
            ),
        ]
    }
}

/// Width of a layer; an MLP may be 16 times as wide.
const MAX_WIDTH: usize = 1 << 16;
/// The largest 32-bit index.
const MAX_INDEX: usize = i32::MAX as usize;
/// Steps, samples.
const MAX_COUNT: usize = u32::MAX as usize;
/// Weight of a source in a mixture.
const MAX_WEIGHT: f64 = 1e6;
/// Side of a picture in pixels.
const MAX_SIDE: usize = 1 << 14;
/// Text tokens per sample.
const MAX_TOKENS: usize = 1 << 20;
/// Samples per step.
const MAX_BATCH: usize = 1 << 20;

/// A range of numbers, and its description in errors.
type Allowed = (RangeInclusive<f64>, &'static str);
/// A size in MiB.
const MIB: Allowed = (1e-3..=1e6, "a number from 0.001 to 1e6");
/// A constant that prevents a division by 0 or a logarithm of 0; in single precision it must not be 0 either.
const EPS: Allowed = (1e-30..=1.0, "a number from 1e-30 to 1");
/// A factor that enlarges or shrinks.
const SCALE: Allowed = (1e-12..=1e12, "a number from 1e-12 to 1e12");
const AMOUNT: Allowed = (0.0..=1e9, "a number from 0 to 1e9");
const SHARE: Allowed = (0.0..=1.0, "a share from 0 to 1");
/// Above 0, so that there is something to choose from.
const PROBABILITY: Allowed = (0.0f64.next_up()..=1.0, "a number above 0, at most 1");
const FACTOR: Allowed = (-1e9..=1e9, "a number from -1e9 to 1e9");
const DECAY: Allowed = (0.0..=1.0f64.next_down(), "a number from 0 to below 1");

fn count(key: &str, v: usize, allowed: RangeInclusive<usize>) -> Result<()> {
    match allowed.contains(&v) {
        true => Ok(()),
        false => Err(Error::config(key, v, format!("{} to {}", allowed.start(), allowed.end()))),
    }
}

fn number(key: &str, v: f64, (allowed, text): Allowed) -> Result<()> {
    match allowed.contains(&v) {
        true => Ok(()),
        false => Err(Error::config(key, format!("{v:?}"), text)),
    }
}

/// Describes an error of a configuration in one line; `text` is the file, unless overrides changed its contents.
fn explain(text: Option<&str>, e: &toml::de::Error) -> String {
    let line = |s: &str| s.split_whitespace().collect::<Vec<_>>().join(" ");
    let Some((text, span)) = text.zip(e.span()) else { return line(&e.to_string()) };
    let number = text.get(..span.start).unwrap_or(text).matches('\n').count();
    let at: String = line(text.lines().nth(number).unwrap_or_default()).chars().take(80).collect();
    format!("TOML line {}, `{at}`: {}", number + 1, line(e.message()))
}

/// Brings the keys of a file without a version up to date, and returns whether it has changed any.
fn migrate(table: &mut toml::Table) -> bool {
    if table.contains_key("format") {
        return false;
    }
    // Before version 1, `train.recompute` said whether blocks are recomputed.
    let train = table.get_mut("train").and_then(toml::Value::as_table_mut);
    match train.and_then(|train| train.get_mut("recompute")) {
        Some(value @ toml::Value::Boolean(_)) => {
            let name = if value.as_bool() == Some(true) { Recompute::Blocks } else { Recompute::None }.name();
            *value = toml::Value::String(name.into());
            true
        }
        _ => false,
    }
}

/// The last parts of keys of data with paths as values.
const PATHS: [&str; 5] = ["train", "test", "images", "test_images", "tokenizer"];

/// Whether a dotted key has a path as value.
fn is_path(key: &str) -> bool {
    let key = key.trim();
    let of_data = |(section, last): (&str, &str)| section.contains("data") && PATHS.contains(&last);
    ["lpips.weights", "init.llm", "init.tokenizer"].contains(&key)
        || key.rsplit_once('.').is_some_and(of_data)
}

/// The absolute form of a path that is relative to the folder `base`.
fn absolute(base: &Path, path: &Path) -> Result<PathBuf> {
    std::path::absolute(base.join(path)).map_err(Error::io(path))
}

/// If the file alone is valid: the error of the first override that makes it invalid.
fn blame(text: &str, overrides: &[String]) -> Option<Error> {
    let mut table: toml::Table = toml::from_str(text).ok()?;
    let wrong = |table: &toml::Table| table.clone().try_into::<Config>().err();
    if wrong(&table).is_some() {
        return None;
    }
    let (assignment, e) = overrides.iter().find_map(|o| match set(&mut table, o) {
        Ok(()) => Some((o, wrong(&table)?)),
        Err(_) => None,
    })?;
    let (key, value) = assignment.split_once('=')?;
    let mut want = format!("a valid key and value ({})", e.message());
    // A string was wanted, but TOML reads the value as another type.
    let wanted = e.message().strip_prefix("invalid type").and_then(|m| m.split_once("expected"));
    if wanted.is_some_and(|(_, wanted)| wanted.contains("string")) {
        want += &format!("; to pass this value as a string, quote it: '{key}=\"{value}\"'");
    }
    Some(Error::config("--set", assignment, want))
}

/// Sets a dotted key from `key=value`; list items by number, `stage.0.steps=10`. Paths become absolute.
fn set(table: &mut toml::Table, assignment: &str) -> Result<()> {
    let want = "key=value with a dotted key, as in train.seed=2";
    let (key, value) = assignment.split_once('=').ok_or_else(|| Error::config("--set", assignment, want))?;
    let parsed = toml::from_str::<toml::Table>(&format!("v = {value}"))
        .or_else(|_| toml::from_str(&format!("v = {}", toml::Value::String(value.into()))))
        .map_err(|_| Error::config("--set", assignment, want))?;
    let Some(mut value) = parsed.get("v").cloned() else {
        return Err(Error::config("--set", assignment, want));
    };
    if let toml::Value::String(path) = &mut value
        && is_path(key)
        && !path.is_empty()
    {
        *path = absolute(Path::new(""), Path::new(path))?.to_string_lossy().into_owned();
    }
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
        let s = c.sampling;
        assert_eq!((s.temperature, s.top_k, s.top_p, s.guidance), (1.0, 0, 1.0, 3.0));
    }

    #[test]
    fn drawings_are_sampled_as_the_file_says() {
        let text = "[sampling]\ntemperature = 0\ntop_k = 9\nguidance = -2.5\n";
        let s = load(text, &["sampling.top_p=0.5"]).expect("valid").sampling;
        assert_eq!(s, SamplingConfig { temperature: 0.0, top_k: 9, top_p: 0.5, guidance: -2.5 });
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
    fn a_constant_rate_does_not_rise_unless_it_is_asked_to() {
        let stage = |more: &str| {
            let text = format!("[[stage]]\nkind = \"tokenizer\"\nsteps = 9\nbatch = 1\n{more}");
            let c = load(&text, &[]).expect("valid");
            c.stage[0].warmup(&c.train)
        };
        assert_eq!(stage(""), 0.03);
        assert_eq!(stage("schedule = \"constant\""), 0.0);
        assert_eq!(stage("schedule = \"constant\"\nwarmup = 0.1"), 0.1);
    }

    #[test]
    fn a_stage_has_numbers_of_its_own_and_each_has_its_range() {
        let text = "[[stage]]\nkind = \"semantic\"\nsteps = 9\nbatch = 1\n";
        for (key, bad) in [
            ("warmup", "1.0"),
            ("clip", "-1.0"),
            ("weight_decay", "nan"),
            ("adam_eps", "0.0"),
            ("groups.llm.clip", "inf"),
            ("groups.llm.weight_decay", "-0.1"),
            ("groups.llm.adam_eps", "-1e-8"),
            ("data.size", "0"),
            ("data.text_tokens", "0"),
        ] {
            let e = load(text, &[&format!("stage.0.{key}={bad}")]).expect_err(key).to_string();
            assert!(e.contains(&format!("stage.0.{key}")), "{e}");
        }
        let c = load(text, &["stage.0.data.size=256", "stage.0.data.train='elsewhere'"]).expect("valid");
        let data = c.data_of(&c.stage[0]);
        assert_eq!((data.size, c.data.size), (256, 512));
        assert!(data.train.is_absolute() && data.train.ends_with("elsewhere"));
    }

    #[test]
    fn built_in_data_has_its_limits() {
        let text = "[data]\nsource = \"words\"\nsize = 64\n";
        let c = load(text, &[]).expect("valid");
        assert_eq!((c.data.source, c.data.train_samples, c.data.test_samples), (Source::Words, 4096, 512));
        for (o, want) in [
            ("data.size=32", "`data.size` is 32, wanted 48 or more"),
            ("data.train_samples=0", "`data.train_samples` is 0, wanted 1 or more"),
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
