//! Ranking: which passages fit a query best.
//!
//! Every word of the query counts for itself by BM25, with the best of its forms (as it stands, without diacritics,
//! without its ending) and a little for the others. Neighbouring words that are neighbours in a passage too count once
//! more, as one rare word would (the ordered pairs of the sequential dependence model: Metzler and Croft, "A Markov
//! random field model for term dependencies", 2005). Of a long query, the rarest words are taken.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use tantivy::collector::TopDocs;
use tantivy::query::{
    Bm25StatisticsProvider, BooleanQuery, BoostQuery, DisjunctionMaxQuery, Occur, PhraseQuery, Query, TermQuery,
};
use tantivy::schema::{Field, IndexRecordOption};
use tantivy::tokenizer::Language;
use tantivy::{DocAddress, Searcher, TantivyError, Term};

use super::analyzer::{Analyzer, QueryTerms, QueryWord};
use super::collection::{Found, PassageTokens};
use super::index::{DIGEST, DOCUMENT, Fields, NUMBER, passage_digest};
use super::language;
use crate::catalog::{Catalog, DocumentId, DocumentInfo};
use crate::error::DocumentsError;
use crate::seldom::Seldom;

/// Words of a query that are looked for at a time: the rarest ones. Every one costs a list of the passages that have it.
const WORDS: usize = 64;
/// What the less fitting forms of a word add to its best one.
const OTHER_FORMS: f32 = 0.1;
/// Weight of a pair of neighbours beside that of a word.
const PAIR: f32 = 0.3;
/// Letters of a word that is also looked for in pieces, at most.
const LONGEST_APART: usize = 24;
/// Ways to cut a word into pieces, at most; those with two pieces come first.
const MOST_APART: usize = 24;
/// Passages of a collection in which pairs of the most frequent words are looked for too.
const FEW: u64 = 64;
/// Over what a passage's length is measured, as a share of the mean length. tantivy's BM25 has k1 = 1.2 and b = 0.75; over
/// half of the mean length these are the same as k1 = 2.1 and b = 0.86: a word that comes often in a short passage counts
/// more.
const LENGTH: f64 = 0.5;

/// Passages that score alike and are ordered by the names of their documents, at most: each costs reading a row.
const MOST_NAMED: usize = 1024;

/// Where is searched.
pub(super) struct Scope<'a> {
    /// What texts and names are taken from.
    pub(super) catalog: &'a Catalog,
    /// The index, as of one commit.
    pub(super) searcher: &'a Searcher,
    /// Its fields.
    pub(super) fields: Fields,
    /// Which documents may be found.
    pub(super) admits: &'a dyn Fn(&DocumentInfo) -> bool,
}

/// What keeps a search from ending.
pub(super) enum QueryError {
    /// The index.
    Index(TantivyError),
    /// The catalog.
    Documents(DocumentsError),
}

impl From<TantivyError> for QueryError {
    fn from(error: TantivyError) -> QueryError {
        QueryError::Index(error)
    }
}

impl From<DocumentsError> for QueryError {
    fn from(error: DocumentsError) -> QueryError {
        QueryError::Documents(error)
    }
}

