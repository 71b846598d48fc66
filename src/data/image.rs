//! Pictures as models see them: values in [-1, 1].

use std::path::Path;

use super::bitmap::Bitmap;
use crate::error::{Error, Result};

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

impl Image {
    /// A picture of one grey value.
    pub fn filled(height: usize, width: usize, value: f32) -> Self {
        Image { height, width, pixels: vec![value; height * width * 3] }
    }

    /// Decodes a picture file, see [`Bitmap::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Ok(Self::from(&Bitmap::open(path)?))
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

    pub(super) fn row(&self, y: usize, left: usize, width: usize) -> &[f32] {
        &self.pixels[(y * self.width + left) * 3..][..width * 3]
    }
}

impl From<&Bitmap> for Image {
    fn from(bitmap: &Bitmap) -> Self {
        let pixels = bitmap.rgb.iter().map(|&b| unit(f32::from(b))).collect();
        Image { height: bitmap.height, width: bitmap.width, pixels }
    }
}

impl From<&Image> for Bitmap {
    /// The picture with its values rounded to bytes, see [`Image::to_u8`].
    fn from(image: &Image) -> Self {
        Bitmap { height: image.height, width: image.width, rgb: image.to_u8() }
    }
}

fn unit(byte: f32) -> f32 {
    byte / 127.5 - 1.0
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
