//! The graph index: a hierarchical navigable small world over the distinct keys.
//!
//! Malkov and Yashunin, "Efficient and robust approximate nearest neighbor search using
//! hierarchical navigable small world graphs" (arXiv 1603.09320), by way of the `hnsw_rs` crate;
//! `hnsw/graph.rs` says how inner products are made to fit it. Around the graph, this module:
//!
//! * scans while the keys are few, or while a search asks for as many candidates as there are keys;
//! * puts only the first of equal keys into the graph: it links each key to its nearest, and
//!   enough equal keys would link to nothing but each other;
//! * ranks every key the walk has scored, by the exact product with the stored key;
//! * falls back to a scan when the walk found fewer keys than were asked for.

mod graph;
mod lift;
mod visits;

use std::collections::HashMap;
use std::collections::hash_map::{DefaultHasher, Entry};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::bitmap::Bitmap;
use crate::check::{check_query, check_rows};
use crate::element::Element;
use crate::error::IndexError;
use crate::key_index::{KeyIndex, SearchResult, SearchStats};
use crate::params::{IndexKind, IndexParams, SearchParams};
use crate::rows::Rows;
use crate::scan::{read_key, scan};
use crate::top_k::TopK;
use graph::Graph;

/// Fewer distinct keys than this are scanned: that takes microseconds, and a centre and a longest
/// norm taken from fewer keys would soon have to be taken again.
const GRAPH_FROM: usize = 512;

/// See the module.
pub(crate) struct HnswIndex<T: Element> {
    rows: Arc<Rows<T>>,
    params: IndexParams,
    graph_from: usize,
    graph: RwLock<Option<Arc<Graph<T>>>>,
    twins: RwLock<Twins>,
    writer: Mutex<Writer>,
}

/// Later equal keys, in order of their ids, by the first of them.
type Twins = HashMap<u32, Vec<u32>>;

/// What only the appending thread needs.
#[derive(Default)]
struct Writer {
    /// The first key with a given hash.
    first: HashMap<u64, u32>,
    /// The keys that the graph holds, or will hold once there is one.
    distinct: Vec<u32>,
}

impl<T: Element> HnswIndex<T> {
    /// An index over `keys`, rows of `dim` numbers; `params` are in range.
    pub(crate) fn build(dim: usize, keys: &[f32], params: &IndexParams) -> Result<Self, IndexError> {
        Self::build_with_graph_from(dim, keys, params, GRAPH_FROM)
    }

    /// As `build`, with a graph from that many distinct keys on.
    pub(crate) fn build_with_graph_from(
        dim: usize,
        keys: &[f32],
        params: &IndexParams,
        graph_from: usize,
    ) -> Result<Self, IndexError> {
        check_rows("keys", dim, keys)?;
        let index = Self {
            rows: Arc::new(Rows::new(dim, keys.len() / dim)),
            params: params.clone(),
            graph_from,
            graph: RwLock::default(),
            twins: RwLock::default(),
            writer: Mutex::default(),
        };
        index.append(keys)?;
        Ok(index)
    }

    /// The ids among `start..end` that equal no earlier key; the others become twins.
    fn take_distinct(&self, writer: &mut Writer, start: usize, end: usize) -> Vec<u32> {
        let mut fresh = Vec::with_capacity(end - start);
        let mut twins: Vec<(u32, u32)> = Vec::new();
        for id in start..end {
            let row = self.rows.row(id);
            match writer.first.entry(hash_row(row)) {
                Entry::Vacant(free) => {
                    free.insert(id as u32);
                    fresh.push(id as u32);
                }
                Entry::Occupied(first) if same_row(self.rows.row(*first.get() as usize), row) => {
                    twins.push((*first.get(), id as u32));
                }
                // Two keys share a hash: nothing but a twin that stays unnoticed comes of it.
                Entry::Occupied(_) => fresh.push(id as u32),
            }
        }
        if !twins.is_empty() {
            let mut known = self.twins.write().unwrap_or_else(PoisonError::into_inner);
            for (first, twin) in twins {
                known.entry(first).or_default().push(twin);
            }
        }
        writer.distinct.extend(&fresh);
        fresh
    }

    /// Brings new distinct keys into the graph, or builds it again when they do not fit it.
    /// Returns a graph that is no longer needed.
    fn extend_graph(&self, writer: &Writer, fresh: &[u32]) -> Option<Arc<Graph<T>>> {
        if fresh.is_empty() || writer.distinct.len() < self.graph_from {
            return None;
        }
        if let Some(graph) = self.graph()
            && graph.fits(fresh)
        {
            graph.insert(fresh);
            return None;
        }
        let graph = Graph::build(Arc::clone(&self.rows), &writer.distinct, &self.params);
        let mut current = self.graph.write().unwrap_or_else(PoisonError::into_inner);
        current.replace(Arc::new(graph))
    }

    fn graph(&self) -> Option<Arc<Graph<T>>> {
        let graph = self.graph.read().unwrap_or_else(PoisonError::into_inner);
        graph.clone()
    }

