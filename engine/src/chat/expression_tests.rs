//! Expressions and statements of templates, each with the text that Jinja2 gives
//! (`tests/fixtures/make_template_expressions.py`).
#![allow(clippy::unwrap_used)]

use std::path::Path;

use super::{ChatMessage, ChatTemplate};
use crate::error::{EngineError, Result};

fn rendered(template: &str) -> Result<String> {
    let messages = [ChatMessage::new("user", " Hi there "), ChatMessage::new("assistant", "Yes?")];
    ChatTemplate::new(template, Vec::new())?.render(&messages)
}

/// What differs on purpose or for want of a place to hook into, with what is given here; none: refused.
const DIFFERENT: &[(&str, Option<&str>)] = &[
    // Bytes, halves of characters and chance have no place in a prompt.
    ("{{ 'abc'.encode() }}", None),
    ("{{ 'abc'.encode('utf-8') }}", None),
    ("{{ '\\ud83e' }}", Some("\u{fffd}")),
    ("{{ '\\ud83e\\udd14' }}", Some("\u{fffd}\u{fffd}")),
    ("{{ 'x' | random }}", None),
    // Refused, as no template for prompts needs it.
    ("{{ 'http://a.b c' | urlize }}", None),
    ("{{ {'a': 1, 'b': none} | xmlattr }}", None),
    ("{{ '{!r}'.format('a') }}", None),
    ("{{ dict([('a', 1)]) }}", None),
    ("{{ -true }}", None),
    ("{{ +1 }}", None),
    (
        "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.current }}{{ c.reset() }}{{ c.current }}",
        None,
    ),
    ("{%- set f = 'abc'.upper -%}{{ f() }}", None),
    // The template engine's own: methods nobody calls, views of mappings, comparisons of unlike things, names of characters,
    // defaults that look at other parameters.
    ("{{ 'x'.upper and 'y' }}", Some("")),
    ("{{ '\\N{BULLET}' }}", Some("\\N{BULLET}")),
    ("{{ 1 < 'a' }}", Some("True")),
    ("{{ none < 1 }}", Some("True")),
    ("{{ 1 in 'abc' }}", Some("False")),
    ("{{ {'a': 1}.keys() }}", Some("['a']")),
    ("{{ {'a': 1}.items() }}", Some("[('a', 1)]")),
    ("{{ {'a': 1}.values() }}", Some("[1]")),
    ("{{ namespace(a=1) }}", Some("{'a': 1}")),
    ("{{ lipsum is defined }}", Some("False")),
    ("{{ self is defined }}", Some("False")),
    ("{% macro m(a, b=a) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}", Some("1")),
    ("{% macro m(a) %}{{ a }}{% endmacro %}{{ m.name }}{{ m.arguments }}{{ m is callable }}", Some("m['a']True")),
];

#[test]
fn expressions_give_what_jinja2_gives() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden/template_expressions.json");
    let rows: Vec<(String, Option<String>)> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(rows.len() >= 600);
    for (template, _) in DIFFERENT {
        assert!(rows.iter().any(|(row, _)| row == template), "{template} is in no row");
    }
    let mut wrong = Vec::new();
    for (template, theirs) in &rows {
        let different = DIFFERENT.iter().find(|(different, _)| different == template);
        let expected = different.map_or(theirs.as_deref(), |(_, ours)| *ours);
        let found = rendered(template);
        if found.as_deref().ok() != expected {
            wrong.push(format!("{template}\n    expected {expected:?}\n    found    {found:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn what_is_refused_says_why() {
    for (template, reason) in [
        ("{{ 'x' | random }}", "the same prompt each time"),
        ("{{ 'abc'.encode() }}", "found bytes"),
        ("{{ '%d' % 'a' }}", "expected a number, found string"),
        ("{{ '%s %s' % ('a',) }}", "at least 2 values, found 1"),
        ("{{ 'a,b'.split(1) }}", "expected a text, found a number"),
        ("{{ 'a'.center(3, fillchar='x') }}", "center"),
        ("{{ range(200000) }}", "at most 100000 numbers"),
        ("{{ [range(2)] | tojson }}", "found a range"),
    ] {
        let error = rendered(template).unwrap_err().to_string();
        assert!(error.contains(reason), "{template}: {error}");
    }
}

#[test]
fn what_makes_much_of_little_is_stopped() {
    for template in [
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ ('\\t' * 1000).expandtabs(999999) }}",
        "{{ ('a' * 100000).translate({97: 'b' * 1000}) }}",
        "{{ 'a' | center(999999999) }}",
        "{{ ('a\\n' * 10000) | indent(99999) }}",
        "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
        "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | pprint }}",
    ] {
        let error = rendered(template).unwrap_err();
        assert!(matches!(error, EngineError::ChatTemplate(_)), "{template}: {error:?}");
    }
}
