//! The rule `cacheblend` (CacheBlend, arXiv 2405.16444, section 4.3): all tokens are computed up to a check layer; those whose
//! values there are farthest from the cached ones go on, the same set on all later layers, as the published code has it.

use super::plan::{BlendPlan, Span, Treatment};
use super::select::{Budget, highest};
use super::stream::Stream;
use crate::chunk::ChunkLayer;
use crate::error::Result;
use crate::kv::KvShape;
use crate::kv::sequence::SequenceKv;

/// What the check layer says.
pub(super) struct Checked {
    /// Rows of the stream, ascending, that go on.
    pub(super) kept: Vec<usize>,
    /// Positions, ascending, of the cached tokens among them.
    pub(super) chosen: Vec<usize>,
    /// Mean over cached tokens of |fresh - cached|^2 / |fresh|^2 of keys and values.
    pub(super) deviation: f32,
}

/// Compares the rows of `stream` with what is cached of them in `layer`, block by block.
pub(super) fn check(
    stream: &Stream<'_>,
    layer: usize,
    blocks: impl Iterator<Item = std::ops::Range<usize>>,
    cached: &Cached<'_>,
    kv: &SequenceKv,
    ratio: f32,
) -> Result<Checked> {
    let width = cached.shape.width();
    let (mut candidates, mut deviation, mut relative) = (Vec::new(), Vec::new(), 0.0);
    for block in blocks {
        let (fresh_keys, fresh_values) = stream.keys_and_values(layer, block.clone(), kv)?;
        for i in 0..block.len() {
            let Some((keys, values)) = cached.row(stream.position(block.start + i)) else { continue };
            let row = i * width..(i + 1) * width;
            let (k, size_k) = distance(&fresh_keys[row.clone()], &keys);
            let (v, size_v) = distance(&fresh_values[row], &values);
            candidates.push(block.start + i);
            deviation.push(v);
            relative += (k + v) / (size_k + size_v).max(f32::MIN_POSITIVE);
        }
    }
    let mut keep = vec![true; stream.len()];
    candidates.iter().for_each(|row| keep[*row] = false);
    let mut chosen = Vec::new();
    for best in highest(&deviation, Budget::Tokens(ratio)) {
        keep[candidates[best]] = true;
        chosen.push(stream.position(candidates[best]));
    }
    let kept = (0..keep.len()).filter(|row| keep[*row]).collect();
    Ok(Checked { kept, chosen, deviation: relative / candidates.len().max(1) as f32 })
}

/// One layer's cached rows.
pub(super) struct Cached<'a> {
    pub(super) spans: &'a [Span],
    /// One for each span.
    pub(super) rows: &'a [ChunkLayer],
    pub(super) shape: KvShape,
}

impl Cached<'_> {
    /// The cached keys and values of a position whose span is composed.
    fn row(&self, position: usize) -> Option<(Vec<f32>, Vec<f32>)> {
        let after = self.spans.partition_point(|s| s.positions.end <= position);
        let span = self.spans.get(after)?;
        if !span.positions.contains(&position) || span.treatment != Treatment::Cached {
            return None;
        }
        let (dtype, width) = (self.shape.dtype, self.shape.width());
        let at = (position - span.positions.start) * width * dtype.size();
        let row = at..at + width * dtype.size();
        Some((dtype.decode(&self.rows[after].keys[row.clone()]), dtype.decode(&self.rows[after].values[row])))
    }
}

/// All layers of all composed tokens that are computed to choose: those up to the check layer, which is computed for its keys
/// and values.
pub(super) fn token_layers(plan: &BlendPlan, check: usize, layers: usize, chosen: usize) -> usize {
    let composed: usize = plan.composed().map(|span| span.positions.len()).sum();
    let checked = (check + 1).min(layers);
    composed * checked + chosen * (layers - checked)
}

/// Squared distance, and the squared size of `fresh`.
fn distance(fresh: &[f32], cached: &[f32]) -> (f32, f32) {
    let squares = fresh.iter().zip(cached).map(|(f, c)| ((f - c) * (f - c), f * f));
    squares.fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1))
}
