//! Sources of pictures. A new source is a file in this folder with a [`DataSource`], and a value of [`Source`].

use std::fmt::Debug;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::bitmap::Bitmap;
use super::cache::Skipped;
use super::coco::FromCoco;
use super::draw::{Drawing, Split};
use super::folder::FromFolder;
use super::guess;
use super::llava::FromLlava;
use super::mixed::FromMixed;
use super::parquet::FromParquet;
use super::sample::Sample;
use super::scenes::FromScenes;
use super::vector::FromVector;
use super::webdataset::FromWebDataset;
use super::words::FromWords;
use crate::error::{Error, Result};

/// The source of the pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The folders `data.train` and `data.test`.
    Folder,
    /// The tar shards that `data.train` and `data.test` name, such as `shards/train-{000..015}.tar`.
    WebDataset,
    /// Tables in Parquet files, with pictures in a column as Hugging Face stores them.
    Parquet,
    /// Conversations in a JSON file of the form of LLaVA, whose pictures are beside it or in `data.images`.
    Llava,
    /// The captions of a COCO file, whose pictures are beside it or in `data.images`.
    Coco,
    /// Vector graphics, drawn at the size of training: the files `data.train` and `data.test`, which may be the same, since
    /// a file holds both parts; `examples/fetch-icons.sh` makes one.
    Vector,
    /// Built-in pictures of coloured shapes, drawn by the program; `data.size` is 16 or more.
    Scenes,
    /// Built-in pictures of short words, some beside a shape; `data.size` is 48 or more.
    Words,
    /// Both kinds of built-in pictures in turn; `data.size` is 48 or more.
    Mixed,
}

impl Source {
    /// All of them.
    pub const ALL: [Source; 9] = [
        Source::Folder,
        Source::WebDataset,
        Source::Parquet,
        Source::Llava,
        Source::Coco,
        Source::Vector,
        Source::Scenes,
        Source::Words,
        Source::Mixed,
    ];

    /// The source that reads `path`, by its content: the kinds of files in a folder, the ending of a file, the first keys
    /// of JSON.
    pub fn guess(path: &Path) -> Result<Source> {
        Self::named(guess::name(path)?)
    }

    /// The source with this name in configurations.
    pub fn named(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|s| s.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(|s| s.name()).join(", ");
            Error::config("data.source", name, format!("one of {names}"))
        })
    }

    fn of(self) -> &'static dyn DataSource {
        match self {
            Source::Folder => &FromFolder,
            Source::Parquet => &FromParquet,
            Source::Llava => &FromLlava,
            Source::Coco => &FromCoco,
            Source::Scenes => &FromScenes,
            Source::Words => &FromWords,
            Source::Mixed => &FromMixed,
            Source::Vector => &FromVector,
            Source::WebDataset => &FromWebDataset,
        }
    }
}

impl std::ops::Deref for Source {
    type Target = dyn DataSource;
    fn deref(&self) -> &Self::Target {
        self.of()
    }
}

/// `[data.columns]`: the columns of a table that hold pictures and texts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Columns {
    /// The column of the pictures; if omitted, the one that the file declares as pictures, or the first that exists of
    /// `image`, `jpg`, `png`, `jpeg`, `webp` and `images`.
    pub image: Option<String>,
    /// The columns of captions; if omitted, those of `text`, `caption` and `captions` that exist.
    pub captions: Option<Vec<String>>,
    /// The column of what to draw; if omitted, `prompt` if it exists.
    pub prompt: Option<String>,
    /// The column of questions; if omitted, `question` if it exists.
    pub question: Option<String>,
    /// The column of answers; if omitted, `answer` if it exists.
    pub answer: Option<String>,
    /// The column of conversations; if omitted, the first that exists of `conversations`, `messages` and `texts`.
    pub conversations: Option<String>,
}

/// A part of the data, as requested by a configuration.
#[derive(Debug, Clone)]
pub struct Wanted<'a> {
    /// The training part or the held-out part.
    pub split: Split,
    /// The folder or files of this part; ignored by sources that generate their pictures.
    pub path: Option<&'a Path>,
    /// The folder that the names of pictures in `path` are relative to, if it is not that of `path`.
    pub images: Option<&'a Path>,
    /// The columns of tables.
    pub columns: &'a Columns,
    /// Number of pictures to generate; ignored by sources that read their pictures.
    pub samples: usize,
    /// Side of the generated pictures, in pixels.
    pub size: usize,
}

/// The samples of a source and its pictures, before any picture is decoded.
#[derive(Debug)]
pub struct Listed {
    /// The folder or file, or the name of the built-in data.
    pub root: PathBuf,
    /// The texts of the pictures.
    pub samples: Vec<Sample>,
    /// Their pictures, in the same order.
    pub pictures: Box<dyn Pictures>,
    /// Entries that are not part of the data set, with the reasons.
    pub ignored: Skipped,
    /// What the source says about itself, such as licences: pairs of a name and a text.
    pub about: Vec<(String, String)>,
}

/// The pictures of a data set.
pub trait Pictures: Debug + Send + Sync {
    /// Decodes picture `sample`. If its shorter side is larger than `shorter`, it may be decoded at a reduced size that
    /// is not below it. The result is the same at each call.
    fn decode(&self, sample: usize, shorter: usize) -> Result<Bitmap>;

    /// Whether the pictures are in memory already, so that nobody needs to keep them.
    fn in_memory(&self) -> bool {
        false
    }

    /// The bytes of the file that holds picture `sample`, if there is such a file and it can be read.
    fn encoded(&self, _sample: usize) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }

    /// The folder without which the picture cannot be read. While it cannot be reached, readers wait for it.
    fn folder(&self, _sample: usize) -> Option<&Path> {
        None
    }
}

/// A source of pictures.
pub trait DataSource: Sync {
    /// Its name in configurations.
    fn name(&self) -> &'static str;

    /// The smallest side of pictures that the source generates; `None` if it reads pictures, which may have any size.
    fn smallest_drawn(&self) -> Option<usize> {
        None
    }

    /// Whether its texts say where things are, so that mirrored pictures would contradict them.
    fn says_where(&self) -> bool {
        self.smallest_drawn().is_some()
    }

    /// Whether the source has this part.
    fn has(&self, part: &Wanted) -> bool {
        match self.smallest_drawn() {
            None => part.path.is_some_and(|f| !f.as_os_str().is_empty()),
            Some(_) => part.samples > 0,
        }
    }

    /// Lists a part for which [`DataSource::has`] is true.
    fn open(&self, part: &Wanted) -> Result<Listed>;
}

/// Seed of the built-in pictures, which are the same for every seed of a run.
pub(super) const DRAWN: u64 = 1;

/// Pictures in memory.
#[derive(Debug)]
struct InMemory(Vec<Bitmap>);

impl Pictures for InMemory {
    fn decode(&self, sample: usize, _: usize) -> Result<Bitmap> {
        Ok(self.0[sample].clone())
    }

    fn in_memory(&self) -> bool {
        true
    }
}

impl Listed {
    /// The pictures generated by a built-in source, drawn on all cores.
    pub(super) fn drawn(name: &str, part: &Wanted, draw: impl Fn(usize) -> Drawing + Sync) -> Listed {
        let drawn = (0..part.samples).into_par_iter().map(|i| {
            let Drawing { image, sample } = draw(i);
            (sample, Bitmap::from(&image))
        });
        let (samples, bitmaps) = drawn.unzip();
        Listed {
            root: PathBuf::from(name),
            samples,
            pictures: Box::new(InMemory(bitmaps)),
            ignored: Skipped::default(),
            about: Vec::new(),
        }
    }
}
