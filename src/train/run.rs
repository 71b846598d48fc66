//! A whole run: the stages of a configuration one after another, with metrics, a checkpoint and a closing
//! evaluation.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::feed::{DataSet, Feed};
use super::weights::{read_file, set_weights};
use super::{Hyper, Loss, Optimizer, Outcome, Stage, Template, save_weights, schedule, step};
use crate::backend::{Cpu, Kernels, Slot, StepState};
use crate::config::{Config, StageConfig};
use crate::data::TextTokenizer;
use crate::error::{Error, Result};
use crate::eval::{self, Report};
use crate::model::Ett;
use crate::nn::Copy;

/// Weights of a run, under the public names.
pub const WEIGHTS: &str = "model.safetensors";
/// Averages of the tokenizer's weights, where a stage kept them.
pub const EMA: &str = "ema.safetensors";
/// The configuration of a run.
pub const CONFIG: &str = "config.toml";
/// Updates in a row that may be skipped for a non-finite gradient.
const MAX_SKIPPED: usize = 20;

/// One line of `metrics.jsonl`.
#[derive(Serialize)]
struct Line<'a> {
    stage: &'a str,
    step: usize,
    rate: f64,
    loss: BTreeMap<&'static str, f64>,
    grad_norm: f64,
    skipped: usize,
    codes_used: usize,
    images_per_s: f64,
    tokens_per_s: f64,
}

/// What a run leaves behind, for callers.
pub struct Finished {
    /// The trained model.
    pub model: Ett,
    /// Held-out results; `None` without `data.test`.
    pub report: Option<Report>,
    /// Seconds a stage, by name.
    pub seconds: Vec<(String, f64)>,
}

impl Finished {
    /// The closing table.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let mut row = |name: &str, value: String| out.push_str(&format!("  {name:<44} {value}\n"));
        for (stage, s) in &self.seconds {
            row(&format!("stage {stage}"), format!("{s:.0} s"));
        }
        if let Some(r) = &self.report {
            row("held-out pictures", r.pictures.to_string());
            row("reconstruction MSE (share of the mean image's)", {
                format!("{:.5} ({:.3})", r.mse, r.mse / r.mse_mean_image)
            });
            row("PSNR", format!("{:.2} dB", r.psnr));
            row("codes used (perplexity)", format!("{} ({:.1})", r.codes_used, r.code_perplexity));
            let pair = |p: &eval::Pair| format!("{:.4}   another picture: {:.4}", p.seen, p.other);
            row("caption loss, nats a token", pair(&r.caption_loss));
            row("answers exactly right", pair(&r.accuracy));
            row("  yes or no", pair(&r.accuracy_yes_no));
            row("  all others", pair(&r.accuracy_open));
        }
        out
    }
}

fn prepare(out: &Path) -> Result<()> {
    if out.join(WEIGHTS).exists() {
        let what = "holds a finished run already; name another folder with --out, or remove it";
        return Err(Error::data(out, what));
    }
    std::fs::create_dir_all(out).map_err(Error::io(out))
}

fn hyper(cfg: &Config, stage: &StageConfig, betas: [f64; 2]) -> Hyper {
    let t = &cfg.train;
    let ema_decay = if stage.ema { t.ema_decay } else { 0.0 };
    Hyper { betas, eps: t.adam_eps, weight_decay: t.weight_decay, ema_decay, clip: t.clip }
}

/// Loads LPIPS weights named by the configuration, or says that its features are random.
fn load_lpips(model: &Ett) -> Result<()> {
    match &model.cfg.lpips.weights {
        Some(path) => {
            let tensors = read_file(path)?
                .into_iter()
                .map(|(n, t)| match n.starts_with("loss.perceptual_loss.") {
                    true => (n, t),
                    false => (format!("loss.perceptual_loss.{n}"), t),
                })
                .collect();
            set_weights(&model.params, path, &tensors, Some(&|n| n.starts_with("loss.perceptual_loss.")))
        }
        None => {
            tracing::info!(
                "perceptual loss: random VGG features from a fixed seed (lpips.weights names no file)"
            );
            Ok(())
        }
    }
}

