//! What whoever works for a command tells whoever asked: everything that is printed rests on these.

use documents::{DocumentsError, Found, Span};
use serde::{Deserialize, Serialize};

use crate::store::Origin;
use crate::{Answer, DocumentState, DocumentsEvent, IngestEvent, IngestReport};
use settings::QuireError;

/// Something that happened. The order is that of the command; results come before the command ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The model is being loaded; the command waits for it.
    Loading,
    /// A remark for people.
    Note(String),
    /// A passage that was found.
    Hit(Found),
    /// The oldest turns of the conversation made way, so many.
    Forgotten(usize),
    /// An answer begins; what its reader should know before.
    Begun {
        /// Remarks; those of the complete answer begin with these.
        notes: Vec<String>,
    },
    /// More of the answer.
    Text(String),
    /// The complete answer.
    Answered(Box<Answer>),
    /// The same question with everything computed anew.
    Recomputed(Box<Answer>),
    /// Progress of an ingest.
    Ingest(IngestProgress),
    /// The end of an ingest.
    Ingested(IngestReport),
    /// Of documents and collections.
    Documents(DocumentsEvent),
    /// Of the chunk store.
    Cache(CacheEvent),
    /// Of the catalog as a whole.
    Catalog(CatalogEvent),
}

/// Progress of an ingest. What it names is on disk, but for what failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IngestProgress {
    /// A chunk is on disk.
    Chunk {
        /// Its name in the store.
        key: String,
        /// Its document.
        document: String,
        /// Where in the document.
        span: Span,
        /// Its tokens.
        tokens: usize,
        /// Whether it had to be computed.
        computed: bool,
        /// Chunks of its document that are on disk by now.
        done: usize,
        /// Chunks of its document.
        total: usize,
    },
    /// A document is on disk and can be found.
    Document {
        /// The document.
        document: String,
        /// Whether anything had to be done.
        state: DocumentState,
        /// Its chunks.
        chunks: usize,
        /// How many of them had to be computed.
        computed: usize,
        /// Documents dealt with so far.
        done: usize,
        /// Documents in all.
        total: usize,
    },
    /// A document's file is gone, and so is its name from the collection.
    Removed {
        /// The document.
        document: String,
    },
    /// A path that was to be synced is not there: nothing below it was removed.
    Kept {
        /// The path.
        path: String,
        /// Documents of the collection whose files were there or below.
        documents: usize,
    },
    /// A document or folder could not be ingested.
    Failed {
        /// The document or folder.
        document: String,
        /// Why.
        error: String,
        /// Whether whoever worked could not read it.
        unreadable: bool,
    },
}

impl From<&IngestEvent<'_>> for IngestProgress {
    fn from(event: &IngestEvent<'_>) -> IngestProgress {
        match *event {
            IngestEvent::Chunk { key, path, span, tokens, origin, done, total } => IngestProgress::Chunk {
                key: key.to_string(),
                document: path.to_string_lossy().into(),
                span,
                tokens,
                computed: origin == Origin::Computed,
                done,
                total,
            },
            IngestEvent::Document { path, state, chunks, computed, done, total } => {
                let document = path.to_string_lossy().into();
                IngestProgress::Document { document, state, chunks, computed, done, total }
            }
            IngestEvent::Removed { path } => IngestProgress::Removed { document: path.to_string_lossy().into() },
            IngestEvent::Kept { path, documents } => {
                IngestProgress::Kept { path: path.to_string_lossy().into(), documents }
            }
            IngestEvent::Failed { path, error } => IngestProgress::Failed {
                document: path.to_string_lossy().into(),
                error: error.to_string(),
                unreadable: is_unreadable(error),
            },
        }
    }
}

fn is_unreadable(error: &DocumentsError) -> bool {
    use std::io::ErrorKind::{NotFound, PermissionDenied};
    matches!(error, DocumentsError::Io { source, .. } if matches!(source.kind(), NotFound | PermissionDenied))
}

