//! `quire-bench eval`: the quality tasks, from the command line to their options.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use engine::{Engine, EngineConfig};
use eval::{MadeData, MakeOptions, Output, Progress, QualityOptions, make_data, run_quality, write_contexts};
use indicatif::ProgressBar;

use super::args::RecordArgs;
use crate::error::Result;
use quire::cli::safe;
use quire::cli::{Out, count};
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
    /// Configurations, separated by commas: full, default, reuse, cacheblend-15, ... [default: all but default]
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
    /// Keep all answers in this file, and go on behind those that are there
    #[arg(long, value_name = "FILE")]
    pub(crate) answers: Option<PathBuf>,
    /// End after so many seconds, behind a whole context
    #[arg(long, value_name = "SECONDS")]
    pub(crate) time_limit: Option<u64>,
    /// Record the comparison with `full` under this name, such as qwen15/xquad10, instead of tasks and lengths
    #[arg(long, value_name = "MODEL/DATA")]
    pub(crate) case: Option<String>,
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
        time_limit: args.time_limit.map(Duration::from_secs),
        case: args.case,
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

/// What questions are made, and of what.
#[derive(Debug, clap::Args)]
pub(crate) struct QuestionsArgs {
    /// xquad10, xquad10-small, musique10 or lists4k
    #[arg(value_name = "KIND")]
    pub(crate) data: MadeData,
    /// The published file: in SQuAD's format, or MuSiQue's list
    #[arg(long, value_name = "FILE")]
    pub(crate) from: PathBuf,
    /// Where the questions go, as JSON lines for `eval --data`
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// Questions of the file, counted from 0, with no passages but theirs [default: all]
    #[arg(long, value_name = "FROM..TO", value_parser = range)]
    pub(crate) questions: Option<Range<usize>>,
    /// Contexts of each task, of lists4k
    #[arg(long, default_value_t = 40)]
    pub(crate) samples: usize,
    /// Seed of all that is drawn
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
}

/// Makes questions over passages of published data.
pub(super) fn make_questions(args: QuestionsArgs, out: &Out) -> Result<()> {
    let QuestionsArgs { data, from, out: path, questions, samples, seed } = args;
    let contexts = make_data(&MakeOptions { data, from, questions, samples, seed })?;
    write_contexts(&path, &contexts)?;
    if out.json {
        out.value(&serde_json::json!({"questions": contexts.len(), "file": path}));
    } else {
        out.line(format!("{} in {}", count(contexts.len(), "question"), path.display()));
    }
    Ok(())
}

fn range(text: &str) -> std::result::Result<Range<usize>, String> {
    let ends = text.split_once("..").and_then(|(from, to)| Some(from.parse().ok()?..to.parse().ok()?));
    ends.ok_or_else(|| format!("expected FROM..TO, such as 590..1190, found `{text}`"))
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
