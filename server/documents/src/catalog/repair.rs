//! A damaged catalog is written anew, beside the old one, from what of it is whole.
//!
//! Two ways lead to the rows of a database that RocksDB does not open any more, or only past unreadable tables. It may open it
//! for reading with its checks off; or its own repair finds tables and logs without the list of files. That drops a table with
//! one unreadable block as a whole, and knows families by their tables alone, so it is given a table of each beforehand. Where the first
//! way loses anything, both are gone, and what keeps more documents is taken.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use rocksdb::{DB, Options, WriteOptions};
use rustix::process::{Flock, FlockType, fcntl_getlk};

use super::compared::{Compared, IndexedPassages};
use super::error;
use super::rows::{ReleasedChunk, seal, to_json, tokens_hash};
use super::store::{Access, Change, Family, Store, column};
use super::survey::{CatalogReport, Saved, WholeDocument, survey};
use super::{Catalog, FORMAT, FORMAT_ROW, GENERATION, IMPORTED, NEXT_COLLECTION, NEXT_SEQUENCE, keys, number, texts};
use crate::collections::remove_folder;
use crate::data_dir::{create_private_dir, free_bytes};
use crate::error::{DocumentsError, Result};

/// Bytes that are written together, about.
const BATCH_BYTES: usize = 4 << 20;

/// The folders of a repair, beside the catalog's.
struct Folders {
    catalog: PathBuf,
    /// Being written.
    partial: PathBuf,
    /// Whole, about to take the catalog's place.
    repaired: PathBuf,
    /// The damaged one.
    damaged: PathBuf,
    /// What RocksDB's repair works on.
    scratch: PathBuf,
}

impl Folders {
    fn of(catalog: &Path) -> Folders {
        let beside = |ending| catalog.with_extension(ending);
        Folders {
            catalog: catalog.into(),
            partial: beside("repairing"),
            repaired: beside("repaired"),
            damaged: beside("damaged"),
            scratch: beside("scratch"),
        }
    }
}

/// Ends a repair that was cut off: a catalog that was written anew, and is whole, takes the place of the damaged one. What
/// cannot be renamed stays as it is.
pub(crate) fn finish(catalog: &Path) -> Result<()> {
    let folders = Folders::of(catalog);
    if !folders.repaired.exists() {
        return Ok(());
    }
    let moved = |from: &Path, to: &Path| match fs::rename(from, to) {
        // Another process ends it too.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        outcome => outcome.map_err(|e| DocumentsError::writing(to, e)),
    };
    if catalog.exists() {
        remove_folder(&folders.damaged)?;
        moved(catalog, &folders.damaged)?;
    }
    moved(&folders.repaired, catalog)?;
    sync_parent(catalog)
}

fn sync_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    fs::File::open(parent).and_then(|folder| folder.sync_all()).map_err(|e| DocumentsError::writing(parent, e))
}

/// What is known of a catalog beside it, and derived from it.
pub(crate) trait Derived {
    /// The passages that search indexes of this writing of the catalog have: for each document a digest of each.
    fn passages(&self, generation: u64) -> IndexedPassages;

    /// Derives anew from a catalog that is about to take the place of another one. What is made waits beside what is in use.
    ///
    /// # Errors
    /// Those of making it: the catalog is then left as it is.
    fn derive(&self, catalog: Catalog) -> Result<()>;
}

/// Looks at all of the catalog in folder `path`, which nobody may be writing. Nothing in the folder changes.
pub(crate) fn look(path: &Path, derived: &dyn Derived) -> Result<CatalogReport> {
    let folders = Folders::of(path);
    let (_, report) = best_source(&folders, None, derived)?;
    remove_folder(&folders.scratch)?;
    Ok(report)
}

/// Writes the catalog in folder `path` anew from what of it is whole, and has it take the old one's place. Nobody may have it
/// open. With `anew`, an empty one takes its place where nothing can be saved, and the damaged one stays beside it.
pub(crate) fn repair(path: &Path, anew: bool, derived: &dyn Derived) -> Result<CatalogReport> {
    let _lock = locked(path)?;
    let report = write_beside(path, None, anew, derived)?;
    take_place(path, &report)?;
    Ok(report)
}

/// Writes a catalog beside the one in folder `path` from what of that is whole; `open`: as this process has it open.
pub(super) fn write_beside(
    path: &Path,
    open: Option<&Store>,
    anew: bool,
    derived: &dyn Derived,
) -> Result<CatalogReport> {
    let folders = Folders::of(path);
    let written = rewrite(&folders, open, anew, derived);
    let _ = remove_folder(&folders.scratch);
    if written.is_err() {
        let _ = remove_folder(&folders.partial);
    }
    written.map_err(|error| with_space(error, path))
}

