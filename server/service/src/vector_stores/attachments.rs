//! Files of vector stores as rows of the catalog.
//!
//! An attachment is a row, written before it is acknowledged, so that it survives a restart. What it makes is a
//! document of the store's collection, called by the file's id and name. The document comes before the row that says so,
//! and goes before the row is gone: a crash in between is mended by doing the same again.

use documents::{Attributes, Catalog, DocumentInfo, JobError, JobRecord, RecordKind};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::super::files::{UploadedFile, plain_filename};
use crate::now;
use settings::Result;

/// The kind of the rows of attachments, and what their ids begin with.
const ATTACHMENT: &str = "attachment";
/// Where a document's attributes have those of the files that it is of, by the files' ids: files of one text are one document.
const FILES: &str = "files";

/// How a file of a store stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttachmentState {
    /// It is being read, or waits for that.
    InProgress,
    /// It can be found.
    Completed,
    /// It could not be read.
    Failed,
    /// It was given up before it was read.
    Cancelled,
}

impl AttachmentState {
    /// Its name in OpenAI's API.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            AttachmentState::InProgress => "in_progress",
            AttachmentState::Completed => "completed",
            AttachmentState::Failed => "failed",
            AttachmentState::Cancelled => "cancelled",
        }
    }

    /// The state of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<AttachmentState> {
        let all = [Self::InProgress, Self::Completed, Self::Failed, Self::Cancelled];
        all.into_iter().find(|state| state.name() == name)
    }
}

/// How large the chunks of a file may become, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StaticChunking {
    /// Tokens of a chunk at most.
    pub max_tokens: usize,
    /// Tokens that neighbours share at most.
    pub overlap: usize,
}

/// How a file is cut into chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Chunking {
    /// As the settings say.
    #[default]
    Auto,
    /// As the client says.
    Static(StaticChunking),
    /// As it was when it came in by another way.
    Other,
}

/// A file that is to be attached.
#[derive(Clone, Debug, PartialEq)]
pub struct AttachRequest {
    /// Its id.
    pub file: String,
    /// What the client keeps at it; `None` leaves what there is.
    pub attributes: Option<Attributes>,
    /// How it is cut.
    pub chunking: Chunking,
}

/// A file of a store.
#[derive(Clone, Debug, PartialEq)]
pub struct Attachment {
    /// The store's id.
    pub store: String,
    /// The file's id; the document's where no file was attached.
    pub file: String,
    /// The file's name.
    pub filename: String,
    /// How it stands.
    pub state: AttachmentState,
    /// When it was attached, in seconds since 1970.
    pub created: u64,
    /// Why it failed.
    pub last_error: Option<JobError>,
    /// Bytes of its text, once it is completed.
    pub bytes: u64,
    /// What the client keeps at it.
    pub attributes: Attributes,
    /// How it is cut.
    pub chunking: Chunking,
}

/// What a row has beside the usual fields.
#[derive(Serialize, Deserialize)]
struct Detail {
    filename: String,
    #[serde(default)]
    attributes: Attributes,
    #[serde(default)]
    chunking: Chunking,
}

impl Attachment {
    pub(super) fn new(store: &str, file: &UploadedFile, request: &AttachRequest) -> Attachment {
        Attachment {
            store: store.into(),
            file: file.id.clone(),
            filename: file.filename.clone(),
            state: AttachmentState::InProgress,
            created: now(),
            last_error: None,
            bytes: 0,
            attributes: request.attributes.clone().unwrap_or_default(),
            chunking: request.chunking,
        }
    }

    pub(super) fn record(&self) -> JobRecord {
        let detail =
            Detail { filename: self.filename.clone(), attributes: self.attributes.clone(), chunking: self.chunking };
        JobRecord {
            id: key(&self.store, &self.file),
            kind: ATTACHMENT.into(),
            state: self.state.name().into(),
            created: self.created,
            expires: None,
            done: self.bytes,
            total: self.bytes,
            last_error: self.last_error.clone(),
            detail: serde_json::to_value(detail).unwrap_or_default(),
        }
    }

    pub(super) fn from_record(record: &JobRecord) -> Option<Attachment> {
        let mut parts = record.id.split('/').skip(1);
        let detail: Detail = serde_json::from_value(record.detail.clone()).ok()?;
        Some(Attachment {
            store: parts.next()?.into(),
            file: parts.next()?.into(),
            filename: detail.filename,
            state: AttachmentState::named(&record.state)?,
            created: record.created,
            last_error: record.last_error.clone(),
            bytes: record.done,
            attributes: detail.attributes,
            chunking: detail.chunking,
        })
    }

    /// A document that came in by another way.
    pub(super) fn of_document(store: &str, document: &DocumentInfo) -> Attachment {
        let file = document.id.to_string();
        Attachment {
            store: store.into(),
            filename: plain_filename(document),
            state: AttachmentState::Completed,
            created: document.created,
            last_error: None,
            bytes: document.bytes,
            attributes: attributes_of(document, &file),
            chunking: Chunking::Other,
            file,
        }
    }

    /// What its document is called.
    pub(super) fn document_name(&self) -> String {
        format!("{}/{}", self.file, self.filename)
    }
}

/// The id of the row of a file of a store; of no file: what those of all begin with.
pub(super) fn key(store: &str, file: &str) -> String {
    format!("{ATTACHMENT}/{store}/{file}")
}

/// What a client keeps at a file, where that has become a document.
pub(super) fn attributes_of(document: &DocumentInfo, file: &str) -> Attributes {
    let kept = document.attributes.get(FILES).and_then(|files| files.get(file));
    kept.and_then(Value::as_object).cloned().unwrap_or_default()
}

/// The attributes of a document with those of one of its files, or without them.
pub(super) fn with_attributes(mut all: Attributes, file: &str, kept: Option<&Attributes>) -> Attributes {
    let files = all.entry(FILES).or_insert_with(|| Value::Object(Map::new()));
    if let Value::Object(files) = files {
        match kept {
            Some(kept) => files.insert(file.into(), Value::Object(kept.clone())),
            None => files.remove(file),
        };
    }
    all
}

/// What every row of an attachment begins with.
pub(super) fn all_keys() -> String {
    format!("{ATTACHMENT}/")
}

/// A file that was attached to a store.
pub(super) fn find(catalog: &Catalog, store: &str, file: &str) -> Result<Option<Attachment>> {
    Ok(catalog.record(RecordKind::Job, &key(store, file))?.as_ref().and_then(Attachment::from_record))
}

/// A file that was attached to a store and waits to be read.
pub(super) fn find_waiting(catalog: &Catalog, store: &str, file: &str) -> Result<Option<Attachment>> {
    Ok(find(catalog, store, file)?.filter(|found| found.state == AttachmentState::InProgress))
}
