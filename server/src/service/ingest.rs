//! Documents into a collection and their chunks into the store.
//!
//! The order is what makes a crash harmless: a document is committed to the index only when every chunk of it is on
//! disk, and reported only when it is committed. A crash in between leaves chunks that a second run finds again.

use std::path::{Path, PathBuf};
use std::time::Instant;

use chunk_cache::ChunkKey;
use serde::Serialize;

use super::Service;
use crate::error::{QuireError, Result};
use crate::store::Origin;
use documents::{
    Collection, CollectionWriter, Document, DocumentsError, Format, Skipped, Span, discover, read_document, split,
};

/// How a document stood to the collection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DocumentState {
    /// The collection did not have it.
    New,
    /// The collection had another text of it, or other chunks; it has been replaced.
    Changed,
    /// The collection had it exactly so.
    Unchanged,
}

/// What happened to one thing during an ingest.
#[derive(Debug)]
pub enum IngestEvent<'a> {
    /// A chunk is on disk.
    Chunk {
        /// Its name in the store.
        key: ChunkKey,
        /// Its document.
        path: &'a Path,
        /// Where in the document.
        span: Span,
        /// Its tokens.
        tokens: usize,
        /// Whether it had to be computed.
        origin: Origin,
        /// Chunks of its document that are on disk by now.
        done: usize,
        /// Chunks of its document.
        total: usize,
    },
    /// A document and all of its chunks are on disk and can be found.
    Document {
        /// The document.
        path: &'a Path,
        /// Whether anything had to be done.
        state: DocumentState,
        /// Its chunks.
        chunks: usize,
        /// How many of them had to be computed.
        computed: usize,
        /// Documents dealt with so far.
        done: usize,
        /// Documents in all.
        total: usize,
    },
    /// A document could not be ingested, or a folder could not be read. The collection keeps what it had of it.
    Failed {
        /// The document or folder.
        path: &'a Path,
        /// Why.
        error: &'a DocumentsError,
    },
}

/// What an ingest did.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct IngestReport {
    /// The collection.
    pub collection: String,
    /// Documents that the collection did not have.
    pub new: usize,
    /// Documents that were replaced.
    pub changed: usize,
    /// Documents that were there already.
    pub unchanged: usize,
    /// Documents that could not be ingested, and folders that could not be read.
    pub failed: usize,
    /// What folders hold beside documents with text.
    pub skipped: Skipped,
    /// Chunks that were in the store already.
    pub chunks_cached: usize,
    /// Chunks that were computed and stored.
    pub chunks_computed: usize,
    /// Chunks that had to leave the store meanwhile, for its byte budget.
    pub chunks_evicted: u64,
    /// Tokens of all chunks.
    pub tokens: usize,
    /// Duration.
    pub seconds: f64,
}

impl IngestReport {
    /// An error if any document failed.
    ///
    /// # Errors
    /// [`QuireError::DocumentsFailed`].
    pub fn check(&self) -> Result<()> {
        match self.failed {
            0 => Ok(()),
            failed => {
                Err(QuireError::DocumentsFailed { failed, total: failed + self.new + self.changed + self.unchanged })
            }
        }
    }
}

impl Service {
    /// Ingests the documents at `paths`. What cannot be read is reported and left out; see
    /// [`IngestReport::check`].
    ///
    /// # Errors
    /// What keeps all documents from being ingested: nothing but one wrong path, a data folder that cannot be written, a
    /// failing engine or store.
    pub fn ingest(
        &self,
        collection: &str,
        paths: &[PathBuf],
        on_event: &mut dyn FnMut(&IngestEvent<'_>),
    ) -> Result<IngestReport> {
        let started = Instant::now();
        let mut found = discover(paths);
        if let ([], 1) = (&found.documents[..], found.problems.len())
            && let Some((_, error)) = found.problems.pop()
        {
            return Err(error.into());
        }
        let documents = found.documents;
        let collection_name = collection;
        let collection = self.library().collection_or_new(collection_name)?;
        let mut writer = collection.writer()?;
        let evicted = self.store.evicted()?;
        let mut report =
            IngestReport { collection: collection_name.into(), skipped: found.skipped, ..IngestReport::default() };
        for (path, error) in &found.problems {
            report.failed += 1;
            on_event(&IngestEvent::Failed { path, error });
        }
        for (index, path) in documents.iter().enumerate() {
            let progress = (index + 1, documents.len());
            let document = match read_document(path) {
                Ok(document) => document,
                // One that had text keeps it in the collection, which must be told.
                Err(DocumentsError::EmptyDocument { .. })
                    if found.named.binary_search(path).is_err() && collection.document(path)?.is_none() =>
                {
                    report.skipped.empty += 1;
                    continue;
                }
                Err(error) => {
                    report.failed += 1;
                    on_event(&IngestEvent::Failed { path, error: &error });
                    continue;
                }
            };
            self.ingest_one(&collection, &mut writer, &document, progress, &mut report, on_event)?;
        }
        writer.finish()?;
        report.chunks_evicted = self.store.evicted()? - evicted;
        report.seconds = started.elapsed().as_secs_f64();
        Ok(report)
    }

    fn ingest_one(
        &self,
        collection: &Collection,
        writer: &mut CollectionWriter<'_>,
        document: &Document,
        (done, total): (usize, usize),
        report: &mut IngestReport,
        on_event: &mut dyn FnMut(&IngestEvent<'_>),
    ) -> Result<()> {
        let fingerprint = self.fingerprint(document);
        let stored = collection.document(&document.path)?;
        let state = match &stored {
            None => DocumentState::New,
            Some(stored) if stored.fingerprint != fingerprint => DocumentState::Changed,
            Some(_) => DocumentState::Unchanged,
        };
        let spans = match stored.filter(|_| state == DocumentState::Unchanged) {
            Some(stored) => stored.chunks,
            None => split(&document.text, document.format, self.limits, &|text| {
                self.engine.tokenizer().encode_plain(text).map(|tokens| tokens.len())
            })?,
        };
        let mut computed = 0;
        for (index, span) in spans.iter().enumerate() {
            let tokens = self.chunk_tokens(&document.text[span.bytes.clone()])?;
            let (key, origin) = self.store.ensure(&self.chunk_prefix, &tokens)?;
            self.metrics.chunk(origin == Origin::Cached);
            computed += usize::from(origin == Origin::Computed);
            report.tokens += tokens.len();
            on_event(&IngestEvent::Chunk {
                key,
                path: &document.path,
                span: span.chars,
                tokens: tokens.len(),
                origin,
                done: index + 1,
                total: spans.len(),
            });
        }
        if state != DocumentState::Unchanged {
            writer.replace(document, &fingerprint, &spans)?;
        }
        match state {
            DocumentState::New => report.new += 1,
            DocumentState::Changed => report.changed += 1,
            DocumentState::Unchanged => report.unchanged += 1,
        }
        report.chunks_computed += computed;
        report.chunks_cached += spans.len() - computed;
        let path = &document.path;
        on_event(&IngestEvent::Document { path, state, chunks: spans.len(), computed, done, total });
        Ok(())
    }

    /// Identifies a text and everything that decides how it is split.
    fn fingerprint(&self, document: &Document) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("quire document 1");
        hasher.update(&self.engine.tokenizer_fingerprint());
        for number in [self.limits.tokens, self.limits.overlap, usize::from(document.format == Format::Markdown)] {
            hasher.update(&(number as u64).to_le_bytes());
        }
        hasher.update(document.text.as_bytes());
        hasher.finalize().to_hex().to_string()
    }
}

#[cfg(test)]
#[path = "ingest/tests.rs"]
mod tests;
