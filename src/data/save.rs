//! Writing pictures to files.

use std::io::Cursor;
use std::path::Path;

use ::image::codecs::jpeg::JpegEncoder;
use ::image::{ExtendedColorType, ImageFormat, write_buffer_with_format};

use super::image::Image;
use crate::error::{Error, Result};
use crate::files;

/// Quality of JPEGs, from 1 to 100.
const QUALITY: u8 = 95;

/// A format in which pictures are written, 8 bits a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Lossless.
    Png,
    /// Slightly lossy.
    Jpeg,
    /// Lossless.
    WebP,
}

impl Format {
    /// The format given by the extension of a file name; PNG if there is none.
    pub fn of(path: &Path) -> Result<Self> {
        let Some(ending) = path.extension() else { return Ok(Format::Png) };
        match ending.to_string_lossy().to_ascii_lowercase().as_str() {
            "png" => Ok(Format::Png),
            "jpg" | "jpeg" => Ok(Format::Jpeg),
            "webp" => Ok(Format::WebP),
            _ => Err(Error::data(
                path,
                "pictures are written as .png, .jpg, .jpeg or .webp; use another ending",
            )),
        }
    }
}

/// Writes a picture in the format given by the file's extension (see [`Format::of`] and [`files::replace`]); values
/// outside [-1, 1] are clamped.
pub fn save(path: impl AsRef<Path>, image: &Image) -> Result<()> {
    let path = path.as_ref();
    write(path, image, Format::of(path)?)
}

/// Writes a PNG, see [`save`].
pub fn save_png(path: impl AsRef<Path>, image: &Image) -> Result<()> {
    write(path.as_ref(), image, Format::Png)
}

fn write(path: &Path, image: &Image, format: Format) -> Result<()> {
    image.check("save")?;
    let bytes = encode(path, &image.to_u8(), image.height, image.width, format)?;
    files::replace(path, |file| file.put(&bytes))?;
    Ok(())
}

/// The bytes of a picture file with these `[height, width, 3]` pixels; errors are about `name`.
pub(super) fn encode(
    name: &Path,
    pixels: &[u8],
    height: usize,
    width: usize,
    format: Format,
) -> Result<Vec<u8>> {
    let (width, height, color) = (width as u32, height as u32, ExtendedColorType::Rgb8);
    let mut bytes = Cursor::new(Vec::new());
    let encoded = match format {
        Format::Png => write_buffer_with_format(&mut bytes, pixels, width, height, color, ImageFormat::Png),
        Format::WebP => write_buffer_with_format(&mut bytes, pixels, width, height, color, ImageFormat::WebP),
        Format::Jpeg => {
            JpegEncoder::new_with_quality(&mut bytes, QUALITY).encode(pixels, width, height, color)
        }
    };
    encoded.map_err(|e| Error::data(name, format!("this picture cannot be written ({e})")))?;
    Ok(bytes.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::scratch::Scratch;

    #[test]
    fn the_ending_chooses_the_format() {
        let dir = Scratch::new("endings");
        let image = Image::filled(9, 5, 0.25);
        let starts: [(&str, &[u8]); 6] = [
            ("a.png", b"\x89PNG"),
            ("a", b"\x89PNG"),
            ("a.jpg", b"\xff\xd8\xff"),
            ("a.JPEG", b"\xff\xd8\xff"),
            ("a.webp", b"RIFF"),
            ("b.tar.png", b"\x89PNG"),
        ];
        for (name, start) in starts {
            save(dir.path(name), &image).unwrap();
            assert!(std::fs::read(dir.path(name)).unwrap().starts_with(start), "{name}");
            let back = Image::open(dir.path(name)).unwrap();
            assert_eq!((back.height, back.width), (9, 5), "{name}");
            assert!(back.to_u8().iter().zip(image.to_u8()).all(|(a, b)| a.abs_diff(b) <= 2), "{name}");
        }
        let e = save(dir.path("a.gif"), &image).unwrap_err().to_string();
        assert!(e.contains("a.gif: pictures are written as .png, .jpg"), "{e}");
        assert!(!dir.path("a.gif").exists());
    }
}
