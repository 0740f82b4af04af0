//! Which chunks make way for a new one: a pure function. Carrying it out is the store's business.

use crate::key::ChunkKey;

/// A chunk as the policy sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) key: ChunkKey,
    pub(crate) bytes: u64,
    /// Larger is more recent.
    pub(crate) last_used: u64,
    pub(crate) pinned: bool,
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

/// Least recently used first (ties by key), sparing pinned chunks, and no more than it takes to fit
/// `needed` more bytes into `budget` when `used` are taken. `used` may exceed the candidates' sum:
/// chunks being written count too.
pub(crate) fn plan(candidates: impl IntoIterator<Item = Candidate>, used: u64, needed: u64, budget: u64) -> Plan {
    let mut excess = used.saturating_add(needed).saturating_sub(budget);
    if excess == 0 {
        return Plan::Evict(Vec::new());
    }
    let mut pinned = 0;
    let mut free = Vec::new();
    for candidate in candidates {
        if candidate.pinned {
            pinned += candidate.bytes;
        } else {
            free.push(candidate);
        }
    }
    free.sort_unstable_by_key(|c| (c.last_used, c.key));
    let mut victims = Vec::new();
    for candidate in free {
        if excess == 0 {
            break;
        }
        excess = excess.saturating_sub(candidate.bytes);
        victims.push(candidate.key);
    }
    if excess > 0 {
        return Plan::Impossible { pinned };
    }
    Plan::Evict(victims)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;

    fn chunks() -> impl Strategy<Value = Vec<Candidate>> {
        prop::collection::vec((1..50u64, 0..20u64, any::<bool>()), 0..20).prop_map(|list| {
            let with_key = |(i, (bytes, last_used, pinned)): (usize, (u64, u64, bool))| Candidate {
                key: ChunkKey([i as u8; 32]),
                bytes,
                last_used,
                pinned,
            };
            list.into_iter().enumerate().map(with_key).collect()
        })
    }

    proptest! {
        #[test]
        fn frees_enough_spares_the_pinned_and_takes_the_oldest(
            list in chunks(), needed in 0..200u64, budget in 0..500u64,
        ) {
            let used: u64 = list.iter().map(|c| c.bytes).sum();
            let pinned_bytes: u64 = list.iter().filter(|c| c.pinned).map(|c| c.bytes).sum();
            match plan(list.clone(), used, needed, budget) {
                Plan::Impossible { pinned } => {
                    prop_assert_eq!(pinned, pinned_bytes);
                    prop_assert!(pinned_bytes + needed > budget);
                }
                Plan::Evict(victims) => {
                    let gone: Vec<_> = list.iter().filter(|c| victims.contains(&c.key)).collect();
                    prop_assert_eq!(gone.len(), victims.len());
                    prop_assert!(gone.iter().all(|c| !c.pinned));
                    let freed: u64 = gone.iter().map(|c| c.bytes).sum();
                    prop_assert!(used - freed + needed <= budget);
                    // Without the last victim it would not fit: no more than it takes.
                    if let Some(last) = victims.last() {
                        let last = list.iter().find(|c| c.key == *last).unwrap();
                        prop_assert!(used - (freed - last.bytes) + needed > budget);
                        let stays = |c: &&Candidate| !c.pinned && !victims.contains(&c.key);
                        prop_assert!(list.iter().filter(stays).all(|c| c.last_used >= last.last_used));
                    }
                }
            }
        }
    }
}
