//! Vector stores: collections as clients of OpenAI's API know them.
//!
//! A store that a client makes is a collection whose name is the store's id; a collection that was made otherwise is a store
//! too, with an id that is derived from it. What only clients know of a store (its name there, metadata, expiry) lies with
//! the collection's attributes in the catalog.
//!
//! * `attachments`: the rows of files that were attached;
//! * `files`: what is done with them, `reading`: what becomes of them in the background;
//! * `batches`: files that were attached together;
//! * `removed`: rows of what was removed and can be restored;
//! * `search`: passages of a store.

mod attachments;
mod batches;
mod files;
mod reading;
mod removed;
mod search;

use std::sync::{MutexGuard, PoisonError};

use documents::{Attributes, Catalog, CollectionInfo, DocumentId, Seldom};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::ids::{derived_id, is_id, new_id};
use super::paging::{Page, PageRequest};
use super::{Service, now};
use settings::{QuireError, Result};

pub use documents::attached_name;

pub use attachments::{AttachRequest, Attachment, AttachmentState, Chunking, StaticChunking};
pub use batches::Batch;
pub(super) use removed::{forget_removed, removed_name, restored_name};
pub use search::{StoreHit, StoreHits, StoreSearch};

/// What an id of a store begins with.
pub(crate) const STORE_PREFIX: &str = "vs_";
/// Where a collection's attributes have what is here kept of it.
const STORE: &str = "vector_store";
const DAY: u64 = 86_400;
/// A use of a store is noted when the last one that was is so long ago, in seconds: expiry counts days.
const NOTED: u64 = 3_600;

/// What clients say of a store.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StoreSettings {
    /// What it is called; any text.
    #[serde(default)]
    pub name: String,
    /// What it is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// What clients keep there.
    #[serde(default)]
    pub metadata: Map<String, Value>,
    /// It is emptied when it was not used for so many days.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_after_days: Option<u64>,
}

/// What a collection's attributes keep of a store.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct StoreRow {
    #[serde(flatten)]
    settings: StoreSettings,
    #[serde(default)]
    last_active: Option<u64>,
    #[serde(default)]
    expired: bool,
}

impl StoreRow {
    fn of(info: &CollectionInfo) -> StoreRow {
        let kept = info.attributes.get(STORE).cloned();
        kept.and_then(|kept| serde_json::from_value(kept).ok()).unwrap_or_default()
    }

    fn put(&self, attributes: &mut Attributes) {
        attributes.insert(STORE.into(), serde_json::to_value(self).unwrap_or_default());
    }

    fn expires(&self, info: &CollectionInfo) -> Option<u64> {
        let days = self.settings.expires_after_days?;
        Some(self.last_active.unwrap_or(info.created).saturating_add(days.saturating_mul(DAY)))
    }

    fn is_expired(&self, info: &CollectionInfo) -> bool {
        self.expired || self.expires(info).is_some_and(|at| at <= now())
    }
}

/// Files by how they stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FileCounts {
    /// Being read.
    pub in_progress: usize,
    /// Can be found.
    pub completed: usize,
    /// Could not be read.
    pub failed: usize,
    /// Given up before they were read.
    pub cancelled: usize,
    /// All of them.
    pub total: usize,
}

impl FileCounts {
    fn count(&mut self, state: AttachmentState) {
        *match state {
            AttachmentState::InProgress => &mut self.in_progress,
            AttachmentState::Completed => &mut self.completed,
            AttachmentState::Failed => &mut self.failed,
            AttachmentState::Cancelled => &mut self.cancelled,
        } += 1;
        self.total += 1;
    }
}

/// A vector store.
#[derive(Clone, Debug, PartialEq)]
pub struct VectorStore {
    /// Its id.
    pub id: String,
    /// What clients say of it.
    pub settings: StoreSettings,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// When it was last used, in seconds since 1970, to the hour.
    pub last_active: u64,
    /// When it is emptied if nobody uses it, in seconds since 1970.
    pub expires: Option<u64>,
    /// Whether that has happened.
    pub expired: bool,
    /// Its files.
    pub files: FileCounts,
    /// Bytes of the texts in it.
    pub bytes: u64,
}

