//! What caches of chunks save by their policy of eviction, beside the engine's prefix cache: simulated over a made-up RAG
//! workload and over a recorded trace.

mod simulate;
mod workload;

use std::path::PathBuf;

use chunk_cache::EvictionPolicy;
use serde::Serialize;
use serde_json::json;

use self::simulate::{CacheSetting, Tally, chunk_store, prefix_cache};
use self::workload::{RagShape, Workload, mooncake, rag};
use crate::error::{EvalError, Result};
use crate::progress::{Meter, Progress};
use crate::record::{Output, Record, RunInfo};
use crate::report::records_table;

/// What [`bench_cache`] simulates.
#[derive(Debug, Clone)]
pub struct CacheBenchOptions {
    /// A trace in Mooncake's format; `None`: only the RAG workload.
    pub mooncake: Option<PathBuf>,
    /// Sizes of the caches, in percent of the bytes of all chunks.
    pub shares: Vec<usize>,
    /// The share of a chunk's computation that is done again where nothing that it was computed behind stands before it.
    pub charged_share: f32,
    /// Variants of a chunk at most.
    pub variants: usize,
    /// Seed of the RAG workload.
    pub seed: u64,
    /// Where records go.
    pub output: Output,
}

impl Default for CacheBenchOptions {
    /// The charged share is what the default rule charged on a trained model at a loss of F1 of -.001 (`docs/notes/blending.md`).
    fn default() -> Self {
        CacheBenchOptions {
            mooncake: None,
            shares: vec![5, 10, 20, 50],
            charged_share: 0.148,
            variants: 1,
            seed: 1,
            output: Output::default(),
        }
    }
}

/// The result of [`bench_cache`].
#[derive(Debug, Clone, Serialize)]
pub struct CacheBenchReport {
    /// All figures as records.
    pub records: Vec<Record>,
}

impl CacheBenchReport {
    /// As Markdown.
    #[must_use]
    pub fn table(&self) -> String {
        records_table(&self.records)
    }
}

/// Simulates chunk caches of several sizes under every policy, beside a prefix cache of the same bytes.
///
/// # Errors
/// [`EvalError::BadOption`] for sizes and shares that say nothing, and those of reading the trace and writing records.
pub fn bench_cache(options: &CacheBenchOptions, progress: &mut dyn FnMut(&Progress)) -> Result<CacheBenchReport> {
    options.check()?;
    let shape = RagShape::default();
    let info = RunInfo::start(&options.output);
    let mut workloads = vec![rag(&shape, options.seed)];
    workloads.extend(options.mooncake.as_deref().map(mooncake).transpose()?);
    let steps = workloads.len() * options.shares.len();
    let mut meter = Meter::new(steps, steps as f64, progress);
    let mut records = Vec::new();
    for workload in &workloads {
        let info = info.clone().with_config(config(options, workload, &shape));
        for share in &options.shares {
            let budget = workload.distinct_tokens() * share / 100;
            let beside = prefix_cache(workload, budget);
            for policy in EvictionPolicy::ALL {
                let case = format!("{}/{share}/{policy}", workload.name);
                let (charged, variants) = (options.charged_share, options.variants);
                let setting = CacheSetting { policy, budget, charged, overlap: true, variants };
                let ours = chunk_store(workload, setting);
                let strict = chunk_store(workload, CacheSetting { overlap: false, variants: 1, ..setting });
                records.extend(figures(&info, &case, workload, &[&ours, &strict, &beside]));
            }
            meter.advance(1, 1.0, format!("{}/{share}", workload.name));
        }
    }
    info.write(&records)?;
    Ok(CacheBenchReport { records })
}

