//! Opening a store: is the directory usable, what did the last process leave behind.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::backend::{Access, Backend, Change, Family, Sync};
use crate::catalogue::{DamagedChunk, Entry, Segment, State};
use crate::disk::RESERVE_FILE;
use crate::error::StoreError;
use crate::eviction::SegmentBytes;
use crate::format::{FormatError, VERSION};
use crate::key::ChunkKey;
use crate::records::{Budget, ChunkRow, ModelInfo, SegmentRow, Usage, decode_store, encode_store};
use crate::writer::INCOMING;

const STORE_ROW: &[u8] = b"identity";
pub(crate) const BUDGET_ROW: &[u8] = b"budget";

/// What opening a store found and did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// Set when the directory was damaged and what could be saved was saved: what RocksDB objected to.
    /// Chunks may be missing; those that are present are whole.
    pub salvaged: Option<String>,
    /// Payload files without a row: writes that were cut short. Opening for writing drops them.
    pub orphans: u64,
    /// Chunks whose payload file is gone or cut. They are absent; opening for writing removes their rows.
    pub lost: u64,
    /// Chunks whose row is damaged. They count as absent until stored anew.
    pub damaged: Vec<DamagedChunk>,
    /// Parts of the catalogue that could not be read, in RocksDB's words. Opening for writing writes it anew.
    pub unreadable: Vec<String>,
    /// A sentence for the user when the directory held a store of an earlier layout, whose chunks were dropped.
    pub dropped: Option<String>,
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
        return refuse_foreign_database(path).map(|()| true);
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
        let ours = ["LOCK", "LOG", "IDENTITY", "MANIFEST-", "OPTIONS-", INCOMING, RESERVE_FILE];
        let harmless = ours.iter().any(|start| name.starts_with(start));
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

/// A RocksDB database with other families than a store's is some other program's.
fn refuse_foreign_database(path: &Path) -> Result<(), StoreError> {
    let found = Backend::families(path);
    let ours = |name: &String| name == Family::Payload.name() || name == crate::legacy::FAMILY;
    if found.iter().any(ours) || found.iter().all(|name| name == "default") {
        return Ok(());
    }
    Err(StoreError::ForeignStore {
        what: "program",
        expected: "a chunk store or an empty directory".to_owned(),
        found: format!("a database with the families {}", found.join(", ")),
        path: path.to_path_buf(),
    })
}

/// Refuses a store of a newer format, and marks a fresh one. A mark that cannot be read is written again.
pub(crate) fn check_mark(backend: &Backend, access: Access) -> Result<(), StoreError> {
    let path = backend.path();
    let problem = match backend.get(Family::Meta, STORE_ROW) {
        Ok(Some(row)) => match decode_store(&row) {
            Ok(()) => return Ok(()),
            Err(FormatError { newer: Some(found), .. }) => {
                return Err(StoreError::NewerFormat { found, supported: VERSION, path: path.to_path_buf() });
            }
            Err(error) => Some(format!("expected {}, found {}", error.expected, error.found)),
        },
        Ok(None) => None,
        Err(error) if error.is_damage() => Some(error.to_string()),
        Err(error) => return Err(error),
    };
    if let Some(problem) = problem {
        tracing::warn!(problem, "the mark of the chunk store is damaged");
    }
    if access == Access::Read {
        return Ok(());
    }
    let mark = (Family::Meta, STORE_ROW.to_vec(), Some(encode_store()));
    backend.write("marking the store", &[mark], Sync::Now)
}

/// The budget that the store keeps; `None` if it has none, or none that can be read.
pub(crate) fn read_budget(backend: &Backend) -> Result<Option<u64>, StoreError> {
    let row = match backend.get(Family::Meta, BUDGET_ROW) {
        Err(error) if error.is_damage() => None,
        row => row?,
    };
    match row.map(|row| Budget::decode(&row)) {
        Some(Ok(budget)) => Ok(Some(budget.0)),
        Some(Err(error)) => {
            tracing::warn!(expected = error.expected, found = error.found, "the byte budget of the store is damaged");
            Ok(None)
        }
        None => Ok(None),
    }
}

