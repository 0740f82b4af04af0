//! A collection: the texts of its documents and a full-text index over their chunks, ranked by BM25.
//!
//! A document is one record with the whole text, and one record per chunk with its place in that text; both are
//! replaced in one commit, so that a reader never sees half a document. Passages are cut out of the stored text: a
//! citation holds even when the source file is gone, and its hash is compared before it is given out.

use std::path::{Path, PathBuf};

use serde::Serialize;
use tantivy::collector::TopDocs;
use tantivy::query::TermQuery;
use tantivy::schema::IndexRecordOption;
use tantivy::{IndexWriter, Searcher, TantivyDocument, Term};

use super::index::{self, OpenIndex, WRITER_BYTES, bytes_of, damaged, guarded, text_of};
use super::query;
use super::record::{Record, parse_place};
use crate::error::{DocumentsError, Result};
use crate::ingest::Document;
use crate::split::{ChunkSpan, Span};

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

/// An open collection, for reading.
pub struct Collection {
    dir: PathBuf,
    open: OpenIndex,
}

impl Collection {
    /// Opens the collection in `dir`; `None` if there is none. One that was written for another version of the
    /// analyzer is built again from its texts.
    ///
    /// # Errors
    /// [`DocumentsError::NewerCollection`] for one of a later version, [`DocumentsError::Index`] for a damaged one.
    pub fn open(dir: &Path) -> Result<Option<Collection>> {
        Ok(index::open(dir)?.map(|open| Collection { dir: dir.into(), open }))
    }

    /// Opens the collection in `dir`, making an empty one where there is none.
    ///
    /// # Errors
    /// As [`open`](Self::open), and [`DocumentsError::DataDir`] where nothing can be written.
    pub fn open_or_create(dir: &Path) -> Result<Collection> {
        if let Some(collection) = Collection::open(dir)? {
            return Ok(collection);
        }
        Ok(Collection { dir: dir.into(), open: index::create(dir)? })
    }

    /// A writer; there can be one at a time over all processes.
    ///
    /// # Errors
    /// [`DocumentsError::Index`] when another one is at work, [`DocumentsError::DataDir`] when the folder cannot be written.
    pub fn writer(&self) -> Result<CollectionWriter<'_>> {
        if !self.open.on_disk {
            return Err(DocumentsError::writing(&self.dir, std::io::ErrorKind::PermissionDenied.into()));
        }
        let writer = guarded(&self.dir, || self.open.index.writer_with_num_threads(1, WRITER_BYTES))?;
        index::remove_earlier(&self.dir);
        Ok(CollectionWriter { collection: self, writer })
    }

    /// The passages that fit `query` best: at most `limit`, best first, none that repeats a better one. Empty only
    /// where no passage shares a word with the query. See `query.rs` for how they are ranked.
    ///
    /// `wanted` is asked between the steps.
    ///
    /// # Errors
    /// [`DocumentsError::Index`]; [`DocumentsError::Cancelled`] once `wanted` says no.
    pub fn search(&self, query: &str, limit: usize, wanted: &dyn Fn() -> bool) -> Result<Vec<Found>> {
        let found = guarded(&self.dir, || {
            self.open.reader.reload()?;
            query::search(self, &self.open.reader.searcher(), query, limit, wanted)
        })?;
        found.ok_or_else(|| DocumentsError::Cancelled)
    }

    pub(super) fn open_index(&self) -> &OpenIndex {
        &self.open
    }

    /// A document by its name; `None` if the collection does not have it.
    ///
    /// # Errors
    /// [`DocumentsError::Index`], also when what is stored of it is not what was written.
    pub fn document(&self, path: &Path) -> Result<Option<StoredDocument>> {
        let name = path.to_string_lossy();
        guarded(&self.dir, || {
            self.open.reader.reload()?;
            let fields = &self.open.fields;
            let Some(stored) = self.record(&self.open.reader.searcher(), &name)? else { return Ok(None) };
            let changed = || damaged(&format!("what is stored of {name} is not what was written"));
            let (fingerprint, text) = (text_of(&stored, fields.fingerprint), text_of(&stored, fields.body));
            let (Some(fingerprint), Some(text)) = (fingerprint, text) else { return Err(changed()) };
            let places = text_of(&stored, fields.place).unwrap_or_default();
            let chunks: Vec<ChunkSpan> = places.lines().map(parse_place).collect::<Option<_>>().ok_or_else(changed)?;
            let record = Record { name: &name, fingerprint, text, chunks: &chunks };
            if bytes_of(&stored, fields.seal) != Some(record.seal().as_slice()) {
                return Err(changed());
            }
            let (fingerprint, text) = (fingerprint.to_string(), text.to_string());
            Ok(Some(StoredDocument { path: path.into(), fingerprint, text, chunks }))
        })
    }

    /// The record of a document that carries its text.
    pub(super) fn record(&self, searcher: &Searcher, name: &str) -> tantivy::Result<Option<TantivyDocument>> {
        let term = Term::from_field_text(self.open.fields.document, name);
        let query = TermQuery::new(term, IndexRecordOption::Basic);
        let hits = searcher.search(&query, &TopDocs::with_limit(1).order_by_score())?;
        hits.first().map(|(_, address)| searcher.doc(*address)).transpose()
    }

    /// Records of the index: documents and chunks together.
    ///
    /// # Errors
    /// [`DocumentsError::Index`].
    pub fn records(&self) -> Result<u64> {
        guarded(&self.dir, || {
            self.open.reader.reload()?;
            Ok(self.open.reader.searcher().num_docs())
        })
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
    /// [`DocumentsError::Index`]; the collection is then as it was.
    pub fn replace(&mut self, document: &Document, fingerprint: &str, chunks: &[ChunkSpan]) -> Result<()> {
        let name = document.path.to_string_lossy();
        let record = Record { name: &name, fingerprint, text: &document.text, chunks };
        let outcome = guarded(&self.collection.dir, || {
            self.collection.open.put(&self.writer, &record)?;
            self.writer.commit().map(|_| ())
        });
        if outcome.is_err() {
            let _ = self.writer.rollback();
        }
        outcome
    }

    /// Waits for merges of the index to end.
    ///
    /// # Errors
    /// [`DocumentsError::Index`].
    pub fn finish(self) -> Result<()> {
        let CollectionWriter { collection, writer } = self;
        guarded(&collection.dir, || writer.wait_merging_threads())
    }
}