fn rewrite(folders: &Folders, open: Option<&Store>, anew: bool, derived: &dyn Derived) -> Result<CatalogReport> {
    for left in [&folders.scratch, &folders.partial] {
        remove_folder(left)?;
    }
    let nothing = |problem: String| DocumentsError::NothingSaved { path: folders.catalog.clone(), problem };
    let found = best_source(folders, open, derived);
    let report = found.as_ref().map(|(_, report)| report.clone()).unwrap_or_default();
    let source = match found {
        Ok((source, report)) if report.documents > 0 || report.is_clean() => Some(source),
        Ok((_, report)) if !anew => {
            return Err(nothing(report.problems.first().cloned().unwrap_or_else(|| "no text is whole".into())));
        }
        Err(DocumentsError::DamagedCatalog { problem, .. }) if !anew => return Err(nothing(problem)),
        Ok((source, _)) => Some(source),
        Err(DocumentsError::DamagedCatalog { .. }) => None,
        Err(error) => return Err(error),
    };
    create_private_dir(&folders.partial).map_err(|e| DocumentsError::writing(&folders.partial, e))?;
    let fresh = Store::open(&folders.partial, Access::Write)?;
    let mut writer = Writer::new(&fresh);
    if let Some(source) = &source {
        survey(source, &mut |saved| writer.take(saved))?;
    }
    writer.finish()?;
    drop((fresh, source));
    // Opened as it will be: what cannot be read back takes nobody's place.
    derived.derive(Catalog::open(&folders.partial, Access::Read)?)?;
    Ok(report)
}

/// Has the catalog that was written beside the one in folder `path` take its place. Nobody may have either open.
pub(super) fn take_place(path: &Path, report: &CatalogReport) -> Result<()> {
    let folders = Folders::of(path);
    fs::rename(&folders.partial, &folders.repaired).map_err(|e| DocumentsError::writing(&folders.repaired, e))?;
    sync_parent(&folders.catalog)?;
    finish(&folders.catalog)?;
    // Kept where it may still be of use to somebody.
    if report.documents > 0 || report.is_clean() {
        remove_folder(&folders.damaged)?;
    }
    Ok(())
}

/// The rows of a catalog.
enum Source<'s> {
    /// As this process has it open, with what is in memory alone.
    Open(&'s Store),
    /// As it lies on disk.
    Read(Store),
}

impl std::ops::Deref for Source<'_> {
    type Target = Store;
    fn deref(&self) -> &Store {
        match self {
            Source::Open(store) => store,
            Source::Read(store) => store,
        }
    }
}

/// The way to the rows of a damaged database by which most documents are saved. One that is `open` is read as it is: whoever has it
/// open knows what is in its log, and has files open that may be gone.
fn best_source<'s>(
    folders: &Folders,
    open: Option<&'s Store>,
    derived: &dyn Derived,
) -> Result<(Source<'s>, CatalogReport)> {
    let objection = match open {
        Some(open) => open.damage().map(Into::into),
        None => objection(&folders.catalog)?,
    };
    let survey_of = |source: Source<'s>| -> Result<(Source<'s>, CatalogReport)> {
        let mut compared = Compared::default();
        let mut report = survey(&source, &mut |saved| compared.take(saved))?;
        report.problems.extend(objection.clone());
        if !report.is_clean() {
            let generation = number(&source, GENERATION).ok().flatten().unwrap_or(0);
            compared.with(&source, derived.passages(generation), &mut report)?;
        }
        Ok((source, report))
    };
    let read = |path: &Path| survey_of(Source::Read(Store::open_damaged(path)?));
    let direct = match open {
        Some(open) => survey_of(Source::Open(open)),
        None => read(&folders.catalog),
    };
    match &direct {
        Ok((_, report)) if report.is_clean() => return direct,
        Ok(_) | Err(DocumentsError::DamagedCatalog { .. }) => {}
        Err(_) => return direct,
    }
    let by_tables = match repaired_copy(folders) {
        Ok(()) => read(&folders.scratch),
        Err(error) => Err(error),
    };
    match (direct, by_tables) {
        (Ok(direct), Ok(tables)) if tables.1.documents > direct.1.documents => Ok(tables),
        (Ok(direct), _) => Ok(direct),
        (Err(_), Ok(tables)) => Ok(tables),
        // A full disk is to be told; else what was wrong first.
        (Err(_), Err(error @ DocumentsError::DataDir { .. })) => Err(error),
        (Err(error), Err(_)) => Err(error),
    }
}