pub(crate) fn write_budget(backend: &Backend, budget: u64) -> Result<(), StoreError> {
    let row = (Family::Meta, BUDGET_ROW.to_vec(), Some(Budget(budget).encode()));
    backend.write("writing the byte budget", &[row], Sync::Now)
}

/// Removes what an earlier process had not finished writing, and makes the folder for it.
pub(crate) fn clear_incoming(path: &Path) -> Result<(), StoreError> {
    let incoming = path.join(INCOMING);
    let fail = |error| StoreError::from_io(error, "cannot prepare the folder of unfinished files", &incoming);
    if incoming.exists() {
        fs::remove_dir_all(&incoming).map_err(fail)?;
    }
    fs::create_dir(&incoming).map_err(fail)
}

/// Reads the catalogue; no payload is touched. Where it may, it drops payload files that nobody claims, removes rows
/// whose payload is gone, and writes anew the families that cannot be read whole.
pub(crate) fn recover(backend: &Backend, access: Access, report: &mut OpenReport) -> Result<State, StoreError> {
    let mut recovery = Recovery { backend, report, broken: Vec::new(), sweep: Vec::new() };
    let mut state = State::default();
    state.models = recovery.models()?;
    let gone = recovery.segments(&mut state)?;
    let usage = recovery.usage()?;
    recovery.chunks(&mut state, usage)?;
    let Recovery { broken, sweep, .. } = recovery;
    let unclaimed: Vec<u64> =
        state.segments.iter().filter(|(_, s)| s.bytes.live == 0).map(|(first, _)| *first).collect();
    report.damaged = state.damaged.values().cloned().collect();
    report.damaged.sort_by_key(|damage| damage.key);
    for damage in &report.damaged {
        tracing::warn!(key = %damage.key, expected = damage.expected, found = damage.found, "damaged chunk");
    }
    if access == Access::Read {
        return Ok(state);
    }
    for (first, last) in gone {
        backend.drop_files(first, last)?;
    }
    for first in unclaimed {
        if let Some(segment) = state.segments.remove(&first) {
            backend.drop_files(first, segment.last)?;
        }
    }
    if !broken.is_empty() {
        backend.rebuild(&broken)?;
    }
    if !sweep.is_empty() {
        backend.write("sweeping the catalogue", &sweep, Sync::Later)?;
    }
    Ok(state)
}

/// What reading the catalogue has found so far.
struct Recovery<'a> {
    backend: &'a Backend,
    report: &'a mut OpenReport,
    /// Families that cannot be read whole.
    broken: Vec<Family>,
    /// Rows that mean nothing any more.
    sweep: Vec<Change>,
}

