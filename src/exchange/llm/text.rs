//! Special tokens of a `tokenizer.json`.

use std::path::Path;

use serde_json::{Value, json};
use tokenizers::{AddedToken, Tokenizer};

use crate::data::Special;
use crate::error::{Error, Result};

/// A `tokenizer.json` that has all special tokens.
pub(super) struct Complete {
    pub json: String,
    /// Rows that its ids need, a multiple of 8.
    pub vocabulary: usize,
    pub notes: Vec<String>,
}

/// Opens a `tokenizer.json`.
pub(super) fn parse(path: &Path, json: &[u8]) -> Result<Tokenizer> {
    Tokenizer::from_bytes(json).map_err(|e| {
        let what =
            format!("its text tokenizer is not a tokenizer.json of Hugging Face ({e}); correct or remove it");
        Error::weights(path, what)
    })
}

/// Adds the special tokens that a tokenizer lacks after its largest id, and marks those that it has as special. A text
/// that needs neither stays as it is.
pub(super) fn complete(path: &Path, json: String) -> Result<Complete> {
    let mut tokenizer = parse(path, json.as_bytes())?;
    let largest = |t: &Tokenizer| t.get_vocab(true).into_values().max().unwrap_or(0);
    let before = largest(&tokenizer);
    let is_special = |t: &Tokenizer, s: Special| {
        let id = t.token_to_id(s.name());
        id.and_then(|id| t.get_added_vocabulary().get_added_tokens_decoder().get(&id).map(|a| a.special))
            .unwrap_or(false)
    };
    let wanting: Vec<Special> = Special::ALL.into_iter().filter(|&s| !is_special(&tokenizer, s)).collect();
    let mut notes = Vec::new();
    let rows = |largest: u32| (largest as usize + 1).next_multiple_of(8);
    if wanting.is_empty() {
        return Ok(Complete { json, vocabulary: rows(before), notes });
    }
    let mut file: Value = serde_json::from_str(&json).map_err(|e| Error::weights(path, e))?;
    if !file["added_tokens"].is_array() {
        file["added_tokens"] = json!([]);
    }
    for s in wanting {
        let name = s.name();
        let had = tokenizer.token_to_id(name);
        // The library numbers added tokens itself.
        let added = tokenizer.add_special_tokens([AddedToken::from(name, true)]);
        added.map_err(|e| {
            Error::weights(path, format!("{name} cannot be added to its text tokenizer ({e})"))
        })?;
        let Some(id) = tokenizer.token_to_id(name).filter(|&id| had.is_some() || id > before) else {
            let what =
                format!("its text tokenizer numbers tokens up to {before} with gaps; give {name} a number");
            return Err(Error::weights(path, what));
        };
        mark(&mut file["added_tokens"], name, id);
        notes.push(match had {
            None => format!("{name} was added to the text tokenizer as token {id}"),
            Some(_) => format!("{name}, token {id}, was marked as special in the text tokenizer"),
        });
    }
    Ok(Complete { json: file.to_string(), vocabulary: rows(largest(&tokenizer)), notes })
}

/// Makes a token special in the list of added tokens, to which it is appended if it is not there.
fn mark(added: &mut Value, name: &str, id: u32) {
    let Some(list) = added.as_array_mut() else { return };
    match list.iter_mut().find(|t| t["content"] == name) {
        Some(token) => token["special"] = true.into(),
        None => list.push(json!({
            "id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })),
    }
}
