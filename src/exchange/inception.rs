//! The Inception network whose features FID compares.

use std::path::Path;

use crate::error::{Error, Result};
use crate::formats::Selection;

/// Opens the usual file of PyTorch for FID.
pub fn open_inception(path: &Path) -> Result<Selection> {
    Err(Error::weights(path, "is not read yet"))
}

/// Writes it as a safetensors file.
pub fn write_inception(path: &Path, _from: &Selection) -> Result<()> {
    Err(Error::weights(path, "is not written yet"))
}
