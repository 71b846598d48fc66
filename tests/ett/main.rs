//! The integration tests, in a single binary.

mod bf16;
mod bindings;
mod build;
mod builtin;
mod checkpoint;
mod common;
mod compare;
mod configs;
mod conformance;
mod contract;
mod data;
mod dense;
mod examples;
mod exchange;
mod failures;
mod fixtures;
mod formats;
mod fuzz;
mod generate;
mod gpu;
#[cfg(ett_cuda)]
mod gpu_ranks;
mod gradients;
mod kill;
mod launch;
mod losses;
mod memory;
mod pack;
mod plan;
mod process;
mod properties;
mod quantizer;
mod ranks;
#[cfg(target_os = "linux")]
mod ranks_runs;
mod ranks_steps;
mod reference;
mod robust;
mod rooms;
mod run;
mod shipped;
mod slice;
mod sources;
mod synced;
mod training;

/// Counts the heap of the process, so that the memory test sees every allocation.
#[global_allocator]
static HEAP: memory::Counting = memory::Counting;
