//! Best-first search with a bounded list of candidates.

use std::cell::RefCell;

use super::links::LinksView;
use crate::codes::{CodesView, Probe};
use crate::order::{id_of, rank};

/// Marks a candidate whose links were followed. Ids are below it.
pub(super) const FOLLOWED: u32 = 1 << 31;

/// What a search works in; one per thread, kept between searches.
#[derive(Default)]
pub(super) struct Scratch {
    /// One bit a key: whether it was scored.
    seen: Vec<u64>,
    /// Candidates, the best first.
    pub(super) pool: Vec<u64>,
    fresh: Vec<u32>,
    scores: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Runs `search` with this thread's scratch space.
pub(super) fn with_scratch<R>(search: impl FnOnce(&mut Scratch) -> R) -> R {
    SCRATCH.with_borrow_mut(search)
}

/// What a search read.
#[derive(Clone, Copy, Default)]
pub(super) struct Walked {
    /// Keys scored.
    pub(super) scored: usize,
    /// Keys whose links were followed.
    pub(super) followed: usize,
}

/// What is searched.
pub(super) struct Field<'a> {
    pub(super) codes: CodesView<'a>,
    pub(super) links: LinksView<'a>,
    /// Keys from here on are not looked at.
    pub(super) len: usize,
}

impl Field<'_> {
    /// Leaves in `scratch.pool` the `ef` best keys that `wanted` lets through, and the better ones that
    /// it does not, of those met on the way from the `entries`.
    pub(super) fn search(
        &self,
        scratch: &mut Scratch,
        probe: &Probe,
        entries: &[u32],
        ef: usize,
        wanted: Option<&dyn Fn(u32) -> bool>,
    ) -> Walked {
        let mut walked = Walked::default();
        let Scratch { seen, pool, fresh, scores } = scratch;
        seen.clear();
        seen.resize(self.len.div_ceil(64), 0);
        pool.clear();
        let mut room = Room { ef, held: 0, wanted };
        fresh.clear();
        for &id in entries {
            note(self, seen, fresh, id);
        }
        self.codes.score(probe, fresh, scores);
        walked.scored += fresh.len();
        for (&id, &score) in fresh.iter().zip(scores.iter()) {
            room.offer(pool, rank(score, id));
        }
        let mut cursor = 0;
        while let Some(candidate) = pool.get_mut(cursor) {
            let id = id_of(*candidate);
            if id & FOLLOWED != 0 {
                cursor += 1;
                continue;
            }
            *candidate |= u64::from(FOLLOWED);
            walked.followed += 1;
            fresh.clear();
            self.links.for_each(id, |link| note(self, seen, fresh, link));
            if let Some(&next) = pool.get(cursor + 1) {
                self.links.prefetch(id_of(next) & !FOLLOWED);
            }
            self.codes.score(probe, fresh, scores);
            walked.scored += fresh.len();
            cursor += 1;
            for (&id, &score) in fresh.iter().zip(scores.iter()) {
                cursor = cursor.min(room.offer(pool, rank(score, id)));
            }
        }
        walked
    }
}

/// Takes a key that was not seen before, and starts to fetch it.
#[inline]
fn note(field: &Field<'_>, seen: &mut [u64], fresh: &mut Vec<u32>, id: u32) {
    if id as usize >= field.len {
        return;
    }
    let (word, bit) = (id as usize / 64, 1u64 << (id % 64));
    if seen[word] & bit == 0 {
        seen[word] |= bit;
        field.codes.prefetch(id);
        fresh.push(id);
    }
}

/// How many candidates there may be.
struct Room<'a> {
    ef: usize,
    /// How many of those held are wanted.
    held: usize,
    wanted: Option<&'a dyn Fn(u32) -> bool>,
}

impl Room<'_> {
    fn wants(&self, id: u32) -> bool {
        self.wanted.is_none_or(|wanted| wanted(id & !FOLLOWED))
    }

    /// Puts a candidate in its place, if it is good enough; returns the place, or one behind all.
    #[inline]
    fn offer(&mut self, pool: &mut Vec<u64>, new: u64) -> usize {
        let full = self.held >= self.ef;
        if full && pool.last().is_some_and(|&last| new >> 32 >= last >> 32) {
            return usize::MAX;
        }
        let place = pool.partition_point(|&held| held >> 32 <= new >> 32);
        if full && self.wanted.is_none() {
            let last = pool.len() - 1;
            pool.copy_within(place..last, place + 1);
            pool[place] = new;
            return place;
        }
        pool.insert(place, new);
        self.held += usize::from(self.wants(id_of(new)));
        while self.held > self.ef {
            let last = pool.pop().map_or(0, id_of);
            self.held -= usize::from(self.wants(last));
        }
        place
    }
}
