//! The weights that a run starts from, and what they determine of its configuration.

use std::path::{Path, PathBuf};

use super::run::{is_run, llm_of_run, tokenizer_of_run};
use super::{ForeignLlm, ForeignPerceptual, ForeignTokenizer, open_llm, open_perceptual, open_tokenizer};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::files;
use crate::formats::Selection;
use crate::io::weights::{Fit, TensorFile, load_selection};
use crate::io::{History, Skill, TOKENIZER, WEIGHTS, model_folder};
use crate::model::{Ett, PER_TOKEN, is_of_llm, is_of_tokenizer};

const PERCEPTUAL: &str = "loss.perceptual_loss.";
const DISCRIMINATOR: &str = "loss.discriminator.";

/// Fails if a key names nothing.
fn there(key: &str, path: &Path) -> Result<()> {
    match path.exists() {
        true => Ok(()),
        false => {
            Err(Error::config(key, path.display(), "weights that are there; fetch them, or correct the path"))
        }
    }
}

/// Opens the language model that `init.llm` names.
fn llm_at(path: &Path) -> Result<ForeignLlm> {
    there("init.llm", path)?;
    if is_run(path) {
        return llm_of_run(&model_folder(path)?);
    }
    if path.is_file() {
        let what = "is a file; `init.llm` names a folder: write one with `ett import FILE --out FOLDER`";
        return Err(Error::weights(path, what));
    }
    open_llm(path)
}

/// Opens the tokenizer that `init.tokenizer` names.
fn tokenizer_at(path: &Path) -> Result<ForeignTokenizer> {
    there("init.tokenizer", path)?;
    if is_run(path) { tokenizer_of_run(&model_folder(path)?) } else { open_tokenizer(path) }
}

/// Opens the features that `lpips.weights` names.
fn features_at(path: &PathBuf) -> Result<ForeignPerceptual> {
    there("lpips.weights", path)?;
    open_perceptual(std::slice::from_ref(path))
}

/// Reads a configuration, and completes it by what the weights that it names determine: sizes that the file leaves out, and
/// the text tokenizer. Sizes that contradict the weights are errors.
pub fn load_config(path: &Path, overrides: &[String]) -> Result<Config> {
    Config::load_completed(path, overrides, &|table| complete(table, files::parent(path)))
}

fn complete(table: &mut toml::Table, base: &Path) -> Result<()> {
    let path = |table: &toml::Table, key: &str| -> Option<PathBuf> {
        let path = table.get("init")?.get(key)?.as_str().filter(|p| !p.is_empty())?;
        Some(base.join(path))
    };
    if let Some(path) = path(table, "llm") {
        let llm = llm_at(&path)?;
        fill(table, "llm", &llm.config, &["init_std", "positions"], &path)?;
        let text = path.join(TOKENIZER);
        let named = table.get("data").is_some_and(|data| data.get("tokenizer").is_some());
        if text.is_file() && !named {
            check_text(&path, &llm, &text)?;
            add_path(table, "data", "tokenizer", &text)?;
        }
    }
    let features = table.get("lpips").and_then(|l| l.get("weights")?.as_str()).map(|p| base.join(p));
    if let Some(path) = &features {
        fill_widths(table, Some(features_at(path)?.widths), path)?;
    }
    if let Some(path) = path(table, "tokenizer") {
        let t = tokenizer_at(&path)?;
        fill(table, "tokenizer", &t.tokenizer, &[], &path)?;
        let losses = ["beta", "beta_on", "temperature", "entropy_eps", "init_scale", "precision", "metric"];
        fill(table, "quantizer", &t.quantizer, &losses, &path)?;
        if let Some(d) = &t.discriminator {
            let free = ["lecam_decay", "slope", "norm_eps", "momentum"];
            fill(table, "discriminator", d, &free, &path)?;
        }
        if features.is_none() {
            fill_widths(table, t.widths, &path)?;
        }
        if features.is_none() && t.widths.is_some() && !t.random_features {
            add_path(table, "lpips", "weights", t.weights.path())?;
        }
    }
    Ok(())
}

/// Fails if a text tokenizer lacks tokens that `open_llm` has added.
fn check_text(folder: &Path, llm: &ForeignLlm, file: &Path) -> Result<()> {
    let text = std::fs::read_to_string(file).map_err(Error::io(file))?;
    if llm.text.as_ref().is_none_or(|complete| *complete == text) {
        return Ok(());
    }
    let what = format!(
        "lacks special tokens that ett needs; write a complete copy with `ett import {} --out FOLDER`, and name that one",
        folder.display()
    );
    Err(Error::data(file, what))
}

