//! What becomes of the rows of files and of vector stores when documents are removed, come back, or are gone for good.
//!
//! As long as something that was removed can be restored, its rows stay, marked: an attachment with its document, a file with
//! its bytes. They come back with the document, in the same transaction, and go when space is reclaimed.

use std::collections::HashSet;

use documents::{CollectionInfo, JobRecord, Library, RecordKind, Restored, Transaction};

use super::attachments::{Attachment, AttachmentState, attributes_of, key};
use super::{Chunking, attached_name, store_id};
use crate::files::{self, FileState};
use settings::Result;

/// How the row of an attachment stands whose document was removed: nobody sees it.
const REMOVED: &str = "removed";

/// To be called for every name of a document that is removed: hides the attachment that it is of.
pub(crate) fn removed_name(
    transaction: &mut Transaction<'_>,
    info: &CollectionInfo,
    name: &str,
) -> documents::Result<()> {
    let Some((file, _)) = attached_name(name) else { return Ok(()) };
    if let Some(record) = transaction.record(RecordKind::Job, &key(&store_id(info), file))? {
        transaction.put_record(RecordKind::Job, &JobRecord { state: REMOVED.into(), ..record });
    }
    Ok(())
}

/// Brings back what was removed under a name, with the attachment and the file that it is of.
pub(crate) fn restored_name(
    transaction: &mut Transaction<'_>,
    info: &CollectionInfo,
    name: &str,
) -> documents::Result<Option<Restored>> {
    let Some(restored) = transaction.restore(info, name)? else { return Ok(None) };
    let Some((file, filename)) = attached_name(name) else { return Ok(Some(restored)) };
    let Some(document) = transaction.document(&restored.id)? else { return Ok(Some(restored)) };
    let store = store_id(info);
    let known = transaction.record(RecordKind::Job, &key(&store, file))?;
    let record = match known {
        Some(record) => JobRecord { state: AttachmentState::Completed.name().into(), last_error: None, ..record },
        None => Attachment {
            state: AttachmentState::Completed,
            filename: filename.into(),
            created: document.created,
            last_error: None,
            bytes: document.bytes,
            attributes: attributes_of(&document, file),
            chunking: Chunking::Auto,
            store,
            file: file.into(),
        }
        .record(),
    };
    transaction.put_record(RecordKind::Job, &record);
    if let Some(record) = transaction.record(RecordKind::File, file)? {
        transaction.put_record(RecordKind::File, &FileState::Uploaded.of(record));
    }
    Ok(Some(restored))
}

/// Forgets for good what could be restored with documents that are gone by now: rows of attachments, of stores that are no
/// longer there, and files with their bytes.
pub(crate) fn forget_removed(library: &Library) -> Result<()> {
    let catalog = library.writable()?;
    let stores: HashSet<String> = catalog.collections()?.iter().map(store_id).collect();
    let rows = catalog.records(RecordKind::Job)?;
    let is_gone = |row: &&JobRecord| {
        let store = row.id.split('/').nth(1);
        row.state == REMOVED || store.is_some_and(|store| !stores.contains(store))
    };
    let gone: Vec<String> = rows.iter().filter(is_gone).map(|row| row.id.clone()).collect();
    for some in gone.chunks(1000) {
        catalog.remove_records(RecordKind::Job, some)?;
    }
    files::forget_removed(library)
}
