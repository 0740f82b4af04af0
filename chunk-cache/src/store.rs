//! The store's handle: put, read, touch, remove. Opening it is in `open`.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::backend::{Access, Family, Sync};
use crate::catalogue::{PinGuard, State};
use crate::compute::InMemory;
use crate::error::StoreError;
use crate::key::{ChunkKey, RAW_CODEC};
use crate::open::OpenReport;
use crate::pending::{NewChunk, PendingPut, PutTicket, Task, Thoroughness, Work};
use crate::policy::EvictionPolicy;
use crate::reading::{ReadError, corrupt, damage};
use crate::records::{ModelInfo, Usage};
use crate::shape::{KvShape, LayerKv};
use crate::single_flight::SingleFlight;
use crate::stats::{ChunkMeta, PutOutcome, StoreStats};
use crate::verify::VerifyReport;
use crate::writer::{Core, ask};

/// Bytes that may wait to be written before handing over more waits as well.
const MOST_PENDING: u64 = 256 << 20;

/// What a store is for.
#[derive(Debug, Clone, Copy)]
pub struct StoreOptions {
    /// Most bytes of keys and values that a new store may hold; demoted chunks make way, then others in the order of the
    /// [policy](EvictionPolicy). The disk
    /// holds up to a twentieth more: headers, and space of removed chunks that is not free yet. A store that exists
    /// keeps the budget that it has, until [`set_budget`](ChunkStore::set_budget) changes it.
    pub byte_budget: u64,
}

/// A model that was registered with this store; see [`ChunkStore::register`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelHandle {
    pub(crate) index: u32,
    pub(crate) shape: KvShape,
}

impl ModelHandle {
    /// Layout of the model's chunks.
    pub fn shape(&self) -> KvShape {
        self.shape
    }
}

/// What a note of use is made from.
#[derive(Clone, Copy)]
struct Note {
    /// Microseconds since the Unix epoch, later than every note before.
    now: u64,
    /// The policy's age.
    age: f64,
    /// Microseconds that computing the chunk took.
    cost: u64,
}

/// Chunks of attention state on disk. All methods take `&self` and are safe from many threads.
pub struct ChunkStore {
    pub(crate) core: Arc<Core>,
    /// Chunks that are being computed.
    pub(crate) flights: SingleFlight<ChunkKey, InMemory>,
    pub(crate) access: Access,
    pub(crate) report: OpenReport,
    pub(crate) writer: Option<JoinHandle<()>>,
}

impl ChunkStore {
    /// Makes a model known, under whose layout chunks are then stored and read. Registering it again gives the same
    /// handle; the name is that of the first time. In a store that was opened for reading it is known for this process.
    ///
    /// # Errors
    /// Those of a failed write.
    pub fn register(&self, model: &ModelInfo) -> Result<ModelHandle, StoreError> {
        let known = self.core.catalogue.lock().model_index(&model.fingerprint, &model.shape);
        if known.is_none() && self.access == Access::Write {
            let row = (Family::Models, model.row_key(), Some(model.encode()));
            self.core.backend.write("registering a model", &[row], Sync::Now)?;
        }
        let index = self.core.catalogue.lock().enter_model(model);
        Ok(ModelHandle { index, shape: model.shape })
    }

    /// The models whose chunks are or were stored.
    pub fn models(&self) -> Vec<ModelInfo> {
        self.core.catalogue.lock().models.clone()
    }

    /// Whether chunks can be stored and removed.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Most bytes of keys and values that the store may hold.
    pub fn budget(&self) -> u64 {
        self.core.catalogue.lock().budget
    }

    /// Changes the budget, for this process and all later ones; chunks make way at once.
    ///
    /// # Errors
    /// Those of a failed write; the budget then stays what it was.
    pub fn set_budget(&self, bytes: u64) -> Result<(), StoreError> {
        if self.budget() == bytes && self.access == Access::Read {
            return Ok(());
        }
        self.ask(Task::SetBudget(bytes)).map(drop)
    }

    /// In which order chunks make way from now on; a store is opened with [`EvictionPolicy::CacheCraft`].
    pub fn set_policy(&self, policy: EvictionPolicy) {
        self.core.catalogue.lock().policy = policy;
    }

    fn ask(&self, task: Task) -> Result<u64, StoreError> {
        self.check_writable()?;
        ask(&self.core, task)
    }

    /// For a store that was opened for reading, the error of an attempt to change it.
    fn check_writable(&self) -> Result<(), StoreError> {
        match self.access {
            Access::Write => Ok(()),
            Access::Read => {
                let detail = "it was opened for reading only".to_owned();
                Err(StoreError::ReadOnly { path: self.core.backend.path().to_path_buf(), detail })
            }
        }
    }

    /// What opening the store found and did.
    pub fn open_report(&self) -> &OpenReport {
        &self.report
    }

