//! One Parquet file: its metadata, and values of its columns.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use parquet::basic::{Compression, Repetition, Type};
use parquet::column::reader::ColumnReaderImpl;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};

use super::super::bitmap::MAX_BYTES;
use super::footer;
use super::pages::{Fallible, FileBytes, Pages, bytes_at};
use crate::error::{Error, Result};

/// Files that are kept open.
const OPEN: usize = 64;
/// Bytes at the beginning and at the end of every Parquet file.
const MAGIC: &[u8] = b"PAR1";
/// Entries that a column may have even in a small file: equal values take next to no space.
const FEW: u64 = 1 << 20;
/// Rows whose levels and values are read at once.
const BATCH: usize = 256;

/// A Parquet file with its metadata.
#[derive(Debug)]
pub(super) struct Table {
    pub path: PathBuf,
    pub meta: ParquetMetaData,
    /// The number of the first row of each row group, and of all rows.
    starts: Vec<u64>,
    len: u64,
    number: usize,
    handles: Arc<Handles>,
}

/// The files that were opened last, held open.
#[derive(Debug, Default)]
pub(super) struct Handles(Mutex<VecDeque<(usize, Arc<File>)>>);

impl Handles {
    fn get(&self, number: usize, path: &Path) -> io::Result<Arc<File>> {
        let open = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, file)) = open().iter().find(|(n, _)| *n == number) {
            return Ok(file.clone());
        }
        let file = Arc::new(File::open(path)?);
        let mut open = open();
        open.truncate(OPEN - 1);
        open.push_front((number, file.clone()));
        Ok(file)
    }

    /// Closes a file, so that it is opened again after a failure of a network.
    fn close(&self, number: usize) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|(n, _)| *n != number);
    }
}

/// What is called with the number of a row and an entry of it; `None` for null. Returns why the entry is wrong.
type Each<'a> = dyn FnMut(usize, Option<&[u8]>) -> std::result::Result<(), String> + 'a;

