//! Uses a trained model, exchanges weights, and looks at data: parses the command line and calls the library.

mod data;
mod weights;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use ett::backend;
use ett::data::{Format, Image, Skipped, grid, pictures, read_text, save, trimmed};
use ett::error::{Error, Result};
use ett::eval::{evaluate_run, psnr, ssim};
use ett::exchange::inspect;
use ett::files;
use ett::infer::{Sampling, Trained};
use ett::io::Skill;
use ett::terminal::{self, Output, one_line, paragraphs};
use indicatif::{ProgressBar, ProgressStyle};

/// Use a model trained by ett-train: reconstruct, describe, ask, draw and evaluate. Import and export weights. Look at data to
/// train on.
#[derive(Parser)]
#[command(
    version,
    after_help = "Exit status: 0 success; 1 failure, with the reason on standard error (with several pictures, after all \
                  others are done); 2 invalid command line."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct Model {
    /// Folder of a run, one of its checkpoints, or an exported model.
    #[arg(long)]
    run: PathBuf,
    /// Use the averages of the tokenizer's weights (only for runs that kept them).
    #[arg(long)]
    ema: bool,
    /// CPU threads; 0: one per core.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    threads: usize,
    /// cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
}

impl Model {
    /// Opens the model and warns if no stage has trained it for `skill`.
    fn open(&self, skill: Option<Skill>) -> Result<Trained> {
        let model = Trained::open(&self.run, backend::open(&self.device, self.threads)?, self.ema)?;
        if let Some(what) = skill.and_then(|skill| model.lacks(skill)) {
            tracing::warn!("{what}");
        }
        Ok(model)
    }
}

#[derive(Subcommand)]
enum Command {
    /// Encode and decode pictures; write originals and reconstructions side by side.
    Reconstruct {
        #[command(flatten)]
        model: Model,
        /// PNG, JPEG, WebP or GIF files, or folders of them.
        #[arg(required = true)]
        images: Vec<PathBuf>,
        /// Output picture (.png, .jpg or .webp), one row per picture: original left, reconstruction right.
        #[arg(long, default_value = "reconstruction.png")]
        out: PathBuf,
        /// Folder for the reconstructions alone, one PNG each.
        #[arg(long, value_name = "FOLDER")]
        each: Option<PathBuf>,
        /// Longest side in pixels; larger pictures are scaled down.
        #[arg(long, default_value_t = 512, allow_negative_numbers = true)]
        max_side: usize,
    },
    /// Describe pictures, one line each.
    Caption {
        #[command(flatten)]
        model: Model,
        /// PNG, JPEG, WebP or GIF files, or folders of them.
        #[arg(required = true)]
        images: Vec<PathBuf>,
    },
    /// Answer a question about a picture.
    Ask {
        #[command(flatten)]
        model: Model,
        /// PNG, JPEG, WebP or GIF file.
        image: PathBuf,
        /// The question.
        question: String,
    },
    /// Draw pictures; write them as a sheet with one row per prompt.
    Generate {
        #[command(flatten)]
        model: Model,
        /// What to draw.
        #[arg(required_unless_present = "file")]
        prompts: Vec<String>,
        /// File with more prompts, one per line.
        #[arg(long = "prompts", value_name = "FILE")]
        file: Option<PathBuf>,
        /// Output picture (.png, .jpg or .webp).
        #[arg(long, default_value = "generated.png")]
        out: PathBuf,
        /// Pictures per prompt.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..), allow_negative_numbers = true)]
        count: u16,
        /// Divisor of the logits: below 1 makes likely codes more likely; 0 always takes the most likely one.
        /// Default: the model's sampling.temperature.
        #[arg(long, allow_negative_numbers = true)]
        temperature: Option<f64>,
        /// Sample from this many of the most likely codes; 0: all.
        /// Default: the model's sampling.top_k.
        #[arg(long, allow_negative_numbers = true)]
        top_k: Option<usize>,
        /// Of those, sample from the most likely that together have this probability.
        /// Default: the model's sampling.top_p.
        #[arg(long, allow_negative_numbers = true)]
        top_p: Option<f64>,
        /// Classifier-free guidance: 1 as in training; higher values exaggerate the prompt.
        /// Default: the model's sampling.guidance.
        #[arg(long, allow_negative_numbers = true)]
        guidance: Option<f64>,
        /// Seed of the random numbers.
        #[arg(long, default_value_t = Sampling::default().seed, allow_negative_numbers = true)]
        seed: u64,
    },
    /// Evaluate on held-out pictures: PSNR, SSIM, LPIPS (or its stand-in), codebook use, captions, answers, codes.
    Eval {
        #[command(flatten)]
        model: Model,
        /// Folder of pictures, or any other data that `ett data inspect` knows; default: the run's held-out ones.
        #[arg(long)]
        data: Option<PathBuf>,
        /// Number of pictures; default: the run's data.eval_samples.
        #[arg(long, allow_negative_numbers = true)]
        samples: Option<usize>,
        /// Folder for eval.json and pictures; default: eval in the run folder.
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Bring weights of other programs into the form that a configuration names (init.llm, init.tokenizer, lpips.weights).
    Import(weights::Import),
    /// Write a trained model, or a part of it, for others.
    #[command(subcommand)]
    Export(weights::Export),
    /// Show the contents of a run, a checkpoint or any file or folder of weights, and what they become here.
    Inspect {
        /// Folder or file.
        path: PathBuf,
        /// List every tensor with its shape, type and checksum.
        #[arg(long)]
        tensors: bool,
    },
    /// Look at data to train on, measure how fast it is read, convert it.
    #[command(subcommand)]
    Data(data::Command),
}

/// Maximum number of pictures on a sheet.
const SHOWN: usize = 64;

fn main() -> ExitCode {
    let cli = Cli::parse();
    terminal::log("warn");
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            terminal::complain(&e);
            ExitCode::FAILURE
        }
    }
}

