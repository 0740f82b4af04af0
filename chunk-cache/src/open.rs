//! Opening a store: is the directory usable, whose is it, what did the last process leave behind.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::backend::{Access, Backend, Family, HEAD_ROW, Mode, Sync, row_key, split_row_key};
use crate::catalogue::{DamagedChunk, State};
use crate::error::{Fault, StoreError, classify};
use crate::format::{FormatError, VERSION};
use crate::key::ChunkKey;
use crate::records::{Budget, Identity, Manifest, Usage};
use crate::shape::KvShape;

const IDENTITY_ROW: &[u8] = b"identity";
const BUDGET_ROW: &[u8] = b"budget";

/// What opening a store found and did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// Set when the directory was damaged and what could be saved was saved: what RocksDB objected to.
    /// Chunks may be missing; those that are present are whole.
    pub salvaged: Option<String>,
    /// Payloads without a manifest: writes or removals that were cut short. Opening for writing deletes them.
    pub orphans: u64,
    /// Chunks whose manifest or payload is damaged. They count as absent until stored anew.
    pub damaged: Vec<DamagedChunk>,
    /// Parts of the directory that could not be read, in RocksDB's words.
    pub unreadable: Vec<String>,
}

/// Creates the directory where needed and finds out whether it can be written, before RocksDB does, so
/// that the error is ours.
pub(crate) fn prepare_directory(path: &Path) -> Result<(), StoreError> {
    let fail = |action| move |error| StoreError::from_io(error, action, path);
    if !path.exists() {
        fs::create_dir_all(path).map_err(fail("cannot create the directory"))?;
        if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            // The new entry itself must survive a power failure.
            let synced = fs::File::open(parent).and_then(|dir| dir.sync_all());
            synced.map_err(fail("cannot sync the directory above"))?;
        }
    }
    holds_store(path)?;
    // Named by process and turn: two openings at once must not take each other's file away.
    static TURN: AtomicU64 = AtomicU64::new(0);
    let (process, turn) = (std::process::id(), TURN.fetch_add(1, Ordering::Relaxed));
    let probe = path.join(format!("write-probe-{process}-{turn}.tmp"));
    fs::write(&probe, b"").map_err(fail("cannot write to the directory"))?;
    fs::remove_file(&probe).map_err(fail("cannot write to the directory"))
}

/// Whether the directory holds a store. Refuses a directory of something else, and one whose root file is gone:
/// RocksDB would start anew in both.
pub(crate) fn holds_store(path: &Path) -> Result<bool, StoreError> {
    let fail = |error| StoreError::from_io(error, "cannot list the directory", path);
    if path.join("CURRENT").exists() {
        return Ok(true);
    }
    for entry in fs::read_dir(path).map_err(fail)? {
        let name = entry.map_err(fail)?.file_name();
        let name = name.to_string_lossy();
        if [".sst", ".blob", ".log"].iter().any(|end| name.ends_with(end)) {
            return Err(StoreError::Damaged {
                path: path.to_path_buf(),
                detail: format!("the file CURRENT is missing beside {name}"),
            });
        }
        let harmless = ["LOCK", "LOG", "IDENTITY", "MANIFEST-", "OPTIONS-"].iter().any(|start| name.starts_with(start));
        if !harmless && !name.ends_with("tmp") {
            return Err(StoreError::ForeignStore {
                what: "program",
                expected: "a chunk store or an empty directory".to_owned(),
                found: format!("a directory with the file {name:?}"),
                path: path.to_path_buf(),
            });
        }
    }
    Ok(false)
}

/// Whether another process has the store open for writing. Asking leaves no trace.
pub(crate) fn is_in_use(path: &Path) -> Result<bool, StoreError> {
    use rustix::process::{Flock, FlockType, fcntl_getlk};
    let lock = path.join("LOCK");
    let fail = |error| StoreError::from_io(error, "cannot look at the lock", &lock);
    let file = match fs::File::open(&lock) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(fail(error)),
    };
    let holder = fcntl_getlk(&file, &Flock::from(FlockType::WriteLock)).map_err(|error| fail(error.into()))?;
    Ok(holder.is_some_and(|lock| lock.typ != FlockType::Unlocked))
}

/// Opens the database, saving what can be saved when it is damaged.
pub(crate) fn open_backend(path: &Path, access: Access) -> Result<(Backend, Option<String>), StoreError> {
    let first = match Backend::open(path, Mode::Strict, access) {
        Ok(backend) => return Ok((backend, None)),
        Err(error) => error,
    };
    if classify(&first.kind(), first.as_ref()) != Fault::Damage {
        return Err(StoreError::from_rocksdb(first, "opening", path));
    }
    match Backend::open(path, Mode::Salvage, access) {
        Ok(backend) => {
            let detail = first.to_string();
            tracing::warn!(path = %path.display(), detail, "damaged chunk store: kept what is readable");
            Ok((backend, Some(detail)))
        }
        Err(second) => Err(StoreError::from_rocksdb(second, "opening", path)),
    }
}

