//! Trains ETT: parses the command line and calls the library.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, Subcommand};
use ett::backend::{self, Kernels, Target};
use ett::config::{Config, StageConfig, StageKind};
use ett::error::{Error, Result};
use ett::eval::HeldOut;
use ett::exchange::load_config;
use ett::interrupt;
use ett::io::{run_config, written};
use ett::launch::{self, Gpus, Part, Program, Request, Signals};
use ett::ranks::{Group, Place};
use ett::terminal::{self, Output};
use ett::train::{self, Devices, Ending, Finished, RunOptions, Speed};

/// Train ETT (End-to-End Vision Tokenizer Tuning): a vision tokenizer and a language model, with the tokenizer tuned
/// through the language model's loss.
///
/// Without a command, run the demo: all stages on built-in pictures in a few minutes, written to runs/demo.
#[derive(Parser)]
#[command(version, after_help = EXIT)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

const EXIT: &str = "Exit status: 0 success, or interrupted (Ctrl-C, SIGTERM) and saved; 1 failure, with the reason on \
                    standard error; 2 invalid command line; 130 interrupted twice or before the first step, with \
                    nothing saved. With several ranks, that of the first one that failed.";

#[derive(Args)]
struct Common {
    /// auto (a GPU if it has all kernels that the run needs, otherwise the CPU), cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Train on several GPUs of this machine, with one process for each: all, or numbers such as 0,2,3 (docs/ranks.md).
    #[arg(long, conflicts_with = "device", value_name = "LIST")]
    gpus: Option<Gpus>,
    /// Number of processes: with --device cpu, each trains on its part of the cores; with --gpus, on the first of these.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(Request::RANKS))]
    ranks: Option<usize>,
    /// No progress bars.
    #[arg(long)]
    quiet: bool,
    /// Measure the time of every kernel: print a table for each stage after the run, and write profile.json.
    #[arg(long)]
    profile: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Run all stages of a configuration in a new folder.
    Run {
        /// Configuration file (TOML); docs/configuration.md lists the keys.
        #[arg(long)]
        config: PathBuf,
        /// Folder for weights, metrics and pictures; default: the configuration's name under runs/.
        #[arg(long)]
        out: Option<PathBuf>,
        /// Weights of a whole model to start from (safetensors, public names), such as those of another run. Weights of other
        /// programs are named in the configuration (init.llm, init.tokenizer).
        #[arg(long)]
        init: Option<PathBuf>,
        /// Change a configuration value: --set train.seed=2, --set stage.0.steps=100. Paths given here are relative
        /// to the working directory, those in the file to the file's folder.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        set: Vec<String>,
        #[command(flatten)]
        common: Common,
        /// Instead of training, print sizes, memory by role, operations and the largest batch of each stage on
        /// --device; a GPU named there need not be present.
        #[arg(long)]
        plan: bool,
        /// With --plan: memory to fill, such as 80GiB; default: the device's free memory.
        #[arg(long, requires = "plan")]
        memory: Option<String>,
    },
    /// Continue an interrupted run from its last checkpoint; if only the evaluation is left, run it.
    Resume {
        /// The run folder.
        run: PathBuf,
        #[command(flatten)]
        common: Common,
    },
    /// Train a few steps of each stage, without saving anything, and print their speed and memory.
    Speed {
        /// Configuration file (TOML).
        #[arg(long)]
        config: PathBuf,
        /// Only this stage: tokenizer, text, align, semantic, chat or gen.
        #[arg(long)]
        stage: Option<String>,
        /// Steps; the first three are not counted.
        #[arg(long, default_value_t = 20)]
        steps: usize,
        /// Also write the results to this file (JSON).
        #[arg(long, overrides_with = "json")]
        json: Option<PathBuf>,
        /// Measure 1, 2, 4 and so on up to all ranks of --gpus or --ranks, each with the batch of the configuration.
        #[arg(long, conflicts_with = "profile")]
        scaling: bool,
        /// Override a value, such as train.seed=2; may be repeated.
        #[arg(long)]
        set: Vec<String>,
        #[command(flatten)]
        common: Common,
    },
    /// Run one step of a stage on given weights and a given batch, and write all results to a file (docs/check.md).
    Check {
        /// Configuration file (TOML).
        #[arg(long)]
        config: PathBuf,
        /// Weights (safetensors, public names).
        #[arg(long)]
        weights: PathBuf,
        /// Batch (safetensors: input.image, input.text).
        #[arg(long)]
        batch: PathBuf,
        /// The stage: tokenizer, text, align, semantic, chat or gen.
        #[arg(long, default_value = "semantic")]
        stage: String,
        /// Output file for losses, activations, gradients and updated weights (safetensors).
        #[arg(long)]
        dump: PathBuf,
        /// f64, f32 or bf16.
        #[arg(long, default_value = "f64")]
        dtype: String,
        /// cpu, cuda or cuda:N.
        #[arg(long, default_value = "cpu")]
        device: String,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let place = match &cli.command {
        Some(Command::Run { plan: false, .. } | Command::Resume { .. } | Command::Speed { .. }) => {
            Place::from_env(Duration::ZERO)
        }
        _ => Ok(None),
    };
    terminal::log(if matches!(&place, Ok(Some(place)) if place.rank > 0) { "warn" } else { "info" });
    match place.and_then(|place| run(cli.command, place)) {
        Ok(status) => status,
        Err(e) => {
            terminal::complain(&e);
            ExitCode::FAILURE
        }
    }
}

fn run(command: Option<Command>, place: Option<Place>) -> Result<ExitCode> {
    match command {
        None => demo()?,
        Some(Command::Run { config, set, plan: true, memory, common, .. }) => {
            let cfg = load_config(&config, &set)?;
            let memory = memory.map(|text| train::parse_memory(&text)).transpose()?;
            let (device, ranks) = common.request().planned(backend::gpus)?;
            let (target, free) = planned(&device, &cfg, memory.is_none())?;
            let mut out = Output::default();
            out.put(&train::plan(&cfg, Devices { target, ranks }, memory.or(free))?);
            out.finish()?;
        }
        Some(Command::Run { config, out, init, set, common, .. }) => {
            let cfg = load_config(&config, &set)?;
            let name = config
                .file_stem()
                .ok_or_else(|| Error::data(&config, "has no file name to name the run after; give --out"))?;
            let out = out.unwrap_or_else(|| PathBuf::from("runs").join(name));
            return common.start(&cfg, place, true, |rank| {
                let o = RunOptions {
                    out: &out,
                    init: init.as_deref(),
                    quiet: rank.quiet(),
                    evaluation: &HeldOut,
                    group: rank.group.clone(),
                };
                rank.done(&out, &train::run(&cfg, rank.device()?, &o)?);
                Ok(())
            });
        }
        Some(Command::Resume { run, common }) => {
            let cfg = run_config(&run)?;
            return common.start(&cfg, place, true, |rank| {
                rank.done(&run, &train::resume(&run, rank.device()?, rank.quiet(), &HeldOut, &rank.group)?);
                Ok(())
            });
        }
        Some(Command::Speed { config, json, set, common, scaling: true, .. }) => {
            let cfg = load_config(&config, &set)?;
            return common.scaling(&cfg, place, json.as_deref());
        }
        Some(Command::Speed { config, stage, steps, json, set, common, .. }) => {
            let cfg = load_config(&config, &set)?;
            let kind = stage.map(|name| StageKind::named(&name)).transpose()?;
            return common.start(&cfg, place, false, |rank| {
                let all = train::speed(&cfg, &|| rank.device(), kind, steps, &HeldOut, &rank.group)?;
                match rank.group.leads() {
                    true => print_speeds(&all, json.as_deref(), &train::speed_table(&all)),
                    false => Ok(()),
                }
            });
        }
        Some(Command::Check { config, weights, batch, stage, dump, dtype, device }) => {
            let kind = StageKind::named(&stage)?;
            let cfg = load_config(&config, &[format!("train.precision={dtype:?}")])?;
            let dev = backend::open(&device, cfg.train.threads)?;
            train::check(&cfg, kind, dev, &weights, &batch, &dump)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes speeds to a file, if one is named, and prints their table.
fn print_speeds(all: &[Speed], json: Option<&Path>, table: &str) -> Result<()> {
    if let Some(path) = json {
        train::write_speeds(all, path)?;
    }
    let mut out = Output::default();
    out.put(table);
    out.finish()
}

/// Runs all stages on built-in pictures in the next free folder.
fn demo() -> Result<()> {
    let cfg = Config::demo()?;
    let out = free("demo")?;
    let intro = "The demo (configs/demo.toml) trains all stages on built-in pictures, into";
    Output::default().line(format!("{intro} {}.", out.display()));
    interrupt::install()?;
    let o = RunOptions { out: &out, init: None, quiet: false, evaluation: &HeldOut, group: Group::alone() };
    let finished =
        train::choose_device(&cfg).and_then(|(_, dev)| train::run(&cfg, dev, &o)).inspect_err(|_| {
            // Removes the folder only if the run has left it empty.
            let _ = std::fs::remove_dir(&out);
        })?;
    done(&out, &finished);
    Ok(())
}

/// Creates the first of the folders runs/NAME, runs/NAME-2 and so on that does not exist.
fn free(name: &str) -> Result<PathBuf> {
    let runs = Path::new("runs");
    std::fs::create_dir_all(runs).map_err(Error::io(runs))?;
    let mut number = 1;
    loop {
        let out = runs.join(if number == 1 { name.into() } else { format!("{name}-{number}") });
        match std::fs::create_dir(&out) {
            Ok(()) => return Ok(out),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => number += 1,
            Err(e) => return Err(Error::io(&out)(e)),
        }
    }
}

impl Common {
    fn request(&self) -> Request {
        Request { device: self.device.clone(), gpus: self.gpus.clone(), ranks: self.ranks }
    }

    /// Does `work` as the part of this process: alone, as the rank of `place`, or by starting all ranks. If it `saves`, a
    /// signal asks it to do so.
    fn start(
        &self,
        cfg: &Config,
        place: Option<Place>,
        saves: bool,
        work: impl FnOnce(&Rank) -> Result<()>,
    ) -> Result<ExitCode> {
        let place = match self.request().part(place, backend::gpus)? {
            Part::Launcher(ranks) => {
                let signals = Signals::catch()?;
                let status = Program::this(saves)?.launch(ranks, &[], &signals)?;
                return Ok(status.into());
            }
            Part::Rank(place) => {
                Some(Place { stall: Duration::from_secs(cfg.train.stall_s as u64), ..place })
            }
            Part::Alone => None,
        };
        match place {
            _ if !saves => {}
            Some(_) => interrupt::install_in_rank()?,
            None => interrupt::install()?,
        }
        let local = place.as_ref().map(|place| place.local);
        launch::take_part(place, |group| work(&Rank { common: self, cfg, local, group: group.clone() }))
    }

    /// Measures the speed of 1, 2, 4 and so on up to all ranks, one after another.
    fn scaling(&self, cfg: &Config, place: Option<Place>, json: Option<&Path>) -> Result<ExitCode> {
        let Part::Launcher(all) = self.request().part(place, backend::gpus)? else {
            let want = "with --gpus or --ranks that name two ranks or more, and without another launcher";
            return Err(Error::config("--scaling", "given", want));
        };
        let (signals, program) = (Signals::catch()?, Program::this(false)?.silent("--scaling"));
        let file = std::env::temp_dir().join(format!("ett-scaling-{}.json", std::process::id()));
        let mut measured = Vec::new();
        for ranks in train::rank_counts(all) {
            let more = self.measurement(cfg, ranks, all, &file);
            let status = program.launch(ranks, &more, &signals)?;
            let speeds = if status == 0 { train::read_speeds(&file) } else { Ok(vec![]) };
            // There is none if the measurement failed.
            let _ = std::fs::remove_file(&file);
            if status != 0 {
                return Ok(status.into());
            }
            measured.push((ranks, speeds?));
        }
        let all = train::scaled(measured);
        print_speeds(&all, json, &train::scaling_table(&all))?;
        Ok(ExitCode::SUCCESS)
    }

    /// The additional arguments of a measurement of `ranks` of `all` ranks: as many batches of the configuration, and for
    /// each rank as many threads as if all were there.
    fn measurement(&self, cfg: &Config, ranks: usize, all: usize, json: &Path) -> Vec<OsString> {
        let batch = |(i, s): (usize, &StageConfig)| format!("--set=stage.{i}.batch={}", ranks * s.batch);
        let mut more: Vec<OsString> = cfg.stage.iter().enumerate().map(batch).map(OsString::from).collect();
        if self.device == "cpu" && cfg.train.threads == 0 {
            more.push(format!("--set=train.threads={}", (launch::cores() / all).max(1)).into());
        }
        more.extend(["--json".into(), json.into()]);
        more
    }
}

/// A process that trains, with its device and the ranks that train with it.
struct Rank<'a> {
    common: &'a Common,
    cfg: &'a Config,
    /// Its number among the ranks of this machine, if there are several.
    local: Option<usize>,
    group: Arc<Group>,
}

impl Rank<'_> {
    fn device(&self) -> Result<Arc<dyn Kernels>> {
        let threads = launch::threads(self.cfg.train.threads);
        let dev = match &*self.common.request().device(self.local, backend::gpus)? {
            "auto" => train::choose_device(self.cfg)?.1,
            name => backend::open_of(name, threads, &self.group)?,
        };
        if self.common.profile {
            dev.start_profile()?;
        }
        Ok(dev)
    }

    fn quiet(&self) -> bool {
        self.common.quiet || !self.group.leads()
    }

    /// Rank 0 prints how the run ended.
    fn done(&self, out: &Path, finished: &Finished) {
        if self.group.leads() {
            done(out, finished);
        }
    }
}

/// The target of a plan and, if `free`, the free memory of its device. A device given by name need not be present.
fn planned(name: &str, cfg: &Config, free: bool) -> Result<(Target, Option<u64>)> {
    if name == "auto" {
        let (target, dev) = train::choose_device(cfg)?;
        return Ok((target, dev.available()));
    }
    let target = Target::named(name, cfg.train.threads)?;
    if !free {
        return Ok((target, None));
    }
    match backend::open(name, cfg.train.threads) {
        Ok(dev) => Ok((target, dev.available())),
        Err(e) => {
            tracing::info!("the plan leaves out the largest batch; give --memory ({e})");
            Ok((target, None))
        }
    }
}

/// Prints how a run ended. The results are on disk by now, so that failing to print them does no harm.
fn done(out: &Path, finished: &Finished) {
    let mut text = Output::default();
    text.put(&finished.table());
    text.put(&finished.profiles.table());
    let resume = format!("`ett-train resume {}`", out.display());
    match &finished.ending {
        Ending::Saved(at) => {
            text.line(format!("interrupted; saved to {}; go on with {resume}", at.display()));
            return;
        }
        Ending::Unevaluated { interrupted: true } => {
            text.line(format!("interrupted; the weights are trained and saved, {resume} evaluates them"));
        }
        Ending::Unevaluated { interrupted: false } => {
            text.line(format!("the weights are trained and saved, but not evaluated; {resume} tries again"));
        }
        Ending::Whole => {}
    }
    text.line(format!("written to {}:", out.display()));
    for (file, what) in written(out) {
        text.line(format!("  {file:<22} {what}"));
    }
}
