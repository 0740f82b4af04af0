//! Many answers at once: the time between tokens when every sequence of a batch decodes, and its distance from the
//! floor of bytes.

use engine::{Engine, Prompt, Request, SamplingParams, Strategy};
use serde_json::{Value, json};

use super::gpu_peer::{GpuPeer, GpuPeerOptions};
use super::prompt::prompt;
use super::random;
use super::rate::{ReadRate, device_read_rate};
use super::streams::{Streams, Track};
use super::{SpeedReport, length_name, round};
use crate::error::{EvalError, Result};
use crate::progress::{Meter, Progress};
use crate::record::{Output, Record, RunInfo};
use crate::stats::{median, percentile};
use crate::tasks::DataSource;

/// Steps that are not counted after the last sequence has begun: buffers and graphs are made in them.
const WARM_UP: usize = 8;

/// Where the tokens of prompts come from.
#[derive(Debug, Clone)]
pub enum PromptSource {
    /// Drawn at random, other ones for every sequence: full attention takes as long over any tokens.
    Random {
        /// Seed of the tokens.
        seed: u64,
    },
    /// A text with a question, the same for every sequence; strategies that retrieve see keys of real text.
    Text(DataSource),
}

/// What [`bench_batch_decode`] measures.
#[derive(Debug, Clone)]
pub struct BatchDecodeOptions {
    /// Tokens of each prompt. Where prompt and answer exceed the model's context, the prompt is cut to fit.
    pub lengths: Vec<usize>,
    /// The length's name in the records' case, for one length; otherwise `short` up to 512 tokens, `2k` for 2048.
    pub length_name: Option<String>,
    /// Sequences that decode at the same time.
    pub batches: Vec<usize>,
    /// Steps that are timed in a round.
    pub tokens: usize,
    /// Rounds; prompts are read anew in each.
    pub repeats: usize,
    /// How decoding attends.
    pub strategies: Vec<Strategy>,
    /// How tokens are chosen; the peer is measured beside greedy choices alone.
    pub sampling: SamplingParams,
    /// What prompts are made of.
    pub prompt: PromptSource,
    /// Tokens of one step of reading, as the engine was told: how long earlier sequences decode before the last begins.
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

impl BatchDecodeOptions {
    fn check(&self) -> Result<()> {
        let least = |what, found: usize, least: usize| {
            let expected = format!("at least {least}");
            if found < least { Err(EvalError::BadOption { what, found: found.to_string(), expected }) } else { Ok(()) }
        };
        least("the number of rounds", self.repeats, 1)?;
        least("the number of decoded tokens", self.tokens, 2)?;
        least("the number of lengths", self.lengths.len(), 1)?;
        least("the shortest prompt", self.lengths.iter().copied().min().unwrap_or(0), 1)?;
        least("the smallest batch", self.batches.iter().copied().min().unwrap_or(0), 1)?;
        self.sampling.validate(usize::MAX)?;
        if self.sampling.is_greedy() && (self.sampling.top_k > 0 || self.sampling.top_p < 1.0) {
            let expected = "above 0 where top_k or top_p is set".into();
            return Err(EvalError::BadOption { what: "the temperature", found: "0".into(), expected });
        }
        if self.length_name.is_some() && self.lengths.len() > 1 {
            let (found, expected) = (format!("given with {} lengths", self.lengths.len()), "one length".into());
            return Err(EvalError::BadOption { what: "the name of the length", found, expected });
        }
        Ok(())
    }

    /// What stands behind the strategy in a case: `/t0.7-k50-p0.9`; nothing for greedy choices.
    fn sampling_name(&self) -> String {
        let SamplingParams { temperature, top_k, top_p, .. } = &self.sampling;
        if *temperature == 0.0 {
            return String::new();
        }
        let top_k = if *top_k > 0 { format!("-k{top_k}") } else { String::new() };
        let top_p = if *top_p < 1.0 { format!("-p{top_p}") } else { String::new() };
        format!("/t{temperature}{top_k}{top_p}")
    }

    /// Refuses what a context of so many tokens has no room for.
    ///
    /// # Errors
    /// [`EvalError::BadOption`].
    pub fn check_context(&self, context: usize) -> Result<()> {
        let cases = self.lengths.iter().flat_map(|length| self.batches.iter().map(move |batch| (*length, *batch)));
        cases.into_iter().try_for_each(|(length, batch)| self.prompt_tokens(length, batch, context).map(drop))
    }

