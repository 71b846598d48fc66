//! Pictures of every kind that people have. `tests/pictures/make.py` makes them, and writes beside each what Pillow makes
//! of it.

use super::*;
use std::path::PathBuf;

/// The fixtures of a folder, without the pixels beside them.
pub(super) fn fixtures(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures").join(folder);
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let ends =
        |p: &PathBuf| p.extension().is_some_and(|e| ["png", "jpg", "webp", "gif"].iter().any(|k| e == *k));
    let mut all: Vec<PathBuf> = paths.filter(ends).collect();
    all.sort();
    all
}

/// The pixels in a PPM file.
fn ppm(path: &Path) -> Bitmap {
    let bytes = std::fs::read(path).unwrap();
    let end = bytes.iter().position(|&b| b == b'\n').unwrap();
    let header = std::str::from_utf8(&bytes[..end]).unwrap();
    let numbers: Vec<usize> = header.split(' ').skip(1).map(|n| n.parse().unwrap()).collect();
    Bitmap { width: numbers[0], height: numbers[1], rgb: bytes[end + 1..].to_vec() }
}

#[test]
fn every_kind_is_decoded_as_pillow_decodes_it() {
    let all = fixtures("kinds");
    assert!(all.len() > 25, "{}", all.len());
    for path in all {
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        let want = ppm(&PathBuf::from(format!("{}.ppm", path.display())));
        let got = Bitmap::open(&path).unwrap();
        assert_eq!((got.height, got.width), (want.height, want.width), "{name}");
        // Decoders of lossy formats round differently, and enlarge the colours of a JPEG by filters of their own.
        let tolerance = match name.as_str() {
            "cmyk.jpg" | "ycck.jpg" => 8,
            "lossy-alpha.webp" => 6,
            n if n.ends_with("jpg") => 4,
            _ => 1,
        };
        let furthest = got.rgb.iter().zip(&want.rgb).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(furthest <= tolerance, "{name}: {furthest} off");
    }
}

#[test]
fn reduced_jpegs_show_the_same() {
    for path in fixtures("").into_iter().chain(fixtures("kinds")) {
        if path.extension().is_none_or(|e| e != "jpg") {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        let name = path.file_name().unwrap().to_string_lossy();
        let whole = Bitmap::decode(&bytes, &path, usize::MAX).unwrap();
        let side = whole.height.min(whole.width);
        let smooth = path.parent().is_some_and(|f| f.ends_with("kinds"));
        for n in [1, 2, 4] {
            // A reduced picture is at least twice as large as wanted.
            let shorter = if n == 1 { side } else { side.div_ceil(n) / 2 };
            let small = Bitmap::decode(&bytes, &path, shorter).unwrap();
            assert_eq!(small, Bitmap::decode(&bytes, &path, shorter).unwrap(), "{name}");
            let n = if name.contains("cmyk") || name.contains("ycck") { 1 } else { n };
            assert_eq!(small.height, whole.height.div_ceil(n), "{name}");
            assert_eq!(small.width, whole.width.div_ceil(n), "{name}");
            // Reduced by two once more, it is the same. The other pictures have colours that vary from pixel to pixel.
            let (height, width) = (whole.height / (2 * n), whole.width / (2 * n));
            let means = |of: &Bitmap, n: usize| means(of, n, height, width);
            let off = difference(&means(&whole, 2 * n), &means(&small, 2));
            assert!(off < if smooth { 2.5 } else { 15.0 }, "{name} at 1/{n}: {off} off on average");
        }
    }
}

/// The mean values of `height` x `width` squares of `n` pixels per side.
fn means(bitmap: &Bitmap, n: usize, height: usize, width: usize) -> Vec<f64> {
    let value = |y: usize, x: usize, c: usize| f64::from(bitmap.rgb[(y * bitmap.width + x) * 3 + c]);
    let mean = |i: usize| {
        let (y, x, c) = (i / 3 / width * n, i / 3 % width * n, i % 3);
        (0..n * n).map(|k| value(y + k / n, x + k % n, c)).sum::<f64>() / (n * n) as f64
    };
    (0..height * width * 3).map(mean).collect()
}

fn difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>() / a.len() as f64
}

#[test]
fn codings_that_nobody_decodes_are_named() {
    let path = &fixtures("")[0];
    assert!(path.ends_with("baseline.jpg"));
    let mut bytes = std::fs::read(path).unwrap();
    let frame = bytes.windows(2).position(|w| w == [0xFF, 0xC0]).unwrap();
    for (marker, coding) in [(0xC9, "arithmetic"), (0xCA, "arithmetic"), (0xC3, "lossless")] {
        bytes[frame + 1] = marker;
        let e = Bitmap::decode(&bytes, path, usize::MAX).unwrap_err().to_string();
        assert!(e.contains(&format!("it uses {coding}")) && e.contains("convert it"), "{e}");
    }
}
