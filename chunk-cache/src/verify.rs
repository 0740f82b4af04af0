//! Reading everything back, to find damage before a request does.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::backend::{Family, HEAD_ROW, row_key, split_row_key};
use crate::catalogue::{DamagedChunk, Entry};
use crate::error::{Fault, StoreError, classify};
use crate::format::{self, FormatError};
use crate::key::ChunkKey;
use crate::records::{Manifest, head_header};
use crate::store::{ChunkStore, damage};

/// What [`ChunkStore::verify`] found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Chunks read in full.
    pub chunks: u64,
    /// Bytes of keys and values that were read and found right.
    pub bytes: u64,
    /// Damaged chunks, those already known included. They count as absent until stored anew.
    pub damaged: Vec<DamagedChunk>,
    /// Chunks with payload but without a manifest. They are invisible, and swept when the store is opened
    /// next.
    pub orphans: Vec<ChunkKey>,
    /// Parts of the directory that could not be read and belong to no chunk in particular.
    pub unreadable: Vec<String>,
}

impl VerifyReport {
    /// Whether nothing was found wrong.
    pub fn is_clean(&self) -> bool {
        self.damaged.is_empty() && self.orphans.is_empty() && self.unreadable.is_empty()
    }
}

impl ChunkStore {
    /// Reads every manifest and every payload from disk and compares it with its checksums. Damaged
    /// chunks stop being served. Other threads may use the store meanwhile.
    ///
    /// # Errors
    /// Those of a failing device; damage is reported, not an error.
    pub fn verify(&self) -> Result<VerifyReport, StoreError> {
        let mut report = VerifyReport::default();
        let mut chunks: Vec<(ChunkKey, Entry)> = {
            let state = self.catalogue.lock();
            report.damaged.extend(state.damaged.values().cloned());
            let entries = state.entries.iter();
            entries.map(|(key, entry)| (*key, entry.clone())).collect()
        };
        chunks.sort_unstable_by_key(|(key, _)| *key);
        for (key, entry) in chunks {
            match self.verify_chunk(&key, &entry.manifest)? {
                Ok(bytes) => {
                    report.chunks += 1;
                    report.bytes += bytes;
                }
                // Removed meanwhile: neither right nor wrong.
                Err(damage) if !self.condemn(entry.generation, &damage) => {}
                Err(damage) => report.damaged.push(damage),
            }
        }
        report.damaged.sort_by_key(|damage| damage.key);
        self.find_strays(&mut report)?;
        Ok(report)
    }

    fn verify_chunk(&self, key: &ChunkKey, manifest: &Arc<Manifest>) -> Result<Result<u64, DamagedChunk>, StoreError> {
        let on_disk = self.read_row(Family::Manifest, &key.0)?.and_then(|row| {
            let found = Manifest::decode(&row, key, &self.shape)?;
            if found == **manifest {
                return Ok(());
            }
            Err(FormatError::new(format!("{manifest:?}"), format!("{found:?}")))
        });
        let head = self.read_row(Family::Kv, &row_key(key, HEAD_ROW))?;
        let head = head.and_then(|row| {
            let wanted = head_header(key, &self.shape, manifest.tokens);
            format::decode_as(&row, &wanted).map(|_| ())
        });
        if let Err(error) = on_disk.and(head) {
            return Ok(Err(damage(*key, None, error)));
        }
        for layer in 0..self.shape.layers {
            if let Err(error) = self.read_layer(key, layer, manifest)? {
                return Ok(Err(damage(*key, Some(layer), error)));
            }
        }
        Ok(Ok(manifest.payload_bytes()))
    }

    /// The outer error is the device's, the inner one damage.
    fn read_row(&self, family: Family, key: &[u8]) -> Result<Result<Vec<u8>, FormatError>, StoreError> {
        match self.backend.get(family, key) {
            Ok(Some(row)) => Ok(Ok(row.to_vec())),
            Ok(None) => Ok(Err(FormatError::new("a row on disk", "none"))),
            Err(error) if classify(&error.kind(), error.as_ref()) == Fault::Damage => {
                Ok(Err(FormatError::new("a readable row", error.to_string())))
            }
            Err(error) => Err(self.backend.fail("verifying")(error)),
        }
    }

    /// Looks for payloads nobody claims, and for regions that cannot be read.
    fn find_strays(&self, report: &mut VerifyReport) -> Result<(), StoreError> {
        let mut strays = BTreeSet::new();
        for family in [Family::Manifest, Family::Kv] {
            let mut rows = self.backend.scan(family);
            rows.seek_to_first();
            while let Some(row) = rows.key() {
                let key = match family {
                    Family::Manifest => <[u8; 32]>::try_from(row).ok().map(ChunkKey),
                    _ => split_row_key(row).map(|(key, _)| key),
                };
                let Some(key) = key else {
                    let length = row.len();
                    report.unreadable.push(format!("{}: a key of {length} bytes", family.name()));
                    rows.next();
                    continue;
                };
                if !self.is_known(&key) {
                    strays.insert(key);
                }
                match key.successor() {
                    Some(next) if family == Family::Kv => rows.seek(row_key(&next, HEAD_ROW)),
                    Some(_) => rows.next(),
                    None => break,
                }
            }
            if let Err(error) = rows.status() {
                report.unreadable.push(format!("{}: {error}", family.name()));
            }
        }
        for key in strays {
            // The scan saw a moment that may have passed: ask again.
            let has_row = self.read_row(Family::Kv, &row_key(&key, HEAD_ROW))?.is_ok();
            if has_row && !self.is_known(&key) {
                report.orphans.push(key);
            }
        }
        Ok(())
    }

    fn is_known(&self, key: &ChunkKey) -> bool {
        let state = self.catalogue.lock();
        state.entries.contains_key(key) || state.damaged.contains_key(key) || state.busy.contains(key)
    }
}
