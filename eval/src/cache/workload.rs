//! Requests that name chunks: a made-up RAG workload with the published skew, and a recorded trace.

use std::fs;
use std::path::Path;

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

use crate::error::{EvalError, Result};

/// Tokens of a block of the recorded trace.
const BLOCK: usize = 512;

/// Requests in order of arrival.
pub(super) struct Workload {
    /// First part of the records' case.
    pub(super) name: &'static str,
    /// Tokens of each chunk.
    pub(super) chunks: Vec<usize>,
    /// The chunks of each request, in the order of its prompt, and the tokens behind them.
    pub(super) requests: Vec<(Vec<usize>, usize)>,
    /// Tokens before the chunks, the same in all requests.
    pub(super) head: usize,
    /// Requests that fill the caches before anything is counted.
    pub(super) warm: usize,
    /// A chunk's number says what stands before it as well: wherever it is found, its state is that of this prompt.
    pub(super) chained: bool,
}

impl Workload {
    /// Tokens of all chunks that occur.
    pub(super) fn distinct_tokens(&self) -> usize {
        self.chunks.iter().sum()
    }

    /// The share of chunk uses that goes to the most used twentieth of all chunks.
    pub(super) fn top_twentieth(&self) -> f64 {
        let mut uses = vec![0usize; self.chunks.len()];
        self.requests.iter().flat_map(|(chunks, _)| chunks).for_each(|chunk| uses[*chunk] += 1);
        uses.sort_unstable_by(|a, b| b.cmp(a));
        let top: usize = uses[..uses.len() / 20].iter().sum();
        top as f64 / uses.iter().sum::<usize>().max(1) as f64
    }
}

/// How the RAG workload is made.
#[derive(Debug, Clone, Copy)]
pub(super) struct RagShape {
    pub(super) documents: usize,
    pub(super) chunks_per_document: usize,
    pub(super) chunks_per_request: usize,
    pub(super) requests: usize,
    pub(super) warm: usize,
    /// Tokens before the chunks, and behind them.
    pub(super) head: usize,
    pub(super) question: usize,
    /// The probability that a further chunk is of the first one's document.
    pub(super) together: f64,
    /// The share of chunk uses that goes to the most used twentieth of the chunks.
    pub(super) skew: f64,
}

impl Default for RagShape {
    /// The skew is that of Cache-Craft's workloads (arXiv 2502.15734): 5 % of the chunks serve 60 % of the requests.
    fn default() -> Self {
        RagShape {
            documents: 500,
            chunks_per_document: 8,
            chunks_per_request: 5,
            requests: 12_000,
            warm: 2_000,
            head: 64,
            question: 32,
            together: 0.5,
            skew: 0.6,
        }
    }
}

/// Chunks of 128 to 512 tokens. The first chunk of a request is drawn by popularity (a power law over all chunks); each further
/// one is of the same document, or drawn by popularity again; a request names no chunk twice, and their order is random, as
/// order of relevance is to popularity. The law's exponent is the one with which uses have the skew.
pub(super) fn rag(shape: &RagShape, seed: u64) -> Workload {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let count = shape.documents * shape.chunks_per_document;
    let chunks: Vec<usize> = (0..count).map(|_| 64 * rng.random_range(2..=8)).collect();
    let mut by_rank: Vec<usize> = (0..count).collect();
    by_rank.shuffle(&mut rng);
    let draws: u64 = rng.random();
    let with = |exponent: f64| {
        let mut rng = ChaCha8Rng::seed_from_u64(draws);
        let popularity = Popularity::new(&by_rank, exponent);
        let requests =
            (0..shape.requests).map(|_| (request(shape, &popularity, &mut rng), shape.question)).collect::<Vec<_>>();
        let (head, warm) = (shape.head, shape.warm);
        Workload { name: "rag-skew", chunks: chunks.clone(), requests, head, warm, chained: false }
    };
    let (mut low, mut high) = (0.0, 4.0);
    for _ in 0..20 {
        let middle = (low + high) / 2.0;
        if with(middle).top_twentieth() < shape.skew { low = middle } else { high = middle }
    }
    with(high)
}

fn request(shape: &RagShape, popularity: &Popularity<'_>, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let first = popularity.draw(rng);
    let document = first - first % shape.chunks_per_document;
    let mut chosen = vec![first];
    while chosen.len() < shape.chunks_per_request {
        let next = match rng.random_bool(shape.together) {
            true => document + rng.random_range(0..shape.chunks_per_document),
            false => popularity.draw(rng),
        };
        if !chosen.contains(&next) {
            chosen.push(next);
        }
    }
    chosen.shuffle(rng);
    chosen
}

