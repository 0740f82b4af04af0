//! Objects that Python has and the template engine has not: ranges, methods that nobody calls yet, macros that take more
//! arguments than they name.

use std::fmt;
use std::sync::Arc;

use minijinja::value::{Enumerator, Kwargs, Object, ObjectRepr, Tuple, Value, ValueKind};
use minijinja::{Error, State};

use super::{Result, failed};

/// Numbers of a range at most, as in Jinja2's sandbox.
const RANGE: i64 = 100_000;

/// The methods of Python's texts, mappings, and lists with tuples.
const TEXT: &str = "capitalize casefold center count encode endswith expandtabs find format format_map index isalnum isalpha isascii \
    isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip maketrans partition \
    removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title \
    translate upper zfill";
const MAP: &str = "clear copy fromkeys get items keys pop popitem setdefault update values";
const LIST: &str = "append clear copy count extend index insert pop remove reverse sort";
const TUPLE: &str = "count index";

/// Python's `range`.
#[derive(Debug)]
pub(in crate::chat) struct Range {
    start: i64,
    end: i64,
    step: i64,
}

impl Range {
    fn length(&self) -> i64 {
        let (from, to, step) = if self.step > 0 {
            (i128::from(self.start), i128::from(self.end), i128::from(self.step))
        } else {
            (i128::from(self.end), i128::from(self.start), -i128::from(self.step))
        };
        i64::try_from((to - from + step - 1).max(0) / step).unwrap_or(i64::MAX)
    }
}

/// The function `range(end)`, `range(start, end, step=1)`.
pub(super) fn range(first: i64, end: Option<i64>, step: Option<i64>) -> Result<Value> {
    let (start, end) = end.map_or((0, first), |end| (first, end));
    let range = Range { start, end, step: step.unwrap_or(1) };
    if range.step == 0 {
        return Err(failed("range: expected a step other than 0".into()));
    }
    if range.length() > RANGE {
        return Err(failed(format!("range: expected at most {RANGE} numbers, found {}", range.length())));
    }
    Ok(Value::from_object(range))
}

impl Object for Range {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let index = i64::try_from(key.clone()).ok().filter(|index| (0..self.length()).contains(index))?;
        Some(Value::from(self.start + index * self.step))
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(usize::try_from(self.length()).unwrap_or(0))
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Range { start, end, step } = self.as_ref();
        if *step == 1 { write!(f, "range({start}, {end})") } else { write!(f, "range({start}, {end}, {step})") }
    }
}

/// A method of a value, which may be called later.
#[derive(Debug)]
struct Method {
    of: Value,
    name: String,
}

impl Object for Method {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, args: &[Value]) -> Result<Value> {
        self.of.call_method(state, &self.name, args)
    }
}

/// What `value.name` is in Python where that may be a method, and an attribute otherwise.
pub(super) fn attribute(value: &Value, name: &str) -> Result<Value> {
    match method(value, name) {
        Some(method) => Ok(method),
        None => value.get_attr(name),
    }
}

/// The method `name` of a text, a mapping or a list.
pub(super) fn method(value: &Value, name: &str) -> Option<Value> {
    let methods = match value.kind() {
        ValueKind::String => TEXT,
        ValueKind::Map => MAP,
        ValueKind::Seq if value.is_tuple() => TUPLE,
        ValueKind::Seq => LIST,
        _ => return None,
    };
    let known = methods.split_ascii_whitespace().any(|method| method == name);
    known.then(|| Value::from_object(Method { of: value.clone(), name: name.into() }))
}

/// Whether a name is that of a method of texts, mappings or lists.
pub(in crate::chat) fn is_method(name: &str) -> bool {
    [TEXT, MAP, LIST].iter().any(|methods| methods.split_ascii_whitespace().any(|method| method == name))
}

/// A macro that is given whatever it does not name as `varargs` and `kwargs`, its last two parameters.
#[derive(Debug)]
struct Variadic {
    of: Value,
    names: Vec<String>,
}

/// Makes a macro take any arguments.
pub(super) fn variadic(of: Value) -> Result<Value> {
    let mut names: Vec<String> = of.get_attr("arguments")?.try_iter()?.map(|name| name.to_string()).collect();
    names.truncate(names.len().saturating_sub(2));
    Ok(Value::from_object(Variadic { of, names }))
}

impl Object for Variadic {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match key.as_str()? {
            "arguments" => Some(Value::from(Tuple::from(self.names.iter().map(Value::from).collect::<Vec<_>>()))),
            name => self.of.get_attr(name).ok(),
        }
    }

    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, args: &[Value]) -> std::result::Result<Value, Error> {
        let (placed, named) = match args.split_last() {
            Some((last, before)) if last.is_kwargs() => (before, Some(Kwargs::try_from(last.clone())?)),
            _ => (args, None),
        };
        let (own, more) = placed.split_at(placed.len().min(self.names.len()));
        let mut known: Vec<(String, Value)> = Vec::new();
        let mut rest: Vec<(Value, Value)> = Vec::new();
        for name in named.iter().flat_map(Kwargs::args) {
            let value: Value = named.as_ref().map_or_else(|| Ok(Value::UNDEFINED), |named| named.get(name))?;
            if name == "caller" || self.names.iter().any(|own| own == name) {
                known.push((name.into(), value));
            } else {
                rest.push((Value::from(name), value));
            }
        }
        known.push(("varargs".into(), Value::from(Tuple::from(more))));
        known.push(("kwargs".into(), Value::from_pairs(rest)));
        let args: Vec<Value> = own.iter().cloned().chain([Value::from(Kwargs::from_iter(known))]).collect();
        self.of.call(state, &args)
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.of)
    }
}
