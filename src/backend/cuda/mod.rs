//! CUDA: the contract implemented through the C interface of `kernels/`.
//!
//! [`Cuda`] calls the launchers on a GPU; it exists in builds that found nvcc (`cfg(ett_cuda)`). [`Shim`] runs the same
//! sources, compiled for the host, on the CPU, for tests on machines without a GPU. Both convert the contract's
//! arguments to the C structs of [`ffi`], which bindgen generates from the header.

mod call;
#[allow(missing_docs, non_camel_case_types, non_snake_case, non_upper_case_globals, clippy::all, clippy::undocumented_unsafe_blocks)]
#[rustfmt::skip]
pub mod ffi;
mod shim;

#[cfg(ett_cuda)]
mod arena;
#[cfg(ett_cuda)]
mod collectives;
#[cfg(ett_cuda)]
mod copies;
#[cfg(ett_cuda)]
mod device;
#[cfg(ett_cuda)]
mod nccl;
#[cfg(ett_cuda)]
mod peers;
#[cfg(ett_cuda)]
mod products;
#[cfg(ett_cuda)]
mod profile;
#[cfg(ett_cuda)]
mod record;

#[cfg(ett_cuda)]
pub use device::{Cuda, Options};
#[cfg(ett_cuda)]
pub(super) use device::{Query, held};
pub use shim::Shim;
