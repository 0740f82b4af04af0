//! The store itself: open, put, read, touch, remove.

use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::backend::{Access, Backend, Family};
use crate::catalogue::{Catalogue, DamagedChunk, Entry, PinGuard};
use crate::error::StoreError;
use crate::format::FormatError;
use crate::key::ChunkKey;
use crate::open::{self, OpenReport};
use crate::records::{Identity, Usage};
use crate::room::Taken;
use crate::shape::{KvShape, LayerKv};

/// What a store is for.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Most bytes of keys and values that a new store may hold; least recently used chunks make way. The disk
    /// holds somewhat more: headers, and deleted payloads until they are compacted away. A store that exists
    /// keeps the budget that it has, until [`set_budget`](ChunkStore::set_budget) changes it.
    pub byte_budget: u64,
    /// Fingerprint of the model whose state is stored.
    pub model_identity: [u8; 32],
    /// Name of the model, for messages.
    pub model_name: String,
    /// Layout of every chunk.
    pub shape: KvShape,
}

/// What is known of a chunk without reading its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkMeta {
    /// Tokens of the chunk.
    pub tokens: u32,
    /// Bytes of keys and values over all layers.
    pub payload_bytes: u64,
    /// When it was stored, seconds since the Unix epoch.
    pub created_unix: u64,
    /// When it was last stored or touched, seconds since the Unix epoch.
    pub last_used_unix: u64,
    /// How often it was touched.
    pub hits: u64,
}

impl From<&Entry> for ChunkMeta {
    fn from(entry: &Entry) -> Self {
        ChunkMeta {
            tokens: entry.manifest.tokens,
            payload_bytes: entry.bytes(),
            created_unix: entry.manifest.created_unix,
            last_used_unix: entry.usage.last_used_micros / 1_000_000,
            hits: entry.usage.hits,
        }
    }
}

/// What [`ChunkStore::put`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutOutcome {
    /// The chunk was written and is safe on disk.
    Stored,
    /// The chunk was there already; nothing was written.
    AlreadyPresent,
}

/// Totals over the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreStats {
    /// Visible chunks.
    pub chunks: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Bytes of their keys and values.
    pub payload_bytes: u64,
    /// The budget these bytes are held to.
    pub byte_budget: u64,
    /// Bytes of table and blob files, garbage not yet compacted away included; data that is still only in
    /// the write-ahead log excluded.
    pub disk_bytes: u64,
    /// Touches summed over the visible chunks.
    pub hits: u64,
    /// Keys that are pinned now.
    pub pinned: u64,
    /// Chunks known to be damaged; they count as absent.
    pub damaged: u64,
    /// Chunks evicted since the store was opened.
    pub evicted: u64,
}

/// Chunks of attention state on disk. All methods take `&self` and are safe from many threads.
pub struct ChunkStore {
    pub(crate) backend: Backend,
    pub(crate) shape: KvShape,
    pub(crate) catalogue: Arc<Catalogue>,
    identity: Identity,
    access: Access,
    report: OpenReport,
}

impl ChunkStore {
    /// Opens the store in the directory `path`, creating it where needed. Unfinished writes of a
    /// process that died are swept; [`open_report`](Self::open_report) tells what was found. No chunk
    /// makes way for being opened.
    ///
    /// # Errors
    /// [`StoreError::ForeignStore`] when the directory belongs to another model, layout or program,
    /// [`NewerFormat`](StoreError::NewerFormat), [`Locked`](StoreError::Locked),
    /// [`ReadOnly`](StoreError::ReadOnly), [`OutOfSpace`](StoreError::OutOfSpace), and
    /// [`Damaged`](StoreError::Damaged) when nothing can be saved.
    pub fn open(path: &Path, options: StoreOptions) -> Result<ChunkStore, StoreError> {
        open::prepare_directory(path)?;
        let (backend, salvaged) = open::open_backend(path, Access::Write)?;
        let wanted = Identity { model: options.model_identity, model_name: options.model_name, shape: options.shape };
        let identity = match open::read_identity(&backend)? {
            Some(found) => {
                open::check_identity(path, &found, &wanted)?;
                found
            }
            None => {
                open::write_identity(&backend, &wanted)?;
                wanted
            }
        };
        ChunkStore::with_backend(backend, identity, Access::Write, salvaged, options.byte_budget)
    }

