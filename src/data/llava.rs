//! Conversations about pictures in JSON, as LLaVA, ShareGPT4V and LLaVA-OneVision write them.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::cache::Skipped;
use super::conversation::chat;
use super::folder::{Files, is_inside};
use super::json;
use super::plain::read_text;
use super::sample::Sample;
use super::source::{DataSource, Listed, Wanted};
use crate::error::{Error, Result};
use crate::files::parent;

const WANTED: &str = "wanted a list of {\"image\": \"...\", \"conversations\": [{\"from\": \"human\", \"value\": \"...\"}, \
                      {\"from\": \"gpt\", \"value\": \"...\"}]}, as one array or one in each line";

/// Conversations in a JSON file.
pub(super) struct FromLlava;

impl DataSource for FromLlava {
    fn name(&self) -> &'static str {
        "llava"
    }

    fn open(&self, part: &Wanted) -> Result<Listed> {
        let path = part.path.unwrap_or(Path::new(""));
        let root = part.images.unwrap_or(parent(path)).to_path_buf();
        let (mut samples, mut ignored) = (Vec::new(), Skipped::default());
        json::each(path, &read_text(path)?, WANTED, &mut |number, value| {
            match entry(&root, &value) {
                Ok(sample) => samples.push(sample),
                Err(Unusable::Ignored(why)) => ignored.add(path, format!("entry {number}: {why}")),
                Err(Unusable::Wrong(what)) => {
                    return Err(Error::data(path, format!("entry {number}: {what}")));
                }
            }
            Ok(())
        })?;
        if samples.is_empty() {
            let found = match ignored.count {
                0 => String::new(),
                n => format!(" among {n} entries ({})", ignored.names()),
            };
            return Err(Error::data(path, format!("no usable conversations found{found}; {WANTED}")));
        }
        let pictures = Box::new(Files::new(&root, &samples));
        Ok(Listed { root, samples, pictures, ignored, about: Vec::new() })
    }
}

/// Why an entry is no sample.
enum Unusable {
    Ignored(String),
    Wrong(String),
}

fn entry(root: &Path, value: &Value) -> std::result::Result<Sample, Unusable> {
    let Some(turns) = first(value, ["conversations", "messages"]) else {
        return Err(Unusable::Ignored("it has neither conversations nor messages".into()));
    };
    let image = picture(value).map_err(Unusable::Ignored)?;
    let talk = chat(turns).map_err(Unusable::Ignored)?;
    let image = match image {
        Some(name) if is_inside(name) => root.join(name),
        Some(name) => {
            let what =
                format!("image {name:?} is not a path inside {}; move the picture there", root.display());
            return Err(Unusable::Wrong(what));
        }
        None if talk.shown => return Err(Unusable::Ignored("it shows <image>, but names no picture".into())),
        None => PathBuf::new(),
    };
    Ok(Sample { image, chats: vec![talk.chat], ..Sample::default() })
}

/// The value of the first of two keys that is there and not null.
fn first<'a>(value: &'a Value, keys: [&str; 2]) -> Option<&'a Value> {
    keys.iter().filter_map(|key| value.get(key)).find(|v| !v.is_null())
}

