//! The rows of the small families: what the store is, its budget, models, chunks, their use, and payload files.

use crate::format::{self, FormatError, Header, Kind, Reader};
use crate::key::ChunkKey;
use crate::shape::KvShape;

/// The row that marks a database as a chunk store; its header's version is that of the store.
pub(crate) fn encode_store() -> Vec<u8> {
    format::encode(&Header::plain(Kind::Store), &[])
}

/// Refuses a row that does not mark a chunk store of this format.
pub(crate) fn decode_store(bytes: &[u8]) -> Result<(), FormatError> {
    format::decode_as(bytes, &Header::plain(Kind::Store)).map(|_| ())
}

/// Bytes of keys and values that a store may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Budget(pub(crate) u64);

impl Budget {
    pub(crate) fn encode(self) -> Vec<u8> {
        format::encode(&Header::plain(Kind::Budget), &[&self.0.to_le_bytes()])
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Budget, FormatError> {
        let value = format::decode_as(bytes, &Header::plain(Kind::Budget))?;
        Ok(Budget(Reader { rest: value.payload }.u64()?))
    }
}

/// A model whose chunks are stored. The same weights with another layout or element type are another model here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelInfo {
    /// Fingerprint of the weights and their effective precision.
    pub fingerprint: [u8; 32],
    /// Its name, for people.
    pub name: String,
    /// Layout of its chunks.
    pub shape: KvShape,
}

impl ModelInfo {
    /// The key of the model's row: fingerprint, then layout.
    pub(crate) fn row_key(&self) -> Vec<u8> {
        [&self.fingerprint[..], &self.shape.fingerprint()].concat()
    }

    /// Whether both name the same model; the name for people plays no part.
    pub(crate) fn is_same(&self, fingerprint: &[u8; 32], shape: &KvShape) -> bool {
        self.fingerprint == *fingerprint && self.shape == *shape
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let header = Header { shape: Some(self.shape), ..Header::plain(Kind::Model) };
        format::encode(&header, &[&self.fingerprint, self.name.as_bytes()])
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<ModelInfo, FormatError> {
        let value = format::decode(bytes)?;
        let (Kind::Model, Some(shape)) = (value.header.kind, value.header.shape) else {
            return Err(FormatError::new("a model", format!("{:?}", value.header)));
        };
        let mut fields = Reader { rest: value.payload };
        let fingerprint = fields.take()?;
        Ok(ModelInfo { fingerprint, name: String::from_utf8_lossy(fields.rest).into_owned(), shape })
    }
}

/// Length and checksum of one layer's payload (keys, then values).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LayerRecord {
    pub(crate) bytes: u64,
    pub(crate) crc: u32,
}

/// An optional part of a chunk's row, such as attention sums or retrieval aids. Builds that do not know a tag keep it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// What it is.
    pub tag: u16,
    /// Its contents.
    pub bytes: Vec<u8>,
}

/// What makes a chunk visible: where its payload lies, and everything known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ChunkRow {
    /// Where the payload lies: the first part of its keys.
    pub(crate) number: u64,
    /// Offset of the first layer in the payload file; zero: not known.
    pub(crate) offset: u64,
    pub(crate) tokens: u32,
    pub(crate) shape: KvShape,
    pub(crate) model: [u8; 32],
    pub(crate) codec: u16,
    pub(crate) created_unix: u64,
    /// What computing it took.
    pub(crate) compute_micros: u64,
    /// A hash that names the tenant; zero: none.
    pub(crate) tenant: [u8; 16],
    pub(crate) layers: Vec<LayerRecord>,
    pub(crate) sections: Vec<Section>,
}

impl ChunkRow {
    /// Stored bytes of keys and values over all layers.
    pub(crate) fn payload_bytes(&self) -> u64 {
        self.layers.iter().fold(0, |sum, layer| sum.saturating_add(layer.bytes))
    }

    fn header(&self, key: &ChunkKey) -> Header {
        Header { key: Some(*key), shape: Some(self.shape), tokens: self.tokens, ..Header::plain(Kind::Chunk) }
    }

    pub(crate) fn encode(&self, key: &ChunkKey) -> Vec<u8> {
        let mut payload = self.number.to_le_bytes().to_vec();
        payload.extend_from_slice(&self.offset.to_le_bytes());
        payload.extend_from_slice(&self.model);
        payload.extend_from_slice(&self.codec.to_le_bytes());
        payload.extend_from_slice(&self.created_unix.to_le_bytes());
        payload.extend_from_slice(&self.compute_micros.to_le_bytes());
        payload.extend_from_slice(&self.tenant);
        payload.extend_from_slice(&(self.layers.len() as u32).to_le_bytes());
        for layer in &self.layers {
            payload.extend_from_slice(&layer.bytes.to_le_bytes());
            payload.extend_from_slice(&layer.crc.to_le_bytes());
        }
        for section in &self.sections {
            payload.extend_from_slice(&section.tag.to_le_bytes());
            payload.extend_from_slice(&(section.bytes.len() as u32).to_le_bytes());
            payload.extend_from_slice(&section.bytes);
        }
        format::encode(&self.header(key), &[&payload])
    }