    /// Opens the store that the directory `path` holds, whichever model it belongs to; `None` if there is
    /// none. A store from before budgets were kept is taken to have `unknown_budget`.
    ///
    /// # Errors
    /// As for [`open`](Self::open). With [`Access::Read`] the directory need not be writable, and may be
    /// in use.
    pub fn open_existing(path: &Path, access: Access, unknown_budget: u64) -> Result<Option<ChunkStore>, StoreError> {
        if !path.exists() || !open::holds_store(path)? {
            return Ok(None);
        }
        if access == Access::Write {
            open::prepare_directory(path)?;
        }
        let (backend, salvaged) = open::open_backend(path, access)?;
        let Some(identity) = open::read_identity(&backend)? else { return Ok(None) };
        ChunkStore::with_backend(backend, identity, access, salvaged, unknown_budget).map(Some)
    }

    fn with_backend(
        backend: Backend,
        identity: Identity,
        access: Access,
        salvaged: Option<String>,
        unknown_budget: u64,
    ) -> Result<ChunkStore, StoreError> {
        let shape = identity.shape;
        let mut report = OpenReport { salvaged, ..OpenReport::default() };
        let mut state = open::recover(&backend, &shape, access, &mut report)?;
        state.budget = match open::read_budget(&backend, &shape)? {
            Some(budget) => budget,
            None if access == Access::Write => {
                open::write_budget(&backend, &shape, unknown_budget)?;
                unknown_budget
            }
            None => unknown_budget,
        };
        Ok(ChunkStore { backend, shape, catalogue: Arc::new(Catalogue::new(state)), identity, access, report })
    }

    /// Whether another process has the store at `path` open for writing. Who reads meanwhile sees a moment of it, and may
    /// find files gone.
    ///
    /// # Errors
    /// Those of the lock's file.
    pub fn is_in_use(path: &Path) -> Result<bool, StoreError> {
        open::is_in_use(path)
    }

    /// Removes all chunks at once, by removing the files: it needs no space on the disk, and works for a
    /// store of any model and for a damaged one. The emptied store keeps its identity and budget where
    /// there is room to write them. Returns how many chunks there were, as far as could be read.
    ///
    /// # Errors
    /// [`StoreError::Locked`] while another has the store open, [`ForeignStore`](StoreError::ForeignStore) for a
    /// directory of another program, and whatever keeps files from being removed.
    pub fn clear(path: &Path) -> Result<u64, StoreError> {
        match open::holds_store(path) {
            Ok(_) | Err(StoreError::Damaged { .. }) => {}
            Err(error) => return Err(error),
        }
        let known = ChunkStore::open_existing(path, Access::Read, 0).ok().flatten().map(|store| {
            let state = store.catalogue.lock();
            (store.identity.clone(), state.budget, state.entries.len() as u64)
        });
        Backend::destroy(path).map_err(|error| StoreError::from_rocksdb(error, "removing all chunks", path))?;
        let Some((identity, byte_budget, chunks)) = known else { return Ok(0) };
        let Identity { model: model_identity, model_name, shape } = identity;
        let emptied = ChunkStore::open(path, StoreOptions { byte_budget, model_identity, model_name, shape });
        if let Err(error) = emptied {
            tracing::warn!(%error, "the emptied store forgets its byte budget");
        }
        Ok(chunks)
    }

    /// Refuses a store that belongs to another model or layout.
    ///
    /// # Errors
    /// [`StoreError::ForeignStore`].
    pub fn check_belongs(&self, model: [u8; 32], name: &str, shape: KvShape) -> Result<(), StoreError> {
        let wanted = Identity { model, model_name: name.to_owned(), shape };
        open::check_identity(self.backend.path(), &self.identity, &wanted)
    }

    /// Name of the model whose state is stored, as it was called when the store was made.
    pub fn model_name(&self) -> &str {
        &self.identity.model_name
    }

    /// Whether chunks can be stored and removed.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Most bytes of keys and values that the store may hold.
    pub fn budget(&self) -> u64 {
        self.catalogue.lock().budget
    }

    /// Changes the budget, for this process and all later ones; least recently used chunks make way at once.
    ///
    /// # Errors
    /// Those of a failed write; the budget then stays what it was.
    pub fn set_budget(&self, bytes: u64) -> Result<(), StoreError> {
        if self.budget() != bytes {
            self.check_writable()?;
            open::write_budget(&self.backend, &self.shape, bytes)?;
            self.catalogue.lock().budget = bytes;
        }
        self.shrink_to_budget()
    }

    /// For a store that was opened for reading, the error of an attempt to change it.
    fn check_writable(&self) -> Result<(), StoreError> {
        match self.access {
            Access::Write => Ok(()),
            Access::Read => {
                let detail = "it was opened for reading only".to_owned();
                Err(StoreError::ReadOnly { path: self.backend.path().to_path_buf(), detail })
            }
        }
    }

    /// What opening the store found and did.
    pub fn open_report(&self) -> &OpenReport {
        &self.report
    }

