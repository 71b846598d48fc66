//! WebDataset shards: tar archives whose members with a common key form a sample. docs/data/webdataset.md describes them.

mod group;
mod handles;
mod index;
mod tar;
#[cfg(test)]
mod tests;
mod unpack;
mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use self::handles::Handles;
use self::index::{Index, Listing, Stamp};
use super::bitmap::Bitmap;
use super::cache::Skipped;
use super::cache_folder::cache_folder;
use super::pattern::{self, Kind};
use super::sample::{Chat, Sample};
use super::source::{DataSource, Listed, Pictures, Wanted};
use crate::error::{Error, Result};
use crate::files::parent;

pub(super) use self::write::{END, member};

/// The files of this source.
pub(super) const SHARDS: Kind =
    Kind { noun: "shard", endings: &[".tar", ".tar.gz", ".tgz"], beside: Some(index::ENDING) };

/// Shards as a source of data.
pub(super) struct FromWebDataset;

impl DataSource for FromWebDataset {
    fn name(&self) -> &'static str {
        "webdataset"
    }

    fn open(&self, part: &Wanted) -> Result<Listed> {
        let cache = cache_folder().map(|folder| folder.join("webdataset"));
        open(part.path.unwrap_or(Path::new("")), cache)
    }
}

/// A shard that has been listed.
struct Shard {
    /// The file that holds the pictures: itself, or its unpacked form.
    file: PathBuf,
    index: Index,
    is_new: bool,
}

impl Shard {
    fn open(named: &Path, cache: &Result<PathBuf>) -> Result<Self> {
        let file = match (unpack::is_packed(named), cache) {
            (false, _) => named.into(),
            (true, Ok(cache)) => unpack::unpacked(named, cache, unpack::LIMITS)?,
            (true, Err(e)) => {
                let what = format!("this shard is compressed and has to be unpacked, but {e}");
                return Err(Error::data(named, what));
            }
        };
        let (index, is_new) = Index::open(&file, cache.as_ref().ok().map(PathBuf::as_path))?;
        Ok(Shard { file, index, is_new })
    }
}

/// The pictures of shards.
#[derive(Debug)]
struct Members {
    shards: Handles,
    /// The shards as they were named.
    named: Vec<PathBuf>,
    /// Of each sample.
    places: Vec<Place>,
}

/// Where a picture lies.
#[derive(Debug)]
struct Place {
    shard: u32,
    /// CRC-32 of the header before it.
    header: u32,
    offset: u64,
    bytes: u64,
    /// Its member; empty for a sample without a picture.
    name: Box<str>,
}

impl Members {
    fn bytes(&self, sample: usize) -> Result<(Vec<u8>, PathBuf)> {
        let at = &self.places[sample];
        let shard = &self.named[at.shard as usize];
        if at.name.is_empty() {
            return Err(Error::data(shard, "this sample has no picture"));
        }
        let name = shard.join(&*at.name);
        Ok((self.shards.read(at, &name)?, name))
    }
}

impl Pictures for Members {
    fn decode(&self, sample: usize, shorter: usize) -> Result<Bitmap> {
        let (bytes, name) = self.bytes(sample)?;
        Bitmap::decode(&bytes, &name, shorter)
    }

    fn folder(&self, sample: usize) -> Option<&Path> {
        Some(parent(self.shards.path(self.places[sample].shard as usize)))
    }

    fn encoded(&self, sample: usize) -> Result<Option<Vec<u8>>> {
        self.bytes(sample).map(|(bytes, _)| Some(bytes))
    }
}

/// Lists the shards that `path` names.
fn open(path: &Path, cache: Result<PathBuf>) -> Result<Listed> {
    let mut ignored = Skipped::default();
    let named = pattern::files(path, SHARDS, &mut ignored)?;
    // All of them are tried, so that the error is about the first one of the list.
    let opened: Vec<Result<Shard>> = named.par_iter().map(|shard| Shard::open(shard, &cache)).collect();
    let (mut samples, mut places) = (Vec::new(), Vec::new());
    let (mut shards, mut unknown): (Vec<(PathBuf, Stamp)>, BTreeMap<String, usize>) = Default::default();
    let mut indexed = 0;
    for (at, shard) in named.iter().zip(opened) {
        let Shard { file, index, is_new } = shard?;
        indexed += usize::from(is_new);
        for listing in index.samples {
            let (sample, place) = sample(at, shards.len() as u32, listing);
            places.push(place);
            samples.push(sample);
        }
        let named = |name: String| if name.is_empty() { at.clone() } else { at.join(name) };
        let first = index.first.into_iter().map(|(name, why)| (named(name), why)).collect();
        ignored.join(Skipped { count: index.ignored, first });
        index.unknown.into_iter().for_each(|(kind, n)| *unknown.entry(kind).or_default() += n);
        shards.push((file, index.shard));
    }
    if indexed > 0 {
        tracing::debug!("{}: indexed {indexed} of {} shards", path.display(), shards.len());
    }
    if samples.is_empty() {
        let mut what = format!(
            "there are no samples in {} shards; wanted members such as 000.jpg and 000.txt, one after the other",
            shards.len()
        );
        if ignored.count > 0 {
            what += &format!(": {}", ignored.names());
        }
        return Err(Error::data(path, what));
    }
    let mut about = vec![("shards".to_string(), shards.len().to_string())];
    if !unknown.is_empty() {
        let kinds: Vec<String> = unknown.iter().map(|(kind, n)| format!("{kind} {n}")).collect();
        about.push(("members that are not used".into(), kinds.join(", ")));
    }
    let root = pattern::common(&named);
    let pictures = Box::new(Members { shards: Handles::new(shards), named, places });
    Ok(Listed { root, samples, pictures, ignored, about })
}

/// The sample of a shard, and where its picture lies.
fn sample(shard: &Path, number: u32, listing: Listing) -> (Sample, Place) {
    let Listing { name, offset, bytes, header, captions, prompt, chats } = listing;
    let image = if name.is_empty() { PathBuf::new() } else { shard.join(&name) };
    let chats = chats.into_iter().map(Chat::from).collect();
    let place = Place { shard: number, header, offset, bytes, name: name.into() };
    (Sample { image, captions, prompt, chats, scene: None }, place)
}
