//! What comes in beside damage, and what a look and a repair make of it while the library is open, as in a server.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::damage_tests::{
    COLLECTION, DOCUMENTS, Damage, collection_name, copy, damage, document, files, fill, name, text,
};
use super::{DocumentsError, JobRecord, Library, RecordKind, catalog_dir};

/// Documents that come in beside the damage; one is longer than a piece.
const NEW: std::ops::Range<usize> = DOCUMENTS..DOCUMENTS + 3;
const LONG: usize = 67;

fn come_in(library: &Library, numbers: &[usize]) -> Result<(), DocumentsError> {
    let collection = library.collection_or_new(&collection_name(library)?)?;
    let writer = collection.writer()?;
    writer.change(|t, info| numbers.iter().try_for_each(|number| t.put(info, &document(*number)).map(|_| ())))?;
    Ok(())
}

/// Documents can be listed, read, found, and removed by folder.
fn are_there(library: &Library, numbers: &[usize], what: &str) {
    if numbers.is_empty() {
        return;
    }
    let collection = library.collection(&collection_name(library).unwrap()).unwrap();
    let (catalog, id) = (collection.catalog(), collection.info().id);
    let (whole, _) = catalog.listing(id).unwrap();
    let names = catalog.names(id, None, usize::MAX).unwrap();
    let below = catalog.names_below(id, "/shelf/of", false).unwrap();
    for number in numbers {
        let name = name(*number);
        assert!(whole.iter().any(|info| info.names.contains(&name)), "{what}: {name} is not listed");
        assert!(names.iter().any(|(known, _)| *known == name) && below.contains(&name), "{what}: {name}");
        let stored = collection.document(Path::new(&name)).unwrap().unwrap();
        assert_eq!(stored.text, text(*number), "{what}");
        let found = collection.search(&format!("lighthouse{number}x"), 5, &|| true).unwrap();
        assert!(!found.is_empty() && found.iter().all(|found| found.path == Path::new(&name)), "{what}: {name}");
    }
}

fn tables(dir: &Path) -> Vec<PathBuf> {
    files(dir).into_iter().filter(|file| file.extension().is_some_and(|ending| ending == "sst")).collect()
}

fn names_the_cure(error: &DocumentsError, what: &str) {
    let told = error.to_string();
    assert!(told.contains("quire catalog verify --repair"), "{what}: {told}");
}

/// New documents, again and in another version, and a damaged one that comes in again: found at once or refused, and then whole
/// for whoever looks through the library while it is open and after it was repaired under its users.
fn examine(image: &Path, library: &Library, what: &str) -> bool {
    let mut numbers: Vec<usize> = NEW.chain([LONG]).collect();
    let taken = match come_in(library, &numbers) {
        Ok(()) => true,
        Err(error) => {
            names_the_cure(&error, what);
            numbers.clear();
            false
        }
    };
    are_there(library, &numbers, what);
    if taken {
        // What was there before, whole or not.
        let again: Vec<usize> = (0..DOCUMENTS).step_by(5).collect();
        come_in(library, &again).unwrap();
        numbers.extend(again);
        are_there(library, &numbers, what);
    }
    let names: Vec<String> = numbers.iter().map(|number| name(*number)).collect();
    let spared = |report: &crate::LibraryReport, when: &str| {
        let wrong = |entry: &&crate::DamagedDocument| !entry.is_saved && names.contains(&entry.name);
        let lost: Vec<_> = report.catalog.damaged.iter().filter(wrong).collect();
        assert!(lost.is_empty(), "{what}: {when} {lost:?}");
    };
    spared(&library.verify().unwrap().unwrap(), "verify");
    spared(&library.repair(false).unwrap().unwrap(), "repair");
    are_there(library, &numbers, what);
    assert!(library.verify().unwrap().unwrap().is_clean(), "{what}");
    come_in(library, &NEW.chain([LONG]).collect::<Vec<_>>()).unwrap();
    are_there(&Library::new(image), &NEW.chain([LONG]).collect::<Vec<_>>(), what);
    taken
}

#[test]
fn what_comes_in_beside_a_damaged_table_is_found_at_once_or_refused_with_the_cure() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path());
    let scratch = tempfile::tempdir().unwrap();
    let (mut taken, mut refused) = (0, Vec::new());
    for (round, file) in tables(dir.path()).iter().enumerate() {
        let kind = [Damage::Remove, Damage::Flip(311 * round % 999), Damage::Cut][round % 3];
        let image = scratch.path().join("image");
        copy(dir.path(), &image);
        damage(&catalog_dir(&image).join(file), kind);
        let what = format!("{kind:?} of {}", file.display());
        match examine(&image, &Library::new(&image), &what) {
            true => taken += 1,
            false => refused.push(what),
        }
        fs::remove_dir_all(image).unwrap();
    }
    eprintln!("{taken} taken, refused: {refused:?}");
    assert!(taken > 4 * refused.len(), "{taken} taken, {refused:?} refused");
}

#[test]
fn a_table_that_is_damaged_while_the_library_is_open_loses_nothing_that_comes_in_later() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path());
    let scratch = tempfile::tempdir().unwrap();
    for (round, file) in tables(dir.path()).iter().enumerate().skip(1).step_by(2) {
        let image = scratch.path().join("image");
        copy(dir.path(), &image);
        let library = Library::new(&image);
        library.writable().unwrap();
        let kind = [Damage::Cut, Damage::Flip(500), Damage::Remove][round % 3];
        damage(&catalog_dir(&image).join(file), kind);
        examine(&image, &library, &format!("{kind:?} of {}", file.display()));
        fs::remove_dir_all(image).unwrap();
    }
}

