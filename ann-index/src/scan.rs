//! Scoring all keys, and reading one.

use crate::bitmap::Bitmap;
use crate::check::check_len;
use crate::element::Element;
use crate::error::IndexError;
use crate::key_index::{SearchResult, SearchStats};
use crate::metric::dot_rows;
use crate::rows::Rows;
use crate::top_k::TopK;

/// Rows scored before any is ranked: as many as a word of the bitmap has bits.
const TILE: usize = 64;

/// The exact top `k` among the first `len` rows. Runs of 64 hidden rows are not read.
pub(crate) fn scan<T: Element>(
    rows: &Rows<T>,
    len: usize,
    query: &[f32],
    k: usize,
    exclude: Option<&Bitmap>,
) -> SearchResult {
    let mut top = TopK::new(k.min(len));
    let stride = T::stride(rows.dim());
    let mut keys_touched = 0;
    let mut scores = [0.0; TILE];
    for (run_start, run) in rows.runs(len) {
        for (tile, keys) in run.chunks(TILE * stride).enumerate() {
            let start = run_start + tile * TILE;
            let scores = &mut scores[..keys.len() / stride];
            let all = u64::MAX >> (TILE - scores.len());
            let hidden = exclude.map_or(0, |set| set.bits_from(start)) & all;
            if hidden == all {
                continue;
            }
            dot_rows(query, keys, scores);
            keys_touched += scores.len();
            let mut threshold = top.threshold();
            for (i, &score) in scores.iter().enumerate() {
                // A later key that only equals the threshold has the higher id and loses.
                let matters = score > threshold || threshold == f32::NEG_INFINITY;
                if matters && hidden >> i & 1 == 0 {
                    top.offer((start + i) as u32, score);
                    threshold = top.threshold();
                }
            }
        }
    }
    SearchResult {
        hits: top.into_hits(),
        stats: SearchStats { keys_touched, bytes: keys_touched * rows.row_bytes(), nodes_visited: 0 },
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
