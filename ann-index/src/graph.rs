//! The attention-aware graph: RetrievalAttention (arXiv 2409.10516) on RoarGraph (arXiv 2408.08933).
//!
//! Its links follow which keys compete for the same queries, as the sample queries show (`graph/build.rs`,
//! `graph/shape.rs`), its searches read keys of one byte a number (`codes.rs`) and rank the best ones by
//! their stored numbers. One graph serves all query heads that share the keys, or each has its own over the same keys
//! (`graph/graphs.rs`, [`GraphParams::query_heads`]). Around the graphs, this module:
//!
//! * scans while the keys are few, or while a search asks for as many candidates as there are keys;
//! * puts only the first of equal keys into the graph;
//! * falls back to a scan when the walk found fewer keys than were asked for.
//!
//! Without sample queries the keys themselves are taken for queries, all directions counting alike.

mod beam;
mod build;
mod core;
mod file;
mod graphs;
mod guides;
mod links;
mod shape;

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
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
use crate::scan::{read_key, scan, scan_group};
use crate::top_k::TopK;
use crate::twins::{Distinct, Twins};
use graphs::{Graphs, KeySet, Walked};

/// Fewer distinct keys than this are scanned: that takes microseconds.
const GRAPH_FROM: usize = 512;
/// A graph of fewer keys is built again when it has four times as many: what it knows of the keys came from few.
const SETTLED: usize = 4096;
/// Keys at most that stand in for sample queries.
const STAND_INS: usize = 8192;
/// Graphs over the keys of a KV head at most.
pub(crate) const MOST_HEADS: usize = 128;
/// Walks at most that take turns: each has a set of all keys to itself, and more of them do not find more in the caches.
const TOGETHER: usize = 32;
/// Keys at most: the beam marks ids in their highest bit.
const MOST_KEYS: usize = 1 << 31;

/// See the module.
pub(crate) struct GraphIndex<T: Element> {
    rows: Rows<T>,
    params: GraphParams,
    graph_from: usize,
    graphs: RwLock<Option<Arc<Graphs>>>,
    twins: Twins,
    writer: Mutex<Writer>,
    /// Numbers of the samples that the writer keeps.
    kept: AtomicUsize,
}

/// What only the appending thread needs.
struct Writer {
    /// `None` after the index was opened, until it is needed.
    distinct: Option<Distinct>,
    /// Kept until the graph has settled.
    samples: Vec<f32>,
}

impl<T: Element> GraphIndex<T> {
    /// An index over `keys`, rows of `dim` numbers; everything was checked.
    pub(crate) fn build(
        dim: usize,
        keys: &[f32],
        samples: &[f32],
        neighbours: Option<&Neighbours>,
        params: &GraphParams,
    ) -> Result<Self, IndexError> {
        Self::build_with_graph_from(dim, keys, samples, neighbours, params, GRAPH_FROM)
    }

    /// As `build`, with a graph from that many distinct keys on.
    pub(crate) fn build_with_graph_from(
        dim: usize,
        keys: &[f32],
        samples: &[f32],
        neighbours: Option<&Neighbours>,
        params: &GraphParams,
        graph_from: usize,
    ) -> Result<Self, IndexError> {
        let rows = Rows::new(dim, keys.len() / dim);
        check_room(0, keys.len() / dim)?;
        rows.append(keys)?;
        let (twins, mut distinct) = (Twins::default(), Distinct::default());
        distinct.take(&rows, &twins, 0, keys.len() / dim);
        let graphs = match distinct.ids.len() >= graph_from.max(1) {
            true => Some(Arc::new(build_graphs(dim, keys, &distinct.ids, &twins, samples, neighbours, params)?)),
            false => None,
        };
        let samples = if distinct.ids.len() >= SETTLED { Vec::new() } else { samples.to_vec() };
        Ok(Self {
            rows,
            params: params.clone(),
            graph_from,
            graphs: RwLock::new(graphs),
            twins,
            kept: AtomicUsize::new(samples.len()),
            writer: Mutex::new(Writer { distinct: Some(distinct), samples }),
        })
    }

