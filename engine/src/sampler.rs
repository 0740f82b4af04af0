//! Chooses the next token from the logits.
//!
//! Order of operations, each skipped at its neutral value:
//!
//! 1. the log-probabilities of the *raw* logits, which are what is reported;
//! 2. `logit_bias`: added to the logits of the named tokens;
//! 3. `repetition_penalty` r (Keskar et al., arXiv 1909.05858, section 4.1, as in Hugging Face transformers): the
//!    logit of every token that occurs in prompt or answer is divided by r if positive, else multiplied by r;
//! 4. `frequency_penalty` f and `presence_penalty` p (as in the OpenAI API): minus `f * count + p` for every token
//!    that occurs in the *answer* so far;
//! 5. `temperature` 0: the largest logit, the lowest id among equals. Else the logits are divided by it;
//! 6. `top_k`: the k largest stay; then `top_p`: of these, the smallest set of most probable ones whose share
//!    reaches p; then `min_p`: of these, the ones at least `min_p` times as probable as the most probable one;
//! 7. one token is drawn from the softmax of what is left.

use std::collections::HashMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::divergence::largest_logit;
use crate::error::{EngineError, Result};

/// How tokens are chosen. The default is greedy.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 (greedy) to 2.
    pub temperature: f32,
    /// Only the `top_k` likeliest tokens; 0: all.
    pub top_k: usize,
    /// Only the likeliest tokens whose probabilities sum up to this, 0 (the likeliest alone) to 1 (all).
    pub top_p: f32,
    /// Only tokens at least this share as likely as the likeliest, 0 (all) to 1.
    pub min_p: f32,
    /// Above 1 discourages tokens of prompt and answer; 1 is neutral.
    pub repetition_penalty: f32,
    /// Per earlier occurrence in the answer, -2 to 2.
    pub frequency_penalty: f32,
    /// Once for every token that occurs in the answer, -2 to 2.
    pub presence_penalty: f32,
    /// Added to the logits of these tokens, each -100 to 100.
    pub logit_bias: Vec<(u32, f32)>,
    /// Equal seeds, parameters and logits give equal choices; `None`: a seed from the system.
    pub seed: Option<u64>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

impl SamplingParams {
    /// Whether the likeliest token is always chosen, whatever came before it.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
            && self.repetition_penalty == 1.0
            && self.frequency_penalty == 0.0
            && self.presence_penalty == 0.0
            && self.logit_bias.is_empty()
    }

    /// Whether a random number runs over the tokens from the likeliest on, not in the order of their ids.
    pub(crate) fn is_ordered(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0
    }

    /// Checks every parameter's range, for a vocabulary of `vocab` tokens.
    ///
    /// # Errors
    /// [`EngineError::Sampling`], naming the parameter.
    pub fn validate(&self, vocab: usize) -> Result<()> {
        // No range contains NaN, as every comparison with it is false.
        let within = |value: f32, low: f32, high: f32| (low..=high).contains(&value);
        let (top_p, penalty) = (self.top_p, self.repetition_penalty);
        let (frequency, presence) = (self.frequency_penalty, self.presence_penalty);
        let numbers = [
            (
                "temperature",
                self.temperature,
                within(self.temperature, 0.0, 2.0),
                "a number from 0 to 2, as in the OpenAI API",
            ),
            ("top_p", top_p, within(top_p, 0.0, 1.0), "a number from 0 to 1"),
            ("min_p", self.min_p, within(self.min_p, 0.0, 1.0), "a number from 0 to 1"),
            ("repetition_penalty", penalty, penalty > 0.0 && penalty.is_finite(), "a number above 0"),
            ("frequency_penalty", frequency, within(frequency, -2.0, 2.0), "a number from -2 to 2"),
            ("presence_penalty", presence, within(presence, -2.0, 2.0), "a number from -2 to 2"),
        ];
        let biases = self
            .logit_bias
            .iter()
            .map(|&(_, bias)| ("logit_bias", bias, within(bias, -100.0, 100.0), "numbers from -100 to 100"));
        for (parameter, value, allowed, expected) in numbers.into_iter().chain(biases) {
            if !allowed {
                return Err(EngineError::Sampling { parameter, expected, found: value.to_string() });
            }
        }
        // Ten say enough.
        let beyond = self.logit_bias.iter().map(|(token, _)| *token).filter(|token| *token as usize >= vocab).take(10);
        let beyond: Vec<String> = beyond.map(|token| token.to_string()).collect();
        if beyond.is_empty() {
            return Ok(());
        }
        Err(EngineError::Sampling {
            parameter: "logit_bias",
            expected: "token ids of the model's vocabulary",
            found: format!("{}, the vocabulary has {vocab}", beyond.join(", ")),
        })
    }
}

/// A chosen token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    /// The token.
    pub id: u32,
    /// Its natural log-probability under the model's raw distribution.
    pub logprob: f32,
}

