//! Expressions of Jinja2 respelt for minijinja: what it has no place to hook into becomes a call.
//!
//! * `'%s' % x` fills a text in Python: `_remainder('%s', x)`. Between plain numbers the operator stays.
//! * `a ~ b` joins what Python's `str` writes: `_concatenated(a, b)`.
//! * `x.strip is defined` holds for methods too: `x|_attribute('strip') is defined`.
//! * Escapes of constants that minijinja does not know, or refuses: `\U0001f914`, and halves of surrogate pairs, which are no
//!   characters and become U+FFFD.

use super::python::objects::is_method;
use super::source::{ATTRIBUTE, CONCATENATED, REMAINDER, constant};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Constant,
    Number,
    Name,
    Open,
    Close,
    Operator,
}

#[derive(Clone, Copy, Debug)]
struct Token<'a> {
    kind: Kind,
    text: &'a str,
    start: usize,
}

impl Token<'_> {
    fn end(&self) -> usize {
        self.start + self.text.len()
    }

    fn is(&self, text: &str) -> bool {
        self.text == text && self.kind != Kind::Constant
    }
}

/// Words that are no operands.
const KEYWORDS: [&str; 8] = ["and", "or", "not", "in", "if", "else", "is", "recursive"];

/// Whether `name` stands in an expression as a variable.
pub(super) fn mentions(expression: &str, name: &str) -> bool {
    let tokens = tokens(expression);
    tokens.iter().enumerate().any(|(at, token)| {
        token.is(name) && !(at > 0 && tokens[at - 1].is(".")) && !tokens.get(at + 1).is_some_and(|next| next.is("="))
    })
}

/// The expression as minijinja takes it.
pub(super) fn respelled(expression: &str) -> String {
    let tokens = tokens(expression);
    // Texts that replace a number of bytes at a place.
    let mut edits: Vec<(usize, usize, String)> = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        match token.kind {
            Kind::Constant => edits.extend(escapes(token)),
            Kind::Operator if token.text == "%" => edits.extend(remainder(&tokens, at).into_iter().flatten()),
            Kind::Operator if token.text == "~" => edits.extend(concatenation(&tokens, at).into_iter().flatten()),
            Kind::Operator if token.text == "." => edits.extend(attribute(&tokens, at)),
            _ => {}
        }
    }
    // Where both begin, a chain of `~` is around the `%` of its first operand.
    edits.sort_by_key(|(at, length, text)| (*at, *length, !text.starts_with(CONCATENATED)));
    let (mut out, mut done) = (String::with_capacity(expression.len()), 0);
    for (at, length, text) in edits {
        out.push_str(&expression[done..at]);
        out.push_str(&text);
        done = at + length;
    }
    out + &expression[done..]
}

fn tokens(text: &str) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    let mut start = 0;
    while let Some(first) = text[start..].chars().next() {
        let rest = &text[start..];
        let word = || rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        let (kind, length) = match first {
            '\'' | '"' => (Kind::Constant, (constant(&rest[1..], first as u8) + 2).min(rest.len())),
            '0'..='9' => (Kind::Number, number(rest)),
            '(' | '[' | '{' => (Kind::Open, 1),
            ')' | ']' | '}' => (Kind::Close, 1),
            c if c.is_alphabetic() || c == '_' => (Kind::Name, word()),
            c if c.is_whitespace() => {
                start += c.len_utf8();
                continue;
            }
            c => {
                let two = ["**", "//", "==", "!=", "<=", ">="].iter().any(|two| rest.starts_with(two));
                (Kind::Operator, if two { 2 } else { c.len_utf8() })
            }
        };
        tokens.push(Token { kind, text: &rest[..length], start });
        start += length;
    }
    tokens
}

/// Bytes of a number: digits, a fraction, an exponent with its sign.
fn number(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let fraction = *byte == b'.' && bytes.get(at + 1).is_some_and(u8::is_ascii_digit);
        let sign = matches!(byte, b'+' | b'-') && matches!(bytes[at - 1], b'e' | b'E') && !text.starts_with("0x");
        if !byte.is_ascii_alphanumeric() && *byte != b'_' && !fraction && !sign {
            break;
        }
        at += 1;
    }
    at
}

/// Whether a token can be the last one of an operand.
fn ends_operand(token: &Token) -> bool {
    match token.kind {
        Kind::Constant | Kind::Number | Kind::Close => true,
        Kind::Name => !KEYWORDS.contains(&token.text),
        Kind::Open | Kind::Operator => false,
    }
}

/// The edits that make the `%` at token `at` a call, unless both sides can only be numbers or the sides are not clear.
fn remainder(tokens: &[Token], at: usize) -> Option<[(usize, usize, String); 3]> {
    let (first, end) = (left_operand(tokens, at)?, right_operand(tokens, at + 1)?);
    let lone_number = end == at + 2 && tokens[at + 1].kind == Kind::Number;
    if lone_number && tokens[at - 1].kind != Kind::Constant {
        return None;
    }
    // Brackets around the operands: `a, b` would be other arguments.
    Some([
        (tokens[first].start, 0, format!("{REMAINDER}(")),
        (tokens[at].start, 1, ",".into()),
        (tokens[end - 1].end(), 0, ")".into()),
    ])
}

