//! A chat template, rendered within limits: it came with a model, and models come from anywhere.

use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind};

use super::{ChatMessage, python};
use crate::error::{EngineError, Result};

/// Work a rendering may do, in instructions and units of 64 bytes handled.
const FUEL: u64 = 500_000;
/// Bytes a rendering may give.
const OUTPUT_LIMIT: usize = 16 << 20;

const NAME: &str = "chat_template";

/// The special tokens whose literals templates may use.
const TOKENS: [&str; 4] = ["bos_token", "eos_token", "pad_token", "unk_token"];

#[derive(Debug)]
pub(super) struct Template {
    environment: Environment<'static>,
    tokens: Vec<(&'static str, String)>,
}

impl Template {
    /// Compiles `source`; the literals of special tokens are taken from `config` (`tokenizer_config.json`).
    pub(super) fn new(source: String, config: &serde_json::Value) -> Result<Template> {
        let mut environment = Environment::new();
        // As Hugging Face renders chat templates. No loader is set: a template reaches no file.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|e| failed(&e))?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(python::call_method);
        environment.add_function("raise_exception", |message: String| -> std::result::Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| python::strftime_now(&format));
        environment.add_filter("tojson", python::to_json);
        environment.add_template_owned(NAME, source).map_err(|e| failed(&e))?;
        let literal =
            |value: &serde_json::Value| value.as_str().or_else(|| value["content"].as_str()).map(str::to_string);
        let tokens = TOKENS.into_iter().filter_map(|name| Some((name, literal(&config[name])?))).collect();
        Ok(Template { environment, tokens })
    }

    /// The text of a conversation, up to where the assistant's answer begins.
    pub(super) fn render(&self, messages: &[ChatMessage]) -> Result<String> {
        let message = |m: &ChatMessage| Value::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())]);
        let mut context: Vec<(&str, Value)> = vec![
            ("messages", messages.iter().map(message).collect()),
            ("add_generation_prompt", Value::from(true)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        context.extend(self.tokens.iter().map(|(name, literal)| (*name, Value::from(literal.as_str()))));
        let context = Value::from_pairs(context);
        let mut output = Capped(Vec::new());
        let template = self.environment.get_template(NAME).map_err(|e| failed(&e))?;
        template.render_captured_to(context, &mut output).map_err(|e| failed(&e))?;
        String::from_utf8(output.0).map_err(|e| EngineError::ChatTemplate(e.to_string()))
    }
}

/// Takes up to [`OUTPUT_LIMIT`] bytes.
struct Capped(Vec<u8>);

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_LIMIT {
            return Err(io::Error::other("output limit reached"));
        }
        self.0.extend_from_slice(bytes);
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
            format!(
                "it exceeds its limit of {FUEL} steps{line}: send shorter or fewer messages, or use a simpler template"
            )
        }
        ErrorKind::WriteFailure => {
            format!("its output exceeds the limit of {OUTPUT_LIMIT} bytes: send shorter or fewer messages")
        }
        kind => match error.detail() {
            Some(detail) => format!("{detail}{line}"),
            None => format!("{kind}{line}"),
        },
    })
}