/// What the choice of a token needs: little enough to be made where the logits are, or the logits.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Choice {
    /// The likeliest token.
    Greedy,
    /// A token is drawn, or logits are adjusted first.
    Draw(Box<Draw>),
    /// All logits.
    Logits,
    /// As the other says, and all logits as they were before.
    WithLogits(Box<Choice>),
}

impl Choice {
    /// How the token itself is chosen.
    pub(crate) fn of_token(&self) -> &Choice {
        match self {
            Choice::WithLogits(choice) => choice.of_token(),
            choice => choice,
        }
    }

    pub(crate) fn wants_logits(&self) -> bool {
        matches!(self, Choice::WithLogits(_))
    }
}

/// A choice by all parameters.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Draw {
    pub(crate) params: SamplingParams,
    /// The random number of the draw, below 1.
    pub(crate) at: f64,
    /// Tokens whose logits are adjusted, each once.
    pub(crate) adjusted: Vec<Adjusted>,
}

/// What the adjustment of a token's logit depends on, beside the parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Adjusted {
    pub(crate) id: u32,
    /// Of `logit_bias`, 0 where it names the token not.
    pub(crate) bias: f32,
    /// How often it occurs in the answer; `None`: neither there nor in the prompt.
    pub(crate) count: Option<u32>,
}

/// Chooses the tokens of one answer and remembers what it has chosen.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    rng: ChaCha8Rng,
    /// A random number that a [`Choice`] was given.
    at: Option<f64>,
    /// Every token of prompt or answer -> how often it occurs in the answer.
    seen: HashMap<u32, u32>,
}

impl Sampler {
    /// A sampler for one answer. `params` must have passed [`SamplingParams::validate`].
    #[must_use]
    pub fn new(params: SamplingParams) -> Self {
        let seed = params.seed.unwrap_or_else(rand::random);
        Sampler { params, rng: ChaCha8Rng::seed_from_u64(seed), at: None, seen: HashMap::new() }
    }

    /// Tells the tokens of the prompt, for the repetition penalty.
    pub fn observe(&mut self, prompt: &[u32]) {
        if self.params.repetition_penalty != 1.0 {
            for &token in prompt {
                self.seen.entry(token).or_default();
            }
        }
    }

    /// What the next choice needs.
    pub(crate) fn choice(&mut self) -> Choice {
        if self.params.is_greedy() {
            return Choice::Greedy;
        }
        let Sampler { params, rng, at, .. } = self;
        // The likeliest is not drawn.
        let at = if params.temperature == 0.0 { 0.0 } else { *at.get_or_insert_with(|| rng.random()) };
        Choice::Draw(Box::new(Draw { params: params.clone(), at, adjusted: self.adjusted() }))
    }

    /// The tokens whose logits are adjusted, each once.
    fn adjusted(&self) -> Vec<Adjusted> {
        let params = &self.params;
        let mut biases: HashMap<u32, f32> = HashMap::new();
        params.logit_bias.iter().for_each(|&(id, bias)| *biases.entry(id).or_default() += bias);
        let mut all = Vec::new();
        if params.repetition_penalty != 1.0 || params.frequency_penalty != 0.0 || params.presence_penalty != 0.0 {
            let seen = |(&id, &count)| Adjusted { id, bias: biases.remove(&id).unwrap_or(0.0), count: Some(count) };
            all.extend(self.seen.iter().map(seen));
        }
        all.extend(biases.into_iter().map(|(id, bias)| Adjusted { id, bias, count: None }));
        all
    }

    /// Remembers a token that was chosen elsewhere, as [`choice`](Sampler::choice) said.
    pub(crate) fn chosen(&mut self, id: u32) {
        self.at = None;
        *self.seen.entry(id).or_default() += 1;
    }

