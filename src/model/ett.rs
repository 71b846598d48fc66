//! The whole model that ETT (arXiv 2505.10562) trains.

use std::sync::Arc;

use super::tokenizer::{Discriminator, DiscriminatorState, Lpips, Tokenizer};
use super::{Keys, Llm, Packed, Projector, VisualHead};
use crate::autograd::{Tape, Var};
use crate::backend::{DType, Kernels, Metric, Nearest, Pick, Precision, Role, Stream};
use crate::config::{Arm, Config, QuantizerKind, Shard};
use crate::error::{Error, Result};
use crate::nn::{Init, Param, ParamBuilder, Params, Sharing};
use crate::ops;
use crate::tensor::Tensor;

/// How visual tokens enter the language model.
pub enum VisualInput {
    /// Codebook embeddings through the projector (arms `embed` and `ett`).
    Projector(Projector),
    /// An embedding table `[K, C]` indexed by code (arm `index`).
    Table(Param),
}

/// All modules over one set of parameters.
pub struct Ett {
    /// The configuration it was built from.
    pub cfg: Config,
    /// All parameters.
    pub params: Params,
    /// Encoder, codebook, decoder.
    pub tokenizer: Tokenizer,
    /// PatchGAN.
    pub discriminator: Discriminator,
    /// State of the discriminator that is carried from step to step.
    pub discriminator_state: DiscriminatorState,
    /// Perceptual loss.
    pub lpips: Lpips,
    /// Language model.
    pub llm: Llm,
    /// Maps visual tokens to the language model's input.
    pub visual_input: VisualInput,
    /// Head that predicts codes.
    pub visual_head: Option<VisualHead>,
}

/// How the ranks of a device share what is kept per parameter.
fn sharing(cfg: &Config, dev: &dyn Kernels, prec: Precision) -> Sharing {
    let bytes = (cfg.train.range_mib * f64::from(1 << 20)) as usize;
    let shard = cfg.train.shard;
    Sharing::between(dev, bytes, prec.acc.size(), shard != Shard::None, shard == Shard::Gradients)
}

impl Ett {
    /// Builds the model with fresh weights; `arm` decides how visual tokens enter the language model.
    pub fn new(cfg: &Config, dev: Arc<dyn Kernels>) -> Result<Self> {
        Self::without(cfg, dev, &|_| false)
    }

    /// The same without drawing the weights of the public names that are `given`, which are about to be loaded.
    pub fn without(cfg: &Config, dev: Arc<dyn Kernels>, given: &dyn Fn(&str) -> bool) -> Result<Self> {
        cfg.check()?;
        let prec = cfg.precision()?;
        let mut b = ParamBuilder::new();
        b.share(sharing(cfg, &*dev, prec));
        let tokenizer = Tokenizer::new(&mut b, &cfg.tokenizer, &cfg.quantizer);
        let discriminator = Discriminator::new(&mut b, &cfg.discriminator);
        let lpips = Lpips::new(&mut b, &cfg.lpips);
        let llm = Llm::new(&mut b, &cfg.llm);
        let visual_input = match cfg.train.arm {
            Arm::Index => {
                b.group("projector");
                b.group("visual_embed");
                let init = Init::Normal(0.0, cfg.llm.init_std);
                let dims = [cfg.quantizer.codes, cfg.llm.width];
                VisualInput::Table(b.add("visual_embed.weight", dims, init))
            }
            Arm::Embed | Arm::Ett => {
                let projector = Projector::new(&mut b, cfg);
                b.group("visual_embed");
                VisualInput::Projector(projector)
            }
        };
        let visual_head = VisualHead::new(&mut b, cfg);
        let discriminator_state = discriminator.state(&*dev, prec.acc)?;
        let params = b.build_without(dev, prec, cfg.train.seed, given)?;
        Ok(Ett {
            cfg: cfg.clone(),
            params,
            tokenizer,
            discriminator,
            discriminator_state,
            lpips,
            llm,
            visual_input,
            visual_head,
        })
    }

    /// Looks up the codes of a frozen tokenizer: `zq` `[M, D]` and `idx` `[M]` for `z` `[M, D]`, without losses, and
    /// `[1]`, the number of tokens without a finite score.
    pub fn look_up(&self, t: &Tape, z: &Var, codes: &Var) -> Result<(Var, Tensor, Tensor)> {
        let idx = Tensor::empty(t.dev(), Role::Activation, DType::I32, [z.dims()[0]])?;
        let metric = match self.cfg.quantizer.kind {
            QuantizerKind::Ibq => Metric::Dot,
            QuantizerKind::Vq => Metric::L2,
        };
        let bad = t.zero_stat([1])?;
        let (z, e) = (z.value().view(), codes.value().view());
        t.dev().nearest(
            Stream::COMPUTE,
            &Nearest { z, e, idx: idx.out(), score: None, bad: Some(bad.acc()), metric },
        )?;
        let zq = ops::gather(t, codes, &idx)?;
        Ok((ops::cast(t, &zq, t.precision().act)?, idx, bad))
    }

