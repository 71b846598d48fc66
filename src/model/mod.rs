//! The model: vision tokenizer and its losses, projector, language model, and [`Ett`], which holds all of them.

mod ett;
mod llm;
mod pack;
mod projector;
pub mod tokenizer;

pub use ett::{Ett, GROUPS, VisualInput};
pub use llm::{Cache, Keys, Llm};
pub use pack::{Packed, Part, Rows};
pub use projector::{Projector, VisualHead};
