//! What the header of an exported tokenizer says about it.

use std::collections::HashMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ForeignTokenizer;
use super::layout::Sizes;
use crate::config::{DiscriminatorConfig, QuantizerConfig, TokenizerConfig};
use crate::error::{Error, Result};
use crate::files;
use crate::io::weights::misfit;

/// Its key in the metadata of safetensors, and beside the `state_dict` of a checkpoint.
const KEY: &str = "tokenizer";
/// The version of its contents.
const FORMAT: u32 = 1;

/// The configuration of a tokenizer, beside its weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Saved {
    format: u32,
    pub tokenizer: TokenizerConfig,
    pub quantizer: QuantizerConfig,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discriminator: Option<DiscriminatorConfig>,
    /// Updates in the averages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub updates: Option<u64>,
    /// Decay of the averages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay: Option<f64>,
    /// The features of the perceptual loss are random ones.
    #[serde(default)]
    pub random_features: bool,
}

impl Saved {
    /// What is said about a tokenizer.
    pub fn of(from: &ForeignTokenizer) -> Self {
        Saved {
            format: FORMAT,
            tokenizer: from.tokenizer.clone(),
            quantizer: from.quantizer.clone(),
            discriminator: from.discriminator.clone(),
            updates: from.updates,
            decay: from.decay,
            random_features: from.random_features,
        }
    }

    /// As metadata of safetensors.
    pub fn metadata(&self, path: &Path) -> Result<HashMap<String, String>> {
        let text = serde_json::to_string(self)
            .map_err(|e| Error::weights(path, format!("cannot be written ({e})")))?;
        Ok(HashMap::from([(KEY.to_string(), text)]))
    }

    /// Reads it from what a file says; `None` if the file does not say it.
    pub fn read(path: &Path, about: &Value) -> Result<Option<Self>> {
        let Some(text) = about.get(KEY).and_then(Value::as_str) else { return Ok(None) };
        let broken = |e| Error::weights(path, format!("its header does not describe a tokenizer ({e})"));
        let value: Value = serde_json::from_str(text).map_err(broken)?;
        let format = value["format"].as_u64().and_then(|f| u32::try_from(f).ok()).unwrap_or(u32::MAX);
        files::check_format(path, format, FORMAT..=FORMAT)?;
        serde_json::from_value(value).map(Some).map_err(broken)
    }

    /// Fails if the tensors have other sizes.
    pub fn check(&self, path: &Path, sizes: &Sizes, ndf: Option<usize>) -> Result<()> {
        let (t, have) = (&self.tokenizer, &sizes.tokenizer);
        let mut problems = vec![];
        for (key, said, have) in [
            ("tokenizer.ch", format!("{}", t.ch), format!("{}", have.ch)),
            ("tokenizer.ch_mult", format!("{:?}", t.ch_mult), format!("{:?}", have.ch_mult)),
            ("tokenizer.num_res_blocks", format!("{}", t.num_res_blocks), format!("{}", have.num_res_blocks)),
            ("tokenizer.z_channels", format!("{}", t.z_channels), format!("{}", have.z_channels)),
            ("quantizer.codes", format!("{}", self.quantizer.codes), format!("{}", sizes.codes)),
            ("quantizer.dim", format!("{}", self.quantizer.dim), format!("{}", sizes.dim)),
        ] {
            if said != have {
                problems.push(format!("`{key}` is {said}, but the weights have {have}"));
            }
        }
        if let (Some(d), Some(ndf)) = (&self.discriminator, ndf)
            && d.ndf != ndf
        {
            problems.push(format!("`discriminator.ndf` is {}, but the weights have {ndf}", d.ndf));
        }
        match problems.is_empty() {
            true => Ok(()),
            false => Err(Error::weights(path, misfit("its own header", problems))),
        }
    }
}
