//! Matrix products and sums of columns.

mod bias;
mod col_sum;
mod matmul;

use super::*;
pub(super) use bias::*;
pub(super) use col_sum::*;
pub(super) use matmul::*;
