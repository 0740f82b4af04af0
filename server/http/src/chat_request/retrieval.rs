//! What a chat completion is to be answered from: a collection and what to search there, or passages that came with it.

use std::sync::Arc;

use engine::ChatMessage;
use serde_json::{Map, Value};

use super::super::values::{brief, cut, invalid, query, share, size, text};
use service::{GivenPassage, Passages, Search};
use settings::{MAX_TOP_CHUNKS, QuireError, Result};

/// Passages that may come with a question.
const MAX_PASSAGES: usize = 1024;
/// Bytes of one of them: beyond, it is a document, and belongs into a collection.
const MAX_PASSAGE_BYTES: usize = 1 << 20;
/// Bytes of what a passage is called.
const MAX_NAME_BYTES: usize = 2048;

const PASSAGE_FIELDS: &str = "a passage takes text, id, filename, title, url, and attributes or metadata";

/// The fields of `quire` about passages, as they came.
#[derive(Debug, Default)]
pub(super) struct Retrieval {
    collection: Option<String>,
    query: Option<String>,
    top_chunks: Option<usize>,
    score_threshold: Option<f32>,
    passages: Option<Vec<Arc<GivenPassage>>>,
}

impl Retrieval {
    /// Reads a field, called `name` in errors; false: it is none of these.
    pub(super) fn field(&mut self, key: &str, name: &str, value: &Value) -> Result<bool> {
        match key {
            "collection" => self.collection = Some(text(name, value)?),
            "query" => self.query = Some(query(name, value)?),
            "top_chunks" => self.top_chunks = Some(top_chunks(name, value)?),
            "score_threshold" => self.score_threshold = Some(share(name, value)?),
            "passages" => self.passages = Some(passages(name, value)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// What all fields say together. Scores of two searches in different places cannot be compared, so that there is no
    /// order in which passages that were given and passages that were found could make way for one another: they come
    /// from one place.
    pub(super) fn resolve(self, messages: &[ChatMessage], top_chunks: usize) -> Result<Option<Passages>> {
        let Some(collection) = self.collection else {
            self.refuse_search_fields()?;
            return Ok(self.passages.map(|passages| Passages::Given(passages.into())));
        };
        if self.passages.is_some() {
            let problem = "expected passages or a collection, found both: leave one of them out".into();
            return Err(invalid("quire.passages", problem));
        }
        Ok(Some(Passages::Search(Search {
            collection,
            query: self.query.map_or_else(|| last_question(messages), Ok)?,
            top_chunks: self.top_chunks.unwrap_or(top_chunks),
            score_threshold: self.score_threshold.unwrap_or(0.0),
        })))
    }

    /// Nothing is searched for without a collection.
    fn refuse_search_fields(&self) -> Result<()> {
        let given = [
            ("query", self.query.is_some()),
            ("top_chunks", self.top_chunks.is_some()),
            ("score_threshold", self.score_threshold.is_some()),
        ];
        match given.iter().find(|(_, given)| *given) {
            Some((key, _)) => {
                let problem = "expected only together with `quire.collection`, which says where to search".into();
                Err(invalid(&format!("quire.{key}"), problem))
            }
            None => Ok(()),
        }
    }
}

/// The text of the last message of the user.
fn last_question(messages: &[ChatMessage]) -> Result<String> {
    let asked = messages.iter().rev().find(|message| message.role == "user");
    let asked = asked.map(|message| message.content.clone());
    if asked.as_ref().is_some_and(|text| text.trim().is_empty()) {
        return Err(invalid("messages", "expected the last message of role `user` to have a text".into()));
    }
    asked.ok_or_else(|| invalid("messages", "expected a message of role `user` to search with, found none".into()))
}

fn top_chunks(name: &str, value: &Value) -> Result<usize> {
    let number = size(name, value, 1)?;
    if number > MAX_TOP_CHUNKS {
        return Err(invalid(name, format!("expected at most {MAX_TOP_CHUNKS}, found {value}")));
    }
    Ok(number)
}

fn passages(name: &str, value: &Value) -> Result<Vec<Arc<GivenPassage>>> {
    let Some(items) = value.as_array() else {
        return Err(invalid(name, format!("expected a list of passages, found {}", brief(value))));
    };
    if items.len() > MAX_PASSAGES {
        return Err(invalid(name, format!("expected at most {MAX_PASSAGES} passages, found {}", items.len())));
    }
    let read = |(index, item)| {
        let passage = passage(&format!("{name}[{index}]"), item)?;
        Ok(Arc::new(GivenPassage { number: index + 1, ..passage }))
    };
    items.iter().enumerate().map(read).collect()
}

/// A passage is a text, or an object that says more of it.
fn passage(name: &str, value: &Value) -> Result<GivenPassage> {
    match value {
        Value::String(text) => Ok(GivenPassage { text: passage_text(name, text)?, ..GivenPassage::default() }),
        Value::Object(fields) => from_object(name, fields),
        other => Err(invalid(name, format!("expected a text or an object with a `text`, found {}", brief(other)))),
    }
}

fn from_object(name: &str, fields: &Map<String, Value>) -> Result<GivenPassage> {
    let mut passage = GivenPassage::default();
    let mut found = None;
    for (key, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
        let field = format!("{name}.{}", cut(key));
        match key.as_str() {
            "text" => found = Some(passage_text(&field, &text(&field, value)?)?),
            "id" => passage.id = Some(short(&field, value)?),
            "filename" => passage.filename = Some(short(&field, value)?),
            "title" => passage.title = Some(short(&field, value)?),
            "url" => passage.url = Some(short(&field, value)?),
            "attributes" | "metadata" => {
                if passage.attributes.is_some() {
                    return Err(invalid(
                        &field,
                        "expected attributes or metadata, found both: they are the same".into(),
                    ));
                }
                let Value::Object(attributes) = value else {
                    return Err(invalid(&field, format!("expected an object, found {}", brief(value))));
                };
                passage.attributes = Some(attributes.clone());
            }
            _ => return Err(QuireError::UnsupportedParameter { param: field, hint: PASSAGE_FIELDS }),
        }
    }
    let problem = || invalid(&format!("{name}.text"), "expected a text, found nothing".into());
    Ok(GivenPassage { text: found.ok_or_else(problem)?, ..passage })
}

fn passage_text(name: &str, text: &str) -> Result<String> {
    if is_blank(text) {
        let found = if text.is_empty() { "an empty one" } else { "only white space" };
        return Err(invalid(name, format!("expected a text, found {found}: leave the passage out")));
    }
    if text.len() > MAX_PASSAGE_BYTES {
        let problem = format!(
            "expected at most {MAX_PASSAGE_BYTES} bytes, found {}: put long documents into a collection",
            text.len()
        );
        return Err(invalid(name, problem));
    }
    Ok(text.into())
}

/// What a passage is called.
fn short(name: &str, value: &Value) -> Result<String> {
    let text = text(name, value)?;
    match text.len() {
        1..=MAX_NAME_BYTES => Ok(text),
        bytes => Err(invalid(name, format!("expected 1 to {MAX_NAME_BYTES} bytes, found {bytes}"))),
    }
}

fn is_blank(text: &str) -> bool {
    text.trim_start_matches('\u{feff}').trim().is_empty()
}
