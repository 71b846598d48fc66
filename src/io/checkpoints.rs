//! Checkpoint folders: how they are written, found and checked, and the progress that they record. Their tensors are
//! written and read in `train::checkpoint`.
//!
//! `RUN/checkpoints/step-00000120/` is written under a temporary name, synced and renamed; then the file
//! `RUN/checkpoints/latest` is replaced by one that names it. A run that is killed at any moment resumes from the
//! checkpoint named there. `state.json` is written last and lists the other files with their sizes and checksums.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::weights::{Entry, Note, TensorFile, attend, write_tensors};
use super::{Fingerprint, History, TOKENIZER};
use crate::error::{Error, Result};
use crate::files::{self, FileWriter, Written, replace, sync_dir, write_synced};

/// Folder of a run's checkpoints.
pub(crate) const CHECKPOINTS: &str = "checkpoints";
/// File that names the latest checkpoint.
const LATEST: &str = "latest";
/// Moments, the state that the model carries from step to step, and the window of recent codes.
pub(crate) const TRAINING: &str = "training.safetensors";
pub(crate) const STATE: &str = "state.json";
/// Version of the layout described above.
const FORMAT: u32 = 1;
/// Name of the tensor of recent codes.
pub(crate) const WINDOW: &str = "window";
/// Text before and after the checksum in `state.json`.
const SUM: [&str; 2] = ["{\"crc32\": \"", "\",\n\"state\": "];

/// State of a run besides tensors and optimizers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Number of the stage, from 0.
    pub stage: usize,
    /// Its name.
    pub stage_name: String,
    /// Steps done in the stage.
    pub step: usize,
    /// Steps done in the run.
    pub total: usize,
    /// Updates of the stage skipped because of non-finite values.
    pub skipped: usize,
    /// Consecutive skipped updates since the last update.
    pub in_a_row: usize,
    /// Seconds per stage, by name, including the current one.
    pub seconds: Vec<(String, f64)>,
    /// Bytes of the metrics written so far, as returned by [`files::Lines::sync`].
    pub metrics: u64,
    /// Fingerprints of the training data.
    #[serde(default)]
    pub data: Vec<Fingerprint>,
    /// History of the weights.
    #[serde(default)]
    pub history: History,
    /// Recent codes, to measure codebook usage.
    #[serde(skip)]
    pub window: Vec<i32>,
    /// The file of the text tokenizer; `None` for bytes.
    #[serde(skip)]
    pub tokenizer: Option<Arc<[u8]>>,
}

/// The optimizers and groups whose tensors a checkpoint holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Contents {
    /// Steps of each optimizer.
    pub optimizers: Vec<u64>,
    /// The groups being trained.
    pub trained: Vec<String>,
    /// The groups with averages.
    pub averaged: Vec<String>,
    /// Number of ranks that the run had.
    #[serde(default = "one")]
    pub ranks: usize,
}

fn one() -> usize {
    1
}

/// `state.json`.
#[derive(Serialize, Deserialize)]
struct State {
    format: u32,
    progress: Progress,
    #[serde(flatten)]
    contents: Contents,
    files: Vec<Listed>,
}

#[derive(Serialize, Deserialize)]
struct Listed {
    name: String,
    bytes: u64,
    crc32: u32,
}

/// A checkpoint being written.
pub(crate) struct Draft<'a> {
    /// `None`: this rank takes part, but another one writes.
    folder: Option<&'a Path>,
    name: &'a str,
    files: Vec<Listed>,
}

