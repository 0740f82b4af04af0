//! Looking changes nothing, and the budget is the store's own.

use super::*;
use crate::backend::{Access, Backend, Family, Sync};

fn read(path: &Path) -> ChunkStore {
    ChunkStore::open_existing(path, Access::Read, 0).unwrap().unwrap()
}

fn fill(store: &ChunkStore, chunks: u32) {
    for n in 0..chunks {
        put(store, n).unwrap();
    }
}

/// Everything that could change in a directory: contents and time stamps of all files, and its own.
fn traces(path: &Path) -> Vec<(String, Vec<u8>, std::time::SystemTime)> {
    let modified = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
    let mut traces = vec![(".".to_owned(), Vec::new(), modified(path))];
    for entry in fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            traces.push(("incoming".to_owned(), Vec::new(), modified(&path)));
            continue;
        }
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        traces.push((name, fs::read(&path).unwrap(), modified(&path)));
    }
    traces.sort();
    traces
}

#[test]
fn a_store_that_is_only_read_stays_as_it_is_to_the_byte() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let store = open(path).unwrap();
    fill(&store, 6);
    // An unfinished write: whoever opens for writing sweeps it.
    super::crash::write_payload_alone(&store, 9);
    drop(store);
    let before = traces(path);

    let reader = read(path);
    assert_eq!((reader.stats().chunks, reader.list().len()), (6, 6));
    assert_eq!((reader.access(), reader.open_report().orphans), (Access::Read, 1));
    (0..6).for_each(|n| assert_eq!(look(&reader, n), Seen::Whole));
    assert_eq!(look(&reader, 9), Seen::Absent);
    reader.touch(&key(1)).unwrap();
    assert_eq!(reader.verify().unwrap().chunks, 6);
    reader.compact().unwrap();
    let refusals =
        [put(&reader, 7).map(drop), reader.remove(&key(1)).map(drop), reader.set_budget(1), reader.reclaim()];
    for refused in refusals {
        assert!(matches!(refused, Err(StoreError::ReadOnly { .. })), "{refused:?}");
    }
    drop(reader);
    assert!(traces(path) == before, "reading left a trace");
    assert_eq!(open(path).unwrap().open_report().orphans, 1);
}

#[test]
fn opening_with_another_budget_evicts_nothing_and_the_store_keeps_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let store = ChunkStore::open(path, options(1 << 20)).unwrap();
    fill(&store, 6);
    drop(store);
    let store = ChunkStore::open(path, options(1)).unwrap();
    let stats = store.stats();
    assert_eq!((stats.chunks, stats.byte_budget, stats.evicted), (6, 1 << 20, 0));

    // Only a budget that is set makes chunks go, and it outlives the process.
    let three = (3..6).map(bytes_of).sum();
    store.set_budget(three).unwrap();
    assert_eq!(
        (0..6).map(|n| look(&store, n) == Seen::Whole).collect::<Vec<_>>(),
        [false, false, false, true, true, true]
    );
    drop(store);
    let store = ChunkStore::open(path, options(1 << 30)).unwrap();
    assert_eq!((store.budget(), read(path).budget()), (three, three));
    put(&store, 7).unwrap();
    let stats = store.stats();
    assert!(stats.evicted > 0 && stats.payload_bytes <= three, "{stats:?}");
}

#[test]
fn a_damaged_budget_is_replaced_by_the_one_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    put(&open(directory.path()).unwrap(), 1).unwrap();
    let (backend, _) = Backend::open(directory.path(), Access::Write).unwrap();
    backend.write("a test", &[(Family::Meta, b"budget".to_vec(), Some(b"not a budget".to_vec()))], Sync::Now).unwrap();
    drop(backend);
    assert_eq!(read(directory.path()).budget(), 0);
    let store = ChunkStore::open(directory.path(), options(77_777)).unwrap();
    assert_eq!((store.budget(), look(&store, 1)), (77_777, Seen::Whole));
}

#[test]
fn one_may_look_while_another_writes() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    put(&store, 1).unwrap();
    let reader = read(directory.path());
    put(&store, 2).unwrap();
    assert_eq!((look(&reader, 1), look(&reader, 2)), (Seen::Whole, Seen::Absent));
    assert_eq!(look(&store, 2), Seen::Whole);
}

#[test]
fn what_is_no_store_yet_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let none = |path: &Path, access| ChunkStore::open_existing(path, access, 0).unwrap().is_none();
    assert!(none(directory.path(), Access::Read) && none(&directory.path().join("absent"), Access::Write));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    fs::write(directory.path().join("thesis.tex"), "text").unwrap();
    let error = ChunkStore::open_existing(directory.path(), Access::Read, 0).unwrap_err();
    assert!(matches!(error, StoreError::ForeignStore { .. }), "{error:?}");
}

#[test]
fn several_models_share_a_store_and_are_known_again() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    let wide = KvShape { dtype: KvDtype::F32, ..SHAPE };
    let second = ModelInfo { fingerprint: [2; 32], name: "other".to_owned(), shape: wide };
    let handles = [model(&store), store.register(&second).unwrap(), store.register(&toy(wide)).unwrap()];
    assert_eq!(handles.map(|handle| handle.index), [0, 1, 2]);
    assert_eq!(model(&store), handles[0]);
    put(&store, 1).unwrap();
    let side = wide.bytes_per_side(4).unwrap() as usize;
    let layer = LayerKv { keys: vec![3; side].into(), values: vec![4; side].into() };
    store.put(handles[1], NewChunk::new(key(2), 4, vec![layer.clone(); 3])).unwrap();
    // A chunk that does not have its model's layout is refused.
    let error = store.put(handles[0], NewChunk::new(key(3), 4, vec![layer.clone(); 3])).unwrap_err();
    assert!(matches!(error, StoreError::ShapeMismatch { .. }), "{error:?}");
    drop(store);
    for store in [read(directory.path()), open(directory.path()).unwrap()] {
        assert_eq!((look(&store, 1), store.layer(&key(2), 2).unwrap()), (Seen::Whole, Some(layer.clone())));
        let names = |n| store.models()[store.meta(&key(n)).unwrap().model].name.clone();
        assert_eq!((names(1), names(2)), ("toy".to_owned(), "other".to_owned()));
        assert_eq!(store.register(&second).unwrap().shape(), wide);
    }
}

#[test]
fn clearing_removes_all_chunks_and_keeps_what_the_store_is_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let store = ChunkStore::open(path, options(123_456)).unwrap();
    fill(&store, 4);
    let error = ChunkStore::clear(path).unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }), "{error:?}");
    assert_eq!(look(&store, 3), Seen::Whole);
    drop(store);
    assert_eq!(ChunkStore::clear(path).unwrap(), 4);
    let store = ChunkStore::open(path, options(1)).unwrap();
    assert_eq!((store.stats().chunks, store.budget()), (0, 123_456));
    put(&store, 1).unwrap();
    drop(store);

    // A directory that cannot be opened any more is cleared as well, and one of something else is not.
    fs::remove_file(path.join("CURRENT")).unwrap();
    ChunkStore::clear(path).unwrap();
    assert_eq!(look(&open(path).unwrap(), 1), Seen::Absent);
    let other = tempfile::tempdir().unwrap();
    fs::write(other.path().join("thesis.tex"), "text").unwrap();
    assert!(matches!(ChunkStore::clear(other.path()), Err(StoreError::ForeignStore { .. })));
    assert!(other.path().join("thesis.tex").exists());
}
