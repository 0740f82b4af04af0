//! A collection: the texts of its documents and a full-text index over their chunks, ranked by BM25.
//!
//! One folder, one tantivy index. A document is one record with the whole text, and one record per chunk with its
//! place in that text; both are replaced in one commit, so that a reader never sees half a document. Passages are cut
//! out of the stored text: a citation holds even when the source file is gone.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Serialize;
use tantivy::collector::TopDocs;
use tantivy::query::{BooleanQuery, Occur, Query, TermQuery};
use tantivy::schema::{Field, IndexRecordOption, STORED, STRING, Schema, TextFieldIndexing, TextOptions, Value};
use tantivy::tokenizer::{
    Language, LowerCaser, RemoveLongFilter, SimpleTokenizer, Stemmer, StopWordFilter, TextAnalyzer,
};
use tantivy::{Index, IndexReader, IndexWriter, ReloadPolicy, TantivyDocument, TantivyError, Term};

use super::directory::IndexFolder;
use super::ingest::Document;
use super::split::{ChunkSpan, Span};
use crate::error::{QuireError, Result};

const ANALYZER: &str = "quire_en";
/// Memory of the index writer; tantivy refuses less than 15 MB.
const WRITER_BYTES: usize = 32 << 20;

/// A chunk that a query found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Found {
    /// The document.
    pub path: PathBuf,
    /// Where in the document.
    pub span: Span,
    /// The line that it begins in, from 1.
    pub line: usize,
    /// The text there.
    pub passage: String,
    /// BM25 score; higher is better.
    pub score: f32,
}

/// A document as a collection keeps it.
#[derive(Clone, Debug)]
pub struct StoredDocument {
    /// Its name.
    pub path: PathBuf,
    /// Identifies its text and how it was split.
    pub fingerprint: String,
    /// Its whole text.
    pub text: String,
    /// Its chunks, in order.
    pub chunks: Vec<ChunkSpan>,
}

#[derive(Clone, Copy)]
struct Fields {
    /// Path of the document, on its own record only.
    document: Field,
    /// Path of the document, on all of its records: what a replacement deletes.
    path: Field,
    fingerprint: Field,
    body: Field,
    text: Field,
    /// `start end start end`: characters, then bytes.
    place: Field,
}

impl Fields {
    fn schema() -> Schema {
        let mut schema = Schema::builder();
        schema.add_text_field("document", STRING);
        schema.add_text_field("path", STRING | STORED);
        schema.add_text_field("fingerprint", STORED);
        schema.add_text_field("body", STORED);
        let words = TextFieldIndexing::default().set_tokenizer(ANALYZER).set_index_option(IndexRecordOption::WithFreqs);
        schema.add_text_field("text", TextOptions::default().set_indexing_options(words));
        schema.add_text_field("place", STORED);
        schema.build()
    }

    fn of(index: &Index) -> tantivy::Result<Fields> {
        let schema = index.schema();
        Ok(Fields {
            document: schema.get_field("document")?,
            path: schema.get_field("path")?,
            fingerprint: schema.get_field("fingerprint")?,
            body: schema.get_field("body")?,
            text: schema.get_field("text")?,
            place: schema.get_field("place")?,
        })
    }
}

/// An open collection, for reading.
pub struct Collection {
    dir: PathBuf,
    index: Index,
    reader: IndexReader,
    fields: Fields,
}

impl Collection {
    /// Opens the collection in `dir`; `None` if there is none.
    ///
    /// # Errors
    /// [`QuireError::Index`] for a damaged one.
    pub fn open(dir: &Path) -> Result<Option<Collection>> {
        if !dir.join("meta.json").is_file() {
            return Ok(None);
        }
        let opened = IndexFolder::open(dir).map_err(TantivyError::from).and_then(Index::open);
        let index = opened.map_err(|e| index_error(dir, e))?;
        Collection::with_index(dir, index).map(Some)
    }

    /// Opens the collection in `dir`, making an empty one where there is none.
    ///
    /// # Errors
    /// [`QuireError::DataDir`] where nothing can be written, [`QuireError::Index`] for a damaged one.
    pub fn open_or_create(dir: &Path) -> Result<Collection> {
        if let Some(collection) = Collection::open(dir)? {
            return Ok(collection);
        }
        std::fs::create_dir_all(dir).map_err(|e| QuireError::writing(dir, e))?;
        let index = Index::create_in_dir(dir, Fields::schema()).map_err(|e| index_error(dir, e))?;
        Collection::with_index(dir, index)
    }

