//! VGG16 and the heads of LPIPS.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::formats::Selection;

/// Opens the features of a perceptual loss from one file or several: torchvision's VGG16, the heads of LPIPS, or both.
pub fn open_perceptual(files: &[PathBuf]) -> Result<Selection> {
    Err(Error::weights(files.first().map_or(Path::new(""), |f| f), "is not read yet"))
}

/// Writes them as the safetensors file that `lpips.weights` names.
pub fn write_perceptual(path: &Path, _from: &Selection) -> Result<()> {
    Err(Error::weights(path, "is not written yet"))
}
