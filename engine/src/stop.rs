//! Stop strings over streamed text.

/// What a piece of streamed text leads to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Released {
    /// Text that may be shown.
    pub text: String,
    /// The stop string that was reached, as an index into the list given; nothing more will be released.
    pub stop: Option<usize>,
}

/// Finds the first of several stop strings in a stream of text, whatever pieces it comes in.
///
/// The stop string that *ends* first wins; of those that end at the same place, the longest. No part of it is ever
/// released: the longest end of the stream that could still become a stop string is held back.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
    stopped: Option<usize>,
}

impl StopMatcher {
    /// A matcher for these strings. Empty ones are ignored.
    #[must_use]
    pub fn new(stops: Vec<String>) -> Self {
        StopMatcher { stops, held: String::new(), stopped: None }
    }

    /// Takes the next piece of the stream. After a stop it releases nothing.
    pub fn push(&mut self, piece: &str) -> Released {
        let mut text = String::new();
        for character in piece.chars() {
            if self.stopped.is_some() {
                break;
            }
            self.held.push(character);
            let ended = self.stops.iter().enumerate().filter(|(_, s)| !s.is_empty() && self.held.ends_with(s.as_str()));
            if let Some((stop, found)) = ended.max_by_key(|(index, s)| (s.len(), usize::MAX - index)) {
                self.held.truncate(self.held.len() - found.len());
                text.push_str(&std::mem::take(&mut self.held));
                self.stopped = Some(stop);
            } else {
                text.extend(self.held.drain(..self.releasable()));
            }
        }
        Released { text, stop: self.stopped }
    }

    /// The stream has ended: what was held back, unless a stop was reached.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the front of `held` that no stop string can claim any more.
    fn releasable(&self) -> usize {
        let open = |start: &usize| {
            let tail = &self.held[*start..];
            self.stops.iter().any(|stop| stop.starts_with(tail))
        };
        self.held.char_indices().map(|(start, _)| start).find(open).unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops.iter().map(ToString::to_string).collect());
        let (mut text, mut stop) = (String::new(), None);
        for piece in pieces {
            let released = matcher.push(piece);
            text += &released.text;
            stop = released.stop;
        }
        (text + &matcher.finish(), stop)
    }

    /// The definition, on the whole text at once.
    fn oracle(stops: &[&str], text: &str) -> (String, Option<usize>) {
        let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
        for end in ends {
            let found = stops.iter().enumerate().filter(|(_, s)| !s.is_empty() && text[..end].ends_with(**s));
            if let Some((index, stop)) = found.max_by_key(|(index, s)| (s.len(), usize::MAX - index)) {
                return (text[..end - stop.len()].to_string(), Some(index));
            }
        }
        (text.to_string(), None)
    }

    #[test]
    fn a_stop_string_split_over_pieces_is_never_shown() {
        assert_eq!(run(&["\n\nQ:"], &["An answer.\n", "\nQ", ": next"]), ("An answer.".into(), Some(0)));
        assert_eq!(run(&["\n\nQ:"], &["An answer.\n", "\nA"]), ("An answer.\n\nA".into(), None));
    }

    #[test]
    fn the_stop_that_ends_first_wins_and_then_the_longest() {
        assert_eq!(run(&["abc", "b"], &["xabc"]), ("xa".into(), Some(1)));
        assert_eq!(run(&["c", "abc"], &["xabc"]), ("x".into(), Some(1)));
        assert_eq!(run(&["aab"], &["aa", "ab"]), ("a".into(), Some(0)));
    }

    #[test]
    fn text_is_held_no_longer_than_needed() {
        let mut matcher = StopMatcher::new(vec!["END".into()]);
        assert_eq!(matcher.push("one E").text, "one ");
        assert_eq!(matcher.push("ven").text, "Even");
        assert_eq!(matcher.push(" EN").text, " ");
        assert_eq!(matcher.push("D more"), Released { text: String::new(), stop: Some(0) });
        assert_eq!(matcher.push("more"), Released { text: String::new(), stop: Some(0) });
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn without_stop_strings_everything_passes_at_once() {
        assert_eq!(StopMatcher::new(vec![String::new()]).push("äöü").text, "äöü");
    }

    proptest! {
        #[test]
        fn any_split_gives_what_the_whole_text_gives(
            stops in prop::collection::vec("[abé]{0,4}", 0..4),
            pieces in prop::collection::vec("[abé]{0,5}", 0..8),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&stops, &pieces), oracle(&stops, &pieces.concat()));
        }
    }
}
