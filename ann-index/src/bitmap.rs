//! A set of key ids that a search must not return.

/// A growing set of key ids, one bit an id. Given to a search it hides these keys.
///
/// Ids beyond the keys of an index are allowed and mean nothing to it.
///
/// ```
/// let hidden: ann_index::Bitmap = [3, 70].into_iter().collect();
/// assert!(hidden.contains(70) && !hidden.contains(4));
/// ```
#[derive(Debug, Clone, Default)]
pub struct Bitmap {
    words: Vec<u64>,
}

impl Bitmap {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an id; true when it was not there.
    pub fn insert(&mut self, id: u32) -> bool {
        let (word, bit) = place(id);
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        let fresh = self.words[word] & bit == 0;
        self.words[word] |= bit;
        fresh
    }

    /// Takes an id out; true when it was there.
    pub fn remove(&mut self, id: u32) -> bool {
        let (word, bit) = place(id);
        match self.words.get_mut(word) {
            Some(bits) => {
                let there = *bits & bit != 0;
                *bits &= !bit;
                there
            }
            None => false,
        }
    }

    /// Whether the id is in the set.
    pub fn contains(&self, id: u32) -> bool {
        let (word, bit) = place(id);
        self.words.get(word).is_some_and(|bits| bits & bit != 0)
    }

    /// How many ids the set holds.
    pub fn len(&self) -> usize {
        self.words.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// Whether the set holds no id.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&w| w == 0)
    }

    /// Takes every id out and keeps the memory.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// How many ids below `end` the set holds.
    pub(crate) fn count_below(&self, end: usize) -> usize {
        let full = (end / 64).min(self.words.len());
        let whole: usize = self.words[..full].iter().map(|w| w.count_ones() as usize).sum();
        let rest = match self.words.get(full) {
            Some(word) if full == end / 64 => word & ((1u64 << (end % 64)) - 1),
            _ => 0,
        };
        whole + rest.count_ones() as usize
    }

    /// The 64 bits of the ids `start .. start + 64`, the lowest id in the lowest bit.
    pub(crate) fn bits_from(&self, start: usize) -> u64 {
        let word = |i: usize| self.words.get(i).copied().unwrap_or(0);
        let (at, shift) = (start / 64, start % 64);
        match shift {
            0 => word(at),
            _ => word(at) >> shift | word(at + 1) << (64 - shift),
        }
    }
}

impl FromIterator<u32> for Bitmap {
    fn from_iter<I: IntoIterator<Item = u32>>(ids: I) -> Self {
        let mut set = Self::new();
        set.extend(ids);
        set
    }
}

impl Extend<u32> for Bitmap {
    fn extend<I: IntoIterator<Item = u32>>(&mut self, ids: I) {
        for id in ids {
            self.insert(id);
        }
    }
}

fn place(id: u32) -> (usize, u64) {
    (id as usize / 64, 1 << (id % 64))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_as_a_set(
            steps in prop::collection::vec((any::<bool>(), 0u32..300), 0..200),
            from in 0usize..400,
        ) {
            let (mut bits, mut set) = (Bitmap::new(), BTreeSet::new());
            for (add, id) in steps {
                if add {
                    prop_assert_eq!(bits.insert(id), set.insert(id));
                } else {
                    prop_assert_eq!(bits.remove(id), set.remove(&id));
                }
            }
            prop_assert_eq!(bits.len(), set.len());
            prop_assert_eq!(bits.is_empty(), set.is_empty());
            prop_assert_eq!(bits.count_below(from), set.iter().filter(|&&i| (i as usize) < from).count());
            let word = bits.bits_from(from);
            for i in 0..64 {
                let id = (from + i) as u32;
                prop_assert_eq!(word >> i & 1 == 1, set.contains(&id));
                prop_assert_eq!(bits.contains(id), set.contains(&id));
            }
        }
    }
}
