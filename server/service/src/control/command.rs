//! What the command line asks for, as data: the same whether it is done here or by a server.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use documents::LanguageSetting;
use engine::{AttentionConfig, BlendConfig};
use serde::{Deserialize, Serialize};

use crate::{Conversation, DocumentsCommand, IngestOptions, Options};
use settings::{GenerationSource, Named, Result, Settings};

/// A use case of the command line. What came from settings of whoever asks travels with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// Find passages by their words.
    Search {
        /// Where.
        passages: Retrieval,
        /// What to look for.
        query: String,
    },
    /// Answer a question over a collection.
    Ask {
        /// The question.
        question: String,
        /// Over which passages.
        passages: Retrieval,
        /// How.
        answering: AnswerSettings,
        /// Also with everything computed anew.
        compare: bool,
    },
    /// Say whether the model takes a conversation: some know no instructions.
    CheckConversation {
        /// The conversation.
        conversation: Conversation,
        /// Whether it is over documents.
        over_documents: bool,
    },
    /// Answer the next question of a conversation, which whoever asks keeps.
    Turn {
        /// What was said before.
        conversation: Conversation,
        /// The question.
        question: String,
        /// Over which passages; `None`: the model alone.
        passages: Option<Retrieval>,
        /// How.
        answering: AnswerSettings,
    },
    /// Read documents into a collection.
    Ingest {
        /// The collection.
        collection: String,
        /// Files and folders, absolute.
        paths: Vec<ExactPath>,
        /// How.
        options: IngestOptions,
        /// The budget that the chunk store gets for good, in bytes.
        cache_bytes: Option<u64>,
    },
    /// List, remove or restore documents and collections.
    Documents(DocumentsCommand),
    /// Look into the chunk store, or remove chunks from it.
    Cache(CacheCommand),
    /// Compare the catalog with its checksums, or write it anew.
    Catalog(CatalogCommand),
}

/// Which passages a question is answered from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retrieval {
    /// The collection that is searched.
    pub collection: String,
    /// Passages at most.
    pub top_chunks: usize,
}

impl Retrieval {
    /// As the settings say.
    #[must_use]
    pub fn from_settings(settings: &Settings) -> Retrieval {
        Retrieval { collection: settings.collection.clone(), top_chunks: settings.top_chunks }
    }
}

/// What can be done with the chunk store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum CacheCommand {
    /// Count.
    Stats,
    /// List all chunks.
    List,
    /// Compare everything with its checksums.
    Verify {
        /// Remove what is damaged.
        repair: bool,
    },
    /// Remove these chunks, by their keys.
    Remove {
        /// Their keys, as text.
        keys: Vec<String>,
    },
    /// Remove chunks, in the order of --cache-policy, until so many bytes are left.
    Shrink {
        /// Bytes of payload that may stay.
        to_bytes: u64,
    },
    /// Remove all chunks.
    Clear,
}

/// What can be done with the catalog as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum CatalogCommand {
    /// Compare everything with its checksums, hashes and references.
    Verify,
    /// Write it anew from what is whole.
    Repair {
        /// With an empty one where nothing can be saved.
        anew: bool,
    },
}

/// How answers are made, as far as whoever asks decides it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnswerSettings {
    /// Tokens of an answer at most; 0: until the text or the context ends.
    pub max_tokens: usize,
    /// Temperature; `None`: the model's own.
    pub temperature: Option<f32>,
    /// Sampling that the model comes with, or none.
    pub generation_config: Named<GenerationSource>,
    /// How decoding attends.
    pub attention: AttentionConfig,
    /// What becomes of cached chunks.
    pub blend: BlendConfig,
}

impl AnswerSettings {
    /// As the settings say.
    #[must_use]
    pub fn from_settings(settings: &Settings) -> AnswerSettings {
        AnswerSettings {
            max_tokens: settings.max_tokens,
            temperature: settings.temperature,
            generation_config: settings.generation_config,
            attention: settings.attention(),
            blend: settings.blending(),
        }
    }

    /// The options of an answer of the model that `settings` name.
    ///
    /// # Errors
    /// See [`Settings::sampling`].
    pub fn options(&self, settings: &Settings) -> Result<Options> {
        let own = Settings {
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            generation_config: self.generation_config,
            ..settings.clone()
        };
        let options = Options::from_settings(&own)?;
        Ok(Options { attention: self.attention.clone(), blend: self.blend.clone(), ..options })
    }
}

