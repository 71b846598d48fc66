//! Hugging Face's safetensors: the length of a header, the header in JSON, then the bytes of the tensors.

use std::collections::{BTreeMap, HashMap, btree_map};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::{Contents, Encoding, Info, MOST_DIMS, size_of};
use crate::error::{Error, Result};
use crate::files::FileWriter;

/// Longest header that is read, as in the reference implementation.
const HEADER: usize = 100_000_000;

/// Reads the header of a file and checks it against the file's size.
pub(super) fn read(bytes: &[u8]) -> std::result::Result<Contents, String> {
    let broken = |why: String| format!("is not a complete safetensors file ({why}); fetch or copy it again");
    let length = bytes.first_chunk().map(|b| u64::from_le_bytes(*b)).and_then(|n| usize::try_from(n).ok());
    let start = length.filter(|&n| n <= HEADER).and_then(|n| n.checked_add(8)).filter(|&s| s <= bytes.len());
    let start = start.ok_or_else(|| broken(format!("{} bytes are too few for its header", bytes.len())))?;
    let mut header: Header = serde_json::from_slice(&bytes[8..start]).map_err(|e| broken(e.to_string()))?;
    // Tensors follow each other without gaps; among those that begin at one place, all but one are empty.
    header.tensors.sort_by_key(|(_, entry)| entry.data_offsets);
    let (mut tensors, mut at) = (BTreeMap::new(), start);
    for (name, Entry { dtype, shape: Shape(dims), data_offsets: (from, to) }) in header.tensors {
        let encoding = encoding(dtype)
            .ok_or_else(|| format!("`{name}` has type {dtype:?}, wanted a float or integer"))?;
        let length = size_of(encoding, &dims).map_err(|why| broken(format!("`{name}` {why}")))?;
        if start.checked_add(from) != Some(at) || from.checked_add(length) != Some(to) {
            let what =
                format!("`{name}` {dims:?} is at {from} to {to}, wanted {length} bytes from {}", at - start);
            return Err(broken(what));
        }
        let bytes = at..start.saturating_add(to);
        at = bytes.end;
        match tensors.entry(name) {
            btree_map::Entry::Vacant(place) => {
                place.insert(Info { encoding, dims, strides: None, bytes });
            }
            btree_map::Entry::Occupied(old) => return Err(broken(format!("`{}` occurs twice", old.key()))),
        }
    }
    if at != bytes.len() {
        return Err(broken(format!("it has {} bytes, wanted {at}", bytes.len())));
    }
    let about = header.metadata.into_iter().map(|(k, v)| (k, Value::from(v)));
    Ok(Contents { tensors, about: Value::Object(about.collect()) })
}

/// The header. It is not read by the library, which would keep the whole of it as a tree of values first, and takes the
/// last of several tensors with one name.
#[derive(Default)]
struct Header {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, Entry)>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: Dtype,
    shape: Shape,
    data_offsets: (usize, usize),
}

struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(header: D) -> std::result::Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Header;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a dictionary of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let mut header = Header::default();
                let mut described = false;
                while let Some(name) = map.next_key::<String>()? {
                    if name != "__metadata__" {
                        header.tensors.push((name, map.next_value()?));
                    } else if std::mem::replace(&mut described, true) {
                        return Err(A::Error::duplicate_field("__metadata__"));
                    } else {
                        header.metadata = map.next_value::<Option<_>>()?.unwrap_or_default();
                    }
                }
                Ok(header)
            }
        }
        header.deserialize_map(Reader)
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(shape: D) -> std::result::Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Shape;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                write!(f, "a list of at most {MOST_DIMS} sizes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(size) = list.next_element()? {
                    if shape.len() == MOST_DIMS {
                        return Err(A::Error::invalid_length(MOST_DIMS + 1, &self));
                    }
                    shape.push(size);
                }
                Ok(Shape(shape))
            }
        }
        shape.deserialize_seq(Reader)
    }
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
        Dtype::U64 => Encoding::U64,
        Dtype::U32 => Encoding::U32,
        Dtype::U16 => Encoding::U16,
        Dtype::U8 => Encoding::U8,
        Dtype::BOOL => Encoding::Bool,
        _ => return unread(dtype),
    })
}

/// A type that is only listed.
fn unread(dtype: Dtype) -> Option<Encoding> {
    let (name, values, bytes) = match dtype {
        Dtype::F4 => ("F4", 2, 1),
        Dtype::F6_E2M3 => ("F6_E2M3", 4, 3),
        Dtype::F6_E3M2 => ("F6_E3M2", 4, 3),
        Dtype::F8_E4M3 => ("F8_E4M3", 1, 1),
        Dtype::F8_E4M3FNUZ => ("F8_E4M3FNUZ", 1, 1),
        Dtype::F8_E5M2 => ("F8_E5M2", 1, 1),
        Dtype::F8_E5M2FNUZ => ("F8_E5M2FNUZ", 1, 1),
        Dtype::F8_E8M0 => ("F8_E8M0", 1, 1),
        Dtype::C64 => ("C64", 1, 8),
        _ => return None,
    };
    Some(Encoding::Unread { name, values, bytes })
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
        Encoding::U64 => Dtype::U64,
        Encoding::U32 => Dtype::U32,
        Encoding::U16 => Dtype::U16,
        Encoding::U8 => Dtype::U8,
        Encoding::Bool => Dtype::BOOL,
        Encoding::Q4_1 | Encoding::Q8_0 | Encoding::Unread { .. } => return None,
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
        let want = size_of(self.encoding, &self.dims);
        let want = want.map_err(|why| Error::weights(file.path(), format!("`{}` {why}", self.name)))?;
        if bytes.len() != want {
            let each = self.encoding.block().1;
            let (got, want) = (bytes.len() / each, want / each);
            let what = format!("`{}` has {got} values, wanted {want} for {:?}", self.name, self.dims);
            return Err(Error::weights(file.path(), what));
        }
        Ok(bytes)
    }
}

/// Tensors in the order in which [`write_safetensors`] writes them and makes their bytes: wide types first, for alignment, then
/// by name.
pub fn in_file_order(mut tensors: Vec<FileTensor>) -> Vec<FileTensor> {
    tensors.sort_by(|a, b| dtype(b.encoding).cmp(&dtype(a.encoding)).then_with(|| a.name.cmp(&b.name)));
    tensors
}

/// Writes tensors and metadata in the safetensors format.
pub fn write_safetensors(
    file: &mut FileWriter,
    tensors: Vec<FileTensor>,
    metadata: HashMap<String, String>,
) -> Result<()> {
    let unwritable = |e: &dyn std::fmt::Display| Error::data(file.path(), format!("cannot be written ({e})"));
    let tensors = in_file_order(tensors);
    let (mut at, mut infos) = (0, Vec::new());
    for t in &tensors {
        let from = at;
        let dtype = dtype(t.encoding).ok_or_else(|| unwritable(&format!("type {}", t.encoding.name())))?;
        at += size_of(t.encoding, &t.dims).map_err(|why| unwritable(&format!("`{}` {why}", t.name)))?;
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
