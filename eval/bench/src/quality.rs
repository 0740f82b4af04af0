//! `quire-bench eval`: the quality tasks, from the command line to their options.

use std::path::PathBuf;

use engine::{Engine, EngineConfig};
use eval::{Output, Progress, QualityOptions, run_quality};
use indicatif::ProgressBar;

use super::args::RecordArgs;
use crate::error::Result;
use quire::cli::Out;
use quire::cli::safe;
use settings::{QuireError, Settings};

/// What of quality is measured.
#[derive(Debug, clap::Args)]
pub(crate) struct EvalArgs {
    /// Questions: `generated`, or a file or folder of JSON lines
    #[arg(long, default_value = "generated")]
    pub(crate) data: String,
    /// Tasks, separated by commas [default: all]
    #[arg(long, value_delimiter = ',')]
    pub(crate) tasks: Vec<String>,
    /// Context lengths in tokens, separated by commas [default: all up to --max-length]
    #[arg(long, value_delimiter = ',')]
    pub(crate) lengths: Vec<usize>,
    /// Configurations, separated by commas [default: all]
    #[arg(long, value_delimiter = ',')]
    pub(crate) configs: Vec<String>,
    /// Questions of a task and length at most
    #[arg(long)]
    pub(crate) limit: Option<usize>,
    /// Longest context
    #[arg(long, default_value_t = 8192)]
    pub(crate) max_length: usize,
    /// Generated contexts of a task and length
    #[arg(long, default_value_t = 20)]
    pub(crate) samples: usize,
    /// Seed of generated questions
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Write all answers to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) answers: Option<PathBuf>,
    /// Records.
    #[command(flatten)]
    pub(crate) records: RecordArgs,
}

pub(super) fn run(settings: &Settings, args: EvalArgs, out: &Out) -> Result<()> {
    let defaults = QualityOptions::default();
    let options = QualityOptions {
        data: data_source(&args.data)?,
        tasks: args.tasks,
        lengths: args.lengths,
        configs: args.configs,
        limit: args.limit,
        max_length: args.max_length,
        samples: args.samples,
        seed: args.seed.unwrap_or(defaults.seed),
        k: settings.k,
        sinks: settings.sinks,
        window: settings.window,
        ef: settings.ef,
        answers: args.answers,
        output: output(&args.records)?,
    };
    // What is measured is the index, not how soon it is ready.
    let engine = Engine::load(EngineConfig { wait_for_index: true, ..settings.engine()? })?;
    let report = with_progress(out, |progress| Ok(run_quality(&engine, &options, progress)?))?;
    engine.shutdown();
    if out.json {
        out.value(&report);
    } else {
        out.line(report.table());
    }
    Ok(())
}

/// `generated`, or a path.
pub(super) fn data_source(text: &str) -> Result<eval::DataSource> {
    let refuse = |e| QuireError::InvalidParameter { param: "--data".into(), problem: format!("{e}") };
    Ok(text.parse().map_err(refuse)?)
}

/// Where records go, and which command they name as theirs.
pub(super) fn output(args: &RecordArgs) -> Result<Output> {
    let command = std::env::args().skip(1).map(quoted);
    let command = std::iter::once("quire-bench".to_string()).chain(command).collect::<Vec<_>>().join(" ");
    let mut output =
        Output { command, commit: args.commit.clone(), machine: args.machine.clone(), ..Output::default() };
    if args.no_records {
        output.results_dir = None;
    } else if let Some(dir) = &args.results {
        output.results_dir = Some(dir.clone());
    }
    output.prepare()?;
    Ok(output)
}

fn quoted(word: String) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word } else { format!("'{}'", word.replace('\'', "'\\''")) }
}

/// Runs something long: news go to a bar on a terminal, else to stderr line by line.
pub(super) fn with_progress<T>(out: &Out, work: impl FnOnce(&mut dyn FnMut(&Progress)) -> Result<T>) -> Result<T> {
    let bar: Option<ProgressBar> = out.bar();
    let result = work(&mut |news| match &bar {
        Some(bar) => {
            bar.set_length(news.total as u64);
            bar.set_position(news.done as u64);
            bar.set_message(safe(&news.message).into_owned());
        }
        None => out.note(&news.to_string()),
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    result
}
