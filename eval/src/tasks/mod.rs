//! Questions over contexts of chunks: where they come from, and how answers are judged.

mod cut;
mod facts;
mod files;
mod generate;
mod lists;
mod make;
mod plant;
mod score;
mod sources;
mod words;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{EvalError, Result};

pub use files::{load_files, reference_outputs};
pub use generate::{GENERATED_TASKS, GenerateOptions, generate};
pub use make::{MadeData, MakeOptions, make_data, write_contexts};
pub use score::{Score, normalize_squad, score};

/// All tasks that are known, in the order of tables.
const TASKS: [&str; 20] = [
    "niah_single",
    "niah_multikey",
    "niah_uuid",
    "niah_multivalue",
    "niah_multiquery",
    "kv",
    "vt",
    "x_alias",
    "x_same",
    "x_ref",
    "x_pron",
    "x_report",
    "squad",
    "cloze",
    "musique",
    "ruler_multikey",
    "ruler_multiquery",
    "ruler_multivalue",
    "ruler_vt",
    "ruler_cwe",
];

/// The names of all tasks, in the order of tables.
#[must_use]
pub fn task_names() -> &'static [&'static str] {
    &TASKS
}

/// Where tasks come from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum DataSource {
    /// Made by this program over passages of its own: a fresh clone has all that is needed.
    #[default]
    Generated,
    /// A folder with the reference model's evaluation files, or one JSON lines file of their form.
    Files(PathBuf),
}

impl DataSource {
    /// Its name in the cases of records.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            DataSource::Generated => "generated",
            DataSource::Files(_) => "files",
        }
    }
}

impl FromStr for DataSource {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(if text == "generated" { DataSource::Generated } else { DataSource::Files(text.into()) })
    }
}

impl fmt::Display for DataSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DataSource::Generated => f.write_str("generated"),
            DataSource::Files(path) => path.display().fmt(f),
        }
    }
}

/// How long a context is, as a column of the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Size {
    /// A target length in tokens.
    Tokens(usize),
    /// A number of passages.
    Passages(usize),
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Size::Tokens(tokens) => write!(f, "{tokens}"),
            Size::Passages(count) => write!(f, "{count}p"),
        }
    }
}

/// One question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// A name of [`task_names`].
    pub task: String,
    /// The question itself.
    #[serde(rename = "question")]
    pub text: String,
    /// Any one of these counts. Several wanted values are joined by `", "`.
    pub answers: Vec<String>,
    /// Its place among the questions of its context.
    #[serde(skip)]
    pub index: usize,
}

/// A context and the questions over it, each to be asked alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    /// Unique among the loaded ones.
    pub id: String,
    /// Its column.
    pub size: Size,
    /// The texts of the chunks.
    pub chunks: Vec<Arc<str>>,
    /// At least one.
    pub questions: Vec<Question>,
}

/// Refuses names outside `known`.
pub(crate) fn check_names(what: &'static str, names: &[String], known: &[&str]) -> Result<()> {
    match names.iter().find(|name| !known.contains(&name.as_str())) {
        Some(name) => Err(EvalError::UnknownName { what, name: name.clone(), known: known.join(", ") }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_parse_and_print() {
        for text in ["generated", "/data/eval", "short_1k.jsonl"] {
            let source: DataSource = text.parse().unwrap_or_default();
            assert_eq!(source.to_string(), text);
        }
    }

    #[test]
    fn unknown_names_are_refused_with_the_known_ones() {
        let error = check_names("task", &["kv".into(), "kw".into()], task_names());
        assert!(error.is_err_and(|e| e.to_string().contains("`kw`") && e.to_string().contains("niah_uuid")));
    }
}
