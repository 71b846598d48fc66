//! The tensors of a checkpoint, and the checks before a run is resumed from it. The folders of checkpoints are
//! handled in `io::checkpoints`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::Optimizer;
use crate::backend::{Kernels, Role, Stream};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::formats::Encoding;
use crate::io::checkpoints::{self, Contents, Draft, TRAINING, WINDOW};
use crate::io::weights::{Entry, Note, TensorFile, entries, lossless, misfit};
use crate::io::{CONFIG, Checkpoints, EMA, Fingerprint, Progress, TOKENIZER, WEIGHTS, config_text};
use crate::model::{Carried, Ett};
use crate::nn::{HostTensor, Stored};
use crate::tensor::Tensor;

/// Saves everything needed to resume a run as its latest checkpoint and returns the checkpoint's folder. All ranks call this at
/// the same point; rank 0 writes.
pub fn save(
    checkpoints: &Checkpoints,
    model: &Ett,
    optimizers: &[&Optimizer],
    progress: &Progress,
) -> Result<PathBuf> {
    let fill = |draft: &mut Draft| fill(draft, model, optimizers, progress);
    match model.params.device().collectives().rank() {
        0 => checkpoints.write(progress, fill),
        _ => checkpoints.attend(progress, fill),
    }
}

fn fill(draft: &mut Draft, model: &Ett, optimizers: &[&Optimizer], progress: &Progress) -> Result<Contents> {
    let groups = |stored| {
        let all = model.params.groups().into_iter();
        all.filter(|g| model.params.has(g, stored)).map(String::from).collect::<Vec<_>>()
    };
    draft.file(CONFIG, config_text(&model.cfg)?.as_bytes())?;
    if let Some(file) = &progress.tokenizer {
        draft.file(TOKENIZER, file)?;
    }
    let note = Note::new(&progress.history, &[]);
    draft.tensors(WEIGHTS, entries(&model.params, Stored::Master, ""), Some(&note))?;
    let averaged = groups(Stored::Ema);
    if !averaged.is_empty() {
        draft.tensors(EMA, entries(&model.params, Stored::Ema, ""), None)?;
    }
    let mut training = entries(&model.params, Stored::Moment1, "moment1.");
    training.extend(entries(&model.params, Stored::Moment2, "moment2."));
    training.extend(model.carried().into_iter().map(|(name, carried)| {
        let (encoding, dims) = shape(model, &carried);
        Entry { name, dims, encoding, values: Box::new(move || carried.values(model)) }
    }));
    let dev = &**model.params.device();
    let ranks = dev.collectives().ranks();
    if has_own(model, ranks) {
        training.extend(model.own_of_rank().into_iter().map(|(name, t)| Entry {
            name: format!("{OWN}{name}"),
            dims: vec![ranks, t.dims().numel()],
            encoding: lossless(model.params.precision()),
            values: Box::new(move || of_all_ranks(dev, t)),
        }));
    }
    training.push(Entry {
        name: WINDOW.into(),
        dims: vec![progress.window.len()],
        encoding: Encoding::I32,
        values: Box::new(|| Ok(progress.window.iter().map(|&c| c.into()).collect())),
    });
    draft.tensors(TRAINING, training, None)?;
    Ok(Contents {
        ranks,
        optimizers: optimizers.iter().map(|o| o.steps(dev)).collect::<Result<_>>()?,
        trained: groups(Stored::Moment1),
        averaged,
    })
}

/// Begins the names of state of which every rank has its own, one row for each.
const OWN: &str = "ranks.";

/// Whether ranks have state of their own.
fn has_own(model: &Ett, ranks: usize) -> bool {
    ranks > 1 && !model.cfg.discriminator.sync
}

/// The values of a small tensor on all ranks.
fn of_all_ranks(dev: &dyn Kernels, t: &Tensor) -> Result<Vec<f64>> {
    let peers = dev.collectives();
    let all = Tensor::empty(dev, Role::Input, t.dtype(), [peers.ranks() * t.dims().numel()])?;
    peers.all_gather(Stream::COMPUTE, t.view(), all.out())?;
    all.to_f64(dev)
}

/// The type and shape in which a file holds state that the model carries from step to step.
fn shape(model: &Ett, carried: &Carried) -> (Encoding, Vec<usize>) {
    match carried {
        Carried::Tensor(t) => (lossless(model.params.precision()), t.dims().as_slice().to_vec()),
        Carried::Count(_) => (Encoding::I64, vec![]),
    }
}

/// Configuration keys that may change when a run is resumed, since no weight depends on them, beyond the order in which ranks
/// add numbers up. Data may be moved, as long as they are the same, see [`check_data`].
const FREE: [&str; 19] = [
    "train.threads",
    "train.shard",
    "train.range_mib",
    "train.stall_s",
    "train.graph",
    "train.workers",
    "train.recompute",
    "train.save_every",
    "train.keep",
    "train.eval_every",
    "data.train",
    "data.test",
    "data.cache_mib",
    "data.eval_samples",
    "data.eval_drawings",
    "sampling.temperature",
    "sampling.top_k",
    "sampling.top_p",
    "sampling.guidance",
];

/// The data of a stage may be moved, too.
fn is_free(key: &str) -> bool {
    let of_a_stage = key.strip_prefix("stage.").and_then(|k| k.split_once('.')).map(|(_, k)| k);
    FREE.contains(&key) || of_a_stage.is_some_and(|k| ["data.train", "data.test"].contains(&k))
}

