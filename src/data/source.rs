//! Where pictures come from. A new source is a file here with a [`DataSource`], and a value of [`Source`].

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::cache::{ImageSet, LoadOptions};
use super::draw::{Drawing, Split};
use super::folder::{FromFolder, Sample};
use super::scenes::FromScenes;
use super::words::FromWords;
use crate::error::Result;

/// Where pictures come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The folders `data.train` and `data.test`.
    Folder,
    /// Built-in pictures of coloured shapes, drawn by the program; `data.size` is 16 or more.
    Scenes,
    /// Built-in pictures of short words, some beside a shape; `data.size` is 48 or more.
    Words,
}

impl Source {
    fn of(self) -> &'static dyn DataSource {
        match self {
            Source::Folder => &FromFolder,
            Source::Scenes => &FromScenes,
            Source::Words => &FromWords,
        }
    }
}

impl std::ops::Deref for Source {
    type Target = dyn DataSource;
    fn deref(&self) -> &Self::Target {
        self.of()
    }
}

/// A part of the data that a configuration names.
#[derive(Debug, Clone)]
pub struct Wanted<'a> {
    /// To train on, or held out.
    pub split: Split,
    /// The folder named for this part; sources that draw their pictures ignore it.
    pub folder: Option<&'a Path>,
    /// How many pictures to draw; sources that read their pictures ignore it.
    pub samples: usize,
    /// How pictures are brought to the size of training and kept.
    pub options: LoadOptions,
}

/// Pictures with captions and questions.
pub struct DataSet {
    /// The folder, or the name of the built-in data.
    pub root: PathBuf,
    /// What is said about the pictures.
    pub samples: Vec<Sample>,
    /// The pictures at training size.
    pub images: ImageSet,
}

/// A kind of place that pictures come from.
pub trait DataSource: Sync {
    /// Its name in configurations.
    fn name(&self) -> &'static str;

    /// The smallest side of the pictures that it draws; `None` if it reads pictures, which may have any size.
    fn smallest_drawn(&self) -> Option<usize>;

    /// Whether there is anything to open.
    fn has(&self, part: &Wanted) -> bool {
        match self.smallest_drawn() {
            None => part.folder.is_some_and(|f| !f.as_os_str().is_empty()),
            Some(_) => part.samples > 0,
        }
    }

    /// Opens a part that [`DataSource::has`] something in.
    fn open(&self, part: &Wanted) -> Result<DataSet>;
}

/// Seed of the built-in pictures: they are the same whatever a run's seed.
pub(super) const DRAWN: u64 = 1;

impl DataSet {
    /// The pictures that a built-in source draws.
    pub(super) fn drawn(
        name: &str,
        part: &Wanted,
        draw: impl Fn(usize) -> Drawing + Sync,
    ) -> Result<DataSet> {
        let root = PathBuf::from(name);
        let (samples, images) =
            ImageSet::draw(&root, part.samples.min(part.options.most), part.options.clone(), draw)?;
        Ok(DataSet { root, samples, images })
    }
}
