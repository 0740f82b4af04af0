//! One GPU: its context, its stream, and memory under a budget.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::{CudaContext, DriverError, result, sys};

use super::probe::require_libraries;
use crate::error::{EngineError, Result};

/// Share of the free memory that is used when no budget is given: the rest is for cuBLASLt, graphs and fragmentation.
const DEFAULT_SHARE: f64 = 0.92;

/// Shared memory that kernels have beside the dynamic part, at most.
const STATIC_SHARED: usize = 8 << 10;

/// A GPU. All kernels go to one stream, in order, and all copies but those that go on beside them (`copies.rs`, `weights.rs`);
/// it is used from one thread at a time, on which [`bind`](Device::bind) has been called.
pub(crate) struct Device {
    context: Arc<CudaContext>,
    stream: sys::CUstream,
    pub(crate) name: String,
    /// Compute capability, major and minor.
    pub(crate) capability: (i32, i32),
    /// Streaming multiprocessors.
    pub(crate) multiprocessors: usize,
    /// Most dynamic shared memory of a block, in bytes.
    pub(crate) shared_memory: usize,
    budget: u64,
    used: AtomicU64,
}

// SAFETY: the stream is a handle that the driver guards; CUDA's calls may come from any thread that has the context.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// What a failed call was for, as an error.
pub(crate) fn failed(action: &'static str) -> impl FnOnce(DriverError) -> EngineError {
    move |error| EngineError::Device { action, reason: error.to_string() }
}

impl Device {
    /// Opens GPU `ordinal`. `budget`: bytes that may be allocated; 0: most of what is free.
    ///
    /// # Errors
    /// [`EngineError::NoDevice`] when a library, the driver or the GPU is missing.
    pub(crate) fn open(ordinal: usize, budget: u64) -> Result<Arc<Device>> {
        require_libraries()?;
        let absent = |e: DriverError| EngineError::NoDevice { why: format!("GPU {ordinal} cannot be opened: {e}") };
        result::init().map_err(absent)?;
        let count = result::device::get_count().map_err(absent)?;
        if ordinal as i64 >= i64::from(count) {
            return Err(EngineError::NoDevice { why: format!("GPU {ordinal} was asked for, the driver has {count}") });
        }
        let context = CudaContext::new(ordinal).map_err(absent)?;
        let capability = context.compute_capability().map_err(absent)?;
        if capability.0 < 8 {
            let why = format!("compute capability 8.0 or later is needed, found {}.{}", capability.0, capability.1);
            return Err(EngineError::NoDevice { why });
        }
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(absent)?;
        let free = result::mem_get_info().map_err(absent)?.0 as u64;
        let count = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let shared = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        Ok(Arc::new(Device {
            name: context.name().map_err(absent)?,
            capability,
            multiprocessors: context.attribute(count).map_err(absent)? as usize,
            // What kernels declare by themselves counts too.
            shared_memory: (context.attribute(shared).map_err(absent)? as usize).saturating_sub(STATIC_SHARED),
            budget: if budget > 0 { budget.min(free) } else { (free as f64 * DEFAULT_SHARE) as u64 },
            used: AtomicU64::new(0),
            context,
            stream,
        }))
    }

