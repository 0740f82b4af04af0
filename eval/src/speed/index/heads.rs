//! Queries and keys of a real model: how much of each head's attention an index finds within a budget of keys.
//!
//! As decoding sees it (`engine::Strategy::Retrieval`): sinks and the recent window are attended exactly; what lies
//! between them, the cold keys, is searched. Indexes are built over the cold keys of one KV head with the prefill's
//! queries as samples, and searched with the queries of the tokens at the end of the text. Attention that falls on
//! what was found counts as recovered.

use std::path::Path;
use std::time::Instant;

use ann_index::{GraphParams, IndexKind, IndexParams, KeyIndex, SearchParams, build};
use engine::{AttentionInputs, Engine};
use serde::Deserialize;
use serde_json::{Value, json};

use super::data::{read_ids, write_f32};
use super::side::candidates;
use super::texts::HeadText;
use super::{HeadOptions, IndexBenchOptions};
use crate::error::{EvalError, Result};
use crate::process::Process;
use crate::stats::mean;

/// Share of the cold keys that may be read.
pub(super) const BUDGET: f64 = 0.02;

/// Shares of the cold keys at which the curve of exact search is drawn; others end behind the last.
const SHARES: [f64; 7] = [0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32];

/// Rounds of searching one by one and together.
const SHARING_ROUNDS: usize = 4;

/// What one way of finding keys gave for one query head: means over its queries.
#[derive(Debug, Clone)]
pub(super) struct HeadFigure {
    pub(super) layer: usize,
    pub(super) head: usize,
    /// `exact`, or an index.
    pub(super) method: &'static str,
    /// Share of the cold keys that was read.
    pub(super) touched: f64,
    /// Share of the attention on cold keys that falls on those found.
    pub(super) recovered: f64,
    /// Share of all attention that falls on sinks, window and those found.
    pub(super) covered: f64,
}

/// What it costs one way of finding keys to search for all heads of a group at once, over searching for one after the
/// other.
#[derive(Debug, Clone)]
pub(super) struct Sharing {
    pub(super) method: &'static str,
    /// Keys read.
    pub(super) touched: f64,
    /// Time.
    pub(super) time: f64,
}

/// Attention recovered against keys read, over the queries of a group.
pub(super) struct Curve {
    pub(super) method: &'static str,
    /// With wider and wider searches.
    pub(super) points: Vec<Point>,
}

/// A point of a curve.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Point {
    /// Share of the cold keys that was read.
    pub(super) touched: f64,
    /// Share of the attention on cold keys that falls on those found.
    pub(super) recovered: f64,
}

/// What was measured of a group.
pub(super) struct GroupFigures {
    pub(super) heads: Vec<HeadFigure>,
    pub(super) sharing: Vec<Sharing>,
    /// None unless they are to be drawn.
    pub(super) curves: Vec<Curve>,
}

/// A way of finding keys.
struct Method {
    name: &'static str,
    /// Its name when it attends as many keys as the budget, whatever it reads to find them: a graph reads several keys
    /// for each that it keeps.
    attending: Option<&'static str>,
    params: IndexParams,
}

/// Cold keys of one KV head, and the queries at the end of the text of the heads that share it.
pub(super) struct Group {
    layer: usize,
    dim: usize,
    scale: f32,
    cold: Vec<f32>,
    /// Sinks, and the window up to the queries.
    near: Vec<f32>,
    samples: Vec<f32>,
    /// Query heads that share the keys.
    shared: usize,
    /// Each with its query head; those of a token side by side.
    tests: Vec<(usize, Vec<f32>)>,
}

/// A query's attention.
struct Truth {
    /// Weight of each cold key, over the sum of all weights.
    cold: Vec<f64>,
    /// Their sum.
    cold_mass: f64,
}

impl Truth {
    /// The weight of what was found.
    fn mass(&self, found: &Found) -> f64 {
        found.ids.iter().map(|id| self.cold[*id as usize]).sum()
    }

    /// Its share of the cold keys' weight.
    fn recovered(&self, found: &Found) -> f64 {
        self.mass(found) / self.cold_mass.max(f64::MIN_POSITIVE)
    }
}

