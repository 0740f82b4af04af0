//! Copies between host and GPU that go on beside the kernels: on a stream of their own, through page-locked memory, two of
//! each kind under way.
//!
//! Keys and values of a step leave for the host while the rest of their layer is computed, and cached ones come to the
//! GPU while the rows before them are. From page-locked memory they come without a CPU's touch, and a third stream writes them
//! to the pages: so the layers of a context come one behind the other, however long it takes to compute with them. The
//! streams wait for each other by events; the host only for memory of its own.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use bytes::Bytes;

use super::device::{Device, Memory, Pinned, failed};
use crate::error::Result;
use crate::tiers::HostChunk;

/// Copies of a kind that are under way at most.
const SLOTS: usize = 2;

/// The stream, and what copies pass through.
pub(crate) struct Copies {
    device: Arc<Device>,
    stream: sys::CUstream,
    /// For kernels that read what has come.
    arrivals: sys::CUstream,
    /// Bytes of keys, or of values, of one copy at most.
    bytes: usize,
    leaving: [Slot; SLOTS],
    coming: [Slot; SLOTS],
    /// Copies that have been begun towards the GPU.
    begun: usize,
    /// Bytes of the one that is being put together.
    filled: usize,
    /// Memory that copies read, until they have.
    read: Vec<Bytes>,
    /// Chunks that are copied as a whole, each with a point behind its copy.
    whole: Vec<(Mark, Arc<HostChunk>)>,
}

// SAFETY: handles that the driver guards, used by one thread at a time, behind a mutex.
unsafe impl Send for Copies {}

/// Page-locked memory for keys, then values, and the memory on the GPU that belongs to it.
#[derive(Default)]
struct Slot {
    pinned: Option<Pinned>,
    /// Behind the copy.
    copied: Option<Mark>,
    /// Behind the kernel that reads what came.
    used: Option<Mark>,
}

impl Slot {
    /// Its memory: taken when first needed, as most engines never do.
    fn pinned(&mut self, device: &Arc<Device>, bytes: usize) -> Result<&mut Pinned> {
        Ok(match &mut self.pinned {
            Some(pinned) => pinned,
            none => none.insert(Pinned::new(device, bytes)?),
        })
    }
}

