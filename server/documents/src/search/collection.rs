//! An open collection: its documents in the catalog, and an index over their passages, ranked by BM25.
//!
//! Passages are cut out of the catalog's texts: a citation holds even when the source file is gone, and its hash is compared
//! before it is given out. What is acknowledged is in the catalog, synced; the index follows in the same call, and is
//! caught up when the collection is opened where it could not.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use serde::{Deserialize, Serialize};
use tantivy::{IndexWriter, Searcher};

use super::building::{build_in_memory, build_on_disk, found, index_dir};
use super::index::{Derivation, Fields, OpenIndex, guarded};
use super::query;
use crate::catalog::{Access, Catalog, CollectionInfo, DocumentId, DocumentInfo, LogEntry, Passage, Transaction};
use crate::error::{DocumentsError, Result};
use crate::split::{ChunkSpan, Span};

/// A passage that a query found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Found {
    /// The name of its document; the first one, where it has several.
    pub path: PathBuf,
    /// The id of its document.
    pub id: DocumentId,
    /// Which of the document's passages it is, from 0.
    pub number: u32,
    /// Where in the document.
    pub span: Span,
    /// The line that it begins in, from 1.
    pub line: usize,
    /// The page that it begins on, from 1, of documents that have pages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub page: Option<u32>,
    /// The text there.
    pub passage: String,
    /// BM25 score; higher is better.
    pub score: f32,
    /// Its tokens, as they were made when the document was ingested.
    #[serde(skip)]
    pub tokens: Option<PassageTokens>,
}

/// Tokens of a passage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassageTokens {
    /// Fingerprint of the tokenizer that they are of.
    pub tokenizer: [u8; 32],
    /// The tokens.
    pub tokens: Vec<u32>,
}

/// A document as a collection keeps it.
#[derive(Clone, Debug)]
pub struct StoredDocument {
    /// What the catalog keeps of it.
    pub info: DocumentInfo,
    /// Its whole text.
    pub text: String,
    /// Its passages, in order.
    pub passages: Vec<Passage>,
}

impl StoredDocument {
    /// Where its passages lie.
    #[must_use]
    pub fn chunks(&self) -> Vec<ChunkSpan> {
        self.passages.iter().map(|passage| passage.place.clone()).collect()
    }
}

/// An open collection.
pub struct Collection {
    catalog: Arc<Catalog>,
    info: CollectionInfo,
    index: RwLock<OpenIndex>,
    /// The index writer, while anybody writes, and how many do.
    writing: Mutex<Writing>,
    /// Whether its index is written on disk.
    on_disk: bool,
}

#[derive(Default)]
struct Writing {
    sessions: usize,
    writer: Option<IndexWriter>,
}

impl Collection {
    /// Opens a collection of a catalog whose index lies below `data_dir` and lacks nothing; `None` for any other.
    ///
    /// # Errors
    /// [`DocumentsError::Catalog`], [`DocumentsError::DataDir`].
    pub(crate) fn open_ready(
        catalog: &Arc<Catalog>,
        info: &CollectionInfo,
        data_dir: &Path,
    ) -> Result<Option<Collection>> {
        let wanted = Derivation::of(catalog, &info.language);
        let on_disk = catalog.access() == Access::Write;
        let Some(index) = found(&index_dir(data_dir, info.id), &wanted, on_disk)? else { return Ok(None) };
        if catalog.changes(info.id, index.derivation.sequence)?.is_none_or(|changes| !changes.is_empty()) {
            return Ok(None);
        }
        Ok(Some(Collection::with_index(catalog, info, index, on_disk)))
    }

    /// Opens a collection of a catalog. Its index is caught up, or built again where it has to be: below `data_dir` where the
    /// catalog can be written, else in memory. With `lags`, somebody else is at work there, and what there is will do.
    ///
    /// # Errors
    /// [`DocumentsError::Index`], [`DocumentsError::Catalog`], [`DocumentsError::DataDir`].
    pub(crate) fn open(
        catalog: &Arc<Catalog>,
        info: &CollectionInfo,
        data_dir: Option<&Path>,
        lags: bool,
    ) -> Result<Collection> {
        let wanted = Derivation::of(catalog, &info.language);
        let on_disk = data_dir.is_some() && catalog.access() == Access::Write;
        let dir = data_dir.map(|data_dir| index_dir(data_dir, info.id));
        let there = match dir.as_ref().filter(|_| on_disk || lags) {
            Some(dir) => found(dir, &wanted, on_disk)?,
            None => None,
        };
        let index = match (there, &dir) {
            (Some(index), _) => index,
            (None, Some(dir)) if on_disk => build_on_disk(catalog, info, dir, &wanted)?,
            (None, _) => build_in_memory(catalog, info, &wanted)?,
        };
        let collection = Collection::with_index(catalog, info, index, on_disk);
        if !on_disk {
            return Ok(collection);
        }
        let caught_up = collection.writer()?.catch_up();
        match (caught_up, &dir) {
            (Err(DocumentsError::Index { source, .. }), Some(dir)) => {
                tracing::warn!(index = %dir.display(), problem = %source, "the index cannot be caught up: it is built again");
                drop(collection);
                let index = build_on_disk(catalog, info, dir, &wanted)?;
                Ok(Collection::with_index(catalog, info, index, on_disk))
            }
            (caught_up, _) => caught_up.map(|()| collection),
        }
    }

