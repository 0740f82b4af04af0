//! What the store knows in memory: visible chunks, damaged ones, pins, writes under way.
//!
//! Everything is decided under one short lock, and no disk is touched while it is held. A key is
//! *busy* while its rows are being written or deleted; whoever wants to write or delete them waits.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::eviction::{self, Candidate, Plan};
use crate::key::ChunkKey;
use crate::records::{Manifest, Usage};

/// A visible chunk.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) manifest: Arc<Manifest>,
    pub(crate) usage: Usage,
    /// Tells this appearance of a key from an earlier or later one.
    pub(crate) generation: u64,
}

impl Entry {
    pub(crate) fn bytes(&self) -> u64 {
        self.manifest.payload_bytes()
    }
}

/// What is wrong with a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedChunk {
    /// The chunk.
    pub key: ChunkKey,
    /// The layer whose payload is at fault; `None` for the manifest.
    pub layer: Option<u32>,
    /// What should have been there.
    pub expected: String,
    /// What was there.
    pub found: String,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) entries: HashMap<ChunkKey, Entry>,
    pub(crate) damaged: HashMap<ChunkKey, DamagedChunk>,
    pub(crate) busy: HashSet<ChunkKey>,
    pub(crate) pins: HashMap<ChunkKey, usize>,
    /// Most bytes of visible chunks and those being written.
    pub(crate) budget: u64,
    /// Bytes of the visible chunks.
    pub(crate) used: u64,
    /// Bytes of the chunks being written.
    pub(crate) reserved: u64,
    /// Chunks evicted since the store was opened.
    pub(crate) evicted: u64,
    generation: u64,
    clock: u64,
}

impl State {
    /// A time stamp in microseconds, larger than every one before.
    pub(crate) fn tick(&mut self, now_micros: u64) -> u64 {
        self.clock = now_micros.max(self.clock + 1);
        self.clock
    }

    pub(crate) fn insert(&mut self, key: ChunkKey, manifest: Arc<Manifest>, usage: Usage) {
        self.generation += 1;
        self.clock = self.clock.max(usage.last_used_micros);
        let entry = Entry { manifest, usage, generation: self.generation };
        self.restore(key, entry);
    }

    /// Puts back an entry that was taken out, as it was.
    pub(crate) fn restore(&mut self, key: ChunkKey, entry: Entry) {
        self.used += entry.bytes();
        if let Some(old) = self.entries.insert(key, entry) {
            self.used -= old.bytes();
        }
    }

    pub(crate) fn take(&mut self, key: &ChunkKey) -> Option<Entry> {
        let entry = self.entries.remove(key)?;
        self.used -= entry.bytes();
        Some(entry)
    }

    /// Declares a chunk damaged, unless it is no longer the one that was looked at.
    pub(crate) fn condemn(&mut self, generation: u64, damage: DamagedChunk) -> bool {
        let key = damage.key;
        let same = |entry: &Entry| entry.generation == generation;
        if self.busy.contains(&key) || !self.entries.get(&key).is_some_and(same) {
            return false;
        }
        self.take(&key);
        self.damaged.insert(key, damage);
        true
    }

    /// Asks the policy which chunks must go so that `needed` more bytes fit.
    pub(crate) fn plan(&self, needed: u64, budget: u64) -> Plan {
        let candidates = self.entries.iter().map(|(key, entry)| Candidate {
            key: *key,
            bytes: entry.bytes(),
            last_used: entry.usage.last_used_micros,
            pinned: self.pins.contains_key(key),
        });
        eviction::plan(candidates, self.used + self.reserved, needed, budget)
    }
}

/// The state, shared with the guards that outlive a call.
#[derive(Debug, Default)]
pub(crate) struct Catalogue {
    state: Mutex<State>,
    changed: Condvar,
}

impl Catalogue {
    pub(crate) fn new(state: State) -> Self {
        Catalogue { state: Mutex::new(state), changed: Condvar::new() }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock can stop half-way through a change, so a poisoned state is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until some key stops being busy or some reservation ends.
    pub(crate) fn wait<'a>(&self, guard: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn lock_when_idle(&self, key: &ChunkKey) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        while state.busy.contains(key) {
            state = self.wait(state);
        }
        state
    }

    /// Claims a key and some of the budget; dropping the claim frees both, whatever happened.
    pub(crate) fn claim(&self, state: &mut State, keys: Vec<ChunkKey>, reserved: u64) -> Claim<'_> {
        state.busy.extend(keys.iter().copied());
        state.reserved += reserved;
        Claim { catalogue: self, keys, reserved }
    }
}

/// Busy keys and reserved bytes, given back on drop.
#[derive(Debug)]
pub(crate) struct Claim<'a> {
    catalogue: &'a Catalogue,
    keys: Vec<ChunkKey>,
    reserved: u64,
}

impl Claim<'_> {
    /// Applies a change in the same moment in which the claim ends.
    pub(crate) fn finish<T>(mut self, change: impl FnOnce(&mut State) -> T) -> T {
        let catalogue = self.catalogue;
        let mut state = catalogue.lock();
        let outcome = change(&mut state);
        self.release(&mut state);
        outcome
    }

    fn release(&mut self, state: &mut State) {
        for key in self.keys.drain(..) {
            state.busy.remove(&key);
        }
        state.reserved -= std::mem::take(&mut self.reserved);
        self.catalogue.changed.notify_all();
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if self.keys.is_empty() && self.reserved == 0 {
            return;
        }
        let catalogue = self.catalogue;
        let mut state = catalogue.lock();
        self.release(&mut state);
    }
}

/// Keeps chunks from being evicted while it lives. Chunks that are absent may be pinned: a later
/// [`put`](crate::ChunkStore::put) of them is protected from its first moment.
#[derive(Debug)]
#[must_use = "the chunks are protected only while the guard lives"]
pub struct PinGuard {
    catalogue: Arc<Catalogue>,
    keys: Vec<ChunkKey>,
}

impl PinGuard {
    pub(crate) fn new(catalogue: &Arc<Catalogue>, keys: &[ChunkKey]) -> Self {
        let mut state = catalogue.lock();
        for key in keys {
            *state.pins.entry(*key).or_insert(0) += 1;
        }
        drop(state);
        PinGuard { catalogue: Arc::clone(catalogue), keys: keys.to_vec() }
    }
}

impl Drop for PinGuard {
    fn drop(&mut self) {
        let mut state = self.catalogue.lock();
        for key in &self.keys {
            if let Some(count) = state.pins.get_mut(key) {
                *count -= 1;
                if *count == 0 {
                    state.pins.remove(key);
                }
            }
        }
    }
}
