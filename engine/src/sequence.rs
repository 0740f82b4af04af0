//! One running request.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use crate::attention::cold::ColdStats;
use crate::backend::cuda::Next;
use crate::blend::blend;
use crate::error::{EngineError, Result};
use crate::kv::sequence::SequenceKv;
use crate::model::transformer::{Piece, Transformer, Want};
use crate::request::{DecodeStats, Event, FinishReason, Finished, PrefillStats, Request, TokenEvent, Usage};
use crate::sampler::{Sampled, Sampler};
use crate::stop::StopMatcher;
use crate::tokenizer::{StreamDecoder, Tokenizer};

/// Where a request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The context's KV is still to be made.
    Context,
    /// This many tokens of the suffix have been read.
    Suffix(usize),
    /// Tokens are being written.
    Decode,
    /// Nothing is left to do.
    Done,
}

/// A request with its KV and the state of its answer.
pub(crate) struct Sequence {
    pub(crate) request: Request,
    pub(crate) kv: SequenceKv,
    pub(crate) phase: Phase,
    events: UnboundedSender<Event>,
    /// Whether tokens before the suffix exist, so that the strategy holds for the suffix too.
    has_context: bool,
    submitted: Instant,
    admitted: Instant,
    decoding: Instant,
    prefill: PrefillStats,
    steps: usize,
    written: usize,
    limit: usize,
    next: u32,
    cold: ColdStats,
    sampler: Sampler,
    stop: StopMatcher,
    decoder: StreamDecoder,
    eos: Arc<[u32]>,
}

impl Sequence {
    /// `limit`: tokens of the answer at most.
    pub(crate) fn new(
        request: Request,
        events: UnboundedSender<Event>,
        submitted: Instant,
        model: &Transformer,
        tokenizer: &Tokenizer,
        limit: usize,
    ) -> Sequence {
        let now = Instant::now();
        let (kv, prefill, phase) = match &request.context {
            Some(context) => (context.kv.clone(), context.stats.clone(), Phase::Suffix(0)),
            None => (model.new_kv(), PrefillStats::default(), Phase::Context),
        };
        let mut sampler = Sampler::new(request.sampling.clone());
        sampler.observe(&request.prompt.prefix);
        request.prompt.chunks.iter().for_each(|c| sampler.observe(&c.tokens));
        sampler.observe(&request.prompt.suffix);
        Sequence {
            has_context: request.context.is_some() || !request.prompt.chunks.is_empty(),
            kv,
            phase,
            events,
            submitted,
            admitted: now,
            decoding: now,
            prefill,
            steps: 0,
            written: 0,
            limit,
            next: 0,
            cold: ColdStats::default(),
            sampler,
            stop: StopMatcher::new(request.stop.clone()),
            decoder: tokenizer.stream(),
            eos: model.spec.eos.as_slice().into(),
            request,
        }
    }

    /// Whether whoever asked has gone away.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// The token that the next decode step reads.
    pub(crate) fn next_token(&self) -> u32 {
        self.next
    }

    /// Ends the request with an error.
    pub(crate) fn fail(&mut self, error: crate::EngineError) {
        self.phase = Phase::Done;
        // A closed channel means that nobody wants to know.
        let _ = self.events.send(Event::Failed(error));
    }

    /// One step of reading the prompt: the context, or a part of the suffix.
    pub(crate) fn prefill_step(&mut self, model: &Transformer, chunk: usize) -> Result<()> {
        match self.phase {
            Phase::Context => {
                let prompt = &self.request.prompt;
                if self.has_context {
                    let events = &self.events;
                    let blended =
                        blend(model, &prompt.prefix, &prompt.chunks, &self.request.blend, &|| events.is_closed())?;
                    (self.kv, self.prefill) = (blended.kv, blended.stats);
                } else if !prompt.prefix.is_empty() {
                    // A prefix without chunks is an ordinary beginning of the prompt.
                    let prefix = std::mem::take(&mut self.request.prompt.prefix);
                    self.request.prompt.suffix.splice(0..0, prefix);
                }
                self.phase = Phase::Suffix(0);
                Ok(())
            }
            Phase::Suffix(done) => self.suffix_step(model, done, chunk),
            Phase::Decode | Phase::Done => Ok(()),
        }
    }

