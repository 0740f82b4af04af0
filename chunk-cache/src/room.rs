//! Making room: claiming budget for a chunk, and taking away what makes way. The choice of victims is
//! the policy's (see `eviction`); this carries it out.

use crate::catalogue::{Claim, DamagedChunk, Entry, State};
use crate::error::StoreError;
use crate::eviction::Plan;
use crate::key::ChunkKey;
use crate::store::ChunkStore;

impl ChunkStore {
    /// Reserves room for a chunk and takes from view whatever must make way. `None`: it is there
    /// already.
    pub(crate) fn claim_room(&self, key: &ChunkKey, needed: u64) -> Result<Option<Room<'_>>, StoreError> {
        let mut state = self.catalogue.lock_when_idle(key);
        let victims = loop {
            let budget = state.budget;
            if state.entries.contains_key(key) {
                return Ok(None);
            }
            if needed > budget {
                return Err(StoreError::TooLarge { needed, budget });
            }
            match state.plan(needed, budget) {
                Plan::Evict(victims) => break victims,
                Plan::Impossible { pinned } if state.reserved == 0 => {
                    return Err(StoreError::NoRoom { needed, budget, pinned });
                }
                // A chunk being written now can be evicted, or its room is free, in a moment.
                Plan::Impossible { .. } => {
                    state = self.catalogue.wait(state);
                    while state.busy.contains(key) {
                        state = self.catalogue.wait(state);
                    }
                }
            }
        };
        let replaced = state.damaged.remove(key);
        let claim = self.catalogue.claim(&mut state, vec![*key], needed);
        let mut taken = take_victims(&mut state, victims);
        let others = taken.keys();
        // The key itself is claimed above, and stays so when the old rows are gone.
        taken.damaged.extend(replaced);
        if taken.is_empty() {
            return Ok(Some((claim, None)));
        }
        let made_way = self.catalogue.claim(&mut state, others, 0);
        Ok(Some((claim, Some((made_way, taken)))))
    }

    pub(crate) fn shrink_to_budget(&self) -> Result<(), StoreError> {
        let mut state = self.catalogue.lock();
        let Plan::Evict(victims) = state.plan(0, state.budget) else {
            return Ok(());
        };
        if victims.is_empty() {
            return Ok(());
        }
        let taken = take_victims(&mut state, victims);
        let claim = self.catalogue.claim(&mut state, taken.keys(), 0);
        drop(state);
        self.carry_out(Some((claim, taken)))
    }

    /// Deletes what was taken from view; on failure it is put back.
    pub(crate) fn carry_out(&self, made_way: Option<(Claim<'_>, Taken)>) -> Result<(), StoreError> {
        let Some((claim, taken)) = made_way else {
            return Ok(());
        };
        let erased = self.erase(&taken.keys());
        claim.finish(|state| {
            if erased.is_err() {
                taken.put_back(state);
            }
        });
        erased
    }
}

/// A claim on the new chunk, and what has to be deleted first.
pub(crate) type Room<'a> = (Claim<'a>, Option<(Claim<'a>, Taken)>);

/// Chunks taken from view, to be deleted.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    pub(crate) entries: Vec<(ChunkKey, Entry)>,
    pub(crate) damaged: Vec<DamagedChunk>,
    /// How many of them the eviction counter counts.
    pub(crate) evicted: u64,
}

impl Taken {
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.damaged.is_empty()
    }

    fn keys(&self) -> Vec<ChunkKey> {
        let whole = self.entries.iter().map(|(key, _)| *key);
        whole.chain(self.damaged.iter().map(|d| d.key)).collect()
    }

    fn put_back(self, state: &mut State) {
        state.evicted -= self.evicted;
        for (key, entry) in self.entries {
            state.restore(key, entry);
        }
        for damage in self.damaged {
            state.damaged.insert(damage.key, damage);
        }
    }
}

/// Takes the victims from view, and with them the damaged chunks: they only take up space.
fn take_victims(state: &mut State, victims: Vec<ChunkKey>) -> Taken {
    let mut taken = Taken::default();
    if victims.is_empty() {
        return taken;
    }
    for key in victims {
        taken.entries.extend(state.take(&key).map(|entry| (key, entry)));
    }
    taken.evicted = taken.entries.len() as u64;
    state.evicted += taken.evicted;
    let idle: Vec<_> = state.damaged.keys().filter(|key| !state.busy.contains(*key)).copied().collect();
    taken.damaged = idle.iter().filter_map(|key| state.damaged.remove(key)).collect();
    taken
}
