//! The store that keeps the attention state of every chunk ever read.
//!
//! A chunk's keys and values are computed once, stored under a [`ChunkKey`] that is a hash of
//! everything they depend on, and read back layer by layer. This crate knows no model: it knows
//! bytes and their layout ([`KvShape`]). Chunks of several models lie in one store.
//!
//! What a [`ChunkStore`] promises:
//!
//! * **Nothing wrong is served.** Every value carries the name of what it belongs to and checksums of
//!   its own, over and above RocksDB's. Damage is an error for that chunk alone; the chunk counts as
//!   absent until it is stored again.
//! * **What `put` acknowledged survives** a crash and a power failure: the payload is synced before the
//!   row that makes it visible, and the row before `put` returns.
//! * **Nothing partial is visible**, at any moment: a payload without a row is not there, and is
//!   dropped at the next opening.
//! * **Payloads are written once**, into files of ascending chunk numbers that RocksDB takes over as they are. A file goes
//!   when its last chunk has gone, and is rewritten when few are left.
//! * **The byte budget holds**, on the disk too, and the store keeps it. Chunks make way, demoted ones first, then
//!   in the order of an [`EvictionPolicy`], except pinned ones, and only for a chunk that is stored or a smaller budget that is set: opening and looking change
//!   nothing.
//! * **A full or failing disk is survived**: what does not fit is refused, and once there is space again the same handle
//!   goes on.
//!
//! ```
//! use chunk_cache::{
//!     ChunkKey, ChunkStore, KeyInputs, KvDtype, KvShape, LayerKv, ModelInfo, NewChunk, PutOutcome, RAW_CODEC, StoreOptions,
//! };
//!
//! # let directory = tempfile::tempdir()?;
//! let shape = KvShape { layers: 2, kv_heads: 1, head_dim: 4, dtype: KvDtype::Bf16 };
//! let store = ChunkStore::open(directory.path(), StoreOptions { byte_budget: 1 << 20 })?;
//! let model = store.register(&ModelInfo { fingerprint: [1; 32], name: "toy".to_owned(), shape })?;
//!
//! let key = ChunkKey::derive(&KeyInputs {
//!     model: &[1; 32], tokenizer: &[2; 32], rope: "default 10000", numerics: "1", tenant_salt: b"", tokens: &[17, 4, 99],
//!     prefix: &[0], kv: shape, codec: RAW_CODEC,
//! });
//! // Three tokens of one head of four bf16 numbers: 24 bytes of keys, 24 of values.
//! let layer = LayerKv { keys: vec![7; 24].into(), values: vec![8; 24].into() };
//! let chunk = NewChunk::new(key, 3, vec![layer.clone(), layer.clone()]);
//! assert_eq!(store.put(model, chunk.clone())?, PutOutcome::Stored);
//! assert_eq!(store.put(model, chunk)?, PutOutcome::AlreadyPresent);
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
mod checksum;
mod compute;
mod direct;
mod disk;
mod error;
mod eviction;
mod format;
mod key;
mod legacy;
mod open;
mod pending;
mod policy;
mod reading;
mod records;
mod recovery;
mod shape;
mod single_flight;
mod space;
mod stats;
mod store;
#[cfg(test)]
mod tests;
mod variants;
mod verify;
mod writer;

pub use backend::Access;
pub use catalogue::{DamagedChunk, PinGuard};
pub use compute::{ComputeError, Found, InMemory};
pub use error::StoreError;
pub use eviction::plan_eviction;
pub use key::{ChunkId, ChunkKey, KeyInputs, ParseKeyError, RAW_CODEC, VariantId};
pub use open::OpenReport;
pub use pending::{NewChunk, PutTicket};
pub use policy::{EvictionPolicy, ParsePolicyError, Worth};
pub use records::{ModelInfo, Section};
pub use shape::{KvDtype, KvShape, LayerKv};
pub use single_flight::{Fetched, SingleFlight};
pub use stats::{ChunkMeta, PutOutcome, StoreStats};
pub use store::{ChunkStore, ModelHandle, StoreOptions};
pub use variants::{Before, Provenance, Variant, cheapest};
pub use verify::VerifyReport;
