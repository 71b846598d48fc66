//! Files of tensors in the formats in which weights are published: safetensors, PyTorch's pickles (`.pth`, `.pt`, `.bin`,
//! `.ckpt`) and GGUF. A file is mapped into memory, and values are decoded when they are read.

mod encoding;
mod gguf;
mod map;
mod safetensors;
mod selection;
#[cfg(test)]
mod tests;
mod text;
mod torch;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::nn::HostTensor;
pub use encoding::Encoding;
use map::Map;
pub use safetensors::{FileTensor, in_file_order, write_safetensors};
pub use selection::{Change, Selection};
pub(crate) use text::shown;
pub use torch::{Tree, write_torch};

/// The format of a file of tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Hugging Face's format: a header in JSON, then the values.
    Safetensors,
    /// What `torch.save` writes: a pickle in a zip archive, or the older sequence of pickles.
    Torch,
    /// llama.cpp's format.
    Gguf,
}

impl Format {
    /// As users know it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Safetensors => "safetensors",
            Format::Torch => "PyTorch",
            Format::Gguf => "GGUF",
        }
    }
}

/// Most dimensions of a tensor, as in PyTorch.
const MOST_DIMS: usize = 64;

/// Where a tensor is in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// How its values are stored.
    pub encoding: Encoding,
    /// Shape, the slowest dimension first.
    pub dims: Vec<usize>,
    /// Distances between neighbours of each dimension, in values, if they are not those of a row-major array. Only
    /// PyTorch stores such tensors.
    pub strides: Option<Vec<usize>>,
    /// Its bytes in the file. A tensor with strides may share them with others.
    pub bytes: Range<usize>,
}

impl Info {
    /// The number of values; files with more than can be addressed are refused when they are opened.
    pub fn count(&self) -> usize {
        self.dims.iter().product()
    }

    /// The values in a file, row-major.
    fn values(&self, file: &[u8]) -> Option<Vec<f64>> {
        let values = self.encoding.widen(&file[self.bytes.clone()])?;
        Some(match &self.strides {
            None => values,
            Some(strides) => strided(&values, &self.dims, strides),
        })
    }
}

/// An open file of tensors.
pub struct Archive {
    path: PathBuf,
    map: Map,
    format: Format,
    tensors: BTreeMap<String, Info>,
    about: Value,
}

/// What a reader of a format finds in the bytes of a file. It has checked that every tensor lies within them, and that
/// the number of its values and of its bytes agree.
struct Contents {
    tensors: BTreeMap<String, Info>,
    about: Value,
}

impl Archive {
    /// Opens a file of any of the formats, recognised by its first bytes, and reads its list of tensors.
    pub fn open(path: &Path) -> Result<Self> {
        let map = Map::open(path)?;
        let (format, contents) = list(map.bytes()).map_err(|why| Error::weights(path, why))?;
        Ok(Archive { path: path.into(), map, format, tensors: contents.tensors, about: contents.about })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The size of the file in bytes.
    pub fn size(&self) -> usize {
        self.map.bytes().len()
    }

    /// The CRC-32 of the file.
    pub fn checksum(&self) -> u32 {
        crc32fast::hash(self.map.bytes())
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> &BTreeMap<String, Info> {
        &self.tensors
    }

    /// What the file says besides its tensors, in texts that may hold anything: the metadata of safetensors, the keys of GGUF without their prefixes cut,
    /// or the numbers, texts and lists of a pickle.
    pub fn about(&self) -> &Value {
        &self.about
    }

    fn info(&self, name: &str) -> Result<&Info> {
        self.tensors.get(name).ok_or_else(|| Error::weights(&self.path, format!("missing `{name}`")))
    }

    /// The bytes of a tensor as they are stored, row-major; `None` if it has strides.
    pub fn raw(&self, name: &str) -> Result<Option<(Encoding, &[u8])>> {
        let info = self.info(name)?;
        let bytes = &self.map.bytes()[info.bytes.clone()];
        Ok(info.strides.is_none().then_some((info.encoding, bytes)))
    }

    /// Reads a tensor, widened to f64.
    pub fn read(&self, name: &str) -> Result<HostTensor> {
        let info = self.info(name)?;
        let values = info.values(self.map.bytes()).ok_or_else(|| {
            let what = format!("`{name}` has type {}, which ett does not read", info.encoding.name());
            Error::weights(&self.path, what)
        })?;
        Ok(HostTensor { dims: info.dims.clone(), values })
    }
}

/// The beginning of what Git keeps in the place of a large file.
const POINTER: &[u8] = b"version https://git-lfs";

/// Reads the header of a file in one format.
type Reader = fn(&[u8]) -> std::result::Result<Contents, String>;

/// Recognises a format and reads the list of tensors.
fn list(bytes: &[u8]) -> std::result::Result<(Format, Contents), String> {
    if bytes.starts_with(POINTER) {
        return Err(
            "is a pointer of Git LFS instead of the file; fetch the file itself with `git lfs pull`".into()
        );
    }
    let (format, read): (_, Reader) = match bytes {
        [b'G', b'G', b'U', b'F', ..] => (Format::Gguf, gguf::read),
        [b'P', b'K', 3 | 5, 4 | 6, ..] => (Format::Torch, torch::read),
        // The length of a header of JSON may look like the beginning of a pickle.
        [_, _, _, _, _, _, _, _, b'{', ..] => (Format::Safetensors, safetensors::read),
        [0x80, 2..=5, ..] => (Format::Torch, torch::read),
        // Too short for more than the length of a header.
        _ if bytes.len() <= 8 => (Format::Safetensors, safetensors::read),
        _ => {
            let what = "is in none of the formats safetensors, PyTorch and GGUF, or its beginning is damaged; fetch it \
                again or name a file of weights";
            return Err(what.into());
        }
    };
    let contents = read(bytes).map_err(|why| text::message(&why))?;
    text::check_names(&contents.tensors)?;
    Ok((format, contents))
}

/// The elements of a strided array, row-major.
fn strided(values: &[f64], dims: &[usize], strides: &[usize]) -> Vec<f64> {
    let n = dims.iter().product();
    let mut at = vec![0; dims.len()];
    let mut out = Vec::with_capacity(n);
    for _ in 0..n {
        out.push(values[at.iter().zip(strides).map(|(i, s)| i * s).sum::<usize>()]);
        for (i, &d) in at.iter_mut().zip(dims).rev() {
            *i += 1;
            if *i < d {
                break;
            }
            *i = 0;
        }
    }
    out
}

/// The bytes that a tensor takes; an error, to be put behind its name, for too many to address, or if its rows do not
/// fill blocks. Sizes beside one of zero must not overflow either: products of some of the sizes are used elsewhere.
fn size_of(encoding: Encoding, dims: &[usize]) -> std::result::Result<usize, String> {
    let most = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)));
    let (values, _) = encoding.block();
    let count =
        most.filter(|n| n.checked_next_multiple_of(values).is_some_and(|n| encoding.bytes(n).is_some()));
    let count = count.map(|n| if dims.contains(&0) { 0 } else { n }).filter(|_| dims.len() <= MOST_DIMS);
    // Types that are not read are packed without regard to rows.
    let rows = !encoding.is_read() || dims.last().copied().unwrap_or(1).is_multiple_of(values);
    let bytes = count.filter(|_| rows).and_then(|n| encoding.bytes(n));
    bytes.ok_or_else(|| format!("of shape {dims:?} and type {} cannot be stored", encoding.name()))
}
