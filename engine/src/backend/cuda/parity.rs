//! Kernels and passes on a GPU against the CPU's operations, on fresh random inputs.
//!
//! Ignored by default; `cargo test -p engine --lib --release -- --ignored parity` runs them and fails where there is no GPU.
//! Small random models of every shape that kernels are specialised for go through both backends: what is compared are
//! keys, values and queries of every layer, logits, and chosen tokens. These passes launch embed.cu, norm.cu, rope_append.cu,
//! swiglu.cu, split.cu, gemv.cu, sample.cu, draw.cu, attention_decode.cu, attention_prefill.cu or on Hopper attention_prefill_sm90.cu
//! with attention_merge.cu, attention_any.cu, kv_rows.cu (blending), attention_paid.cu, attention_paid_mma.cu and
//! kv_shift.cu (blending by the question, with correction) and merge.cu (sinks, cold tokens); products and single
//! kernels are also compared alone, in double precision. fill.cu only makes inputs of benches.

mod alone;
mod draw;
mod models;
mod repair;
mod tiers;

use std::sync::Arc;

use ann_index::IndexKind;
use half::bf16;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use self::models::{LAYERS, LIMITS, PLAIN, SHAPES, Stored, Tiny, VOCAB, config, rng};
use super::gemm::{Gemm, ProductShape};
use super::model::{CudaConfig, CudaModel, Limits, Next};
use super::weights::{Format, Matrix};
use super::{Device, Memory};
use crate::blend::{Context, blend, blend_behind};
use crate::chunk::{ChunkKv, PromptChunk};
use crate::config::{AttentionConfig, BlendConfig, BlendMode, Strategy};
use crate::kv::KvDtype;
use crate::kv::sequence::SequenceKv;
use crate::model::spec::ModelSpec;
use crate::model::transformer::{Piece, Transformer, Want};
use crate::sampler::{Choice, Sampled};
use crate::weights::Weights;

fn tokens(rng: &mut ChaCha8Rng, n: usize) -> Vec<u32> {
    (0..n).map(|_| rng.random_range(8..VOCAB as u32)).collect()
}

/// The relative error |a - b| / |b|.
fn error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let (distance, size) = a.iter().zip(b).fold((0.0, 0.0), |(d, s), (a, b)| (d + square(a - b), s + square(*b)));
    (distance / f64::max(size, f64::MIN_POSITIVE)).sqrt()
}

/// NaN fails.
fn assert_close(a: &[f32], b: &[f32], tolerance: f64, what: &str) {
    let error = error(a, b);
    assert!(error <= tolerance, "{what}: relative error {error:e}, at most {tolerance:e} is allowed");
}

/// Errors of 2^-16 in every activation; where KV is bf16, a few keys and values round to the other side.
fn tolerance(tiny: &Tiny) -> f64 {
    match (tiny.bf16, tiny.kv) {
        (_, KvDtype::Bf16) => 4e-3,
        (true, KvDtype::F32) => 2e-4,
        (false, KvDtype::F32) => 2e-5,
    }
}

fn logits(model: &Transformer, kv: &mut SequenceKv, text: &[u32], attention: Option<&AttentionConfig>) -> Vec<f32> {
    let piece = Piece { attention, ..Piece::exact(kv, text, Want::Last) };
    let states = model.forward(&mut [piece]).unwrap();
    model.logits(&states).unwrap()
}

type Tap = (Vec<(Vec<f32>, Vec<f32>)>, Vec<Vec<f32>>);

fn tapped(model: &Transformer, text: &[u32], cuts: &[usize]) -> (Tap, Vec<f32>) {
    let (mut tap, mut query_tap) = (Vec::new(), Vec::new());
    let mut kv = model.new_kv();
    let mut all = Vec::new();
    let mut start = 0;
    for end in cuts.iter().copied().chain([text.len()]) {
        let piece = Piece::exact(&mut kv, &text[start..end], Want::All);
        let piece = Piece { tap: Some(&mut tap), query_tap: Some(&mut query_tap), ..piece };
        let states = model.forward(&mut [piece]).unwrap();
        all.extend(model.logits(&states).unwrap());
        start = end;
    }
    ((tap, query_tap), all)
}

