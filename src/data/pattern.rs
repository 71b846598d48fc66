//! The names of files that a source reads: brace ranges, wildcards, folders, several patterns.

use std::path::{Path, PathBuf};

use super::cache::Skipped;
use crate::error::{Error, Result};
use crate::files::parent;

/// Maximum number of names that braces stand for.
const MAX_NAMES: usize = 100_000;
/// The files that a source reads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    /// What one is called.
    pub noun: &'static str,
    /// Endings of their names.
    pub endings: &'static [&'static str],
    /// Ending of files that the program keeps beside them.
    pub beside: Option<&'static str>,
}

impl Kind {
    /// Whether a name ends as those of the files, in upper or lower case.
    pub fn has(&self, name: &str) -> bool {
        let name = name.to_ascii_lowercase();
        self.endings.iter().any(|ending| name.ends_with(ending))
    }

    /// Whether a name is that of a file kept beside the others.
    fn is_beside(&self, name: &str) -> bool {
        self.beside.is_some_and(|ending| name.ends_with(ending))
    }
}

/// The files that `path` names, in the order of the patterns, each once.
pub(super) fn files(path: &Path, kind: Kind, ignored: &mut Skipped) -> Result<Vec<PathBuf>> {
    let Some(text) = path.to_str() else {
        return match path.exists() {
            true => one(path, kind, ignored),
            false => Err(Error::data(path, "there is no such file or folder; correct the path")),
        };
    };
    for scheme in ["http:", "https:", "s3:", "gs:", "hf:", "pipe:"] {
        let part = |p: &str| p.split('/').any(|c| c == scheme || scheme == "pipe:" && c.starts_with(scheme));
        if text.split("::").any(part) {
            let what = format!("{}s at {scheme} are not read; download them and name the files", kind.noun);
            return Err(Error::data(path, what));
        }
    }
    let mut all: Vec<PathBuf> = Vec::new();
    if path.exists() {
        all = one(path, kind, ignored)?;
    } else {
        let mut parts = text.split("::");
        let first = parts.next().unwrap_or_default();
        let folder = folder_of(first);
        all.extend(pattern(path, first, kind, ignored)?);
        for part in parts.filter(|p| !p.is_empty()) {
            let full = if Path::new(part).is_absolute() { part.into() } else { format!("{folder}{part}") };
            all.extend(pattern(path, &full, kind, ignored)?);
        }
    }
    let mut seen = std::collections::HashSet::new();
    all.retain(|shard| {
        let new = seen.insert(shard.clone());
        if !new {
            ignored.add(shard, format!("this {} is named twice; it is read once", kind.noun));
        }
        new
    });
    Ok(all)
}

/// The deepest folder that holds all files.
pub(super) fn common(files: &[PathBuf]) -> PathBuf {
    let mut folder = files.first().map_or(Path::new("."), |f| parent(f)).to_path_buf();
    for file in files {
        while !parent(file).starts_with(&folder) && folder.pop() {}
    }
    if folder == Path::new("") { ".".into() } else { folder }
}

/// The text up to the last slash outside of braces.
fn folder_of(part: &str) -> &str {
    let (mut depth, mut end) = (0usize, 0);
    for (i, c) in part.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            '/' if depth == 0 => end = i + 1,
            _ => {}
        }
    }
    &part[..end]
}

/// The files of one pattern; errors are about `whole`.
fn pattern(whole: &Path, part: &str, kind: Kind, ignored: &mut Skipped) -> Result<Vec<PathBuf>> {
    let (mut found, mut absent) = (Vec::new(), Vec::new());
    let names = expand(part).map_err(|what| Error::data(whole, what))?;
    for name in &names {
        let path = Path::new(name);
        if path.exists() {
            found.extend(one(path, kind, ignored)?);
        } else if name.contains(['*', '?', '[']) {
            let matches = globbed(name, kind).map_err(|what| Error::data(whole, what))?;
            if matches.is_empty() {
                absent.push(name);
            }
            found.extend(matches);
        } else {
            absent.push(name);
        }
    }
    let Some(first) = absent.first() else { return Ok(found) };
    let noun = kind.noun;
    let what = match (first.contains(['*', '?', '[']), names.len(), absent.len()) {
        (true, ..) => format!("no {noun} matches this pattern; correct it or fetch the data first"),
        (_, 1, _) => format!("there is no such {noun} or folder; fetch the data first or correct the path"),
        (_, n, 1) => format!(
            "this {noun} is absent, one of {n} that the braces stand for; fetch it or correct the range"
        ),
        (_, n, a) => format!(
            "this {noun} is absent, and {} more of the {n} that the braces stand for; fetch them or correct the range",
            a - 1
        ),
    };
    Err(Error::data(first, what))
}

