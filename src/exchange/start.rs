//! The weights that a run starts from, and what they determine of its configuration.

use std::path::{Path, PathBuf};

use super::run::{is_run, llm_of_run, tokenizer_of_run};
use super::{ForeignLlm, ForeignPerceptual, ForeignTokenizer, open_llm, open_perceptual, open_tokenizer};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::files;
use crate::formats::Selection;
use crate::io::TOKENIZER;
use crate::io::weights::{Fit, load_selection};
use crate::model::{Ett, is_of_llm, is_of_tokenizer};

/// The matrices with a row per token.
const ROWS: [&str; 2] = ["model.embed_tokens.weight", "lm_head.weight"];
const PERCEPTUAL: &str = "loss.perceptual_loss.";

/// Opens the language model that `init.llm` names.
fn llm_at(path: &Path) -> Result<ForeignLlm> {
    if is_run(path) {
        return llm_of_run(path);
    }
    if path.is_file() {
        let what = "is a file; `init.llm` names a folder: write one with `ett import FILE --out FOLDER`";
        return Err(Error::weights(path, what));
    }
    open_llm(path)
}

/// Opens the tokenizer that `init.tokenizer` names.
fn tokenizer_at(path: &Path) -> Result<ForeignTokenizer> {
    if is_run(path) { tokenizer_of_run(path) } else { open_tokenizer(path) }
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
        if text.is_file() {
            let text = std::path::absolute(&text).map_err(Error::io(&text))?;
            let text = toml::Value::String(text.to_string_lossy().into_owned());
            section(table, "data").map(|data| data.entry("tokenizer").or_insert(text));
        }
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
        fill_widths(table, t.widths, &path)?;
    }
    let features = table.get("lpips").and_then(|l| l.get("weights")?.as_str()).map(|p| base.join(p));
    if let Some(path) = features {
        let features = open_perceptual(std::slice::from_ref(&path))?;
        fill_widths(table, Some(features.widths), &path)?;
    }
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
    perceptual: Option<ForeignPerceptual>,
    vocab: usize,
}

impl Start {
    /// Opens the weights of `init` and `lpips.weights`.
    pub fn open(cfg: &Config) -> Result<Self> {
        let init = &cfg.init;
        let mut tokenizer = init.tokenizer.as_deref().map(tokenizer_at).transpose()?;
        if let (Some(t), Some(path), true) = (&mut tokenizer, &init.tokenizer, init.averages) {
            let none = || Error::weights(path, "holds no averages of weights; set `init.averages = false`");
            t.weights.extend(t.averages.take().ok_or_else(none)?);
        }
        let perceptual = match &cfg.lpips.weights {
            Some(path) => Some(open_perceptual(std::slice::from_ref(path))?),
            None => None,
        };
        let llm = init.llm.as_deref().map(llm_at).transpose()?;
        Ok(Start { llm, tokenizer, perceptual, vocab: cfg.llm.vocab })
    }

    /// Whether [`Start::load`] overwrites the whole of a parameter.
    pub fn gives(&self, name: &str) -> bool {
        let (llm, tokenizer) = (self.llm.as_ref(), self.tokenizer.as_ref());
        match llm.and_then(|l| l.weights.dims(name)) {
            Some(dims) if ROWS.contains(&name) => dims.first() == Some(&self.vocab),
            Some(_) => true,
            None => {
                let others = [tokenizer.map(|t| &t.weights), self.perceptual.as_ref().map(|p| &p.weights)];
                others.into_iter().flatten().any(|part| part.dims(name).is_some())
            }
        }
    }

    /// Whether the vision tokenizer is a trained one.
    pub fn reconstructs(&self) -> bool {
        self.tokenizer.is_some()
    }

    /// Overwrites the weights of a model by those that were named; all that differs is an error, or is logged if it may.
    pub fn load(&self, model: &Ett) -> Result<()> {
        let params = &model.params;
        let exact = Fit::EXACT;
        if let Some(llm) = &self.llm {
            let fit = Fit { wanted: &is_of_llm, grows: &|name| ROWS.contains(&name), ..exact };
            let differences = load_selection(params, &llm.weights, fit)?;
            tell(&format!("language model ({})", llm.architecture), &llm.weights, &llm.notes, &differences);
        }
        if let Some(t) = &self.tokenizer {
            let has = |prefix: &str| t.weights.tensors().any(|(name, _)| name.starts_with(prefix));
            let lacks: Vec<&str> =
                ["loss.discriminator.", PERCEPTUAL].into_iter().filter(|p| !has(p)).collect();
            let wanted = |name: &str| is_of_tokenizer(name) && !lacks.iter().any(|p| name.starts_with(p));
            let differences = load_selection(params, &t.weights, Fit { wanted: &wanted, ..exact })?;
            tell("vision tokenizer", &t.weights, &t.notes, &differences);
        }
        let random = match (&self.perceptual, &self.tokenizer) {
            (Some(perceptual), _) => {
                let wanted = |name: &str| name.starts_with(PERCEPTUAL);
                let optional = |name: &str| name.contains(".lin") || name.contains(".scaling_layer.");
                let fit = Fit { wanted: &wanted, optional: &optional, ..exact };
                let differences = load_selection(params, &perceptual.weights, fit)?;
                tell("perceptual loss", &perceptual.weights, &perceptual.notes, &differences);
                false
            }
            (None, Some(t)) => !t.weights.tensors().any(|(name, _)| name.starts_with(PERCEPTUAL)),
            (None, None) => true,
        };
        if random {
            tracing::info!(
                "perceptual loss: random VGG features from a fixed seed (lpips.weights names no file)"
            );
        }
        Ok(())
    }
}

/// Logs which weights were loaded, and what is new or was changed.
fn tell(what: &str, from: &Selection, notes: &[String], differences: &[String]) {
    tracing::info!("{what}: {} tensors of {}", from.tensors().count(), from.path().display());
    for line in notes.iter().chain(differences) {
        tracing::info!("  {line}");
    }
}
