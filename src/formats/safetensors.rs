//! Hugging Face's safetensors: the length of a header, the header in JSON, then the bytes of the tensors.

use std::collections::{BTreeMap, HashMap};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::Value;

use super::{Contents, Encoding, Info, size_of};
use crate::error::{Error, Result};
use crate::files::FileWriter;

/// Longest header that is read, as in the reference implementation.
const HEADER: usize = 100_000_000;

/// Reads the header of a file and checks it against the file's size.
pub(super) fn read(bytes: &[u8]) -> std::result::Result<Contents, String> {
    let broken = |why: String| format!("not a complete safetensors file ({why})");
    let length = bytes.first_chunk().map(|b| u64::from_le_bytes(*b)).and_then(|n| usize::try_from(n).ok());
    let start = length.filter(|&n| n <= HEADER).and_then(|n| n.checked_add(8)).filter(|&s| s <= bytes.len());
    let start = start.ok_or_else(|| broken(format!("{} bytes are too few for its header", bytes.len())))?;
    let header: Metadata = serde_json::from_slice(&bytes[8..start]).map_err(|e| broken(e.to_string()))?;
    let want = start + header.data_len();
    if want != bytes.len() {
        return Err(broken(format!("it has {} bytes, wanted {want}", bytes.len())));
    }
    let mut tensors = BTreeMap::new();
    for (name, info) in header.tensors() {
        let encoding = encoding(info.dtype)
            .ok_or_else(|| format!("`{name}` has type {:?}, wanted a float or integer", info.dtype))?;
        let (from, to) = info.data_offsets;
        // The library has checked that tensors follow each other without gaps.
        if size_of(encoding, &info.shape)? != to - from {
            return Err(broken(format!("`{name}` {:?} has {} bytes", info.shape, to - from)));
        }
        let bytes = start + from..start + to;
        tensors.insert(name, Info { encoding, dims: info.shape.clone(), strides: None, bytes });
    }
    let about = header.metadata().iter().flatten().map(|(k, v)| (k.clone(), Value::from(v.clone())));
    Ok(Contents { tensors, about: Value::Object(about.collect()) })
}

fn encoding(dtype: Dtype) -> Option<Encoding> {
    Some(match dtype {
        Dtype::F64 => Encoding::F64,
        Dtype::F32 => Encoding::F32,
        Dtype::F16 => Encoding::F16,
        Dtype::BF16 => Encoding::Bf16,
        Dtype::I64 => Encoding::I64,
        Dtype::I32 => Encoding::I32,
        Dtype::I16 => Encoding::I16,
        Dtype::I8 => Encoding::I8,
        Dtype::U8 => Encoding::U8,
        Dtype::BOOL => Encoding::Bool,
        _ => return None,
    })
}

fn dtype(encoding: Encoding) -> Option<Dtype> {
    Some(match encoding {
        Encoding::F64 => Dtype::F64,
        Encoding::F32 => Dtype::F32,
        Encoding::F16 => Dtype::F16,
        Encoding::Bf16 => Dtype::BF16,
        Encoding::I64 => Dtype::I64,
        Encoding::I32 => Dtype::I32,
        Encoding::I16 => Dtype::I16,
        Encoding::I8 => Dtype::I8,
        Encoding::U8 => Dtype::U8,
        Encoding::Bool => Dtype::BOOL,
        Encoding::Q4_1 | Encoding::Q8_0 => return None,
    })
}

/// A tensor to be written. Its bytes are made only when they are written, so that a file may be larger than the host's
/// memory.
pub struct FileTensor<'a> {
    /// Its name in the file.
    pub name: String,
    /// Shape.
    pub dims: Vec<usize>,
    /// How its values are stored; not a quantized encoding.
    pub encoding: Encoding,
    /// Makes the bytes of its values, row-major.
    pub bytes: Box<dyn Fn() -> Result<Vec<u8>> + 'a>,
}

impl FileTensor<'_> {
    /// Its bytes, as many as its shape needs.
    pub(super) fn made(&self, file: &FileWriter) -> Result<Vec<u8>> {
        let bytes = (self.bytes)()?;
        let want = size_of(self.encoding, &self.dims).map_err(|e| Error::weights(file.path(), e))?;
        if bytes.len() != want {
            let each = self.encoding.block().1;
            let (got, want) = (bytes.len() / each, want / each);
            let what = format!("`{}` has {got} values, wanted {want} for {:?}", self.name, self.dims);
            return Err(Error::weights(file.path(), what));
        }
        Ok(bytes)
    }
}

/// Writes tensors and metadata in the safetensors format.
pub fn write_safetensors(
    file: &mut FileWriter,
    mut tensors: Vec<FileTensor>,
    metadata: HashMap<String, String>,
) -> Result<()> {
    let unwritable = |e: &dyn std::fmt::Display| Error::data(file.path(), format!("cannot be written ({e})"));
    // The order of the format: wide types first, for alignment.
    tensors.sort_by(|a, b| dtype(b.encoding).cmp(&dtype(a.encoding)).then_with(|| a.name.cmp(&b.name)));
    let (mut at, mut infos) = (0, Vec::new());
    for t in &tensors {
        let from = at;
        let dtype = dtype(t.encoding).ok_or_else(|| unwritable(&format!("type {}", t.encoding.name())))?;
        at += size_of(t.encoding, &t.dims).map_err(|e| unwritable(&e))?;
        infos.push((t.name.clone(), TensorInfo { dtype, shape: t.dims.clone(), data_offsets: (from, at) }));
    }
    let metadata = Some(metadata).filter(|m| !m.is_empty());
    let header = Metadata::new(metadata, infos).map_err(|e| unwritable(&e))?;
    let mut header = serde_json::to_vec(&header).map_err(|e| unwritable(&e))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    file.put(&(header.len() as u64).to_le_bytes())?;
    file.put(&header)?;
    for t in tensors {
        file.put(&t.made(file)?)?;
    }
    Ok(())
}
