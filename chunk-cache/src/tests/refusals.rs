//! Directories and data the store must refuse, with words that help.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::backend::{Access, Backend, Family, Sync};

fn refusal(path: &Path, options: StoreOptions) -> (StoreError, String) {
    let error = ChunkStore::open(path, options).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&path.display().to_string()), "{text}");
    (error, text)
}

#[test]
fn a_directory_of_something_else_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("thesis.tex"), "text").unwrap();
    let (error, text) = refusal(directory.path(), options(1));
    assert!(matches!(error, StoreError::ForeignStore { what: "program", .. }));
    assert!(text.contains("thesis.tex"), "{text}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn a_newer_format_is_named() {
    let directory = tempfile::tempdir().unwrap();
    drop(open(directory.path()).unwrap());
    let (backend, _) = Backend::open(directory.path(), Access::Write).unwrap();
    let mut row = backend.get(Family::Meta, b"identity").unwrap().unwrap();
    row[4] = 9;
    backend.write("a test", &[(Family::Meta, b"identity".to_vec(), Some(row))], Sync::Now).unwrap();
    drop(backend);
    let (error, text) = refusal(directory.path(), options(1));
    assert!(matches!(error, StoreError::NewerFormat { found: 9, supported: 2, .. }));
    assert!(text.contains("newer quire"), "{text}");
}

#[test]
fn an_open_store_is_locked() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    let (error, text) = refusal(directory.path(), options(1));
    assert!(matches!(error, StoreError::Locked { .. }), "{error:?}");
    assert!(text.contains("already open"), "{text}");
    put(&store, 1).unwrap();
    drop(store);
    assert_eq!(look(&open(directory.path()).unwrap(), 1), Seen::Whole);
}

#[test]
fn an_unwritable_directory_is_named() {
    // Nobody can create files here, root included.
    let (error, text) = refusal(Path::new("/sys/quire-chunks"), options(1));
    assert!(matches!(error, StoreError::ReadOnly { .. }), "{error:?}");
    assert!(text.contains("make the directory writable"), "{text}");

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("chunks");
    drop(open(&path).unwrap());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o555)).unwrap();
    let may_write_anyway = fs::write(path.join("probe.tmp"), b"").is_ok();
    if may_write_anyway {
        // Root is not bound by modes.
        open(&path).unwrap();
    } else {
        let (error, _) = refusal(&path, options(1));
        assert!(matches!(error, StoreError::ReadOnly { .. }), "{error:?}");
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn a_file_in_place_of_the_directory_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let (error, _) = refusal(file.path(), options(1));
    assert!(matches!(error, StoreError::Io { .. }), "{error:?}");
}

#[test]
fn data_of_another_shape_is_refused_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    let right = layers(3);
    let mut short = right.clone();
    short[1].values = short[1].values.slice(1..);
    let tries: [(&str, u32, &[LayerKv]); 4] = [
        ("at least 1 token", 0, &right),
        ("number of layers", tokens(3), &right[..2]),
        ("values of layer 1", tokens(3), &short),
        ("keys of layer 0", tokens(3) + 1, &right),
    ];
    for (words, tokens, data) in tries {
        let error = store.put(model(&store), NewChunk::new(key(3), tokens, data.to_vec())).unwrap_err();
        assert!(matches!(error, StoreError::ShapeMismatch { .. }));
        assert!(error.to_string().contains(words), "{error}");
    }
    assert_eq!(look(&store, 3), Seen::Absent);
    put(&store, 3).unwrap();
    let error = store.layer(&key(3), SHAPE.layers).unwrap_err();
    assert!(matches!(error, StoreError::ShapeMismatch { .. }));
    assert!(store.verify().unwrap().is_clean());
}

#[test]
fn a_directory_without_its_root_file_is_damaged_not_empty() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    put(&store, 1).unwrap();
    drop(store);
    fs::remove_file(directory.path().join("CURRENT")).unwrap();
    let (error, text) = refusal(directory.path(), options(1));
    assert!(matches!(error, StoreError::Damaged { .. }), "{error:?}");
    assert!(text.contains("quire cache evict --all"), "{text}");
}

#[test]
fn a_database_of_another_program_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let mut options = rocksdb::Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    drop(rocksdb::DB::open_cf(&options, directory.path(), ["accounts"]).unwrap());
    let (error, text) = refusal(directory.path(), self::options(1));
    assert!(matches!(error, StoreError::ForeignStore { what: "program", .. }), "{error:?}");
    assert!(text.contains("accounts"), "{text}");
    assert!(matches!(ChunkStore::clear(directory.path()), Err(StoreError::ForeignStore { .. })));
    assert!(rocksdb::DB::list_cf(&options, directory.path()).unwrap().contains(&"accounts".to_owned()));
}

#[test]
fn a_store_of_which_only_some_families_can_be_told_is_not_another_programs() {
    let directory = tempfile::tempdir().unwrap();
    let mut options = rocksdb::Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    // As a list of files that is damaged behind the first family reads.
    drop(rocksdb::DB::open_cf(&options, directory.path(), ["meta"]).unwrap());
    let store = open(directory.path()).unwrap();
    put(&store, 1).unwrap();
    assert_eq!(look(&store, 1), Seen::Whole);
}