    fn with_index(dir: &Path, index: Index) -> Result<Collection> {
        let failed = |e| index_error(dir, e);
        let mut analyzer = TextAnalyzer::builder(SimpleTokenizer::default())
            .filter(RemoveLongFilter::limit(64))
            .filter(LowerCaser)
            .dynamic();
        if let Some(stop_words) = StopWordFilter::new(Language::English) {
            analyzer = analyzer.filter_dynamic(stop_words);
        }
        let analyzer = analyzer.filter_dynamic(Stemmer::new(Language::English)).build();
        index.tokenizers().register(ANALYZER, analyzer);
        let fields = Fields::of(&index).map_err(failed)?;
        let reader: IndexReader =
            index.reader_builder().reload_policy(ReloadPolicy::Manual).try_into().map_err(failed)?;
        Ok(Collection { dir: dir.into(), index, reader, fields })
    }

    /// A writer; there can be one at a time over all processes.
    ///
    /// # Errors
    /// [`QuireError::Index`] when another one is at work, or the folder cannot be written.
    pub fn writer(&self) -> Result<CollectionWriter<'_>> {
        let writer = self.index.writer_with_num_threads(1, WRITER_BYTES).map_err(|e| index_error(&self.dir, e))?;
        Ok(CollectionWriter { collection: self, writer })
    }

    /// The chunks that fit `query` best: at most `limit`, best first. Every word counts for itself (BM25 over words
    /// without endings, English stop words left out).
    ///
    /// # Errors
    /// [`QuireError::Index`].
    pub fn search(&self, query: &str, limit: usize) -> Result<Vec<Found>> {
        let failed = |e| index_error(&self.dir, e);
        self.reader.reload().map_err(failed)?;
        let searcher = self.reader.searcher();
        let query = self.query(query).map_err(failed)?;
        let best = searcher.search(&query, &TopDocs::with_limit(limit.max(1)).order_by_score()).map_err(failed)?;
        let mut texts: HashMap<String, String> = HashMap::new();
        let mut found = Vec::with_capacity(best.len());
        let mut starts = Vec::with_capacity(best.len());
        for (score, address) in best {
            let record: TantivyDocument = searcher.doc(address).map_err(failed)?;
            let path = text_of(&record, self.fields.path).unwrap_or_default().to_string();
            let place = text_of(&record, self.fields.place).and_then(parse_place);
            if !texts.contains_key(&path) {
                let text = self.record(&path)?.and_then(|r| text_of(&r, self.fields.body).map(str::to_string));
                texts.insert(path.clone(), text.unwrap_or_default());
            }
            let passage = place.as_ref().and_then(|p| texts[&path].get(p.bytes.clone()));
            let (Some(place), Some(passage)) = (&place, passage) else {
                return Err(self.damaged(&path));
            };
            starts.push(place.bytes.start);
            found.push(Found { span: place.chars, line: 1, passage: passage.into(), score, path: PathBuf::from(path) });
        }
        number_lines(&texts, &starts, &mut found);
        Ok(found)
    }

    fn query(&self, text: &str) -> tantivy::Result<BooleanQuery> {
        let mut analyzer = self.index.tokenizer_for_field(self.fields.text)?;
        let mut terms: Vec<Term> = Vec::new();
        analyzer.token_stream(text).process(&mut |token| {
            let term = Term::from_field_text(self.fields.text, &token.text);
            if !terms.contains(&term) {
                terms.push(term);
            }
        });
        let clause = |term| -> (Occur, Box<dyn Query>) {
            (Occur::Should, Box::new(TermQuery::new(term, IndexRecordOption::WithFreqs)))
        };
        Ok(BooleanQuery::new(terms.into_iter().map(clause).collect()))
    }

    /// A document by its name; `None` if the collection does not have it.
    ///
    /// # Errors
    /// [`QuireError::Index`].
    pub fn document(&self, path: &Path) -> Result<Option<StoredDocument>> {
        self.reader.reload().map_err(|e| index_error(&self.dir, e))?;
        let name = path.to_string_lossy();
        let Some(record) = self.record(&name)? else { return Ok(None) };
        let fingerprint = text_of(&record, self.fields.fingerprint);
        let (Some(fingerprint), Some(text)) = (fingerprint, text_of(&record, self.fields.body)) else {
            return Err(self.damaged(&name));
        };
        let places = text_of(&record, self.fields.place).unwrap_or_default();
        let chunks: Option<Vec<ChunkSpan>> = places.lines().map(parse_place).collect();
        let chunks = chunks.ok_or_else(|| self.damaged(&name))?;
        Ok(Some(StoredDocument { path: path.into(), fingerprint: fingerprint.into(), text: text.into(), chunks }))
    }

    /// The record of a document that carries its text.
    fn record(&self, name: &str) -> Result<Option<TantivyDocument>> {
        let failed = |e| index_error(&self.dir, e);
        let searcher = self.reader.searcher();
        let query = TermQuery::new(Term::from_field_text(self.fields.document, name), IndexRecordOption::Basic);
        let hits = searcher.search(&query, &TopDocs::with_limit(1).order_by_score()).map_err(failed)?;
        hits.first().map(|(_, address)| searcher.doc(*address).map_err(failed)).transpose()
    }

    /// Records of the index: documents and chunks together.
    ///
    /// # Errors
    /// [`QuireError::Index`].
    pub fn records(&self) -> Result<u64> {
        self.reader.reload().map_err(|e| index_error(&self.dir, e))?;
        Ok(self.reader.searcher().num_docs())
    }

    fn damaged(&self, name: &str) -> QuireError {
        let reason = TantivyError::InternalError(format!("the record of {name} is incomplete"));
        index_error(&self.dir, reason)
    }
}

