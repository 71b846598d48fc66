//! Vector graphics: a file of drawings that are rendered at the size that training needs.

mod format;
mod source;
mod svg;

use std::path::{Path, PathBuf};

pub use format::{Alphabet, Body, EM, Item, Letter, MAX_CANVAS, Manifest, Origin, Paint, Picture};

pub(super) use source::FromVector;

use super::bitmap::{Bitmap, MAX_SIDE};
use super::draw::Split;
use crate::error::{Error, Result};
use format::Contents;

/// Maximum number of pixels of a drawn picture.
const MAX_PIXELS: usize = 64 << 20;

/// A file of vector graphics, opened.
///
/// Its pictures are described, not stored: icons and words on canvases of any size. Drawing one is a function of the file,
/// its number and the wanted size alone, bit by bit on machines of one kind.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawings {
    path: PathBuf,
    contents: Contents,
}

impl Drawings {
    /// Reads a file into memory. Everything in it is checked except the SVG of its bodies, which is checked when it is
    /// drawn.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let contents = Contents::read(&path)?;
        Ok(Drawings { path, contents })
    }

    /// The contents of a new file; `made` says how they were made. Its errors name what is wrong with them.
    pub fn new(
        made: impl Into<String>,
        origins: Vec<Origin>,
        alphabets: Vec<Alphabet>,
        bodies: Vec<Body>,
        pictures: Vec<Picture>,
    ) -> Result<Self> {
        let contents = Contents::new(made.into(), origins, alphabets, bodies, pictures);
        contents
            .check()
            .map_err(|e| Error::arg("Drawings::new", "contents", e, "contents that can be drawn"))?;
        Ok(Drawings { path: PathBuf::from("new drawings"), contents })
    }

    /// Writes a file: the same bytes for the same contents.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<crate::files::Written> {
        let path = path.as_ref();
        let bytes = self.contents.bytes().map_err(Error::io(path))?;
        crate::files::replace(path, |file| file.put(&bytes))
    }

    /// How the file was made, its sources and their licences.
    pub fn manifest(&self) -> &Manifest {
        &self.contents.manifest
    }

    /// The fonts of its words.
    pub fn alphabets(&self) -> &[Alphabet] {
        &self.contents.alphabets
    }

    /// The pieces of SVG that its pictures are made of.
    pub fn bodies(&self) -> &[Body] {
        &self.contents.bodies
    }

    /// All pictures of both parts.
    pub fn pictures(&self) -> &[Picture] {
        &self.contents.pictures
    }

    /// The numbers of the pictures of a part, in the order of the file.
    pub fn part(&self, split: Split) -> Vec<usize> {
        (0..self.pictures().len()).filter(|&i| self.pictures()[i].split == split).collect()
    }

    /// What messages and results call picture `i`.
    pub fn name(&self, i: usize) -> PathBuf {
        self.path.join(i.to_string())
    }

    /// Draws picture `i` at the size that the file gives.
    pub fn draw(&self, i: usize) -> Result<Bitmap> {
        let [width, height] = self.picture(i)?.size;
        self.draw_as(i, width, height)
    }

    /// Draws picture `i` so that its shorter side has `shorter` pixels and the other one is rounded to the nearest whole
    /// number of pixels. The picture is drawn at this size, not resized. A size over [`MAX_CANVAS`] stands for the one that
    /// the file gives.
    pub fn draw_shorter(&self, i: usize, shorter: usize) -> Result<Bitmap> {
        let [width, height] = self.picture(i)?.size;
        if shorter > MAX_CANVAS {
            return self.draw_as(i, width, height);
        }
        let scale = shorter as f64 / width.min(height) as f64;
        let scaled = |side: usize| (side as f64 * scale).round() as usize;
        self.draw_as(i, scaled(width), scaled(height))
    }

    fn picture(&self, i: usize) -> Result<&Picture> {
        self.pictures().get(i).ok_or_else(|| {
            Error::data(&self.path, format!("there is no picture {i}, it holds {}", self.pictures().len()))
        })
    }

    fn draw_as(&self, i: usize, width: usize, height: usize) -> Result<Bitmap> {
        let side = 1..=MAX_SIDE as usize;
        if !side.contains(&width) || !side.contains(&height) || width * height > MAX_PIXELS {
            let what = format!(
                "cannot be drawn at {width} x {height} pixels; the limits are {MAX_SIDE} pixels per side and \
                 {MAX_PIXELS} in all"
            );
            return Err(Error::data(self.name(i), what));
        }
        let Contents { alphabets, bodies, .. } = &self.contents;
        let rgb = svg::draw(self.picture(i)?, alphabets, bodies, (width, height))
            .map_err(|what| Error::data(self.name(i), what))?;
        Ok(Bitmap { height, width, rgb })
    }
}

#[cfg(test)]
mod tests;
