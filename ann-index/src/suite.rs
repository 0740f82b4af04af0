//! The behaviour that every index shows: one body, run over all of them.

#![allow(clippy::unwrap_used)]

use half::{bf16, f16};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeSet;

use crate::element::Element;
use crate::error::IndexError;
use crate::graph::GraphIndex;
use crate::hnsw::HnswIndex;
use crate::{
    Bitmap, GraphParams, Hit, IndexKind, IndexParams, KeyIndex, KeyPrecision, SearchParams, SearchStats, build, open,
};

/// One implementation under test.
#[derive(Clone, Copy)]
struct Subject {
    name: &'static str,
    kind: IndexKind,
    precision: KeyPrecision,
    /// Keys from which a graph is used; `None` leaves it to the index.
    graph_from: Option<usize>,
    /// Query heads with a graph of their own.
    query_heads: usize,
}

const SUBJECTS: [Subject; 24] = {
    use IndexKind::{Clusters, Flat, Graph, Hnsw, Ivf};
    use KeyPrecision::{Bf16, F16, F32, Int8};
    [
        subject("flat f32", Flat, F32, None),
        subject("flat bf16", Flat, Bf16, None),
        subject("flat f16", Flat, F16, None),
        subject("flat int8", Flat, Int8, None),
        subject("hnsw f32", Hnsw, F32, None),
        subject("hnsw bf16", Hnsw, Bf16, None),
        subject("hnsw int8", Hnsw, Int8, None),
        subject("hnsw f16, graph from the first key", Hnsw, F16, Some(1)),
        subject("hnsw bf16, graph from the first key", Hnsw, Bf16, Some(1)),
        subject("graph f32", Graph, F32, None),
        subject("graph bf16", Graph, Bf16, None),
        subject("graph int8", Graph, Int8, None),
        subject("graph f16, graph from the first key", Graph, F16, Some(1)),
        subject("graph bf16, graph from the first key", Graph, Bf16, Some(1)),
        Subject { query_heads: 3, ..subject("graph bf16, three query heads", Graph, Bf16, None) },
        Subject { query_heads: 2, ..subject("graph f32, two query heads, from the first key", Graph, F32, Some(1)) },
        subject("clusters f32", Clusters, F32, None),
        subject("clusters bf16", Clusters, Bf16, None),
        subject("clusters f16", Clusters, F16, None),
        subject("clusters int8", Clusters, Int8, None),
        subject("ivf f32", Ivf, F32, None),
        subject("ivf bf16", Ivf, Bf16, None),
        subject("ivf f16", Ivf, F16, None),
        subject("ivf int8", Ivf, Int8, None),
    ]
};

const fn subject(name: &'static str, kind: IndexKind, precision: KeyPrecision, graph_from: Option<usize>) -> Subject {
    Subject { name, kind, precision, graph_from, query_heads: 1 }
}