/// The passages that fit `query` best; `None` once nobody waits.
pub(super) fn search(
    scope: &Scope<'_>,
    query: &str,
    limit: usize,
    wanted: &dyn Fn() -> bool,
) -> Result<Option<Vec<Found>>, QueryError> {
    let mut analyzer = Analyzer::new(&languages(scope)?);
    let Some(QueryTerms { mut words, parts }) = analyzer.query(query, wanted) else { return Ok(None) };
    let text = Terms { searcher: scope.searcher, field: scope.fields.text };
    let Some(parts) = text.parts(parts, wanted)? else { return Ok(None) };
    words.extend(parts);
    let Some(ranked) = text.ranked(&words, wanted)? else { return Ok(None) };
    // More than one round only where all passages with the rarest words have been replaced meanwhile.
    for rarest in ranked.chunks(WORDS) {
        let query = text.query(&words, rarest)?;
        let mut distinct = Distinct::new(scope, limit.max(1));
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
fn languages(scope: &Scope<'_>) -> tantivy::Result<Vec<Language>> {
    let mut names = Vec::new();
    for segment in scope.searcher.segment_readers() {
        let index = segment.inverted_index(scope.fields.language)?;
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
    field: Field,
}

impl Terms<'_> {
    fn term(&self, text: &str) -> Term {
        Term::from_field_text(self.field, text)
    }

    fn passages_with(&self, text: &str) -> tantivy::Result<u64> {
        self.searcher.doc_freq(&self.term(text))
    }

    /// Parts of longer words to look for: none of a word of which some part is in no passage.
    fn parts(&self, parts: Vec<Vec<String>>, wanted: &dyn Fn() -> bool) -> tantivy::Result<Option<Vec<QueryWord>>> {
        let mut found = Vec::new();
        for parts in parts {
            if !wanted() {
                return Ok(None);
            }
            let mut known = true;
            for part in &parts {
                known = known && self.passages_with(part)? > 0;
            }
            // They follow nothing: their places are all the same.
            let word = |part: String| QueryWord {
                stems: vec![part.clone()],
                terms: vec![part],
                place: usize::MAX,
                apart: None,
            };
            found.extend(parts.into_iter().filter(|_| known).map(word));
        }
        Ok(Some(found))
    }

    /// Whether both words are in some passages, and not both in more than half of them: such a pair tells little, and
    /// would cost a look at every place of the most frequent words there are. Among few passages it costs nothing.
    fn tell_passages_apart(&self, first: &str, second: &str) -> tantivy::Result<bool> {
        let rarer = self.passages_with(first)?.min(self.passages_with(second)?);
        Ok(rarer > 0 && rarer * 2 <= self.searcher.num_docs().max(FEW))
    }

    /// The distinct words that some passage has, the rarest first; `None` once nobody waits.
    fn ranked<'w>(
        &self,
        words: &'w [QueryWord],
        wanted: &dyn Fn() -> bool,
    ) -> tantivy::Result<Option<Vec<&'w QueryWord>>> {
        let (mut seen, mut taken_apart) = (HashSet::new(), 0);
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
            if passages == 0 && taken_apart < WORDS && word.apart.is_some() {
                taken_apart += 1;
                for pieces in self.apart(word)? {
                    passages = passages.max(self.passages_with_all(&pieces)?);
                }
            }
            if passages > 0 {
                ranked.push((passages, word));
            }
        }
        ranked.sort_by_key(|(passages, word)| (*passages, word.place));
        Ok(Some(ranked.into_iter().map(|(_, word)| word).collect()))
    }

    fn passages_with_all(&self, pieces: &[&str]) -> tantivy::Result<u64> {
        let counts: tantivy::Result<Vec<u64>> = pieces.iter().map(|piece| self.passages_with(piece)).collect();
        Ok(counts?.into_iter().min().unwrap_or(0))
    }

    /// The ways to write a word as two or three words that passages have: what one text writes together, another one
    /// writes with spaces or non-joiners in between.
    fn apart<'w>(&self, word: &'w QueryWord) -> tantivy::Result<Vec<Vec<&'w str>>> {
        let Some(whole) = word.apart.as_deref() else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        let cuts: Vec<usize> = whole.char_indices().map(|(at, _)| at).skip(1).collect();
        if cuts.len() >= LONGEST_APART {
            return Ok(found);
        }
        for (number, &cut) in cuts.iter().enumerate() {
            let (first, rest) = whole.split_at(cut);
            if self.passages_with(first)? == 0 {
                continue;
            }
            if self.passages_with(rest)? > 0 {
                found.push(vec![first, rest]);
            }
            for &next in &cuts[number + 1..] {
                let pieces = vec![first, &whole[cut..next], &whole[next..]];
                if self.passages_with_all(&pieces)? > 0 {
                    found.push(pieces);
                }
            }
        }
        found.sort_by_key(Vec::len);
        found.truncate(MOST_APART);
        Ok(found)
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
            for pieces in self.apart(word)? {
                forms.push(Box::new(PhraseQuery::new(pieces.iter().map(|piece| self.term(piece)).collect())));
            }
            clauses.push((Occur::Should, best_of(forms)));
        }
        let keys: HashSet<&str> = chosen.iter().map(|word| word.terms[0].as_str()).collect();
        let mut seen = HashSet::new();
        for pair in words.windows(2) {
            let (first, second) = (&pair[0], &pair[1]);
            if first.place.checked_add(1) != Some(second.place) {
                continue;
            }
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
    scope: &'a Scope<'a>,
    limit: usize,
    kept: Vec<Found>,
    seen: HashSet<u64>,
    /// Documents that passages were found in; `None` for those that are gone, or not admitted.
    documents: HashMap<DocumentId, Option<DocumentInfo>>,
    /// What is wrong with the first damaged passage.
    damage: Option<DocumentsError>,
}

