//! `--plan`: one step of each stage on the device that only counts.

use std::fmt::Write;
use std::sync::Arc;

use super::{Batch, Hyper, Optimizer, Stage, TokenizerMode, step};
use crate::backend::{Device, Memory, Plan, Role, StepState};
use crate::config::{Config, StageConfig, StageKind};
use crate::error::Result;
use crate::model::tokenizer::Grid;
use crate::model::{Ett, Part};
use crate::tensor::Tensor;

/// What one step of a stage takes.
#[derive(Debug, Clone)]
pub struct StagePlan {
    /// The stage.
    pub kind: StageKind,
    /// Samples.
    pub batch: usize,
    /// Parameters by group, with whether the stage trains them.
    pub parameters: Vec<(String, usize, bool)>,
    /// Operations of one step.
    pub flop: u64,
    /// Kernel launches of one step.
    pub launches: u64,
    /// Bytes by role.
    pub memory: Memory,
    /// The largest single buffer of each role.
    pub largest: [u64; 7],
}

/// Plans a stage: builds the model on [`Plan`] and runs one step of it.
pub fn plan_stage(cfg: &Config, kind: StageKind, batch: usize) -> Result<StagePlan> {
    let dev = Arc::new(Plan::new());
    let mut model = Ett::new(cfg, dev.clone())?;
    let stage = Stage::new(kind, &model)?;
    model.params.train(&stage.trained())?;
    let size = cfg.data.size;
    let (images, grids) = match stage.recipe.tokenizer {
        TokenizerMode::Off => (vec![], vec![]),
        _ => {
            let prec = model.params.precision();
            let s = size / cfg.tokenizer.downsampling();
            let images = Tensor::empty(&*dev, Role::Input, prec.act, [batch, size, size, 3])?;
            (vec![images], vec![Grid { images: batch, h: s, w: s }])
        }
    };
    let packed = match stage.recipe.text {
        true => {
            let text = Part::target(vec![0; cfg.data.text_tokens]);
            let sequences: Vec<Vec<Part>> = (0..batch)
                .map(|i| match grids.is_empty() {
                    true => vec![text.clone()],
                    false => vec![Part::Image(i), text.clone()],
                })
                .collect();
            Some(Batch::pack(&model, &sequences, &grids, 1)?)
        }
        false => None,
    };
    let state = StepState::new(&*dev, model.params.precision().acc)?;
    let h = Hyper { betas: cfg.train.betas, eps: 1e-8, weight_decay: 0.0, ema_decay: 0.0, clip: 1.0 };
    let main = Optimizer::new(&model.params, &stage.groups, h)?;
    let disc = match stage.discriminator {
        true => Some(Optimizer::new(&model.params, &["discriminator"], h)?),
        false => None,
    };
    dev.reset_kernels();
    step(&mut model, &stage.recipe, &Batch { images, packed }, &state, &main, disc.as_ref())?;
    let trained = stage.trained();
    let parameters = model
        .params
        .groups()
        .iter()
        .enumerate()
        .map(|(g, name)| (name.to_string(), model.params.count(g), trained.contains(name)))
        .filter(|(_, n, _)| *n > 0)
        .collect();
    let launches = dev.kernels().values().map(|k| k.calls).sum();
    Ok(StagePlan {
        kind,
        batch,
        parameters,
        flop: dev.flop(),
        launches,
        memory: dev.memory(),
        largest: dev.largest(),
    })
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

/// The plan of every stage of a configuration (of the semantic stage if it names none), as text.
pub fn plan(cfg: &Config) -> Result<String> {
    let semantic = StageConfig {
        kind: StageKind::Semantic,
        steps: 1,
        batch: 1,
        lr: None,
        disc_lr: None,
        schedule: crate::config::ScheduleKind::Cosine,
        ema: false,
        betas: None,
        captions: 0.0,
    };
    let stages = if cfg.stage.is_empty() { std::slice::from_ref(&semantic) } else { &cfg.stage[..] };
    let mut out = String::new();
    for s in stages {
        let p = plan_stage(cfg, s.kind, s.batch)?;
        // Writing to a String cannot fail.
        let _ =
            writeln!(out, "stage {}: batch {}, {} precision", p.kind.name(), p.batch, cfg.train.precision);
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
            "  {:.3} TFLOP and {} launches a step, {:.3} TFLOP a sample",
            p.flop as f64 / 1e12,
            p.launches,
            p.flop as f64 / 1e12 / p.batch as f64
        );
    }
    Ok(out)
}
