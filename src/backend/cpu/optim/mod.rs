//! Gradient norms, AdamW, and undoing a skipped step.

mod adamw;
mod restore;
mod sum_squares;

use super::*;
pub(super) use adamw::*;
pub(super) use restore::*;
pub(super) use sum_squares::*;

/// Number of elements per task.
const CHUNK: usize = 16384;
