//! The methods of Python's texts. Places in a text are counted in characters.

use minijinja::State;
use minijinja::value::{Tuple, Value};

use super::arguments::Arguments;
use super::letters::{self, is_space};
use super::{Result, failed, within_limit};

/// Calls a method; `None` where `minijinja-contrib` has it as Python has.
pub(super) fn call(state: &State, text: &str, method: &str, args: &[Value]) -> Result<Option<Value>> {
    let args = Arguments::new(method, args)?;
    if let Some(answer) = letters::ask(text, method) {
        args.end(0)?;
        return Ok(Some(Value::from(answer)));
    }
    let plain = |of: &dyn Fn(&str) -> String| args.end(0).map(|()| Some(Value::from(of(text))));
    match method {
        "title" => plain(&letters::title),
        "capitalize" => plain(&letters::capitalize),
        "casefold" => plain(&letters::casefold),
        "swapcase" => plain(&letters::swapcase),
        "strip" | "lstrip" | "rstrip" => {
            let chars = args.text(0, "")?;
            args.end(1)?;
            Ok(Some(Value::from(strip(text, chars.as_deref(), method != "rstrip", method != "lstrip"))))
        }
        "split" | "rsplit" => split(text, &args, method == "rsplit").map(Some),
        "splitlines" => {
            let keep: Option<bool> = args.optional(0, "keepends")?;
            args.end(1)?;
            Ok(Some(lines(text, keep.unwrap_or(false)).into_iter().collect()))
        }
        "partition" | "rpartition" => partition(text, &args, method == "rpartition").map(Some),
        "removeprefix" | "removesuffix" => {
            let affix = args.required_text(0)?;
            args.end(1)?;
            let prefix = method == "removeprefix";
            let rest = if prefix { text.strip_prefix(&*affix) } else { text.strip_suffix(&*affix) };
            Ok(Some(Value::from(rest.unwrap_or(text))))
        }
        "replace" => replace(text, &args).map(Some),
        "find" | "rfind" | "index" | "rindex" | "count" => search(text, method, &args).map(Some),
        "startswith" | "endswith" => has_affix(text, &args, method == "startswith").map(Some),
        "zfill" | "center" | "ljust" | "rjust" => pad_method(text, method, &args).map(Some),
        "expandtabs" => expand_tabs(text, &args).map(Some),
        "translate" => translate(text, &args).map(Some),
        "maketrans" => make_translation(&args).map(Some),
        "join" => join_method(state, text, &args).map(Some),
        "encode" => Err(failed("encode: expected a template that works with texts alone, found bytes".into())),
        _ => Ok(None),
    }
}

pub(super) fn strip<'a>(text: &'a str, chars: Option<&str>, start: bool, end: bool) -> &'a str {
    let drop = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let text = if start { text.trim_start_matches(drop) } else { text };
    if end { text.trim_end_matches(drop) } else { text }
}

fn split(text: &str, args: &Arguments, from_end: bool) -> Result<Value> {
    let (separator, limit): (_, Option<i64>) = (args.text(0, "sep")?, args.optional(1, "maxsplit")?);
    args.end(2)?;
    let pieces = limit.and_then(|n| usize::try_from(n).ok()).map_or(usize::MAX, |n| n.saturating_add(1));
    let mut found: Vec<&str> = match separator.as_deref() {
        Some("") => return Err(empty_separator(if from_end { "rsplit" } else { "split" })),
        Some(separator) if from_end => text.rsplitn(pieces, separator).collect(),
        Some(separator) => text.splitn(pieces, separator).collect(),
        None => words(text, pieces, from_end),
    };
    if from_end {
        found.reverse();
    }
    Ok(found.into_iter().collect())
}

fn empty_separator(method: &str) -> minijinja::Error {
    failed(format!("{method}: the separator is empty"))
}