    /// Tokens of a prompt. One as long as the context is cut so that the answer fits; no longer one is, nor one of which little
    /// would be left.
    fn prompt_tokens(&self, length: usize, batch: usize, context: usize) -> Result<usize> {
        let answer = self.answer_tokens(length, batch);
        let tokens = length.min(context.saturating_sub(answer));
        if length > context || tokens < length.div_ceil(2) {
            let found = format!("{length} tokens, and {answer} of the answer of one in {batch}");
            let expected = format!("at most the context of {context}: fewer tokens or sequences, or a longer context");
            return Err(EvalError::BadOption { what: "the prompt's length", found, expected });
        }
        Ok(tokens)
    }

    /// Tokens of an answer: those that are timed, those before them, and what a sequence writes while the others are
    /// read. How long that takes is the scheduler's choice: a quarter of a reading step a token is allowed for. The first of
    /// several may write some more before the others are handed in, where a step takes less than a millisecond.
    fn answer_tokens(&self, length: usize, batch: usize) -> usize {
        let step = (self.prefill_chunk.min(self.mixed_prefill_tokens) / 4).max(1);
        let handing_in = if batch > 1 { 64 } else { 0 };
        let meanwhile = batch.saturating_sub(1).saturating_mul(length.div_ceil(step).saturating_add(1));
        self.tokens.saturating_add(WARM_UP + 2 + handing_in).saturating_add(meanwhile)
    }

    fn name_of(&self, length: usize) -> String {
        match &self.length_name {
            Some(name) => name.clone(),
            None if length <= 512 => "short".into(),
            None => length_name(length),
        }
    }
}

/// What transformers needs for a step, case by case.
#[derive(Debug, Clone, Default)]
pub struct DecodePeers {
    version: Option<String>,
    /// Length, batch, name, ms.
    times: Vec<(usize, usize, &'static str, f64)>,
    errors: Vec<String>,
}

impl DecodePeers {
    fn of(&self, length: usize, batch: usize) -> impl Iterator<Item = (&'static str, f64)> {
        let here = self.times.iter().filter(move |time| (time.0, time.1) == (length, batch));
        here.map(|time| (time.2, time.3))
    }
}

/// Times transformers on the same lengths and batches, with random weights and caches of the model's shape: eager with a
/// dynamic cache, and compiled with a static cache. To be called before an engine takes the device's
/// memory. A part that fails is left out and named in the records' settings.
///
/// # Errors
/// [`EvalError::Peer`] when it does not start; [`EvalError::BadOption`].
pub fn time_decode_peers(
    options: &BatchDecodeOptions,
    peer: &GpuPeerOptions,
    progress: &mut dyn FnMut(&Progress),
) -> Result<DecodePeers> {
    options.check()?;
    let mut peers = DecodePeers::default();
    if !options.sampling.is_greedy() {
        return Ok(peers);
    }
    let mut meter = Meter::new(0, 0.0, progress);
    let Some(mut process) = GpuPeer::start(peer)? else { return Ok(peers) };
    peers.version = Some(process.version.clone());
    for &length in &options.lengths {
        for &batch in &options.batches {
            for (kind, name) in
                [("eager", "transformers eager dynamic cache"), ("compiled", "transformers compiled static cache")]
            {
                let part = format!("decode:{kind}:{length}:{batch}");
                match process.time(&part)? {
                    Ok(samples) => {
                        meter.say(format!("{name}, {length} tokens x {batch}: {:.2} ms a step", median(&samples)));
                        peers.times.push((length, batch, name, median(&samples)));
                    }
                    Err(reason) => {
                        meter.say(format!("{name}, {length} tokens x {batch} failed: {reason}"));
                        peers.errors.push(reason);
                    }
                }
            }
        }
    }
    Ok(peers)
}

/// Measures the time between tokens of a batch: all prompts are read, and once the last sequence has begun (and
/// eight steps more), the gaps between its tokens are the times of a step.
///
/// The floor of a step is the bytes that it must read once - the weights, and the KV of every sequence as long as it is
/// in the middle of the timed steps - over the read rate of the device.
///
/// # Errors
/// [`EvalError::BadOption`]; [`EvalError::NotANumber`]; [`EvalError::Disagreement`] when sequences with the same prompt
/// begin differently; those of the engine and of reading data.
pub fn bench_batch_decode(
    engine: &Engine,
    peers: &DecodePeers,
    options: &BatchDecodeOptions,
    progress: &mut dyn FnMut(&Progress),
) -> Result<SpeedReport> {
    options.check()?;
    options.check_context(engine.max_context())?;
    let rounds = options.lengths.len() * options.batches.len() * options.strategies.len() * options.repeats;
    let tokens = options.lengths.iter().sum::<usize>() * options.batches.iter().sum::<usize>();
    let mut cases = Vec::new();
    for &length in &options.lengths {
        for &batch in &options.batches {
            for &strategy in &options.strategies {
                cases.push(Case { engine, options, length, batch, strategy });
            }
        }
    }
    let mut meter = Meter::new(rounds, (tokens * options.strategies.len() * options.repeats) as f64, progress);
    let run = RunInfo::start(&options.output);
    let mut records = Vec::new();
    for case in &cases {
        let measured = case.measure(&mut meter)?;
        let info = run.clone().with_config(case.config(&measured, peers));
        let peers = peers.of(case.length, case.batch);
        records.extend(figures(&info, &case.name(), &measured, case.batch, peers));
    }
    run.write(&records)?;
    Ok(SpeedReport { records })
}

struct Case<'a> {
    engine: &'a Engine,
    options: &'a BatchDecodeOptions,
    length: usize,
    batch: usize,
    strategy: Strategy,
}

/// What a case has measured.
struct Measured {
    /// Seconds of the steps, all rounds together.
    steps: Vec<f64>,
    prompt_tokens: usize,
    /// KV tokens over all sequences in the middle of the timed steps; the mean of the rounds.
    kv_tokens: f64,
    floor_bytes: f64,
    rate: ReadRate,
}

impl Case<'_> {
    fn name(&self) -> String {
        let Case { options, length, batch, strategy, .. } = self;
        let (length, sampling) = (options.name_of(*length), options.sampling_name());
        format!("{}/{length}/b{batch}/{strategy}{sampling}", options.model_label)
    }