/// A power law over chunks.
struct Popularity<'a> {
    by_rank: &'a [usize],
    /// Sums of weights up to each rank.
    sums: Vec<f64>,
}

impl Popularity<'_> {
    fn new(by_rank: &[usize], exponent: f64) -> Popularity<'_> {
        let mut sum = 0.0;
        let weights = (1..=by_rank.len()).map(|rank| {
            sum += (rank as f64).powf(-exponent);
            sum
        });
        Popularity { by_rank, sums: weights.collect() }
    }

    fn draw(&self, rng: &mut ChaCha8Rng) -> usize {
        let all = self.sums.last().copied().unwrap_or(1.0);
        let at = rng.random::<f64>() * all;
        let rank = self.sums.partition_point(|sum| *sum <= at);
        self.by_rank[rank.min(self.by_rank.len() - 1)]
    }
}

/// A line of the trace.
#[derive(Deserialize)]
struct Traced {
    input_length: usize,
    hash_ids: Vec<u64>,
}

/// Requests of a trace in Mooncake's format (arXiv 2407.00079): JSON lines with `input_length` and `hash_ids`, the ids of the
/// prompt's blocks of 512 tokens, equal where the prompt up to the block's end is. A last block that is not full cannot be
/// shared: it counts as what stands behind the chunks. The first sixth of the requests fills the caches.
pub(super) fn mooncake(path: &Path) -> Result<Workload> {
    let text = fs::read_to_string(path).map_err(EvalError::io("read", path))?;
    let mut numbers = std::collections::HashMap::new();
    let mut requests = Vec::new();
    for (line, text) in text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty()) {
        let expected = "a request with input_length and hash_ids";
        let bad = |reason: String| EvalError::BadLine { path: path.to_owned(), line: line + 1, expected, reason };
        let traced: Traced = serde_json::from_str(text).map_err(|error| bad(error.to_string()))?;
        let full = traced.input_length / BLOCK;
        if traced.hash_ids.len() != traced.input_length.div_ceil(BLOCK) {
            let expected = traced.input_length.div_ceil(BLOCK);
            return Err(bad(format!("expected {expected} blocks, found {}", traced.hash_ids.len())));
        }
        let blocks = traced.hash_ids[..full].iter().map(|id| {
            let next = numbers.len();
            *numbers.entry(*id).or_insert(next)
        });
        requests.push((blocks.collect(), traced.input_length % BLOCK));
    }
    if numbers.is_empty() {
        return Err(EvalError::NothingToDo(format!("{} names no full block of {BLOCK} tokens", path.display())));
    }
    let (chunks, warm) = (vec![BLOCK; numbers.len()], requests.len() / 6);
    Ok(Workload { name: "mooncake", chunks, requests, head: 0, warm, chained: true })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_twentieth_of_the_chunks_has_the_published_share_of_the_uses() {
        let workload = rag(&RagShape { requests: 3000, ..RagShape::default() }, 7);
        assert!((workload.top_twentieth() - 0.6).abs() < 0.01, "{}", workload.top_twentieth());
        for (chunks, _) in &workload.requests {
            let distinct: std::collections::HashSet<_> = chunks.iter().collect();
            assert_eq!((chunks.len(), distinct.len()), (5, 5));
        }
        let again = rag(&RagShape { requests: 3000, ..RagShape::default() }, 7);
        assert_eq!(again.requests, workload.requests);
    }

    #[test]
    fn a_trace_is_read_by_full_blocks_and_a_line_that_contradicts_itself_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.jsonl");
        let line = |length: usize, ids: &str| {
            format!("{{\"timestamp\": 0, \"input_length\": {length}, \"output_length\": 1, \"hash_ids\": [{ids}]}}\n")
        };
        fs::write(&path, line(1030, "0, 46, 47") + &line(1024, "0, 99")).unwrap();
        let read = mooncake(&path).unwrap();
        assert_eq!(read.requests, [(vec![0, 1], 6), (vec![0, 2], 0)]);
        assert_eq!((read.chunks.len(), read.distinct_tokens(), read.chained), (3, 1536, true));
        fs::write(&path, line(1024, "0, 99") + &line(1030, "0, 46")).unwrap();
        let error = mooncake(&path).err().unwrap().to_string();
        assert!(error.contains(":2") || error.contains("line 2"), "{error}");
        fs::write(&path, line(30, "5")).unwrap();
        assert!(matches!(mooncake(&path), Err(EvalError::NothingToDo(_))));
    }
}
