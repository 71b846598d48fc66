//! Folder data sets: pictures in a folder, optionally with captions and questions.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error as _};
use unicode_normalization::UnicodeNormalization;

use super::bitmap::{self, Bitmap};
use super::cache::Skipped;
use super::plain::{read_text, trimmed};
use super::sample::Sample;
use super::source::{DataSource, Listed, Pictures, Wanted};
use super::texts::{ChatLine, chats, joined, said};
use crate::error::{Error, Result};

/// Metadata files that list the pictures of a folder, in order of precedence.
const METADATA: [&str; 2] = ["metadata.jsonl", "metadata.csv"];
/// Extensions of picture files. Some of these formats cannot be decoded: such files are reported like broken
/// pictures.
const EXTENSIONS: [&str; 22] = [
    "png", "apng", "jpg", "jpeg", "jpe", "jfif", "jif", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif",
    "heic", "heif", "jxl", "jp2", "tga", "ppm", "pgm", "pnm",
];
/// Maximum nesting of folders; anything deeper is taken for a loop of links.
const MAX_DEPTH: usize = 32;
const WANTED: &str = "wanted {\"file_name\": \"...\", \"text\": \"...\", \"prompt\": \"...\", \"qa\": [[\"question\", \
                      \"answer\"]]} with all but file_name optional";

/// A data set in a folder, after the imagefolder convention of Hugging Face.
///
/// A folder with a `metadata.jsonl` holds the samples that its lines name, in the order of the lines:
///
/// ```json
/// {"file_name": "images/0.png", "text": "a blue circle", "prompt": "draw a blue circle", "qa": [["what color is it?", "blue"]]}
/// ```
///
/// `text`, `prompt` and `qa` are optional. `captions` is a list of captions, and `chats` one of conversations of several
/// turns, `{"system": "...", "turns": [["question", "answer"], ..]}` with an optional `system`. A line with
/// `"text_only": true` has no picture and no `file_name`. `file_name` is relative to the folder of the metadata and must stay inside
/// it. Other keys are ignored. A `metadata.csv` with the columns `file_name`, `text` and `prompt` works the same way.
/// A folder without metadata holds every file with the extension of a picture, sorted by name; a `.txt` file of the
/// same stem is the picture's caption. Subfolders are read likewise, by their own metadata if they have any; names
/// that begin with a dot are skipped.
///
/// Listing does not check whether a picture exists and can be decoded; [`super::ImageSet`] does. A file name matches in
/// any Unicode normalization of its accents, and backslashes match slashes.
#[derive(Debug, Clone)]
pub struct Folder {
    /// The folder.
    pub root: PathBuf,
    /// Its samples, in an order that depends on names and metadata only.
    pub samples: Vec<Sample>,
    /// Files and lines that are not part of the data set, with the reasons.
    pub ignored: Skipped,
}

/// Pictures of folders.
pub(super) struct FromFolder;

impl DataSource for FromFolder {
    fn name(&self) -> &'static str {
        "folder"
    }

    fn open(&self, part: &Wanted) -> Result<Listed> {
        let Folder { root, samples, ignored } = Folder::open(part.path.unwrap_or(Path::new("")))?;
        let pictures = Box::new(Files::new(&root, &samples));
        Ok(Listed { root, samples, pictures, ignored, about: Vec::new() })
    }
}

/// Pictures in files of their own.
#[derive(Debug)]
pub(super) struct Files {
    root: PathBuf,
    paths: Vec<PathBuf>,
}

impl Files {
    /// The files that these samples name, all of them in the folder `root`.
    pub fn new(root: &Path, samples: &[Sample]) -> Self {
        Files { root: root.into(), paths: samples.iter().map(|s| s.image.clone()).collect() }
    }
}

impl Pictures for Files {
    fn decode(&self, sample: usize, shorter: usize) -> Result<Bitmap> {
        let path = &self.paths[sample];
        Bitmap::decode(&bitmap::read(path)?, path, shorter)
    }

    fn encoded(&self, sample: usize) -> Result<Option<Vec<u8>>> {
        bitmap::read(&self.paths[sample]).map(Some)
    }

