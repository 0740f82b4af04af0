//! Values of fields: what was expected, what came. Messages show what came in a bounded length, whatever was sent.

use std::fmt::Display;
use std::str::FromStr;

use serde_json::Value;

use settings::{QuireError, Result};

/// Characters of a name or a text that a message shows.
const SHOWN: usize = 80;

pub(super) fn invalid(param: &str, problem: String) -> QuireError {
    QuireError::InvalidParameter { param: param.into(), problem }
}

/// The beginning of a text.
pub(super) fn cut(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.into(),
    }
}

/// What came, in a few words.
pub(super) fn brief(value: &Value) -> String {
    match value {
        Value::String(text) => format!("`{}`", cut(text)),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(_) => "an object".into(),
        other => other.to_string(),
    }
}

pub(super) fn text(param: &str, value: &Value) -> Result<String> {
    let text = value.as_str().map(str::to_string);
    text.ok_or_else(|| invalid(param, format!("expected a text, found {}", brief(value))))
}

/// Bytes of a text to search for. Analysing one costs by its length, whatever it finds, and a character may stand for many.
const MAX_QUERY_BYTES: usize = 256 << 10;

/// Words to search for.
pub(super) fn query(param: &str, value: &Value) -> Result<String> {
    let query = text(param, value)?;
    if query.len() > MAX_QUERY_BYTES {
        let found = query.len();
        return Err(invalid(param, format!("expected at most {MAX_QUERY_BYTES} bytes to search for, found {found}")));
    }
    if query.trim_start_matches('\u{feff}').trim().is_empty() {
        return Err(invalid(param, "expected words to search for, found none".into()));
    }
    Ok(query)
}

pub(super) fn boolean(param: &str, value: &Value) -> Result<bool> {
    value.as_bool().ok_or_else(|| invalid(param, format!("expected true or false, found {}", brief(value))))
}

pub(super) fn number(param: &str, value: &Value) -> Result<f32> {
    let number = value.as_f64().ok_or_else(|| invalid(param, format!("expected a number, found {}", brief(value))))?;
    Ok(number as f32)
}

/// A number from 0 to 1.
pub(super) fn share(param: &str, value: &Value) -> Result<f32> {
    let number = number(param, value)?;
    if (0.0..=1.0).contains(&number) {
        return Ok(number);
    }
    Err(invalid(param, format!("expected 0 to 1, found {value}")))
}

pub(super) fn size(param: &str, value: &Value, least: u64) -> Result<usize> {
    let number = value.as_u64().filter(|n| *n >= least).and_then(|n| usize::try_from(n).ok());
    number.ok_or_else(|| invalid(param, format!("expected a whole number of at least {least}, found {}", brief(value))))
}

pub(super) fn named<T: FromStr<Err: Display>>(param: &str, value: &Value) -> Result<T> {
    let name = text(param, value)?;
    // The error shows the name.
    cut(&name).parse().map_err(|e| invalid(param, format!("{e}")))
}

/// The parameter that an error is about.
#[cfg(test)]
#[allow(clippy::panic)]
pub(super) fn param_of(error: QuireError) -> String {
    match error {
        QuireError::InvalidParameter { param, .. } | QuireError::UnsupportedParameter { param, .. } => param,
        other => panic!("{other:?}"),
    }
}
