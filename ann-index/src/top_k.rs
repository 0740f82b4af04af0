//! The k best of a stream of scored keys.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use crate::key_index::Hit;

/// Keeps the `k` best hits seen: higher score first, the lower id first among equals.
pub(crate) struct TopK {
    k: usize,
    worst_first: BinaryHeap<Reverse<Ranked>>,
}

#[derive(Clone, Copy)]
struct Ranked(Hit);

impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_score = self.0.score.total_cmp(&other.0.score);
        by_score.then_with(|| other.0.id.cmp(&self.0.id))
    }
}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Ranked {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Ranked {}

impl TopK {
    /// Room for `k` hits; the caller bounds `k` by the number of keys.
    pub(crate) fn new(k: usize) -> Self {
        let worst_first = BinaryHeap::with_capacity(k);
        Self { k, worst_first }
    }

    /// Offers a key; an id may be offered once only.
    #[inline]
    pub(crate) fn offer(&mut self, id: u32, score: f32) {
        // Adding zero turns -0.0 into 0.0, which `total_cmp` would tell apart.
        let score = score + 0.0;
        if self.worst_first.len() < self.k {
            self.worst_first.push(Reverse(Ranked(Hit { id, score })));
        } else if let Some(mut worst) = self.worst_first.peek_mut() {
            let new = Ranked(Hit { id, score });
            if new > worst.0 {
                *worst = Reverse(new);
            }
        }
    }

    /// The score that a key must reach to matter; minus infinity until `k` are held.
    #[inline]
    pub(crate) fn threshold(&self) -> f32 {
        match self.worst_first.peek() {
            Some(worst) if self.worst_first.len() == self.k => worst.0.0.score,
            _ => f32::NEG_INFINITY,
        }
    }

    /// The hits, best first.
    pub(crate) fn into_hits(self) -> Vec<Hit> {
        let sorted = self.worst_first.into_sorted_vec();
        sorted.into_iter().map(|Reverse(Ranked(hit))| hit).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn equals_a_full_sort(scores in prop::collection::vec(-4i32..4, 0..60), k in 0usize..20) {
            let mut top = TopK::new(k);
            let mut all = Vec::new();
            for (id, score) in scores.iter().enumerate() {
                let score = if *score == 0 && id % 2 == 0 { -0.0 } else { *score as f32 };
                top.offer(id as u32, score);
                all.push((score, id as u32));
            }
            all.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap().then(a.1.cmp(&b.1)));
            all.truncate(k);
            let got: Vec<_> = top.into_hits().iter().map(|h| (h.score, h.id)).collect();
            prop_assert_eq!(got, all);
        }
    }
}
