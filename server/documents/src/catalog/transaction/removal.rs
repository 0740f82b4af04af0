//! Documents that are removed and can be restored until space is reclaimed, and those that are gone for good.
//!
//! A removed document stays as it is, out of sight. Under each name that was removed lies a list of what the name stood for, the
//! last one last: a document's id and the hash of the text that it had. Where a document goes on under another name and gets
//! another text, what it was is set aside as a removed document of its own. So what was removed comes back with the text that it had.

use super::super::Catalog;
use super::super::batch::read;
use super::super::error::CatalogError;
use super::super::id::DocumentId;
use super::super::rows::{CollectionInfo, DamagedRow, DocumentInfo, LogEntry, TextHash};
use super::super::store::Family;
use super::super::{keys, texts};
use super::Transaction;
use crate::error::Result;

/// Bytes of an entry of a removed name.
pub(in super::super) const ENTRY: usize = DocumentId::LENGTH + size_of::<TextHash>();

/// A document that is back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// The document that has the name now.
    pub id: DocumentId,
    /// Whether the name stood for another text meanwhile. That is removed now, and can be restored.
    pub replaced: bool,
}

/// What a removed name stood for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RemovedEntry {
    id: DocumentId,
    text: TextHash,
}

impl RemovedEntry {
    fn of(info: &DocumentInfo) -> RemovedEntry {
        RemovedEntry { id: info.id, text: info.content }
    }

    /// What a row says, the last one last.
    fn decode(row: &[u8]) -> Result<Vec<RemovedEntry>, CatalogError> {
        let entry = |bytes: &[u8]| {
            let (id, text) = bytes.split_at_checked(DocumentId::LENGTH)?;
            Some(RemovedEntry { id: DocumentId::from_bytes(id)?, text: text.try_into().ok()? })
        };
        let entries = row.chunks(ENTRY).map(entry).collect::<Option<_>>();
        Ok(entries.ok_or_else(|| DamagedRow("a removed name is not as expected".into()))?)
    }

    fn encode(entries: &[RemovedEntry]) -> Vec<u8> {
        entries.iter().flat_map(|entry| [&entry.id.bytes()[..], &entry.text].concat()).collect()
    }
}

impl Catalog {
    /// The documents that a name stood for when it was removed and that can be restored, the last one last.
    ///
    /// # Errors
    /// As [`document`](Self::document).
    pub fn removed_under(&self, collection: u32, name: &str) -> Result<Vec<DocumentId>> {
        let row = read(&self.store, Family::Names, &keys::name(collection, true, name));
        let entries = row.and_then(|row| row.map_or(Ok(Vec::new()), |row| RemovedEntry::decode(&row)));
        let entries = entries.map_err(|error| error.of(|| format!("document {name}")))?;
        Ok(entries.into_iter().map(|entry| entry.id).collect())
    }
}

