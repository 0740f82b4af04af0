//! What each rule chooses, what it leaves in the KV and what the question then reads, against the emulator.

#![allow(clippy::unwrap_used)]

use std::sync::{Arc, LazyLock};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::emulator::{Cache, Emulator, Kv, LAYERS, Seen, VOCAB, rotated};
use super::{Context, Whole, blend, blend_reading};
use crate::chunk::{ChunkKv, ChunkSource, PromptChunk};
use crate::config::{BlendConfig, BlendMode, Correction, GateConfig, GateReason};
use crate::error::EngineError;
use crate::kv::KvDtype;
use crate::kv::sequence::SequenceKv;
use crate::model::transformer::{Piece, States, Transformer, Want};

const BOS: u32 = 1;

static MODEL: LazyLock<(Emulator, Transformer)> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let emulator = Emulator::write(dir.path(), &mut ChaCha8Rng::seed_from_u64(7));
    (emulator, Transformer::load_dir(dir.path(), 2, Some(KvDtype::F32)).unwrap())
});

/// A prompt of chunks that were computed alone behind the bos, the first of which is therefore exact.
struct Case {
    chunks: Vec<PromptChunk>,
    question: Vec<u32>,
    /// All of it.
    tokens: Vec<u32>,
    cached: Kv,
    /// By token, the chunk where its state is composed.
    composed: Vec<Option<usize>>,
}

fn tokens(rng: &mut ChaCha8Rng, n: usize) -> Vec<u32> {
    (0..n).map(|_| rng.random_range(3..VOCAB as u32)).collect()
}

impl Case {
    /// Without the cached state of the chunks `computed`.
    fn new(rng: &mut ChaCha8Rng, sizes: &[usize], question: usize, computed: &[usize]) -> Case {
        let (emulator, model) = &*MODEL;
        let mut case = Case {
            chunks: Vec::new(),
            question: tokens(rng, question),
            tokens: vec![BOS],
            cached: vec![Default::default(); LAYERS],
            composed: vec![None],
        };
        let bos = emulator.pass(&[BOS], None, 0, false).kv;
        let extend = |to: &mut Kv, from: &Kv, skip: usize| {
            for (to, from) in to.iter_mut().zip(from) {
                to.0.extend_from_slice(&from.0[skip..]);
                to.1.extend_from_slice(&from.1[skip..]);
            }
        };
        extend(&mut case.cached, &bos, 0);
        for (i, &size) in sizes.iter().enumerate() {
            let text = tokens(rng, size);
            let kv = ChunkKv::compute(model, &[BOS], &text, 512).unwrap();
            let source = (!computed.contains(&i)).then(|| Arc::new(kv) as Arc<dyn ChunkSource>);
            let exact = case.tokens.len() == 1;
            case.composed.resize(case.composed.len() + size, (source.is_some() && !exact).then_some(i));
            let alone = emulator.pass(&[&[BOS], &text[..]].concat(), None, 0, false).kv;
            extend(&mut case.cached, &alone, 1);
            case.tokens.extend_from_slice(&text);
            case.chunks.push(PromptChunk { tokens: text.into(), prefix: [BOS].into(), source });
        }
        case.tokens.extend_from_slice(&case.question);
        case
    }

