//! Invented names, numbers and keys.

use std::collections::HashSet;

use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

const SHE: [&str; 14] = [
    "Alice", "Anna", "Clara", "Emma", "Greta", "Helen", "Ida", "Laura", "Lena", "Maria", "Nora", "Paula", "Sofia",
    "Vera",
];
const HE: [&str; 14] = [
    "Adam", "Arthur", "Daniel", "Edward", "Felix", "Frank", "George", "Henry", "Hugo", "Leon", "Oscar", "Robert",
    "Simon", "Thomas",
];
const STARTS: [&str; 20] =
    ["b", "br", "c", "d", "dr", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "pr", "r", "s", "st", "t", "v"];
const VOWELS: [&str; 8] = ["a", "e", "i", "o", "u", "ai", "ea", "ou"];
const ENDS: [&str; 9] = ["", "", "", "l", "m", "n", "r", "s", "th"];

/// Draws what is unique within one context.
pub(super) struct Words {
    pub(super) rng: ChaCha8Rng,
    vocabulary: Vec<&'static str>,
    taken: HashSet<String>,
}

/// A person and the pronoun for them.
pub(super) struct Person {
    pub(super) name: String,
    pub(super) pronoun: &'static str,
}

impl Words {
    /// Words for keys are the plain lower-case ones of `text`, each once.
    pub(super) fn new(rng: ChaCha8Rng, text: &'static str) -> Words {
        let plain = |word: &&str| (4..=9).contains(&word.len()) && word.bytes().all(|b| b.is_ascii_lowercase());
        let mut vocabulary: Vec<&str> = text.split_whitespace().filter(plain).collect();
        vocabulary.sort_unstable();
        vocabulary.dedup();
        Words { rng, vocabulary, taken: HashSet::new() }
    }

    /// One of `items`, which must not be empty.
    pub(super) fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.rng.random_range(0..items.len())]
    }

    /// Repeats `draw` until it gives something that was not given before.
    fn fresh(&mut self, draw: impl Fn(&mut Words) -> String) -> String {
        loop {
            let text = draw(self);
            if self.taken.insert(text.clone()) {
                return text;
            }
        }
    }

    /// An invented name: `Brouthal`.
    pub(super) fn name(&mut self) -> String {
        self.fresh(|words| {
            let syllables = words.rng.random_range(2..=3);
            let mut name: String = (0..syllables)
                .map(|_| words.pick(&STARTS).to_owned() + words.pick(&VOWELS) + words.pick(&ENDS))
                .collect();
            if let Some(first) = name.get_mut(..1) {
                first.make_ascii_uppercase();
            }
            name
        })
    }

    /// A person with a first name and an invented last name.
    pub(super) fn person(&mut self) -> Person {
        let she = self.rng.random_bool(0.5);
        let first = self.pick(if she { &SHE } else { &HE });
        Person { name: format!("{first} {}", self.name()), pronoun: if she { "she" } else { "he" } }
    }

    /// A number of `digits` digits.
    pub(super) fn number(&mut self, digits: std::ops::RangeInclusive<u32>) -> String {
        self.fresh(|words| {
            let digits = words.rng.random_range(digits.clone());
            words.rng.random_range(10_u32.pow(digits - 1)..10_u32.pow(digits)).to_string()
        })
    }

    /// A key of two words: `river-lantern`.
    pub(super) fn key(&mut self) -> String {
        self.fresh(|words| {
            let pair: Vec<&str> = words.vocabulary.choose_multiple(&mut words.rng, 2).copied().collect();
            pair.join("-")
        })
    }

    /// One word.
    pub(super) fn word(&mut self) -> String {
        self.fresh(|words| {
            let at = words.rng.random_range(0..words.vocabulary.len());
            words.vocabulary[at].to_owned()
        })
    }

    /// A name of three to five capitals.
    pub(super) fn variable(&mut self) -> String {
        self.fresh(|words| {
            let length = words.rng.random_range(3..=5);
            (0..length).map(|_| char::from(words.rng.random_range(b'A'..=b'Z'))).collect()
        })
    }

    /// 32 hexadecimal digits in the usual groups.
    pub(super) fn uuid(&mut self) -> String {
        let digits: u128 = self.rng.random();
        let text = format!("{digits:032x}");
        [&text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..]].join("-")
    }
}
