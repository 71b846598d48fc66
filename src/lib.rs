//! ETT, End-to-End Vision Tokenizer Tuning (arXiv 2505.10562): the model, its training and its use.

#![warn(missing_docs)]

pub mod autograd;
pub mod backend;
pub mod compare;
pub mod config;
pub mod data;
pub mod error;
pub mod eval;
pub mod feed;
pub mod files;
pub mod infer;
pub mod interrupt;
pub mod io;
pub mod model;
pub mod nn;
pub mod ops;
pub mod report;
pub mod rng;
pub mod tensor;
pub mod terminal;
pub mod train;