/// Adds a key with a path.
fn add_path(table: &mut toml::Table, name: &str, key: &str, path: &Path) -> Result<()> {
    let path = std::path::absolute(path).map_err(Error::io(path))?;
    let path = toml::Value::String(path.to_string_lossy().into_owned());
    section(table, name).map(|section| section.insert(key.into(), path));
    Ok(())
}

/// Adds the widths of VGG16, if the weights have one.
fn fill_widths(table: &mut toml::Table, widths: Option<[usize; 5]>, path: &Path) -> Result<()> {
    #[derive(serde::Serialize)]
    struct Widths {
        widths: [usize; 5],
    }
    widths.map_or(Ok(()), |widths| fill(table, "lpips", &Widths { widths }, &[], path))
}

/// A section of a configuration, made if it is not there; `None` if the key is no section.
fn section<'a>(table: &'a mut toml::Table, name: &str) -> Option<&'a mut toml::Table> {
    table.entry(name).or_insert_with(|| toml::Value::Table(toml::Table::new())).as_table_mut()
}

/// Adds the keys of `values` that a section lacks, and compares the others, except for those that are `free`. A vocabulary
/// may be larger than the one of the weights.
fn fill(
    table: &mut toml::Table,
    name: &str,
    values: &impl serde::Serialize,
    free: &[&str],
    path: &Path,
) -> Result<()> {
    let values = toml::Table::try_from(values).map_err(|e| Error::config(name, e, "values TOML can hold"))?;
    let Some(section) = section(table, name) else { return Ok(()) };
    for (key, value) in values {
        let Some(have) = section.get(&key) else {
            section.insert(key, value);
            continue;
        };
        let more = key == "vocab" && have.as_integer() > value.as_integer();
        if !free.contains(&key.as_str()) && !more && !same(have, &value) {
            let want = format!("{value} as in {}; leave the key out", path.display());
            return Err(Error::config(format!("{name}.{key}"), have, want));
        }
    }
    Ok(())
}

/// Whether two values are the same; numbers may be written with or without a point.
fn same(a: &toml::Value, b: &toml::Value) -> bool {
    let number = |v: &toml::Value| v.as_float().or(v.as_integer().map(|i| i as f64));
    a == b || number(a).is_some_and(|a| Some(a) == number(b))
}

/// The weights that a configuration names, opened but not read.
pub struct Start {
    llm: Option<ForeignLlm>,
    tokenizer: Option<ForeignTokenizer>,
    /// Whether the tokenizer was trained to reconstruct.
    reconstructs: bool,
    perceptual: Option<ForeignPerceptual>,
    vocab: usize,
}

impl Start {
    /// Opens the weights of `init` and `lpips.weights`.
    pub fn open(cfg: &Config) -> Result<Self> {
        let named = |path: &Option<PathBuf>| path.clone().filter(|p| !p.as_os_str().is_empty());
        let (llm, tokenizer) = (named(&cfg.init.llm), named(&cfg.init.tokenizer));
        let reconstructs = match &tokenizer {
            Some(path) if is_run(path) => {
                let history = History::of(&TensorFile::open(&model_folder(path)?.join(WEIGHTS))?);
                history.is_none_or(|h| h.unknown || h.learnt.contains(&Skill::Reconstruct))
            }
            path => path.is_some(),
        };
        let llm = llm.as_deref().map(llm_at).transpose()?;
        if let Some(llm) = &llm {
            warn_of_text(llm, cfg)?;
        }
        let mut opened = tokenizer.as_deref().map(tokenizer_at).transpose()?;
        if let (Some(t), Some(path)) = (&mut opened, &tokenizer) {
            if cfg.init.averages {
                let none =
                    || Error::weights(path, "holds no averages of weights; set `init.averages = false`");
                t.weights.extend(t.averages.take().ok_or_else(none)?);
            }
            // The perceptual loss has a key of its own, by default with this file.
            t.weights.retain(|name| !name.starts_with(PERCEPTUAL));
        }
        let perceptual = match named(&cfg.lpips.weights) {
            Some(path) => Some(features_at(&path)?),
            None => None,
        };
        Ok(Start { llm, tokenizer: opened, reconstructs, perceptual, vocab: cfg.llm.vocab })
    }

