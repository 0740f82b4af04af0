//! What every index is: the trait, and the plain data that go in and out.

use std::fmt;
use std::ops::AddAssign;
use std::str::FromStr;

use crate::bitmap::Bitmap;
use crate::error::IndexError;

/// The numbers an index stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KeyPrecision {
    /// Four bytes a number, stored as given.
    F32,
    /// Two bytes a number, rounded to the nearest bfloat16, ties to even.
    Bf16,
}

/// The indexes there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IndexKind {
    /// Scores every key: exact, and the truth that the others are measured against.
    Flat,
    /// A hierarchical navigable small-world graph: approximate, reads few keys.
    Hnsw,
}

impl fmt::Display for IndexKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            IndexKind::Flat => "flat",
            IndexKind::Hnsw => "hnsw",
        })
    }
}

impl FromStr for IndexKind {
    type Err = IndexError;

    fn from_str(name: &str) -> Result<Self, IndexError> {
        match name {
            "flat" => Ok(IndexKind::Flat),
            "hnsw" => Ok(IndexKind::Hnsw),
            _ => Err(IndexError::UnknownKind { found: name.to_owned() }),
        }
    }
}

/// How an index is built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexParams {
    /// Which index; [`IndexKind::Flat`] by default.
    pub kind: IndexKind,
    /// What it stores; [`KeyPrecision::Bf16`] by default.
    pub precision: KeyPrecision,
    /// Links of a key in the upper layers of the graph, 2 to 255; twice as many in the lowest one.
    /// 16 by default. Only `hnsw` reads it.
    pub hnsw_m: usize,
    /// Candidates held while the links of a key are chosen, 1 to 65,536; 200 by default. Only
    /// `hnsw` reads it.
    pub hnsw_ef_construction: usize,
}

impl Default for IndexParams {
    fn default() -> Self {
        Self { kind: IndexKind::Flat, precision: KeyPrecision::Bf16, hnsw_m: 16, hnsw_ef_construction: 200 }
    }
}

/// What a search is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SearchParams {
    /// How many hits; 0 is answered with none.
    pub k: usize,
    /// How many candidates a graph holds while it searches: more reads more keys and finds more of
    /// the best. Raised to `k` when smaller; an exact index does not read it.
    pub ef: usize,
}

/// A key that was found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hit {
    /// The key's number: keys are numbered from 0 in the order they came.
    pub id: u32,
    /// The inner product of the query and the key *as stored*, computed in f32.
    pub score: f32,
}

/// What a search cost. Adding two gives the cost of both.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SearchStats {
    /// Distinct keys whose bytes were read, hidden ones included.
    pub keys_touched: usize,
    /// Bytes of these keys.
    pub bytes: usize,
    /// Distinct keys that were met by following links of a graph; 0 where there is none.
    pub nodes_visited: usize,
}

impl AddAssign for SearchStats {
    fn add_assign(&mut self, other: Self) {
        self.keys_touched += other.keys_touched;
        self.bytes += other.bytes;
        self.nodes_visited += other.nodes_visited;
    }
}

/// What a search found.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SearchResult {
    /// The hits: higher score first, the lower id first among equal scores.
    pub hits: Vec<Hit>,
    /// What finding them cost.
    pub stats: SearchStats,
}

/// The keys of one attention head, searchable for those with the largest inner product.
///
/// **Keys are immutable and ids are dense.** The n-th key that came has id n, from 0, for ever.
/// There is no deletion: a key that must not be found is hidden by the search's bitmap.
///
/// **Threads.** All methods may be called from any thread at any time. A search never waits for
/// an append, and runs on the calling thread alone: parallelism is over heads and queries. Appends
/// wait for each other. A large append to a graph uses as many threads as the caller's rayon pool
/// has, unless it is called from inside that pool, where the caller is parallel already; it never
/// takes over another task of the pool while it waits.
///
/// **Order.** When an append has returned, every search that starts later sees all its keys. A
/// search that runs meanwhile may see any part of them. [`len`](KeyIndex::len) never shrinks,
/// and keys below it can be read.
///
/// **How many hits.** A search returns exactly `min(k, keys not hidden)` hits, without repetition;
/// among keys that are bitwise equal the ones with lower ids come first.
///
/// **What is refused.** NaN, infinities and rows with a norm above 2<sup>61</sup> are refused, so
/// that no inner product overflows. A refused call has changed nothing.
pub trait KeyIndex: Send + Sync + fmt::Debug {
    /// Numbers in a key.
    fn dim(&self) -> usize;

    /// How many keys the index holds.
    fn len(&self) -> usize;

    /// Whether the index holds no key.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds keys, row after row; `keys.len()` is a multiple of [`dim`](KeyIndex::dim), and no rows
    /// at all is allowed.
    ///
    /// # Errors
    /// [`IndexError::NotRows`], [`IndexError::NotFinite`], [`IndexError::TooLong`],
    /// [`IndexError::Full`].
    fn append(&self, keys: &[f32]) -> Result<(), IndexError>;

    /// The keys that have the largest inner product with the query and are not in `exclude`.
    ///
    /// # Errors
    /// [`IndexError::DimensionMismatch`], [`IndexError::NotFinite`], [`IndexError::TooLong`].
    fn search(
        &self,
        query: &[f32],
        params: &SearchParams,
        exclude: Option<&Bitmap>,
    ) -> Result<SearchResult, IndexError>;

    /// Writes key `id` as it is stored, widened, into `out` of length [`dim`](KeyIndex::dim).
    ///
    /// # Errors
    /// [`IndexError::UnknownId`], [`IndexError::DimensionMismatch`].
    fn key(&self, id: u32, out: &mut [f32]) -> Result<(), IndexError>;

    /// Bytes of main memory held: keys and links, spare room included. The links are an estimate.
    fn memory_bytes(&self) -> usize;
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn kinds_are_read_as_they_are_written() {
        for kind in [IndexKind::Flat, IndexKind::Hnsw] {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        let error = "ivf".parse::<IndexKind>().unwrap_err();
        assert!(error.to_string().contains("`ivf`"));
    }
}
