//! Which index, and how it is built and searched.

use std::fmt;
use std::str::FromStr;

use crate::error::IndexError;

/// The numbers an index stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KeyPrecision {
    /// Four bytes a number, stored as given.
    F32,
    /// Two bytes a number, rounded to the nearest bfloat16, ties to even.
    Bf16,
    /// Two bytes a number, rounded to the nearest IEEE half, ties to even. A row with a number beyond
    /// 65,504 is refused.
    F16,
    /// One byte a number and four a row: integers from -127 to 127 times the row's scale, which
    /// brings its largest number to 127.
    Int8,
}

/// The indexes there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IndexKind {
    /// Scores every key: exact, and the truth that the others are measured against.
    Flat,
    /// A hierarchical navigable small-world graph: approximate, reads few keys.
    Hnsw,
    /// Inverted lists of faiss: only in programs that are built with the feature `faiss`; see
    /// [`is_built_in`](IndexKind::is_built_in).
    Ivf,
    /// A graph shaped after sample queries (RetrievalAttention, RoarGraph).
    Graph,
    /// Segment-wise spherical clusters (RetroInfer).
    Clusters,
}

impl IndexKind {
    /// Every kind.
    pub const ALL: [IndexKind; 5] =
        [IndexKind::Flat, IndexKind::Hnsw, IndexKind::Ivf, IndexKind::Graph, IndexKind::Clusters];

    /// Whether this program can build and open it.
    pub fn is_built_in(self) -> bool {
        self != IndexKind::Ivf || crate::ivf::BUILT_IN
    }

    /// # Errors
    /// [`IndexError::Unsupported`], which says how to get it, where this program does not have it.
    pub fn check_built_in(self) -> Result<(), IndexError> {
        if self.is_built_in() { Ok(()) } else { Err(crate::ivf::unavailable()) }
    }

    /// Its name in settings.
    pub fn name(self) -> &'static str {
        match self {
            IndexKind::Flat => "flat",
            IndexKind::Hnsw => "hnsw",
            IndexKind::Ivf => "ivf",
            IndexKind::Graph => "graph",
            IndexKind::Clusters => "clusters",
        }
    }
}

impl fmt::Display for IndexKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for IndexKind {
    type Err = IndexError;

    fn from_str(name: &str) -> Result<Self, IndexError> {
        let kind = Self::ALL.into_iter().find(|kind| kind.name() == name);
        kind.ok_or_else(|| IndexError::UnknownKind { found: name.to_owned() })
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
    /// Settings of `graph`.
    pub graph: GraphParams,
    /// Settings of `clusters`.
    pub clusters: ClustersParams,
    /// Settings of `ivf`.
    pub ivf: IvfParams,
}

impl Default for IndexParams {
    fn default() -> Self {
        Self {
            kind: IndexKind::Flat,
            precision: KeyPrecision::Bf16,
            hnsw_m: 16,
            hnsw_ef_construction: 200,
            graph: GraphParams::default(),
            clusters: ClustersParams::default(),
            ivf: IvfParams::default(),
        }
    }
}

/// Settings of the attention-aware graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GraphParams {
    /// Links of a key, 4 to 255; 28 by default.
    pub degree: usize,
    /// Candidates held while a key looks for its neighbours, 1 to 65,536; 64 by default.
    pub build_ef: usize,
    /// Keys that every search scores first, 1 to 4,096; 32 by default.
    pub entry_points: usize,
    /// Nearest keys of a sample query that are linked with each other, 2 to 4,096; 100 by default. What
    /// [`build`](crate::build) computes for itself; neighbours that are handed in may have any number.
    pub sample_neighbours: usize,
    /// Query heads with a graph of their own over the same stored keys, 1 to 128. 1, the default: one graph for all
    /// query heads that share the KV head, shaped after the queries of all of them. The size h of the group: one for
    /// each, as in RetrievalAttention (arXiv 2409.10516); links and what is kept of the queries then take h times the memory. Sample queries are in that
    /// case `[tokens, h, dim]`, and searches say whose query comes: see [`SearchParams::query_head`]. Without sample
    /// queries all heads are alike, and one graph serves them.
    pub query_heads: usize,
}

impl Default for GraphParams {
    fn default() -> Self {
        Self { degree: 28, build_ef: 64, entry_points: 32, sample_neighbours: 100, query_heads: 1 }
    }
}

/// Settings of the clusters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClustersParams {
    /// Consecutive keys that are clustered together, 64 to 65,536; 8,192 by default.
    pub segment: usize,
    /// Keys of a cluster on average, 1 to 1,024; 16 by default.
    pub keys_per_cluster: usize,
    /// Rounds of k-means, 1 to 100; 4 by default.
    pub iterations: usize,
}

impl Default for ClustersParams {
    fn default() -> Self {
        Self { segment: 8192, keys_per_cluster: 16, iterations: 4 }
    }
}

/// Settings of faiss' inverted lists.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IvfParams {
    /// Lists, up to 65,536; 0, the default, means four times the root of the number of keys. There are fewer where
    /// a list would have less than the 39 keys on average that faiss wants to train its centroid.
    pub lists: usize,
}

/// What a search is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SearchParams {
    /// How many hits; 0 is answered with none. 100 by default.
    pub k: usize,
    /// How many candidates a graph holds while it searches: more reads more keys and finds more of
    /// the best. Raised to `k` when smaller; only `hnsw` and `graph` read it. 128 by default.
    pub ef: usize,
    /// How many clusters or lists are read, the best ones first; only `clusters` and `ivf` read it. 0, the
    /// default, leaves it to the index: 2 % of them and at least what `k` keys need. More are read where
    /// these hold fewer than `k` keys that are not hidden.
    pub probes: usize,
    /// The query's head within its group, from 0, where a `graph` has one graph for each
    /// ([`GraphParams::query_heads`]); nothing else reads it. Queries that come together belong to this head and those
    /// after it, in turn: with 0, the default, rows are `[tokens, query_heads, dim]`.
    pub query_head: usize,
}

impl Default for SearchParams {
    fn default() -> Self {
        Self { k: 100, ef: 128, probes: 0, query_head: 0 }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn kinds_are_read_as_they_are_written() {
        for kind in IndexKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        let error = "ifv".parse::<IndexKind>().unwrap_err().to_string();
        assert!(error.contains("`ifv`") && error.contains("`clusters`"));
    }
}
