//! Append-only storage of fixed-length rows that readers use without a lock.
//!
//! Rows lie in blocks that never move. The first block holds exactly the rows known at the start, in
//! memory of its own or in a mapped file; every later block is twice as large as the one before. A row is
//! written before the length that covers it is published, and is never written again: a reader that
//! stays below a length it has read sees only finished rows. (Rows of atomics may change later.)

use std::alloc::{self, Layout};
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use memmap2::MmapMut;

use crate::error::IndexError;

/// Rows in the first block that appending adds.
const GROWTH: usize = 256;
/// Block 0 and enough doublings for every id.
const BLOCKS: usize = 27;
/// Most rows that can be held: ids are `u32`, and the largest one stays free as a mark.
pub(crate) const MAX_ROWS: usize = u32::MAX as usize;
/// From this size on, memory asks for huge pages.
const HUGE: usize = 2 << 20;

/// Numbers that are valid whatever their bits, zero to start with.
///
/// # Safety
/// Every bit pattern is a value, and there is nothing to drop.
pub(crate) unsafe trait Plain: Send + Sync + 'static {}

// SAFETY: all bit patterns of floats are values.
unsafe impl Plain for f32 {}
// SAFETY: all bit patterns of floats are values.
unsafe impl Plain for half::bf16 {}
// SAFETY: all bit patterns of floats are values.
unsafe impl Plain for half::f16 {}
// SAFETY: all bit patterns of integers are values.
unsafe impl Plain for i8 {}
// SAFETY: all bit patterns of integers are values.
unsafe impl Plain for u8 {}
// SAFETY: all bit patterns of integers are values.
unsafe impl Plain for u32 {}
// SAFETY: all bit patterns of integers are values.
unsafe impl Plain for std::sync::atomic::AtomicU64 {}

/// See the module.
pub(crate) struct Blocks<T> {
    stride: usize,
    first: usize,
    blocks: [OnceLock<Block<T>>; BLOCKS],
    len: AtomicUsize,
    writer: Mutex<()>,
}

impl<T: Plain> Blocks<T> {
    /// Storage for rows of `stride` places, laid out so that the first `expected` are contiguous.
    pub(crate) fn new(stride: usize, expected: usize) -> Self {
        Self {
            stride,
            first: expected,
            blocks: [const { OnceLock::new() }; BLOCKS],
            len: AtomicUsize::new(0),
            writer: Mutex::new(()),
        }
    }

    /// Rows that lie in a mapped file from byte `offset` on, which is aligned for `T`. `None` when the file
    /// is shorter.
    pub(crate) fn mapped(stride: usize, rows: usize, map: &Arc<MmapMut>, offset: usize) -> Option<Self> {
        let blocks = Self::new(stride, rows);
        if rows > 0 {
            let block = Block::mapped(map, offset, stride.checked_mul(rows)?)?;
            blocks.blocks[0].set(block).ok()?;
        }
        blocks.len.store(rows, Ordering::Release);
        Some(blocks)
    }

    /// Places of a row.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// How many rows are finished.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    /// Bytes of all blocks.
    pub(crate) fn memory_bytes(&self) -> usize {
        let blocks = self.blocks.iter().filter_map(OnceLock::get);
        blocks.map(|block| block.layout.size()).sum()
    }

    /// Row `id`, which must be below [`Blocks::len`].
    #[inline]
    pub(crate) fn row(&self, id: usize) -> &[T] {
        let (block, offset) = self.locate(id);
        self.run(block, offset, 1, id + 1)
    }

    /// The contiguous runs that cover rows `0..len`, each with the id of its first row.
    pub(crate) fn runs(&self, len: usize) -> impl Iterator<Item = (usize, &[T])> {
        let mut start = 0;
        std::iter::from_fn(move || {
            if start >= len {
                return None;
            }
            let (block, offset) = self.locate(start);
            let count = (self.block_rows(block) - offset).min(len - start);
            let run = (start, self.run(block, offset, count, start + count));
            start += count;
            Some(run)
        })
    }

    /// All finished rows, found without looking at the blocks again.
    pub(crate) fn view(&self) -> View<'_, T> {
        let len = self.len();
        let start =
            |block: &OnceLock<Block<T>>| block.get().map_or(std::ptr::null(), |b| b.start.as_ptr().cast_const());
        View {
            starts: self.blocks.each_ref().map(start),
            first: self.first,
            stride: self.stride,
            len,
            rows: PhantomData,
        }
    }

    /// Adds `count` rows; `fill` gets the number of each, from 0, and its zeroed places. Returns the
    /// first new id. Either all rows appear or, when there are too many, none.
    pub(crate) fn append(&self, count: usize, mut fill: impl FnMut(usize, &mut [T])) -> Result<usize, IndexError> {
        // The lock guards no data that a panic could leave half done.
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let start = self.len.load(Ordering::Relaxed);
        let end = start + count;
        if end > MAX_ROWS {
            return Err(IndexError::Full { found: end, limit: MAX_ROWS });
        }
        for i in 0..count {
            let (block, offset) = self.locate(start + i);
            let rows = self.block_rows(block);
            let memory = self.blocks[block].get_or_init(|| Block::new(rows * self.stride));
            // SAFETY: `offset < rows`, so the row lies inside the block, whose memory began as zeros;
            // only the holder of the writer lock writes, and no reader looks at rows from `len` on.
            let row = unsafe {
                let place = memory.start.add(offset * self.stride);
                std::slice::from_raw_parts_mut(place.as_ptr(), self.stride)
            };
            fill(i, row);
        }
        self.len.store(end, Ordering::Release);
        Ok(start)
    }

    /// Block and row within it of row `id`.
    #[inline]
    fn locate(&self, id: usize) -> (usize, usize) {
        locate(self.first, id)
    }

    fn block_rows(&self, block: usize) -> usize {
        match block {
            0 => self.first,
            _ => GROWTH << (block - 1),
        }
    }

    /// `count` rows of a block from row `offset` on; `end` is one more than the last one's id.
    #[inline]
    fn run(&self, block: usize, offset: usize, count: usize, end: usize) -> &[T] {
        let len = self.len();
        assert!(end <= len, "row {} of {len} was asked for", end - 1);
        let memory = self.blocks[block].get();
        let memory = memory.expect("a block exists before a length covers it");
        // SAFETY: `locate` keeps `offset + count` within the block; all rows below `len` were
        // written before `len` was published with release order, and are never written again.
        unsafe {
            let start = memory.start.add(offset * self.stride);
            std::slice::from_raw_parts(start.as_ptr(), count * self.stride)
        }
    }
}

