//! Reading beside writing: what sequences that decode feel of long prompts that arrive.

use std::time::{Duration, Instant};

use engine::{Engine, Prompt, Request, Strategy};
use serde_json::{Value, json};

use super::random;
use super::streams::{Streams, Track};
use super::{SpeedReport, round};
use crate::error::{EvalError, Result};
use crate::progress::{Meter, Progress};
use crate::record::{Output, Record, RunInfo};
use crate::stats::{median, percentile};

/// Tokens of every sequence that are not counted: buffers and graphs are made in their steps.
const WARM_UP: usize = 8;

/// What [`bench_mixed_load`] measures.
#[derive(Debug, Clone)]
pub struct MixedLoadOptions {
    /// Sequences that decode all the time.
    pub sequences: usize,
    /// Tokens of their prompts.
    pub context_tokens: usize,
    /// Tokens that each may write at most; it must not reach them before the last arrival has been read.
    pub answer_tokens: usize,
    /// Tokens that each writes without arrivals.
    pub alone_tokens: usize,
    /// Prompts that arrive.
    pub arrivals: usize,
    /// Tokens of each of them.
    pub arrival_tokens: usize,
    /// Arrivals a second, whether or not those before have been read; `None`: one after the other.
    pub rate: Option<f64>,
    /// How the sequences decode.
    pub strategy: Strategy,
    /// Seed of all prompts.
    pub seed: u64,
    /// Tokens of one step of reading, as the engine was told.
    pub prefill_chunk: usize,
    /// Tokens of one step in all, as the engine was told.
    pub step_tokens: usize,
    /// Tokens of prompts in a step in which some sequence decodes, as the engine was told.
    pub mixed_prefill_tokens: usize,
    /// The model's name in the cases of records.
    pub model_label: String,
    /// Where records go.
    pub output: Output,
}

impl Default for MixedLoadOptions {
    fn default() -> Self {
        MixedLoadOptions {
            sequences: 16,
            context_tokens: 512,
            answer_tokens: 4096,
            alone_tokens: 128,
            arrivals: 8,
            arrival_tokens: 8192,
            rate: None,
            strategy: Strategy::Full,
            seed: 1,
            prefill_chunk: 512,
            step_tokens: 512,
            mixed_prefill_tokens: 112,
            model_label: "ref".into(),
            output: Output::default(),
        }
    }
}

impl MixedLoadOptions {
    pub(super) fn check(&self) -> Result<()> {
        let counts = [
            ("the number of sequences", self.sequences, 1),
            ("the tokens of their prompts", self.context_tokens, 1),
            ("the tokens without arrivals", self.alone_tokens, 2),
            ("the number of arrivals", self.arrivals, 1),
            ("the tokens of an arrival", self.arrival_tokens, 1),
            ("the tokens of an answer", self.answer_tokens, self.alone_tokens + WARM_UP + 2),
        ];
        for (what, found, least) in counts {
            if found < least {
                let expected = format!("at least {least}");
                return Err(EvalError::BadOption { what, found: found.to_string(), expected });
            }
        }
        match self.rate {
            Some(rate) if !(rate > 0.0 && rate.is_finite()) => Err(EvalError::BadOption {
                what: "the rate of arrivals",
                found: rate.to_string(),
                expected: "arrivals a second, more than 0".into(),
            }),
            _ => Ok(()),
        }
    }

    pub(super) fn config(&self, engine: &Engine) -> Value {
        json!({
            "sequences": self.sequences, "context_tokens": self.context_tokens, "alone_tokens": self.alone_tokens,
            "arrivals": self.arrivals, "arrival_tokens": self.arrival_tokens, "arrivals_per_second": self.rate,
            "arrival": if self.rate.is_some() { "at a fixed rate" } else { "when the one before has its first token" },
            "strategy": self.strategy, "prompt": format!("random tokens, seed {}", self.seed),
            "prefill_chunk": self.prefill_chunk, "step_tokens": self.step_tokens,
            "mixed_prefill_tokens": self.mixed_prefill_tokens, "threads": engine.threads(),
            "kv": format!("{:?}", engine.kv_shape().dtype).to_lowercase(),
        })
    }
}

