//! The stages of a run, one after another on the same model, and the evaluation at the end.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::checkpoint;
use super::plan::{Devices, choose_recompute, fitting};
use super::running::{Inputs, Running, Trained};
use super::{Ending, Finished, RunOptions};
use crate::backend::{Kernels, size};
use crate::config::{Config, DataConfig, Recompute};
use crate::error::{Error, Result};
use crate::feed::{DataSet, Template};
use crate::files::{self, Lines};
use crate::interrupt;
use crate::io::weights::{TensorFile, attend, entries, load_averages};
use crate::io::{
    Checkpoints, EMA, Fingerprint, History, METRICS, PROFILE, Progress, REPORT, WEIGHTS, checkpoints,
    config_text, load_weights, save_weights, save_weights_of,
};
use crate::model::Ett;
use crate::nn::Stored;
use crate::ranks::{Group, Phase};
use crate::report::{Evaluation, Profiles, Report, plots};

/// The data sets of a run, shared by stages with the same data.
struct Sets {
    /// Configuration, training set (`None` if only the closing evaluation uses this data) and held-out set.
    all: Vec<(DataConfig, Option<DataSet>, Option<DataSet>)>,
}

impl Sets {
    /// Opens the data of all stages and of the closing evaluation.
    fn open(cfg: &Config, evaluation: &dyn Evaluation) -> Result<Self> {
        let mut sets = Sets { all: Vec::new() };
        let stages = cfg.stage.iter().map(|s| (cfg.data_of(s), true));
        for (data, trains) in stages.chain([(cfg.data.clone(), false)]) {
            if sets.find(&data).is_some() {
                continue;
            }
            let train =
                if trains { Some(DataSet::train(&data, cfg.tokenizer.downsampling())?) } else { None };
            let test = DataSet::test(&data)?;
            if let Some(test) = &test {
                evaluation.check(test, data.eval_samples)?;
            }
            sets.all.push((data, train, test));
        }
        Ok(sets)
    }

    /// Opens the data of the closing evaluation only.
    fn held_out(cfg: &Config) -> Result<Self> {
        Ok(Sets { all: vec![(cfg.data.clone(), None, DataSet::test(&cfg.data)?)] })
    }

    fn find(&self, data: &DataConfig) -> Option<&(DataConfig, Option<DataSet>, Option<DataSet>)> {
        self.all.iter().find(|(have, ..)| have == data)
    }

    /// The training set.
    fn train(&self, data: &DataConfig) -> Result<&DataSet> {
        self.find(data)
            .and_then(|(_, train, _)| train.as_ref())
            .ok_or_else(|| Error::config("data.train", "another", "the data of a stage of this run"))
    }

    /// The held-out set.
    fn test(&self, data: &DataConfig) -> Option<&DataSet> {
        self.find(data).and_then(|(.., test)| test.as_ref())
    }

    /// The fingerprints of all training sets.
    fn fingerprints(&self) -> Vec<Fingerprint> {
        self.all.iter().filter_map(|(_, train, _)| train.as_ref()).map(DataSet::fingerprint).collect()
    }
}

/// A run in progress.
pub(super) struct Session<'a> {
    pub cfg: Config,
    pub model: Ett,
    pub progress: Progress,
    sets: Sets,
    template: Template,
    out: PathBuf,
    quiet: bool,
    /// Whether checkpoints are written.
    saves: bool,
    evaluation: &'a dyn Evaluation,
    /// The ranks that train together.
    group: Arc<Group>,
    /// Bytes that the device had free before the model was made, if known.
    memory: Option<u64>,
    profiles: Profiles,
    /// The time that the collectives of a step of the last stage take alone, if it was measured.
    communication: Option<Duration>,
    /// Whether the last steps were replayed.
    replayed: bool,
}

/// What was measured of the only stage of a configuration.
pub(super) struct Measured {
    /// What its backward pass computed again.
    pub recompute: Recompute,
    /// The time of each kernel, if the device measures it.
    pub profiles: Profiles,
    /// The time that the collectives of a step take alone, with several ranks.
    pub communication: Option<Duration>,
    /// Whether the last steps were replayed.
    pub replayed: bool,
}