/// Fails if a picture could not be written to this path; called before the work starts.
fn writable(out: &Path) -> Result<()> {
    Format::of(out)?;
    files::probe(out)
}

fn run(command: Command) -> Result<()> {
    let mut say = Output::default();
    match command {
        Command::Reconstruct { model, images, out, each, max_side } => {
            writable(&out)?;
            if let Some(folder) = &each {
                std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
            }
            let model = model.open(Some(Skill::Reconstruct))?;
            // Only the pictures on the sheet are kept in memory.
            let mut pairs = Vec::new();
            let done = one_by_one(
                &images,
                |image| model.reconstruct(image, max_side),
                |i, path, (original, rec)| {
                    if let Some(folder) = &each {
                        let name = path.file_stem().unwrap_or_default().to_string_lossy();
                        save(folder.join(format!("{i:05}-{name}.png")), &rec)?;
                    }
                    let (psnr, ssim) = (psnr(&original, &rec), ssim(&original, &rec)?);
                    if pairs.len() < SHOWN {
                        pairs.push((original, rec));
                    }
                    // A failure to print is ignored: the pictures are the result.
                    say.line(format!("{}: PSNR {psnr:.2} dB, SSIM {ssim:.4}", path.display()));
                    Ok(true)
                },
            )?;
            let rows: Vec<Vec<&Image>> = pairs.iter().map(|(a, b)| vec![a, b]).collect();
            if !rows.is_empty() {
                save(&out, &grid(&rows, 2)?)?;
                say.line(format!(
                    "{} of {} pictures beside their reconstructions: {}",
                    rows.len(),
                    done.pictures,
                    out.display()
                ));
            }
            done.complain(&images)?;
        }
        Command::Eval { model, data, samples, out } => {
            let out = out.unwrap_or_else(|| model.run.join("eval"));
            let mut trained = model.open(None)?;
            for (name, value) in evaluate_run(&mut trained, data.as_deref(), samples, &out)?.rows() {
                say.line(format!("  {name:<46} {value}"));
            }
            say.line(format!("written to {}", out.display()));
        }
        Command::Import(import) => import.run(&mut say)?,
        Command::Export(export) => export.run(&mut say)?,
        Command::Inspect { path, tensors } => {
            say.put(&inspect(&path, tensors)?);
        }
        Command::Data(command) => data::run(command, &mut say)?,
        Command::Caption { model, images } => {
            let model = model.open(Some(Skill::Caption))?;
            let done = one_by_one(
                &images,
                |image| model.caption(image),
                |_, path, caption| Ok(say.line(format!("{}: {}", path.display(), one_line(&caption)))),
            )?;
            done.complain(&images)?;
        }
        Command::Ask { model, image, question } => {
            say.line(paragraphs(&model.open(Some(Skill::Answer))?.ask(&Image::open(&image)?, &question)?));
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
            writable(&out)?;
            let chosen = |model: Sampling| Sampling {
                temperature: temperature.unwrap_or(model.temperature),
                top_k: top_k.unwrap_or(model.top_k),
                top_p: top_p.unwrap_or(model.top_p),
                seed,
                guidance: guidance.unwrap_or(model.guidance),
            };
            // Wrong options are reported before the model is loaded.
            chosen(Sampling::default()).check()?;
            if let Some(path) = file {
                let text = read_text(&path)?;
                prompts.extend(text.lines().filter(|l| !trimmed(l).is_empty()).map(String::from));
                if prompts.is_empty() {
                    return Err(Error::data(&path, "holds no prompt; write one per line"));
                }
            }
            let count = usize::from(count);
            let each: Vec<String> = prompts.iter().flat_map(|p| vec![p.clone(); count]).collect();
            let bar = ProgressBar::new(0);
            let model = model.open(Some(Skill::Draw))?;
            let images = model.draw(&each, &chosen(model.sampling()), &mut |done, all| {
                bar.set_length(all as u64);
                bar.set_position(done as u64);
            })?;
            bar.finish_and_clear();
            // A single picture is written without a margin, so that it can be passed to other commands.
            let sheet = match &images[..] {
                [one] => one.clone(),
                all => grid(&all.chunks(count).map(|row| row.iter().collect()).collect::<Vec<_>>(), 2)?,
            };
            save(&out, &sheet)?;
            say.line(format!("{} pictures: {}", images.len(), out.display()));
        }
    }
    say.finish()
}

