//! Chunks whose content follows from their number, and what reading one of them gives.

use chunk_cache::{
    ChunkId, ChunkKey, ChunkStore, KvDtype, KvShape, LayerKv, ModelHandle, ModelInfo, NewChunk, StoreError, VariantId,
};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::Result;

const SHAPE: KvShape = KvShape { layers: 4, kv_heads: 2, head_dim: 32, dtype: KvDtype::Bf16 };

pub(super) fn register(store: &ChunkStore) -> Result<ModelHandle> {
    Ok(store.register(&ModelInfo { fingerprint: [3; 32], name: "drill".to_owned(), shape: SHAPE })?)
}

pub(super) fn key(number: u32) -> ChunkKey {
    let mut random = ChaCha8Rng::seed_from_u64(u64::from(number) << 8);
    let mut key = ChunkKey { chunk: ChunkId([0; 32]), variant: VariantId([0; 16]) };
    random.fill_bytes(&mut key.chunk.0);
    random.fill_bytes(&mut key.variant.0);
    key
}

/// A chunk of so many tokens.
pub(super) fn chunk(number: u32, tokens: u32) -> NewChunk {
    let side = SHAPE.bytes_per_side(tokens).map_or(0, |bytes| bytes as usize);
    let part = |layer: u32, which: u64| {
        let mut bytes = vec![0; side];
        let seed = u64::from(number) << 8 | u64::from(layer) << 1 | which;
        ChaCha8Rng::seed_from_u64(seed ^ 1 << 63).fill_bytes(&mut bytes);
        bytes.into()
    };
    let layers = (0..SHAPE.layers).map(|layer| LayerKv { keys: part(layer, 0), values: part(layer, 1) });
    NewChunk::new(key(number), tokens, layers.collect())
}

/// What reading a chunk gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    Whole,
    Absent,
    /// Other bytes than were stored, or a part.
    Wrong,
}

pub(super) fn look(store: &ChunkStore, number: u32, tokens: u32) -> std::result::Result<Seen, StoreError> {
    for (layer, wanted) in (0..).zip(chunk(number, tokens).layers) {
        match store.layer(&key(number), layer) {
            Ok(Some(found)) if found == wanted => {}
            Ok(Some(_)) => return Ok(Seen::Wrong),
            // A chunk found damaged at a later layer is absent from then on.
            Ok(None) | Err(StoreError::Corrupt { .. }) => return Ok(Seen::Absent),
            Err(error) => return Err(error),
        }
    }
    Ok(Seen::Whole)
}