    /// Layout of every chunk of this store.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Whether the chunk is stored. A chunk known to be damaged is not.
    ///
    /// # Errors
    /// None today; the signature leaves room for stores that must ask elsewhere.
    pub fn contains(&self, key: &ChunkKey) -> Result<bool, StoreError> {
        Ok(self.catalogue.lock().entries.contains_key(key))
    }

    /// What is known of a chunk; `None` when it is not stored.
    ///
    /// # Errors
    /// As for [`contains`](Self::contains).
    pub fn meta(&self, key: &ChunkKey) -> Result<Option<ChunkMeta>, StoreError> {
        Ok(self.catalogue.lock().entries.get(key).map(ChunkMeta::from))
    }

    /// Every stored chunk, ordered by key.
    ///
    /// # Errors
    /// As for [`contains`](Self::contains).
    pub fn list(&self) -> Result<Vec<(ChunkKey, ChunkMeta)>, StoreError> {
        let state = self.catalogue.lock();
        let mut list: Vec<_> = state.entries.iter().map(|(key, entry)| (*key, ChunkMeta::from(entry))).collect();
        drop(state);
        list.sort_unstable_by_key(|(key, _)| *key);
        Ok(list)
    }

    /// Totals over the store.
    ///
    /// # Errors
    /// As for [`contains`](Self::contains).
    pub fn stats(&self) -> Result<StoreStats, StoreError> {
        let disk_bytes = self.backend.disk_bytes();
        let state = self.catalogue.lock();
        let entries = || state.entries.values();
        Ok(StoreStats {
            chunks: state.entries.len() as u64,
            tokens: entries().map(|e| u64::from(e.manifest.tokens)).sum(),
            payload_bytes: state.used,
            byte_budget: state.budget,
            disk_bytes,
            hits: entries().map(|e| e.usage.hits).sum(),
            pinned: state.pins.len() as u64,
            damaged: state.damaged.len() as u64,
            evicted: state.evicted,
        })
    }

    /// Stores a chunk: one [`LayerKv`] per layer of the store's layout, for `tokens` tokens. When this
    /// returns, the chunk is on disk and survives a crash. Storing it again does nothing, unless the
    /// stored one is known to be damaged: then it is replaced. Least recently used chunks that are not
    /// pinned make way.
    ///
    /// # Errors
    /// [`StoreError::ShapeMismatch`], [`TooLarge`](StoreError::TooLarge),
    /// [`NoRoom`](StoreError::NoRoom), [`OutOfSpace`](StoreError::OutOfSpace), [`ReadOnly`](StoreError::ReadOnly),
    /// [`Damaged`](StoreError::Damaged) when the directory takes no more writes. Nothing of a chunk whose
    /// write failed is visible.
    pub fn put(&self, key: &ChunkKey, tokens: u32, layers: &[LayerKv]) -> Result<PutOutcome, StoreError> {
        let needed = self.check_shape(tokens, layers)?;
        self.check_writable()?;
        let Some((claim, made_way)) = self.claim_room(key, needed)? else {
            return Ok(PutOutcome::AlreadyPresent);
        };
        self.carry_out(made_way)?;
        let manifest = match self.write(key, tokens, layers) {
            Ok(manifest) => Arc::new(manifest),
            Err(error) => {
                // Best effort: what stays behind is invisible, and swept at the next opening.
                let _ = self.erase(&[*key]);
                return Err(error);
            }
        };
        claim.finish(|state| {
            let usage = Usage { last_used_micros: state.tick(now_micros()), hits: 0 };
            state.insert(*key, manifest, usage);
        });
        if let Err(error) = self.write_usage(key) {
            // The chunk is stored; without this row it ranks by its age.
            tracing::warn!(%error, %key, "time of storing not noted");
        }
        Ok(PutOutcome::Stored)
    }

    /// One layer of a chunk; `None` when the chunk is not stored. Every byte returned was checked
    /// against the checksum taken when it was stored.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when the payload is damaged or missing: from then on the chunk counts as
    /// absent, until it is stored anew. [`ShapeMismatch`](StoreError::ShapeMismatch) for a layer the
    /// layout does not have.
    pub fn layer(&self, key: &ChunkKey, layer: u32) -> Result<Option<LayerKv>, StoreError> {
        if layer >= self.shape.layers {
            return Err(StoreError::ShapeMismatch {
                what: format!("layer {layer}"),
                expected: format!("a layer below {}", self.shape.layers),
                found: layer.to_string(),
            });
        }
        loop {
            let entry = {
                let state = self.catalogue.lock();
                if let Some(damage) = state.damaged.get(key) {
                    return Err(corrupt(damage.clone()));
                }
                match state.entries.get(key) {
                    Some(entry) => entry.clone(),
                    None => return Ok(None),
                }
            };
            match self.read_layer(key, layer, &entry.manifest)? {
                Ok(kv) => return Ok(Some(kv)),
                Err(error) => {
                    let damage = damage(*key, Some(layer), error);
                    if self.condemn(entry.generation, &damage) {
                        return Err(corrupt(damage));
                    }
                    // Removed or replaced while it was being read: look again.
                }
            }
        }
    }

