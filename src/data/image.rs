//! Pictures on the host: decoding, resizing and cropping.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;

use ::image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits};
use fast_image_resize::images::{Image as Target, ImageRef as Source};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use super::jpeg;
use crate::error::{Error, Result};
use crate::rng::Philox;

/// Longest side that is decoded, in pixels.
const MAX_SIDE: u32 = 16384;
/// Maximum memory of a decoder in bytes, its output included: 89 million RGB pixels. Also the maximum file size.
const MAX_BYTES: u64 = 256 << 20;
/// Bytes from which a format is recognised.
const MAGIC: u64 = 64;
/// Maximum aspect ratio. A longer strip, fitted by its shorter side, would grow without bound.
const MAX_ASPECT: usize = 64;

/// An RGB picture, values in [-1, 1] (black to white).
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// `[height, width, 3]`, row by row.
    pub pixels: Vec<f32>,
}

/// Which square of a picture is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Crop {
    /// The crop in the middle.
    #[default]
    Centre,
    /// A uniformly random crop, for training.
    Random,
}

impl Image {
    /// A picture of one grey value.
    pub fn filled(height: usize, width: usize, value: f32) -> Self {
        Image { height, width, pixels: vec![value; height * width * 3] }
    }

    /// Decodes a PNG, JPEG or WebP file; the format is recognised by the content, not by the name. EXIF orientation
    /// is applied, transparency is flattened onto white, and 16-bit values are rounded to 8 bits. Of an animation,
    /// the first frame is taken.
    ///
    /// Pictures with a side over 16384 pixels, or that need more than 256 MiB to decode, are refused. So are files
    /// that are truncated or have holes, as far as their format allows this to be detected: a lossy WebP has no
    /// checksum.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = read(path)?;
        let broken = |why: &dyn std::fmt::Display| {
            Error::data(path, format!("this picture cannot be decoded ({why})"))
        };
        let format = format(&bytes).map_err(|what| Error::data(path, what))?;
        let mut reader = ImageReader::with_format(Cursor::new(&bytes[..]), format);
        let mut limits = Limits::default();
        limits.max_image_width = Some(MAX_SIDE);
        limits.max_image_height = Some(MAX_SIDE);
        limits.max_alloc = Some(MAX_BYTES);
        reader.limits(limits);
        let decoded = decode(reader).map_err(|e| match e {
            ImageError::Limits(_) => too_large(path),
            e => broken(&e),
        })?;
        // The decoders of these two formats accept incomplete files.
        match format {
            ImageFormat::Jpeg => jpeg::check(&bytes).map_err(|why| broken(&why))?,
            ImageFormat::WebP => whole_riff(&bytes).map_err(|why| broken(&why))?,
            _ => {}
        }
        let image = flatten(decoded);
        if image.pixels.is_empty() {
            return Err(Error::data(path, "this picture has no pixels"));
        }
        Ok(image)
    }

    /// Values rounded to bytes, [-1, 1] to 0 to 255; values outside are clamped and NaN becomes black.
    pub fn to_u8(&self) -> Vec<u8> {
        // `as` saturates and converts NaN to 0.
        self.pixels.iter().map(|&x| ((x + 1.0) * 127.5).round() as u8).collect()
    }

    /// A picture from bytes `[height, width, 3]`; the inverse of [`Image::to_u8`].
    pub fn from_u8(height: usize, width: usize, rgb: &[u8]) -> Result<Self> {
        if rgb.len() != height * width * 3 {
            let want = format!("{} for {height}x{width}x3", height * width * 3);
            return Err(Error::arg("Image::from_u8", "rgb", format!("{} bytes", rgb.len()), want));
        }
        Ok(Image { height, width, pixels: rgb.iter().map(|&b| unit(f32::from(b))).collect() })
    }

    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        if self.pixels.is_empty() || self.pixels.len() != self.height * self.width * 3 {
            let got = format!("{}x{} with {} values", self.height, self.width, self.pixels.len());
            return Err(Error::arg(op, "image", got, "height x width x 3 values, at least one pixel"));
        }
        Ok(())
    }

    fn row(&self, y: usize, left: usize, width: usize) -> &[f32] {
        &self.pixels[(y * self.width + left) * 3..][..width * 3]
    }
}

fn unit(byte: f32) -> f32 {
    byte / 127.5 - 1.0
}

