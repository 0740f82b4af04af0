//! What can go wrong when an index is built, extended or asked.

use thiserror::Error;

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
    #[error("unknown index kind `{found}`, expected `flat` or `hnsw`")]
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
}
