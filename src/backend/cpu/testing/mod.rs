//! What the tests of the CPU kernels share. `run` has a device with tensors of known numbers on it, to compare with what
//! the test computed; `args` has arguments that are rounded to every precision, for a naive function of the same numbers.

pub(super) mod args;
pub(super) mod run;

use crate::backend::{DType, Stream};
use crate::compare::Bounds;
// The only place of the backend that looks above it.
pub(super) use crate::tensor::Tensor;

pub(super) const S: Stream = Stream::COMPUTE;

/// The comparator's table; five times as wide in f32, for sums that cancel to a fifth of their terms.
pub(super) fn bounds(dtype: DType) -> Bounds {
    Bounds::of(dtype).times(if dtype == DType::F32 { 5.0 } else { 1.0 })
}

/// Errors of central differences.
pub(super) const DIFFERENCES: Bounds = Bounds::norm(1e-6);
