//! Tables in Parquet files, with pictures as Hugging Face stores them.

mod columns;
mod footer;
mod pages;
mod table;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use serde_json::{Value, json};

use self::columns::{Images, Layout, Turns};
use self::table::{Handles, Table};
use super::bitmap::{self, Bitmap};
use super::cache::Skipped;
use super::conversation::chat;
use super::folder::is_inside;
use super::pattern::{self, Kind};
use super::plain::trimmed;
use super::sample::{Chat, Sample};
use super::source::{Columns, DataSource, Listed, Pictures, Wanted};
use super::texts::joined;
use crate::error::{Error, Result};
use crate::files::parent;

/// Bytes of a single text.
const MAX_TEXT: usize = 1 << 20;
/// Bytes of all texts of a file: this many, and as often the size of the file as equal texts may be stored once.
const MAX_TEXTS: u64 = 256 << 20;
const REPEATED: u64 = 64;

/// Tables in Parquet files.
pub(super) struct FromParquet;

impl DataSource for FromParquet {
    fn name(&self) -> &'static str {
        "parquet"
    }

    fn open(&self, part: &Wanted) -> Result<Listed> {
        let path = part.path.unwrap_or(Path::new(""));
        let mut ignored = Skipped::default();
        let paths = pattern::files(path, TABLES, &mut ignored)?;
        let handles = Arc::new(Handles::default());
        let read: Vec<(Table, Rows)> = paths
            .par_iter()
            .enumerate()
            .map(|(number, path)| {
                let table = Table::open(path, number, handles.clone())?;
                let rows = rows(&table, part.columns, part.images.unwrap_or(parent(path)))?;
                Ok((table, rows))
            })
            .collect::<Result<_>>()?;
        let (mut tables, mut samples, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for (table, rows) in read {
            for (sample, place) in rows.found {
                samples.push(sample);
                places.push(match place {
                    Place::Row(row) => (tables.len(), row, rows.image),
                    Place::File => (usize::MAX, 0, rows.image),
                });
            }
            ignored.join(rows.ignored);
            tables.push(table);
        }
        if samples.is_empty() {
            let what = match ignored.count {
                0 => "the table has no rows".to_string(),
                n => format!("no rows with pictures found; {n} ignored: {}", ignored.names()),
            };
            return Err(Error::data(path, what));
        }
        let images = part.images.map(PathBuf::from);
        let names = samples.iter().map(|s| s.image.clone()).collect();
        let pictures = Box::new(Cells { tables, places, names, images });
        // So that the names of samples do not depend on where the data set lies.
        let root = pattern::common(&paths);
        Ok(Listed { root, samples, pictures, ignored, about: Vec::new() })
    }
}

/// The files of this source.
pub(super) const TABLES: Kind = Kind { noun: "table", endings: &[".parquet"], beside: None };

/// Where a picture is.
enum Place {
    /// The number of its row in the file.
    Row(u64),
    /// In a file of its own, which the sample names.
    File,
}

/// The samples of a file.
struct Rows {
    /// The leaf of the pictures' bytes.
    image: usize,
    found: Vec<(Sample, Place)>,
    ignored: Skipped,
}

fn rows(table: &Table, columns: &Columns, images: &Path) -> Result<Rows> {
    let layout = Layout::new(table.meta.file_metadata(), columns).map_err(|e| Error::data(&table.path, e))?;
    let mut ignored = Skipped::default();
    for why in &layout.unread {
        ignored.add(&table.path, why);
    }
    let texts = AtomicU64::new(0);
    let groups: Vec<Rows> = (0..table.groups())
        .into_par_iter()
        .map(|group| Group { table, group, images, texts: &texts, ignored: Skipped::default() }.rows(&layout))
        .collect::<Result<_>>()?;
    let mut found = Vec::new();
    for group in groups {
        found.extend(group.found);
        ignored.join(group.ignored);
    }
    Ok(Rows { image: layout.image.bytes.unwrap_or(usize::MAX), found, ignored })
}

/// A row group while its texts are read.
struct Group<'a> {
    table: &'a Table,
    group: usize,
    images: &'a Path,
    /// Bytes of the texts of the file so far.
    texts: &'a AtomicU64,
    ignored: Skipped,
}

/// The texts of each row; `None` for nulls.
type Texts = Vec<Vec<Option<String>>>;

