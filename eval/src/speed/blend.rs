//! Time to the first token when the context's chunks are cached.

use std::sync::Arc;

use engine::{BlendConfig, BlendMode, ChunkSource, Engine, Prompt, Request};
use serde::Serialize;
use serde_json::json;

use super::prompt::{EqualChunks, equal_chunks};
use super::{Side, length_name, place, round};
use crate::ask::{Material, ask};
use crate::error::{EvalError, Result};
use crate::progress::{Meter, Progress};
use crate::record::{Output, Record, RunInfo};
use crate::report::records_table;
use crate::tasks::DataSource;

/// What a provider gives, or why not.
type Provided = std::result::Result<Vec<Arc<dyn ChunkSource>>, Box<dyn std::error::Error + Send + Sync>>;

/// Where cached chunks come from.
pub trait SourceProvider {
    /// Its name in the cases of records: `store`.
    fn name(&self) -> &str;

    /// Makes sure that these chunks, computed behind `prefix`, are cached, and gives them. Called once for each context,
    /// before the rounds; not timed.
    ///
    /// # Errors
    /// Whatever keeps it from that.
    fn sources(&self, prefix: &[u32], chunks: &[Vec<u32>]) -> Provided;

    /// Finds these chunks again. Called in every round, and timed together with the request that follows: a store looks
    /// its keys up here and reads when the engine asks for layers.
    ///
    /// # Errors
    /// Whatever keeps it from that.
    fn open(&self, prefix: &[u32], chunks: &[Vec<u32>]) -> Provided {
        self.sources(prefix, chunks)
    }
}

/// What [`bench_blend`] measures.
#[derive(Debug, Clone)]
pub struct BlendBenchOptions {
    /// Tokens of the contexts.
    pub lengths: Vec<usize>,
    /// Tokens of a chunk, its separator included.
    pub chunk_tokens: usize,
    /// Share that `cacheblend` and `answer` recompute.
    pub ratio: f32,
    /// Timed rounds; one more warms up.
    pub repeats: usize,
    /// Where the text of the chunks comes from.
    pub text: DataSource,
    /// The model's name in the cases of records.
    pub model_label: String,
    /// Where records go.
    pub output: Output,
}

impl Default for BlendBenchOptions {
    fn default() -> Self {
        BlendBenchOptions {
            lengths: vec![2048, 4096, 8192],
            chunk_tokens: 256,
            ratio: 0.15,
            repeats: 5,
            text: DataSource::Generated,
            model_label: "ref".into(),
            output: Output::default(),
        }
    }
}

/// The result of [`bench_blend`].
#[derive(Debug, Clone, Serialize)]
pub struct BlendReport {
    /// All figures as records.
    pub records: Vec<Record>,
}

impl BlendReport {
    /// As Markdown.
    #[must_use]
    pub fn table(&self) -> String {
        records_table(&self.records)
    }
}

/// Chunks in memory.
struct Memory(Vec<Arc<dyn ChunkSource>>);

impl SourceProvider for Memory {
    fn name(&self) -> &str {
        "memory"
    }

    fn sources(&self, _: &[u32], _: &[Vec<u32>]) -> Provided {
        Ok(self.0.clone())
    }
}

/// One column: where the chunks come from and what becomes of them.
struct Variant<'a> {
    provider: Option<&'a dyn SourceProvider>,
    blend: BlendConfig,
    side: Side,
    tokens: (usize, usize),
    charged: Option<f32>,
}

/// Measures the time to the first token behind contexts of equal chunks: everything recomputed, chunks reused as they
/// are, and blended by `cacheblend` and by `answer`; from memory and from each provider, all alternating in one run.
///
/// # Errors
/// [`EvalError::BadOption`]; [`EvalError::Provider`]; those of the engine and of reading data.
pub fn bench_blend(
    engine: &Engine,
    providers: &[&dyn SourceProvider],
    options: &BlendBenchOptions,
    progress: &mut dyn FnMut(&Progress),
) -> Result<BlendReport> {
    if options.repeats == 0 || options.lengths.iter().any(|length| *length < options.chunk_tokens) {
        let found = format!("{} rounds, lengths {:?}", options.repeats, options.lengths);
        let expected = format!("a round, and lengths of a chunk ({}) at least", options.chunk_tokens);
        return Err(EvalError::BadOption { what: "the blend bench", found, expected });
    }
    let config = json!({
        "threads": engine.threads(), "chunk_tokens": options.chunk_tokens, "ratio": options.ratio,
        "repeats": options.repeats, "text": options.text.to_string(),
        "kv": format!("{:?}", engine.kv_shape().dtype).to_lowercase(),
    });
    let info = RunInfo::start(&options.output).with_config(config);
    let cost: usize = options.lengths.iter().sum();
    let mut meter =
        Meter::new(options.lengths.len() * (options.repeats + 1), (cost * (options.repeats + 1)) as f64, progress);
    let mut records = Vec::new();
    for &length in &options.lengths {
        records.extend(bench_length(engine, providers, options, length, &info, &mut meter)?);
    }
    info.write(&records)?;
    Ok(BlendReport { records })
}

