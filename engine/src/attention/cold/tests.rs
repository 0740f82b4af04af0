//! Attention over several segments against its definition in double precision.

#![allow(clippy::unwrap_used)]

use std::ops::Range;
use std::sync::Arc;

use ann_index::{IndexKind, IndexParams, SearchParams};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::segment::make_index;
use super::{Segment, SegmentRows, SegmentSource, attend_cold};
use crate::attention::dense::Queries;
use crate::backend::cpu::Cpu;
use crate::kv::{KvDtype, KvShape};

const SHAPE: KvShape = KvShape { layers: 2, kv_heads: 2, head_dim: 16, dtype: KvDtype::F32 };
const HEADS: usize = 6;
const SCALE: f32 = 0.4;

/// Keys and values of some tokens, `[layers]` of `[tokens, kv_heads, head_dim]`.
type Rows = Vec<(Vec<f32>, Vec<f32>)>;

fn normal(rng: &mut ChaCha8Rng, n: usize, size: f32) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-size..size)).collect()
}

fn encoded(rows: &Rows) -> SegmentRows {
    let bytes = |side: &[f32]| side.iter().flat_map(|x| x.to_le_bytes()).collect();
    SegmentRows::Read(rows.iter().map(|(keys, values)| (bytes(keys), bytes(values))).collect())
}

/// Tokens at `positions`, whose keys have the length `size`, with an index of them alone.
fn segment(rng: &mut ChaCha8Rng, positions: Range<usize>, size: f32) -> (Rows, Arc<Segment>) {
    let n = positions.len() * SHAPE.width();
    let rows: Rows = (0..SHAPE.layers).map(|_| (normal(rng, n, size), normal(rng, n, 1.0))).collect();
    let source = SegmentSource {
        shape: SHAPE,
        absorbed: Vec::new(),
        dense: encoded(&rows),
        tokens: positions,
        params: IndexParams { kind: IndexKind::Flat, ..IndexParams::default() },
        make: make_index,
    };
    (rows, Arc::new(source.build(&|| true).unwrap()))
}

/// Output and log-sum-exp of one query over its `k` best keys of all segments.
fn direct(segments: &[Rows], layer: usize, head: usize, q: &[f32], k: usize) -> (Vec<f64>, f64) {
    let (dim, width) = (SHAPE.head_dim, SHAPE.width());
    let mut all: Vec<(f64, Vec<f64>)> = Vec::new();
    for (keys, values) in segments.iter().map(|rows| &rows[layer]) {
        let of =
            |rows: &[f32]| -> Vec<f64> { rows[head * dim..(head + 1) * dim].iter().map(|x| f64::from(*x)).collect() };
        for (key, value) in keys.chunks_exact(width).zip(values.chunks_exact(width)) {
            let score: f64 = of(key).iter().zip(q).map(|(k, q)| k * f64::from(*q)).sum();
            all.push((score * f64::from(SCALE), of(value)));
        }
    }
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    all.truncate(k);
    let max = all.iter().map(|(score, _)| *score).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = all.iter().map(|(score, _)| (score - max).exp()).sum();
    let out = (0..dim).map(|d| all.iter().map(|(score, v)| (score - max).exp() * v[d]).sum::<f64>() / sum).collect();
    (out, max + sum.ln())
}

#[test]
fn the_best_keys_of_all_segments_together_are_attended() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let cpu = Cpu::new(2);
    // Alike, one that has all of the best, and some that have fewer keys than are asked for.
    for sizes in
        [&[(300, 1.0)][..], &[(200, 1.0), (150, 1.0), (90, 1.0)], &[(60, 0.1), (60, 2.0)], &[(3, 1.0), (2, 2.0)]]
    {
        let mut start = 4;
        let (rows, segments): (Vec<Rows>, Vec<_>) = sizes
            .iter()
            .map(|&(tokens, size)| {
                start += tokens;
                segment(&mut rng, start - tokens..start, size)
            })
            .unzip();
        let total = start - 4;
        let positions = [start, start + 1, start + 9];
        let q = normal(&mut rng, positions.len() * HEADS * SHAPE.head_dim, 1.0);
        let queries = Queries { q: &q, positions: &positions, heads: HEADS, scale: SCALE, window: None };
        for (layer, k) in [(0, 1), (1, 7), (0, 40), (1, 1000)] {
            let params = SearchParams { k, ..SearchParams::default() };
            let (state, stats) = attend_cold(&cpu, &segments, layer, SHAPE.kv_heads, &queries, &params).unwrap();
            let per_row = |n: usize| (n * queries.rows()) as u64;
            assert_eq!((stats.cold_keys, stats.keys_scored), (per_row(total), per_row(total)));
            assert_eq!(stats.keys_attended, per_row(k.min(total)), "{k} of {sizes:?}");
            for row in 0..queries.rows() {
                let head = row % HEADS / (HEADS / SHAPE.kv_heads);
                let at = row * SHAPE.head_dim..(row + 1) * SHAPE.head_dim;
                let (out, lse) = direct(&rows, layer, head, &q[at.clone()], k);
                assert!((f64::from(state.lse[row]) - lse).abs() < 1e-4, "{k} of {sizes:?}: {} {lse}", state.lse[row]);
                for (found, wanted) in state.out[at].iter().zip(&out) {
                    assert!((f64::from(*found) - wanted).abs() < 1e-4, "{k} of {sizes:?}: {found} {wanted}");
                }
            }
        }
    }
}

#[test]
fn a_segment_that_absorbs_others_holds_their_tokens_in_order() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let cpu = Cpu::new(1);
    let ((first, a), (second, b)) = (segment(&mut rng, 4..60, 1.0), segment(&mut rng, 60..90, 1.0));
    let n = 25 * SHAPE.width();
    let last: Rows = (0..SHAPE.layers).map(|_| (normal(&mut rng, n, 1.0), normal(&mut rng, n, 1.0))).collect();
    let source = SegmentSource {
        shape: SHAPE,
        absorbed: vec![a, b],
        dense: encoded(&last),
        tokens: 90..115,
        params: IndexParams { kind: IndexKind::Flat, ..IndexParams::default() },
        make: make_index,
    };
    let whole = Arc::new(source.build(&|| true).unwrap());
    assert_eq!(whole.positions(), 4..115);
    let q = normal(&mut rng, HEADS * SHAPE.head_dim, 1.0);
    let queries = Queries { q: &q, positions: &[120], heads: HEADS, scale: SCALE, window: None };
    let params = SearchParams { k: 9, ..SearchParams::default() };
    for layer in 0..SHAPE.layers {
        let one = std::slice::from_ref(&whole);
        let (state, _) = attend_cold(&cpu, one, layer, SHAPE.kv_heads, &queries, &params).unwrap();
        let rows = [first.clone(), second.clone(), last.clone()];
        for row in 0..HEADS {
            let at = row * SHAPE.head_dim..(row + 1) * SHAPE.head_dim;
            let (out, _) = direct(&rows, layer, row / (HEADS / SHAPE.kv_heads), &q[at.clone()], 9);
            assert!(state.out[at].iter().zip(&out).all(|(f, w)| (f64::from(*f) - w).abs() < 1e-4), "row {row}");
        }
    }
}
