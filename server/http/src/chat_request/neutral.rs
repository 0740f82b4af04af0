//! Parameters without effect: those that change no answer, and those that are not supported, at the values that ask for
//! nothing. Everything else is refused by name.

use serde_json::{Map, Value, json};

use super::super::values::{boolean, brief, cut, invalid, text};
use settings::{QuireError, Result};

pub(super) fn check(key: &str, value: &Value) -> Result<()> {
    let hint = match key {
        // They say who asks, where prompts are cached and what an answer probably says.
        "user" | "safety_identifier" | "prompt_cache_key" | "prompt_cache_retention" => {
            return text(key, value).map(drop);
        }
        "metadata" | "prediction" => return object(key, value),
        // Of tools that are refused.
        "parallel_tool_calls" => return boolean(key, value).map(drop),
        "functions" if value.as_array().is_some_and(Vec::is_empty) => return Ok(()),
        "function_call" if value == "none" || value == "auto" => return Ok(()),
        "functions" | "function_call" => "there are no tools yet",
        "store" if value == false => return Ok(()),
        "store" => "only false: answers are not kept",
        "response_format" if value["type"] == "text" => return Ok(()),
        "response_format" => "only {\"type\": \"text\"}",
        "modalities" if *value == json!(["text"]) => return Ok(()),
        "modalities" => "only [\"text\"]",
        "service_tier" if value == "auto" || value == "default" => return Ok(()),
        "service_tier" => "only auto and default",
        "reasoning_effort" if value == "none" => return Ok(()),
        "reasoning_effort" => "only none: the model reasons as it was trained to",
        // Of other servers with this API.
        _ if other_servers(key).is_some_and(|neutral| same(value, &neutral)) => return Ok(()),
        _ => "leave it out",
    };
    Err(QuireError::UnsupportedParameter { param: cut(key), hint })
}

/// The value of another server's parameter that asks for what is done here anyway.
fn other_servers(key: &str) -> Option<Value> {
    Some(match key {
        "best_of" | "length_penalty" => json!(1),
        "skip_special_tokens" | "spaces_between_special_tokens" | "cache_prompt" => json!(true),
        "add_special_tokens" | "echo" | "include_stop_str_in_output" | "use_beam_search" => json!(false),
        "stop_token_ids" => json!([]),
        "chat_template_kwargs" => json!({}),
        _ => return None,
    })
}

fn same(a: &Value, b: &Value) -> bool {
    a == b || a.as_f64().is_some_and(|number| Some(number) == b.as_f64())
}

fn object(key: &str, value: &Value) -> Result<()> {
    if value.is_object() { Ok(()) } else { Err(invalid(key, format!("expected an object, found {}", brief(value)))) }
}

/// Tools may be there as long as none is to be called.
pub(super) fn check_tools(body: &Map<String, Value>) -> Result<()> {
    let given = |key| body.get(key).filter(|value| !value.is_null());
    let (tools, choice) = (given("tools"), given("tool_choice"));
    if let Some(other) = choice.filter(|choice| **choice != "none" && **choice != "auto") {
        let problem = format!("expected none or auto, as there are no tools yet, found {}", brief(other));
        return Err(invalid("tool_choice", problem));
    }
    let Some(tools) = tools else { return Ok(()) };
    match tools.as_array() {
        None => Err(invalid("tools", format!("expected a list, found {}", brief(tools)))),
        Some(list) if list.is_empty() || choice.is_some_and(|choice| choice == "none") => Ok(()),
        Some(_) => Err(QuireError::UnsupportedParameter {
            param: "tools".into(),
            hint: "send none, or `tool_choice`: \"none\"",
        }),
    }
}
