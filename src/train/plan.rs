//! `--plan`: runs one step of each stage on the device that only counts.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use super::stages::start_averages;
use super::update::Update;
use super::{Stage, TokenizerMode, step};
use crate::backend::{self, DType, Device, KernelCount, Kernels, Memory, Plan, Role, Sent, Target};
use crate::config::{Config, DataConfig, Recompute, StageConfig, StageKind};
use crate::error::{Error, Result};
use crate::feed::{Batch, PAD};
use crate::model::tokenizer::Grid;
use crate::model::{Ett, Part};
use crate::tensor::Tensor;

/// Upper limit of the search for the largest batch.
const MAX_BATCH: usize = 65536;

/// Resources of one step of a stage.
#[derive(Debug, Clone)]
pub struct StagePlan {
    /// The stage.
    pub kind: StageKind,
    /// Samples per batch.
    pub batch: usize,
    /// Number of parameters by group, and whether the stage trains them.
    pub parameters: Vec<(String, usize, bool)>,
    /// Floating-point operations of one step.
    pub flop: u64,
    /// Kernel launches of one step.
    pub launches: u64,
    /// The kernels launched.
    pub kernels: BTreeMap<&'static str, KernelCount>,
    /// Memory in bytes, by role.
    pub memory: Memory,
    /// The largest single buffer of each role.
    pub largest: [u64; 7],
    /// What a rank sends to others in a step, by collective.
    pub sent: BTreeMap<&'static str, Sent>,
}

/// The devices that a plan is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Devices {
    /// The device of each rank.
    pub target: Target,
    /// Number of ranks.
    pub ranks: usize,
}

impl From<Target> for Devices {
    /// One rank.
    fn from(target: Target) -> Self {
        Devices { target, ranks: 1 }
    }
}

/// Plans a stage without earlier stages: builds the model on [`Plan`] and runs one step of it, of rank 0 if there are several.
pub fn plan_stage(cfg: &Config, stage_cfg: &StageConfig, devices: impl Into<Devices>) -> Result<StagePlan> {
    plan_after(cfg, &[], stage_cfg, devices.into())
}

/// Plans a stage after earlier stages, whose averages are kept.
fn plan_after(
    cfg: &Config,
    before: &[StageConfig],
    stage_cfg: &StageConfig,
    devices: Devices,
) -> Result<StagePlan> {
    let (kind, batch) = (stage_cfg.kind, stage_cfg.batch);
    let dev = Arc::new(Plan::of_ranks(devices.target, devices.ranks));
    let mut model = Ett::new(cfg, dev.clone())?;
    for s in before {
        let trained = Stage::of(s, &model)?.trained();
        start_averages(&mut model, &trained, s.ema)?;
    }
    let stage = Stage::of(stage_cfg, &model)?;
    let trained = stage.trained();
    model.params.train(&trained)?;
    start_averages(&mut model, &trained, stage_cfg.ema)?;
    let each = batch / stage_cfg.accumulate / devices.ranks;
    let parts: Vec<Batch> = (0..stage_cfg.accumulate)
        .map(|_| part(&cfg.data_of(stage_cfg), &model, &stage, each))
        .collect::<Result<_>>()?;
    let Update { state, main, disc, .. } = Update::new(&model, stage_cfg, &stage)?;
    dev.reset_kernels();
    step(&mut model, &stage.recipe, &parts, &state, &main, disc.as_ref())?;
    let parameters = model
        .params
        .groups()
        .iter()
        .enumerate()
        .map(|(g, name)| (name.to_string(), model.params.count(g), trained.contains(name)))
        .filter(|(_, n, _)| *n > 0)
        .collect();
    let kernels = dev.kernels();
    Ok(StagePlan {
        kind,
        batch,
        parameters,
        flop: dev.flop(),
        launches: kernels.values().map(|k| k.calls).sum(),
        kernels,
        memory: dev.memory(),
        largest: dev.largest(),
        sent: dev.sent(),
    })
}

/// The least that the backward pass of a stage has to compute again so that the stage, after those before it, takes at
/// most `bytes`, and the peak of its memory with that; `blocks` if it does not fit at all. If the configuration does not
/// leave the choice, its own value.
pub(super) fn choose_recompute(
    cfg: &Config,
    before: &[StageConfig],
    stage: &StageConfig,
    devices: Devices,
    bytes: u64,
) -> Result<(Recompute, u64)> {
    let mut choice = (cfg.train.recompute, 0);
    for what in choices(cfg) {
        choice = (what, plan_after(&with(cfg, what), before, stage, devices)?.memory.peak);
        if choice.1 <= bytes {
            break;
        }
    }
    Ok(choice)
}

