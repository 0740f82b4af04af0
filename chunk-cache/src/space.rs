//! Making room: removing chunks, dropping payload files of which nothing is left, and rewriting those of which little is.
//! The choices are the policy's (see `eviction`); this carries them out, on the writer's thread.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;

use crate::backend::{Change, Family, PinnedValue, Sync, payload_key, write_payload_file};
use crate::catalogue::{DamagedChunk, Entry, Segment};
use crate::error::StoreError;
use crate::eviction::{self, Plan, SegmentBytes, disk_limit};
use crate::key::ChunkKey;
use crate::reading::{ReadError, damage};
use crate::records::{Budget, ChunkRow, SegmentRow};
use crate::writer::{Core, segment_change, set_offsets};

/// Payload files below this are gathered into larger ones once there are [`MANY_SMALL`].
const SMALL_BYTES: u64 = 1 << 20;
const MANY_SMALL: usize = 64;

impl Core {
    /// Makes room for `needed` bytes within the budget and on the disk.
    pub(crate) fn make_room(&self, needed: u64) -> Result<(), StoreError> {
        let planned = {
            let state = self.catalogue.lock();
            if needed > state.budget {
                return Err(StoreError::TooLarge { needed, budget: state.budget });
            }
            let plan = state.plan(needed);
            match plan {
                Plan::Evict(victims) if victims.is_empty() && fits(&state, needed) => return Ok(()),
                Plan::Evict(victims) => victims,
                Plan::Impossible { pinned } => {
                    return Err(StoreError::NoRoom { needed, budget: state.budget, pinned });
                }
            }
        };
        self.evict(&planned)?;
        self.rewrite_sparse(needed)
    }

    fn evict(&self, victims: &[ChunkKey]) -> Result<u64, StoreError> {
        let gone: Vec<_> = {
            let state = self.catalogue.lock();
            let entries = victims.iter().filter_map(|key| state.entries.get(key));
            // What nobody refers to says nothing of what the others are worth.
            entries.filter(|entry| !entry.usage.demoted).map(Entry::worth).collect()
        };
        let removed = self.remove_chunks(victims)?;
        let mut state = self.catalogue.lock();
        state.evicted += removed;
        state.age = gone.iter().fold(state.age, |age, worth| state.policy.age_behind(age, worth));
        drop(state);
        Ok(removed)
    }

    /// Takes chunks from view, deletes their rows safely, and drops the files of which nothing is left. Damaged chunks
    /// go along: they only take up space. Returns how many of `keys` there were; when the rows cannot be deleted, all
    /// stay.
    pub(crate) fn remove_chunks(&self, keys: &[ChunkKey]) -> Result<u64, StoreError> {
        if keys.is_empty() {
            return self.drop_dead_files().map(|()| 0);
        }
        let (taken, damaged, count) = {
            let mut state = self.catalogue.lock();
            let count = keys.iter().filter(|key| state.entries.contains_key(key) || state.damaged.contains_key(key));
            let count = count.count() as u64;
            let taken: Vec<(ChunkKey, Entry)> =
                keys.iter().filter_map(|key| state.take(key).map(|entry| (*key, entry))).collect();
            let damaged: Vec<DamagedChunk> = state.damaged.drain().map(|(_, damage)| damage).collect();
            (taken, damaged, count)
        };
        let gone = taken.iter().map(|(key, _)| *key).chain(damaged.iter().map(|damage| damage.key));
        let changes: Vec<Change> = gone
            .flat_map(|key| [Family::Chunks, Family::Usage].map(|family| (family, key.to_bytes().to_vec(), None)))
            .collect();
        if changes.is_empty() {
            return Ok(0);
        }
        if let Err(error) = self.commit("removing chunks", &changes) {
            let mut state = self.catalogue.lock();
            taken.into_iter().for_each(|(key, entry)| state.insert(key, entry));
            state.damaged.extend(damaged.into_iter().map(|damage| (damage.key, damage)));
            return Err(error);
        }
        self.drop_dead_files()?;
        Ok(count)
    }

