//! The attention-aware graph.

mod beam;
mod build;
mod core;
mod links;
mod shape;

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::bitmap::Bitmap;
use crate::check::{check_query, check_rows};
use crate::element::Element;
use crate::error::IndexError;
use crate::key_index::{KeyIndex, SearchResult, SearchStats};
use crate::metric::dot;
use crate::neighbours::{Neighbours, exact_neighbours};
use crate::params::{GraphParams, IndexKind, SearchParams};
use crate::rows::Rows;
use crate::scan::{read_key, scan};
use crate::top_k::TopK;
use crate::twins::{Distinct, Twins};
use core::Core;

/// See the module.
pub(crate) struct GraphIndex<T: Element> {
    rows: Rows<T>,
    params: GraphParams,
    core: RwLock<Option<Arc<Core>>>,
    twins: Twins,
    writer: Mutex<Distinct>,
}

impl<T: Element> GraphIndex<T> {
    pub(crate) fn build(
        dim: usize,
        keys: &[f32],
        samples: &[f32],
        neighbours: Option<&Neighbours>,
        params: &GraphParams,
    ) -> Result<Self, IndexError> {
        let rows = Rows::new(dim, keys.len() / dim);
        rows.append(keys)?;
        let twins = Twins::default();
        let mut distinct = Distinct::default();
        let fresh = distinct.take(&rows, &twins, 0, keys.len() / dim);
        let computed;
        let neighbours = match neighbours {
            Some(n) => n,
            None => {
                computed = exact_neighbours(dim, keys, samples, params.sample_neighbours, 0)?;
                &computed
            }
        };
        let core = Core::build(dim, keys, &fresh, samples, neighbours, params)?;
        Ok(Self {
            rows,
            params: params.clone(),
            core: RwLock::new(Some(Arc::new(core))),
            twins,
            writer: Mutex::new(distinct),
        })
    }

    fn core(&self) -> Option<Arc<Core>> {
        self.core.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn walk(&self, core: &Core, query: &[f32], k: usize, ef: usize, exclude: Option<&Bitmap>) -> SearchResult {
        let twins = self.twins.read();
        let twins_of = |id: u32| twins.get(&id).map_or(&[][..], Vec::as_slice);
        let visible = |id: u32| !exclude.is_some_and(|set| set.contains(id));
        let wanted = |id: u32| visible(id) || twins_of(id).iter().any(|&twin| visible(twin));
        let (mut ids, walked) = match exclude {
            None => core.walk(query, ef, None),
            Some(_) => core.walk(query, ef, Some(&wanted)),
        };
        ids.truncate(k + k / 4 + 16);
        let rows = self.rows.view();
        for &id in &ids {
            rows.prefetch(id as usize);
        }
        let mut top = TopK::new(k);
        for &id in &ids {
            let score = dot(query, rows.row(id as usize));
            for &same in std::iter::once(&id).chain(twins_of(id)) {
                if visible(same) {
                    top.offer(same, score);
                }
            }
        }
        let bytes = walked.scored * core.codes.row_bytes()
            + walked.followed * core.links().row_bytes()
            + ids.len() * self.rows.row_bytes();
        SearchResult {
            hits: top.into_hits(),
            stats: SearchStats { keys_touched: walked.scored, bytes, nodes_visited: walked.followed },
        }
    }
}

impl<T: Element> KeyIndex for GraphIndex<T> {
    fn dim(&self) -> usize {
        self.rows.dim()
    }

    fn len(&self) -> usize {
        self.rows.len()
    }

    fn append(&self, keys: &[f32]) -> Result<(), IndexError> {
        check_rows("keys", self.dim(), keys)?;
        Ok(())
    }

    fn search(
        &self,
        query: &[f32],
        params: &SearchParams,
        exclude: Option<&Bitmap>,
    ) -> Result<SearchResult, IndexError> {
        check_query(self.dim(), query)?;
        let core = self.core();
        let len = self.len();
        let visible = len - exclude.map_or(0, |set| set.count_below(len));
        let k = params.k.min(visible);
        if k == 0 {
            return Ok(SearchResult::default());
        }
        let ef = params.ef.max(k);
        let Some(core) = core.filter(|_| ef < visible) else {
            return Ok(scan(&self.rows, len, query, k, exclude));
        };
        let found = self.walk(&core, query, k, ef, exclude);
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
        let core_bytes = self.core().map_or(0, |core| core.memory_bytes());
        size_of::<Self>()
            + self.rows.memory_bytes()
            + core_bytes
            + self.twins.memory_bytes()
            + Distinct::memory_bytes(self.len())
    }

    fn kind(&self) -> IndexKind {
        IndexKind::Graph
    }

    fn link_bytes(&self) -> usize {
        self.core().map_or(0, |core| core.links().memory_bytes())
    }

    fn save(&self, path: &Path) -> Result<(), IndexError> {
        let _ = (path, &self.params, &self.writer);
        Err(IndexError::Unsupported { what: "file format", kind: self.kind(), instead: "build it again" })
    }
}

impl<T: Element> fmt::Debug for GraphIndex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GraphIndex")
            .field("dim", &self.dim())
            .field("len", &self.len())
            .field("precision", &T::PRECISION)
            .field("params", &self.params)
            .finish()
    }
}
