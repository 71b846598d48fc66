//! Uses a trained model: parses the command line and calls the library.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use ett::backend;
use ett::data::{Image, grid, save_png};
use ett::error::{Error, Result};
use ett::infer::{Sampling, Trained};
use indicatif::ProgressBar;

/// Use a model trained by ett-train: reconstruct, describe, question and draw pictures.
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
    /// Draw pictures; write them as a sheet with a row a prompt.
    Generate {
        #[command(flatten)]
        model: Model,
        /// What to draw.
        #[arg(required_unless_present = "file")]
        prompts: Vec<String>,
        /// File with more prompts, one a line.
        #[arg(long = "prompts", value_name = "FILE")]
        file: Option<PathBuf>,
        /// The PNG to write.
        #[arg(long, default_value = "generated.png")]
        out: PathBuf,
        /// Pictures a prompt.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
        count: u16,
        /// Divides the logits: below 1 the likely becomes likelier, 0 always takes the best code.
        #[arg(long, default_value_t = Sampling::default().temperature)]
        temperature: f64,
        /// Choose among this many of the best codes; 0: all.
        #[arg(long, default_value_t = Sampling::default().top_k)]
        top_k: usize,
        /// Choose among the best codes that together have this probability.
        #[arg(long, default_value_t = Sampling::default().top_p)]
        top_p: f64,
        /// How much the prompt counts: 1 as in training, more overstates it.
        #[arg(long, default_value_t = Sampling::default().guidance)]
        guidance: f64,
        /// Seed of the draws.
        #[arg(long, default_value_t = Sampling::default().seed)]
        seed: u64,
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
        Command::Generate {
            model,
            mut prompts,
            file,
            out,
            count,
            temperature,
            top_k,
            top_p,
            guidance,
            seed,
        } => {
            if let Some(path) = file {
                let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
                prompts.extend(text.lines().filter(|l| !l.trim().is_empty()).map(String::from));
                if prompts.is_empty() {
                    return Err(Error::data(&path, "holds no prompt; write one a line"));
                }
            }
            let count = usize::from(count);
            let each: Vec<String> = prompts.iter().flat_map(|p| vec![p.clone(); count]).collect();
            let sampling = Sampling { temperature, top_k, top_p, seed, guidance };
            let bar = ProgressBar::new(0);
            let images = model.open()?.draw(&each, &sampling, &mut |done, all| {
                bar.set_length(all as u64);
                bar.set_position(done as u64);
            })?;
            bar.finish_and_clear();
            let rows: Vec<Vec<&Image>> = images.chunks(count).map(|row| row.iter().collect()).collect();
            save_png(&out, &grid(&rows, 2)?)?;
            println!("{} pictures: {}", images.len(), out.display());
        }
    }
    Ok(())
}