    /// Notes that a chunk was used: it moves to the end of the eviction order. Nothing happens when it is
    /// not stored. The note is lost in a power failure, not in a crash of the process; in a store that was opened for
    /// reading it ends with the process.
    ///
    /// # Errors
    /// Those of a failed write.
    pub fn touch(&self, key: &ChunkKey) -> Result<(), StoreError> {
        {
            let mut state = self.catalogue.lock();
            let now = state.tick(now_micros());
            let Some(entry) = state.entries.get_mut(key) else {
                return Ok(());
            };
            entry.usage.last_used_micros = now;
            entry.usage.hits += 1;
        }
        if self.access == Access::Read {
            return Ok(());
        }
        self.write_usage(key)
    }

    /// Removes a chunk, whole or damaged, pinned or not; true when there was one. A reader that is
    /// between two layers finds it gone.
    ///
    /// # Errors
    /// Those of a failed write; the chunk then stays visible.
    pub fn remove(&self, key: &ChunkKey) -> Result<bool, StoreError> {
        self.check_writable()?;
        let mut state = self.catalogue.lock_when_idle(key);
        let taken = Taken {
            entries: state.take(key).map(|entry| (*key, entry)).into_iter().collect(),
            damaged: state.damaged.remove(key).into_iter().collect(),
            evicted: 0,
        };
        if taken.is_empty() {
            return Ok(false);
        }
        let claim = self.catalogue.claim(&mut state, vec![*key], 0);
        drop(state);
        self.carry_out(Some((claim, taken)))?;
        Ok(true)
    }

    /// Keeps these chunks from being evicted while the guard lives. Pin first, then ask whether they
    /// are there: a chunk found after pinning stays.
    pub fn pin(&self, keys: &[ChunkKey]) -> PinGuard {
        PinGuard::new(&self.catalogue, keys)
    }

    /// Merges files and gives back the disk space of removed chunks; may take minutes in a large store. Does nothing in
    /// a store that was opened for reading.
    pub fn compact(&self) {
        if self.access == Access::Read {
            return;
        }
        self.backend.compact(Family::Manifest);
        self.backend.compact(Family::Kv);
    }

    fn check_shape(&self, tokens: u32, layers: &[LayerKv]) -> Result<u64, StoreError> {
        let mismatch =
            |what: String, expected: String, found: String| Err(StoreError::ShapeMismatch { what, expected, found });
        if tokens == 0 {
            return mismatch("the chunk".into(), "at least 1 token".into(), "0".into());
        }
        if layers.len() as u64 != u64::from(self.shape.layers) {
            let (expected, found) = (self.shape.layers, layers.len());
            return mismatch("the number of layers".into(), expected.to_string(), found.to_string());
        }
        let side = self.shape.bytes_per_side(tokens);
        for (index, layer) in layers.iter().enumerate() {
            for (name, bytes) in [("keys", &layer.keys), ("values", &layer.values)] {
                if Some(bytes.len() as u64) != side {
                    let what = format!("{name} of layer {index} for {tokens} tokens");
                    let expected = format!("{} bytes", side.unwrap_or(u64::MAX));
                    return mismatch(what, expected, format!("{} bytes", bytes.len()));
                }
            }
        }
        Ok(self.shape.payload_bytes(tokens).unwrap_or(u64::MAX))
    }

    /// Declares a chunk damaged, unless it was removed or replaced since it was looked at.
    pub(crate) fn condemn(&self, generation: u64, damage: &DamagedChunk) -> bool {
        let condemned = self.catalogue.lock().condemn(generation, damage.clone());
        if condemned {
            tracing::warn!(
                key = %damage.key, layer = damage.layer, expected = damage.expected, found = damage.found,
                "damaged chunk"
            );
        }
        condemned
    }
}

impl std::fmt::Debug for ChunkStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkStore")
            .field("path", &self.backend.path())
            .field("shape", &self.shape)
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}

pub(crate) fn damage(key: ChunkKey, layer: Option<u32>, error: FormatError) -> DamagedChunk {
    DamagedChunk { key, layer, expected: error.expected, found: error.found }
}

fn corrupt(damage: DamagedChunk) -> StoreError {
    StoreError::Corrupt { key: damage.key, layer: damage.layer, expected: damage.expected, found: damage.found }
}

pub(crate) fn now_micros() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
}
