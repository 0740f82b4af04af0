//! Rows of a damaged catalog, one family at a time, and what can be made anew of a text.

use super::super::error::CatalogError;
use super::super::id::DocumentId;
use super::super::keys;
use super::super::rows::{DamagedRow, Passage, RowResult, unseal};
use super::super::store::{Family, Store};
use super::super::transaction::REMOVED_ENTRY;
use crate::error::{DocumentsError, Result};
use crate::split::{Format, Limits, split};

/// Tokens of a passage that is cut anew, of about four characters each.
const TOKENS: usize = 256;

/// Rows of a family; what cannot be read is told to `problems`.
pub(super) fn rows<T>(
    source: &Store,
    family: Family,
    problems: &mut Vec<String>,
    mut take: impl FnMut(&[u8], &[u8]) -> RowResult<T>,
) -> Result<Vec<T>> {
    let mut found = Vec::new();
    for row in source.scan(family, b"", b"") {
        let taken = row.and_then(|(key, row)| {
            let content = unseal(family, &key, &row).and_then(|content| take(&key, content));
            Ok(content.map_err(|DamagedRow(problem)| DamagedRow(format!("{}: {problem}", shown(family, &key))))?)
        });
        match taken {
            Ok(row) => found.push(row),
            Err(CatalogError::Row(DamagedRow(problem))) => problems.push(problem),
            Err(CatalogError::Whole(error)) => return Err(error),
        }
    }
    Ok(found)
}

/// Of a removed name: the documents that it stood for, each with its entry.
pub(super) fn entries(content: &[u8]) -> impl Iterator<Item = (DocumentId, &[u8])> {
    content.chunks(REMOVED_ENTRY).filter_map(|entry| {
        let id = DocumentId::from_bytes(entry.get(..DocumentId::LENGTH)?)?;
        Some((id, entry))
    })
}

/// A key as people can tell it from others.
pub(super) fn shown(family: Family, key: &[u8]) -> String {
    let id = |bytes: &[u8]| DocumentId::from_bytes(bytes).map(|id| id.to_string());
    let text = match family {
        Family::Documents => id(key),
        Family::Passages => key.get(..DocumentId::LENGTH).and_then(id),
        Family::Names => key.get(5..).map(|name| String::from_utf8_lossy(name).into_owned()),
        Family::Collections => key.get(1..).map(|name| format!("collection {}", String::from_utf8_lossy(name))),
        Family::Files | Family::Jobs | Family::Meta => Some(String::from_utf8_lossy(key).into_owned()),
        _ => None,
    };
    text.unwrap_or_else(|| format!("a row of `{}`", family.name()))
}

pub(super) fn unexpected(what: &str) -> DamagedRow {
    DamagedRow(format!("{what} is not as expected"))
}

pub(super) fn format_number(format: Format) -> u8 {
    keys::content(0, format, &[0; 32])[4]
}

/// What was read; or what is wrong with it, where that concerns no other row.
pub(super) fn readable<T>(read: Result<T, CatalogError>) -> Result<Result<T, String>> {
    match read {
        Ok(found) => Ok(Ok(found)),
        Err(CatalogError::Row(DamagedRow(problem))) => Ok(Err(problem)),
        Err(CatalogError::Whole(error)) => Err(error),
    }
}

/// Passages of a text whose own are lost: without tokens, which are made when they are needed.
pub(super) fn cut_anew(text: &str, format: Format) -> Vec<Passage> {
    let count = |part: &str| Ok::<_, DocumentsError>(part.chars().count().div_ceil(4));
    let places = split(text, format, Limits { tokens: TOKENS, overlap: 0 }, &count).unwrap_or_default();
    let mut line = 1;
    let mut at = 0;
    let passage = |place: crate::split::ChunkSpan| {
        line += text
            .as_bytes()
            .get(at..place.bytes.start)
            .unwrap_or_default()
            .iter()
            .filter(|byte| **byte == b'\n')
            .count();
        at = place.bytes.start;
        let hash = blake3::hash(text[place.bytes.clone()].as_bytes()).into();
        Passage { place, line, page: None, hash, tokens: Vec::new() }
    };
    places.into_iter().map(passage).collect()
}