impl Group<'_> {
    fn rows(mut self, layout: &Layout) -> Result<Rows> {
        let rows = self.table.rows(self.group);
        let n = (rows.end - rows.start) as usize;
        let mut samples = vec![Sample::default(); n];
        for &leaf in &layout.captions {
            for (sample, texts) in samples.iter_mut().zip(self.texts(leaf)?) {
                let texts = texts.into_iter().flatten().filter(|t| !t.is_empty()).collect();
                sample.captions = joined(std::mem::take(&mut sample.captions), texts);
            }
        }
        if let Some(leaf) = layout.prompt {
            for (sample, texts) in samples.iter_mut().zip(self.texts(leaf)?) {
                sample.prompt = texts.into_iter().flatten().find(|t| !t.is_empty());
            }
        }
        if let Some((question, answer)) = layout.qa {
            let (questions, answers) = (self.texts(question)?, self.texts(answer)?);
            for (i, (questions, answers)) in questions.into_iter().zip(answers).enumerate() {
                if questions.len() != answers.len() {
                    let why = format!("{} questions with {} answers", questions.len(), answers.len());
                    self.ignore(rows.start + i as u64, why);
                    continue;
                }
                for pair in questions.into_iter().zip(answers) {
                    match pair {
                        (Some(q), Some(a)) if !q.is_empty() && !a.is_empty() => {
                            samples[i].chats.push(Chat::of(q, a));
                        }
                        (None, None) => {}
                        _ => self.ignore(rows.start + i as u64, "a question or its answer is empty"),
                    }
                }
            }
        }
        if let Some(turns) = &layout.conversations {
            for (i, value) in self.conversations(turns)?.into_iter().enumerate() {
                match value.map(|value| chat(&value)) {
                    None => {}
                    Some(Ok(talk)) => samples[i].chats.push(talk.chat),
                    Some(Err(why)) => self.ignore(rows.start + i as u64, why),
                }
            }
        }
        let mut found = Vec::with_capacity(n);
        let places = self.places(&layout.image)?;
        for ((row, mut sample), place) in rows.clone().zip(samples).zip(places) {
            let name = self.name(row);
            let place = match place {
                Found::Here => {
                    sample.image = name;
                    Place::Row(row)
                }
                Found::File(path) if is_inside(&path) => {
                    sample.image = self.images.join(path);
                    Place::File
                }
                Found::File(path) => {
                    self.ignored
                        .add(&name, format!("its picture {path:?} is not inside {}", self.images.display()));
                    continue;
                }
                Found::Nowhere => {
                    self.ignored.add(&name, "it has no picture");
                    continue;
                }
            };
            found.push((sample, place));
        }
        Ok(Rows { image: 0, found, ignored: self.ignored })
    }

    /// The place of a row in messages.
    fn name(&self, row: u64) -> PathBuf {
        self.table.path.join(row.to_string())
    }

    fn ignore(&mut self, row: u64, why: impl Into<String>) {
        let name = self.name(row);
        self.ignored.add(&name, why);
    }

    /// The texts of column `leaf`, trimmed, for each row. What is no text is ignored.
    fn texts(&mut self, leaf: usize) -> Result<Texts> {
        let rows = self.table.rows(self.group);
        let mut all: Texts = vec![Vec::new(); (rows.end - rows.start) as usize];
        let most = MAX_TEXTS + REPEATED * self.table.bytes();
        let mut bad = Vec::new();
        self.table.entries(self.group, leaf, &mut |row, value| {
            let text = value.and_then(|bytes| match std::str::from_utf8(bytes) {
                Ok(text) if text.len() <= MAX_TEXT => Some(trimmed(text).to_string()),
                Ok(_) => {
                    bad.push((row, "a text has more than a MiB"));
                    None
                }
                Err(_) => {
                    bad.push((row, "a text is not UTF-8"));
                    None
                }
            });
            // The memory of an entry counts too, even if there is no text.
            let more = text.as_ref().map_or(0, String::len) as u64 + size_of::<Option<String>>() as u64;
            if self.texts.fetch_add(more, Ordering::Relaxed) + more > most {
                return Err(format!("the texts have more than {most} bytes; split the file"));
            }
            if let Some(row) = all.get_mut(row) {
                row.push(text);
            }
            Ok(())
        })?;
        for (row, why) in bad {
            self.ignore(rows.start + row as u64, why);
        }
        Ok(all)
    }

    /// The conversation of each row, as [`chat`] reads it.
    fn conversations(&mut self, turns: &Turns) -> Result<Vec<Option<Value>>> {
        match turns {
            Turns::Json(leaf) => {
                let parse = |texts: Vec<Option<String>>| {
                    let text = texts.into_iter().flatten().find(|t| !t.is_empty())?;
                    Some(serde_json::from_str(&text).unwrap_or(Value::String(text)))
                };
                Ok(self.texts(*leaf)?.into_iter().map(parse).collect())
            }
            Turns::Pairs([(first, a), (second, b)]) => {
                let pair = |(a, b)| json!({ *first: a, *second: b });
                let row = |(a, b): (Vec<_>, Vec<_>)| match a.is_empty() && b.is_empty() {
                    true => None,
                    false => Some(Value::Array(a.into_iter().zip(b).map(pair).collect())),
                };
                Ok(self.texts(*a)?.into_iter().zip(self.texts(*b)?).map(row).collect())
            }
        }
    }

    /// Where the pictures of all rows are.
    fn places(&mut self, image: &Images) -> Result<Vec<Found>> {
        let rows = self.table.rows(self.group);
        let n = (rows.end - rows.start) as usize;
        let mut places: Vec<Found> = match image.bytes {
            None => (0..n).map(|_| Found::Nowhere).collect(),
            Some(leaf) => {
                let here = self.present(leaf, n, image)?;
                here.into_iter().map(|here| if here { Found::Here } else { Found::Nowhere }).collect()
            }
        };
        if let Some(leaf) = image.path
            && places.iter().any(|p| matches!(p, Found::Nowhere))
        {
            for (place, texts) in places.iter_mut().zip(self.texts(leaf)?) {
                let path = texts.into_iter().flatten().find(|t| !t.is_empty());
                if let (Found::Nowhere, Some(path)) = (&place, path) {
                    *place = Found::File(path);
                }
            }
        }
        Ok(places)
    }

    /// Which rows have bytes. Pictures are read for this only if the metadata counts nulls among them, but not all, or
    /// does not count them and there are names; without names, a missing picture is found at its use.
    fn present(&self, leaf: usize, n: usize, image: &Images) -> Result<Vec<bool>> {
        let column = self.table.meta.row_group(self.group).column(leaf);
        let nulls = column.statistics().and_then(|s| s.null_count_opt());
        // A name may stand for a picture without bytes.
        let nulls = nulls.unwrap_or(if image.path.is_some() { 1 } else { 0 });
        if image.listed || nulls == 0 {
            return Ok(vec![true; n]);
        }
        let mut here = vec![false; n];
        if nulls < n as u64 || n == 1 {
            self.table.entries(self.group, leaf, &mut |row, value| {
                here.get_mut(row).into_iter().for_each(|here| *here = value.is_some());
                Ok(())
            })?;
        }
        Ok(here)
    }
}

