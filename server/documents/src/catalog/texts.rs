//! Texts of documents: once each, in pieces, so that a passage can be cut out without reading the whole and no row is large.

use std::collections::BTreeSet;
use std::ops::Range;

use super::batch::{Batch, read};
use super::error::CatalogError;
use super::id::DocumentId;
use super::keys;
use super::rows::{DamagedRow, TextHash};
use super::store::{Family, Store};

/// Bytes of a piece.
const PIECE: usize = 64 << 10;

/// Keeps a text for a document; one that is there already is not written again.
pub(super) fn keep(batch: &mut Batch<'_>, hash: &TextHash, text: &str, id: &DocumentId) -> Result<(), CatalogError> {
    // Where references cannot be read, the text may be there or not.
    if !batch.any(Family::TextRefs, hash)? || !is_whole(batch, hash) {
        write(batch, hash, text);
    }
    batch.put(Family::TextRefs, keys::reference(hash, id), Vec::new());
    Ok(())
}

/// The pieces of a text, with their numbers.
pub(super) fn pieces(text: &str) -> impl Iterator<Item = (u32, &[u8])> {
    (0u32..).zip(text.as_bytes().chunks(PIECE))
}

/// Writes the pieces of a text.
pub(super) fn write(batch: &mut Batch<'_>, hash: &TextHash, text: &str) {
    for (number, piece) in pieces(text) {
        batch.put(Family::Texts, keys::piece(hash, number), piece.to_vec());
    }
}

/// Whether a text is there, after the changes so far.
pub(super) fn is_whole(batch: &Batch<'_>, hash: &TextHash) -> bool {
    gather(hash, |number| batch.get(Family::Texts, &keys::piece(hash, number))).is_ok()
}

/// Lets a document's text of so many bytes go, and removes it if no other document has it.
pub(super) fn release(batch: &mut Batch<'_>, hash: &TextHash, bytes: u64, id: &DocumentId) -> Result<(), CatalogError> {
    batch.delete(Family::TextRefs, keys::reference(hash, id));
    if batch.any(Family::TextRefs, hash)? {
        return Ok(());
    }
    let known =
        (0u32..).take(usize::try_from(bytes).unwrap_or(0).div_ceil(PIECE)).map(|number| keys::piece(hash, number));
    for piece in known.chain(batch.readable_keys(Family::Texts, hash)?).collect::<BTreeSet<_>>() {
        batch.delete(Family::Texts, piece);
    }
    Ok(())
}

/// A whole text, compared with its hash.
pub(super) fn whole(store: &Store, hash: &TextHash) -> Result<String, CatalogError> {
    gather(hash, |number| read(store, Family::Texts, &keys::piece(hash, number)))
}

/// The pieces of a text together. Each is asked for by its key: what was written since a table was damaged is found so, where
/// going through the rows of a family would come upon the table.
fn gather(
    hash: &TextHash,
    piece: impl Fn(u32) -> Result<Option<Vec<u8>>, CatalogError>,
) -> Result<String, CatalogError> {
    let mut bytes = Vec::new();
    for number in 0.. {
        match piece(number) {
            Ok(Some(piece)) => {
                bytes.extend_from_slice(&piece);
                if piece.len() < PIECE {
                    break;
                }
            }
            Ok(None) => break,
            // Nothing is behind the last piece, though that cannot be read.
            Err(CatalogError::Row(_)) if blake3::hash(&bytes).as_bytes() == hash => break,
            Err(error) => return Err(error),
        }
    }
    check(bytes, hash)
}

/// A part of a text, compared with the part's own hash.
pub(super) fn part(
    store: &Store,
    text: &TextHash,
    range: &Range<usize>,
    hash: &TextHash,
) -> Result<String, CatalogError> {
    let mut bytes = Vec::with_capacity(range.len());
    for number in range.start / PIECE..=range.end.saturating_sub(1) / PIECE {
        let number = u32::try_from(number).map_err(|_| lost(number))?;
        let piece = read(store, Family::Texts, &keys::piece(text, number))?.ok_or_else(|| lost(number as usize))?;
        let start = number as usize * PIECE;
        let within = range.start.max(start) - start..range.end.min(start + piece.len()).saturating_sub(start);
        bytes.extend_from_slice(piece.get(within).unwrap_or_default());
    }
    check(bytes, hash)
}

fn lost(piece: usize) -> DamagedRow {
    DamagedRow(format!("piece {piece} of its text is missing"))
}

fn check(bytes: Vec<u8>, hash: &TextHash) -> Result<String, CatalogError> {
    if blake3::hash(&bytes).as_bytes() != hash {
        return Err(DamagedRow(format!("{} bytes of text do not have the hash that was written", bytes.len())).into());
    }
    Ok(String::from_utf8(bytes).map_err(|_| DamagedRow("its text is no UTF-8".into()))?)
}
