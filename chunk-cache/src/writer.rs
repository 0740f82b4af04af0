//! The writer: one thread that makes every change on disk, in the order in which it was asked for.
//!
//! Chunks that wait at the same time are stored together: their payloads become one finished file, synced, which RocksDB
//! takes over as it is; then one batch of rows, synced, makes all of them visible; then all who wait are told. Removing
//! takes the reverse order. So whatever moment a crash picks, a visible chunk is whole, and a payload file without
//! rows is dropped when the store is opened.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::backend::{Backend, Change, Family, PutRow, Sync, payload_key, write_payload_file};
use crate::catalogue::{Catalogue, Entry, Segment, State};
use crate::checksum::crc32c;
use crate::direct::{OpenFiles, ReadBuffers, chunk_offset};
use crate::disk::{Reserve, free_bytes};
use crate::error::StoreError;
use crate::eviction::SegmentBytes;
use crate::format;
use crate::pending::{Completion, Mailbox, PendingPut, Task, Thoroughness, Work};
use crate::records::{ChunkRow, LayerRecord, SegmentRow, Usage, layer_header};
use crate::stats::PutOutcome;
use crate::store::now_micros;

/// Folder of files that are not yet taken over, in the store's directory.
pub(crate) const INCOMING: &str = "incoming";
/// Size at which a payload file is full.
const SEGMENT_BYTES: u64 = 64 << 20;

/// What the store's handle and its writer share.
pub(crate) struct Core {
    pub(crate) backend: Backend,
    pub(crate) catalogue: Arc<Catalogue>,
    pub(crate) mailbox: Mailbox,
    pub(crate) reserve: Reserve,
    pub(crate) files: OpenFiles,
    pub(crate) buffers: Arc<ReadBuffers>,
}

/// Fails whatever is left when the writer ends, as it does in a panic.
struct LastWords<'a>(&'a Core);

impl Drop for LastWords<'_> {
    fn drop(&mut self) {
        self.0.mailbox.close();
        let stopped = || StoreError::Stopped { path: self.0.backend.path().to_path_buf() };
        for work in self.0.mailbox.drain() {
            if let Work::Other(_, done) = work {
                done.set(Err(stopped()));
            }
        }
        let left: Vec<_> = self.0.catalogue.lock().pending.values().cloned().collect();
        for put in left {
            self.0.settle(&put, Err(stopped()));
        }
    }
}

impl Core {
    /// Works until the mailbox is closed and empty.
    pub(crate) fn run(&self) {
        let _last_words = LastWords(self);
        // Bytes that may be rewritten in the background: a quarter of what is stored.
        let mut allowance = 0;
        self.reserve.refill();
        while let Some(work) = self.mailbox.next(self.segment_limit()) {
            match work {
                Work::Store(group) => {
                    let stored = self.store_group(group);
                    allowance = (allowance + stored / 4).min(4 * SEGMENT_BYTES);
                    self.reserve.refill();
                }
                Work::Other(task, done) => {
                    let outcome = self.sound().and_then(|()| self.carry_out(task));
                    if let Err(error) = &outcome {
                        tracing::warn!(%error, "the chunk store could not do what it was asked for");
                    }
                    done.set(outcome);
                }
            }
            if self.mailbox.is_empty()
                && let Err(error) = self.rewrite_in_background(&mut allowance)
            {
                tracing::warn!(%error, "space of removed chunks stays taken for now");
            }
        }
    }

    /// Bytes that one payload file holds at most, unless a single chunk is larger: little beside the budget, so that
    /// files become empty as chunks make way.
    pub(crate) fn segment_limit(&self) -> u64 {
        (self.catalogue.lock().budget / 32).min(SEGMENT_BYTES)
    }

    fn carry_out(&self, task: Task) -> Result<u64, StoreError> {
        match task {
            Task::Remove(keys) => self.remove_chunks(&keys),
            Task::EvictTo(bytes) => self.evict_to(bytes),
            Task::SetBudget(bytes) => self.change_budget(bytes),
            Task::Reclaim(Thoroughness::Space) => self.reclaim_space(32).map(|()| 0),
            Task::Reclaim(Thoroughness::Traces) => {
                self.reclaim_space(u64::MAX)?;
                self.backend.merge_rows()?;
                // Opening the database anew begins a new list of files: the old one names the first and last key of each.
                match self.backend.reopen() {
                    Err(StoreError::Busy { .. }) => Ok(0),
                    outcome => outcome.map(|()| 0),
                }
            }
            Task::Repair => self.repair(),
        }
    }

