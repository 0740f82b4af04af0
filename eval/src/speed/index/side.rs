//! One side of the comparison: something that is built over keys and searched with a knob that trades work for recall.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Instant;

use ann_index::{IndexKind, KeyIndex, SearchParams};
use serde::Deserialize;
use serde_json::json;

use super::data::{Judge, Recall, read_ids};
use crate::error::Result;
use crate::process::Process;
use crate::stats::median;

/// Queries of a group in batched searches: the query heads that share one KV head in Llama 3's shapes.
const GROUP: usize = 4;

/// Queries with their truth, and the file that other programs read them from.
pub(super) struct Queries<'a> {
    pub(super) judge: Judge<'a>,
    pub(super) file: PathBuf,
}

/// What searching for all queries with one setting gave; means over queries, medians for times.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pass {
    pub(super) recall: Recall,
    /// Keys whose bytes were read, a query; `None` where the library does not tell.
    pub(super) touched: Option<f64>,
    /// Bytes read, a query; `None` where the library does not tell.
    pub(super) bytes: Option<f64>,
    /// Microseconds of a search for one query.
    pub(super) latency_us: f64,
    /// Microseconds a query when several are handed over at once; only where it was asked for.
    pub(super) batched_us: Option<f64>,
    /// Keys read then, a query; those that several queries of a group share count once.
    pub(super) batched_touched: Option<f64>,
}

/// What building gave.
#[derive(Debug, Clone)]
pub(super) struct Built {
    pub(super) seconds: f64,
    /// Memory held, copied keys included.
    pub(super) bytes: f64,
    pub(super) settings: String,
}

/// Something that has been built over the keys. Searches run on one thread.
pub(super) trait Side {
    fn name(&self) -> &'static str;

    /// What the knob is called; `None` where there is none.
    fn knob(&self) -> Option<&str>;

    /// Settings to try, ascending.
    fn grid(&self) -> Vec<usize>;

    /// Whether it is one of the programs that ours is compared with.
    fn is_peer(&self) -> bool;

    fn built(&self) -> &Built;

    /// `batched`: also with several queries at once.
    fn search(&mut self, knob: usize, queries: &Queries<'_>, batched: bool) -> Result<Pass>;
}

/// One of ours.
pub(super) struct Ours {
    pub(super) index: Box<dyn KeyIndex>,
    pub(super) built: Built,
}

impl Ours {
    /// What a search with this setting is asked for.
    pub(super) fn params(&self, k: usize, knob: usize) -> SearchParams {
        let params = SearchParams { k, ..SearchParams::default() };
        match self.index.kind() {
            IndexKind::Clusters | IndexKind::Ivf => SearchParams { probes: knob, ..params },
            _ => SearchParams { ef: knob, ..params },
        }
    }
}

impl Side for Ours {
    fn name(&self) -> &'static str {
        self.index.kind().name()
    }

    fn knob(&self) -> Option<&str> {
        match self.index.kind() {
            IndexKind::Flat => None,
            IndexKind::Clusters | IndexKind::Ivf => Some("probes"),
            IndexKind::Graph | IndexKind::Hnsw => Some("ef"),
        }
    }

    fn grid(&self) -> Vec<usize> {
        match self.index.kind() {
            IndexKind::Flat => vec![0],
            IndexKind::Graph => candidates(100, 4096, 1.1),
            IndexKind::Hnsw => candidates(128, 16_384, 2.0),
            // From half a percent of about one cluster in 16 keys to all of them.
            IndexKind::Clusters => candidates((self.index.len() / 3200).max(1), self.index.len().div_ceil(16), 1.7),
            // Up to all lists: four times the root of the number of keys.
            IndexKind::Ivf => candidates(4, (4 * self.index.len().isqrt()).max(4), 1.25),
        }
    }

    fn is_peer(&self) -> bool {
        false
    }

    fn built(&self) -> &Built {
        &self.built
    }