impl Copies {
    /// `bytes`: of the keys, or of the values, of the longest copy.
    pub(crate) fn new(device: &Arc<Device>, bytes: usize) -> Result<Copies> {
        let stream =
            || result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("make a stream"));
        let (leaving, coming, read, whole) = Default::default();
        let (stream, arrivals, device) = (stream()?, stream()?, Arc::clone(device));
        Ok(Copies { device, stream, arrivals, bytes, leaving, coming, begun: 0, filled: 0, read, whole })
    }

    /// Lets the first `bytes` bytes of keys and of values leave through a slot, once the kernels so far have made them. The
    /// slot's contents must have been [taken](Copies::left).
    pub(crate) fn leave(&mut self, slot: usize, keys: &Memory, values: &Memory, bytes: usize) -> Result<()> {
        Mark::behind(self.device.stream())?.hold(self.stream)?;
        let slot = &mut self.leaving[slot % SLOTS];
        let (to_keys, to_values) = slot.pinned(&self.device, 2 * self.bytes)?.bytes_mut().split_at_mut(self.bytes);
        keys.read_on(self.stream, &mut to_keys[..bytes])?;
        values.read_on(self.stream, &mut to_values[..bytes])?;
        slot.copied = Some(Mark::behind(self.stream)?);
        Ok(())
    }

    /// Kernels that are launched from now on wait for what leaves: they write where it lies.
    pub(crate) fn hold_kernels(&self) -> Result<()> {
        Mark::behind(self.stream)?.hold(self.device.stream())
    }

    /// Waits for what leaves through a slot: keys and values, each with room behind it.
    pub(crate) fn left(&self, slot: usize) -> Result<(&[f32], &[f32])> {
        let slot = &self.leaving[slot % SLOTS];
        if let Some(copied) = &slot.copied {
            copied.wait()?;
        }
        let all = slot.pinned.as_ref().map_or(&[][..], Pinned::bytes);
        let (keys, values) = all.split_at(all.len() / 2);
        Ok((bytemuck::cast_slice(keys), bytemuck::cast_slice(values)))
    }

    /// Bytes that one copy brings at most.
    pub(crate) fn room(&self) -> usize {
        2 * self.bytes
    }

    /// The stream of kernels that read what has come: those that are launched on it from now on come behind what the main
    /// stream has been given so far.
    pub(crate) fn arrivals(&self) -> Result<sys::CUstream> {
        Mark::behind(self.device.stream())?.hold(self.arrivals)?;
        Ok(self.arrivals)
    }

    /// Begins a copy to the next of the GPU's two memories, once what came there before has been read. Its parts are
    /// [brought](Copies::bring) one behind the other; then it has [come](Copies::come).
    pub(crate) fn begin(&mut self) -> Result<()> {
        self.begun += 1;
        self.filled = 0;
        let slot = &self.coming[self.begun % SLOTS];
        slot.used.as_ref().map_or(Ok(()), |used| used.hold(self.stream))
    }

    /// Brings the next bytes. `pinned`: they lie in page-locked memory, and go by themselves; else the host copies them to such
    /// first.
    pub(crate) fn bring(&mut self, from: &Bytes, pinned: bool, to: &[Memory; SLOTS]) -> Result<()> {
        let (slot, to) = (&mut self.coming[self.begun % SLOTS], &to[self.begun % SLOTS]);
        let at = self.filled..self.filled + from.len();
        self.filled = at.end;
        if pinned {
            to.write_on(self.stream, at.start, from)?;
            self.read.push(from.clone());
            return Ok(());
        }
        if let Some(copied) = slot.copied.take() {
            copied.wait()?;
        }
        let pinned = slot.pinned(&self.device, 2 * self.bytes)?.bytes_mut();
        pinned[at.clone()].copy_from_slice(from);
        to.write_on(self.stream, at.start, &pinned[at])
    }

    /// Kernels of the stream of [arrivals](Copies::arrivals) find from now on what was brought; returns where.
    pub(crate) fn come(&mut self, to: &[Memory; SLOTS]) -> Result<u64> {
        let copied = Mark::behind(self.stream)?;
        copied.hold(self.arrivals)?;
        self.coming[self.begun % SLOTS].copied = Some(copied);
        Ok(to[self.begun % SLOTS].address())
    }

    /// What came last has been read by the arrivals' kernels so far. Those of the main stream find what these have written.
    pub(crate) fn used(&mut self) -> Result<()> {
        let used = Mark::behind(self.arrivals)?;
        used.hold(self.device.stream())?;
        self.coming[self.begun % SLOTS].used = Some(used);
        Ok(())
    }

    /// Waits until all that was brought has been copied: the host's memory that it came from may then change.
    pub(crate) fn settle(&mut self) -> Result<()> {
        if !self.read.is_empty() {
            Mark::behind(self.stream)?.wait()?;
            self.read.clear();
        }
        Ok(())
    }

    /// Brings a whole chunk from page-locked memory to byte `at` on, once the kernels so far have read what lies there. Returns a
    /// point behind the copy; until then the chunk stays.
    pub(crate) fn bring_chunk(&mut self, chunk: &Arc<HostChunk>, to: &Memory, at: usize) -> Result<Mark> {
        self.whole.retain(|(copied, _)| !copied.is_over());
        let missing = || crate::EngineError::Internal("a chunk that is not whole was to go to the GPU".into());
        Mark::behind(self.device.stream())?.hold(self.stream)?;
        to.write_on(self.stream, at, chunk.whole().ok_or_else(missing)?)?;
        self.whole.push((Mark::behind(self.stream)?, Arc::clone(chunk)));
        Mark::behind(self.stream)
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: made by `new`, destroyed once; nothing may be under way when page-locked memory is freed behind this.
        unsafe {
            for stream in [self.stream, self.arrivals] {
                let _ = result::stream::synchronize(stream);
                let _ = result::stream::destroy(stream);
            }
        }
    }
}

/// A point in a stream's work, which the host or another stream can wait for.
pub(crate) struct Mark(sys::CUevent);

// SAFETY: a handle that the driver guards.
unsafe impl Send for Mark {}
// SAFETY: as above.
unsafe impl Sync for Mark {}

impl Mark {
    /// Behind all work of a stream so far.
    pub(crate) fn behind(stream: sys::CUstream) -> Result<Mark> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        let mark = Mark(event.map_err(failed("make an event"))?);
        // SAFETY: both live.
        unsafe { result::event::record(mark.0, stream) }.map_err(failed("record an event"))?;
        Ok(mark)
    }

    /// What is put on `stream` from now on comes behind it.
    pub(crate) fn hold(&self, stream: sys::CUstream) -> Result<()> {
        // SAFETY: both live; an event may be destroyed while streams wait for it.
        unsafe { result::stream::wait_event(stream, self.0, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) }
            .map_err(failed("let a stream wait"))
    }

    fn wait(&self) -> Result<()> {
        // SAFETY: it lives.
        unsafe { result::event::synchronize(self.0) }.map_err(failed("wait for an event"))
    }

    /// Whether all that it is behind is done.
    fn is_over(&self) -> bool {
        // SAFETY: it lives.
        unsafe { result::event::query(self.0) }.is_ok()
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // SAFETY: made by `behind`, destroyed once.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}
