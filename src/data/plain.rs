//! Text from files and command lines.

use std::path::Path;

use crate::error::{Error, Result};

const MARK: char = '\u{feff}';

/// The text of a file without its byte order mark: UTF-16 if the mark says so, UTF-8 otherwise. The error names the
/// first line that is not text.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let wrong = |before: &[u8], what: &str| {
        let line = before.iter().filter(|&&b| b == b'\n').count() + 1;
        Error::data(path, format!("line {line}: {what}; save the file as UTF-8"))
    };
    let text = match &bytes[..] {
        [0xFF, 0xFE, rest @ ..] => wide(rest, u16::from_le_bytes),
        [0xFE, 0xFF, rest @ ..] => wide(rest, u16::from_be_bytes),
        _ => None,
    };
    let text = match text {
        Some(text) => text,
        None => String::from_utf8(bytes).map_err(|e| {
            let good = e.utf8_error().valid_up_to();
            wrong(&e.as_bytes()[..good], "this is not UTF-8 text")
        })?,
    };
    if let Some(at) = text.find('\0') {
        return Err(wrong(&text.as_bytes()[..at], "this holds a NUL byte, so it is not text"));
    }
    Ok(text.strip_prefix(MARK).map(String::from).unwrap_or(text))
}

/// Decodes UTF-16; `None` if it is invalid or ends within a unit.
fn wide(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> Option<String> {
    let (units, rest) = bytes.as_chunks();
    let units: Vec<u16> = units.iter().map(|&b| unit(b)).collect();
    String::from_utf16(&units).ok().filter(|_| rest.is_empty())
}

/// The text without surrounding whitespace and byte order marks.
pub fn trimmed(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || c == MARK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::scratch::Scratch;

    #[test]
    fn marks_are_dropped_and_say_how_to_read() {
        let dir = Scratch::new("plain");
        let path = dir.path("a.txt");
        let text = "größer 猫\r\n🙂";
        let le: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let be: Vec<u8> = text.encode_utf16().flat_map(u16::to_be_bytes).collect();
        for bytes in [
            text.as_bytes().to_vec(),
            [b"\xef\xbb\xbf", text.as_bytes()].concat(),
            [b"\xff\xfe", &le[..]].concat(),
            [b"\xfe\xff", &be[..]].concat(),
        ] {
            dir.write("a.txt", &bytes);
            assert_eq!(read_text(&path).unwrap(), text);
        }
        for (bytes, want) in [
            (&b"a\nb\ngr\xfc\xdfe\n"[..], "line 3: this is not UTF-8 text"),
            (&le, "line 1: this is not UTF-8 text"),
            (b"\xff\xfea", "line 1: this is not UTF-8 text"),
            (b"a\n\0", "line 2: this holds a NUL byte"),
            (b"a\0b\0\n\0", "line 1: this holds a NUL byte"),
        ] {
            dir.write("a.txt", bytes);
            let e = read_text(&path).unwrap_err().to_string();
            assert!(
                e.contains("a.txt: ") && e.contains(want) && e.ends_with("save the file as UTF-8"),
                "{e}"
            );
        }
        assert!(read_text(&dir.path("b.txt")).unwrap_err().to_string().contains("b.txt: "));
        assert_eq!(trimmed("\u{feff} \t a b\n\u{feff}"), "a b");
    }
}
