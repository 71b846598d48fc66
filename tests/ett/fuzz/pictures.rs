//! Files of pictures.

use std::path::Path;

use ett::data::Bitmap;

use super::whole;

pub fn run(bytes: &[u8]) {
    let decode = |shorter| Bitmap::decode(bytes, Path::new("x"), shorter).map_err(|e| e.to_string());
    let (small, again) = (decode(64), decode(64));
    assert!(small == again, "decoded differently again: {:?}", again.err());
    let Ok(small) = small else { return };
    whole(&small);
    // A reduced size is not below the wanted one, and never above that of the file, which may be too large to decode.
    let Ok(full) = decode(usize::MAX) else { return };
    assert!(small.height <= full.height && small.width <= full.width);
    let least = full.height.min(full.width).min(64);
    assert!(small.height.min(small.width) >= least, "{}x{}", small.height, small.width);
}
