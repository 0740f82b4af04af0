//! Messages to prompt tokens: the model's chat template, and the place where retrieved context goes.
//!
//! A template is the model's own text, so that the literals of control tokens in it become these tokens. The contents
//! of messages come from outside: literals of control tokens in them stay ordinary text (`marks.rs`).

mod json;
mod marks;
mod python;
mod respell;
pub(crate) mod source;
mod template;

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{EngineError, Result};
use crate::tokenizer::{Part, Tokenizer};
use marks::Marks;
pub use template::ChatTemplate;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// Who speaks: `system`, `user`, `assistant`, or another role that the model's template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl ChatMessage {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        ChatMessage { role: role.into(), content: content.into() }
    }
}

/// A prompt with a hole: retrieved chunks go between `prefix` and `suffix`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContextPrompt {
    /// Tokens before the chunks; may be empty.
    pub prefix: Vec<u32>,
    /// Tokens behind the chunks: the question and what opens the answer. Never empty.
    pub suffix: Vec<u32>,
}

/// `prompt.json` beside a model: how retrieved context is put into its prompts.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ContextFormat {
    context_role: Option<String>,
    preamble: String,
    chunk_suffix: String,
}

impl Default for ContextFormat {
    fn default() -> Self {
        ContextFormat {
            context_role: None,
            preamble: "Answer from the passages below.\n\n".into(),
            chunk_suffix: "\n\n".into(),
        }
    }
}

/// How a model wants its prompts: its chat template and the place of retrieved context.
///
/// Where a file `prompt.json` lies beside the model, it may set `context_role` (the context becomes a message of this
/// role, before all but system messages; `null`: it goes into the first user message, in front of the text),
/// `preamble` (text in front of the context when `context_role` is `null`) and `chunk_suffix` (text behind every chunk,
/// in which special tokens are recognised). The defaults are `null`, `"Answer from the passages below.\n\n"` and
/// `"\n\n"`.
#[derive(Debug)]
pub struct PromptFormat {
    template: Option<ChatTemplate>,
    context: ContextFormat,
}

impl PromptFormat {
    /// Reads the model's template (`chat_template.jinja`, `additional_chat_templates/default.jinja` or
    /// `chat_template` in `tokenizer_config.json`) and `prompt.json` in `dir`; each may be absent. A model without a
    /// template loads, but renders no messages.
    ///
    /// # Errors
    /// [`EngineError::Config`] and [`EngineError::ChatTemplate`] for malformed files.
    pub fn from_dir(dir: &Path, tokenizer: &Tokenizer) -> Result<PromptFormat> {
        let template = template_source(dir)?;
        let template = template.map(|source| ChatTemplate::new(&source, tokenizer.names().to_vec())).transpose()?;
        let context: ContextFormat = parse(&dir.join("prompt.json"))?.unwrap_or_default();
        // Found wrong now rather than at the first question.
        tokenizer.encode(&context.chunk_suffix)?;
        Ok(PromptFormat { template, context })
    }

    /// Text behind every chunk of context; to be encoded with [`Tokenizer::encode`].
    #[must_use]
    pub fn chunk_suffix(&self) -> &str {
        &self.context.chunk_suffix
    }

    /// The control token that the template puts behind what the assistant says, where it puts one there.
    pub(crate) fn turn_end(&self, tokenizer: &Tokenizer) -> Option<u32> {
        // A text that no template contains.
        const ANSWER: &str = "\u{f4c1e}";
        let turns = [ChatMessage::new("user", "?"), ChatMessage::new("assistant", ANSWER)];
        let text = self.template.as_ref()?.render_turns(&turns, false).ok()?;
        let (_, behind) = text.rsplit_once(ANSWER)?;
        tokenizer.control_at_start(behind.trim_start())
    }

    /// Whether messages can be rendered at all.
    #[must_use]
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// The prompt for a conversation, up to where the assistant's answer begins. A message of the assistant at its end is an
    /// answer that has begun: the prompt ends with it, and the answer goes on from there.
    ///
    /// # Errors
    /// [`EngineError::ChatTemplate`] if there is none, it refuses the messages or exceeds its limits.
    pub fn render(&self, tokenizer: &Tokenizer, messages: &[ChatMessage]) -> Result<Vec<u32>> {
        let (messages, begun) = begun_answer(messages);
        let template = self.template()?;
        let marks = Marks::choose(tokenizer, template, messages)?;
        let text = marks.render(template, messages)?;
        let mut parts = marks.split(&text)?;
        parts.before.push(begun);
        tokenizer.encode_parts(&parts.before, false)
    }