    /// Bytes that were stored.
    fn store_group(&self, group: Vec<Arc<PendingPut>>) -> u64 {
        let mut admitted = Vec::with_capacity(group.len());
        let mut bytes = 0;
        for put in group {
            match self.sound().and_then(|()| self.make_room(bytes + put.bytes)) {
                Ok(()) => {
                    bytes += put.bytes;
                    admitted.push(put);
                }
                Err(error) => self.settle(&put, Err(error)),
            }
        }
        if admitted.is_empty() {
            return 0;
        }
        match self.write_group(&admitted, bytes) {
            Ok(()) => {
                admitted.iter().for_each(|put| put.done.set(Ok(PutOutcome::Stored)));
                bytes
            }
            Err(error) => {
                tracing::warn!(%error, chunks = admitted.len(), "chunks could not be stored");
                admitted.iter().for_each(|put| self.settle(put, Err(error.clone())));
                0
            }
        }
    }

    /// Ends a put: the chunk is no longer pending.
    fn settle(&self, put: &PendingPut, outcome: Result<PutOutcome, StoreError>) {
        let mut state = self.catalogue.lock();
        end_pending(&mut state, put);
        drop(state);
        self.catalogue.notify();
        put.done.set(outcome);
    }

    fn write_group(&self, group: &[Arc<PendingPut>], bytes: u64) -> Result<(), StoreError> {
        self.check_free(bytes)?;
        let (first, models) = {
            let mut state = self.catalogue.lock();
            (state.take_numbers(group.len()), state.models.clone())
        };
        let last = first + group.len() as u64 - 1;
        let mut rows = Vec::with_capacity(group.len());
        let file = self.incoming(first);
        let places = write_payload_file(&file, |put_row| {
            let mut value = Vec::new();
            for (number, put) in (first..).zip(group) {
                let model = &models[put.model as usize];
                let layers = write_layers(put, number, &model.shape, &mut value, put_row)
                    .map_err(self.backend.fail("writing a payload file"))?;
                rows.push(ChunkRow {
                    number,
                    offset: 0,
                    tokens: put.chunk.tokens,
                    shape: model.shape,
                    model: model.fingerprint,
                    codec: crate::key::RAW_CODEC,
                    created_unix: now_micros() / 1_000_000,
                    compute_micros: put.chunk.compute_micros,
                    tenant: put.chunk.tenant,
                    layers,
                    sections: put.chunk.sections.clone(),
                });
            }
            Ok(())
        })?;
        set_offsets(&mut rows, &places);
        let path = self.take_over(&file, first, last)?;
        let used: Vec<Usage> = {
            let mut state = self.catalogue.lock();
            let tick = |_| Usage { last_used_micros: state.tick(now_micros()), age: state.age, ..Usage::default() };
            group.iter().map(tick).collect()
        };
        let mut changes = vec![segment_change(first, Some(SegmentRow { last, payload_bytes: bytes }))];
        for ((put, row), usage) in group.iter().zip(&rows).zip(&used) {
            let key = &put.chunk.key;
            changes.push((Family::Chunks, key.to_bytes().to_vec(), Some(row.encode(key))));
            changes.push((Family::Usage, key.to_bytes().to_vec(), Some(usage.encode(key))));
        }
        if let Err(error) = self.commit("storing chunks", &changes) {
            let undo = changes.into_iter().map(|(family, key, _)| (family, key, None)).collect();
            self.undo(undo, first, last);
            return Err(error);
        }
        let mut state = self.catalogue.lock();
        state.segments.insert(first, Segment { last, path, bytes: SegmentBytes { total: bytes, live: 0 } });
        for ((put, row), usage) in group.iter().zip(&rows).zip(used) {
            let entry = Entry {
                number: row.number,
                offset: row.offset,
                tokens: row.tokens,
                bytes: put.bytes,
                created_unix: row.created_unix,
                compute_micros: row.compute_micros,
                model: put.model,
                codec: row.codec,
                usage,
            };
            state.insert(put.chunk.key, entry);
            end_pending(&mut state, put);
        }
        drop(state);
        self.catalogue.notify();
        Ok(())
    }

    /// Where a payload file is written before RocksDB takes it over.
    pub(crate) fn incoming(&self, first: u64) -> PathBuf {
        self.backend.path().join(INCOMING).join(format!("{first:020}.sst"))
    }

