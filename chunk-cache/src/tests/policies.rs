//! The order in which a store's chunks make way, and the variants that it knows of a chunk.

use super::*;
use crate::{Before, EvictionPolicy, Provenance};

fn put_costing(store: &ChunkStore, n: u32, compute_micros: u64) {
    store.put(model(store), NewChunk { compute_micros, ..chunk(n) }).unwrap();
}

/// Which of chunks 0 to 4 are left when room was made for two, after uses of some.
fn left(policy: EvictionPolicy) -> Vec<u32> {
    let directory = tempfile::tempdir().unwrap();
    // 37 n mod 150 tokens differ; these have about as many.
    let store = open(directory.path()).unwrap();
    store.set_policy(policy);
    let same: Vec<u32> = (0..5).map(|i| i * 150).collect();
    for (n, cost) in same.iter().zip([100, 900, 100, 100, 100]) {
        put_costing(&store, *n, cost);
    }
    for _ in 0..3 {
        store.touch(&key(same[0])).unwrap();
    }
    store.touch_saving(&key(same[2]), 0.1).unwrap();
    store.touch_saving(&key(same[2]), 0.1).unwrap();
    drop(store);
    // Use and cost outlive the process.
    let store = open(directory.path()).unwrap();
    store.set_policy(policy);
    store.evict_to(2 * bytes_of(0)).unwrap();
    (0..5).filter(|i| look(&store, same[*i as usize]) == Seen::Whole).collect()
}

#[test]
fn a_store_evicts_in_the_order_of_its_policy_and_remembers_what_uses_saved() {
    assert_eq!(left(EvictionPolicy::Lru), [0, 2]);
    assert_eq!(left(EvictionPolicy::Lfu), [0, 2]);
    // Chunk 1 was dear to compute, and uses of chunk 2 saved little.
    assert_eq!(left(EvictionPolicy::CacheCraft), [0, 1]);
}

#[test]
fn variants_of_a_chunk_are_found_with_what_they_were_computed_behind() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    let variant = |n: u8| ChunkKey { variant: VariantId([n; 16]), ..key(1) };
    let provenance = |n: u32| Provenance {
        before: vec![Before { chunk: key(n).chunk, attention: 2.0 }, Before { chunk: key(5).chunk, attention: 1.0 }],
        impact: 0.75,
    };
    put_each(&store, [0, 2]);
    let with = |n: u8, sections| NewChunk { sections, ..NewChunk::new(variant(n), tokens(1), layers(1)) };
    store.put(model(&store), with(0, vec![provenance(7).to_section()])).unwrap();
    store.put(model(&store), with(255, vec![provenance(8).to_section()])).unwrap();
    store.put(model(&store), with(9, Vec::new())).unwrap();
    let seen = |store: &ChunkStore| {
        store.variants(&key(1).chunk).unwrap().into_iter().map(|v| (v.key, v.provenance)).collect::<Vec<_>>()
    };
    let all = [(variant(0), Some(provenance(7))), (variant(9), None), (variant(255), Some(provenance(8)))];
    assert_eq!(seen(&store), all);
    store.remove(&variant(9)).unwrap();
    store.reclaim().unwrap();
    drop(store);
    let store = open(directory.path()).unwrap();
    assert_eq!(seen(&store), [all[0].clone(), all[2].clone()]);
    assert!(store.variants(&key(3).chunk).unwrap().is_empty());
}
