//! Text to token ids and back.

use crate::error::Result;

/// A special token. User text never encodes to one; they are put in by id.
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
    /// `<|image_pad|>`: holds the place of one visual token.
    ImagePad,
    /// `<|pad|>`: fills a batch, never predicted.
    Pad,
}

impl Special {
    /// All special tokens in the order of their ids.
    pub const ALL: [Special; 7] = [
        Special::EndOfText,
        Special::ImStart,
        Special::ImEnd,
        Special::VisionStart,
        Special::VisionEnd,
        Special::ImagePad,
        Special::Pad,
    ];

    /// The name, as Qwen2.5 spells it where it has the token.
    pub fn name(self) -> &'static str {
        match self {
            Special::EndOfText => "<|endoftext|>",
            Special::ImStart => "<|im_start|>",
            Special::ImEnd => "<|im_end|>",
            Special::VisionStart => "<|vision_start|>",
            Special::VisionEnd => "<|vision_end|>",
            Special::ImagePad => "<|image_pad|>",
            Special::Pad => "<|pad|>",
        }
    }
}

const BYTES: i32 = 256;

/// A text tokenizer.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub enum TextTokenizer {
    /// One token a byte of UTF-8, ids 0 to 255; then the special tokens in the order of
    /// [`Special::ALL`], 256 to 262; then padding up to a vocabulary of 264.
    #[default]
    Bytes,
}

impl TextTokenizer {
    /// Rows of the embedding table, V: all ids are below it. Padded to a multiple of 8.
    pub fn vocabulary(&self) -> usize {
        match self {
            TextTokenizer::Bytes => (BYTES as usize + Special::ALL.len()).next_multiple_of(8),
        }
    }

    /// The id of a special token.
    pub fn special(&self, token: Special) -> i32 {
        match self {
            TextTokenizer::Bytes => BYTES + token as i32,
        }
    }

    /// The ids of `text`. Names of special tokens in it are ordinary text.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>> {
        match self {
            TextTokenizer::Bytes => Ok(text.bytes().map(i32::from).collect()),
        }
    }

    /// The text of `ids`, without special tokens and ids outside the vocabulary. Bytes that are not
    /// UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[i32]) -> String {
        self.text(ids, |_| String::new())
    }

    /// The text of `ids` with special tokens by name; ids that mean nothing are shown as `<|id 263|>`.
    pub fn decode_visible(&self, ids: &[i32]) -> String {
        self.text(ids, |id| match Special::ALL.into_iter().find(|&s| self.special(s) == id) {
            Some(special) => special.name().into(),
            None => format!("<|id {id}|>"),
        })
    }

    fn text(&self, ids: &[i32], other: impl Fn(i32) -> String) -> String {
        match self {
            TextTokenizer::Bytes => {
                let mut bytes = Vec::with_capacity(ids.len());
                for &id in ids {
                    match u8::try_from(id) {
                        Ok(byte) => bytes.push(byte),
                        Err(_) => bytes.extend(other(id).into_bytes()),
                    }
                }
                String::from_utf8_lossy(&bytes).into_owned()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips() {
        let t = TextTokenizer::default();
        for text in ["", "a red circle", "größer, 色, 🟥\0\n", "<|im_start|>user<|im_end|>"] {
            let ids = t.encode(text).unwrap();
            assert_eq!(ids.len(), text.len());
            assert!(ids.iter().all(|id| (0..256).contains(id)), "specials are not parsed out of text");
            assert_eq!(t.decode(&ids), text);
            assert_eq!(t.decode_visible(&ids), text);
        }
    }

    #[test]
    fn special_ids_are_fixed() {
        let t = TextTokenizer::Bytes;
        assert_eq!(Special::ALL.map(|s| t.special(s)), [256, 257, 258, 259, 260, 261, 262]);
        assert_eq!(t.special(Special::EndOfText), 256);
        assert_eq!(t.special(Special::Pad), 262);
        assert_eq!(t.vocabulary(), 264);
    }

    #[test]
    fn specials_are_hidden_or_named() {
        let t = TextTokenizer::Bytes;
        let ids = [259, 261, 260, b'h' as i32, 256, b'i' as i32, 263, -1, 9999];
        assert_eq!(t.decode(&ids), "hi");
        assert_eq!(
            t.decode_visible(&ids),
            "<|vision_start|><|image_pad|><|vision_end|>h<|endoftext|>i<|id 263|><|id -1|><|id 9999|>"
        );
    }

    #[test]
    fn broken_utf8_does_not_fail() {
        assert_eq!(TextTokenizer::Bytes.decode(&[0xe8, b'x' as i32, 0xff]), "\u{fffd}x\u{fffd}");
    }
}