/// The bytes of a picture file; only the beginning if the file is not a picture.
fn read(path: &Path) -> Result<Vec<u8>> {
    let io = |e| Error::io(path)(e);
    let file = File::open(path).map_err(io)?;
    if file.metadata().map_err(io)?.is_dir() {
        return Err(Error::data(path, "this is a folder, not a picture"));
    }
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

fn flatten(image: DynamicImage) -> Image {
    let (height, width) = (image.height() as usize, image.width() as usize);
    let pixels = if image.color().has_alpha() {
        let on_white = |c: u8, a: u8| {
            let (c, a) = (f32::from(c), f32::from(a));
            unit((c * a + 255.0 * (255.0 - a)) / 255.0)
        };
        image.into_rgba8().pixels().flat_map(|p| [0, 1, 2].map(|i| on_white(p.0[i], p.0[3]))).collect()
    } else {
        image.into_rgb8().as_raw().iter().map(|&b| unit(f32::from(b))).collect()
    };
    Image { height, width, pixels }
}

/// A `size` x `size` picture for training: the shorter side is resized to `size` (antialiased bicubic), then a square
/// is cropped. With `flip`, a random half of the pictures is mirrored left to right.
///
/// Random numbers are drawn from `rng` for [`Crop::Random`] and for `flip` only.
pub fn fit(image: &Image, size: usize, crop: Crop, flip: bool, rng: &mut Philox) -> Result<Image> {
    let resized = fit_shorter(image, size)?;
    Ok(cut(resized.as_ref().unwrap_or(image), size, crop, flip, rng))
}

/// The picture with its shorter side resized to `size`, or `None` if it has that size already.
pub(super) fn fit_shorter(image: &Image, size: usize) -> Result<Option<Image>> {
    image.check("fit")?;
    if size == 0 || size > MAX_SIDE as usize {
        return Err(Error::arg("fit", "size", size, format!("1 to {MAX_SIDE}")));
    }
    let (short, long) = (image.height.min(image.width), image.height.max(image.width));
    if long > MAX_ASPECT * short {
        let got = format!("{}x{}", image.height, image.width);
        let want = format!("a picture whose longer side is at most {MAX_ASPECT} times the shorter");
        return Err(Error::arg("fit", "image", got, want));
    }
    if short == size {
        return Ok(None);
    }
    let scaled = |side: usize| ((side * size) as f64 / short as f64).round() as usize;
    resize(image, scaled(image.height), scaled(image.width)).map(Some)
}

/// Crops a square of side `size` from a picture that is at least that large.
pub(super) fn cut(image: &Image, size: usize, crop: Crop, flip: bool, rng: &mut Philox) -> Image {
    let (spare_y, spare_x) = (image.height - size, image.width - size);
    let (top, left) = match crop {
        Crop::Centre => (spare_y / 2, spare_x / 2),
        Crop::Random => (rng.below(spare_y + 1), rng.below(spare_x + 1)),
    };
    let mirror = flip && rng.u32() & 1 == 1;
    let mut pixels = Vec::with_capacity(size * size * 3);
    for y in top..top + size {
        let row = image.row(y, left, size);
        if mirror {
            pixels.extend(row.chunks_exact(3).rev().flatten());
        } else {
            pixels.extend_from_slice(row);
        }
    }
    Image { height: size, width: size, pixels }
}

/// The whole picture at nearly its own aspect ratio: scaled down so that no side exceeds `max_side` (never up, except
/// by rounding), with each side rounded to a multiple of `multiple`.
pub fn fit_multiple(image: &Image, max_side: usize, multiple: usize) -> Result<Image> {
    image.check("fit_multiple")?;
    if !(1..=MAX_SIDE as usize).contains(&multiple) {
        return Err(Error::arg("fit_multiple", "multiple", multiple, format!("1 to {MAX_SIDE}")));
    }
    if !(multiple..=MAX_SIDE as usize).contains(&max_side) {
        let want = format!("{multiple} to {MAX_SIDE} pixels");
        return Err(Error::arg("fit_multiple", "max_side", max_side, want));
    }
    let scale = (max_side as f64 / image.height.max(image.width) as f64).min(1.0);
    let rounded = |side: usize| {
        let steps = (side as f64 * scale / multiple as f64).round() as usize;
        steps.clamp(1, max_side / multiple) * multiple
    };
    let (height, width) = (rounded(image.height), rounded(image.width));
    if (height, width) == (image.height, image.width) {
        return Ok(image.clone());
    }
    resize(image, height, width)
}

fn resize(image: &Image, height: usize, width: usize) -> Result<Image> {
    let failed =
        |e: &dyn std::fmt::Display| Error::arg("resize", "image", e, "a picture that can be resized");
    let mut out = Image::filled(height, width, 0.0);
    let bytes = bytemuck::cast_slice(&image.pixels);
    let source = Source::new(image.width as u32, image.height as u32, bytes, PixelType::F32x3)
        .map_err(|e| failed(&e))?;
    let bytes = bytemuck::cast_slice_mut(&mut out.pixels);
    let mut target = Target::from_slice_u8(width as u32, height as u32, bytes, PixelType::F32x3)
        .map_err(|e| failed(&e))?;
    // Convolution widens the filter when it shrinks a picture, which gives the antialiasing.
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom));
    Resizer::new().resize(&source, &mut target, &options).map_err(|e| failed(&e))?;
    // Bicubic overshoots at edges.
    out.pixels.iter_mut().for_each(|x| *x = x.clamp(-1.0, 1.0));
    Ok(out)
}