    fn context(&self) -> Context<'_> {
        Context { prefix: &[BOS], chunks: &self.chunks, suffix: &self.question, tiers: None }
    }

    fn blend(&self, config: &BlendConfig) -> Whole {
        blend(&MODEL.1, &self.context(), config, &|| false).unwrap()
    }

    /// Positions of tokens whose state is composed.
    fn candidates(&self) -> Vec<usize> {
        (0..self.composed.len()).filter(|t| self.composed[*t].is_some()).collect()
    }

    /// A pass in which only `chosen` of the composed tokens are computed.
    fn emulate(&self, chosen: &[usize], correction: Correction, leaky: bool) -> Seen {
        let mut stale: Vec<bool> = self.composed.iter().map(Option::is_some).collect();
        chosen.iter().for_each(|t| stale[*t] = false);
        stale.resize(self.tokens.len(), false);
        let mut chunk = self.composed.clone();
        chunk.resize(self.tokens.len(), None);
        let cache = Cache { kv: &self.cached, stale, chunk, correction };
        MODEL.0.pass(&self.tokens, Some(&cache), self.question.len().min(64), leaky)
    }

    /// The best of the composed tokens by a score.
    fn best(&self, ratio: f32, score: impl Fn(usize) -> f64) -> Vec<usize> {
        let mut order = self.candidates();
        let count = (order.len() as f64 * f64::from(ratio)).round() as usize;
        order.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
        order.truncate(count);
        order.sort_unstable();
        order
    }

    /// What `answer` or `question` chooses.
    fn asked(&self, mode: BlendMode, ratio: f32) -> Vec<usize> {
        let seen = self.emulate(&[], Correction::None, false);
        let sum = |paid: &[f64]| self.candidates().iter().map(|t| paid[*t]).sum::<f64>();
        let (last, question) = (sum(&seen.last), sum(&seen.question));
        self.best(ratio, |t| match mode {
            BlendMode::Answer => seen.last[t] / last + 0.5 * seen.question[t] / question,
            _ => seen.question[t],
        })
    }

    /// What the published CacheBlend chooses: the values' squared distance on layer 1.
    fn deviating(&self, ratio: f32) -> Vec<usize> {
        let fresh = MODEL.0.pass(&self.tokens, None, 0, false).kv;
        self.best(ratio, |t| {
            let pairs = fresh[1].1[t].iter().zip(&self.cached[1].1[t]);
            pairs.map(|(a, b)| (a - b).powi(2)).sum()
        })
    }

    fn logits(&self, mut kv: SequenceKv) -> Vec<f32> {
        let model = &MODEL.1;
        let states = model.forward(&mut [Piece::exact(&mut kv, &self.question, Want::Last)]).unwrap();
        model.logits(&states).unwrap()
    }
}

/// The relative distance of two vectors.
fn distance(found: &[f32], wanted: &[f64]) -> f64 {
    assert_eq!(found.len(), wanted.len());
    let (d, s) =
        found.iter().zip(wanted).fold((0.0, 0.0), |(d, s), (f, w)| (d + (f64::from(*f) - w).powi(2), s + w * w));
    (d / s).sqrt()
}

/// Rows of the KV, from layer `from` on, that are farther from the emulator's than rounding explains.
fn wrong_rows(blended: &Whole, wanted: &Seen, rows: usize, from: usize) -> Vec<(usize, usize)> {
    let shape = MODEL.1.shape;
    let mut wrong = Vec::new();
    for layer in from..LAYERS {
        for row in 0..rows {
            let heads = (0..shape.kv_heads).map(|head| blended.kv.rows(layer, head, row..row + 1));
            let (keys, values): (Vec<_>, Vec<_>) = heads.unzip();
            let (keys, values) = (keys.concat(), values.concat());
            let near = distance(&keys, &rotated(&wanted.kv[layer].0[row], row))
                .max(distance(&values, &wanted.kv[layer].1[row]));
            if near > 1e-4 {
                wrong.push((layer, row));
            }
        }
    }
    wrong
}

/// Prompts in which chunks are small and large, single tokens, computed before and behind cached ones.
fn cases(rng: &mut ChaCha8Rng) -> Vec<Case> {
    let shapes: [(&[usize], usize, &[usize]); 7] = [
        (&[20, 31, 1, 25], 9, &[]),
        (&[40, 40], 1, &[]),
        (&[7, 60, 12, 30], 5, &[2]),
        (&[30, 22, 25], 70, &[0]),
        (&[90, 70, 40], 12, &[]),
        (&[5, 18, 3, 3, 18, 9, 22], 20, &[1, 6]),
        // More than a block.
        (&[5, 70, 60, 30], 70, &[]),
    ];
    shapes.into_iter().map(|(sizes, question, computed)| Case::new(rng, sizes, question, computed)).collect()
}

/// Rules with the share that they are told.
fn ungated() -> BlendConfig {
    BlendConfig { gate: GateConfig { on: false, ..GateConfig::default() }, ..BlendConfig::default() }
}

