//! Rows of stored numbers: [`Blocks`] that know their precision.

use std::ops::Deref;
use std::sync::Arc;

use memmap2::MmapMut;

use crate::blocks::Blocks;
use crate::element::Element;
use crate::error::IndexError;

/// Stored rows. `T` is the stored type of a number.
pub(crate) struct Rows<T> {
    dim: usize,
    blocks: Blocks<T>,
}

impl<T: Element> Rows<T> {
    /// Storage for rows of `dim` numbers, laid out so that the first `expected` are contiguous.
    pub(crate) fn new(dim: usize, expected: usize) -> Self {
        Self { dim, blocks: Blocks::new(T::stride(dim), expected) }
    }

    /// Rows in a mapped file; see [`Blocks::mapped`].
    pub(crate) fn mapped(dim: usize, rows: usize, map: &Arc<MmapMut>, offset: usize) -> Option<Self> {
        Some(Self { dim, blocks: Blocks::mapped(T::stride(dim), rows, map, offset)? })
    }

    /// The same rows in memory of their own.
    pub(crate) fn copied(&self) -> Result<Self, IndexError> {
        let copy = Self::new(self.dim, self.len());
        copy.blocks.append(self.len(), |i, out| out.copy_from_slice(self.row(i)))?;
        Ok(copy)
    }

    pub(crate) fn dim(&self) -> usize {
        self.dim
    }

    /// Bytes of one row.
    pub(crate) fn row_bytes(&self) -> usize {
        self.stride() * size_of::<T>()
    }

    /// Rounds rows of `dim` numbers to the stored type and adds them; returns the first new id.
    /// Either all of them appear or, when there are too many or one is too large, none.
    pub(crate) fn append(&self, values: &[f32]) -> Result<usize, IndexError> {
        T::check(self.dim, values)?;
        let row = |i: usize| &values[i * self.dim..(i + 1) * self.dim];
        self.blocks.append(values.len() / self.dim, |i, out| T::encode(row(i), out))
    }
}

impl<T> Deref for Rows<T> {
    type Target = Blocks<T>;

    fn deref(&self) -> &Blocks<T> {
        &self.blocks
    }
}

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
}
