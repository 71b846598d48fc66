//! Scenes and words in one set of pictures.

use super::draw::{Drawing, Split};
use super::scenes::Scenes;
use super::source::{DRAWN, DataSource, Listed, Wanted};
use super::words::{MIN_SIZE, Words};
use crate::error::Result;

/// Pictures of [`Scenes`] and of [`Words`] in turn.
#[derive(Debug, Clone)]
pub struct Mixed {
    scenes: Scenes,
    words: Words,
}

/// [`Mixed`] as a source of data.
pub(super) struct FromMixed;

impl DataSource for FromMixed {
    fn name(&self) -> &'static str {
        "mixed"
    }

    fn smallest_drawn(&self) -> Option<usize> {
        Some(MIN_SIZE)
    }

    fn open(&self, part: &Wanted) -> Result<Listed> {
        let all = Mixed::new(part.size, DRAWN)?;
        Ok(Listed::drawn(self.name(), part, |i| all.get(part.split, i)))
    }
}

impl Mixed {
    /// Pictures of `size` pixels per side, at least 48.
    pub fn new(size: usize, seed: u64) -> Result<Self> {
        Ok(Mixed { words: Words::new(size, seed)?, scenes: Scenes::new(size, seed)? })
    }

    /// Picture `index` of a part of the data: scenes have even numbers, words odd ones.
    pub fn get(&self, split: Split, index: usize) -> Drawing {
        match index % 2 {
            0 => self.scenes.get(split, index / 2),
            _ => self.words.get(split, index / 2),
        }
    }
}
