//! From a text to the terms that it is found by: one analyzer for all scripts, for documents and for queries.
//!
//! A text is brought into the form NFKC with cases folded; characters that show nothing (soft hyphens, Arabic
//! elongation) are left out, and digits of all scripts become those of ASCII. Then it is cut into runs:
//!
//! * Words of letters, marks and digits. A word stands in the index as it is, without diacritics, and without both
//!   diacritics and ending (Snowball stemmers, in the language of its document): three terms at one place, fewer where
//!   they are equal. So `cafe` finds `café`, and `café` finds it with a better score.
//! * Scripts that are written without spaces (`scripts.rs` says which). These are indexed by overlapping pairs of
//!   characters with their marks, and by single ones. Pairs are cut alike in a passage and in a query; the words of a
//!   dictionary are not, since they depend on what stands around them, and on the dictionary's version.
//! * Korean, whose particles cling to words: whole words, and pairs and single syllables as above.
//! * Symbols, such as emoji: each is a term.
//!
//! Nothing is left out for being frequent: BM25 weighs that. Words too long for a term are replaced by their hash, and long
//! ones are found by parts too (`long.rs`). A word that the edge of a passage cuts is a term of both passages (`cut.rs`).
//!
//! What Persian and its neighbours write with a zero-width non-joiner within a word is two words to an index. A query
//! also stands for the other spellings: neighbouring words as one, and one word as two or three (`query.rs`).

use std::collections::HashMap;
use std::ops::Range;

use icu_casemap::CaseMapper;
use icu_normalizer::{ComposingNormalizer, DecomposingNormalizer};
use icu_properties::props::{DefaultIgnorableCodePoint, GeneralCategory, Script};
use icu_properties::{CodePointMapData, CodePointSetData};
use tantivy::tokenizer::{AsciiFoldingFilter, Language, RawTokenizer, Stemmer, TextAnalyzer, Token};

use super::cut::{CutWord, Cuts};
use super::long::{LONGEST_TERM, SHORTEST_PART, is_long, parts, term};
use super::scripts;

/// To be raised whenever a text gets other terms than before, also by a new version of a library that is used here:
/// indexes of other versions are then built again from their stored texts.
pub(super) const VERSION: u32 = 3;

/// Neighbouring words of the Arabic script that a query also tries as one, at most.
const JOINED: usize = 3;

/// Particles that follow a Korean noun. Only needed to find nouns of one syllable: longer ones share pairs.
const PARTICLES: [&str; 30] = [
    "은", "는", "이", "가", "을", "를", "에", "의", "로", "와", "과", "도", "만", "랑", "나", "야", "으로", "에서",
    "에게", "한테", "까지", "부터", "보다", "처럼", "마다", "밖에", "조차", "이나", "이랑", "이다",
];

/// How a run of characters is cut into terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Letters and digits between spaces.
    Word,
    /// Written without spaces.
    Unspaced,
    /// Korean syllables.
    Syllables,
    /// One character that is a term.
    Symbol,
    /// Belongs to no term.
    Gap,
}

/// A word of a query, with everything that may stand for it in a passage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct QueryWord {
    /// Its terms; the first one is the most exact.
    pub(super) terms: Vec<String>,
    /// The most general term in each of the analyzer's languages.
    pub(super) stems: Vec<String>,
    /// Where it stands; a word at the next place follows it directly.
    pub(super) place: usize,
    /// Without diacritics, if a passage may have it in pieces with spaces or non-joiners between them.
    pub(super) apart: Option<String>,
}

/// What a query looks for.
#[derive(Clone, Debug, Default)]
pub(super) struct QueryTerms {
    /// Its words, in order, with repetitions; behind them, what else several of them may stand for.
    pub(super) words: Vec<QueryWord>,
    /// Of each of its words that may be a part of a longer one: terms that this one has if it is.
    pub(super) parts: Vec<Vec<String>>,
}

/// Cuts texts into terms, with the endings of some languages.
pub(super) struct Analyzer {
    stemmers: Vec<TextAnalyzer>,
    ascii: TextAnalyzer,
    known: HashMap<String, Forms>,
}

/// A word, without diacritics, and without diacritics and endings (one for each language).
#[derive(Clone)]
struct Forms {
    folded: String,
    stems: Vec<String>,
}

impl Analyzer {
    /// For a document: its language, if it has a known one. For a query: the languages of the documents.
    pub(super) fn new(languages: &[Language]) -> Analyzer {
        let stemmer = |language: &Language| {
            TextAnalyzer::builder(RawTokenizer::default()).filter(Stemmer::new(*language)).build()
        };
        Analyzer {
            stemmers: languages.iter().map(stemmer).collect(),
            ascii: TextAnalyzer::builder(RawTokenizer::default()).filter(AsciiFoldingFilter).build(),
            known: HashMap::new(),
        }
    }