/// Number of pictures of a command line, and those that were skipped.
struct Done {
    pictures: usize,
    skipped: Skipped,
}

impl Done {
    /// Fails if some pictures could not be used.
    fn complain(self, given: &[PathBuf]) -> Result<()> {
        match (self.skipped.count, given.first()) {
            (0, _) | (_, None) => Ok(()),
            (n, Some(first)) => {
                let what =
                    format!("{n} of {} pictures cannot be used: {}", self.pictures, self.skipped.names());
                Err(Error::data(first, what))
            }
        }
    }
}

/// Decodes the pictures of files and folders one by one, applies `model` to each and passes the outcome to `put`,
/// which returns whether to continue. Pictures that cannot be used are skipped.
fn one_by_one<T>(
    given: &[PathBuf],
    model: impl Fn(&Image) -> Result<T>,
    mut put: impl FnMut(usize, &Path, T) -> Result<bool>,
) -> Result<Done> {
    let paths = pictures(given)?;
    let mut done = Done { pictures: paths.len(), skipped: Skipped::default() };
    let style = ProgressStyle::with_template("{bar:32} {pos:>5}/{len} {elapsed} (left {eta})");
    let bar = ProgressBar::new(paths.len() as u64)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    for (i, path) in paths.iter().enumerate() {
        match Image::open(path).and_then(|image| model(&image)) {
            Ok(outcome) => {
                if !bar.suspend(|| put(i, path, outcome))? {
                    break;
                }
            }
            // Errors of the picture, not of the model.
            Err(e @ (Error::Data { .. } | Error::Io { .. } | Error::Argument { arg: "image", .. })) => {
                done.skipped.add(path, e.reason(path));
            }
            Err(e) => return Err(e),
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(done)
}