/// Measures the time between tokens of sequences that decode, first alone, then while long prompts arrive at the same
/// engine. Times are those at which the engine chose its tokens; HTTP is not part of them.
///
/// # Errors
/// [`EvalError::BadOption`], also when sequences end too early; [`EvalError::NotANumber`]; those of the engine, which
/// must run one sequence more than decode.
pub fn bench_mixed_load(
    engine: &Engine,
    options: &MixedLoadOptions,
    progress: &mut dyn FnMut(&Progress),
) -> Result<SpeedReport> {
    options.check()?;
    let mut meter = Meter::new(options.arrivals + 2, (options.arrivals + 2) as f64, progress);
    let info = RunInfo::start(&options.output).with_config(options.config(engine));
    let mut load = Load { engine, options, streams: Streams::new() };
    load.begin()?;
    meter.advance(1, 1.0, format!("{} sequences decode", options.sequences));
    let alone = load.alone()?;
    meter.advance(1, 1.0, format!("alone: p99 {:.2} ms between tokens", percentile(&alone, 0.99) * 1e3));
    let mixed = load.arrivals(&mut meter)?;
    let records = figures(&info, &format!("{}/mixed", options.model_label), options, &alone, &mixed);
    info.write(&records)?;
    Ok(SpeedReport { records })
}

pub(super) struct Load<'a> {
    pub(super) engine: &'a Engine,
    pub(super) options: &'a MixedLoadOptions,
    /// First those that decode, then those that arrive.
    pub(super) streams: Streams,
}

/// What was measured while prompts arrived.
pub(super) struct Mixed {
    /// Seconds between tokens, over all sequences that decode.
    pub(super) gaps: Vec<f64>,
    /// From submission to the first token of each arrival.
    pub(super) first: Vec<f64>,
    /// From the first submission to the last first token.
    pub(super) seconds: f64,
}

