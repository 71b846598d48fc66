//! `ett data`: looks at sources of data, measures them and converts them.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, Subcommand, ValueEnum};
use ett::config::{Config, DataConfig};
use ett::data::{Columns, Encode, Format, Framing, Listed, Source, Split, speed, write_folder, write_shards};
use ett::error::{Error, Result};
use ett::exchange::load_config;
use ett::feed::{DataSet, Template};
use ett::files;
use ett::report::Survey;
use ett::terminal::Output;
use indicatif::{ProgressBar, ProgressStyle};

/// What to look at.
#[derive(Args)]
pub struct Which {
    /// Folder, file or pattern of files with pictures, or the name of built-in data (scenes, words, mixed).
    #[arg(required_unless_present = "config")]
    path: Option<PathBuf>,
    /// How to read it: folder, webdataset, parquet, llava, coco, vector; by default the program looks at it.
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
    /// Folder that the names of pictures in a file are relative to; default: the file's own.
    #[arg(long, value_name = "FOLDER")]
    images: Option<PathBuf>,
    /// Column of pictures in a table.
    #[arg(long, value_name = "COLUMN")]
    image_column: Option<String>,
    /// Column of captions in a table; may be repeated.
    #[arg(long = "caption-column", value_name = "COLUMN")]
    captions: Vec<String>,
    /// Use the data of this configuration, with all of its settings.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["path", "source", "images", "image_column", "captions"])]
    config: Option<PathBuf>,
    /// The part of the data.
    #[arg(long, value_enum, default_value_t = Part::Train)]
    split: Part,
    /// Side of the pictures in pixels. Default: 256, or the configuration's.
    #[arg(long, allow_negative_numbers = true)]
    size: Option<usize>,
    /// Keep the aspect ratio as far as there is a bucket for it, as data.framing = "buckets".
    #[arg(long)]
    buckets: bool,
    /// A tokenizer.json; without one every byte is a token.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Part {
    Train,
    Test,
}

/// A format of pictures.
#[derive(Clone, Copy, ValueEnum)]
pub enum As {
    Png,
    #[value(alias = "jpeg")]
    Jpg,
    Webp,
}

impl From<As> for Format {
    fn from(format: As) -> Self {
        match format {
            As::Png => Format::Png,
            As::Jpg => Format::Jpeg,
            As::Webp => Format::WebP,
        }
    }
}

#[derive(Subcommand)]
pub enum Command {
    /// Show what a source holds, and the first samples as a model will see them.
    ///
    /// Prints counts and lengths of texts, then each of the first samples with its sequences: supervised parts stand in
    /// [[ ]]. Writes their pictures, numbered, into one PNG.
    Inspect {
        #[command(flatten)]
        which: Which,
        /// Samples to show.
        #[arg(long, default_value_t = 16, allow_negative_numbers = true)]
        samples: usize,
        /// Output picture (.png).
        #[arg(long, default_value = "inspect.png")]
        out: PathBuf,
    },
    /// Write data as WebDataset shards, or as a folder.
    ///
    /// Pictures in files are copied byte for byte, others are written as PNG. Pictures that cannot be used are left out.
    Convert {
        #[command(flatten)]
        which: Which,
        /// New or empty folder for the shards or pictures.
        #[arg(long, value_name = "FOLDER")]
        out: PathBuf,
        /// Write pictures and a metadata.jsonl into the folder instead of shards.
        #[arg(long)]
        folder: bool,
        /// Samples in a shard.
        #[arg(long, default_value_t = 1000, allow_negative_numbers = true)]
        per_shard: usize,
        /// Names of the shards are PREFIX-000000.tar and so on. Default: train or test, the part of the data.
        #[arg(long)]
        prefix: Option<String>,
        /// Encode all pictures anew in this format.
        #[arg(long, value_enum, value_name = "FORMAT")]
        encode: Option<As>,
    },
    /// Measure how fast pictures are read, decoded and brought to the size of training.
    Speed {
        #[command(flatten)]
        which: Which,
        /// Threads; 0: one per core.
        #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
        threads: usize,
        /// Maximum number of pictures.
        #[arg(long, default_value_t = 20_000, allow_negative_numbers = true)]
        samples: usize,
    },
}

/// The data of a command line, and the side of the square that a token stands for.
struct Chosen {
    data: DataConfig,
    split: Split,
    side: usize,
    template: Template,
}

