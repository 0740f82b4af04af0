//! The collections of one data folder: its catalog, and the indexes that are derived from it, opened once and shared.

mod damage;

pub use damage::{LibraryReport, glance};

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::check_collection_name;
use super::search::{Collection, Found, furthest, index_dir, legacy};
use crate::catalog::{Access, Catalog, CollectionInfo, LanguageSetting, Reclaimed, finish_repair, is_in_use};
use crate::data_dir;
use crate::error::{DocumentsError, Result};

/// Hands out collections by name. Opened for reading until somebody writes.
pub struct Library {
    data_dir: PathBuf,
    open: Mutex<Option<OpenLibrary>>,
}

/// A catalog with the collections of it that are open.
struct OpenLibrary {
    catalog: Arc<Catalog>,
    /// Where indexes lie; `None` if the catalog is in memory.
    data_dir: Option<PathBuf>,
    collections: HashMap<u32, Arc<Collection>>,
}

/// The folder of the catalog.
#[must_use]
pub fn catalog_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("catalog")
}

/// The names of all collections, sorted, also of those that an earlier version has written. Changes nothing.
///
/// # Errors
/// As [`Library::catalog`].
pub fn collection_names(data_dir: &Path) -> Result<Vec<String>> {
    finish_repair(&catalog_dir(data_dir))?;
    if !Catalog::exists(&catalog_dir(data_dir)) {
        return Ok(legacy::names(data_dir));
    }
    let catalog = opened_whole(data_dir, Access::Read)?;
    Ok(catalog.collections()?.into_iter().map(|info| info.name).collect())
}

/// Opens the catalog, unless it has lost changes that it had acknowledged: the end of its log may be cut off as a crash
/// would, and RocksDB cannot tell; but an index has only what the catalog had before.
fn opened_whole(data_dir: &Path, access: Access) -> Result<Catalog> {
    let path = catalog_dir(data_dir);
    let lost = |catalog: &Catalog| furthest(data_dir, catalog.generation()).saturating_sub(catalog.sequence());
    let mut catalog = Catalog::open(&path, access)?;
    if lost(&catalog) > 0 && access == Access::Read {
        // Another process may have written in between.
        catalog = Catalog::open(&path, access)?;
    }
    match lost(&catalog) {
        lost if lost > 0 && (access == Access::Write || !is_in_use(&path)) => {
            let problem = format!("the last {lost} changes of documents are lost, of which the search index tells");
            Err(DocumentsError::DamagedCatalog { path, problem })
        }
        _ => Ok(catalog),
    }
}

impl Library {
    /// The library in `data_dir`, which need not exist yet.
    #[must_use]
    pub fn new(data_dir: &Path) -> Library {
        Library { data_dir: data_dir.into(), open: Mutex::default() }
    }

    /// The data folder.
    #[must_use]
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    fn lock(&self) -> MutexGuard<'_, Option<OpenLibrary>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The catalog, to be read; `None` where there are no documents yet.
    ///
    /// # Errors
    /// [`DocumentsError::Catalog`], [`DocumentsError::NewerDataDir`], [`DocumentsError::Index`] for a damaged
    /// collection of an earlier version.
    pub fn catalog(&self) -> Result<Option<Arc<Catalog>>> {
        let mut open = self.lock();
        self.opened(&mut open)?;
        Ok(open.as_ref().map(|open| Arc::clone(&open.catalog)))
    }

    /// The catalog, to be written: made where there is none. Collections of an earlier version are taken into it.
    ///
    /// # Errors
    /// [`DocumentsError::CatalogInUse`], [`DocumentsError::DataDir`], and as [`catalog`](Self::catalog).
    pub fn writable(&self) -> Result<Arc<Catalog>> {
        let mut open = self.lock();
        self.opened_for_writing(&mut open).map(|open| Arc::clone(&open.catalog))
    }