fn bench_length(
    engine: &Engine,
    providers: &[&dyn SourceProvider],
    options: &BlendBenchOptions,
    length: usize,
    info: &RunInfo,
    meter: &mut Meter<'_>,
) -> Result<Vec<Record>> {
    let material = Material::new(engine)?;
    let prefix = material.prefix();
    let EqualChunks { chunks, question } =
        equal_chunks(engine, &options.text, options.chunk_tokens, length / options.chunk_tokens)?;
    let owned: Vec<Vec<u32>> = chunks.iter().map(|chunk| chunk.to_vec()).collect();
    let mut sources: Vec<Arc<dyn ChunkSource>> = Vec::new();
    for chunk in &chunks {
        sources.push(Arc::new(engine.chunk_kv(prefix, chunk)?));
    }
    let memory = Memory(sources);
    let all: Vec<&dyn SourceProvider> =
        std::iter::once(&memory as &dyn SourceProvider).chain(providers.iter().copied()).collect();
    for provider in &all {
        provider.sources(prefix, &owned).map_err(|e| failed(*provider, &*e))?;
    }
    let mut variants = variants(&all, options.ratio);
    for round in 0..=options.repeats {
        for variant in &mut variants {
            let start = std::time::Instant::now();
            let opened = match variant.provider {
                Some(provider) => {
                    provider.open(prefix, &owned).map_err(|e| failed(provider, &*e))?.into_iter().map(Some).collect()
                }
                None => vec![None; chunks.len()],
            };
            let prompt = Prompt {
                prefix: prefix.to_vec(),
                chunks: chunks
                    .iter()
                    .zip(opened)
                    .map(|(tokens, source)| material.prompt_chunk(tokens, source))
                    .collect(),
                suffix: question.clone(),
            };
            let mut request = Request::new(prompt, 1);
            request.blend = variant.blend.clone();
            let looked_up = start.elapsed().as_secs_f64();
            let answer = ask(engine, request)?;
            variant.tokens = (answer.prefill.reused_tokens, answer.prefill.recomputed_tokens);
            variant.charged = answer.prefill.charged_share;
            if round > 0 {
                variant.side.seconds.push(looked_up + answer.first_seconds);
            }
        }
        meter.advance(1, length as f64, format!("blend {length}: {}", if round == 0 { "warm-up" } else { "timed" }));
    }
    let case = format!("{}/{}/{}", options.model_label, length_name(length), place(engine));
    Ok(figures(info, &case, &variants))
}

pub(super) fn failed(provider: &dyn SourceProvider, error: &(dyn std::error::Error + Send + Sync)) -> EvalError {
    EvalError::Provider { name: provider.name().to_owned(), reason: error.to_string() }
}

fn variants<'a>(providers: &[&'a dyn SourceProvider], ratio: f32) -> Vec<Variant<'a>> {
    let variant = |provider: Option<&'a dyn SourceProvider>, mode, ratio: f32| {
        let from = provider.map_or(String::new(), |p| format!("{}/", p.name()));
        let chooses = !matches!(mode, BlendMode::Reuse | BlendMode::FullRecompute);
        let percent = if chooses { format!("-{:.0}", ratio * 100.0) } else { String::new() };
        let side = Side::new(format!("{from}{mode}{percent}"));
        let blend = BlendConfig { mode, ratio, ..BlendConfig::default() };
        Variant { provider, blend, side, tokens: (0, 0), charged: None }
    };
    let mut variants = vec![variant(None, BlendMode::FullRecompute, 1.0)];
    for provider in providers {
        variants.push(variant(Some(*provider), BlendMode::Reuse, 0.0));
        variants.push(variant(Some(*provider), BlendMode::CacheBlend, ratio));
        variants.push(variant(Some(*provider), BlendMode::Answer, ratio));
    }
    variants
}

fn figures(info: &RunInfo, case: &str, variants: &[Variant<'_>]) -> Vec<Record> {
    let full = variants.first().map_or(0.0, |variant| variant.side.median_ms());
    let mut records = Vec::new();
    for variant in variants {
        let (ms, samples) = (variant.side.median_ms(), variant.side.seconds.len());
        let case = format!("{case}/{}", variant.side.name);
        let record = |metric, unit, value| info.record("blend", &case, metric, unit, value, samples);
        records.push(record("time_to_first_token", "ms", round(ms)));
        records.push(record("tokens_reused", "tokens", variant.tokens.0 as f64));
        records.push(record("tokens_computed", "tokens", variant.tokens.1 as f64));
        if variant.provider.is_some() {
            records.push(record("ratio_to_full_recompute", "ratio", round(full / ms)));
        }
        if let Some(share) = variant.charged {
            records.push(record("charged_share", "share", round(f64::from(share))));
        }
    }
    records
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_provider_gives_three_columns_beside_full_recompute() {
        let memory = Memory(Vec::new());
        let names: Vec<String> = variants(&[&memory, &memory], 0.15).into_iter().map(|v| v.side.name).collect();
        let three = ["memory/reuse", "memory/cacheblend-15", "memory/answer-15"];
        assert_eq!(names[0], "full-recompute");
        assert_eq!(names[1..], [three, three].concat());
    }

    #[test]
    fn ratios_compare_with_the_same_run() {
        let memory = Memory(Vec::new());
        let mut variants = variants(&[&memory], 0.15);
        for (variant, seconds) in variants.iter_mut().zip([3.0, 1.0, 1.5, 2.0]) {
            variant.side.seconds = vec![seconds; 3];
        }
        let info = RunInfo::start(&Output { results_dir: None, ..Output::default() });
        let records = figures(&info, "ref/2k/cpu", &variants);
        let ratios: Vec<f64> = records.iter().filter(|r| r.unit == "ratio").map(|r| r.value).collect();
        assert_eq!(ratios, [3.0, 2.0, 1.5]);
    }
}
