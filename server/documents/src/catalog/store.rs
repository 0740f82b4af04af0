//! RocksDB as the catalog uses it: column families, options, and the few operations needed.

use std::path::{Path, PathBuf};

use rocksdb::{
    BottommostLevelCompaction, ColumnFamily, ColumnFamilyDescriptor, CompactOptions, DB, DBCompressionType,
    DBRawIteratorWithThreadMode, DBRecoveryMode, Env, LogLevel, Options, ReadOptions, WriteBatch, WriteOptions,
};

use super::error::{self, CatalogError};

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
pub(super) struct Store {
    db: DB,
    path: PathBuf,
    access: Access,
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
        let descriptors = Family::ALL.map(|family| ColumnFamilyDescriptor::new(family.name(), family.options()));
        let db = match access {
            Access::Write => DB::open_cf_descriptors(&options, path, descriptors),
            Access::Read => DB::open_cf_descriptors_read_only(&options, path, descriptors, false),
        };
        let db = db.map_err(|e| error::rocksdb(e, "opening", path))?;
        Ok(Store { db, path: path.into(), access })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn access(&self) -> Access {
        self.access
    }

    fn family(&self, family: Family) -> &ColumnFamily {
        self.db.cf_handle(family.name()).expect("every family is opened or created with the database")
    }

    pub(super) fn fail(&self, action: &'static str) -> impl Fn(rocksdb::Error) -> CatalogError {
        move |error| error::rocksdb(error, action, &self.path)
    }

    pub(super) fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>, CatalogError> {
        self.db.get_cf_opt(self.family(family), key, &read_options()).map_err(self.fail("reading"))
    }

    /// Writes all changes or none, and has them on disk when it returns if `synced`.
    pub(super) fn write(&self, changes: impl IntoIterator<Item = Change>, synced: bool) -> Result<(), CatalogError> {
        let mut batch = WriteBatch::default();
        for ((family, key), row) in changes {
            match row {
                Some(row) => batch.put_cf(self.family(family), key, row),
                None => batch.delete_cf(self.family(family), key),
            }
        }
        let mut options = WriteOptions::default();
        options.set_sync(synced);
        self.db.write_opt(batch, &options).map_err(self.fail("writing"))
    }

    /// The rows of a family whose keys begin with `prefix` and are not below `from`.
    pub(super) fn scan<'a>(&'a self, family: Family, prefix: &[u8], from: &[u8]) -> Rows<'a> {
        let mut rows = self.db.raw_iterator_cf_opt(self.family(family), read_options());
        rows.seek(if from > prefix { from } else { prefix });
        Rows { rows, prefix: prefix.into(), store: self }
    }

    /// Rewrites everything without what was deleted, so that no file has it any more: neither logs nor tables.
    pub(super) fn purge(&self) -> Result<(), CatalogError> {
        for family in Family::ALL {
            // Once every family has left it, a log file goes.
            self.db.flush_cf(self.family(family)).map_err(self.fail("flushing"))?;
        }
        let mut options = CompactOptions::default();
        options.set_bottommost_level_compaction(BottommostLevelCompaction::ForceOptimized);
        for family in Family::ALL {
            self.db.compact_range_cf_opt(self.family(family), None::<&[u8]>, None::<&[u8]>, &options);
        }
        Ok(())
    }
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

/// Rows in the order of their keys.
pub(super) struct Rows<'a> {
    rows: DBRawIteratorWithThreadMode<'a, DB>,
    prefix: Vec<u8>,
    store: &'a Store,
}

impl Iterator for Rows<'_> {
    type Item = Result<(Vec<u8>, Vec<u8>), CatalogError>;

    fn next(&mut self) -> Option<Self::Item> {
        let Some((key, row)) = self.rows.item() else {
            // The end, or a block that cannot be read.
            return self.rows.status().err().map(|e| Err(self.store.fail("reading")(e)));
        };
        if !key.starts_with(&self.prefix) {
            return None;
        }
        let found = (key.to_vec(), row.to_vec());
        self.rows.next();
        Some(Ok(found))
    }
}