impl Subject {
    fn build(&self, dim: usize, keys: &[f32]) -> Box<dyn KeyIndex> {
        let graph = GraphParams { query_heads: self.query_heads, ..GraphParams::default() };
        let params = IndexParams { kind: self.kind, precision: self.precision, graph, ..IndexParams::default() };
        // Graphs of several heads differ only where there are samples: centred keys, some others for each head.
        let (heads, count) = (if self.query_heads > 1 { self.query_heads } else { 0 }, keys.len() / dim);
        let mean: Vec<f32> =
            (0..dim).map(|i| keys.iter().skip(i).step_by(dim).sum::<f32>() / count.max(1) as f32).collect();
        let centred = |i: usize| keys[i * dim..(i + 1) * dim].iter().zip(&mean).map(|(x, mean)| x - mean);
        let samples: Vec<f32> = (0..count)
            .flat_map(|i| (0..heads).flat_map(move |head| (i + head) % count..(i + head) % count + 1))
            .flat_map(centred)
            .collect();
        let Some(from) = self.graph_from else {
            return build(dim, keys, &samples, &params).unwrap();
        };
        fn with_graph_from<T: Element>(
            dim: usize,
            keys: &[f32],
            samples: &[f32],
            params: &IndexParams,
            from: usize,
        ) -> Box<dyn KeyIndex> {
            match params.kind {
                IndexKind::Hnsw => {
                    Box::new(HnswIndex::<T>::build_with_graph_from(dim, keys, params, from, &|| true).unwrap())
                }
                _ => Box::new(
                    GraphIndex::<T>::build_with_graph_from(dim, keys, samples, None, &params.graph, from).unwrap(),
                ),
            }
        }
        match self.precision {
            KeyPrecision::F32 => with_graph_from::<f32>(dim, keys, &samples, &params, from),
            KeyPrecision::Bf16 => with_graph_from::<bf16>(dim, keys, &samples, &params, from),
            KeyPrecision::F16 => with_graph_from::<f16>(dim, keys, &samples, &params, from),
            KeyPrecision::Int8 => with_graph_from::<i8>(dim, keys, &samples, &params, from),
        }
    }

    /// A row as it comes back.
    fn round(&self, row: &[f32]) -> Vec<f32> {
        fn there_and_back<T: Element>(row: &[f32]) -> Vec<f32> {
            let (mut stored, mut out) = (vec![T::default(); T::stride(row.len())], vec![0.0; row.len()]);
            T::encode(row, &mut stored);
            T::decode(&stored, &mut out);
            out
        }
        match self.precision {
            KeyPrecision::F32 => there_and_back::<f32>(row),
            KeyPrecision::Bf16 => there_and_back::<bf16>(row),
            KeyPrecision::F16 => there_and_back::<f16>(row),
            KeyPrecision::Int8 => there_and_back::<i8>(row),
        }
    }

    /// Lowest recall accepted with `ef` at least 2 k.
    fn recall_floor(&self) -> f64 {
        match self.kind {
            IndexKind::Flat => 1.0,
            IndexKind::Clusters | IndexKind::Ivf => 0.85,
            // Its samples are no queries to come.
            _ if self.query_heads > 1 => 0.85,
            _ => 0.95,
        }
    }
}

fn each(test: impl Fn(Subject)) {
    for subject in SUBJECTS.into_iter().filter(|subject| subject.kind.is_built_in()) {
        println!("{}", subject.name);
        test(subject);
    }
}

/// Keys as attention heads make them: a mean that is long beside the spread, a few coordinates
/// with a much larger spread, norms that differ, and a drift along the sequence. Queries come from
/// another distribution, around a mean of their own.
struct HeadLike {
    dim: usize,
    mean: Vec<f32>,
    spread: Vec<f32>,
    query_mean: Vec<f32>,
    rng: ChaCha8Rng,
}

impl HeadLike {
    fn new(dim: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mean = (0..dim).map(|_| 3.0 * normal(&mut rng)).collect();
        let query_mean = (0..dim).map(|_| normal(&mut rng)).collect();
        let spread = (0..dim).map(|i| if i % 29 == 3 { 8.0 } else { 1.0 }).collect();
        Self { dim, mean, spread, query_mean, rng }
    }

    fn keys(&mut self, count: usize) -> Vec<f32> {
        let mut state = vec![0.0f32; self.dim];
        let mut keys = Vec::with_capacity(count * self.dim);
        for _ in 0..count {
            let scale = (0.3 * normal(&mut self.rng)).exp();
            for (i, x) in state.iter_mut().enumerate() {
                *x = 0.8 * *x + 0.6 * normal(&mut self.rng);
                keys.push(self.mean[i] + scale * self.spread[i] * *x);
            }
        }
        keys
    }

    fn query(&mut self) -> Vec<f32> {
        let draw = |mean: &f32| mean + 0.7 * normal(&mut self.rng);
        self.query_mean.iter().map(draw).collect()
    }
}

