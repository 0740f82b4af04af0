//! Best-first search with a bounded list of candidates.

use std::cell::RefCell;

use super::links::{Links, LinksView};
use crate::codes::{CodesView, Probe};
use crate::order::{id_of, rank};

/// Marks a candidate whose links were followed. Ids are below it.
pub(super) const FOLLOWED: u32 = 1 << 31;

/// What a walk works in; kept between searches.
#[derive(Default)]
pub(super) struct Scratch {
    /// One bit a key: whether it was scored.
    pub(super) seen: Vec<u64>,
    /// Candidates, the best first.
    pub(super) pool: Vec<u64>,
    /// How many.
    pub(super) scored: usize,
    /// Keys whose links were followed.
    pub(super) followed: Vec<u32>,
    fresh: Vec<u32>,
    scores: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Vec<Scratch>> = RefCell::default();
}

/// Runs `search` with this thread's scratch space for `walks` walks.
pub(super) fn with_scratch<R>(walks: usize, search: impl FnOnce(&mut [Scratch]) -> R) -> R {
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.resize_with(scratch.len().max(walks), Scratch::default);
        search(&mut scratch[..walks])
    })
}

/// What is searched.
pub(super) struct Field<'a> {
    pub(super) codes: CodesView<'a>,
    pub(super) links: LinksView<'a>,
    /// Keys from here on are not looked at.
    pub(super) len: usize,
}

impl<'a> Field<'a> {
    pub(super) fn new(codes: CodesView<'a>, links: &'a Links) -> Self {
        Self { len: codes.len().min(links.len()), codes, links: links.view() }
    }
}

/// Where a walk goes, what for, and what it looks at first.
pub(super) struct Start<'a> {
    pub(super) field: &'a Field<'a>,
    pub(super) probe: &'a Probe,
    pub(super) entries: &'a [u32],
}

/// For each start, leaves in its scratch space's `pool` the `ef` best keys that `wanted` lets through, and the
/// better ones that it does not, of those met on the way from the entries.
///
/// The walks take turns, step by step. None depends on another; but while one scores the keys that it
/// has met, those of the others are on their way from memory, and what two of them look at is there already.
pub(super) fn search(scratch: &mut [Scratch], starts: &[Start<'_>], ef: usize, wanted: Option<&dyn Fn(u32) -> bool>) {
    let start = |(scratch, start)| Walk::start(scratch, start, Room { ef, held: 0, wanted });
    let mut walks: Vec<Walk<'_>> = scratch.iter_mut().zip(starts).map(start).collect();
    while !walks.is_empty() {
        walks.retain_mut(Walk::step);
    }
}

/// A search between two steps.
struct Walk<'a> {
    scratch: &'a mut Scratch,
    field: &'a Field<'a>,
    probe: &'a Probe,
    room: Room<'a>,
    /// Candidates before this one have been followed.
    cursor: usize,
}

impl<'a> Walk<'a> {
    fn start(scratch: &'a mut Scratch, &Start { field, probe, entries }: &Start<'a>, room: Room<'a>) -> Self {
        scratch.seen.clear();
        scratch.seen.resize(field.len.div_ceil(64), 0);
        scratch.pool.clear();
        scratch.scored = 0;
        scratch.followed.clear();
        scratch.fresh.clear();
        for &id in entries {
            note(field, &mut scratch.seen, &mut scratch.fresh, id);
        }
        Self { scratch, field, probe, room, cursor: 0 }
    }

    /// Scores the keys that were met last and follows the best candidate's links; false when all have been followed.
    #[inline]
    fn step(&mut self) -> bool {
        let field = self.field;
        let Scratch { seen, pool, scored, followed, fresh, scores } = &mut *self.scratch;
        field.codes.score(self.probe, fresh, scores);
        *scored += fresh.len();
        for (&id, &score) in fresh.iter().zip(scores.iter()) {
            self.cursor = self.cursor.min(self.room.offer(pool, rank(score, id)));
        }
        while let Some(candidate) = pool.get_mut(self.cursor) {
            self.cursor += 1;
            let id = id_of(*candidate);
            if id & FOLLOWED != 0 {
                continue;
            }
            *candidate |= u64::from(FOLLOWED);
            followed.push(id);
            fresh.clear();
            field.links.for_each(id, |link| note(field, seen, fresh, link));
            if let Some(&next) = pool.get(self.cursor) {
                field.links.prefetch(id_of(next) & !FOLLOWED);
            }
            return true;
        }
        fresh.clear();
        false
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
