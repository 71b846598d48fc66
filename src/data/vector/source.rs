//! Vector graphics as a source of data.

use std::path::Path;

use super::super::bitmap::Bitmap;
use super::super::cache::Skipped;
use super::super::sample::{Chat, Sample};
use super::super::source::{DataSource, Listed, Pictures, Wanted};
use super::{Drawings, Origin, Picture};
use crate::error::{Error, Result};

/// Pictures of a file of vector graphics.
pub(in super::super) struct FromVector;

impl DataSource for FromVector {
    fn name(&self) -> &'static str {
        "vector"
    }

    fn says_where(&self) -> bool {
        true
    }

    fn open(&self, part: &Wanted) -> Result<Listed> {
        let mut drawings = Drawings::open(part.path.unwrap_or(Path::new("")))?;
        let numbers = drawings.part(part.split);
        if numbers.is_empty() {
            let what = format!("holds no pictures of the {} part", part.split.name());
            return Err(Error::data(&drawings.path, what));
        }
        let samples = numbers.iter().map(|&i| {
            let image = drawings.name(i);
            // Moved, not copied: drawing needs no texts.
            let Picture { captions, prompt, questions, .. } = &mut drawings.contents.pictures[i];
            let questions = std::mem::take(questions).into_iter();
            Sample {
                image,
                captions: std::mem::take(captions),
                prompt: prompt.take(),
                chats: questions.map(|(question, answer)| Chat::of(question, answer)).collect(),
                scene: None,
            }
        });
        let samples = samples.collect();
        Ok(Listed {
            root: drawings.path.clone(),
            samples,
            about: about(&drawings),
            pictures: Box::new(Drawn { drawings, numbers }),
            ignored: Skipped::default(),
        })
    }
}

/// How the file was made, and its sources with their licences.
fn about(drawings: &Drawings) -> Vec<(String, String)> {
    let manifest = drawings.manifest();
    let made = ("made by".to_string(), manifest.made.clone());
    let origins = manifest.origins.iter().map(|origin| {
        let Origin { name, what, package, version, licence, author, used, .. } = origin;
        (name.clone(), format!("{used} {what}; {licence}; {author}; {package} {version}"))
    });
    std::iter::once(made).chain(origins).collect()
}

/// The pictures of a part.
#[derive(Debug)]
struct Drawn {
    drawings: Drawings,
    /// The numbers of its pictures in the file.
    numbers: Vec<usize>,
}

impl Pictures for Drawn {
    fn decode(&self, sample: usize, shorter: usize) -> Result<Bitmap> {
        self.drawings.draw_shorter(self.numbers[sample], shorter)
    }
}