#[test]
fn what_a_rule_leaves_behind_is_what_the_emulator_computes() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for (number, case) in cases(&mut rng).iter().enumerate() {
        let modes = [BlendMode::CacheBlend, BlendMode::Heads, BlendMode::Epic, BlendMode::Reuse];
        for mode in [BlendMode::Answer, BlendMode::Question].into_iter().chain(modes) {
            let ratio = if number == 6 { 0.85 } else { [0.1, 0.25, 0.6][number % 3] };
            let before = |t: &usize| case.composed[..*t].iter().filter(|c| **c == case.composed[*t]).count();
            let chosen = match mode {
                BlendMode::CacheBlend => case.deviating(ratio),
                BlendMode::Heads => case.best(ratio, |t| -(before(&t) as f64)),
                BlendMode::Epic => case.candidates().into_iter().filter(|t| before(t) < 32).collect(),
                BlendMode::Reuse => Vec::new(),
                _ => case.asked(mode, ratio),
            };
            for correction in [Correction::None, Correction::Prompt, Correction::Chunk] {
                let config = BlendConfig { mode, ratio, correction: Some(correction), ..ungated() };
                let about = format!("case {number}, {mode}, {correction}, {} chosen", chosen.len());
                let wanted = case.emulate(&chosen, correction, false);
                let blended = case.blend(&config);
                let context = case.composed.len();
                assert_eq!(blended.kv.len(), context, "{about}");
                let fresh = case.composed.iter().filter(|c| c.is_none()).count()
                    - if case.chunks[0].source.is_some() { case.chunks[0].tokens.len() } else { 0 };
                assert_eq!(blended.stats.recomputed_tokens, fresh + chosen.len(), "{about}");
                assert_eq!((blended.stats.rule, &blended.stats.chosen), (Some(mode), &chosen), "{about}");
                // CacheBlend's layers before the check are those of a full pass, of which it reads nothing.
                let from = usize::from(mode == BlendMode::CacheBlend);
                assert_eq!(wrong_rows(&blended, &wanted, context, from), [], "{about}");
                let apart = distance(&case.logits(blended.kv), &wanted.logits);
                assert!(apart < 1e-4, "{about}: logits are {apart:e} apart");
                // With the question read in the last pass.
                let read = blend_reading(&MODEL.1, &case.context(), &config, || 1).unwrap();
                assert_eq!(read.stats, blended.stats, "{about}");
                let Some(state) = &read.state else {
                    // Nothing was worth a second pass.
                    assert!(mode.asks() && chosen.is_empty() && read.kv.len() == context, "{about}");
                    continue;
                };
                assert_eq!(read.kv.len(), case.tokens.len(), "{about}");
                assert_eq!(wrong_rows(&read, &wanted, case.tokens.len(), from), [], "{about}, read");
                let apart = distance(&MODEL.1.logits(state).unwrap(), &wanted.logits);
                assert!(apart < 1e-4, "{about}: logits of what was read are {apart:e} apart");
            }
        }
    }
}

/// The public code of CacheBlend and of LMCache aligns the causal mask of the recomputed rows at the end of the prompt, so that
/// a row in its middle sees tokens behind it.
#[test]
fn the_mask_that_lets_recomputed_tokens_see_later_ones_is_told_apart() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let case = Case::new(&mut rng, &[40, 60, 50], 8, &[]);
    let config = BlendConfig { mode: BlendMode::CacheBlend, ratio: 0.2, ..BlendConfig::default() };
    let (found, chosen) = (case.logits(case.blend(&config).kv), case.deviating(0.2));
    let leaky = distance(&found, &case.emulate(&chosen, Correction::None, true).logits);
    let exact = distance(&found, &case.emulate(&chosen, Correction::None, false).logits);
    assert!(exact < 1e-4 && leaky > 1e-2, "from the exact mask {exact:e}, from the leaky one {leaky:e}");
}

#[test]
fn rules_and_corrections_come_closer_to_a_full_pass_than_reuse() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut sums = [0.0; 3];
    for _ in 0..4 {
        let case = Case::new(&mut rng, &[60, 60, 60], 10, &[]);
        let full = MODEL.0.pass(&case.tokens, None, 0, false).logits;
        let settings = [(BlendMode::Reuse, 0.0), (BlendMode::Answer, 0.3), (BlendMode::Answer, 1.0)];
        for (sum, (mode, ratio)) in sums.iter_mut().zip(settings) {
            let config = BlendConfig { mode, ratio, ..ungated() };
            *sum += distance(&case.logits(case.blend(&config).kv), &full) / 4.0;
        }
    }
    assert!(sums[2] < 1e-4 && sums[1] < 0.9 * sums[0] && sums[0] > 1e-2, "{sums:?}");
}