/// Fails if a run would be resumed with another configuration than its checkpoint's, and names the keys. Threads,
/// saving, evaluation, sampling and the location of the data may change.
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
    Param(String, Stored),
    Carried,
    /// Rows of all ranks.
    Own(String),
    /// Has any length; [`checkpoints::progress`] reads it.
    Window,
}

/// A tensor that a file must hold.
struct Wanted {
    name: String,
    encoding: Encoding,
    dims: Vec<usize>,
    target: Target,
}

/// The tensors that the files of a checkpoint must hold for a model.
fn wanted(model: &Ett, contents: &Contents) -> Vec<(&'static str, Vec<Wanted>)> {
    let encoding = lossless(model.params.precision());
    let params = |stored: Stored, prefix: &'static str, kept: &dyn Fn(&str) -> bool| -> Vec<Wanted> {
        let all = model.params.names().filter(|(_, group, _)| kept(group));
        all.map(|(name, _, dims)| Wanted {
            name: format!("{prefix}{name}"),
            encoding,
            dims: dims.to_vec(),
            target: Target::Param(name.into(), stored),
        })
        .collect()
    };
    let trained = |group: &str| model.params.has(group, Stored::Moment1);
    let averaged = |group: &str| contents.averaged.iter().any(|g| g == group);
    let mut training = params(Stored::Moment1, "moment1.", &trained);
    training.extend(params(Stored::Moment2, "moment2.", &trained));
    training.extend(model.carried().into_iter().map(|(name, carried)| {
        let (encoding, dims) = shape(model, &carried);
        Wanted { name, encoding, dims, target: Target::Carried }
    }));
    if has_own(model, contents.ranks) {
        training.extend(model.own_of_rank().into_iter().map(|(name, t)| Wanted {
            name: format!("{OWN}{name}"),
            encoding,
            dims: vec![contents.ranks, t.dims().numel()],
            target: Target::Own(name),
        }));
    }
    training.push(Wanted {
        name: WINDOW.into(),
        encoding: Encoding::I32,
        dims: vec![],
        target: Target::Window,
    });
    let mut all = vec![(WEIGHTS, params(Stored::Master, "", &|_| true)), (TRAINING, training)];
    if !contents.averaged.is_empty() {
        all.push((EMA, params(Stored::Ema, "", &averaged)));
    }
    all
}

/// This rank's row of the rows of all ranks; their mean if there were more or fewer.
fn own(model: &Ett, rows: &HostTensor) -> Vec<f64> {
    let peers = model.params.device().collectives();
    let (ranks, n) = (rows.dims[0], rows.dims[1]);
    if ranks == peers.ranks() {
        return rows.values[peers.rank() * n..][..n].to_vec();
    }
    (0..n).map(|i| rows.values[i..].iter().step_by(n).sum::<f64>() / ranks as f64).collect()
}

/// Restores weights, averages, moments, the optimizers' step counts and the discriminator's statistics, bit for bit,
/// into a model and optimizers that train the same groups. Every file is checked before anything is changed.
/// Afterwards the model has the averages of the checkpoint, whichever groups are being trained.
pub fn load(folder: &Path, model: &mut Ett, optimizers: &[&Optimizer]) -> Result<()> {
    let contents = checkpoints::verified(folder)?;
    let mut problems = Vec::new();
    let trained: Vec<&str> =
        model.params.groups().into_iter().filter(|g| model.params.has(g, Stored::Moment1)).collect();
    if trained != contents.trained {
        problems.push(format!("it trained the groups {:?}, this run trains {trained:?}", contents.trained));
    }
    if optimizers.len() != contents.optimizers.len() {
        problems.push(format!("it had {} optimizers, now {}", contents.optimizers.len(), optimizers.len()));
    }
    let mut plan = Vec::new();
    for (file, wanted) in wanted(model, &contents) {
        let file = TensorFile::open(&folder.join(file))?;
        let mut found = file.tensors();
        for w in &wanted {
            let any_length = matches!(w.target, Target::Window);
            match found.remove(&w.name) {
                None => problems.push(format!("missing `{}` {:?}", w.name, w.dims)),
                Some((_, dims)) if dims != w.dims && !any_length => {
                    problems.push(format!("`{}` is {dims:?}, wanted {:?}", w.name, w.dims));
                }
                Some((encoding, _)) if encoding != w.encoding => {
                    problems.push(format!(
                        "`{}` is {}, wanted {}",
                        w.name,
                        encoding.name(),
                        w.encoding.name()
                    ));
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
    let averaged: Vec<&str> = contents.averaged.iter().map(String::as_str).collect();
    let others: Vec<String> = model.params.groups().into_iter().map(String::from).collect();
    let others: Vec<&str> = others.iter().map(String::as_str).filter(|g| !averaged.contains(g)).collect();
    model.params.drop_averages(&others);
    model.params.average(&averaged)?;
    for (file, wanted) in plan {
        for w in wanted {
            match w.target {
                Target::Param(name, stored) => {
                    model.params.write_public(&name, stored, &file.read_finite(&w.name)?)?;
                }
                Target::Carried => model.set_carried(&w.name, &file.read(&w.name)?.values)?,
                Target::Own(name) => model.set_carried(&name, &own(model, &file.read(&w.name)?))?,
                Target::Window => {}
            }
        }
    }
    model.params.refresh()?;
    let dev = model.params.device();
    optimizers.iter().zip(&contents.optimizers).try_for_each(|(o, steps)| o.resume(&**dev, *steps))
}
