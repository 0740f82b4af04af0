//! RocksDB as the catalog uses it: column families, options, and the few operations needed.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use rocksdb::{
    BottommostLevelCompaction, ColumnFamily, ColumnFamilyDescriptor, CompactOptions, DB, DBCompressionType,
    DBRecoveryMode, Env, LogLevel, Options, ReadOptions, WriteBatch, WriteOptions,
};

use super::error::{self, CatalogError};
use crate::error::DocumentsError;

const MIB: usize = 1 << 20;

/// The column families, each with its keys; all numbers are big-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Family {
    /// `format`, `next-sequence`, `next-collection`: one row each.
    Meta,
    /// 0 and a name, or 1 and the number of a removed collection -> [`super::CollectionInfo`].
    Collections,
    /// A document's id -> [`super::DocumentInfo`].
    Documents,
    /// Collection, 0, name -> a document's id. Collection, 1, removed name -> a document's id, BLAKE3 of its text.
    Names,
    /// Collection, format, BLAKE3 of a text -> the id of the document that has it.
    Contents,
    /// BLAKE3 of a text, number of a piece -> the piece.
    Texts,
    /// BLAKE3 of a text, a document's id -> nothing: who needs the text.
    TextRefs,
    /// A document's id, number -> [`super::Passage`].
    Passages,
    /// Hash of a passage's tokens, a document's id -> nothing: who needs the chunk.
    ChunkRefs,
    /// Hash of a passage's tokens -> [`super::ReleasedChunk`]: chunks that the chunk store has yet to be told of.
    Released,
    /// An id -> [`super::JobRecord`], of uploaded files.
    Files,
    /// An id -> [`super::JobRecord`], of work that goes on in the background.
    Jobs,
    /// Collection, sequence number -> [`super::LogEntry`].
    Log,
}

impl Family {
    pub(crate) const ALL: [Family; 13] = [
        Family::Meta,
        Family::Collections,
        Family::Documents,
        Family::Names,
        Family::Contents,
        Family::Texts,
        Family::TextRefs,
        Family::Passages,
        Family::ChunkRefs,
        Family::Released,
        Family::Files,
        Family::Jobs,
        Family::Log,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Family::Meta => "meta",
            Family::Collections => "collections",
            Family::Documents => "documents",
            Family::Names => "names",
            Family::Contents => "contents",
            Family::Texts => "texts",
            Family::TextRefs => "text-refs",
            Family::Passages => "passages",
            Family::ChunkRefs => "chunk-refs",
            Family::Released => "released",
            Family::Files => "files",
            Family::Jobs => "jobs",
            Family::Log => "log",
        }
    }

    fn options(self) -> Options {
        let mut options = Options::default();
        options.set_compression_type(DBCompressionType::Lz4);
        let large = matches!(self, Family::Texts | Family::Passages);
        options.set_write_buffer_size(if large { 16 * MIB } else { 4 * MIB });
        options
    }
}

/// What may be done with an open catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing on disk changes. Others may have the catalog open.
    Read,
    /// Everything; one process at a time.
    Write,
}

/// An open database.
///
/// RocksDB takes no further writes after one has failed, as on a full disk, until it is opened again: that is tried with the
/// next write, and reading goes on whatever comes of it.
pub(super) struct Store {
    /// `None` where it could not be opened again.
    db: RwLock<Option<DB>>,
    path: PathBuf,
    access: Access,
    /// Whether a write has failed since it was opened.
    failed: AtomicBool,
}

/// A row to write, or to delete.
pub(super) type Change = ((Family, Vec<u8>), Option<Vec<u8>>);

fn db_options(access: Access) -> Options {
    let mut options = Options::default();
    options.create_if_missing(access == Access::Write);
    options.create_missing_column_families(access == Access::Write);
    options.set_paranoid_checks(true);
    // Every batch is synced: only one that was never acknowledged can be torn.
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    options.set_max_total_wal_size(64 * MIB as u64);
    options.set_max_background_jobs(2);
    options.set_bytes_per_sync(MIB as u64);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(MIB);
    options.set_log_level(LogLevel::Warn);
    options
}

impl Store {
    /// Opens the database in `path`, making it where it may be written.
    pub(super) fn open(path: &Path, access: Access) -> Result<Store, CatalogError> {
        Store::open_with(path, access, db_options(access))
    }

    /// An empty one that lies in memory.
    pub(super) fn in_memory() -> Result<Store, CatalogError> {
        let path = PathBuf::from("/in-memory");
        let env = Env::mem_env().map_err(|e| error::rocksdb(e, "opening", &path))?;
        let mut options = db_options(Access::Write);
        options.set_env(&env);
        Store::open_with(&path, Access::Write, options)
    }

