//! Which columns of a table hold pictures and texts.

use parquet::basic::{ConvertedType, LogicalType, Type};
use parquet::file::metadata::FileMetaData;
use parquet::schema::types::ColumnDescriptor;
use serde_json::Value;

use super::super::source::Columns;

/// Columns that may be pictures, in order of preference.
const IMAGES: [&str; 6] = ["image", "jpg", "png", "jpeg", "webp", "images"];
const CAPTIONS: [&str; 3] = ["text", "caption", "captions"];
const CONVERSATIONS: [&str; 3] = ["conversations", "messages", "texts"];
/// Names of the members of a turn.
const TURNS: [[&str; 2]; 3] = [["from", "value"], ["role", "content"], ["user", "assistant"]];

/// The columns of a file, as numbers of leaves of its schema.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Layout {
    pub image: Images,
    pub captions: Vec<usize>,
    pub prompt: Option<usize>,
    /// Questions and answers.
    pub qa: Option<(usize, usize)>,
    pub conversations: Option<Turns>,
    /// Columns with known names that cannot be read, with the reason.
    pub unread: Vec<String>,
}

/// Where pictures are: the bytes of files, names of files, or both, with the name used where there are no bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Images {
    pub bytes: Option<usize>,
    pub path: Option<usize>,
    /// Whether each row has a list of pictures.
    pub listed: bool,
}