    /// The best `k` of the keys that a walk with `ef` candidates meets.
    fn walk(&self, graph: &Graph<T>, query: &[f32], k: usize, ef: usize, exclude: Option<&Bitmap>) -> SearchResult {
        let twins = self.twins.read().unwrap_or_else(PoisonError::into_inner);
        let twins_of = |id: u32| twins.get(&id).map_or(&[][..], Vec::as_slice);
        let visible = |id: u32| !exclude.is_some_and(|set| set.contains(id));
        let wanted = |id: u32| visible(id) || twins_of(id).iter().any(|&twin| visible(twin));
        let walk = match exclude {
            None => graph.walk(query, ef, None),
            Some(_) => graph.walk(query, ef, Some(&wanted)),
        };
        let mut top = TopK::new(k);
        for &(id, score) in &walk.scored {
            if score < top.threshold() {
                continue;
            }
            for &same in std::iter::once(&id).chain(twins_of(id)) {
                if visible(same) {
                    top.offer(same, score);
                }
            }
        }
        let keys_touched = walk.scored.len();
        SearchResult {
            hits: top.into_hits(),
            stats: SearchStats { keys_touched, bytes: keys_touched * self.rows.row_bytes(), nodes_visited: walk.nodes },
        }
    }
}

impl<T: Element> KeyIndex for HnswIndex<T> {
    fn dim(&self) -> usize {
        self.rows.dim()
    }

    fn len(&self) -> usize {
        self.rows.len()
    }

    fn append(&self, keys: &[f32]) -> Result<(), IndexError> {
        check_rows("keys", self.dim(), keys)?;
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let start = self.rows.append(keys)?;
        let end = start + keys.len() / self.dim();
        let fresh = self.take_distinct(&mut writer, start, end);
        let outdated = self.extend_graph(&writer, &fresh);
        // `hnsw_rs` frees a graph on the rayon pool, where this thread may be handed a task that
        // appends to this very index: no lock may be held by then.
        drop(writer);
        drop(outdated);
        Ok(())
    }

    fn search(
        &self,
        query: &[f32],
        params: &SearchParams,
        exclude: Option<&Bitmap>,
    ) -> Result<SearchResult, IndexError> {
        check_query(self.dim(), query)?;
        // The graph is taken first, so that it never lacks a key of an append that is over.
        let graph = self.graph();
        let len = self.len();
        let visible = len - exclude.map_or(0, |set| set.count_below(len));
        let k = params.k.min(visible);
        if k == 0 {
            return Ok(SearchResult::default());
        }
        let ef = params.ef.max(k);
        let Some(graph) = graph.filter(|_| ef < visible) else {
            return Ok(scan(&self.rows, len, query, k, exclude));
        };
        let found = self.walk(&graph, query, k, ef, exclude);
        if found.hits.len() == k {
            return Ok(found);
        }
        let mut result = scan(&self.rows, len, query, k, exclude);
        result.stats.nodes_visited = found.stats.nodes_visited;
        Ok(result)
    }

    fn key(&self, id: u32, out: &mut [f32]) -> Result<(), IndexError> {
        read_key(&self.rows, id, out)
    }

    fn memory_bytes(&self) -> usize {
        let twins = self.twins.read().unwrap_or_else(PoisonError::into_inner);
        let twin_bytes: usize = twins.values().map(|ids| 48 + 4 * ids.capacity()).sum();
        drop(twins);
        // Per key of the graph: hash, id and control byte, at the map's usual load; and its number.
        let writer_bytes = self.len() * 28;
        let graph_bytes = self.graph().map_or(0, |graph| graph.memory_bytes());
        size_of::<Self>() + self.rows.memory_bytes() + twin_bytes + writer_bytes + graph_bytes
    }

    fn kind(&self) -> IndexKind {
        IndexKind::Hnsw
    }

    fn link_bytes(&self) -> usize {
        self.graph().map_or(0, |graph| graph.memory_bytes())
    }

    fn save(&self, path: &Path) -> Result<(), IndexError> {
        let _ = path;
        Err(IndexError::Unsupported { what: "file format", kind: self.kind(), instead: "build it again" })
    }
}

impl<T: Element> fmt::Debug for HnswIndex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HnswIndex")
            .field("dim", &self.dim())
            .field("len", &self.len())
            .field("precision", &T::PRECISION)
            .field("m", &self.params.hnsw_m)
            .field("ef_construction", &self.params.hnsw_ef_construction)
            .finish()
    }
}

/// Equal rows have equal hashes, whichever zeros they hold.
fn hash_row<T: Element>(row: &[T]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for &x in row {
        let bits = if x.to_f32() == 0.0 { 0 } else { x.bits() };
        bits.hash(&mut hasher);
    }
    hasher.finish()
}

fn same_row<T: Element>(a: &[T], b: &[T]) -> bool {
    a.iter().zip(b).all(|(x, y)| x.to_f32() == y.to_f32())
}
