//! The crate's error type.

use std::path::PathBuf;

/// What can go wrong in an evaluation or a bench.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The evaluation files are not where they were looked for.
    #[error(
        "no evaluation files in {}: expected a JSON lines file, or a folder with at least one of {expected}; \
         without them, tasks made by this program itself are used with the data source `generated`",
        path.display()
    )]
    MissingData {
        /// Where they were looked for.
        path: PathBuf,
        /// The names that would have been read.
        expected: String,
    },
    /// A line of a JSON lines file does not have the expected form.
    #[error("{}, line {line}: expected {expected}, but {reason}; correct or remove the line", path.display())]
    BadLine {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What a line holds.
        expected: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of published questions does not have the expected form.
    #[error("{}: expected {expected}, but {reason}; name a file of that form", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What it holds.
        expected: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of answers belongs to another run.
    #[error(
        "{} holds answers of another run: they were given under {found}, this run has {wanted}; name another file, or remove this one",
        path.display()
    )]
    OtherAnswers {
        /// The file.
        path: PathBuf,
        /// Its settings.
        found: String,
        /// Those of this run.
        wanted: String,
    },
    /// An option names something that does not exist.
    #[error("unknown {what} `{name}`: known are {known}")]
    UnknownName {
        /// A task, configuration, ...
        what: &'static str,
        /// As given.
        name: String,
        /// All that may be given.
        known: String,
    },
    /// An option is outside its range.
    #[error("{what} is {found}, expected {expected}")]
    BadOption {
        /// The option.
        what: &'static str,
        /// As given.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// No question is left to be asked.
    #[error("no questions left: {0}; widen the tasks, lengths or the limit")]
    NothingToDo(String),
    /// A file could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: "read", "write", "create".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The chunk store refused or failed.
    #[error(transparent)]
    Store(#[from] chunk_cache::StoreError),
    /// The engine refused or failed.
    #[error(transparent)]
    Engine(#[from] engine::EngineError),
    /// A request ended without an answer.
    #[error("the engine ended a request {when}, expected tokens and an end; see the server's log for its reason")]
    Interrupted {
        /// How far it had come.
        when: &'static str,
    },
    /// The program that is measured side by side failed.
    #[error(
        "the peer ({python}) failed: {reason}; expected an interpreter that imports {needs}: name one with the \
         python option, or run without the peer",
        python = python.display()
    )]
    Peer {
        /// The interpreter.
        python: PathBuf,
        /// What it must import.
        needs: &'static str,
        /// What it said.
        reason: String,
    },
    /// The library that makes a disk fail does not compile.
    #[error("the library of faults does not compile; expected a C compiler that `cc` runs, and it says: {0}")]
    Compiler(String),
    /// The two sides of a comparison do not compute the same.
    #[error(
        "{what}: this program gives token {ours}, the peer {theirs}; timing differing results means nothing, so none is reported"
    )]
    Disagreement {
        /// What was compared.
        what: String,
        /// Our token.
        ours: u32,
        /// The peer's.
        theirs: u32,
    },
    /// The engine computes something that is no number: times of that mean nothing.
    #[error("{what} is no finite number; with such results nothing is timed. Check the weights, or the kernels")]
    NotANumber {
        /// What was found so.
        what: &'static str,
    },
    /// Rows of one batch with the same prompt begin with different tokens.
    #[error(
        "sequences with the same prompt begin with tokens {first} and {other}; timing differing results means nothing"
    )]
    UnlikeRows {
        /// The token of the first sequence.
        first: u32,
        /// Another one's.
        other: u32,
    },
    /// An index refused or failed.
    #[error(transparent)]
    Index(#[from] ann_index::IndexError),
    /// A provider of cached chunks failed.
    #[error("the chunk provider `{name}` failed: {reason}")]
    Provider {
        /// Its name.
        name: String,
        /// What it said.
        reason: String,
    },
}

impl EvalError {
    /// For `map_err` behind a file operation.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> EvalError {
        let path = path.into();
        move |source| EvalError::Io { action, path, source }
    }
}

/// Shorthand for results of this crate.
pub type Result<T, E = EvalError> = std::result::Result<T, E>;
