//! Parameters and the layers that models are made of.

mod layers;
mod params;
mod reduce;
mod share;
mod shared;

pub use layers::{Conv2d, GroupNorm, LayerNorm, Linear, RmsNorm};
pub use params::{HostTensor, Init, Param, ParamBuilder, Params, Stored, Training};
pub use reduce::Reducer;
pub use share::Sharing;
pub use shared::Slice;
