//! Pictures as files hold them: decoding.

use std::fs::File;
use std::io::{Cursor, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use ::image::metadata::Orientation;
use ::image::{
    ColorType, DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, RgbImage,
};

use super::jpeg;
use crate::error::{Error, Result};

/// Longest side that is decoded, in pixels.
pub(super) const MAX_SIDE: u32 = 16384;
/// Maximum memory of a decoder in bytes, its output included: 89 million RGB pixels. Also the maximum file size.
pub(super) const MAX_BYTES: u64 = 256 << 20;
/// Bytes from which a format is recognised.
const MAGIC: u64 = 64;

/// An RGB picture of bytes, 0 to 255 from black to white.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// `[height, width, 3]`, row by row.
    pub rgb: Vec<u8>,
}

/// Why a picture is refused.
#[derive(Debug)]
pub(super) enum Refused {
    /// It exceeds a limit.
    TooLarge,
    /// It cannot be decoded, for this reason.
    Broken(String),
}

impl Refused {
    /// It cannot be decoded, for a reason that may be anything printable.
    pub fn broken(why: impl ToString) -> Self {
        Refused::Broken(why.to_string())
    }
}

impl From<ImageError> for Refused {
    fn from(e: ImageError) -> Self {
        match e {
            ImageError::Limits(_) => Refused::TooLarge,
            e => Refused::broken(e),
        }
    }
}

impl Bitmap {
    /// Decodes a PNG, JPEG, WebP or GIF file; the format is recognised by the content, not by the name. EXIF
    /// orientation is applied, transparency is flattened onto white, CMYK is converted to RGB, and 16-bit values are
    /// rounded to 8 bits. Colour profiles (ICC) and gamma are ignored: values are taken as they are. Of an animation, the
    /// first frame is taken.
    ///
    /// Pictures with a side over 16384 pixels, or that need more than 256 MiB to decode, are refused, before memory is
    /// allocated for them; so are JPEGs of more scans than any program writes. So are files that are truncated or have
    /// holes, as far as their format allows this to be detected: a GIF and a lossy WebP have no checksum.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::decode(&read(path)?, path, usize::MAX)
    }

    /// Decodes the bytes of a picture, see [`Bitmap::open`]; errors are about `name`. A JPEG is decoded at 1/2 or 1/4
    /// of its size if its shorter side is at least twice `shorter` then. The result is the same at each call.
    pub fn decode(bytes: &[u8], name: &Path, shorter: usize) -> Result<Self> {
        let format = format(bytes).map_err(|what| Error::data(name, what))?;
        // A panic of a decoder is a fault of the file to whoever uses the picture: one file must not end a run. Nothing
        // that a decoder has changed is used after it.
        let decoded = catch_unwind(AssertUnwindSafe(|| match format {
            ImageFormat::Jpeg => jpeg::decode(bytes, shorter),
            format => other(bytes, format),
        }));
        let broken = |why: &str| Error::data(name, format!("this picture cannot be decoded ({why})"));
        match decoded {
            Ok(Ok(bitmap)) if bitmap.rgb.is_empty() => Err(Error::data(name, "this picture has no pixels")),
            Ok(Ok(bitmap)) => Ok(bitmap),
            Ok(Err(Refused::TooLarge)) => Err(too_large(name)),
            Ok(Err(Refused::Broken(why))) => Err(broken(&why)),
            Err(_) => Err(broken("the decoder failed")),
        }
    }

    /// The picture turned as a camera noted it.
    pub(super) fn turned(self, orientation: Orientation) -> Self {
        let (height, width) = (self.height as u32, self.width as u32);
        if orientation == Orientation::NoTransforms {
            return self;
        }
        let Some(image) = RgbImage::from_raw(width, height, self.rgb) else {
            return Bitmap { height: 0, width: 0, rgb: Vec::new() };
        };
        let mut image = DynamicImage::ImageRgb8(image);
        image.apply_orientation(orientation);
        Bitmap { height: image.height() as usize, width: image.width() as usize, rgb: image.into_bytes() }
    }
}

/// The bytes of a picture file; only the beginning if the file is not a picture.
pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    let io = |e| Error::io(path)(e);
    // Opening a pipe would block until another process writes to it.
    match std::fs::metadata(path).map_err(io)?.file_type() {
        kind if kind.is_dir() => return Err(Error::data(path, "this is a folder, not a picture")),
        kind if !kind.is_file() => {
            return Err(Error::data(path, "this is a device or a pipe, not a picture"));
        }
        _ => {}
    }
    let file = File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    (&file).take(MAGIC).read_to_end(&mut bytes).map_err(io)?;
    if format(&bytes).is_ok() {
        (&file).take(MAX_BYTES).read_to_end(&mut bytes).map_err(io)?;
    }
    match bytes.len() as u64 > MAX_BYTES {
        true => Err(too_large(path)),
        false => Ok(bytes),
    }
}

/// The format given by the first bytes of a file, if it can be decoded; otherwise what is wrong.
fn format(bytes: &[u8]) -> std::result::Result<ImageFormat, String> {
    match ::image::guess_format(bytes) {
        Ok(format @ (ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP | ImageFormat::Gif)) => {
            Ok(format)
        }
        Ok(other) => {
            let name = other.extensions_str().first().unwrap_or(&"").to_uppercase();
            Err(format!("this is a {name} picture, not a PNG, JPEG, WebP or GIF picture; convert it"))
        }
        Err(_) if bytes.is_empty() => Err("this file is empty, not a PNG, JPEG, WebP or GIF picture".into()),
        Err(_) => Err("this is not a PNG, JPEG, WebP or GIF picture".into()),
    }
}

