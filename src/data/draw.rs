//! Generated pictures: what scenes and words share.

use font8x8::{BASIC_FONTS, UnicodeFonts};

use super::image::Image;
use super::sample::Sample;
use crate::rng::{Philox, Purpose};

/// Samples along each side of a pixel, for smooth edges.
const FINE: usize = 4;
/// One in this many is held out.
const HELD_OUT: u32 = 6;
/// Rows and columns of a letter.
pub(super) const LETTER: usize = 8;

/// A part of the built-in data: training or held out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// To train on.
    Train,
    /// Held out: the combinations or words of these pictures occur in no training picture.
    Test,
}

impl Split {
    pub(super) fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Test => "test",
        }
    }

    /// The part that a combination or word belongs to, by a fixed hash of its number.
    pub(super) fn of(number: u64) -> Self {
        match Philox::at(0, (Purpose::Split as u64) << 32, number)[0] % HELD_OUT {
            0 => Split::Test,
            _ => Split::Train,
        }
    }

    /// The random number stream of picture `index`.
    pub(super) fn rng(self, seed: u64, index: usize) -> Philox {
        let purpose = match self {
            Split::Train => Purpose::TrainPicture,
            Split::Test => Purpose::TestPicture,
        };
        Philox::of(seed, purpose, index as u32)
    }
}

/// A built-in picture and its texts.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawing {
    /// The picture.
    pub image: Image,
    /// Caption, drawing prompt and questions; `image` is a name such as `scenes/train/17`.
    pub sample: Sample,
}

/// The shapes of built-in pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it all")]
pub enum Shape {
    Circle,
    Square,
    Triangle,
    Cross,
}

impl Shape {
    pub(super) const ALL: [Shape; 4] = [Shape::Circle, Shape::Square, Shape::Triangle, Shape::Cross];

    /// Lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            Shape::Circle => "circle",
            Shape::Square => "square",
            Shape::Triangle => "triangle",
            Shape::Cross => "cross",
        }
    }

    /// Half of the width and of the height of the shape of radius 1.
    pub(super) fn reach(self) -> (f64, f64) {
        match self {
            Shape::Circle | Shape::Cross => (1.0, 1.0),
            Shape::Square => (0.88, 0.88),
            Shape::Triangle => (1.0, 0.866),
        }
    }

    /// Whether a point lies inside the shape of radius 1 around 0; y points down.
    pub(super) fn holds(self, x: f64, y: f64) -> bool {
        match self {
            Shape::Circle => x * x + y * y <= 1.0,
            Shape::Square => x.abs().max(y.abs()) <= 0.88,
            Shape::Triangle => {
                let below_tip = y + 0.866;
                (0.0..=1.732).contains(&below_tip) && x.abs() <= below_tip / 1.732
            }
            Shape::Cross => x.abs().max(y.abs()) <= 1.0 && x.abs().min(y.abs()) <= 0.34,
        }
    }
}

/// Red, green and blue in [0, 1].
pub(super) type Rgb = [f64; 3];

/// The colours of built-in pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it all")]
pub enum Colour {
    Red,
    Green,
    Blue,
    Yellow,
    Purple,
    Cyan,
}

impl Colour {
    pub(super) const ALL: [Colour; 6] =
        [Colour::Red, Colour::Green, Colour::Blue, Colour::Yellow, Colour::Purple, Colour::Cyan];

    /// Lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            Colour::Red => "red",
            Colour::Green => "green",
            Colour::Blue => "blue",
            Colour::Yellow => "yellow",
            Colour::Purple => "purple",
            Colour::Cyan => "cyan",
        }
    }

    pub(super) fn rgb(self) -> Rgb {
        match self {
            Colour::Red => [0.86, 0.16, 0.16],
            Colour::Green => [0.18, 0.66, 0.22],
            Colour::Blue => [0.18, 0.34, 0.88],
            Colour::Yellow => [0.94, 0.80, 0.12],
            Colour::Purple => [0.58, 0.22, 0.74],
            Colour::Cyan => [0.12, 0.78, 0.84],
        }
    }

    /// Whether thin strokes are legible on a dark background; strokes of the other colours are legible on a light
    /// one.
    pub(super) fn light(self) -> bool {
        matches!(self, Colour::Green | Colour::Yellow | Colour::Cyan)
    }

    /// A random shade of the colour.
    pub(super) fn shade(self, rng: &mut Philox) -> Rgb {
        let brightness = around(rng, 0.1);
        self.rgb().map(|c| ((1.0 + brightness) * c + around(rng, 0.03)).clamp(0.0, 1.0))
    }
}

