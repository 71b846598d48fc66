//! The table of kernels: every function that a device implements, with its arguments in the order of the C
//! header. Letters: B batch, T tokens of a sequence, N rows of a flat batch, C channels, H heads, D head
//! or code dimension, K codes, M visual tokens, V vocabulary, F MLP width, S sequences, G groups.
//!
//! The text after a field gives its shape, its element type and the other rules of a call, in the grammar of
//! [`super::spec`]. The documentation of the field, the checks of every device, the wrong calls of the conformance
//! tests and the test of the header are all generated from this text. An output must not overlap any other argument of
//! its call, unless its text allows it to be the same tensor.
//!
//! `act` tensors hold the run's activation type, `acc` its accumulator type ([`super::Precision`]);
//! sums are accumulated in `acc`. Calling a kernel again with the same input gives the same bits.

use super::spec::{self, FieldSpec, KernelSpec, Kind};
use super::{Acc, Access, Args, Cost, Device, Field, In, Out, Stream, Value};
use crate::error::Result;

/// Elementwise functions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Unary {
    /// x * sigmoid(x).
    Silu,
    /// x * Phi(x), exact.
    Gelu,
    /// The tanh form of GELU: `x * sigmoid(2u)` with `u = sqrt(2 / pi) (x + 0.044715 x^3)` (arXiv 1606.08415).
    GeluTanh,
    /// max(x, 0); derivative 0 at 0.
    Relu,
    /// x if x > 0, otherwise slope * x.
    LeakyRelu(f64),
}
impl Field for Unary {
    const KIND: Kind = Kind::Unary;
}

/// The score of a code for a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// z . e, larger is better.
    Dot,
    /// -|z - e|^2, larger is better.
    L2,
}
impl Field for Metric {
    const KIND: Kind = Kind::Metric;
}

