//! A library whose catalog is damaged: looked through, told of, written anew together with the indexes that are derived from it.

use std::path::Path;
use std::sync::Arc;

use super::{Library, catalog_dir, opened_whole};
use crate::catalog::{
    Access, Catalog, CatalogReport, Derived, IndexedPassages, finish_repair, is_in_use, look, repair,
};
use crate::data_dir;
use crate::error::{DocumentsError, Result};
use crate::search::{check_index, derive_index, discard_derived, indexed_passages};

/// Looks at a catalog without reading texts: whether it can be opened, and which documents have damaged rows. Says what is
/// wrong; `None` where nothing was found, or there is no catalog. Changes nothing.
///
/// # Errors
/// As [`Library::catalog`].
pub fn glance(data_dir: &Path) -> Result<Option<String>> {
    if !Catalog::exists(&catalog_dir(data_dir)) {
        return Ok(None);
    }
    let catalog = opened_whole(data_dir, Access::Read)?;
    if let Some(problem) = catalog.damage() {
        return Ok(Some(problem.into()));
    }
    let mut damaged = Vec::new();
    for info in catalog.collections()? {
        damaged.extend(catalog.listing(info.id)?.1);
    }
    let count = damaged.len();
    Ok(damaged.first().map(|first| format!("{count} documents are damaged or lost; {}: {}", first.name, first.problem)))
}

/// What was found of a library.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LibraryReport {
    /// Of the catalog.
    pub catalog: CatalogReport,
    /// Search indexes that are damaged or tell other passages than the catalog: the collection's name, and what is wrong.
    pub indexes: Vec<(String, String)>,
}

impl LibraryReport {
    /// Whether nothing is damaged.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.catalog.is_clean() && self.indexes.is_empty()
    }
}

impl Library {
    /// Reads everything that the catalog has and compares it with its checksums, hashes and references, and the indexes with
    /// it. `None` where there is no catalog. Nothing changes.
    ///
    /// # Errors
    /// [`DocumentsError::DamagedCatalog`] where nothing can be read, [`DocumentsError::CatalogInUse`] where another process
    /// writes, [`DocumentsError::DataDir`] where there is damage and no space to look into it.
    pub fn verify(&self) -> Result<Option<LibraryReport>> {
        let dir = catalog_dir(&self.data_dir);
        let open = self.lock();
        finish_repair(&dir)?;
        if let Some(library) = open.as_ref().filter(|open| open.catalog.access() == Access::Write) {
            let catalog = Arc::clone(&library.catalog);
            // Searches go on meanwhile.
            drop(open);
            let compare = |sequence| check_indexes(&catalog, &self.data_dir, sequence);
            let (report, indexes) = catalog.verify(compare)?;
            return Ok(Some(LibraryReport { catalog: report, indexes }));
        }
        if !Catalog::exists(&dir) {
            return Ok(None);
        }
        if is_in_use(&dir) {
            return Err(DocumentsError::CatalogInUse { path: dir });
        }
        let mut catalog = look(&dir, &Indexes { data_dir: &self.data_dir })?;
        let indexes = match opened_whole(&self.data_dir, Access::Read) {
            Ok(catalog) => {
                let sequence = catalog.sequence();
                check_indexes(&catalog, &self.data_dir, sequence)?
            }
            Err(DocumentsError::DamagedCatalog { problem, .. }) => {
                if !catalog.problems.contains(&problem) {
                    catalog.problems.push(problem);
                }
                Vec::new()
            }
            Err(error) => return Err(error),
        };
        Ok(Some(LibraryReport { catalog, indexes }))
    }

