//! A chunk's rows: the order in which they are written and deleted, and how they are checked.
//!
//! Writing takes two steps with a sync after each: the payload, then the manifest that makes it visible.
//! Removing takes them in reverse. So whatever moment a crash picks, a visible chunk is whole, and what
//! is not visible is swept when the store is opened.

use crate::backend::{Family, HEAD_ROW, Sync, row_key};
use crate::error::{Fault, StoreError, classify};
use crate::format::{self, FormatError};
use crate::key::ChunkKey;
use crate::open::payload_rows;
use crate::records::{LayerRecord, Manifest, head_header, layer_header};
use crate::shape::LayerKv;
use crate::store::{ChunkStore, now_micros};

impl ChunkStore {
    /// Manifests first, safely; then the payloads, which nothing refers to any more.
    pub(crate) fn erase(&self, keys: &[ChunkKey]) -> Result<(), StoreError> {
        let fail = self.backend.fail("removing a chunk");
        let manifests = keys.iter().map(|key| (Family::Manifest, key.0.to_vec()));
        self.backend.delete(manifests, Sync::Now).map_err(&fail)?;
        let payloads = keys.iter().flat_map(|key| {
            let usage = (Family::Usage, key.0.to_vec());
            payload_rows(key, &self.shape).into_iter().chain([usage])
        });
        if let Err(error) = self.backend.delete(payloads, Sync::Later) {
            // The chunks are gone for every reader; their payload is swept at the next opening.
            tracing::warn!(%error, "payload of removed chunks stays until the store is opened again");
        }
        Ok(())
    }

    pub(crate) fn write(&self, key: &ChunkKey, tokens: u32, layers: &[LayerKv]) -> Result<Manifest, StoreError> {
        let manifest = self.write_payload(key, tokens, layers)?;
        let bytes = manifest.encode(key, &self.shape);
        self.backend
            .put(Family::Manifest, &key.0, &bytes, Sync::Now)
            .map_err(self.backend.fail("writing a manifest"))?;
        Ok(manifest)
    }

    /// Writes head and layers and syncs them. Nothing is visible yet.
    pub(crate) fn write_payload(
        &self,
        key: &ChunkKey,
        tokens: u32,
        layers: &[LayerKv],
    ) -> Result<Manifest, StoreError> {
        let fail = self.backend.fail("writing a payload");
        let put = |row, bytes: Vec<u8>| {
            let row = row_key(key, row);
            self.backend.put(Family::Kv, &row, &bytes, Sync::Later)
        };
        let head = head_header(key, &self.shape, tokens);
        put(HEAD_ROW, format::encode(&head, &[])).map_err(&fail)?;
        let mut records = Vec::with_capacity(layers.len());
        for (index, layer) in (0u32..).zip(layers) {
            let parts = [&layer.keys[..], &layer.values[..]];
            let header = layer_header(key, &self.shape, tokens, index);
            put(index + 1, format::encode(&header, &parts)).map_err(&fail)?;
            records.push(LayerRecord { bytes: (parts[0].len() + parts[1].len()) as u64, crc: format::crc_of(&parts) });
        }
        self.backend.sync().map_err(&fail)?;
        Ok(Manifest { tokens, created_unix: now_micros() / 1_000_000, layers: records })
    }

    pub(crate) fn write_usage(&self, key: &ChunkKey) -> Result<(), StoreError> {
        let usage = self.catalogue.lock().entries.get(key).map(|e| e.usage);
        let Some(usage) = usage else { return Ok(()) };
        let bytes = usage.encode(key, &self.shape);
        self.backend.put(Family::Usage, &key.0, &bytes, Sync::Later).map_err(self.backend.fail("noting a use"))
    }

    /// Reads one layer from disk and checks it against the manifest. The inner error is damage.
    pub(crate) fn read_layer(
        &self,
        key: &ChunkKey,
        layer: u32,
        manifest: &Manifest,
    ) -> Result<Result<LayerKv, FormatError>, StoreError> {
        let row = match self.backend.get(Family::Kv, &row_key(key, layer + 1)) {
            Ok(row) => row,
            Err(error) if classify(&error.kind(), error.as_ref()) == Fault::Damage => {
                return Ok(Err(FormatError::new("a readable payload", error.to_string())));
            }
            Err(error) => return Err(self.backend.fail("reading a payload")(error)),
        };
        let Some(row) = row else {
            return Ok(Err(FormatError::new("a payload", "none")));
        };
        Ok(self.check_layer(&row, key, layer, manifest))
    }

    fn check_layer(&self, row: &[u8], key: &ChunkKey, layer: u32, manifest: &Manifest) -> Result<LayerKv, FormatError> {
        let header = layer_header(key, &self.shape, manifest.tokens, layer);
        let value = format::decode_as(row, &header)?;
        let found = LayerRecord { bytes: value.payload.len() as u64, crc: value.payload_crc };
        match manifest.layers.get(layer as usize) {
            Some(wanted) if *wanted == found => {}
            wanted => {
                let expected = format!("{wanted:?}");
                return Err(FormatError::new(expected, format!("{found:?}")));
            }
        }
        // Keys and values are of equal size by the layout, which the manifest was checked against.
        let (keys, values) = value.payload.split_at(value.payload.len() / 2);
        Ok(LayerKv { keys: keys.to_vec(), values: values.to_vec() })
    }
}
