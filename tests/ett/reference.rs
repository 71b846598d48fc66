//! The page of all configuration keys, `docs/configuration.md`, agrees with the source.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

use ett::config::{Config, StageConfig};

use crate::common::Outcome;

const PAGE: &str = "docs/configuration.md";
/// Source files of the types of configuration values.
const SOURCES: [&str; 3] = ["src/config.rs", "src/data/image.rs", "src/data/source.rs"];
const AGAIN: &str = "ETT_WRITE_REFERENCE=1 cargo test --release --test ett reference";

/// A field of a struct or a variant of an enum.
#[derive(Debug, Default, PartialEq)]
struct Item {
    name: String,
    /// Empty for a variant.
    ty: String,
    doc: String,
    attributes: String,
}

/// The public structs and enums of a source file by name, with their items. The source is formatted by rustfmt.
fn types(source: &str) -> BTreeMap<String, Vec<Item>> {
    let mut all = BTreeMap::new();
    let mut inside: Option<(String, Vec<Item>)> = None;
    let (mut doc, mut attributes, mut above) = (Vec::new(), String::new(), String::new());
    for line in source.lines() {
        let text = line.trim();
        let opens =
            ["pub struct ", "pub enum "].iter().find_map(|k| line.strip_prefix(k)?.strip_suffix(" {"));
        if let Some(line) = text.strip_prefix("///") {
            doc.push(line.trim());
            continue;
        } else if text.starts_with("#[") {
            attributes += text;
            continue;
        } else if let Some(name) = opens {
            inside = Some((name.into(), Vec::new()));
            above = attributes.clone();
        } else if line == "}" {
            all.extend(inside.take());
        } else if let (Some((_, items)), Some(item)) = (&mut inside, text.strip_suffix(',')) {
            let (name, ty) = match item.strip_prefix("pub ").and_then(|f| f.split_once(": ")) {
                Some((name, ty)) => (name.to_string(), ty.to_string()),
                None => (renamed(item, &above), String::new()),
            };
            items.push(Item { name, ty, doc: doc.join(" "), attributes: attributes.clone() });
        }
        doc.clear();
        attributes.clear();
    }
    all
}

/// The name of a variant in files, by the `rename_all` of its enum.
fn renamed(variant: &str, attributes: &str) -> String {
    let separator = if attributes.contains("snake_case") {
        "_"
    } else if attributes.contains("kebab-case") {
        "-"
    } else if attributes.contains("lowercase") {
        ""
    } else {
        return variant.into();
    };
    let mut out = String::new();
    for c in variant.chars() {
        if c.is_uppercase() && !out.is_empty() {
            out += separator;
        }
        out.extend(c.to_lowercase());
    }
    out
}

/// The defaults of a stage when only the required keys are given, and the required keys.
fn stage_defaults(all: &BTreeMap<String, Vec<Item>>) -> Result<toml::Table, Box<dyn std::error::Error>> {
    let mut given = toml::Table::new();
    for item in &all["StageConfig"] {
        if item.attributes.contains("default") || item.ty.starts_with("Option<") {
            continue;
        }
        let value = match item.ty.as_str() {
            "usize" | "u64" => toml::Value::Integer(1),
            "f64" => toml::Value::Float(1.0),
            "bool" => toml::Value::Boolean(false),
            "String" => toml::Value::String(String::new()),
            ty => {
                let first = all
                    .get(ty)
                    .and_then(|v| v.first())
                    .ok_or_else(|| format!("no value of {ty} is known"))?;
                toml::Value::String(first.name.clone())
            }
        };
        given.insert(item.name.clone(), value);
    }
    let stage: StageConfig = given.clone().try_into()?;
    let mut defaults = toml::Table::try_from(&stage)?;
    defaults.retain(|key, _| !given.contains_key(key));
    Ok(defaults)
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

fn page(all: &BTreeMap<String, Vec<Item>>) -> Result<String, Box<dyn std::error::Error>> {
    let defaults: toml::Table = toml::from_str(&toml::to_string(&Config::default())?)?;
    let stage = stage_defaults(all)?;
    let mut out = format!(
        "# Configuration\n\n\
         A TOML file configures a run. Omitted keys have the defaults below, and unknown keys are errors.\n\
         `--set section.key=value` overrides a key (`--set stage.0.steps=10` in a list). Relative paths in the file are\n\
         relative to its folder, those of `--set` to the working directory.\n\n\
         This page is generated from the comments in `src/config.rs`:\n\n```\n{AGAIN}\n```\n"
    );
    for section in &all["Config"] {
        if let Some(value) = defaults.get(&section.name).filter(|v| !v.is_table() && !v.is_array()) {
            documented(&section.name, section)?;
            write!(out, "\n## `{}`\n\n{} Default: `{value}`.\n", section.name, section.doc)?;
            continue;
        }
        let (name, list) = (&section.name, section.ty.strip_prefix("Vec<").and_then(|t| t.strip_suffix('>')));
        let values = match list {
            Some(_) => &stage,
            None => defaults
                .get(name)
                .and_then(|v| v.as_table())
                .ok_or_else(|| format!("[{name}] has no defaults"))?,
        };
        let title = if list.is_some() { format!("[[{name}]]") } else { format!("[{name}]") };
        let items = all
            .get(list.unwrap_or(&section.ty))
            .ok_or_else(|| format!("no struct {} is known", section.ty))?;
        documented(name, section)?;
        write!(out, "\n## `{title}`\n\n{}\n\n", section.doc)?;
        table(&mut out, all, name, items, values)?;
    }
    Ok(out)
}

/// The table of a section, followed by those of its subsections with user-defined names.
fn table(
    out: &mut String,
    all: &BTreeMap<String, Vec<Item>>,
    section: &str,
    items: &[Item],
    defaults: &toml::Table,
) -> Outcome {
    out.push_str("| key | default | meaning |\n| --- | --- | --- |\n");
    let inside = |ty: &str, of: &str| ty.strip_prefix(of).and_then(|t| t.strip_suffix('>')).map(String::from);
    for item in items {
        let key = format!("{section}.{}", item.name);
        documented(&key, item)?;
        let optional = inside(&item.ty, "Option<");
        let default = match defaults.get(&item.name) {
            Some(value) => format!("`{value}`"),
            None if optional.is_some() || item.attributes.contains("default") => "none".into(),
            None => "required".into(),
        };
        let mut meaning = cell(&item.doc);
        for value in all.get(optional.as_ref().unwrap_or(&item.ty)).into_iter().flatten() {
            documented(&format!("{key} = {}", value.name), value)?;
            write!(meaning, "<br>`{}`: {}", value.name, cell(&value.doc))?;
        }
        writeln!(out, "| `{}` | {} | {meaning} |", item.name, cell(&default))?;
    }
    if let Some(unknown) = defaults.keys().find(|k| items.iter().all(|i| i.name != **k)) {
        return Err(format!("{section}.{unknown} is written to files, but not found in the source").into());
    }
    for item in items {
        if let Some(named) = inside(&item.ty, "BTreeMap<String, ").and_then(|ty| all.get(&ty)) {
            write!(out, "\n### `[{section}.{}.NAME]`\n\n{}\n\n", item.name, item.doc)?;
            table(out, all, &format!("{section}.{}.NAME", item.name), named, &toml::Table::new())?;
        }
    }
    Ok(())
}

fn documented(key: &str, item: &Item) -> Result<(), String> {
    match item.doc.is_empty() {
        true => Err(format!("{key} has no comment in the source; add one that says what it means")),
        false => Ok(()),
    }
}

fn sources() -> BTreeMap<String, Vec<Item>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| fs::read_to_string(root.join(path)).expect("the source is there");
    SOURCES.iter().flat_map(|path| types(&read(path))).collect()
}

