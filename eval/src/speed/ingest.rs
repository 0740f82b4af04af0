//! Ingesting and answering beside writing: what sequences that decode feel of documents that are read for the store and of
//! questions that are asked over them.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use engine::{Engine, Prompt, PromptChunk, Request};
use serde_json::json;

use super::mixed::{Load, Mixed, MixedLoadOptions, between_tokens};
use super::random;
use super::streams::Streams;
use super::{SpeedReport, round};
use crate::error::{EvalError, Result};
use crate::progress::{Meter, Progress};
use crate::record::RunInfo;
use crate::stats::percentile;

/// Tokens of a question.
const QUESTION: usize = 32;
/// How often it is looked whether enough is ingested.
const LOOK: Duration = Duration::from_millis(5);

/// Chunks that have been ingested, the newest last.
struct Shelf<'a> {
    engine: &'a Engine,
    seed: u64,
    chunk_tokens: usize,
    /// As many are kept as a question is asked over.
    keep: usize,
    chunks: Mutex<VecDeque<PromptChunk>>,
    ingested: AtomicUsize,
    ends: AtomicBool,
}

impl Shelf<'_> {
    /// Reads one chunk after the other, as ingesting does, until it is told to end.
    fn fill(&self) -> Result<()> {
        let vocab = self.engine.spec().vocab;
        let prefix: Vec<u32> = random::tokens(self.seed, 1, vocab);
        while !self.ends.load(Ordering::Acquire) {
            let number = self.ingested.load(Ordering::Relaxed) as u64;
            let tokens = random::tokens(self.seed.wrapping_add(1_000_000 + number), self.chunk_tokens, vocab);
            let kv = self.engine.chunk_kv(&prefix, &tokens)?;
            let source = Some(Arc::new(kv) as _);
            let chunk = PromptChunk { tokens: tokens.into(), prefix: prefix.clone().into(), source };
            let mut chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
            chunks.push_back(chunk);
            if chunks.len() > self.keep {
                chunks.pop_front();
            }
            self.ingested.fetch_add(1, Ordering::Release);
        }
        Ok(())
    }

    /// A question over the newest chunks.
    fn question(&self, number: usize) -> Request {
        let vocab = self.engine.spec().vocab;
        let chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect();
        let suffix = random::tokens(self.seed.wrapping_add(2_000_000 + number as u64), QUESTION, vocab);
        let prompt = Prompt { prefix: random::tokens(self.seed.wrapping_add(3), 16, vocab), chunks, suffix };
        Request { ignore_eos: true, ..Request::new(prompt, 1) }
    }
}

/// Measures the time between tokens of sequences that decode, first alone, then while chunks are read for the store, one after
/// the other, and questions are asked over the newest of them, each when the one before has its first token: contexts of
/// `arrival_tokens` in chunks of `chunk_tokens`, blended as by default. Chunks stay in memory; HTTP is not part of it.
///
/// # Errors
/// [`EvalError::BadOption`], also when sequences end too early; [`EvalError::NotANumber`]; those of the engine, which
/// must run one sequence more than decode.
pub fn bench_ingest_load(
    engine: &Engine,
    options: &MixedLoadOptions,
    chunk_tokens: usize,
    progress: &mut dyn FnMut(&Progress),
) -> Result<SpeedReport> {
    options.check()?;
    if chunk_tokens == 0 || options.arrival_tokens < chunk_tokens {
        return Err(EvalError::BadOption {
            what: "the tokens of a chunk",
            found: chunk_tokens.to_string(),
            expected: format!("1 to {}, the tokens of an arrival", options.arrival_tokens),
        });
    }
    let mut config = options.config(engine);
    config["chunk_tokens"] = json!(chunk_tokens);
    config["question_tokens"] = json!(QUESTION);
    config["ingest"] = json!("one chunk after the other, into memory, all the time");
    config["blend"] = json!(Request::new(Prompt::default(), 1).blend);
    let mut meter = Meter::new(options.arrivals + 2, (options.arrivals + 2) as f64, progress);
    let info = RunInfo::start(&options.output).with_config(config);
    let mut load = Load { engine, options, streams: Streams::new() };
    load.begin()?;
    meter.advance(1, 1.0, format!("{} sequences decode", options.sequences));
    let alone = load.alone()?;
    meter.advance(1, 1.0, format!("alone: p99 {:.2} ms between tokens", percentile(&alone, 0.99) * 1e3));
    let shelf = Shelf {
        engine,
        seed: options.seed,
        chunk_tokens,
        keep: options.arrival_tokens / chunk_tokens,
        chunks: Mutex::default(),
        ingested: AtomicUsize::new(0),
        ends: AtomicBool::new(false),
    };
    let (mixed, ingested) = std::thread::scope(|scope| {
        let filling = scope.spawn(|| shelf.fill());
        let asked = ask(&mut load, &shelf, &filling, &mut meter);
        shelf.ends.store(true, Ordering::Release);
        let filled = filling.join().map_err(|_| EvalError::Interrupted { when: "while a chunk was ingested" })?;
        filled.and(asked)
    })?;
    let case = format!("{}/ingest-beside-{}-streams", options.model_label, options.sequences);
    let mut records = between_tokens(&info, &case, options.sequences, &alone, &mixed);
    let read = (ingested * chunk_tokens) as f64 / mixed.seconds;
    records.push(info.record("serve", &case, "ingest_tokens_per_second", "tokens/s", round(read), ingested));
    info.write(&records)?;
    Ok(SpeedReport { records })
}