/// All groups of a text.
pub(super) fn groups(engine: &Engine, text: &HeadText, options: &HeadOptions) -> Result<Vec<Group>> {
    let layers = engine.attention_inputs(&text.tokens)?;
    let kv_heads = engine.kv_shape().kv_heads;
    let end = text.tokens.len() - text.tests;
    if end <= options.sinks + options.window {
        return Err(EvalError::BadOption {
            what: "the length of a text",
            found: format!("{} tokens before its last {}", end, text.tests),
            expected: format!("more than {} sinks and {} of the window", options.sinks, options.window),
        });
    }
    let mut groups = Vec::new();
    for (layer, inputs) in layers.iter().enumerate() {
        for kv_head in 0..kv_heads {
            groups.push(group(engine, inputs, (layer, kv_head), (end, text.tests), options));
        }
    }
    Ok(groups)
}

fn group(
    engine: &Engine,
    inputs: &AttentionInputs,
    (layer, kv_head): (usize, usize),
    (end, tests): (usize, usize),
    options: &HeadOptions,
) -> Group {
    let (spec, kv_heads) = (engine.spec(), engine.kv_shape().kv_heads);
    let (dim, heads) = (spec.head_dim, spec.heads);
    let key = |t: usize| &inputs.keys[(t * kv_heads + kv_head) * dim..][..dim];
    let query = |t: usize, head: usize| &inputs.queries[(t * heads + head) * dim..][..dim];
    let shared = heads / kv_heads;
    let group_heads = kv_head * shared..(kv_head + 1) * shared;
    let cold = options.sinks..end - options.window;
    // The latest queries before the tests: those that stand nearest to where decoding goes on.
    let first = end.saturating_sub(options.samples.div_ceil(shared));
    let rows = |range: std::ops::Range<usize>| range.flat_map(|t| key(t).to_vec()).collect::<Vec<f32>>();
    Group {
        layer,
        dim,
        shared,
        scale: inputs.scale,
        cold: rows(cold.clone()),
        near: [rows(0..options.sinks), rows(cold.end..end)].concat(),
        samples: (first..end).flat_map(|t| group_heads.clone().flat_map(move |h| query(t, h).to_vec())).collect(),
        tests: (end..end + tests).flat_map(|t| group_heads.clone().map(move |h| (h, query(t, h).to_vec()))).collect(),
    }
}

impl Group {
    pub(super) fn keys(&self) -> usize {
        self.cold.len() / self.dim
    }

    /// What every method finds, head by head, and what its searches share.
    pub(super) fn measure(&self, options: &IndexBenchOptions) -> Result<GroupFigures> {
        let truths: Vec<Truth> = self.tests.iter().map(|(_, query)| self.truth(query)).collect();
        let mut all = GroupFigures {
            heads: self.figures("exact", &truths, &self.exact(&truths, BUDGET)),
            sharing: Vec::new(),
            curves: Vec::new(),
        };
        let draw = options.figures.is_some();
        if draw {
            let points = SHARES.map(|share| self.point(&truths, &self.exact(&truths, share)));
            all.curves.push(Curve { method: "exact", points: points.to_vec() });
        }
        for Method { name, attending, params } in self.methods(options) {
            let index = build(self.dim, &self.cold, &self.samples, &params)?;
            all.sharing.push(self.sharing(name, index.as_ref())?);
            all.heads.extend(self.figures(name, &truths, &self.within_budget(index.as_ref())?));
            if let Some(name) = attending {
                let budget = (BUDGET * self.keys() as f64) as usize;
                all.heads.extend(self.figures(name, &truths, &self.find(index.as_ref(), budget.max(1))?));
            }
            if draw {
                all.curves.push(Curve { method: name, points: self.curve(index.as_ref(), &truths)? });
            }
        }
        Ok(all)
    }

    /// What is built over the keys: every kind, and the graph also for each query head by itself.
    fn methods(&self, options: &IndexBenchOptions) -> Vec<Method> {
        let mut methods = Vec::new();
        for &kind in options.kinds.iter().filter(|kind| **kind != IndexKind::Flat) {
            let params = IndexParams { kind, ..options.params.clone() };
            let attending = match kind {
                IndexKind::Graph => Some("graph-attends-2pct"),
                IndexKind::Hnsw => Some("hnsw-attends-2pct"),
                _ => None,
            };
            methods.push(Method { name: kind.name(), attending, params: params.clone() });
            if kind == IndexKind::Graph && self.shared > 1 {
                let graph = GraphParams { query_heads: self.shared, ..params.graph.clone() };
                methods.push(Method {
                    name: "graph-per-query-head",
                    attending: Some("graph-per-query-head-attends-2pct"),
                    params: IndexParams { graph, ..params },
                });
            }
        }
        methods
    }

