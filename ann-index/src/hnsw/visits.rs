//! Which keys the search that runs on this thread has scored.
//!
//! `hnsw_rs` reports only the candidates it returns, but calls the distance on the searching
//! thread: noting each call there gives an exact count of keys read, and the exact score of each.

use std::cell::RefCell;

/// Scored keys of one search, each once.
#[derive(Default)]
struct Visits {
    /// The search that last scored a key, by key.
    seen: Vec<u32>,
    /// The number of the current search on this thread.
    search: u32,
    scored: Vec<(u32, f32)>,
}

thread_local! {
    static VISITS: RefCell<Visits> = RefCell::default();
}

/// Starts a search on this thread.
pub(super) fn begin() {
    VISITS.with_borrow_mut(|visits| {
        visits.scored.clear();
        visits.search = visits.search.wrapping_add(1);
        if visits.search == 0 {
            visits.seen.fill(0);
            visits.search = 1;
        }
    });
}

/// Notes that a key was scored.
#[inline]
pub(super) fn note(id: u32, score: f32) {
    VISITS.with_borrow_mut(|visits| {
        let place = id as usize;
        if place >= visits.seen.len() {
            visits.seen.resize((place + 1).next_power_of_two(), 0);
        }
        if visits.seen[place] != visits.search {
            visits.seen[place] = visits.search;
            visits.scored.push((id, score));
        }
    });
}

/// How many distinct keys were noted so far.
pub(super) fn count() -> usize {
    VISITS.with_borrow(|visits| visits.scored.len())
}

/// Ends the search: the keys that were noted, and their scores.
pub(super) fn take() -> Vec<(u32, f32)> {
    VISITS.with_borrow_mut(|visits| std::mem::take(&mut visits.scored))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_key_counts_once_a_search() {
        for _ in 0..3 {
            begin();
            note(5, 1.0);
            note(900, 2.0);
            note(5, 1.0);
            assert_eq!(count(), 2);
            assert_eq!(take(), [(5, 1.0), (900, 2.0)]);
        }
    }

    #[test]
    fn numbers_of_searches_may_wrap() {
        begin();
        note(0, 1.0);
        VISITS.with_borrow_mut(|visits| visits.search = u32::MAX);
        begin();
        note(0, 3.0);
        assert_eq!(take(), [(0, 3.0)]);
    }
}
