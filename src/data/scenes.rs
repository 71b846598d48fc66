//! Built-in pictures of coloured shapes.

use std::path::PathBuf;

use super::draw::{Canvas, Colour, Drawing, MIDDLE_GREY, Shape, Split, around, pick, yes_or_no};
use super::look::Scene;
use super::sample::{Chat, Sample};
use super::source::{DRAWN, DataSource, Listed, Wanted};
use crate::error::{Error, Result};
use crate::rng::Philox;

/// Smallest side at which the shapes can be told apart, in pixels.
const MIN_SIZE: usize = 16;
const COUNTS: [&str; 3] = ["one", "two", "three"];
/// Maximum displacement of shapes from their place, as a share of the side.
const STRAY: f64 = 0.03;

/// How large a shape is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it all")]
pub enum Size {
    Small,
    Large,
}

impl Size {
    pub(super) const ALL: [Size; 2] = [Size::Small, Size::Large];

    /// Lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            Size::Small => "small",
            Size::Large => "large",
        }
    }

    /// As a share of the side: three large shapes in a row just fit.
    pub(super) fn radius(self) -> f64 {
        match self {
            Size::Small => 0.095,
            Size::Large => 0.145,
        }
    }
}

/// Where the shapes of a scene are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it all")]
pub enum Place {
    Left,
    Right,
    Top,
    Bottom,
    Centre,
}

impl Place {
    pub(super) const ALL: [Place; 5] = [Place::Left, Place::Right, Place::Top, Place::Bottom, Place::Centre];

    /// Lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            Place::Left => "left",
            Place::Right => "right",
            Place::Top => "top",
            Place::Bottom => "bottom",
            Place::Centre => "centre",
        }
    }

    fn phrase(self) -> &'static str {
        match self {
            Place::Left => "on the left",
            Place::Right => "on the right",
            Place::Top => "at the top",
            Place::Bottom => "at the bottom",
            Place::Centre => "in the centre",
        }
    }

    /// Its centre, as shares of the side from the left and from the top.
    pub(super) fn middle(self) -> (f64, f64) {
        match self {
            Place::Left => (0.2, 0.5),
            Place::Right => (0.8, 0.5),
            Place::Top => (0.5, 0.2),
            Place::Bottom => (0.5, 0.8),
            Place::Centre => (0.5, 0.5),
        }
    }

    /// Whether several shapes are stacked vertically.
    fn upright(self) -> bool {
        matches!(self, Place::Left | Place::Right)
    }
}

/// What a picture of [`Scenes`] shows: one to three equal shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shapes {
    /// Of all of them.
    pub shape: Shape,
    /// Of all of them.
    pub colour: Colour,
    /// Of all of them.
    pub size: Size,
    /// 1 to 3.
    pub count: usize,
    /// The centre of all of them together.
    pub place: Place,
}

impl Shapes {
    /// All 720 combinations, each with its part of the data.
    fn all() -> impl Iterator<Item = (Self, Split)> {
        let (shapes, colours, sizes) = (Shape::ALL.len(), Colour::ALL.len(), Size::ALL.len());
        (0..shapes * colours * sizes * COUNTS.len() * Place::ALL.len()).map(move |number| {
            let mut rest = number;
            let mut digit = |base: usize| {
                let digit = rest % base;
                rest /= base;
                digit
            };
            let shown = Shapes {
                shape: Shape::ALL[digit(shapes)],
                colour: Colour::ALL[digit(colours)],
                size: Size::ALL[digit(sizes)],
                count: 1 + digit(COUNTS.len()),
                place: Place::ALL[digit(Place::ALL.len())],
            };
            (shown, Split::of(number as u64))
        })
    }

    fn caption(&self) -> String {
        let Shapes { shape, colour, size, count, place } = self;
        let number = if *count == 1 { "a" } else { COUNTS[count - 1] };
        let plural = match (count, shape) {
            (1, _) => "",
            (_, Shape::Cross) => "es",
            _ => "s",
        };
        let (size, colour, shape) = (size.name(), colour.name(), shape.name());
        format!("{number} {size} {colour} {shape}{plural} {}", place.phrase())
    }

