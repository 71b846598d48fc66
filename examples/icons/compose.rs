//! Pictures from icons and words: their layout and their texts.

use ett::data::Split;
use ett::data::vector::{Alphabet, Body, EM, Item, Paint, Picture};
use ett::rng::Philox;

use super::SEED;
use super::colours::{BACKGROUNDS, Named, PAINTS, legible};
use super::measure::Seen;
use super::names::{Kind, key, phrase, split, with_article};

/// Pictures of several icons.
const SCENES: usize = 14_000;
/// Pictures of words.
const WRITTEN: usize = 12_000;
/// One picture of several icons or of words in this many is for testing.
const TESTED: usize = 10;
const COUNTS: [&str; 4] = ["one", "two", "three", "four"];

/// The bodies and all pictures, mixed.
pub fn compose(icons: &[Seen], alphabets: &[Alphabet], words: &[String]) -> (Vec<Body>, Vec<Picture>) {
    let parts = [Split::Train, Split::Test].map(|part| Part {
        split: part,
        icons,
        own: (0..icons.len()).filter(|&i| split(&icons[i].icon.key) == part).collect(),
        alphabets,
        words: words.iter().map(String::as_str).filter(|w| split(w) == part).collect(),
    });
    let of = |i: usize| &parts[usize::from(i.is_multiple_of(TESTED))];
    let rng = |kind: u64, i: usize| Philox::new(SEED, kind << 32 | i as u64);
    let mut pictures = Vec::new();
    for part in &parts {
        pictures.extend(part.own.iter().map(|&i| part.single(i, &mut rng(2, i))));
    }
    // A small part, as in a quick look, may hold too few icons or words for some pictures.
    pictures.extend((0..SCENES.min(2 * icons.len())).filter_map(|i| of(i).scene(&mut rng(3, i))));
    pictures.extend((0..WRITTEN.min(2 * icons.len())).filter_map(|i| of(i).written(&mut rng(4, i))));
    rng(5, 0).shuffle(&mut pictures);
    (icons.iter().map(|s| s.icon.body.clone()).collect(), pictures)
}

/// The icons and words of one part of the data.
struct Part<'a> {
    split: Split,
    icons: &'a [Seen],
    /// Indices of its icons.
    own: Vec<usize>,
    alphabets: &'a [Alphabet],
    words: Vec<&'a str>,
}

/// A canvas being filled. Everything stands in the central square, so that no crop to a square cuts it.
struct Canvas {
    split: Split,
    size: [usize; 2],
    background: Named,
    shade: Paint,
    items: Vec<Item>,
}

/// A rectangle in pixels.
#[derive(Clone, Copy)]
struct Area {
    left: usize,
    top: usize,
    width: usize,
    height: usize,
}

impl Area {
    /// Cell `i` of `n` cells side by side, or on top of one another.
    fn cell(self, i: usize, n: usize, upright: bool) -> Area {
        match upright {
            false => Area { left: self.left + i * self.width / n, width: self.width / n, ..self },
            true => Area { top: self.top + i * self.height / n, height: self.height / n, ..self },
        }
    }
}

impl Canvas {
    fn new(split: Split, background: Named, rng: &mut Philox) -> Self {
        const SIDES: [usize; 7] = [256, 320, 384, 448, 512, 640, 768];
        let short = SIDES[rng.below(SIDES.len())];
        // Half of the pictures are square; the others are up to twice as long as wide.
        let long = match rng.below(2) {
            0 => short,
            _ => (short + 32 * rng.below(short / 32 + 1)).min(768),
        };
        let size = if rng.below(2) == 0 { [short, long] } else { [long, short] };
        Canvas { split, size, background, shade: background.shade(rng), items: Vec::new() }
    }

    fn square(&self) -> Area {
        let [w, h] = self.size;
        let side = w.min(h);
        Area { left: (w - side) / 2, top: (h - side) / 2, width: side, height: side }
    }

