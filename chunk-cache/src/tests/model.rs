//! Random operations against a model that is obviously right.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::PutOutcome;

#[derive(Debug, Clone)]
enum Op {
    Put(u32),
    Get(u32),
    Touch(u32),
    Remove(u32),
    Pin(u32),
    Unpin,
    Verify,
    Compact,
    Reopen(u64),
    Budget(u64),
}

const BUDGETS: [u64; 3] = [20_000, 60_000, 1 << 30];

fn op() -> impl Strategy<Value = Op> {
    let n = 0..12u32;
    prop_oneof![
        8 => n.clone().prop_map(Op::Put),
        4 => n.clone().prop_map(Op::Get),
        3 => n.clone().prop_map(Op::Touch),
        2 => n.clone().prop_map(Op::Remove),
        1 => n.prop_map(Op::Pin),
        1 => Just(Op::Unpin),
        1 => Just(Op::Verify),
        1 => Just(Op::Compact),
        2 => prop::sample::select(BUDGETS.to_vec()).prop_map(Op::Reopen),
        1 => prop::sample::select(BUDGETS.to_vec()).prop_map(Op::Budget),
    ]
}

/// Chunk -> (when last used, hits).
#[derive(Default)]
struct Model {
    chunks: BTreeMap<u32, (u64, u64)>,
    pinned: Vec<u32>,
    clock: u64,
    budget: u64,
}

impl Model {
    fn used(&self) -> u64 {
        self.chunks.keys().map(|n| bytes_of(*n)).sum()
    }

    /// Removes the least recently used until `needed` fits; false (and nothing removed) if it cannot.
    fn make_room(&mut self, needed: u64) -> bool {
        let held: u64 = self.chunks.keys().filter(|n| self.pinned.contains(n)).map(|n| bytes_of(*n)).sum();
        if needed > 0 && held + needed > self.budget {
            return false;
        }
        while self.used() + needed > self.budget {
            let free = self.chunks.iter().filter(|(n, _)| !self.pinned.contains(n));
            let oldest = *free.min_by_key(|(_, (used, _))| *used).unwrap().0;
            self.chunks.remove(&oldest);
        }
        true
    }

    fn put(&mut self, n: u32) -> &'static str {
        self.clock += 1;
        if self.chunks.contains_key(&n) {
            return "present";
        }
        if bytes_of(n) > self.budget {
            return "too large";
        }
        if !self.make_room(bytes_of(n)) {
            return "no room";
        }
        self.chunks.insert(n, (self.clock, 0));
        "stored"
    }
}

fn check(store: &ChunkStore, model: &Model) {
    let mut wanted: Vec<_> = model.chunks.iter().map(|(n, (_, hits))| (key(*n), tokens(*n), *hits)).collect();
    wanted.sort_by_key(|(key, ..)| *key);
    let found: Vec<_> = store.list().unwrap().into_iter().map(|(key, meta)| (key, meta.tokens, meta.hits)).collect();
    assert_eq!(found, wanted);
    let stats = store.stats().unwrap();
    assert_eq!(stats.payload_bytes, model.used());
    assert!(stats.payload_bytes <= stats.byte_budget);
    assert_eq!(stats.chunks, model.chunks.len() as u64);
}

fn run(ops: Vec<Op>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let mut model = Model { budget: BUDGETS[1], ..Model::default() };
    let mut store = ChunkStore::open(path, options(model.budget)).unwrap();
    let mut guards = Vec::new();
    for op in ops {
        match op {
            Op::Put(n) => {
                let found = match put(&store, n) {
                    Ok(PutOutcome::Stored) => "stored",
                    Ok(PutOutcome::AlreadyPresent) => "present",
                    Err(StoreError::TooLarge { .. }) => "too large",
                    Err(StoreError::NoRoom { .. }) => "no room",
                    Err(other) => panic!("{other}"),
                };
                assert_eq!(found, model.put(n));
            }
            Op::Get(n) => {
                let wanted = if model.chunks.contains_key(&n) { Seen::Whole } else { Seen::Absent };
                assert_eq!(look(&store, n), wanted);
            }
            Op::Touch(n) => {
                store.touch(&key(n)).unwrap();
                model.clock += 1;
                let clock = model.clock;
                if let Some((used, hits)) = model.chunks.get_mut(&n) {
                    (*used, *hits) = (clock, *hits + 1);
                }
            }
            Op::Remove(n) => {
                assert_eq!(store.remove(&key(n)).unwrap(), model.chunks.remove(&n).is_some());
            }
            Op::Pin(n) => {
                guards.push(store.pin(&[key(n)]));
                model.pinned.push(n);
            }
            Op::Unpin => {
                guards.pop();
                model.pinned.pop();
            }
            Op::Verify => {
                let report = store.verify().unwrap();
                assert!(report.is_clean(), "{report:?}");
                assert_eq!(report.bytes, model.used());
            }
            Op::Compact => store.compact(),
            // The store has its budget: what is asked for at opening is for new ones.
            Op::Reopen(other) => {
                guards.clear();
                model.pinned.clear();
                drop(store);
                store = ChunkStore::open(path, options(other)).unwrap();
                assert_eq!(store.open_report().orphans, 0);
            }
            Op::Budget(budget) => {
                guards.clear();
                model.pinned.clear();
                model.budget = budget;
                assert!(model.make_room(0));
                store.set_budget(budget).unwrap();
            }
        }
        check(&store, &model);
    }
    for n in model.chunks.keys() {
        assert_eq!(look(&store, *n), Seen::Whole);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_store_does_what_the_model_does(ops in prop::collection::vec(op(), 1..40)) {
        run(ops);
    }
}

#[test]
fn churn_does_not_grow_the_disk_without_bound() {
    let directory = tempfile::tempdir().unwrap();
    let wide = KvShape { layers: 2, kv_heads: 8, head_dim: 64, dtype: KvDtype::F32 };
    let chunk_bytes = wide.payload_bytes(64).unwrap();
    let budget = 4 * chunk_bytes;
    let store = ChunkStore::open(directory.path(), StoreOptions { shape: wide, ..options(budget) }).unwrap();
    let side = vec![5; wide.bytes_per_side(64).unwrap() as usize];
    let layer = LayerKv { keys: side.clone(), values: side };
    for n in 0..80 {
        store.put(&key(n), 64, &[layer.clone(), layer.clone()]).unwrap();
    }
    let stats = store.stats().unwrap();
    assert_eq!((stats.chunks, stats.evicted), (4, 76));
    store.compact();
    let after = store.stats().unwrap().disk_bytes;
    assert!(after < 3 * budget, "{after} bytes on disk for a budget of {budget}");
    assert!(store.verify().unwrap().is_clean());
}
