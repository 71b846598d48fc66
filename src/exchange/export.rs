//! What `ett export` writes of a trained model.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::card::card;
use super::run::{llm_of_run, tokenizer_of_run};
use super::{write_checkpoint, write_llm, write_tokenizer};
use crate::backend::Plan;
use crate::error::{Error, Result};
use crate::formats::{Archive, Encoding, FileTensor, Selection};
use crate::io::weights::{Note, TensorFile};
use crate::io::{EMA, History, WEIGHTS, model_folder, run_config, write_model};
use crate::model::{Ett, MODULES};

/// How a whole model is written.
#[derive(Debug, Clone)]
pub struct ModelOptions {
    /// How weights are stored; `None`: as in the run.
    pub encoding: Option<Encoding>,
    /// Also what only training needs: discriminator and perceptual loss.
    pub training: bool,
    /// The licence for the model card.
    pub licence: Option<String>,
}

/// Writes into the folder `out` what the use of a model needs of a run, or of a checkpoint: weights and averages, their
/// history, the configuration without paths, the text tokenizer and a model card.
/// [`Trained::open`](crate::infer::Trained::open) reads the folder, and all commands use it like the run. Fails if `out` holds
/// a model already.
pub fn export_model(run: &Path, out: &Path, o: &ModelOptions) -> Result<()> {
    let folder = model_folder(run)?;
    let cfg = run_config(&folder)?;
    let params = Ett::without(&cfg, Arc::new(Plan::new()), &|_| true)?.params;
    let weights = TensorFile::open(&folder.join(WEIGHTS))?;
    let before = weights.note().map_or(vec![], |note| note.without.clone());
    let left_out = |group: &str| before.iter().any(|g| g == group);
    let needless = MODULES.iter().filter(|m| left_out(m.group) || !(m.in_use || o.training));
    let without: Vec<&str> = needless.map(|m| m.group).collect();
    let kept = params.names().filter(|(_, group, _)| !without.contains(group));
    let kept: Vec<&str> = kept.map(|(name, ..)| name).collect();
    if let Some(name) = kept.iter().find(|name| weights.encoding(name).is_none()) {
        return Err(Error::weights(folder.join(WEIGHTS), format!("missing `{name}`; name a complete run")));
    }
    let history = History::of(&weights).unwrap_or(History { unknown: true, ..History::default() });
    // Evaluations reconstruct with the averages, but the language model was trained on the codes of the weights.
    let averages = folder.join(EMA);
    let averages = match averages.exists() {
        true => Selection::whole(Archive::open(&averages)?),
        false => Selection::new(&averages),
    };
    let weights = Selection::whole(weights.into_archive());
    let card = card(run, &cfg, (&params, &without), &history, o.licence.as_deref())?;
    let averages = kept_tensors(&averages, &kept, o.encoding)?;
    let weights = kept_tensors(&weights, &kept, o.encoding)?;
    write_model(out, &cfg, &card, weights, &Note::new(&history, &without), averages)
}

/// The tensors of a file that are kept.
fn kept_tensors<'a>(
    from: &'a Selection,
    kept: &[&str],
    encoding: Option<Encoding>,
) -> Result<Vec<FileTensor<'a>>> {
    let there = kept.iter().filter(|name| from.dims(name).is_some());
    there.map(|name| from.tensor(name, name.to_string(), encoding)).collect()
}

/// Writes the language model of a run as a folder that `transformers` loads. Returns the files.
pub fn export_llm(run: &Path, out: &Path, encoding: Option<Encoding>) -> Result<Vec<PathBuf>> {
    let llm = llm_of_run(&model_folder(run)?)?;
    write_llm(out, &llm.config, &llm.weights, llm.text.as_deref().map(str::as_bytes), &[], encoding)
}

/// Writes the vision tokenizer of a run: a `.ckpt` that IBQ's code loads, or a `.safetensors` file. Returns what was left out,
/// in words.
pub fn export_tokenizer(run: &Path, out: &Path, encoding: Option<Encoding>) -> Result<Vec<String>> {
    let t = tokenizer_of_run(&model_folder(run)?)?;
    match out.extension().and_then(|e| e.to_str()) {
        Some("ckpt") => write_checkpoint(out, &t),
        Some("safetensors") => write_tokenizer(out, &t, encoding),
        _ => Err(Error::data(out, "is no .ckpt or .safetensors file; name one of these to write")),
    }
}
