//! A whole run: the stages of a configuration one after another, with metrics, checkpoints and a closing evaluation.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};

use super::checkpoint::{self, Checkpoints, Progress};
use super::dump::dump;
use super::feed::{DataSet, Fed, Feed};
use super::lock::Lock;
use super::metrics::{Line, Smooth, Usage};
use super::sharpness::Sharpness;
use super::weights::{read_file, set_weights};
use super::{
    Counts, Fingerprint, History, Hyper, Optimizer, Outcome, Own, Stage, StepState, Template, TokenizerMode,
    closing, interrupt, save_weights, save_weights_of, schedule, start_averages, step, text,
};
use crate::backend::{Cpu, Kernels};
use crate::config::{Config, DataConfig, QuantizerKind, StageConfig};
use crate::error::{Error, Result};
use crate::eval::{self, Report};
use crate::files::{self, Lines};
use crate::infer::Trained;
use crate::model::Ett;
use crate::nn::Copy;

/// Weights of a run, under the public names.
pub const WEIGHTS: &str = "model.safetensors";
/// Averages of the tokenizer's weights, where a stage kept them.
pub const EMA: &str = "ema.safetensors";
/// The configuration of a run.
pub const CONFIG: &str = "config.toml";
/// The run's own copy of its text tokenizer, unless that is bytes.
pub const TOKENIZER: &str = "tokenizer.json";
/// What each step wrote down.
pub const METRICS: &str = "metrics.jsonl";
/// Updates in a row that may be skipped because something was not finite.
const MAX_SKIPPED: usize = 20;

/// What a run is told beside its configuration.
#[derive(Debug, Clone, Copy)]
pub struct RunOptions<'a> {
    /// The run folder.
    pub out: &'a Path,
    /// Weights to start from (safetensors, public names).
    pub init: Option<&'a Path>,
    /// No progress bars.
    pub quiet: bool,
}

/// What a run leaves behind, for callers.
pub struct Finished {
    /// The trained model.
    pub model: Ett,
    /// Held-out results; `None` without held-out data, or if they could not be had.
    pub report: Option<Report>,
    /// Seconds a stage, by name.
    pub seconds: Vec<(String, f64)>,
    /// How far it came.
    pub ending: Ending,
}

/// How far a run came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// To its end.
    Whole,
    /// It was interrupted in training, and goes on from this checkpoint.
    Saved(PathBuf),
    /// Its weights are trained and saved, but not evaluated: it was interrupted there, or a warning has said why.
    Unevaluated {
        /// By a signal.
        interrupted: bool,
    },
}

impl Finished {
    /// The closing table.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let mut row = |name: &str, value: String| out.push_str(&format!("  {name:<46} {value}\n"));
        for (stage, s) in &self.seconds {
            row(&format!("stage {stage}"), format!("{s:.0} s"));
        }
        for (name, value) in self.report.iter().flat_map(Report::rows) {
            row(&name, value);
        }
        out
    }
}

/// Runs all stages of `cfg` into a new folder; no other process can use it meanwhile. Relative paths in `cfg` are
/// relative to the working directory.
pub fn run(cfg: &Config, dev: Arc<dyn Kernels>, o: &RunOptions) -> Result<Finished> {
    if cfg.stage.is_empty() {
        return Err(Error::config("stage", "none", "at least one [[stage]]"));
    }
    // Before looking what the folder holds: another run may begin there at this moment.
    let lock = Lock::take(o.out)?;
    match begin(cfg, dev, o) {
        Ok(session) => session.go(None),
        Err(e) => {
            lock.abandon();
            Err(e)
        }
    }
}