    /// Chooses a token, remembers it as part of the answer, and leaves the adjusted logits in `logits` (`[vocab]`).
    ///
    /// # Errors
    /// [`EngineError::BadLogits`] if a logit is NaN or plus infinity, or all that may be chosen are minus infinity.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<Sampled> {
        self.sample_without(logits, &[])
    }

    /// As [`sample`](Sampler::sample), but none of the tokens `banned`, which count in the log-probability all the same.
    ///
    /// # Errors
    /// As [`sample`](Sampler::sample).
    pub fn sample_without(&mut self, logits: &mut [f32], banned: &[u32]) -> Result<Sampled> {
        let log_sum = log_sum_exp(logits)?;
        let plain = self.params == (SamplingParams { seed: self.params.seed, ..SamplingParams::default() });
        let unadjusted = if plain { Vec::new() } else { logits.to_vec() };
        for &id in banned {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        if !plain {
            self.adjust(logits);
        }
        let likeliest = largest_logit(logits).unwrap_or_default();
        if logits[likeliest as usize] == f32::NEG_INFINITY {
            return Err(EngineError::BadLogits { token: likeliest as usize, value: f32::NEG_INFINITY });
        }
        let id = if self.params.temperature == 0.0 { likeliest } else { self.draw(logits) };
        let raw = if plain { logits[id as usize] } else { unadjusted[id as usize] };
        let sampled = Sampled { id, logprob: raw - log_sum };
        self.chosen(sampled.id);
        Ok(sampled)
    }

    /// No logit becomes plus infinity: a small penalty divides a large one at most to the largest number.
    fn adjust(&self, logits: &mut [f32]) {
        let params = &self.params;
        for token in self.adjusted() {
            let Some(logit) = logits.get_mut(token.id as usize) else { continue };
            *logit += token.bias;
            let Some(count) = token.count else { continue };
            let penalty = params.repetition_penalty;
            *logit = if *logit > 0.0 { (*logit / penalty).min(f32::MAX) } else { *logit * penalty };
            if count > 0 {
                *logit -= params.frequency_penalty * count as f32 + params.presence_penalty;
            }
        }
    }

    fn draw(&mut self, logits: &[f32]) -> u32 {
        let candidates = self.candidates(logits);
        let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        let mut left = self.at.take().unwrap_or_else(|| self.rng.random()) * total;
        for &(id, weight) in &candidates {
            left -= weight;
            if left < 0.0 {
                return id;
            }
        }
        // Rounding can leave a trace beyond the last one that has a weight.
        candidates.iter().rfind(|(_, weight)| *weight > 0.0).map_or(0, |(id, _)| *id)
    }

    /// The tokens that may be drawn by adjusted logits, with weights in proportion to their probabilities.
    pub(crate) fn candidates(&self, logits: &[f32]) -> Vec<(u32, f64)> {
        let params = &self.params;
        let mut kept: Vec<(u32, f32)> = (0u32..).zip(logits.iter().copied()).collect();
        let descending = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if params.top_k > 0 && params.top_k < kept.len() {
            kept.select_nth_unstable_by(params.top_k - 1, descending);
            kept.truncate(params.top_k);
        }
        // The order also decides which token a random number means, so that equal seeds give equal choices: the likeliest
        // first where the least likely are left out, else as they are numbered.
        if params.is_ordered() {
            kept.sort_unstable_by(descending);
        }
        let top = kept.iter().fold(f32::NEG_INFINITY, |top, (_, logit)| top.max(*logit));
        let weight = |logit: f32| (f64::from(logit - top) / f64::from(params.temperature)).exp();
        let mut weighted: Vec<(u32, f64)> = kept.iter().map(|&(id, logit)| (id, weight(logit))).collect();
        if params.top_p < 1.0 {
            let goal = weighted.iter().map(|(_, w)| w).sum::<f64>() * f64::from(params.top_p);
            let mut sum = 0.0;
            let reached = weighted.iter().position(|(_, w)| {
                sum += w;
                sum >= goal
            });
            weighted.truncate(reached.map_or(weighted.len(), |last| last + 1));
        }
        // The likeliest has weight 1.
        weighted.retain(|(_, w)| *w >= f64::from(params.min_p));
        weighted
    }
}

/// The `count` likeliest tokens with their log-probabilities, the lowest id first among equals. `logits`: raw, as `sampled` was
/// chosen from them, whose log-probability says what they sum up to.
pub(crate) fn likeliest(logits: &[f32], sampled: Sampled, count: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    for (id, &logit) in (0u32..).zip(logits) {
        if best.len() == count && best.last().is_none_or(|(_, least)| logit <= *least) {
            continue;
        }
        let place = best.partition_point(|(_, other)| *other >= logit);
        best.insert(place, (id, logit));
        best.truncate(count);
    }
    let Some(&(_, top)) = best.first() else { return best };
    // Where the chosen logit is far from the others, their difference has lost what the sum was.
    let log_sum = (logits[sampled.id as usize] - sampled.logprob).clamp(top, top + (logits.len() as f32).ln());
    let logprob = |id, logit| if id == sampled.id { sampled.logprob } else { logit - log_sum };
    best.into_iter().map(|(id, logit)| (id, logprob(id, logit))).collect()
}

/// The natural log-probability of a token of the vocabulary.
///
/// # Errors
/// [`EngineError::BadLogits`], as for sampling.
pub(crate) fn logprob_of(id: u32, logits: &[f32]) -> Result<f32> {
    Ok(logits[id as usize] - log_sum_exp(logits)?)
}

/// The logarithm of the sum of exponentials; refuses what no model should produce.
fn log_sum_exp(logits: &[f32]) -> Result<f32> {
    let mut max = f32::NEG_INFINITY;
    for (token, &value) in logits.iter().enumerate() {
        if value.is_nan() || value == f32::INFINITY {
            return Err(EngineError::BadLogits { token, value });
        }
        max = max.max(value);
    }
    if max == f32::NEG_INFINITY {
        return Err(EngineError::BadLogits { token: 0, value: max });
    }
    let sum: f64 = logits.iter().map(|&v| f64::from(v - max).exp()).sum();
    Ok(max + sum.ln() as f32)
}

#[cfg(test)]
#[path = "sampler/tests.rs"]
mod tests;