/// A dark or light grey, far from every colour.
pub(super) fn background(rng: &mut Philox, dark: bool) -> Rgb {
    let grey = if dark { 0.1 } else { 0.9 } + around(rng, 0.05);
    [grey; 3].map(|c| c + around(rng, 0.015))
}

/// Middle grey: the colours differ from it mainly in hue. On black, all of them would differ mainly in brightness,
/// and a tokenizer would long be satisfied with reproducing that. The grey is uniform so that no codes are spent on
/// shades of the background.
pub(super) const MIDDLE_GREY: Rgb = [0.5; 3];

/// Uniform in `[-range, range)`.
pub(super) fn around(rng: &mut Philox, range: f64) -> f64 {
    (2.0 * rng.uniform() - 1.0) * range
}

/// One of `items`.
pub(super) fn pick<T: Copy>(rng: &mut Philox, items: &[T]) -> T {
    items[rng.below(items.len())]
}

/// One of `items` other than `not`.
pub(super) fn pick_other<T: Copy + PartialEq>(rng: &mut Philox, items: &[T], not: T) -> T {
    let others: Vec<T> = items.iter().copied().filter(|&i| i != not).collect();
    pick(rng, &others)
}

/// A question whose answer is yes or no with equal probability: `ask(item)`, about `truth` or about one of the other
/// items.
pub(super) fn yes_or_no<T: Copy + PartialEq>(
    rng: &mut Philox,
    items: &[T],
    truth: T,
    ask: impl Fn(T) -> String,
) -> (String, String) {
    match rng.below(2) {
        0 => (ask(truth), "yes".into()),
        _ => (ask(pick_other(rng, items, truth)), "no".into()),
    }
}

/// A square picture being drawn; lengths are in pixels.
pub(super) struct Canvas {
    size: usize,
    rgb: Vec<Rgb>,
}

impl Canvas {
    pub fn new(size: usize, background: Rgb) -> Self {
        Canvas { size, rgb: vec![background; size * size] }
    }

    /// Draws a shape around (x, y), clipped to the picture.
    pub fn shape(&mut self, shape: Shape, (x, y): (f64, f64), radius: f64, colour: Rgb) {
        let range = |c: f64| {
            let clamped = |v: f64| v.clamp(0.0, self.size as f64) as usize;
            clamped((c - radius).floor())..clamped((c + radius).ceil())
        };
        for row in range(y) {
            for column in range(x) {
                let fine = |pixel: usize, k: usize| pixel as f64 + (k as f64 + 0.5) / FINE as f64;
                let inside = (0..FINE * FINE)
                    .filter(|k| {
                        let (px, py) = (fine(column, k % FINE), fine(row, k / FINE));
                        shape.holds((px - x) / radius, (py - y) / radius)
                    })
                    .count();
                let share = inside as f64 / (FINE * FINE) as f64;
                let pixel = &mut self.rgb[row * self.size + column];
                *pixel = [0, 1, 2].map(|c| pixel[c] + share * (colour[c] - pixel[c]));
            }
        }
    }

    /// Writes `word` with its top left corner at (left, top); each dot of a letter is `scale` pixels a side.
    pub fn word(&mut self, word: &str, (left, top): (usize, usize), scale: usize, colour: Rgb) {
        for (i, letter) in word.chars().enumerate() {
            let rows = BASIC_FONTS.get(letter).unwrap_or_default();
            for y in 0..LETTER * scale {
                for x in 0..LETTER * scale {
                    let at = (top + y, left + i * LETTER * scale + x);
                    if rows[y / scale] >> (x / scale) & 1 == 1 && at.0.max(at.1) < self.size {
                        self.rgb[at.0 * self.size + at.1] = colour;
                    }
                }
            }
        }
    }

    pub fn image(self) -> Image {
        let pixels = self.rgb.iter().flatten().map(|&c| (2.0 * c - 1.0) as f32).collect();
        Image { height: self.size, width: self.size, pixels }
    }
}
