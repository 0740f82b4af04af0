//! Choices by all parameters, from the GPU's own logits, against the sampler's.

use rand::Rng;

use super::models::{PLAIN, VOCAB, rng};
use super::{Next, Piece, SequenceKv, Want, tokens};
use crate::sampler::{Choice, Sampler, SamplingParams};

#[test]
#[ignore = "needs a GPU"]
fn parity_of_filtered_choices() {
    let (_, model) = PLAIN.pair(240);
    let mut rng = rng(241);
    let (mut choices_made, mut others) = (0, 0);
    for rows in [1, 3, 9, 20] {
        for ban_eos in [false, true] {
            let mut kvs: Vec<SequenceKv> = (0..rows).map(|_| model.new_kv()).collect();
            let next: Vec<Vec<u32>> = (0..rows).map(|_| tokens(&mut rng, 1)).collect();
            let mut pieces: Vec<Piece<'_>> =
                kvs.iter_mut().zip(&next).map(|(kv, t)| Piece { ban_eos, ..Piece::exact(kv, t, Want::Last) }).collect();
            let states = model.forward(&mut pieces).unwrap();
            let mut rounds = Vec::new();
            for _ in 0..12 {
                let mut samplers: Vec<Sampler> = (0..rows)
                    .map(|_| {
                        let mut sampler = Sampler::new(params(&mut rng));
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

/// Any that are not plain, some of them at the ends of their ranges.
fn params(rng: &mut impl Rng) -> SamplingParams {
    let mut params = SamplingParams { seed: Some(rng.random()), ..SamplingParams::default() };
    let kind = rng.random_range(1..64u32);
    let on = |bit: u32| kind >> bit & 1 == 1;
    params.temperature =
        if on(5) && kind & 31 != 0 && rng.random_bool(0.3) { 0.0 } else { rng.random_range(0.05..2.0) };
    if on(0) {
        params.top_k = [1, 2, 7, 50, VOCAB - 1, VOCAB, 5 * VOCAB][rng.random_range(0..7)];
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
        params.logit_bias = (0..20).map(|_| (rng.random_range(0..VOCAB as u32), rng.random_range(-9.0..9.0))).collect();
    }
    params
}
