//! Vector graphics.

use std::fs;

use ett::data::Source;

use super::{open, scratch};

const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Bytes of a block; the format allows 128 KiB.
const BLOCK: usize = 64 << 10;

/// Lines are stored in a frame, so that the fuzzer sees them; what is compressed already stays as it is.
pub fn run(bytes: &[u8]) {
    let path = scratch("vector").join("a.vector");
    let frame = if bytes.starts_with(&ZSTD) { bytes.to_vec() } else { stored(bytes) };
    fs::write(&path, frame).expect("a file");
    open(Source::Vector, &path);
}

/// A frame with a window of 1 MiB, without a checksum.
fn stored(bytes: &[u8]) -> Vec<u8> {
    let mut frame = [&ZSTD[..], &[0, 80]].concat();
    let mut blocks = bytes.chunks(BLOCK).peekable();
    if blocks.peek().is_none() {
        frame.extend([1, 0, 0]);
    }
    while let Some(block) = blocks.next() {
        let header = (block.len() as u32) << 3 | u32::from(blocks.peek().is_none());
        frame.extend(&header.to_le_bytes()[..3]);
        frame.extend(block);
    }
    frame
}
