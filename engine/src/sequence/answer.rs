//! A request's answer: what is chosen, what is told of it, and its end.

use std::time::Instant;

use super::{Phase, Sequence};
use crate::answer_text::AnswerPiece;
use crate::backend::cuda::Next;
use crate::error::Result;
use crate::request::{DecodeStats, Event, FinishReason, Finished, TokenEvent, Usage};
use crate::sampler::{Choice, Sampled, likeliest, logprob_of};
use crate::unwind::guarded;

impl Sequence {
    /// The prompt has been read.
    fn begin_answer(&mut self) {
        let (now, admitted) = (Instant::now(), self.admitted.unwrap_or(self.submitted));
        self.decoding = Some(now);
        self.prefill.suffix_tokens = self.prompt;
        self.prefill.prompt_tokens = self.context + self.prompt;
        self.prefill.queue_seconds = (admitted - self.submitted).as_secs_f64();
        self.prefill.seconds = (now - admitted).as_secs_f64();
        let _ = self.events.send(Event::Started(self.prefill.clone()));
    }

    /// What the choice of the next token needs.
    pub(crate) fn choice(&mut self) -> Choice {
        if self.request.forced.is_some() {
            return Choice::Logits;
        }
        let choice = self.sampler.choice();
        if self.wants_logits() { Choice::WithLogits(Box::new(choice)) } else { choice }
    }

    /// Tokens that are reported in the place of each.
    fn top(&self) -> usize {
        self.request.logprobs.unwrap_or(0)
    }

    /// Whether what is reported of a token needs the logits in its place.
    fn wants_logits(&self) -> bool {
        self.top() > 0 || self.request.report_logits
    }

    /// The next token, and the logits in its place where they are wanted, as the model gave them.
    fn choose(&mut self, next: Next) -> Result<(Sampled, Vec<f32>)> {
        let (sampled, raw) = match next {
            Next::Token(sampled) => (sampled, Vec::new()),
            Next::TokenOf(sampled, raw) => (sampled, raw),
            Next::Logits(logits) => match self.forced_token() {
                Some(id) => (Sampled { id, logprob: logprob_of(id, &logits)? }, logits),
                None => {
                    let raw = if self.wants_logits() { logits.clone() } else { Vec::new() };
                    return Ok((self.sample(logits)?, raw));
                }
            },
        };
        self.sampler.chosen(sampled.id);
        Ok((sampled, raw))
    }

    /// The next token, where the request says which.
    fn forced_token(&self) -> Option<u32> {
        self.request.forced.as_ref().and_then(|tokens| tokens.get(self.written()).copied())
    }

    fn sample(&mut self, mut logits: Vec<f32>) -> Result<Sampled> {
        let banned = if self.goes_on() { &self.eos[..] } else { &[] };
        self.sampler.sample_without(&mut logits, banned)
    }

    /// Takes what follows the last token, chooses where that is still to be done, and reports it.
    pub(crate) fn accept(&mut self, next: Next) -> Result<()> {
        guarded("writing an answer", || self.take(next))
    }

    fn take(&mut self, next: Next) -> Result<()> {
        if self.decoding.is_none() {
            self.begin_answer();
        } else {
            self.steps += 1;
        }
        if self.limit == 0 {
            return self.finish(FinishReason::Length);
        }
        let (sampled, raw) = self.choose(next)?;
        let Sampled { id, logprob } = sampled;
        let top = likeliest(&raw, sampled, self.top());
        let logits = if self.request.report_logits { raw } else { Vec::new() };
        let at = Instant::now();
        self.text.push(id);
        if self.eos.contains(&id) {
            let (text, logprobs) = (String::new(), Vec::new());
            let _ = self.events.send(Event::Token(TokenEvent { id, text, logprob, at, logprobs, logits }));
            return self.finish(FinishReason::Stop);
        }
        let may_stop = self.written() > self.request.min_tokens;
        let AnswerPiece { text, logprobs, stopped } = self.answer.push(sampled, top, may_stop)?;
        let _ = self.events.send(Event::Token(TokenEvent { id, text, logprob, at, logprobs, logits }));
        if stopped {
            return self.finish(FinishReason::StopString);
        }
        if self.written() >= self.limit {
            return self.finish(FinishReason::Length);
        }
        Ok(())
    }

    pub(super) fn finish(&mut self, reason: FinishReason) -> Result<()> {
        let rest = if reason == FinishReason::StopString { AnswerPiece::default() } else { self.answer.finish()? };
        let AnswerPiece { text, logprobs, .. } = rest;
        let finished = Finished {
            reason,
            text,
            logprobs,
            usage: Usage {
                prompt_tokens: self.prefill.prompt_tokens,
                reused_tokens: self.prefill.reused_tokens,
                prefix_tokens: self.prefill.prefix_tokens,
                recomputed_tokens: self.prefill.recomputed_tokens,
                completion_tokens: self.written(),
            },
            decode: DecodeStats {
                seconds: self.decoding.map_or(0.0, |since| since.elapsed().as_secs_f64()),
                steps: self.steps,
                cold_keys: self.cold.cold_keys,
                keys_scored: self.cold.keys_scored,
                keys_attended: self.cold.keys_attended,
                index_build_seconds: self.index_seconds + self.kv.index_seconds(),
                index_failures: self.index_failures + self.kv.index_failures(),
            },
        };
        self.phase = Phase::Done;
        let _ = self.events.send(Event::Finished(finished));
        Ok(())
    }
}
