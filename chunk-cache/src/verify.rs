//! Reading everything back, to find damage before a request does.

use crate::backend::Family;
use crate::catalogue::{DamagedChunk, Entry};
use crate::error::StoreError;
use crate::format::{self, FormatError};
use crate::key::ChunkKey;
use crate::reading::{ReadError, damage};
use crate::records::LayerRecord;
use crate::writer::Core;

/// What [`ChunkStore::verify`](crate::ChunkStore::verify) found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Chunks read in full.
    pub chunks: u64,
    /// Bytes of keys and values that were read and found right.
    pub bytes: u64,
    /// Damaged chunks, those already known included. They count as absent until stored anew.
    pub damaged: Vec<DamagedChunk>,
    /// Parts of the catalogue that could not be read.
    pub unreadable: Vec<String>,
}

impl VerifyReport {
    /// Whether nothing was found wrong.
    pub fn is_clean(&self) -> bool {
        self.damaged.is_empty() && self.unreadable.is_empty()
    }
}

impl Core {
    pub(crate) fn verify(&self) -> Result<VerifyReport, StoreError> {
        let mut report = VerifyReport::default();
        let mut chunks: Vec<(ChunkKey, Entry)> = {
            let state = self.catalogue.lock();
            report.damaged.extend(state.damaged.values().cloned());
            state.entries.iter().map(|(key, entry)| (*key, *entry)).collect()
        };
        // In the order in which they lie on disk.
        chunks.sort_unstable_by_key(|(_, entry)| entry.number);
        for (key, entry) in chunks {
            match self.verify_chunk(&key, &entry) {
                Ok(bytes) => {
                    report.chunks += 1;
                    report.bytes += bytes;
                }
                Err((layer, ReadError::Damage(error))) => {
                    let damage = damage(key, layer, error);
                    // Else it was removed or moved meanwhile: neither right nor wrong.
                    if self.condemn(entry.number, &damage) {
                        report.damaged.push(damage);
                    }
                }
                Err((_, ReadError::Store(error))) => return Err(error),
            }
        }
        report.damaged.sort_by_key(|damage| damage.key);
        for family in Family::ROWS {
            report.unreadable.extend(self.backend.scan(family, &mut |_, _| {})?);
        }
        Ok(report)
    }

    /// Bytes of keys and values. An error names the layer at fault, if it is one.
    fn verify_chunk(&self, key: &ChunkKey, entry: &Entry) -> Result<u64, (Option<u32>, ReadError)> {
        let row = self.chunk_row(key).map_err(|error| (None, error))?;
        if (row.number, row.tokens, row.payload_bytes()) != (entry.number, entry.tokens, entry.bytes) {
            let wanted = format!("{entry:?}");
            return Err((None, FormatError::new(wanted, format!("{row:?}")).into()));
        }
        for (layer, wanted) in (0..).zip(&row.layers) {
            let read = || -> Result<(), ReadError> {
                let stored = self.stored_layer(key, entry, &row.shape, layer)?;
                let value = format::decode(stored.as_ref())?;
                let found = LayerRecord { bytes: value.payload.len() as u64, crc: value.payload_crc };
                if found != *wanted {
                    return Err(FormatError::new(format!("{wanted:?}"), format!("{found:?}")).into());
                }
                Ok(())
            };
            read().map_err(|error| (Some(layer), error))?;
        }
        Ok(entry.bytes)
    }
}
