//! The model: vision tokenizer, its losses, projector, language model, and all of it together.

mod ett;
mod llm;
mod modules;
mod pack;
mod projector;
pub mod tokenizer;

pub use ett::{Ett, VisualInput};
pub use llm::{Cache, Keys, Llm};
pub use modules::{Carried, MODULES, Module, TrainedBy, tuned};
pub use pack::{FlatBatch, Packed, Part};
pub use projector::{Projector, VisualHead};