/// A draw from the standard normal distribution (Box and Muller).
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let (u, v): (f32, f32) = (rng.random(), rng.random());
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f32::consts::TAU * v).cos()
}

/// `ef` candidates, or clusters with about eight times as many keys.
fn wish(k: usize, ef: usize) -> SearchParams {
    SearchParams { k, ef, probes: ef.div_ceil(2), ..SearchParams::default() }
}

fn search(index: &dyn KeyIndex, query: &[f32], k: usize, ef: usize) -> Vec<Hit> {
    index.search(query, &wish(k, ef), None).unwrap().hits
}

/// All inner products with the stored keys in f64, best first, hidden keys left out.
fn truth(index: &dyn KeyIndex, query: &[f32], hidden: &Bitmap) -> Vec<(f64, u32)> {
    let mut key = vec![0.0; index.dim()];
    let mut all: Vec<(f64, u32)> = Vec::new();
    for id in (0..index.len() as u32).filter(|&id| !hidden.contains(id)) {
        index.key(id, &mut key).unwrap();
        let products = query.iter().zip(&key).map(|(a, b)| f64::from(*a) * f64::from(*b));
        all.push((products.sum(), id));
    }
    all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    all
}

/// Checks what must hold of any answer; returns the share of the true top k that was found.
fn check(index: &dyn KeyIndex, query: &[f32], k: usize, ef: usize, hidden: &Bitmap) -> f64 {
    let exclude = (!hidden.is_empty()).then_some(hidden);
    let found = index.search(query, &wish(k, ef), exclude).unwrap();
    let truth = truth(index, query, hidden);
    let hits = &found.hits;
    assert_eq!(hits.len(), k.min(truth.len()), "as many hits as there can be");
    let ids: BTreeSet<u32> = hits.iter().map(|hit| hit.id).collect();
    assert_eq!(ids.len(), hits.len(), "no key twice");
    let size = |v: &[f32]| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let mut key = vec![0.0; index.dim()];
    for hit in hits {
        assert!(!hidden.contains(hit.id), "key {} is hidden", hit.id);
        index.key(hit.id, &mut key).unwrap();
        let exact: f64 = query.iter().zip(&key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        let error = (f64::from(hit.score) - exact).abs();
        assert!(error <= 1e-5 * size(query) * size(&key), "{hit:?}, {exact}");
    }
    for pair in hits.windows(2) {
        let (a, b) = (pair[0], pair[1]);
        assert!(a.score > b.score || (a.score == b.score && a.id < b.id));
    }
    check_stats(index, found.stats, hits.len());
    let Some(&(last, _)) = truth.get(hits.len().wrapping_sub(1)) else {
        return 1.0;
    };
    let slack = 1e-5 * size(query) * size(&key);
    let good = hits.iter().filter(|hit| f64::from(hit.score) >= last - slack);
    good.count() as f64 / hits.len() as f64
}

fn check_stats(index: &dyn KeyIndex, stats: SearchStats, hits: usize) {
    assert!(stats.keys_touched <= index.len());
    assert!(stats.nodes_visited <= index.len());
    if hits > 0 {
        // Padding of quantised keys, links and exact ranking together stay below this.
        let most = index.len() * (4 * index.dim() + 64 + 4 + 128);
        assert!(stats.bytes >= hits * index.dim() && stats.bytes <= most, "{stats:?}");
    }
}

/// The mean recall over fresh queries.
fn recall(index: &dyn KeyIndex, data: &mut HeadLike, k: usize, ef: usize, hidden: &Bitmap) -> f64 {
    const QUERIES: usize = 30;
    let total: f64 = (0..QUERIES).map(|_| check(index, &data.query(), k, ef, hidden)).sum();
    total / QUERIES as f64
}

fn assert_recall(subject: Subject, index: &dyn KeyIndex, data: &mut HeadLike, hidden: &Bitmap) {
    let got = recall(index, data, 20, 200, hidden);
    println!("  recall {got}");
    assert!(got >= subject.recall_floor(), "{}: {got}", subject.name);
}

#[test]
fn finds_the_best_keys() {
    each(|subject| {
        let mut data = HeadLike::new(64, 1);
        let index = subject.build(64, &data.keys(2500));
        assert_recall(subject, &*index, &mut data, &Bitmap::new());
    });
}

#[test]
fn a_graph_reads_fewer_keys_than_a_scan() {
    each(|subject| {
        let mut data = HeadLike::new(32, 2);
        let index = subject.build(32, &data.keys(4000));
        let params = wish(10, 64);
        let stats = index.search(&data.query(), &params, None).unwrap().stats;
        match subject.kind {
            IndexKind::Flat => assert_eq!((stats.keys_touched, stats.nodes_visited), (4000, 0)),
            _ => {
                assert!(stats.keys_touched < 2500, "{stats:?}");
                assert!(stats.nodes_visited >= 1, "{stats:?}");
            }
        }
    });
}

#[test]
fn candidates_for_all_keys_find_all() {
    each(|subject| {
        let mut data = HeadLike::new(20, 3);
        let index = subject.build(20, &data.keys(700));
        for (k, ef) in [(20, 700), (20, 5000), (700, 1), (5000, 5000)] {
            assert_eq!(recall(&*index, &mut data, k, ef, &Bitmap::new()), 1.0);
        }
        // Almost as many candidates as keys: a graph is still walked, and must reach them all.
        let got = recall(&*index, &mut data, 20, 690, &Bitmap::new());
        assert!(got >= 0.999, "{}: {got}", subject.name);
    });
}

#[test]
fn stored_keys_come_back_rounded() {
    each(|subject| {
        let keys = HeadLike::new(5, 4).keys(300);
        let index = subject.build(5, &keys[..500]);
        index.append(&keys[500..]).unwrap();
        let mut key = [0.0; 5];
        for (id, expected) in keys.chunks(5).enumerate() {
            index.key(id as u32, &mut key).unwrap();
            assert_eq!(key[..], subject.round(expected));
        }
        assert!(index.memory_bytes() > keys.len());
    });
}

#[test]
fn appended_keys_are_found() {
    each(|subject| {
        let mut data = HeadLike::new(48, 5);
        let keys = data.keys(2400);
        let (first, rest) = keys.split_at(48 * 1000);
        let index = subject.build(48, first);
        for batch in rest.chunks(48 * 130) {
            index.append(batch).unwrap();
        }
        assert_eq!(index.len(), 2400);
        assert_recall(subject, &*index, &mut data, &Bitmap::new());
        for (id, key) in keys.chunks(48).enumerate().skip(2395) {
            let best = search(&*index, key, 1, 100)[0];
            let own: f32 = key.iter().map(|x| x * x).sum();
            assert!(best.id as usize == id || best.score > 0.98 * own);
        }
    });
}

#[test]
fn an_index_that_starts_empty_grows_key_by_key() {
    each(|subject| {
        let mut data = HeadLike::new(16, 6);
        let index = subject.build(16, &[]);
        assert!(index.is_empty());
        assert_eq!(search(&*index, &data.query(), 5, 50), []);
        index.append(&[]).unwrap();
        for (n, key) in data.keys(700).chunks(16).enumerate() {
            index.append(key).unwrap();
            assert_eq!(index.len(), n + 1);
        }
        assert_recall(subject, &*index, &mut data, &Bitmap::new());
    });
}

#[test]
fn keys_longer_than_all_before_are_found() {
    each(|subject| {
        let mut data = HeadLike::new(32, 7);
        let index = subject.build(32, &data.keys(1500));
        // Within the headroom, far beyond it, and back.
        for scale in [1.3, 50.0, 1.0, 3000.0] {
            let keys: Vec<f32> = data.keys(60).iter().map(|x| x * scale).collect();
            index.append(&keys).unwrap();
            assert_recall(subject, &*index, &mut data, &Bitmap::new());
        }
    });
}

#[test]
fn hidden_keys_stay_hidden() {
    each(|subject| {
        let mut data = HeadLike::new(32, 8);
        let index = subject.build(32, &data.keys(1500));
        let mut order: Vec<u32> = (0..1500).collect();
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(9));
        for count in [1, 200, 750, 1200, 1450, 1499, 1500] {
            let mut hidden: Bitmap = order[..count].iter().copied().collect();
            // Ids that no key has do not matter.
            hidden.extend([1500, 9000]);
            assert_recall(subject, &*index, &mut data, &hidden);
        }
        let query = data.query();
        let best = truth(&*index, &query, &Bitmap::new());
        let hidden: Bitmap = best[..600].iter().map(|&(_, id)| id).collect();
        assert!(check(&*index, &query, 20, 200, &hidden) >= subject.recall_floor());
    });
}

