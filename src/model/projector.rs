//! The projector from codebook embeddings to the language model's width, and the head that predicts codes.

use crate::autograd::{Tape, Var};
use crate::backend::Unary;
use crate::config::{Config, Gelu, VisualHeadKind};
use crate::error::Result;
use crate::nn::{Init, LayerNorm, Linear, ParamBuilder, Params};
use crate::ops;

/// `fc2(gelu(fc1(x)))`, D to C to C, with an optional LayerNorm in front.
pub struct Projector {
    norm: Option<LayerNorm>,
    fc1: Linear,
    fc2: Linear,
    gelu: Gelu,
}

impl Projector {
    /// Registers `projector.*` in group `projector`.
    pub fn new(b: &mut ParamBuilder, cfg: &Config) -> Self {
        b.group("projector");
        let (d, c) = (cfg.quantizer.dim, cfg.llm.width);
        let linear = |b: &mut ParamBuilder, name: &str, i: usize, o: usize| {
            Linear::new(b, name, i, o, Some(Init::kaiming(i)), Init::kaiming(i))
        };
        Projector {
            norm: cfg.projector.norm.then(|| LayerNorm::new(b, "projector.norm", d, cfg.projector.norm_eps)),
            fc1: linear(b, "projector.fc1", d, c),
            fc2: linear(b, "projector.fc2", c, c),
            gelu: cfg.projector.gelu,
        }
    }

    /// `zq` `[M, D]` to `[M, C]`.
    pub fn forward(&self, t: &Tape, p: &Params, zq: &Var) -> Result<Var> {
        let x = match &self.norm {
            Some(n) => n.forward(t, p, zq)?,
            None => zq.clone(),
        };
        let h = match self.gelu {
            Gelu::Exact => ops::unary(t, &self.fc1.forward(t, p, &x)?, Unary::Gelu)?,
            Gelu::Tanh => self.fc1.forward_gelu(t, p, &x)?,
        };
        self.fc2.forward(t, p, &h)
    }
}

/// The head that predicts codes.
pub enum VisualHead {
    /// A small MLP C to C to D, then dot products with the codebook.
    Tied(Linear, Linear),
    /// A matrix `[K, C]`.
    Linear(crate::nn::Param),
}

impl VisualHead {
    /// Registers `visual_head.*` in group `visual_head`; `None` if the configuration has no head.
    pub fn new(b: &mut ParamBuilder, cfg: &Config) -> Option<Self> {
        b.group("visual_head");
        let (k, d, c) = (cfg.quantizer.codes, cfg.quantizer.dim, cfg.llm.width);
        let init = Init::kaiming(c);
        match cfg.visual_head.kind {
            VisualHeadKind::None => None,
            VisualHeadKind::Tied => Some(VisualHead::Tied(
                Linear::new(b, "visual_head.fc1", c, c, Some(init), init),
                Linear::new(b, "visual_head.fc2", c, d, Some(init), init),
            )),
            VisualHeadKind::Linear => Some(VisualHead::Linear(b.add(
                "visual_head.weight",
                [k, c],
                Init::Normal(0.0, cfg.llm.init_std),
            ))),
        }
    }

    /// The factors of the code logits: features `[N, D or C]` of `hidden` `[N, C]`, and the matrix `[K, D or C]` to
    /// multiply them with. `codes` is the codebook as returned by [`super::tokenizer::Tokenizer::table`].
    pub fn factors(&self, t: &Tape, p: &Params, hidden: &Var, codes: &Var) -> Result<(Var, Var)> {
        match self {
            VisualHead::Tied(fc1, fc2) => {
                let h = ops::unary(t, &fc1.forward(t, p, hidden)?, Unary::Gelu)?;
                Ok((fc2.forward(t, p, &h)?, codes.clone()))
            }
            VisualHead::Linear(w) => Ok((hidden.clone(), p.var(t, *w)?)),
        }
    }
}
