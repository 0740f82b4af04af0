use super::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

struct Case {
    kv: DenseKv,
    keys: Vec<f32>,
    values: Vec<f32>,
    q: Vec<f32>,
    positions: Vec<usize>,
    heads: usize,
    window: Option<usize>,
}

/// Random tokens in a run that begins at `start`, and random queries among them.
fn case(rng: &mut ChaCha8Rng, shape: KvShape, heads: usize, start: usize, tokens: usize, queries: usize) -> Case {
    let mut normal = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-2.0f32..2.0)).collect() };
    let (mut keys, mut values) = (normal(tokens * shape.width()), normal(tokens * shape.width()));
    shape.dtype.round(&mut keys);
    shape.dtype.round(&mut values);
    let q = normal(queries * heads * shape.head_dim);
    let mut kv = DenseKv::new(shape, start);
    kv.extend_to(start + tokens);
    for t in 0..tokens {
        let row = t * shape.width()..(t + 1) * shape.width();
        kv.write(start + t, &keys[row.clone()], &values[row]);
    }
    let mut positions: Vec<usize> = (0..queries).map(|_| start + rng.random_range(0..tokens)).collect();
    positions.sort_unstable();
    let window = rng.random_bool(0.3).then(|| rng.random_range(1..=tokens));
    Case { kv, keys, values, q, positions, heads, window }
}

fn queries(c: &Case) -> Queries<'_> {
    Queries { q: &c.q, positions: &c.positions, heads: c.heads, scale: 0.3, window: c.window }
}

/// Attention straight from its definition, in double precision.
fn direct(c: &Case, row: usize) -> (Vec<f64>, f64) {
    let (shape, start) = (c.kv.shape(), c.kv.positions().start);
    let (dim, width) = (shape.head_dim, shape.width());
    let (token, head) = (row / c.heads, row % c.heads / (c.heads / shape.kv_heads));
    let position = c.positions[token];
    let first = start.max(c.window.map_or(0, |w| (position + 1).saturating_sub(w)));
    let q = &c.q[row * dim..(row + 1) * dim];
    let at = |x: &[f32], p: usize, d: usize| f64::from(x[(p - start) * width + head * dim + d]);
    let score = |p: usize| 0.3f64 as f32 as f64 * (0..dim).map(|d| f64::from(q[d]) * at(&c.keys, p, d)).sum::<f64>();
    let max = (first..=position).map(score).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = (first..=position).map(|p| (score(p) - max).exp()).sum();
    let out = (0..dim)
        .map(|d| (first..=position).map(|p| (score(p) - max).exp() * at(&c.values, p, d)).sum::<f64>() / sum)
        .collect();
    (out, max + sum.ln())
}

#[test]
fn agrees_with_the_definition_on_every_instruction_set() {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let shapes = [(1, 1, 16), (2, 6, 64), (2, 8, 128), (3, 21, 48)];
    for isa in Isa::available() {
        let mut cpu = Cpu::new(2);
        cpu.isa = isa;
        for (kv_heads, heads, head_dim) in shapes {
            for dtype in [KvDtype::F32, KvDtype::Bf16] {
                let shape = KvShape { layers: 1, kv_heads, head_dim, dtype };
                for (start, tokens, n) in [(0, 1, 1), (0, 17, 5), (250, 300, 70), (1000, 700, 1)] {
                    let c = case(&mut rng, shape, heads, start, tokens, n);
                    let state = attend(&cpu, &c.kv, &queries(&c));
                    // The cheaper exponential of bf16 KV costs 2^-13 of a weight.
                    let tolerance = if dtype == KvDtype::Bf16 { 1e-3 } else { 5e-4 };
                    for row in 0..n * heads {
                        let (out, lse) = direct(&c, row);
                        assert!((f64::from(state.lse[row]) - lse).abs() < tolerance, "{isa:?} {shape:?} lse");
                        for (d, want) in out.iter().enumerate() {
                            let got = f64::from(state.out[row * head_dim + d]);
                            assert!((got - want).abs() < tolerance, "{isa:?} {shape:?} {got} {want}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn scattered_queries_do_not_see_the_future() {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let cpu = Cpu::new(2);
    for dtype in [KvDtype::F32, KvDtype::Bf16] {
        let shape = KvShape { layers: 1, kv_heads: 2, head_dim: 64, dtype };
        for _ in 0..20 {
            let mut c = case(&mut rng, shape, 6, 0, 600, 60);
            let before = attend(&cpu, &c.kv, &queries(&c));
            let cut = rng.random_range(1..600);
            let row: Vec<f32> = (0..shape.width()).map(|_| rng.random_range(-50.0..50.0)).collect();
            (cut..600).for_each(|p| c.kv.write(p, &row, &row));
            let after = attend(&cpu, &c.kv, &queries(&c));
            let unchanged = c.positions.partition_point(|p| *p < cut) * 6;
            assert_eq!(before.out[..unchanged * 64], after.out[..unchanged * 64]);
            assert_eq!(before.lse[..unchanged], after.lse[..unchanged]);
        }
    }
}

#[test]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let cpu = Cpu::new(2);
    let shape = KvShape { layers: 1, kv_heads: 2, head_dim: 64, dtype: KvDtype::Bf16 };
    let c = case(&mut rng, shape, 6, 0, 500, 40);
    let all = attend(&cpu, &c.kv, &queries(&c));
    // Three tokens at least: fewer rows use another kernel where there are matrix tiles.
    for token in [0, 13, 37] {
        let rows = token * 6..(token + 3) * 6;
        let some = &c.q[rows.start * 64..rows.end * 64];
        let alone = Queries { q: some, positions: &c.positions[token..token + 3], ..queries(&c) };
        assert!(attend(&cpu, &c.kv, &alone).out == all.out[rows.start * 64..rows.end * 64], "token {token}");
    }
}

#[test]
fn no_tokens_and_no_queries_are_legal() {
    let cpu = Cpu::new(1);
    let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 16, dtype: KvDtype::F32 };
    let kv = DenseKv::new(shape, 40);
    let q = [1.0; 16];
    let one = Queries { q: &q, positions: &[50], heads: 1, scale: 1.0, window: None };
    assert_eq!(attend(&cpu, &kv, &one), AttentionState::empty(1, 16));
    let none = Queries { q: &[], positions: &[], ..one };
    assert!(attend(&cpu, &kv, &none).out.is_empty());
}
