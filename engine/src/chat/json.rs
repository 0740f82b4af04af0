//! JSON as Python's `json.dumps` writes it, which is what the filter `tojson` gives in Hugging Face's templates.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

use super::python::numbers::float_text;
use super::python::objects::Range;

type Result<T> = std::result::Result<T, Error>;

/// Levels of lists and mappings inside each other.
const DEPTH: usize = 64;

/// The filter `tojson(ensure_ascii=false, indent=none, separators=none, sort_keys=false)`.
pub(super) fn to_json(state: &State, value: &Value, ascii: Option<Value>, kwargs: Kwargs) -> Result<String> {
    let given =
        |name: &str| -> Result<Option<Value>> { Ok(kwargs.get::<Option<Value>>(name)?.filter(|v| !v.is_none())) };
    let indent = match given("indent")? {
        None => None,
        Some(text) if text.as_str().is_some() => Some(text.to_string()),
        // Python takes a negative number for 0.
        Some(number) => Some(" ".repeat(usize::try_from(i64::try_from(number)?).unwrap_or(0).min(64))),
    };
    let mut separators = match &indent {
        None => [", ".to_string(), ": ".to_string()],
        Some(_) => [",".to_string(), ": ".to_string()],
    };
    if let Some(pair) = given("separators")? {
        let pair: Vec<String> = pair.try_iter()?.map(|text| text.to_string()).collect();
        separators = pair.try_into().map_err(|_| failed("separators: expected two texts"))?;
    }
    let ascii = match ascii {
        Some(flag) => flag.is_true(),
        None => given("ensure_ascii")?.is_some_and(|flag| flag.is_true()),
    };
    let sorted = given("sort_keys")?.is_some_and(|flag| flag.is_true());
    kwargs.assert_all_used()?;
    let mut writer = Writer { state, out: String::new(), paid: 0, ascii, indent, separators, sorted };
    writer.value(value, 0)?;
    Ok(writer.out)
}

struct Writer<'a, 'env, 'vm> {
    state: &'a State<'env, 'vm>,
    out: String,
    /// Bytes of `out` that fuel was taken for.
    paid: usize,
    ascii: bool,
    indent: Option<String>,
    separators: [String; 2],
    sorted: bool,
}

impl Writer<'_, '_, '_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<()> {
        if depth > DEPTH {
            return Err(failed("expected at most 64 levels, found more"));
        }
        self.pay()?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number(value)?),
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::Map => self.map(value, depth)?,
            ValueKind::Seq if value.downcast_object_ref::<Range>().is_some() => {
                return Err(failed("expected what JSON can say, found a range: use `list` before"));
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.map(|item| (None, item)).collect();
                self.items(['[', ']'], items, depth)?;
            }
            kind => return Err(failed(&format!("expected what JSON can say, found {kind}"))),
        }
        Ok(())
    }

    fn map(&mut self, map: &Value, depth: usize) -> Result<()> {
        let mut keys: Vec<Value> = map.try_iter()?.collect();
        if self.sorted {
            keys.sort();
        }
        let item = |key: Value| {
            let name = match key.kind() {
                ValueKind::String => key.to_string(),
                ValueKind::None => "null".into(),
                ValueKind::Bool => key.is_true().to_string(),
                ValueKind::Number => number(&key)?,
                kind => return Err(failed(&format!("expected keys that JSON can say, found {kind}"))),
            };
            Ok((Some(name), map.get_item(&key)?))
        };
        let items = keys.into_iter().map(item).collect::<Result<_>>()?;
        self.items(['{', '}'], items, depth)
    }

    fn items(&mut self, brackets: [char; 2], items: Vec<(Option<String>, Value)>, depth: usize) -> Result<()> {
        self.out.push(brackets[0]);
        let empty = items.is_empty();
        for (index, (key, item)) in items.into_iter().enumerate() {
            if index > 0 {
                self.out.push_str(&self.separators[0]);
            }
            self.line(depth + 1);
            if let Some(key) = key {
                self.text(&key);
                self.out.push_str(&self.separators[1]);
            }
            self.value(&item, depth + 1)?;
        }
        if !empty {
            self.line(depth);
        }
        self.out.push(brackets[1]);
        Ok(())
    }

    /// A new line, where there is an indent.
    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ascii && !c.is_ascii()) || (self.ascii && c == '\u{7f}') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }

    /// Takes fuel for what was written, a unit for 64 bytes as for everything a template makes.
    fn pay(&mut self) -> Result<()> {
        let units = (self.out.len() - self.paid) / 64;
        self.paid += units * 64;
        self.state.consume_fuel(1 + units as u64)
    }
}

/// A number as Python writes it.
fn number(value: &Value) -> Result<String> {
    if value.is_integer() {
        return Ok(value.to_string());
    }
    Ok(match f64::try_from(value.clone())? {
        n if n.is_nan() => "NaN".into(),
        n if n.is_infinite() => if n > 0.0 { "Infinity" } else { "-Infinity" }.into(),
        n => float_text(n),
    })
}

fn failed(message: &str) -> Error {
    Error::new(ErrorKind::BadSerialization, format!("tojson: {message}"))
}
