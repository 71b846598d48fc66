//! Keys and values of untrusted JSON, with errors that name them.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A dictionary of a file, of which only numbers, texts and truth values are asked for. `null` is the same as absent.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    pub path: &'a Path,
    pub map: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    /// The value of a key.
    pub fn get(self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// An error about the value of a key.
    pub fn wrong(self, key: &str, want: &str) -> Error {
        let got = self.get(key).map_or("missing".into(), shown);
        Error::weights(self.path, format!("`{key}` is {got}, wanted {want}"))
    }

    /// A value of another type than wanted is an error.
    fn typed<T>(self, key: &str, read: impl Fn(&'a Value) -> Option<T>, want: &str) -> Result<Option<T>> {
        self.get(key).map(|v| read(v).ok_or_else(|| self.wrong(key, want))).transpose()
    }

    /// A whole number.
    pub fn count(self, key: &str) -> Result<Option<usize>> {
        let whole = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
        self.typed(key, whole, "a whole number")
    }

    /// A whole number that the file must have.
    pub fn needed(self, key: &str) -> Result<usize> {
        self.count(key)?.ok_or_else(|| self.wrong(key, "a whole number"))
    }

    /// A number.
    pub fn number(self, key: &str) -> Result<Option<f64>> {
        self.typed(key, Value::as_f64, "a number")
    }

    /// `true` or `false`.
    pub fn flag(self, key: &str) -> Result<Option<bool>> {
        self.typed(key, Value::as_bool, "true or false")
    }

    /// A text.
    pub fn text(self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, Value::as_str, "a text")
    }

    /// A list.
    pub fn list(self, key: &str) -> Result<Option<&'a [Value]>> {
        self.typed(key, |v| v.as_array().map(Vec::as_slice), "a list")
    }

    /// A token or a list of tokens, each below `vocab`.
    pub fn tokens(self, key: &str, vocab: usize) -> Result<Vec<usize>> {
        let token = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n < vocab);
        let all = match self.get(key) {
            None => Some(vec![]),
            Some(Value::Array(list)) => list.iter().map(token).collect(),
            Some(one) => token(one).map(|n| vec![n]),
        };
        all.ok_or_else(|| self.wrong(key, &format!("tokens below {vocab}, the size of the vocabulary")))
    }
}

/// A value as errors show it.
fn shown(v: &Value) -> String {
    const MOST: usize = 60;
    match v {
        Value::Object(_) => "a dictionary".into(),
        Value::Array(_) => "a list".into(),
        Value::String(text) if text.chars().count() > MOST => {
            format!("{:?}...", text.chars().take(MOST).collect::<String>())
        }
        other => other.to_string(),
    }
}

/// The bytes of a file, if they are at most `most`; `None` if there is no such file.
pub(super) fn read_some(path: &Path, most: u64) -> Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path)(e)),
    };
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.len() as u64 > most {
        let what =
            format!("has more than {} MiB, so it is not what its name says; fetch it again", most >> 20);
        return Err(Error::weights(path, what));
    }
    Ok(Some(bytes))
}

/// The dictionary in a file of at most `most` bytes; `None` if there is no such file.
pub(super) fn read_object(path: &Path, most: u64) -> Result<Option<Map<String, Value>>> {
    let Some(bytes) = read_some(path, most)? else { return Ok(None) };
    let bad = |why: String| Error::weights(path, format!("is not a JSON dictionary ({why}); fetch it again"));
    match serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))? {
        Value::Object(map) => Ok(Some(map)),
        other => Err(bad(format!("it is {}", shown(&other)))),
    }
}
