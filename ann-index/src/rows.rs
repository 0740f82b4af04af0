//! Append-only storage of fixed-length rows that readers use without a lock.
//!
//! Rows lie in blocks that never move. The first block holds exactly the rows known at the start;
//! every later block is twice as large as the one before. A row is written before the length that
//! covers it is published, and is never written again: a reader that stays below a length it has
//! read sees only finished rows.

use std::alloc::{self, Layout};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::element::Element;
use crate::error::IndexError;

/// Rows in the first block that appending adds.
const GROWTH: usize = 256;
/// Block 0 and enough doublings for every id.
const BLOCKS: usize = 27;
/// Most rows that can be held: ids are `u32`, and the largest one stays free as a mark.
const MAX_ROWS: usize = u32::MAX as usize;

/// See the module. `T` is the stored type of a number.
pub(crate) struct Rows<T> {
    dim: usize,
    /// Places of a row.
    stride: usize,
    first: usize,
    blocks: [OnceLock<Block<T>>; BLOCKS],
    len: AtomicUsize,
    writer: Mutex<()>,
}

impl<T: Element> Rows<T> {
    /// Storage for rows of `dim` numbers, laid out so that the first `expected` are contiguous.
    pub(crate) fn new(dim: usize, expected: usize) -> Self {
        Self {
            dim,
            stride: T::stride(dim),
            first: expected,
            blocks: [const { OnceLock::new() }; BLOCKS],
            len: AtomicUsize::new(0),
            writer: Mutex::new(()),
        }
    }

    pub(crate) fn dim(&self) -> usize {
        self.dim
    }

    /// How many rows are finished.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    /// Bytes of one row.
    pub(crate) fn row_bytes(&self) -> usize {
        self.stride * size_of::<T>()
    }

    /// Bytes of all blocks.
    pub(crate) fn memory_bytes(&self) -> usize {
        let blocks = self.blocks.iter().filter_map(OnceLock::get);
        blocks.map(|block| block.layout.size()).sum()
    }

    /// Row `id`, which must be below [`Rows::len`].
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

    /// Rounds rows of `dim` numbers to the stored type and adds them; returns the first new id.
    /// Either all of them appear or, when there are too many, none.
    pub(crate) fn append(&self, values: &[f32]) -> Result<usize, IndexError> {
        // The lock guards no data that a panic could leave half done.
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let start = self.len.load(Ordering::Relaxed);
        let end = start + values.len() / self.dim;
        if end > MAX_ROWS {
            return Err(IndexError::Full { found: end, limit: MAX_ROWS });
        }
        if let Some(at) = values.iter().position(|x| x.abs() > T::LARGEST) {
            let (row, column) = (at / self.dim, at % self.dim);
            return Err(IndexError::TooLarge { row, column, value: values[at], limit: T::LARGEST });
        }
        let mut encoded = vec![T::default(); self.stride];
        for (id, value) in (start..).zip(values.chunks_exact(self.dim)) {
            T::encode(value, &mut encoded);
            let (block, offset) = self.locate(id);
            let rows = self.block_rows(block);
            let memory = self.blocks[block].get_or_init(|| Block::new(rows * self.stride));
            // SAFETY: `offset < rows`, so the row lies inside the block; only the holder of the
            // writer lock writes, and no reader looks at rows from `len` on.
            unsafe {
                let place = memory.start.add(offset * self.stride);
                place.copy_from_nonoverlapping(NonNull::from(&encoded[..]).cast(), self.stride);
            }
        }
        self.len.store(end, Ordering::Release);
        Ok(start)
    }

    /// Block and row within it of row `id`.
    #[inline]
    fn locate(&self, id: usize) -> (usize, usize) {
        if id < self.first {
            return (0, id);
        }
        let beyond = id - self.first;
        let doubling = (beyond / GROWTH + 1).ilog2() as usize;
        (doubling + 1, beyond - GROWTH * ((1 << doubling) - 1))
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

/// Zeroed memory for numbers, aligned to a cache line.
struct Block<T> {
    start: NonNull<T>,
    layout: Layout,
}

impl<T: Element> Block<T> {
    fn new(numbers: usize) -> Self {
        let layout = Layout::array::<T>(numbers).and_then(|layout| layout.align_to(64));
        let layout = layout.expect("a block fits the address space");
        assert!(layout.size() > 0, "a block is never empty");
        // SAFETY: the layout's size was just checked not to be zero.
        let memory = unsafe { alloc::alloc_zeroed(layout) };
        match NonNull::new(memory.cast()) {
            Some(start) => Self { start, layout },
            None => alloc::handle_alloc_error(layout),
        }
    }
}

impl<T> Drop for Block<T> {
    fn drop(&mut self) {
        // SAFETY: the memory came from `alloc_zeroed` with this very layout.
        unsafe { alloc::dealloc(self.start.as_ptr().cast(), self.layout) }
    }
}

// SAFETY: a block owns its memory alone, and its numbers are plain values.
unsafe impl<T: Send> Send for Block<T> {}
// SAFETY: `Rows` lets one writer at a time write, and only places that no reader looks at yet.
unsafe impl<T: Sync> Sync for Block<T> {}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use half::bf16;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn rows_come_back_whatever_the_blocks(
            dim in 1usize..5,
            expected in 0usize..700,
            batches in prop::collection::vec(0usize..900, 0..6),
        ) {
            let rows = Rows::<f32>::new(dim, expected);
            let mut all: Vec<f32> = Vec::new();
            for batch in batches {
                let new: Vec<f32> = (0..batch * dim).map(|i| (all.len() + i) as f32).collect();
                prop_assert_eq!(rows.append(&new).unwrap() * dim, all.len());
                all.extend(new);
            }
            prop_assert_eq!(rows.len() * dim, all.len());
            for id in 0..rows.len() {
                prop_assert_eq!(rows.row(id), &all[id * dim..(id + 1) * dim]);
            }
            let mut joined = Vec::new();
            for (start, run) in rows.runs(rows.len()) {
                prop_assert_eq!(start * dim, joined.len());
                joined.extend_from_slice(run);
            }
            prop_assert_eq!(joined, all);
        }
    }

    #[test]
    fn expected_rows_lie_in_one_aligned_run_without_waste() {
        let rows = Rows::<bf16>::new(3, 1000);
        rows.append(&[1.0; 3000]).unwrap();
        assert_eq!(rows.runs(1000).count(), 1);
        assert_eq!(rows.memory_bytes(), 6000);
        assert_eq!(rows.row(0).as_ptr() as usize % 64, 0);
    }

    #[test]
    #[should_panic(expected = "row 2 of 2")]
    fn an_unfinished_row_is_never_shown() {
        let rows = Rows::<f32>::new(1, 10);
        rows.append(&[1.0, 2.0]).unwrap();
        rows.row(2);
    }

    #[test]
    fn the_last_id_has_a_block() {
        let rows = Rows::<f32>::new(1, 0);
        let (block, offset) = rows.locate(MAX_ROWS - 1);
        assert!(block < BLOCKS && offset < rows.block_rows(block));
    }
}
