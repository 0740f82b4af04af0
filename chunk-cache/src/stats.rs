//! What a store tells of its chunks and of itself.

use crate::catalogue::Entry;

/// What is known of a chunk without reading its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkMeta {
    /// Tokens of the chunk.
    pub tokens: u32,
    /// Stored bytes of keys and values over all layers.
    pub payload_bytes: u64,
    /// When it was stored, seconds since the Unix epoch.
    pub created_unix: u64,
    /// When it was last stored or used, seconds since the Unix epoch.
    pub last_used_unix: u64,
    /// How often it was used for an answer.
    pub hits: u64,
    /// No document refers to it any more.
    pub demoted: bool,
    /// Index of its model in [`ChunkStore::models`](crate::ChunkStore::models).
    pub model: usize,
}

impl From<&Entry> for ChunkMeta {
    fn from(entry: &Entry) -> Self {
        ChunkMeta {
            tokens: entry.tokens,
            payload_bytes: entry.bytes,
            created_unix: entry.created_unix,
            last_used_unix: entry.usage.last_used_micros / 1_000_000,
            hits: entry.usage.hits,
            demoted: entry.usage.demoted,
            model: entry.model as usize,
        }
    }
}

/// What [`ChunkStore::put`](crate::ChunkStore::put) did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutOutcome {
    /// The chunk was written and is safe on disk.
    Stored,
    /// The chunk was there already; nothing was written.
    AlreadyPresent,
}

/// Totals over the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreStats {
    /// Visible chunks.
    pub chunks: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Bytes of their keys and values.
    pub payload_bytes: u64,
    /// The budget these bytes are held to.
    pub byte_budget: u64,
    /// Bytes of table files, those of removed chunks that are not free yet included; rows that are still only in
    /// the write-ahead log excluded.
    pub disk_bytes: u64,
    /// Bytes of keys and values of removed chunks that are not free yet.
    pub dead_bytes: u64,
    /// Uses summed over the visible chunks.
    pub hits: u64,
    /// Keys that are pinned now.
    pub pinned: u64,
    /// Chunks known to be damaged; they count as absent.
    pub damaged: u64,
    /// Chunks evicted since the store was opened.
    pub evicted: u64,
}
