//! Answers to the tasks' questions under every way of serving a context.

mod config;
mod report;
mod run;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use engine::Engine;
use serde::Serialize;
use serde_json::json;

use crate::error::{EvalError, Result};
use crate::progress::{Meter, Progress};
use crate::record::{Output, RunInfo};
use crate::tasks::{
    Context, DataSource, GENERATED_TASKS, GenerateOptions, Size, check_names, generate, load_files, reference_outputs,
    task_names,
};

pub use config::config_names;
pub use report::{Agreement, Cell, Cost, QualityReport};

/// What [`run_quality`] asks, and how.
#[derive(Debug, Clone)]
pub struct QualityOptions {
    /// Where contexts and questions come from.
    pub data: DataSource,
    /// Names of tasks; empty: all there are.
    pub tasks: Vec<String>,
    /// Lengths in tokens; empty: all up to `max_length` (generated: 1024 and 4096). Contexts measured in passages
    /// instead are asked only when this is empty.
    pub lengths: Vec<usize>,
    /// Names of [`config_names`]; empty: all but `retrieval-hnsw`.
    pub configs: Vec<String>,
    /// Questions at most for each task and length.
    pub limit: Option<usize>,
    /// Longest context in tokens.
    pub max_length: usize,
    /// Generated contexts for each task and length.
    pub samples: usize,
    /// Of the generator.
    pub seed: u64,
    /// Cold keys that each query head attends under `retrieval-*`.
    pub k: usize,
    /// First tokens always attended under `window` and `retrieval-*`.
    pub sinks: usize,
    /// Recent tokens always attended under `window` and `retrieval-*`.
    pub window: usize,
    /// Candidates of a graph search.
    pub ef: usize,
    /// Every answer goes here, one JSON object a line.
    pub answers: Option<PathBuf>,
    /// Where records go.
    pub output: Output,
}

impl Default for QualityOptions {
    fn default() -> Self {
        QualityOptions {
            data: DataSource::Generated,
            tasks: Vec::new(),
            lengths: Vec::new(),
            configs: Vec::new(),
            limit: None,
            max_length: 8192,
            samples: 20,
            seed: 1,
            k: 128,
            sinks: 4,
            window: 512,
            ef: 256,
            answers: None,
            output: Output::default(),
        }
    }
}

/// One judged answer.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Judged {
    pub(crate) id: String,
    pub(crate) question_index: usize,
    pub(crate) task: String,
    pub(crate) size: String,
    #[serde(skip)]
    pub(crate) order: Size,
    pub(crate) config: &'static str,
    pub(crate) output: String,
    pub(crate) answers: Vec<String>,
    pub(crate) exact: bool,
    pub(crate) part: f64,
}

/// Asks every chosen question under every chosen configuration, one request a question. The KV of a context is made once for each
/// way of making it, the KV of a chunk once.
///
/// # Errors
/// [`EvalError::UnknownName`] for tasks and configurations; those of reading data; those of the engine;
/// [`EvalError::NothingToDo`].
pub fn run_quality(
    engine: &Engine,
    options: &QualityOptions,
    progress: &mut dyn FnMut(&Progress),
) -> Result<QualityReport> {
    check_names("task", &options.tasks, task_names())?;
    check_names("configuration", &options.configs, &config_names())?;
    let contexts = contexts(engine, options)?;
    let wanted = match &options.data {
        DataSource::Files(path) => reference_outputs(path)?,
        DataSource::Generated => BTreeMap::new(),
    };
    let configs = config::chosen(options);
    let info = RunInfo::start(&options.output).with_config(json!({
        "data": options.data.to_string(), "seed": options.seed, "k": options.k, "sinks": options.sinks,
        "window": options.window, "ef": options.ef, "threads": engine.threads(),
        "kv": format!("{:?}", engine.kv_shape().dtype).to_lowercase(), "limit": options.limit,
    }));
    let mut sink = Sink::open(options.answers.clone())?;
    let questions: usize = contexts.iter().map(|context| context.questions.len()).sum();
    let cost = run::cost(&contexts, &configs);
    let mut meter = Meter::new(questions * configs.len(), cost, progress);
    meter.say(format!("{questions} questions over {} contexts, {} configurations", contexts.len(), configs.len()));
    let (judged, costs) = run::run(engine, &contexts, &configs, &mut meter, &mut |answer| sink.write(answer))?;
    let report = QualityReport::new(&options.data, &judged, costs, &wanted, &info);
    info.write(&report.records)?;
    Ok(report)
}