    fn open_with(path: &Path, access: Access, options: Options) -> Result<Store, CatalogError> {
        let db = open_database(path, access, &options)?;
        Ok(Store { db: RwLock::new(Some(db)), path: path.into(), access, failed: AtomicBool::new(false) })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn access(&self) -> Access {
        self.access
    }

    fn fail(&self, action: &'static str) -> impl Fn(rocksdb::Error) -> CatalogError {
        move |error| error::rocksdb(error, action, &self.path)
    }

    /// Does something with the database that is open.
    fn with<T>(&self, work: impl FnOnce(&DB) -> Result<T, CatalogError>) -> Result<T, CatalogError> {
        let db = self.db.read().unwrap_or_else(PoisonError::into_inner);
        match db.as_ref() {
            Some(db) => work(db),
            None => Err(DocumentsError::writing(&self.path, std::io::ErrorKind::StorageFull.into()).into()),
        }
    }

    pub(super) fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>, CatalogError> {
        self.with(|db| db.get_cf_opt(column(db, family), key, &read_options()).map_err(self.fail("reading")))
    }

    /// Writes all changes or none, and has them on disk when it returns if `synced`. Where it fails, they may be there all
    /// the same, all of them, once the database is opened again.
    pub(super) fn write(&self, changes: impl IntoIterator<Item = Change>, synced: bool) -> Result<(), CatalogError> {
        self.mend()?;
        let mut options = WriteOptions::default();
        options.set_sync(synced);
        self.with(|db| {
            let mut batch = WriteBatch::default();
            for ((family, key), row) in changes {
                match row {
                    Some(row) => batch.put_cf(column(db, family), key, row),
                    None => batch.delete_cf(column(db, family), key),
                }
            }
            db.write_opt(batch, &options).map_err(|error| {
                self.failed.store(true, Ordering::Relaxed);
                self.fail("writing")(error)
            })
        })
    }

    /// Opens the database again if a write has failed; where it cannot be written, it is read.
    fn mend(&self) -> Result<(), CatalogError> {
        if !self.failed.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut db = self.db.write().unwrap_or_else(PoisonError::into_inner);
        *db = None;
        match open_database(&self.path, Access::Write, &db_options(Access::Write)) {
            Ok(opened) => {
                *db = Some(opened);
                self.failed.store(false, Ordering::Relaxed);
                Ok(())
            }
            Err(problem) => {
                *db = open_database(&self.path, Access::Read, &db_options(Access::Read)).ok();
                Err(problem)
            }
        }
    }

    /// The rows of a family whose keys begin with `prefix` and are not below `from`. They are read some at a time: what is
    /// written meanwhile may be among them or not.
    pub(super) fn scan<'a>(&'a self, family: Family, prefix: &[u8], from: &[u8]) -> Rows<'a> {
        let next = Some(from.max(prefix).to_vec());
        Rows { store: self, family, prefix: prefix.into(), next, read: VecDeque::new(), at_a_time: FIRST_ROWS }
    }

    /// Rewrites everything without what was deleted, so that no file has it any more: neither logs nor tables.
    pub(super) fn purge(&self) -> Result<(), CatalogError> {
        self.mend()?;
        let purged = self.with(|db| {
            let errors = || db.property_int_value(rocksdb::properties::BACKGROUND_ERRORS).ok().flatten();
            let before = errors();
            for family in Family::ALL {
                // Once every family has left it, a log file goes.
                db.flush_cf(column(db, family)).map_err(self.fail("flushing"))?;
            }
            let mut options = CompactOptions::default();
            options.set_bottommost_level_compaction(BottommostLevelCompaction::ForceOptimized);
            for family in Family::ALL {
                db.compact_range_cf_opt(column(db, family), None::<&[u8]>, None::<&[u8]>, &options);
            }
            // Rewriting tables tells of no error itself.
            match errors() == before {
                true => Ok(()),
                false => Err(DocumentsError::CatalogNotErased { path: self.path.clone() }.into()),
            }
        });
        if purged.is_err() {
            // It takes no further writes until it is opened again.
            self.failed.store(true, Ordering::Relaxed);
        }
        purged
    }
}

fn open_database(path: &Path, access: Access, options: &Options) -> Result<DB, CatalogError> {
    let descriptors = Family::ALL.map(|family| ColumnFamilyDescriptor::new(family.name(), family.options()));
    let db = match access {
        Access::Write => DB::open_cf_descriptors(options, path, descriptors),
        Access::Read => DB::open_cf_descriptors_read_only(options, path, descriptors, false),
    };
    db.map_err(|e| error::rocksdb(e, "opening", path))
}

fn column(db: &DB, family: Family) -> &ColumnFamily {
    db.cf_handle(family.name()).expect("every family is opened or created with the database")
}

