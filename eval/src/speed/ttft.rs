//! Time to the first token of a prompt of cached chunks, by where they are kept: beside full recompute and beside a prompt whose
//! state the prefix cache has.

use std::sync::{Arc, OnceLock};

use engine::{BlendConfig, BlendMode, ChunkKv, ChunkLayer, ChunkName, ChunkSource, Engine, Prompt, Request, Tier};
use serde_json::json;

use super::blend::{SourceProvider, failed};
use super::prompt::{EqualChunks, equal_chunks};
use super::{Side, SpeedReport, round};
use crate::ask::{Material, ask};
use crate::error::{EvalError, Result};
use crate::progress::{Meter, Progress};
use crate::record::{Output, Record, RunInfo};
use crate::tasks::DataSource;

/// Where the chunks of a prompt are when it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkPlace {
    /// In the GPU's memory.
    Device,
    /// In the host's memory, page-locked beside a GPU.
    Host,
    /// In the store, whose files are in the page cache.
    StoreWarm,
    /// In the store, whose files are not.
    StoreCold,
}

impl ChunkPlace {
    /// All of them with their names in cases.
    pub const ALL: [(ChunkPlace, &'static str); 4] = [
        (ChunkPlace::Device, "device"),
        (ChunkPlace::Host, "host"),
        (ChunkPlace::StoreWarm, "rocksdb-warm"),
        (ChunkPlace::StoreCold, "rocksdb-cold"),
    ];

    fn name(self) -> &'static str {
        ChunkPlace::ALL.iter().find(|(place, _)| *place == self).map_or("", |(_, name)| name)
    }
}

impl std::str::FromStr for ChunkPlace {
    type Err = EvalError;
    fn from_str(text: &str) -> Result<Self> {
        let known = || ChunkPlace::ALL.map(|(_, name)| name).join(", ");
        let found = ChunkPlace::ALL.iter().find(|(_, name)| *name == text).map(|(place, _)| *place);
        found.ok_or_else(|| EvalError::UnknownName { what: "place of chunks", name: text.to_owned(), known: known() })
    }
}

impl std::fmt::Display for ChunkPlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What [`bench_ttft`] measures.
#[derive(Debug, Clone)]
pub struct TtftOptions {
    /// Chunks of the prompt.
    pub chunks: usize,
    /// Tokens of each.
    pub chunk_tokens: usize,
    /// Tokens of the question, what opens the answer included.
    pub question_tokens: usize,
    /// Where they are.
    pub places: Vec<ChunkPlace>,
    /// Rules, beside full recompute and the prefix cache; the settings' own is called `default`.
    pub rules: Vec<BlendMode>,
    /// The settings' own rule.
    pub blend: BlendConfig,
    /// Timed rounds; one more warms up.
    pub repeats: usize,
    /// First part of the records' case.
    pub model_label: String,
    /// What stands between that and the rule, where it is not `CHUNKSxTOKENS/PLACE`; for one place.
    pub case: Option<String>,
    /// What records say of settings that are not the engine's to know.
    pub note: serde_json::Value,
    /// Where records go.
    pub output: Output,
}

/// What is asked in each round.
enum Column {
    Full,
    PrefixCache,
    From(ChunkPlace, BlendConfig),
}

struct Measured {
    /// Behind the label.
    case: String,
    column: Column,
    side: Side,
    charged: Option<f32>,
}

/// Chunks in ordinary memory, where no store is measured.
struct Computed<'a> {
    engine: &'a Engine,
    chunks: OnceLock<Vec<Arc<dyn ChunkSource>>>,
}

struct ComputedChunk {
    kv: ChunkKv,
    name: ChunkName,
}

impl ChunkSource for ComputedChunk {
    fn tokens(&self) -> usize {
        self.kv.tokens
    }

    fn layer(&self, layer: usize) -> engine::Result<ChunkLayer> {
        self.kv.layer(layer)
    }

    fn name(&self) -> Option<ChunkName> {
        Some(self.name)
    }
}

