//! Rows of the catalog: what each holds, and how it lies on disk.
//!
//! Every row is sealed: a byte for the version of its encoding, eight bytes of a BLAKE3 over family, key and content,
//! then the content. So a row that was damaged, cut short or written under another key is known as such, over and above
//! RocksDB's checksums, which are gone once a block is in memory.
//! Rows for people and programs to come (documents, collections, files, jobs) are JSON, to which fields can be added;
//! those that come by the hundred thousand (passages) are numbers of variable length (LEB128), a third of the size.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::id::DocumentId;
use super::store::Family;
use crate::split::{ChunkSpan, Format, Span};

/// Version of the encoding of rows.
const ROW_VERSION: u8 = 1;
const SEAL: usize = 8;

/// BLAKE3 of a text.
pub type TextHash = [u8; 32];

/// Attributes of a collection or a document: whatever a client keeps there.
pub type Attributes = Map<String, Value>;

/// Which endings of words a collection knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LanguageSetting {
    /// Those of each document's own language, which is detected.
    #[default]
    Auto,
    /// Those of one language, named as in ISO 639-1.
    Fixed(String),
}

impl std::fmt::Display for LanguageSetting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            LanguageSetting::Auto => "auto",
            LanguageSetting::Fixed(name) => name,
        })
    }
}

/// What the catalog keeps of a collection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CollectionInfo {
    /// Its name.
    pub name: String,
    /// Its number, never given twice in a data folder.
    pub id: u32,
    /// Which endings of words it knows.
    pub language: LanguageSetting,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// When it was removed, if it was: kept until space is reclaimed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removed: Option<u64>,
    /// What clients keep there.
    #[serde(default)]
    pub attributes: Attributes,
}

impl CollectionInfo {
    /// What a removed collection is told by from others that had its name.
    #[must_use]
    pub fn removed_id(&self) -> String {
        format!("removed-{}", self.id)
    }
}

/// What the catalog keeps of a document, beside its text and passages.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DocumentInfo {
    /// Its stable name.
    pub id: DocumentId,
    /// The number of its collection.
    pub collection: u32,
    /// The names it is known by, sorted: paths, or what a client calls it. More than one where the same text was
    /// ingested under several. Of a removed document: those that it had.
    pub names: Vec<String>,
    /// BLAKE3 of its text, in hexadecimal digits.
    #[serde(with = "hex")]
    pub content: TextHash,
    /// How it is written.
    pub format: Format,
    /// Bytes of its text.
    pub bytes: u64,
    /// Identifies how it was split, tokenizer and limits included.
    pub fingerprint: String,
    /// Fingerprint of the tokenizer whose tokens its passages carry; `None` where they carry none.
    #[serde(default, with = "hex::optional")]
    pub tokenizer: Option<[u8; 32]>,
    /// Its passages.
    pub passages: u32,
    /// Tokens of all passages.
    pub tokens: u64,
    /// When it came in, in seconds since 1970.
    pub created: u64,
    /// When its text or its passages last changed.
    pub updated: u64,
    /// When it was removed, if it was: kept until space is reclaimed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removed: Option<u64>,
    /// Names that were taken from it while it went on under others, and can be restored.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removed_names: Vec<String>,
    /// What clients keep there.
    #[serde(default)]
    pub attributes: Attributes,
}

impl DocumentInfo {
    /// Whether it is there, in a collection, under a name.
    pub(super) fn is_called(&self, collection: u32, name: &str) -> bool {
        self.collection == collection && self.removed.is_none() && self.names.iter().any(|known| known == name)
    }

    /// Whether it is there, in a collection, with a text.
    pub(super) fn holds(&self, collection: u32, format: Format, content: &TextHash) -> bool {
        (self.collection, self.removed, self.format, &self.content) == (collection, None, format, content)
    }
}

/// A passage of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passage {
    /// Where it lies in the text.
    pub place: ChunkSpan,
    /// The line that it begins in, from 1.
    pub line: usize,
    /// The page that it begins on, from 1, of documents that have pages.
    pub page: Option<u32>,
    /// BLAKE3 of its text.
    pub hash: TextHash,
    /// Its tokens, by the tokenizer of its document; empty where that has none.
    pub tokens: Vec<u32>,
}

/// What changed in a collection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogEntry {
    /// A document is new, or has other passages than before.
    Put(DocumentId),
    /// A document is gone.
    Removed(DocumentId),
}

/// A chunk that no document needs any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleasedChunk {
    /// The tokens of its passage.
    pub tokens: Vec<u32>,
    /// Whether it is to be removed for good; else it only makes way before others, as its document may come back.
    pub gone: bool,
}

/// A row that cannot be what was written.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct DamagedRow(pub(crate) String);

pub(super) type RowResult<T> = Result<T, DamagedRow>;

fn checksum(family: Family, key: &[u8], content: &[u8]) -> [u8; SEAL] {
    let mut hasher = blake3::Hasher::new_derive_key("quire catalog row 1");
    hasher.update(family.name().as_bytes());
    hasher.update(&(key.len() as u64).to_le_bytes());
    hasher.update(key);
    hasher.update(content);
    let mut first = [0; SEAL];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..SEAL]);
    first
}

/// A row's bytes on disk.
pub(super) fn seal(family: Family, key: &[u8], content: &[u8]) -> Vec<u8> {
    let mut row = Vec::with_capacity(1 + SEAL + content.len());
    row.push(ROW_VERSION);
    row.extend_from_slice(&checksum(family, key, content));
    row.extend_from_slice(content);
    row
}

