//! Parameters and the layers that models are made of.

mod layers;
mod params;

pub use layers::{Conv2d, GroupNorm, LayerNorm, Linear, RmsNorm};
pub use params::{HostTensor, Init, Param, ParamBuilder, Params, Stored, Training};
