//! The names of a chunk and of its variants: collision-resistant hashes of everything that changes the attention state.

use std::fmt;
use std::str::FromStr;

use crate::shape::KvShape;

/// Separate these uses of blake3 from every other one; a change of a derivation changes its context.
const CHUNK_CONTEXT: &str = "quire chunk-cache 2026-12 chunk id v3";
const VARIANT_CONTEXT: &str = "quire chunk-cache 2026-12 variant id v1";

/// The codec of state that is stored as it was computed.
pub const RAW_CODEC: u16 = 0;

/// Bytes of a [`ChunkKey`].
pub(crate) const KEY_LEN: usize = 48;

/// Names a chunk: the model, how it computes, and the tokens; not what stands before them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub [u8; 32]);

/// Names one computed state among those of a chunk: behind which tokens it was computed, and how it is stored.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VariantId(pub [u8; 16]);

/// Names one chunk's stored attention state. Two states with the same key hold the same numbers: the key is derived from
/// everything the numbers depend on (see [`KeyInputs`]). Keys sort by chunk, so that the variants of a chunk are
/// neighbours.
///
/// `Display` and `FromStr` use 64 lower-case hexadecimal digits for the chunk, a hyphen, and 32 for the variant.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkKey {
    /// The chunk.
    pub chunk: ChunkId,
    /// Which of its variants.
    pub variant: VariantId,
}

/// Everything a chunk's attention state depends on.
#[derive(Debug, Clone, Copy)]
pub struct KeyInputs<'a> {
    /// Fingerprint of the weights and their effective precision.
    pub model: &'a [u8; 32],
    /// Fingerprint of the tokenizer.
    pub tokenizer: &'a [u8; 32],
    /// Parameters of the rotary embedding, in any canonical text form. Stored keys are position-free,
    /// but every layer after the first saw rotated keys.
    pub rope: &'a str,
    /// How the numbers were computed, in any canonical text form: a version that is raised when a build computes others, and
    /// the settings and machines that change them by more than `kv` rounds away (activations rounded to bf16, say). Machines
    /// that differ by less have the same text, so that a store may move between them.
    pub numerics: &'a str,
    /// Keeps tenants apart: with different salts the same text has different keys.
    pub tenant_salt: &'a [u8],
    /// The chunk's own token ids.
    pub tokens: &'a [u32],
    /// Token ids the variant was computed behind (for example only the begin-of-sequence token).
    pub prefix: &'a [u32],
    /// Layout and element type of the variant.
    pub kv: KvShape,
    /// How the variant's bytes are encoded; [`RAW_CODEC`]: as they are.
    pub codec: u16,
}

impl ChunkId {
    /// Derives the name. Every field is preceded by its length, so that no two different inputs feed the hash the same
    /// bytes. Prefix, layout and codec play no part.
    pub fn derive(inputs: &KeyInputs<'_>) -> ChunkId {
        let mut hasher = blake3::Hasher::new_derive_key(CHUNK_CONTEXT);
        field(&mut hasher, inputs.model);
        field(&mut hasher, inputs.tokenizer);
        field(&mut hasher, inputs.rope.as_bytes());
        field(&mut hasher, inputs.numerics.as_bytes());
        field(&mut hasher, inputs.tenant_salt);
        ids(&mut hasher, inputs.tokens);
        ChunkId(*hasher.finalize().as_bytes())
    }
}

impl ChunkKey {
    /// Derives the names of the chunk and of the variant.
    pub fn derive(inputs: &KeyInputs<'_>) -> ChunkKey {
        let chunk = ChunkId::derive(inputs);
        let mut hasher = blake3::Hasher::new_derive_key(VARIANT_CONTEXT);
        hasher.update(&chunk.0);
        ids(&mut hasher, inputs.prefix);
        field(&mut hasher, &inputs.kv.fingerprint());
        field(&mut hasher, &inputs.codec.to_le_bytes());
        let mut variant = VariantId([0; 16]);
        hasher.finalize_xof().fill(&mut variant.0);
        ChunkKey { chunk, variant }
    }

    /// The chunk's bytes, then the variant's.
    pub fn to_bytes(&self) -> [u8; KEY_LEN] {
        let mut bytes = [0; KEY_LEN];
        bytes[..32].copy_from_slice(&self.chunk.0);
        bytes[32..].copy_from_slice(&self.variant.0);
        bytes
    }

    /// The key of these bytes; `None` unless there are 48.
    pub fn from_bytes(bytes: &[u8]) -> Option<ChunkKey> {
        let (chunk, variant) = bytes.split_first_chunk::<32>()?;
        Some(ChunkKey { chunk: ChunkId(*chunk), variant: VariantId(variant.try_into().ok()?) })
    }
}

fn field(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

fn ids(hasher: &mut blake3::Hasher, tokens: &[u32]) {
    hasher.update(&(tokens.len() as u64).to_le_bytes());
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
}

fn hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(f, &self.0)
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkId({self})")
    }
}