/// Whether the database in `path` lacks families or the row `last`, which is written once all of them are there: its making was
/// cut off. What cannot be looked into counts as whole: opening it says what is wrong.
pub(super) fn is_half_made(path: &Path, last: &[u8]) -> bool {
    let options = db_options(Access::Read);
    let Ok(names) = DB::list_cf(&options, path) else { return false };
    if Family::ALL.iter().all(|family| names.iter().any(|name| name == family.name())) {
        return false;
    }
    if !names.iter().any(|name| name == Family::Meta.name()) {
        return true;
    }
    let meta = [ColumnFamilyDescriptor::new(Family::Meta.name(), Family::Meta.options())];
    let Ok(db) = DB::open_cf_descriptors_read_only(&options, path, meta, false) else { return false };
    let row = db.cf_handle(Family::Meta.name()).map(|meta| db.get_cf(meta, last));
    matches!(row, Some(Ok(None)))
}

/// Whether another process has the catalog in `path` open for writing. Asking leaves no trace.
pub(crate) fn is_in_use(path: &Path) -> bool {
    use rustix::process::{Flock, FlockType, fcntl_getlk};
    let Ok(file) = std::fs::File::open(path.join("LOCK")) else { return false };
    let holder = fcntl_getlk(&file, &Flock::from(FlockType::WriteLock));
    holder.ok().flatten().is_some_and(|lock| lock.typ != FlockType::Unlocked)
}

fn read_options() -> ReadOptions {
    let mut options = ReadOptions::default();
    options.set_verify_checksums(true);
    options
}

/// Rows that are read at a time: few at first, as often one is enough.
const FIRST_ROWS: usize = 8;
const MOST_ROWS: usize = 1024;
/// Bytes of rows that are read at a time, about.
const MOST_BYTES: usize = 4 * MIB;

/// Rows in the order of their keys.
pub(super) struct Rows<'a> {
    store: &'a Store,
    family: Family,
    prefix: Vec<u8>,
    /// Where to go on; `None` at the end.
    next: Option<Vec<u8>>,
    read: VecDeque<(Vec<u8>, Vec<u8>)>,
    at_a_time: usize,
}

impl Rows<'_> {
    /// Reads some more.
    fn fill(&mut self, from: &[u8]) -> Result<(), CatalogError> {
        let (mut bytes, most) = (0, self.at_a_time);
        self.at_a_time = (most * 4).min(MOST_ROWS);
        self.store.with(|db| {
            let mut rows = db.raw_iterator_cf_opt(column(db, self.family), read_options());
            rows.seek(from);
            while let Some((key, row)) = rows.item().filter(|(key, _)| key.starts_with(&self.prefix)) {
                if self.read.len() == most || bytes > MOST_BYTES {
                    self.next = Some(key.to_vec());
                    return Ok(());
                }
                bytes += row.len();
                self.read.push_back((key.to_vec(), row.to_vec()));
                rows.next();
            }
            // The end, or a block that cannot be read.
            rows.status().map_err(self.store.fail("reading"))
        })
    }
}

impl Iterator for Rows<'_> {
    type Item = Result<(Vec<u8>, Vec<u8>), CatalogError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.read.is_empty()
            && let Some(from) = self.next.take()
            && let Err(error) = self.fill(&from)
        {
            return Some(Err(error));
        }
        self.read.pop_front().map(Ok)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn change(number: u32) -> Change {
        ((Family::Meta, number.to_be_bytes().to_vec()), Some(vec![7; 9]))
    }

    #[test]
    fn rows_come_in_order_however_many_there_are_and_end_with_their_prefix() {
        let store = Store::in_memory().unwrap();
        store.write((0..3000).map(change), true).unwrap();
        let keys = |prefix: &[u8], from: &[u8]| -> Vec<Vec<u8>> {
            store.scan(Family::Meta, prefix, from).map(|row| row.unwrap().0).collect()
        };
        let all: Vec<Vec<u8>> = (0..3000u32).map(|number| number.to_be_bytes().to_vec()).collect();
        assert_eq!(keys(b"", b""), all);
        assert_eq!(keys(&[0, 0, 1], b""), all[256..512]);
        assert_eq!(keys(&[0, 0, 1], &[0, 0, 1, 200]), all[456..512]);
        assert!(keys(&[9], b"").is_empty());
    }

    #[test]
    fn after_a_write_that_failed_reading_goes_on_and_writing_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog");
        let store = Store::open(&path, Access::Write).unwrap();
        store.write([change(1)], true).unwrap();
        store.failed.store(true, Ordering::Relaxed);
        // Something is in the way of opening it for writing: the lock of another opening, or a folder in its place.
        std::fs::remove_file(path.join("LOCK")).unwrap();
        std::fs::create_dir(path.join("LOCK")).unwrap();
        store.write([change(2)], true).unwrap_err();
        assert!(store.get(Family::Meta, &1u32.to_be_bytes()).unwrap().is_some());
        std::fs::remove_dir(path.join("LOCK")).unwrap();
        store.write([change(2)], true).unwrap();
        assert_eq!(store.scan(Family::Meta, b"", b"").count(), 2);
    }
}