    fn search(&mut self, knob: usize, queries: &Queries<'_>, batched: bool) -> Result<Pass> {
        let (judge, dim) = (&queries.judge, queries.judge.dim);
        let k = judge.k();
        let params = self.params(k, knob);
        let (mut found, mut times, mut touched, mut bytes) = (Vec::new(), Vec::new(), 0, 0);
        for query in judge.queries.chunks_exact(dim) {
            let start = Instant::now();
            let result = self.index.search(query, &params, None)?;
            times.push(start.elapsed().as_secs_f64() * 1e6);
            let missing = std::iter::repeat(u32::MAX);
            found.extend(result.hits.iter().map(|hit| hit.id).chain(missing).take(k));
            touched += result.stats.keys_touched;
            bytes += result.stats.bytes;
        }
        let count = times.len().max(1) as f64;
        let (mut batched_us, mut batched_touched) = (None, None);
        if batched {
            let (start, mut touched) = (Instant::now(), 0);
            for group in judge.queries.chunks(GROUP * dim) {
                let results = self.index.search_group(group, &params, None)?;
                touched += results.iter().map(|result| result.stats.keys_touched).sum::<usize>();
            }
            batched_us = Some(start.elapsed().as_secs_f64() * 1e6 / count);
            batched_touched = Some(touched as f64 / count);
        }
        Ok(Pass {
            recall: judge.recall(&found)?,
            touched: Some(touched as f64 / count),
            bytes: Some(bytes as f64 / count),
            latency_us: median(&times),
            batched_us,
            batched_touched,
        })
    }
}

/// Rising settings from `first` to `last`, both included, each about `factor` times the one before.
pub(super) fn candidates(first: usize, last: usize, factor: f64) -> Vec<usize> {
    let mut grid = vec![first];
    let mut next = first as f64;
    loop {
        next *= factor;
        let value = (next.round() as usize).min(last);
        if grid.last().is_some_and(|at| value > *at) {
            grid.push(value);
        }
        if value >= last {
            return grid;
        }
    }
}

/// The script with the peers.
pub(super) const SCRIPT: &str = include_str!("../../../peers/index_peers.py");
/// What it imports.
pub(super) const NEEDS: &str = "faiss, hnswlib, usearch and numpy (scripts/requirements-peers.txt)";
/// The peers it knows.
pub(super) const PEERS: [&str; 4] = ["hnswlib", "faiss-ivf", "faiss-hnsw", "usearch"];

/// Another program's index, in the process that built it.
pub(super) struct PeerSide {
    name: &'static str,
    process: Rc<RefCell<Process>>,
    built: Built,
    knob: String,
    keys: usize,
    ids: PathBuf,
}

impl PeerSide {
    /// Builds over the keys that the process was given. `scratch`: a folder for what it finds.
    pub(super) fn build(
        name: &'static str,
        process: &Rc<RefCell<Process>>,
        keys: usize,
        scratch: &Path,
    ) -> Result<PeerSide> {
        #[derive(Deserialize)]
        struct Reply {
            seconds: f64,
            bytes: f64,
            settings: String,
            knob: String,
        }
        let reply: Reply = process.borrow_mut().ask(&json!({"cmd": "build", "peer": name}))?;
        let built = Built { seconds: reply.seconds, bytes: reply.bytes, settings: reply.settings };
        let ids = scratch.join(format!("{name}.ids"));
        Ok(PeerSide { name, process: Rc::clone(process), built, knob: reply.knob, keys, ids })
    }
}

impl Side for PeerSide {
    fn name(&self) -> &'static str {
        self.name
    }

    fn knob(&self) -> Option<&str> {
        Some(&self.knob)
    }

    fn grid(&self) -> Vec<usize> {
        match self.name {
            "faiss-ivf" => candidates(8, (self.keys / 64).clamp(1, 1024), 1.25),
            _ => candidates(128, self.keys.clamp(128, 16_384), 2.0),
        }
    }

    fn is_peer(&self) -> bool {
        true
    }

    fn built(&self) -> &Built {
        &self.built
    }

    fn search(&mut self, knob: usize, queries: &Queries<'_>, batched: bool) -> Result<Pass> {
        #[derive(Deserialize)]
        struct Reply {
            latency_us: f64,
            batched_us: Option<f64>,
            touched: Option<f64>,
        }
        let k = queries.judge.k();
        let command = json!({
            "cmd": "search", "peer": self.name, "knob": knob, "k": k, "ids": self.ids, "queries": queries.file,
            "batched": batched,
        });
        let reply: Reply = self.process.borrow_mut().ask(&command)?;
        Ok(Pass {
            recall: queries.judge.recall(&read_ids(&self.ids)?)?,
            touched: reply.touched,
            bytes: None,
            latency_us: reply.latency_us,
            batched_us: reply.batched_us,
            batched_touched: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_rise_to_the_last_one() {
        assert_eq!(candidates(100, 200, 1.5), [100, 150, 200]);
        assert_eq!(candidates(1, 4, 1.1), [1, 2, 3, 4]);
        assert_eq!(candidates(7, 7, 2.0), [7]);
        assert_eq!(candidates(128, 100, 2.0), [128]);
    }
}
