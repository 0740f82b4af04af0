//! Everything that can go wrong, each with what was expected, what came and what to do; and the exit codes.

use std::net::SocketAddr;
use std::path::PathBuf;

use chunk_cache::StoreError;
use engine::EngineError;

use crate::hub::HubError;

/// This crate's result type.
pub type Result<T> = std::result::Result<T, QuireError>;

/// What can go wrong between a user and an answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuireError {
    /// The engine refused or failed.
    #[error(transparent)]
    Engine(#[from] EngineError),

    /// The chunk store refused or failed.
    #[error(transparent)]
    Store(#[from] StoreError),

    /// A measurement failed.
    #[error(transparent)]
    Eval(#[from] eval::EvalError),

    /// A model of the hub is not there or cannot be fetched.
    #[error(transparent)]
    Hub(#[from] HubError),

    /// A setting is wrong.
    #[error("setting `{setting}` ({origin}): {problem}")]
    Config {
        /// The setting's name.
        setting: String,
        /// Where its value came from.
        origin: String,
        /// What was expected and what came.
        problem: String,
    },

    /// No model was named, and none lies beside the program.
    #[error(
        "no model: expected a folder with config.json, tokenizer.json and model.safetensors. Set --model or \
         QUIRE_MODEL to one, or run from the source tree, which ships one in eval/models/reference. Searched: {}",
        searched.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    ModelNotFound {
        /// Where was looked.
        searched: Vec<PathBuf>,
    },

    /// A document is not UTF-8.
    #[error(
        "document {}: expected UTF-8 text, found an invalid byte at offset {offset}. Convert it, for example with \
         `iconv -f LATIN1 -t UTF-8 FILE > NEW_FILE` if it is Latin-1", path.display()
    )]
    NotUtf8 {
        /// The document.
        path: PathBuf,
        /// Offset of the first byte that is no UTF-8.
        offset: usize,
    },

    /// A document is in another encoding.
    #[error(
        "document {}: expected UTF-8 text, found {found} at offset {offset}. Convert it: \
         `iconv -f {encoding} -t UTF-8 FILE > NEW_FILE`", path.display()
    )]
    OtherEncoding {
        /// The document.
        path: PathBuf,
        /// What gives it away.
        found: &'static str,
        /// Where.
        offset: usize,
        /// Its encoding, as iconv names it.
        encoding: &'static str,
    },

    /// A document has bytes that no text has.
    #[error(
        "document {}: expected text, found a NUL byte at offset {offset}: it is no text, is damaged, or is in another \
         encoding. If it is UTF-16, convert it: `iconv -f UTF-16LE -t UTF-8 FILE > NEW_FILE`; otherwise remove the \
         bytes: `tr -d '\\000' < FILE > NEW_FILE`", path.display()
    )]
    NulInDocument {
        /// The document.
        path: PathBuf,
        /// Offset of the first.
        offset: usize,
    },

    /// A document is larger than any that could be read in reasonable time.
    #[error(
        "document {}: expected at most {limit} bytes, found {found}. Split it, for example with \
         `split --line-bytes={limit}`", path.display()
    )]
    DocumentTooLarge {
        /// The document.
        path: PathBuf,
        /// Bytes that it has, as far as known.
        found: u64,
        /// Bytes that it may have.
        limit: u64,
    },

    /// A document's name is not UTF-8, so that no answer could cite it.
    #[error("document {}: expected a file name in UTF-8. Rename the file, then ingest it again", path.display())]
    DocumentName {
        /// The document.
        path: PathBuf,
    },

    /// A document has no text.
    #[error(
        "document {}: expected text, found {found} at offset 0. Remove it from the folder, or write something into it",
        path.display()
    )]
    EmptyDocument {
        /// The document.
        path: PathBuf,
        /// "no bytes" or "only white space".
        found: &'static str,
    },

    /// A document is in a format that is not read.
    #[error(
        "document {}: expected a text (.txt, .text) or Markdown (.md, .markdown) file, found {found}. \
         Convert it to one of these", path.display()
    )]
    UnsupportedDocument {
        /// The document.
        path: PathBuf,
        /// Its extension, or its kind.
        found: String,
    },

    /// Some documents or folders of an ingest could not be read; the others were.
    #[error("{failed} of {total} documents could not be ingested (named above); the others are safe")]
    DocumentsFailed {
        /// How many failed; a folder counts as one.
        failed: usize,
        /// Out of how many.
        total: usize,
    },

    /// There is nothing to ingest.
    #[error("no documents: expected text (.txt) or Markdown (.md) files under {}, found none", path.display())]
    NoDocuments {
        /// What was searched.
        path: PathBuf,
    },

    /// A collection's name cannot be a folder's.
    #[error(
        "collection `{found}`: expected 1 to 64 letters, digits, `-`, `_` or `.`, not beginning with `.`. \
         Choose another name"
    )]
    CollectionName {
        /// The name that was given.
        found: String,
    },

    /// There is no such collection.
    #[error(
        "collection `{name}` does not exist{}. Make it with `quire ingest PATH --collection {name}`",
        if known.is_empty() { String::from("; there is none yet") } else { format!("; there are: {}", known.join(", ")) }
    )]
    UnknownCollection {
        /// The name that was asked for.
        name: String,
        /// The collections that exist.
        known: Vec<String>,
    },

    /// A collection was written by a later version of the program.
    #[error(
        "collection {}: a newer Quire has written it (search index {found}, this one knows up to {known}). Use that \
         one, or ingest the documents into another collection", path.display()
    )]
    NewerCollection {
        /// Its folder.
        path: PathBuf,
        /// The version found.
        found: u32,
        /// The latest one that this program knows.
        known: u32,
    },

    /// The full-text index failed.
    #[error("collection index at {}: {source}. {advice}", path.display())]
    Index {
        /// The index's folder.
        path: PathBuf,
        /// What to do.
        advice: &'static str,
        /// The reason.
        source: Box<tantivy::TantivyError>,
    },

    /// The data folder cannot be written.
    #[error(
        "data folder {}: expected to be able to write there: {source}. Make it writable for this user, or choose \
         another with --data-dir", path.display()
    )]
    DataDir {
        /// The folder or file that could not be written.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },

    /// The data folder was written by a newer version of this program.
    #[error(
        "data folder {}: it has version {found}, this program reads up to {supported}. Use a newer quire, or choose \
         another folder with --data-dir", path.display()
    )]
    NewerDataDir {
        /// The folder.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest that this build reads.
        supported: u32,
    },

    /// The file that says which version the data folder has cannot be understood.
    #[error(
        "{}: expected the version of the data folder, as in {{\"format\": 1}}: {problem}. Remove the file if this quire \
         wrote the folder", path.display()
    )]
    DataDirMarker {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },

    /// A file operation failed.
    #[error("cannot {action} {}: {source}. Check the path, and that this user may use it", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },

    /// The server's address is taken.
    #[error("cannot listen on {address}: the port is in use. Stop the other program, or choose another with --port")]
    PortInUse {
        /// The address.
        address: SocketAddr,
    },

    /// The server cannot listen.
    #[error("cannot listen on {address}: {source}. Check --host and --port")]
    Listen {
        /// What was asked for.
        address: String,
        /// The system's reason.
        source: std::io::Error,
    },

    /// A parameter of a request is wrong.
    #[error("parameter `{param}`: {problem}")]
    InvalidParameter {
        /// Its name; dots separate nested ones.
        param: String,
        /// What was expected and what came.
        problem: String,
    },

    /// A parameter of a request is known but not supported.
    #[error("parameter `{param}` is not supported{}", if hint.is_empty() { String::new() } else { format!(": {hint}") })]
    UnsupportedParameter {
        /// Its name.
        param: String,
        /// What would be accepted.
        hint: &'static str,
    },

    /// The request names another model.
    #[error("the model `{found}` does not exist; this server offers `{served}`")]
    UnknownModel {
        /// The model asked for.
        found: String,
        /// The one there is.
        served: String,
    },

    /// A check found damage.
    #[error("{0}")]
    CheckFailed(String),

    /// The model is still being loaded.
    #[error("the model is still being loaded: try again in a moment")]
    Loading,

    /// The server is shutting down.
    #[error("the server is shutting down: send the request to another one")]
    Draining,

    /// More requests than the server takes.
    #[error("too many requests: {limit} run or wait already. Try again in {retry_after_seconds} s")]
    TooManyRequests {
        /// Requests that the server takes at once.
        limit: usize,
        /// When there should be room again, in seconds.
        retry_after_seconds: u32,
    },

    /// Something that should not happen happened.
    #[error("internal error: {0}. This is a defect of the program: please report it")]
    Internal(String),
}

