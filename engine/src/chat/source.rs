//! A chat template as text: what is spelt for Jinja2 respelt for minijinja, and the literals that it can write.

use super::respell::{assignments, mentions, respelled};

/// The function that refuses what Python does not iterate over.
pub(super) const ITERATED: &str = "_iterated";
/// The function that `%` stands for where it may fill a text.
pub(super) const REMAINDER: &str = "_remainder";
/// The function that `~` stands for.
pub(super) const CONCATENATED: &str = "_concatenated";
/// The filter that finds methods beside attributes.
pub(super) const ATTRIBUTE: &str = "_attribute";
/// The function that makes a macro take whatever it is given.
pub(super) const VARIADIC: &str = "_variadic";

/// A template before it is compiled.
#[derive(Debug, Default)]
pub(crate) struct Source {
    /// What minijinja compiles.
    pub(crate) text: String,
    /// Everything that the template can write by itself: the text between its tags and the string constants within
    /// them, apart by NUL so that no word runs across two of them.
    pub(crate) literals: String,
    /// The macros around the place that is read.
    macros: Vec<Macro>,
}

/// A macro whose end is still to come.
#[derive(Debug)]
struct Macro {
    name: String,
    /// Where its parameters end in the text.
    parameters_end: usize,
    /// It speaks of `varargs` or `kwargs`, which hold what it is given beyond its parameters.
    variadic: bool,
}

impl Source {
    /// Reads a template as Jinja2 would, with what Hugging Face adds to the language.
    ///
    /// Every kind of line end counts as `\n`. `{% generation %}` marks what the assistant said, for training; it has a
    /// scope of its own and renders as what it encloses, so that `{% with %}` says the same. A loop over none is an error
    /// in Python, and empty to minijinja: what loops run over passes [`ITERATED`]. `{% with a = 1, b = a %}` looks up `a` outside
    /// of itself, and minijinja assigns one after the other: several assignments become one of a tuple. Macros that speak of `varargs` or
    /// `kwargs` get these as parameters and pass [`VARIADIC`]. Expressions are respelt where minijinja has no hook
    /// (`respell.rs`).
    pub(crate) fn new(raw: &str) -> Source {
        let raw = raw.replace("\r\n", "\n").replace('\r', "\n");
        let mut source = Source::default();
        let mut rest = raw.as_str();
        while let Some(at) = find_tag(rest) {
            source.literal(&rest[..at]);
            let (open, body) = rest[at..].split_at(2);
            source.text.push_str(&rest[..at]);
            source.text.push_str(open);
            rest = match open {
                "{#" => source.copy(body, body.find("#}").map_or(body.len(), |end| end + 2)),
                "{%" => source.block(body),
                _ => source.expression(body, "}}"),
            };
        }
        source.literal(rest);
        source.text.push_str(rest);
        source
    }