/// Calls `$cb!` with the table of kernels, to generate code for every kernel.
#[doc(hidden)]
#[macro_export]
macro_rules! kernel_table {
    ($cb:ident) => {
        $cb! {
// ---- products ------------------------------------------------------------------------------------------
/// `y = op(a) op(b) + bias`, where `op` transposes `a` if `ta`, and `b` if `tb`; `op(a)` is `[N, C]`, `op(b)` is
/// `[C, O]`. A linear layer with weights `[O, C]` has `ta = false, tb = true`.
products: matmul(Matmul<'a>) flop |s| 2 * s.y.0.dims.numel() * inner(&s.a, s.ta) => {
    a: In<'a> = "[N, C], or [C, N] if ta; act",
    b: In<'a> = "[C, O], or [O, C] if tb; act",
    /// Transpose `a`.
    ta: bool,
    /// Transpose `b`.
    tb: bool,
    bias: Option<In<'a>> = "[O]; act",
    y: Out<'a> = "[N, O]; act",
}
/// A linear layer followed by the tanh form of GELU: `pre = x w^T + bias`, `y = gelu(pre)`. A device may compute `y`
/// from `pre` before or after it is rounded to act.
products: linear_gelu(LinearGelu<'a>) flop |s| 2 * s.x.dims.numel() * s.w.dims.rows() => {
    x: In<'a> = "[N, C]; act",
    w: In<'a> = "[O, C]; act",
    bias: Option<In<'a>> = "[O]; act",
    pre: Out<'a> = "[N, O]; act",
    y: Out<'a> = "[N, O]; act",
}
/// `y += op(a) op(b)` in the accumulator type, for weight gradients.
products: matmul_acc(MatmulAcc<'a>) flop |s| 2 * s.y.0.dims.numel() * inner(&s.a, s.ta) => {
    a: In<'a> = "[N, C], or [C, N] if ta; act",
    b: In<'a> = "[C, O], or [O, C] if tb; act",
    /// Transpose `a`.
    ta: bool,
    /// Transpose `b`.
    tb: bool,
    y: Acc<'a> = "[N, O]; acc",
}
/// `y[c] += sum_n x[n, c]`, for bias gradients.
products: col_sum(ColSum<'a>) flop |s| s.x.dims.numel() => {
    x: In<'a> = "[N, C]; act",
    y: Acc<'a> = "[C]; acc",
}

// ---- convolution ---------------------------------------------------------------------------------------
/// Two-dimensional convolution with zero padding; the padding at the bottom and right follows from the size of `y`.
/// `y[b,i,j,o] = bias[o] + residual[b,i,j,o] + sum_{u,v,c} a[b, i*stride + u - pad_top, j*stride + v - pad_left, c]
/// w[o,u,v,c]`, where `a` is `x`, or with statistics `SiLU((x - mean) * rstd * gamma + beta)` rounded to act, which is
/// never stored; `a` is 0 outside of the image. `y` is rounded once; `y_mean` and `y_rstd` are the statistics of a
/// GroupNorm of the rounded `y` over `J` groups.
conv: conv2d_fwd(Conv2dFwd<'a>) flop |s| 2 * s.y.0.dims.rows() * s.w.dims.numel() => {
    x: In<'a> = "[B, H, W, C]; act",
    /// Statistics of a GroupNorm of `x`.
    mean: Option<In<'a>> = "[B, G]; acc; without gaps; G divides C",
    rstd: Option<In<'a>> = "[B, G]; acc; without gaps; with mean",
    gamma: Option<In<'a>> = "[C]; act; with mean",
    beta: Option<In<'a>> = "[C]; act; with mean",
    w: In<'a> = "[O, kh, kw, C]; act",
    bias: Option<In<'a>> = "[O]; act",
    residual: Option<In<'a>> = "[B, H', W', O]; act",
    y: Out<'a> = "[B, H', W', O]; act",
    y_mean: Option<Out<'a>> = "[B, J]; acc; without gaps; J divides O",
    y_rstd: Option<Out<'a>> = "[B, J]; acc; without gaps; with y_mean",
    /// Added to the variance of `y`.
    eps: f64 = "if y_mean",
    /// Distance between the inputs of adjacent outputs.
    stride: usize = "at least 1; below 268435456",
    /// Zero rows above.
    pad_top: usize = "below 268435456",
    /// Zero columns to the left.
    pad_left: usize = "below 268435456",
}
/// Gradient of `conv2d_fwd` with respect to its input; with `x`, through SiLU and the GroupNorm and its statistics, plus
/// `skip`. The gradient of the GroupNorm's output is rounded to act on the way.
conv: conv2d_bwd_data(Conv2dBwdData<'a>) flop |s| 2 * s.dy.dims.rows() * s.w.dims.numel() => {
    dy: In<'a> = "[B, H', W', O]; act",
    w: In<'a> = "[O, kh, kw, C]; act",
    /// Added to the gradient of the convolution's input, which then is a transposed convolution of `dy`.
    bias: Option<In<'a>> = "[C]; act",
    /// As in the forward, if it normalised its input.
    x: Option<In<'a>> = "[B, H, W, C]; act",
    mean: Option<In<'a>> = "[B, G]; acc; without gaps; with x; G divides C",
    rstd: Option<In<'a>> = "[B, G]; acc; without gaps; with x",
    gamma: Option<In<'a>> = "[C]; act; with x",
    beta: Option<In<'a>> = "[C]; act; with x",
    /// Added to `dx`: the gradient that `x` gets from elsewhere.
    skip: Option<In<'a>> = "[B, H, W, C]; act; only with x",
    dx: Out<'a> = "[B, H, W, C]; act",
    dgamma: Option<Acc<'a>> = "[C]; acc; only with x",
    dbeta: Option<Acc<'a>> = "[C]; acc; only with x",
    /// As in the forward.
    stride: usize = "at least 1; below 268435456",
    /// As in the forward.
    pad_top: usize = "below 268435456",
    /// As in the forward.
    pad_left: usize = "below 268435456",
}
/// Gradient of `conv2d_fwd` with respect to weights and bias.
conv: conv2d_bwd_weight(Conv2dBwdWeight<'a>) flop |s| 2 * s.dy.dims.rows() * s.dw.0.dims.numel() => {
    x: In<'a> = "[B, H, W, C]; act",
    /// As in the forward: `x` is normalised again.
    mean: Option<In<'a>> = "[B, G]; acc; without gaps; G divides C",
    rstd: Option<In<'a>> = "[B, G]; acc; without gaps; with mean",
    gamma: Option<In<'a>> = "[C]; act; with mean",
    beta: Option<In<'a>> = "[C]; act; with mean",
    dy: In<'a> = "[B, H', W', O]; act",
    dw: Acc<'a> = "[O, kh, kw, C]; acc",
    db: Option<Acc<'a>> = "[O]; acc",
    /// As in the forward.
    stride: usize = "at least 1; below 268435456",
    /// As in the forward.
    pad_top: usize = "below 268435456",
    /// As in the forward.
    pad_left: usize = "below 268435456",
}
/// The weights of the transposed convolution of stride 2 and padding 1, `conv2d_bwd_data`, that equals `upsample2x_fwd` and
/// then the 3x3 convolution of padding 1 by `w`: `v[c,t,s,o]` is the sum of `w[o,i,j,c]` over `i` in `I(t)` and `j` in
/// `I(s)`, with `I(0) = {2}`, `I(1) = {1, 2}`, `I(2) = {0, 1}` and `I(3) = {0}`.
conv: upsample2x_weights_fwd(Upsample2xWeightsFwd<'a>) flop |s| 3 * s.v.0.dims.numel() => {
    w: In<'a> = "[O, 3, 3, C]; act",
    v: Out<'a> = "[C, 4, 4, O]; act",
}
/// Gradient of `upsample2x_weights_fwd`: every element of `dw` gets the sum of four elements of `dv`.
conv: upsample2x_weights_bwd(Upsample2xWeightsBwd<'a>) flop |s| 4 * s.dw.0.dims.numel() => {
    dv: In<'a> = "[C, 4, 4, O]; acc",
    dw: Acc<'a> = "[O, 3, 3, C]; acc",
}
/// `y[b, i, j, c] = x[b, i/2, j/2, c]`: nearest-neighbour upsampling by a factor of two.
resample: upsample2x_fwd(Upsample2xFwd<'a>) flop |s| s.y.0.dims.numel() => {
    x: In<'a> = "[B, H, W, C]; act",
    y: Out<'a> = "[B, 2H, 2W, C]; act",
}
/// Gradient of `upsample2x_fwd`: each element of `dx` is the sum of four elements of `dy`.
resample: upsample2x_bwd(Upsample2xBwd<'a>) flop |s| s.dy.dims.numel() => {
    dy: In<'a> = "[B, 2H, 2W, C]; act",
    dx: Out<'a> = "[B, H, W, C]; act",
}
/// Maximum over 2x2 windows with stride 2; the last row or column of an odd size is ignored.
resample: max_pool2x2_fwd(MaxPool2x2Fwd<'a>) flop |s| s.x.dims.numel() => {
    x: In<'a> = "[B, H, W, C]; act",
    y: Out<'a> = "[B, H/2, W/2, C]; act",
}
/// Gradient of `max_pool2x2_fwd`. Of equal maxima, the first in row order gets the gradient; ignored rows and columns
/// get 0.
resample: max_pool2x2_bwd(MaxPool2x2Bwd<'a>) flop |s| s.x.dims.numel() => {
    dy: In<'a> = "[B, H/2, W/2, C]; act",
    x: In<'a> = "[B, H, W, C]; act",
    dx: Out<'a> = "[B, H, W, C]; act",
}

// ---- norms ---------------------------------------------------------------------------------------------
/// GroupNorm over `G` groups of channels, followed by SiLU if `silu`: `y = f((x - mean) * rstd * w + b)` with
/// `rstd = 1 / sqrt(var + eps)` and the biased variance.
norm: group_norm_fwd(GroupNormFwd<'a>) flop |s| 8 * s.x.dims.numel() => {
    x: In<'a> = "[B, H, W, C]; act",
    w: In<'a> = "[C]; act",
    b: In<'a> = "[C]; act",
    y: Out<'a> = "[B, H, W, C]; act",
    mean: Out<'a> = "[B, G]; acc; without gaps; G divides C",
    rstd: Out<'a> = "[B, G]; acc; without gaps",
    /// Added to the variance.
    eps: f64,
    /// Apply SiLU.
    silu: bool,
}
/// Statistics of a GroupNorm, for kernels that normalise what they read.
norm: group_norm_stats(GroupNormStats<'a>) flop |s| 4 * s.x.dims.numel() => {
    x: In<'a> = "[B, H, W, C]; act",
    mean: Out<'a> = "[B, G]; acc; without gaps; G divides C",
    rstd: Out<'a> = "[B, G]; acc; without gaps",
    /// Added to the variance.
    eps: f64,
}
/// Gradient of `group_norm_fwd`; the normalised values are recomputed from `x`.
norm: group_norm_bwd(GroupNormBwd<'a>) flop |s| 16 * s.x.dims.numel() => {
    dy: In<'a> = "[B, H, W, C]; act",
    x: In<'a> = "[B, H, W, C]; act",
    w: In<'a> = "[C]; act",
    b: In<'a> = "[C]; act",
    mean: In<'a> = "[B, G]; acc; without gaps; G divides C",
    rstd: In<'a> = "[B, G]; acc; without gaps",
    dx: Out<'a> = "[B, H, W, C]; act",
    dw: Option<Acc<'a>> = "[C]; acc",
    db: Option<Acc<'a>> = "[C]; acc",
    /// Whether SiLU was applied.
    silu: bool,
}
/// `y = s * rstd * w` with `rstd = 1 / sqrt(mean(s^2) + eps)`, where `s = x + residual`, or `x` without a residual. `s`
/// is rounded to act before `rstd` is computed, and `s * rstd` before it is multiplied by `w`.
norm: rms_norm_fwd(RmsNormFwd<'a>) flop |s| 4 * s.x.dims.numel() => {
    x: In<'a> = "[N, C]; act",
    residual: Option<In<'a>> = "[N, C]; act",
    w: In<'a> = "[C]; act",
    /// The sum.
    sum: Option<Out<'a>> = "[N, C]; act; with residual",
    y: Out<'a> = "[N, C]; act",
    rstd: Out<'a> = "[N]; acc",
    /// Added to the mean square.
    eps: f64,
}
/// Gradient of `rms_norm_fwd` with respect to `s`, and therefore to both summands: `dx = (dy/ds)^T dy + dsum`.
norm: rms_norm_bwd(RmsNormBwd<'a>) flop |s| 8 * s.x.dims.numel() => {
    dy: In<'a> = "[N, C]; act",
    /// Gradient of `sum` from its other uses.
    dsum: Option<In<'a>> = "[N, C]; act",
    /// `s` of the forward.
    x: In<'a> = "[N, C]; act",
    w: In<'a> = "[C]; act",
    rstd: In<'a> = "[N]; acc",
    dx: Out<'a> = "[N, C]; act",
    dw: Option<Acc<'a>> = "[C]; acc",
}
/// LayerNorm over the last dimension: `y = (x - mean) * rstd * w + b` with `rstd = 1 / sqrt(var + eps)` and the biased
/// variance.
norm: layer_norm_fwd(LayerNormFwd<'a>) flop |s| 6 * s.x.dims.numel() => {
    x: In<'a> = "[N, C]; act",
    w: In<'a> = "[C]; act",
    b: In<'a> = "[C]; act",
    y: Out<'a> = "[N, C]; act",
    mean: Out<'a> = "[N]; acc",
    rstd: Out<'a> = "[N]; acc",
    /// Added to the variance.
    eps: f64,
}
/// Gradient of `layer_norm_fwd`.
norm: layer_norm_bwd(LayerNormBwd<'a>) flop |s| 10 * s.x.dims.numel() => {
    dy: In<'a> = "[N, C]; act",
    x: In<'a> = "[N, C]; act",
    w: In<'a> = "[C]; act",
    mean: In<'a> = "[N]; acc",
    rstd: In<'a> = "[N]; acc",
    dx: Out<'a> = "[N, C]; act",
    dw: Option<Acc<'a>> = "[C]; acc",
    db: Option<Acc<'a>> = "[C]; acc",
}
/// BatchNorm with the statistics of this batch, followed by LeakyReLU (none with `slope` 1).
norm: batch_norm_fwd(BatchNormFwd<'a>) flop |s| 8 * s.x.dims.numel() => {
    /// Rows are all pixels of the batch.
    x: In<'a> = "[N, C]; act",
    w: In<'a> = "[C]; act",
    b: In<'a> = "[C]; act",
    y: Out<'a> = "[N, C]; act",
    mean: Out<'a> = "[C]; acc",
    /// Biased.
    var: Out<'a> = "[C]; acc",
    /// Added to the variance.
    eps: f64,
    /// Slope below zero.
    slope: f64,
}
/// Gradient of `batch_norm_fwd`, including the path through the statistics.
norm: batch_norm_bwd(BatchNormBwd<'a>) flop |s| 16 * s.x.dims.numel() => {
    dy: In<'a> = "[N, C]; act",
    x: In<'a> = "[N, C]; act",
    w: In<'a> = "[C]; act",
    b: In<'a> = "[C]; act",
    mean: In<'a> = "[C]; acc",
    /// Biased.
    var: In<'a> = "[C]; acc",
    dx: Out<'a> = "[N, C]; act",
    dw: Option<Acc<'a>> = "[C]; acc",
    db: Option<Acc<'a>> = "[C]; acc",
    /// As in the forward.
    eps: f64,
    /// As in the forward.
    slope: f64,
}
/// BatchNorm with given statistics, such as the running ones, followed by LeakyReLU (none with `slope` 1):
/// `y = leaky((x - mean) * rstd * w + b)` with `rstd = 1 / sqrt(var + eps)`.
norm: batch_norm_eval_fwd(BatchNormEvalFwd<'a>) flop |s| 6 * s.x.dims.numel() => {
    x: In<'a> = "[N, C]; act",
    w: In<'a> = "[C]; act",
    b: In<'a> = "[C]; act",
    mean: In<'a> = "[C]; acc",
    var: In<'a> = "[C]; acc",
    y: Out<'a> = "[N, C]; act",
    /// Added to the variance.
    eps: f64,
    /// Slope below zero.
    slope: f64,
}
/// Gradient of `batch_norm_eval_fwd`; the statistics are constants.
norm: batch_norm_eval_bwd(BatchNormEvalBwd<'a>) flop |s| 10 * s.x.dims.numel() => {
    dy: In<'a> = "[N, C]; act",
    x: In<'a> = "[N, C]; act",
    w: In<'a> = "[C]; act",
    b: In<'a> = "[C]; act",
    mean: In<'a> = "[C]; acc",
    var: In<'a> = "[C]; acc",
    dx: Out<'a> = "[N, C]; act",
    dw: Option<Acc<'a>> = "[C]; acc",
    db: Option<Acc<'a>> = "[C]; acc",
    /// As in the forward.
    eps: f64,
    /// As in the forward.
    slope: f64,
}
/// Statistics of `R` sets of equally many rows as those of all their rows: the mean of the means, and the mean of
/// `var + (mean - mean of all)^2`.
norm: batch_norm_merge(BatchNormMerge<'a>) flop |s| 5 * s.means.dims.numel() => {
    means: In<'a> = "[R, C]; acc",
    /// Biased.
    vars: In<'a> = "[R, C]; acc",
    mean: Out<'a> = "[C]; acc",
    /// Biased.
    var: Out<'a> = "[C]; acc",
}
/// `dx` of `batch_norm_bwd` for some of the rows that the statistics were computed from, with sums over all of them: `dx =
/// rstd * w * (g - sum(g) / rows - xhat * sum(g * xhat) / rows)`, where `xhat = (x - mean) * rstd` and `g` is `dy` times
/// the derivative of LeakyReLU at `xhat * w + b`.
norm: batch_norm_merged_bwd(BatchNormMergedBwd<'a>) flop |s| 12 * s.x.dims.numel() => {
    dy: In<'a> = "[N, C]; act",
    x: In<'a> = "[N, C]; act",
    w: In<'a> = "[C]; act",
    b: In<'a> = "[C]; act",
    mean: In<'a> = "[C]; acc",
    /// Biased.
    var: In<'a> = "[C]; acc",
    /// The sums of `g` and of `g * xhat` over all rows: what `batch_norm_eval_bwd` adds to `db` and `dw`.
    sums: In<'a> = "[2, C]; acc; without gaps",
    dx: Out<'a> = "[N, C]; act",
    /// Number of all rows.
    rows: usize = "at least 1",
    /// As in the forward.
    eps: f64,
    /// As in the forward.
    slope: f64,
}
/// `running = (1 - momentum) * running + momentum * batch`, with the unbiased estimate of the variance. A running value
/// does not change if the batch value is non-finite.
norm: batch_norm_running(BatchNormRunning<'a>) flop |s| 4 * s.mean.dims.numel() => {
    mean: In<'a> = "[C]; acc",
    /// Biased.
    var: In<'a> = "[C]; acc",
    /// Updated.
    running_mean: Acc<'a> = "[C]; acc",
    /// Updated.
    running_var: Acc<'a> = "[C]; acc",
    /// Number of rows that the statistics were computed from.
    rows: usize,
    /// Weight of the new value.
    momentum: f64,
}
/// `y = x / max(|x|, eps)` for every row.
norm: l2_norm_fwd(L2NormFwd<'a>) flop |s| 3 * s.x.dims.numel() => {
    x: In<'a> = "[N, D]; act",
    y: Out<'a> = "[N, D]; act",
    /// `max(|x|, eps)`.
    norm: Out<'a> = "[N]; acc",
    /// Lower bound of the norm.
    eps: f64,
}
/// Gradient of `l2_norm_fwd`: `(dy - y (y . dy)) / norm`, or `dy / norm` for rows whose norm is at most eps.
/// Exactly one of `dx` and `dx_acc` is present.
norm: l2_norm_bwd(L2NormBwd<'a>) flop |s| 5 * s.x.dims.numel() => {
    dy: In<'a> = "[N, D]; act or acc",
    x: In<'a> = "[N, D]; act",
    norm: In<'a> = "[N]; acc",
    dx: Option<Out<'a>> = "[N, D]; act",
    dx_acc: Option<Acc<'a>> = "[N, D]; acc; unless dx",
    /// As in the forward.
    eps: f64,
}

// ---- pointwise -----------------------------------------------------------------------------------------
/// `y = f(x)`.
pointwise: unary_fwd(UnaryFwd<'a>) flop |s| 4 * s.x.dims.numel() => {
    x: In<'a> = "[..]; act",
    y: Out<'a> = "[..]; act",
    /// The function.
    f: Unary,
}
/// `dx = dy * f'(x)`.
pointwise: unary_bwd(UnaryBwd<'a>) flop |s| 8 * s.x.dims.numel() => {
    dy: In<'a> = "[..]; act",
    x: In<'a> = "[..]; act",
    dx: Out<'a> = "[..]; act",
    /// The function.
    f: Unary,
}
/// `y = a + b`.
pointwise: add(Add<'a>) flop |s| s.a.dims.numel() => {
    a: In<'a> = "[..]; act",
    b: In<'a> = "[..]; act",
    y: Out<'a> = "[..]; act",
}
/// `y += x`; the element types may differ.
pointwise: accumulate(Accumulate<'a>) flop |s| s.x.dims.numel() => {
    x: In<'a> = "[N, C]; any float",
    y: Acc<'a> = "[N, C]; any float",
}
/// `y = x`, rounded to the type of `y`; both may be column slices.
pointwise: cast(Cast<'a>) flop |_s| 0 => {
    x: In<'a> = "[N, C]; any float",
    y: Out<'a> = "[N, C]; any float",
}
/// `y = x / 127.5 - 1`: the bytes of pictures, as values in [-1, 1].
pointwise: scale_bytes(ScaleBytes<'a>) flop |s| 2 * s.x.dims.numel() => {
    x: In<'a> = "[..]; u8",
    y: Out<'a> = "[..]; act",
}
/// `y = value`.
pointwise: fill(Fill<'a>) flop |_s| 0 => {
    y: Out<'a> = "[..]; any type",
    /// The value.
    value: f64,
}
/// `y = (x - shift) / scale` for every channel.
pointwise: channel_affine_fwd(ChannelAffineFwd<'a>) flop |s| 2 * s.x.dims.numel() => {
    x: In<'a> = "[N, C]; act",
    shift: In<'a> = "[C]; act",
    scale: In<'a> = "[C]; act",
    y: Out<'a> = "[N, C]; act",
}
/// `dx = dy / scale`.
pointwise: channel_affine_bwd(ChannelAffineBwd<'a>) flop |s| s.dy.dims.numel() => {
    dy: In<'a> = "[N, C]; act",
    scale: In<'a> = "[C]; act",
    dx: Out<'a> = "[N, C]; act",
}
/// `y = silu(gate) * up`.
pointwise: swiglu_fwd(SwigluFwd<'a>) flop |s| 5 * s.y.0.dims.numel() => {
    /// Gate, then up.
    gate_up: In<'a> = "[N, 2F]; act",
    y: Out<'a> = "[N, F]; act",
}
/// Gradient of `swiglu_fwd`.
pointwise: swiglu_bwd(SwigluBwd<'a>) flop |s| 10 * s.dy.dims.numel() => {
    dy: In<'a> = "[N, F]; act",
    gate_up: In<'a> = "[N, 2F]; act",
    dgate_up: Out<'a> = "[N, 2F]; act; may be gate_up",
}
/// Rotary embedding of split halves: in each of the first `heads` heads of `D` columns, dimensions `d` and `d + D/2`
/// are rotated by the angle `position * theta^(-2d/D)`; the remaining columns are copied. The gradient is the inverse
/// rotation.
pointwise: rope(Rope<'a>) flop |s| 3 * s.x.dims.numel() => {
    x: In<'a> = "[N, C]; act; C at least heads*head_dim",
    position: In<'a> = "[N]; i32",
    y: Out<'a> = "[N, C]; act",
    /// Heads to rotate.
    heads: usize,
    /// Head dimension.
    head_dim: usize = "even; at least 2",
    /// Base of the angles, which are computed in f32 (in f64 by the reference implementation).
    theta: f64,
    /// Rotate backwards.
    inverse: bool,
}

// ---- rows ----------------------------------------------------------------------------------------------
/// `y[n] = table[idx[n]]`; a negative index gives a row of zeros.
gather: gather_fwd(GatherFwd<'a>) flop |_s| 0 => {
    table: In<'a> = "[R, C]; act",
    idx: In<'a> = "[N]; i32; values below R",
    y: Out<'a> = "[N, C]; act",
}
/// `dtable[idx[n]] += dy[n]`, in the order of `n`; negative indices are skipped.
gather: gather_bwd(GatherBwd<'a>) flop |s| s.dy.dims.numel() => {
    dy: In<'a> = "[N, C]; act",
    idx: In<'a> = "[N]; i32; values below R",
    dtable: Acc<'a> = "[R, C]; acc",
}
/// `y[idx[n]] = x[n]`; negative indices are skipped, and the other rows of `y` keep their values. No row has two
/// indices.
gather: put_rows(PutRows<'a>) flop |_s| 0 => {
    x: In<'a> = "[N, C]; any type",
    idx: In<'a> = "[N]; i32; values below R",
    y: Acc<'a> = "[R, C]; type of x",
}
/// `y[n] = x[idx[n]]`, integers instead of rows; a negative index gives -1.
gather: pick(Pick<'a>) flop |_s| 0 => {
    x: In<'a> = "[R]; i32",
    idx: In<'a> = "[N]; i32; values below R",
    y: Out<'a> = "[N]; i32",
}
/// `x[n] += 1`, which wraps: positions, lengths and step counts that a recorded step moves on by itself. Nothing
/// changes if `norm[1] > 0`.
gather: count_up(CountUp<'a>) flop |_s| 0 => {
    x: Acc<'a> = "[N]; i32",
    /// As for `adamw`: a step that is skipped does not count.
    norm: Option<In<'a>> = "[2]; acc",
}
/// `y[n] = n * step`: the offsets of sequences of equal length.
gather: arange(Arange<'a>) flop |_s| 0 => {
    y: Out<'a> = "[N]; i32",
    /// Difference between neighbours; the last value has to be below 2^31.
    step: usize = "at most 2147483647",
}

// ---- attention -----------------------------------------------------------------------------------------
/// Softmax attention over a flat batch of sequences; query head `h` uses key/value head `h / (heads/kv_heads)`. A
/// causal mask aligns the ends of queries and keys: query `i` of `T` attends to keys `0` to `i + Tk - T`. Rows of `k`
/// and `v` outside of the sequences are not read.
attention: attention_fwd(AttentionFwd<'a>) flop |s| attention_flop(2, s.max_q, s.max_k, s.cu_q, s.heads, s.head_dim, s.causal) => {
    q: In<'a> = "[N, heads*head_dim]; act",
    k: In<'a> = "[Nk, kv_heads*head_dim]; act",
    v: In<'a> = "[Nk, kv_heads*head_dim]; act",
    /// Sequence offsets into N. Rows past the last offset are padding: `y` is 0 there.
    cu_q: In<'a> = "[S+1]; i32; values at most N",
    /// Sequence offsets into Nk.
    cu_k: In<'a> = "[S+1]; i32",
    /// Keys of each sequence. Sequence s then has the rows `[cu_k[s], cu_k[s] + len_k[s])` of `k` and `v`, as in a
    /// cache with free rows after each sequence, and the last offset of `cu_k` is ignored.
    len_k: Option<In<'a>> = "[S]; i32",
    y: Out<'a> = "[N, heads*head_dim]; act",
    /// Log-sum-exp of the scaled scores.
    lse: Out<'a> = "[N, heads]; acc",
    /// Query heads.
    heads: usize,
    /// Key/value heads.
    kv_heads: usize = "divides heads",
    /// Head dimension.
    head_dim: usize = "at least 1",
    /// Longest query sequence.
    max_q: usize,
    /// Longest key sequence; with `len_k` the most keys that a sequence may have, now or when a recorded call is
    /// replayed.
    max_k: usize,
    /// Factor on the scores.
    scale: f64,
    /// Use a causal mask.
    causal: bool,
}
/// Gradient of `attention_fwd`; the probabilities are recomputed from `lse`.
attention: attention_bwd(AttentionBwd<'a>) flop |s| attention_flop(5, s.max_q, s.max_k, s.cu_q, s.heads, s.head_dim, s.causal) => {
    dy: In<'a> = "[N, heads*head_dim]; act",
    q: In<'a> = "[N, heads*head_dim]; act",
    k: In<'a> = "[Nk, kv_heads*head_dim]; act",
    v: In<'a> = "[Nk, kv_heads*head_dim]; act",
    /// The forward's output.
    y: In<'a> = "[N, heads*head_dim]; act",
    lse: In<'a> = "[N, heads]; acc",
    /// As in the forward.
    cu_q: In<'a> = "[S+1]; i32; values at most N",
    /// As in the forward.
    cu_k: In<'a> = "[S+1]; i32",
    /// 0 in padding rows.
    dq: Out<'a> = "[N, heads*head_dim]; act",
    /// 0 in padding rows.
    dk: Out<'a> = "[Nk, kv_heads*head_dim]; act",
    /// 0 in padding rows.
    dv: Out<'a> = "[Nk, kv_heads*head_dim]; act",
    /// As in the forward.
    heads: usize,
    /// As in the forward.
    kv_heads: usize = "divides heads",
    /// As in the forward.
    head_dim: usize = "at least 1",
    /// As in the forward.
    max_q: usize,
    /// As in the forward.
    max_k: usize,
    /// As in the forward.
    scale: f64,
    /// As in the forward.
    causal: bool,
}

// ---- losses --------------------------------------------------------------------------------------------
/// Cross-entropy of a linear layer: `loss = scale * sum_n (lse_n - x_n . w[target_n])` over rows with `target >= 0`,
/// where `lse_n` is the log-sum-exp of the logits `x_n . w`. Logits are computed tile by tile and not stored.
loss: linear_xent_fwd(LinearXentFwd<'a>) flop |s| 2 * s.x.dims.numel() * s.w.dims.rows() => {
    x: In<'a> = "[N, C]; act",
    w: In<'a> = "[V, C]; act",
    /// Negative in unsupervised rows.
    target: In<'a> = "[N]; i32; values below V",
    /// One over the supervised rows of the whole batch.
    scale: In<'a> = "[1]; acc",
    /// Log-sum-exp, 0 in unsupervised rows.
    lse: Out<'a> = "[N]; acc",
    loss: Out<'a> = "[1]; acc",
}
/// Gradient of `linear_xent_fwd`; the logits are recomputed tile by tile.
loss: linear_xent_bwd(LinearXentBwd<'a>) flop |s| 6 * s.x.dims.numel() * s.w.dims.rows() => {
    x: In<'a> = "[N, C]; act",
    w: In<'a> = "[V, C]; act",
    target: In<'a> = "[N]; i32; values below V",
    scale: In<'a> = "[1]; acc",
    lse: In<'a> = "[N]; acc",
    /// Gradient of the loss.
    g: In<'a> = "[1]; acc",
    /// 0 in unsupervised rows.
    dx: Out<'a> = "[N, C]; act",
    dw: Option<Acc<'a>> = "[V, C]; acc",
}
/// Cross-entropy of stored logits: `loss += scale * sum_n weight_n (lse_n - logits[n, target_n])` over rows with
/// `target >= 0`, where `lse_n` is the log-sum-exp of row `n`.
loss: xent_fwd(XentFwd<'a>) flop |s| 4 * s.logits.dims.numel() => {
    logits: In<'a> = "[N, V]; act",
    /// Negative in ignored rows.
    target: In<'a> = "[N]; i32; values below V",
    /// Weights of the rows, 1 if absent.
    weight: Option<In<'a>> = "[N]; acc",
    /// Factor on the sum, such as one over the rows of the whole batch.
    scale: In<'a> = "[1]; acc",
    /// Log-sum-exp, 0 in ignored rows.
    lse: Out<'a> = "[N]; acc",
    loss: Acc<'a> = "[1]; acc",
}
/// Gradient of `xent_fwd`: `dlogits = g * scale * weight_n * (softmax - onehot)`.
loss: xent_bwd(XentBwd<'a>) flop |s| 4 * s.logits.dims.numel() => {
    logits: In<'a> = "[N, V]; act",
    target: In<'a> = "[N]; i32; values below V",
    /// As in the forward.
    weight: Option<In<'a>> = "[N]; acc",
    /// As in the forward.
    scale: In<'a> = "[1]; acc",
    lse: In<'a> = "[N]; acc",
    /// Gradient of the loss.
    g: In<'a> = "[1]; acc",
    /// 0 in ignored rows.
    dlogits: Out<'a> = "[N, V]; act; may be logits",
}
/// `loss += scale * sum |a - b|`.
loss: l1_fwd(L1Fwd<'a>) flop |s| 3 * s.a.dims.numel() => {
    a: In<'a> = "[..]; act",
    b: In<'a> = "[..]; act",
    /// Factor on the sum, such as one over the elements of the whole batch.
    scale: In<'a> = "[1]; acc",
    loss: Acc<'a> = "[1]; acc",
}
/// `da = g * scale * sign(a - b)`, with 0 where `a` equals `b`.
loss: l1_bwd(L1Bwd<'a>) flop |s| 3 * s.a.dims.numel() => {
    a: In<'a> = "[..]; act",
    b: In<'a> = "[..]; act",
    /// As in the forward.
    scale: In<'a> = "[1]; acc",
    g: In<'a> = "[1]; acc",
    da: Out<'a> = "[..]; act",
}
/// One layer of LPIPS: `loss += factor * scale * sum_p sum_c w[c] (n0 - n1)^2` over pixels p, with
/// `n = f / (sqrt(sum_c f^2) + eps)`.
loss: lpips_fwd(LpipsFwd<'a>) flop |s| 8 * s.f0.dims.numel() => {
    /// Features of the reference.
    f0: In<'a> = "[P, C]; act",
    /// Features of the reconstruction.
    f1: In<'a> = "[P, C]; act",
    w: In<'a> = "[C]; act",
    /// Factor on the sum, such as one over the pictures of the whole batch.
    scale: In<'a> = "[1]; acc",
    loss: Acc<'a> = "[1]; acc",
    /// Added to the norm.
    eps: f64,
    /// Constant factor on the sum, such as one over the pixels of a picture.
    factor: f64,
}
/// Gradient of `lpips_fwd` with respect to `f1`; 0 for pixels whose features in `f1` are all 0.
loss: lpips_bwd(LpipsBwd<'a>) flop |s| 12 * s.f0.dims.numel() => {
    f0: In<'a> = "[P, C]; act",
    f1: In<'a> = "[P, C]; act",
    w: In<'a> = "[C]; act",
    /// As in the forward.
    scale: In<'a> = "[1]; acc",
    g: In<'a> = "[1]; acc",
    df1: Out<'a> = "[P, C]; act",
    /// As in the forward.
    eps: f64,
    /// As in the forward.
    factor: f64,
}
/// The generator's adversarial loss: `loss += scale * sum_b softplus(-mean_p x[b, p])`.
loss: gan_generator_fwd(GanGeneratorFwd<'a>) flop |s| s.x.dims.numel() => {
    /// Patch logits of each image.
    x: In<'a> = "[B, P]; act; P at least 1",
    /// Factor on the sum, such as one over the pictures of the whole batch.
    scale: In<'a> = "[1]; acc",
    loss: Acc<'a> = "[1]; acc",
}
/// Gradient of `gan_generator_fwd`.
loss: gan_generator_bwd(GanGeneratorBwd<'a>) flop |s| 2 * s.x.dims.numel() => {
    x: In<'a> = "[B, P]; act; P at least 1",
    /// As in the forward.
    scale: In<'a> = "[1]; acc",
    g: In<'a> = "[1]; acc",
    dx: Out<'a> = "[B, P]; act",
}
/// The discriminator's hinge loss: `loss += factor * scale * sum relu(1 - x)` for real logits, with `relu(1 + x)` for
/// fake ones.
loss: hinge_fwd(HingeFwd<'a>) flop |s| 2 * s.x.dims.numel() => {
    x: In<'a> = "[..]; act",
    /// Factor on the sum, such as one over the patch logits of the whole batch.
    scale: In<'a> = "[1]; acc",
    loss: Acc<'a> = "[1]; acc",
    /// Whether the logits are those of real pictures.
    real: bool,
    /// Constant factor on the sum.
    factor: f64,
}
/// Gradient of `hinge_fwd`; 0 at the kink.
loss: hinge_bwd(HingeBwd<'a>) flop |s| 2 * s.x.dims.numel() => {
    x: In<'a> = "[..]; act",
    /// As in the forward.
    scale: In<'a> = "[1]; acc",
    g: In<'a> = "[1]; acc",
    dx: Out<'a> = "[..]; act",
    /// As in the forward.
    real: bool,
    /// As in the forward.
    factor: f64,
}
/// Update of the LeCAM averages: `out = decay * ema + (1 - decay) * (mean(real), mean(fake))`. An average does not
/// change if the mean is non-finite.
loss: lecam_update(LecamUpdate<'a>) flop |s| 2 * s.real.dims.numel() => {
    /// Any shape.
    real: In<'a> = "[R, P]; act; R at least 1; P at least 1",
    /// Any shape.
    fake: In<'a> = "[F, Q]; act; F at least 1; Q at least 1",
    /// Averages of the real and the fake logits.
    ema: In<'a> = "[2]; acc",
    out: Out<'a> = "[2]; acc",
    /// Weight of the old value.
    decay: f64,
}
/// LeCAM regularization: `loss += scale * (sum relu(real - ema[1])^2 + sum relu(ema[0] - fake)^2)`.
loss: lecam_fwd(LecamFwd<'a>) flop |s| 6 * s.real.dims.numel() => {
    /// Any shape.
    real: In<'a> = "[R, P]; act",
    /// Any shape.
    fake: In<'a> = "[F, Q]; act",
    /// Averages that include this batch.
    ema: In<'a> = "[2]; acc",
    /// Factor on the sums: one over the patch logits of the whole batch.
    scale: In<'a> = "[1]; acc",
    loss: Acc<'a> = "[1]; acc",
}
/// Gradient of `lecam_fwd`; the averages are constants.
loss: lecam_bwd(LecamBwd<'a>) flop |s| 6 * s.real.dims.numel() => {
    /// Any shape.
    real: In<'a> = "[R, P]; act",
    /// Any shape.
    fake: In<'a> = "[F, Q]; act",
    ema: In<'a> = "[2]; acc",
    /// As in the forward.
    scale: In<'a> = "[1]; acc",
    g: In<'a> = "[1]; acc",
    dreal: Out<'a> = "[R, P]; act",
    dfake: Out<'a> = "[F, Q]; act",
}

// ---- sampling (docs/sampling.md) -----------------------------------------------------------------------
/// Draws an index from each row of logits; the result is the same on every device (docs/sampling.md). With guidance,
/// the logits are `without + guidance * (logits - without)`. They are divided by `temperature`; 0 chooses the largest
/// one. `top_k` keeps that many of the largest logits, the first ones among equals. `top_p` then keeps the fewest of
/// the largest ones that together have at least this share of the remaining probability. The random number is
/// determined by `seed`, `number` and `position`; `position` is then incremented, so that a loop of draws needs no
/// values from the host. The index is -1 for a row that contains NaN or whose maximum is not finite.
sample: sample(Sample<'a>) flop |s| 32 * s.logits.dims.numel() => {
    logits: In<'a> = "[B, V]; act",
    /// Logits without the prompt.
    without: Option<In<'a>> = "[B, V]; act",
    /// Numbers of the sequences.
    number: In<'a> = "[B]; i32",
    /// Samples already drawn for each sequence; updated.
    position: Acc<'a> = "[B]; i32",
    idx: Out<'a> = "[B]; i32",
    /// Divides the logits; 0: take the largest.
    temperature: f64 = "finite; at least 0",
    /// Number of candidates; 0: all.
    top_k: usize,
    /// Total probability of the candidates.
    top_p: f64 = "above 0; at most 1",
    /// Factor on `logits - without`.
    guidance: f64 = "finite; if without",
    /// Seed of the draws.
    seed: u64,
}

// ---- quantizer (docs/quantizer.md) ---------------------------------------------------------------------
/// The best code of each token. Ties go to the smallest index. NaN scores are lower than all others; if all scores of a
/// row are NaN, the index is 0 and the score minus infinity.
codebook: nearest(Nearest<'a>) flop |s| 2 * s.z.dims.numel() * s.e.dims.rows() => {
    z: In<'a> = "[M, D]; act",
    e: In<'a> = "[K, D]; act; K at least 1",
    idx: Out<'a> = "[M]; i32",
    /// Score of the best code: `z . e`, minus half the square of the code's length for the distance.
    score: Option<Out<'a>> = "[M]; acc",
    /// Count of rows without a finite score.
    bad: Option<Acc<'a>> = "[1]; acc",
    /// The score of a code.
    metric: Metric,
}
/// Row statistics of the scores `S = z E^T`, in one sweep over the codes. With `t` the best code and
/// `x_j = (S_j - S_t) / temperature`: `rest_p = sum_{j != t} exp(S_j - S_t)`, `rest_q = sum_{j != t} exp(x_j)` and
/// `xbar = sum_j q_j x_j` with `q = softmax(x)`. Without entropies, `rest_q` and `xbar` are absent and `temperature` is
/// ignored.
codebook: ibq_rows(IbqRows<'a>) flop |s| 2 * s.z.dims.numel() * s.e.dims.rows() => {
    z: In<'a> = "[M, D]; act",
    e: In<'a> = "[K, D]; act; K at least 1",
    /// The best code, as in `nearest` with the dot product.
    idx: Out<'a> = "[M]; i32",
    /// Score of the best code.
    smax: Out<'a> = "[M]; acc",
    rest_p: Out<'a> = "[M]; acc",
    rest_q: Option<Out<'a>> = "[M]; acc",
    xbar: Option<Out<'a>> = "[M]; acc; with rest_q",
    /// Count of rows without a finite score.
    bad: Acc<'a> = "[1]; acc",
    /// Temperature of the entropies.
    temperature: f64 = "above 0; if rest_q",
}
/// Column sums `sum_i q_ij` over tokens. They are not divided by the number of tokens, so that they can be summed over
/// ranks.
codebook: ibq_cols(IbqCols<'a>) flop |s| 2 * s.z.dims.numel() * s.e.dims.rows() => {
    z: In<'a> = "[M, D]; act",
    e: In<'a> = "[K, D]; act; K at least 1",
    /// The best codes. Tokens without weight on any other code need no products.
    idx: In<'a> = "[M]; i32",
    smax: In<'a> = "[M]; acc",
    rest_q: In<'a> = "[M]; acc",
    col: Out<'a> = "[K]; acc",
    /// Temperature of the entropies.
    temperature: f64 = "above 0",
}
/// Outputs of the IBQ quantizer: `zq = E[idx]`; the quantization loss
/// `quant = (1 + beta_commit + beta_code) * inv_count/D * sum (zq - z)^2`; the mean entropy of the tokens,
/// `sample = inv_count * sum_i H_i`; the entropy of the average, `avg = -sum_j a_j log(a_j + eps)` with
/// `a = col * inv_count`; and its derivative `c_j = -(log(a_j + eps) + a_j / (a_j + eps))`. Without entropies,
/// `rest_q`, `xbar`, `col`, `c`, `sample` and `avg` are absent.
codebook: ibq_losses(IbqLosses<'a>) flop |s| 4 * s.z.dims.numel() + 8 * s.col.map_or(0, |c| c.dims.numel()) => {
    z: In<'a> = "[M, D]; act",
    e: In<'a> = "[K, D]; act; K at least 1",
    idx: In<'a> = "[M]; i32; values below K",
    rest_q: Option<In<'a>> = "[M]; acc",
    xbar: Option<In<'a>> = "[M]; acc; with rest_q",
    /// Summed over ranks.
    col: Option<In<'a>> = "[K]; acc; with rest_q",
    /// One over the tokens of all ranks.
    inv_count: In<'a> = "[1]; acc",
    zq: Out<'a> = "[M, D]; act",
    c: Option<Out<'a>> = "[K]; acc; with rest_q",
    quant: Out<'a> = "[1]; acc",
    sample: Option<Out<'a>> = "[1]; acc; with rest_q",
    avg: Option<Out<'a>> = "[1]; acc; with rest_q",
    /// Added inside the logarithm.
    eps: f64,
    /// Weight of the commitment term.
    beta_commit: f64,
    /// Weight of the codebook term.
    beta_code: f64,
}
/// The backward pass of the IBQ quantizer: the soft path, the scatter of gradients to the best codes, both entropies
/// and the direct terms of the quantization loss. The best code is left out of every sum in which its terms would
/// cancel (docs/quantizer.md). Without entropies, `rest_q`, `xbar`, `c`, `g_sample` and `g_avg` are absent.
codebook: ibq_bwd(IbqBwd<'a>) flop |s| 16 * s.z.dims.numel() * s.e.dims.rows() => {
    z: In<'a> = "[M, D]; act",
    e: In<'a> = "[K, D]; act; K at least 1",
    idx: In<'a> = "[M]; i32; values below K",
    smax: In<'a> = "[M]; acc",
    rest_p: In<'a> = "[M]; acc",
    rest_q: Option<In<'a>> = "[M]; acc",
    xbar: Option<In<'a>> = "[M]; acc; with rest_q",
    c: Option<In<'a>> = "[K]; acc; with rest_q",
    /// One over the tokens of all ranks.
    inv_count: In<'a> = "[1]; acc",
    /// Gradient of `zq` from the decoder and the projector.
    g: In<'a> = "[M, D]; act",
    /// Gradient of `quant`.
    g_quant: In<'a> = "[1]; acc",
    /// Gradient of `sample`.
    g_sample: Option<In<'a>> = "[1]; acc; with rest_q",
    /// Gradient of `avg`.
    g_avg: Option<In<'a>> = "[1]; acc; with rest_q",
    dz: Out<'a> = "[M, D]; act",
    de: Option<Acc<'a>> = "[K, D]; acc",
    /// Temperature of the entropies.
    temperature: f64 = "above 0; if rest_q",
    /// Weight of the commitment term.
    beta_commit: f64,
    /// Weight of the codebook term.
    beta_code: f64,
}
/// The plain VQ quantizer: `zq = E[idx]`, `quant = (beta_commit + beta_code) * inv_count/D * sum (zq - z)^2`.
codebook: vq_losses(VqLosses<'a>) flop |s| 4 * s.z.dims.numel() => {
    z: In<'a> = "[M, D]; act",
    e: In<'a> = "[K, D]; act; K at least 1",
    idx: In<'a> = "[M]; i32; values below K",
    /// One over the tokens of all ranks.
    inv_count: In<'a> = "[1]; acc",
    zq: Out<'a> = "[M, D]; act",
    quant: Out<'a> = "[1]; acc",
    /// Weight of the commitment term.
    beta_commit: f64,
    /// Weight of the codebook term.
    beta_code: f64,
}
/// Gradient of `vq_losses`. `dz` is `g` (straight-through) plus the gradient of the commitment term; the gradient of
/// the codebook term is added to `de`.
codebook: vq_bwd(VqBwd<'a>) flop |s| 6 * s.z.dims.numel() => {
    z: In<'a> = "[M, D]; act",
    e: In<'a> = "[K, D]; act; K at least 1",
    idx: In<'a> = "[M]; i32; values below K",
    /// One over the tokens of all ranks.
    inv_count: In<'a> = "[1]; acc",
    g: In<'a> = "[M, D]; act",
    g_quant: In<'a> = "[1]; acc",
    dz: Out<'a> = "[M, D]; act",
    de: Option<Acc<'a>> = "[K, D]; acc",
    /// Weight of the commitment term.
    beta_commit: f64,
    /// Weight of the codebook term.
    beta_code: f64,
}

// ---- optimizer -----------------------------------------------------------------------------------------
/// Adds the sum of `x^2` over finite elements to `out[0]`, and the number of non-finite elements to `out[1]`.
optim: sum_squares(SumSquares<'a>) flop |s| 2 * s.x.dims.numel() => {
    x: In<'a> = "[n]; acc",
    out: Acc<'a> = "[2]; acc",
}
/// One AdamW step on a flat range, in the accumulator type, with learning rate and clip from the step state (see
/// [`super::Slot`]) and bias corrections `1 / (1 - beta^t)`. If `clip > 0`, the gradient is scaled by
/// `min(1, clip / (sqrt(norm[0]) + 1e-6))`. Then `ema = ema_decay * ema + (1 - ema_decay) * master`, and `shadow` is
/// `master` rounded to act. Nothing changes if `norm[1] > 0`.
optim: adamw(Adamw<'a>) flop |s| 12 * s.grad.dims.numel() => {
    /// Updated.
    master: Acc<'a> = "[n]; acc",
    grad: In<'a> = "[n]; acc",
    /// First moment; updated.
    m: Acc<'a> = "[n]; acc",
    /// Second moment; updated.
    v: Acc<'a> = "[n]; acc",
    /// Updated.
    ema: Option<Acc<'a>> = "[n]; acc",
    shadow: Option<Out<'a>> = "[n]; act",
    /// The step state.
    state: In<'a> = "[54]; acc",
    /// Number of updates so far; `t` is one more.
    steps: In<'a> = "[1]; i32",
    /// From `sum_squares` over everything this optimizer trains.
    norm: In<'a> = "[2]; acc",
    /// Row of the step state that holds this group's rate and clip.
    group: usize = "below 16",
    /// Decay of the first moment.
    beta1: f64,
    /// Decay of the second moment.
    beta2: f64,
    /// Added to the root of the second moment.
    eps: f64,
    /// Decoupled weight decay.
    weight_decay: f64,
    /// Decay of the average of the weights.
    ema_decay: f64,
}
/// `y = x` if `norm[1] > 0`: undoes the changes of a step that is skipped.
optim: restore(Restore<'a>) flop |_s| 0 => {
    /// The values before the step.
    x: In<'a> = "[n]; act or acc",
    /// As for `adamw`.
    norm: In<'a> = "[2]; acc",
    y: Acc<'a> = "[n]; type of x",
}
        }
    };
}
pub(crate) use kernel_table;

