//! A chat template, rendered within limits: it came with a model, and models come from anywhere.

use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind};

use super::source::Source;
use super::{ChatMessage, python};
use crate::error::{EngineError, Result};

/// Work a rendering may do, in instructions and units of 64 bytes handled: for the template itself, for each message, and for each
/// byte of their contents, which may thus be handled 16 times. Whether a prompt is too long is not a template's to say.
const FUEL: u64 = 500_000;
const FUEL_OF_A_MESSAGE: u64 = 1000;
/// Bytes a rendering may give, beside four times those of the contents.
const OUTPUT_LIMIT: usize = 16 << 20;

const NAME: &str = "chat_template";

/// A model's chat template: conversations to texts, as Hugging Face's `apply_chat_template` renders them.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    tokens: Vec<(String, String)>,
    literals: String,
}

impl ChatTemplate {
    /// Compiles `source`, in which each of `tokens` (`bos_token`, `<s>`) is a variable.
    ///
    /// # Errors
    /// [`EngineError::ChatTemplate`] where it does not compile.
    pub fn new(source: &str, tokens: Vec<(String, String)>) -> Result<ChatTemplate> {
        let mut environment = Environment::new();
        // As Hugging Face renders chat templates. No loader is set: a template reaches no file.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|e| failed(&e))?;
        environment.set_syntax(syntax);
        python::install(&mut environment);
        let Source { text, literals, .. } = Source::new(source);
        environment.add_template_owned(NAME, text).map_err(|e| failed(&e))?;
        Ok(ChatTemplate { environment, tokens, literals })
    }

    /// Everything that the template can write by itself.
    pub(super) fn literals(&self) -> &str {
        &self.literals
    }

    /// The text of a conversation, up to where the assistant's answer begins.
    ///
    /// # Errors
    /// [`EngineError::ChatTemplate`] where it refuses the messages or exceeds its limits.
    pub fn render(&self, messages: &[ChatMessage]) -> Result<String> {
        self.render_turns(messages, true)
    }

    /// The text of a conversation; with `answering`, up to where the assistant's answer begins.
    pub(super) fn render_turns(&self, messages: &[ChatMessage], answering: bool) -> Result<String> {
        let message = |m: &ChatMessage| Value::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())]);
        let mut context: Vec<(&str, Value)> = vec![
            ("messages", messages.iter().map(message).collect()),
            ("add_generation_prompt", Value::from(answering)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        context.extend(self.tokens.iter().map(|(name, literal)| (name.as_str(), Value::from(literal.as_str()))));
        let context = Value::from_pairs(context);
        let bytes: usize = messages.iter().map(|m| m.content.len()).sum();
        let mut output = Capped { bytes: Vec::new(), limit: OUTPUT_LIMIT + 4 * bytes };
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(FUEL + FUEL_OF_A_MESSAGE * messages.len() as u64 + bytes as u64 / 4));
        let template = environment.get_template(NAME).map_err(|e| failed(&e))?;
        template.render_captured_to(context, &mut output).map_err(|e| failed(&e))?;
        String::from_utf8(output.bytes).map_err(|e| EngineError::ChatTemplate(e.to_string()))
    }
}

/// Takes up to `limit` bytes.
struct Capped {
    bytes: Vec<u8>,
    limit: usize,
}

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limit {
            return Err(io::Error::other("output limit reached"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn failed(error: &Error) -> EngineError {
    let line = error.line().map_or_else(String::new, |line| format!(" (line {line} of the template)"));
    EngineError::ChatTemplate(match error.kind() {
        ErrorKind::OutOfFuel => {
            format!("it reaches the limit of the work that these messages can need{line}. Use another template")
        }
        ErrorKind::WriteFailure => {
            "its output reaches the limit of four times the messages. Use another template".into()
        }
        kind => match error.detail() {
            Some(detail) => format!("{detail}{line}"),
            None => format!("{kind}{line}"),
        },
    })
}
