//! Which files a tokenizer consists of.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

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
            [] => {
                let what = format!(
                    "holds no file of weights (.{}); name another folder or a file",
                    WEIGHTS.join(", .")
                );
                return Err(Error::weights(path, what));
            }
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

fn ending(path: &Path) -> Option<&str> {
    path.extension()?.to_str()
}

/// The files of a folder with one of these endings, in order.
fn files(folder: &Path, endings: &[&str]) -> Result<Vec<PathBuf>> {
    let mut found = vec![];
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        if ending(&path).is_some_and(|ending| endings.contains(&ending)) && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn names(files: &[PathBuf]) -> String {
    let names: Vec<_> = files.iter().filter_map(|f| f.file_name()).map(|n| n.to_string_lossy()).collect();
    names.join(", ")
}
