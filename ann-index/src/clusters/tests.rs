#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::key_index::Hit;

const DIM: usize = 8;

/// An index of keys around a few directions, so that clusters differ in how good they are.
fn index(rng: &mut ChaCha8Rng, keys: usize, params: &ClustersParams) -> ClustersIndex<f32> {
    let poles: Vec<f32> = (0..20 * DIM).map(|_| rng.random_range(-2.0f32..2.0)).collect();
    let mut rows = Vec::new();
    for _ in 0..keys {
        let pole = rng.random_range(0..20);
        rows.extend(poles[pole * DIM..(pole + 1) * DIM].iter().map(|x| x + rng.random_range(-0.5f32..0.5)));
    }
    ClustersIndex::build(DIM, &rows, params).unwrap()
}

/// What a search has to find by the definition: the keys of the tail and of the best `probes` clusters, and of as many
/// further ones, best first, as it takes for `k` keys that are not hidden.
fn ranked(index: &ClustersIndex<f32>, query: &[f32], k: usize, probes: usize, hidden: &Bitmap) -> Vec<Hit> {
    let state = index.state();
    let clusters: usize = state.segments.iter().map(|segment| segment.clusters()).sum();
    let clustered = |hit: &&Hit| (hit.id as usize) < state.clustered;
    let wanted = k.min(state.len() - hidden.count_below(state.len()));
    for read in probes..=clusters.max(probes) {
        let mut hits = index.search_zones(query, read, 0, Some(hidden)).unwrap().hits;
        if read >= clusters || hits.iter().filter(clustered).count() >= wanted {
            hits.truncate(k);
            return hits;
        }
    }
    unreachable!("all clusters have been read")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn where_many_keys_are_hidden_the_next_best_clusters_are_read(
        seed: u64, keys in 200usize..900, probes in 1usize..6, k in 1usize..60, near in 0.0f64..1.0,
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let params = ClustersParams { segment: 256, keys_per_cluster: 8, iterations: 3 };
        let index = index(&mut rng, keys, &params);
        let queries: Vec<f32> = (0..3 * DIM).map(|_| rng.random_range(-1.0f32..1.0)).collect();
        // A share of the best clusters is hidden, which forces reading beyond `probes`, and some keys anywhere.
        let state = index.state();
        let mut hidden = Bitmap::new();
        let clusters: usize = state.segments.iter().map(|segment| segment.clusters()).sum();
        for query in queries.chunks(DIM) {
            let best = index.search_zones(query, (clusters as f64 * near) as usize, 0, None).unwrap();
            hidden.extend(best.hits.iter().map(|hit| hit.id));
        }
        let mut shown: Vec<u32> = (0..keys as u32).collect();
        shown.shuffle(&mut rng);
        hidden.extend(shown[..keys / 5].iter().copied());
        let params = SearchParams { k, probes, ..SearchParams::default() };
        let together = index.search_group(&queries, &params, Some(&hidden)).unwrap();
        for (query, together) in queries.chunks(DIM).zip(together) {
            let found = index.search(query, &params, Some(&hidden)).unwrap();
            prop_assert_eq!(&found.hits, &ranked(&index, query, k, probes, &hidden));
            prop_assert_eq!(&found.hits, &together.hits);
        }
    }
}

#[test]
fn hidden_keys_of_the_tail_are_not_found() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    // 300 keys: a segment of 256 and a tail of 44.
    let index = index(&mut rng, 300, &ClustersParams { segment: 256, ..ClustersParams::default() });
    assert_eq!((index.state().clustered, index.state().tail.len()), (256, 44));
    let query: Vec<f32> = (0..DIM).map(|_| rng.random_range(-1.0f32..1.0)).collect();
    let hidden: Bitmap = (250..300).collect();
    let params = SearchParams { k: 300, probes: 2, ..SearchParams::default() };
    let mut ids: Vec<u32> = index.search(&query, &params, Some(&hidden)).unwrap().hits.iter().map(|h| h.id).collect();
    ids.sort_unstable();
    assert_eq!(ids, (0..250).collect::<Vec<u32>>());
}
