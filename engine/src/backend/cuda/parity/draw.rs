//! Draws by all parameters, from the GPU's own logits, against the sampler's.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::models::{LIMITS, PLAIN, VOCAB, config, rng};
use super::{ModelSpec, Next, Piece, SequenceKv, Transformer, Want, read, tokens};
use crate::backend::cuda::model::LOGIT_ROWS;
use crate::backend::cuda::module::Modules;
use crate::backend::cuda::sample::{NO_TOKEN, Rows, Sampling};
use crate::error::EngineError;
use crate::model::transformer::States;
use crate::sampler::{Choice, Draw, Sampler, SamplingParams};

/// A draw by a temperature alone.
pub(super) fn plain(temperature: f32, at: f64) -> Choice {
    let params = SamplingParams { temperature, ..SamplingParams::default() };
    Choice::Draw(Box::new(Draw { params, at, adjusted: Vec::new() }))
}

/// States that `rows` choices can be made behind: of as many sequences, or of one where that is too many.
fn states(model: &Transformer, rng: &mut ChaCha8Rng, rows: usize, ban_eos: bool) -> States {
    let (sequences, want) = if rows <= LIMITS.sequences { (rows, Want::Last) } else { (1, Want::All) };
    let mut kvs: Vec<SequenceKv> = (0..sequences).map(|_| model.new_kv()).collect();
    let first: Vec<Vec<u32>> = (0..sequences).map(|_| tokens(rng, rows / sequences)).collect();
    let mut pieces: Vec<Piece<'_>> =
        kvs.iter_mut().zip(&first).map(|(kv, t)| Piece { ban_eos, ..Piece::exact(kv, t, want) }).collect();
    model.forward(&mut pieces).unwrap()
}

#[test]
#[ignore = "needs a GPU"]
fn parity_of_draws() {
    let (_, model) = PLAIN.pair(240);
    let mut rng = rng(241);
    let (mut choices_made, mut others) = (0, 0);
    for rows in [1, 3, 9, 20, LOGIT_ROWS + 7] {
        for ban_eos in [false, true] {
            let states = states(&model, &mut rng, rows, ban_eos);
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
                rounds.push((samplers, choices, found));
            }
            let logits = model.next(&states, &vec![Choice::Logits; rows]).unwrap();
            for (samplers, choices, found) in rounds {
                for (row, mut sampler) in samplers.into_iter().enumerate() {
                    let (Next::Token(found), Next::Logits(logits)) = (&found[row], &logits[row]) else {
                        panic!("a token and logits")
                    };
                    let banned: &[u32] = if ban_eos { &[2, 7] } else { &[] };
                    let mut adjusted = logits.clone();
                    let expected = sampler.sample_without(&mut adjusted, banned).unwrap();
                    choices_made += 1;
                    if found.id == expected.id {
                        let error = (found.logprob - expected.logprob).abs();
                        assert!(error < 1e-4, "{} {}", found.logprob, expected.logprob);
                    } else {
                        others += usize::from(!is_near(&sampler, &adjusted, &choices[row], found.id));
                    }
                    assert!(!banned.contains(&found.id));
                }
            }
        }
    }
    assert!(choices_made > 2000 && others <= 2, "{others} of {choices_made} differ");
}

