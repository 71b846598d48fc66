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
mod gradients;
mod kill;
mod losses;
mod memory;
mod pack;
mod plan;
mod process;
mod properties;
mod quantizer;
mod ranks;
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
