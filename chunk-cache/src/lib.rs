//! The store that keeps the attention state of every chunk ever read.
//!
//! A chunk's keys and values are computed once, stored under a [`ChunkKey`] that is a hash of
//! everything they depend on, and read back layer by layer. This crate knows no model: it knows
//! bytes and their layout ([`KvShape`]).
//!
//! What a [`ChunkStore`] promises:
//!
//! * **Nothing wrong is served.** Every value carries the name of what it belongs to and checksums of
//!   its own, over and above RocksDB's. Damage is an error for that chunk alone; the chunk counts as
//!   absent until it is stored again.
//! * **What `put` acknowledged survives** a crash and a power failure: the payload is synced before the
//!   manifest that makes it visible, and the manifest before `put` returns.
//! * **Nothing partial is visible**, at any moment: a payload without a manifest is not there, and is
//!   swept at the next opening.
//! * **The byte budget holds**, and the store keeps it. The least recently used chunks make way, except pinned ones,
//!   and only for a chunk that is stored or a smaller budget that is set: opening and looking change nothing.
//!
//! ```
//! use chunk_cache::{ChunkKey, ChunkStore, KeyInputs, KvDtype, KvShape, LayerKv, PutOutcome, StoreOptions};
//!
//! # let directory = tempfile::tempdir()?;
//! let shape = KvShape { layers: 2, kv_heads: 1, head_dim: 4, dtype: KvDtype::Bf16 };
//! let store = ChunkStore::open(directory.path(), StoreOptions {
//!     byte_budget: 1 << 20,
//!     model_identity: [1; 32],
//!     model_name: "toy".to_owned(),
//!     shape,
//! })?;
//!
//! let key = ChunkKey::derive(&KeyInputs {
//!     model: &[1; 32], tokenizer: &[2; 32], rope: "default 10000", numerics: "1", kv: shape,
//!     tenant_salt: b"", prefix: &[0], tokens: &[17, 4, 99],
//! });
//! // Three tokens of one head of four bf16 numbers: 24 bytes of keys, 24 of values.
//! let layer = LayerKv { keys: vec![7; 24], values: vec![8; 24] };
//! let layers = [layer.clone(), layer.clone()];
//! assert_eq!(store.put(&key, 3, &layers)?, PutOutcome::Stored);
//! assert_eq!(store.put(&key, 3, &layers)?, PutOutcome::AlreadyPresent);
//!
//! let guard = store.pin(&[key]); // not evicted while a request uses it
//! assert_eq!(store.layer(&key, 1)?, Some(layer));
//! store.touch(&key)?;
//! drop(guard);
//! assert!(store.verify()?.is_clean());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod backend;
mod catalogue;
mod error;
mod eviction;
mod format;
mod key;
mod open;
mod records;
mod room;
mod rows;
mod shape;
mod store;
#[cfg(test)]
mod tests;
mod verify;

pub use backend::Access;
pub use catalogue::{DamagedChunk, PinGuard};
pub use error::StoreError;
pub use key::{ChunkKey, KeyInputs, ParseKeyError};
pub use open::OpenReport;
pub use shape::{KvDtype, KvShape, LayerKv};
pub use store::{ChunkMeta, ChunkStore, PutOutcome, StoreOptions, StoreStats};
pub use verify::VerifyReport;