impl<'a> Distinct<'a> {
    fn new(scope: &'a Scope<'a>, limit: usize) -> Distinct<'a> {
        let (seen, documents) = (HashSet::new(), HashMap::new());
        Distinct { scope, limit, kept: Vec::new(), seen, documents, damage: None }
    }

    /// Fetches more passages than asked for, and ever more until enough of them are distinct or there are no more.
    fn take(&mut self, query: &BooleanQuery, wanted: &dyn Fn() -> bool) -> Result<Option<Vec<Found>>, QueryError> {
        let searcher = self.scope.searcher;
        let most = usize::try_from(searcher.num_docs()).unwrap_or(usize::MAX).max(1);
        let (mut fetched, mut done) = (self.limit.saturating_mul(2).max(32), 0);
        loop {
            if !wanted() {
                return Ok(None);
            }
            let top = TopDocs::with_limit(fetched.min(most)).order_by_score();
            let hits = searcher.search_with_statistics_provider(query, &top, &Statistics(searcher))?;
            // Of passages that score as the last one does, some may be missing: which comes first cannot be told yet.
            let whole = match hits.last() {
                Some((last, _)) if hits.len() == fetched => hits.partition_point(|(score, _)| score > last),
                _ => hits.len(),
            };
            for equals in hits[done.min(whole)..whole].chunk_by(|(a, _), (b, _)| a == b) {
                for (score, hit) in self.in_order(equals)? {
                    if self.kept.len() == self.limit {
                        break;
                    }
                    self.consider(score, &hit)?;
                }
            }
            if self.kept.len() == self.limit || hits.len() < fetched {
                return match self.damage.take().filter(|_| self.kept.is_empty()) {
                    Some(damage) => Err(damage.into()),
                    None => Ok(Some(std::mem::take(&mut self.kept))),
                };
            }
            done = done.max(whole);
            fetched = fetched.saturating_mul(4);
        }
    }

    /// Passages that score alike, by the names of their documents and their places there: the same in every index over the
    /// same documents. Of very many, only some are told apart by name; which ones, their texts decide.
    fn in_order(&mut self, equals: &[(f32, DocAddress)]) -> Result<Vec<(f32, Hit)>, QueryError> {
        let mut hits = Vec::with_capacity(equals.len());
        for (score, address) in equals {
            hits.extend(self.hit(*address)?.map(|hit| (*score, hit)));
        }
        if hits.len() > 1 {
            hits.sort_by_key(|(_, hit)| (hit.digest, hit.number));
            let named = &mut hits[..equals.len().min(MOST_NAMED)];
            let mut names = HashMap::new();
            for (_, hit) in named.iter() {
                // One that cannot be read is left out, with a warning, when its turn comes.
                let info = self.info(&hit.document).ok().flatten();
                names.insert(hit.document, info.and_then(|info| info.names.first().cloned()));
            }
            named.sort_by(|(_, a), (_, b)| (&names[&a.document], a.number).cmp(&(&names[&b.document], b.number)));
        }
        Ok(hits)
    }

    /// Keeps a passage unless a better one has the same text, or mostly covers it. One that cannot be read intact is left
    /// out, with a warning: the others are no worse for it.
    fn consider(&mut self, score: f32, hit: &Hit) -> Result<(), QueryError> {
        if self.seen.contains(&hit.digest) {
            return Ok(());
        }
        let found = match self.passage(score, hit) {
            Err(damage @ DocumentsError::DamagedDocument { .. }) => {
                static TOLD: Seldom = Seldom::new();
                if let Some(more) = TOLD.due() {
                    tracing::warn!(%damage, more, "a passage is left out of a search");
                }
                self.damage.get_or_insert(damage);
                return Ok(());
            }
            found => found?,
        };
        let Some(found) = found else { return Ok(()) };
        self.seen.insert(hit.digest);
        let covered = |better: &Found| {
            let shorter = better.span.len().min(found.span.len());
            better.id == found.id && better.span.overlap(&found.span) * 2 > shorter
        };
        if !self.kept.iter().any(covered) {
            self.kept.push(found);
        }
        Ok(())
    }

    /// What the index knows of a passage.
    fn hit(&self, address: DocAddress) -> tantivy::Result<Option<Hit>> {
        let columns = self.scope.searcher.segment_reader(address.segment_ord).fast_fields();
        let number = columns.u64(NUMBER)?.first(address.doc_id).and_then(|number| u32::try_from(number).ok());
        let digest = columns.u64(DIGEST)?.first(address.doc_id);
        let Some(documents) = columns.bytes(DOCUMENT)? else { return Ok(None) };
        let mut id = Vec::new();
        if let Some(ordinal) = documents.term_ords(address.doc_id).next() {
            documents.ord_to_bytes(ordinal, &mut id)?;
        }
        let (Some(document), Some(number), Some(digest)) = (DocumentId::from_bytes(&id), number, digest) else {
            return Ok(None);
        };
        Ok(Some(Hit { document, number, digest }))
    }

    /// A document that may be found; `None` for one that is gone, or not admitted.
    fn info(&mut self, id: &DocumentId) -> Result<Option<&DocumentInfo>, DocumentsError> {
        let Scope { catalog, admits, .. } = self.scope;
        let info = match self.documents.entry(*id) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => {
                let info = catalog.document(id)?;
                unknown.insert(info.filter(|info| info.removed.is_none() && admits(info)))
            }
        };
        Ok(info.as_ref())
    }

    /// A passage, cut out of its document and compared with its hash. `None` if the document may not be found, or was
    /// removed or replaced since the index was written.
    fn passage(&mut self, score: f32, hit: &Hit) -> Result<Option<Found>, DocumentsError> {
        let catalog = self.scope.catalog;
        let Some(info) = self.info(&hit.document)? else { return Ok(None) };
        let Some(passage) = catalog.passage(&info.id, hit.number)? else { return Ok(None) };
        let text = catalog.passage_text(info, &passage)?;
        if passage_digest(&text) != hit.digest {
            return Ok(None);
        }
        Ok(Some(Found {
            path: PathBuf::from(info.names.first().map_or("", String::as_str)),
            id: info.id,
            number: hit.number,
            span: passage.place.chars,
            line: passage.line,
            page: passage.page,
            passage: text,
            score,
            tokens: info.tokenizer.map(|tokenizer| PassageTokens { tokenizer, tokens: passage.tokens }),
        }))
    }
}

/// A passage that a query found, as the index knows it.
struct Hit {
    document: DocumentId,
    number: u32,
    digest: u64,
}
