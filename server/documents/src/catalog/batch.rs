//! Changes that become visible together, and can be read before that by whoever makes them.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::error::CatalogError;
use super::rows::{seal, unseal};
use super::store::{Family, Store};

/// A store as it will be once the changes are written.
pub(super) struct Batch<'a> {
    store: &'a Store,
    /// Contents of rows that are put, `None` for those that are deleted.
    rows: BTreeMap<(Family, Vec<u8>), Option<Vec<u8>>>,
}

impl<'a> Batch<'a> {
    pub(super) fn new(store: &'a Store) -> Batch<'a> {
        Batch { store, rows: BTreeMap::new() }
    }

    pub(super) fn store(&self) -> &'a Store {
        self.store
    }

    /// The content of a row.
    pub(super) fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>, CatalogError> {
        match self.rows.get(&(family, key.to_vec())) {
            Some(changed) => Ok(changed.clone()),
            None => read(self.store, family, key),
        }
    }

    pub(super) fn put(&mut self, family: Family, key: Vec<u8>, content: Vec<u8>) {
        self.rows.insert((family, key), Some(content));
    }

    pub(super) fn delete(&mut self, family: Family, key: Vec<u8>) {
        match self.rows.entry((family, key)) {
            Entry::Occupied(mut row) => *row.get_mut() = None,
            Entry::Vacant(row) => {
                row.insert(None);
            }
        }
    }

    /// The keys of a family that begin with `prefix`, in no order, but for those that cannot be read.
    pub(super) fn readable_keys(&self, family: Family, prefix: &[u8]) -> Result<Vec<Vec<u8>>, CatalogError> {
        let mut keys = Vec::new();
        for row in self.store.scan(family, prefix, prefix) {
            match row {
                Ok((key, _)) if !self.rows.contains_key(&(family, key.clone())) => keys.push(key),
                Ok(_) | Err(CatalogError::Row(_)) => {}
                Err(error) => return Err(error),
            }
        }
        keys.extend(self.put_keys(family, prefix).cloned());
        Ok(keys)
    }

    /// Whether any key of a family begins with `prefix`, or may, as it cannot be read.
    pub(super) fn any(&self, family: Family, prefix: &[u8]) -> Result<bool, CatalogError> {
        if self.put_keys(family, prefix).next().is_some() {
            return Ok(true);
        }
        for row in self.store.scan(family, prefix, prefix) {
            match row {
                Ok((key, _)) if self.rows.contains_key(&(family, key.clone())) => {}
                Ok(_) | Err(CatalogError::Row(_)) => return Ok(true),
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// What is changed of a family: contents of rows that are put, `None` for those that are deleted.
    pub(super) fn changed(&self, family: Family) -> impl Iterator<Item = (&[u8], Option<&[u8]>)> {
        let rows = self.rows.iter().filter(move |((of, _), _)| *of == family);
        rows.map(|((_, key), content)| (key.as_slice(), content.as_deref()))
    }

    fn put_keys<'s>(&'s self, family: Family, prefix: &'s [u8]) -> impl Iterator<Item = &'s Vec<u8>> {
        let begins = move |key: &[u8]| key.starts_with(prefix);
        let from = self.rows.range((family, prefix.to_vec())..);
        let of_prefix = from.take_while(move |((of, key), _)| *of == family && begins(key));
        of_prefix.filter(|(_, content)| content.is_some()).map(|((_, key), _)| key)
    }

    /// Has all changes on disk, or none.
    pub(super) fn commit(self) -> Result<(), CatalogError> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let sealed = self.rows.into_iter().map(|((family, key), content)| {
            let row = content.map(|content| seal(family, &key, &content));
            ((family, key), row)
        });
        self.store.write(sealed, true)
    }
}

/// The content of a row as it is on disk.
pub(super) fn read(store: &Store, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>, CatalogError> {
    let Some(row) = store.get(family, key)? else { return Ok(None) };
    Ok(Some(unseal(family, key, &row)?.to_vec()))
}
