//! The layout of text and pictures as sequences for the language model.

use crate::config::Config;
use crate::data::{Special, TextTokenizer};
use crate::error::{Error, Result};
use crate::files;
use crate::model::Part;

/// The layout of text and pictures as sequences, in the ChatML format.
pub struct Template {
    text: TextTokenizer,
    most: usize,
}

impl Template {
    /// The layout for a configuration, and the name of its text tokenizer as recorded in
    /// [`History`](crate::io::History).
    pub(crate) fn of(cfg: &Config) -> Result<(Self, String)> {
        let path = cfg.data.tokenizer.as_deref();
        let template = Template::new(TextTokenizer::open(path)?, cfg.data.max_text_tokens);
        let vocabulary = template.tokenizer().vocabulary();
        if cfg.llm.vocab < vocabulary {
            let want = format!("at least {vocabulary}, the text tokenizer's");
            return Err(Error::config("llm.vocab", cfg.llm.vocab, want));
        }
        let name = match path {
            None => "bytes".into(),
            Some(path) => format!("checksum {:08x}", files::checksum(path)?.crc32),
        };
        Ok((template, name))
    }

    /// The layout with this text tokenizer; texts are cut after `max_text_tokens` tokens.
    pub fn new(text: TextTokenizer, max_text_tokens: usize) -> Self {
        Template { text, most: max_text_tokens }
    }

    /// The text tokenizer.
    pub fn tokenizer(&self) -> &TextTokenizer {
        &self.text
    }

    /// Maximum number of tokens of a text.
    pub fn max_text_tokens(&self) -> usize {
        self.most
    }

    /// Whether a text is too long and is cut.
    pub fn is_cut(&self, text: &str) -> Result<bool> {
        // Every token covers at least one byte, so short texts need not be encoded.
        Ok(text.len() > self.most && self.text.encode(text)?.len() > self.most)
    }

    /// The tokens of a text, followed by `end`. A text that is too long is cut and gets no `end`, since it does not
    /// end there.
    fn encode(&self, text: &str, end: Option<Special>) -> Result<Vec<i32>> {
        let mut ids = self.text.encode(text)?;
        match ids.len() > self.most {
            true => ids.truncate(self.most),
            false => ids.extend(end.map(|end| self.special(end))),
        }
        Ok(ids)
    }

    /// The token that ends a caption.
    pub fn end_of_text(&self) -> i32 {
        self.special(Special::EndOfText)
    }

    /// The token that ends an answer.
    pub fn end_of_turn(&self) -> i32 {
        self.special(Special::ImEnd)
    }

    fn special(&self, s: Special) -> i32 {
        self.text.special(s)
    }

    /// `<|vision_start|>` image `<|vision_end|>`: the context of a caption.
    pub fn picture(&self, image: usize) -> Vec<Part> {
        vec![
            Part::context(vec![self.special(Special::VisionStart)]),
            Part::Image(image),
            Part::context(vec![self.special(Special::VisionEnd)]),
        ]
    }

    /// A picture and its caption.
    pub fn caption(&self, image: usize, caption: &str) -> Result<Vec<Part>> {
        let mut parts = self.picture(image);
        parts.push(Part::target(self.encode(caption, Some(Special::EndOfText))?));
        Ok(parts)
    }

    /// A user's turn with an optional picture and a question, up to the start of the answer.
    pub fn question(&self, image: Option<usize>, question: &str) -> Result<Vec<Part>> {
        let mut open = vec![self.special(Special::ImStart)];
        open.extend(self.text.encode("user\n")?);
        let mut parts = vec![Part::context(open)];
        if let Some(image) = image {
            parts.extend(self.picture(image));
        }
        let mut close = self.encode(question, None)?;
        close.push(self.special(Special::ImEnd));
        close.extend(self.text.encode("\n")?);
        close.push(self.special(Special::ImStart));
        close.extend(self.text.encode("assistant\n")?);
        parts.push(Part::context(close));
        Ok(parts)
    }

    /// The supervised tokens of an answer: its text and the end of the turn.
    pub fn answer(&self, answer: &str) -> Result<Vec<i32>> {
        self.encode(answer, Some(Special::ImEnd))
    }

    /// A question about a picture, and its answer as the supervised part.
    pub fn chat(&self, image: usize, question: &str, answer: &str) -> Result<Vec<Part>> {
        let mut parts = self.question(Some(image), question)?;
        parts.push(Part::target(self.answer(answer)?));
        Ok(parts)
    }

    /// The tokens before `<|vision_start|>` in a request to draw a picture: the text of the prompt.
    pub fn drawing(&self, prompt: &str) -> Result<Vec<i32>> {
        self.encode(prompt, None)
    }

    /// The token that starts a picture.
    pub fn begin_picture(&self) -> i32 {
        self.special(Special::VisionStart)
    }

    /// A prompt and its picture, with every code supervised. Without a prompt, unconditional.
    pub fn drawn(&self, image: usize, prompt: Option<&str>) -> Result<Vec<Part>> {
        let mut ids = self.drawing(prompt.unwrap_or_default())?;
        ids.push(self.begin_picture());
        Ok(vec![Part::context(ids), Part::Codes(image)])
    }

    /// A caption without its picture, with every token supervised.
    pub fn text_caption(&self, caption: &str) -> Result<Vec<Part>> {
        Ok(vec![Part::target(self.encode(caption, Some(Special::EndOfText))?)])
    }

    /// A question and its answer without the picture, with every token supervised.
    pub fn text_chat(&self, question: &str, answer: &str) -> Result<Vec<Part>> {
        let mut ids = Vec::new();
        for part in self.question(None, question)? {
            if let Part::Tokens { ids: more, .. } = part {
                ids.extend(more);
            }
        }
        ids.extend(self.answer(answer)?);
        Ok(vec![Part::target(ids)])
    }

    /// A sequence as readable text: special tokens by name, pictures as `<image 0>`, supervised parts in `[[ ]]`.
    pub fn show(&self, parts: &[Part]) -> String {
        parts
            .iter()
            .map(|p| match p {
                Part::Tokens { ids, supervised: true } => format!("[[{}]]", self.text.decode_visible(ids)),
                Part::Tokens { ids, .. } => self.text.decode_visible(ids),
                Part::Image(i) => format!("<image {i}>"),
                Part::Codes(i) => format!("[[<image {i}>]]"),
            })
            .collect()
    }
}
