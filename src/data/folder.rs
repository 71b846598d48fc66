//! Folder data sets: pictures in a folder, with captions and questions where there are any.

use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, Result};

const METADATA: &str = "metadata.jsonl";
const EXTENSIONS: [&str; 4] = ["png", "jpg", "jpeg", "webp"];
/// Folders inside folders beyond this depth are taken for a loop of links.
const MAX_DEPTH: usize = 32;

/// One picture and what is said about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The picture's file, or the name of a built-in picture.
    pub image: PathBuf,
    /// Its caption.
    pub caption: Option<String>,
    /// What to draw, where that is not said as the caption says it.
    pub prompt: Option<String>,
    /// Questions about it, each with its answer.
    pub qa: Vec<(String, String)>,
}

impl Sample {
    /// What a model is told to draw: the prompt, or else the caption.
    pub fn drawing_prompt(&self) -> Option<&str> {
        self.prompt.as_deref().or(self.caption.as_deref())
    }
}

/// A data set in a folder, after the imagefolder convention of Hugging Face.
///
/// A folder with a `metadata.jsonl` holds the samples that its lines name, in the order of the lines:
///
/// ```json
/// {"file_name": "images/0.png", "text": "a blue circle", "prompt": "draw a blue circle", "qa": [["what color is it?", "blue"]]}
/// ```
///
/// `text`, `prompt` and `qa` may be absent, `file_name` is relative to the metadata's folder and stays inside it,
/// other keys are ignored. A folder without one holds every PNG, JPEG and WebP file in it, sorted by
/// name; a `.txt` file of the same stem is the picture's caption. Folders inside are read likewise, by
/// their own metadata if they have one; names that begin with a dot are passed over.
#[derive(Debug, Clone)]
pub struct Folder {
    /// The folder.
    pub root: PathBuf,
    /// Its samples, in an order that depends on names and metadata alone.
    pub samples: Vec<Sample>,
}

#[derive(Deserialize)]
struct Line {
    file_name: String,
    text: Option<String>,
    prompt: Option<String>,
    qa: Option<Vec<(String, String)>>,
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
        let mut samples = Vec::new();
        read_folder(&root, 0, &mut samples)?;
        if samples.is_empty() {
            let what =
                format!("no pictures found; put PNG, JPEG or WebP files or a {METADATA} into this folder");
            return Err(Error::data(&root, what));
        }
        Ok(Folder { root, samples })
    }
}

/// The pictures that `paths` name: files as they are, folders as [`Folder::open`] lists them.
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

fn read_folder(folder: &Path, depth: usize, samples: &mut Vec<Sample>) -> Result<()> {
    if depth > MAX_DEPTH {
        let what = format!("folders are nested more than {MAX_DEPTH} deep; is this a loop of links?");
        return Err(Error::data(folder, what));
    }
    let metadata = folder.join(METADATA);
    if metadata.is_file() {
        return read_metadata(folder, &metadata, samples);
    }
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        if !entry.file_name().as_encoded_bytes().starts_with(b".") {
            paths.push(entry.path());
        }
    }
    paths.sort();
    for path in paths {
        if path.is_dir() {
            read_folder(&path, depth + 1, samples)?;
        } else if is_picture(&path) && path.is_file() {
            let caption = read_caption(&path.with_extension("txt"))?;
            samples.push(Sample { image: path, caption, prompt: None, qa: Vec::new() });
        }
    }
    Ok(())
}

fn is_picture(path: &Path) -> bool {
    path.extension().is_some_and(|e| EXTENSIONS.iter().any(|known| e.eq_ignore_ascii_case(known)))
}

fn read_caption(path: &Path) -> Result<Option<String>> {
    if !path.is_file() {
        return Ok(None);
    }
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let text = String::from_utf8(bytes)
        .map_err(|_| Error::data(path, "this caption is not UTF-8; convert it or remove it"))?;
    Ok(said(Some(text)))
}

/// A caption without the blanks around it, if anything is left.
fn said(text: Option<String>) -> Option<String> {
    text.map(|t| t.trim().to_string()).filter(|t| !t.is_empty())
}

fn read_metadata(folder: &Path, path: &Path, samples: &mut Vec<Sample>) -> Result<()> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    for (number, line) in bytes.split(|&b| b == b'\n').enumerate() {
        if line.trim_ascii().is_empty() {
            continue;
        }
        let wrong = |what: String| Error::data(path, format!("line {}: {what}", number + 1));
        let line: Line = serde_json::from_slice(line).map_err(|e| {
            // serde counts lines inside the one line that it was given.
            let reason = e.to_string();
            let reason = reason.split(" at line ").next().unwrap_or_default();
            wrong(format!(
                "{reason} (column {}); wanted {{\"file_name\": \"...\", \"text\": \"...\", \"prompt\": \"...\", \
                 \"qa\": [[\"question\", \"answer\"]]}} with all but file_name optional",
                e.column()
            ))
        })?;
        let name = Path::new(&line.file_name);
        let inside = name.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
        if !inside || line.file_name.is_empty() {
            let got = &line.file_name;
            return Err(wrong(format!(
                "file_name {got:?} is not a path inside this folder; move the picture there"
            )));
        }
        let image = folder.join(name);
        if !image.is_file() {
            let got = &line.file_name;
            return Err(wrong(format!("there is no file {got:?} in this folder; add it or remove the line")));
        }
        samples.push(Sample {
            image,
            caption: said(line.text),
            prompt: said(line.prompt),
            qa: line.qa.unwrap_or_default(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::scratch::Scratch;

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
            METADATA,
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
        assert_eq!(first.caption.as_deref(), Some("a béé"));
        assert_eq!(first.qa, [("q?".into(), "a".into()), ("r?".into(), "b".into())]);
        assert_eq!((&folder.samples[1].caption, folder.samples[1].qa.len()), (&None, 0));
        assert_eq!(folder.samples[2].qa, [("q?".into(), "yes".into())]);
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
        // A folder of its own metadata inside.
        dir.write("z/f.png", b"");
        dir.write("z/g.png", b"");
        dir.write("z/metadata.jsonl", b"{\"file_name\": \"g.png\", \"text\": \"g\"}\n");
        let folder = Folder::open(dir.root()).unwrap();
        let names: Vec<PathBuf> = folder.samples.iter().map(|s| s.image.clone()).collect();
        let want = ["a.png", "b.JPG", "sub/c.webp", "sub/d.jpeg", "z/g.png"].map(|n| dir.path(n));
        assert_eq!(names, want);
        assert_eq!(folder.samples[0].caption.as_deref(), Some("ein Kreis, größer"));
        assert!(folder.samples[1..4].iter().all(|s| s.caption.is_none()));
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
            ("{\"file_name\": \"b.png\"}", "line 2: there is no file \"b.png\" in this folder; add it or"),
        ] {
            dir.write(METADATA, format!("{good}{line}\n").as_bytes());
            let e = error(&dir);
            assert!(e.contains("metadata.jsonl: ") && e.contains(want), "{e}\nwanted {want}");
            assert!(!e.contains("at line 1"), "{e}");
        }
        dir.write(METADATA, b"\xff\xfe\n");
        assert!(error(&dir).contains("metadata.jsonl: line 1: "));
        dir.write(METADATA, b"\n");
        assert!(error(&dir).contains("no pictures found"));
    }

    #[test]
    fn a_caption_that_is_not_utf8_is_named() {
        let dir = Scratch::new("latin");
        dir.write("a.png", b"");
        dir.write("a.txt", b"gr\xfc\xdfe");
        assert!(error(&dir).contains("a.txt: this caption is not UTF-8"));
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
