//! Published weights: what the files of other programs mean here, and models as other programs read them.

mod inception;
mod llm;
mod named;
mod perceptual;
mod tokenizer;

pub use inception::{inception_shapes, open_inception, write_inception};
pub use llm::{ForeignLlm, open_llm, write_llm};
pub use perceptual::{ForeignPerceptual, open_perceptual, write_perceptual};
pub use tokenizer::{ForeignTokenizer, open_tokenizer, write_checkpoint, write_tokenizer};
