//! Residual and attention blocks of encoder and decoder.

use crate::autograd::{Tape, Var};
use crate::config::TokenizerConfig;
use crate::error::Result;
use crate::nn::{Conv2d, GroupNorm, Init, Linear, ParamBuilder, Params};
use crate::ops::{self, Conv, Heads, Seqs};

fn one(outs: Vec<Var>) -> Result<Var> {
    Ok(outs.into_iter().next().unwrap_or_else(|| unreachable!("a block of one output has one")))
}

/// Twice GroupNorm, SiLU and a 3x3 convolution, plus the input (through a 1x1 convolution if the width changes).
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

    pub(super) fn forward(&self, t: &Tape, p: &Params, x: &Var) -> Result<Var> {
        let (block, p) = (self.clone(), p.clone());
        one(t.block(&[x], move |t, x| Ok(vec![block.run(t, &p, &x[0])?]))?)
    }

    fn run(&self, t: &Tape, p: &Params, x: &Var) -> Result<Var> {
        let h = self.norm1.forward(t, p, x, true)?;
        let h = self.conv1.forward(t, p, &h)?;
        let h = self.norm2.forward(t, p, &h, true)?;
        let h = self.conv2.forward(t, p, &h)?;
        match &self.shortcut {
            Some(s) => ops::add(t, &s.forward(t, p, x)?, &h),
            None => ops::add(t, x, &h),
        }
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

    pub(super) fn forward(&self, t: &Tape, p: &Params, x: &Var) -> Result<Var> {
        let (block, p) = (self.clone(), p.clone());
        one(t.block(&[x], move |t, x| Ok(vec![block.run(t, &p, &x[0])?]))?)
    }

    fn run(&self, t: &Tape, p: &Params, x: &Var) -> Result<Var> {
        let d = x.dims();
        let h = self.norm.forward(t, p, x, false)?;
        let qkv = self.qkv.forward(t, p, &h)?;
        let seqs = Seqs::new(t.dev(), &vec![d[1] * d[2]; d[0]])?;
        let scale = 1.0 / (self.width as f64).sqrt();
        let heads = Heads { query: 1, kv: 1, dim: self.width, scale, causal: false };
        let h = ops::attention(t, &qkv, &seqs, heads)?;
        let h = self.out.forward(t, p, &ops::reshape(t, &h, d)?)?;
        ops::add(t, x, &h)
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

    pub(super) fn forward(&self, t: &Tape, p: &Params, x: &Var) -> Result<Var> {
        let h = self.block_1.forward(t, p, x)?;
        let h = self.attn_1.forward(t, p, &h)?;
        self.block_2.forward(t, p, &h)
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

    pub(super) fn forward(&self, t: &Tape, p: &Params, x: &Var) -> Result<Var> {
        let mut h = x.clone();
        for (n, block) in self.blocks.iter().enumerate() {
            h = block.forward(t, p, &h)?;
            if let Some(attn) = self.attn.get(n) {
                h = attn.forward(t, p, &h)?;
            }
        }
        Ok(h)
    }
}