    /// Drops every payload file without a visible chunk; neighbours go at once.
    pub(crate) fn drop_dead_files(&self) -> Result<(), StoreError> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut before_is_dead = false;
        for (first, segment) in &self.catalogue.lock().segments {
            let dead = segment.bytes.live == 0;
            match runs.last_mut() {
                Some(run) if dead && before_is_dead => run.1 = segment.last,
                _ if dead => runs.push((*first, segment.last)),
                _ => {}
            }
            before_is_dead = dead;
        }
        for (first, last) in runs {
            self.backend.drop_files(first, last)?;
            let dropped: BTreeSet<u64> = {
                let mut state = self.catalogue.lock();
                let dropped: BTreeSet<u64> = state.segments.range(first..=last).map(|(first, _)| *first).collect();
                state.segments.retain(|first, _| !dropped.contains(first));
                dropped.iter().for_each(|first| self.files.forget(*first));
                dropped
            };
            // A row that stays speaks of a file that is gone, and is swept at the next opening.
            let changes: Vec<Change> = dropped.into_iter().map(|first| segment_change(first, None)).collect();
            self.backend.write("forgetting a payload file", &changes, Sync::Later)?;
        }
        Ok(())
    }

    /// Rewrites files of which little is left until `needed` more bytes fit the disk's limit.
    fn rewrite_sparse(&self, needed: u64) -> Result<(), StoreError> {
        loop {
            let sparse = {
                let state = self.catalogue.lock();
                if fits(&state, needed) {
                    return Ok(());
                }
                most_dead(&state.segments, |bytes| bytes.is_sparse())
            };
            let batch = self.batch(sparse);
            if batch.is_empty() {
                return Ok(());
            }
            self.rewrite(&batch)?;
        }
    }

    /// Rewrites one batch of files of which less than half is left, as far as the allowance goes; or gathers small ones.
    pub(crate) fn rewrite_in_background(&self, allowance: &mut u64) -> Result<(), StoreError> {
        if self.backend.is_suspect() {
            return Ok(());
        }
        let (half_dead, small) = {
            let state = self.catalogue.lock();
            let half_dead = most_dead(&state.segments, |bytes| bytes.dead() >= bytes.live);
            let small = state.segments.iter().filter(|(_, segment)| segment.bytes.total < SMALL_BYTES);
            (half_dead, small.map(|(first, segment)| (*first, segment.bytes)).collect::<Vec<_>>())
        };
        if small.len() >= MANY_SMALL {
            return self.rewrite(&self.batch(small));
        }
        let batch = self.batch(half_dead.into_iter().filter(|(_, bytes)| bytes.live <= *allowance).collect());
        let cost: u64 = {
            let state = self.catalogue.lock();
            batch.iter().filter_map(|first| state.segments.get(first)).map(|segment| segment.bytes.live).sum()
        };
        if batch.is_empty() || cost > *allowance {
            return Ok(());
        }
        *allowance -= cost;
        self.rewrite(&batch)
    }

    /// Gives the space of removed chunks back: files of which more than one part in `parts` is dead are rewritten.
    pub(crate) fn reclaim_space(&self, parts: u64) -> Result<(), StoreError> {
        self.drop_dead_files()?;
        loop {
            let wasteful = {
                let state = self.catalogue.lock();
                let wasteful = |bytes: &SegmentBytes| bytes.dead() > bytes.total / parts;
                most_dead(&state.segments, wasteful)
            };
            let batch = self.batch(wasteful);
            if batch.is_empty() {
                return Ok(());
            }
            self.rewrite(&batch)?;
        }
    }

    /// The first of these files whose chunks fit one file together; at least one.
    fn batch(&self, segments: Vec<(u64, SegmentBytes)>) -> Vec<u64> {
        let limit = self.segment_limit();
        let mut live = 0;
        let fitting = segments.into_iter().enumerate().take_while(|(index, (_, bytes))| {
            live += bytes.live;
            *index == 0 || live <= limit
        });
        fitting.map(|(_, (first, _))| first).collect()
    }

    /// Copies the visible chunks of these files into a new one, switches their rows to it, and drops the old ones.
    pub(crate) fn rewrite(&self, segments: &[u64]) -> Result<(), StoreError> {
        let (chunks, live) = {
            let state = self.catalogue.lock();
            let mut chunks: Vec<_> = segments.iter().flat_map(|first| state.chunks_of(*first)).collect();
            chunks.sort_unstable();
            let entries: Vec<(ChunkKey, Entry)> =
                chunks.into_iter().filter_map(|(_, key)| Some((key, *state.entries.get(&key)?))).collect();
            let live = entries.iter().map(|(_, entry)| entry.bytes).sum::<u64>();
            (entries, live)
        };
        if !chunks.is_empty() {
            self.check_free(live)?;
            self.copy_chunks(chunks, segments)?;
        }
        self.drop_dead_files()
    }

    fn copy_chunks(&self, chunks: Vec<(ChunkKey, Entry)>, old: &[u64]) -> Result<(), StoreError> {
        let first = self.catalogue.lock().take_numbers(chunks.len());
        let last = first + chunks.len() as u64 - 1;
        let file = self.incoming(first);
        let mut moved = Vec::with_capacity(chunks.len());
        let places = write_payload_file(&file, |put_row| {
            for (number, (key, entry)) in (first..).zip(chunks) {
                let Some((row, layers)) = self.read_whole(&key, &entry)? else { continue };
                for (layer, value) in (0..).zip(&layers) {
                    put_row(&payload_key(number, layer), value.as_ref())
                        .map_err(self.backend.fail("writing a payload file"))?;
                }
                moved.push(Moved { key, from: (entry.number, entry.offset), row: ChunkRow { number, ..row } });
            }
            Ok(())
        })?;
        if moved.is_empty() {
            return Ok(());
        }
        let mut rest = places.iter().copied();
        for chunk in &mut moved {
            let layers: Vec<u64> = rest.by_ref().take(chunk.row.layers.len()).collect();
            set_offsets(std::slice::from_mut(&mut chunk.row), &layers);
        }
        let path = self.take_over(&file, first, last)?;
        self.switch(moved, old, path, first..=last)
    }

    /// A chunk's row and all layers as they are stored; `None` where any of it is damaged: then the chunk is condemned.
    fn read_whole(&self, key: &ChunkKey, entry: &Entry) -> Result<Option<(ChunkRow, Vec<PinnedValue>)>, StoreError> {
        let read = || -> Result<_, ReadError> {
            let row = self.chunk_row(key)?;
            let layers: Result<Vec<_>, _> =
                (0..row.shape.layers).map(|layer| self.stored_layer(key, entry, &row.shape, layer)).collect();
            Ok((row, layers?))
        };
        match read() {
            Ok(whole) => Ok(Some(whole)),
            Err(ReadError::Damage(error)) => {
                self.condemn(entry.number, &damage(*key, None, error));
                Ok(None)
            }
            Err(ReadError::Store(error)) => Err(error),
        }
    }

    /// Makes the copies the chunks, in one batch.
    fn switch(
        &self,
        moved: Vec<Moved>,
        old: &[u64],
        path: Option<Arc<Path>>,
        numbers: RangeInclusive<u64>,
    ) -> Result<(), StoreError> {
        let (first, last) = numbers.into_inner();
        let total = moved.iter().map(|chunk| chunk.row.payload_bytes()).sum();
        let row = |chunk: &Moved, (number, offset)| {
            let row = ChunkRow { number, offset, ..chunk.row.clone() };
            (Family::Chunks, chunk.key.to_bytes().to_vec(), Some(row.encode(&chunk.key)))
        };
        let mut changes: Vec<Change> =
            moved.iter().map(|chunk| row(chunk, (chunk.row.number, chunk.row.offset))).collect();
        changes.push(segment_change(first, Some(SegmentRow { last, payload_bytes: total })));
        if let Err(error) = self.commit("moving chunks", &changes) {
            let mut undo: Vec<Change> = moved.iter().map(|chunk| row(chunk, chunk.from)).collect();
            undo.push(segment_change(first, None));
            self.undo(undo, first, last);
            return Err(error);
        }
        let mut state = self.catalogue.lock();
        state.segments.insert(first, Segment { last, path, bytes: SegmentBytes { total, live: 0 } });
        for chunk in moved {
            // A reader may have found it damaged meanwhile.
            let entry = state.entries.get(&chunk.key).filter(|entry| entry.number == chunk.from.0).copied();
            if let Some(entry) = entry {
                state.insert(chunk.key, Entry { number: chunk.row.number, offset: chunk.row.offset, ..entry });
            }
        }
        debug_assert!(old.iter().all(|first| state.chunks_of(*first).is_empty()));
        Ok(())
    }

    /// Removes chunks until `bytes` are left, in the order in which they would make way.
    pub(crate) fn evict_to(&self, bytes: u64) -> Result<u64, StoreError> {
        let victims = {
            let state = self.catalogue.lock();
            let mut left = state.used;
            let ordered = eviction::in_order(state.policy, state.candidates());
            let victims = ordered.into_iter().take_while(|candidate| {
                let above = left > bytes;
                left -= if above { candidate.worth.bytes } else { 0 };
                above
            });
            victims.map(|candidate| candidate.key).collect::<Vec<_>>()
        };
        self.evict(&victims)
    }

    pub(crate) fn change_budget(&self, bytes: u64) -> Result<u64, StoreError> {
        if self.catalogue.lock().budget != bytes {
            let row = (Family::Meta, crate::open::BUDGET_ROW.to_vec(), Some(Budget(bytes).encode()));
            self.commit("writing the byte budget", &[row])?;
            self.catalogue.lock().budget = bytes;
        }
        match self.make_room(0) {
            // What is pinned goes when it is let go and something is stored.
            Err(StoreError::NoRoom { .. }) => Ok(0),
            outcome => outcome.map(|()| 0),
        }
    }

    /// Removes what is damaged, and writes anew the families that cannot be read whole.
    pub(crate) fn repair(&self) -> Result<u64, StoreError> {
        let mut unreadable = Vec::new();
        for family in Family::ROWS {
            if self.backend.scan(family, &mut |_, _| {})?.is_some() {
                unreadable.push(family);
            }
        }
        if !unreadable.is_empty() {
            self.backend.rebuild(&unreadable)?;
        }
        let damaged: Vec<ChunkKey> = self.catalogue.lock().damaged.keys().copied().collect();
        self.remove_chunks(&damaged)
    }
}

/// A chunk with its row as it will be.
struct Moved {
    key: ChunkKey,
    /// Number and offset until now.
    from: (u64, u64),
    row: ChunkRow,
}

fn fits(state: &crate::catalogue::State, needed: u64) -> bool {
    state.stored_bytes() + needed <= disk_limit(state.budget)
}

/// The files that are so, those with the greatest dead share first.
fn most_dead(segments: &BTreeMap<u64, Segment>, so: impl Fn(&SegmentBytes) -> bool) -> Vec<(u64, SegmentBytes)> {
    let chosen = segments.iter().filter(|(_, segment)| segment.bytes.dead() > 0 && so(&segment.bytes));
    let mut chosen: Vec<_> = chosen.map(|(first, segment)| (*first, segment.bytes)).collect();
    let share = |bytes: &SegmentBytes| bytes.dead() as f64 / bytes.total as f64;
    chosen.sort_by(|(_, a), (_, b)| share(b).total_cmp(&share(a)));
    chosen
}
