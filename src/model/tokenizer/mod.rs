//! The vision tokenizer: encoder, quantizer and decoder, and the networks of its losses.

mod blocks;
mod discriminator;
mod encoder;
mod lpips;

use crate::autograd::{Tape, Var};
use crate::backend::DType;
use crate::config::{Operands, QuantizerConfig, QuantizerKind, QuantizerMetric, TokenizerConfig};
use crate::error::{Error, Result};
use crate::nn::{Conv2d, Init, Param, ParamBuilder, Params};
use crate::ops::{self, Conv, Entropy, IbqOptions, Quantized};
use crate::tensor::Tensor;
pub use discriminator::{Discriminator, DiscriminatorState};
use encoder::{Decoder, Encoder};
pub use lpips::Lpips;

/// Lower bound of the norm by which rows are divided.
const NORM_EPS: f64 = 1e-12;

/// The token grid of a group of images of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Number of images, B.
    pub images: usize,
    /// Rows of tokens.
    pub h: usize,
    /// Tokens per row.
    pub w: usize,
}

impl Grid {
    /// Number of tokens of all its images.
    pub fn tokens(&self) -> usize {
        self.images * self.h * self.w
    }
}

/// Encoder, codebook, decoder.
pub struct Tokenizer {
    encoder: Encoder,
    quant_conv: Conv2d,
    codebook: Param,
    post_quant_conv: Conv2d,
    decoder: Decoder,
    quantizer: QuantizerConfig,
    downsampling: usize,
}

impl Tokenizer {
    /// Registers encoder and codebook in group `encoder`, the rest in group `decoder`.
    pub fn new(b: &mut ParamBuilder, cfg: &TokenizerConfig, q: &QuantizerConfig) -> Self {
        b.group("encoder");
        let encoder = Encoder::new(b, cfg);
        let quant_conv = Conv2d::new(b, "quant_conv", cfg.z_channels, q.dim, 1, Conv::same(1));
        let init = match q.kind {
            QuantizerKind::Ibq => Init::Normal(0.0, q.init_scale),
            QuantizerKind::Vq => Init::Uniform(1.0 / q.codes as f64),
        };
        let codebook = b.add("quantize.embedding.weight", [q.codes, q.dim], init);
        if q.precision == Operands::F32 {
            b.reads_masters();
        }
        b.group("decoder");
        let post_quant_conv = Conv2d::new(b, "post_quant_conv", q.dim, cfg.z_channels, 1, Conv::same(1));
        let decoder = Decoder::new(b, cfg);
        Tokenizer {
            encoder,
            quant_conv,
            codebook,
            post_quant_conv,
            decoder,
            quantizer: q.clone(),
            downsampling: cfg.downsampling(),
        }
    }

    /// Encodes groups of images of equal size `[B, H, W, 3]` into `z` `[M, D]`, ordered by group, image and row, and
    /// the grid of each group. `z` has the type that `quantizer.precision` asks for. With metric `l2norm` its rows are
    /// unit vectors.
    pub fn encode(&self, t: &Tape, p: &Params, images: &[Var]) -> Result<(Var, Vec<Grid>)> {
        let s = self.downsampling;
        let (mut parts, mut grids) = (Vec::new(), Vec::new());
        for x in images {
            let d = x.dims();
            if d.rank() != 4 || d[3] != 3 || d[1] % s != 0 || d[2] % s != 0 || d.numel() == 0 {
                return Err(Error::arg(
                    "encode",
                    "images",
                    d,
                    format!("[B, H, W, 3], sides multiples of {s}"),
                ));
            }
            let h = self.encoder.forward(t, p, x)?;
            let h = ops::cast(t, &h, self.operands(t))?;
            let h = self.quant_conv.forward(t, p, &h)?;
            grids.push(Grid { images: d[0], h: d[1] / s, w: d[2] / s });
            let rows = [h.dims().rows(), h.dims().cols()];
            parts.push(ops::reshape(t, &h, rows)?);
        }
        let z = match &parts[..] {
            [one] => one.clone(),
            all => ops::concat_rows(t, &all.iter().collect::<Vec<_>>())?,
        };
        Ok((if self.normalised() { ops::l2_norm(t, &z, NORM_EPS)? } else { z }, grids))
    }

    fn normalised(&self) -> bool {
        self.quantizer.kind == QuantizerKind::Ibq && self.quantizer.metric == QuantizerMetric::L2norm
    }

    /// The type of the quantizer's tokens and codes.
    fn operands(&self, t: &Tape) -> DType {
        match self.quantizer.precision {
            Operands::Act => t.precision().act,
            Operands::F32 => t.precision().acc,
        }
    }

    /// The codes `[K, D]` that tokens are compared with, in the type of the tokens: unit vectors with metric `l2norm`.
    pub fn codes(&self, t: &Tape, p: &Params) -> Result<Var> {
        let e = p.var_as(t, self.codebook, self.operands(t))?;
        if self.normalised() { ops::l2_norm(t, &e, NORM_EPS) } else { Ok(e) }
    }

    /// The codes `[K, D]` for decoder and language model, in the type of activations.
    pub fn table(&self, t: &Tape, p: &Params) -> Result<Var> {
        ops::cast(t, &self.codes(t, p)?, t.precision().act)
    }

    /// Quantizes `z` `[M, D]` against `codes` `[K, D]`, which have the same type; `zq` has the type of activations.
    /// `inv_count` is a device scalar, the reciprocal of the number of tokens of all ranks. Without `entropies` neither
    /// entropy is computed.
    pub fn quantize(
        &self,
        t: &Tape,
        z: &Var,
        codes: &Var,
        inv_count: &Tensor,
        entropies: bool,
    ) -> Result<Quantized> {
        let q = &self.quantizer;
        let (beta_commit, beta_code) = q.betas();
        let entropy = entropies.then_some(Entropy { temperature: q.temperature, eps: q.entropy_eps });
        let o = IbqOptions { entropy, beta_commit, beta_code };
        let q = match q.kind {
            QuantizerKind::Ibq => ops::ibq(t, z, codes, inv_count, o),
            QuantizerKind::Vq => ops::vq(t, z, codes, inv_count, o),
        }?;
        Ok(Quantized { zq: ops::cast(t, &q.zq, t.precision().act)?, ..q })
    }

    /// Decodes `zq` `[M, D]` into one tensor `[B, H, W, 3]` per grid, not clamped.
    pub fn decode(&self, t: &Tape, p: &Params, zq: &Var, grids: &[Grid]) -> Result<Vec<Var>> {
        let parts = match grids {
            [_] => vec![zq.clone()],
            _ => ops::split_rows(t, zq, &grids.iter().map(Grid::tokens).collect::<Vec<_>>())?,
        };
        let mut out = Vec::new();
        for (part, g) in parts.iter().zip(grids) {
            let x = ops::reshape(t, part, [g.images, g.h, g.w, zq.dims().cols()])?;
            let h = self.post_quant_conv.forward(t, p, &x)?;
            out.push(self.decoder.forward(t, p, &h)?);
        }
        Ok(out)
    }
}
