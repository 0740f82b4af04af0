//! Reading rows and layers, and telling damage from a failing device.
//!
//! A layer is read straight from its file where its place is known (see `direct`), covered by the payload's own checksum.
//! Otherwise RocksDB reads it into memory of its own, once, and covers it with its checksum of the block. Either way the
//! header, which has a checksum of its own, says whose it is, and the memory that was read into is what the caller gets.

use bytes::Bytes;

use crate::backend::{Family, PinnedValue};
use crate::catalogue::{DamagedChunk, Entry};
use crate::error::StoreError;
use crate::format::{self, FormatError, HEADER_LEN};
use crate::key::{ChunkKey, RAW_CODEC};
use crate::records::{ChunkRow, layer_header};
use crate::shape::{KvShape, LayerKv};
use crate::writer::Core;

/// Why something could not be read.
#[derive(Debug)]
pub(crate) enum ReadError {
    /// It is damaged, or not there.
    Damage(FormatError),
    /// The device or the process is at fault.
    Store(StoreError),
}

impl From<FormatError> for ReadError {
    fn from(error: FormatError) -> Self {
        ReadError::Damage(error)
    }
}

impl From<StoreError> for ReadError {
    fn from(error: StoreError) -> Self {
        match error.is_damage() {
            true => ReadError::Damage(FormatError::new("what was stored", error.to_string())),
            false => ReadError::Store(error),
        }
    }
}

impl Core {
    /// A chunk's row on disk.
    pub(crate) fn chunk_row(&self, key: &ChunkKey) -> Result<ChunkRow, ReadError> {
        let row = self.backend.get(Family::Chunks, &key.to_bytes())?;
        let row = row.ok_or_else(|| FormatError::new("a row on disk", "none"))?;
        Ok(ChunkRow::decode(&row, key)?)
    }

    /// One layer as it is stored, header included; the header is checked.
    pub(crate) fn stored_layer(
        &self,
        key: &ChunkKey,
        entry: &Entry,
        shape: &KvShape,
        layer: u32,
    ) -> Result<PinnedValue, ReadError> {
        let value = self.backend.payload(entry.number, layer)?;
        let value = value.ok_or_else(|| FormatError::new("a payload", "none"))?;
        let found = format::decode_header(value.as_ref())?;
        found.check(&layer_header(key, shape, entry.tokens, layer))?;
        let raw = shape.bytes_per_side(entry.tokens).and_then(|bytes| bytes.checked_mul(2));
        if entry.codec == RAW_CODEC && raw != Some(found.payload.len() as u64) {
            let found = format!("{} bytes", found.payload.len());
            return Err(FormatError::new(format!("{raw:?} bytes"), found).into());
        }
        Ok(value)
    }

    /// Keys and values of one layer, in the memory that they were read into.
    pub(crate) fn read_layer(
        &self,
        key: &ChunkKey,
        entry: &Entry,
        shape: &KvShape,
        layer: u32,
    ) -> Result<LayerKv, ReadError> {
        if let Some(kv) = self.read_directly(key, entry, shape, layer) {
            return Ok(kv);
        }
        let mut keys = Bytes::from_owner(self.stored_layer(key, entry, shape, layer)?).split_off(HEADER_LEN);
        // Both sides are of equal size by the layout, which the length was compared with.
        let values = keys.split_off(keys.len() / 2);
        Ok(LayerKv { keys, values })
    }

    /// Declares a chunk damaged, unless it was removed or replaced since it was looked at.
    pub(crate) fn condemn(&self, number: u64, damage: &DamagedChunk) -> bool {
        let condemned = self.catalogue.lock().condemn(number, damage.clone());
        if condemned {
            tracing::warn!(
                key = %damage.key, layer = damage.layer, expected = damage.expected, found = damage.found,
                "damaged chunk"
            );
        }
        condemned
    }
}

pub(crate) fn damage(key: ChunkKey, layer: Option<u32>, error: FormatError) -> DamagedChunk {
    DamagedChunk { key, layer, expected: error.expected, found: error.found }
}

pub(crate) fn corrupt(damage: DamagedChunk) -> StoreError {
    StoreError::Corrupt { key: damage.key, layer: damage.layer, expected: damage.expected, found: damage.found }
}
