//! Listing, removing and restoring documents and collections: what can be done without a model, as data, so that it can be
//! asked for from elsewhere.

use documents::{
    Catalog, CollectionInfo, CollectionWriter, DamagedEntry, DocumentId, DocumentInfo, DocumentsError, Library,
    Transaction,
};
use serde::{Deserialize, Serialize};

use super::Service;
use super::vector_stores::{forget_removed, is_store_id, removed_name, restored_name};
use settings::{QuireError, Result};

/// Documents that are removed at a time.
const NAMES_AT_A_TIME: usize = 256;

/// What can be done with documents that are there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum DocumentsCommand {
    /// List the documents of a collection.
    List {
        /// The collection.
        collection: String,
    },
    /// List the collections.
    Collections,
    /// Give a collection another name.
    Rename {
        /// The collection.
        collection: String,
        /// Its new name.
        to: String,
    },
    /// Remove documents, or a collection with all of its documents.
    Remove {
        /// The collection.
        collection: String,
        /// The documents, or folders that they lie below; none: the whole collection.
        names: Vec<DocumentName>,
        /// For good, down to the bytes on disk; else they can be restored until space is reclaimed.
        now: bool,
    },
    /// List the collections that were removed and can be brought back.
    Removed,
    /// Bring back what was removed.
    Restore {
        /// The collection; one that is to come back as a whole may be called by the id that it got when it was removed.
        collection: String,
        /// The documents, or folders that they lay below; none: the whole collection.
        names: Vec<DocumentName>,
    },
    /// Remove for good all that could still be restored, down to the bytes on disk.
    Reclaim,
}

/// A document as people name it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentName {
    /// What was given: an id, a name, or a path.
    pub given: String,
    /// The paths that this may mean, absolute; and what it means if its escapes are those that lists show.
    pub paths: Vec<String>,
}

impl DocumentName {
    /// What `given` may mean to somebody in the current folder.
    #[must_use]
    pub fn here(given: &str) -> DocumentName {
        let meant = |given: &str| {
            let absolute = std::path::absolute(given).ok();
            let canonical = std::fs::canonicalize(given).ok();
            let mut paths: Vec<String> =
                [canonical, absolute].into_iter().flatten().filter_map(|p| p.to_str().map(Into::into)).collect();
            paths.dedup();
            paths
        };
        let mut paths = meant(given);
        if let Some(shown) = unescaped(given) {
            paths.extend(meant(&shown));
            paths.push(shown);
        }
        DocumentName { given: given.into(), paths }
    }

    /// All that it may be known by.
    fn candidates(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.given.as_str()).chain(self.paths.iter().map(String::as_str))
    }

    /// The name that a document of the collection is known by, or its id.
    fn find(&self, catalog: &Catalog, collection: &CollectionInfo) -> Result<Option<Target>> {
        if let Ok(id) = self.given.parse::<DocumentId>() {
            let there = |info: &DocumentInfo| info.collection == collection.id && info.removed.is_none();
            return Ok(catalog.document(&id)?.filter(there).map(|info| Target::Document(info.id)));
        }
        for name in self.candidates() {
            if catalog.named(collection.id, name)?.is_some() {
                return Ok(Some(Target::Name(name.into())));
            }
        }
        let below = self.below(catalog, collection, false)?;
        Ok((!below.is_empty()).then_some(Target::Below(below)))
    }

    /// Names of documents below the folder that this may be, or of the uploaded file: those that are there, or those that were
    /// removed. Of a document whose id this is, those that it was removed with.
    fn below(&self, catalog: &Catalog, collection: &CollectionInfo, removed: bool) -> Result<Vec<String>> {
        if removed && let Ok(id) = self.given.parse::<DocumentId>() {
            let known = catalog.document(&id)?.filter(|info| info.collection == collection.id);
            return Ok(known.map_or_else(Vec::new, |info| match info.removed {
                Some(_) => info.names,
                None => info.removed_names,
            }));
        }
        for folder in self.candidates() {
            let names = catalog.names_below(collection.id, folder, removed)?;
            if !names.is_empty() {
                return Ok(names);
            }
        }
        Ok(Vec::new())
    }
}

