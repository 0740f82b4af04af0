//! What opening a store reads of its catalogue, and what it puts right. No payload is touched.

use std::collections::{HashMap, HashSet};

use crate::backend::{Access, Backend, Change, Family, Sync};
use crate::catalogue::{Entry, Segment, State};
use crate::error::StoreError;
use crate::eviction::SegmentBytes;
use crate::key::ChunkKey;
use crate::open::OpenReport;
use crate::records::{ChunkRow, ModelInfo, SegmentRow, Usage};

/// Reads the catalogue. Where it may, it drops payload files that nobody claims, removes rows
/// whose payload is gone, and writes anew the families that cannot be read whole.
pub(crate) fn recover(backend: &Backend, access: Access, report: &mut OpenReport) -> Result<State, StoreError> {
    let mut recovery = Recovery { backend, report, broken: Vec::new(), sweep: Vec::new() };
    let mut state = State::default();
    state.models = recovery.models()?;
    let gone = recovery.segments(&mut state)?;
    let usage = recovery.usage()?;
    recovery.chunks(&mut state, usage)?;
    let Recovery { broken, sweep, .. } = recovery;
    let unclaimed: Vec<u64> =
        state.segments.iter().filter(|(_, s)| s.bytes.live == 0).map(|(first, _)| *first).collect();
    report.damaged = state.damaged.values().cloned().collect();
    report.damaged.sort_by_key(|damage| damage.key);
    for damage in &report.damaged {
        tracing::warn!(key = %damage.key, expected = damage.expected, found = damage.found, "damaged chunk");
    }
    if access == Access::Read {
        return Ok(state);
    }
    for (first, last) in gone {
        backend.drop_files(first, last)?;
    }
    for first in unclaimed {
        if let Some(segment) = state.segments.remove(&first) {
            backend.drop_files(first, segment.last)?;
        }
    }
    if !broken.is_empty() {
        backend.rebuild(&broken)?;
    }
    if !sweep.is_empty() {
        backend.write("sweeping the catalogue", &sweep, Sync::Later)?;
    }
    Ok(state)
}

/// What reading the catalogue has found so far.
struct Recovery<'a> {
    backend: &'a Backend,
    report: &'a mut OpenReport,
    /// Families that cannot be read whole.
    broken: Vec<Family>,
    /// Rows that mean nothing any more.
    sweep: Vec<Change>,
}

