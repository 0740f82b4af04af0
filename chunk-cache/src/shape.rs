//! What the stored bytes mean: element type, layout, and one layer's keys and values.

use std::fmt;

use bytes::Bytes;

/// Element type of the stored keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// IEEE 754 single precision, 4 bytes.
    F32,
    /// bfloat16, 2 bytes.
    Bf16,
}

impl KvDtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> u64 {
        match self {
            KvDtype::F32 => 4,
            KvDtype::Bf16 => 2,
        }
    }
}

impl fmt::Display for KvDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KvDtype::F32 => "f32",
            KvDtype::Bf16 => "bf16",
        })
    }
}

/// Layout of the attention state of one token: the same for every chunk of a model and element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KvShape {
    /// Layers of the model.
    pub layers: u32,
    /// Key/value heads of each layer.
    pub kv_heads: u32,
    /// Elements of one head's key, and of its value.
    pub head_dim: u32,
    /// Element type.
    pub dtype: KvDtype,
}

impl KvShape {
    /// Bytes of the keys (and equally of the values) of one layer for `tokens` tokens; `None` when the
    /// number does not fit 64 bits.
    pub fn bytes_per_side(&self, tokens: u32) -> Option<u64> {
        u64::from(tokens)
            .checked_mul(u64::from(self.kv_heads))?
            .checked_mul(u64::from(self.head_dim))?
            .checked_mul(self.dtype.bytes())
    }

    /// Bytes of keys and values over all layers for `tokens` tokens; `None` on overflow.
    pub fn payload_bytes(&self, tokens: u32) -> Option<u64> {
        self.bytes_per_side(tokens)?.checked_mul(2)?.checked_mul(u64::from(self.layers))
    }

    /// An unambiguous byte form, for hashing.
    pub(crate) fn fingerprint(&self) -> [u8; 13] {
        let mut bytes = [0; 13];
        bytes[0..4].copy_from_slice(&self.layers.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.kv_heads.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.head_dim.to_le_bytes());
        bytes[12] = self.dtype.bytes() as u8;
        bytes
    }
}

impl fmt::Display for KvShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} layers x {} kv heads x {} dims, {}", self.layers, self.kv_heads, self.head_dim, self.dtype)
    }
}

/// Keys and values of one layer of one chunk.
///
/// Both are little-endian, row-major `[tokens, kv_heads, head_dim]` in the layout's [`KvDtype`]. Keys
/// are position-free: taken before the rotary embedding, after rounding to the stored type. Cloning shares the bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerKv {
    /// Keys before the rotary embedding.
    pub keys: Bytes,
    /// Values.
    pub values: Bytes,
}
