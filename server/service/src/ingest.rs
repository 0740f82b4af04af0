//! Documents into a collection and their chunks into the store.
//!
//! Documents are read, split and tokenised a group at a time by all cores (`prepare`), their chunks are computed in order and
//! written behind (`chunks`), and they come into the catalog in batches. The order is what makes a crash harmless: a document is
//! committed only when every chunk of it is on disk, and reported only when it is committed. A crash in between leaves chunks
//! that a second run finds again.

mod chunks;
mod prepare;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use chunk_cache::ChunkKey;
use engine::EngineError;
use serde::{Deserialize, Serialize};

use super::Service;
use crate::store::Origin;
use chunks::WrittenChunk;
use documents::{
    ChunkSpan, Collection, CollectionWriter, Document, DocumentsError, Format, LanguageSetting, Limits, NewDocument,
    NewPassage, PutKind, Skipped, Span, discover, split,
};
use prepare::{Preparation, Prepared};
use settings::{QuireError, Result, Settings};

/// How a document stood to the collection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DocumentState {
    /// The collection did not have it.
    New,
    /// The collection had another text of it, or other chunks; it has been replaced.
    Changed,
    /// The collection had it exactly so.
    Unchanged,
    /// The collection had its text under a name that is gone.
    Renamed,
    /// The collection has its text under another name too: one document with both names.
    Copy,
}

impl From<PutKind> for DocumentState {
    fn from(kind: PutKind) -> DocumentState {
        match kind {
            PutKind::New => DocumentState::New,
            PutKind::Changed => DocumentState::Changed,
            PutKind::Unchanged => DocumentState::Unchanged,
            PutKind::Renamed => DocumentState::Renamed,
            PutKind::AnotherName => DocumentState::Copy,
        }
    }
}

/// How documents are ingested.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IngestOptions {
    /// Leave the state of chunks to their first use: documents can be found at once, and the first answer from one takes
    /// longer.
    pub lazy: bool,
    /// Remove documents of the collection whose files were below the given paths and are gone.
    pub sync: bool,
    /// Which endings of words the collection knows from now on; `None` leaves what it is.
    pub language: Option<LanguageSetting>,
}

impl IngestOptions {
    /// The options that the settings state: they never remove documents.
    ///
    /// # Errors
    /// [`DocumentsError::UnknownLanguage`](documents::DocumentsError::UnknownLanguage).
    pub fn from_settings(settings: &Settings) -> Result<IngestOptions> {
        let language = settings.language.as_deref().map(documents::parse_language).transpose()?;
        Ok(IngestOptions { lazy: settings.lazy, sync: false, language })
    }
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
    /// A document's file is gone, and so is its name from the collection.
    Removed {
        /// The document.
        path: &'a Path,
    },
    /// A path that was to be synced is not there, and so may be a disk that is missing: nothing below it was removed.
    Kept {
        /// The path.
        path: &'a Path,
        /// Documents of the collection whose files were there or below.
        documents: usize,
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
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct IngestReport {
    /// The collection.
    pub collection: String,
    /// Documents that the collection did not have.
    pub new: usize,
    /// Documents that were replaced.
    pub changed: usize,
    /// Documents that were there already.
    pub unchanged: usize,
    /// Documents that were there under names that are gone.
    pub renamed: usize,
    /// Documents that are there under other names too.
    pub copies: usize,
    /// Documents that were removed, as their files are gone.
    pub removed: usize,
    /// Documents that could not be ingested, and folders that could not be read.
    pub failed: usize,
    /// What folders hold beside documents with text.
    pub skipped: Skipped,
    /// Chunks that were in the store already.
    pub chunks_cached: usize,
    /// Chunks that were computed and stored.
    pub chunks_computed: usize,
    /// Chunks that are left to their first use.
    pub chunks_left: usize,
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
            failed => Err(QuireError::DocumentsFailed { failed, total: self.considered() }),
        }
    }

    /// Documents that were dealt with: those that are in the collection now, those without text, and what failed. Progress
    /// counts up to this.
    #[must_use]
    pub fn considered(&self) -> usize {
        self.documents() + self.failed + self.skipped.empty
    }

