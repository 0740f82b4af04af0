//! Names of documents that stay, whatever becomes of their files.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Digits of base 32 (RFC 4648, lower case).
const DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
const PREFIX: &str = "doc_";
/// 120 bits: 24 digits without padding.
const BYTES: usize = 15;

/// The name of a document: random, so that it says nothing of the document or its place, and never given twice.
///
/// `Display` and `FromStr` use `doc_` and 24 digits of base 32.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct DocumentId([u8; BYTES]);

impl DocumentId {
    /// A new one.
    #[must_use]
    pub fn random() -> DocumentId {
        DocumentId(rand::random())
    }

    /// Bytes of one.
    pub(crate) const LENGTH: usize = BYTES;

    pub(crate) fn bytes(&self) -> &[u8; BYTES] {
        &self.0
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<DocumentId> {
        bytes.try_into().ok().map(DocumentId)
    }
}

impl fmt::Display for DocumentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        for group in self.0.chunks_exact(5) {
            let bits = group.iter().fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
            for digit in (0..8).rev() {
                write!(f, "{}", char::from(DIGITS[(bits >> (digit * 5) & 31) as usize]))?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for DocumentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no name of a document.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a document's id, `doc_` and 24 of a-z and 2-7, found {found:?}")]
pub struct ParseDocumentIdError {
    /// The text that was given.
    pub found: String,
}

impl FromStr for DocumentId {
    type Err = ParseDocumentIdError;

    fn from_str(text: &str) -> Result<DocumentId, ParseDocumentIdError> {
        let refuse = || ParseDocumentIdError { found: text.into() };
        let digits = text.strip_prefix(PREFIX).ok_or_else(refuse)?.as_bytes();
        if digits.len() != BYTES * 8 / 5 {
            return Err(refuse());
        }
        let mut bytes = [0; BYTES];
        for (group, out) in digits.chunks_exact(8).zip(bytes.chunks_exact_mut(5)) {
            let mut bits = 0u64;
            for digit in group {
                let value = DIGITS.iter().position(|known| known == digit).ok_or_else(refuse)?;
                bits = bits << 5 | value as u64;
            }
            out.copy_from_slice(&bits.to_be_bytes()[3..]);
        }
        Ok(DocumentId(bytes))
    }
}

impl From<DocumentId> for String {
    fn from(id: DocumentId) -> String {
        id.to_string()
    }
}

impl TryFrom<String> for DocumentId {
    type Error = ParseDocumentIdError;

    fn try_from(text: String) -> Result<DocumentId, ParseDocumentIdError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_id_is_read_back_from_its_text_and_nothing_else_is_one() {
        let id = DocumentId::random();
        let text = id.to_string();
        assert_eq!((text.len(), text.parse::<DocumentId>().unwrap()), (28, id));
        assert_eq!(DocumentId([255; 15]).to_string(), format!("doc_{}", "7".repeat(24)));
        for wrong in [
            "",
            "doc_",
            &text[4..],
            &text[..27],
            &text.to_uppercase(),
            &format!("{text}a"),
            "doc_a1aaaaaaaaaaaaaaaaaaaaaa",
        ] {
            assert!(wrong.parse::<DocumentId>().is_err(), "{wrong}");
        }
    }
}
