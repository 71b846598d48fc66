//! Biases of matrix products.

use super::*;

/// The bias, if there is one.
pub(crate) fn bias<'a, T: Elem>(op: &'static str, v: Option<&In<'a>>) -> Result<Option<&'a [T]>> {
    let Some(v) = v else { return Ok(None) };
    flat(op, "bias", v).map(Some)
}

/// Fills the rows of `y` with the bias, if there is one, so that a product can be added.
pub(crate) fn start_from_bias<T: Elem>(bias: Option<&[T]>, y: &mut [T::Acc]) {
    let Some(bias) = bias.filter(|b| !b.is_empty()) else { return };
    y.chunks_mut(bias.len()).for_each(|y| widen(bias, y));
}
