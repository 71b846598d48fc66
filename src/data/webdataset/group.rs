//! From the members of a shard to samples.

use std::collections::{BTreeMap, HashSet};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::super::bitmap::MAX_BYTES;
use super::super::conversation::{self, Talk};
use super::super::folder::parse;
use super::super::sample::Chat;
use super::super::texts::{ChatLine, chats, joined, said};
use super::index::Listing;
use super::tar::{Member, lossy};

/// Extensions of pictures.
const PICTURES: [&str; 5] = ["jpg", "jpeg", "png", "webp", "gif"];
/// Maximum size of a member that holds texts.
const MAX_TEXT: u64 = 16 << 20;
/// Extensions that are counted by name.
const MAX_KINDS: usize = 32;
/// Ignored members that are named.
const NAMED: usize = 5;

/// The samples of a shard so far.
#[derive(Default)]
pub(super) struct Groups {
    pub samples: Vec<Listing>,
    pub ignored: usize,
    pub first: Vec<(String, String)>,
    pub unknown: BTreeMap<String, usize>,
    open: Option<Group>,
    /// The keys of complete groups.
    seen: HashSet<Vec<u8>>,
}

/// Members with the same key that follow each other.
#[derive(Default)]
struct Group {
    key: Vec<u8>,
    picture: Option<Member>,
    txt: Option<String>,
    caption: Option<String>,
    json: Option<Texts>,
    /// The first member with texts.
    text: Option<String>,
}

/// The texts of a JSON object.
#[derive(Default)]
struct Texts {
    captions: Vec<String>,
    prompt: Option<String>,
    chats: Vec<Chat>,
    text_only: bool,
    /// Whether its conversation shows a picture.
    shown: bool,
    /// What cannot be used.
    wrong: Vec<String>,
}

impl Groups {
    /// Counts a member that is not used, unless there is no reason to.
    pub fn ignore(&mut self, name: &str, why: impl Into<String>) {
        let why = why.into();
        if why.is_empty() {
            return;
        }
        self.ignored += 1;
        if self.first.len() < NAMED {
            self.first.push((name.into(), why));
        }
    }

    /// Adds a member; `content` reads it, which happens for texts only.
    pub fn member(
        &mut self,
        member: Member,
        content: impl FnOnce(&Member) -> std::io::Result<Vec<u8>>,
    ) -> std::io::Result<()> {
        let base = member.name.iter().rposition(|&b| b == b'/').map_or(0, |slash| slash + 1);
        let dot = member.name[base..].iter().position(|&b| b == b'.');
        let Some(dot) = dot.filter(|&dot| dot > 0) else {
            // Hidden files, such as those that macOS adds, and names without an extension have no key.
            self.count(if dot.is_some() { "hidden" } else { "no extension" });
            return Ok(());
        };
        let key = &member.name[..base + dot];
        let extension = lossy(&member.name[base + dot + 1..]).to_lowercase();
        if self.open.as_ref().is_none_or(|g| g.key != key) {
            self.close();
            self.open = Some(Group { key: key.to_vec(), ..Group::default() });
        }
        let is_picture = PICTURES.contains(&extension.as_str());
        if !is_picture && !matches!(extension.as_str(), "txt" | "caption" | "json") {
            self.count(&extension);
            return Ok(());
        }
        let name = lossy(&member.name);
        let Some(group) = &mut self.open else { return Ok(()) };
        let taken = match extension.as_str() {
            "txt" => group.txt.is_some(),
            "caption" => group.caption.is_some(),
            "json" => group.json.is_some(),
            _ => group.picture.is_some(),
        };
        if taken {
            let what = if is_picture { "a picture" } else { "such a member" };
            self.ignore(&name, format!("its sample has {what} already"));
            return Ok(());
        }
        if is_picture {
            match member.bytes <= MAX_BYTES {
                true => group.picture = Some(member),
                false => self.ignore(&name, format!("this picture has more than {} MiB", MAX_BYTES >> 20)),
            }
            return Ok(());
        }
        group.text.get_or_insert_with(|| name.clone());
        if member.bytes > MAX_TEXT {
            self.ignore(&name, format!("this text has more than {} MiB", MAX_TEXT >> 20));
            return Ok(());
        }
        let text = match String::from_utf8(content(&member)?) {
            Ok(text) if !text.contains('\0') => text,
            Ok(_) => {
                self.ignore(&name, "this holds a NUL byte, so it is not text");
                return Ok(());
            }
            Err(_) => {
                self.ignore(&name, "this is not UTF-8 text");
                return Ok(());
            }
        };
        match extension.as_str() {
            "txt" => group.txt = Some(text),
            "caption" => group.caption = Some(text),
            _ => {
                let mut texts = Texts::of(&text);
                let wrong = std::mem::take(&mut texts.wrong);
                group.json = Some(texts);
                wrong.into_iter().for_each(|why| self.ignore(&name, why));
            }
        }
        Ok(())
    }