/// What a row says about its picture.
enum Found {
    Here,
    File(String),
    Nowhere,
}

/// The pictures of tables.
#[derive(Debug)]
struct Cells {
    tables: Vec<Table>,
    /// For each sample the number of its table, which does not exist for a picture in a file of its own, its row, and
    /// the leaf of the bytes.
    places: Vec<(usize, u64, usize)>,
    names: Vec<PathBuf>,
    images: Option<PathBuf>,
}

impl Cells {
    /// Passes the bytes of a picture to `with`.
    fn picture<T>(&self, sample: usize, with: impl FnOnce(&[u8], &Path) -> Result<T>) -> Result<T> {
        let (name, (table, row, leaf)) = (&self.names[sample], self.places[sample]);
        let Some(table) = self.tables.get(table) else {
            return with(&bitmap::read(name)?, name);
        };
        let values = table.values(leaf, row).map_err(|e| match e {
            Error::Data { what, .. } => Error::data(name, what),
            e => {
                table.close();
                e
            }
        })?;
        match &values[..] {
            [bytes] => with(bytes.data(), name),
            [] => Err(Error::data(name, "it has no picture")),
            all => Err(Error::data(name, format!("it has {} pictures, wanted one", all.len()))),
        }
    }
}

impl Pictures for Cells {
    fn decode(&self, sample: usize, shorter: usize) -> Result<Bitmap> {
        self.picture(sample, |bytes, name| Bitmap::decode(bytes, name, shorter))
    }

    fn encoded(&self, sample: usize) -> Result<Option<Vec<u8>>> {
        self.picture(sample, |bytes, _| Ok(Some(bytes.to_vec())))
    }

    fn folder(&self, sample: usize) -> Option<&Path> {
        match (self.tables.get(self.places[sample].0), &self.images) {
            (Some(table), _) => Some(parent(&table.path)),
            (None, Some(images)) => Some(images),
            (None, None) => Some(parent(&self.tables.first()?.path)),
        }
    }
}