    fn folder(&self, _: usize) -> Option<&Path> {
        Some(&self.root)
    }
}

#[derive(Default, Deserialize)]
struct Line {
    #[serde(default, deserialize_with = "given")]
    file_name: Option<String>,
    text: Option<String>,
    captions: Option<Vec<String>>,
    prompt: Option<String>,
    qa: Option<Vec<(String, String)>>,
    chats: Option<Vec<ChatLine>>,
    #[serde(default)]
    text_only: bool,
}

/// A text that must not be null if its key is there.
fn given<'de, D: Deserializer<'de>>(value: D) -> std::result::Result<Option<String>, D::Error> {
    String::deserialize(value).map(Some)
}

impl Folder {
    /// Lists a data set; no picture is decoded.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let root = path.as_ref().to_path_buf();
        match fs::metadata(&root) {
            Ok(m) if m.is_dir() => {}
            Ok(_) => {
                return Err(Error::data(&root, "this is a file; name the folder that holds the pictures"));
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let what = "there is no such folder; fetch the data set first or correct the path";
                return Err(Error::data(&root, what));
            }
            Err(e) => return Err(Error::io(&root)(e)),
        }
        let mut found = Found::default();
        found.folder(&root, 0)?;
        if let Some(first) = found.unreadable.first() {
            let what = match found.unreadable.len() - 1 {
                0 => first.1.clone(),
                more => format!("{} (and {more} more captions like it)", first.1),
            };
            return Err(Error::data(&first.0, what));
        }
        if found.samples.is_empty() {
            let what = format!(
                "no pictures found; put PNG, JPEG, WebP or GIF files or a {} into this folder",
                METADATA[0]
            );
            return Err(Error::data(&root, what));
        }
        Ok(Folder { root, samples: found.samples, ignored: found.ignored })
    }
}

/// The pictures that `paths` name: files as they are, folders as listed by [`Folder::open`].
pub fn pictures(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for path in paths {
        match path.is_dir() {
            true => all.extend(Folder::open(path)?.samples.into_iter().map(|s| s.image)),
            false => all.push(path.clone()),
        }
    }
    Ok(all)
}

/// What has been found in a folder so far.
#[derive(Default)]
struct Found {
    samples: Vec<Sample>,
    ignored: Skipped,
    /// Caption files that are not text.
    unreadable: Vec<(PathBuf, String)>,
}

