//! Conversations as data sets write them.

use serde_json::{Map, Value};

use super::plain::trimmed;
use super::sample::Chat;

/// What stands for the picture in a question.
const PLACEHOLDER: &str = "<image>";

/// A conversation that a step can use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Talk {
    /// Its turns, without the placeholder.
    pub chat: Chat,
    /// Whether a placeholder said that there is a picture.
    pub shown: bool,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Speaker {
    System,
    User,
    Assistant,
}

impl Speaker {
    fn of(name: &str) -> Result<Self, String> {
        match name {
            "system" => Ok(Speaker::System),
            "human" | "user" => Ok(Speaker::User),
            "gpt" | "assistant" | "model" | "chatgpt" => Ok(Speaker::Assistant),
            other => Err(format!("a turn is from {other:?}, wanted \"human\", \"gpt\" or \"system\"")),
        }
    }
}

/// Reads a list of turns, in any of three forms: `{"from": "human", "value": ".."}`, `{"role": "user", "content": ".."}`,
/// where the content may also be a list of parts with a type, and `{"user": "..", "assistant": ".."}`, which is two
/// turns. If the conversation cannot be used, returns the reason.
///
/// Questions and answers take turns, and a question comes first: a conversation in which one side speaks twice, or
/// whose last question has no answer, is not repaired, because nobody knows what is missing. A picture may be shown
/// once, in the first question.
pub(super) fn chat(turns: &Value) -> Result<Talk, String> {
    let Value::Array(turns) = turns else {
        return Err("the conversation is not a list of turns".into());
    };
    let mut said = Vec::new();
    for turn in turns {
        let Value::Object(turn) = turn else {
            return Err("a turn of the conversation is not an object".into());
        };
        let text = |key: &str| turn.get(key).map(content).transpose();
        match (name(turn, "from"), name(turn, "role"), text("user")?, text("assistant")?) {
            (Some(from), ..) => said.push((Speaker::of(from)?, text("value")?.unwrap_or_default())),
            (_, Some(role), ..) => said.push((Speaker::of(role)?, text("content")?.unwrap_or_default())),
            (_, _, Some(question), Some(answer)) => {
                said.extend([(Speaker::User, question), (Speaker::Assistant, answer)]);
            }
            _ => {
                return Err(
                    "a turn has neither from and value, role and content, nor user and assistant".into()
                );
            }
        }
    }
    talk(said)
}

fn name<'a>(turn: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    turn.get(key).and_then(Value::as_str)
}

/// The text of a turn; pictures among its parts become placeholders. Without parts of other types, such as videos,
/// nobody knows what was asked.
fn content(value: &Value) -> Result<String, String> {
    let part = |part: &Value| match part.get("type").and_then(Value::as_str) {
        Some("image" | "image_url") => Ok(PLACEHOLDER.to_string()),
        None | Some("text") => part.get("text").map_or(Ok(String::new()), content),
        Some(other) => Err(format!("a turn has a part of type {other:?}, wanted \"text\" or \"image\"")),
    };
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => parts.iter().map(part).collect(),
        _ => Ok(String::new()),
    }
}

fn talk(said: Vec<(Speaker, String)>) -> Result<Talk, String> {
    let mut said = said.into_iter().peekable();
    let mut chat = Chat::default();
    if let Some((_, text)) = said.next_if(|(who, _)| *who == Speaker::System) {
        chat.system = Some(trimmed(&text).to_string()).filter(|t| !t.is_empty());
    }
    let mut shown = 0;
    while let Some((who, question)) = said.next() {
        match who {
            Speaker::User => {}
            Speaker::System => return Err("a turn of the system stands inside the conversation".into()),
            Speaker::Assistant if chat.turns.is_empty() => {
                return Err("the conversation begins with an answer".into());
            }
            Speaker::Assistant => return Err("two answers follow one another".into()),
        }
        let answer = match said.next() {
            None => return Err("the last question has no answer".into()),
            Some((Speaker::Assistant, answer)) => answer,
            Some((Speaker::User, _)) => return Err("two questions follow one another".into()),
            Some((Speaker::System, _)) => {
                return Err("a turn of the system stands inside the conversation".into());
            }
        };
        let places = question.matches(PLACEHOLDER).count();
        if places > 0 && !chat.turns.is_empty() {
            return Err(format!("{PLACEHOLDER} stands in a later turn, wanted only in the first question"));
        }
        if answer.contains(PLACEHOLDER) {
            return Err(format!("{PLACEHOLDER} stands in an answer, wanted only in the first question"));
        }
        shown += places;
        let question = without_placeholder(&question);
        let (question, answer) = (trimmed(&question), trimmed(&answer));
        if question.is_empty() {
            return Err("a question is empty".into());
        }
        if answer.is_empty() {
            return Err("an answer is empty".into());
        }
        chat.turns.push((question.into(), answer.into()));
    }
    match shown {
        _ if chat.turns.is_empty() => Err("the conversation is empty".into()),
        0 | 1 => Ok(Talk { chat, shown: shown == 1 }),
        n => Err(format!("it shows {n} pictures, wanted one")),
    }
}

