//! The search bench: how often the right passage is found, and how soon an enormous query is dealt with.
//!
//! Recall: the passages of all data sets go into one collection. A question counts if the data name a passage that
//! answers it: the question's own paragraph (SQuAD's format), or those of its own passages that hold its answer word for
//! word (a list of `ctxs`, `question`, `answers`, which names no passages). It is found if one of them is among the
//! first five that are distinct.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use engine::EngineError;
use eval::{Output, Record, RunInfo, median};
use serde::Serialize;
use serde_json::{Value, json};

use super::dispatch::ScratchDir;
use crate::error::Result;
use documents::{ChunkSpan, Collection, Format, Library, NewDocument, NewPassage, Span, comparable};
use service::{Options, Purpose, Question, Service};
use settings::{QuireError, Settings};

/// Passages that a question may be found among.
const TOP: usize = 5;
/// Name of the collection.
const COLLECTION: &str = "bench";

/// What the bench does.
#[derive(Clone, Debug)]
pub(super) struct SearchBenchOptions {
    /// Files of passages and questions.
    pub(super) data: Vec<PathBuf>,
    /// Distinct words of the enormous query.
    pub(super) words: usize,
    /// Times that it is sent.
    pub(super) repeats: usize,
    /// Where records go.
    pub(super) output: Output,
}

/// Figures of the bench.
#[derive(Clone, Debug, Serialize)]
pub(super) struct SearchReport {
    /// All of them as records.
    pub(super) records: Vec<Record>,
}

impl SearchReport {
    /// For people.
    pub(super) fn table(&self) -> String {
        let lines =
            self.records.iter().map(|r| format!("| {} | {} | {:.4} | {} |", r.case, r.metric, r.value, r.samples));
        let lines: Vec<String> = lines.collect();
        format!("| case | metric | value | samples |\n|---|---|---|---|\n{}", lines.join("\n"))
    }
}

/// Passages and questions of one file.
#[derive(Debug, Default)]
struct DataSet {
    name: String,
    /// Distinct, in the order of the file.
    passages: Vec<String>,
    /// Questions, each with the numbers of the passages that answer it.
    questions: Vec<(String, Vec<usize>)>,
}

/// How many questions found their passages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    /// Questions in all.
    questions: usize,
    /// Of these, questions that some passage answers.
    answerable: usize,
    /// Of these, questions that found one such passage.
    any: usize,
    /// Of these, questions that found all such passages.
    all: usize,
}

impl Tally {
    fn add(&mut self, other: Tally) {
        self.questions += other.questions;
        self.answerable += other.answerable;
        self.any += other.any;
        self.all += other.all;
    }

    fn records(self, info: &RunInfo, case: &str) -> Vec<Record> {
        let rate = |metric, found: usize, of: usize| {
            let value = found as f64 / of.max(1) as f64;
            info.record("search", case, metric, "share", (value * 1e4).round() / 1e4, of)
        };
        vec![
            rate("recall_at_5", self.any, self.answerable),
            rate("recall_at_5_all_passages", self.all, self.answerable),
            rate("recall_at_5_of_all_questions", self.any, self.questions),
        ]
    }
}

/// Measures recall over `options.data`, if there is any, and the time of an enormous query.
///
/// # Errors
/// Files that are no such data, what the service fails with, what keeps records from being written.
pub(super) fn search_bench(
    settings: &Settings,
    options: &SearchBenchOptions,
    news: &mut dyn FnMut(&str),
) -> Result<SearchReport> {
    let sets = options.data.iter().map(|path| DataSet::read(path)).collect::<Result<Vec<_>>>()?;
    let scratch = ScratchDir::new(&settings.data_dir, "bench-search")?;
    let library = Library::new(scratch.path());
    let collection = library.collection_or_new(COLLECTION)?;
    write(&collection, &sets)?;
    let counts = |set: &DataSet| json!({"passages": set.passages.len(), "questions": set.questions.len()});
    let config = json!({
        "data": sets.iter().map(|set| (set.name.clone(), counts(set))).collect::<HashMap<_, _>>(),
        "counted": "questions whose data hold a passage that answers them; recall_at_5: one of these passages is among \
                    the first five distinct ones, recall_at_5_all_passages: all are, recall_at_5_of_all_questions: \
                    questions that no passage answers count as not found",
        "words": options.words, "repeats": options.repeats,
    });
    let info = RunInfo::start(&options.output).with_config(config);
    let mut records = Vec::new();
    let mut total = Tally::default();
    for set in &sets {
        let tally = recall(&collection, set)?;
        news(&format!("{}: {tally:?}", set.name));
        if sets.len() > 1 {
            records.extend(tally.records(&info, &format!("{}/lexical", set.name)));
        }
        total.add(tally);
    }
    if !sets.is_empty() {
        let names: Vec<&str> = sets.iter().map(|set| set.name.as_str()).collect();
        records.extend(total.records(&info, &format!("{}/lexical", names.join("+"))));
    }
    drop((collection, library));
    records.extend(enormous(settings, options, scratch.path(), &info)?);
    info.write(&records)?;
    Ok(SearchReport { records })
}