/// The edits that make a chain of `~` a call, given its first one, unless its operands are not clear.
fn concatenation(tokens: &[Token], first: usize) -> Option<Vec<(usize, usize, String)>> {
    let start = left_operand(tokens, first)?;
    if start > 0 && tokens[start - 1].is("~") {
        return None;
    }
    let mut edits = vec![(tokens[start].start, 0, format!("{CONCATENATED}("))];
    let mut at = first;
    while tokens.get(at).is_some_and(|token| token.is("~")) {
        edits.push((tokens[at].start, 1, ",".into()));
        at = right_operand(tokens, at + 1)?;
        while tokens.get(at).is_some_and(|token| ["*", "/", "//", "%"].iter().any(|text| token.is(text))) {
            at = right_operand(tokens, at + 1)?;
        }
    }
    edits.push((tokens[at - 1].end(), 0, ")".into()));
    Some(edits)
}

/// The targets and values of `a = 1, b, c = d`; `None` where it is no list of assignments.
pub(super) fn assignments(text: &str) -> Option<Vec<(&str, &str)>> {
    let tokens = tokens(text);
    let mut depth = 0usize;
    let mut outer = Vec::new();
    for token in &tokens {
        match token.kind {
            Kind::Open => depth += 1,
            Kind::Close => depth = depth.checked_sub(1)?,
            Kind::Operator if depth == 0 && matches!(token.text, "=" | ",") => outer.push(token),
            _ => {}
        }
    }
    let mut found: Vec<(&str, &str)> = Vec::new();
    let mut target = 0;
    for (at, equals) in outer.iter().enumerate().filter(|(_, token)| token.text == "=") {
        // A value ends at the first comma, and what stands between that and the next sign is the next target.
        let next = outer.get(at + 1);
        let end = match next {
            Some(comma) if comma.text == "," => comma.start,
            Some(_) => return None,
            None => text.len(),
        };
        let (left, value) = (&text[target..equals.start], &text[equals.end()..end]);
        if left.trim().is_empty() || value.trim().is_empty() {
            return None;
        }
        found.push((left, value));
        target = next.map_or(end, |comma| comma.end());
    }
    (target == text.len()).then_some(found)
}

/// The first token of what stands to the left of an operator that binds as `*` does.
fn left_operand(tokens: &[Token], operator: usize) -> Option<usize> {
    let mut at = operator;
    while at > 0 {
        let token = &tokens[at - 1];
        match token.kind {
            Kind::Close => at = opening(tokens, at - 1)? + 1,
            Kind::Open => break,
            Kind::Name if token.text == "is" => return None,
            Kind::Name if KEYWORDS.contains(&token.text) => break,
            Kind::Operator if matches!(token.text, "+" | "-") && at >= 2 && ends_operand(&tokens[at - 2]) => break,
            Kind::Operator if !matches!(token.text, "+" | "-" | "." | "|" | "*" | "/" | "//" | "%" | "**") => break,
            _ => {}
        }
        at -= 1;
    }
    (at < operator).then_some(at)
}

/// Behind the last token of the operand that begins at `at`, with what is called, looked up and filtered.
fn right_operand(tokens: &[Token], mut at: usize) -> Option<usize> {
    loop {
        while tokens.get(at).is_some_and(|token| matches!(token.text, "+" | "-") && token.kind == Kind::Operator) {
            at += 1;
        }
        let first = tokens.get(at)?;
        at = match first.kind {
            Kind::Open => closing(tokens, at)? + 1,
            Kind::Constant | Kind::Number => at + 1,
            Kind::Name if !KEYWORDS.contains(&first.text) => at + 1,
            _ => return None,
        };
        while let Some(token) = tokens.get(at) {
            at = match (token.kind, token.text) {
                (Kind::Operator, "." | "|") => at + 2,
                (Kind::Open, "(" | "[") => closing(tokens, at)? + 1,
                (Kind::Constant, _) if tokens[at - 1].kind == Kind::Constant => at + 1,
                (Kind::Name, "is") => return None,
                _ => break,
            };
        }
        if !tokens.get(at).is_some_and(|token| token.is("**")) {
            return (at <= tokens.len()).then_some(at);
        }
        at += 1;
    }
}

fn closing(tokens: &[Token], open: usize) -> Option<usize> {
    let mut depth = 0usize;
    for (at, token) in tokens.iter().enumerate().skip(open) {
        match token.kind {
            Kind::Open => depth += 1,
            Kind::Close if depth == 1 => return Some(at),
            Kind::Close => depth = depth.checked_sub(1)?,
            _ => {}
        }
    }
    None
}

fn opening(tokens: &[Token], close: usize) -> Option<usize> {
    let mut depth = 0usize;
    for (at, token) in tokens.iter().enumerate().take(close + 1).rev() {
        match token.kind {
            Kind::Close => depth += 1,
            Kind::Open if depth == 1 => return Some(at),
            Kind::Open => depth = depth.checked_sub(1)?,
            _ => {}
        }
    }
    None
}

