//! Atomic writing of files: a file is written under a temporary name in the same folder, synced to disk, then
//! renamed.

use std::fs::File;
use std::io::{BufReader, BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Size and checksum of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Bytes.
    pub bytes: u64,
    /// CRC-32 of them.
    pub crc32: u32,
}

/// A new file; counts and checksums the bytes written to it.
pub struct FileWriter {
    /// The path in error messages.
    path: PathBuf,
    file: BufWriter<File>,
    bytes: u64,
    sum: crc32fast::Hasher,
}

impl FileWriter {
    /// Creates or empties the file.
    pub fn create(path: &Path) -> Result<Self> {
        Self::under(path, path)
    }

    /// Creates or empties the file `at`; error messages name `path`.
    fn under(at: &Path, path: &Path) -> Result<Self> {
        let file = BufWriter::with_capacity(1 << 20, File::create(at).map_err(Error::io(path))?);
        Ok(FileWriter { path: path.into(), file, bytes: 0, sum: crc32fast::Hasher::new() })
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends bytes.
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io(&self.path))?;
        self.bytes += bytes.len() as u64;
        self.sum.update(bytes);
        Ok(())
    }

    /// Waits until the file is on disk.
    pub fn finish(mut self) -> Result<Written> {
        self.file.flush().and_then(|()| self.file.get_ref().sync_all()).map_err(Error::io(&self.path))?;
        Ok(Written { bytes: self.bytes, crc32: self.sum.finalize() })
    }

    /// Flushes a device or a pipe, which cannot be synced.
    fn sent(mut self) -> Result<Written> {
        self.file.flush().map_err(Error::io(&self.path))?;
        Ok(Written { bytes: self.bytes, crc32: self.sum.finalize() })
    }
}

/// Writes a file and waits until it is on disk. Until then, the file may be incomplete; [`replace`] avoids that.
pub fn write_synced(path: &Path, bytes: &[u8]) -> Result<Written> {
    let mut file = FileWriter::create(path)?;
    file.put(bytes)?;
    file.finish()
}

/// Waits until the entries of a folder are on disk.
pub fn sync_dir(path: &Path) -> Result<()> {
    // On other systems folders cannot be opened for syncing.
    if !cfg!(unix) {
        return Ok(());
    }
    match File::open(path).and_then(|f| f.sync_all()) {
        // Some file systems, such as network shares, do not support syncing folders.
        Err(e) if matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(()),
        done => done.map_err(Error::io(path)),
    }
}

/// The destination of [`replace`].
enum Place {
    /// A new file, or an existing one with links resolved.
    File(PathBuf),
    /// A device or a pipe, such as `/dev/stdout`.
    Stream,
}

impl Place {
    fn of(path: &Path) -> Result<Self> {
        if path.file_name().is_none() {
            return Err(Error::data(path, "is not a file name; name a file to write"));
        }
        match std::fs::metadata(path) {
            Ok(m) if m.is_dir() => Err(Error::data(path, "is a folder; name a file to write")),
            Ok(m) if m.is_file() => match path.is_symlink() {
                true => Ok(Place::File(std::fs::canonicalize(path).map_err(Error::io(path))?)),
                false => Ok(Place::File(path.into())),
            },
            Ok(_) => Ok(Place::Stream),
            Err(e) if e.kind() == ErrorKind::NotFound => match parent(path).is_dir() {
                true => Ok(Place::File(path.into())),
                false => Err(Error::data(path, "its folder does not exist; create it first")),
            },
            Err(e) => Err(Error::io(path)(e)),
        }
    }
}

/// The temporary name of a file until it is complete.
fn part(to: &Path) -> PathBuf {
    to.with_file_name(format!(".{}.part", to.file_name().unwrap_or_default().to_string_lossy()))
}

/// Creates or replaces a file atomically: at every moment, the name refers to the complete old file or the complete
/// new one. On an error the temporary file is removed. Devices and pipes are written to directly.
pub fn replace(path: &Path, fill: impl FnOnce(&mut FileWriter) -> Result<()>) -> Result<Written> {
    let to = match Place::of(path)? {
        Place::File(to) => to,
        Place::Stream => {
            let mut stream = FileWriter::create(path)?;
            fill(&mut stream)?;
            return stream.sent();
        }
    };
    let part = part(&to);
    let write = || {
        let mut file = FileWriter::under(&part, path)?;
        fill(&mut file)?;
        let written = file.finish()?;
        std::fs::rename(&part, &to).map_err(Error::io(path))?;
        Ok(written)
    };
    let written = write().inspect_err(|_| {
        let _ = std::fs::remove_file(&part);
    })?;
    sync_dir(parent(&to))?;
    Ok(written)
}

