//! The rule `cacheblend` (CacheBlend, arXiv 2405.16444, section 4.3): all tokens are computed up to a check layer; those whose
//! values there are farthest from the cached ones go on, the same set on all later layers, as the published code has it.

use std::ops::Range;

use super::plan::{BlendPlan, Span, Treatment};
use super::select::{Budget, highest};
use super::stream::Stream;
use crate::chunk::ChunkLayer;
use crate::error::Result;
use crate::kv::KvShape;
use crate::kv::sequence::SequenceKv;
use crate::model::transformer::Transformer;

/// What the check layer says.
pub(super) struct Checked {
    /// Rows of the stream, ascending, that go on.
    pub(super) kept: Vec<usize>,
    /// Positions, ascending, of the cached tokens among them.
    pub(super) chosen: Vec<usize>,
    /// Mean over cached tokens of |fresh - cached|^2 / |fresh|^2 of keys and values.
    pub(super) deviation: f32,
}

/// The comparison of the rows of a stream with what is cached of them, block by block.
#[derive(Default)]
pub(super) struct Check {
    /// Rows of the stream whose state is composed, and how far the values of each are off.
    candidates: Vec<usize>,
    deviation: Vec<f32>,
    relative: f32,
}

impl Check {
    /// Compares the rows of `block` in `layer`.
    pub(super) fn compare(
        &mut self,
        model: &Transformer,
        stream: &Stream,
        (layer, block): (usize, Range<usize>),
        cached: &Cached<'_>,
        kv: &SequenceKv,
    ) -> Result<()> {
        let width = model.shape.width();
        let (fresh_keys, fresh_values) = stream.keys_and_values(model, layer, block.clone(), kv)?;
        for i in 0..block.len() {
            let Some((keys, values)) = cached.row(stream.position(block.start + i)) else { continue };
            let row = i * width..(i + 1) * width;
            let (k, size_k) = distance(&fresh_keys[row.clone()], &keys);
            let (v, size_v) = distance(&fresh_values[row], &values);
            self.candidates.push(block.start + i);
            self.deviation.push(v);
            self.relative += (k + v) / (size_k + size_v).max(f32::MIN_POSITIVE);
        }
        Ok(())
    }

    /// What all rows of the stream together say.
    pub(super) fn finish(self, stream: &Stream, ratio: f32) -> Checked {
        let mut keep = vec![true; stream.len()];
        self.candidates.iter().for_each(|row| keep[*row] = false);
        let mut chosen = Vec::new();
        for best in highest(&self.deviation, Budget::Tokens(ratio)) {
            keep[self.candidates[best]] = true;
            chosen.push(stream.position(self.candidates[best]));
        }
        let kept = (0..keep.len()).filter(|row| keep[*row]).collect();
        Checked { kept, chosen, deviation: self.relative / self.candidates.len().max(1) as f32 }
    }
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
