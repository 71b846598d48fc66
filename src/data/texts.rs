//! The texts of a sample as a JSON object, in the metadata of folders and in shards.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::plain::trimmed;
use super::sample::{Chat, Sample};

/// A conversation in files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ChatLine {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    pub turns: Vec<(String, String)>,
}

impl From<&Chat> for ChatLine {
    fn from(chat: &Chat) -> Self {
        ChatLine { system: chat.system.clone(), turns: chat.turns.clone() }
    }
}

impl From<ChatLine> for Chat {
    fn from(line: ChatLine) -> Self {
        Chat { system: line.system, turns: line.turns }
    }
}

/// The text without surrounding whitespace, unless it is empty.
pub(super) fn said(text: Option<String>) -> Option<String> {
    text.map(|t| trimmed(&t).to_string()).filter(|t| !t.is_empty())
}

/// Captions that several places give: those of the later place as they are, after those of the earlier place that the
/// later one does not repeat.
pub(super) fn joined(earlier: Vec<String>, later: Vec<String>) -> Vec<String> {
    let mut all: Vec<String> = Vec::with_capacity(earlier.len() + later.len());
    for caption in earlier {
        if !later.contains(&caption) && !all.contains(&caption) {
            all.push(caption);
        }
    }
    all.extend(later);
    all
}

/// The conversations of the keys `qa` and `chats`, and whether something was left out because it is empty.
pub(super) fn chats(qa: Vec<(String, String)>, chats: Vec<ChatLine>) -> (Vec<Chat>, bool) {
    let single = qa.into_iter().map(|turn| ChatLine { system: None, turns: vec![turn] });
    let (mut all, mut empty) = (Vec::new(), false);
    for line in single.chain(chats) {
        let asked = line.turns.len();
        let clean = |(q, a): (String, String)| Some((said(Some(q))?, said(Some(a))?));
        let turns: Vec<(String, String)> = line.turns.into_iter().map_while(clean).collect();
        empty |= turns.len() < asked || asked == 0;
        if !turns.is_empty() {
            all.push(Chat { system: said(line.system), turns });
        }
    }
    (all, empty)
}

/// The object that holds the texts of a sample, without the name of its picture: the keys `text` (the first caption),
/// `captions` (all of them, if there are several), `prompt`, `qa` (if every conversation is one question), otherwise
/// `chats`, and `text_only` for a sample without a picture. What a built-in picture shows is not part of it.
pub(super) fn object(sample: &Sample) -> Map<String, Value> {
    let mut map = Map::new();
    if !sample.has_picture() {
        map.insert("text_only".into(), Value::Bool(true));
    }
    if let Some(first) = sample.caption() {
        map.insert("text".into(), json!(first));
    }
    if sample.captions.len() > 1 {
        map.insert("captions".into(), json!(sample.captions));
    }
    if let Some(prompt) = &sample.prompt {
        map.insert("prompt".into(), json!(prompt));
    }
    let single = |chat: &Chat| chat.system.is_none() && chat.turns.len() == 1;
    if sample.chats.is_empty() {
        return map;
    }
    match sample.chats.iter().all(single) {
        true => map.insert("qa".into(), sample.chats.iter().map(|c| json!(c.turns[0])).collect()),
        false => map.insert("chats".into(), sample.chats.iter().map(|c| json!(ChatLine::from(c))).collect()),
    };
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captions_of_two_places_are_not_doubled_and_keep_their_order() {
        let all = |a: &[&str], b: &[&str]| {
            let owned = |x: &[&str]| x.iter().map(|s| s.to_string()).collect();
            joined(owned(a), owned(b))
        };
        assert_eq!(all(&["a"], &["a", "b", "a"]), ["a", "b", "a"]);
        assert_eq!(all(&["a", "c", "c"], &["b"]), ["a", "c", "b"]);
        assert_eq!(all(&["b"], &["a", "b"]), ["a", "b"]);
    }

    #[test]
    fn a_conversation_ends_before_a_turn_that_is_empty() {
        let turn = |q: &str, a: &str| (q.to_string(), a.to_string());
        let line = |turns| ChatLine { system: Some(" be brief ".into()), turns };
        let (all, empty) = chats(
            vec![turn(" q ", "a"), turn("", "a")],
            vec![line(vec![turn("1", "2"), turn("3", ""), turn("5", "6")]), line(vec![])],
        );
        assert!(empty);
        assert_eq!(all[0], Chat::of("q", "a"));
        assert_eq!(all[1], Chat { system: Some("be brief".into()), turns: vec![turn("1", "2")] });
        assert_eq!(all.len(), 2);
    }

    #[test]
    fn the_object_has_the_keys_that_are_needed() {
        let mut sample = Sample { image: "a.png".into(), ..Sample::default() };
        assert!(object(&sample).is_empty());
        sample.captions = vec!["a".into()];
        sample.chats = vec![Chat::of("q", "a")];
        assert_eq!(Value::from(object(&sample)), json!({ "text": "a", "qa": [["q", "a"]] }));
        sample.captions.push("b".into());
        sample.chats[0].system = Some("s".into());
        sample.image = Default::default();
        let want = json!({ "text_only": true, "text": "a", "captions": ["a", "b"],
            "chats": [{ "system": "s", "turns": [["q", "a"]] }] });
        assert_eq!(Value::from(object(&sample)), want);
    }
}
