//! A directory of the first layout: one model, payloads in blob files.

use rocksdb::{DB, Options};

use super::*;
use crate::Access;
use crate::checksum::crc32c;

/// As the first layout wrote its budget: header of version 1, then the number.
fn old_budget(bytes: u64) -> Vec<u8> {
    let payload = bytes.to_le_bytes();
    let mut row = b"QKV\x1a\x01\x00\x06\x02".to_vec();
    row.resize(60, 0);
    row.extend(8u64.to_le_bytes());
    row.extend(crc32c(&[&payload]).to_le_bytes());
    row.extend(crc32c(&[&row]).to_le_bytes());
    row.extend(payload);
    row
}

fn old_store(path: &Path, budget_row: &[u8]) {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_enable_blob_files(true);
    options.set_min_blob_size(100);
    let names = ["meta", "manifest", "kv", "usage"];
    let families = names.map(|name| rocksdb::ColumnFamilyDescriptor::new(name, options.clone()));
    let db = DB::open_cf_descriptors(&options, path, families).unwrap();
    let family = |name| db.cf_handle(name).unwrap();
    db.put_cf(family("meta"), b"budget", budget_row).unwrap();
    for n in 0..3u32 {
        db.put_cf(family("manifest"), key(n).chunk.0, b"a manifest").unwrap();
        db.put_cf(family("kv"), key(n).chunk.0, vec![n as u8; 5000]).unwrap();
    }
    db.flush_cf(family("kv")).unwrap();
}

fn blobs(path: &Path) -> usize {
    let files = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|end| end == "blob")).count()
}

#[test]
fn an_old_store_is_emptied_keeps_its_budget_and_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    old_store(path, &old_budget(123_456));
    assert_eq!(blobs(path), 1);
    // Looking changes nothing, and finds nothing that could be used.
    assert!(ChunkStore::open_existing(path, Access::Read, 0).unwrap().is_none());
    assert_eq!(blobs(path), 1);
    let store = open(path).unwrap();
    let sentence = store.open_report().dropped.clone().unwrap();
    assert!(sentence.contains("3 cached chunks") && sentence.contains("earlier version"), "{sentence}");
    assert_eq!((store.budget(), store.stats().chunks, blobs(path)), (123_456, 0, 0));
    put(&store, 1).unwrap();
    drop(store);
    let store = open(path).unwrap();
    assert_eq!((look(&store, 1), &store.open_report().dropped), (Seen::Whole, &None));
}

#[test]
fn an_old_store_without_a_readable_budget_gets_the_one_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    old_store(directory.path(), b"torn");
    let store = ChunkStore::open(directory.path(), options(77_777)).unwrap();
    assert_eq!((store.budget(), store.stats().chunks), (77_777, 0));
    drop(store);
    let directory = tempfile::tempdir().unwrap();
    old_store(directory.path(), &old_budget(99_999));
    ChunkStore::clear(directory.path()).unwrap();
    assert_eq!((open(directory.path()).unwrap().budget(), blobs(directory.path())), (99_999, 0));
}
