//! Directories and data the store must refuse, with words that help.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::backend::{Access, Backend, Family, Mode, Sync};

fn refusal(path: &Path, options: StoreOptions) -> (StoreError, String) {
    let error = ChunkStore::open(path, options).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&path.display().to_string()), "{text}");
    (error, text)
}

#[test]
fn a_store_of_another_model_or_layout_is_foreign() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    put(&store, 3).unwrap();
    drop(store);
    let other = StoreOptions { model_identity: [2; 32], model_name: "other".to_owned(), ..options(1 << 20) };
    let (error, text) = refusal(directory.path(), other);
    assert!(matches!(error, StoreError::ForeignStore { what: "model", .. }));
    assert!(text.contains("expected other (02020202), found toy (01010101)"), "{text}");

    let wide = KvShape { dtype: KvDtype::F32, ..SHAPE };
    let (error, text) = refusal(directory.path(), StoreOptions { shape: wide, ..options(1 << 20) });
    assert!(matches!(error, StoreError::ForeignStore { what: "KV layout", .. }));
    assert!(text.contains("f32, found 3 layers"), "{text}");
    // Nothing was lost by asking.
    assert_eq!(look(&open(directory.path()).unwrap(), 3), Seen::Whole);
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
    let backend = Backend::open(directory.path(), Mode::Strict, Access::Write).unwrap();
    let mut row = backend.get(Family::Meta, b"identity").unwrap().unwrap().to_vec();
    row[4] = 9;
    backend.put(Family::Meta, b"identity", &row, Sync::Now).unwrap();
    drop(backend);
    let (error, text) = refusal(directory.path(), options(1));
    assert!(matches!(error, StoreError::NewerFormat { found: 9, supported: 1, .. }));
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
    short[1].values.pop();
    let tries: [(&str, u32, &[LayerKv]); 4] = [
        ("at least 1 token", 0, &right),
        ("number of layers", tokens(3), &right[..2]),
        ("values of layer 1", tokens(3), &short),
        ("keys of layer 0", tokens(3) + 1, &right),
    ];
    for (words, tokens, data) in tries {
        let error = store.put(&key(3), tokens, data).unwrap_err();
        assert!(matches!(error, StoreError::ShapeMismatch { .. }));
        assert!(error.to_string().contains(words), "{error}");
    }
    let error = store.layer(&key(3), SHAPE.layers).unwrap_err();
    assert!(matches!(error, StoreError::ShapeMismatch { .. }));
    assert_eq!(look(&store, 3), Seen::Absent);
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
    assert!(text.contains("remove the directory"), "{text}");
}
