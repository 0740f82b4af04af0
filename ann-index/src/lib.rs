//! Maximum-inner-product indexes over the keys of one attention head.
//!
//! An index holds rows of numbers, the keys, and answers a query with those that have the largest
//! inner product with it. It knows nothing of values, tokens or models.
//!
//! ```
//! use ann_index::{Bitmap, IndexParams, SearchParams, build};
//!
//! # fn main() -> Result<(), ann_index::IndexError> {
//! // Three keys of dimension 2, then a fourth.
//! let keys = [1.0, 0.0, 0.0, 1.0, 2.0, 2.0];
//! let index = build(2, &keys, &[], &IndexParams::default())?;
//! index.append(&[8.0, -1.0])?;
//!
//! let two = SearchParams { k: 2, ..SearchParams::default() };
//! let found = index.search(&[1.0, 1.0], &two, None)?;
//! let best: Vec<_> = found.hits.iter().map(|hit| (hit.id, hit.score)).collect();
//! assert_eq!(best, [(3, 7.0), (2, 4.0)]);
//! assert_eq!(found.stats.keys_touched, 4);
//!
//! // Keys can be hidden from a search.
//! let hidden: Bitmap = [3].into_iter().collect();
//! let found = index.search(&[1.0, 1.0], &two, Some(&hidden))?;
//! assert_eq!(found.hits[0].id, 2);
//! # Ok(())
//! # }
//! ```
//!
//! * [`KeyIndex`] is the contract: threads, order, what is refused.
//! * [`build`] makes one; [`IndexParams`] says which and how.
//! * [`IndexKind::Flat`] reads every key and is exact; [`IndexKind::Hnsw`] walks a graph that keys alone have
//!   shaped; [`IndexKind::Graph`] one that sample queries have shaped; [`IndexKind::Clusters`] reads clusters and can
//!   say what the next ones hold ([`KeyIndex::search_zones`]); [`IndexKind::Ivf`] reads inverted lists of
//!   faiss, in programs that are built with the feature `faiss`.
//! * [`exact_neighbours`] finds the keys that `graph` is shaped by; [`build_with_neighbours`] takes them from elsewhere.
//! * [`KeyIndex::save`] and [`open`] keep an index in a file; what is opened is searched where it lies.
//! * Keys know no positions. Rotary embeddings turn keys and queries alike, R(a)k . R(b)q = k . R(b - a)q, so an
//!   index over keys at positions of their chunk answers for the chunk at start p when the query is turned by
//!   R(-p).
//! * [`SearchStats`] says what a search really read.
//!
//! A new index is a module that implements [`KeyIndex`], a variant of [`IndexKind`], a line in
//! `build` and a line in the behavioural suite that all indexes pass.

mod bitmap;
mod blocks;
mod build;
mod check;
mod clusters;
mod codes;
mod element;
mod error;
mod flat;
mod graph;
mod hnsw;
mod isa;
mod ivf;
mod key_index;
mod metric;
mod neighbours;
mod order;
mod panels;
mod parallel;
mod params;
mod rows;
mod scan;
mod storage;
#[cfg(test)]
mod suite;
mod top_k;
mod twins;

pub use bitmap::Bitmap;
pub use build::{build, build_while, build_with_neighbours};
pub use error::IndexError;
pub use key_index::{Hit, KeyIndex, SearchResult, SearchStats, Zone, Zones};
pub use neighbours::{Neighbours, exact_neighbours};
pub use params::{ClustersParams, GraphParams, IndexKind, IndexParams, IvfParams, KeyPrecision, SearchParams};
pub use storage::open;
