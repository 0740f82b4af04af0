//! Every file of a catalog is damaged in turn: nothing wrong is served, nothing is dropped silently, and the repair that errors
//! name works.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::catalog::{NewDocument, NewPassage};
use crate::{ChunkSpan, DocumentsError, Format, Library, LibraryReport, Span, catalog_dir};

pub(crate) const COLLECTION: &str = "notes";
pub(crate) const DOCUMENTS: usize = 36;

pub(crate) fn name(number: usize) -> String {
    format!("/shelf/of/notes/note-{number:03}.md")
}

/// A text with a word that no other has. Some are longer than a piece.
pub(crate) fn text(number: usize) -> String {
    let lines = if number % 30 == 7 { 700 } else { 3 + number % 5 };
    let line = |line: usize| {
        let noise = blake3::hash(format!("{number} {line}").as_bytes()).to_hex();
        format!("Entry {line} of lighthouse{number}x says {noise}.\n")
    };
    (0..lines).map(line).collect()
}

pub(crate) fn document(number: usize) -> NewDocument {
    let text = text(number);
    let mut start = 0;
    let mut passages = Vec::new();
    for line in text.lines() {
        let bytes = start..start + line.len();
        start = bytes.end + 1;
        let place = ChunkSpan { chars: Span { start: bytes.start, end: bytes.end }, bytes };
        passages.push(NewPassage { place, page: None, tokens: vec![number as u32, passages.len() as u32] });
    }
    NewDocument {
        name: name(number),
        text,
        format: Format::Markdown,
        fingerprint: "lines".into(),
        tokenizer: Some([1; 32]),
        passages,
        attributes: None,
        instead_of: Vec::new(),
        left_by: Vec::new(),
    }
}

/// The collection; its name may have been lost.
pub(crate) fn collection_name(library: &Library) -> Result<String, DocumentsError> {
    let mut names: Vec<String> = library.collections()?.into_iter().map(|info| info.name).collect();
    assert!(names.len() < 2, "{names:?}");
    Ok(names.pop().unwrap_or_else(|| COLLECTION.into()))
}

fn put(library: &Library, numbers: impl Iterator<Item = usize>) {
    let collection = library.collection_or_new(&collection_name(library).unwrap()).unwrap();
    let writer = collection.writer().unwrap();
    let documents: Vec<NewDocument> = numbers.map(document).collect();
    for some in documents.chunks(7) {
        writer.change(|t, info| some.iter().try_for_each(|new| t.put(info, new).map(|_| ()))).unwrap();
    }
}

/// A closed library: a third of it in tables of the last level, a third in tables above, a third in the log.
pub(crate) fn fill(dir: &Path) {
    let library = Library::new(dir);
    put(&library, 0..DOCUMENTS / 3);
    library.erase().unwrap();
    put(&library, DOCUMENTS / 3..2 * DOCUMENTS / 3);
    drop(library);
    // What was in the log is in tables now.
    put(&Library::new(dir), 2 * DOCUMENTS / 3..DOCUMENTS);
}

pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        match entry.path().is_dir() {
            true => copy(&entry.path(), &to.join(entry.file_name())),
            false => drop(fs::copy(entry.path(), to.join(entry.file_name())).unwrap()),
        }
    }
}