/// The question without placeholders, each with the line break beside it.
fn without_placeholder(question: &str) -> String {
    let mut parts = question.split(PLACEHOLDER);
    let mut out = parts.next().unwrap_or_default().to_string();
    for part in parts {
        let after = part.strip_prefix("\r\n").or_else(|| part.strip_prefix('\n'));
        if after.is_none() && (part.is_empty() || out.is_empty()) {
            // At the end of the question the line break stands before it.
            let kept = out.trim_end_matches(['\r', '\n']).len();
            out.truncate(kept);
        }
        out += after.unwrap_or(part);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn turns(value: Value) -> Vec<(String, String)> {
        chat(&value).unwrap().chat.turns
    }

    #[test]
    fn all_three_forms_are_read() {
        let want = [("What is it?".to_string(), "A cat.".to_string())];
        for value in [
            json!([{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": " A cat.\n"}]),
            json!([{"role": "user", "content": "What is it?<image>"}, {"role": "assistant", "content": "A cat."}]),
            json!([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                   {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]),
        ] {
            let talk = chat(&value).unwrap();
            assert_eq!((&talk.chat.turns[..], talk.shown, talk.chat.system), (&want[..], true, None));
        }
        let value = json!([{"user": "What is it?", "assistant": "A cat.", "source": "x"}]);
        assert_eq!(turns(value.clone()), want);
        assert!(!chat(&value).unwrap().shown);
        let system = json!([{"role": "system", "content": "Be brief."}, {"user": "q", "assistant": "a"}]);
        assert_eq!(chat(&system).unwrap().chat.system.as_deref(), Some("Be brief."));
    }

    #[test]
    fn placeholders_go_with_the_line_break_beside_them() {
        for (question, want) in [
            ("<image>\nWhat?", "What?"),
            ("What?\n<image>", "What?"),
            ("What?\r\n<image>", "What?"),
            ("Look: <image> What?", "Look:  What?"),
            ("Look:\n<image>\nWhat?", "Look:\nWhat?"),
            ("two\n\nparagraphs", "two\n\nparagraphs"),
        ] {
            let value = json!([{"from": "human", "value": question}, {"from": "gpt", "value": "a"}]);
            assert_eq!(turns(value)[0].0, want, "{question:?}");
        }
    }

    #[test]
    fn what_cannot_be_used_has_a_reason() {
        let (q, a) = (json!({"from": "human", "value": "q"}), json!({"from": "gpt", "value": "a"}));
        let s = json!({"from": "system", "value": "s"});
        let empty = json!({"from": "gpt", "value": " \n"});
        let shown = json!({"from": "human", "value": "<image> <image> q"});
        let later = json!({"from": "human", "value": "<image>\nr"});
        for (value, want) in [
            (json!("text"), "not a list of turns"),
            (json!([]), "the conversation is empty"),
            (json!([s]), "the conversation is empty"),
            (json!(["q", "a"]), "not an object"),
            (json!([{"a": 1}]), "neither from and value"),
            (json!([a, q]), "begins with an answer"),
            (json!([q, q, a]), "two questions follow"),
            (json!([q, a, a]), "two answers follow"),
            (json!([q, a, q]), "the last question has no answer"),
            (json!([q, s, a]), "a turn of the system"),
            (json!([q, a, s]), "a turn of the system"),
            (json!([q, empty]), "an answer is empty"),
            (json!([{"from": "human", "value": "<image>"}, a]), "a question is empty"),
            (json!([shown, a]), "shows 2 pictures"),
            (json!([q, a, later, a]), "<image> stands in a later turn"),
            (json!([{"from": "cat", "value": "q"}, a]), "from \"cat\", wanted"),
            (json!([q, {"from": "gpt"}]), "an answer is empty"),
            (json!([q, {"from": "gpt", "value": "<image>\na"}]), "<image> stands in an answer"),
            (
                json!([{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "q"}]}, a]),
                "a part of type \"video\", wanted",
            ),
        ] {
            let reason = chat(&value).unwrap_err();
            assert!(reason.contains(want), "{reason}: wanted {want}");
        }
    }
}
