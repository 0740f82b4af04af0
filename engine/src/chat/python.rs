//! What chat templates expect of Python and Jinja2 beyond what `minijinja` and its `pycompat` have.

use minijinja::value::{Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State};
use minijinja_contrib::pycompat;

use super::json;
use super::source::ITERATED;

type Result<T> = std::result::Result<T, Error>;

/// Bytes that one call may give.
const RESULT_LIMIT: usize = 16 << 20;

/// Makes `environment` render as transformers' environment of Jinja2 does.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(call_method);
    environment
        .add_function("raise_exception", |message: Value| -> Result<String> { Err(failed(message.to_string())) });
    environment.add_function("strftime_now", |format: &str| strftime_now(format));
    environment.add_function(ITERATED, |value: &Value| -> Result<Value> {
        if value.is_none() {
            Err(failed("expected something to iterate over, found none".into()))
        } else {
            Ok(value.clone())
        }
    });
    environment.add_filter("tojson", json::to_json);
    environment.add_filter("trim", |text: &Value, chars: Option<&str>| {
        strip(&text.to_string(), chars, true, true).to_string()
    });
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("sequence", |value: &Value| {
        // What has a length and items: in Python texts and mappings have both.
        value.is_undefined() || matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
}

/// Every run of letters with a capital at its beginning, wherever it begins: `It'S`.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        inside = c.is_alphabetic();
    }
    out
}

/// Calls a method that Python's values have and the template engine's have not.
fn call_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value> {
    let found = match (value.as_str(), value.kind()) {
        (Some(text), _) => text_method(text, method, args)?,
        (None, ValueKind::Seq) => list_method(value, method, args)?,
        (None, ValueKind::Map) if method == "copy" => from_args::<()>(args).map(|()| Some(value.clone()))?,
        _ => None,
    };
    found.map_or_else(|| pycompat::unknown_method_callback(state, value, method, args), Ok)
}

/// The methods of texts that `pycompat` lacks, or gives other results for; `None` for all others.
fn text_method(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>> {
    Ok(Some(match method {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            Value::from(strip(text, chars, method != "rstrip", method != "lstrip"))
        }
        "split" | "rsplit" => split(text, args, method == "rsplit")?,
        "splitlines" => {
            let (keep,): (Option<bool>,) = from_args(args)?;
            lines(text, keep.unwrap_or(false)).into_iter().collect()
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let last = method == "rpartition";
            let found = if last { text.rsplit_once(separator) } else { text.split_once(separator) };
            let parts = match found {
                Some((before, after)) => [before, separator, after],
                None if last => ["", "", text],
                None => [text, "", ""],
            };
            parts.into_iter().collect()
        }
        "title" => from_args::<()>(args).map(|()| Value::from(title(text)))?,
        "removeprefix" | "removesuffix" => {
            let (affix,): (&str,) = from_args(args)?;
            let rest = if method == "removeprefix" { text.strip_prefix(affix) } else { text.strip_suffix(affix) };
            Value::from(rest.unwrap_or(text))
        }
        "replace" => replace(text, args)?,
        "index" | "rindex" => {
            let (needle,): (&str,) = from_args(args)?;
            let at = if method == "index" { text.find(needle) } else { text.rfind(needle) };
            let at = at.ok_or_else(|| failed(format!("{method}: substring not found")))?;
            Value::from(text[..at].chars().count())
        }
        "casefold" => from_args::<()>(args).map(|()| Value::from(text.to_lowercase()))?,
        "swapcase" => from_args::<()>(args).map(|()| Value::from(swap_case(text)))?,
        "zfill" | "center" | "ljust" | "rjust" => pad(text, method, args)?,
        _ => return Ok(None),
    }))
}

fn list_method(list: &Value, method: &str, args: &[Value]) -> Result<Option<Value>> {
    Ok(Some(match method {
        "index" => {
            let (needle,): (&Value,) = from_args(args)?;
            let at = list.try_iter()?.position(|item| item == *needle);
            Value::from(at.ok_or_else(|| failed(format!("index: {needle} is not in the list")))?)
        }
        "copy" => from_args::<()>(args).map(|()| list.clone())?,
        _ => return Ok(None),
    }))
}

