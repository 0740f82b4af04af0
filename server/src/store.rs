//! The engine's chunks in the chunk store.
//!
//! The engine describes KV in memory, the store on disk; neither knows the other. Their shapes meet here, in one
//! conversion. A chunk's key holds all that its numbers depend on: beside model, texts and formats how exactly they were
//! computed, in the engine's words ([`Engine::numerics`]): `--fast-prefill` makes other chunks than without, and a build that
//! computes other numbers finds none of an earlier one, while machines that differ by rounding alone share a store. A damaged chunk is counted and logged, never served: the engine computes it within the prompt, and the
//! next request that needs it stores it anew.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use chunk_cache::{ChunkKey, ChunkStore, KeyInputs, LayerKv, PinGuard, PutOutcome, StoreError, StoreOptions};
use engine::{ChunkKv, ChunkLayer, ChunkSource, Engine, EngineError};

use crate::error::{QuireError, Result};

/// The folder of the chunk store.
#[must_use]
pub fn store_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("chunks")
}

/// The store's description of the engine's KV.
///
/// # Errors
/// [`QuireError::Internal`] for a shape beyond 32 bits.
pub fn store_shape(shape: engine::KvShape) -> Result<chunk_cache::KvShape> {
    let narrow = |n: usize| {
        u32::try_from(n).map_err(|_| QuireError::Internal(format!("a KV dimension of {n} is beyond 32 bits")))
    };
    Ok(chunk_cache::KvShape {
        layers: narrow(shape.layers)?,
        kv_heads: narrow(shape.kv_heads)?,
        head_dim: narrow(shape.head_dim)?,
        dtype: match shape.dtype {
            engine::KvDtype::F32 => chunk_cache::KvDtype::F32,
            engine::KvDtype::Bf16 => chunk_cache::KvDtype::Bf16,
        },
    })
}

/// What became of a chunk that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It was in the store.
    Cached,
    /// It was computed and stored.
    Computed,
}

/// The chunk store of one engine.
pub struct KvStore {
    store: Arc<ChunkStore>,
    engine: Engine,
    shape: chunk_cache::KvShape,
    rope: String,
    /// How the engine computes, as far as it changes what is stored.
    numerics: String,
    salt: Vec<u8>,
    corrupt: Arc<AtomicU64>,
}

impl KvStore {
    /// Opens the store below `data_dir` for an engine, making it where there is none. `salt` keeps tenants apart.
    ///
    /// # Errors
    /// [`StoreError::ForeignStore`] for a store of another model, and whatever else keeps it from being opened.
    pub fn open(engine: &Engine, data_dir: &Path, name: &str, byte_budget: u64, salt: &str) -> Result<KvStore> {
        let shape = store_shape(engine.kv_shape())?;
        let options =
            StoreOptions { byte_budget, model_identity: engine.model_fingerprint(), model_name: name.into(), shape };
        let store = ChunkStore::open(&store_dir(data_dir), options)?;
        let report = store.open_report();
        if let Some(problem) = &report.salvaged {
            tracing::warn!(%problem, "the chunk store was damaged and has been salvaged");
        }
        for chunk in &report.damaged {
            tracing::warn!(key = %chunk.key, "a chunk is damaged; it will be computed again when it is needed");
        }
        Ok(KvStore {
            store: Arc::new(store),
            engine: engine.clone(),
            shape,
            rope: engine.spec().rope.fingerprint(),
            numerics: engine.numerics(),
            salt: salt.as_bytes().to_vec(),
            corrupt: Arc::default(),
        })
    }

    /// The store itself.
    #[must_use]
    pub fn chunks(&self) -> &ChunkStore {
        &self.store
    }

    /// Layers that were found damaged since the store was opened.
    #[must_use]
    pub fn corrupt_reads(&self) -> u64 {
        self.corrupt.load(Ordering::Relaxed)
    }

    /// The name of a chunk: everything its state depends on.
    #[must_use]
    pub fn key(&self, prefix: &[u32], tokens: &[u32]) -> ChunkKey {
        ChunkKey::derive(&KeyInputs {
            model: &self.engine.model_fingerprint(),
            tokenizer: &self.engine.tokenizer_fingerprint(),
            rope: &self.rope,
            numerics: &self.numerics,
            kv: self.shape,
            tenant_salt: &self.salt,
            prefix,
            tokens,
        })
    }

