//! The payloads of the small values: identity, budget, manifest, usage.

use crate::format::{self, FormatError, Header, Kind, Reader};
use crate::key::ChunkKey;
use crate::shape::KvShape;

const NO_KEY: ChunkKey = ChunkKey([0; 32]);

/// What a whole store belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) model: [u8; 32],
    pub(crate) model_name: String,
    pub(crate) shape: KvShape,
}

impl Identity {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let header = Header { kind: Kind::Identity, key: NO_KEY, layer: 0, shape: self.shape, tokens: 0 };
        format::encode(&header, &[&self.model, self.model_name.as_bytes()])
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Identity, FormatError> {
        let value = format::decode(bytes)?;
        if value.header.kind != Kind::Identity {
            let found = format!("{:?}", value.header.kind);
            return Err(FormatError::new("the identity of the store", found));
        }
        let mut fields = Reader { rest: value.payload };
        Ok(Identity {
            model: fields.take()?,
            model_name: String::from_utf8_lossy(fields.rest).into_owned(),
            shape: value.header.shape,
        })
    }
}

/// Bytes of keys and values that a store may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Budget(pub(crate) u64);

impl Budget {
    pub(crate) fn encode(self, shape: &KvShape) -> Vec<u8> {
        format::encode(&budget_header(shape), &[&self.0.to_le_bytes()])
    }

    pub(crate) fn decode(bytes: &[u8], shape: &KvShape) -> Result<Budget, FormatError> {
        let value = format::decode_as(bytes, &budget_header(shape))?;
        Ok(Budget(Reader { rest: value.payload }.u64()?))
    }
}

fn budget_header(shape: &KvShape) -> Header {
    Header { kind: Kind::Budget, key: NO_KEY, layer: 0, shape: *shape, tokens: 0 }
}

/// Length and checksum of one layer's payload (keys, then values).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LayerRecord {
    pub(crate) bytes: u64,
    pub(crate) crc: u32,
}

/// What makes a chunk visible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) tokens: u32,
    pub(crate) created_unix: u64,
    pub(crate) layers: Vec<LayerRecord>,
}

impl Manifest {
    /// Bytes of keys and values over all layers.
    pub(crate) fn payload_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.bytes).sum()
    }

    pub(crate) fn encode(&self, key: &ChunkKey, shape: &KvShape) -> Vec<u8> {
        let mut payload = self.created_unix.to_le_bytes().to_vec();
        for layer in &self.layers {
            payload.extend_from_slice(&layer.bytes.to_le_bytes());
            payload.extend_from_slice(&layer.crc.to_le_bytes());
        }
        let header = Header { kind: Kind::Manifest, key: *key, layer: 0, shape: *shape, tokens: self.tokens };
        format::encode(&header, &[&payload])
    }

    /// Reads the manifest of `key` in a store of layout `shape`, and checks that the layers it lists
    /// have the sizes that the layout gives them.
    pub(crate) fn decode(bytes: &[u8], key: &ChunkKey, shape: &KvShape) -> Result<Manifest, FormatError> {
        let value = format::decode(bytes)?;
        let wanted = Header { kind: Kind::Manifest, key: *key, layer: 0, shape: *shape, tokens: value.header.tokens };
        if value.header != wanted {
            let found = format!("{:?}", value.header);
            return Err(FormatError::new(format!("{wanted:?}"), found));
        }
        let mut fields = Reader { rest: value.payload };
        let created_unix = fields.u64()?;
        let mut layers = Vec::new();
        while !fields.rest.is_empty() {
            layers.push(LayerRecord { bytes: fields.u64()?, crc: fields.u32()? });
        }
        let tokens = value.header.tokens;
        let per_layer = shape.bytes_per_side(tokens).and_then(|b| b.checked_mul(2));
        let fits = |layer: &LayerRecord| Some(layer.bytes) == per_layer;
        if layers.len() as u64 != u64::from(shape.layers) || !layers.iter().all(fits) {
            let expected = format!("{} layers of {per_layer:?} bytes", shape.layers);
            return Err(FormatError::new(expected, format!("{layers:?}")));
        }
        Ok(Manifest { tokens, created_unix, layers })
    }
}

/// When a chunk was last used, and how often. Losing it costs only a worse choice of victims.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Microseconds since the Unix epoch.
    pub(crate) last_used_micros: u64,
    pub(crate) hits: u64,
}

