//! Files made to harm: nothing panics, and memory and time are bounded.

use super::kinds::fixtures;
use super::*;
use crate::rng::Philox;
use std::path::PathBuf;
use std::time::{Duration, Instant};

fn refused(bytes: &[u8]) -> String {
    Bitmap::decode(bytes, Path::new("a"), usize::MAX).unwrap_err().to_string()
}

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures").join(name)).unwrap()
}

fn chunk(kind: &[u8; 4], body: &[u8]) -> Vec<u8> {
    let checked = [kind, body].concat();
    let crc = crc32fast::hash(&checked).to_be_bytes();
    [&(body.len() as u32).to_be_bytes()[..], &checked, &crc].concat()
}

/// A PNG with more chunks after its header.
fn with_chunk(more: &[u8]) -> Vec<u8> {
    let png = fixture("kinds/orientation.png");
    [&png[..33], more, &png[33..]].concat()
}

#[test]
fn changed_files_do_no_harm() {
    let seconds: f64 = std::env::var("ETT_MUTATE_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(3.0);
    let seed: u64 = std::env::var("ETT_MUTATE_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let files: Vec<(PathBuf, Vec<u8>)> = fixtures("")
        .into_iter()
        .chain(fixtures("kinds"))
        .map(|p| (p.clone(), std::fs::read(p).unwrap()))
        .collect();
    let mut rng = Philox::new(seed, 0);
    let (since, mut slowest, mut count) = (Instant::now(), (Duration::ZERO, String::new()), 0);
    while since.elapsed().as_secs_f64() < seconds {
        let (path, whole) = &files[rng.below(files.len())];
        let mut bytes = whole.clone();
        for _ in 0..1 + rng.below(3) {
            let (from, to) = (rng.below(bytes.len()), rng.below(bytes.len()));
            match rng.below(6) {
                0 => bytes[from] ^= 1 << rng.below(8),
                1 => bytes[from] = [0, 1, 0x7F, 0x80, 0xFF][rng.below(5)],
                2 => bytes.truncate(from.max(MAGIC as usize)),
                3 => drop(bytes.drain(from.min(to)..from.max(to).min(bytes.len() - 1))),
                4 => {
                    let part = bytes[from.min(to)..from.max(to)].to_vec();
                    bytes.splice(from..from, part);
                }
                _ => {
                    let other = &files[rng.below(files.len())].1;
                    let part = rng.below(other.len());
                    bytes.splice(from..from, other[part..].iter().copied().take(64));
                }
            }
        }
        let (shorter, begun) = ([1, 8, 30, usize::MAX][rng.below(4)], Instant::now());
        if let Err(e) = Bitmap::decode(&bytes, path, shorter) {
            // A panic is caught, but no decoder should have one.
            let e = e.to_string();
            assert!(!e.contains("the decoder failed"), "{} after change {count}: {bytes:?}", path.display());
        }
        count += 1;
        if begun.elapsed() > slowest.0 {
            slowest = (begun.elapsed(), format!("{} {}x", path.display(), bytes.len()));
        }
    }
    assert!(slowest.0 < Duration::from_secs(10), "{slowest:?}");
    println!("{count} changed files, the slowest took {slowest:?}");
}

#[test]
fn compressed_chunks_beside_the_pixels_do_not_fill_memory() {
    // The compressed data of a black picture are 36 MB of zeros.
    let black = ::image::GrayImage::new(6000, 6000);
    let mut png = Cursor::new(Vec::new());
    black.write_to(&mut png, ImageFormat::Png).unwrap();
    let png = png.into_inner();
    let (mut at, mut zeros) = (8, Vec::new());
    while at + 12 <= png.len() {
        let length = u32::from_be_bytes(png[at..at + 4].try_into().unwrap()) as usize;
        if &png[at + 4..at + 8] == b"IDAT" {
            zeros.extend_from_slice(&png[at + 8..at + 8 + length]);
        }
        at += 12 + length;
    }
    assert!(zeros.len() < 1 << 20, "{}", zeros.len());
    let whole = Bitmap::decode(&fixture("kinds/orientation.png"), Path::new("a"), usize::MAX).unwrap();
    let text = with_chunk(&chunk(b"zTXt", &[b"Comment\0\0", &zeros[..]].concat()));
    let profile = with_chunk(&chunk(b"iCCP", &[b"ICC\0\0", &zeros[..]].concat()));
    let international = with_chunk(&chunk(b"iTXt", &[b"Comment\0\x01\0\0\0", &zeros[..]].concat()));
    for bomb in [text, profile, international] {
        let begun = Instant::now();
        // Whether the chunk is ignored or the file refused, it costs little.
        if let Ok(bitmap) = Bitmap::decode(&bomb, Path::new("a"), usize::MAX) {
            assert_eq!(bitmap, whole);
        }
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
}

#[test]
fn sizes_that_no_file_holds_are_refused() {
    // PNG: 0 x 16 pixels; and 16 bits with alpha, which need eight bytes per pixel.
    let header = |width: u32, height: u32, depth: u8, color: u8| {
        let body = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[depth, color, 0, 0, 0]].concat();
        let png = fixture("kinds/orientation.png");
        [&png[..8], &chunk(b"IHDR", &body), &png[33..]].concat()
    };
    assert!(refused(&header(0, 16, 8, 2)).contains("cannot be decoded"));
    assert!(
        refused(&header(6000, 6000, 16, 6)).contains("too large"),
        "{}",
        refused(&header(6000, 6000, 16, 6))
    );
    assert!(refused(&header(16384, 6000, 8, 0)).contains("too large"));
    // GIF: the size of the canvas is at byte 6.
    let gif = fixture("kinds/animated.gif");
    for (size, want) in [([0xFF; 4], "too large"), ([0, 0x40, 0, 0x40], "too large"), ([0; 4], "a: ")] {
        let changed = [&gif[..6], &size, &gif[10..]].concat();
        assert!(refused(&changed).contains(want), "{}", refused(&changed));
    }
    // JPEG: height and width are behind the marker of the frame.
    let jpeg = fixture("progressive.jpg");
    let frame = jpeg.windows(2).position(|w| w == [0xFF, 0xC2]).unwrap();
    for (size, want) in
        [([0xFF; 4], "too large"), ([0x40, 0, 0x40, 0], "too large"), ([0; 4], "cannot be decoded")]
    {
        let changed = [&jpeg[..frame + 5], &size, &jpeg[frame + 9..]].concat();
        assert!(refused(&changed).contains(want), "{}", refused(&changed));
        assert!(Bitmap::decode(&changed, Path::new("a"), 1).is_err());
    }
}

#[test]
fn scans_without_number_are_refused() {
    let jpeg = fixture("progressive.jpg");
    let end = jpeg.len() - 2;
    let first = jpeg.windows(2).position(|w| w == [0xFF, 0xDA]).unwrap();
    let length = jpeg[first + 4..].windows(2).position(|w| w[0] == 0xFF && w[1] != 0).unwrap() + 4;
    let scan = &jpeg[first..first + length];
    let bomb = [&jpeg[..end], &scan.repeat(5000), &jpeg[end..]].concat();
    let e = refused(&bomb);
    assert!(e.contains("more than 100 scans"), "{e}");
}

#[test]
fn absurd_exif_blocks_are_ignored() {
    let jpeg = fixture("baseline.jpg");
    let whole = Bitmap::decode(&jpeg, Path::new("a"), usize::MAX).unwrap();
    let bodies: [&[u8]; 5] = [
        b"Exif\0\0",
        b"Exif\0\0MM\0\x2a\xff\xff\xff\xff",
        b"Exif\0\0II\x2a\0\x08\0\0\0\xff\xff",
        b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0",
        &[0xFF; 300],
    ];
    for body in bodies {
        let segment = [&[0xFF, 0xE1], &(body.len() as u16 + 2).to_be_bytes()[..], body].concat();
        let with = [&jpeg[..2], &segment.repeat(500), &jpeg[2..]].concat();
        assert_eq!(Bitmap::decode(&with, Path::new("a"), usize::MAX).unwrap(), whole, "{body:?}");
    }
}

#[test]
fn cut_gifs_are_refused() {
    let gif = fixture("kinds/interlaced.gif");
    for percent in [10, 50, 80, 90] {
        let e = refused(&gif[..gif.len() * percent / 100]);
        assert!(e.contains("cannot be decoded"), "{percent}%: {e}");
    }
}
