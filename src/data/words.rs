//! Built-in pictures of words.

use std::path::PathBuf;

use super::draw::{Canvas, Colour, Drawing, LETTER, Shape, Split, background, pick, pick_other, yes_or_no};
use super::look::Scene;
use super::sample::{Chat, Sample};
use super::source::{DRAWN, DataSource, Listed, Wanted};
use crate::error::{Error, Result};
use crate::rng::Philox;

/// Smallest side in which the longest words fit, in pixels.
pub(super) const MIN_SIZE: usize = 48;
/// The side divided by this is the margin left free on each side. Words stand at multiples of it: with fewer ways in
/// which a letter can lie across the patches of a tokenizer, fewer codes spell it.
const MARGIN: usize = 24;
/// Letters of the shortest and of the longest word.
const LETTERS: [usize; 2] = [3, 5];

/// Common words of three to five letters.
const WORDS: &str = "\
    act add age air all ant apple arm army art ask aunt baby back bad bag ball band bank bar barn base \
    bath beach bean bear bed bee bell belt bench big bike bird bite black blow blue board boat body bone \
    book boot born both bowl box boy brain brave bread break brick bring broom brown brush bug build burn \
    bus bush busy buy cabin cake call calm camp can candy cap car card care carry cart case cat catch cave \
    chain chair chalk chase cheap check cheek chest child chin city clap class clay clean clear climb \
    clock close cloth cloud coach coast coat coin cold comb cook cool copy corn cost count cow crab crane \
    cream crop cross crowd crown cry cup cut daily dance dark date day deal dear deep deer desk dig dirt \
    dish dog doll door down draw dream dress drink drive drop drum dry duck dust eagle ear early earth \
    east easy eat edge egg eight elbow empty end enjoy enter even event every eye face fact fair fall fan \
    far farm fast feed feel fence few field fifth fight fill film find fire first fish five flag flat \
    float floor flour fly fog fold food foot fork four fox free fresh frog front fruit full fun funny game \
    gate ghost giant gift girl give glad glass globe glove glue goat gold good goose grain grape grass \
    great green grey group grow guess guide hair half hall hand happy hard hat have hay head hear heart \
    heat heavy help hen here hide high hill hold hole home honey hook hope horn horse hot hotel hour house \
    human hurry ice idea ink iron jam jar job join joke judge juice jump jury keep key kick kind king kite \
    knee knife knock lady lake lamb lamp land large last late laugh law lead leaf learn leave left leg \
    lemon light like lime line lion lip list live lock log long look loud love low lucky lunch magic mail \
    main make man many map mark mask match meal mean meat melon metal milk mind mine mix money month moon \
    more moth mouse mouth move movie mud music nail name neat neck need nest net never new news next nice \
    night nine noise nose note nurse nut oak ocean offer oil old olive one onion open order other oven owl \
    own page paint pair palm pan paper park part party pass past path paw pay peace peach pear pen pet \
    phone photo piano pick pie pig pin pink pipe pizza place plane plant plate play plum plus pond pool \
    poor post pot press price print prize proud pull pump puppy pure push queen quick quiet race radio \
    rain read ready red rest rice rich ride right ring rise river road robot rock roof room root rope rose \
    round row rule run sad safe sail salad salt same sand save scarf sea seat seed seven shade shape share \
    sharp sheep sheet shelf shell shine ship shirt shoe shop short show sign silk sing sink sit six size \
    skate skin skirt sky sleep slow small smart smell smile smoke snail snake snow soap sock sofa soft \
    soil song sort soup south space spoon sport spot stair stamp stand star start stay steam step stick \
    stone stop store storm story stove sugar suit sun sweet swim table tail take talk tall tank taste taxi \
    tea teach team ten tent test thank thick thin thing think three throw thumb tide tie tiger time tin \
    tiny toast today toe tool tooth top touch towel tower town toy track trade train trap tree trip truck \
    true trust tube turn two uncle under use van vase very visit voice wagon wait walk wall want warm wash \
    watch water wave week well west wet whale wheat wheel white whole wide wife wild win wind wing wire \
    wise wish wolf wood wool word work world worm write yard year young zebra zero";

/// Pictures of one word, some with a shape above or below it.
///
/// About one word in six is held out, by a fixed hash: it occurs in test pictures only. In half of the training
/// pictures the word is made of random letters, so that the letters have to be read: a model that has seen only the
/// words of a list takes every other word for one of them. Letters come from a bitmap font, each dot being a square of
/// whole pixels; place, size and shade vary.
#[derive(Debug, Clone)]
pub struct Words {
    size: usize,
    seed: u64,
    train: Vec<&'static str>,
    test: Vec<&'static str>,
}

