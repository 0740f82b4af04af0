//! What can go wrong with a model of the hub.

use std::path::PathBuf;

/// This crate's result type.
pub type Result<T> = std::result::Result<T, HubError>;

/// What can go wrong between a name and a model's folder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// The model was never fetched.
    #[error(
        "model `{id}`: expected a folder, or a model of the hub that is in the cache at {}, found neither. Fetch it with \
         `quire pull {id}`{}, or correct the path", cache.display(), unset(*offline)
    )]
    NotInCache {
        /// What was asked for.
        id: String,
        /// Where was looked.
        cache: PathBuf,
        /// Whether fetching is forbidden.
        offline: bool,
    },

    /// The model was fetched in part.
    #[error(
        "model `{id}`: {} lacks {missing}. Complete it with `quire pull {id}`{}", folder.display(), unset(*offline)
    )]
    Incomplete {
        /// What was asked for.
        id: String,
        /// The snapshot.
        folder: PathBuf,
        /// The first file that is not there.
        missing: String,
        /// Whether fetching is forbidden.
        offline: bool,
    },

    /// The model's owner gives it to those who accept its licence.
    #[error("model `{id}` is gated: {}", gated(page, *with_token))]
    Gated {
        /// What was asked for.
        id: String,
        /// Its page.
        page: String,
        /// Whether a token was sent.
        with_token: bool,
    },

    /// The hub says neither that the model exists nor that it does not.
    #[error(
        "model `{id}`: the hub refuses access (status {status}): there is no such model, or it is private or gated. Check \
         the spelling; else accept the licence at {page} and set HF_TOKEN to a token of an account that may read it{}",
        if *with_token { " (the one that was sent may not)" } else { "" }
    )]
    Denied {
        /// What was asked for.
        id: String,
        /// Its page.
        page: String,
        /// The status.
        status: u16,
        /// Whether a token was sent.
        with_token: bool,
    },

    /// There is no such model, or it has no such revision.
    #[error("model `{id}`: {page} has no {what} of this name. Check the spelling")]
    NotFound {
        /// What was asked for.
        id: String,
        /// Its page.
        page: String,
        /// `model`, `revision` or `file`.
        what: &'static str,
    },

    /// The model is not in the format that is read.
    #[error(
        "model `{id}` has no {missing}: expected config.json, tokenizer.json and weights as safetensors. Choose another \
         model, or one converted to this format"
    )]
    WrongFormat {
        /// What was asked for.
        id: String,
        /// What it lacks.
        missing: String,
    },

    /// The hub answered with a status that is none of the above.
    #[error("{url} answers with status {status}. Try again later; check HF_ENDPOINT if it is set")]
    Status {
        /// What was asked for.
        url: String,
        /// The status.
        status: u16,
    },

    /// The hub could not be reached, or went away.
    #[error(
        "cannot fetch {url}: {problem}. Check the network and HF_ENDPOINT, then run the command again: it goes on where it \
         stopped"
    )]
    Network {
        /// What was asked for.
        url: String,
        /// The reason.
        problem: String,
    },

    /// The hub sent something that is not what the hub sends.
    #[error("{url}: expected {expected}, found {found}. Is HF_ENDPOINT the address of a hub?")]
    Protocol {
        /// What was asked for.
        url: String,
        /// What the protocol says.
        expected: &'static str,
        /// What came.
        found: String,
    },

    /// A name that came from the hub would leave the model's folder.
    #[error("{origin} names the file `{name}`: expected the name of a file in the model's folder. It is refused")]
    FileName {
        /// Who named it.
        origin: String,
        /// The name.
        name: String,
    },

    /// What was fetched is not what was announced.
    #[error(
        "{file}: expected {expected}, found {found}. What was fetched is discarded: run the command again. If that does not \
         help, the file is damaged on the hub"
    )]
    Corrupt {
        /// The file.
        file: String,
        /// The hub's size or hash.
        expected: String,
        /// The size or hash of what came.
        found: String,
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

    /// A model's configuration is none that the engine knows.
    #[error(transparent)]
    Model(#[from] engine::EngineError),
}

fn unset(offline: bool) -> &'static str {
    if offline { ", without HF_HUB_OFFLINE, which is set" } else { "" }
}

fn gated(page: &str, with_token: bool) -> String {
    if with_token {
        format!(
            "the account of the token that was sent (HF_TOKEN) has not been granted access. Accept the licence at {page}"
        )
    } else {
        format!("accept its licence at {page}, then set HF_TOKEN to a token of that account")
    }
}
