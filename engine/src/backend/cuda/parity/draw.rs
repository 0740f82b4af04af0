//! Draws by all parameters, from the GPU's own logits, against the sampler's.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::models::{PLAIN, VOCAB, config, rng};
use super::{ModelSpec, Next, Piece, SequenceKv, Transformer, Want, tokens};
use crate::backend::cuda::model::LOGIT_ROWS;
use crate::backend::cuda::module::Modules;
use crate::backend::cuda::sample::{NO_TOKEN, Rows, Sampling};
use crate::model::transformer::States;
use crate::sampler::{Choice, Draw, Sampler, SamplingParams};

/// The states of sequences behind a first token each.
fn after_one_token(model: &Transformer, rng: &mut ChaCha8Rng, rows: usize, ban_eos: bool) -> States {
    let mut kvs: Vec<SequenceKv> = (0..rows).map(|_| model.new_kv()).collect();
    let first: Vec<Vec<u32>> = (0..rows).map(|_| tokens(rng, 1)).collect();
    let mut pieces: Vec<Piece<'_>> =
        kvs.iter_mut().zip(&first).map(|(kv, t)| Piece { ban_eos, ..Piece::exact(kv, t, Want::Last) }).collect();
    model.forward(&mut pieces).unwrap()
}

/// A draw by a temperature alone.
pub(super) fn plain(temperature: f32, at: f64) -> Choice {
    let params = SamplingParams { temperature, ..SamplingParams::default() };
    Choice::Draw(Box::new(Draw { params, at, adjusted: Vec::new() }))
}

#[test]
#[ignore = "needs a GPU"]
fn parity_of_draws() {
    let (_, model) = PLAIN.pair(240);
    let mut rng = rng(241);
    let (mut choices_made, mut others) = (0, 0);
    for rows in [1, 3, 9, 20] {
        for ban_eos in [false, true] {
            let states = after_one_token(&model, &mut rng, rows, ban_eos);
            let mut rounds = Vec::new();
            for _ in 0..12 {
                let mut samplers: Vec<Sampler> = (0..rows)
                    .map(|_| {
                        let mut sampler = Sampler::new(params(&mut rng, VOCAB));
                        sampler.observe(&tokens(&mut rng, 300));
                        tokens(&mut rng, 40).into_iter().for_each(|token| sampler.chosen(token));
                        sampler
                    })
                    .collect();
                let choices: Vec<Choice> = samplers.iter_mut().map(Sampler::choice).collect();
                let found = model.next(&states, &choices).unwrap();
                let again = model.next(&states, &choices).unwrap();
                for (a, b) in found.iter().zip(&again) {
                    let (Next::Token(a), Next::Token(b)) = (a, b) else { panic!("logits where tokens were asked for") };
                    assert_eq!(a.id, b.id, "equal choices");
                }
                rounds.push((samplers, found));
            }
            let logits = model.next(&states, &vec![Choice::Logits; rows]).unwrap();
            for (mut samplers, found) in rounds {
                for ((sampler, found), row) in samplers.iter_mut().zip(&found).zip(&logits) {
                    let (Next::Token(found), Next::Logits(row)) = (found, row) else { panic!("a token and logits") };
                    let banned: &[u32] = if ban_eos { &[2, 7] } else { &[] };
                    let expected = sampler.sample_without(&mut row.clone(), banned).unwrap();
                    choices_made += 1;
                    // Sums that are rounded otherwise may end on the other side of a border.
                    others += usize::from(found.id != expected.id);
                    let all: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
                    let logprob = f64::from(row[found.id as usize]) - all.ln();
                    assert!((f64::from(found.logprob) - logprob).abs() < 1e-4, "{} {logprob}", found.logprob);
                    assert!(!banned.contains(&found.id));
                }
            }
        }
    }
    assert!(choices_made > 700 && others <= 2, "{others} of {choices_made} differ");
}