/// What is told of the chunk store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheEvent {
    /// There is no store yet.
    Absent {
        /// Where it would be.
        dir: String,
    },
    /// Totals.
    Stats(CacheTotals),
    /// A chunk.
    Chunk(ListedChunk),
    /// A chunk does not match its checksums.
    Damaged {
        /// Its key.
        key: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// Everything was read.
    Verified {
        /// Chunks.
        chunks: u64,
        /// Bytes that were right.
        bytes: u64,
        /// Keys of damaged chunks, each told before.
        damaged: Vec<String>,
        /// Parts that cannot be read and belong to no chunk in particular.
        unreadable: Vec<String>,
        /// Whether what is damaged was removed.
        repaired: bool,
    },
    /// Chunks were removed.
    Removed {
        /// How many.
        removed: u64,
        /// Chunks that are left.
        chunks: u64,
        /// Their bytes.
        payload_bytes: u64,
    },
    /// All chunks were removed.
    Cleared {
        /// How many.
        removed: u64,
    },
}

/// What is told of the catalog.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CatalogEvent {
    /// There is no catalog yet.
    Absent {
        /// Where it would be.
        dir: String,
    },
    /// Something of a document is damaged.
    Damaged {
        /// The names that it is known by.
        name: String,
        /// Its id.
        id: String,
        /// What is wrong.
        problem: String,
        /// Whether it can be saved.
        is_saved: bool,
    },
    /// A document was lost before, and has not come in again.
    Missing {
        /// What it was known by.
        name: String,
        /// Its id.
        id: String,
    },
    /// Something else is damaged.
    Problem {
        /// What.
        what: String,
    },
    /// Everything was read.
    Verified(CatalogTotals),
}

/// What was found of the catalog, all told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CatalogTotals {
    /// Documents that are whole or can be made whole.
    pub documents: u64,
    /// Their passages.
    pub passages: u64,
    /// Bytes of their texts.
    pub bytes: u64,
    /// Documents of which something is damaged.
    pub damaged: usize,
    /// Of these, those that cannot be saved.
    pub lost: usize,
    /// Documents that were lost before.
    pub missing: usize,
    /// What else is damaged, indexes included.
    pub problems: usize,
    /// References that are missing or superfluous.
    pub references: u64,
    /// Whether nothing is damaged.
    pub clean: bool,
    /// Whether the catalog was written anew.
    pub repaired: bool,
}

/// Totals over the chunk store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheTotals {
    /// Chunks.
    pub chunks: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Bytes of their keys and values.
    pub payload_bytes: u64,
    /// Bytes that they may have.
    pub byte_budget: u64,
    /// Bytes of the store's files.
    pub disk_bytes: u64,
    /// Uses of chunks.
    pub hits: u64,
    /// Damaged chunks.
    pub damaged: u64,
    /// Bytes of removed chunks that are not free yet.
    pub dead_bytes: u64,
    /// Chunks that made way since the store was opened.
    pub evicted: u64,
    /// One a model whose chunks are or were stored.
    pub models: Vec<ModelShare>,
    /// Whether somebody has the store open for writing.
    pub in_use: bool,
}

/// What the store holds of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelShare {
    /// The model's name.
    pub name: String,
    /// The layout of its chunks.
    pub layout: String,
    /// Its chunks.
    pub chunks: u64,
    /// Their bytes.
    pub payload_bytes: u64,
}

/// A chunk of the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedChunk {
    /// Its key.
    pub key: String,
    /// Its tokens.
    pub tokens: u32,
    /// Bytes of its keys and values.
    pub payload_bytes: u64,
    /// When it was stored.
    pub created_unix: u64,
    /// When it was used last.
    pub last_used_unix: u64,
    /// How often.
    pub hits: u64,
    /// Whether no document refers to it any more.
    pub demoted: bool,
    /// The name of its model.
    pub model: String,
}

/// Why a command failed, as it is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// For people.
    pub message: String,
    /// The exit code of the command.
    pub exit_code: u8,
    /// Whether a document could not be read by whoever worked.
    pub unreadable: bool,
}

impl From<&QuireError> for Failure {
    fn from(error: &QuireError) -> Failure {
        let unreadable = matches!(error, QuireError::Documents(error) if is_unreadable(error));
        Failure { message: error.full_message(), exit_code: error.exit_code(), unreadable }
    }
}
