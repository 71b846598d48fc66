//! stub
use crate::data::Image; use crate::error::Result;
/// x
pub fn ssim(_a: &Image, _b: &Image) -> Result<f64> { Ok(0.0) }