#[test]
fn a_record_that_no_list_would_show_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path());
    let record = |id: &str| JobRecord {
        id: id.into(),
        kind: "file".into(),
        state: "uploaded".into(),
        created: 1,
        expires: None,
        done: 0,
        total: 0,
        last_error: None,
        detail: serde_json::Value::Null,
    };
    let library = Library::new(dir.path());
    let catalog = library.writable().unwrap();
    for id in ["file-a", "file-z"] {
        catalog.put_record(RecordKind::File, &record(id)).unwrap();
    }
    // The log is in tables now, each family in its own.
    catalog.flush().unwrap();
    drop((catalog, library));
    let holds = |path: &Path| fs::read(path).unwrap().windows(6).any(|bytes| bytes == b"file-z");
    let paths = tables(dir.path()).into_iter().map(|file| catalog_dir(dir.path()).join(file));
    let table = paths.filter(|path| holds(path)).max().unwrap();
    damage(&table, Damage::Remove);
    let library = Library::new(dir.path());
    let catalog = library.writable().unwrap();
    let error = catalog.put_record(RecordKind::File, &record("file-m")).unwrap_err();
    names_the_cure(&error, "a record");
    // Where it would be shown, it is taken in.
    catalog.put_record(RecordKind::Job, &record("job")).unwrap();
    assert_eq!(catalog.records(RecordKind::Job).unwrap().len(), 1);
    library.repair(false).unwrap();
    catalog.put_record(RecordKind::File, &record("file-m")).unwrap();
    assert_eq!(catalog.records(RecordKind::File).unwrap().len(), 1);
}

/// RocksDB takes no more writes once a compaction has failed.
#[test]
fn a_compaction_that_comes_upon_damage_stops_no_writer() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path());
    // The collection's own row is needed by everybody.
    for path in tables(dir.path()).iter().map(|file| catalog_dir(dir.path()).join(file)) {
        if fs::metadata(&path).unwrap().len() > 3000 {
            damage(&path, Damage::Flip(20));
        }
    }
    let library = Library::new(dir.path());
    let catalog = library.writable().unwrap();
    for number in 0..24 {
        come_in(&library, &[DOCUMENTS + number]).unwrap();
        let _ = catalog.flush();
    }
    assert!(catalog.is_uncompacted(), "nothing was compacted");
    are_there(&library, &(DOCUMENTS..DOCUMENTS + 24).collect::<Vec<_>>(), "compacted");
}

/// What an image of the log has lost is told, and counted, whichever part of it is damaged.
#[test]
fn changes_that_are_gone_with_a_damaged_log_are_told_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path());
    // A document that is there in another version since.
    let library = Library::new(dir.path());
    come_in(&library, &[DOCUMENTS, DOCUMENTS + 1]).unwrap();
    let collection = library.collection_or_new(COLLECTION).unwrap();
    let mut other = document(1);
    (other.text, other.passages) = (text(99), document(99).passages);
    collection.writer().unwrap().change(|t, info| t.put(info, &other).map(|_| ())).unwrap();
    come_in(&library, &[DOCUMENTS + 2]).unwrap();
    drop((collection, library));
    let logs = fs::read_dir(catalog_dir(dir.path())).unwrap().flatten().map(|entry| entry.path());
    let logs = logs.filter(|path| path.extension().is_some_and(|ending| ending == "log"));
    let log = logs.max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let mut counted = BTreeSet::new();
    for share in [5, 200, 400, 600, 800, 950, 999] {
        let image = scratch.path().join("image");
        copy(dir.path(), &image);
        damage(&catalog_dir(&image).join(log.file_name().unwrap()), Damage::Flip(share));
        let library = Library::new(&image);
        let looked = library.verify().unwrap().unwrap();
        eprintln!("{share}: {looked:?}");
        let report = library.repair(false).unwrap().unwrap();
        let what = format!("flipped at {share}: {report:?}");
        assert_eq!(looked.catalog.damaged, report.catalog.damaged, "{what}");
        let collection = library.collection(COLLECTION).unwrap();
        let lacks =
            |number: &usize| collection.catalog().named(collection.info().id, &name(*number)).unwrap().is_none();
        let lost = (0..NEW.end).filter(lacks).count();
        let replaced = collection.document(Path::new(&name(1))).unwrap().unwrap();
        let older = usize::from(replaced.text != text(99));
        counted.insert((lost, older));
        assert_eq!(report.catalog.lost(), lost, "{what}");
        assert_eq!(report.catalog.damaged.len(), lost + older, "{what}");
        let told = |part: &str| report.catalog.problems.iter().any(|problem| problem.contains(part));
        assert!(told("is gone") || told("are lost"), "{what}");
        assert_eq!(told("the last changes are gone"), lost + older > 0, "{what}");
        assert!(library.verify().unwrap().unwrap().is_clean());
        fs::remove_dir_all(image).unwrap();
    }
    assert!(counted.iter().any(|(lost, _)| *lost > 0) && counted.iter().any(|(_, older)| *older > 0), "{counted:?}");
}
