//! The contents of a file of vector graphics, and its lines.
//!
//! The file is one zstd frame of JSON lines: a [`Manifest`], then as many [`Alphabet`]s, [`Body`]s and [`Picture`]s as it
//! announces. Nothing is optional and nothing unknown is skipped, so that a damaged file cannot pass for a smaller one.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::super::draw::Split;
use crate::error::{Error, Result};

/// What the first line of a file calls its format.
pub(super) const FORMAT: &str = "ett vector graphics";
/// The version that this program writes and reads.
pub(super) const VERSION: u32 = 1;
/// Maximum side of a canvas, in pixels.
pub const MAX_CANVAS: usize = 4096;
/// Maximum size of a file after decompression, in bytes; a file ten times larger than the one that
/// `examples/fetch-icons.sh` makes would be refused.
const MAX_BYTES: u64 = 512 << 20;
/// Maximum length of a line, in bytes.
const MAX_LINE: usize = 1 << 20;
/// Maximum number of items on a canvas.
const MAX_ITEMS: usize = 64;
/// Maximum number of captions, and of questions, of a picture.
const MAX_TEXTS: usize = 256;
/// Units of an alphabet in the em square, the size of its letters.
pub const EM: f32 = 1000.0;
/// Compression level: the file is written once and read often.
const LEVEL: i32 = 19;

/// The first line: how the file was made, from what, and how much it holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: String,
    version: u32,
    /// The program that made the file, and the choices it made.
    pub made: String,
    /// Where bodies, letters and texts come from.
    pub origins: Vec<Origin>,
    /// Number of alphabets.
    pub alphabets: usize,
    /// Number of bodies.
    pub bodies: usize,
    /// Number of pictures.
    pub pictures: usize,
}

/// A source of bodies, letters or texts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// Its name, such as that of an icon set.
    pub name: String,
    /// What is taken from it.
    pub what: String,
    /// The package that was fetched.
    pub package: String,
    /// The exact version of the package.
    pub version: String,
    /// SHA-256 of the package as downloaded, in hexadecimal; empty if the build tool has verified it.
    pub sha256: String,
    /// The licence, as an SPDX identifier where there is one.
    pub licence: String,
    /// Who made it.
    pub author: String,
    /// Where it comes from; empty if the package does not say.
    pub url: String,
    /// How many things of this source the file holds.
    pub used: usize,
}

/// The outlines of letters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Alphabet {
    /// The name of the font.
    pub name: String,
    /// Index of its origin.
    pub origin: usize,
    /// Height of the highest letters above the base line, in units of [`EM`].
    pub ascent: f32,
    /// Depth of the lowest letters below the base line, in units of [`EM`].
    pub descent: f32,
    /// The letters.
    pub letters: BTreeMap<char, Letter>,
}

/// One letter: its advance in units of [`EM`], and its outline as SVG path data, the base line at 0 and y pointing down.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Letter(pub f32, pub String);

/// A piece of SVG.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Body {
    /// Its name in its set.
    pub name: String,
    /// Index of its origin.
    pub origin: usize,
    /// Its view box: left, top, width, height.
    pub view: [f32; 4],
    /// The elements inside `<svg>`.
    pub svg: String,
}

/// A picture and its texts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Picture {
    /// The part it belongs to.
    #[serde(with = "split")]
    pub split: Split,
    /// Width and height in pixels, each 1 to [`MAX_CANVAS`].
    pub size: [usize; 2],
    /// The colour behind the items.
    pub background: Paint,
    /// What is drawn, in this order.
    pub items: Vec<Item>,
    /// Its captions.
    pub captions: Vec<String>,
    /// What to draw.
    pub prompt: Option<String>,
    /// Questions with their answers.
    pub questions: Vec<(String, String)>,
}

/// A part of a picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "lowercase")]
pub enum Item {
    /// A body.
    Icon {
        /// Index of the body.
        body: usize,
        /// Its box: left, top, width, height in pixels, inside the canvas. The view box is fitted into it.
        at: [usize; 4],
        /// The colour of what the body paints with `currentColor`.
        paint: Paint,
    },
    /// A line of text.
    Text {
        /// Index of the alphabet.
        alphabet: usize,
        /// What it says; all of its characters are in the alphabet.
        text: String,
        /// Its left end and its base line, in pixels; the text is inside the canvas.
        at: [f32; 2],
        /// The size of the letters: pixels of [`EM`] units.
        em: f32,
        /// Its colour.
        paint: Paint,
    },
}

