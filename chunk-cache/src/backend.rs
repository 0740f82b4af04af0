//! RocksDB as this store uses it: column families, options, and the few operations needed.
//!
//! Small rows go through the write-ahead log like any others. Payloads never do: the family [`Family::Payload`] only
//! receives finished files, is never compacted and has no background work that damage in it could stop.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use rocksdb::{
    BlockBasedOptions, BottommostLevelCompaction, Cache, ChecksumType, ColumnFamily, ColumnFamilyDescriptor,
    CompactOptions, DB, DBCompressionType, DBPinnableSlice, DBRecoveryMode, IngestExternalFileOptions, LogLevel,
    Options, ReadOptions, SstFileWriter, WriteBatch, WriteOptions,
};

use crate::direct::Places;
use crate::error::{Fault, StoreError, classify};

const MIB: usize = 1 << 20;
/// How long opening the database anew waits for readers to let go of what they hold.
const LAST_READER: Duration = Duration::from_secs(2);

/// The column families.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Family {
    /// That this is a store, and its byte budget: one row each.
    Meta,
    /// Fingerprint and layout -> model.
    Models,
    /// Chunk key -> row. A chunk with a row here is visible.
    Chunks,
    /// Chunk key -> last use and hits.
    Usage,
    /// First chunk number of a payload file -> what it held when it was written.
    Segments,
    /// Chunk number and layer -> payload.
    Payload,
}

impl Family {
    pub(crate) const ALL: [Family; 6] =
        [Family::Meta, Family::Models, Family::Chunks, Family::Usage, Family::Segments, Family::Payload];
    /// Those whose rows are written one by one.
    pub(crate) const ROWS: [Family; 5] =
        [Family::Meta, Family::Models, Family::Chunks, Family::Usage, Family::Segments];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Family::Meta => "meta",
            Family::Models => "models",
            Family::Chunks => "chunks",
            Family::Usage => "usage",
            Family::Segments => "segments",
            Family::Payload => "payload",
        }
    }

    fn options(self) -> Options {
        let mut options = Options::default();
        // bf16 state does not shrink under a general compressor; the rest is tiny.
        options.set_compression_type(DBCompressionType::None);
        options.set_write_buffer_size(4 * MIB);
        if self == Family::Payload {
            options.set_disable_auto_compactions(true);
            options.set_block_based_table_factory(&payload_tables());
        }
        options
    }
}

/// One value fills one block, which is read into memory of its own and handed out as it is: RocksDB does so for blocks that
/// are entered in a cache, so there is one, and it keeps nothing.
fn payload_tables() -> BlockBasedOptions {
    let mut tables = BlockBasedOptions::default();
    tables.set_checksum_type(ChecksumType::XXH3);
    tables.set_block_cache(&Cache::new_lru_cache(0));
    tables
}

/// Key of one layer of a chunk's payload. Big-endian, so that a file's rows lie in the order in which they are written.
pub(crate) fn payload_key(number: u64, layer: u32) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    bytes[8..].copy_from_slice(&layer.to_be_bytes());
    bytes
}

/// The chunk number of a payload's key; `None` when it is none.
pub(crate) fn payload_number(key: &[u8]) -> Option<u64> {
    let (number, layer) = key.split_first_chunk::<8>()?;
    (layer.len() == 4).then_some(u64::from_be_bytes(*number))
}

/// How much damage to put up with when opening.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
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

/// When a write must be safe against power failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sync {
    Now,
    Later,
}

/// A row, and its value unless it is deleted.
pub(crate) type Change = (Family, Vec<u8>, Option<Vec<u8>>);

/// A payload file as the database knows it.
#[derive(Debug, Clone)]
pub(crate) struct PayloadFile {
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) path: PathBuf,
    /// Whether a file of its full size is there.
    pub(crate) present: bool,
}