/// Runs all stages of `cfg` into the folder `out`. `init` is a weights file to start from.
pub fn run(
    cfg: &Config,
    dev: Arc<dyn Kernels>,
    out: &Path,
    init: Option<&Path>,
    quiet: bool,
) -> Result<Finished> {
    if cfg.stage.is_empty() {
        return Err(Error::config("stage", "none", "at least one [[stage]]"));
    }
    let template = Template::new(TextTokenizer::open(cfg.data.tokenizer.as_deref())?);
    if cfg.llm.vocab < template.tokenizer().vocabulary() {
        let want = format!("at least {}, the text tokenizer's", template.tokenizer().vocabulary());
        return Err(Error::config("llm.vocab", cfg.llm.vocab, want));
    }
    prepare(out)?;
    let text = toml::to_string(cfg).map_err(|e| Error::config("configuration", e, "values TOML can hold"))?;
    let config_path = out.join(CONFIG);
    std::fs::write(&config_path, text).map_err(Error::io(&config_path))?;

    let data = DataSet::train(&cfg.data)?;
    let mut model = Ett::new(cfg, dev.clone())?;
    load_lpips(&model)?;
    if let Some(path) = init {
        super::load_weights(&model.params, path)?;
    }
    let metrics_path = out.join("metrics.jsonl");
    let file = File::create(&metrics_path).map_err(Error::io(&metrics_path))?;
    let mut metrics = (metrics_path, BufWriter::new(file));
    let mut seconds = Vec::new();
    for (number, stage) in cfg.stage.iter().enumerate() {
        let start = Instant::now();
        run_stage(&mut model, &data, &template, stage, number, &mut metrics, quiet)?;
        seconds.push((stage.kind.name().to_string(), start.elapsed().as_secs_f64()));
    }
    model.params.train(&[])?;
    save_weights(&model.params, &out.join(WEIGHTS), Copy::Master)?;
    if model.params.groups().iter().enumerate().any(|(g, _)| model.params.ema(g).is_some()) {
        save_weights(&model.params, &out.join(EMA), Copy::Ema)?;
    }
    let report = match DataSet::test(&cfg.data)? {
        Some(test) => {
            let report = eval::evaluate(&model, &data, &test, &template, &out.join("reconstructions.png"))?;
            let path = out.join("eval.json");
            let json = serde_json::to_string_pretty(&report)
                .map_err(|e| Error::data(&path, format!("cannot be written ({e})")))?;
            std::fs::write(&path, json).map_err(Error::io(&path))?;
            Some(report)
        }
        None => None,
    };
    Ok(Finished { model, report, seconds })
}

fn bar(stage: &StageConfig, quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let style =
        ProgressStyle::with_template("{prefix:>9} {bar:32} {pos:>5}/{len} {elapsed} (left {eta}) {msg}");
    let bar = ProgressBar::new(stage.steps as u64).with_prefix(stage.kind.name());
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn run_stage(
    model: &mut Ett,
    data: &DataSet,
    template: &Template,
    cfg: &StageConfig,
    number: usize,
    metrics: &mut (PathBuf, BufWriter<File>),
    quiet: bool,
) -> Result<()> {
    let all = model.cfg.clone();
    let dev = model.params.device().clone();
    let stage = Stage::new(cfg.kind, model)?;
    model.params.train(&stage.trained())?;
    // Averages outlast stages that leave their group alone, and start anew where it is trained again.
    model.params.drop_averages(&stage.trained());
    if cfg.ema {
        let tokenizer: Vec<&str> = stage
            .trained()
            .into_iter()
            .filter(|g| ["encoder", "decoder", "discriminator"].contains(g))
            .collect();
        model.params.average(&tokenizer)?;
    }
    let feed = Feed::new(data, template, cfg, &stage, all.train.seed, number)?;
    let mut state = StepState::new(&*dev, model.params.precision().acc)?;
    stage.recipe.weights(model, &mut state);
    let betas = cfg.betas.unwrap_or(all.train.betas);
    let mut main = Optimizer::new(&model.params, &stage.groups, hyper(&all, cfg, betas))?;
    let mut disc = match stage.discriminator {
        true => {
            Some(Optimizer::new(&model.params, &["discriminator"], hyper(&all, cfg, all.train.disc_betas))?)
        }
        false => None,
    };
    let peak = cfg.lr.unwrap_or(all.train.lr);
    let disc_peak = cfg.disc_lr.unwrap_or(peak);
    let bar = bar(cfg, quiet);
    let (mut skipped, mut in_a_row) = (0, 0);
    let mut smooth = Smooth::default();
    for s in 0..cfg.steps {
        let start = Instant::now();
        let fed = feed.batch(model, s)?;
        if s == 0
            && let Some(first) = fed.sequences.first()
        {
            tracing::info!("first sample of stage {}: {}", cfg.kind.name(), template.show(first));
        }
        let tokens = fed.batch.packed.as_ref().map_or(0, |p| p.tokens);
        if stage.recipe.text && tokens == 0 {
            return Err(Error::Training(format!(
                "step {s} of stage {} has no supervised token; look at the captions and questions",
                cfg.kind.name()
            )));
        }
        state.set(Slot::InvTokens, 1.0 / tokens.max(1) as f64);
        let warm = all.train.warmup;
        let rate = schedule(cfg.schedule, peak, warm, s, cfg.steps);
        main.prepare(&mut state, rate);
        if let Some(d) = &mut disc {
            d.prepare(&mut state, schedule(cfg.schedule, disc_peak, warm, s, cfg.steps));
        }
        state.send(&*dev)?;
        let outcome = step(model, &stage.recipe, &fed.batch, &state, &main, disc.as_ref())?;
        let norm = main.norm().to_f64(&*dev)?;
        let disc_bad = match &disc {
            Some(d) => d.norm().to_f64(&*dev)?[1],
            None => 0.0,
        };
        if norm[1] > 0.0 || disc_bad > 0.0 {
            (skipped, in_a_row) = (skipped + 1, in_a_row + 1);
            if in_a_row > MAX_SKIPPED {
                return Err(Error::Training(format!(
                    "{in_a_row} updates in a row had non-finite gradients, the last at step {s} of stage {}; \
                     lower the learning rate or look at the data",
                    cfg.kind.name()
                )));
            }
        } else {
            in_a_row = 0;
        }
        let took = start.elapsed().as_secs_f64().max(1e-9);
        let line = Line {
            stage: cfg.kind.name(),
            step: s,
            rate,
            loss: values(model, &outcome)?,
            grad_norm: norm[0].sqrt(),
            skipped,
            codes_used: codes_used(&outcome, &*dev)?,
            images_per_s: cfg.batch as f64 / took,
            tokens_per_s: fed.batch.packed.as_ref().map_or(0, |p| p.rows) as f64 / took,
        };
        write_line(metrics, &line)?;
        bar.set_message(smooth.message(&line));
        bar.inc(1);
    }
    bar.finish();
    metrics.1.flush().map_err(Error::io(&metrics.0))
}

fn write_line(metrics: &mut (PathBuf, BufWriter<File>), line: &Line) -> Result<()> {
    let json = serde_json::to_string(line)
        .map_err(|e| Error::data(&metrics.0, format!("a line cannot be written ({e})")))?;
    writeln!(metrics.1, "{json}").map_err(Error::io(&metrics.0))
}

fn values(model: &Ett, out: &Outcome) -> Result<BTreeMap<&'static str, f64>> {
    let mut all = BTreeMap::new();
    for loss in Loss::ALL {
        if out.terms.iter().any(|(l, _)| *l == loss) {
            all.insert(loss.name(), out.value(model, loss)?);
        }
    }
    Ok(all)
}

