//! Keys of rows.

use super::id::DocumentId;
use super::rows::TextHash;
use crate::split::Format;

/// Of a collection that is there.
pub(super) fn collection(name: &str) -> Vec<u8> {
    [&[0], name.as_bytes()].concat()
}

/// Of a collection that was removed; its name may have been given again.
pub(super) fn removed_collection(id: u32) -> Vec<u8> {
    [&[1][..], &id.to_be_bytes()].concat()
}

/// Of a document's name: `removed` tells names that are there from those that can be restored.
pub(super) fn name(collection: u32, removed: bool, name: &str) -> Vec<u8> {
    [&collection.to_be_bytes()[..], &[u8::from(removed)], name.as_bytes()].concat()
}

/// Of a text in a collection. The format is part of it, as it decides where a text is split.
pub(super) fn content(collection: u32, format: Format, text: &TextHash) -> Vec<u8> {
    let format = match format {
        Format::Text => 0,
        Format::Markdown => 1,
    };
    [&collection.to_be_bytes()[..], &[format], text].concat()
}

/// Of a piece of a text.
pub(super) fn piece(text: &TextHash, number: u32) -> Vec<u8> {
    [&text[..], &number.to_be_bytes()].concat()
}

/// Of a passage.
pub(super) fn passage(id: &DocumentId, number: u32) -> Vec<u8> {
    [&id.bytes()[..], &number.to_be_bytes()].concat()
}

/// Of somebody's need for something that is named by a hash.
pub(super) fn reference(hash: &[u8; 32], id: &DocumentId) -> Vec<u8> {
    [&hash[..], id.bytes()].concat()
}

/// Of an entry of the log.
pub(super) fn log(collection: u32, sequence: u64) -> Vec<u8> {
    [&collection.to_be_bytes()[..], &sequence.to_be_bytes()].concat()
}
