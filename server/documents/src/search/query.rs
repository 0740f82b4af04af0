//! Ranking: which passages fit a query best.
//!
//! Every word of the query counts for itself by BM25, with the best of its forms (as it stands, without diacritics,
//! without its ending) and a little for the others. Neighbouring words that are neighbours in a passage too count once
//! more, as one rare word would (the ordered pairs of the sequential dependence model: Metzler and Croft, "A Markov
//! random field model for term dependencies", 2005). Of a long query, the rarest words are taken.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use tantivy::collector::TopDocs;
use tantivy::query::{
    Bm25StatisticsProvider, BooleanQuery, BoostQuery, DisjunctionMaxQuery, Occur, PhraseQuery, Query, TermQuery,
};
use tantivy::schema::{Field, IndexRecordOption};
use tantivy::tokenizer::Language;
use tantivy::{DocAddress, Searcher, TantivyDocument, Term};

use super::analyzer::{Analyzer, QueryWord};
use super::collection::{Collection, Found};
use super::index::{DIGEST, bytes_of, damaged, text_of};
use super::language;
use super::record::{parse_place, passage_seal};

/// Words of a query that are looked for at a time: the rarest ones. Every one costs a list of the passages that have it.
const WORDS: usize = 64;
/// What the less fitting forms of a word add to its best one.
const OTHER_FORMS: f32 = 0.1;
/// Weight of a pair of neighbours beside that of a word.
const PAIR: f32 = 0.3;
/// Over what a passage's length is measured, as a share of the mean length. tantivy's BM25 has k1 = 1.2 and b = 0.75; over
/// half of the mean length these are the same as k1 = 2.1 and b = 0.86: a word that comes often in a short passage counts
/// more.
const LENGTH: f64 = 0.5;
/// Bytes of documents that are kept at hand while passages are cut out of them.
const TEXTS: usize = 64 << 20;

/// The passages that fit `query` best; `None` once nobody waits.
pub(super) fn search(
    collection: &Collection,
    searcher: &Searcher,
    query: &str,
    limit: usize,
    wanted: &dyn Fn() -> bool,
) -> tantivy::Result<Option<Vec<Found>>> {
    let mut analyzer = Analyzer::new(&languages(collection, searcher)?);
    let Some(words) = analyzer.query(query, wanted) else { return Ok(None) };
    let text = Terms { searcher, collection };
    let Some(ranked) = text.ranked(&words, wanted)? else { return Ok(None) };
    // More than one round only where all passages with the rarest words have been replaced meanwhile.
    for rarest in ranked.chunks(WORDS) {
        let query = text.query(&words, rarest)?;
        let (kept, seen, texts) = (Vec::new(), HashSet::new(), Texts::default());
        let mut distinct = Distinct { collection, searcher, limit: limit.max(1), kept, seen, texts };
        match distinct.take(&query, wanted)? {
            Some(found) if found.is_empty() => {}
            found => return Ok(found),
        }
    }
    Ok(Some(Vec::new()))
}

/// What BM25 knows of an index, with [`LENGTH`].
struct Statistics<'a>(&'a Searcher);

impl Bm25StatisticsProvider for Statistics<'_> {
    fn total_num_tokens(&self, field: Field) -> tantivy::Result<u64> {
        Ok((self.0.total_num_tokens(field)? as f64 * LENGTH) as u64)
    }

    fn total_num_docs(&self) -> tantivy::Result<u64> {
        self.0.total_num_docs()
    }

    fn doc_freq(&self, term: &Term) -> tantivy::Result<u64> {
        self.0.doc_freq(term)
    }
}

/// The languages of a collection's documents.
fn languages(collection: &Collection, searcher: &Searcher) -> tantivy::Result<Vec<Language>> {
    let mut names = Vec::new();
    for segment in searcher.segment_readers() {
        let index = segment.inverted_index(collection.open_index().fields.language)?;
        let mut terms = index.terms().stream()?;
        while terms.advance() {
            names.extend(std::str::from_utf8(terms.key()).ok().map(str::to_string));
        }
    }
    names.sort_unstable();
    names.dedup();
    Ok(names.iter().filter_map(|name| language::by_name(name)).collect())
}