/// The name of the picture, if there is one.
fn picture(value: &Value) -> std::result::Result<Option<&str>, String> {
    match first(value, ["image", "images"]) {
        None => Ok(None),
        Some(Value::String(name)) => Ok(Some(name)),
        Some(Value::Array(names)) => match &names[..] {
            [] => Ok(None),
            [Value::String(name)] => Ok(Some(name)),
            [_] => Err("its image is not a file name".into()),
            all => Err(format!("it has {} pictures, wanted one", all.len())),
        },
        Some(_) => Err("its image is not a file name".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::draw::Split;
    use crate::data::image::Image;
    use crate::data::sample::Chat;
    use crate::data::scratch::Scratch;
    use crate::data::{Columns, save_png};

    fn open(path: &Path, images: Option<&Path>) -> Result<Listed> {
        let columns = Columns::default();
        let part =
            Wanted { split: Split::Train, path: Some(path), images, columns: &columns, samples: 0, size: 0 };
        FromLlava.open(&part)
    }

    const TWO: &str = r#"[{"id": 1, "image": "coco/a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]},
        {"id": "b", "image": NaN, "conversations": [
        {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]"#;

    #[test]
    fn pictures_and_conversations_are_listed() {
        let dir = Scratch::new("llava");
        std::fs::create_dir_all(dir.path("pics/coco")).unwrap();
        let pixels = Image::from_u8(2, 3, &[9; 18]).unwrap();
        save_png(dir.path("pics/coco/a.png"), &pixels).unwrap();
        dir.write("a.json", TWO.as_bytes());
        let listed = open(&dir.path("a.json"), Some(&dir.path("pics"))).unwrap();
        assert_eq!(listed.samples.len(), 2);
        assert_eq!(listed.samples[0].image, dir.path("pics/coco/a.png"));
        let turns = &listed.samples[0].chats[0].turns;
        assert_eq!((turns.len(), turns[0].0.as_str()), (2, "What is it?"));
        assert_eq!(
            (listed.samples[1].has_picture(), &listed.samples[1].chats[..]),
            (false, &[Chat::of("Hi", "Hello")][..])
        );
        let bitmap = listed.pictures.decode(0, 8).unwrap();
        assert_eq!((bitmap.height, bitmap.width, bitmap.rgb), (2, 3, vec![9; 18]));
        assert!(listed.pictures.decode(1, 8).is_err());
        // Without a folder of their own, pictures are beside the file.
        assert_eq!(open(&dir.path("a.json"), None).unwrap().samples[0].image, dir.path("coco/a.png"));
    }

    #[test]
    fn lines_do_as_well_as_an_array() {
        let dir = Scratch::new("llava-lines");
        let lines = [
            r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "images": ["x.jpg"]}"#,
            r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "image": []}"#,
        ];
        dir.write("a.jsonl", format!("\u{feff}{}\r\n\n", lines.join("\r\n")).as_bytes());
        let listed = open(&dir.path("a.jsonl"), None).unwrap();
        assert_eq!(listed.samples[0].image, dir.path("x.jpg"));
        assert_eq!(listed.samples[0].chats[0].system.as_deref(), Some("s"));
        assert!(!listed.samples[1].has_picture());
    }

    #[test]
    fn a_key_that_is_null_does_not_hide_the_other_name() {
        let value = serde_json::json!({"image": null, "images": ["1.png"], "conversations": null,
            "messages": [{"user": "q", "assistant": "a"}]});
        let Ok(sample) = entry(Path::new("p"), &value) else { panic!("it is not used") };
        assert_eq!((sample.image.as_path(), sample.chats), (Path::new("p/1.png"), vec![Chat::of("q", "a")]));
    }

    #[test]
    fn what_is_not_usable_is_counted_with_its_reason() {
        let dir = Scratch::new("llava-ignored");
        let good = r#"[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]"#;
        let shown = r#"[{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]"#;
        let bad = r#"[{"from": "gpt", "value": "a"}]"#;
        let lines = [
            format!(r#"{{"image": "a.png", "conversations": {good}}}"#),
            format!(r#"{{"image": ["a.png", "b.png"], "conversations": {good}}}"#),
            format!(r#"{{"image": 3, "conversations": {good}}}"#),
            format!(r#"{{"conversations": {shown}}}"#),
            format!(r#"{{"image": "a.png", "conversations": {bad}}}"#),
            r#"{"image": "a.png", "text": "a"}"#.to_string(),
        ];
        dir.write("a.jsonl", lines.join("\n").as_bytes());
        let listed = open(&dir.path("a.jsonl"), None).unwrap();
        assert_eq!((listed.samples.len(), listed.ignored.count), (1, 5));
        let names = listed.ignored.names();
        for want in [
            "a.jsonl: entry 2: it has 2 pictures, wanted one",
            "entry 3: its image is not a file name",
            "entry 4: it shows <image>, but names no picture",
            "entry 5: the conversation begins with an answer",
            "entry 6: it has neither conversations nor messages",
        ] {
            assert!(names.contains(want), "{names}\nwanted {want}");
        }
        dir.write("a.jsonl", lines[5].as_bytes());
        let e = open(&dir.path("a.jsonl"), None).unwrap_err().to_string();
        assert!(
            e.contains("no usable conversations found among 1 entries (") && e.contains("wanted a list of"),
            "{e}"
        );
    }

    #[test]
    fn errors_name_the_entry_or_the_place() {
        let dir = Scratch::new("llava-errors");
        for name in ["../a.png", "/etc/passwd", "a/../../b.png", ""] {
            let value =
                serde_json::json!([{"image": name, "conversations": [{"user": "q", "assistant": "a"}]}]);
            dir.write("a.json", value.to_string().as_bytes());
            let e = open(&dir.path("a.json"), None).unwrap_err().to_string();
            assert!(e.contains("a.json: entry 1: image ") && e.contains("is not a path inside"), "{e}");
        }
        for cut in 0..TWO.len() {
            dir.write("a.json", &TWO.as_bytes()[..cut]);
            let e = open(&dir.path("a.json"), None).unwrap_err().to_string();
            assert!(e.contains("a.json: line ") || e.contains("no usable conversations"), "{e}");
        }
        assert!(open(&dir.path("none.json"), None).unwrap_err().to_string().contains("none.json: "));
    }
}
