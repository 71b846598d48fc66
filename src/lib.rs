//! ETT, End-to-End Vision Tokenizer Tuning (arXiv 2505.10562): the model, its training and its use.
//!
//! Without the feature `train`, which is on by default, the crate is a library of kernels: devices ([`backend`]),
//! tensors, the tape, ops and layers.

#![warn(missing_docs)]

pub mod autograd;
pub mod backend;
pub mod compare;
pub mod error;
pub mod nn;
pub mod ops;
pub mod ranks;
pub mod rng;
pub mod tensor;

#[cfg(feature = "train")]
pub mod config;
#[cfg(feature = "train")]
pub mod data;
#[cfg(feature = "train")]
pub mod eval;
#[cfg(feature = "train")]
pub mod exchange;
#[cfg(feature = "train")]
pub mod feed;
#[cfg(feature = "train")]
pub mod files;
#[cfg(feature = "train")]
pub mod formats;
#[cfg(feature = "train")]
pub mod infer;
#[cfg(feature = "train")]
pub mod interrupt;
#[cfg(feature = "train")]
pub mod io;
#[cfg(feature = "train")]
pub mod launch;
#[cfg(feature = "train")]
pub mod model;
#[cfg(feature = "train")]
pub mod report;
#[cfg(feature = "train")]
pub mod terminal;
#[cfg(feature = "train")]
pub mod train;
