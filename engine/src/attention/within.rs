//! How much of its attention each token keeps to some positions, once it is known what it pays to all.
//!
//! A query's log-sum-exp over some keys only, less that over all it sees, is the logarithm of what it pays to those. So what tokens
//! pay within their own chunk takes attention over one chunk for each, a small part of a prompt's, by the same operation.

use std::ops::Range;

use super::dense::{Queries, attend};
use crate::backend::cpu::Cpu;
use crate::kv::dense::DenseKv;

/// Tokens and the keys that they are looked at for, by position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) tokens: Range<usize>,
    pub(crate) keys: Range<usize>,
}

impl Region {
    /// Which of some tokens, one behind the other from position `first` on, it is about, as far as they see any of its keys.
    pub(crate) fn rows(&self, first: usize, tokens: usize, window: Option<usize>) -> Range<usize> {
        let row = |position: usize| position.clamp(first, first + tokens) - first;
        // The token at position p sees none before p + 1 - window.
        let last = window.map_or(usize::MAX, |window| (self.keys.end + window).saturating_sub(1));
        row(self.tokens.start.max(self.keys.start))..row(self.tokens.end.min(last))
    }
}

/// Adds to `paid`, one for each token, the weights that `queries`, of tokens one behind the other, give to the keys of a region,
/// summed over heads. Tokens outside of the region pay nothing. `lse`: of all that each query sees, `[tokens, heads]`.
pub(crate) fn add_within(
    cpu: &Cpu,
    kv: &DenseKv,
    queries: &Queries<'_>,
    lse: &[f32],
    region: &Region,
    paid: &mut [f32],
) {
    let Some(first) = queries.positions.first() else { return };
    let (heads, width) = (queries.heads, queries.q.len() / queries.positions.len());
    let rows = region.rows(*first, queries.positions.len(), queries.window);
    if rows.is_empty() {
        return;
    }
    let mut keys = kv.clone();
    keys.drop_before(region.keys.start);
    keys.truncate(region.keys.end);
    let some = Queries {
        q: &queries.q[rows.start * width..rows.end * width],
        positions: &queries.positions[rows.clone()],
        ..*queries
    };
    let within = attend(cpu, &keys, &some).lse;
    let all = &lse[rows.start * heads..rows.end * heads];
    for ((paid, within), all) in paid[rows].iter_mut().zip(within.chunks_exact(heads)).zip(all.chunks_exact(heads)) {
        *paid += within.iter().zip(all).map(|(within, all)| (within - all).exp()).sum::<f32>();
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::kv::{KvDtype, KvShape};

    /// The softmax weights in double precision, from the same numbers as the pages hold.
    fn oracle(kv: &DenseKv, queries: &Queries<'_>, region: &Region) -> Vec<f64> {
        let (dim, group) = (kv.shape().head_dim, queries.heads / kv.shape().kv_heads);
        let paid = |(token, &position): (usize, &usize)| {
            let start = (position + 1).saturating_sub(queries.window.unwrap_or(position + 1));
            let of_head = |head: usize| {
                let (keys, _) = kv.rows(head / group, start..position + 1);
                let q = &queries.q[(token * queries.heads + head) * dim..][..dim];
                let dot = |key: &[f32]| key.iter().zip(q).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum::<f64>();
                let weights: Vec<f64> =
                    keys.chunks_exact(dim).map(|key| (dot(key) * f64::from(queries.scale)).exp()).collect();
                let kept = (start..).zip(&weights).filter(|(at, _)| region.keys.contains(at)).map(|(_, w)| w);
                kept.sum::<f64>() / weights.iter().sum::<f64>()
            };
            if region.tokens.contains(&position) { (0..queries.heads).map(of_head).sum() } else { 0.0 }
        };
        queries.positions.iter().enumerate().map(paid).collect()
    }

    #[test]
    fn what_is_kept_within_is_the_softmax_over_all_that_is_seen() {
        let cpu = Cpu::new(3);
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        for dtype in [KvDtype::F32, KvDtype::Bf16] {
            // Groups of one and of several; windows that end within a region; pages that are not full.
            for (heads, kv_heads, tokens, before, window) in
                [(2, 2, 1, 5, None), (6, 2, 40, 256, None), (4, 1, 17, 300, Some(9)), (4, 4, 64, 129, Some(90))]
            {
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
                let end = before + tokens;
                for (tokens, keys) in [
                    (0..end, 0..end),
                    (before..end, before..end),
                    (before - 3..end - 1, before - 3..end - 1),
                    (before..end, 0..3),
                    (before..end, 0..before),
                    (before..end, before + 1..end),
                    (end - 1..end + 9, before / 2..before),
                    (0..before, 0..before),
                ] {
                    let region = Region { tokens, keys };
                    let mut paid = vec![1.0; positions.len()];
                    add_within(&cpu, &kv, &queries, &lse, &region, &mut paid);
                    for (at, (found, wanted)) in paid.iter().zip(oracle(&kv, &queries, &region)).enumerate() {
                        let error = (f64::from(*found) - 1.0 - wanted).abs();
                        assert!(
                            error < 2e-3 * (wanted + 0.1),
                            "{dtype:?} {region:?}, token {at}: {found} - 1, not {wanted}"
                        );
                    }
                }
            }
        }
    }
}
