//! Checkpoints: folders that hold everything needed to resume a run.
//!
//! `RUN/checkpoints/step-00000120/` is written under a temporary name, synced and renamed; then the file
//! `RUN/checkpoints/latest` is replaced by one that names it. A run that is killed at any moment resumes from the
//! checkpoint named there. `state.json` is written last and lists the other files with their sizes and checksums.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::weights::{Entry, FileType, TensorFile, entries, misfit, write_tensors};
use super::{CONFIG, EMA, Fingerprint, History, Optimizer, TOKENIZER, WEIGHTS};
use crate::backend::{Cast, Role, Stream};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::files::{self, FileWriter, Written, replace, sync_dir, write_synced};
use crate::model::Ett;
use crate::nn::Copy;
use crate::tensor::Tensor;

/// Folder of a run's checkpoints.
pub const CHECKPOINTS: &str = "checkpoints";
/// File that names the latest checkpoint.
const LATEST: &str = "latest";
/// Moments, the discriminator's statistics and the window of recent codes.
const TRAINING: &str = "training.safetensors";
pub(super) const STATE: &str = "state.json";
/// Version of the layout described above.
const FORMAT: u32 = 1;
/// Name of the tensor of recent codes.
const WINDOW: &str = "window";
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

/// `state.json`.
#[derive(Serialize, Deserialize)]
struct State {
    format: u32,
    progress: Progress,
    /// Steps of each optimizer.
    optimizers: Vec<u64>,
    /// The groups being trained.
    trained: Vec<String>,
    /// The groups with averages.
    averaged: Vec<String>,
    files: Vec<Listed>,
}

#[derive(Serialize, Deserialize)]
struct Listed {
    name: String,
    bytes: u64,
    crc32: u32,
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

