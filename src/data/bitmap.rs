//! Pictures as files hold them: decoding.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;

use ::image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits};

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

impl Bitmap {
    /// Decodes a PNG, JPEG or WebP file; the format is recognised by the content, not by the name. EXIF orientation
    /// is applied, transparency is flattened onto white, and 16-bit values are rounded to 8 bits. Of an animation,
    /// the first frame is taken.
    ///
    /// Pictures with a side over 16384 pixels, or that need more than 256 MiB to decode, are refused. So are files
    /// that are truncated or have holes, as far as their format allows this to be detected: a lossy WebP has no
    /// checksum.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::decode(&read(path)?, path, usize::MAX)
    }

    /// Decodes the bytes of a picture, see [`Bitmap::open`]; errors are about `name`. A picture whose shorter side is
    /// larger than `shorter` may be decoded at a reduced size that is not below it.
    pub fn decode(bytes: &[u8], name: &Path, shorter: usize) -> Result<Self> {
        let _ = shorter;
        let broken = |why: &dyn std::fmt::Display| {
            Error::data(name, format!("this picture cannot be decoded ({why})"))
        };
        let format = format(bytes).map_err(|what| Error::data(name, what))?;
        let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
        let mut limits = Limits::default();
        limits.max_image_width = Some(MAX_SIDE);
        limits.max_image_height = Some(MAX_SIDE);
        limits.max_alloc = Some(MAX_BYTES);
        reader.limits(limits);
        let decoded = decode(reader).map_err(|e| match e {
            ImageError::Limits(_) => too_large(name),
            e => broken(&e),
        })?;
        // The decoders of these two formats accept incomplete files.
        match format {
            ImageFormat::Jpeg => jpeg::check(bytes).map_err(|why| broken(&why))?,
            ImageFormat::WebP => whole_riff(bytes).map_err(|why| broken(&why))?,
            _ => {}
        }
        let bitmap = flatten(decoded);
        if bitmap.rgb.is_empty() {
            return Err(Error::data(name, "this picture has no pixels"));
        }
        Ok(bitmap)
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
        Ok(format @ (ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP)) => Ok(format),
        Ok(other) => {
            let name = other.extensions_str().first().unwrap_or(&"").to_uppercase();
            Err(format!("this is a {name} picture, not a PNG, JPEG or WebP picture; convert it"))
        }
        Err(_) if bytes.is_empty() => Err("this file is empty, not a PNG, JPEG or WebP picture".into()),
        Err(_) => Err("this is not a PNG, JPEG or WebP picture".into()),
    }
}

fn too_large(path: &Path) -> Error {
    let most = MAX_BYTES >> 20;
    let what = format!("this picture is too large; the limits are {MAX_SIDE} pixels per side and {most} MiB");
    Error::data(path, what)
}

/// Fails if a RIFF file is shorter than the size in its header.
fn whole_riff(bytes: &[u8]) -> std::result::Result<(), String> {
    let size = bytes.get(4..8).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
    let (got, want) = (bytes.len() as u64, u64::from(size) + 8);
    match got < want {
        true => Err(format!("it has {got} bytes of {want}")),
        false => Ok(()),
    }
}

fn decode(reader: ImageReader<Cursor<&[u8]>>) -> std::result::Result<DynamicImage, ImageError> {
    let mut decoder = reader.into_decoder()?;
    // Not every decoder counts its output against its limit.
    let mut output = Limits::default();
    output.max_alloc = Some(MAX_BYTES);
    output.reserve(decoder.total_bytes())?;
    // A broken EXIF block is no reason to lose the picture.
    let orientation = decoder.orientation().ok();
    let mut image = DynamicImage::from_decoder(decoder)?;
    if let Some(orientation) = orientation {
        image.apply_orientation(orientation);
    }
    Ok(image)
}