impl SourceProvider for Computed<'_> {
    fn name(&self) -> &str {
        "memory"
    }

    fn sources(
        &self,
        prefix: &[u32],
        chunks: &[Vec<u32>],
    ) -> std::result::Result<Vec<Arc<dyn ChunkSource>>, Box<dyn std::error::Error + Send + Sync>> {
        if let Some(chunks) = self.chunks.get() {
            return Ok(chunks.clone());
        }
        let compute = |(number, tokens): (usize, &Vec<u32>)| -> engine::Result<Arc<dyn ChunkSource>> {
            let name = ChunkName::of(&number.to_le_bytes());
            Ok(Arc::new(ComputedChunk { kv: self.engine.chunk_kv(prefix, tokens)?, name }))
        };
        let computed = chunks.iter().enumerate().map(compute).collect::<engine::Result<Vec<_>>>()?;
        Ok(self.chunks.get_or_init(|| computed).clone())
    }
}

/// Measures all columns, alternating. `store`: where chunks come from; `None`: where none is measured that lies in one. `cold`: drops the store's files from the page cache.
///
/// # Errors
/// [`EvalError::BadOption`]; [`EvalError::Provider`]; those of the engine.
pub fn bench_ttft(
    engine: &Engine,
    store: Option<&dyn SourceProvider>,
    cold: &dyn Fn() -> Result<()>,
    options: &TtftOptions,
    progress: &mut dyn FnMut(&Progress),
) -> Result<SpeedReport> {
    if options.case.is_some() && options.places.len() != 1 {
        let (found, expected) = (format!("{} places", options.places.len()), "one place with a name of its own".into());
        return Err(EvalError::BadOption { what: "the places of chunks", found, expected });
    }
    let sizes =
        [("chunks", options.chunks), ("rounds", options.repeats), ("tokens of a question", options.question_tokens)];
    if let Some((what, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
        return Err(EvalError::BadOption { what, found: "0".into(), expected: "at least 1".into() });
    }
    let stored = |place: &ChunkPlace| matches!(place, ChunkPlace::StoreWarm | ChunkPlace::StoreCold);
    if store.is_none() && options.places.iter().any(stored) {
        let (found, expected) = ("no store".into(), "one, where chunks are to be read from it".into());
        return Err(EvalError::BadOption { what: "the places of chunks", found, expected });
    }
    let computed = Computed { engine, chunks: OnceLock::new() };
    let store = store.unwrap_or(&computed);
    let prompt = TtftPrompt::new(engine, store, options)?;
    let sources = prompt.open(true)?;
    let mut columns = columns(options, engine.gpu().is_some());
    let mut meter = Meter::new(options.repeats + 1, (options.repeats + 1) as f64, progress);
    for number in 0..=options.repeats {
        for measured in &mut columns {
            if let Column::From(place, _) = &measured.column {
                put(engine, &sources, *place, cold)?;
                if *place == ChunkPlace::Device {
                    // Copies to the GPU go on behind `put`: what waits for them is not timed.
                    ask(engine, prompt.request(&measured.column, number)?)?;
                }
            }
            let begun = std::time::Instant::now();
            let request = prompt.request(&measured.column, number)?;
            let looked_up = begun.elapsed().as_secs_f64();
            let answer = ask(engine, request)?;
            if answer.prefill.failed_chunks > 0 {
                let reason = format!("{} chunks could not be read", answer.prefill.failed_chunks);
                return Err(EvalError::Provider { name: store.name().to_owned(), reason });
            }
            measured.charged = answer.prefill.charged_share;
            if number > 0 {
                measured.side.seconds.push(looked_up + answer.first_seconds);
            }
        }
        let state = if number == 0 { "warm-up" } else { "timed" };
        meter.advance(1, 1.0, format!("{} chunks of {}: {state}", options.chunks, options.chunk_tokens));
    }
    let info = RunInfo::start(&options.output).with_config(config(engine, options));
    let records = figures(&info, options, &columns);
    info.write(&records)?;
    Ok(SpeedReport { records })
}

/// What is asked, however it is read.
struct TtftPrompt<'a> {
    material: Material<'a>,
    store: &'a dyn SourceProvider,
    chunks: Vec<Arc<[u32]>>,
    owned: Vec<Vec<u32>>,
    question: Vec<u32>,
    full: BlendConfig,
}