    /// Takes a block tag from behind its `{%`; gives what follows it.
    fn block<'a>(&mut self, body: &'a str) -> &'a str {
        let name = tag_name(body);
        let respelt = match name {
            "generation" => "with",
            "endgeneration" => "endwith",
            _ => name,
        };
        let start = body.find(name).unwrap_or(0);
        self.text.push_str(&body[..start]);
        self.text.push_str(respelt);
        let body = &body[start + name.len()..];
        match name {
            "for" => return self.loop_head(body),
            "with" => return self.with_head(body),
            "macro" => return self.macro_head(body),
            "endmacro" => self.macro_end(),
            _ => {}
        }
        let rest = self.expression(body, "%}");
        if name != "raw" {
            return rest;
        }
        let is_end = |at: &usize| tag_name(&rest[at + 2..]) == "endraw";
        let end = rest.match_indices("{%").map(|(at, _)| at).find(is_end).unwrap_or(rest.len());
        self.literal(&rest[..end]);
        self.copy(rest, end)
    }

    /// Takes the head of a macro from behind `macro`; gives what follows it.
    fn macro_head<'a>(&mut self, body: &'a str) -> &'a str {
        let rest = self.expression(body, "%}");
        let name = tag_name(body).to_string();
        let parameters_end = self.text.rfind(')').unwrap_or(self.text.len());
        self.macros.push(Macro { name, parameters_end, variadic: false });
        rest
    }

    /// At the end of a macro, before the tag closes: one that is variadic gets its parameters, and is replaced by what fills them.
    fn macro_end(&mut self) {
        let Some(ended) = self.macros.pop().filter(|ended| ended.variadic) else { return };
        let more = if self.text[..ended.parameters_end].trim_end().ends_with('(') { "" } else { ", " };
        self.text.insert_str(ended.parameters_end, &format!("{more}varargs=none, kwargs=none"));
        self.text.push_str(&format!(" %}}{{% set {0} = {VARIADIC}({0}) ", ended.name));
    }

    /// Takes the head of a loop from behind `for`; gives what follows it.
    fn loop_head<'a>(&mut self, body: &'a str) -> &'a str {
        let (mut from, mut to) = (None, None);
        let end = self.scan(body, "%}", |at, word| match word {
            "in" if from.is_none() => from = Some(at + word.len()),
            "if" | "recursive" if from.is_some() && to.is_none() => to = Some(at),
            _ => {}
        });
        let head = body[..end].strip_suffix(['-', '+']).unwrap_or(&body[..end]);
        let to = to.unwrap_or(head.len());
        if let Some(from) = from.filter(|from| !body[*from..to].trim().is_empty()) {
            // Twice in brackets, since `in a, b` is a tuple.
            let head = format!("{} {ITERATED}(({})) ", &body[..from], self.respell(&body[from..to]));
            self.text.push_str(&head);
            let rest = self.respell(&body[to..end]);
            self.text.push_str(&rest);
        } else {
            self.copy(body, end);
        }
        self.copy(&body[end..], 2.min(body.len() - end))
    }

    /// Takes an expression up to and with `close`; gives what follows it.
    fn expression<'a>(&mut self, body: &'a str, close: &str) -> &'a str {
        let end = self.scan(body, close, |_, _| {});
        let expression = self.respell(&body[..end]);
        self.text.push_str(&expression);
        self.copy(&body[end..], close.len().min(body.len() - end))
    }

    /// What minijinja takes for an expression, which may end with the mark that trims white space.
    fn respell(&mut self, expression: &str) -> String {
        if ["varargs", "kwargs"].iter().any(|name| mentions(expression, name)) {
            self.macros.iter_mut().for_each(|outer| outer.variadic = true);
        }
        let (expression, mark) = match expression.char_indices().next_back() {
            Some((at, '-' | '+')) => expression.split_at(at),
            _ => (expression, ""),
        };
        respelled(expression) + mark
    }

    /// Where `close` stands behind an expression, whose string constants are noted; `word` is told the names and
    /// keywords outside of brackets that follow no dot.
    fn scan<'a>(&mut self, body: &'a str, close: &str, mut word: impl FnMut(usize, &'a str)) -> usize {
        let (mut at, mut depth) = (0, 0usize);
        while let Some(byte) = body.as_bytes().get(at) {
            if depth == 0 && body.as_bytes()[at..].starts_with(close.as_bytes()) {
                return at;
            }
            match byte {
                b'\'' | b'"' => {
                    let length = constant(&body[at + 1..], *byte);
                    self.literal(&body[at + 1..at + 1 + length]);
                    at += length + 1;
                }
                b'{' | b'(' | b'[' => depth += 1,
                b'}' | b')' | b']' => depth = depth.saturating_sub(1),
                b'a'..=b'z' | b'A'..=b'Z' | b'_' => {
                    let rest = &body[at..];
                    let length = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                    if depth == 0 && !body[..at].ends_with('.') {
                        word(at, &rest[..length]);
                    }
                    at += length - 1;
                }
                _ => {}
            }
            at += 1;
        }
        body.len()
    }

    /// Takes the head of a `with` from behind that word; gives what follows it.
    fn with_head<'a>(&mut self, body: &'a str) -> &'a str {
        let end = self.scan(body, "%}", |_, _| {});
        let head = body[..end].strip_suffix(['-', '+']).unwrap_or(&body[..end]);
        let found = assignments(head).unwrap_or_default();
        if found.len() < 2 && !found.iter().any(|(target, _)| target.contains(',')) {
            return self.expression(body, "%}");
        }
        let targets: Vec<String> = found.iter().map(|(target, _)| format!("({})", target.trim())).collect();
        let values: Vec<String> = found.iter().map(|(_, value)| format!("({})", self.respell(value))).collect();
        // A comma behind the last one makes a tuple of one, too.
        self.text.push_str(&format!(" ({},) = ({},) ", targets.join(", "), values.join(", ")));
        self.text.push_str(&body[head.len()..end]);
        self.copy(&body[end..], 2.min(body.len() - end))
    }

    fn copy<'a>(&mut self, text: &'a str, length: usize) -> &'a str {
        self.text.push_str(&text[..length]);
        &text[length..]
    }

    fn literal(&mut self, text: &str) {
        self.literals.push_str(text);
        self.literals.push('\0');
    }
}

