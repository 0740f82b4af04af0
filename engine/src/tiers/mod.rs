//! Chunks' cached state near to where it is used: in the host's memory, and on the GPU.
//!
//! The first request that uses a chunk reads it from its source, and it stays in the host's memory: page-locked beside a GPU,
//! so that the next request's copy needs no CPU. The second use brings it to the GPU's memory, from where a third takes it
//! without a copy. Each tier has a budget in bytes; [`shelf`] says what makes way. All tiers hold the very bytes of the source,
//! so that an answer does not depend on where a chunk was found.

mod device;
mod host;
mod ranges;
mod shelf;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::backend::cpu::Isa;
use crate::backend::cuda::CudaModel;
use crate::chunk::{ChunkLayer, ChunkSource, read_layer};
use crate::error::Result;
use crate::kv::KvShape;
pub(crate) use device::{DeviceArena, DeviceChunk};
pub(crate) use host::HostChunk;
use host::PinnedMemory;
use shelf::Shelf;

/// Uses of a chunk from which on it is kept on the GPU.
const HOT: u64 = 2;

/// What a chunk is known by, among those of one engine: equal names mean equal bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkName([u8; 32]);

impl ChunkName {
    /// The name for a key, which says everything that the chunk's state depends on, whoever may read it included.
    #[must_use]
    pub fn of(key: &[u8]) -> ChunkName {
        ChunkName(*blake3::hash(key).as_bytes())
    }
}

/// Where a chunk is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// The host's memory.
    Host,
    /// The GPU's memory; without a GPU, the host's.
    Device,
}

/// What a tier holds and has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierLoad {
    /// Chunks in it.
    pub chunks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes that it may hold.
    pub budget: u64,
    /// Chunks that requests have found in it, whole.
    pub hits: u64,
    /// Chunks that made way.
    pub evicted: u64,
}

/// Both tiers of an engine.
pub(crate) struct ChunkTiers {
    shape: KvShape,
    isa: Isa,
    host: Mutex<Shelf<HostChunk>>,
    /// Page-locked memory for the host's; `None`: each chunk stays in the memory that it was read into.
    pinned: Option<Arc<PinnedMemory>>,
    device: Option<(Arc<DeviceArena>, Mutex<Shelf<DeviceChunk>>)>,
    hits: [AtomicU64; 2],
}

/// Where one chunk of a prompt is read from.
pub(crate) struct ChunkReader {
    source: Arc<dyn ChunkSource>,
    name: Option<ChunkName>,
    /// Whether it is used so often that it should be on the GPU.
    hot: bool,
    near: Near,
}

enum Near {
    No,
    Host(Arc<HostChunk>),
    Device(Arc<DeviceChunk>),
}

/// A layer of a chunk, where it was found.
pub(crate) enum CachedLayer {
    /// In ordinary memory.
    Host(ChunkLayer),
    /// In page-locked memory.
    Pinned(ChunkLayer),
    /// On the GPU.
    Device(Arc<DeviceChunk>),
}

impl ChunkTiers {
    /// `budget`: bytes of the host's memory. With a GPU, its memory for chunks.
    pub(crate) fn new(shape: KvShape, isa: Isa, budget: u64, device: Option<&CudaModel>) -> Result<ChunkTiers> {
        let pinned = device.filter(|_| budget > 0).map(|model| PinnedMemory::new(&model.device, budget)).transpose()?;
        let arena = device.and_then(|model| model.chunks.clone());
        Ok(ChunkTiers {
            shape,
            isa,
            host: Mutex::new(Shelf::new(budget)),
            pinned,
            device: arena.map(|arena| (Arc::clone(&arena), Mutex::new(Shelf::new(arena.bytes())))),
            hits: Default::default(),
        })
    }

    fn bytes(&self, tokens: usize) -> u64 {
        (tokens * self.shape.token_bytes()) as u64
    }

