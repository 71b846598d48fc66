//! Trains ETT: parses the command line and calls the library.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, Subcommand};
use ett::backend::{self, Cpu};
use ett::config::Config;
use ett::error::{Error, Result};
use ett::train;

/// Train ETT (End-to-End Vision Tokenizer Tuning): tokenizer, text, alignment, semantic and chat stages.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run all stages of a configuration.
    Run {
        /// Configuration file (TOML).
        #[arg(long)]
        config: PathBuf,
        /// Folder for weights, metrics and pictures; default: the configuration's name under runs/.
        #[arg(long)]
        out: Option<PathBuf>,
        /// Weights to start from (safetensors).
        #[arg(long)]
        init: Option<PathBuf>,
        /// Change a configuration value: --set train.seed=2.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        set: Vec<String>,
        /// Print sizes, memory by role and operations of one step of each stage, and train nothing.
        #[arg(long)]
        plan: bool,
        /// cpu, cuda or cuda:N.
        #[arg(long, default_value = "cpu")]
        device: String,
        /// No progress bars.
        #[arg(long)]
        quiet: bool,
        /// Print where the time went, kernel by kernel, after the run.
        #[arg(long)]
        profile: bool,
    },
    /// Run one semantic-stage step on given weights and a given batch and write everything down.
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

fn run(command: Command) -> Result<()> {
    match command {
        Command::Run { config, set, plan: true, .. } => {
            print!("{}", train::plan(&Config::load(&config, &set)?)?);
            Ok(())
        }
        Command::Run { config, out, init, set, quiet, profile, device, .. } => {
            let cfg = Config::load(&config, &set)?;
            let name = config
                .file_stem()
                .ok_or_else(|| Error::data(&config, "has no file name to call the run by; give --out"))?;
            let out = out.unwrap_or_else(|| PathBuf::from("runs").join(name));
            let done = if profile {
                if device != "cpu" {
                    return Err(Error::config("--profile", device, "the device cpu; use nsys on a GPU"));
                }
                let dev = Arc::new(Cpu::new(cfg.train.threads)?.profiled());
                let done = train::run(&cfg, dev.clone(), &out, init.as_deref(), quiet)?;
                print!("{}", train::profile_table(&dev));
                done
            } else {
                train::run(&cfg, backend::open(&device, cfg.train.threads)?, &out, init.as_deref(), quiet)?
            };
            print!("{}", done.table());
            println!("written to {}", out.display());
            Ok(())
        }
        Command::Check { config, weights, batch, dump, dtype, device } => {
            let cfg = Config::load(&config, &[format!("train.precision={dtype:?}")])?;
            let dev = backend::open(&device, cfg.train.threads)?;
            train::check(&cfg, dev, &weights, &batch, &dump)
        }
    }
}