/// Fails if [`replace`] could not write this file now: for programs that work for a long time before they write.
pub fn probe(path: &Path) -> Result<()> {
    let Place::File(to) = Place::of(path)? else { return Ok(()) };
    let part = part(&to);
    FileWriter::under(&part, path)?;
    std::fs::remove_file(&part).map_err(Error::io(path))
}

/// The folder of a file.
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if p != Path::new("") => p,
        _ => Path::new("."),
    }
}

/// Size and checksum of a file on disk.
pub fn checksum(path: &Path) -> Result<Written> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let (mut bytes, mut sum, mut buffer) = (0, crc32fast::Hasher::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(Written { bytes, crc32: sum.finalize() }),
            Ok(n) => {
                bytes += n as u64;
                sum.update(&buffer[..n]);
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io(path)(e)),
        }
    }
}

/// Fails if a file is in a format that this program does not read: it reads those of `reads`.
pub fn check_format(path: &Path, format: u32, reads: RangeInclusive<u32>) -> Result<()> {
    if reads.contains(&format) {
        return Ok(());
    }
    let (first, last) = reads.into_inner();
    let which =
        if first < last { format!("the formats {first} to {last}") } else { format!("the format {last}") };
    let other = if format > last { "a newer" } else { "an older" };
    let what = format!("has the format {format}, but this program reads {which}; use {other} version of ett");
    Err(Error::Format { path: path.into(), what })
}

/// True if a write failed because the disk is full, or a quota or the maximum file size is exceeded.
pub fn is_full(e: &Error) -> bool {
    use ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(e, Error::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge))
}

/// A file to which lines are appended, such as `metrics.jsonl`.
pub struct Lines {
    path: PathBuf,
    /// `None`: they are written nowhere.
    file: Option<BufWriter<File>>,
    bytes: u64,
}

impl Lines {
    /// Lines that are written nowhere, as those of a rank that does not write the files of its run.
    pub fn nowhere() -> Self {
        Lines { path: PathBuf::new(), file: None, bytes: 0 }
    }

    /// Continues after the first `bytes` bytes, as returned by [`Lines::sync`] (0 for a new file); later lines are
    /// cut off. If the file is shorter or missing, its complete lines are kept and a warning is logged.
    pub fn resume(path: &Path, bytes: u64) -> Result<Self> {
        let io = |e| Error::io(path)(e);
        let mut file = File::options();
        let mut file = file.read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        let mut keep = bytes;
        if len < bytes {
            tracing::warn!(
                "{}: has {len} bytes, but had {bytes} at the checkpoint; lines are missing",
                path.display()
            );
            keep = whole_lines(&file).map_err(io)?;
        }
        file.set_len(keep).map_err(io)?;
        file.seek(SeekFrom::Start(keep)).map_err(io)?;
        Ok(Lines { path: path.into(), file: Some(BufWriter::new(file)), bytes: keep })
    }

    /// Appends a line, given without its line break.
    pub fn push(&mut self, line: &str) -> Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        writeln!(file, "{line}").map_err(Error::io(&self.path))?;
        self.bytes += line.len() as u64 + 1;
        Ok(())
    }

    /// Waits until all lines are on disk and returns their length in bytes.
    pub fn sync(&mut self) -> Result<u64> {
        if let Some(file) = &mut self.file {
            file.flush().and_then(|()| file.get_ref().sync_all()).map_err(Error::io(&self.path))?;
        }
        Ok(self.bytes)
    }
}

/// Bytes up to the end of the last complete line.
fn whole_lines(file: &File) -> std::io::Result<u64> {
    let (mut at, mut end) = (0, 0);
    for byte in BufReader::new(file).bytes() {
        at += 1;
        if byte? == b'\n' {
            end = at;
        }
    }
    Ok(end)
}