    /// A use of a chunk by a request: the nearest place that has it, or will have it once it has been read.
    pub(crate) fn reader(&self, source: &Arc<dyn ChunkSource>) -> ChunkReader {
        let (name, tokens) = (source.name(), source.tokens());
        let (near, hot) = name.map_or((Near::No, false), |name| self.near(&name, tokens));
        match &near {
            Near::Device(_) => drop(self.hits[1].fetch_add(1, Ordering::Relaxed)),
            Near::Host(chunk) if chunk.is_whole() => drop(self.hits[0].fetch_add(1, Ordering::Relaxed)),
            _ => {}
        }
        ChunkReader { source: Arc::clone(source), name, hot, near }
    }

    fn near(&self, name: &ChunkName, tokens: usize) -> (Near, bool) {
        if let Some((chunk, _)) = self.device.as_ref().and_then(|(_, shelf)| lock(shelf).find(name)) {
            // So that it stays in the host's memory as long as it is used.
            let _ = lock(&self.host).find(name);
            return (Near::Device(chunk), true);
        }
        let mut host = lock(&self.host);
        if let Some((chunk, uses)) = host.find(name) {
            return (Near::Host(chunk), uses >= HOT);
        }
        match self.room(&mut host, tokens) {
            None => (Near::No, false),
            Some(chunk) => {
                host.put(*name, Arc::clone(&chunk), self.bytes(tokens));
                (Near::Host(chunk), false)
            }
        }
    }

    /// A place in the host's memory for a chunk that is to be read.
    fn room(&self, host: &mut Shelf<HostChunk>, tokens: usize) -> Option<Arc<HostChunk>> {
        let bytes = self.bytes(tokens);
        if bytes == 0 || !host.make_room(bytes) {
            return None;
        }
        let Some(pinned) = &self.pinned else { return Some(Arc::new(HostChunk::new(self.shape.layers, None))) };
        loop {
            if let Some(part) = pinned.take(bytes) {
                return Some(Arc::new(HostChunk::new(self.shape.layers, Some(part))));
            }
            // Where more memory is on its way, nothing has to leave for it; where none is, the free parts are too small.
            if pinned.grows() || !host.evict() {
                return None;
            }
        }
    }

    /// What a request has read, once it has been read: chunks that are used again and again go on to the GPU.
    pub(crate) fn promote(&self, model: Option<&CudaModel>, readers: &[ChunkReader]) -> Result<()> {
        let Some(model) = model else { return Ok(()) };
        for reader in readers.iter().filter(|reader| reader.hot) {
            if let (Some(name), Near::Host(chunk)) = (&reader.name, &reader.near) {
                self.bring(model, name, chunk)?;
            }
        }
        Ok(())
    }

    /// Brings a chunk to the GPU where there is room for it; whether it is there.
    fn bring(&self, model: &CudaModel, name: &ChunkName, chunk: &Arc<HostChunk>) -> Result<bool> {
        let (Some((arena, shelf)), Some(bytes)) = (&self.device, chunk.whole().map(|all| all.len() as u64)) else {
            return Ok(false);
        };
        let mut shelf = lock(shelf);
        if shelf.has(name) {
            return Ok(true);
        }
        if !shelf.make_room(bytes) {
            return Ok(false);
        }
        let part = loop {
            match arena.take(bytes) {
                Some(part) => break part,
                None if shelf.evict() => {}
                None => return Ok(false),
            }
        };
        shelf.put(*name, Arc::new(DeviceChunk::bring(model, part, chunk)?), bytes);
        Ok(true)
    }

    /// Reads a chunk and keeps it in the host's memory until all are [let go](Self::clear). `None`: there is no room, or the source
    /// has no name.
    ///
    /// # Errors
    /// What keeps the source from being read.
    pub(crate) fn keep(&self, source: &Arc<dyn ChunkSource>) -> Result<Option<ChunkReader>> {
        let reader = self.reader(source);
        let Some(name) = reader.name else { return Ok(None) };
        for layer in 0..self.shape.layers {
            reader.layer(self.isa, &self.shape, layer)?;
        }
        let kept = matches!(reader.near, Near::Device(_)) || lock(&self.host).keep(&name, true);
        Ok(kept.then_some(reader))
    }