/// The terms of an index.
struct Terms<'a> {
    searcher: &'a Searcher,
    collection: &'a Collection,
}

impl Terms<'_> {
    fn term(&self, text: &str) -> Term {
        Term::from_field_text(self.collection.open_index().fields.text, text)
    }

    fn passages_with(&self, text: &str) -> tantivy::Result<u64> {
        self.searcher.doc_freq(&self.term(text))
    }

    /// Whether both words are in some passages, and not both in more than half of them: such a pair tells little, and
    /// would cost a look at every place of the most frequent words there are.
    fn tell_passages_apart(&self, first: &str, second: &str) -> tantivy::Result<bool> {
        let rarer = self.passages_with(first)?.min(self.passages_with(second)?);
        Ok(rarer > 0 && rarer * 2 <= self.searcher.num_docs().max(2))
    }

    /// The distinct words that some passage has, the rarest first; `None` once nobody waits.
    fn ranked<'w>(
        &self,
        words: &'w [QueryWord],
        wanted: &dyn Fn() -> bool,
    ) -> tantivy::Result<Option<Vec<&'w QueryWord>>> {
        let mut seen = HashSet::new();
        let mut ranked = Vec::new();
        for (number, word) in words.iter().enumerate() {
            if number % 256 == 0 && !wanted() {
                return Ok(None);
            }
            if !seen.insert(&word.terms[0]) {
                continue;
            }
            // The most general form is in most passages.
            let mut passages = 0;
            for term in &word.terms {
                passages = passages.max(self.passages_with(term)?);
            }
            if passages > 0 {
                ranked.push((passages, word));
            }
        }
        ranked.sort_by_key(|(passages, word)| (*passages, word.place));
        Ok(Some(ranked.into_iter().map(|(_, word)| word).collect()))
    }

    fn query(&self, words: &[QueryWord], chosen: &[&QueryWord]) -> tantivy::Result<BooleanQuery> {
        let mut clauses: Vec<(Occur, Box<dyn Query>)> = Vec::new();
        for word in chosen {
            let mut forms: Vec<Box<dyn Query>> = Vec::new();
            for term in &word.terms {
                if self.passages_with(term)? > 0 {
                    forms.push(Box::new(TermQuery::new(self.term(term), IndexRecordOption::WithFreqs)));
                }
            }
            clauses.push((Occur::Should, best_of(forms)));
        }
        let keys: HashSet<&str> = chosen.iter().map(|word| word.terms[0].as_str()).collect();
        let mut seen = HashSet::new();
        for pair in words.windows(2) {
            let (first, second) = (&pair[0], &pair[1]);
            let both = keys.contains(first.terms[0].as_str()) && keys.contains(second.terms[0].as_str());
            if !both || !seen.insert((&first.terms[0], &second.terms[0])) {
                continue;
            }
            let mut forms: Vec<Box<dyn Query>> = Vec::new();
            let mut stems = HashSet::new();
            // One of the analyzer's languages, or a word that has no forms.
            for at in 0..first.stems.len().max(second.stems.len()) {
                let (a, b) = (stem(first, at), stem(second, at));
                if stems.insert((a, b)) && self.tell_passages_apart(a, b)? {
                    forms.push(Box::new(PhraseQuery::new(vec![self.term(a), self.term(b)])));
                }
            }
            if !forms.is_empty() {
                clauses.push((Occur::Should, Box::new(BoostQuery::new(best_of(forms), PAIR))));
            }
        }
        Ok(BooleanQuery::new(clauses))
    }
}

fn stem(word: &QueryWord, language: usize) -> &str {
    word.stems.get(language).unwrap_or(&word.stems[0])
}

fn best_of(mut forms: Vec<Box<dyn Query>>) -> Box<dyn Query> {
    match forms.len() {
        1 => forms.remove(0),
        _ => Box::new(DisjunctionMaxQuery::with_tie_breaker(forms, OTHER_FORMS)),
    }
}