    /// Places an icon somewhere in an area, `share` of which it fills in one direction.
    fn icon(&mut self, body: usize, paint: Paint, area: Area, share: f64, rng: &mut Philox) {
        let side = ((area.width.min(area.height) as f64 * share) as usize).max(1);
        // Near the middle, so that "left" and "above" are clear.
        let mut place = |start: usize, length: usize| {
            let free = (length - side) as f64;
            start + (free * (0.5 + 0.6 * (rng.uniform() - 0.5))) as usize
        };
        let (left, top) = (place(area.left, area.width), place(area.top, area.height));
        self.items.push(Item::Icon { body, at: [left, top, side, side], paint });
    }

    fn picture(self, texts: Texts, rng: &mut Philox) -> Picture {
        let Texts { captions, prompt, mut questions } = texts;
        questions.push(("what color is the background?".into(), self.background.name.into()));
        rng.shuffle(&mut questions);
        Picture {
            split: self.split,
            size: self.size,
            background: self.shade,
            items: self.items,
            captions,
            prompt: Some(prompt),
            questions,
        }
    }
}

struct Texts {
    captions: Vec<String>,
    prompt: String,
    questions: Vec<(String, String)>,
}

/// Something shown, in words.
struct Shown {
    /// With its article: "a cat", "a red star icon".
    phrase: String,
    /// Without article and colour: "cat", "star".
    label: String,
    /// The exact colour of a plain icon.
    colour: Option<Named>,
}

fn one<T: Copy>(rng: &mut Philox, items: &[T]) -> T {
    items[rng.below(items.len())]
}

fn ask(question: impl Into<String>, answer: impl Into<String>) -> (String, String) {
    (question.into(), answer.into())
}

