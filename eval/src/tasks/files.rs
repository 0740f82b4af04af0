//! Reading the evaluation files that come with the reference model.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Context, Question, Size};
use crate::error::{EvalError, Result};

const NAMES: [&str; 4] = ["short_1k.jsonl", "mid_4k.jsonl", "squad_passages.jsonl", "long_many_questions.jsonl"];
const OUTPUTS: &str = "reference_outputs.jsonl";

/// A line: one question in `task`, `question` and `answers`, or several in `questions`.
#[derive(Serialize, Deserialize)]
struct Line {
    id: String,
    #[serde(default)]
    length: usize,
    passages: Option<usize>,
    chunks: Vec<String>,
    task: String,
    question: Option<String>,
    #[serde(default)]
    answers: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    questions: Vec<Question>,
}

/// Writes a context as [`load_files`] reads it.
///
/// # Errors
/// Those of the writer.
pub(super) fn write_line(to: &mut impl Write, context: &Context) -> std::io::Result<()> {
    let (length, passages) = match context.size {
        Size::Tokens(tokens) => (tokens, None),
        Size::Passages(count) => (0, Some(count)),
    };
    let (id, chunks) = (context.id.clone(), context.chunks.iter().map(|text| text.to_string()).collect());
    let line = match &context.questions[..] {
        [Question { task, text, answers, .. }] => Line {
            id,
            length,
            passages,
            chunks,
            task: task.clone(),
            question: Some(text.clone()),
            answers: answers.clone(),
            questions: Vec::new(),
        },
        several => {
            let questions = several.to_vec();
            Line { id, length, passages, chunks, task: "many".into(), question: None, answers: Vec::new(), questions }
        }
    };
    serde_json::to_writer(&mut *to, &line)?;
    to.write_all(b"\n")
}

/// Reads the contexts of a folder or file whose length in tokens is at most `max_length`. Texts of chunks that occur
/// again are shared.
///
/// # Errors
/// [`EvalError::MissingData`] when there is nothing at `path`; [`EvalError::Io`]; [`EvalError::BadLine`].
pub fn load_files(path: &Path, max_length: usize) -> Result<Vec<Context>> {
    let mut texts: HashSet<Arc<str>> = HashSet::new();
    let mut contexts = Vec::new();
    for file in present(path)? {
        let lines = read_lines::<Line>(&file, "id, length, chunks and question(s) with answers")?;
        for (at, line) in lines.into_iter().enumerate() {
            if line.length > max_length {
                continue;
            }
            let context = context(line, &mut texts).map_err(|reason| EvalError::BadLine {
                path: file.clone(),
                line: at + 1,
                expected: "chunks, and questions with answers",
                reason: reason.into(),
            })?;
            contexts.push(context);
        }
    }
    Ok(contexts)
}

/// The model's own answers that lie beside the files: (id of the context, number of the question) to text. Empty where
/// there are none.
///
/// # Errors
/// [`EvalError::Io`]; [`EvalError::BadLine`].
pub fn reference_outputs(path: &Path) -> Result<BTreeMap<(String, usize), String>> {
    #[derive(Deserialize)]
    struct Output {
        id: String,
        question_index: usize,
        output: String,
    }
    let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
    let file = folder.join(OUTPUTS);
    if !file.is_file() {
        return Ok(BTreeMap::new());
    }
    let lines = read_lines::<Output>(&file, "id, question_index and output")?;
    Ok(lines.into_iter().map(|line| ((line.id, line.question_index), line.output)).collect())
}

fn present(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let found: Vec<PathBuf> = NAMES.iter().map(|name| path.join(name)).filter(|file| file.is_file()).collect();
    if found.is_empty() {
        return Err(EvalError::MissingData { path: path.to_owned(), expected: NAMES.join(", ") });
    }
    Ok(found)
}

fn read_lines<T: DeserializeOwned>(path: &Path, expected: &'static str) -> Result<Vec<T>> {
    let text = fs::read_to_string(path).map_err(EvalError::io("read", path))?;
    text.lines()
        .enumerate()
        .map(|(at, line)| {
            serde_json::from_str(line).map_err(|e| EvalError::BadLine {
                path: path.to_owned(),
                line: at + 1,
                expected,
                reason: e.to_string(),
            })
        })
        .collect()
}