    fn with_index(catalog: &Arc<Catalog>, info: &CollectionInfo, index: OpenIndex, on_disk: bool) -> Collection {
        let (catalog, info) = (Arc::clone(catalog), info.clone());
        Collection { catalog, info, index: RwLock::new(index), writing: Mutex::default(), on_disk }
    }

    /// What the catalog keeps of the collection as a whole.
    #[must_use]
    pub fn info(&self) -> &CollectionInfo {
        &self.info
    }

    /// The catalog that it is in.
    #[must_use]
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.catalog
    }

    /// Begins to write; others may at the same time. Index writers take memory, so this is held only while
    /// documents come in.
    ///
    /// # Errors
    /// [`DocumentsError::DataDir`] where nothing can be written.
    pub fn writer(&self) -> Result<CollectionWriter<'_>> {
        if !self.on_disk {
            let path = self.index.read().unwrap_or_else(PoisonError::into_inner).dir.clone();
            return Err(DocumentsError::writing(path, std::io::ErrorKind::PermissionDenied.into()));
        }
        self.writing().sessions += 1;
        Ok(CollectionWriter { collection: self })
    }

    fn writing(&self) -> MutexGuard<'_, Writing> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings everything that has changed in the catalog into the index.
    fn catch_up(&self) -> Result<()> {
        let mut writing = self.writing();
        let reached = self.index.read().unwrap_or_else(PoisonError::into_inner).derivation.sequence;
        // In this order: what changes in between is brought in, and brought in again.
        let sequence = self.catalog.sequence();
        let entries: Vec<LogEntry> = match self.catalog.changes(self.info.id, reached)? {
            Some(changes) => changes.into_iter().map(|(_, entry)| entry).collect(),
            // Passages of documents that are gone are left out of every search.
            None => self.catalog.document_ids(self.info.id)?.into_iter().map(LogEntry::Put).collect(),
        };
        if entries.is_empty() {
            return Ok(());
        }
        if writing.writer.is_none() {
            writing.writer = Some(self.index.read().unwrap_or_else(PoisonError::into_inner).writer()?);
        }
        let Some(writer) = &mut writing.writer else { return Ok(()) };
        let brought = bring_in(&self.index, writer, &self.catalog, &entries, sequence);
        if brought.is_err() {
            // A writer that has failed once may have lost its threads.
            writing.writer = None;
        }
        brought?;
        self.catalog.trim_log(self.info.id, sequence)
    }

    /// The passages that fit `query` best: at most `limit`, best first, none that repeats a better one. Empty only
    /// where no passage shares a word with the query. See `query.rs` for how they are ranked.
    ///
    /// `wanted` is asked between the steps.
    ///
    /// # Errors
    /// [`DocumentsError::Index`]; [`DocumentsError::DamagedDocument`] if nothing but damaged passages was found;
    /// [`DocumentsError::Cancelled`] once `wanted` says no.
    pub fn search(&self, query: &str, limit: usize, wanted: &dyn Fn() -> bool) -> Result<Vec<Found>> {
        self.search_where(query, limit, &|_| true, wanted)
    }

    /// As [`search`](Self::search), over the documents that `admits` admits.
    ///
    /// # Errors
    /// As [`search`](Self::search).
    pub fn search_where(
        &self,
        query: &str,
        limit: usize,
        admits: &dyn Fn(&DocumentInfo) -> bool,
        wanted: &dyn Fn() -> bool,
    ) -> Result<Vec<Found>> {
        let (searcher, fields, dir) = self.searcher();
        let mut failed = None;
        let found = guarded(&dir, || {
            let scope = query::Scope { catalog: &self.catalog, searcher: &searcher, fields, admits };
            match query::search(&scope, query, limit, wanted) {
                Err(query::QueryError::Index(error)) => Err(error),
                Err(query::QueryError::Documents(error)) => {
                    failed = Some(error);
                    Ok(None)
                }
                Ok(found) => Ok(found),
            }
        })?;
        match failed {
            Some(error) => Err(error),
            None => found.ok_or(DocumentsError::Cancelled),
        }
    }

    fn searcher(&self) -> (Searcher, Fields, PathBuf) {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        (index.reader.searcher(), index.fields, index.dir.clone())
    }

    /// A document by a name of it; `None` if the collection does not have it.
    ///
    /// # Errors
    /// [`DocumentsError::DamagedDocument`] when what is stored of it is not what was written.
    pub fn document(&self, path: &Path) -> Result<Option<StoredDocument>> {
        let Some(info) = self.document_info(&path.to_string_lossy())? else { return Ok(None) };
        let (text, passages) = (self.catalog.text(&info)?, self.catalog.passages(&info)?);
        Ok(Some(StoredDocument { info, text, passages }))
    }

    /// What the catalog keeps of a document, by a name of it.
    ///
    /// # Errors
    /// As [`document`](Self::document).
    pub fn document_info(&self, name: &str) -> Result<Option<DocumentInfo>> {
        let Some(id) = self.catalog.named(self.info.id, name)? else { return Ok(None) };
        // Of a document that was lost, the name is left; another one may have its id by now.
        let info = self.catalog.document(&id)?.filter(|info| info.names.iter().any(|known| known == name));
        Ok(Some(info.ok_or_else(|| DocumentsError::DamagedDocument {
            what: format!("document {name}"),
            problem: format!("the row of {id} is missing"),
        })?))
    }

    /// Passages that can be found.
    ///
    /// # Errors
    /// [`DocumentsError::Index`].
    pub fn indexed_passages(&self) -> Result<u64> {
        Ok(self.searcher().0.num_docs())
    }
}

