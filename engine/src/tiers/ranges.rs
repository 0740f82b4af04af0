//! Which parts of a memory are free.

use std::collections::BTreeMap;

/// Free ranges by their start; neighbours are one.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    free: BTreeMap<u64, u64>,
}

impl Ranges {
    /// Takes `bytes` bytes, which are more than none, from the lowest range that has them; `None` where none does.
    pub(super) fn take(&mut self, bytes: u64) -> Option<u64> {
        let (&start, &length) = self.free.iter().find(|(_, length)| **length >= bytes)?;
        self.free.remove(&start);
        if length > bytes {
            self.free.insert(start + bytes, length - bytes);
        }
        Some(start)
    }

    /// Gives a range back, or adds it; it overlaps none that is free.
    pub(super) fn give(&mut self, start: u64, bytes: u64) {
        let (mut start, mut bytes) = (start, bytes);
        if let Some((&before, &length)) = self.free.range(..start).next_back()
            && before + length == start
        {
            self.free.remove(&before);
            (start, bytes) = (before, bytes + length);
        }
        if let Some(length) = self.free.remove(&(start + bytes)) {
            bytes += length;
        }
        self.free.insert(start, bytes);
    }

    /// Bytes that are free.
    pub(super) fn bytes(&self) -> u64 {
        self.free.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_taken_never_overlaps_and_comes_back_whole(
            steps in prop::collection::vec((any::<bool>(), 1u64..40), 1..80),
        ) {
            let (mut ranges, mut taken): (_, Vec<(u64, u64)>) = (Ranges::default(), Vec::new());
            ranges.give(1000, 100);
            ranges.give(5000, 50);
            for (take, size) in steps {
                if take {
                    let most = ranges.free.values().copied().max().unwrap_or(0);
                    let got = ranges.take(size);
                    prop_assert_eq!(got.is_some(), most >= size);
                    taken.extend(got.map(|start| (start, size)));
                } else if !taken.is_empty() {
                    let (start, size) = taken.swap_remove(size as usize % taken.len());
                    ranges.give(start, size);
                }
                let mut sorted = taken.clone();
                sorted.extend(ranges.free.iter().map(|(start, size)| (*start, *size)));
                sorted.sort_unstable();
                prop_assert!(sorted.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
                prop_assert_eq!(sorted.iter().map(|(_, size)| size).sum::<u64>(), 150);
            }
            taken.into_iter().for_each(|(start, size)| ranges.give(start, size));
            prop_assert_eq!(ranges.free.into_iter().collect::<Vec<_>>(), [(1000, 100), (5000, 50)]);
        }
    }
}
