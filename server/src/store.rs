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

use chunk_cache::{
    Access, ChunkKey, ChunkStore, KeyInputs, LayerKv, PinGuard, PutOutcome, StoreError, StoreOptions, StoreStats,
};
use engine::{ChunkKv, ChunkLayer, ChunkSource, Engine, EngineError};

use crate::error::{QuireError, Result};
use crate::single_flight::{SingleFlight, Turn, Waited};

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

/// The chunk store of one engine. Where the folder cannot be written, chunks are only read; where there is none to be
/// read either, every chunk is computed for its use.
pub struct KvStore {
    store: Option<Arc<ChunkStore>>,
    engine: Engine,
    shape: chunk_cache::KvShape,
    rope: String,
    /// How the engine computes, as far as it changes what is stored.
    numerics: String,
    salt: Vec<u8>,
    corrupt: Arc<AtomicU64>,
    /// Missing chunks that are being computed.
    missing: SingleFlight<ChunkKey, Placed>,
}

/// Where a chunk is that was just computed.
#[derive(Clone)]
enum Placed {
    Stored,
    /// The store could not take it: it is shared from memory by all that waited for it.
    InMemory(Arc<ChunkKv>),
}

impl KvStore {
    /// Opens the store below `data_dir` for an engine, making it with the budget `new_budget` where there is none.
    /// `salt` keeps tenants apart.
    ///
    /// # Errors
    /// [`StoreError::ForeignStore`] for a store of another model, and whatever else keeps it from being opened.
    pub fn open(engine: &Engine, data_dir: &Path, name: &str, new_budget: u64, salt: &str) -> Result<KvStore> {
        let store = open_chunks(engine, data_dir, name, new_budget)?;
        KvStore::with_store(engine, Some(store), salt)
    }

    /// As [`open`](Self::open); where the disk is full, the folder cannot be written or the store is damaged as a whole, it
    /// is only read, or done without. That is logged.
    ///
    /// # Errors
    /// As for [`open`](Self::open), but for these.
    pub fn open_if_possible(
        engine: &Engine,
        data_dir: &Path,
        name: &str,
        new_budget: u64,
        salt: &str,
    ) -> Result<KvStore> {
        let problem = match open_chunks(engine, data_dir, name, new_budget) {
            Err(QuireError::Store(
                problem @ (StoreError::ReadOnly { .. } | StoreError::OutOfSpace { .. } | StoreError::Damaged { .. }),
            )) => problem,
            opened => return KvStore::with_store(engine, Some(opened?), salt),
        };
        // Who may not write cannot rescue it either: then it is done without.
        let store = ChunkStore::open_existing(&store_dir(data_dir), Access::Read, new_budget).ok().flatten();
        if let Some(store) = &store {
            store.check_belongs(engine.model_fingerprint(), name, store_shape(engine.kv_shape())?)?;
        }
        let how = if store.is_some() { "cached chunks are used, new ones are not kept" } else { "no cache is used" };
        tracing::warn!(%problem, "{how}; answers stay the same and take longer");
        KvStore::with_store(engine, store, salt)
    }

    fn with_store(engine: &Engine, store: Option<ChunkStore>, salt: &str) -> Result<KvStore> {
        Ok(KvStore {
            store: store.map(Arc::new),
            engine: engine.clone(),
            shape: store_shape(engine.kv_shape())?,
            rope: engine.spec().rope.fingerprint(),
            numerics: engine.numerics(),
            salt: salt.as_bytes().to_vec(),
            corrupt: Arc::default(),
            missing: SingleFlight::default(),
        })
    }

    /// Changes the store's budget for good; chunks make way at once.
    ///
    /// # Errors
    /// Those of a failed write.
    pub fn set_budget(&self, bytes: u64) -> Result<()> {
        match &self.store {
            Some(store) => Ok(store.set_budget(bytes)?),
            None => Ok(()),
        }
    }

    /// Totals over the store; `None` where there is none.
    ///
    /// # Errors
    /// What the store refuses.
    pub fn stats(&self) -> Result<Option<StoreStats>> {
        Ok(self.store.as_ref().map(|store| store.stats()).transpose()?)
    }

    /// Chunks that made way since the store was opened.
    ///
    /// # Errors
    /// What the store refuses.
    pub fn evicted(&self) -> Result<u64> {
        Ok(self.stats()?.map_or(0, |stats| stats.evicted))
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
        let Some(store) = &self.store else {
            return Err(QuireError::Internal("chunks are to be kept without a store".into()));
        };
        loop {
            if store.contains(&key)? {
                note_use(store, &key);
                return Ok((key, Origin::Cached));
            }
            match self.missing.join(&key) {
                // Whoever had the turn before may have stored it since it was looked up.
                Turn::Lead(_) if store.contains(&key)? => {}
                Turn::Lead(lead) => {
                    put(store, &key, self.engine.chunk_kv(prefix, tokens)?)?;
                    lead.end(Placed::Stored);
                    return Ok((key, Origin::Computed));
                }
                // Whatever became of it: this asks for more than that it was computed.
                Turn::Follow(other) => {
                    other.wait(&|| true);
                }
            }
        }
    }

    /// A chunk for a prompt: from the store, or computed and stored. Where the store cannot take it (no room,
    /// damage, no store), the chunk is kept in memory for this one use. Requests that miss a chunk at the same time have it
    /// computed once.
    ///
    /// # Errors
    /// What the engine refuses.
    pub fn source(&self, prefix: &[u32], tokens: &[u32]) -> Result<(Arc<dyn ChunkSource>, Origin)> {
        self.source_while(prefix, tokens, &|| true)
    }

