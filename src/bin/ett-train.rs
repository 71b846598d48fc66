//! Trains ETT: parses the command line and calls the library.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Parser, Subcommand};
use ett::backend::{self, Cpu, Kernels, Target};
use ett::config::Config;
use ett::error::{Error, Result};
use ett::train::{self, Finished, RunOptions};

/// Train ETT (End-to-End Vision Tokenizer Tuning): a vision tokenizer, a language model, and the training that tunes
/// the one through the other.
///
/// Without a command, the demo: all stages on built-in pictures in a few minutes, into runs/demo.
#[derive(Parser)]
#[command(version, after_help = EXIT)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

const EXIT: &str = "Exit status: 0 done, or interrupted (Ctrl-C, SIGTERM) and saved; 1 failed, with the reason on \
                    standard error; 2 wrong command line; 130 interrupted twice, nothing saved.";

#[derive(Args)]
struct Common {
    /// auto (a GPU if it has all kernels that the run needs, else the CPU), cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
    /// No progress bars.
    #[arg(long)]
    quiet: bool,
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
        /// Weights to start from (safetensors, public names).
        #[arg(long)]
        init: Option<PathBuf>,
        /// Change a configuration value: --set train.seed=2, --set stage.0.steps=100.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        set: Vec<String>,
        #[command(flatten)]
        common: Common,
        /// Print sizes, memory by role, operations and the largest batch of each stage on --device, and train nothing;
        /// a GPU that is named need not be there.
        #[arg(long)]
        plan: bool,
        /// With --plan: memory to fill, such as 80GiB; default: what the device has free.
        #[arg(long, requires = "plan")]
        memory: Option<String>,
        /// Print where the time went, kernel by kernel, after the run (CPU).
        #[arg(long)]
        profile: bool,
    },
    /// Go on with an interrupted run from its last checkpoint.
    Resume {
        /// The run folder.
        run: PathBuf,
        #[command(flatten)]
        common: Common,
    },
    /// Run one semantic-stage step on given weights and a given batch and write everything down (docs/check.md).
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
        /// Where losses, activations, gradients and updated weights go (safetensors).
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
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("ETT_LOG").unwrap_or_else(|_| "info".into()),
        )
        .without_time()
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Option<Command>) -> Result<()> {
    match command {
        None => demo(),
        Some(Command::Run { config, set, plan: true, memory, common, .. }) => {
            let cfg = Config::load(&config, &set)?;
            let memory = memory.map(|text| train::parse_memory(&text)).transpose()?;
            let (target, free) = planned(&common.device, &cfg, memory.is_none())?;
            print!("{}", train::plan(&cfg, target, memory.or(free))?);
            Ok(())
        }
        Some(Command::Run { config, out, init, set, common, profile, .. }) => {
            let cfg = Config::load(&config, &set)?;
            let name = config
                .file_stem()
                .ok_or_else(|| Error::data(&config, "has no file name to call the run by; give --out"))?;
            let out = out.unwrap_or_else(|| PathBuf::from("runs").join(name));
            let o = RunOptions { out: &out, init: init.as_deref(), quiet: common.quiet };
            train::interrupt::install()?;
            if !profile {
                return done(&out, train::run(&cfg, device(&common.device, &cfg)?, &o)?);
            }
            if common.device.starts_with("cuda") {
                return Err(Error::config("--profile", common.device, "the device cpu; use nsys on a GPU"));
            }
            let dev = Arc::new(Cpu::new(cfg.train.threads)?.profiled());
            let finished = train::run(&cfg, dev.clone(), &o)?;
            print!("{}", train::profile_table(&dev));
            done(&out, finished)
        }
        Some(Command::Resume { run, common }) => {
            train::interrupt::install()?;
            let cfg = train::run_config(&run)?;
            done(&run, train::resume(&run, device(&common.device, &cfg)?, common.quiet)?)
        }
        Some(Command::Check { config, weights, batch, dump, dtype, device }) => {
            let cfg = Config::load(&config, &[format!("train.precision={dtype:?}")])?;
            let dev = backend::open(&device, cfg.train.threads)?;
            train::check(&cfg, dev, &weights, &batch, &dump)
        }
    }
}

/// All stages on built-in pictures, in the next free folder.
fn demo() -> Result<()> {
    let cfg = Config::demo()?;
    let names = std::iter::once("demo".to_string()).chain((2..).map(|n| format!("demo-{n}")));
    let mut free = names.map(|name| Path::new("runs").join(name)).skip_while(|p| p.exists());
    let out = free.next().unwrap_or_else(|| unreachable!("there are as many names as numbers"));
    println!("The demo (configs/demo.toml) trains all stages on built-in pictures, into {}.", out.display());
    train::interrupt::install()?;
    let o = RunOptions { out: &out, init: None, quiet: false };
    done(&out, train::run(&cfg, device("auto", &cfg)?, &o)?)
}

fn device(name: &str, cfg: &Config) -> Result<Arc<dyn Kernels>> {
    match name {
        "auto" => Ok(train::choose_device(cfg)?.1),
        name => backend::open(name, cfg.train.threads),
    }
}

/// What to plan for, and, if asked for, the memory that it has free. A device that is named need not be there.
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
            tracing::info!("no largest batch without --memory ({e})");
            Ok((target, None))
        }
    }
}

fn done(out: &Path, finished: Finished) -> Result<()> {
    print!("{}", finished.table());
    match &finished.interrupted {
        Some(at) => println!(
            "interrupted; saved to {}; go on with `ett-train resume {}`",
            at.display(),
            out.display()
        ),
        None => {
            println!("written to {}:", out.display());
            for (file, what) in train::written(out) {
                println!("  {file:<22} {what}");
            }
        }
    }
    Ok(())
}
