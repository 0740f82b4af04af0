//! What can go wrong when an index is built, extended or asked.

use std::path::PathBuf;

use thiserror::Error;

use crate::params::IndexKind;

/// Why an index refused. A refused call has changed nothing.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum IndexError {
    /// A setting lies outside its range.
    #[error("setting `{name}` is {value}, expected {expected}: correct it and build again")]
    BadParameter {
        /// The setting.
        name: &'static str,
        /// What it was.
        value: usize,
        /// What it may be.
        expected: &'static str,
    },
    /// No index is called that.
    #[error("unknown index kind `{found}`, expected `flat`, `hnsw`, `ivf`, `graph` or `clusters`")]
    UnknownKind {
        /// The name that was given.
        found: String,
    },
    /// A query, or the room for a key, has another length than the keys have.
    #[error("{what} has {found} numbers, expected {expected}: the index holds keys of that dimension")]
    DimensionMismatch {
        /// What was measured: `query` or `output`.
        what: &'static str,
        /// The dimension of the index.
        expected: usize,
        /// The length that came.
        found: usize,
    },
    /// The numbers do not divide into whole rows.
    #[error("{what}: {found} numbers are not whole rows of {dim}: pass rows without a gap")]
    NotRows {
        /// What was passed: `keys` or `sample queries`.
        what: &'static str,
        /// The dimension of the index.
        dim: usize,
        /// How many numbers came.
        found: usize,
    },
    /// A NaN or an infinity, which no inner product can order.
    #[error("{what}: row {row}, column {column} is {value}, expected a finite number")]
    NotFinite {
        /// What was passed: `keys`, `query` or `sample queries`.
        what: &'static str,
        /// The row, from 0.
        row: usize,
        /// The column, from 0.
        column: usize,
        /// The number found there.
        value: f32,
    },
    /// A row so long that inner products with it could overflow f32.
    #[error("{what}: row {row} has norm {norm:e}, expected at most {limit:e}: scale it down")]
    TooLong {
        /// What was passed: `keys`, `query` or `sample queries`.
        what: &'static str,
        /// The row, from 0.
        row: usize,
        /// Its Euclidean norm.
        norm: f64,
        /// The longest norm taken.
        limit: f64,
    },
    /// A number that the stored precision cannot hold.
    #[error("keys: row {row}, column {column} is {value:e}, expected at most {limit:e}: store bf16 or f32")]
    TooLarge {
        /// The row, from 0.
        row: usize,
        /// The column, from 0.
        column: usize,
        /// The number found there.
        value: f32,
        /// The largest that can be stored.
        limit: f32,
    },
    /// Nobody wants the index any more.
    #[error("the index was given up: nobody wants it any more")]
    Cancelled,
    /// A key that is not there.
    #[error("no key {id}: the index holds {len} keys, numbered from 0")]
    UnknownId {
        /// The id asked for.
        id: u32,
        /// How many keys there are.
        len: usize,
    },
    /// More keys than ids.
    #[error("{found} keys are more than an index can number (at most {limit}): split them")]
    Full {
        /// How many keys there would have been.
        found: usize,
        /// How many there may be.
        limit: usize,
    },
    /// This kind of index cannot do that.
    #[error("index `{kind}` has no {what}: {instead}")]
    Unsupported {
        /// What was asked for.
        what: &'static str,
        /// The index that was asked.
        kind: IndexKind,
        /// What to do instead.
        instead: &'static str,
    },
    /// Neighbours that do not belong to these keys and queries.
    #[error("neighbours of sample queries: {what}: compute them from the same keys and queries")]
    BadNeighbours {
        /// What is wrong.
        what: String,
    },
    /// A library that an index is made with failed.
    #[error("{library} failed in {action}: {reason}; free memory and try again, or take another kind of index")]
    Library {
        /// The library.
        library: &'static str,
        /// What it was asked to do.
        action: &'static str,
        /// Its words.
        reason: String,
    },
    /// The operating system refused.
    #[error("{action} {}: {reason}", path.display())]
    Io {
        /// What was tried: `reading` or `writing`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's words.
        reason: String,
    },
    /// The file is not a whole index of this version.
    #[error("{} is not a usable index: {what}; build the index again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        what: String,
    },
}