/// What must be open for a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// The data folder, to look into it: this can be done beside whoever writes there.
    Look,
    /// The data folder, for oneself.
    Write,
    /// The model alone.
    Model,
    /// Model and data folder, to answer.
    Answers,
    /// Model and data folder, to ingest.
    Ingest,
    /// The data folder, to remove documents for good; the model, too, where there are chunks, whose keys depend on it.
    Purge,
}

/// What a command writes of documents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteAccess {
    /// Into which collection; `None`: into none in particular.
    pub collection: Option<String>,
    /// Whether it changes the collection as a whole, so that nobody else may write there.
    pub alone: bool,
    /// Whether it changes which collections can be restored: one such command at a time.
    pub removed: bool,
    /// Whether documents come in, which takes memory.
    pub ingests: bool,
}

impl WriteAccess {
    /// What has to be locked, in an order that is the same for all commands, and whether for this one alone.
    #[must_use]
    pub fn in_order(&self) -> Vec<(&str, bool)> {
        // No collection is called by nothing.
        let removed = self.removed.then_some(("", true));
        removed.into_iter().chain(self.collection.as_deref().map(|name| (name, self.alone))).collect()
    }

    /// In words.
    #[must_use]
    pub fn what(&self) -> String {
        match &self.collection {
            Some(collection) => format!("collection `{collection}`"),
            None => "all that was removed".into(),
        }
    }
}

impl Command {
    /// What must be open for it.
    #[must_use]
    pub fn need(&self) -> Need {
        match self {
            Command::Search { .. } => Need::Look,
            Command::Ask { .. } => Need::Answers,
            Command::CheckConversation { over_documents: true, .. } | Command::Turn { passages: Some(_), .. } => {
                Need::Answers
            }
            Command::CheckConversation { .. } | Command::Turn { .. } => Need::Model,
            Command::Ingest { .. } => Need::Ingest,
            Command::Documents(
                DocumentsCommand::List { .. } | DocumentsCommand::Collections | DocumentsCommand::Removed,
            ) => Need::Look,
            Command::Documents(DocumentsCommand::Remove { now: true, .. } | DocumentsCommand::Reclaim) => Need::Purge,
            Command::Documents(_) => Need::Write,
            Command::Cache(CacheCommand::Stats | CacheCommand::List) => Need::Look,
            Command::Cache(_) | Command::Catalog(_) => Need::Write,
        }
    }

    /// Its name, for logs and metrics.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Command::Search { .. } => "search",
            Command::Ask { .. } => "ask",
            Command::CheckConversation { .. } | Command::Turn { .. } => "chat",
            Command::Ingest { .. } => "ingest",
            Command::Documents(DocumentsCommand::List { .. }) => "ls",
            Command::Documents(DocumentsCommand::Collections) => "collections",
            Command::Documents(DocumentsCommand::Rename { .. }) => "collections rename",
            Command::Documents(
                DocumentsCommand::Remove { .. } | DocumentsCommand::Removed | DocumentsCommand::Restore { .. },
            ) => "rm",
            Command::Documents(DocumentsCommand::Reclaim) => "reclaim",
            Command::Cache(CacheCommand::Stats) => "cache stats",
            Command::Cache(CacheCommand::List) => "cache ls",
            Command::Cache(CacheCommand::Verify { .. }) => "cache verify",
            Command::Cache(_) => "cache evict",
            Command::Catalog(_) => "catalog verify",
        }
    }

    /// What it writes of documents; `None`: nothing. `language`: that of the collection of this name, if it is there.
    pub(super) fn write_access(
        &self,
        language: impl FnOnce(&str) -> Result<Option<LanguageSetting>>,
    ) -> Result<Option<WriteAccess>> {
        let whole = |collection: &String, removed| WriteAccess {
            collection: Some(collection.clone()),
            alone: true,
            removed,
            ingests: false,
        };
        Ok(Some(match self {
            Command::Ingest { collection, options, .. } => {
                let alone = match &options.language {
                    // Another language means another index.
                    Some(wanted) => language(collection)?.as_ref() != Some(wanted),
                    None => false,
                };
                WriteAccess { alone, ingests: true, ..whole(collection, false) }
            }
            Command::Documents(
                DocumentsCommand::Remove { collection, names, .. } | DocumentsCommand::Restore { collection, names },
            ) => match names.is_empty() {
                true => whole(collection, true),
                false => WriteAccess { alone: false, ..whole(collection, false) },
            },
            Command::Documents(DocumentsCommand::Rename { collection, .. }) => whole(collection, false),
            Command::Documents(DocumentsCommand::Reclaim) => {
                WriteAccess { collection: None, alone: false, removed: true, ingests: false }
            }
            Command::Catalog(CatalogCommand::Repair { .. }) => {
                WriteAccess { collection: None, alone: true, removed: true, ingests: false }
            }
            _ => return Ok(None),
        }))
    }

    /// Whether it writes an answer, which takes a place in the server's queue.
    #[must_use]
    pub fn answers(&self) -> bool {
        matches!(self, Command::Ask { .. } | Command::Turn { .. })
    }
}

