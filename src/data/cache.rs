//! The pictures of a data set at training size, held in memory up to a limit.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rayon::prelude::*;
use serde::Serialize;

use super::bitmap::Bitmap;
use super::fit::{Crop, Fitted, Frames};
use super::image::Image;
use super::sample::Sample;
use super::source::Pictures;
use crate::error::{Error, Result};
use crate::rng::Philox;

/// Pictures that are decoded when a data set is opened.
const TRIED: usize = 256;
const NAMED: usize = 5;
const PATIENCE: Duration = Duration::from_secs(60);

/// How pictures are brought to the training size.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadOptions {
    /// The sizes of the pictures.
    pub frames: Frames,
    /// Which part of a picture is used.
    pub crop: Crop,
    /// Mirrors a random half of the pictures left to right.
    pub flip: bool,
    /// Limit of the memory for pictures, in bytes; the remaining pictures are decoded again at each use.
    pub memory: u64,
    /// How many pictures will be used: the first usable ones. These are decoded when the set is opened; without a limit,
    /// 256 of them, spread over the set.
    pub most: Option<usize>,
    /// How long a folder that cannot be reached is waited for, such as one on a network after a lost connection.
    pub patience: Duration,
}

impl LoadOptions {
    /// Central squares of `size` pixels, not mirrored; all of them, up to 4 GiB in memory, with a minute of
    /// patience.
    pub fn new(size: usize) -> Self {
        LoadOptions {
            frames: Frames::square(size),
            crop: Crop::Centre,
            flip: false,
            memory: 4 << 30,
            most: None,
            patience: PATIENCE,
        }
    }
}

/// Files and lines that could not be used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// How many.
    pub count: usize,
    /// The first five in the order of the data set, each with its reason.
    pub first: Vec<(PathBuf, String)>,
}

impl Skipped {
    /// Counts one more.
    pub fn add(&mut self, path: &Path, why: impl Into<String>) {
        self.count += 1;
        if self.first.len() < NAMED {
            self.first.push((path.into(), why.into()));
        }
    }

    /// Adds those of another part of the data.
    pub fn join(&mut self, other: Skipped) {
        self.count += other.count;
        self.first.extend(other.first);
        self.first.truncate(NAMED);
    }

    /// The first ones with their reasons, and how many more there are.
    pub fn names(&self) -> String {
        let mut all: Vec<String> =
            self.first.iter().map(|(path, why)| format!("{}: {why}", path.display())).collect();
        let more = self.count - self.first.len();
        if more > 0 {
            all.push(format!("and {more} more"));
        }
        all.join("; ")
    }
}

/// A picture returned by [`ImageSet::take`].
#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    /// Index of the sample in its data set.
    pub sample: usize,
    /// The picture.
    pub image: Image,
}

/// The pictures of a data set at training size, three bytes per pixel.
///
/// Pictures are decoded when they are first used, and kept until the memory limit is reached; those after that are
/// decoded at each use. What is kept has no influence on the values. A picture that cannot be used is counted, and the
/// next usable one takes its place.
#[derive(Debug)]
pub struct ImageSet {
    root: PathBuf,
    options: LoadOptions,
    samples: Arc<Vec<Sample>>,
    pictures: Box<dyn Pictures>,
    /// One for each sample, unless the pictures are in memory anyway.
    kept: Vec<OnceLock<Fitted>>,
    bytes: AtomicU64,
    bad: Mutex<BTreeMap<usize, (PathBuf, String)>>,
    /// The samples of each source.
    parts: Vec<Range<usize>>,
    /// How many have a picture that was not found unusable when the set was opened.
    usable: usize,
}