    /// The terms of the passage between two bytes of a text, with their places.
    pub(super) fn passage(&mut self, cuts: &mut Cuts<'_>, passage: Range<usize>) -> Vec<Token> {
        let mut tokens = Tokens::default();
        let text = normalise(&cuts.text()[passage.clone()]);
        let mut runs = runs(&text).peekable();
        let mut is_first = true;
        while let Some((class, run)) = runs.next() {
            // Marks that were cut off from their letter begin no word.
            if is_first && class == Class::Gap && run.chars().all(scripts::is_mark) {
                continue;
            }
            let edges =
                [std::mem::take(&mut is_first).then_some(passage.start), runs.peek().is_none().then_some(passage.end)];
            match class {
                Class::Word => {
                    let mut found_by_parts = is_long(run);
                    let mut terms = self.word_terms(run);
                    for edge in edges.into_iter().flatten() {
                        let Some(whole) = cuts.word(edge, |whole| self.cut_word(whole)) else { continue };
                        found_by_parts |= whole.is_long;
                        terms.extend(
                            whole.terms.iter().filter(|term| !terms.contains(term)).cloned().collect::<Vec<_>>(),
                        );
                    }
                    terms.iter().for_each(|term| tokens.add(term));
                    if found_by_parts {
                        // Parts that reach over the edge are this passage's.
                        let beyond =
                            edges[1].map(|edge| cuts.letters_behind(edge, SHORTEST_PART - 1)).unwrap_or_default();
                        let run = self.fold(&[run, &beyond].concat());
                        parts(&run).iter().for_each(|part| tokens.add(part));
                    }
                    tokens.next();
                }
                Class::Symbol => {
                    tokens.add(&term(run));
                    tokens.next();
                }
                Class::Unspaced | Class::Syllables => {
                    let units = units(run);
                    // Pairs and single characters are there already.
                    if class == Class::Syllables && units.len() > 2 {
                        tokens.add(&term(run));
                    }
                    for at in 0..units.len() {
                        tokens.add(&term(units[at]));
                        if at + 1 < units.len() {
                            tokens.add(&term(&[units[at], units[at + 1]].concat()));
                        }
                        if at + 1 == units.len()
                            && let Some(next) = edges[1].and_then(|edge| cuts.unit_behind(edge, class))
                        {
                            tokens.add(&term(&[units[at], &next].concat()));
                        }
                        tokens.next();
                    }
                }
                Class::Gap => {}
            }
        }
        tokens.all
    }

    /// The terms of a word of a passage.
    fn word_terms(&mut self, word: &str) -> Vec<String> {
        distinct(self.word(word).0)
    }

    fn cut_word(&mut self, whole: &str) -> CutWord {
        let (exact, folded) = (term(whole), term(&self.fold(whole)));
        let terms = if exact == folded { vec![exact] } else { vec![exact, folded] };
        CutWord { terms, is_long: is_long(whole) }
    }

    /// What a query looks for. `wanted` is asked from time to time; once nobody waits, `None`.
    pub(super) fn query(&mut self, text: &str, wanted: &dyn Fn() -> bool) -> Option<QueryTerms> {
        let mut words = Words::default();
        let text = normalise(text);
        // Words of the Arabic script with nothing but space between them, and what else is to be looked for.
        let (mut neighbours, mut joined, mut in_parts) = (Vec::new(), Vec::new(), Vec::new());
        for (number, (class, run)) in runs(&text).enumerate() {
            if number % 1024 == 0 && !wanted() {
                return None;
            }
            let is_arabic = class == Class::Word && run.len() <= LONGEST_TERM && scripts::is_arabic(run);
            if is_arabic {
                neighbours.push(run);
                let longest = neighbours.len().min(JOINED);
                joined.extend((2..=longest).map(|count| neighbours[neighbours.len() - count..].concat()));
            } else if class != Class::Gap || !run.trim().is_empty() {
                neighbours.clear();
            }
            match class {
                Class::Word => {
                    if run.chars().count() >= SHORTEST_PART {
                        in_parts.push(parts(&self.fold(run)));
                    }
                    let (terms, stems) = self.word(run);
                    let apart = is_arabic.then(|| self.fold(run));
                    words.add(terms, stems, apart);
                }
                Class::Symbol => words.add_term(term(run)),
                Class::Unspaced | Class::Syllables => {
                    let units = units(run);
                    let mut pairs = units.windows(2).map(|pair| term(&pair.concat()));
                    match pairs.next() {
                        None => words.add_term(term(run)),
                        Some(first) if class == Class::Syllables => {
                            words.add(vec![term(run), first.clone()], vec![first], None);
                        }
                        Some(first) => words.add_term(first),
                    }
                    pairs.for_each(|pair| words.add_term(pair));
                    if class == Class::Syllables && PARTICLES.contains(&&run[units[0].len()..]) {
                        words.add_term(term(units[0]));
                    }
                }
                Class::Gap => {}
            }
        }
        for word in joined {
            let (terms, stems) = self.word(&word);
            words.add_apart(terms, stems);
        }
        Some(QueryTerms { words: words.all, parts: in_parts })
    }

