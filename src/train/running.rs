//! A stage in progress: the loop over its steps, with their metrics, evaluations and checkpoints.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::dump::dump;
use super::stages::start_averages;
use super::update::Update;
use super::{Counts, Outcome, Reading, Stage, TokenizerMode, Values, checkpoint, step};
use crate::backend::{Recording, Stream};
use crate::config::{Config, QuantizerKind, StageConfig};
use crate::error::{Error, Result};
use crate::feed::{Ahead, DataSet, Feed, HostBatch, PartSizes, Template, Uploaded};
use crate::files::Lines;
use crate::interrupt;
use crate::io::{Checkpoints, Progress};
use crate::model::{BACKWARD, Ett};
use crate::nn::Reducer;
use crate::ranks::{Group, Phase};
use crate::report::{Evaluation, Line, Sharpness, Smooth, Usage};
use crate::tensor::Tensor;

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
    /// Whether checkpoints are written.
    pub saves: bool,
    pub evaluation: &'a dyn Evaluation,
    /// The ranks that train together.
    pub group: &'a Group,
}

/// The end of a stage.
pub(super) struct Trained {
    /// The checkpoint that was saved if the run was interrupted.
    pub saved: Option<PathBuf>,
    /// The time that the collectives of a step take alone, if it was measured.
    pub communication: Option<Duration>,
    /// Whether the last steps were replayed.
    pub replayed: bool,
}

/// A step that was recorded, and the memory that it reads and writes.
struct Recorded {
    input: Uploaded,
    launches: Box<dyn Recording>,
    outcome: Outcome,
}

/// A step that the device was given, whose results have not arrived yet.
struct Launched {
    step: usize,
    rate: f64,
    batch: HostBatch,
    reading: Reading,
    /// Passes that it adds to the discriminator's running statistics.
    passes: u64,
    /// Quantizer input, if its sharpness is to be measured.
    z: Option<Tensor>,
    /// Time spent waiting for the batch.
    waited: Duration,
    /// Rows of the language model's input, of all ranks.
    rows: u64,
}

/// A batch on its way to the device.
struct Taken {
    step: usize,
    batch: HostBatch,
    data: Uploaded,
    /// Time spent waiting for the batch.
    waited: Duration,
}

/// What all ranks know before a step.
struct Agreed {
    /// The counts of the batch, of all ranks together.
    counts: Counts,
    /// Rows of the language model's input, of all ranks.
    rows: u64,
    /// Whether one of them was asked to stop.
    stop: bool,
    /// Whether the batch has the same sizes as the one before on every rank, and as many visual tokens on all ranks.
    same: bool,
    /// The most visual tokens that a rank has, if they are not all the same.
    most: Option<usize>,
}

/// The batches of the remaining steps.
struct Batches {
    ahead: Ahead,
    steps: Range<usize>,
}

