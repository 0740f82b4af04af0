//! Clusters of keys: the index of RetroInfer (arXiv 2505.02922, section 4), without values.
//!
//! Keys are clustered inside segments of consecutive ones (`clusters/segment.rs`). A search scores the clusters' means,
//! held in a byte a number, and then every member of the best clusters; members lie together in memory. Keys that
//! come later are a tail, which every search scans, until there are enough of them for a segment.

mod file;
mod segment;

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::bitmap::Bitmap;
use crate::check::{check_len, check_query, check_rows};
use crate::element::Element;
use crate::error::IndexError;
use crate::key_index::{KeyIndex, SearchResult, SearchStats, Zone, Zones};
use crate::metric::dot_rows;
use crate::order::rank;
use crate::parallel::map_ranges;
use crate::params::{ClustersParams, IndexKind, SearchParams};
use crate::rows::Rows;
use crate::top_k::TopK;
use segment::Segment;

/// Keys of a tail that become a segment, or as many as a segment has at most if that is fewer.
const TAIL: usize = 1024;

/// See the module.
pub(crate) struct ClustersIndex<T: Element> {
    dim: usize,
    params: ClustersParams,
    state: RwLock<Arc<State<T>>>,
    writer: Mutex<()>,
}

/// All keys at one time: whole segments, and behind them the tail.
struct State<T: Element> {
    segments: Vec<Arc<Segment<T>>>,
    /// The id of the tail's first key.
    clustered: usize,
    tail: Rows<T>,
}

/// A cluster among all segments with its score.
struct Ranked {
    /// See `order.rs`; the low half is a number of `places`.
    ranks: Vec<u64>,
    /// Segment and cluster within it.
    places: Vec<(u32, u32)>,
    bytes: usize,
}

impl<T: Element> ClustersIndex<T> {
    /// An index over `keys`, rows of `dim` numbers; everything was checked.
    pub(crate) fn build(dim: usize, keys: &[f32], params: &ClustersParams) -> Result<Self, IndexError> {
        let mut segments = Vec::new();
        let clustered = cluster::<T>(dim, 0, keys, params, &mut segments)?;
        let tail = Rows::new(dim, 0);
        tail.append(&keys[clustered * dim..])?;
        let state = State { segments, clustered, tail };
        Ok(Self { dim, params: params.clone(), state: RwLock::new(Arc::new(state)), writer: Mutex::default() })
    }