impl Draft<'_> {
    /// Writes a file.
    pub fn file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let Some(folder) = self.folder else { return Ok(()) };
        let written = write_synced(&folder.join(name), bytes)?;
        self.list(name, written);
        Ok(())
    }

    /// Writes tensors in the safetensors format, with a note in the header.
    pub fn tensors(&mut self, name: &str, entries: Vec<Entry>, note: Option<&Note>) -> Result<()> {
        let Some(folder) = self.folder else { return attend(entries) };
        let mut file = FileWriter::create(&folder.join(name))?;
        write_tensors(&mut file, entries, note)?;
        let written = file.finish()?;
        self.list(name, written);
        Ok(())
    }

    fn list(&mut self, file: &str, written: Written) {
        self.files.push(Listed { name: file.into(), bytes: written.bytes, crc32: written.crc32 });
        phase(self.name, file);
    }

    /// Writes `state.json`, which completes the checkpoint.
    fn finish(self, folder: &Path, progress: &Progress, contents: Contents) -> Result<()> {
        let state = State { format: FORMAT, progress: progress.clone(), contents, files: self.files };
        let path = folder.join(STATE);
        let state = serde_json::to_string_pretty(&state)
            .map_err(|e| Error::data(&path, format!("cannot be written ({e})")))?;
        let text = format!("{}{:08x}{}{state}}}\n", SUM[0], crc32fast::hash(state.as_bytes()), SUM[1]);
        write_synced(&path, text.as_bytes())?;
        phase(self.name, STATE);
        sync_dir(folder)?;
        phase(self.name, "synced");
        Ok(())
    }
}

/// The name of a checkpoint's folder.
fn name(progress: &Progress) -> String {
    format!("step-{:08}", progress.total)
}

/// The checkpoints of a run.
pub struct Checkpoints {
    run: PathBuf,
    keep: usize,
}

impl Checkpoints {
    /// The checkpoints of a run folder; the newest `keep`, at least one, are kept.
    pub fn new(run: &Path, keep: usize) -> Self {
        Checkpoints { run: run.into(), keep: keep.max(1) }
    }

    /// Writes a checkpoint with the files that `fill` adds, makes it the run's latest and returns its folder. If it
    /// is interrupted, by a crash or a full disk, the previous checkpoint stays the latest.
    pub(crate) fn write(
        &self,
        progress: &Progress,
        fill: impl FnOnce(&mut Draft) -> Result<Contents>,
    ) -> Result<PathBuf> {
        self.place(progress, fill).map_err(|e| self.explain(e))
    }

    /// Takes part in [`Checkpoints::write`] of rank 0, which writes the files, and returns the folder.
    pub(crate) fn attend(
        &self,
        progress: &Progress,
        fill: impl FnOnce(&mut Draft) -> Result<Contents>,
    ) -> Result<PathBuf> {
        let name = name(progress);
        fill(&mut Draft { folder: None, name: &name, files: Vec::new() })?;
        Ok(self.run.join(CHECKPOINTS).join(name))
    }

    /// For a full disk, adds to the error which checkpoint the run can be resumed from; returns other errors
    /// unchanged.
    pub fn explain(&self, e: Error) -> Error {
        if !files::is_full(&e) {
            return e;
        }
        let (path, source) = match e {
            Error::Io { path, source } => (path, source),
            other => return other,
        };
        let last = match Self::latest(&self.run) {
            Ok(Some(last)) => format!("the last checkpoint, {}, is complete", last.display()),
            _ => "the run has no checkpoint yet".into(),
        };
        Error::data(
            path,
            format!("the disk is full ({source}); {last}; free some space, then resume the run"),
        )
    }

    fn place(
        &self,
        progress: &Progress,
        fill: impl FnOnce(&mut Draft) -> Result<Contents>,
    ) -> Result<PathBuf> {
        let all = self.run.join(CHECKPOINTS);
        if !all.is_dir() {
            std::fs::create_dir_all(&all).map_err(Error::io(&all))?;
            sync_dir(&self.run)?;
        }
        sweep(&all)?;
        let name = name(progress);
        let (part, to) = (all.join(format!(".{name}.part")), all.join(&name));
        std::fs::create_dir(&part).map_err(Error::io(&part))?;
        phase(&name, "begun");
        let undo = |e: Error| {
            let _ = std::fs::remove_dir_all(&part);
            e
        };
        let mut draft = Draft { folder: Some(&part), name: &name, files: Vec::new() };
        fill(&mut draft).and_then(|contents| draft.finish(&part, progress, contents)).map_err(undo)?;
        // A checkpoint of this step exists if a run was killed before it became the latest, or if it is saved twice.
        // A crash between the two renames leaves the temporary folder, which `latest` then uses.
        let before = aside(&to)?;
        if let Err(e) = std::fs::rename(&part, &to) {
            if let Some(before) = before {
                let _ = std::fs::rename(before, &to);
            }
            return Err(undo(Error::io(&to)(e)));
        }
        phase(&name, "renamed");
        sync_dir(&all)?;
        phase(&name, "its place synced");
        replace(&all.join(LATEST), |file| file.put(format!("{name}\n").as_bytes()))?;
        phase(&name, "latest replaced");
        self.prune(&all, progress.total)?;
        phase(&name, "older ones removed");
        Ok(to)
    }