/// What a picture of [`Words`] shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The word.
    pub word: String,
    /// Its colour.
    pub colour: Colour,
    /// The shape above or below it, in another colour.
    pub beside: Option<(Shape, Colour)>,
}

impl Written {
    fn caption(&self) -> String {
        let word = format!("the word \"{}\" in {}", self.word, self.colour.name());
        match self.beside {
            Some((shape, colour)) => format!("a {} {} and {word}", colour.name(), shape.name()),
            None => word,
        }
    }

    /// One question of every kind that the picture can answer, in random order.
    fn questions(&self, rng: &mut Philox) -> Vec<Chat> {
        let mut all: Vec<(String, String)> = vec![
            ("what does it say?".into(), self.word.clone()),
            ("what color is the word?".into(), self.colour.name().into()),
            yes_or_no(rng, &Colour::ALL, self.colour, |c| format!("is the word {}?", c.name())),
        ];
        if let Some((shape, colour)) = self.beside {
            all.push(("what shape is there?".into(), shape.name().into()));
            all.push(("what color is the shape?".into(), colour.name().into()));
        }
        rng.shuffle(&mut all);
        all.into_iter().map(|(q, a)| Chat::of(q, a)).collect()
    }

    fn draw(&self, size: usize, rng: &mut Philox) -> Canvas {
        // Thin strokes in a light colour need a dark background, and vice versa.
        let mut canvas = Canvas::new(size, background(rng, self.colour.light()));
        let margin = size / MARGIN;
        let free = size - 2 * margin;
        let largest = (free / (self.word.len() * LETTER)).max(1);
        let scale = largest - rng.below(largest.min(2));
        let (width, height) = (self.word.len() * LETTER * scale, LETTER * scale);
        // One of the multiples of the margin between which a length fits.
        let place =
            |rng: &mut Philox, room: usize, length: usize| margin * rng.below((room - length) / margin + 1);
        let left = margin + place(rng, free, width);
        let top = match self.beside {
            None => margin + place(rng, free, height),
            Some((shape, colour)) => {
                // The word is in one half, the shape in the other.
                let half = size / 2 - margin;
                let radius = size as f64 * (0.15 + 0.04 * rng.uniform());
                let middle =
                    |rng: &mut Philox, length: usize| radius + rng.uniform() * (length as f64 - 2.0 * radius);
                let x = margin as f64 + middle(rng, free);
                let y = middle(rng, half);
                let below = rng.below(2) == 0;
                let start = if below { size / 2 } else { margin };
                canvas.shape(shape, (x, start as f64 + y), radius, colour.shade(rng));
                let start = if below { margin } else { size / 2 };
                start + place(rng, half, height)
            }
        };
        canvas.word(&self.word, (left, top), scale, self.colour.shade(rng));
        canvas
    }
}

/// [`Words`] as a source of data.
pub(super) struct FromWords;

impl DataSource for FromWords {
    fn name(&self) -> &'static str {
        "words"
    }

    fn smallest_drawn(&self) -> Option<usize> {
        Some(MIN_SIZE)
    }

    fn open(&self, part: &Wanted) -> Result<Listed> {
        let all = Words::new(part.size, DRAWN)?;
        Ok(Listed::drawn(self.name(), part, |i| all.get(part.split, i)))
    }
}

impl Words {
    /// Words in pictures of `size` pixels per side, at least 48; 64 is plenty.
    pub fn new(size: usize, seed: u64) -> Result<Self> {
        if size < MIN_SIZE {
            return Err(Error::arg("Words::new", "size", size, format!("{MIN_SIZE} or more pixels")));
        }
        let part = |split| WORDS.split_whitespace().filter(|w| part_of(w) == split).collect();
        Ok(Words { size, seed, train: part(Split::Train), test: part(Split::Test) })
    }

    /// Picture `index` of a part of the data, the same at every call; pictures repeat after 2^32.
    pub fn get(&self, split: Split, index: usize) -> Drawing {
        let mut rng = split.rng(self.seed, index);
        let word = match split {
            Split::Train if rng.below(2) == 0 => made_up(&mut rng),
            Split::Train => pick(&mut rng, &self.train).into(),
            Split::Test => pick(&mut rng, &self.test).into(),
        };
        let colour = pick(&mut rng, &Colour::ALL);
        let beside = match rng.below(2) {
            0 => None,
            _ => Some((pick(&mut rng, &Shape::ALL), pick_other(&mut rng, &Colour::ALL, colour))),
        };
        let shown = Written { word, colour, beside };
        let image = shown.draw(self.size, &mut rng).image();
        let caption = shown.caption();
        let sample = Sample {
            image: PathBuf::from(format!("words/{}/{index}", split.name())),
            prompt: Some(format!("draw {caption}")),
            captions: vec![caption],
            chats: shown.questions(&mut rng),
            scene: Some(Scene::Word(shown)),
        };
        Drawing { image, sample }
    }
}