impl Table {
    /// Reads the metadata of file `number`.
    pub fn open(path: &Path, number: usize, handles: Arc<Handles>) -> Result<Table> {
        let wrong = |what: String| Error::data(path, format!("{what}; write or fetch the file again"));
        if !std::fs::metadata(path).map_err(Error::io(path))?.is_file() {
            return Err(Error::data(
                path,
                "this is not a file; name Parquet files or the folder that holds them",
            ));
        }
        let file = handles.get(number, path).map_err(Error::io(path))?;
        let len = file.metadata().map_err(Error::io(path))?.len();
        let read = |at, n| bytes_at(&file, at, n).map_err(|e| failed(path, e.into()));
        if len < 12 {
            return Err(wrong(format!("this has {len} bytes, too few for a Parquet file")));
        }
        let tail = read(len - 8, 8)?;
        if &tail[4..] != MAGIC || read(0, 4)? != MAGIC {
            return Err(wrong(
                "this is not a complete Parquet file: it does not begin and end with PAR1".into(),
            ));
        }
        let footer = u64::from(u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]));
        if footer > len - 12 || footer > MAX_BYTES {
            return Err(wrong(format!("its metadata would have {footer} bytes, but the file has {len}")));
        }
        let metadata = read(len - 8 - footer, footer as usize)?;
        footer::check(&metadata).map_err(wrong)?;
        let meta = guarded(|| ParquetMetaDataReader::decode_metadata(&metadata))
            .map_err(|e| wrong(format!("its metadata cannot be read ({})", plain(&e))))?;
        let mut table = Table { path: path.into(), meta, starts: vec![0], len, number, handles };
        table.check().map_err(wrong)?;
        Ok(table)
    }

    /// Checks what the metadata says about places and sizes, which the reader relies on.
    fn check(&mut self) -> std::result::Result<(), String> {
        let mut rows = 0u64;
        let leaves = self.meta.file_metadata().schema_descr().num_columns();
        for (g, group) in self.meta.row_groups().iter().enumerate() {
            rows = u64::try_from(group.num_rows()).ok().and_then(|n| rows.checked_add(n)).unwrap_or(u64::MAX);
            if rows > self.most() {
                return Err(format!("row group {g} declares more rows than its {} bytes can hold", self.len));
            }
            self.starts.push(rows);
            if group.num_columns() != leaves {
                return Err(format!("row group {g} has {} columns, wanted {leaves}", group.num_columns()));
            }
            for column in group.columns() {
                let start = column.dictionary_page_offset().unwrap_or(column.data_page_offset());
                let (start, n) = (u64::try_from(start).ok(), u64::try_from(column.compressed_size()).ok());
                let end = start.and_then(|s| s.checked_add(n?));
                if end.is_none_or(|end| end > self.len) {
                    let name = column.column_path();
                    return Err(format!("column {name} of row group {g} is not inside the file"));
                }
            }
        }
        Ok(())
    }

    /// Entries that a column may have.
    fn most(&self) -> u64 {
        self.len.max(FEW)
    }

    /// The size of the file in bytes.
    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// The number of row groups.
    pub fn groups(&self) -> usize {
        self.meta.num_row_groups()
    }

    /// The numbers of the rows of a row group, counted through the file.
    pub fn rows(&self, group: usize) -> std::ops::Range<u64> {
        self.starts[group]..self.starts[group + 1]
    }

    /// Closes the file until its next use.
    pub fn close(&self) {
        self.handles.close(self.number);
    }

    fn reader(&self, group: usize, leaf: usize) -> Fallible<ColumnReaderImpl<ByteArrayType>> {
        let column = self.meta.row_group(group).column(leaf);
        let compression = column.compression();
        match compression {
            // The other decoders of the parquet crate write as much as their input says, not as much as was declared.
            Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::ZSTD(_) | Compression::LZ4_RAW => {
            }
            other => {
                let name = other.to_string();
                let name = name.split('(').next().unwrap_or_default();
                let what = format!(
                    "it is compressed by {name}, wanted Snappy, Zstandard, LZ4_RAW or none; write the file again"
                );
                return Err(ParquetError::General(what));
            }
        }
        if column.column_type() != Type::BYTE_ARRAY {
            return Err(ParquetError::General(format!("it holds {}, wanted bytes", column.column_type())));
        }
        let bytes = FileBytes { file: self.handles.get(self.number, &self.path)?, len: self.len };
        let rows = self.meta.row_group(group).num_rows() as usize;
        let pages = Pages::new(bytes, column, rows, self.most())?;
        Ok(ColumnReaderImpl::new(column.column_descr_ptr(), Box::new(pages)))
    }

    /// The values of column `leaf` in a row of the file: one or none, or those of its list. Pages before it are not
    /// read.
    pub fn values(&self, leaf: usize, row: u64) -> Result<Vec<ByteArray>> {
        let group = self.starts.partition_point(|&s| s <= row) - 1;
        let before = (row - self.starts[group]) as usize;
        let read = guarded(|| {
            let mut reader = self.reader(group, leaf)?;
            let (mut values, mut def, mut rep) = (Vec::new(), Vec::new(), Vec::new());
            let skipped = reader.skip_records(before)?;
            let (rows, ..) = reader.read_records(1, Some(&mut def), Some(&mut rep), &mut values)?;
            match skipped == before && rows == 1 {
                true => Ok(values),
                false => Err(ParquetError::General(format!("its pages end before row {before}"))),
            }
        });
        read.map_err(|e| self.error(group, leaf, e))
    }

    /// Passes the entries of column `leaf` of a row group to `each`, with the number of their row in the group: `None`
    /// for nulls, which an empty list has none of. Lists are one level deep at most.
    pub fn entries(&self, group: usize, leaf: usize, each: &mut Each) -> Result<()> {
        let rows = self.meta.row_group(group).num_rows() as usize;
        let (list, most) = self.levels(leaf);
        let mut read = || {
            let mut reader = self.reader(group, leaf)?;
            let mut row = 0;
            while row < rows {
                let (mut values, mut def, mut rep) = (Vec::<ByteArray>::new(), Vec::new(), Vec::new());
                let (n, _, levels) = reader.read_records(
                    BATCH.min(rows - row),
                    Some(&mut def),
                    Some(&mut rep),
                    &mut values,
                )?;
                if n == 0 {
                    return Err(ParquetError::General(format!("its pages end after {row} rows of {rows}")));
                }
                let (mut values, mut at) = (values.iter(), 0);
                for i in 0..levels {
                    at += usize::from(i > 0 && rep.get(i).is_none_or(|&r| r == 0));
                    let def = def.get(i).copied().unwrap_or(most);
                    // Below the level of its list, there is no entry but an empty or missing list.
                    if def >= list {
                        let value = if def == most { values.next().map(ByteArray::data) } else { None };
                        each(row + at, value).map_err(ParquetError::General)?;
                    }
                }
                row += n;
            }
            Ok(())
        };
        guarded(&mut read).map_err(|e| self.error(group, leaf, e))
    }

    /// The definition level from which on a list has an entry (0 without a list), and that of values.
    fn levels(&self, leaf: usize) -> (i16, i16) {
        let column = self.meta.file_metadata().schema_descr().column(leaf);
        let (mut at, mut level, mut list) =
            (self.meta.file_metadata().schema_descr().root_schema_ptr(), 0, 0);
        for part in column.path().parts() {
            let next = at.is_group().then(|| at.get_fields().iter().find(|f| f.name() == part).cloned());
            let Some(next) = next.flatten() else { break };
            at = next;
            let kind = at.get_basic_info().has_repetition().then(|| at.get_basic_info().repetition());
            level += i16::from(matches!(kind, Some(Repetition::OPTIONAL | Repetition::REPEATED)));
            if kind == Some(Repetition::REPEATED) {
                list = level;
            }
        }
        (list, column.max_def_level())
    }

    fn error(&self, group: usize, leaf: usize, e: ParquetError) -> Error {
        let name = self.meta.row_group(group).column(leaf).column_path().string();
        match failed(&self.path, e) {
            Error::Data { path, what } => {
                Error::data(path, format!("column {name} of row group {group}: {what}"))
            }
            e => e,
        }
    }
}

/// Runs code of the parquet crate. On some damaged files it panics instead of returning an error: it unwraps the part of
/// a page's header that belongs to the type of the page, and asserts that a page does not end within the length of a
/// value. Of random changes to small files, one in 500 did one or the other.
fn guarded<T>(run: impl FnOnce() -> Fallible<T>) -> Fallible<T> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str);
        let said = said.or(panic.downcast_ref::<&str>().copied()).unwrap_or("the data is damaged");
        Err(ParquetError::General(said.into()))
    })
}

/// The message without the name of its kind.
fn plain(e: &ParquetError) -> String {
    match e {
        ParquetError::General(what) | ParquetError::EOF(what) | ParquetError::NYI(what) => what.clone(),
        other => other.to_string(),
    }
}

/// Failures of the operating system stay what they are, so that readers can wait for a lost network.
fn failed(path: &Path, e: ParquetError) -> Error {
    match e {
        ParquetError::External(e) => match e.downcast::<io::Error>() {
            Ok(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                Error::data(path, "the file ends too early; write or fetch it again")
            }
            Ok(e) if e.kind() == io::ErrorKind::InvalidData => Error::data(path, e),
            Ok(e) => Error::io(path)(*e),
            Err(e) => Error::data(path, e),
        },
        e => Error::data(path, plain(&e)),
    }
}