impl Which {
    fn choose(&self) -> Result<Chosen> {
        let mut cfg = match &self.config {
            Some(path) => load_config(path, &[])?,
            None => Config { data: self.data()?, ..Config::default() },
        };
        let split = match self.split {
            Part::Train => Split::Train,
            Part::Test => Split::Test,
        };
        let data = &mut cfg.data;
        if let Some(size) = self.size {
            data.size = size;
        }
        if self.buckets {
            data.framing = Framing::Buckets;
        }
        if self.tokenizer.is_some() {
            data.tokenizer.clone_from(&self.tokenizer);
        }
        let side = cfg.tokenizer.downsampling();
        if cfg.data.size == 0 || !cfg.data.size.is_multiple_of(side) {
            let want = format!("a multiple of {side}, the side in pixels of a visual token");
            return Err(Error::config("size", cfg.data.size, want));
        }
        let template = Template::of_data(&cfg.data)?;
        Ok(Chosen { data: cfg.data, split, side, template })
    }

    /// `[data]` for the path on the command line.
    fn data(&self) -> Result<DataConfig> {
        let path = self.path.as_deref().unwrap_or(Path::new(""));
        let built_in = |s: &&Source| s.smallest_drawn().is_some() && Path::new(s.name()) == path;
        let source = match (&self.source, Source::ALL.iter().find(built_in)) {
            (Some(name), _) => Source::named(name)?,
            (None, Some(built_in)) => *built_in,
            (None, None) => Source::guess(path)?,
        };
        let columns = Columns {
            image: self.image_column.clone(),
            captions: (!self.captions.is_empty()).then(|| self.captions.clone()),
            ..Columns::default()
        };
        Ok(DataConfig {
            source,
            train: path.into(),
            test: Some(path.into()),
            images: self.images.clone(),
            columns,
            size: 256,
            ..DataConfig::default()
        })
    }
}

/// The only source of the data.
fn listed(data: &DataConfig, split: Split) -> Result<Listed> {
    let mut all = DataSet::required(data, split)?;
    match all.len() {
        1 => Ok(all.remove(0).0),
        n => {
            let want = "one source; name it instead of the configuration of a mixture";
            Err(Error::config("data.mix", format!("{n} sources"), want))
        }
    }
}

fn bar(n: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:32} {pos:>7}/{len} {elapsed} (left {eta})");
    ProgressBar::new(n as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

pub fn run(command: Command, say: &mut Output) -> Result<()> {
    match command {
        Command::Inspect { which, samples, out } => {
            if !out.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("png")) {
                return Err(Error::data(&out, "the picture is written as PNG; use a name that ends in .png"));
            }
            files::probe(&out)?;
            let Chosen { data, split, side, template } = which.choose()?;
            let survey = Survey::new(&data, split, &template, side, samples)?;
            say.put(&survey.text());
            if survey.draw(&out)? > 0 {
                say.line(format!("\npictures as a model sees them: {}", out.display()));
            }
        }
        Command::Convert { which, out, folder, per_shard, prefix, encode } => {
            let encode = encode.map_or(Encode::Source, |format| Encode::As(format.into()));
            let Chosen { data, split, .. } = which.choose()?;
            let prefix = prefix.unwrap_or(if split == Split::Train { "train" } else { "test" }.into());
            let listed = listed(&data, split)?;
            let bar = bar(listed.samples.len());
            let mut progress = |done: usize, _: usize| {
                bar.set_position(done as u64);
                Ok(())
            };
            let done = match folder {
                true => write_folder(&listed, &out, encode, &mut progress)?,
                false => write_shards(&listed, &out, &prefix, per_shard, encode, &mut progress)?,
            };
            bar.finish_and_clear();
            let what = if folder { "pictures" } else { "shards" };
            let mib = done.bytes >> 20;
            say.line(format!(
                "{} samples in {} {what}, {mib} MiB: {}",
                done.samples,
                done.files,
                out.display()
            ));
            if done.skipped.count > 0 {
                say.line(format!("{} samples are left out: {}", done.skipped.count, done.skipped.names()));
            }
        }
        Command::Speed { which, threads, samples } => {
            let Chosen { data, split, side, .. } = which.choose()?;
            let clock = Instant::now();
            let listed = listed(&data, split)?;
            let opened = clock.elapsed().as_secs_f64();
            say.line(format!("opened {} samples in {opened:.2} s", listed.samples.len()));
            let threads = match threads {
                0 => std::thread::available_parallelism().map_or(1, usize::from),
                n => n,
            };
            let bar = bar(samples.min(listed.samples.len()));
            let measured = speed(&listed, &data.options(split, side), threads, samples, &mut |n| {
                bar.set_position(n as u64)
            })?;
            bar.finish_and_clear();
            say.put(&measured.text());
        }
    }
    Ok(())
}
