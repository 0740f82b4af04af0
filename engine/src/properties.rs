//! Properties that hold across the engine's parts, on the tiny models of the golden fixtures.

use std::path::Path;
use std::sync::Arc;

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::blend::{Context, blend, blend_behind};
use crate::chunk::{ChunkKv, ChunkLayer, ChunkSource, PromptChunk};
use crate::config::{AttentionConfig, BlendConfig, BlendMode, Strategy};
use crate::error::{EngineError, Result};
use crate::kv::KvDtype;
use crate::kv::sequence::SequenceKv;
use crate::model::transformer::{Piece, Transformer, Want};
use crate::tiers::{ChunkName, ChunkTiers};

const BOS: u32 = 1;

fn model(name: &str) -> Transformer {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden").join(name);
    Transformer::load_dir(&dir, 2, None).unwrap()
}

fn tokens(rng: &mut ChaCha8Rng, n: usize) -> Vec<u32> {
    (0..n).map(|_| rng.random_range(2..200)).collect()
}

fn append(model: &Transformer, kv: &mut SequenceKv, tokens: &[u32]) -> Vec<f32> {
    let x = model.forward(&mut [Piece::exact(kv, tokens, Want::Last)]).unwrap();
    model.logits(&x).unwrap()
}

fn assert_close(a: &[f32], b: &[f32], tolerance: f32, what: &str) {
    assert_eq!(a.len(), b.len());
    let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= tolerance, "{what}: differs by {worst}");
}

/// A chunk with its KV computed alone behind the bos.
fn chunk(model: &Transformer, tokens: &[u32]) -> PromptChunk {
    let kv = ChunkKv::compute(model, &[BOS], tokens, 512).unwrap();
    PromptChunk { tokens: tokens.into(), prefix: [BOS].into(), source: Some(Arc::new(kv)) }
}

fn config(mode: BlendMode, ratio: f32) -> BlendConfig {
    BlendConfig { mode, ratio, ..BlendConfig::default() }
}

fn blended(model: &Transformer, chunks: &[PromptChunk], config: &BlendConfig) -> SequenceKv {
    blend(model, &Context::unasked(&[BOS], chunks), config, &|| false).unwrap().kv
}

#[test]
fn prefill_does_not_depend_on_how_it_is_cut() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for name in ["llama2", "llama3", "llama-linear", "llama-yarn", "qwen2", "qwen3", "mistral"] {
        let model = model(name);
        let text = tokens(&mut rng, 300);
        let whole = append(&model, &mut SequenceKv::new(model.shape), &text);
        let mut kv = SequenceKv::new(model.shape);
        let mut rest = &text[..];
        let mut last = Vec::new();
        while !rest.is_empty() {
            // The last tokens one by one, as decoding reads them.
            let n = if rest.len() <= 20 { 1 } else { rng.random_range(1..=rest.len().min(90)) };
            last = append(&model, &mut kv, &rest[..n]);
            rest = &rest[n..];
        }
        assert_close(&whole, &last, 1e-3, name);
    }
}

#[test]
fn the_kv_of_a_chunk_does_not_depend_on_how_it_is_cut() {
    let mut rng = ChaCha8Rng::seed_from_u64(10);
    let model = model("llama3");
    let text = tokens(&mut rng, 150);
    let width = model.shape.width() * model.shape.dtype.size();
    let whole = ChunkKv::compute(&model, &[BOS], &text, 512).unwrap();
    assert_eq!((whole.layers.len(), whole.layers[0].keys.len()), (model.spec.layers, 150 * width));
    // Steps of a few tokens use another kernel on some machines, which rounds otherwise.
    for step in [19, 64, 151] {
        assert!(ChunkKv::compute(&model, &[BOS], &text, step).unwrap() == whole, "{step} tokens at a time");
    }
}

