//! Clusters of keys: the index of RetroInfer (arXiv 2505.02922, section 4), without values.
//!
//! Keys are clustered inside segments of consecutive ones (`clusters/segment.rs`). A search scores the clusters' means,
//! held in a byte a number, and then every member of the best clusters; members lie together in memory. Keys that
//! come later are a tail, which every search scans, until there are enough of them for a segment.

mod file;
mod segment;

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::bitmap::Bitmap;
use crate::check::{check_len, check_query, check_rows};
use crate::element::Element;
use crate::error::IndexError;
use crate::key_index::{KeyIndex, SearchResult, SearchStats, Zone, Zones};
use crate::metric::dot_rows;
use crate::order::{id_of, rank};
use crate::parallel::map_ranges;
use crate::params::{ClustersParams, IndexKind, SearchParams};
use crate::rows::Rows;
use crate::top_k::TopK;
use segment::Segment;

/// Keys of a tail that become a segment, or as many as a segment has at most if that is fewer.
const TAIL: usize = 1024;
/// Queries of a group at most that read together: each ranks all clusters.
const TOGETHER: usize = 64;

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

/// All clusters with their scores.
struct Ranked {
    /// Segment and cluster within it.
    places: Vec<(u32, u32)>,
    /// For each query the ranks of the clusters (see `order.rs`), whose low halves are numbers of `places`.
    ranks: Vec<Vec<u64>>,
    bytes: usize,
}

/// A query on its way.
struct Seeker<'a> {
    query: &'a [f32],
    top: TopK,
    /// Keys of clusters that were read for it and are not hidden.
    offered: usize,
    stats: SearchStats,
}

impl Seeker<'_> {
    fn offer(&mut self, id: u32, score: f32) {
        if score >= self.top.threshold() {
            self.top.offer(id, score);
        }
    }
}

