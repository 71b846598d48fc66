//! The ranks of one machine as processes: which ones to start, their devices, their output and their end.
//!
//! A process of `ett-train` is one of three things ([`Part`]): all of a run, one rank of it, or a launcher that starts the
//! ranks of this machine and waits for them. Ranks that torchrun, Slurm or MPI have started have no launcher of ours.

mod children;
mod member;
mod program;
mod request;
#[cfg(all(test, unix))]
mod tests;

pub use children::{Rules, Signals, supervise};
pub use member::take_part;
pub use program::Program;
pub use request::{Gpus, Part, Request, cores, threads};