#[test]
fn one_key() {
    each(|subject| {
        let index = subject.build(3, &[1.0, -2.0, 4.0]);
        for k in [1, 2, 100] {
            let hits = search(&*index, &[1.0, 1.0, 0.5], k, 10);
            assert_eq!((hits.len(), hits[0].id), (1, 0));
            assert!((hits[0].score - 1.0).abs() < 0.02);
        }
        let hidden: Bitmap = [0].into_iter().collect();
        let params = wish(4, 4);
        let found = index.search(&[1.0; 3], &params, Some(&hidden)).unwrap();
        assert_eq!(found.hits, []);
    });
}

#[test]
fn dimension_one() {
    each(|subject| {
        let keys: Vec<f32> = (0..600).map(|i| ((i * 7) % 600) as f32 / 8.0).collect();
        // A scale per row of one number stores it as it is.
        let index = subject.build(1, &keys);
        for query in [[2.0], [-2.0], [0.0]] {
            let got = check(&*index, &query, 5, 40, &Bitmap::new());
            assert!(got >= subject.recall_floor(), "{}: {got}", subject.name);
        }
    });
}

#[test]
fn no_hits_asked_for() {
    each(|subject| {
        let index = subject.build(2, &[1.0; 40]);
        let params = wish(0, 0);
        let found = index.search(&[1.0, 2.0], &params, None).unwrap();
        assert_eq!(found, Default::default());
    });
}

