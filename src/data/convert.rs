//! Writing data sets: any source as WebDataset shards or as a folder.

use std::collections::VecDeque;
use std::fmt::Write;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Value, json};

use super::bitmap::{Bitmap, MAX_BYTES};
use super::cache::Skipped;
use super::save::{self, Format};
use super::source::Listed;
use super::texts::object;
use super::webdataset::{END, member};
use crate::error::{Error, Result};
use crate::files;

/// Pictures that are read and encoded at a time.
const BATCH: usize = 64;
/// Pictures in a folder.
const PER_FOLDER: usize = 10_000;

/// How pictures are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encode {
    /// The bytes of the source, unchanged, where it has a file for the picture; otherwise PNG.
    Source,
    /// Decoded, and encoded anew in this format.
    As(Format),
}

/// What was written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Converted {
    /// Samples.
    pub samples: usize,
    /// Shards, or pictures of a folder.
    pub files: usize,
    /// Their size in bytes.
    pub bytes: u64,
    /// Samples that were left out, with the reasons: their pictures cannot be used.
    pub skipped: Skipped,
}

/// Writes samples as the shards `PREFIX-000000.tar`, `PREFIX-000001.tar`, .. of `per_shard` samples each, into a folder
/// that does not exist or is empty. The bytes depend on the samples only.
///
/// The members of a sample are its picture (`00000000.jpg`, with the extension of its content), `00000000.txt` with its
/// first caption, and `00000000.json` with its other texts. Every picture is decoded once; those that cannot be used are
/// left out. What a built-in picture shows ([`super::Scene`]) is not written.
///
/// A shard that exists is complete. `progress` is called with the numbers of samples done and of all samples; its errors
/// end the work.
pub fn write_shards(
    listed: &Listed,
    folder: &Path,
    prefix: &str,
    per_shard: usize,
    encode: Encode,
    progress: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Converted> {
    let bad = |c: char| !c.is_alphanumeric() && !matches!(c, '-' | '_' | '.');
    if prefix.is_empty() || prefix.starts_with('.') || prefix.contains(bad) {
        let want = "letters, digits, `-`, `_` and `.`, such as train";
        return Err(Error::arg("write_shards", "prefix", format!("{prefix:?}"), want));
    }
    if per_shard == 0 {
        return Err(Error::arg("write_shards", "per_shard", 0, "at least 1"));
    }
    make_empty(folder)?;
    let mut stream = Stream::new(listed, encode, progress);
    let mut done = Converted::default();
    while stream.has_more()? {
        let path = folder.join(format!("{prefix}-{:06}.tar", done.files));
        let written = files::replace(&path, |file| {
            for _ in 0..per_shard {
                let Some(Ready { sample, picture }) = stream.next()? else { break };
                let key = format!("{:08}", done.samples);
                let sample = &listed.samples[sample];
                if let Some((bytes, ending)) = picture {
                    member(file, &format!("{key}.{ending}"), &bytes)?;
                }
                let mut texts = object(sample);
                // The first caption is where other programs look for it, unless the list repeats it.
                let caption = sample.caption().filter(|_| sample.has_picture());
                if caption.is_some() {
                    texts.remove("text");
                }
                if !texts.is_empty() {
                    member(file, &format!("{key}.json"), Value::from(texts).to_string().as_bytes())?;
                }
                if let Some(caption) = caption {
                    member(file, &format!("{key}.txt"), caption.as_bytes())?;
                }
                done.samples += 1;
            }
            file.put(&END)
        })?;
        done.files += 1;
        done.bytes += written.bytes;
    }
    stream.finish(folder, done)
}

/// Writes samples as a folder that does not exist or is empty: pictures with running numbers, and a `metadata.jsonl` as
/// [`super::Folder`] reads it. For the rest see [`write_shards`]; the metadata are written last.
pub fn write_folder(
    listed: &Listed,
    folder: &Path,
    encode: Encode,
    progress: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Converted> {
    make_empty(folder)?;
    let mut stream = Stream::new(listed, encode, progress);
    let (mut done, mut lines) = (Converted::default(), String::new());
    while let Some(Ready { sample, picture }) = stream.next()? {
        let mut texts = object(&listed.samples[sample]);
        if let Some((bytes, ending)) = picture {
            let sub = format!("{:04}", done.samples / PER_FOLDER);
            let inside = folder.join(&sub);
            if !inside.is_dir() {
                fs::create_dir(&inside).map_err(Error::io(&inside))?;
            }
            let name = format!("{sub}/{:08}.{ending}", done.samples);
            done.bytes += files::replace(&folder.join(&name), |file| file.put(&bytes))?.bytes;
            done.files += 1;
            texts.insert("file_name".into(), json!(name));
        }
        let _ = writeln!(lines, "{}", Value::from(texts));
        done.samples += 1;
    }
    if done.samples > 0 {
        files::replace(&folder.join("metadata.jsonl"), |file| file.put(lines.as_bytes()))?;
    }
    stream.finish(folder, done)
}

/// Makes the folder unless it is there and empty.
fn make_empty(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let mut entries = fs::read_dir(folder).map_err(Error::io(folder))?;
    match entries.next() {
        None => Ok(()),
        Some(_) => {
            let what = "this folder is not empty, and nothing in it is overwritten; name a new folder or empty this one";
            Err(Error::data(folder, what))
        }
    }
}

/// A sample that can be written, with its picture and the extension for it.
struct Ready {
    sample: usize,
    picture: Option<(Vec<u8>, &'static str)>,
}

/// The samples with their pictures in order, prepared on all cores a few at a time.
struct Stream<'a> {
    listed: &'a Listed,
    encode: Encode,
    progress: &'a mut dyn FnMut(usize, usize) -> Result<()>,
    ready: VecDeque<Ready>,
    /// The first sample that is not prepared yet.
    at: usize,
    skipped: Skipped,
}

impl<'a> Stream<'a> {
    fn new(
        listed: &'a Listed,
        encode: Encode,
        progress: &'a mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Self {
        Stream { listed, encode, progress, ready: VecDeque::new(), at: 0, skipped: Skipped::default() }
    }

    fn has_more(&mut self) -> Result<bool> {
        let all = self.listed.samples.len();
        while self.ready.is_empty() && self.at < all {
            let batch = self.at..all.min(self.at + BATCH);
            let (listed, encode) = (self.listed, self.encode);
            let made: Vec<_> =
                batch.clone().into_par_iter().map(|i| (i, picture(listed, i, encode))).collect();
            for (sample, made) in made {
                match made {
                    Ok(picture) => self.ready.push_back(Ready { sample, picture }),
                    // A file that is absent is one sample's fault; a disk that fails is not.
                    Err(Error::Io { path, source }) if source.kind() != ErrorKind::NotFound => {
                        return Err(Error::Io { path, source });
                    }
                    Err(e) => {
                        let name = &listed.samples[sample].image;
                        self.skipped.add(name, e.reason(name));
                    }
                }
            }
            self.at = batch.end;
            (self.progress)(self.at, all)?;
        }
        Ok(!self.ready.is_empty())
    }

    fn next(&mut self) -> Result<Option<Ready>> {
        self.has_more()?;
        Ok(self.ready.pop_front())
    }

    /// Fails if nothing could be written, or if more than half of the samples cannot be used.
    fn finish(self, folder: &Path, mut done: Converted) -> Result<Converted> {
        done.skipped = self.skipped;
        if done.samples == 0 {
            let what = match done.skipped.count {
                0 => "nothing was written, because the source has no samples".to_string(),
                _ => format!("nothing was written, because no picture can be used: {}", done.skipped.names()),
            };
            return Err(Error::data(folder, what));
        }
        let (all, skipped) = (self.listed.samples.len(), &done.skipped);
        if 2 * skipped.count > all {
            let what = format!(
                "{} of {all} samples cannot be used, more than half; replace or remove them: {}",
                skipped.count,
                skipped.names()
            );
            return Err(Error::data(&self.listed.root, what));
        }
        Ok(done)
    }
}

/// The bytes of a picture and the extension for them; `None` for texts without a picture.
fn picture(listed: &Listed, sample: usize, encode: Encode) -> Result<Option<(Vec<u8>, &'static str)>> {
    let name: &PathBuf = &listed.samples[sample].image;
    if !listed.samples[sample].has_picture() {
        return Ok(None);
    }
    if encode == Encode::Source
        && let Some(bytes) = listed.pictures.encoded(sample)?
    {
        // Decoded small where this is faster, to find the pictures that are broken.
        Bitmap::decode(&bytes, name, 1)?;
        if let Some(ending) = ending(&bytes) {
            return Ok(Some((bytes, ending)));
        }
    }
    let format = match encode {
        Encode::As(format) => format,
        Encode::Source => Format::Png,
    };
    let Bitmap { height, width, rgb } = listed.pictures.decode(sample, usize::MAX)?;
    let bytes = save::encode(name, &rgb, height, width, format)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Error::data(
            name,
            format!("this picture has more than {} MiB as a file", MAX_BYTES >> 20),
        ));
    }
    let ending = match format {
        Format::Png => "png",
        Format::Jpeg => "jpg",
        Format::WebP => "webp",
    };
    Ok(Some((bytes, ending)))
}