impl<'a> TtftPrompt<'a> {
    fn new(engine: &'a Engine, store: &'a dyn SourceProvider, options: &TtftOptions) -> Result<TtftPrompt<'a>> {
        let EqualChunks { chunks, question } =
            equal_chunks(engine, &DataSource::Generated, options.chunk_tokens, options.chunks)?;
        Ok(TtftPrompt {
            material: Material::new(engine)?,
            store,
            owned: chunks.iter().map(|chunk| chunk.to_vec()).collect(),
            chunks,
            question: question.iter().copied().cycle().take(options.question_tokens).collect(),
            full: BlendConfig { mode: BlendMode::FullRecompute, ..options.blend.clone() },
        })
    }

    /// The chunks' sources; `first`: they are made where there are none.
    fn open(&self, first: bool) -> Result<Vec<Arc<dyn ChunkSource>>> {
        let (store, prefix) = (self.store, self.material.prefix());
        let found = if first { store.sources(prefix, &self.owned) } else { store.open(prefix, &self.owned) };
        found.map_err(|error| failed(store, &*error))
    }

    /// The request of a column in a round.
    fn request(&self, column: &Column, round: usize) -> Result<Request> {
        let prefix = self.material.prefix().to_vec();
        let (sources, blend) = match column {
            Column::PrefixCache => {
                // Another question each time: what comes before it is what the cache has.
                let (end, start) = self.question.split_at(round % self.question.len());
                let context = self.chunks.iter().flat_map(|chunk| chunk.iter()).copied();
                let tokens = prefix.into_iter().chain(context).chain(start.iter().chain(end).copied());
                return Ok(Request::new(Prompt::plain(tokens.collect()), 1));
            }
            Column::Full => (vec![None; self.chunks.len()], &self.full),
            Column::From(_, blend) => (self.open(false)?.into_iter().map(Some).collect(), blend),
        };
        let parts = self.chunks.iter().zip(sources);
        let chunks = parts.map(|(tokens, source)| self.material.prompt_chunk(tokens, source)).collect();
        let mut request = Request::new(Prompt { prefix, chunks, suffix: self.question.clone() }, 1);
        request.blend = blend.clone();
        Ok(request)
    }
}