#[test]
fn retrieval_of_all_keys_equals_full_attention() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let model = model("llama2");
    assert_eq!(model.shape.dtype, KvDtype::F32);
    let text = tokens(&mut rng, 900);
    use ann_index::IndexKind;
    let built_in = IndexKind::ALL.into_iter().filter(|kind| kind.is_built_in());
    for (index, wait) in built_in.map(|kind| (kind, true)).chain([(IndexKind::Flat, false)]) {
        let retrieval = AttentionConfig {
            strategy: Strategy::Retrieval,
            window: 32,
            k: 10_000,
            ef: 10_000,
            index,
            ..AttentionConfig::default()
        };
        let mut full = SequenceKv::new(model.shape);
        append(&model, &mut full, &text[..500]);
        let mut cold = full.clone();
        for token in &text[500..] {
            match wait {
                true => cold.settle_and_wait(&retrieval, &model),
                false => cold.settle(&retrieval, &model, u64::MAX).unwrap(),
            }
            let decode = |kv: &mut SequenceKv, attention| {
                let mut pieces = [Piece { attention, ..Piece::exact(kv, std::slice::from_ref(token), Want::Last) }];
                let x = model.forward(&mut pieces).unwrap();
                (model.logits(&x).unwrap(), pieces[0].stats)
            };
            let (want, _) = decode(&mut full, None);
            let (got, stats) = decode(&mut cold, Some(&retrieval));
            assert_close(&want, &got, 1e-4, "retrieval of all keys");
            assert_eq!(stats.cold_keys, stats.keys_attended);
            assert!(!wait || stats.cold_keys > 0);
        }
    }
}

#[test]
fn a_window_sees_sinks_and_recent_tokens_only() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let model = model("llama2");
    let mut text = tokens(&mut rng, 400);
    let window = AttentionConfig { strategy: Strategy::Window, window: 40, ..AttentionConfig::default() };
    let run = |text: &[u32]| {
        // One layer's view reaches one window back; KV of one-layer-deep state is the token's own.
        let mut kv = SequenceKv::new(model.shape);
        append(&model, &mut kv, text);
        kv.settle(&window, &model, 0).unwrap();
        let mut stats = crate::attention::cold::ColdStats::default();
        let rows = model.rows(vec![400]);
        let x = model.embed(&[7]).unwrap();
        let qkv = model.qkv(0, &x, &rows);
        kv.extend_to(401).unwrap();
        model.write_kv(kv.recent_mut(0), &rows, &qkv.keys, &qkv.values);
        let queries = model.queries(&qkv.q, &rows.positions);
        kv.attend(&model.cpu, 0, &queries, &window, &mut stats).unwrap().out
    };
    let before = run(&text);
    (4..361).for_each(|i| text[i] = 5);
    assert_eq!(before, run(&text), "tokens 4..361 are neither sinks nor among the last 40");
    text[361] = if text[361] == 5 { 6 } else { 5 };
    assert_ne!(before, run(&text), "token 361 is the window's first");
}

#[test]
fn blending_with_ratio_one_equals_full_prefill_in_any_order() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for name in ["llama2", "llama3", "qwen3", "llama-yarn", "mistral"] {
        let model = model(name);
        let mut chunks: Vec<PromptChunk> = (0..5)
            .map(|_| {
                let n = rng.random_range(1..80);
                chunk(&model, &tokens(&mut rng, n))
            })
            .collect();
        chunks.push(PromptChunk { tokens: [].into(), prefix: [BOS].into(), source: None });
        let question = tokens(&mut rng, 9);
        // Keys and values that are stored in bf16 may round to the other side.
        let tolerance = if model.shape.dtype == KvDtype::F32 { 1e-4 } else { 1e-3 };
        for _ in 0..3 {
            chunks.shuffle(&mut rng);
            let mut some = chunks.clone();
            some[2].source = None;
            let mut full = blended(&model, &some, &config(BlendMode::FullRecompute, 0.0));
            let want = append(&model, &mut full, &question);
            let chosen = [BlendMode::CacheBlend, BlendMode::Heads, BlendMode::Random];
            for mode in [BlendMode::Answer, BlendMode::Question].into_iter().chain(chosen) {
                let asked = Context { prefix: &[BOS], chunks: &some, suffix: &question, tiers: None };
                let mut all = blend(&model, &asked, &config(mode, 1.0), &|| false).unwrap().kv;
                let got = append(&model, &mut all, &question);
                assert_close(&want, &got, tolerance, &format!("{name}, {mode}"));
            }
            let plain: Vec<u32> = std::iter::once(BOS).chain(some.iter().flat_map(|c| c.tokens.to_vec())).collect();
            let mut kv = SequenceKv::new(model.shape);
            append(&model, &mut kv, &plain);
            assert_close(&append(&model, &mut kv, &question), &want, tolerance, name);
        }
    }
}

