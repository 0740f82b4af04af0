//! Attention of rows that lie scattered over a context, in one layer: what it costs beside the same share of a whole prompt's.

use serde_json::json;

use super::{SpeedReport, length_name, round};
use crate::error::{EvalError, Result};
use crate::record::{Output, RunInfo};
use crate::stats::median;

/// What a device says of its attention of scattered rows.
#[derive(Debug, Clone)]
pub struct Scattered {
    /// Its name.
    pub device: String,
    /// Seconds of each call of the scattered rows.
    pub scattered: Vec<f64>,
    /// Seconds of each call of all rows.
    pub causal: Vec<f64>,
    /// (Query, key) pairs of the scattered rows over those of all.
    pub share: f64,
}

/// What [`bench_scattered`] measures.
#[derive(Debug, Clone)]
pub struct ScatteredOptions {
    /// Tokens of the context.
    pub tokens: usize,
    /// Rows that are attended for, in percent of them.
    pub percent: u32,
    /// Timed calls.
    pub repeats: usize,
    /// The model's name in the cases of records.
    pub model_label: String,
    /// Where records go.
    pub output: Output,
}

/// Measures scattered attention. `measure`: tokens, share of the rows, calls.
///
/// # Errors
/// [`EvalError::BadOption`]; those of the device.
pub fn bench_scattered(
    options: &ScatteredOptions,
    measure: &mut dyn FnMut(usize, f64, usize) -> Result<Scattered>,
) -> Result<SpeedReport> {
    if options.tokens == 0 || options.repeats == 0 || !(1..=100).contains(&options.percent) {
        let found = format!("{} tokens, {} percent, {} calls", options.tokens, options.percent, options.repeats);
        let expected = "at least 1 token and 1 call, 1 to 100 percent".into();
        return Err(EvalError::BadOption { what: "scattered attention", found, expected });
    }
    let found = measure(options.tokens, f64::from(options.percent) / 100.0, options.repeats)?;
    let info = RunInfo::start(&options.output).with_config(json!({
        "device": found.device, "heads": 32, "kv_heads": 8, "head_dim": 128, "kv": "bf16, random", "activations": "bf16",
        "positions": "drawn at random", "share_of_pairs": found.share, "repeats": options.repeats,
    }));
    let case = format!("{}/{}/{}", options.model_label, length_name(options.tokens), options.percent);
    let (scattered, causal) = (median(&found.scattered), median(&found.causal));
    let record =
        |metric, unit, value| info.record("attention-scattered", &case, metric, unit, round(value), options.repeats);
    let records = vec![
        record("time_over_share", "ratio", scattered / (causal * found.share)),
        record("ms_scattered", "ms", scattered * 1e3),
        record("ms_causal", "ms", causal * 1e3),
    ];
    info.write(&records)?;
    Ok(SpeedReport { records })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_compared_with_the_share_of_pairs() {
        let options = |percent| ScatteredOptions {
            tokens: 32_768,
            percent,
            repeats: 3,
            model_label: "8b".into(),
            output: Output { results_dir: None, ..Output::default() },
        };
        let mut measure = |tokens: usize, share: f64, repeats: usize| {
            assert_eq!((tokens, share, repeats), (32_768, 0.1, 3));
            Ok(Scattered { device: "made up".into(), scattered: vec![0.003; 3], causal: vec![0.02; 3], share: 0.12 })
        };
        let report = bench_scattered(&options(10), &mut measure);
        let found = report.map(|report| (report.records[0].case.clone(), report.records[0].value));
        assert!(found.is_ok_and(|found| found == ("8b/32k/10".to_owned(), 1.25)));
        assert!(bench_scattered(&options(0), &mut measure).is_err());
    }
}
