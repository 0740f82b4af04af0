//! How much attention some queries pay to each token of a [`DenseKv`], once it is known what they pay to all.
//!
//! `attend` leaves the log-sum-exp of each query's scores behind, so a weight is `exp(score - lse)`, and a second pass over the
//! keys alone gives the weights of a head that `attend` never holds together.

use half::bf16;

use super::dense::Queries;
use crate::backend::cpu::Cpu;
use crate::backend::cpu::micro::{Product, Steps, product};
use crate::backend::cpu::pool::Shards;
use crate::backend::cpu::simd::{LANES, simd_dispatch};
use crate::kv::KvDtype;
use crate::kv::dense::DenseKv;
use crate::kv::page::{KvElement, PAGE};

/// Keys of a task; divides a page.
const BLOCK: usize = 128;
/// Query rows whose weights are held at a time.
const ROWS: usize = 48;

/// Adds to `paid`, by position from 0 on, the weights that `queries` give to the tokens of `kv` there, summed over heads and
/// queries. `lse`: of all that each query sees, `[tokens, heads]`. Where a query sees nothing of a position, it pays nothing.
pub(crate) fn add_paid(cpu: &Cpu, kv: &DenseKv, queries: &Queries<'_>, lse: &[f32], paid: &mut [f32]) {
    let (dim, kv_heads) = (kv.shape().head_dim, kv.shape().kv_heads);
    let (tokens, group) = (queries.positions.len(), queries.heads / kv_heads);
    let (scale, rows) = (queries.scale * std::f32::consts::LOG2_E, tokens * group);
    // By KV head: its query rows side by side, in units of log2.
    let mut q = Vec::with_capacity(queries.q.len());
    let mut sums = Vec::with_capacity(lse.len());
    for head in 0..queries.heads / group {
        for row in 0..rows {
            let from = row / group * queries.heads + head * group + row % group;
            q.extend(queries.q[from * dim..(from + 1) * dim].iter().map(|x| x * scale));
            sums.push(lse[from] * std::f32::consts::LOG2_E);
        }
    }
    let end = paid.len().min(kv.positions().end);
    let first = kv.positions().start;
    let out = Shards::new(&mut paid[..end]);
    let begin = first / BLOCK;
    cpu.pool.run(end.div_ceil(BLOCK).saturating_sub(begin), |task| {
        let keys = ((begin + task) * BLOCK).max(first)..end.min((begin + task + 1) * BLOCK);
        // SAFETY: one part a task.
        let out = unsafe { out.part(keys.clone()) };
        let block =
            Block { kv, queries, group, q: &q, lse: &sums, start: (begin + task) * BLOCK, first: keys.start, out };
        match kv.shape().dtype {
            KvDtype::F32 => simd_dispatch!(cpu.isa, block_f32, Block<'_>, block),
            KvDtype::Bf16 => simd_dispatch!(cpu.isa, block_bf16, Block<'_>, block),
        }
    });
}

/// Some keys of all heads.
struct Block<'a> {
    kv: &'a DenseKv,
    queries: &'a Queries<'a>,
    /// Query heads of a KV head.
    group: usize,
    /// `[kv_heads, tokens * group, dim]`, scaled, and the log-sum-exp of each.
    q: &'a [f32],
    lse: &'a [f32],
    /// Where the block begins, and the first position that counts.
    start: usize,
    first: usize,
    out: &'a mut [f32],
}

#[inline(always)]
unsafe fn block_f32<S: Steps<f32>>(block: Block<'_>) {
    // SAFETY: the caller is compiled for `S`.
    unsafe { block.run::<S, f32>() }
}

#[inline(always)]
unsafe fn block_bf16<S: Steps<bf16>>(block: Block<'_>) {
    // SAFETY: the caller is compiled for `S`.
    unsafe { block.run::<S, bf16>() }
}

impl Block<'_> {
    #[inline(always)]
    unsafe fn run<S: Steps<E>, E: KvElement>(mut self) {
        let (shape, dim) = (self.kv.shape(), self.kv.shape().head_dim);
        let end = self.first + self.out.len();
        let (groups, slot) = ((end - self.start).div_ceil(LANES), self.start % PAGE);
        let rows = self.queries.positions.len() * self.group;
        let mut weights = [0.0f32; ROWS * BLOCK];
        for head in 0..shape.kv_heads {
            let (k, _) = self.kv.page(self.start.max(self.kv.positions().start)).head::<E>(shape, head);
            for from in (0..rows).step_by(ROWS) {
                let count = ROWS.min(rows - from);
                let scores = Product {
                    rows: count,
                    groups,
                    steps: dim / E::STEP,
                    a: self.q[(head * rows + from) * dim..].as_ptr(),
                    a_stride: dim,
                    b: k[slot * dim..].as_ptr(),
                    b_step: LANES * E::STEP,
                    b_group: LANES * dim,
                    c: weights.as_mut_ptr(),
                    c_stride: BLOCK,
                    accumulate: false,
                    ahead: 0,
                };
                // SAFETY: the block's slots lie in one page; `weights` has `count` rows of BLOCK; the caller is compiled for `S`.
                unsafe { product::<S, E>(&scores) };
                for (row, weights) in weights.chunks_exact_mut(BLOCK).take(count).enumerate() {
                    let lse = self.lse[head * rows + from + row];
                    // SAFETY: whole lanes within a row; the caller is compiled for `S`.
                    unsafe {
                        let lse = S::splat(lse);
                        for i in (0..groups * LANES).step_by(LANES) {
                            let at = weights.as_mut_ptr().add(i);
                            S::store(at, S::exp2(S::sub(S::load(at), lse)));
                        }
                    }
                    self.add((from + row) / self.group, weights);
                }
            }
        }
    }

    /// Adds a row's weights where its token sees the key.
    #[inline(always)]
    fn add(&mut self, token: usize, weights: &[f32]) {
        let seen = self.queries.visible(token);
        let (from, to) = (seen.start.max(self.first), seen.end.min(self.first + self.out.len()));
        if from < to {
            let out = &mut self.out[from - self.first..to - self.first];
            let weights = &weights[from - self.start..to - self.start];
            out.iter_mut().zip(weights).for_each(|(sum, weight)| *sum += weight);
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::attention::dense::attend;
    use crate::kv::KvShape;

    /// In double precision, from the same numbers as the pages hold.
    fn oracle(kv: &DenseKv, queries: &Queries<'_>, end: usize) -> Vec<f64> {
        let (dim, group) = (kv.shape().head_dim, queries.heads / kv.shape().kv_heads);
        let mut paid = vec![0.0; end];
        for (token, &position) in queries.positions.iter().enumerate() {
            let start = kv.positions().start.max((position + 1).saturating_sub(queries.window.unwrap_or(position + 1)));
            for head in 0..queries.heads {
                let (keys, _) = kv.rows(head / group, start..position + 1);
                let q = &queries.q[(token * queries.heads + head) * dim..][..dim];
                let score = |key: &[f32]| -> f64 {
                    key.iter().zip(q).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum::<f64>()
                        * f64::from(queries.scale)
                };
                let weights: Vec<f64> = keys.chunks_exact(dim).map(|key| score(key).exp()).collect();
                let sum: f64 = weights.iter().sum();
                (start..end).zip(&weights).for_each(|(at, weight)| paid[at] += weight / sum);
            }
        }
        paid
    }

    #[test]
    fn what_is_paid_is_the_softmax_over_all_that_is_seen() {
        let cpu = Cpu::new(3);
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for dtype in [KvDtype::F32, KvDtype::Bf16] {
            // Groups of one and of several; more rows than are held at a time; windows; pages that are not full.
            for (heads, kv_heads, tokens, before, window) in [
                (2, 2, 1, 5, None),
                (6, 2, 3, 256, None),
                (14, 2, 31, 700, None),
                (4, 1, 17, 300, Some(40)),
                (4, 4, 64, 129, Some(500)),
            ] {
                let shape = KvShape { layers: 1, kv_heads, head_dim: 32, dtype };
                let mut kv = DenseKv::new(shape, 0);
                kv.extend_to(before + tokens);
                for position in 0..before + tokens {
                    let mut row = || (0..shape.width()).map(|_| rng.random_range(-2.0..2.0)).collect::<Vec<f32>>();
                    let (keys, values) = (row(), row());
                    kv.write(position, &keys, &values);
                }
                let q: Vec<f32> = (0..tokens * heads * 32).map(|_| rng.random_range(-2.0..2.0)).collect();
                let positions: Vec<usize> = (before..before + tokens).collect();
                let queries = Queries { q: &q, positions: &positions, heads, scale: 0.2, window };
                let lse = attend(&cpu, &kv, &queries).lse;
                // A part of what is there: the context before the queries.
                let mut paid = vec![1.0; before];
                add_paid(&cpu, &kv, &queries, &lse, &mut paid);
                for (at, (found, wanted)) in paid.iter().zip(oracle(&kv, &queries, before)).enumerate() {
                    let error = (f64::from(*found) - 1.0 - wanted).abs();
                    assert!(
                        error < 2e-3 * (wanted + 0.1),
                        "{dtype:?} {heads} {tokens}, key {at}: {found} - 1, not {wanted}"
                    );
                }
            }
        }
    }
}
