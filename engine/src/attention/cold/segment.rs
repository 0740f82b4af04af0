//! A run of cold tokens: for every layer and KV head an index over the keys, and the values beside it.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use ann_index::{IndexError, IndexParams, KeyIndex, KeyPrecision};
use half::bf16;
use rayon::prelude::*;

use crate::error::{EngineError, Result};
use crate::kv::dense::DenseKv;
use crate::kv::{KvDtype, KvShape};

/// Immutable once built.
pub(crate) struct Segment {
    positions: Range<usize>,
    /// `[layers][kv_heads]`
    layers: Vec<Vec<SegmentHead>>,
    build_seconds: f64,
    bytes: usize,
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

    fn bytes(&self) -> usize {
        self.index.memory_bytes()
            + match &self.values {
                Values::F32(v) => v.len() * 4,
                Values::Bf16(v) => v.len() * 2,
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
    pub(crate) make: MakeIndex,
}

/// Builds an index over keys `[n, dim]` while it is wanted: [`make_index`], or in tests one that fails.
pub(crate) type MakeIndex =
    fn(usize, &[f32], &IndexParams, &(dyn Fn() -> bool + Sync)) -> std::result::Result<Box<dyn KeyIndex>, IndexError>;

/// Of `ann-index`, without queries to shape it after: which there are is not known before the answer.
pub(crate) fn make_index(
    dim: usize,
    keys: &[f32],
    params: &IndexParams,
    wanted: &(dyn Fn() -> bool + Sync),
) -> std::result::Result<Box<dyn KeyIndex>, IndexError> {
    ann_index::build_while(dim, keys, &[], params, wanted)
}

/// Where the tokens' keys (rotated) and values are read from.
pub(crate) enum SegmentRows {
    /// One run a layer, which holds the tokens.
    Dense(Vec<DenseKv>),
    /// `[layers]` of keys and values, each `[tokens, kv_heads, head_dim]` in the KV format: exactly the tokens.
    Read(Vec<(Vec<u8>, Vec<u8>)>),
}

impl SegmentRows {
    /// One head's keys and values, row-major.
    fn head(&self, shape: &KvShape, layer: usize, head: usize, tokens: Range<usize>) -> (Vec<f32>, Vec<f32>) {
        match self {
            SegmentRows::Dense(runs) => runs[layer].rows(head, tokens),
            SegmentRows::Read(layers) => {
                let (size, dim) = (shape.dtype.size(), shape.head_dim * shape.dtype.size());
                let part = |rows: &[u8]| {
                    let rows = rows.chunks_exact(shape.width() * size);
                    rows.flat_map(|row| shape.dtype.decode(&row[head * dim..(head + 1) * dim])).collect()
                };
                (part(&layers[layer].0), part(&layers[layer].1))
            }
        }
    }
}

impl SegmentSource {
    /// Builds the indexes, all layers and heads, on the threads of the caller's rayon pool: each index on one of them.
    ///
    /// # Errors
    /// [`EngineError::Cancelled`] once `wanted` says no, which is asked before each index and, where that may take minutes,
    /// within it.
    pub(crate) fn build(&self, wanted: &(dyn Fn() -> bool + Sync)) -> Result<Segment> {
        let begun = Instant::now();
        let heads = self.shape.kv_heads;
        let build = |i: usize| match wanted() {
            true => self.build_head(i / heads, i % heads, wanted),
            false => Err(EngineError::Cancelled),
        };
        let all = (0..self.shape.layers * heads).into_par_iter().map(build).collect::<Result<Vec<SegmentHead>>>()?;
        let mut all = all.into_iter();
        let layers: Vec<Vec<SegmentHead>> =
            (0..self.shape.layers).map(|_| all.by_ref().take(heads).collect()).collect();
        let bytes = layers.iter().flatten().map(SegmentHead::bytes).sum();
        let start = self.absorbed.first().map_or(self.tokens.start, |s| s.positions.start);
        Ok(Segment { positions: start..self.tokens.end, layers, build_seconds: begun.elapsed().as_secs_f64(), bytes })
    }

    fn build_head(&self, layer: usize, head: usize, wanted: &(dyn Fn() -> bool + Sync)) -> Result<SegmentHead> {
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
        let index = (self.make)(dim, &keys, &params, wanted)?;
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
        self.bytes
    }
}
