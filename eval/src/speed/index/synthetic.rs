//! The bench on made-up data: ours and the peers on the same rows, one after the other, in turns.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::time::Instant;

use ann_index::{IndexKind, IndexParams, build, build_with_neighbours, exact_neighbours};
use serde_json::json;

use super::IndexBenchOptions;
use super::data::{Dataset, Judge, write_f32};
use super::records::{Growth, Measured, Timed};
use super::side::{Built, NEEDS, Ours, PEERS, PeerSide, Queries, SCRIPT, Side};
use super::sweep::{Point, operating_point, sweep, within_budget};
use crate::error::Result;
use crate::process::Process;
use crate::progress::Meter;
use crate::speed::membw::FloorRate;
use crate::stats::median;

/// Queries of each set that graphs over key-key neighbours and the peers are searched for: they need up to 70 ms each.
const FEW: usize = 250;
/// Queries of a timed round; medians settle with few.
const TIMED: usize = 100;
/// Shares of the keys that recall is also reported at.
const BUDGETS: [f64; 4] = [0.01, 0.02, 0.05, 0.1];
/// The setting of `hnswlib` that is reported by itself.
const HNSWLIB_EF: usize = 1024;

/// Builds everything over `data`, sweeps, chooses settings on the tuning queries and measures them on the test
/// queries. `scratch`: a folder for what the peers read and write.
pub(super) fn measure(
    options: &IndexBenchOptions,
    data: &Dataset,
    scratch: &Path,
    meter: &mut Meter<'_>,
) -> Result<Measured> {
    let dim = data.dim;
    let k = options.k;
    let tuning = queries(data, &data.tuning, k, scratch.join("tuning.f32"))?;
    let test = queries(data, &data.test, k, scratch.join("test.f32"))?;
    let few_tuning = first(&tuning, FEW, scratch.join("tuning-few.f32"))?;
    let few_test = first(&test, FEW, scratch.join("test-few.f32"))?;
    let timing = first(&test, TIMED, scratch.join("test-timed.f32"))?;
    let mut knn_seconds = None;
    let mut ours = Vec::new();
    for kind in &options.kinds {
        meter.say(format!("{}: building {kind}", data.name));
        ours.push(build_ours(options, data, *kind, &mut knn_seconds)?);
        meter.advance(1, 1.0, format!("{}: {kind} built", data.name));
    }
    let (mut peers, peer_version) = build_peers(options, data, scratch, meter)?;
    let mut sides: Vec<&mut dyn Side> = Vec::new();
    sides.extend(ours.iter_mut().map(|side| side as &mut dyn Side));
    sides.extend(peers.iter_mut().map(|side| side as &mut dyn Side));
    let mut timed = Vec::new();
    for side in &mut sides {
        let slow = side.is_peer() || side.name() == "hnsw";
        let (tuning, test) = if slow { (&few_tuning, &few_test) } else { (&tuning, &test) };
        timed.extend(one_side(*side, data, tuning, test, meter)?);
    }
    in_turns(options, &mut sides, &mut timed, &timing, meter)?;
    let rate = FloorRate::measure(1, (data.len() * dim * 2) as u64, options.repeats.max(1))?;
    let graph = ours.iter().find(|side| side.index.kind() == IndexKind::Graph);
    let link_bytes = graph.map(|side| side.index.link_bytes());
    let growth = match (graph, timed.iter().find(|side| side.name == "graph")) {
        (Some(side), Some(timed)) if !data.growth.is_empty() => Some(grow(data, side, timed, k)?),
        _ => None,
    };
    meter.advance(1, 1.0, format!("{}: measured", data.name));
    Ok(Measured { sides: timed, knn_seconds, link_bytes, growth, read_gb_s: rate.strict(), peer_version })
}