/// What the store says that it belongs to; `None` for a fresh one.
pub(crate) fn read_identity(backend: &Backend) -> Result<Option<Identity>, StoreError> {
    let path = backend.path();
    let row = backend.get(Family::Meta, IDENTITY_ROW).map_err(backend.fail("reading the store's identity"))?;
    let Some(row) = row else {
        refuse_nameless_chunks(backend)?;
        return Ok(None);
    };
    let found = Identity::decode(&row).map_err(|error| match error.newer {
        Some(found) => StoreError::NewerFormat { found, supported: VERSION, path: path.to_path_buf() },
        None => damaged_identity(path, &error),
    })?;
    Ok(Some(found))
}

/// Compares what a store belongs to with what is wanted.
pub(crate) fn check_identity(path: &Path, found: &Identity, wanted: &Identity) -> Result<(), StoreError> {
    let foreign =
        |what, expected, found| Err(StoreError::ForeignStore { what, expected, found, path: path.to_path_buf() });
    if found.model != wanted.model {
        return foreign("model", describe(wanted), describe(found));
    }
    if found.shape != wanted.shape {
        return foreign("KV layout", wanted.shape.to_string(), found.shape.to_string());
    }
    Ok(())
}

/// The budget that the store keeps; `None` if it has none, or none that can be read.
pub(crate) fn read_budget(backend: &Backend, shape: &KvShape) -> Result<Option<u64>, StoreError> {
    let row = backend.get(Family::Meta, BUDGET_ROW).map_err(backend.fail("reading the byte budget"))?;
    match row.map(|row| Budget::decode(&row, shape)) {
        Some(Ok(budget)) => Ok(Some(budget.0)),
        Some(Err(error)) => {
            tracing::warn!(expected = error.expected, found = error.found, "the byte budget of the store is damaged");
            Ok(None)
        }
        None => Ok(None),
    }
}

pub(crate) fn write_budget(backend: &Backend, shape: &KvShape, budget: u64) -> Result<(), StoreError> {
    let row = Budget(budget).encode(shape);
    backend.put(Family::Meta, BUDGET_ROW, &row, Sync::Now).map_err(backend.fail("writing the byte budget"))
}

fn damaged_identity(path: &Path, error: &FormatError) -> StoreError {
    StoreError::Damaged {
        path: path.to_path_buf(),
        detail: format!("the store's identity: expected {}, found {}", error.expected, error.found),
    }
}

fn describe(identity: &Identity) -> String {
    let [a, b, c, d, ..] = identity.model;
    let name = &identity.model_name;
    format!("{name} ({a:02x}{b:02x}{c:02x}{d:02x})")
}

fn refuse_nameless_chunks(backend: &Backend) -> Result<(), StoreError> {
    for family in [Family::Manifest, Family::Kv, Family::Usage] {
        let mut rows = backend.scan(family);
        rows.seek_to_first();
        if rows.valid() || rows.status().is_err() {
            return Err(StoreError::Damaged {
                path: backend.path().to_path_buf(),
                detail: "chunks are present, but the store's identity is gone".to_owned(),
            });
        }
    }
    Ok(())
}

pub(crate) fn write_identity(backend: &Backend, identity: &Identity) -> Result<(), StoreError> {
    let fail = backend.fail("writing the store's identity");
    backend.put(Family::Meta, IDENTITY_ROW, &identity.encode(), Sync::Now).map_err(&fail)?;
    // In a table file it is out of the way of whatever happens to the log.
    backend.flush(Family::Meta).map_err(&fail)
}

/// Reads manifests and usage, and sweeps what no manifest claims where it may.
pub(crate) fn recover(
    backend: &Backend,
    shape: &KvShape,
    access: Access,
    report: &mut OpenReport,
) -> Result<State, StoreError> {
    let mut found = Manifests::default();
    let complete = read_manifests(backend, shape, &mut found, report);
    let orphans = walk_payloads(backend, shape, &mut found, complete, report);
    report.orphans = orphans.len() as u64;
    if !orphans.is_empty() && access == Access::Write {
        let rows = orphans.iter().flat_map(|key| payload_rows(key, shape));
        backend.delete(rows, Sync::Later).map_err(backend.fail("sweeping unfinished writes"))?;
    }
    let mut usage = read_usage(backend, shape, &found, access, report)?;
    let mut state = State::default();
    for (key, manifest) in found.whole {
        let usage = usage
            .remove(&key)
            .unwrap_or(Usage { last_used_micros: manifest.created_unix.saturating_mul(1_000_000), hits: 0 });
        state.insert(key, Arc::new(manifest), usage);
    }
    report.damaged = found.damaged.values().cloned().collect();
    report.damaged.sort_by_key(|damage| damage.key);
    for damage in &report.damaged {
        tracing::warn!(key = %damage.key, expected = damage.expected, found = damage.found, "damaged chunk");
    }
    state.damaged = found.damaged;
    Ok(state)
}