    /// Makes sure that a chunk is stored; computes it where it is not. When this returns, it is on disk.
    ///
    /// # Errors
    /// What the engine or the store refuses.
    pub fn ensure(&self, prefix: &[u32], tokens: &[u32]) -> Result<(ChunkKey, Origin)> {
        let key = self.key(prefix, tokens);
        if self.store.contains(&key)? {
            self.note_use(&key);
            return Ok((key, Origin::Cached));
        }
        self.put(&key, self.engine.chunk_kv(prefix, tokens)?)?;
        Ok((key, Origin::Computed))
    }

    /// A use that cannot be noted makes eviction less well informed, and nothing else.
    fn note_use(&self, key: &ChunkKey) {
        if let Err(error) = self.store.touch(key) {
            tracing::warn!(%error, %key, "a use of a chunk could not be noted");
        }
    }

    fn put(&self, key: &ChunkKey, kv: ChunkKv) -> Result<PutOutcome> {
        let tokens = u32::try_from(kv.tokens)
            .map_err(|_| QuireError::Internal(format!("a chunk of {} tokens is beyond 32 bits", kv.tokens)))?;
        let layers: Vec<LayerKv> = kv.layers.into_iter().map(|l| LayerKv { keys: l.keys, values: l.values }).collect();
        Ok(self.store.put(key, tokens, &layers)?)
    }

    /// A chunk for a prompt: from the store, or computed and stored. Where the store cannot take it (no room,
    /// damage), the chunk is kept in memory for this one use.
    ///
    /// # Errors
    /// What the engine refuses.
    pub fn source(&self, prefix: &[u32], tokens: &[u32]) -> Result<(Arc<dyn ChunkSource>, Origin)> {
        let key = self.key(prefix, tokens);
        // Pinned before it is looked up, so that no other request's chunk pushes it out in between.
        let pin = self.store.pin(&[key]);
        let mut origin = Origin::Cached;
        if self.store.contains(&key)? {
            self.note_use(&key);
        } else {
            origin = Origin::Computed;
            let kv = self.engine.chunk_kv(prefix, tokens)?;
            if let Err(error) = self.put(&key, kv.clone()) {
                tracing::warn!(%error, "a chunk could not be stored; it is used from memory");
                return Ok((Arc::new(kv), origin));
            }
        }
        let stored = StoredChunk {
            store: Arc::clone(&self.store),
            key,
            tokens: tokens.len(),
            corrupt: Arc::clone(&self.corrupt),
            _pin: pin,
        };
        Ok((Arc::new(stored), origin))
    }
}

/// A chunk that is read from the store when the engine asks for it.
struct StoredChunk {
    store: Arc<ChunkStore>,
    key: ChunkKey,
    tokens: usize,
    corrupt: Arc<AtomicU64>,
    _pin: PinGuard,
}

impl ChunkSource for StoredChunk {
    fn tokens(&self) -> usize {
        self.tokens
    }

    fn layer(&self, layer: usize) -> engine::Result<ChunkLayer> {
        let index = u32::try_from(layer).unwrap_or(u32::MAX);
        match self.store.layer(&self.key, index) {
            Ok(Some(kv)) => Ok(ChunkLayer { keys: kv.keys, values: kv.values }),
            Ok(None) => Err(EngineError::ChunkSource(format!("chunk {} is no longer stored", self.key).into())),
            Err(error) => {
                tracing::warn!(%error, "a cached chunk could not be read; it is computed instead");
                if matches!(error, StoreError::Corrupt { .. }) {
                    self.corrupt.fetch_add(1, Ordering::Relaxed);
                    // Gone for later processes as well: the next use finds it missing and stores it anew.
                    if let Err(error) = self.store.remove(&self.key) {
                        tracing::warn!(%error, key = %self.key, "a damaged chunk could not be removed");
                    }
                }
                Err(EngineError::ChunkSource(Box::new(error)))
            }
        }
    }
}
