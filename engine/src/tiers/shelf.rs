//! What a tier holds within its budget, and what makes way.
//!
//! The least worth makes way first: how often a chunk was used, counted from the worth that had to leave last (LFU with dynamic
//! aging, Arlitt et al. 2000). What a chunk saves is in proportion to its bytes, so that neither is part of it. A chunk that
//! many use outlives a stream of chunks that are used once; one that nobody uses any more does not stay for ever.

use std::collections::HashMap;
use std::sync::Arc;

use super::ChunkName;

/// Chunks by name.
#[derive(Debug)]
pub(super) struct Shelf<T> {
    budget: u64,
    bytes: u64,
    /// The worth of what left last.
    age: u64,
    entries: HashMap<ChunkName, Entry<T>>,
    evicted: u64,
}

#[derive(Debug)]
struct Entry<T> {
    chunk: Arc<T>,
    bytes: u64,
    uses: u64,
    worth: u64,
    /// It stays until it is let go.
    kept: bool,
}

impl<T> Shelf<T> {
    pub(super) fn new(budget: u64) -> Shelf<T> {
        Shelf { budget, bytes: 0, age: 0, entries: HashMap::new(), evicted: 0 }
    }

    /// Another use of a chunk, and how many that makes; 0 for one that is [kept](Self::keep) here.
    pub(super) fn find(&mut self, name: &ChunkName) -> Option<(Arc<T>, u64)> {
        let entry = self.entries.get_mut(name)?;
        entry.uses += 1;
        entry.worth = self.age + entry.uses;
        Some((Arc::clone(&entry.chunk), if entry.kept { 0 } else { entry.uses }))
    }

    /// Whether it is here; that is no use of it.
    pub(super) fn has(&self, name: &ChunkName) -> bool {
        self.entries.contains_key(name)
    }

    /// Puts in a chunk that has been used once. Room for it has been [made](Self::make_room).
    pub(super) fn put(&mut self, name: ChunkName, chunk: Arc<T>, bytes: u64) {
        self.remove(&name);
        self.bytes += bytes;
        self.entries.insert(name, Entry { chunk, bytes, uses: 1, worth: self.age + 1, kept: false });
    }

    /// Lets chunks go until so many bytes are within the budget. False: they never are, or what is left is in use or kept;
    /// then some may be gone nevertheless.
    pub(super) fn make_room(&mut self, bytes: u64) -> bool {
        if bytes > self.budget {
            return false;
        }
        while self.bytes + bytes > self.budget {
            if !self.evict() {
                return false;
            }
        }
        true
    }

    /// Lets the chunk of least worth go that nobody uses; false: there is none.
    pub(super) fn evict(&mut self) -> bool {
        let idle = self.entries.iter().filter(|(_, entry)| !entry.kept && Arc::strong_count(&entry.chunk) == 1);
        // Names break ties, so that the same uses have the same result.
        let Some((name, worth)) = idle.min_by_key(|(name, entry)| (entry.worth, **name)).map(|(n, e)| (*n, e.worth))
        else {
            return false;
        };
        self.age = self.age.max(worth);
        self.evicted += 1;
        self.remove(&name);
        true
    }

    /// Keeps a chunk whatever comes, or no longer. False: it is not here.
    pub(super) fn keep(&mut self, name: &ChunkName, kept: bool) -> bool {
        self.entries.get_mut(name).map(|entry| entry.kept = kept).is_some()
    }

    pub(super) fn remove(&mut self, name: &ChunkName) {
        if let Some(entry) = self.entries.remove(name) {
            self.bytes -= entry.bytes;
        }
    }

    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.bytes = 0;
    }

    /// Chunks, their bytes, the budget, and how many have made way.
    pub(super) fn totals(&self) -> (u64, u64, u64, u64) {
        (self.entries.len() as u64, self.bytes, self.budget, self.evicted)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(number: u8) -> ChunkName {
        ChunkName::of(&[number])
    }

    fn put(shelf: &mut Shelf<u8>, number: u8, bytes: u64) -> bool {
        let room = shelf.make_room(bytes);
        if room {
            shelf.put(name(number), Arc::new(number), bytes);
        }
        room
    }

    #[test]
    fn what_is_used_often_outlives_a_stream_of_what_is_used_once() {
        let mut shelf = Shelf::new(3);
        put(&mut shelf, 0, 1);
        (0..4).for_each(|_| drop(shelf.find(&name(0))));
        (1..5).for_each(|number| assert!(put(&mut shelf, number, 1)));
        assert!(shelf.has(&name(0)) && shelf.has(&name(4)) && !shelf.has(&name(1)));
        // And ages: in the end it makes way too.
        (5..40).for_each(|number| assert!(put(&mut shelf, number, 1)));
        assert!(!shelf.has(&name(0)));
    }

    #[test]
    fn what_is_in_use_or_kept_stays_and_the_budget_holds() {
        let mut shelf = Shelf::new(2);
        put(&mut shelf, 0, 1);
        put(&mut shelf, 1, 1);
        let held = shelf.find(&name(0));
        assert!(shelf.keep(&name(1), true));
        assert!(!put(&mut shelf, 2, 1), "nothing can make way");
        drop(held);
        assert!(put(&mut shelf, 2, 1) && !shelf.has(&name(0)));
        assert!(shelf.keep(&name(1), false) && put(&mut shelf, 3, 2));
        assert_eq!(shelf.totals(), (1, 2, 2, 3));
        assert!(!put(&mut shelf, 4, 3) && shelf.has(&name(3)), "what never fits drives nothing out");
    }

    proptest! {
        #[test]
        fn bytes_are_those_of_the_chunks_and_within_the_budget(
            steps in prop::collection::vec((0u8..12, 0u8..4, 1u64..6), 1..80),
        ) {
            let (mut shelf, mut sizes) = (Shelf::new(16), HashMap::new());
            for (number, what, bytes) in steps {
                match what {
                    0 => shelf.remove(&name(number)),
                    1 => drop(shelf.find(&name(number))),
                    _ => {
                        if put(&mut shelf, number, bytes) {
                            sizes.insert(number, bytes);
                        }
                    }
                }
                let here: u64 = sizes.iter().filter(|(number, _)| shelf.has(&name(**number))).map(|(_, b)| b).sum();
                prop_assert_eq!(shelf.bytes, here);
                prop_assert!(here <= 16);
            }
        }
    }
}
