//! Documents: reading them, splitting them into chunks, and finding chunks by their words.
//!
//! `ingest` turns paths into texts, `split` turns a text into chunks with their spans, `search` keeps the texts of a
//! collection, in an index that is derived from them, and answers queries. None of this knows a model: tokens are counted by a function that is passed in.

mod collections;
pub mod data_dir;
mod directory;
mod error;
mod ingest;
mod search;
mod split;

pub use collections::Library;
pub use error::{DocumentsError, Result};
pub use ingest::{Discovered, Document, Skipped, discover, read_document};
pub use search::comparable;
pub use search::{Collection, CollectionWriter, Found, StoredDocument};
pub use split::{ChunkSpan, Format, Limits, Span, split};

use std::path::{Path, PathBuf};

/// Checks that a collection's name is a plain folder name.
///
/// # Errors
/// [`DocumentsError::CollectionName`].
pub fn check_collection_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if (1..=64).contains(&name.len()) && name.chars().all(plain) && !name.starts_with('.') {
        return Ok(());
    }
    Err(DocumentsError::CollectionName { found: name.into() })
}

/// The folder of a collection's index.
#[must_use]
pub fn collection_dir(data_dir: &Path, name: &str) -> PathBuf {
    data_dir.join("collections").join(name)
}

/// The names of all collections, sorted.
#[must_use]
pub fn collection_names(data_dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(data_dir.join("collections")) else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .flatten()
        .filter(|entry| search::has_index(&entry.path()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_that_could_leave_the_folder_are_refused() {
        for name in ["", ".", "..", "a/b", "../x", ".hidden", "a b", &"x".repeat(65)] {
            assert!(check_collection_name(name).is_err(), "{name}");
        }
        for name in ["default", "2024-notes_v1.2"] {
            check_collection_name(name).unwrap();
        }
    }
}