/// Where conversations are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turns {
    /// Text in JSON.
    Json(usize),
    /// Lists of turns with two members, such as `from` and `value`.
    Pairs([(&'static str, usize); 2]),
}

impl Layout {
    /// Chooses the columns that `wanted` names, or those with usual names. The error says what is wrong.
    pub fn new(meta: &FileMetaData, wanted: &Columns) -> Result<Layout, String> {
        let table = Schema(meta);
        let image = table.image(wanted.image.as_deref())?;
        let mut unread = Vec::new();
        let mut text = |key: &str, given: Option<&str>, usual: &str| match given {
            Some(name) => table.text(key, name).map(Some),
            None if table.has(usual) => Ok(table.text(key, usual).map_err(|e| unread.push(e)).ok()),
            None => Ok(None),
        };
        let prompt = text("prompt", wanted.prompt.as_deref(), "prompt")?;
        let question = text("question", wanted.question.as_deref(), "question")?;
        let answer = text("answer", wanted.answer.as_deref(), "answer")?;
        let qa = match (question, answer) {
            (Some(q), Some(a)) => Some((q, a)),
            (Some(_), None) if wanted.question.is_some() => {
                return Err(table.missing("questions need answers: `answer`", "answer"));
            }
            (None, Some(_)) if wanted.answer.is_some() => {
                return Err(table.missing("answers need questions: `question`", "question"));
            }
            _ => None,
        };
        let captions = match &wanted.captions {
            Some(names) => names.iter().map(|n| table.text("captions", n)).collect::<Result<_, _>>()?,
            None => CAPTIONS
                .iter()
                .filter(|n| table.has(n))
                .filter_map(|n| table.text("captions", n).map_err(|e| unread.push(e)).ok())
                .collect(),
        };
        let conversations = match &wanted.conversations {
            Some(name) => Some(table.turns(name)?),
            None => CONVERSATIONS
                .iter()
                .filter(|n| table.has(n))
                .find_map(|n| table.turns(n).map_err(|e| unread.push(e)).ok()),
        };
        Ok(Layout { image, captions, prompt, qa, conversations, unread })
    }
}

/// The schema of a file.
struct Schema<'a>(&'a FileMetaData);

impl Schema<'_> {
    fn names(&self) -> Vec<&str> {
        self.0.schema_descr().root_schema().get_fields().iter().map(|f| f.name()).collect()
    }

    fn has(&self, name: &str) -> bool {
        self.names().contains(&name)
    }

    /// The leaves of a column with their numbers.
    fn leaves(&self, name: &str) -> Vec<(usize, &ColumnDescriptor)> {
        let all = self.0.schema_descr().columns().iter().enumerate().map(|(i, c)| (i, &**c));
        all.filter(|(_, c)| c.path().parts().first().is_some_and(|p| p == name)).collect()
    }

    fn missing(&self, key: &str, name: &str) -> String {
        let names = self.names().join(", ");
        format!("there is no column {name:?} ({key} of data.columns); the columns are {names}")
    }

    fn given(&self, key: &str, name: &str) -> Result<Vec<(usize, &ColumnDescriptor)>, String> {
        match self.has(name) {
            true => Ok(self.leaves(name)),
            false => Err(self.missing(&format!("`{key}`"), name)),
        }
    }

    fn text(&self, key: &str, name: &str) -> Result<usize, String> {
        match &self.given(key, name)?[..] {
            [(i, c)] if c.physical_type() == Type::BYTE_ARRAY && c.max_rep_level() <= 1 => Ok(*i),
            _ => Err(format!("the column {name:?} is not read: wanted texts or lists of texts")),
        }
    }

    fn turns(&self, name: &str) -> Result<Turns, String> {
        let leaves = self.given("conversations", name)?;
        if let [(i, c)] = leaves[..]
            && c.physical_type() == Type::BYTE_ARRAY
            && c.max_rep_level() == 0
        {
            return Ok(Turns::Json(i));
        }
        let member = |name: &'static str| {
            let fits = |c: &ColumnDescriptor| c.physical_type() == Type::BYTE_ARRAY && c.max_rep_level() == 1;
            leaves.iter().find(|(_, c)| c.name() == name && fits(c)).map(|(i, _)| (name, *i))
        };
        let found = TURNS.iter().find_map(|[a, b]| Some(Turns::Pairs([member(a)?, member(b)?])));
        found.ok_or_else(|| {
            let members: Vec<&str> = leaves.iter().map(|(_, c)| c.name()).collect();
            format!(
                "the column {name:?} is not read: its members are {}, wanted lists of texts from and value, role and \
                 content, or user and assistant",
                members.join(", ")
            )
        })
    }

    fn image(&self, given: Option<&str>) -> Result<Images, String> {
        let declared = self.declared();
        let usual = || IMAGES.iter().find(|n| self.has(n)).map(|n| n.to_string());
        let Some(name) = given.map(String::from).or(declared).or_else(usual) else {
            let names = self.names().join(", ");
            return Err(format!(
                "no column of pictures found among {names}; name it with data.columns = {{ image = \"..\" }}"
            ));
        };
        let wrong = || {
            format!(
                "the column {name:?} holds no pictures: wanted the bytes of picture files, their names, or a struct of \
                 bytes and path"
            )
        };
        let fits = |c: &ColumnDescriptor| c.physical_type() == Type::BYTE_ARRAY && c.max_rep_level() <= 1;
        let leaves: Vec<_> = self.given("image", &name)?.into_iter().filter(|(_, c)| fits(c)).collect();
        let images = match leaves[..] {
            [(i, c)] if is_text(c) => Images { path: Some(i), ..Images::default() },
            [(i, c)] => Images { bytes: Some(i), listed: c.max_rep_level() > 0, ..Images::default() },
            _ => {
                let member = |name: &str| leaves.iter().find(|(_, c)| c.name() == name);
                let listed = leaves.iter().any(|(_, c)| c.max_rep_level() > 0);
                // Which of the names in a list belongs to the picture without bytes is not looked for.
                let path = member("path").filter(|_| !listed).map(|(i, _)| *i);
                Images { bytes: member("bytes").map(|(i, _)| *i), path, listed }
            }
        };
        match images {
            Images { bytes: None, path: None, .. } | Images { bytes: None, listed: true, .. } => Err(wrong()),
            images => Ok(images),
        }
    }

    /// The first column that the metadata of Hugging Face declares as pictures.
    fn declared(&self) -> Option<String> {
        let pairs = self.0.key_value_metadata()?;
        let text = pairs.iter().find(|p| p.key == "huggingface")?.value.as_ref()?;
        let info: Value = serde_json::from_str(text).ok()?;
        let features = info.get("info")?.get("features")?;
        let is_image = |name: &&str| features.get(name).and_then(|f| f.get("_type")) == Some(&"Image".into());
        self.names().into_iter().find(is_image).map(String::from)
    }
}

fn is_text(c: &ColumnDescriptor) -> bool {
    let logical = matches!(c.logical_type_ref(), Some(LogicalType::String));
    (logical || c.converted_type() == ConvertedType::UTF8) && c.max_rep_level() == 0
}