    /// Removes all but the newest checkpoints up to step `total`. Later ones are left from a run that was killed
    /// before they became the latest.
    fn prune(&self, all: &Path, total: usize) -> Result<()> {
        let (later, mut earlier): (Vec<_>, Vec<_>) =
            list(all)?.into_iter().partition(|(step, _)| *step > total);
        earlier.truncate(earlier.len().saturating_sub(self.keep));
        for (_, folder) in later.into_iter().chain(earlier) {
            aside(&folder)?;
        }
        sweep(all)
    }

    /// Completes a save that was interrupted by a kill; only for the process that holds the run's lock.
    pub(crate) fn recover(run: &Path) -> Result<()> {
        let all = run.join(CHECKPOINTS);
        let Some(name) = Self::named(&all) else { return Ok(()) };
        let (folder, part) = (all.join(&name), all.join(format!(".{name}.part")));
        if !folder.exists() && whole(&part).is_ok() {
            std::fs::rename(&part, &folder).map_err(Error::io(&folder))?;
            sync_dir(&all)?;
        }
        Ok(())
    }

    /// The name in the file `latest`, if it is valid.
    fn named(all: &Path) -> Option<String> {
        let name = std::fs::read_to_string(all.join(LATEST)).unwrap_or_default();
        Some(name.trim().to_string()).filter(|n| step_of(n).is_some())
    }

    /// The checkpoint that a run resumes from; `None` if it has none. If the one named as the latest is missing or
    /// incomplete, the newest complete one is returned, with a warning; one in another format is an error. Nothing is
    /// changed, so this may be called while the run is in progress.
    pub fn latest(run: &Path) -> Result<Option<PathBuf>> {
        let all = run.join(CHECKPOINTS);
        if !all.is_dir() {
            return Ok(None);
        }
        let named = Self::named(&all);
        if let Some(name) = &named {
            let (folder, part) = (all.join(name), all.join(format!(".{name}.part")));
            // A run was killed between the two renames of a checkpoint that replaces one of the same step.
            if !folder.exists() && whole(&part).is_ok() {
                return Ok(Some(part));
            }
            match whole(&folder) {
                Ok(_) => return Ok(Some(folder)),
                Err(e @ Error::Format { .. }) => return Err(e),
                Err(e) => tracing::warn!("the latest checkpoint cannot be used: {e}"),
            }
        }
        let folders = list(&all)?;
        let mut found = None;
        for (_, folder) in folders.iter().rev() {
            match whole(folder) {
                Ok(_) => {
                    found = Some(folder);
                    break;
                }
                Err(e @ Error::Format { .. }) => return Err(e),
                Err(_) => {}
            }
        }
        match found {
            Some(folder) => {
                let why = if named.is_some() { "instead" } else { "the file `latest` is missing" };
                tracing::warn!("continuing from the checkpoint {} ({why})", folder.display());
                Ok(Some(folder.clone()))
            }
            None if folders.is_empty() && named.is_none() => Ok(None),
            None => Err(Error::data(&all, "holds no complete checkpoint; start a new run in another folder")),
        }
    }
}

/// Logs a phase of saving; pauses there if a test requests it.
fn phase(name: &str, what: &str) {
    tracing::debug!(target: "ett::checkpoint", "{name}: {what}");
    let pause = std::env::var("ETT_SAVE_PAUSE").ok().and_then(|ms| ms.parse().ok());
    if let Some(ms) = pause {
        std::thread::sleep(Duration::from_millis(ms));
    }
}

/// The step in the name of a checkpoint.
fn step_of(name: &str) -> Option<usize> {
    let digits =
        name.strip_prefix("step-").filter(|d| d.len() >= 8 && d.bytes().all(|b| b.is_ascii_digit()))?;
    digits.parse().ok()
}

