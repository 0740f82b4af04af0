//! Sentences of running text, and chunks of whole sentences.

/// The sentences of a text, blanks around them removed. A sentence ends at `.`, `!` or `?` (and closing quotes or brackets behind
/// it) before a blank and something that may begin one: anything but a lower-case letter. Single capitals before the stop
/// (`J. Smith`, `U.S. Army`) end none.
pub(super) fn sentences(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut start = 0;
    for (at, c) in text.char_indices().filter(|(_, c)| matches!(c, '.' | '!' | '?')) {
        let behind = &text[at + c.len_utf8()..];
        let rest = behind.trim_start_matches(['"', '\'', ')', ']', '\u{201d}', '\u{2019}']);
        let next = rest.trim_start();
        let ends = next.len() < rest.len() && next.chars().next().is_some_and(|c| !c.is_lowercase());
        if ends && !(c == '.' && is_initial(&text[start..at])) {
            let end = text.len() - rest.len();
            found.push(text[start..end].trim());
            start = text.len() - next.len();
        }
    }
    found.push(text[start..].trim());
    found.retain(|sentence| !sentence.is_empty());
    found
}

/// Whether a text ends with a capital that stands alone or behind another stop.
fn is_initial(text: &str) -> bool {
    let mut back = text.chars().rev();
    back.next().is_some_and(char::is_uppercase) && back.next().is_none_or(|c| c.is_whitespace() || c == '.')
}

/// Chunks of at most `most` words: as many whole sentences as fit. A longer sentence is cut behind `most` words.
pub(super) fn chunks(text: &str, most: usize) -> Vec<String> {
    let mut chunks: Vec<Vec<&str>> = Vec::new();
    for sentence in sentences(text) {
        let words: Vec<&str> = sentence.split_whitespace().collect();
        match chunks.last_mut() {
            Some(last) if last.len() + words.len() <= most => last.extend(words),
            _ => chunks.extend(words.chunks(most.max(1)).map(<[&str]>::to_vec)),
        }
    }
    chunks.into_iter().map(|words| words.join(" ")).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sentences_end_where_readers_see_them_end() {
        let text =
            "It rose by 3.5 percent. Was it J. R. Smith? \"No!\" he said (in the U.S. Senate.) 6 men left, e.g. him.";
        assert_eq!(
            sentences(text),
            [
                "It rose by 3.5 percent.",
                "Was it J. R. Smith?",
                "\"No!\" he said (in the U.S. Senate.)",
                "6 men left, e.g. him."
            ]
        );
        assert_eq!(sentences("  "), Vec::<&str>::new());
    }

    #[test]
    fn chunks_are_whole_sentences_unless_one_is_too_long() {
        assert_eq!(
            chunks("One two. Three four. Five six seven. Eight.", 4),
            ["One two. Three four.", "Five six seven. Eight."]
        );
        assert_eq!(chunks("A b c d e. F.", 2), ["A b", "c d", "e. F."]);
    }

    proptest! {
        #[test]
        fn no_word_is_lost_and_no_chunk_too_long(text in "([A-Za-z]{1,4}[.!? ]{0,2} ){0,60}", most in 1_usize..12) {
            let chunks = chunks(&text, most);
            prop_assert!(chunks.iter().all(|chunk| (1..=most).contains(&chunk.split_whitespace().count())));
            let words: Vec<&str> = chunks.iter().flat_map(|chunk| chunk.split_whitespace()).collect();
            prop_assert_eq!(words, text.split_whitespace().collect::<Vec<_>>());
        }
    }
}
