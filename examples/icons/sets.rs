//! The icon sets.

use std::collections::{BTreeMap, HashSet};

use ett::data::vector::{Body, Origin};

use super::names::{Emoji, Kind, Labels, key, words};
use super::{Outcome, Packages};

/// Heavier bodies are left out, in bytes: they are few and would double the size of the file.
const HEAVY: usize = 12_000;

/// Icons of one colour that have these words in their names are left out: the picture chooses the colour, and "abstract 026"
/// names nothing.
const COLOURED: [&str; 14] = [
    "white", "black", "gray", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown",
    "golden", "abstract",
];

/// How a set names its pictures.
#[derive(Clone, Copy, PartialEq)]
enum Naming {
    /// By the labels of emoji.
    Emoji,
    /// By the codes of countries.
    Country,
    /// By words joined with hyphens.
    Words,
}
use Naming::{Country, Emoji as Labelled, Words};

/// A set: its prefix, its naming, its style in words, and endings of names with other styles.
struct Set(&'static str, Naming, &'static str, &'static [(&'static str, &'static str)]);

/// All have a licence that permits changes and does not exclude commercial use. No set of logos is among them.
const SETS: [Set; 32] = [
    Set("twemoji", Labelled, "flat style", &[]),
    Set("noto", Labelled, "shaded style", &[]),
    Set("noto-v1", Labelled, "cartoon style", &[]),
    Set("fluent-emoji-flat", Labelled, "bold flat style", &[]),
    Set("fluent-emoji", Labelled, "glossy 3D style", &[]),
    Set("emojione", Labelled, "simple flat style", &[]),
    Set("fxemoji", Labelled, "muted flat style", &[]),
    Set("streamline-emojis", Labelled, "outlined cartoon style", &[]),
    Set("circle-flags", Country, "as a circle", &[]),
    Set("flag", Country, "as a rectangle", &[("1x1", "as a square"), ("4x3", "as a rectangle")]),
    Set("flagpack", Country, "as a rectangle", &[]),
    Set("cif", Country, "as a rectangle", &[]),
    Set("icon-park", Words, "thick line style", &[]),
    Set("streamline-color", Words, "blue duotone style", &[("flat", "blue flat style")]),
    Set("streamline-plump-color", Words, "plump duotone style", &[("flat", "plump flat style")]),
    Set("streamline-freehand-color", Words, "hand-drawn style", &[]),
    Set("streamline-flex-color", Words, "soft duotone style", &[("flat", "soft flat style")]),
    Set("streamline-sharp-color", Words, "angular duotone style", &[("flat", "angular flat style")]),
    Set("streamline-ultimate-color", Words, "thin line style", &[]),
    Set("streamline-cyber-color", Words, "retro line style", &[]),
    Set("streamline-kameleon-color", Words, "long shadow style", &[("duo", "two-tone style")]),
    Set("streamline-stickies-color", Words, "sticker style", &[("duo", "two-tone sticker style")]),
    Set("fluent-color", Words, "gradient style", &[]),
    Set("glyphs-poly", Words, "geometric style", &[]),
    Set("meteocons", Words, "weather map style", &[("fill", "filled weather map style")]),
    Set("marketeq", Words, "two-colored line style", &[]),
    Set("flat-color-icons", Words, "plain flat style", &[]),
    Set("flat-ui", Words, "round flat style", &[]),
    Set("game-icons", Words, "silhouette style", &[]),
    Set("ph", Words, "line style", &[("fill", "filled style"), ("duotone", "translucent style")]),
    Set("temaki", Words, "map style", &[]),
    Set("maki", Words, "map style", &[]),
];

/// The names of all sets.
pub fn prefixes() -> impl Iterator<Item = &'static str> {
    SETS.iter().map(|set| set.0)
}

/// An icon.
#[derive(Debug, Clone)]
pub struct Icon {
    pub body: Body,
    /// Its name as people write it.
    pub label: String,
    pub kind: Kind,
    pub tags: Vec<String>,
    pub style: &'static str,
    /// What decides the part that it belongs to.
    pub key: String,
    /// Whether its only colour is chosen by the picture.
    pub plain: bool,
}

