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

use std::fmt;
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
use crate::storage::{Parts, Sections, Tag, Wrong};
use crate::top_k::TopK;
use crate::twins::{Distinct, Twins};
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
    twins: Twins,
    writer: Mutex<Distinct>,
}

impl<T: Element> HnswIndex<T> {
    /// An index over `keys`, rows of `dim` numbers; `params` are in range. `wanted` is asked before each key.
    pub(crate) fn build_while(
        dim: usize,
        keys: &[f32],
        params: &IndexParams,
        wanted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Self, IndexError> {
        Self::build_with_graph_from(dim, keys, params, GRAPH_FROM, wanted)
    }

    /// As `build_while`, with a graph from that many distinct keys on.
    pub(crate) fn build_with_graph_from(
        dim: usize,
        keys: &[f32],
        params: &IndexParams,
        graph_from: usize,
        wanted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Self, IndexError> {
        check_rows("keys", dim, keys)?;
        let index = Self {
            rows: Arc::new(Rows::new(dim, keys.len() / dim)),
            params: params.clone(),
            graph_from,
            graph: RwLock::default(),
            twins: Twins::default(),
            writer: Mutex::default(),
        };
        index.append_while(keys, wanted)?;
        Ok(index)
    }

    /// What is given up is of no use any more.
    fn append_while(&self, keys: &[f32], wanted: &(dyn Fn() -> bool + Sync)) -> Result<(), IndexError> {
        check_rows("keys", self.dim(), keys)?;
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let start = self.rows.append(keys)?;
        let end = start + keys.len() / self.dim();
        let fresh = writer.take(&self.rows, &self.twins, start, end);
        let outdated = self.extend_graph(&writer, &fresh, wanted);
        // `hnsw_rs` frees a graph on the rayon pool, where this thread may be handed a task that
        // appends to this very index: no lock may be held by then.
        drop(writer);
        outdated.map(drop)
    }

    /// Brings new distinct keys into the graph, or builds it again when they do not fit it.
    /// Returns a graph that is no longer needed.
    fn extend_graph(
        &self,
        writer: &Distinct,
        fresh: &[u32],
        wanted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Option<Arc<Graph<T>>>, IndexError> {
        if fresh.is_empty() || writer.ids.len() < self.graph_from {
            return Ok(None);
        }
        if let Some(graph) = self.graph()
            && graph.fits(fresh)
        {
            return graph.insert(fresh, wanted).map(|()| None);
        }
        let graph = Graph::build(Arc::clone(&self.rows), &writer.ids, &self.params, wanted)?;
        let mut current = self.graph.write().unwrap_or_else(PoisonError::into_inner);
        Ok(current.replace(Arc::new(graph)))
    }

    fn graph(&self) -> Option<Arc<Graph<T>>> {
        let graph = self.graph.read().unwrap_or_else(PoisonError::into_inner);
        graph.clone()
    }

    /// The best `k` of the keys that a walk with `ef` candidates meets.
    fn walk(&self, graph: &Graph<T>, query: &[f32], k: usize, ef: usize, exclude: Option<&Bitmap>) -> SearchResult {
        let twins = self.twins.read();
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

impl<T: Element> HnswIndex<T> {
    /// An index from the keys in a file.
    pub(crate) fn read(parts: &Parts) -> Result<Self, Wrong> {
        let numbers = parts.numbers(Tag::Params, Some(2))?;
        let (m, ef) = (numbers[0] as usize, numbers[1] as usize);
        if !(2..=255).contains(&m) || !(1..=65_536).contains(&ef) {
            return Err(format!("m {m} and ef_construction {ef} are out of range"));
        }
        let params = IndexParams { hnsw_m: m, hnsw_ef_construction: ef, ..IndexParams::default() };
        let rows: Rows<T> = parts.rows(Tag::Rows, parts.len, 0, parts.len)?;
        let index = Self {
            rows: Arc::new(rows),
            params,
            graph_from: GRAPH_FROM,
            graph: RwLock::default(),
            twins: Twins::default(),
            writer: Mutex::default(),
        };
        let mut writer = Distinct::default();
        let fresh = writer.take(&index.rows, &index.twins, 0, parts.len);
        index.extend_graph(&writer, &fresh, &|| true).map_err(|error| error.to_string())?;
        *index.writer.lock().unwrap_or_else(PoisonError::into_inner) = writer;
        Ok(index)
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
        self.append_while(keys, &|| true)
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
        let twin_bytes = self.twins.memory_bytes();
        let writer_bytes = Distinct::memory_bytes(self.len());
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
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let len = self.len();
        let mut sections = Sections::new::<T>(self.kind(), self.dim(), len);
        sections.numbers(Tag::Params, [self.params.hnsw_m, self.params.hnsw_ef_construction].map(|x| x as u32));
        sections.rows(Tag::Rows, &self.rows, len);
        sections.write(path)
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
