//! What a picture shows, decided from its pixels alone: whether a drawing follows its prompt.

use std::collections::BTreeMap;
use std::ops::Range;

use font8x8::{BASIC_FONTS, UnicodeFonts};

use super::draw::{Colour, LETTER, Rgb, Shape};
use super::image::Image;
use super::scenes::{Place, Shapes, Size};
use super::words::Written;

/// A pixel has a colour from this share of the colour's own saturation on.
const COLOURED: f64 = 0.35;
/// Of the pixels of a colour, those belong to a figure that have at least this share of their upper quartile's
/// saturation. Shapes of a row are only a pixel apart in small pictures: with a lower share they would touch.
const INSIDE: f64 = 0.6;
/// Smaller spots of one colour are overlooked, as a share of the picture: about a quarter of the smallest shape.
const SPOT: f64 = 0.004;
/// Maximum share of a letter's dots that may differ from the font.
const SMUDGED: f64 = 0.2;

/// What a built-in picture shows, as its prompt asks for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scene {
    /// Equal shapes.
    Shapes(Shapes),
    /// A word.
    Word(Written),
}

/// What a prompt determines of a picture, in the order of reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Aspect {
    /// All shapes have the colour.
    Colour,
    /// There are as many shapes.
    Count,
    /// Together they are in the place.
    Place,
    /// These three together.
    ColourCountPlace,
    /// All of them are such shapes.
    Shape,
    /// Their mean size.
    Size,
    /// The word can be read, letter by letter.
    Word,
    /// The colours are those of the word and the shape beside it.
    WordColours,
    /// The shape beside the word.
    WordShape,
}

impl Aspect {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Aspect::Colour => "colour",
            Aspect::Count => "count",
            Aspect::Place => "place",
            Aspect::ColourCountPlace => "colour, count and place",
            Aspect::Shape => "shape",
            Aspect::Size => "size",
            Aspect::Word => "word",
            Aspect::WordColours => "colours of word and shape",
            Aspect::WordShape => "shape beside the word",
        }
    }
}

impl Scene {
    /// Whether a picture, a square, shows each of the aspects that this scene has.
    pub fn look(&self, image: &Image) -> Vec<(Aspect, bool)> {
        let seen = Figures::find(image);
        match self {
            Scene::Shapes(s) => s.look(&seen),
            Scene::Word(w) => w.look(&seen),
        }
    }
}

/// How often an aspect was looked for in pictures, and how often it was right.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Looked {
    /// Pictures whose scene has the aspect.
    pub pictures: usize,
    /// Of these, those that show it.
    pub own: usize,
    /// Those that show it as the scene of another picture has it.
    pub other: usize,
}

/// Looks for each picture's scene in it, and for the scene of the picture half of the list further on.
pub fn look(pictures: &[(&Scene, &Image)]) -> BTreeMap<Aspect, Looked> {
    let mut all = BTreeMap::<Aspect, Looked>::new();
    let others = pictures.iter().cycle().skip(pictures.len() / 2);
    for ((scene, image), (another, _)) in pictures.iter().zip(others) {
        let shown = another.look(image);
        for (aspect, right) in scene.look(image) {
            let all = all.entry(aspect).or_default();
            all.pictures += 1;
            all.own += usize::from(right);
            all.other += usize::from(shown.contains(&(aspect, true)));
        }
    }
    all
}

impl Shapes {
    fn look(&self, seen: &Figures) -> Vec<(Aspect, bool)> {
        let every = |has: &dyn Fn(&Figure) -> bool| !seen.all.is_empty() && seen.all.iter().all(has);
        let colour = every(&|f| f.colour == self.colour);
        let count = seen.all.len() == self.count;
        let place = seen.place() == Some(self.place);
        vec![
            (Aspect::Colour, colour),
            (Aspect::Count, count),
            (Aspect::Place, place),
            (Aspect::ColourCountPlace, colour && count && place),
            (Aspect::Shape, every(&|f| f.shape() == self.shape)),
            (Aspect::Size, seen.size() == Some(self.size)),
        ]
    }
}