#[test]
fn epic_with_chunks_that_it_recomputes_whole_equals_full_prefill() {
    let mut rng = ChaCha8Rng::seed_from_u64(20);
    let model = model("llama2");
    let chunks = [32, 1, 17, 31].map(|n| chunk(&model, &tokens(&mut rng, n)));
    let question = tokens(&mut rng, 5);
    let run = |mode| append(&model, &mut blended(&model, &chunks, &config(mode, 0.0)), &question);
    assert_close(&run(BlendMode::FullRecompute), &run(BlendMode::Epic), 1e-4, "epic");
}

#[test]
fn the_first_chunk_behind_its_own_prefix_is_reused_exactly() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for name in ["llama2", "qwen2", "llama-linear"] {
        let model = model(name);
        let first = chunk(&model, &tokens(&mut rng, 70));
        let question = tokens(&mut rng, 5);
        let run = |mode| {
            let mut kv = blended(&model, std::slice::from_ref(&first), &config(mode, 0.15));
            append(&model, &mut kv, &question)
        };
        let want = run(BlendMode::FullRecompute);
        // The rows of the prefix, few by themselves, go through another kernel of bf16 weights on some machines.
        let tolerance = if model.shape.dtype == KvDtype::F32 { 0.0 } else { 1e-3 };
        assert_close(&want, &run(BlendMode::Reuse), tolerance, name);
        assert_close(&want, &run(BlendMode::CacheBlend), tolerance, name);
    }
}

#[test]
fn reuse_of_later_chunks_is_not_full_prefill() {
    // Otherwise the tests above would compare a thing with itself.
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let model = model("llama2");
    let chunks = [chunk(&model, &tokens(&mut rng, 40)), chunk(&model, &tokens(&mut rng, 40))];
    let question = tokens(&mut rng, 5);
    let run = |mode, ratio| append(&model, &mut blended(&model, &chunks, &config(mode, ratio)), &question);
    let (full, reuse, some) =
        (run(BlendMode::FullRecompute, 0.0), run(BlendMode::Reuse, 0.0), run(BlendMode::CacheBlend, 0.3));
    assert_ne!(full, reuse);
    assert_ne!(some, reuse);
    assert_ne!(some, full);
}

#[test]
fn what_is_computed_inside_a_context_does_not_see_what_comes_later() {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let model = model("llama2");
    for _ in 0..5 {
        let mut chunks: Vec<PromptChunk> = (0..4).map(|_| chunk(&model, &tokens(&mut rng, 50))).collect();
        chunks[1].source = None;
        let kv_of = |chunks: &[PromptChunk]| {
            let kv = blended(&model, chunks, &config(BlendMode::Reuse, 0.0));
            (0..model.spec.layers).map(|l| kv.rows(l, 0, 0..101)).collect::<Vec<_>>()
        };
        let before = kv_of(&chunks);
        chunks[2] = chunk(&model, &tokens(&mut rng, 33));
        chunks[3] = chunk(&model, &tokens(&mut rng, 60));
        assert_eq!(before, kv_of(&chunks), "positions 0..101 come before the change");
    }
}

struct Damaged(ChunkKv);

impl ChunkSource for Damaged {
    fn tokens(&self) -> usize {
        self.0.tokens
    }
    fn layer(&self, layer: usize) -> Result<ChunkLayer> {
        let mut found = self.0.layer(layer)?;
        match layer {
            0 => Ok(found),
            _ => {
                found.keys.truncate(found.keys.len() - 1);
                Ok(found)
            }
        }
    }
}