/// Reads all sets, at most `limit` icons of each, and appends their origins.
pub fn read(packages: &Packages, origins: &mut Vec<Origin>, limit: usize) -> Outcome<Vec<Icon>> {
    const PACKAGE: &str = "@iconify/json";
    let labels = Labels::read(packages)?;
    let mut icons: Vec<Icon> = Vec::new();
    let mut seen = HashSet::new();
    for Set(prefix, naming, style, endings) in SETS {
        let set = packages.json(PACKAGE, &format!("json/{prefix}.json"))?;
        let info = &set["info"];
        let text = |v: &serde_json::Value| v.as_str().unwrap_or_default().to_string();
        let origin = origins.len();
        origins.push(Origin {
            name: prefix.into(),
            what: "icons".into(),
            licence: text(&info["license"]["spdx"]),
            author: text(&info["author"]["name"]),
            url: text(&info["author"]["url"]),
            ..packages.origin(PACKAGE)?
        });
        let plain = info["palette"].as_bool() == Some(false);
        let logos = logos(&set);
        let table = set["icons"].as_object().ok_or("a set has no icons")?;
        // Sorted, whatever the order of the file.
        let table: BTreeMap<&String, &serde_json::Value> = table.iter().collect();
        let before = icons.len();
        for (name, icon) in &table {
            let svg = icon["body"].as_str().unwrap_or_default();
            let hidden = icon["hidden"].as_bool() == Some(true);
            if hidden || svg.len() > HEAVY || logos.contains(name.as_str()) || icons.len() - before == limit {
                continue;
            }
            let Some((base, style)) = variant(prefix, name, style, endings) else { continue };
            if is_copy(name, &table) || is_logo(base) {
                continue;
            }
            let emoji = match naming {
                Labelled => labels.emoji(base),
                Country => labels.country(base),
                Words => Some(Emoji { label: words(base), kind: Kind::Icon, tags: Vec::new() }),
            };
            let Some(Emoji { label, kind, tags }) = emoji else { continue };
            let side = |key: &str, otherwise: f64| {
                icon[key].as_f64().or(set[key].as_f64()).unwrap_or(otherwise) as f32
            };
            let view = [side("left", 0.0), side("top", 0.0), side("width", 16.0), side("height", 16.0)];
            // Parts that move would lie where no moment of the animation shows them.
            if svg.contains("<animate") || svg.contains("<marker") || !seen.insert(svg.to_string()) {
                continue;
            }
            let plain = plain && !svg.contains('#');
            if plain && label.split(' ').any(|w| COLOURED.contains(&w)) {
                continue;
            }
            icons.push(Icon {
                body: Body { name: name.to_string(), origin, view, svg: svg.into() },
                key: key(&label, kind),
                label,
                kind,
                tags,
                style,
                plain,
            });
        }
    }
    Ok(icons)
}

/// The name without the ending of its variant, and the style; `None` for variants that are left out.
fn variant<'a>(
    prefix: &str,
    name: &'a str,
    style: &'static str,
    endings: &[(&str, &'static str)],
) -> Option<(&'a str, &'static str)> {
    let (base, ending) = name.rsplit_once('-').unwrap_or((name, ""));
    match prefix {
        // Weights of lines that differ little from the regular one.
        "ph" if ["thin", "light", "bold"].contains(&ending) => return None,
        // The same drawing in several sizes.
        "fluent-color" if ["16", "20", "24", "28"].contains(&ending) => return None,
        "fluent-color" if ["32", "48"].contains(&ending) => return Some((base, style)),
        _ => {}
    }
    match endings.iter().find(|(e, _)| *e == ending) {
        Some((_, style)) => Some((base, style)),
        None => Some((name, style)),
    }
}

/// Whether an icon is another one in another colour of the skin, of which a set has five.
fn is_copy(name: &str, table: &BTreeMap<&String, &serde_json::Value>) -> bool {
    let tones = ["-light", "-medium-light", "-medium", "-medium-dark", "-dark"];
    let of = |tone: &str| name.strip_suffix(tone).map(str::to_string);
    name.contains("skin-tone")
        || (1..=5).any(|i| name.ends_with(&format!("-tone{i}")))
        || tones.iter().filter_map(|t| of(t)).any(|base| {
            // All five, so that a "heart" with a "heart-dark" is no copy.
            tones.iter().all(|t| table.contains_key(&format!("{base}{t}")))
        })
}

/// Names in the categories of logos.
fn logos(set: &serde_json::Value) -> HashSet<&str> {
    let categories = set["categories"].as_object().into_iter().flatten();
    categories
        .filter(|(category, _)| ["Brand", "Logos"].contains(&category.as_str()))
        .flat_map(|(_, names)| names.as_array().into_iter().flatten().filter_map(|n| n.as_str()))
        .collect()
}

/// Logos outside of such categories.
fn is_logo(name: &str) -> bool {
    const BRANDS: [&str; 46] = [
        "logo",
        "brand",
        "google",
        "xbox",
        "playstation",
        "amazon",
        "android",
        "apple",
        "facebook",
        "twitter",
        "x",
        "instagram",
        "youtube",
        "linkedin",
        "github",
        "gitlab",
        "microsoft",
        "windows",
        "linux",
        "debian",
        "icons8",
        "whatsapp",
        "telegram",
        "tiktok",
        "pinterest",
        "paypal",
        "visa",
        "mastercard",
        "spotify",
        "discord",
        "slack",
        "figma",
        "skype",
        "snapchat",
        "reddit",
        "dribbble",
        "behance",
        "medium",
        "netflix",
        "openai",
        "chatgpt",
        "adobe",
        "ios",
        "ipados",
        "wechat",
        "messenger",
    ];
    let fruit = ["red-apple", "green-apple", "pineapple"].contains(&name);
    !fruit && name.split('-').any(|w| BRANDS.contains(&w))
}