    /// One question of every kind, in random order.
    fn questions(&self, rng: &mut Philox) -> Vec<Chat> {
        let open = [
            ("what color?", self.colour.name()),
            ("what shape?", self.shape.name()),
            ("how many?", COUNTS[self.count - 1]),
            ("where?", self.place.name()),
            ("what size?", self.size.name()),
        ];
        let mut all = open.map(|(q, a)| (q.to_string(), a.to_string())).to_vec();
        all.push(yes_or_no(rng, &Colour::ALL, self.colour, |c| format!("is it {}?", c.name())));
        all.push(yes_or_no(rng, &Shape::ALL, self.shape, |s| format!("is it a {}?", s.name())));
        rng.shuffle(&mut all);
        all.into_iter().map(|(q, a)| Chat::of(q, a)).collect()
    }

    /// The centres of the shapes and their radius, as shares of the side.
    fn layout(&self, rng: &mut Philox) -> (Vec<(f64, f64)>, f64) {
        let radius = self.size.radius();
        let pitch = 2.05 * radius + 0.025;
        let half = radius + (self.count - 1) as f64 * pitch / 2.0;
        // Fewer shapes leave more room along the row.
        let along = around(rng, (2.0 * STRAY).min(0.5 - half));
        let across = around(rng, STRAY);
        let (x, y) = self.place.middle();
        let middles = (0..self.count).map(|i| {
            let along = along + (i as f64 - (self.count - 1) as f64 / 2.0) * pitch;
            match self.place.upright() {
                true => (x + across, y + along),
                false => (x + along, y + across),
            }
        });
        (middles.collect(), radius)
    }
}

/// Pictures of one to three equal shapes: circles, squares, triangles or crosses in six colours, two sizes and five
/// places, on grey.
///
/// About one in six of the 720 combinations is held out, by a fixed hash: it occurs in test pictures only, though
/// each of its attributes occurs in training. Place and shade vary a little from picture to picture.
#[derive(Debug, Clone)]
pub struct Scenes {
    size: usize,
    seed: u64,
    train: Vec<Shapes>,
    test: Vec<Shapes>,
}

/// [`Scenes`] as a source of data.
pub(super) struct FromScenes;

impl DataSource for FromScenes {
    fn name(&self) -> &'static str {
        "scenes"
    }

    fn smallest_drawn(&self) -> Option<usize> {
        Some(MIN_SIZE)
    }

    fn open(&self, part: &Wanted) -> Result<Listed> {
        let all = Scenes::new(part.size, DRAWN)?;
        Ok(Listed::drawn(self.name(), part, |i| all.get(part.split, i)))
    }
}

impl Scenes {
    /// Scenes of `size` pixels per side, at least 16; 32 is plenty.
    pub fn new(size: usize, seed: u64) -> Result<Self> {
        if size < MIN_SIZE {
            return Err(Error::arg("Scenes::new", "size", size, format!("{MIN_SIZE} or more pixels")));
        }
        let part = |split| Shapes::all().filter(|(_, s)| *s == split).map(|(c, _)| c).collect();
        Ok(Scenes { size, seed, train: part(Split::Train), test: part(Split::Test) })
    }

    /// Picture `index` of a part of the data, the same at every call; pictures repeat after 2^32.
    pub fn get(&self, split: Split, index: usize) -> Drawing {
        let (shown, canvas, rng) = self.draw(split, index);
        let caption = shown.caption();
        let sample = Sample {
            image: PathBuf::from(format!("scenes/{}/{index}", split.name())),
            prompt: Some(format!("draw {caption}")),
            captions: vec![caption],
            chats: shown.questions(&mut { rng }),
            scene: Some(Scene::Shapes(shown)),
        };
        Drawing { image: canvas.image(), sample }
    }