impl Recovery<'_> {
    fn scan(&mut self, family: Family, visit: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), StoreError> {
        if let Some(problem) = self.backend.scan(family, visit)? {
            tracing::warn!(problem, "part of the chunk store's catalogue cannot be read");
            self.report.unreadable.push(problem);
            self.broken.push(family);
        }
        Ok(())
    }

    fn models(&mut self) -> Result<Vec<ModelInfo>, StoreError> {
        let mut models = Vec::new();
        self.scan(Family::Models, &mut |_, row| match ModelInfo::decode(row) {
            Ok(model) => models.push(model),
            Err(error) => tracing::warn!(expected = error.expected, found = error.found, "a model's row is damaged"),
        })?;
        Ok(models)
    }

    /// Enters the payload files that are there whole. Returns the others.
    fn segments(&mut self, state: &mut State) -> Result<Vec<(u64, u64)>, StoreError> {
        let mut rows: HashMap<u64, SegmentRow> = HashMap::new();
        let mut odd = Vec::new();
        self.scan(Family::Segments, &mut |key, row| {
            let first = <[u8; 8]>::try_from(key).map(u64::from_be_bytes);
            match (first, SegmentRow::decode(row)) {
                (Ok(first), Ok(row)) => drop(rows.insert(first, row)),
                _ => odd.push(key.to_vec()),
            }
        })?;
        let mut gone = Vec::new();
        for file in self.backend.payload_files()? {
            let row = rows.remove(&file.first);
            let last = row.map_or(file.last, |row| row.last.max(file.last));
            state.next_number = state.next_number.max(last + 1);
            if !file.present {
                gone.push((file.first, last));
                continue;
            }
            let total = row.map_or(0, |row| row.payload_bytes);
            state.segments.insert(file.first, Segment { last, bytes: SegmentBytes { total, live: 0 } });
            self.report.orphans += u64::from(row.is_none());
        }
        // What is left speaks of files that are gone.
        let stale = rows.keys().map(|first| first.to_be_bytes().to_vec());
        self.sweep.extend(stale.chain(odd).map(|key| (Family::Segments, key, None)));
        Ok(gone)
    }

    fn usage(&mut self) -> Result<HashMap<ChunkKey, Usage>, StoreError> {
        let mut usage = HashMap::new();
        let mut odd = Vec::new();
        self.scan(Family::Usage, &mut |row_key, row| {
            let read = ChunkKey::from_bytes(row_key).and_then(|key| Some((key, Usage::decode(row, &key).ok()?)));
            match read {
                Some((key, read)) => drop(usage.insert(key, read)),
                // A damaged row costs a worse choice of victims, nothing else.
                None => odd.push(row_key.to_vec()),
            }
        })?;
        self.sweep.extend(odd.into_iter().map(|key| (Family::Usage, key, None)));
        Ok(usage)
    }

    /// Makes the chunks visible whose rows are whole and whose payload files are there.
    fn chunks(&mut self, state: &mut State, mut usage: HashMap<ChunkKey, Usage>) -> Result<(), StoreError> {
        let mut lost = Vec::new();
        let mut claimed = HashSet::new();
        self.scan(Family::Chunks, &mut |row_key, row| {
            let Some(key) = ChunkKey::from_bytes(row_key) else {
                lost.push(row_key.to_vec());
                return;
            };
            match ChunkRow::decode(row, &key) {
                Ok(row) => match state.segment_of(row.number) {
                    Some(segment) => {
                        claimed.insert(segment);
                        let used = usage.remove(&key);
                        let entry = entry(state, &row, used);
                        state.insert(key, entry);
                    }
                    None => lost.push(row_key.to_vec()),
                },
                Err(error) => {
                    usage.remove(&key);
                    state.damaged.insert(key, crate::reading::damage(key, None, error));
                }
            }
        })?;
        self.report.lost = lost.len() as u64;
        if !lost.is_empty() {
            tracing::warn!(chunks = lost.len(), "payload files of cached chunks are gone");
        }
        // A file that chunks lie in is no unfinished write, whatever became of its own row.
        let unclaimed = |first: &&u64| !claimed.contains(*first);
        self.report.orphans = self.report.orphans.min(state.segments.keys().filter(unclaimed).count() as u64);
        self.sweep.extend(lost.into_iter().map(|key| (Family::Chunks, key, None)));
        self.sweep.extend(usage.keys().map(|key| (Family::Usage, key.to_bytes().to_vec(), None)));
        Ok(())
    }
}

fn entry(state: &mut State, row: &ChunkRow, usage: Option<Usage>) -> Entry {
    let model = state.model_index(&row.model, &row.shape).unwrap_or_else(|| {
        // Its row is lost; only the name was in it alone.
        state.enter_model(&ModelInfo { fingerprint: row.model, name: "unknown".to_owned(), shape: row.shape })
    });
    let stored = Usage { last_used_micros: row.created_unix.saturating_mul(1_000_000), ..Usage::default() };
    Entry {
        number: row.number,
        tokens: row.tokens,
        bytes: row.payload_bytes(),
        created_unix: row.created_unix,
        model,
        codec: row.codec,
        usage: usage.unwrap_or(stored),
    }
}
