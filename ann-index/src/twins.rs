//! Equal keys. A graph links each key to its nearest, and enough equal keys would link to nothing but each
//! other: only the first of equal keys enters a graph, the others are its twins.

use std::collections::HashMap;
use std::collections::hash_map::{DefaultHasher, Entry};
use std::hash::{Hash, Hasher};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use crate::element::Element;
use crate::rows::Rows;

/// Later equal keys, in order of their ids, by the first of them.
pub(crate) type TwinMap = HashMap<u32, Vec<u32>>;

/// The twins of an index.
#[derive(Default)]
pub(crate) struct Twins(RwLock<TwinMap>);

impl Twins {
    /// Twins by the first of them.
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, TwinMap> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds pairs of a first key and its twin; the twins of one key in ascending order.
    pub(crate) fn extend(&self, pairs: &[(u32, u32)]) {
        if pairs.is_empty() {
            return;
        }
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for &(first, twin) in pairs {
            known.entry(first).or_default().push(twin);
        }
    }

    /// Bytes of memory, estimated.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.read().values().map(|ids| 48 + 4 * ids.capacity()).sum()
    }
}

/// The distinct keys; only the appending thread needs it.
#[derive(Default)]
pub(crate) struct Distinct {
    /// The first key with a given hash.
    first: HashMap<u64, u32>,
    /// The distinct keys, in order.
    pub(crate) ids: Vec<u32>,
}

impl Distinct {
    /// The ids among `start..end` that equal no earlier key; the others become twins.
    pub(crate) fn take<T: Element>(&mut self, rows: &Rows<T>, twins: &Twins, start: usize, end: usize) -> Vec<u32> {
        let mut fresh = Vec::with_capacity(end - start);
        let mut pairs: Vec<(u32, u32)> = Vec::new();
        for id in start..end {
            let row = rows.row(id);
            match self.first.entry(hash_row(row)) {
                Entry::Vacant(free) => {
                    free.insert(id as u32);
                    fresh.push(id as u32);
                }
                Entry::Occupied(first) if same_row(rows.row(*first.get() as usize), row) => {
                    pairs.push((*first.get(), id as u32));
                }
                // Two keys share a hash: nothing but a twin that stays unnoticed comes of it.
                Entry::Occupied(_) => fresh.push(id as u32),
            }
        }
        twins.extend(&pairs);
        self.ids.extend(&fresh);
        fresh
    }

    /// Bytes for that many keys: hash, id and control byte, at the map's usual load; and the id.
    pub(crate) fn memory_bytes(keys: usize) -> usize {
        keys * 28
    }
}

/// Equal rows have equal hashes, whichever zeros they hold.
fn hash_row<T: Element>(row: &[T]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for &x in row {
        let bits = if x.to_f32() == 0.0 { 0 } else { x.bits() };
        bits.hash(&mut hasher);
    }
    hasher.finish()
}

/// Whether two rows are equal, whichever zeros they hold.
pub(crate) fn same_row<T: Element>(a: &[T], b: &[T]) -> bool {
    a.iter().zip(b).all(|(x, y)| x.to_f32() == y.to_f32())
}
