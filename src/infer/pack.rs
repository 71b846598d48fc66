//! A small copy of a trained model, for use only.

use std::path::Path;
use std::sync::Arc;

use super::model_folder;
use crate::backend::Plan;
use crate::error::Result;
use crate::formats::Encoding;
use crate::io::weights::{Entry, Note, TensorFile};
use crate::io::{EMA, History, WEIGHTS, run_config, write_model};
use crate::model::{Ett, MODULES};

/// Writes into the folder `out` what the use of a model needs of a run, or of a checkpoint: weights and averages in
/// bf16, without the groups that only training needs, their history, the configuration without the paths of data, and
/// the text tokenizer. [`Trained::open`](super::Trained::open) reads the folder, and all commands use it like the run.
/// Fails if `out` holds a model already.
pub fn pack(run: &Path, out: &Path) -> Result<()> {
    let folder = model_folder(run)?;
    let cfg = run_config(&folder)?;
    let params = Ett::new(&cfg, Arc::new(Plan::new()))?.params;
    let without: Vec<&str> = MODULES.iter().filter(|m| !m.in_use).map(|m| m.group).collect();
    let kept = params.names().filter(|(_, group, _)| !without.contains(group));
    let kept: Vec<(&str, &[usize])> = kept.map(|(name, _, dims)| (name, dims)).collect();
    let weights = TensorFile::open(&folder.join(WEIGHTS))?;
    let history = History::of(&weights).unwrap_or(History { unknown: true, ..History::default() });
    // Evaluations reconstruct with the averages, but the language model was trained on the codes of the weights.
    let averages = folder.join(EMA);
    let averages = if averages.exists() { Some(TensorFile::open(&averages)?) } else { None };
    let averaged = averages.iter().flat_map(|file| {
        let there = file.tensors();
        kept.iter().filter(move |(name, _)| there.contains_key(*name)).map(move |at| small(file, *at))
    });
    let weights = kept.iter().map(|at| small(&weights, *at)).collect();
    write_model(out, &cfg, weights, &Note::new(&history, &without), averaged.collect())
}

/// A tensor of a file, in bf16.
fn small<'a>(file: &'a TensorFile, (name, dims): (&'a str, &[usize])) -> Entry<'a> {
    let values = Box::new(move || Ok(file.read_finite(name)?.values));
    Entry { name: name.into(), dims: dims.to_vec(), encoding: Encoding::Bf16, values }
}
