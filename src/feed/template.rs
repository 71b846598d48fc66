//! The layout of text and pictures as sequences for the language model.

use crate::config::{Config, DataConfig};
use crate::data::{Chat, Special, TextTokenizer};
use crate::error::{Error, Result};
use crate::files;
use crate::model::Part;

/// The layout of text and pictures as sequences, in the ChatML format.
pub struct Template {
    text: TextTokenizer,
    most: usize,
    system: String,
}

impl Template {
    /// The layout for a configuration, and the name of its text tokenizer as recorded in
    /// [`History`](crate::io::History).
    pub(crate) fn of(cfg: &Config) -> Result<(Self, String)> {
        let template = Template::of_data(&cfg.data)?;
        let vocabulary = template.tokenizer().vocabulary();
        if cfg.llm.vocab < vocabulary {
            let want = format!("at least {vocabulary}, the text tokenizer's");
            return Err(Error::config("llm.vocab", cfg.llm.vocab, want));
        }
        let name = match &cfg.data.tokenizer {
            None => "bytes".into(),
            Some(path) => format!("checksum {:08x}", files::checksum(path)?.crc32),
        };
        Ok((template, name))
    }

    /// The layout for `[data]` of a configuration.
    pub fn of_data(data: &DataConfig) -> Result<Self> {
        let text = TextTokenizer::open(data.tokenizer.as_deref())?;
        Ok(Template::new(text, data.max_text_tokens).with_system(&data.system))
    }

    /// The layout with this text tokenizer; texts are cut after `max_text_tokens` tokens.
    pub fn new(text: TextTokenizer, max_text_tokens: usize) -> Self {
        Template { text, most: max_text_tokens, system: String::new() }
    }

    /// The same with a line of the system at the start of every conversation that has none of its own; empty: none.
    pub fn with_system(self, system: &str) -> Self {
        Template { system: system.into(), ..self }
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

    /// The start of a conversation with an optional picture: the line of the system, if there is one, and the user's turn
    /// with a question, up to the start of the answer.
    pub fn question(&self, image: Option<usize>, question: &str) -> Result<Vec<Part>> {
        self.first_turn(image, None, question)
    }

    /// The start of a conversation about a picture, with its own line of the system if it has one.
    pub fn opening(&self, image: usize, chat: &Chat, question: &str) -> Result<Vec<Part>> {
        self.first_turn(Some(image), chat.system.as_deref(), question)
    }

    fn first_turn(&self, image: Option<usize>, system: Option<&str>, question: &str) -> Result<Vec<Part>> {
        let mut open = Vec::new();
        let system = system.unwrap_or(&self.system);
        if !system.is_empty() {
            self.turn(&mut open, "system\n")?;
            open.extend(self.encode(system, None)?);
            self.end_turn(&mut open)?;
        }
        self.turn(&mut open, "user\n")?;
        let mut parts = vec![Part::context(open)];
        if let Some(image) = image {
            parts.extend(self.picture(image));
        }
        parts.push(Part::context(self.asked(question)?));
        Ok(parts)
    }

    /// `<|im_start|>` and the name of the speaker.
    fn turn(&self, ids: &mut Vec<i32>, speaker: &str) -> Result<()> {
        ids.push(self.special(Special::ImStart));
        ids.extend(self.text.encode(speaker)?);
        Ok(())
    }

    /// `<|im_end|>` and the line break after it.
    fn end_turn(&self, ids: &mut Vec<i32>) -> Result<()> {
        ids.push(self.special(Special::ImEnd));
        ids.extend(self.text.encode("\n")?);
        Ok(())
    }

    /// A question up to the start of its answer.
    fn asked(&self, question: &str) -> Result<Vec<i32>> {
        let mut ids = self.encode(question, None)?;
        self.end_turn(&mut ids)?;
        self.turn(&mut ids, "assistant\n")?;
        Ok(ids)
    }

    /// The supervised tokens of an answer: its text and the end of the turn.
    pub fn answer(&self, answer: &str) -> Result<Vec<i32>> {
        self.encode(answer, Some(Special::ImEnd))
    }

    /// A conversation about a picture. Its supervised parts are the answers, each with the end of its turn.
    ///
    /// A conversation ends before the turn with which its questions and answers would have more than `max_text_tokens`
    /// tokens, but has at least one turn.
    pub fn chat(&self, image: usize, chat: &Chat) -> Result<Vec<Part>> {
        self.conversation(Some(image), chat)
    }

    fn conversation(&self, image: Option<usize>, chat: &Chat) -> Result<Vec<Part>> {
        let mut parts = Vec::new();
        for (i, (question, answer)) in chat.turns.iter().take(self.turns(chat)?).enumerate() {
            match i {
                0 => parts = self.first_turn(image, chat.system.as_deref(), question)?,
                _ => {
                    let mut ids = self.text.encode("\n")?;
                    self.turn(&mut ids, "user\n")?;
                    ids.extend(self.asked(question)?);
                    parts.push(Part::context(ids));
                }
            }
            parts.push(Part::target(self.answer(answer)?));
        }
        Ok(parts)
    }

    /// The number of turns that a conversation may have.
    fn turns(&self, chat: &Chat) -> Result<usize> {
        let mut tokens = 0;
        for (i, (question, answer)) in chat.turns.iter().enumerate() {
            tokens += self.encode(question, None)?.len() + self.encode(answer, None)?.len();
            if i > 0 && tokens > self.most {
                return Ok(i);
            }
        }
        Ok(chat.turns.len())
    }

    /// Whether a conversation is too long and loses its last turns.
    pub fn loses_turns(&self, chat: &Chat) -> Result<bool> {
        let bytes: usize = chat.turns.iter().map(|(q, a)| q.len() + a.len()).sum();
        Ok(bytes > self.most && self.turns(chat)? < chat.turns.len())
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

    /// A conversation without the picture, with every token supervised.
    pub fn text_chat(&self, chat: &Chat) -> Result<Vec<Part>> {
        let mut all = Vec::new();
        for part in self.conversation(None, chat)? {
            if let Part::Tokens { ids, .. } = part {
                all.extend(ids);
            }
        }
        Ok(vec![Part::target(all)])
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