/// Distinct codes in a batch.
fn codes_used(out: &Outcome, dev: &dyn Kernels) -> Result<usize> {
    let Some(idx) = &out.idx else { return Ok(0) };
    let mut idx = idx.to_host::<i32>(dev)?;
    idx.sort_unstable();
    idx.dedup();
    Ok(idx.len())
}

/// Averages of the losses for the progress bar.
#[derive(Default)]
struct Smooth {
    loss: BTreeMap<&'static str, f64>,
    rate: f64,
}

impl Smooth {
    fn message(&mut self, line: &Line) -> String {
        for (&name, &v) in &line.loss {
            let old = self.loss.entry(name).or_insert(v);
            *old += 0.05 * (v - *old);
        }
        let speed = &mut self.rate;
        *speed += if *speed == 0.0 { line.images_per_s } else { 0.05 * (line.images_per_s - *speed) };
        let shown: Vec<String> = ["cap", "rec", "quant", "lpips", "gan"]
            .iter()
            .filter_map(|n| self.loss.get(n).map(|v| format!("{n} {v:.3}")))
            .collect();
        format!("{} {:.0}/s", shown.join(" "), self.rate)
    }
}

/// Kernels by the time they took, the longest first.
pub fn profile_table(dev: &Cpu) -> String {
    let mut rows: Vec<_> = dev.profile().into_iter().collect();
    rows.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
    let total: f64 = rows.iter().map(|(_, k)| k.seconds).sum();
    let gemm: f64 = rows.iter().map(|(_, k)| k.gemm_seconds).sum::<f64>() / dev.threads() as f64;
    let mut out = format!(
        "  kernels {total:.1} s on {} threads, {:.0}% of it in matrix products\n",
        dev.threads(),
        100.0 * gemm / total.max(1e-9)
    );
    for (name, k) in rows {
        let share = 100.0 * k.gemm_seconds / dev.threads() as f64 / k.seconds.max(1e-9);
        let percent = 100.0 * k.seconds / total.max(1e-9);
        out.push_str(&format!(
            "  {name:<20} {:>8} calls {:>8.2} s {percent:>5.1}%   products {share:>3.0}%\n",
            k.calls, k.seconds
        ));
    }
    out
}