    /// Whether the chunk is on disk. A chunk known to be damaged is not, nor one that is still being written.
    pub fn contains(&self, key: &ChunkKey) -> bool {
        self.core.catalogue.lock().entries.contains_key(key)
    }

    /// What is known of a chunk; `None` when it is not stored.
    pub fn meta(&self, key: &ChunkKey) -> Option<ChunkMeta> {
        self.core.catalogue.lock().entries.get(key).map(ChunkMeta::from)
    }

    /// Every stored chunk, ordered by key.
    pub fn list(&self) -> Vec<(ChunkKey, ChunkMeta)> {
        let state = self.core.catalogue.lock();
        state.entries.iter().map(|(key, entry)| (*key, ChunkMeta::from(entry))).collect()
    }

    /// Totals over the store.
    pub fn stats(&self) -> StoreStats {
        let disk_bytes = self.core.backend.disk_bytes();
        let state = self.core.catalogue.lock();
        let entries = || state.entries.values();
        StoreStats {
            chunks: state.entries.len() as u64,
            tokens: entries().map(|entry| u64::from(entry.tokens)).sum(),
            payload_bytes: state.used,
            byte_budget: state.budget,
            disk_bytes,
            dead_bytes: state.stored_bytes() - state.used,
            hits: entries().map(|entry| entry.usage.hits).sum(),
            pinned: state.pins.len() as u64,
            damaged: state.damaged.len() as u64,
            evicted: state.evicted,
        }
    }

    /// Stores a chunk. When this returns, the chunk is on disk and survives a crash. Storing it again does nothing, unless
    /// the stored one is known to be damaged: then it is replaced. Chunks that are not pinned make way, demoted ones first,
    /// then in the order of the [policy](EvictionPolicy).
    ///
    /// # Errors
    /// [`StoreError::ShapeMismatch`], [`TooLarge`](StoreError::TooLarge),
    /// [`NoRoom`](StoreError::NoRoom), [`OutOfSpace`](StoreError::OutOfSpace), [`ReadOnly`](StoreError::ReadOnly),
    /// [`Damaged`](StoreError::Damaged) when the directory takes no more writes. Nothing of a chunk whose
    /// write failed is visible.
    pub fn put(&self, model: ModelHandle, chunk: NewChunk) -> Result<PutOutcome, StoreError> {
        self.put_behind(model, chunk)?.wait()
    }

    /// As [`put`](Self::put), but returns before the chunk is written; it can be read at once, from memory. Waits only
    /// while very much waits to be written already.
    ///
    /// # Errors
    /// [`StoreError::ShapeMismatch`], [`TooLarge`](StoreError::TooLarge), [`ReadOnly`](StoreError::ReadOnly),
    /// [`Stopped`](StoreError::Stopped). Others come from [`PutTicket::wait`].
    pub fn put_behind(&self, model: ModelHandle, chunk: NewChunk) -> Result<PutTicket, StoreError> {
        let bytes = check_shape(&model.shape, &chunk)?;
        self.check_writable()?;
        let mut state = self.core.catalogue.lock();
        if bytes > state.budget {
            return Err(StoreError::TooLarge { needed: bytes, budget: state.budget });
        }
        loop {
            if state.entries.contains_key(&chunk.key) {
                return Ok(PutTicket::already_present());
            }
            if let Some(pending) = state.pending.get(&chunk.key) {
                return Ok(PutTicket { done: Arc::clone(&pending.done), joined: true });
            }
            if state.pending_bytes == 0 || state.pending_bytes + bytes <= MOST_PENDING {
                break;
            }
            state = self.core.catalogue.wait(state);
        }
        let put = ChunkStore::hand_over(&mut state, model, chunk, bytes);
        // Under the lock, so that the order of the work is that in which chunks became pending.
        if !self.core.mailbox.push(Work::Store(vec![Arc::clone(&put)])) {
            state.pending.remove(&put.chunk.key);
            state.pending_bytes -= bytes;
            return Err(StoreError::Stopped { path: self.core.backend.path().to_path_buf() });
        }
        Ok(PutTicket { done: Arc::clone(&put.done), joined: false })
    }

    /// Makes a chunk pending; it is for the caller to tell the writer.
    pub(crate) fn hand_over(state: &mut State, model: ModelHandle, chunk: NewChunk, bytes: u64) -> Arc<PendingPut> {
        let put = Arc::new(PendingPut { chunk, model: model.index, bytes, done: Arc::default() });
        state.pending.insert(put.chunk.key, Arc::clone(&put));
        state.pending_bytes += bytes;
        put
    }

    /// The promise of a chunk that is being written; `None` when it is not.
    pub fn pending(&self, key: &ChunkKey) -> Option<PutTicket> {
        let state = self.core.catalogue.lock();
        state.pending.get(key).map(|put| PutTicket { done: Arc::clone(&put.done), joined: true })
    }

