//! The start bench: from starting `quire serve` to the moment that it takes requests.

use std::path::Path;
use std::time::Duration;

use eval::{Output, Record, RunInfo, median};
use serde::Serialize;
use serde_json::json;

use super::child::Server;
use super::dispatch::ScratchDir;
use crate::error::Result;
use settings::Settings;

/// What the bench does.
#[derive(Clone, Debug)]
pub(super) struct StartOptions {
    /// Timed starts; one more before them warms the page cache.
    pub(super) repeats: usize,
    /// Longest time that a start may take.
    pub(super) limit: Duration,
    /// First part of the records' case.
    pub(super) label: String,
    /// Where records go.
    pub(super) output: Output,
}

/// Figures of the bench.
#[derive(Clone, Debug, Serialize)]
pub(super) struct StartReport {
    /// All of them as records.
    pub(super) records: Vec<Record>,
}

impl StartReport {
    /// For people.
    pub(super) fn table(&self) -> String {
        let lines =
            self.records.iter().map(|r| format!("| {} | {} | {:.3} | {} |", r.case, r.metric, r.value, r.samples));
        let lines: Vec<String> = lines.collect();
        format!("| case | metric | s | samples |\n|---|---|---|---|\n{}", lines.join("\n"))
    }
}

/// One start, in seconds from the start of the process.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Start {
    /// The port is open; the model begins to be loaded.
    listening: f64,
    /// `/readyz` says 200.
    ready: f64,
}

/// Starts `program serve` with these settings, on a free port and with a data folder of its own, again and again.
///
/// # Errors
/// A server that ends or does not become ready in time; what keeps records from being written.
pub(super) fn start_bench(
    settings: &Settings,
    program: &Path,
    options: &StartOptions,
    news: &mut dyn FnMut(&str),
) -> Result<StartReport> {
    let model = settings.model_dir()?;
    let config = json!({
        "model": model.display().to_string(), "weight_bytes": weight_bytes(&model), "repeats": options.repeats,
        "measured": "from starting the process to 200 from /readyz; page cache warmed by a start before",
        "max_sequences": settings.max_sequences, "threads": settings.threads,
    });
    let info = RunInfo::start(&options.output).with_config(config);
    let mut starts = Vec::new();
    for round in 0..=options.repeats {
        let scratch = ScratchDir::new(&settings.data_dir, "bench-start")?;
        let start = one_start(settings, program, scratch.path(), options.limit)?;
        let state = if round == 0 { "warm-up" } else { "timed" };
        news(&format!("start {round}: {state}, ready after {:.3} s", start.ready));
        if round > 0 {
            starts.push(start);
        }
    }
    let records = figures(&info, &format!("{}/warm", options.label), &starts);
    info.write(&records)?;
    Ok(StartReport { records })
}

/// Bytes of the files of weights.
fn weight_bytes(model: &Path) -> u64 {
    let listed = std::fs::read_dir(model).into_iter().flatten().flatten();
    let weights = listed.filter(|entry| entry.path().extension().is_some_and(|x| x == "safetensors"));
    weights.filter_map(|entry| std::fs::metadata(entry.path()).ok()).map(|file| file.len()).sum()
}

fn figures(info: &RunInfo, case: &str, starts: &[Start]) -> Vec<Record> {
    let figure = |metric, of: &dyn Fn(&Start) -> f64| {
        let seconds: Vec<f64> = starts.iter().map(of).collect();
        info.record("start", case, metric, "s", (median(&seconds) * 1e4).round() / 1e4, seconds.len())
    };
    vec![
        figure("seconds", &|start| start.ready),
        figure("seconds_to_listening", &|start| start.listening),
        figure("seconds_loading", &|start| start.ready - start.listening),
    ]
}

fn one_start(settings: &Settings, program: &Path, data_dir: &Path, limit: Duration) -> Result<Start> {
    let mut server = Server::start(settings, program, data_dir, limit)?;
    let listening = server.seconds();
    server.wait_ready()?;
    let ready = server.seconds();
    server.stop()?;
    Ok(Start { listening, ready })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn seconds_are_medians_and_loading_is_what_comes_after_listening() {
        let info = RunInfo::start(&Output { results_dir: None, ..Output::default() });
        let start = |listening, ready| Start { listening, ready };
        let records = figures(&info, "8b/warm", &[start(0.5, 3.0), start(0.25, 9.0), start(0.25, 2.25)]);
        let values: Vec<(&str, f64)> = records.iter().map(|r| (r.metric.as_str(), r.value)).collect();
        assert_eq!(values, [("seconds", 3.0), ("seconds_to_listening", 0.25), ("seconds_loading", 2.5)]);
        assert!(records.iter().all(|r| r.bench == "start" && r.case == "8b/warm" && r.samples == 3));
    }

    #[test]
    fn a_program_that_ends_at_once_is_an_error() {
        let settings = Settings { model: Some("/models/one".into()), ..Settings::default() };
        let error = one_start(&settings, Path::new("true"), Path::new("/tmp"), Duration::from_secs(5)).unwrap_err();
        assert!(error.to_string().contains("ended before it was ready"), "{error}");
    }
}