#[test]
fn what_is_exact_is_not_charged_and_takes_no_part_in_the_budget() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let share = |chunks: &[usize], computed: &[usize], mode| {
        let case = Case::new(&mut ChaCha8Rng::seed_from_u64(8), chunks, 10, computed);
        let config = BlendConfig { mode, ratio: 0.25, ..ungated() };
        case.blend(&config).stats.charged_share
    };
    let near =
        |found: Option<f32>, wanted: f32| assert!((found.unwrap() - wanted).abs() < 1e-6, "{found:?}, not {wanted}");
    // A first chunk of any size, and the question's 10 tokens a second time.
    for exact in [1, 40, 150] {
        near(share(&[exact, 40], &[], BlendMode::Answer), (10.0 + 10.0) / 40.0);
        near(share(&[exact, 40], &[], BlendMode::CacheBlend), (2.0 * 40.0 + 2.0 * 10.0) / (4.0 * 40.0));
        near(share(&[exact, 40], &[], BlendMode::Random), 0.25);
        near(share(&[exact, 40], &[], BlendMode::Epic), 32.0 / 40.0);
        near(share(&[exact, 40], &[], BlendMode::Reuse), 0.0);
    }
    // What is computed anyway is computed a second time behind the first cached chunk.
    near(share(&[5, 40, 7], &[2], BlendMode::Answer), (10.0 + 10.0 + 7.0) / 40.0);
    near(share(&[5, 7, 40], &[1], BlendMode::Answer), (10.0 + 10.0) / 40.0);
    for mode in [BlendMode::Answer, BlendMode::CacheBlend, BlendMode::Reuse] {
        assert_eq!(share(&[40], &[], mode), None, "{mode}");
        let exact = Case::new(&mut rng, &[33], 4, &[]).blend(&BlendConfig { mode, ..ungated() });
        let stats = &exact.stats;
        assert_eq!((stats.recomputed_tokens, stats.reused_tokens, stats.exact_tokens), (1, 33, 33));
        let composed = Case::new(&mut rng, &[33, 40], 4, &[]).blend(&BlendConfig { mode, ..ungated() });
        assert_eq!(composed.stats.exact_tokens, 33, "{mode}");
    }
}

#[test]
fn a_context_without_a_question_is_blended_by_deviation_and_says_so() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let case = Case::new(&mut rng, &[30, 40, 20], 6, &[]);
    let unasked = Context { suffix: &[], ..case.context() };
    for mode in [BlendMode::Answer, BlendMode::Question] {
        let config = BlendConfig { mode, ratio: 0.2, ..ungated() };
        let blended = blend(&MODEL.1, &unasked, &config, &|| false).unwrap();
        assert_eq!(blended.stats.rule, Some(BlendMode::CacheBlend));
        let wanted = case.emulate(&case.deviating(0.2), Correction::None, false);
        assert_eq!(wrong_rows(&blended, &wanted, case.composed.len(), 1), []);
    }
}

/// Everything that a blend leaves, bit for bit.
fn bits(whole: &Whole) -> Vec<u32> {
    let (shape, rows) = (MODEL.1.shape, 0..whole.kv.len());
    let heads = (0..LAYERS).flat_map(|layer| (0..shape.kv_heads).map(move |head| (layer, head)));
    let kv = heads.flat_map(|(layer, head)| {
        let (keys, values) = whole.kv.rows(layer, head, rows.clone());
        keys.into_iter().chain(values)
    });
    let state = match &whole.state {
        Some(States::Host(x)) => x.clone(),
        _ => Vec::new(),
    };
    kv.chain(state).map(f32::to_bits).collect()
}

#[test]
fn a_blend_does_not_depend_on_how_it_is_cut() {
    let mut rng = ChaCha8Rng::seed_from_u64(13);
    for (number, case) in cases(&mut rng).iter().enumerate() {
        let modes = [BlendMode::CacheBlend, BlendMode::Random, BlendMode::Reuse, BlendMode::FullRecompute];
        for mode in [BlendMode::Answer, BlendMode::Question].into_iter().chain(modes) {
            for correction in [None, Some(Correction::Prompt)] {
                let config = BlendConfig { mode, ratio: 0.7, correction, ..ungated() };
                let whole = blend_reading(&MODEL.1, &case.context(), &config, || usize::MAX).unwrap();
                for round in 0..3 {
                    let most = [1, 40, 500][round];
                    let budget = || rng.random_range(0..most);
                    let cut = blend_reading(&MODEL.1, &case.context(), &config, budget).unwrap();
                    let about = format!("case {number}, {mode}, pieces below {most}");
                    assert_eq!(cut.stats, whole.stats, "{about}");
                    assert!(bits(&cut) == bits(&whole), "{about}");
                }
            }
        }
    }
}

