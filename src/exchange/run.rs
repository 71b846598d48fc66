//! Parts of models that ett has trained, for runs that start from them.

use std::path::Path;

use super::{ForeignLlm, ForeignTokenizer};
use crate::error::{Error, Result};
use crate::formats::{Archive, Selection};
use crate::io::checkpoints::TRAINING;
use crate::io::{CONFIG, Checkpoints, EMA, TOKENIZER, WEIGHTS, run_config};
use crate::model::{is_of_llm, is_of_tokenizer};

/// Whether a folder is a run, finished or not, a checkpoint, or an exported model.
pub fn is_run(folder: &Path) -> bool {
    folder.join(CONFIG).is_file()
}

/// Some tensors of a file.
fn chosen(path: &Path, keep: impl Fn(&str) -> bool) -> Result<Selection> {
    let mut all = Selection::whole(Archive::open(path)?);
    all.retain(keep);
    Ok(all)
}

/// The language model in the folder that `io::model_folder` gives.
pub fn llm_of_run(folder: &Path) -> Result<ForeignLlm> {
    let config = run_config(folder)?.llm;
    let text = folder.join(TOKENIZER);
    let text =
        text.is_file().then(|| std::fs::read_to_string(&text).map_err(Error::io(&text))).transpose()?;
    let architecture = if config.qkv_bias { "Qwen2ForCausalLM" } else { "LlamaForCausalLM" };
    Ok(ForeignLlm {
        config,
        weights: chosen(&folder.join(WEIGHTS), is_of_llm)?,
        text,
        architecture: architecture.into(),
        ends: Vec::new(),
        notes: Vec::new(),
    })
}

/// The vision tokenizer in the folder that `io::model_folder` gives, with what trained it.
pub fn tokenizer_of_run(folder: &Path) -> Result<ForeignTokenizer> {
    let cfg = run_config(folder)?;
    let weights = chosen(&folder.join(WEIGHTS), is_of_tokenizer)?;
    let averages = folder.join(EMA);
    let averages = averages.is_file().then(|| chosen(&averages, is_of_tokenizer)).transpose()?;
    let has = |prefix: &str| weights.tensors().any(|(name, _)| name.starts_with(prefix));
    let (discriminates, perceives) = (has("loss.discriminator."), has("loss.perceptual_loss."));
    Ok(ForeignTokenizer {
        tokenizer: cfg.tokenizer,
        quantizer: cfg.quantizer,
        discriminator: discriminates.then_some(cfg.discriminator),
        widths: perceives.then_some(cfg.lpips.widths),
        random_features: cfg.lpips.weights.is_none(),
        decay: averages.is_some().then_some(cfg.train.ema_decay),
        weights,
        averages,
        updates: None,
        state: state(folder)?,
        notes: Vec::new(),
    })
}

/// What the discriminator's training carries from step to step, from the last checkpoint.
fn state(folder: &Path) -> Result<Selection> {
    let own = folder.join(TRAINING);
    let file = match own.is_file() {
        true => Some(own),
        false => Checkpoints::latest(folder)?.map(|last| last.join(TRAINING)),
    };
    match file.filter(|file| file.is_file()) {
        Some(file) => chosen(&file, |name| name.starts_with("loss.")),
        None => Ok(Selection::new(folder)),
    }
}
