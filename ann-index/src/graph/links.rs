//! The links of a graph: rows of packed ids.
//!
//! Ids take as many bits as twice the keys at the build need, so that 28 links among 128K keys fit
//! one cache line. Words are atomics: while a key's links change, a search may read some of the old and
//! some of the new ones, and an id that is cut in two. Such an id is either below the length
//! that the search knows, and names some key, or is skipped.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::MmapMut;

use crate::blocks::{Blocks, View};
use crate::error::IndexError;

/// The longest row, in words: 255 ids of 32 bits.
const MOST_WORDS: usize = 128;
/// Bits of an id at least and at most.
pub(super) const ID_BITS: Range<u32> = 10..33;

/// See the module.
pub(super) struct Links {
    degree: usize,
    bits: u32,
    rows: Blocks<AtomicU64>,
}

impl Links {
    /// No rows yet; ids of `bits` bits, of which the largest is no id.
    pub(super) fn new(degree: usize, bits: u32, expected: usize) -> Self {
        Self { degree, bits, rows: Blocks::new(words(degree, bits), expected) }
    }

    /// Rows in a mapped file.
    pub(super) fn mapped(degree: usize, bits: u32, rows: usize, map: &Arc<MmapMut>, offset: usize) -> Option<Self> {
        Some(Self { degree, bits, rows: Blocks::mapped(words(degree, bits), rows, map, offset)? })
    }

    /// Bits that leave room for twice as many keys.
    pub(super) fn bits_for(keys: usize) -> u32 {
        (2 * keys as u64).next_power_of_two().ilog2().clamp(ID_BITS.start, ID_BITS.end - 1)
    }

    /// Whether that many keys can be told apart.
    pub(super) fn fits(&self, keys: usize) -> bool {
        keys < 1 << self.bits
    }

    pub(super) fn degree(&self) -> usize {
        self.degree
    }

    pub(super) fn bits(&self) -> u32 {
        self.bits
    }

    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    pub(super) fn row_bytes(&self) -> usize {
        self.rows.stride() * size_of::<u64>()
    }

    /// Bytes of a row of such links.
    pub(super) fn row_bytes_of(degree: usize, bits: u32) -> usize {
        words(degree, bits) * size_of::<u64>()
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.rows.memory_bytes()
    }

    pub(super) fn rows(&self) -> &Blocks<AtomicU64> {
        &self.rows
    }

    pub(super) fn view(&self) -> LinksView<'_> {
        LinksView { rows: self.rows.view(), degree: self.degree, bits: self.bits }
    }

    /// A copy whose ids can number twice `keys`.
    pub(super) fn widened(&self, keys: usize) -> Result<Self, IndexError> {
        let wide = Self::new(self.degree, Self::bits_for(keys), self.len());
        wide.append(self.len())?;
        let (view, mut list) = (self.view(), Vec::new());
        for id in 0..self.len() as u32 {
            view.read(id, &mut list);
            wide.set(id, &list);
        }
        Ok(wide)
    }

    /// Adds rows without links.
    pub(super) fn append(&self, count: usize) -> Result<(), IndexError> {
        self.rows.append(count, |_, row| row.fill_with(|| AtomicU64::new(u64::MAX))).map(|_| ())
    }

    /// Writes the links of a key; one thread at a time per key. More than the degree are left out.
    pub(super) fn set(&self, id: u32, links: &[u32]) {
        let row = self.rows.row(id as usize);
        let mut words = [u64::MAX; MOST_WORDS];
        let mask = (1u64 << self.bits) - 1;
        for (i, &link) in links.iter().take(self.degree).enumerate() {
            let bit = i * self.bits as usize;
            let (word, shift) = (bit / 64, bit % 64);
            words[word] = words[word] & !(mask << shift) | u64::from(link) << shift;
            if shift + self.bits as usize > 64 {
                let rest = 64 - shift;
                words[word + 1] = words[word + 1] & !(mask >> rest) | u64::from(link) >> rest;
            }
        }
        for (place, &word) in row.iter().zip(&words) {
            place.store(word, Ordering::Relaxed);
        }
    }
}

fn words(degree: usize, bits: u32) -> usize {
    (degree * bits as usize).div_ceil(64)
}

/// The rows that were there when the view was taken.
pub(super) struct LinksView<'a> {
    rows: View<'a, AtomicU64>,
    degree: usize,
    bits: u32,
}

impl LinksView<'_> {
    #[inline]
    pub(super) fn prefetch(&self, id: u32) {
        self.rows.prefetch(id as usize);
    }

    /// Calls `visit` with each link of a key.
    #[inline]
    pub(super) fn for_each(&self, id: u32, mut visit: impl FnMut(u32)) {
        let row = self.rows.row(id as usize);
        let mut words = [0u64; MOST_WORDS + 1];
        for (to, from) in words.iter_mut().zip(row) {
            *to = from.load(Ordering::Relaxed);
        }
        let mask = (1u64 << self.bits) - 1;
        let mut bit = 0;
        for _ in 0..self.degree {
            let (word, shift) = (bit / 64, bit % 64);
            let link = (words[word] >> shift | words[word + 1] << 1 << (63 - shift)) & mask;
            if link == mask {
                return;
            }
            visit(link as u32);
            bit += self.bits as usize;
        }
    }

    /// The links of a key, into `out`, which is emptied first.
    pub(super) fn read(&self, id: u32, out: &mut Vec<u32>) {
        out.clear();
        self.for_each(id, |link| out.push(link));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn links_come_back(degree in 4usize..256, bits in ID_BITS, seeds in prop::collection::vec(any::<u32>(), 0..300)) {
            let links = Links::new(degree, bits, 3);
            links.append(3).unwrap();
            let most = ((1u64 << bits) - 2) as u32;
            let ids: Vec<u32> = seeds.iter().map(|s| s % most).collect();
            for count in [ids.len(), ids.len() / 2, 0] {
                links.set(1, &ids[..count]);
                let mut out = vec![7];
                links.view().read(1, &mut out);
                prop_assert_eq!(&out[..], &ids[..count.min(degree)]);
                links.view().read(2, &mut out);
                prop_assert!(out.is_empty());
            }
        }
    }

    #[test]
    fn ids_get_room_to_grow() {
        assert_eq!(Links::bits_for(131_072), 18);
        assert_eq!(words(28, 18) * 8, 64);
        assert!(Links::new(4, Links::bits_for(1000), 0).fits(2000));
    }
}
