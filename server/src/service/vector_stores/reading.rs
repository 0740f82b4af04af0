//! Attached files are read in the background, one after the other, and become documents of their store.

use std::path::Path;

use documents::{Catalog, Document, JobError, Limits, NewDocument, NewPassage, RecordKind};
use engine::EngineError;

use super::attachments::{all_keys, find, with_attributes};
use super::{Attachment, AttachmentState, Chunking, Service, StaticChunking};
use crate::error::{QuireError, Result};
use crate::store::Origin;

impl Service {
    /// Reads an attached file and makes it a document of its store; given up once `wanted` says no: then it stays in progress.
    pub(in crate::service) fn read_attachment(&self, store: &str, file: &str, wanted: &dyn Fn() -> bool) -> Result<()> {
        let catalog = self.library.writable()?;
        let waits = |catalog: &Catalog| -> Result<Option<Attachment>> {
            Ok(find(catalog, store, file)?.filter(|found| found.state == AttachmentState::InProgress))
        };
        let Some(attachment) = waits(&catalog)? else { return Ok(()) };
        let still_waits = || wanted() && waits(&catalog).is_ok_and(|found| found.is_some());
        let outcome = self.prepare_attachment(&attachment, &still_waits);
        let _changing = self.attaching();
        // It may have been taken out meanwhile, or have got other attributes; one that is to be cut otherwise has another turn.
        let as_it_was = |found: &Attachment| found.chunking == attachment.chunking;
        let Some(attachment) = waits(&catalog)?.filter(as_it_was) else { return Ok(()) };
        let outcome = match outcome {
            Err(_) if !wanted() => return Ok(()),
            Ok(document) => self.keep_attachment(&attachment, document),
            Err(error) => Err(error),
        };
        let ended = match outcome {
            Ok(bytes) => Attachment { state: AttachmentState::Completed, bytes, ..attachment },
            Err(error) => {
                let last_error = Some(failure(&error, &attachment));
                Attachment { state: AttachmentState::Failed, last_error, ..attachment }
            }
        };
        Ok(catalog.put_record(RecordKind::Job, &ended.record())?)
    }

    /// Reads a file, cuts it and computes the state of its chunks.
    fn prepare_attachment(&self, attachment: &Attachment, wanted: &dyn Fn() -> bool) -> Result<NewDocument> {
        let (file, content) = self.file_content(&attachment.file, "file_id")?;
        let document = Document::from_bytes(Path::new(&file.filename), content.whole(Document::LIMIT + 1)?)?;
        let limits = self.limits_of(attachment.chunking);
        let passages = self.passages_of(&document, limits)?;
        self.compute_ahead(&passages, wanted)?;
        Ok(NewDocument {
            name: attachment.document_name(),
            fingerprint: self.split_fingerprint(document.format, limits),
            tokenizer: Some(self.engine.tokenizer_fingerprint()),
            text: document.text,
            format: document.format,
            passages,
            attributes: None,
            instead_of: Vec::new(),
        })
    }

    /// Has the state of passages in the chunk store. One that does not take it, as on a full disk, leaves that to their first
    /// use.
    fn compute_ahead(&self, passages: &[NewPassage], wanted: &dyn Fn() -> bool) -> Result<()> {
        for passage in passages {
            if !wanted() {
                return Err(EngineError::Cancelled.into());
            }
            match self.store.ensure(&self.chunk_prefix, &self.with_suffix(&passage.tokens)) {
                Ok((_, origin)) => self.metrics.chunk(origin == Origin::Cached),
                Err(QuireError::Engine(error)) => return Err(error.into()),
                Err(error) => {
                    tracing::warn!(%error, "chunks of an attached file are not kept ahead: they are computed at their first use");
                    return Ok(());
                }
            }
        }
        Ok(())
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

    /// Puts what was read of a file into the collection; returns its bytes.
    fn keep_attachment(&self, attachment: &Attachment, document: NewDocument) -> Result<u64> {
        let collection = self.library.collection(&self.store_info(&attachment.store)?.name)?;
        let bytes = document.text.len() as u64;
        let catalog = self.library.writable()?;
        collection.writer()?.change(|transaction, info| {
            let outcome = transaction.put(info, &document)?;
            // A document of this text may be there, of other files.
            let known = catalog.document(&outcome.id)?;
            let all = with_attributes(known.as_ref(), &attachment.file, Some(&attachment.attributes));
            transaction.set_attributes(&outcome.id, all).map(drop)
        })?;
        self.let_chunks_go();
        Ok(bytes)
    }

    /// The files that wait to be read, the oldest first.
    pub(in crate::service) fn waiting_attachments(&self) -> Result<Vec<(String, String)>> {
        let Some(catalog) = self.library.catalog()? else { return Ok(Vec::new()) };
        let records = catalog.records_under(RecordKind::Job, &all_keys())?;
        let mut waiting: Vec<Attachment> = records.iter().filter_map(Attachment::from_record).collect();
        waiting.retain(|attachment| attachment.state == AttachmentState::InProgress);
        waiting.sort_by(|a, b| (a.created, &a.file).cmp(&(b.created, &b.file)));
        Ok(waiting.into_iter().map(|attachment| (attachment.store, attachment.file)).collect())
    }

    /// Says that reading a file ended without an end, as by a panic.
    pub(in crate::service) fn fail_attachment(&self, store: &str, file: &str, problem: &QuireError) -> Result<()> {
        let catalog = self.library.writable()?;
        let _changing = self.attaching();
        let Some(found) = find(&catalog, store, file)? else { return Ok(()) };
        let last_error = Some(failure(problem, &found));
        let failed = Attachment { state: AttachmentState::Failed, last_error, ..found };
        Ok(catalog.put_record(RecordKind::Job, &failed.record())?)
    }
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