    /// Whether [`Start::load`] overwrites the whole of a parameter.
    pub fn gives(&self, name: &str) -> bool {
        match self.llm.as_ref().and_then(|l| l.weights.dims(name)) {
            Some(dims) if PER_TOKEN.contains(&name) => dims.first() == Some(&self.vocab),
            Some(_) => true,
            None => {
                let tokenizer = self.tokenizer.as_ref().map(|t| &t.weights);
                let others = [tokenizer, self.perceptual.as_ref().map(|p| &p.weights)];
                others.into_iter().flatten().any(|part| part.dims(name).is_some())
            }
        }
    }

    /// Whether `init` names any weights.
    pub fn has_parts(&self) -> bool {
        self.llm.is_some() || self.tokenizer.is_some()
    }

    /// Whether the vision tokenizer is one that was trained to reconstruct.
    pub fn reconstructs(&self) -> bool {
        self.reconstructs
    }

    /// Overwrites the weights of a model by those that were named; all that differs is an error, or is logged if it may.
    pub fn load(&self, model: &mut Ett) -> Result<()> {
        let exact = Fit::EXACT;
        if let Some(llm) = &self.llm {
            let fit = Fit { wanted: &is_of_llm, grows: &|name| PER_TOKEN.contains(&name), ..exact };
            let differences = load_selection(&model.params, &llm.weights, fit)?;
            tell(&format!("language model ({})", llm.architecture), &llm.weights, &llm.notes, &differences);
        }
        if let Some(t) = &self.tokenizer {
            let judged = t.weights.tensors().any(|(name, _)| name.starts_with(DISCRIMINATOR));
            let wanted = |name: &str| {
                is_of_tokenizer(name)
                    && !name.starts_with(PERCEPTUAL)
                    && (judged || !name.starts_with(DISCRIMINATOR))
            };
            let mut differences =
                load_selection(&model.params, &t.weights, Fit { wanted: &wanted, ..exact })?;
            match judged {
                true => load_state(model, &t.state)?,
                false => differences.push("the discriminator is new".into()),
            }
            tell("vision tokenizer", &t.weights, &t.notes, &differences);
        }
        match &self.perceptual {
            Some(perceptual) => {
                let wanted = |name: &str| name.starts_with(PERCEPTUAL);
                let optional = |name: &str| name.contains(".lin") || name.contains(".scaling_layer.");
                let fit = Fit { wanted: &wanted, optional: &optional, ..exact };
                load_selection(&model.params, &perceptual.weights, fit)?;
                tell("perceptual loss", &perceptual.weights, &perceptual.notes, &[]);
            }
            None => tracing::info!(
                "perceptual loss: random VGG features from a fixed seed (lpips.weights names no file)"
            ),
        }
        Ok(())
    }
}

/// Takes over what the discriminator's training carries from step to step.
fn load_state(model: &mut Ett, state: &Selection) -> Result<()> {
    let carried: Vec<String> = model.carried().into_iter().map(|(name, _)| name).collect();
    for name in carried.iter().filter(|name| state.dims(name).is_some()) {
        let values = state.read(name)?.values;
        if values.iter().any(|v| !v.is_finite()) {
            return Err(Error::weights(state.path(), format!("`{name}` has values that are not finite")));
        }
        model.set_carried(name, &values)?;
    }
    Ok(())
}

/// Warns if a run reads text by another tokenizer than its language model did.
fn warn_of_text(llm: &ForeignLlm, cfg: &Config) -> Result<()> {
    let Some(theirs) = &llm.text else { return Ok(()) };
    let ours = match &cfg.data.tokenizer {
        Some(path) => Some(std::fs::read_to_string(path).map_err(Error::io(path))?),
        None => None,
    };
    if ours.as_ref() != Some(theirs) {
        tracing::warn!(
            "{}: this language model was trained with another text tokenizer than data.tokenizer",
            llm.weights.path().display()
        );
    }
    Ok(())
}

/// Logs which weights were loaded, and what is new or was changed.
fn tell(what: &str, from: &Selection, notes: &[String], differences: &[String]) {
    tracing::info!("{what}: {} tensors of {}", from.tensors().count(), from.path().display());
    for line in notes.iter().chain(differences) {
        tracing::info!("  {line}");
    }
}