/// Every payload row a chunk can have.
pub(crate) fn payload_rows(key: &ChunkKey, shape: &KvShape) -> Vec<(Family, Vec<u8>)> {
    let row = |row| (Family::Kv, row_key(key, row).to_vec());
    (HEAD_ROW..=shape.layers).map(row).collect()
}

#[derive(Default)]
struct Manifests {
    whole: HashMap<ChunkKey, Manifest>,
    damaged: HashMap<ChunkKey, DamagedChunk>,
}

impl Manifests {
    fn knows(&self, key: &ChunkKey) -> bool {
        self.whole.contains_key(key) || self.damaged.contains_key(key)
    }

    fn add(&mut self, key: ChunkKey, manifest: Result<Manifest, FormatError>) {
        match manifest {
            Ok(manifest) => {
                self.whole.insert(key, manifest);
            }
            Err(error) => self.condemn(key, error.expected, error.found),
        }
    }

    fn condemn(&mut self, key: ChunkKey, expected: String, found: String) {
        self.whole.remove(&key);
        let damage = DamagedChunk { key, layer: None, expected, found };
        self.damaged.insert(key, damage);
    }
}

/// True when every row could be read.
fn read_manifests(backend: &Backend, shape: &KvShape, found: &mut Manifests, report: &mut OpenReport) -> bool {
    let mut rows = backend.scan(Family::Manifest);
    rows.seek_to_first();
    while let Some((key, value)) = rows.item() {
        match <[u8; 32]>::try_from(key) {
            Ok(key) => {
                let key = ChunkKey(key);
                found.add(key, Manifest::decode(value, &key, shape));
            }
            Err(_) => report.unreadable.push(format!("a manifest under a key of {} bytes instead of 32", key.len())),
        }
        rows.next();
    }
    finish_scan(rows.status(), "manifests", report)
}

/// Visits the first payload row of every chunk. Returns the chunks without a manifest; manifests without
/// a payload are moved to the damaged ones. `complete` says whether the manifests are all known; if
/// not, the missing ones are asked for one by one.
fn walk_payloads(
    backend: &Backend,
    shape: &KvShape,
    found: &mut Manifests,
    complete: bool,
    report: &mut OpenReport,
) -> Vec<ChunkKey> {
    let mut orphans = Vec::new();
    let mut with_payload = std::collections::HashSet::new();
    let mut rows = backend.scan(Family::Kv);
    rows.seek_to_first();
    while let Some(row) = rows.key() {
        let Some((key, row)) = split_row_key(row) else {
            report.unreadable.push(format!("a payload under a key of {} bytes", row.len()));
            rows.next();
            continue;
        };
        if !found.knows(&key) && !complete {
            match backend.get(Family::Manifest, &key.0) {
                Ok(Some(value)) => found.add(key, Manifest::decode(&value, &key, shape)),
                Ok(None) => {}
                Err(error) => found.condemn(key, "a manifest".to_owned(), error.to_string()),
            }
        }
        if !found.knows(&key) {
            orphans.push(key);
        } else if row == HEAD_ROW {
            with_payload.insert(key);
        }
        match key.successor() {
            Some(next) => rows.seek(row_key(&next, HEAD_ROW)),
            None => break,
        }
    }
    if finish_scan(rows.status(), "payloads", report) {
        let bare = |key: &&ChunkKey| !with_payload.contains(*key);
        for key in found.whole.keys().filter(bare).copied().collect::<Vec<_>>() {
            found.condemn(key, "a payload".to_owned(), "none".to_owned());
        }
    }
    orphans
}

/// Reads when chunks were used, and deletes rows of chunks that are gone where it may.
fn read_usage(
    backend: &Backend,
    shape: &KvShape,
    found: &Manifests,
    access: Access,
    report: &mut OpenReport,
) -> Result<HashMap<ChunkKey, Usage>, StoreError> {
    let mut usage = HashMap::new();
    let mut stale = Vec::new();
    let mut rows = backend.scan(Family::Usage);
    rows.seek_to_first();
    while let Some((row, value)) = rows.item() {
        let key = <[u8; 32]>::try_from(row).map(ChunkKey);
        match key.map(|key| (key, Usage::decode(value, &key, shape))) {
            Ok((key, Ok(read))) if found.knows(&key) => {
                usage.insert(key, read);
            }
            // A damaged row costs a worse choice of victims, nothing else.
            _ => stale.push((Family::Usage, row.to_vec())),
        }
        rows.next();
    }
    finish_scan(rows.status(), "usage", report);
    drop(rows);
    if !stale.is_empty() && access == Access::Write {
        backend.delete(stale, Sync::Later).map_err(backend.fail("sweeping usage records"))?;
    }
    Ok(usage)
}

fn finish_scan(status: Result<(), rocksdb::Error>, what: &str, report: &mut OpenReport) -> bool {
    let Err(error) = status else { return true };
    tracing::warn!(%error, what, "part of the chunk store cannot be read");
    report.unreadable.push(format!("{what}: {error}"));
    false
}
