//! Jinja2's filters that the template engine lacks, or gives other results for.

use minijinja::value::{Rest, Tuple, Value, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, State};

use super::arguments::Arguments;
use super::letters::{is_space, is_word};
use super::{Result, failed, json, numbers, objects, percent, show, text, within_limit, wrap};

pub(super) type Args = Rest<ValueOrKwargs>;

pub(super) fn install(environment: &mut Environment<'static>) {
    environment.add_filter("tojson", json::to_json);
    environment.add_filter("int", |value: &Value, args: Args| numbers::int(value, &args.into_values()));
    environment.add_filter("float", |value: &Value, args: Args| numbers::float(value, &args.into_values()));
    environment.add_filter("string", |state: &State, value: &Value| show::text(state, value));
    environment
        .add_filter("lower", |state: &State, value: &Value| Ok::<_, Error>(show::text(state, value)?.to_lowercase()));
    environment
        .add_filter("upper", |state: &State, value: &Value| Ok::<_, Error>(show::text(state, value)?.to_uppercase()));
    environment.add_filter("format", format);
    environment.add_filter("attr", |value: &Value, name: &str| match objects::method(value, name) {
        Some(method) => Ok(method),
        // The items of a mapping are none of its attributes.
        None if value.kind() == ValueKind::Map && show::begins_with(value, '{') => Ok(Value::UNDEFINED),
        None => value.get_attr(name),
    });
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("join", join);
    environment.add_filter("list", list);
    environment.add_filter("trim", trim);
    environment.add_filter("center", center);
    environment.add_filter("indent", indent);
    environment.add_filter("truncate", truncate);
    environment.add_filter("wordcount", |state: &State, value: &Value| -> Result<usize> {
        Ok(show::text(state, value)?.split(|c| !is_word(c)).filter(|word| !word.is_empty()).count())
    });
    environment.add_filter("wordwrap", wrap::wordwrap);
    environment.add_filter("striptags", |state: &State, value: &Value| -> Result<String> {
        Ok(strip_tags(&show::text(state, value)?))
    });
    environment.add_filter("urlencode", url_encode);
    environment.add_filter("filesizeformat", file_size);
    environment.add_filter("pprint", pretty);
    environment.add_filter("escape", escape);
    environment.add_filter("e", escape);
    environment.add_filter("forceescape", escape);
    environment.add_filter("random", |_: &Value| -> Result<Value> {
        Err(failed("random: expected a template that gives the same prompt each time. Use another template".into()))
    });
}

/// `format(value, ...)`, as `value % (...)`; named values fill named places.
fn format(state: &State, value: &Value, args: Args) -> Result<String> {
    let pattern = show::text(state, value)?;
    let args = args.into_values();
    match args.last() {
        Some(named) if named.is_kwargs() && args.len() == 1 => percent::fill(state, &pattern, named),
        Some(named) if named.is_kwargs() => {
            Err(failed("format: expected values by place or by name, found both".into()))
        }
        _ => percent::fill(state, &pattern, &Value::from(Tuple::from(args))),
    }
}

fn default(value: &Value, args: Args) -> Result<Value> {
    let args = args.into_values();
    let args = Arguments::new("default", &args)?;
    let instead = args.value(0, "default_value")?.unwrap_or_else(|| Value::from(""));
    let boolean: Option<bool> = args.optional(1, "boolean")?;
    args.end(2)?;
    let lacking = value.is_undefined() || (boolean.unwrap_or(false) && !value.is_true());
    Ok(if lacking { instead } else { value.clone() })
}

fn join(state: &State, value: &Value, args: Args) -> Result<String> {
    let args = args.into_values();
    let args = Arguments::new("join", &args)?;
    let separator = args.value(0, "d")?.unwrap_or_else(|| Value::from(""));
    let attribute = args.text(1, "attribute")?;
    args.end(2)?;
    let mut texts = Vec::new();
    for item in iterated("join", value)? {
        state.consume_fuel(1)?;
        let item =
            attribute.iter().flat_map(|path| path.split('.')).try_fold(item, |item, name| item.get_attr(name))?;
        texts.push(show::text(state, &item)?);
    }
    text::join(state, &show::text(state, &separator)?, &texts)
}