    /// Documents that are in the collection now.
    #[must_use]
    pub fn documents(&self) -> usize {
        self.new + self.changed + self.unchanged + self.renamed + self.copies
    }

    fn count(&mut self, state: DocumentState) {
        *match state {
            DocumentState::New => &mut self.new,
            DocumentState::Changed => &mut self.changed,
            DocumentState::Unchanged => &mut self.unchanged,
            DocumentState::Renamed => &mut self.renamed,
            DocumentState::Copy => &mut self.copies,
        } += 1;
    }
}

/// Documents that are prepared at a time: they are held in memory.
const GROUP: usize = 128;
/// Documents that are committed together at most.
const BATCH: usize = 1000;
/// Bytes of texts that are committed together, about.
const BATCH_BYTES: usize = 16 << 20;
/// How long a document waits for others to be committed with it, about.
const BATCH_TIME: Duration = Duration::from_secs(2);

impl Service {
    /// Ingests the documents at `paths` as the settings say. What cannot be read is reported and left out; see
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
        self.ingest_while(collection, paths, &IngestOptions::default(), &|| true, on_event)
    }

    /// As [`ingest`](Self::ingest), with options; given up behind the chunk at hand once nobody waits any more, as `wanted` says.
    /// What was reported until then is kept; a second run goes on from there.
    ///
    /// # Errors
    /// As [`ingest`](Self::ingest), and [`EngineError::Cancelled`].
    pub fn ingest_while(
        &self,
        collection: &str,
        paths: &[PathBuf],
        options: &IngestOptions,
        wanted: &dyn Fn() -> bool,
        on_event: &mut dyn FnMut(&IngestEvent<'_>),
    ) -> Result<IngestReport> {
        let started = Instant::now();
        let mut found = discover(paths);
        if let ([], 1, false) = (&found.documents[..], found.problems.len(), options.sync)
            && let Some((_, error)) = found.problems.pop()
        {
            return Err(error.into());
        }
        let name = collection;
        let collection = self.library.collection_or_new_in(name, options.language.clone())?;
        let evicted = self.store.evicted();
        let mut run = Run {
            service: self,
            writer: collection.writer()?,
            lazy: options.lazy || !self.keeps_chunks(),
            total: 0,
            waiting: Vec::new(),
            chunks: VecDeque::new(),
            bytes: 0,
            since: Instant::now(),
            wanted,
            report: IngestReport { collection: name.into(), skipped: found.skipped, ..IngestReport::default() },
            on_event,
        };
        // A folder in which nothing is left is what some come for.
        let emptied = |error: &DocumentsError| options.sync && matches!(error, DocumentsError::NoDocuments { .. });
        for (path, error) in found.problems.iter().filter(|(_, error)| !emptied(error)) {
            run.failed(path, error);
        }
        run.total = found.documents.len() + run.report.failed;
        let preparation = Preparation { service: self, collection: &collection, named: &found.named };
        for group in found.documents.chunks(GROUP) {
            for (path, prepared) in group.iter().zip(preparation.all(group)?) {
                run.take(path, prepared)?;
            }
        }
        run.commit()?;
        if options.sync {
            run.remove_gone(&collection, paths)?;
        }
        let mut report = run.report;
        report.chunks_evicted = self.store.evicted() - evicted;
        report.seconds = started.elapsed().as_secs_f64();
        Ok(report)
    }

    /// Whether the state of chunks can be kept; documents come in all the same where it cannot, and that is said.
    fn keeps_chunks(&self) -> bool {
        let keeps = self.store.mend();
        if !keeps {
            tracing::warn!(
                "documents are kept; the state of their chunks is left to its first use, as there is no chunk store that can be \
                 written: `quire doctor` says why"
            );
        }
        keeps
    }

    /// Identifies everything that decides how a text of this format is split.
    pub(super) fn split_fingerprint(&self, format: Format, limits: Limits) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("quire split 2");
        hasher.update(&self.engine.tokenizer_fingerprint());
        for number in [limits.tokens, limits.overlap, usize::from(format == Format::Markdown)] {
            hasher.update(&(number as u64).to_le_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The passages of a document, split and tokenised.
    pub(super) fn passages_of(&self, document: &Document, limits: Limits) -> Result<Vec<NewPassage>> {
        let tokenizer = self.engine.tokenizer();
        let places = split(&document.text, document.format, limits, &|text| {
            tokenizer.encode_plain(text).map(|tokens| tokens.len())
        })?;
        let passage = |place: ChunkSpan| {
            let tokens = tokenizer.encode_plain(&document.text[place.bytes.clone()])?;
            Ok(NewPassage { place, page: None, tokens })
        };
        places.into_iter().map(passage).collect()
    }
}

impl Service {
    /// Cuts and tokenises documents again, as ingest does, whose passages were lost to damage and cut without a tokenizer by a
    /// repair; says how many there were.
    ///
    /// # Errors
    /// A failing catalog, those of a failed write.
    pub fn cut_again(&self) -> Result<usize> {
        let Some(catalog) = self.library.catalog()? else { return Ok(0) };
        let mut count = 0;
        for info in catalog.collections()? {
            let (documents, _) = catalog.listing(info.id)?;
            let collection = self.library.collection(&info.name)?;
            for known in documents.into_iter().filter(|known| known.fingerprint.is_empty()) {
                let Some(name) = known.names.first().cloned() else { continue };
                let text = catalog.text(&known)?;
                let limits = self.limits_of_name(&info, &name)?;
                let document = Document { path: PathBuf::from(&name), text, format: known.format };
                let passages = self.passages_of(&document, limits)?;
                let fingerprint = self.split_fingerprint(document.format, limits);
                let tokenizer = Some(self.engine.tokenizer_fingerprint());
                let Document { text, format, .. } = document;
                let (attributes, instead_of, left_by) = (None, Vec::new(), Vec::new());
                let new = NewDocument {
                    name,
                    text,
                    format,
                    fingerprint,
                    tokenizer,
                    passages,
                    attributes,
                    instead_of,
                    left_by,
                };
                collection.writer()?.change(|transaction, info| transaction.put(info, &new).map(|_| ()))?;
                count += 1;
            }
        }
        Ok(count)
    }
}

/// An ingest while it goes on.
struct Run<'a> {
    service: &'a Service,
    writer: CollectionWriter<'a>,
    lazy: bool,
    /// Documents in all, and folders that could not be read.
    total: usize,
    /// Documents that are not committed.
    waiting: Vec<Waiting<'a>>,
    /// Chunks of these that are not known to be on disk, in order.
    chunks: VecDeque<WrittenChunk>,
    /// Bytes of their texts.
    bytes: usize,
    /// Since when the first of them waits.
    since: Instant,
    wanted: &'a dyn Fn() -> bool,
    report: IngestReport,
    on_event: &'a mut dyn FnMut(&IngestEvent<'_>),
}

