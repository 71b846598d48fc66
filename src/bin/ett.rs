//! Uses a trained model: parses the command line and calls the library.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use ett::backend;
use ett::data::{Image, grid, save_png};
use ett::error::Result;
use ett::infer::Trained;

/// Use a model trained by ett-train: reconstruct, describe and question pictures.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct Model {
    /// Folder of a finished run.
    #[arg(long)]
    run: PathBuf,
    /// CPU threads; 0: one per core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
}

impl Model {
    fn open(&self) -> Result<Trained> {
        Trained::open(&self.run, backend::open(&self.device, self.threads)?)
    }
}

#[derive(Subcommand)]
enum Command {
    /// Encode and decode pictures; write each beside its reconstruction.
    Reconstruct {
        #[command(flatten)]
        model: Model,
        /// PNG, JPEG or WebP files.
        #[arg(required = true)]
        images: Vec<PathBuf>,
        /// The PNG to write: one row a picture, original left, reconstruction right.
        #[arg(long, default_value = "reconstruction.png")]
        out: PathBuf,
        /// Longest side in pixels; larger pictures are made smaller.
        #[arg(long, default_value_t = 512)]
        max_side: usize,
    },
    /// Describe pictures, one line each.
    Caption {
        #[command(flatten)]
        model: Model,
        /// PNG, JPEG or WebP files.
        #[arg(required = true)]
        images: Vec<PathBuf>,
    },
    /// Answer a question about a picture.
    Ask {
        #[command(flatten)]
        model: Model,
        /// PNG, JPEG or WebP file.
        image: PathBuf,
        /// The question.
        question: String,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Reconstruct { model, images, out, max_side } => {
            let model = model.open()?;
            let pairs = images
                .iter()
                .map(|path| model.reconstruct(&Image::open(path)?, max_side))
                .collect::<Result<Vec<_>>>()?;
            let rows: Vec<Vec<&Image>> = pairs.iter().map(|(a, b)| vec![a, b]).collect();
            save_png(&out, &grid(&rows, 2)?)?;
            println!("{} pictures beside their reconstructions: {}", pairs.len(), out.display());
        }
        Command::Caption { model, images } => {
            let model = model.open()?;
            for path in images {
                println!("{}: {}", path.display(), model.caption(&Image::open(&path)?)?);
            }
        }
        Command::Ask { model, image, question } => {
            println!("{}", model.open()?.ask(&Image::open(&image)?, &question)?);
        }
    }
    Ok(())
}