/// An opaque colour: red, green and blue; `#rrggbb` in files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Paint(pub [u8; 3]);

impl std::fmt::Display for Paint {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let [r, g, b] = self.0;
        write!(f, "#{r:02x}{g:02x}{b:02x}")
    }
}

impl From<Paint> for String {
    fn from(paint: Paint) -> Self {
        paint.to_string()
    }
}

impl TryFrom<String> for Paint {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        let digits =
            text.strip_prefix('#').filter(|d| d.len() == 6 && d.bytes().all(|b| b.is_ascii_hexdigit()));
        let number = digits.and_then(|d| u32::from_str_radix(d, 16).ok());
        let [_, r, g, b] =
            number.ok_or_else(|| format!("the colour is {text:?}, wanted #rrggbb"))?.to_be_bytes();
        Ok(Paint([r, g, b]))
    }
}

/// The name of a part in files.
mod split {
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::data::draw::Split;

    pub fn serialize<S: Serializer>(split: &Split, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(split.name())
    }

    pub fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<Split, D::Error> {
        let name = std::borrow::Cow::<str>::deserialize(from)?;
        [Split::Train, Split::Test]
            .into_iter()
            .find(|s| s.name() == name)
            .ok_or_else(|| serde::de::Error::custom(format!("the split is {name:?}, wanted train or test")))
    }
}

impl Alphabet {
    /// Length of a line of text in units of [`EM`]; `None` if a character has no letter.
    pub fn length(&self, text: &str) -> Option<f32> {
        text.chars().map(|c| self.letters.get(&c).map(|l| l.0)).sum()
    }
}

/// Everything that a file holds.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Contents {
    pub manifest: Manifest,
    pub alphabets: Vec<Alphabet>,
    pub bodies: Vec<Body>,
    pub pictures: Vec<Picture>,
}

impl Contents {
    pub fn new(
        made: String,
        origins: Vec<Origin>,
        alphabets: Vec<Alphabet>,
        bodies: Vec<Body>,
        pictures: Vec<Picture>,
    ) -> Self {
        let manifest = Manifest {
            format: FORMAT.into(),
            version: VERSION,
            made,
            origins,
            alphabets: alphabets.len(),
            bodies: bodies.len(),
            pictures: pictures.len(),
        };
        Contents { manifest, alphabets, bodies, pictures }
    }