/// Writes documents into a collection.
pub struct CollectionWriter<'a> {
    collection: &'a Collection,
    writer: IndexWriter,
}

impl CollectionWriter<'_> {
    /// Puts a document in the place of the one with its name, if there is one. When this returns, the document is on
    /// disk and can be found.
    ///
    /// # Errors
    /// [`QuireError::Index`]; the collection is then as it was.
    pub fn replace(&mut self, document: &Document, fingerprint: &str, chunks: &[ChunkSpan]) -> Result<()> {
        let fields = self.collection.fields;
        let name = document.path.to_string_lossy();
        let outcome = self.write(&fields, &name, document, fingerprint, chunks);
        outcome.map_err(|e| {
            let _ = self.writer.rollback();
            index_error(&self.collection.dir, e)
        })
    }

    fn write(
        &mut self,
        fields: &Fields,
        name: &str,
        document: &Document,
        fingerprint: &str,
        chunks: &[ChunkSpan],
    ) -> tantivy::Result<()> {
        self.writer.delete_term(Term::from_field_text(fields.path, name));
        let mut whole = TantivyDocument::default();
        whole.add_text(fields.document, name);
        whole.add_text(fields.path, name);
        whole.add_text(fields.fingerprint, fingerprint);
        whole.add_text(fields.body, &document.text);
        whole.add_text(fields.place, chunks.iter().map(write_place).collect::<Vec<_>>().join("\n"));
        self.writer.add_document(whole)?;
        for chunk in chunks {
            let mut record = TantivyDocument::default();
            record.add_text(fields.path, name);
            record.add_text(fields.text, &document.text[chunk.bytes.clone()]);
            record.add_text(fields.place, write_place(chunk));
            self.writer.add_document(record)?;
        }
        self.writer.commit()?;
        Ok(())
    }

    /// Waits for merges of the index to end.
    ///
    /// # Errors
    /// [`QuireError::Index`].
    pub fn finish(self) -> Result<()> {
        self.writer.wait_merging_threads().map_err(|e| index_error(&self.collection.dir, e))
    }
}

/// Says in which lines passages begin, given where they begin in bytes; every text is read once.
fn number_lines(texts: &HashMap<String, String>, starts: &[usize], found: &mut [Found]) {
    for (path, text) in texts {
        let mut inside: Vec<usize> = (0..found.len()).filter(|&i| found[i].path.as_os_str() == path.as_str()).collect();
        inside.sort_by_key(|&i| starts[i]);
        let (mut line, mut counted) = (1, 0);
        for i in inside {
            line += text.as_bytes()[counted..starts[i]].iter().filter(|&&byte| byte == b'\n').count();
            counted = starts[i];
            found[i].line = line;
        }
    }
}

fn text_of(record: &TantivyDocument, field: Field) -> Option<&str> {
    record.get_first(field).and_then(|value| value.as_str())
}

fn write_place(chunk: &ChunkSpan) -> String {
    format!("{} {} {} {}", chunk.chars.start, chunk.chars.end, chunk.bytes.start, chunk.bytes.end)
}

fn parse_place(text: &str) -> Option<ChunkSpan> {
    let numbers: Vec<usize> = text.split(' ').map(|n| n.parse().ok()).collect::<Option<_>>()?;
    let [start, end, from, to]: [usize; 4] = numbers.try_into().ok()?;
    Some(ChunkSpan { chars: Span { start, end }, bytes: Range { start: from, end: to } })
}

