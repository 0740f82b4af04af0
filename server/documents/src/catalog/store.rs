//! RocksDB as the catalog uses it: column families, options, and the few operations needed.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use rocksdb::{
    BottommostLevelCompaction, ColumnFamily, ColumnFamilyDescriptor, CompactOptions, DB, DBCompressionType,
    DBRecoveryMode, Env, LogLevel, Options, ReadOptions, WriteBatch, WriteOptions,
};

use super::error::{self, CatalogError};
use super::scan::Rows;
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
    /// Whether a compaction has come upon damage: nothing is compacted any more, which would fail again and again.
    uncompacted: AtomicBool,
    /// What RocksDB objected to, where it opened the database past damage only.
    damage: Option<String>,
    in_memory: bool,
}

/// A row to write, or to delete.
pub(super) type Change = ((Family, Vec<u8>), Option<Vec<u8>>);

/// How much damage to put up with when opening.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Only what a crash leaves behind: a torn end of the write-ahead log.
    Strict,
    /// Tables that cannot be read are an error of whatever is looked for in them. Nothing is compacted, as that would come upon
    /// them again and again.
    PastTables,
    /// Records of the log that cannot be read are skipped as well.
    PastLog,
}

fn db_options(access: Access, mode: Mode) -> Options {
    let mut options = Options::default();
    options.create_if_missing(access == Access::Write);
    options.create_missing_column_families(access == Access::Write);
    options.set_paranoid_checks(mode == Mode::Strict);
    // Every batch is synced: only one that was never acknowledged can be torn.
    options.set_wal_recovery_mode(match mode {
        Mode::Strict | Mode::PastTables => DBRecoveryMode::TolerateCorruptedTailRecords,
        Mode::PastLog => DBRecoveryMode::SkipAnyCorruptedRecord,
    });
    options.set_max_total_wal_size(64 * MIB as u64);
    options.set_max_background_jobs(2);
    options.set_bytes_per_sync(MIB as u64);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(MIB);
    options.set_log_level(LogLevel::Warn);
    options
}

impl Store {
    /// Opens the database in `path`, making it where it may be written. One with damaged tables is opened all the same:
    /// [`damage`](Self::damage) says so.
    pub(super) fn open(path: &Path, access: Access) -> Result<Store, CatalogError> {
        has_current(path)?;
        let (db, damage) = open_or_tolerate(path, access).map_err(|e| error::rocksdb(e, "opening", path))?;
        Ok(Store::new(db, path, access, damage))
    }

    /// Opens the database in `path` for reading, past all damage that RocksDB can be made to pass.
    pub(super) fn open_damaged(path: &Path) -> Result<Store, CatalogError> {
        has_current(path)?;
        let db = open_in(path, Access::Read, Mode::PastLog);
        let db = db.map_err(|e| error::rocksdb(e, "opening", path))?;
        Ok(Store::new(db, path, Access::Read, None))
    }

    /// An empty one that lies in memory.
    pub(super) fn in_memory() -> Result<Store, CatalogError> {
        let path = PathBuf::from("/in-memory");
        let env = Env::mem_env().map_err(|e| error::rocksdb(e, "opening", &path))?;
        let mut options = db_options(Access::Write, Mode::Strict);
        options.set_env(&env);
        let db = open_database(&path, Access::Write, &options, Mode::Strict);
        let db = db.map_err(|e| error::rocksdb(e, "opening", &path))?;
        Ok(Store { in_memory: true, ..Store::new(db, &path, Access::Write, None) })
    }

    fn new(db: DB, path: &Path, access: Access, damage: Option<String>) -> Store {
        Store {
            db: RwLock::new(Some(db)),
            path: path.into(),
            access,
            failed: AtomicBool::new(false),
            uncompacted: AtomicBool::new(false),
            damage,
            in_memory: false,
        }
    }

    /// What RocksDB objected to when it opened the database; `None` where it did not.
    pub(super) fn damage(&self) -> Option<&str> {
        self.damage.as_deref()
    }

    #[cfg(test)]
    pub(super) fn is_uncompacted(&self) -> bool {
        self.uncompacted.load(Ordering::Relaxed)
    }

