//! Chunks in the GPU's memory, as they were computed: keys not rotated, so that they fit any place in any prompt.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use super::ranges::Ranges;
use crate::backend::cuda::{CudaModel, Mark, Memory};
use crate::chunk::ChunkLayer;
use crate::error::Result;

/// A part of the GPU's memory that is for chunks.
pub(crate) struct DeviceArena {
    memory: Memory,
    free: Mutex<Ranges>,
}

impl DeviceArena {
    pub(crate) fn new(memory: Memory) -> Arc<DeviceArena> {
        let mut free = Ranges::default();
        free.give(0, memory.bytes() as u64);
        Arc::new(DeviceArena { memory, free: Mutex::new(free) })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.memory.bytes() as u64
    }

    /// Where it begins.
    pub(crate) fn address(&self) -> u64 {
        self.memory.address()
    }

    pub(super) fn take(self: &Arc<Self>, bytes: u64) -> Option<DevicePart> {
        let at = self.free.lock().unwrap_or_else(PoisonError::into_inner).take(bytes)?;
        Some(DevicePart { arena: Arc::clone(self), at, bytes })
    }
}

/// Memory of a chunk, given back when the last request that reads it has let go. Requests read on the stream of the kernels,
/// and what comes in next waits for that.
pub(super) struct DevicePart {
    arena: Arc<DeviceArena>,
    at: u64,
    bytes: u64,
}

impl Drop for DevicePart {
    fn drop(&mut self) {
        self.arena.free.lock().unwrap_or_else(PoisonError::into_inner).give(self.at, self.bytes);
    }
}

/// A whole chunk: keys, then values of all layers, `[layers][2][tokens, kv_heads, head_dim]` in the KV format.
pub(crate) struct DeviceChunk {
    part: DevicePart,
    layers: usize,
    /// Behind the copy that brings it.
    come: Mark,
}

impl DeviceChunk {
    /// Brings a chunk over, beside the kernels. Its bytes stay where they are until they have been copied.
    pub(super) fn bring(model: &CudaModel, part: DevicePart, whole: &Arc<super::HostChunk>) -> Result<DeviceChunk> {
        let come = model.copies().bring_chunk(whole, &part.arena.memory, part.at as usize)?;
        Ok(DeviceChunk { part, layers: model.shape.layers, come })
    }

    /// Kernels that are launched from now on find it.
    pub(crate) fn hold(&self, model: &CudaModel) -> Result<()> {
        self.come.hold(model.device.stream())
    }

    /// Its first byte, counted from the memory's first.
    pub(crate) fn offset(&self) -> u64 {
        self.part.at
    }

    /// A layer, brought back to the host.
    pub(crate) fn read(&self, model: &CudaModel, layer: usize) -> Result<ChunkLayer> {
        self.hold(model)?;
        let each = self.part.bytes as usize / self.layers;
        let mut both = vec![0u8; each];
        self.part.arena.memory.read(self.part.at as usize + layer * each, &mut both)?;
        let mut keys = Bytes::from(both);
        let values = keys.split_off(each / 2);
        Ok(ChunkLayer::raw(keys, values))
    }
}
