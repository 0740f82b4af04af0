//! What every index is: the trait, and the plain data that go in and out.

use std::fmt;
use std::ops::AddAssign;
use std::path::Path;

use crate::bitmap::Bitmap;
use crate::check::check_rows;
use crate::error::IndexError;
use crate::params::{IndexKind, SearchParams};

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
    /// Distinct keys of which any byte was read, as stored or quantised, hidden ones included. A
    /// key that is read quantised and then ranked exactly counts once.
    pub keys_touched: usize,
    /// Bytes read: stored keys, quantised keys with their scales, links and centroids. What is read
    /// twice in two forms counts twice; the visited set and the candidates are working memory and
    /// count nothing.
    pub bytes: usize,
    /// Keys of a graph whose links were followed (`graph`) or that were met by following links
    /// (`hnsw`); clusters and lists whose members were read (`clusters`, `ivf`); 0 for `flat`.
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

/// A cluster that is to be estimated instead of read.
#[derive(Debug, Clone, PartialEq)]
pub struct Zone {
    /// The mean of the cluster's keys as they are stored, `[dim]`.
    pub centroid: Vec<f32>,
    /// How many keys the cluster has, hidden ones included.
    pub size: usize,
}

/// What [`KeyIndex::search_zones`] found.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Zones {
    /// Every key of the best clusters that is not hidden, and of the tail that is not clustered
    /// yet, with its exact score; best first.
    pub hits: Vec<Hit>,
    /// The clusters that come next, best first.
    pub estimated: Vec<Zone>,
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
/// among keys that are bitwise equal the ones with lower ids come first. With `clusters` this holds among the keys that were
/// read: equal keys that came at different times may be in different clusters, of which one was not.
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
    /// [`IndexError::DimensionMismatch`], [`IndexError::NotFinite`], [`IndexError::TooLong`];
    /// [`IndexError::BadParameter`] for a query head that a `graph` has no graph for.
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

    /// Bytes of memory held: keys, quantised keys, links, centroids, spare room included, memory-mapped
    /// parts included. For `hnsw` the links are an estimate, for `ivf` the lists.
    fn memory_bytes(&self) -> usize;

    /// Which index this is.
    fn kind(&self) -> IndexKind;

    /// Bytes of the links of a graph, spare room included; 0 where there are none. For `hnsw` an
    /// estimate.
    fn link_bytes(&self) -> usize {
        0
    }

    /// Searches for each of the rows of `queries`, the query heads that share these keys (one
    /// group of grouped-query attention), and shares what can be shared; hits are the same as those
    /// of [`search`](KeyIndex::search), query after query and, with [`SearchParams::query_head`], head after head. `flat`
    /// and `clusters` read once what several queries want; the walks of `graph` take turns, 32 at a time, so that they
    /// wait for memory together and find there what another has fetched; `hnsw` and `ivf` search one query after the
    /// other.
    ///
    /// A query's statistics say what was read for it and for no query before it (of those that read together, 32 over a
    /// `graph`, 64 over `clusters`): they add up
    /// to what the group
    /// read. With `hnsw` and `ivf` they are those of single searches.
    ///
    /// # Errors
    /// As [`search`](KeyIndex::search), and [`IndexError::NotRows`].
    fn search_group(
        &self,
        queries: &[f32],
        params: &SearchParams,
        exclude: Option<&Bitmap>,
    ) -> Result<Vec<SearchResult>, IndexError> {
        check_rows("queries", self.dim(), queries)?;
        queries.chunks_exact(self.dim()).map(|query| self.search(query, params, exclude)).collect()
    }

    /// All members of the `top` best clusters with exact scores, and mean and size of the `next`
    /// clusters after them. Only `clusters` has clusters.
    ///
    /// # Errors
    /// [`IndexError::Unsupported`] from all other kinds, and what [`search`](KeyIndex::search) refuses.
    fn search_zones(
        &self,
        query: &[f32],
        top: usize,
        next: usize,
        exclude: Option<&Bitmap>,
    ) -> Result<Zones, IndexError> {
        let _ = (query, top, next, exclude);
        Err(IndexError::Unsupported {
            what: "zones of clusters",
            kind: self.kind(),
            instead: "build an index of kind `clusters`",
        })
    }

    /// Writes the index to a file that [`open`](crate::open) reads: first to a file beside it, which then takes the
    /// name. Keys that are appended meanwhile may be missing.
    ///
    /// # Errors
    /// [`IndexError::Io`].
    fn save(&self, path: &Path) -> Result<(), IndexError>;
}