    /// One layer of a chunk; `None` when the chunk is not stored. Every byte returned is covered by a checksum taken when
    /// it was stored. The bytes stay in the memory that they were read into; one still being written is given from where it
    /// was handed over.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when the payload is damaged or missing: from then on the chunk counts as
    /// absent, until it is stored anew. [`ShapeMismatch`](StoreError::ShapeMismatch) for a layer the
    /// layout does not have.
    pub fn layer(&self, key: &ChunkKey, layer: u32) -> Result<Option<LayerKv>, StoreError> {
        loop {
            let (entry, shape) = {
                let state = self.core.catalogue.lock();
                if let Some(entry) = state.entries.get(key).filter(|entry| entry.codec == RAW_CODEC) {
                    (*entry, state.models[entry.model as usize].shape)
                } else if let Some(put) = state.pending.get(key) {
                    check_layer(layer, put.chunk.layers.len() as u32)?;
                    return Ok(Some(put.chunk.layers[layer as usize].clone()));
                } else if let Some(damage) = state.damaged.get(key) {
                    return Err(corrupt(damage.clone()));
                } else {
                    return Ok(None);
                }
            };
            check_layer(layer, shape.layers)?;
            match self.core.read_layer(key, &entry, &shape, layer) {
                Ok(kv) => return Ok(Some(kv)),
                Err(ReadError::Store(error)) => return Err(error),
                Err(ReadError::Damage(error)) => {
                    let damage = damage(*key, Some(layer), error);
                    if self.core.condemn(entry.number, &damage) {
                        return Err(corrupt(damage));
                    }
                    // Removed, moved or replaced while it was being read: look again.
                }
            }
        }
    }

    /// Notes that a chunk was used for an answer: a hit, and it moves to the end of the eviction order. Nothing happens when
    /// it is not stored. The note is lost in a power failure, not in a crash of the process; in a store that was opened for
    /// reading it ends with the process.
    ///
    /// # Errors
    /// Those of a failed write.
    pub fn touch(&self, key: &ChunkKey) -> Result<(), StoreError> {
        self.touch_saving(key, 1.0)
    }

    /// As [`touch`](Self::touch), for a use that saved only this share, 0 to 1, of what computing the chunk takes, because the
    /// rest of it was recomputed.
    ///
    /// # Errors
    /// Those of a failed write.
    pub fn touch_saving(&self, key: &ChunkKey, share: f32) -> Result<(), StoreError> {
        self.note(&[*key], &|usage, Note { now, age, cost }| {
            let saved = (cost as f64 * f64::from(share.clamp(0.0, 1.0))).round() as u64;
            *usage = Usage {
                last_used_micros: now,
                hits: usage.hits + 1,
                saved_micros: usage.saved_micros.saturating_add(saved),
                age,
                demoted: false,
            };
        })
    }

    /// Notes that documents refer to a chunk, as when they are ingested: it moves to the end of the eviction order, and
    /// that is no hit.
    ///
    /// # Errors
    /// Those of a failed write.
    pub fn note_presence(&self, key: &ChunkKey) -> Result<(), StoreError> {
        self.note(&[*key], &|usage, Note { now, age, .. }| {
            *usage = Usage { last_used_micros: now, age, demoted: false, ..*usage };
        })
    }

    /// Notes that no document refers to these chunks any more: they make way before all others.
    ///
    /// # Errors
    /// Those of a failed write.
    pub fn demote(&self, keys: &[ChunkKey]) -> Result<(), StoreError> {
        self.note(keys, &|usage, _| usage.demoted = true)
    }

    fn note(&self, keys: &[ChunkKey], change: &dyn Fn(&mut Usage, Note)) -> Result<(), StoreError> {
        let changes: Vec<_> = {
            let mut state = self.core.catalogue.lock();
            let changed = keys.iter().filter_map(|key| {
                let (now, age) = (state.tick(now_micros()), state.age);
                let entry = state.entries.get_mut(key)?;
                change(&mut entry.usage, Note { now, age, cost: entry.compute_micros });
                Some((Family::Usage, key.to_bytes().to_vec(), Some(entry.usage.encode(key))))
            });
            changed.collect()
        };
        if self.access == Access::Read || changes.is_empty() {
            return Ok(());
        }
        self.core.backend.write("noting a use", &changes, Sync::Later)
    }

    /// Removes a chunk, whole or damaged, pinned or not; true when there was one. A reader that is
    /// between two layers finds it gone.
    ///
    /// # Errors
    /// Those of a failed write; the chunk then stays visible.
    pub fn remove(&self, key: &ChunkKey) -> Result<bool, StoreError> {
        self.remove_all(&[*key]).map(|removed| removed > 0)
    }

