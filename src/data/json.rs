//! Lists of JSON values in a file: one array, or one value after the other.

use std::fmt;
use std::path::Path;

use serde::de::{Deserializer as _, SeqAccess, Visitor};
use serde_json::{Deserializer, Value};

use super::folder::without_nan;
use crate::error::{Error, Result};

/// What is done with a value and its number, counted from 1.
type Each<'a> = &'a mut dyn FnMut(usize, Value) -> Result<()>;

/// Passes each value of `text` to `each`, one at a time, so that a large file is in memory only as text. The text is an
/// array of values, or holds one value after the other, such as one in each line. The NaN and infinities that Python
/// writes are taken for `null`. Errors name line and column of `path`, and what was wanted.
pub(super) fn each(path: &Path, text: &str, wanted: &str, each: Each) -> Result<()> {
    let mut done = 0;
    let Err(stop) = read(text, &mut done, each) else { return Ok(()) };
    let stop = match (stop, without_nan(text)) {
        // The values before the error are the same in both texts.
        (Stop::Json(_), Some(text)) => match read(&text, &mut done, each) {
            Ok(()) => return Ok(()),
            Err(stop) => stop,
        },
        (stop, _) => stop,
    };
    Err(match stop {
        Stop::Json(e) => wrong(path, &e, wanted),
        Stop::Given(e) => e,
    })
}

/// An error of JSON with its place.
pub(super) fn wrong(path: &Path, e: &serde_json::Error, wanted: &str) -> Error {
    let reason = e.to_string();
    let reason = reason.split(" at line ").next().unwrap_or_default();
    Error::data(path, format!("line {}, column {}: {reason}; {wanted}", e.line(), e.column()))
}

/// Why reading ended early.
enum Stop {
    Json(serde_json::Error),
    Given(Error),
}

/// Passes on the values after the first `done`.
fn read(text: &str, done: &mut usize, each: Each) -> std::result::Result<(), Stop> {
    let mut list = List { seen: 0, done, each, error: None };
    let result = match text.trim_start().starts_with('[') {
        true => {
            let mut json = Deserializer::from_str(text);
            json.deserialize_seq(&mut list).and_then(|()| json.end())
        }
        false => Deserializer::from_str(text)
            .into_iter()
            .try_for_each(|value| list.take(value?).map_err(|()| serde::de::Error::custom("stopped"))),
    };
    match (list.error, result) {
        (Some(e), _) => Err(Stop::Given(e)),
        (None, Err(e)) => Err(Stop::Json(e)),
        (None, Ok(())) => Ok(()),
    }
}

struct List<'a> {
    seen: usize,
    done: &'a mut usize,
    each: Each<'a>,
    error: Option<Error>,
}

impl List<'_> {
    fn take(&mut self, value: Value) -> std::result::Result<(), ()> {
        self.seen += 1;
        if self.seen <= *self.done {
            return Ok(());
        }
        *self.done = self.seen;
        (self.each)(self.seen, value).map_err(|e| self.error = Some(e))
    }
}

impl<'de> Visitor<'de> for &mut List<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<(), A::Error> {
        while let Some(value) = seq.next_element()? {
            self.take(value).map_err(|()| serde::de::Error::custom("stopped"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &str) -> Result<Vec<String>> {
        let mut all = Vec::new();
        each(Path::new("a.json"), text, "wanted values", &mut |i, value| {
            all.push(format!("{i}: {value}"));
            match value == "stop" {
                true => Err(Error::data("a.json", "stopped here")),
                false => Ok(()),
            }
        })?;
        Ok(all)
    }

    #[test]
    fn arrays_and_lines_are_read() {
        for text in ["[1, {\"a\": [2]}]", "1\n{\"a\": [2]}\n", " \n[\n1,\n{\"a\": [2]}]\n", "1 {\"a\": [2]}"]
        {
            assert_eq!(all(text).unwrap(), ["1: 1", "2: {\"a\":[2]}"], "{text}");
        }
        assert!(all("").unwrap().is_empty() && all("[]").unwrap().is_empty());
        for text in ["[1, NaN, \"NaN\", -Infinity]", "1 NaN\n\"NaN\"\n-Infinity"] {
            assert_eq!(all(text).unwrap(), ["1: 1", "2: null", "3: \"NaN\"", "4: null"], "{text}");
        }
    }

    #[test]
    fn errors_name_the_place() {
        for (text, want) in [
            ("[1,\n 2,\n}", "a.json: line 3, column 1: expected value; wanted values"),
            ("[1, 2", "a.json: line 1, column 5: EOF while parsing a list; wanted values"),
            ("[1] 2", "line 1, column 5: trailing characters"),
            ("{}\n{\"a\": \n", "line 3, column 0: EOF while parsing"),
            ("[NaN,\n nan]", "line 2, column "),
            ("[1, \"stop\", 2]", "a.json: stopped here"),
            ("NaN \"stop\" 2", "a.json: stopped here"),
        ] {
            let e = all(text).unwrap_err().to_string();
            assert!(e.contains(want), "{e}\nwanted {want}");
        }
        let deep = "[".repeat(100_000);
        assert!(all(&deep).unwrap_err().to_string().contains("recursion limit"));
    }
}