/// A name without the escapes (`\u{1b}`) in which control characters are shown; `None` where it has none.
fn unescaped(shown: &str) -> Option<String> {
    let (mut out, mut rest, mut found) = (String::with_capacity(shown.len()), shown, false);
    while let Some(at) = rest.find("\\u{") {
        let (before, escape) = rest.split_at(at);
        let digits = escape[3..].split_once('}');
        let char = digits.and_then(|(digits, _)| u32::from_str_radix(digits, 16).ok()).and_then(char::from_u32);
        out.push_str(before);
        match (char, digits) {
            (Some(char), Some((_, behind))) => {
                out.push(char);
                (rest, found) = (behind, true);
            }
            _ => {
                out.push_str(&escape[..3]);
                rest = &escape[3..];
            }
        }
    }
    out.push_str(rest);
    found.then_some(out)
}

/// What a name stands for in a collection.
enum Target {
    /// A document with all of its names.
    Document(DocumentId),
    /// One name of a document.
    Name(String),
    /// Names of documents below a folder, or of an uploaded file.
    Below(Vec<String>),
}

/// A document in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentSummary {
    /// Its id.
    pub id: DocumentId,
    /// The names that it is known by.
    pub names: Vec<String>,
    /// Bytes of its text.
    pub bytes: u64,
    /// Its passages.
    pub passages: u32,
    /// Tokens of its passages.
    pub tokens: u64,
    /// When it came in, in seconds since 1970.
    pub created: u64,
    /// When it last changed.
    pub updated: u64,
}

impl From<DocumentInfo> for DocumentSummary {
    fn from(info: DocumentInfo) -> DocumentSummary {
        let DocumentInfo { id, names, bytes, passages, tokens, created, updated, .. } = info;
        DocumentSummary { id, names, bytes, passages, tokens, created, updated }
    }
}

/// A collection in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CollectionSummary {
    /// Its name.
    pub name: String,
    /// Its documents.
    pub documents: u64,
    /// Bytes of their texts.
    pub bytes: u64,
    /// Their passages.
    pub passages: u64,
    /// Tokens of their passages.
    pub tokens: u64,
    /// `auto`, or the language that it is set to.
    pub language: String,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// Documents that are damaged or lost, and not counted above.
    #[serde(default)]
    pub damaged: u64,
}

/// What a command found or did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum DocumentsEvent {
    /// A document of a collection.
    Document(DocumentSummary),
    /// A document of a collection that is damaged, or was lost to damage.
    Damaged {
        /// What it is known by.
        name: String,
        /// Its id.
        id: DocumentId,
        /// What is wrong.
        problem: String,
    },
    /// A collection.
    Collection(CollectionSummary),
    /// A collection has another name.
    Renamed {
        /// What it was called.
        name: String,
        /// What it is called.
        to: String,
    },
    /// A document or a collection is removed.
    Removed {
        /// What it was called.
        name: String,
    },
    /// A collection that was removed and can be brought back.
    RemovedCollection {
        /// What it was called.
        name: String,
        /// What it is told by from others of that name.
        id: String,
        /// Its documents.
        documents: u64,
        /// When it was removed, in seconds since 1970.
        removed: u64,
    },
    /// A document or a collection is back.
    Restored {
        /// What it is called.
        name: String,
        /// Whether the name stood for another text meanwhile, which is removed now and comes back with the same command.
        replaced: bool,
    },
    /// A name stands for nothing, or what it stands for cannot be changed.
    Failed {
        /// The name.
        name: String,
        /// Why.
        error: String,
    },
    /// Space was reclaimed.
    Reclaimed {
        /// Collections that are gone for good.
        collections: usize,
        /// Documents that are gone for good.
        documents: usize,
        /// Cached chunks that are gone with them.
        chunks: u64,
    },
}