impl Part<'_> {
    /// What an icon shows, in `colour` if it is plain.
    fn shown(&self, i: usize, colour: Named) -> Shown {
        let icon = &self.icons[i].icon;
        let colour = icon.plain.then_some(colour);
        let label = match colour {
            Some(colour) => format!("{} {}", colour.name, icon.label),
            None => icon.label.clone(),
        };
        let phrase = phrase(&label, icon.kind);
        let label = match icon.kind {
            Kind::Flag => phrase.trim_start_matches("the ").into(),
            _ => icon.label.clone(),
        };
        Shown { phrase, label, colour }
    }

    /// A background on which all `icons` stand out, with colours for the plain ones.
    fn background(&self, icons: &[usize], rng: &mut Philox) -> (Named, Vec<Named>) {
        let mut background = BACKGROUNDS[0];
        for _ in 0..40 {
            background = one(rng, &BACKGROUNDS);
            let clear = |i: &usize| self.icons[*i].icon.plain || self.icons[*i].stands_out(background.rgb);
            if icons.iter().all(clear) {
                break;
            }
        }
        let colours = icons.iter().map(|_| self.paint(background, rng)).collect();
        (background, colours)
    }

    /// A colour that is easily seen on a background.
    fn paint(&self, background: Named, rng: &mut Philox) -> Named {
        let clear: Vec<Named> = PAINTS.into_iter().filter(|p| legible(*p, background)).collect();
        one(rng, &clear)
    }

    /// Something else that is in no picture with `shown`.
    fn other(&self, shown: &[&str], rng: &mut Philox) -> Option<String> {
        for _ in 0..20 {
            let icon = &self.icons[one(rng, &self.own)].icon;
            if shown.iter().all(|s| apart(s, &icon.label)) {
                return Some(phrase(&icon.label, icon.kind));
            }
        }
        None
    }

    /// A question whose answer is yes or no with equal probability.
    fn there(&self, shown: &[Shown], rng: &mut Philox) -> Option<(String, String)> {
        let labels: Vec<&str> = shown.iter().map(|s| s.label.as_str()).collect();
        match rng.below(2) {
            0 => Some(ask(whether(&shown[rng.below(shown.len())].phrase), "yes")),
            _ => self.other(&labels, rng).map(|other| ask(whether(&other), "no")),
        }
    }

    /// A picture of icon `i` alone.
    fn single(&self, i: usize, rng: &mut Philox) -> Picture {
        let (background, colours) = self.background(&[i], rng);
        let Seen { icon, main, .. } = &self.icons[i];
        let shown = self.shown(i, colours[0]);
        let mut canvas = Canvas::new(self.split, background, rng);
        let share = 0.55 + 0.4 * rng.uniform();
        canvas.icon(i, colours[0].shade(rng), canvas.square(), share, rng);

        let Shown { phrase, label, colour } = &shown;
        let on = on(background);
        let mut captions = vec![format!("{phrase}, {}", icon.style), format!("{phrase} {on}")];
        let tags: Vec<&str> = icon.tags.iter().map(String::as_str).filter(|t| apart(t, label)).collect();
        if !tags.is_empty() {
            let from = rng.below(tags.len());
            let some: Vec<&str> = tags.iter().cycle().skip(from).take(tags.len().min(3)).copied().collect();
            captions.push(format!("{phrase}: {}", some.join(", ")));
        }
        let mut questions = match icon.kind {
            Kind::Flag => vec![ask("which flag is this?", &icon.label), ask("what is this?", label)],
            Kind::Icon => vec![ask("what does the icon show?", label)],
            Kind::Thing | Kind::Symbol => vec![ask("what is this?", label)],
        };
        questions.extend(colour.map(|c| ask("what color is the icon?", c.name)));
        questions.extend(main.map(|c| ask("what is the main color?", c)));
        questions.extend(self.there(std::slice::from_ref(&shown), rng));
        let prompt = format!("draw {phrase} {on}, {}", icon.style);
        canvas.picture(Texts { captions, prompt, questions }, rng)
    }

    /// `n` icons that nobody takes for one another.
    fn different(&self, n: usize, rng: &mut Philox) -> Option<Vec<usize>> {
        let mut icons: Vec<usize> = Vec::new();
        for _ in 0..20 * n {
            if icons.len() == n {
                break;
            }
            let i = *self.own.get(rng.below(self.own.len()))?;
            if icons.iter().all(|&j| apart(&self.icons[i].icon.label, &self.icons[j].icon.label)) {
                icons.push(i);
            }
        }
        Some(icons).filter(|i| i.len() == n)
    }

    /// A picture of two to four icons.
    fn scene(&self, rng: &mut Philox) -> Option<Picture> {
        match rng.below(8) {
            0..=3 => self.row(2, rng),
            4 | 5 => self.row(3, rng),
            6 => self.same(rng),
            _ => self.corners(rng),
        }
    }

    /// Two or three different icons side by side or on top of one another.
    fn row(&self, n: usize, rng: &mut Philox) -> Option<Picture> {
        let icons = self.different(n, rng)?;
        let upright = rng.below(2) == 0;
        let (background, colours) = self.background(&icons, rng);
        let shown: Vec<Shown> = icons.iter().zip(&colours).map(|(i, c)| self.shown(*i, *c)).collect();
        let mut canvas = Canvas::new(self.split, background, rng);
        for (k, (i, colour)) in icons.iter().zip(&colours).enumerate() {
            let area = canvas.square().cell(k, n, upright);
            canvas.icon(*i, colour.shade(rng), area, 0.7 + 0.25 * rng.uniform(), rng);
        }
        let places: &[&str] = match (n, upright) {
            (2, false) => &["on the left", "on the right"],
            (2, true) => &["at the top", "at the bottom"],
            (_, false) => &["on the left", "in the middle", "on the right"],
            (_, true) => &["at the top", "in the middle", "at the bottom"],
        };
        let phrases: Vec<&str> = shown.iter().map(|s| s.phrase.as_str()).collect();
        let placed: Vec<String> =
            phrases.iter().zip(places).map(|(p, place)| format!("{p} {place}")).collect();
        let count = COUNTS[n - 1];
        let mut captions = vec![format!("{count} icons: {}", listed(&placed))];
        captions.push(match (n, upright) {
            (2, false) => format!("{} to the left of {}", phrases[0], phrases[1]),
            (2, true) => format!("{} above {}", phrases[0], phrases[1]),
            (_, false) => format!("{count} icons from left to right: {}", listed(&phrases)),
            (_, true) => format!("{count} icons from top to bottom: {}", listed(&phrases)),
        });
        let mut questions = vec![ask("how many icons are there?", count)];
        let k = rng.below(n);
        questions.push(ask(format!("what is {}?", places[k]), &shown[k].label));
        let k = rng.below(n);
        questions.push(ask(format!("where is {}?", the(&shown[k].phrase)), places[k]));
        if n == 2 {
            let (first, second) = (the(&shown[0].phrase), the(&shown[1].phrase));
            let (before, after) = if upright { ("above", "below") } else { ("left of", "right of") };
            questions.push(match rng.below(2) {
                0 => ask(format!("what is {before} {second}?"), &shown[0].label),
                _ => ask(format!("what is {after} {first}?"), &shown[1].label),
            });
        }
        for (shown, place) in shown.iter().zip(places) {
            questions.extend(shown.colour.map(|c| ask(format!("what color is the icon {place}?"), c.name)));
        }
        questions.extend(self.there(&shown, rng));
        let prompt = format!("draw {} {}", listed(&placed), on(background));
        Some(canvas.picture(Texts { captions, prompt, questions }, rng))
    }

    /// The same icon two to four times in a row.
    fn same(&self, rng: &mut Philox) -> Option<Picture> {
        let i = *self.own.get(rng.below(self.own.len()))?;
        let n = 2 + rng.below(3);
        let upright = rng.below(2) == 0;
        let (background, colours) = self.background(&[i], rng);
        let shown = self.shown(i, colours[0]);
        let mut canvas = Canvas::new(self.split, background, rng);
        let (paint, share) = (colours[0].shade(rng), 0.75 + 0.2 * rng.uniform());
        for k in 0..n {
            canvas.icon(i, paint, canvas.square().cell(k, n, upright), share, rng);
        }
        let (count, line) = (COUNTS[n - 1], if upright { "column" } else { "row" });
        let phrase = &shown.phrase;
        let captions = vec![
            format!("{count} equal icons in a {line}: {phrase}"),
            format!("{phrase}, {count} times in a {line}, {}", on(background)),
        ];
        let mut questions = vec![
            ask("how many icons are there?", count),
            ask("what do the icons show?", &shown.label),
            ask("are the icons equal?", "yes"),
        ];
        questions.extend(shown.colour.map(|c| ask("what color are the icons?", c.name)));
        let prompt = format!("draw {phrase} {count} times in a {line} {}", on(background));
        questions.extend(self.there(&[shown], rng));
        Some(canvas.picture(Texts { captions, prompt, questions }, rng))
    }

    /// Four different icons in the corners of the square.
    fn corners(&self, rng: &mut Philox) -> Option<Picture> {
        const CORNERS: [&str; 4] = ["top left", "top right", "bottom left", "bottom right"];
        let icons = self.different(4, rng)?;
        let (background, colours) = self.background(&icons, rng);
        let shown: Vec<Shown> = icons.iter().zip(&colours).map(|(i, c)| self.shown(*i, *c)).collect();
        let mut canvas = Canvas::new(self.split, background, rng);
        for (k, (i, colour)) in icons.iter().zip(&colours).enumerate() {
            let area = canvas.square().cell(k / 2, 2, true).cell(k % 2, 2, false);
            canvas.icon(*i, colour.shade(rng), area, 0.65 + 0.25 * rng.uniform(), rng);
        }
        let placed: Vec<String> =
            shown.iter().zip(CORNERS).map(|(s, corner)| format!("{} at the {corner}", s.phrase)).collect();
        let captions = vec![format!("four icons: {}", listed(&placed))];
        let (k, other) = (rng.below(4), rng.below(4));
        let mut questions = vec![
            ask("how many icons are there?", "four"),
            ask(format!("what is at the {}?", CORNERS[k]), &shown[k].label),
            ask(format!("where is {}?", the(&shown[other].phrase)), format!("at the {}", CORNERS[other])),
            ask("are the icons equal?", "no"),
        ];
        questions.extend(self.there(&shown, rng));
        let prompt = format!("draw {} {}", listed(&placed), on(background));
        Some(canvas.picture(Texts { captions, prompt, questions }, rng))
    }

    /// One to three lines of text, some beside an icon.
    fn written(&self, rng: &mut Philox) -> Option<Picture> {
        let beside = match rng.below(3) {
            0 => Some(*self.own.get(rng.below(self.own.len()))?),
            _ => None,
        };
        let lines = self.lines(beside.is_none(), rng)?;
        let (background, colours) = self.background(beside.as_slice(), rng);
        let colour = self.paint(background, rng);
        let alphabet = rng.below(self.alphabets.len());
        let mut canvas = Canvas::new(self.split, background, rng);
        let square = canvas.square();
        // The text is in one half if an icon is in the other.
        let below = rng.below(2) == 0;
        let area = match beside {
            None => square,
            Some(_) => square.cell(usize::from(below), 2, true),
        };
        let paint = colour.shade(rng);
        self.write(&mut canvas, &lines, alphabet, paint, area, rng);
        let on = on(background);
        let text = lines.join(" ");
        let what = match (lines.len(), text.contains(' ')) {
            (1, false) if text.bytes().all(|b| b.is_ascii_digit()) => "the number",
            (1, false) => "the word",
            _ => "the words",
        };
        let said = format!("{what} \"{text}\" in {}", colour.name);
        let mut questions =
            vec![ask("what does it say?", &text), ask("what color is the text?", colour.name)];
        if !text.contains(' ') {
            let asked = if what == "the number" {
                "how many digits are there?"
            } else {
                "how many letters are there?"
            };
            questions.push(ask(asked, text.len().to_string()));
        } else if lines.len() > 1 {
            questions.push(ask("how many lines of text are there?", COUNTS[lines.len() - 1]));
            questions.push(ask("what does the first line say?", &lines[0]));
        }
        let (caption, prompt) = match beside {
            None => (format!("{said} {on}"), format!("draw {said} {on}")),
            Some(i) => {
                let area = square.cell(usize::from(!below), 2, true);
                canvas.icon(i, colours[0].shade(rng), area, 0.7 + 0.25 * rng.uniform(), rng);
                let shown = self.shown(i, colours[0]);
                let place = if below { "below" } else { "above" };
                let other = if below { "above" } else { "below" };
                let caption = format!("{said} {place} {}", shown.phrase);
                questions.push(ask(format!("what is {other} the text?"), &shown.label));
                questions.extend(self.there(&[shown], rng));
                let prompt = format!("draw {caption} {on}");
                (caption, prompt)
            }
        };
        let captions = vec![caption, format!("the text \"{text}\" {on}, in {} letters", colour.name)];
        Some(canvas.picture(Texts { captions, prompt, questions }, rng))
    }

    /// The lines of a text: common words, or letters and digits at random, which have to be read one by one.
    fn lines(&self, several: bool, rng: &mut Philox) -> Option<Vec<String>> {
        let made_up = rng.below(10);
        if made_up < 3 {
            return Some(vec![self.made_up(made_up == 0, rng)]);
        }
        let lines = if several { one(rng, &[1, 1, 1, 2, 2, 3]) } else { one(rng, &[1, 1, 2]) };
        let cased = rng.below(3);
        let mut all = Vec::new();
        for _ in 0..lines {
            let count = if lines > 1 { one(rng, &[1, 1, 2]) } else { 1 };
            let mut line = Vec::new();
            for _ in 0..count {
                let word = *self.words.get(rng.below(self.words.len()))?;
                line.push(match cased {
                    0 => word.to_uppercase(),
                    1 => word[..1].to_uppercase() + &word[1..],
                    _ => word.to_string(),
                });
            }
            all.push(line.join(" "));
        }
        Some(all)
    }

    fn made_up(&self, digits: bool, rng: &mut Philox) -> String {
        loop {
            let text: String = match digits {
                true => (0..2 + rng.below(5)).map(|_| char::from(b'0' + rng.below(10) as u8)).collect(),
                false => (0..3 + rng.below(5)).map(|_| char::from(b'a' + rng.below(26) as u8)).collect(),
            };
            if split(&text) == self.split && !text.starts_with('0') {
                return text;
            }
        }
    }

    /// Writes lines into an area, as large as they fit or up to half smaller.
    fn write(
        &self,
        canvas: &mut Canvas,
        lines: &[String],
        index: usize,
        paint: Paint,
        area: Area,
        rng: &mut Philox,
    ) {
        let alphabet = &self.alphabets[index];
        let longest = lines.iter().filter_map(|l| alphabet.length(l)).fold(1.0, f32::max);
        let leading = alphabet.ascent + alphabet.descent;
        let tall = leading * lines.len() as f32;
        let (width, height) = (area.width as f32, area.height as f32);
        // Less than the whole area by a margin on each side, and no letter larger than half of it.
        let most = (0.9 * width / longest).min(0.9 * height / tall).min(0.5 * height / leading);
        let scale = most * (0.6 + 0.4 * rng.uniform() as f32);
        let mut free = |room: f32| room * (0.1 + 0.8 * rng.uniform() as f32);
        let top = area.top as f32 + free(height - tall * scale);
        let left = area.left as f32 + free(width - longest * scale);
        for (k, line) in lines.iter().enumerate() {
            let base = top + (alphabet.ascent + leading * k as f32) * scale;
            // Tenths of a pixel are exact enough and shorter in the file.
            let tenths = |x: f32| (10.0 * x).floor() / 10.0;
            canvas.items.push(Item::Text {
                alphabet: index,
                text: line.clone(),
                at: [tenths(left), tenths(base)],
                em: tenths(scale * EM),
                paint,
            });
        }
    }
}