impl QuireError {
    /// The exit code of a command that ended with this error: 2 for wrong usage, 1 for everything else.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            QuireError::Config { .. }
            | QuireError::CollectionName { .. }
            | QuireError::InvalidParameter { .. }
            | QuireError::UnsupportedParameter { .. }
            | QuireError::Engine(EngineError::Sampling { .. } | EngineError::RequestSetting { .. })
            | QuireError::Eval(eval::EvalError::Engine(EngineError::Sampling { .. }))
            | QuireError::Eval(eval::EvalError::BadOption { .. } | eval::EvalError::UnknownName { .. }) => 2,
            _ => 1,
        }
    }

    /// For attempts to write below the data folder.
    pub(crate) fn writing(path: impl Into<PathBuf>, source: std::io::Error) -> QuireError {
        QuireError::DataDir { path: path.into(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_and_failure_have_different_exit_codes() {
        assert_eq!(QuireError::CollectionName { found: "..".into() }.exit_code(), 2);
        assert_eq!(QuireError::Loading.exit_code(), 1);
        assert_eq!(QuireError::Engine(EngineError::Cancelled).exit_code(), 1);
    }

    #[test]
    fn a_missing_collection_lists_those_there_are() {
        let error = QuireError::UnknownCollection { name: "b".into(), known: vec!["a".into(), "c".into()] };
        assert!(error.to_string().contains("there are: a, c. Make it with `quire ingest PATH --collection b`"));
    }
}