impl ImageSet {
    /// The pictures of `samples`, which are named by them in messages. Some are decoded now, on all cores (see
    /// [`LoadOptions::most`]): if more than half of these cannot be used, an error about `root` is returned. `parts` are the
    /// samples of each source; one source whose pictures cannot be used is an error, too.
    pub fn new(
        root: &Path,
        samples: Arc<Vec<Sample>>,
        pictures: Box<dyn Pictures>,
        parts: Vec<Range<usize>>,
        options: LoadOptions,
    ) -> Result<Self> {
        let n = samples.len();
        let usable = samples.iter().filter(|s| s.has_picture()).count();
        if options.frames.sizes().iter().any(|&(h, w)| h == 0 || w == 0) {
            return Err(Error::arg("ImageSet::new", "frames", "a side of 0", "at least 1"));
        }
        let keeps = options.memory > 0 && !pictures.in_memory();
        let kept = if keeps { (0..n).map(|_| OnceLock::new()).collect() } else { Vec::new() };
        let mut set = ImageSet {
            root: root.into(),
            options,
            samples,
            pictures,
            kept,
            bytes: AtomicU64::new(0),
            bad: Mutex::default(),
            parts,
            usable,
        };
        if !set.pictures.in_memory() {
            set.attempt()?;
        }
        Ok(set)
    }

    /// Decodes the pictures that are decoded when the set is opened.
    fn attempt(&mut self) -> Result<()> {
        match self.options.most {
            None => {
                for part in self.parts.clone() {
                    let pictured: Vec<usize> =
                        part.clone().filter(|&i| self.samples[i].has_picture()).collect();
                    let (n, tried) = (pictured.len(), pictured.len().min(TRIED));
                    let spread: Vec<usize> = (0..tried).map(|i| pictured[i * n / tried]).collect();
                    self.usable -= self.decode_all(&spread);
                    self.check(&part, tried)?;
                }
                Ok(())
            }
            Some(most) => {
                let all = self.in_turn();
                let (mut tried, mut bad) = (0, 0);
                while tried < all.len() && tried - bad < most {
                    let more = &all[tried..all.len().min(tried + (most - (tried - bad)).min(TRIED))];
                    bad += self.decode_all(more);
                    tried += more.len();
                }
                self.usable -= bad;
                self.check(&(0..self.len()), tried)
            }
        }
    }

    /// Decodes pictures on all cores, to keep them; returns how many cannot be used.
    fn decode_all(&self, samples: &[usize]) -> usize {
        let failed = samples.par_iter().filter(|&&sample| match self.fitted(sample, |_| ()) {
            Ok(()) => false,
            Err(e) => {
                self.note(sample, &e);
                true
            }
        });
        failed.count()
    }

    /// The number of pictures.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Bytes of pictures that are kept.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The number of samples with a picture that was not found unusable when the set was opened.
    pub fn usable(&self) -> usize {
        self.usable
    }

    /// Pictures skipped so far.
    pub fn skipped(&self) -> Skipped {
        self.skipped_of(0..self.len())
    }

    fn skipped_of(&self, part: Range<usize>) -> Skipped {
        let bad = self.bad.lock().unwrap_or_else(PoisonError::into_inner);
        let these = || bad.range(part.clone()).map(|(_, named)| named);
        Skipped { count: these().count(), first: these().take(NAMED).cloned().collect() }
    }

    /// The first usable picture of `indices` and its index, cropped and mirrored with random numbers from `rng`.
    pub fn first(
        &self,
        indices: impl IntoIterator<Item = usize>,
        rng: &mut Philox,
    ) -> Result<(usize, Bitmap)> {
        self.find(&mut indices.into_iter(), rng)?.ok_or_else(|| {
            let what = "none of the requested pictures can be used; put them back or correct the folder";
            Error::data(&self.root, what)
        })
    }

    /// Picture `index`; `None` if it cannot be used.
    pub fn one(&self, index: usize, rng: &mut Philox) -> Result<Option<Bitmap>> {
        Ok(self.find(&mut std::iter::once(index), rng)?.map(|(_, bitmap)| bitmap))
    }

    /// The first `n` usable pictures, of each source in turn, each once, or all of them if there are fewer.
    pub fn take(&self, n: usize, rng: &mut Philox) -> Result<Vec<Drawn>> {
        let (mut left, mut all) = (self.in_turn().into_iter(), Vec::new());
        while all.len() < n {
            let Some((sample, bitmap)) = self.find(&mut left, rng)? else { break };
            all.push(Drawn { sample, image: Image::from(&bitmap) });
        }
        Ok(all)
    }

