//! Reading, splitting and tokenising documents, by all cores: what needs neither the engine nor the store.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Service;
use documents::{Collection, Document, DocumentInfo, DocumentsError, NewDocument, NewPassage, read_document};
use settings::{QuireError, Result};

/// What became of a document before its chunks are stored.
pub(super) enum Prepared {
    /// It has no text, was found in a folder, and the collection does not have it.
    Empty,
    /// It cannot be read.
    Failed(DocumentsError),
    /// The collection has it exactly so, with these passages.
    Unchanged(Vec<NewPassage>),
    /// It is to be put into the collection.
    New(Box<NewDocument>),
}

/// What documents are prepared for.
pub(super) struct Preparation<'a> {
    pub(super) service: &'a Service,
    pub(super) collection: &'a Collection,
    /// Documents that were named themselves, sorted: these must have text.
    pub(super) named: &'a [PathBuf],
}

impl Preparation<'_> {
    /// Prepares documents; what comes back is in their order.
    pub(super) fn all(&self, paths: &[PathBuf]) -> Result<Vec<Prepared>> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from).min(paths.len()).max(1);
        // Each takes the next one, as one may be a thousand times longer than others.
        let next = AtomicUsize::new(0);
        let work = || {
            let take = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|at| *at < paths.len());
            std::iter::from_fn(take).map(|at| (at, self.one(&paths[at]))).collect::<Vec<_>>()
        };
        let mut found = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
            let joined = threads.into_iter().map(|thread| thread.join());
            joined.collect::<std::thread::Result<Vec<_>>>().map(|found| found.into_iter().flatten().collect::<Vec<_>>())
        })
        .map_err(|_| QuireError::Internal("reading a document panicked".into()))?;
        found.sort_unstable_by_key(|(at, _)| *at);
        found.into_iter().map(|(_, prepared)| prepared).collect()
    }

    fn one(&self, path: &Path) -> Result<Prepared> {
        let name = path.to_string_lossy();
        match read_document(path) {
            Ok(document) => self.document(&name, document),
            // One that had text keeps it in the collection, which must be told.
            Err(DocumentsError::EmptyDocument { .. })
                if self.named.binary_search_by(|named| named.as_path().cmp(path)).is_err()
                    && self.collection.document_info(&name)?.is_none() =>
            {
                Ok(Prepared::Empty)
            }
            Err(error) => Ok(Prepared::Failed(error)),
        }
    }

    /// A document that was read: what the collection has of its text is not made again.
    fn document(&self, name: &str, document: Document) -> Result<Prepared> {
        let fingerprint = self.service.split_fingerprint(document.format, self.service.limits);
        let tokenizer = Some(self.service.engine.tokenizer_fingerprint());
        let (mut instead_of, mut left_by) = (Vec::new(), Vec::new());
        let mut passages = None;
        if let Some(info) = self.same_text(&document)? {
            instead_of = info.names.iter().filter(|known| is_gone(known)).cloned().collect();
            if info.fingerprint == fingerprint && info.tokenizer == tokenizer {
                passages = self.passages(&info);
            }
            let is_known = || {
                let id = self.collection.catalog().has_name(self.collection.info().id, name);
                id.is_some_and(|id| id == info.id) && info.names.iter().any(|known| known == name)
            };
            if let Some(passages) = passages.take_if(|_| is_known()) {
                return Ok(Prepared::Unchanged(passages));
            }
            // The text stays with whoever still has it.
            let others = || info.names.iter().filter(|known| *known != name && !instead_of.contains(known));
            if others().all(|known| has_another_text(known, &document)) {
                left_by = others().cloned().collect();
            }
        }
        let passages = passages.map_or_else(|| self.service.passages_of(&document, self.service.limits), Ok)?;
        let Document { text, format, .. } = document;
        let (name, attributes) = (name.to_string(), None);
        let new = NewDocument { name, text, format, fingerprint, tokenizer, passages, attributes, instead_of, left_by };
        Ok(Prepared::New(Box::new(new)))
    }

    /// The document of the collection that has this text.
    fn same_text(&self, document: &Document) -> Result<Option<DocumentInfo>> {
        let (catalog, collection) = (self.collection.catalog(), self.collection.info().id);
        let content: documents::TextHash = blake3::hash(document.text.as_bytes()).into();
        let Some(id) = catalog.with_content(collection, document.format, &content)? else { return Ok(None) };
        match catalog.document(&id) {
            // It comes in again.
            Err(DocumentsError::DamagedDocument { .. }) => Ok(None),
            // The row that names it may be that of a document which was lost.
            outcome => Ok(outcome?.filter(|info| info.content == content)),
        }
    }

    /// The passages of a document that the catalog has whole; `None` where anything of it is damaged.
    fn passages(&self, info: &DocumentInfo) -> Option<Vec<NewPassage>> {
        let catalog = self.collection.catalog();
        let passages = catalog.text(info).and_then(|_| catalog.passages(info)).ok()?;
        let again = |passage: documents::Passage| NewPassage {
            place: passage.place,
            page: passage.page,
            tokens: passage.tokens,
        };
        Some(passages.into_iter().map(again).collect())
    }
}

/// Whether a document's name is the path of a file that is no longer there.
pub(super) fn is_gone(name: &str) -> bool {
    let path = Path::new(name);
    let missing = || path.symlink_metadata().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
    path.is_absolute() && missing()
}

/// Whether a document's name is the path of a file that is there with another text than this.
fn has_another_text(name: &str, document: &Document) -> bool {
    let path = Path::new(name);
    path.is_absolute() && read_document(path).is_ok_and(|found| found.text != document.text)
}