/// Block and row within it of row `id`, where the first block has `first` rows.
#[inline]
fn locate(first: usize, id: usize) -> (usize, usize) {
    if id < first {
        return (0, id);
    }
    let beyond = id - first;
    let doubling = (beyond / GROWTH + 1).ilog2() as usize;
    (doubling + 1, beyond - GROWTH * ((1 << doubling) - 1))
}

/// The rows below a length, and where their blocks begin.
pub(crate) struct View<'a, T> {
    starts: [*const T; BLOCKS],
    first: usize,
    stride: usize,
    len: usize,
    rows: PhantomData<&'a [T]>,
}

impl<'a, T> View<'a, T> {
    /// How many rows it shows.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Row `id`, which must be below [`View::len`].
    #[inline]
    pub(crate) fn row(&self, id: usize) -> &'a [T] {
        assert!(id < self.len, "row {id} of {} was asked for", self.len);
        // SAFETY: the row is finished, so its block exists and `locate` keeps within it; finished
        // rows are not written again.
        unsafe { std::slice::from_raw_parts(self.start(id), self.stride) }
    }

    /// Brings the cache lines of row `id` closer; any id will do.
    #[inline]
    pub(crate) fn prefetch(&self, id: usize) {
        #[cfg(target_arch = "x86_64")]
        if id < self.len {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let start = self.start(id).cast::<i8>();
            let bytes = self.stride * size_of::<T>();
            for at in (0..bytes).step_by(64) {
                // SAFETY: the place lies inside the row; prefetching has no other effect.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(start.add(at)) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = id;
    }

    #[inline]
    fn start(&self, id: usize) -> *const T {
        let (block, offset) = locate(self.first, id);
        self.starts[block].wrapping_add(offset * self.stride)
    }
}

// SAFETY: a view is a shared borrow of rows.
unsafe impl<T: Plain> Send for View<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Plain> Sync for View<'_, T> {}

/// Memory for numbers, aligned to a cache line when it is its own.
struct Block<T> {
    start: NonNull<T>,
    layout: Layout,
    /// The file it lies in.
    map: Option<Arc<MmapMut>>,
}

impl<T: Plain> Block<T> {
    /// Zeroed memory.
    fn new(numbers: usize) -> Self {
        let layout = Layout::array::<T>(numbers).ok();
        let align = if numbers * size_of::<T>() >= HUGE { HUGE } else { 64 };
        let layout = layout.and_then(|layout| layout.align_to(align).ok());
        let layout = layout.expect("a block fits the address space");
        assert!(layout.size() > 0, "a block is never empty");
        // SAFETY: the layout's size was just checked not to be zero.
        let memory = unsafe { alloc::alloc(layout) };
        let Some(start) = NonNull::new(memory) else { alloc::handle_alloc_error(layout) };
        #[cfg(target_os = "linux")]
        if layout.size() >= HUGE {
            // SAFETY: whole pages of memory that is ours; advice changes no content. That it is
            // refused where there are no huge pages does not matter.
            unsafe { libc::madvise(memory.cast(), layout.size() / HUGE * HUGE, libc::MADV_HUGEPAGE) };
        }
        // SAFETY: `layout.size()` bytes are ours.
        unsafe { start.write_bytes(0, layout.size()) };
        Self { start: start.cast(), layout, map: None }
    }

    /// Numbers inside a mapped file.
    fn mapped(map: &Arc<MmapMut>, offset: usize, numbers: usize) -> Option<Self> {
        let layout = Layout::array::<T>(numbers).ok()?;
        let end = offset.checked_add(layout.size())?;
        let bytes = map.get(offset..end)?;
        if bytes.as_ptr().addr() % align_of::<T>() != 0 {
            return None;
        }
        let start = NonNull::new(bytes.as_ptr().cast_mut().cast())?;
        Some(Self { start, layout, map: Some(Arc::clone(map)) })
    }
}

impl<T> Drop for Block<T> {
    fn drop(&mut self) {
        if self.map.is_none() {
            // SAFETY: the memory came from `alloc` with this very layout.
            unsafe { alloc::dealloc(self.start.as_ptr().cast(), self.layout) }
        }
    }
}

// SAFETY: a block owns its memory, or shares in a map that nothing else writes to, and its numbers are
// plain values.
unsafe impl<T: Plain> Send for Block<T> {}
// SAFETY: `Blocks` lets one writer at a time write, and only places that no reader looks at yet;
// numbers that change later are atomics.
unsafe impl<T: Plain> Sync for Block<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_id_has_a_block() {
        let rows = Blocks::<f32>::new(1, 0);
        let (block, offset) = rows.locate(MAX_ROWS - 1);
        assert!(block < BLOCKS && offset < rows.block_rows(block));
    }
}
