//! Bringing pictures to the size at which a model sees them.

use fast_image_resize::images::{Image as Target, ImageRef as Source};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use serde::{Deserialize, Serialize};

use super::bitmap::{Bitmap, MAX_SIDE};
use super::image::Image;
use crate::error::{Error, Result};
use crate::rng::Philox;

/// Maximum aspect ratio. A longer strip, fitted by its shorter side, would grow without bound.
const MAX_ASPECT: usize = 64;
/// Aspect ratios of buckets, width over height: powers of this number.
const RATIO_STEP: f64 = std::f64::consts::SQRT_2;
/// The largest of these powers: pictures are at most 4 times as wide as high, or as high as wide.
const RATIO_STEPS: i32 = 4;

/// Which part of a picture is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Crop {
    /// The crop in the middle.
    #[default]
    Centre,
    /// A uniformly random crop, for training.
    Random,
}

/// Which sizes pictures are brought to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Framing {
    /// Squares of `data.size` pixels per side.
    #[default]
    Square,
    /// The nearest of nine aspect ratios from 1:4 to 4:1, with at most as many visual tokens as such a square. Sides are
    /// multiples of the tokenizer's factor.
    Buckets,
}

/// The sizes at which pictures are used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frames(Vec<(usize, usize)>);

impl Frames {
    /// Squares of `size` pixels per side.
    pub fn square(size: usize) -> Self {
        Frames(vec![(size, size)])
    }

    /// The sizes of `framing`, for a tokenizer that makes one token of `side` x `side` pixels.
    pub fn new(framing: Framing, size: usize, side: usize) -> Self {
        let tokens = (size / side.max(1)).pow(2);
        if framing == Framing::Square || tokens == 0 {
            return Frames::square(size);
        }
        let mut all: Vec<(usize, usize)> = (-RATIO_STEPS..=RATIO_STEPS)
            .map(|k| {
                let ratio = RATIO_STEP.powi(k);
                // The longer side is what is left of the tokens, so that both orientations have the same sizes.
                let short = ((tokens as f64 / ratio.max(1.0 / ratio)).sqrt().round() as usize).max(1);
                let long = tokens / short;
                if k < 0 { (long * side, short * side) } else { (short * side, long * side) }
            })
            .collect();
        all.dedup();
        Frames(all)
    }

    /// Height and width of each, from the highest to the widest.
    pub fn sizes(&self) -> &[(usize, usize)] {
        &self.0
    }

    /// A shorter side that is enough for a picture of any aspect ratio.
    pub(super) fn shorter(&self) -> usize {
        let side = self.0.iter().map(|&(h, w)| h.min(w)).max().unwrap_or(1);
        // A picture between two aspect ratios is scaled to cover the nearest one.
        if self.0.len() > 1 { side * 5 / 4 } else { side }
    }

    /// The size whose aspect ratio is nearest to that of a picture.
    fn nearest(&self, bitmap: &Bitmap) -> (usize, usize) {
        let log = |h: usize, w: usize| (w as f64 / h as f64).ln();
        let want = log(bitmap.height, bitmap.width);
        let distance = |&(h, w): &(usize, usize)| (log(h, w) - want).abs();
        self.0.iter().copied().min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or((1, 1))
    }
}

/// A picture that covers one of the sizes at which pictures are used, with as little to crop as possible.
#[derive(Debug)]
pub(super) struct Fitted {
    height: u32,
    width: u32,
    bitmap: Bitmap,
}

impl Fitted {
    /// Scales a picture (antialiased bicubic) to cover the nearest of `frames`, and crops it if the crop is fixed.
    pub fn new(bitmap: Bitmap, frames: &Frames, crop: Crop) -> Result<Self> {
        check(&bitmap)?;
        let (height, width) = frames.nearest(&bitmap);
        let mut fitted =
            Fitted { height: height as u32, width: width as u32, bitmap: cover(bitmap, height, width)? };
        if crop == Crop::Centre {
            fitted.bitmap = fitted.cut(crop, false, &mut Philox::new(0, 0));
        }
        Ok(fitted)
    }

    /// Bytes of its pixels.
    pub fn bytes(&self) -> u64 {
        self.bitmap.rgb.len() as u64
    }

    /// The picture at its size. With `flip`, a random half of the pictures is mirrored left to right.
    pub fn cut(&self, crop: Crop, flip: bool, rng: &mut Philox) -> Bitmap {
        let (height, width, from) = (self.height as usize, self.width as usize, &self.bitmap);
        let (spare_y, spare_x) = (from.height - height, from.width - width);
        let (top, left) = match crop {
            Crop::Centre => (spare_y / 2, spare_x / 2),
            Crop::Random => (rng.below(spare_y + 1), rng.below(spare_x + 1)),
        };
        let mirror = flip && rng.u32() & 1 == 1;
        let mut rgb = Vec::with_capacity(height * width * 3);
        for y in top..top + height {
            let row = &from.rgb[(y * from.width + left) * 3..][..width * 3];
            match mirror {
                true => rgb.extend(row.chunks_exact(3).rev().flatten()),
                false => rgb.extend_from_slice(row),
            }
        }
        Bitmap { height, width, rgb }
    }
}

fn check(bitmap: &Bitmap) -> Result<()> {
    let (height, width) = (bitmap.height, bitmap.width);
    if bitmap.rgb.is_empty() || bitmap.rgb.len() != height * width * 3 {
        let got = format!("{height}x{width} with {} values", bitmap.rgb.len());
        return Err(Error::arg("fit", "image", got, "height x width x 3 values, at least one pixel"));
    }
    if height.max(width) > MAX_ASPECT * height.min(width) {
        let want = format!("a picture whose longer side is at most {MAX_ASPECT} times the shorter");
        return Err(Error::arg("fit", "image", format!("{height}x{width}"), want));
    }
    Ok(())
}

