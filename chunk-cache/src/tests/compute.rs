//! One computation for all who want a chunk.

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::{ComputeError, Found};

#[test]
fn a_chunk_that_many_want_is_computed_once_and_used_from_memory() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    let model = model(&store);
    let (computed, begin) = (AtomicUsize::new(0), Barrier::new(6));
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                begin.wait();
                let compute = || {
                    computed.fetch_add(1, Ordering::Relaxed);
                    Ok::<_, ()>(chunk(3))
                };
                let (found, _) = store.read_or_compute(model, &key(3), &|| true, compute).unwrap();
                if let Found::InMemory(state) = found {
                    assert_eq!(state.layers[..], layers(3));
                    state.stored.unwrap().wait().unwrap();
                }
                assert_eq!(look(&store, 3), Seen::Whole);
            });
        }
    });
    assert_eq!(computed.into_inner(), 1);
    let (found, computed) = store.read_or_compute(model, &key(3), &|| true, || Err(())).unwrap();
    assert!(matches!(found, Found::Stored) && !computed);
}

#[test]
fn a_state_that_the_store_refuses_is_used_all_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let store = ChunkStore::open(directory.path(), options(bytes_of(3) - 1)).unwrap();
    let (found, computed) = store.read_or_compute(model(&store), &key(3), &|| true, || Ok::<_, ()>(chunk(3))).unwrap();
    let Found::InMemory(state) = found else { panic!("it cannot be stored") };
    assert!(computed && state.layers[..] == layers(3));
    assert!(matches!(state.stored, Err(StoreError::TooLarge { .. })), "{:?}", state.stored);
    // And one that cannot be computed is nobody's but the caller's problem.
    let failed = store.read_or_compute(model(&store), &key(4), &|| true, || Err("no"));
    assert!(matches!(failed, Err(ComputeError::Failed("no"))));
}