impl fmt::Display for VariantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(f, &self.0)
    }
}

impl fmt::Debug for VariantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VariantId({self})")
    }
}

impl fmt::Display for ChunkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.chunk, self.variant)
    }
}

impl fmt::Debug for ChunkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkKey({self})")
    }
}

/// A text that is no chunk key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a chunk key: expected 64 hexadecimal digits, a hyphen and 32 more, found {found:?}")]
pub struct ParseKeyError {
    /// The text that was given.
    pub found: String,
}

impl FromStr for ChunkKey {
    type Err = ParseKeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = || ParseKeyError { found: text.to_owned() };
        let (chunk, variant) = text.split_once('-').ok_or_else(refuse)?;
        let chunk = ChunkId(parse_hex(chunk).ok_or_else(refuse)?);
        Ok(ChunkKey { chunk, variant: VariantId(parse_hex(variant).ok_or_else(refuse)?) })
    }
}

fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = (high * 16 + low) as u8;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::shape::KvDtype;
    use proptest::prelude::*;

    fn base<'a>() -> KeyInputs<'a> {
        KeyInputs {
            model: &[1; 32],
            tokenizer: &[2; 32],
            rope: "default 10000",
            numerics: "1, exact",
            kv: KvShape { layers: 2, kv_heads: 3, head_dim: 4, dtype: KvDtype::Bf16 },
            codec: RAW_CODEC,
            tenant_salt: b"a",
            prefix: &[1],
            tokens: &[5, 6, 7],
        }
    }

    fn distinct(variants: &[KeyInputs<'_>]) -> (usize, usize) {
        let keys: std::collections::HashSet<_> = variants.iter().map(ChunkKey::derive).collect();
        let chunks: std::collections::HashSet<_> = variants.iter().map(ChunkId::derive).collect();
        (keys.len(), chunks.len())
    }

    #[test]
    fn every_input_of_the_chunk_changes_its_id() {
        let variants = [
            base(),
            KeyInputs { model: &[9; 32], ..base() },
            KeyInputs { tokenizer: &[9; 32], ..base() },
            KeyInputs { rope: "default 500000", ..base() },
            KeyInputs { numerics: "2, exact", ..base() },
            KeyInputs { numerics: "1, fast", ..base() },
            // The same bytes, cut elsewhere between two fields.
            KeyInputs { rope: "default 100001", numerics: ", exact", ..base() },
            KeyInputs { tenant_salt: b"b", ..base() },
            KeyInputs { tenant_salt: b"", ..base() },
            KeyInputs { tokens: &[5, 6], ..base() },
            KeyInputs { tokens: &[5, 7, 6], ..base() },
        ];
        assert_eq!(distinct(&variants), (variants.len(), variants.len()));
        assert_eq!(ChunkKey::derive(&base()), ChunkKey::derive(&base()));
    }

    #[test]
    fn prefix_layout_and_codec_make_variants_of_one_chunk() {
        let kv = base().kv;
        let variants = [
            base(),
            KeyInputs { kv: KvShape { layers: 3, ..kv }, ..base() },
            KeyInputs { kv: KvShape { kv_heads: 4, ..kv }, ..base() },
            KeyInputs { kv: KvShape { head_dim: 3, ..kv }, ..base() },
            KeyInputs { kv: KvShape { dtype: KvDtype::F32, ..kv }, ..base() },
            KeyInputs { codec: 1, ..base() },
            KeyInputs { prefix: &[], ..base() },
            KeyInputs { prefix: &[1, 5], ..base() },
        ];
        assert_eq!(distinct(&variants), (variants.len(), 1));
        // The same ids, cut elsewhere between prefix and chunk, are other chunks.
        let moved = [base(), KeyInputs { prefix: &[1, 5], tokens: &[6, 7], ..base() }];
        assert_eq!(distinct(&moved), (2, 2));
    }

    #[test]
    fn the_derivation_is_frozen() {
        // Stores written by earlier builds are found again only while this value stays.
        assert_eq!(ChunkKey::derive(&base()).to_string(), FROZEN);
    }
    const FROZEN: &str =
        "d53701006327c82de2dc28a95a65d63b4446cd4fdcf564306532d723826c357a-5b27adfc921b47e9e66b4e9cc3f4f9ea";

    proptest! {
        #[test]
        fn text_and_byte_forms_round_trip(chunk: [u8; 32], variant: [u8; 16]) {
            let key = ChunkKey { chunk: ChunkId(chunk), variant: VariantId(variant) };
            prop_assert_eq!(key.to_string().parse::<ChunkKey>().unwrap(), key);
            prop_assert_eq!(ChunkKey::from_bytes(&key.to_bytes()), Some(key));
            prop_assert_eq!(ChunkKey::from_bytes(&key.to_bytes()[1..]), None);
        }

        #[test]
        fn other_texts_are_refused(text in ".{0,100}") {
            if let Ok(key) = text.parse::<ChunkKey>() {
                prop_assert_eq!(key.to_string(), text.to_lowercase());
            }
        }
    }
}