    /// What a search of this width finds for each test.
    fn find(&self, index: &dyn KeyIndex, knob: usize) -> Result<Vec<Found>> {
        self.tests.iter().map(|(head, query)| found(index, head % self.shared, query, knob)).collect()
    }

    /// Wider and wider searches, until much is read.
    fn curve(&self, index: &dyn KeyIndex, truths: &[Truth]) -> Result<Vec<Point>> {
        let mut points: Vec<Point> = Vec::new();
        for knob in candidates(1, index.len().max(1), 1.5) {
            points.push(self.point(truths, &self.find(index, knob)?));
            if points.last().is_some_and(|point| point.touched > SHARES[SHARES.len() - 1]) {
                break;
            }
        }
        Ok(points)
    }

    /// Means over all tests.
    fn point(&self, truths: &[Truth], found: &[Found]) -> Point {
        let touched = mean(&found.iter().map(|found| found.touched as f64).collect::<Vec<_>>()) / self.keys() as f64;
        let recovered = mean(&truths.iter().zip(found).map(|(t, f)| t.recovered(f)).collect::<Vec<_>>());
        Point { touched, recovered }
    }

    /// Searches for as many keys as the budget allows, for the heads of each token one by one and together.
    fn sharing(&self, method: &'static str, index: &dyn KeyIndex) -> Result<Sharing> {
        let k = ((BUDGET * self.keys() as f64) as usize).max(1);
        let params = SearchParams { k, ef: k, probes: 0, ..SearchParams::default() };
        let tokens: Vec<Vec<f32>> =
            self.tests.chunks(self.shared).map(|heads| heads.iter().flat_map(|(_, q)| q).copied().collect()).collect();
        let (mut touched, mut seconds) = ([0, 0], [0.0, 0.0]);
        for round in 0..SHARING_ROUNDS {
            for token in &tokens {
                // Whoever comes second finds the keys in the caches: both orders, as often.
                for together in [round % 2 == 1, round % 2 == 0] {
                    let start = Instant::now();
                    let rows = if together { token.len() } else { self.dim };
                    for (query_head, queries) in token.chunks_exact(rows).enumerate() {
                        for result in index.search_group(queries, &SearchParams { query_head, ..params }, None)? {
                            touched[usize::from(together)] += result.stats.keys_touched;
                        }
                    }
                    seconds[usize::from(together)] += start.elapsed().as_secs_f64();
                }
            }
        }
        let time = seconds[1] / seconds[0].max(f64::MIN_POSITIVE);
        Ok(Sharing { method, touched: touched[1] as f64 / touched[0].max(1) as f64, time })
    }

    /// The same with faiss' inverted lists, in the peers' process. `scratch`: a folder for what it reads and writes.
    pub(super) fn inverted_file(
        &self,
        process: &mut Process,
        threads: usize,
        scratch: &Path,
    ) -> Result<Vec<HeadFigure>> {
        #[derive(Deserialize)]
        struct Reply {
            touched: f64,
        }
        const NAME: &str = "faiss-ivf";
        let (keys, queries, ids) = (scratch.join("keys.f32"), scratch.join("queries.f32"), scratch.join("ids"));
        write_f32(&keys, &self.cold)?;
        write_f32(&queries, &self.tests.iter().flat_map(|(_, query)| query).copied().collect::<Vec<f32>>())?;
        process.ask::<Value>(&json!({"cmd": "data", "keys": keys, "dim": self.dim, "threads": threads}))?;
        process.ask::<Value>(&json!({"cmd": "build", "peer": NAME}))?;
        let budget = (BUDGET * self.keys() as f64) as usize;
        let mut kept = Vec::new();
        for probes in 1..=self.keys() {
            // It reads whole lists and gives only `k` of what it read, so `k` is all that the budget allows.
            let reply: Reply = process.ask(&json!({
                "cmd": "search", "peer": NAME, "knob": probes, "k": budget, "ids": ids, "queries": queries,
            }))?;
            let over = reply.touched > budget as f64;
            if kept.is_empty() || !over {
                let rows = read_ids(&ids)?;
                let row = |row: &[u32]| Found {
                    ids: row.iter().copied().filter(|id| *id != u32::MAX).collect(),
                    touched: reply.touched.round() as usize,
                };
                kept = rows.chunks(budget.max(1)).map(row).collect();
            }
            if over {
                break;
            }
        }
        let truths: Vec<Truth> = self.tests.iter().map(|(_, query)| self.truth(query)).collect();
        Ok(self.figures(NAME, &truths, &kept))
    }

