//! A stage in progress: the loop over its steps, with their metrics, evaluations and checkpoints.

use std::path::{Path, PathBuf};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};

use super::dump::dump;
use super::stages::start_averages;
use super::update::Update;
use super::{Counts, Loss, Outcome, Stage, TokenizerMode, checkpoint, step};
use crate::config::{Config, QuantizerKind, StageConfig};
use crate::data::DataSet;
use crate::error::{Error, Result};
use crate::feed::{Batch, Fed, Feed, Template};
use crate::files::Lines;
use crate::interrupt;
use crate::io::{Checkpoints, Progress};
use crate::model::Ett;
use crate::report::{Evaluation, Line, Sharpness, Smooth, Usage};

/// Maximum number of consecutive updates that may be skipped because of non-finite values.
const MAX_SKIPPED: usize = 20;

/// The parts of a run that a stage reads.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    /// The configuration of the run.
    pub all: &'a Config,
    /// The training data of the stage.
    pub data: &'a DataSet,
    /// The held-out data.
    pub test: Option<&'a DataSet>,
    pub template: &'a Template,
    /// The run folder.
    pub out: &'a Path,
    /// Hides the progress bar.
    pub quiet: bool,
    pub evaluation: &'a dyn Evaluation,
}

/// A stage in progress.
pub(super) struct Running<'a> {
    run: Inputs<'a>,
    cfg: &'a StageConfig,
    /// Its index in the run.
    number: usize,
    model: &'a mut Ett,
    progress: &'a mut Progress,
    metrics: &'a mut Lines,
    checkpoints: Checkpoints,
    stage: Stage,
    feed: Feed<'a>,
    update: Update,
    usage: Usage,
    bar: ProgressBar,
    smooth: Smooth,
    /// The text beside the progress bar.
    message: String,
    /// When the elapsed time was last added to the seconds of the stage.
    since: Instant,
}

impl<'a> Running<'a> {
    /// A stage before its first step, or after the checkpoint `from`.
    pub fn begin(
        run: Inputs<'a>,
        cfg: &'a StageConfig,
        number: usize,
        model: &'a mut Ett,
        progress: &'a mut Progress,
        metrics: &'a mut Lines,
        from: Option<&Path>,
    ) -> Result<Self> {
        let name = cfg.kind.name();
        let stage = Stage::of(cfg, model)?;
        let trained = stage.trained();
        model.params.train(&trained)?;
        if from.is_none() {
            start_averages(model, &trained, cfg.ema)?;
        }
        let pictures = stage.reads_pictures();
        let feed = Feed::new(run.data, run.template, cfg, pictures, &run.all.train, number)?;
        let mut update = Update::new(model, cfg, &stage)?;
        match from {
            Some(folder) => checkpoint::load(folder, model, &mut update.optimizers())?,
            None => {
                (progress.stage, progress.step, progress.stage_name) = (number, 0, name.into());
                progress.seconds.push((name.into(), 0.0));
            }
        }
        progress.history.learn(run.all, cfg);
        Ok(Running {
            checkpoints: Checkpoints::new(run.out, run.all.train.keep),
            usage: Usage::new(run.all.quantizer.codes, run.all.train.usage_window, &progress.window),
            bar: bar(cfg, progress.step, run.quiet),
            smooth: Smooth::default(),
            message: String::new(),
            since: Instant::now(),
            run,
            cfg,
            number,
            model,
            progress,
            metrics,
            stage,
            feed,
            update,
        })
    }

    /// Runs the remaining steps. If the run is interrupted, returns the checkpoint that was saved.
    pub fn train(mut self) -> Result<Option<PathBuf>> {
        interrupt::enter(interrupt::Phase::Training);
        while self.progress.step < self.cfg.steps {
            let step = self.progress.step;
            let mut line = self.step().map_err(|e| e.at(self.cfg.kind.name(), Some(step)))?;
            self.evaluate(&mut line);
            self.write(&line)?;
            // Read once per step, so that a run that stops has always saved a checkpoint first.
            let stop = interrupt::requested();
            let saved = self.save(stop)?;
            if stop {
                self.bar.abandon();
                return Ok(saved);
            }
        }
        self.bar.finish();
        let seconds = self.progress.seconds.last().map_or(0.0, |s| s.1);
        let (name, steps, last) = (self.cfg.kind.name(), self.cfg.steps, &self.message);
        tracing::info!("stage {name}: {steps} steps in {seconds:.0} s, {last}");
        Ok(None)
    }

    /// Performs one step on a batch and returns its line of metrics.
    fn step(&mut self) -> Result<Line> {
        let s = self.progress.step;
        let clock = Instant::now();
        let fed = self.feed.batch(self.model, s)?;
        self.show_first(s, &fed);
        let counts = self.counts(s, &fed)?;
        let rate = self.update.prepare(self.model, self.cfg, &counts, s)?;
        let Update { state, main, disc, .. } = &self.update;
        let outcome = step(self.model, &self.stage.recipe, &fed.parts, state, main, disc.as_ref())?;
        let (grad_norm, skipped) = self.update.finish(self.model, &outcome)?;
        let name = self.cfg.kind.name();
        let mut line = Line { stage: name, number: self.number, step: s, rate, grad_norm, ..Line::default() };
        self.measure(&mut line, &outcome)?;
        match skipped {
            false => self.progress.in_a_row = 0,
            true => self.skipped(s, &fed.parts)?,
        }
        line.skipped = self.progress.skipped;
        if s == 0 {
            line.quantizer = self.sharpness(&outcome)?;
        }
        let took = clock.elapsed().as_secs_f64().max(1e-9);
        line.images_per_s = self.cfg.batch as f64 / took;
        line.tokens_per_s = fed.rows as f64 / took;
        Ok(line)
    }