fn index_error(dir: &Path, source: TantivyError) -> QuireError {
    use std::io::ErrorKind as K;
    let io = match &source {
        TantivyError::IoError(e) => Some(e.kind()),
        TantivyError::OpenWriteError(tantivy::directory::error::OpenWriteError::IoError { io_error, .. }) => {
            Some(io_error.kind())
        }
        TantivyError::OpenReadError(tantivy::directory::error::OpenReadError::IoError { io_error, .. }) => {
            Some(io_error.kind())
        }
        TantivyError::OpenDirectoryError(tantivy::directory::error::OpenDirectoryError::IoError {
            io_error, ..
        }) => Some(io_error.kind()),
        TantivyError::LockFailure(tantivy::directory::error::LockError::IoError(e), _) => Some(e.kind()),
        _ => None,
    };
    if let Some(kind @ (K::PermissionDenied | K::ReadOnlyFilesystem | K::StorageFull | K::NotADirectory)) = io {
        return QuireError::writing(dir, kind.into());
    }
    let advice = match &source {
        TantivyError::LockFailure(..) => "Another quire is ingesting into this collection: wait for it, or stop it",
        _ => "Remove this folder and ingest the documents again: cached chunks stay",
    };
    QuireError::Index { path: dir.into(), advice, source: Box::new(source) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::library::split::Format;

    fn document(name: &str, text: &str) -> (Document, Vec<ChunkSpan>) {
        let mut chunks = Vec::new();
        let (mut byte, mut char) = (0, 0);
        for line in text.split_inclusive('\n') {
            let chars = line.trim_end().chars().count();
            chunks.push(ChunkSpan {
                chars: Span { start: char, end: char + chars },
                bytes: byte..byte + line.trim_end().len(),
            });
            byte += line.len();
            char += line.chars().count();
        }
        (Document { path: name.into(), text: text.into(), format: Format::Text }, chunks)
    }

    fn put(collection: &Collection, name: &str, text: &str) {
        let (document, chunks) = document(name, text);
        let mut writer = collection.writer().unwrap();
        writer.replace(&document, &format!("v{}", text.len()), &chunks).unwrap();
        writer.finish().unwrap();
    }

    #[test]
    fn found_passages_are_slices_of_the_stored_text() {
        let dir = tempfile::tempdir().unwrap();
        let collection = Collection::open_or_create(dir.path()).unwrap();
        put(&collection, "/d/a.txt", "Über den Fluß führt eine Brücke.\nThe lighthouse keepers counted ships.\n");
        put(&collection, "/d/b.txt", "Nothing about towers here.\n");
        let found = collection.search("Who is the keeper of the lighthouse?", 5).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].passage, "The lighthouse keepers counted ships.");
        assert_eq!(found[0].path, PathBuf::from("/d/a.txt"));
        assert_eq!((found[0].span, found[0].line), (Span { start: 33, end: 70 }, 2));
        put(&collection, "/d/c.txt", "One ship.\n\n\nTwo ships.\nThree ships.\n");
        let found = collection.search("ships", 9).unwrap();
        let lines = |name: &str| found.iter().filter(|f| f.path.ends_with(name)).map(|f| f.line).collect::<Vec<_>>();
        let mut in_c = lines("c.txt");
        in_c.sort_unstable();
        assert_eq!((lines("a.txt"), in_c), (vec![2], vec![1, 4, 5]));
    }

    #[test]
    fn a_changed_document_replaces_its_chunks() {
        let dir = tempfile::tempdir().unwrap();
        let collection = Collection::open_or_create(dir.path()).unwrap();
        put(&collection, "/d/a.txt", "An anchor.\nA barrel.\nA compass.\n");
        put(&collection, "/d/b.txt", "An anchor too.\n");
        put(&collection, "/d/a.txt", "A dinghy.\n");
        assert_eq!(collection.records().unwrap(), 4);
        assert!(collection.search("barrel compass", 5).unwrap().is_empty());
        assert_eq!(collection.search("anchors", 5).unwrap().len(), 1);
        let stored = collection.document(Path::new("/d/a.txt")).unwrap().unwrap();
        assert_eq!((stored.text.as_str(), stored.chunks.len()), ("A dinghy.\n", 1));
        assert!(collection.document(Path::new("/d/c.txt")).unwrap().is_none());
    }

    #[test]
    fn words_without_meaning_find_nothing_and_reopening_keeps_all() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Collection::open(dir.path()).unwrap().is_none());
        put(&Collection::open_or_create(dir.path()).unwrap(), "/d/a.txt", "The pilot of the barque.\n");
        let collection = Collection::open(dir.path()).unwrap().unwrap();
        assert!(collection.search("the of and ?!", 5).unwrap().is_empty());
        assert_eq!(collection.search("\"PILOTS\" AND (", 5).unwrap().len(), 1);
    }

    #[test]
    fn a_second_writer_is_told_to_wait() {
        let dir = tempfile::tempdir().unwrap();
        let collection = Collection::open_or_create(dir.path()).unwrap();
        let _first = collection.writer().unwrap();
        let error = collection.writer().err().unwrap().to_string();
        assert!(error.contains("Another quire is ingesting"), "{error}");
    }
}