/// An open database.
pub(crate) struct Backend {
    /// `None` after it could not be opened anew.
    db: RwLock<Option<Arc<DB>>>,
    path: PathBuf,
    access: Access,
    /// A write failed: what RocksDB does with the next one depends on where, so the database is opened anew before.
    suspect: AtomicBool,
    /// What was written, for tests that lose a part of it.
    #[cfg(test)]
    pub(crate) journal: crate::tests::power::Journal,
}

impl Backend {
    /// Opens the database, creating what is missing where it may, and saving what can be saved when it is damaged: then
    /// the second value says what RocksDB objected to. Families of other programs or versions are opened too, so that the
    /// caller can say what it found.
    pub(crate) fn open(path: &Path, access: Access) -> Result<(Backend, Option<String>), StoreError> {
        let (db, salvaged) = open_or_salvage(path, access)?;
        let backend = Backend {
            db: RwLock::new(Some(Arc::new(db))),
            path: path.to_path_buf(),
            access,
            suspect: AtomicBool::new(false),
            #[cfg(test)]
            journal: Default::default(),
        };
        Ok((backend, salvaged))
    }

    /// Removes all files of the database. Needs no space on the disk, and that nobody has it open.
    pub(crate) fn destroy(path: &Path) -> Result<(), StoreError> {
        DB::destroy(&Options::default(), path)
            .map_err(|error| StoreError::from_rocksdb(error, "removing all chunks", path))
    }

