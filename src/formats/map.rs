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
        // SAFETY: as sound as a map of a file can be: the map is only read here, every value is copied out of it as bytes
        // of which any bits are valid, and ett never writes into an existing file, but replaces it (`files::replace`).
        // Nothing keeps another program from writing into it. Then bytes change under this reference, which Rust does not
        // allow: values may differ between the check that they are finite and the copy, and lists between their check and
        // their use. If it shortens the file, a signal ends this program. Users are told to leave open files alone.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        Ok(Map(map))
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}