/// What a configuration lets the backward pass compute again: one value, or all of them in their order.
fn choices(cfg: &Config) -> Vec<Recompute> {
    match cfg.train.recompute {
        Recompute::Auto => Recompute::CHOICES.to_vec(),
        one => vec![one],
    }
}

fn with(cfg: &Config, recompute: Recompute) -> Config {
    let mut cfg = cfg.clone();
    cfg.train.recompute = recompute;
    cfg
}

/// One part of a batch of a stage: `n` pictures of the configured size, with texts of the configured length.
fn part(data: &DataConfig, model: &Ett, stage: &Stage, n: usize) -> Result<Batch> {
    let dev = &**model.params.device();
    let size = data.size;
    let (images, grids) = match stage.recipe.tokenizer {
        TokenizerMode::Off => (vec![], vec![]),
        _ => {
            let s = size / model.cfg.tokenizer.downsampling();
            let images = Tensor::empty(dev, Role::Input, DType::U8, [n, size, size, 3])?;
            (vec![images], vec![Grid { images: n, h: s, w: s }])
        }
    };
    let sequence = |i: usize| {
        let ids = vec![0; data.text_tokens];
        match (stage.recipe.codes, grids.is_empty()) {
            (true, _) => vec![Part::context(ids), Part::Codes(i)],
            (_, true) => vec![Part::target(ids)],
            (_, false) => vec![Part::Image(i), Part::target(ids)],
        }
    };
    let packed = match stage.recipe.text || stage.recipe.codes {
        true => {
            let sequences: Vec<Vec<Part>> = (0..n).map(sequence).collect();
            Some(Batch::pack(model, &sequences, &grids, PAD)?)
        }
        false => None,
    };
    Ok(Batch { images, packed, most: None })
}

/// The largest batch of a stage without earlier stages, in one part, whose step takes at most `bytes`; 0 if none
/// does.
pub fn largest_batch(
    cfg: &Config,
    stage: &StageConfig,
    devices: impl Into<Devices>,
    bytes: u64,
) -> Result<usize> {
    largest_after(cfg, &[], stage, devices.into(), bytes)
}

fn largest_after(
    cfg: &Config,
    before: &[StageConfig],
    stage: &StageConfig,
    devices: Devices,
    bytes: u64,
) -> Result<usize> {
    // Of each rank.
    let peak = |batch: usize| -> Result<u64> {
        let stage = StageConfig { batch: batch * devices.ranks, accumulate: 1, ..stage.clone() };
        Ok(plan_after(cfg, before, &stage, devices)?.memory.peak)
    };
    if peak(1)? > bytes {
        return Ok(0);
    }
    // Memory grows with the batch: doubles the batch until it does not fit, then bisects.
    let (mut fits, mut not) = (1, 2);
    while peak(not)? <= bytes {
        (fits, not) = (not, 2 * not);
        if not * devices.ranks > MAX_BATCH {
            return Ok(fits * devices.ranks);
        }
    }
    while not - fits > 1 {
        let middle = fits + (not - fits) / 2;
        match peak(middle)? <= bytes {
            true => fits = middle,
            false => not = middle,
        }
    }
    Ok(fits * devices.ranks)
}

/// In words, the largest batches of a stage, after those before it, that `bytes` hold: with what its backward pass was
/// `chosen` to recompute, and with whatever allows for more.
pub(super) fn fitting(
    cfg: &Config,
    before: &[StageConfig],
    stage: &StageConfig,
    chosen: Recompute,
    devices: Devices,
    bytes: u64,
) -> Result<String> {
    let largest = |what| largest_after(&with(cfg, what), before, stage, devices, bytes);
    let mut most = largest(chosen)?;
    let mut out = format!("{}, of what was free before the run, hold ", backend::size(bytes));
    out += &match most {
        0 => "not even a batch of 1".into(),
        n => format!("a batch of up to {n} in one part"),
    };
    for what in Recompute::CHOICES {
        let n = largest(what)?;
        if n > most {
            out += &format!(", or of {n} with train.recompute = {:?}", what.name());
            most = n;
        }
    }
    Ok(out)
}

/// The bytes of `80GiB`, `24 GB`, `512MiB` or a plain number.
pub fn parse_memory(text: &str) -> Result<u64> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match text[digits.len()..].trim() {
        "" | "B" => Some(1.0),
        "MiB" => Some(f64::from(1 << 20)),
        "GiB" => Some(f64::from(1 << 30)),
        "MB" => Some(1e6),
        "GB" => Some(1e9),
        _ => None,
    };
    match (digits.parse::<f64>(), unit) {
        (Ok(n), Some(unit)) if n.is_finite() && n >= 0.0 => Ok((n * unit) as u64),
        _ => Err(Error::config("--memory", text, "a size such as 80GiB, 512MiB or 24GB")),
    }
}

