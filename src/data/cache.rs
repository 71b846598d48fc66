//! The pictures of a data set at training size, held in memory up to a limit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rayon::prelude::*;
use serde::Serialize;

use super::draw::Drawing;
use super::folder::Sample;
use super::image::{Crop, Image, cut, fit_shorter};
use crate::error::{Error, Result};
use crate::rng::Philox;

/// Pictures decoded between two checks of the memory in use.
const CHUNK: usize = 256;
const NAMED: usize = 5;
/// Time between two progress messages while loading.
const TOLD: Duration = Duration::from_secs(5);

/// How pictures are brought to the training size.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadOptions {
    /// Side of the square pictures, in pixels.
    pub size: usize,
    /// Which square is cropped.
    pub crop: Crop,
    /// Mirrors a random half of the pictures left to right.
    pub flip: bool,
    /// Limit of the memory for pictures, in bytes; the remaining pictures are decoded again at each use.
    pub memory: u64,
    /// Maximum number of pictures: the first usable ones are taken.
    pub most: usize,
}

impl LoadOptions {
    /// Central squares of `size` pixels, not mirrored; all pictures, up to 4 GiB of them in memory.
    pub fn new(size: usize) -> Self {
        LoadOptions { size, crop: Crop::Centre, flip: false, memory: 4 << 30, most: usize::MAX }
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

/// A picture returned by [`ImageSet::get`].
#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    /// Index of the sample in its data set.
    pub sample: usize,
    /// The picture, `size` x `size`.
    pub image: Image,
}

/// The pictures of a data set at training size, three bytes per pixel.
///
/// Unusable pictures are left out. A picture has the same values whether it is held in memory or decoded at each use.
#[derive(Debug)]
pub struct ImageSet {
    root: PathBuf,
    options: LoadOptions,
    entries: Vec<Entry>,
    /// Samples examined so far.
    total: usize,
    bytes: u64,
    bad: Mutex<BTreeMap<usize, (PathBuf, String)>>,
}

#[derive(Debug)]
struct Entry {
    sample: usize,
    picture: Picture,
}

#[derive(Debug)]
enum Picture {
    Kept(Small),
    OnDisk(PathBuf),
}

/// A picture whose shorter side has the training size; already cropped to the square if the crop is fixed.
#[derive(Debug)]
struct Small {
    height: u32,
    width: u32,
    rgb: Box<[u8]>,
}

impl ImageSet {
    /// Decodes the pictures of `samples` on all cores, in their order, until the memory limit is reached; the
    /// pictures after that are decoded when they are requested. Unusable pictures are skipped and counted; if they
    /// are more than half, an error about `root` is returned.
    pub fn load(root: &Path, samples: &[Sample], options: LoadOptions) -> Result<Self> {
        let mut entries = Vec::new();
        let mut bad = BTreeMap::new();
        let (mut bytes, mut full) = (0, options.memory == 0);
        if options.size == 0 {
            return Err(Error::arg("ImageSet::load", "size", options.size, "at least 1"));
        }
        let (mut total, mut told) = (0, Instant::now());
        while total < samples.len() && entries.len() < options.most {
            // Pictures left on disk take no memory, and the number of usable ones among them is not known yet.
            let chunk = match full {
                true => total..samples.len(),
                false => total..samples.len().min(total + CHUNK.min(options.most - entries.len())),
            };
            total = chunk.end;
            if full {
                entries.extend(
                    chunk.map(|sample| Entry {
                        sample,
                        picture: Picture::OnDisk(samples[sample].image.clone()),
                    }),
                );
                continue;
            }
            let decoded: Vec<Result<Small>> = chunk
                .clone()
                .into_par_iter()
                .map(|i| Small::open(&samples[i].image, options.size, options.crop))
                .collect();
            for (sample, small) in chunk.zip(decoded) {
                let path = &samples[sample].image;
                match small {
                    Ok(small) => {
                        // After the first picture that does not fit, decoding the others now would be wasted.
                        full |= bytes + small.rgb.len() as u64 > options.memory;
                        let picture = match full {
                            true => Picture::OnDisk(path.clone()),
                            false => Picture::Kept(small),
                        };
                        bytes += picture.bytes();
                        entries.push(Entry { sample, picture });
                    }
                    Err(e) => {
                        bad.insert(sample, (path.clone(), e.reason(path)));
                    }
                }
            }
            if told.elapsed() > TOLD {
                told = Instant::now();
                tracing::info!("{}: {total} of {} pictures are loaded", root.display(), samples.len());
            }
        }
        let root = root.to_path_buf();
        let set = ImageSet { root, options, entries, total, bytes, bad: Mutex::new(bad) };
        set.check()?;
        Ok(set)
    }