/// What Python calls white space: Unicode's and the four separators of ASCII.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn strip<'a>(text: &'a str, chars: Option<&str>, start: bool, end: bool) -> &'a str {
    let drop = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let text = if start { text.trim_start_matches(drop) } else { text };
    if end { text.trim_end_matches(drop) } else { text }
}

fn split(text: &str, args: &[Value], from_end: bool) -> Result<Value> {
    let (separator, limit): (Option<&str>, Option<i64>) = from_args(args)?;
    let pieces = limit.and_then(|n| usize::try_from(n).ok()).map_or(usize::MAX, |n| n.saturating_add(1));
    let mut found: Vec<&str> = match separator {
        Some("") => {
            return Err(failed(format!("{}: the separator is empty", if from_end { "rsplit" } else { "split" })));
        }
        Some(separator) if from_end => text.rsplitn(pieces, separator).collect(),
        Some(separator) => text.splitn(pieces, separator).collect(),
        None => words(text, pieces, from_end),
    };
    if from_end {
        found.reverse();
    }
    Ok(found.into_iter().collect())
}

/// Up to `pieces` words, in the order in which they are met; the last one holds the rest.
fn words(text: &str, pieces: usize, from_end: bool) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = strip(text, None, !from_end, from_end);
    while !rest.is_empty() {
        let cut = if from_end { rest.rfind(is_space) } else { rest.find(is_space) };
        let Some(at) = cut.filter(|_| found.len() + 1 < pieces) else {
            found.push(strip(rest, None, from_end, !from_end));
            break;
        };
        let width = rest[at..].chars().next().map_or(1, char::len_utf8);
        let (word, more) = if from_end { (&rest[at + width..], &rest[..at]) } else { (&rest[..at], &rest[at..]) };
        found.push(word);
        rest = strip(more, None, !from_end, from_end);
    }
    found
}

/// The lines of a text, at every line end that Python knows.
fn lines(text: &str, keep: bool) -> Vec<&str> {
    let is_end =
        |c: char| matches!(c, '\n' | '\u{b}'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let (mut found, mut rest) = (Vec::new(), text);
    while let Some(at) = rest.find(is_end) {
        let width =
            if rest[at..].starts_with("\r\n") { 2 } else { rest[at..].chars().next().map_or(1, char::len_utf8) };
        found.push(&rest[..if keep { at + width } else { at }]);
        rest = &rest[at + width..];
    }
    if !rest.is_empty() {
        found.push(rest);
    }
    found
}

fn replace(text: &str, args: &[Value]) -> Result<Value> {
    let (old, new, count): (&str, &str, Option<i64>) = from_args(args)?;
    let most = count.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
    let hits = text.matches(old).take(most).count();
    within_limit("replace", text.len().saturating_add(hits.saturating_mul(new.len())))?;
    Ok(Value::from(text.replacen(old, new, hits)))
}

fn swap_case(text: &str) -> String {
    let swap =
        |c: char| -> String { if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() } };
    text.chars().map(swap).collect()
}

fn pad(text: &str, method: &str, args: &[Value]) -> Result<Value> {
    let (width, fill): (i64, Option<char>) = from_args(args)?;
    let missing = usize::try_from(width).unwrap_or(0).saturating_sub(text.chars().count());
    within_limit(method, missing.saturating_mul(4))?;
    let fill = |count: usize| fill.unwrap_or(if method == "zfill" { '0' } else { ' ' }).to_string().repeat(count);
    Ok(Value::from(match method {
        "ljust" => format!("{text}{}", fill(missing)),
        "rjust" => format!("{}{text}", fill(missing)),
        "zfill" => {
            let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
            format!("{}{}{digits}", &text[..text.len() - digits.len()], fill(missing))
        }
        // Python puts the odd one to the left where the width is odd too.
        _ => {
            let left = missing / 2 + (missing & usize::try_from(width).unwrap_or(0) & 1);
            format!("{}{text}{}", fill(left), fill(missing - left))
        }
    }))
}

fn within_limit(method: &str, bytes: usize) -> Result<()> {
    if bytes > RESULT_LIMIT { Err(failed(format!("{method}: the result is too long"))) } else { Ok(()) }
}

/// The current date and time in the machine's time zone, as Python's `strftime` writes it.
fn strftime_now(format: &str) -> Result<String> {
    let now = jiff::Zoned::now();
    jiff::fmt::strtime::format(format, &now).map_err(|e| failed(format!("strftime_now: {e}")))
}

fn failed(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
