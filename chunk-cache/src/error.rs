//! What can go wrong, told so that the reader knows what was expected, what came, and what to do.

use std::path::{Path, PathBuf};

use std::sync::Arc;

use crate::key::ChunkKey;

/// The remedy for a directory that RocksDB cannot use.
const REMEDY: &str = "`quire cache evict --all` empties it: everything in it can be computed again";

/// Errors of the chunk store.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The directory holds something else.
    #[error(
        "the chunk store at {} belongs to another {what}: expected {expected}, found {found}; \
         use another directory",
        path.display()
    )]
    ForeignStore {
        /// What differs: "program".
        what: &'static str,
        /// What this process wants.
        expected: String,
        /// What the directory says.
        found: String,
        /// The store's directory.
        path: PathBuf,
    },
    /// The store was written by a newer version of this program.
    #[error(
        "the chunk store at {} has format version {found}, this program reads up to version \
         {supported}: use a newer quire, or another directory",
        path.display()
    )]
    NewerFormat {
        /// Version found on disk.
        found: u16,
        /// Newest version this build reads.
        supported: u16,
        /// The store's directory.
        path: PathBuf,
    },
    /// Another handle has the store open.
    #[error(
        "the chunk store at {} is already open, in another process or in this one: stop the other \
         quire, or use another directory",
        path.display()
    )]
    Locked {
        /// The store's directory.
        path: PathBuf,
    },
    /// The directory may not be written.
    #[error(
        "the chunk store at {} cannot be written: {detail}; make the directory writable for this user, \
         or choose another one",
        path.display()
    )]
    ReadOnly {
        /// The store's directory.
        path: PathBuf,
        /// What the system said.
        detail: String,
    },
    /// The disk is full. Nothing of the failed write is visible.
    #[error(
        "no space left for the chunk store at {}: {detail}; free some space on that disk, or evict all chunks, which needs \
         none",
        path.display()
    )]
    OutOfSpace {
        /// The store's directory.
        path: PathBuf,
        /// What the system said.
        detail: String,
    },
    /// One chunk is damaged. It counts as absent until it is stored anew; it is never served.
    #[error(
        "chunk {key} is corrupt{}: expected {expected}, found {found}; it will not be used, store it \
         again or remove it", layer.map(|l| format!(" at layer {l}")).unwrap_or_default()
    )]
    Corrupt {
        /// The chunk.
        key: ChunkKey,
        /// The layer, when one layer's payload is at fault; `None` for the manifest.
        layer: Option<u32>,
        /// What should have been there.
        expected: String,
        /// What was there.
        found: String,
    },
    /// The directory as a whole is damaged.
    #[error("the chunk store at {} is corrupt: {detail}; {REMEDY}", path.display())]
    Damaged {
        /// The store's directory.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
    /// A chunk is larger than the whole budget.
    #[error(
        "the chunk needs {needed} bytes, the whole budget of the store is {budget}: raise the budget \
         or use smaller chunks"
    )]
    TooLarge {
        /// Bytes of the chunk.
        needed: u64,
        /// Byte budget of the store.
        budget: u64,
    },
    /// No room can be made, because what could be evicted is in use.
    #[error(
        "no room for a chunk of {needed} bytes: of the budget of {budget}, {pinned} bytes are in use \
         by running requests; raise the budget or retry later"
    )]
    NoRoom {
        /// Bytes of the chunk.
        needed: u64,
        /// Byte budget of the store.
        budget: u64,
        /// Bytes held by pinned chunks.
        pinned: u64,
    },
    /// The database could not be opened anew after a failure.
    #[error("the chunk store at {} is closed after a failure; the next write tries to open it again", path.display())]
    Closed {
        /// The store's directory.
        path: PathBuf,
    },
    /// The database must be opened anew, and chunks of it are in use.
    #[error("the chunk store at {} recovers from a failed write when chunks that are in use are let go; retry then", path.display())]
    Busy {
        /// The store's directory.
        path: PathBuf,
    },
    /// The thread that writes has ended.
    #[error("the chunk store at {} takes nothing any more: its writer has ended; open it again", path.display())]
    Stopped {
        /// The store's directory.
        path: PathBuf,
    },
    /// Data handed in does not have the store's layout.
    #[error("{what} does not fit the store: expected {expected}, found {found}")]
    ShapeMismatch {
        /// What was looked at.
        what: String,
        /// What the layout asks for.
        expected: String,
        /// What was given.
        found: String,
    },
    /// The operating system refused a file operation.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was attempted, as in "cannot create the directory".
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        source: Arc<std::io::Error>,
    },
    /// RocksDB failed in a way that is none of the above.
    #[error("the chunk store at {} failed while {action}: {source}", path.display())]
    Backend {
        /// What was being done.
        action: &'static str,
        /// The store's directory.
        path: PathBuf,
        /// RocksDB's error.
        source: rocksdb::Error,
    },
}

