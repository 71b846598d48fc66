//! The run folder: the names of its files, its configuration, and the errors for folders that are not what is needed.

use std::path::{Path, PathBuf};

use super::checkpoints::{self, Checkpoints};
use super::weights::{Note, write_encoded};
use crate::config::{Config, Recompute};
use crate::error::{Error, Result};
use crate::files;
use crate::formats::FileTensor;

/// Weights of a run, under the public names.
pub const WEIGHTS: &str = "model.safetensors";
/// Averages of the tokenizer's weights, if a stage kept them.
pub const EMA: &str = "ema.safetensors";
/// The configuration of a run.
pub const CONFIG: &str = "config.toml";
/// The run's copy of its text tokenizer; runs that read bytes have none.
pub const TOKENIZER: &str = "tokenizer.json";
/// The metrics of each step, one JSON object per line.
pub const METRICS: &str = "metrics.jsonl";
/// The time spent in each kernel, if it was measured.
pub const PROFILE: &str = "profile.json";
/// The held-out results, written last.
pub const REPORT: &str = "eval.json";
/// The card of an exported model, under the name that Hugging Face shows.
pub(crate) const CARD: &str = "README.md";

/// The configuration of a run folder.
pub fn run_config(out: &Path) -> Result<Config> {
    let path = out.join(CONFIG);
    if !path.exists() {
        refuse_part(out)?;
        let what = format!("holds no {CONFIG}; name the folder of a run of ett-train");
        return Err(Error::data(out, what));
    }
    Config::load(&path, &[])
}

/// The folder with the weights of a run: its own, or its last checkpoint if it has not ended.
pub fn model_folder(run: &Path) -> Result<PathBuf> {
    if run.join(WEIGHTS).exists() {
        return Ok(run.to_path_buf());
    }
    Checkpoints::latest(run)?.ok_or_else(|| {
        let what = format!("holds neither {WEIGHTS} nor a checkpoint; name the folder of a run of ett-train");
        Error::data(run, what)
    })
}

/// The files in the folder of a finished run that users look at, each with a description.
pub fn written(out: &Path) -> Vec<(&'static str, &'static str)> {
    [
        ("losses.png", "curves of every loss"),
        ("reconstructions.png", "held-out pictures above their reconstructions"),
        ("held-out.md", "captions and answers beside the truth"),
        ("drawings.png", "pictures drawn for held-out prompts"),
        (REPORT, "the held-out results above, with their settings"),
        (METRICS, "one line per step"),
        (PROFILE, "the time spent in each kernel"),
        (WEIGHTS, "the weights; `ett --run` uses this folder"),
    ]
    .into_iter()
    .filter(|(file, _)| out.join(file).exists())
    .collect()
}

/// Fails if `out` already holds a run; the error names the remedy.
pub(crate) fn refuse_used(out: &Path) -> Result<()> {
    if out.join(WEIGHTS).exists() {
        let what = "holds a finished run already; name another folder with --out, or remove it";
        return Err(Error::data(out, what));
    }
    if Checkpoints::latest(out)?.is_some() {
        let what = format!(
            "holds a run that has not ended; go on with `ett-train resume {}`, name another folder with --out, or \
             remove it",
            out.display()
        );
        return Err(Error::data(out, what));
    }
    if out.join(CONFIG).exists() || out.join(METRICS).exists() {
        let what = "holds a run that ended before its first checkpoint; remove the folder, or name another one \
                    with --out";
        return Err(Error::data(out, what));
    }
    Ok(())
}

/// The text of a configuration file that lies next to the run's copy of the text tokenizer.
pub fn config_text(cfg: &Config) -> Result<String> {
    let mut cfg = cfg.clone();
    cfg.data.tokenizer = cfg.data.tokenizer.map(|_| TOKENIZER.into());
    toml::to_string(&cfg).map_err(|e| Error::config("configuration", e, "values TOML can hold"))
}

/// Writes the folder of a model: weights with their note, averages if there are any, the text tokenizer, a model card, and
/// the configuration without paths, which mean nothing elsewhere. Fails if the folder is in use.
pub(crate) fn write_model(
    out: &Path,
    cfg: &Config,
    card: &str,
    weights: Vec<FileTensor>,
    note: &Note,
    averages: Vec<FileTensor>,
) -> Result<()> {
    refuse_used(out)?;
    // Other people's files, such as a README of theirs.
    if let Some(name) = [CARD, TOKENIZER, EMA].into_iter().find(|name| out.join(name).exists()) {
        return Err(Error::data(out, format!("has {name} already; name another folder with --out")));
    }
    let fill = || {
        std::fs::create_dir_all(out).map_err(Error::io(out))?;
        if let Some(from) = &cfg.data.tokenizer {
            let file = std::fs::read(from).map_err(Error::io(from))?;
            files::replace(&out.join(TOKENIZER), |f| f.put(&file))?;
        }
        let mut cfg = cfg.without_paths();
        // A run settles this for its device.
        cfg.train.recompute = Recompute::Auto;
        let text = config_text(&cfg)?;
        files::replace(&out.join(CONFIG), |f| f.put(text.as_bytes()))?;
        files::replace(&out.join(CARD), |f| f.put(card.as_bytes()))?;
        if !averages.is_empty() {
            files::replace(&out.join(EMA), |f| write_encoded(f, averages, None))?;
        }
        files::replace(&out.join(WEIGHTS), |f| write_encoded(f, weights, Some(note))).map(drop)
    };
    fill().inspect_err(|_| {
        for name in [CONFIG, CARD, TOKENIZER, EMA, WEIGHTS] {
            let _ = std::fs::remove_file(out.join(name));
        }
    })
}

/// Fails if the folder is a checkpoint of a run or the folder of its checkpoints.
pub(crate) fn refuse_part(folder: &Path) -> Result<()> {
    match run_of(folder) {
        None => Ok(()),
        Some(run) => {
            let what = format!("is part of a run; go on with `ett-train resume {}`", run.display());
            Err(Error::data(folder, what))
        }
    }
}

/// The run folder that contains this checkpoint, or this folder of checkpoints.
fn run_of(folder: &Path) -> Option<PathBuf> {
    let whole = std::fs::canonicalize(folder).ok()?;
    let all = if folder.join(checkpoints::STATE).exists() { whole.parent()? } else { &whole };
    let run = all.parent().filter(|run| run.join(CONFIG).exists())?;
    all.ends_with(checkpoints::CHECKPOINTS).then(|| run.to_path_buf())
}
