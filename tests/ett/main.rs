//! The integration tests: one binary for all of them.

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
mod fixtures;
mod generate;
mod gpu;
mod gradients;
mod kill;
mod memory;
mod plan;
mod process;
mod properties;
mod quantizer;
mod ranks;
mod reference;
mod robust;
mod run;
mod slice;
mod training;

/// Counts what the process holds, so that no allocation hides from the memory test.
#[global_allocator]
static HEAP: memory::Counting = memory::Counting;