/// Sweeps, chooses a setting and searches with it, and with the settings that fit the budgets. `None` for a side that
/// has no setting.
fn one_side(
    side: &mut dyn Side,
    data: &Dataset,
    tuning: &Queries<'_>,
    test: &Queries<'_>,
    meter: &mut Meter<'_>,
) -> Result<Option<Timed>> {
    meter.say(format!("{}: sweeping {}", data.name, side.name()));
    let peer = side.is_peer();
    // What is recorded of ours for a budget needs a curve that reaches to it.
    let widest = BUDGETS.into_iter().fold(0.0, f64::max) * data.len() as f64;
    let curve = sweep(side, tuning, if peer { 0.0 } else { widest })?;
    meter.say(format!("{}: {}: {}", data.name, side.name(), shown(&curve)));
    let Some((knob, reaches)) = operating_point(&curve, peer) else { return Ok(None) };
    let at = side.search(knob, test, false)?;
    let mut budgets = Vec::new();
    for share in BUDGETS {
        if let Some(knob) = within_budget(&curve, data.len(), share).filter(|_| side.knob().is_some() && !peer) {
            budgets.push((share, side.search(knob, test, false)?));
        }
    }
    let fixed = if side.name() == "hnswlib" { Some(side.search(HNSWLIB_EF, test, false)?) } else { None };
    meter.advance(1, 1.0, format!("{}: {} reaches {:.3} with {knob}", data.name, side.name(), at.recall.mean));
    Ok(Some(Timed {
        name: side.name(),
        is_peer: peer,
        knob_name: side.knob().map(str::to_owned),
        built: side.built().clone(),
        curve,
        knob,
        reaches,
        at,
        queries: test.judge.queries.len() / data.dim,
        budgets,
        fixed,
        latencies: Vec::new(),
        batched: Vec::new(),
        batched_touched: None,
    }))
}

/// Settings with their recall, for whoever waits.
fn shown(curve: &[Point]) -> String {
    curve.iter().map(|p| format!("{} {:.3}", p.knob, p.pass.recall.mean)).collect::<Vec<_>>().join(", ")
}

fn queries<'a>(data: &Dataset, rows: &'a [f32], k: usize, file: std::path::PathBuf) -> Result<Queries<'a>> {
    write_f32(&file, rows)?;
    Ok(Queries { judge: Judge::new(data.dim, &data.keys, rows, k)?, file })
}

fn first<'a>(queries: &Queries<'a>, count: usize, file: std::path::PathBuf) -> Result<Queries<'a>> {
    let judge = queries.judge.first(count);
    write_f32(&file, judge.queries)?;
    Ok(Queries { judge, file })
}

/// Builds one of ours; for the graph, the exact neighbours of the samples are timed apart.
fn build_ours(
    options: &IndexBenchOptions,
    data: &Dataset,
    kind: IndexKind,
    knn_seconds: &mut Option<f64>,
) -> Result<Ours> {
    let params = IndexParams { kind, ..options.params.clone() };
    let (index, seconds) = if kind == IndexKind::Graph {
        let start = Instant::now();
        let k = params.graph.sample_neighbours;
        let neighbours = exact_neighbours(data.dim, &data.keys, &data.samples, k, 0)?;
        *knn_seconds = Some(start.elapsed().as_secs_f64());
        let start = Instant::now();
        let index = build_with_neighbours(data.dim, &data.keys, &data.samples, &neighbours, &params)?;
        (index, start.elapsed().as_secs_f64())
    } else {
        let start = Instant::now();
        (build(data.dim, &data.keys, &data.samples, &params)?, start.elapsed().as_secs_f64())
    };
    let settings = match kind {
        IndexKind::Flat => format!("{:?}", params.precision),
        IndexKind::Hnsw => format!("m={} ef_construction={}", params.hnsw_m, params.hnsw_ef_construction),
        IndexKind::Graph => format!("{:?}", params.graph),
        IndexKind::Clusters => format!("{:?}", params.clusters),
        IndexKind::Ivf => format!("{:?}", params.ivf),
    };
    let built = Built { seconds, bytes: index.memory_bytes() as f64, settings };
    Ok(Ours { index, built })
}

