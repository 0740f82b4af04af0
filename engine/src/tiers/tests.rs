use std::sync::atomic::AtomicUsize;

use bytes::Bytes;

use super::*;
use crate::error::EngineError;
use crate::kv::KvDtype;

const SHAPE: KvShape = KvShape { layers: 3, kv_heads: 2, head_dim: 4, dtype: KvDtype::Bf16 };
/// Bytes of a chunk of one token.
const TOKEN: u64 = 3 * 2 * 2 * 4 * 2;

/// A chunk whose bytes say who and where they are.
struct Source {
    number: u8,
    tokens: usize,
    reads: AtomicUsize,
    named: bool,
    fails: bool,
}

fn source(number: u8, tokens: usize) -> Arc<Source> {
    Arc::new(Source { number, tokens, reads: AtomicUsize::new(0), named: true, fails: false })
}

impl ChunkSource for Source {
    fn tokens(&self) -> usize {
        self.tokens
    }

    fn layer(&self, layer: usize) -> Result<ChunkLayer> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        if self.fails {
            return Err(EngineError::ChunkSource("gone".into()));
        }
        let side = |side: u8| Bytes::from(vec![self.number * 16 + layer as u8 * 2 + side; self.tokens * 16]);
        Ok(ChunkLayer::raw(side(0), side(1)))
    }

    fn name(&self) -> Option<ChunkName> {
        self.named.then(|| ChunkName::of(&[self.number]))
    }
}

fn tiers(tokens: u64) -> ChunkTiers {
    ChunkTiers::new(SHAPE, Isa::detect(), tokens * TOKEN, None).unwrap()
}

/// Reads all layers as a request does, and compares them with the source's.
fn read(tiers: &ChunkTiers, source: &Arc<Source>) {
    let reader = tiers.reader(&(Arc::clone(source) as _));
    for layer in 0..SHAPE.layers {
        let found = reader.layer(Isa::detect(), &SHAPE, layer).unwrap().to_host(None, layer).unwrap();
        let byte = source.number * 16 + layer as u8 * 2;
        assert!(found.keys.iter().all(|b| *b == byte) && found.values.iter().all(|b| *b == byte + 1));
        assert_eq!((found.keys.len(), found.values.len()), (source.tokens * 16, source.tokens * 16));
    }
}

#[test]
fn a_chunk_is_read_from_its_source_once() {
    let (tiers, chunk) = (tiers(10), source(1, 3));
    (0..3).for_each(|_| read(&tiers, &chunk));
    assert_eq!(chunk.reads.load(Ordering::Relaxed), SHAPE.layers);
    let [host, device] = tiers.load();
    assert_eq!((host.chunks, host.bytes, host.hits, host.budget), (1, 3 * TOKEN, 2, 10 * TOKEN));
    assert_eq!(device, TierLoad::default());
    tiers.clear();
    read(&tiers, &chunk);
    assert_eq!(chunk.reads.load(Ordering::Relaxed), 2 * SHAPE.layers);
}

#[test]
fn what_has_no_name_or_no_room_is_read_each_time() {
    let tiers = tiers(4);
    let nameless = Arc::new(Source { named: false, ..Arc::try_unwrap(source(1, 3)).ok().unwrap() });
    let large = source(2, 5);
    for chunk in [&nameless, &large] {
        (0..2).for_each(|_| read(&tiers, chunk));
        assert_eq!(chunk.reads.load(Ordering::Relaxed), 2 * SHAPE.layers);
    }
    assert_eq!(tiers.load()[0].chunks, 0);
}

#[test]
fn chunks_in_use_and_kept_ones_do_not_make_way() {
    let tiers = tiers(4);
    let (a, b, c) = (source(1, 2), source(2, 2), source(3, 2));
    assert!(tiers.keep(&(Arc::clone(&a) as _)).unwrap().is_some());
    let reader = tiers.reader(&(Arc::clone(&b) as _));
    read(&tiers, &c);
    assert_eq!((tiers.load()[0].chunks, tiers.load()[0].evicted), (2, 0));
    drop(reader);
    read(&tiers, &c);
    assert_eq!((tiers.load()[0].chunks, tiers.load()[0].evicted), (2, 1));
    read(&tiers, &a);
    assert_eq!(a.reads.load(Ordering::Relaxed), SHAPE.layers);
}

#[test]
fn a_source_that_fails_fails_its_reader_and_leaves_nothing_whole() {
    let tiers = tiers(4);
    let broken = Arc::new(Source { fails: true, ..Arc::try_unwrap(source(1, 2)).ok().unwrap() });
    let reader = tiers.reader(&(Arc::clone(&broken) as _));
    assert!(reader.layer(Isa::detect(), &SHAPE, 0).is_err() && reader.layer(Isa::detect(), &SHAPE, 9).is_err());
    // Another source of the same chunk fills the same place.
    read(&tiers, &source(1, 2));
    assert_eq!(tiers.load()[0].hits, 0);
    drop(reader);
    read(&tiers, &source(1, 2));
    assert_eq!(tiers.load()[0].hits, 1);
}

#[test]
fn what_the_source_has_removed_is_read_anew() {
    let (tiers, a, b) = (tiers(10), source(1, 3), source(2, 3));
    read(&tiers, &a);
    read(&tiers, &b);
    tiers.forget(&[ChunkName::of(&[1]), ChunkName::of(&[7])]);
    assert_eq!(tiers.load()[0].chunks, 1);
    read(&tiers, &a);
    read(&tiers, &b);
    let reads = |source: &Source| source.reads.load(Ordering::Relaxed);
    assert_eq!((reads(&a), reads(&b)), (2 * SHAPE.layers, SHAPE.layers));
}

#[test]
fn readers_at_the_same_time_share_what_each_reads() {
    let (tiers, chunk) = (tiers(10), source(1, 3));
    std::thread::scope(|scope| {
        (0..4).for_each(|_| drop(scope.spawn(|| read(&tiers, &chunk))));
    });
    assert_eq!(chunk.reads.load(Ordering::Relaxed), SHAPE.layers);
}
