//! From the body of a chat completion to a question. What is not supported is refused by name, never ignored.

use std::fmt::Display;
use std::str::FromStr;

use engine::ChatMessage;
use serde_json::{Map, Value};

use crate::config::{MAX_TOP_CHUNKS, Settings};
use crate::error::{QuireError, Result};
use crate::service::Options;

/// Most texts in `stop`.
const MAX_STOPS: usize = 16;

/// A chat completion as it was asked for.
#[derive(Debug)]
pub(super) struct ChatRequest {
    pub(super) messages: Vec<ChatMessage>,
    pub(super) options: Options,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    /// The collection to answer from; `None`: from the messages alone.
    pub(super) collection: Option<String>,
    pub(super) top_chunks: usize,
}

impl ChatRequest {
    /// Reads a body. What it leaves out is as in `settings`; `model` is the one that is offered.
    pub(super) fn parse(body: &[u8], settings: &Settings, model: &str) -> Result<ChatRequest> {
        let body: Value = serde_json::from_slice(body).map_err(|e| invalid("body", format!("expected JSON: {e}")))?;
        let Value::Object(body) = body else {
            return Err(invalid("body", "expected a JSON object".into()));
        };
        let mut request = ChatRequest {
            messages: Vec::new(),
            options: Options::from_settings(settings),
            stream: false,
            include_usage: false,
            collection: None,
            top_chunks: settings.top_chunks,
        };
        for required in ["model", "messages"] {
            if body.get(required).is_none_or(Value::is_null) {
                return Err(invalid(required, "expected it to be given, found nothing".into()));
            }
        }
        // `null` means "not given", as in OpenAI's API.
        for (key, value) in body.iter().filter(|(_, value)| !value.is_null()) {
            request.field(key, value, model)?;
        }
        if request.include_usage && !request.stream {
            return Err(invalid("stream_options", "expected only together with `stream`: true".into()));
        }
        let both = (body.get("max_tokens"), body.get("max_completion_tokens"));
        if let (Some(a @ Value::Number(_)), Some(b @ Value::Number(_))) = both
            && a != b
        {
            return Err(invalid("max_tokens", format!("expected the same as max_completion_tokens ({b}), found {a}")));
        }
        Ok(request)
    }

    fn field(&mut self, key: &str, value: &Value, model: &str) -> Result<()> {
        let options = &mut self.options;
        let sampling = &mut options.sampling;
        match key {
            "model" => {
                let found: String = text(key, value)?;
                if found != model {
                    return Err(QuireError::UnknownModel { found, served: model.into() });
                }
            }
            "messages" => self.messages = messages(value)?,
            "quire" => self.quire(value)?,
            "stream" => self.stream = boolean(key, value)?,
            "stream_options" => self.include_usage = stream_options(value)?,
            "max_tokens" | "max_completion_tokens" => options.max_tokens = size(key, value, 1)?,
            "temperature" => sampling.temperature = number(key, value)?,
            "top_p" => sampling.top_p = number(key, value)?,
            "top_k" => sampling.top_k = size(key, value, 0)?,
            "min_p" => sampling.min_p = number(key, value)?,
            "presence_penalty" => sampling.presence_penalty = number(key, value)?,
            "frequency_penalty" => sampling.frequency_penalty = number(key, value)?,
            "repetition_penalty" => sampling.repetition_penalty = number(key, value)?,
            "logit_bias" => sampling.logit_bias = logit_bias(value)?,
            "seed" => sampling.seed = Some(seed(value)?),
            "stop" => options.stop = stops(value)?,
            "ignore_eos" => options.ignore_eos = boolean(key, value)?,
            // Names the end user; it changes no answer.
            "user" | "safety_identifier" => {
                text(key, value)?;
            }
            _ => neutral(key, value)?,
        }
        Ok(())
    }

