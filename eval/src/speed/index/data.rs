//! What is searched: keys, queries, the truth about them, and the files that other programs read them from.

use std::fs;
use std::path::Path;

use ann_index::{Neighbours, exact_neighbours};

use crate::error::{EvalError, Result};

/// How many rows each set has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) keys: usize,
    /// Keys that are appended later.
    pub(super) growth: usize,
    pub(super) samples: usize,
    /// Queries of the tuning set, and of the test set.
    pub(super) queries: usize,
}

/// Rows of `dim` numbers each.
pub(super) struct Dataset {
    pub(super) name: &'static str,
    pub(super) dim: usize,
    pub(super) keys: Vec<f32>,
    /// Keys of the same kind that come later.
    pub(super) growth: Vec<f32>,
    /// Queries that an index may be shaped after.
    pub(super) samples: Vec<f32>,
    /// Queries that settings are chosen with.
    pub(super) tuning: Vec<f32>,
    /// Queries that figures are reported for.
    pub(super) test: Vec<f32>,
}

impl Dataset {
    pub(super) fn len(&self) -> usize {
        self.keys.len() / self.dim
    }
}

/// Queries with their exact nearest keys.
pub(super) struct Judge<'a> {
    pub(super) dim: usize,
    pub(super) queries: &'a [f32],
    truth: Neighbours,
}

impl<'a> Judge<'a> {
    /// Computes the `k` best keys of each query.
    pub(super) fn new(dim: usize, keys: &[f32], queries: &'a [f32], k: usize) -> Result<Judge<'a>> {
        Ok(Judge { dim, queries, truth: exact_neighbours(dim, keys, queries, k, 0)? })
    }

    /// How many best keys each query has.
    pub(super) fn k(&self) -> usize {
        self.truth.k
    }

    /// The first `count` queries alone.
    pub(super) fn first(&self, count: usize) -> Judge<'a> {
        let count = count.min(self.queries.len() / self.dim);
        let truth = Neighbours { k: self.truth.k, ids: self.truth.ids[..count * self.truth.k].to_vec() };
        Judge { dim: self.dim, queries: &self.queries[..count * self.dim], truth }
    }

    /// The mean share of each query's best keys that is among what was found, and the standard error of that mean.
    /// `found`: `k` ids a query; ids that are no key's (as of missing hits) count as misses.
    pub(super) fn recall(&self, found: &[u32]) -> Result<Recall> {
        let k = self.truth.k.max(1);
        if found.len() != self.truth.ids.len() {
            let expected = format!("{} ids, {k} for each query", self.truth.ids.len());
            return Err(EvalError::BadOption {
                what: "the answer of a search",
                found: found.len().to_string(),
                expected,
            });
        }
        let shares: Vec<f64> = self.truth.lists().zip(found.chunks_exact(k)).map(|(a, b)| overlap(a, b)).collect();
        let n = shares.len().max(1) as f64;
        let mean = shares.iter().sum::<f64>() / n;
        let variance = shares.iter().map(|share| (share - mean).powi(2)).sum::<f64>() / n;
        Ok(Recall { mean, error: (variance / n).sqrt() })
    }
}

/// A mean recall and its standard error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Recall {
    pub(super) mean: f64,
    pub(super) error: f64,
}

/// The share of `truth` that is in `found`, whatever the order; what `found` repeats counts once.
fn overlap(truth: &[u32], found: &[u32]) -> f64 {
    let sorted = |ids: &[u32]| {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        ids.dedup();
        ids
    };
    let (truth, found) = (sorted(truth), sorted(found));
    let hits = truth.iter().filter(|id| found.binary_search(id).is_ok()).count();
    hits as f64 / truth.len().max(1) as f64
}

/// The nearest bf16 number, ties to even; for finite numbers.
pub(super) fn round_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}

/// Writes numbers as raw little-endian f32.
pub(super) fn write_f32(path: &Path, numbers: &[f32]) -> Result<()> {
    let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    fs::write(path, bytes).map_err(EvalError::io("write", path))
}

/// Reads raw little-endian i32 ids; negative ones, which stand for missing hits, become `u32::MAX`.
pub(super) fn read_ids(path: &Path) -> Result<Vec<u32>> {
    let bytes = fs::read(path).map_err(EvalError::io("read", path))?;
    let (words, _) = bytes.as_chunks::<4>();
    Ok(words.iter().map(|word| u32::try_from(i32::from_le_bytes(*word)).unwrap_or(u32::MAX)).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn recall_counts_each_best_key_once_and_knows_its_error() {
        let keys = [3.0, 2.0, 1.0, 0.0];
        let queries = [1.0, -1.0];
        let judge = Judge::new(1, &keys, &queries, 2).unwrap();
        let all = judge.recall(&[1, 0, 3, 2]).unwrap();
        assert_eq!((all.mean, all.error), (1.0, 0.0));
        let some = judge.recall(&[0, 0, 0, u32::MAX]).unwrap();
        assert_eq!(some.mean, 0.25);
        // Shares .5 and 0: deviation .25, over the root of two.
        assert!((some.error - 0.25 / 2_f64.sqrt()).abs() < 1e-12);
        assert_eq!(judge.first(1).recall(&[0, 9]).unwrap().mean, 0.5);
        assert!(judge.recall(&[1]).is_err());
    }

    #[test]
    fn numbers_round_to_the_nearest_bf16() {
        // In steps of 2^-8 above 1; bf16 has every second one.
        let cases = [(256.0, 256.0), (257.0, 256.0), (259.0, 260.0), (-257.1, -258.0), (-256.9, -256.0)];
        for (x, expected) in cases {
            assert_eq!(round_bf16(x / 256.0), expected / 256.0, "{x}");
        }
    }

    #[test]
    fn ids_come_back_and_missing_ones_are_no_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ids");
        fs::write(&path, [7_i32, -1, 0].map(i32::to_le_bytes).concat()).unwrap();
        assert_eq!(read_ids(&path).unwrap(), [7, u32::MAX, 0]);
        write_f32(&path, &[1.5]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), 1.5_f32.to_le_bytes());
        assert!(read_ids(&dir.path().join("none")).unwrap_err().to_string().contains("none"));
    }
}
