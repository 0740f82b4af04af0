//! Which chunks make way for new ones, and which payload files are rewritten: pure functions. Carrying it out is the
//! store's business.
//!
//! A chunk's bytes lie in a payload file (a segment) beside those of other chunks, and the disk gets them back when the
//! whole file goes, or when what is left of it is rewritten. So bytes of removed chunks count until then: beyond the budget
//! they may take a twentieth of it. A file is rewritten only when 5/8 of it are dead, so that for every byte
//! that becomes free at most 3/5 of a byte is written again; where that does not free enough, more chunks make way, in the
//! order in which they would have gone anyway.

use std::collections::HashMap;

use crate::key::ChunkKey;
use crate::policy::{EvictionPolicy, Worth};

const MIB: u64 = 1 << 20;

/// A chunk as the policy sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Candidate {
    pub(crate) key: ChunkKey,
    /// The payload file that it lies in.
    pub(crate) segment: u64,
    /// Goes before all that are not.
    pub(crate) demoted: bool,
    pub(crate) worth: Worth,
    pub(crate) pinned: bool,
}

impl Candidate {
    fn bytes(&self) -> u64 {
        self.worth.bytes
    }
}

/// Bytes of keys and values in a payload file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct SegmentBytes {
    /// When it was written.
    pub(crate) total: u64,
    /// Of chunks that are still there.
    pub(crate) live: u64,
}

impl SegmentBytes {
    pub(crate) fn dead(&self) -> u64 {
        self.total.saturating_sub(self.live)
    }

    /// Whether rewriting costs little for what it frees.
    pub(crate) fn is_sparse(&self) -> bool {
        self.dead().saturating_mul(8) >= self.total.saturating_mul(5)
    }

    /// What stays of it when dead files are dropped and sparse ones rewritten.
    fn kept(&self) -> u64 {
        if self.live == 0 || self.is_sparse() { self.live } else { self.total }
    }
}

/// What is there, and what is wanted.
#[derive(Debug, Clone, Default)]
pub(crate) struct Space {
    pub(crate) policy: EvictionPolicy,
    pub(crate) budget: u64,
    /// Bytes that are to be written.
    pub(crate) needed: u64,
    pub(crate) segments: HashMap<u64, SegmentBytes>,
}

/// What the policy decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Plan {
    /// Remove these, in this order; an empty list when there is room already.
    Evict(Vec<ChunkKey>),
    /// Even without every chunk that may go there is no room.
    Impossible {
        /// Bytes held by pinned chunks.
        pinned: u64,
    },
}

/// Most bytes that payload files may take on the disk, those of removed chunks included.
pub(crate) fn disk_limit(budget: u64) -> u64 {
    budget.saturating_add((budget / 20).max(MIB))
}

/// Where an eviction stops that had to begin: chunks make way in runs, not one for one.
pub(crate) fn low_water(budget: u64) -> u64 {
    budget - budget / 20
}

/// Demoted chunks first, then in the policy's order (ties by key), sparing pinned ones. Nothing goes while `needed`
/// bytes fit the budget and the disk's limit; otherwise so many go that the low-water mark is reached.
pub(crate) fn plan(candidates: impl IntoIterator<Item = Candidate>, mut space: Space) -> Plan {
    let mut used: u64 = space.segments.values().map(|segment| segment.live).sum();
    let mut kept: u64 = space.segments.values().map(SegmentBytes::kept).sum();
    let (budget, needed) = (space.budget, space.needed);
    // A budget that was lowered is kept to the byte; the low-water mark is for those who go on storing.
    let low = if needed == 0 { budget } else { low_water(budget).max(needed.min(budget)) };
    let over_budget = used + needed > budget;
    let over_disk = kept + needed > disk_limit(budget);
    if !over_budget && !over_disk {
        return Plan::Evict(Vec::new());
    }
    let most_used = if over_budget { low } else { budget };
    let most_kept = if over_disk { budget } else { disk_limit(budget) };
    let mut pinned = 0;
    let note_pinned = |candidate: &Candidate| pinned += if candidate.pinned { candidate.bytes() } else { 0 };
    let ordered = in_order(space.policy, candidates.into_iter().inspect(note_pinned));
    let mut victims = Vec::new();
    for candidate in ordered {
        if used + needed <= most_used && kept + needed <= most_kept {
            break;
        }
        used -= candidate.bytes();
        if let Some(segment) = space.segments.get_mut(&candidate.segment) {
            kept -= segment.kept();
            segment.live = segment.live.saturating_sub(candidate.bytes());
            kept += segment.kept();
        }
        victims.push(candidate.key);
    }
    if used + needed > budget {
        return Plan::Impossible { pinned };
    }
    Plan::Evict(victims)
}

/// The chunks that a store of this policy and budget would remove, in this order, so that `needed` more bytes fit, each chunk
/// lying in a file of its own; `None` where all of them do not suffice. For simulations of a store.
pub fn plan_eviction(
    policy: EvictionPolicy,
    budget: u64,
    needed: u64,
    chunks: impl IntoIterator<Item = (ChunkKey, Worth)>,
) -> Option<Vec<ChunkKey>> {
    let candidate = |(segment, (key, worth))| Candidate { key, segment, demoted: false, worth, pinned: false };
    let candidates: Vec<_> = (0..).zip(chunks).map(candidate).collect();
    let alone = |c: &Candidate| (c.segment, SegmentBytes { total: c.bytes(), live: c.bytes() });
    let segments = candidates.iter().map(alone).collect();
    match plan(candidates, Space { policy, budget, needed, segments }) {
        Plan::Evict(victims) => Some(victims),
        Plan::Impossible { .. } => None,
    }
}