impl Written {
    fn look(&self, seen: &Figures) -> Vec<(Aspect, bool)> {
        let beside = self.beside.map(|(_, colour)| colour);
        let wanted = |colour| colour == self.colour || Some(colour) == beside;
        let colours = Colour::ALL.iter().all(|&c| seen.has(c) == wanted(c));
        let mut all = vec![
            (Aspect::Word, Colour::ALL.iter().any(|&c| seen.says(&self.word, c))),
            (Aspect::WordColours, colours),
        ];
        if let Some((shape, colour)) = self.beside {
            let largest = seen.all.iter().filter(|f| f.colour == colour).max_by_key(|f| f.dots.len());
            // Letters are smaller.
            let is = |f: &Figure| f.shape() == shape && f.radius() > 0.1 * seen.side as f64;
            all.push((Aspect::WordShape, largest.is_some_and(is)));
        }
        all
    }
}

/// Connected pixels of one colour.
struct Figure {
    colour: Colour,
    /// (row, column) of each pixel.
    dots: Vec<(usize, usize)>,
}

impl Figure {
    fn rows(&self) -> Range<usize> {
        extent(self.dots.iter().map(|d| d.0))
    }

    fn columns(&self) -> Range<usize> {
        extent(self.dots.iter().map(|d| d.1))
    }

    /// The shape that, stretched to the same extent, differs in the fewest pixels.
    fn shape(&self) -> Shape {
        let (rows, columns) = (self.rows(), self.columns());
        let mut mask = vec![false; rows.len() * columns.len()];
        self.dots.iter().for_each(|(y, x)| mask[(y - rows.start) * columns.len() + x - columns.start] = true);
        let differ = |shape: &Shape| {
            let (right, below) = shape.reach();
            let at = |i: usize, n: usize, reach: f64| ((i as f64 + 0.5) / n as f64 * 2.0 - 1.0) * reach;
            let inside = |i: usize| {
                let (y, x) = (i / columns.len(), i % columns.len());
                shape.holds(at(x, columns.len(), right), at(y, rows.len(), below))
            };
            mask.iter().enumerate().filter(|(i, is)| inside(*i) != **is).count()
        };
        // There is at least one shape.
        Shape::ALL.into_iter().min_by_key(differ).unwrap_or(Shape::Circle)
    }

    /// Half of the width, in units of the shape's own reach.
    fn radius(&self) -> f64 {
        self.columns().len() as f64 / 2.0 / self.shape().reach().0
    }
}

/// The smallest range that holds all of these.
fn extent(all: impl Iterator<Item = usize> + Clone) -> Range<usize> {
    all.clone().min().unwrap_or(0)..all.max().map_or(0, |most| most + 1)
}

/// What stands out from the grey of a picture.
struct Figures {
    side: usize,
    /// The colour of every pixel that belongs to a figure, row by row.
    ink: Vec<Option<Colour>>,
    /// The figures, without spots.
    all: Vec<Figure>,
}

impl Figures {
    fn find(image: &Image) -> Self {
        let side = image.width.min(image.height);
        let pixels: Vec<(Colour, f64)> =
            image.pixels.chunks_exact(3).map(|p| nearest([0, 1, 2].map(|c| f64::from(p[c])))).collect();
        let mut ink = vec![None; pixels.len()];
        for colour in Colour::ALL {
            let mut shares: Vec<f64> =
                pixels.iter().filter(|p| p.0 == colour && p.1 > COLOURED).map(|p| p.1).collect();
            shares.sort_by(f64::total_cmp);
            let Some(quartile) = shares.get(shares.len() * 3 / 4) else { continue };
            for (ink, pixel) in ink.iter_mut().zip(&pixels) {
                if pixel.0 == colour && pixel.1 > COLOURED && pixel.1 >= INSIDE * quartile {
                    *ink = Some(colour);
                }
            }
        }
        let all = connected(&ink, image.width, (SPOT * (side * side) as f64).ceil() as usize);
        Figures { side, ink, all }
    }

