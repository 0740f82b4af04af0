//! A run of cold tokens: for every layer and KV head an index over the keys, and the values beside it.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use ann_index::{IndexParams, KeyIndex, KeyPrecision};
use half::bf16;

use crate::error::Result;
use crate::kv::dense::DenseKv;
use crate::kv::{KvDtype, KvShape};

/// Immutable once built, so that sequences which forked from one context share it.
pub(crate) struct Segment {
    positions: Range<usize>,
    /// `[layers][kv_heads]`
    layers: Vec<Vec<SegmentHead>>,
    build_seconds: f64,
}

/// The tokens of one KV head.
pub(crate) struct SegmentHead {
    pub(crate) index: Box<dyn KeyIndex>,
    values: Values,
}

enum Values {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl SegmentHead {
    /// `out += weight * value of token id`.
    pub(crate) fn add_value(&self, id: u32, weight: f32, out: &mut [f32]) {
        let range = id as usize * out.len()..(id as usize + 1) * out.len();
        match &self.values {
            Values::F32(v) => out.iter_mut().zip(&v[range]).for_each(|(o, v)| *o += weight * v),
            Values::Bf16(v) => out.iter_mut().zip(&v[range]).for_each(|(o, v)| *o += weight * v.to_f32()),
        }
    }

    fn push_rows(&self, dim: usize, keys: &mut Vec<f32>, values: &mut Vec<f32>) -> Result<()> {
        let mut key = vec![0.0; dim];
        for id in 0..self.index.len() {
            self.index.key(id as u32, &mut key)?;
            keys.extend_from_slice(&key);
        }
        match &self.values {
            Values::F32(v) => values.extend_from_slice(v),
            Values::Bf16(v) => values.extend(v.iter().map(|v| v.to_f32())),
        }
        Ok(())
    }
}

/// What a segment is built from: whole earlier segments, then tokens of the dense KV behind them.
pub(crate) struct SegmentSource {
    pub(crate) shape: KvShape,
    /// Contiguous, before `tokens`.
    pub(crate) absorbed: Vec<Arc<Segment>>,
    pub(crate) dense: SegmentRows,
    pub(crate) tokens: Range<usize>,
    pub(crate) params: IndexParams,
}

/// Where the tokens' keys (rotated) and values are read from.
pub(crate) enum SegmentRows {
    /// One run a layer, which holds the tokens.
    Dense(Vec<DenseKv>),
    /// `[layers]` of keys and values, each `[tokens, kv_heads, head_dim]`: exactly the tokens.
    Read(Vec<(Vec<f32>, Vec<f32>)>),
}

impl SegmentRows {
    /// One head's keys and values, row-major.
    fn head(&self, shape: &KvShape, layer: usize, head: usize, tokens: Range<usize>) -> (Vec<f32>, Vec<f32>) {
        match self {
            SegmentRows::Dense(runs) => runs[layer].rows(head, tokens),
            SegmentRows::Read(layers) => {
                let dim = shape.head_dim;
                let part = |rows: &[f32]| {
                    rows.chunks_exact(shape.width())
                        .flat_map(|row| &row[head * dim..(head + 1) * dim])
                        .copied()
                        .collect()
                };
                (part(&layers[layer].0), part(&layers[layer].1))
            }
        }
    }
}

impl SegmentSource {
    /// Builds the indexes, all layers and heads, on this thread (an index may use more of its own).
    pub(crate) fn build(&self) -> Result<Segment> {
        let begun = Instant::now();
        let layers = (0..self.shape.layers)
            .map(|layer| (0..self.shape.kv_heads).map(|head| self.build_head(layer, head)).collect())
            .collect::<Result<Vec<Vec<SegmentHead>>>>()?;
        let start = self.absorbed.first().map_or(self.tokens.start, |s| s.positions.start);
        Ok(Segment { positions: start..self.tokens.end, layers, build_seconds: begun.elapsed().as_secs_f64() })
    }

    fn build_head(&self, layer: usize, head: usize) -> Result<SegmentHead> {
        let dim = self.shape.head_dim;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for segment in &self.absorbed {
            segment.head(layer, head).push_rows(dim, &mut keys, &mut values)?;
        }
        let (k, v) = self.dense.head(&self.shape, layer, head, self.tokens.clone());
        keys.extend(k);
        values.extend(v);
        let precision = match self.shape.dtype {
            KvDtype::F32 => KeyPrecision::F32,
            KvDtype::Bf16 => KeyPrecision::Bf16,
        };
        let params = IndexParams { precision, ..self.params.clone() };
        let index = ann_index::build(dim, &keys, &[], &params)?;
        let values = match self.shape.dtype {
            KvDtype::F32 => Values::F32(values),
            KvDtype::Bf16 => Values::Bf16(values.iter().map(|x| bf16::from_f32(*x)).collect()),
        };
        Ok(SegmentHead { index, values })
    }
}

impl Segment {
    pub(crate) fn positions(&self) -> Range<usize> {
        self.positions.clone()
    }

    pub(crate) fn head(&self, layer: usize, head: usize) -> &SegmentHead {
        &self.layers[layer][head]
    }

    pub(crate) fn build_seconds(&self) -> f64 {
        self.build_seconds
    }

    /// Bytes of indexes and values.
    pub(crate) fn bytes(&self) -> usize {
        let head = |h: &SegmentHead| {
            h.index.memory_bytes()
                + match &h.values {
                    Values::F32(v) => v.len() * 4,
                    Values::Bf16(v) => v.len() * 2,
                }
        };
        self.layers.iter().flatten().map(head).sum()
    }
}
