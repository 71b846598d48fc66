//! Residual and attention blocks of encoder and decoder.

use crate::autograd::{Tape, Var};
use crate::config::TokenizerConfig;
use crate::error::Result;
use crate::nn::{Conv2d, GroupNorm, Init, Linear, ParamBuilder, Params};
use crate::ops::{self, Conv, GroupStats, Heads, Seqs};

/// An image and, if a GroupNorm reads it next, its statistics, which its producer computes on the way out.
#[derive(Clone)]
pub(super) struct Image {
    pub(super) x: Var,
    pub(super) stats: Option<GroupStats>,
}

impl Image {
    /// The output of a convolution of `x`, after `norm` and SiLU if it is given, plus `residual`. `next` is the GroupNorm
    /// that reads the output.
    pub(super) fn conv(
        (t, p): (&Tape, &Params),
        conv: &Conv2d,
        x: &Image,
        norm: Option<&GroupNorm>,
        residual: Option<&Var>,
        next: Option<&GroupNorm>,
    ) -> Result<Self> {
        let stats = match (norm, &x.stats) {
            (Some(norm), None) => Some(norm.stats(t, &x.x)?),
            (_, stats) => stats.clone(),
        };
        let (x, stats) = conv.forward_with(t, p, &x.x, norm.zip(stats.as_ref()), residual, next)?;
        Ok(Image { x, stats })
    }

    /// An image that `next`, if there is one, reads.
    pub(super) fn with_stats(t: &Tape, x: Var, next: Option<&GroupNorm>) -> Result<Self> {
        Ok(Image { stats: next.map(|norm| norm.stats(t, &x)).transpose()?, x })
    }

    fn vars(self) -> Vec<Var> {
        let stats = self.stats.map(|s| [s.mean, s.rstd]);
        std::iter::once(self.x).chain(stats.into_iter().flatten()).collect()
    }

    fn of(vars: &[Var]) -> Self {
        match vars {
            [x, mean, rstd] => {
                Image { x: x.clone(), stats: Some(GroupStats { mean: mean.clone(), rstd: rstd.clone() }) }
            }
            vars => Image { x: vars[0].clone(), stats: None },
        }
    }

    /// Runs a part of the model that may be recomputed; see [`Tape::block`].
    fn block(self, t: &Tape, f: impl Fn(&Tape, &Image) -> Result<Image> + 'static) -> Result<Image> {
        let vars = self.vars();
        let out = t.block(&vars.iter().collect::<Vec<_>>(), move |t, v| Ok(f(t, &Image::of(v))?.vars()))?;
        Ok(Image::of(&out))
    }
}

/// Twice GroupNorm, SiLU and a 3x3 convolution, plus the input (through a 1x1 convolution if the width changes). The
/// convolutions normalise what they read and compute the statistics of what they write, so that the backward needs only
/// the input and the output of the first one.
#[derive(Clone)]
pub(super) struct ResBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Conv2d>,
}

impl ResBlock {
    pub(super) fn new(b: &mut ParamBuilder, name: &str, i: usize, o: usize, cfg: &TokenizerConfig) -> Self {
        let (g, eps) = (cfg.norm_groups, cfg.norm_eps);
        ResBlock {
            norm1: GroupNorm::new(b, &format!("{name}.norm1"), i, g, eps),
            conv1: Conv2d::new(b, &format!("{name}.conv1"), i, o, 3, Conv::same(3)),
            norm2: GroupNorm::new(b, &format!("{name}.norm2"), o, g, eps),
            conv2: Conv2d::new(b, &format!("{name}.conv2"), o, o, 3, Conv::same(3)),
            shortcut: (i != o)
                .then(|| Conv2d::new(b, &format!("{name}.nin_shortcut"), i, o, 1, Conv::same(1))),
        }
    }

    /// The GroupNorm that reads the input.
    pub(super) fn first_norm(&self) -> GroupNorm {
        self.norm1
    }

    /// `next` is the GroupNorm that reads the output.
    pub(super) fn forward(&self, t: &Tape, p: &Params, x: Image, next: Option<GroupNorm>) -> Result<Image> {
        let (block, p) = (self.clone(), p.clone());
        x.block(t, move |t, x| block.run((t, &p), x, next))
    }

    fn run(&self, (t, p): (&Tape, &Params), x: &Image, next: Option<GroupNorm>) -> Result<Image> {
        let h = Image::conv((t, p), &self.conv1, x, Some(&self.norm1), None, Some(&self.norm2))?;
        let skip = match &self.shortcut {
            Some(s) => s.forward(t, p, &x.x)?,
            None => x.x.clone(),
        };
        Image::conv((t, p), &self.conv2, &h, Some(&self.norm2), Some(&skip), next.as_ref())
    }
}

/// Single-head full attention over the positions of each image, plus the input.
#[derive(Clone)]
pub(super) struct AttnBlock {
    norm: GroupNorm,
    qkv: Linear,
    out: Conv2d,
    width: usize,
}