/// Files of the catalog that hold something that is read.
pub(crate) fn files(dir: &Path) -> Vec<PathBuf> {
    let told = |name: &str| !["LOCK", "LOG", "OPTIONS", "IDENTITY"].iter().any(|start| name.starts_with(start));
    let entries = fs::read_dir(catalog_dir(dir)).unwrap().flatten();
    let mut names: Vec<PathBuf> = entries
        .filter(|entry| entry.metadata().unwrap().len() > 0 && told(&entry.file_name().to_string_lossy()))
        .map(|entry| entry.file_name().into())
        .collect();
    names.sort();
    names
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Damage {
    /// A bit, at a share of the file's length in thousandths.
    Flip(usize),
    Cut,
    Remove,
}

pub(crate) fn damage(path: &Path, damage: Damage) {
    let mut bytes = fs::read(path).unwrap();
    match damage {
        Damage::Flip(share) => {
            let at = (bytes.len() * share / 1000).min(bytes.len() - 1);
            bytes[at] ^= 1 << (share % 8);
            fs::write(path, bytes).unwrap();
        }
        Damage::Cut => fs::write(path, &bytes[..bytes.len() / 2]).unwrap(),
        Damage::Remove => fs::remove_file(path).unwrap(),
    }
}

/// What a library serves of all documents: none of it may be wrong. Documents that it does not have, or not whole, are
/// returned; those that it does not name are in `silent`.
fn served(library: &Library, silent: &mut BTreeSet<usize>) -> Result<BTreeSet<usize>, DocumentsError> {
    let collection = match library.collection(&collection_name(library)?) {
        // No row of a collection can be read.
        Err(DocumentsError::UnknownCollection { .. }) => return Ok((0..DOCUMENTS).collect()),
        outcome => outcome?,
    };
    let (whole, damaged) = collection.catalog().listing(collection.info().id)?;
    let listed: BTreeSet<String> = whole.iter().flat_map(|info| info.names.clone()).collect();
    let mut lacking = BTreeSet::new();
    for number in 0..DOCUMENTS {
        let name = name(number);
        match collection.document(Path::new(&name)) {
            Ok(Some(stored)) => assert_eq!(stored.text, text(number), "another text is served"),
            Ok(None) => {
                if !damaged.iter().any(|entry| entry.name.contains(&name)) {
                    silent.insert(number);
                }
                lacking.insert(number);
            }
            Err(DocumentsError::DamagedDocument { .. }) => {
                if !listed.contains(&name) && !damaged.iter().any(|entry| entry.name.contains(&name)) {
                    silent.insert(number);
                }
                lacking.insert(number);
            }
            Err(error) => panic!("{error}"),
        }
        match collection.search(&format!("lighthouse{number}x"), 5, &|| true) {
            Ok(found) => {
                for found in &found {
                    assert_eq!(found.path, Path::new(&name));
                    assert_eq!(found.passage, text(number)[found.span.start..found.span.end]);
                }
                assert!(!found.is_empty() || lacking.contains(&number), "{name} is whole and not found");
            }
            Err(DocumentsError::DamagedDocument { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    Ok(lacking)
}

/// Damages a copy of the library and has it repaired; returns the documents that were lost, and whether it was opened before.
fn examine(dir: &Path, before: &Library) -> (BTreeSet<usize>, bool, LibraryReport) {
    let mut silent = BTreeSet::new();
    let opened = match served(before, &mut silent) {
        Ok(_) => true,
        Err(DocumentsError::DamagedCatalog { .. }) => false,
        Err(error) => panic!("{error}"),
    };
    assert!(silent.is_empty(), "nothing says that {silent:?} are damaged");
    let verified = before.verify();
    let found = before.repair(false).unwrap().unwrap();
    if let Ok(Some(verified)) = &verified {
        assert_eq!(verified.catalog.damaged, found.catalog.damaged);
    }
    let after = Library::new(dir);
    let again = after.verify().unwrap().unwrap();
    assert!(again.is_clean(), "{again:?} after {found:?}");
    let mut unnamed = BTreeSet::new();
    let lost = served(&after, &mut unnamed).unwrap();
    // Where the log or a table is gone, names can be gone with it: then the damage as a whole was told.
    assert!(unnamed.is_empty() || !found.catalog.problems.is_empty(), "{unnamed:?} are gone silently: {found:?}");
    (lost, opened, found)
}

/// What was lost comes in again, under its id where its name was kept, and everything works.
fn goes_on(dir: &Path, lost: &BTreeSet<usize>) {
    let library = Library::new(dir);
    let collection = library.collection(&collection_name(&library).unwrap()).unwrap();
    let (_, missing) = collection.catalog().listing(collection.info().id).unwrap();
    let ids: BTreeMap<String, _> = missing.into_iter().map(|entry| (entry.name, entry.id)).collect();
    drop(collection);
    put(&library, 0..DOCUMENTS);
    assert_eq!(served(&library, &mut BTreeSet::new()).unwrap(), BTreeSet::new());
    let collection = library.collection(&collection_name(&library).unwrap()).unwrap();
    for number in lost {
        if let Some(id) = ids.get(&name(*number)) {
            assert_eq!(collection.document_info(&name(*number)).unwrap().unwrap().id, *id);
        }
    }
    drop(collection);
    library.reclaim(None).unwrap();
    library.erase().unwrap();
    assert!(library.verify().unwrap().unwrap().is_clean());
}

#[test]
fn whatever_file_of_the_catalog_is_damaged_the_way_out_works_and_whole_documents_survive() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path());
    let files = files(dir.path());
    assert!(files.len() > 20, "{files:?}");
    let scratch = tempfile::tempdir().unwrap();
    let (mut refused, mut lost_by_flips) = (0, 0);
    for (round, file) in files.iter().enumerate() {
        let kind = [Damage::Flip(37 * round % 999), Damage::Cut, Damage::Flip(999 - 101 * round % 999), Damage::Remove]
            [round % 4];
        let image = scratch.path().join(round.to_string());
        copy(dir.path(), &image);
        damage(&catalog_dir(&image).join(file), kind);
        let (lost, opened, found) = examine(&image, &Library::new(&image));
        eprintln!("{kind:?} of {}: opened {opened}, lost {lost:?}, {found:?}", file.display());
        refused += usize::from(!opened);
        if let Damage::Flip(_) = kind {
            lost_by_flips += lost.len();
        }
        goes_on(&image, &lost);
        fs::remove_dir_all(image).unwrap();
    }
    assert!(refused > 0, "no damage kept the catalog from being opened");
    assert!(lost_by_flips < DOCUMENTS * files.len() / 20, "{lost_by_flips} documents lost by flips");
}

fn lives(library: &Library) {
    assert_eq!(served(library, &mut BTreeSet::new()).unwrap(), BTreeSet::new());
}

#[test]
fn a_repair_that_was_cut_off_leaves_the_old_catalog_or_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path());
    let catalog = catalog_dir(dir.path());
    let beside = |ending: &str| catalog.with_extension(ending);
    let broken = |path: &Path| fs::remove_file(path.join("CURRENT")).unwrap();
    // Cut off while the new one was written.
    fs::create_dir(beside("repairing")).unwrap();
    fs::write(beside("repairing").join("000007.sst"), "torn").unwrap();
    lives(&Library::new(dir.path()));
    // Once it was whole, before it took the old one's place.
    copy(&catalog, &beside("repaired"));
    broken(&catalog);
    lives(&Library::new(dir.path()));
    assert!(beside("damaged").exists() && !beside("repaired").exists());
    // In between.
    fs::rename(&catalog, beside("repaired")).unwrap();
    lives(&Library::new(dir.path()));
    broken(&catalog);
    Library::new(dir.path()).repair(false).unwrap();
    lives(&Library::new(dir.path()));
    for ending in ["repairing", "repaired", "damaged", "scratch"] {
        assert!(!beside(ending).exists(), "{ending}");
    }
}

#[test]
fn a_library_that_is_open_is_repaired_under_its_users() {
    let dir = tempfile::tempdir().unwrap();
    let library = Library::new(dir.path());
    put(&library, 0..DOCUMENTS);
    let collection = library.collection(COLLECTION).unwrap();
    let before = collection.document_info(&name(1)).unwrap().unwrap();
    let report = library.repair(false).unwrap().unwrap();
    assert!(report.is_clean() && report.catalog.documents == DOCUMENTS as u64, "{report:?}");
    assert_eq!(collection.document_info(&name(1)).unwrap().unwrap(), before);
    lives(&library);
    put(&library, 0..3);
    let removed = |t: &mut crate::Transaction<'_>, info: &crate::CollectionInfo| t.remove_name(info, &name(2));
    let collection = library.collection(COLLECTION).unwrap();
    collection.writer().unwrap().change(removed).unwrap();
    assert!(collection.search("lighthouse2x", 5, &|| true).unwrap().is_empty());
    assert_eq!(collection.search("lighthouse1x", 5, &|| true).unwrap().len(), 4);
    assert!(library.verify().unwrap().unwrap().is_clean());
}

#[test]
fn nothing_is_begun_anew_unless_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path());
    for entry in fs::read_dir(catalog_dir(dir.path())).unwrap().flatten() {
        fs::write(entry.path(), "nothing of what was there").unwrap();
    }
    let library = Library::new(dir.path());
    let refused = library.catalog().err().unwrap().to_string();
    assert!(refused.contains("quire catalog verify --repair"), "{refused}");
    assert!(crate::glance(dir.path()).unwrap_err().to_string().contains("quire catalog verify --repair"));
    let nothing = library.repair(false).unwrap_err().to_string();
    assert!(nothing.contains("quire catalog verify --repair --anew"), "{nothing}");
    assert!(library.catalog().is_err());
    library.repair(true).unwrap();
    put(&library, 0..DOCUMENTS);
    lives(&library);
    assert!(catalog_dir(dir.path()).with_extension("damaged").exists(), "what was there is kept");
}

