//! How an index comes to lie where a collection looks for it: found as it was left, built again from the catalog beside the
//! old one, compared with the catalog.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::index::{Derivation, OpenIndex, guarded, passage_digest};
use crate::catalog::{Catalog, CollectionInfo, IndexedPassages, LogEntry};
use crate::collections::remove_folder;
use crate::error::{DocumentsError, Result};

/// The ending of an index that was built for a catalog that is being repaired.
const REPAIRED: &str = "repaired";

/// Where the index of a collection lies.
pub(crate) fn index_dir(data_dir: &Path, collection: u32) -> PathBuf {
    data_dir.join("index").join(collection.to_string())
}

/// The index that lies in `dir`, if it can be used; one that is damaged counts as none.
pub(super) fn found(dir: &Path, wanted: &Derivation, writable: bool) -> Result<Option<OpenIndex>> {
    if writable {
        finish_swap(dir)?;
    }
    let index = opened(dir, wanted)?;
    let repaired = beside(dir, REPAIRED);
    if !writable || !repaired.exists() {
        return Ok(index);
    }
    // A repair has ended, or was cut off.
    if index.is_none() && opened(&repaired, wanted)?.is_some() {
        let whole = beside(dir, "whole");
        std::fs::rename(&repaired, &whole).map_err(|e| DocumentsError::writing(&whole, e))?;
        finish_swap(dir)?;
        return opened(dir, wanted);
    }
    remove_folder(&repaired)?;
    Ok(index)
}

fn opened(dir: &Path, wanted: &Derivation) -> Result<Option<OpenIndex>> {
    match OpenIndex::open(dir, wanted) {
        Err(DocumentsError::Index { source, .. }) => {
            tracing::warn!(index = %dir.display(), problem = %source, "the index is damaged: it is built again");
            Ok(None)
        }
        outcome => outcome,
    }
}

/// Builds the index of a collection from a catalog that is about to take the place of another one. It takes the place of the
/// collection's index when that is next opened, if the catalog has by then.
///
/// # Errors
/// [`DocumentsError::Index`], [`DocumentsError::Catalog`], [`DocumentsError::DataDir`].
pub(crate) fn derive_index(catalog: &Catalog, info: &CollectionInfo, data_dir: &Path) -> Result<()> {
    let wanted = Derivation::of(catalog, &info.language);
    let repaired = beside(&index_dir(data_dir, info.id), REPAIRED);
    fill(OpenIndex::create(&repaired, wanted.clone())?, catalog, info, &wanted).map(|_| ())
}

/// Removes indexes that were built for a catalog that did not come.
///
/// # Errors
/// [`DocumentsError::DataDir`].
pub(crate) fn discard_derived(data_dir: &Path) -> Result<()> {
    let entries = std::fs::read_dir(data_dir.join("index")).into_iter().flatten().flatten();
    let derived = entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == REPAIRED));
    derived.into_iter().try_for_each(|path| remove_folder(&path))
}

/// The passages that the indexes below `data_dir` have which are of this writing of the catalog, however far they have come.
/// What cannot be read tells nothing.
pub(crate) fn indexed_passages(data_dir: &Path, generation: u64) -> IndexedPassages {
    let mut passages = IndexedPassages::new();
    for entry in std::fs::read_dir(data_dir.join("index")).into_iter().flatten().flatten() {
        // What lies beside an index is not in use.
        if entry.path().extension().is_none()
            && let Ok(Some(index)) = OpenIndex::open_of(&entry.path(), generation)
            && let Ok(found) = index.passages()
        {
            passages.extend(found);
        }
    }
    passages
}