#[test]
fn equal_keys_are_all_found_and_do_not_hide_others() {
    each(|subject| {
        let mut data = HeadLike::new(16, 10);
        let mut keys = Vec::new();
        let (some, many) = (data.keys(800), data.keys(1));
        for key in some.chunks(16) {
            keys.extend_from_slice(key);
            keys.extend_from_slice(&many);
        }
        let index = subject.build(16, &keys);
        index.append(&many).unwrap();
        assert_recall(subject, &*index, &mut data, &Bitmap::new());
        // The query for which the repeated key is the best by far: the lowest ids win.
        let size: f32 = many.iter().map(|x| x * x).sum();
        let mean: Vec<f32> = many.iter().map(|x| x * 100.0 / size).collect();
        let long = subject.build(16, &keys.iter().map(|x| x / 50.0).collect::<Vec<_>>());
        long.append(&many).unwrap();
        long.append(&many).unwrap();
        let ids: Vec<u32> = search(&*long, &mean, 2, 10).iter().map(|h| h.id).collect();
        assert_eq!(ids, [1600, 1601]);
        let hidden: Bitmap = [1600].into_iter().collect();
        let params = wish(1, 10);
        let found = long.search(&mean, &params, Some(&hidden)).unwrap();
        assert_eq!(found.hits[0].id, 1601, "a twin of a hidden key is found");
    });
}