    fn measure(&self, meter: &mut Meter<'_>) -> Result<Measured> {
        let answer = self.options.answer_tokens(self.length, self.batch);
        let prompt_tokens = self.options.prompt_tokens(self.length, self.batch, self.engine.max_context())?;
        let prompts = self.prompts(prompt_tokens)?;
        let (mut steps, mut kv_tokens) = (Vec::new(), 0.0);
        for _ in 0..self.options.repeats {
            let (gaps, kv) = self.round(&prompts, answer)?;
            let ms = median(&gaps) * 1e3;
            meter.advance(1, (self.length * self.batch) as f64, format!("{}: {ms:.2} ms a token", self.name()));
            steps.extend(gaps);
            kv_tokens += kv / self.options.repeats as f64;
        }
        let bytes = self.engine.weight_bytes_per_step() as f64 + kv_tokens * self.token_bytes();
        let rate = device_read_rate(self.engine, bytes as u64, self.options.repeats)?;
        Ok(Measured { steps, prompt_tokens, kv_tokens, floor_bytes: bytes, rate })
    }

    /// Bytes of KV of one token.
    fn token_bytes(&self) -> f64 {
        let shape = self.engine.kv_shape();
        (2 * shape.layers * shape.kv_heads * shape.head_dim * shape.dtype.size()) as f64
    }

    fn prompts(&self, tokens: usize) -> Result<Vec<Vec<u32>>> {
        Ok(match &self.options.prompt {
            PromptSource::Random { seed } => {
                let vocab = self.engine.spec().vocab;
                (0..self.batch as u64).map(|place| random::tokens(seed.wrapping_add(place), tokens, vocab)).collect()
            }
            PromptSource::Text(text) => vec![prompt(self.engine, text, tokens)?.tokens(); self.batch],
        })
    }

    /// The gaps between tokens in seconds, and the KV tokens of all sequences in the middle of them.
    fn round(&self, prompts: &[Vec<u32>], answer: usize) -> Result<(Vec<f64>, f64)> {
        let mut streams = Streams::new();
        for tokens in prompts {
            let mut request = Request::new(Prompt::plain(tokens.clone()), answer);
            request.ignore_eos = true;
            request.sampling = self.options.sampling.clone();
            request.attention.strategy = self.strategy;
            streams.submit(self.engine, request)?;
        }
        streams.take_until(None, |tracks| begun(tracks) || tracks.iter().any(Track::ended))?;
        let last = last_begun(&streams.tracks);
        let wanted = WARM_UP + self.options.tokens + 1;
        streams.take_until(None, |tracks| tracks[last].tokens.len() >= wanted || tracks.iter().any(Track::ended))?;
        // Cancelled requests leave before the next round begins.
        let Streams { tracks, .. } = streams;
        let times = &tracks[last].tokens;
        if times.len() < wanted {
            let found = format!("{answer} tokens, which a sequence had written before the timed steps were over");
            let expected = "a prefill chunk that the scheduler uses while sequences decode: set --prefill-chunk".into();
            return Err(EvalError::BadOption { what: "the answer's length", found, expected });
        }
        if matches!(self.options.prompt, PromptSource::Text(_)) {
            same_beginning(&tracks)?;
        }
        let middle = times[WARM_UP + self.options.tokens / 2];
        let written = tracks.iter().map(|track| track.tokens.iter().filter(|at| **at <= middle).count());
        let kv = prompts.iter().map(Vec::len).sum::<usize>() + written.sum::<usize>();
        let gaps = tracks[last].gaps(times[WARM_UP], times[wanted - 1]).collect();
        Ok((gaps, kv as f64))
    }

