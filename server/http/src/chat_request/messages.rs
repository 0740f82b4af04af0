//! The messages of a chat completion. Histories come from many servers: fields of theirs that say nothing to the model are left
//! alone, those that it would have to see are refused by name.

use engine::ChatMessage;
use serde_json::{Map, Value};

use super::super::values::{boolean, brief, cut, invalid, text};
use settings::{QuireError, Result};

pub(super) fn read(value: &Value) -> Result<Vec<ChatMessage>> {
    let items = value.as_array().filter(|items| !items.is_empty());
    let items = items.ok_or_else(|| invalid("messages", "expected a list of at least one message".into()))?;
    items.iter().enumerate().map(|(index, item)| message(index, item)).collect()
}

fn message(index: usize, value: &Value) -> Result<ChatMessage> {
    let name = |field: &str| format!("messages[{index}].{field}");
    let Value::Object(fields) = value else {
        return Err(invalid(&format!("messages[{index}]"), format!("expected an object, found {}", brief(value))));
    };
    let role = match fields.get("role").and_then(Value::as_str) {
        Some("developer") => "system",
        Some(role @ ("system" | "user" | "assistant")) => role,
        other => {
            let found = other.map_or("nothing".to_string(), |role| format!("`{}`", cut(role)));
            return Err(invalid(
                &name("role"),
                format!("expected system, developer, user or assistant, found {found}"),
            ));
        }
    };
    refuse_content_elsewhere(index, fields)?;
    let content = match fields.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => parts_text(&name("content"), parts)?,
        // An answer may have had none, or the refusal in its place.
        None | Some(Value::Null) if role == "assistant" => {
            fields.get("refusal").and_then(Value::as_str).unwrap_or_default().into()
        }
        other => {
            let found = other.map_or("nothing".to_string(), brief);
            return Err(invalid(&name("content"), format!("expected a text or a list of text parts, found {found}")));
        }
    };
    Ok(ChatMessage::new(role, content))
}

/// What a model that calls tools or speaks has said beside its text.
fn refuse_content_elsewhere(index: usize, fields: &Map<String, Value>) -> Result<()> {
    for (key, hint) in [
        ("tool_calls", "a message has a text; there are no tools yet"),
        ("function_call", "a message has a text; there are no tools yet"),
        ("audio", "a message has a text"),
    ] {
        let empty = |value: &Value| value.is_null() || value.as_array().is_some_and(Vec::is_empty);
        if fields.get(key).is_some_and(|value| !empty(value)) {
            return Err(QuireError::UnsupportedParameter { param: format!("messages[{index}].{key}"), hint });
        }
    }
    Ok(())
}

/// Parts are lines of their own, as with other servers.
fn parts_text(param: &str, parts: &[Value]) -> Result<String> {
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        if part["type"] != "text" {
            let param = format!("{param}[{index}].type");
            return Err(QuireError::UnsupportedParameter { param, hint: "only parts of type text" });
        }
        texts.push(text(&format!("{param}[{index}].text"), &part["text"])?);
    }
    Ok(texts.join("\n"))
}

/// How messages may end: an answer at the end is one that has begun and goes on, so that there is one of them at most.
/// `continue_final_message` and `add_generation_prompt` say the same and must not say otherwise.
pub(super) fn check_end(messages: &[ChatMessage], body: &Map<String, Value>) -> Result<()> {
    let answers = messages.iter().rev().take_while(|message| message.role == "assistant").count();
    if answers > 1 {
        let problem = format!("expected one message of role `assistant` at the end at most, found {answers}");
        return Err(invalid("messages", problem));
    }
    for (key, expected) in [("continue_final_message", answers == 1), ("add_generation_prompt", answers == 0)] {
        if let Some(value) = body.get(key).filter(|value| !value.is_null())
            && boolean(key, value)? != expected
        {
            let last = if answers == 1 { "is the assistant's and is continued" } else { "is not the assistant's" };
            return Err(invalid(key, format!("expected {expected}, as the last message {last}, found {value}")));
        }
    }
    Ok(())
}