impl Found {
    fn folder(&mut self, folder: &Path, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            let what = format!("folders are nested more than {MAX_DEPTH} deep; is this a loop of links?");
            return Err(Error::data(folder, what));
        }
        let metadata = METADATA.map(|name| folder.join(name)).into_iter().filter(|p| p.is_file());
        match metadata.collect::<Vec<_>>().as_slice() {
            [] => self.plain(folder, depth),
            [path, rest @ ..] => {
                for other in rest {
                    self.ignored.add(other, format!("{} is read in its place", path.display()));
                }
                match path.ends_with(METADATA[0]) {
                    true => self.jsonl(folder, path),
                    false => self.csv(folder, path),
                }
            }
        }
    }

    /// Reads a folder without metadata.
    fn plain(&mut self, folder: &Path, depth: usize) -> Result<()> {
        let mut paths = Vec::new();
        for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
            let entry = entry.map_err(Error::io(folder))?;
            if !entry.file_name().as_encoded_bytes().starts_with(b".") {
                paths.push(entry.path());
            }
        }
        paths.sort();
        let mut captions = Vec::new();
        let first = self.samples.len();
        for path in paths {
            if path.is_dir() {
                self.folder(&path, depth + 1)?;
            } else if has_extension(&path, &EXTENSIONS) {
                let at = path.with_extension("txt");
                let caption = if at.is_file() { self.caption(&at) } else { None };
                self.samples.push(Sample {
                    image: path,
                    captions: caption.into_iter().collect(),
                    ..Sample::default()
                });
            } else if has_extension(&path, &["txt"]) {
                captions.push(path);
            } else {
                self.ignored.add(&path, "its name does not end like that of a picture");
            }
        }
        let mut stems: Vec<PathBuf> =
            self.samples[first..].iter().map(|s| s.image.with_extension("txt")).collect();
        stems.sort();
        for path in captions.iter().filter(|p| stems.binary_search(p).is_err()) {
            self.ignored.add(path, "there is no picture with this stem");
        }
        Ok(())
    }

    fn caption(&mut self, path: &Path) -> Option<String> {
        match read_text(path) {
            Ok(text) => said(Some(text)),
            Err(e) => {
                self.unreadable.push((path.into(), e.reason(path)));
                None
            }
        }
    }

    fn jsonl(&mut self, folder: &Path, path: &Path) -> Result<()> {
        let mut names = Names::default();
        for (i, text) in read_text(path)?.split('\n').enumerate() {
            let text = trimmed(text);
            if text.is_empty() {
                continue;
            }
            let line =
                parse::<Line>(text).and_then(|line| match line.file_name.is_some() || line.text_only {
                    true => Ok(line),
                    false => Err(serde_json::Error::missing_field("file_name")),
                });
            let line = line.map_err(|e| {
                // serde_json counts lines within the single line that it was given.
                let reason = e.to_string();
                let reason = reason.split(" at line ").next().unwrap_or_default();
                let column = if e.column() == 0 { text.len() } else { e.column() };
                let what = format!("line {}: {reason} (column {column}); {WANTED}", i + 1);
                Error::data(path, what)
            })?;
            self.line(folder, path, i + 1, line, &mut names)?;
        }
        Ok(())
    }

    fn csv(&mut self, folder: &Path, path: &Path) -> Result<()> {
        let text = read_text(path)?;
        let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::Headers).from_reader(text.as_bytes());
        let wrong = |e: csv::Error| {
            let line = e.position().map_or(1, csv::Position::line);
            let what = match e.kind() {
                csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
                    format!("{len} values, wanted {expected_len} as in the first line; quote commas")
                }
                _ => e.to_string(),
            };
            Error::data(path, format!("line {line}: {what}"))
        };
        let header = reader.headers().map_err(wrong)?.clone();
        let column = |name: &str| header.iter().position(|h| h == name);
        let (caption, prompt) = (column("text"), column("prompt"));
        let Some(name) = column("file_name") else {
            let got: Vec<&str> = header.iter().collect();
            let what =
                format!("line 1: the columns are {got:?}, wanted file_name, and text and prompt if any");
            return Err(Error::data(path, what));
        };
        let mut names = Names::default();
        for record in reader.records() {
            let record = record.map_err(wrong)?;
            let value = |i: Option<usize>| i.and_then(|i| record.get(i)).map(String::from);
            let line = Line {
                file_name: Some(value(Some(name)).unwrap_or_default()),
                text: value(caption),
                prompt: value(prompt),
                ..Line::default()
            };
            let number = record.position().map_or(0, csv::Position::line) as usize;
            self.line(folder, path, number, line, &mut names)?;
        }
        Ok(())
    }

    /// Adds the sample of one line of metadata.
    fn line(
        &mut self,
        folder: &Path,
        path: &Path,
        number: usize,
        line: Line,
        names: &mut Names,
    ) -> Result<()> {
        let file_name = line.file_name.filter(|_| !line.text_only);
        if let Some(got) = file_name.as_ref().filter(|name| !is_inside(name)) {
            let what = format!("file_name {got:?} is not a path inside this folder; move the picture there");
            return Err(Error::data(path, format!("line {number}: {what}")));
        }
        let (chats, empty) = chats(line.qa.unwrap_or_default(), line.chats.unwrap_or_default());
        if empty {
            self.ignored.add(path, format!("line {number}: a question or its answer is empty"));
        }
        self.samples.push(Sample {
            image: file_name.map(|name| names.find(folder, &name)).unwrap_or_default(),
            captions: joined(
                said(line.text).into_iter().collect(),
                line.captions.into_iter().flatten().filter_map(|c| said(Some(c))).collect(),
            ),
            prompt: said(line.prompt),
            chats,
            scene: None,
        });
        Ok(())
    }
}

fn has_extension(path: &Path, known: &[&str]) -> bool {
    path.extension().is_some_and(|e| known.iter().any(|known| e.eq_ignore_ascii_case(known)))
}

