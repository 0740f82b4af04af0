//! Texts with places for values: `'%s: %d' % (name, number)`.

use minijinja::State;
use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Value, ValueKind};

use super::numbers::{as_float, truncated};
use super::show::{repr, text};
use super::{Result, failed};

/// Characters that one place may be wide.
const WIDTH: u64 = 1_000;

/// Fills the places of `pattern`: from the items of a tuple, from a mapping by name, else from the one value.
pub(super) fn fill(state: &State, pattern: &str, values: &Value) -> Result<String> {
    let items: Vec<Value> = if values.is_tuple() { values.try_iter()?.collect() } else { vec![values.clone()] };
    let mut fill = Fill { state, rest: pattern, pattern: String::new(), items, used: 0, taken: Vec::new(), values };
    while fill.place()? {}
    if fill.used < fill.items.len() && values.kind() != ValueKind::Map {
        return Err(failed(format!("%: expected {} values, found {}", fill.used, fill.items.len())));
    }
    format(FormatStyle::Printf, &fill.pattern, &fill.taken)
}

/// A pattern on its way to what the template engine formats: values are converted as Python does for their place.
struct Fill<'a, 'env, 'vm> {
    state: &'a State<'env, 'vm>,
    rest: &'a str,
    pattern: String,
    items: Vec<Value>,
    used: usize,
    taken: Vec<Value>,
    values: &'a Value,
}

impl Fill<'_, '_, '_> {
    /// Takes what stands before the next place, and the place; false at the end.
    fn place(&mut self) -> Result<bool> {
        let Some(at) = self.rest.find('%') else {
            self.pattern.push_str(self.rest);
            return Ok(false);
        };
        self.pattern.push_str(&self.rest[..=at]);
        self.rest = &self.rest[at + 1..];
        let named = match self.rest.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
            Some((name, rest)) => {
                self.rest = rest;
                Some(self.values.get_item(&Value::from(name))?).filter(|value| !value.is_undefined())
            }
            None => None,
        };
        let end = self.rest.find(|c: char| !"#0- +*.123456789hlL".contains(c)).unwrap_or(self.rest.len());
        let (flags, rest) = self.rest.split_at(end);
        let mut place = flags.replace(['h', 'l', 'L'], "");
        while place.contains('*') {
            place = place.replacen('*', &i64::try_from(self.next()?)?.to_string(), 1);
        }
        for digits in place.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty()) {
            if digits.parse().unwrap_or(u64::MAX) > WIDTH {
                return Err(failed(format!("%: expected a width of at most {WIDTH}, found {digits}")));
            }
        }
        self.pattern.push_str(&place);
        let Some(kind) = rest.chars().next() else {
            return Err(failed("%: expected the kind of the last place, found the end".into()));
        };
        self.rest = &rest[kind.len_utf8()..];
        if kind == '%' {
            self.pattern.push('%');
            return Ok(true);
        }
        let value = named.map_or_else(|| self.next(), Ok)?;
        self.value(kind, &value)?;
        Ok(true)
    }

    fn value(&mut self, kind: char, value: &Value) -> Result<()> {
        let (kind, value) = match kind {
            's' => ('s', Value::from(text(self.state, value)?)),
            'r' | 'a' => ('s', Value::from(repr(self.state, value)?)),
            'd' | 'i' | 'u' => match (value.kind(), as_float(value)) {
                (ValueKind::Bool, _) => ('d', Value::from(i64::from(value.is_true()))),
                (ValueKind::Number, Some(number)) => ('d', truncated(number).unwrap_or_else(|| value.clone())),
                (ValueKind::Number, None) => ('d', value.clone()),
                (found, _) => return Err(failed(format!("%{kind}: expected a number, found {found}"))),
            },
            kind => (kind, value.clone()),
        };
        self.pattern.push(kind);
        self.taken.push(value);
        Ok(())
    }

    fn next(&mut self) -> Result<Value> {
        let value = self.items.get(self.used).cloned();
        self.used += 1;
        value.ok_or_else(|| failed(format!("%: expected at least {} values, found {}", self.used, self.items.len())))
    }
}
