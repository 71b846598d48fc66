//! LPIPS (arXiv 1801.03924): distances between unit-normalised VGG16 features, weighted by learned heads.

use crate::autograd::{Tape, Var};
use crate::backend::Unary;
use crate::config::LpipsConfig;
use crate::error::Result;
use crate::nn::{Conv2d, Init, Param, ParamBuilder, Params};
use crate::ops::{self, Conv};
use crate::tensor::Tensor;

/// Position of each convolution in torchvision's `vgg16().features`, block by block.
const SLICES: [&[usize]; 5] = [&[0, 2], &[5, 7], &[10, 12, 14], &[17, 19, 21], &[24, 26, 28]];

/// The frozen perceptual loss.
pub struct Lpips {
    slices: Vec<Vec<Conv2d>>,
    heads: Vec<Param>,
    shift: Param,
    scale: Param,
    eps: f64,
}

impl Lpips {
    /// Registers VGG16 and the heads in group `lpips`. Until weights are loaded, the features are random from a fixed
    /// seed and the heads are 1.
    pub fn new(b: &mut ParamBuilder, cfg: &LpipsConfig) -> Self {
        b.group("lpips");
        let mut slices = Vec::new();
        let mut c = 3;
        for (s, (places, &o)) in SLICES.iter().zip(&cfg.widths).enumerate() {
            let mut convs = Vec::new();
            for place in *places {
                let name = format!("loss.perceptual_loss.net.slice{}.{place}", s + 1);
                // Keeps the variance of activations through ReLU.
                let init = Init::Fixed((2.0 / (9 * c) as f64).sqrt());
                let zero = Some(Init::Constant(0.0));
                convs.push(Conv2d::with_init(b, &name, c, o, 3, Conv::same(3), init, zero));
                c = o;
            }
            slices.push(convs);
        }
        let heads = (0..5)
            .map(|i| {
                let (name, c) = (format!("loss.perceptual_loss.lin{i}.model.1.weight"), cfg.widths[i]);
                b.shaped(&name, [c], &[1, c, 1, 1], Init::Constant(1.0))
            })
            .collect();
        let channel = |b: &mut ParamBuilder, name: &str, v: &'static [f64]| {
            let name = format!("loss.perceptual_loss.scaling_layer.{name}");
            b.shaped(&name, [3], &[1, 3, 1, 1], Init::Values(v))
        };
        let shift = channel(b, "shift", &[-0.030, -0.088, -0.188]);
        let scale = channel(b, "scale", &[0.458, 0.448, 0.450]);
        Lpips { slices, heads, shift, scale, eps: cfg.eps }
    }

    /// Features after the last ReLU of each block, `[B, H/2^l, W/2^l, C_l]`; `x` `[B, H, W, 3]` in [-1, 1].
    pub fn features(&self, t: &Tape, p: &Params, x: &Var) -> Result<Vec<Var>> {
        let (shift, scale) = (p.frozen(t, self.shift)?, p.frozen(t, self.scale)?);
        let mut h = ops::channel_affine(t, x, &shift, &scale)?;
        let mut out = Vec::new();
        for (l, convs) in self.slices.iter().enumerate() {
            if l > 0 {
                h = ops::max_pool2x2(t, &h)?;
            }
            for conv in convs {
                h = ops::unary(t, &conv.forward(t, p, &h)?, Unary::Relu)?;
            }
            out.push(h.clone());
        }
        Ok(out)
    }

    /// The distance of `fake` from `real`, both `[B, H, W, 3]`, summed over images and multiplied by the device
    /// scalar `scale`, the reciprocal of the number of images of the whole batch. Returns one term per layer.
    pub fn distance(&self, t: &Tape, p: &Params, real: &Var, fake: &Var, scale: &Tensor) -> Result<Vec<Var>> {
        let f0 = self.features(t, p, &real.detach())?;
        let f1 = self.features(t, p, fake)?;
        let mut terms = Vec::new();
        for ((a, b), &head) in f0.iter().zip(&f1).zip(&self.heads) {
            let pixels = a.dims()[1] * a.dims()[2];
            if pixels > 0 {
                let w = p.frozen(t, head)?;
                terms.push(ops::lpips_layer(t, a, b, &w, self.eps, scale, 1.0 / pixels as f64)?);
            }
        }
        Ok(terms)
    }
}
