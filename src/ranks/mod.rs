//! The processes that train together: how they find each other, agree and notice that one of them has ended.
//!
//! A *rank* is one process with one device. [`Place`] says which one this is, from the environment that torchrun,
//! Slurm, MPI or `ett-train run --gpus` set. [`Group`] connects the ranks over TCP: rank 0 listens at the address of the
//! place, and all others keep a connection to it. Over these go a few bytes a step, such as the counts of a batch, and
//! signs of life. Gradients and weights do not: GPUs use NCCL, and CPUs a connection between every two ranks.

mod group;
mod place;

pub use group::{Group, Phase};
pub use place::Place;