/// Carries out a command over documents; what it finds and does is told to `on_event`. Chunks of documents that are gone
/// for good are removed by `release`, which says how many there were.
///
/// # Errors
/// An unknown collection, a catalog that fails or cannot be written; [`QuireError::CheckFailed`] if some names failed.
pub fn manage_documents(
    library: &Library,
    command: &DocumentsCommand,
    release: &dyn Fn() -> Result<u64>,
    on_event: &mut dyn FnMut(DocumentsEvent),
) -> Result<()> {
    match command {
        DocumentsCommand::List { collection } => list(library, collection, on_event),
        DocumentsCommand::Collections => collections(library, on_event),
        DocumentsCommand::Rename { collection, to } => rename(library, collection, to, on_event),
        DocumentsCommand::Remove { collection, names, now } => {
            let removed = remove(library, collection, names, on_event)?;
            if *now {
                removed.purge(library)?;
                release()?;
                library.erase()?;
            }
            removed.check()
        }
        DocumentsCommand::Removed => removed_collections(library, None, on_event),
        DocumentsCommand::Restore { collection, names } => restore(library, collection, names, on_event),
        DocumentsCommand::Reclaim => reclaim(library, release, on_event),
    }
}

impl Service {
    /// As [`manage_documents`], with this service's documents and chunks.
    ///
    /// # Errors
    /// As [`manage_documents`].
    pub fn manage_documents(&self, command: &DocumentsCommand, on_event: &mut dyn FnMut(DocumentsEvent)) -> Result<()> {
        let done = manage_documents(&self.library, command, &|| self.release_chunks(), on_event);
        if !matches!(command, DocumentsCommand::List { .. } | DocumentsCommand::Collections | DocumentsCommand::Removed)
        {
            self.let_chunks_go();
        }
        if matches!(command, DocumentsCommand::Restore { names, .. } if names.is_empty()) {
            // Files that waited to be read when their store was removed wait again.
            self.queue_waiting()?;
        }
        done
    }
}

/// A collection that is there.
fn known(library: &Library, catalog: Option<&Catalog>, name: &str) -> Result<CollectionInfo> {
    let found = catalog.map(|catalog| catalog.collection(name)).transpose()?.flatten();
    let unknown = || -> Result<CollectionInfo> {
        let known = library.collections()?.into_iter().map(|info| info.name).collect();
        Err(DocumentsError::UnknownCollection { name: name.into(), known }.into())
    };
    found.map_or_else(unknown, Ok)
}

fn list(library: &Library, name: &str, on_event: &mut dyn FnMut(DocumentsEvent)) -> Result<()> {
    let catalog = library.catalog()?;
    let collection = known(library, catalog.as_deref(), name)?;
    let Some(catalog) = catalog else { return Ok(()) };
    let (whole, damaged) = catalog.listing(collection.id)?;
    whole.into_iter().for_each(|info| on_event(DocumentsEvent::Document(info.into())));
    for DamagedEntry { name, id, problem } in damaged {
        on_event(DocumentsEvent::Damaged { name, id, problem });
    }
    Ok(())
}

fn collections(library: &Library, on_event: &mut dyn FnMut(DocumentsEvent)) -> Result<()> {
    let Some(catalog) = library.catalog()? else { return Ok(()) };
    for info in catalog.collections()? {
        let totals = catalog.totals(info.id)?;
        let sum = CollectionSummary {
            name: info.name.clone(),
            documents: totals.documents,
            bytes: totals.bytes,
            passages: totals.passages,
            tokens: totals.tokens,
            language: info.language.to_string(),
            created: info.created,
            damaged: catalog.damaged_documents(info.id)?,
        };
        on_event(DocumentsEvent::Collection(sum));
    }
    Ok(())
}