    /// The language model's input for visual tokens, `[M, C]`, from `zq` `[M, D]` and `idx` `[M]`.
    pub fn visual_rows(&self, t: &Tape, zq: &Var, idx: &Tensor) -> Result<Var> {
        match &self.visual_input {
            VisualInput::Projector(p) => p.forward(t, &self.params, zq),
            VisualInput::Table(table) => ops::gather(t, &self.params.var(t, *table)?, idx),
        }
    }

    /// The language model's input for text, `[N, C]`, from `ids` `[N]` i32; zeros where an id is negative.
    pub fn text_rows(&self, t: &Tape, ids: &Tensor) -> Result<Var> {
        ops::gather(t, &self.llm.embedding(t, &self.params)?, ids)
    }

    /// The language model's input for a packed batch, `[N, C]`; `visual` holds the visual rows `[M, C]`.
    pub fn input_rows(&self, t: &Tape, visual: Option<&Var>, b: &Packed) -> Result<Var> {
        let x = self.text_rows(t, &b.text)?;
        match visual {
            Some(v) => ops::add(t, &x, &ops::gather(t, v, &b.visual)?),
            None => Ok(x),
        }
    }

    /// Hidden states `[N, C]` of a packed batch; `visual` holds the visual rows `[M, C]`.
    pub fn hidden(&self, t: &Tape, visual: Option<&Var>, b: &Packed) -> Result<Var> {
        let x = self.input_rows(t, visual, b)?;
        self.llm.forward(t, &self.params, &x, &b.position, Keys::Batch(&b.seqs))
    }

    /// The hidden states that predict supervised tokens, `[n, C]`, and their mean cross-entropy. `inv_tokens` is a
    /// device scalar, the reciprocal of the number of supervised tokens of the whole batch.
    pub fn text_loss(&self, t: &Tape, hidden: &Var, b: &Packed, inv_tokens: &Tensor) -> Result<(Var, Var)> {
        let rows = ops::gather(t, hidden, &b.select)?;
        let head = self.llm.head(t, &self.params)?;
        let loss = ops::linear_cross_entropy(t, &rows, &head, &b.target, inv_tokens)?;
        Ok((rows, loss))
    }

    /// Mean cross-entropy of the codes that a packed batch predicts; `idx` `[M]` i32 are the codes of its pictures.
    /// `inv_codes` is a device scalar, the reciprocal of the number of supervised codes of the whole batch.
    pub fn code_loss(
        &self,
        t: &Tape,
        hidden: &Var,
        b: &Packed,
        idx: &Tensor,
        inv_codes: &Tensor,
    ) -> Result<Var> {
        let target = Tensor::empty(t.dev(), Role::Activation, DType::I32, b.code_of.dims())?;
        t.dev().pick(Stream::COMPUTE, &Pick { x: idx.view(), idx: b.code_of.view(), y: target.out() })?;
        let rows = ops::gather(t, hidden, &b.code_rows)?;
        let codes = self.tokenizer.table(t, &self.params)?;
        let (x, w) = self.head()?.factors(t, &self.params, &rows, &codes)?;
        ops::linear_cross_entropy(t, &x, &w, &target, inv_codes)
    }

    fn head(&self) -> Result<&VisualHead> {
        let none = || Error::config("visual_head.kind", "none", "tied or linear, to predict codes");
        self.visual_head.as_ref().ok_or_else(none)
    }

    /// Logits `[n, K]` of the codes that follow hidden states `[n, C]`; `codes` `[K, D]` as returned by
    /// [`Tokenizer::table`].
    pub fn code_logits(&self, t: &Tape, rows: &Var, codes: &Var) -> Result<Var> {
        let (x, w) = self.head()?.factors(t, &self.params, rows, codes)?;
        ops::linear(t, &x, &w, None)
    }

    /// Logits `[n, V]` of hidden states `[n, C]`, for evaluation.
    pub fn text_logits(&self, t: &Tape, rows: &Var) -> Result<Var> {
        ops::linear(t, rows, &self.llm.head(t, &self.params)?, None)
    }
}