/// The first of `cuda` and `cpu` that can run every stage of a configuration, and the target of a plan for it.
pub fn choose_device(cfg: &Config) -> Result<(Target, Arc<dyn Kernels>)> {
    let open = |name| Ok((Target::named(name, cfg.train.threads)?, backend::open(name, cfg.train.threads)?));
    let (target, gpu) = match open("cuda") {
        Ok(gpu) => gpu,
        Err(e) => {
            tracing::info!("on the CPU ({e})");
            return open("cpu");
        }
    };
    for s in &cfg.stage {
        match plan_stage(cfg, &StageConfig { batch: 1, accumulate: 1, ..s.clone() }, target) {
            Ok(_) => {}
            Err(e @ Error::Unsupported { .. }) => {
                tracing::info!("on the CPU ({e})");
                return open("cpu");
            }
            Err(e) => return Err(e),
        }
    }
    tracing::info!("on {}", gpu.name());
    Ok((target, gpu))
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

/// The plan of every stage of a configuration on `devices`, as text; of the semantic stage if it has none. With `memory` in
/// bytes, it includes the largest batch that fits.
pub fn plan(cfg: &Config, devices: impl Into<Devices>, memory: Option<u64>) -> Result<String> {
    let devices = devices.into();
    let Devices { target, ranks } = devices;
    let semantic = StageConfig::new(StageKind::Semantic, 1, 1);
    let stages = if cfg.stage.is_empty() { std::slice::from_ref(&semantic) } else { &cfg.stage[..] };
    for (i, s) in cfg.stage.iter().enumerate() {
        if s.batch % s.accumulate.saturating_mul(ranks).max(1) != 0 {
            let want = format!("a multiple of {ranks} ranks x {} parts (accumulate)", s.accumulate);
            return Err(Error::config(format!("stage.{i}.batch"), s.batch, want));
        }
    }
    let mut out = match ranks {
        1 => format!("planned for {target}\n"),
        n => format!("planned for {n} ranks, each with {target}; of each rank:\n"),
    };
    for (i, s) in stages.iter().enumerate() {
        let before = &stages[..i];
        let chosen = match memory {
            Some(bytes) => choose_recompute(cfg, before, s, devices, bytes)?.0,
            None => cfg.train.recompute,
        };
        let p = plan_after(&with(cfg, chosen), before, s, devices)?;
        // Writing to a String cannot fail.
        let parts = match s.accumulate {
            1 => String::new(),
            n => format!(" in {n} parts"),
        };
        let share = match ranks {
            1 => String::new(),
            n => format!(" on {n} ranks"),
        };
        let recompute = match chosen {
            Recompute::Auto | Recompute::None => "nothing recomputed",
            Recompute::Cheap => "norms and activation functions recomputed",
            Recompute::Blocks => "blocks recomputed",
        };
        let _ = writeln!(
            out,
            "stage {}: batch {}{share}{parts}, {} precision, {recompute}",
            p.kind.name(),
            p.batch,
            cfg.train.precision
        );
        for (name, n, trained) in &p.parameters {
            let _ =
                writeln!(out, "  {name:<14} {n:>14} parameters{}", if *trained { ", trained" } else { "" });
        }
        for (role, bytes) in Role::ALL.iter().zip(p.memory.at_peak) {
            let _ = writeln!(out, "  {:<14} {:>10.3} GiB at the peak", role.to_string(), gib(bytes));
        }
        let _ = writeln!(out, "  {:<14} {:>10.3} GiB", "all", gib(p.memory.peak));
        let _ = writeln!(
            out,
            "  {:.3} TFLOP and {} launches per step, {:.3} TFLOP per sample",
            p.flop as f64 / 1e12,
            p.launches,
            p.flop as f64 / 1e12 / (p.batch / ranks) as f64
        );
        if ranks > 1 {
            let bytes: u64 = p.sent.values().map(|s| s.bytes).sum();
            let _ = writeln!(out, "  {:<14} {:>10.3} GiB to other ranks per step", "sends", gib(bytes));
            for (name, s) in &p.sent {
                let _ = writeln!(out, "    {name:<12} {:>10.3} GiB in {} calls", gib(s.bytes), s.calls);
            }
        }
        let Some(bytes) = memory else { continue };
        for what in choices(cfg) {
            let of = format!("with recompute = {:?}", what.name());
            let _ = match largest_after(&with(cfg, what), before, s, devices, bytes)? {
                0 => writeln!(out, "  {:.1} GiB do not hold a batch of 1 {of}", gib(bytes)),
                MAX_BATCH.. => writeln!(out, "  {:.1} GiB hold any batch up to {MAX_BATCH} {of}", gib(bytes)),
                n => writeln!(out, "  {:.1} GiB hold a batch of up to {n} in one part {of}", gib(bytes)),
            };
        }
    }
    Ok(out)
}