impl<'a> Session<'a> {
    /// A run before its first step, with fresh weights, except for those that are `given`, which are about to be loaded.
    /// Fails on all ranks if their configurations or data differ.
    pub fn new(
        cfg: &Config,
        dev: Arc<dyn Kernels>,
        o: &RunOptions<'a>,
        given: &dyn Fn(&str) -> bool,
    ) -> Result<Self> {
        let (out, quiet, evaluation, group) = (o.out, o.quiet, o.evaluation, o.group.clone());
        group.agree("the configuration", &config_text(&cfg.without_paths())?)?;
        let (template, text) = Template::of(cfg)?;
        let tokenizer = match &cfg.data.tokenizer {
            Some(path) => Some(std::fs::read(path).map_err(Error::io(path))?.into()),
            None => None,
        };
        let sets = Sets::open(cfg, evaluation)?;
        let data = sets.fingerprints();
        group.agree("the training data", &format!("{data:#?}"))?;
        let memory = dev.available();
        let model = Ett::without(cfg, dev, given)?;
        let progress = Progress { data, history: History::new(text), tokenizer, ..Progress::default() };
        let (cfg, out, profiles) = (cfg.clone(), out.into(), Profiles::default());
        Ok(Session {
            cfg,
            model,
            progress,
            sets,
            template,
            out,
            quiet,
            saves: true,
            evaluation,
            group,
            memory,
            profiles,
            communication: None,
            replayed: false,
        })
    }

    /// A run whose weights are trained and saved, but not evaluated.
    pub fn trained(
        cfg: &Config,
        dev: Arc<dyn Kernels>,
        out: &Path,
        evaluation: &'a dyn Evaluation,
    ) -> Result<Self> {
        if !cfg.data.has_test() || out.join(REPORT).is_file() {
            return Err(Error::data(out, "holds a finished run, which has nothing left to do"));
        }
        tracing::info!("{}: all stages are trained, only the evaluation is left", out.display());
        let weights = out.join(WEIGHTS);
        let (template, text) = Template::of(cfg)?;
        if let Some(history) = History::of(&TensorFile::open(&weights)?) {
            history.check_text(&text, cfg, out)?;
        }
        let mut model = Ett::without(cfg, dev, &|_| true)?;
        load_weights(&model.params, &weights)?;
        // From here on, an interrupt loses nothing.
        interrupt::enter(interrupt::Phase::Closing);
        let averages = out.join(EMA);
        if averages.exists() {
            load_averages(&mut model.params, &averages)?;
        }
        model.params.unshare()?;
        let progress = match Checkpoints::latest(out)? {
            Some(last) => checkpoints::progress(&last)?,
            None => Progress::default(),
        };
        let sets = Sets::held_out(cfg)?;
        Ok(Session {
            cfg: cfg.clone(),
            model,
            progress,
            sets,
            template,
            out: out.into(),
            quiet: true,
            saves: true,
            evaluation,
            group: Group::alone(),
            memory: None,
            profiles: Profiles::default(),
            communication: None,
            replayed: false,
        })
    }

    /// Trains all stages, or the remaining ones after a checkpoint, and evaluates the model.
    pub fn go(mut self, from: Option<&Path>) -> Result<Finished> {
        let trained = self.train_and_save(from);
        if let Some(at) = trained.inspect_err(|e| report(&self.group, e))? {
            return Ok(self.finished(None, Ending::Saved(at)));
        }
        match self.part() {
            Ok(()) if self.group.leads() => {}
            Ok(()) => return Ok(self.nothing_left()),
            Err(e) => {
                report(&self.group, &e);
                if !self.group.leads() {
                    return Err(e);
                }
                tracing::warn!("the weights are saved, but the evaluation failed: {e}");
                return Ok(self.finished(None, Ending::Unevaluated { interrupted: false }));
            }
        }
        let (report, ending) = ended(self.evaluate()).unwrap_or_else(|e| {
            tracing::warn!("the weights are saved, but the evaluation failed: {e}");
            (None, Ending::Unevaluated { interrupted: false })
        });
        Ok(self.finished(report, ending))
    }

    /// Trains the remaining stages and saves the weights. If the run is interrupted, returns the checkpoint that was saved.
    fn train_and_save(&mut self, from: Option<&Path>) -> Result<Option<PathBuf>> {
        if let Some(folder) = from {
            self.take_up(folder)?;
        }
        let saved = self.train(from)?;
        if saved.is_none() {
            self.save_weights()?;
        }
        Ok(saved)
    }

