//! What can go wrong with the catalog.

use std::io::ErrorKind;
use std::path::Path;

use super::rows::DamagedRow;
use crate::error::DocumentsError;

/// What a step of the catalog fails with: all of it, or one row.
#[derive(Debug)]
pub(crate) enum CatalogError {
    /// The database refused, or something is wrong with it as a whole.
    Whole(DocumentsError),
    /// One row is not what was written.
    Row(DamagedRow),
}

impl From<DocumentsError> for CatalogError {
    fn from(error: DocumentsError) -> CatalogError {
        CatalogError::Whole(error)
    }
}

impl From<DamagedRow> for CatalogError {
    fn from(error: DamagedRow) -> CatalogError {
        CatalogError::Row(error)
    }
}

impl CatalogError {
    /// With what the row belongs to.
    pub(crate) fn of(self, what: impl FnOnce() -> String) -> DocumentsError {
        match self {
            CatalogError::Whole(error) => error,
            CatalogError::Row(DamagedRow(problem)) => DocumentsError::DamagedDocument { what: what(), problem },
        }
    }
}

/// Of a step that belongs to no document.
impl From<CatalogError> for DocumentsError {
    fn from(error: CatalogError) -> DocumentsError {
        error.of(|| "the catalog".into())
    }
}

/// RocksDB's error in this crate's words. RocksDB tells a full disk and a lock apart from other failures in its text
/// alone.
pub(super) fn rocksdb(error: rocksdb::Error, action: &'static str, path: &Path) -> CatalogError {
    let text = error.to_string();
    let damage = is_damage(&error);
    let says = |part: &str| text.to_ascii_lowercase().contains(part);
    let system = [
        ("no space left", ErrorKind::StorageFull),
        ("quota exceeded", ErrorKind::QuotaExceeded),
        ("read-only file system", ErrorKind::ReadOnlyFilesystem),
        ("permission denied", ErrorKind::PermissionDenied),
    ];
    if says("lock hold by current process") || says("resource temporarily unavailable") || says("/lock: no locks") {
        return DocumentsError::CatalogInUse { path: path.into() }.into();
    }
    if let Some((_, kind)) = system.iter().find(|(part, _)| says(part)) {
        return DocumentsError::writing(path, (*kind).into()).into();
    }
    match action {
        // A block of a table, or a table: whatever row was asked for is lost, and no other.
        "reading" if damage => DamagedRow(text).into(),
        _ if damage => DocumentsError::DamagedCatalog { path: path.into(), problem: text }.into(),
        _ => DocumentsError::Catalog { path: path.into(), action, source: Box::new(error) }.into(),
    }
}

/// Whether RocksDB found bytes that it has not written, or misses a file.
pub(super) fn is_damage(error: &rocksdb::Error) -> bool {
    use rocksdb::ErrorKind as K;
    let missing = || error.to_string().to_ascii_lowercase().contains("no such file");
    match error.kind() {
        K::Corruption => true,
        K::IOError | K::NotFound | K::InvalidArgument => missing(),
        _ => false,
    }
}
