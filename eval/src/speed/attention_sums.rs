//! What it costs to learn, while chunks are read, how much of their attention they keep to themselves.

use chunk_cache::Provenance;
use engine::Engine;
use serde_json::json;

use super::{SpeedReport, length_name, random, round};
use crate::error::{EvalError, Result};
use crate::progress::{Meter, Progress};
use crate::record::{Output, RunInfo};
use crate::stats::{mean, median};

/// What [`bench_attention_sums`] measures.
#[derive(Debug, Clone)]
pub struct AttentionSumsOptions {
    /// Tokens of the prompts.
    pub lengths: Vec<usize>,
    /// Tokens of a chunk.
    pub chunk_tokens: usize,
    /// Timed rounds; one more warms up.
    pub repeats: usize,
    /// First part of the records' case.
    pub model_label: String,
    /// Where records go.
    pub output: Output,
}

/// Reads prompts of random tokens with and without sums, alternately. Records the share of time that sums add, and the mean
/// cache context impact of the chunks behind others (Cache-Craft, arXiv 2502.15734).
///
/// # Errors
/// [`EvalError::BadOption`] for prompts of fewer than two chunks or no rounds, those of the engine and of writing records.
pub fn bench_attention_sums(
    engine: &Engine,
    options: &AttentionSumsOptions,
    progress: &mut dyn FnMut(&Progress),
) -> Result<SpeedReport> {
    let (chunk, repeats) = (options.chunk_tokens, options.repeats);
    let least = options.lengths.iter().copied().min().unwrap_or(0);
    if chunk == 0 || repeats == 0 || least < 2 * chunk {
        let found = format!("{least} tokens in chunks of {chunk}, {repeats} rounds");
        let expected = "at least two chunks of a token or more, and a round".to_owned();
        return Err(EvalError::BadOption { what: "the size of the measurement", found, expected });
    }
    let info = RunInfo::start(&options.output).with_config(json!({
        "chunk_tokens": chunk, "repeats": repeats, "device": engine.gpu(), "prompt": "random",
    }));
    let steps = options.lengths.len() * (repeats + 1);
    let mut meter = Meter::new(steps, steps as f64, progress);
    let mut records = Vec::new();
    for &length in &options.lengths {
        let tokens = random::tokens(1, length, engine.spec().vocab);
        let chunks: Vec<Vec<u32>> = tokens.chunks(chunk).map(<[u32]>::to_vec).collect();
        let (mut with, mut without, mut impact) = (Vec::new(), Vec::new(), 0.0);
        for turn in 0..=repeats {
            let summed = engine.chunk_attention(&[], &chunks)?;
            let plain = engine.chunk_attention(&tokens, &[])?;
            if turn > 0 {
                with.push(summed.seconds);
                without.push(plain.seconds);
            }
            impact = mean(&impacts(&summed.own));
            meter.advance(1, 1.0, format!("{length}: {:.1} and {:.1} ms", summed.seconds * 1e3, plain.seconds * 1e3));
        }
        let case = format!("{}/{}/attention-sums", options.model_label, length_name(length));
        let record = |metric: &str, unit, value| info.record("prefill", &case, metric, unit, round(value), repeats);
        records.push(record("extra_share", "ratio", median(&with) / median(&without) - 1.0));
        records.push(record("seconds", "s", median(&with)));
        records.push(record("seconds_without", "s", median(&without)));
        records.push(record("cache_context_impact", "ratio", impact));
    }
    info.write(&records)?;
    Ok(SpeedReport { records })
}

/// The cache context impact of every chunk but the first, from what each token keeps to its own chunk where nothing but chunks
/// stands before it.
fn impacts(own: &[Vec<f32>]) -> Vec<f64> {
    let mut before = 0;
    let mut impacts = Vec::new();
    for chunk in own {
        let intra: f64 = chunk.iter().map(|share| f64::from(*share)).sum();
        if before > 0 {
            let inter = chunk.len() as f64 - intra;
            impacts.push(f64::from(Provenance::impact_of(inter, before, intra, chunk.len())));
        }
        before += chunk.len();
    }
    impacts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impacts_are_of_the_chunks_behind_others() {
        let found = impacts(&[vec![1.0, 1.0], vec![0.5, 0.5], vec![1.0, 1.0, 1.0]]);
        let second = 1.0 / (1.0 + (-1.0f64).exp());
        assert_eq!(found.len(), 2);
        assert!((found[0] - second).abs() < 1e-6 && (found[1] - 0.5).abs() < 1e-6, "{found:?}");
    }
}