/// Starts the peers' process and builds them, where they are wanted; gives their versions too.
fn build_peers(
    options: &IndexBenchOptions,
    data: &Dataset,
    scratch: &Path,
    meter: &mut Meter<'_>,
) -> Result<(Vec<PeerSide>, Option<String>)> {
    if !options.peers {
        return Ok((Vec::new(), None));
    }
    let process = Process::start(&options.python, NEEDS, SCRIPT, &[])?;
    let version = process.version.clone();
    let process = Rc::new(RefCell::new(process));
    let file = scratch.join("keys.f32");
    write_f32(&file, &data.keys)?;
    let command = json!({"cmd": "data", "keys": file, "dim": data.dim, "threads": options.threads()});
    process.borrow_mut().ask::<serde_json::Value>(&command)?;
    let mut peers = Vec::new();
    for name in PEERS {
        meter.say(format!("{}: building {name}", data.name));
        peers.push(PeerSide::build(name, &process, data.len(), scratch)?);
        meter.advance(1, 1.0, format!("{}: {name} built", data.name));
    }
    Ok((peers, Some(version)))
}

/// Times every side at its setting, in turns and in both orders, so that what disturbs the machine disturbs all.
fn in_turns(
    options: &IndexBenchOptions,
    sides: &mut [&mut dyn Side],
    timed: &mut [Timed],
    queries: &Queries<'_>,
    meter: &mut Meter<'_>,
) -> Result<()> {
    for round in 0..options.repeats {
        meter.say(format!("timing, round {} of {}", round + 1, options.repeats));
        let forth = 0..timed.len();
        let order: Vec<usize> = if round % 2 == 0 { forth.collect() } else { forth.rev().collect() };
        for at in order {
            let entry = &mut timed[at];
            let side = sides.iter_mut().find(|side| side.name() == entry.name && side.is_peer() == entry.is_peer);
            if let Some(side) = side {
                let pass = side.search(entry.knob, queries, true)?;
                entry.latencies.push(pass.latency_us);
                entry.batched.extend(pass.batched_us);
                entry.batched_touched = pass.batched_touched;
            }
        }
    }
    Ok(())
}

/// Appends the later keys and searches again, reading no more keys than before.
fn grow(data: &Dataset, side: &Ours, timed: &Timed, k: usize) -> Result<Growth> {
    let start = Instant::now();
    side.index.append(&data.growth)?;
    let seconds = start.elapsed().as_secs_f64();
    let all = [&data.keys[..], &data.growth].concat();
    let judge = Judge::new(data.dim, &all, &data.test, k)?;
    let budget = timed.at.touched.unwrap_or_default();
    // As wide a search as before, made narrower until it reads no more keys than before.
    let mut ef = timed.knob;
    loop {
        let (mut found, mut touched) = (Vec::new(), 0);
        for query in data.test.chunks_exact(data.dim) {
            let result = side.index.search(query, &side.params(k, ef), None)?;
            found.extend(result.hits.iter().map(|hit| hit.id).chain(std::iter::repeat(u32::MAX)).take(k));
            touched += result.stats.keys_touched;
        }
        let touched = touched as f64 / (data.test.len() / data.dim).max(1) as f64;
        if touched <= budget || ef <= k {
            let recall = judge.recall(&found)?.mean;
            return Ok(Growth { recall, touched, ef, appended: data.growth.len() / data.dim, seconds });
        }
        ef = (ef - (ef / 64).max(1)).max(k);
    }
}

impl Timed {
    /// Median over the rounds, in microseconds.
    pub(super) fn latency_us(&self) -> f64 {
        median(&self.latencies)
    }

    /// Median over the rounds, in microseconds.
    pub(super) fn batched_us(&self) -> f64 {
        median(&self.batched)
    }
}
