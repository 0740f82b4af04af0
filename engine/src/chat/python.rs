//! The parts of Python that chat templates lean on: methods of texts and mappings, the date, JSON as it is.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};

type Result<T> = std::result::Result<T, Error>;

/// Bytes that `replace` may give.
const REPLACE_LIMIT: usize = 16 << 20;

/// Calls a method that Python's texts and mappings have and the template engine's have not.
pub(super) fn call_method(_state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value> {
    match (value.as_str(), value.kind()) {
        (Some(text), _) => text_method(text, method, args),
        (None, ValueKind::Map) => map_method(value, method, args),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

fn text_method(text: &str, method: &str, args: &[Value]) -> Result<Value> {
    let none = || from_args::<()>(args);
    Ok(match method {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            let drop = |c: char| chars.map_or_else(|| c.is_whitespace(), |chars| chars.contains(c));
            Value::from(match method {
                "strip" => text.trim_matches(drop),
                "lstrip" => text.trim_start_matches(drop),
                _ => text.trim_end_matches(drop),
            })
        }
        "startswith" => Value::from(affixes(args)?.iter().any(|affix| text.starts_with(affix.as_str()))),
        "endswith" => Value::from(affixes(args)?.iter().any(|affix| text.ends_with(affix.as_str()))),
        "split" | "rsplit" => split(text, method, args)?,
        "splitlines" => none().map(|()| text.lines().collect())?,
        "replace" => replace(text, args)?,
        "find" => {
            let (needle,): (&str,) = from_args(args)?;
            Value::from(text.find(needle).map_or(-1, |at| text[..at].chars().count() as i64))
        }
        "count" => {
            let (needle,): (&str,) = from_args(args)?;
            Value::from(text.matches(needle).count())
        }
        "upper" => none().map(|()| Value::from(text.to_uppercase()))?,
        "lower" => none().map(|()| Value::from(text.to_lowercase()))?,
        "title" => none().map(|()| Value::from(title(text)))?,
        "capitalize" => none().map(|()| Value::from(capitalize(text)))?,
        _ => return Err(ErrorKind::UnknownMethod.into()),
    })
}

/// The argument of `startswith` and `endswith`: a text or several.
fn affixes(args: &[Value]) -> Result<Vec<String>> {
    let (affix,): (Value,) = from_args(args)?;
    match affix.as_str() {
        Some(text) => Ok(vec![text.to_string()]),
        None => Ok(affix.try_iter()?.map(|text| text.to_string()).collect()),
    }
}

fn split(text: &str, method: &str, args: &[Value]) -> Result<Value> {
    let (separator, limit): (Option<&str>, Option<i64>) = from_args(args)?;
    let pieces = limit.and_then(|n| usize::try_from(n).ok()).map_or(usize::MAX, |n| n.saturating_add(1));
    Ok(match separator {
        Some("") => {
            return Err(Error::new(ErrorKind::InvalidOperation, "split: the separator is empty"));
        }
        Some(separator) if method == "split" => text.splitn(pieces, separator).collect(),
        Some(separator) => {
            let mut found: Vec<&str> = text.rsplitn(pieces, separator).collect();
            found.reverse();
            found.into_iter().collect()
        }
        None if pieces == usize::MAX => text.split_whitespace().collect(),
        None => {
            return Err(Error::new(ErrorKind::InvalidOperation, "split: a limit needs a separator"));
        }
    })
}

fn replace(text: &str, args: &[Value]) -> Result<Value> {
    let (old, new, count): (&str, &str, Option<usize>) = from_args(args)?;
    let hits = text.matches(old).count().min(count.unwrap_or(usize::MAX));
    if text.len().saturating_add(hits.saturating_mul(new.len())) > REPLACE_LIMIT {
        return Err(Error::new(ErrorKind::InvalidOperation, "replace: the result is too long"));
    }
    Ok(Value::from(text.replacen(old, new, hits)))
}

fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    chars
        .next()
        .map_or_else(String::new, |first| first.to_uppercase().chain(chars.flat_map(char::to_lowercase)).collect())
}

fn title(text: &str) -> String {
    text.split_inclusive(|c: char| !c.is_alphabetic()).map(capitalize).collect()
}

fn map_method(map: &Value, method: &str, args: &[Value]) -> Result<Value> {
    let keys = || map.try_iter();
    Ok(match method {
        "keys" => from_args::<()>(args).and_then(|()| Ok(keys()?.collect()))?,
        "values" => {
            from_args::<()>(args)?;
            keys()?.map(|key| map.get_item(&key)).collect::<Result<Vec<_>>>()?.into()
        }
        "items" => {
            from_args::<()>(args)?;
            let pair = |key: Value| Ok(Value::from(vec![key.clone(), map.get_item(&key)?]));
            keys()?.map(pair).collect::<Result<Vec<_>>>()?.into()
        }
        "get" => {
            let (key, default): (Value, Option<Value>) = from_args(args)?;
            match map.get_item(&key)? {
                found if found.is_undefined() => default.unwrap_or(Value::from(())),
                found => found,
            }
        }
        _ => return Err(ErrorKind::UnknownMethod.into()),
    })
}

/// JSON without the escapes that make it safe inside HTML: a prompt is no web page.
pub(super) fn to_json(value: &Value, indent: Option<usize>, kwargs: Kwargs) -> Result<Value> {
    let indent = indent.or(kwargs.get("indent")?);
    // Python's json has more options; those that matter to templates only change spaces and the escape of non-ASCII.
    let render = if indent.is_some() { serde_json::to_string_pretty } else { serde_json::to_string };
    let text = render(value).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(Value::from_safe_string(text))
}

/// The current date and time, UTC, in the directives of `strftime` that templates use.
pub(super) fn strftime_now(format: &str) -> Result<String> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    strftime(format, seconds)
}

