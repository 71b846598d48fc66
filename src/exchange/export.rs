//! What `ett export` writes of a trained model.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::card::card;
use super::run::{llm_of_run, tokenizer_of_run};
use super::{write_checkpoint, write_llm, write_tokenizer};
use crate::backend::Plan;
use crate::error::{Error, Result};
use crate::formats::Encoding;
use crate::io::weights::{Entry, Note, TensorFile};
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
    let kept: Vec<(&str, &[usize])> = kept.map(|(name, _, dims)| (name, dims)).collect();
    let history = History::of(&weights).unwrap_or(History { unknown: true, ..History::default() });
    // Evaluations reconstruct with the averages, but the language model was trained on the codes of the weights.
    let averages = folder.join(EMA);
    let averages = if averages.exists() { Some(TensorFile::open(&averages)?) } else { None };
    let averaged = averages.iter().flat_map(|file| {
        let there = file.tensors();
        kept.iter()
            .filter(move |(name, _)| there.contains_key(*name))
            .map(move |at| copied(file, *at, o.encoding))
    });
    let entries = kept.iter().map(|at| copied(&weights, *at, o.encoding)).collect();
    let card = card(run, &cfg, &params, &history, o.licence.as_deref())?;
    write_model(out, &cfg, &card, entries, &Note::new(&history, &without), averaged.collect())
}

/// A tensor of a file, in another encoding if one is given.
fn copied<'a>(
    file: &'a TensorFile,
    (name, dims): (&'a str, &[usize]),
    encoding: Option<Encoding>,
) -> Entry<'a> {
    let values = Box::new(move || Ok(file.read_finite(name)?.values));
    let encoding = encoding.or_else(|| file.encoding(name)).unwrap_or(Encoding::F32);
    Entry { name: name.into(), dims: dims.to_vec(), encoding, values }
}

/// Writes the language model of a run as a folder that `transformers` loads. Returns the files.
pub fn export_llm(run: &Path, out: &Path, encoding: Option<Encoding>) -> Result<Vec<PathBuf>> {
    let llm = llm_of_run(&model_folder(run)?)?;
    write_llm(out, &llm.config, &llm.weights, llm.text.as_deref().map(str::as_bytes), encoding)
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
