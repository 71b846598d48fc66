//! Which files a tokenizer consists of.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::formats::shown;

/// Endings of files of weights.
const WEIGHTS: [&str; 5] = ["ckpt", "pth", "pt", "bin", "safetensors"];
/// Endings of configurations.
const SETTINGS: [&str; 2] = ["yaml", "yml"];

/// The files of a tokenizer.
pub(super) struct Source {
    /// Its weights.
    pub weights: PathBuf,
    /// Its configuration in YAML, if there is one.
    pub settings: Option<PathBuf>,
}

impl Source {
    /// A folder with a file of weights, or such a file; a configuration lies beside it under the same stem.
    pub fn find(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            if ending(path).is_some_and(|ending| SETTINGS.contains(&ending)) {
                return Err(Error::weights(
                    path,
                    "is a configuration; name the file of weights, or the folder of both",
                ));
            }
            let beside = SETTINGS.map(|ending| path.with_extension(ending));
            let settings = beside.into_iter().find(|beside| beside != path && beside.is_file());
            return Ok(Source { weights: path.into(), settings });
        }
        let weights = match &files(path, &WEIGHTS)?[..] {
            [one] => one.clone(),
            [] => return Err(Error::weights(path, nothing(path)?)),
            several => {
                let what = format!("holds several files of weights ({}); name one of them", names(several));
                return Err(Error::weights(path, what));
            }
        };
        let usual = path.join("config.yaml");
        let settings = match &files(path, &SETTINGS)?[..] {
            _ if usual.is_file() => Some(usual),
            [] => None,
            [one] => Some(one.clone()),
            several => {
                let what =
                    format!("holds several configurations ({}); rename one to config.yaml", names(several));
                return Err(Error::weights(path, what));
            }
        };
        Ok(Source { weights, settings })
    }
}

/// Says what a folder without weights of a tokenizer holds instead.
fn nothing(folder: &Path) -> Result<String> {
    let models = files(folder, &["gguf"])?;
    if let [first, ..] = &models[..] {
        let name = name(first);
        return Ok(format!(
            "holds {name}, but no vision tokenizer: files of GGUF are language models, which `ett import {name} --out \
             FOLDER` reads"
        ));
    }
    let all = entries(folder)?;
    let found = if all.is_empty() { "nothing".into() } else { names(&all) };
    let want = WEIGHTS.join(", .");
    Ok(format!("holds no file of weights (.{want}) but {found}; name another folder or a file"))
}

fn ending(path: &Path) -> Option<&str> {
    path.extension()?.to_str()
}

/// What is in a folder, in order.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let list = std::fs::read_dir(folder).map_err(Error::io(folder))?;
    let mut found =
        list.map(|e| Ok(e?.path())).collect::<std::io::Result<Vec<_>>>().map_err(Error::io(folder))?;
    found.sort();
    Ok(found)
}

/// The files of a folder with one of these endings, in order.
fn files(folder: &Path, endings: &[&str]) -> Result<Vec<PathBuf>> {
    let mut found = entries(folder)?;
    found.retain(|path| ending(path).is_some_and(|ending| endings.contains(&ending)) && path.is_file());
    Ok(found)
}

fn name(file: &Path) -> String {
    shown(&file.file_name().unwrap_or_default().to_string_lossy(), 100)
}

/// The names of files, not of all if there are many.
fn names(files: &[PathBuf]) -> String {
    const MOST: usize = 6;
    let mut names: Vec<String> = files.iter().take(MOST).map(|file| name(file)).collect();
    if files.len() > MOST {
        names.push(format!("{} more", files.len() - MOST));
    }
    names.join(", ")
}
