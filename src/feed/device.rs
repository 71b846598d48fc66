//! Batches on the host and on the device.

use std::ops::Range;

use crate::backend::{DType, Role, Stream};
use crate::data::{Bitmap, Image};
use crate::error::{Error, Result};
use crate::model::tokenizer::Grid;
use crate::model::{Ett, FlatBatch, Packed, Part, Sizes};
use crate::tensor::{Block, Parts, Tensor};

/// The rows of a packed batch are padded to a multiple of this, so that memory is reused from step to step.
pub(crate) const PAD: usize = 64;

/// A batch on the device, or one of its equal parts.
pub struct Batch {
    /// Images `[B, H, W, 3]`, one tensor per size: values in [-1, 1], or bytes, which a step converts.
    pub images: Vec<Tensor>,
    /// Packed sequences that refer to these images.
    pub packed: Option<Packed>,
    /// Visual tokens of the rank that has the most; `None`: all ranks have as many.
    pub most: Option<usize>,
}

impl Batch {
    /// Packs sequences that refer to images with these grids (see [`Packed::new`]).
    pub fn pack(model: &Ett, sequences: &[Vec<Part>], grids: &[Grid], pad: usize) -> Result<Packed> {
        Packed::new(&**model.params.device(), sequences, &visual_rows(grids), pad)
    }
}

/// The visual rows of each image of these grids.
fn visual_rows(grids: &[Grid]) -> Vec<Range<usize>> {
    let mut rows: Vec<Range<usize>> = Vec::new();
    for g in grids {
        for _ in 0..g.images {
            let start = rows.last().map_or(0, |r| r.end);
            rows.push(start..start + g.h * g.w);
        }
    }
    rows
}

/// One of the equal parts of a batch, on the host.
pub struct HostPart {
    /// Pictures, three bytes per pixel, and their shape `[B, H, W, 3]`, one entry per size.
    pub images: Vec<(Vec<u8>, [usize; 4])>,
    /// The sequences that refer to them.
    pub rows: Option<FlatBatch>,
}

/// The sizes of a part of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartSizes {
    /// Shapes of the pictures.
    images: Vec<[usize; 4]>,
    /// Sizes of the sequences.
    rows: Option<Sizes>,
}

impl HostPart {
    /// Pictures, those of each size together, and sequences that refer to them; `side` is the factor by which the
    /// tokenizer reduces them. The sequences are padded to `sizes` if they fit, otherwise to a multiple of 64 rows.
    pub(crate) fn new(
        images: Vec<Vec<Bitmap>>,
        sequences: &[Vec<Part>],
        side: usize,
        sizes: Option<Sizes>,
    ) -> Result<Self> {
        let group = |group: Vec<Bitmap>| {
            let [n, h, w] = [group.len(), group[0].height, group[0].width];
            let bytes = group.into_iter().fold(Vec::with_capacity(n * h * w * 3), |mut all, one| {
                all.extend(one.rgb);
                all
            });
            (bytes, [n, h, w, 3])
        };
        let images: Vec<(Vec<u8>, [usize; 4])> = images.into_iter().map(group).collect();
        let grids: Vec<Grid> =
            images.iter().map(|&(_, [n, h, w, _])| Grid { images: n, h: h / side, w: w / side }).collect();
        let rows = match sequences.is_empty() {
            true => None,
            false => {
                let mut rows = FlatBatch::new(sequences, &visual_rows(&grids), PAD)?;
                if let Some(sizes) = sizes {
                    rows.widen(sizes);
                }
                Some(rows)
            }
        };
        Ok(HostPart { images, rows })
    }

    fn sizes(&self) -> PartSizes {
        PartSizes {
            images: self.images.iter().map(|(_, dims)| *dims).collect(),
            rows: self.rows.as_ref().map(FlatBatch::sizes),
        }
    }
}

/// A batch on the host, in the layout in which it is copied to the device.
pub struct HostBatch {
    /// Its parts.
    pub parts: Vec<HostPart>,
    /// The sequences of all parts; none in the tokenizer stage.
    pub sequences: Vec<Vec<Part>>,
    block: Block,
}

