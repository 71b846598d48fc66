//! The texts of a picture.

use std::path::PathBuf;

use super::look::Scene;

/// A picture's name and texts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sample {
    /// The picture's file, its place in a shard or table (`train-0.tar/0001.jpg`), or the name of a built-in picture. Empty
    /// for texts without a picture, which only `text` stages can use.
    pub image: PathBuf,
    /// Its captions, each of them complete: a step uses one.
    pub captions: Vec<String>,
    /// What to draw, if it is worded differently from the captions.
    pub prompt: Option<String>,
    /// Conversations about it.
    pub chats: Vec<Chat>,
    /// What a built-in picture shows.
    pub scene: Option<Scene>,
}

/// A conversation about a picture, which stands in its first turn.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chat {
    /// The line of the system that precedes it, in place of `data.system`.
    pub system: Option<String>,
    /// Questions, each with its answer; at least one.
    pub turns: Vec<(String, String)>,
}

impl Sample {
    /// Whether it has a picture: conversations may have none.
    pub fn has_picture(&self) -> bool {
        !self.image.as_os_str().is_empty()
    }

    /// The first caption.
    pub fn caption(&self) -> Option<&str> {
        self.captions.first().map(String::as_str)
    }

    /// The text from which a model draws the picture: the prompt, or else the first caption.
    pub fn drawing_prompt(&self) -> Option<&str> {
        self.prompt.as_deref().or(self.caption())
    }

    /// The questions of all turns of all conversations, each with its answer.
    pub fn turns(&self) -> impl Iterator<Item = (&str, &str)> {
        self.chats.iter().flat_map(|c| &c.turns).map(|(q, a)| (q.as_str(), a.as_str()))
    }

    /// The questions that need no earlier turn: the first one of each conversation, with its answer.
    pub fn questions(&self) -> impl Iterator<Item = (&str, &str)> {
        self.chats.iter().filter_map(|c| c.turns.first()).map(|(q, a)| (q.as_str(), a.as_str()))
    }

    /// The conversations up to their first answer.
    pub fn openings(&self) -> impl Iterator<Item = Chat> {
        let first =
            |c: &Chat| Chat { system: c.system.clone(), turns: c.turns[..c.turns.len().min(1)].to_vec() };
        self.chats.iter().filter(|c| !c.turns.is_empty()).map(first)
    }
}

impl Chat {
    /// A single question and its answer.
    pub fn of(question: impl Into<String>, answer: impl Into<String>) -> Self {
        Chat { system: None, turns: vec![(question.into(), answer.into())] }
    }
}