    /// Takes over the progress of a checkpoint; fails if its data or its text tokenizer differ from the run's.
    fn take_up(&mut self, folder: &Path) -> Result<()> {
        let now = std::mem::replace(&mut self.progress, checkpoints::progress(folder)?);
        checkpoint::check_data(folder, &self.progress.data, &now.data)?;
        self.progress.history.check_text(&now.history.text, &self.cfg, folder)?;
        tracing::info!(
            "resuming from {}: stage {}, {} steps done",
            folder.display(),
            self.progress.stage_name,
            self.progress.step
        );
        Ok(())
    }

    /// Trains the only stage without saving its weights.
    pub fn measure(mut self) -> Result<Measured> {
        self.saves = false;
        let trained = self.train(None);
        trained.inspect_err(|e| report(&self.group, e))?;
        let (recompute, communication) = (self.model.cfg.train.recompute, self.communication);
        Ok(Measured { recompute, profiles: self.profiles, communication, replayed: self.replayed })
    }

    /// Trains the remaining stages. If the run is interrupted, returns the checkpoint that was saved.
    fn train(&mut self, mut from: Option<&Path>) -> Result<Option<PathBuf>> {
        let mut metrics = match self.group.leads() {
            true => Lines::resume(&self.out.join(METRICS), self.progress.metrics)?,
            false => Lines::nowhere(),
        };
        for (number, stage) in self.cfg.stage.clone().iter().enumerate().skip(self.progress.stage) {
            let name = stage.kind.name();
            self.model.cfg.train.recompute = self.recompute(number)?;
            let data = self.cfg.data_of(stage);
            let before = if from.is_some() { self.progress.step } else { 0 };
            // What was measured until now belongs to no stage.
            self.model.params.device().profile()?;
            let trained = Running::begin(
                Inputs {
                    all: &self.cfg,
                    data: self.sets.train(&data)?,
                    test: self.sets.test(&data),
                    template: &self.template,
                    out: &self.out,
                    quiet: self.quiet,
                    saves: self.saves,
                    evaluation: self.evaluation,
                    group: &self.group,
                },
                stage,
                number,
                &mut self.model,
                &mut self.progress,
                &mut metrics,
                from.take(),
            )
            .map_err(|e| e.at(name, None))
            .and_then(Running::train);
            // Before it is explained, which may take long.
            let trained =
                trained.inspect_err(|e| report(&self.group, e)).map_err(|e| self.explain(number, e));
            let Trained { saved, communication, replayed } = trained?;
            (self.communication, self.replayed) = (communication, replayed);
            // Without the first step of the stage.
            self.measured(name, self.progress.step.saturating_sub(before.max(1)))?;
            if saved.is_some() {
                return Ok(saved);
            }
        }
        self.model.params.train(&[])?;
        metrics.sync()?;
        Ok(None)
    }

    /// The bytes that a plan may fill, and the devices it is for: all that was free but a twentieth, since blocks of different
    /// sizes leave gaps.
    fn budget(&self) -> Option<(u64, Devices)> {
        let target = self.model.params.device().target()?;
        Some((self.memory? / 20 * 19, Devices { target, ranks: self.group.ranks() }))
    }

    /// What the backward pass of a stage recomputes.
    fn recompute(&self, number: usize) -> Result<Recompute> {
        let (cfg, set) = (&self.cfg, self.cfg.train.recompute);
        let (Recompute::Auto, Some((bytes, devices))) = (set, self.budget()) else { return Ok(set) };
        let stage = &cfg.stage[number];
        let (what, peak) = choose_recompute(cfg, &cfg.stage[..number], stage, devices, bytes)?;
        if what != Recompute::None {
            let (name, peak, free) = (stage.kind.name(), size(peak), size(bytes));
            tracing::info!(
                "stage {name}: train.recompute = {:?}, planned to take {peak} of {free}",
                what.name()
            );
        }
        Ok(what)
    }

