//! llama.cpp's GGUF: keys with values, the list of tensors, then their bytes.

use std::collections::{BTreeMap, HashSet};

use serde_json::{Map, Number, Value as Json};

use super::{Contents, Encoding, Info, MOST_DIMS, size_of};

/// Most values of all keys together. A list of 250 000 tokens with their scores, types and merges has a million.
const MOST: usize = 4 << 20;
/// Most bytes before the first tensor; texts of a large vocabulary have 20 million.
const HEADER: usize = 64 << 20;
/// Most tensors. Published models have a few thousand.
const TENSORS: u64 = 1 << 18;
/// Lists in lists.
const DEPTH: usize = 4;
/// Where tensors begin, unless a file says otherwise.
const ALIGN: u64 = 32;

type Result<T> = std::result::Result<T, String>;

/// Reads the header of a file.
pub(super) fn read(bytes: &[u8]) -> Result<Contents> {
    let mut header = Header { bytes, at: 4, values: 0 };
    let version = u32::from_le_bytes(header.array()?);
    if !(2..=3).contains(&version) {
        let why = if (1..=3).contains(&version.swap_bytes()) { ", the highest byte first" } else { "" };
        return Err(format!(
            "is GGUF of version {version}{why}, wanted 2 or 3; convert the model again with llama.cpp"
        ));
    }
    let (tensors, keys) = (header.long()?, header.long()?);
    if tensors > TENSORS {
        return Err(format!("has {tensors} tensors, wanted at most {TENSORS}; fetch or copy it again"));
    }
    let mut about = Map::new();
    for _ in 0..keys {
        let key = header.text()?;
        let kind = u32::from_le_bytes(header.array()?);
        let value = header.value(kind, 0).map_err(|why| format!("its key `{key}` {why}"))?;
        if about.insert(key.into(), value).is_some() {
            return Err(format!("has the key `{key}` twice"));
        }
    }
    let align = match about.get("general.alignment") {
        None => ALIGN,
        Some(n) => n
            .as_u64()
            .filter(|n| n.is_power_of_two() && *n <= 1 << 30)
            .ok_or_else(|| format!("its key `general.alignment` is {n}, wanted a power of two"))?,
    };
    let (mut listed, mut names) = (Vec::new(), HashSet::new());
    for _ in 0..tensors {
        let tensor = header.tensor()?;
        if !names.insert(tensor.name) {
            return Err(format!("has two tensors `{}`", tensor.name));
        }
        listed.push(tensor);
    }
    let start = (header.at as u64).next_multiple_of(align);
    Ok(Contents { tensors: place(listed, start, align, bytes.len())?, about: Json::Object(about) })
}

/// A tensor as the header lists it, with its offset from the first.
struct Listed<'a> {
    name: &'a str,
    encoding: Encoding,
    dims: Vec<usize>,
    offset: u64,
    length: usize,
}

/// Checks that the tensors are aligned, inside the file and beside each other.
fn place(mut listed: Vec<Listed>, start: u64, align: u64, size: usize) -> Result<BTreeMap<String, Info>> {
    listed.sort_by_key(|t| (t.offset, t.length));
    let (mut tensors, mut end) = (BTreeMap::new(), 0);
    for Listed { name, encoding, dims, offset, length } in listed {
        if !offset.is_multiple_of(align) {
            return Err(format!("its tensor `{name}` begins at {offset}, which is no multiple of {align}"));
        }
        let from = offset.checked_add(start).and_then(|n| usize::try_from(n).ok());
        let range = from.and_then(|from| Some(from..from.checked_add(length)?)).filter(|r| r.end <= size);
        // A tensor without values needs no place.
        let range = range.or((length == 0).then_some(0..0)).ok_or_else(|| {
            format!("its tensor `{name}` is beyond its end, at {size} bytes; fetch or copy it again")
        })?;
        if length > 0 && range.start < end {
            return Err(format!("its tensor `{name}` overlaps another"));
        }
        end = end.max(range.end);
        tensors.insert(name.to_string(), Info { encoding, dims, strides: None, bytes: range });
    }
    Ok(tensors)
}

struct Header<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Values so far.
    values: usize,
}