    fn state(&self) -> Arc<State<T>> {
        Arc::clone(&self.state.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Clusters as many of the keys as make whole segments, the first of which has the id `first`; returns how many.
fn cluster<T: Element>(
    dim: usize,
    first: usize,
    keys: &[f32],
    params: &ClustersParams,
    segments: &mut Vec<Arc<Segment<T>>>,
) -> Result<usize, IndexError> {
    let count = keys.len() / dim;
    let rest = count % params.segment;
    let enough = rest >= TAIL.min(params.segment);
    let pieces = count / params.segment + usize::from(enough);
    let made = map_ranges(pieces, 1, |range| {
        let start = range.start * params.segment;
        let end = count.min(start + params.segment);
        Segment::build(dim, first + start, &keys[start * dim..end * dim], params)
    });
    for segment in made {
        segments.push(Arc::new(segment?));
    }
    Ok(if enough { count } else { count - rest })
}

impl<T: Element> State<T> {
    fn len(&self) -> usize {
        self.clustered + self.tail.len()
    }

    /// All clusters with their scores, in no order.
    fn rank_clusters(&self, query: &[f32]) -> Ranked {
        let count = self.segments.iter().map(|s| s.clusters()).sum();
        let mut ranked = Ranked { ranks: Vec::with_capacity(count), places: Vec::with_capacity(count), bytes: 0 };
        let (mut scores, mut ids) = (Vec::new(), Vec::new());
        for (number, segment) in self.segments.iter().enumerate() {
            let base = segment.codes().center_score(query);
            ids.clear();
            ids.extend(0..segment.clusters() as u32);
            segment.codes().view().score(&segment.codes().probe(query), &ids, &mut scores);
            for (&cluster, score) in ids.iter().zip(&scores) {
                ranked.ranks.push(rank(score + base, ranked.places.len() as u32));
                ranked.places.push((number as u32, cluster));
            }
            ranked.bytes += ids.len() * segment.codes().row_bytes() + 4 * query.len();
        }
        ranked
    }

    /// Scores the keys of a cluster.
    fn read_cluster(
        &self,
        place: (u32, u32),
        query: &[f32],
        scores: &mut Vec<f32>,
        mut each: impl FnMut(u32, f32),
    ) -> usize {
        let segment = &self.segments[place.0 as usize];
        let (ids, rows) = segment.members(place.1 as usize);
        scores.resize(ids.len(), 0.0);
        dot_rows(query, rows, scores);
        ids.iter().zip(scores.iter()).for_each(|(&id, &score)| each(id, score));
        ids.len()
    }

    /// Scores the keys of the tail.
    fn read_tail(&self, len: usize, query: &[f32], scores: &mut Vec<f32>, mut each: impl FnMut(u32, f32)) {
        for (start, rows) in self.tail.runs(len) {
            scores.resize(rows.len() / self.tail.stride(), 0.0);
            dot_rows(query, rows, scores);
            scores.iter().enumerate().for_each(|(i, &score)| each((self.clustered + start + i) as u32, score));
        }
    }
}

impl<T: Element> KeyIndex for ClustersIndex<T> {
    fn dim(&self) -> usize {
        self.dim
    }

    fn len(&self) -> usize {
        self.state().len()
    }

    fn append(&self, keys: &[f32]) -> Result<(), IndexError> {
        check_rows("keys", self.dim, keys)?;
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.state();
        let limit = crate::blocks::MAX_ROWS;
        if old.len() + keys.len() / self.dim > limit {
            return Err(IndexError::Full { found: old.len() + keys.len() / self.dim, limit });
        }
        let tail = old.tail.len() + keys.len() / self.dim;
        if tail < TAIL.min(self.params.segment) {
            return old.tail.append(keys).map(|_| ());
        }
        T::check(self.dim, keys)?;
        let mut all = vec![0.0; old.tail.len() * self.dim];
        for (id, row) in all.chunks_exact_mut(self.dim).enumerate() {
            T::decode(old.tail.row(id), row);
        }
        all.extend_from_slice(keys);
        let mut segments = old.segments.clone();
        let done = cluster::<T>(self.dim, old.clustered, &all, &self.params, &mut segments)?;
        let tail = Rows::new(self.dim, 0);
        tail.append(&all[done * self.dim..])?;
        let state = State { segments, clustered: old.clustered + done, tail };
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(state);
        Ok(())
    }

    fn search(
        &self,
        query: &[f32],
        params: &SearchParams,
        exclude: Option<&Bitmap>,
    ) -> Result<SearchResult, IndexError> {
        check_query(self.dim, query)?;
        let state = self.state();
        let tail = state.tail.len();
        let len = state.clustered + tail;
        let visible = len - exclude.map_or(0, |set| set.count_below(len));
        let k = params.k.min(visible);
        if k == 0 {
            return Ok(SearchResult::default());
        }
        let hidden = |id: u32| exclude.is_some_and(|set| set.contains(id));
        let (mut top, mut scores, mut seen) = (TopK::new(k), Vec::new(), 0);
        let mut stats = SearchStats { keys_touched: tail, ..SearchStats::default() };
        let mut offer = |id: u32, score: f32| {
            if !hidden(id) {
                seen += 1;
                if score >= top.threshold() {
                    top.offer(id, score);
                }
            }
        };
        state.read_tail(tail, query, &mut scores, &mut offer);
        let mut clusters = state.rank_clusters(query);
        let enough = 2 * k.div_ceil(self.params.keys_per_cluster);
        let probes = match params.probes {
            0 => enough.max(clusters.ranks.len() / 50),
            probes => probes,
        };
        let sorted = sort_first(&mut clusters.ranks, probes);
        let mut offered = 0;
        for at in 0..clusters.ranks.len() {
            if at == sorted {
                // Not a matter of ranks any more, but of finding k keys that are not hidden.
                clusters.ranks[at..].sort_unstable();
            }
            if at >= probes && offered >= k {
                break;
            }
            let place = clusters.places[clusters.ranks[at] as u32 as usize];
            if let Some(&next) = clusters.ranks.get(at + 1) {
                let (segment, cluster) = clusters.places[next as u32 as usize];
                state.segments[segment as usize].prefetch(cluster as usize);
            }
            stats.keys_touched += state.read_cluster(place, query, &mut scores, |id, score| {
                if !hidden(id) {
                    offered += 1;
                }
                offer(id, score);
            });
            stats.nodes_visited += 1;
        }
        stats.bytes = clusters.bytes + stats.keys_touched * state.tail.row_bytes();
        Ok(SearchResult { hits: top.into_hits(), stats })
    }

    fn search_zones(
        &self,
        query: &[f32],
        top: usize,
        next: usize,
        exclude: Option<&Bitmap>,
    ) -> Result<Zones, IndexError> {
        check_query(self.dim, query)?;
        let state = self.state();
        let tail = state.tail.len();
        let mut clusters = state.rank_clusters(query);
        sort_first(&mut clusters.ranks, top.saturating_add(next));
        let places: Vec<(u32, u32)> =
            clusters.ranks.iter().map(|&rank| clusters.places[rank as u32 as usize]).collect();
        let hidden = |id: u32| exclude.is_some_and(|set| set.contains(id));
        let (mut ranks, mut scores) = (Vec::new(), Vec::new());
        let mut keep = |id: u32, score: f32| {
            if !hidden(id) {
                ranks.push(rank(score, id));
            }
        };
        let mut stats = SearchStats { keys_touched: tail, ..SearchStats::default() };
        state.read_tail(tail, query, &mut scores, &mut keep);
        let (exact, rest) = places.split_at(top.min(places.len()));
        for &place in exact {
            stats.keys_touched += state.read_cluster(place, query, &mut scores, &mut keep);
            stats.nodes_visited += 1;
        }
        let zone = |&(segment, cluster): &(u32, u32)| state.segments[segment as usize].zone(cluster as usize);
        let estimated: Vec<Zone> = rest.iter().take(next).map(zone).collect();
        stats.bytes = clusters.bytes + stats.keys_touched * state.tail.row_bytes() + estimated.len() * 4 * self.dim;
        Ok(Zones { hits: crate::order::into_hits(ranks), estimated, stats })
    }

    fn key(&self, id: u32, out: &mut [f32]) -> Result<(), IndexError> {
        check_len("output", self.dim, out.len())?;
        let state = self.state();
        let len = state.len();
        if id as usize >= len {
            return Err(IndexError::UnknownId { id, len });
        }
        if id as usize >= state.clustered {
            T::decode(state.tail.row(id as usize - state.clustered), out);
            return Ok(());
        }
        let segment = state.segments.partition_point(|segment| segment.first() <= id as usize) - 1;
        state.segments[segment].key(id, out);
        Ok(())
    }

    fn memory_bytes(&self) -> usize {
        let state = self.state();
        let segments: usize = state.segments.iter().map(|segment| segment.memory_bytes()).sum();
        size_of::<Self>() + size_of::<State<T>>() + segments + state.tail.memory_bytes()
    }

    fn kind(&self) -> IndexKind {
        IndexKind::Clusters
    }

    fn save(&self, path: &Path) -> Result<(), IndexError> {
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        self.write(path)
    }
}

/// Brings the best `count` to the front, in order; returns how many are there.
fn sort_first(ranks: &mut [u64], count: usize) -> usize {
    let count = count.min(ranks.len());
    if count > 0 && count < ranks.len() {
        ranks.select_nth_unstable(count - 1);
    }
    ranks[..count].sort_unstable();
    count
}

impl<T: Element> fmt::Debug for ClustersIndex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClustersIndex")
            .field("dim", &self.dim)
            .field("len", &self.len())
            .field("precision", &T::PRECISION)
            .field("params", &self.params)
            .finish()
    }
}