fn list(state: &State, value: &Value) -> Result<Value> {
    iterated("list", value)?
        .map(|item| state.consume_fuel(1).map(|()| item))
        .collect::<Result<Vec<_>>>()
        .map(Value::from)
}

/// What Python iterates over, which none is not.
pub(super) fn iterated(name: &str, value: &Value) -> Result<impl Iterator<Item = Value>> {
    if value.is_none() {
        return Err(failed(format!("{name}: expected something to iterate over, found none")));
    }
    value.try_iter()
}

fn trim(state: &State, value: &Value, chars: Option<&str>) -> Result<String> {
    Ok(text::strip(&show::text(state, value)?, chars, true, true).to_string())
}

fn center(state: &State, value: &Value, args: Args) -> Result<String> {
    let args = args.into_values();
    let args = Arguments::new("center", &args)?;
    let width: Option<i64> = args.optional(0, "width")?;
    args.end(1)?;
    text::pad(&show::text(state, value)?, "center", width.unwrap_or(80), None)
}

fn indent(state: &State, value: &Value, args: Args) -> Result<String> {
    let args = args.into_values();
    let args = Arguments::new("indent", &args)?;
    let width = args.value(0, "width")?.unwrap_or_else(|| Value::from(4));
    let (first, blank): (Option<bool>, Option<bool>) = (args.optional(1, "first")?, args.optional(2, "blank")?);
    args.end(3)?;
    let text = show::text(state, value)? + "\n";
    let indent = match width.as_str() {
        Some(indent) => indent.to_string(),
        None => text::pad("", "ljust", i64::try_from(width)?, None)?,
    };
    let lines = text::lines(&text, false);
    within_limit("indent", text.len().saturating_add(lines.len().saturating_mul(indent.len())))?;
    let (first, blank) = (first.unwrap_or(false), blank.unwrap_or(false));
    let mut out = String::with_capacity(text.len());
    for (index, line) in lines.into_iter().enumerate() {
        if index > 0 {
            out.push('\n');
        }
        if if index == 0 { first } else { blank || !line.is_empty() } {
            out.push_str(&indent);
        }
        out.push_str(line);
    }
    Ok(out)
}

fn truncate(state: &State, value: &Value, args: Args) -> Result<String> {
    let args = args.into_values();
    let args = Arguments::new("truncate", &args)?;
    let length: Option<usize> = args.optional(0, "length")?;
    let cut_words: Option<bool> = args.optional(1, "killwords")?;
    let end = args.text(2, "end")?;
    let leeway: Option<usize> = args.optional(3, "leeway")?;
    args.end(4)?;
    let (length, end) = (length.unwrap_or(255), end.unwrap_or_else(|| "...".into()));
    let Some(kept) = length.checked_sub(end.chars().count()) else {
        return Err(failed(format!("truncate: expected a length of at least that of {end:?}, found {length}")));
    };
    let text = show::text(state, value)?;
    if text.chars().count() <= length.saturating_add(leeway.unwrap_or(5)) {
        return Ok(text);
    }
    let cut = text.char_indices().nth(kept).map_or(text.len(), |(at, _)| at);
    let kept = &text[..cut];
    let kept = if cut_words.unwrap_or(false) { kept } else { kept.rsplit_once(' ').map_or(kept, |(before, _)| before) };
    Ok(format!("{kept}{end}"))
}

/// A text for a path of an address; a mapping or a list of pairs for a query.
fn url_encode(state: &State, value: &Value) -> Result<String> {
    let pairs: Vec<(Value, Value)> = match value.kind() {
        ValueKind::Map => {
            value.try_iter()?.map(|key| Ok((key.clone(), value.get_item(&key)?))).collect::<Result<_>>()?
        }
        ValueKind::Seq | ValueKind::Iterable => value
            .try_iter()?
            .map(|pair| Ok((pair.get_item_by_index(0)?, pair.get_item_by_index(1)?)))
            .collect::<Result<_>>()?,
        _ => return Ok(quoted(&show::text(state, value)?, "/")),
    };
    let query = |value: &Value| -> Result<String> { Ok(quoted(&show::text(state, value)?, "").replace("%20", "+")) };
    let pairs = pairs.iter().map(|(key, value)| Ok(format!("{}={}", query(key)?, query(value)?)));
    Ok(pairs.collect::<Result<Vec<_>>>()?.join("&"))
}

