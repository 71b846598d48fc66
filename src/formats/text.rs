//! Texts of files in messages. They may be of any length, and hold characters that a terminal obeys instead of showing.

use std::collections::BTreeMap;

use super::Info;

/// Longest name of a tensor, in bytes.
const NAME: usize = 1024;
/// Most characters of a name that cannot be used, where it is shown.
const SHOWN: usize = 100;
/// Most characters at the beginning and at the end of a message, where it says what and why, and how to mend it.
const ENDS: (usize, usize) = (700, 300);

/// Whether a character ends a line, controls a terminal, changes the order of others or has no width.
fn is_hidden(c: char) -> bool {
    let format =
        matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
    c.is_control() || format
}

/// Characters as messages show them.
fn escaped(text: impl Iterator<Item = char>) -> String {
    let mut shown = String::new();
    for c in text {
        match is_hidden(c) {
            true => shown.extend(c.escape_debug()),
            false => shown.push(c),
        }
    }
    shown
}

/// A text as messages show it: hidden characters are escaped, and no more than `most` characters are kept.
pub(crate) fn shown(text: &str, most: usize) -> String {
    let mut shown = escaped(text.chars().take(most));
    if text.chars().nth(most).is_some() {
        shown += "...";
    }
    shown
}

/// A message that quotes a file, of which the middle is left out if it is long.
pub(super) fn message(why: &str) -> String {
    let (head, tail) = ENDS;
    let count = why.chars().count();
    if count <= head + tail {
        return shown(why, count);
    }
    shown(why, head) + &escaped(why.chars().skip(count - tail))
}

/// Refuses tensors whose names cannot be shown as they are: everything else takes names for text of a line.
pub(super) fn check_names(tensors: &BTreeMap<String, Info>) -> Result<(), String> {
    for name in tensors.keys() {
        if name.len() > NAME {
            let (length, name) = (name.len(), shown(name, SHOWN));
            return Err(format!(
                "has a tensor whose name is {length} bytes long (`{name}`), wanted at most {NAME}; rename it"
            ));
        }
        if name.contains(is_hidden) {
            let name = shown(name, SHOWN);
            return Err(format!("has a tensor whose name holds control characters (`{name}`); rename it"));
        }
    }
    Ok(())
}