/// From made-up logits: vocabularies of odd sizes, parts that are added, equal logits, and such that cannot be chosen.
#[test]
#[ignore = "needs a GPU"]
fn parity_of_draws_in_vocabularies_of_any_size() {
    let (_, model) = PLAIN.pair(250);
    let model = model.device().unwrap();
    model.device.bind().unwrap();
    let mut rng = rng(251);
    let (mut choices_made, mut others) = (0, 0);
    for portable in [false, true] {
        let modules = Modules::load(&model.device, config().kernel_cache.as_deref(), portable).unwrap();
        for (vocab, rows) in [(1, 3), (7, 9), (8, 1), (1000, 13), (32_003, 5), (128_256, 3), (151_937, 1)] {
            let spec = ModelSpec { vocab, eos: vec![0, 3], ..model.spec.clone() };
            let sampling = Sampling::new(&model.device, &modules, &spec, portable).unwrap();
            for round in 0..if vocab > 10_000 { 4 } else { 24 } {
                let parts = 1 + round % 2;
                let logits = made_up(&mut rng, parts * rows * vocab, round);
                let memory = model.device.upload(&logits, "logits").unwrap();
                let bans: Vec<i32> = (0..rows).map(|_| rng.random_range(0..2)).collect();
                let ban_memory = model.device.upload(&bans, "bans").unwrap();
                let of = Rows { logits: &memory, parts, rows, banned: ban_memory.address() };
                let mut samplers: Vec<Sampler> = (0..rows)
                    .map(|_| {
                        let mut sampler = Sampler::new(params(&mut rng, vocab));
                        let seen: Vec<u32> = (0..30).map(|_| rng.random_range(0..vocab as u32)).collect();
                        sampler.observe(&seen[..20]);
                        seen[15..].iter().for_each(|token| sampler.chosen(*token));
                        sampler
                    })
                    .collect();
                let choices: Vec<Choice> = samplers.iter_mut().map(Sampler::choice).collect();
                sampling.choose(of).unwrap();
                let drawn = sampling.draw(of, &choices).unwrap();
                let mut chosen = vec![0u32; 3 * LOGIT_ROWS];
                sampling.chosen.read(0, &mut chosen).unwrap();
                for (row, sampler) in samplers.iter_mut().enumerate() {
                    let part = |part: usize| &logits[(part * rows + row) * vocab..][..vocab];
                    let mut sums: Vec<f32> = (0..vocab).map(|id| (0..parts).map(|p| part(p)[id]).sum()).collect();
                    let banned: &[u32] = if bans[row] != 0 { &[0, 3] } else { &[] };
                    let expected = sampler.sample_without(&mut sums, banned);
                    let bad = chosen[2 * LOGIT_ROWS + row] != 0;
                    let what = format!("vocabulary {vocab}, row {row} of {rows}, {:?}", choices[row]);
                    let Ok(expected) = expected else {
                        assert!(bad || drawn[row] == NO_TOKEN, "{what}");
                        continue;
                    };
                    assert!(!bad, "{what}");
                    choices_made += 1;
                    if drawn[row] == expected.id {
                        let logprob = f32::from_bits(drawn[LOGIT_ROWS + row]);
                        let error = (logprob - expected.logprob).abs();
                        assert!(error < 1e-5 * expected.logprob.abs().max(100.0), "{what}: {logprob}, {expected:?}");
                    } else {
                        others += usize::from(!is_near(sampler, &sums, &choices[row], drawn[row]));
                    }
                }
            }
        }
    }
    assert!(choices_made > 800 && others <= 2, "{others} of {choices_made} differ");
}

/// Whether a token is what is drawn by `adjusted` logits where the sums of weights are a little smaller or larger. False also where
/// that decides whether it may be drawn.
fn is_near(sampler: &Sampler, adjusted: &[f32], choice: &Choice, id: u32) -> bool {
    let Choice::Draw(wish) = choice else { return false };
    let candidates = sampler.candidates(adjusted);
    let sum = |to: usize| -> f64 { candidates[..to].iter().map(|(_, weight)| weight).sum() };
    let (goal, slack) = (wish.at * sum(candidates.len()), 1e-5 * sum(candidates.len()));
    let place = candidates.iter().position(|(candidate, _)| *candidate == id);
    place.is_some_and(|place| sum(place) <= goal + slack && goal <= sum(place + 1) + slack)
}

/// Logits close to each other and far apart, equal ones, and such of minus infinity.
fn made_up(rng: &mut impl Rng, n: usize, round: usize) -> Vec<f32> {
    let scale = [0.01, 1.0, 6.0, 40.0][round % 4];
    let (coarse, none) = (rng.random_bool(0.4), if rng.random_bool(0.3) { rng.random_range(0.0..1.0) } else { 0.0 });
    let one = |rng: &mut _| {
        let x: f32 = scale * Rng::random_range(rng, -3.0..3.0f32).powi(3) / 3.0;
        let x = if coarse { (x * 4.0 / scale).round() * scale / 4.0 } else { x };
        if Rng::random_bool(rng, none) { f32::NEG_INFINITY } else { x }
    };
    (0..n).map(|_| one(rng)).collect()
}

/// Any that are not greedy, some of them at the ends of their ranges.
fn params(rng: &mut impl Rng, vocab: usize) -> SamplingParams {
    let mut params = SamplingParams { seed: Some(rng.random()), ..SamplingParams::default() };
    let kind = rng.random_range(0..64u32);
    let on = |bit: u32| kind >> bit & 1 == 1;
    params.temperature =
        if on(5) && kind & 31 != 0 && rng.random_bool(0.3) { 0.0 } else { rng.random_range(0.05..2.0) };
    if on(0) {
        params.top_k = [1, 2, 7, 50, vocab.max(2) - 1, vocab, 5 * vocab][rng.random_range(0..7)];
    }
    if on(1) {
        params.top_p = [1e-6, 0.1, 0.9, 0.999_999][rng.random_range(0..4)];
    }
    if on(2) {
        params.min_p = [0.01, 0.5, 1.0][rng.random_range(0..3)];
    }
    if on(3) {
        params.repetition_penalty = rng.random_range(0.5..2.0);
    }
    if on(4) {
        params.frequency_penalty = rng.random_range(-2.0..2.0);
        params.presence_penalty = rng.random_range(-2.0..2.0);
    }
    if on(5) {
        params.logit_bias = (0..20).map(|_| (rng.random_range(0..vocab as u32), rng.random_range(-9.0..9.0))).collect();
    }
    params
}
