//! The texts that a model's heads are looked at over.

use std::fs;
use std::path::Path;

use engine::Engine;
use serde::Deserialize;

use super::HeadOptions;
use crate::ask::Material;
use crate::error::{EvalError, Result};
use crate::tasks::{Context, DataSource, GENERATED_TASKS, GenerateOptions, Question, Size, generate, load_files};

/// Tokens at the end of a running text whose queries are tested.
const TEXT_TESTS: usize = 32;
/// Retrieval tasks that are looked at, where the source has them.
const TASKS: [&str; 4] = ["niah_multikey", "kv", "vt", "niah_single"];

/// A text of which the queries of the last tokens are tested.
pub(super) struct HeadText {
    pub(super) tokens: Vec<u32>,
    /// How many tokens at the end: of a task, those of the question and of what opens the answer.
    pub(super) tests: usize,
}

/// Retrieval tasks of `length` tokens, at most one of each kind.
pub(super) fn task_texts(engine: &Engine, options: &HeadOptions, length: usize) -> Result<Vec<HeadText>> {
    let mut material = Material::new(engine)?;
    let mut texts = Vec::new();
    for context in contexts(engine, options, length)? {
        let question = material.question(&context.questions[0].text)?;
        let mut tokens = material.prefix().to_vec();
        for chunk in &context.chunks {
            tokens.extend_from_slice(&material.chunk(chunk)?);
        }
        tokens.truncate(length.saturating_sub(question.len()));
        tokens.extend_from_slice(&question);
        texts.push(HeadText { tokens, tests: question.len() });
    }
    if texts.is_empty() {
        let known = TASKS.join(", ");
        return Err(EvalError::NothingToDo(format!("no context of {length} tokens of {known} in {}", options.tasks)));
    }
    Ok(texts)
}

fn contexts(engine: &Engine, options: &HeadOptions, length: usize) -> Result<Vec<Context>> {
    let mut contexts = match &options.tasks {
        DataSource::Files(path) => {
            let mut contexts = load_files(path, length)?;
            contexts.retain(|context| context.size == Size::Tokens(length));
            // A context of many tasks is asked one of each.
            let asked = contexts.iter().flat_map(|context| {
                let of_task = |task: &&str| context.questions.iter().find(|q| q.task == **task);
                let one = |question: &Question| Context { questions: vec![question.clone()], ..context.clone() };
                TASKS.iter().filter_map(of_task).map(one).collect::<Vec<_>>()
            });
            asked.collect()
        }
        DataSource::Generated => {
            let count = |text: &str| engine.tokenizer().encode_plain(text).map_or(text.len(), |ids| ids.len());
            let tasks = TASKS.iter().filter(|task| GENERATED_TASKS.contains(task)).map(ToString::to_string).collect();
            generate(&GenerateOptions { tasks, lengths: vec![length], samples: 1, seed: 1 }, &count)?
        }
    };
    contexts.sort_by_key(|context| TASKS.iter().position(|task| *task == context.questions[0].task));
    contexts.dedup_by_key(|context| context.questions[0].task.clone());
    contexts.truncate(options.texts);
    Ok(contexts)
}

/// Running text of `length` tokens, from the files' beginning on; fewer texts where the file is too short.
pub(super) fn running_texts(engine: &Engine, options: &HeadOptions, length: usize) -> Result<Vec<HeadText>> {
    let Some(path) = &options.text else { return Ok(Vec::new()) };
    let prefix = Material::new(engine)?.prefix().to_vec();
    let mut all = Vec::new();
    let room = length.saturating_sub(prefix.len()).max(1);
    for document in documents(path)? {
        all.extend(engine.tokenizer().encode_plain(&document)?);
        if all.len() >= room * options.texts {
            break;
        }
    }
    let texts = all.chunks_exact(room).take(options.texts);
    Ok(texts.map(|body| HeadText { tokens: [&prefix[..], body].concat(), tests: TEXT_TESTS }).collect())
}

/// The file itself; of JSON lines, what stands in `document`.
fn documents(path: &Path) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Line {
        document: String,
    }
    let text = fs::read_to_string(path).map_err(EvalError::io("read", path))?;
    if path.extension().is_none_or(|ending| ending != "jsonl") {
        return Ok(vec![text]);
    }
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let parsed = lines.map(|(at, line)| match serde_json::from_str::<Line>(line) {
        Ok(line) => Ok(line.document),
        Err(error) => Err(EvalError::BadLine {
            path: path.to_owned(),
            line: at + 1,
            expected: "an object with a text in `document`",
            reason: error.to_string(),
        }),
    });
    parsed.collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn documents_are_texts_or_fields_of_lines() {
        let dir = tempfile::tempdir().unwrap();
        let (plain, lines) = (dir.path().join("a.txt"), dir.path().join("b.jsonl"));
        fs::write(&plain, "one\ntwo").unwrap();
        fs::write(&lines, "{\"document\": \"x\"}\n\n{\"document\": \"y\", \"more\": 1}\n").unwrap();
        assert_eq!(documents(&plain).unwrap(), ["one\ntwo"]);
        assert_eq!(documents(&lines).unwrap(), ["x", "y"]);
        fs::write(&lines, "{}\n").unwrap();
        assert!(matches!(documents(&lines), Err(EvalError::BadLine { line: 1, .. })));
    }
}
