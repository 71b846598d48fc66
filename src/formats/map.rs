//! A file mapped into memory.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::error::{Error, Result};

/// The bytes of a file, which the system reads when they are used.
pub(super) struct Map(Mmap);

impl Map {
    /// Maps a file. Empty ones are refused, since they cannot be mapped and hold no tensors.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        let about = file.metadata().map_err(Error::io(path))?;
        if about.is_dir() {
            return Err(Error::weights(path, "is a folder; name a file of weights"));
        }
        if about.len() == 0 {
            return Err(Error::weights(path, "is empty; fetch or copy it again"));
        }
        // SAFETY: the map is only read. Another program that shortens the file meanwhile would end this one by a signal;
        // ett itself never writes into an existing file, but replaces it (`files::replace`).
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        Ok(Map(map))
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}
