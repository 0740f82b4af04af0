//! Collections of documents, and finding passages in them.
//!
//! `analyzer` turns texts into terms, `language` tells in which language, `index` holds the tantivy index that is derived from
//! the catalog, `query` ranks, `collection` is what others see, `legacy` reads what was kept before there was a catalog.

mod analyzer;
mod collection;
mod index;
mod language;
pub(crate) mod legacy;
mod query;
#[cfg(test)]
mod tests;

pub use analyzer::comparable;
pub use collection::{Collection, CollectionWriter, Found, PassageTokens, StoredDocument};
pub(crate) use collection::{check_index, index_dir};
pub(crate) use index::furthest;
pub use language::parse_language;
