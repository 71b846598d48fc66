//! Where the storages of a file are.

use std::collections::HashMap;
use std::io::Cursor;
use std::ops::Range;

use zip::read::{ArchiveOffset, Config};
use zip::{CompressionMethod, ZipArchive};

use super::pickle::{Global, Id, LONGEST, Pickle, Value};
use crate::formats::Encoding;

/// The number at the beginning of a file that is not an archive.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
/// The only version of such files.
const VERSION: i64 = 1001;

/// The pickle of a file, and the bytes of its storages in the file, by key.
pub(super) struct TorchFile<'a> {
    pub pickle: Pickle<'a>,
    pub storages: HashMap<String, Range<usize>>,
}

/// A storage as a pickle describes it.
pub(super) struct Storage<'p> {
    pub encoding: Encoding,
    pub key: &'p str,
    /// Values of the whole storage in the file.
    pub count: usize,
    /// The values that belong to it, if it is a view of a part.
    pub part: Range<usize>,
}

/// Reads the tuple `('storage', class, key, location, count)`, with a view of it behind in old files.
pub(super) fn storage<'p>(pickle: &'p Pickle, tuple: Id) -> Result<Storage<'p>, String> {
    let unknown = || "refers to a storage in an unknown way".to_string();
    let &[tag, class, key, _, count, ref rest @ ..] = pickle.list(tuple) else { return Err(unknown()) };
    let (Value::Text("storage"), &Value::Global(Global::Storage(encoding)), Value::Text(key)) =
        (pickle.get(tag), pickle.get(class), pickle.get(key))
    else {
        return Err(unknown());
    };
    let encoding = encoding.ok_or("has a storage of complex or quantized values, which ett does not read")?;
    let count = size(pickle, count).ok_or_else(unknown)?;
    let part = match rest.first().map(|&view| pickle.list(view)) {
        Some(&[_, offset, length, ..]) => {
            let offset = size(pickle, offset).ok_or_else(unknown)?;
            let end = size(pickle, length).and_then(|n| offset.checked_add(n)).filter(|&end| end <= count);
            offset..end.ok_or_else(|| {
                format!("refers to a part of the storage `{key}` that is larger than the whole")
            })?
        }
        _ => 0..count,
    };
    Ok(Storage { encoding, key, count, part })
}

/// A number that is not negative.
pub(super) fn size(pickle: &Pickle, id: Id) -> Option<usize> {
    match pickle.get(id) {
        &Value::Int(n) => usize::try_from(n).ok(),
        _ => None,
    }
}

/// Reads an archive: `NAME/data.pkl`, and the storages as `NAME/data/KEY`.
pub(super) fn of_archive(bytes: &[u8]) -> Result<TorchFile<'_>, String> {
    let broken = |e| format!("is not a complete zip archive ({e}); fetch or copy it again");
    let config = Config { archive_offset: ArchiveOffset::Known(0) };
    let mut zip = ZipArchive::with_config(config, Cursor::new(bytes)).map_err(broken)?;
    let without = "is a zip archive without the `data.pkl` that torch.save writes";
    let folder = folder(&zip).ok_or(without)?;
    let (mut pickle, mut storages) = (None, HashMap::new());
    for i in 0..zip.len() {
        let entry = zip.by_index_raw(i).map_err(broken)?;
        let Some(name) = entry.name_raw().strip_prefix(&*folder).and_then(|n| n.strip_prefix(b"/")) else {
            continue;
        };
        if !(name == b"data.pkl" || name == b"byteorder" || name.starts_with(b"data/")) {
            continue;
        }
        let name = String::from_utf8_lossy(name).into_owned();
        if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
            return Err(format!(
                "its entry `{name}` is compressed or encrypted, which torch.save never does; unpack it and pack it \
                 again without compression (zip -0)"
            ));
        }
        let range = entry.data_start().and_then(|start| range(start, entry.size(), bytes.len()));
        let range =
            range.ok_or_else(|| format!("its entry `{name}` is beyond its end; fetch or copy it again"))?;
        match name.strip_prefix("data/") {
            Some(key) => drop(storages.insert(key.to_string(), range)),
            None if name == "data.pkl" => pickle = Some(&bytes[range]),
            None => little(&bytes[range])?,
        }
    }
    let pickle = pickle.ok_or(without)?;
    if pickle.len() > LONGEST {
        return Err(format!("its data.pkl has {} bytes, wanted at most {LONGEST}", pickle.len()));
    }
    Ok(TorchFile { pickle: Pickle::read(pickle)?, storages })
}

