//! RocksDB as this store uses it: column families, options, and the few operations needed.

use std::path::{Path, PathBuf};

use rocksdb::{
    ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType, DBPinnableSlice, DBRawIteratorWithThreadMode,
    DBRecoveryMode, LogLevel, Options, ReadOptions, WriteBatch, WriteOptions,
};

use crate::error::StoreError;
use crate::key::ChunkKey;

const MIB: usize = 1 << 20;

/// The column families.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Family {
    /// What the store belongs to, and its byte budget: one row each.
    Meta,
    /// Chunk key -> manifest. A chunk with a row here is visible.
    Manifest,
    /// Chunk key and row number -> payload. Row 0 is the head, row n+1 is layer n.
    Kv,
    /// Chunk key -> last use and hits.
    Usage,
}

impl Family {
    pub(crate) const ALL: [Family; 4] = [Family::Meta, Family::Manifest, Family::Kv, Family::Usage];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Family::Meta => "meta",
            Family::Manifest => "manifest",
            Family::Kv => "kv",
            Family::Usage => "usage",
        }
    }

    fn options(self) -> Options {
        let mut options = Options::default();
        // bf16 state does not shrink under a general compressor; the rest is tiny.
        options.set_compression_type(DBCompressionType::None);
        if self == Family::Kv {
            options.set_write_buffer_size(32 * MIB);
            options.set_enable_blob_files(true);
            options.set_min_blob_size(4096);
            options.set_blob_file_size(256 * MIB as u64);
            options.set_enable_blob_gc(true);
            options.set_blob_gc_age_cutoff(0.5);
            options.set_blob_gc_force_threshold(0.5);
            // Evictions come in runs: compact early where many deletions lie together, or the blobs
            // behind them keep their space.
            options.add_compact_on_deletion_collector_factory(128, 32, 0.3);
        } else {
            options.set_write_buffer_size(4 * MIB);
        }
        options
    }
}

/// Row 0 of a chunk in [`Family::Kv`].
pub(crate) const HEAD_ROW: u32 = 0;

/// Key of one row of a chunk's payload. Big-endian, so that a chunk's rows lie in order.
pub(crate) fn row_key(key: &ChunkKey, row: u32) -> [u8; 36] {
    let mut bytes = [0; 36];
    bytes[..32].copy_from_slice(&key.0);
    bytes[32..].copy_from_slice(&row.to_be_bytes());
    bytes
}

/// Takes a payload row's key apart; `None` when it is none.
pub(crate) fn split_row_key(bytes: &[u8]) -> Option<(ChunkKey, u32)> {
    let (key, row) = bytes.split_first_chunk::<32>()?;
    Some((ChunkKey(*key), u32::from_be_bytes(row.try_into().ok()?)))
}

/// How much damage to put up with when opening.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Only what a crash leaves behind: a torn end of the write-ahead log.
    Strict,
    /// Damaged records of the log are skipped, damaged tables tolerated until they are read. Safe
    /// because every value carries its own checksum and the name of what it belongs to.
    Salvage,
}

/// What may be done with an open store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nothing on disk changes, not a byte and not a time stamp. Others may have the store open.
    Read,
    /// Chunks can be stored and removed. One process at a time.
    Write,
}

/// An open database.
pub(crate) struct Backend {
    db: DB,
    path: PathBuf,
    /// What was written, for tests that lose a part of it.
    #[cfg(test)]
    pub(crate) journal: crate::tests::power::Journal,
}

fn db_options(mode: Mode, access: Access) -> Options {
    let mut options = Options::default();
    options.create_if_missing(access == Access::Write);
    options.create_missing_column_families(access == Access::Write);
    options.set_paranoid_checks(mode == Mode::Strict);
    options.set_wal_recovery_mode(match mode {
        Mode::Strict => DBRecoveryMode::TolerateCorruptedTailRecords,
        Mode::Salvage => DBRecoveryMode::SkipAnyCorruptedRecord,
    });
    options.set_max_total_wal_size(256 * MIB as u64);
    options.set_max_open_files(512);
    options.set_max_background_jobs(2);
    options.set_bytes_per_sync(MIB as u64);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(MIB);
    options.set_log_level(LogLevel::Warn);
    options
}

