//! From names to words: labels, phrases and the choice of what is held out.

use std::collections::HashMap;

use ett::data::Split;
use ett::rng::Philox;

use super::{Outcome, Packages, SEED};

/// One name, and one word, in this many is held out.
pub const HELD_OUT: u32 = 10;

/// What kind of thing an icon shows, which decides how sentences speak of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A thing, a being or a face.
    Thing,
    /// A sign.
    Symbol,
    /// The flag of a country.
    Flag,
    /// An icon of a user interface or a map.
    Icon,
}

/// What an emoji is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Emoji {
    pub label: String,
    pub kind: Kind,
    pub tags: Vec<String>,
}

/// The labels of all emoji, by their letters and digits alone.
pub struct Labels {
    known: HashMap<String, Emoji>,
    countries: HashMap<String, String>,
}

impl Labels {
    pub fn read(packages: &Packages) -> Outcome<Self> {
        let data = packages.json("emojibase-data", "en/data.json")?;
        let mut all = Labels { known: HashMap::new(), countries: HashMap::new() };
        for entry in data.as_array().ok_or("emojibase-data is not a list")? {
            let text = |key: &str| entry[key].as_str().unwrap_or_default();
            let label = text("label").replace('’', "'").replace(" (blood type)", "");
            let plain = squashed(text("label"));
            let tags = entry["tags"].as_array().into_iter().flatten();
            let tags = tags.filter_map(|t| t.as_str()).map(|t| t.replace('’', "'")).collect();
            let (label, kind) = match label.split_once(": ") {
                Some(("flag", country)) => {
                    if let Some(code) = code(text("hexcode")) {
                        all.countries.insert(code, country.into());
                    }
                    (country.to_string(), Kind::Flag)
                }
                // Who is in a family or a couple is a matter of details that no picture shows alike.
                Some(("family" | "kiss" | "couple with heart" | "keycap", _)) => continue,
                Some((who, how)) => (format!("{who} ({how})"), Kind::Thing),
                None if entry["group"].as_u64() == Some(8) => (label, Kind::Symbol),
                None => (label, Kind::Thing),
            };
            all.known.insert(plain, Emoji { label, kind, tags });
        }
        Ok(all)
    }

    /// The emoji that an icon set calls `name`.
    pub fn emoji(&self, name: &str) -> Option<Emoji> {
        let name = name.strip_prefix("flag-for-flag-").map_or(name.into(), |n| format!("flag-{n}"));
        let name = name.strip_prefix("flag-for-").map_or(name.clone(), |n| format!("flag-{n}"));
        let name = name.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches('-');
        let plain = squashed(name);
        self.known.get(&plain).or_else(|| self.known.get(&format!("flag{plain}"))).cloned()
    }

    /// The country with a code of two letters.
    pub fn country(&self, code: &str) -> Option<Emoji> {
        let label = self.countries.get(code)?.clone();
        Some(Emoji { label, kind: Kind::Flag, tags: Vec::new() })
    }
}

/// The country code spelled by the code points of a flag.
fn code(hex: &str) -> Option<String> {
    let letter = |h: &str| {
        let at = u32::from_str_radix(h, 16).ok()?.checked_sub(0x1F1E6)?;
        char::from_digit(at + 10, 36)
    };
    let letters: Option<String> = hex.split('-').map(letter).collect();
    letters.filter(|l| l.len() == 2)
}

/// Letters and digits alone, in lower case.
fn squashed(text: &str) -> String {
    text.to_lowercase().chars().filter(char::is_ascii_alphanumeric).collect()
}

/// A name of a user interface as words: without the number that tells variants apart.
pub fn words(name: &str) -> String {
    let mut words: Vec<&str> = name.split('-').filter(|w| !w.is_empty()).collect();
    while words.len() > 1 {
        let last = words[words.len() - 1];
        let variant = ["one", "two", "three", "four", "five", "six", "alt"].contains(&last)
            || last.bytes().all(|b| b.is_ascii_digit());
        if !variant {
            break;
        }
        words.pop();
    }
    let words = words.join(" ");
    match words.trim_end_matches(|c: char| c.is_ascii_digit()) {
        "" => words,
        cut => cut.trim_end().into(),
    }
}

