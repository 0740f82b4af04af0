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
mod compared;
mod error;
mod id;
mod keys;
mod listing;
mod manage;
mod records;
mod repair;
mod rows;
mod scan;
mod store;
mod survey;
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

pub(crate) use compared::IndexedPassages;
pub use id::{DocumentId, ParseDocumentIdError};
pub use listing::DamagedEntry;
pub use manage::Reclaimed;
pub use records::{JobError, JobRecord, RecordKind};
pub(crate) use repair::{Derived, finish as finish_repair, look, repair};
pub(crate) use rows::LogEntry;
pub use rows::{Attributes, CollectionInfo, DocumentInfo, LanguageSetting, Passage, ReleasedChunk, TextHash};
pub use store::Access;
pub(crate) use store::{Family, is_in_use};
pub use survey::{CatalogReport, DamagedDocument};

pub use totals::Totals;
use totals::{AllTotals, TotalsChange};
pub use transaction::{NewDocument, NewPassage, PutKind, PutOutcome, Restored, Transaction};

use crate::error::{DocumentsError, Result};
use crate::seldom::Seldom;
use crate::split::Format;

/// Version of the layout of families and keys.
const FORMAT: u32 = 1;
const FORMAT_ROW: &[u8] = b"format";
const NEXT_SEQUENCE: &[u8] = b"next-sequence";
const NEXT_COLLECTION: &[u8] = b"next-collection";
const IMPORTED: &[u8] = b"imported";
/// Another number for each repair: what was derived from the catalog before is derived anew.
const GENERATION: &[u8] = b"generation";

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
        store::exists(path) && !store::is_half_made(path)
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
        match number(&store, FORMAT_ROW) {
            Ok(Some(found)) if found > u64::from(FORMAT) => {
                let (path, found) = (store.path().into(), u32::try_from(found).unwrap_or(u32::MAX));
                return Err(DocumentsError::NewerDataDir { path, found, supported: FORMAT });
            }
            Ok(None) if store.access() == Access::Write => {
                let mut fresh = batch::Batch::new(&store);
                fresh.put(Family::Meta, FORMAT_ROW.to_vec(), u64::from(FORMAT).to_be_bytes().to_vec());
                fresh.commit()?;
            }
            Err(CatalogError::Whole(error)) => return Err(error),
            _ => {}
        }
        let next = match number(&store, NEXT_SEQUENCE) {
            Ok(next) => next.unwrap_or(1),
            // An index that has come further is built again.
            Err(CatalogError::Row(DamagedRow(problem))) => {
                tracing::warn!(problem, "the number of the next change is lost: it follows from the log");
                last_logged(&store) + 1
            }
            Err(CatalogError::Whole(error)) => return Err(error),
        };
        Ok(Catalog { store, writing: Mutex::new(Writing { sequence: next, totals: None }) })
    }

    /// What RocksDB objected to when it opened the catalog past damage; `None` where it did not.
    #[must_use]
    pub fn damage(&self) -> Option<&str> {
        self.store.damage()
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

    /// Which writing of the catalog this is: 0, or a number that its last repair has given it.
    pub(crate) fn generation(&self) -> u64 {
        number(&self.store, GENERATION).ok().flatten().unwrap_or(0)
    }

    /// Looks at all of the catalog while it is open; nothing changes until `also`, which gets the number of the last change,
    /// has looked at what follows from it.
    ///
    /// # Errors
    /// [`DocumentsError::Catalog`].
    pub(crate) fn verify<T>(&self, also: impl FnOnce(u64) -> Result<T>) -> Result<(CatalogReport, T)> {
        let unchanged = self.writing();
        Ok((survey::survey(&self.store, &mut |_| Ok(()))?, also(unchanged.sequence - 1)?))
    }

    /// Writes the catalog anew while it is open, see [`repair`]: whoever writes waits, whoever reads only while the new one takes its
    /// place.
    ///
    /// # Errors
    /// As [`repair`].
    pub(crate) fn rewrite(&self, anew: bool, derived: &dyn Derived) -> Result<CatalogReport> {
        let mut writing = self.writing();
        // In tables it is for RocksDB's own repair, too, whatever became of the log on disk.
        let _ = self.store.flush();
        let path = self.store.path();
        let report = repair::write_beside(path, Some(&self.store), anew, derived)?;
        self.store.replaced(|| repair::take_place(path, &report))?;
        *writing = Writing { sequence: number(&self.store, NEXT_SEQUENCE)?.unwrap_or(1), totals: None };
        Ok(report)
    }

    fn writing(&self) -> MutexGuard<'_, Writing> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has everything in tables, and nothing in the log.
    #[cfg(test)]
    pub(crate) fn flush(&self) -> Result<()> {
        Ok(self.store.flush()?)
    }

    /// Whether a compaction has come upon damage.
    #[cfg(test)]
    pub(crate) fn is_uncompacted(&self) -> bool {
        self.store.is_uncompacted()
    }

    /// The last sequence number that was given to a change.
    pub(crate) fn sequence(&self) -> u64 {
        self.writing().sequence - 1
    }

    /// Which documents of a collection have changed since `after`, with the numbers of the changes; `None` where that is not
    /// known, as the log is damaged.
    pub(crate) fn changes(&self, collection: u32, after: u64) -> Result<Option<Vec<(u64, LogEntry)>>> {
        let prefix = collection.to_be_bytes();
        let mut entries = Vec::new();
        for row in self.store.scan(Family::Log, &prefix, &keys::log(collection, after.saturating_add(1))) {
            let entry = row.and_then(|(key, row)| {
                let entry = rows::unseal(Family::Log, &key, &row).and_then(from_json)?;
                let sequence = key[4..].try_into().map(u64::from_be_bytes);
                Ok((sequence.map_err(|_| DamagedRow("a key of the log is not as expected".into()))?, entry))
            });
            match entry {
                Ok(entry) => entries.push(entry),
                Err(CatalogError::Row(DamagedRow(problem))) => {
                    static TOLD: Seldom = Seldom::new();
                    if let Some(more) = TOLD.due() {
                        tracing::warn!(
                            collection,
                            problem,
                            more,
                            "the log of changes is damaged: all documents count as changed"
                        );
                    }
                    return Ok(None);
                }
                Err(CatalogError::Whole(error)) => return Err(error),
            }
        }
        Ok(Some(entries))
    }

    /// Forgets changes up to `through`, which the index has.
    pub(crate) fn trim_log(&self, collection: u32, through: u64) -> Result<()> {
        let prefix = collection.to_be_bytes();
        let mut old = Vec::new();
        for row in self.store.scan(Family::Log, &prefix, &prefix) {
            match row {
                Ok((key, _)) if key > keys::log(collection, through) => break,
                Ok((key, _)) => old.push(((Family::Log, key), None)),
                // Whatever cannot be read is not read again: it lies before what follows.
                Err(CatalogError::Row(_)) => {}
                Err(error) => return Err(error.into()),
            }
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
    /// [`DocumentsError::Catalog`].
    pub fn named(&self, collection: u32, name: &str) -> Result<Option<DocumentId>> {
        let found = self.id_at(Family::Names, &keys::name(collection, false, name));
        Ok(found.or_else(|error| self.instead(error, |info| info.is_called(collection, name)))?)
    }

    /// The id that the row of a name tells, if there is one that can be read.
    #[must_use]
    pub fn has_name(&self, collection: u32, name: &str) -> Option<DocumentId> {
        self.id_at(Family::Names, &keys::name(collection, false, name)).ok().flatten()
    }

    /// The id of the document of a collection that has this text.
    ///
    /// # Errors
    /// As [`named`](Self::named).
    pub fn with_content(&self, collection: u32, format: Format, content: &TextHash) -> Result<Option<DocumentId>> {
        let found = self.id_at(Family::Contents, &keys::content(collection, format, content));
        Ok(found.or_else(|error| self.instead(error, |info| info.holds(collection, format, content)))?)
    }

    fn id_at(&self, family: Family, key: &[u8]) -> Result<Option<DocumentId>, CatalogError> {
        let Some(content) = read(&self.store, family, key)? else { return Ok(None) };
        let id =
            DocumentId::from_bytes(&content).ok_or_else(|| DamagedRow("a document's id is not as expected".into()))?;
        Ok(Some(id))
    }

    /// Where the row that would tell a document is damaged, all documents are looked through.
    fn instead(
        &self,
        error: CatalogError,
        is_it: impl Fn(&DocumentInfo) -> bool,
    ) -> Result<Option<DocumentId>, CatalogError> {
        let CatalogError::Row(_) = error else { return Err(error) };
        manage::find_document(&self.store, is_it).map(|found| found.map(|info| info.id))
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

    /// All passages of a document, in order. Each is asked for by its key, past tables that are damaged.
    ///
    /// # Errors
    /// As [`text`](Self::text).
    pub fn passages(&self, info: &DocumentInfo) -> Result<Vec<Passage>> {
        let passage = |number: u32| {
            let content = read(&self.store, Family::Passages, &keys::passage(&info.id, number))?;
            let lacks = || DamagedRow(format!("expected {} passages, found no {number}", info.passages));
            Ok(Passage::decode(&content.ok_or_else(lacks)?)?)
        };
        let passages: Result<Vec<Passage>, CatalogError> = (0..info.passages).map(passage).collect();
        passages.map_err(|error| error.of(|| label(info)))
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

/// What is said of a name whose document is gone.
const LOST: &str = "its text was lost to damage: ingest it again, or remove it";

fn number(store: &Store, key: &[u8]) -> Result<Option<u64>, CatalogError> {
    let Some(content) = read(store, Family::Meta, key)? else { return Ok(None) };
    let bytes = content.try_into().map_err(|_| DamagedRow("a number is not as expected".into()))?;
    Ok(Some(u64::from_be_bytes(bytes)))
}

/// The highest number of a change that the log still has.
fn last_logged(store: &Store) -> u64 {
    let numbers = store.scan(Family::Log, b"", b"").filter_map(|row| row.ok()?.0.get(4..)?.try_into().ok());
    numbers.map(u64::from_be_bytes).max().unwrap_or(0)
}

/// What people know a document by.
fn label(info: &DocumentInfo) -> String {
    format!("document {}", info.names.first().map_or_else(|| info.id.to_string(), Clone::clone))
}
