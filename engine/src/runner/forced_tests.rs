//! Answers whose tokens the request gives, and what is reported of them.

use super::*;

/// The answer's tokens, and the logits in the place of each.
fn with_logits(request: &Request) -> (Vec<(u32, f32)>, Vec<Vec<f32>>, Finished) {
    let mut bench = Bench::new(config(), 64);
    let mut events = bench.submit(&Request { report_logits: true, ..request.clone() });
    bench.run();
    let (mut tokens, mut logits, mut end) = (Vec::new(), Vec::new(), None);
    while let Ok(event) = events.try_recv() {
        match event {
            Event::Token(token) => {
                tokens.push((token.id, token.logprob));
                logits.push(token.logits);
            }
            Event::Finished(finished) => end = Some(finished),
            Event::Started(_) => {}
            Event::Failed(error) => panic!("{error}"),
        }
    }
    (tokens, logits, end.unwrap())
}

fn forced(request: &Request, answer: &[u32]) -> Request {
    Request { forced: Some(answer.into()), ..request.clone() }
}

fn ids(tokens: &[(u32, f32)]) -> Vec<u32> {
    tokens.iter().map(|(id, _)| *id).collect()
}

#[test]
fn forcing_the_models_own_answer_changes_nothing() {
    let mut rng = ChaCha8Rng::seed_from_u64(31);
    for request in mixed(&mut rng, 8) {
        let request = Request { sampling: SamplingParams::default(), ..request };
        let (tokens, logits, end) = with_logits(&request);
        for ((id, _), logits) in tokens.iter().zip(&logits) {
            // End-of-text tokens are not chosen here.
            let best = crate::sampler::likeliest(logits, crate::sampler::Sampled { id: *id, logprob: 0.0 }, 2);
            assert_eq!(best.iter().find(|(best, _)| !MODEL.spec.eos.contains(best)).unwrap().0, *id);
        }
        let again = with_logits(&forced(&request, &ids(&tokens)));
        assert_eq!((&again.0, &again.1), (&tokens, &logits));
        assert_eq!((again.2.reason, again.2.text), (end.reason, end.text));
    }
}

#[test]
fn logits_of_forced_tokens_are_those_behind_a_prompt_that_holds_them() {
    let mut rng = ChaCha8Rng::seed_from_u64(32);
    let request = plain(tokens(&mut rng, 90), 40);
    let answer = tokens(&mut rng, 7);
    let (chosen, logits, end) = with_logits(&forced(&request, &answer));
    assert_eq!((ids(&chosen), end.reason), (answer.clone(), FinishReason::Length));
    assert_eq!(end.usage.completion_tokens, 7);
    for (place, (logits, (id, logprob))) in logits.iter().zip(&chosen).enumerate() {
        let prompt = [request.prompt.suffix.clone(), answer[..place].to_vec()].concat();
        let (_, alone, _) = with_logits(&plain(prompt, 1));
        assert_eq!(logits, &alone[0], "place {place}");
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        assert!((f64::from(logits[*id as usize]) - sum.ln() - f64::from(*logprob)).abs() < 1e-5);
    }
}

#[test]
fn a_forced_end_of_text_ends_the_answer_and_max_tokens_cuts_it() {
    let eos = MODEL.spec.eos[0];
    let request = Request { ignore_eos: false, ..plain(vec![5, 6, 7], 40) };
    let (tokens, _, end) = with_logits(&forced(&request, &[9, eos, 11]));
    assert_eq!((ids(&tokens), end.reason), (vec![9, eos], FinishReason::Stop));
    let cut = Request { max_tokens: Some(2), ..forced(&request, &[9, 8, 11]) };
    let (tokens, _, end) = with_logits(&cut);
    assert_eq!((ids(&tokens), end.reason), (vec![9, 8], FinishReason::Length));
}

#[test]
fn forced_tokens_are_checked_before_they_are_read() {
    let engine =
        Engine::load(EngineConfig { model_dir: MODEL_DIR.path().into(), device: DeviceChoice::Cpu, ..config() });
    let engine = engine.unwrap();
    let request = plain(vec![5, 6], 4);
    for (answer, expected) in [(vec![], "at least one token"), (vec![1, 99_999], "99999")] {
        let refused = engine.submit(forced(&request, &answer));
        assert!(refused.is_err_and(|error| error.to_string().contains(expected)), "{answer:?}");
    }
}