    /// Names of the column families in the directory; empty where they cannot be read.
    pub(crate) fn families(path: &Path) -> Vec<String> {
        DB::list_cf(&Options::default(), path).unwrap_or_default()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn fail(&self, action: &'static str) -> impl Fn(rocksdb::Error) -> StoreError {
        move |error| StoreError::from_rocksdb(error, action, &self.path)
    }

    fn db(&self) -> Result<Arc<DB>, StoreError> {
        let db = self.db.read().unwrap_or_else(PoisonError::into_inner);
        db.clone().ok_or_else(|| StoreError::Closed { path: self.path.clone() })
    }

    /// Whether a write has failed since the database was opened.
    pub(crate) fn is_suspect(&self) -> bool {
        self.suspect.load(Ordering::Acquire) || self.db.read().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    fn doubt<T>(&self, outcome: Result<T, StoreError>) -> Result<T, StoreError> {
        if outcome.is_err() {
            self.suspect.store(true, Ordering::Release);
        }
        outcome
    }

    /// Closes and opens the database: that ends whatever state a failed write or background work has left it in.
    pub(crate) fn reopen(&self) -> Result<(), StoreError> {
        self.replace(&[])
    }

    /// As [`reopen`](Self::reopen), and writes these families anew from what can be read of them.
    pub(crate) fn rebuild(&self, families: &[Family]) -> Result<(), StoreError> {
        self.replace(families)
    }

    fn replace(&self, rebuilt: &[Family]) -> Result<(), StoreError> {
        let since = Instant::now();
        let mut slot = loop {
            let slot = self.db.write().unwrap_or_else(PoisonError::into_inner);
            // Nobody else can get hold of it while the lock is held.
            if slot.as_ref().is_none_or(|db| Arc::strong_count(db) == 1) {
                break slot;
            }
            drop(slot);
            if since.elapsed() > LAST_READER {
                return Err(StoreError::Busy { path: self.path.clone() });
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        drop(slot.take());
        let (mut db, salvaged) = open_or_salvage(&self.path, self.access)?;
        tracing::warn!(path = %self.path.display(), ?salvaged, "the chunk store's database was opened anew");
        for family in rebuilt {
            rebuild_family(&mut db, *family).map_err(self.fail("rebuilding the catalogue"))?;
        }
        *slot = Some(Arc::new(db));
        self.suspect.store(false, Ordering::Release);
        Ok(())
    }

    pub(crate) fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let db = self.db()?;
        let row = db.get_pinned_cf_opt(handle(&db, family), key, &read_options());
        Ok(row.map_err(self.fail("reading a row"))?.map(|row| row.to_vec()))
    }

    /// One layer of a payload, in the memory that RocksDB read it into; covered by its checksum.
    pub(crate) fn payload(&self, number: u64, layer: u32) -> Result<Option<PinnedValue>, StoreError> {
        let db = self.db()?;
        // SAFETY: the database lives as long as the value that owns a share of it and lets go of the slice first.
        let shared: &'static DB = unsafe { &*Arc::as_ptr(&db) };
        let found = shared
            .get_pinned_cf_opt(handle(shared, Family::Payload), payload_key(number, layer), &read_options())
            .map_err(self.fail("reading a payload"))?;
        Ok(found.map(|slice| PinnedValue { slice, _db: db }))
    }

    /// Writes rows, all or none. With `Sync::Later` they survive the death of the process, but a power failure
    /// only after the next synced write.
    pub(crate) fn write(&self, action: &'static str, changes: &[Change], sync: Sync) -> Result<(), StoreError> {
        let db = self.db()?;
        let mut batch = WriteBatch::default();
        for (family, key, value) in changes {
            match value {
                Some(value) => batch.put_cf(handle(&db, *family), key, value),
                None => batch.delete_cf(handle(&db, *family), key),
            }
        }
        let mut options = WriteOptions::default();
        options.set_sync(sync == Sync::Now);
        self.doubt(db.write_opt(batch, &options).map_err(self.fail(action)))?;
        #[cfg(test)]
        self.journal.wrote(changes.iter().cloned(), sync);
        Ok(())
    }

    /// Takes a finished file of these chunk numbers over into the payload family; the file is gone from where it was.
    /// Safe when this returns.
    pub(crate) fn ingest(&self, file: &Path, numbers: std::ops::RangeInclusive<u64>) -> Result<(), StoreError> {
        let db = self.db()?;
        let mut options = IngestExternalFileOptions::default();
        options.set_move_files(true);
        options.set_snapshot_consistency(false);
        options.set_allow_blocking_flush(false);
        let taken = db.ingest_external_file_cf_opts(handle(&db, Family::Payload), &options, vec![file]);
        self.doubt(taken.map_err(self.fail("adding a payload file")))?;
        tracing::debug!(?numbers, "payload file added");
        #[cfg(test)]
        self.journal.added(numbers.clone().flat_map(|number| self.payload_rows(number)));
        Ok(())
    }

    /// Drops the payload files that lie wholly between these chunk numbers, both included.
    pub(crate) fn drop_files(&self, first: u64, last: u64) -> Result<(), StoreError> {
        let db = self.db()?;
        let (from, to) = (payload_key(first, 0), payload_key(last, u32::MAX));
        let dropped = db.delete_file_in_range_cf(handle(&db, Family::Payload), from, to);
        self.doubt(dropped.map_err(self.fail("dropping a payload file")))?;
        #[cfg(test)]
        self.journal.dropped(first, last);
        Ok(())
    }

    /// All rows of a chunk's payload.
    #[cfg(test)]
    fn payload_rows(&self, number: u64) -> Vec<(Vec<u8>, Vec<u8>)> {
        let rows = (0..).map_while(|layer| {
            let value = self.payload(number, layer).ok().flatten()?;
            Some((payload_key(number, layer).to_vec(), value.as_ref().to_vec()))
        });
        rows.collect()
    }

    /// Moves all rows from the log into table files; the log's files go.
    pub(crate) fn flush(&self) -> Result<(), StoreError> {
        let db = self.db()?;
        for family in Family::ROWS {
            self.doubt(db.flush_cf(handle(&db, family)).map_err(self.fail("writing the catalogue")))?;
        }
        Ok(())
    }

    /// Merges the tables of the small families, so that nothing is left of removed rows.
    pub(crate) fn merge_rows(&self) -> Result<(), StoreError> {
        self.flush()?;
        let db = self.db()?;
        let mut options = CompactOptions::default();
        options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
        for family in Family::ROWS {
            db.compact_range_cf_opt(handle(&db, family), None::<&[u8]>, None::<&[u8]>, &options);
        }
        Ok(())
    }

    /// Visits all rows of a family that can be read. Returns what could not be, in RocksDB's words.
    pub(crate) fn scan(
        &self,
        family: Family,
        visit: &mut dyn FnMut(&[u8], &[u8]),
    ) -> Result<Option<String>, StoreError> {
        Ok(scan_rows(&*self.db()?, family, visit).err().map(|error| format!("{}: {error}", family.name())))
    }

    /// The payload files, in the order of their chunk numbers. Nothing of them is read.
    pub(crate) fn payload_files(&self) -> Result<Vec<PayloadFile>, StoreError> {
        let live = self.db()?.live_files().map_err(self.fail("listing payload files"))?;
        let of_payload = live.into_iter().filter(|file| file.column_family_name == Family::Payload.name());
        let mut files: Vec<PayloadFile> = of_payload
            .filter_map(|file| {
                let (first, last) = (payload_number(&file.start_key?)?, payload_number(&file.end_key?)?);
                let path = self.path.join(file.name.trim_start_matches('/'));
                let present = std::fs::metadata(&path).is_ok_and(|found| found.len() >= file.size as u64);
                Some(PayloadFile { first, last, path, present })
            })
            .collect();
        files.sort_unstable_by_key(|file| file.first);
        Ok(files)
    }

    /// Bytes of table files on disk, dead ones included.
    pub(crate) fn disk_bytes(&self) -> u64 {
        let Ok(db) = self.db() else { return 0 };
        let of_family = |family| {
            let value = db.property_int_value_cf(handle(&db, family), "rocksdb.total-sst-files-size");
            value.ok().flatten().unwrap_or(0)
        };
        Family::ALL.into_iter().map(of_family).sum()
    }
}

/// A value in memory that RocksDB filled, and the database that it belongs to.
pub(crate) struct PinnedValue {
    // Dropped first.
    slice: DBPinnableSlice<'static>,
    _db: Arc<DB>,
}

impl AsRef<[u8]> for PinnedValue {
    fn as_ref(&self) -> &[u8] {
        &self.slice
    }
}

/// Puts a row, key and value, into a payload file; keys ascend.
pub(crate) type PutRow<'a> = dyn FnMut(&[u8], &[u8]) -> Result<(), rocksdb::Error> + 'a;

/// Writes a payload file and syncs it. `fill` puts rows in ascending order of their keys; without any, no file is made.
/// Returns where each value lies (zero: not known). On failure no file is left.
pub(crate) fn write_payload_file(
    file: &Path,
    fill: impl FnOnce(&mut PutRow<'_>) -> Result<(), StoreError>,
) -> Result<Vec<u64>, StoreError> {
    let options = Family::Payload.options();
    let fail = |error| StoreError::from_rocksdb(error, "writing a payload file", file);
    let write = || {
        let mut writer = SstFileWriter::create(&options);
        writer.open(file).map_err(fail)?;
        let mut places = Places::default();
        fill(&mut |key, value| {
            places.add(key, value);
            writer.put(key, value)
        })?;
        if !places.is_empty() {
            writer.finish().map_err(fail)?;
        }
        Ok(places)
    };
    let written = write();
    if !written.as_ref().is_ok_and(|places| !places.is_empty()) {
        let _ = std::fs::remove_file(file);
    }
    Ok(written?.confirmed(file))
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
    options.set_max_total_wal_size(16 * MIB as u64);
    options.set_max_manifest_file_size(4 * MIB);
    options.set_max_open_files(512);
    options.set_max_background_jobs(2);
    options.set_bytes_per_sync(MIB as u64);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(MIB);
    options.set_log_level(LogLevel::Warn);
    // Reading the properties of every table would touch every payload file.
    options.set_skip_stats_update_on_db_open(true);
    options
}

fn open_database(path: &Path, mode: Mode, access: Access) -> Result<DB, rocksdb::Error> {
    let options = db_options(mode, access);
    let mut names: Vec<String> = Family::ALL.map(|family| family.name().to_owned()).to_vec();
    // A fresh directory has no families to list; a damaged one fails again, and better, below.
    for name in Backend::families(path) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let descriptors = names.into_iter().map(|name| {
        let known = Family::ALL.into_iter().find(|family| family.name() == name);
        ColumnFamilyDescriptor::new(name, known.map_or_else(Options::default, Family::options))
    });
    match access {
        Access::Write => DB::open_cf_descriptors(&options, path, descriptors),
        Access::Read => DB::open_cf_descriptors_read_only(&options, path, descriptors, false),
    }
}

fn open_or_salvage(path: &Path, access: Access) -> Result<(DB, Option<String>), StoreError> {
    let first = match open_database(path, Mode::Strict, access) {
        Ok(db) => return Ok((db, None)),
        Err(error) => error,
    };
    if classify(&first.kind(), first.as_ref()) != Fault::Damage {
        return Err(StoreError::from_rocksdb(first, "opening", path));
    }
    match open_database(path, Mode::Salvage, access) {
        Ok(db) => {
            let detail = first.to_string();
            tracing::warn!(path = %path.display(), detail, "damaged chunk store: kept what is readable");
            Ok((db, Some(detail)))
        }
        Err(second) => Err(StoreError::from_rocksdb(second, "opening", path)),
    }
}

fn handle(db: &DB, family: Family) -> &ColumnFamily {
    db.cf_handle(family.name()).expect("every family is opened or created with the database")
}

fn read_options() -> ReadOptions {
    let mut options = ReadOptions::default();
    options.set_verify_checksums(true);
    options
}

/// Visits the rows of a family. Behind a place that cannot be read it goes on where keys have other first bits, so that
/// little is lost of keys that are hashes.
fn scan_rows(db: &DB, family: Family, visit: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), rocksdb::Error> {
    const BITS: u32 = 12;
    let mut rows = db.raw_iterator_cf_opt(handle(db, family), read_options());
    let mut first_error = Ok(());
    let mut bucket: u32 = 0;
    rows.seek_to_first();
    loop {
        while let Some((key, value)) = rows.item() {
            visit(key, value);
            bucket = key.get(..2).map_or(bucket, |bits| u32::from(bits[0]) << 8 | u32::from(bits[1])) >> (16 - BITS);
            rows.next();
        }
        match rows.status() {
            Ok(()) => return first_error,
            Err(error) => first_error = first_error.and(Err(error)),
        }
        bucket += 1;
        if bucket >= 1 << BITS {
            return first_error;
        }
        rows.seek(((bucket << (16 - BITS)) as u16).to_be_bytes());
    }
}

/// Replaces a family by what can be read of it. A crash within costs its rows: then chunks are computed again.
fn rebuild_family(db: &mut DB, family: Family) -> Result<(), rocksdb::Error> {
    let mut batch = Vec::new();
    let _ = scan_rows(db, family, &mut |key, value| batch.push((key.to_vec(), value.to_vec())));
    db.drop_cf(family.name())?;
    db.create_cf(family.name(), &family.options())?;
    let mut rows = WriteBatch::default();
    for (key, value) in batch {
        rows.put_cf(handle(db, family), key, value);
    }
    let mut options = WriteOptions::default();
    options.set_sync(true);
    db.write_opt(rows, &options)?;
    db.flush_cf(handle(db, family))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payload_keys_sort_by_number_then_layer_and_give_the_number_back() {
        assert_eq!(payload_number(&payload_key(258, 3)), Some(258));
        assert!(payload_key(1, u32::MAX) < payload_key(2, 0));
        assert!(payload_key(7, 255) < payload_key(7, 256));
        for length in [0, 8, 11, 13] {
            assert_eq!(payload_number(&vec![0; length]), None);
        }
    }
}
