//! The name of a chunk: a collision-resistant hash of everything that changes its attention state.

use std::fmt;
use std::str::FromStr;

use crate::shape::KvShape;

/// Separates this use of blake3 from every other one; a change of the derivation changes it.
const CONTEXT: &str = "quire chunk-cache 2026-11 chunk key v2";

/// Names one chunk's attention state. Two chunks with the same key hold the same numbers: the key is
/// derived from everything the numbers depend on (see [`KeyInputs`]).
///
/// `Display` and `FromStr` use 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkKey(pub [u8; 32]);

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
    /// Layout and element type of the stored state.
    pub kv: KvShape,
    /// Keeps tenants apart: with different salts the same text has different keys.
    pub tenant_salt: &'a [u8],
    /// Token ids the chunk was computed behind (for example only the begin-of-sequence token).
    pub prefix: &'a [u32],
    /// The chunk's own token ids.
    pub tokens: &'a [u32],
}

impl ChunkKey {
    /// Derives the key. Every field is preceded by its length, so that no two different inputs feed
    /// the hash the same bytes.
    pub fn derive(inputs: &KeyInputs<'_>) -> ChunkKey {
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        field(&mut hasher, inputs.model);
        field(&mut hasher, inputs.tokenizer);
        field(&mut hasher, inputs.rope.as_bytes());
        field(&mut hasher, inputs.numerics.as_bytes());
        field(&mut hasher, &inputs.kv.fingerprint());
        field(&mut hasher, inputs.tenant_salt);
        ids(&mut hasher, inputs.prefix);
        ids(&mut hasher, inputs.tokens);
        ChunkKey(*hasher.finalize().as_bytes())
    }

    /// The smallest key above this one; `None` for the largest key.
    pub(crate) fn successor(&self) -> Option<ChunkKey> {
        let mut next = self.0;
        for byte in next.iter_mut().rev() {
            let (sum, carried) = byte.overflowing_add(1);
            *byte = sum;
            if !carried {
                return Some(ChunkKey(next));
            }
        }
        None
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

impl fmt::Display for ChunkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ChunkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkKey({self})")
    }
}

/// A text that is no chunk key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a chunk key: expected 64 hexadecimal digits, found {found:?}")]
pub struct ParseKeyError {
    /// The text that was given.
    pub found: String,
}

impl FromStr for ChunkKey {
    type Err = ParseKeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = || ParseKeyError { found: text.to_owned() };
        let digits = text.as_bytes();
        if digits.len() != 64 {
            return Err(refuse());
        }
        let mut key = [0; 32];
        for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
            let high = char::from(pair[0]).to_digit(16).ok_or_else(refuse)?;
            let low = char::from(pair[1]).to_digit(16).ok_or_else(refuse)?;
            *byte = (high * 16 + low) as u8;
        }
        Ok(ChunkKey(key))
    }
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
            tenant_salt: b"a",
            prefix: &[1],
            tokens: &[5, 6, 7],
        }
    }

    #[test]
    fn every_input_changes_the_key() {
        let kv = base().kv;
        let variants = [
            base(),
            KeyInputs { model: &[9; 32], ..base() },
            KeyInputs { tokenizer: &[9; 32], ..base() },
            KeyInputs { rope: "default 500000", ..base() },
            KeyInputs { numerics: "2, exact", ..base() },
            KeyInputs { numerics: "1, fast", ..base() },
            // The same bytes, cut elsewhere between two fields.
            KeyInputs { rope: "default 100001", numerics: ", exact", ..base() },
            KeyInputs { kv: KvShape { layers: 3, ..kv }, ..base() },
            KeyInputs { kv: KvShape { kv_heads: 4, ..kv }, ..base() },
            KeyInputs { kv: KvShape { head_dim: 3, ..kv }, ..base() },
            KeyInputs { kv: KvShape { dtype: KvDtype::F32, ..kv }, ..base() },
            KeyInputs { tenant_salt: b"b", ..base() },
            KeyInputs { tenant_salt: b"", ..base() },
            KeyInputs { prefix: &[], ..base() },
            // The same ids, cut elsewhere between prefix and chunk.
            KeyInputs { prefix: &[1, 5], tokens: &[6, 7], ..base() },
            KeyInputs { prefix: &[], tokens: &[1, 5, 6, 7], ..base() },
            KeyInputs { tokens: &[5, 6], ..base() },
            KeyInputs { tokens: &[5, 7, 6], ..base() },
        ];
        let keys: std::collections::HashSet<_> = variants.iter().map(ChunkKey::derive).collect();
        assert_eq!(keys.len(), variants.len());
        assert_eq!(ChunkKey::derive(&base()), ChunkKey::derive(&base()));
    }

    #[test]
    fn the_derivation_is_frozen() {
        // Stores written by earlier builds are found again only while this value stays.
        assert_eq!(ChunkKey::derive(&base()).to_string(), FROZEN);
    }
    const FROZEN: &str = "81cad49228214de74481bb5aa94432d3590d17390d72ae997b137efbba658991";

    #[test]
    fn successor_counts_up_and_ends() {
        let mut low = [0; 32];
        low[31] = 255;
        let mut next = [0; 32];
        next[30] = 1;
        assert_eq!(ChunkKey(low).successor(), Some(ChunkKey(next)));
        assert_eq!(ChunkKey([255; 32]).successor(), None);
    }

    proptest! {
        #[test]
        fn text_form_round_trips(bytes: [u8; 32]) {
            let key = ChunkKey(bytes);
            prop_assert_eq!(key.to_string().parse::<ChunkKey>().unwrap(), key);
        }

        #[test]
        fn other_texts_are_refused(text in ".{0,70}") {
            if let Ok(key) = text.parse::<ChunkKey>() {
                prop_assert_eq!(key.to_string(), text.to_lowercase());
            }
        }
    }
}