#[test]
fn a_chunk_whose_source_fails_is_computed_and_counted() {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let model = model("llama2");
    let good = chunk(&model, &tokens(&mut rng, 30));
    let mut bad = chunk(&model, &tokens(&mut rng, 30));
    let kv = ChunkKv {
        tokens: 30,
        layers: (0..model.spec.layers).map(|l| bad.source.as_ref().unwrap().layer(l).unwrap()).collect(),
    };
    bad.source = Some(Arc::new(Damaged(kv)));
    let out =
        blend(&model, &Context::unasked(&[BOS], &[good.clone(), bad.clone()]), &config(BlendMode::Reuse, 0.0), &|| {
            false
        })
        .unwrap();
    assert_eq!((out.stats.failed_chunks, out.stats.reused_tokens, out.stats.recomputed_tokens), (1, 30, 31));
    bad.source = None;
    let want = blended(&model, &[good, bad], &config(BlendMode::Reuse, 0.0));
    assert_eq!(want.rows(1, 0, 0..61), out.kv.rows(1, 0, 0..61));
}

struct Named(Arc<dyn ChunkSource>, u8);

impl ChunkSource for Named {
    fn tokens(&self) -> usize {
        self.0.tokens()
    }
    fn layer(&self, layer: usize) -> Result<ChunkLayer> {
        self.0.layer(layer)
    }
    fn name(&self) -> Option<ChunkName> {
        Some(ChunkName::of(&[self.1]))
    }
}

#[test]
fn a_blend_does_not_depend_on_where_its_chunks_are_kept() {
    let mut rng = ChaCha8Rng::seed_from_u64(28);
    let model = model("llama2");
    let mut chunks: Vec<PromptChunk> = (0..4).map(|_| chunk(&model, &tokens(&mut rng, 30))).collect();
    for (number, chunk) in (0..).zip(&mut chunks) {
        chunk.source = Some(Arc::new(Named(chunk.source.take().unwrap(), number)));
    }
    let question = tokens(&mut rng, 9);
    for mode in [BlendMode::Reuse, BlendMode::CacheBlend, BlendMode::Answer] {
        // Room for all of them, for some, for none.
        for room in [120, 70, 0] {
            let tiers = Arc::new(
                ChunkTiers::new(model.shape, model.cpu.isa, (room * model.shape.token_bytes()) as u64, None).unwrap(),
            );
            for _ in 0..3 {
                let rows = |tiers| {
                    let context = Context { prefix: &[BOS], chunks: &chunks, suffix: &question, tiers };
                    let kv = blend(&model, &context, &config(mode, 0.3), &|| false).unwrap().kv;
                    (0..model.spec.layers).map(|layer| kv.rows(layer, 0, 0..121)).collect::<Vec<_>>()
                };
                assert_eq!(rows(Some(&tiers)), rows(None), "{mode} {room}");
            }
            assert_eq!(tiers.load()[0].hits > 0, room > 0);
        }
    }
}

struct Panicking(ChunkKv);

impl ChunkSource for Panicking {
    fn tokens(&self) -> usize {
        self.0.tokens
    }
    fn layer(&self, layer: usize) -> Result<ChunkLayer> {
        assert!(layer == 0, "the source panics at layer {layer}");
        self.0.layer(layer)
    }
}

#[test]
fn a_chunk_whose_source_panics_is_computed_and_counted() {
    let mut rng = ChaCha8Rng::seed_from_u64(18);
    let model = model("llama2");
    let good = chunk(&model, &tokens(&mut rng, 30));
    let mut bad = chunk(&model, &tokens(&mut rng, 30));
    bad.source = Some(Arc::new(Panicking(ChunkKv::compute(&model, &[BOS], &bad.tokens, 512).unwrap())));
    for _ in 0..3 {
        let chunks = [good.clone(), bad.clone()];
        let out = blend(&model, &Context::unasked(&[BOS], &chunks), &config(BlendMode::Reuse, 0.0), &|| false).unwrap();
        assert_eq!((out.stats.failed_chunks, out.stats.reused_tokens, out.stats.recomputed_tokens), (1, 30, 31));
        let want = blended(
            &model,
            &[good.clone(), PromptChunk { source: None, ..bad.clone() }],
            &config(BlendMode::Reuse, 0.0),
        );
        assert_eq!(want.rows(1, 0, 0..61), out.kv.rows(1, 0, 0..61));
    }
}

