//! Differentiable ops, one file per family. Each op checks its shapes, runs a kernel, and documents what it saves for
//! the backward pass.

mod attention;
mod conv;
mod gather;
mod losses;
mod norm;
mod pointwise;
mod products;
mod quantize;

pub use attention::{Heads, Seqs, Slots, attention, cached_attention, offsets};
pub use conv::{Conv, ConvWith, InputNorm, conv2d, conv2d_with, max_pool2x2, upsample2x, upsample2x_conv2d};
pub use gather::gather;
pub use losses::{cross_entropy, gan_generator, hinge, l1, lecam, linear_cross_entropy, lpips_layer};
pub use norm::{
    BatchStats, GroupStats, add_rms_norm, batch_norm, batch_norm_eval, batch_norm_merged, group_norm,
    group_stats, l2_norm, layer_norm, rms_norm,
};
pub use pointwise::{
    Rotary, add, cast, channel_affine, concat_rows, reshape, rope, split_rows, swiglu, unary,
};
pub use products::{linear, linear_gelu};
pub use quantize::{Entropy, IbqOptions, Quantized, RowStatistics, ibq, vq};

use crate::autograd::Var;
use crate::error::{Error, Result};

const S: crate::backend::Stream = crate::backend::Stream::COMPUTE;

/// Fails unless a value has this shape.
fn expect(op: &'static str, arg: &'static str, v: &Var, dims: &[usize]) -> Result<()> {
    if v.dims().as_slice() != dims {
        return Err(Error::arg(op, arg, v.dims(), format!("{dims:?}")));
    }
    Ok(())
}

/// Fails unless a value has this many dimensions.
fn expect_rank(op: &'static str, arg: &'static str, v: &Var, rank: usize) -> Result<()> {
    if v.dims().rank() != rank {
        return Err(Error::arg(op, arg, v.dims(), format!("{rank} dimensions")));
    }
    Ok(())
}