/// What [`seal`] has sealed.
pub(super) fn unseal<'a>(family: Family, key: &[u8], row: &'a [u8]) -> RowResult<&'a [u8]> {
    let damaged = |problem: String| Err(DamagedRow(format!("a row of `{}`: {problem}", family.name())));
    match row {
        [ROW_VERSION, rest @ ..] if rest.len() >= SEAL => {
            let (sum, content) = rest.split_at(SEAL);
            if sum != checksum(family, key, content) {
                return damaged("its checksum is wrong".into());
            }
            Ok(content)
        }
        [version, ..] if *version != ROW_VERSION => damaged(format!("expected version {ROW_VERSION}, found {version}")),
        _ => damaged(format!("it has {} bytes", row.len())),
    }
}

pub(super) fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("rows have no maps with keys that are no text")
}

pub(super) fn from_json<T: DeserializeOwned>(content: &[u8]) -> RowResult<T> {
    serde_json::from_slice(content).map_err(|problem| DamagedRow(format!("a row is not as expected: {problem}")))
}

fn write_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn read_number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        let part = u64::from(first & 0x7f);
        if part << shift >> shift != part {
            return None;
        }
        number |= part << shift;
        if first & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

impl Passage {
    /// As a row's content: places, line, page, hash, number of tokens, tokens.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(48 + self.tokens.len() * 2);
        let ChunkSpan { chars, bytes } = &self.place;
        let page = self.page.map_or(0, |page| u64::from(page) + 1);
        for number in [bytes.start, bytes.len(), chars.start, chars.len(), self.line] {
            write_number(&mut out, number as u64);
        }
        write_number(&mut out, page);
        out.extend_from_slice(&self.hash);
        write_number(&mut out, self.tokens.len() as u64);
        for token in &self.tokens {
            write_number(&mut out, u64::from(*token));
        }
        out
    }

    pub(super) fn decode(mut content: &[u8]) -> RowResult<Passage> {
        Passage::parse(&mut content)
            .filter(|_| content.is_empty())
            .ok_or_else(|| DamagedRow("a passage is not as expected".into()))
    }

    fn parse(rest: &mut &[u8]) -> Option<Passage> {
        let mut numbers = [0usize; 6];
        for number in &mut numbers {
            *number = usize::try_from(read_number(rest)?).ok()?;
        }
        let [byte, bytes, char, chars, line, page] = numbers;
        let (hash, after) = rest.split_first_chunk::<32>()?;
        *rest = after;
        let count = usize::try_from(read_number(rest)?).ok()?;
        // A token takes a byte at least: no length is believed that the row does not hold.
        let mut tokens = Vec::with_capacity(count.min(rest.len()));
        for _ in 0..count {
            tokens.push(u32::try_from(read_number(rest)?).ok()?);
        }
        Some(Passage {
            place: ChunkSpan {
                chars: Span { start: char, end: char.checked_add(chars)? },
                bytes: byte..byte.checked_add(bytes)?,
            },
            line,
            page: page.checked_sub(1).map(u32::try_from).transpose().ok()?,
            hash: *hash,
            tokens,
        })
    }
}

/// Hash of a passage's tokens: equal for passages whose state is computed once.
pub(super) fn tokens_hash(tokens: &[u32]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("quire catalog passage tokens 1");
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    hasher.finalize().into()
}

/// Hashes as hexadecimal digits in JSON.
mod hex {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8; 32], out: S) -> Result<S::Ok, S::Error> {
        out.serialize_str(blake3::Hash::from_bytes(*bytes).to_hex().as_str())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<[u8; 32], D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(from)?;
        blake3::Hash::from_hex(text.as_bytes()).map(Into::into).map_err(D::Error::custom)
    }

    pub(super) mod optional {
        use super::*;

        pub(in super::super) fn serialize<S: Serializer>(bytes: &Option<[u8; 32]>, out: S) -> Result<S::Ok, S::Error> {
            match bytes {
                Some(bytes) => super::serialize(bytes, out),
                None => out.serialize_none(),
            }
        }

        pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<[u8; 32]>, D::Error> {
            let Some(text) = Option::<String>::deserialize(from)? else { return Ok(None) };
            blake3::Hash::from_hex(text.as_bytes()).map(|hash| Some(hash.into())).map_err(D::Error::custom)
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn passage(tokens: Vec<u32>) -> Passage {
        let chars = Span { start: 7, end: 300 };
        Passage { place: ChunkSpan { chars, bytes: 9..100_000 }, line: 3, page: Some(0), hash: [7; 32], tokens }
    }

    #[test]
    fn a_row_that_was_changed_cut_or_moved_is_known_as_such() {
        let row = seal(Family::Documents, b"key", b"content");
        assert_eq!(unseal(Family::Documents, b"key", &row).unwrap(), b"content");
        for bit in 0..row.len() * 8 {
            let mut changed = row.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(unseal(Family::Documents, b"key", &changed).is_err(), "bit {bit}");
        }
        for length in 0..row.len() {
            assert!(unseal(Family::Documents, b"key", &row[..length]).is_err(), "{length} bytes");
        }
        assert!(unseal(Family::Documents, b"kez", &row).is_err() && unseal(Family::Names, b"key", &row).is_err());
    }

    proptest! {
        #[test]
        fn passages_are_read_back_and_cut_ones_refused(tokens in prop::collection::vec(any::<u32>(), 0..40)) {
            let row = passage(tokens.clone()).encode();
            prop_assert_eq!(Passage::decode(&row).unwrap(), passage(tokens));
            for length in 0..row.len() {
                prop_assert!(Passage::decode(&row[..length]).is_err());
            }
        }

        #[test]
        fn no_bytes_make_the_reader_of_passages_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = Passage::decode(&bytes);
        }
    }
}
