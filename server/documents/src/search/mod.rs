//! Collections of documents, and finding passages in them.
//!
//! `analyzer` turns texts into terms, `language` tells in which language, `record` says what is kept of a document and
//! seals it, `index` holds the tantivy index with its version, `query` ranks, `collection` is what others see.

mod analyzer;
mod collection;
mod index;
mod language;
mod query;
mod record;
#[cfg(test)]
mod tests;

pub use analyzer::comparable;
pub use collection::{Collection, CollectionWriter, Found, StoredDocument};
pub(super) use index::has_index;
