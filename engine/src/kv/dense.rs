//! A contiguous run of tokens whose KV is attended exactly: the sinks, the recent window, or everything.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::KvShape;
use super::page::{PAGE, Page};

/// KV of the positions `start..end` of one layer, in pages at multiples of 256.
///
/// Pages are shared between sequences that forked from one context and copied when written.
#[derive(Clone)]
pub(crate) struct DenseKv {
    shape: KvShape,
    /// Position of the first slot of the first page.
    pub(super) first: usize,
    start: usize,
    pub(super) end: usize,
    pub(super) pages: VecDeque<Arc<Page>>,
}

/// A page to be written, and which of some rows lie on it.
pub(crate) struct PageRows<'a> {
    shape: KvShape,
    pub(crate) rows: Range<usize>,
    page: &'a mut Page,
}

impl PageRows<'_> {
    /// Writes the token at `position`: rotated keys and values, `[kv_heads, head_dim]` each.
    pub(crate) fn write(&mut self, position: usize, keys: &[f32], values: &[f32]) {
        self.page.write(&self.shape, position % PAGE, keys, values);
    }

    /// Reads the token at `position`: rotated keys and values, `[kv_heads, head_dim]` each.
    pub(crate) fn read(&self, position: usize, keys: &mut [f32], values: &mut [f32]) {
        self.page.read_all(&self.shape, position % PAGE, keys, values);
    }
}

impl DenseKv {
    /// An empty run that begins at position `start`.
    pub(crate) fn new(shape: KvShape, start: usize) -> DenseKv {
        DenseKv { shape, first: start - start % PAGE, start, end: start, pages: VecDeque::new() }
    }

    pub(crate) fn shape(&self) -> &KvShape {
        &self.shape
    }

    pub(crate) fn positions(&self) -> Range<usize> {
        self.start..self.end
    }

    /// The page that holds `position`, which must lie in a page of this run.
    pub(crate) fn page(&self, position: usize) -> &Page {
        &self.pages[(position - self.first) / PAGE]
    }

    pub(crate) fn page_count(&self) -> usize {
        self.pages.len()
    }

    /// Pages that no other run holds.
    pub(crate) fn exclusive_pages(&self) -> usize {
        self.pages.iter().filter(|page| Arc::strong_count(page) == 1).count()
    }

    /// Grows the run to `end`; the new tokens are zero until written.
    pub(crate) fn extend_to(&mut self, end: usize) {
        while self.first + self.pages.len() * PAGE < end {
            self.pages.push_back(Arc::new(Page::zeroed(&self.shape)));
        }
        self.end = self.end.max(end);
    }

    /// The pages that hold `positions`, ascending and within the run, each with the positions' indexes that fall on it.
    pub(crate) fn pages_mut(&mut self, positions: &[usize]) -> Vec<PageRows<'_>> {
        debug_assert!(positions.iter().all(|p| (self.start..self.end).contains(p)) && positions.is_sorted());
        let (shape, first) = (self.shape, self.first);
        let mut found = Vec::new();
        let mut row = 0;
        for (number, page) in self.pages.iter_mut().enumerate() {
            let end = first + (number + 1) * PAGE;
            let rows = row..row + positions[row..].partition_point(|p| *p < end);
            row = rows.end;
            if !rows.is_empty() {
                found.push(PageRows { shape, rows, page: Arc::make_mut(page) });
            }
        }
        found
    }

    /// Writes one token: rotated keys and values, `[kv_heads, head_dim]` each.
    #[cfg(test)]
    pub(crate) fn write(&mut self, position: usize, keys: &[f32], values: &[f32]) {
        self.pages_mut(&[position])[0].write(position, keys, values);
    }

    /// Reads the token at `position`: rotated keys and values, `[kv_heads, head_dim]` each.
    pub(crate) fn read(&self, position: usize, keys: &mut [f32], values: &mut [f32]) {
        self.page(position).read_all(&self.shape, position % PAGE, keys, values);
    }

    /// Forgets the tokens from `end` on. Their pages stay, as room for others.
    pub(crate) fn truncate(&mut self, end: usize) {
        self.end = self.end.min(end.max(self.start));
    }

    /// Keys and values of one head for `range`, row-major.
    pub(crate) fn rows(&self, head: usize, range: Range<usize>) -> (Vec<f32>, Vec<f32>) {
        let dim = self.shape.head_dim;
        let (mut keys, mut values) = (vec![0.0; range.len() * dim], vec![0.0; range.len() * dim]);
        let rows = keys.chunks_exact_mut(dim).zip(values.chunks_exact_mut(dim));
        for (position, (key, value)) in range.zip(rows) {
            self.page(position).read(&self.shape, head, position % PAGE, key, value);
        }
        (keys, values)
    }

    /// Forgets the tokens before `start`; pages that hold nothing else are freed.
    pub(crate) fn drop_before(&mut self, start: usize) {
        self.start = self.start.max(start.min(self.end));
        while !self.pages.is_empty() && self.first + PAGE <= self.start {
            self.pages.pop_front();
            self.first += PAGE;
        }
    }

    /// A run of its own with the tokens before `end` (the sinks).
    pub(crate) fn head_copy(&self, end: usize) -> DenseKv {
        let mut copy = self.clone();
        copy.end = end.min(self.end);
        copy.pages.truncate((copy.end.saturating_sub(copy.first)).div_ceil(PAGE));
        copy
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::KvDtype;

    #[test]
    fn a_page_is_freed_with_its_last_token_and_no_sooner() {
        let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 16, dtype: KvDtype::F32 };
        let mut run = DenseKv::new(shape, 0);
        run.extend_to(3 * PAGE + 5);
        for position in 0..3 * PAGE + 5 {
            run.write(position, &[position as f32; 16], &[-(position as f32); 16]);
        }
        for (start, pages) in [(0, 4), (PAGE - 1, 4), (PAGE, 3), (PAGE + 1, 3), (3 * PAGE - 1, 2), (3 * PAGE, 1)] {
            run.drop_before(start);
            assert_eq!((run.positions(), run.page_count()), (start..3 * PAGE + 5, pages));
            let (keys, values) = run.rows(0, start..start + 2);
            assert_eq!([keys[0], keys[16]], [start as f32, start as f32 + 1.0]);
            assert_eq!([values[0], values[16]], [-(start as f32), -(start as f32 + 1.0)]);
        }
        run.drop_before(PAGE);
        assert_eq!(run.positions().start, 3 * PAGE, "what is forgotten stays forgotten");
    }
}
