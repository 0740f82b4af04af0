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
    Demote(u32),
    Presence(u32),
    Remove(u32),
    Pin(u32),
    Unpin,
    Verify,
    Compact,
    Reclaim,
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
        1 => n.clone().prop_map(Op::Demote),
        1 => n.clone().prop_map(Op::Presence),
        2 => n.clone().prop_map(Op::Remove),
        1 => n.prop_map(Op::Pin),
        1 => Just(Op::Unpin),
        1 => Just(Op::Verify),
        1 => Just(Op::Compact),
        1 => Just(Op::Reclaim),
        2 => prop::sample::select(BUDGETS.to_vec()).prop_map(Op::Reopen),
        1 => prop::sample::select(BUDGETS.to_vec()).prop_map(Op::Budget),
    ]
}

/// Not demoted, when last used, hits.
type Rank = (bool, u64, u64);

#[derive(Default)]
struct Model {
    chunks: BTreeMap<u32, Rank>,
    pinned: Vec<u32>,
    clock: u64,
    budget: u64,
}

impl Model {
    fn used(&self) -> u64 {
        self.chunks.keys().map(|n| bytes_of(*n)).sum()
    }

    /// Removes the first to go down to the low-water mark if `needed` does not fit; false (and nothing removed) if it cannot.
    fn make_room(&mut self, needed: u64) -> bool {
        let held: u64 = self.chunks.keys().filter(|n| self.pinned.contains(n)).map(|n| bytes_of(*n)).sum();
        if held + needed > self.budget {
            return false;
        }
        if self.used() + needed <= self.budget {
            return true;
        }
        let low = if needed == 0 { self.budget } else { (self.budget - self.budget / 20).max(needed) };
        while self.used() + needed > low {
            let free = self.chunks.iter().filter(|(n, _)| !self.pinned.contains(n));
            let Some((first, _)) = free.min_by_key(|(n, (kept, used, _))| (*kept, *used, key(**n))) else { break };
            let first = *first;
            self.chunks.remove(&first);
        }
        true
    }

    fn put(&mut self, n: u32) -> &'static str {
        if self.chunks.contains_key(&n) {
            return "present";
        }
        if bytes_of(n) > self.budget {
            return "too large";
        }
        if !self.make_room(bytes_of(n)) {
            return "no room";
        }
        self.clock += 1;
        self.chunks.insert(n, (true, self.clock, 0));
        "stored"
    }

    fn note(&mut self, n: u32, change: impl Fn(&mut Rank, u64)) {
        self.clock += 1;
        let clock = self.clock;
        if let Some(rank) = self.chunks.get_mut(&n) {
            change(rank, clock);
        }
    }
}

fn check(store: &ChunkStore, model: &Model) {
    let wanted = model.chunks.iter().map(|(n, (kept, _, hits))| (key(*n), tokens(*n), *hits, !*kept));
    let mut wanted: Vec<_> = wanted.collect();
    wanted.sort_by_key(|(key, ..)| *key);
    let found = store.list().into_iter().map(|(key, meta)| (key, meta.tokens, meta.hits, meta.demoted));
    assert_eq!(found.collect::<Vec<_>>(), wanted);
    let stats = store.stats();
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
                model.note(n, |rank, now| *rank = (true, now, rank.2 + 1));
            }
            Op::Presence(n) => {
                store.note_presence(&key(n)).unwrap();
                model.note(n, |rank, now| *rank = (true, now, rank.2));
            }
            Op::Demote(n) => {
                store.demote(&[key(n)]).unwrap();
                model.note(n, |rank, _| rank.0 = false);
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
            Op::Compact => store.compact().unwrap(),
            Op::Reclaim => {
                store.reclaim().unwrap();
                assert_eq!(store.stats().dead_bytes, 0);
            }
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
