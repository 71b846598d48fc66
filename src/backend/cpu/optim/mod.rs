//! Gradient norms and AdamW.

mod adamw;
mod restore;
mod sum_squares;

use super::*;
pub(super) use adamw::*;
pub(super) use restore::*;
pub(super) use sum_squares::*;

/// Elements that one task handles.
const CHUNK: usize = 16384;
