//! Speed, measured side by side with what else could do the work.

mod attention;
mod attention_sums;
mod batch_decode;
mod blend;
mod checkpoint;
mod decode;
mod gpu_peer;
mod index;
mod ingest;
mod membw;
mod mixed;
mod peer;
mod prefill;
mod prompt;
mod random;
mod rate;
mod scattered;
mod store;
mod streams;
mod ttft;

use std::path::PathBuf;

use engine::{Engine, Strategy};
use serde::Serialize;
use serde_json::{Value, json};

use crate::error::{EvalError, Result};
use crate::record::{Output, Record};
use crate::report::records_table;
use crate::stats::median;
use crate::tasks::DataSource;

pub use attention::{AttentionOptions, AttentionShape, DeviceAttention, bench_attention_decode};
pub use attention_sums::{AttentionSumsOptions, bench_attention_sums};
pub use batch_decode::{BatchDecodeOptions, DecodePeers, PromptSource, bench_batch_decode, time_decode_peers};
pub use blend::{BlendBenchOptions, BlendReport, SourceProvider, bench_blend};
pub use checkpoint::{CheckpointOptions, CheckpointReport, CheckpointShape, write_checkpoint};
pub use decode::bench_decode;
pub use gpu_peer::GpuPeerOptions;
pub use index::{HeadOptions, IndexBenchOptions, IndexData, bench_index};
pub use ingest::bench_ingest_load;
pub use membw::{MembwOptions, MembwReport, bench_membw};
pub use mixed::{MixedLoadOptions, bench_mixed_load};
pub use prefill::bench_prefill;
pub use scattered::{Scattered, ScatteredOptions, bench_scattered};
pub use store::{StoreBenchOptions, StoreBenchReport, bench_store, drop_page_cache};
pub use ttft::{ChunkPlace, TtftOptions, bench_ttft};

/// The program that is measured beside this one: Hugging Face transformers on PyTorch, on the CPU.
#[derive(Debug, Clone)]
pub struct PeerOptions {
    /// A Python interpreter that imports torch and transformers.
    pub python: PathBuf,
    /// The folder of the model; the same that the engine loaded.
    pub model_dir: PathBuf,
    /// Without it, only this program is measured, and no ratio is recorded.
    pub enabled: bool,
}

impl Default for PeerOptions {
    fn default() -> Self {
        PeerOptions { python: "python3".into(), model_dir: PathBuf::new(), enabled: true }
    }
}

/// What [`bench_prefill`] and [`bench_decode`] measure, and how often.
#[derive(Debug, Clone)]
pub struct SpeedOptions {
    /// Tokens of the prompts.
    pub lengths: Vec<usize>,
    /// Timed rounds; one more warms up and is checked.
    pub repeats: usize,
    /// Tokens that are decoded in a round; at least 2.
    pub decode_tokens: usize,
    /// How decoding attends. The peer is measured beside `full` only.
    pub strategies: Vec<Strategy>,
    /// Where the text of the prompts comes from.
    pub text: DataSource,
    /// The model's name in the cases of records.
    pub model_label: String,
    /// The other side.
    pub peer: PeerOptions,
    /// Where records go.
    pub output: Output,
}

impl Default for SpeedOptions {
    fn default() -> Self {
        SpeedOptions {
            lengths: vec![2048, 8192],
            repeats: 5,
            decode_tokens: 64,
            strategies: vec![Strategy::Full],
            text: DataSource::Generated,
            model_label: "ref".into(),
            peer: PeerOptions::default(),
            output: Output::default(),
        }
    }
}

impl SpeedOptions {
    fn check(&self) -> Result<()> {
        let least = |what, found: usize, least: usize| {
            let expected = format!("at least {least}");
            if found < least { Err(EvalError::BadOption { what, found: found.to_string(), expected }) } else { Ok(()) }
        };
        least("the number of rounds", self.repeats, 1)?;
        least("the number of decoded tokens", self.decode_tokens, 2)?;
        least("the number of lengths", self.lengths.len(), 1)
    }

    /// What records say of the settings; `more` is merged in.
    fn config(&self, engine: &Engine, more: Value) -> Value {
        let mut config = json!({
            "threads": engine.threads(), "isa": format!("{:?}", engine.isa()).to_lowercase(), "repeats": self.repeats,
            "kv": format!("{:?}", engine.kv_shape().dtype).to_lowercase(), "text": self.text.to_string(),
        });
        if let (Value::Object(config), Value::Object(more)) = (&mut config, more) {
            config.extend(more);
        }
        config
    }
}

/// Figures of one bench.
#[derive(Debug, Clone, Serialize)]
pub struct SpeedReport {
    /// All of them as records.
    pub records: Vec<Record>,
}

impl SpeedReport {
    /// As Markdown.
    #[must_use]
    pub fn table(&self) -> String {
        records_table(&self.records)
    }
}

/// Where the engine computes, as records' cases name it.
fn place(engine: &Engine) -> &'static str {
    if engine.gpu().is_some() { "gpu" } else { "cpu" }
}

/// `2k` for 2048.
fn length_name(tokens: usize) -> String {
    if tokens.is_multiple_of(1024) { format!("{}k", tokens / 1024) } else { tokens.to_string() }
}

/// Seconds of one side of a comparison, one for each round.
struct Side {
    name: String,
    seconds: Vec<f64>,
}

impl Side {
    fn new(name: impl Into<String>) -> Side {
        Side { name: name.into(), seconds: Vec::new() }
    }

    fn median_ms(&self) -> f64 {
        median(&self.seconds) * 1e3
    }
}

/// The record of a time in ms with that of the peers beside it.
fn with_peers(mut record: Record, peers: &[Side], figure: impl Fn(f64) -> f64) -> Record {
    record.peers = peers.iter().map(|side| (side.name.clone(), round(figure(side.median_ms())))).collect();
    record.value = round(record.value);
    record
}

/// The fastest of the peers, in ms; `None` without peers.
fn fastest_ms(peers: &[Side]) -> Option<f64> {
    peers.iter().map(Side::median_ms).min_by(f64::total_cmp)
}

/// Five digits: more is noise.
pub(crate) fn round(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let scale = 10_f64.powi(4 - value.abs().log10().floor() as i32);
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_rounding() {
        assert_eq!(
            (length_name(2048).as_str(), length_name(8192).as_str(), length_name(1000).as_str()),
            ("2k", "8k", "1000")
        );
        assert_eq!([round(123_456.7), round(0.012_345_67), round(0.0), round(-1.0)], [123_460.0, 0.012_346, 0.0, -1.0]);
    }

    #[test]
    fn the_fastest_peer_is_that_of_the_least_median() {
        let side = |name: &str, seconds: &[f64]| Side { name: name.into(), seconds: seconds.to_vec() };
        let peers = [side("f32", &[0.3, 0.1, 0.2]), side("bf16", &[0.9, 0.01, 0.9])];
        assert!(fastest_ms(&peers).is_some_and(|ms| (ms - 200.0).abs() < 1e-9));
        assert_eq!(fastest_ms(&[]), None);
    }

    #[test]
    fn senseless_options_are_refused() {
        for options in [
            SpeedOptions { repeats: 0, ..SpeedOptions::default() },
            SpeedOptions { decode_tokens: 1, ..SpeedOptions::default() },
            SpeedOptions { lengths: vec![], ..SpeedOptions::default() },
        ] {
            assert!(options.check().is_err());
        }
    }
}
