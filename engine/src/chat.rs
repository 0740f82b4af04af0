//! Messages to prompt tokens: the model's chat template, and the place where retrieved context goes.
//!
//! A template is the model's own text, so that the literals of special tokens in it become these tokens. The contents
//! of messages come from outside: literals of special tokens in them stay ordinary text. To tell the two apart after
//! rendering, such literals are replaced by marks before, and put back as plain text after.

mod python;
mod template;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{EngineError, Result};
use crate::tokenizer::{Part, Tokenizer};
use template::Template;

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
    template: Option<Template>,
    context: ContextFormat,
}

impl PromptFormat {
    /// Reads `chat_template.jinja` or the template in `tokenizer_config.json`, and `prompt.json`, in `dir`; each may be
    /// absent. A model without a template loads, but renders no messages.
    ///
    /// # Errors
    /// [`EngineError::Config`] and [`EngineError::ChatTemplate`] for malformed files.
    pub fn from_dir(dir: &Path, tokenizer: &Tokenizer) -> Result<PromptFormat> {
        let config_path = dir.join("tokenizer_config.json");
        let config: Value = parse(&config_path)?.unwrap_or_default();
        let source = match read(&dir.join("chat_template.jinja"))? {
            Some(source) => Some(source),
            None => template_in(&config, &config_path)?,
        };
        let template = source.map(|source| Template::new(source, &config)).transpose()?;
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

    /// Whether messages can be rendered at all.
    #[must_use]
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// The prompt for a conversation, up to where the assistant's answer begins.
    ///
    /// # Errors
    /// [`EngineError::ChatTemplate`] if there is none, it refuses the messages or exceeds its limits.
    pub fn render(&self, tokenizer: &Tokenizer, messages: &[ChatMessage]) -> Result<Vec<u32>> {
        let (mut marks, messages) = Marks::take(tokenizer, messages)?;
        let text = self.template()?.render(&messages)?;
        let parts = marks.split(&text)?;
        tokenizer.encode_parts(&parts.before, false)
    }

    /// The prompt for a conversation over retrieved context, in front of and behind that context.
    ///
    /// # Errors
    /// As [`render`](Self::render); [`EngineError::InvalidRequest`] if there is no message to put the context into.
    pub fn render_with_context(&self, tokenizer: &Tokenizer, messages: &[ChatMessage]) -> Result<ContextPrompt> {
        let (mut marks, mut messages) = Marks::take(tokenizer, messages)?;
        let hole = marks.hole();
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
        let text = self.template()?.render(&messages)?;
        let parts = marks.split(&text)?;
        let Some(after) = parts.after else {
            return Err(EngineError::ChatTemplate(
                "it leaves out the retrieved context: expected it to show the messages of every role it is given. \
                 Set `context_role` in prompt.json to a role that the template shows, or to null"
                    .into(),
            ));
        };
        let prefix = tokenizer.encode_parts(&parts.before, false)?;
        let suffix = tokenizer.encode_parts(&after, true)?;
        if suffix.is_empty() {
            return Err(EngineError::InvalidRequest("expected a question behind the context, found none".into()));
        }
        Ok(ContextPrompt { prefix, suffix })
    }

    fn template(&self) -> Result<&Template> {
        self.template.as_ref().ok_or_else(|| {
            EngineError::ChatTemplate(
                "the model has none: expected chat_template.jinja or `chat_template` in tokenizer_config.json. \
                 Use a model tuned for conversations, or put its template beside it"
                    .into(),
            )
        })
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

/// The template in `tokenizer_config.json`: a text, or a list of named ones.
fn template_in(config: &Value, path: &Path) -> Result<Option<String>> {
    let named = |list: &[Value]| {
        let default = list.iter().find(|t| t["name"] == "default");
        default.and_then(|t| t["template"].as_str()).map(str::to_string)
    };
    let found = match &config["chat_template"] {
        Value::Null => return Ok(None),
        Value::String(text) => Some(text.clone()),
        Value::Array(list) => named(list),
        _ => None,
    };
    found.map(Some).ok_or_else(|| EngineError::Config {
        file: PathBuf::from(path),
        field: "chat_template".into(),
        expected: "a text, or a list with an entry named \"default\"".into(),
        found: "something else".into(),
    })
}

/// Stand-ins for literals of special tokens inside contents, and for the retrieved context.
struct Marks {
    fence: String,
    literals: Vec<String>,
}

struct Split<'a> {
    before: Vec<Part<'a>>,
    after: Option<Vec<Part<'a>>>,
}

impl Marks {
    const HOLE: &'static str = "0";

    /// Replaces every literal of a special token in the contents by a mark.
    fn take(tokenizer: &Tokenizer, messages: &[ChatMessage]) -> Result<(Marks, Vec<ChatMessage>)> {
        if messages.is_empty() {
            return Err(EngineError::InvalidRequest("expected at least one message, found none".into()));
        }
        // Random, so that no content can be made to contain it; digits, so that changes of case leave it alone.
        let fence = format!("\u{10fffe}{:039}\u{10fffe}", rand::random::<u128>());
        let mut marks = Marks { fence, literals: Vec::new() };
        let mut marked = Vec::with_capacity(messages.len());
        for message in messages {
            let (mut content, mut rest) = (String::new(), message.content.as_str());
            while let Some(found) = tokenizer.find_special_literal(rest) {
                content.push_str(&rest[..found.start]);
                marks.literals.push(rest[found.clone()].to_string());
                content.push_str(&marks.mark(&marks.literals.len().to_string()));
                rest = &rest[found.end..];
            }
            content.push_str(rest);
            marked.push(ChatMessage::new(message.role.clone(), content));
        }
        Ok((marks, marked))
    }

    fn mark(&self, name: &str) -> String {
        format!("{fence}{name}{fence}", fence = self.fence)
    }

    /// The mark of the place for the context.
    fn hole(&self) -> String {
        self.mark(Self::HOLE)
    }

    /// Splits a rendered text at the marks; what they stand for is plain, the rest was the template's or harmless.
    fn split<'a>(&'a mut self, text: &'a str) -> Result<Split<'a>> {
        let altered = || {
            EngineError::ChatTemplate(
                "it takes the contents of messages apart or shows the context twice: expected each content whole. \
                 Use another template"
                    .into(),
            )
        };
        let mut split = Split { before: Vec::new(), after: None };
        for (index, piece) in text.split(self.fence.as_str()).enumerate() {
            let part = if index % 2 == 0 {
                Part::Trusted(piece)
            } else if piece == Self::HOLE {
                if split.after.replace(Vec::new()).is_some() {
                    return Err(altered());
                }
                continue;
            } else {
                let literal = piece.parse::<usize>().ok().and_then(|n| self.literals.get(n.checked_sub(1)?));
                Part::Plain(literal.ok_or_else(altered)?)
            };
            split.after.as_mut().unwrap_or(&mut split.before).push(part);
        }
        Ok(split)
    }
}

#[cfg(test)]
#[path = "chat/tests.rs"]
mod tests;
