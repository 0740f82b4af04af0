//! Indexes: recall against keys read, bytes and time, beside what else there is, on made-up data and on a model's.

mod data;
mod heads;
mod ood;
mod records;
mod side;
mod svg;
mod sweep;
mod synthetic;
mod texts;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use ann_index::{IndexKind, IndexParams};
use engine::Engine;
use serde_json::json;

use self::data::{Dataset, Sizes};
use self::heads::{BUDGET, HeadFigure, Sharing, average, groups};
use self::ood::{Character, DIM};
use self::records::{BENCH, Frame, mass_curves, recall_curves};
use self::side::{NEEDS, PEERS, SCRIPT};
use super::{SpeedReport, length_name, round};
use crate::error::{EvalError, Result};
use crate::process::Process;
use crate::progress::{Meter, Progress};
use crate::record::{Output, Record, RunInfo};
use crate::stats::mean;
use crate::tasks::DataSource;

/// Keys of made-up data at most.
const MOST_KEYS: usize = 1 << 27;

/// What is searched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IndexData {
    /// Made up: queries are not distributed like keys, as in attention.
    OutOfDistribution,
    /// Made up: queries are drawn as keys are.
    InDistribution,
    /// The heads of the engine's model.
    Model,
}

/// What [`bench_index`] measures of a model's heads.
#[derive(Debug, Clone)]
pub struct HeadOptions {
    /// Tokens of the texts.
    pub lengths: Vec<usize>,
    /// Retrieval tasks.
    pub tasks: DataSource,
    /// Running text: a text file, or JSON lines with texts in `document`.
    pub text: Option<PathBuf>,
    /// Texts of each kind and length.
    pub texts: usize,
    /// Sample queries of a KV head.
    pub samples: usize,
    /// First tokens, which decoding attends exactly.
    pub sinks: usize,
    /// Last tokens, which decoding attends exactly.
    pub window: usize,
}

impl Default for HeadOptions {
    fn default() -> Self {
        HeadOptions {
            lengths: vec![8192],
            tasks: DataSource::Generated,
            text: None,
            texts: 2,
            samples: 8192,
            sinks: 4,
            window: 512,
        }
    }
}

/// What [`bench_index`] measures.
#[derive(Debug, Clone)]
pub struct IndexBenchOptions {
    /// What is searched.
    pub data: Vec<IndexData>,
    /// Keys of made-up data; a quarter more is appended to the graph later.
    pub keys: usize,
    /// Sample queries of made-up data.
    pub samples: usize,
    /// Queries that settings are chosen with, and as many others that figures are reported for.
    pub queries: usize,
    /// Keys to find.
    pub k: usize,
    /// Same seed, same data.
    pub seed: u64,
    /// Indexes of ours.
    pub kinds: Vec<IndexKind>,
    /// How they are built; the kind in it is not read.
    pub params: IndexParams,
    /// Timed rounds.
    pub repeats: usize,
    /// A Python interpreter with the peers' packages.
    pub python: PathBuf,
    /// Whether the peers are measured.
    pub peers: bool,
    /// Of a model's heads.
    pub heads: HeadOptions,
    /// The model's name in the cases of records.
    pub model_label: String,
    /// A folder for files that the peers read; what is written into it is removed again.
    pub scratch: PathBuf,
    /// A folder for curves; `None`: draw none.
    pub figures: Option<PathBuf>,
    /// Where records go.
    pub output: Output,
}

impl Default for IndexBenchOptions {
    fn default() -> Self {
        IndexBenchOptions {
            data: vec![IndexData::OutOfDistribution, IndexData::InDistribution],
            keys: 131_072,
            samples: 32_768,
            queries: 1000,
            k: 100,
            seed: 1,
            kinds: vec![IndexKind::Flat, IndexKind::Graph, IndexKind::Clusters, IndexKind::Hnsw],
            params: IndexParams::default(),
            repeats: 3,
            python: "python3".into(),
            peers: true,
            heads: HeadOptions::default(),
            model_label: "model".into(),
            scratch: std::env::temp_dir(),
            figures: None,
            output: Output::default(),
        }
    }
}