/// The order in which chunks make way; pinned ones never do.
pub(crate) fn in_order(policy: EvictionPolicy, candidates: impl IntoIterator<Item = Candidate>) -> Vec<Candidate> {
    let mut free: Vec<_> = candidates.into_iter().filter(|candidate| !candidate.pinned).collect();
    free.sort_unstable_by(|a, b| {
        b.demoted.cmp(&a.demoted).then_with(|| policy.order(&a.worth, &b.worth)).then(a.key.cmp(&b.key))
    });
    free
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::key::{ChunkId, VariantId};
    use proptest::prelude::*;

    fn chunks() -> impl Strategy<Value = Vec<Candidate>> {
        let one = (1..50u64, 0..20u64, any::<bool>(), prop::bool::weighted(0.2), 0..4u64, 0..5u64);
        prop::collection::vec(one, 0..20).prop_map(|list| {
            let chunk =
                |(i, (mib, last_used, pinned, demoted, segment, hits)): (usize, (u64, u64, bool, bool, u64, u64))| {
                    Candidate {
                        key: ChunkKey { chunk: ChunkId([i as u8; 32]), variant: VariantId([0; 16]) },
                        segment,
                        demoted,
                        worth: Worth { bytes: mib * MIB, last_used, hits, saved: 7 * hits, cost: 8, age: 0.0 },
                        pinned,
                    }
                };
            list.into_iter().enumerate().map(chunk).collect()
        })
    }

    fn segments(list: &[Candidate], dead: &[u64]) -> HashMap<u64, SegmentBytes> {
        let mut segments: HashMap<u64, SegmentBytes> = HashMap::new();
        for (number, dead) in (0..).zip(dead) {
            segments.entry(number).or_default().total += dead * MIB;
        }
        for chunk in list {
            let segment = segments.entry(chunk.segment).or_default();
            segment.total += chunk.bytes();
            segment.live += chunk.bytes();
        }
        segments
    }

    proptest! {
        #[test]
        fn frees_enough_spares_the_pinned_and_takes_the_oldest(
            list in chunks(), dead in prop::collection::vec(0..60u64, 4), needed in 0..200u64, budget in 0..500u64,
            policy in prop::sample::select(EvictionPolicy::ALL.to_vec()),
        ) {
            let (needed, budget) = (needed * MIB, budget * MIB);
            let used: u64 = list.iter().map(Candidate::bytes).sum();
            let pinned_bytes: u64 = list.iter().filter(|c| c.pinned).map(Candidate::bytes).sum();
            let space = Space { policy, budget, needed, segments: segments(&list, &dead) };
            let kept: u64 = space.segments.values().map(SegmentBytes::kept).sum();
            match plan(list.clone(), space) {
                Plan::Impossible { pinned } => {
                    prop_assert_eq!(pinned, pinned_bytes);
                    prop_assert!(pinned_bytes + needed > budget);
                }
                Plan::Evict(victims) => {
                    let gone: Vec<_> = list.iter().filter(|c| victims.contains(&c.key)).collect();
                    prop_assert_eq!(gone.len(), victims.len());
                    prop_assert!(gone.iter().all(|c| !c.pinned));
                    let freed: u64 = gone.iter().map(|c| c.bytes()).sum();
                    prop_assert!(used - freed + needed <= budget);
                    prop_assert!(victims.is_empty() || used + needed > budget || kept + needed > disk_limit(budget));
                    // All that stay would go later than all that go.
                    for stays in list.iter().filter(|c| !c.pinned && !victims.contains(&c.key)) {
                        for gone in &gone {
                            let first = in_order(policy, [*stays, **gone])[0];
                            prop_assert_eq!(first.key, gone.key);
                        }
                    }
                }
            }
        }
    }

    fn chunk(id: u8, segment: u64, bytes: u64) -> Candidate {
        let key = ChunkKey { chunk: ChunkId([id; 32]), variant: VariantId([0; 16]) };
        Candidate {
            key,
            segment,
            demoted: false,
            worth: Worth { bytes, last_used: u64::from(id), ..Worth::default() },
            pinned: false,
        }
    }

    #[test]
    fn an_eviction_goes_on_to_the_low_water_mark_and_no_further() {
        let list: Vec<_> = (0..100).map(|id| chunk(id, u64::from(id), MIB)).collect();
        let space = |needed| Space { budget: 100 * MIB, needed, segments: segments(&list, &[]), ..Space::default() };
        assert_eq!(plan(list.clone(), space(0)), Plan::Evict(Vec::new()));
        let Plan::Evict(victims) = plan(list.clone(), space(MIB)) else { unreachable!() };
        assert_eq!(victims, (0..6).map(|id| chunk(id, 0, 0).key).collect::<Vec<_>>());
    }

    #[test]
    fn dead_bytes_that_cannot_be_freed_cheaply_make_more_chunks_go() {
        // Each file is half dead: too little to rewrite it, and together more than the disk may hold.
        let list: Vec<_> = (0..12).map(|id| chunk(id, u64::from(id / 4), 10 * MIB)).collect();
        let space = Space { budget: 200 * MIB, segments: segments(&list, &[40, 40, 40]), ..Space::default() };
        assert!(space.segments.values().all(|segment| !segment.is_sparse()));
        let Plan::Evict(victims) = plan(list.clone(), space) else { unreachable!() };
        // One more of the oldest file's makes it sparse, which frees enough.
        assert_eq!(victims, [list[0].key]);
    }
}