/// Has the chunks where they are to be, and nowhere nearer.
fn put(
    engine: &Engine,
    sources: &[Arc<dyn ChunkSource>],
    place: ChunkPlace,
    cold: &dyn Fn() -> Result<()>,
) -> Result<()> {
    let tier = match place {
        ChunkPlace::Device => Tier::Device,
        ChunkPlace::Host => Tier::Host,
        ChunkPlace::StoreWarm | ChunkPlace::StoreCold => {
            engine.forget_all_chunks();
            if place == ChunkPlace::StoreCold {
                cold()?;
            }
            return Ok(());
        }
    };
    let [_, device] = engine.chunk_tiers();
    if tier == Tier::Host && device.chunks > 0 {
        engine.forget_all_chunks();
    }
    // Page-locked memory comes in the background: the first time, there may be too little of it as yet.
    for _ in 0..600 {
        if engine.keep_chunks(sources, tier)? == sources.len() {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let [host, device] = engine.chunk_tiers();
    Err(EvalError::BadOption {
        what: "the memory for chunks (host_cache_bytes, device_cache_bytes)",
        found: format!("{} and {} bytes", host.budget, device.budget),
        expected: "room for all chunks of the prompt".into(),
    })
}

fn columns(options: &TtftOptions, gpu: bool) -> Vec<Measured> {
    let shape = format!("{}x{}", options.chunks, options.chunk_tokens);
    let measured = |case: String, column| Measured { side: Side::new(case.clone()), case, column, charged: None };
    let mut columns = vec![
        measured(format!("{shape}/full"), Column::Full),
        measured(format!("{shape}/prefix-cache"), Column::PrefixCache),
    ];
    for place in &options.places {
        for mode in &options.rules {
            let own = *mode == options.blend.mode;
            let name = if own { "default".to_owned() } else { mode.to_string() };
            let blend = BlendConfig { mode: *mode, ..options.blend.clone() };
            // Without a GPU, the host's memory is where all is.
            let place_name = if gpu || *place != ChunkPlace::Host { place.name() } else { "cpu" };
            let between = options.case.clone().unwrap_or_else(|| format!("{shape}/{place_name}"));
            columns.push(measured(format!("{between}/{name}"), Column::From(*place, blend)));
        }
    }
    columns
}

fn config(engine: &Engine, options: &TtftOptions) -> serde_json::Value {
    let [host, device] = engine.chunk_tiers();
    json!({
        "threads": engine.threads(), "chunks": options.chunks, "chunk_tokens": options.chunk_tokens,
        "question_tokens": options.question_tokens, "ratio": options.blend.ratio, "rule": options.blend.mode.to_string(),
        "repeats": options.repeats, "kv": format!("{:?}", engine.kv_shape().dtype).to_lowercase(),
        "numerics": engine.numerics(), "host_cache_bytes": host.budget, "device_cache_bytes": device.budget,
        "settings": options.note,
    })
}

fn figures(info: &RunInfo, options: &TtftOptions, columns: &[Measured]) -> Vec<Record> {
    let of = |number: usize| columns.get(number).map_or(0.0, |c: &Measured| c.side.median_ms());
    let (full, prefix) = (of(0), of(1));
    let mut records = Vec::new();
    for measured in columns {
        let (ms, samples) = (measured.side.median_ms(), measured.side.seconds.len());
        let case = format!("{}/{}", options.model_label, measured.case);
        let record = |metric, unit, value| {
            let mut record = info.record("ttft", &case, metric, unit, round(value), samples);
            record.peers = [("full recompute", full), ("prefix cache", prefix)]
                .into_iter()
                .filter(|_| metric == "ms")
                .map(|(name, ms)| (name.to_owned(), round(ms)))
                .collect();
            record
        };
        records.push(record("ms", "ms", ms));
        records.push(record("seconds", "s", ms / 1e3));
        if matches!(measured.column, Column::From(..)) {
            records.push(record("speedup_over_full", "ratio", full / ms));
            records.push(record("share_of_prefix_cache", "ratio", prefix / ms));
        }
        if let Some(share) = measured.charged {
            records.push(record("charged_share", "share", f64::from(share)));
        }
    }
    records
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> TtftOptions {
        TtftOptions {
            chunks: 10,
            chunk_tokens: 512,
            question_tokens: 64,
            places: vec![ChunkPlace::Host, ChunkPlace::StoreWarm],
            rules: vec![BlendMode::Answer, BlendMode::Reuse],
            blend: BlendConfig::default(),
            repeats: 1,
            model_label: "8b".into(),
            case: None,
            note: json!({}),
            output: Output { results_dir: None, ..Output::default() },
        }
    }

    #[test]
    fn cases_say_shape_place_and_rule_and_ratios_are_to_the_same_run() {
        let mut measured_columns = columns(&options(), true);
        for (measured, seconds) in measured_columns.iter_mut().zip([0.4, 0.1, 0.05, 0.02, 0.2, 0.1]) {
            measured.side.seconds = vec![seconds; 3];
        }
        let records = figures(&RunInfo::start(&options().output), &options(), &measured_columns);
        let value = |case: &str, metric: &str| {
            records.iter().find(|r| r.case == case && r.metric == metric).map(|r| (r.value, r.samples))
        };
        assert_eq!(value("8b/10x512/full", "ms"), Some((400.0, 3)));
        assert_eq!(value("8b/10x512/prefix-cache", "seconds"), Some((0.1, 3)));
        assert_eq!(value("8b/10x512/host/default", "speedup_over_full"), Some((8.0, 3)));
        assert_eq!(value("8b/10x512/host/reuse", "ms"), Some((20.0, 3)));
        assert_eq!(value("8b/10x512/rocksdb-warm/default", "share_of_prefix_cache"), Some((0.5, 3)));
        assert_eq!(value("8b/10x512/full", "speedup_over_full"), None);
        let cases = |options: &TtftOptions, gpu| columns(options, gpu).into_iter().map(|c| c.case).collect::<Vec<_>>();
        let named = TtftOptions { case: Some("128k/composed-host".into()), ..options() };
        assert_eq!(cases(&named, true)[2..4], ["128k/composed-host/default", "128k/composed-host/reuse"]);
        assert_eq!(cases(&options(), false)[2], "10x512/cpu/default");
    }

    #[test]
    fn places_have_names_that_can_be_read() {
        for (place, name) in ChunkPlace::ALL {
            assert!(place.to_string() == name && name.parse::<ChunkPlace>().is_ok_and(|read| read == place));
        }
        assert!("disk".parse::<ChunkPlace>().is_err_and(|error| error.to_string().contains("rocksdb-warm")));
    }
}