/// A cluster that a query wants.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Wish {
    /// Which of `Ranked::places`.
    at: u32,
    /// How many the query ranks before it.
    position: u32,
    query: u32,
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

    /// All clusters with their scores for each query, in no order: one pass over the means.
    fn rank_clusters(&self, queries: &[f32]) -> Ranked {
        let dim = self.tail.dim();
        let count = self.segments.iter().map(|s| s.clusters()).sum();
        let mut places: Vec<(u32, u32)> = Vec::with_capacity(count);
        let mut ranks: Vec<Vec<u64>> = queries.chunks_exact(dim).map(|_| Vec::with_capacity(count)).collect();
        let (mut scores, mut ids, mut bytes) = (Vec::new(), Vec::new(), 0);
        for (number, segment) in self.segments.iter().enumerate() {
            ids.clear();
            ids.extend(0..segment.clusters() as u32);
            let (codes, first) = (segment.codes().view(), places.len());
            for (query, ranks) in queries.chunks_exact(dim).zip(&mut ranks) {
                let base = segment.codes().center_score(query);
                codes.score(&segment.codes().probe(query), &ids, &mut scores);
                ranks.extend(scores.iter().zip(first..).map(|(score, at)| rank(score + base, at as u32)));
            }
            places.extend(ids.iter().map(|&cluster| (number as u32, cluster)));
            bytes += ids.len() * segment.codes().row_bytes() + 4 * dim;
        }
        Ranked { places, ranks, bytes }
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

impl<T: Element> State<T> {
    /// Searches for each query; a cluster that several want is read once.
    fn search(
        &self,
        queries: &[f32],
        params: &SearchParams,
        keys_per_cluster: usize,
        exclude: Option<&Bitmap>,
    ) -> Vec<SearchResult> {
        let tail = self.tail.len();
        let len = self.clustered + tail;
        let k = params.k.min(len - exclude.map_or(0, |set| set.count_below(len)));
        let queries_of = queries.chunks_exact(self.tail.dim());
        if k == 0 || queries.is_empty() {
            return queries_of.map(|_| SearchResult::default()).collect();
        }
        let seeker = |query| Seeker { query, top: TopK::new(k), offered: 0, stats: SearchStats::default() };
        let mut seekers: Vec<Seeker<'_>> = queries_of.map(seeker).collect();
        let hidden = |id: u32| exclude.is_some_and(|set| set.contains(id));
        let mut scores = Vec::new();
        for seeker in &mut seekers {
            self.read_tail(tail, seeker.query, &mut scores, |id, score| {
                if !hidden(id) {
                    seeker.offer(id, score);
                }
            });
        }
        let mut ranked = self.rank_clusters(queries);
        seekers[0].stats.keys_touched += tail;
        seekers[0].stats.bytes += ranked.bytes + tail * self.tail.row_bytes();
        let probes = match params.probes {
            0 => (2 * k.div_ceil(keys_per_cluster)).max(ranked.places.len() / 50),
            probes => probes,
        };
        let wishes = first_wishes(&mut ranked.ranks, probes);
        let mut clusters: Vec<&[Wish]> = wishes.chunk_by(|a, b| a.at == b.at).collect();
        clusters.sort_by_key(|wishes| wishes[0].position);
        for (number, wishes) in clusters.iter().enumerate() {
            if let Some(next) = clusters.get(number + 1) {
                let (segment, cluster) = ranked.places[next[0].at as usize];
                self.segments[segment as usize].prefetch(cluster as usize);
            }
            let reader = wishes.iter().map(|wish| wish.query).min();
            for wish in *wishes {
                let counts = Some(wish.query) == reader;
                self.seek(
                    &mut seekers[wish.query as usize],
                    ranked.places[wish.at as usize],
                    counts,
                    exclude,
                    &mut scores,
                );
            }
        }
        self.seek_on(&mut seekers, &mut ranked, &wishes, k, probes, exclude);
        seekers.into_iter().map(|seeker| SearchResult { hits: seeker.top.into_hits(), stats: seeker.stats }).collect()
    }

    /// Reads further clusters for queries that have met fewer than `k` keys which are not hidden.
    fn seek_on(
        &self,
        seekers: &mut [Seeker<'_>],
        ranked: &mut Ranked,
        wishes: &[Wish],
        k: usize,
        probes: usize,
        exclude: Option<&Bitmap>,
    ) {
        let mut read: BTreeSet<u32> = BTreeSet::new();
        if seekers.iter().any(|seeker| seeker.offered < k) {
            read.extend(wishes.iter().map(|wish| wish.at));
        }
        let mut scores = Vec::new();
        for (seeker, ranks) in seekers.iter_mut().zip(&mut ranked.ranks) {
            let rest = &mut ranks[probes.min(ranked.places.len())..];
            if seeker.offered < k {
                rest.sort_unstable();
            }
            for &rank in rest.iter() {
                if seeker.offered >= k {
                    break;
                }
                let at = id_of(rank);
                self.seek(seeker, ranked.places[at as usize], read.insert(at), exclude, &mut scores);
            }
        }
    }

    /// Offers a cluster's keys to a query, with whom they count if `counts`.
    fn seek(
        &self,
        seeker: &mut Seeker<'_>,
        place: (u32, u32),
        counts: bool,
        exclude: Option<&Bitmap>,
        scores: &mut Vec<f32>,
    ) {
        let keys = self.read_cluster(place, seeker.query, scores, |id, score| {
            if !exclude.is_some_and(|set| set.contains(id)) {
                seeker.offered += 1;
                seeker.offer(id, score);
            }
        });
        if counts {
            seeker.stats.keys_touched += keys;
            seeker.stats.bytes += keys * self.tail.row_bytes();
            seeker.stats.nodes_visited += 1;
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
        Ok(self.state().search(query, params, self.params.keys_per_cluster, exclude).pop().unwrap_or_default())
    }

    fn search_group(
        &self,
        queries: &[f32],
        params: &SearchParams,
        exclude: Option<&Bitmap>,
    ) -> Result<Vec<SearchResult>, IndexError> {
        check_rows("queries", self.dim, queries)?;
        let (state, mut results) = (self.state(), Vec::with_capacity(queries.len() / self.dim));
        for queries in queries.chunks(TOGETHER * self.dim) {
            results.extend(state.search(queries, params, self.params.keys_per_cluster, exclude));
        }
        Ok(results)
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
        let ranks = &mut clusters.ranks[0];
        sort_first(ranks, top.saturating_add(next));
        let places: Vec<(u32, u32)> = ranks.iter().map(|&rank| clusters.places[id_of(rank) as usize]).collect();
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

/// The best `count` clusters of each query, those of one place side by side.
fn first_wishes(ranks: &mut [Vec<u64>], count: usize) -> Vec<Wish> {
    let mut wishes = Vec::new();
    for (query, ranks) in ranks.iter_mut().enumerate() {
        let first = sort_first(ranks, count);
        let wish =
            |(position, &rank): (usize, &u64)| Wish { at: id_of(rank), position: position as u32, query: query as u32 };
        wishes.extend(ranks[..first].iter().enumerate().map(wish));
    }
    if ranks.len() > 1 {
        wishes.sort_unstable();
    }
    wishes
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

#[cfg(test)]
mod tests;
