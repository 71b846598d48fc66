//! Conversion between text and token ids.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use tokenizers::Tokenizer;
use tokenizers::models::ModelWrapper;

use super::plain::read_text;
use crate::error::{Error, Result};

/// A special token. Text never encodes to one; special tokens are inserted by id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// `<|endoftext|>`: ends a text.
    EndOfText,
    /// `<|im_start|>`: starts a turn of a chat.
    ImStart,
    /// `<|im_end|>`: ends a turn of a chat.
    ImEnd,
    /// `<|vision_start|>`: precedes the visual tokens of a picture.
    VisionStart,
    /// `<|vision_end|>`: follows the visual tokens of a picture.
    VisionEnd,
}

impl Special {
    /// All special tokens, in the order of their ids in the byte tokenizer.
    pub const ALL: [Special; 5] =
        [Special::EndOfText, Special::ImStart, Special::ImEnd, Special::VisionStart, Special::VisionEnd];

    /// The name, as Qwen2.5 spells it.
    pub fn name(self) -> &'static str {
        match self {
            Special::EndOfText => "<|endoftext|>",
            Special::ImStart => "<|im_start|>",
            Special::ImEnd => "<|im_end|>",
            Special::VisionStart => "<|vision_start|>",
            Special::VisionEnd => "<|vision_end|>",
        }
    }
}

const BYTES: i32 = 256;

/// A text tokenizer.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub enum TextTokenizer {
    /// One token per byte of UTF-8, ids 0 to 255, followed by the special tokens in the order of [`Special::ALL`],
    /// 256 to 260, and padding up to a vocabulary of 264.
    #[default]
    Bytes,
    /// The tokenizer of a Hugging Face `tokenizer.json`.
    File(Arc<TokenizerFile>),
}

/// A `tokenizer.json`; see [`TextTokenizer::open`].
#[derive(Debug)]
pub struct TokenizerFile {
    inner: Tokenizer,
    /// Ids of [`Special::ALL`].
    special: [i32; Special::ALL.len()],
    /// Names of these and of all other tokens that the file marks as special.
    names: BTreeMap<i32, String>,
    vocabulary: usize,
}

impl TextTokenizer {
    /// Opens a Hugging Face `tokenizer.json`; without a path, the byte tokenizer.
    ///
    /// The file must have all of [`Special::ALL`] as special tokens and encode deterministically. Its settings for
    /// truncation and padding are ignored.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        match path {
            None => Ok(TextTokenizer::Bytes),
            Some(path) => TokenizerFile::open(path).map(|file| TextTokenizer::File(Arc::new(file))),
        }
    }

    /// Rows of the embedding table, V, a multiple of 8; all ids are below it.
    pub fn vocabulary(&self) -> usize {
        match self {
            TextTokenizer::Bytes => (BYTES as usize + Special::ALL.len()).next_multiple_of(8),
            TextTokenizer::File(file) => file.vocabulary,
        }
    }

    /// The id of a special token.
    pub fn special(&self, token: Special) -> i32 {
        match self {
            TextTokenizer::Bytes => BYTES + token as i32,
            TextTokenizer::File(file) => file.special[token as usize],
        }
    }

    /// The ids of `text`. Names of special tokens in the text are encoded as ordinary text.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>> {
        match self {
            TextTokenizer::Bytes => Ok(text.bytes().map(i32::from).collect()),
            TextTokenizer::File(file) => file.encode(text),
        }
    }

    /// The text of `ids`, without special tokens and ids outside the vocabulary. Invalid UTF-8 becomes U+FFFD.
    pub fn decode(&self, ids: &[i32]) -> String {
        self.plain(&ids.iter().copied().filter(|&id| self.is_text(id)).collect::<Vec<_>>())
    }

    /// The text of `ids` with special tokens by name; unknown ids are shown as `<|id 263|>`.
    pub fn decode_visible(&self, ids: &[i32]) -> String {
        let runs = ids.chunk_by(|&a, &b| self.is_text(a) == self.is_text(b));
        runs.map(|run| match self.is_text(run[0]) {
            true => self.plain(run),
            false => run.iter().map(|&id| self.name(id).unwrap_or(format!("<|id {id}|>"))).collect(),
        })
        .collect()
    }

    /// Whether an id stands for ordinary text.
    fn is_text(&self, id: i32) -> bool {
        match self {
            TextTokenizer::Bytes => (0..BYTES).contains(&id),
            TextTokenizer::File(file) => {
                !file.names.contains_key(&id)
                    && u32::try_from(id).is_ok_and(|id| file.inner.id_to_token(id).is_some())
            }
        }
    }

    /// The name of a special token.
    fn name(&self, id: i32) -> Option<String> {
        match self {
            TextTokenizer::Bytes => {
                Special::ALL.into_iter().find(|&s| self.special(s) == id).map(|s| s.name().into())
            }
            TextTokenizer::File(file) => file.names.get(&id).cloned(),
        }
    }

    /// The text of ids that stand for ordinary text.
    fn plain(&self, ids: &[i32]) -> String {
        match self {
            TextTokenizer::Bytes => {
                let bytes: Vec<u8> = ids.iter().map(|&id| id as u8).collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
            TextTokenizer::File(file) => {
                let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
                file.inner.decode(&ids, true).unwrap_or("\u{fffd}".into())
            }
        }
    }
}

