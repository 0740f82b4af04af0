//! What chat templates expect of Python and Jinja2 beyond what `minijinja` and its `pycompat` have.

mod arguments;
mod filters;
mod letters;
pub(super) mod numbers;
pub(super) mod objects;
mod percent;
mod show;
mod text;
mod wrap;

use minijinja::value::{Rest, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State};
use minijinja_contrib::{globals, pycompat};

use super::{json, source};
use arguments::Arguments;

type Result<T> = std::result::Result<T, Error>;

/// Bytes that one call may give.
const RESULT_LIMIT: usize = 16 << 20;

/// Makes `environment` render as transformers' environment of Jinja2 does.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_formatter(show::format);
    environment.set_unknown_method_callback(call_method);
    environment
        .add_function("raise_exception", |message: Value| -> Result<String> { Err(failed(message.to_string())) });
    environment.add_function("strftime_now", |format: &str| strftime_now(format));
    environment.add_function("range", objects::range);
    environment.add_function("cycler", |items: Rest<Value>| globals::cycler(items.to_vec()));
    environment.add_function("joiner", globals::joiner);
    environment.add_function(source::ITERATED, |value: &Value| -> Result<Value> {
        filters::iterated("for", value).map(|_| value.clone())
    });
    environment.add_function(source::REMAINDER, |state: &State, left: &Value, right: &Value| -> Result<Value> {
        match left.as_str() {
            Some(pattern) => percent::fill(state, pattern, right).map(Value::from),
            None => numbers::remainder(left, right),
        }
    });
    environment.add_function(source::CONCATENATED, |state: &State, operands: Rest<Value>| -> Result<String> {
        let mut out = String::new();
        for operand in operands.iter() {
            out.push_str(&show::text(state, operand)?);
            within_limit("~", out.len())?;
        }
        state.consume_fuel(out.len() as u64 / 64)?;
        Ok(out)
    });
    environment.add_function(source::VARIADIC, objects::variadic);
    environment.add_filter(source::ATTRIBUTE, objects::attribute);
    filters::install(environment);
    install_tests(environment);
}

fn install_tests(environment: &mut Environment<'static>) {
    environment.add_test("callable", |value: &Value| match value.kind() {
        ValueKind::Plain => true,
        ValueKind::Map => show::begins_with(value, '<'),
        _ => false,
    });
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("sequence", |value: &Value| {
        // What has a length and items: in Python texts and mappings have both.
        value.is_undefined() || matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
}

/// Calls a method that Python's values have and the template engine's have not.
fn call_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value> {
    let found = match (value.as_str(), value.kind()) {
        (Some(text), _) => text::call(state, text, method, args)?,
        (None, ValueKind::Seq) => list_method(value, method, args)?,
        (None, ValueKind::Map) if method == "copy" => from_args::<()>(args).map(|()| Some(value.clone()))?,
        _ => None,
    };
    found.map_or_else(|| pycompat::unknown_method_callback(state, value, method, args), Ok)
}

fn list_method(list: &Value, method: &str, args: &[Value]) -> Result<Option<Value>> {
    Ok(Some(match method {
        "index" => {
            let args = Arguments::new("index", args)?;
            let needle: Value = args.value(0, "")?.unwrap_or_default();
            let (start, end): (Option<i64>, Option<i64>) = (args.optional(1, "")?, args.optional(2, "")?);
            args.end(3)?;
            let length = list.len().unwrap_or(0) as i64;
            let place = |at: i64| (if at < 0 { at + length } else { at }).clamp(0, length) as usize;
            let (start, end) = (place(start.unwrap_or(0)), place(end.unwrap_or(length)));
            let mut places = list.try_iter()?.enumerate().take(end).skip(start);
            let at = places.find(|(_, item)| *item == needle).map(|(at, _)| at);
            Value::from(at.ok_or_else(|| failed(format!("index: {needle} is not in the list")))?)
        }
        "copy" => from_args::<()>(args).map(|()| list.clone())?,
        _ => return Ok(None),
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
