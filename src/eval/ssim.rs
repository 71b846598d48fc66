//! Structural similarity of pictures.

use crate::data::Image;
use crate::error::{Error, Result};

const WINDOW: usize = 11;
const SIGMA: f64 = 1.5;
/// Values lie in [-1, 1].
const RANGE: f64 = 2.0;
const C1: f64 = (0.01 * RANGE) * (0.01 * RANGE);
const C2: f64 = (0.03 * RANGE) * (0.03 * RANGE);

/// Structural similarity (Wang et al., "Image quality assessment: from error visibility to structural similarity",
/// 2004): 1 for equal pictures, lower for less similar ones, at least -1.
///
/// Windows are 11x11, Gaussian with a standard deviation of 1.5 pixels, and lie inside the picture; in smaller
/// pictures they have the largest odd side that fits. The result is the mean over windows and colours. Pictures are
/// `[H, W, 3]`, of equal size.
pub fn ssim(a: &Image, b: &Image) -> Result<f64> {
    let size = |i: &Image| format!("{}x{} with {} values", i.height, i.width, i.pixels.len());
    if (a.height, a.width, a.pixels.len()) != (b.height, b.width, b.pixels.len()) {
        return Err(Error::arg("ssim", "b", size(b), format!("{} like the first", size(a))));
    }
    if a.pixels.is_empty() || a.pixels.len() != a.height * a.width * 3 {
        return Err(Error::arg("ssim", "a", size(a), "height x width x 3 values, at least one pixel"));
    }
    let window = gaussian(a.height.min(a.width));
    let mut sum = 0.0;
    let mut windows = 0;
    for channel in 0..3 {
        let plane = |i: &Image| -> Vec<f64> {
            i.pixels.iter().skip(channel).step_by(3).map(|&v| f64::from(v)).collect()
        };
        let (x, y) = (plane(a), plane(b));
        let mean = |x: &[f64], y: Option<&[f64]>| match y {
            None => filter(x, a.width, &window),
            Some(y) => {
                let products: Vec<f64> = x.iter().zip(y).map(|(x, y)| x * y).collect();
                filter(&products, a.width, &window)
            }
        };
        let (mx, my) = (mean(&x, None), mean(&y, None));
        let (xx, yy, xy) = (mean(&x, Some(&x)), mean(&y, Some(&y)), mean(&x, Some(&y)));
        for i in 0..mx.len() {
            let (mx, my) = (mx[i], my[i]);
            let (vx, vy, cov) = (xx[i] - mx * mx, yy[i] - my * my, xy[i] - mx * my);
            sum += (2.0 * mx * my + C1) * (2.0 * cov + C2) / ((mx * mx + my * my + C1) * (vx + vy + C2));
        }
        windows += mx.len();
    }
    Ok(sum / windows as f64)
}

/// One dimension of the window for pictures whose shorter side is `side`; its values add up to 1.
fn gaussian(side: usize) -> Vec<f64> {
    let n = if side >= WINDOW { WINDOW } else { side - usize::from(side.is_multiple_of(2)) };
    let at = |i: usize| {
        let d = i as f64 - (n / 2) as f64;
        (-d * d / (2.0 * SIGMA * SIGMA)).exp()
    };
    let sum: f64 = (0..n).map(at).sum();
    (0..n).map(|i| at(i) / sum).collect()
}