fn bring_in(
    index: &RwLock<OpenIndex>,
    writer: &mut IndexWriter,
    catalog: &Catalog,
    entries: &[LogEntry],
    sequence: u64,
) -> Result<()> {
    let prepared = {
        let index = index.read().unwrap_or_else(PoisonError::into_inner);
        index.add(writer, catalog, entries)
    };
    let outcome = prepared.and_then(|()| {
        let mut index = index.write().unwrap_or_else(PoisonError::into_inner);
        index.commit(writer, sequence)
    });
    if outcome.is_err() {
        let _ = writer.rollback();
    }
    outcome
}

/// Changes the documents of a collection. Several may be at work at the same time.
pub struct CollectionWriter<'a> {
    collection: &'a Collection,
}

impl CollectionWriter<'_> {
    /// Makes changes, all or none. When this returns, they are on disk and can be found. Returns what `make` does, and
    /// the tokens of chunks that no document needs any more.
    ///
    /// Where the index cannot follow, as on a full disk, that is logged, and it is caught up later: what the catalog has is
    /// not lost.
    ///
    /// # Errors
    /// [`DocumentsError::CollectionRemoved`] where the collection was removed meanwhile, and as [`Catalog::change`].
    pub fn change<T>(
        &self,
        make: impl FnOnce(&mut Transaction<'_>, &CollectionInfo) -> Result<T>,
    ) -> Result<(T, Vec<Vec<u32>>)> {
        let collection = self.collection;
        let changed = collection.catalog.change(|transaction| {
            transaction.check_collection(&collection.info)?;
            make(transaction, &collection.info)
        })?;
        if let Err(problem) = self.catch_up() {
            tracing::warn!(%problem, "the search index is behind the documents: it is caught up with the next change");
        }
        Ok((changed.value, changed.orphans))
    }

    /// Brings what has changed in the catalog into the index.
    ///
    /// # Errors
    /// [`DocumentsError::Index`], [`DocumentsError::DataDir`].
    pub fn catch_up(&self) -> Result<()> {
        self.collection.catch_up()
    }

    /// Rewrites the index without what was removed, so that no file of it has a word of that any more.
    ///
    /// # Errors
    /// [`DocumentsError::Index`], [`DocumentsError::DataDir`].
    pub fn erase(&self) -> Result<()> {
        self.catch_up()?;
        let collection = self.collection;
        let mut writing = collection.writing();
        let index = collection.index.read().unwrap_or_else(PoisonError::into_inner);
        if writing.writer.is_none() {
            writing.writer = Some(index.writer()?);
        }
        let Some(mut writer) = writing.writer.take() else { return Ok(()) };
        guarded(&index.dir, || {
            let segments = index.index.searchable_segment_ids()?;
            if !segments.is_empty() {
                writer.merge(&segments).wait()?;
            }
            index.reader.reload()?;
            writer.garbage_collect_files().wait()?;
            writer.wait_merging_threads()
        })
    }
}

impl Drop for CollectionWriter<'_> {
    fn drop(&mut self) {
        let mut writing = self.collection.writing();
        writing.sessions -= 1;
        if writing.sessions == 0
            && let Some(writer) = writing.writer.take()
            && let Err(problem) = guarded(Path::new("index"), || writer.wait_merging_threads())
        {
            tracing::warn!(%problem, "the search index could not be tidied up");
        }
    }
}