/// Up to `pieces` words, in the order in which they are met; the last one holds the rest.
fn words(text: &str, pieces: usize, from_end: bool) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = strip(text, None, !from_end, from_end);
    while !rest.is_empty() {
        let cut = if from_end { rest.rfind(is_space) } else { rest.find(is_space) };
        let Some(at) = cut.filter(|_| found.len() + 1 < pieces) else {
            found.push(rest);
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
pub(super) fn lines(text: &str, keep: bool) -> Vec<&str> {
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

fn partition(text: &str, args: &Arguments, last: bool) -> Result<Value> {
    let separator = args.required_text(0)?;
    args.end(1)?;
    if separator.is_empty() {
        return Err(empty_separator("partition"));
    }
    let found = if last { text.rsplit_once(&*separator) } else { text.split_once(&*separator) };
    let parts = match found {
        Some((before, after)) => [before, &*separator, after],
        None if last => ["", "", text],
        None => [text, "", ""],
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from))))
}

fn replace(text: &str, args: &Arguments) -> Result<Value> {
    let (old, new) = (args.required_text(0)?, args.required_text(1)?);
    let count: Option<i64> = args.optional(2, "")?;
    args.end(3)?;
    let most = count.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
    let hits = text.matches(&*old).take(most).count();
    within_limit("replace", text.len().saturating_add(hits.saturating_mul(new.len())))?;
    Ok(Value::from(text.replacen(&*old, &new, hits)))
}

/// The part of a text between the arguments `start` and `end` (at the places 1 and 2), and the characters before it; `None`
/// where it would begin behind its end, in which not even nothing is found.
fn part<'t>(text: &'t str, args: &Arguments) -> Result<Option<(&'t str, usize)>> {
    let (start, end): (Option<i64>, Option<i64>) = (args.optional(1, "")?, args.optional(2, "")?);
    args.end(3)?;
    if start.is_none() && end.is_none() {
        return Ok(Some((text, 0)));
    }
    let length = text.chars().count();
    let from_end = |at: i64| if at < 0 { (at.saturating_add_unsigned(length as u64)).max(0) } else { at } as usize;
    let (start, end) = (start.map_or(0, from_end), end.map_or(length, from_end).min(length));
    if start > end {
        return Ok(None);
    }
    let byte = |at: usize| text.char_indices().nth(at).map_or(text.len(), |(byte, _)| byte);
    Ok(Some((&text[byte(start)..byte(end)], start)))
}

fn search(text: &str, method: &str, args: &Arguments) -> Result<Value> {
    let needle = args.required_text(0)?;
    let part = part(text, args)?;
    if method == "count" {
        return Ok(Value::from(part.map_or(0, |(part, _)| part.matches(&*needle).count())));
    }
    let at = part.and_then(|(part, before)| {
        let at = if method.starts_with('r') { part.rfind(&*needle) } else { part.find(&*needle) };
        at.map(|at| before + part[..at].chars().count())
    });
    match at {
        Some(at) => Ok(Value::from(at)),
        None if method.ends_with("find") => Ok(Value::from(-1)),
        None => Err(failed(format!("{method}: substring not found"))),
    }
}

fn has_affix(text: &str, args: &Arguments, start: bool) -> Result<Value> {
    let method = if start { "startswith" } else { "endswith" };
    let affixes: Value = args.required(0)?;
    let affixes = if affixes.is_tuple() { affixes.try_iter()?.collect() } else { vec![affixes] };
    let part = part(text, args)?;
    let mut found = false;
    for affix in &affixes {
        let affix = affix
            .as_str()
            .ok_or_else(|| failed(format!("{method}: expected a text or a tuple of texts, found {}", affix.kind())))?;
        found |= part.is_some_and(|(part, _)| if start { part.starts_with(affix) } else { part.ends_with(affix) });
    }
    Ok(Value::from(found))
}

