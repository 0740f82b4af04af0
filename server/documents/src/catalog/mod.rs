//! The catalog: the source of truth for collections, documents, their texts and passages, and for files and jobs.
//!
//! One RocksDB of its own, apart from the chunk store: a cache may be damaged, thrown away or short of room, and no document
//! is touched by that. Rows are small and sealed (`rows`), texts lie in pieces (`texts`), and whatever belongs together is
//! written in one synced batch (`transaction`). Every change of a document is logged with a sequence number, by which the
//! full-text index, which is derived from all this, knows what it lacks.
//!
//! Chunks and texts are not counted but referred to, by rows that are there or not: a batch that is written twice, or a
//! damaged row, cannot make a count wrong.

mod batch;
mod error;
mod id;
mod keys;
mod manage;
mod records;
mod rows;
mod store;
#[cfg(test)]
mod tests;
mod texts;
mod totals;
mod transaction;

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use batch::read;
use error::CatalogError;
use rows::{DamagedRow, from_json};
use store::Store;

pub use id::{DocumentId, ParseDocumentIdError};
pub use manage::Reclaimed;
pub use records::{JobError, JobRecord, RecordKind};
pub(crate) use rows::LogEntry;
pub use rows::{Attributes, CollectionInfo, DocumentInfo, LanguageSetting, Passage, ReleasedChunk, TextHash};
pub use store::Access;
pub(crate) use store::{Family, is_in_use};

pub use totals::Totals;
use totals::{AllTotals, TotalsChange};
pub use transaction::{NewDocument, NewPassage, PutKind, PutOutcome, Restored, Transaction};

use crate::error::{DocumentsError, Result};
use crate::split::Format;

/// Version of the layout of families and keys.
const FORMAT: u32 = 1;
const FORMAT_ROW: &[u8] = b"format";
const NEXT_SEQUENCE: &[u8] = b"next-sequence";
const NEXT_COLLECTION: &[u8] = b"next-collection";
const IMPORTED: &[u8] = b"imported";

/// An open catalog.
pub struct Catalog {
    store: Store,
    /// Whoever changes something holds it.
    writing: Mutex<Writing>,
}

/// What changes with every change.
struct Writing {
    /// The next sequence number.
    sequence: u64,
    /// What collections hold; `None` where nobody has asked, or it is not known for sure.
    totals: Option<AllTotals>,
}

/// What a change has done beside what it was made for.
#[derive(Debug)]
pub struct Changed<T> {
    /// What the change has returned.
    pub value: T,
    /// Tokens of chunks that no document needs any more.
    pub orphans: Vec<Vec<u32>>,
}

impl Catalog {
    /// Whether there is a catalog in `path`. One whose making was cut off, in which nothing can have been acknowledged, is
    /// none; whoever may write it makes it whole.
    #[must_use]
    pub fn exists(path: &Path) -> bool {
        path.join("CURRENT").is_file() && !store::is_half_made(path, FORMAT_ROW)
    }

    /// Opens the catalog in folder `path`, making an empty one where it may be written.
    ///
    /// # Errors
    /// [`DocumentsError::CatalogInUse`], [`DocumentsError::NewerDataDir`], [`DocumentsError::DataDir`],
    /// [`DocumentsError::Catalog`].
    pub fn open(path: &Path, access: Access) -> Result<Catalog> {
        Catalog::with_store(Store::open(path, access)?)
    }

    /// An empty catalog in memory.
    ///
    /// # Errors
    /// [`DocumentsError::Catalog`].
    pub fn in_memory() -> Result<Catalog> {
        Catalog::with_store(Store::in_memory()?)
    }

    fn with_store(store: Store) -> Result<Catalog> {
        let number = |key| -> Result<Option<u64>, CatalogError> {
            let Some(content) = read(&store, Family::Meta, key)? else { return Ok(None) };
            let bytes = content.try_into().map_err(|_| DamagedRow("a number is not as expected".into()))?;
            Ok(Some(u64::from_be_bytes(bytes)))
        };
        match number(FORMAT_ROW)? {
            Some(found) if found > u64::from(FORMAT) => {
                let (path, found) = (store.path().into(), u32::try_from(found).unwrap_or(u32::MAX));
                return Err(DocumentsError::NewerDataDir { path, found, supported: FORMAT });
            }
            None if store.access() == Access::Write => {
                let mut fresh = batch::Batch::new(&store);
                fresh.put(Family::Meta, FORMAT_ROW.to_vec(), u64::from(FORMAT).to_be_bytes().to_vec());
                fresh.commit()?;
            }
            _ => {}
        }
        let next = number(NEXT_SEQUENCE)?.unwrap_or(1);
        Ok(Catalog { store, writing: Mutex::new(Writing { sequence: next, totals: None }) })
    }