macro_rules! define_contract {
    ($($(#[$doc:meta])* $module:ident: $name:ident($args:ident<$lt:lifetime>) flop |$s:ident| $flop:expr => {
        $($(#[$fdoc:meta])* $field:ident: $ty:ty $(= $text:literal)?,)*
    })*) => {
        $(
            #[doc = concat!("Arguments of [`Kernels::", stringify!($name), "`].")]
            #[derive(Clone, Copy)]
            pub struct $args<$lt> { $($(#[doc = concat!("`", $text, "`.")])? $(#[$fdoc])* pub $field: $ty,)* }

            impl<$lt> $args<$lt> {
                const COMPILED: spec::Compiled = spec::compile(&[$(spec::Raw {
                    name: stringify!($field),
                    kind: <$ty as Field>::KIND,
                    text: concat!($($text)?),
                },)*]);
                const FIELDS: &'static [FieldSpec] = Self::COMPILED.fields.split_at(Self::COMPILED.n).0;
                /// This row of the table.
                pub const SPEC: &'static KernelSpec = &KernelSpec {
                    name: stringify!($name),
                    fields: Self::FIELDS,
                    symbols: Self::COMPILED.symbols,
                };
            }

            impl Args for $args<'_> {
                fn spec(&self) -> &'static KernelSpec {
                    Self::SPEC
                }
                fn with_values(&self, f: &mut dyn FnMut(&[Value]) -> Result<()>) -> Result<()> {
                    f(&[$(self.$field.value(),)*])
                }
                fn views(&self) -> Vec<(&'static str, Access, In<'_>)> {
                    let all = [$((stringify!($field), self.$field.value()),)*];
                    let views = all.into_iter().filter_map(|(name, value)| match value {
                        Value::Tensor(access, v) => Some((name, access, *v)),
                        _ => None,
                    });
                    views.collect()
                }
                fn cost(&self) -> Cost {
                    let $s = self;
                    let bytes = self.views().iter().map(|(_, a, v)| {
                        v.bytes() * if *a == Access::Accumulate { 2 } else { 1 }
                    }).sum();
                    Cost { flop: ($flop) as u64, bytes }
                }
            }
        )*

        /// All kernels. A call is ordered after earlier calls on the same stream. It neither allocates device memory
        /// nor waits for the device. Before anything else, a device checks that the tensors are its own and that the
        /// arguments satisfy the rules of the table.
        pub trait Kernels: Device {
            $(
                $(#[$doc])*
                fn $name(&self, stream: Stream, args: &$args<'_>) -> Result<()>;
            )*
        }

        /// Every kernel, in the order of the C header.
        pub const KERNELS: &[&KernelSpec] = &[$($args::SPEC,)*];
    };
}
kernel_table!(define_contract);

impl<'a> Conv2dFwd<'a> {
    /// A convolution of `x` by `w`, with padding `[top, left]` and nothing else.
    pub fn plain(
        [x, w]: [In<'a>; 2],
        bias: Option<In<'a>>,
        y: Out<'a>,
        stride: usize,
        pad: [usize; 2],
    ) -> Self {
        let [pad_top, pad_left] = pad;
        let (mean, rstd, gamma, beta, residual) = (None, None, None, None, None);
        let (y_mean, y_rstd, eps) = (None, None, 0.0);
        Conv2dFwd {
            x,
            mean,
            rstd,
            gamma,
            beta,
            w,
            bias,
            residual,
            y,
            y_mean,
            y_rstd,
            eps,
            stride,
            pad_top,
            pad_left,
        }
    }
}

impl<'a> Conv2dBwdData<'a> {
    /// The gradient of [`Conv2dFwd::plain`] for its input.
    pub fn plain([dy, w]: [In<'a>; 2], dx: Out<'a>, stride: usize, [pad_top, pad_left]: [usize; 2]) -> Self {
        let (bias, x, mean, rstd, gamma, beta, skip) = (None, None, None, None, None, None, None);
        let (dgamma, dbeta) = (None, None);
        Conv2dBwdData {
            dy,
            w,
            bias,
            x,
            mean,
            rstd,
            gamma,
            beta,
            skip,
            dx,
            dgamma,
            dbeta,
            stride,
            pad_top,
            pad_left,
        }
    }
}

impl<'a> Conv2dBwdWeight<'a> {
    /// The gradient of [`Conv2dFwd::plain`] for weights and bias.
    pub fn plain(
        [x, dy]: [In<'a>; 2],
        dw: Acc<'a>,
        db: Option<Acc<'a>>,
        stride: usize,
        pad: [usize; 2],
    ) -> Self {
        let ([pad_top, pad_left], mean, rstd, gamma, beta) = (pad, None, None, None, None);
        Conv2dBwdWeight { x, mean, rstd, gamma, beta, dy, dw, db, stride, pad_top, pad_left }
    }
}

fn inner(a: &In, transposed: bool) -> usize {
    if transposed { a.dims.rows() } else { a.dims.cols() }
}

/// An upper bound of the operations of attention: `n` products of T x Tk x D per head, half of them masked if causal.
/// All sequences count with the maximum length, since their lengths are on the device.
fn attention_flop(n: usize, tq: usize, tk: usize, cu: In, heads: usize, d: usize, causal: bool) -> usize {
    let seqs = cu.dims.numel().saturating_sub(1);
    2 * n * seqs * heads * d * tq * tk / if causal { 2 } else { 1 }
}
