//! Published weights: what the files of other programs mean here, and models as other programs read them.

mod card;
mod export;
mod inception;
mod llm;
mod named;
mod perceptual;
mod recognise;
mod run;
mod start;
mod tokenizer;

pub use export::{ModelOptions, export_llm, export_model, export_tokenizer};
pub use inception::{inception_shapes, open_inception, write_inception};
pub use llm::{ForeignLlm, open_llm, write_llm};
pub use perceptual::{ForeignPerceptual, open_perceptual, write_perceptual};
pub use recognise::{Foreign, inspect, recognise};
pub use start::{Start, load_config};
pub use tokenizer::{ForeignTokenizer, open_tokenizer, write_checkpoint, write_tokenizer};