    fn opened_for_writing<'o>(&self, open: &'o mut Option<OpenLibrary>) -> Result<&'o mut OpenLibrary> {
        let writable = |open: &OpenLibrary| open.data_dir.is_some() && open.catalog.access() == Access::Write;
        if !open.as_ref().is_some_and(writable) {
            // Whoever searches in what was open for reading ends with that.
            *open = Some(OpenLibrary::new(open_for_writing(&self.data_dir)?, Some(self.data_dir.clone())));
        }
        open.as_mut().ok_or_else(|| DocumentsError::Internal("a library was opened and is not open".into()))
    }

    /// Opens what there is, if nothing is open: for reading, but collections of an earlier version are taken into a catalog
    /// on disk where that can be written.
    fn opened(&self, open: &mut Option<OpenLibrary>) -> Result<()> {
        if open.is_some() {
            return Ok(());
        }
        finish_repair(&catalog_dir(&self.data_dir))?;
        if Catalog::exists(&catalog_dir(&self.data_dir)) {
            let catalog = opened_whole(&self.data_dir, Access::Read)?;
            *open = Some(OpenLibrary::new(catalog, Some(self.data_dir.clone())));
        } else if !legacy::names(&self.data_dir).is_empty() {
            match self.opened_for_writing(open).map(|_| ()) {
                Err(DocumentsError::DataDir { .. } | DocumentsError::CatalogInUse { .. }) => {
                    let catalog = Catalog::in_memory()?;
                    import(&self.data_dir, &catalog)?;
                    *open = Some(OpenLibrary::new(catalog, None));
                }
                outcome => outcome?,
            }
        }
        Ok(())
    }

    /// All collections, by name.
    ///
    /// # Errors
    /// As [`catalog`](Self::catalog).
    pub fn collections(&self) -> Result<Vec<CollectionInfo>> {
        self.catalog()?.map_or(Ok(Vec::new()), |catalog| catalog.collections())
    }

    fn names(&self) -> Vec<String> {
        self.collections().unwrap_or_default().into_iter().map(|info| info.name).collect()
    }

    /// An existing collection.
    ///
    /// # Errors
    /// [`DocumentsError::CollectionName`], [`DocumentsError::UnknownCollection`], [`DocumentsError::Index`], and as
    /// [`catalog`](Self::catalog).
    pub fn collection(&self, name: &str) -> Result<Arc<Collection>> {
        check_collection_name(name)?;
        let unknown = || DocumentsError::UnknownCollection { name: name.into(), known: self.names() };
        let found = {
            let mut open = self.lock();
            self.opened(&mut open)?;
            match open.as_mut() {
                Some(library) => match library.catalog.collection(name)? {
                    Some(info) => Some(self.opened_collection(&mut open, &info)?),
                    None => None,
                },
                None => None,
            }
        };
        found.ok_or_else(unknown)
    }

    /// Opens a collection; where its index needs work that can be done on disk, there.
    fn opened_collection(&self, open: &mut Option<OpenLibrary>, info: &CollectionInfo) -> Result<Arc<Collection>> {
        let not_open = || DocumentsError::Internal("a library is not open".into());
        let library = open.as_mut().ok_or_else(not_open)?;
        if let Some(collection) = library.ready(info)? {
            return Ok(collection);
        }
        let only_read = library.data_dir.is_some() && library.catalog.access() == Access::Read;
        let others_write = only_read && is_in_use(&catalog_dir(&self.data_dir));
        if only_read
            && !others_write
            && let Ok(library) = self.opened_for_writing(open)
        {
            return library.collection(info, false);
        }
        open.as_mut().ok_or_else(not_open)?.collection(info, others_write)
    }

    /// A collection, made empty where there is none.
    ///
    /// # Errors
    /// [`DocumentsError::CollectionName`], and as [`writable`](Self::writable).
    pub fn collection_or_new(&self, name: &str) -> Result<Arc<Collection>> {
        self.collection_or_new_in(name, None)
    }

    /// As [`collection_or_new`](Self::collection_or_new); it then has the language setting that is given.
    ///
    /// # Errors
    /// As [`collection_or_new`](Self::collection_or_new).
    pub fn collection_or_new_in(&self, name: &str, language: Option<LanguageSetting>) -> Result<Arc<Collection>> {
        check_collection_name(name)?;
        let mut open = self.lock();
        let library = self.opened_for_writing(&mut open)?;
        let mut info = library.catalog.create_collection(name, language.clone().unwrap_or_default())?;
        if let Some(language) = language.filter(|language| *language != info.language) {
            let changed = library.catalog.update_collection(name, |info| info.language = language)?;
            info = changed.unwrap_or(info);
            // Its index is another one.
            library.collections.remove(&info.id);
        }
        library.collection(&info, false)
    }

    /// The passages of a collection that fit `query` best, none of them twice.
    ///
    /// # Errors
    /// As [`collection`](Self::collection).
    pub fn search(&self, collection: &str, query: &str, limit: usize) -> Result<Vec<Found>> {
        self.collection(collection)?.search(query, limit, &|| true)
    }

    /// Gives a collection another name; `None` where there is none.
    ///
    /// # Errors
    /// [`DocumentsError::CollectionName`], [`DocumentsError::CollectionExists`], and as [`writable`](Self::writable).
    pub fn rename_collection(&self, name: &str, to: &str) -> Result<Option<CollectionInfo>> {
        check_collection_name(to)?;
        let mut open = self.lock();
        let library = self.opened_for_writing(&mut open)?;
        let renamed = library.catalog.update_collection(name, |info| info.name = to.into())?;
        if let Some(info) = &renamed {
            // What is open knows the old name.
            library.collections.remove(&info.id);
        }
        Ok(renamed)
    }

    /// Removes a collection, so that it can be restored until space is reclaimed; `None` where there is none.
    ///
    /// # Errors
    /// As [`writable`](Self::writable).
    pub fn remove_collection(&self, name: &str) -> Result<Option<CollectionInfo>> {
        let mut open = self.lock();
        let library = self.opened_for_writing(&mut open)?;
        let removed = library.catalog.remove_collection(name)?;
        if let Some(info) = &removed {
            library.collections.remove(&info.id);
        }
        Ok(removed)
    }

    /// Removes a collection for good: its documents, its index and what it was called. Its bytes are gone from the disk after
    /// [`erase`](Self::erase).
    ///
    /// # Errors
    /// As [`writable`](Self::writable).
    pub fn purge_collection(&self, name: &str) -> Result<()> {
        let mut open = self.lock();
        let library = self.opened_for_writing(&mut open)?;
        let Some(info) = library.catalog.collection(name)? else { return Ok(()) };
        library.catalog.purge_collection(name)?;
        library.collections.remove(&info.id);
        remove_folder(&index_dir(&self.data_dir, info.id))
    }

    /// Removes for good what was removed before: all of it, or only the collection of number `only`. Says what that was. Its
    /// bytes are gone from the disk after [`erase`](Self::erase).
    ///
    /// # Errors
    /// As [`writable`](Self::writable).
    pub fn reclaim(&self, only: Option<u32>) -> Result<Reclaimed> {
        let reclaimed = self.writable()?.reclaim(only)?.value;
        for id in &reclaimed.collections {
            remove_folder(&index_dir(&self.data_dir, *id))?;
        }
        Ok(reclaimed)
    }

    /// Takes the bytes of everything that was removed for good off the disk, from the catalog and from all indexes.
    ///
    /// # Errors
    /// As [`writable`](Self::writable).
    pub fn erase(&self) -> Result<()> {
        let catalog = self.writable()?;
        for info in catalog.collections()? {
            // Searches go on meanwhile: the library is not held.
            self.collection(&info.name)?.writer()?.erase()?;
        }
        catalog.erase()
    }
}