/// Weighted means over all windows that lie inside the plane, along rows and then along columns.
fn filter(plane: &[f64], width: usize, window: &[f64]) -> Vec<f64> {
    let n = window.len();
    let weighted =
        |values: &mut dyn Iterator<Item = f64>| values.zip(window).map(|(v, w)| v * w).sum::<f64>();
    let inside = width - n + 1;
    let rows: Vec<f64> = plane
        .chunks_exact(width)
        .flat_map(|row| (0..inside).map(|x| weighted(&mut row[x..x + n].iter().copied())))
        .collect();
    let height = rows.len() / inside;
    (0..=height - n)
        .flat_map(|y| (0..inside).map(move |x| (y, x)))
        .map(|(y, x)| weighted(&mut (0..n).map(|k| rows[(y + k) * inside + x])))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Philox;

    fn random(seed: u64, height: usize, width: usize) -> Image {
        let mut rng = Philox::new(seed, 0);
        let pixels = (0..height * width * 3).map(|_| (2.0 * rng.uniform() - 1.0) as f32).collect();
        Image { height, width, pixels }
    }

    fn noisy(image: &Image, scale: f64) -> Image {
        let mut rng = Philox::new(9, 0);
        let pixels = image.pixels.iter().map(|&v| v + (scale * rng.normal()) as f32).collect();
        Image { pixels, ..image.clone() }
    }

    /// The definition, window by window and pixel by pixel, with variances about the window's mean.
    fn naive(a: &Image, b: &Image) -> f64 {
        let side = a.height.min(a.width).min(11);
        let n = side - (side + 1) % 2;
        let weight = |dy: usize, dx: usize| {
            let d = |i: usize| (i as f64 - (n / 2) as f64).powi(2);
            (-(d(dy) + d(dx)) / 4.5).exp()
        };
        let all = || (0..n).flat_map(|dy| (0..n).map(move |dx| (dy, dx)));
        let total: f64 = all().map(|(dy, dx)| weight(dy, dx)).sum();
        let mut values = Vec::new();
        for c in 0..3 {
            for y in 0..=a.height - n {
                for x in 0..=a.width - n {
                    let at = |i: &Image, dy, dx| f64::from(i.pixels[((y + dy) * i.width + x + dx) * 3 + c]);
                    let mean = |f: &dyn Fn(usize, usize) -> f64| {
                        all().map(|(dy, dx)| weight(dy, dx) * f(dy, dx)).sum::<f64>() / total
                    };
                    let (ma, mb) = (mean(&|dy, dx| at(a, dy, dx)), mean(&|dy, dx| at(b, dy, dx)));
                    let va = mean(&|dy, dx| (at(a, dy, dx) - ma).powi(2));
                    let vb = mean(&|dy, dx| (at(b, dy, dx) - mb).powi(2));
                    let cov = mean(&|dy, dx| (at(a, dy, dx) - ma) * (at(b, dy, dx) - mb));
                    let (c1, c2) = (0.02f64.powi(2), 0.06f64.powi(2));
                    let luminance = (2.0 * ma * mb + c1) / (ma * ma + mb * mb + c1);
                    values.push(luminance * (2.0 * cov + c2) / (va + vb + c2));
                }
            }
        }
        values.iter().sum::<f64>() / values.len() as f64
    }

    #[test]
    fn equal_pictures_have_1_and_noise_lowers_it() {
        let a = random(1, 24, 17);
        assert!((ssim(&a, &a).unwrap() - 1.0).abs() < 1e-12);
        let values: Vec<f64> = [0.01, 0.1, 0.5, 2.0].map(|s| ssim(&a, &noisy(&a, s)).unwrap()).into();
        assert!(values[0] > 0.99 && values[0] < 1.0 && values[3] < 0.5, "{values:?}");
        assert!(values.windows(2).all(|w| w[0] > w[1]), "{values:?}");
    }

    #[test]
    fn the_definition_in_a_loop_gives_the_same() {
        for (height, width) in [(1, 1), (2, 5), (7, 12), (11, 11), (20, 13)] {
            let a = random(2, height, width);
            for b in [random(3, height, width), noisy(&a, 0.2), Image::filled(height, width, 0.3)] {
                let (got, want) = (ssim(&a, &b).unwrap(), naive(&a, &b));
                assert!((got - want).abs() < 1e-9, "{height}x{width}: {got} and {want}");
            }
        }
    }

    #[test]
    fn pictures_of_other_sizes_are_refused() {
        let (a, b) = (Image::filled(4, 6, 0.0), Image::filled(6, 4, 0.0));
        assert!(ssim(&a, &b).unwrap_err().to_string().contains("wanted 4x6 with 72 values like the first"));
        let none = Image::filled(0, 4, 0.0);
        assert!(ssim(&none, &none).unwrap_err().to_string().contains("at least one pixel"));
    }
}
