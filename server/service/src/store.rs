//! The engine's chunks in the chunk store.
//!
//! The engine describes KV in memory, the store on disk; neither knows the other. Their shapes meet here, in one
//! conversion. A chunk's key holds all that its numbers depend on: beside model, texts and formats how exactly they were
//! computed, in the engine's words ([`Engine::numerics`]): `--fast-prefill` makes other chunks than without, and a build that
//! computes other numbers finds none of an earlier one, while machines that differ by rounding alone share a store. A damaged chunk is counted and logged, never served: the engine computes it within the prompt, and the
//! next request that needs it stores it anew.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use chunk_cache::{
    Access, ChunkKey, ChunkStore, ComputeError, EvictionPolicy, Fetched, Found, KeyInputs, LayerKv, ModelHandle,
    ModelInfo, NewChunk, PinGuard, PutTicket, RAW_CODEC, SingleFlight, StoreError, StoreOptions, StoreStats,
};
use documents::Seldom;
use engine::{ChunkKv, ChunkLayer, ChunkName, ChunkSource, Engine, EngineError};

use settings::{QuireError, Result};

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

/// A chunk that is on disk, or on its way there.
#[derive(Debug)]
pub struct Ensured {
    /// Its name.
    pub key: ChunkKey,
    /// Whether it had to be computed.
    pub origin: Origin,
    /// The promise that it will be on disk; `None` for one that is.
    ticket: Option<PutTicket>,
}

impl Ensured {
    /// Waits until the chunk is on disk.
    ///
    /// # Errors
    /// What the store refuses.
    pub fn wait(&self) -> Result<()> {
        if let Some(ticket) = &self.ticket {
            ticket.wait()?;
        }
        Ok(())
    }

    /// Whether waiting would return at once.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.ticket.as_ref().is_none_or(PutTicket::is_done)
    }
}

/// What became of a chunk that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It was in the store.
    Cached,
    /// It was computed and stored.
    Computed,
}

/// The chunk store as one engine uses it. Where the folder cannot be written, chunks are only read; where there is none to
/// be read either, every chunk is computed for its use, until [`mend`](KvStore::mend) finds that it can be written.
pub struct KvStore {
    kept: RwLock<Option<Arc<Kept>>>,
    opening: Opening,
    /// That it is to be opened, where that was not possible for want of space.
    unopened: RwLock<Option<Unopened>>,
    /// Which chunks make way.
    policy: RwLock<EvictionPolicy>,
    engine: Engine,
    shape: chunk_cache::KvShape,
    rope: String,
    /// How the engine computes, as far as it changes what is stored.
    numerics: String,
    salt: Vec<u8>,
    corrupt: Arc<AtomicU64>,
    /// Chunks that are being computed where there is no store.
    unkept: SingleFlight<ChunkKey, Arc<[LayerKv]>>,
}

/// How a store is opened.
struct Opening {
    data_dir: PathBuf,
    model_name: String,
    /// Its budget where there is none yet.
    new_budget: u64,
}

/// A store that could not be opened to be written.
#[derive(Default)]
struct Unopened {
    /// The budget that it is to have, whatever it had.
    budget: Option<u64>,
}

/// The store, and what its chunks of this engine are entered under.
struct Kept {
    store: Arc<ChunkStore>,
    model: ModelHandle,
}

impl Kept {
    fn of(engine: &Engine, store: ChunkStore, model_name: &str) -> Result<Kept> {
        let shape = store_shape(engine.kv_shape())?;
        let info = ModelInfo { fingerprint: engine.model_fingerprint(), name: model_name.to_owned(), shape };
        Ok(Kept { model: store.register(&info)?, store: Arc::new(store) })
    }
}

