//! Long words: sequences of bases, hashes, encoded bytes, compounds without end.
//!
//! One that is too long for a term is a term by its hash, which finds it as a whole. Nobody types long words; people paste
//! a part of them. So they are also indexed by some of their parts, chosen by winnowing (Schleimer, Wilkerson and Aiken, "Winnowing: local algorithms for
//! document fingerprinting", 2003): of every [`WINDOW`] neighbouring parts of [`PART`] characters, the one with the least
//! hash. A text and a query that share [`SHORTEST_PART`] characters in a row share a chosen part. A query counts as a part of a
//! long word only if all of its chosen parts are known: most of what is merely alike has one that is not.

/// Bytes of a term at most; a longer word is replaced by its hash.
pub(super) const LONGEST_TERM: usize = 128;
/// Characters of a word that is not found by parts, at most: few words that people write have more.
const LONGEST_WHOLE: usize = 20;
/// Characters of a part.
const PART: usize = 10;
/// Neighbouring parts of which one is chosen.
const WINDOW: usize = 7;
/// Characters of a long word that find it, wherever in it they stand.
pub(super) const SHORTEST_PART: usize = PART + WINDOW - 1;

/// Whether a word is also found by parts of it.
pub(super) fn is_long(word: &str) -> bool {
    word.len() > LONGEST_WHOLE && word.chars().nth(LONGEST_WHOLE).is_some()
}

/// A term for a run of characters.
pub(super) fn term(run: &str) -> String {
    if run.len() <= LONGEST_TERM {
        return run.into();
    }
    // No word has a colon.
    format!("hash:{}", blake3::hash(run.as_bytes()).to_hex())
}

/// Terms for the chosen parts of a word, each once.
pub(super) fn parts(word: &str) -> Vec<String> {
    let starts: Vec<usize> = word.char_indices().map(|(at, _)| at).chain([word.len()]).collect();
    let part = |number: usize| &word[starts[number]..starts[number + PART]];
    let hashes: Vec<u64> = (0..starts.len().saturating_sub(PART)).map(|number| hash(part(number))).collect();
    let mut chosen: Vec<usize> = hashes
        .windows(WINDOW.min(hashes.len()).max(1))
        .enumerate()
        .filter_map(|(first, window)| {
            let least = window.iter().enumerate().min_by_key(|(_, hash)| **hash)?;
            Some(first + least.0)
        })
        .collect();
    chosen.dedup();
    let mut terms: Vec<String> = chosen.into_iter().map(|number| format!("part:{}", part(number))).collect();
    terms.sort_unstable();
    terms.dedup();
    terms
}

/// FNV-1a: the same in every build, as it decides on what is in an index.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn whatever_stretch_of_a_word_is_long_enough_shares_a_part_with_it(
            word in "[acgtäß]{16,300}", start in 0usize..300, length in SHORTEST_PART..40,
        ) {
            let letters: Vec<char> = word.chars().collect();
            let length = length.min(letters.len());
            let start = start.min(letters.len() - length);
            let stretch: String = letters[start..start + length].iter().collect();
            let whole = parts(&word);
            prop_assert!(parts(&stretch).iter().any(|part| whole.contains(part)), "{stretch} of {word}");
            prop_assert!(parts(&stretch).iter().all(|part| stretch.contains(part.strip_prefix("part:").unwrap())));
        }
    }

    #[test]
    fn few_parts_of_a_word_are_chosen_and_equal_ones_once() {
        let word: String = (0..30).map(|i| blake3::hash(&[i]).to_hex().to_string()).collect();
        let chosen = parts(&word).len();
        // Two of eight, where hashes fall by chance.
        assert!((400..560).contains(&chosen), "{chosen} of {}", word.len());
        assert_eq!(parts(&"a".repeat(10_000)), ["part:aaaaaaaaaa"]);
        assert!(parts("short").is_empty() && parts("").is_empty());
    }
}