impl IndexBenchOptions {
    /// `context`: tokens of the model's, where there is one.
    fn check(&self, context: Option<usize>) -> Result<()> {
        let least = |what, found: usize, least: usize| {
            let expected = format!("at least {least}");
            if found < least { Err(EvalError::BadOption { what, found: found.to_string(), expected }) } else { Ok(()) }
        };
        least("the number of rounds", self.repeats, 1)?;
        least("the number of keys to find", self.k, 1)?;
        least("the number of keys", self.keys, self.k.max(64))?;
        least("the number of queries", self.queries, 1)?;
        least("the number of data sets", self.data.len(), 1)?;
        least("the number of texts", self.heads.texts, 1)?;
        let lengths = self.heads.lengths.iter().filter(|_| self.data.contains(&IndexData::Model));
        if let (Some(context), Some(longest)) = (context, lengths.max().filter(|length| Some(**length) > context)) {
            let (found, expected) = (format!("{longest} tokens"), format!("at most the model's {context}"));
            return Err(EvalError::BadOption { what: "the longest text", found, expected });
        }
        if self.keys > MOST_KEYS {
            let (found, expected) = (self.keys.to_string(), format!("at most {MOST_KEYS}"));
            return Err(EvalError::BadOption { what: "the number of keys", found, expected });
        }
        if (1..self.data.len()).any(|i| self.data[..i].contains(&self.data[i])) {
            let (found, expected) = ("one that comes twice".into(), "each once".into());
            return Err(EvalError::BadOption { what: "a set of data", found, expected });
        }
        if let Some(twice) = self.kinds.iter().enumerate().find(|(i, kind)| self.kinds[..*i].contains(kind)) {
            let (found, expected) = (twice.1.name().to_owned(), "each once".into());
            return Err(EvalError::BadOption { what: "a kind of index that comes twice", found, expected });
        }
        self.kinds.iter().try_for_each(|kind| Ok(kind.check_built_in()?))
    }

    /// Threads that building uses.
    fn threads(&self) -> usize {
        std::thread::available_parallelism().map_or(1, usize::from)
    }

    fn sizes(&self) -> Sizes {
        Sizes { keys: self.keys, growth: self.keys / 4, samples: self.samples, queries: self.queries }
    }
}

/// Measures indexes. Searches run on one thread, building on all; settings are chosen with some queries and figures
/// reported for others.
///
/// # Errors
/// [`EvalError::BadOption`]; [`EvalError::NothingToDo`] for a model's heads without an engine; [`EvalError::Peer`];
/// those of indexes, of the engine, and of reading and writing files.
pub fn bench_index(
    engine: Option<&Engine>,
    options: &IndexBenchOptions,
    progress: &mut dyn FnMut(&Progress),
) -> Result<SpeedReport> {
    options.check(engine.map(Engine::max_context))?;
    if options.peers {
        // Before anything is built: that takes minutes, and only then are they asked.
        Process::start(&options.python, NEEDS, SCRIPT, &[])?;
    }
    if let Some(folder) = &options.figures {
        fs::create_dir_all(folder).map_err(EvalError::io("create", folder))?;
    }
    let sides = options.kinds.len() + if options.peers { PEERS.len() } else { 0 };
    let steps = options.data.len() * (2 * sides + 1);
    let mut meter = Meter::new(steps, steps as f64, progress);
    let info = RunInfo::start(&options.output);
    let mut records = Vec::new();
    for data in &options.data {
        let of_data = match data {
            IndexData::OutOfDistribution => {
                made_up(options, &Character::new(options.seed).out_of_distribution(&options.sizes()), &info, &mut meter)
            }
            IndexData::InDistribution => {
                made_up(options, &Character::new(options.seed).in_distribution(&options.sizes()), &info, &mut meter)
            }
            IndexData::Model => {
                let nothing = || EvalError::NothingToDo("a model's heads without a model".into());
                model_heads(options, engine.ok_or_else(nothing)?, &info, &mut meter)
            }
        }?;
        // Set by set: a later one that fails takes nothing away.
        info.write(&of_data)?;
        records.extend(of_data);
    }
    Ok(SpeedReport { records })
}

fn made_up(options: &IndexBenchOptions, data: &Dataset, info: &RunInfo, meter: &mut Meter<'_>) -> Result<Vec<Record>> {
    let scratch = Scratch::new(&options.scratch, data.name)?;
    let measured = synthetic::measure(options, data, &scratch.0, meter)?;
    let config = json!({
        "data": data.name, "keys": data.len(), "dim": DIM, "samples": options.samples, "seed": options.seed,
        "tuning_queries": options.queries, "test_queries": options.queries, "k": options.k, "search_threads": 1,
        "build_threads": options.threads(), "rounds": options.repeats,
        "precision": format!("{:?}", options.params.precision),
    });
    let size = length_name(data.len());
    if let Some(folder) = &options.figures {
        let title = format!(
            "{}, {size} keys of {DIM}",
            if data.name == "ood" { "out of distribution" } else { "in distribution" }
        );
        let name = format!("index-{}-{size}", data.name);
        draw(folder, &name, &recall_curves(&measured, &title, data.len(), options.k))?;
    }
    let frame = Frame {
        info,
        case: format!("{}/{size}", data.name),
        config,
        keys: data.len(),
        dim: DIM,
        k: options.k,
        threads: options.threads(),
    };
    Ok(frame.records(&measured))
}

/// Writes a figure.
fn draw(folder: &Path, name: &str, svg: &str) -> Result<()> {
    fs::create_dir_all(folder).map_err(EvalError::io("create", folder))?;
    let file = folder.join(format!("{name}.svg"));
    fs::write(&file, svg).map_err(EvalError::io("write", &file))
}

