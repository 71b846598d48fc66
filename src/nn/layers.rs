//! Layers: parameters with a forward pass. Constructors register the parameters under their public names.

use super::{Init, Param, ParamBuilder, Params};
use crate::autograd::{Tape, Var};
use crate::error::Result;
use crate::ops::{self, Conv, ConvWith, GroupStats, InputNorm};

/// `y = x w^T + b`.
#[derive(Debug, Clone, Copy)]
pub struct Linear {
    w: Param,
    b: Option<Param>,
}

impl Linear {
    /// Weights `[O, I]` and, if `bias` is given, a bias `[O]` under `name.weight`, `name.bias`.
    pub fn new(b: &mut ParamBuilder, name: &str, i: usize, o: usize, bias: Option<Init>, init: Init) -> Self {
        let w = b.add(&format!("{name}.weight"), [o, i], init);
        let b = bias.map(|init| b.add(&format!("{name}.bias"), [o], init));
        Linear { w, b }
    }

    /// Several public linear layers with the same input as one layer; `names` holds their names and output widths.
    pub fn stacked(
        b: &mut ParamBuilder,
        names: &[(String, usize)],
        i: usize,
        tail: &[usize],
        bias: Option<Init>,
        init: Init,
    ) -> Self {
        let with = |suffix: &str| -> Vec<(String, usize)> {
            names.iter().map(|(n, o)| (format!("{n}.{suffix}"), *o)).collect()
        };
        let w = b.stacked(&with("weight"), Some(i), tail, init);
        let b = bias.map(|init| b.stacked(&with("bias"), None, &[], init));
        Linear { w, b }
    }

    /// `x` `[.., I]` to `[N, O]`.
    pub fn forward(&self, tape: &Tape, p: &Params, x: &Var) -> Result<Var> {
        let w = p.var(tape, self.w)?;
        let b = self.b.map(|b| p.var(tape, b)).transpose()?;
        ops::linear(tape, x, &w, b.as_ref())
    }

    /// [`Linear::forward`] followed by the tanh form of GELU.
    pub fn forward_gelu(&self, tape: &Tape, p: &Params, x: &Var) -> Result<Var> {
        let w = p.var(tape, self.w)?;
        let b = self.b.map(|b| p.var(tape, b)).transpose()?;
        ops::linear_gelu(tape, x, &w, b.as_ref())
    }
}

/// Two-dimensional convolution with an optional bias.
#[derive(Debug, Clone, Copy)]
pub struct Conv2d {
    w: Param,
    b: Option<Param>,
    conv: Conv,
}

impl Conv2d {
    /// Weights `[O, k, k, I]` and bias `[O]` under `name.weight`, `name.bias`, initialised Kaiming-uniform.
    pub fn new(b: &mut ParamBuilder, name: &str, i: usize, o: usize, k: usize, conv: Conv) -> Self {
        let init = Init::kaiming(i * k * k);
        Self::with_init(b, name, i, o, k, conv, init, Some(init))
    }

    /// Like [`Conv2d::new`] with other initial values, and without a bias if `bias` is `None`.
    #[allow(clippy::too_many_arguments)]
    pub fn with_init(
        b: &mut ParamBuilder,
        name: &str,
        i: usize,
        o: usize,
        k: usize,
        conv: Conv,
        init: Init,
        bias: Option<Init>,
    ) -> Self {
        let w = b.conv(&format!("{name}.weight"), o, k, i, init);
        let b = bias.map(|init| b.add(&format!("{name}.bias"), [o], init));
        Conv2d { w, b, conv }
    }

    /// `x` `[B, H, W, I]` to `[B, H', W', O]`, in the type of `x`.
    pub fn forward(&self, tape: &Tape, p: &Params, x: &Var) -> Result<Var> {
        self.apply(tape, p, x, false)
    }

    /// [`Conv2d::forward`] of a 3x3 convolution of padding 1, after upsampling by two: `[B, H, W, I]` to `[B, 2H, 2W, O]`.
    pub fn forward_upsampled(&self, tape: &Tape, p: &Params, x: &Var) -> Result<Var> {
        let var = |q: Param| p.var_as(tape, q, x.value().dtype());
        let (w, b) = (var(self.w)?, self.b.map(var).transpose()?);
        ops::upsample2x_conv2d(tape, x, &w, b.as_ref())
    }

