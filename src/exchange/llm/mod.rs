//! Language models of Hugging Face and llama.cpp.

use std::path::{Path, PathBuf};

use crate::config::LlmConfig;
use crate::error::{Error, Result};
use crate::formats::{Encoding, Selection};

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
    /// What was changed or added on the way, in words.
    pub notes: Vec<String>,
}

/// Opens a language model: a Hugging Face folder, or a GGUF file.
pub fn open_llm(path: &Path) -> Result<ForeignLlm> {
    Err(Error::weights(path, "is not read yet"))
}

/// Writes a language model as a folder that `transformers` loads; `None` keeps the encoding of every tensor. `weights` may hold
/// more than the language model.
pub fn write_llm(
    out: &Path,
    _cfg: &LlmConfig,
    _weights: &Selection,
    _text: Option<&[u8]>,
    _encoding: Option<Encoding>,
) -> Result<Vec<PathBuf>> {
    Err(Error::weights(out, "is not written yet"))
}
