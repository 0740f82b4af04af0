//! Answers to the tasks' questions under every way of serving a context.

mod answers;
mod beside;
mod config;
mod paired;
mod report;
mod run;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use engine::{BlendConfig, Engine, GateReport};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{EvalError, Result};
use crate::progress::{Meter, Progress};
use crate::record::{Output, RunInfo};
use crate::tasks::{
    Context, DataSource, GENERATED_TASKS, GenerateOptions, Size, check_names, generate, load_files, reference_outputs,
    task_names,
};

use answers::Answers;
use beside::BesideFull;
pub use config::config_names;
pub(crate) use config::place as config_place;
pub use paired::Paired;
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
    /// As [`config_names`] says; empty: those of them that are neither slow nor there for comparisons of rules. Where `full` is one of
    /// them, all others are compared with it question by question.
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
    /// Every answer goes here at once, one JSON object a line, and answers that are there are taken from it: a run that was
    /// interrupted, or that asked fewer questions or configurations, is gone on with.
    pub answers: Option<PathBuf>,
    /// Ends behind the context during which this time has passed; the report is about what was asked.
    pub time_limit: Option<Duration>,
    /// `MODEL/DATA`: what records of a comparison with `full` are of, instead of records by task and length.
    pub case: Option<String>,
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
            time_limit: None,
            case: None,
            output: Output::default(),
        }
    }
}

/// One judged answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Judged {
    /// Of the question and its context.
    pub(crate) key: String,
    pub(crate) id: String,
    pub(crate) question_index: usize,
    pub(crate) task: String,
    #[serde(with = "size_text")]
    pub(crate) size: Size,
    pub(crate) config: String,
    /// What the configuration was: a name such as `default` may come to mean something else.
    pub(crate) blend: BlendConfig,
    pub(crate) output: String,
    pub(crate) answers: Vec<String>,
    pub(crate) exact: bool,
    pub(crate) part: f64,
    pub(crate) cost: AnswerCost,
    /// `None`: of `full`, or asked without it.
    pub(crate) beside: Option<BesideFull>,
}

/// What an answer took.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct AnswerCost {
    /// Whether the figures of the context are those of all its questions together.
    pub(crate) shared: bool,
    pub(crate) reused_tokens: usize,
    pub(crate) recomputed_tokens: usize,
    pub(crate) context_seconds: f64,
    pub(crate) failed_chunks: usize,
    pub(crate) charged_share: Option<f64>,
    /// Absent in answers from before there was a gate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) gate: Option<GateReport>,
    pub(crate) cold_keys: u64,
    pub(crate) keys_scored: u64,
    pub(crate) keys_attended: u64,
}

/// A size as tables show it.
mod size_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::tasks::Size;

    pub(super) fn serialize<S: Serializer>(size: &Size, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(size)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Size, D::Error> {
        let text = String::deserialize(from)?;
        let number = |text: &str| text.parse().map_err(D::Error::custom);
        Ok(match text.strip_suffix('p') {
            Some(count) => Size::Passages(number(count)?),
            None => Size::Tokens(number(&text)?),
        })
    }
}

/// Asks every chosen question under every chosen configuration, one request a question. The KV of a context is made once for each
/// way of making it that does not depend on the question, the KV of a chunk once. Where `full` is among the configurations, each of the
/// others is given the tokens of its answer and its distributions are compared; it answers itself where it would choose others.
///
/// # Errors
/// [`EvalError::UnknownName`] for tasks and configurations; [`EvalError::BadOption`] for a case without `full`; those of reading data
/// and of the file of answers; those of the engine; [`EvalError::NothingToDo`].
pub fn run_quality(
    engine: &Engine,
    options: &QualityOptions,
    progress: &mut dyn FnMut(&Progress),
) -> Result<QualityReport> {
    check_names("task", &options.tasks, task_names())?;
    let configs = config::chosen(options)?;
    if let Some(case) = options.case.as_ref().filter(|_| configs.len() < 2 || configs[0].name != config::FULL) {
        let (what, found) = ("the name of the records", format!("{case}, of a comparison with `full`"));
        let expected = "that only with `full` and another configuration".into();
        return Err(EvalError::BadOption { what, found, expected });
    }
    let contexts = contexts(engine, options)?;
    let wanted = match &options.data {
        DataSource::Files(path) => reference_outputs(path)?,
        DataSource::Generated => BTreeMap::new(),
    };
    let settings = json!({
        "k": options.k, "sinks": options.sinks, "window": options.window, "ef": options.ef,
        "kv": format!("{:?}", engine.kv_shape().dtype).to_lowercase(),
    });
    let mut answers = Answers::open(options.answers.as_deref(), &of_model(engine, &settings))?;
    let mut used = settings;
    used["data"] = options.data.to_string().into();
    used["seed"] = options.seed.into();
    used["limit"] = options.limit.into();
    if let Some(named) = config::described(&configs) {
        used["named"] = named;
    }
    used["threads"] = engine.threads().into();
    used["model"] = engine.numerics().into();
    let info = RunInfo::start(&options.output).with_config(used);
    let questions: usize = contexts.iter().map(|context| context.questions.len()).sum();
    let cost = run::cost(&contexts, &configs);
    let until = options.time_limit.map(|limit| Instant::now() + limit);
    let mut meter = Meter::new(questions * configs.len(), cost, progress);
    meter.say(format!("{questions} questions over {} contexts, {} configurations", contexts.len(), configs.len()));
    let judged = run::run(engine, &contexts, &configs, &mut answers, &mut meter, until)?;
    let report = QualityReport::new(&options.data, options.case.as_deref(), &judged, &wanted, &info);
    info.write(&report.records)?;
    Ok(report)
}

/// All that an answer depends on beside question, context and configuration.
fn of_model(engine: &Engine, settings: &serde_json::Value) -> serde_json::Value {
    let mut all = settings.clone();
    all["model"] = engine.model_fingerprint()[..8].iter().map(|byte| format!("{byte:02x}")).collect::<String>().into();
    all["numerics"] = engine.numerics().into();
    all["gpu"] = engine.gpu().into();
    all["max_tokens"] = run::MAX_TOKENS.into();
    all
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::Question;

    /// An answer to the question of a context.
    pub(super) fn judged(id: &str, config: &str, output: &str, part: f64) -> Judged {
        Judged {
            key: format!("key of {id}"),
            id: id.into(),
            question_index: 0,
            task: "kv".into(),
            size: Size::Tokens(1024),
            config: config.into(),
            blend: BlendConfig::default(),
            output: output.into(),
            answers: vec!["1".into()],
            exact: part == 1.0,
            part,
            cost: AnswerCost::default(),
            beside: None,
        }
    }

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