#[test]
fn a_mass_spends_what_the_question_needs() {
    let mut rng = ChaCha8Rng::seed_from_u64(10);
    let case = Case::new(&mut rng, &[30, 50, 50], 12, &[]);
    let count = |mass| {
        let config = BlendConfig { mode: BlendMode::Answer, mass: Some(mass), ..BlendConfig::default() };
        case.blend(&config).stats.recomputed_tokens - 1
    };
    let counts = [0.1, 0.5, 0.9, 1.0].map(count);
    assert!(counts.is_sorted() && counts[0] >= 1 && counts[1] < 50 && counts[2] < 100, "{counts:?}");
    assert_eq!(counts[3], 100);
}

#[test]
fn what_the_gate_has_computed_whole_is_a_full_pass_and_is_charged_as_one() {
    let mut rng = ChaCha8Rng::seed_from_u64(13);
    let gate = |whole| GateConfig { on: true, whole, small_tokens: 0, ..GateConfig::default() };
    // Two chunks of 20 that a question of 40 is asked over; three of 40 that it looks at all of.
    for (chunks, question, whole, reason) in
        [(&[30, 20, 20][..], 40, 0.0, GateReason::FewTokens), (&[30, 40, 40, 40], 10, 1.1, GateReason::Everywhere)]
    {
        let case = Case::new(&mut rng, chunks, question, &[]);
        let composed = case.candidates();
        let config = BlendConfig { ratio: 0.2, gate: gate(whole), ..BlendConfig::default() };
        let blended = case.blend(&config);
        assert_eq!(blended.stats.gate.unwrap().reason, reason);
        assert_eq!(blended.stats.chosen, composed);
        let asked = if reason == GateReason::FewTokens { 0.0 } else { question as f32 };
        let wanted = (asked + composed.len() as f32) / composed.len() as f32;
        assert!((blended.stats.charged_share.unwrap() - wanted).abs() < 1e-6, "{reason}");
        let full = MODEL.0.pass(&case.tokens, None, 0, false);
        assert_eq!(wrong_rows(&blended, &full, case.composed.len(), 0), [], "{reason}");
        let off = BlendConfig { gate: GateConfig { on: false, ..gate(whole) }, ..config };
        let off = case.blend(&off).stats;
        assert_eq!((off.gate.unwrap().reason, off.chosen.len()), (GateReason::Off, composed.len() / 5));
    }
}

#[test]
fn the_same_prompt_draws_the_same_tokens_and_another_question_others() {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let mut case = Case::new(&mut rng, &[30, 50, 50], 12, &[]);
    let config = BlendConfig { mode: BlendMode::Random, ratio: 0.3, ..ungated() };
    let values =
        |case: &Case| (1..131).map(|row| case.blend(&config).kv.rows(3, 0, row..row + 1).1).collect::<Vec<_>>();
    let first = values(&case);
    assert_eq!(first, values(&case));
    case.question[0] = 2;
    assert_ne!(first, values(&case));
}

#[test]
fn blends_of_both_passes_can_be_cancelled() {
    let mut rng = ChaCha8Rng::seed_from_u64(12);
    let case = Case::new(&mut rng, &[30, 50], 8, &[]);
    let config = BlendConfig { mode: BlendMode::Answer, ..BlendConfig::default() };
    let looks = std::cell::Cell::new(0);
    let count = |limit: usize| {
        looks.set(0);
        let cancelled = || {
            looks.set(looks.get() + 1);
            looks.get() > limit
        };
        blend(&MODEL.1, &case.context(), &config, &cancelled).err()
    };
    assert!(count(usize::MAX).is_none());
    let all = looks.get();
    assert!(all >= 2 * LAYERS, "{all} looks in two passes over {LAYERS} layers");
    for limit in 0..all {
        assert!(matches!(count(limit), Some(EngineError::Cancelled)), "at look {limit} of {all}");
    }
}