fn on(background: Named) -> String {
    format!("on {} background", with_article(background.name))
}

/// Whether two labels have no word in common, so that nobody would call one thing by the other's name.
fn apart(a: &str, b: &str) -> bool {
    let (a, b) = (key(a, Kind::Thing), key(b, Kind::Thing));
    a.split(' ').all(|word| b.split(' ').all(|other| word != other))
}

/// With "the" in place of "a" or "an".
fn the(phrase: &str) -> String {
    match phrase.split_once(' ') {
        Some(("a" | "an" | "the", rest)) => format!("the {rest}"),
        _ => format!("the {phrase}"),
    }
}

/// The question whether something is there.
fn whether(phrase: &str) -> String {
    let article = ["a ", "an ", "the "].iter().any(|a| phrase.starts_with(a));
    match article || !phrase.ends_with('s') {
        true => format!("is there {phrase}?"),
        false => format!("are there {phrase}?"),
    }
}

/// "a, b and c".
fn listed<T: AsRef<str>>(items: &[T]) -> String {
    let items: Vec<&str> = items.iter().map(T::as_ref).collect();
    match items.as_slice() {
        [] => String::new(),
        [one] => one.to_string(),
        [rest @ .., last] => format!("{} and {last}", rest.join(", ")),
    }
}