impl KvStore {
    /// Opens the store below `data_dir` for an engine, making it with the budget `new_budget` where there is none.
    /// `salt` keeps tenants apart.
    ///
    /// # Errors
    /// Whatever keeps the store from being opened.
    pub fn open(engine: &Engine, data_dir: &Path, name: &str, new_budget: u64, salt: &str) -> Result<KvStore> {
        let store = open_chunks(data_dir, new_budget)?;
        let opening = Opening { data_dir: data_dir.into(), model_name: name.into(), new_budget };
        KvStore::with_store(engine, Some(store), opening, salt)
    }

    /// As [`open`](Self::open); where the disk is full or fails, the folder cannot be written or the store is damaged as a
    /// whole, it is only read, or done without. That is logged.
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
        let opening = || Opening { data_dir: data_dir.into(), model_name: name.into(), new_budget };
        let opened = open_chunks(data_dir, new_budget)
            .and_then(|store| KvStore::with_store(engine, Some(store), opening(), salt));
        let problem = match opened {
            Err(QuireError::Store(
                problem @ (StoreError::ReadOnly { .. }
                | StoreError::OutOfSpace { .. }
                | StoreError::Damaged { .. }
                | StoreError::Backend { .. }
                | StoreError::Io { .. }),
            )) => problem,
            opened => return opened,
        };
        // Who may not write cannot rescue it either: then it is done without.
        let store = ChunkStore::open_existing(&store_dir(data_dir), Access::Read, new_budget).ok().flatten();
        let how = if store.is_some() { "cached chunks are used, new ones are not kept" } else { "no cache is used" };
        tracing::warn!(%problem, "{how}; answers stay the same and take longer");
        let lasting = matches!(problem, StoreError::Damaged { .. } | StoreError::Backend { .. });
        let unopened = (!lasting).then(Unopened::default);
        Ok(KvStore { unopened: RwLock::new(unopened), ..KvStore::with_store(engine, store, opening(), salt)? })
    }

    /// Opens the store where it could not be opened to be written, as on a full disk, if that is possible by now. Says whether it
    /// can be written.
    pub fn mend(&self) -> bool {
        // Held, so that one at a time tries.
        let mut unopened = self.unopened.write().unwrap_or_else(PoisonError::into_inner);
        let Some(wanted) = unopened.as_ref() else {
            return self.can_keep();
        };
        let opened = open_chunks(&self.opening.data_dir, self.opening.new_budget).and_then(|store| {
            store.set_policy(*self.policy.read().unwrap_or_else(PoisonError::into_inner));
            if let Some(bytes) = wanted.budget {
                store.set_budget(bytes)?;
            }
            Kept::of(&self.engine, store, &self.opening.model_name)
        });
        match opened {
            Ok(kept) => {
                *self.kept.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(kept));
                *unopened = None;
                tracing::info!("the chunk store can be written by now: chunks are kept again");
                true
            }
            Err(problem) => {
                tracing::debug!(%problem, "the chunk store cannot be written yet");
                false
            }
        }
    }

    /// Whether chunks that are computed are kept.
    #[must_use]
    pub fn can_keep(&self) -> bool {
        self.kept().is_some_and(|kept| kept.store.access() == Access::Write)
    }

    /// Removes all chunks, also where the disk is full or the store is damaged; says how many there were, as far as that is known.
    ///
    /// # Errors
    /// Those of a failed write; [`StoreError::Locked`] while requests still use chunks of a store whose disk is full.
    pub fn clear(&self) -> Result<u64> {
        if let Some(store) = self.chunks().filter(|store| store.access() == Access::Write) {
            let keys: Vec<_> = store.list().into_iter().map(|(key, _)| key).collect();
            match store.remove_all(&keys) {
                Ok(removed) => {
                    store.compact()?;
                    return Ok(removed);
                }
                // Not even the rows fit that say so: its files go, with the store closed.
                Err(StoreError::OutOfSpace { .. } | StoreError::Closed { .. } | StoreError::Damaged { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let removed = {
            // Held, so that nobody opens it meanwhile.
            let mut unopened = self.unopened.write().unwrap_or_else(PoisonError::into_inner);
            unopened.get_or_insert_default();
            *self.kept.write().unwrap_or_else(PoisonError::into_inner) = None;
            let dir = store_dir(&self.opening.data_dir);
            if dir.is_dir() { ChunkStore::clear(&dir)? } else { 0 }
        };
        self.mend();
        Ok(removed)
    }

    fn kept(&self) -> Option<Arc<Kept>> {
        self.kept.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn with_store(engine: &Engine, store: Option<ChunkStore>, opening: Opening, salt: &str) -> Result<KvStore> {
        let shape = store_shape(engine.kv_shape())?;
        let kept = store.map(|store| Kept::of(engine, store, &opening.model_name)).transpose()?;
        Ok(KvStore {
            kept: RwLock::new(kept.map(Arc::new)),
            opening,
            unopened: RwLock::default(),
            policy: RwLock::default(),
            engine: engine.clone(),
            shape,
            rope: engine.spec().rope.fingerprint(),
            numerics: engine.numerics(),
            salt: salt.as_bytes().to_vec(),
            corrupt: Arc::default(),
            unkept: SingleFlight::default(),
        })
    }

    /// The store itself; `None` where there is none.
    #[must_use]
    pub fn chunks(&self) -> Option<Arc<ChunkStore>> {
        self.kept().map(|kept| Arc::clone(&kept.store))
    }

    /// Changes the store's budget for good; chunks make way at once.
    ///
    /// # Errors
    /// Those of a failed write.
    pub fn set_budget(&self, bytes: u64) -> Result<()> {
        if let Some(unopened) = self.unopened.write().unwrap_or_else(PoisonError::into_inner).as_mut() {
            unopened.budget = Some(bytes);
        }
        match self.kept() {
            Some(kept) => Ok(kept.store.set_budget(bytes)?),
            None => Ok(()),
        }
    }

    /// Chunks make way in this order from now on.
    pub fn set_policy(&self, policy: EvictionPolicy) {
        *self.policy.write().unwrap_or_else(PoisonError::into_inner) = policy;
        if let Some(kept) = self.kept() {
            kept.store.set_policy(policy);
        }
    }

    /// Totals over the store; `None` where there is none.
    pub fn stats(&self) -> Option<StoreStats> {
        self.kept().map(|kept| kept.store.stats())
    }

    /// Chunks that made way since the store was opened.
    pub fn evicted(&self) -> u64 {
        self.stats().map_or(0, |stats| stats.evicted)
    }

    /// Notes that no document refers to these chunks any more: they make way before all others.
    ///
    /// # Errors
    /// Those of a failed write.
    pub fn demote(&self, keys: &[ChunkKey]) -> Result<()> {
        match self.kept() {
            Some(kept) => Ok(kept.store.demote(keys)?),
            None => Ok(()),
        }
    }

    /// Removes chunks whose documents are gone for good; says how many there were. A store that can only be read keeps them.
    ///
    /// # Errors
    /// Those of a failed write.
    pub fn remove(&self, keys: &[ChunkKey]) -> Result<u64> {
        match self.kept().filter(|kept| kept.store.access() == Access::Write) {
            Some(kept) => {
                let removed = kept.store.remove_all(keys)?;
                // Behind the store, so that nobody reads one from there again.
                self.engine.forget_chunks(&keys.iter().map(name_of).collect::<Vec<_>>());
                Ok(removed)
            }
            None => Ok(0),
        }
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
            tenant_salt: &self.salt,
            tokens,
            prefix,
            kv: self.shape,
            codec: RAW_CODEC,
        })
    }

    /// Makes sure that a chunk is stored; computes it where it is not. When this returns, it is on disk.
    ///
    /// # Errors
    /// What the engine or the store refuses.
    pub fn ensure(&self, prefix: &[u32], tokens: &[u32]) -> Result<(ChunkKey, Origin)> {
        let ensured = self.ensure_behind(prefix, tokens)?;
        ensured.wait()?;
        Ok((ensured.key, ensured.origin))
    }

    /// As [`ensure`](Self::ensure), but returns before the chunk is written: the next one is computed meanwhile. Waits only
    /// while very much waits to be written already.
    ///
    /// # Errors
    /// What the engine or the store refuses. That the disk is full comes from [`Ensured::wait`].
    pub fn ensure_behind(&self, prefix: &[u32], tokens: &[u32]) -> Result<Ensured> {
        let key = self.key(prefix, tokens);
        let Some(kept) = self.kept() else {
            return Err(QuireError::Internal("chunks are to be kept without a store".into()));
        };
        let (found, origin) = self.fetch(&kept, &key, prefix, tokens, &|| true)?;
        let ticket = match found {
            Found::InMemory(state) => Some(state.stored?),
            Found::Stored => {
                log_unnoted(kept.store.note_presence(&key), &key);
                None
            }
        };
        Ok(Ensured { key, origin, ticket })
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
        let Some(kept) = self.kept() else { return self.compute_unkept(&key, prefix, tokens, wanted) };
        // Pinned before it is looked up, so that no other request's chunk pushes it out in between.
        let pin = kept.store.pin(&[key]);
        let (found, origin) = self.fetch(&kept, &key, prefix, tokens, wanted)?;
        let source: Arc<dyn ChunkSource> = match found {
            Found::InMemory(state) => {
                if let Err(error) = &state.stored
                    && origin == Origin::Computed
                    && kept.store.access() == Access::Write
                {
                    static TOLD: Seldom = Seldom::new();
                    if let Some(more) = TOLD.due() {
                        tracing::warn!(%error, more, "a chunk could not be stored; it is used from memory");
                    }
                }
                let name = name_of(&key);
                Arc::new(MemoryChunk { layers: state.layers, tokens: tokens.len(), name, _pin: Some(pin) })
            }
            Found::Stored => {
                log_unnoted(kept.store.touch(&key), &key);
                let (store, corrupt) = (Arc::clone(&kept.store), Arc::clone(&self.corrupt));
                Arc::new(StoredChunk { store, key, tokens: tokens.len(), corrupt, _pin: pin })
            }
        };
        Ok((source, origin))
    }

    /// Finds a chunk, computes it, or waits for somebody else who does.
    fn fetch(
        &self,
        kept: &Kept,
        key: &ChunkKey,
        prefix: &[u32],
        tokens: &[u32],
        wanted: &dyn Fn() -> bool,
    ) -> Result<(Found, Origin)> {
        let compute = || self.compute(key, prefix, tokens);
        let (found, computed) = kept.store.read_or_compute(kept.model, key, wanted, compute).map_err(reason)?;
        Ok((found, if computed { Origin::Computed } else { Origin::Cached }))
    }

    fn compute_unkept(
        &self,
        key: &ChunkKey,
        prefix: &[u32],
        tokens: &[u32],
        wanted: &dyn Fn() -> bool,
    ) -> Result<(Arc<dyn ChunkSource>, Origin)> {
        let compute = || Ok(self.compute(key, prefix, tokens)?.layers.into());
        let (layers, origin) = match self.unkept.fetch(key, wanted, &|| None, &compute).map_err(reason)? {
            Fetched::Found(layers) | Fetched::Shared(layers) => (layers, Origin::Cached),
            Fetched::Computed(layers) => (layers, Origin::Computed),
        };
        let name = name_of(key);
        Ok((Arc::new(MemoryChunk { layers, tokens: tokens.len(), name, _pin: None }), origin))
    }

    fn compute(&self, key: &ChunkKey, prefix: &[u32], tokens: &[u32]) -> Result<NewChunk> {
        let began = Instant::now();
        let ChunkKv { tokens, layers } = self.engine.chunk_kv(prefix, tokens)?;
        let tokens = u32::try_from(tokens)
            .map_err(|_| QuireError::Internal(format!("a chunk of {tokens} tokens is beyond 32 bits")))?;
        let layers = layers.into_iter().map(|layer| LayerKv { keys: layer.keys, values: layer.values }).collect();
        Ok(NewChunk {
            compute_micros: u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX),
            tenant: self.tenant(),
            ..NewChunk::new(*key, tokens, layers)
        })
    }

    /// Names the tenant without telling the salt; zero without one.
    fn tenant(&self) -> [u8; 16] {
        let mut tenant = [0; 16];
        if !self.salt.is_empty() {
            let mut hasher = blake3::Hasher::new_derive_key("quire chunk tenant 1");
            hasher.update(&self.salt).finalize_xof().fill(&mut tenant);
        }
        tenant
    }
}

fn reason(error: ComputeError<QuireError>) -> QuireError {
    match error {
        ComputeError::Failed(error) => error,
        ComputeError::Unwanted => EngineError::Cancelled.into(),
    }
}

/// The chunks below `data_dir`, to be read and written; made with the budget `new_budget` where there are none.
///
/// # Errors
/// As for [`KvStore::open`].
pub fn open_chunks(data_dir: &Path, new_budget: u64) -> Result<ChunkStore> {
    let store = ChunkStore::open(&store_dir(data_dir), StoreOptions { byte_budget: new_budget })?;
    let report = store.open_report();
    if let Some(problem) = &report.salvaged {
        tracing::warn!(%problem, "the chunk store was damaged and has been salvaged");
    }
    for chunk in &report.damaged {
        tracing::warn!(key = %chunk.key, "a chunk is damaged; it will be computed again when it is needed");
    }
    Ok(store)
}

/// The engine's name for a chunk. Keys hold the tenant's salt: what one tenant has used, another does not find.
fn name_of(key: &ChunkKey) -> ChunkName {
    ChunkName::of(&key.to_bytes())
}

/// A use that cannot be noted makes eviction less well informed, and nothing else.
fn log_unnoted(noted: std::result::Result<(), StoreError>, key: &ChunkKey) {
    if let Err(error) = noted {
        static TOLD: Seldom = Seldom::new();
        if let Some(more) = TOLD.due() {
            tracing::warn!(%error, %key, more, "a use of a chunk could not be noted");
        }
    }
}

/// A chunk that is used from memory.
struct MemoryChunk {
    layers: Arc<[LayerKv]>,
    tokens: usize,
    name: ChunkName,
    /// It is not evicted when it has been written meanwhile.
    _pin: Option<PinGuard>,
}

impl ChunkSource for MemoryChunk {
    fn tokens(&self) -> usize {
        self.tokens
    }

    fn layer(&self, layer: usize) -> engine::Result<ChunkLayer> {
        let missing = || EngineError::ChunkSource(format!("a chunk in memory has no layer {layer}").into());
        let LayerKv { keys, values } = self.layers.get(layer).cloned().ok_or_else(missing)?;
        Ok(ChunkLayer::raw(keys, values))
    }

    fn name(&self) -> Option<ChunkName> {
        Some(self.name)
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
            Ok(Some(kv)) => Ok(ChunkLayer::raw(kv.keys, kv.values)),
            Ok(None) => Err(EngineError::ChunkSource(format!("chunk {} is no longer stored", self.key).into())),
            Err(error) => {
                static TOLD: Seldom = Seldom::new();
                if let Some(more) = TOLD.due() {
                    tracing::warn!(%error, more, "a cached chunk could not be read; it is computed instead");
                }
                if matches!(error, StoreError::Corrupt { .. }) {
                    self.corrupt.fetch_add(1, Ordering::Relaxed);
                    // Gone for later processes as well: the next use finds it missing and stores it anew.
                    self.store.remove_behind(&[self.key]);
                }
                Err(EngineError::ChunkSource(Box::new(error)))
            }
        }
    }

    fn name(&self) -> Option<ChunkName> {
        Some(name_of(&self.key))
    }
}

#[cfg(test)]
#[path = "store/tests.rs"]
mod tests;