/// Tells of collections that can be brought back: all, or those that were called `only`.
fn removed_collections(library: &Library, only: Option<&str>, on_event: &mut dyn FnMut(DocumentsEvent)) -> Result<()> {
    let Some(catalog) = library.catalog()? else { return Ok(()) };
    for info in catalog.removed_collections()?.into_iter().filter(|info| only.is_none_or(|only| info.name == only)) {
        let documents = catalog.totals(info.id)?.documents;
        let (id, removed) = (info.removed_id(), info.removed.unwrap_or(info.created));
        on_event(DocumentsEvent::RemovedCollection { name: info.name, id, documents, removed });
    }
    Ok(())
}

fn rename(library: &Library, name: &str, to: &str, on_event: &mut dyn FnMut(DocumentsEvent)) -> Result<()> {
    known(library, library.catalog()?.as_deref(), name)?;
    // Clients of the API know it by this name, which is its id there.
    if is_store_id(name) {
        return Err(QuireError::InvalidParameter {
            param: "OLD".into(),
            problem: format!(
                "expected a collection that was made by `quire ingest`: the id of vector store `{name}` stays. Change the name \
                 that clients see: POST /v1/vector_stores/{name} with {{\"name\": \"...\"}}"
            ),
        });
    }
    if library.rename_collection(name, to)?.is_none() {
        return known(library, library.catalog()?.as_deref(), name).map(|_| ());
    }
    on_event(DocumentsEvent::Renamed { name: name.into(), to: to.into() });
    Ok(())
}

/// What was removed by name.
#[derive(Default)]
struct Removed {
    collection: Option<u32>,
    documents: Vec<DocumentId>,
    /// How many names stood for nothing, and how many there were.
    failed: (usize, usize),
}

impl Removed {
    /// Removes it for good.
    fn purge(&self, library: &Library) -> Result<()> {
        if let Some(id) = self.collection {
            library.reclaim(Some(id))?;
        }
        library.writable()?.purge(&self.documents)?;
        Ok(())
    }

    fn check(&self) -> Result<()> {
        check(self.failed, "removed")
    }
}

fn remove(
    library: &Library,
    name: &str,
    names: &[DocumentName],
    on_event: &mut dyn FnMut(DocumentsEvent),
) -> Result<Removed> {
    // So that nothing is made where there is nothing to remove.
    known(library, library.catalog()?.as_deref(), name)?;
    let catalog = library.writable()?;
    let mut done = Removed { failed: (0, names.len()), ..Removed::default() };
    if names.is_empty() {
        done.collection = library.remove_collection(name)?.map(|info| info.id);
        on_event(DocumentsEvent::Removed { name: name.into() });
        return Ok(done);
    }
    let collection = library.collection(name)?;
    let writer = collection.writer()?;
    for wanted in names {
        let removed = match wanted.find(&catalog, collection.info())? {
            Some(target) => remove_target(&writer, target, &wanted.given)?,
            None => Vec::new(),
        };
        if removed.is_empty() {
            done.failed.0 += 1;
            let unknown = DocumentsError::UnknownDocument { name: wanted.given.clone(), collection: name.into() };
            on_event(DocumentsEvent::Failed { name: wanted.given.clone(), error: unknown.to_string() });
        }
        for (name, id) in removed {
            // One with further names stays.
            if matches!(catalog.document(&id), Ok(Some(info)) if info.removed.is_some()) {
                done.documents.push(id);
            }
            on_event(DocumentsEvent::Removed { name });
        }
    }
    Ok(done)
}

