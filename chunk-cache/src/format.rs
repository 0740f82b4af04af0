//! How values lie on disk: one self-describing header before every payload.
//!
//! Every value of every column family carries the same 92-byte header, little-endian:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic `QKV` 0x1A |
//! | 4 | 2 | format version |
//! | 6 | 1 | kind of value |
//! | 7 | 1 | element type (1 = f32, 2 = bf16; 0 where the value has no layout) |
//! | 8 | 48 | chunk key (zero where the value belongs to no chunk) |
//! | 56 | 4 | layer (zero unless the kind is a layer) |
//! | 60 | 12 | layers, kv heads, head dim of the layout (zero without one) |
//! | 72 | 4 | tokens of the chunk (zero where it means nothing) |
//! | 76 | 8 | payload length |
//! | 84 | 4 | crc32c of the payload |
//! | 88 | 4 | crc32c of bytes 0..88 |
//!
//! The header names the chunk and layer it belongs to, so that a value that turns up under a wrong
//! key is caught as surely as a flipped byte. These are disk types; the domain types are elsewhere.

use crate::checksum::crc32c;
use crate::key::{ChunkKey, KEY_LEN};
use crate::shape::{KvDtype, KvShape};

/// Newest format version this build writes and reads. Version 1 kept payloads in blob files, under a header of 76 bytes.
pub(crate) const VERSION: u16 = 2;
/// Bytes before the payload.
pub(crate) const HEADER_LEN: usize = 92;
const MAGIC: [u8; 4] = *b"QKV\x1a";
const NO_KEY: [u8; KEY_LEN] = [0; KEY_LEN];

/// What a value holds. Numbers that are missing were used by version 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Marks the database as a chunk store of this format.
    Store,
    /// One layer's keys and values.
    Layer,
    /// When the chunk was last used, and how often.
    Usage,
    /// How many bytes of keys and values the store may hold.
    Budget,
    /// A model whose chunks are stored.
    Model,
    /// Makes a chunk visible.
    Chunk,
    /// What a payload file held when it was written.
    Segment,
}

impl Kind {
    const ALL: [(Kind, u8); 7] = [
        (Kind::Store, 1),
        (Kind::Layer, 4),
        (Kind::Usage, 5),
        (Kind::Budget, 6),
        (Kind::Model, 7),
        (Kind::Chunk, 8),
        (Kind::Segment, 9),
    ];

    fn code(self) -> u8 {
        Kind::ALL.iter().find(|(kind, _)| *kind == self).map_or(0, |(_, code)| *code)
    }

    fn from_code(code: u8) -> Option<Kind> {
        Kind::ALL.iter().find(|(_, c)| *c == code).map(|(kind, _)| *kind)
    }
}

/// What a value says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) key: Option<ChunkKey>,
    pub(crate) layer: u32,
    pub(crate) shape: Option<KvShape>,
    pub(crate) tokens: u32,
}

impl Header {
    /// Of a value that belongs to no chunk and has no layout.
    pub(crate) fn plain(kind: Kind) -> Header {
        Header { kind, key: None, layer: 0, shape: None, tokens: 0 }
    }
}

/// A value whose checksums hold.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Value<'a> {
    pub(crate) header: Header,
    pub(crate) payload: &'a [u8],
    pub(crate) payload_crc: u32,
}

/// Why bytes are no value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FormatError {
    pub(crate) expected: String,
    pub(crate) found: String,
    /// Set when the only objection is a version above [`VERSION`].
    pub(crate) newer: Option<u16>,
}

impl FormatError {
    pub(crate) fn new(expected: impl Into<String>, found: impl Into<String>) -> Self {
        FormatError { expected: expected.into(), found: found.into(), newer: None }
    }
}

/// Writes header and payload; the payload is given in parts that are joined.
pub(crate) fn encode(header: &Header, parts: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::new();
    encode_into(header, parts, crc32c(parts), &mut out);
    out
}

