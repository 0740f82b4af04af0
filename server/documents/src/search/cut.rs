//! Words that the edge of a passage cuts, as where a word is longer than a passage may be.

use std::ops::Range;
use std::rc::Rc;

use super::analyzer::{Class, class, normalise, runs, shows_nothing, units};
use super::scripts::is_mark;

/// Finds what stands across places of a text.
pub(super) struct Cuts<'a> {
    text: &'a str,
    /// The word that was found last: the edges of many passages may cut it.
    last: Option<(Range<usize>, Rc<CutWord>)>,
}

/// What an index keeps of a word that is cut.
pub(super) struct CutWord {
    /// Its terms as a whole.
    pub(super) terms: Vec<String>,
    /// Whether it is found by parts too.
    pub(super) is_long: bool,
}

impl<'a> Cuts<'a> {
    /// Of a whole text.
    pub(super) fn new(text: &'a str) -> Cuts<'a> {
        Cuts { text, last: None }
    }

    /// The whole text.
    pub(super) fn text(&self) -> &'a str {
        self.text
    }

    /// The word of letters and digits that begins before byte `at` and ends behind it; `kept` is given it, normalised.
    pub(super) fn word(&mut self, at: usize, kept: impl FnOnce(&str) -> CutWord) -> Option<Rc<CutWord>> {
        if let Some((_, word)) = self.last.as_ref().filter(|(place, _)| place.start < at && at < place.end) {
            return Some(Rc::clone(word));
        }
        let place = self.start_of_word(at)..self.end_of_word(at, usize::MAX);
        if place.start == at || place.end == at {
            return None;
        }
        let text = normalise(&self.text[place.clone()]);
        // Characters such as fractions become several words: the longest one is it.
        let found = runs(&text).filter(|(class, _)| *class == Class::Word).map(|(_, run)| run);
        let word = Rc::new(kept(found.max_by_key(|run| run.len())?));
        self.last = Some((place, Rc::clone(&word)));
        Some(word)
    }

    /// Up to `count` characters, normalised, that go on with the word before byte `at`.
    pub(super) fn letters_behind(&self, at: usize, count: usize) -> String {
        normalise(&self.text[at..self.end_of_word(at, count)])
    }

    /// The character with its marks, normalised, that goes on with a run of `class` before byte `at`.
    pub(super) fn unit_behind(&self, at: usize, class: Class) -> Option<String> {
        // Enough for a character with its marks.
        let text: String = self.text[at..].chars().take(16).collect();
        let text = normalise(&text);
        let (found, run) = runs(&text).next()?;
        (found == class).then(|| units(run).first().map(|unit| (*unit).to_string()))?
    }

    fn start_of_word(&self, at: usize) -> usize {
        let mut start = at;
        let mut before = self.text[..at].char_indices().rev().peekable();
        while let Some((place, c)) = before.next() {
            let goes_on = match shows_nothing(c, || before.peek().map(|(_, c)| *c)) {
                Some(divides) => !divides,
                None => is_mark(c) || class(c, Class::Gap) == Class::Word,
            };
            if !goes_on {
                break;
            }
            start = place;
        }
        start
    }

    /// Behind the last of at most `count` characters that go on with the word before `at`.
    fn end_of_word(&self, at: usize, count: usize) -> usize {
        let mut before = self.text[..at].chars().next_back();
        let mut end = at;
        for c in self.text[at..].chars().take(count) {
            let goes_on = match shows_nothing(c, || before) {
                Some(divides) => !divides,
                None => is_mark(c) || class(c, Class::Gap) == Class::Word,
            };
            if !goes_on {
                break;
            }
            end += c.len_utf8();
            before = Some(c);
        }
        end
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_word_across_a_place_is_found_and_none_beside_one() {
        let text = "One Wo\u{ad}rd, \u{fb01}ne caf\u{e9}s: كتاب\u{200c}ها 图书馆 ja";
        let kept = |word: &str| CutWord { terms: vec![word.to_string()], is_long: false };
        let at = |part: &str| text.find(part).unwrap();
        for (place, expected) in [
            (at("ne"), Some("one")),
            (at("One"), None),
            (at(" Wo"), None),
            (at("o\u{ad}"), Some("word")),
            (at("rd,"), Some("word")),
            (at("ne caf"), Some("fine")),
            (at("s:"), Some("caf\u{e9}s")),
            (at("تاب"), Some("كتاب")),
            (at("\u{200c}"), None),
            (at("ها"), None),
            (at("书"), None),
        ] {
            let found = Cuts::new(text).word(place, kept);
            assert_eq!(found.map(|word| word.terms[0].clone()).as_deref(), expected, "at {place} of {text}");
        }
    }

    #[test]
    fn what_goes_on_behind_a_place_is_found() {
        let cuts = Cuts::new("abcdef ghi 图书\u{301}馆");
        assert_eq!(cuts.letters_behind(2, 3), "cde");
        assert_eq!(cuts.letters_behind(2, 30), "cdef");
        assert_eq!(cuts.letters_behind(6, 30), "");
        assert_eq!(cuts.unit_behind(14, Class::Unspaced).as_deref(), Some("书\u{301}"));
        assert_eq!(cuts.unit_behind(2, Class::Unspaced), None);
    }
}
