//! The text tokenizer in a GGUF file as a `tokenizer.json`.

use serde_json::{Map, Value, json};

use super::keys::Keys;
use crate::error::{Error, Result};

/// How Qwen2 and Llama 3 split a text into words.
const QWEN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// llama.cpp's kinds of tokens that are read out of a text before anything else.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// The tokenizer, or `None` and a note that says why there is none.
pub(super) fn tokenizer(keys: Keys) -> Result<(Option<Value>, Vec<String>)> {
    match keys.text("tokenizer.ggml.model")? {
        Some("gpt2") => {}
        Some(kind) => {
            let kind: String = kind.chars().take(60).collect();
            let what = format!("the file's text tokenizer is of the kind {kind}, which ett does not read");
            return Ok((None, vec![format!("{what}, so the model is read without one")]));
        }
        None => {
            return Ok((
                None,
                vec!["the file has no text tokenizer, so the model is read without one".into()],
            ));
        }
    }
    if keys.flag("tokenizer.ggml.add_space_prefix")? == Some(true) {
        return Err(keys.wrong("tokenizer.ggml.add_space_prefix", "false, since ett adds no spaces"));
    }
    let pre = keys.text("tokenizer.ggml.pre")?.unwrap_or("default");
    let Some(split) = Split::of(pre) else {
        let want = "one of default, gpt-2, llama-bpe, qwen2, smollm";
        return Err(keys.wrong("tokenizer.ggml.pre", want));
    };
    let tokens = keys.list("tokenizer.ggml.tokens")?;
    let tokens = tokens.ok_or_else(|| keys.wrong("tokenizer.ggml.tokens", "a list of tokens"))?;
    let mut vocab = Map::new();
    for (id, token) in tokens.iter().enumerate() {
        let text = token.as_str().ok_or_else(|| keys.wrong("tokenizer.ggml.tokens", "a list of texts"))?;
        if vocab.insert(text.into(), id.into()).is_some() {
            let text: String = text.chars().take(60).collect();
            let what = format!("`tokenizer.ggml.tokens` has {text:?} twice, wanted different tokens");
            return Err(Error::weights(keys.path, what));
        }
    }
    let added = added(keys, tokens)?;
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": split.normalizer,
        "pre_tokenizer": split.pre_tokenizer,
        "post_processor": null,
        "decoder": bytes(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": split.whole_words, "vocab": vocab, "merges": merges(keys)?,
        },
    });
    Ok((Some(json), vec![]))
}

/// How a text is divided before merges apply.
struct Split {
    normalizer: Value,
    pre_tokenizer: Value,
    /// A word that is a token is not made from merges.
    whole_words: bool,
}

impl Split {
    fn of(pre: &str) -> Option<Self> {
        let by = |regex: &str| {
            let split = json!({
                "type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false,
            });
            json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]})
        };
        let plain = |pre_tokenizer| Split { normalizer: Value::Null, pre_tokenizer, whole_words: false };
        Some(match pre {
            "default" | "gpt-2" => plain(bytes(true)),
            "llama-bpe" => Split { whole_words: true, ..plain(by(LLAMA)) },
            "qwen2" => Split { normalizer: json!({"type": "NFC"}), ..plain(by(QWEN)) },
            "smollm" => {
                let digits = json!({"type": "Digits", "individual_digits": true});
                plain(json!({"type": "Sequence", "pretokenizers": [digits, bytes(true)]}))
            }
            _ => return None,
        })
    }
}

/// Bytes as letters; `regex`: words are split as in GPT-2 first.
fn bytes(regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex})
}

/// Tokens that are read out of a text before anything else, and whether they are special.
fn added(keys: Keys, tokens: &[Value]) -> Result<Vec<Value>> {
    let types = keys.list("tokenizer.ggml.token_type")?.unwrap_or_default();
    if !types.is_empty() && types.len() != tokens.len() {
        let (types, tokens) = (types.len(), tokens.len());
        let what = format!("has {types} `tokenizer.ggml.token_type`, wanted one for each of {tokens} tokens");
        return Err(Error::weights(keys.path, what));
    }
    let added = tokens.iter().zip(types).enumerate().filter_map(|(id, (token, kind))| {
        let kind = kind.as_u64()?;
        let special = kind == CONTROL;
        (special || kind == USER_DEFINED).then(|| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special,
            })
        })
    });
    Ok(added.collect())
}

/// Pairs of tokens in the order in which they are merged.
fn merges(keys: Keys) -> Result<Vec<Value>> {
    let list = keys.list("tokenizer.ggml.merges")?;
    let list = list.ok_or_else(|| keys.wrong("tokenizer.ggml.merges", "a list of pairs"))?;
    let pair = |merge: &Value| {
        let (a, b) = merge.as_str()?.split_once(' ').filter(|(a, b)| !a.is_empty() && !b.is_empty())?;
        Some(json!([a, b]))
    };
    let pairs = list.iter().map(|merge| {
        pair(merge).ok_or_else(|| {
            let merge: String = merge.to_string().chars().take(60).collect();
            let what = format!("`tokenizer.ggml.merges` has {merge}, wanted two tokens with a space between");
            Error::weights(keys.path, what)
        })
    });
    pairs.collect()
}
