//! Chunks from every tier: whatever a request reads them from, the same numbers come out.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::models::{PLAIN, SHAPES, Tiny, rng};
use super::{logits, tokens};
use crate::blend::{Context, blend};
use crate::chunk::{ChunkKv, ChunkLayer, ChunkSource, PromptChunk};
use crate::config::{BlendConfig, BlendMode};
use crate::model::transformer::Transformer;
use crate::tiers::{ChunkName, ChunkTiers};

struct Named(ChunkKv, u8);

impl ChunkSource for Named {
    fn tokens(&self) -> usize {
        self.0.tokens
    }

    fn layer(&self, layer: usize) -> crate::Result<ChunkLayer> {
        self.0.layer(layer)
    }

    fn name(&self) -> Option<ChunkName> {
        Some(ChunkName::of(&[self.1]))
    }
}

/// Logits behind a question over the chunks.
fn read(model: &Transformer, chunks: &[PromptChunk], mode: BlendMode, tiers: Option<&Arc<ChunkTiers>>) -> Vec<f32> {
    let question = tokens(&mut rng(7), 21);
    let config = BlendConfig { mode, ratio: 0.2, ..BlendConfig::default() };
    let context = Context { prefix: &[1], chunks, suffix: &question, tiers };
    let mut kv = blend(model, &context, &config, &|| false).unwrap().kv;
    logits(model, &mut kv, &question, None)
}

/// Tiers whose page-locked memory has come.
fn tiers(model: &Transformer, bytes: u64, source: &Arc<dyn ChunkSource>) -> Arc<ChunkTiers> {
    let tiers = Arc::new(ChunkTiers::new(model.shape, model.cpu.isa, bytes, model.device()).unwrap());
    let begun = Instant::now();
    while tiers.keep(source).unwrap().is_none() {
        assert!(begun.elapsed() < Duration::from_secs(60), "page-locked memory does not come");
        std::thread::sleep(Duration::from_millis(5));
    }
    tiers.clear();
    tiers
}

fn check(tiny: &Tiny) {
    let (_, model) = tiny.pair(480);
    let mut rng = rng(481);
    // More than one copy brings at a time, so that spans are divided.
    let texts: Vec<Vec<u32>> = [90, 333, 1, 700, 333, 290].iter().map(|n| tokens(&mut rng, *n)).collect();
    let chunks: Vec<PromptChunk> = (0..)
        .zip(&texts)
        .map(|(i, text)| {
            let kv = ChunkKv::compute(&model, &[1], text, 256).unwrap();
            PromptChunk { tokens: text.as_slice().into(), prefix: [1].into(), source: Some(Arc::new(Named(kv, i))) }
        })
        .collect();
    let all = texts.iter().map(Vec::len).sum::<usize>() * model.shape.token_bytes();
    for mode in [BlendMode::Reuse, BlendMode::CacheBlend, BlendMode::Answer] {
        let plain = read(&model, &chunks, mode, None);
        // Room for all, and for some: then chunks come from all places at once.
        for bytes in [all, all / 2] {
            let tiers = tiers(&model, bytes as u64, chunks[2].source.as_ref().unwrap());
            for round in 0..5 {
                let found = read(&model, &chunks, mode, Some(&tiers));
                assert_eq!(found, plain, "{tiny:?} {mode}, {bytes} bytes, round {round}");
            }
            let [host, device] = tiers.load();
            assert!(host.bytes <= bytes as u64 && host.hits > 0 && device.hits > 0, "{host:?} {device:?}");
            if bytes == all {
                assert_eq!((host.chunks, device.chunks), (6, 6));
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn parity_of_blends_from_every_tier() {
    [PLAIN, SHAPES[2], SHAPES[6]].iter().for_each(check);
}