    /// The place nearest to the centre of gravity.
    fn place(&self) -> Option<Place> {
        let dots = || self.all.iter().flat_map(|f| &f.dots);
        let n = dots().count() as f64;
        let mean = |sum: f64| (sum / n + 0.5) / self.side as f64;
        let x = mean(dots().map(|d| d.1 as f64).sum());
        let y = mean(dots().map(|d| d.0 as f64).sum());
        let far = |place: &Place| (x - place.middle().0).hypot(y - place.middle().1);
        let nearest = Place::ALL.into_iter().min_by(|a, b| far(a).total_cmp(&far(b)));
        nearest.filter(|_| n > 0.0)
    }

    /// The size nearest to the mean radius.
    fn size(&self) -> Option<Size> {
        let radius = self.all.iter().map(Figure::radius).sum::<f64>() / (self.all.len() * self.side) as f64;
        let far = |size: &Size| (radius - size.radius()).abs();
        let nearest = Size::ALL.into_iter().min_by(|a, b| far(a).total_cmp(&far(b)));
        nearest.filter(|_| !self.all.is_empty())
    }

    /// Whether there is more than a spot of a colour. Dots of letters need not be connected.
    fn has(&self, colour: Colour) -> bool {
        let dots = self.ink.iter().filter(|ink| **ink == Some(colour)).count();
        dots as f64 >= SPOT * (self.side * self.side) as f64
    }

    /// Whether a word of a colour can be read somewhere: each of its letters is the one of the alphabet that resembles
    /// the pixels most, and no letter precedes or follows.
    fn says(&self, word: &str, colour: Colour) -> bool {
        if !self.has(colour) {
            return false;
        }
        (1..=self.side / (LETTER * word.len().max(1))).any(|scale| {
            let (high, wide) = (LETTER * scale, LETTER * scale * word.len());
            (0..=self.side - high)
                .any(|top| (0..=self.side - wide).any(|left| self.says_at(word, colour, (top, left), scale)))
        })
    }

    fn says_at(&self, word: &str, colour: Colour, (top, left): (usize, usize), scale: usize) -> bool {
        let letter = LETTER * scale;
        let at = |i: usize| self.cell(colour, (top as isize, (left + i * letter) as isize), scale);
        // The first letter excludes most places.
        word.chars().enumerate().all(|(i, wanted)| reads(&at(i), wanted))
            && [left as isize - letter as isize, (left + word.len() * letter) as isize]
                .iter()
                .all(|&beside| is_blank(&self.cell(colour, (top as isize, beside), scale)))
    }

    /// The dots of a letter with this top left corner; those outside of the picture are blank.
    fn cell(&self, colour: Colour, (top, left): (isize, isize), scale: usize) -> [u8; LETTER] {
        let dot = |row: usize, column: usize| {
            let inked = (0..scale * scale).filter(|i| {
                let y = top + (row * scale + i / scale) as isize;
                let x = left + (column * scale + i % scale) as isize;
                let inside = |v: isize| (0..self.side as isize).contains(&v);
                inside(y) && inside(x) && self.ink[y as usize * self.side + x as usize] == Some(colour)
            });
            2 * inked.count() > scale * scale
        };
        std::array::from_fn(|row| {
            (0..LETTER).fold(0, |bits, column| bits | u8::from(dot(row, column)) << column)
        })
    }
}

/// Dots in which two letters differ.
fn differ(a: &[u8; LETTER], b: &[u8; LETTER]) -> u32 {
    a.iter().zip(b).map(|(a, b)| (a ^ b).count_ones()).sum()
}

fn is_blank(cell: &[u8; LETTER]) -> bool {
    f64::from(differ(cell, &[0; LETTER])) <= SMUDGED / 2.0 * (LETTER * LETTER) as f64 / 2.0
}

/// Whether these dots are this letter rather than another one.
fn reads(cell: &[u8; LETTER], letter: char) -> bool {
    let from = |letter: char| BASIC_FONTS.get(letter).map_or(u32::MAX, |font| differ(cell, &font));
    let dots = BASIC_FONTS.get(letter).map_or(0, |font| differ(&font, &[0; LETTER]));
    let distance = from(letter);
    f64::from(distance) <= SMUDGED * f64::from(dots) && ('a'..='z').all(|l| l == letter || from(l) > distance)
}