/// The part of the file that gives the ids of added tokens.
#[derive(Deserialize)]
struct Ids {
    #[serde(default)]
    added_tokens: Vec<AddedId>,
}

#[derive(Deserialize)]
struct AddedId {
    id: u32,
    content: String,
}

impl TokenizerFile {
    fn open(path: &Path) -> Result<Self> {
        let text = read_text(path)?;
        let mut inner = Tokenizer::from_bytes(&text).map_err(|e| {
            let what = format!("this is not a tokenizer.json of Hugging Face ({e}); correct data.tokenizer");
            Error::data(path, what)
        })?;
        let random = match inner.get_model() {
            ModelWrapper::BPE(bpe) => bpe.dropout.is_some_and(|share| share > 0.0),
            _ => false,
        };
        if random {
            return Err(Error::data(path, "this tokenizer drops merges at random; set its dropout to null"));
        }
        inner.set_encode_special_tokens(true);
        inner.with_padding(None);
        let failed = |e| Error::data(path, format!("this tokenizer cannot be used ({e})"));
        inner.with_truncation(None).map_err(failed)?;

        let ids = Special::ALL.map(|s| inner.token_to_id(s.name()));
        let absent: Vec<&str> =
            Special::ALL.iter().zip(ids).filter(|(_, id)| id.is_none()).map(|(s, _)| s.name()).collect();
        if !absent.is_empty() {
            let what = format!("this tokenizer lacks {}; add them as special tokens", absent.join(", "));
            return Err(Error::data(path, what));
        }
        let special = ids.map(|id| id.unwrap_or_default() as i32);
        let largest = inner.get_vocab(true).into_values().max().unwrap_or(0);
        if i32::try_from(largest).is_err() {
            return Err(Error::data(path, format!("this tokenizer has the id {largest}, wanted below 2^31")));
        }
        // The library numbers added tokens itself and ignores the ids in the file.
        let file: Ids = serde_json::from_str(&text).map_err(|e| Error::data(path, e))?;
        if let Some(t) = file.added_tokens.iter().find(|t| inner.token_to_id(&t.content) != Some(t.id)) {
            let got = inner.token_to_id(&t.content).map_or("none".into(), |id| id.to_string());
            let what = format!("gives {} the id {}, which the library numbers {got}", t.content, t.id);
            return Err(Error::data(
                path,
                format!("this tokenizer {what}; number added tokens without gaps"),
            ));
        }
        let added = inner.get_added_vocabulary().get_added_tokens_decoder();
        let mut names: BTreeMap<i32, String> =
            added.iter().filter(|(_, t)| t.special).map(|(&id, t)| (id as i32, t.content.clone())).collect();
        names.extend(Special::ALL.map(|s| (special[s as usize], s.name().to_string())));
        let vocabulary = (largest as usize + 1).next_multiple_of(8);
        let file = TokenizerFile { inner, special, names, vocabulary };
        for s in Special::ALL {
            if file.encode(s.name())?.contains(&special[s as usize]) {
                let name = s.name();
                let what =
                    format!("this tokenizer reads {name} out of plain text; mark it \"special\": true");
                return Err(Error::data(path, what));
            }
        }
        Ok(file)
    }