/// The picture scaled so that it covers `height` x `width`, with one side equal.
fn cover(bitmap: Bitmap, height: usize, width: usize) -> Result<Bitmap> {
    let (h, w) = (bitmap.height as f64, bitmap.width as f64);
    let (high, wide) = (height as f64 / h, width as f64 / w);
    let scaled = match high >= wide {
        true => (height, ((w * height as f64 / h).round() as usize).max(width)),
        false => (((h * width as f64 / w).round() as usize).max(height), width),
    };
    resize(bitmap, scaled.0, scaled.1)
}

/// A `size` x `size` picture: the shorter side is resized to `size` (antialiased bicubic), then a square is cropped. With
/// `flip`, a random half of the pictures is mirrored left to right. Values are rounded to bytes.
///
/// Random numbers are drawn from `rng` for [`Crop::Random`] and for `flip` only.
pub fn fit(image: &Image, size: usize, crop: Crop, flip: bool, rng: &mut Philox) -> Result<Image> {
    image.check("fit")?;
    if size == 0 || size > MAX_SIDE as usize {
        return Err(Error::arg("fit", "size", size, format!("1 to {MAX_SIDE}")));
    }
    let fitted = Fitted::new(Bitmap::from(image), &Frames::square(size), crop)?;
    // A picture with a fixed crop is cropped already, and cropping it again changes nothing.
    Ok(Image::from(&fitted.cut(crop, flip, rng)))
}

/// The whole picture at nearly its own aspect ratio: scaled down so that no side exceeds `max_side` (never up, except
/// by rounding), with each side rounded to a multiple of `multiple`. Values are rounded to bytes.
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
    Ok(Image::from(&resize(Bitmap::from(image), rounded(image.height), rounded(image.width))?))
}

/// The picture resized by antialiased bicubic interpolation.
pub(super) fn resize(bitmap: Bitmap, height: usize, width: usize) -> Result<Bitmap> {
    if (height, width) == (bitmap.height, bitmap.width) {
        return Ok(bitmap);
    }
    let failed =
        |e: &dyn std::fmt::Display| Error::arg("resize", "image", e, "a picture that can be resized");
    let mut rgb = vec![0; height * width * 3];
    let source = Source::new(bitmap.width as u32, bitmap.height as u32, &bitmap.rgb, PixelType::U8x3)
        .map_err(|e| failed(&e))?;
    let mut target = Target::from_slice_u8(width as u32, height as u32, &mut rgb, PixelType::U8x3)
        .map_err(|e| failed(&e))?;
    // Convolution widens the filter when it shrinks a picture, which gives the antialiasing.
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom));
    Resizer::new().resize(&source, &mut target, &options).map_err(|e| failed(&e))?;
    Ok(Bitmap { height, width, rgb })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rng() -> Philox {
        Philox::new(1, 0)
    }

    /// A picture in which every pixel differs from its neighbours.
    fn ramp(height: usize, width: usize) -> Image {
        let rgb: Vec<u8> = (0..height * width * 3).map(|i| (i * 37 % 256) as u8).collect();
        Image::from_u8(height, width, &rgb).unwrap()
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
        let constant = fit(&Image::filled(31, 97, 0.2), 16, Crop::Centre, false, &mut rng()).unwrap();
        assert!(constant.to_u8().iter().all(|&x| x == 153));
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
    fn buckets_keep_the_aspect_ratio_and_the_budget() {
        for (size, side) in [(512, 16), (256, 16), (64, 8), (32, 16)] {
            let frames = Frames::new(Framing::Buckets, size, side);
            let tokens = |&(h, w): &(usize, usize)| (h / side) * (w / side);
            assert!(frames.sizes().iter().all(|f| f.0 % side == 0 && f.1 % side == 0));
            assert!(frames.sizes().iter().all(|f| tokens(f) <= (size / side).pow(2)));
            assert!(frames.sizes().contains(&(size, size)));
            assert!(frames.sizes().iter().all(|&(h, w)| frames.sizes().contains(&(w, h))));
        }
        let frames = Frames::new(Framing::Buckets, 64, 8);
        assert_eq!(
            frames.sizes(),
            [(128, 32), (96, 40), (80, 48), (72, 56), (64, 64), (56, 72), (48, 80), (40, 96), (32, 128)]
        );
        let at = |h, w| {
            let bitmap = Bitmap { height: h, width: w, rgb: ramp(h, w).to_u8() };
            let out = Fitted::new(bitmap, &frames, Crop::Random).unwrap().cut(Crop::Random, true, &mut rng());
            assert_eq!(out.rgb.len(), out.height * out.width * 3);
            (out.height, out.width)
        };
        assert_eq!(
            (at(10, 10), at(10, 40), at(90, 10), at(7, 10)),
            ((64, 64), (32, 128), (128, 32), (56, 72))
        );
        assert_eq!(Frames::new(Framing::Square, 64, 8), Frames::square(64));
    }

    #[test]
    fn a_reduced_picture_still_covers_its_size() {
        let frames = Frames::new(Framing::Buckets, 512, 16);
        for k in 0..200 {
            // Aspect ratios from 1:20 to 20:1.
            let ratio = 20f64.powf(k as f64 / 100.0 - 1.0);
            let (h, w) = (1000.0 / ratio.max(1.0), 1000.0 * ratio.min(1.0));
            let wide = Bitmap { height: h.round() as usize, width: w.round() as usize, rgb: vec![] };
            let (height, width) = frames.nearest(&wide);
            let scale = (height as f64 / h).max(width as f64 / w);
            assert!(h.min(w) * scale <= frames.shorter() as f64, "{ratio}: {height}x{width}");
        }
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
}
