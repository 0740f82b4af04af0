#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;
use rand::Rng;

fn params() -> SamplingParams {
    SamplingParams { temperature: 1.0, seed: Some(7), ..SamplingParams::default() }
}

fn softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = logits.iter().map(|l| (f64::from(l - max) / temperature).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|w| w / sum).collect()
}

fn draws(params: &SamplingParams, logits: &[f32], count: usize) -> Vec<usize> {
    let mut sampler = Sampler::new(params.clone());
    let mut counts = vec![0; logits.len()];
    for _ in 0..count {
        counts[sampler.sample(&mut logits.to_vec()).unwrap().id as usize] += 1;
    }
    counts
}

#[test]
fn all_tokens_of_a_bias_beyond_the_vocabulary_are_named() {
    let params = SamplingParams { logit_bias: vec![(12, 1.0), (3, 1.0), (11, 1.0)], ..SamplingParams::default() };
    let error = params.validate(10).unwrap_err().to_string();
    assert!(error.contains("12, 11, the vocabulary has 10"), "{error}");
}

#[test]
fn every_parameter_out_of_range_is_named() {
    type Change = fn(&mut SamplingParams);
    let cases: [(&str, Change); 10] = [
        ("temperature", |p| p.temperature = f32::NAN),
        ("temperature", |p| p.temperature = -0.1),
        ("top_p", |p| p.top_p = -0.1),
        ("min_p", |p| p.min_p = 1.5),
        ("repetition_penalty", |p| p.repetition_penalty = 0.0),
        ("repetition_penalty", |p| p.repetition_penalty = f32::INFINITY),
        ("frequency_penalty", |p| p.frequency_penalty = 2.5),
        ("presence_penalty", |p| p.presence_penalty = f32::NAN),
        ("logit_bias", |p| p.logit_bias = vec![(3, 101.0)]),
        ("logit_bias", |p| p.logit_bias = vec![(10, 1.0)]),
    ];
    assert!(params().validate(10).is_ok());
    for (name, change) in cases {
        let mut wrong = params();
        change(&mut wrong);
        match wrong.validate(10) {
            Err(EngineError::Sampling { parameter, .. }) => assert_eq!(parameter, name),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn what_is_not_a_number_is_an_error() {
    for bad in [f32::NAN, f32::INFINITY] {
        let error = Sampler::new(params()).sample(&mut [0.0, bad, 1.0]).unwrap_err();
        assert!(matches!(error, EngineError::BadLogits { token: 1, .. }), "{error}");
    }
    assert!(Sampler::new(params()).sample(&mut [f32::NEG_INFINITY; 3]).is_err());
    let masked = Sampler::new(params()).sample(&mut [f32::NEG_INFINITY, 2.0]).unwrap();
    assert_eq!(masked, Sampled { id: 1, logprob: 0.0 });
}

#[test]
fn where_no_token_is_left_there_is_an_error_and_no_banned_token() {
    let mut logits = [f32::NEG_INFINITY, 1.0, 2.0];
    for params in [SamplingParams::default(), params(), SamplingParams { top_p: 0.5, ..params() }] {
        let error = Sampler::new(params.clone()).sample_without(&mut logits.clone(), &[1, 2]).unwrap_err();
        assert!(matches!(error, EngineError::BadLogits { value: f32::NEG_INFINITY, .. }), "{error}");
        assert_eq!(Sampler::new(params).sample_without(&mut logits, &[2]).unwrap().id, 1);
        logits[2] = 2.0;
    }
}

#[test]
fn a_penalty_that_overflows_leaves_the_choice_to_the_logits() {
    for (penalty, expected) in [(1e-38, 1), (f32::MAX, 2)] {
        let mut sampler = Sampler::new(SamplingParams { repetition_penalty: penalty, ..params() });
        sampler.observe(&[0, 1]);
        assert_eq!(sampler.sample(&mut [-30.0, 5.0, 2.0]).unwrap().id, expected);
    }
}

#[test]
fn draws_follow_the_softmax() {
    let logits = [0.0, 1.0, -1.0, 2.0, 0.5];
    for temperature in [0.5, 1.0, 2.0] {
        let params = SamplingParams { temperature, ..params() };
        let count = 20_000;
        let counts = draws(&params, &logits, count);
        for (found, p) in counts.iter().zip(softmax(&logits, f64::from(temperature))) {
            let deviation = (p * (1.0 - p) / count as f64).sqrt();
            assert!((*found as f64 / count as f64 - p).abs() < 5.0 * deviation, "{counts:?} at {temperature}");
        }
    }
}

#[test]
fn repetition_counts_prompt_and_answer_the_others_only_the_answer() {
    // HF: a positive logit is divided, a negative one multiplied.
    let mut sampler = Sampler::new(SamplingParams { repetition_penalty: 2.0, ..SamplingParams::default() });
    sampler.observe(&[0, 2]);
    let mut logits = [3.0, 2.0, -1.0, -1.0];
    assert_eq!(sampler.sample(&mut logits).unwrap().id, 1);
    assert_eq!(logits, [1.5, 2.0, -2.0, -1.0]);
    let mut logits = [3.0, 2.0, -1.0, -1.0];
    assert_eq!(sampler.sample(&mut logits).unwrap().id, 0);
    assert_eq!(logits, [1.5, 1.0, -2.0, -1.0]);

    // OpenAI: count times frequency, presence once; the prompt does not count.
    let both = SamplingParams { frequency_penalty: 0.5, presence_penalty: 0.25, ..SamplingParams::default() };
    let mut sampler = Sampler::new(both);
    sampler.observe(&[0, 0, 0]);
    for expected in [[4.0, 1.0], [3.25, 1.0], [2.75, 1.0]] {
        let mut logits = [4.0, 1.0];
        assert_eq!(sampler.sample(&mut logits).unwrap().id, 0);
        assert_eq!(logits, expected);
    }
}

#[test]
fn a_token_of_the_prompt_alone_is_not_present_in_the_answer() {
    let penalties =
        SamplingParams { repetition_penalty: 2.0, presence_penalty: 1.0, frequency_penalty: 0.5, ..params() };
    let mut sampler = Sampler::new(SamplingParams { temperature: 0.0, ..penalties });
    sampler.observe(&[0, 0, 1]);
    for wanted in [[2.0, 1.5, 3.0], [2.0, 1.5, 0.0]] {
        let mut logits = [4.0, 3.0, 3.0];
        sampler.sample(&mut logits).unwrap();
        // Token 2 is chosen first, and is then divided and lowered.
        assert_eq!(logits, wanted);
    }
}

#[test]
fn bias_forces_and_forbids_but_the_reported_probability_is_the_raw_one() {
    let forced = SamplingParams { logit_bias: vec![(2, 100.0)], ..params() };
    let sampled = Sampler::new(forced).sample(&mut [1.0, 2.0, 0.0]).unwrap();
    assert_eq!(sampled.id, 2);
    assert!((f64::from(sampled.logprob) - softmax(&[1.0, 2.0, 0.0], 1.0)[2].ln()).abs() < 1e-6);
    let forbidden = SamplingParams { logit_bias: vec![(1, -100.0)], ..params() };
    assert_eq!(draws(&forbidden, &[1.0, 2.0, 0.0], 500)[1], 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn greedy_takes_the_first_of_the_largest(logits in prop::collection::vec(-4i8..4, 1..40)) {
        let logits: Vec<f32> = logits.into_iter().map(f32::from).collect();
        let sampled = Sampler::new(SamplingParams::default()).sample(&mut logits.clone()).unwrap();
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        prop_assert_eq!(sampled.id as usize, logits.iter().position(|l| *l == max).unwrap());
        let expected = softmax(&logits, 1.0)[sampled.id as usize].ln();
        prop_assert!((f64::from(sampled.logprob) - expected).abs() < 1e-5);
    }

    #[test]
    fn filters_keep_exactly_what_they_promise(
        logits in prop_oneof![
            prop::collection::vec(-6.0f32..6.0, 2..40),
            prop::collection::vec((-4i8..4).prop_map(f32::from), 2..40),
        ],
        top_k in prop_oneof![Just(0usize), 1usize..12, 12usize..60],
        top_p in prop_oneof![Just(1.0f32), 0.01f32..1.0],
        min_p in prop_oneof![Just(0.0f32), 0.0f32..0.5],
        temperature in 0.2f32..2.0,
    ) {
        let params = SamplingParams { temperature, top_k, top_p, min_p, ..params() };
        let kept = Sampler::new(params.clone()).candidates(&logits);
        // The oracle, written over the full softmax.
        let probability = softmax(&logits, f64::from(temperature));
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
        let likely = |i: &usize| probability[*i] >= f64::from(min_p) * probability[order[0]];
        let within = if top_k > 0 { &order[..top_k.min(order.len())] } else { &order[..] };
        let sum = |n: usize| within[..n].iter().map(|i| probability[*i]).sum::<f64>();
        // Two sums of the same numbers differ by rounding, and by no token's probability.
        let goal = sum(within.len()) * f64::from(top_p);
        let is_nucleus = |n: &usize| sum(*n) > goal - 1e-12 && (sum(n - 1) < goal + 1e-12);
        let nuclei: Vec<usize> = match top_p < 1.0 {
            true => (1..=within.len()).filter(is_nucleus).collect(),
            false => vec![within.len()],
        };
        let mut expected: Vec<Vec<usize>> =
            nuclei.iter().map(|n| within[..*n].iter().copied().filter(likely).collect()).collect();
        if !params.is_ordered() {
            expected.iter_mut().for_each(|ids| ids.sort_unstable());
        }
        let ids: Vec<usize> = kept.iter().map(|(id, _)| *id as usize).collect();
        prop_assert!(expected.contains(&ids), "{ids:?} instead of {expected:?}");
        for (id, weight) in &kept {
            let share = probability[*id as usize] / probability[order[0]];
            prop_assert!((weight - share).abs() < 1e-6, "{weight} {share}");
        }
    }

    #[test]
    fn a_seed_decides_everything(logits in prop::collection::vec(-3.0f32..3.0, 2..30), seed in any::<u64>()) {
        let params = SamplingParams { seed: Some(seed), top_p: 0.9, frequency_penalty: 0.3, ..params() };
        let run = || {
            let mut sampler = Sampler::new(params.clone());
            (0..20).map(|_| sampler.sample(&mut logits.clone()).unwrap().id).collect::<Vec<_>>()
        };
        prop_assert_eq!(run(), run());
    }
}

#[test]
fn of_equal_tokens_the_first_are_kept_and_no_more_than_it_takes() {
    let kept = |top_k, top_p, min_p| -> Vec<u32> {
        let sampler = Sampler::new(SamplingParams { top_k, top_p, min_p, ..params() });
        sampler.candidates(&[1.0, 2.0, 2.0, 2.0, 2.0, -9.0]).iter().map(|(id, _)| *id).collect()
    };
    assert_eq!([kept(1, 1.0, 0.0), kept(3, 1.0, 0.0)], [vec![1], vec![1, 2, 3]]);
    assert_eq!(kept(4, 0.5, 0.0), [1, 2], "half of four");
    assert_eq!(kept(4, 0.51, 0.0), [1, 2, 3]);
    assert_eq!(kept(4, 0.25, 0.0), [1]);
    assert_eq!(kept(0, 1.0, 1.0), [1, 2, 3, 4], "as likely as the likeliest");
}

#[test]
fn what_is_drawn_elsewhere_is_what_would_be_drawn_here() {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let logits: Vec<f32> = (0..50).map(|_| rng.random_range(-3.0..3.0)).collect();
    let params = SamplingParams { temperature: 0.7, seed: Some(5), ..params() };
    let (mut here, mut there) = (Sampler::new(params.clone()), Sampler::new(params.clone()));
    for _ in 0..200 {
        let Choice::Draw(draw) = there.choice() else { panic!("a temperature is set") };
        assert_eq!(there.choice(), Choice::Draw(draw.clone()), "until it is used");
        assert!(draw.adjusted.is_empty() && draw.params == params);
        let (temperature, at) = (draw.params.temperature, draw.at);
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: &f32| (f64::from(logit - top) / f64::from(temperature)).exp();
        let goal = at * logits.iter().map(weight).sum::<f64>();
        let mut sum = 0.0;
        let id = logits.iter().position(|logit| {
            sum += weight(logit);
            sum > goal
        });
        let id = id.unwrap() as u32;
        there.chosen(id);
        assert_eq!(here.sample(&mut logits.clone()).unwrap().id, id);
    }
    assert_eq!(Sampler::new(SamplingParams { temperature: 0.0, ..params.clone() }).choice(), Choice::Greedy);
}

#[test]
fn a_draw_says_all_that_it_depends_on() {
    let params =
        SamplingParams { repetition_penalty: 1.2, logit_bias: vec![(4, 1.0), (9, -2.0), (4, 0.5)], ..params() };
    let mut sampler = Sampler::new(params.clone());
    sampler.observe(&[7, 4]);
    sampler.chosen(7);
    let Choice::Draw(mut choice) = sampler.choice() else { panic!("a penalty is set") };
    assert_eq!(sampler.choice(), Choice::Draw(choice.clone()), "until it is used");
    let entry = |id, bias, count| Adjusted { id, bias, count };
    choice.adjusted.sort_by_key(|token| token.id);
    assert_eq!(choice.adjusted, [entry(4, 1.5, Some(0)), entry(7, 0.0, Some(1)), entry(9, -2.0, None)]);
    assert!((0.0..1.0).contains(&choice.at) && choice.params == params);
    for (other, seen) in [
        (SamplingParams { top_k: 5, ..self::params() }, 0),
        (SamplingParams { presence_penalty: 1.0, ..self::params() }, 1),
    ] {
        let mut sampler = Sampler::new(other);
        sampler.chosen(3);
        let Choice::Draw(choice) = sampler.choice() else { panic!("not plain") };
        assert_eq!(choice.adjusted.len(), seen);
    }
}

#[test]
fn banned_tokens_are_not_chosen_and_count_in_the_log_probability() {
    let logits = [1.0f32, 3.0, 2.0];
    let log_sum = logits.iter().map(|x| x.exp()).sum::<f32>().ln();
    for temperature in [0.0, 0.01] {
        let mut sampler = Sampler::new(SamplingParams { temperature, top_k: 2, ..params() });
        let sampled = sampler.sample_without(&mut logits.clone(), &[1, 77]).unwrap();
        assert_eq!(sampled.id, 2);
        assert!((sampled.logprob - (2.0 - log_sum)).abs() < 1e-6);
    }
    let sampled = Sampler::new(SamplingParams::default()).sample_without(&mut logits.clone(), &[1]).unwrap();
    assert!(sampled.id == 2 && (sampled.logprob - (2.0 - log_sum)).abs() < 1e-6);
}

#[test]
fn rounding_never_draws_a_token_without_weight() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let banned = 99_999;
    for _ in 0..30 {
        let mut logits: Vec<f32> = (0..=banned).map(|_| rng.random_range(-3.0..3.0)).collect();
        let mut sampler = Sampler::new(SamplingParams { logit_bias: vec![(5, 1.0)], ..params() });
        sampler.at = Some(1.0 - f64::EPSILON / 2.0);
        assert_ne!(sampler.sample_without(&mut logits, &[banned]).unwrap().id, banned);
    }
}

#[test]
fn the_likeliest_are_in_order_with_their_raw_log_probabilities() {
    let mut rng = ChaCha8Rng::seed_from_u64(10);
    let logits: Vec<f32> = (0..500).map(|_| f32::from(rng.random_range(-80i8..80)) / 8.0).collect();
    let logprob: Vec<f64> = softmax(&logits, 1.0).iter().map(|p| p.ln()).collect();
    let mut order: Vec<u32> = (0..500).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
    let hot = SamplingParams { temperature: 2.0, logit_bias: vec![(3, 5.0)], presence_penalty: 1.0, ..params() };
    for params in [SamplingParams::default(), hot] {
        let mut sampler = Sampler::new(params);
        for count in [0, 1, 5, 20] {
            let sampled = sampler.sample(&mut logits.clone()).unwrap();
            let best = likeliest(&logits, sampled, count);
            assert_eq!(best.iter().map(|(id, _)| *id).collect::<Vec<_>>(), order[..count]);
            for (id, found) in best {
                assert!((f64::from(found) - logprob[id as usize]).abs() < 1e-4, "{id}: {found}");
                assert!(id != sampled.id || found == sampled.logprob);
            }
        }
    }
    // A token that only its bias could have made likely says nothing of the sum.
    let far = Sampled { id: 0, logprob: -3e9 };
    assert!((likeliest(&[-3e9, 1.0, 0.0], far, 1)[0].1 + 0.3133).abs() < 1.1);
    assert_eq!(likeliest(&[1.0], Sampled { id: 0, logprob: 0.0 }, 20), [(0, 0.0)]);
}

#[test]
fn a_nucleus_of_nothing_is_the_likeliest_token() {
    let params = SamplingParams { top_p: 0.0, temperature: 2.0, ..params() };
    params.validate(4).unwrap();
    assert_eq!(Sampler::new(params).candidates(&[0.5, 1.0, 1.0, 0.9]), [(1, 1.0)]);
}
