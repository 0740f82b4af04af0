//! How fast layers are read, beside what copying the same bytes costs.

use std::fs::File;
use std::hint::black_box;
use std::io::Read;
use std::path::Path;
use std::time::Instant;

use chunk_cache::{ChunkKey, ChunkStore};

use super::disk::{drop_page_cache, files};
use crate::error::{EvalError, Result};
use crate::stats::median;

/// Bytes that a round reads at most: more than caches of the processor hold, less than the page cache.
const MOST_BYTES: u64 = 1 << 30;

/// Rates in GB/s, medians of rounds in turns.
pub(super) struct Warm {
    /// Of layers in the page cache, checked, by one thread.
    pub(super) read: f64,
    /// Of copying pieces of the size of a layer out of a buffer as large as all of them.
    pub(super) memcpy: f64,
}

impl Warm {
    pub(super) fn share(&self) -> f64 {
        self.read / self.memcpy
    }
}

/// Rates in GB/s when the page cache holds nothing of it.
pub(super) struct Cold {
    /// Of layers.
    pub(super) read: f64,
    /// Of the files, read one after the other.
    pub(super) file: f64,
}

/// Chunks of about [`MOST_BYTES`] together, in the order in which they were stored, and their layers.
fn chosen(store: &ChunkStore) -> Vec<(ChunkKey, u32)> {
    let models = store.models();
    let mut list = store.list();
    list.sort_by_key(|(key, meta)| (meta.created_unix, *key));
    let mut bytes = 0;
    let fitting = list.into_iter().take_while(|(_, meta)| {
        bytes += meta.payload_bytes;
        bytes <= MOST_BYTES
    });
    fitting.map(|(key, meta)| (key, models[meta.model].shape.layers)).collect()
}

/// Reads all layers of these chunks. Returns the bytes.
fn read_all(store: &ChunkStore, chunks: &[(ChunkKey, u32)]) -> Result<u64> {
    let mut bytes = 0;
    for (key, layers) in chunks {
        for layer in 0..*layers {
            if let Some(kv) = store.layer(key, layer)? {
                bytes += (black_box(&kv.keys[..]).len() + black_box(&kv.values[..]).len()) as u64;
            }
        }
    }
    Ok(bytes)
}

fn rate(bytes: u64, began: Instant) -> f64 {
    bytes as f64 / began.elapsed().as_secs_f64() / 1e9
}

pub(super) fn warm(store: &ChunkStore, repeats: usize) -> Result<Warm> {
    let chunks = chosen(store);
    let bytes = read_all(store, &chunks)? as usize;
    let layers: usize = chunks.iter().map(|(_, layers)| *layers as usize).sum();
    let layer = bytes / layers.max(1);
    let (source, mut target) = (vec![1u8; bytes], vec![0u8; layer]);
    let (mut reads, mut copies) = (Vec::new(), Vec::new());
    for _ in 0..repeats {
        let began = Instant::now();
        let read = read_all(store, &chunks)?;
        reads.push(rate(read, began));
        let began = Instant::now();
        for piece in source.chunks_exact(layer) {
            target.copy_from_slice(black_box(piece));
            black_box(&target);
        }
        copies.push(rate((source.len() / layer * layer) as u64, began));
    }
    Ok(Warm { read: median(&reads), memcpy: median(&copies) })
}

pub(super) fn cold(store: &ChunkStore, dir: &Path, repeats: usize) -> Result<Cold> {
    let chunks = chosen(store);
    let tables: Vec<_> =
        files(dir).into_iter().filter(|path| path.extension().is_some_and(|end| end == "sst")).collect();
    let (mut reads, mut plain) = (Vec::new(), Vec::new());
    let mut buffer = vec![0; 1 << 20];
    for _ in 0..repeats {
        drop_page_cache(dir)?;
        let began = Instant::now();
        let read = read_all(store, &chunks)?;
        reads.push(rate(read, began));
        drop_page_cache(dir)?;
        let (began, mut bytes) = (Instant::now(), 0);
        for path in &tables {
            let mut file = File::open(path).map_err(EvalError::io("read", path))?;
            loop {
                match file.read(&mut buffer).map_err(EvalError::io("read", path))? {
                    0 => break,
                    count => bytes += count as u64,
                }
            }
            if bytes >= read {
                break;
            }
        }
        plain.push(rate(bytes, began));
    }
    Ok(Cold { read: median(&reads), file: median(&plain) })
}