    /// Reads a file; everything except the SVG inside the bodies is checked.
    pub fn read(path: &Path) -> Result<Self> {
        let file = match std::fs::File::open(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let what = "there is no such file; make it with examples/fetch-icons.sh or correct the path";
                return Err(Error::data(path, what));
            }
            file => file.map_err(Error::io(path))?,
        };
        if file.metadata().map_err(Error::io(path))?.is_dir() {
            return Err(Error::data(path, "this is a folder; name a file of vector graphics"));
        }
        let mut lines = Lines::new(path, file)?;
        let manifest: Manifest = lines.manifest()?;
        let mut all = Contents::new(manifest.made.clone(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        all.manifest = manifest;
        for _ in 0..all.manifest.alphabets {
            let alphabet = lines.next("an alphabet", |a| all.check_alphabet(a))?;
            all.alphabets.push(alphabet);
        }
        for _ in 0..all.manifest.bodies {
            let body = lines.next("a body", |b| all.check_body(b))?;
            all.bodies.push(body);
        }
        for _ in 0..all.manifest.pictures {
            let picture = lines.next("a picture", |p| all.check_picture(p))?;
            all.pictures.push(picture);
        }
        lines.end()?;
        Ok(all)
    }

    /// The bytes of the file: the same for the same contents.
    pub fn bytes(&self) -> std::io::Result<Vec<u8>> {
        let mut out = zstd::Encoder::new(Vec::new(), LEVEL)?;
        out.include_checksum(true)?;
        let mut put = |line: serde_json::Result<Vec<u8>>| {
            let mut line = line?;
            line.push(b'\n');
            out.write_all(&line)
        };
        put(serde_json::to_vec(&self.manifest))?;
        self.alphabets.iter().try_for_each(|a| put(serde_json::to_vec(a)))?;
        self.bodies.iter().try_for_each(|b| put(serde_json::to_vec(b)))?;
        self.pictures.iter().try_for_each(|p| put(serde_json::to_vec(p)))?;
        out.finish()
    }

    /// What is wrong with the contents, if anything.
    pub fn check(&self) -> std::result::Result<(), String> {
        let numbered = |what: &str, i: usize| {
            let what = format!("{what} {i}: ");
            move |e: String| what + &e
        };
        for (i, alphabet) in self.alphabets.iter().enumerate() {
            self.check_alphabet(alphabet).map_err(numbered("alphabet", i))?;
        }
        for (i, body) in self.bodies.iter().enumerate() {
            self.check_body(body).map_err(numbered("body", i))?;
        }
        for (i, picture) in self.pictures.iter().enumerate() {
            self.check_picture(picture).map_err(numbered("picture", i))?;
        }
        Ok(())
    }

    fn check_origin(&self, origin: usize) -> std::result::Result<(), String> {
        within("origin", origin, self.manifest.origins.len())
    }

    fn check_alphabet(&self, alphabet: &Alphabet) -> std::result::Result<(), String> {
        self.check_origin(alphabet.origin)?;
        let reasonable = |x: f32| (0.0..=10.0 * EM).contains(&x);
        if !reasonable(alphabet.ascent) || !reasonable(alphabet.descent) {
            let (a, d) = (alphabet.ascent, alphabet.descent);
            return Err(format!("ascent and descent are {a} and {d}, wanted 0 to {}", 10.0 * EM));
        }
        for (letter, Letter(advance, outline)) in &alphabet.letters {
            if !reasonable(*advance) {
                return Err(format!("the advance of {letter:?} is {advance}, wanted 0 to {}", 10.0 * EM));
            }
            // The outline becomes part of an SVG document.
            if let Some(other) = outline.chars().find(|c| !"MLHVCSQTAZmlhvcsqtaz0123456789.,- ".contains(*c))
            {
                return Err(format!("the outline of {letter:?} contains {other:?}, wanted SVG path data"));
            }
        }
        Ok(())
    }

    fn check_body(&self, body: &Body) -> std::result::Result<(), String> {
        self.check_origin(body.origin)?;
        let [left, top, width, height] = body.view;
        let fits = |x: f32| x.abs() <= 1e5;
        if !(fits(left) && fits(top) && fits(width) && fits(height) && width >= 1e-3 && height >= 1e-3) {
            return Err(format!(
                "the view box is {:?}, wanted left, top, width, height up to 1e5",
                body.view
            ));
        }
        Ok(())
    }

    fn check_picture(&self, picture: &Picture) -> std::result::Result<(), String> {
        let [width, height] = picture.size;
        if !(1..=MAX_CANVAS).contains(&width) || !(1..=MAX_CANVAS).contains(&height) {
            return Err(format!(
                "the canvas is {width} x {height} pixels, wanted sides of 1 to {MAX_CANVAS}"
            ));
        }
        for (what, count, most) in [
            ("items", picture.items.len(), MAX_ITEMS),
            ("captions", picture.captions.len(), MAX_TEXTS),
            ("questions", picture.questions.len(), MAX_TEXTS),
        ] {
            if count > most {
                return Err(format!("there are {count} {what}, wanted at most {most}"));
            }
        }
        for item in &picture.items {
            match item {
                Item::Icon { body, at, .. } => {
                    within("body", *body, self.bodies.len())?;
                    let inside = |start: usize, length: usize, side: usize| {
                        length >= 1 && start.checked_add(length).is_some_and(|end| end <= side)
                    };
                    if !inside(at[0], at[2], width) || !inside(at[1], at[3], height) {
                        return Err(format!("the box {at:?} is not inside {width} x {height} pixels"));
                    }
                }
                Item::Text { alphabet, text, at, em, .. } => {
                    within("alphabet", *alphabet, self.alphabets.len())?;
                    let alphabet = &self.alphabets[*alphabet];
                    let Some(length) = alphabet.length(text) else {
                        return Err(format!("the alphabet {:?} cannot spell {text:?}", alphabet.name));
                    };
                    let (scale, [x, y]) = (em / EM, *at);
                    // A comparison with a number that is not finite is false.
                    let sideways = *em >= 1.0 && x >= 0.0 && x + length * scale <= width as f32;
                    let upright =
                        y - alphabet.ascent * scale >= 0.0 && y + alphabet.descent * scale <= height as f32;
                    if !sideways || !upright {
                        return Err(format!(
                            "the text {text:?} of {em} pixels at {at:?} is not inside {width} x {height} pixels"
                        ));
                    }
                }
            }
        }
        Ok(())
    }
}

fn within(what: &str, index: usize, count: usize) -> std::result::Result<(), String> {
    match index < count {
        true => Ok(()),
        false => Err(format!("{what} {index} does not exist, there are {count}")),
    }
}

/// The lines of a file as they are decompressed.
struct Lines<'a> {
    path: &'a Path,
    text: std::io::Take<BufReader<zstd::Decoder<'static, BufReader<std::fs::File>>>>,
    number: usize,
    line: Vec<u8>,
}

