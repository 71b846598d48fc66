//! The model: vision tokenizer and its losses, projector, language model, and [`Ett`], which holds all of them.

mod ett;
mod llm;
mod modules;
mod pack;
mod projector;
pub mod tokenizer;

pub use ett::{Ett, VisualInput};
pub use llm::{Cache, Keys, Llm};
pub use modules::{
    BACKWARD, Carried, MODULES, Module, PER_TOKEN, TrainedBy, is_of_llm, is_of_tokenizer, tuned,
};
pub use pack::{FlatBatch, Packed, Part, Sizes};
pub use projector::{Projector, VisualHead};