    fn find(
        &self,
        indices: &mut dyn Iterator<Item = usize>,
        rng: &mut Philox,
    ) -> Result<Option<(usize, Bitmap)>> {
        let LoadOptions { crop, flip, .. } = self.options;
        for index in indices {
            if index >= self.len() {
                let want = format!("below {}", self.len());
                return Err(Error::arg("ImageSet::first", "index", index, want));
            }
            match self.fitted(index, |fitted| fitted.cut(crop, flip, rng)) {
                Ok(bitmap) => return Ok(Some((index, bitmap))),
                Err(e) => {
                    if self.note(index, &e) {
                        let name = &self.samples[index].image;
                        tracing::warn!("{}: skipped: {}", name.display(), e.reason(name));
                    }
                    let part = self.parts.iter().find(|part| part.contains(&index)).cloned();
                    let part = part.unwrap_or(0..self.len());
                    self.check(&part, part.len())?;
                }
            }
        }
        Ok(None)
    }

    /// Passes a picture that covers its size to `use_it`.
    fn fitted<T>(&self, sample: usize, use_it: impl FnOnce(&Fitted) -> T) -> Result<T> {
        if let Some(fitted) = self.kept.get(sample).and_then(OnceLock::get) {
            return Ok(use_it(fitted));
        }
        let LoadOptions { frames, crop, memory, .. } = &self.options;
        let fitted = Fitted::new(self.decode(sample, frames.shorter())?, frames, *crop)?;
        let result = use_it(&fitted);
        if let Some(slot) = self.kept.get(sample) {
            let bytes = fitted.bytes();
            let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
            // Another thread may have decoded the same picture meanwhile.
            if before + bytes > *memory || slot.set(fitted).is_err() {
                self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            }
        }
        Ok(result)
    }

    /// Decodes a picture. Waits for a while if its data set cannot be reached.
    fn decode(&self, sample: usize, shorter: usize) -> Result<Bitmap> {
        match self.pictures.decode(sample, shorter) {
            Err(Error::Io { .. }) if self.waited_for(sample) => self.pictures.decode(sample, shorter),
            result => result,
        }
    }

