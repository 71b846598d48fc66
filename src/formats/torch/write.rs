//! Writing what `torch.load` reads: an archive without compression, in the form of PyTorch 1.6 and later.

use crate::error::{Error, Result};
use crate::files::FileWriter;
use crate::formats::{Encoding, FileTensor, size_of};

/// Where data begin, as PyTorch places them.
const ALIGN: u64 = 64;
/// Sizes and offsets from here on have 8 bytes.
const LONG: u64 = 0xffff_ffff;

/// Values to be written for `torch.load`.
pub enum Tree<'a> {
    /// A dictionary with texts as keys, in this order.
    Dict(Vec<(String, Tree<'a>)>),
    /// A tensor.
    Tensor(FileTensor<'a>),
    /// A text.
    Text(String),
    /// An integer.
    Int(i64),
    /// A float.
    Float(f64),
}

/// Writes what `torch.load` reads, with `weights_only` too, into a new file. Tensors are made one after another.
pub fn write_torch(file: &mut FileWriter, root: Tree) -> Result<()> {
    let mut pickle = Pickler { bytes: vec![0x80, 2], tensors: Vec::new() };
    pickle.tree(root).map_err(|why| Error::weights(file.path(), why))?;
    pickle.bytes.push(b'.');
    let Pickler { bytes, tensors } = pickle;
    let mut zip = Zip { file, at: 0, entries: Vec::new() };
    zip.entry("archive/data.pkl", &bytes)?;
    zip.entry("archive/byteorder", b"little")?;
    for (i, tensor) in tensors.iter().enumerate() {
        let bytes = tensor.made(zip.file)?;
        zip.entry(&format!("archive/data/{i}"), &bytes)?;
    }
    zip.entry("archive/version", b"3\n")?;
    zip.finish()
}

/// Writes a pickle of protocol 2 and collects its tensors, each with a storage of its own.
struct Pickler<'a> {
    bytes: Vec<u8>,
    tensors: Vec<FileTensor<'a>>,
}

impl<'a> Pickler<'a> {
    fn tree(&mut self, tree: Tree<'a>) -> std::result::Result<(), String> {
        match tree {
            Tree::Dict(items) => {
                self.bytes.extend(b"}(");
                for (name, tree) in items {
                    self.text(&name)?;
                    self.tree(tree)?;
                }
                self.bytes.push(b'u');
            }
            Tree::Tensor(tensor) => self.tensor(tensor)?,
            Tree::Text(text) => self.text(&text)?,
            Tree::Int(n) => self.int(n),
            Tree::Float(x) => {
                self.bytes.push(b'G');
                self.bytes.extend(x.to_be_bytes());
            }
        }
        Ok(())
    }

    fn text(&mut self, text: &str) -> std::result::Result<(), String> {
        let length = u32::try_from(text.len()).map_err(|_| "cannot hold a text of 4 GiB".to_string())?;
        self.bytes.push(b'X');
        self.bytes.extend(length.to_le_bytes());
        self.bytes.extend(text.as_bytes());
        Ok(())
    }

    fn int(&mut self, n: i64) {
        match i32::try_from(n) {
            Ok(n) => {
                self.bytes.push(b'J');
                self.bytes.extend(n.to_le_bytes());
            }
            Err(_) => {
                self.bytes.extend([0x8a, 8]);
                self.bytes.extend(n.to_le_bytes());
            }
        }
    }

    fn sizes(&mut self, sizes: &[usize]) {
        self.bytes.push(b'(');
        sizes.iter().for_each(|&n| self.int(n as i64));
        self.bytes.push(b't');
    }

    /// `_rebuild_tensor_v2(storage, 0, sizes, strides, False, OrderedDict())`, with the storage as a reference.
    fn tensor(&mut self, tensor: FileTensor<'a>) -> std::result::Result<(), String> {
        let name = |why: String| format!("`{}` {why}", tensor.name);
        let class = class(tensor.encoding).ok_or_else(|| name("has a type that PyTorch lacks".into()))?;
        let bytes = size_of(tensor.encoding, &tensor.dims).map_err(name)?;
        self.bytes.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        self.text("storage")?;
        self.bytes.extend(format!("ctorch\n{class}\n").as_bytes());
        self.text(&self.tensors.len().to_string())?;
        self.text("cpu")?;
        self.int((bytes / tensor.encoding.block().1) as i64);
        self.bytes.extend(b"tQK\0");
        self.sizes(&tensor.dims);
        let mut strides = vec![1usize; tensor.dims.len()];
        for i in (1..strides.len()).rev() {
            strides[i - 1] = strides[i] * tensor.dims[i].max(1);
        }
        self.sizes(&strides);
        self.bytes.extend(b"\x89ccollections\nOrderedDict\n)RtR");
        self.tensors.push(tensor);
        Ok(())
    }
}

fn class(encoding: Encoding) -> Option<&'static str> {
    Some(match encoding {
        Encoding::F64 => "DoubleStorage",
        Encoding::F32 => "FloatStorage",
        Encoding::F16 => "HalfStorage",
        Encoding::Bf16 => "BFloat16Storage",
        Encoding::I64 => "LongStorage",
        Encoding::I32 => "IntStorage",
        Encoding::I16 => "ShortStorage",
        Encoding::I8 => "CharStorage",
        Encoding::U8 => "ByteStorage",
        Encoding::Bool => "BoolStorage",
        // PyTorch has no storages of these.
        Encoding::U64 | Encoding::U32 | Encoding::U16 => return None,
        Encoding::Q4_1 | Encoding::Q8_0 | Encoding::Unread { .. } => return None,
    })
}