/// Removes what a name stands for: what that was, by the names to tell, and the documents' ids.
fn remove_target(writer: &CollectionWriter<'_>, target: Target, given: &str) -> Result<Vec<(String, DocumentId)>> {
    let named = matches!(target, Target::Name(_));
    let names = match target {
        Target::Document(id) => {
            let remove = |transaction: &mut Transaction<'_>, info: &CollectionInfo| {
                let names = transaction.document(&id)?.map(|document| document.names).unwrap_or_default();
                names.iter().try_for_each(|name| removed_name(transaction, info, name))?;
                transaction.remove(&id)
            };
            let (removed, _) = writer.change(remove)?;
            return Ok(Vec::from_iter(removed.then(|| (given.to_string(), id))));
        }
        Target::Name(name) => vec![name],
        Target::Below(names) => names,
    };
    let mut removed = Vec::new();
    // A transaction is held in memory.
    for some in names.chunks(NAMES_AT_A_TIME) {
        let remove = |transaction: &mut Transaction<'_>, info: &CollectionInfo| {
            let remove_one = |name: &String| {
                removed_name(transaction, info, name)?;
                Ok(transaction.remove_name(info, name)?.map(|id| (name.clone(), id)))
            };
            some.iter().map(remove_one).collect::<documents::Result<Vec<_>>>()
        };
        removed.extend(writer.change(remove)?.0.into_iter().flatten());
    }
    if named {
        removed.iter_mut().for_each(|(name, _)| *name = given.to_string());
    }
    Ok(removed)
}

fn restore(
    library: &Library,
    name: &str,
    names: &[DocumentName],
    on_event: &mut dyn FnMut(DocumentsEvent),
) -> Result<()> {
    let catalog = library.writable()?;
    if names.is_empty() {
        let Some(info) = catalog.restore_collection(name)? else {
            return Err(QuireError::CheckFailed(format!(
                "no collection `{name}` was removed, or its space is reclaimed; `quire rm --undo` lists what can be brought back"
            )));
        };
        on_event(DocumentsEvent::Restored { name: info.name.clone(), replaced: false });
        // Others of its name wait for it to be renamed or removed.
        return removed_collections(library, Some(&info.name), on_event);
    }
    let collection = library.collection(name)?;
    let writer = collection.writer()?;
    let mut failed = 0;
    for wanted in names {
        let below = wanted.below(&catalog, collection.info(), true)?;
        let restored = writer.change(|transaction, info| {
            for candidate in wanted.candidates() {
                if let Some(restored) = restored_name(transaction, info, candidate)? {
                    return Ok(vec![(wanted.given.clone(), restored.replaced)]);
                }
            }
            let mut restore_one =
                |name: &String| Ok(restored_name(transaction, info, name)?.map(|back| (name.clone(), back.replaced)));
            below.iter().filter_map(|name| restore_one(name).transpose()).collect()
        });
        let error = match restored {
            Ok((restored, _)) if !restored.is_empty() => {
                for (name, replaced) in restored {
                    on_event(DocumentsEvent::Restored { name, replaced });
                }
                continue;
            }
            Ok(_) => format!("no document `{}` was removed, or its space is reclaimed", wanted.given),
            Err(error @ DocumentsError::DamagedDocument { .. }) => error.to_string(),
            Err(error) => return Err(error.into()),
        };
        failed += 1;
        on_event(DocumentsEvent::Failed { name: wanted.given.clone(), error });
    }
    check((failed, names.len()), "restored")
}

fn reclaim(
    library: &Library,
    release: &dyn Fn() -> Result<u64>,
    on_event: &mut dyn FnMut(DocumentsEvent),
) -> Result<()> {
    if library.catalog()?.is_none() {
        on_event(DocumentsEvent::Reclaimed { collections: 0, documents: 0, chunks: 0 });
        return Ok(());
    }
    let reclaimed = library.reclaim(None)?;
    forget_removed(library)?;
    // The tokens of released chunks are rows of the catalog until the chunk store was told.
    let chunks = release()?;
    // What is gone is gone, also where damage keeps its bytes on the disk, which is told last.
    let erased = library.erase();
    let collections = reclaimed.collections.len();
    on_event(DocumentsEvent::Reclaimed { collections, documents: reclaimed.documents, chunks });
    Ok(erased?)
}

fn check((failed, total): (usize, usize), what: &str) -> Result<()> {
    match failed {
        0 => Ok(()),
        failed => {
            Err(QuireError::CheckFailed(format!("{failed} of {total} documents could not be {what} (named above)")))
        }
    }
}

#[cfg(test)]
#[path = "manage/tests.rs"]
mod tests;
