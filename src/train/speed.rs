//! The speed of a configuration: a few steps of each stage, without saving anything.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use super::RunOptions;
use super::plan::{Devices, plan_stage};
use super::session::{Measured, Session};
use crate::backend::Kernels;
use crate::config::{Config, DataConfig, StageKind};
use crate::error::{Error, Result};
use crate::files;
use crate::io::METRICS;
use crate::ranks::Group;
use crate::report::{Evaluation, Profiles};

/// Steps that are not counted: the first ones take memory, fill caches and are recorded.
const FIRST: usize = 3;

/// The speed of a stage, in the form of the records.
#[derive(Debug, Clone, Serialize)]
pub struct Speed {
    /// `step:` and the stage.
    pub op: String,
    /// The batch.
    pub shape: String,
    /// Median time of a step, in microseconds.
    pub median_us: f64,
    /// Pictures (or texts) per second.
    pub images_per_s: f64,
    /// Samples per batch.
    pub batch: usize,
    /// Number of ranks.
    pub ranks: usize,
    /// Speed of all ranks over that of one, per rank.
    pub scaling: f64,
    /// Planned operations of one sample, in TFLOP.
    pub tflop_per_image: f64,
    /// The same per second.
    pub tflop_per_s: f64,
    /// Peak of the device memory, in GiB.
    pub peak_gib: f64,
    /// The peak that was planned.
    pub plan_gib: f64,
    /// Median time spent waiting for a batch, in ms.
    pub waited_ms: f64,
    /// Whether steps were recorded and replayed.
    pub graph: bool,
    /// Time that the collectives of a step take alone, in ms; `None` with one rank.
    pub communication_ms: Option<f64>,
    /// The part of it that does not make the step longer than that of one rank, if this was measured, too; 0 if the step
    /// becomes longer by more than all of it, for other reasons.
    pub hidden: Option<f64>,
    /// The fastest other implementation in the same run.
    pub peer_images_per_s: Option<f64>,
    /// The time of each kernel, if the device measures it.
    #[serde(skip)]
    pub profiles: Profiles,
}

/// Trains `steps` steps of each stage of a configuration (only of `kind`, if given), from the same fresh weights, and
/// returns their speeds. Nothing is saved.
pub fn speed(
    cfg: &Config,
    dev: &dyn Fn() -> Result<Arc<dyn Kernels>>,
    kind: Option<StageKind>,
    steps: usize,
    evaluation: &dyn Evaluation,
    group: &Arc<Group>,
) -> Result<Vec<Speed>> {
    if steps <= FIRST {
        return Err(Error::config("--steps", steps, format!("more than {FIRST}, which are not counted")));
    }
    let stages: Vec<_> = cfg.stage.iter().filter(|s| kind.is_none_or(|k| k == s.kind)).collect();
    if stages.is_empty() {
        let got = kind.map_or("none", StageKind::name);
        return Err(Error::config("stage", got, "a stage of the configuration"));
    }
    let mut all = Vec::new();
    for stage in stages {
        let mut one = cfg.clone();
        one.stage = vec![stage.clone()];
        one.stage[0].steps = steps;
        (one.train.save_every, one.train.eval_every) = (0, 0);
        // The closing evaluation is left out, and with it its pictures.
        one.data = DataConfig { test: None, test_samples: 0, ..cfg.data_of(stage) };
        one.stage[0].data = Default::default();
        all.extend(stage_speed(&one, dev()?, evaluation, group)?);
    }
    Ok(all)
}

/// The speed of the only stage of a configuration, on rank 0.
fn stage_speed(
    cfg: &Config,
    dev: Arc<dyn Kernels>,
    evaluation: &dyn Evaluation,
    group: &Arc<Group>,
) -> Result<Option<Speed>> {
    let scratch = Scratch::new()?;
    let target = dev.target();
    let quiet = !group.leads();
    let o = RunOptions { out: &scratch.0, init: None, quiet, evaluation, group: group.clone() };
    let Measured { recompute, profiles, communication, replayed } =
        Session::new(cfg, dev, &o, &|_| false)?.measure()?;
    if !group.leads() {
        return Ok(None);
    }
    let metrics = scratch.0.join(METRICS);
    let lines = std::fs::read_to_string(&metrics).map_err(Error::io(&metrics))?;
    let lines: Vec<serde_json::Value> = lines
        .lines()
        .map(serde_json::from_str)
        .collect::<std::result::Result<_, _>>()
        .map_err(|e| Error::data(&scratch.0, format!("metrics cannot be read ({e})")))?;
    let median = |key: &str, of: fn(f64) -> f64| {
        let mut v: Vec<f64> = lines[FIRST..].iter().filter_map(|l| l[key].as_f64()).map(of).collect();
        v.sort_by(f64::total_cmp);
        v.get(v.len() / 2).copied().unwrap_or(f64::NAN)
    };
    let stage = &cfg.stage[0];
    let batch = stage.batch;
    let ranks = group.ranks();
    let step_s = batch as f64 * median("images_per_s", f64::recip);
    let mut planned = cfg.clone();
    planned.train.recompute = recompute;
    let plan = target.map(|target| plan_stage(&planned, stage, Devices { target, ranks })).transpose()?;
    let tflop = plan.as_ref().map_or(f64::NAN, |p| p.flop as f64 / 1e12 / (batch / ranks) as f64);
    let gib = |bytes: f64| bytes / f64::from(1 << 30);
    Ok(Some(Speed {
        op: format!("step:{}", stage.kind.name()),
        shape: format!("batch {batch} of {}x{}, {}", cfg.data.size, cfg.data.size, cfg.train.precision),
        median_us: step_s * 1e6,
        images_per_s: batch as f64 / step_s,
        batch,
        ranks,
        scaling: 1.0,
        tflop_per_image: tflop,
        tflop_per_s: tflop * batch as f64 / step_s,
        peak_gib: lines.last().and_then(|l| l["memory_mib"].as_f64()).unwrap_or(f64::NAN) / 1024.0,
        plan_gib: plan.map_or(f64::NAN, |p| gib(p.memory.peak as f64)),
        waited_ms: median("waited_ms", |v| v),
        graph: replayed,
        communication_ms: communication.map(|time| time.as_secs_f64() * 1e3),
        hidden: None,
        peer_images_per_s: None,
        profiles,
    }))
}

/// The speeds as a table, and the time of each kernel.
pub fn speed_table(all: &[Speed]) -> String {
    let mut out = format!(
        "  {:<16} {:<34} {:>9} {:>9} {:>8} {:>9} {:>9} {:>9}\n",
        "step", "", "images/s", "ms", "TFLOP/s", "peak GiB", "planned", "data, ms"
    );
    for s in all {
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "  {:<16} {:<34} {:>9.2} {:>9.2} {:>8.1} {:>9.2} {:>9.2} {:>9.2}",
            s.op,
            format!("{}{}", s.shape, if s.graph { ", replayed" } else { "" }),
            s.images_per_s,
            s.median_us / 1e3,
            s.tflop_per_s,
            s.peak_gib,
            s.plan_gib,
            s.waited_ms
        );
    }
    all.iter().for_each(|s| out.push_str(&s.profiles.table()));
    out
}

/// Writes the speeds as JSON.
pub fn write_speeds(all: &[Speed], path: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(all)
        .map_err(|e| Error::data(path, format!("the speeds cannot be written ({e})")))?;
    files::replace(path, |file| file.put(text.as_bytes())).map(drop)
}

/// A folder that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let name = format!("ett-speed-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        // Left by a killed process with the same number.
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).map_err(Error::io(&path))?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(Path::new(&self.0));
    }
}
