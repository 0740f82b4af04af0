//! Attached files are read in the background, one after the other, and become documents of their store, in groups.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use documents::{
    Attributes, Catalog, CollectionInfo, Document, DocumentId, JobError, JobRecord, Limits, NewDocument, NewPassage,
    RecordKind, Seldom,
};
use engine::EngineError;

use super::attachments::{all_keys, find, find_waiting, with_attributes};
use super::{Attachment, AttachmentState, Chunking, Service, StaticChunking, attached_name, store_id};
use crate::store::{Ensured, Origin};
use settings::{QuireError, Result};

/// How long a file that was read waits for others to be committed with it, and bytes of their texts, about: a commit costs as
/// much as reading many small files.
const GROUP_TIME: Duration = Duration::from_secs(2);
const GROUP_BYTES: usize = 16 << 20;

impl Service {
    /// Reads attached files of a store and makes them documents of it, all that it takes some two seconds to read; says how many
    /// of `files` these are. Once `wanted` says no, what is not read stays in progress.
    pub(crate) fn read_attachments(&self, store: &str, files: &[String], wanted: &dyn Fn() -> bool) -> Result<usize> {
        let catalog = self.library.writable()?;
        if let Err(QuireError::NotFound { .. }) = self.store_info(store) {
            // The store was removed: they wait until it is back, or gone for good.
            return Ok(files.len());
        }
        let (mut read, mut bytes) = (Vec::new(), 0);
        let since = Instant::now();
        for (index, file) in files.iter().enumerate() {
            if bytes >= GROUP_BYTES || since.elapsed() >= GROUP_TIME {
                self.end_reading(&catalog, store, read)?;
                return Ok(index);
            }
            let Some(attachment) = find_waiting(&catalog, store, file)? else { continue };
            let still_wanted = || wanted() && find_waiting(&catalog, store, file).is_ok_and(|found| found.is_some());
            let prepare = || self.prepare_attachment(&attachment, &still_wanted);
            // A file at which something panics costs nothing but itself.
            let outcome = catch_unwind(AssertUnwindSafe(prepare))
                .unwrap_or_else(|_| Err(QuireError::Internal("reading an attached file panicked".into())));
            if !wanted() {
                break;
            }
            bytes += outcome.as_ref().map_or(0, |document| document.text.len());
            read.push((attachment, outcome));
        }
        self.end_reading(&catalog, store, read)?;
        Ok(files.len())
    }

    /// Puts what was read into the collection, and says of each file what became of it.
    fn end_reading(&self, catalog: &Catalog, store: &str, read: Vec<(Attachment, Result<NewDocument>)>) -> Result<()> {
        let _changing = self.attaching();
        if let Err(QuireError::NotFound { .. }) = self.store_info(store) {
            // The store was removed while its files were read.
            return Ok(());
        }
        let (mut documents, mut ended) = (Vec::new(), Vec::new());
        for (attachment, outcome) in read {
            // It may have been taken out meanwhile, or have got other attributes; one that is to be cut otherwise has another turn.
            let as_it_was = |found: &Attachment| found.chunking == attachment.chunking;
            let Some(attachment) = find_waiting(catalog, store, &attachment.file)?.filter(as_it_was) else { continue };
            match outcome {
                Ok(document) => documents.push((attachment, document)),
                Err(error) => ended.push(failed(attachment, &error)),
            }
        }
        // Where all of them together fail, each is tried for itself.
        let together = self.keep_attachments(store, &documents);
        for (attachment, document) in &documents {
            let outcome = match &together {
                Ok(()) => Ok(()),
                Err(_) => self.keep_attachments(store, &[(attachment.clone(), document.clone())]),
            };
            let (state, bytes) = (AttachmentState::Completed, document.text.len() as u64);
            ended.push(match outcome {
                Ok(()) => Attachment { state, bytes, ..attachment.clone() },
                Err(error) => failed(attachment.clone(), &error),
            });
        }
        let records: Vec<JobRecord> = ended.iter().map(Attachment::record).collect();
        Ok(catalog.put_records(RecordKind::Job, &records)?)
    }

    /// Reads a file, cuts it and computes the state of its chunks, unless that is left to their first use.
    fn prepare_attachment(&self, attachment: &Attachment, wanted: &dyn Fn() -> bool) -> Result<NewDocument> {
        let (file, content) = self.file_content(&attachment.file, "file_id")?;
        let document = Document::from_bytes(Path::new(&file.filename), content.whole(Document::LIMIT + 1)?)?;
        let limits = self.limits_of(attachment.chunking);
        let passages = self.passages_of(&document, limits)?;
        if !self.ingesting.lazy {
            self.compute_ahead(&passages, wanted)?;
        }
        Ok(NewDocument {
            name: attachment.document_name(),
            fingerprint: self.split_fingerprint(document.format, limits),
            tokenizer: Some(self.engine.tokenizer_fingerprint()),
            text: document.text,
            format: document.format,
            passages,
            attributes: None,
            instead_of: Vec::new(),
            left_by: Vec::new(),
        })
    }

