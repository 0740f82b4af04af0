//! The byte budget, while chunks are being written.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::catalogue::State;
use crate::eviction::Plan;
use crate::records::{LayerRecord, Manifest, Usage};

/// Chunks of so many bytes, used at such a time, pinned or not.
fn state(chunks: &[(u64, u64, bool)], reserved: u64) -> State {
    let mut state = State::default();
    state.reserved = reserved;
    for (n, &(bytes, last_used_micros, pinned)) in (0..).zip(chunks) {
        let layers = vec![LayerRecord { bytes, crc: 0 }];
        let manifest = Manifest { tokens: 1, created_unix: 0, layers };
        state.insert(key(n), Arc::new(manifest), Usage { last_used_micros, hits: 0 });
        if pinned {
            state.pins.insert(key(n), 1);
        }
    }
    state
}

proptest! {
    #[test]
    fn used_and_reserved_bytes_fit_the_budget_and_no_pinned_chunk_is_a_victim(
        chunks in prop::collection::vec((1u64..50, 0u64..20, any::<bool>()), 0..16),
        reserved in 0u64..120, needed in 1u64..120, budget in 0u64..400,
    ) {
        let state = state(&chunks, reserved);
        let used: u64 = chunks.iter().map(|(bytes, ..)| bytes).sum();
        prop_assert_eq!(state.used, used);
        let pinned: u64 = chunks.iter().filter(|(.., pinned)| *pinned).map(|(bytes, ..)| bytes).sum();
        match state.plan(needed, budget) {
            Plan::Evict(victims) => {
                let mut freed = 0;
                for victim in &victims {
                    prop_assert!(!state.pins.contains_key(victim), "a pinned chunk makes way");
                    freed += state.entries[victim].bytes();
                }
                prop_assert!(used - freed + reserved + needed <= budget);
                prop_assert!(victims.is_empty() || used + reserved + needed > budget, "there was room");
            }
            Plan::Impossible { pinned: held } => {
                prop_assert_eq!(held, pinned);
                prop_assert!(pinned + reserved + needed > budget, "all others could make way");
            }
        }
    }
}

#[test]
fn room_that_is_claimed_for_one_chunk_is_not_given_to_another() {
    let directory = tempfile::tempdir().unwrap();
    let budget = 100_000;
    let store = ChunkStore::open(directory.path(), options(budget)).unwrap();
    for n in 0..3 {
        put(&store, n).unwrap();
    }
    let pin = store.pin(&[key(1)]);
    let stored = store.stats().unwrap().payload_bytes;
    let first = store.claim_room(&key(10), budget - stored).unwrap().unwrap();
    assert!(first.1.is_none(), "it fits beside all that is there");
    // The second fits only where those that are not pinned make way.
    let second = store.claim_room(&key(11), bytes_of(0)).unwrap().unwrap();
    {
        let state = store.catalogue.lock();
        assert!(state.used + state.reserved <= budget, "{} and {} of {budget}", state.used, state.reserved);
        assert!(state.entries.contains_key(&key(1)) && !state.entries.contains_key(&key(0)));
    }
    drop((first.0, second.0));
    store.carry_out(second.1).unwrap();
    assert_eq!(store.catalogue.lock().reserved, 0);
    drop(pin);
}