/// An archive that is written from its beginning to its end. The library's writer would need to go back, or to leave
/// the sizes out of the headers, and writes to the standard error stream when a disk is full.
struct Zip<'f> {
    file: &'f mut FileWriter,
    at: u64,
    entries: Vec<Entry>,
}

struct Entry {
    name: String,
    crc32: u32,
    bytes: u64,
    /// Of its header.
    at: u64,
}

/// The fields of a header with 8 bytes each.
fn long(fields: &[u64]) -> Vec<u8> {
    let mut extra = Vec::new();
    if !fields.is_empty() {
        extra.extend(1u16.to_le_bytes());
        extra.extend((8 * fields.len() as u16).to_le_bytes());
        fields.iter().for_each(|n| extra.extend(n.to_le_bytes()));
    }
    extra
}

/// A number in a field of 4 bytes, which says [`LONG`] if it is elsewhere.
fn short(n: u64) -> [u8; 4] {
    (n.min(LONG) as u32).to_le_bytes()
}

impl Entry {
    /// What the headers at the entry and at the end of the archive have in common.
    fn common(&self, extra: &[u8]) -> Vec<u8> {
        let version: u16 = if extra.starts_with(&[1, 0]) { 45 } else { 20 };
        // Names in UTF-8; no compression; 1980-01-01.
        let mut header = [version, 1 << 11, 0, 0, 0x21].map(u16::to_le_bytes).concat();
        header.extend(self.crc32.to_le_bytes());
        header.extend(short(self.bytes));
        header.extend(short(self.bytes));
        header.extend((self.name.len() as u16).to_le_bytes());
        header.extend((extra.len() as u16).to_le_bytes());
        header
    }

    /// The header before the data, which fills up to their alignment.
    fn local(&self) -> Vec<u8> {
        let mut extra = if self.bytes >= LONG { long(&[self.bytes, self.bytes]) } else { Vec::new() };
        let data = self.at + 30 + (self.name.len() + extra.len() + 4) as u64;
        let fill = data.next_multiple_of(ALIGN) - data;
        extra.extend(b"FB");
        extra.extend((fill as u16).to_le_bytes());
        extra.resize(extra.len() + fill as usize, b'Z');
        [b"PK\x03\x04", &*self.common(&extra), self.name.as_bytes(), &extra].concat()
    }

    /// The header in the list at the end.
    fn central(&self) -> Vec<u8> {
        let mut fields = Vec::new();
        if self.bytes >= LONG {
            fields.extend([self.bytes, self.bytes]);
        }
        if self.at >= LONG {
            fields.push(self.at);
        }
        let extra = long(&fields);
        let header = [b"PK\x01\x02\x2d\0", &*self.common(&extra), &[0; 10], &short(self.at)].concat();
        [&header, self.name.as_bytes(), &extra].concat()
    }
}

impl Zip<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.at += bytes.len() as u64;
        self.file.put(bytes)
    }

    fn entry(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let crc32 = crc32fast::hash(bytes);
        let entry = Entry { name: name.into(), crc32, bytes: bytes.len() as u64, at: self.at };
        self.put(&entry.local())?;
        self.put(bytes)?;
        self.entries.push(entry);
        Ok(())
    }

    /// Writes the list of entries, and where it is.
    fn finish(mut self) -> Result<()> {
        let start = self.at;
        let list: Vec<u8> = self.entries.iter().flat_map(Entry::central).collect();
        self.put(&list)?;
        let (count, bytes) = (self.entries.len() as u64, list.len() as u64);
        if count >= 0xffff || start + bytes >= LONG {
            let end = self.at;
            let fields = [count, count, bytes, start].map(u64::to_le_bytes).concat();
            let (size, versions, disks) = (44u64.to_le_bytes(), [45, 0, 45, 0], [0; 8]);
            self.put(&[b"PK\x06\x06", &size[..], &versions, &disks, &fields].concat())?;
            self.put(&[b"PK\x06\x07", &[0; 4][..], &end.to_le_bytes(), &[1, 0, 0, 0]].concat())?;
        }
        let count = (count.min(0xffff) as u16).to_le_bytes();
        self.put(
            &[b"PK\x05\x06", &[0; 4][..], &count, &count, &short(bytes), &short(start), &[0; 2]].concat(),
        )
    }
}