    fn truth(&self, query: &[f32]) -> Truth {
        let score =
            |key: &[f32]| f64::from(self.scale) * key.iter().zip(query).map(|(k, q)| f64::from(k * q)).sum::<f64>();
        let cold: Vec<f64> = self.cold.chunks_exact(self.dim).map(score).collect();
        let near: Vec<f64> = self.near.chunks_exact(self.dim).map(score).collect();
        let top = cold.iter().chain(&near).copied().fold(f64::NEG_INFINITY, f64::max);
        let cold: Vec<f64> = cold.iter().map(|score| (score - top).exp()).collect();
        let sum = |weights: &[f64]| weights.iter().sum::<f64>();
        let total = sum(&cold) + near.iter().map(|score| (score - top).exp()).sum::<f64>();
        let cold: Vec<f64> = cold.iter().map(|weight| weight / total).collect();
        Truth { cold_mass: sum(&cold), cold }
    }

    /// The best keys of each query, this share of all: what no index can exceed.
    fn exact(&self, truths: &[Truth], share: f64) -> Vec<Found> {
        let budget = (share * self.keys() as f64) as usize;
        let best = |truth: &Truth| {
            let mut ids: Vec<u32> = (0..truth.cold.len() as u32).collect();
            ids.sort_by(|a, b| truth.cold[*b as usize].total_cmp(&truth.cold[*a as usize]));
            ids.truncate(budget);
            Found { touched: ids.len(), ids }
        };
        truths.iter().map(best).collect()
    }

    /// The widest search that reads at most the budget, on average over the queries; the narrowest if none does.
    fn within_budget(&self, index: &dyn KeyIndex) -> Result<Vec<Found>> {
        let budget = BUDGET * self.keys() as f64;
        let mut kept: Option<Vec<Found>> = None;
        for knob in candidates(1, index.len().max(1), 1.15) {
            let found = self.find(index, knob)?;
            let touched = mean(&found.iter().map(|found| found.touched as f64).collect::<Vec<_>>());
            if kept.is_some() && touched > budget {
                break;
            }
            kept = Some(found);
            if touched > budget {
                break;
            }
        }
        Ok(kept.unwrap_or_default())
    }

    fn figures(&self, method: &'static str, truths: &[Truth], found: &[Found]) -> Vec<HeadFigure> {
        let mut heads: Vec<usize> = self.tests.iter().map(|(head, _)| *head).collect();
        heads.sort_unstable();
        heads.dedup();
        let of = |head: usize, figure: &dyn Fn(&Truth, &Found) -> f64| {
            let all = self.tests.iter().zip(truths.iter().zip(found));
            mean(&all.filter(|((h, _), _)| *h == head).map(|(_, (t, f))| figure(t, f)).collect::<Vec<_>>())
        };
        heads
            .into_iter()
            .map(|head| HeadFigure {
                layer: self.layer,
                head,
                method,
                touched: of(head, &|_, found| found.touched as f64 / self.keys() as f64),
                recovered: of(head, &Truth::recovered),
                covered: of(head, &|truth, found| 1.0 - truth.cold_mass + truth.mass(found)),
            })
            .collect()
    }
}

/// Keys that a search found, and how many it read.
struct Found {
    ids: Vec<u32>,
    touched: usize,
}

/// Everything that a search of this width knows the score of in the end: a graph's candidates, the members of clusters
/// and lists.
fn found(index: &dyn KeyIndex, query_head: usize, query: &[f32], knob: usize) -> Result<Found> {
    let search = |k: usize, probes: usize| index.search(query, &SearchParams { k, ef: knob, probes, query_head }, None);
    let (hits, stats) = match index.kind() {
        IndexKind::Clusters => {
            let zones = index.search_zones(query, knob, 0, None)?;
            (zones.hits, zones.stats)
        }
        IndexKind::Ivf => {
            let members = search(1, knob)?.stats.keys_touched;
            let result = search(members, knob)?;
            (result.hits, result.stats)
        }
        _ => {
            let result = search(knob, 0)?;
            (result.hits, result.stats)
        }
    };
    Ok(Found { ids: hits.into_iter().map(|hit| hit.id).collect(), touched: stats.keys_touched })
}

/// The figures of one method and layer, averaged over texts and heads, with the heads' own beside it.
pub(super) struct LayerFigure {
    pub(super) recovered: f64,
    pub(super) covered: f64,
    pub(super) touched: f64,
    /// What was recovered, by query head.
    pub(super) by_head: serde_json::Value,
}

