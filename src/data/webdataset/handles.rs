//! Reading pictures from shards.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::Place;
use super::index::Stamp;
use super::tar::BLOCK;
use crate::error::{Error, Result};

/// Shards that are open at the same time.
const OPEN: usize = 64;

/// The files of a data set, of which the last used ones are open.
#[derive(Debug)]
pub(super) struct Handles {
    shards: Vec<(PathBuf, Stamp)>,
    /// The last used one stands last.
    open: Mutex<Vec<(usize, Arc<File>)>>,
}

impl Handles {
    /// These files, which had these stamps when they were listed.
    pub fn new(shards: Vec<(PathBuf, Stamp)>) -> Self {
        Handles { shards, open: Mutex::default() }
    }

    /// The file of a shard.
    pub fn path(&self, shard: usize) -> &Path {
        &self.shards[shard].0
    }

    /// The bytes of a picture; errors are about `name`. The header in front of it is read and compared too, so that a
    /// shard with another content gives an error.
    pub fn read(&self, at: &Place, name: &Path) -> Result<Vec<u8>> {
        let shard = at.shard as usize;
        let (path, stamp) = &self.shards[shard];
        let changed = || {
            let what = "its shard has changed since the data set was opened; start again to list it anew";
            Error::data(name, what)
        };
        let read = || -> std::io::Result<Option<Vec<u8>>> {
            let file = self.handle(shard)?;
            if Stamp::of(&file.metadata()?) != *stamp {
                return Ok(None);
            }
            let mut bytes = vec![0; (BLOCK + at.bytes) as usize];
            read_at(&file, path, &mut bytes, at.offset - BLOCK)?;
            // It may have been changed meanwhile.
            let same = Stamp::of(&file.metadata()?) == *stamp
                && crc32fast::hash(&bytes[..BLOCK as usize]) == at.header;
            Ok(same.then(|| bytes.split_off(BLOCK as usize)))
        };
        let result = read();
        if !matches!(result, Ok(Some(_))) {
            // A handle may be dead for ever after a network share was away.
            self.lock().retain(|(other, _)| *other != shard);
        }
        match result {
            Ok(Some(bytes)) => Ok(bytes),
            Ok(None) => Err(changed()),
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => Err(changed()),
            Err(e) => Err(Error::io(path)(e)),
        }
    }

    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(usize, Arc<File>)>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handle(&self, shard: usize) -> std::io::Result<Arc<File>> {
        let known = |open: &mut Vec<(usize, Arc<File>)>| {
            let place = open.iter().position(|(other, _)| *other == shard)?;
            let entry = open.remove(place);
            let file = entry.1.clone();
            open.push(entry);
            Some(file)
        };
        if let Some(file) = known(&mut self.lock()) {
            return Ok(file);
        }
        let file = Arc::new(File::open(&self.shards[shard].0)?);
        let mut open = self.lock();
        // Another thread may have opened it too.
        if let Some(file) = known(&mut open) {
            return Ok(file);
        }
        if open.len() >= OPEN {
            open.remove(0);
        }
        open.push((shard, file.clone()));
        Ok(file)
    }
}

/// Fills `bytes` from a place of a file, without a common position.
#[cfg(unix)]
fn read_at(file: &File, _: &Path, bytes: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

#[cfg(not(unix))]
fn read_at(_: &File, path: &Path, bytes: &mut [u8], offset: u64) -> std::io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    let mut own = File::open(path)?;
    own.seek(SeekFrom::Start(offset))?;
    own.read_exact(bytes)
}