/// The contexts that the options choose, with the questions they choose.
fn contexts(engine: &Engine, options: &QualityOptions) -> Result<Vec<Context>> {
    let all = match &options.data {
        DataSource::Files(path) => load_files(path, options.max_length)?,
        DataSource::Generated => {
            let count = |text: &str| engine.tokenizer().encode_plain(text).map_or(text.len(), |ids| ids.len());
            let lengths = if options.lengths.is_empty() { vec![1024, 4096] } else { options.lengths.clone() };
            let lengths = lengths.into_iter().filter(|length| *length <= options.max_length).collect();
            let known = |task: &&String| GENERATED_TASKS.contains(&task.as_str());
            let tasks: Vec<String> = options.tasks.iter().filter(known).cloned().collect();
            if tasks.is_empty() && !options.tasks.is_empty() {
                check_names("generated task", &options.tasks, &GENERATED_TASKS)?;
            }
            generate(&GenerateOptions { tasks, lengths, samples: options.samples, seed: options.seed }, &count)?
        }
    };
    let found = all.len();
    let chosen = choose(all, options);
    if chosen.is_empty() {
        return Err(EvalError::NothingToDo(format!("{found} contexts of {} were read", options.data)));
    }
    Ok(chosen)
}

/// Keeps the questions of the chosen tasks and lengths, up to the limit of each cell.
fn choose(contexts: Vec<Context>, options: &QualityOptions) -> Vec<Context> {
    let mut counts: HashMap<(String, Size), usize> = HashMap::new();
    let mut chosen = Vec::new();
    for mut context in contexts {
        let size = context.size;
        let fits = match size {
            Size::Tokens(tokens) => options.lengths.is_empty() || options.lengths.contains(&tokens),
            Size::Passages(_) => options.lengths.is_empty(),
        };
        if !fits {
            continue;
        }
        context.questions.retain(|question| {
            let wanted = options.tasks.is_empty() || options.tasks.contains(&question.task);
            let count = counts.entry((question.task.clone(), size)).or_default();
            let asked = wanted && options.limit.is_none_or(|limit| *count < limit);
            *count += usize::from(asked);
            asked
        });
        if !context.questions.is_empty() {
            chosen.push(context);
        }
    }
    chosen
}

/// The file of answers, if one is wanted.
struct Sink(Option<(PathBuf, File)>);

impl Sink {
    fn open(path: Option<PathBuf>) -> Result<Sink> {
        let Some(path) = path else {
            return Ok(Sink(None));
        };
        let file = File::create(&path).map_err(EvalError::io("create", &path))?;
        Ok(Sink(Some((path, file))))
    }

    fn write(&mut self, answer: &Judged) -> Result<()> {
        let Some((path, file)) = &mut self.0 else {
            return Ok(());
        };
        let line = serde_json::to_string(answer).unwrap_or_default();
        writeln!(file, "{line}").map_err(EvalError::io("write", path.as_path()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::Question;

    fn context(id: &str, size: Size, tasks: &[&str]) -> Context {
        let question = |(index, task): (usize, &&str)| Question {
            task: (*task).into(),
            text: "?".into(),
            answers: vec!["!".into()],
            index,
        };
        let questions = tasks.iter().enumerate().map(question).collect();
        Context { id: id.into(), size, chunks: vec!["text".into()], questions }
    }

    #[test]
    fn filters_keep_the_numbers_of_questions_and_drop_empty_contexts() {
        let all = || {
            vec![
                context("a", Size::Tokens(1024), &["kv", "vt", "kv", "kv"]),
                context("b", Size::Tokens(4096), &["kv"]),
                context("c", Size::Passages(5), &["squad"]),
            ]
        };
        let asked = |options: QualityOptions| -> Vec<(String, Vec<usize>)> {
            let chosen = choose(all(), &options);
            chosen.into_iter().map(|c| (c.id, c.questions.iter().map(|q| q.index).collect())).collect()
        };
        let tasks = vec!["kv".to_owned()];
        let some = asked(QualityOptions { tasks, limit: Some(2), ..QualityOptions::default() });
        assert_eq!(some, [("a".into(), vec![0, 2]), ("b".into(), vec![0])]);
        let long = asked(QualityOptions { lengths: vec![4096], ..QualityOptions::default() });
        assert_eq!(long, [("b".into(), vec![0])]);
        assert_eq!(asked(QualityOptions::default()).len(), 3);
    }
}
