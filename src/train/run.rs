//! A whole run: its preparation, its resumption and its outcome.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::checkpoint;
use super::session::{Session, report};
use crate::backend::Kernels;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::exchange::Start;
use crate::files;
use crate::io::weights::TensorFile;
use crate::io::{
    CONFIG, Checkpoints, Lock, Skill, TOKENIZER, WEIGHTS, config_text, load_weights, mark, refuse_part,
    refuse_used, run_config,
};
use crate::model::Ett;
use crate::ranks::Group;
use crate::report::{Evaluation, Profiles, Report};

/// Options of a run that are not part of its configuration.
#[derive(Clone)]
pub struct RunOptions<'a> {
    /// The run folder.
    pub out: &'a Path,
    /// Weights of a whole model to start from (safetensors, public names), instead of those that `init` names.
    pub init: Option<&'a Path>,
    /// Hides progress bars.
    pub quiet: bool,
    /// Evaluates the model on held-out pictures, during training and at the end.
    pub evaluation: &'a dyn Evaluation,
    /// The ranks that train together, of which the device is one.
    pub group: Arc<Group>,
}

impl<'a> RunOptions<'a> {
    /// A run of one rank, without progress bars.
    pub fn quiet(out: &'a Path, evaluation: &'a dyn Evaluation) -> Self {
        RunOptions { out, init: None, quiet: true, evaluation, group: Group::alone() }
    }
}

/// A run that has ended.
pub struct Finished {
    /// The trained model.
    pub model: Ett,
    /// Held-out results; `None` without held-out data, or if training or the evaluation did not complete.
    pub report: Option<Report>,
    /// Seconds per stage, by name.
    pub seconds: Vec<(String, f64)>,
    /// The time spent in each kernel, by stage; empty unless the device measured it.
    pub profiles: Profiles,
    /// How far the run got.
    pub ending: Ending,
}

/// How far a run got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// It completed.
    Whole,
    /// It was interrupted during training and can be resumed from this checkpoint.
    Saved(PathBuf),
    /// Its weights are trained and saved, but not evaluated: the evaluation was interrupted, or it failed with a
    /// warning.
    Unevaluated {
        /// Whether a signal interrupted the evaluation.
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

/// Runs all stages of `cfg` in a new folder, which is locked against other processes meanwhile. Relative paths in
/// `cfg` are relative to the working directory.
pub fn run(cfg: &Config, dev: Arc<dyn Kernels>, o: &RunOptions) -> Result<Finished> {
    if cfg.stage.is_empty() {
        return Err(Error::config("stage", "none", "at least one [[stage]]"));
    }
    // Taken before the folder is inspected: another run may be starting there at this moment.
    let lock = if o.group.leads() { Some(Lock::take(o.out)?) } else { None };
    match begin(cfg, dev, o) {
        Ok(session) => session.go(None),
        Err(e) => {
            if let Some(lock) = lock {
                lock.abandon();
            }
            Err(e)
        }
    }
}

/// Prepares everything before the first step. The configuration is written last: its presence marks a run that has
/// begun.
fn begin<'a>(cfg: &Config, dev: Arc<dyn Kernels>, o: &RunOptions<'a>) -> Result<Session<'a>> {
    if o.group.leads() {
        refuse_used(o.out)?;
    }
    let mut cfg = cfg.clone();
    cfg.resolve(Path::new(""))?;
    let start = Start::open(&cfg)?;
    if let (Some(path), true) = (o.init, start.has_parts()) {
        let want = "left out, since the configuration names weights in [init]";
        return Err(Error::config("--init", path.display(), want));
    }
    let whole = o.init.map(|path| Ok(TensorFile::open(path)?.tensors())).transpose()?;
    let given = |name: &str| start.gives(name) || whole.as_ref().is_some_and(|held| held.contains_key(name));
    if o.group.ranks() > 1 {
        let paths = [&cfg.data.tokenizer, &cfg.init.llm, &cfg.init.tokenizer, &cfg.lpips.weights];
        let paths = paths.into_iter().flatten().map(PathBuf::as_path).chain(o.init);
        // Hosts may have them at different places.
        let name = |p: &Path| p.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let marks = paths.map(|p| Ok(format!("{}: {}", name(p), mark(p)?))).collect::<Result<Vec<_>>>()?;
        o.group.agree("the start weights", &marks.join("\n"))?;
    }
    let mut session = Session::new(&cfg, dev, o, &given)?;
    fill(&mut session, &start, o).inspect_err(|e| report(&o.group, e))?;
    Ok(session)
}

/// Loads the weights that a run starts from, and writes the first files of its folder.
fn fill(session: &mut Session, start: &Start, o: &RunOptions) -> Result<()> {
    start.load(&mut session.model)?;
    if start.reconstructs() {
        session.progress.history.learnt.insert(Skill::Reconstruct);
    }
    if let Some(path) = o.init {
        load_weights(&session.model.params, path)?;
        session.progress.history.start_from(path)?;
    }
    if !o.group.leads() {
        return Ok(());
    }
    if let Some(bytes) = &session.progress.tokenizer {
        let path = o.out.join(TOKENIZER);
        if std::fs::read(&path).is_ok_and(|there| there != **bytes) {
            let what = "differs from the run's text tokenizer, whose copy is kept there; name another folder \
                        with --out, or remove the file";
            return Err(Error::data(path, what));
        }
        files::replace(&path, |f| f.put(bytes))?;
    }
    let text = config_text(&session.cfg)?;
    files::replace(&o.out.join(CONFIG), |f| f.put(text.as_bytes())).map(drop)
}

/// Resumes an interrupted run from its last checkpoint, with the same bits as without the interruption if the number of
/// ranks is the same. If the weights are trained but not evaluated, only evaluates them. The folder is locked against other
/// processes meanwhile.
pub fn resume(
    out: &Path,
    dev: Arc<dyn Kernels>,
    quiet: bool,
    evaluation: &dyn Evaluation,
    group: &Arc<Group>,
) -> Result<Finished> {
    refuse_part(out)?;
    let cfg = run_config(out)?;
    let leads = group.leads();
    let _lock = if leads { Some(Lock::take(out)?) } else { None };
    if out.join(WEIGHTS).exists() {
        group.agree("what is left to do", "the evaluation")?;
        let session = Session::trained(&cfg, dev.clone(), out, evaluation)?;
        dev.disconnect()?;
        if !leads {
            group.leave();
            return Ok(session.nothing_left());
        }
        return session.only_evaluate();
    }
    if leads {
        Checkpoints::recover(out)?;
    }
    group.agree("what is left to do", "training")?;
    let Some(from) = Checkpoints::latest(out)? else {
        let what = "holds a run that ended before its first checkpoint; remove the folder and start again with \
                    `ett-train run`";
        return Err(Error::data(out, what));
    };
    group.agree("the checkpoint", &from.file_name().unwrap_or_default().to_string_lossy())?;
    checkpoint::check_config(&from, &cfg)?;
    let o = RunOptions { out, init: None, quiet, evaluation, group: group.clone() };
    Session::new(&cfg, dev, &o, &|_| true)?.go(Some(&from))
}
