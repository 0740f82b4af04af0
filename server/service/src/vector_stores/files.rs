//! Files of vector stores: attached at once, listed, changed, taken out. They are read in the background (`reading`).

use documents::{Attributes, Catalog, Collection, CollectionInfo, DocumentId, DocumentInfo, JobRecord, RecordKind};

use super::super::files::FILE_PREFIX;
use super::super::ids::is_id;
use super::attachments::{all_keys, find, key, with_attributes};
use super::batches::batches_of;
use super::{
    AttachRequest, Attachment, AttachmentState, Chunking, Page, PageRequest, Service, attached_name, plain_documents,
    removed_name, store_id,
};
use settings::{QuireError, Result};

/// Documents that are removed at a time.
const PURGED_AT_A_TIME: usize = 1000;
/// What a document's id begins with.
const DOCUMENT_PREFIX: &str = "doc_";

impl Service {
    /// Attaches files to a store: they are read in the background. One that is attached already is read again only where
    /// that failed, was cancelled, or it is to be cut otherwise. When this returns, they are kept as such; where one of them
    /// does not exist, none is.
    ///
    /// # Errors
    /// [`QuireError::NotFound`] with the file's place, an expired store, those of a failed write.
    pub fn attach(&self, store: &str, requests: &[(String, AttachRequest)]) -> Result<Vec<Attachment>> {
        let info = self.live_store(store)?;
        let catalog = self.library.writable()?;
        let _changing = self.attaching();
        let mut attachments = Vec::with_capacity(requests.len());
        for (place, request) in requests {
            let file = self.file(&request.file, "file_id").map_err(|error| named(error, place))?;
            let mut attachment = Attachment::new(store, &file, request);
            if let Some(known) = find(&catalog, store, &file.id)? {
                attachment.created = known.created;
                attachment.attributes = request.attributes.clone().unwrap_or(known.attributes);
                let as_it_was = known.chunking == request.chunking;
                if as_it_was && matches!(known.state, AttachmentState::InProgress | AttachmentState::Completed) {
                    (attachment.state, attachment.bytes) = (known.state, known.bytes);
                }
            }
            attachments.push(attachment);
        }
        let records: Vec<JobRecord> = attachments.iter().map(Attachment::record).collect();
        catalog.put_records(RecordKind::Job, &records)?;
        for attachment in &attachments {
            match attachment.state {
                AttachmentState::InProgress => self.jobs.push(store, &attachment.file),
                _ => self.write_attributes(&info, attachment)?,
            }
        }
        self.note_use(&info);
        Ok(attachments)
    }

    /// Refuses files that do not exist.
    pub(super) fn check_files(&self, requests: &[(String, AttachRequest)]) -> Result<()> {
        for (place, request) in requests {
            self.file(&request.file, "file_id").map_err(|error| named(error, place))?;
        }
        Ok(())
    }

    /// Attaches one file to a store; see [`attach`](Self::attach).
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn attach_one(&self, store: &str, request: AttachRequest) -> Result<Attachment> {
        let attached = self.attach(store, &[("file_id".into(), request)])?.pop();
        attached.ok_or_else(|| QuireError::Internal("a file was attached and is gone".into()))
    }

    /// Everything attached to a store, by id.
    pub(super) fn attachments(&self, catalog: &Catalog, store: &str) -> Result<Vec<Attachment>> {
        let records = catalog.records_under(RecordKind::Job, &key(store, ""))?;
        Ok(records.iter().filter_map(Attachment::from_record).collect())
    }

    /// A file of a store.
    ///
    /// # Errors
    /// [`QuireError::NotFound`]; a failing catalog.
    pub fn store_file(&self, store: &str, file: &str) -> Result<Attachment> {
        let info = self.store_info(store)?;
        let Some(catalog) = self.library.catalog()? else { return Err(no_file(file)) };
        if is_id(FILE_PREFIX, file) {
            return find(&catalog, store, file)?.ok_or_else(|| no_file(file));
        }
        let document = plain_document(&catalog, &info, file)?;
        Ok(Attachment::of_document(store, &document))
    }

    /// A page of the files of a store, only those that stand so where `state` says how.
    ///
    /// # Errors
    /// As [`store_file`](Self::store_file).
    pub fn store_files(
        &self,
        store: &str,
        state: Option<AttachmentState>,
        page: &PageRequest,
    ) -> Result<Page<Attachment>> {
        let info = self.store_info(store)?;
        let Some(catalog) = self.library.catalog()? else { return Err(no_file(store)) };
        let wanted = |found: AttachmentState| state.is_none_or(|state| found == state);
        let attached = self.attachments(&catalog, store)?.into_iter().filter(|attachment| wanted(attachment.state));
        let mut all: Vec<(String, Option<Attachment>)> =
            attached.map(|attachment| (attachment.file.clone(), Some(attachment))).collect();
        if wanted(AttachmentState::Completed) {
            all.extend(plain_documents(&catalog, &info)?.iter().map(|id| (id.to_string(), None)));
        }
        // Rows of documents are read for those of the page alone.
        let page = page.of(all, |(file, _): &(String, Option<Attachment>)| file);
        let mut data = Vec::with_capacity(page.data.len());
        for (file, attachment) in page.data {
            match attachment {
                Some(attachment) => data.push(attachment),
                // One that was removed meanwhile is none.
                None => data.extend(
                    plain_document(&catalog, &info, &file)
                        .ok()
                        .map(|document| Attachment::of_document(store, &document)),
                ),
            }
        }
        Ok(Page { data, has_more: page.has_more })
    }