    /// Hands a finished payload file to RocksDB. Returns the name that it has there, if it can be told.
    pub(crate) fn take_over(&self, file: &Path, first: u64, last: u64) -> Result<Option<Arc<Path>>, StoreError> {
        self.backend.ingest(file, first..=last).inspect_err(|_| {
            // Where it was taken over all the same it is a file without rows, which the next opening drops.
            let _ = std::fs::remove_file(file);
        })?;
        let files = self.backend.payload_files().unwrap_or_default();
        let taken = files.into_iter().find(|file| file.first >= first && file.last <= last);
        Ok(taken.map(|file| file.path.into()))
    }

    /// Refuses to write where the disk would be full behind it: what is found out beforehand does no harm.
    pub(crate) fn check_free(&self, bytes: u64) -> Result<(), StoreError> {
        let wanted = bytes.saturating_add(bytes / 64).saturating_add(self.reserve.margin());
        match free_bytes(self.backend.path()) {
            Some(free) if free < wanted => Err(StoreError::OutOfSpace {
                path: self.backend.path().to_path_buf(),
                detail: format!("{wanted} bytes are needed, {free} are free"),
            }),
            _ => Ok(()),
        }
    }

    /// Opens the database anew if an earlier write left it in doubt.
    pub(crate) fn sound(&self) -> Result<(), StoreError> {
        if !self.backend.is_suspect() {
            return Ok(());
        }
        match self.backend.reopen() {
            Err(StoreError::OutOfSpace { .. }) if self.reserve.release() => self.backend.reopen(),
            outcome => outcome,
        }
    }

    /// Writes rows and syncs them. A full disk is met with the reserve, a catalogue that takes no more writes because it
    /// is damaged by writing it anew.
    pub(crate) fn commit(&self, action: &'static str, changes: &[Change]) -> Result<(), StoreError> {
        self.sound()?;
        match self.backend.write(action, changes, Sync::Now) {
            Err(StoreError::OutOfSpace { .. }) if self.reserve.release() => {}
            Err(StoreError::Damaged { .. }) => self.backend.rebuild(&Family::ROWS)?,
            outcome => return outcome,
        }
        self.sound()?;
        self.backend.write(action, changes, Sync::Now)
    }

    /// Takes back rows whose commit failed, as they may have reached the disk, then the file that they speak of. Where even
    /// that fails the file stays, and the next opening goes by the rows it finds.
    pub(crate) fn undo(&self, changes: Vec<Change>, first: u64, last: u64) {
        let undone = self.commit("taking back a failed write", &changes);
        if let Err(error) = undone.and_then(|()| self.backend.drop_files(first, last)) {
            tracing::warn!(%error, "what a failed write left behind goes when the store is opened next");
        }
    }
}

pub(crate) fn segment_change(first: u64, row: Option<SegmentRow>) -> Change {
    (Family::Segments, first.to_be_bytes().to_vec(), row.map(|row| row.encode()))
}

/// Enters where the chunks of a file lie, given where each of its values does.
pub(crate) fn set_offsets(rows: &mut [ChunkRow], places: &[u64]) {
    let mut places = places.iter().copied();
    for row in rows {
        let layers: Vec<u64> = places.by_ref().take(row.layers.len()).collect();
        row.offset = chunk_offset(&layers, row.shape.bytes_per_side(row.tokens).unwrap_or(0));
    }
}

fn end_pending(state: &mut State, put: &PendingPut) {
    if state.pending.remove(&put.chunk.key).is_some() {
        state.pending_bytes -= put.bytes;
    }
}

fn write_layers(
    put: &PendingPut,
    number: u64,
    shape: &crate::shape::KvShape,
    value: &mut Vec<u8>,
    put_row: &mut PutRow<'_>,
) -> Result<Vec<LayerRecord>, rocksdb::Error> {
    let mut records = Vec::with_capacity(put.chunk.layers.len());
    for (index, layer) in (0u32..).zip(&put.chunk.layers) {
        let parts = [&layer.keys[..], &layer.values[..]];
        let crc = crc32c(&parts);
        format::encode_into(&layer_header(&put.chunk.key, shape, put.chunk.tokens, index), &parts, crc, value);
        put_row(&payload_key(number, index), value)?;
        records.push(LayerRecord { bytes: (parts[0].len() + parts[1].len()) as u64, crc });
    }
    Ok(records)
}

/// Asks the writer for something and waits for it.
pub(crate) fn ask(core: &Core, task: Task) -> Result<u64, StoreError> {
    let done = Arc::<Completion<u64>>::default();
    if !core.mailbox.push(Work::Other(task, Arc::clone(&done))) {
        return Err(StoreError::Stopped { path: core.backend.path().to_path_buf() });
    }
    done.wait()
}
