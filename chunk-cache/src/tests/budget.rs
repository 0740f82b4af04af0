//! The byte budget, of chunks and of the disk.

use std::collections::BTreeSet;

use super::*;
use crate::eviction::{disk_limit, low_water};

#[test]
fn room_is_made_in_runs_and_never_by_what_is_pinned() {
    let directory = tempfile::tempdir().unwrap();
    let budget = (0..20).map(bytes_of).sum();
    let store = ChunkStore::open(directory.path(), options(budget)).unwrap();
    put_each(&store, 0..20);
    assert_eq!((store.stats().chunks, store.stats().evicted), (20, 0));
    let pin = store.pin(&[key(0), key(2)]);
    put(&store, 20).unwrap();
    let stats = store.stats();
    assert!(stats.payload_bytes <= low_water(budget) && stats.evicted > 0, "{stats:?}");
    assert_eq!((look(&store, 0), look(&store, 1), look(&store, 2)), (Seen::Whole, Seen::Absent, Seen::Whole));
    drop(pin);
}

#[test]
fn a_chunk_for_which_nothing_may_go_is_refused_and_taken_once_something_may() {
    let directory = tempfile::tempdir().unwrap();
    let budget = bytes_of(1) + bytes_of(2);
    let store = ChunkStore::open(directory.path(), options(budget)).unwrap();
    let pin = store.pin(&[key(1), key(2)]);
    put(&store, 1).unwrap();
    put(&store, 2).unwrap();
    let refused = put(&store, 3).unwrap_err();
    assert!(matches!(refused, StoreError::NoRoom { .. }), "{refused:?}");
    assert_eq!(look(&store, 3), Seen::Absent);
    drop(pin);
    put(&store, 3).unwrap();
    assert_eq!(look(&store, 3), Seen::Whole);
}

#[test]
fn demoted_chunks_go_first_unless_they_are_wanted_again() {
    let directory = tempfile::tempdir().unwrap();
    let budget = (0..10).map(bytes_of).sum();
    let store = ChunkStore::open(directory.path(), options(budget)).unwrap();
    put_each(&store, 0..10);
    store.demote(&[key(7), key(8), key(9)]).unwrap();
    store.note_presence(&key(8)).unwrap();
    store.touch(&key(9)).unwrap();
    put(&store, 12).unwrap();
    assert_eq!(look(&store, 7), Seen::Absent);
    assert_eq!((look(&store, 8), look(&store, 9)), (Seen::Whole, Seen::Whole));
    let hits = |n| store.meta(&key(n)).unwrap().hits;
    assert_eq!((hits(8), hits(9)), (0, 1));
}

#[test]
fn churn_with_chunks_that_stay_in_use_keeps_to_the_disks_limit() {
    let directory = tempfile::tempdir().unwrap();
    let wide = KvShape { layers: 2, kv_heads: 8, head_dim: 64, dtype: KvDtype::F32 };
    let bytes = wide.payload_bytes(32).unwrap();
    let budget = 96 * bytes;
    let store = ChunkStore::open(directory.path(), options(budget)).unwrap();
    let model = store.register(&toy(wide)).unwrap();
    let side = vec![5; wide.bytes_per_side(32).unwrap() as usize];
    let layer = LayerKv { keys: side.clone().into(), values: side.into() };
    let mut dice = Dice(3);
    let mut written = BTreeSet::new();
    for n in 0..400 {
        store.put(model, NewChunk::new(key(n), 32, vec![layer.clone(); 2])).unwrap();
        written.insert(n);
        // Every fifth chunk is used again and again.
        store.touch(&key(dice.below(u64::from(n) / 5 + 1) as u32 * 5)).unwrap();
        let stats = store.stats();
        let stored = stats.payload_bytes + stats.dead_bytes;
        // A file that is being rewritten is there twice.
        let most = disk_limit(budget) + store.core.segment_limit();
        assert!(stored <= most, "{stored} bytes for a budget of {budget} after {n}");
    }
    let stats = store.stats();
    assert!(stats.evicted > 250 && stats.payload_bytes > budget / 2, "{stats:?}");
    assert!(store.verify().unwrap().is_clean());
}
