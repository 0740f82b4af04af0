//! Rotation moves to the query: an index over keys at positions within their chunk answers for every start position.

#![allow(clippy::unwrap_used)]

use ann_index::{IndexKind, IndexParams, KeyPrecision, SearchParams, build};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const DIM: usize = 64;
const BASE: f64 = 10_000.0;

/// Turns a row by a position, in the layout that pairs number i with number i + dim / 2 (Su et al., arXiv 2104.09864).
fn turn(row: &[f32], position: i64) -> Vec<f32> {
    let half = row.len() / 2;
    let mut out = vec![0.0; row.len()];
    for i in 0..half {
        let angle = position as f64 * BASE.powf(-(i as f64) / half as f64);
        let (sin, cos) = angle.sin_cos();
        let (x, y) = (f64::from(row[i]), f64::from(row[i + half]));
        out[i] = (x * cos - y * sin) as f32;
        out[i + half] = (x * sin + y * cos) as f32;
    }
    out
}

#[test]
fn a_turned_query_finds_what_turned_keys_would_give() {
    const KEYS: usize = 3000;
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut draw = || rng.random::<f32>() + rng.random::<f32>() - 1.0;
    let mean: Vec<f32> = (0..DIM).map(|_| 2.0 * draw()).collect();
    let raw: Vec<Vec<f32>> = (0..KEYS).map(|_| mean.iter().map(|m| m + draw()).collect()).collect();
    let queries: Vec<Vec<f32>> = (0..20).map(|_| mean.iter().map(|m| 0.5 * m + draw()).collect()).collect();
    let local: Vec<f32> = raw.iter().zip(0..).flat_map(|(key, i)| turn(key, i)).collect();
    for start in [0, 1, 4096, 100_000] {
        // The queries come after the chunk; their own position is `start + KEYS` and further on.
        let absolute: Vec<f32> = raw.iter().zip(start..).flat_map(|(key, at)| turn(key, at)).collect();
        let turned = |i: usize, by: i64| turn(&queries[i], start + KEYS as i64 + 7 * i as i64 + by);
        let samples: Vec<f32> = (0..20).flat_map(|i| turned(i, -start)).collect();
        let truth = build(DIM, &absolute, &[], &params(IndexKind::Flat)).unwrap();
        for kind in IndexKind::ALL.into_iter().filter(|kind| kind.is_built_in()) {
            let index = build(DIM, &local, &samples, &params(kind)).unwrap();
            let wish = SearchParams { k: 50, ef: 300, probes: 100, ..SearchParams::default() };
            let mut found = 0;
            for i in 0..queries.len() {
                let expected = truth.search(&turned(i, 0), &wish, None).unwrap().hits;
                let got = index.search(&turned(i, -start), &wish, None).unwrap().hits;
                if kind == IndexKind::Flat {
                    for (a, b) in expected.iter().zip(&got) {
                        // Both sides are rounded to f32 after they are turned.
                        assert!((a.score - b.score).abs() < 1e-5 * a.score.abs().max(1.0), "{start}: {a:?} {b:?}");
                    }
                }
                let last = expected[wish.k - 1].score;
                found += got.iter().filter(|hit| hit.score >= last - 1e-3).count();
            }
            let recall = found as f64 / (queries.len() * wish.k) as f64;
            assert!(recall >= if kind == IndexKind::Flat { 1.0 } else { 0.9 }, "{kind} at {start}: {recall}");
        }
    }
}

fn params(kind: IndexKind) -> IndexParams {
    IndexParams { kind, precision: KeyPrecision::F32, ..IndexParams::default() }
}