#[test]
fn the_page_of_all_keys_is_up_to_date() -> Outcome {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(PAGE);
    let want = page(&sources())?;
    if env::var_os("ETT_WRITE_REFERENCE").is_some() {
        fs::write(&path, &want)?;
    }
    let got = fs::read_to_string(&path).unwrap_or_default();
    let line = |text: &str| text.lines().zip(want.lines()).take_while(|(a, b)| a == b).count() + 1;
    assert!(
        got == want,
        "{PAGE} is not what src/config.rs says, from line {} on; run\n  {AGAIN}",
        line(&got)
    );
    Ok(())
}

#[test]
fn keys_and_values_without_a_comment_are_found() -> Outcome {
    for (key, says) in [("lr", "has no comment"), ("kind", "has no comment")] {
        let mut all = sources();
        let item = all.values_mut().flatten().find(|i| i.name == key).ok_or("the key is there")?;
        item.doc.clear();
        let e = page(&all).expect_err("a missing comment").to_string();
        assert!(e.contains(&format!(".{key} ")) && e.contains(says), "{e}");
    }
    let mut all = sources();
    all.get_mut("Source").ok_or("an enum")?[1].doc.clear();
    let e = page(&all).expect_err("a missing comment").to_string();
    assert!(e.contains("data.source = webdataset has no comment"), "{e}");
    let mut all = sources();
    all.get_mut("DataConfig").ok_or("a struct")?.retain(|i| i.name != "flip");
    assert!(page(&all).expect_err("a missing key").to_string().contains("data.flip is written"));
    Ok(())
}

#[test]
fn sections_of_free_names_have_tables_of_their_own() -> Outcome {
    let source = "pub struct One {\n    /// Rate.\n    pub lr: Option<f64>,\n}\npub struct All {\n    /// Rates.\n    \
                  #[serde(default)]\n    pub groups: BTreeMap<String, One>,\n    /// Steps.\n    pub steps: usize,\n}\n";
    let (all, mut out) = (types(source), String::new());
    table(&mut out, &all, "stage", &all["All"], &toml::Table::new())?;
    let head = "| key | default | meaning |\n| --- | --- | --- |\n";
    let want = format!(
        "{head}| `groups` | none | Rates. |\n| `steps` | required | Steps. |\n\n\
         ### `[stage.groups.NAME]`\n\nRates.\n\n{head}| `lr` | none | Rate. |\n"
    );
    assert_eq!(out, want);
    Ok(())
}

#[test]
fn sources_are_read_as_they_are_formatted() {
    let source = "/// Not this.\npub fn f() {\n}\n\n#[serde(rename_all = \"snake_case\")]\npub enum TwoWords {\n    /// One,\n    /// two.\n    \
                  BothOfThem,\n    Bare,\n}\npub struct S {\n    /// A | b.\n    #[serde(default)]\n    pub a: [f64; 2],\n}\n";
    let all = types(source);
    let item = |name: &str, ty: &str, doc: &str, attributes: &str| Item {
        name: name.into(),
        ty: ty.into(),
        doc: doc.into(),
        attributes: attributes.into(),
    };
    assert_eq!(all["TwoWords"], [item("both_of_them", "", "One, two.", ""), item("bare", "", "", "")]);
    assert_eq!(all["S"], [item("a", "[f64; 2]", "A | b.", "#[serde(default)]")]);
    assert_eq!(cell("A | b."), "A \\| b.");
}
