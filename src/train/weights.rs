//! Weights in and out: safetensors under the public names.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::error::{Error, Result};
use crate::nn::{Copy, HostTensor, Params};

/// Reads every tensor of a safetensors file, widened to f64.
pub fn read_file(path: &Path) -> Result<BTreeMap<String, HostTensor>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| Error::weights(path, format!("not a whole safetensors file ({e})")))?;
    file.iter().map(|(name, view)| Ok((name.to_string(), widen(path, name, &view)?))).collect()
}

fn widen(path: &Path, name: &str, view: &TensorView) -> Result<HostTensor> {
    let b = view.data();
    let values = match view.dtype() {
        Dtype::F64 => bytemuck::pod_collect_to_vec(b),
        Dtype::F32 => bytemuck::pod_collect_to_vec::<u8, f32>(b).into_iter().map(f64::from).collect(),
        Dtype::BF16 => bytemuck::pod_collect_to_vec::<u8, half::bf16>(b).into_iter().map(f64::from).collect(),
        Dtype::F16 => bytemuck::pod_collect_to_vec::<u8, half::f16>(b).into_iter().map(f64::from).collect(),
        Dtype::I32 => bytemuck::pod_collect_to_vec::<u8, i32>(b).into_iter().map(f64::from).collect(),
        Dtype::I64 => bytemuck::pod_collect_to_vec::<u8, i64>(b).into_iter().map(|x| x as f64).collect(),
        other => {
            return Err(Error::weights(
                path,
                format!("`{name}` has type {other:?}, wanted a float or integer"),
            ));
        }
    };
    Ok(HostTensor { dims: view.shape().to_vec(), values })
}

/// Element type of a written tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    /// 8-byte floats.
    F64,
    /// 4-byte floats.
    F32,
    /// 4-byte integers.
    I32,
}

/// Writes tensors to a safetensors file: to a temporary name first, then renamed, so that a file of this name
/// is always whole.
pub fn write_file(path: &Path, tensors: &[(String, HostTensor, FileType)]) -> Result<()> {
    let data: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, t, ty)| {
            let (dtype, bytes) = match ty {
                FileType::F64 => (Dtype::F64, bytemuck::cast_slice(&t.values).to_vec()),
                FileType::F32 => {
                    (Dtype::F32, t.values.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect())
                }
                FileType::I32 => {
                    (Dtype::I32, t.values.iter().flat_map(|&x| (x as i32).to_le_bytes()).collect())
                }
            };
            (name.clone(), dtype, t.dims.clone(), bytes)
        })
        .collect();
    let views = data
        .iter()
        .map(|(name, dtype, dims, bytes)| {
            let view = TensorView::new(*dtype, dims.clone(), bytes)
                .map_err(|e| Error::weights(path, format!("`{name}` cannot be written ({e})")))?;
            Ok((name.clone(), view))
        })
        .collect::<Result<Vec<_>>>()?;
    let bytes = safetensors::serialize(views, None)
        .map_err(|e| Error::weights(path, format!("cannot be written ({e})")))?;
    let part = path.with_extension("part");
    std::fs::write(&part, bytes).map_err(Error::io(&part))?;
    std::fs::rename(&part, path).map_err(Error::io(path))
}

/// Overwrites the parameters named in `wanted` (all if `None`) from `tensors`. Missing, extra and misshapen
/// tensors are one error that names them; nothing is changed then.
pub fn set_weights(
    params: &Params,
    path: &Path,
    tensors: &BTreeMap<String, HostTensor>,
    wanted: Option<&dyn Fn(&str) -> bool>,
) -> Result<()> {
    let mut problems = Vec::new();
    let mut known = std::collections::BTreeSet::new();
    for (name, _, dims) in params.names() {
        if wanted.is_some_and(|w| !w(name)) {
            continue;
        }
        known.insert(name.to_string());
        match tensors.get(name) {
            None => problems.push(format!("missing `{name}` {dims:?}")),
            Some(t) if t.dims != dims => {
                problems.push(format!("`{name}` is {:?}, wanted {dims:?}", t.dims));
            }
            Some(_) => {}
        }
    }
    problems.extend(tensors.keys().filter(|n| !known.contains(*n)).map(|n| format!("unknown `{n}`")));
    if !problems.is_empty() {
        let more = problems.len().saturating_sub(20);
        problems.truncate(20);
        if more > 0 {
            problems.push(format!("and {more} more"));
        }
        return Err(Error::weights(path, format!("does not fit the model: {}", problems.join("; "))));
    }
    for name in &known {
        params.write_public(name, Copy::Master, &tensors[name])?;
    }
    params.refresh()
}

/// Loads a safetensors file that holds exactly the model's parameters.
pub fn load_weights(params: &Params, path: &Path) -> Result<()> {
    set_weights(params, path, &read_file(path)?, None)
}

/// Saves all parameters under their public names, in f32 (f64 in an f64 run).
pub fn save_weights(params: &Params, path: &Path, copy: Copy) -> Result<()> {
    let ty = match params.precision().acc {
        crate::tensor::DType::F64 => FileType::F64,
        _ => FileType::F32,
    };
    let mut out = Vec::new();
    for (name, _, _) in params.names() {
        if let Some(t) = params.read(name, copy)? {
            out.push((name.to_string(), t, ty));
        }
    }
    write_file(path, &out)
}