/// The text itself, or the same one that was met before.
fn shared(text: String, texts: &mut HashSet<Arc<str>>) -> Arc<str> {
    if let Some(known) = texts.get(text.as_str()) {
        return known.clone();
    }
    let text: Arc<str> = text.into();
    texts.insert(text.clone());
    text
}

fn context(line: Line, texts: &mut HashSet<Arc<str>>) -> Result<Context, &'static str> {
    let mut questions = match line.question {
        Some(text) => vec![Question { task: line.task, text, answers: line.answers, index: 0 }],
        None => line.questions,
    };
    for (index, question) in questions.iter_mut().enumerate() {
        question.index = index;
    }
    if line.chunks.is_empty() {
        return Err("there are no chunks");
    }
    if questions.is_empty() || questions.iter().any(|question| question.answers.is_empty()) {
        return Err("a question or an answer is missing");
    }
    let chunks = line.chunks.into_iter().map(|text| shared(text, texts)).collect();
    let size = line.passages.map_or(Size::Tokens(line.length), Size::Passages);
    Ok(Context { id: line.id, size, chunks, questions })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const SHORT: &str = r#"{"id": "s-0", "task": "kv", "length": 1024, "passages": null, "chunks": ["one", "two"], "question": "Q?", "answers": ["1", "2"]}
{"id": "s-1", "task": "squad", "length": 0, "passages": 5, "chunks": ["one"], "question": "Q?", "answers": ["1"]}
"#;
    const MANY: &str = r#"{"id": "m-0", "task": "many", "length": 8192, "chunks": ["two"], "questions": [{"task": "vt", "question": "A?", "answers": ["X, Y"]}, {"task": "kv", "question": "B?", "answers": ["3"]}]}
{"id": "m-1", "task": "many", "length": 16384, "chunks": ["two"], "questions": [{"task": "vt", "question": "A?", "answers": ["X"]}]}
"#;

    #[test]
    fn reads_both_kinds_of_lines_up_to_the_length() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("short_1k.jsonl"), SHORT).unwrap();
        fs::write(dir.path().join("long_many_questions.jsonl"), MANY).unwrap();
        let contexts = load_files(dir.path(), 8192).unwrap();
        let ids: Vec<&str> = contexts.iter().map(|c| c.id.as_str()).collect();
        assert_eq!(ids, ["s-0", "s-1", "m-0"]);
        assert_eq!(contexts[0].size, Size::Tokens(1024));
        assert_eq!(contexts[0].questions[0].answers, ["1", "2"]);
        assert_eq!(contexts[1].size, Size::Passages(5));
        assert_eq!(contexts[2].questions.len(), 2);
        assert_eq!((contexts[2].questions[1].text.as_str(), contexts[2].questions[1].index), ("B?", 1));
        assert!(Arc::ptr_eq(&contexts[0].chunks[1], &contexts[2].chunks[0]));
    }

    #[test]
    fn reads_one_file_and_the_outputs_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("own.jsonl");
        fs::write(&file, SHORT).unwrap();
        assert_eq!(load_files(&file, 8192).unwrap().len(), 2);
        assert!(reference_outputs(&file).unwrap().is_empty());
        fs::write(dir.path().join(OUTPUTS), "{\"id\": \"s-0\", \"question_index\": 1, \"output\": \"x\"}\n").unwrap();
        assert_eq!(reference_outputs(&file).unwrap()[&("s-0".to_owned(), 1)], "x");
    }

    #[test]
    fn missing_files_say_what_was_expected_and_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let text = load_files(&dir.path().join("nowhere"), 8192).unwrap_err().to_string();
        assert!(text.contains("nowhere") && text.contains("short_1k.jsonl") && text.contains("generated"), "{text}");
    }

    #[test]
    fn bad_lines_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("own.jsonl");
        for bad in [
            "{\"id\": \"x\", \"task\": \"kv\", \"chunks\": [\"c\"]}\n",
            "{\"id\": \"x\", \"task\": \"kv\", \"chunks\": [], \"question\": \"?\", \"answers\": [\"1\"]}\n",
            "{\"id\": \"x\"\n",
        ] {
            fs::write(&file, format!("{SHORT}{bad}")).unwrap();
            assert!(matches!(load_files(&file, 8192), Err(EvalError::BadLine { line: 3, .. })), "{bad}");
        }
    }
}