    /// Makes this thread one that may use the device.
    pub(crate) fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(failed("make the GPU's context current"))
    }

    pub(crate) fn ordinal(&self) -> usize {
        self.context.ordinal()
    }

    pub(crate) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Bytes that may be allocated, and bytes that are.
    pub(crate) fn memory(&self) -> (u64, u64) {
        (self.budget, self.used.load(Ordering::Relaxed))
    }

    /// Waits until all work so far is done.
    pub(crate) fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("wait for the GPU"))
    }

    /// Memory with undefined contents. `what` names it in the error.
    ///
    /// # Errors
    /// [`EngineError::OutOfMemory`] beyond the budget, or when the device has no more.
    pub(crate) fn allocate(self: &Arc<Self>, bytes: usize, what: &str) -> Result<Memory> {
        let bytes = bytes.max(16);
        let used = self.used.fetch_add(bytes as u64, Ordering::AcqRel);
        let refused = || {
            self.used.fetch_sub(bytes as u64, Ordering::AcqRel);
            let what = format!("{what} on the GPU");
            EngineError::OutOfMemory { what, needed: bytes as u64, budget: self.budget.saturating_sub(used) }
        };
        if used + bytes as u64 > self.budget {
            return Err(refused());
        }
        // SAFETY: the memory is only read after it was written, which is what every kernel's test checks.
        match unsafe { result::malloc_sync(bytes) } {
            Ok(address) => Ok(Memory { device: Arc::clone(self), address, bytes }),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Err(refused()),
            Err(error) => {
                self.used.fetch_sub(bytes as u64, Ordering::AcqRel);
                Err(failed("allocate memory")(error))
            }
        }
    }

    /// Memory with these contents.
    pub(crate) fn upload<T: bytemuck::NoUninit>(self: &Arc<Self>, data: &[T], what: &str) -> Result<Memory> {
        let memory = self.allocate(size_of_val(data), what)?;
        memory.write(0, data)?;
        Ok(memory)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Errors at the end of a process's use of the device help nobody.
        let _ = self.context.bind_to_thread();
        // SAFETY: nothing uses the stream any more.
        let _ = unsafe { result::stream::destroy(self.stream) };
    }
}

/// A piece of device memory, freed when dropped.
pub(crate) struct Memory {
    device: Arc<Device>,
    address: sys::CUdeviceptr,
    bytes: usize,
}