/// The edit that asks a test about a method: the dot at token `at`, the name behind it, and `is` behind that.
fn attribute(tokens: &[Token], at: usize) -> Option<(usize, usize, String)> {
    let (name, is) = (tokens.get(at + 1)?, tokens.get(at + 2)?);
    let asked = at > 0 && is_method(name.text) && is.is("is");
    asked.then(|| (tokens[at].start, name.end() - tokens[at].start, format!("|{ATTRIBUTE}('{}')", name.text)))
}

/// The edits of a constant's escapes: long ones become characters, halves of surrogate pairs U+FFFD.
fn escapes(constant: &Token) -> Vec<(usize, usize, String)> {
    let mut edits = Vec::new();
    let mut at = 0;
    while let Some(next) = constant.text[at..].find('\\').map(|found| at + found) {
        let code = |digits: usize| {
            let digits = constant.text.get(next + 2..next + 2 + digits)?;
            u32::from_str_radix(digits, 16).ok()
        };
        let edit = match constant.text[next + 1..].chars().next() {
            Some('U') => code(8).and_then(char::from_u32).map(|c| (10, c)),
            Some('u') => code(4).filter(|code| char::from_u32(*code).is_none()).map(|_| (6, '\u{fffd}')),
            Some(c) => {
                at = next + 1 + c.len_utf8();
                continue;
            }
            None => break,
        };
        if let Some((length, c)) = edit {
            // A quote or a backslash would end the constant.
            let text = if c.is_ascii() { format!("\\x{:02x}", u32::from(c)) } else { c.to_string() };
            edits.push((constant.start + next, length, text));
            at = next + length;
        } else {
            at = next + 2;
        }
    }
    edits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percent_sign_that_may_fill_a_text_becomes_a_call() {
        for (expression, expected) in [
            ("'%s' % x", "_remainder('%s' , x)"),
            ("'%d' % 5 + 'a'", "_remainder('%d' , 5) + 'a'"),
            ("a + '%s%s' % (b, c)[0] | upper + d", "a + _remainder('%s%s' , (b, c)[0] | upper) + d"),
            ("f(a, b.c * -d % e ** -2, g)", "f(a, _remainder(b.c * -d , e ** -2), g)"),
            ("a % b % c", "_remainder(_remainder(a , b) , c)"),
            ("x - y % z", "x - _remainder(y , z)"),
        ] {
            assert_eq!(respelled(expression), expected);
        }
        for kept in
            ["loop.index0 % 2 == 0", "(a + b) % 10", "'50%'", "a is divisibleby 3 % b", "% b", "a %", "a % (", ") % b"]
        {
            assert_eq!(respelled(kept), kept);
        }
    }

    #[test]
    fn a_chain_of_tildes_becomes_a_call() {
        for (expression, expected) in [
            ("a ~ b", "_concatenated(a , b)"),
            ("x + a ~ b.c[0] | upper ~ -d * 2 - y", "x + _concatenated(a , b.c[0] | upper , -d * 2) - y"),
            ("'%s' % a ~ b", "_concatenated(_remainder('%s' , a) , b)"),
            ("a ~ b % c", "_concatenated(a , _remainder(b , c))"),
            ("(a ~ b) ~ f(c ~ d)", "_concatenated((_concatenated(a , b)) , f(_concatenated(c , d)))"),
            ("a if b ~ c else d ~ e", "a if _concatenated(b , c) else _concatenated(d , e)"),
            ("a ~ b == c ~ d", "_concatenated(a , b) == _concatenated(c , d)"),
        ] {
            assert_eq!(respelled(expression), expected);
        }
        for kept in ["'a ~ b'", "a ~", "~ b", "a ~ b is string", "a is string ~ b", "a ~ not b"] {
            assert_eq!(respelled(kept), kept);
        }
    }

    #[test]
    fn a_method_that_a_test_asks_about_is_looked_up() {
        assert_eq!(respelled("m.content.strip is defined"), "m.content|_attribute('strip') is defined");
        for kept in ["m.strip() is defined", "m.content is defined", "m.strip == 1", "'a.strip is b'", ".strip is x"] {
            assert_eq!(respelled(kept), kept);
        }
    }

    #[test]
    fn escapes_that_minijinja_does_not_know_become_characters() {
        for (constant, expected) in [
            (r"'\U0001f914'", "'🤔'"),
            (r"'\U00000027\U0000005c'", r"'\x27\x5c'"),
            (r"'\ud83e'", "'\u{fffd}'"),
            (r"'\\ud83e\u00e9\\\ud83e'", "'\\\\ud83e\\u00e9\\\\\u{fffd}'"),
            (r"'\u12'", r"'\u12'"),
            (r"'\U0011ffff'", r"'\U0011ffff'"),
            (r"'é\", r"'é\"),
        ] {
            assert_eq!(respelled(constant), expected);
        }
    }
}