/// A file, or the files in a folder.
fn one(path: &Path, kind: Kind, ignored: &mut Skipped) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.into()]);
    }
    let (noun, endings) = (kind.noun, kind.endings.join(", "));
    let mut shards = Vec::new();
    for entry in std::fs::read_dir(path).map_err(Error::io(path))? {
        let entry = entry.map_err(Error::io(path))?;
        let (name, at) = (entry.file_name(), entry.path());
        let name = name.to_string_lossy();
        if name.starts_with('.') || kind.is_beside(&name) {
            continue;
        }
        match kind.has(&name) && at.is_file() {
            true => shards.push(at),
            false => ignored.add(&at, format!("this is not a {noun}: its name does not end in {endings}")),
        }
    }
    shards.sort();
    if shards.is_empty() {
        let what = format!(
            "there are no {noun}s in this folder; name the folder or the files that end in {endings}"
        );
        return Err(Error::data(path, what));
    }
    Ok(shards)
}

fn globbed(name: &str, kind: Kind) -> std::result::Result<Vec<PathBuf>, String> {
    let options = glob::MatchOptions {
        case_sensitive: true,
        require_literal_separator: true,
        require_literal_leading_dot: true,
    };
    let paths = glob::glob_with(name, options).map_err(|e| format!("{name:?} is no pattern: {}", e.msg))?;
    let mut found = Vec::new();
    for path in paths {
        let path = path.map_err(|e| format!("{} cannot be read ({})", e.path().display(), e.error()))?;
        let is_index = kind.is_beside(&path.as_os_str().to_string_lossy());
        if path.is_file() && !is_index {
            found.push(path);
        }
    }
    Ok(found)
}

/// All texts that a text with braces stands for: `{a,b}`, `{000..015}`, also nested.
fn expand(text: &str) -> std::result::Result<Vec<String>, String> {
    let mut done = Vec::new();
    // The last one is the next in order.
    let mut open = vec![text.to_string()];
    while let Some(text) = open.pop() {
        let Some((first, last)) = group(&text)? else {
            done.push(text);
            continue;
        };
        let (before, inside, after) = (&text[..first], &text[first + 1..last], &text[last + 1..]);
        let choices = choices(inside)?;
        if done.len() + open.len() + choices.len() > MAX_NAMES {
            return Err(format!(
                "the braces stand for more than {MAX_NAMES} names; use a wildcard such as *"
            ));
        }
        open.extend(choices.into_iter().rev().map(|choice| format!("{before}{choice}{after}")));
    }
    Ok(done)
}

/// The places of the first brace and of the one that closes it.
fn group(text: &str) -> std::result::Result<Option<(usize, usize)>, String> {
    let Some(first) = text.find('{') else { return Ok(None) };
    let mut depth = 0;
    for (i, c) in text[first..].char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Ok(Some((first, first + i)));
        }
    }
    Err(format!("{text:?} has a brace that is not closed; wanted {{a,b}} or {{000..015}}"))
}

