//! Writing tokenizers: as a file of ours, and as a checkpoint for IBQ's reference code.

use std::path::Path;

use super::layout::{self, Sizes};
use super::saved::Saved;
use super::{EMA, ForeignTokenizer, LECAM, LPIPS, OWN_EMA, Shape, heads, no_problems, scaling, trained, vgg};
use crate::error::{Error, Result};
use crate::exchange::named::{create, misfits, tensors};
use crate::formats::{Encoding, FileTensor, Tree, write_safetensors, write_torch};

/// The decay of averages in the reference.
const DECAY: f64 = 0.999;
/// The version of PyTorch Lightning whose checkpoints are written.
const LIGHTNING: &str = "2.2.0";

/// What is written of a tokenizer.
struct Parts {
    /// The weights of tokenizer and discriminator.
    trained: Vec<Shape>,
    /// Those of the perceptual loss.
    perceptual: Vec<Shape>,
    /// The discriminator's means and variances, and its counts of batches.
    running: Vec<Shape>,
    counts: Vec<String>,
    notes: Vec<String>,
}

impl Parts {
    /// Checks that everything needed is there, before a file is made.
    fn of(from: &ForeignTokenizer) -> Result<Self> {
        let q = &from.quantizer;
        if from.tokenizer.ch_mult.is_empty() {
            return Err(Error::config("tokenizer.ch_mult", "[]", "1 to 8 factors"));
        }
        let sizes = Sizes { tokenizer: from.tokenizer.clone(), codes: q.codes, dim: q.dim };
        let ndf = from.discriminator.as_ref().map(|d| d.ndf);
        let trained = trained(&sizes, ndf);
        let (running, counts) = ndf.map(layout::statistics).unwrap_or_default();
        let mut problems = misfits(&from.weights, &trained);
        let mut notes = vec![];
        let perceptual = match &from.widths {
            Some(widths) => [vgg(widths), heads(widths), scaling()].concat(),
            None => {
                notes.push(format!("has no perceptual loss (`{LPIPS}*`)"));
                vec![]
            }
        };
        problems.extend(misfits(&from.weights, &perceptual));
        if ndf.is_none() {
            notes.push("has no discriminator (`loss.discriminator.*`)".into());
        }
        let there: Vec<Shape> =
            running.iter().filter(|(n, _)| from.state.dims(n).is_some()).cloned().collect();
        problems.extend(misfits(&from.state, &there));
        if there.len() < running.len() {
            notes.push(
                "has the running statistics of an untrained discriminator: the trained ones are not known"
                    .into(),
            );
        }
        if let Some(averages) = &from.averages {
            let (have, missing): (Vec<Shape>, Vec<Shape>) =
                trained.iter().cloned().partition(|(name, _)| averages.dims(name).is_some());
            problems.extend(misfits(averages, &have));
            if !missing.is_empty() {
                let what = "have no averages, and stand for them themselves";
                notes.push(format!("{} {what}: `{}` and its like", tensors(missing.len()), missing[0].0));
            }
        }
        no_problems(from.weights.path(), "the tokenizer", problems)?;
        Ok(Parts { trained, perceptual, running, counts, notes })
    }

    /// All weights.
    fn weights(&self) -> impl Iterator<Item = &str> {
        self.trained.iter().chain(&self.perceptual).map(|(name, _)| name.as_str())
    }

    /// The averages; a weight without one stands for itself.
    fn averages<'a>(
        &self,
        from: &'a ForeignTokenizer,
        encoding: Option<Encoding>,
        renamed: impl Fn(&str) -> String,
    ) -> Result<Vec<FileTensor<'a>>> {
        let Some(averages) = &from.averages else { return Ok(vec![]) };
        let one = |(name, _): &Shape| {
            let source = if averages.dims(name).is_some() { averages } else { &from.weights };
            source.tensor(name, renamed(name), encoding)
        };
        self.trained.iter().map(one).collect()
    }

    /// The discriminator's statistics: those of an untrained one where they are missing, and counts of batches as PyTorch
    /// stores them.
    fn state<'a>(&self, from: &'a ForeignTokenizer) -> Result<Vec<FileTensor<'a>>> {
        let mut all = vec![];
        for (name, dims) in &self.running {
            all.push(match from.state.dims(name) {
                Some(_) => from.state.tensor(name, name.clone(), None)?,
                None => {
                    let value = if name.ends_with("running_var") { 1.0 } else { 0.0 };
                    constant(name.clone(), dims.clone(), Encoding::F32, value)
                }
            });
        }
        for name in &self.counts {
            let count = match from.state.dims(name) {
                Some(_) => from.state.read(name)?.values.first().copied(),
                None => None,
            };
            all.push(constant(name.clone(), vec![], Encoding::I64, count.unwrap_or(0.0)));
        }
        Ok(all)
    }
}

