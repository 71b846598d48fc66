//! Files of tensors in the formats of other programs: what they list can be read, and is the same every time.

use std::fs;

use ett::formats::Archive;

use super::scratch;

/// Tensors that are read.
const READ: usize = 8;
/// Values of a tensor that is read; more are only listed.
const VALUES: usize = 1 << 20;

pub fn safetensors(bytes: &[u8]) {
    open("safetensors", bytes);
}

pub fn gguf(bytes: &[u8]) {
    open("gguf", bytes);
}

/// PyTorch's files as they are, and any bytes as the pickle of an archive with two storages.
pub fn pickle(bytes: &[u8]) {
    open("pickle", bytes);
    let storage = [0; 64];
    let entries = [("a/data.pkl", bytes), ("a/data/0", &storage), ("a/data/1", &storage[..48])];
    open("pickle", &stored(&entries));
}

fn open(target: &str, bytes: &[u8]) {
    let path = scratch(target).join("a");
    fs::write(&path, bytes).expect("a file");
    let first = Archive::open(&path).map_err(|e| e.to_string());
    let again = Archive::open(&path).map_err(|e| e.to_string());
    let (first, again) = match (first, again) {
        (Ok(first), Ok(again)) => (first, again),
        (first, again) => return assert_eq!(first.err(), again.err()),
    };
    assert_eq!((first.tensors(), first.about()), (again.tensors(), again.about()));
    assert!(first.about().to_string().len() <= 64 * bytes.len() + (16 << 20));
    for (i, (name, info)) in first.tensors().iter().enumerate() {
        assert!(info.bytes.start <= info.bytes.end && info.bytes.end <= first.size(), "{info:?}");
        if i >= READ || info.count() > VALUES || !info.encoding.is_read() {
            continue;
        }
        let read = first.read(name).expect("what is listed can be read");
        assert_eq!((&read.dims, read.values.len()), (&info.dims, info.count()));
        let again = again.read(name).expect("what is listed can be read");
        assert!(read.values.iter().map(|x| x.to_bits()).eq(again.values.iter().map(|x| x.to_bits())));
        if let Some((encoding, raw)) = first.raw(name).expect("what is listed can be read") {
            assert_eq!(encoding.bytes(info.count()), Some(raw.len()));
        }
    }
}

/// A zip archive without compression. Readers of weights do not compare its checksums.
fn stored(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut zip, mut list) = (Vec::new(), Vec::new());
    for (name, bytes) in entries {
        let at = zip.len() as u32;
        let mut header = [20u16, 0, 0, 0, 0x21, 0, 0].map(u16::to_le_bytes).concat();
        header.extend([bytes.len() as u32; 2].map(u32::to_le_bytes).concat());
        header.extend([name.len() as u16, 0].map(u16::to_le_bytes).concat());
        zip.extend([b"PK\x03\x04", &*header, name.as_bytes(), bytes].concat());
        list.extend([b"PK\x01\x02\x14\0", &*header, &[0; 10], &at.to_le_bytes(), name.as_bytes()].concat());
    }
    let count = (entries.len() as u16).to_le_bytes();
    let (start, length) = ((zip.len() as u32).to_le_bytes(), (list.len() as u32).to_le_bytes());
    zip.extend(list);
    zip.extend([b"PK\x05\x06\0\0\0\0", &count[..], &count, &length, &start, &[0; 2]].concat());
    zip
}