    /// [`Conv2d::forward`]; if `frozen`, no gradient reaches the weights.
    pub fn apply(&self, tape: &Tape, p: &Params, x: &Var, frozen: bool) -> Result<Var> {
        let var = |q: Param| {
            let v = p.var_as(tape, q, x.value().dtype())?;
            Ok(if frozen { v.detach() } else { v })
        };
        let (w, b) = (var(self.w)?, self.b.map(var).transpose()?);
        ops::conv2d(tape, x, &w, b.as_ref(), self.conv)
    }

    /// [`Conv2d::forward`] of `x` after a GroupNorm with these statistics and SiLU, if `norm` is given, plus
    /// `residual`; with the statistics of the output for the GroupNorm `next`.
    pub fn forward_with(
        &self,
        tape: &Tape,
        p: &Params,
        x: &Var,
        norm: Option<(&GroupNorm, &GroupStats)>,
        residual: Option<&Var>,
        next: Option<&GroupNorm>,
    ) -> Result<(Var, Option<GroupStats>)> {
        let var = |q: Param| p.var_as(tape, q, x.value().dtype());
        let (w, b) = (var(self.w)?, self.b.map(var).transpose()?);
        let scale = match norm {
            Some((norm, _)) => Some((var(norm.w)?, var(norm.b)?)),
            None => None,
        };
        let norm = norm.zip(scale.as_ref()).map(|((_, stats), (w, b))| InputNorm { stats, w, b });
        let with = ConvWith { norm, residual, stats: next.map(|n| (n.groups, n.eps)) };
        ops::conv2d_with(tape, x, &w, b.as_ref(), self.conv, with)
    }
}

/// GroupNorm with an optional SiLU.
#[derive(Debug, Clone, Copy)]
pub struct GroupNorm {
    w: Param,
    b: Param,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// Scale 1 and shift 0 `[C]` under `name.weight`, `name.bias`.
    pub fn new(b: &mut ParamBuilder, name: &str, c: usize, groups: usize, eps: f64) -> Self {
        let w = b.add(&format!("{name}.weight"), [c], Init::Constant(1.0));
        let b = b.add(&format!("{name}.bias"), [c], Init::Constant(0.0));
        GroupNorm { w, b, groups, eps }
    }

    /// Normalises `x` `[B, H, W, C]`, then applies SiLU if `silu`.
    pub fn forward(&self, tape: &Tape, p: &Params, x: &Var, silu: bool) -> Result<Var> {
        let (w, b) = (p.var(tape, self.w)?, p.var(tape, self.b)?);
        ops::group_norm(tape, x, &w, &b, self.groups, self.eps, silu)
    }

    /// The statistics of `x` `[B, H, W, C]`, for a convolution that normalises its input.
    pub fn stats(&self, tape: &Tape, x: &Var) -> Result<GroupStats> {
        ops::group_stats(tape, x, self.groups, self.eps)
    }
}

/// LayerNorm.
#[derive(Debug, Clone, Copy)]
pub struct LayerNorm {
    w: Param,
    b: Param,
    eps: f64,
}

impl LayerNorm {
    /// Scale 1 and shift 0 `[C]` under `name.weight`, `name.bias`.
    pub fn new(b: &mut ParamBuilder, name: &str, c: usize, eps: f64) -> Self {
        let w = b.add(&format!("{name}.weight"), [c], Init::Constant(1.0));
        let b = b.add(&format!("{name}.bias"), [c], Init::Constant(0.0));
        LayerNorm { w, b, eps }
    }

    /// Normalises the rows of `x` `[N, C]`.
    pub fn forward(&self, tape: &Tape, p: &Params, x: &Var) -> Result<Var> {
        let (w, b) = (p.var(tape, self.w)?, p.var(tape, self.b)?);
        ops::layer_norm(tape, x, &w, &b, self.eps)
    }
}

/// RMSNorm.
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm {
    w: Param,
    eps: f64,
}

impl RmsNorm {
    /// Scale 1 `[C]` under `name.weight`.
    pub fn new(b: &mut ParamBuilder, name: &str, c: usize, eps: f64) -> Self {
        RmsNorm { w: b.add(&format!("{name}.weight"), [c], Init::Constant(1.0)), eps }
    }

    /// Normalises the rows of `x` `[N, C]`.
    pub fn forward(&self, tape: &Tape, p: &Params, x: &Var) -> Result<Var> {
        ops::rms_norm(tape, x, &p.var(tape, self.w)?, self.eps)
    }

    /// `s = x + residual` and the normalised `s`, both `[N, C]`.
    pub fn add_forward(&self, tape: &Tape, p: &Params, x: &Var, residual: &Var) -> Result<(Var, Var)> {
        ops::add_rms_norm(tape, x, residual, &p.var(tape, self.w)?, self.eps)
    }
}