    /// The prompt for a conversation over retrieved context, in front of and behind that context.
    ///
    /// # Errors
    /// As [`render`](Self::render); [`EngineError::InvalidRequest`] if there is no message to put the context into.
    pub fn render_with_context(&self, tokenizer: &Tokenizer, messages: &[ChatMessage]) -> Result<ContextPrompt> {
        let (messages, begun) = begun_answer(messages);
        let template = self.template()?;
        let marks = Marks::choose(tokenizer, template, messages)?;
        let (mut messages, hole) = (messages.to_vec(), marks.hole());
        match &self.context.context_role {
            Some(role) => {
                let at = messages.iter().position(|m| m.role != "system").unwrap_or(messages.len());
                messages.insert(at, ChatMessage::new(role, hole));
            }
            None => {
                let first = messages.iter_mut().find(|m| m.role == "user").ok_or_else(|| {
                    EngineError::InvalidRequest("expected a message of role `user` to answer, found none".into())
                })?;
                first.content = format!("{}{hole}{}", self.context.preamble, first.content);
            }
        }
        let text = marks.render(template, &messages)?;
        let parts = marks.split(&text)?;
        let Some(mut after) = parts.after else {
            return Err(EngineError::ChatTemplate(
                "it leaves out the retrieved context: expected it to show the messages of every role it is given. \
                 Set `context_role` in prompt.json to a role that the template shows, or to null"
                    .into(),
            ));
        };
        after.push(begun);
        let prefix = tokenizer.encode_parts(&parts.before, false)?;
        let suffix = tokenizer.encode_parts(&after, true)?;
        if suffix.is_empty() {
            return Err(EngineError::InvalidRequest("expected a question behind the context, found none".into()));
        }
        Ok(ContextPrompt { prefix, suffix })
    }

    fn template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().ok_or_else(|| {
            EngineError::ChatTemplate(
                "the model has none: expected chat_template.jinja or `chat_template` in tokenizer_config.json. \
                 Use a model tuned for conversations, or put its template beside it"
                    .into(),
            )
        })
    }
}

/// The messages before an answer that has begun, and the answer: whatever it says is plain text.
fn begun_answer(messages: &[ChatMessage]) -> (&[ChatMessage], Part<'_>) {
    match messages.split_last() {
        Some((last, before)) if last.role == "assistant" && !before.is_empty() => (before, Part::Plain(&last.content)),
        _ => (messages, Part::Plain("")),
    }
}

fn read(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(EngineError::Io { path: path.to_path_buf(), source }),
    }
}

fn parse<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<Option<T>> {
    let Some(text) = read(path)? else {
        return Ok(None);
    };
    serde_json::from_str(&text).map(Some).map_err(|e| EngineError::Config {
        file: path.to_path_buf(),
        field: "(the whole file)".into(),
        expected: "a JSON object with the documented fields".into(),
        found: e.to_string(),
    })
}

/// The text of the template in a model's folder, where there is one. A file comes before `tokenizer_config.json`.
pub(crate) fn template_source(dir: &Path) -> Result<Option<String>> {
    for file in ["additional_chat_templates/default.jinja", "chat_template.jinja"] {
        if let Some(source) = read(&dir.join(file))? {
            return Ok(Some(source));
        }
    }
    let path = dir.join("tokenizer_config.json");
    let config: Value = parse(&path)?.unwrap_or_default();
    let named = |list: &[Value]| {
        let default = list.iter().find(|t| t["name"] == "default");
        default.and_then(|t| t["template"].as_str()).map(str::to_string)
    };
    let found = match &config["chat_template"] {
        Value::Null => return Ok(None),
        Value::String(text) => Some(text.clone()),
        Value::Array(list) => named(list),
        Value::Object(templates) => templates.get("default").and_then(Value::as_str).map(str::to_string),
        _ => None,
    };
    found.map(Some).ok_or_else(|| EngineError::Config {
        file: path,
        field: "chat_template".into(),
        expected: "a text, or several with one named \"default\"".into(),
        found: "something else".into(),
    })
}

#[cfg(test)]
#[path = "chat/expression_tests.rs"]
mod expression_tests;
#[cfg(test)]
#[path = "chat/tests.rs"]
mod tests;
