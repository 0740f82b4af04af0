//! Passes that run kernels of ours and no others, for tools that look into kernels: the racecheck of compute-sanitizer does not
//! survive cuBLASLt's.

use super::models::{LIMITS, PLAIN, SHAPES, Tiny, config, rng};
use super::{CudaConfig, Piece, SequenceKv, Transformer, Want, assert_close, logits, tokens, tolerance};
use crate::sampler::Choice;

#[test]
#[ignore = "needs a GPU"]
fn parity_without_cublaslt() {
    // Weights in f32 have kernels of ours for any number of rows.
    for (number, tiny) in SHAPES.iter().enumerate() {
        let tiny = Tiny { bf16: false, ..*tiny };
        for portable in [false, true] {
            let config = CudaConfig { portable, ..config() };
            compare(&tiny, &tiny.pair_as(200 + number as u64, &config, LIMITS), &[70, 1, 130, 64, 3]);
        }
    }
    // bf16 has them for as many rows as the matrix-vector kernels take.
    for tiny in [PLAIN, SHAPES[2], SHAPES[4], SHAPES[5]] {
        compare(&tiny, &tiny.pair(220), &[8, 3, 1, 5, 7]);
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
        for batch in [1, 3, 5, 1, 3, 5] {
            let next: Vec<Vec<u32>> = (0..batch).map(|_| tokens(&mut rng, 1)).collect();
            let mut pieces: Vec<Piece<'_>> =
                kvs.iter_mut().zip(&next).map(|(kv, t)| Piece::exact(kv, t, Want::Last)).collect();
            let states = model.forward(&mut pieces).unwrap();
            if model.device().is_some() {
                // Behind the graph; what is chosen is compared elsewhere.
                model.next(&states, &vec![Choice::Draw { temperature: 0.7, at: 0.4 }; batch]).unwrap();
            }
            out.extend(model.logits(&states).unwrap());
        }
        out
    };
    assert_close(&run(device), &run(host), tolerance(tiny), &format!("{tiny:?}"));
}