impl Memory {
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// The address of the element number `at`.
    pub(crate) fn at<T>(&self, at: usize) -> u64 {
        debug_assert!(at * size_of::<T>() <= self.bytes);
        self.address + (at * size_of::<T>()) as u64
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies `data` to element `at` on; in order with other work. The host may use `data` again at once.
    pub(crate) fn write<T: bytemuck::NoUninit>(&self, at: usize, data: &[T]) -> Result<()> {
        debug_assert!(at * size_of::<T>() + size_of_val(data) <= self.bytes);
        if data.is_empty() {
            return Ok(());
        }
        // SAFETY: within the allocation; from pageable memory the call returns when `data` has been read.
        unsafe { result::memcpy_htod_async(self.at::<T>(at), data, self.device.stream) }
            .map_err(failed("copy to the GPU"))
    }

    /// Copies from element `at` on into `data` and waits for it.
    pub(crate) fn read<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(
        &self,
        at: usize,
        data: &mut [T],
    ) -> Result<()> {
        debug_assert!(at * size_of::<T>() + size_of_val(data) <= self.bytes);
        if data.is_empty() {
            return Ok(());
        }
        // SAFETY: within the allocation, and the wait below keeps `data` borrowed until it is written.
        unsafe { result::memcpy_dtoh_async(data, self.at::<T>(at), self.device.stream) }
            .map_err(failed("copy from the GPU"))?;
        self.device.synchronize()
    }

    /// Copies from byte `at` on into page-locked memory, in order with other work; the bytes are there once the stream has
    /// been waited for.
    pub(crate) fn read_later(&self, at: usize, data: &mut [u8]) -> Result<()> {
        self.read_part_on(self.device.stream, at, data)
    }

    /// Copies the first bytes into page-locked memory, in order with the work of `stream`.
    pub(crate) fn read_on(&self, stream: sys::CUstream, data: &mut [u8]) -> Result<()> {
        self.read_part_on(stream, 0, data)
    }

    fn read_part_on(&self, stream: sys::CUstream, at: usize, data: &mut [u8]) -> Result<()> {
        debug_assert!(at + data.len() <= self.bytes);
        // SAFETY: within the allocation; page-locked memory is freed by its owner, which waits for the stream.
        unsafe { result::memcpy_dtoh_async(data, self.at::<u8>(at), stream) }.map_err(failed("copy from the GPU"))
    }

    /// Copies page-locked memory to byte `at` on, in order with the work of `stream`; it must not be touched until then.
    pub(crate) fn write_on(&self, stream: sys::CUstream, at: usize, data: &[u8]) -> Result<()> {
        debug_assert!(at + data.len() <= self.bytes);
        // SAFETY: within the allocation.
        unsafe { result::memcpy_htod_async(self.at::<u8>(at), data, stream) }.map_err(failed("copy to the GPU"))
    }

    /// Copies `bytes` bytes from byte `from` to byte `to` of this memory; the ranges must not overlap.
    pub(crate) fn copy_within(&self, from: usize, to: usize, bytes: usize) -> Result<()> {
        debug_assert!(from + bytes <= self.bytes && to + bytes <= self.bytes && from.abs_diff(to) >= bytes);
        let (from, to) = (self.address + from as u64, self.address + to as u64);
        // SAFETY: both within the allocation.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.device.stream) }.map_err(failed("copy on the GPU"))
    }

    /// Copies `bytes` bytes from byte `from` on to byte `to` of other memory.
    pub(crate) fn copy_to(&self, from: usize, other: &Memory, to: usize, bytes: usize) -> Result<()> {
        debug_assert!(from + bytes <= self.bytes && to + bytes <= other.bytes);
        let (from, to) = (self.address + from as u64, other.address + to as u64);
        // SAFETY: within both allocations.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.device.stream) }.map_err(failed("copy on the GPU"))
    }

    /// Sets every byte.
    pub(crate) fn fill(&self, byte: u8) -> Result<()> {
        // SAFETY: within the allocation.
        unsafe { result::memset_d8_async(self.address, byte, self.bytes, self.device.stream) }
            .map_err(failed("clear memory on the GPU"))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.device.used.fetch_sub(self.bytes as u64, Ordering::AcqRel);
        let _ = self.device.context.bind_to_thread();
        // SAFETY: allocated by `allocate`, freed once; `cuMemFree` waits for work that uses it.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Page-locked host memory, for copies that overlap with work.
pub(crate) struct Pinned {
    device: Arc<Device>,
    start: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Pinned {}
// SAFETY: shared references only read.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Zeroed. Ordinary (cached) memory, not write-combined: the CPU reads it too.
    pub(crate) fn new(device: &Arc<Device>, bytes: usize) -> Result<Pinned> {
        let refused = |e: cudarc::driver::DriverError| match e.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => EngineError::OutOfMemory {
                what: "page-locked memory on the host".into(),
                needed: bytes as u64,
                budget: 0,
            },
            _ => failed("take page-locked memory on the host")(e),
        };
        // SAFETY: zeroed below, before anything reads it.
        let start = unsafe { result::malloc_host(bytes.max(16), 0) }.map_err(refused)?.cast::<u8>();
        // SAFETY: just allocated.
        unsafe { start.write_bytes(0, bytes.max(16)) };
        Ok(Pinned { device: Arc::clone(device), start, bytes })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: allocated and initialised.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    /// Its byte `at`, for whoever divides it among several that write.
    pub(crate) fn start_at(&self, at: usize) -> *mut u8 {
        debug_assert!(at <= self.bytes);
        self.start.wrapping_add(at)
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: allocated and initialised, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.device.context.bind_to_thread();
        // SAFETY: allocated by `new`, freed once.
        let _ = unsafe { result::free_host(self.start.cast()) };
    }
}

/// A point in the stream's work, to measure time between.
pub(crate) struct Event(sys::CUevent);

impl Event {
    pub(crate) fn record(device: &Device) -> Result<Event> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(failed("make an event"))?;
        // SAFETY: both were created and live.
        unsafe { result::event::record(event, device.stream) }.map_err(failed("record an event"))?;
        Ok(Event(event))
    }

    /// Seconds from `earlier` to this one; waits for it.
    pub(crate) fn seconds_since(&self, earlier: &Event) -> Result<f64> {
        type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;
        let mut ms = 0.0;
        // SAFETY: both events live; the symbol was found when the driver was looked for (`probe.rs`), and this is its type.
        unsafe {
            result::event::synchronize(self.0).map_err(failed("wait for an event"))?;
            // `cudarc` would call a name that only drivers from CUDA 12.8 on have.
            let elapsed = sys::culib().get::<Elapsed>(b"cuEventElapsedTime");
            let elapsed = elapsed.map_err(|e| EngineError::NoDevice { why: e.to_string() })?;
            elapsed(&mut ms, earlier.0, self.0).result().map_err(failed("read the time between events"))?;
        }
        Ok(f64::from(ms) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created by `record`, destroyed once.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}