impl<'a> Header<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let left = HEADER - self.at;
        let taken = self.bytes[self.at..].get(..length);
        let taken = taken.ok_or("ends within its header; fetch or copy it again")?;
        if length > left {
            return Err(format!("has a header of more than {} MiB, which ett does not read", HEADER >> 20));
        }
        self.at += length;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut all = [0; N];
        all.copy_from_slice(self.take(N)?);
        Ok(all)
    }

    fn long(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn size(&mut self) -> Result<usize> {
        usize::try_from(self.long()?).map_err(|_| "has a size that cannot be addressed".into())
    }

    fn text(&mut self) -> Result<&'a str> {
        let length = self.size()?;
        std::str::from_utf8(self.take(length)?).map_err(|e| format!("has a name that is not in UTF-8 ({e})"))
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Json> {
        self.values += 1;
        if self.values > MOST {
            return Err(format!("has more values than ett reads, {MOST} in all keys together"));
        }
        Ok(match kind {
            0 => Json::from(self.array::<1>()?[0]),
            1 => Json::from(i8::from_le_bytes(self.array()?)),
            2 => Json::from(u16::from_le_bytes(self.array()?)),
            3 => Json::from(i16::from_le_bytes(self.array()?)),
            4 => Json::from(u32::from_le_bytes(self.array()?)),
            5 => Json::from(i32::from_le_bytes(self.array()?)),
            6 => float(f32::from_le_bytes(self.array()?).into()),
            7 => Json::from(self.array::<1>()?[0] != 0),
            8 => {
                // Tokens of some models are bytes, not texts.
                let length = self.size()?;
                Json::from(String::from_utf8_lossy(self.take(length)?))
            }
            9 if depth < DEPTH => {
                let kind = u32::from_le_bytes(self.array()?);
                let count = self.size()?;
                // Values have a byte at least.
                if count > self.bytes.len() - self.at {
                    return Err(format!("has a list of {count} values, more than there are bytes"));
                }
                let all = (0..count).map(|_| self.value(kind, depth + 1));
                Json::Array(all.collect::<Result<_>>()?)
            }
            10 => Json::from(self.long()?),
            11 => Json::from(i64::from_le_bytes(self.array()?)),
            12 => float(f64::from_le_bytes(self.array()?)),
            _ => return Err(format!("has the unknown type {kind}")),
        })
    }

    fn tensor(&mut self) -> Result<Listed<'a>> {
        let name = self.text()?;
        if name.is_empty() {
            return Err("has a tensor without a name".into());
        }
        let count = u32::from_le_bytes(self.array()?) as usize;
        if count > MOST_DIMS {
            return Err(format!("its tensor `{name}` has {count} dimensions, wanted at most {MOST_DIMS}"));
        }
        // The fastest dimension is the first one.
        let dims = (0..count).map(|_| self.size()).collect::<Result<Vec<_>>>()?;
        let dims: Vec<usize> = dims.into_iter().rev().collect();
        let kind = u32::from_le_bytes(self.array()?);
        let encoding = encoding(kind).ok_or_else(|| {
            format!(
                "its tensor `{name}` has the type {}, which ett does not read; convert the model to BF16, F16, Q8_0 or \
                 Q4_1 with llama.cpp",
                kind_name(kind)
            )
        })?;
        let length = size_of(encoding, &dims).map_err(|why| format!("its tensor `{name}` {why}"))?;
        Ok(Listed { name, encoding, dims, offset: self.long()?, length })
    }
}

fn float(x: f64) -> Json {
    Number::from_f64(x).map_or(Json::Null, Json::Number)
}

fn encoding(kind: u32) -> Option<Encoding> {
    Some(match kind {
        0 => Encoding::F32,
        1 => Encoding::F16,
        3 => Encoding::Q4_1,
        8 => Encoding::Q8_0,
        24 => Encoding::I8,
        25 => Encoding::I16,
        26 => Encoding::I32,
        27 => Encoding::I64,
        28 => Encoding::F64,
        30 => Encoding::Bf16,
        _ => return None,
    })
}

/// The name of a type that is not read.
fn kind_name(kind: u32) -> String {
    let name = match kind {
        2 => "Q4_0",
        6 => "Q5_0",
        7 => "Q5_1",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        12 => "Q4_K",
        13 => "Q5_K",
        14 => "Q6_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        40 => "NVFP4",
        _ => return format!("number {kind}"),
    };
    name.into()
}
