//! Scoring all keys for one or several queries, and reading one.

mod kernel;

use crate::bitmap::Bitmap;
use crate::check::check_len;
use crate::element::Element;
use crate::error::IndexError;
use crate::isa::Isa;
use crate::key_index::{SearchResult, SearchStats};
use crate::order::{into_hits, rank, score_of};
use crate::panels::{WIDTH, above};
use crate::rows::Rows;
use kernel::Prepared;

/// Rows scored before any is ranked: as many as a word of the bitmap has bits.
const TILE: usize = WIDTH;

/// The exact top `k` among the first `len` rows. Runs of 64 hidden rows are not read.
pub(crate) fn scan<T: Element>(
    rows: &Rows<T>,
    len: usize,
    query: &[f32],
    k: usize,
    exclude: Option<&Bitmap>,
) -> SearchResult {
    scan_group(rows, len, query, k, exclude).pop().unwrap_or_default()
}

/// As [`scan`] for each row of `queries`, with every key read once.
pub(crate) fn scan_group<T: Element>(
    rows: &Rows<T>,
    len: usize,
    queries: &[f32],
    k: usize,
    exclude: Option<&Bitmap>,
) -> Vec<SearchResult> {
    let isa = Isa::best();
    let prepared = Prepared::<T>::new(isa, rows.dim(), queries);
    let k = k.min(len);
    let mut bests: Vec<Best> = (0..queries.len() / rows.dim()).map(|_| Best::new(k)).collect();
    if k == 0 || bests.is_empty() {
        return bests.iter().map(|_| SearchResult::default()).collect();
    }
    let stride = rows.stride();
    let mut keys_touched = 0;
    let mut scores = vec![[0.0; TILE]; bests.len()];
    for (run_start, run) in rows.runs(len) {
        for (tile, keys) in run.chunks(TILE * stride).enumerate() {
            let start = run_start + tile * TILE;
            let count = keys.len() / stride;
            let all = u64::MAX >> (TILE - count);
            let shown = !exclude.map_or(0, |set| set.bits_from(start)) & all;
            if shown == 0 {
                continue;
            }
            prepared.score(keys, count, &mut scores);
            keys_touched += count;
            for (best, scores) in bests.iter_mut().zip(&scores) {
                best.offer(isa, scores, shown, start);
            }
        }
    }
    let read = SearchStats { keys_touched, bytes: keys_touched * rows.row_bytes(), nodes_visited: 0 };
    let stats = |first: bool| if first { read } else { SearchStats::default() };
    bests
        .into_iter()
        .enumerate()
        .map(|(i, best)| SearchResult { hits: best.into_hits(), stats: stats(i == 0) })
        .collect()
}

/// The best `k` so far, and later ones that beat the threshold when they came: most tiles are dismissed
/// by one comparison of 64 scores, and sorting is put off until many have come.
struct Best {
    k: usize,
    ranks: Vec<u64>,
    threshold: f32,
}

impl Best {
    fn new(k: usize) -> Self {
        Self { k, ranks: Vec::with_capacity((2 * k + 4 * TILE).min(1 << 16)), threshold: f32::NEG_INFINITY }
    }

    /// Offers the scores whose bits are set in `shown`, of the keys from `start` on.
    #[inline]
    fn offer(&mut self, isa: Isa, scores: &[f32; TILE], shown: u64, start: usize) {
        // A later key that only equals the threshold has the higher id and loses.
        let mut bits = above(isa, scores, self.threshold) & shown;
        while bits != 0 {
            let i = bits.trailing_zeros() as usize;
            bits &= bits - 1;
            self.ranks.push(rank(scores[i], (start + i) as u32));
        }
        if self.ranks.len() >= self.k + self.k.max(2 * TILE) {
            self.shrink();
        }
    }

    #[cold]
    fn shrink(&mut self) {
        let (_, &mut last, _) = self.ranks.select_nth_unstable(self.k - 1);
        self.ranks.truncate(self.k);
        self.threshold = score_of(last);
    }

    fn into_hits(mut self) -> Vec<crate::key_index::Hit> {
        if self.ranks.len() > self.k {
            self.shrink();
        }
        into_hits(self.ranks)
    }
}

/// Widens row `id` into `out`.
pub(crate) fn read_key<T: Element>(rows: &Rows<T>, id: u32, out: &mut [f32]) -> Result<(), IndexError> {
    check_len("output", rows.dim(), out.len())?;
    let len = rows.len();
    if id as usize >= len {
        return Err(IndexError::UnknownId { id, len });
    }
    T::decode(rows.row(id as usize), out);
    Ok(())
}

#[cfg(test)]
mod tests;