impl Recovery<'_> {
    fn scan(&mut self, family: Family, visit: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), StoreError> {
        if let Some(problem) = self.backend.scan(family, visit)? {
            tracing::warn!(problem, "part of the chunk store's catalogue cannot be read");
            self.report.unreadable.push(problem);
            self.broken.push(family);
        }
        Ok(())
    }

    fn models(&mut self) -> Result<Vec<ModelInfo>, StoreError> {
        let mut models = Vec::new();
        self.scan(Family::Models, &mut |_, row| match ModelInfo::decode(row) {
            Ok(model) => models.push(model),
            Err(error) => tracing::warn!(expected = error.expected, found = error.found, "a model's row is damaged"),
        })?;
        Ok(models)
    }

    /// Enters the payload files that are there whole. Returns the others.
    fn segments(&mut self, state: &mut State) -> Result<Vec<(u64, u64)>, StoreError> {
        let mut rows: HashMap<u64, SegmentRow> = HashMap::new();
        let mut odd = Vec::new();
        self.scan(Family::Segments, &mut |key, row| {
            let first = <[u8; 8]>::try_from(key).map(u64::from_be_bytes);
            match (first, SegmentRow::decode(row)) {
                (Ok(first), Ok(row)) => drop(rows.insert(first, row)),
                _ => odd.push(key.to_vec()),
            }
        })?;
        let mut gone = Vec::new();
        for file in self.backend.payload_files()? {
            let row = rows.remove(&file.first);
            let last = row.map_or(file.last, |row| row.last.max(file.last));
            state.next_number = state.next_number.max(last + 1);
            if !file.present {
                gone.push((file.first, last));
                continue;
            }
            let total = row.map_or(0, |row| row.payload_bytes);
            state.segments.insert(
                file.first,
                Segment { last, path: Some(file.path.into()), bytes: SegmentBytes { total, live: 0 } },
            );
            self.report.orphans += u64::from(row.is_none());
        }
        // What is left speaks of files that are gone.
        let stale = rows.keys().map(|first| first.to_be_bytes().to_vec());
        self.sweep.extend(stale.chain(odd).map(|key| (Family::Segments, key, None)));
        Ok(gone)
    }

    fn usage(&mut self) -> Result<HashMap<ChunkKey, Usage>, StoreError> {
        let mut usage = HashMap::new();
        let mut odd = Vec::new();
        self.scan(Family::Usage, &mut |row_key, row| {
            let read = ChunkKey::from_bytes(row_key).and_then(|key| Some((key, Usage::decode(row, &key).ok()?)));
            match read {
                Some((key, read)) => drop(usage.insert(key, read)),
                // A damaged row costs a worse choice of victims, nothing else.
                None => odd.push(row_key.to_vec()),
            }
        })?;
        self.sweep.extend(odd.into_iter().map(|key| (Family::Usage, key, None)));
        Ok(usage)
    }

    /// Makes the chunks visible whose rows are whole and whose payload files are there.
    fn chunks(&mut self, state: &mut State, mut usage: HashMap<ChunkKey, Usage>) -> Result<(), StoreError> {
        let mut lost = Vec::new();
        let mut claimed = HashSet::new();
        self.scan(Family::Chunks, &mut |row_key, row| {
            let Some(key) = ChunkKey::from_bytes(row_key) else {
                lost.push(row_key.to_vec());
                return;
            };
            match ChunkRow::decode(row, &key) {
                Ok(row) => match state.segment_of(row.number) {
                    Some(segment) => {
                        claimed.insert(segment);
                        let used = usage.remove(&key);
                        let entry = entry(state, &row, used);
                        state.insert(key, entry);
                    }
                    None => lost.push(row_key.to_vec()),
                },
                Err(error) => {
                    usage.remove(&key);
                    state.damaged.insert(key, crate::reading::damage(key, None, error));
                }
            }
        })?;
        self.report.lost = lost.len() as u64;
        if !lost.is_empty() {
            tracing::warn!(chunks = lost.len(), "payload files of cached chunks are gone");
        }
        // A file that chunks lie in is no unfinished write, whatever became of its own row.
        let unclaimed = |first: &&u64| !claimed.contains(*first);
        self.report.orphans = self.report.orphans.min(state.segments.keys().filter(unclaimed).count() as u64);
        self.sweep.extend(lost.into_iter().map(|key| (Family::Chunks, key, None)));
        self.sweep.extend(usage.keys().map(|key| (Family::Usage, key.to_bytes().to_vec(), None)));
        Ok(())
    }
}

fn entry(state: &mut State, row: &ChunkRow, usage: Option<Usage>) -> Entry {
    let model = state.model_index(&row.model, &row.shape).unwrap_or_else(|| {
        // Its row is lost; only the name was in it alone.
        state.enter_model(&ModelInfo { fingerprint: row.model, name: "unknown".to_owned(), shape: row.shape })
    });
    let stored = Usage { last_used_micros: row.created_unix.saturating_mul(1_000_000), ..Usage::default() };
    let mut usage = usage.unwrap_or(stored);
    if usage.saved_micros == 0 {
        // Noted by a build that did not count it.
        usage.saved_micros = usage.hits.saturating_mul(row.compute_micros);
    }
    Entry {
        number: row.number,
        offset: row.offset,
        tokens: row.tokens,
        bytes: row.payload_bytes(),
        created_unix: row.created_unix,
        compute_micros: row.compute_micros,
        model,
        codec: row.codec,
        usage,
    }
}