/// As [`encode`], into a buffer whose contents are replaced; `payload_crc` is [`crc_of`] of the parts.
pub(crate) fn encode_into(header: &Header, parts: &[&[u8]], payload_crc: u32, out: &mut Vec<u8>) {
    let payload_len: usize = parts.iter().map(|part| part.len()).sum();
    out.clear();
    out.reserve(HEADER_LEN + payload_len);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.push(header.kind.code());
    out.push(match header.shape.map(|shape| shape.dtype) {
        None => 0,
        Some(KvDtype::F32) => 1,
        Some(KvDtype::Bf16) => 2,
    });
    out.extend_from_slice(&header.key.map_or(NO_KEY, |key| key.to_bytes()));
    let (layers, kv_heads, head_dim) = header.shape.map_or((0, 0, 0), |s| (s.layers, s.kv_heads, s.head_dim));
    for number in [header.layer, layers, kv_heads, head_dim, header.tokens] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    out.extend_from_slice(&(payload_len as u64).to_le_bytes());
    out.extend_from_slice(&payload_crc.to_le_bytes());
    let header_crc = crc32c(&[out]);
    out.extend_from_slice(&header_crc.to_le_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// Reads a value and checks everything that can be checked without knowing what was asked for.
pub(crate) fn decode(bytes: &[u8]) -> Result<Value<'_>, FormatError> {
    let value = decode_header(bytes)?;
    check_crc("payload", value.payload, value.payload_crc)?;
    Ok(value)
}

/// As [`decode`], but the payload's own checksum is not computed: for bytes that another checksum has just covered.
pub(crate) fn decode_header(bytes: &[u8]) -> Result<Value<'_>, FormatError> {
    let mut fields = Reader { rest: bytes };
    let (Some(head), Some(payload)) = (bytes.get(..HEADER_LEN), bytes.get(HEADER_LEN..)) else {
        return Err(FormatError::new(format!("a header of {HEADER_LEN} bytes"), format!("{} bytes", bytes.len())));
    };
    let magic = fields.take::<4>()?;
    if magic != MAGIC {
        return Err(FormatError::new(format!("magic {MAGIC:02x?}"), format!("{magic:02x?}")));
    }
    let version = u16::from_le_bytes(fields.take()?);
    if version != VERSION {
        return Err(FormatError {
            newer: (version > VERSION).then_some(version),
            ..FormatError::new(format!("format version {VERSION}"), format!("version {version}"))
        });
    }
    check_crc("header", &head[..HEADER_LEN - 4], u32_at_end(head))?;
    let [kind] = fields.take::<1>()?;
    let [dtype] = fields.take::<1>()?;
    let key = fields.take::<KEY_LEN>()?;
    let layer = fields.u32()?;
    let (layers, kv_heads, head_dim) = (fields.u32()?, fields.u32()?, fields.u32()?);
    let tokens = fields.u32()?;
    let payload_len = fields.u64()?;
    let payload_crc = fields.u32()?;
    let kind =
        Kind::from_code(kind).ok_or_else(|| FormatError::new("a known kind of value", format!("kind {kind}")))?;
    let shape = |dtype| Some(KvShape { layers, kv_heads, head_dim, dtype });
    let shape = match dtype {
        0 => None,
        1 => shape(KvDtype::F32),
        2 => shape(KvDtype::Bf16),
        other => {
            return Err(FormatError::new("element type 0, 1 or 2", format!("element type {other}")));
        }
    };
    if payload_len != payload.len() as u64 {
        return Err(FormatError::new(format!("a payload of {payload_len} bytes"), format!("{} bytes", payload.len())));
    }
    let key = if key == NO_KEY { None } else { ChunkKey::from_bytes(&key) };
    Ok(Value { header: Header { kind, key, layer, shape, tokens }, payload, payload_crc })
}

/// Reads a value and checks that it is the one `wanted`.
pub(crate) fn decode_as<'a>(bytes: &'a [u8], wanted: &Header) -> Result<Value<'a>, FormatError> {
    let value = decode(bytes)?;
    value.check(wanted)?;
    Ok(value)
}