    /// Waits until the folder of a picture can be reached, if it cannot be now. Returns whether it had to wait.
    fn waited_for(&self, sample: usize) -> bool {
        let Some(folder) = self.pictures.folder(sample) else { return false };
        let reachable = || std::fs::metadata(folder).is_ok();
        if reachable() {
            return false;
        }
        let (patience, since) = (self.options.patience, Instant::now());
        let seconds = patience.as_secs();
        tracing::warn!("{}: cannot be reached now; waiting for up to {seconds} s", folder.display());
        let mut pause = Duration::from_millis(50);
        while since.elapsed() < patience && !reachable() {
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_secs(2));
        }
        true
    }

    /// Counts a picture that cannot be used. Returns whether it is new and among the first ones.
    fn note(&self, sample: usize, e: &Error) -> bool {
        let name = &self.samples[sample].image;
        let mut bad = self.bad.lock().unwrap_or_else(PoisonError::into_inner);
        let new = bad.insert(sample, (name.clone(), e.reason(name))).is_none();
        new && bad.len() <= NAMED
    }

    /// The samples with pictures, one of each source in turn.
    fn in_turn(&self) -> Vec<usize> {
        let longest = self.parts.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
        let rounds = (0..longest).flat_map(|k| self.parts.iter().filter_map(move |part| part.clone().nth(k)));
        rounds.filter(|&i| self.samples[i].has_picture()).collect()
    }

    /// Fails if more than half of `of` pictures of a source cannot be used.
    fn check(&self, part: &Range<usize>, of: usize) -> Result<()> {
        let skipped = self.skipped_of(part.clone());
        if 2 * skipped.count <= of {
            return Ok(());
        }
        let what = format!(
            "{} of {of} pictures cannot be used, more than half; replace or remove them: {}",
            skipped.count,
            skipped.names()
        );
        Err(Error::data(&self.root, what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::fit::fit;
    use crate::data::folder::{Files, Folder};
    use crate::data::save_png;
    use crate::data::scratch::Scratch;

    /// Writes `n` pictures of different sizes; the files listed in `broken` are not pictures.
    fn folder(dir: &Scratch, n: usize, broken: &[usize]) -> Folder {
        for i in 0..n {
            let name = format!("{i:03}.png");
            if broken.contains(&i) {
                dir.write(&name, b"broken");
            } else {
                let (h, w) = (8 + i % 3, 8 + i % 5);
                let rgb: Vec<u8> = (0..h * w * 3).map(|k| (k * 31 + i * 7) as u8).collect();
                save_png(dir.path(&name), &Image::from_u8(h, w, &rgb).unwrap()).unwrap();
            }
        }
        Folder::open(dir.root()).unwrap()
    }

    fn load(folder: &Folder, options: LoadOptions) -> Result<ImageSet> {
        let pictures = Box::new(Files::new(&folder.root, &folder.samples));
        let parts = std::iter::once(0..folder.samples.len()).collect();
        ImageSet::new(&folder.root, Arc::new(folder.samples.clone()), pictures, parts, options)
    }

    /// Picture `index`, or the next usable one.
    fn get(set: &ImageSet, index: usize, rng: &mut Philox) -> Result<(usize, Bitmap)> {
        set.first((index..set.len()).chain(0..index), rng)
    }

    fn options(crop: Crop, memory: u64) -> LoadOptions {
        LoadOptions { crop, flip: crop == Crop::Random, memory, ..LoadOptions::new(8) }
    }

    #[test]
    fn memory_and_disk_give_the_same_pictures() {
        let dir = Scratch::new("cache");
        let folder = folder(&dir, 12, &[]);
        for crop in [Crop::Centre, Crop::Random] {
            let kept = load(&folder, options(crop, u64::MAX)).unwrap();
            let some = load(&folder, options(crop, 900)).unwrap();
            let none = load(&folder, options(crop, 0)).unwrap();
            for i in 0..12 {
                let draw = |set: &ImageSet| get(set, i, &mut Philox::new(9, i as u64)).unwrap();
                let (sample, bitmap) = draw(&kept);
                assert_eq!((sample, bitmap.height, bitmap.width), (i, 8, 8));
                for set in [&kept, &some, &none] {
                    assert_eq!(draw(set), (sample, bitmap.clone()));
                }
            }
            assert!(kept.bytes() >= 12 * 192);
            assert!((1..=900).contains(&some.bytes()), "{}", some.bytes());
            assert_eq!(none.bytes(), 0);
        }
    }

    #[test]
    fn pictures_are_those_of_fit() {
        let dir = Scratch::new("cache-fit");
        let folder = folder(&dir, 6, &[]);
        let set = load(&folder, options(Crop::Random, u64::MAX)).unwrap();
        for i in 0..6 {
            let whole = Image::open(&folder.samples[i].image).unwrap();
            let want = fit(&whole, 8, Crop::Random, true, &mut Philox::new(2, i as u64)).unwrap();
            assert_eq!(get(&set, i, &mut Philox::new(2, i as u64)).unwrap().1, Bitmap::from(&want));
        }
        assert!(set.first([6], &mut Philox::new(0, 0)).is_err());
    }

    #[test]
    fn a_large_set_is_not_decoded_before_it_is_used() {
        let dir = Scratch::new("cache-large");
        let folder = folder(&dir, 1, &[]);
        let samples = vec![folder.samples[0].clone(); 5000];
        let pictures = Files::new(dir.root(), &samples);
        let set = {
            let parts = std::iter::once(0..samples.len()).collect();
            ImageSet::new(
                dir.root(),
                Arc::new(samples),
                Box::new(pictures),
                parts,
                options(Crop::Centre, u64::MAX),
            )
        };
        let set = set.unwrap();
        assert_eq!((set.len(), set.bytes()), (5000, 256 * 192));
        get(&set, 1, &mut Philox::new(0, 0)).unwrap();
        assert_eq!(set.bytes(), 257 * 192);
    }

    #[test]
    fn broken_pictures_are_skipped_counted_and_named() {
        let dir = Scratch::new("cache-broken");
        let folder = folder(&dir, 14, &[0, 2, 3, 5, 7, 13]);
        for memory in [u64::MAX, 0] {
            let set = load(&folder, options(Crop::Centre, memory)).unwrap();
            assert_eq!((set.len(), set.usable()), (14, 8));
            assert_eq!((set.skipped().count, set.skipped().first.len()), (6, 5));
            let (path, why) = &set.skipped().first[1];
            assert_eq!(path, &folder.samples[2].image);
            assert_eq!(why, "this is not a PNG, JPEG, WebP or GIF picture");
            let drawn: Vec<usize> =
                (0..14).map(|i| get(&set, i, &mut Philox::new(0, 0)).unwrap().0).collect();
            assert_eq!(drawn, [1, 1, 4, 4, 4, 6, 6, 8, 8, 9, 10, 11, 12, 1]);
            assert_eq!(set.skipped().count, 6);
        }
    }

    #[test]
    fn the_first_usable_pictures_are_taken() {
        let dir = Scratch::new("cache-most");
        let folder = folder(&dir, 12, &[0, 2, 3, 9]);
        for memory in [u64::MAX, 0] {
            let set = load(&folder, options(Crop::Centre, memory)).unwrap();
            let taken = |n| -> Vec<usize> {
                set.take(n, &mut Philox::new(0, 0)).unwrap().iter().map(|d| d.sample).collect()
            };
            assert_eq!(taken(4), [1, 4, 5, 6]);
            assert_eq!(taken(99), [1, 4, 5, 6, 7, 8, 10, 11]);
            assert_eq!((taken(0).len(), set.skipped().count), (0, 4));
        }
    }

    #[test]
    fn a_folder_that_comes_back_is_waited_for() {
        let dir = Scratch::new("cache-away");
        let folder = folder(&dir, 4, &[2]);
        let set = load(&folder, options(Crop::Centre, 0)).unwrap();
        let want = get(&set, 1, &mut Philox::new(0, 0)).unwrap();
        let away = dir.root().with_extension("away");
        std::fs::rename(dir.root(), &away).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(300));
                std::fs::rename(&away, dir.root()).unwrap();
            });
            assert_eq!(get(&set, 1, &mut Philox::new(0, 0)).unwrap(), want);
        });
        assert_eq!(set.skipped().count, 1);
    }

    #[cfg(unix)]
    #[test]
    fn whatever_stands_where_a_picture_should_is_skipped() {
        let dir = Scratch::new("cache-odd");
        save_png(dir.path("a.png"), &Image::filled(8, 8, 0.0)).unwrap();
        std::fs::copy(dir.path("a.png"), dir.path("b.png")).unwrap();
        std::fs::copy(dir.path("a.png"), dir.path("c.jfif")).unwrap();
        std::fs::copy(dir.path("a.png"), dir.path("d.bmp")).unwrap();
        std::os::unix::fs::symlink("nowhere.png", dir.path("dangling.png")).unwrap();
        std::os::unix::fs::symlink("itself.png", dir.path("itself.png")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", dir.path("zero.png")).unwrap();
        dir.write("empty.png", b"");
        let folder = Folder::open(dir.root()).unwrap();
        let set = load(&folder, LoadOptions::new(8)).unwrap();
        assert_eq!((folder.samples.len(), set.usable(), set.skipped().count), (8, 4, 4));
        let names = set.skipped().names();
        for want in
            ["dangling.png: No such file", "itself.png: ", "zero.png: this is a device", "empty.png: "]
        {
            assert!(names.contains(want), "{names}");
        }
        let line = |name: &str| serde_json::json!({ "file_name": name }).to_string();
        let long = "x".repeat(5000);
        let lines = ["a.png", "missing.png", &long, "b.png", "c.jfif", "a.png", "sub", "d.bmp"].map(line);
        dir.write("sub/metadata.jsonl", b"");
        dir.write("metadata.jsonl", lines.join("\n").as_bytes());
        let folder = Folder::open(dir.root()).unwrap();
        let set = load(&folder, LoadOptions::new(8)).unwrap();
        assert_eq!((folder.samples.len(), set.usable(), set.skipped().count), (8, 5, 3));
        let names = set.skipped().names();
        assert!(
            names.contains("missing.png: No such file") && names.contains("sub: this is a folder"),
            "{names}"
        );
    }

    #[test]
    fn more_than_half_broken_is_an_error() {
        let dir = Scratch::new("cache-half");
        let folder = folder(&dir, 5, &[0, 1, 4]);
        let e = load(&folder, options(Crop::Centre, u64::MAX)).unwrap_err().to_string();
        assert!(e.contains("3 of 5 pictures cannot be used, more than half; replace or remove them"), "{e}");
        assert!(e.contains("000.png: this is not a PNG"), "{e}");
    }
}
