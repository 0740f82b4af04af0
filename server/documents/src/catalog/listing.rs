//! Which documents a collection has, and by which names: also where rows of names cannot be read one after the other.

use std::collections::BTreeSet;

use super::error::CatalogError;
use super::rows::{DamagedRow, DocumentInfo};
use super::store::Family;
use super::{Catalog, DocumentId, LOST, keys, rows};
use crate::error::{DocumentsError, Result};

/// A document that is there and cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedEntry {
    /// What it is known by.
    pub name: String,
    /// Its id.
    pub id: DocumentId,
    /// What is wrong.
    pub problem: String,
}

impl Catalog {
    /// Names of a collection's documents behind `after`, in order, each with its document's id; `limit` at most. Where names
    /// cannot be read one after the other, those are looked up that documents have; what is left is told where documents are listed.
    ///
    /// # Errors
    /// [`DocumentsError::Catalog`].
    pub fn names(&self, collection: u32, after: Option<&str>, limit: usize) -> Result<Vec<(String, DocumentId)>> {
        let mut names = Vec::new();
        let mut damaged = false;
        for name in self.name_rows(collection, after) {
            if names.len() == limit {
                break;
            }
            match name {
                Ok(named) => names.push(named),
                Err(CatalogError::Row(_)) => damaged = true,
                Err(error) => return Err(error.into()),
            }
        }
        if damaged {
            names.extend(self.names_behind_damage(collection)?.into_iter().filter(|(name, _)| after < Some(name)));
            names.sort_unstable();
            names.dedup();
            names.truncate(limit);
        }
        Ok(names)
    }

    /// Names that the documents of a collection have and whose rows can be read by themselves.
    fn names_behind_damage(&self, collection: u32) -> Result<Vec<(String, DocumentId)>> {
        let mut names = Vec::new();
        for info in self.documents_of(collection)? {
            let readable = info.names.into_iter().filter(|name| self.has_name(collection, name) == Some(info.id));
            names.extend(readable.map(|name| (name, info.id)));
        }
        Ok(names)
    }

    /// The documents of a collection that are there and can be read, in no order.
    fn documents_of(&self, collection: u32) -> Result<Vec<DocumentInfo>> {
        let mut documents = self.all_documents()?;
        documents.retain(|info| info.collection == collection && info.removed.is_none());
        Ok(documents)
    }

    /// Names of a collection's documents behind `after`, in order.
    fn name_rows(
        &self,
        collection: u32,
        after: Option<&str>,
    ) -> impl Iterator<Item = Result<(String, DocumentId), CatalogError>> {
        let prefix = keys::name(collection, false, "");
        // No name ends with a NUL, and none has one: this is the first key behind.
        let from = after.map_or(prefix.clone(), |after| keys::name(collection, false, &format!("{after}\0")));
        self.store.scan(Family::Names, &prefix, &from).map(move |row| {
            let (key, row) = row?;
            let name = String::from_utf8_lossy(&key[prefix.len()..]).into_owned();
            let content = rows::unseal(Family::Names, &key, &row);
            let id = content.ok().and_then(DocumentId::from_bytes);
            Ok((name.clone(), id.ok_or_else(|| DamagedRow(format!("the row of the name {name} is not as expected")))?))
        })
    }

    /// The documents of a collection, also those whose names cannot be read.
    ///
    /// # Errors
    /// As [`names`](Self::names).
    pub(crate) fn document_ids(&self, collection: u32) -> Result<Vec<DocumentId>> {
        let mut ids = BTreeSet::new();
        let mut whole = true;
        for name in self.name_rows(collection, None) {
            match name {
                Ok((_, id)) => drop(ids.insert(id)),
                Err(CatalogError::Row(_)) => whole = false,
                Err(error) => return Err(error.into()),
            }
        }
        if !whole {
            ids.extend(self.documents_of(collection)?.iter().map(|info| info.id));
        }
        Ok(ids.into_iter().collect())
    }

    /// How many documents of a collection are damaged or lost, as far as the rows of documents tell.
    ///
    /// # Errors
    /// As [`names`](Self::names).
    pub fn damaged_documents(&self, collection: u32) -> Result<u64> {
        let known = self.document_ids(collection)?.len() as u64;
        Ok(known.saturating_sub(self.totals(collection)?.documents))
    }

    /// The documents of a collection by name, each once. What is known of those that are damaged comes last.
    ///
    /// # Errors
    /// As [`names`](Self::names).
    pub fn listing(&self, collection: u32) -> Result<(Vec<DocumentInfo>, Vec<DamagedEntry>)> {
        let (mut whole, mut damaged) = (Vec::new(), Vec::new());
        let mut seen = BTreeSet::new();
        let mut unreadable = false;
        for name in self.name_rows(collection, None) {
            let (name, id) = match name {
                Ok(named) => named,
                Err(CatalogError::Row(_)) => {
                    unreadable = true;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            if !seen.insert(id) {
                continue;
            }
            match self.document(&id) {
                Ok(Some(info)) => whole.push(info),
                Ok(None) => damaged.push(DamagedEntry { name, id, problem: LOST.into() }),
                Err(DocumentsError::DamagedDocument { problem, .. }) => {
                    damaged.push(DamagedEntry { name, id, problem });
                }
                Err(error) => return Err(error),
            }
        }
        if unreadable {
            for info in self.documents_of(collection)?.into_iter().filter(|info| !seen.contains(&info.id)) {
                // One that came in since its table was damaged is as whole as any.
                if info.names.iter().all(|name| self.has_name(collection, name) == Some(info.id)) {
                    whole.push(info);
                    continue;
                }
                let problem = "its name cannot be read".into();
                damaged.push(DamagedEntry { name: info.names.join("  =  "), id: info.id, problem });
            }
            whole.sort_by(|a, b| a.names.cmp(&b.names));
        }
        Ok((whole, damaged))
    }

    /// Names of a collection's documents that lie below a folder, in order: those that are there, or those that were removed and
    /// can be restored.
    ///
    /// # Errors
    /// [`DocumentsError::Catalog`].
    pub fn names_below(&self, collection: u32, folder: &str, removed: bool) -> Result<Vec<String>> {
        let all = keys::name(collection, removed, "");
        let below = keys::name(collection, removed, &format!("{}/", folder.trim_end_matches('/')));
        let mut names = BTreeSet::new();
        let mut damaged = false;
        for row in self.store.scan(Family::Names, &below, &below) {
            match row {
                Ok((key, _)) => drop(names.insert(String::from_utf8_lossy(&key[all.len()..]).into_owned())),
                Err(CatalogError::Row(_)) => damaged = true,
                Err(error) => return Err(error.into()),
            }
        }
        if damaged && !removed {
            let folder = String::from_utf8_lossy(&below[all.len()..]).into_owned();
            let found = self.names_behind_damage(collection)?.into_iter().map(|(name, _)| name);
            names.extend(found.filter(|name| name.starts_with(&folder)));
        }
        let names = names.into_iter().collect();
        Ok(names)
    }
}
