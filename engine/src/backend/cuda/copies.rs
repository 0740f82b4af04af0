//! Copies between host and GPU that go on beside the kernels: on a stream of their own, through page-locked memory, two of
//! each kind under way.
//!
//! Keys and values of a step leave for the host while the rest of their layer is computed, and cached ones come to the
//! GPU while the rows before them are. Both streams wait for each other by events; the host only for memory of its own.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::device::{Device, Memory, Pinned, failed};
use crate::error::Result;

/// Copies of a kind that are under way at most.
const SLOTS: usize = 2;

/// The stream, and what copies pass through.
pub(crate) struct Copies {
    device: Arc<Device>,
    stream: sys::CUstream,
    /// Bytes of keys, or of values, of one copy at most.
    bytes: usize,
    leaving: [Slot; SLOTS],
    coming: [Slot; SLOTS],
    /// Copies that have been begun towards the GPU.
    begun: usize,
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
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("make a stream"))?;
        let (leaving, coming) = Default::default();
        Ok(Copies { device: Arc::clone(device), stream, bytes, leaving, coming, begun: 0 })
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

    /// Brings keys and values to the next of the GPU's two memories, each of which has room for keys, then values. Kernels
    /// that are launched from now on find them there; behind the last that reads them, [`used`](Copies::used) is to be
    /// called. Returns where they lie.
    pub(crate) fn bring(&mut self, keys: &[u8], values: &[u8], to: &[Memory; SLOTS]) -> Result<(u64, u64)> {
        self.begun += 1;
        let (slot, to) = (&mut self.coming[self.begun % SLOTS], &to[self.begun % SLOTS]);
        if let Some(copied) = &slot.copied {
            copied.wait()?;
        }
        if let Some(used) = &slot.used {
            used.hold(self.stream)?;
        }
        let pinned = slot.pinned(&self.device, 2 * self.bytes)?.bytes_mut();
        for (part, from) in [keys, values].into_iter().enumerate() {
            let at = part * self.bytes..part * self.bytes + from.len();
            pinned[at.clone()].copy_from_slice(from);
            to.write_on(self.stream, at.start, &pinned[at])?;
        }
        let copied = Mark::behind(self.stream)?;
        copied.hold(self.device.stream())?;
        slot.copied = Some(copied);
        Ok((to.at::<u8>(0), to.at::<u8>(self.bytes)))
    }

    /// What was brought last has been read by the kernels so far.
    pub(crate) fn used(&mut self) -> Result<()> {
        self.coming[self.begun % SLOTS].used = Some(Mark::behind(self.device.stream())?);
        Ok(())
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: made by `new`, destroyed once; nothing may be under way when page-locked memory is freed behind this.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            let _ = result::stream::destroy(self.stream);
        }
    }
}

/// A point in a stream's work, which the host or another stream can wait for.
struct Mark(sys::CUevent);

impl Mark {
    /// Behind all work of a stream so far.
    fn behind(stream: sys::CUstream) -> Result<Mark> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        let mark = Mark(event.map_err(failed("make an event"))?);
        // SAFETY: both live.
        unsafe { result::event::record(mark.0, stream) }.map_err(failed("record an event"))?;
        Ok(mark)
    }

    /// What is put on `stream` from now on comes behind it.
    fn hold(&self, stream: sys::CUstream) -> Result<()> {
        // SAFETY: both live; an event may be destroyed while streams wait for it.
        unsafe { result::stream::wait_event(stream, self.0, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) }
            .map_err(failed("let a stream wait"))
    }

    fn wait(&self) -> Result<()> {
        // SAFETY: it lives.
        unsafe { result::event::synchronize(self.0) }.map_err(failed("wait for an event"))
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // SAFETY: made by `behind`, destroyed once.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}
