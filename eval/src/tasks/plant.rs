//! Facts into chunks of passages.

use std::sync::Arc;

use rand::Rng;
use rand::seq::SliceRandom;

use super::Question;
use super::facts::{Place, Plan};
use super::words::Words;

/// A paragraph of filler.
pub(super) struct Passage {
    sentences: Vec<&'static str>,
}

impl Passage {
    pub(super) fn new(text: &'static str) -> Passage {
        Passage { sentences: text.split_inclusive(". ").map(str::trim_end).collect() }
    }
}

/// Makes one context.
pub(super) struct Maker<'a> {
    pub(super) words: Words,
    /// Tokens that the chunks may have together.
    pub(super) budget: usize,
    /// Counts the tokens of a text.
    pub(super) count: &'a dyn Fn(&str) -> usize,
    pub(super) passages: &'a [Passage],
}

/// Chunks and the question about them.
type Made = (Vec<Arc<str>>, Question);

impl Maker<'_> {
    /// A context for a task.
    pub(super) fn make(&mut self, task: &str) -> Made {
        if task == "kv" {
            return self.key_values();
        }
        // One group of facts for 512 tokens, as in the reference model's training, but never one alone: it would be the
        // answer whatever is asked.
        let size = (self.budget / 448).clamp(2, 24);
        let Plan { groups, question } = self.words.plan(task, size);
        (self.plant(groups), question)
    }

    /// Chunks of passages with the groups in them, as long as the budget allows.
    fn plant(&mut self, groups: Vec<(Place, Vec<String>)>) -> Vec<Arc<str>> {
        // A sentence in a chunk may take a token more or less than alone: 2 are set aside for each.
        let planted: usize = groups.iter().flat_map(|(_, s)| s).map(|s| (self.count)(s) + 2).sum();
        let mut chunks = self.filler(self.budget.saturating_sub(planted));
        let last = chunks.len() - 1;
        let mut heads = vec![Vec::new(); chunks.len()];
        let mut tails = vec![Vec::new(); chunks.len()];
        let mut inner: Vec<Vec<(usize, String)>> = vec![Vec::new(); chunks.len()];
        for (place, sentences) in groups {
            if matches!(place, Place::Boundary) {
                let at = self.free_boundary(&tails);
                let mut sentences = sentences.into_iter();
                tails[at].extend(sentences.next());
                heads[at + 1].extend(sentences);
                continue;
            }
            let mut spots = self.spots(&chunks, sentences.len(), matches!(place, Place::Spread));
            spots.sort_unstable();
            for (sentence, (chunk, at)) in sentences.into_iter().zip(spots) {
                inner[chunk.min(last)].push((at, sentence));
            }
        }
        for (chunk, mut additions) in inner.into_iter().enumerate() {
            // Behind the sentence they were drawn for; stable, so that a group keeps its order.
            additions.sort_by_key(|(at, _)| *at);
            for (at, sentence) in additions.into_iter().rev() {
                chunks[chunk].insert(at, sentence);
            }
            chunks[chunk].splice(0..0, std::mem::take(&mut heads[chunk]));
            chunks[chunk].append(&mut tails[chunk]);
        }
        chunks.into_iter().map(|sentences| sentences.join(" ").into()).collect()
    }

    /// A chunk that another one follows and whose end is free, or any.
    fn free_boundary(&mut self, tails: &[Vec<String>]) -> usize {
        let free: Vec<usize> = (0..tails.len() - 1).filter(|at| tails[*at].is_empty()).collect();
        if free.is_empty() { self.words.rng.random_range(0..tails.len() - 1) } else { self.words.pick(&free) }
    }

    /// `count` places (chunk, sentence before which); in different chunks if `spread`.
    fn spots(&mut self, chunks: &[Vec<String>], count: usize, spread: bool) -> Vec<(usize, usize)> {
        let mut order: Vec<usize> = (0..chunks.len()).collect();
        order.shuffle(&mut self.words.rng);
        (0..count)
            .map(|number| {
                let chunk =
                    if spread { order[number % order.len()] } else { self.words.rng.random_range(0..chunks.len()) };
                (chunk, self.words.rng.random_range(1..=chunks[chunk].len()))
            })
            .collect()
    }

    /// At least two chunks of one or two passages each, `budget` tokens at most, in random order; passages repeat only
    /// when all have been used.
    fn filler(&mut self, budget: usize) -> Vec<Vec<String>> {
        let mut order: Vec<usize> = Vec::new();
        let mut chunks: Vec<Vec<String>> = Vec::new();
        let mut used = 1;
        loop {
            let mut chunk: Vec<String> = Vec::new();
            for _ in 0..self.words.rng.random_range(1..=2) {
                if order.is_empty() {
                    order = (0..self.passages.len()).collect();
                    order.shuffle(&mut self.words.rng);
                }
                let passage = order.pop().unwrap_or_default();
                chunk.extend(self.passages[passage].sentences.iter().map(|s| (*s).to_owned()));
            }
            let cost = |chunk: &[String]| (self.count)(&chunk.join(" ")) + 1;
            let left = budget.saturating_sub(used);
            let full = cost(&chunk) > left;
            while cost(&chunk) > left && chunk.len() > 1 {
                chunk.pop();
            }
            if cost(&chunk) <= left {
                used += cost(&chunk);
                chunks.push(chunk);
            }
            if full {
                break;
            }
        }
        // Facts over two chunks need two.
        while chunks.len() < 2 {
            let tail = chunks.first_mut().map(|chunk| chunk.split_off(chunk.len() / 2)).unwrap_or_default();
            chunks.push(tail);
        }
        chunks
    }

    /// Key-value lines over four fifths of the context, the rest filler.
    fn key_values(&mut self) -> Made {
        let per_chunk = self.words.pick(&[8_usize, 12, 16]);
        let mut lines: Vec<(String, String)> = Vec::new();
        let mut used = 1;
        while used < self.budget * 4 / 5 {
            let (key, value) = (self.words.key(), self.words.number(5..=5));
            used += (self.count)(&format!("{}\n", line(&key, &value))) + 1;
            lines.push((key, value));
        }
        let (key, value) = lines[self.words.rng.random_range(0..lines.len())].clone();
        let texts = lines.chunks(per_chunk).map(|part| {
            let lines: Vec<String> = part.iter().map(|(key, value)| line(key, value)).collect();
            lines.join("\n")
        });
        let mut chunks: Vec<String> = texts.collect();
        let filler = self.filler(self.budget.saturating_sub(used + chunks.len()));
        chunks.extend(filler.into_iter().filter(|c| !c.is_empty()).map(|sentences| sentences.join(" ")));
        chunks.shuffle(&mut self.words.rng);
        let text = format!("What is the REGISTER_CONTENT in line {key}?");
        let question = Question { task: "kv".into(), text, answers: vec![value], index: 0 };
        (chunks.into_iter().map(Into::into).collect(), question)
    }
}

fn line(key: &str, value: &str) -> String {
    format!("line {key}: REGISTER_CONTENT is <{value}>")
}