impl OpenLibrary {
    fn new(catalog: Catalog, data_dir: Option<PathBuf>) -> OpenLibrary {
        OpenLibrary { catalog: Arc::new(catalog), data_dir, collections: HashMap::new() }
    }

    /// A collection that needs no work: one that is open, or whose index on disk is as it should be.
    fn ready(&mut self, info: &CollectionInfo) -> Result<Option<Arc<Collection>>> {
        if let Some(collection) = self.collections.get(&info.id) {
            return Ok(Some(Arc::clone(collection)));
        }
        let Some(data_dir) = &self.data_dir else { return Ok(None) };
        let Some(collection) = Collection::open_ready(&self.catalog, info, data_dir)? else { return Ok(None) };
        Ok(Some(self.keep(collection)))
    }

    fn collection(&mut self, info: &CollectionInfo, lags: bool) -> Result<Arc<Collection>> {
        if let Some(collection) = self.collections.get(&info.id) {
            return Ok(Arc::clone(collection));
        }
        let collection = Collection::open(&self.catalog, info, self.data_dir.as_deref(), lags)?;
        Ok(self.keep(collection))
    }

    fn keep(&mut self, collection: Collection) -> Arc<Collection> {
        let collection = Arc::new(collection);
        self.collections.insert(collection.info().id, Arc::clone(&collection));
        collection
    }
}