/// The part of a word. It depends on the letters only, so that the word keeps its part when the list changes.
fn part_of(word: &str) -> Split {
    Split::of(word.bytes().fold(0, |n, letter| n << 8 | u64::from(letter)))
}

/// A word of random letters for training.
fn made_up(rng: &mut Philox) -> String {
    loop {
        let letters = LETTERS[0] + rng.below(LETTERS[1] - LETTERS[0] + 1);
        let word: String = (0..letters).map(|_| char::from(b'a' + rng.below(26) as u8)).collect();
        if part_of(&word) == Split::Train {
            return word;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use font8x8::{BASIC_FONTS, UnicodeFonts};

    use super::*;

    #[test]
    fn words_are_short_distinct_and_in_one_part_only() {
        let words = Words::new(64, 1).unwrap();
        let all: HashSet<&str> = words.train.iter().chain(&words.test).copied().collect();
        assert!(all.len() >= 400 && all.len() == words.train.len() + words.test.len());
        assert!((60..150).contains(&words.test.len()), "{} words are held out", words.test.len());
        for word in all {
            assert!((3..=5).contains(&word.len()), "{word}");
            assert!(word.bytes().all(|c| c.is_ascii_lowercase()), "{word}");
        }
    }

    #[test]
    fn test_words_never_occur_in_training() {
        let words = Words::new(48, 2).unwrap();
        let said = |split| -> HashSet<String> {
            (0..2000)
                .map(|i| {
                    let sample = words.get(split, i).sample;
                    let caption = sample.captions[0].clone();
                    assert_eq!(sample.prompt, Some(format!("draw {caption}")));
                    let answer =
                        |asked| sample.questions().find(|(q, _)| *q == asked).map(|(_, a)| a.to_string());
                    let word = answer("what does it say?").unwrap();
                    let colour = answer("what color is the word?").unwrap();
                    let end = format!("the word \"{word}\" in {colour}");
                    match (answer("what shape is there?"), answer("what color is the shape?")) {
                        (Some(s), Some(c)) => assert_eq!(caption, format!("a {c} {s} and {end}")),
                        _ => assert_eq!(caption, end),
                    }
                    word
                })
                .collect()
        };
        let (train, test) = (said(Split::Train), said(Split::Test));
        assert!(train.len() > 400 && test.len() > 55, "{} and {}", train.len(), test.len());
        assert!(train.is_disjoint(&test));
    }

    /// Reads the word in the picture by comparing with the font: wherever it is placed, all of its dots are present
    /// and none is cut off.
    #[test]
    fn words_can_be_read() {
        for size in [48, 64, 100] {
            let words = Words::new(size, 7).unwrap();
            for i in 0..60 {
                let drawing = words.get(Split::Train, i);
                let word = drawing.sample.questions().find(|(q, _)| *q == "what does it say?").unwrap().1;
                let rgb = &drawing.image.pixels;
                let pixel = |y: usize, x: usize| &rgb[(y * size + x) * 3..][..3];
                let dots = |y: usize, x: usize, scale: usize| -> Option<()> {
                    let mut ink = None;
                    for (k, letter) in word.chars().enumerate() {
                        for (dy, row) in BASIC_FONTS.get(letter).unwrap().iter().enumerate() {
                            for dx in (0..8).filter(|dx| row >> dx & 1 == 1) {
                                let (py, px) = (y + dy * scale, x + (8 * k + dx) * scale);
                                for (py, px) in [(py, px), (py + scale - 1, px + scale - 1)] {
                                    let here = pixel(py, px);
                                    (*ink.get_or_insert(here) == here).then_some(())?;
                                }
                            }
                        }
                    }
                    (ink != Some(pixel(0, 0))).then_some(())
                };
                let found = (1..=size / (8 * word.len())).any(|scale| {
                    let (height, width) = (8 * scale, 8 * word.len() * scale);
                    (0..=size - height).any(|y| (0..=size - width).any(|x| dots(y, x, scale).is_some()))
                });
                assert!(found, "{word} is not in picture {i} of {size}");
            }
        }
    }
}