    /// Has the state of passages in the chunk store. One that does not take it, as on a full disk, leaves that to their first
    /// use.
    fn compute_ahead(&self, passages: &[NewPassage], wanted: &dyn Fn() -> bool) -> Result<()> {
        let compute = || -> Result<()> {
            let mut written = Vec::with_capacity(passages.len());
            for passage in passages {
                if !wanted() {
                    return Err(EngineError::Cancelled.into());
                }
                let ensured = self.store.ensure_behind(&self.chunk_prefix, &self.with_suffix(&passage.tokens))?;
                self.metrics.chunk(ensured.origin == Origin::Cached);
                written.push(ensured);
            }
            written.iter().try_for_each(Ensured::wait)
        };
        match compute() {
            Err(QuireError::Engine(error)) => Err(error.into()),
            Err(error) => {
                static TOLD: Seldom = Seldom::new();
                if let Some(more) = TOLD.due() {
                    tracing::warn!(
                        %error, more,
                        "chunks of an attached file are not kept ahead: they are computed at their first use"
                    );
                }
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// How a document of this name is cut: as whoever attached it said, else as the settings do.
    pub(crate) fn limits_of_name(&self, info: &CollectionInfo, name: &str) -> Result<Limits> {
        let Some((file, _)) = attached_name(name) else { return Ok(self.limits) };
        let Some(catalog) = self.library.catalog()? else { return Ok(self.limits) };
        let attachment = find(&catalog, &store_id(info), file)?;
        Ok(attachment.map_or(self.limits, |attachment| self.limits_of(attachment.chunking)))
    }

    fn limits_of(&self, chunking: Chunking) -> Limits {
        match chunking {
            Chunking::Static(StaticChunking { max_tokens, overlap }) => {
                let tokens = max_tokens.saturating_sub(self.chunk_suffix.len()).max(1);
                Limits { tokens, overlap: overlap.min(tokens / 2) }
            }
            Chunking::Auto | Chunking::Other => self.limits,
        }
    }

    /// How files are cut where clients leave that open.
    #[must_use]
    pub fn auto_chunking(&self) -> StaticChunking {
        StaticChunking { max_tokens: self.limits.tokens + self.chunk_suffix.len(), overlap: self.limits.overlap }
    }

    /// Puts documents of attached files into the collection of a store, all or none.
    fn keep_attachments(&self, store: &str, read: &[(Attachment, NewDocument)]) -> Result<()> {
        if read.is_empty() {
            return Ok(());
        }
        let collection = self.library.collection(&self.store_info(store)?.name)?;
        let catalog = collection.catalog();
        collection.writer()?.change(|transaction, info| {
            let mut changed: HashMap<DocumentId, Attributes> = HashMap::new();
            for (attachment, document) in read {
                let id = transaction.put(info, document)?.id;
                // A document of this text may be there, of other files, also of others of these.
                let known = match changed.remove(&id) {
                    Some(known) => known,
                    None => catalog.document(&id)?.map(|document| document.attributes).unwrap_or_default(),
                };
                let all = with_attributes(known, &attachment.file, Some(&attachment.attributes));
                transaction.set_attributes(&id, all.clone())?;
                changed.insert(id, all);
            }
            Ok(())
        })?;
        self.let_chunks_go();
        Ok(())
    }

    /// The files that wait to be read, the oldest first.
    pub(crate) fn waiting_attachments(&self) -> Result<Vec<(String, String)>> {
        let Some(catalog) = self.library.catalog()? else { return Ok(Vec::new()) };
        let records = catalog.records_under(RecordKind::Job, &all_keys())?;
        let mut waiting: Vec<Attachment> = records.iter().filter_map(Attachment::from_record).collect();
        waiting.retain(|attachment| attachment.state == AttachmentState::InProgress);
        waiting.sort_by(|a, b| (a.created, &a.file).cmp(&(b.created, &b.file)));
        Ok(waiting.into_iter().map(|attachment| (attachment.store, attachment.file)).collect())
    }

    /// Has all files that wait read in the background.
    pub(crate) fn queue_waiting(&self) -> Result<()> {
        self.waiting_attachments()?.iter().for_each(|(store, file)| self.jobs.push(store, file));
        Ok(())
    }

    /// Says of files that wait that they could not be read, as nothing could be.
    pub(crate) fn fail_attachments(&self, store: &str, files: &[String], problem: &QuireError) -> Result<()> {
        let catalog = self.library.writable()?;
        let _changing = self.attaching();
        let mut records = Vec::new();
        for file in files {
            records.extend(find_waiting(&catalog, store, file)?.map(|found| failed(found, problem).record()));
        }
        Ok(catalog.put_records(RecordKind::Job, &records)?)
    }
}

fn failed(attachment: Attachment, problem: &QuireError) -> Attachment {
    let last_error = Some(failure(problem, &attachment));
    Attachment { state: AttachmentState::Failed, last_error, ..attachment }
}

/// What a client is told of a file that could not be read: what is wrong with it, and nothing of this machine.
fn failure(error: &QuireError, attachment: &Attachment) -> JobError {
    use documents::DocumentsError as E;
    let (code, message) = match error {
        QuireError::Documents(error @ E::UnsupportedDocument { .. }) => ("unsupported_file", error.to_string()),
        QuireError::Documents(
            error @ (E::NotUtf8 { .. }
            | E::OtherEncoding { .. }
            | E::NulInDocument { .. }
            | E::DocumentTooLarge { .. }
            | E::EmptyDocument { .. }),
        ) => ("invalid_file", error.to_string()),
        other => {
            tracing::error!(error = %other, store = attachment.store, file = attachment.file, "an attached file could not be read");
            ("server_error", "the server failed at this file; its log says why".into())
        }
    };
    JobError { code: code.into(), message }
}
