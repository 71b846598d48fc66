//! A folder as `transformers` saves and loads it.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::ForeignLlm;
use super::config::{Described, describe};
use super::keys::{Keys, read_object, read_some};
use super::layout::{Tensors, is_buffer};
use crate::error::{Error, Result};
use crate::formats::{Archive, Change};
use crate::io::weights::misfit;

/// Largest sizes of files that are read as a whole, in bytes; published ones have much less.
const CONFIG: u64 = 4 << 20;
const INDEX: u64 = 64 << 20;
const TOKENIZER: u64 = 128 << 20;

/// Opens a folder.
pub(super) fn open(path: &Path) -> Result<ForeignLlm> {
    let config = path.join("config.json");
    let map = read_object(&config, CONFIG)?.ok_or_else(|| {
        Error::weights(path, "has no config.json; name the folder of a model, or a GGUF file")
    })?;
    let Described { llm, architecture, ends } = describe(&config, &map)?;
    let ends = match generation_ends(path, llm.vocab)? {
        Some(given) => given,
        None => ends,
    };
    let (named, all) = weights(path)?;
    let tensors = Tensors { path: &named, all, spelled: str::to_string };
    let weights = tensors.select(&llm, |_| Change::None, why)?;
    let tokenizer = path.join("tokenizer.json");
    let text = read_some(&tokenizer, TOKENIZER)?.map(String::from_utf8).transpose();
    let text = text.map_err(|_| Error::weights(&tokenizer, "is not UTF-8 text; fetch it again"))?;
    let mut notes = Vec::new();
    if text.is_none() {
        notes.push("the folder has no tokenizer.json, so the model is read without a text tokenizer".into());
    }
    let model =
        ForeignLlm { config: llm, weights, text: None, architecture: architecture.into(), ends, notes };
    model.with_text(&tokenizer, text)
}

/// Why a tensor is not part of a model.
fn why(name: &str) -> &'static str {
    if name.contains(".q_norm.") || name.contains(".k_norm.") {
        return " (ett computes no norm of queries and keys)";
    }
    if name.contains("_proj.bias") {
        return " (ett computes no such bias)";
    }
    ""
}

/// The tokens that end a text; `None` if the file does not say.
fn generation_ends(path: &Path, vocab: usize) -> Result<Option<Vec<usize>>> {
    let path = path.join("generation_config.json");
    let Some(map) = read_object(&path, CONFIG)? else { return Ok(None) };
    let ends = Keys { path: &path, map: &map }.tokens("eos_token_id", vocab)?;
    Ok((!ends.is_empty()).then_some(ends))
}

/// The path that errors name, and the file of every tensor.
fn weights(path: &Path) -> Result<(PathBuf, BTreeMap<String, Arc<Archive>>)> {
    for name in ["model.safetensors", "pytorch_model.bin"] {
        let file = path.join(name);
        if file.is_file() {
            let archive = Arc::new(Archive::open(&file)?);
            let all = archive.tensors().keys().map(|name| (name.clone(), archive.clone())).collect();
            return Ok((file, all));
        }
        let index = path.join(format!("{name}.index.json"));
        if let Some(map) = read_object(&index, INDEX)? {
            let all = shards(path, Keys { path: &index, map: &map })?;
            return Ok((index, all));
        }
    }
    let what = "has neither model.safetensors nor pytorch_model.bin, nor the index of either; fetch the weights, too";
    Err(Error::weights(path, what))
}

/// The tensors of several files, each in the one that the index names.
fn shards(folder: &Path, index: Keys) -> Result<BTreeMap<String, Arc<Archive>>> {
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| index.wrong("weight_map", "a dictionary of tensors and files"))?;
    let mut files: BTreeMap<&str, Arc<Archive>> = BTreeMap::new();
    let (mut all, mut problems) = (BTreeMap::new(), Vec::new());
    for (name, file) in map {
        let file = file.as_str().filter(|file| is_plain(file)).ok_or_else(|| {
            let what = format!("gives `{name}` the file {file}, wanted the name of a file in this folder");
            Error::weights(index.path, what)
        })?;
        if !files.contains_key(file) {
            let shard = folder.join(file);
            if !shard.exists() {
                let what = format!("names {file}, which is not in the folder; fetch it, too");
                return Err(Error::weights(index.path, what));
            }
            files.insert(file, Arc::new(Archive::open(&shard)?));
        }
        let archive = &files[file];
        match archive.tensors().contains_key(name) {
            true => drop(all.insert(name.clone(), archive.clone())),
            false => problems.push(format!("`{name}` is not in {file}")),
        }
    }
    for (file, archive) in &files {
        let placed = |name: &String| map.get(name).and_then(Value::as_str) == Some(file);
        let other = archive.tensors().keys().filter(|name| !placed(name) && !is_buffer(name));
        problems
            .extend(other.map(|name| format!("{file} has `{name}`, which the index does not place there")));
    }
    match problems.is_empty() {
        true => Ok(all),
        false => Err(Error::weights(index.path, misfit("the files that it names", problems))),
    }
}

/// Whether a text is the name of a file, without a folder.
fn is_plain(file: &str) -> bool {
    let mut parts = Path::new(file).components();
    let one = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
    one && !file.contains(['/', '\\', '\0'])
}