    /// Keeps chunks that have been read in the GPU's memory, as far as there is room; without a GPU they stay where they are.
    /// Returns how many it keeps.
    pub(crate) fn keep_on_device(&self, model: Option<&CudaModel>, readers: &[ChunkReader]) -> Result<usize> {
        let Some(model) = model else { return Ok(readers.len()) };
        let mut kept = 0;
        for reader in readers {
            let Some(name) = &reader.name else { continue };
            let there = match &reader.near {
                Near::Host(chunk) => self.bring(model, name, chunk)?,
                Near::Device(_) => true,
                Near::No => false,
            };
            let keeps = || self.device.as_ref().is_some_and(|(_, shelf)| lock(shelf).keep(name, true));
            kept += usize::from(there && keeps());
        }
        Ok(kept)
    }

    /// Lets these chunks go, as their source has.
    pub(crate) fn forget(&self, names: &[ChunkName]) {
        for name in names {
            lock(&self.host).remove(name);
            if let Some((_, shelf)) = &self.device {
                lock(shelf).remove(name);
            }
        }
    }

    /// Lets all chunks make way again that were [kept](Self::keep), and these go at once.
    pub(crate) fn clear(&self) {
        lock(&self.host).clear();
        if let Some((_, shelf)) = &self.device {
            lock(shelf).clear();
        }
    }

    /// What the host's tier and the GPU's hold.
    pub(crate) fn load(&self) -> [TierLoad; 2] {
        let load = |(chunks, bytes, budget, evicted), hits: &AtomicU64| TierLoad {
            chunks,
            bytes,
            budget,
            hits: hits.load(Ordering::Relaxed),
            evicted,
        };
        let device = self.device.as_ref().map_or((0, 0, 0, 0), |(_, shelf)| lock(shelf).totals());
        [load(lock(&self.host).totals(), &self.hits[0]), load(device, &self.hits[1])]
    }
}

impl ChunkReader {
    /// A reader of the source alone.
    pub(crate) fn of(source: &Arc<dyn ChunkSource>) -> ChunkReader {
        ChunkReader { source: Arc::clone(source), name: None, hot: false, near: Near::No }
    }

    /// A layer, from the nearest place.
    ///
    /// # Errors
    /// Whatever keeps the source from being read.
    pub(crate) fn layer(&self, isa: Isa, shape: &KvShape, layer: usize) -> Result<CachedLayer> {
        let (source, tokens) = (self.source.as_ref(), self.source.tokens());
        Ok(match &self.near {
            Near::No => CachedLayer::Host(read_layer(source, isa, shape, tokens, layer)?),
            Near::Host(chunk) if chunk.is_pinned() => {
                CachedLayer::Pinned(chunk.layer(source, isa, shape, tokens, layer)?)
            }
            Near::Host(chunk) => CachedLayer::Host(chunk.layer(source, isa, shape, tokens, layer)?),
            Near::Device(chunk) => CachedLayer::Device(Arc::clone(chunk)),
        })
    }

    /// The chunk on the GPU, where it is there.
    pub(crate) fn on_device(&self) -> Option<&Arc<DeviceChunk>> {
        match &self.near {
            Near::Device(chunk) => Some(chunk),
            _ => None,
        }
    }
}

impl CachedLayer {
    /// The layer's bytes, brought to the host where they are not there.
    pub(crate) fn to_host(&self, model: Option<&CudaModel>, layer: usize) -> Result<ChunkLayer> {
        match (self, model) {
            (CachedLayer::Host(rows) | CachedLayer::Pinned(rows), _) => Ok(rows.clone()),
            (CachedLayer::Device(chunk), Some(model)) => chunk.read(model, layer),
            (CachedLayer::Device(_), None) => {
                Err(crate::EngineError::Internal("a chunk on a GPU with a model on the CPU".into()))
            }
        }
    }
}

fn lock<T>(shelf: &Mutex<Shelf<T>>) -> MutexGuard<'_, Shelf<T>> {
    shelf.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
