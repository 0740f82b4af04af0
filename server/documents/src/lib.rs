//! Documents: reading them, splitting them into passages, keeping them, and finding passages by their words.
//!
//! `ingest` turns paths into texts, `split` turns a text into passages with their spans, `catalog` keeps both, and
//! `search` answers queries from indexes that are derived from the catalog. None of this knows a model: tokens are counted
//! by a function that is passed in, and come in as numbers.

#[cfg(test)]
mod beside_damage_tests;
mod catalog;
mod collections;
#[cfg(test)]
mod damage_tests;
pub mod data_dir;
mod directory;
mod encoding;
mod error;
mod ingest;
#[cfg(test)]
mod properties;
mod search;
mod seldom;
mod split;

pub use catalog::{
    Access, Attributes, Catalog, CatalogReport, Changed, CollectionInfo, DamagedDocument, DamagedEntry, DocumentId,
    DocumentInfo, JobError, JobRecord, LanguageSetting, NewDocument, NewPassage, ParseDocumentIdError, Passage,
    PutKind, PutOutcome, Reclaimed, RecordKind, ReleasedChunk, Restored, TextHash, Totals, Transaction,
};
pub use collections::{Library, LibraryReport, catalog_dir, collection_names, glance};
pub use error::{DocumentsError, Result};
pub use ingest::{Discovered, Document, Skipped, discover, read_document};
pub use search::{Collection, CollectionWriter, Found, PassageTokens, StoredDocument, comparable, parse_language};
pub use seldom::Seldom;
pub use split::{ChunkSpan, Format, Limits, Span, split};

/// What an id of an uploaded file begins with.
pub const FILE_PREFIX: &str = "file-";

/// Where a document comes from that a client uploaded: the file's id and its name, which make up the document's.
#[must_use]
pub fn attached_name(name: &str) -> Option<(&str, &str)> {
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'v').contains(&byte);
    let is_id =
        |id: &str| id.strip_prefix(FILE_PREFIX).is_some_and(|rest| rest.len() == 24 && rest.bytes().all(is_digit));
    name.split_once('/').filter(|(file, _)| is_id(file))
}

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
