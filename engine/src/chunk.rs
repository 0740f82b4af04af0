//! The engine's view of cached chunks.

use std::sync::Arc;

use bytes::Bytes;
use rayon::prelude::*;

use crate::backend::cpu::Isa;
use crate::error::{EngineError, Result};
use crate::kv::KvShape;
use crate::kv::codec::{CodecError, KvCodec};
use crate::model::transformer::Transformer;
use crate::tiers::ChunkName;
use crate::unwind::guarded;

/// Keys (not rotated) and values of a chunk in one layer: row-major `[tokens, kv_heads, head_dim]`, as their codec has them: with
/// [`KvCodec::Raw`] little-endian, in the engine's KV format. The bytes may lie in memory that whoever read them owns; cloning shares them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkLayer {
    /// How they are coded.
    pub codec: KvCodec,
    /// Keys before rotary embedding.
    pub keys: Bytes,
    /// Values.
    pub values: Bytes,
}

impl ChunkLayer {
    /// Keys and values as they were computed.
    #[must_use]
    pub fn raw(keys: Bytes, values: Bytes) -> ChunkLayer {
        ChunkLayer { codec: KvCodec::Raw, keys, values }
    }
}

/// Where the KV of a chunk comes from: memory, disk, another machine. Called from several threads, layer
/// by layer in ascending order. Any error makes the engine compute the chunk instead.
pub trait ChunkSource: Send + Sync {
    /// Tokens of the chunk.
    fn tokens(&self) -> usize;

    /// # Errors
    /// Whatever keeps the layer from being read whole and intact.
    fn layer(&self, layer: usize) -> Result<ChunkLayer>;

    /// What its state is known by, so that the engine keeps it near for later requests; `None`: it is read anew each time.
    fn name(&self) -> Option<ChunkName> {
        None
    }
}

/// KV of a chunk in memory, as prefill in isolation left it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkKv {
    /// Tokens of the chunk.
    pub tokens: usize,
    /// One per layer.
    pub layers: Vec<ChunkLayer>,
}

/// Keys (not rotated) and values of every layer, as a forward pass gives them: `[tokens, kv_heads, head_dim]` each.
pub(crate) type Tapped = Vec<(Vec<f32>, Vec<f32>)>;

/// KV of a chunk that has been computed and is not encoded yet.
pub(crate) struct ComputedChunk {
    /// Tokens before the chunk's, in whose sight it was computed.
    pub(crate) skip: usize,
    /// Tokens of the chunk.
    pub(crate) tokens: usize,
    pub(crate) tapped: Tapped,
}

impl ComputedChunk {
    /// In the engine's KV format. Not for the engine's thread: while it works, others would wait for their tokens.
    ///
    /// # Errors
    /// [`EngineError::NotFinite`]: such numbers must not be stored.
    pub(crate) fn encoded(self, model: &Transformer) -> Result<ChunkKv> {
        let ComputedChunk { skip, tokens, tapped } = self;
        let (shape, skip) = (model.shape, skip * model.shape.width());
        let encode = |(layer, (keys, values)): (usize, &(Vec<f32>, Vec<f32>))| {
            if !keys.iter().chain(values).all(|x| x.is_finite()) {
                return Err(EngineError::NotFinite { layer });
            }
            let encoded = |side: &[f32]| {
                let mut bytes = Vec::new();
                shape.dtype.encode(&side[skip..], &mut bytes);
                Bytes::from(bytes)
            };
            Ok(ChunkLayer::raw(encoded(keys), encoded(values)))
        };
        let layers = model.cpu.cores.read(|| tapped.par_iter().enumerate().map(encode).collect::<Result<Vec<_>>>())?;
        Ok(ChunkKv { tokens, layers })
    }
}

#[cfg(test)]
impl ChunkKv {
    /// KV of `tokens` behind `prefix`, computed in isolation, `step` tokens at a time.
    pub(crate) fn compute(model: &Transformer, prefix: &[u32], tokens: &[u32], step: usize) -> Result<ChunkKv> {
        use crate::model::transformer::{Piece, Want};
        let mut kv = model.new_kv();
        let mut tapped = Vec::new();
        for part in [prefix, tokens].concat().chunks(step.min(model.most_rows())) {
            model.forward(&mut [Piece { tap: Some(&mut tapped), ..Piece::exact(&mut kv, part, Want::Nothing) }])?;
        }
        ComputedChunk { skip: prefix.len(), tokens: tokens.len(), tapped }.encoded(model)
    }
}

impl ChunkKv {
    /// The chunk as `codec` stores it. Layers that are coded already stay as they are.
    ///
    /// # Errors
    /// [`CodecError`]: layers that do not have the size that `shape` gives them, or numbers that have no code.
    pub fn coded(&self, codec: KvCodec, shape: &KvShape) -> std::result::Result<ChunkKv, CodecError> {
        let coded = |layer: &ChunkLayer| match layer.codec {
            KvCodec::Raw => {
                let (keys, values) = codec.encode(shape, self.tokens, &layer.keys, &layer.values)?;
                Ok(ChunkLayer { codec, keys, values })
            }
            _ => Ok(layer.clone()),
        };
        Ok(ChunkKv {
            tokens: self.tokens,
            layers: self.layers.iter().map(coded).collect::<std::result::Result<_, _>>()?,
        })
    }
}

impl ChunkSource for ChunkKv {
    fn tokens(&self) -> usize {
        self.tokens
    }

    fn layer(&self, layer: usize) -> Result<ChunkLayer> {
        let missing =
            || EngineError::InvalidRequest(format!("chunk of {} layers has no layer {layer}", self.layers.len()));
        self.layers.get(layer).cloned().ok_or_else(missing)
    }
}

/// A chunk in a prompt.
#[derive(Clone)]
pub struct PromptChunk {
    /// Its tokens.
    pub tokens: Arc<[u32]>,
    /// The tokens that its cached state was computed behind, such as the bos.
    pub prefix: Arc<[u32]>,
    /// Its cached state; `None`: it is computed within the prompt.
    pub source: Option<Arc<dyn ChunkSource>>,
}

/// Reads one layer of a chunk, checks that it has the expected size, and decodes it. A source that panics has failed.
pub(crate) fn read_layer(
    source: &dyn ChunkSource,
    isa: Isa,
    shape: &KvShape,
    tokens: usize,
    layer: usize,
) -> Result<ChunkLayer> {
    let found = guarded("reading a cached chunk", || source.layer(layer))?;
    let (keys, values) = found.codec.decode(isa, shape, tokens, &found.keys, &found.values)?;
    Ok(ChunkLayer::raw(keys, values))
}
