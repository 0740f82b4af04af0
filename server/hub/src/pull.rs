//! Fetches a model: the description first, then what is small, then the weights.

use std::path::PathBuf;

use engine::ModelSpec;
use serde::Serialize;

use super::cache::HubCache;
use super::client::Client;
use super::config::HubConfig;
use super::download::download;
use super::files::{BESIDE_WEIGHTS, INDEX, REQUIRED, SINGLE, shards};
use super::id::ModelId;
use crate::error::{HubError, Result};

/// How a file came to be in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FileState {
    /// It was there.
    Cached,
    /// It was fetched.
    Fetched,
    /// The rest of it was fetched.
    Resumed,
}

/// What happens during a pull, in order.
#[derive(Debug)]
pub enum PullEvent<'a> {
    /// A file begins to come; `done` bytes of it are there from before.
    Begin {
        /// Its name.
        name: &'a str,
        /// Its bytes.
        size: u64,
        /// Bytes that are there.
        done: u64,
    },
    /// Some of it has come.
    Progress {
        /// Its name.
        name: &'a str,
        /// Its bytes.
        size: u64,
        /// Bytes that are there.
        done: u64,
    },
    /// Another process fetches it; its end is waited for.
    Waiting {
        /// Its name.
        name: &'a str,
    },
    /// The connection broke; it goes on in a moment.
    Retry {
        /// The file's name.
        name: &'a str,
        /// Why it broke.
        problem: &'a str,
    },
    /// A file is in the cache, verified.
    File(&'a PulledFile),
}

/// A file of a model in the cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PulledFile {
    /// Its name.
    pub name: String,
    /// Its bytes.
    pub bytes: u64,
    /// How it came there.
    pub state: FileState,
}

/// A model in the cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pulled {
    /// Its folder.
    pub folder: PathBuf,
    /// The commit that its revision names; the folder's name.
    pub commit: String,
    /// Its files. Offline: those that are there.
    pub files: Vec<PulledFile>,
}

/// Sees to it that the cache has a model: its newest state, or offline any.
///
/// Weights are fetched last, once the engine has found that it runs a model of this description.
///
/// # Errors
/// [`HubError`] for everything between here and the hub; the engine's error for a model that it does not run; the
/// system's for a cache that cannot be written.
pub fn pull(config: &HubConfig, id: &ModelId, on_event: &mut dyn FnMut(PullEvent<'_>)) -> Result<Pulled> {
    let cache = config.cache();
    if config.offline {
        return offline(cache.find(id, true)?);
    }
    let client = Client::new(config, id);
    let revision = client.revision()?;
    let commit = revision.commit;
    let has = |name: &str| revision.files.iter().any(|file| file == name);
    let lacks = |missing: &str| HubError::WrongFormat { id: id.to_string(), missing: missing.into() };
    if let Some(missing) = BESIDE_WEIGHTS[..REQUIRED].iter().find(|name| !has(name)) {
        return Err(lacks(missing));
    }
    if !has(SINGLE) && !has(INDEX) {
        return Err(lacks(SINGLE));
    }
    let folder = cache.snapshot(id, &commit);
    let mut pulling = Pulling { client, cache, id, commit: &commit, files: Vec::new(), on_event };
    for name in BESIDE_WEIGHTS.into_iter().filter(|name| has(name)) {
        pulling.file(name)?;
    }
    // Before gigabytes are fetched that nothing here can use.
    ModelSpec::from_dir(&folder)?;
    if has(SINGLE) {
        pulling.file(SINGLE)?;
    } else {
        pulling.file(INDEX)?;
        for shard in shards(&folder.join(INDEX))? {
            if !has(&shard) {
                return Err(lacks(&shard));
            }
            pulling.file(&shard)?;
        }
    }
    pulling.cache.set_reference(id, &commit)?;
    let files = pulling.files;
    Ok(Pulled { folder, commit, files })
}

struct Pulling<'a> {
    client: Client,
    cache: HubCache,
    id: &'a ModelId,
    commit: &'a str,
    files: Vec<PulledFile>,
    on_event: &'a mut dyn FnMut(PullEvent<'_>),
}

impl Pulling<'_> {
    fn file(&mut self, name: &str) -> Result<()> {
        let remote = self.client.describe(self.commit, name)?;
        let state = download(&self.client, &self.cache, self.id, &remote, self.on_event)?;
        self.cache.link(self.id, self.commit, name, &remote.etag)?;
        let file = PulledFile { name: name.into(), bytes: remote.size, state };
        (self.on_event)(PullEvent::File(&file));
        self.files.push(file);
        Ok(())
    }
}

/// What is in the cache.
fn offline(folder: PathBuf) -> Result<Pulled> {
    let mut names: Vec<String> = BESIDE_WEIGHTS.map(Into::into).to_vec();
    if folder.join(SINGLE).is_file() {
        names.push(SINGLE.into());
    } else {
        names.push(INDEX.into());
        names.extend(shards(&folder.join(INDEX))?);
    }
    let file = |name: String| {
        let bytes = std::fs::metadata(folder.join(&name)).ok()?.len();
        Some(PulledFile { name, bytes, state: FileState::Cached })
    };
    let files = names.into_iter().filter_map(file).collect();
    let commit = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(Pulled { folder, commit, files })
}
