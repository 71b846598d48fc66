//! Common code of the CPU kernels' tests. With `run`, a test creates tensors of known values and computes the expected
//! results itself; `args` rounds arguments to every precision and passes the rounded values to a reference function.

pub(super) mod args;
pub(super) mod run;

use crate::backend::{DType, Stream};
use crate::compare::Bounds;
// The only import in the backend from a module above it.
pub(super) use crate::tensor::Tensor;

pub(super) const S: Stream = Stream::COMPUTE;

/// The comparator's bounds, five times as wide in f32 for sums that cancel to a fifth of their terms.
pub(super) fn bounds(dtype: DType) -> Bounds {
    Bounds::of(dtype).times(if dtype == DType::F32 { 5.0 } else { 1.0 })
}

/// Errors of central differences.
pub(super) const DIFFERENCES: Bounds = Bounds::norm(1e-6);