/// What the content of braces stands for.
fn choices(inside: &str) -> std::result::Result<Vec<String>, String> {
    let (mut all, mut depth, mut from) = (Vec::new(), 0usize, 0);
    for (i, c) in inside.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                all.push(inside[from..i].to_string());
                from = i + 1;
            }
            _ => {}
        }
    }
    all.push(inside[from..].to_string());
    if all.len() > 1 {
        return Ok(all);
    }
    let wanted = || format!("{{{inside}}} is neither a list nor a range; wanted {{a,b}} or {{000..015}}");
    let (first, last) = inside.split_once("..").ok_or_else(wanted)?;
    let digits = |text: &str| {
        let right = (1..=19).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
        right.then(|| text.parse::<u64>().ok()).flatten().ok_or_else(wanted)
    };
    let (a, b) = (digits(first)?, digits(last)?);
    if a.abs_diff(b) >= MAX_NAMES as u64 {
        return Err(format!("{{{inside}}} stands for more than {MAX_NAMES} names; use a wildcard such as *"));
    }
    // As in a shell, leading zeros ask for numbers of equal width.
    let padded = [first, last].iter().any(|t| t.len() > 1 && t.starts_with('0'));
    let width = if padded { first.len().max(last.len()) } else { 0 };
    let name = |n: u64| format!("{n:0width$}");
    Ok(if a <= b { (a..=b).map(name).collect() } else { (b..=a).rev().map(name).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::scratch::Scratch;
    use crate::data::webdataset::SHARDS;

    fn names(text: &str) -> Vec<String> {
        expand(text).unwrap()
    }

    #[test]
    fn braces_stand_for_lists_and_ranges() {
        assert_eq!(names("a.tar"), ["a.tar"]);
        assert_eq!(names("a-{008..011}.tar"), ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]);
        assert_eq!(names("{9..11}"), ["9", "10", "11"]);
        assert_eq!(names("{2..0}"), ["2", "1", "0"]);
        assert_eq!(names("{a,b}-{0..1}"), ["a-0", "a-1", "b-0", "b-1"]);
        assert_eq!(names("{x{1..2},y,}z"), ["x1z", "x2z", "yz", "z"]);
        assert_eq!(names("}a"), ["}a"]);
        assert_eq!(names("{0..99999}").len(), 100_000);
        for (text, want) in [
            ("a{b", "has a brace that is not closed"),
            ("{a}", "{a} is neither a list nor a range; wanted {a,b} or {000..015}"),
            ("{}", "neither a list nor a range"),
            ("{a..c}", "neither a list nor a range"),
            ("{-1..3}", "neither a list nor a range"),
            ("{0..99999999999999999999}", "neither a list nor a range"),
            ("{0..100000}", "more than 100000 names"),
            ("{0..999}{0..999}", "more than 100000 names"),
            ("{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}", "more than 100000 names"),
        ] {
            let e = expand(text).unwrap_err();
            assert!(e.contains(want), "{text}: {e}");
        }
    }

    #[test]
    fn patterns_find_shards_and_errors_say_what_is_missing() {
        let dir = Scratch::new("patterns");
        for name in ["s/a-0.tar", "s/a-1.tar", "s/a-2.tar", "s/b.tgz", "s/c.tar.gz", "s/notes.md", "t/d.tar"]
        {
            dir.write(name, b"");
        }
        dir.write("s/a-0.tar.ett-index", b"");
        dir.write("s/.hidden.tar", b"");
        dir.write("[odd]/{x,y}.tar", b"");
        dir.write("empty/notes.md", b"");
        let find = |pattern: &str| -> std::result::Result<Vec<String>, String> {
            let mut ignored = Skipped::default();
            let found = files(&dir.path(pattern), SHARDS, &mut ignored).map_err(|e| e.to_string())?;
            let name = |p: &PathBuf| p.strip_prefix(dir.root()).unwrap().display().to_string();
            Ok(found.iter().map(name).collect())
        };
        let ranged = ["s/a-0.tar", "s/a-1.tar"].map(String::from).to_vec();
        assert_eq!(find("s/a-{0..1}.tar").unwrap(), ranged);
        assert_eq!(find("s/a-[01].tar").unwrap(), ranged);
        assert_eq!(find("s/a-?.tar").unwrap().len(), 3);
        assert_eq!(find("s/*").unwrap().len(), 6);
        assert_eq!(find("s").unwrap(), ["s/a-0.tar", "s/a-1.tar", "s/a-2.tar", "s/b.tgz", "s/c.tar.gz"]);
        assert_eq!(find("*/{b,d}*").unwrap(), ["s/b.tgz", "t/d.tar"]);
        // Later parts are relative to the folder of the first one, or absolute.
        assert_eq!(
            find("s/a-1.tar::a-0.tar::../t/d.tar").unwrap(),
            ["s/a-1.tar", "s/a-0.tar", "s/../t/d.tar"]
        );
        let absolute = format!("s/a-1.tar::{}", dir.path("t/*.tar").display());
        assert_eq!(find(&absolute).unwrap(), ["s/a-1.tar", "t/d.tar"]);
        assert_eq!(find("s/a-1.tar::a-*.tar").unwrap(), ["s/a-1.tar", "s/a-0.tar", "s/a-2.tar"]);
        // A name that exists is no pattern.
        assert_eq!(find("[odd]/{x,y}.tar").unwrap(), ["[odd]/{x,y}.tar"]);
        assert_eq!(find("[odd]").unwrap(), ["[odd]/{x,y}.tar"]);
        for (pattern, want) in [
            (
                "s/a-{1..9}.tar",
                "s/a-3.tar: this shard is absent, and 6 more of the 9 that the braces stand for",
            ),
            ("s/a-{1..3}.tar", "s/a-3.tar: this shard is absent, one of 3 that"),
            ("s/x*.tar", "s/x*.tar: no shard matches this pattern; correct it or fetch the data first"),
            ("s/x.tar", "s/x.tar: there is no such shard or folder; fetch"),
            ("s/a-0.tar::x.tar", "s/x.tar: there is no such shard"),
            ("s/a[.tar", "is no pattern"),
            ("empty", "empty: there are no shards in this folder; name"),
            ("s/a-{0..1.tar", "brace that is not closed"),
            ("https://host/a.tar", "shards at https: are not read; download them"),
            ("pipe:curl a.tar", "shards at pipe: are not read"),
        ] {
            let e = find(pattern).unwrap_err();
            assert!(e.contains(want), "{pattern}: {e}");
        }
    }
}
