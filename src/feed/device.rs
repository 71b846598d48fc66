//! Batches on the device.

use std::ops::Range;

use crate::backend::Role;
use crate::data::Image;
use crate::error::{Error, Result};
use crate::model::tokenizer::Grid;
use crate::model::{Ett, Packed, Part};
use crate::tensor::Tensor;

/// The rows of a packed batch are padded to a multiple of this, so that memory is reused from step to step.
pub(crate) const PAD: usize = 64;

/// A batch on the device, or one of its equal parts.
pub struct Batch {
    /// Images `[B, H, W, 3]` in [-1, 1], one tensor per size.
    pub images: Vec<Tensor>,
    /// Packed sequences that refer to these images.
    pub packed: Option<Packed>,
}

impl Batch {
    /// Packs sequences that refer to images with these grids (see [`Packed::new`]).
    pub fn pack(model: &Ett, sequences: &[Vec<Part>], grids: &[Grid], pad: usize) -> Result<Packed> {
        let mut rows: Vec<Range<usize>> = Vec::new();
        for g in grids {
            for _ in 0..g.images {
                let start = rows.last().map_or(0, |r| r.end);
                rows.push(start..start + g.h * g.w);
            }
        }
        Packed::new(&**model.params.device(), sequences, &rows, pad)
    }
}

/// Copies images of the same size to the device as `[B, H, W, 3]`. Fails without images and for different sizes.
pub fn images_to_device(model: &Ett, images: &[Image]) -> Result<(Tensor, Grid)> {
    let Some(first) = images.first() else {
        return Err(Error::arg("images_to_device", "images", "none", "at least one"));
    };
    let (h, w) = (first.height, first.width);
    if let Some(i) = images.iter().find(|i| (i.height, i.width) != (h, w)) {
        return Err(Error::arg(
            "images_to_device",
            "images",
            format!("{}x{}", i.height, i.width),
            format!("{h}x{w} like the first"),
        ));
    }
    let values: Vec<f64> = images.iter().flat_map(|i| i.pixels.iter().map(|&v| v as f64)).collect();
    let prec = model.params.precision();
    let t =
        Tensor::from_f64(&**model.params.device(), Role::Input, prec.act, &values, [images.len(), h, w, 3])?;
    let s = model.cfg.tokenizer.downsampling();
    Ok((t, Grid { images: images.len(), h: h / s, w: w / s }))
}