/// Where the next tag opens.
fn find_tag(text: &str) -> Option<usize> {
    text.match_indices('{').map(|(at, _)| at).find(|at| matches!(text.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#')))
}

/// The name of the tag whose text behind `{%` is given.
fn tag_name(body: &str) -> &str {
    let body = body.strip_prefix(['-', '+']).unwrap_or(body).trim_start();
    let end = body.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(body.len());
    &body[..end]
}

/// Bytes of a string constant, from behind its opening quote to its closing one.
pub(super) fn constant(text: &str, quote: u8) -> usize {
    let mut bytes = text.bytes().enumerate();
    while let Some((at, byte)) = bytes.next() {
        if byte == quote {
            return at;
        }
        if byte == b'\\' {
            bytes.next();
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_is_respelt_only_where_it_is_a_tag() {
        let respelt = |raw: &str| Source::new(raw).text;
        assert_eq!(
            respelt("{%- generation -%}a{%endgeneration+%}{% generation_x %}"),
            "{%- with -%}a{%endwith+%}{% generation_x %}"
        );
        for kept in [
            "{{ '{% generation %}' }}",
            "{# {% generation %} #}{% set generation = 1 %}",
            "{% raw %}{% generation %}{% endraw %}",
            "{{ {'a': {'b': '}}'}} }}{% if x == '%}' %}",
            "{% if",
            "{{ 'a\\'",
            "{#",
        ] {
            assert_eq!(respelt(kept), kept);
        }
        assert_eq!(respelt("a\r\nb\rc\n"), "a\nb\nc\n");
    }

    #[test]
    fn what_a_loop_runs_over_is_wrapped_and_nothing_else() {
        let respelt = |raw: &str| Source::new(raw).text;
        assert_eq!(respelt("{% for a in b %}x"), "{% for a in _iterated(( b )) %}x");
        assert_eq!(respelt("{%- for a, b in c.items()-%}"), "{%- for a, b in _iterated(( c.items())) -%}");
        assert_eq!(
            respelt("{% for m in ms if m.if not in 'in' recursive %}"),
            "{% for m in _iterated(( ms )) if m.if not in 'in' recursive %}"
        );
        assert_eq!(respelt("{% for m in [1 if x, ' if %}'] %}"), "{% for m in _iterated(( [1 if x, ' if %}'] )) %}");
        for kept in ["{% for %}", "{% for x in %}", "{% for", "{% for x in", "{% format in x %}"] {
            assert_eq!(respelt(kept), kept);
        }
    }

    #[test]
    fn several_assignments_of_a_with_become_one() {
        let respelt = |raw: &str| Source::new(raw).text;
        assert_eq!(respelt("{%- with a=1, b = f(a, x=2) -%}"), "{%- with ((a), (b),) = ((1), ( f(a, x=2) ),) -%}");
        assert_eq!(
            respelt("{% with a, b = p, c = {'x': 1, 'y': '='} %}"),
            "{% with ((a, b), (c),) = (( p), ( {'x': 1, 'y': '='} ),) %}"
        );
        assert_eq!(respelt("{% with a, b = p %}"), "{% with ((a, b),) = (( p ),) %}");
        for kept in [
            "{% with %}",
            "{% with a = b == c %}",
            "{% with a = 1, %}",
            "{% with a, b %}",
            "{% with",
            "{% with a = 'b, c = d' %}",
        ] {
            assert_eq!(respelt(kept), kept);
        }
    }

    #[test]
    fn literals_are_what_the_template_can_write() {
        let literals = |raw: &str| Source::new(raw).literals;
        let found =
            literals("<a>{% if m == '<b>' %}{{ \"<c>\" + x['<d>'] }}{# <e> #}{% raw %}<f>{{ '<g>' }}{% endraw %}");
        for literal in ["<a>", "<b>", "<c>", "<d>", "<f>", "<g>"] {
            assert!(found.contains(literal), "{literal}: {found:?}");
        }
        assert!(!found.contains("<e>"), "{found:?}");
        assert!(!literals("{{ '<|' + role + '|>' }}").contains("<||>"));
    }
}