/// What a RocksDB error means to its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Locked,
    Permission,
    OutOfSpace,
    Damage,
    Other,
}

/// Sorts a RocksDB error. Only the kind and the text reach us: the text carries the system's own
/// words for the errno.
pub(crate) fn classify(kind: &rocksdb::ErrorKind, message: &str) -> Fault {
    use rocksdb::ErrorKind as K;
    let says = |words: &[&str]| words.iter().any(|word| message.contains(word));
    if says(&["No space left on device", "Disk quota exceeded"]) {
        return Fault::OutOfSpace;
    }
    if says(&["Permission denied", "Read-only file system", "Operation not permitted"]) {
        return Fault::Permission;
    }
    match kind {
        K::IOError if says(&["While lock file", "lock hold by current process"]) => Fault::Locked,
        K::IOError if says(&["No such file or directory"]) => Fault::Damage,
        K::Corruption | K::NotSupported | K::InvalidArgument | K::NotFound | K::Unknown => Fault::Damage,
        _ => Fault::Other,
    }
}

impl StoreError {
    /// Whether what was read is damaged or gone, rather than the device or the process at fault.
    pub(crate) fn is_damage(&self) -> bool {
        matches!(self, StoreError::Damaged { .. })
    }

    /// Turns a RocksDB error into the store error that fits.
    pub(crate) fn from_rocksdb(source: rocksdb::Error, action: &'static str, path: &Path) -> Self {
        let path = path.to_path_buf();
        let detail = format!("{action}: {source}");
        match classify(&source.kind(), source.as_ref()) {
            Fault::Locked => StoreError::Locked { path },
            Fault::Permission => StoreError::ReadOnly { path, detail },
            Fault::OutOfSpace => StoreError::OutOfSpace { path, detail },
            Fault::Damage => StoreError::Damaged { path, detail },
            Fault::Other => StoreError::Backend { action, path, source },
        }
    }

    /// Turns a file error into the store error that fits.
    pub(crate) fn from_io(source: std::io::Error, action: &'static str, path: &Path) -> Self {
        use std::io::ErrorKind as K;
        let path = path.to_path_buf();
        let detail = format!("{action}: {source}");
        match source.kind() {
            K::PermissionDenied | K::ReadOnlyFilesystem => StoreError::ReadOnly { path, detail },
            K::StorageFull | K::QuotaExceeded => StoreError::OutOfSpace { path, detail },
            _ => StoreError::Io { action, path, source: Arc::new(source) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rocksdb::ErrorKind as K;

    #[test]
    fn system_errors_are_told_apart() {
        let cases = [
            (K::IOError, "IO error: While lock file: /s/LOCK: Resource temporarily unavailable", Fault::Locked),
            (
                K::IOError,
                "IO error: lock hold by current process, acquire time 1 acquiring thread 2: /s/LOCK: No locks available",
                Fault::Locked,
            ),
            (K::IOError, "IO error: While open a file for lock: /s/LOCK: Permission denied", Fault::Permission),
            (K::IOError, "IO error: While mkdir: /s: Read-only file system", Fault::Permission),
            (
                K::IOError,
                "IO error: No space left on device: While appending to file: /s/000004.log: No space left on device",
                Fault::OutOfSpace,
            ),
            (
                K::IOError,
                "IO error: No such file or directory: While open a file for random read: /s/000012.blob: No such file or directory",
                Fault::Damage,
            ),
            (K::Corruption, "Corruption: block checksum mismatch", Fault::Damage),
            (K::IOError, "IO error: While pread offset 0: Input/output error", Fault::Other),
            (K::Busy, "Resource busy", Fault::Other),
        ];
        for (kind, message, fault) in cases {
            assert_eq!(classify(&kind, message), fault, "{message}");
        }
    }

    #[test]
    fn file_errors_are_told_apart() {
        let path = Path::new("/data/chunks");
        for (errno, wanted) in [(13, "cannot be written"), (30, "cannot be written"), (28, "no space left")] {
            let error = std::io::Error::from_raw_os_error(errno);
            let text = StoreError::from_io(error, "creating the directory", path).to_string();
            assert!(text.contains(wanted) && text.contains("/data/chunks"), "{text}");
        }
    }
}