/// All that comes before the first step. The configuration is written last: with it a run has begun.
fn begin(cfg: &Config, dev: Arc<dyn Kernels>, o: &RunOptions) -> Result<Session> {
    refuse_used(o.out)?;
    let mut cfg = cfg.clone();
    cfg.resolve(Path::new(""))?;
    let mut session = Session::new(&cfg, dev, o.out, o.quiet)?;
    load_lpips(&session.model)?;
    if let Some(path) = o.init {
        super::load_weights(&session.model.params, path)?;
        session.progress.history.start_from(path)?;
    }
    if let Some(bytes) = &session.progress.tokenizer {
        let path = o.out.join(TOKENIZER);
        if std::fs::read(&path).is_ok_and(|there| there != **bytes) {
            let what = "is another text tokenizer than the run's own, which is kept there; name another folder \
                        with --out, or remove the file";
            return Err(Error::data(path, what));
        }
        files::replace(&path, |f| f.put(bytes))?;
    }
    let text = checkpoint::config_text(&session.cfg)?;
    files::replace(&o.out.join(CONFIG), |f| f.put(text.as_bytes()))?;
    Ok(session)
}

/// Goes on with an interrupted run from its last checkpoint, to the bits that it would have had; of a run whose weights
/// are trained but not evaluated, the evaluation. No other process can use the folder meanwhile.
pub fn resume(out: &Path, dev: Arc<dyn Kernels>, quiet: bool) -> Result<Finished> {
    refuse_part(out)?;
    let cfg = run_config(out)?;
    let _lock = Lock::take(out)?;
    if out.join(WEIGHTS).exists() {
        return evaluate(out, &cfg, dev);
    }
    Checkpoints::recover(out)?;
    let Some(from) = Checkpoints::latest(out)? else {
        let what = "holds no checkpoint: the run ended before its first; remove the folder and start anew with \
                    `ett-train run`";
        return Err(Error::data(out, what));
    };
    checkpoint::check_config(&from, &cfg)?;
    Session::new(&cfg, dev, out, quiet)?.go(Some(&from))
}

/// Fails if a folder is not a run's but a checkpoint's, or that of all of them.
fn refuse_part(folder: &Path) -> Result<()> {
    match run_of(folder) {
        None => Ok(()),
        Some(run) => {
            let what = format!("is part of a run; go on with `ett-train resume {}`", run.display());
            Err(Error::data(folder, what))
        }
    }
}

/// The run that a checkpoint, or the folder of all of them, belongs to.
fn run_of(folder: &Path) -> Option<PathBuf> {
    let whole = std::fs::canonicalize(folder).ok()?;
    let all = if folder.join(checkpoint::STATE).exists() { whole.parent()? } else { &whole };
    let run = all.parent().filter(|run| run.join(CONFIG).exists())?;
    all.ends_with(checkpoint::CHECKPOINTS).then(|| run.to_path_buf())
}

/// What is left to do for a run whose weights are trained.
fn evaluate(out: &Path, cfg: &Config, dev: Arc<dyn Kernels>) -> Result<Finished> {
    if !cfg.data.has_test() || out.join(closing::REPORT).is_file() {
        return Err(Error::data(out, "holds a finished run, which has nothing left to do"));
    }
    tracing::info!("{}: all stages are trained, only the evaluation is left", out.display());
    let mut trained = Trained::open(out, dev, false)?;
    let seconds = match Checkpoints::latest(out)? {
        Some(last) => checkpoint::progress(&last)?.seconds,
        None => vec![],
    };
    interrupt::enter(interrupt::Phase::Closing);
    closing::plot(&out.join(METRICS), out);
    let (report, ending) = match trained.evaluate(None, None, out) {
        Ok(report) => (Some(report), Ending::Whole),
        Err(Error::Interrupted) => (None, Ending::Unevaluated { interrupted: true }),
        Err(e) => return Err(e),
    };
    Ok(Finished { model: trained.model, report, seconds, ending })
}

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

/// The files for people in the folder of a finished run, with what they are.
pub fn written(out: &Path) -> Vec<(&'static str, &'static str)> {
    [
        ("losses.png", "curves of every loss"),
        ("reconstructions.png", "held-out pictures above their reconstructions"),
        ("held-out.md", "captions and answers beside the truth"),
        ("drawings.png", "pictures drawn for held-out prompts"),
        ("eval.json", "the held-out results above, with their settings"),
        (METRICS, "one line a step"),
        (WEIGHTS, "the weights; `ett --run` uses this folder"),
    ]
    .into_iter()
    .filter(|(file, _)| out.join(file).exists())
    .collect()
}

