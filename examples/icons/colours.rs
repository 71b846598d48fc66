//! Named colours.

use ett::data::vector::Paint;
use ett::rng::Philox;

/// A colour with its name.
#[derive(Clone, Copy, PartialEq)]
pub struct Named {
    pub name: &'static str,
    pub rgb: [u8; 3],
}

const fn named(name: &'static str, rgb: [u8; 3]) -> Named {
    Named { name, rgb }
}

const WHITE: Named = named("white", [250, 250, 250]);
const BLACK: Named = named("black", [18, 18, 18]);
const GRAY: Named = named("gray", [128, 128, 128]);
const RED: Named = named("red", [212, 38, 38]);
const ORANGE: Named = named("orange", [242, 132, 28]);
const YELLOW: Named = named("yellow", [246, 208, 40]);
const GREEN: Named = named("green", [40, 150, 60]);
const BLUE: Named = named("blue", [40, 92, 214]);
const PURPLE: Named = named("purple", [122, 48, 170]);
const PINK: Named = named("pink", [240, 105, 170]);
const BROWN: Named = named("brown", [122, 72, 34]);

/// Colours of letters and of icons that have only one.
pub const PAINTS: [Named; 11] = [WHITE, BLACK, GRAY, RED, ORANGE, YELLOW, GREEN, BLUE, PURPLE, PINK, BROWN];

/// Colours of backgrounds; frequent ones stand more than once.
pub const BACKGROUNDS: [Named; 20] = [
    WHITE,
    WHITE,
    WHITE,
    WHITE,
    BLACK,
    GRAY,
    named("light gray", [214, 214, 214]),
    named("light gray", [214, 214, 214]),
    named("light blue", [188, 218, 250]),
    named("light blue", [188, 218, 250]),
    named("light green", [194, 236, 196]),
    named("light yellow", [253, 246, 190]),
    named("light pink", [252, 214, 228]),
    named("dark blue", [22, 32, 88]),
    BLUE,
    GREEN,
    RED,
    YELLOW,
    PURPLE,
    ORANGE,
];

impl Named {
    /// A shade close to it.
    pub fn shade(self, rng: &mut Philox) -> Paint {
        Paint(self.rgb.map(|c| (i32::from(c) + rng.below(11) as i32 - 5).clamp(0, 255) as u8))
    }
}

/// Euclidean distance of two colours, 0 to 441.
pub fn distance(a: [u8; 3], b: [u8; 3]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(b)).powi(2)).sum::<f64>().sqrt()
}

/// Whether text of one colour is easily read on the other.
pub fn legible(a: Named, b: Named) -> bool {
    let light = |[r, g, b]: [u8; 3]| 0.3 * f64::from(r) + 0.59 * f64::from(g) + 0.11 * f64::from(b);
    a.name.split(' ').next_back() != b.name.split(' ').next_back()
        && distance(a.rgb, b.rgb) > 120.0
        && (light(a.rgb) - light(b.rgb)).abs() > 60.0
}

/// The names that [`hue`] gives.
pub const HUES: [&str; 6] = ["red", "orange", "yellow", "green", "blue", "purple"];

/// The name of a saturated colour; `None` for greys and for colours between two names.
pub fn hue(rgb: [u8; 3]) -> Option<&'static str> {
    let [r, g, b] = rgb.map(|c| f64::from(c) / 255.0);
    let (most, least) = (r.max(g).max(b), r.min(g).min(b));
    let range = most - least;
    if most < 0.4 || range / most < 0.5 {
        return None;
    }
    let sixth = match most {
        m if m == r => ((g - b) / range).rem_euclid(6.0),
        m if m == g => (b - r) / range + 2.0,
        _ => (r - g) / range + 4.0,
    };
    match 60.0 * sixth {
        h if !(12.0..348.0).contains(&h) => Some("red"),
        h if (22.0..38.0).contains(&h) && most > 0.75 => Some("orange"),
        h if (44.0..62.0).contains(&h) && most > 0.75 => Some("yellow"),
        h if (85.0..150.0).contains(&h) => Some("green"),
        h if (195.0..240.0).contains(&h) => Some("blue"),
        h if (262.0..292.0).contains(&h) => Some("purple"),
        _ => None,
    }
}