    fn suffix_step(&mut self, model: &Transformer, done: usize, chunk: usize) -> Result<()> {
        let suffix = &self.request.prompt.suffix;
        let end = suffix.len().min(done + chunk);
        let last = end == suffix.len();
        if self.has_context {
            self.kv.settle(&self.request.attention)?;
        }
        let mut pieces = [Piece {
            attention: self.has_context.then_some(&self.request.attention),
            ban_eos: self.request.ignore_eos,
            ..Piece::exact(&mut self.kv, &suffix[done..end], if last { Want::Last } else { Want::Nothing })
        }];
        let states = model.forward(&mut pieces)?;
        self.cold += pieces[0].stats;
        self.phase = Phase::Suffix(end);
        if last {
            let next = model.next(&states, &[self.is_greedy()])?.pop();
            let next = next.ok_or_else(|| EngineError::Internal("a forward pass gave no row".into()))?;
            self.begin_decode();
            self.accept(next)?;
        }
        Ok(())
    }

    fn begin_decode(&mut self) {
        self.decoding = Instant::now();
        self.prefill.suffix_tokens = self.request.prompt.suffix.len();
        self.prefill.prompt_tokens = self.kv.len();
        self.prefill.queue_seconds = (self.admitted - self.submitted).as_secs_f64();
        self.prefill.seconds = (self.decoding - self.admitted).as_secs_f64();
        self.phase = Phase::Decode;
        let _ = self.events.send(Event::Started(self.prefill.clone()));
    }

    /// Whether the likeliest token is what this request wants, whatever came before.
    pub(crate) fn is_greedy(&self) -> bool {
        self.request.sampling.is_greedy()
    }

    fn choose(&mut self, next: Next) -> Result<Sampled> {
        let mut logits = match next {
            Next::Token(sampled) => return Ok(sampled),
            Next::Logits(logits) => logits,
        };
        if self.request.ignore_eos {
            self.eos.iter().for_each(|&id| {
                if let Some(logit) = logits.get_mut(id as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            });
        }
        self.sampler.sample(&mut logits)
    }

    /// Takes what follows the last token, chooses where that is still to be done, and reports it.
    pub(crate) fn accept(&mut self, next: Next) -> Result<()> {
        if self.limit == 0 {
            return self.finish(FinishReason::Length);
        }
        let sampled = self.choose(next)?;
        self.written += 1;
        self.next = sampled.id;
        if self.eos.contains(&sampled.id) {
            let _ = self.events.send(Event::Token(TokenEvent {
                id: sampled.id,
                text: String::new(),
                logprob: sampled.logprob,
            }));
            return self.finish(FinishReason::Stop);
        }
        let released = self.stop.push(&self.decoder.push(sampled.id)?);
        let _ = self.events.send(Event::Token(TokenEvent {
            id: sampled.id,
            text: released.text,
            logprob: sampled.logprob,
        }));
        if released.stop.is_some() {
            return self.finish(FinishReason::StopString);
        }
        if self.written >= self.limit {
            return self.finish(FinishReason::Length);
        }
        Ok(())
    }

    /// Before a decode step: what left the window finds its place.
    pub(crate) fn settle(&mut self) -> Result<()> {
        self.steps += 1;
        self.kv.settle(&self.request.attention)
    }

    /// This sequence's part of a decode batch; `token` is [`next_token`](Self::next_token).
    pub(crate) fn decode_piece<'a>(&'a mut self, token: &'a [u32]) -> Piece<'a> {
        Piece {
            attention: Some(&self.request.attention),
            ban_eos: self.request.ignore_eos,
            ..Piece::exact(&mut self.kv, token, Want::Last)
        }
    }

    pub(crate) fn add_cold(&mut self, stats: ColdStats) {
        self.cold += stats;
    }

    fn finish(&mut self, reason: FinishReason) -> Result<()> {
        self.phase = Phase::Done;
        let mut text = String::new();
        if reason != FinishReason::StopString {
            let rest = self.decoder.clone().finish()?;
            let released = self.stop.push(&rest);
            text = released.text + &self.stop.finish();
        }
        let finished = Finished {
            reason,
            text,
            usage: Usage {
                prompt_tokens: self.prefill.prompt_tokens,
                reused_tokens: self.prefill.reused_tokens,
                recomputed_tokens: self.prefill.recomputed_tokens,
                completion_tokens: self.written,
            },
            decode: DecodeStats {
                seconds: self.decoding.elapsed().as_secs_f64(),
                steps: self.steps,
                cold_keys: self.cold.cold_keys,
                keys_scored: self.cold.keys_scored,
                keys_attended: self.cold.keys_attended,
                index_build_seconds: self.kv.index_seconds(),
            },
        };
        let _ = self.events.send(Event::Finished(finished));
        Ok(())
    }
}