/// A change of what clients say of a store: what is `None` stays.
#[derive(Clone, Debug, Default)]
pub struct StoreChange {
    /// Another name.
    pub name: Option<String>,
    /// Other metadata.
    pub metadata: Option<Map<String, Value>>,
    /// Another expiry, or none.
    pub expires_after_days: Option<Option<u64>>,
}

/// Whether a collection's name is the id of a store, as of those that were made over HTTP.
pub(super) fn is_store_id(name: &str) -> bool {
    is_id(STORE_PREFIX, name)
}

/// The id of a collection as a store.
fn store_id(info: &CollectionInfo) -> String {
    if is_store_id(&info.name) {
        return info.name.clone();
    }
    derived_id(STORE_PREFIX, info.created, &info.id.to_be_bytes())
}

impl Service {
    /// Makes a store and attaches files to it; where one of these does not exist, no store is made.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn create_store(&self, settings: StoreSettings, files: &[(String, AttachRequest)]) -> Result<VectorStore> {
        self.check_files(files)?;
        let id = new_id(STORE_PREFIX);
        self.library.collection_or_new_in(&id, self.ingesting.language.clone())?;
        let row = StoreRow { settings, last_active: Some(now()), expired: false };
        let info = self.library.writable()?.update_collection(&id, |info| row.put(&mut info.attributes))?;
        let info = info.ok_or_else(|| QuireError::Internal(format!("store {id} was made and is gone")))?;
        if !files.is_empty() {
            self.attach(&id, files)?;
        }
        self.describe(&info)
    }

    /// A store by its id.
    ///
    /// # Errors
    /// [`QuireError::NotFound`]; a failing catalog.
    pub fn store_by_id(&self, id: &str) -> Result<VectorStore> {
        self.describe(&self.store_info(id)?)
    }

    /// A page of the stores.
    ///
    /// # Errors
    /// A failing catalog.
    pub fn stores(&self, page: &PageRequest) -> Result<Page<VectorStore>> {
        let infos = self.library.collections()?.into_iter().map(|info| (store_id(&info), info)).collect();
        let page = page.of(infos, |(id, _): &(String, CollectionInfo)| id);
        let data = page.data.iter().map(|(_, info)| self.describe(info)).collect::<Result<_>>()?;
        Ok(Page { data, has_more: page.has_more })
    }

    /// Changes what clients say of a store.
    ///
    /// # Errors
    /// As [`store_by_id`](Self::store_by_id); those of a failed write.
    pub fn change_store(&self, id: &str, change: StoreChange) -> Result<VectorStore> {
        let info = self.store_info(id)?;
        let changed = self.library.writable()?.update_collection(&info.name, |info| {
            let mut row = StoreRow::of(info);
            let StoreChange { name, metadata, expires_after_days } = change;
            row.settings.name = name.unwrap_or(row.settings.name);
            row.settings.metadata = metadata.unwrap_or(row.settings.metadata);
            row.settings.expires_after_days = expires_after_days.unwrap_or(row.settings.expires_after_days);
            row.last_active = Some(now());
            row.put(&mut info.attributes);
        })?;
        self.describe(&changed.ok_or_else(|| no_store(id))?)
    }

    /// Removes a store with everything in it, so that it can be restored until space is reclaimed. Files that were attached stay.
    ///
    /// # Errors
    /// As [`store_by_id`](Self::store_by_id); those of a failed write.
    pub fn delete_store(&self, id: &str) -> Result<()> {
        let _changing = self.attaching();
        let info = self.store_info(id)?;
        self.library.remove_collection(&info.name)?;
        self.let_chunks_go();
        Ok(())
    }

    /// The name of the collection that a request means: its own name, or a store's id.
    ///
    /// # Errors
    /// A failing catalog.
    pub fn collection_name(&self, named: &str) -> Result<String> {
        match self.store_info(named) {
            Ok(info) => Ok(info.name),
            // That there is none is said by whoever looks into it.
            Err(QuireError::NotFound { .. }) => Ok(named.into()),
            Err(error) => Err(error),
        }
    }

    /// The collection of a store.
    pub(super) fn store_info(&self, id: &str) -> Result<CollectionInfo> {
        if !is_id(STORE_PREFIX, id) {
            return Err(no_store(id));
        }
        let Some(catalog) = self.library.catalog()? else { return Err(no_store(id)) };
        if let Some(info) = catalog.collection(id)? {
            return Ok(info);
        }
        let found = catalog.collections()?.into_iter().find(|info| store_id(info) == id);
        found.ok_or_else(|| no_store(id))
    }

    /// The collection of a store that has not expired: `param` names what is in vain otherwise.
    fn live_store(&self, id: &str) -> Result<CollectionInfo> {
        let info = self.store_info(id)?;
        if StoreRow::of(&info).is_expired(&info) {
            let problem =
                format!("expected a store that is kept; {id} was not used for too long and is empty: make another");
            return Err(QuireError::InvalidParameter { param: "vector_store_id".into(), problem });
        }
        Ok(info)
    }

    /// Tells the chunk store of chunks that no document needs any more. Where that fails, it is told with the next change.
    pub(crate) fn let_chunks_go(&self) {
        if let Err(error) = self.release_chunks() {
            static TOLD: Seldom = Seldom::new();
            if let Some(more) = TOLD.due() {
                tracing::warn!(%error, more, "the chunk store could not be told of chunks that no document needs any more");
            }
        }
    }

    /// Changes to files of stores are made one after the other.
    pub(super) fn attaching(&self) -> MutexGuard<'_, ()> {
        self.attaching.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn describe(&self, info: &CollectionInfo) -> Result<VectorStore> {
        let row = StoreRow::of(info);
        let (mut files, mut bytes) = (FileCounts::default(), 0);
        if let Some(catalog) = self.library.catalog()? {
            for attachment in self.attachments(&catalog, &store_id(info))? {
                files.count(attachment.state);
                bytes += attachment.bytes;
            }
            let totals = catalog.totals(info.id)?;
            let plain = usize::try_from(totals.plain_documents).unwrap_or(usize::MAX);
            (files.completed, files.total) = (files.completed + plain, files.total + plain);
            bytes += totals.plain_bytes;
        }
        let expired = row.is_expired(info);
        Ok(VectorStore {
            id: store_id(info),
            created: info.created,
            last_active: row.last_active.unwrap_or(info.created),
            expires: row.expires(info),
            expired,
            settings: StoreSettings {
                name: if is_id(STORE_PREFIX, &info.name) { row.settings.name } else { info.name.clone() },
                ..row.settings
            },
            files,
            bytes,
        })
    }

    /// Notes that a store is used, where its expiry depends on it. That is no reason to fail for whoever uses it.
    fn note_use(&self, info: &CollectionInfo) {
        let row = StoreRow::of(info);
        let recent = row.last_active.is_some_and(|last| now().saturating_sub(last) < NOTED);
        if row.settings.expires_after_days.is_none() || recent {
            return;
        }
        let noted = self.library.writable().and_then(|catalog| {
            catalog.update_collection(&info.name, |info| {
                let mut row = StoreRow::of(info);
                row.last_active = Some(now());
                row.put(&mut info.attributes);
            })
        });
        if let Err(error) = noted {
            tracing::warn!(%error, "a use of a vector store could not be noted");
        }
    }

    /// Empties the stores whose time has come, and marks them; says how many.
    pub(super) fn empty_expired_stores(&self) -> Result<usize> {
        let mut emptied = 0;
        for info in self.library.collections()? {
            let row = StoreRow::of(&info);
            if row.expired || !row.is_expired(&info) {
                continue;
            }
            let _changing = self.attaching();
            self.jobs.erase_soon();
            self.clear_store(&info)?;
            let mark = |info: &mut CollectionInfo| StoreRow { expired: true, ..row.clone() }.put(&mut info.attributes);
            self.library.writable()?.update_collection(&info.name, mark)?;
            emptied += 1;
        }
        Ok(emptied)
    }
}

/// Documents of a collection that no client attached, by id.
pub(super) fn plain_documents(catalog: &Catalog, info: &CollectionInfo) -> Result<Vec<DocumentId>> {
    let names = catalog.names(info.id, None, usize::MAX)?;
    let plain = names.into_iter().filter(|(name, _)| attached_name(name).is_none());
    let mut ids: Vec<DocumentId> = plain.map(|(_, id)| id).collect();
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

fn no_store(id: &str) -> QuireError {
    QuireError::NotFound { what: "vector store", id: id.into(), param: "vector_store_id".into() }
}