fn quoted(text: &str, safe: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        let c = char::from(byte);
        if c.is_ascii_alphanumeric() || "_.-~".contains(c) || safe.contains(c) {
            out.push(c);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn file_size(value: &Value, args: Args) -> Result<String> {
    let args = args.into_values();
    let args = Arguments::new("filesizeformat", &args)?;
    let binary: Option<bool> = args.optional(0, "binary")?;
    args.end(1)?;
    let wrong = || failed(format!("filesizeformat: expected a number, found {value}"));
    let bytes = f64::try_from(numbers::float(value, &[Value::from(f64::NAN)])?)?;
    if bytes.is_nan() {
        return Err(wrong());
    }
    let (base, units) = match binary.unwrap_or(false) {
        true => (1024.0, ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB", "YiB"]),
        false => (1000.0, ["kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB"]),
    };
    if bytes == 1.0 {
        return Ok("1 Byte".into());
    }
    if bytes < base {
        return Ok(format!("{} Bytes", bytes.trunc()));
    }
    let mut scaled = bytes / base;
    let mut unit = 0;
    while scaled >= base && unit + 1 < units.len() {
        scaled /= base;
        unit += 1;
    }
    Ok(format!("{scaled:.1} {}", units[unit]))
}

/// What Python prints on one line; longer values would be broken by rules of their own.
fn pretty(state: &State, value: &Value) -> Result<String> {
    let text = show::repr(state, &sorted(state, value)?)?;
    if text.chars().count() > 80 {
        return Err(failed("pprint: expected a value of at most 80 characters. Use `tojson`".into()));
    }
    Ok(text)
}

/// With the keys of mappings in order.
fn sorted(state: &State, value: &Value) -> Result<Value> {
    state.consume_fuel(1)?;
    Ok(match value.kind() {
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            keys.sort();
            let pair = |key: Value| value.get_item(&key).and_then(|item| sorted(state, &item)).map(|item| (key, item));
            Value::from_pairs(keys.into_iter().map(pair).collect::<Result<Vec<_>>>()?)
        }
        ValueKind::Seq if !value.is_tuple() => {
            value.try_iter()?.map(|item| sorted(state, &item)).collect::<Result<Vec<_>>>()?.into()
        }
        _ => value.clone(),
    })
}

/// Without comments and tags, white space made single, entities as characters.
fn strip_tags(text: &str) -> String {
    let mut bare = text.to_string();
    for (open, close) in [("<!--", "-->"), ("<", ">")] {
        let (mut kept, mut rest) = (String::with_capacity(bare.len()), bare.as_str());
        while let Some(start) = rest.find(open) {
            let Some(end) = rest[start..].find(close) else { break };
            kept.push_str(&rest[..start]);
            rest = &rest[start + end + close.len()..];
        }
        bare = kept + rest;
    }
    let bare = bare.split(is_space).filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ");
    let (mut out, mut rest) = (String::with_capacity(bare.len()), bare.as_str());
    while let Some(start) = rest.find('&') {
        let end = rest[start..].find(';').map_or(rest.len(), |end| start + end + 1);
        out.push_str(&rest[..start]);
        // An entity and what may stand before it, without the brackets of tags.
        let entity = rest[start..end].split(['<', '>']).next().unwrap_or_default();
        out.push_str(&minijinja_contrib::filters::striptags(entity.into()));
        rest = &rest[start + entity.len()..];
    }
    out + rest
}

fn escape(state: &State, value: &Value) -> Result<Value> {
    if value.is_safe() {
        return Ok(value.clone());
    }
    let text = show::text(state, value)?;
    let special = text.matches(['&', '<', '>', '\'', '"']).count();
    within_limit("escape", text.len().saturating_add(special.saturating_mul(5)))?;
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    Ok(Value::from_safe_string(text.replace('\'', "&#39;").replace('"', "&#34;")))
}