impl Value<'_> {
    /// Refuses a value that belongs elsewhere.
    pub(crate) fn check(&self, wanted: &Header) -> Result<(), FormatError> {
        if self.header == *wanted {
            return Ok(());
        }
        Err(FormatError::new(format!("{wanted:?}"), format!("{:?}", self.header)))
    }
}

fn u32_at_end(bytes: &[u8]) -> u32 {
    bytes.last_chunk().map_or(0, |chunk| u32::from_le_bytes(*chunk))
}

fn check_crc(what: &str, bytes: &[u8], expected: u32) -> Result<(), FormatError> {
    let found = crc32c(&[bytes]);
    if found == expected {
        return Ok(());
    }
    Err(FormatError::new(format!("{what} crc32c {expected:08x}"), format!("{found:08x}")))
}

/// Takes little-endian numbers off the front of a byte string, without panicking.
pub(crate) struct Reader<'a> {
    pub(crate) rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn take<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let Some((front, rest)) = self.rest.split_first_chunk() else {
            return Err(FormatError::new(format!("{N} more bytes"), format!("{} bytes", self.rest.len())));
        };
        self.rest = rest;
        Ok(*front)
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], FormatError> {
        let Some((front, rest)) = self.rest.split_at_checked(count) else {
            return Err(FormatError::new(format!("{count} more bytes"), format!("{} bytes", self.rest.len())));
        };
        self.rest = rest;
        Ok(front)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, FormatError> {
        Ok(u16::from_le_bytes(self.take()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.take()?))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::key::{ChunkId, VariantId};
    use proptest::prelude::*;

    fn chunk_key(bytes: [u8; 32]) -> ChunkKey {
        ChunkKey { chunk: ChunkId(bytes), variant: VariantId([bytes[0]; 16]) }
    }

    fn any_header() -> impl Strategy<Value = Header> {
        let kinds = prop::sample::select(Kind::ALL.map(|(kind, _)| kind).to_vec());
        (kinds, any::<([u8; 32], u32, u32, u32, u32, u32, Option<bool>)>()).prop_map(
            |(kind, (key, layer, layers, kv_heads, head_dim, tokens, wide))| Header {
                kind,
                key: (key != [0; 32]).then_some(chunk_key(key)),
                layer,
                shape: wide.map(|wide| {
                    let dtype = if wide { KvDtype::F32 } else { KvDtype::Bf16 };
                    KvShape { layers, kv_heads, head_dim, dtype }
                }),
                tokens,
            },
        )
    }

    proptest! {
        #[test]
        fn values_round_trip(header in any_header(), payload: Vec<u8>, cut: prop::sample::Index) {
            let (a, b) = payload.split_at(cut.index(payload.len() + 1));
            let bytes = encode(&header, &[a, b]);
            let value = decode_as(&bytes, &header).unwrap();
            prop_assert_eq!(value.payload, &payload[..]);
            prop_assert_eq!(value.payload_crc, crc32c(&[&payload]));
        }

        #[test]
        fn any_flip_or_cut_is_detected(
            header in any_header(), payload: Vec<u8>,
            at: prop::sample::Index, flip in 1u8..=255, cut: prop::sample::Index,
        ) {
            let mut bytes = encode(&header, &[&payload]);
            prop_assert!(decode(&bytes[..cut.index(bytes.len())]).is_err());
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(decode(&bytes).is_err());
            bytes[at] ^= flip;
            bytes.push(flip);
            prop_assert!(decode(&bytes).is_err());
        }

        #[test]
        fn random_bytes_never_panic(mut bytes: Vec<u8>, dressed: bool) {
            if dressed && bytes.len() >= HEADER_LEN {
                // A right magic, version and header checksum lead the decoder deeper.
                bytes[..4].copy_from_slice(&MAGIC);
                bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
                let crc = crc32c(&[&bytes[..HEADER_LEN - 4]]);
                bytes[HEADER_LEN - 4..HEADER_LEN].copy_from_slice(&crc.to_le_bytes());
            }
            let _ = decode(&bytes);
        }

        #[test]
        fn a_value_under_a_wrong_name_is_refused(one in any_header(), other in any_header()) {
            let bytes = encode(&one, &[b"x"]);
            prop_assert_eq!(decode_as(&bytes, &other).is_ok(), one == other);
        }
    }

    const SHAPE: KvShape = KvShape { layers: 24, kv_heads: 2, head_dim: 64, dtype: KvDtype::Bf16 };

    fn header() -> Header {
        Header { kind: Kind::Layer, key: Some(chunk_key([7; 32])), layer: 3, shape: Some(SHAPE), tokens: 0x0102_0304 }
    }

    #[test]
    fn a_value_that_differs_from_what_is_wanted_in_one_field_is_refused() {
        let wanted = header();
        let (mut chunk, mut variant) = (chunk_key([7; 32]), chunk_key([7; 32]));
        chunk.chunk.0[31] = 8;
        variant.variant.0[15] = 8;
        let others = [
            Header { kind: Kind::Chunk, ..wanted },
            Header { key: Some(chunk), ..wanted },
            Header { key: Some(variant), ..wanted },
            Header { key: None, ..wanted },
            Header { layer: 4, ..wanted },
            Header { tokens: wanted.tokens + 1, ..wanted },
            Header { shape: None, ..wanted },
            Header { shape: Some(KvShape { layers: 25, ..SHAPE }), ..wanted },
            Header { shape: Some(KvShape { kv_heads: 64, head_dim: 2, ..SHAPE }), ..wanted },
            Header { shape: Some(KvShape { head_dim: 65, ..SHAPE }), ..wanted },
            Header { shape: Some(KvShape { dtype: KvDtype::F32, ..SHAPE }), ..wanted },
        ];
        assert!(decode_as(&encode(&wanted, &[b"x"]), &wanted).is_ok());
        for other in others {
            let error = decode_as(&encode(&other, &[b"x"]), &wanted).unwrap_err();
            assert_eq!((error.expected, error.found), (format!("{wanted:?}"), format!("{other:?}")));
        }
    }

    #[test]
    fn the_bytes_of_a_value_are_frozen() {
        // As the table at the top of this file has them: stores of earlier builds are read only while this holds.
        let mut wanted = b"QKV\x1a\x02\x00\x04\x02".to_vec();
        wanted.extend([7; 48]);
        for number in [3u32, 24, 2, 64, 0x0102_0304] {
            wanted.extend(number.to_le_bytes());
        }
        wanted.extend(2u64.to_le_bytes());
        wanted.extend(crc32c(&[b"ab"]).to_le_bytes());
        wanted.extend(crc32c(&[&wanted]).to_le_bytes());
        wanted.extend(b"ab");
        let found = encode(&header(), &[b"a", b"b"]);
        assert_eq!(found, wanted);
        assert_eq!(decode(&found).unwrap().header, header());
    }

    #[test]
    fn a_header_alone_vouches_for_all_but_the_payloads_bytes() {
        let mut bytes = encode(&header(), &[b"ab"]);
        bytes[HEADER_LEN] ^= 1;
        assert!(decode(&bytes).is_err());
        assert_eq!(decode_header(&bytes).unwrap().header, header());
        for at in 0..HEADER_LEN {
            let mut flipped = bytes.clone();
            flipped[at] ^= 4;
            assert!(decode_header(&flipped).is_err(), "byte {at}");
        }
        assert!(decode_header(&bytes[..bytes.len() - 1]).is_err());
    }

    #[test]
    fn a_newer_version_is_named() {
        let mut bytes = encode(&Header::plain(Kind::Store), &[]);
        bytes[4] = 7;
        assert_eq!(decode(&bytes).unwrap_err().newer, Some(7));
    }
}
