//! Small indexes, and damage to their files.

#![allow(dead_code, missing_docs, clippy::unwrap_used)]

use ann_index::{GraphParams, IndexKind, IndexParams, KeyIndex, KeyPrecision, SearchParams, SearchResult, build};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub(crate) const DIM: usize = 12;

pub(crate) fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| rng.random::<f32>() * 4.0 - 2.0 + rng.random::<f32>()).collect()
}

/// One index of every kind that this program has, and precision; and one with a graph for each of two query heads.
pub(crate) fn indexes(keys: usize) -> Vec<Box<dyn KeyIndex>> {
    use IndexKind::{Clusters, Flat, Graph, Hnsw, Ivf};
    use KeyPrecision::{Bf16, F16, F32, Int8};
    let mut all = Vec::new();
    // Last what not every program has: fixtures are numbered.
    for kind in [Flat, Hnsw, Graph, Clusters, Ivf].into_iter().filter(|kind| kind.is_built_in()) {
        for precision in [F32, Bf16, F16, Int8] {
            let params = IndexParams { kind, precision, ..IndexParams::default() };
            let mut rows = numbers(keys * DIM, 1);
            rows.extend_from_within(..5 * DIM.min(rows.len() / 5));
            let index = build(DIM, &rows, &numbers(64 * DIM, 2), &params).unwrap();
            index.append(&numbers(7 * DIM, 3)).unwrap();
            all.push(index);
        }
    }
    let graph = GraphParams { query_heads: 2, ..GraphParams::default() };
    let params = IndexParams { kind: Graph, graph, ..IndexParams::default() };
    let index = build(DIM, &numbers(keys * DIM, 1), &numbers(64 * DIM, 2), &params).unwrap();
    index.append(&numbers(7 * DIM, 3)).unwrap();
    all.push(index);
    all
}

/// The answers to a few queries, in every graph that there is.
pub(crate) fn answers(index: &dyn KeyIndex) -> Vec<SearchResult> {
    let wish = SearchParams { k: 10, ef: 24, probes: 6, ..SearchParams::default() };
    index.search_group(&numbers(6 * index.dim(), 4), &wish, None).unwrap()
}

/// Flips, sets, cuts, doubles or moves some bytes.
pub(crate) fn mutate(bytes: &mut Vec<u8>, rng: &mut ChaCha8Rng) {
    for _ in 0..rng.random_range(1..4) {
        let len = bytes.len();
        if len == 0 {
            return;
        }
        // Headers and small sections are hit as often as the large ones.
        let reach = [64, 640, len][rng.random_range(0..3)].min(len);
        let at = rng.random_range(0..reach);
        match rng.random_range(0..7) {
            0..=2 => bytes[at] ^= 1 << rng.random_range(0..8),
            3 => bytes[at] = [0, 1, 127, 128, 255][rng.random_range(0..5)],
            4 => bytes.truncate(at),
            5 => bytes.extend_from_within(at..len.min(at + 100)),
            _ => {
                let end = len.min(at + 8);
                bytes[at..end].fill(rng.random_range(0..2) * 255);
            }
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    let four = bytes.get(at..at + 4)?;
    Some(u32::from_le_bytes([four[0], four[1], four[2], four[3]]) as usize)
}

/// Makes all checksums right again, as far as there is what they cover.
pub(crate) fn mend(bytes: &mut [u8]) {
    let Some(count) = word(bytes, 40) else { return };
    let table = 64 + 32 * count.min(64);
    for i in 0..count.min(64) {
        let row = 64 + 32 * i;
        let (Some(start), Some(len)) = (word(bytes, row + 8), word(bytes, row + 16)) else { continue };
        let Some(section) = bytes.get(start..start.saturating_add(len)) else { continue };
        let sum = crc_fast::crc32_iscsi(section);
        bytes[row + 4..row + 8].copy_from_slice(&sum.to_le_bytes());
    }
    if bytes.len() >= table {
        let sum = crc_fast::crc32_iscsi(&[&bytes[..60], &bytes[64..table]].concat());
        bytes[60..64].copy_from_slice(&sum.to_le_bytes());
    }
}
