//! Chunks for a store, made without cost.

use bytes::Bytes;
use chunk_cache::{
    ChunkId, ChunkKey, ChunkStore, KvDtype, KvShape, LayerKv, ModelHandle, ModelInfo, NewChunk, PutTicket, VariantId,
};
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::Result;

/// As Qwen3 with 0.6 billion parameters has it.
pub(super) const SHAPE: KvShape = KvShape { layers: 28, kv_heads: 8, head_dim: 128, dtype: KvDtype::Bf16 };
/// For chunks of which only the rows count.
const TINY: KvShape = KvShape { kv_heads: 1, head_dim: 4, ..SHAPE };
/// Tokens of a chunk unless a case says otherwise.
pub(super) const TOKENS: u32 = 256;
const MOST_TOKENS: u32 = 512;

/// Bytes of keys and values of one layer.
pub(super) fn layer_bytes(tokens: u32) -> u64 {
    SHAPE.bytes_per_side(tokens).map_or(0, |side| 2 * side)
}

/// Bytes of keys and values of a chunk.
pub(super) fn chunk_bytes(tokens: u32) -> u64 {
    layer_bytes(tokens) * u64::from(SHAPE.layers)
}

/// A source of repeatable choices.
pub(super) struct Choices(ChaCha8Rng);

impl Choices {
    pub(super) fn below(&mut self, limit: usize) -> usize {
        self.0.random_range(0..limit)
    }
}

/// Makes chunks whose state is a part of one buffer of random bytes, each another part.
pub(super) struct Filler {
    pub(super) random: Choices,
    state: Bytes,
    model: ModelHandle,
    tiny: ModelHandle,
    /// Chunks that stay in use.
    used: Vec<ChunkKey>,
    made: u64,
}

impl Filler {
    pub(super) fn new(store: &ChunkStore, seed: u64) -> Result<Filler> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut state = vec![0; layer_bytes(MOST_TOKENS) as usize * 2];
        random.fill_bytes(&mut state);
        let info = |shape| ModelInfo { fingerprint: [7; 32], name: "bench".to_owned(), shape };
        Ok(Filler {
            random: Choices(random),
            state: state.into(),
            model: store.register(&info(SHAPE))?,
            tiny: store.register(&info(TINY))?,
            used: Vec::new(),
            made: 0,
        })
    }

    fn chunk(&mut self, shape: &KvShape, tokens: u32) -> NewChunk {
        let mut key = ChunkKey { chunk: ChunkId([0; 32]), variant: VariantId([1; 16]) };
        self.random.0.fill_bytes(&mut key.chunk.0);
        let side = shape.bytes_per_side(tokens).map_or(0, |bytes| bytes as usize);
        let mut part = || {
            let start = self.random.below(self.state.len() - side);
            self.state.slice(start..start + side)
        };
        let layers = (0..shape.layers).map(|_| LayerKv { keys: part(), values: part() }).collect();
        self.made += 1;
        NewChunk::new(key, tokens, layers)
    }

    /// Hands a chunk of so many tokens over. Also says how many bytes of state it has.
    pub(super) fn put(&mut self, store: &ChunkStore, tokens: u32) -> Result<(PutTicket, u64)> {
        let chunk = self.chunk(&SHAPE, tokens);
        if self.made.is_multiple_of(8) && self.used.len() < 16 {
            self.used.push(chunk.key);
        }
        Ok((store.put_behind(self.model, chunk)?, chunk_bytes(tokens)))
    }

    /// Hands over a chunk with rows of the usual size and hardly any state.
    pub(super) fn put_tiny(&mut self, store: &ChunkStore) -> Result<PutTicket> {
        let chunk = self.chunk(&TINY, 1);
        Ok(store.put_behind(self.tiny, chunk)?)
    }

    /// One of the chunks that stay in use is used.
    pub(super) fn touch_used(&mut self, store: &ChunkStore) -> Result<()> {
        if !self.used.is_empty() {
            let chosen = self.random.below(self.used.len());
            store.touch(&self.used[chosen])?;
        }
        Ok(())
    }
}