/// The end of a log may be cut off as a crash does it; but an index tells of changes that were acknowledged.
#[test]
fn a_catalog_that_has_lost_its_last_changes_is_refused_until_it_is_repaired() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path());
    let logs = fs::read_dir(catalog_dir(dir.path())).unwrap().flatten().map(|entry| entry.path());
    let logs: Vec<PathBuf> = logs.filter(|path| path.extension().is_some_and(|ending| ending == "log")).collect();
    let log = logs.iter().max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    let bytes = fs::read(log).unwrap();
    fs::write(log, &bytes[..bytes.len() * 6 / 10]).unwrap();
    let refused = Library::new(dir.path()).collections().unwrap_err().to_string();
    assert!(refused.contains("changes of documents are lost"), "{refused}");
    let report = Library::new(dir.path()).repair(false).unwrap().unwrap();
    assert!(
        report.catalog.problems.iter().any(|problem| problem.contains("changes of documents are lost")),
        "{report:?}"
    );
    let library = Library::new(dir.path());
    let lost = served(&library, &mut BTreeSet::new()).unwrap();
    assert!(!lost.is_empty() && lost.iter().all(|number| *number >= 2 * DOCUMENTS / 3), "{lost:?}");
    put(&library, 2 * DOCUMENTS / 3..DOCUMENTS);
    lives(&library);
}

#[test]
fn what_damage_keeps_from_being_erased_is_told_and_a_repair_erases_it() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path());
    let largest = fs::read_dir(catalog_dir(dir.path())).unwrap().flatten().map(|entry| entry.path());
    let tables = largest.filter(|path| path.extension().is_some_and(|ending| ending == "sst"));
    let texts = tables.max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    damage(&texts, Damage::Flip(500));
    let library = Library::new(dir.path());
    put(&library, 0..1);
    let told = library.erase().unwrap_err().to_string();
    assert!(told.contains("quire catalog verify --repair") && told.contains(".sst"), "{told}");
    // Writing goes on.
    put(&library, 1..2);
    library.repair(false).unwrap();
    library.erase().unwrap();
    assert!(library.verify().unwrap().unwrap().is_clean());
}