    /// Generates pictures `0..n` on all cores, keeps all of them in memory, and returns them with their samples.
    /// Messages use `name` in place of a folder.
    pub fn draw(
        name: &Path,
        n: usize,
        options: LoadOptions,
        draw: impl Fn(usize) -> Drawing + Sync,
    ) -> Result<(Vec<Sample>, Self)> {
        let drawn: Vec<(Sample, Entry)> = (0..n)
            .into_par_iter()
            .map(|i| {
                let Drawing { image, sample } = draw(i);
                let small = Small::new(image, options.size, options.crop)?;
                Ok((sample, Entry { sample: i, picture: Picture::Kept(small) }))
            })
            .collect::<Result<_>>()?;
        let (samples, entries): (Vec<_>, Vec<Entry>) = drawn.into_iter().unzip();
        let bytes = entries.iter().map(|e| e.picture.bytes()).sum();
        let root = name.to_path_buf();
        Ok((samples, ImageSet { root, options, entries, total: n, bytes, bad: Mutex::default() }))
    }

    /// The number of pictures.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of pictures in memory.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The number of pictures that are decoded at each use.
    pub fn on_disk(&self) -> usize {
        self.entries.iter().filter(|e| matches!(e.picture, Picture::OnDisk(_))).count()
    }

    /// Index in the data set of picture `index` of this set.
    pub fn sample(&self, index: usize) -> Option<usize> {
        self.entries.get(index).map(|e| e.sample)
    }

    /// Pictures skipped so far: while loading, and since then while decoding at each use.
    pub fn skipped(&self) -> Skipped {
        let bad = self.bad.lock().unwrap_or_else(PoisonError::into_inner);
        Skipped { count: bad.len(), first: bad.values().take(NAMED).cloned().collect() }
    }

    /// Picture `index` of `0..len()`, cropped and mirrored with random numbers from `rng`.
    ///
    /// If the picture has to be decoded now and cannot be, it is counted as skipped and the next usable one takes its
    /// place; [`Drawn::sample`] tells which one was used.
    pub fn get(&self, index: usize, rng: &mut Philox) -> Result<Drawn> {
        let others = (index.saturating_add(1)..self.len()).chain(0..index.min(self.len()));
        self.first(std::iter::once(index).chain(others), rng)
    }

    /// Like [`ImageSet::get`], for the first usable picture of `indices`.
    pub fn first(&self, indices: impl IntoIterator<Item = usize>, rng: &mut Philox) -> Result<Drawn> {
        self.find(&mut indices.into_iter(), rng)?.ok_or_else(|| {
            let what = "none of the requested pictures can be used; put them back or correct the folder";
            Error::data(&self.root, what)
        })
    }

    /// The first `n` usable pictures, each once, or all of them if there are fewer.
    pub fn take(&self, n: usize, rng: &mut Philox) -> Result<Vec<Drawn>> {
        let (mut left, mut all) = (0..self.len(), Vec::new());
        while all.len() < n {
            let Some(drawn) = self.find(&mut left, rng)? else { break };
            all.push(drawn);
        }
        Ok(all)
    }

