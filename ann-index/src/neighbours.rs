//! The exact nearest keys of many queries: what an attention-aware graph is built from.

use crate::check::check_rows;
use crate::error::IndexError;
use crate::isa::Isa;
use crate::order::{id_of, rank, score_of};
use crate::panels::{HEIGHT, Panels, Tile, WIDTH, above, multiply};
use crate::parallel::map_ranges_on;

/// Queries that go over all keys together.
const BLOCK: usize = 32 * HEIGHT;

/// The keys with the largest inner products with each of several queries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Neighbours {
    /// Keys of a query.
    pub k: usize,
    /// `[queries, k]` ids, the best first.
    pub ids: Vec<u32>,
}

impl Neighbours {
    /// The keys of each query.
    pub fn lists(&self) -> impl ExactSizeIterator<Item = &[u32]> {
        self.ids.chunks_exact(self.k.max(1))
    }

    /// Refuses what cannot be the neighbours of that many queries among that many keys.
    pub(crate) fn check(&self, keys: usize, queries: usize) -> Result<(), IndexError> {
        let wrong = |what: String| Err(IndexError::BadNeighbours { what });
        if Some(self.ids.len()) != self.k.checked_mul(queries) {
            return wrong(format!("{} ids, expected {} for each of {queries} queries", self.ids.len(), self.k));
        }
        match self.ids.iter().find(|&&id| id as usize >= keys) {
            Some(id) => wrong(format!("there is no key {id} among {keys}")),
            None => Ok(()),
        }
    }
}

/// The `min(k, keys)` keys with the largest inner products with each query, computed in f32 from the
/// numbers as given: a blocked matrix product whose tiles are compared with each query's
/// threshold in registers. `keys` and `queries` are rows of `dim` numbers; the lower id comes first
/// among equal products. `threads` 0 means as many as the caller's rayon pool has, or one inside it.
///
/// # Errors
/// What [`build`](crate::build) refuses in keys and queries; [`IndexError::BadParameter`] when `dim`
/// is 0.
pub fn exact_neighbours(
    dim: usize,
    keys: &[f32],
    queries: &[f32],
    k: usize,
    threads: usize,
) -> Result<Neighbours, IndexError> {
    if dim == 0 {
        return Err(IndexError::BadParameter { name: "dim", value: dim, expected: "at least 1" });
    }
    check_rows("keys", dim, keys)?;
    check_rows("sample queries", dim, queries)?;
    let k = k.min(keys.len() / dim);
    if k == 0 {
        return Ok(Neighbours::default());
    }
    let panels = Panels::new(dim, keys);
    let blocks = map_ranges_on(threads, queries.len() / dim, BLOCK, |range| {
        let mut ids = vec![0; range.len() * k];
        search_block(dim, &panels, &queries[range.start * dim..range.end * dim], k, &mut ids);
        ids
    });
    Ok(Neighbours { k, ids: blocks.concat() })
}

/// The best `k` so far of one query, and later ones that were better than the threshold when they came.
struct Best {
    ranks: Vec<u64>,
    threshold: f32,
}

fn search_block(dim: usize, panels: &Panels, queries: &[f32], k: usize, ids: &mut [u32]) {
    let isa = Isa::best();
    let room = 2 * k + 256;
    let mut bests: Vec<Best> = (0..queries.len() / dim)
        .map(|_| Best { ranks: Vec::with_capacity(room + WIDTH), threshold: f32::NEG_INFINITY })
        .collect();
    let mut tile: Tile = [[0.0; WIDTH]; HEIGHT];
    for (start, len, panel) in panels.iter() {
        for (rows, bests) in queries.chunks(HEIGHT * dim).zip(bests.chunks_mut(HEIGHT)) {
            multiply(isa, dim, rows, panel, &mut tile);
            for (best, scores) in bests.iter_mut().zip(&tile) {
                let mut bits = above(isa, scores, best.threshold) & (u64::MAX >> (WIDTH - len));
                while bits != 0 {
                    let i = bits.trailing_zeros() as usize;
                    bits &= bits - 1;
                    best.ranks.push(rank(scores[i], (start + i) as u32));
                }
                if best.ranks.len() >= room {
                    best.shrink(k);
                }
            }
        }
    }
    for (best, ids) in bests.iter_mut().zip(ids.chunks_exact_mut(k)) {
        best.ranks.sort_unstable();
        for (id, &rank) in ids.iter_mut().zip(&best.ranks) {
            *id = id_of(rank);
        }
    }
}

impl Best {
    #[cold]
    fn shrink(&mut self, k: usize) {
        let (_, &mut last, _) = self.ranks.select_nth_unstable(k - 1);
        self.ranks.truncate(k);
        self.threshold = score_of(last);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(25))]
        #[test]
        fn equals_a_full_sort(
            dim in 1usize..4, keys in prop::collection::vec(-3i8..4, 0..3000),
            queries in prop::collection::vec(-3i8..4, 0..60), k in 0usize..40, threads in 0usize..3,
        ) {
            let rows = |v: &[i8]| -> Vec<f32> { v[..v.len() / dim * dim].iter().map(|&x| f32::from(x)).collect() };
            let (keys, queries) = (rows(&keys), rows(&queries));
            let got = exact_neighbours(dim, &keys, &queries, k, threads).unwrap();
            prop_assert_eq!(got.k, if queries.is_empty() && k > 0 { got.k } else { k.min(keys.len() / dim) });
            let mut expected = Vec::new();
            for query in queries.chunks(dim) {
                let score = |key: &[f32]| -> f32 { key.iter().zip(query).map(|(a, b)| a * b).sum() };
                let mut all: Vec<(f32, u32)> = keys.chunks(dim).zip(0..).map(|(key, id)| (score(key), id)).collect();
                all.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap().then(a.1.cmp(&b.1)));
                expected.extend(all[..got.k].iter().map(|x| x.1));
            }
            prop_assert_eq!(&got.ids, &expected);
            prop_assert!(got.check(keys.len() / dim, queries.len() / dim).is_ok());
        }
    }

    #[test]
    fn strangers_are_refused() {
        let some = Neighbours { k: 2, ids: vec![0, 1, 2, 3] };
        assert!(some.check(4, 2).is_ok());
        assert!(some.check(3, 2).unwrap_err().to_string().contains("no key 3"));
        assert!(some.check(4, 3).is_err());
        assert!(exact_neighbours(2, &[f32::NAN, 0.0], &[], 1, 0).is_err());
        assert!(exact_neighbours(0, &[], &[], 1, 0).is_err());
    }
}
