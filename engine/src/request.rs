//! What is asked of the engine and what it answers.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::chunk::PromptChunk;
use crate::config::{AttentionConfig, BlendConfig, BlendMode, GateReason};
use crate::error::EngineError;
use crate::kv::sequence::SequenceKv;
use crate::sampler::SamplingParams;

/// A prompt: `prefix`, then chunks whose state may be cached, then `suffix` (the question). Prefix and suffix are
/// always computed.
#[derive(Clone, Default)]
pub struct Prompt {
    /// Tokens before the chunks.
    pub prefix: Vec<u32>,
    /// The context.
    pub chunks: Vec<PromptChunk>,
    /// Tokens behind the chunks; at least one.
    pub suffix: Vec<u32>,
}

impl Prompt {
    /// A prompt without chunks.
    #[must_use]
    pub fn plain(tokens: Vec<u32>) -> Prompt {
        Prompt { suffix: tokens, ..Prompt::default() }
    }

    /// Tokens in all.
    #[must_use]
    pub fn len(&self) -> usize {
        self.prefix.len() + self.chunks.iter().map(|c| c.tokens.len()).sum::<usize>() + self.suffix.len()
    }

    /// Whether there is no token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What one layer's attention computes with. Made by
/// [`Engine::attention_inputs`](crate::Engine::attention_inputs).
pub struct AttentionInputs {
    /// `[tokens, heads, head_dim]`, rotated.
    pub queries: Vec<f32>,
    /// `[tokens, kv_heads, head_dim]`, rotated and rounded to the KV format.
    pub keys: Vec<f32>,
    /// A weight is the softmax of this times the inner product.
    pub scale: f32,
}

/// What the tokens of chunks attend where they stand one behind the other. Made by
/// [`Engine::chunk_attention`](crate::Engine::chunk_attention).
#[derive(Clone, Debug, PartialEq)]
pub struct ChunkAttention {
    /// By chunk and token, the share of its attention that stays within the chunk: the mean over heads and all layers but the
    /// last. What is left of 1 goes to the chunks before it and to the prefix.
    pub own: Vec<Vec<f32>>,
    /// The share that goes to the prompt's prefix.
    pub prefix: Vec<Vec<f32>>,
    /// Seconds that reading took.
    pub seconds: f64,
}

/// The KV of a context that many questions share. Made by [`Engine::prepare_context`](crate::Engine::prepare_context).
pub struct PreparedContext {
    pub(crate) kv: SequenceKv,
    pub(crate) stats: PrefillStats,
    /// Identifies the engine that made it.
    pub(crate) engine: u64,
}

impl PreparedContext {
    /// Tokens of the context.
    #[must_use]
    pub fn len(&self) -> usize {
        self.kv.len()
    }

    /// Whether it has no token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How it was made; `suffix_tokens` is 0.
    #[must_use]
    pub fn stats(&self) -> &PrefillStats {
        &self.stats
    }
}

/// One request.
#[derive(Clone)]
pub struct Request {
    /// The prompt; with `context`, only its suffix.
    pub prompt: Prompt,
    /// A context prepared before.
    pub context: Option<Arc<PreparedContext>>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// The answer ends before the first of these strings.
    pub stop: Vec<String>,
    /// Tokens of the answer at most; `None`: until the text ends. The context's end or that of the memory for KV may end
    /// it earlier: nothing is reserved for an answer.
    pub max_tokens: Option<usize>,
    /// End-of-text tokens are not chosen, and stop strings not looked for, in so many tokens of the answer.
    pub min_tokens: usize,
    /// Each token of the answer's text is reported with its log-probability and those of so many of the likeliest tokens in its
    /// place, [`MAX_TOP_LOGPROBS`] at most; `None`: not reported.
    pub logprobs: Option<usize>,
    /// How decoding attends.
    pub attention: AttentionConfig,
    /// What becomes of cached chunks.
    pub blend: BlendConfig,
    /// Go on behind the model's end-of-text tokens (for benchmarks).
    pub ignore_eos: bool,
    /// For evaluations: the answer is these tokens, whatever the model would choose, and ends with the last of them at the
    /// latest. At least one. Their log-probabilities are the model's.
    pub forced: Option<Arc<[u32]>>,
    /// For evaluations: each token is reported with the model's logits in its place ([`TokenEvent::logits`]).
    pub report_logits: bool,
}

impl Request {
    /// A greedy request with default settings, for an answer of `max_tokens` at most.
    #[must_use]
    pub fn new(prompt: Prompt, max_tokens: usize) -> Request {
        Request {
            prompt,
            context: None,
            sampling: SamplingParams::default(),
            stop: Vec::new(),
            max_tokens: Some(max_tokens),
            min_tokens: 0,
            logprobs: None,
            attention: AttentionConfig::default(),
            blend: BlendConfig::default(),
            ignore_eos: false,
            forced: None,
            report_logits: false,
        }
    }
}

/// Most tokens that are reported in the place of one.
pub const MAX_TOP_LOGPROBS: usize = 20;

/// What happens to a request, in order. `Finished` or `Failed` is the last.
#[derive(Debug)]
pub enum Event {
    /// The prompt has been read. Comes once, before the first token.
    Started(PrefillStats),
    /// A token of the answer.
    Token(TokenEvent),
    /// The answer is complete.
    Finished(Finished),
    /// It will not be completed.
    Failed(EngineError),
}

/// One token of the answer.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenEvent {
    /// Its id.
    pub id: u32,
    /// Text that became certain with it; may be empty.
    pub text: String,
    /// Its log-probability under the model's own distribution.
    pub logprob: f32,
    /// When it was chosen; whoever takes it may come to it later.
    pub at: Instant,
    /// The tokens whose text became certain with it, where the request asks for them.
    pub logprobs: Vec<TokenLogprob>,
    /// The model's logits in its place before anything was adjusted, `[vocab]`, where the request asks for them; else empty.
    pub logits: Vec<f32>,
}

