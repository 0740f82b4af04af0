//! The store as a whole: against a model, damaged, crashed, refused, and from many threads.
#![allow(clippy::unwrap_used)]

mod budget;
mod compute;
mod crash;
mod damage;
mod full_disk;
mod model;
mod old_layout;
mod policies;
pub(crate) mod power;
mod reading;
mod refusals;
mod space;
mod threads;

use std::fs;
use std::path::Path;

use crate::disk::RESERVE_FILE;
use crate::pending::Work;
use crate::{
    ChunkId, ChunkKey, ChunkStore, KvDtype, KvShape, LayerKv, ModelHandle, ModelInfo, NewChunk, StoreError,
    StoreOptions, VariantId,
};

const SHAPE: KvShape = KvShape { layers: 3, kv_heads: 2, head_dim: 8, dtype: KvDtype::Bf16 };

fn options(byte_budget: u64) -> StoreOptions {
    StoreOptions { byte_budget }
}

fn toy(shape: KvShape) -> ModelInfo {
    ModelInfo { fingerprint: [1; 32], name: "toy".to_owned(), shape }
}

fn model(store: &ChunkStore) -> ModelHandle {
    store.register(&toy(SHAPE)).unwrap()
}

fn open(path: &Path) -> Result<ChunkStore, StoreError> {
    ChunkStore::open(path, options(1 << 30))
}

fn key(n: u32) -> ChunkKey {
    ChunkKey { chunk: ChunkId(*blake3::hash(&n.to_le_bytes()).as_bytes()), variant: VariantId([n as u8; 16]) }
}

/// From 1 to about 150 tokens: layers of 64 bytes (several a block) to 10 KB (one a block).
fn tokens(n: u32) -> u32 {
    1 + n * 37 % 150
}

fn bytes_of(n: u32) -> u64 {
    SHAPE.payload_bytes(tokens(n)).unwrap()
}

/// The one content that chunk `n` has.
fn layers(n: u32) -> Vec<LayerKv> {
    let side = SHAPE.bytes_per_side(tokens(n)).unwrap() as usize;
    let fill = |layer: u32, what: u8| {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&n.to_le_bytes()).update(&layer.to_le_bytes()).update(&[what]);
        let mut bytes = vec![0; side];
        hasher.finalize_xof().fill(&mut bytes);
        bytes.into()
    };
    let layer = |l| LayerKv { keys: fill(l, 0), values: fill(l, 1) };
    (0..SHAPE.layers).map(layer).collect()
}

fn chunk(n: u32) -> NewChunk {
    NewChunk::new(key(n), tokens(n), layers(n))
}

fn put(store: &ChunkStore, n: u32) -> Result<crate::PutOutcome, StoreError> {
    store.put(model(store), chunk(n))
}

/// Stores these one by one, each in a payload file of its own.
fn put_each(store: &ChunkStore, numbers: impl IntoIterator<Item = u32>) {
    for n in numbers {
        put(store, n).unwrap();
    }
}

/// Stores these together, in one payload file.
fn put_group(store: &ChunkStore, numbers: impl IntoIterator<Item = u32>) {
    let model = model(store);
    let mut state = store.core.catalogue.lock();
    let group: Vec<_> =
        numbers.into_iter().map(|n| ChunkStore::hand_over(&mut state, model, chunk(n), bytes_of(n))).collect();
    assert!(store.core.mailbox.push(Work::Store(group.clone())));
    drop(state);
    for put in group {
        put.done.wait().unwrap();
    }
}

/// What reading all of chunk `n` gives; panics on wrong bytes.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Whole,
    Absent,
    Corrupt,
}

fn look(store: &ChunkStore, n: u32) -> Seen {
    let listed = store.contains(&key(n));
    for (index, wanted) in (0..).zip(layers(n)) {
        match store.layer(&key(n), index) {
            Ok(Some(found)) => assert!(found == wanted, "wrong bytes in chunk {n} layer {index}"),
            Ok(None) => {
                assert!(!listed && index == 0, "chunk {n} is partly there");
                return Seen::Absent;
            }
            Err(StoreError::Corrupt { key: named, .. }) => {
                assert_eq!(named, key(n));
                assert!(!store.contains(&key(n)), "a corrupt chunk is a miss");
                return Seen::Corrupt;
            }
            Err(other) => panic!("chunk {n} layer {index}: {other}"),
        }
    }
    assert!(listed);
    let meta = store.meta(&key(n)).unwrap();
    assert_eq!((meta.tokens, meta.payload_bytes), (tokens(n), bytes_of(n)));
    Seen::Whole
}

/// Copies the files of a directory as they are now, and again if they changed meanwhile.
fn image(from: &Path, to: &Path) {
    let listing = || {
        let mut list: Vec<_> = fs::read_dir(from)
            .unwrap()
            .filter_map(|entry| {
                let entry = entry.unwrap();
                let data = entry.metadata().ok()?;
                // The folder of unfinished files and the reserve are made anew by whoever opens.
                (data.is_file() && entry.file_name() != RESERVE_FILE).then_some(())?;
                Some((entry.file_name(), data.len(), data.modified().unwrap()))
            })
            .collect();
        list.sort();
        list
    };
    loop {
        let _ = fs::remove_dir_all(to);
        fs::create_dir_all(to).unwrap();
        let before = listing();
        let copied = before.iter().all(|(name, ..)| fs::copy(from.join(name), to.join(name)).is_ok());
        if copied && listing() == before {
            return;
        }
    }
}

/// A small generator of repeatable choices (xorshift64*).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }
}
