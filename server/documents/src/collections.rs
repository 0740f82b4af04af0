//! The collections of one data folder, opened once and shared.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::search::{Collection, Found};
use super::{check_collection_name, collection_dir, collection_names};
use crate::error::{DocumentsError, Result};

/// Hands out collections by name.
pub struct Library {
    data_dir: PathBuf,
    open: Mutex<HashMap<String, Arc<Collection>>>,
}

impl Library {
    /// The library in `data_dir`, which need not exist yet.
    #[must_use]
    pub fn new(data_dir: &Path) -> Library {
        Library { data_dir: data_dir.into(), open: Mutex::default() }
    }

    /// An existing collection.
    ///
    /// # Errors
    /// [`DocumentsError::CollectionName`], [`DocumentsError::UnknownCollection`], [`DocumentsError::Index`].
    pub fn collection(&self, name: &str) -> Result<Arc<Collection>> {
        self.get(name, Collection::open)?.ok_or_else(|| DocumentsError::UnknownCollection {
            name: name.into(),
            known: collection_names(&self.data_dir),
        })
    }

    /// A collection, made empty where there is none.
    ///
    /// # Errors
    /// [`DocumentsError::CollectionName`], [`DocumentsError::DataDir`], [`DocumentsError::Index`].
    pub fn collection_or_new(&self, name: &str) -> Result<Arc<Collection>> {
        let found = self.get(name, |dir| Collection::open_or_create(dir).map(Some))?;
        found.ok_or_else(|| DocumentsError::Internal(format!("collection `{name}` was made and is gone")))
    }

    fn get(&self, name: &str, open: impl Fn(&Path) -> Result<Option<Collection>>) -> Result<Option<Arc<Collection>>> {
        check_collection_name(name)?;
        let mut collections = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(collection) = collections.get(name) {
            return Ok(Some(Arc::clone(collection)));
        }
        let Some(collection) = open(&collection_dir(&self.data_dir, name))? else { return Ok(None) };
        let collection = Arc::new(collection);
        collections.insert(name.into(), Arc::clone(&collection));
        Ok(Some(collection))
    }

    /// The passages of a collection that fit `query` best, none of them twice.
    ///
    /// # Errors
    /// As [`collection`](Self::collection).
    pub fn search(&self, collection: &str, query: &str, limit: usize) -> Result<Vec<Found>> {
        self.collection(collection)?.search(query, limit, &|| true)
    }
}