impl Backend {
    /// Opens, creating what is missing where it may. Families of other programs or versions are opened too, so
    /// that the caller gets to read the identity and can say what it found.
    pub(crate) fn open(path: &Path, mode: Mode, access: Access) -> Result<Backend, rocksdb::Error> {
        let options = db_options(mode, access);
        let mut names: Vec<String> = Family::ALL.map(|f| f.name().to_owned()).to_vec();
        // A fresh directory has no families to list; a damaged one fails again, and better, below.
        for name in DB::list_cf(&options, path).unwrap_or_default() {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let descriptors = names.into_iter().map(|name| {
            let known = Family::ALL.into_iter().find(|f| f.name() == name);
            ColumnFamilyDescriptor::new(name, known.map_or_else(Options::default, Family::options))
        });
        let db = match access {
            Access::Write => DB::open_cf_descriptors(&options, path, descriptors)?,
            Access::Read => DB::open_cf_descriptors_read_only(&options, path, descriptors, false)?,
        };
        Ok(Backend {
            db,
            path: path.to_path_buf(),
            #[cfg(test)]
            journal: Default::default(),
        })
    }

    /// Removes all files of the database. Needs no space on the disk, and that nobody has it open.
    pub(crate) fn destroy(path: &Path) -> Result<(), rocksdb::Error> {
        DB::destroy(&Options::default(), path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn family(&self, family: Family) -> &ColumnFamily {
        self.db.cf_handle(family.name()).expect("every family is opened or created with the database")
    }

    pub(crate) fn fail(&self, action: &'static str) -> impl Fn(rocksdb::Error) -> StoreError {
        move |error| StoreError::from_rocksdb(error, action, &self.path)
    }

    pub(crate) fn get(&self, family: Family, key: &[u8]) -> Result<Option<DBPinnableSlice<'_>>, rocksdb::Error> {
        self.db.get_pinned_cf_opt(self.family(family), key, &read_options())
    }

    /// Writes one row. With `Sync::Later` it survives the death of the process, but a power failure
    /// only after the next synced write.
    pub(crate) fn put(&self, family: Family, key: &[u8], value: &[u8], sync: Sync) -> Result<(), rocksdb::Error> {
        self.db.put_cf_opt(self.family(family), key, value, &write_options(sync))?;
        #[cfg(test)]
        self.journal.wrote([(family, key.to_vec(), Some(value.to_vec()))], sync);
        Ok(())
    }

    /// Makes every earlier write safe against power failure.
    pub(crate) fn sync(&self) -> Result<(), rocksdb::Error> {
        self.db.flush_wal(true)?;
        #[cfg(test)]
        self.journal.wrote([], Sync::Now);
        Ok(())
    }

    pub(crate) fn delete(
        &self,
        rows: impl IntoIterator<Item = (Family, Vec<u8>)>,
        sync: Sync,
    ) -> Result<(), rocksdb::Error> {
        let rows: Vec<_> = rows.into_iter().collect();
        let mut batch = WriteBatch::default();
        for (family, key) in &rows {
            batch.delete_cf(self.family(*family), key);
        }
        self.db.write_opt(batch, &write_options(sync))?;
        #[cfg(test)]
        self.journal.wrote(rows.into_iter().map(|(family, key)| (family, key, None)), sync);
        Ok(())
    }

    /// Moves a family from the log into table files.
    pub(crate) fn flush(&self, family: Family) -> Result<(), rocksdb::Error> {
        self.db.flush_cf(self.family(family))
    }

    pub(crate) fn scan(&self, family: Family) -> DBRawIteratorWithThreadMode<'_, DB> {
        self.db.raw_iterator_cf_opt(self.family(family), read_options())
    }

    /// Merges table files and lets go of the space of deleted payloads.
    pub(crate) fn compact(&self, family: Family) {
        self.db.compact_range_cf(self.family(family), None::<&[u8]>, None::<&[u8]>);
    }

    /// Bytes of table and blob files on disk, garbage included.
    pub(crate) fn disk_bytes(&self) -> u64 {
        let number = |family, name: &str| {
            let value = self.db.property_int_value_cf(self.family(family), name);
            value.ok().flatten().unwrap_or(0)
        };
        let of_family =
            |family| number(family, "rocksdb.total-sst-files-size") + number(family, "rocksdb.total-blob-file-size");
        Family::ALL.into_iter().map(of_family).sum()
    }
}

/// When a write must be safe against power failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sync {
    Now,
    Later,
}

fn write_options(sync: Sync) -> WriteOptions {
    let mut options = WriteOptions::default();
    options.set_sync(sync == Sync::Now);
    options
}

fn read_options() -> ReadOptions {
    let mut options = ReadOptions::default();
    options.set_verify_checksums(true);
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_keys_come_apart_again_and_sort_by_row() {
        let key = ChunkKey([9; 32]);
        assert_eq!(split_row_key(&row_key(&key, 258)), Some((key, 258)));
        assert!(row_key(&key, 255) < row_key(&key, 256));
        for length in [0, 31, 32, 35, 37] {
            assert_eq!(split_row_key(&vec![0; length]), None);
        }
    }
}
