//! Blending by the question: what it attends (attention_paid.cu, attention_paid_mma.cu), the correction (kv_shift.cu), and whole blends.

use std::sync::Arc;

use super::models::{PLAIN, SHAPES, Tiny, rng};
use super::{Piece, SequenceKv, Transformer, Want, assert_close, logits, tokens, tolerance};
use crate::attention::paid::add_paid;
use crate::blend::{Context, blend, blend_reading};
use crate::chunk::{ChunkKv, PromptChunk};
use crate::config::{BlendConfig, BlendMode, Correction};
use crate::model::transformer::ChunkSums;

/// Layer 0 of the rows behind a context, on both sides: what some of them pay to it, and what the last of these does.
#[test]
#[ignore = "needs a GPU"]
fn parity_of_what_a_question_pays() {
    for (number, tiny) in SHAPES.iter().enumerate() {
        let (host, device) = tiny.pair(400 + number as u64);
        let mut rng = rng(number as u64);
        // Contexts that end within a page and at its end; more rows than are looked at.
        for (context, asked, part) in [(1, 1, 0..1), (64, 3, 0..3), (300, 30, 5..29), (640, 90, 26..90), (999, 2, 1..2)]
        {
            let (text, question) = (tokens(&mut rng, context), tokens(&mut rng, asked));
            let positions: Vec<usize> = (context..context + asked).collect();
            let read = |model: &Transformer| {
                let mut kv = model.new_kv();
                for part in text.chunks(512) {
                    model.forward(&mut [Piece::exact(&mut kv, part, Want::Nothing)]).unwrap();
                }
                kv.extend_to(context + asked).unwrap();
                kv
            };
            let (mut here, there) = (read(&host), read(&device));
            let rows = host.rows(positions.clone());
            let qkv = host.qkv(0, &host.embed(&question).unwrap(), &rows);
            host.write_kv(here.recent_mut(0), &rows, &qkv.keys, &qkv.values);
            let lse = here.attend_exact(&host.cpu, 0, &host.queries(&qkv.q, &positions)).lse;
            let (heads, width) = (tiny.heads, tiny.heads * tiny.head_dim);
            let paid = |rows: std::ops::Range<usize>| {
                let queries = host.queries(&qkv.q[rows.start * width..rows.end * width], &positions[rows.clone()]);
                let mut paid = vec![0.0; context];
                add_paid(&host.cpu, here.recent(0), &queries, &lse[rows.start * heads..rows.end * heads], &mut paid);
                paid
            };
            let model = device.device().unwrap();
            let x = model.stream(&question).unwrap();
            let batch = model.stream_enter(0, &x, 0, &positions, &there, false).unwrap();
            model.stream_leave(0, &x, 0, &batch, true).unwrap();
            let sums = model.paid_sums(context).unwrap();
            // Twice, of which the last token counts once.
            model.add_paid(0, &batch, part.clone(), true, context, &sums).unwrap();
            model.add_paid(0, &batch, part.clone(), false, context, &sums).unwrap();
            let [last, all] = model.read_paid(&sums, context).unwrap();
            let what = format!("{tiny:?}, {context} tokens, rows {part:?} of {asked}");
            let twice: Vec<f32> = paid(part.clone()).iter().map(|x| 2.0 * x).collect();
            assert_close(&all, &twice, 1e-2, &what);
            assert_close(&last, &paid(part.end - 1..part.end), 1e-2, &what);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn parity_of_what_chunks_keep_to_themselves() {
    for (number, tiny) in SHAPES.iter().enumerate() {
        let (host, device) = tiny.pair(480 + number as u64);
        let mut rng = rng(number as u64);
        // Chunks that begin and end within pages and steps; a step of one token.
        for (prefix, lengths) in [(1, vec![70, 333, 1, 129, 40]), (0, vec![64, 64, 200]), (130, vec![300, 22])] {
            let text = tokens(&mut rng, prefix + lengths.iter().sum::<usize>());
            let read = |model: &Transformer| {
                let mut sums = ChunkSums::new(model, prefix, &lengths).unwrap();
                let mut kv = model.new_kv();
                let step = 300.min(text.len() - 1);
                for part in [&text[..step], &text[step..text.len() - 1], &text[text.len() - 1..]] {
                    for part in part.chunks(300) {
                        let piece = Piece::exact(&mut kv, part, Want::Nothing);
                        model.forward(&mut [Piece { sums: Some(&mut sums), ..piece }]).unwrap();
                    }
                }
                sums.finish(model).unwrap().map(|shares| shares.concat())
            };
            let ([own, before], [own_there, before_there]) = (read(&host), read(&device));
            let what = format!("{tiny:?}, {prefix} and {lengths:?}");
            assert_close(&own_there, &own, 1e-2, &what);
            assert_close(&before_there, &before, 1e-2, &what);
        }
    }
}

/// Chunks of odd sizes, one of them without cached state.
fn chunks(model: &Transformer, texts: &[Vec<u32>]) -> Vec<PromptChunk> {
    let one = |(i, text): (usize, &Vec<u32>)| {
        let kv = ChunkKv::compute(model, &[1], text, 256).unwrap();
        let source = (i != 2).then(|| Arc::new(kv) as _);
        PromptChunk { tokens: text.as_slice().into(), prefix: [1].into(), source }
    };
    texts.iter().enumerate().map(one).collect()
}

struct Read {
    logits: Vec<f32>,
    recomputed: usize,
    charged: f32,
    deviation: Option<f32>,
}

fn read(model: &Transformer, chunks: &[PromptChunk], question: &[u32], config: &BlendConfig) -> Read {
    let context = Context { prefix: &[1], chunks, suffix: question, tiers: None };
    let blended = blend(model, &context, config, &|| false).unwrap();
    let mut kv: SequenceKv = blended.kv;
    let stats = blended.stats;
    assert_eq!(stats.rule, Some(config.mode));
    Read {
        logits: logits(model, &mut kv, question, None),
        recomputed: stats.recomputed_tokens,
        charged: stats.charged_share.unwrap(),
        deviation: stats.blend_deviation,
    }
}

/// Where both sides recompute the same tokens: the correction alone is compared.
#[test]
#[ignore = "needs a GPU"]
fn parity_of_corrections() {
    for (number, tiny) in SHAPES.iter().enumerate() {
        let (host, device) = tiny.pair(420 + number as u64);
        let mut rng = rng(number as u64);
        let texts: Vec<Vec<u32>> = [70, 333, 40, 129, 33, 1, 200].iter().map(|n| tokens(&mut rng, *n)).collect();
        let question = tokens(&mut rng, 21);
        let (here, there) = (chunks(&host, &texts), chunks(&device, &texts));
        let of = |correction| {
            let config = BlendConfig { mode: BlendMode::Epic, correction: Some(correction), ..BlendConfig::default() };
            (read(&host, &here, &question, &config), read(&device, &there, &question, &config))
        };
        let (plain, _) = of(Correction::None);
        for correction in [Correction::Prompt, Correction::Chunk] {
            let (here, there) = of(correction);
            let what = format!("{tiny:?} {correction}");
            assert_close(&there.logits, &here.logits, 2.0 * tolerance(tiny), &what);
            assert_ne!(here.logits, plain.logits, "{what} changes nothing");
            assert_close(&[there.deviation.unwrap()], &[here.deviation.unwrap()], 2e-2, &what);
            assert_eq!((there.recomputed, there.charged), (here.recomputed, here.charged), "{what}");
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn parity_of_blends_by_the_question() {
    for (number, tiny) in [PLAIN, SHAPES[2], SHAPES[5], SHAPES[6], SHAPES[7], SHAPES[8]].into_iter().enumerate() {
        let (host, device) = tiny.pair(440 + number as u64);
        let mut rng = rng(number as u64);
        let texts: Vec<Vec<u32>> = [90, 333, 50, 333, 290].iter().map(|n| tokens(&mut rng, *n)).collect();
        // More than is looked at, and more rows than a block of the workspace takes, with those that are recomputed.
        let question = tokens(&mut rng, 80);
        let (here, there) = (chunks(&host, &texts), chunks(&device, &texts));
        for mode in [BlendMode::Answer, BlendMode::Question] {
            for (ratio, mass) in [(0.2, None), (0.9, None), (0.0, Some(0.5))] {
                let config = BlendConfig { mode, ratio, mass, ..BlendConfig::default() };
                let (here, there) = (read(&host, &here, &question, &config), read(&device, &there, &question, &config));
                let what = format!("{tiny:?} {mode} {ratio} {mass:?}");
                // Scores that are almost equal may come in another order.
                assert!(here.recomputed.abs_diff(there.recomputed) <= 2, "{what}");
                assert_close(&there.logits, &here.logits, 3e-2, &what);
            }
        }
    }
}

/// The question as the last rows of the last pass, which is cut into pieces between which others decode: their rows lie in the same
/// workspace.
#[test]
#[ignore = "needs a GPU"]
fn parity_of_questions_that_are_read_in_the_last_pass_beside_others() {
    for (number, tiny) in [PLAIN, SHAPES[2], SHAPES[5], SHAPES[6]].into_iter().enumerate() {
        let (host, device) = tiny.pair(480 + number as u64);
        let mut rng = rng(number as u64);
        let texts: Vec<Vec<u32>> = [90, 333, 50, 333, 290].iter().map(|n| tokens(&mut rng, *n)).collect();
        let (question, other) = (tokens(&mut rng, 80), tokens(&mut rng, 300));
        let (here, there) = (chunks(&host, &texts), chunks(&device, &texts));
        let rules = [BlendMode::Answer, BlendMode::CacheBlend, BlendMode::Epic, BlendMode::FullRecompute];
        for mode in rules {
            let config = BlendConfig { mode, ratio: 0.3, ..BlendConfig::default() };
            let read = |model: &Transformer, chunks: &[PromptChunk]| {
                let context = Context { prefix: &[1], chunks, suffix: &question, tiers: None };
                let mut beside = model.new_kv();
                logits(model, &mut beside, &other, None);
                let mut next = 3;
                let between = || {
                    next = (next * 7 + 1) % 90;
                    logits(model, &mut beside, &[next], None);
                    2
                };
                let mut read = blend_reading(model, &context, &config, between).unwrap();
                let state = read.state.take().expect("the question was read");
                let first = model.logits(&state).unwrap();
                // What is read next sees the question's keys and values.
                [first, logits(model, &mut read.kv, &[9], None)]
            };
            let (here, there) = (read(&host, &here), read(&device, &there));
            for (here, there) in here.iter().zip(&there) {
                assert_close(there, here, 3e-2, &format!("{tiny:?} {mode}"));
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn every_rule_with_ratio_one_equals_full_prefill_on_a_gpu() {
    for tiny in [PLAIN, SHAPES[2], SHAPES[5], SHAPES[6], SHAPES[8]] {
        check_ratio_one(&tiny);
    }
}

fn check_ratio_one(tiny: &Tiny) {
    let (_, model) = tiny.pair(460);
    let mut rng = rng(461);
    let texts: Vec<Vec<u32>> = [31, 333, 1, 64, 500, 127].iter().map(|n| tokens(&mut rng, *n)).collect();
    let question = tokens(&mut rng, 17);
    let chunks = chunks(&model, &texts);
    let config = |mode| BlendConfig { mode, ratio: 1.0, ..BlendConfig::default() };
    let full = |chunks: &[PromptChunk]| {
        let context = Context { prefix: &[1], chunks, suffix: &question, tiers: None };
        let mut kv = blend(&model, &context, &config(BlendMode::FullRecompute), &|| false).unwrap().kv;
        logits(&model, &mut kv, &question, None)
    };
    for shift in 0..3 {
        let mut chunks = chunks.clone();
        chunks.rotate_left(shift);
        let want = full(&chunks);
        for mode in [BlendMode::Answer, BlendMode::Question, BlendMode::CacheBlend, BlendMode::Random] {
            let found = read(&model, &chunks, &question, &config(mode));
            assert_close(&found.logits, &want, 2.0 * tolerance(tiny), &format!("{tiny:?} {mode} {shift}"));
        }
    }
}