    /// The first usable picture of `indices`, if there is one.
    fn find(&self, indices: &mut dyn Iterator<Item = usize>, rng: &mut Philox) -> Result<Option<Drawn>> {
        let LoadOptions { size, crop, flip, .. } = self.options;
        for index in indices {
            let Some(entry) = self.entries.get(index) else {
                let want = format!("below {}", self.len());
                return Err(Error::arg("ImageSet::first", "index", index, want));
            };
            let image = match &entry.picture {
                Picture::Kept(small) => small.image()?,
                Picture::OnDisk(path) => match Small::open(path, size, crop) {
                    Ok(small) => small.image()?,
                    Err(e) => {
                        self.skip(entry.sample, path, &e)?;
                        continue;
                    }
                },
            };
            let image = cut(&image, size, crop, flip, rng);
            return Ok(Some(Drawn { sample: entry.sample, image }));
        }
        Ok(None)
    }

    fn skip(&self, sample: usize, path: &Path, e: &Error) -> Result<()> {
        let why = (path.to_path_buf(), e.reason(path));
        self.bad.lock().unwrap_or_else(PoisonError::into_inner).insert(sample, why);
        self.check()
    }

    fn check(&self) -> Result<()> {
        let skipped = self.skipped();
        if 2 * skipped.count <= self.total {
            return Ok(());
        }
        let what = format!(
            "{} of {} pictures cannot be used, more than half; replace or remove them: {}",
            skipped.count,
            self.total,
            skipped.names()
        );
        Err(Error::data(&self.root, what))
    }
}

impl Picture {
    /// Bytes in memory.
    fn bytes(&self) -> u64 {
        match self {
            Picture::Kept(small) => small.rgb.len() as u64,
            Picture::OnDisk(_) => 0,
        }
    }
}

impl Small {
    fn open(path: &Path, size: usize, crop: Crop) -> Result<Self> {
        // Opening a pipe would block until another process writes to it.
        match std::fs::metadata(path).map_err(Error::io(path))?.file_type() {
            kind if kind.is_file() || kind.is_dir() => Self::new(Image::open(path)?, size, crop),
            _ => Err(Error::data(path, "this is a device or a pipe, not a picture")),
        }
    }

    fn new(mut image: Image, size: usize, crop: Crop) -> Result<Self> {
        if let Some(resized) = fit_shorter(&image, size)? {
            image = resized;
        }
        if crop == Crop::Centre {
            image = cut(&image, size, crop, false, &mut Philox::new(0, 0));
        }
        let rgb = image.to_u8().into_boxed_slice();
        Ok(Small { height: image.height as u32, width: image.width as u32, rgb })
    }

    fn image(&self) -> Result<Image> {
        Image::from_u8(self.height as usize, self.width as usize, &self.rgb)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::folder::Folder;
    use crate::data::image::fit;
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
        ImageSet::load(&folder.root, &folder.samples, options)
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
            assert_eq!((kept.on_disk(), none.on_disk(), none.bytes()), (0, 12, 0));
            assert!((1..12).contains(&some.on_disk()) && some.bytes() <= 900);
            for i in 0..12 {
                let draw = |set: &ImageSet| set.get(i, &mut Philox::new(9, i as u64)).unwrap();
                let drawn = draw(&kept);
                assert_eq!((drawn.sample, drawn.image.height, drawn.image.width), (i, 8, 8));
                assert_eq!(drawn, draw(&some));
                assert_eq!(drawn, draw(&none));
            }
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
            let got = set.get(i, &mut Philox::new(2, i as u64)).unwrap().image;
            assert_eq!(got.to_u8(), want.to_u8());
        }
        assert!(set.get(6, &mut Philox::new(0, 0)).is_err());
    }