    /// Reads the row of `key`, and checks that the layers it lists fit its layout.
    pub(crate) fn decode(bytes: &[u8], key: &ChunkKey) -> Result<ChunkRow, FormatError> {
        let value = format::decode(bytes)?;
        let header = value.header;
        let Some(shape) = header.shape else {
            return Err(FormatError::new("a chunk with a layout", format!("{header:?}")));
        };
        let mut fields = Reader { rest: value.payload };
        let mut row = ChunkRow {
            number: fields.u64()?,
            offset: fields.u64()?,
            tokens: header.tokens,
            shape,
            model: fields.take()?,
            codec: fields.u16()?,
            created_unix: fields.u64()?,
            compute_micros: fields.u64()?,
            tenant: fields.take()?,
            layers: Vec::new(),
            sections: Vec::new(),
        };
        value.check(&row.header(key))?;
        for _ in 0..fields.u32()? {
            row.layers.push(LayerRecord { bytes: fields.u64()?, crc: fields.u32()? });
        }
        while !fields.rest.is_empty() {
            let (tag, length) = (fields.u16()?, fields.u32()?);
            row.sections.push(Section { tag, bytes: fields.bytes(length as usize)?.to_vec() });
        }
        row.check_layers()?;
        Ok(row)
    }

    fn check_layers(&self) -> Result<(), FormatError> {
        let raw = self.shape.bytes_per_side(self.tokens).and_then(|bytes| bytes.checked_mul(2));
        let fits = |layer: &LayerRecord| self.codec != crate::key::RAW_CODEC || Some(layer.bytes) == raw;
        if self.layers.len() as u64 == u64::from(self.shape.layers) && self.layers.iter().all(fits) {
            return Ok(());
        }
        let expected = format!("{} layers of {raw:?} bytes", self.shape.layers);
        Err(FormatError::new(expected, format!("{} layers: {:?}", self.layers.len(), self.layers)))
    }
}

/// When a chunk was last used, and how often. Losing it costs only a worse choice of victims.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Usage {
    /// Microseconds since the Unix epoch.
    pub(crate) last_used_micros: u64,
    pub(crate) hits: u64,
    /// Compute that its uses saved.
    pub(crate) saved_micros: u64,
    /// The policy's age when it was last used.
    pub(crate) age: f64,
    /// No document refers to it any more: it makes way before all others.
    pub(crate) demoted: bool,
}

impl Usage {
    pub(crate) fn encode(&self, key: &ChunkKey) -> Vec<u8> {
        let (last, hits) = (self.last_used_micros.to_le_bytes(), self.hits.to_le_bytes());
        let (saved, age) = (self.saved_micros.to_le_bytes(), self.age.to_le_bytes());
        format::encode(&usage_header(key), &[&last, &hits, &[u8::from(self.demoted)], &saved, &age])
    }

    /// Rows of builds that did not count what uses save end before it: then it is 0, and the age.
    pub(crate) fn decode(bytes: &[u8], key: &ChunkKey) -> Result<Usage, FormatError> {
        let value = format::decode_as(bytes, &usage_header(key))?;
        let mut fields = Reader { rest: value.payload };
        let (last_used_micros, hits) = (fields.u64()?, fields.u64()?);
        let demoted = fields.take::<1>()? != [0];
        let (saved_micros, age) = match fields.rest {
            [] => (0, 0.0),
            _ => (fields.u64()?, f64::from_le_bytes(fields.take()?)),
        };
        let age = if age.is_finite() { age.max(0.0) } else { 0.0 };
        Ok(Usage { last_used_micros, hits, saved_micros, age, demoted })
    }
}

fn usage_header(key: &ChunkKey) -> Header {
    Header { key: Some(*key), ..Header::plain(Kind::Usage) }
}

/// What a payload file held when it was written; its row's key is the first chunk number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentRow {
    /// Last chunk number of the file.
    pub(crate) last: u64,
    /// Keys and values of all its chunks.
    pub(crate) payload_bytes: u64,
}

