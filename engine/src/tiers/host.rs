//! Chunks in the host's memory: page-locked where there is a GPU, so that its copy engine brings them over by itself.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::Bytes;

use super::ranges::Ranges;
use crate::backend::cpu::Isa;
use crate::backend::cuda::{Device, Pinned};
use crate::chunk::{ChunkLayer, ChunkSource, read_layer};
use crate::error::Result;
use crate::kv::KvShape;

/// Bytes that are page-locked at a time. That takes a third of a second, in a thread of its own.
const BLOCK: u64 = 1 << 30;
/// From one block's addresses in `Ranges` to the next: further than any is long.
const APART: u64 = 1 << 40;

/// A chunk whose layers come in as they are first read.
pub(crate) struct HostChunk {
    layers: Vec<Mutex<Option<ChunkLayer>>>,
    there: AtomicUsize,
    /// Room for all layers; `None`: each stays in the memory that it was read into.
    room: Option<Arc<PinnedPart>>,
}

impl HostChunk {
    pub(super) fn new(layers: usize, room: Option<PinnedPart>) -> HostChunk {
        let layers = (0..layers).map(|_| Mutex::new(None)).collect();
        HostChunk { layers, there: AtomicUsize::new(0), room: room.map(Arc::new) }
    }

    /// Whether all of its layers are there.
    pub(crate) fn is_whole(&self) -> bool {
        self.there.load(Ordering::Acquire) == self.layers.len()
    }

    /// Whether the GPU's copy engine reaches it.
    pub(crate) fn is_pinned(&self) -> bool {
        self.room.is_some()
    }

    /// Keys, then values of all layers, `[layers][2][tokens, kv_heads, head_dim]`, where they lie together and are all there.
    pub(crate) fn whole(&self) -> Option<&[u8]> {
        let room = self.room.as_ref().filter(|_| self.is_whole())?;
        // SAFETY: every layer has been written, and none is written again.
        Some(unsafe { std::slice::from_raw_parts(room.start, room.bytes) })
    }

    /// A layer: as it is here, else from `source`. One at a time reads a layer; others wait for it.
    pub(super) fn layer(
        &self,
        source: &dyn ChunkSource,
        isa: Isa,
        shape: &KvShape,
        tokens: usize,
        layer: usize,
    ) -> Result<ChunkLayer> {
        let Some(held) = self.layers.get(layer) else { return read_layer(source, isa, shape, tokens, layer) };
        let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = &*held {
            return Ok(there.clone());
        }
        let read = read_layer(source, isa, shape, tokens, layer)?;
        let read = match &self.room {
            None => read,
            Some(room) => {
                let side = tokens * shape.width() * shape.dtype.size();
                let keys = PinnedPart::put(room, 2 * layer * side, &read.keys);
                ChunkLayer::raw(keys, PinnedPart::put(room, (2 * layer + 1) * side, &read.values))
            }
        };
        self.there.fetch_add(1, Ordering::AcqRel);
        Ok(held.insert(read).clone())
    }
}

/// Page-locked memory for chunks, which grows up to its budget in a thread of its own.
pub(super) struct PinnedMemory {
    blocks: Mutex<Blocks>,
    /// Asks for another block.
    more: Sender<()>,
}

#[derive(Default)]
struct Blocks {
    held: Vec<Pinned>,
    free: Ranges,
    /// Bytes that have not been asked for yet.
    left: u64,
    /// Whether a block is on its way.
    asked: bool,
}

impl PinnedMemory {
    /// Memory of `budget` bytes at most; the first block is on its way when this returns.
    pub(super) fn new(device: &Arc<Device>, budget: u64) -> Result<Arc<PinnedMemory>> {
        let (more, asked) = channel();
        let memory = Arc::new(PinnedMemory { blocks: Mutex::new(Blocks { left: budget, ..Blocks::default() }), more });
        let (grown, device) = (Arc::downgrade(&memory), Arc::clone(device));
        let grow = move || {
            while asked.recv().is_ok() {
                let Some(memory) = Weak::upgrade(&grown) else { return };
                memory.grow(&device);
            }
        };
        let none = |error| {
            crate::EngineError::Internal(format!("the system gives no thread to page-lock memory with: {error}"))
        };
        std::thread::Builder::new().name("quire-pin".into()).spawn(grow).map_err(none)?;
        memory.ask(&mut memory.lock());
        Ok(memory)
    }

    fn lock(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, blocks: &mut Blocks) {
        if blocks.left > 0 && !blocks.asked {
            blocks.asked = self.more.send(()).is_ok();
        }
    }

    /// Takes another block. What the system refuses is not asked for again.
    fn grow(&self, device: &Arc<Device>) {
        let bytes = self.lock().left.min(BLOCK);
        let taken = device.bind().and_then(|()| Pinned::new(device, bytes as usize));
        let mut blocks = self.lock();
        blocks.asked = false;
        match taken {
            Ok(block) => {
                blocks.left -= bytes;
                let start = blocks.held.len() as u64 * APART;
                blocks.free.give(start, bytes);
                blocks.held.push(block);
            }
            Err(error) => {
                tracing::warn!(%error, "no more page-locked memory for chunks");
                blocks.left = 0;
            }
        }
    }

    /// Room for `bytes` bytes; `None`: there is none as yet, or none that is not broken up.
    pub(super) fn take(self: &Arc<Self>, bytes: u64) -> Option<PinnedPart> {
        let mut blocks = self.lock();
        let at = blocks.free.take(bytes);
        // The next one is on its way before this one is full.
        if at.is_none() || blocks.free.bytes() < BLOCK / 2 {
            self.ask(&mut blocks);
        }
        let at = at?;
        let (block, offset) = ((at / APART) as usize, (at % APART) as usize);
        let start = blocks.held[block].start_at(offset);
        Some(PinnedPart { memory: Arc::clone(self), at, start, bytes: bytes as usize })
    }

    /// Whether more of it may come.
    pub(super) fn grows(&self) -> bool {
        let blocks = self.lock();
        blocks.left > 0 || blocks.asked
    }
}

/// A part of page-locked memory, given back when nobody reads it any more.
pub(super) struct PinnedPart {
    memory: Arc<PinnedMemory>,
    at: u64,
    start: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory; who writes which part of it when is said at `put`.
unsafe impl Send for PinnedPart {}
// SAFETY: as above.
unsafe impl Sync for PinnedPart {}

impl PinnedPart {
    /// Copies `from` to byte `at` on, which nobody has been given yet. What is returned keeps the part.
    fn put(this: &Arc<PinnedPart>, at: usize, from: &[u8]) -> Bytes {
        assert!(at + from.len() <= this.bytes, "a layer lies within its chunk");
        // SAFETY: within the part. A layer is written once, by who holds its lock, before it is handed out.
        unsafe { this.start.add(at).copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        Bytes::from_owner(View { part: Arc::clone(this), at, bytes: from.len() })
    }
}

impl Drop for PinnedPart {
    fn drop(&mut self) {
        self.memory.lock().free.give(self.at, self.bytes as u64);
    }
}

/// Bytes of a part that have been written.
struct View {
    part: Arc<PinnedPart>,
    at: usize,
    bytes: usize,
}

impl AsRef<[u8]> for View {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: within the part, written before, and never again.
        unsafe { std::slice::from_raw_parts(self.part.start.add(self.at), self.bytes) }
    }
}