/// What decides the part that an icon belongs to: its name without plurals, and without what tells near copies apart,
/// such as a man from a woman who do the same.
pub fn key(label: &str, kind: Kind) -> String {
    let mut words: Vec<String> = label
        .to_lowercase()
        .split(|c: char| !c.is_alphanumeric())
        .filter(|w| !w.is_empty())
        .map(|w| match w {
            "man" | "men" | "woman" | "women" | "people" | "girl" | "boy" => "person".into(),
            w if w.len() > 3 && !w.ends_with("ss") => w.trim_end_matches('s').into(),
            w => w.to_string(),
        })
        .collect();
    if kind == Kind::Flag {
        words.insert(0, "flag".into());
    }
    words.join(" ")
}

/// The part that a key or a word belongs to, by a fixed hash of its letters.
pub fn split(text: &str) -> Split {
    let hash = text
        .bytes()
        .fold(0xCBF2_9CE4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3));
    match Philox::at(SEED, 1, hash)[0] % HELD_OUT {
        0 => Split::Test,
        _ => Split::Train,
    }
}

/// With its article: "a cat", "the flag of Chad", "an alarm clock icon".
pub fn phrase(label: &str, kind: Kind) -> String {
    /// Words that need no article.
    const MASS: [&str; 26] = [
        "bread",
        "rice",
        "bacon",
        "honey",
        "salt",
        "butter",
        "soap",
        "water",
        "money",
        "spaghetti",
        "sushi",
        "tofu",
        "ice",
        "fog",
        "thread",
        "yarn",
        "garlic",
        "broccoli",
        "popcorn",
        "wood",
        "corn",
        "luggage",
        "clothing",
        "people",
        "men",
        "women",
    ];
    /// Last words of signs that are things.
    const FORMS: [&str; 20] = [
        "button", "arrow", "circle", "square", "diamond", "triangle", "mark", "cross", "star", "heart",
        "sign", "symbol", "box", "badge", "emblem", "dash", "loop", "asterisk", "control", "claim",
    ];
    let words: Vec<&str> = label.split(' ').collect();
    let (first, last) = (words[0], words[words.len() - 1]);
    // "slice of pizza" is about the slice.
    let head = label.split(" with ").next().unwrap_or(label).split(" of ").next().unwrap_or(label);
    let head = head.split(' ').next_back().unwrap_or(last);
    let many = head.ends_with('s') && !["ss", "us", "is"].iter().any(|end| head.ends_with(end));
    let bare = many || MASS.contains(&head) || ["men", "women", "people"].contains(&first);
    match kind {
        Kind::Flag => match label {
            l if ["United", "Philippines", "Netherlands", "Bahamas", "Maldives", "Comoros"]
                .iter()
                .any(|w| l.starts_with(w))
                || l.ends_with("Islands") =>
            {
                format!("the flag of the {l}")
            }
            l => format!("the flag of {l}"),
        },
        Kind::Icon => with_article(&format!("{label} icon")),
        Kind::Symbol if !FORMS.contains(&last) && !many => format!("the {label} symbol"),
        _ if bare => label.into(),
        _ => with_article(label),
    }
}

/// With "a" or "an".
pub fn with_article(text: &str) -> String {
    let sound = text.to_lowercase();
    let first = sound.split([' ', '-']).next().unwrap_or_default();
    // Letters that are read by their names, and words whose first sound is not their first letter.
    let by_name = first.len() == 1 && "aefhilmnorsx".contains(first);
    let vowel = sound.starts_with(['a', 'e', 'i', 'o', 'u']) && first.len() != 1;
    let consonant = ["uni", "use", "usb", "eu", "one", "uk", "ut"].iter().any(|s| first.starts_with(s))
        && !["unin", "unim"].iter().any(|s| first.starts_with(s));
    let silent = ["hour", "honest", "heir"].iter().any(|s| first.starts_with(s));
    match by_name || silent || (vowel && !consonant) {
        true => format!("an {text}"),
        false => format!("a {text}"),
    }
}