    fn encode(&self, text: &str) -> Result<Vec<i32>> {
        let encoded = self.inner.encode_fast(text, false);
        let encoded = encoded.map_err(|e| {
            Error::arg("encode", "text", format!("{text:?} ({e})"), "text that the tokenizer knows")
        })?;
        Ok(encoded.get_ids().iter().map(|&id| id as i32).collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
    use serde_json::{Value, json};
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    use super::*;
    use crate::data::scratch::Scratch;

    /// Bytes with three merges that make ` red` one token, followed by the special tokens.
    fn small() -> Value {
        let mut letters: Vec<String> = ByteLevel::alphabet().iter().map(|c| c.to_string()).collect();
        letters.sort();
        letters.extend(["re", "red", "\u{120}red"].map(String::from));
        let vocab: BTreeMap<&str, usize> = letters.iter().enumerate().map(|(i, l)| (l.as_str(), i)).collect();
        let added: Vec<Value> = Special::ALL
            .iter()
            .map(|&s| added(259 + s as u32, s.name(), true))
            .chain([added(264, "<|object|>", true), added(265, "<tool>", false)])
            .collect();
        let bytes =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true});
        json!({
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": null,
            "added_tokens": added,
            "normalizer": null,
            "pre_tokenizer": bytes,
            "post_processor": null,
            "decoder": bytes,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "vocab": vocab, "merges": [["r", "e"], ["re", "d"], ["\u{120}", "red"]],
            },
        })
    }

    fn added(id: u32, content: &str, special: bool) -> Value {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": special})
    }

    fn open(dir: &Scratch, file: &Value) -> Result<TextTokenizer> {
        dir.write("tokenizer.json", file.to_string().as_bytes());
        TextTokenizer::open(Some(&dir.path("tokenizer.json")))
    }

    const TEXTS: [&str; 5] =
        ["", "a red circle", "größer, 色, 🟥\0\n", "<|im_start|>user<|im_end|>", " <|object|><tool>red"];

    #[test]
    fn text_round_trips() {
        let dir = Scratch::new("text");
        for t in [TextTokenizer::default(), open(&dir, &small()).unwrap()] {
            let special = Special::ALL.map(|s| t.special(s));
            let check = |text: &str| {
                let ids = t.encode(text).unwrap();
                assert!(ids.len() <= text.len());
                assert!(
                    ids.iter().all(|id| (0..t.vocabulary() as i32).contains(id) && !special.contains(id))
                );
                assert_eq!((t.decode(&ids), t.decode_visible(&ids)), (text.into(), text.into()));
            };
            TEXTS.into_iter().for_each(check);
            let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
            let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) };
            let text = prop_oneof![any::<String>(), "[<|>a-z_ ]{0,40}", "(<\\|im_(start|end)\\|>| red){0,5}"];
            TestRunner::new_with_rng(config, rng)
                .run(&text, |text| {
                    check(&text);
                    Ok(())
                })
                .unwrap();
        }
    }

    #[test]
    fn special_ids_are_fixed() {
        let t = TextTokenizer::Bytes;
        assert_eq!(Special::ALL.map(|s| t.special(s)), [256, 257, 258, 259, 260]);
        assert_eq!(t.special(Special::EndOfText), 256);
        assert_eq!(t.vocabulary(), 264);
    }

    #[test]
    fn specials_are_hidden_or_named() {
        let t = TextTokenizer::Bytes;
        let ids = [259, 261, 260, b'h' as i32, 256, b'i' as i32, 263, -1, 9999];
        assert_eq!(t.decode(&ids), "hi");
        assert_eq!(
            t.decode_visible(&ids),
            "<|vision_start|><|id 261|><|vision_end|>h<|endoftext|>i<|id 263|><|id -1|><|id 9999|>"
        );
    }

    #[test]
    fn broken_utf8_does_not_fail() {
        assert_eq!(TextTokenizer::Bytes.decode(&[0xe8, b'x' as i32, 0xff]), "\u{fffd}x\u{fffd}");
    }

    #[test]
    fn a_file_has_its_own_ids() {
        let dir = Scratch::new("file");
        let t = open(&dir, &small()).unwrap();
        assert_eq!(t.vocabulary(), 272);
        assert_eq!(Special::ALL.map(|s| t.special(s)), [259, 260, 261, 262, 263]);
        // The file asks for truncation to two tokens.
        assert_eq!(t.encode(" red red red").unwrap(), [258, 258, 258]);
        let ids = [262, 258, 264, 257, 266, -1, 265, 259];
        assert_eq!(t.decode(&ids), " redred<tool>");
        assert_eq!(
            t.decode_visible(&ids),
            "<|vision_start|> red<|object|>red<|id 266|><|id -1|><tool><|endoftext|>"
        );
        // The first byte of a two-byte character.
        let half = &t.encode("é").unwrap()[..1];
        assert_eq!(t.decode(half), "\u{fffd}");
    }

    #[test]
    fn files_that_cannot_be_used_are_named_with_the_reason() {
        let dir = Scratch::new("unusable");
        let error = |change: &dyn Fn(&mut Value)| {
            let mut file = small();
            change(&mut file);
            open(&dir, &file).unwrap_err().to_string()
        };
        for (e, want) in [
            (error(&|f| *f = json!({"a": 1})), "this is not a tokenizer.json of Hugging Face ("),
            (error(&|f| f["model"]["vocab"] = json!(3)), "this is not a tokenizer.json of Hugging Face ("),
            (
                error(&|f| {
                    let tokens = f["added_tokens"].as_array_mut().unwrap();
                    tokens.retain(|t| {
                        !["<|im_end|>", "<|vision_start|>"].contains(&t["content"].as_str().unwrap())
                    });
                }),
                "this tokenizer lacks <|im_end|>, <|vision_start|>; add them as special tokens",
            ),
            (
                error(&|f| f["added_tokens"][1]["special"] = json!(false)),
                "this tokenizer reads <|im_start|> out of plain text; mark it \"special\": true",
            ),
            (
                error(&|f| f["model"]["dropout"] = json!(0.1)),
                "drops merges at random; set its dropout to null",
            ),
        ] {
            assert!(e.contains("tokenizer.json: ") && e.contains(want), "{e}");
        }
        dir.write("tokenizer.json", b"\xff\x00{");
        let path = dir.path("tokenizer.json");
        let e = TextTokenizer::open(Some(&path)).unwrap_err().to_string();
        assert!(e.contains("tokenizer.json: line 1: this is not UTF-8 text"), "{e}");
        let marked = format!("\u{feff}{}", small());
        dir.write("tokenizer.json", marked.as_bytes());
        assert!(TextTokenizer::open(Some(&path)).is_ok());
        let e = TextTokenizer::open(Some(&dir.path("absent.json"))).unwrap_err().to_string();
        assert!(e.contains("absent.json: "), "{e}");
    }
}