impl AttnBlock {
    pub(super) fn new(b: &mut ParamBuilder, name: &str, c: usize, cfg: &TokenizerConfig) -> Self {
        let parts = ["q", "k", "v"].map(|n| (format!("{name}.{n}"), c));
        let init = Init::kaiming(c);
        AttnBlock {
            norm: GroupNorm::new(b, &format!("{name}.norm"), c, cfg.norm_groups, cfg.norm_eps),
            qkv: Linear::stacked(b, &parts, c, &[c, 1, 1], Some(init), init),
            out: Conv2d::new(b, &format!("{name}.proj_out"), c, c, 1, Conv::same(1)),
            width: c,
        }
    }

    /// `next` is the GroupNorm that reads the output.
    pub(super) fn forward(&self, t: &Tape, p: &Params, x: &Var, next: Option<GroupNorm>) -> Result<Image> {
        let (block, p) = (self.clone(), p.clone());
        let x = Image { x: x.clone(), stats: None };
        x.block(t, move |t, x| block.run(t, &p, &x.x, next))
    }

    fn run(&self, t: &Tape, p: &Params, x: &Var, next: Option<GroupNorm>) -> Result<Image> {
        let d = x.dims();
        let h = self.norm.forward(t, p, x, false)?;
        let qkv = self.qkv.forward(t, p, &h)?;
        let seqs = Seqs::uniform(t.dev(), d[0], d[1] * d[2])?;
        let scale = 1.0 / (self.width as f64).sqrt();
        let heads = Heads { query: 1, kv: 1, dim: self.width, scale, causal: false };
        let h = ops::attention(t, &qkv, &seqs, heads)?;
        let h = Image { x: ops::reshape(t, &h, d)?, stats: None };
        Image::conv((t, p), &self.out, &h, None, Some(x), next.as_ref())
    }
}

/// Residual, attention, residual: the middle of the encoder and the decoder.
pub(super) struct Middle {
    block_1: ResBlock,
    attn_1: AttnBlock,
    block_2: ResBlock,
}

impl Middle {
    pub(super) fn new(b: &mut ParamBuilder, name: &str, c: usize, cfg: &TokenizerConfig) -> Self {
        Middle {
            block_1: ResBlock::new(b, &format!("{name}.block_1"), c, c, cfg),
            attn_1: AttnBlock::new(b, &format!("{name}.attn_1"), c, cfg),
            block_2: ResBlock::new(b, &format!("{name}.block_2"), c, c, cfg),
        }
    }

    /// The GroupNorm that reads the input.
    pub(super) fn first_norm(&self) -> GroupNorm {
        self.block_1.first_norm()
    }

    /// `next` is the GroupNorm that reads the output.
    pub(super) fn forward(&self, t: &Tape, p: &Params, x: Image, next: Option<GroupNorm>) -> Result<Image> {
        let h = self.block_1.forward(t, p, x, None)?;
        let h = self.attn_1.forward(t, p, &h.x, Some(self.block_2.first_norm()))?;
        self.block_2.forward(t, p, h, next)
    }
}

/// The residual blocks of one resolution; at the lowest one each is followed by an attention block.
pub(super) struct Level {
    blocks: Vec<ResBlock>,
    attn: Vec<AttnBlock>,
}

impl Level {
    pub(super) fn new(
        b: &mut ParamBuilder,
        name: &str,
        (i, o): (usize, usize),
        blocks: usize,
        lowest: bool,
        cfg: &TokenizerConfig,
    ) -> Self {
        let mut level = Level { blocks: Vec::new(), attn: Vec::new() };
        for n in 0..blocks {
            let from = if n == 0 { i } else { o };
            level.blocks.push(ResBlock::new(b, &format!("{name}.block.{n}"), from, o, cfg));
            if lowest {
                level.attn.push(AttnBlock::new(b, &format!("{name}.attn.{n}"), o, cfg));
            }
        }
        level
    }

    /// The GroupNorm that reads the input; none without blocks.
    pub(super) fn first_norm(&self) -> Option<GroupNorm> {
        self.blocks.first().map(ResBlock::first_norm)
    }

    /// `next` is the GroupNorm that reads the output.
    pub(super) fn forward(
        &self,
        t: &Tape,
        p: &Params,
        mut h: Image,
        next: Option<GroupNorm>,
    ) -> Result<Image> {
        for (n, block) in self.blocks.iter().enumerate() {
            let next = self.blocks.get(n + 1).map(ResBlock::first_norm).or(next);
            h = match self.attn.get(n) {
                None => block.forward(t, p, h, next)?,
                Some(attn) => {
                    let h = block.forward(t, p, h, None)?;
                    attn.forward(t, p, &h.x, next)?
                }
            };
        }
        Ok(h)
    }
}