/// Asks all questions. What was measured, and how many chunks were ingested meanwhile.
fn ask(
    load: &mut Load<'_>,
    shelf: &Shelf<'_>,
    filling: &std::thread::ScopedJoinHandle<'_, Result<()>>,
    meter: &mut Meter<'_>,
) -> Result<(Mixed, usize)> {
    let options = load.options;
    let begun = Instant::now();
    while shelf.ingested.load(Ordering::Acquire) < shelf.keep && !filling.is_finished() {
        load.streams.take_until(Some(Instant::now() + LOOK), |_| false)?;
        load.check_running()?;
    }
    let mut submitted = Vec::new();
    for number in 0..options.arrivals {
        load.first_tokens_of(number)?;
        submitted.push(Instant::now());
        load.streams.submit(load.engine, shelf.question(number))?;
        meter.advance(1, 1.0, format!("question {} of {}", number + 1, options.arrivals));
    }
    load.first_tokens_of(options.arrivals)?;
    let asked = &load.streams.tracks[options.sequences..];
    let read: Vec<Instant> = asked.iter().filter_map(|track| track.tokens.first().copied()).collect();
    // The step that the last first token came with has a gap that ends after it.
    let last = read.iter().max().copied().unwrap_or(begun);
    let ingested = shelf.ingested.load(Ordering::Acquire);
    load.write_since(last, 1)?;
    let first = read.iter().zip(&submitted).map(|(read, begun)| (*read - *begun).as_secs_f64()).collect();
    let seconds = (last - begun).as_secs_f64();
    Ok((Mixed { gaps: load.gaps(begun, Instant::now()), first, seconds }, ingested))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::record::Output;
    use engine::EngineConfig;

    #[test]
    fn chunks_are_ingested_and_asked_about_while_sequences_decode() {
        let model_dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/reference");
        let settings = EngineConfig { model_dir, threads: 1, prefill_chunk: 32, ..EngineConfig::default() };
        let engine = Engine::load(settings).unwrap();
        let options = MixedLoadOptions {
            sequences: 2,
            context_tokens: 24,
            answer_tokens: 1024,
            alone_tokens: 10,
            arrivals: 2,
            arrival_tokens: 120,
            output: Output { results_dir: None, ..Output::default() },
            ..MixedLoadOptions::default()
        };
        let report = bench_ingest_load(&engine, &options, 40, &mut |_| {}).unwrap();
        let record = |metric: &str| report.records.iter().find(|r| r.metric == metric).unwrap();
        assert!(report.records.iter().all(|r| r.bench == "serve" && r.case == "ref/ingest-beside-2-streams"));
        assert_eq!(record("time_to_first_token").samples, 2);
        assert!(record("ingest_tokens_per_second").samples >= 3, "a question is asked over three chunks");
        assert!(record("itl_p99_ratio").value > 0.0 && record("itl_p99_mixed").samples > 0);
        for chunk_tokens in [0, 121] {
            let refused = bench_ingest_load(&engine, &options, chunk_tokens, &mut |_| {});
            assert!(matches!(refused, Err(EvalError::BadOption { .. })));
        }
    }
}
