//! What an index keeps of a document, and the hashes by which that is known to be unchanged.

use std::ops::Range;

use crate::split::{ChunkSpan, Span};

/// A document as it is written.
pub(super) struct Record<'a> {
    /// Its path.
    pub(super) name: &'a str,
    /// Identifies its text and how it was split.
    pub(super) fingerprint: &'a str,
    /// Its whole text.
    pub(super) text: &'a str,
    /// Its chunks, in order.
    pub(super) chunks: &'a [ChunkSpan],
}

impl Record<'_> {
    /// The places of all chunks, one a line.
    pub(super) fn places(&self) -> String {
        self.chunks.iter().map(write_place).collect::<Vec<_>>().join("\n")
    }

    /// Hash of everything in it.
    pub(super) fn seal(&self) -> [u8; 32] {
        seal("quire document record 1", &[self.name, self.fingerprint, &self.places(), self.text])
    }
}

/// Hash of a passage, its document and its place.
pub(super) fn passage_seal(name: &str, chunk: &ChunkSpan, passage: &str) -> [u8; 32] {
    seal("quire passage record 1", &[name, &write_place(chunk), passage])
}

fn seal(context: &str, parts: &[&str]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(context);
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize().into()
}

/// Equal for passages that differ in white space at most.
pub(super) fn passage_digest(passage: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for word in passage.split_whitespace() {
        hasher.update(word.as_bytes());
        hasher.update(b" ");
    }
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// A place as text: `start end start end`, characters, then bytes.
pub(super) fn write_place(chunk: &ChunkSpan) -> String {
    format!("{} {} {} {}", chunk.chars.start, chunk.chars.end, chunk.bytes.start, chunk.bytes.end)
}

/// What [`write_place`] has written.
pub(super) fn parse_place(text: &str) -> Option<ChunkSpan> {
    let numbers: Vec<usize> = text.split(' ').map(|n| n.parse().ok()).collect::<Option<_>>()?;
    let [start, end, from, to]: [usize; 4] = numbers.try_into().ok()?;
    (start <= end && from <= to)
        .then_some(ChunkSpan { chars: Span { start, end }, bytes: Range { start: from, end: to } })
}