impl Usage {
    pub(crate) fn encode(&self, key: &ChunkKey, shape: &KvShape) -> Vec<u8> {
        let parts = [self.last_used_micros.to_le_bytes(), self.hits.to_le_bytes()];
        format::encode(&usage_header(key, shape), &[&parts[0], &parts[1]])
    }

    pub(crate) fn decode(bytes: &[u8], key: &ChunkKey, shape: &KvShape) -> Result<Usage, FormatError> {
        let value = format::decode_as(bytes, &usage_header(key, shape))?;
        let mut fields = Reader { rest: value.payload };
        Ok(Usage { last_used_micros: fields.u64()?, hits: fields.u64()? })
    }
}

fn usage_header(key: &ChunkKey, shape: &KvShape) -> Header {
    Header { kind: Kind::Usage, key: *key, layer: 0, shape: *shape, tokens: 0 }
}

/// Header of the empty row that precedes a chunk's layers.
pub(crate) fn head_header(key: &ChunkKey, shape: &KvShape, tokens: u32) -> Header {
    Header { kind: Kind::Head, ..layer_header(key, shape, tokens, 0) }
}

/// Header of one layer's payload.
pub(crate) fn layer_header(key: &ChunkKey, shape: &KvShape, tokens: u32, layer: u32) -> Header {
    Header { kind: Kind::Layer, key: *key, layer, shape: *shape, tokens }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::shape::KvDtype;
    use proptest::prelude::*;

    const SHAPE: KvShape = KvShape { layers: 3, kv_heads: 2, head_dim: 4, dtype: KvDtype::Bf16 };
    const KEY: ChunkKey = ChunkKey([7; 32]);

    fn manifest(tokens: u32, crcs: [u32; 3]) -> Manifest {
        let bytes = SHAPE.bytes_per_side(tokens).unwrap() * 2;
        let layers = crcs.map(|crc| LayerRecord { bytes, crc }).to_vec();
        Manifest { tokens, created_unix: 1_700_000_000, layers }
    }

    proptest! {
        #[test]
        fn records_round_trip(tokens: u32, crcs: [u32; 3], model: [u8; 32], name: String, last: u64, hits: u64) {
            let m = manifest(tokens, crcs);
            prop_assert_eq!(Manifest::decode(&m.encode(&KEY, &SHAPE), &KEY, &SHAPE).unwrap(), m);
            let identity = Identity { model, model_name: name, shape: SHAPE };
            prop_assert_eq!(Identity::decode(&identity.encode()).unwrap(), identity);
            let usage = Usage { last_used_micros: last, hits };
            prop_assert_eq!(Usage::decode(&usage.encode(&KEY, &SHAPE), &KEY, &SHAPE).unwrap(), usage);
            prop_assert_eq!(Budget::decode(&Budget(hits).encode(&SHAPE), &SHAPE).unwrap(), Budget(hits));
        }

        #[test]
        fn any_bytes_behind_a_right_header_are_survived(payload: Vec<u8>, tokens: u32, kind in 0..4u8) {
            let kind = [Kind::Manifest, Kind::Usage, Kind::Identity, Kind::Budget][usize::from(kind)];
            let header = Header { kind, key: KEY, layer: 0, shape: SHAPE, tokens };
            let bytes = format::encode(&header, &[&payload]);
            let _ = Manifest::decode(&bytes, &KEY, &SHAPE);
            let _ = Usage::decode(&bytes, &KEY, &SHAPE);
            let _ = Identity::decode(&bytes);
            let _ = Budget::decode(&bytes, &SHAPE);
        }
    }

    #[test]
    fn a_manifest_is_bound_to_its_key_and_layout() {
        let bytes = manifest(5, [1, 2, 3]).encode(&KEY, &SHAPE);
        assert!(Manifest::decode(&bytes, &ChunkKey([8; 32]), &SHAPE).is_err());
        assert!(Manifest::decode(&bytes, &KEY, &KvShape { layers: 4, ..SHAPE }).is_err());
        let mut short = manifest(5, [1, 2, 3]);
        short.layers.pop();
        assert!(Manifest::decode(&short.encode(&KEY, &SHAPE), &KEY, &SHAPE).is_err());
        let mut odd = manifest(5, [1, 2, 3]);
        odd.layers[1].bytes += 1;
        assert!(Manifest::decode(&odd.encode(&KEY, &SHAPE), &KEY, &SHAPE).is_err());
    }
}
