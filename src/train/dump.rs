//! Dumps the inputs of a step with a non-finite loss or gradient, for finding the cause.

use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::feed::HostBatch;
use crate::formats::Encoding;
use crate::io::weights::write_file;
use crate::nn::HostTensor;

/// Writes `nonfinite-STAGE-STEP.safetensors` with the pictures (as values from 0 to 255) and sequences of each part of
/// the batch, `part.0.image.0` and so on. Returns `None` if the run has already written one.
pub(super) fn dump(out: &Path, stage: &str, step: usize, batch: &HostBatch) -> Result<Option<PathBuf>> {
    let written = std::fs::read_dir(out).into_iter().flatten().flatten();
    if written.into_iter().any(|e| e.file_name().to_string_lossy().starts_with("nonfinite-")) {
        return Ok(None);
    }
    let mut tensors = Vec::new();
    for (i, part) in batch.parts.iter().enumerate() {
        for (k, (bytes, dims)) in part.images.iter().enumerate() {
            let values = bytes.iter().map(|&b| f64::from(b)).collect();
            tensors.push((
                format!("part.{i}.image.{k}"),
                HostTensor { dims: dims.to_vec(), values },
                Encoding::F32,
            ));
        }
        for (name, v) in part.rows.iter().flat_map(|rows| rows.arrays()) {
            let values = v.iter().map(|&x| f64::from(x)).collect();
            tensors.push((
                format!("part.{i}.{name}"),
                HostTensor { dims: vec![v.len()], values },
                Encoding::I32,
            ));
        }
    }
    let path = out.join(format!("nonfinite-{stage}-{step}.safetensors"));
    write_file(&path, &tensors)?;
    Ok(Some(path))
}
