//! Values as Python writes them.

use std::fmt::Write;

use minijinja::value::{Value, ValueKind};
use minijinja::{AutoEscape, Output, State, escape_formatter};

use super::letters::is_printable;
use super::numbers::{as_float, float_text};
use super::{Result, failed};

/// Levels of lists and mappings inside each other.
const DEPTH: usize = 64;

/// What `{{ value }}` writes.
pub(super) fn format(out: &mut Output, state: &mut State, value: &Value) -> Result<()> {
    if !matches!(state.auto_escape(), AutoEscape::None) || !differs(value) {
        return escape_formatter(out, state, value);
    }
    let text = text(state, value)?;
    out.write_str(&text).map_err(|error| failed(format!("a value cannot be written: {error}")))
}

/// Whether a value may be written otherwise than the template engine does.
fn differs(value: &Value) -> bool {
    match value.kind() {
        ValueKind::Number => as_float(value).is_some(),
        ValueKind::Seq | ValueKind::Map => true,
        _ => false,
    }
}

/// Python's `str`.
pub(super) fn text(state: &State, value: &Value) -> Result<String> {
    if !differs(value) {
        return Ok(value.to_string());
    }
    repr(state, value)
}

/// Python's `repr`.
pub(super) fn repr(state: &State, value: &Value) -> Result<String> {
    let mut writer = Writer { state, out: String::new(), paid: 0 };
    writer.value(value, 0)?;
    Ok(writer.out)
}

struct Writer<'a, 'env, 'vm> {
    state: &'a State<'env, 'vm>,
    out: String,
    /// Bytes of `out` that fuel was taken for.
    paid: usize,
}

impl Writer<'_, '_, '_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<()> {
        if depth > DEPTH {
            return Err(failed(format!("expected at most {DEPTH} levels of lists and mappings, found more")));
        }
        self.pay()?;
        match (value.kind(), value.as_str(), as_float(value)) {
            (_, Some(text), _) => quote(text, &mut self.out),
            (_, _, Some(number)) => self.out.push_str(&float_text(number)),
            (ValueKind::Undefined, ..) => self.out.push_str("Undefined"),
            (ValueKind::Seq, ..) if begins_with(value, '[') => self.items(["[", "]"], value, depth)?,
            (ValueKind::Seq, ..) if value.is_tuple() && value.len() == Some(1) => {
                self.items(["(", ",)"], value, depth)?;
            }
            (ValueKind::Seq, ..) if value.is_tuple() => self.items(["(", ")"], value, depth)?,
            (ValueKind::Map, ..) if begins_with(value, '{') => self.map(value, depth)?,
            _ => self.out.push_str(&value.to_string()),
        }
        Ok(())
    }

    fn items(&mut self, brackets: [&str; 2], list: &Value, depth: usize) -> Result<()> {
        self.out.push_str(brackets[0]);
        for (index, item) in list.try_iter()?.enumerate() {
            if index > 0 {
                self.out.push_str(", ");
            }
            self.value(&item, depth + 1)?;
        }
        self.out.push_str(brackets[1]);
        Ok(())
    }

    fn map(&mut self, map: &Value, depth: usize) -> Result<()> {
        self.out.push('{');
        for (index, key) in map.try_iter()?.enumerate() {
            if index > 0 {
                self.out.push_str(", ");
            }
            self.value(&key, depth + 1)?;
            self.out.push_str(": ");
            self.value(&map.get_item(&key)?, depth + 1)?;
        }
        self.out.push('}');
        Ok(())
    }

    /// Takes fuel for what was written, a unit for 64 bytes as for everything a template makes.
    fn pay(&mut self) -> Result<()> {
        let units = (self.out.len() - self.paid) / 64;
        self.paid += units * 64;
        self.state.consume_fuel(1 + units as u64)
    }
}

/// Whether the template engine writes a value with this character first: lists and mappings, but not the macros and loops that
/// look like mappings. No more than that character is made.
pub(super) fn begins_with(value: &Value, first: char) -> bool {
    struct First(Option<char>);
    impl Write for First {
        fn write_str(&mut self, text: &str) -> std::fmt::Result {
            self.0 = text.chars().next();
            if self.0.is_some() { Err(std::fmt::Error) } else { Ok(()) }
        }
    }
    let mut found = First(None);
    let _ = write!(found, "{value}");
    found.0 == Some(first)
}

/// A text in the quotes that need fewer escapes, with what cannot be printed as escapes.
fn quote(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            c => out.push_str(&match u32::from(c) {
                code @ 0..=0xff => format!("\\x{code:02x}"),
                code @ 0x100..=0xffff => format!("\\u{code:04x}"),
                code => format!("\\U{code:08x}"),
            }),
        }
    }
    out.push(quote);
}