    /// The terms of a word, the most exact first, and the most general one in each language; equal ones may be among them.
    fn word(&mut self, word: &str) -> (Vec<String>, Vec<String>) {
        if word.len() > LONGEST_TERM {
            let folded = term(&self.fold(word));
            return (vec![term(word), folded.clone()], vec![folded]);
        }
        let forms = self.forms(word);
        let stems = if forms.stems.is_empty() { vec![forms.folded.clone()] } else { forms.stems };
        let mut terms = vec![word.to_string(), forms.folded];
        terms.extend(stems.iter().cloned());
        (terms, stems)
    }

    fn forms(&mut self, word: &str) -> Forms {
        if let Some(forms) = self.known.get(word) {
            return forms.clone();
        }
        let stems: Vec<String> = self.stemmers.iter_mut().map(|stemmer| only_token(stemmer, word)).collect();
        let stems = stems.iter().map(|stem| self.fold(stem)).collect();
        let forms = Forms { folded: self.fold(word), stems };
        // Enough for the vocabulary of a long document.
        if self.known.len() < 1 << 16 {
            self.known.insert(word.into(), forms.clone());
        }
        forms
    }

    /// A normalised word without diacritics, and with one letter for those that are variants of each other.
    fn fold(&mut self, word: &str) -> String {
        if word.is_ascii() {
            return word.into();
        }
        let plain = without_marks(word);
        if plain.is_ascii() { plain } else { only_token(&mut self.ascii, &plain) }
    }
}

/// The text as words between single spaces, without cases and diacritics: equal for texts that differ in nothing but
/// these, white space and punctuation. Characters of scripts without spaces are words of their own.
pub fn comparable(text: &str) -> String {
    let mut analyzer = Analyzer::new(&[]);
    let text = normalise(text);
    let mut out = String::from(" ");
    for (class, run) in runs(&text) {
        match class {
            Class::Gap => continue,
            Class::Word | Class::Symbol => out.push_str(&analyzer.fold(run)),
            Class::Unspaced | Class::Syllables => out.push_str(&units(run).join(" ")),
        }
        out.push(' ');
    }
    out
}

/// Terms of a passage in the making.
#[derive(Default)]
struct Tokens {
    all: Vec<Token>,
    place: usize,
}

impl Tokens {
    fn add(&mut self, text: &str) {
        self.all.push(Token { position: self.place, text: text.into(), ..Token::default() });
    }

    fn next(&mut self) {
        self.place += 1;
    }
}

/// Words of a query in the making.
#[derive(Default)]
struct Words {
    all: Vec<QueryWord>,
    place: usize,
}

impl Words {
    fn add(&mut self, terms: Vec<String>, stems: Vec<String>, apart: Option<String>) {
        let terms = distinct(terms);
        self.all.push(QueryWord { terms, stems, place: self.place, apart });
        self.place += 1;
    }

    /// A word that follows no other one.
    fn add_apart(&mut self, terms: Vec<String>, stems: Vec<String>) {
        self.place += 1;
        self.add(terms, stems, None);
    }

    fn add_term(&mut self, term: String) {
        self.add(vec![term.clone()], vec![term], None);
    }
}

/// The terms without repetitions, in order. At most one for each language, and two: nothing to sort for.
fn distinct(mut terms: Vec<String>) -> Vec<String> {
    let mut at = 0;
    while at < terms.len() {
        if terms[..at].contains(&terms[at]) {
            terms.remove(at);
        } else {
            at += 1;
        }
    }
    terms
}

/// What the tokens of `analyzer` say of one word: its filters change words, they do not cut them.
fn only_token(analyzer: &mut TextAnalyzer, word: &str) -> String {
    let mut stream = analyzer.token_stream(word);
    stream.next().map_or_else(|| word.to_string(), |token| token.text.clone())
}

/// NFKC, cases folded, without what shows nothing, digits as those of ASCII.
pub(super) fn normalise(text: &str) -> String {
    if text.is_ascii() {
        return text.to_ascii_lowercase();
    }
    let nfkc = const { ComposingNormalizer::new_nfkc() };
    let shown = shown(text);
    let composed = nfkc.normalize(&shown);
    let folded = const { CaseMapper::new() }.fold_string(&composed);
    nfkc.normalize(&folded).chars().map(ascii_digit).collect()
}