    /// Adds to the error of a device what to do about it: the batches for which the memory is enough, and the checkpoint
    /// from which the run can be resumed.
    fn explain(&self, number: usize, e: Error) -> Error {
        let Error::Stage { stage, step, source, mut remedy } = e else { return e };
        if let (Error::OutOfMemory { .. }, Some((bytes, devices))) = (&*source, self.budget()) {
            let (cfg, chosen) = (&self.cfg, self.model.cfg.train.recompute);
            match fitting(cfg, &cfg.stage[..number], &cfg.stage[number], chosen, devices, bytes) {
                Ok(batches) => remedy += &format!("; {batches}"),
                Err(e) => tracing::debug!("no batch is planned: {e}"),
            }
        }
        if let Ok(Some(last)) = Checkpoints::latest(&self.out) {
            remedy += &format!("; the last checkpoint, {}, is complete", last.display());
        }
        Error::Stage { stage, step, source, remedy }
    }

    /// Writes the trained weights, and the averages of the groups that have them.
    fn save_weights(&self) -> Result<()> {
        let (params, history) = (&self.model.params, &self.progress.history);
        self.group.enter(Phase::Busy, "the end of the training");
        if !self.group.leads() {
            attend(entries(params, Stored::Ema, ""))?;
            return attend(entries(params, Stored::Master, ""));
        }
        let explain = |e| Checkpoints::new(&self.out, 1).explain(e);
        if (0..params.groups().len()).any(|g| params.ema(g).is_some()) {
            save_weights(params, &self.out.join(EMA), Stored::Ema).map_err(explain)?;
        }
        // Written last: this file marks the run as trained, and later failures lose nothing.
        save_weights_of(params, &self.out.join(WEIGHTS), Stored::Master, history).map_err(explain)
    }

    /// Evaluates the model of a run whose training is complete.
    pub fn only_evaluate(mut self) -> Result<Finished> {
        let (report, ending) = ended(self.evaluate())?;
        Ok(self.finished(report, ending))
    }

    /// Parts from the other ranks: rank 0 gets the whole model, and needs them no more. All leave before any of them ends, so
    /// that none can disturb its evaluation.
    fn part(&mut self) -> Result<()> {
        self.model.params.unshare()?;
        self.model.params.device().disconnect()?;
        self.group.agree("the end of the training", "")?;
        self.group.leave();
        Ok(())
    }

    /// The end of a rank that leaves the evaluation to rank 0.
    pub fn nothing_left(self) -> Finished {
        self.finished(None, Ending::Whole)
    }

    /// Plots the losses and evaluates the trained model; `None` without held-out data.
    fn evaluate(&mut self) -> Result<Option<Report>> {
        interrupt::enter(interrupt::Phase::Closing);
        plots::plot(&self.out.join(METRICS), &self.out);
        let Some(test) = self.sets.test(&self.cfg.data) else { return Ok(None) };
        interrupt::check()?;
        tracing::info!("evaluating on held-out pictures of {}", test.root.display());
        let report = self.evaluation.closing(&mut self.model, test, &self.template, &self.out)?;
        self.measured("evaluation", 0)?;
        Ok(Some(report))
    }

    /// Keeps what the device has measured since the last time as a part of the run, and writes all parts into the run
    /// folder.
    fn measured(&mut self, part: &str, steps: usize) -> Result<()> {
        let dev = self.model.params.device();
        let Some(profile) = dev.profile()?.filter(|_| self.group.leads()) else { return Ok(()) };
        self.profiles.add(part, steps, profile);
        let text = self.profiles.json(&dev.name())?;
        files::replace(&self.out.join(PROFILE), |f| f.put(text.as_bytes()))?;
        Ok(())
    }

    fn finished(self, report: Option<Report>, ending: Ending) -> Finished {
        let (seconds, profiles) = (self.progress.seconds, self.profiles);
        Finished { model: self.model, report, seconds, profiles, ending }
    }
}

/// Tells the other ranks of an error at once: what this rank does before it ends may take long.
pub(super) fn report(group: &Group, e: &Error) {
    if !matches!(e, Error::Rank(_)) && group.failure().is_none() {
        group.fail(&e.to_string());
    }
}

/// The report and ending of a run after its evaluation; an interrupted evaluation is not an error.
fn ended(evaluated: Result<Option<Report>>) -> Result<(Option<Report>, Ending)> {
    match evaluated {
        Ok(report) => Ok((report, Ending::Whole)),
        Err(Error::Interrupted) => Ok((None, Ending::Unevaluated { interrupted: true })),
        Err(e) => Err(e),
    }
}