    #[test]
    fn drawn_pictures_are_kept_with_their_samples() {
        let scenes = crate::data::Scenes::new(24, 1).unwrap();
        let draw = |i| scenes.get(crate::data::Split::Test, i);
        let (samples, set) = ImageSet::draw(Path::new("scenes"), 5, LoadOptions::new(24), draw).unwrap();
        assert_eq!((samples.len(), set.len(), set.bytes(), set.on_disk()), (5, 5, 5 * 24 * 24 * 3, 0));
        for (i, sample) in samples.iter().enumerate() {
            let drawn = set.get(i, &mut Philox::new(0, 0)).unwrap();
            assert_eq!((drawn.sample, drawn.image.to_u8()), (i, draw(i).image.to_u8()));
            assert_eq!(sample, &draw(i).sample);
        }
        let none = ImageSet::draw(Path::new("scenes"), 5, LoadOptions::new(0), draw);
        assert!(none.unwrap_err().to_string().contains("`size` is 0"));
    }

    #[test]
    fn broken_pictures_are_skipped_counted_and_named() {
        let dir = Scratch::new("cache-broken");
        let folder = folder(&dir, 14, &[0, 2, 3, 5, 7, 13]);
        let kept = load(&folder, options(Crop::Centre, u64::MAX)).unwrap();
        assert_eq!((kept.len(), kept.skipped().count, kept.skipped().first.len()), (8, 6, 5));
        let (path, why) = &kept.skipped().first[1];
        assert_eq!(path, &folder.samples[2].image);
        assert_eq!(why, "this is not a PNG, JPEG or WebP picture");
        assert_eq!((0..8).map(|i| kept.sample(i).unwrap()).collect::<Vec<_>>(), [1, 4, 6, 8, 9, 10, 11, 12]);

        let disk = load(&folder, options(Crop::Centre, 0)).unwrap();
        assert_eq!((disk.len(), disk.skipped().count), (14, 0));
        let drawn: Vec<usize> =
            (0..14).map(|i| disk.get(i, &mut Philox::new(0, 0)).unwrap().sample).collect();
        assert_eq!(drawn, [1, 1, 4, 4, 4, 6, 6, 8, 8, 9, 10, 11, 12, 1]);
        assert_eq!(disk.skipped(), kept.skipped());
    }

    #[test]
    fn the_first_usable_pictures_are_taken_and_no_more_are_looked_at() {
        let dir = Scratch::new("cache-most");
        let folder = folder(&dir, 12, &[0, 2, 3, 9]);
        let taken = |set: &ImageSet, n| -> Vec<usize> {
            set.take(n, &mut Philox::new(0, 0)).unwrap().iter().map(|d| d.sample).collect()
        };
        for memory in [u64::MAX, 0] {
            let all = load(&folder, options(Crop::Centre, memory)).unwrap();
            assert_eq!(taken(&all, 4), [1, 4, 5, 6]);
            assert_eq!(taken(&all, 99), [1, 4, 5, 6, 7, 8, 10, 11]);
            assert_eq!(all.skipped().count, 4);
        }
        let few = load(&folder, LoadOptions { most: 4, ..options(Crop::Centre, u64::MAX) }).unwrap();
        assert_eq!((few.len(), few.skipped().count, taken(&few, 9)), (4, 3, vec![1, 4, 5, 6]));
        let none = load(&folder, LoadOptions { most: 0, ..options(Crop::Centre, u64::MAX) }).unwrap();
        assert!(none.is_empty() && none.skipped().count == 0);
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
        assert_eq!((folder.samples.len(), set.len(), set.skipped().count), (8, 4, 4));
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
        assert_eq!((folder.samples.len(), set.len(), set.skipped().count), (8, 5, 3));
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
        let disk = load(&folder, options(Crop::Centre, 0)).unwrap();
        assert!(disk.get(0, &mut Philox::new(0, 0)).is_ok());
        assert!(disk.get(4, &mut Philox::new(0, 0)).unwrap_err().to_string().contains("3 of 5"));
    }
}