impl<'a> Lines<'a> {
    fn new(path: &'a Path, file: std::fs::File) -> Result<Self> {
        let decoder = zstd::Decoder::new(file).map_err(Error::io(path))?;
        let text = BufReader::with_capacity(1 << 17, decoder).take(MAX_BYTES);
        Ok(Lines { path, text, number: 0, line: Vec::new() })
    }

    /// Reads a line without its line break; false at the end of the file.
    fn read(&mut self) -> Result<bool> {
        self.number += 1;
        self.line.clear();
        let mut text = self.text.by_ref().take(MAX_LINE as u64 + 1);
        let read = text.read_until(b'\n', &mut self.line).map_err(|e| {
            let what = match self.number {
                1 => "this is not a file of vector graphics".into(),
                n => format!("the file is damaged near line {n}"),
            };
            Error::data(self.path, format!("{what} ({e}); make it again with examples/fetch-icons.sh"))
        })?;
        if self.line.pop_if(|last| *last == b'\n').is_some() {
            return Ok(true);
        }
        let n = self.number;
        if self.line.len() > MAX_LINE {
            return Err(Error::data(self.path, format!("line {n} is longer than {} MiB", MAX_LINE >> 20)));
        }
        if self.text.limit() == 0 {
            let what = format!("holds more than {} MiB after decompression", MAX_BYTES >> 20);
            return Err(Error::data(self.path, what));
        }
        match read {
            0 => Ok(false),
            _ => Err(Error::data(self.path, format!("line {n} is cut off; make the file again"))),
        }
    }

    fn manifest(&mut self) -> Result<Manifest> {
        #[derive(Deserialize)]
        struct Start {
            format: String,
            version: u32,
        }
        if !self.read()? {
            return Err(Error::data(self.path, "this file is empty, not a file of vector graphics"));
        }
        // Read first, so that a file of another version is not called damaged.
        match serde_json::from_slice::<Start>(&self.line) {
            Ok(start) if start.format == FORMAT => {
                crate::files::check_format(self.path, start.version, VERSION..=VERSION)?;
            }
            _ => {
                let what = format!("the first line does not say {FORMAT:?}; name a file of vector graphics");
                return Err(Error::data(self.path, what));
            }
        }
        self.parse("a manifest", |_| Ok(()))
    }

    fn next<T: for<'de> Deserialize<'de>>(
        &mut self,
        what: &str,
        check: impl Fn(&T) -> std::result::Result<(), String>,
    ) -> Result<T> {
        if !self.read()? {
            let n = self.number;
            let what = format!("ends before line {n}, where {what} is announced; make the file again");
            return Err(Error::data(self.path, what));
        }
        self.parse(what, check)
    }

    fn parse<T: for<'de> Deserialize<'de>>(
        &self,
        what: &str,
        check: impl Fn(&T) -> std::result::Result<(), String>,
    ) -> Result<T> {
        let wrong = |reason: String| {
            let reason = reason.split(" at line ").next().unwrap_or_default().to_string();
            Error::data(self.path, format!("line {} is not {what}: {reason}", self.number))
        };
        let got = serde_json::from_slice(&self.line).map_err(|e| wrong(e.to_string()))?;
        check(&got).map_err(wrong)?;
        Ok(got)
    }

    fn end(&mut self) -> Result<()> {
        match self.read()? {
            false => Ok(()),
            true => {
                let what = format!("line {} comes after the last announced picture", self.number);
                Err(Error::data(self.path, what))
            }
        }
    }
}
