//! The behaviour that every index shows: one body, run over all of them.

#![allow(clippy::unwrap_used)]

mod edges;
mod finding;
mod groups;
mod growing;

use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeSet;

use crate::element::Element;
use crate::graph::GraphIndex;
use crate::hnsw::HnswIndex;
use crate::{
    Bitmap, GraphParams, Hit, IndexKind, IndexParams, KeyIndex, KeyPrecision, SearchParams, SearchStats, build,
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