    /// Replaces what a client keeps at a file of a store.
    ///
    /// # Errors
    /// As [`store_file`](Self::store_file); those of a failed write.
    pub fn change_store_file(&self, store: &str, file: &str, attributes: Attributes) -> Result<Attachment> {
        let info = self.store_info(store)?;
        let _changing = self.attaching();
        let attachment = Attachment { attributes, ..self.store_file(store, file)? };
        if attachment.chunking != Chunking::Other {
            self.library.writable()?.put_record(RecordKind::Job, &attachment.record())?;
        }
        self.write_attributes(&info, &attachment)?;
        Ok(attachment)
    }

    /// The text of a file of a store, as it is found in passages.
    ///
    /// # Errors
    /// As [`store_file`](Self::store_file); a file that has not been completed; a damaged document.
    pub fn store_file_text(&self, store: &str, file: &str) -> Result<(Attachment, String)> {
        let info = self.store_info(store)?;
        let attachment = self.store_file(store, file)?;
        let Some(catalog) = self.library.catalog()? else { return Err(no_file(file)) };
        let document = match attachment.chunking {
            Chunking::Other => Some(plain_document(&catalog, &info, file)?),
            _ => self.library.collection(&info.name)?.document_info(&attachment.document_name())?,
        };
        let Some(document) = document else {
            let problem = format!("expected a file that has been read; it is {}", attachment.state.name());
            return Err(QuireError::InvalidParameter { param: "file_id".into(), problem });
        };
        let text = catalog.text(&document)?;
        Ok((attachment, text))
    }

    /// Takes a file out of a store, so that it can be restored until space is reclaimed. The file itself stays.
    ///
    /// # Errors
    /// As [`store_file`](Self::store_file); those of a failed write.
    pub fn detach(&self, store: &str, file: &str) -> Result<()> {
        let info = self.store_info(store)?;
        let _changing = self.attaching();
        let attachment = self.store_file(store, file)?;
        self.remove(&info, &attachment).map(drop)
    }

    /// Gives files of a store up that have not been read yet.
    pub(super) fn cancel(&self, store: &str, files: &[String]) -> Result<()> {
        let catalog = self.library.writable()?;
        let _changing = self.attaching();
        let mut cancelled = Vec::new();
        for file in files {
            let found = find(&catalog, store, file)?;
            cancelled.extend(
                found
                    .filter(|found| found.state == AttachmentState::InProgress)
                    .map(|found| Attachment { state: AttachmentState::Cancelled, ..found }.record()),
            );
        }
        Ok(catalog.put_records(RecordKind::Job, &cancelled)?)
    }