    /// Logs the first sample of the stage.
    fn show_first(&self, s: usize, fed: &Fed) {
        if let (0, Some(first)) = (s, fed.sequences.first()) {
            let (name, shown) = (self.cfg.kind.name(), self.run.template.show(first));
            self.bar.suspend(|| tracing::info!("first sample of stage {name}: {shown}"));
        }
    }

    /// The numbers of terms over which the losses of a batch are averaged. Fails if a stage that trains on texts or
    /// codes gets a batch without any.
    fn counts(&self, s: usize, fed: &Fed) -> Result<Counts> {
        let recipe = &self.stage.recipe;
        if (recipe.text || recipe.codes) && fed.tokens + fed.codes == 0 {
            let what = if recipe.codes { "code" } else { "token" };
            return Err(Error::Training(format!(
                "step {s} of stage {} has no supervised {what}; check the captions and questions",
                self.cfg.kind.name()
            )));
        }
        Ok(Counts::new(self.model, &fed.parts, fed.tokens, fed.codes))
    }

    /// Records the losses of a step, its codebook usage and its peak memory. Waits for the device.
    fn measure(&mut self, line: &mut Line, outcome: &Outcome) -> Result<()> {
        let dev = self.model.params.device();
        for loss in Loss::ALL {
            if outcome.terms.iter().any(|(l, _)| *l == loss) {
                line.loss.insert(loss.name(), outcome.value(self.model, loss)?);
            }
        }
        line.unscored = outcome.unscored(self.model)?;
        line.memory_mib = dev.memory().peak as f64 / f64::from(1 << 20);
        for idx in &outcome.idx {
            self.usage.add(&idx.to_host(&**dev)?);
        }
        (line.codes_used, line.code_perplexity) = self.usage.measure();
        Ok(())
    }

    /// Counts an update that was skipped because of non-finite values and dumps its inputs. Fails after too many in a
    /// row.
    fn skipped(&mut self, s: usize, parts: &[Batch]) -> Result<()> {
        self.progress.skipped += 1;
        self.progress.in_a_row += 1;
        let name = self.cfg.kind.name();
        let what = format!("step {s} of stage {name}");
        let inputs = match dump(self.run.out, name, s, parts, &**self.model.params.device()) {
            Ok(path) => path.map(|p| format!("its inputs are in {}", p.display())),
            Err(e) => Some(format!("its inputs cannot be written: {e}")),
        };
        if let Some(inputs) = inputs {
            self.bar.suspend(|| {
                tracing::warn!("{what}: the update is skipped because of non-finite values; {inputs}");
            });
        }
        if self.progress.in_a_row > MAX_SKIPPED {
            return Err(Error::Training(format!(
                "{} updates in a row had non-finite losses or gradients, the last at {what}; lower the learning rate \
                 or check the data",
                self.progress.in_a_row
            )));
        }
        Ok(())
    }

    /// Measures the sharpness of the softmax over the codes, if the stage trains an IBQ tokenizer.
    fn sharpness(&self, outcome: &Outcome) -> Result<Option<Sharpness>> {
        let ibq = self.model.cfg.quantizer.kind == QuantizerKind::Ibq;
        let (TokenizerMode::Trained(_), Some(z), true) = (self.stage.recipe.tokenizer, &outcome.z, ibq)
        else {
            return Ok(None);
        };
        let measured = Sharpness::measure(self.model, z)?;
        if let Some(what) = measured.warning() {
            self.bar.suspend(|| tracing::warn!("{what}"));
        }
        Ok(Some(measured))
    }

    /// Evaluates on held-out pictures after every `train.eval_every` steps and after the last step.
    fn evaluate(&mut self, line: &mut Line) {
        let (done, every) = (line.step + 1, self.run.all.train.eval_every);
        let due = every > 0 && (done.is_multiple_of(every) || done == self.cfg.steps);
        let Some(test) = self.run.test.filter(|_| due) else { return };
        match self.run.evaluation.during(self.model, test, self.run.template, self.cfg.kind) {
            Ok(values) => line.eval = Some(values),
            Err(e) => self.bar.suspend(|| tracing::warn!("step {} is not evaluated: {e}", line.step)),
        }
    }

    /// Writes the metrics of a step and counts the step as done.
    fn write(&mut self, line: &Line) -> Result<()> {
        self.metrics.push(&line.json()?).map_err(|e| self.checkpoints.explain(e))?;
        self.message = self.smooth.message(line);
        self.bar.set_message(self.message.clone());
        self.bar.inc(1);
        self.progress.step += 1;
        self.progress.total += 1;
        Ok(())
    }

    /// Saves a checkpoint after every `train.save_every` steps, after the last step, and if the run is to stop.
    fn save(&mut self, stop: bool) -> Result<Option<PathBuf>> {
        let (done, every) = (self.progress.step, self.run.all.train.save_every);
        if !(stop || done == self.cfg.steps || (every > 0 && done.is_multiple_of(every))) {
            return Ok(None);
        }
        self.progress.metrics = self.metrics.sync().map_err(|e| self.checkpoints.explain(e))?;
        self.progress.window = self.usage.window();
        if let Some((_, seconds)) = self.progress.seconds.last_mut() {
            *seconds += self.since.elapsed().as_secs_f64();
        }
        self.since = Instant::now();
        checkpoint::save(&self.checkpoints, self.model, &self.update.saved(), self.progress).map(Some)
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
