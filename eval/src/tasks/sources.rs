//! Public sets of questions over passages, as they are published.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::{EvalError, Result};

/// Questions of which each has its passage.
pub(super) struct Passages {
    pub(super) passages: Vec<Arc<str>>,
    /// In the order of the file.
    pub(super) questions: Vec<PassageQuestion>,
}

pub(super) struct PassageQuestion {
    /// Its place among the passages.
    pub(super) passage: usize,
    pub(super) text: String,
    pub(super) answers: Vec<String>,
}

/// A question with passages of its own.
#[derive(Deserialize)]
pub(super) struct MusiqueQuestion {
    #[serde(rename = "ctxs")]
    pub(super) contexts: Vec<MusiquePassage>,
    #[serde(rename = "question")]
    pub(super) text: String,
    pub(super) answers: Vec<String>,
}

#[derive(Deserialize)]
pub(super) struct MusiquePassage {
    pub(super) text: String,
}

/// Reads a file in SQuAD's format (version 1.1), such as XQuAD's.
///
/// # Errors
/// [`EvalError::Io`]; [`EvalError::BadFile`].
pub(super) fn read_squad(path: &Path) -> Result<Passages> {
    #[derive(Deserialize)]
    struct File {
        data: Vec<Article>,
    }
    #[derive(Deserialize)]
    struct Article {
        paragraphs: Vec<Paragraph>,
    }
    #[derive(Deserialize)]
    struct Paragraph {
        context: String,
        qas: Vec<Asked>,
    }
    #[derive(Deserialize)]
    struct Asked {
        question: String,
        answers: Vec<Answer>,
    }
    #[derive(Deserialize)]
    struct Answer {
        text: String,
    }
    let file: File = read(path, "SQuAD's format, `{\"data\": [{\"paragraphs\": [{\"context\", \"qas\"}]}]}`")?;
    let mut read = Passages { passages: Vec::new(), questions: Vec::new() };
    for paragraph in file.data.into_iter().flat_map(|article| article.paragraphs) {
        let passage = read.passages.len();
        read.passages.push(paragraph.context.into());
        read.questions.extend(paragraph.qas.into_iter().map(|asked| PassageQuestion {
            passage,
            text: asked.question,
            answers: asked.answers.into_iter().map(|answer| answer.text).collect(),
        }));
    }
    Ok(read)
}

/// Reads questions in the form of MuSiQue's lists: `[{"ctxs": [{"text"}], "question", "answers"}]`.
///
/// # Errors
/// [`EvalError::Io`]; [`EvalError::BadFile`].
pub(super) fn read_musique(path: &Path) -> Result<Vec<MusiqueQuestion>> {
    read(path, "a list of `{\"ctxs\": [{\"text\"}], \"question\", \"answers\"}`")
}

fn read<T: DeserializeOwned>(path: &Path, expected: &'static str) -> Result<T> {
    let text = fs::read(path).map_err(EvalError::io("read", path))?;
    serde_json::from_slice(&text).map_err(|error| EvalError::BadFile {
        path: path.to_owned(),
        expected,
        reason: error.to_string(),
    })
}
