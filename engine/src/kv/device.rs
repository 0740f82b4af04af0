//! KV on a GPU: a pool of pages, and the run of pages that one sequence holds.
//!
//! A page is 64 tokens of all layers. In each layer's pool a page is `[2 (K, V)][kv_heads][64][head_dim]` in the KV format,
//! keys rotated: one head's tokens lie side by side, so that a warp reads whole rows of consecutive tokens.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::KvShape;
use crate::backend::cuda::{Device, Memory, Pinned};
use crate::error::{EngineError, Result};

/// Tokens of a page.
pub(crate) const PAGE: usize = 64;
/// Pages that are read at a time.
const STAGED: usize = 64;

/// The pages of one device.
pub(crate) struct DevicePool {
    shape: KvShape,
    device: Arc<Device>,
    /// One allocation a layer.
    layers: Vec<Memory>,
    pages: usize,
    free: Mutex<Vec<u32>>,
}

/// A page, given back when the last run that holds it lets go.
pub(crate) struct DevicePage {
    pool: Arc<DevicePool>,
    id: u32,
}

impl DevicePool {
    /// As many pages as fit into `budget` bytes.
    ///
    /// # Errors
    /// [`EngineError::OutOfMemory`] when not even one fits or the device refuses.
    pub(crate) fn new(device: &Arc<Device>, shape: KvShape, budget: u64) -> Result<Arc<DevicePool>> {
        let page = shape.token_bytes() * PAGE;
        let pages = (budget / page as u64) as usize;
        if pages == 0 {
            return Err(EngineError::OutOfMemory {
                what: "one page of KV on the GPU".into(),
                needed: page as u64,
                budget,
            });
        }
        let layers = (0..shape.layers)
            .map(|_| device.allocate(pages * page / shape.layers, "the pool of KV pages"))
            .collect::<Result<Vec<_>>>()?;
        // Lowest first.
        let free = Mutex::new((0..pages as u32).rev().collect());
        Ok(Arc::new(DevicePool { device: Arc::clone(device), shape, layers, pages, free }))
    }

    pub(crate) fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// A layer's pool.
    pub(crate) fn layer(&self, layer: usize) -> &Memory {
        &self.layers[layer]
    }

    /// Bytes of a page, all layers.
    pub(crate) fn page_bytes(&self) -> usize {
        self.shape.token_bytes() * PAGE
    }

    /// # Errors
    /// [`EngineError::OutOfMemory`] when fewer than `needed` pages are free.
    pub(crate) fn check(&self, needed: usize) -> Result<()> {
        let free = self.pages().1;
        if needed <= free {
            return Ok(());
        }
        let bytes = |pages: usize| (pages * self.page_bytes()) as u64;
        Err(EngineError::OutOfMemory { what: "KV on the GPU".into(), needed: bytes(needed), budget: bytes(free) })
    }

    /// Pages in all, and pages that are free.
    pub(crate) fn pages(&self) -> (usize, usize) {
        (self.pages, self.free.lock().unwrap_or_else(PoisonError::into_inner).len())
    }

    fn take(self: &Arc<Self>) -> Result<Arc<DevicePage>> {
        let id = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let id = id.ok_or_else(|| EngineError::OutOfMemory {
            what: "another page of KV on the GPU".into(),
            needed: self.page_bytes() as u64,
            budget: (self.pages * self.page_bytes()) as u64,
        })?;
        Ok(Arc::new(DevicePage { pool: Arc::clone(self), id }))
    }

    /// A page with the contents of another, in order with other work.
    fn copy(self: &Arc<Self>, page: &DevicePage) -> Result<Arc<DevicePage>> {
        let copy = self.take()?;
        let bytes = self.page_bytes() / self.shape.layers;
        for layer in &self.layers {
            layer.copy_within(page.id as usize * bytes, copy.id as usize * bytes, bytes)?;
        }
        Ok(copy)
    }
}

impl Drop for DevicePage {
    fn drop(&mut self) {
        // Work on the page that is still in flight comes before whatever its next owner does: there is one stream.
        self.pool.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.id);
    }
}

/// KV of the positions `start..end`, all layers. Pages are shared between sequences that forked from one context and copied
/// when written.
#[derive(Clone)]
pub(crate) struct DeviceRun {
    pool: Arc<DevicePool>,
    /// Position of the first slot of the first page.
    first: usize,
    start: usize,
    end: usize,
    pages: VecDeque<Arc<DevicePage>>,
}

impl DeviceRun {
    /// An empty run that begins at position 0.
    pub(crate) fn new(pool: &Arc<DevicePool>) -> DeviceRun {
        DeviceRun { pool: Arc::clone(pool), first: 0, start: 0, end: 0, pages: VecDeque::new() }
    }

    pub(crate) fn pool(&self) -> &Arc<DevicePool> {
        &self.pool
    }

    pub(crate) fn positions(&self) -> Range<usize> {
        self.start..self.end
    }

    /// Position of the first slot of the first page.
    pub(crate) fn first(&self) -> usize {
        self.first
    }

    pub(crate) fn page_count(&self) -> usize {
        self.pages.len()
    }

    /// Pages that no other run holds.
    pub(crate) fn exclusive_pages(&self) -> usize {
        self.pages.iter().filter(|page| Arc::strong_count(page) == 1).count()
    }

    pub(crate) fn pages(&self) -> impl Iterator<Item = u32> {
        self.pages.iter().map(|page| page.id)
    }

    /// Pages that growing by `tokens` takes from the pool.
    pub(crate) fn missing(&self, tokens: usize) -> usize {
        let end = self.end + tokens;
        let new = end.saturating_sub(self.first).div_ceil(PAGE).saturating_sub(self.pages.len());
        new + usize::from(tokens > 0 && self.shares_last())
    }