    /// Writes the catalog anew from what of it is whole, and builds all indexes again. Says what was found before. Whoever uses
    /// the library waits. With `anew`, an empty catalog takes the place of one of which nothing can be saved.
    ///
    /// Room is looked for first, and catalog and indexes are whole beside those that are in use before they take their places.
    ///
    /// # Errors
    /// [`DocumentsError::NothingSaved`], [`DocumentsError::RepairSpace`], [`DocumentsError::CatalogInUse`],
    /// [`DocumentsError::DataDir`]: the catalog is as it was.
    pub fn repair(&self, anew: bool) -> Result<Option<LibraryReport>> {
        let Some(mut report) = self.verify_for_repair()? else { return Ok(None) };
        let found = std::mem::take(&mut report.catalog.problems);
        let mut open = self.lock();
        let dir = catalog_dir(&self.data_dir);
        let derived = Indexes { data_dir: &self.data_dir };
        derived.check_room()?;
        derived.discard()?;
        let repaired = match open.as_mut().filter(|open| open.catalog.access() == Access::Write) {
            Some(library) => library.catalog.rewrite(anew, &derived),
            None => {
                *open = None;
                repair(&dir, anew, &derived)
            }
        };
        report.catalog = match repaired {
            Ok(report) => report,
            Err(error) => {
                // In nobody's way: the next repair tries again.
                let _ = derived.discard();
                return Err(error);
            }
        };
        if let Some(library) = open.as_mut() {
            library.collections.clear();
        }
        let also = found.into_iter().filter(|problem| !report.catalog.problems.contains(problem)).collect::<Vec<_>>();
        report.catalog.problems.extend(also);
        let library = self.opened_for_writing(&mut open)?;
        for info in library.catalog.collections()? {
            library.collection(&info, false)?;
        }
        Ok(Some(report))
    }

    /// As [`verify`](Self::verify); where nothing can be read, the repair says so.
    fn verify_for_repair(&self) -> Result<Option<LibraryReport>> {
        match self.verify() {
            Err(DocumentsError::DamagedCatalog { .. }) => Ok(Some(LibraryReport::default())),
            outcome => outcome,
        }
    }
}

/// Compares the indexes of all collections with the catalog, whose last change has the number `sequence`.
fn check_indexes(catalog: &Catalog, data_dir: &Path, sequence: u64) -> Result<Vec<(String, String)>> {
    let mut damaged = Vec::new();
    for info in catalog.collections()? {
        let check = || check_index(catalog, &info, data_dir, sequence);
        let mut problem = check()?;
        if problem.is_some() {
            // An index may have been written while it was read.
            problem = check()?;
        }
        damaged.extend(problem.map(|problem| (info.name, problem)));
    }
    Ok(damaged)
}

/// The search indexes of a data folder, as a repair of its catalog uses them.
struct Indexes<'a> {
    data_dir: &'a Path,
}

impl Indexes<'_> {
    /// Refuses where there is no room for catalog and indexes beside those that are there.
    fn check_room(&self) -> Result<()> {
        let needed = folder_bytes(&catalog_dir(self.data_dir)) + folder_bytes(&self.data_dir.join("index"));
        match data_dir::free_bytes(self.data_dir) {
            Some(free) if free < needed => {
                Err(DocumentsError::RepairSpace { path: catalog_dir(self.data_dir), free, needed })
            }
            _ => Ok(()),
        }
    }

    /// Removes what a repair that was cut off has left.
    fn discard(&self) -> Result<()> {
        discard_derived(self.data_dir)
    }
}

impl Derived for Indexes<'_> {
    fn passages(&self, generation: u64) -> IndexedPassages {
        indexed_passages(self.data_dir, generation)
    }

    fn derive(&self, catalog: Catalog) -> Result<()> {
        let catalog = Arc::new(catalog);
        catalog.collections()?.iter().try_for_each(|info| derive_index(&catalog, info, self.data_dir))
    }
}

/// Bytes of all files below a folder, as far as they can be read.
fn folder_bytes(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(found) if found.is_dir() => folder_bytes(&entry.path()),
            Ok(found) => found.len(),
            Err(_) => 0,
        })
        .sum()
}