pub(super) fn is_inside(name: &str) -> bool {
    let inside = |c| matches!(c, Component::Normal(_) | Component::CurDir);
    !name.is_empty() && !name.contains('\0') && Path::new(name).components().all(inside)
}

/// Parses JSON, accepting the NaN and infinities that Python writes.
pub(super) fn parse<T: DeserializeOwned>(text: &str) -> serde_json::Result<T> {
    serde_json::from_str(text).or_else(|e| match without_nan(text) {
        Some(text) => serde_json::from_str(&text),
        None => Err(e),
    })
}

/// The text with NaN and infinities outside strings replaced by `null`; `None` if there are none.
pub(super) fn without_nan(text: &str) -> Option<String> {
    let (mut out, mut rest, mut quoted, mut found) = (String::new(), text, false, false);
    while let Some(c) = rest.chars().next() {
        let name = ["NaN", "Infinity", "-Infinity"].into_iter().find(|n| !quoted && rest.starts_with(n));
        let taken = match (name, c) {
            (Some(name), _) => name.len(),
            // The escaped character belongs to the string, even if it is a quote.
            (None, '\\') => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            (None, c) => c.len_utf8(),
        };
        quoted ^= c == '"';
        found |= name.is_some();
        out += if name.is_some() { "null" } else { &rest[..taken] };
        rest = &rest[taken..];
    }
    found.then_some(out)
}

/// Finds files whose names may be spelled differently in the metadata and in the file system.
#[derive(Default)]
struct Names {
    /// The names in each folder where a lookup failed, keyed by their composed form (NFC).
    listed: HashMap<PathBuf, HashMap<String, OsString>>,
}

impl Names {
    /// The file that `name` refers to in `folder`; if there is none, the path where it was expected.
    fn find(&mut self, folder: &Path, name: &str) -> PathBuf {
        let direct = folder.join(name);
        if is_there(&direct) {
            return direct;
        }
        let slashed = name.replace('\\', "/");
        let name = if is_inside(&slashed) { &slashed } else { name };
        let mut at = folder.to_path_buf();
        for part in Path::new(name).components() {
            let next = at.join(part);
            at = match (is_there(&next), part.as_os_str().to_str()) {
                (false, Some(part)) => match self.composed(&at, part) {
                    Some(known) => at.join(known),
                    None => return folder.join(name),
                },
                _ => next,
            };
        }
        at
    }

    /// The name in `folder` that equals `part` after composition (NFC).
    fn composed(&mut self, folder: &Path, part: &str) -> Option<&OsString> {
        if !self.listed.contains_key(folder) {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.file_name());
            let names = entries.filter_map(|n| Some((n.to_str()?.nfc().collect(), n))).collect();
            self.listed.insert(folder.into(), names);
        }
        self.listed.get(folder)?.get(&part.nfc().collect::<String>())
    }
}

