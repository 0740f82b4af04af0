//! Files that were attached to a vector store together.

use documents::{JobRecord, RecordKind};
use serde_json::json;

use super::super::ids::{is_id, new_id};
use super::{AttachRequest, Attachment, AttachmentState, FileCounts, Page, PageRequest, Service};
use crate::now;
use settings::{QuireError, Result};

/// What an id of a batch begins with.
const BATCH_PREFIX: &str = "vsfb_";
/// The kind of the rows of batches, and what their ids begin with.
const BATCH: &str = "batch";

/// Files that were attached together.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Its id.
    pub id: String,
    /// The store's id.
    pub store: String,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// How it stands as a whole.
    pub state: AttachmentState,
    /// Its files, as far as they are still in the store.
    pub files: FileCounts,
}

fn key(store: &str, batch: &str) -> String {
    format!("{}{batch}", batches_of(store))
}

/// What the ids of the rows of a store's batches begin with.
pub(super) fn batches_of(store: &str) -> String {
    format!("{BATCH}/{store}/")
}

/// The ids of a batch's files.
fn files_of(record: &JobRecord) -> Vec<String> {
    let files = record.detail["files"].as_array().into_iter().flatten();
    files.filter_map(|file| file.as_str().map(str::to_string)).collect()
}

impl Service {
    /// Attaches files together.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn attach_batch(&self, store: &str, requests: &[(String, AttachRequest)]) -> Result<Batch> {
        let attachments = self.attach(store, requests)?;
        let files: Vec<&str> = attachments.iter().map(|attachment| attachment.file.as_str()).collect();
        let id = new_id(BATCH_PREFIX);
        let record = JobRecord {
            id: key(store, &id),
            kind: BATCH.into(),
            state: AttachmentState::InProgress.name().into(),
            created: now(),
            expires: None,
            done: 0,
            total: files.len() as u64,
            last_error: None,
            detail: json!({"files": files}),
        };
        self.library.writable()?.put_record(RecordKind::Job, &record)?;
        self.batch(store, &id)
    }

    /// A batch of a store.
    ///
    /// # Errors
    /// [`QuireError::NotFound`]; a failing catalog.
    pub fn batch(&self, store: &str, id: &str) -> Result<Batch> {
        let record = self.batch_record(store, id)?;
        let mut files = FileCounts::default();
        self.batch_files(store, &record)?.iter().for_each(|attachment| files.count(attachment.state));
        let cancelled = record.state == AttachmentState::Cancelled.name();
        let state = match files {
            FileCounts { in_progress: 1.., .. } => AttachmentState::InProgress,
            _ if cancelled => AttachmentState::Cancelled,
            FileCounts { failed, total: total @ 1.., .. } if failed == total => AttachmentState::Failed,
            _ => AttachmentState::Completed,
        };
        Ok(Batch { id: id.into(), store: store.into(), created: record.created, state, files })
    }

    /// A page of the files of a batch.
    ///
    /// # Errors
    /// As [`batch`](Self::batch).
    pub fn files_of_batch(
        &self,
        store: &str,
        id: &str,
        state: Option<AttachmentState>,
        page: &PageRequest,
    ) -> Result<Page<Attachment>> {
        let mut files = self.batch_files(store, &self.batch_record(store, id)?)?;
        files.retain(|attachment| state.is_none_or(|state| attachment.state == state));
        Ok(page.of(files, |attachment: &Attachment| &attachment.file))
    }

    /// Gives up the files of a batch that have not been read yet.
    ///
    /// # Errors
    /// As [`batch`](Self::batch); those of a failed write.
    pub fn cancel_batch(&self, store: &str, id: &str) -> Result<Batch> {
        let mut record = self.batch_record(store, id)?;
        if self.batch(store, id)?.state == AttachmentState::InProgress {
            record.state = AttachmentState::Cancelled.name().into();
            self.library.writable()?.put_record(RecordKind::Job, &record)?;
            self.cancel(store, &files_of(&record))?;
        }
        self.batch(store, id)
    }

    fn batch_record(&self, store: &str, id: &str) -> Result<JobRecord> {
        self.store_info(store)?;
        let absent = || QuireError::NotFound { what: "file batch", id: id.into(), param: "batch_id".into() };
        let catalog = self.library.catalog()?.filter(|_| is_id(BATCH_PREFIX, id)).ok_or_else(absent)?;
        catalog.record(RecordKind::Job, &key(store, id))?.ok_or_else(absent)
    }

    fn batch_files(&self, store: &str, record: &JobRecord) -> Result<Vec<Attachment>> {
        let mut files = Vec::new();
        for file in files_of(record) {
            match self.store_file(store, &file) {
                Ok(attachment) => files.push(attachment),
                // Taken out of the store meanwhile.
                Err(QuireError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(files)
    }
}