/// What only a usual opening objects to, as records of the log that are skipped.
fn objection(catalog: &Path) -> Result<Option<String>> {
    let problem = match Store::open(catalog, Access::Read).map(|store| store.damage().map(Into::into)) {
        Ok(damage) => return Ok(damage),
        Err(error) => match DocumentsError::from(error) {
            DocumentsError::DamagedCatalog { problem, .. } => problem,
            error => return Err(error),
        },
    };
    // Files that RocksDB misses or cannot read, it names; records of the log it does not.
    Ok(Some(match ["No such file", ".sst", "MANIFEST", "CURRENT"].iter().any(|part| problem.contains(part)) {
        true => problem,
        false => format!("a part of its log cannot be read, and what changed in that is gone ({problem})"),
    }))
}

/// A copy of the database on which RocksDB's own repair was at work: all tables and logs that it could read.
fn repaired_copy(folders: &Folders) -> Result<()> {
    let scratch = &folders.scratch;
    remove_folder(scratch)?;
    create_private_dir(scratch).map_err(|e| DocumentsError::writing(scratch, e))?;
    let mut last = 0;
    for entry in fs::read_dir(&folders.catalog).map_err(|e| DocumentsError::writing(scratch, e))?.flatten() {
        let (from, to) = (entry.path(), scratch.join(entry.file_name()));
        let ending = from.extension().and_then(|ending| ending.to_str());
        if !matches!(ending, Some("sst" | "log")) {
            continue;
        }
        let number = from.file_stem().and_then(|stem| stem.to_str()?.parse::<u64>().ok());
        last = last.max(number.unwrap_or(0));
        // Repair moves files and writes none of them.
        if fs::hard_link(&from, &to).is_err() {
            fs::copy(&from, &to).map_err(|e| DocumentsError::writing(&to, e))?;
        }
    }
    add_a_table_of_each_family(scratch, last + 1)?;
    DB::repair(&Options::default(), scratch).map_err(|e| error::rocksdb(e, "repairing", scratch).into())
}

/// Tables without rows, so that RocksDB's repair knows all families, and with them what its logs say.
fn add_a_table_of_each_family(folder: &Path, from: u64) -> Result<()> {
    let made = folder.join("families");
    create_private_dir(&made).map_err(|e| DocumentsError::writing(&made, e))?;
    let store = Store::open(&made, Access::Write)?;
    store.with(|db| {
        for family in Family::ALL {
            let written = db.delete_cf_opt(column(db, family), [0], &WriteOptions::default());
            written.and_then(|()| db.flush_cf(column(db, family))).map_err(store.fail("writing"))?;
        }
        Ok(())
    })?;
    drop(store);
    let tables = fs::read_dir(&made).map_err(|e| DocumentsError::writing(&made, e))?.flatten();
    let tables = tables.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|ending| ending == "sst"));
    for (number, table) in (from..).zip(tables) {
        let to = folder.join(format!("{number:06}.sst"));
        fs::rename(&table, &to).map_err(|e| DocumentsError::writing(&to, e))?;
    }
    remove_folder(&made)
}

/// The lock by which RocksDB knows who writes; gone with what is returned.
fn locked(path: &Path) -> Result<fs::File> {
    let place = path.join("LOCK");
    let file = fs::OpenOptions::new().create(true).truncate(false).write(true).read(true).open(&place);
    let file = file.map_err(|e| DocumentsError::writing(&place, e))?;
    match rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(_) if fcntl_getlk(&file, &Flock::from(FlockType::WriteLock)).is_ok() => {
            Err(DocumentsError::CatalogInUse { path: path.into() })
        }
        Err(error) => Err(DocumentsError::writing(&place, error.into())),
    }
}

/// Says how much space a repair needs where there is not enough.
fn with_space(error: DocumentsError, catalog: &Path) -> DocumentsError {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    match error {
        DocumentsError::DataDir { path, source } if matches!(source.kind(), StorageFull | QuotaExceeded) => {
            let sizes = fs::read_dir(catalog).into_iter().flatten().flatten().filter_map(|entry| entry.metadata().ok());
            let needed: u64 = sizes.map(|found| found.len()).sum();
            DocumentsError::RepairSpace { free: free_bytes(catalog).unwrap_or(0), needed: 2 * needed, path }
        }
        error => error,
    }
}

/// Writes a catalog from what was saved of another.
struct Writer<'a> {
    store: &'a Store,
    waiting: Vec<Change>,
    bytes: usize,
    written_texts: HashSet<[u8; 32]>,
    /// Chunks that documents need, by the hash of their tokens.
    needed: HashSet<[u8; 32]>,
    released: Vec<Vec<u32>>,
    next_sequence: u64,
    last_collection: u64,
}

