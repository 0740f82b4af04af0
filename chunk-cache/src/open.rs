//! Opening a store: is the directory usable, what did the last process leave behind.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::backend::{Access, Backend, Family, Sync};
use crate::catalogue::{Catalogue, DamagedChunk, State};
use crate::direct::OpenFiles;
use crate::disk::{RESERVE_FILE, Reserve};
use crate::error::StoreError;
use crate::format::{FormatError, VERSION};
use crate::pending::Mailbox;
use crate::records::{Budget, decode_store, encode_store};
use crate::single_flight::SingleFlight;
use crate::store::{ChunkStore, StoreOptions};
use crate::writer::{Core, INCOMING};
use crate::{legacy, recovery};

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

impl ChunkStore {
    /// Opens the store in the directory `path`, creating it where needed. Unfinished writes of a
    /// process that died are swept; [`open_report`](Self::open_report) tells what was found. No chunk
    /// makes way for being opened. A store of an earlier layout is emptied and keeps its budget; the report says so.
    ///
    /// # Errors
    /// [`StoreError::ForeignStore`] when the directory belongs to another program,
    /// [`NewerFormat`](StoreError::NewerFormat), [`Locked`](StoreError::Locked),
    /// [`ReadOnly`](StoreError::ReadOnly), [`OutOfSpace`](StoreError::OutOfSpace), and
    /// [`Damaged`](StoreError::Damaged) when nothing can be saved.
    pub fn open(path: &Path, options: StoreOptions) -> Result<ChunkStore, StoreError> {
        prepare_directory(path)?;
        ChunkStore::open_prepared(path, options)
    }

    fn open_prepared(path: &Path, options: StoreOptions) -> Result<ChunkStore, StoreError> {
        let old = legacy::drop_store(path)?;
        let (backend, salvaged) = Backend::open(path, Access::Write)?;
        let new_budget = old.as_ref().and_then(|old| old.byte_budget).unwrap_or(options.byte_budget);
        let report = OpenReport { salvaged, dropped: old.map(|old| old.sentence), ..OpenReport::default() };
        ChunkStore::with_backend(backend, Access::Write, report, new_budget)
    }

    /// Opens the store that the directory `path` holds; `None` if there is none, or only one of an earlier layout, whose
    /// chunks cannot be used. A store from before budgets were kept is taken to have `unknown_budget`. On a full disk the
    /// space that the store keeps in reserve is given up for opening it, so that chunks can be evicted.
    ///
    /// # Errors
    /// As for [`open`](Self::open). With [`Access::Read`] the directory need not be writable, and may be
    /// in use.
    pub fn open_existing(path: &Path, access: Access, unknown_budget: u64) -> Result<Option<ChunkStore>, StoreError> {
        if !path.exists() || !holds_store(path)? {
            return Ok(None);
        }
        if access == Access::Write {
            let options = StoreOptions { byte_budget: unknown_budget };
            return match ChunkStore::open(path, options) {
                Err(StoreError::OutOfSpace { .. }) if Reserve::new(path, 0).release() => {
                    ChunkStore::open_prepared(path, options).map(Some)
                }
                outcome => outcome.map(Some),
            };
        }
        if legacy::is_here(path) {
            return Ok(None);
        }
        let (backend, salvaged) = Backend::open(path, access)?;
        let report = OpenReport { salvaged, ..OpenReport::default() };
        ChunkStore::with_backend(backend, access, report, unknown_budget).map(Some)
    }

    fn with_backend(
        backend: Backend,
        access: Access,
        mut report: OpenReport,
        unknown_budget: u64,
    ) -> Result<ChunkStore, StoreError> {
        check_mark(&backend, access)?;
        let mut state = recovery::recover(&backend, access, &mut report)?;
        state.budget = match read_budget(&backend)? {
            Some(budget) => budget,
            None if access == Access::Write => {
                write_budget(&backend, unknown_budget)?;
                unknown_budget
            }
            None => unknown_budget,
        };
        if access == Access::Write {
            clear_incoming(backend.path())?;
        }
        ChunkStore::start(backend, state, access, report)
    }

    fn start(backend: Backend, state: State, access: Access, report: OpenReport) -> Result<ChunkStore, StoreError> {
        let core = Arc::new(Core {
            reserve: Reserve::new(backend.path(), state.budget),
            backend,
            catalogue: Arc::new(Catalogue::new(state)),
            mailbox: Mailbox::default(),
            files: OpenFiles::default(),
            buffers: Arc::default(),
        });
        let writer = match access {
            Access::Read => None,
            Access::Write => {
                let shared = Arc::clone(&core);
                let spawned = std::thread::Builder::new().name("chunk-writer".to_owned()).spawn(move || shared.run());
                let fail = |error| StoreError::from_io(error, "cannot start the writer of", core.backend.path());
                Some(spawned.map_err(fail)?)
            }
        };
        Ok(ChunkStore { core, flights: SingleFlight::default(), access, report, writer })
    }

    /// Whether another process has the store at `path` open for writing. Who reads meanwhile sees a moment of it, and may
    /// find files gone.
    ///
    /// # Errors
    /// Those of the lock's file.
    pub fn is_in_use(path: &Path) -> Result<bool, StoreError> {
        is_in_use(path)
    }

    /// Removes all chunks at once, by removing the files: it needs no space on the disk, and works for a
    /// damaged store. The emptied store keeps its budget where there is room to write it. Returns how many chunks there
    /// were, as far as could be read.
    ///
    /// # Errors
    /// [`StoreError::Locked`] while another has the store open, [`ForeignStore`](StoreError::ForeignStore) for a
    /// directory of another program, and whatever keeps files from being removed.
    pub fn clear(path: &Path) -> Result<u64, StoreError> {
        match holds_store(path) {
            Ok(_) | Err(StoreError::Damaged { .. }) => {}
            Err(error) => return Err(error),
        }
        if legacy::is_here(path) {
            return ChunkStore::open(path, StoreOptions { byte_budget: 0 }).map(|_| 0);
        }
        let known = ChunkStore::open_existing(path, Access::Read, 0).ok().flatten().map(|store| {
            let state = store.core.catalogue.lock();
            (state.budget, state.entries.len() as u64)
        });
        Backend::destroy(path)?;
        Reserve::new(path, 0).release();
        let _ = std::fs::remove_dir_all(path.join(INCOMING));
        let Some((byte_budget, chunks)) = known else { return Ok(0) };
        if let Err(error) = ChunkStore::open(path, StoreOptions { byte_budget }) {
            tracing::warn!(%error, "the emptied store forgets its byte budget");
        }
        Ok(chunks)
    }
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

/// A RocksDB database with other families than a store's is some other program's. Of a damaged list of files only some
/// names can be read: those of a store alone are no reason to refuse it.
fn refuse_foreign_database(path: &Path) -> Result<(), StoreError> {
    let found = Backend::families(path);
    let known = |name: &String| name == "default" || Family::ALL.iter().any(|family| family.name() == name);
    if found.iter().any(|name| name == Family::Payload.name() || name == legacy::FAMILY) || found.iter().all(known) {
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