/// Drawing adjusts logits where they lie: those that are asked for beside a token are the ones before.
#[test]
#[ignore = "needs a GPU"]
fn tokens_come_with_the_logits_that_they_were_chosen_from() {
    let (_, model) = PLAIN.pair(242);
    let mut rng = rng(243);
    for rows in [1, 9, LOGIT_ROWS + 7] {
        let states = states(&model, &mut rng, rows, true);
        let mut choices: Vec<Choice> = (0..rows)
            .map(|row| {
                if row % 3 == 0 {
                    return Choice::Greedy;
                }
                let mut sampler = Sampler::new(params(&mut rng, VOCAB));
                tokens(&mut rng, 40).into_iter().for_each(|token| sampler.chosen(token));
                sampler.choice()
            })
            .collect();
        let logits = model.next(&states, &vec![Choice::Logits; rows]).unwrap();
        let plain = model.next(&states, &choices).unwrap();
        for choice in choices.iter_mut().step_by(2) {
            *choice = Choice::WithLogits(Box::new(choice.clone()));
        }
        let found = model.next(&states, &choices).unwrap();
        for (row, ((found, plain), logits)) in found.iter().zip(&plain).zip(&logits).enumerate() {
            let (Next::Token(plain), Next::Logits(logits)) = (plain, logits) else { panic!("a token and logits") };
            match found {
                Next::TokenOf(sampled, raw) if row % 2 == 0 => assert_eq!((sampled, raw), (plain, logits), "row {row}"),
                Next::Token(sampled) if row % 2 == 1 => assert_eq!(sampled, plain, "row {row}"),
                _ => panic!("row {row} has something else"),
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn where_adjusting_leaves_no_token_the_host_says_so() {
    let (_, model) = PLAIN.pair(245);
    let states = states(&model, &mut rng(246), 2, false);
    let forbid = |id: u32| (id, -100.0);
    let params = SamplingParams {
        repetition_penalty: f32::MAX,
        logit_bias: (0..VOCAB as u32).map(forbid).collect(),
        ..SamplingParams::default()
    };
    let mut sampler = Sampler::new(params);
    sampler.observe(&(0..VOCAB as u32).collect::<Vec<_>>());
    let nexts = model.next(&states, &[sampler.choice(), Choice::Greedy]).unwrap();
    let [Next::Logits(logits), Next::Token(_)] = &nexts[..] else { panic!("logits where there is no token") };
    assert!(matches!(sampler.sample(&mut logits.clone()), Err(EngineError::BadLogits { .. })));
}

/// From made-up logits, by the kernel for any card and by the one for clusters: vocabularies of odd sizes, parts that are added,
/// equal logits, such that cannot be chosen, and parameters at the ends of their ranges.
#[test]
#[ignore = "needs a GPU"]
fn parity_of_draws_in_vocabularies_of_any_size() {
    let (_, model) = PLAIN.pair(250);
    let model = model.device().unwrap();
    model.device.bind().unwrap();
    let modules = Modules::load(&model.device, config().kernel_cache.as_deref(), false).unwrap();
    let mut rng = rng(251);
    let (mut choices_made, mut others) = (0, 0);
    for (vocab, rows) in [(1, 3), (7, 9), (8, 1), (1000, 13), (32_003, 5), (128_256, 3), (151_937, 1)] {
        let spec = ModelSpec { vocab, eos: vec![0, 3], ..model.spec.clone() };
        let kernels = [false, true].map(|portable| Sampling::new(&model.device, &modules, &spec, portable).unwrap());
        for round in 0..if vocab > 10_000 { 8 } else { 48 } {
            let parts = 1 + round / 2 % 2;
            let logits = made_up(&mut rng, parts * rows * vocab, round);
            let bans: Vec<i32> = (0..rows).map(|_| rng.random_range(0..2)).collect();
            let mut samplers: Vec<Sampler> = (0..rows)
                .map(|_| {
                    let mut sampler = Sampler::new(extreme(&mut rng, vocab));
                    let seen: Vec<u32> = (0..30).map(|_| rng.random_range(0..vocab as u32)).collect();
                    sampler.observe(&seen[..20]);
                    seen[15..].iter().for_each(|token| sampler.chosen(*token));
                    sampler
                })
                .collect();
            let mut choices: Vec<Choice> = samplers.iter_mut().map(Sampler::choice).collect();
            for choice in &mut choices {
                let Choice::Draw(draw) = choice else { panic!("{choice:?}") };
                draw.at = [0.0, 1.0 - f64::EPSILON / 2.0, draw.at, draw.at][rng.random_range(0..4)];
            }
            let ban_memory = model.device.upload(&bans, "bans").unwrap();
            let run = |sampling: &Sampling| {
                let memory = model.device.upload(&logits, "logits").unwrap();
                let of = Rows { logits: &memory, parts, rows, banned: ban_memory.address() };
                sampling.choose(of).unwrap();
                let drawn = sampling.draw(of, &choices).unwrap();
                let mut chosen = vec![0u32; 3 * LOGIT_ROWS];
                sampling.chosen.read(0, &mut chosen).unwrap();
                let bad = chosen.split_off(2 * LOGIT_ROWS);
                let of_row = |row: usize| (bad[row] == 0).then_some((drawn[row], drawn[LOGIT_ROWS + row]));
                ((0..rows).map(of_row).collect::<Vec<_>>(), read(&memory, rows * vocab))
            };
            let (found, adjusted) = run(&kernels[0]);
            // Sums do not depend on their order: equal to the bit, up to NaN where there is no token.
            assert!(found == run(&kernels[1]).0, "{found:?}, {choices:?}");
            for (row, sampler) in samplers.iter_mut().enumerate() {
                let part = |part: usize| &logits[(part * rows + row) * vocab..][..vocab];
                let raw: Vec<f32> = (0..vocab).map(|id| (0..parts).map(|p| part(p)[id]).sum()).collect();
                let banned: &[u32] = if bans[row] != 0 { &[0, 3] } else { &[] };
                let mut sums = raw.clone();
                let expected = sampler.sample_without(&mut sums, banned);
                let what = format!("vocabulary {vocab}, row {row} of {rows}, {:?}: {found:?}", choices[row]);
                let (Some((id, logprob)), true) = (found[row], expected.is_ok()) else {
                    assert!(expected.is_err() && found[row].is_none_or(|(id, _)| id == NO_TOKEN), "{what}");
                    continue;
                };
                let adjusted = &adjusted[row * vocab..][..vocab];
                assert!(adjusted.iter().zip(&sums).all(|(a, b)| a == b), "{what}: adjusted otherwise");
                choices_made += 1;
                others += usize::from(!is_near(sampler, &sums, &choices[row], id));
                let top = raw.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let log_sum = raw.iter().map(|x| f64::from(x - top).exp()).sum::<f64>().ln();
                let error = (f64::from(f32::from_bits(logprob)) - (f64::from(raw[id as usize] - top) - log_sum)).abs();
                assert!(error < 1e-3, "{what}: {error}");
            }
        }
    }
    println!("{others} of {choices_made} differ");
    assert!(choices_made > 800 && others <= 2, "{others} of {choices_made} differ");
}

/// Whether a token is what is drawn by `adjusted` logits where the sums of weights are a little smaller or larger. False also where
/// that decides whether it may be drawn.
fn is_near(sampler: &Sampler, adjusted: &[f32], choice: &Choice, id: u32) -> bool {
    let Choice::Draw(draw) = choice else { return false };
    let top = adjusted.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if draw.params.temperature == 0.0 {
        return adjusted.iter().position(|x| *x == top) == Some(id as usize);
    }
    let candidates = sampler.candidates(adjusted);
    let sum = |to: usize| -> f64 { candidates[..to].iter().map(|(_, weight)| weight).sum() };
    let (goal, slack) = (draw.at * sum(candidates.len()), 1e-5 * sum(candidates.len()));
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

/// As [`params`], some of them where numbers end.
fn extreme(rng: &mut impl Rng, vocab: usize) -> SamplingParams {
    let mut params = params(rng, vocab);
    match rng.random_range(0..12) {
        0 => params.temperature = [1e-45, 1e-6][rng.random_range(0..2)],
        1 => params.repetition_penalty = [1e-38, f32::MAX][rng.random_range(0..2)],
        2 => params.top_p = 1e-38,
        _ => {}
    }
    params
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