/// Fails if `out` holds a run already, and says what can be done.
fn refuse_used(out: &Path) -> Result<()> {
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

/// The data sets of a run: stages that read the same share them.
struct Sets {
    /// What is read, to train on (unless only the closing evaluation looks at it) and held out.
    all: Vec<(DataConfig, Option<DataSet>, Option<DataSet>)>,
}

impl Sets {
    /// Everything that the stages read, and what the closing evaluation looks at.
    fn open(cfg: &Config) -> Result<Self> {
        let mut sets = Sets { all: Vec::new() };
        let stages = cfg.stage.iter().map(|s| (cfg.data_of(s), true));
        for (data, trains) in stages.chain([(cfg.data.clone(), false)]) {
            if sets.find(&data).is_some() {
                continue;
            }
            let train = if trains { Some(DataSet::train(&data)?) } else { None };
            let test = DataSet::test(&data)?;
            if let Some(test) = &test {
                eval::check(test, data.eval_samples)?;
            }
            sets.all.push((data, train, test));
        }
        Ok(sets)
    }

    fn find(&self, data: &DataConfig) -> Option<&(DataConfig, Option<DataSet>, Option<DataSet>)> {
        self.all.iter().find(|(have, ..)| have == data)
    }

    /// What to train on.
    fn train(&self, data: &DataConfig) -> Result<&DataSet> {
        self.find(data)
            .and_then(|(_, train, _)| train.as_ref())
            .ok_or_else(|| Error::config("data.train", "another", "the data of a stage of this run"))
    }

    /// What is held out.
    fn test(&self, data: &DataConfig) -> Option<&DataSet> {
        self.find(data).and_then(|(.., test)| test.as_ref())
    }

    /// Of everything that is trained on.
    fn fingerprints(&self) -> Vec<Fingerprint> {
        self.all.iter().filter_map(|(_, train, _)| train.as_ref()).map(DataSet::fingerprint).collect()
    }
}

/// A run under way.
struct Session {
    cfg: Config,
    model: Ett,
    sets: Sets,
    template: Template,
    out: PathBuf,
    quiet: bool,
    progress: Progress,
}

impl Session {
    fn new(cfg: &Config, dev: Arc<dyn Kernels>, out: &Path, quiet: bool) -> Result<Self> {
        let (template, text) = text(cfg)?;
        let tokenizer = match &cfg.data.tokenizer {
            Some(path) => Some(std::fs::read(path).map_err(Error::io(path))?.into()),
            None => None,
        };
        let sets = Sets::open(cfg)?;
        let model = Ett::new(cfg, dev)?;
        let progress = Progress {
            data: sets.fingerprints(),
            history: History::new(text),
            tokenizer,
            ..Progress::default()
        };
        Ok(Session { cfg: cfg.clone(), model, sets, template, out: out.into(), quiet, progress })
    }

    fn go(mut self, from: Option<&Path>) -> Result<Finished> {
        let mut from = from;
        if let Some(folder) = from {
            let now = std::mem::replace(&mut self.progress, checkpoint::progress(folder)?);
            checkpoint::check_data(folder, &self.progress.data, &now.data)?;
            self.progress.history.check_text(&now.history.text, &self.cfg, folder)?;
            tracing::info!(
                "going on from {}: stage {}, {} steps done",
                folder.display(),
                self.progress.stage_name,
                self.progress.step
            );
        }
        let mut metrics = Lines::resume(&self.out.join(METRICS), self.progress.metrics)?;
        let stages = self.cfg.stage.clone();
        for (number, cfg) in stages.iter().enumerate().skip(self.progress.stage) {
            if let Some(at) = self.stage(cfg, number, from.take(), &mut metrics)? {
                let seconds = self.progress.seconds;
                return Ok(Finished { model: self.model, report: None, seconds, ending: Ending::Saved(at) });
            }
        }
        self.model.params.train(&[])?;
        let (params, history) = (&self.model.params, &self.progress.history);
        let explain = |e| Checkpoints::new(&self.out, 1).explain(e);
        if (0..params.groups().len()).any(|g| params.ema(g).is_some()) {
            save_weights(params, &self.out.join(EMA), Copy::Ema).map_err(explain)?;
        }
        // Last, since it marks the run as trained; whatever happens from here on loses nothing.
        save_weights_of(params, &self.out.join(WEIGHTS), Copy::Master, history).map_err(explain)?;
        interrupt::enter(interrupt::Phase::Closing);
        closing::plot(&self.out.join(METRICS), &self.out);
        let evaluated = self.sets.test(&self.cfg.data).map(|test| {
            interrupt::check()?;
            tracing::info!("evaluating on held-out pictures of {}", test.root.display());
            closing::evaluate(&mut self.model, test, &self.template, &self.out)
        });
        let (report, ending) = match evaluated.transpose() {
            Ok(report) => (report, Ending::Whole),
            Err(Error::Interrupted) => (None, Ending::Unevaluated { interrupted: true }),
            Err(e) => {
                tracing::warn!("the weights are saved, but the evaluation failed: {e}");
                (None, Ending::Unevaluated { interrupted: false })
            }
        };
        Ok(Finished { model: self.model, report, seconds: self.progress.seconds, ending })
    }

    /// Runs a stage, or what is left of it after the checkpoint `from`. Returns the checkpoint that was saved if the
    /// run is to stop.
    fn stage(
        &mut self,
        cfg: &StageConfig,
        number: usize,
        from: Option<&Path>,
        metrics: &mut Lines,
    ) -> Result<Option<PathBuf>> {
        let Session { cfg: all, model, sets, template, out, quiet, progress } = self;
        let data = all.data_of(cfg);
        let (data, test) = (sets.train(&data)?, sets.test(&data));
        let checkpoints = Checkpoints::new(out, all.train.keep);
        let stage = Stage::of(cfg, model)?;
        let trained = stage.trained();
        model.params.train(&trained)?;
        if from.is_none() {
            start_averages(model, &trained, cfg.ema)?;
        }
        let feed = Feed::new(data, template, cfg, &stage, &all.train, number)?;
        let mut update = Update::new(model, cfg, &stage)?;
        match from {
            Some(folder) => checkpoint::load(folder, model, &mut update.optimizers())?,
            None => {
                (progress.stage, progress.step, progress.stage_name) = (number, 0, cfg.kind.name().into());
                progress.seconds.push((cfg.kind.name().into(), 0.0));
            }
        }
        progress.history.learn(all, cfg);
        let mut usage = Usage::new(all.quantizer.codes, all.train.usage_window, &progress.window);
        let bar = bar(cfg, progress.step, *quiet);
        let mut smooth = Smooth::default();
        let (mut started, mut saved) = (Instant::now(), from.map(Path::to_path_buf));
        let mut last = String::new();
        interrupt::enter(interrupt::Phase::Training);
        while progress.step < cfg.steps {
            let s = progress.step;
            let clock = Instant::now();
            let fed = feed.batch(model, s)?;
            if let (0, Some(first)) = (s, fed.sequences.first()) {
                let shown = template.show(first);
                bar.suspend(|| tracing::info!("first sample of stage {}: {shown}", cfg.kind.name()));
            }
            let rate = update.prepare(model, cfg, &stage, &fed, s)?;
            let outcome =
                step(model, &stage.recipe, &fed.parts, &update.state, &update.main, update.disc.as_ref())?;
            let (norm, bad) = update.finish(model, &outcome)?;
            let mut line = Line { stage: cfg.kind.name(), number, step: s, rate, ..Line::default() };
            line.measure(model, &outcome)?;
            line.grad_norm = norm;
            match bad {
                false => progress.in_a_row = 0,
                true => {
                    (progress.skipped, progress.in_a_row) = (progress.skipped + 1, progress.in_a_row + 1);
                    let what = format!("step {s} of stage {}", cfg.kind.name());
                    let dev = &**model.params.device();
                    let inputs = match dump(out, cfg.kind.name(), s, &fed.parts, dev) {
                        Ok(path) => path.map(|p| format!("its inputs are in {}", p.display())),
                        Err(e) => Some(format!("its inputs cannot be written: {e}")),
                    };
                    if let Some(inputs) = inputs {
                        bar.suspend(|| {
                            tracing::warn!(
                                "{what}: something is not finite, the update is skipped; {inputs}"
                            );
                        });
                    }
                    if progress.in_a_row > MAX_SKIPPED {
                        return Err(Error::Training(format!(
                            "{} updates in a row had losses or gradients that are not finite, the last at {what}; lower \
                             the learning rate or look at the data",
                            progress.in_a_row
                        )));
                    }
                }
            }
            line.skipped = progress.skipped;
            for idx in &outcome.idx {
                usage.add(&idx.to_host(&**model.params.device())?);
            }
            (line.codes_used, line.code_perplexity) = usage.measure();
            if s == 0 {
                line.quantizer = sharpness(model, &stage, &outcome)?;
                if let Some(what) = line.quantizer.and_then(|q| q.warning()) {
                    bar.suspend(|| tracing::warn!("{what}"));
                }
            }
            let took = clock.elapsed().as_secs_f64().max(1e-9);
            line.images_per_s = cfg.batch as f64 / took;
            line.tokens_per_s = fed.rows as f64 / took;
            drop((fed, outcome));
            let done = s + 1;
            let every = all.train.eval_every;
            if let Some(test) = test.filter(|_| every > 0 && (done % every == 0 || done == cfg.steps)) {
                match eval::during(model, test, template, cfg.kind) {
                    Ok(values) => line.eval = Some(values),
                    Err(e) => bar.suspend(|| tracing::warn!("step {s} is not evaluated: {e}")),
                }
            }
            metrics.push(&line.json()?).map_err(|e| checkpoints.explain(e))?;
            last = smooth.message(&line);
            bar.set_message(last.clone());
            bar.inc(1);
            (progress.step, progress.total) = (done, progress.total + 1);
            let stop = interrupt::requested();
            let every = all.train.save_every;
            if stop || done == cfg.steps || (every > 0 && done % every == 0) {
                progress.metrics = metrics.sync().map_err(|e| checkpoints.explain(e))?;
                progress.window = usage.window();
                if let Some((_, seconds)) = progress.seconds.last_mut() {
                    *seconds += started.elapsed().as_secs_f64();
                }
                started = Instant::now();
                saved = Some(checkpoints.save(model, &update.saved(), progress)?);
            }
            if stop {
                bar.abandon();
                return Ok(saved);
            }
        }
        bar.finish();
        let seconds = progress.seconds.last().map_or(0.0, |s| s.1);
        tracing::info!("stage {}: {} steps in {seconds:.0} s, {last}", cfg.kind.name(), cfg.steps);
        Ok(None)
    }
}

/// The optimizers of a stage, and the step state that they share.
struct Update {
    state: StepState,
    main: Optimizer,
    disc: Option<Optimizer>,
    peak: f64,
    disc_peak: f64,
}

impl Update {
    fn new(model: &Ett, cfg: &StageConfig, stage: &Stage) -> Result<Self> {
        let t = &model.cfg.train;
        let ema_decay = if cfg.ema { t.ema_decay } else { 0.0 };
        let (eps, clip) = (cfg.adam_eps.unwrap_or(t.adam_eps), cfg.clip.unwrap_or(t.clip));
        let weight_decay = cfg.weight_decay.unwrap_or(t.weight_decay);
        let mut state = StepState::new(&**model.params.device(), model.params.precision().acc)?;
        stage.recipe.weights(model, &mut state, cfg.accumulate);
        let (peak, betas) = (cfg.lr.unwrap_or(t.lr), cfg.betas.unwrap_or(t.betas));
        let hyper = Hyper { betas, eps, weight_decay, ema_decay, clip };
        let mut main = Optimizer::new(&model.params, &stage.groups, hyper)?;
        let of = cfg.groups.get("discriminator").cloned().unwrap_or_default();
        for (name, g) in cfg.groups.iter().filter(|(name, _)| *name != "discriminator") {
            let own = Own {
                scale: g.lr.map_or(1.0, |lr| if peak > 0.0 { lr / peak } else { 0.0 }),
                betas: g.betas.unwrap_or(betas),
                eps: g.adam_eps.unwrap_or(eps),
                weight_decay: g.weight_decay.unwrap_or(weight_decay),
                clip: g.clip,
            };
            main.set_group(&model.params, name, own).map_err(|_| {
                let key = format!("stage.groups.{name}");
                let want = format!("a group that this stage trains: {}", stage.trained().join(", "));
                Error::config(key, "not trained", want)
            })?;
        }
        let disc = match stage.discriminator {
            true => {
                let hyper = Hyper {
                    betas: of.betas.unwrap_or(t.disc_betas),
                    eps: of.adam_eps.unwrap_or(eps),
                    weight_decay: of.weight_decay.unwrap_or(weight_decay),
                    ema_decay,
                    clip: of.clip.unwrap_or(clip),
                };
                Some(Optimizer::new(&model.params, &["discriminator"], hyper)?)
            }
            false => None,
        };
        Ok(Update { state, main, disc, peak, disc_peak: of.lr.unwrap_or(peak) })
    }

    /// The optimizers, in the order of checkpoints.
    fn saved(&self) -> Vec<&Optimizer> {
        [Some(&self.main), self.disc.as_ref()].into_iter().flatten().collect()
    }

    /// The same.
    fn optimizers(&mut self) -> Vec<&mut Optimizer> {
        [Some(&mut self.main), self.disc.as_mut()].into_iter().flatten().collect()
    }

    /// Sends what step `s` needs to the device; the learning rate.
    fn prepare(&mut self, model: &Ett, cfg: &StageConfig, stage: &Stage, fed: &Fed, s: usize) -> Result<f64> {
        let what = |of: &str| {
            Error::Training(format!(
                "step {s} of stage {} has no supervised {of}; look at the captions and questions",
                cfg.kind.name()
            ))
        };
        if (stage.recipe.text || stage.recipe.codes) && fed.tokens + fed.codes == 0 {
            return Err(what(if stage.recipe.codes { "code" } else { "token" }));
        }
        Counts::new(model, &fed.parts, fed.tokens, fed.codes).set(&mut self.state);
        let warmup = cfg.warmup(&model.cfg.train);
        let rate = |peak| schedule(cfg.schedule, peak, warmup, s, cfg.steps);
        self.main.prepare(&mut self.state, rate(self.peak));
        if let Some(d) = &mut self.disc {
            d.prepare(&mut self.state, rate(self.disc_peak));
        }
        self.state.send(&**model.params.device())?;
        Ok(rate(self.peak))
    }

    /// Waits for the step; its gradient norm, and whether it was skipped.
    fn finish(&mut self, model: &mut Ett, out: &Outcome) -> Result<(f64, bool)> {
        let norms = self.main.norm().to_f64(&**model.params.device())?;
        let bad = norms[1] > 0.0;
        if bad {
            self.optimizers().into_iter().for_each(Optimizer::skip);
            model.discriminator_state.batches = out.batches_before;
        }
        Ok((norms.chunks(2).map(|n| n[0]).sum::<f64>().sqrt(), bad))
    }
}

fn bar(stage: &StageConfig, done: usize, quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let style =
        ProgressStyle::with_template("{prefix:>9} {bar:32} {pos:>5}/{len} {elapsed} (left {eta}) {msg}");
    let bar = ProgressBar::new(stage.steps as u64).with_prefix(stage.kind.name()).with_position(done as u64);
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// In the first step of a stage that trains an IBQ tokenizer.
fn sharpness(model: &Ett, stage: &Stage, out: &Outcome) -> Result<Option<Sharpness>> {
    let ibq = model.cfg.quantizer.kind == QuantizerKind::Ibq;
    match (stage.recipe.tokenizer, &out.z) {
        (TokenizerMode::Trained(_), Some(z)) if ibq => Ok(Some(Sharpness::measure(model, z)?)),
        _ => Ok(None),
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