/// A path to the byte: text where it is UTF-8, else its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "WrittenPath", into = "WrittenPath")]
pub struct ExactPath(PathBuf);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum WrittenPath {
    Text(String),
    Bytes(Vec<u8>),
}

impl ExactPath {
    /// What a path means in the current folder: links followed where it is there, else absolute as it is written.
    #[must_use]
    pub fn resolve(path: &Path) -> ExactPath {
        let absolute = || std::path::absolute(path).unwrap_or_else(|_| path.into());
        ExactPath(path.canonicalize().unwrap_or_else(|_| absolute()))
    }

    /// The path.
    #[must_use]
    pub fn as_path(&self) -> &Path {
        &self.0
    }
}

impl From<WrittenPath> for ExactPath {
    fn from(written: WrittenPath) -> ExactPath {
        ExactPath(match written {
            WrittenPath::Text(text) => text.into(),
            WrittenPath::Bytes(bytes) => OsString::from_vec(bytes).into(),
        })
    }
}

impl From<ExactPath> for WrittenPath {
    fn from(path: ExactPath) -> WrittenPath {
        match path.0.to_str() {
            Some(text) => WrittenPath::Text(text.into()),
            None => WrittenPath::Bytes(path.0.as_os_str().as_bytes().to_vec()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_command_is_the_same_behind_the_wire() {
        let settings = Settings { temperature: Some(0.7), ratio: 0.15, top_chunks: 3, ..Settings::default() };
        let (passages, answering) = (Retrieval::from_settings(&settings), AnswerSettings::from_settings(&settings));
        let mut conversation = Conversation::new(Some("Be brief.".into()));
        conversation.add("a \"question\"\n".into(), "an\u{1b} answer".into());
        let odd = ExactPath(OsString::from_vec(b"/tmp/caf\xe9".to_vec()).into());
        let commands = [
            Command::Search { passages: passages.clone(), query: "Żółć".into() },
            Command::Ask { question: "Who?".into(), passages, answering: answering.clone(), compare: true },
            Command::Turn { conversation, question: "Why?".into(), passages: None, answering },
            Command::Ingest {
                collection: "c".into(),
                paths: vec![odd],
                options: IngestOptions::default(),
                cache_bytes: Some(u64::MAX),
            },
            Command::Documents(DocumentsCommand::Remove { collection: "c".into(), names: Vec::new(), now: true }),
            Command::Cache(CacheCommand::Verify { repair: true }),
            Command::Cache(CacheCommand::Clear),
            Command::Catalog(CatalogCommand::Verify),
            Command::Catalog(CatalogCommand::Repair { anew: true }),
        ];
        for command in commands {
            let text = serde_json::to_string(&command).unwrap();
            assert_eq!(serde_json::from_str::<Command>(&text).unwrap(), command, "{text}");
        }
    }

    #[test]
    fn a_command_of_another_build_is_not_half_understood() {
        for text in [r#"{"forget":{}}"#, r#"{"cache":{"verify":{"repair":true,"deep":true}}}"#] {
            assert!(serde_json::from_str::<Command>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_not_there_is_named_by_where_it_would_be() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(ExactPath::resolve(Path::new("not/there")).as_path(), here.join("not/there"));
        assert_eq!(ExactPath::resolve(Path::new(".")).as_path(), here.canonicalize().unwrap());
    }
}