    /// Closes the database while `work` replaces its folder, and opens it again. Whoever reads or writes waits.
    pub(super) fn replaced<T>(&self, work: impl FnOnce() -> Result<T, DocumentsError>) -> Result<T, DocumentsError> {
        let mut db = self.db.write().unwrap_or_else(PoisonError::into_inner);
        *db = None;
        let done = work();
        match open_or_tolerate(&self.path, self.access) {
            Ok((opened, _)) => {
                *db = Some(opened);
                self.failed.store(false, Ordering::Relaxed);
                self.uncompacted.store(false, Ordering::Relaxed);
                done
            }
            Err(problem) => {
                self.failed.store(true, Ordering::Relaxed);
                done.and_then(|_| Err(error::rocksdb(problem, "opening", &self.path).into()))
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn access(&self) -> Access {
        self.access
    }

    pub(super) fn fail(&self, action: &'static str) -> impl Fn(rocksdb::Error) -> CatalogError {
        move |error| error::rocksdb(error, action, &self.path)
    }

    /// Does something with the database that is open.
    pub(super) fn with<T>(&self, work: impl FnOnce(&DB) -> Result<T, CatalogError>) -> Result<T, CatalogError> {
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
        let changes: Vec<Change> = changes.into_iter().collect();
        match self.try_write(&changes, synced) {
            // What RocksDB refuses here is what a compaction came upon before: the write itself is sound.
            Err(CatalogError::Whole(DocumentsError::DamagedCatalog { problem, .. }))
                if !self.uncompacted.swap(true, Ordering::Relaxed) =>
            {
                let path = self.path.display();
                tracing::warn!(
                    %path, problem,
                    "tables of the catalog cannot be merged, as there is damage: `quire catalog verify --repair` mends it"
                );
                self.try_write(&changes, synced)
            }
            outcome => outcome,
        }
    }

    fn try_write(&self, changes: &[Change], synced: bool) -> Result<(), CatalogError> {
        self.mend()?;
        let mut options = WriteOptions::default();
        options.set_sync(synced);
        self.with(|db| {
            let mut batch = WriteBatch::default();
            for ((family, key), row) in changes {
                match row {
                    Some(row) => batch.put_cf(column(db, *family), key, row),
                    None => batch.delete_cf(column(db, *family), key),
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
        let opened = match self.uncompacted.load(Ordering::Relaxed) {
            true => open_in(&self.path, Access::Write, Mode::PastTables).map(|opened| (opened, None)),
            false => open_or_tolerate(&self.path, Access::Write),
        };
        match opened {
            Ok((opened, _)) => {
                *db = Some(opened);
                self.failed.store(false, Ordering::Relaxed);
                Ok(())
            }
            Err(problem) => {
                *db = open_or_tolerate(&self.path, Access::Read).ok().map(|(opened, _)| opened);
                Err(error::rocksdb(problem, "opening", &self.path))
            }
        }
    }

    /// The rows of a family whose keys begin with `prefix` and are not below `from`. They are read some at a time: what is
    /// written meanwhile may be among them or not.
    pub(super) fn scan<'a>(&'a self, family: Family, prefix: &[u8], from: &[u8]) -> Rows<'a> {
        Rows::new(self, family, prefix, from)
    }

    /// Has everything in tables.
    pub(super) fn flush(&self) -> Result<(), CatalogError> {
        self.with(|db| {
            Family::ALL.iter().try_for_each(|family| db.flush_cf(column(db, *family)).map_err(self.fail("flushing")))
        })
    }

    /// Rewrites everything without what was deleted, so that no file has it any more: neither logs nor tables. A table that
    /// cannot be rewritten, as it is damaged, is an error, once all others are.
    pub(super) fn purge(&self) -> Result<(), CatalogError> {
        let mut left = self.rewrite()?;
        if !left.is_empty() {
            // An error of the disk that is over by now can still be the answer to the first attempt behind it.
            left = self.rewrite()?;
        }
        if left.is_empty() {
            return Ok(());
        }
        let is_damaged =
            |family: Family| self.scan(family, b"", b"").any(|row| matches!(row, Err(CatalogError::Row(_))));
        let path = self.path.clone();
        Err(match Family::ALL.into_iter().any(is_damaged) {
            true => DocumentsError::NotErased { path, files: left.join(", ") },
            false => DocumentsError::CatalogNotErased { path },
        }
        .into())
    }

    /// Rewrites all tables, and the list of files. Returns the tables that could not be rewritten.
    fn rewrite(&self) -> Result<Vec<String>, CatalogError> {
        self.mend()?;
        // Once every family has left it, a log file goes.
        self.flush()?;
        let left = self.with(|db| {
            let before = db.live_files().map_err(self.fail("reading"))?;
            let mut options = CompactOptions::default();
            options.set_bottommost_level_compaction(BottommostLevelCompaction::ForceOptimized);
            for family in Family::ALL {
                db.compact_range_cf_opt(column(db, family), None::<&[u8]>, None::<&[u8]>, &options);
            }
            // RocksDB tells a compaction's failure to nobody but its log, and the next write.
            let after = db.live_files().map_err(self.fail("reading"))?;
            let left = after.iter().filter(|file| before.iter().any(|old| old.name == file.name));
            Ok(left.map(|file| file.name.trim_start_matches('/').to_string()).collect::<Vec<_>>())
        })?;
        if self.in_memory {
            return Ok(Vec::new());
        }
        // The list of files has their first and last keys, and so names. A new one is written when the database is opened;
        // after a compaction that failed it takes no further writes before that.
        self.failed.store(true, Ordering::Relaxed);
        self.mend()?;
        Ok(left)
    }
}

fn open_database(path: &Path, access: Access, options: &Options, mode: Mode) -> Result<DB, rocksdb::Error> {
    let descriptors = Family::ALL.map(|family| {
        let mut options = family.options();
        options.set_disable_auto_compactions(mode != Mode::Strict);
        ColumnFamilyDescriptor::new(family.name(), options)
    });
    match access {
        Access::Write => DB::open_cf_descriptors(options, path, descriptors),
        Access::Read => DB::open_cf_descriptors_read_only(options, path, descriptors, false),
    }
}

fn open_in(path: &Path, access: Access, mode: Mode) -> Result<DB, rocksdb::Error> {
    open_database(path, access, &db_options(access, mode), mode)
}

/// Opens a database, past damaged tables where it cannot be done otherwise; then the second value says what they are.
fn open_or_tolerate(path: &Path, access: Access) -> Result<(DB, Option<String>), rocksdb::Error> {
    let first = match open_in(path, access, Mode::Strict) {
        Ok(db) => return Ok((db, None)),
        Err(error) => error,
    };
    // Only a table's: with its checks off, RocksDB passes over damage of the log as well, and so over what was acknowledged.
    if !error::is_damage(&first) || !first.to_string().contains(".sst") {
        return Err(first);
    }
    match open_in(path, access, Mode::PastTables) {
        Ok(db) => {
            let problem = first.to_string();
            tracing::warn!(
                path = %path.display(), problem,
                "the catalog of documents is damaged: what is whole is used, `quire catalog verify` tells what is not"
            );
            Ok((db, Some(problem)))
        }
        Err(_) => Err(first),
    }
}

pub(super) fn column(db: &DB, family: Family) -> &ColumnFamily {
    db.cf_handle(family.name()).expect("every family is opened or created with the database")
}

/// Refuses a database whose beginning is missing: RocksDB would begin a new one in its place, and remove the files of the old one.
fn has_current(path: &Path) -> Result<(), CatalogError> {
    if path.join("CURRENT").is_file() || !holds_rows(path) {
        return Ok(());
    }
    Err(DocumentsError::DamagedCatalog { path: path.into(), problem: "CURRENT is missing".into() }.into())
}

/// Whether there is anything of a database in `path`.
pub(super) fn exists(path: &Path) -> bool {
    path.join("CURRENT").is_file() || holds_rows(path)
}

/// Whether files in `path` hold rows, or did before they were damaged: tables, and logs that were written to.
fn holds_rows(path: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(path) else { return false };
    entries.flatten().any(|entry| {
        let name = entry.file_name();
        let ending = Path::new(&name).extension().and_then(|ending| ending.to_str());
        ending == Some("sst") || ending == Some("log") && entry.metadata().is_ok_and(|found| found.len() > 0)
    })
}

/// Whether the database in `path` lacks families, and has no row: its making was cut off. What cannot be looked into counts as
/// whole: opening it says what is wrong.
pub(super) fn is_half_made(path: &Path) -> bool {
    let Ok(names) = DB::list_cf(&db_options(Access::Read, Mode::Strict), path) else { return false };
    !holds_rows(path) && !Family::ALL.iter().all(|family| names.iter().any(|name| name == family.name()))
}

/// Whether another process has the catalog in `path` open for writing. Asking leaves no trace.
pub(crate) fn is_in_use(path: &Path) -> bool {
    use rustix::process::{Flock, FlockType, fcntl_getlk};
    let Ok(file) = std::fs::File::open(path.join("LOCK")) else { return false };
    let holder = fcntl_getlk(&file, &Flock::from(FlockType::WriteLock));
    holder.ok().flatten().is_some_and(|lock| lock.typ != FlockType::Unlocked)
}

pub(super) fn read_options() -> ReadOptions {
    let mut options = ReadOptions::default();
    options.set_verify_checksums(true);
    options
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