    /// As [`source`](Self::source); does not wait for others any longer once `wanted` says no.
    ///
    /// # Errors
    /// As [`source`](Self::source), and [`EngineError::Cancelled`].
    pub fn source_while(
        &self,
        prefix: &[u32],
        tokens: &[u32],
        wanted: &dyn Fn() -> bool,
    ) -> Result<(Arc<dyn ChunkSource>, Origin)> {
        let key = self.key(prefix, tokens);
        // Pinned before it is looked up, so that no other request's chunk pushes it out in between.
        let pin = self.store.as_ref().map(|store| store.pin(&[key]));
        let (placed, origin) = self.place(&key, prefix, tokens, wanted)?;
        Ok(match (placed, &self.store) {
            (Placed::InMemory(kv), _) => (kv, origin),
            (Placed::Stored, Some(store)) => {
                let stored = StoredChunk {
                    store: Arc::clone(store),
                    key,
                    tokens: tokens.len(),
                    corrupt: Arc::clone(&self.corrupt),
                    _pin: pin,
                };
                (Arc::new(stored), origin)
            }
            (Placed::Stored, None) => return Err(QuireError::Internal("a chunk was kept without a store".into())),
        })
    }

    /// Finds a chunk, computes it, or waits for somebody else who does.
    fn place(
        &self,
        key: &ChunkKey,
        prefix: &[u32],
        tokens: &[u32],
        wanted: &dyn Fn() -> bool,
    ) -> Result<(Placed, Origin)> {
        loop {
            if self.is_stored(key)? {
                return Ok((Placed::Stored, Origin::Cached));
            }
            match self.missing.join(key) {
                // Whoever had the turn before may have stored it since it was looked up.
                Turn::Lead(_) if self.is_stored(key)? => return Ok((Placed::Stored, Origin::Cached)),
                Turn::Lead(lead) => {
                    let placed = self.compute(key, prefix, tokens)?;
                    lead.end(placed.clone());
                    return Ok((placed, Origin::Computed));
                }
                Turn::Follow(other) => match other.wait(wanted) {
                    Waited::Done(placed @ Placed::InMemory(_)) => return Ok((placed, Origin::Cached)),
                    Waited::Done(Placed::Stored) | Waited::Failed => {}
                    Waited::Unwanted => return Err(EngineError::Cancelled.into()),
                },
            }
        }
    }

    fn is_stored(&self, key: &ChunkKey) -> Result<bool> {
        let Some(store) = &self.store else { return Ok(false) };
        let stored = store.contains(key)?;
        if stored {
            note_use(store, key);
        }
        Ok(stored)
    }

    fn compute(&self, key: &ChunkKey, prefix: &[u32], tokens: &[u32]) -> Result<Placed> {
        let kv = self.engine.chunk_kv(prefix, tokens)?;
        let Some(store) = self.store.as_ref().filter(|store| store.access() != Access::Read) else {
            return Ok(Placed::InMemory(Arc::new(kv)));
        };
        match put(store, key, kv.clone()) {
            Ok(_) => Ok(Placed::Stored),
            Err(error) => {
                tracing::warn!(%error, "a chunk could not be stored; it is used from memory");
                Ok(Placed::InMemory(Arc::new(kv)))
            }
        }
    }
}

/// The chunks below `data_dir` for an engine, to be read and written; made with the budget `new_budget` where there are
/// none.
///
/// # Errors
/// As for [`KvStore::open`].
pub fn open_chunks(engine: &Engine, data_dir: &Path, name: &str, new_budget: u64) -> Result<ChunkStore> {
    let options = StoreOptions {
        byte_budget: new_budget,
        model_identity: engine.model_fingerprint(),
        model_name: name.into(),
        shape: store_shape(engine.kv_shape())?,
    };
    let store = ChunkStore::open(&store_dir(data_dir), options)?;
    let report = store.open_report();
    if let Some(problem) = &report.salvaged {
        tracing::warn!(%problem, "the chunk store was damaged and has been salvaged");
    }
    for chunk in &report.damaged {
        tracing::warn!(key = %chunk.key, "a chunk is damaged; it will be computed again when it is needed");
    }
    Ok(store)
}

/// A use that cannot be noted makes eviction less well informed, and nothing else.
fn note_use(store: &ChunkStore, key: &ChunkKey) {
    if let Err(error) = store.touch(key) {
        tracing::warn!(%error, %key, "a use of a chunk could not be noted");
    }
}

fn put(store: &ChunkStore, key: &ChunkKey, kv: ChunkKv) -> Result<PutOutcome> {
    let tokens = u32::try_from(kv.tokens)
        .map_err(|_| QuireError::Internal(format!("a chunk of {} tokens is beyond 32 bits", kv.tokens)))?;
    let layers: Vec<LayerKv> = kv.layers.into_iter().map(|l| LayerKv { keys: l.keys, values: l.values }).collect();
    Ok(store.put(key, tokens, &layers)?)
}

/// A chunk that is read from the store when the engine asks for it.
struct StoredChunk {
    store: Arc<ChunkStore>,
    key: ChunkKey,
    tokens: usize,
    corrupt: Arc<AtomicU64>,
    _pin: Option<PinGuard>,
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
                    if self.store.access() == Access::Write
                        && let Err(error) = self.store.remove(&self.key)
                    {
                        tracing::warn!(%error, key = %self.key, "a damaged chunk could not be removed");
                    }
                }
                Err(EngineError::ChunkSource(Box::new(error)))
            }
        }
    }
}

#[cfg(test)]
#[path = "store/tests.rs"]
mod tests;