/// Pictures laid out in rows, with `gap` white pixels around and between them. A row is as high as its highest
/// picture, a column as wide as its widest; smaller pictures are placed at the top left of their cell.
pub fn grid(rows: &[Vec<&Image>], gap: usize) -> Result<Image> {
    for image in rows.iter().flatten() {
        image.check("grid")?;
    }
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    if columns == 0 {
        return Err(Error::arg("grid", "rows", "empty", "at least one picture"));
    }
    let heights: Vec<usize> = rows.iter().map(|r| r.iter().map(|i| i.height).max().unwrap_or(0)).collect();
    let widths: Vec<usize> = (0..columns)
        .map(|c| rows.iter().filter_map(|r| r.get(c)).map(|i| i.width).max().unwrap_or(0))
        .collect();
    let side = |cells: &[usize]| cells.iter().sum::<usize>() + gap * (cells.len() + 1);
    let mut out = Image::filled(side(&heights), side(&widths), 1.0);
    let mut top = gap;
    for (row, height) in rows.iter().zip(&heights) {
        let mut left = gap;
        for (image, width) in row.iter().zip(&widths) {
            for y in 0..image.height {
                let start = ((top + y) * out.width + left) * 3;
                out.pixels[start..start + image.width * 3].copy_from_slice(image.row(y, 0, image.width));
            }
            left += width + gap;
        }
        top += height + gap;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::save_png;
    use crate::data::scratch::Scratch;

    fn rng() -> Philox {
        Philox::new(1, 0)
    }

    /// A picture in which every pixel differs from its neighbours.
    fn ramp(height: usize, width: usize) -> Image {
        let rgb: Vec<u8> = (0..height * width * 3).map(|i| (i * 37 % 256) as u8).collect();
        Image::from_u8(height, width, &rgb).unwrap()
    }

    #[test]
    fn png_round_trips_every_byte() {
        let dir = Scratch::new("png");
        let rgb: Vec<u8> = (0..=255).flat_map(|i| [i, 255 - i, i / 2]).collect();
        let image = Image::from_u8(16, 16, &rgb).unwrap();
        assert_eq!(image.to_u8(), rgb);
        save_png(dir.path("a.png"), &image).unwrap();
        assert_eq!(Image::open(dir.path("a.png")).unwrap(), image);
        assert_eq!((image.pixels[0], image.pixels[1]), (-1.0, 1.0));
    }

    #[test]
    fn saving_clamps() {
        let image =
            Image { height: 1, width: 2, pixels: vec![-7.0, 9.0, f32::NAN, 0.0, f32::INFINITY, -1.0] };
        assert_eq!(image.to_u8(), [0, 255, 0, 128, 255, 0]);
        let e = save_png("/nowhere/a.png", &image).unwrap_err().to_string();
        assert!(e.starts_with("/nowhere/a.png: "), "{e}");
        let broken = Image { height: 2, width: 2, pixels: vec![0.0; 5] };
        let e = save_png("a.png", &broken).unwrap_err().to_string();
        assert!(e.contains("2x2 with 5 values"), "{e}");
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

    #[test]
    fn fitting_keeps_a_picture_of_that_size() {
        let image = ramp(8, 8);
        assert_eq!(fit(&image, 8, Crop::Centre, false, &mut rng()).unwrap(), image);
        assert_eq!(fit(&image, 8, Crop::Random, false, &mut rng()).unwrap(), image);
    }

    #[test]
    fn crops_lie_inside_and_centre_is_central() {
        let image = ramp(5, 12);
        let centre = fit(&image, 5, Crop::Centre, false, &mut rng()).unwrap();
        assert_eq!(centre.row(2, 0, 5), image.row(2, 3, 5));
        let mut lefts = std::collections::BTreeSet::new();
        let mut rng = rng();
        for _ in 0..200 {
            let crop = fit(&image, 5, Crop::Random, false, &mut rng).unwrap();
            let left = (0..8).find(|&l| crop.row(0, 0, 5) == image.row(0, l, 5)).unwrap();
            assert_eq!(crop.row(4, 0, 5), image.row(4, left, 5));
            lefts.insert(left);
        }
        assert_eq!(lefts.len(), 8, "every crop occurs");
    }

    #[test]
    fn half_of_the_pictures_are_mirrored() {
        let image = ramp(4, 4);
        let mut rng = rng();
        let mut mirrored = 0;
        for _ in 0..400 {
            let out = fit(&image, 4, Crop::Centre, true, &mut rng).unwrap();
            if out != image {
                assert_eq!(out.row(1, 0, 1), image.row(1, 3, 1));
                assert_eq!(out.row(1, 3, 1), image.row(1, 0, 1));
                mirrored += 1;
            }
        }
        assert!((150..250).contains(&mirrored), "{mirrored}");
    }

    #[test]
    fn odd_sizes_fit() {
        for (height, width) in [(1, 1), (1, 5), (7, 3), (31, 97), (100, 100)] {
            for size in [1, 2, 16, 33] {
                let image = fit(&ramp(height, width), size, Crop::Random, true, &mut rng()).unwrap();
                assert_eq!((image.height, image.width, image.pixels.len()), (size, size, size * size * 3));
                assert!(image.pixels.iter().all(|x| (-1.0..=1.0).contains(x)));
            }
        }
        let constant = fit(&Image::filled(31, 97, 0.25), 16, Crop::Centre, false, &mut rng()).unwrap();
        assert!(constant.pixels.iter().all(|x| (x - 0.25).abs() < 1e-5));
        let e = fit(&ramp(1, 65), 16, Crop::Centre, false, &mut rng()).unwrap_err().to_string();
        assert!(e.contains("1x65"), "{e}");
        assert!(fit(&ramp(2, 2), 0, Crop::Centre, false, &mut rng()).is_err());
    }

    #[test]
    fn shrinking_is_antialiased() {
        // Black and white columns, each one pixel wide: without a widened filter they would alias.
        let pixels = (0..64 * 64 * 3).map(|i| if i / 3 % 2 == 0 { -1.0 } else { 1.0 }).collect();
        let image = Image { height: 64, width: 64, pixels };
        let small = fit(&image, 8, Crop::Centre, false, &mut rng()).unwrap();
        assert!(small.pixels.iter().all(|x| x.abs() < 0.1), "{:?}", &small.pixels[..24]);
    }

    #[test]
    fn sides_become_multiples() {
        for (height, width, max, multiple, want) in [
            (100, 200, 64, 16, (32, 64)),
            (64, 48, 256, 16, (64, 48)),
            (50, 30, 256, 16, (48, 32)),
            (3, 5, 64, 16, (16, 16)),
            (10, 1000, 100, 16, (16, 96)),
        ] {
            let image = fit_multiple(&ramp(height, width), max, multiple).unwrap();
            assert_eq!((image.height, image.width), want);
        }
        assert_eq!(fit_multiple(&ramp(64, 48), 256, 16).unwrap(), ramp(64, 48));
        for (max, multiple, want) in [
            (8, 16, "`max_side` is 8, wanted 16 to 16384 pixels"),
            (0, 16, "`max_side` is 0, wanted 16 to 16384 pixels"),
            (16385, 16, "`max_side` is 16385"),
            (8, 0, "`multiple` is 0, wanted 1 to 16384"),
        ] {
            let e = fit_multiple(&ramp(2, 2), max, multiple).unwrap_err().to_string();
            assert!(e.contains(want), "{e}");
        }
    }

    #[test]
    fn grids_hold_their_pictures() {
        let (a, b, c) = (ramp(2, 3), ramp(4, 2), ramp(1, 1));
        let sheet = grid(&[vec![&a, &b], vec![&c]], 1).unwrap();
        assert_eq!((sheet.height, sheet.width), (1 + 4 + 1 + 1 + 1, 1 + 3 + 1 + 2 + 1));
        assert_eq!(sheet.row(2, 1, 3), a.row(1, 0, 3));
        assert_eq!(sheet.row(4, 5, 2), b.row(3, 0, 2));
        assert_eq!(sheet.row(6, 1, 1), c.row(0, 0, 1));
        assert!(sheet.row(0, 0, 8).iter().all(|&x| x == 1.0));
        assert!(grid(&[], 1).is_err());
        assert!(grid(&[vec![]], 1).is_err());
    }
}