/// Averages over the figures of `method` in `layer`, or in all layers.
pub(super) fn average(figures: &[HeadFigure], method: &str, layer: Option<usize>) -> LayerFigure {
    let chosen: Vec<&HeadFigure> =
        figures.iter().filter(|f| f.method == method && layer.is_none_or(|layer| f.layer == layer)).collect();
    let of = |figure: &dyn Fn(&HeadFigure) -> f64| mean(&chosen.iter().map(|f| figure(f)).collect::<Vec<_>>());
    let heads = chosen.iter().map(|f| f.head + 1).max().unwrap_or_default();
    let head = |head: usize| {
        let own: Vec<f64> = chosen.iter().filter(|f| f.head == head).map(|f| f.recovered).collect();
        (mean(&own) * 1e4).round() / 1e4
    };
    LayerFigure {
        recovered: of(&|f| f.recovered),
        covered: of(&|f| f.covered),
        touched: of(&|f| f.touched),
        by_head: json!((0..heads).map(head).collect::<Vec<f64>>()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// One number a key; weights are then exp(key * query).
    fn group() -> Group {
        Group {
            layer: 3,
            dim: 1,
            scale: 1.0,
            cold: (0..100).map(|i| if i == 42 { 100_f32.ln() } else { 0.0 }).collect(),
            near: vec![1.0_f32.ln(); 1],
            samples: vec![1.0; 4],
            shared: 2,
            tests: vec![(6, vec![1.0]), (7, vec![0.0])],
        }
    }

    #[test]
    fn exact_search_recovers_the_heaviest_keys_mass() {
        let group = group();
        let truths: Vec<Truth> = group.tests.iter().map(|(_, query)| group.truth(query)).collect();
        let figures = group.figures("exact", &truths, &group.exact(&truths, BUDGET));
        // Two of a hundred keys; weights 100 and 99 ones, and a near one.
        assert_eq!(figures.iter().map(|f| (f.layer, f.head)).collect::<Vec<_>>(), [(3, 6), (3, 7)]);
        assert!((figures[0].recovered - 101.0 / 199.0).abs() < 1e-6, "{figures:?}");
        assert!((figures[0].covered - 102.0 / 200.0).abs() < 1e-6, "{figures:?}");
        assert!((figures[1].recovered - 0.02).abs() < 1e-6 && (figures[1].touched - 0.02).abs() < 1e-12);
        let layer = average(&figures, "exact", Some(3));
        assert!((layer.touched - 0.02).abs() < 1e-12 && layer.by_head[7] == 0.02, "{}", layer.by_head);
        assert_eq!(average(&figures, "graph", None).recovered, 0.0);
    }

    #[test]
    fn lists_and_clusters_keep_all_they_read() {
        let keys: Vec<f32> = (0..8000).map(|i| (i as f32 * 0.37).sin()).collect();
        for kind in [IndexKind::Clusters, IndexKind::Ivf].into_iter().filter(|kind| kind.is_built_in()) {
            let index = build(2, &keys, &[], &IndexParams { kind, ..IndexParams::default() }).unwrap();
            for knob in [1, 3] {
                let found = found(index.as_ref(), 0, &[1.0, 0.5], knob).unwrap();
                assert!(!found.ids.is_empty() && found.ids.len() == found.touched, "{kind}: {}", found.touched);
                assert!(found.touched < 1000, "{kind}: {}", found.touched);
            }
        }
    }

    #[test]
    fn a_scan_shares_all_that_it_reads_with_the_heads_of_a_token() {
        let group = group();
        let params = IndexParams { kind: IndexKind::Flat, ..IndexParams::default() };
        let index = build(1, &group.cold, &[], &params).unwrap();
        let sharing = group.sharing("flat", index.as_ref()).unwrap();
        assert_eq!((sharing.method, sharing.touched), ("flat", 0.5));
        assert!(sharing.time > 0.0);
    }

    #[test]
    fn a_search_keeps_to_the_budget_or_is_the_narrowest() {
        let group = group();
        let index =
            build(1, &group.cold, &[], &IndexParams { kind: IndexKind::Flat, ..IndexParams::default() }).unwrap();
        let found = group.within_budget(index.as_ref()).unwrap();
        // A flat index reads everything: the narrowest search is kept, with one hit.
        assert!(found.iter().all(|found| found.ids.len() == 1 && found.touched == 100));
        assert_eq!(found[0].ids, [42]);
    }
}
