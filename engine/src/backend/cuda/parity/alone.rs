//! Passes that run kernels of ours and no others, for tools that look into kernels: the racecheck of compute-sanitizer does not
//! survive cuBLASLt's.

use super::draw::plain;
use super::models::{LIMITS, PLAIN, SHAPES, Tiny, config, rng};
use super::{CudaConfig, Piece, SequenceKv, Transformer, Want, assert_close, logits, tokens, tolerance};
use crate::sampler::{Choice, Sampler, SamplingParams};

#[test]
#[ignore = "needs a GPU"]
fn parity_without_cublaslt() {
    // Weights in f32 have kernels of ours for any number of rows. One shape for each kind of kernel: such tools are slow.
    for number in [0, 2, 4, 6, 7] {
        let tiny = Tiny { bf16: false, ..SHAPES[number] };
        for portable in [false, true].into_iter().take(if tiny.head_dim < 64 { 1 } else { 2 }) {
            let config = CudaConfig { portable, ..config() };
            compare(&tiny, &tiny.pair_as(200 + number as u64, &config, LIMITS), &[70, 1, 130, 3]);
        }
    }
    // bf16 has them for as many rows as the matrix-vector kernels take.
    for tiny in [PLAIN, SHAPES[2], SHAPES[4], SHAPES[5]] {
        compare(&tiny, &tiny.pair(220), &[8, 3, 1, 5]);
    }
}

/// Reads sequences of one, two, ... parts, and decodes some of them together, the last steps of a kind by a graph.
fn compare(tiny: &Tiny, (host, device): &(Transformer, Transformer), parts: &[usize]) {
    let run = |model: &Transformer| {
        let mut rng = rng(230);
        let mut out = Vec::new();
        let mut kvs: Vec<SequenceKv> = Vec::new();
        for last in 0..parts.len() {
            let mut kv = model.new_kv();
            for part in &parts[..=last] {
                out.extend(logits(model, &mut kv, &tokens(&mut rng, *part), None));
            }
            kvs.push(kv);
        }
        for batch in [1, 3, 1, 3] {
            let next: Vec<Vec<u32>> = (0..batch).map(|_| tokens(&mut rng, 1)).collect();
            let mut pieces: Vec<Piece<'_>> =
                kvs.iter_mut().zip(&next).map(|(kv, t)| Piece::exact(kv, t, Want::Last)).collect();
            let states = model.forward(&mut pieces).unwrap();
            if model.device().is_some() {
                // Behind the graph; what is chosen is compared elsewhere.
                let params =
                    SamplingParams { temperature: 0.7, top_p: 0.9, presence_penalty: 0.5, ..Default::default() };
                let mut sampler = Sampler::new(params);
                sampler.chosen(9);
                let choices: Vec<Choice> =
                    [sampler.choice(), plain(0.7, 0.4), Choice::Greedy].into_iter().take(batch).collect();
                model.next(&states, &choices).unwrap();
            }
            out.extend(model.logits(&states).unwrap());
        }
        out
    };
    assert_close(&run(device), &run(host), tolerance(tiny), &format!("{tiny:?}"));
}