    /// Saves everything, makes it the run's latest checkpoint and returns its folder. If it is interrupted, by a
    /// crash or a full disk, the previous checkpoint stays the latest.
    pub fn save(&self, model: &Ett, optimizers: &[&Optimizer], progress: &Progress) -> Result<PathBuf> {
        self.write(model, optimizers, progress).map_err(|e| self.explain(e))
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

    fn write(&self, model: &Ett, optimizers: &[&Optimizer], progress: &Progress) -> Result<PathBuf> {
        let all = self.run.join(CHECKPOINTS);
        if !all.is_dir() {
            std::fs::create_dir_all(&all).map_err(Error::io(&all))?;
            sync_dir(&self.run)?;
        }
        sweep(&all)?;
        let name = format!("step-{:08}", progress.total);
        let (part, to) = (all.join(format!(".{name}.part")), all.join(&name));
        std::fs::create_dir(&part).map_err(Error::io(&part))?;
        phase(&name, "begun");
        let undo = |e: Error| {
            let _ = std::fs::remove_dir_all(&part);
            e
        };
        fill(&part, &name, model, optimizers, progress).map_err(undo)?;
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
    pub(super) fn recover(run: &Path) -> Result<()> {
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
    /// incomplete, the newest complete one is returned, with a warning. Nothing is changed, so this may be called
    /// while the run is in progress.
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
                Err(e) => tracing::warn!("the latest checkpoint cannot be used: {e}"),
            }
        }
        let folders = list(&all)?;
        let found = folders.iter().rev().map(|(_, folder)| folder).find(|folder| whole(folder).is_ok());
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

/// The text of a configuration file next to the run's own copy of the text tokenizer.
pub fn config_text(cfg: &Config) -> Result<String> {
    let mut cfg = cfg.clone();
    cfg.data.tokenizer = cfg.data.tokenizer.map(|_| TOKENIZER.into());
    toml::to_string(&cfg).map_err(|e| Error::config("configuration", e, "values TOML can hold"))
}

fn fill(
    folder: &Path,
    name: &str,
    model: &Ett,
    optimizers: &[&Optimizer],
    progress: &Progress,
) -> Result<()> {
    let groups = |copy| {
        let all = model.params.groups().into_iter();
        all.filter(|g| model.params.has(g, copy)).map(String::from).collect::<Vec<_>>()
    };
    let mut files = Vec::new();
    let mut listed = |file: &str, written: Written| {
        files.push(Listed { name: file.into(), bytes: written.bytes, crc32: written.crc32 });
        phase(name, file);
    };
    let tensors = |file: &str, entries: Vec<Entry>, note: Option<String>| -> Result<Written> {
        let mut file = FileWriter::create(&folder.join(file))?;
        write_tensors(&mut file, entries, note)?;
        file.finish()
    };
    listed(CONFIG, write_synced(&folder.join(CONFIG), config_text(&model.cfg)?.as_bytes())?);
    if let Some(file) = &progress.tokenizer {
        listed(TOKENIZER, write_synced(&folder.join(TOKENIZER), file)?);
    }
    let note = Some(progress.history.note()?);
    listed(WEIGHTS, tensors(WEIGHTS, entries(&model.params, Copy::Master, ""), note)?);
    let averaged = groups(Copy::Ema);
    if !averaged.is_empty() {
        listed(EMA, tensors(EMA, entries(&model.params, Copy::Ema, ""), None)?);
    }
    let mut training = entries(&model.params, Copy::Moment1, "moment1.");
    training.extend(entries(&model.params, Copy::Moment2, "moment2."));
    training.extend(carried(model).into_iter().map(|c| c.entry(model)));
    training.push(Entry {
        name: WINDOW.into(),
        dims: vec![progress.window.len()],
        ty: FileType::I32,
        values: Box::new(|| Ok(progress.window.iter().map(|&c| c.into()).collect())),
    });
    listed(TRAINING, tensors(TRAINING, training, None)?);
    let state = State {
        format: FORMAT,
        progress: progress.clone(),
        optimizers: optimizers.iter().map(|o| o.steps()).collect(),
        trained: groups(Copy::Moment1),
        averaged,
        files,
    };
    let path = folder.join(STATE);
    let state = serde_json::to_string_pretty(&state)
        .map_err(|e| Error::data(&path, format!("cannot be written ({e})")))?;
    let text = format!("{}{:08x}{}{state}}}\n", SUM[0], crc32fast::hash(state.as_bytes()), SUM[1]);
    write_synced(&path, text.as_bytes())?;
    phase(name, STATE);
    sync_dir(folder)?;
    phase(name, "synced");
    Ok(())
}

/// State of the discriminator, under PyTorch's names.
struct Carried<'a> {
    name: String,
    /// `None`: the number of batches, which is on the host.
    tensor: Option<&'a Tensor>,
}

fn carried(model: &Ett) -> Vec<Carried<'_>> {
    let s = &model.discriminator_state;
    let mut all = vec![Carried { name: "loss.lecam_ema".into(), tensor: Some(&s.lecam) }];
    for (i, (mean, var)) in s.running.iter().enumerate() {
        // The BatchNorms are layers 3, 6 and 9.
        let mut put = |what: &str, tensor| {
            all.push(Carried { name: format!("loss.discriminator.main.{}.{what}", 3 + 3 * i), tensor });
        };
        put("running_mean", Some(mean));
        put("running_var", Some(var));
        put("num_batches_tracked", None);
    }
    all
}

impl<'a> Carried<'a> {
    fn shape(&self, model: &Ett) -> (FileType, Vec<usize>) {
        match self.tensor {
            Some(t) => (FileType::of(model.params.precision()), t.dims().as_slice().to_vec()),
            None => (FileType::I64, vec![]),
        }
    }