/// The names in a folder.
fn names(folder: &Path) -> Result<Vec<String>> {
    let io = |e| Error::io(folder)(e);
    let found = std::fs::read_dir(folder).map_err(io)?;
    found.map(|entry| Ok(entry.map_err(io)?.file_name().to_string_lossy().into_owned())).collect()
}

/// All checkpoints by step, complete or not.
fn list(all: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let mut found: Vec<_> =
        names(all)?.iter().filter_map(|name| Some((step_of(name)?, all.join(name)))).collect();
    found.sort();
    Ok(found)
}

/// Renames a checkpoint, if it exists, so that it is never visible half removed.
fn aside(folder: &Path) -> Result<Option<PathBuf>> {
    if !folder.exists() {
        return Ok(None);
    }
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let aside = folder.with_file_name(format!(".{name}.old.part"));
    std::fs::rename(folder, &aside).map_err(Error::io(folder))?;
    Ok(Some(aside))
}

/// Removes files and folders that killed runs left under temporary names.
fn sweep(all: &Path) -> Result<()> {
    for name in names(all)?.iter().filter(|n| n.starts_with('.') && n.ends_with(".part")) {
        let path = all.join(name);
        let removed = match path.is_dir() {
            true => std::fs::remove_dir_all(&path),
            false => std::fs::remove_file(&path),
        };
        removed.map_err(Error::io(&path))?;
    }
    Ok(())
}

/// Reads `state.json`.
fn read_state(folder: &Path) -> Result<State> {
    let path = folder.join(STATE);
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let parts =
        text.strip_prefix(SUM[0]).and_then(|t| t.strip_suffix("}\n")).and_then(|t| t.split_once(SUM[1]));
    let Some((_, state)) = parts.filter(|(sum, s)| *sum == format!("{:08x}", crc32fast::hash(s.as_bytes())))
    else {
        return Err(Error::data(
            &path,
            format!("is damaged: its checksum does not match; {}", remedy(folder)),
        ));
    };
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let unreadable = |e: serde_json::Error| Error::data(&path, format!("cannot be read ({e})"));
    let Format { format } = serde_json::from_str(state).map_err(unreadable)?;
    files::check_format(&path, format, FORMAT..=FORMAT)?;
    serde_json::from_str(state).map_err(unreadable)
}

fn remedy(folder: &Path) -> String {
    format!("remove {} to continue from the previous checkpoint", folder.display())
}

/// Fails if a file of a checkpoint is missing or its size differs from the size written.
fn whole(folder: &Path) -> Result<State> {
    let state = read_state(folder)?;
    for f in &state.files {
        let path = folder.join(&f.name);
        let bytes = std::fs::metadata(&path).map_err(Error::io(&path))?.len();
        if bytes != f.bytes {
            let what = format!("is damaged: it has {bytes} bytes, wanted {}; {}", f.bytes, remedy(folder));
            return Err(Error::data(path, what));
        }
    }
    Ok(state)
}

/// Reads the progress from a checkpoint.
pub fn progress(folder: &Path) -> Result<Progress> {
    let State { mut progress, files, .. } = whole(folder)?;
    let window = TensorFile::open(&folder.join(TRAINING))?.read(WINDOW)?;
    progress.window = window.values.into_iter().map(|c| c as i32).collect();
    if files.iter().any(|f| f.name == TOKENIZER) {
        let path = folder.join(TOKENIZER);
        progress.tokenizer = Some(std::fs::read(&path).map_err(Error::io(&path))?.into());
    }
    Ok(progress)
}

/// The contents of a checkpoint, after comparing every file with its checksum.
pub(crate) fn verified(folder: &Path) -> Result<Contents> {
    let state = whole(folder)?;
    for f in &state.files {
        let path = folder.join(&f.name);
        if files::checksum(&path)? != (Written { bytes: f.bytes, crc32: f.crc32 }) {
            let what = format!("is damaged: its checksum does not match; {}", remedy(folder));
            return Err(Error::data(path, what));
        }
    }
    Ok(state.contents)
}