impl CacheBenchOptions {
    fn check(&self) -> Result<()> {
        let refuse = |what, found: String, expected: &str| {
            Err(EvalError::BadOption { what, found, expected: expected.to_owned() })
        };
        if let Some(share) = self.shares.iter().find(|share| !(1..=100).contains(*share)) {
            return refuse("the size of a cache", share.to_string(), "1 to 100 percent of all chunks");
        }
        if !(0.0..=1.0).contains(&self.charged_share) {
            return refuse("the charged share", self.charged_share.to_string(), "0 to 1");
        }
        match self.variants {
            0 => refuse("the number of variants", "0".into(), "at least 1"),
            _ => Ok(()),
        }
    }
}

fn config(options: &CacheBenchOptions, workload: &Workload, shape: &RagShape) -> serde_json::Value {
    let mut config = json!({
        "requests": workload.requests.len(), "uncounted": workload.warm, "chunks": workload.chunks.len(),
        "chunk_tokens": workload.distinct_tokens(), "top_twentieth": super::speed::round(workload.top_twentieth()),
    });
    if !workload.chained {
        config["seed"] = json!(options.seed);
        config["charged_share"] = json!(options.charged_share);
        config["variants"] = json!(options.variants);
        config["chunks_per_request"] = json!(shape.chunks_per_request);
        config["same_document"] = json!(shape.together);
    }
    config
}

/// Of ours, ours where only equal prompts are cheaper, and the prefix cache.
fn figures(info: &RunInfo, case: &str, workload: &Workload, tallies: &[&Tally; 3]) -> Vec<Record> {
    let [ours, strict, beside] = tallies;
    let samples = workload.requests.len() - workload.warm;
    let record = |metric: &str, value: f64, peer: Option<f64>| {
        let mut record = info.record("cache", case, metric, "ratio", super::speed::round(value), samples);
        let peer = peer.map(|peer| ("prefix-cache".to_owned(), super::speed::round(peer)));
        record.peers = peer.into_iter().collect();
        record
    };
    let mut records = vec![
        record("hit_ratio", ours.hit_ratio(), Some(beside.hit_ratio())),
        record("saved_compute", ours.saved_compute(), Some(beside.saved_compute())),
        record("saved_over_prefix_caching", ours.saved_over(beside), None),
    ];
    if !workload.chained {
        records.push(record("recomputed_share", ours.recomputed_share(), None));
        records.push(record("saved_over_prefix_caching_without_overlap", strict.saved_over(beside), None));
    }
    records
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn sizes_that_say_nothing_are_refused() {
        let none = Output { results_dir: None, ..Output::default() };
        let base = CacheBenchOptions { output: none, ..CacheBenchOptions::default() };
        for options in [
            CacheBenchOptions { shares: vec![20, 0], ..base.clone() },
            CacheBenchOptions { shares: vec![101], ..base.clone() },
            CacheBenchOptions { charged_share: 1.5, ..base.clone() },
            CacheBenchOptions { charged_share: f32::NAN, ..base.clone() },
            CacheBenchOptions { variants: 0, ..base.clone() },
        ] {
            assert!(matches!(bench_cache(&options, &mut |_| {}), Err(EvalError::BadOption { .. })));
        }
        let missing = CacheBenchOptions { mooncake: Some("/nowhere.jsonl".into()), ..base };
        assert!(matches!(bench_cache(&missing, &mut |_| {}), Err(EvalError::Io { .. })));
    }

    #[test]
    fn a_cache_of_all_chunks_finds_all_under_every_policy() {
        let shape = RagShape { documents: 20, requests: 400, warm: 300, ..RagShape::default() };
        let workload = rag(&shape, 3);
        let budget = workload.distinct_tokens();
        for policy in EvictionPolicy::ALL {
            let setting = CacheSetting { policy, budget, charged: 0.148, overlap: false, variants: 1 };
            let all = chunk_store(&workload, setting);
            let fifth = chunk_store(&workload, CacheSetting { budget: budget / 5, ..setting });
            assert!(all.hit_ratio() > 0.95 && fifth.hit_ratio() < all.hit_ratio(), "{policy}: {all:?} {fifth:?}");
            assert!(all.recomputed_share() <= 0.148 + 1e-6 && all.recomputed_share() > 0.14);
        }
    }
}