/// A tensor with one value throughout.
fn constant<'a>(name: String, dims: Vec<usize>, encoding: Encoding, value: f64) -> FileTensor<'a> {
    let count = dims.iter().product();
    FileTensor { name, dims, encoding, bytes: Box::new(move || encoding.encode(&vec![value; count])) }
}

/// Writes a tokenizer as a safetensors file that [`open_tokenizer`](super::open_tokenizer) reads; `None` keeps the encoding
/// of every tensor. The discriminator's statistics always keep theirs. `from` may hold more tensors than are written.
/// Returns what the file lacks, in words.
pub fn write_tokenizer(
    path: &Path,
    from: &ForeignTokenizer,
    encoding: Option<Encoding>,
) -> Result<Vec<String>> {
    let parts = Parts::of(from)?;
    let plain = |name: &str| from.weights.tensor(name, name.into(), encoding);
    let mut all: Vec<FileTensor> = parts.weights().map(plain).collect::<Result<_>>()?;
    all.extend(parts.averages(from, encoding, |name| format!("{OWN_EMA}{name}"))?);
    all.extend(parts.state(from)?);
    if from.discriminator.is_some() && from.state.dims(LECAM).is_some() {
        all.push(from.state.tensor(LECAM, LECAM.into(), None)?);
    }
    let metadata = Saved::of(from).metadata(path)?;
    create(path, |file| write_safetensors(file, all, metadata))?;
    Ok(parts.notes)
}

/// Writes a tokenizer as a `.ckpt` of PyTorch Lightning that IBQ's reference code loads with `strict=True`, if it has a
/// discriminator and a perceptual loss. `from` may hold more tensors than are written. Returns what the file lacks, in words.
pub fn write_checkpoint(path: &Path, from: &ForeignTokenizer) -> Result<Vec<String>> {
    let mut parts = Parts::of(from)?;
    let plain = |name: &str| from.weights.tensor(name, name.into(), None);
    let mut all: Vec<FileTensor> = parts.weights().map(plain).collect::<Result<_>>()?;
    all.extend(parts.state(from)?);
    // The reference finds the name of an average by the weights before it.
    if from.averages.is_some() {
        all.push(constant(format!("{EMA}decay"), vec![], Encoding::F32, from.decay.unwrap_or(DECAY)));
        let updates = from.updates.map_or(-1.0, |n| n.min(i32::MAX as u64) as f64);
        all.push(constant(format!("{EMA}num_updates"), vec![], Encoding::I32, updates));
    }
    all.extend(parts.averages(from, None, |name| format!("{EMA}{}", name.replace('.', "")))?);
    if from.state.dims(LECAM).is_some() {
        parts.notes.push("LeCAM's averages are left out, which such checkpoints do not have".into());
    }
    let tensors = all.into_iter().map(|t| (t.name.clone(), Tree::Tensor(t))).collect();
    // For ett; other programs pass over it.
    let said = Saved::of(from).metadata(path)?.into_iter().map(|(key, text)| (key, Tree::Text(text)));
    let mut root: Vec<(String, Tree)> = said.collect();
    root.extend([
        ("epoch".into(), Tree::Int(0)),
        ("global_step".into(), Tree::Int(0)),
        ("pytorch-lightning_version".into(), Tree::Text(LIGHTNING.into())),
        ("state_dict".into(), Tree::Dict(tensors)),
    ]);
    create(path, |file| write_torch(file, Tree::Dict(root)))?;
    Ok(parts.notes)
}