/// A token of an answer's text. The texts of all of them, put together, are the answer's text; so are the bytes, unless the
/// answer ends within a character.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// Its id.
    pub id: u32,
    /// The text that became certain with it: of tokens that are parts of one character, the last has all of it.
    pub text: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its natural log-probability: the log-softmax of the model's logits before anything was adjusted or divided by a
    /// temperature.
    pub logprob: f32,
    /// The likeliest tokens in its place by the same measure, the likeliest first. The token itself may be absent.
    pub top: Vec<Alternative>,
}

/// A token that might have been chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Alternative {
    /// Its id.
    pub id: u32,
    /// Its text; special tokens as they are written.
    pub text: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// See [`TokenLogprob::logprob`].
    pub logprob: f32,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended it.
    Stop,
    /// It reached `max_tokens` or the context limit.
    Length,
    /// It filled the memory for KV, alone.
    Memory,
    /// It reached a stop string.
    StopString,
}

/// The end of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Why it ended.
    pub reason: FinishReason,
    /// Text that had been held back and belongs to the answer.
    pub text: String,
    /// The tokens of it, where the request asks for them.
    pub logprobs: Vec<TokenLogprob>,
    /// Tokens read and written.
    pub usage: Usage,
    /// What decoding did.
    pub decode: DecodeStats,
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// The prompt's.
    pub prompt_tokens: usize,
    /// Context tokens whose cached state was used.
    pub reused_tokens: usize,
    /// Tokens at the beginning of a prompt without context whose state the prefix cache had.
    pub prefix_tokens: usize,
    /// Context tokens that were computed, at least from the check layer on. The suffix does not count.
    pub recomputed_tokens: usize,
    /// The answer's, the end-of-text token included.
    pub completion_tokens: usize,
}

/// How a prompt was read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PrefillStats {
    /// The prompt's tokens.
    pub prompt_tokens: usize,
    /// Context tokens whose cached state was used.
    pub reused_tokens: usize,
    /// Those of them whose state is exact: they stand behind the very tokens that they were computed behind. The others are composed.
    pub exact_tokens: usize,
    /// Tokens at the beginning of a prompt without context whose state the prefix cache had.
    pub prefix_tokens: usize,
    /// Context tokens that were computed, at least from the check layer on.
    pub recomputed_tokens: usize,
    /// Tokens behind the context.
    pub suffix_tokens: usize,
    /// From submission to admission.
    pub queue_seconds: f64,
    /// From admission to the first token's logits.
    pub seconds: f64,
    /// Chunks whose source failed; they were computed.
    pub failed_chunks: usize,
    /// The rule that chose which cached tokens were recomputed. It is another than the request's where that one needs a question
    /// and a context was prepared without one. `None`: no context was made.
    pub rule: Option<BlendMode>,
    /// What was computed beyond one pass over the question and over what was not cached: the layers of each token that were,
    /// over the cached tokens that were not exact times all layers. A second pass over the question and the layers that only
    /// choose are counted. `None`: no such token.
    pub charged_share: Option<f32>,
    /// What the gate decided; `None`: the rule does not ask the question, or nothing was to be chosen.
    pub gate: Option<GateReport>,
    /// Positions, ascending, of the cached tokens that the rule chose to be recomputed.
    pub chosen: Vec<usize>,
    /// How far cached state was off where it was recomputed. `cacheblend`: the mean over cached tokens of |fresh - cached|^2 /
    /// |fresh|^2 of keys and values on the check layer. With a correction: the same of the means over recomputed tokens, by
    /// head, on all layers but the first. `None`: not seen.
    pub blend_deviation: Option<f32>,
}