/// Every method over the heads of all layers, by length and kind of text.
fn model_heads(
    options: &IndexBenchOptions,
    engine: &Engine,
    info: &RunInfo,
    meter: &mut Meter<'_>,
) -> Result<Vec<Record>> {
    let process = if options.peers { Some(Process::start(&options.python, NEEDS, SCRIPT, &[])?) } else { None };
    let mut process = process.map(RefCell::new);
    let scratch = Scratch::new(&options.scratch, "heads")?;
    let mut records = Vec::new();
    for &length in &options.heads.lengths {
        let kinds = [
            ("tasks", texts::task_texts(engine, &options.heads, length)?),
            ("text", texts::running_texts(engine, &options.heads, length)?),
        ];
        for (kind, texts) in kinds {
            let (mut figures, mut sharing, mut curves) = (Vec::new(), Vec::new(), Vec::new());
            for (number, text) in texts.iter().enumerate() {
                meter.say(format!("reading {kind} {} of {}, {length} tokens", number + 1, texts.len()));
                let groups = groups(engine, text, &options.heads)?;
                for (at, group) in groups.iter().enumerate() {
                    let found = group.measure(options)?;
                    figures.extend(found.heads);
                    sharing.extend(found.sharing);
                    curves.extend(found.curves);
                    if let Some(process) = &mut process {
                        figures.extend(group.inverted_file(process.get_mut(), options.threads(), &scratch.0)?);
                    }
                    meter.say(format!(
                        "{length} tokens, {kind} {}: KV head {} of {}",
                        number + 1,
                        at + 1,
                        groups.len()
                    ));
                }
            }
            if !texts.is_empty() {
                let case = format!("{}-{kind}/{}", options.model_label, length_name(length));
                records.extend(head_records(options, info, &case, texts.len(), &figures));
                records.extend(sharing_records(info, &case, texts.len(), &sharing));
                if let Some(folder) = &options.figures {
                    draw(folder, &format!("index-{}", case.replace('/', "-")), &mass_curves(&curves, &case))?;
                }
            }
        }
    }
    Ok(records)
}

/// Each layer and all of them together, method by method; a head's own figures stand in `config`.
fn head_records(
    options: &IndexBenchOptions,
    info: &RunInfo,
    case: &str,
    texts: usize,
    figures: &[HeadFigure],
) -> Vec<Record> {
    let mut methods: Vec<&str> = Vec::new();
    figures.iter().for_each(|figure| {
        if !methods.contains(&figure.method) {
            methods.push(figure.method);
        }
    });
    let layers = figures.iter().map(|figure| figure.layer + 1).max().unwrap_or_default();
    let places = (0..layers).map(|layer| (Some(layer), format!("L{layer}"))).chain([(None, "all".to_owned())]);
    let mut records = Vec::new();
    for (layer, place) in places {
        for &method in &methods {
            let figure = average(figures, method, layer);
            let heads = &options.heads;
            let info = info.clone().with_config(json!({
                "budget": BUDGET, "sinks": heads.sinks, "window": heads.window, "samples": heads.samples,
                "texts": texts, "tasks": heads.tasks.to_string(), "keys_touched_share": round(figure.touched),
                "attention_covered": round(figure.covered), "mass_recovered_by_query_head": figure.by_head,
            }));
            let case = format!("{case}/{place}/{method}");
            let record = |metric, value| info.record(BENCH, &case, metric, "ratio", round(value), texts);
            records.push(record("mass_recovered_budget_2pct", figure.recovered));
            if layer.is_none() {
                records.push(record("attention_covered_budget_2pct", figure.covered));
                records.push(record("keys_touched_share", figure.touched));
            }
        }
    }
    records
}

/// What searching for the heads of a group together costs over searching for one after the other, averaged over
/// groups.
fn sharing_records(info: &RunInfo, case: &str, texts: usize, sharing: &[Sharing]) -> Vec<Record> {
    let methods: BTreeSet<&str> = sharing.iter().map(|sharing| sharing.method).collect();
    let mut records = Vec::new();
    for method in methods {
        let of: Vec<&Sharing> = sharing.iter().filter(|sharing| sharing.method == method).collect();
        let mean_of = |figure: &dyn Fn(&Sharing) -> f64| mean(&of.iter().map(|s| figure(s)).collect::<Vec<_>>());
        let info = info.clone().with_config(json!({"budget": BUDGET, "groups": of.len(), "texts": texts}));
        let case = format!("{case}/all/{method}");
        let record = |metric, value| info.record(BENCH, &case, metric, "ratio", round(value), texts);
        records.push(record("group_keys_touched_over_single", mean_of(&|s| s.touched)));
        records.push(record("group_time_over_single", mean_of(&|s| s.time)));
    }
    records
}

/// A folder that is gone when it is no longer used.
struct Scratch(PathBuf);

impl Scratch {
    fn new(parent: &Path, name: &str) -> Result<Scratch> {
        let path = parent.join(format!("quire-bench-index-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).map_err(EvalError::io("create", &path))?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left behind is a temporary file.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests;
