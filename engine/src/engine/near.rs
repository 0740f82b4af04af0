//! What an engine keeps near of chunks that requests use.

use std::sync::Arc;

use super::{Engine, UNKNOWN_MEMORY};
use crate::chunk::ChunkSource;
use crate::config::EngineConfig;
use crate::error::Result;
use crate::memory;
use crate::model::transformer::Transformer;
use crate::runner::{Command, ask_for};
use crate::tiers::{ChunkName, ChunkReader, Tier, TierLoad};

impl Engine {
    /// Reads chunks and keeps them in a tier until they are [let go](Engine::forget_all_chunks): what is asked for again and again
    /// is then there for its first request too. Returns how many; the others have no name, or the tier has no room left. Blocks.
    ///
    /// # Errors
    /// What keeps a source from being read, or a stopped engine.
    pub fn keep_chunks(&self, sources: &[Arc<dyn ChunkSource>], tier: Tier) -> Result<usize> {
        let tiers = &self.inner.tiers;
        let kept = sources.iter().map(|source| tiers.keep(source)).collect::<Result<Vec<_>>>()?;
        let kept: Vec<ChunkReader> = kept.into_iter().flatten().collect();
        match tier {
            Tier::Host => Ok(kept.len()),
            Tier::Device => ask_for(&self.inner.commands, |reply| Command::Keep(kept, reply)),
        }
    }

    /// Lets all chunks in the host's memory and the GPU's go. They are read from their sources when they are used again.
    pub fn forget_all_chunks(&self) {
        self.inner.tiers.clear();
    }

    /// The same for these chunks.
    pub fn forget_chunks(&self, names: &[ChunkName]) {
        self.inner.tiers.forget(names);
    }

    /// What is kept of chunks in the host's memory, and in the GPU's.
    #[must_use]
    pub fn chunk_tiers(&self) -> [TierLoad; 2] {
        self.inner.tiers.load()
    }
}

/// Bytes of the host's memory for chunks that requests have used.
pub(super) fn host_cache_bytes(model: &Transformer, config: &EngineConfig) -> u64 {
    let limit = || memory::limit().unwrap_or(UNKNOWN_MEMORY);
    config.host_cache_bytes.unwrap_or_else(|| match model.device() {
        Some(_) => limit() / 4,
        None => memory::for_chunks(limit(), model.host_bytes() as u64),
    })
}