    /// Everything, after the last member.
    pub fn finish(mut self) -> Self {
        self.close();
        self
    }

    fn count(&mut self, extension: &str) {
        let known = self.unknown.len() < MAX_KINDS || self.unknown.contains_key(extension);
        *self.unknown.entry(if known { extension.into() } else { "others".into() }).or_default() += 1;
    }

    /// Makes a sample of the open group.
    fn close(&mut self) {
        let Some(Group { key, picture, txt, caption, json, text }) = self.open.take() else { return };
        let again = !self.seen.insert(key);
        let json = json.unwrap_or_default();
        if picture.is_none() && !json.text_only {
            if let Some(name) = text {
                self.ignore(&name, match again {
                    true => "the other members of its sample are elsewhere in the shard; sort the members by name",
                    false => "its sample has no picture",
                });
            }
            return;
        }
        if picture.is_none() && json.shown {
            let name = text.unwrap_or_default();
            return self.ignore(&name, "its conversation shows <image>, but its sample has no picture");
        }
        let captions = joined([txt, caption].into_iter().filter_map(said).collect(), json.captions);
        let at = picture.unwrap_or(Member { name: Vec::new(), offset: 0, bytes: 0, header: 0 });
        self.samples.push(Listing {
            name: lossy(&at.name),
            offset: at.offset,
            bytes: at.bytes,
            header: at.header,
            captions,
            prompt: json.prompt,
            chats: json.chats.iter().map(ChatLine::from).collect(),
        });
    }
}

impl Texts {
    fn of(text: &str) -> Self {
        let mut texts = Texts::default();
        let mut object: Map<String, Value> = match parse::<Value>(text) {
            Ok(Value::Object(object)) => object,
            Ok(_) => {
                texts.wrong.push("this is not a JSON object".into());
                return texts;
            }
            Err(e) => {
                texts.wrong.push(format!("this is not JSON ({e})"));
                return texts;
            }
        };
        let [text, caption, captions] =
            ["text", "caption", "captions"].map(|key| texts.captions_of(key, object.remove(key)));
        texts.captions = joined([text, caption].concat(), captions);
        texts.prompt = texts.value("prompt", &mut object, "a text").and_then(said);
        texts.text_only = texts.value("text_only", &mut object, "true or false").unwrap_or(false);
        let qa = texts.value("qa", &mut object, "[[\"question\", \"answer\"], ..]");
        let lines = texts.value("chats", &mut object, "[{\"turns\": [[\"question\", \"answer\"], ..]}, ..]");
        let (all, empty) = chats(qa.unwrap_or_default(), lines.unwrap_or_default());
        if empty {
            texts.wrong.push("a question or its answer is empty".into());
        }
        texts.chats = all;
        match conversations(&object) {
            Ok(None) => {}
            Ok(Some(talk)) => {
                texts.shown = talk.shown;
                texts.chats.push(talk.chat);
            }
            Err(why) => texts.wrong.push(why),
        }
        texts
    }

    /// The value of a key; one of another form counts as wrong, null as absent.
    fn value<T: DeserializeOwned>(
        &mut self,
        key: &str,
        object: &mut Map<String, Value>,
        want: &str,
    ) -> Option<T> {
        let value = object.remove(key).filter(|v| !v.is_null())?;
        let value = serde_json::from_value(value);
        value.map_err(|e| self.wrong.push(format!("`{key}` is of another form ({e}), wanted {want}"))).ok()
    }

    /// The captions of a key that holds one or a list of them.
    fn captions_of(&mut self, key: &str, value: Option<Value>) -> Vec<String> {
        let all = match value {
            None | Some(Value::Null) => return Vec::new(),
            Some(Value::Array(all)) => all,
            Some(one) => vec![one],
        };
        let mut captions = Vec::new();
        for value in all {
            match value {
                Value::String(text) => captions.extend(said(Some(text))),
                Value::Null => {}
                _ => self.wrong.push(format!("`{key}` holds a value that is not a text")),
            }
        }
        captions
    }
}

/// The conversation of an object in LLaVA's form.
fn conversations(object: &Map<String, Value>) -> Result<Option<Talk>, String> {
    object.get("conversations").filter(|v| !v.is_null()).map(conversation::chat).transpose()
}