/// The folder of everything, which is named like the file when it was saved.
fn folder(zip: &ZipArchive<Cursor<&[u8]>>) -> Option<Vec<u8>> {
    let mut folders = zip.file_names_raw().filter_map(|name| name.strip_suffix(b"/data.pkl"));
    folders.find(|folder| !folder.contains(&b'/')).map(<[u8]>::to_vec)
}

/// Checks the order of bytes that an archive says.
fn little(order: &[u8]) -> Result<(), String> {
    match order {
        b"little" => Ok(()),
        _ => {
            Err("was not written by a machine that stores the lowest byte first; save it again on one".into())
        }
    }
}

fn range(start: u64, length: u64, size: usize) -> Option<Range<usize>> {
    let start = usize::try_from(start).ok()?;
    let end = start.checked_add(usize::try_from(length).ok()?)?;
    (end <= size).then_some(start..end)
}

/// Reads the form before PyTorch 1.6: pickles of a number, a version, the machine, the values and the keys of the
/// storages, then for each storage the count of its values and their bytes.
pub(super) fn of_pickles(bytes: &[u8]) -> Result<TorchFile<'_>, String> {
    let foreign = || "is a pickle, but not one of torch.save".to_string();
    let mut at = 0;
    let mut next = || {
        let pickle = Pickle::read(&bytes[at..])?;
        at += pickle.length;
        Ok::<_, String>(pickle)
    };
    let magic = next()?;
    if !matches!(magic.get(magic.root), Value::Long(digits) if *digits == MAGIC) {
        return Err(foreign());
    }
    let version = next()?;
    if !matches!(version.get(version.root), Value::Int(VERSION)) {
        return Err(foreign());
    }
    machine(&next()?)?;
    let (pickle, keys) = (next()?, next()?);
    let widths = widths(&pickle)?;
    let mut storages = HashMap::new();
    for &key in keys.list(keys.root) {
        let &Value::Text(key) = keys.get(key) else { return Err(foreign()) };
        let width = widths.get(key).ok_or_else(|| format!("its storage `{key}` is used by nothing"))?;
        let short = || format!("ends within its storage `{key}`; fetch or copy it again");
        let count = bytes[at..].first_chunk().map(|b| u64::from_le_bytes(*b)).ok_or_else(short)?;
        let length = count.checked_mul(*width as u64).ok_or_else(short)?;
        let range = range(at as u64 + 8, length, bytes.len()).ok_or_else(short)?;
        at = range.end;
        if storages.insert(key.to_string(), range).is_some() {
            return Err(format!("has the storage `{key}` twice"));
        }
    }
    Ok(TorchFile { pickle, storages })
}

/// Checks the order of bytes in the description of the machine.
fn machine(pickle: &Pickle) -> Result<(), String> {
    let Value::Dict(items) = pickle.get(pickle.root) else { return Ok(()) };
    let is = |key| matches!(pickle.get(key), Value::Text("little_endian"));
    match items.iter().find(|(key, _)| is(*key)).map(|(_, value)| pickle.get(*value)) {
        Some(Value::Bool(false)) => little(b"big"),
        _ => Ok(()),
    }
}

/// The bytes of a value of each storage.
fn widths<'p>(pickle: &'p Pickle) -> Result<HashMap<&'p str, usize>, String> {
    let mut widths = HashMap::new();
    for value in pickle.values() {
        if let Value::Storage(tuple) = value {
            let storage = storage(pickle, *tuple)?;
            let width = storage.encoding.block().1;
            if *widths.entry(storage.key).or_insert(width) != width {
                return Err(format!("its storage `{}` has two types", storage.key));
            }
        }
    }
    Ok(widths)
}
