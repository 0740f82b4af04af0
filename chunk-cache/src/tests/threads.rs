//! Many threads on one store.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::*;
use crate::PutOutcome;

#[test]
fn one_of_many_puts_of_a_chunk_stores_it() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    let stored = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                for n in 0..8 {
                    if put(&store, n).unwrap() == PutOutcome::Stored {
                        stored.fetch_add(1, Ordering::Relaxed);
                    }
                    assert_eq!(look(&store, n), Seen::Whole);
                }
            });
        }
    });
    assert_eq!(stored.into_inner(), 8);
    assert!(store.verify().unwrap().is_clean());
}

/// One of several threads that put, read, pin, remove and verify in a store that is always full.
fn work(store: &ChunkStore, seed: u64) {
    let mut dice = Dice(seed);
    for round in 0..60 {
        let n = dice.below(14) as u32;
        match dice.below(8) {
            0..4 => match put(store, n) {
                Ok(_) | Err(StoreError::NoRoom { .. }) => {}
                Err(other) => panic!("{other}"),
            },
            4 => {
                let guard = store.pin(&[key(n)]);
                if store.contains(&key(n)) {
                    // Nobody removes the even ones by hand, so a pinned one stays.
                    for _ in 0..5 {
                        let seen = look_twice(store, n);
                        assert!(n % 2 == 1 || seen, "pinned chunk {n} went away");
                        thread::yield_now();
                    }
                }
                drop(guard);
            }
            5 => {
                store.remove(&key(n | 1)).unwrap();
            }
            6 => store.touch(&key(n)).unwrap(),
            _ => {
                look_twice(store, n);
            }
        }
        if round == 30 {
            assert!(store.verify().unwrap().is_clean());
        }
    }
}

/// Whether every layer could be read; those that could are right.
fn look_twice(store: &ChunkStore, n: u32) -> bool {
    let wanted = layers(n);
    (0..).zip(&wanted).all(|(index, wanted)| {
        let found = store.layer(&key(n), index).unwrap();
        found.inspect(|kv| assert!(kv == wanted, "wrong bytes")).is_some()
    })
}

#[test]
fn puts_reads_pins_and_evictions_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let budget = 70_000;
    let store = ChunkStore::open(directory.path(), options(budget)).unwrap();
    thread::scope(|scope| {
        for seed in 1..=5 {
            let store = &store;
            scope.spawn(move || work(store, seed));
        }
    });
    let stats = store.stats();
    assert!(stats.payload_bytes <= budget && stats.pinned == 0 && stats.evicted > 0, "{stats:?}");
    assert!(store.verify().unwrap().is_clean());
    let list: Vec<_> = store.list().into_iter().map(|(key, _)| key).collect();
    drop(store);
    let store = ChunkStore::open(directory.path(), options(budget)).unwrap();
    let again: Vec<_> = store.list().into_iter().map(|(key, _)| key).collect();
    assert_eq!(again, list);
    assert_eq!(store.open_report().orphans, 0);
}

#[test]
fn a_chunk_that_is_written_behind_is_read_from_memory_and_then_from_disk() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    let tickets: Vec<_> = (0..40).map(|n| store.put_behind(model(&store), chunk(n)).unwrap()).collect();
    for n in 0..40 {
        for (index, wanted) in (0..).zip(layers(n)) {
            assert_eq!(store.layer(&key(n), index).unwrap(), Some(wanted));
        }
    }
    assert!(tickets.iter().all(|ticket| ticket.wait().unwrap() == PutOutcome::Stored && ticket.is_done()));
    (0..40).for_each(|n| assert_eq!(look(&store, n), Seen::Whole));
    // What waited together went into few files.
    let files = store.core.catalogue.lock().segments.len();
    assert!(files < 40, "{files} files");
}

#[test]
fn a_store_that_is_closed_first_writes_what_was_handed_over() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    let tickets: Vec<_> = (0..20).map(|n| store.put_behind(model(&store), chunk(n)).unwrap()).collect();
    drop(store);
    assert!(tickets.iter().all(|ticket| ticket.is_done()));
    let store = open(directory.path()).unwrap();
    (0..20).for_each(|n| assert_eq!(look(&store, n), Seen::Whole));
}