    /// What may be done with it.
    #[must_use]
    pub fn access(&self) -> Access {
        self.store.access()
    }

    /// Makes changes: all that `make` asks for, or none where it or the disk fails. When this returns, they are on disk.
    ///
    /// # Errors
    /// What `make` returns, [`DocumentsError::DataDir`] where nothing can be written, [`DocumentsError::Catalog`].
    pub fn change<T>(&self, make: impl FnOnce(&mut Transaction<'_>) -> Result<T>) -> Result<Changed<T>> {
        if self.access() == Access::Read {
            return Err(DocumentsError::writing(self.store.path(), std::io::ErrorKind::ReadOnlyFilesystem.into()));
        }
        let mut writing = self.writing();
        let mut transaction = Transaction::new(&self.store);
        let value = make(&mut transaction)?;
        // Where writing fails, the change may be there all the same: then they are summed up anew.
        let totals = writing.totals.take();
        let change = totals.as_ref().map(|_| TotalsChange::of(transaction.batch())).transpose()?;
        let orphans = transaction.commit(&mut writing.sequence)?;
        writing.totals = totals.zip(change).map(|(mut totals, change)| {
            change.apply(&mut totals);
            totals
        });
        Ok(Changed { value, orphans })
    }

    fn writing(&self) -> MutexGuard<'_, Writing> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last sequence number that was given to a change.
    pub(crate) fn sequence(&self) -> u64 {
        self.writing().sequence - 1
    }

    /// Which documents of a collection have changed since `after`, with the numbers of the changes.
    pub(crate) fn changes(&self, collection: u32, after: u64) -> Result<Vec<(u64, LogEntry)>> {
        let prefix = collection.to_be_bytes();
        let mut entries = Vec::new();
        for row in self.store.scan(Family::Log, &prefix, &keys::log(collection, after.saturating_add(1))) {
            let (key, row) = row?;
            let entry = rows::unseal(Family::Log, &key, &row).and_then(from_json);
            let sequence = key[4..].try_into().map(u64::from_be_bytes);
            let sequence = sequence.map_err(|_| DamagedRow("a key of the log is not as expected".into()));
            entries.push((sequence.map_err(CatalogError::from)?, entry.map_err(CatalogError::from)?));
        }
        Ok(entries)
    }

    /// Forgets changes up to `through`, which the index has.
    pub(crate) fn trim_log(&self, collection: u32, through: u64) -> Result<()> {
        let prefix = collection.to_be_bytes();
        let mut old = Vec::new();
        for row in self.store.scan(Family::Log, &prefix, &prefix) {
            let (key, _) = row?;
            if key > keys::log(collection, through) {
                break;
            }
            old.push(((Family::Log, key), None));
        }
        // They are only superfluous: the next synced batch has this on disk too.
        Ok(self.store.write(old, false)?)
    }

    /// A document by its id, also one that was removed and can be restored.
    ///
    /// # Errors
    /// [`DocumentsError::DamagedDocument`], [`DocumentsError::Catalog`].
    pub fn document(&self, id: &DocumentId) -> Result<Option<DocumentInfo>> {
        let found = || {
            let content = read(&self.store, Family::Documents, id.bytes())?;
            Ok(content.map(|content| from_json(&content)).transpose()?)
        };
        found().map_err(|error: CatalogError| error.of(|| format!("document {id}")))
    }

    /// The id of the document of a collection that has this name.
    ///
    /// # Errors
    /// As [`document`](Self::document).
    pub fn named(&self, collection: u32, name: &str) -> Result<Option<DocumentId>> {
        self.id_at(Family::Names, &keys::name(collection, false, name)).map_err(|e| e.of(|| format!("document {name}")))
    }

    /// The id of the document of a collection that has this text.
    ///
    /// # Errors
    /// As [`document`](Self::document).
    pub fn with_content(&self, collection: u32, format: Format, content: &TextHash) -> Result<Option<DocumentId>> {
        Ok(self.id_at(Family::Contents, &keys::content(collection, format, content))?)
    }

    fn id_at(&self, family: Family, key: &[u8]) -> Result<Option<DocumentId>, CatalogError> {
        let Some(content) = read(&self.store, family, key)? else { return Ok(None) };
        let id =
            DocumentId::from_bytes(&content).ok_or_else(|| DamagedRow("a document's id is not as expected".into()));
        Ok(Some(id?))
    }

    /// Names of a collection's documents behind `after`, in order, each with its document's id; `limit` at most.
    ///
    /// # Errors
    /// As [`document`](Self::document).
    pub fn names(&self, collection: u32, after: Option<&str>, limit: usize) -> Result<Vec<(String, DocumentId)>> {
        let prefix = keys::name(collection, false, "");
        // No name ends with a NUL, and none has one: this is the first key behind.
        let from = after.map_or(prefix.clone(), |after| keys::name(collection, false, &format!("{after}\0")));
        let rows = self.store.scan(Family::Names, &prefix, &from).take(limit);
        let name = |row: Result<(Vec<u8>, Vec<u8>), CatalogError>| {
            let (key, row) = row?;
            let damaged = || DamagedRow("a name is not as expected".into());
            let name = String::from_utf8(key[prefix.len()..].to_vec()).map_err(|_| damaged())?;
            let id = DocumentId::from_bytes(rows::unseal(Family::Names, &key, &row)?).ok_or_else(damaged)?;
            Ok((name, id))
        };
        Ok(rows.map(name).collect::<Result<_, CatalogError>>()?)
    }

    /// Names of a collection's documents that lie below a folder, in order: those that are there, or those that were removed and
    /// can be restored.
    ///
    /// # Errors
    /// [`DocumentsError::Catalog`].
    pub fn names_below(&self, collection: u32, folder: &str, removed: bool) -> Result<Vec<String>> {
        let all = keys::name(collection, removed, "");
        let below = keys::name(collection, removed, &format!("{}/", folder.trim_end_matches('/')));
        let name = |row: Result<(Vec<u8>, Vec<u8>), CatalogError>| {
            let (key, _) = row?;
            let name = String::from_utf8(key[all.len()..].to_vec());
            Ok(name.map_err(|_| DamagedRow("a name is not as expected".into()))?)
        };
        let rows = self.store.scan(Family::Names, &below, &below);
        Ok(rows.map(name).collect::<Result<_, CatalogError>>()?)
    }

    /// The whole text of a document, compared with its hash.
    ///
    /// # Errors
    /// [`DocumentsError::DamagedDocument`], [`DocumentsError::Catalog`].
    pub fn text(&self, info: &DocumentInfo) -> Result<String> {
        texts::whole(&self.store, &info.content).map_err(|error| error.of(|| label(info)))
    }

    /// A passage of a document; `None` where it has none of this number.
    ///
    /// # Errors
    /// As [`text`](Self::text).
    pub fn passage(&self, id: &DocumentId, number: u32) -> Result<Option<Passage>> {
        let found = || {
            let content = read(&self.store, Family::Passages, &keys::passage(id, number))?;
            Ok(content.map(|content| Passage::decode(&content)).transpose()?)
        };
        found().map_err(|error: CatalogError| error.of(|| format!("document {id}")))
    }

    /// All passages of a document, in order.
    ///
    /// # Errors
    /// As [`text`](Self::text).
    pub fn passages(&self, info: &DocumentInfo) -> Result<Vec<Passage>> {
        let mut passages = Vec::with_capacity(info.passages as usize);
        let rows = self.store.scan(Family::Passages, info.id.bytes(), info.id.bytes());
        let read = || {
            for row in rows {
                let (key, row) = row?;
                passages.push(Passage::decode(rows::unseal(Family::Passages, &key, &row)?)?);
            }
            match passages.len() == info.passages as usize {
                true => Ok(()),
                false => Err(DamagedRow(format!("expected {} passages, found {}", info.passages, passages.len()))),
            }
            .map_err(CatalogError::from)
        };
        read().map_err(|error: CatalogError| error.of(|| label(info)))?;
        Ok(passages)
    }

    /// The text of a passage, compared with its hash.
    ///
    /// # Errors
    /// As [`text`](Self::text).
    pub fn passage_text(&self, info: &DocumentInfo, passage: &Passage) -> Result<String> {
        texts::part(&self.store, &info.content, &passage.place.bytes, &passage.hash)
            .map_err(|error| error.of(|| label(info)))
    }
}

/// What people know a document by.
fn label(info: &DocumentInfo) -> String {
    format!("document {}", info.names.first().map_or_else(|| info.id.to_string(), Clone::clone))
}
