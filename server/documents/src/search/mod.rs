//! Collections of documents, and finding passages in them.
//!
//! `analyzer` turns texts into terms (`scripts`, `long` and `cut` are its parts), `language` tells in which language, `index` holds
//! the tantivy index that is derived from the catalog, `building` has it built anew, `query` ranks, `collection` is what others
//! see, `legacy` reads what was kept before there was a catalog.

mod analyzer;
mod building;
mod collection;
mod cut;
mod index;
mod language;
pub(crate) mod legacy;
mod long;
mod query;
mod scripts;
#[cfg(test)]
mod tests;

pub use analyzer::comparable;
pub(crate) use building::{check_index, derive_index, discard_derived, index_dir, indexed_passages};
pub use collection::{Collection, CollectionWriter, Found, PassageTokens, StoredDocument};
pub(crate) use index::{furthest, passage_digest};
pub use language::parse_language;