    fn config(&self, measured: &Measured, peers: &DecodePeers) -> Value {
        let options = self.options;
        let prompt = match &options.prompt {
            PromptSource::Random { seed } => format!("random tokens, seed {seed}"),
            PromptSource::Text(text) => text.to_string(),
        };
        let mut config = json!({
            "batch": self.batch, "prompt_tokens": measured.prompt_tokens, "prompt": prompt, "strategy": self.strategy,
            "temperature": options.sampling.temperature, "top_k": options.sampling.top_k, "top_p": options.sampling.top_p,
            "timed_steps": options.tokens, "rounds": options.repeats, "prefill_chunk": options.prefill_chunk, "step_tokens": options.step_tokens,
            "mixed_prefill_tokens": options.mixed_prefill_tokens,
            "kv": format!("{:?}", self.engine.kv_shape().dtype).to_lowercase(),
            "kv_tokens_mid": measured.kv_tokens.round(), "floor_bytes": measured.floor_bytes.round(),
            "read_gb_s": round(measured.rate.gb_s), "read_rate": measured.rate.measured, "threads": self.engine.threads(),
        });
        if let (Some(version), Value::Object(config)) = (&peers.version, &mut config) {
            config.insert("peer".into(), version.clone().into());
            let settings = "bf16, sdpa, random weights and cache of the same length, greedy; same run, before ours";
            config.insert("peer_settings".into(), settings.into());
            if !peers.errors.is_empty() {
                config.insert("peer_errors".into(), peers.errors.clone().into());
            }
        }
        config
    }
}

fn begun(tracks: &[Track]) -> bool {
    tracks.iter().all(|track| !track.tokens.is_empty())
}

fn last_begun(tracks: &[Track]) -> usize {
    (0..tracks.len()).max_by_key(|&place| tracks[place].tokens.first().copied()).unwrap_or(0)
}

/// Sequences with one prompt begin with one token.
fn same_beginning(tracks: &[Track]) -> Result<()> {
    let mut ids = tracks.iter().filter_map(|track| track.first_id);
    let Some(first) = ids.next() else { return Ok(()) };
    match ids.find(|id| *id != first) {
        None => Ok(()),
        Some(other) => Err(EvalError::UnlikeRows { first, other }),
    }
}

fn figures(
    info: &RunInfo,
    case: &str,
    measured: &Measured,
    batch: usize,
    peers: impl Iterator<Item = (&'static str, f64)>,
) -> Vec<Record> {
    let (ms, samples) = (median(&measured.steps) * 1e3, measured.steps.len());
    let floor = measured.floor_bytes / measured.rate.gb_s / 1e6;
    let peers: Vec<(&str, f64)> = peers.collect();
    let record = |metric, unit, value: f64, floor: Option<f64>, figure: Option<&dyn Fn(f64) -> f64>| {
        let mut record = info.record("decode", case, metric, unit, round(value), samples);
        record.floor = floor.map(round);
        if let Some(figure) = figure {
            record.peers = peers.iter().map(|(name, ms)| ((*name).to_owned(), round(figure(*ms)))).collect();
        }
        record
    };
    let rate = |ms: f64| batch as f64 * 1e3 / ms;
    let mut records = vec![
        record("ms_per_token", "ms", ms, Some(floor), Some(&|ms| ms)),
        record("ms_per_token_p99", "ms", percentile(&measured.steps, 0.99) * 1e3, None, None),
        record("tokens_per_second", "tokens/s", rate(ms), Some(rate(floor)), Some(&rate)),
        record("floor_share", "ratio", floor / ms, None, Some(&|ms| floor / ms)),
        record("achieved_bandwidth", "GB/s", measured.floor_bytes / ms / 1e6, None, None),
        record("read_bandwidth", "GB/s", measured.rate.gb_s, None, None),
    ];
    if let Some(best) = peers.iter().map(|(_, ms)| *ms).min_by(f64::total_cmp) {
        records.push(record("ratio_to_transformers", "ratio", best / ms, None, Some(&|peer| peer / ms)));
    }
    records
}

#[cfg(test)]
#[path = "batch_decode/tests.rs"]
mod tests;
