//! IBQ's vision tokenizers.

use std::path::Path;

use crate::config::{DiscriminatorConfig, QuantizerConfig, TokenizerConfig};
use crate::error::{Error, Result};
use crate::formats::{Encoding, Selection};

/// A vision tokenizer of another program, or an exported one.
pub struct ForeignTokenizer {
    /// Sizes of encoder and decoder.
    pub tokenizer: TokenizerConfig,
    /// Sizes of the codebook, and how it is compared with tokens.
    pub quantizer: QuantizerConfig,
    /// Sizes of the discriminator; `None` if the file has none.
    pub discriminator: Option<DiscriminatorConfig>,
    /// Weights under the names of this crate: the tokenizer's, and those of the discriminator and of the perceptual loss if
    /// the file has them.
    pub weights: Selection,
    /// Averages of weights under the same names, if the file has them.
    pub averages: Option<Selection>,
    /// The number of updates in the averages.
    pub updates: Option<u64>,
    /// The discriminator's running statistics, under the names of [`Ett::carried`](crate::model::Ett::carried).
    pub state: Selection,
    /// What was found and what was left out, in words.
    pub notes: Vec<String>,
}

/// Opens a vision tokenizer: a `.ckpt` of PyTorch Lightning, a bare dictionary, a safetensors file, or a folder with a
/// configuration in YAML and one of these.
pub fn open_tokenizer(path: &Path) -> Result<ForeignTokenizer> {
    Err(Error::weights(path, "is not read yet"))
}

/// Writes a tokenizer as a safetensors file that [`open_tokenizer`] reads; `None` keeps the encoding of every tensor.
pub fn write_tokenizer(path: &Path, _from: &ForeignTokenizer, _encoding: Option<Encoding>) -> Result<()> {
    Err(Error::weights(path, "is not written yet"))
}

/// Writes a tokenizer as a `.ckpt` that IBQ's reference code loads with `strict=True`.
pub fn write_checkpoint(path: &Path, _from: &ForeignTokenizer) -> Result<()> {
    Err(Error::weights(path, "is not written yet"))
}