#[test]
fn zero_keys_and_zero_queries() {
    each(|subject| {
        let mut keys = vec![0.0; 8 * 700];
        for (i, x) in keys.iter_mut().enumerate().filter(|(i, _)| i % 3 == 0) {
            *x = if i % 2 == 0 { -0.0 } else { 0.0 };
        }
        let index = subject.build(8, &keys);
        let query = [1.0, -1.0, 3.0, 0.0, 2.0, 1.0, 1.0, -5.0];
        for query in [query, [0.0; 8]] {
            let hits = search(&*index, &query, 30, 40);
            let expected: Vec<Hit> = (0..30).map(|id| Hit { id, score: 0.0 }).collect();
            assert_eq!(hits, expected);
        }
        let mut data = HeadLike::new(8, 11);
        index.append(&data.keys(700)).unwrap();
        assert_recall(subject, &*index, &mut data, &Bitmap::new());
        assert_eq!(search(&*index, &[0.0; 8], 900, 1000).len(), 900);
    });
}

#[test]
fn what_cannot_be_ordered_is_refused_whole() {
    each(|subject| {
        let index = subject.build(2, &[1.0, 2.0]);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = index.append(&[5.0, 6.0, 7.0, bad]).unwrap_err();
            let place = matches!(error, IndexError::NotFinite { row: 1, column: 1, .. });
            assert!(place, "{error}");
            let params = wish(1, 1);
            assert!(index.search(&[bad, 0.0], &params, None).is_err());
        }
        let error = index.append(&[0.0, 0.0, 3e38, 0.0]).unwrap_err();
        assert!(matches!(error, IndexError::TooLong { row: 1, .. }), "{error}");
        assert_eq!(index.len(), 1);
        assert_eq!(search(&*index, &[1.0, 0.0], 9, 9).len(), 1);
        if subject.precision == KeyPrecision::F16 {
            let error = index.append(&[0.0, 7e4]).unwrap_err();
            return assert!(matches!(error, IndexError::TooLarge { row: 0, column: 1, .. }), "{error}");
        }
        // The longest that is taken overflows nothing.
        let long = (1u64 << 61) as f32;
        index.append(&[long, 0.0, 0.0, -long]).unwrap();
        let hits = search(&*index, &[0.0, long], 3, 1);
        assert!((hits[2].score / (-long * long) - 1.0).abs() < 1e-6);
    });
}

#[test]
fn wrong_lengths_are_refused() {
    each(|subject| {
        let index = subject.build(3, &[1.0; 6]);
        let error = index.append(&[1.0; 4]).unwrap_err();
        assert!(matches!(error, IndexError::NotRows { dim: 3, found: 4, .. }));
        let params = wish(1, 1);
        for len in [0, 2, 4, 6] {
            let error = index.search(&vec![1.0; len], &params, None).unwrap_err();
            assert!(matches!(error, IndexError::DimensionMismatch { .. }));
            assert!(index.key(0, &mut vec![0.0; len]).is_err());
        }
        let error = index.key(2, &mut [0.0; 3]).unwrap_err();
        assert_eq!(error, IndexError::UnknownId { id: 2, len: 2 });
        assert_eq!(index.len(), 2);
    });
}

#[test]
fn searches_run_while_keys_are_appended() {
    each(|subject| {
        let mut data = HeadLike::new(16, 12);
        let keys = data.keys(2000);
        let (first, rest) = keys.split_at(16 * 600);
        let index = subject.build(16, first);
        let queries: Vec<_> = (0..20).map(|_| data.query()).collect();
        let searcher = |queries: &[Vec<f32>]| {
            while index.len() < 2000 {
                for query in queries {
                    let before = index.len();
                    let hits = search(&*index, query, 10, 60);
                    assert_eq!(hits.len(), 10);
                    let mut key = [0.0; 16];
                    for hit in hits {
                        assert!((hit.id as usize) < index.len());
                        index.key(hit.id, &mut key).unwrap();
                        let id = hit.id as usize;
                        assert_eq!(key[..], subject.round(&keys[16 * id..16 * (id + 1)]));
                    }
                    assert!(index.len() >= before);
                }
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| searcher(&queries[..10]));
            scope.spawn(|| searcher(&queries[10..]));
            for (i, batch) in rest.chunks(16 * 70).enumerate() {
                index.append(batch).unwrap();
                // What an append has brought is seen by the next search.
                let newest = 600 + 70 * (i + 1) - 1;
                let key = &keys[16 * newest..16 * (newest + 1)];
                let best = search(&*index, key, 2000, 2000);
                assert!(best.iter().any(|hit| hit.id as usize == newest));
            }
        });
        assert_recall(subject, &*index, &mut data, &Bitmap::new());
    });
}