impl<'a> Writer<'a> {
    fn new(store: &'a Store) -> Writer<'a> {
        Writer {
            store,
            waiting: Vec::new(),
            bytes: 0,
            written_texts: HashSet::new(),
            needed: HashSet::new(),
            released: Vec::new(),
            next_sequence: 1,
            last_collection: 0,
        }
    }

    fn put(&mut self, family: Family, key: Vec<u8>, content: &[u8]) -> Result<()> {
        let row = seal(family, &key, content);
        self.bytes += key.len() + row.len();
        self.waiting.push(((family, key), Some(row)));
        if self.bytes < BATCH_BYTES {
            return Ok(());
        }
        self.write(false)
    }

    fn write(&mut self, synced: bool) -> Result<()> {
        self.bytes = 0;
        Ok(self.store.write(std::mem::take(&mut self.waiting), synced)?)
    }

    fn take(&mut self, saved: Saved<'_>) -> Result<()> {
        match saved {
            Saved::Document(whole) => self.document(whole),
            Saved::LostName { collection, name, id } => {
                self.put(Family::Names, keys::name(collection, false, name), id.bytes())
            }
            Saved::LostTokens(tokens) => {
                self.released.extend(tokens);
                Ok(())
            }
            Saved::Collection(info) => {
                self.last_collection = self.last_collection.max(u64::from(info.id));
                let key = match info.removed {
                    Some(_) => keys::removed_collection(info.id),
                    None => keys::collection(&info.name),
                };
                self.put(Family::Collections, key, &to_json(info))
            }
            Saved::Row(Family::Meta, key, content) => self.meta(key, content),
            Saved::Row(Family::Released, _, content) => {
                // Whether it is still needed is asked at the end.
                if let Ok(ReleasedChunk { tokens, gone: false }) = super::rows::from_json(content) {
                    self.released.push(tokens);
                    return Ok(());
                }
                let tokens = super::rows::from_json::<ReleasedChunk>(content).map(|chunk| tokens_hash(&chunk.tokens));
                tokens.map_or(Ok(()), |hash| self.put(Family::Released, hash.to_vec(), content))
            }
            Saved::Row(family, key, content) => self.put(family, key.to_vec(), content),
        }
    }

    fn document(&mut self, whole: &WholeDocument) -> Result<()> {
        let WholeDocument { info, text, passages, released } = whole;
        let (id, collection) = (info.id.bytes().to_vec(), info.collection);
        if self.written_texts.insert(info.content) {
            for (number, piece) in texts::pieces(text) {
                self.put(Family::Texts, keys::piece(&info.content, number), piece)?;
            }
        }
        self.put(Family::TextRefs, keys::reference(&info.content, &info.id), &[])?;
        for (number, passage) in (0u32..).zip(passages) {
            self.put(Family::Passages, keys::passage(&info.id, number), &passage.encode())?;
            if info.removed.is_none() && !passage.tokens.is_empty() {
                let hash = tokens_hash(&passage.tokens);
                self.needed.insert(hash);
                self.put(Family::ChunkRefs, keys::reference(&hash, &info.id), &[])?;
            }
        }
        if info.removed.is_none() {
            self.put(Family::Contents, keys::content(collection, info.format, &info.content), &id)?;
            for name in &info.names {
                self.put(Family::Names, keys::name(collection, false, name), &id)?;
            }
        }
        self.released.extend(released.iter().cloned());
        self.put(Family::Documents, id, &to_json(info))
    }

    fn meta(&mut self, key: &[u8], content: &[u8]) -> Result<()> {
        let number = content.try_into().map(u64::from_be_bytes);
        match (key, number) {
            (NEXT_SEQUENCE, Ok(number)) => self.next_sequence = self.next_sequence.max(number),
            (NEXT_COLLECTION, Ok(number)) => self.last_collection = self.last_collection.max(number),
            (IMPORTED, _) => return self.put(Family::Meta, key.to_vec(), content),
            _ => {}
        }
        Ok(())
    }

    /// Writes what says of the catalog as a whole, and has all of it on disk.
    fn finish(mut self) -> Result<()> {
        for tokens in std::mem::take(&mut self.released) {
            let hash = tokens_hash(&tokens);
            if self.needed.insert(hash) {
                self.put(Family::Released, hash.to_vec(), &to_json(&ReleasedChunk { tokens, gone: false }))?;
            }
        }
        let generation: u64 = rand::random();
        for (key, number) in [
            (FORMAT_ROW, u64::from(FORMAT)),
            (NEXT_SEQUENCE, self.next_sequence),
            (NEXT_COLLECTION, self.last_collection),
            (GENERATION, generation),
        ] {
            self.put(Family::Meta, key.to_vec(), &number.to_be_bytes())?;
        }
        self.write(true)?;
        Ok(self.store.flush()?)
    }
}
