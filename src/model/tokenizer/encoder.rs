//! The VQGAN encoder and decoder of IBQ (arXiv 2412.02692).

use super::blocks::{Image, Level, Middle};
use crate::autograd::{Tape, Var};
use crate::config::TokenizerConfig;
use crate::error::Result;
use crate::nn::{Conv2d, GroupNorm, ParamBuilder, Params};
use crate::ops::Conv;

/// Stride 2 with zero padding on the right and at the bottom only.
const DOWN: Conv = Conv { stride: 2, before: 0, after: 1 };

/// From pictures to latent features.
pub(super) struct Encoder {
    conv_in: Conv2d,
    levels: Vec<(Level, Option<Conv2d>)>,
    middle: Middle,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    pub(super) fn new(b: &mut ParamBuilder, cfg: &TokenizerConfig) -> Self {
        let last = cfg.ch_mult.len() - 1;
        let conv_in = Conv2d::new(b, "encoder.conv_in", 3, cfg.ch, 3, Conv::same(3));
        let mut levels = Vec::new();
        let mut c = cfg.ch;
        for (l, mult) in cfg.ch_mult.iter().enumerate() {
            let o = cfg.ch * mult;
            let name = format!("encoder.down.{l}");
            let level = Level::new(b, &name, (c, o), cfg.num_res_blocks, l == last, cfg);
            let down = (l < last).then(|| Conv2d::new(b, &format!("{name}.downsample.conv"), o, o, 3, DOWN));
            levels.push((level, down));
            c = o;
        }
        Encoder {
            conv_in,
            levels,
            middle: Middle::new(b, "encoder.mid", c, cfg),
            norm_out: GroupNorm::new(b, "encoder.norm_out", c, cfg.norm_groups, cfg.norm_eps),
            conv_out: Conv2d::new(b, "encoder.conv_out", c, cfg.z_channels, 3, Conv::same(3)),
        }
    }

    /// `x` `[B, H, W, 3]` to `[B, h, w, z_channels]`.
    pub(super) fn forward(&self, t: &Tape, p: &Params, x: &Var) -> Result<Var> {
        let first = |l: usize| self.levels.get(l).and_then(|(level, _)| level.first_norm());
        let x = Image { x: x.clone(), stats: None };
        let mut h = Image::conv((t, p), &self.conv_in, &x, None, None, first(0).as_ref())?;
        for (l, (level, down)) in self.levels.iter().enumerate() {
            match down {
                None => h = level.forward(t, p, h, Some(self.middle.first_norm()))?,
                Some(down) => {
                    h = level.forward(t, p, h, None)?;
                    h = Image::conv((t, p), down, &h, None, None, first(l + 1).as_ref())?;
                }
            }
        }
        let h = self.middle.forward(t, p, h, Some(self.norm_out))?;
        Ok(Image::conv((t, p), &self.conv_out, &h, Some(&self.norm_out), None, None)?.x)
    }
}

/// From latent features to pictures.
pub(super) struct Decoder {
    conv_in: Conv2d,
    middle: Middle,
    /// From the lowest resolution up.
    levels: Vec<(Level, Option<Conv2d>)>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    pub(super) fn new(b: &mut ParamBuilder, cfg: &TokenizerConfig) -> Self {
        let last = cfg.ch_mult.len() - 1;
        let mut c = cfg.ch * cfg.ch_mult[last];
        let conv_in = Conv2d::new(b, "decoder.conv_in", cfg.z_channels, c, 3, Conv::same(3));
        let middle = Middle::new(b, "decoder.mid", c, cfg);
        let mut levels = Vec::new();
        for (l, mult) in cfg.ch_mult.iter().enumerate().rev() {
            let o = cfg.ch * mult;
            let name = format!("decoder.up.{l}");
            let level = Level::new(b, &name, (c, o), cfg.num_res_blocks + 1, l == last, cfg);
            let up =
                (l > 0).then(|| Conv2d::new(b, &format!("{name}.upsample.conv"), o, o, 3, Conv::same(3)));
            levels.push((level, up));
            c = o;
        }
        Decoder {
            conv_in,
            middle,
            levels,
            norm_out: GroupNorm::new(b, "decoder.norm_out", c, cfg.norm_groups, cfg.norm_eps),
            conv_out: Conv2d::new(b, "decoder.conv_out", c, 3, 3, Conv::same(3)),
        }
    }

    /// `[B, h, w, z_channels]` to `[B, H, W, 3]`, unclamped.
    pub(super) fn forward(&self, t: &Tape, p: &Params, z: &Var) -> Result<Var> {
        let first = |l: usize| self.levels.get(l).and_then(|(level, _)| level.first_norm());
        let z = Image { x: z.clone(), stats: None };
        let h = Image::conv((t, p), &self.conv_in, &z, None, None, Some(&self.middle.first_norm()))?;
        let mut h = self.middle.forward(t, p, h, first(0))?;
        for (l, (level, up)) in self.levels.iter().enumerate() {
            match up {
                None => h = level.forward(t, p, h, Some(self.norm_out))?,
                Some(up) => {
                    h = level.forward(t, p, h, None)?;
                    let x = up.forward_upsampled(t, p, &h.x)?;
                    h = Image::with_stats(t, x, first(l + 1).as_ref())?;
                }
            }
        }
        Ok(Image::conv((t, p), &self.conv_out, &h, Some(&self.norm_out), None, None)?.x)
    }
}