    fn entry(self, model: &'a Ett) -> Entry<'a> {
        let (ty, dims) = self.shape(model);
        let values = move || match self.tensor {
            Some(t) => t.to_f64(&**model.params.device()),
            None => Ok(vec![model.discriminator_state.batches as f64]),
        };
        Entry { name: self.name, dims, ty, values: Box::new(values) }
    }
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
    if format != FORMAT {
        let what = format!("has the format {format}, wanted {FORMAT}; use the version of ett that wrote it");
        return Err(Error::data(&path, what));
    }
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

/// Configuration keys that may change when a run is resumed, since no weight depends on them. Data may be moved, as
/// long as they are the same, see [`check_data`].
const FREE: [&str; 9] = [
    "train.threads",
    "train.recompute",
    "train.save_every",
    "train.keep",
    "train.eval_every",
    "data.train",
    "data.test",
    "data.cache_mib",
    "data.eval_samples",
];

/// The data of a stage may be moved, too.
fn is_free(key: &str) -> bool {
    let of_a_stage = key.strip_prefix("stage.").and_then(|k| k.split_once('.')).map(|(_, k)| k);
    FREE.contains(&key) || of_a_stage.is_some_and(|k| ["data.train", "data.test"].contains(&k))
}

/// Fails if a run would be resumed with another configuration than its checkpoint's, and names the keys. Threads,
/// saving, evaluation and the location of the data may change.
pub fn check_config(folder: &Path, cfg: &Config) -> Result<()> {
    let then = Config::load(&folder.join(CONFIG), &[])?;
    let table = |cfg: &Config| -> Result<BTreeMap<String, String>> {
        let mut keys = BTreeMap::new();
        let text = config_text(cfg)?;
        let parsed = toml::from_str(&text).map_err(|e| Error::config("configuration", e, "valid TOML"))?;
        flatten("", &toml::Value::Table(parsed), &mut keys);
        Ok(keys)
    };
    let (then, now) = (table(&then)?, table(cfg)?);
    let keys: BTreeSet<&String> = then.keys().chain(now.keys()).collect();
    let show = |v: Option<&String>| v.cloned().unwrap_or("left out".into());
    let changed: Vec<String> = keys
        .into_iter()
        .filter(|k| then.get(*k) != now.get(*k) && !is_free(k))
        .map(|k| format!("`{k}` was {}, now {}", show(then.get(k)), show(now.get(k))))
        .collect();
    if changed.is_empty() {
        return Ok(());
    }
    let what = format!("{}; change it back, or start a new run", misfit("the configuration", changed));
    Err(Error::data(folder, what))
}

/// Fails if a run would be resumed with other data than it was trained on, and says what differs.
pub fn check_data(folder: &Path, then: &[Fingerprint], now: &[Fingerprint]) -> Result<()> {
    let changed: Vec<String> = then.iter().zip(now).flat_map(|(then, now)| then.differences(now)).collect();
    if changed.is_empty() {
        return Ok(());
    }
    let what = format!(
        "the data is not what the run was trained on: {}; put the data back, or start a new run",
        changed.join("; ")
    );
    Err(Error::data(folder, what))
}

/// Dotted keys and their values as text.
fn flatten(key: &str, value: &toml::Value, keys: &mut BTreeMap<String, String>) {
    let dotted = |k: &str| if key.is_empty() { k.to_string() } else { format!("{key}.{k}") };
    match value {
        toml::Value::Table(t) => t.iter().for_each(|(k, v)| flatten(&dotted(k), v, keys)),
        toml::Value::Array(a) if a.iter().any(toml::Value::is_table) => {
            a.iter().enumerate().for_each(|(i, v)| flatten(&dotted(&i.to_string()), v, keys));
        }
        v => {
            keys.insert(key.to_string(), v.to_string());
        }
    }
}

/// The destination of a tensor of a checkpoint.
enum Target {
    Param(String, Copy),
    Carried(Tensor),
    Batches,
    /// Has any length; [`progress`] reads it.
    Window,
}

/// A tensor that a file must hold.
struct Wanted {
    name: String,
    ty: FileType,
    dims: Vec<usize>,
    target: Target,
}

/// The tensors that the files of a checkpoint must hold for a model.
fn wanted(model: &Ett, state: &State) -> Vec<(&'static str, Vec<Wanted>)> {
    let ty = FileType::of(model.params.precision());
    let params = |copy: Copy, prefix: &'static str, kept: &dyn Fn(&str) -> bool| -> Vec<Wanted> {
        let all = model.params.names().filter(|(_, group, _)| kept(group));
        all.map(|(name, _, dims)| Wanted {
            name: format!("{prefix}{name}"),
            ty,
            dims: dims.to_vec(),
            target: Target::Param(name.into(), copy),
        })
        .collect()
    };
    let trained = |group: &str| model.params.has(group, Copy::Moment1);
    let averaged = |group: &str| state.averaged.iter().any(|g| g == group);
    let mut training = params(Copy::Moment1, "moment1.", &trained);
    training.extend(params(Copy::Moment2, "moment2.", &trained));
    training.extend(carried(model).into_iter().map(|c| {
        let (ty, dims) = c.shape(model);
        let target = c.tensor.map_or(Target::Batches, |t| Target::Carried(t.clone()));
        Wanted { name: c.name, ty, dims, target }
    }));
    training.push(Wanted { name: WINDOW.into(), ty: FileType::I32, dims: vec![], target: Target::Window });
    let mut all = vec![(WEIGHTS, params(Copy::Master, "", &|_| true)), (TRAINING, training)];
    if !state.averaged.is_empty() {
        all.push((EMA, params(Copy::Ema, "", &averaged)));
    }
    all
}

/// Restores weights, averages, moments, the optimizers' step counts and the discriminator's statistics, bit for bit,
/// into a model and optimizers that train the same groups. Every file is checked before anything is changed.
/// Afterwards the model has the averages of the checkpoint, whichever groups are being trained.
pub fn load(folder: &Path, model: &mut Ett, optimizers: &mut [&mut Optimizer]) -> Result<()> {
    let state = whole(folder)?;
    for f in &state.files {
        let path = folder.join(&f.name);
        if files::checksum(&path)? != (Written { bytes: f.bytes, crc32: f.crc32 }) {
            let what = format!("is damaged: its checksum does not match; {}", remedy(folder));
            return Err(Error::data(path, what));
        }
    }
    let mut problems = Vec::new();
    let trained: Vec<&str> =
        model.params.groups().into_iter().filter(|g| model.params.has(g, Copy::Moment1)).collect();
    if trained != state.trained {
        problems.push(format!("it trained the groups {:?}, this run trains {trained:?}", state.trained));
    }
    if optimizers.len() != state.optimizers.len() {
        problems.push(format!("it had {} optimizers, now {}", state.optimizers.len(), optimizers.len()));
    }
    let mut plan = Vec::new();
    for (file, wanted) in wanted(model, &state) {
        let file = TensorFile::open(&folder.join(file))?;
        let mut found = file.tensors();
        for w in &wanted {
            let any_length = matches!(w.target, Target::Window);
            match found.remove(&w.name) {
                None => problems.push(format!("missing `{}` {:?}", w.name, w.dims)),
                Some((_, dims)) if dims != w.dims && !any_length => {
                    problems.push(format!("`{}` is {dims:?}, wanted {:?}", w.name, w.dims));
                }
                Some((dtype, _)) if dtype != w.ty.dtype() => {
                    problems.push(format!("`{}` is {dtype:?}, wanted {:?}", w.name, w.ty.dtype()));
                }
                Some(_) => {}
            }
        }
        problems.extend(found.into_keys().map(|name| format!("unknown `{name}`")));
        plan.push((file, wanted));
    }
    if !problems.is_empty() {
        return Err(Error::weights(folder, misfit("what is being trained", problems)));
    }
    let averaged: Vec<&str> = state.averaged.iter().map(String::as_str).collect();
    let others: Vec<String> = model.params.groups().into_iter().map(String::from).collect();
    let others: Vec<&str> = others.iter().map(String::as_str).filter(|g| !averaged.contains(g)).collect();
    model.params.drop_averages(&others);
    model.params.average(&averaged)?;
    for (file, wanted) in plan {
        for w in wanted {
            match w.target {
                Target::Param(name, copy) => {
                    model.params.write_public(&name, copy, &file.read_finite(&w.name)?)?;
                }
                Target::Carried(to) => {
                    let values = file.read(&w.name)?.values;
                    let dev = &**model.params.device();
                    let from = Tensor::from_f64(dev, Role::Input, to.dtype(), &values, to.dims())?;
                    dev.cast(Stream::COMPUTE, &Cast { x: from.view(), y: to.out() })?;
                }
                Target::Batches => {
                    model.discriminator_state.batches = file.read(&w.name)?.values[0] as u64;
                }
                Target::Window => {}
            }
        }
    }
    model.params.refresh()?;
    for (o, steps) in optimizers.iter_mut().zip(&state.optimizers) {
        o.resume(*steps);
    }
    Ok(())
}
