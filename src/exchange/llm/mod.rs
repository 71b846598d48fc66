//! Language models of Hugging Face and llama.cpp.

mod config;
mod folder;
mod gguf;
mod gguf_text;
mod keys;
mod layout;
mod text;
mod write;

use std::path::Path;

use crate::config::LlmConfig;
use crate::error::Result;
use crate::formats::Selection;
pub use write::write_llm;

/// A language model of another program.
pub struct ForeignLlm {
    /// Its sizes and options; the vocabulary is large enough for `text`, too, and may have more rows than the file.
    pub config: LlmConfig,
    /// Its weights under the names of this crate. The embedding and the output head may have fewer rows than the vocabulary.
    pub weights: Selection,
    /// Its text tokenizer as a `tokenizer.json` that has all special tokens which ett needs; `None` if it has none.
    pub text: Option<String>,
    /// The class that `transformers` loads it with, such as `Qwen2ForCausalLM`.
    pub architecture: String,
    /// The tokens with which it ends a text, as its files say.
    pub ends: Vec<usize>,
    /// What was changed or added on the way, in words.
    pub notes: Vec<String>,
}

impl ForeignLlm {
    /// Adds the text tokenizer with the special tokens that it lacks, and the rows that its ids need.
    fn with_text(mut self, path: &Path, text: Option<String>) -> Result<Self> {
        let Some(text) = text else { return Ok(self) };
        let complete = text::complete(path, text)?;
        self.notes.extend(complete.notes);
        let (rows, vocabulary) = (self.config.vocab, complete.vocabulary);
        if vocabulary > rows {
            self.config.vocab = vocabulary;
            let new = vocabulary - rows;
            self.notes.push(format!("the vocabulary has {vocabulary} rows, the file {rows}; {new} are new"));
        } else if vocabulary < rows {
            self.notes.push(format!(
                "the vocabulary has {rows} rows, the text tokenizer needs {vocabulary}; all are kept"
            ));
        }
        self.text = Some(complete.json);
        Ok(self)
    }
}

/// Opens a language model: a Hugging Face folder, or a GGUF file. Values are read later, but names, shapes and types of
/// all tensors are checked now.
pub fn open_llm(path: &Path) -> Result<ForeignLlm> {
    match path.is_dir() {
        true => folder::open(path),
        false => gguf::open(path),
    }
}
