//! Dumps the inputs of a step with a non-finite loss or gradient, for finding the cause.

use std::path::{Path, PathBuf};

use crate::backend::{DType, Kernels};
use crate::error::Result;
use crate::feed::Batch;
use crate::io::weights::{FileType, write_file};
use crate::nn::HostTensor;
use crate::tensor::Tensor;

/// Writes `nonfinite-STAGE-STEP.safetensors` with the pictures and sequences of each part of the batch,
/// `part.0.image.0` and so on. Returns `None` if the run has already written one.
pub(super) fn dump(
    out: &Path,
    stage: &str,
    step: usize,
    parts: &[Batch],
    dev: &dyn Kernels,
) -> Result<Option<PathBuf>> {
    let written = std::fs::read_dir(out).into_iter().flatten().flatten();
    if written.into_iter().any(|e| e.file_name().to_string_lossy().starts_with("nonfinite-")) {
        return Ok(None);
    }
    let mut tensors = Vec::new();
    let mut put = |name: String, t: &Tensor| -> Result<()> {
        let ty = match t.dtype() {
            DType::I32 => FileType::I32,
            DType::F64 => FileType::F64,
            _ => FileType::F32,
        };
        let dims = t.dims().as_slice().to_vec();
        tensors.push((name, HostTensor { dims, values: t.to_f64(dev)? }, ty));
        Ok(())
    };
    for (i, part) in parts.iter().enumerate() {
        for (n, image) in part.images.iter().enumerate() {
            put(format!("part.{i}.image.{n}"), image)?;
        }
        if let Some(p) = &part.packed {
            for (name, t) in
                [("text", &p.text), ("visual", &p.visual), ("select", &p.select), ("target", &p.target)]
            {
                put(format!("part.{i}.{name}"), t)?;
            }
            put(format!("part.{i}.offsets"), &p.seqs.cu)?;
        }
    }
    let path = out.join(format!("nonfinite-{stage}-{step}.safetensors"));
    write_file(&path, &tensors)?;
    Ok(Some(path))
}
