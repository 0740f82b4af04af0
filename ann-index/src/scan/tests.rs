#![allow(clippy::unwrap_used)]

use half::bf16;
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::key_index::Hit;

/// Scans of small eighths, whose products are exact in every order and often equal.
fn check<T: Element>(seed: u64, dim: usize, keys: usize, queries: usize, k: usize, hide: f64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut numbers = |n: usize| -> Vec<f32> { (0..n).map(|_| f32::from(rng.random_range(-9i8..=9)) / 8.0).collect() };
    let (keys_at, queries_at) = (numbers(keys * dim), numbers(queries * dim));
    let rows = Rows::<T>::new(dim, 7);
    // In two parts, so that they lie in several runs.
    rows.append(&keys_at[..keys / 3 * dim]).unwrap();
    rows.append(&keys_at[keys / 3 * dim..]).unwrap();
    // Later keys than those that are asked for may be there already.
    let len = keys - keys / 10;
    let hidden: Bitmap = (0..keys as u32).filter(|_| rng.random_bool(hide)).collect();
    let found = scan_group(&rows, len, &queries_at, k, Some(&hidden));
    assert_eq!(found.len(), queries);
    for (query, found) in queries_at.chunks(dim).zip(&found) {
        let mut all: Vec<Hit> = (0..len as u32)
            .filter(|&id| !hidden.contains(id))
            .map(|id| {
                let key = &keys_at[id as usize * dim..(id as usize + 1) * dim];
                // The two zeros are equal.
                Hit { id, score: query.iter().zip(key).map(|(a, b)| a * b).sum::<f32>() + 0.0 }
            })
            .collect();
        all.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.id.cmp(&b.id)));
        all.truncate(k);
        assert_eq!(found.hits, all, "{keys} keys of {dim}, {k} best");
        assert_eq!(scan(&rows, len, query, k, Some(&hidden)).hits, all, "alone");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_scan_is_a_full_sort_by_score_and_then_by_id(
        seed: u64, dim in prop::sample::select(vec![1usize, 5, 32, 64]), keys in 1usize..1500, queries in 1usize..6,
        k in prop_oneof![1usize..12, 1usize..400], hide in prop_oneof![Just(0.0), 0.0f64..1.0],
    ) {
        check::<f32>(seed, dim, keys, queries, k, hide);
        check::<bf16>(seed, dim, keys, queries, k, hide);
    }
}

#[test]
fn runs_of_hidden_keys_are_not_read() {
    let rows = Rows::<f32>::new(2, 0);
    rows.append(&[1.0; 2 * 300]).unwrap();
    let hidden: Bitmap = (60..260).collect();
    let found = scan(&rows, 300, &[1.0, 1.0], 1000, Some(&hidden));
    // Of five tiles of 64 three are hidden altogether.
    assert_eq!((found.hits.len(), found.stats.keys_touched), (100, 2 * 64 - 20));
    assert_eq!(found.stats.bytes, found.stats.keys_touched * rows.row_bytes());
}
