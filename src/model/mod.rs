//! The model: vision tokenizer, its losses, projector, language model, and all of it together.

mod ett;
mod llm;
mod pack;
mod projector;
pub mod tokenizer;

pub use ett::{Ett, GROUPS, VisualInput};
pub use llm::{Cache, Keys, Llm};
pub use pack::{Packed, Part, Rows};
pub use projector::{Projector, VisualHead};