fn strftime(format: &str, seconds: u64) -> Result<String> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let days = seconds / 86_400;
    let (year, month, day) = civil(days);
    let (month_name, day_name) = (MONTHS[month - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        out += &match chars.next() {
            Some('Y') => year.to_string(),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('H') => format!("{:02}", seconds / 3600 % 24),
            Some('M') => format!("{:02}", seconds / 60 % 60),
            Some('S') => format!("{:02}", seconds % 60),
            Some('B') => month_name.to_string(),
            Some('b') => month_name[..3].to_string(),
            Some('A') => day_name.to_string(),
            Some('a') => day_name[..3].to_string(),
            Some('%') => "%".to_string(),
            other => {
                let directive = other.map_or_else(String::new, |c| c.to_string());
                let message =
                    format!("strftime_now: expected one of %Y %m %d %H %M %S %B %b %A %a %%, found %{directive}");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        };
    }
    Ok(out)
}

/// Year, month and day of the Gregorian calendar, from the days since 1970-01-01.
fn civil(mut days: u64) -> (u64, usize, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    (year, month + 1, days + 1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn dates_of_the_calendar() {
        // `date -u -d @SECONDS`
        assert_eq!(strftime("%a %A %d %b %B %Y", 951_782_400).unwrap(), "Tue Tuesday 29 Feb February 2000");
        assert_eq!(strftime("%Y-%m-%d %H:%M:%S %%", 1_735_689_599).unwrap(), "2024-12-31 23:59:59 %");
        assert_eq!(strftime("%d", 0).unwrap(), "01");
        assert!(strftime("%q", 0).is_err());
    }

    #[test]
    fn texts_have_the_methods_of_python() {
        let call = |text: &str, method: &str, args: &[Value]| text_method(text, method, args).unwrap();
        assert_eq!(call(" a ", "strip", &[]), Value::from("a"));
        assert_eq!(call("xax", "lstrip", &["x".into()]), Value::from("ax"));
        assert_eq!(call("a--b--c", "split", &["--".into(), 1.into()]), Value::from(vec!["a", "b--c"]));
        assert_eq!(call("a--b--c", "rsplit", &["--".into(), 1.into()]), Value::from(vec!["a--b", "c"]));
        assert_eq!(call(" a  b ", "split", &[]), Value::from(vec!["a", "b"]));
        assert_eq!(call("aaa", "replace", &["a".into(), "b".into(), 2.into()]), Value::from("bba"));
        assert_eq!(call("äb", "find", &["b".into()]), Value::from(1));
        assert_eq!(call("they're here", "title", &[]), Value::from("They'Re Here"));
        assert_eq!(call("ab", "endswith", &[vec!["x", "b"].into()]), Value::from(true));
        assert!(text_method("a", "encode", &[]).is_err());
    }

    #[test]
    fn replace_cannot_exhaust_memory() {
        let long = "a".repeat(1 << 16);
        let error = text_method(&long, "replace", &["".into(), long.as_str().into()]).unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");
    }
}