#[test]
fn appends_from_two_threads_both_arrive() {
    each(|subject| {
        let mut data = HeadLike::new(4, 13);
        let index = subject.build(4, &[]);
        let halves = [data.keys(400), data.keys(400)];
        std::thread::scope(|scope| {
            for half in &halves {
                let index = &index;
                scope.spawn(move || {
                    for key in half.chunks(8) {
                        index.append(key).unwrap();
                    }
                });
            }
        });
        assert_eq!(index.len(), 800);
        let first = |half: &[f32]| -> Vec<u32> { half.chunks(4).map(|key| subject.round(key)[0].to_bits()).collect() };
        let mut expected = [first(&halves[0]), first(&halves[1])].concat();
        let mut key = [0.0; 4];
        let mut stored: Vec<u32> = (0..800)
            .map(|id| {
                index.key(id, &mut key).unwrap();
                key[0].to_bits()
            })
            .collect();
        expected.sort_unstable();
        stored.sort_unstable();
        assert_eq!(stored, expected);
    });
}

/// What a group read, beside what its queries read alone.
fn check_sharing(subject: Subject, index: &dyn KeyIndex, count: usize, shared: SearchStats, alone: SearchStats) {
    if matches!(subject.kind, IndexKind::Hnsw | IndexKind::Ivf) || count < 2 {
        return assert_eq!(shared, alone);
    }
    // A key is counted once, and these queries are alike enough to meet.
    assert!(shared.keys_touched <= index.len(), "{shared:?}");
    assert!(shared.keys_touched < alone.keys_touched && shared.bytes < alone.bytes, "{shared:?}, {alone:?}");
    assert!(shared.keys_touched * count >= alone.keys_touched && shared.bytes * count >= alone.bytes, "{shared:?}");
}

#[test]
fn equal_queries_of_a_group_are_read_for_once() {
    each(|subject| {
        let mut data = HeadLike::new(32, 17);
        let index = subject.build(32, &data.keys(1500));
        let query = data.query();
        let together = index.search_group(&query.repeat(3), &wish(20, 100), None).unwrap();
        let alone = index.search(&query, &wish(20, 100), None).unwrap();
        assert_eq!(together[0], alone);
        let again =
            if matches!(subject.kind, IndexKind::Hnsw | IndexKind::Ivf) { alone.stats } else { Default::default() };
        // Each head walks its own graph.
        for found in together[1..].iter().filter(|_| subject.query_heads == 1) {
            assert_eq!((&found.hits, found.stats), (&alone.hits, again));
        }
    });
}

#[test]
fn a_group_finds_what_its_queries_find_alone() {
    each(|subject| {
        let mut data = HeadLike::new(40, 14);
        let index = subject.build(40, &data.keys(1500));
        index.append(&data.keys(37)).unwrap();
        let hidden: Bitmap = (0..1500).step_by(7).collect();
        for (count, exclude) in [(0, None), (1, None), (3, Some(&hidden)), (4, None), (7, None), (8, Some(&hidden))] {
            let queries: Vec<f32> = (0..count).flat_map(|_| data.query()).collect();
            let together = index.search_group(&queries, &wish(20, 100), exclude).unwrap();
            assert_eq!(together.len(), count);
            let (mut shared, mut alone) = (SearchStats::default(), SearchStats::default());
            for (i, (query, found)) in queries.chunks(40).zip(&together).enumerate() {
                let wish = SearchParams { query_head: i % subject.query_heads, ..wish(20, 100) };
                let single = index.search(query, &wish, exclude).unwrap();
                assert_eq!(found.hits, single.hits);
                shared += found.stats;
                alone += single.stats;
            }
            check_sharing(subject, &*index, count, shared, alone);
        }
        assert!(index.search_group(&[0.0; 41], &wish(1, 1), None).is_err());
        assert!(index.search_group(&[f32::NAN; 40], &wish(1, 1), None).is_err());
    });
}