/// The colour whose hue is nearest, and the saturation as a share of this colour's own.
fn nearest(pixel: Rgb) -> (Colour, f64) {
    let grey_free = |c: Rgb| {
        let mean = c.iter().sum::<f64>() / 3.0;
        c.map(|v| v - mean)
    };
    let length = |c: &Rgb| c.iter().map(|v| v * v).sum::<f64>().sqrt();
    // Pixels are in [-1, 1], colours in [0, 1].
    let hue = grey_free(pixel.map(|v| v / 2.0));
    let along = |colour: Colour| {
        let own = grey_free(colour.rgb());
        hue.iter().zip(&own).map(|(a, b)| a * b).sum::<f64>() / length(&own)
    };
    let best = Colour::ALL.into_iter().max_by(|&a, &b| along(a).total_cmp(&along(b)));
    // There is at least one colour.
    let best = best.unwrap_or(Colour::Red);
    (best, length(&hue) / length(&grey_free(best.rgb())))
}

/// Pixels of equal colour that are connected by their sides, `least` or more.
fn connected(ink: &[Option<Colour>], width: usize, least: usize) -> Vec<Figure> {
    let mut left = ink.to_vec();
    let mut all = Vec::new();
    for start in 0..ink.len() {
        let Some(colour) = left[start].take() else { continue };
        let (mut dots, mut open) = (Vec::new(), vec![start]);
        while let Some(at) = open.pop() {
            let (y, x) = (at / width, at % width);
            dots.push((y, x));
            let beside =
                [(x > 0, -1), (x + 1 < width, 1), (y > 0, -(width as isize)), (true, width as isize)];
            for next in beside.iter().filter(|b| b.0).map(|b| at.wrapping_add_signed(b.1)) {
                if left.get(next) == Some(&Some(colour)) {
                    left[next] = None;
                    open.push(next);
                }
            }
        }
        if dots.len() >= least {
            all.push(Figure { colour, dots });
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Drawing, Mixed, Scenes, Split, Words};
    use crate::rng::Philox;

    fn scene(drawing: &Drawing) -> &Scene {
        drawing.sample.scene.as_ref().unwrap()
    }

    fn looked(drawings: &[Drawing]) -> BTreeMap<Aspect, Looked> {
        look(&drawings.iter().map(|d| (scene(d), &d.image)).collect::<Vec<_>>())
    }

    /// An aspect, the share in which it has to be right, and whether two scenes have it in common.
    type Bound = (Aspect, f64, fn(&Scene, &Scene) -> bool);

    /// Fails unless each aspect is right in at least this share, and for another picture's scene as often as the two
    /// scenes have it in common, which is rare.
    fn check(what: &str, drawings: &[Drawing], bounds: &[Bound]) {
        let all = looked(drawings);
        let half = drawings.len() / 2;
        for (aspect, least, same) in bounds {
            let l = all[aspect];
            let pairs = drawings.iter().zip(drawings.iter().cycle().skip(half));
            let common = pairs.filter(|(a, b)| same(scene(a), scene(b))).count();
            let n = l.pictures as f64;
            let what = format!("{what}, {}: {l:?}, in common {common}", aspect.name());
            assert!(l.own as f64 >= least * n && common as f64 <= 0.6 * n, "{what}");
            assert!((l.other as f64 - common as f64).abs() <= (1.0 - least) * n, "{what}");
        }
        assert_eq!(all.len(), bounds.len(), "{what}");
    }

    /// Whether two scenes of shapes, or two words, have something in common.
    macro_rules! same {
        ($kind:ident, $a:ident, $b:ident, $same:expr) => {
            |a, b| match (a, b) {
                (Scene::$kind($a), Scene::$kind($b)) => $same,
                _ => false,
            }
        };
    }

    #[test]
    fn scenes_show_what_they_were_drawn_from_and_not_another_scene() {
        for (size, shape) in [(32, 0.9), (48, 0.99), (64, 0.99)] {
            let scenes = Scenes::new(size, 1).unwrap();
            let drawings: Vec<_> = (0..600).map(|i| scenes.get(Split::Test, i)).collect();
            check(
                &format!("{size} pixels"),
                &drawings,
                &[
                    (Aspect::Colour, 0.99, same!(Shapes, a, b, a.colour == b.colour)),
                    (Aspect::Count, 0.99, same!(Shapes, a, b, a.count == b.count)),
                    (Aspect::Place, 0.99, same!(Shapes, a, b, a.place == b.place)),
                    (
                        Aspect::ColourCountPlace,
                        0.99,
                        same!(Shapes, a, b, (a.colour, a.count, a.place) == (b.colour, b.count, b.place)),
                    ),
                    (Aspect::Shape, shape, same!(Shapes, a, b, a.shape == b.shape)),
                    (Aspect::Size, 0.99, same!(Shapes, a, b, a.size == b.size)),
                ],
            );
        }
    }

    #[test]
    fn words_are_read_and_no_other_word_is() {
        fn colours(w: &Written) -> Vec<Colour> {
            let has = |c: &Colour| w.colour == *c || w.beside.is_some_and(|b| b.1 == *c);
            Colour::ALL.into_iter().filter(has).collect()
        }
        for size in [48, 64] {
            let words = Words::new(size, 1).unwrap();
            let drawings: Vec<_> = (0..150).map(|i| words.get(Split::Test, i)).collect();
            check(
                &format!("{size} pixels"),
                &drawings,
                &[
                    (Aspect::Word, 0.99, same!(Word, a, b, a.word == b.word)),
                    (Aspect::WordColours, 0.99, same!(Word, a, b, colours(a) == colours(b))),
                    (Aspect::WordShape, 0.95, same!(Word, a, b, a.beside.is_some() && a.beside == b.beside)),
                ],
            );
        }
    }

    #[test]
    fn nothing_and_noise_show_nothing_and_letters_must_be_whole() {
        let mixed = Mixed::new(48, 1).unwrap();
        let grey = Image::filled(48, 48, 0.0);
        for i in 0..20 {
            let drawing = mixed.get(Split::Test, i);
            let scene = drawing.sample.scene.unwrap();
            assert!(scene.look(&grey).iter().all(|(_, right)| !right), "{scene:?}");
            let Scene::Word(w) = &scene else { continue };
            let longer = Scene::Word(Written { word: format!("{}s", w.word), ..w.clone() });
            let shorter = Scene::Word(Written { word: w.word[1..].into(), ..w.clone() });
            for (other, right) in [(&scene, true), (&longer, false), (&shorter, false)] {
                assert_eq!(other.look(&drawing.image)[0], (Aspect::Word, right), "{w:?} {other:?}");
            }
        }
    }

    /// A reconstruction is blurred and has stray spots.
    #[test]
    fn blurred_pictures_with_spots_show_the_same() {
        let scenes = Scenes::new(48, 1).unwrap();
        let mut rng = Philox::new(1, 1);
        let blurred = |i| {
            let mut d = scenes.get(Split::Test, i);
            let at = |p: &[f32], y: usize, x: usize, c: usize| p[(y.min(47) * 48 + x.min(47)) * 3 + c];
            let p = d.image.pixels.clone();
            for (k, v) in d.image.pixels.iter_mut().enumerate() {
                let (y, x, c) = (k / 144, k / 3 % 48, k % 3);
                let sum = [(0, 0), (0, 1), (1, 0), (0, 0)].map(|(dy, dx)| at(&p, y + dy, x + dx, c));
                *v = (sum.iter().sum::<f32>() / 4.0 + 0.1 * rng.normal() as f32).clamp(-1.0, 1.0);
            }
            d
        };
        let all = looked(&(0..300).map(blurred).collect::<Vec<_>>());
        for aspect in [Aspect::Colour, Aspect::Count, Aspect::Place] {
            assert!(all[&aspect].own >= 270, "{}: {:?}", aspect.name(), all[&aspect]);
        }
    }
}