    /// Whether the page that the next token goes to is another sequence's too.
    fn shares_last(&self) -> bool {
        !self.end.is_multiple_of(PAGE) && self.pages.back().is_some_and(|page| Arc::strong_count(page) > 1)
    }

    /// Grows the run to `end` and makes everything from the old end on this run's own to write.
    ///
    /// # Errors
    /// [`EngineError::OutOfMemory`] when the pool is exhausted; the run is then as it was.
    pub(crate) fn extend_to(&mut self, end: usize) -> Result<()> {
        let before = self.pages.len();
        if end > self.end
            && self.shares_last()
            && let Some(last) = self.pages.back_mut()
        {
            *last = self.pool.copy(last)?;
        }
        while self.first + self.pages.len() * PAGE < end {
            match self.pool.take() {
                Ok(page) => self.pages.push_back(page),
                Err(error) => {
                    self.pages.truncate(before);
                    return Err(error);
                }
            }
        }
        self.end = self.end.max(end);
        Ok(())
    }

    /// Forgets the tokens before `start`; pages that hold nothing else are given back.
    pub(crate) fn drop_before(&mut self, start: usize) {
        self.start = self.start.max(start.min(self.end));
        while !self.pages.is_empty() && self.first + PAGE <= self.start {
            self.pages.pop_front();
            self.first += PAGE;
        }
    }

    /// Forgets the tokens from `end` on. Their pages stay, as room for others.
    pub(crate) fn truncate(&mut self, end: usize) {
        self.end = self.end.min(end.max(self.start));
    }

    /// A run with the tokens before `end` (the sinks), which shares its pages.
    pub(crate) fn head_copy(&self, end: usize) -> DeviceRun {
        let mut copy = self.clone();
        copy.end = end.min(self.end);
        copy.pages.truncate(copy.end.saturating_sub(copy.first).div_ceil(PAGE));
        copy
    }

    /// Appends keys (rotated) and values of the positions of `range` to `layers`, one pair a layer, `[tokens, kv_heads,
    /// head_dim]` in the KV format.
    pub(crate) fn read(&self, range: Range<usize>, layers: &mut [(Vec<u8>, Vec<u8>)]) -> Result<()> {
        let shape = self.pool.shape;
        let half = PAGE * shape.width() * shape.dtype.size();
        let here: Vec<(u32, Range<usize>)> = self
            .pages
            .iter()
            .enumerate()
            .map(|(number, held)| {
                let at = self.first + number * PAGE;
                (held.id, range.start.max(at).saturating_sub(at)..range.end.min(at + PAGE).saturating_sub(at))
            })
            .filter(|(_, slots)| !slots.is_empty())
            .collect();
        // Many pages come over together: one by one, each would be waited for.
        let mut staging = Pinned::new(&self.pool.device, here.len().min(STAGED) * 2 * half)?;
        for (memory, (keys, values)) in self.pool.layers.iter().zip(layers) {
            for here in here.chunks(STAGED) {
                for ((id, _), page) in here.iter().zip(staging.bytes_mut().chunks_exact_mut(2 * half)) {
                    memory.read_later(*id as usize * 2 * half, page)?;
                }
                self.pool.device.synchronize()?;
                for ((_, slots), page) in here.iter().zip(staging.bytes().chunks_exact(2 * half)) {
                    unpack(&shape, &page[..half], slots.clone(), keys);
                    unpack(&shape, &page[half..], slots.clone(), values);
                }
            }
        }
        Ok(())
    }

    /// Tokens that fit into the pages it has.
    pub(crate) fn room(&self) -> usize {
        (self.first + self.pages.len() * PAGE).saturating_sub(self.end)
    }

    /// Page `number` of a run that begins at position 0.
    pub(crate) fn page(&self, number: usize) -> Arc<DevicePage> {
        Arc::clone(&self.pages[number])
    }

    /// Appends a full page to a run that begins at position 0, or puts it in the place of one with the same tokens.
    pub(crate) fn put_page(&mut self, number: usize, page: &Arc<DevicePage>) {
        if number == self.pages.len() {
            self.pages.push_back(Arc::clone(page));
            self.end = (number + 1) * PAGE;
        } else {
            self.pages[number] = Arc::clone(page);
        }
    }
}

/// Slots of a page's keys or values, `[kv_heads][64][head_dim]`, to rows `[slots, kv_heads, head_dim]`.
fn unpack(shape: &KvShape, page: &[u8], slots: Range<usize>, out: &mut Vec<u8>) {
    let size = shape.head_dim * shape.dtype.size();
    for slot in slots {
        for head in 0..shape.kv_heads {
            let at = (head * PAGE + slot) * size;
            out.extend_from_slice(&page[at..at + size]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::KvDtype;

    #[test]
    fn slots_of_a_page_become_rows_of_all_heads() {
        let shape = KvShape { layers: 1, kv_heads: 2, head_dim: 3, dtype: KvDtype::Bf16 };
        // Each byte says where it lies: head, slot, byte of the row.
        let page: Vec<u8> = (0..2 * PAGE * 6).map(|i| (i / (6 * PAGE) * 100 + i / 6 % PAGE + i % 6) as u8).collect();
        let mut out = Vec::new();
        unpack(&shape, &page, 5..7, &mut out);
        let row = |head: u8, slot: u8| (0..6).map(move |byte| head * 100 + slot + byte);
        let expected: Vec<u8> = row(0, 5).chain(row(1, 5)).chain(row(0, 6)).chain(row(1, 6)).collect();
        assert_eq!(out, expected);
    }
}
