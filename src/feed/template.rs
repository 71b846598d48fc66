//! How text and pictures become the sequences that the language model reads.

use crate::config::Config;
use crate::data::{Special, TextTokenizer};
use crate::error::{Error, Result};
use crate::files;
use crate::model::Part;

/// How text and pictures are laid out as sequences; text is ChatML.
pub struct Template {
    text: TextTokenizer,
    most: usize,
}

impl Template {
    /// The layout of a configuration, and the name of its text tokenizer as [`History`](crate::io::History) keeps it.
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

    /// The layout over a text tokenizer; texts are cut after `max_text_tokens`.
    pub fn new(text: TextTokenizer, max_text_tokens: usize) -> Self {
        Template { text, most: max_text_tokens }
    }

    /// The text tokenizer.
    pub fn tokenizer(&self) -> &TextTokenizer {
        &self.text
    }

    /// Most tokens of a text.
    pub fn max_text_tokens(&self) -> usize {
        self.most
    }

    /// Whether a text is cut.
    pub fn is_cut(&self, text: &str) -> Result<bool> {
        // A token is a byte or more.
        Ok(text.len() > self.most && self.text.encode(text)?.len() > self.most)
    }

    /// A text as tokens, cut if it is too long, and `end` after it unless it was: it does not end there.
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

    /// `<|vision_start|>` image `<|vision_end|>`: what precedes a caption.
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

    /// A user's turn with a picture and a question, up to where the answer begins.
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

    /// What is learnt of an answer: its text and the end of the turn.
    pub fn answer(&self, answer: &str) -> Result<Vec<i32>> {
        self.encode(answer, Some(Special::ImEnd))
    }

    /// A question about a picture and its answer.
    pub fn chat(&self, image: usize, question: &str, answer: &str) -> Result<Vec<Part>> {
        let mut parts = self.question(Some(image), question)?;
        parts.push(Part::target(self.answer(answer)?));
        Ok(parts)
    }

    /// What precedes `<|vision_start|>` where a picture is to be drawn: the text of the prompt.
    pub fn drawing(&self, prompt: &str) -> Result<Vec<i32>> {
        self.encode(prompt, None)
    }

    /// The token that begins a picture.
    pub fn begin_picture(&self) -> i32 {
        self.special(Special::VisionStart)
    }

    /// A prompt and its picture, every code learnt; without a prompt, any picture.
    pub fn drawn(&self, image: usize, prompt: Option<&str>) -> Result<Vec<Part>> {
        let mut ids = self.drawing(prompt.unwrap_or_default())?;
        ids.push(self.begin_picture());
        Ok(vec![Part::context(ids), Part::Codes(image)])
    }

    /// A caption without its picture, every token learnt.
    pub fn text_caption(&self, caption: &str) -> Result<Vec<Part>> {
        Ok(vec![Part::target(self.encode(caption, Some(Special::EndOfText))?)])
    }

    /// A question and its answer without the picture, every token learnt.
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

    /// A sequence as a person reads it: special tokens by name, pictures as `<image 0>`, supervised text in
    /// `[[ ]]`.
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