impl Load<'_> {
    fn decoding(tracks: &[Track], sequences: usize) -> &[Track] {
        &tracks[..sequences]
    }

    fn prompt(&self, number: usize, tokens: usize) -> Prompt {
        let seed = self.options.seed.wrapping_add(number as u64);
        Prompt::plain(random::tokens(seed, tokens, self.engine.spec().vocab))
    }

    /// Until every sequence decodes and is warm.
    pub(super) fn begin(&mut self) -> Result<()> {
        for number in 0..self.options.sequences {
            let prompt = self.prompt(number, self.options.context_tokens);
            let mut request = Request::new(prompt, self.options.answer_tokens);
            request.ignore_eos = true;
            request.attention.strategy = self.options.strategy;
            self.streams.submit(self.engine, request)?;
        }
        self.write_since(Instant::now(), WARM_UP + 1)
    }

    /// Until every sequence has written so many tokens since this moment.
    pub(super) fn write_since(&mut self, moment: Instant, tokens: usize) -> Result<()> {
        let sequences = self.options.sequences;
        self.streams.take_until(None, |tracks| {
            let tracks = Self::decoding(tracks, sequences);
            tracks.iter().all(|track| track.since(moment) >= tokens) || tracks.iter().any(Track::ended)
        })?;
        self.check_running()
    }

    pub(super) fn check_running(&self) -> Result<()> {
        let options = self.options;
        if !Self::decoding(&self.streams.tracks, options.sequences).iter().any(Track::ended) {
            return Ok(());
        }
        Err(EvalError::BadOption {
            what: "the tokens of an answer",
            found: format!("{}, written before the last arrival had been read", options.answer_tokens),
            expected: "more, with the option --answer-tokens, within the model's context; or fewer arrivals".into(),
        })
    }

    pub(super) fn gaps(&self, from: Instant, to: Instant) -> Vec<f64> {
        let tracks = Self::decoding(&self.streams.tracks, self.options.sequences);
        tracks.iter().flat_map(|track| track.gaps(from, to)).collect()
    }

    pub(super) fn alone(&mut self) -> Result<Vec<f64>> {
        let from = Instant::now();
        self.write_since(from, self.options.alone_tokens)?;
        Ok(self.gaps(from, Instant::now()))
    }

    fn arrivals(&mut self, meter: &mut Meter<'_>) -> Result<Mixed> {
        let options = self.options;
        let begun = Instant::now();
        let mut submitted = Vec::new();
        for number in 0..options.arrivals {
            let prompt = self.prompt(options.sequences + number, options.arrival_tokens);
            match options.rate {
                Some(rate) => {
                    let moment = begun + Duration::from_secs_f64(number as f64 / rate);
                    self.streams.take_until(Some(moment), |_| false)?;
                }
                None => self.first_tokens_of(number)?,
            }
            submitted.push(Instant::now());
            self.streams.submit(self.engine, Request { ignore_eos: true, ..Request::new(prompt, 1) })?;
            meter.advance(1, 1.0, format!("arrival {} of {}", number + 1, options.arrivals));
        }
        self.first_tokens_of(options.arrivals)?;
        let read: Vec<Instant> =
            self.streams.tracks[options.sequences..].iter().filter_map(|t| t.tokens.first().copied()).collect();
        // The step that the last first token came with has a gap that ends after it.
        let last = read.iter().max().copied().unwrap_or(begun);
        self.write_since(last, 1)?;
        let seconds = (last - begun).as_secs_f64();
        let first = read.iter().zip(&submitted).map(|(read, begun)| (*read - *begun).as_secs_f64()).collect();
        Ok(Mixed { gaps: self.gaps(begun, Instant::now()), first, seconds })
    }

    /// Until the first `arrivals` that have arrived have their first token.
    pub(super) fn first_tokens_of(&mut self, arrivals: usize) -> Result<()> {
        let sequences = self.options.sequences;
        self.streams.take_until(None, |tracks| {
            tracks[sequences..].iter().take(arrivals).all(|track| !track.tokens.is_empty())
                || Self::decoding(tracks, sequences).iter().any(Track::ended)
        })?;
        self.check_running()
    }
}

fn figures(info: &RunInfo, case: &str, options: &MixedLoadOptions, alone: &[f64], mixed: &Mixed) -> Vec<Record> {
    let mut records = between_tokens(info, case, options.sequences, alone, mixed);
    let read = (mixed.first.len() * options.arrival_tokens) as f64 / mixed.seconds;
    let rate = info.record("serve", case, "prefill_tokens_per_second", "tokens/s", round(read), mixed.first.len());
    records.insert(records.len() - 1, rate);
    records
}