/// Without characters that show nothing. Those that divide words become spaces.
fn shown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match shows_nothing(c, || out.chars().next_back()) {
            Some(divides) => out.extend(divides.then_some(' ')),
            None => out.push(c),
        }
    }
    out
}

/// Whether `c`, behind the character that `before` gives, shows nothing, and then whether it divides words.
pub(super) fn shows_nothing(c: char, before: impl FnOnce() -> Option<char>) -> Option<bool> {
    const ELONGATION: char = '\u{640}';
    const ZERO_WIDTH_SPACE: char = '\u{200b}';
    const NON_JOINER: char = '\u{200c}';
    let ignorable = const { CodePointSetData::new::<DefaultIgnorableCodePoint>() };
    match c {
        ELONGATION => Some(false),
        ZERO_WIDTH_SPACE => Some(true),
        // In Persian it stands between a word and its endings; elsewhere it only forbids a ligature.
        NON_JOINER => Some(before().is_some_and(|before| scripts::of(before) == Script::Arabic)),
        c => ignorable.contains(c).then_some(false),
    }
}

/// A decimal digit of any script as that of ASCII. Unicode keeps the digits of a script together and in order.
fn ascii_digit(c: char) -> char {
    let category = const { CodePointMapData::<GeneralCategory>::new() };
    let is_digit = |code: u32| category.get32(code) == GeneralCategory::DecimalNumber;
    if c.is_ascii() || !is_digit(c.into()) {
        return c;
    }
    let before = (1..=9).take_while(|back| is_digit(u32::from(c) - back)).count();
    char::from_digit(before as u32, 10).unwrap_or(c)
}

/// A word without its diacritics: those of alphabets that are also written without. Vowel signs of Indic scripts and
/// voicing marks of kana are no such diacritics.
fn without_marks(word: &str) -> String {
    let category = const { CodePointMapData::<GeneralCategory>::new() };
    let decomposed = const { DecomposingNormalizer::new_nfkd() }.normalize(word);
    let mut out = String::with_capacity(word.len());
    let mut before = ' ';
    for c in decomposed.chars() {
        let dropped = match category.get(c) {
            GeneralCategory::NonspacingMark => match scripts::of(c) {
                // The breve of the Russian short i makes another letter.
                Script::Inherited => !(c == '\u{306}' && matches!(before, 'и' | 'у')),
                Script::Arabic | Script::Hebrew | Script::Syriac | Script::Greek | Script::Cyrillic => true,
                _ => false,
            },
            _ => false,
        };
        if !dropped {
            out.push(arabic_variant(c));
            before = c;
        }
    }
    const { ComposingNormalizer::new_nfc() }.normalize(&out).into_owned()
}

/// Arabic letters that are typed for one another.
fn arabic_variant(c: char) -> char {
    match c {
        'ٱ' => 'ا',
        'ى' | 'ی' => 'ي',
        'ک' => 'ك',
        'ة' | 'ۀ' | 'ہ' => 'ه',
        c => c,
    }
}

/// Cuts a normalised text into runs of one class each; gaps are among them.
pub(super) fn runs(text: &str) -> impl Iterator<Item = (Class, &str)> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let first = class(rest.chars().next()?, Class::Gap);
        let mut end = 0;
        for c in rest.chars() {
            if end > 0 && (first == Class::Symbol || class(c, first) != first) {
                break;
            }
            end += c.len_utf8();
        }
        let (run, behind) = rest.split_at(end);
        rest = behind;
        Some((first, run))
    })
}

/// What a character behind one of class `before` belongs to.
pub(super) fn class(c: char, before: Class) -> Class {
    use GeneralCategory as G;
    if c.is_ascii() {
        return if c.is_ascii_alphanumeric() { Class::Word } else { Class::Gap };
    }
    let category = const { CodePointMapData::<GeneralCategory>::new() };
    match category.get(c) {
        G::UppercaseLetter | G::LowercaseLetter | G::TitlecaseLetter | G::ModifierLetter | G::OtherLetter => {
            scripts::letter(c)
        }
        // Among them the Chinese zero.
        G::LetterNumber => scripts::letter(c),
        G::DecimalNumber | G::OtherNumber => Class::Word,
        G::NonspacingMark | G::SpacingMark | G::EnclosingMark => before,
        G::OtherSymbol | G::CurrencySymbol => Class::Symbol,
        _ => Class::Gap,
    }
}

/// The characters of a run, each with the marks behind it.
pub(super) fn units(run: &str) -> Vec<&str> {
    let mut starts: Vec<usize> =
        run.char_indices().filter(|&(at, c)| at == 0 || !scripts::is_mark(c)).map(|(at, _)| at).collect();
    starts.push(run.len());
    starts.windows(2).map(|pair| &run[pair[0]..pair[1]]).collect()
}