impl Transaction<'_> {
    /// Removes a document by a name of it, so that it can be restored until space is reclaimed. A document with further names
    /// stays, without this one. Returns its id, if there is one.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub fn remove_name(&mut self, collection: &CollectionInfo, name: &str) -> Result<Option<DocumentId>> {
        let removed = self.try_remove_name(collection, name);
        removed.map_err(|error| error.of(|| format!("document {name}")))
    }

    fn try_remove_name(&mut self, collection: &CollectionInfo, name: &str) -> Result<Option<DocumentId>, CatalogError> {
        let Some(id) = self.id_of(collection.id, name)? else { return Ok(None) };
        let Some(mut info) = self.named(collection.id, name)? else {
            // Of a document that is lost.
            self.batch.delete(Family::Names, keys::name(collection.id, false, name));
            return Ok(Some(id));
        };
        if info.names.len() < 2 {
            self.hide(info)?;
            return Ok(Some(id));
        }
        info.names.retain(|known| known != name);
        self.batch.delete(Family::Names, keys::name(collection.id, false, name));
        self.remember_name(&info, name)?;
        info.removed_names.retain(|known| known != name);
        info.removed_names.push(name.into());
        self.write_info(&info);
        Ok(Some(id))
    }

    /// Removes a document with all of its names, so that it can be restored until space is reclaimed. Says whether there
    /// was one.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub fn remove(&mut self, id: &DocumentId) -> Result<bool> {
        let mut removed = || match self.info(id)?.filter(|info| info.removed.is_none()) {
            Some(info) => self.hide(info).map(|()| true),
            None => Ok(false),
        };
        removed().map_err(|error: CatalogError| error.of(|| format!("document {id}")))
    }

    /// Brings back what was removed last under a name, under that name; `None` where nothing was. What has the name meanwhile, with
    /// another text, is removed in turn, so that the next call brings that back.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub fn restore(&mut self, collection: &CollectionInfo, name: &str) -> Result<Option<Restored>> {
        self.try_restore(collection, name).map_err(|error| error.of(|| format!("document {name}")))
    }

    fn try_restore(&mut self, collection: &CollectionInfo, name: &str) -> Result<Option<Restored>, CatalogError> {
        let mut entries = self.removed_entries(collection.id, name)?;
        let found = loop {
            let Some(entry) = entries.pop() else { break None };
            // An earlier version let the text of a document that went on under another name be replaced.
            if let Some(info) = self.info(&entry.id)?.filter(|info| info.content == entry.text) {
                break Some(info);
            }
        };
        self.write_entries(collection.id, name, &entries);
        let Some(mut info) = found else { return Ok(None) };
        let id = info.id;
        let current = self.named(collection.id, name)?;
        let replaced = match current {
            Some(current) if current.content == info.content && current.format == info.format => {
                return Ok(Some(Restored { id: current.id, replaced: false }));
            }
            Some(_) => self.try_remove_name(collection, name)?.is_some(),
            None => false,
        };
        if info.removed.is_none() {
            info.names.push(name.into());
            info.names.sort();
            info.removed_names.retain(|known| known != name);
        } else if let Some(outcome) = self.try_name(collection, name, info.format, &info.content, &[])? {
            // The same text has come in again: the name is one more for that document.
            if !self.is_remembered(&info)? {
                self.purge(&id)?;
            }
            return Ok(Some(Restored { id: outcome.id, replaced }));
        } else {
            // Its other names can be restored too, each by itself.
            info.removed_names.append(&mut info.names);
            info.removed_names.retain(|known| known != name);
            (info.names, info.removed) = (vec![name.into()], None);
            let content = keys::content(collection.id, info.format, &info.content);
            self.batch.put(Family::Contents, content, id.bytes().to_vec());
            for passage in self.passages(&info)? {
                self.refer(&passage, &id);
            }
            self.log.push((collection.id, LogEntry::Put(id)));
        }
        self.batch.put(Family::Names, keys::name(collection.id, false, name), id.bytes().to_vec());
        self.write_info(&info);
        Ok(Some(Restored { id, replaced }))
    }

    /// Removes a document for good: text, passages, tokens. The bytes are gone from the disk once space is reclaimed.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub(in super::super) fn purge(&mut self, id: &DocumentId) -> Result<(), CatalogError> {
        let Some(info) = self.info(id)? else { return Ok(()) };
        self.drop_passages(&info, true)?;
        texts::release(&mut self.batch, &info.content, info.bytes, id)?;
        for name in info.names.iter().chain(&info.removed_names) {
            let mut entries = self.removed_entries(info.collection, name)?;
            let before = entries.len();
            entries.retain(|entry| entry.id != *id);
            if entries.len() < before {
                self.write_entries(info.collection, name, &entries);
            }
        }
        if info.removed.is_none() {
            for name in &info.names {
                let key = keys::name(info.collection, false, name);
                // Another document may have the name by now.
                if !matches!(self.id_at(Family::Names, &key), Ok(Some(owner)) if owner != *id) {
                    self.batch.delete(Family::Names, key);
                }
            }
            self.disown(&info);
            self.log.push((info.collection, LogEntry::Removed(*id)));
        }
        self.batch.delete(Family::Documents, id.bytes().to_vec());
        Ok(())
    }

    /// Takes a document out of sight; its text and passages stay.
    fn hide(&mut self, mut info: DocumentInfo) -> Result<(), CatalogError> {
        for name in &info.names {
            self.batch.delete(Family::Names, keys::name(info.collection, false, name));
            self.remember_name(&info, name)?;
        }
        self.disown(&info);
        // What cannot be read keeps nobody from removing the rest.
        for number in 0..info.passages {
            if let Ok(passage) = self.passage(&info.id, number) {
                self.release(&passage, &info.id, false);
            }
        }
        info.removed = Some(self.now);
        self.write_info(&info);
        self.log.push((info.collection, LogEntry::Removed(info.id)));
        Ok(())
    }

    /// Takes a name from a document that loses it to another text. With its last name the document is gone, unless it can be
    /// restored under one that was taken from it.
    pub(super) fn detach(&mut self, mut info: DocumentInfo, name: &str) -> Result<(), CatalogError> {
        let last = info.names.len() < 2;
        let remembered = last && self.is_remembered(&info)?;
        if last && !remembered {
            return self.purge(&info.id);
        }
        self.batch.delete(Family::Names, keys::name(info.collection, false, name));
        info.names.retain(|known| known != name);
        match remembered {
            true => self.hide(info)?,
            false => self.write_info(&info),
        }
        Ok(())
    }

    /// Keeps what a document is, before it gets another text, for the names that were taken from it: as a removed document.
    pub(super) fn set_aside(&mut self, info: &mut DocumentInfo) -> Result<(), CatalogError> {
        let (id, collection) = (DocumentId::random(), info.collection);
        let mut kept = Vec::new();
        for name in std::mem::take(&mut info.removed_names) {
            let mut entries = self.removed_entries(collection, &name)?;
            let Some(entry) = entries.iter_mut().find(|entry| **entry == RemovedEntry::of(info)) else { continue };
            entry.id = id;
            self.write_entries(collection, &name, &entries);
            kept.push(name);
        }
        if kept.is_empty() {
            return Ok(());
        }
        for (number, passage) in (0u32..).zip(self.passages(info)?) {
            self.batch.put(Family::Passages, keys::passage(&id, number), passage.encode());
        }
        self.batch.put(Family::TextRefs, keys::reference(&info.content, &id), Vec::new());
        self.write_info(&DocumentInfo { id, names: kept, removed: Some(self.now), ..info.clone() });
        Ok(())
    }

    /// Forgets what the removed name with this key stood for, as far as that is gone.
    pub(in super::super) fn forget_removed_name(&mut self, key: Vec<u8>) -> Result<(), CatalogError> {
        let row = match self.batch.get(Family::Names, &key) {
            Err(CatalogError::Row(_)) => Vec::new(),
            row => row?.unwrap_or_default(),
        };
        let mut kept = Vec::new();
        // A row that is damaged stands for nothing.
        for entry in RemovedEntry::decode(&row).unwrap_or_default() {
            match self.info(&entry.id) {
                Ok(Some(info)) if info.removed.is_some() && info.content == entry.text => kept.push(entry),
                Ok(_) | Err(CatalogError::Row(_)) => {}
                Err(error) => return Err(error),
            }
        }
        match &kept[..] {
            [] => self.batch.delete(Family::Names, key),
            kept => self.batch.put(Family::Names, key, RemovedEntry::encode(kept)),
        }
        Ok(())
    }

    /// Notes under which name a document was removed, and with which text.
    fn remember_name(&mut self, info: &DocumentInfo, name: &str) -> Result<(), CatalogError> {
        let mut entries = self.removed_entries(info.collection, name)?;
        entries.retain(|entry| entry.text != info.content);
        entries.push(RemovedEntry::of(info));
        self.write_entries(info.collection, name, &entries);
        Ok(())
    }

    /// Whether a document can be restored as it is, under some name.
    fn is_remembered(&self, info: &DocumentInfo) -> Result<bool, CatalogError> {
        for name in info.names.iter().chain(&info.removed_names) {
            if self.removed_entries(info.collection, name)?.contains(&RemovedEntry::of(info)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn removed_entries(&self, collection: u32, name: &str) -> Result<Vec<RemovedEntry>, CatalogError> {
        match self.batch.get(Family::Names, &keys::name(collection, true, name))? {
            Some(row) => RemovedEntry::decode(&row),
            None => Ok(Vec::new()),
        }
    }

    fn write_entries(&mut self, collection: u32, name: &str, entries: &[RemovedEntry]) {
        let key = keys::name(collection, true, name);
        match entries {
            [] => self.batch.delete(Family::Names, key),
            entries => self.batch.put(Family::Names, key, RemovedEntry::encode(entries)),
        }
    }
}
