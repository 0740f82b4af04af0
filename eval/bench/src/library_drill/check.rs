//! What a dead process left, looked at as the next one would see it.

use std::collections::BTreeSet;
use std::path::Path;

use chunk_cache::{ChunkKey, ChunkStore};

use super::world::{World, marker, markers, text};
use super::{COLLECTION, Known, LibraryDrillReport};
use crate::error::Result;
use documents::{Collection, DocumentsError, Library};
use service::store::{open_chunks, store_dir};
use settings::QuireError;

/// Compares the library with what was acknowledged (`known`) and what may have been done beyond it (`after`); gives what is there.
///
/// # Errors
/// What keeps the check from being made. What is wrong is in the report.
pub(super) fn check(
    data: &Path,
    documents: &Path,
    known: &mut Known,
    after: &World,
    report: &mut LibraryDrillReport,
) -> Result<World> {
    check_store(data, known, report)?;
    let library = Library::new(data);
    let collection = match library.collection(COLLECTION) {
        Ok(collection) => collection,
        Err(error) => {
            let empty = known.world.documents.is_empty();
            if !(empty && matches!(error, DocumentsError::UnknownCollection { .. })) {
                report.found.problem(format!("the collection cannot be opened: {error}"));
            }
            return Ok(World { next: known.world.next, ..World::default() });
        }
    };
    check_documents(&collection, documents, &known.world, after, report)
}

/// Of contents that were removed for good no byte is left, in documents as in the index.
pub(super) fn check_erased(data: &Path, known: &Known, report: &mut LibraryDrillReport) -> Result<()> {
    let mut folders = vec![data.join("catalog"), data.join("index"), data.join("files")];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let bytes =
                std::fs::read(&path).map_err(|source| QuireError::Io { action: "read", path: path.clone(), source })?;
            for content in markers(&bytes).intersection(&known.erased) {
                report
                    .found
                    .problem(format!("content {content} was removed for good and stands in {}", path.display()));
            }
        }
    }
    Ok(())
}

/// Each document is as it was acknowledged, or as the step that was being made leaves it, and can be found.
fn check_documents(
    collection: &Collection,
    documents: &Path,
    before: &World,
    after: &World,
    report: &mut LibraryDrillReport,
) -> Result<World> {
    let catalog = collection.catalog();
    let listed = catalog.names(collection.info().id, None, usize::MAX)?;
    let mut found = World::default();
    let mut passages = 0;
    for (path, _) in listed {
        report.documents_compared += 1;
        let name = Path::new(&path).strip_prefix(documents).unwrap_or(Path::new(&path)).to_string_lossy().into_owned();
        let document = match collection.document(Path::new(&path)) {
            Ok(Some(document)) => document,
            Ok(None) => {
                report.found.problem(format!("document {name} is listed and not there"));
                continue;
            }
            Err(error) => {
                report.found.problem(format!("document {name}: {error}"));
                continue;
            }
        };
        passages += u64::from(document.info.passages);
        let allowed = [before, after].map(|world| world.documents.get(&name).copied());
        match allowed.iter().flatten().find(|content| text(**content) == document.text) {
            Some(content) => drop(found.documents.insert(name.clone(), *content)),
            None => report.found.problem(format!("document {name} holds neither what it held nor what it was to hold")),
        }
        for passage in &document.passages {
            if let Err(error) = catalog.passage_text(&document.info, passage) {
                report.found.problem(format!("a passage of {name}: {error}"));
            }
        }
    }
    for (name, content) in &before.documents {
        if !found.documents.contains_key(name) && after.documents.contains_key(name) {
            report.found.problem(format!("acknowledged document {name} with content {content} is gone"));
        }
    }
    check_search(collection, documents, (&found, before, after), passages, report)?;
    Ok(found)
}

/// What is there is found under its name; what is gone, or did not come, is not.
fn check_search(
    collection: &Collection,
    documents: &Path,
    (found, before, after): (&World, &World, &World),
    passages: u64,
    report: &mut LibraryDrillReport,
) -> Result<()> {
    let indexed = collection.indexed_passages()?;
    if indexed != passages {
        report.found.problem(format!("the index has {indexed} passages, the catalog {passages}"));
    }
    let contents = [before, after, found].into_iter().flat_map(|world| world.documents.values().copied());
    for content in contents.collect::<BTreeSet<u64>>() {
        let hits = collection.search(&marker(content), 4, &|| true)?;
        let holder = found.documents.iter().find(|(_, held)| **held == content).map(|(name, _)| documents.join(name));
        match (holder, hits.first()) {
            (Some(holder), Some(hit)) if hit.path == holder && hit.passage.contains(&marker(content)) => {}
            (Some(holder), _) => report.found.problem(format!("{} is not found by its word", holder.display())),
            (None, Some(hit)) if hit.passage.contains(&marker(content)) => {
                report.found.problem(format!("content {content} is gone and found in {}", hit.path.display()));
            }
            (None, _) => {}
        }
    }
    Ok(())
}

/// Every acknowledged chunk is there, and every chunk holds what it always held.
fn check_store(data: &Path, known: &mut Known, report: &mut LibraryDrillReport) -> Result<()> {
    let store = if store_dir(data).is_dir() { Some(open_chunks(data, u64::MAX)) } else { None };
    let store = match store {
        None if known.chunks.is_empty() => return Ok(()),
        None => {
            report.found.problem(format!("{} chunks were acknowledged and there is no store", known.chunks.len()));
            known.chunks.clear();
            return Ok(());
        }
        Some(Err(error)) => {
            report.found.problem(format!("the chunk store cannot be opened: {error}"));
            return Ok(());
        }
        Some(Ok(store)) => store,
    };
    if let Some(problem) = &store.open_report().salvaged {
        report.found.problem(format!("the chunk store had to be salvaged: {problem}"));
    }
    let verified = store.verify().map_err(QuireError::from)?;
    if !verified.is_clean() {
        report.found.problem(format!("the chunk store is not clean: {verified:?}"));
    }
    let visible: BTreeSet<ChunkKey> = store.list().into_iter().map(|(key, _)| key).collect();
    let lost: Vec<ChunkKey> = known.chunks.difference(&visible).copied().collect();
    for key in lost {
        report.found.problem(format!("acknowledged chunk {key} is gone"));
        known.chunks.remove(&key);
    }
    for key in visible {
        report.found.chunks_compared += 1;
        match digest(&store, &key) {
            Ok(digest) if *known.digests.entry(key).or_insert(digest) == digest => {}
            Ok(_) => report.found.problem(format!("chunk {key} differs from what it held")),
            Err(error) => report.found.problem(format!("chunk {key}: {error}")),
        }
    }
    Ok(())
}

fn digest(store: &ChunkStore, key: &ChunkKey) -> std::result::Result<blake3::Hash, String> {
    let mut hasher = blake3::Hasher::new();
    let layers = store.models().first().map_or(0, |model| model.shape.layers);
    for layer in 0..layers {
        let found = store.layer(key, layer).map_err(|error| error.to_string())?;
        let found = found.ok_or_else(|| format!("layer {layer} is missing"))?;
        hasher.update(&found.keys).update(&found.values);
    }
    Ok(hasher.finalize())
}
