//! Which source reads a folder or a file.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek};
use std::path::Path;

use super::parquet::TABLES;
use super::webdataset::SHARDS;
use crate::error::{Error, Result};

/// Bytes of a JSON file in which keys are looked for.
const HEAD: u64 = 1 << 20;

/// The name of the source that reads `path`, as in configurations.
pub(super) fn name(path: &Path) -> Result<&'static str> {
    // A pattern of shards names no file.
    let meta = std::fs::metadata(path);
    if meta.as_ref().is_ok_and(|m| m.is_dir()) {
        return folder(path);
    }
    let file = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let ends = |endings: &[&str]| endings.iter().any(|e| file.ends_with(e));
    if SHARDS.has(&file) {
        Ok("webdataset")
    } else if TABLES.has(&file) {
        Ok("parquet")
    } else if let Err(e) = meta {
        match e.kind() {
            ErrorKind::NotFound => absent(path),
            _ => Err(Error::io(path)(e)),
        }
    } else if ends(&[".vector"]) {
        Ok("vector")
    } else if ends(&[".json", ".jsonl"]) {
        json(path)
    } else {
        let what = "cannot tell what data this is; wanted a folder, or a file that ends in .tar, .tar.gz, .parquet, \
                    .vector, .json or .jsonl";
        Err(Error::data(path, what))
    }
}

/// The source for a pattern, by its first match.
fn absent(path: &Path) -> Result<&'static str> {
    let text = path.to_string_lossy();
    if !text.contains(['*', '?', '[', '{']) && !text.contains("::") {
        return Err(Error::data(path, "there is no such file or folder; correct the path"));
    }
    let first =
        glob::glob(&text).ok().and_then(|mut found| found.find_map(|at| at.ok().filter(|at| at.exists())));
    match first {
        Some(first) => name(&first),
        None => {
            let what = "cannot tell what data this pattern stands for; name the source, such as webdataset \
                        (--source or data.source), or correct the pattern";
            Err(Error::data(path, what))
        }
    }
}

fn folder(path: &Path) -> Result<&'static str> {
    let mut name = "folder";
    for entry in std::fs::read_dir(path).map_err(Error::io(path))? {
        let entry = entry.map_err(Error::io(path))?.file_name();
        let entry = entry.to_string_lossy();
        if entry.starts_with('.') {
            continue;
        }
        if ["metadata.jsonl", "metadata.csv"].contains(&&*entry) {
            // A list of pictures by name says more than files beside it.
            return Ok("folder");
        }
        if SHARDS.has(&entry) {
            name = "webdataset";
        } else if TABLES.has(&entry) && name == "folder" {
            name = "parquet";
        }
    }
    Ok(name)
}

/// Conversations and captions differ by their keys. COCO's annotations may stand after all of its pictures, at the end
/// of a large file, so that both ends are looked at.
fn json(path: &Path) -> Result<&'static str> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let (mut head, mut tail) = (Vec::new(), Vec::new());
    (&file).take(HEAD).read_to_end(&mut head).map_err(Error::io(path))?;
    let len = file.metadata().map_err(Error::io(path))?.len();
    file.seek(std::io::SeekFrom::Start(len.saturating_sub(HEAD))).map_err(Error::io(path))?;
    file.take(HEAD).read_to_end(&mut tail).map_err(Error::io(path))?;
    let has = |key: &str| {
        let key = format!("\"{key}\"");
        [&head, &tail].iter().any(|part| part.windows(key.len()).any(|w| w == key.as_bytes()))
    };
    let first = head.iter().find(|b| !b.is_ascii_whitespace() && !b"\xef\xbb\xbf".contains(b));
    match first {
        Some(b'{') if has("images") && (has("annotations") || has("sentences")) => Ok("coco"),
        Some(b'{' | b'[') if has("conversations") || has("messages") => Ok("llava"),
        _ => {
            let what = "cannot tell what data this is; wanted conversations or messages as of LLaVA, or images and \
                        annotations as of COCO";
            Err(Error::data(path, what))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Source;
    use crate::data::scratch::Scratch;

    #[test]
    fn sources_are_told_by_what_is_there() {
        let dir = Scratch::new("guess");
        let llava = br#"[{"id": 1, "conversations": []}]"#;
        let lines = b"\xef\xbb\xbf\n{\"images\": [\"a\"], \"messages\": []}\n";
        let far = format!("{{\"info\": \"{}\", \"images\": [], \"annotations\": []}}", "x".repeat(3 << 20));
        for (name, bytes) in [
            ("a.TAR", &b""[..]),
            ("b.tar.gz", b""),
            ("c.parquet", b""),
            ("d.vector", b""),
            ("e.json", llava),
            ("f.jsonl", lines),
            ("g.json", br#"{"images": [], "annotations": []}"#),
            ("h.json", far.as_bytes()),
            ("i.json", br#"{"images": [{"sentences": []}]}"#),
            ("j.json", b"[1, 2]"),
            ("k.json", b""),
            ("l.txt", b""),
            ("tars/a-0.tar", b""),
            ("tables/a.parquet", b""),
            ("tables/README.md", b""),
            ("packed/a.tar.gz", b""),
            ("upper/a.TGZ", b""),
            ("upper tables/a.Parquet", b""),
            ("plain/a.png", b""),
            ("listed/a.tar", b""),
            ("listed/metadata.jsonl", b""),
        ] {
            dir.write(name, bytes);
        }
        for (path, want) in [
            ("a.TAR", "webdataset"),
            ("b.tar.gz", "webdataset"),
            ("c.parquet", "parquet"),
            ("d.vector", "vector"),
            ("e.json", "llava"),
            ("f.jsonl", "llava"),
            ("g.json", "coco"),
            ("h.json", "coco"),
            ("i.json", "coco"),
            ("tars", "webdataset"),
            ("tables", "parquet"),
            ("packed", "webdataset"),
            ("upper", "webdataset"),
            ("upper tables", "parquet"),
            ("tars/*", "webdataset"),
            ("tars/a-{0..1}.tar", "webdataset"),
            ("plain", "folder"),
            ("listed", "folder"),
        ] {
            assert_eq!(name(&dir.path(path)).unwrap(), want, "{path}");
        }
        for (path, want) in [
            ("j.json", "cannot tell"),
            ("k.json", "cannot tell"),
            ("l.txt", "ends in"),
            ("m", "m: there is no such file or folder; correct the path"),
            ("m/*", "m/*: cannot tell what data this pattern stands for; name the source"),
        ] {
            let e = name(&dir.path(path)).unwrap_err().to_string();
            assert!(e.contains(want), "{e}");
        }
        assert_eq!(Source::guess(&dir.path("e.json")).unwrap(), Source::Llava);
        assert_eq!(Source::guess(&dir.path("tables")).unwrap(), Source::Parquet);
        assert_eq!(Source::guess(&dir.path("g.json")).unwrap(), Source::Coco);
        assert_eq!(Source::guess(&dir.path("plain")).unwrap(), Source::Folder);
    }
}
