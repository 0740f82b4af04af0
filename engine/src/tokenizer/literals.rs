//! Which texts a model takes for control tokens, and how they are found.

use std::ops::Range;

use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::AddedToken;

/// Texts that are looked for, leftmost first, the longest of those that start at the same place.
#[derive(Debug)]
pub(super) struct Literals {
    texts: Vec<String>,
    automaton: Option<AhoCorasick>,
}

impl Literals {
    /// Texts to look for; empty ones are left out.
    pub(super) fn new(texts: impl IntoIterator<Item = String>) -> Result<Literals, String> {
        let mut texts: Vec<String> = texts.into_iter().filter(|text| !text.is_empty()).collect();
        texts.sort_unstable();
        texts.dedup();
        let build = || AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&texts);
        let automaton = if texts.is_empty() { None } else { Some(build().map_err(|e| e.to_string())?) };
        Ok(Literals { texts, automaton })
    }

    /// The first one in `text`.
    pub(super) fn find(&self, text: &str) -> Option<Range<usize>> {
        self.automaton.as_ref()?.find(text).map(|found| found.range())
    }

    /// All of them, sorted.
    pub(super) fn texts(&self) -> &[String] {
        &self.texts
    }
}

/// Whether an added token steers the model: it is special, has the form of one that does, or the model's chat template
/// (`template`: what it writes by itself) writes it and it is no ordinary word or white space.
pub(super) fn is_control(token: &AddedToken, template: &str) -> bool {
    let text = token.content.as_str();
    let ordinary = text.chars().all(|c| c.is_alphanumeric() || c.is_whitespace() || c == '_' || c == '▁');
    token.special || marker(text) == Some(text.len()) || (!ordinary && template.contains(text))
}

/// Marks of turns and roles that a template writes, whether or not they are tokens.
pub(super) fn markers(template: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = template;
    while let Some(at) = rest.find(['<', '[']) {
        let length = marker(&rest[at..]);
        found.extend(length.map(|length| rest[at..at + length].to_string()));
        rest = &rest[at + length.unwrap_or(1)..];
    }
    found
}

/// Bytes of the marker that `text` begins with: `<|...|>`, `<｜...｜>`, `[INST]`, `[/INST]`, `<<SYS>>`, `<start_of_turn>`.
fn marker(text: &str) -> Option<usize> {
    /// Bytes between its brackets.
    const LONGEST: usize = 64;
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let within = |open: &str, close: &str, inner: &dyn Fn(&str) -> bool| {
        let body = text.strip_prefix(open)?;
        let end = body.find(close).filter(|end| (1..=LONGEST).contains(end))?;
        inner(&body[..end]).then_some(open.len() + end + close.len())
    };
    let solid =
        |inner: &str| !inner.contains(|c: char| c.is_whitespace() || matches!(c, '<' | '>' | '|' | '｜' | '\0'));
    let capitals = |inner: &str| {
        let name = inner.strip_prefix('/').unwrap_or(inner);
        name.len() > 1 && name.chars().all(|c| c.is_ascii_uppercase() || c == '_')
    };
    let bound = |inner: &str| {
        let of = inner.split_once("_of_");
        of.is_some_and(|(edge, what)| matches!(edge, "start" | "end" | "begin" | "beginning") && what.chars().all(word))
    };
    within("<|", "|>", &solid)
        .or_else(|| within("<｜", "｜>", &solid))
        .or_else(|| within("[", "]", &capitals))
        .or_else(|| within("<<", ">>", &capitals))
        .or_else(|| within("<", ">", &bound))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_told_from_ordinary_brackets() {
        for whole in [
            "<|im_start|>",
            "<｜User｜>",
            "<｜end▁of▁sentence｜>",
            "[INST]",
            "[/INST]",
            "<<SYS>>",
            "<</SYS>>",
            "<end_of_turn>",
        ] {
            assert_eq!(marker(whole), Some(whole.len()), "{whole}");
        }
        for none in ["<b>", "[1]", "[a]", "<|", "<||>", "<| a |>", "<think>", "[]", "[A]", "<a_of_b>", "<|a<|b|>"] {
            assert_eq!(marker(none), None, "{none}");
        }
        assert_eq!(markers("x [INST] <|a|>\0<|b|>[/INST] [x]"), ["[INST]", "<|a|>", "<|b|>", "[/INST]"]);
    }

    #[test]
    fn ordinary_words_and_spaces_are_no_control_tokens() {
        let added = |text: &str, special| AddedToken::from(text.to_string(), special);
        let template = "user\n\n<tool_call>{\"name\": 1}";
        for control in [added("x", true), added("<tool_call>", false), added("<|im_end|>", false)] {
            assert!(is_control(&control, template), "{control:?}");
        }
        for ordinary in ["user", "\n\n", "▁▁", "<table>", "name"] {
            assert!(!is_control(&added(ordinary, false), template), "{ordinary}");
        }
    }
}
