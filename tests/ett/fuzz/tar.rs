//! Tar shards, plain and compressed.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

use ett::data::Source;

use super::{open, scratch};

/// Shards so far. Indices are told apart by name, size and time of their shard, and two inputs may be alike in the last
/// two.
static SHARDS: AtomicUsize = AtomicUsize::new(0);
const BLOCK: usize = 512;

pub fn run(bytes: &[u8]) {
    shard(bytes);
    let mended = mended(bytes);
    if mended != bytes {
        shard(&mended);
    }
}

fn shard(bytes: &[u8]) {
    let folder = scratch("tar").join(SHARDS.fetch_add(1, Ordering::Relaxed).to_string());
    fs::create_dir(&folder).expect("a folder");
    let packed = bytes.starts_with(&[0x1f, 0x8b]);
    let path = folder.join(if packed { "a.tar.gz" } else { "a.tar" });
    fs::write(&path, bytes).expect("a shard");
    open(Source::WebDataset, &path);
    fs::remove_dir_all(&folder).expect("its end");
    if let (true, Some(cache)) = (packed, std::env::var_os("ETT_CACHE")) {
        // The unpacked shard.
        let _ = fs::remove_dir_all(cache);
    }
}

/// The archive with right checksums in its headers, which mutations do not find.
fn mended(bytes: &[u8]) -> Vec<u8> {
    let (mut bytes, mut at) = (bytes.to_vec(), 0);
    while let Some(header) = bytes.get_mut(at..at + BLOCK).filter(|h| h.iter().any(|&b| b != 0)) {
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let size = std::str::from_utf8(&header[124..136]).unwrap_or_default().trim_matches(['\0', ' ']);
        let size = usize::from_str_radix(size, 8).unwrap_or(0);
        at = at.saturating_add(BLOCK).saturating_add(size.div_ceil(BLOCK).saturating_mul(BLOCK));
        if at > bytes.len() {
            break;
        }
    }
    bytes
}
