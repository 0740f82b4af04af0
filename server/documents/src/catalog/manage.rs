//! Collections as a whole, and getting rid of what was removed.

use std::collections::HashSet;

use super::batch::{Batch, read};
use super::error::CatalogError;
use super::rows::{
    Attributes, CollectionInfo, DamagedRow, DocumentInfo, LanguageSetting, Passage, ReleasedChunk, from_json, to_json,
    tokens_hash, unseal,
};
use super::store::{Family, Store};
use super::transaction::{Transaction, now};
use super::{Access, Catalog, Changed, DocumentId, IMPORTED, NEXT_COLLECTION, keys};
use crate::error::{DocumentsError, Result};
use crate::seldom::Seldom;

/// What was removed for good.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reclaimed {
    /// Collections that are gone, by number.
    pub collections: Vec<u32>,
    /// Documents that are gone.
    pub documents: usize,
}

impl Catalog {
    /// All collections, by name. One that cannot be read is left out, with a warning.
    ///
    /// # Errors
    /// [`DocumentsError::Catalog`].
    pub fn collections(&self) -> Result<Vec<CollectionInfo>> {
        self.collections_in(&[0])
    }

    fn collections_in(&self, prefix: &[u8]) -> Result<Vec<CollectionInfo>> {
        let rows = self.store.scan(Family::Collections, prefix, prefix);
        let mut collections = Vec::new();
        for row in rows {
            match row.and_then(|(key, row)| Ok(from_json(unseal(Family::Collections, &key, &row)?)?)) {
                Ok(info) => collections.push(info),
                Err(CatalogError::Row(DamagedRow(problem))) => {
                    static TOLD: Seldom = Seldom::new();
                    if let Some(more) = TOLD.due() {
                        tracing::warn!(
                            problem,
                            more,
                            "a collection cannot be read: `quire catalog verify --repair` mends it"
                        );
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(collections)
    }

    /// A collection by its name.
    ///
    /// # Errors
    /// [`DocumentsError::DamagedCatalog`] where its row is damaged, [`DocumentsError::Catalog`].
    pub fn collection(&self, name: &str) -> Result<Option<CollectionInfo>> {
        let content = read(&self.store, Family::Collections, &keys::collection(name));
        let info = content.and_then(|content| Ok(content.map(|content| from_json(&content)).transpose()?));
        info.map_err(|error| self.whole(error, || format!("collection {name}")))
    }

    /// The error of a row that others depend on.
    fn whole(&self, error: CatalogError, what: impl FnOnce() -> String) -> DocumentsError {
        match error {
            CatalogError::Row(DamagedRow(problem)) => {
                let problem = format!("{}: {problem}", what());
                DocumentsError::DamagedCatalog { path: self.store.path().into(), problem }
            }
            CatalogError::Whole(error) => error,
        }
    }

    /// The collection of this name, made where there is none.
    ///
    /// # Errors
    /// As [`change`](Self::change).
    pub fn create_collection(&self, name: &str, language: LanguageSetting) -> Result<CollectionInfo> {
        let made = self.change(|transaction| {
            let batch = transaction.batch();
            if let Some(content) = batch.get(Family::Collections, &keys::collection(name))? {
                return Ok(from_json(&content).map_err(CatalogError::from)?);
            }
            let id = next_collection(batch)?;
            let attributes = Attributes::new();
            let info = CollectionInfo { name: name.into(), id, language, created: now(), removed: None, attributes };
            batch.put(Family::Collections, keys::collection(name), to_json(&info));
            Ok(info)
        })?;
        Ok(made.value)
    }

    /// Changes a collection's settings and attributes: `change` is given them as they are. A new name is one that no other
    /// collection has.
    ///
    /// # Errors
    /// [`DocumentsError::CollectionExists`], and as [`change`](Self::change).
    pub fn update_collection(
        &self,
        name: &str,
        change: impl FnOnce(&mut CollectionInfo),
    ) -> Result<Option<CollectionInfo>> {
        let updated = self.change(|transaction| {
            let batch = transaction.batch();
            let Some(content) = batch.get(Family::Collections, &keys::collection(name))? else { return Ok(None) };
            let mut info: CollectionInfo = from_json(&content).map_err(CatalogError::from)?;
            change(&mut info);
            if info.name != name {
                if batch.get(Family::Collections, &keys::collection(&info.name))?.is_some() {
                    return Err(DocumentsError::CollectionExists { name: info.name });
                }
                batch.delete(Family::Collections, keys::collection(name));
            }
            batch.put(Family::Collections, keys::collection(&info.name), to_json(&info));
            Ok(Some(info))
        })?;
        Ok(updated.value)
    }

    /// Removes a collection, so that it can be restored until space is reclaimed. Its documents stay as they are; their chunks are
    /// released, as far as no other collection needs them.
    ///
    /// # Errors
    /// As [`change`](Self::change).
    pub fn remove_collection(&self, name: &str) -> Result<Option<CollectionInfo>> {
        let removed = self.change(|transaction| {
            let batch = transaction.batch();
            let Some(content) = batch.get(Family::Collections, &keys::collection(name))? else { return Ok(None) };
            let mut info: CollectionInfo = from_json(&content).map_err(CatalogError::from)?;
            info.removed = Some(now());
            batch.delete(Family::Collections, keys::collection(name));
            batch.put(Family::Collections, keys::removed_collection(info.id), to_json(&info));
            Ok(Some(info))
        })?;
        if let Some(info) = &removed.value {
            self.release_chunks_of(info)?;
        }
        Ok(removed.value)
    }

    /// Notes the chunks of a removed collection, so that the chunk store is told.
    fn release_chunks_of(&self, collection: &CollectionInfo) -> Result<()> {
        for some in self.document_ids(collection.id)?.chunks(256) {
            self.change(|transaction| {
                for id in some {
                    let batch = transaction.batch();
                    for key in batch.readable_keys(Family::Passages, id.bytes())? {
                        let passage = batch
                            .get(Family::Passages, &key)
                            .and_then(|c| Ok(c.map(|c| Passage::decode(&c)).transpose()?));
                        let Ok(Some(Passage { tokens, .. })) = passage else { continue };
                        let hash = tokens_hash(&tokens).to_vec();
                        if !tokens.is_empty() && matches!(batch.get(Family::Released, &hash), Ok(None)) {
                            batch.put(Family::Released, hash, to_json(&ReleasedChunk { tokens, gone: false }));
                        }
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Collections that were removed and can be restored, the last one last.
    ///
    /// # Errors
    /// [`DocumentsError::Catalog`].
    pub fn removed_collections(&self) -> Result<Vec<CollectionInfo>> {
        let mut removed = self.collections_in(&[1])?;
        removed.sort_by_key(|info| (info.removed, info.id));
        Ok(removed)
    }

    /// Brings back the collection that was removed last under this name, or the one with this
    /// [id](CollectionInfo::removed_id); `None` where none was.
    ///
    /// # Errors
    /// [`DocumentsError::NameTaken`], and as [`change`](Self::change).
    pub fn restore_collection(&self, wanted: &str) -> Result<Option<CollectionInfo>> {
        let mut removed = self.removed_collections()?;
        let named = removed.iter().rposition(|info| info.name == wanted);
        let Some(at) = named.or_else(|| removed.iter().position(|info| info.removed_id() == wanted)) else {
            return Ok(None);
        };
        let mut info = removed.swap_remove(at);
        let restored = self.change(|transaction| {
            let batch = transaction.batch();
            if batch.get(Family::Collections, &keys::collection(&info.name))?.is_some() {
                return Err(DocumentsError::NameTaken { name: info.name });
            }
            batch.delete(Family::Collections, keys::removed_collection(info.id));
            info.removed = None;
            batch.put(Family::Collections, keys::collection(&info.name), to_json(&info));
            Ok(info)
        })?;
        Ok(Some(restored.value))
    }

    /// All documents that are there, or were removed and can be restored. One that is damaged is left out, with a warning.
    pub(super) fn all_documents(&self) -> Result<Vec<DocumentInfo>> {
        let mut documents = Vec::new();
        for info in document_rows(&self.store) {
            match info {
                Ok(info) => documents.push(info),
                Err(CatalogError::Row(DamagedRow(problem))) => {
                    static TOLD: Seldom = Seldom::new();
                    if let Some(more) = TOLD.due() {
                        tracing::warn!(problem, more, "a document is damaged: `quire catalog verify` tells more");
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(documents)
    }

    /// Removes for good what was removed before: all documents and collections that could still be restored, or only the
    /// collection of number `only`. The rows are gone when this returns; [`erase`](Self::erase) takes their bytes off the
    /// disk.
    ///
    /// # Errors
    /// As [`change`](Self::change).
    pub fn reclaim(&self, only: Option<u32>) -> Result<Changed<Reclaimed>> {
        let wanted = |id: u32| only.is_none_or(|only| only == id);
        let removed = self.collections_in(&[1])?;
        let collections: Vec<u32> = removed.iter().map(|info| info.id).filter(|id| wanted(*id)).collect();
        let gone =
            |info: &DocumentInfo| collections.contains(&info.collection) || only.is_none() && info.removed.is_some();
        let ids: Vec<DocumentId> = self.all_documents()?.iter().filter(|info| gone(info)).map(|info| info.id).collect();
        let mut orphans = Vec::new();
        // A transaction is held in memory.
        for some in ids.chunks(1000) {
            let purged = self.change(|transaction| {
                for id in some {
                    // It may have been restored meanwhile.
                    if transaction.document(id)?.is_some_and(|info| gone(&info)) {
                        transaction.purge(id).map_err(|error| error.of(|| format!("document {id}")))?;
                    }
                }
                Ok(())
            })?;
            orphans.extend(purged.orphans);
        }
        self.change(|transaction| {
            for id in &collections {
                transaction.batch().delete(Family::Collections, keys::removed_collection(*id));
                forget_collection(transaction, *id)?;
            }
            if only.is_none() {
                forget_removed_names(transaction)?;
            }
            Ok(())
        })?;
        Ok(Changed { value: Reclaimed { collections, documents: ids.len() }, orphans })
    }

    /// Removes a collection for good, with all that is in it.
    pub(crate) fn purge_collection(&self, name: &str) -> Result<()> {
        let Some(info) = self.collection(name)? else { return Ok(()) };
        let ids: Vec<DocumentId> = self.names(info.id, None, usize::MAX)?.into_iter().map(|(_, id)| id).collect();
        self.purge(&ids)?;
        self.change(|transaction| {
            transaction.batch().delete(Family::Collections, keys::collection(name));
            Ok(forget_collection(transaction, info.id)?)
        })?;
        Ok(())
    }

    /// Collections of an earlier version that are in the catalog by now.
    pub(crate) fn imported(&self) -> Result<Vec<String>> {
        let content = read(&self.store, Family::Meta, IMPORTED)?;
        let names = content.map(|content| from_json(&content)).transpose().map_err(CatalogError::from)?;
        Ok(names.unwrap_or_default())
    }

    pub(crate) fn set_imported(&self, names: &[String]) -> Result<()> {
        self.change(|transaction| {
            transaction.batch().put(Family::Meta, IMPORTED.to_vec(), to_json(&names));
            Ok(())
        })?;
        Ok(())
    }

    /// Removes documents for good, whether they were removed before or not. See [`reclaim`](Self::reclaim).
    ///
    /// # Errors
    /// As [`change`](Self::change).
    pub fn purge(&self, ids: &[DocumentId]) -> Result<Changed<()>> {
        self.change(|transaction| {
            for id in ids {
                transaction.purge(id).map_err(|error| error.of(|| format!("document {id}")))?;
            }
            Ok(())
        })
    }

    /// Some of the chunks that no document needs any more and that the chunk store has not been told of; `limit` at most. A chunk
    /// that some document needs again is forgotten.
    ///
    /// # Errors
    /// [`DocumentsError::Catalog`].
    pub fn released(&self, limit: usize) -> Result<Vec<ReleasedChunk>> {
        let mut chunks = Vec::new();
        let mut wanted = Vec::new();
        let removed: HashSet<u32> = self.collections_in(&[1])?.iter().map(|info| info.id).collect();
        for row in self.store.scan(Family::Released, b"", b"") {
            let (key, row) = match row {
                // They cost room in the chunk store, for a while.
                Err(CatalogError::Row(_)) => continue,
                row => row?,
            };
            match unseal(Family::Released, &key, &row).and_then(from_json::<ReleasedChunk>) {
                Ok(chunk) if !self.needs_chunk(&key, chunk.gone, &removed) => chunks.push(chunk),
                // A damaged one costs room in the chunk store, for a while.
                _ => wanted.push(((Family::Released, key), None)),
            }
            if chunks.len() == limit {
                break;
            }
        }
        if self.access() == Access::Write && !wanted.is_empty() {
            self.store.write(wanted, false)?;
        }
        Ok(chunks)
    }

    /// Whether a document needs a chunk, by the hash of its tokens. One of a removed collection keeps it from being removed for
    /// good, and not from making way. What cannot be read may need it.
    fn needs_chunk(&self, hash: &[u8], gone: bool, removed: &HashSet<u32>) -> bool {
        self.store.scan(Family::ChunkRefs, hash, hash).any(|row| {
            let id = || DocumentId::from_bytes(row.ok()?.0.get(hash.len()..)?);
            let document = || self.document(&id()?).ok().flatten();
            gone || document().is_none_or(|info| !removed.contains(&info.collection))
        })
    }

    /// Forgets chunks that the chunk store was told of.
    ///
    /// # Errors
    /// As [`change`](Self::change).
    pub fn forget_released(&self, chunks: &[ReleasedChunk]) -> Result<()> {
        self.change(|transaction| {
            for chunk in chunks {
                transaction.batch().delete(Family::Released, tokens_hash(&chunk.tokens).to_vec());
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Takes the bytes of everything that was removed for good off the disk. Takes as long as reading and writing the
    /// whole catalog.
    ///
    /// # Errors
    /// [`DocumentsError::NotErased`] where damage is in the way, [`DocumentsError::DataDir`], [`DocumentsError::Catalog`].
    pub fn erase(&self) -> Result<()> {
        self.store.purge()?;
        // A row that cannot be read may be of a document that was removed.
        for info in document_rows(&self.store) {
            match info {
                Ok(_) => {}
                Err(CatalogError::Row(_)) => {
                    let (path, files) = (self.store.path().into(), "rows of damaged documents".into());
                    return Err(DocumentsError::NotErased { path, files });
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// All documents, in the order of their ids.
fn document_rows(store: &Store) -> impl Iterator<Item = Result<DocumentInfo, CatalogError>> {
    store.scan(Family::Documents, b"", b"").map(|row| {
        let (key, row) = row?;
        Ok(from_json(unseal(Family::Documents, &key, &row)?)?)
    })
}

/// Looks through all documents that can be read for one.
pub(super) fn find_document(
    store: &Store,
    is_it: impl Fn(&DocumentInfo) -> bool,
) -> Result<Option<DocumentInfo>, CatalogError> {
    for info in document_rows(store) {
        match info {
            Ok(info) if is_it(&info) => return Ok(Some(info)),
            Ok(_) | Err(CatalogError::Row(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn next_collection(batch: &mut Batch<'_>) -> Result<u32, CatalogError> {
    let last = batch.get(Family::Meta, NEXT_COLLECTION)?;
    let last = last.and_then(|content| content.try_into().ok()).map_or(0, u64::from_be_bytes);
    batch.put(Family::Meta, NEXT_COLLECTION.to_vec(), (last + 1).to_be_bytes().to_vec());
    u32::try_from(last + 1).map_err(|_| DocumentsError::Internal("no number is left for a collection".into()).into())
}

/// Forgets names that could be restored, but for those whose documents were removed meanwhile.
fn forget_removed_names(transaction: &mut Transaction<'_>) -> Result<(), CatalogError> {
    for key in transaction.batch().readable_keys(Family::Names, b"")? {
        if key.get(4) == Some(&1) {
            transaction.forget_removed_name(key)?;
        }
    }
    Ok(())
}

/// Removes what a collection without documents has left: names that could be restored, and its log.
fn forget_collection(transaction: &mut Transaction<'_>, id: u32) -> Result<(), CatalogError> {
    let batch = transaction.batch();
    for family in [Family::Names, Family::Contents, Family::Log] {
        for key in batch.readable_keys(family, &id.to_be_bytes())? {
            batch.delete(family, key);
        }
    }
    Ok(())
}