/// How long the service takes to deal with a question of very many distinct words: as a rule, to refuse it.
fn enormous(settings: &Settings, options: &SearchBenchOptions, data_dir: &Path, info: &RunInfo) -> Result<Vec<Record>> {
    let text: String = (0..options.words).map(|word| format!("w{word} ")).collect();
    let service = Service::open(&Settings { data_dir: data_dir.into(), ..settings.clone() }, Purpose::Ask)?;
    let question = Question::new(&text, COLLECTION, settings.top_chunks, Options::from_settings(settings)?);
    let case = format!("{}k-words", options.words / 1000);
    let (mut seconds, mut alone) = (Vec::new(), Vec::new());
    for _ in 0..options.repeats.max(1) {
        let started = Instant::now();
        match service.answer(&question) {
            // Dropped at once, which ends it.
            Ok(_) | Err(QuireError::Engine(EngineError::ContextLimit { .. } | EngineError::TextTooLong { .. })) => {}
            Err(error) => return Err(error.into()),
        }
        seconds.push(started.elapsed().as_secs_f64());
        let started = Instant::now();
        service.search(COLLECTION, &text, settings.top_chunks)?;
        alone.push(started.elapsed().as_secs_f64());
    }
    service.engine().shutdown();
    let figure = |metric, values: &[f64]| {
        info.record("search", &case, metric, "s", (median(values) * 1e5).round() / 1e5, values.len())
    };
    Ok(vec![figure("seconds", &seconds), figure("seconds_of_search_alone", &alone)])
}

/// Each data set as one document, whose chunks are the passages.
fn write(collection: &Collection, sets: &[DataSet]) -> Result<()> {
    let writer = collection.writer()?;
    for set in sets {
        let (mut text, mut passages, mut chars) = (String::new(), Vec::new(), 0);
        for passage in &set.passages {
            let (start, length) = (text.len(), passage.chars().count());
            text.push_str(passage);
            let place = ChunkSpan { chars: Span { start: chars, end: chars + length }, bytes: start..text.len() };
            passages.push(NewPassage { place, page: None, tokens: Vec::new() });
            text.push('\n');
            chars += length + 1;
        }
        let document = NewDocument {
            name: set.name.clone(),
            text,
            format: Format::Text,
            fingerprint: "bench".into(),
            tokenizer: None,
            passages,
            attributes: None,
            instead_of: Vec::new(),
            left_by: Vec::new(),
        };
        writer.change(|transaction, collection| transaction.put(collection, &document))?;
    }
    Ok(())
}

fn recall(collection: &Collection, set: &DataSet) -> Result<Tally> {
    let numbers: HashMap<&str, usize> = set.passages.iter().enumerate().map(|(at, text)| (text.as_str(), at)).collect();
    let mut tally = Tally { questions: set.questions.len(), ..Tally::default() };
    for (question, gold) in set.questions.iter().filter(|(_, gold)| !gold.is_empty()) {
        let found = collection.search(question, TOP, &|| true)?;
        let found: Vec<usize> = found.iter().filter_map(|found| numbers.get(found.passage.as_str()).copied()).collect();
        tally.answerable += 1;
        tally.any += usize::from(gold.iter().any(|passage| found.contains(passage)));
        tally.all += usize::from(gold.iter().all(|passage| found.contains(passage)));
    }
    Ok(tally)
}