/// Compares the index of a collection with the catalog, whose last change has the number `sequence`; says what is wrong with it. One
/// that is not there, or lags, is no damage: it is built or caught up when the collection is opened.
///
/// # Errors
/// Those of the catalog.
pub(crate) fn check_index(
    catalog: &Catalog,
    info: &CollectionInfo,
    data_dir: &Path,
    sequence: u64,
) -> Result<Option<String>> {
    let dir = index_dir(data_dir, info.id);
    let index = match OpenIndex::open(&dir, &Derivation::at(catalog, &info.language, sequence)) {
        Err(DocumentsError::Index { source, .. }) => return Ok(Some(source.to_string())),
        outcome => outcome?,
    };
    let Some(index) = index else { return Ok(None) };
    if catalog.changes(info.id, index.derivation.sequence)?.is_none_or(|changes| !changes.is_empty()) {
        return Ok(None);
    }
    let mut indexed = match index.passages() {
        Err(DocumentsError::Index { source, .. }) => return Ok(Some(source.to_string())),
        outcome => outcome?,
    };
    let mut different = 0;
    for id in catalog.document_ids(info.id)? {
        let found = indexed.remove(&id).unwrap_or_default();
        let read = || -> Result<Option<BTreeMap<u64, u64>>> {
            let Some(info) = catalog.document(&id)? else { return Ok(None) };
            let (text, passages) = (catalog.text(&info)?, catalog.passages(&info)?);
            let parts = passages.iter().map(|passage| text.get(passage.place.bytes.clone()));
            let digest = |(number, part): (usize, Option<&str>)| Some((number as u64, passage_digest(part?)));
            Ok(Some(parts.enumerate().filter_map(digest).collect()))
        };
        match read() {
            Ok(Some(wanted)) => different += usize::from(wanted != found),
            // Told of as such.
            Ok(None) | Err(DocumentsError::DamagedDocument { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    if different + indexed.len() == 0 {
        return Ok(None);
    }
    Ok(Some(format!(
        "expected the passages of the catalog, found others of {different} documents, and {} documents that are not there",
        indexed.len()
    )))
}

/// The place of an index that is being built, and of one that is whole and takes the place of another.
fn beside(dir: &Path, ending: &str) -> PathBuf {
    dir.with_extension(ending)
}

/// Builds the index in `dir` again from the catalog. What lies there stays until the new one is whole.
pub(super) fn build_on_disk(
    catalog: &Catalog,
    info: &CollectionInfo,
    dir: &Path,
    wanted: &Derivation,
) -> Result<OpenIndex> {
    if OpenIndex::is_of_another_language(dir, wanted) {
        tracing::info!(collection = info.name, "the search index is built again for another language");
    } else if dir.exists() {
        tracing::warn!(collection = info.name, "the search index is built again from the catalog");
    }
    let (partial, whole) = (beside(dir, "partial"), beside(dir, "whole"));
    fill(OpenIndex::create(&partial, wanted.clone())?, catalog, info, wanted)?;
    std::fs::rename(&partial, &whole).map_err(|e| DocumentsError::writing(&whole, e))?;
    finish_swap(dir)?;
    let index = OpenIndex::open(dir, wanted)?;
    index.ok_or_else(|| DocumentsError::Internal("an index that was just built is another one".into()))
}

fn finish_swap(dir: &Path) -> Result<()> {
    let whole = beside(dir, "whole");
    if whole.exists() {
        remove_folder(dir)?;
        std::fs::rename(&whole, dir).map_err(|e| DocumentsError::writing(dir, e))?;
        let parent = dir.parent().unwrap_or(dir);
        let synced = std::fs::File::open(parent).and_then(|folder| folder.sync_all());
        synced.map_err(|e| DocumentsError::writing(parent, e))?;
    }
    Ok(())
}

pub(super) fn build_in_memory(catalog: &Catalog, info: &CollectionInfo, wanted: &Derivation) -> Result<OpenIndex> {
    tracing::info!(collection = info.name, "the search index is made in memory, as it cannot be written");
    fill(OpenIndex::in_memory(wanted.clone())?, catalog, info, wanted)
}

/// Brings all documents of a collection into an empty index.
fn fill(mut index: OpenIndex, catalog: &Catalog, info: &CollectionInfo, wanted: &Derivation) -> Result<OpenIndex> {
    let entries: Vec<LogEntry> = catalog.document_ids(info.id)?.into_iter().map(LogEntry::Put).collect();
    let mut writer = index.writer()?;
    index.add(&writer, catalog, &entries)?;
    index.commit(&mut writer, wanted.sequence)?;
    let dir = index.dir.clone();
    guarded(&dir, || writer.wait_merging_threads())?;
    Ok(index)
}