    /// Removes these chunks as [`remove`](Self::remove) does, all or none. Returns how many there were.
    ///
    /// # Errors
    /// As for [`remove`](Self::remove).
    pub fn remove_all(&self, keys: &[ChunkKey]) -> Result<u64, StoreError> {
        self.ask(Task::Remove(keys.to_vec()))
    }

    /// As [`remove_all`](Self::remove_all), without waiting for it. What cannot be removed is logged; a store that was
    /// opened for reading is left as it is.
    pub fn remove_behind(&self, keys: &[ChunkKey]) {
        let done = Arc::default();
        if self.access == Access::Write && !self.core.mailbox.push(Work::Other(Task::Remove(keys.to_vec()), done)) {
            tracing::warn!(chunks = keys.len(), "chunks stay, as the store's writer has ended");
        }
    }

    /// Evicts chunks until at most `bytes` of keys and values are left, or only pinned ones. Returns how many went.
    ///
    /// # Errors
    /// Those of a failed write.
    pub fn evict_to(&self, bytes: u64) -> Result<u64, StoreError> {
        self.ask(Task::EvictTo(bytes))
    }

    /// Gives the disk space of removed chunks back now: files that hold much of it are rewritten. Does nothing in a store
    /// that was opened for reading.
    ///
    /// # Errors
    /// Those of a failed write, such as a disk too full to write a file before the old one goes.
    pub fn compact(&self) -> Result<(), StoreError> {
        match self.access {
            Access::Read => Ok(()),
            Access::Write => self.ask(Task::Reclaim(Thoroughness::Space)).map(drop),
        }
    }

    /// As [`compact`](Self::compact), down to the last byte: when this returns, nothing of a removed chunk is left in any
    /// file of the store, log and catalogue included.
    ///
    /// # Errors
    /// As for [`compact`](Self::compact).
    pub fn reclaim(&self) -> Result<(), StoreError> {
        self.ask(Task::Reclaim(Thoroughness::Traces)).map(drop)
    }

    /// Reads every row and every payload from disk and compares it with its checksums. Damaged
    /// chunks stop being served. Other threads may use the store meanwhile.
    ///
    /// # Errors
    /// Those of a failing device; damage is reported, not an error.
    pub fn verify(&self) -> Result<VerifyReport, StoreError> {
        self.core.verify()
    }

    /// Removes the chunks that are known to be damaged, and writes the catalogue anew where it cannot be read. Returns how
    /// many went.
    ///
    /// # Errors
    /// Those of a failed write.
    pub fn repair(&self) -> Result<u64, StoreError> {
        self.ask(Task::Repair)
    }

    /// Keeps these chunks from being evicted while the guard lives. Pin first, then ask whether they
    /// are there: a chunk found after pinning stays.
    pub fn pin(&self, keys: &[ChunkKey]) -> PinGuard {
        PinGuard::new(&self.core.catalogue, keys)
    }
}

impl Drop for ChunkStore {
    /// Waits until everything that was handed over is written.
    fn drop(&mut self) {
        self.core.mailbox.close();
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!(path = %self.core.backend.path().display(), "the writer of the chunk store panicked");
        }
    }
}

impl std::fmt::Debug for ChunkStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkStore")
            .field("path", &self.core.backend.path())
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}

/// Bytes of keys and values.
fn check_shape(shape: &KvShape, chunk: &NewChunk) -> Result<u64, StoreError> {
    let mismatch =
        |what: String, expected: String, found: String| Err(StoreError::ShapeMismatch { what, expected, found });
    let NewChunk { tokens, layers, .. } = chunk;
    if *tokens == 0 {
        return mismatch("the chunk".into(), "at least 1 token".into(), "0".into());
    }
    if layers.len() as u64 != u64::from(shape.layers) {
        let (expected, found) = (shape.layers, layers.len());
        return mismatch("the number of layers".into(), expected.to_string(), found.to_string());
    }
    let side = shape.bytes_per_side(*tokens);
    for (index, layer) in layers.iter().enumerate() {
        for (name, bytes) in [("keys", &layer.keys), ("values", &layer.values)] {
            if Some(bytes.len() as u64) != side {
                let what = format!("{name} of layer {index} for {tokens} tokens");
                let expected = format!("{} bytes", side.unwrap_or(u64::MAX));
                return mismatch(what, expected, format!("{} bytes", bytes.len()));
            }
        }
    }
    Ok(shape.payload_bytes(*tokens).unwrap_or(u64::MAX))
}

fn check_layer(layer: u32, layers: u32) -> Result<(), StoreError> {
    if layer < layers {
        return Ok(());
    }
    Err(StoreError::ShapeMismatch {
        what: format!("layer {layer}"),
        expected: format!("a layer below {layers}"),
        found: layer.to_string(),
    })
}

pub(crate) fn now_micros() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
}