    /// Takes a file out of all stores, for whoever [is changing](Self::attaching) them. Says whether it can be restored in any.
    pub(crate) fn detach_everywhere(&self, file: &str) -> Result<bool> {
        let Some(catalog) = self.library.catalog()? else { return Ok(false) };
        let mut kept = false;
        for record in catalog.records_under(RecordKind::Job, &all_keys())? {
            let Some(attachment) = Attachment::from_record(&record).filter(|found| found.file == file) else {
                continue;
            };
            match self.store_info(&attachment.store) {
                Ok(info) => kept |= self.remove(&info, &attachment)?,
                // The store is gone, and its files with it.
                Err(QuireError::NotFound { .. }) => {
                    self.library.writable()?.remove_record(RecordKind::Job, &record.id)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(kept)
    }

    /// Takes everything out of a store, for whoever [is changing](Self::attaching) them.
    pub(super) fn clear_store(&self, info: &CollectionInfo) -> Result<()> {
        let collection = self.library.collection(&info.name)?;
        let mut ids: Vec<DocumentId> =
            collection.catalog().names(info.id, None, usize::MAX)?.into_iter().map(|(_, id)| id).collect();
        ids.sort_unstable();
        ids.dedup();
        self.purge_documents(&collection, &ids)?;
        self.forget_rows(&store_id(info))
    }

    /// Removes a document of a collection that no client attached, for whoever [is changing](Self::attaching) files: under its own names.
    pub(crate) fn remove_plain(&self, info: &CollectionInfo, document: &DocumentInfo) -> Result<()> {
        self.remove(info, &Attachment::of_document(&store_id(info), document)).map(drop)
    }

    /// Takes a file out of all stores for good, for whoever [is changing](Self::attaching) them.
    pub(crate) fn purge_everywhere(&self, file: &str) -> Result<()> {
        let catalog = self.library.writable()?;
        for record in catalog.records_under(RecordKind::Job, &all_keys())? {
            let mut parts = record.id.split('/').skip(1);
            let (Some(store), Some(_)) = (parts.next(), parts.next().filter(|of| *of == file)) else { continue };
            if let Ok(info) = self.store_info(store) {
                let collection = self.library.collection(&info.name)?;
                self.purge_file(&collection, file)?;
            }
            catalog.remove_record(RecordKind::Job, &record.id)?;
        }
        Ok(())
    }

    /// Removes for good what a file became in a collection; a document that is of other files too stays as theirs.
    fn purge_file(&self, collection: &Collection, file: &str) -> Result<()> {
        let (catalog, id) = (collection.catalog(), collection.info().id);
        let mut gone = Vec::new();
        for name in catalog.names_below(id, file, false)? {
            match collection.document_info(&name)? {
                Some(document) if document.names.len() < 2 => gone.push(document.id),
                _ => drop(collection.writer()?.change(|transaction, info| transaction.remove_name(info, &name))?),
            }
        }
        let of_file = |name: &String| attached_name(name).is_some_and(|(of, _)| of == file);
        for name in catalog.names_below(id, file, true)? {
            for removed in catalog.removed_under(id, &name)? {
                let document = catalog.document(&removed)?.filter(|document| document.removed.is_some());
                let alone = |document: &DocumentInfo| document.names.iter().chain(&document.removed_names).all(of_file);
                gone.extend(document.filter(alone).map(|document| document.id));
            }
        }
        self.purge_documents(collection, &gone)
    }

    /// Removes the rows of everything that was attached to a store whose documents are gone.
    pub(super) fn forget_rows(&self, store: &str) -> Result<()> {
        let catalog = self.library.writable()?;
        for rows in [key(store, ""), batches_of(store)] {
            let ids: Vec<String> =
                catalog.records_under(RecordKind::Job, &rows)?.into_iter().map(|record| record.id).collect();
            catalog.remove_records(RecordKind::Job, &ids)?;
        }
        Ok(())
    }

    /// Removes what a file is in a store; says whether that can be restored.
    fn remove(&self, info: &CollectionInfo, attachment: &Attachment) -> Result<bool> {
        let collection = self.library.collection(&info.name)?;
        let names = match attachment.chunking {
            Chunking::Other => plain_document(collection.catalog(), info, &attachment.file)?.names,
            _ => vec![attachment.document_name()],
        };
        // A document that is of attached files too stays as theirs.
        let attached = attachment.chunking != Chunking::Other;
        let names = names.iter().filter(|name| attached_name(name).is_some() == attached);
        let row = key(&attachment.store, &attachment.file);
        let (removed, _) = collection.writer()?.change(|transaction, info| {
            let mut removed = false;
            for name in names {
                removed_name(transaction, info, name)?;
                removed |= transaction.remove_name(info, name)?.is_some();
            }
            if !removed {
                // It has not become a document.
                transaction.remove_record(RecordKind::Job, &row);
            }
            Ok(removed)
        })?;
        self.let_chunks_go();
        Ok(removed)
    }

    fn purge_documents(&self, collection: &Collection, ids: &[DocumentId]) -> Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        // A transaction is held in memory.
        for some in ids.chunks(PURGED_AT_A_TIME) {
            collection.catalog().purge(some)?;
        }
        collection.writer()?.catch_up()?;
        self.let_chunks_go();
        Ok(())
    }

    /// Has the document of a file know what the client keeps at the file, so that it can be filtered by.
    fn write_attributes(&self, info: &CollectionInfo, attachment: &Attachment) -> Result<()> {
        let collection = self.library.collection(&info.name)?;
        let document = match attachment.chunking {
            Chunking::Other => Some(plain_document(collection.catalog(), info, &attachment.file)?),
            _ => collection.document_info(&attachment.document_name())?,
        };
        let Some(document) = document else { return Ok(()) };
        let all = with_attributes(document.attributes, &attachment.file, Some(&attachment.attributes));
        collection.writer()?.change(|transaction, _| transaction.set_attributes(&document.id, all).map(drop))?;
        Ok(())
    }
}

/// A document of a collection that no client attached, by its id.
fn plain_document(catalog: &Catalog, info: &CollectionInfo, id: &str) -> Result<DocumentInfo> {
    let id = id.strip_prefix(DOCUMENT_PREFIX).and_then(|_| id.parse::<DocumentId>().ok()).ok_or_else(|| no_file(id))?;
    let document = catalog.document(&id)?.filter(|found| found.collection == info.id && found.removed.is_none());
    let plain = document.filter(|found| found.names.iter().any(|name| attached_name(name).is_none()));
    plain.ok_or_else(|| no_file(&id.to_string()))
}

fn no_file(id: &str) -> QuireError {
    QuireError::NotFound { what: "file of this vector store", id: id.into(), param: "file_id".into() }
}

/// The same error about a field of a list.
fn named(error: QuireError, param: &str) -> QuireError {
    match error {
        QuireError::NotFound { what, id, .. } => QuireError::NotFound { what, id, param: param.into() },
        other => other,
    }
}