#[test]
#[ignore = "needs a GPU"]
fn parity_of_prefill_in_every_shape() {
    for (number, tiny) in SHAPES.iter().enumerate() {
        check_prefill(tiny, tiny.pair(number as u64), number);
    }
}

/// The kernel for every card, also where the card has one of its own.
#[test]
#[ignore = "needs a GPU"]
fn parity_of_portable_prefill() {
    let portable = CudaConfig { portable: true, ..config() };
    for (number, tiny) in SHAPES.iter().enumerate().filter(|(_, tiny)| [64, 128].contains(&tiny.head_dim)) {
        check_prefill(tiny, tiny.pair_as(20 + number as u64, &portable, LIMITS), number);
    }
}

/// Each matrix is multiplied in its own way: f16 as two bf16 halves, and in mixed checkpoints each as it is stored.
#[test]
#[ignore = "needs a GPU"]
fn parity_of_f16_and_of_mixed_weights() {
    let f16 = Tiny { stored: Stored::F16, ..PLAIN };
    let mixed = Tiny { stored: Stored::Mixed, ..PLAIN };
    let models = [
        f16,
        Tiny { kv: KvDtype::F32, hidden: 200, ..f16 },
        Tiny { heads: 4, kv_heads: 4, head_dim: 128, family: "Qwen3ForCausalLM", ..f16 },
        mixed,
        // Nine tensors a layer, twelve, eleven: the formats fall on other matrices in each.
        Tiny { family: "Qwen2ForCausalLM", ..mixed },
        Tiny { family: "Qwen3ForCausalLM", kv: KvDtype::F32, ..mixed },
    ];
    for (number, tiny) in models.iter().enumerate() {
        check_prefill(tiny, tiny.pair(300 + number as u64), 60 + number);
    }
}

fn check_prefill(tiny: &Tiny, (host, device): (Transformer, Transformer), number: usize) {
    let text = tokens(&mut rng(50 + number as u64), 1300);
    // Pieces for the kernels of many rows and of few, at odd sizes and across pages.
    let cuts = [611, 612, 614, 619, 627, 636, 700, 1299];
    let ((here, here_q), here_logits) = tapped(&host, &text, &cuts);
    let ((there, there_q), there_logits) = tapped(&device, &text, &cuts);
    let limit = tolerance(tiny);
    for layer in 0..LAYERS {
        let what = |part: &str| format!("{tiny:?}, layer {layer}: {part}");
        assert_close(&there[layer].0, &here[layer].0, limit, &what("keys"));
        assert_close(&there[layer].1, &here[layer].1, limit, &what("values"));
        assert_close(&there_q[layer], &here_q[layer], limit, &what("queries"));
    }
    assert_close(&there_logits, &here_logits, limit, &format!("{tiny:?}: logits"));
}