    /// All keys, widened.
    fn all_keys(&self) -> Vec<f32> {
        let mut keys = vec![0.0; self.len() * self.dim()];
        for (id, key) in keys.chunks_exact_mut(self.dim()).enumerate() {
            T::decode(self.rows.row(id), key);
        }
        keys
    }

    fn graphs(&self) -> Option<Arc<Graphs>> {
        self.graphs.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What walks for all queries find: `k` keys each, or fewer.
    fn walk(
        &self,
        graphs: &Graphs,
        queries: &[f32],
        params: &SearchParams,
        exclude: Option<&Bitmap>,
    ) -> Vec<SearchResult> {
        let SearchParams { k, ef, query_head: first, .. } = *params;
        let twins = self.twins.read();
        let twins_of = |id: u32| twins.get(&id).map_or(&[][..], Vec::as_slice);
        let visible = |id: u32| !exclude.is_some_and(|set| set.contains(id));
        let wanted = |id: u32| visible(id) || twins_of(id).iter().any(|&twin| visible(twin));
        let mut walks = match exclude {
            None => graphs.walk(queries, first, ef, None),
            Some(_) => graphs.walk(queries, first, ef, Some(&wanted)),
        };
        let rows = self.rows.view();
        for walked in &mut walks {
            walked.ids.truncate(k + k / 4 + 16);
        }
        let (mut read, alone) = (KeySet::new(rows.len()), walks.len() == 1);
        let finish = |(query, walked): (&[f32], Walked)| {
            walked.ids.iter().for_each(|&id| rows.prefetch(id as usize));
            let (mut top, mut stored) = (TopK::new(k), 0);
            for &id in &walked.ids {
                let score = dot(query, rows.row(id as usize));
                stored += usize::from(alone || read.insert(id));
                for &same in std::iter::once(&id).chain(twins_of(id)) {
                    if visible(same) {
                        top.offer(same, score);
                    }
                }
            }
            let bytes = walked.scored * graphs.codes.row_bytes()
                + walked.followed * graphs.link_row_bytes()
                + stored * self.rows.row_bytes();
            SearchResult {
                hits: top.into_hits(),
                stats: SearchStats { keys_touched: walked.scored, bytes, nodes_visited: walked.followed },
            }
        };
        queries.chunks_exact(self.dim()).zip(walks).map(finish).collect()
    }

    /// Refuses a query head that there is no graph for.
    fn check_head(&self, params: &SearchParams) -> Result<(), IndexError> {
        let (value, heads) = (params.query_head, self.params.query_heads);
        match heads == 1 || value < heads {
            true => Ok(()),
            false => {
                let expected = "below the `graph.query_heads` that the index was built with";
                Err(IndexError::BadParameter { name: "query_head", value, expected })
            }
        }
    }

    /// The best keys of each query; everything was checked.
    fn find(&self, queries: &[f32], params: &SearchParams, exclude: Option<&Bitmap>) -> Vec<SearchResult> {
        let graphs = self.graphs();
        let len = self.len();
        let visible = len - exclude.map_or(0, |set| set.count_below(len));
        let k = params.k.min(visible);
        let ef = params.ef.max(k);
        let Some(graphs) = graphs.filter(|_| k > 0 && ef < visible) else {
            return scan_group(&self.rows, len, queries, k, exclude);
        };
        let mut results = Vec::with_capacity(queries.len() / self.dim());
        for (block, queries) in queries.chunks(TOGETHER * self.dim()).enumerate() {
            let query_head = (params.query_head % self.params.query_heads + block * TOGETHER) % self.params.query_heads;
            let params = SearchParams { k, ef, query_head, ..*params };
            results.extend(self.walk(&graphs, queries, &params, exclude));
        }
        for (query, result) in queries.chunks_exact(self.dim()).zip(&mut results) {
            if result.hits.len() < k {
                let nodes_visited = result.stats.nodes_visited;
                *result = scan(&self.rows, len, query, k, exclude);
                result.stats.nodes_visited = nodes_visited;
            }
        }
        results
    }
}

/// Refuses more keys than a graph can number.
fn check_room(len: usize, more: usize) -> Result<(), IndexError> {
    match len + more < MOST_KEYS {
        true => Ok(()),
        false => Err(IndexError::Full { found: len + more, limit: MOST_KEYS - 1 }),
    }
}

/// Graphs over the keys `distinct`; neighbours and samples are found where they are missing.
fn build_graphs(
    dim: usize,
    keys: &[f32],
    distinct: &[u32],
    twins: &Twins,
    samples: &[f32],
    neighbours: Option<&Neighbours>,
    params: &GraphParams,
) -> Result<Graphs, IndexError> {
    let stand_ins: Vec<f32>;
    let (samples, known) = match samples.is_empty() {
        false => (samples, true),
        true => {
            stand_ins = stand_in_queries(dim, keys, distinct);
            (&stand_ins[..], false)
        }
    };
    let mut neighbours = match neighbours.filter(|n| known && n.k > 0) {
        Some(neighbours) => neighbours.clone(),
        None => exact_neighbours(dim, keys, samples, params.sample_neighbours, 0)?,
    };
    // Only the first of equal keys is in the graph.
    let firsts: HashMap<u32, u32> =
        twins.read().iter().flat_map(|(&first, twins)| twins.iter().map(move |&twin| (twin, first))).collect();
    if !firsts.is_empty() {
        neighbours.ids.iter_mut().for_each(|id| *id = firsts.get(id).copied().unwrap_or(*id));
    }
    Graphs::build(dim, keys, distinct, samples, known, &neighbours, params)
}

/// Some of the keys without their mean, as queries.
fn stand_in_queries(dim: usize, keys: &[f32], distinct: &[u32]) -> Vec<f32> {
    let center = graphs::mean(dim, keys);
    let chosen = distinct.iter().step_by(distinct.len().div_ceil(STAND_INS).max(1));
    let row = |&id: &u32| keys[id as usize * dim..(id as usize + 1) * dim].iter().zip(&center).map(|(x, c)| x - c);
    chosen.flat_map(row).collect()
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
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let count = keys.len() / self.dim();
        check_room(self.len(), count)?;
        if count == 0 {
            return Ok(());
        }
        let known = self.len();
        let start = self.rows.append(keys)?;
        let Writer { distinct, samples } = &mut *writer;
        let distinct = distinct.get_or_insert_with(|| {
            let mut distinct = Distinct::default();
            distinct.take(&self.rows, &Twins::default(), 0, known);
            distinct
        });
        let fresh = distinct.take(&self.rows, &self.twins, start, start + count);
        let enough = distinct.ids.len() >= self.graph_from.max(1);
        let outgrown = |graphs: &Graphs| enough && graphs.built < SETTLED && distinct.ids.len() >= 4 * graphs.built;
        if let Some(graphs) = self.graphs().filter(|graphs| !outgrown(graphs)) {
            let decode = |id: u32, row: &mut [f32]| T::decode(self.rows.row(id as usize), row);
            return graphs.append(keys, &fresh, &distinct.ids, &decode);
        }
        if enough {
            let keys = self.all_keys();
            let graphs = build_graphs(self.dim(), &keys, &distinct.ids, &self.twins, samples, None, &self.params)?;
            *self.graphs.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(graphs));
            if distinct.ids.len() >= SETTLED {
                *samples = Vec::new();
                self.kept.store(0, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn search(
        &self,
        query: &[f32],
        params: &SearchParams,
        exclude: Option<&Bitmap>,
    ) -> Result<SearchResult, IndexError> {
        check_query(self.dim(), query)?;
        self.check_head(params)?;
        Ok(self.find(query, params, exclude).pop().unwrap_or_default())
    }

    fn search_group(
        &self,
        queries: &[f32],
        params: &SearchParams,
        exclude: Option<&Bitmap>,
    ) -> Result<Vec<SearchResult>, IndexError> {
        check_rows("queries", self.dim(), queries)?;
        self.check_head(params)?;
        Ok(self.find(queries, params, exclude))
    }

    fn key(&self, id: u32, out: &mut [f32]) -> Result<(), IndexError> {
        read_key(&self.rows, id, out)
    }

    fn memory_bytes(&self) -> usize {
        let graph_bytes = self.graphs().map_or(0, |graphs| graphs.memory_bytes());
        size_of::<Self>()
            + self.rows.memory_bytes()
            + graph_bytes
            + self.twins.memory_bytes()
            + Distinct::memory_bytes(self.len())
            + self.kept.load(Ordering::Relaxed) * size_of::<f32>()
    }

    fn kind(&self) -> IndexKind {
        IndexKind::Graph
    }

    fn link_bytes(&self) -> usize {
        self.graphs().map_or(0, |graphs| graphs.link_bytes())
    }

    fn save(&self, path: &Path) -> Result<(), IndexError> {
        self.write(path)
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::params::IndexParams;
    use half::bf16;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    const DIM: usize = 16;

    /// Rows that vary by `seen` in the first four dimensions and by `other` in the rest.
    fn rows(rng: &mut ChaCha8Rng, count: usize, seen: f32, other: f32) -> Vec<f32> {
        let number = |i: usize| {
            let sum: f32 = (0..6).map(|_| rng.random::<f32>() - 0.5).sum();
            sum * if i % DIM < 4 { seen } else { other }
        };
        (0..count * DIM).map(number).collect()
    }

    /// Shares found of the best ten of all keys and of those from `new` on, and keys read by a query.
    fn found(index: &GraphIndex<bf16>, queries: &[f32], new: usize) -> (f64, f64, f64) {
        let (mut all, mut late, mut read) = ([0, 0], [0, 0], 0);
        for query in queries.chunks(DIM) {
            let truth = scan(&index.rows, index.len(), query, 10, None).hits;
            let result = index
                .search(query, &SearchParams { k: 10, ef: 24, probes: 0, ..SearchParams::default() }, None)
                .unwrap();
            read += result.stats.keys_touched;
            for hit in truth {
                let got = usize::from(result.hits.iter().any(|other| other.id == hit.id));
                all = [all[0] + got, all[1] + 1];
                if hit.id as usize >= new {
                    late = [late[0] + got, late[1] + 1];
                }
            }
        }
        let share = |[got, of]: [usize; 2]| got as f64 / of.max(1) as f64;
        (share(all), share(late), read as f64 / (queries.len() / DIM) as f64)
    }

    #[test]
    fn growth_costs_neither_recall_nor_reading() {
        let rng = &mut ChaCha8Rng::seed_from_u64(5);
        let (keys, samples) = (rows(rng, 6000, 0.5, 1.0), rows(rng, 1500, 1.0, 0.02));
        let (growth, queries) = (rows(rng, 1500, 0.5, 1.0), rows(rng, 300, 1.0, 0.02));
        let index = GraphIndex::<bf16>::build(DIM, &keys, &samples, None, &GraphParams::default()).unwrap();
        let (before, _, read_before) = found(&index, &queries, 6000);
        // Not all at once, as a sequence grows.
        for part in growth.chunks(500 * DIM) {
            index.append(part).unwrap();
        }
        let (after, late, read) = found(&index, &queries, 6000);
        assert!(before > 0.9, "{before}");
        assert!(
            after > before - 0.03 && late > before - 0.06,
            "{before} before, {after} after, {late} of the new keys"
        );
        assert!(read < 1.1 * read_before, "{read_before} keys read before, {read} after");
    }

    #[test]
    fn a_graph_for_each_head_reads_less_for_its_queries_than_the_others_does() {
        let rng = &mut ChaCha8Rng::seed_from_u64(7);
        let keys = rows(rng, 6000, 1.0, 1.0);
        // The first head looks at the first four dimensions, the second at the others.
        let mut queries = |count| [rows(rng, count, 1.0, 0.02), rows(rng, count, 0.02, 1.0)];
        let (samples, tests) = (queries(1500), queries(200));
        let side_by_side: Vec<f32> =
            samples[0].chunks(DIM).zip(samples[1].chunks(DIM)).flat_map(|(a, b)| [a, b].concat()).collect();
        let params = GraphParams { query_heads: 2, ..GraphParams::default() };
        let index = GraphIndex::<bf16>::build(DIM, &keys, &side_by_side, None, &params).unwrap();
        let share = |query_head: usize, queries: &[f32]| {
            let mut hits = 0;
            for query in queries.chunks(DIM) {
                let truth = scan(&index.rows, index.len(), query, 10, None).hits;
                let wish = SearchParams { k: 10, ef: 16, query_head, ..SearchParams::default() };
                let found = index.search(query, &wish, None).unwrap().hits;
                hits += truth.iter().filter(|hit| found.iter().any(|other| other.id == hit.id)).count();
            }
            hits as f64 / (queries.len() / DIM * 10) as f64
        };
        for (head, queries) in tests.iter().enumerate() {
            let (own, other) = (share(head, queries), share(1 - head, queries));
            assert!(own > 0.75 && own > other + 0.2, "head {head}: {own} in its own graph, {other} in the other");
        }
        // The keys' codes are there once, the links twice.
        let one = GraphIndex::<bf16>::build(DIM, &keys, &samples[0], None, &GraphParams::default()).unwrap();
        assert_eq!(index.link_bytes(), 2 * one.link_bytes());
        assert!(index.memory_bytes() < 2 * one.memory_bytes() - one.len() * 2 * DIM);
        let wrong = index.search(&tests[0][..DIM], &SearchParams { query_head: 2, ..SearchParams::default() }, None);
        assert!(wrong.unwrap_err().to_string().contains("`query_head` is 2"));
        let params = IndexParams { kind: IndexKind::Graph, graph: params, ..IndexParams::default() };
        let odd = crate::build(DIM, &keys, &side_by_side[..3 * DIM], &params).unwrap_err().to_string();
        assert!(odd.contains("`sample queries` is 3"), "{odd}");
    }

    #[test]
    fn samples_are_counted_and_go_once_the_graph_has_settled() {
        let (rng, folder) = (&mut ChaCha8Rng::seed_from_u64(8), tempfile::tempdir().unwrap());
        let (keys, samples) = (rows(rng, 1000, 0.5, 1.0), rows(rng, 2000, 1.0, 0.02));
        let mut index: Box<dyn KeyIndex> =
            Box::new(GraphIndex::<bf16>::build(DIM, &keys, &samples, None, &GraphParams::default()).unwrap());
        let small = GraphIndex::<bf16>::build(DIM, &keys, &samples[..DIM], None, &GraphParams::default()).unwrap();
        assert!(index.memory_bytes() >= small.memory_bytes() + 4 * 1999 * DIM);
        let path = folder.path().join("index");
        let size = |index: &dyn KeyIndex| {
            index.save(&path).unwrap();
            std::fs::metadata(&path).unwrap().len() as usize
        };
        assert!(size(&*index) > 4 * samples.len());
        // It comes from a file before it has settled.
        index = crate::open(&path).unwrap();
        for _ in 0..8 {
            index.append(&rows(rng, 500, 0.5, 1.0)).unwrap();
        }
        let all = size(&*index);
        index = crate::open(&path).unwrap();
        assert_eq!(size(&*index), all);
        let rows_and_codes = index.len() * (2 * DIM + 64 + 4 + 80);
        assert!(all < rows_and_codes + 2000 * (DIM + 1) * 4 + 50_000, "{all} bytes: samples are there once, as guides");
    }

    #[test]
    fn many_queries_at_once_find_what_each_finds_in_the_graph_of_its_head() {
        let rng = &mut ChaCha8Rng::seed_from_u64(9);
        let (keys, samples) = (rows(rng, 3000, 0.5, 1.0), rows(rng, 900, 1.0, 0.02));
        let params = GraphParams { query_heads: 3, ..GraphParams::default() };
        let index = GraphIndex::<bf16>::build(DIM, &keys, &samples, None, &params).unwrap();
        let queries = rows(rng, 71, 1.0, 0.02);
        for first in 0..3 {
            let wish = SearchParams { k: 10, ef: 20, query_head: first, ..SearchParams::default() };
            let together = index.search_group(&queries, &wish, None).unwrap();
            assert_eq!(together.len(), 71);
            for (i, (query, found)) in queries.chunks(DIM).zip(&together).enumerate() {
                let alone = index.search(query, &SearchParams { query_head: (first + i) % 3, ..wish }, None).unwrap();
                assert_eq!(found.hits, alone.hits, "query {i} from head {first} on");
            }
        }
    }

    #[test]
    fn an_index_of_the_longest_keys_comes_back_from_its_file() {
        const WIDE: usize = 512;
        let (rng, folder) = (&mut ChaCha8Rng::seed_from_u64(10), tempfile::tempdir().unwrap());
        // Nearly all along one direction, which is also the one that queries vary in: their projections are longest then.
        let signs: Vec<f32> = rows(rng, WIDE / DIM, 1.0, 1.0).iter().map(|x| x.signum()).collect();
        let noise = rows(rng, 900 * WIDE / DIM, 0.1, 0.1);
        let along = |i: usize| if (i / WIDE).is_multiple_of(2) { 0.95e17 } else { -0.95e17 };
        let keys: Vec<f32> =
            noise.iter().enumerate().map(|(i, x)| along(i) * signs[i % WIDE] * (1.0 + 0.1 * x)).collect();
        let samples: Vec<f32> = (0..300).flat_map(|i| signs.iter().map(move |x| x * (i as f32 - 150.0))).collect();
        let index = GraphIndex::<bf16>::build(WIDE, &keys, &samples, None, &GraphParams::default()).unwrap();
        let path = folder.path().join("index");
        index.save(&path).unwrap();
        let (opened, query) = (crate::open(&path).unwrap(), &samples[..WIDE]);
        let wish = SearchParams { k: 10, ef: 50, ..SearchParams::default() };
        assert_eq!(opened.search(query, &wish, None).unwrap().hits, index.search(query, &wish, None).unwrap().hits);
    }

    #[test]
    fn every_key_is_reached_as_keys_come() {
        let rng = &mut ChaCha8Rng::seed_from_u64(6);
        let (keys, samples) = (rows(rng, 3000, 0.5, 1.0), rows(rng, 300, 1.0, 0.02));
        let index = GraphIndex::<bf16>::build(DIM, &keys, &samples, None, &GraphParams::default()).unwrap();
        for part in [1, 7, 600] {
            index.append(&rows(rng, part, 0.5, 1.0)).unwrap();
            let graphs = index.graphs().unwrap();
            let core = &graphs.of_heads[0];
            let (links, mut seen) = (core.links(), vec![false; index.len()]);
            let mut open: Vec<u32> = core.entries().to_vec();
            while let Some(id) = open.pop() {
                if !std::mem::replace(&mut seen[id as usize], true) {
                    links.view().for_each(id, |link| open.push(link));
                }
            }
            // Between two looks for lost keys, a pruned list may drop the link to some.
            let lost = seen.iter().filter(|seen| !**seen).count();
            assert!(if part == 600 { lost == 0 } else { lost <= index.len() / 20 }, "{lost} lost after {part}");
            assert!(core.entries().len() <= index.params.entry_points + LONG, "{}", core.entries().len());
        }
    }

    /// Entries through keys that are long.
    const LONG: usize = 64;
}