impl DataSet {
    /// Reads a file of SQuAD's format, or a list of questions with their passages.
    fn read(path: &Path) -> Result<DataSet> {
        let text = std::fs::read_to_string(path).map_err(|source| QuireError::Io {
            action: "read",
            path: path.into(),
            source,
        })?;
        let wrong = |problem: String| QuireError::InvalidParameter {
            param: "--data".into(),
            problem: format!(
                "{}: expected SQuAD's format, or a list of objects with ctxs, question and answers; {problem}",
                path.display()
            ),
        };
        let data: Value = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
        let stem = path.file_name().unwrap_or_default().to_string_lossy();
        let name: String = stem.chars().take_while(char::is_ascii_alphanumeric).collect();
        let mut set = DataSet { name, ..DataSet::default() };
        let mut numbers = HashMap::new();
        let done = match (&data["data"], &data) {
            (Value::Array(articles), _) => set.squad(articles, &mut numbers),
            (_, Value::Array(questions)) => set.contexts(questions, &mut numbers),
            _ => None,
        };
        match done {
            Some(()) if !set.questions.is_empty() => Ok(set),
            _ => Err(wrong("found something else".into()).into()),
        }
    }

    fn squad(&mut self, articles: &[Value], numbers: &mut HashMap<String, usize>) -> Option<()> {
        for paragraph in articles.iter().filter_map(|article| article["paragraphs"].as_array()).flatten() {
            let passage = self.passage(paragraph["context"].as_str()?, numbers);
            for question in paragraph["qas"].as_array()? {
                self.questions.push((question["question"].as_str()?.into(), vec![passage]));
            }
        }
        Some(())
    }

    fn contexts(&mut self, questions: &[Value], numbers: &mut HashMap<String, usize>) -> Option<()> {
        for question in questions {
            let answers = question["answers"].as_array()?.iter().filter_map(Value::as_str).map(comparable);
            let answers: Vec<String> = answers.filter(|answer| !answer.trim().is_empty()).collect();
            let mut gold = Vec::new();
            for context in question["ctxs"].as_array()? {
                let text = context["text"].as_str()?;
                let passage = self.passage(text, numbers);
                let words = comparable(text);
                if answers.iter().any(|answer| words.contains(answer)) && !gold.contains(&passage) {
                    gold.push(passage);
                }
            }
            self.questions.push((question["question"].as_str()?.into(), gold));
        }
        Some(())
    }

    /// The number of a passage; a new one if it was not there before.
    fn passage(&mut self, text: &str, numbers: &mut HashMap<String, usize>) -> usize {
        let text = text.trim();
        *numbers.entry(text.into()).or_insert_with(|| {
            self.passages.push(text.into());
            self.passages.len() - 1
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn file(dir: &Path, name: &str, data: &Value) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, data.to_string()).unwrap();
        path
    }

    #[test]
    fn recall_counts_questions_whose_passages_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let squad = json!({"data": [{"paragraphs": [
            {"context": "The lighthouse is white.", "qas": [{"question": "Which lighthouse?"}, {"question": "Whose xylophone?"}]},
            {"context": "A harbour.", "qas": [{"question": "Which harbour?"}]},
        ]}]});
        let contexts = json!([
            {"question": "Who keeps the anchor?", "answers": ["Ada Thorne"], "ctxs": [
                {"text": "The anchor is kept by ada thorne."}, {"text": "Ada Thorne sings."}, {"text": "A harbour."}]},
            {"question": "Who sings?", "answers": ["Nobody"], "ctxs": [{"text": "A harbour."}]},
        ]);
        let sets = [file(dir.path(), "one.en.json", &squad), file(dir.path(), "two-7.json", &contexts)];
        let sets = sets.iter().map(|path| DataSet::read(path)).collect::<Result<Vec<_>>>().unwrap();
        assert_eq!(sets.iter().map(|set| set.name.as_str()).collect::<Vec<_>>(), ["one", "two"]);
        let collection = Library::new(&dir.path().join("data")).collection_or_new(COLLECTION).unwrap();
        write(&collection, &sets).unwrap();
        let one = recall(&collection, &sets[0]).unwrap();
        assert_eq!(one, Tally { questions: 3, answerable: 3, any: 2, all: 2 });
        let two = recall(&collection, &sets[1]).unwrap();
        assert_eq!(two, Tally { questions: 2, answerable: 1, any: 1, all: 0 });
    }

    #[test]
    fn other_files_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        for data in [json!({"data": 1}), json!([]), json!([{"question": "x"}])] {
            let error = DataSet::read(&file(dir.path(), "odd.json", &data)).unwrap_err().to_string();
            assert!(error.contains("odd.json") && error.contains("SQuAD"), "{error}");
        }
    }
}