    fn draw(&self, split: Split, index: usize) -> (Shapes, Canvas, Philox) {
        let mut rng = split.rng(self.seed, index);
        let combinations = match split {
            Split::Train => &self.train,
            Split::Test => &self.test,
        };
        let shown = pick(&mut rng, combinations);
        let mut canvas = Canvas::new(self.size, MIDDLE_GREY);
        let colour = shown.colour.shade(&mut rng);
        let (middles, radius) = shown.layout(&mut rng);
        let side = self.size as f64;
        for (x, y) in middles {
            canvas.shape(shown.shape, (side * x, side * y), side * radius, colour);
        }
        (shown, canvas, rng)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_value_occurs_in_both_parts_and_no_combination_does() {
        let scenes = Scenes::new(16, 1).unwrap();
        assert_eq!(scenes.train.len() + scenes.test.len(), 720);
        assert!((100..=140).contains(&scenes.test.len()), "{} are held out", scenes.test.len());
        assert!(scenes.test.iter().all(|c| !scenes.train.contains(c)));
        for part in [&scenes.train, &scenes.test] {
            let all = |has: &dyn Fn(&Shapes) -> bool| part.iter().any(has);
            assert!(Shape::ALL.iter().all(|&s| all(&|c| c.shape == s)));
            assert!(Colour::ALL.iter().all(|&v| all(&|c| c.colour == v)));
            assert!(Size::ALL.iter().all(|&s| all(&|c| c.size == s)));
            assert!((1..=3).all(|n| all(&|c| c.count == n)));
            assert!(Place::ALL.iter().all(|&p| all(&|c| c.place == p)));
        }
    }

    #[test]
    fn captions_of_test_pictures_never_occur_in_training() {
        let scenes = Scenes::new(16, 3).unwrap();
        let captions = |split| -> HashSet<String> {
            (0..3000).map(|i| scenes.get(split, i).sample.captions.remove(0)).collect()
        };
        let (train, test) = (captions(Split::Train), captions(Split::Test));
        assert!(train.len() > 550 && test.len() > 95, "{} and {}", train.len(), test.len());
        assert!(train.is_disjoint(&test));
    }

    #[test]
    fn captions_prompts_and_answers_fit() {
        let c = Shapes {
            shape: Shape::Circle,
            colour: Colour::Red,
            size: Size::Small,
            count: 2,
            place: Place::Top,
        };
        assert_eq!(c.caption(), "two small red circles at the top");
        let other = Shapes { count: 1, colour: Colour::Blue, shape: Shape::Square, ..c };
        assert_eq!(other.caption(), "a small blue square at the top");
        let other = Shapes { count: 3, shape: Shape::Cross, place: Place::Centre, ..c };
        assert_eq!(other.caption(), "three small red crosses in the centre");
        let scenes = Scenes::new(32, 5).unwrap();
        let mut yes = 0;
        for i in 0..1000 {
            let sample = scenes.get(Split::Train, i).sample;
            let caption = sample.captions[0].clone();
            assert_eq!(sample.drawing_prompt(), Some(format!("draw {caption}").as_str()));
            assert_eq!(sample.chats.len(), 7);
            for (q, a) in sample.questions() {
                match q {
                    "what color?" | "what shape?" | "what size?" | "where?" => {
                        assert!(caption.contains(a), "{caption}: {q} {a}")
                    }
                    "how many?" => {
                        assert!(caption.starts_with(a) || a == "one" && caption.starts_with("a "))
                    }
                    asked => {
                        let last = asked.trim_end_matches('?').rsplit(' ').next().unwrap();
                        assert_eq!(a == "yes", caption.contains(last), "{caption}: {q} {a}");
                        yes += usize::from(a == "yes");
                    }
                }
            }
        }
        assert!((900..1100).contains(&yes), "{yes} of 2000 are answered yes");
    }

    #[test]
    fn shapes_stay_apart_and_inside() {
        let mut rng = Philox::new(1, 0);
        for (c, _) in Shapes::all() {
            for _ in 0..20 {
                let (middles, r) = c.layout(&mut rng);
                assert!(middles.iter().all(|&(x, y)| x.min(y) >= r && x.max(y) <= 1.0 - r), "{c:?}");
                for pair in middles.windows(2) {
                    let distance = (pair[0].0 - pair[1].0).hypot(pair[0].1 - pair[1].1);
                    assert!(distance > 2.0 * r + 0.02, "{c:?}");
                }
            }
        }
    }

    #[test]
    fn pictures_follow_from_seed_part_and_index_at_any_size() {
        let draw = |size, seed, split, index| Scenes::new(size, seed).unwrap().get(split, index);
        let a = draw(32, 1, Split::Train, 4);
        assert_eq!(a, draw(32, 1, Split::Train, 4));
        assert_eq!(a.sample.image, PathBuf::from("scenes/train/4"));
        for b in [draw(32, 2, Split::Train, 4), draw(32, 1, Split::Test, 4), draw(32, 1, Split::Train, 5)] {
            assert_ne!(a.image, b.image);
        }
        // The same scene in more pixels.
        let large = draw(96, 1, Split::Train, 4);
        assert_eq!((large.image.height, large.image.width, &large.sample), (96, 96, &a.sample));
        let mean = |i: &crate::data::Image| i.pixels.iter().sum::<f32>() / i.pixels.len() as f32;
        assert!((mean(&large.image) - mean(&a.image)).abs() < 0.02);
        assert!(Scenes::new(8, 1).unwrap_err().to_string().contains("16 or more"));
    }
}
