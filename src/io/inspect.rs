//! Describes the contents of a weights file, a checkpoint or a run folder as text.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use super::weights::TensorFile;
use super::{CONFIG, Checkpoints, EMA, History, WEIGHTS, checkpoints, run_config};
use crate::backend::size;
use crate::error::{Error, Result};
use crate::formats::shown;

/// Most names that are listed where nothing bounds their number; more would fill pages.
const LISTED: usize = 24;
/// Most characters of a text of a file.
const SHOWN: usize = 100;

/// Describes a safetensors file (parameters by module, or every tensor if `all`), a checkpoint or a run folder.
pub fn inspect(path: &Path, all: bool) -> Result<String> {
    if path.is_file() {
        return file(path, all);
    }
    if !path.is_dir() {
        return Err(Error::data(path, "there is no such file or folder; correct the path"));
    }
    let mut out = String::new();
    if path.join(CONFIG).exists() {
        out += &settings(path)?;
    }
    // Writing to a String cannot fail.
    if path.join(checkpoints::STATE).exists() {
        let p = checkpoints::progress(path)?;
        let _ = writeln!(
            out,
            "checkpoint after {} steps: stage {} ({}), {} steps done in it, {} updates skipped",
            p.total,
            p.stage,
            shown(&p.stage_name, SHOWN),
            p.step,
            p.skipped
        );
        for (stage, seconds) in &p.seconds {
            let _ = writeln!(out, "  {:<12} {seconds:>8.1} s", shown(stage, SHOWN));
        }
    } else if let Some(last) = Checkpoints::latest(path)? {
        let p = checkpoints::progress(&last)?;
        let state = if path.join(WEIGHTS).exists() { "finished" } else { "not finished" };
        let _ = writeln!(
            out,
            "{state}; last checkpoint {} after {} steps, in stage {} ({})",
            last.display(),
            p.total,
            p.stage,
            shown(&p.stage_name, SHOWN)
        );
    }
    for name in [WEIGHTS, EMA] {
        let at = path.join(name);
        if at.exists() {
            out += &file(&at, all)?;
        }
    }
    match out.is_empty() {
        true => Err(Error::data(
            path,
            format!("holds neither {CONFIG} nor {WEIGHTS}; name a run or a checkpoint"),
        )),
        false => Ok(out),
    }
}

fn settings(folder: &Path) -> Result<String> {
    let c = run_config(folder)?;
    let (t, q, l) = (&c.tokenizer, &c.quantizer, &c.llm);
    let stages: Vec<&str> = c.stage.iter().map(|s| s.kind.name()).collect();
    Ok(format!(
        "arm {:?}, {} precision, seed {}; stages {}\n\
         tokenizer {} channels x {:?}, one token per {s}x{s} pixels; {} codes of {} dimensions\n\
         language model of {} layers, width {}, {} heads ({} of keys and values) of {}, vocabulary {}\n",
        c.train.arm,
        c.train.precision,
        c.train.seed,
        stages.join(", "),
        t.ch,
        t.ch_mult,
        q.codes,
        q.dim,
        l.layers,
        l.width,
        l.heads,
        l.kv_heads,
        l.head_dim,
        l.vocab,
        s = t.downsampling()
    ))
}

/// Describes a file of weights in any format.
fn file(path: &Path, all: bool) -> Result<String> {
    let weights = TensorFile::open(path)?;
    let archive = weights.archive();
    let tensors = archive.tensors();
    let count = |dims: &[usize]| dims.iter().product::<usize>();
    let total: usize = tensors.values().map(|t| count(&t.dims)).sum();
    let mut kinds = BTreeMap::<&str, usize>::new();
    tensors.values().for_each(|t| *kinds.entry(t.encoding.name()).or_default() += 1);
    let kinds: Vec<String> = kinds.into_iter().map(|(kind, n)| format!("{n} {kind}")).collect();
    // Writing to a String cannot fail.
    let mut out = format!(
        "{}: {}, {} tensors ({}), {total} values, {}, CRC-32 {:08x}\n",
        path.display(),
        archive.format().name(),
        tensors.len(),
        kinds.join(", "),
        size(archive.size() as u64),
        archive.checksum()
    );
    if let Some(history) = History::of(&weights) {
        let _ = writeln!(out, "  trained to {}", history.words());
    }
    let without = weights.note().map_or(&[][..], |note| &note.without);
    if !without.is_empty() {
        let groups: Vec<String> = without.iter().take(LISTED).map(|g| shown(g, SHOWN)).collect();
        let _ = writeln!(out, "  without what only training needs: {}", groups.join(", "));
    }
    if all {
        for (name, t) in tensors {
            let sum =
                archive.raw(name)?.map_or(String::new(), |(_, b)| format!("{:08x}", crc32fast::hash(b)));
            let _ = writeln!(out, "  {name:<64} {:<5} {sum:<8} {:?}", t.encoding.name(), t.dims);
        }
        return Ok(out);
    }
    let mut modules = BTreeMap::<&str, (usize, usize)>::new();
    for (name, t) in tensors {
        let module = modules.entry(name.split('.').next().unwrap_or(name)).or_default();
        *module = (module.0 + 1, module.1 + count(&t.dims));
    }
    let more = modules.len().saturating_sub(LISTED);
    for (name, (n, values)) in modules.into_iter().take(LISTED) {
        let _ = writeln!(out, "  {name:<20} {n:>5} tensors {values:>14} values");
    }
    if more > 0 {
        let _ = writeln!(out, "  and {more} more");
    }
    Ok(out)
}