/// How much the gate had recomputed, and what it went by.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct GateReport {
    /// Why so much.
    pub reason: GateReason,
    /// Share of the scores (the attention that the rule goes by) that the recomputed tokens have, 0 to 1.
    pub held: f32,
    /// In how many chunks the scores are, as if they were in all of them alike: the exponential of the entropy of the chunks'
    /// shares. 0: not seen.
    pub breadth: f32,
}

/// What decoding (and reading a suffix behind a context) did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DecodeStats {
    /// From the first token's logits to the last token.
    pub seconds: f64,
    /// Decode steps.
    pub steps: usize,
    /// Cold keys, summed over queries, layers and query heads.
    pub cold_keys: u64,
    /// Of these, keys whose bytes the index touched.
    pub keys_scored: u64,
    /// Of these, keys that were attended: their values were read.
    pub keys_attended: u64,
    /// Time spent building indexes.
    pub index_build_seconds: f64,
    /// Indexes that could not be built: what left the window from then on was attended exactly.
    pub index_failures: usize,
}

impl DecodeStats {
    /// Share of the cold keys that the index touched; `None` when nothing was cold.
    #[must_use]
    pub fn scored_share(&self) -> Option<f64> {
        (self.cold_keys > 0).then(|| self.keys_scored as f64 / self.cold_keys as f64)
    }

    /// Share of the cold keys that were attended; `None` when nothing was cold.
    #[must_use]
    pub fn attended_share(&self) -> Option<f64> {
        (self.cold_keys > 0).then(|| self.keys_attended as f64 / self.cold_keys as f64)
    }
}

/// The events of one request. Dropping it cancels the request.
pub struct EventStream {
    events: UnboundedReceiver<Event>,
    /// Whether the last event has come.
    ended: bool,
}

impl EventStream {
    pub(crate) fn new(events: UnboundedReceiver<Event>) -> EventStream {
        EventStream { events, ended: false }
    }

    /// The next event; `None` behind the last, which is `Finished` or `Failed` whatever became of the engine.
    pub async fn next(&mut self) -> Option<Event> {
        let event = self.events.recv().await;
        self.checked(event)
    }

    /// The next event, blocking this thread. Not for use inside an async runtime.
    pub fn blocking_next(&mut self) -> Option<Event> {
        let event = self.events.blocking_recv();
        self.checked(event)
    }

    /// Sees to it that the last event comes: who has dropped the request without one has stopped.
    fn checked(&mut self, event: Option<Event>) -> Option<Event> {
        let event = match event {
            None if self.ended => return None,
            None => Event::Failed(EngineError::Stopped("it has ended before this answer was complete".into())),
            Some(event) => event,
        };
        self.ended = matches!(event, Event::Finished(_) | Event::Failed(_));
        Some(event)
    }
}

impl futures::Stream for EventStream {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        self.events.poll_recv(cx).map(|event| self.checked(event))
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use tokio::sync::mpsc::unbounded_channel;

    use super::*;

    #[test]
    fn a_stream_never_ends_without_its_last_event() {
        let stopped = |event: Option<Event>| matches!(event, Some(Event::Failed(EngineError::Stopped(_))));
        let (send, events) = unbounded_channel();
        send.send(Event::Started(PrefillStats::default())).unwrap();
        drop(send);
        let mut stream = EventStream::new(events);
        assert!(matches!(stream.blocking_next(), Some(Event::Started(_))));
        assert!(stopped(stream.blocking_next()) && stream.blocking_next().is_none());

        let (send, events) = unbounded_channel();
        drop(send);
        let mut stream = EventStream::new(events);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert!(stopped(runtime.block_on(StreamExt::next(&mut stream))));
        assert!(runtime.block_on(stream.next()).is_none());

        let (send, events) = unbounded_channel();
        send.send(Event::Failed(EngineError::Cancelled)).unwrap();
        drop(send);
        let mut stream = EventStream::new(events);
        assert!(matches!(runtime.block_on(stream.next()), Some(Event::Failed(EngineError::Cancelled))));
        assert!(stream.blocking_next().is_none(), "nothing comes behind the last");
    }
}
