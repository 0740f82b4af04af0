//! Who owns a sequence's KV, and in what form.

pub(crate) mod building;
pub(crate) mod codec;
pub(crate) mod dense;
pub(crate) mod device;
pub(crate) mod page;
pub(crate) mod prefix;
pub(crate) mod sequence;

use serde::{Deserialize, Serialize};

/// The number format that KV is stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// Single precision.
    F32,
    /// The upper half of a single.
    Bf16,
}

impl KvDtype {
    /// Bytes of one number.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            KvDtype::F32 => 4,
            KvDtype::Bf16 => 2,
        }
    }

    /// Rounds numbers to this format.
    pub(crate) fn round(self, x: &mut [f32]) {
        if self == KvDtype::Bf16 {
            crate::backend::cpu::elementwise::round_bf16(x);
        }
    }

    /// Appends numbers in this format, little-endian. They must already be rounded to it.
    pub(crate) fn encode(self, x: &[f32], out: &mut Vec<u8>) {
        match self {
            KvDtype::F32 => out.extend(x.iter().flat_map(|x| x.to_le_bytes())),
            KvDtype::Bf16 => out.extend(x.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes())),
        }
    }

    /// Widens little-endian numbers of this format.
    pub(crate) fn decode(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            KvDtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            KvDtype::Bf16 => bytes
                .chunks_exact(2)
                .map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16))
                .collect(),
        }
    }
}

/// The shape of a model's KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Transformer blocks.
    pub layers: usize,
    /// KV heads of a layer.
    pub kv_heads: usize,
    /// Numbers of a key and of a value.
    pub head_dim: usize,
    /// Their format.
    pub dtype: KvDtype,
}

impl KvShape {
    /// Numbers of one token's keys in one layer; its values are as many.
    #[must_use]
    pub fn width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Bytes of one token, keys and values of all layers.
    #[must_use]
    pub fn token_bytes(&self) -> usize {
        2 * self.layers * self.width() * self.dtype.size()
    }
}