/// A document that waits to be committed.
struct Waiting<'a> {
    path: &'a Path,
    /// `None` if the collection has it exactly so.
    document: Option<NewDocument>,
    chunks: usize,
    computed: usize,
}

impl<'a> Run<'a> {
    fn failed(&mut self, path: &Path, error: &DocumentsError) {
        self.report.failed += 1;
        (self.on_event)(&IngestEvent::Failed { path, error });
    }

    fn check_wanted(&self) -> Result<()> {
        if (self.wanted)() { Ok(()) } else { Err(EngineError::Cancelled.into()) }
    }

    fn take(&mut self, path: &'a Path, prepared: Prepared) -> Result<()> {
        self.check_wanted()?;
        let (document, passages) = match prepared {
            Prepared::Empty => {
                self.report.skipped.empty += 1;
                return Ok(());
            }
            Prepared::Failed(error) => {
                self.failed(path, &error);
                return Ok(());
            }
            Prepared::Unchanged(passages) => (None, passages),
            Prepared::New(mut document) => {
                let passages = std::mem::take(&mut document.passages);
                (Some(document), passages)
            }
        };
        if self.waiting.is_empty() {
            self.since = Instant::now();
        }
        let chunks = passages.len();
        self.waiting.push(Waiting { path, document: None, chunks, computed: 0 });
        self.compute(&passages)?;
        let document = document.map(|document| NewDocument { passages, ..*document });
        self.bytes += document.as_ref().map_or(0, |document| document.text.len());
        if let Some(last) = self.waiting.last_mut() {
            last.document = document;
        }
        let full = self.waiting.len() >= BATCH || self.bytes >= BATCH_BYTES || self.since.elapsed() >= BATCH_TIME;
        if full { self.commit() } else { Ok(()) }
    }