#[test]
fn a_blend_in_which_nothing_is_computed_gives_the_cached_state() {
    // A prefix whose state is there, and a chunk that is used as it is: no row is left to compute, in no layer.
    let mut rng = ChaCha8Rng::seed_from_u64(19);
    let model = model("llama2");
    let chunk = chunk(&model, &tokens(&mut rng, 40));
    let mut start = SequenceKv::new(model.shape);
    append(&model, &mut start, &[BOS]);
    for (mode, ratio) in [(BlendMode::Reuse, 0.0), (BlendMode::CacheBlend, 0.0)] {
        for chunks in [vec![chunk.clone()], vec![chunk.clone(), chunk.clone()]] {
            let out = blend_behind(&model, &start, &Context::unasked(&[BOS], &chunks), &config(mode, ratio), &|| false)
                .unwrap();
            assert_eq!((out.stats.recomputed_tokens, out.stats.reused_tokens), (0, 40 * chunks.len()));
            let want = blended(&model, &chunks, &config(mode, ratio));
            assert_eq!(want.rows(1, 0, 0..41), out.kv.rows(1, 0, 0..41));
        }
    }
}

#[test]
fn a_cancelled_blend_stops() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let model = model("llama2");
    let chunks = [chunk(&model, &tokens(&mut rng, 30))];
    let stopped = blend(&model, &Context::unasked(&[BOS], &chunks), &BlendConfig::default(), &|| true);
    assert!(matches!(stopped, Err(EngineError::Cancelled)));
}

#[test]
fn tapped_queries_and_keys_give_the_attention_that_is_computed() {
    let model = model("llama3");
    let (spec, shape) = (&model.spec, model.shape);
    let tokens = tokens(&mut ChaCha8Rng::seed_from_u64(5), 40);
    let mut kv = SequenceKv::new(shape);
    let (mut tap, mut query_tap) = (Vec::new(), Vec::new());
    let piece = Piece::exact(&mut kv, &tokens, Want::Nothing);
    model.forward(&mut [Piece { tap: Some(&mut tap), query_tap: Some(&mut query_tap), ..piece }]).unwrap();
    assert_eq!((tap.len(), query_tap.len()), (spec.layers, spec.layers));
    let positions: Vec<usize> = (0..tokens.len()).collect();
    let rows = model.rows(positions.clone());
    let (dim, last) = (spec.head_dim, tokens.len() - 1);
    for (layer, ((keys, values), q)) in tap.into_iter().zip(query_tap).enumerate() {
        let keys = model.rotated(&rows, keys);
        let row = &q[last * spec.heads * dim..];
        let computed = kv.attend_exact(&model.cpu, layer, &model.queries(row, &positions[last..])).out;
        for head in 0..spec.heads {
            let query = &row[head * dim..(head + 1) * dim];
            let of = |x: &[f32], t: usize| {
                let at = (t * shape.kv_heads + head * shape.kv_heads / spec.heads) * dim;
                x[at..at + dim].to_vec()
            };
            let score = |t: usize| -> f32 { of(&keys, t).iter().zip(query).map(|(k, q)| k * q).sum() };
            let weights: Vec<f32> = (0..tokens.len()).map(|t| (score(t) * model.softmax_scale()).exp()).collect();
            let total: f32 = weights.iter().sum();
            let mut expected = vec![0.0; dim];
            for (t, weight) in weights.iter().enumerate() {
                expected.iter_mut().zip(of(&values, t)).for_each(|(e, v)| *e += weight / total * v);
            }
            assert_close(&computed[head * dim..(head + 1) * dim], &expected, 2e-3, "attention from tapped rows");
        }
    }
}