impl Batches {
    /// The next batch, if there is one.
    fn take(&mut self, model: &Ett) -> Result<Option<Taken>> {
        let Some(step) = self.steps.next() else { return Ok(None) };
        let clock = Instant::now();
        let batch = self.ahead.batch(step)?;
        let waited = clock.elapsed();
        let data = batch.upload(model)?;
        Ok(Some(Taken { step, batch, data, waited }))
    }
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
    feed: Arc<Feed<'a>>,
    update: Update,
    /// Whether steps are recorded; not while the device measures kernels.
    records: bool,
    /// The first step since the run was started or resumed.
    first: usize,
    /// The step that is replayed, once it is recorded.
    recorded: Option<Recorded>,
    /// The sizes of the last batch.
    sizes: Vec<PartSizes>,
    usage: Usage,
    bar: ProgressBar,
    smooth: Smooth,
    /// The text beside the progress bar.
    message: String,
    /// When the elapsed time was last added to the seconds of the stage.
    since: Instant,
    /// When the results of the last step arrived.
    arrived: Instant,
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
        let records = model.params.device().can_record();
        let feed = Feed::new(run.all, number, run.data, run.template, pictures, records)?
            .of_rank(run.group.rank(), run.group.ranks())?;
        let update = Update::new(model, cfg, &stage)?;
        match from {
            Some(folder) => checkpoint::load(folder, model, &update.saved())?,
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
            arrived: Instant::now(),
            run,
            cfg,
            number,
            model,
            progress,
            metrics,
            stage,
            feed: Arc::new(feed),
            update,
            records: run.all.train.graph && records,
            first: 0,
            recorded: None,
            sizes: Vec::new(),
        })
    }

    /// Runs the remaining steps.
    pub fn train(mut self) -> Result<Trained> {
        interrupt::enter(interrupt::Phase::Training);
        self.first = self.progress.step;
        let feed = self.feed.clone();
        let (steps, workers) = (self.progress.step..self.cfg.steps, self.run.all.train.workers);
        let saved = std::thread::scope(|scope| {
            let mut batches = Batches { ahead: Ahead::start(scope, &feed, steps.clone(), workers)?, steps };
            self.steps(&mut batches)
        })?;
        if saved.is_some() {
            self.bar.abandon();
            return Ok(Trained { saved, communication: None, replayed: false });
        }
        self.bar.finish();
        let seconds = self.progress.seconds.last().map_or(0.0, |s| s.1);
        let (name, steps, last) = (self.cfg.kind.name(), self.cfg.steps, &self.message);
        tracing::info!("stage {name}: {steps} steps in {seconds:.0} s, {last}");
        let measures = !self.run.saves && self.run.group.ranks() > 1;
        let communication = if measures { Some(self.communication()?) } else { None };
        Ok(Trained { saved: None, communication, replayed: self.recorded.is_some() })
    }

    /// The time that the collectives of a step take without anything beside them: the median of a few.
    fn communication(&mut self) -> Result<Duration> {
        const TIMES: usize = 7;
        self.enter(Phase::Busy);
        let params = &self.model.params;
        let dev = params.device();
        let groups = 0..params.groups().len();
        let slices = groups.map(|g| params.slices(g)).collect::<Result<Vec<_>>>()?;
        let gathers = || slices.iter().flatten().flat_map(|slice| &slice.gathers);
        let mut times = Vec::new();
        for _ in 0..TIMES {
            dev.synchronize()?;
            self.run.group.sum(&[0])?;
            let clock = Instant::now();
            Reducer::new(params, &BACKWARD, 0, 1).finish()?;
            for (part, whole) in gathers() {
                dev.collectives().all_gather(Stream::PEERS, part.view(), whole.out())?;
            }
            dev.order(Stream::PEERS, Stream::COMPUTE)?;
            dev.synchronize()?;
            times.push(clock.elapsed());
        }
        times.sort();
        Ok(times[TIMES / 2])
    }

    /// The loop over the steps. A device with queues is given a step before the results of the one before are read, so
    /// that it does not wait for the host, except where the run is saved, evaluated or stopped between the two.
    fn steps(&mut self, batches: &mut Batches) -> Result<Option<PathBuf>> {
        let mut running: Option<Launched> = None;
        let mut next: Option<Taken> = None;
        self.arrived = Instant::now();
        while self.progress.step < self.cfg.steps {
            if next.is_none() {
                next = batches.take(self.model)?;
            }
            // Read once per step, so that a run that stops has always saved a checkpoint first.
            let stop = interrupt::requested();
            let agreed = self.agree(stop, next.as_ref())?;
            let stop = agreed.stop;
            let pause = running.as_ref().is_some_and(|r| stop || self.pauses_after(r.step));
            let mut launched = None;
            if !pause && let Some(batch) = next.take() {
                let (stage, step) = (self.cfg.kind.name(), batch.step);
                launched = Some(self.launch(batch, &agreed).map_err(|e| e.at(stage, Some(step)))?);
                // Copied while the device computes.
                next = batches.take(self.model)?;
            }
            let Some(done) = std::mem::replace(&mut running, launched) else { continue };
            let (stage, step) = (self.cfg.kind.name(), done.step);
            let mut line = self.finish(done).map_err(|e| e.at(stage, Some(step)))?;
            let between = running.is_none();
            if step == 0 {
                // The first step loads kernels and takes memory: its times say nothing about the others.
                self.model.params.device().profile()?;
            }
            if between {
                self.enter(Phase::Busy);
                self.evaluate(&mut line)?;
            }
            self.write(&line)?;
            if between {
                let saved = self.save(stop)?;
                if stop {
                    return Ok(saved);
                }
            }
            self.arrived = Instant::now();
        }
        Ok(None)
    }

    /// Tells the other ranks what this one is doing.
    fn enter(&self, phase: Phase) {
        let (stage, step) = (self.cfg.kind.name(), self.progress.step);
        self.run.group.enter(phase, &format!("stage {stage}, step {step}"));
    }

    /// What the ranks have to agree on before they go on, `next` being the next batch of this one.
    fn agree(&mut self, stop: bool, next: Option<&Taken>) -> Result<Agreed> {
        let group = self.run.group;
        let own =
            |n: u64| (0..group.ranks()).map(|r| if r == group.rank() { n } else { 0 }).collect::<Vec<_>>();
        let (counts, rows, same) = match next {
            Some(next) => {
                let batch = &next.batch;
                let counts = Counts::new(self.model, &next.data.parts, batch.tokens(), batch.codes());
                (counts, batch.rows() as u64, self.sizes == batch.sizes())
            }
            None => (Counts::default(), 0, false),
        };
        let mut said = counts.numbers().to_vec();
        said.extend([u64::from(stop), rows, u64::from(same)]);
        said.extend(own(counts.visual as u64));
        // The first step takes what it takes.
        self.enter(if self.progress.step == self.first { Phase::Busy } else { Phase::Training });
        let all = if group.ranks() > 1 { group.sum(&said)? } else { said };
        let [tokens, codes, pictures, elements, patches, visual, stops, rows, same, each @ ..] = &all[..]
        else {
            return Err(Error::Training(format!("the ranks sent {} numbers", all.len())));
        };
        let equal = each.iter().all(|n| n == &each[0]);
        Ok(Agreed {
            counts: Counts::of([*tokens, *codes, *pictures, *elements, *patches, *visual]),
            rows: *rows,
            stop: *stops > 0,
            same: *same as usize == group.ranks() && equal,
            most: if equal { None } else { each.iter().max().map(|n| *n as usize) },
        })
    }

    /// Whether the results of this step have to be there before the next one begins.
    fn pauses_after(&self, step: usize) -> bool {
        let (t, done) = (&self.run.all.train, step + 1);
        let due = |every: usize| every > 0 && done.is_multiple_of(every);
        let evaluates = self.run.test.is_some() && due(t.eval_every);
        // A device without queues has the results already. The first step is measured.
        !self.model.params.device().can_record() || step == 0 || evaluates || due(t.save_every)
    }

    /// Gives a step to the device.
    fn launch(&mut self, taken: Taken, agreed: &Agreed) -> Result<Launched> {
        let Taken { step: s, batch, mut data, waited } = taken;
        self.show_first(s, &batch);
        self.refuse_empty(s, &agreed.counts)?;
        let rate = self.update.prepare(self.model, self.cfg, &agreed.counts, s)?;
        let dev = self.model.params.device().clone();
        dev.order(Stream::COPY, Stream::COMPUTE)?;
        let sizes = batch.sizes();
        let launched = |outcome: &Outcome| -> Result<(Reading, u64, Option<Tensor>)> {
            Ok((outcome.read_later(&*dev)?, outcome.passes, outcome.z.clone().filter(|_| s == 0)))
        };
        // All ranks record and replay the same steps.
        if !agreed.same {
            // Its memory is needed for the step of other sizes.
            self.recorded = None;
            data.parts.iter_mut().for_each(|part| part.most = agreed.most);
        }
        if self.recorded.is_none() && self.records && agreed.same {
            self.recorded = self.record(&data, &sizes)?;
            self.records = self.recorded.is_some();
        } else if let Some(r) = &self.recorded {
            r.input.replace(self.model, &data)?;
            self.model.discriminator_state.batches += r.outcome.passes;
        }
        let (reading, passes, z) = match &self.recorded {
            Some(r) => {
                r.launches.replay()?;
                launched(&r.outcome)?
            }
            None => {
                let Update { state, main, disc, .. } = &self.update;
                launched(&step(self.model, &self.stage.recipe, &data.parts, state, main, disc.as_ref())?)?
            }
        };
        self.sizes = sizes;
        Ok(Launched { step: s, rate, batch, reading, passes, z, waited, rows: agreed.rows })
    }

    /// Records a step on batches of these sizes, with the contents of `data`, if the device can.
    fn record(&mut self, data: &Uploaded, sizes: &[PartSizes]) -> Result<Option<Recorded>> {
        let dev = self.model.params.device().clone();
        let input = data.duplicate(self.model, sizes)?;
        let Update { state, main, disc, .. } = &self.update;
        let (model, recipe) = (&mut *self.model, &self.stage.recipe);
        let mut outcome = None;
        let launches = dev.record(&mut || {
            outcome = Some(step(model, recipe, &input.parts, state, main, disc.as_ref())?);
            Ok(())
        })?;
        let recorded = launches.zip(outcome);
        Ok(recorded.map(|(launches, outcome)| Recorded { input, launches, outcome }))
    }

    /// Waits for the results of a step and returns its line of metrics.
    fn finish(&mut self, done: Launched) -> Result<Line> {
        let Launched { step: s, rate, batch, reading, passes, z, waited, rows } = done;
        let values = reading.wait()?;
        let took = self.arrived.elapsed().as_secs_f64().max(1e-9);
        let mut line = Line {
            stage: self.cfg.kind.name(),
            number: self.number,
            step: s,
            rate,
            grad_norm: values.grad_norm,
            images_per_s: self.cfg.batch as f64 / took,
            tokens_per_s: rows as f64 / took,
            waited_ms: waited.as_secs_f64() * 1e3,
            ..Line::default()
        };
        self.measure(&mut line, &values);
        match values.skipped {
            false => self.progress.in_a_row = 0,
            true => {
                let batches = &mut self.model.discriminator_state.batches;
                *batches = batches.saturating_sub(passes);
                self.skipped(s, &batch)?;
            }
        }
        line.skipped = self.progress.skipped;
        if let Some(z) = z {
            line.quantizer = self.sharpness(&z)?;
        }
        Ok(line)
    }

    /// Logs the first sample of the stage.
    fn show_first(&self, s: usize, batch: &HostBatch) {
        if let (0, Some(first)) = (s, batch.sequences.first()) {
            let (name, shown) = (self.cfg.kind.name(), self.run.template.show(first));
            self.bar.suspend(|| tracing::info!("first sample of stage {name}: {shown}"));
        }
    }

    /// Fails if a stage that trains on texts or codes gets a batch without any.
    fn refuse_empty(&self, s: usize, counts: &Counts) -> Result<()> {
        let recipe = &self.stage.recipe;
        if (recipe.text || recipe.codes) && counts.tokens + counts.codes == 0 {
            let what = if recipe.codes { "code" } else { "token" };
            return Err(Error::Training(format!(
                "step {s} of stage {} has no supervised {what}; check the captions and questions",
                self.cfg.kind.name()
            )));
        }
        Ok(())
    }

    /// Puts the losses of a step, its codebook usage and its peak memory into its line.
    fn measure(&mut self, line: &mut Line, values: &Values) {
        line.loss = values.losses.iter().map(|(l, v)| (l.name(), *v)).collect();
        line.unscored = values.unscored;
        line.memory_mib = self.model.params.device().memory().peak as f64 / f64::from(1 << 20);
        if !values.idx.is_empty() {
            self.usage.add(&values.idx);
        }
        (line.codes_used, line.code_perplexity) = self.usage.measure();
    }

    /// Counts an update that was skipped because of non-finite values and dumps its inputs. Fails after too many in a
    /// row.
    fn skipped(&mut self, s: usize, batch: &HostBatch) -> Result<()> {
        self.progress.skipped += 1;
        self.progress.in_a_row += 1;
        let name = self.cfg.kind.name();
        let what = format!("step {s} of stage {name}");
        let whose = if self.run.group.ranks() > 1 { "its inputs on rank 0" } else { "its inputs" };
        let leads = self.run.group.leads();
        let inputs = match if leads { dump(self.run.out, name, s, batch) } else { Ok(None) } {
            Ok(path) => path.map(|p| format!("{whose} are in {}", p.display())),
            Err(e) => Some(format!("{whose} cannot be written: {e}")),
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

    /// Measures the sharpness of the softmax over the codes of `z` `[M, D]`, if the stage trains an IBQ tokenizer.
    fn sharpness(&self, z: &Tensor) -> Result<Option<Sharpness>> {
        let ibq = self.model.cfg.quantizer.kind == QuantizerKind::Ibq;
        if !ibq || !matches!(self.stage.recipe.tokenizer, TokenizerMode::Trained(_)) {
            return Ok(None);
        }
        let measured = Sharpness::measure(self.model, z)?;
        if let Some(what) = measured.warning().filter(|_| self.run.group.leads()) {
            self.bar.suspend(|| tracing::warn!("{what}"));
        }
        Ok(Some(measured))
    }

    /// Evaluates on held-out pictures after every `train.eval_every` steps and after the last step.
    fn evaluate(&mut self, line: &mut Line) -> Result<()> {
        let (done, every) = (line.step + 1, self.run.all.train.eval_every);
        let due = every > 0 && (done.is_multiple_of(every) || done == self.cfg.steps);
        let Some(test) = self.run.test.filter(|_| due) else { return Ok(()) };
        match self.run.evaluation.during(self.model, test, self.run.template, self.cfg.kind) {
            Ok(values) => line.eval = Some(values),
            // The others may wait for this rank in the midst of the evaluation.
            Err(e) if self.run.group.ranks() > 1 => return Err(e),
            Err(e) => self.bar.suspend(|| tracing::warn!("step {} is not evaluated: {e}", line.step)),
        }
        Ok(())
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
        if !(stop || done == self.cfg.steps || (every > 0 && done.is_multiple_of(every))) || !self.run.saves {
            return Ok(None);
        }
        self.progress.metrics = self.metrics.sync().map_err(|e| self.checkpoints.explain(e))?;
        self.progress.window = self.usage.window();
        self.enter(Phase::Busy);
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