    /// Commits all documents that wait, and reports them.
    fn commit(&mut self) -> Result<()> {
        self.settle_all()?;
        let waiting = std::mem::take(&mut self.waiting);
        self.bytes = 0;
        let new: Vec<&NewDocument> = waiting.iter().filter_map(|waiting| waiting.document.as_ref()).collect();
        let mut states = Vec::new();
        if !new.is_empty() {
            states = self.put(&new)?;
            self.service.let_chunks_go();
        }
        let mut states = states.into_iter();
        for Waiting { path, document, chunks, computed } in waiting {
            let state = match document.and_then(|_| states.next()) {
                Some(Err(error)) => {
                    self.failed(path, &error);
                    continue;
                }
                Some(Ok(state)) => state,
                None => DocumentState::Unchanged,
            };
            self.report.count(state);
            // A folder that could be found and not be read counts as one, too.
            let (done, total) = (self.report.considered(), self.total);
            (self.on_event)(&IngestEvent::Document { path, state, chunks, computed, done, total });
        }
        Ok(())
    }

    /// Puts documents into the collection, all together; each by itself where one of them meets damage.
    fn put(&self, new: &[&NewDocument]) -> Result<Vec<documents::Result<DocumentState>>> {
        let put = |some: &[&NewDocument]| -> documents::Result<Vec<DocumentState>> {
            let (states, _) = self.writer.change(|transaction, collection| {
                some.iter().map(|document| Ok(transaction.put(collection, document)?.kind.into())).collect()
            })?;
            Ok(states)
        };
        match put(new) {
            Err(DocumentsError::DamagedDocument { .. }) if new.len() > 1 => {
                let mut states = Vec::new();
                for document in new {
                    match put(&[document]) {
                        Ok(state) => states.extend(state.into_iter().map(Ok)),
                        Err(error @ DocumentsError::DamagedDocument { .. }) => states.push(Err(error)),
                        Err(error) => return Err(error.into()),
                    }
                }
                Ok(states)
            }
            Err(error @ DocumentsError::DamagedDocument { .. }) => Ok(vec![Err(error)]),
            outcome => Ok(outcome?.into_iter().map(Ok).collect()),
        }
    }

    /// Removes documents whose files were below `paths` and are gone. A path that is itself gone removes nothing: it may
    /// be a disk that is not there.
    fn remove_gone(&mut self, collection: &Collection, paths: &[PathBuf]) -> Result<()> {
        let (mut roots, mut missing) = (Vec::new(), Vec::new());
        for path in paths {
            match path.canonicalize() {
                Ok(root) => roots.push(root),
                Err(_) => missing.push(path),
            }
        }
        let names = collection.catalog().names(collection.info().id, None, usize::MAX)?;
        for path in missing {
            let documents = names.iter().filter(|(name, _)| Path::new(name).starts_with(path)).count();
            if documents > 0 {
                (self.on_event)(&IngestEvent::Kept { path, documents });
            }
        }
        let below = |name: &str| roots.iter().any(|root| Path::new(name).starts_with(root));
        let gone: Vec<String> =
            names.into_iter().map(|(name, _)| name).filter(|name| below(name) && prepare::is_gone(name)).collect();
        for some in gone.chunks(BATCH) {
            let ((), _) = self.writer.change(|transaction, collection| {
                some.iter().try_for_each(|name| transaction.remove_name(collection, name).map(|_| ()))
            })?;
            self.service.let_chunks_go();
            self.report.removed += some.len();
            for name in some {
                (self.on_event)(&IngestEvent::Removed { path: Path::new(name) });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "ingest/tests.rs"]
mod tests;