/// The times between tokens with and without what arrives, and how long that waits for its first.
pub(super) fn between_tokens(
    info: &RunInfo,
    case: &str,
    sequences: usize,
    alone: &[f64],
    mixed: &Mixed,
) -> Vec<Record> {
    let record =
        |metric, unit, value: f64, samples: usize| info.record("serve", case, metric, unit, round(value), samples);
    let ms = |gaps: &[f64], share| percentile(gaps, share) * 1e3;
    let (few, many) = (alone.len(), mixed.gaps.len());
    let ratio = |share| ms(&mixed.gaps, share) / ms(alone, share);
    let rate = |gaps: &[f64]| gaps.len() as f64 * sequences as f64 / gaps.iter().sum::<f64>();
    vec![
        record("itl_p50_alone", "ms", ms(alone, 0.5), few),
        record("itl_p99_alone", "ms", ms(alone, 0.99), few),
        record("itl_p50_mixed", "ms", ms(&mixed.gaps, 0.5), many),
        record("itl_p99_mixed", "ms", ms(&mixed.gaps, 0.99), many),
        record("itl_max_mixed", "ms", ms(&mixed.gaps, 1.0), many),
        record("itl_p50_ratio", "ratio", ratio(0.5), many),
        record("itl_p99_ratio", "ratio", ratio(0.99), many),
        record("decode_tokens_per_second_alone", "tokens/s", rate(alone), few),
        record("decode_tokens_per_second_mixed", "tokens/s", rate(&mixed.gaps), many),
        record("time_to_first_token", "ms", median(&mixed.first) * 1e3, mixed.first.len()),
    ]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use engine::EngineConfig;

    fn options() -> MixedLoadOptions {
        MixedLoadOptions {
            sequences: 2,
            context_tokens: 24,
            answer_tokens: 1024,
            alone_tokens: 10,
            arrivals: 2,
            arrival_tokens: 200,
            prefill_chunk: 32,
            output: Output { results_dir: None, ..Output::default() },
            ..MixedLoadOptions::default()
        }
    }

    fn engine() -> Engine {
        let model_dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/reference");
        Engine::load(EngineConfig { model_dir, threads: 1, prefill_chunk: 32, ..EngineConfig::default() }).unwrap()
    }

    #[test]
    fn the_ratio_compares_the_slowest_hundredth_with_and_without() {
        let info = RunInfo::start(&options().output);
        let alone: Vec<f64> = (1..=100).map(|i| if i == 100 { 0.009 } else { 0.002 }).collect();
        let gaps: Vec<f64> = (1..=100).map(|i| if i > 98 { 0.008 } else { 0.004 }).collect();
        let mixed = Mixed { gaps, first: vec![0.5, 0.25, 0.75], seconds: 1.5 };
        let records = figures(&info, "8b/mixed", &options(), &alone, &mixed);
        let value = |metric: &str| records.iter().find(|r| r.metric == metric).map(|r| r.value).unwrap();
        assert_eq!([value("itl_p99_alone"), value("itl_p99_mixed"), value("itl_max_mixed")], [2.0, 8.0, 8.0]);
        assert_eq!([value("itl_p99_ratio"), value("itl_p50_ratio")], [4.0, 2.0]);
        assert_eq!([value("prefill_tokens_per_second"), value("time_to_first_token")], [400.0, 500.0]);
        assert!(records.iter().all(|r| r.bench == "serve" && r.case == "8b/mixed"));
    }

    #[test]
    fn prompts_are_read_one_by_one_or_at_a_rate_while_sequences_decode() {
        let engine = engine();
        for rate in [None, Some(200.0)] {
            let report = bench_mixed_load(&engine, &MixedLoadOptions { rate, ..options() }, &mut |_| {}).unwrap();
            let record = |metric: &str| report.records.iter().find(|r| r.metric == metric).unwrap();
            // Ten tokens of each sequence, and what it wrote until this thread had seen them, have at least nine gaps.
            assert!(record("itl_p99_alone").samples >= 2 * 9, "{:?}", record("itl_p99_alone"));
            assert!(record("itl_p50_alone").value > 0.01, "{:?}", record("itl_p50_alone"));
            // 200 tokens in pieces of 32 are at least six steps an arrival, each with a token for both.
            assert!(record("itl_p99_mixed").samples >= 2 * 6, "{:?}", record("itl_p99_mixed"));
            assert_eq!(record("time_to_first_token").samples, 2);
            assert!(record("prefill_tokens_per_second").value > 0.0 && record("itl_p99_ratio").value > 0.0);
        }
    }

    #[test]
    fn sequences_that_end_too_early_are_an_error_that_says_what_to_do() {
        let short = MixedLoadOptions { answer_tokens: 22, arrivals: 4, arrival_tokens: 500, ..options() };
        let error = bench_mixed_load(&engine(), &short, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("--answer-tokens"), "{error}");
    }

    #[test]
    fn senseless_options_are_refused() {
        for bad in [
            MixedLoadOptions { sequences: 0, ..options() },
            MixedLoadOptions { arrivals: 0, ..options() },
            MixedLoadOptions { rate: Some(0.0), ..options() },
            MixedLoadOptions { answer_tokens: 10, ..options() },
        ] {
            assert!(matches!(bad.check(), Err(EvalError::BadOption { .. })), "{bad:?}");
        }
    }
}