fn pad_method(text: &str, method: &str, args: &Arguments) -> Result<Value> {
    let width: i64 = args.required(0)?;
    let fill = if method == "zfill" { None } else { args.text(1, "")? };
    args.end(if method == "zfill" { 1 } else { 2 })?;
    let fill = match fill.as_deref().map(|fill| (fill.chars().next(), fill.chars().count())) {
        None => None,
        Some((fill, 1)) => fill,
        Some(_) => return Err(failed(format!("{method}: expected one character to fill with, found another number"))),
    };
    pad(text, method, width, fill).map(Value::from)
}

/// A text of at least `width` characters.
pub(super) fn pad(text: &str, method: &str, width: i64, fill: Option<char>) -> Result<String> {
    let missing = usize::try_from(width).unwrap_or(0).saturating_sub(text.chars().count());
    within_limit(method, missing.saturating_mul(4))?;
    let fill = |count: usize| fill.unwrap_or(if method == "zfill" { '0' } else { ' ' }).to_string().repeat(count);
    Ok(match method {
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
    })
}

fn expand_tabs(text: &str, args: &Arguments) -> Result<Value> {
    let size: Option<i64> = args.optional(0, "tabsize")?;
    args.end(1)?;
    let size = usize::try_from(size.unwrap_or(8)).unwrap_or(0);
    within_limit("expandtabs", text.len().saturating_add(text.matches('\t').count().saturating_mul(size)))?;
    let (mut out, mut column) = (String::with_capacity(text.len()), 0);
    for c in text.chars() {
        match c {
            '\t' if size > 0 => {
                let spaces = size - column % size;
                out.extend(std::iter::repeat_n(' ', spaces));
                column += spaces;
            }
            '\t' => {}
            c => {
                out.push(c);
                column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    Ok(Value::from(out))
}

/// Characters replaced as a mapping from their codes says: by a text, by the character of a code, or by nothing.
fn translate(text: &str, args: &Arguments) -> Result<Value> {
    let table: Value = args.required(0)?;
    args.end(1)?;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let instead = table.get_item(&Value::from(u32::from(c)))?;
        if instead.is_undefined() {
            out.push(c);
        } else if let Some(text) = instead.as_str() {
            out.push_str(text);
        } else if !instead.is_none() {
            let code = u32::try_from(instead.clone()).ok().and_then(char::from_u32);
            out.push(code.ok_or_else(|| failed(format!("translate: expected a character, found {instead}")))?);
        }
        within_limit("translate", out.len())?;
    }
    Ok(Value::from(out))
}

/// A mapping for `translate`: characters to those at the same place of a second text, and to nothing those of a third.
fn make_translation(args: &Arguments) -> Result<Value> {
    let (from, to) = (args.required_text(0)?, args.required_text(1)?);
    let gone = args.text(2, "")?;
    args.end(3)?;
    if from.chars().count() != to.chars().count() {
        return Err(failed("maketrans: expected two texts of equal length".into()));
    }
    let code = |c: char| Value::from(u32::from(c));
    let pairs = from.chars().zip(to.chars()).map(|(from, to)| (code(from), code(to)));
    let gone = gone.iter().flat_map(|gone| gone.chars()).map(|c| (code(c), Value::from(())));
    Ok(Value::from_pairs(pairs.chain(gone)))
}

fn join_method(state: &State, separator: &str, args: &Arguments) -> Result<Value> {
    let list: Value = args.required(0)?;
    args.end(1)?;
    let mut texts = Vec::new();
    for item in list.try_iter()? {
        state.consume_fuel(1)?;
        let text = item.as_str().ok_or_else(|| failed(format!("join: expected texts, found a {}", item.kind())))?;
        texts.push(text.to_string());
    }
    join(state, separator, &texts).map(Value::from)
}

/// Texts with a separator between them.
pub(super) fn join(state: &State, separator: &str, texts: &[String]) -> Result<String> {
    let bytes = texts.iter().map(String::len).sum::<usize>() + separator.len().saturating_mul(texts.len());
    within_limit("join", bytes)?;
    state.consume_fuel(bytes as u64 / 64)?;
    Ok(texts.join(separator))
}