    fn quire(&mut self, value: &Value) -> Result<()> {
        let Value::Object(fields) = value else {
            return Err(invalid("quire", format!("expected an object, found {value}")));
        };
        for (key, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
            let name = format!("quire.{key}");
            let attention = &mut self.options.attention;
            let blend = &mut self.options.blend;
            match key.as_str() {
                "collection" => self.collection = Some(text(&name, value)?),
                "top_chunks" => {
                    self.top_chunks = size(&name, value, 1)?;
                    if self.top_chunks > MAX_TOP_CHUNKS {
                        return Err(invalid(&name, format!("expected at most {MAX_TOP_CHUNKS}, found {value}")));
                    }
                }
                "strategy" => attention.strategy = named(&name, value)?,
                "sinks" => attention.sinks = size(&name, value, 0)?,
                "window" => attention.window = size(&name, value, 1)?,
                "k" => attention.k = size(&name, value, 1)?,
                "ef" => attention.ef = size(&name, value, 1)?,
                "index" => attention.index = named(&name, value)?,
                "blend" => blend.mode = named(&name, value)?,
                "ratio" => {
                    blend.ratio = number(&name, value)?;
                    if !(0.0..=1.0).contains(&blend.ratio) {
                        return Err(invalid(&name, format!("expected 0 to 1, found {value}")));
                    }
                }
                "check_layer" => blend.check_layer = size(&name, value, 0)?,
                _ => return Err(QuireError::UnsupportedParameter { param: name, hint: QUIRE_FIELDS }),
            }
        }
        Ok(())
    }

    /// What is searched for: the text of the last message of the user.
    pub(super) fn query(&self) -> Result<String> {
        let asked = self.messages.iter().rev().find(|message| message.role == "user");
        let asked = asked.map(|message| message.content.clone());
        if asked.as_ref().is_some_and(|text| text.trim().is_empty()) {
            return Err(invalid("messages", "expected the last message of role `user` to have a text".into()));
        }
        asked.ok_or_else(|| invalid("messages", "expected a message of role `user` to search with, found none".into()))
    }
}

const QUIRE_FIELDS: &str = "`quire` takes collection, top_chunks, strategy, sinks, window, k, ef, index, \
                            blend, ratio and check_layer";

fn invalid(param: &str, problem: String) -> QuireError {
    QuireError::InvalidParameter { param: param.into(), problem }
}

/// Parameters that are not supported, at the values that ask for nothing.
fn neutral(key: &str, value: &Value) -> Result<()> {
    let hint = match key {
        "n" if value == 1 => return Ok(()),
        "n" => "one answer a request; send the request again for another",
        "logprobs" if value == false => return Ok(()),
        "logprobs" => "only false",
        "store" if value == false => return Ok(()),
        "store" => "only false: answers are not kept",
        "response_format" if value["type"] == "text" => return Ok(()),
        "response_format" => "only {\"type\": \"text\"}",
        "modalities" if *value == serde_json::json!(["text"]) => return Ok(()),
        "modalities" => "only [\"text\"]",
        "tools" if value.as_array().is_some_and(Vec::is_empty) => return Ok(()),
        "tool_choice" if value == "none" => return Ok(()),
        "service_tier" if value == "auto" || value == "default" => return Ok(()),
        _ => "leave it out",
    };
    Err(QuireError::UnsupportedParameter { param: key.into(), hint })
}

fn text(param: &str, value: &Value) -> Result<String> {
    value.as_str().map(str::to_string).ok_or_else(|| invalid(param, format!("expected a text, found {value}")))
}

fn boolean(param: &str, value: &Value) -> Result<bool> {
    value.as_bool().ok_or_else(|| invalid(param, format!("expected true or false, found {value}")))
}

fn number(param: &str, value: &Value) -> Result<f32> {
    let number = value.as_f64().ok_or_else(|| invalid(param, format!("expected a number, found {value}")))?;
    Ok(number as f32)
}

fn size(param: &str, value: &Value, least: u64) -> Result<usize> {
    let number = value.as_u64().filter(|n| *n >= least).and_then(|n| usize::try_from(n).ok());
    number.ok_or_else(|| invalid(param, format!("expected a whole number of at least {least}, found {value}")))
}