#[test]
fn a_saved_index_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    each(|subject| {
        let mut data = HeadLike::new(24, 15);
        for count in [0, 1, 300, 1800] {
            let keys = [data.keys(count), data.keys(count.min(1))].concat();
            let index = subject.build(24, &keys);
            index.append(&keys[..24 * count.min(9)]).unwrap();
            let path = folder.path().join("index");
            index.save(&path).unwrap();
            let opened = open(&path).unwrap();
            assert_eq!((opened.kind(), opened.dim(), opened.len()), (subject.kind, 24, index.len()));
            let (mut a, mut b) = ([0.0; 24], [1.0; 24]);
            for id in 0..index.len() as u32 {
                index.key(id, &mut a).unwrap();
                opened.key(id, &mut b).unwrap();
                assert_eq!(a, b);
            }
            // `hnsw` is built again, and may differ where it is not exact.
            if subject.kind != IndexKind::Hnsw {
                for query in (0..20).map(|_| data.query()) {
                    let one = |index: &dyn KeyIndex| index.search(&query, &wish(20, 60), None).unwrap();
                    assert_eq!(one(&*index), one(&*opened));
                }
            }
            opened.append(&data.keys(400)).unwrap();
            assert_eq!(opened.len(), index.len() + 400);
            assert_recall(subject, &*opened, &mut data, &Bitmap::new());
            opened.save(&path).unwrap();
            assert_eq!(open(&path).unwrap().len(), opened.len());
        }
    });
}

#[test]
fn only_clusters_have_zones() {
    each(|subject| {
        let mut data = HeadLike::new(24, 16);
        let index = subject.build(24, &data.keys(1500));
        index.append(&data.keys(30)).unwrap();
        let query = data.query();
        let all = index.search_zones(&query, usize::MAX, 5, None);
        if subject.kind != IndexKind::Clusters {
            let error = all.unwrap_err();
            return assert!(matches!(error, IndexError::Unsupported { .. }) && error.to_string().contains("clusters"));
        }
        let all = all.unwrap();
        assert_eq!((all.hits.len(), all.estimated.len()), (1530, 0));
        let some = index.search_zones(&query, 10, 20, None).unwrap();
        let rest = index.search_zones(&query, 10, usize::MAX, None).unwrap();
        assert_eq!(some.hits, rest.hits);
        assert_eq!(some.estimated[..], rest.estimated[..20]);
        let estimated: usize = rest.estimated.iter().map(|zone| zone.size).sum();
        assert_eq!(rest.hits.len() + estimated, 1530);
        // Means times sizes are what the keys that were not read add up to.
        let mut sums = [0.0f64; 24];
        let mut key = [0.0; 24];
        let read: BTreeSet<u32> = rest.hits.iter().map(|hit| hit.id).collect();
        for id in (0..1530).filter(|id| !read.contains(id)) {
            index.key(id, &mut key).unwrap();
            sums.iter_mut().zip(key).for_each(|(sum, x)| *sum += f64::from(x));
        }
        for (i, sum) in sums.iter().enumerate() {
            let zones: f64 = rest.estimated.iter().map(|z| f64::from(z.centroid[i]) * z.size as f64).sum();
            assert!((zones - sum).abs() < 1e-4 * 1500.0 * 10.0, "{zones} {sum}");
        }
    });
}
