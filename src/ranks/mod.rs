//! The processes that train together: how they find each other, agree and notice that one of them has ended.
//!
//! A *rank* is one process with one device. [`Place`] says which one this is, from the environment that torchrun,
//! Slurm, MPI or `ett-train run --gpus` set. [`Group`] connects the ranks over TCP: rank 0 listens at the address of the
//! place, and all others keep a connection to it. Over these go a few bytes a step, such as the counts of a batch, and
//! signs of life. Gradients and weights do not: GPUs use NCCL, and CPUs a connection between every two ranks.
//!
//! | file | contents |
//! | --- | --- |
//! | `place` | rank, number of ranks and address from the environment |
//! | `wire` | what is sent: frames of bounded length |
//! | `door`, `rendezvous` | a listener that turns strangers away; how all ranks find rank 0 |
//! | `control`, `watch` | calls of all ranks over rank 0, signs of life; who is given up when |
//! | `mesh` | the connections between every two ranks |
//! | `group` | all of it behind one type |

mod control;
mod door;
mod group;
mod mesh;
mod place;
mod rendezvous;
#[cfg(test)]
mod tests;
mod watch;
mod wire;

pub use group::{Group, Phase};
pub use place::Place;