/// Any whole number of 64 bits; negative ones count from the top.
fn seed(value: &Value) -> Result<u64> {
    let seed = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
    seed.ok_or_else(|| invalid("seed", format!("expected a whole number, found {value}")))
}

fn named<T: FromStr<Err: Display>>(param: &str, value: &Value) -> Result<T> {
    text(param, value)?.parse().map_err(|e| invalid(param, format!("{e}")))
}

fn stream_options(value: &Value) -> Result<bool> {
    let Value::Object(fields) = value else {
        return Err(invalid("stream_options", format!("expected an object, found {value}")));
    };
    let mut include_usage = false;
    for (key, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
        let name = format!("stream_options.{key}");
        match key.as_str() {
            "include_usage" => include_usage = boolean(&name, value)?,
            // Padding against guessing from lengths: not done, so only "off" is true.
            "include_obfuscation" if value == false => {}
            _ => return Err(QuireError::UnsupportedParameter { param: name, hint: "only include_usage" }),
        }
    }
    Ok(include_usage)
}

fn stops(value: &Value) -> Result<Vec<String>> {
    let texts = match value {
        Value::Array(items) => items.iter().map(|item| text("stop", item)).collect::<Result<Vec<_>>>()?,
        other => vec![text("stop", other)?],
    };
    if texts.len() > MAX_STOPS || texts.iter().any(String::is_empty) {
        return Err(invalid("stop", format!("expected at most {MAX_STOPS} texts, none of them empty")));
    }
    Ok(texts)
}

fn logit_bias(value: &Value) -> Result<Vec<(u32, f32)>> {
    let Value::Object(fields) = value else {
        return Err(invalid("logit_bias", format!("expected an object of token ids and numbers, found {value}")));
    };
    let pair = |(token, bias): (&String, &Value)| {
        // Written in one way only, so that no token is named twice.
        let id = token.parse().ok().filter(|id: &u32| id.to_string() == *token);
        let id = id.ok_or_else(|| invalid("logit_bias", format!("expected a token id, found `{token}`")))?;
        Ok((id, number("logit_bias", bias)?))
    };
    fields.iter().map(pair).collect()
}

fn messages(value: &Value) -> Result<Vec<ChatMessage>> {
    let items = value.as_array().filter(|items| !items.is_empty());
    let items = items.ok_or_else(|| invalid("messages", "expected a list of at least one message".into()))?;
    items.iter().enumerate().map(|(index, item)| message(index, item)).collect()
}

fn message(index: usize, value: &Value) -> Result<ChatMessage> {
    let name = |field: &str| format!("messages[{index}].{field}");
    let Value::Object(fields) = value else {
        return Err(invalid(&format!("messages[{index}]"), format!("expected an object, found {value}")));
    };
    refuse_other_fields(index, fields)?;
    let role = match fields.get("role").and_then(Value::as_str) {
        Some("developer") => "system",
        Some(role @ ("system" | "user" | "assistant")) => role,
        other => {
            let found = other.map_or("nothing".to_string(), |role| format!("`{role}`"));
            return Err(invalid(
                &name("role"),
                format!("expected system, developer, user or assistant, found {found}"),
            ));
        }
    };
    let content = match fields.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => parts_text(&name("content"), parts)?,
        _ => return Err(invalid(&name("content"), "expected a text or a list of text parts".into())),
    };
    Ok(ChatMessage::new(role, content))
}

fn refuse_other_fields(index: usize, fields: &Map<String, Value>) -> Result<()> {
    let other = fields.iter().find(|(key, value)| !matches!(key.as_str(), "role" | "content") && !value.is_null());
    match other {
        None => Ok(()),
        Some((key, _)) => Err(QuireError::UnsupportedParameter {
            param: format!("messages[{index}].{key}"),
            hint: "a message has role and content",
        }),
    }
}