impl SegmentRow {
    pub(crate) fn encode(&self) -> Vec<u8> {
        format::encode(&Header::plain(Kind::Segment), &[&self.last.to_le_bytes(), &self.payload_bytes.to_le_bytes()])
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<SegmentRow, FormatError> {
        let value = format::decode_as(bytes, &Header::plain(Kind::Segment))?;
        let mut fields = Reader { rest: value.payload };
        Ok(SegmentRow { last: fields.u64()?, payload_bytes: fields.u64()? })
    }
}

/// Header of one layer's payload.
pub(crate) fn layer_header(key: &ChunkKey, shape: &KvShape, tokens: u32, layer: u32) -> Header {
    Header { kind: Kind::Layer, key: Some(*key), layer, shape: Some(*shape), tokens }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::key::{ChunkId, VariantId};
    use crate::shape::KvDtype;
    use proptest::prelude::*;

    const SHAPE: KvShape = KvShape { layers: 3, kv_heads: 2, head_dim: 4, dtype: KvDtype::Bf16 };
    const KEY: ChunkKey = ChunkKey { chunk: ChunkId([7; 32]), variant: VariantId([3; 16]) };

    fn row(tokens: u32, crcs: [u32; 3], sections: Vec<(u16, Vec<u8>)>) -> ChunkRow {
        let bytes = SHAPE.bytes_per_side(tokens).unwrap() * 2;
        ChunkRow {
            number: 77,
            offset: 4321,
            tokens,
            shape: SHAPE,
            model: [4; 32],
            codec: 0,
            created_unix: 1_700_000_000,
            compute_micros: 1234,
            tenant: [5; 16],
            layers: crcs.map(|crc| LayerRecord { bytes, crc }).to_vec(),
            sections: sections.into_iter().map(|(tag, bytes)| Section { tag, bytes }).collect(),
        }
    }

    proptest! {
        #[test]
        fn records_round_trip(
            tokens: u32, crcs: [u32; 3], sections: Vec<(u16, Vec<u8>)>,
            fingerprint: [u8; 32], name: String, last: u64, hits: u64, demoted: bool,
        ) {
            let chunk = row(tokens, crcs, sections);
            prop_assert_eq!(ChunkRow::decode(&chunk.encode(&KEY), &KEY).unwrap(), chunk);
            let model = ModelInfo { fingerprint, name, shape: SHAPE };
            prop_assert_eq!(ModelInfo::decode(&model.encode()).unwrap(), model);
            let usage = Usage { last_used_micros: last, hits, saved_micros: last / 3, age: last as f64, demoted };
            prop_assert_eq!(Usage::decode(&usage.encode(&KEY), &KEY).unwrap(), usage);
            prop_assert_eq!(Budget::decode(&Budget(hits).encode()).unwrap(), Budget(hits));
            let segment = SegmentRow { last, payload_bytes: hits };
            prop_assert_eq!(SegmentRow::decode(&segment.encode()).unwrap(), segment);
        }

        #[test]
        fn any_bytes_behind_a_right_header_are_survived(payload: Vec<u8>, tokens: u32, kind in 0..5u8) {
            let kind = [Kind::Chunk, Kind::Usage, Kind::Model, Kind::Budget, Kind::Segment][usize::from(kind)];
            let header = match kind {
                Kind::Chunk => Header { kind, key: Some(KEY), layer: 0, shape: Some(SHAPE), tokens },
                Kind::Usage => usage_header(&KEY),
                _ => Header::plain(kind),
            };
            let bytes = format::encode(&header, &[&payload]);
            let _ = ChunkRow::decode(&bytes, &KEY);
            let _ = Usage::decode(&bytes, &KEY);
            let _ = ModelInfo::decode(&bytes);
            let _ = Budget::decode(&bytes);
            let _ = SegmentRow::decode(&bytes);
        }
    }

    #[test]
    fn a_row_of_use_from_before_savings_were_counted_is_read() {
        let parts: [&[u8]; 3] = [&7u64.to_le_bytes(), &3u64.to_le_bytes(), &[1]];
        let read = Usage::decode(&format::encode(&usage_header(&KEY), &parts), &KEY).unwrap();
        assert_eq!(read, Usage { last_used_micros: 7, hits: 3, saved_micros: 0, age: 0.0, demoted: true });
    }

    #[test]
    fn a_chunks_row_is_bound_to_its_key_and_layout() {
        let bytes = row(5, [1, 2, 3], Vec::new()).encode(&KEY);
        let other = ChunkKey { variant: VariantId([4; 16]), ..KEY };
        assert!(ChunkRow::decode(&bytes, &other).is_err());
        let mut short = row(5, [1, 2, 3], Vec::new());
        short.layers.pop();
        assert!(ChunkRow::decode(&short.encode(&KEY), &KEY).is_err());
        let mut odd = row(5, [1, 2, 3], Vec::new());
        odd.layers[1].bytes += 1;
        assert!(ChunkRow::decode(&odd.encode(&KEY), &KEY).is_err());
        // Only the raw codec's lengths follow from the layout.
        let coded = ChunkRow { codec: 9, ..odd };
        assert_eq!(ChunkRow::decode(&coded.encode(&KEY), &KEY).unwrap(), coded);
    }
}
