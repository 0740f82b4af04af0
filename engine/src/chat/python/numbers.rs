//! Numbers as Python reads, writes and divides them.

use minijinja::value::{Value, ValueKind};

use super::arguments::Arguments;
use super::letters::is_space;
use super::{Result, failed};

/// A float as Python's `repr` writes it: the shortest digits, with an exponent from 1e16 on and below 1e-4.
pub(in crate::chat) fn float_text(number: f64) -> String {
    match number {
        n if n.is_nan() => "nan".into(),
        n if n.is_infinite() => if n > 0.0 { "inf" } else { "-inf" }.into(),
        n if n != 0.0 && !(1e-4..1e16).contains(&n.abs()) => {
            let text = format!("{n:e}");
            let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
            let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |e| ('-', e));
            format!("{digits}e{sign}{exponent:0>2}")
        }
        n => format!("{n:?}"),
    }
}

/// The number of a float, which an integer is not.
pub(in crate::chat) fn as_float(value: &Value) -> Option<f64> {
    let is_float = value.kind() == ValueKind::Number && !value.is_integer();
    is_float.then(|| f64::try_from(value.clone()).ok()).flatten()
}

/// The filter `int(default=0, base=10)`.
pub(super) fn int(value: &Value, args: &[Value]) -> Result<Value> {
    let args = Arguments::new("int", args)?;
    let default = args.value(0, "default")?.unwrap_or_else(|| Value::from(0));
    let base: Option<u32> = args.optional(1, "base")?;
    args.end(2)?;
    if value.is_undefined() {
        return Err(failed("int: expected a value, found an undefined one".into()));
    }
    if value.is_integer() {
        return Ok(value.clone());
    }
    if value.kind() == ValueKind::Bool {
        return Ok(Value::from(i64::from(value.is_true())));
    }
    if let Some(text) = value.as_str() {
        if let Some(number) = parse_int(text, base.unwrap_or(10)) {
            return Ok(Value::from(number));
        }
        return Ok(parse_float(text).and_then(truncated).unwrap_or(default));
    }
    let Some(number) = as_float(value) else { return Ok(default) };
    if number.is_infinite() {
        return Err(failed("int: expected a finite number, found infinity".into()));
    }
    Ok(truncated(number).unwrap_or(default))
}

/// A float without its fraction.
pub(super) fn truncated(number: f64) -> Option<Value> {
    (number.abs() < 1.7e38).then(|| Value::from(number as i128))
}

/// Digits with an optional sign, a prefix that names the base (16, 8, 2; 0: whatever it names), and `_` between digits.
fn parse_int(text: &str, base: u32) -> Option<i128> {
    let text = text.trim_matches(is_space);
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = digits.to_ascii_lowercase();
    let prefixes = [("0x", 16), ("0o", 8), ("0b", 2)];
    let prefix = prefixes.iter().find(|(prefix, b)| lower.starts_with(prefix) && (base == *b || base == 0));
    let (digits, base) = match prefix {
        Some((prefix, base)) => (lower[prefix.len()..].strip_prefix('_').unwrap_or(&lower[prefix.len()..]), *base),
        None if base == 0 && lower.starts_with('0') && !lower.trim_matches(['0', '_']).is_empty() => return None,
        None => (lower.as_str(), if base == 0 { 10 } else { base }),
    };
    if !(2..=36).contains(&base) || !digits.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return None;
    }
    Some(sign * i128::from_str_radix(&joined(digits)?, base).ok()?)
}

/// Without the `_` between two digits; `None` where one stands elsewhere.
fn joined(digits: &str) -> Option<String> {
    let wrong = digits.starts_with('_') || digits.ends_with('_') || digits.contains("__");
    (!wrong).then(|| digits.replace('_', ""))
}

fn parse_float(text: &str) -> Option<f64> {
    let text = text.trim_matches(is_space);
    let between_digits = text.split('_').collect::<Vec<_>>().windows(2).all(|pair| {
        pair[0].ends_with(|c: char| c.is_ascii_digit()) && pair[1].starts_with(|c: char| c.is_ascii_digit())
    });
    between_digits.then(|| text.replace('_', "").parse().ok()).flatten()
}

/// The filter `float(default=0.0)`.
pub(super) fn float(value: &Value, args: &[Value]) -> Result<Value> {
    let args = Arguments::new("float", args)?;
    let default = args.value(0, "default")?.unwrap_or_else(|| Value::from(0.0));
    args.end(1)?;
    if value.is_undefined() {
        return Err(failed("float: expected a value, found an undefined one".into()));
    }
    Ok(match value.as_str() {
        Some(text) => parse_float(text).map_or(default, Value::from),
        None => number(value).map_or(default, Value::from),
    })
}

fn number(value: &Value) -> Option<f64> {
    match value.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => f64::try_from(value.clone()).ok(),
        _ => None,
    }
}

/// What is left of a division that rounds down.
pub(super) fn remainder(left: &Value, right: &Value) -> Result<Value> {
    let wrong = || failed(format!("%: expected numbers, and none of zero on the right, found {left} and {right}"));
    let integer = |value: &Value| match value.kind() {
        ValueKind::Bool => Some(i128::from(value.is_true())),
        _ => value.is_integer().then(|| i128::try_from(value.clone()).ok()).flatten(),
    };
    if let (Some(a), Some(b)) = (integer(left), integer(right)) {
        let rest = a.checked_rem(b).ok_or_else(wrong)?;
        return Ok(Value::from(if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest }));
    }
    let (Some(a), Some(b)) = (number(left), number(right)) else { return Err(wrong()) };
    if b == 0.0 {
        return Err(wrong());
    }
    let rest = a % b;
    Ok(Value::from(if rest != 0.0 && (rest < 0.0) != (b < 0.0) { rest + b } else { rest }))
}