fn parts_text(param: &str, parts: &[Value]) -> Result<String> {
    let mut all = String::new();
    for (index, part) in parts.iter().enumerate() {
        if part["type"] != "text" {
            let param = format!("{param}[{index}].type");
            return Err(QuireError::UnsupportedParameter { param, hint: "only parts of type text" });
        }
        all.push_str(&text(&format!("{param}[{index}].text"), &part["text"])?);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn parse(mut body: Value) -> Result<ChatRequest> {
        let defaults = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}]});
        for (key, value) in defaults.as_object().unwrap() {
            body.as_object_mut().unwrap().entry(key).or_insert(value.clone());
        }
        ChatRequest::parse(body.to_string().as_bytes(), &Settings::default(), "m")
    }

    fn refused_param(body: Value) -> String {
        match parse(body).unwrap_err() {
            QuireError::InvalidParameter { param, .. } | QuireError::UnsupportedParameter { param, .. } => param,
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (body, param) in [
            (json!({"n": 2}), "n"),
            (json!({"logprobs": true}), "logprobs"),
            (json!({"tools": [{"type": "function"}]}), "tools"),
            (json!({"response_format": {"type": "json_object"}}), "response_format"),
            (json!({"frobnicate": 1}), "frobnicate"),
            (json!({"quire": {"magic": 1}}), "quire.magic"),
            (json!({"quire": {"wait_for_index": true}}), "quire.wait_for_index"),
            (json!({"quire": {"strategy": "magic"}}), "quire.strategy"),
            (json!({"quire": {"ratio": 2}}), "quire.ratio"),
            (json!({"quire": {"top_chunks": 1025}}), "quire.top_chunks"),
            (json!({"stream_options": {"include_usage": true}}), "stream_options"),
            (json!({"max_tokens": 0}), "max_tokens"),
            (json!({"max_tokens": 1, "max_completion_tokens": 2}), "max_tokens"),
            (json!({"stop": ["a", ""]}), "stop"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias"),
            (json!({"logit_bias": {"5": 60, "05": 60}}), "logit_bias"),
            (json!({"messages": []}), "messages"),
            (json!({"messages": [{"role": "tool", "content": "x"}]}), "messages[0].role"),
            (json!({"messages": [{"role": "user", "content": "x", "name": "y"}]}), "messages[0].name"),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
                "messages[0].content[0].type",
            ),
        ] {
            assert_eq!(refused_param(body.clone()), param, "{body}");
        }
    }

    #[test]
    fn neutral_values_and_null_ask_for_nothing() {
        let body = json!({"n": 1, "logprobs": false, "tools": [], "response_format": {"type": "text"}, "stop": null,
                          "seed": null, "user": "u", "store": false, "top_logprobs": null});
        let request = parse(body).unwrap();
        assert!(request.options.stop.is_empty() && !request.stream && request.collection.is_none());
    }

    #[test]
    fn everything_supported_arrives() {
        let request = parse(json!({
            "messages": [{"role": "developer", "content": "Be brief."},
                         {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "is it?"}]}],
            "stream": true, "stream_options": {"include_usage": true}, "max_completion_tokens": 7, "temperature": 0.5,
            "top_p": 0.9, "seed": -1, "stop": "x", "logit_bias": {"5": -100}, "presence_penalty": 1,
            "quire": {"collection": "c", "top_chunks": 3, "strategy": "retrieval", "k": 9, "index": "hnsw",
                      "blend": "reuse", "ratio": 0.3},
        }))
        .unwrap();
        assert_eq!(request.query().unwrap(), "Who is it?");
        assert_eq!(request.messages[0].role, "system");
        let o = &request.options;
        assert_eq!((o.max_tokens, o.sampling.seed, o.attention.k, request.top_chunks), (7, Some(u64::MAX), 9, 3));
        assert_eq!((o.sampling.logit_bias.as_slice(), o.stop.len()), ([(5, -100.0)].as_slice(), 1));
        assert_eq!(o.blend.mode, engine::BlendMode::Reuse);
        assert!(request.stream && request.include_usage);
        assert_eq!(request.collection.as_deref(), Some("c"));
    }

    #[test]
    fn another_model_is_not_found() {
        let error = parse(json!({"model": "gpt"})).unwrap_err();
        assert!(matches!(error, QuireError::UnknownModel { .. }), "{error}");
    }
}
