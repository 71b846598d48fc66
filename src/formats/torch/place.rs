//! Where a tensor is in its storage.

use std::ops::Range;

use crate::formats::{Encoding, Info, size_of};

/// A tensor in a storage of the file, counted in values.
pub(super) struct Placed<'a> {
    pub encoding: Encoding,
    pub dims: Vec<usize>,
    pub strides: Vec<usize>,
    pub offset: usize,
    /// The values of the storage before which the tensor ends.
    pub end: usize,
    /// The bytes of the whole storage.
    pub storage: &'a Range<usize>,
}

impl Placed<'_> {
    /// Checks that the tensor is inside its storage, and that it has no more values than the storage.
    pub fn info(self) -> Result<Info, String> {
        let Placed { encoding, dims, strides, offset, end, storage } = self;
        if dims.len() != strides.len() {
            return Err(format!("has {} sizes, but {} strides", dims.len(), strides.len()));
        }
        let bytes = size_of(encoding, &dims)?;
        if bytes == 0 {
            return Ok(Info { encoding, dims, strides: None, bytes: storage.start..storage.start });
        }
        let width = encoding.block().1;
        let extent = extent(&dims, &strides);
        let last = extent.and_then(|n| n.checked_add(offset)).filter(|&last| last <= end);
        let (Some(extent), Some(_)) = (extent, last) else {
            return Err(format!(
                "of shape {dims:?} with the strides {strides:?} from value {offset} on is beyond its storage, which ends \
                 at {end}"
            ));
        };
        let rows = is_row_major(&dims, &strides);
        if !rows && bytes / width > end {
            return Err(format!(
                "of shape {dims:?} repeats the {end} values of its storage; save a copy of it in Python \
                 (t.contiguous())"
            ));
        }
        let start = storage.start + offset * width;
        let strides = (!rows).then_some(strides);
        Ok(Info { encoding, dims, strides, bytes: start..start + extent * width })
    }
}

/// The values from the first to the last of an array that has some.
fn extent(dims: &[usize], strides: &[usize]) -> Option<usize> {
    let mut steps = dims.iter().zip(strides).map(|(&d, &s)| (d - 1).checked_mul(s));
    steps.try_fold(1usize, |n, step| n.checked_add(step?))
}

/// Whether the strides are those of a row-major array. Dimensions of one value have no neighbours.
fn is_row_major(dims: &[usize], strides: &[usize]) -> bool {
    let mut inner = 1;
    dims.iter().zip(strides).rev().all(|(&d, &s)| {
        let fits = d == 1 || s == inner;
        inner *= d;
        fits
    })
}