impl HostBatch {
    /// A batch of equal parts.
    pub(crate) fn new(parts: Vec<HostPart>, sequences: Vec<Vec<Part>>) -> Self {
        let mut block = Block::default();
        for part in &parts {
            for (bytes, _) in &part.images {
                block.push(bytes);
            }
            if let Some(rows) = &part.rows {
                rows.write(&mut block);
            }
        }
        HostBatch { parts, sequences, block }
    }

    /// The sizes of its parts. Batches of equal sizes can replace one another on the device.
    pub fn sizes(&self) -> Vec<PartSizes> {
        self.parts.iter().map(HostPart::sizes).collect()
    }

    fn sum(&self, of: fn(&FlatBatch) -> usize) -> usize {
        self.parts.iter().filter_map(|p| p.rows.as_ref()).map(of).sum()
    }

    /// Number of supervised text tokens.
    pub fn tokens(&self) -> usize {
        self.sum(FlatBatch::tokens)
    }

    /// Number of supervised codes.
    pub fn codes(&self) -> usize {
        self.sum(FlatBatch::codes)
    }

    /// Number of rows of the language model's input, without padding.
    pub fn rows(&self) -> usize {
        self.sum(FlatBatch::rows)
    }

    /// Copies the batch to new memory of the device, on the stream for copies.
    pub fn upload(&self, model: &Ett) -> Result<Uploaded> {
        let block = self.block.upload(&**model.params.device(), Stream::COPY)?;
        Uploaded::of(block, &self.sizes())
    }
}

/// A batch on the device, in one block.
pub struct Uploaded {
    /// All of it as bytes.
    pub block: Tensor,
    /// Its parts, which are tensors in this block.
    pub parts: Vec<Batch>,
}

impl Uploaded {
    /// The batch of these sizes in a block.
    fn of(block: Tensor, sizes: &[PartSizes]) -> Result<Self> {
        let mut arrays = Parts::of(&block);
        let mut parts = Vec::new();
        for PartSizes { images, rows } in sizes {
            let images =
                images.iter().map(|&dims| arrays.take(DType::U8, dims)).collect::<Result<Vec<_>>>()?;
            let packed = rows.map(|sizes| Packed::of(&mut arrays, sizes)).transpose()?;
            parts.push(Batch { images, packed, most: None });
        }
        Ok(Uploaded { block, parts })
    }

    /// New memory for batches of these sizes, with the contents of this one.
    pub fn duplicate(&self, model: &Ett, sizes: &[PartSizes]) -> Result<Self> {
        let dev = &**model.params.device();
        let block = Tensor::empty(dev, Role::Input, DType::U8, self.block.dims())?;
        let copy = Uploaded::of(block, sizes)?;
        copy.replace(model, self)?;
        Ok(copy)
    }

    /// Overwrites this batch with another of the same sizes.
    pub fn replace(&self, model: &Ett, other: &Uploaded) -> Result<()> {
        model.params.device().copy(Stream::COMPUTE, other.block.view(), self.block.out())
    }
}

/// Height and width of pictures of the same size; `None` without pictures. Fails for different sizes.
fn same_size(images: &[Image]) -> Result<Option<(usize, usize)>> {
    let Some(first) = images.first() else { return Ok(None) };
    let (h, w) = (first.height, first.width);
    match images.iter().find(|i| (i.height, i.width) != (h, w)) {
        None => Ok(Some((h, w))),
        Some(i) => {
            let (got, want) = (format!("{}x{}", i.height, i.width), format!("{h}x{w} like the first"));
            Err(Error::arg("batch", "images", got, want))
        }
    }
}

/// Copies images of the same size to the device as `[B, H, W, 3]`. Fails without images and for different sizes.
pub fn images_to_device(model: &Ett, images: &[Image]) -> Result<(Tensor, Grid)> {
    let Some((h, w)) = same_size(images)? else {
        return Err(Error::arg("images_to_device", "images", "none", "at least one"));
    };
    let values: Vec<f64> = images.iter().flat_map(|i| i.pixels.iter().map(|&v| v as f64)).collect();
    let prec = model.params.precision();
    let t =
        Tensor::from_f64(&**model.params.device(), Role::Input, prec.act, &values, [images.len(), h, w, 3])?;
    let s = model.cfg.tokenizer.downsampling();
    Ok((t, Grid { images: images.len(), h: h / s, w: w / s }))
}