/// The extension for a picture file, from its content; `None` if shards and folders do not hold this format.
fn ending(bytes: &[u8]) -> Option<&'static str> {
    use ::image::ImageFormat::{Gif, Jpeg, Png, WebP};
    match ::image::guess_format(bytes).ok()? {
        Png => Some("png"),
        Jpeg => Some("jpg"),
        WebP => Some("webp"),
        Gif => Some("gif"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::scratch::Scratch;
    use crate::data::source::Pictures;
    use crate::data::{Columns, Sample, Source, Split, Wanted};

    fn open(source: Source, path: Option<&Path>, samples: usize) -> Listed {
        let columns = Columns::default();
        let wanted = Wanted { split: Split::Train, path, images: None, columns: &columns, samples, size: 48 };
        source.open(&wanted).unwrap()
    }

    fn quiet() -> impl FnMut(usize, usize) -> Result<()> {
        |_, _| Ok(())
    }

    /// A folder with pictures in three formats and all kinds of texts.
    fn folder(dir: &Scratch) -> Listed {
        let pixels: Vec<u8> = (0..9 * 8 * 3).map(|i| (i * 31) as u8).collect();
        for (name, format) in [("a.png", Format::Png), ("b.jpg", Format::Jpeg), ("c.dat", Format::WebP)] {
            dir.write(&format!("in/{name}"), &save::encode(Path::new(name), &pixels, 9, 8, format).unwrap());
        }
        dir.write("in/broken.png", b"broken");
        let lines = [
            r#"{"file_name": "a.png", "text": "one"}"#,
            r#"{"file_name": "b.jpg", "captions": ["größer", "b", "größer"], "prompt": "draw"}"#,
            r#"{"file_name": "broken.png", "text": "x"}"#,
            r#"{"file_name": "c.dat", "qa": [["q?", "yes"], ["r?", "no"]]}"#,
            r#"{"file_name": "a.png", "chats": [{"system": "s", "turns": [["1", "2"], ["3", "4"]]}, {"turns": [["5", "6"]]}]}"#,
            r#"{"text_only": true, "text": "t", "qa": [["2 + 2?", "4"]]}"#,
        ];
        dir.write("in/metadata.jsonl", lines.join("\n").as_bytes());
        open(Source::Folder, Some(&dir.path("in")), 0)
    }

    fn texts(listed: &Listed) -> Vec<Value> {
        listed.samples.iter().map(|s| Value::from(object(s))).collect()
    }

    #[test]
    fn nothing_is_lost_on_the_way_to_shards_and_back() {
        let dir = Scratch::new("convert");
        let from = folder(&dir);
        let mut seen = Vec::new();
        let mut progress = |done, all| {
            seen.push((done, all));
            Ok(())
        };
        let shards = dir.path("shards");
        let done = write_shards(&from, &shards, "train", 2, Encode::Source, &mut progress).unwrap();
        assert_eq!(seen, [(6, 6)]);
        assert_eq!((done.samples, done.files, done.skipped.count), (5, 3, 1));
        assert!(done.skipped.names().contains("broken.png: this is not a PNG"), "{}", done.skipped.names());
        let middle = open(Source::WebDataset, Some(&shards), 0);
        assert_eq!(middle.ignored.count, 0, "{}", middle.ignored.names());
        let images: Vec<PathBuf> = middle.samples.iter().map(|s| s.image.clone()).collect();
        let want = [
            "train-000000.tar/00000000.png",
            "train-000000.tar/00000001.jpg",
            "train-000001.tar/00000002.webp",
        ];
        assert_eq!(images[..3], want.map(|n| shards.join(n)));
        let back = dir.path("back");
        write_folder(&middle, &back, Encode::Source, &mut quiet()).unwrap();
        let to = open(Source::Folder, Some(&back), 0);
        let mut want = texts(&from);
        want.remove(2);
        assert_eq!(texts(&middle), want);
        assert_eq!(texts(&to), want);
        for (i, k) in [0, 1, 3, 4].into_iter().enumerate() {
            let bytes = from.pictures.encoded(k).unwrap();
            assert!(bytes.is_some());
            assert_eq!(middle.pictures.encoded(i).unwrap(), bytes);
            assert_eq!(to.pictures.encoded(i).unwrap(), bytes);
        }
        // The same bytes again.
        write_shards(&from, &dir.path("again"), "train", 2, Encode::Source, &mut quiet()).unwrap();
        for i in 0..3 {
            let name = format!("train-{i:06}.tar");
            assert_eq!(
                fs::read(shards.join(&name)).unwrap(),
                fs::read(dir.path("again").join(&name)).unwrap()
            );
        }
    }

    #[test]
    fn drawn_pictures_keep_their_pixels() {
        let dir = Scratch::new("convert-drawn");
        let from = open(Source::Mixed, None, 130);
        write_shards(&from, &dir.path("out"), "m", 100, Encode::Source, &mut quiet()).unwrap();
        let to = open(Source::WebDataset, Some(&dir.path("out")), 0);
        assert_eq!(texts(&to), texts(&from));
        for i in [0, 1, 99, 100, 129] {
            assert_eq!(to.pictures.decode(i, 48).unwrap(), from.pictures.decode(i, 48).unwrap());
        }
        write_folder(&from, &dir.path("jpg"), Encode::As(Format::Jpeg), &mut quiet()).unwrap();
        assert!(dir.path("jpg/0000/00000129.jpg").is_file());
    }

    #[test]
    fn nothing_is_overwritten_and_errors_end_the_work() {
        let dir = Scratch::new("convert-errors");
        let from = folder(&dir);
        for e in [
            write_shards(&from, &dir.path("in"), "a", 2, Encode::Source, &mut quiet()).unwrap_err(),
            write_folder(&from, &dir.path("in"), Encode::Source, &mut quiet()).unwrap_err(),
        ] {
            assert!(
                e.to_string().contains("in: this folder is not empty, and nothing in it is overwritten"),
                "{e}"
            );
        }
        for (prefix, per_shard) in [("../a", 1), ("", 1), (".a", 1), ("a", 0)] {
            assert!(
                write_shards(&from, &dir.path("x"), prefix, per_shard, Encode::Source, &mut quiet()).is_err()
            );
            assert!(!dir.path("x").exists());
        }
        let mut stopped = |_, _| Err(Error::Interrupted);
        let e = write_shards(&from, &dir.path("y"), "a", 2, Encode::Source, &mut stopped).unwrap_err();
        assert!(matches!(e, Error::Interrupted));
        dir.write("bad/a.png", b"bad");
        let bad = open(Source::Folder, Some(&dir.path("bad")), 0);
        let e = write_folder(&bad, &dir.path("z"), Encode::Source, &mut quiet()).unwrap_err().to_string();
        assert!(e.contains("nothing was written, because no picture can be used: "), "{e}");
        dir.write("bad/b.png", b"bad");
        let pixels = save::encode(Path::new("c"), &[9; 12], 2, 2, Format::Png).unwrap();
        dir.write("bad/c.png", &pixels);
        let bad = open(Source::Folder, Some(&dir.path("bad")), 0);
        let e = write_folder(&bad, &dir.path("w"), Encode::Source, &mut quiet()).unwrap_err().to_string();
        assert!(e.contains("bad: 2 of 3 samples cannot be used, more than half; replace"), "{e}");
    }

    /// Pictures that lie on a disk that fails.
    #[derive(Debug)]
    struct Failing(ErrorKind);

    impl Pictures for Failing {
        fn decode(&self, sample: usize, _: usize) -> Result<Bitmap> {
            match sample {
                0 => Err(Error::io("disk")(self.0.into())),
                _ => Ok(Bitmap { height: 1, width: 1, rgb: vec![0; 3] }),
            }
        }
    }

    #[test]
    fn a_disk_that_fails_ends_the_work() {
        let dir = Scratch::new("convert-disk");
        let samples = (0..3).map(|i| Sample { image: format!("{i}.png").into(), ..Sample::default() });
        let samples: Vec<Sample> = samples.collect();
        let write = |to: &str, kind| {
            let pictures = Box::new(Failing(kind));
            let (root, samples) = (dir.root().to_path_buf(), samples.clone());
            let listed = Listed { root, samples, pictures, ignored: Skipped::default(), about: Vec::new() };
            write_folder(&listed, &dir.path(to), Encode::Source, &mut quiet())
        };
        assert_eq!(write("a", ErrorKind::NotFound).unwrap().skipped.count, 1);
        let e = write("b", ErrorKind::PermissionDenied).unwrap_err();
        assert!(matches!(e, Error::Io { .. }), "{e}");
    }
}