/// True for a file, a folder or a link, even a dangling one.
fn is_there(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Chat;
    use crate::data::scratch::Scratch;

    const JSONL: &str = METADATA[0];

    fn error(dir: &Scratch) -> String {
        Folder::open(dir.root()).unwrap_err().to_string()
    }

    #[test]
    fn metadata_gives_captions_and_questions_in_its_order() {
        let dir = Scratch::new("metadata");
        for name in ["images/b.png", "images/a.png", "images/unlisted.png", "c.png"] {
            dir.write(name, b"");
        }
        dir.write(
            JSONL,
            concat!(
                "{\"file_name\": \"images/b.png\", \"text\": \" a béé \", \"qa\": [[\"q?\", \"a\"], [\"r?\", \"b\"]]}\r\n",
                "\n",
                "{\"file_name\": \"./images/a.png\", \"other\": 3, \"text\": null}\n",
                "{\"file_name\": \"c.png\", \"prompt\": \"draw c\", \"text\": \"c\", \"qa\": [[\"q?\", \"yes\"]]}"
            )
            .as_bytes(),
        );
        let folder = Folder::open(dir.root()).unwrap();
        assert_eq!(folder.samples.len(), 3);
        let first = &folder.samples[0];
        assert_eq!(first.image, dir.path("images/b.png"));
        assert_eq!(first.caption(), Some("a béé"));
        assert_eq!(first.chats, [Chat::of("q?", "a"), Chat::of("r?", "b")]);
        assert_eq!((folder.samples[1].caption(), folder.samples[1].chats.len()), (None, 0));
        assert_eq!(folder.samples[2].chats, [Chat::of("q?", "yes")]);
        let prompts: Vec<Option<&str>> = folder.samples.iter().map(Sample::drawing_prompt).collect();
        assert_eq!(prompts, [Some("a béé"), None, Some("draw c")]);
    }

    #[test]
    fn pictures_and_captions_without_metadata() {
        let dir = Scratch::new("plain");
        for name in ["b.JPG", "a.png", "sub/c.webp", "sub/d.jpeg", "notes.md", ".hidden.png", ".git/e.png"] {
            dir.write(name, b"");
        }
        dir.write("a.txt", "ein Kreis, größer\n".as_bytes());
        dir.write("sub/c.txt", b" \n");
        // A subfolder with its own metadata.
        dir.write("z/f.png", b"");
        dir.write("z/g.png", b"");
        dir.write("z/metadata.jsonl", b"{\"file_name\": \"g.png\", \"text\": \"g\"}\n");
        let folder = Folder::open(dir.root()).unwrap();
        let names: Vec<PathBuf> = folder.samples.iter().map(|s| s.image.clone()).collect();
        let want = ["a.png", "b.JPG", "sub/c.webp", "sub/d.jpeg", "z/g.png"].map(|n| dir.path(n));
        assert_eq!(names, want);
        assert_eq!(folder.samples[0].caption(), Some("ein Kreis, größer"));
        assert!(folder.samples[1..4].iter().all(|s| s.caption().is_none()));
    }

    #[test]
    fn errors_name_file_line_and_remedy() {
        let dir = Scratch::new("errors");
        assert!(error(&dir).contains("no pictures found; put PNG"), "{}", error(&dir));
        let e = Folder::open(dir.path("nowhere")).unwrap_err().to_string();
        assert!(
            e.ends_with("nowhere: there is no such folder; fetch the data set first or correct the path"),
            "{e}"
        );
        dir.write("a.png", b"");
        let e = Folder::open(dir.path("a.png")).unwrap_err().to_string();
        assert!(e.contains("a.png: this is a file"), "{e}");
        let good = "{\"file_name\": \"a.png\"}\n";
        for (line, want) in [
            ("{\"file_name\": ", "line 2: EOF while parsing a value (column"),
            ("{\"text\": \"x\"}", "line 2: missing field `file_name` (column"),
            ("{\"file_name\": \"a.png\", \"qa\": [[\"only\"]]}", "line 2: invalid length 1"),
            ("\u{1}\u{2}", "line 2: expected value"),
            ("{\"file_name\": \"../a.png\"}", "line 2: file_name \"../a.png\" is not a path inside"),
            ("{\"file_name\": \"/etc/hosts\"}", "line 2: file_name \"/etc/hosts\" is not a path inside"),
            ("{\"file_name\": \"\"}", "line 2: file_name \"\" is not a path inside"),
        ] {
            dir.write(JSONL, format!("{good}{line}\n").as_bytes());
            let e = error(&dir);
            assert!(e.contains("metadata.jsonl: ") && e.contains(want), "{e}\nwanted {want}");
            assert!(!e.contains("at line 1"), "{e}");
        }
        dir.write(JSONL, b"{\"file_name\": \"a.png\"}\n\xff\xfe\n");
        assert!(error(&dir).contains("metadata.jsonl: line 2: this is not UTF-8 text"));
        dir.write(JSONL, b"\n");
        assert!(error(&dir).contains("no pictures found"));
    }

    #[test]
    fn captions_that_are_no_text_are_named_and_counted() {
        let dir = Scratch::new("latin");
        for name in ["a", "b", "c"] {
            dir.write(&format!("{name}.png"), b"");
            dir.write(&format!("{name}.txt"), b"a\ngr\xfc\xdfe");
        }
        let e = error(&dir);
        assert!(e.contains("a.txt: line 2: this is not UTF-8 text; save"), "{e}");
        assert!(e.ends_with("(and 2 more captions like it)"), "{e}");
        dir.write("b.txt", b"b");
        dir.write("c.txt", b"c");
        assert!(error(&dir).ends_with("save the file as UTF-8"));
    }

    #[test]
    fn byte_order_marks_are_no_text() {
        let dir = Scratch::new("marks");
        dir.write("plain/a.png", b"");
        dir.write("plain/a.txt", b"\xef\xbb\xbf a cat \r\n");
        dir.write("plain/b.png", b"");
        let wide: Vec<u8> = "\u{feff}größer".encode_utf16().flat_map(u16::to_le_bytes).collect();
        dir.write("plain/b.txt", &wide);
        dir.write("plain/c.png", b"");
        dir.write("plain/c.txt", b"\xef\xbb\xbf\n");
        let line = "\u{feff}{\"file_name\": \"a.png\", \"text\": \"\u{feff}a cat\", \"qa\": [[\"\u{feff}q?\", \" a\"]]}\r\n";
        dir.write("json/metadata.jsonl", format!("{line}{line}").as_bytes());
        dir.write("csv/metadata.csv", "\u{feff}file_name,text\r\na.png,a cat\r\n".as_bytes());
        let captions: Vec<Option<String>> = Folder::open(dir.root())
            .unwrap()
            .samples
            .into_iter()
            .map(|s| s.captions.into_iter().next())
            .collect();
        let want = ["a cat", "a cat", "a cat", "a cat", "größer", ""];
        assert_eq!(captions, want.map(|c| Some(c.to_string()).filter(|c| !c.is_empty())));
        let json = Folder::open(dir.path("json")).unwrap();
        assert_eq!(json.samples[1].chats, [Chat::of("q?", "a")]);
    }

    #[test]
    fn numbers_that_json_has_no_word_for_do_not_matter() {
        let dir = Scratch::new("nan");
        let lines = [
            r#"{"file_name": "a.png", "score": NaN, "text": "NaN \" NaN"}"#,
            r#"{"score": [-Infinity, Infinity], "file_name": "b.png", "text": NaN}"#,
            r#"{"file_name": "c.png", "text": "\\", "x": NaN}"#,
        ];
        dir.write(JSONL, lines.join("\n").as_bytes());
        let captions: Vec<Option<String>> = Folder::open(dir.root())
            .unwrap()
            .samples
            .into_iter()
            .map(|s| s.captions.into_iter().next())
            .collect();
        assert_eq!(captions, [Some("NaN \" NaN".into()), None, Some("\\".into())]);
        dir.write(JSONL, br#"{"file_name": NaN, "text": "x"}"#);
        assert!(error(&dir).contains("line 1: invalid type: null, expected a string"), "{}", error(&dir));
        dir.write(JSONL, br#"{"file_name": "a.png", "score": nan}"#);
        assert!(error(&dir).contains("line 1: expected "), "{}", error(&dir));
    }

    #[test]
    fn a_table_does_as_well_as_lines() {
        let dir = Scratch::new("csv");
        let csv =
            "prompt, file_name ,text,rating\n,a.png,\"a \"\"big\"\" cat,\nand a dog\",3\n\ndraw b,b.png,,\n";
        dir.write("metadata.csv", csv.as_bytes());
        let folder = Folder::open(dir.root()).unwrap();
        let said = |s: &Sample| (s.image.clone(), s.caption().map(String::from), s.prompt.clone());
        let want = [
            (dir.path("a.png"), Some("a \"big\" cat,\nand a dog".into()), None),
            (dir.path("b.png"), None, Some("draw b".into())),
        ];
        assert_eq!(folder.samples.iter().map(said).collect::<Vec<_>>(), want);
        for (csv, want) in [
            (
                "file_name;text\na.png;x\n",
                "line 1: the columns are [\"file_name;text\"], wanted file_name, and",
            ),
            ("file_name,text\na.png,x\nb.png,x,y\n", "line 3: 3 values, wanted 2 as in the first line"),
            ("file_name,text\na.png,x\n../b.png,x\n", "line 3: file_name \"../b.png\" is not a path inside"),
            ("file_name,text\n", "no pictures found"),
            ("", "line 1: the columns are []"),
        ] {
            dir.write("metadata.csv", csv.as_bytes());
            assert!(error(&dir).contains(want), "{}", error(&dir));
        }
        // JSON lines take precedence over a table.
        dir.write(JSONL, b"{\"file_name\": \"c.png\"}");
        let folder = Folder::open(dir.root()).unwrap();
        assert_eq!((folder.samples.len(), folder.ignored.count), (1, 1));
        let names = folder.ignored.names();
        assert!(names.contains("metadata.csv: ") && names.contains("metadata.jsonl is read in its place"));
    }

    #[test]
    fn names_are_found_however_they_are_written() {
        let dir = Scratch::new("names");
        let (composed, decomposed) = ("caf\u{e9}", "cafe\u{301}");
        dir.write(&format!("{composed}/one.png"), b"");
        dir.write(&format!("{decomposed}.png"), b"");
        dir.write("sub/b.png", b"");
        dir.write("odd\\name.png", b"");
        let names = [
            format!("{decomposed}/one.png"),
            format!("{composed}.png"),
            "sub\\b.png".into(),
            "odd\\name.png".into(),
            "sub\\missing.png".into(),
            "missing/a.png".into(),
            format!("{}.png", "long".repeat(1000)),
        ];
        let line = |name: &String| serde_json::json!({ "file_name": name }).to_string();
        dir.write(JSONL, names.iter().map(line).collect::<Vec<_>>().join("\n").as_bytes());
        let found: Vec<PathBuf> =
            Folder::open(dir.root()).unwrap().samples.into_iter().map(|s| s.image).collect();
        let want = [
            format!("{composed}/one.png"),
            format!("{decomposed}.png"),
            "sub/b.png".into(),
            "odd\\name.png".into(),
            "sub/missing.png".into(),
            "missing/a.png".into(),
            names[6].clone(),
        ];
        assert_eq!(found, want.map(|name| dir.path(&name)));
        dir.write(JSONL, b"{\"file_name\": \"..\\\\a.png\"}");
        assert_eq!(Folder::open(dir.root()).unwrap().samples[0].image, dir.path("..\\a.png"));
    }

    #[test]
    fn what_is_no_part_of_the_set_is_counted_and_named() {
        let dir = Scratch::new("ignored");
        for name in [
            "a.png",
            "b.gif",
            "c.JFIF",
            "notes.md",
            "a.txt",
            "lost.txt",
            "sub/d.tif",
            ".hidden",
            "z.jpg/e.png",
        ] {
            dir.write(name, b"");
        }
        let folder = Folder::open(dir.root()).unwrap();
        let images: Vec<PathBuf> = folder.samples.iter().map(|s| s.image.clone()).collect();
        let want = ["a.png", "b.gif", "c.JFIF", "sub/d.tif", "z.jpg/e.png"].map(|n| dir.path(n));
        assert_eq!(images, want);
        let named: Vec<&PathBuf> = folder.ignored.first.iter().map(|(p, _)| p).collect();
        assert_eq!((folder.ignored.count, named), (2, vec![&dir.path("notes.md"), &dir.path("lost.txt")]));
        let line = "{\"file_name\": \"a.png\", \"qa\": [[\"q?\", \" \"], [\"r?\", \"b\"], [\"\", \"c\"]]}";
        dir.write(JSONL, line.as_bytes());
        let folder = Folder::open(dir.root()).unwrap();
        assert_eq!(folder.samples[0].chats, [Chat::of("r?", "b")]);
        assert!(folder.ignored.names().ends_with("line 1: a question or its answer is empty"));
    }

    #[cfg(unix)]
    #[test]
    fn loops_of_links_end() {
        let dir = Scratch::new("loop");
        dir.write("sub/a.png", b"");
        std::os::unix::fs::symlink(dir.root(), dir.path("sub/back")).unwrap();
        let e = error(&dir);
        assert!(e.contains("loop of links") || e.contains("symbolic links"), "{e}");
    }
}
