//! What the store knows in memory: visible chunks, damaged ones, those still being written, pins, payload files.
//!
//! Everything is decided under one short lock, and no disk is touched while it is held. Only the writer's thread makes
//! chunks visible, moves and removes them; readers may declare one damaged.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::eviction::{self, Candidate, Plan, SegmentBytes, Space};
use crate::key::ChunkKey;
use crate::pending::PendingPut;
use crate::policy::{EvictionPolicy, Worth};
use crate::records::{ModelInfo, Usage};
use crate::shape::KvShape;

/// A visible chunk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    /// Where its payload lies. Never used twice, so that it tells this appearance of a key from an earlier or later one.
    pub(crate) number: u64,
    /// Offset of its first layer in the payload file; zero: not known.
    pub(crate) offset: u64,
    pub(crate) tokens: u32,
    /// Bytes of keys and values as stored.
    pub(crate) bytes: u64,
    pub(crate) created_unix: u64,
    /// What computing it took; 0: not known.
    pub(crate) compute_micros: u64,
    /// Index of its model.
    pub(crate) model: u32,
    pub(crate) codec: u16,
    pub(crate) usage: Usage,
}

impl Entry {
    pub(crate) fn worth(&self) -> Worth {
        Worth {
            bytes: self.bytes,
            last_used: self.usage.last_used_micros,
            hits: self.usage.hits,
            saved: self.usage.saved_micros,
            cost: self.compute_micros,
            age: self.usage.age,
        }
    }
}

/// What is wrong with a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedChunk {
    /// The chunk.
    pub key: ChunkKey,
    /// The layer whose payload is at fault; `None` for the chunk's row.
    pub layer: Option<u32>,
    /// What should have been there.
    pub expected: String,
    /// What was there.
    pub found: String,
}

/// A payload file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Last chunk number that it may hold.
    pub(crate) last: u64,
    /// The file, if it is known.
    pub(crate) path: Option<Arc<Path>>,
    pub(crate) bytes: SegmentBytes,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    /// By key, so that the variants of a chunk are neighbours.
    pub(crate) entries: BTreeMap<ChunkKey, Entry>,
    /// The visible chunks by where they lie.
    numbers: BTreeMap<u64, ChunkKey>,
    /// Payload files by their first chunk number.
    pub(crate) segments: BTreeMap<u64, Segment>,
    pub(crate) damaged: HashMap<ChunkKey, DamagedChunk>,
    /// Chunks that were handed over and are not yet on disk.
    pub(crate) pending: HashMap<ChunkKey, Arc<PendingPut>>,
    pub(crate) pending_bytes: u64,
    pub(crate) pins: HashMap<ChunkKey, usize>,
    pub(crate) models: Vec<ModelInfo>,
    /// Most bytes of visible chunks.
    pub(crate) budget: u64,
    /// In which order chunks make way.
    pub(crate) policy: EvictionPolicy,
    /// The age of uses from now on; the policy's.
    pub(crate) age: f64,
    /// Bytes of the visible chunks.
    pub(crate) used: u64,
    /// Chunks evicted since the store was opened.
    pub(crate) evicted: u64,
    pub(crate) next_number: u64,
    clock: u64,
}

impl State {
    /// A time stamp in microseconds, larger than every one before.
    pub(crate) fn tick(&mut self, now_micros: u64) -> u64 {
        self.clock = now_micros.max(self.clock + 1);
        self.clock
    }

    pub(crate) fn model_index(&self, fingerprint: &[u8; 32], shape: &KvShape) -> Option<u32> {
        self.models.iter().position(|model| model.is_same(fingerprint, shape)).map(|index| index as u32)
    }

    /// The index of a model, which is new or known.
    pub(crate) fn enter_model(&mut self, model: &ModelInfo) -> u32 {
        self.model_index(&model.fingerprint, &model.shape).unwrap_or_else(|| {
            self.models.push(model.clone());
            (self.models.len() - 1) as u32
        })
    }

    /// The first of so many chunk numbers that were never used.
    pub(crate) fn take_numbers(&mut self, count: usize) -> u64 {
        let first = self.next_number;
        self.next_number += count as u64;
        first
    }

    pub(crate) fn segment_of(&self, number: u64) -> Option<u64> {
        let (first, segment) = self.segments.range(..=number).next_back()?;
        (number <= segment.last).then_some(*first)
    }

    /// Makes a chunk visible, in place of an earlier appearance.
    pub(crate) fn insert(&mut self, key: ChunkKey, entry: Entry) {
        self.take(&key);
        self.damaged.remove(&key);
        self.clock = self.clock.max(entry.usage.last_used_micros);
        self.age = self.age.max(entry.usage.age);
        self.next_number = self.next_number.max(entry.number + 1);
        self.used += entry.bytes;
        self.numbers.insert(entry.number, key);
        if let Some(first) = self.segment_of(entry.number)
            && let Some(segment) = self.segments.get_mut(&first)
        {
            segment.bytes.live += entry.bytes;
            segment.bytes.total = segment.bytes.total.max(segment.bytes.live);
        }
        self.entries.insert(key, entry);
    }

    pub(crate) fn take(&mut self, key: &ChunkKey) -> Option<Entry> {
        let entry = self.entries.remove(key)?;
        self.used -= entry.bytes;
        self.numbers.remove(&entry.number);
        if let Some(first) = self.segment_of(entry.number)
            && let Some(segment) = self.segments.get_mut(&first)
        {
            segment.bytes.live -= entry.bytes;
        }
        Some(entry)
    }

    /// Declares a chunk damaged, unless it is no longer the one that was looked at.
    pub(crate) fn condemn(&mut self, number: u64, damage: DamagedChunk) -> bool {
        if self.entries.get(&damage.key).is_none_or(|entry| entry.number != number) {
            return false;
        }
        self.take(&damage.key);
        self.damaged.insert(damage.key, damage);
        true
    }

    /// The visible chunks of a payload file, in the order of the file.
    pub(crate) fn chunks_of(&self, first: u64) -> Vec<(u64, ChunkKey)> {
        let Some(segment) = self.segments.get(&first) else { return Vec::new() };
        self.numbers.range(first..=segment.last).map(|(number, key)| (*number, *key)).collect()
    }

    /// Bytes of keys and values in payload files, those of removed chunks included.
    pub(crate) fn stored_bytes(&self) -> u64 {
        self.segments.values().map(|segment| segment.bytes.total).sum()
    }

    /// The visible chunks as the policy of eviction sees them.
    pub(crate) fn candidates(&self) -> impl Iterator<Item = Candidate> {
        self.entries.iter().map(|(key, entry)| Candidate {
            key: *key,
            segment: self.segment_of(entry.number).unwrap_or(u64::MAX),
            demoted: entry.usage.demoted,
            worth: entry.worth(),
            pinned: self.pins.contains_key(key),
        })
    }

    /// Asks the policy which chunks must go so that `needed` more bytes fit.
    pub(crate) fn plan(&self, needed: u64) -> Plan {
        // The lists are made only where something may have to go.
        if self.used + needed <= self.budget && self.stored_bytes() + needed <= eviction::disk_limit(self.budget) {
            return Plan::Evict(Vec::new());
        }
        let segments = self.segments.iter().map(|(first, segment)| (*first, segment.bytes)).collect();
        eviction::plan(self.candidates(), Space { policy: self.policy, budget: self.budget, needed, segments })
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

    /// Waits until something that was pending is written or given up.
    pub(crate) fn wait<'a>(&self, guard: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn notify(&self) {
        self.changed.notify_all();
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
