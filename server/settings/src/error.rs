//! Everything that can go wrong, each with what was expected, what came and what to do; and the exit codes.

use std::net::SocketAddr;
use std::path::PathBuf;

use chunk_cache::StoreError;
use engine::EngineError;

use documents::DocumentsError;
use hub::HubError;

/// This crate's result type.
pub type Result<T, E = QuireError> = std::result::Result<T, E>;

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

    /// A model of the hub is not there or cannot be fetched.
    #[error(transparent)]
    Hub(#[from] HubError),

    /// A document cannot be read, or the data folder or a collection fails.
    #[error(transparent)]
    Documents(DocumentsError),

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

    /// Some documents or folders of an ingest could not be read; the others were.
    #[error("{failed} of {total} documents could not be ingested (named above); the others are safe")]
    DocumentsFailed {
        /// How many failed; a folder counts as one.
        failed: usize,
        /// Out of how many.
        total: usize,
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

    /// A request names something that is not there.
    #[error("no {what} has the id `{id}`: it never existed, was deleted, or has expired")]
    NotFound {
        /// What it would be.
        what: &'static str,
        /// The id.
        id: String,
        /// Where the request names it.
        param: String,
    },

    /// A file is larger than those that are taken.
    #[error("expected a file of at most {limit} bytes; split it, or raise upload_limit_bytes")]
    UploadTooLarge {
        /// Bytes that a file may have.
        limit: u64,
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

    /// The data folder belongs to another process.
    #[error(
        "data folder {} is in use by {by}: {why}. Stop that one, or choose another folder with --data-dir", path.display()
    )]
    FolderInUse {
        /// The folder.
        path: PathBuf,
        /// Who has it.
        by: String,
        /// Why it must be free, or cannot be used together.
        why: String,
    },

    /// The running server is another version of the program.
    #[error(
        "the running server (process id {pid}) is quire {found}, this is {own}: they do not understand each other. Stop it \
         and start it anew with this version, or use the quire that it was started with"
    )]
    OtherVersion {
        /// The server's process id.
        pid: u32,
        /// Its version.
        found: String,
        /// This program's.
        own: &'static str,
    },

    /// The running server went away, or does not make sense.
    #[error(
        "the running server (process id {pid}) did not complete the command: {why}. What it had reported is done and kept; \
         run the command again"
    )]
    ServerLost {
        /// Its process id.
        pid: u32,
        /// What happened.
        why: String,
    },

    /// What the running server said of a command that failed there.
    #[error("{message}")]
    Told {
        /// In its words.
        message: String,
        /// The exit code of the command.
        exit_code: u8,
        /// Whether it could not read a document.
        unreadable: bool,
    },

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

impl From<DocumentsError> for QuireError {
    fn from(error: DocumentsError) -> QuireError {
        match error {
            DocumentsError::Cancelled => EngineError::Cancelled.into(),
            error => QuireError::Documents(error),
        }
    }
}

impl QuireError {
    /// The exit code of a command that ended with this error: 2 for wrong usage, 1 for everything else.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            QuireError::Told { exit_code, .. } => *exit_code,
            QuireError::Config { .. }
            | QuireError::Documents(DocumentsError::CollectionName { .. })
            | QuireError::InvalidParameter { .. }
            | QuireError::UnsupportedParameter { .. }
            | QuireError::Engine(EngineError::Sampling { .. } | EngineError::RequestSetting { .. }) => 2,
            _ => 1,
        }
    }

    /// The message, with the reasons behind it that its text does not name itself.
    #[must_use]
    pub fn full_message(&self) -> String {
        full_message(self)
    }

    /// For attempts to write below the data folder.
    #[must_use]
    pub fn writing(path: impl Into<PathBuf>, source: std::io::Error) -> QuireError {
        DocumentsError::writing(path, source).into()
    }
}

/// The message of an error, with the reasons behind it that its text does not name itself.
#[must_use]
pub fn full_message(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(reason) = source {
        let text = reason.to_string();
        if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        source = reason.source();
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_and_failure_have_different_exit_codes() {
        assert_eq!(QuireError::from(DocumentsError::CollectionName { found: "..".into() }).exit_code(), 2);
        assert_eq!(QuireError::Loading.exit_code(), 1);
        assert_eq!(QuireError::Engine(EngineError::Cancelled).exit_code(), 1);
    }
}