fn too_large(path: &Path) -> Error {
    let most = MAX_BYTES >> 20;
    let what = format!("this picture is too large; the limits are {MAX_SIDE} pixels per side and {most} MiB");
    Error::data(path, what)
}

/// Fails if a RIFF file is shorter than the sizes in it.
fn whole_riff(bytes: &[u8]) -> std::result::Result<(), String> {
    let size = bytes.get(4..8).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
    let (got, want) = (bytes.len() as u64, u64::from(size) + 8);
    match got < want {
        true => Err(format!("it has {got} bytes of {want}")),
        false => chunks(bytes.get(12..).unwrap_or_default()),
    }
}

/// Fails if a chunk is longer than the file: a decoder would reserve that much memory.
fn chunks(mut bytes: &[u8]) -> std::result::Result<(), String> {
    while let Some((head, rest)) = bytes.split_at_checked(8) {
        let size = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        let Some(chunk) = rest.get(..size) else {
            return Err(format!("it has a chunk of {size} bytes, of which {} are there", rest.len()));
        };
        // A frame of an animation has chunks of its own.
        if &head[..4] == b"ANMF" {
            chunks(chunk.get(16..).unwrap_or_default())?;
        }
        bytes = rest.get(size.next_multiple_of(2)..).unwrap_or_default();
    }
    Ok(())
}

/// Decodes a picture that is not a JPEG.
fn other(bytes: &[u8], format: ImageFormat) -> std::result::Result<Bitmap, Refused> {
    if format == ImageFormat::WebP {
        // Its decoder accepts incomplete files.
        whole_riff(bytes).map_err(Refused::Broken)?;
    }
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_BYTES);
    reader.limits(limits);
    let mut decoder = reader.into_decoder()?;
    let (width, height) = decoder.dimensions();
    let (color, size) = (decoder.color_type(), decoder.total_bytes());
    // Not every decoder counts its output against its limit. Pixels of fewer than three bytes are copied at the end.
    let pixels = u64::from(width) * u64::from(height);
    let copy = match format {
        // Planes of a lossy picture and of its transparency.
        ImageFormat::WebP => 5 * pixels,
        _ if color.bytes_per_pixel() < 3 => 3 * pixels,
        _ => 0,
    };
    if size.saturating_add(copy) > MAX_BYTES {
        return Err(Refused::TooLarge);
    }
    // A broken EXIF block is no reason to lose the picture.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut values = vec![0; size as usize];
    decoder.read_image(&mut values)?;
    let rgb = flatten(values, color)?;
    Ok(Bitmap { height: height as usize, width: width as usize, rgb }.turned(orientation))
}

/// The RGB bytes of decoded pixels, on white where they are transparent.
fn flatten(values: Vec<u8>, color: ColorType) -> std::result::Result<Vec<u8>, Refused> {
    let byte = |p: &[u8], i: usize| u32::from(p[i]);
    let word = |p: &[u8], i: usize| u32::from(u16::from_ne_bytes([p[2 * i], p[2 * i + 1]]));
    let on_white = |c: u32, a: u32| ((c * a + 255 * (255 - a) + 127) / 255) as u8;
    let deep_on_white = |c: u32, a: u32| {
        let (c, a) = (u64::from(c), u64::from(a));
        rounded(((c * a + 65535 * (65535 - a) + 32767) / 65535) as u32)
    };
    Ok(match color {
        ColorType::Rgb8 => values,
        ColorType::L8 => pixels(values, 1, |p| [p[0]; 3]),
        ColorType::La8 => pixels(values, 2, |p| [on_white(byte(p, 0), byte(p, 1)); 3]),
        ColorType::Rgba8 => pixels(values, 4, |p| [0, 1, 2].map(|i| on_white(byte(p, i), byte(p, 3)))),
        ColorType::L16 => pixels(values, 2, |p| [rounded(word(p, 0)); 3]),
        ColorType::La16 => pixels(values, 4, |p| [deep_on_white(word(p, 0), word(p, 1)); 3]),
        ColorType::Rgb16 => pixels(values, 6, |p| [0, 1, 2].map(|i| rounded(word(p, i)))),
        ColorType::Rgba16 => pixels(values, 8, |p| [0, 1, 2].map(|i| deep_on_white(word(p, i), word(p, 3)))),
        other => return Err(Refused::Broken(format!("its colours are {other:?}, wanted grey or RGB"))),
    })
}

/// A 16-bit value as a byte.
fn rounded(value: u32) -> u8 {
    ((value + 128) / 257) as u8
}

/// Converts pixels of `size` bytes, in place if three bytes are not more than that.
fn pixels(mut values: Vec<u8>, size: usize, rgb: impl Fn(&[u8]) -> [u8; 3]) -> Vec<u8> {
    if size < 3 {
        return values.chunks_exact(size).flat_map(rgb).collect();
    }
    let count = values.len() / size;
    for i in 0..count {
        let pixel = rgb(&values[i * size..][..size]);
        values[3 * i..][..3].copy_from_slice(&pixel);
    }
    values.truncate(3 * count);
    values.shrink_to_fit();
    values
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod kinds;
#[cfg(test)]
mod tests;