#[test]
#[ignore = "needs a GPU"]
fn parity_of_batched_decoding_and_its_graphs() {
    for (number, tiny) in SHAPES.iter().enumerate() {
        let (host, device) = tiny.pair(100 + number as u64);
        let mut rng = rng(number as u64);
        // Lengths around the borders of pages; more sequences than one graph size, and padding in most.
        let lengths = [1, 63, 64, 65, 128, 300, 5, 640, 127, 129, 2, 90, 33];
        let texts: Vec<Vec<u32>> = lengths.iter().map(|n| tokens(&mut rng, *n)).collect();
        for batch in [1, 2, 3, 7, 9, 13] {
            let read = |model: &Transformer| -> Vec<SequenceKv> {
                let one = |text: &Vec<u32>| {
                    let mut kv = model.new_kv();
                    model.forward(&mut [Piece::exact(&mut kv, text, Want::Nothing)]).unwrap();
                    kv
                };
                texts[..batch].iter().map(one).collect()
            };
            let (mut here, mut there) = (read(&host), read(&device));
            for step in 0..4 {
                let next: Vec<[u32; 1]> = (0..batch).map(|_| [rng.random_range(8..VOCAB as u32)]).collect();
                let forward = |model: &Transformer, kvs: &mut Vec<SequenceKv>| {
                    let mut pieces: Vec<Piece<'_>> =
                        kvs.iter_mut().zip(&next).map(|(kv, t)| Piece::exact(kv, t, Want::Last)).collect();
                    model.forward(&mut pieces).unwrap()
                };
                let expected = host.logits(&forward(&host, &mut here)).unwrap();
                let states = forward(&device, &mut there);
                let choice = |i: usize| match (i + step) % 3 {
                    0 => Choice::Greedy,
                    1 => draw::plain(0.3 + 0.4 * step as f32, [0.0, 0.37, 0.999_999, 0.7][i % 4]),
                    _ => Choice::Logits,
                };
                let choices: Vec<Choice> = (0..batch).map(choice).collect();
                let nexts = device.next(&states, &choices).unwrap();
                for (i, (next, expected)) in nexts.iter().zip(expected.chunks_exact(VOCAB)).enumerate() {
                    check_next(next, expected, &choices[i], tolerance(tiny), &format!("{tiny:?} {batch} {step} {i}"));
                }
            }
        }
    }
}

/// A chosen token must be the likeliest one, or as good as it, or the one that was drawn, with its log-probability.
fn check_next(next: &Next, expected: &[f32], choice: &Choice, limit: f64, what: &str) {
    let top = expected.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum = |temperature: f32, to: usize| -> f64 {
        expected[..to].iter().map(|x| (f64::from(x - top) / f64::from(temperature)).exp()).sum()
    };
    let check_logprob = |sampled: &Sampled| {
        let logprob = f64::from(expected[sampled.id as usize] - top) - sum(1.0, VOCAB).ln();
        assert!((f64::from(sampled.logprob) - logprob).abs() < 2e-2, "{what}: {} {logprob}", sampled.logprob);
    };
    match (next, choice) {
        (Next::Token(sampled), Choice::Greedy) => {
            let found = expected[sampled.id as usize];
            assert!(top - found < 1e-2, "{what}: chose {found} where {top} was there");
            check_logprob(sampled);
        }
        (Next::Token(sampled), Choice::Draw(draw)) => {
            let temperature = draw.params.temperature;
            let (goal, id) = (draw.at * sum(temperature, VOCAB), sampled.id as usize);
            let (before, upto) = (sum(temperature, id), sum(temperature, id + 1));
            // As far as logits differ: those of the GPU move the borders between tokens a little.
            let slack = 2e-2 / f64::from(temperature) * sum(temperature, VOCAB);
            assert!(before - slack <= goal && goal <= upto + slack, "{what}: {id} from {before} to {upto}, {goal}");
            check_logprob(sampled);
        }
        (Next::Logits(logits), Choice::Logits) => assert_close(logits, expected, limit, what),
        _ => panic!("{what}: {choice:?} was answered by something else"),
    }
}

#[test]
#[ignore = "needs a GPU"]
fn parity_of_a_mixed_batch() {
    for tiny in [PLAIN, SHAPES[2], SHAPES[6]] {
        let (host, device) = tiny.pair(7);
        let mut rng = rng(3);
        let texts: Vec<Vec<u32>> = [200, 1, 77, 1, 130, 1].iter().map(|n| tokens(&mut rng, *n)).collect();
        let before = tokens(&mut rng, 90);
        let run = |model: &Transformer| {
            let mut kvs: Vec<SequenceKv> = texts
                .iter()
                .map(|_| {
                    let mut kv = model.new_kv();
                    model.forward(&mut [Piece::exact(&mut kv, &before, Want::Nothing)]).unwrap();
                    kv
                })
                .collect();
            let wants = [Want::Nothing, Want::Last, Want::All, Want::Last, Want::Last, Want::Nothing];
            let mut pieces: Vec<Piece<'_>> =
                kvs.iter_mut().zip(&texts).zip(wants).map(|((kv, t), want)| Piece::exact(kv, t, want)).collect();
            let states = model.forward(&mut pieces).unwrap();
            model.logits(&states).unwrap()
        };
        assert_close(&run(&device), &run(&host), tolerance(&tiny), &format!("{tiny:?}"));
    }
}