fn flatten(image: DynamicImage) -> Bitmap {
    let (height, width) = (image.height() as usize, image.width() as usize);
    let rgb = if image.color().has_alpha() {
        let on_white = |c: u8, a: u8| {
            let (c, a) = (u32::from(c), u32::from(a));
            ((c * a + 255 * (255 - a) + 127) / 255) as u8
        };
        image.into_rgba8().pixels().flat_map(|p| [0, 1, 2].map(|i| on_white(p.0[i], p.0[3]))).collect()
    } else {
        image.into_rgb8().into_raw()
    };
    Bitmap { height, width, rgb }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::image::Image;
    use crate::data::save_png;
    use crate::data::scratch::Scratch;

    /// A picture in which every pixel differs from its neighbours.
    fn ramp(height: usize, width: usize) -> Image {
        let rgb: Vec<u8> = (0..height * width * 3).map(|i| (i * 37 % 256) as u8).collect();
        Image::from_u8(height, width, &rgb).unwrap()
    }

    #[test]
    fn formats_are_told_by_content() {
        let dir = Scratch::new("formats");
        let rgb = ::image::RgbImage::from_pixel(9, 5, ::image::Rgb([200, 40, 90]));
        let grey = ::image::GrayImage::from_pixel(9, 5, ::image::Luma([77]));
        rgb.save_with_format(dir.path("a.png"), ImageFormat::Jpeg).unwrap();
        rgb.save_with_format(dir.path("b.jpg"), ImageFormat::WebP).unwrap();
        grey.save_with_format(dir.path("c"), ImageFormat::Png).unwrap();
        for (name, want, tolerance) in
            [("a.png", [200, 40, 90], 4), ("b.jpg", [200, 40, 90], 0), ("c", [77, 77, 77], 0)]
        {
            let image = Image::open(dir.path(name)).unwrap();
            assert_eq!((image.height, image.width), (5, 9));
            for pixel in image.to_u8().chunks(3) {
                for (got, want) in pixel.iter().zip(want) {
                    assert!((i32::from(*got) - want).abs() <= tolerance, "{name}: {pixel:?}");
                }
            }
        }
    }

    #[test]
    fn alpha_is_flattened_on_white() {
        let dir = Scratch::new("alpha");
        let mut rgba = ::image::RgbaImage::new(3, 1);
        rgba.put_pixel(0, 0, ::image::Rgba([10, 20, 30, 255]));
        rgba.put_pixel(1, 0, ::image::Rgba([10, 20, 30, 0]));
        rgba.put_pixel(2, 0, ::image::Rgba([0, 0, 255, 51]));
        rgba.save(dir.path("a.png")).unwrap();
        let image = Image::open(dir.path("a.png")).unwrap();
        assert_eq!(image.to_u8(), [10, 20, 30, 255, 255, 255, 204, 204, 255]);
    }

    #[test]
    fn sixteen_bits_are_rounded_to_eight() {
        let dir = Scratch::new("sixteen");
        let deep = ::image::ImageBuffer::from_pixel(2, 2, ::image::Rgb([0u16, 65535, 257 * 99]));
        deep.save(dir.path("a.png")).unwrap();
        assert_eq!(Image::open(dir.path("a.png")).unwrap().to_u8()[..3], [0, 255, 99]);
    }

    #[test]
    fn what_is_no_picture_is_refused() {
        let dir = Scratch::new("corrupt");
        let text = |name: &str| Image::open(dir.path(name)).unwrap_err().to_string();
        assert!(text("missing.png").contains("missing.png: "));
        dir.write("text.png", b"hello");
        assert!(text("text.png").contains("not a PNG, JPEG or WebP picture"));
        dir.write("empty.png", b"");
        assert!(text("empty.png").contains("not a PNG, JPEG or WebP picture"));
        save_png(dir.path("whole.png"), &ramp(40, 40)).unwrap();
        let whole = std::fs::read(dir.path("whole.png")).unwrap();
        dir.write("half.png", &whole[..whole.len() / 2]);
        assert!(text("half.png").contains("cannot be decoded"), "{}", text("half.png"));
        ::image::RgbImage::new(MAX_SIDE + 1, 1).save(dir.path("wide.png")).unwrap();
        assert!(text("wide.png").contains("too large"), "{}", text("wide.png"));
        // A header that declares 16384 x 16384 pixels is refused before anything is allocated.
        let mut bomb = whole[..33].to_vec();
        bomb[16..24].copy_from_slice(&[0, 0, 0x40, 0, 0, 0, 0x40, 0]);
        let crc = crc32(&bomb[12..29]);
        bomb[29..33].copy_from_slice(&crc.to_be_bytes());
        bomb.extend_from_slice(&whole[33..]);
        dir.write("bomb.png", &bomb);
        assert!(text("bomb.png").contains("too large"), "{}", text("bomb.png"));
    }

    #[test]
    fn cut_and_holed_files_of_every_format_are_refused() {
        let dir = Scratch::new("cut");
        save_png(dir.path("a.png"), &ramp(61, 83)).unwrap();
        let rgb = ramp(61, 83).to_u8();
        ::image::save_buffer(dir.path("a.webp"), &rgb, 83, 61, ::image::ExtendedColorType::Rgb8).unwrap();
        let files = [
            ("baseline.jpg", include_bytes!("../../tests/pictures/baseline.jpg").to_vec(), true),
            ("progressive.jpg", include_bytes!("../../tests/pictures/progressive.jpg").to_vec(), true),
            ("restart.jpg", include_bytes!("../../tests/pictures/restart.jpg").to_vec(), true),
            ("cmyk.jpg", include_bytes!("../../tests/pictures/cmyk.jpg").to_vec(), true),
            ("a.png", std::fs::read(dir.path("a.png")).unwrap(), true),
            // Neither lossless nor lossy WebP has a checksum.
            ("a.webp", std::fs::read(dir.path("a.webp")).unwrap(), false),
            ("lossy.webp", include_bytes!("../../tests/pictures/lossy.webp").to_vec(), false),
        ];
        for (name, whole, checked) in files {
            dir.write(name, &whole);
            let image = Image::open(dir.path(name)).unwrap();
            assert_eq!((image.height, image.width), (61, 83), "{name}");
            dir.write(name, &[&whole[..], &[0; 100]].concat());
            assert_eq!(Image::open(dir.path(name)).unwrap(), image, "{name} with bytes after it");
            for percent in [60, 50, 30, 95] {
                dir.write(name, &whole[..whole.len() * percent / 100]);
                let e = Image::open(dir.path(name)).expect_err(name).to_string();
                assert!(e.contains("cannot be decoded ("), "{name} cut to {percent}%: {e}");
            }
            if checked {
                let mut holed = whole.clone();
                holed[whole.len() * 6 / 10..whole.len() * 8 / 10].fill(0);
                dir.write(name, &holed);
                let e = Image::open(dir.path(name)).expect_err(name).to_string();
                assert!(e.contains("cannot be decoded ("), "{name} with a hole: {e}");
            }
        }
    }

    #[test]
    fn other_formats_folders_and_empty_files_are_named() {
        let dir = Scratch::new("others");
        dir.write("a.jpg", b"GIF89a...........");
        dir.write("b.jpg", b"II*\0............");
        dir.write("c.jpg", b"");
        dir.write("d.jpg/inside", b"");
        for (name, want) in [
            ("a.jpg", "this is a GIF picture, not a PNG, JPEG or WebP picture; convert it"),
            ("b.jpg", "this is a TIFF picture, not"),
            ("c.jpg", "this file is empty, not"),
            ("d.jpg", "this is a folder, not a picture"),
        ] {
            let e = Image::open(dir.path(name)).unwrap_err().to_string();
            assert!(e.contains(&format!("{name}: {want}")), "{e}");
        }
    }

    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0u32, |crc, &b| {
            (0..8).fold(crc ^ u32::from(b), |c, _| if c & 1 == 1 { c >> 1 ^ 0xEDB8_8320 } else { c >> 1 })
        })
    }
}