/// Takes the best passages that do not repeat each other.
struct Distinct<'a> {
    collection: &'a Collection,
    searcher: &'a Searcher,
    limit: usize,
    kept: Vec<Found>,
    seen: HashSet<u64>,
    texts: Texts,
}

impl Distinct<'_> {
    /// Fetches more passages than asked for, and ever more until enough of them are distinct or there are no more.
    fn take(&mut self, query: &BooleanQuery, wanted: &dyn Fn() -> bool) -> tantivy::Result<Option<Vec<Found>>> {
        let most = usize::try_from(self.searcher.num_docs()).unwrap_or(usize::MAX).max(1);
        let (mut fetched, mut done) = (self.limit.saturating_mul(2).max(32), 0);
        loop {
            if !wanted() {
                return Ok(None);
            }
            let top = TopDocs::with_limit(fetched.min(most)).order_by_score();
            let hits = self.searcher.search_with_statistics_provider(query, &top, &Statistics(self.searcher))?;
            for (score, address) in &hits[done.min(hits.len())..] {
                if self.kept.len() == self.limit {
                    break;
                }
                self.consider(*score, *address)?;
            }
            if self.kept.len() == self.limit || hits.len() < fetched {
                return Ok(Some(std::mem::take(&mut self.kept)));
            }
            done = hits.len();
            fetched = fetched.saturating_mul(4);
        }
    }

    /// Keeps a passage unless a better one has the same text, or mostly covers it.
    fn consider(&mut self, score: f32, address: DocAddress) -> tantivy::Result<()> {
        let digests = self.searcher.segment_reader(address.segment_ord).fast_fields().u64(DIGEST)?;
        if digests.first(address.doc_id).is_some_and(|digest| !self.seen.insert(digest)) {
            return Ok(());
        }
        let found = self.passage(score, address)?;
        let covered = |better: &Found| {
            let shorter = better.span.len().min(found.span.len());
            better.path == found.path && better.span.overlap(&found.span) * 2 > shorter
        };
        if !self.kept.iter().any(covered) {
            self.kept.push(found);
        }
        Ok(())
    }

    /// A passage, cut out of its document and compared with the hash that was written with it.
    fn passage(&mut self, score: f32, address: DocAddress) -> tantivy::Result<Found> {
        let fields = &self.collection.open_index().fields;
        let record: TantivyDocument = self.searcher.doc(address)?;
        let name = text_of(&record, fields.path).unwrap_or_default();
        let changed = || damaged(&format!("what is stored of {name} is not what was written"));
        let place = text_of(&record, fields.place).and_then(parse_place).ok_or_else(changed)?;
        let text = self.texts.get(name, || {
            let whole = self.collection.record(self.searcher, name)?;
            Ok(whole.and_then(|whole| text_of(&whole, fields.body).map(str::to_string)))
        })?;
        let passage = text.get(place.bytes.clone()).ok_or_else(changed)?;
        if bytes_of(&record, fields.seal) != Some(passage_seal(name, &place, passage).as_slice()) {
            return Err(changed());
        }
        let line = 1 + text.as_bytes()[..place.bytes.start].iter().filter(|byte| **byte == b'\n').count();
        Ok(Found { path: PathBuf::from(name), span: place.chars, line, passage: passage.into(), score })
    }
}

/// Texts of documents that several passages are cut out of.
#[derive(Default)]
struct Texts {
    known: HashMap<String, String>,
    bytes: usize,
}

impl Texts {
    /// The text of a document; empty where there is none.
    fn get(&mut self, name: &str, read: impl FnOnce() -> tantivy::Result<Option<String>>) -> tantivy::Result<&str> {
        if !self.known.contains_key(name) {
            let text = read()?.unwrap_or_default();
            if self.bytes + text.len() > TEXTS {
                *self = Texts::default();
            }
            self.bytes += text.len();
            self.known.insert(name.into(), text);
        }
        Ok(self.known.get(name).map_or("", String::as_str))
    }
}
