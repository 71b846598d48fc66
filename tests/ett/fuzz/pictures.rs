//! Files of pictures.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use ett::data::Bitmap;

use super::whole;

/// The sides of a picture and a hash of its pixels, so that no two pictures are held at a time.
fn decode(bytes: &[u8], shorter: usize) -> Result<(usize, usize, u64), String> {
    let bitmap = Bitmap::decode(bytes, Path::new("x"), shorter).map_err(|e| e.to_string())?;
    whole(&bitmap);
    let mut hash = DefaultHasher::new();
    bitmap.rgb.hash(&mut hash);
    Ok((bitmap.height, bitmap.width, hash.finish()))
}

pub fn run(bytes: &[u8]) {
    let small = decode(bytes, 64);
    assert_eq!(small, decode(bytes, 64));
    // A reduced size is not below the wanted one, and never above that of the file, which may be too large to decode.
    let (Ok((height, width, _)), Ok((high, wide, _))) = (small, decode(bytes, usize::MAX)) else { return };
    assert!(height <= high && width <= wide);
    assert!(height.min(width) >= high.min(wide).min(64), "{height} x {width} of {high} x {wide}");
}