#[test]
#[ignore = "needs a GPU"]
fn parity_of_window_and_retrieval() {
    for tiny in [PLAIN, SHAPES[2], SHAPES[6], SHAPES[8]] {
        let (host, device) = tiny.pair(11);
        // With all keys found, only sums differ. Else a key at the edge of the k best may be another, at some head and layer: that
        // is what its weight is worth.
        for (strategy, index, k, limit) in [
            (Strategy::Window, IndexKind::Flat, 40, 1e-2),
            (Strategy::Retrieval, IndexKind::Flat, 4000, 1e-2),
            (Strategy::Retrieval, IndexKind::Clusters, 40, 8e-2),
        ] {
            let attention = AttentionConfig { strategy, index, sinks: 5, window: 70, k, ..AttentionConfig::default() };
            let run = |model: &Transformer| {
                let mut rng = rng(4);
                let mut kv = model.new_kv();
                let mut out = logits(model, &mut kv, &tokens(&mut rng, 690), None);
                for n in [1, 1, 20, 1, 300, 1, 1] {
                    kv.settle_and_wait(&attention, model);
                    out.extend(logits(model, &mut kv, &tokens(&mut rng, n), Some(&attention)));
                }
                (out, kv.has_cold())
            };
            let ((there, cold), (here, _)) = (run(&device), run(&host));
            assert_eq!(cold, strategy == Strategy::Retrieval);
            assert_close(&there, &here, limit, &format!("{tiny:?} {strategy} {index}"));
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn parity_of_blending_and_of_forks() {
    for tiny in [PLAIN, SHAPES[2], SHAPES[4], SHAPES[6], SHAPES[8]] {
        let (host, device) = tiny.pair(12);
        let mut rng = rng(5);
        let texts: Vec<Vec<u32>> = (0..4).map(|_| tokens(&mut rng, 333)).collect();
        let question = tokens(&mut rng, 21);
        let chunks = |model: &Transformer| -> Vec<PromptChunk> {
            let one = |text: &Vec<u32>| {
                let kv = ChunkKv::compute(model, &[1], text, 256).unwrap();
                PromptChunk { tokens: text.as_slice().into(), prefix: [1].into(), source: Some(Arc::new(kv)) }
            };
            texts.iter().map(one).collect()
        };
        let (here_chunks, there_chunks) = (chunks(&host), chunks(&device));
        for mode in [BlendMode::FullRecompute, BlendMode::Reuse, BlendMode::CacheBlend] {
            let config = BlendConfig { mode, ratio: 0.2, ..BlendConfig::default() };
            let run = |model: &Transformer, chunks: &[PromptChunk]| {
                let mut chunks = chunks.to_vec();
                chunks[2].source = None;
                let blended = blend(model, &Context::unasked(&[1], &chunks), &config, &|| false).unwrap();
                let mut out = Vec::new();
                // Two answers over one context: pages are shared, and copied when written.
                for _ in 0..2 {
                    let mut kv = blended.kv.clone();
                    out.extend(logits(model, &mut kv, &question, None));
                    out.extend(logits(model, &mut kv, &[9], None));
                }
                (out, blended.stats.recomputed_tokens)
            };
            let (here, there) = (run(&host, &here_chunks), run(&device, &there_chunks));
            assert_eq!(here.1, there.1);
            // The choice of recomputed tokens may differ where deviations are almost equal.
            let limit = if mode == BlendMode::CacheBlend { 3e-2 } else { 2.0 * tolerance(&tiny) };
            assert_close(&there.0, &here.0, limit, &format!("{tiny:?} {mode}"));
            let half = there.0.len() / 2;
            assert_close(&there.0[..half], &there.0[half..], 1e-6, "the second answer over the same context");
        }
    }
}

/// As when nobody says how much KV there may be: pages take what is left.
#[test]
#[ignore = "needs a GPU"]
fn a_context_is_blended_beside_pages_of_all_memory() {
    let few = CudaConfig { memory_budget_bytes: 400 << 20, ..config() };
    let (_, model) = PLAIN.pair_as(30, &few, Limits { kv_bytes: 0, ..LIMITS });
    let mut rng = rng(31);
    let chunks: Vec<PromptChunk> = (0..15)
        .map(|_| {
            let text = tokens(&mut rng, 500);
            let kv = ChunkKv::compute(&model, &[1], &text, 256).unwrap();
            PromptChunk { tokens: text.as_slice().into(), prefix: [1].into(), source: Some(Arc::new(kv)) }
        })
        .collect();
    let question = tokens(&mut rng, 100);
    for mode in [BlendMode::FullRecompute, BlendMode::Reuse, BlendMode::CacheBlend, BlendMode::Answer] {
        for ratio in [0.5, 1.0] {
            let config = BlendConfig { mode, ratio, ..BlendConfig::default() };
            let context = Context { prefix: &[1], chunks: &chunks, suffix: &question, tiers: None };
            assert_eq!(blend(&model, &context, &config, &|| false).unwrap().kv.len(), 7501);
        }
    }
}

/// Activations of 8 bits, so that errors are of 2^-9 in every one.
#[test]
#[ignore = "needs a GPU"]
fn parity_of_fast_prefill() {
    for tiny in [PLAIN, SHAPES[2], SHAPES[4]] {
        let (host, device) = tiny.pair_as(34, &CudaConfig { fast_prefill: true, ..config() }, LIMITS);
        let text = tokens(&mut rng(35), 600);
        let run = |model: &Transformer| {
            let mut kv = model.new_kv();
            [logits(model, &mut kv, &text[..530], None), logits(model, &mut kv, &text[530..], None)].concat()
        };
        assert_close(&run(&device), &run(&host), 3e-2, &format!("{tiny:?}"));
    }
}

/// Whoever lets prompts be read fast still decodes exactly.
#[test]
#[ignore = "needs a GPU"]
fn steps_that_only_decode_do_not_depend_on_fast_prefill() {
    let logits = |fast_prefill: bool| {
        let (_, model) = PLAIN.pair_as(32, &CudaConfig { fast_prefill, ..config() }, LIMITS);
        let mut rng = rng(33);
        let mut kvs: Vec<SequenceKv> = (0..12).map(|_| model.new_kv()).collect();
        let mut all = Vec::new();
        for _ in 0..4 {
            let next: Vec<Vec<u32>> = (0..12).map(|_| tokens(&mut rng, 1)).collect();
            let mut pieces: Vec<Piece<'_>> =
                kvs.iter_mut().zip(&next).map(|(kv, t)| Piece::exact(kv, t, Want::Last)).collect();
            let states = model.forward(&mut pieces).unwrap();
            for next in model.next(&states, &vec![Choice::Logits; 12]).unwrap() {
                let Next::Logits(row) = next else { panic!("a token where logits were asked for") };
                all.extend(row);
            }
        }
        all
    };
    assert_eq!(logits(true), logits(false));
}

#[test]
#[ignore = "needs a GPU"]
fn memory_that_runs_out_is_a_typed_error_and_nothing_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    PLAIN.write(dir.path(), &mut rng(1));
    let spec = ModelSpec::from_dir(dir.path()).unwrap();
    let weights = Weights::open(dir.path()).unwrap();
    let limits = Limits { kv_bytes: 10 * 64 * 3 * 2 * 128 * 2, ..LIMITS };
    let model = Transformer::load_on_device(spec, &weights, 2, None, &config(), limits).unwrap();
    let text = tokens(&mut rng(2), 500);
    let mut kv = model.new_kv();
    let first = logits(&model, &mut kv, &text[..400], None);
    let mut other = model.new_kv();
    let refused = model.forward(&mut [Piece::exact(&mut other, &text, Want::Last)]);
    assert!(matches!(refused, Err(crate::EngineError::OutOfMemory { needed, budget, .. }) if needed > budget));
    assert_eq!((other.len(), kv.len()), (0, 400));
    drop(other);
    logits(&model, &mut kv, &text[400..], None);
    drop(kv);
    let again = logits(&model, &mut model.new_kv(), &text[..400], None);
    assert_eq!(first, again);
    assert!(logits(&model, &mut model.new_kv(), &text, None).iter().all(|x| x.is_finite()));
}

/// What is computed is nothing: the prefix is there, and the chunks are used as they are.
#[test]
#[ignore = "needs a GPU"]
fn parity_of_a_blend_in_which_nothing_is_computed() {
    let (host, device) = PLAIN.pair(14);
    let mut rng = rng(15);
    let (prefix, text, question) = (tokens(&mut rng, 64), tokens(&mut rng, 150), tokens(&mut rng, 9));
    for mode in [BlendMode::Reuse, BlendMode::CacheBlend] {
        let run = |model: &Transformer| {
            let kv = ChunkKv::compute(model, &[1], &text, 256).unwrap();
            let chunk = PromptChunk { tokens: text.as_slice().into(), prefix: [1].into(), source: Some(Arc::new(kv)) };
            let mut start = model.new_kv();
            model.forward(&mut [Piece::exact(&mut start, &prefix, Want::Nothing)]).unwrap();
            let config = BlendConfig { mode, ratio: 0.0, ..BlendConfig::default() };
            let mut out = Vec::new();
            for _ in 0..2 {
                let chunks = [chunk.clone(), chunk.clone()];
                let blended =
                    blend_behind(model, &start, &Context::unasked(&prefix, &chunks), &config, &|| false).unwrap();
                assert_eq!(blended.stats.recomputed_tokens, 0);
                out.extend(logits(model, &mut blended.kv.clone(), &question, None));
            }
            out
        };
        assert_close(&run(&device), &run(&host), tolerance(&PLAIN), &format!("{mode}"));
    }
}

/// An index of a context that is longer than what is read from the GPU between two steps.
#[test]
#[ignore = "needs a GPU"]
fn parity_of_a_long_context_behind_an_index() {
    let (host, device) = PLAIN.pair(16);
    let attention =
        AttentionConfig { strategy: Strategy::Retrieval, sinks: 5, window: 70, k: 6000, ..AttentionConfig::default() };
    let run = |model: &Transformer| {
        let mut rng = rng(17);
        let mut kv = model.new_kv();
        for _ in 0..8 {
            logits(model, &mut kv, &tokens(&mut rng, 640), None);
        }
        kv.settle_and_wait(&attention, model);
        assert!(kv.has_cold());
        logits(model, &mut kv, &tokens(&mut rng, 3), Some(&attention))
    };
    assert_close(&run(&device), &run(&host), 1e-2, "all keys behind an index");
}

#[test]
#[ignore = "needs a GPU"]
fn parity_of_products_in_double_precision() {
    let (_, model) = PLAIN.pair(1);
    let model = model.device().unwrap();
    model.device.bind().unwrap();
    let gemm = Gemm::new(&model.device).unwrap();
    let mut rng = rng(9);
    for (outputs, inputs) in [(16, 8), (30, 64), (257, 200), (96, 1100), (520, 4096), (64, 14_336)] {
        let w: Vec<bf16> = (0..outputs * inputs).map(|_| bf16::from_f32(rng.random_range(-1.0..1.0))).collect();
        let norm: Vec<f32> = (0..inputs).map(|_| rng.random_range(0.5..1.5)).collect();
        let memory = model.device.upload(&w, "weights").unwrap();
        let matrix = Matrix { memory, outputs, inputs, format: Format::Bf16 };
        let norm_memory = model.device.upload(&norm, "norm").unwrap();
        for n in [1, 2, 3, 5, 8, 9, 40] {
            let x: Vec<f32> = (0..n * inputs).map(|_| rng.random_range(-1.0..1.0)).collect();
            let at = model.device.upload(&x, "x").unwrap();
            let y = model.device.upload(&vec![1.0f32; 2 * n * outputs], "y").unwrap();
            let what = format!("{outputs} x {inputs}, {n} rows");
            if n <= 8 {
                let bias = model.device.upload(&vec![0.25f32; outputs], "bias").unwrap();
                model.ops.vector_add(&at, &matrix, Some(&bias), &y, n).unwrap();
                assert_close(&read(&y, n * outputs), &expected(&x, &w, None, inputs, 1.25), 1e-5, &what);
                model.ops.vector_product(at.address(), Some(&norm_memory), &matrix, None, &y, n).unwrap();
                assert_close(&read(&y, n * outputs), &expected(&x, &w, Some(&norm), inputs, 0.0), 1e-5, &what);
                check_swiglu(model, &at, &norm_memory, &matrix, &x, &w, &norm, n);
            }
            let split = model.device.allocate(4 * n * inputs, "split").unwrap();
            model.ops.split(at.address(), &split, 2, n, inputs).unwrap();
            gemm.product(
                ProductShape { rows: 2 * n, outputs, inputs, rounded: false },
                split.address(),
                matrix.memory.address(),
                y.address(),
                false,
            )
            .unwrap();
            let both = read(&y, 2 * n * outputs);
            let sums: Vec<f32> = (0..n * outputs).map(|i| both[i] + both[n * outputs + i]).collect();
            assert_close(&sums, &expected(&x, &w, None, inputs, 0.0), 2e-5, &what);
        }
    }
}

#[allow(clippy::too_many_arguments)]
fn check_swiglu(
    model: &CudaModel,
    at: &Memory,
    norm_memory: &Memory,
    matrix: &Matrix,
    x: &[f32],
    w: &[bf16],
    norm: &[f32],
    n: usize,
) {
    let (width, inputs) = (matrix.outputs / 2, matrix.inputs);
    if !matrix.outputs.is_multiple_of(2) {
        return;
    }
    let y = model.device.upload(&vec![f32::NAN; n * width], "y").unwrap();
    model.ops.vector_swiglu(at, norm_memory, matrix, None, &y, n).unwrap();
    let both = expected(x, w, Some(norm), inputs, 0.0);
    let silu = |x: f32| x / (1.0 + (-x).exp());
    let row = |i: usize| &both[i * 2 * width..(i + 1) * 2 * width];
    let wanted: Vec<f32> =
        (0..n * width).map(|i| silu(row(i / width)[i % width]) * row(i / width)[width + i % width]).collect();
    assert_close(&read(&y, n * width), &wanted, 1e-5, &format!("swiglu {width} x {inputs}, {n} rows"));
}

fn read(memory: &Memory, numbers: usize) -> Vec<f32> {
    let mut out = vec![0.0; numbers];
    memory.read(0, &mut out).unwrap();
    out
}

/// `x W^T + plus` in f64, of the norm of `x` where a weight is given.
fn expected(x: &[f32], w: &[bf16], norm: Option<&[f32]>, inputs: usize, plus: f64) -> Vec<f32> {
    let mut out = Vec::new();
    for row in x.chunks_exact(inputs) {
        let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / inputs as f64;
        let scale = 1.0 / (mean + 1e-5).sqrt();
        let input: Vec<f64> = match norm {
            None => row.iter().map(|x| f64::from(*x)).collect(),
            Some(norm) => row.iter().zip(norm).map(|(x, n)| f64::from(*x) * scale * f64::from(*n)).collect(),
        };
        for weights in w.chunks_exact(inputs) {
            let dot: f64 = weights.iter().zip(&input).map(|(w, x)| f64::from(w.to_f32()) * x).sum();
            out.push((dot + plus) as f32);
        }
    }
    out
}

#[test]
#[ignore = "needs a GPU"]
fn a_budget_that_is_too_small_names_itself() {
    let device = Device::open(0, 1 << 20).unwrap();
    let refused = device.allocate(2 << 20, "a test").err().unwrap();
    assert!(refused.to_string().contains("a test on the GPU"), "{refused}");
    assert!(matches!(refused, crate::EngineError::OutOfMemory { budget: 1_048_576, .. }));
}