/// Opens the catalog to be written. Where there is none, it is made, with the collections of an earlier version in it.
fn open_for_writing(data_dir: &Path) -> Result<Catalog> {
    let dir = catalog_dir(data_dir);
    data_dir::create_private_dir(data_dir).map_err(|e| DocumentsError::writing(data_dir, e))?;
    data_dir::check_writable(data_dir).map_err(|e| DocumentsError::writing(data_dir, e))?;
    finish_repair(&dir)?;
    if !Catalog::exists(&dir) && !legacy::names(data_dir).is_empty() {
        // Whole or not at all: what is half done when the process is killed is done again.
        let partial = data_dir.join("catalog.partial");
        remove_folder(&partial)?;
        data_dir::create_private_dir(&partial).map_err(|e| DocumentsError::writing(&partial, e))?;
        let catalog = Catalog::open(&partial, Access::Write)?;
        import(data_dir, &catalog)?;
        drop(catalog);
        // One that was never whole would be in the way.
        remove_folder(&dir)?;
        let renamed = std::fs::rename(&partial, &dir)
            .and_then(|()| std::fs::File::open(data_dir))
            .and_then(|folder| folder.sync_all());
        renamed.map_err(|e| DocumentsError::writing(&dir, e))?;
    }
    data_dir::create_private_dir(&dir).map_err(|e| DocumentsError::writing(&dir, e))?;
    let catalog = opened_whole(data_dir, Access::Write)?;
    data_dir::raise(data_dir)?;
    for name in catalog.imported()? {
        // What cannot be removed is in nobody's way.
        let _ = std::fs::remove_dir_all(legacy::folder(data_dir).join(name));
    }
    let _ = std::fs::remove_dir(legacy::folder(data_dir));
    Ok(catalog)
}

/// Removes a folder, if it is there.
pub(crate) fn remove_folder(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(DocumentsError::writing(path, error)),
        _ => Ok(()),
    }
}

/// Takes all collections of an earlier version into a catalog, and says so. One that cannot be read stays where it is.
pub(crate) fn import(data_dir: &Path, catalog: &Catalog) -> Result<()> {
    let mut imported = Vec::new();
    for name in legacy::names(data_dir) {
        match legacy::import(data_dir, &name, catalog) {
            Ok(documents) => {
                tracing::warn!(
                    collection = name,
                    documents,
                    "documents of an earlier version were taken into the catalog"
                );
                imported.push(name);
            }
            Err(problem @ (DocumentsError::Index { .. } | DocumentsError::NewerCollection { .. })) => {
                tracing::warn!(collection = name, %problem, "a collection of an earlier version cannot be read: it is left where it is");
                catalog.purge_collection(&name)?;
            }
            Err(error) => return Err(error),
        }
    }
    catalog.set_imported(&imported)
}
